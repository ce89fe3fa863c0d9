# SPDX-License-Identifier: MIT
"""What a pool's child needs to begin: how to find the app, its settings, and how to log.

A forked child has the app already; a spawned one imports it by name and gets the settings that
were changed since.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import Any, Dict, Optional

from ..exceptions import ImproperlyConfigured
from ..log import LoggingSetup, get_logger, setup_worker_logging
from ..text import import_object
from ..trace import TaskRunner

logger = get_logger(__name__)


class AppRunnerSpec:
    """How a child gets its runner: the app itself where it was forked, by name where it was spawned.

    `log` holds the arguments of `setup_worker_logging` and `log_setup` what that did in the worker
    itself; None = logging is the host's business.
    """

    def __init__(self, app: Any, hostname: str, log: Optional[Dict[str, Any]]) -> None:
        self.app = app
        self.hostname = hostname
        self.log = log
        self.log_setup: Optional[LoggingSetup] = None
        self.pid = os.getpid()
        self.path = ""
        self.settings: Dict[str, Any] = {}

    def __getstate__(self) -> Dict[str, Any]:
        settings = {
            name: value for name, (value, _) in self.app.conf.changes().items() if _can_pickle(name, value)
        }
        path = find_app(self.app)
        return {**self.__dict__, "app": None, "log_setup": None, "path": path, "settings": settings}

    def build(self) -> TaskRunner:
        """Return the runner; in a spawned child, import the app and its tasks first."""
        if self.app is None:
            self.app = import_object(self.path)
            self.app.conf.update(self.settings)
            self.app.import_modules()
            if self.log is not None:
                setup_worker_logging(**self.log, index=_child_index())
        elif self.log_setup is not None and os.getpid() != self.pid:
            self.log_setup.reopen(_child_index())
        return TaskRunner(self.app, self.hostname)


def _child_index() -> int:
    """Return the number of this pool process: 1 for the first."""
    import multiprocessing  # this process was made by it

    last = multiprocessing.current_process().name.rpartition("-")[2]
    return int(last) if last.isdecimal() else 0


def _can_pickle(name: str, value: Any) -> bool:
    try:
        pickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError):
        logger.debug(
            "setting %s cannot be pickled: spawned children have what their import of the app sets", name
        )
        return False
    return True


def find_app(app: Any) -> str:
    """Return the ``module:name`` under which another process can import `app`."""
    package = __package__.partition(".worker")[0]
    likely = ["__main__", *sorted({task.__module__ for task in app.tasks.values()}), *app.conf.include]
    for name in dict.fromkeys([*likely, *sys.modules]):
        if name == package or name.startswith((package + ".", "__mp_main__")):
            continue
        for attribute, value in list(getattr(sys.modules.get(name), "__dict__", {}).items()):
            if value is app:
                return f"{name}:{attribute}"
    raise ImproperlyConfigured(
        f"{app!r} is in no module's top level, so a spawned child cannot import it; put it there,"
        " or use the pool threads, or the start method fork"
    )

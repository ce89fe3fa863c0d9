# SPDX-License-Identifier: MIT
"""One Redis server, workers and callers of both kinds; see `conftest`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import pytest
from interop_tasks import BACKEND, BROKER, FOLDER, MORE, Journal, settings
from servers import RedisServer
from waiting import wait_until
from workers import READY_FILE, Program, environment

#: What of Celery must be there and is not.
MISSING = [name for name in ("celery", "redis") if importlib.util.find_spec(name) is None]
HERE = Path(__file__).parent
#: caller, worker
PAIRS = (("celery", "celery"), ("celery", "miniq"), ("miniq", "celery"))
#: Seconds; generous, nothing waits for them to pass.
TIMEOUT_S = 30.0
#: Seconds that a worker's hold on a message lasts unless renewed; short, so that a failure shows.
LEASE_S = 2.0


class Worker(Program):
    """A worker process of either kind."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, env: Dict[str, str]) -> None:
        self.name = name
        self._ready_file = folder / f"{name}.ready"
        super().__init__(
            [sys.executable, "-m", *command], folder, name, {**env, READY_FILE: str(self._ready_file)}
        )
        #: Length of its log when the test began.
        self.seen = 0

    def wait_ready(self) -> "Worker":
        """Wait until it takes messages."""
        wait_until(
            lambda: self._ready_file.exists() or self.exitcode is not None,
            TIMEOUT_S,
            lambda: f"{self.name} takes messages; its log:\n{self.log}",
        )
        assert self._ready_file.exists(), f"{self.name} ended with {self.exitcode}; its log:\n{self.log}"
        return self

    def __repr__(self) -> str:
        return f"<worker {self.name} (pid {self.pid})>"


class Side:
    """A caller of one kind: its app, and its exceptions under the names both have."""

    def __init__(self, kind: str, app: Any, exceptions: Any) -> None:
        self.kind = kind
        self.app = app
        self.exceptions = exceptions

    def call(self, name: str, *args: Any, kwargs: Optional[Dict[str, Any]] = None, **options: Any) -> Any:
        """Send ``interop.name``; return its result object."""
        return self.app.tasks[f"interop.{name}"].apply_async(args, kwargs or {}, **options)

    def sig(self, name: str, *args: Any, **options: Any) -> Any:
        """Return a signature of ``interop.name``, as by somebody who has only its name."""
        return self.app.signature(f"interop.{name}", args=args, **options)


class Fleet:
    """The server, the workers and the callers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = Journal(folder)
        self.server = RedisServer(folder / "redis")
        self.workers: Dict[str, Worker] = {}
        self._sides: Dict[Tuple[str, int], Side] = {}

    def urls(self, db: int) -> Tuple[str, str]:
        """Return broker and backend; two numbers, as their keys have nothing in common."""
        return self.server.url(db), self.server.url(db + 1)

    def start(self, name: str, kind: str, queues: str, *args: str, db: int = 0, **more: Any) -> Worker:
        """Start a worker; do not wait until it is ready.  `more` are settings."""
        broker, backend = self.urls(db)
        variables = {BROKER: broker, BACKEND: backend, FOLDER: str(self.folder), MORE: json.dumps(more)}
        env = environment(HERE, HERE.parent, **variables)
        if kind == "celery":
            del env["PYTHONWARNINGS"]  # Celery's are its own business
            env["C_FORCE_ROOT"] = "1"  # containers of CI run as root; without it there is no pickle
        node = f"{name}@interop"
        command = [kind, "-A", f"{kind}_app:app", "worker", "-l", "INFO", "-n", node, "-Q", queues, *args]
        worker = self.workers[name] = Worker(name, command, self.folder, env)
        return worker

    def side(self, kind: str, db: int = 0, **more: Any) -> Side:
        """Return the caller of this kind; `more` are settings for the first time."""
        found = self._sides.get((kind, db))
        if found is None:
            # Not at the top: without Celery this file must be importable.
            apps = importlib.import_module(f"{kind}_app")
            exceptions = importlib.import_module(f"{kind}.exceptions")
            app = apps.make(**settings(*self.urls(db), **more))
            found = self._sides[kind, db] = Side(kind, app, exceptions)
        return found

    def stop(self) -> List[str]:
        """End everything; return what there is to complain about."""
        complaints: List[str] = []
        for worker in self.workers.values():
            if worker.exitcode is None:
                worker.process.terminate()
        for worker in self.workers.values():
            complaints += worker.clean_up()
        for side in self._sides.values():
            if side.kind == "celery":
                backend = side.app.backend
                backend.result_consumer.stop()
                backend.client.connection_pool.disconnect()
                # Results unsubscribe when they are collected; those in the traceback of a failed test
                # are so when there is no server any more.
                backend.remove_pending_result = lambda result: None
                side.app.pool.force_close_all()
            side.app.close()
        self.server.stop()
        return complaints


class Pair(NamedTuple):
    """Who calls whom."""

    fleet: Fleet
    client: Side
    #: Kind and queue of the worker that is called, and of the other one.
    worker: str
    queue: str
    other: str
    other_queue: str

    @property
    def journal(self) -> Journal:
        return self.fleet.journal

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        """Send a task to the worker."""
        return self.client.call(name, *args, queue=self.queue, **options)

    def started(self, key: str, count: int = 1) -> List[List[Any]]:
        """Wait until the journal has `count` lines under `key`; return them."""
        return wait_until(
            lambda: (lines := self.journal.of(key))[count - 1 :] and lines,
            TIMEOUT_S,
            lambda: f"{count} lines under {key}: {self.journal.of(key)}",
        )


def skip_without_celery() -> None:
    """Skip the module that calls it where Celery is not installed."""
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}; tox -e interop has it", allow_module_level=True)

# SPDX-License-Identifier: MIT
"""miniq: a task queue in pure standard-library Python.

    from miniq import MiniQ

    app = MiniQ("proj")

    @app.task
    def add(x, y):
        return x + y

    add.delay(2, 3).get(timeout=10)

with a worker beside it: ``python -m miniq -A proj worker``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, List

if TYPE_CHECKING:
    from .app import MiniQ, shared_task
    from .canvas import (
        Signature,
        chain,
        chord,
        chunks,
        group,
        maybe_signature,
        signature,
        subtask,
        xmap,
        xstarmap,
    )
    from .result import AsyncResult, EagerResult, GroupResult, allow_join_result
    from .resultset import ResultSet
    from .routing import Broadcast, Exchange, Queue
    from .stamping import StampingVisitor
    from .task import Task

    Celery = MiniQ
    current_app: MiniQ
    current_task: Any

__version__ = "0.1.0"

#: Public name -> where it is, "module:object".  Imported at its first use, so that what needs no app (a
#: look at a worker's health, every few seconds) does not load one.
PUBLIC = {
    "AsyncResult": ".result:AsyncResult",
    "Broadcast": ".routing:Broadcast",
    #: The name Celery projects import.
    "Celery": ".app:MiniQ",
    "EagerResult": ".result:EagerResult",
    "Exchange": ".routing:Exchange",
    "GroupResult": ".result:GroupResult",
    "MiniQ": ".app:MiniQ",
    "Queue": ".routing:Queue",
    "ResultSet": ".resultset:ResultSet",
    "Signature": ".canvas:Signature",
    "StampingVisitor": ".stamping:StampingVisitor",
    "Task": ".task:Task",
    "allow_join_result": ".result:allow_join_result",
    "chain": ".canvas:chain",
    "chord": ".canvas:chord",
    "chunks": ".canvas:chunks",
    "current_app": "._state:current_app",
    "current_task": "._state:current_task",
    "group": ".canvas:group",
    "maybe_signature": ".canvas:maybe_signature",
    "shared_task": ".app:shared_task",
    "signature": ".canvas:signature",
    "subtask": ".canvas:subtask",
    "xmap": ".canvas:xmap",
    "xstarmap": ".canvas:xstarmap",
}
#: Modules that are there after ``import miniq``, as they are in Celery.
_MODULES = ("app", "canvas", "exceptions", "result", "routing", "signals", "states", "task")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", package=__name__)
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = PUBLIC[name].partition(":")
    found = getattr(import_module(module, package=__name__), attribute)
    if name in ("current_app", "current_task"):
        return found()  # looked up at each use: which app and task are current changes all the time
    globals()[name] = found
    return found


def __dir__() -> List[str]:
    return sorted({*globals(), *PUBLIC, *_MODULES})


__all__ = [
    "AsyncResult",
    "Broadcast",
    "Celery",
    "EagerResult",
    "Exchange",
    "GroupResult",
    "MiniQ",
    "Queue",
    "ResultSet",
    "Signature",
    "StampingVisitor",
    "Task",
    "allow_join_result",
    "chain",
    "chord",
    "chunks",
    "current_app",
    "current_task",
    "group",
    "maybe_signature",
    "shared_task",
    "signature",
    "subtask",
    "xmap",
    "xstarmap",
]

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

from typing import TYPE_CHECKING, Any

from ._state import current_app as _current_app
from ._state import current_task as _current_task
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

if TYPE_CHECKING:
    current_app: MiniQ
    current_task: Any

__version__ = "0.1.0"

#: The name Celery projects import.
Celery = MiniQ


def __getattr__(name: str) -> Any:
    # Looked up at each use: which app and task are current changes all the time.
    if name == "current_app":
        return _current_app()
    if name == "current_task":
        return _current_task()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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

# SPDX-License-Identifier: MIT
"""What is current: the app, the running task, and the Protocols by which lower floors look up.

The running task is a frame in a context variable, so that threads, asyncio tasks and tasks called
inside tasks each see their own.  The current app is per thread, with a default for the process.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any, Callable, Iterator, List, Optional, Protocol, Tuple


class TaskLike(Protocol):
    """As much of a task as the words floor needs."""

    name: str


class RequestLike(Protocol):
    """As much of a request as the words floor needs."""

    id: Optional[str]


class AppLike(Protocol):
    """As much of an app as the words floor needs."""

    main: Optional[str]


class Frame:
    """A task that is running here and its request; `below` is the one that called it."""

    __slots__ = ("task", "request", "below")

    def __init__(self, task: Any, request: Any, below: "Optional[Frame]") -> None:
        self.task = task
        self.request = request
        self.below = below


_frame: "ContextVar[Optional[Frame]]" = ContextVar("miniq_frame", default=None)
_join_allowed: "ContextVar[bool]" = ContextVar("miniq_join_allowed", default=False)


def push_frame(task: TaskLike, request: RequestLike) -> "Token[Optional[Frame]]":
    """Make `task` the current one; give the token to `pop_frame`."""
    return _frame.set(Frame(task, request, _frame.get()))


def pop_frame(token: "Token[Optional[Frame]]") -> None:
    """Make the task current again that was before."""
    _frame.reset(token)


def current_frame() -> Optional[Frame]:
    """Return the innermost frame, None outside tasks."""
    return _frame.get()


def request_of(task: TaskLike) -> Any:
    """Return the innermost request of `task` itself, None when it is not running here."""
    frame = _frame.get()
    while frame is not None:
        if frame.task is task:
            return frame.request
        frame = frame.below
    return None


def worker_frame() -> Optional[Frame]:
    """Return the innermost frame that came from a message (not a plain call), or None."""
    frame = _frame.get()
    while frame is not None and frame.request.called_directly:
        frame = frame.below
    return frame


def current_task_info() -> Optional[Tuple[str, str]]:
    """Return (name, id) of the running task for log lines, None outside tasks."""
    frame = _frame.get()
    if frame is None:
        return None
    return frame.task.name, frame.request.id or "???"


def current_task() -> Any:
    """Return the running task, None outside tasks."""
    frame = _frame.get()
    return frame.task if frame is not None else None


def current_worker_task() -> Any:
    """Return the running task that came from a message, None outside."""
    frame = worker_frame()
    return frame.task if frame is not None else None


def join_allowed() -> bool:
    """Say whether waiting for a result is safe here.

    It is not inside a task of a worker: the awaited one may need the very slot this one holds.
    """
    if _join_allowed.get():
        return True
    frame = worker_frame()
    return frame is None or frame.request.is_eager


@contextmanager
def allow_join_result() -> Iterator[None]:
    """Allow `AsyncResult.get` inside a task.

    Only where it cannot deadlock: when the awaited task runs in other workers than this one.
    """
    token = _join_allowed.set(True)
    try:
        yield
    finally:
        _join_allowed.reset(token)


# -- apps ----------------------------------------------------------------------------------------

_local = threading.local()
_default_app: Any = None
_apps: "weakref.WeakSet[Any]" = weakref.WeakSet()
_shared: "List[Callable[[Any], Any]]" = []
_make_default: Optional[Callable[[], Any]] = None


def register_app(app: AppLike) -> None:
    """Remember `app` and give it every shared task."""
    _apps.add(app)
    for make in list(_shared):
        make(app)


def set_current_app(app: AppLike) -> None:
    """Make `app` the current one of this thread, and the default if there is none."""
    global _default_app
    _local.app = app
    if _default_app is None:
        _default_app = app


def set_default_app(app: Optional[AppLike]) -> None:
    """Make `app` the one that threads without a current app use."""
    global _default_app
    _default_app = app


def on_missing_app(make: Callable[[], Any]) -> None:
    """Set what makes the default app when one is needed and none exists."""
    global _make_default
    _make_default = make


def current_app() -> Any:
    """Return the current app; makes a default one where none was ever made."""
    app = getattr(_local, "app", None) or _default_app
    if app is None:
        if _make_default is None:
            raise RuntimeError("no app exists: make one with miniq.MiniQ(...)")
        app = _make_default()
        set_default_app(app)
    return app


def apps() -> List[Any]:
    """Return the living apps, in no order."""
    return list(_apps)


def add_shared(make: Callable[[Any], Any]) -> None:
    """Call `make(app)` for every app there is and will be."""
    _shared.append(make)
    for app in apps():
        make(app)

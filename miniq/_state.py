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
    """A task that is running here and its request; `below` is the one that called it.

    `entered` is False until the task's body begins: a task with its own ``__call__`` gets there
    through ``super().__call__``, which then must not make another frame.
    """

    __slots__ = ("task", "request", "below", "entered")

    def __init__(self, task: Any, request: Any, below: "Optional[Frame]", entered: bool) -> None:
        self.task = task
        self.request = request
        self.below = below
        self.entered = entered


_frame: "ContextVar[Optional[Frame]]" = ContextVar("miniq_frame", default=None)
_join_allowed: "ContextVar[bool]" = ContextVar("miniq_join_allowed", default=False)


def push_frame(task: TaskLike, request: RequestLike, entered: bool = True) -> "Token[Optional[Frame]]":
    """Make `task` the current one; give the token to `pop_frame`."""
    return _frame.set(Frame(task, request, _frame.get(), entered))


def pop_frame(token: "Token[Optional[Frame]]") -> None:
    """Make the task current again that was before."""
    _frame.reset(token)


def drop_frame() -> None:
    """Make the task below the current one, where there is no token."""
    frame = _frame.get()
    if frame is not None:
        _frame.set(frame.below)


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
#: True once somebody chose the default: apps made later do not take its place.
_default_chosen = False
_apps: "weakref.WeakSet[Any]" = weakref.WeakSet()
_shared: "List[Callable[[Any], Any]]" = []
_make_default: Optional[Callable[[], Any]] = None


def register_app(app: AppLike) -> None:
    """Remember `app` and give it every shared task."""
    _apps.add(app)
    for make in list(_shared):
        make(app)


def set_current_app(app: AppLike) -> None:
    """Make `app` the current one of this thread, and of the threads that have none of their own."""
    global _default_app
    _local.app = app
    if not _default_chosen:
        _default_app = app


def set_default_app(app: Optional[AppLike]) -> None:
    """Make `app` the one of threads without a current app, whatever is made later; None = undo that."""
    global _default_app, _default_chosen
    _default_app = app
    _default_chosen = app is not None


def on_missing_app(make: Callable[[], Any]) -> None:
    """Set what makes the default app when one is needed and none exists."""
    global _make_default
    _make_default = make


def current_app() -> Any:
    """Return the running task's app, else the current one; makes one where none was ever made."""
    global _default_app
    frame = _frame.get()
    app = getattr(frame.task, "app", None) if frame is not None else None
    app = app or getattr(_local, "app", None) or _default_app
    if app is None:
        if _make_default is None:
            raise RuntimeError("no app exists: make one with miniq.MiniQ(...)")
        app = _default_app = _make_default()
    return app


def apps() -> List[Any]:
    """Return the living apps, in no order."""
    return list(_apps)


def add_shared(make: Callable[[Any], Any]) -> None:
    """Call `make(app)` for every app there is and will be."""
    _shared.append(make)
    for app in apps():
        make(app)


# -- what Celery has and this version has not ------------------------------------------------------

_NOT_BUILT = frozenset(
    """
    WorkController setup_security event_dispatcher amqp
    log loader pool producer_or_acquire producer_pool
    bugreport config_from_cmdline on_after_fork fixups steps
    on_replace delay_on_commit apply_async_on_commit
    """.split()
)


def missing(owner: str, name: str) -> AttributeError:
    """Return the error for an attribute that is not there; says so where Celery has it."""
    reason = ": Celery has it, this version of miniq does not" if name in _NOT_BUILT else ""
    return AttributeError(f"{owner} has no attribute {name!r}{reason}")

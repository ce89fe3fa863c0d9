# SPDX-License-Identifier: MIT
"""Every error miniq raises, in one tree, grouped by who must act.

The names are Celery's (and, where Celery re-exports them, kombu's and billiard's) and they
travel under those names: `WIRE_MODULES` says which module a class claims on the wire, so that a
Celery client catches ``celery.exceptions.TaskRevokedError`` whoever ran the task.
"""

from __future__ import annotations

import datetime as _datetime
from typing import Any, Dict, Optional, Union


class MiniqError(Exception):
    """Root of every error raised by miniq."""


#: The name Celery projects import.
CeleryError = MiniqError


# -- the operator or the author must act ---------------------------------------------------------


class ImproperlyConfigured(MiniqError):
    """A setting, URL or command line that cannot work; the text names it and its value."""


class SecurityError(MiniqError):
    """Something that may be an attack was refused."""


class UnknownSettingWarning(UserWarning):
    """A setting name nobody knows; the text names the nearest known one."""


class DuplicateTaskNameWarning(UserWarning):
    """Two different functions were registered under one task name."""


class DuplicateNodenameWarning(UserWarning):
    """Two workers answer to one node name."""


class AlwaysEagerIgnored(UserWarning):
    """`send_task` sends by name and cannot run eagerly."""


# -- the caller must act -------------------------------------------------------------------------


class TaskError(MiniqError):
    """Something about one task or its message."""


class QueueNotFound(KeyError, TaskError):
    """The queue is not configured and `task_create_missing_queues` is off."""


class IncompleteStream(TaskError):
    """The end of a data stream was found before its length said so."""


class NotRegistered(KeyError, TaskError):
    """No task of this name is registered here."""

    def __repr__(self) -> str:
        name = self.args[0] if self.args else None
        return f"Task of kind {name} never registered, please make sure it's imported."


class AlreadyRegistered(TaskError):
    """The task is already registered."""


class TimeoutError(TaskError):  # noqa: A001 - Celery's public name
    """The time given to an operation is over."""


class MaxRetriesExceededError(TaskError):
    """The task was retried as often as it may be.

    `task_args` and `task_kwargs` hold what it was called with.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.task_args = kwargs.pop("task_args", [])
        self.task_kwargs = kwargs.pop("task_kwargs", {})
        super().__init__(*args)


class TaskRevokedError(TaskError):
    """The task was revoked, or its time to start had passed; it did not run to its end."""


class InvalidTaskError(TaskError):
    """The message is not a task this worker can run; the text says why."""


class ChordError(TaskError):
    """A member of a chord's header failed."""


class UnknownOption(TypeError, TaskError):
    """A calling option nobody knows; the text names the nearest known one."""


# -- serialization: a message or result that cannot be written or read ---------------------------


class SerializationError(MiniqError):
    """Root of what can go wrong between objects and bytes."""


class EncodeError(SerializationError):
    """An object cannot be written with the chosen serializer; the text names where it sits."""


class DecodeError(SerializationError):
    """Bytes which are not what their content type claims."""


class ContentDisallowed(SerializationError):
    """The content type is not accepted here (`accept_content`); nothing was decoded."""


# -- the other side must act; trying again may help ----------------------------------------------


class OperationalError(MiniqError):
    """The broker or the result store cannot be reached or refused; safe to try again."""


class BackendError(MiniqError):
    """The result backend failed."""


class BackendGetMetaError(BackendError):
    """A result could not be read; `task_id` says whose."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.task_id = kwargs.pop("task_id", "")
        super().__init__(*args)


class BackendStoreError(BackendError):
    """A result could not be written; `task_id` and `state` say whose."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.task_id = kwargs.pop("task_id", "")
        self.state = kwargs.pop("state", "")
        super().__init__(*args)


# -- what became of a running task ---------------------------------------------------------------


class SoftTimeLimitExceeded(MiniqError):
    """Raised inside the task when its soft time limit is over; it may clean up and return."""

    def __str__(self) -> str:
        return f"SoftTimeLimitExceeded{self.args}"


class TimeLimitExceeded(MiniqError):
    """The hard time limit was over and the task was stopped from outside."""

    def __str__(self) -> str:
        return f"TimeLimitExceeded{self.args}"


class WorkerLostError(MiniqError):
    """The process that ran the task is gone; the text says how it ended."""


class Terminated(MiniqError):
    """The running task was stopped on request (revoke with terminate)."""


# -- nobody must act: decisions of a task, spoken as exceptions ----------------------------------


class TaskPredicate(MiniqError):
    """Root of the exceptions by which a task says what shall become of it."""


class Ignore(TaskPredicate):
    """Leave the task's state alone; the message is acknowledged.

    A member of a chord that is ignored counts as failed, unless `counts_later`: another run will.
    """

    counts_later = False


class Reject(TaskPredicate):
    """Refuse the message: set it aside, or with `requeue` put it back."""

    def __init__(self, reason: Optional[object] = None, requeue: bool = False) -> None:
        self.reason = reason
        self.requeue = requeue
        super().__init__(reason, requeue)

    def __repr__(self) -> str:
        return f"reject requeue={self.requeue}: {self.reason}"


class Retry(TaskPredicate):
    """The task will run again: `exc` is the cause, `when` seconds or the moment."""

    def __init__(
        self,
        message: Optional[str] = None,
        exc: Union[BaseException, str, None] = None,
        when: Union[float, _datetime.datetime, None] = None,
        is_eager: bool = False,
        sig: Any = None,
        **kwargs: Any,
    ) -> None:
        self.message = message
        if isinstance(exc, str):
            self.exc: Optional[BaseException] = None
            self.excs: Optional[str] = exc
        else:
            self.exc = exc
            self.excs = _bounded_repr(exc) if exc is not None else None
        self.when = when
        self.is_eager = is_eager
        self.sig = sig
        super().__init__(message, exc, when)

    def humanize(self) -> str:
        """Return when the task runs again, as words: ``in 3s`` or ``at 2030-01-01 ...``."""
        if isinstance(self.when, (int, float)):
            return f"in {self.when}s"
        return f"at {self.when}"

    def __str__(self) -> str:
        if self.message:
            return self.message
        if self.excs:
            return f"Retry {self.humanize()}: {self.excs}"
        return f"Retry {self.humanize()}"


# -- leaving the worker --------------------------------------------------------------------------


class WorkerShutdown(SystemExit):
    """Raised in a worker: finish what runs, then leave."""


class WorkerTerminate(SystemExit):
    """Raised in a worker: leave now."""


def _bounded_repr(value: object) -> str:
    try:
        text = repr(value)
    except Exception as error:  # safety net: a user's __repr__ may do anything
        return f"<{type(value).__name__}: repr failed: {type(error).__name__}>"
    return text if len(text) <= 1024 else text[:1021] + "..."


_KOMBU = (SerializationError, EncodeError, DecodeError, ContentDisallowed, OperationalError)

#: class -> module name it carries on the wire.
WIRE_MODULES: Dict[type, str] = {
    value: "kombu.exceptions" if value in _KOMBU else "celery.exceptions"
    for value in list(globals().values())
    if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == __name__
}
#: (wire module, class name) -> class; the way back, billiard's own names included.
BY_WIRE_NAME: Dict["tuple[str, str]", type] = {
    **{(module, cls.__name__): cls for cls, module in WIRE_MODULES.items()},
    **{
        ("billiard.exceptions", cls.__name__): cls
        for cls in (SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError, Terminated)
    },
    ("celery.exceptions", "CeleryError"): MiniqError,
}

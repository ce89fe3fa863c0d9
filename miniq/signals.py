# SPDX-License-Identifier: MIT
"""Signals: what happens in producers, workers and beat, for whoever wants to hear it.

`Signal` has Celery's interface.  A receiver is called as ``receiver(signal=..., sender=..., **arguments)``;
its exceptions are logged, never raised.  ``if signal.receivers:`` is an attribute read, so that hot
paths can skip what nobody listens to.  The arguments of each signal are in its definition below.

Source: Celery's signals and `celery.utils.dispatch.Signal`.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any, Callable, Dict, List, Optional, Tuple, TypeVar, overload

from .text import safe_repr

logger = logging.getLogger("celery.signals")

Receiver = Callable[..., Any]
_R = TypeVar("_R", bound=Receiver)
#: How often a receiver connected with ``retry=True`` is called in all.
RETRY_ATTEMPTS = 3
#: co_flags: the function takes ``**kwargs``.
_HAS_KWARGS = 0x08


class _Connection:
    """One connected receiver; `ref()` gives it, or None when it was collected."""

    __slots__ = ("ref", "identity", "sender", "retry")

    def __init__(
        self, ref: Callable[[], Optional[Receiver]], identity: Any, sender: Any, retry: bool
    ) -> None:
        self.ref = ref
        self.identity = identity
        self.sender = sender
        self.retry = retry

    def hears(self, sender: Any) -> bool:
        wanted = self.sender
        # A sender may be a task's name: equal text, whoever made it.
        return wanted is None or wanted is sender or (isinstance(wanted, str) and wanted == sender)


class _Strong:
    """What a weak reference is not."""

    __slots__ = ("receiver",)

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver

    def __call__(self) -> Receiver:
        return self.receiver


class Signal:
    """A place where receivers connect and senders send; usable from any thread.

    `receivers` is a tuple of what is connected; use it as a truth value only.
    """

    def __init__(self, name: str = "", arguments: Tuple[str, ...] = (), doc: str = "") -> None:
        self.name = name
        self.arguments = arguments
        self.__doc__ = doc or self.__doc__
        self.receivers: Tuple[_Connection, ...] = ()
        # Reentrant: a collection during `connect` may call `_forget` in the same thread.
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<Signal: {self.name} receivers={len(self.receivers)}>"

    @overload
    def connect(
        self,
        receiver: _R,
        sender: Any = None,
        weak: bool = True,
        dispatch_uid: Any = None,
        retry: bool = False,
    ) -> _R: ...

    @overload
    def connect(
        self,
        *,
        sender: Any = None,
        weak: bool = True,
        dispatch_uid: Any = None,
        retry: bool = False,
    ) -> Callable[[_R], _R]: ...

    def connect(self, receiver: Optional[Receiver] = None, *args: Any, **options: Any) -> Any:
        """Connect a receiver: ``connect(fn, ...)``, ``@connect`` or ``@connect(...)``.

        sender        hear this sender only (an object, or a task's name)
        weak          keep only a weak reference (default True: keep the receiver alive yourself)
        dispatch_uid  connect once under this name, however often the code runs
        retry         call again when it raises, up to `RETRY_ATTEMPTS` times in all

        Returns the receiver.  Raises `ValueError` for a receiver without ``**kwargs``: a signal may
        get new arguments.
        """
        if receiver is None:
            return lambda receiver: self._connect(receiver, **options)
        return self._connect(receiver, *args, **options)

    def _connect(
        self,
        receiver: Receiver,
        sender: Any = None,
        weak: bool = True,
        dispatch_uid: Any = None,
        retry: bool = False,
    ) -> Receiver:
        code = getattr(receiver, "__code__", None)  # of a bound method as well
        if code is not None and not code.co_flags & _HAS_KWARGS:
            raise ValueError(
                f"the receiver {safe_repr(receiver, 200)} of signal {self.name} must accept **kwargs"
            )
        identity = _identity(receiver, sender, dispatch_uid)
        ref: Callable[[], Optional[Receiver]]
        if not weak:
            ref = _Strong(receiver)
        elif hasattr(receiver, "__self__") and hasattr(receiver, "__func__"):
            ref = weakref.WeakMethod(receiver, self._forget)
        else:
            ref = weakref.ref(receiver, self._forget)
        with self._lock:
            if all(known.identity != identity or known.ref() is None for known in self.receivers):
                self.receivers = (*self.receivers, _Connection(ref, identity, sender, retry))
        return receiver

    def disconnect(
        self,
        receiver: Optional[Receiver] = None,
        sender: Any = None,
        weak: Optional[bool] = None,
        dispatch_uid: Any = None,
    ) -> bool:
        """Take a receiver away, named as it was connected; say whether it was there.

        `weak` is accepted for old callers and has no meaning.
        """
        identity = _identity(receiver, sender, dispatch_uid)
        with self._lock:
            before = self.receivers
            self.receivers = tuple(known for known in before if known.identity != identity)
            return len(self.receivers) < len(before)

    def has_listeners(self, sender: Any = None) -> bool:
        """Say whether anybody would hear this sender."""
        return any(known.hears(sender) and known.ref() is not None for known in self.receivers)

    def send(self, sender: Any, **named: Any) -> List[Tuple[Receiver, Any]]:
        """Call every receiver; return ``[(receiver, its response or its exception), ...]``.

        An exception is logged and does not keep the next receiver from being called.
        """
        responses: List[Tuple[Receiver, Any]] = []
        for known in self.receivers:
            receiver = known.ref() if known.hears(sender) else None
            if receiver is not None:
                responses.append((receiver, self._call(receiver, known.retry, sender, named)))
        return responses

    send_robust = send

    def _call(self, receiver: Receiver, retry: bool, sender: Any, named: Dict[str, Any]) -> Any:
        attempts = RETRY_ATTEMPTS if retry else 1
        for attempt in range(1, attempts + 1):
            try:
                return receiver(signal=self, sender=sender, **named)
            except Exception as error:  # safety net: user code
                fate = "called again" if attempt < attempts else "ignored"
                logger.exception(
                    "Signal handler %s of %s raised; %s", safe_repr(receiver, 200), self.name, fate
                )
                outcome: Any = error
        return outcome

    def _forget(self, ref: Any) -> None:
        with self._lock:
            self.receivers = tuple(known for known in self.receivers if known.ref is not ref)


def _identity(receiver: Any, sender: Any, dispatch_uid: Any) -> Any:
    """Return what makes two connections the same one."""
    wanted = sender if isinstance(sender, str) else id(sender)
    if dispatch_uid is not None:
        return (dispatch_uid, wanted)
    # A bound method is a new object at each access; its parts are not.
    owner, function = getattr(receiver, "__self__", None), getattr(receiver, "__func__", None)
    return (id(receiver), wanted) if function is None else (id(owner), id(function), wanted)


# -- publishing and running tasks ----------------------------------------------------------------

before_task_publish = Signal(
    "before_task_publish",
    ("body", "exchange", "routing_key", "headers", "properties", "declare", "retry_policy"),
    "In the producer, before a message is sent; sender: the task's name.",
)
after_task_publish = Signal(
    "after_task_publish",
    ("body", "exchange", "routing_key", "headers"),
    "In the producer, when the broker has the message; sender: the task's name.",
)
task_sent = Signal(
    "task_sent",
    ("task_id", "task", "args", "kwargs", "eta", "taskset"),
    "Deprecated in Celery for after_task_publish and never sent here.",
)
task_received = Signal(
    "task_received",
    ("request",),
    "In the worker, when a task came from the broker; sender: the consumer.",
)
task_prerun = Signal(
    "task_prerun",
    ("task_id", "task", "args", "kwargs"),
    "Where the task runs, before it; sender: the task.",
)
task_postrun = Signal(
    "task_postrun",
    ("task_id", "task", "args", "kwargs", "retval", "state"),
    "Where the task ran, after it, whatever came of it; sender: the task.",
)
task_success = Signal("task_success", ("result", "runtime"), "The task returned; sender: the task.")
task_retry = Signal(
    "task_retry",
    ("request", "reason", "einfo"),
    "The task will run again; sender: the task.",
)
task_failure = Signal(
    "task_failure",
    ("task_id", "exception", "args", "kwargs", "traceback", "einfo"),
    "The task failed for good; sender: the task.",
)
task_internal_error = Signal(
    "task_internal_error",
    ("task_id", "args", "kwargs", "request", "exception", "traceback", "einfo"),
    "Running the task failed outside of its own code; sender: the task.",
)
task_revoked = Signal(
    "task_revoked",
    ("request", "terminated", "signum", "expired"),
    "In the worker: the task was revoked, terminated or too late; sender: the task.",
)
task_rejected = Signal(
    "task_rejected",
    ("message", "exc"),
    "In the worker: the message is no task; sender: the consumer.",
)
task_unknown = Signal(
    "task_unknown",
    ("message", "exc", "name", "id"),
    "In the worker: no task of this name is registered; sender: the consumer.",
)

# -- the worker ----------------------------------------------------------------------------------

celeryd_init = Signal(
    "celeryd_init",
    ("instance", "conf", "options"),
    "First of all in a worker, to change its configuration; sender: the node name.",
)
celeryd_after_setup = Signal(
    "celeryd_after_setup",
    ("instance", "conf"),
    "The worker is set up, its queues are known; sender: the node name.",
)
import_modules = Signal("import_modules", (), "The app imports its task modules now; sender: the app.")
worker_init = Signal("worker_init", (), "Before the worker starts; sender: the worker.")
worker_before_create_process = Signal(
    "worker_before_create_process", (), "In the worker, before a child is made; sender: the pool."
)
worker_process_init = Signal(
    "worker_process_init",
    (),
    "In every pool process when it begins; must not block for more than 4 seconds.",
)
worker_process_shutdown = Signal(
    "worker_process_shutdown",
    ("pid", "exitcode"),
    "In every pool process before it ends in order.",
)
worker_ready = Signal("worker_ready", (), "The worker takes messages from now on; sender: the consumer.")
worker_shutting_down = Signal(
    "worker_shutting_down",
    ("sig", "how", "exitcode"),
    "The worker begins to stop (how: Warm or Cold); sender: the node name.",
)
worker_shutdown = Signal("worker_shutdown", (), "The worker is about to end; sender: the worker.")
heartbeat_sent = Signal("heartbeat_sent", (), "A worker heartbeat went out; sender: the heart.")

# -- beat ----------------------------------------------------------------------------------------

beat_init = Signal("beat_init", (), "Beat starts, on its own or embedded; sender: the service.")
beat_embedded_init = Signal("beat_embedded_init", (), "Beat starts inside a worker; sender: the service.")

# -- logging -------------------------------------------------------------------------------------

setup_logging = Signal(
    "setup_logging",
    ("loglevel", "logfile", "format", "colorize"),
    "Logging is about to be set up; with any receiver connected, that is left to it altogether.",
)
after_setup_logger = Signal(
    "after_setup_logger",
    ("logger", "loglevel", "logfile", "format", "colorize"),
    "The root logger is set up; change it here.",
)
after_setup_task_logger = Signal(
    "after_setup_task_logger",
    ("logger", "loglevel", "logfile", "format", "colorize"),
    "The logger of tasks is set up; change it here.",
)

# -- other ---------------------------------------------------------------------------------------

eventlet_pool_started = Signal("eventlet_pool_started", (), "Known for old imports; never sent.")
eventlet_pool_preshutdown = Signal("eventlet_pool_preshutdown", (), "Known for old imports; never sent.")
eventlet_pool_postshutdown = Signal("eventlet_pool_postshutdown", (), "Known for old imports; never sent.")
eventlet_pool_apply = Signal(
    "eventlet_pool_apply", ("target", "args", "kwargs"), "Known for old imports; never sent."
)
user_preload_options = Signal(
    "user_preload_options",
    ("app", "options"),
    "The command line was read; sender: the command.",
)
test_worker_starting = Signal("test_worker_starting", (), "A worker for tests is about to start.")
test_worker_started = Signal("test_worker_started", ("worker", "consumer"), "A worker for tests is up.")
test_worker_stopped = Signal("test_worker_stopped", ("worker",), "A worker for tests has ended.")

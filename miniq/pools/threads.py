# SPDX-License-Identifier: MIT
"""Runs tasks in threads of this process: for tasks that mostly wait.

A thread is started when a job first needs it and has an inbox of its own, so the pool always
knows which thread runs what.  Outcomes come back through `Loop.call_threadsafe`.

Time limits.  The soft one raises `SoftTimeLimitExceeded` inside the task by an asynchronous
exception.  It cannot interrupt a call into C code that waits (``time.sleep(60)``); it comes when
that returns.  A thread cannot be killed: when the hard limit is over the job comes back as
`Lost`, its thread is abandoned (what it still brings is dropped; `abandoned` counts those that
still run) and another thread takes its place.  An abandoned task also gets an `Abandoned` thrown
in, which no ``except Exception`` stops, so that most of them do end.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from typing import Any, Callable, Dict, List, Optional, Set, Tuple, Type, Union

from ..exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from ..loop import Loop, Timer
from ..runner import Outcome, Runner, RunnerSpec
from .base import Job, Lost, Pool, PoolOptions

logger = logging.getLogger(__name__)


class Abandoned(BaseException):
    """Thrown into a task that nobody waits for any more."""


class ThreadGuard:
    """The guard around one job's own code: something can be thrown into it, and only into it.

    `throw` is called in the loop's thread, the rest in the task's.  The lock makes sure that
    nothing is sent once the task's own code has ended, and `disarm` that what was sent before has
    arrived.  A guard may be entered again and again (a coroutine is run in steps); what is thrown
    in between waits at the door.
    """

    __slots__ = ("_lock", "_ident", "_soft_limit_s", "_armed", "_due", "_sent")

    def __init__(self, soft_limit_s: Optional[float]) -> None:
        self._lock = threading.Lock()
        self._ident = 0
        self._soft_limit_s = soft_limit_s
        self._armed = False
        self._due: Optional[Type[BaseException]] = None  # to be raised when next entered
        self._sent: Optional[Type[BaseException]] = None  # on its way to the task's thread

    def throw(self, exception: Type[BaseException]) -> None:
        """Raise `exception` in the task's own code, now or as soon as it is entered."""
        with self._lock:
            if self._armed:
                self._sent = exception
                self._interrupt(exception)
            else:
                self._due = exception

    def __enter__(self) -> None:
        with self._lock:
            due, self._due = self._due, None
            self._ident = threading.get_ident()
            self._armed = due is None
        if due is not None:
            raise self._complete(due())

    def __exit__(self, *exc_info: object) -> None:
        self.disarm()

    def disarm(self) -> None:
        """Let nothing through any more."""
        with self._lock:
            self._armed = False
        if self._sent is not None:
            self._sent = None
            # CPython raises at a jump back: it arrives here at the latest.  Taking it back by hand is no
            # way out: in 3.11 that leaves the interpreter looping as soon as a profiler is set.
            for _ in range(10):
                pass

    def _complete(self, error: BaseException) -> BaseException:
        """Give the limit to an error that was made without."""
        if isinstance(error, SoftTimeLimitExceeded) and not error.args:
            error.args = (self._soft_limit_s,)
        return error

    def _interrupt(self, exception: Type[BaseException]) -> None:
        if exception is SoftTimeLimitExceeded:
            exception = _made_with(exception, self._soft_limit_s)
        _set_async_exception(self._ident, exception)


def _made_with(exception: Type[BaseException], argument: Any) -> Type[BaseException]:
    """Return a class whose instances are ``exception(argument)``.

    CPython takes a class and makes the instance when that arrives, wherever in the task that is; no code
    of ours is sure to see it early enough to add the argument.
    """

    def make(cls: object, made: Optional[BaseException] = None) -> BaseException:
        return made or exception(argument)  # before 3.11 it asks again, with what it got

    return type(exception.__name__, (exception,), {"__new__": make, "__module__": exception.__module__})


def _set_async_exception(ident: int, exception: Type[BaseException]) -> None:
    """Have CPython raise `exception` in a thread at its next opportunity."""
    import ctypes  # heavy, and needed by few tasks only

    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(exception))


class _Slot:
    """One thread, and the job it has."""

    __slots__ = ("thread", "inbox", "job", "guard", "soft_timer", "hard_timer", "abandoned")

    def __init__(self) -> None:
        self.thread: threading.Thread
        self.inbox: "queue.SimpleQueue[Optional[Tuple[Job, Optional[ThreadGuard]]]]" = queue.SimpleQueue()
        self.job: Optional[Job] = None
        self.guard: Optional[ThreadGuard] = None
        self.soft_timer: Optional[Timer] = None
        self.hard_timer: Optional[Timer] = None
        self.abandoned = False


class ThreadPool(Pool):
    """Runs jobs in threads."""

    has_soft_limit = True
    has_hard_limit = True

    def __init__(self, options: PoolOptions, spec: RunnerSpec) -> None:
        self._size = options.concurrency
        self._spec = spec
        self._loop: Loop
        self._on_free: Callable[[], None]
        self._runner: Runner
        self._idle: List[_Slot] = []
        self._busy: Set[_Slot] = set()
        self._ending: Set[_Slot] = set()  # told to end; their last word is still to come
        self._abandoned: Set[_Slot] = set()
        self._serial = 0
        self._stopping = False
        self._deadline_timer: Optional[Timer] = None
        self._on_stopped: Optional[Callable[[], None]] = None

    @property
    def abandoned(self) -> int:
        """How many threads still run a task that was given up."""
        return len(self._abandoned)

    def start(self, loop: Loop, on_free: Callable[[], None]) -> None:
        """Build the runner; threads come when they are needed."""
        self._loop = loop
        self._on_free = on_free
        self._runner = self._spec.build()
        self._runner.process_init()

    @property
    def free_slots(self) -> int:
        """How many jobs may be submitted now."""
        return 0 if self._stopping else max(0, self._size - len(self._busy))

    @property
    def size(self) -> int:
        """How many jobs may run at once."""
        return self._size

    def submit(self, job: Job) -> None:
        """Give `job` to an idle thread, or to a new one."""
        if self.free_slots <= 0:
            raise RuntimeError("the pool has no free slot")
        slot = self._idle.pop() if self._idle else self._start_thread()
        self._busy.add(slot)
        slot.job = job
        job.slot = slot
        job.started_mono = self._loop.mono()
        guard = None
        if job.soft_limit_s is not None or job.hard_limit_s is not None:
            guard = slot.guard = ThreadGuard(job.soft_limit_s)
            if job.soft_limit_s is not None:
                slot.soft_timer = self._loop.call_later(job.soft_limit_s, guard.throw, SoftTimeLimitExceeded)
            if job.hard_limit_s is not None:
                error = TimeLimitExceeded(job.hard_limit_s)
                slot.hard_timer = self._loop.call_later(job.hard_limit_s, self._abandon, slot, error)
        slot.inbox.put((job, guard))

    def terminate(self, job: Job, signal_name: str = "SIGTERM") -> bool:
        """Return False: a thread cannot be stopped from outside."""
        return False

    def grow(self, n: int) -> None:
        """Allow `n` more jobs at once."""
        self._size += n
        self._loop.call_soon(self._on_free)

    def shrink(self, n: int) -> None:
        """Allow `n` jobs less at once (at least one)."""
        self._size = max(1, self._size - n)
        while self._idle and len(self._idle) + len(self._busy) > self._size:
            self._end_thread(self._idle.pop())

    def pids(self) -> List[int]:
        """Return nothing: there are no child processes."""
        return []

    def info(self) -> Dict[str, Any]:
        """Return what `inspect stats` shows under ``pool``."""
        return {
            "implementation": f"{type(self).__module__}:{type(self).__qualname__}",
            "max-concurrency": self._size,
            "threads": len(self._idle) + len(self._busy),
            "abandoned": self.abandoned,
        }

    def stop(self, deadline_mono: float, on_stopped: Callable[[], None]) -> None:
        """End idle threads now, busy ones when their job is done; abandon them at the deadline."""
        self._stopping = True
        self._on_stopped = on_stopped
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None
        while self._idle:
            self._end_thread(self._idle.pop())
        if deadline_mono != float("inf"):
            self._deadline_timer = self._loop.call_at(deadline_mono, self._abandon_all)
        self._see_whether_stopped()

    # -- in the loop's thread -----------------------------------------------------------------

    def _start_thread(self) -> _Slot:
        slot = _Slot()
        self._serial += 1
        # A daemon, so that an abandoned task does not keep the process from leaving.
        slot.thread = threading.Thread(
            target=self._serve, args=(slot,), name=f"ThreadPoolWorker-{self._serial}", daemon=True
        )
        slot.thread.start()
        return slot

    def _end_thread(self, slot: _Slot) -> None:
        self._ending.add(slot)
        slot.inbox.put(None)

    def _on_ended(self, slot: _Slot) -> None:
        slot.thread.join()  # it has just said its last word
        self._ending.discard(slot)
        self._see_whether_stopped()

    def _on_started(self, job: Job) -> None:
        if job.on_start is not None and job.slot is not None and job.slot.job is job:
            job.on_start(job, os.getpid())

    def _on_done(self, slot: _Slot, result: Union[Outcome, Lost]) -> None:
        if slot.abandoned:  # nobody waits for it any more; its thread ends by itself
            self._abandoned.discard(slot)
            logger.info("a task that had been given up has ended; %d still run", len(self._abandoned))
            return
        job = self._take_job(slot)
        if self._stopping or len(self._idle) + len(self._busy) >= self._size:
            self._end_thread(slot)
        else:
            self._idle.append(slot)
        if job is not None:
            job.on_done(job, result)

    def _take_job(self, slot: _Slot) -> Optional[Job]:
        job, slot.job = slot.job, None
        self._busy.discard(slot)
        slot.guard = None
        if slot.soft_timer is not None:
            slot.soft_timer.cancel()
            slot.soft_timer = None
        if slot.hard_timer is not None:
            slot.hard_timer.cancel()
            slot.hard_timer = None
        return job

    def _abandon(self, slot: _Slot, error: BaseException) -> None:
        """Give up a thread with its task; the job comes back as `Lost` with `error`."""
        guard = slot.guard
        job = self._take_job(slot)
        slot.abandoned = True
        self._abandoned.add(slot)
        slot.inbox.put(None)  # its thread may have finished the job at this very moment and wait for another
        if guard is not None:
            guard.throw(Abandoned)
        self._see_whether_stopped()
        if job is not None:
            job.on_done(job, Lost(error, 0, self._loop.mono() - job.started_mono))

    def _abandon_all(self) -> None:
        for slot in list(self._busy):
            # One call each: an error in one `on_done` must not keep the next job from its own.
            error = WorkerLostError("Worker stopped: the task was given up at the end of the time given")
            self._loop.call_soon(self._abandon_if_busy, slot, error)

    def _abandon_if_busy(self, slot: _Slot, error: BaseException) -> None:
        if slot in self._busy:
            self._abandon(slot, error)

    def _see_whether_stopped(self) -> None:
        if self._stopping and not self._busy and not self._ending and self._on_stopped is not None:
            if self._deadline_timer is not None:
                self._deadline_timer.cancel()
            self._loop.call_soon(self._say_stopped, self._on_stopped)
            self._on_stopped = None

    def _say_stopped(self, on_stopped: Callable[[], None]) -> None:
        try:
            self._runner.process_shutdown(0)
        finally:
            on_stopped()

    # -- in a task's thread -------------------------------------------------------------------

    def _serve(self, slot: _Slot) -> None:
        try:
            while not slot.abandoned:
                item = slot.inbox.get()
                if item is None:
                    break
                job, guard = item
                if job.wants_start:
                    self._loop.call_threadsafe(self._on_started, job)
                result = run_job(self._runner, job, guard)
                self._loop.call_threadsafe(self._on_done, slot, result)
        finally:
            self._runner.thread_exit()
            if not slot.abandoned:
                self._loop.call_threadsafe(self._on_ended, slot)


def run_job(runner: Runner, job: Job, guard: Optional[ThreadGuard]) -> Union[Outcome, Lost]:
    """Run a job in this thread: the named net under ``sys.exit`` in a task and a runner's bug."""
    try:
        try:
            return runner.run(job.run, guard)
        finally:
            if guard is not None:
                guard.disarm()  # it is armed still if what was thrown came while it was being left
    except KeyboardInterrupt:
        raise  # only the main thread gets it, and whoever pressed Ctrl-C means all of it
    except BaseException as error:
        if not isinstance(error, Abandoned):
            logger.error("a task left its runner with %r; it counts as lost", error, exc_info=True)
        return Lost(WorkerLostError(f"Worker exited prematurely: {error!r}"), 0, 0.0)

# SPDX-License-Identifier: MIT
"""Runs tasks one after the other in the thread that calls `run_forever`, normally the main one.

For debugging, for tasks that insist on the main thread, and for where no process may be started.
The loop runs in another thread, so that heartbeats and leases go on whatever the task does.

Time limits.  In the main thread a signal (SIGURG: ignored by default and used by nobody else)
interrupts even a call that waits in the system; in another thread, or where there are no such
signals, it is an asynchronous exception as in the threads pool.  When the hard limit is over the
job comes back as `Lost`, but its thread cannot be replaced: `abandoned` is 1 and no slot is free
until the task, into which `Abandoned` is thrown every second, has ended.  The rule for a worker:
if `abandoned` is still 1 some seconds later, settle what is to be settled, then leave the process
with ``os._exit`` or replace it (``os.execv``); `run_forever` cannot return by itself.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
from typing import Any, Callable, Dict, List, Optional, Tuple, Type, Union

from ..exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from ..loop import Loop, Timer
from ..runner import Outcome, RunnerSpec
from .base import Job, Lost, Pool, PoolOptions
from .threads import Abandoned, ThreadGuard, run_job

logger = logging.getLogger(__name__)

#: `Abandoned` is thrown into a task that goes on after its hard limit, this often.
THROW_INTERVAL_S = 1.0


class MainThreadGuard(ThreadGuard):
    """Throws by a signal, which the handler turns into the exception.

    A signal that comes late finds the guard disarmed, or the next job's in its place.
    """

    __slots__ = ()

    def _interrupt(self, exception: Type[BaseException]) -> None:
        signal.pthread_kill(self._ident, signal.SIGURG)

    def disarm(self) -> None:
        """Let nothing through any more; what was sent and has not arrived waits at the door."""
        with self._lock:
            self._armed = False
            if self._sent is not None:
                self._due, self._sent = self._sent, None

    def on_signal(self) -> None:
        """Raise what was sent; runs in the main thread, between two bytecodes of the task."""
        sent = self._sent
        if self._armed and sent is not None:
            self._sent = None
            raise self._complete(sent())


class SoloPool(Pool):
    """Runs jobs in the thread that calls `run_forever`."""

    has_soft_limit = True
    has_hard_limit = True
    runs_in_main_thread = True

    def __init__(self, options: PoolOptions, spec: RunnerSpec) -> None:
        self._spec = spec
        self._loop: Loop
        self._on_free: Callable[[], None]
        self._inbox: "queue.SimpleQueue[Optional[Tuple[Job, Optional[ThreadGuard]]]]" = queue.SimpleQueue()
        self._entered = False  # run_forever was called
        self._up = False  # ... has built its runner and not yet returned
        self._left = False  # ... has returned
        self._by_signal = False
        self._job: Optional[Job] = None
        self._guard: Optional[ThreadGuard] = None  # of the job that runs, abandoned or not
        self._soft_timer: Optional[Timer] = None
        self._hard_timer: Optional[Timer] = None
        self._throw_timer: Optional[Timer] = None
        self._deadline_timer: Optional[Timer] = None
        self._stopping = False
        self._on_stopped: Optional[Callable[[], None]] = None
        self._is_abandoned = False

    # -- in the loop's thread -----------------------------------------------------------------

    def start(self, loop: Loop, on_free: Callable[[], None]) -> None:
        """Remember the loop; the slot comes with `run_forever`."""
        self._loop = loop
        self._on_free = on_free

    @property
    def free_slots(self) -> int:
        """1 when a job may be submitted now, else 0."""
        return int(self._up and self._job is None and not self._is_abandoned and not self._stopping)

    @property
    def abandoned(self) -> int:
        """1 while a task that was given up still runs."""
        return int(self._is_abandoned)

    @property
    def size(self) -> int:
        """Always 1."""
        return 1

    def submit(self, job: Job) -> None:
        """Hand `job` to the thread in `run_forever`."""
        if self.free_slots <= 0:
            raise RuntimeError("the pool has no free slot")
        self._job = job
        job.slot = self
        job.started_mono = self._loop.mono()
        guard: Optional[ThreadGuard] = None
        if job.soft_limit_s is not None or job.hard_limit_s is not None:
            guard = MainThreadGuard(job.soft_limit_s) if self._by_signal else ThreadGuard(job.soft_limit_s)
            if job.soft_limit_s is not None:
                self._soft_timer = self._loop.call_later(job.soft_limit_s, guard.throw, SoftTimeLimitExceeded)
            if job.hard_limit_s is not None:
                error = TimeLimitExceeded(job.hard_limit_s)
                self._hard_timer = self._loop.call_later(job.hard_limit_s, self._abandon, error)
        self._guard = guard
        self._inbox.put((job, guard))

    def terminate(self, job: Job, signal_name: str = "SIGTERM") -> bool:
        """Return False: the thread cannot be stopped from outside."""
        return False

    def grow(self, n: int) -> None:
        """Do nothing but say so: there is one main thread."""
        logger.warning("the solo pool runs one task at a time and cannot grow")

    def shrink(self, n: int) -> None:
        """Do nothing: one slot stays."""

    def pids(self) -> List[int]:
        """Return nothing: there are no child processes."""
        return []

    def info(self) -> Dict[str, Any]:
        """Return what `inspect stats` shows under ``pool``."""
        return {
            "implementation": f"{type(self).__module__}:{type(self).__qualname__}",
            "max-concurrency": 1,
            "processes": [os.getpid()],
            "abandoned": self.abandoned,
        }

    def stop(self, deadline_mono: float, on_stopped: Callable[[], None]) -> None:
        """Have `run_forever` return when its job is done; at the deadline the job is given up."""
        if not self._stopping:
            self._stopping = True
            self._inbox.put(None)
        self._on_stopped = on_stopped
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None
        if not self._entered or self._left:
            self._say_stopped()
        elif deadline_mono != float("inf"):
            self._deadline_timer = self._loop.call_at(deadline_mono, self._give_up)

    def _on_up(self) -> None:
        self._up = True
        self._on_free()

    def _on_left(self) -> None:
        self._up = False
        self._left = True
        if self._stopping:
            self._say_stopped()

    def _say_stopped(self) -> None:
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
        if self._on_stopped is not None:
            self._loop.call_soon(self._on_stopped)
            self._on_stopped = None

    def _on_started(self, job: Job) -> None:
        if job.on_start is not None and self._job is job:
            job.on_start(job, os.getpid())

    def _on_done(self, job: Job, result: Union[Outcome, Lost]) -> None:
        if self._job is job:
            self._take_job()
            self._guard = None
            job.on_done(job, result)
        else:
            logger.info("a task that had been given up has ended")
            self._guard = None
            self._is_abandoned = False
            if self._throw_timer is not None:
                self._throw_timer.cancel()
            self._on_free()

    def _take_job(self) -> Optional[Job]:
        job, self._job = self._job, None
        if self._soft_timer is not None:
            self._soft_timer.cancel()
            self._soft_timer = None
        if self._hard_timer is not None:
            self._hard_timer.cancel()
            self._hard_timer = None
        return job

    def _abandon(self, error: BaseException) -> None:
        job = self._take_job()
        if job is not None:
            self._is_abandoned = True
            self._throw()
            job.on_done(job, Lost(error, 0, self._loop.mono() - job.started_mono))

    def _throw(self) -> None:
        if self._is_abandoned and self._guard is not None:
            self._throw_timer = self._loop.call_later(THROW_INTERVAL_S, self._throw)
            self._guard.throw(Abandoned)

    def _give_up(self) -> None:
        self._say_stopped()  # it only comes in the next turn, after the job
        self._abandon(WorkerLostError("Worker stopped: the task was given up at the end of the time given"))

    # -- in the tasks' thread -----------------------------------------------------------------

    def run_forever(self) -> None:
        """Run jobs in the calling thread until the pool is stopped."""
        self._entered = True
        previous = None
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._by_signal = in_main_thread and hasattr(signal, "pthread_kill")
        if self._by_signal:
            previous = signal.signal(signal.SIGURG, self._on_signal)
        try:
            runner = self._spec.build()
            try:
                runner.process_init()
                self._loop.call_threadsafe(self._on_up)
                while True:
                    item = self._inbox.get()
                    if item is None:
                        break
                    job, guard = item
                    if job.wants_start:
                        self._loop.call_threadsafe(self._on_started, job)
                    result: Union[Outcome, Lost] = Lost(WorkerLostError("Worker was interrupted"), 0, 0.0)
                    try:
                        result = run_job(runner, job, guard)
                    finally:
                        self._loop.call_threadsafe(self._on_done, job, result)
                runner.process_shutdown(0)
            finally:
                runner.thread_exit()
        finally:
            if self._by_signal:
                signal.signal(signal.SIGURG, previous or signal.SIG_DFL)
            self._loop.call_threadsafe(self._on_left)

    def _on_signal(self, *args: object) -> None:
        guard = self._guard
        if isinstance(guard, MainThreadGuard):
            guard.on_signal()

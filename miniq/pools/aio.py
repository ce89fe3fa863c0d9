# SPDX-License-Identifier: MIT
"""Runs tasks as coroutines of one asyncio loop in one thread: for very many tasks that wait.

The worker's own loop stays apart from it, so a task that blocks the asyncio loop hurts its
neighbours but neither heartbeats nor time limits.

Time limits.  The soft one raises `SoftTimeLimitExceeded` at the ``await`` where the task stands.
When the hard one is over the job comes back as `Lost` and the task is cancelled; as long as it
goes on nevertheless it counts as `abandoned`.  If the asyncio loop does not even get to the
cancelling, some task blocks it: new jobs then go to a fresh loop in a fresh thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import types
from typing import Any, Callable, Coroutine, Dict, Generator, List, Optional, Set, Union

from ..exceptions import SoftTimeLimitExceeded, Terminated, TimeLimitExceeded, WorkerLostError
from ..loop import Loop, Timer
from ..runner import Outcome, Runner, RunnerSpec
from .base import Job, Lost, Pool, PoolOptions, signal_number

logger = logging.getLogger(__name__)

#: An asyncio loop that does nothing for this long when a task is to be cancelled is replaced.
BLOCKED_S = 1.0
#: What tasks left running in the background get at the end to react to being cancelled.
LEFTOVERS_S = 0.5
#: The asyncio threads have this long to end when the pool stops; then they are left behind.
ENDING_S = 1.0


class AsyncGuard:
    """The guard around one task's own code; all in the asyncio thread."""

    __slots__ = ("_limit_s", "_armed", "_due", "task")

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._armed = False
        self._due = False
        self.task: "Optional[asyncio.Task[None]]" = None

    def __enter__(self) -> None:
        if self._due:
            self._due = False
            raise SoftTimeLimitExceeded(self._limit_s)
        self._armed = True

    def __exit__(self, *exc_info: object) -> None:
        self.disarm()

    def disarm(self) -> None:
        """Let nothing through any more."""
        self._armed = self._due = False

    def expire(self) -> None:
        """Raise the soft limit in the task's own code, now or as soon as it begins."""
        self._due = True
        if self._armed and self.task is not None:
            self.task.cancel()

    def translate(self, error: BaseException) -> BaseException:
        """Return the soft limit's error for the cancelling that we asked for."""
        if isinstance(error, asyncio.CancelledError) and self._armed and self._due:
            self._due = False
            if self.task is not None and hasattr(self.task, "uncancel"):  # Python 3.11
                self.task.uncancel()
            return SoftTimeLimitExceeded(self._limit_s)
        return error


@types.coroutine
def under_soft_limit(
    coroutine: "Coroutine[Any, Any, Outcome]", guard: AsyncGuard
) -> "Generator[Any, Any, Outcome]":
    """Drive `coroutine` to its end; what is thrown into it passes through `guard.translate`.

    Cancelling a task throws `CancelledError` at its innermost ``await``; a task that wants to
    clean up when its soft limit is over waits for another exception there.
    """
    error: Optional[BaseException] = None
    while True:
        try:
            waits_for = coroutine.send(None) if error is None else coroutine.throw(error)
        except StopIteration as end:
            result: Outcome = end.value
            return result
        error = None
        try:
            yield waits_for
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as thrown:
            error = guard.translate(thrown)


class _Engine:
    """One asyncio loop in one thread."""

    __slots__ = ("loop", "thread", "slots", "ended")

    def __init__(self, serial: int, on_ended: "Callable[[_Engine], None]") -> None:
        self.loop = asyncio.new_event_loop()
        self.slots: Set[_Slot] = set()  # what was begun in it and has not ended
        self.ended = False
        # A daemon, so that a task that blocks it does not keep the process from leaving.
        self.thread = threading.Thread(
            target=self._serve, args=(on_ended,), name=f"AsyncioPoolWorker-{serial}", daemon=True
        )
        self.thread.start()

    def _serve(self, on_ended: "Callable[[_Engine], None]") -> None:
        asyncio.set_event_loop(self.loop)
        try:
            while not self.ended:
                try:
                    self.loop.run_forever()
                except (SystemExit, KeyboardInterrupt) as error:  # named net: asyncio lets them pass
                    logger.error("%r in a background task of the asyncio loop; the loop goes on", error)
            leftovers = asyncio.all_tasks(self.loop)
            for task in leftovers:
                task.cancel()
            if leftovers:
                self.loop.run_until_complete(asyncio.wait(leftovers, timeout=LEFTOVERS_S))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            asyncio.set_event_loop(None)
            self.loop.close()
            on_ended(self)

    def stop(self) -> None:
        """End the thread as soon as its loop gets to it."""
        if not self.ended:
            self.ended = True
            self.loop.call_soon_threadsafe(self.loop.stop)


class _Slot:
    """One job in an engine."""

    __slots__ = ("job", "engine", "guard", "task", "hard_timer", "abandoned", "cancelling")

    def __init__(self, job: Job, engine: _Engine) -> None:
        self.job = job
        self.engine = engine
        self.guard = None if job.soft_limit_s is None else AsyncGuard(job.soft_limit_s)
        self.task: "Optional[asyncio.Task[None]]" = None
        self.hard_timer: Optional[Timer] = None
        self.abandoned = False
        self.cancelling = False  # the engine has got to it


class AsyncioPool(Pool):
    """Runs jobs as coroutines."""

    can_terminate = True
    has_soft_limit = True
    soft_limit_for_functions = False
    has_hard_limit = True

    def __init__(self, options: PoolOptions, spec: RunnerSpec) -> None:
        self._size = options.concurrency
        self._spec = spec
        self._loop: Loop
        self._on_free: Callable[[], None]
        self._runner: Runner
        self._engine: _Engine
        self._engines: Set[_Engine] = set()  # whose threads have not ended
        self._busy: Set[_Slot] = set()
        self._abandoned: Set[_Slot] = set()
        self._serial = 0
        self._stopping = False
        self._deadline_timer: Optional[Timer] = None
        self._ending_timer: Optional[Timer] = None
        self._on_stopped: Optional[Callable[[], None]] = None

    # -- in the worker's loop -----------------------------------------------------------------

    @property
    def abandoned(self) -> int:
        """How many tasks still run although they were given up."""
        return len(self._abandoned)

    def start(self, loop: Loop, on_free: Callable[[], None]) -> None:
        """Build the runner and start the asyncio thread."""
        self._loop = loop
        self._on_free = on_free
        self._runner = self._spec.build()
        self._runner.process_init()
        self._start_engine()

    def _start_engine(self) -> None:
        self._serial += 1
        self._engine = _Engine(self._serial, self._report_end)
        self._engines.add(self._engine)

    def _report_end(self, engine: _Engine) -> None:
        self._loop.call_threadsafe(self._on_engine_ended, engine)

    @property
    def free_slots(self) -> int:
        """How many jobs may be submitted now."""
        return 0 if self._stopping else max(0, self._size - len(self._busy))

    @property
    def size(self) -> int:
        """How many jobs may run at once."""
        return self._size

    def submit(self, job: Job) -> None:
        """Begin `job` in the asyncio loop."""
        if self.free_slots <= 0:
            raise RuntimeError("the pool has no free slot")
        engine = self._engine
        slot = _Slot(job, engine)
        job.slot = slot
        job.started_mono = self._loop.mono()
        self._busy.add(slot)
        engine.slots.add(slot)
        if job.hard_limit_s is not None:
            error = TimeLimitExceeded(job.hard_limit_s)
            slot.hard_timer = self._loop.call_later(job.hard_limit_s, self._give_up, slot, error)
        engine.loop.call_soon_threadsafe(self._begin, slot)

    def terminate(self, job: Job, signal_name: str = "SIGTERM") -> bool:
        """Cancel the job's task: `Lost` with ``Terminated(signal number)``."""
        error = Terminated(signal_number(signal_name))
        slot = job.slot
        if not isinstance(slot, _Slot) or slot not in self._busy:
            return False
        self._loop.call_soon(self._give_up, slot, error)
        return True

    def grow(self, n: int) -> None:
        """Allow `n` more jobs at once."""
        self._size += n
        self._loop.call_soon(self._on_free)

    def shrink(self, n: int) -> None:
        """Allow `n` jobs less at once (at least one)."""
        self._size = max(1, self._size - n)

    def pids(self) -> List[int]:
        """Return nothing: there are no child processes."""
        return []

    def info(self) -> Dict[str, Any]:
        """Return what `inspect stats` shows under ``pool``."""
        return {
            "implementation": f"{type(self).__module__}:{type(self).__qualname__}",
            "max-concurrency": self._size,
            "running": len(self._busy),
            "abandoned": self.abandoned,
        }

    def stop(self, deadline_mono: float, on_stopped: Callable[[], None]) -> None:
        """End when the last job is done; at the deadline cancel what still runs."""
        self._stopping = True
        self._on_stopped = on_stopped
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None
        if deadline_mono != float("inf"):
            self._deadline_timer = self._loop.call_at(deadline_mono, self._give_up_all)
        self._see_whether_stopped()

    def _give_up(self, slot: _Slot, error: BaseException) -> None:
        """Report a job as `Lost` and cancel its task."""
        if slot not in self._busy:
            return
        self._take(slot)
        slot.abandoned = True
        self._abandoned.add(slot)
        slot.engine.loop.call_soon_threadsafe(self._cancel, slot)
        self._loop.call_later(BLOCKED_S, self._see_whether_blocked, slot)
        self._see_whether_stopped()
        slot.job.on_done(slot.job, Lost(error, 0, self._loop.mono() - slot.job.started_mono))

    def _give_up_all(self) -> None:
        for slot in list(self._busy):
            # One call each: an error in one `on_done` must not keep the next job from its own.
            error = WorkerLostError("Worker stopped: the task was cancelled at the end of the time given")
            self._loop.call_soon(self._give_up, slot, error)

    def _see_whether_blocked(self, slot: _Slot) -> None:
        engine = slot.engine
        if not slot.cancelling and engine is self._engine and not self._stopping:
            logger.error(
                "a task blocks the asyncio loop for more than %.1f s (running there: %d); "
                "new tasks run in a new loop, those wait",
                BLOCKED_S, len(engine.slots),
            )  # fmt: skip
            self._start_engine()
            self._on_free()

    def _on_started(self, slot: _Slot) -> None:
        if slot.job.on_start is not None and not slot.abandoned:
            slot.job.on_start(slot.job, os.getpid())

    def _on_done(self, slot: _Slot, result: Union[Outcome, Lost]) -> None:
        slot.engine.slots.discard(slot)
        if slot.engine is not self._engine and not slot.engine.slots:
            slot.engine.stop()  # it was blocked, and everything that waited in it has ended
        if slot.abandoned:
            self._abandoned.discard(slot)
            self._see_whether_stopped()
        else:
            self._take(slot)
            self._see_whether_stopped()
            slot.job.on_done(slot.job, result)

    def _take(self, slot: _Slot) -> None:
        self._busy.discard(slot)
        if slot.hard_timer is not None:
            slot.hard_timer.cancel()

    def _see_whether_stopped(self) -> None:
        if not self._stopping or self._busy or self._on_stopped is None:
            return
        if self._ending_timer is None:
            self._ending_timer = self._loop.call_later(ENDING_S, self._say_stopped)
            for engine in self._engines:
                engine.stop()
        if not self._engines:
            self._ending_timer.cancel()
            self._loop.call_soon(self._say_stopped)

    def _say_stopped(self) -> None:
        on_stopped, self._on_stopped = self._on_stopped, None
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
        if on_stopped is not None:
            try:
                self._runner.process_shutdown(0)
            finally:
                on_stopped()

    def _on_engine_ended(self, engine: _Engine) -> None:
        engine.thread.join()  # it has just said its last word
        self._engines.discard(engine)
        self._see_whether_stopped()

    # -- in the asyncio thread ----------------------------------------------------------------

    def _begin(self, slot: _Slot) -> None:
        slot.task = slot.engine.loop.create_task(self._run(slot))

    def _cancel(self, slot: _Slot) -> None:
        slot.cancelling = True
        if slot.guard is not None:
            slot.guard.disarm()  # this is no soft limit
        if slot.task is not None:
            slot.task.cancel()

    async def _run(self, slot: _Slot) -> None:
        job, guard = slot.job, slot.guard
        timer: Optional[asyncio.TimerHandle] = None
        result: Union[Outcome, Lost]
        try:
            if job.wants_start:
                self._loop.call_threadsafe(self._on_started, slot)
            if guard is None or job.soft_limit_s is None:
                result = await self._runner.run_async(job.run)
            else:
                guard.task = slot.task
                timer = slot.engine.loop.call_later(job.soft_limit_s, guard.expire)
                result = await under_soft_limit(self._runner.run_async(job.run, guard), guard)
        except BaseException as error:  # named net: cancelled, ``sys.exit`` in a task, a runner's bug
            if not slot.abandoned:
                logger.error("a task left its runner with %r; it counts as lost", error, exc_info=True)
            result = Lost(WorkerLostError(f"Worker exited prematurely: {error!r}"), 0, 0.0)
        finally:
            if timer is not None:
                timer.cancel()
        self._loop.call_threadsafe(self._on_done, slot, result)

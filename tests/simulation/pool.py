# SPDX-License-Identifier: MIT
"""A prefork pool in virtual time.

Jobs are run with the real `TaskRunner` when their virtual start comes; how long they took, and
whether their process lived to tell, is drawn.  All that must be true of a message which starts is
checked here.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Callable, Deque, List, Optional, Sequence, Union

from simulation.seams import NUMBER, SimTransport
from simulation.world import CRASH, ROUNDING_S, Copy, World

from miniq.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from miniq.loop import Loop, Timer
from miniq.pools.base import Job, Lost, Pool
from miniq.trace import Outcome, TaskRunner

#: Jobs that a child is sent ahead, and how long they wait behind one before they are taken back (seconds).
AHEAD, RECALL_S = 3, 0.05


class Slot:
    """A simulated child: alive or being replaced, idle or with jobs."""

    __slots__ = ("pid", "alive", "job", "ahead", "timer")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.alive = True
        self.job: Optional[Job] = None
        self.ahead: Deque[Job] = deque()
        self.timer: Optional[Timer] = None


class SimPool(Pool):
    """A prefork pool in virtual time: jobs take as long as drawn, children die and are replaced."""

    can_terminate = True
    has_soft_limit = True
    has_hard_limit = True
    can_take_ahead = True

    def __init__(
        self,
        world: World,
        transport: SimTransport,
        runner: TaskRunner,
        concurrency: int,
        duration_s: Callable[[str], float],
    ) -> None:
        self.world = world
        self.who = transport.who
        self.transport = transport
        self.runner = runner
        self.duration_s = duration_s
        self.slots = [Slot(1000 + number) for number in range(concurrency)]
        self.journal: Any = None
        self._pids = 1000 + concurrency
        self._stopping = False
        self._on_stopped: Optional[Callable[[], None]] = None

    def start(self, loop: Loop, on_free: Callable[[], None]) -> None:
        self.loop = loop
        self.on_free = on_free

    def use_journal(self, journal: Any) -> None:
        self.journal = journal

    # -- slots

    def _free(self) -> List[Slot]:
        return [slot for slot in self.slots if slot.alive and slot.job is None]

    def _open(self) -> List[Slot]:
        """Return the busy children that may be sent more."""
        return [slot for slot in self.slots if slot.job is not None and len(slot.ahead) < AHEAD]

    @property
    def free_slots(self) -> int:
        return 0 if self._stopping else len(self._free())

    @property
    def ahead_slots(self) -> int:
        if self._stopping or self.journal is None:
            return 0
        return sum(AHEAD - len(slot.ahead) for slot in self.slots if slot.alive)

    @property
    def size(self) -> int:
        return len(self.slots)

    @property
    def idle(self) -> bool:
        """Say whether no job is in it."""
        return all(slot.job is None for slot in self.slots)

    def pids(self) -> List[int]:
        return [slot.pid for slot in self.slots if slot.alive]

    def copy_of(self, job: Job) -> Copy:
        """Return the record of the message that the job runs."""
        return self.world.copies[job.run.headers[NUMBER]]

    # -- in

    def submit(self, job: Job) -> None:
        world = self.world
        world.strike(self.who, "committed, not given to the pool yet", CRASH)
        free = self._free()
        if not free or self._stopping:
            world.violation(f"{self.who}: a job was submitted although no slot was free")
        self._check_moment(job)
        slot = world.pools.choice(free)
        slot.job, job.slot = job, slot
        slot.timer = self.loop.call_later(world.pools.choice((0.0, 0.001, 0.02)), self._begin, slot)

    def submit_ahead(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._send_ahead(job)

    def _send_ahead(self, job: Job) -> None:
        world = self.world
        world.strike(self.who, "committed, not given to the pool yet", CRASH)
        self._check_moment(job)
        slots = self._open()
        if not slots:
            self._hand_back(job)
            return
        slot = job.slot = world.pools.choice(slots)
        slot.ahead.append(job)
        world.note(self.who, "#%s waits in a child", self.copy_of(job).number)
        self.loop.call_later(RECALL_S, self._recall, slot, job)

    def _recall(self, slot: Slot, job: Job) -> None:
        if job in slot.ahead:
            slot.ahead.remove(job)
            self._hand_back(job)

    def _hand_back(self, job: Job) -> None:
        self.world.note(self.who, "#%s is taken back", self.copy_of(job).number)
        assert job.on_back is not None
        self.loop.call_soon(job.on_back, job)

    def _check_moment(self, job: Job) -> None:
        """Check that a message may start now."""
        world, now, copy = self.world, self.world.now(), self.copy_of(job)
        what = f"#{copy.number} {copy.task}[{copy.id}]"
        if copy.runs >= copy.marks:
            world.violation(f"{what} starts, but the broker does not know that it did")
        if copy.eta is not None and now < copy.eta - ROUNDING_S:
            world.violation(f"{what} starts {copy.eta - now:.6f} s before its eta")
        if copy.expires is not None and now > copy.expires + ROUNDING_S:
            world.violation(f"{what} starts {now - copy.expires:.6f} s after it had expired")
        revoked_at = world.revoked_at.get(copy.id)
        if revoked_at is not None and copy.polled_at > revoked_at:
            world.violation(f"{what} starts, but was revoked before the worker took it")
        world.submissions.setdefault((self.who, copy.task), []).append(now)

    # -- runs

    def _begin(self, slot: Slot) -> None:
        """Run the job now; what came of it will be told when its time is over."""
        world, job = self.world, slot.job
        assert job is not None
        if world.strikes(world.fault_rate / 2):
            self._kill(slot, WorkerLostError("simulated: the child died before it began"))
            return
        copy = self.copy_of(job)
        copy.runs += 1
        world.note(self.who, "begins #%s %s[%s], run %d", copy.number, copy.task, copy.id, copy.runs)
        if copy.runs > 1 and not self.runner.app.tasks[copy.task].acks_late:
            world.violation(f"#{copy.number} {copy.id} is acknowledged early and starts a second time")
        if job.token is not None:
            self.journal.mark(job.token)
        job.started_mono = self.loop.mono()
        if job.wants_start and job.on_start is not None:
            job.on_start(job, slot.pid)
        runtime_s = self.duration_s(copy.task)
        limit_s = job.hard_limit_s
        outcome: Union[Outcome, Lost] = self.runner.run(job.run)._replace(runtime_s=runtime_s)
        if copy.task == "poison" or world.strikes(world.fault_rate):
            runtime_s *= world.pools.random()
            outcome = Lost(WorkerLostError("simulated: the child was killed"), slot.pid, runtime_s)
        elif limit_s is not None and runtime_s > limit_s:
            runtime_s = limit_s
            outcome = Lost(TimeLimitExceeded(limit_s), slot.pid, runtime_s)
        slot.timer = self.loop.call_later(runtime_s, self._end, slot, outcome)

    def _kill(self, slot: Slot, error: BaseException) -> None:
        self._end(slot, Lost(error, slot.pid, 0.0))

    def _end(self, slot: Slot, outcome: Union[Outcome, Lost]) -> None:
        world, job = self.world, slot.job
        assert job is not None
        slot.job = None
        if slot.timer is not None:
            slot.timer.cancel()
        if isinstance(outcome, Lost):
            slot.alive = False
            while slot.ahead:
                self._hand_back(slot.ahead.popleft())
            if not self._stopping:
                self.loop.call_later(world.pools.choice((0.01, 0.1, 1.0)), self._replace, slot)
        elif slot.ahead:
            slot.job = slot.ahead.popleft()
            slot.timer = self.loop.call_later(0.0, self._begin, slot)
        self._tell(job, outcome)
        self._perhaps_stopped()

    def _tell(self, job: Job, outcome: Union[Outcome, Lost]) -> None:
        world, copy = self.world, self.copy_of(job)
        if isinstance(outcome, Lost):
            world.lost(self.who, copy, repr(outcome.error))
        else:
            world.note(self.who, "#%s came to %s", copy.number, outcome.state)
        self.transport.outcomes[copy.number] = outcome
        job.on_done(job, outcome)

    def _replace(self, slot: Slot) -> None:
        self._pids += 1
        slot.pid = self._pids
        slot.alive = True
        self.on_free()

    # -- the end

    def terminate(self, job: Job, signal_name: str = "SIGTERM") -> bool:
        slot = job.slot
        if slot is None or (slot.job is not job and job not in slot.ahead):
            return False
        # The signal takes its time; a job may come to its end meanwhile.
        delay_s = self.world.pools.choice((0.0, 0.01, 0.5))
        self.loop.call_later(delay_s, self._terminated, slot, job, signal_name)
        return True

    def _terminated(self, slot: Slot, job: Job, signal_name: str) -> None:
        if slot.job is job:
            self._kill(slot, Terminated(signal_name))
        else:
            self._recall(slot, job)

    def stop(self, deadline_mono: float, on_stopped: Callable[[], None]) -> None:
        self._stopping = True
        self._on_stopped = on_stopped
        for slot in self.slots:
            while slot.ahead:
                self._hand_back(slot.ahead.popleft())
        if deadline_mono != float("inf"):
            self.loop.call_at(deadline_mono, self._cut_off)
        self.loop.call_soon(self._perhaps_stopped)

    def _cut_off(self) -> None:
        for slot in list(self.slots):
            if slot.job is not None:
                self._kill(slot, WorkerLostError("simulated: stopped with the worker"))

    def _perhaps_stopped(self) -> None:
        if self._stopping and self.idle and self._on_stopped is not None:
            on_stopped, self._on_stopped = self._on_stopped, None
            self.loop.call_soon(on_stopped)

# SPDX-License-Identifier: MIT
"""The seam between the worker's loop and what runs tasks: jobs in, outcomes back.

A pool has slots.  A slot is derived from something alive and idle (a child process, a thread),
never from a counter, so none can be lost.  `submit` may be called only while `free_slots` > 0: a
job never waits behind another one inside a pool.

Every submitted job comes back exactly once through `on_done`, in the loop's thread: with the
run's `Outcome`, or with `Lost` when there is none because the process died, the hard limit was
over or the job was terminated.

A pool may also take short jobs *ahead* of a free slot (`ahead_slots`, `submit_ahead`), so that a slot
need not wait for the worker between two of them.  Such a job can still be taken back until the very
moment in which it begins, and is as soon as something before it takes long: then it comes back
through `on_back` instead, and has not begun.
"""

from __future__ import annotations

import signal
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Union

from ..connections.starts import StartJournal
from ..exceptions import ImproperlyConfigured
from ..loop import Loop
from ..runner import Outcome, Run, RunnerSpec
from ..text import import_object, nearest

#: pool name -> "module:Class", relative to this package.
POOLS: Dict[str, str] = {
    "prefork": ".prefork:PreforkPool",
    "processes": ".prefork:PreforkPool",
    "threads": ".threads:ThreadPool",
    "solo": ".solo:SoloPool",
    "asyncio": ".aio:AsyncioPool",
}


class Lost(NamedTuple):
    """A job that ended without an outcome.

    `error` is a `WorkerLostError`, `TimeLimitExceeded` or `Terminated`; `pid` the process that ran
    it (0 where it was a thread).
    """

    error: BaseException
    pid: int
    runtime_s: float


class Job:
    """One run on its way through a pool.

    `soft_limit_s` / `hard_limit_s`: seconds from the start, None = no limit.
    `on_start(job, pid)` is called when the run begins, if `wants_start` is set (it costs a message).
    `on_done(job, outcome_or_lost)` is called exactly once, or `on_back(job)` for one that was
    submitted ahead and has not begun.  `token`: its name in the journal of starts, if there is one.
    `slot` and `permit` belong to the pool.
    """

    __slots__ = (
        "run", "soft_limit_s", "hard_limit_s", "wants_start", "on_start", "on_done", "on_back", "token",
        "slot", "permit", "started_mono",
    )  # fmt: skip

    def __init__(
        self,
        run: Run,
        on_done: "Callable[[Job, Union[Outcome, Lost]], None]",
        on_start: "Optional[Callable[[Job, int], None]]" = None,
        soft_limit_s: Optional[float] = None,
        hard_limit_s: Optional[float] = None,
        on_back: "Optional[Callable[[Job], None]]" = None,
        token: Optional[int] = None,
    ) -> None:
        self.run = run
        self.on_back = on_back
        self.token = token
        self.permit: Optional[int] = None
        self.on_done = on_done
        self.on_start = on_start
        self.wants_start = on_start is not None
        self.soft_limit_s = soft_limit_s
        self.hard_limit_s = hard_limit_s
        self.slot: Any = None
        self.started_mono = 0.0


class PoolOptions(NamedTuple):
    """What the worker asks of a pool."""

    concurrency: int
    max_tasks_per_child: Optional[int] = None
    max_memory_per_child_kib: Optional[int] = None
    start_method: Optional[str] = None  #: fork, forkserver, spawn; None = the best here
    alive_timeout_s: float = 10.0  #: a child must be up, or accept a job, within this time


class Pool:
    """Runs jobs.  All methods are called in the loop's thread and do not block."""

    #: What this kind of pool can do; the worker says so when a task asks for more.
    can_terminate = False
    has_soft_limit = False
    has_hard_limit = False
    #: False where only a coroutine can be interrupted by its soft limit, not a plain function.
    soft_limit_for_functions = True
    can_take_ahead = False
    #: True where tasks run in other processes than the worker.
    has_processes = False
    #: True where tasks run in the main thread and the loop moves to a second one (solo).
    runs_in_main_thread = False

    def __init__(self, options: PoolOptions, spec: RunnerSpec) -> None:
        raise NotImplementedError

    def start(self, loop: Loop, on_free: Callable[[], None]) -> None:
        """Begin; `on_free` is called whenever a slot became free for another reason than `on_done`.

        For example when a new child is up.  Raises when the pool cannot begin at all.
        """
        raise NotImplementedError

    @property
    def free_slots(self) -> int:
        """How many jobs may be submitted now."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """How many slots the pool is meant to have."""
        raise NotImplementedError

    @property
    def abandoned(self) -> int:
        """How many jobs were reported as `Lost` while their code runs on: a thread cannot be killed.

        A worker that sees this grow should end its process and begin anew.
        """
        return 0

    def submit(self, job: Job) -> None:
        """Run `job` in a free slot."""
        raise NotImplementedError

    def use_journal(self, journal: StartJournal) -> None:
        """Have children note in `journal` which jobs begin; before the first job."""

    @property
    def ahead_slots(self) -> int:
        """How many short jobs without limits may be submitted ahead of a free slot; 0 = this pool cannot."""
        return 0

    def submit_ahead(self, jobs: Sequence[Job]) -> None:
        """Run `jobs` (they have a `token` and `on_back`) behind some that run, unless they are taken back."""
        raise NotImplementedError

    def terminate(self, job: Job, signal_name: str = "SIGTERM") -> bool:
        """Stop a running job from outside; it comes back as `Lost`.  False: cannot.

        Raises `ValueError` for a signal name that does not exist.
        """
        raise NotImplementedError

    def grow(self, n: int) -> None:
        """Add `n` slots."""
        raise NotImplementedError

    def shrink(self, n: int) -> None:
        """Remove `n` slots (at least one stays); busy ones go when their job is done."""
        raise NotImplementedError

    def restart(self) -> bool:
        """Replace all processes, busy ones when their job is done; False: there are none to replace."""
        return False

    def pids(self) -> List[int]:
        """Return the process ids of live children; empty where there are none."""
        raise NotImplementedError

    def info(self) -> Dict[str, Any]:
        """Return what `inspect stats` shows: implementation, max-concurrency, processes, ..."""
        raise NotImplementedError

    def stop(self, deadline_mono: float, on_stopped: Callable[[], None]) -> None:
        """End idle slots now, busy ones when their job is done; `on_stopped` when none is left.

        At `deadline_mono` (loop time; ``float("inf")`` = no deadline) what still runs is killed
        and comes back as `Lost`.  Calling again moves the deadline.
        """
        raise NotImplementedError

    def run_forever(self) -> None:
        """Run jobs in the calling thread until stopped; only where `runs_in_main_thread`."""
        raise NotImplementedError


def signal_number(name: str) -> int:
    """Return the number of a signal called ``SIGTERM``, ``term`` or the like.

    Raises `ValueError` for a name unknown on this system.
    """
    full = name.upper() if name.upper().startswith("SIG") else "SIG" + name.upper()
    number = signal.__dict__.get(full)
    if not isinstance(number, signal.Signals):
        raise ValueError(f"unknown signal {name!r}; known: {', '.join(each.name for each in signal.Signals)}")
    return int(number)


def pool_class(name: str) -> "type[Pool]":
    """Return the pool class called `name`, or named by a dotted path ``module:Class``."""
    target = POOLS.get(name)
    if target is not None:
        found: "type[Pool]" = import_object(target, package=__package__)
        return found
    if ":" in name or "." in name:
        found = import_object(name)
        return found
    hint = nearest(name, POOLS)
    known = ", ".join(sorted(POOLS))
    raise ImproperlyConfigured(
        f"unknown pool {name!r}{f' (did you mean {hint}?)' if hint else ''}; known: {known}"
    )

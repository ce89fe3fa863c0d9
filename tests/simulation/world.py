# SPDX-License-Identifier: MIT
"""The world of one simulated schedule: its clock, its chance, its faults, and what became of messages.

Everything that is drawn comes from generators seeded with the schedule's number, and time is a number
that only the fleet moves: the same seed plays the same schedule.  Time goes in steps of 2**-20 s, so
that sums of it are exact in a float, on the wall as well as in a worker's own monotonic seconds.

What is recorded inside a transaction counts when that is committed, and is dropped when it is not.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from types import TracebackType
from typing import Any, Callable, Dict, List, NoReturn, Optional, Set, Tuple, Type, cast

from miniq.exceptions import BackendStoreError, OperationalError

#: Epoch seconds at which every schedule begins.
EPOCH = 1_800_000_000.0
TICKS_PER_S = 2.0**20
#: Moments on the wire are whole microseconds.
ROUNDING_S = 2e-6

CRASH, LOST, REFUSED = "crash", "lost connection", "refused"


class Crash(BaseException):
    """The process dies here.  No safety net may catch it."""


class Violation(BaseException):
    """A promise was broken.  No safety net may catch it."""


class Copy:
    """One message as it was published once: the same task id may travel in several."""

    __slots__ = (
        "number", "id", "task", "eta", "expires", "polled_at", "marks", "starts", "runs", "doubles",
        "succeeded", "ended", "losses",
    )  # fmt: skip

    def __init__(self, number: int, id_: str, task: str) -> None:
        self.number = number
        self.id = id_
        self.task = task
        self.eta: Optional[float] = None
        self.expires: Optional[float] = None
        self.polled_at = 0  # position among all commits
        self.marks = 0  # how often the broker was told that it starts
        self.starts = 0  # how many of these it counts, as of those sent back on purpose it does not
        self.runs = 0  # how often it has begun
        self.doubles = 0  # how often the broker delivered it again although it was acknowledged
        self.succeeded = 0  # how often it was acknowledged after a success
        self.ended = 0  # how often it was acknowledged or set aside
        self.losses = 0  # how often what ran it went away


class World:
    """Time, chance, faults and the record of one schedule."""

    #: Under this name the schedule's broker is known.
    broker_name = "simulation"

    def __init__(self, seed: int) -> None:
        self.seed = seed
        #: Seconds since the beginning.
        self.t = 0.0
        self.plan = random.Random(f"{seed} plan")
        self.order = random.Random(f"{seed} order")
        self.pools = random.Random(f"{seed} pools")
        self._chance = random.Random(f"{seed} faults")
        self.fault_rate = self._chance.choice((0.0, 0.004, 0.012, 0.03, 0.06))
        self.faults_left = 12 if self.fault_rate else 0
        #: Which faults have struck where, and how often.
        self.struck: "Counter[str]" = Counter()
        #: No fault strikes from here on (seconds since the beginning).
        self.horizon = 0.0
        #: The broker answers nobody in between.
        self.down: Tuple[float, float] = (0.0, 0.0)

        #: How often one message may be started.
        self.delivery_limit = 3

        self.trace: List[Tuple[float, str, str, Tuple[Any, ...]]] = []
        self.depth = 0
        self.commits = 0
        self._pending: List[Tuple[Callable[..., Any], Tuple[Any, ...]]] = []
        self._numbers = 0
        #: Which messages the last commit marked as started.
        self.just_marked: List[Copy] = []
        #: All messages by number; those that were really published by task id.
        self.copies: Dict[int, Copy] = {}
        self.by_id: Dict[str, List[Copy]] = {}
        self.dead: Dict[str, List[str]] = {}
        #: Ids of deliveries which their owners have settled, where the broker knows them by such.
        self.settled_ids: Set[str] = set()
        self.revoked_at: Dict[str, int] = {}
        #: Tasks whose result the backend did not take, and how often.
        self.refusals: "Counter[str]" = Counter()
        #: (worker, task) -> when jobs were given to its pool.
        self.submissions: Dict[Tuple[str, str], List[float]] = {}

    # -- time

    def now(self) -> float:
        """Return epoch seconds."""
        return EPOCH + self.t

    def advance(self, t: float) -> None:
        """Move the clock on to `t`, or a tick of it later."""
        self.t = max(self.t, math.ceil(t * TICKS_PER_S) / TICKS_PER_S)

    # -- trace

    def note(self, who: str, text: str, *args: Any) -> None:
        """Remember an event; formatted only when somebody wants to read it."""
        self.trace.append((self.t, who, text, args))

    def told(self) -> List[str]:
        """Return the trace as lines."""
        return [f"{t:11.6f} {who:>8}  {text % args if args else text}" for t, who, text, args in self.trace]

    def violation(self, text: str) -> NoReturn:
        """Say that a promise was broken; ends the schedule."""
        self.note("oracle", "%s", text)
        raise Violation(text)

    # -- faults

    def strike(self, who: str, point: str, *kinds: str) -> None:
        """Perhaps raise one of the faults `kinds`; called at each place where one may happen."""
        if not kinds:
            return
        if LOST in kinds and self.down[0] <= self.t < self.down[1]:
            self.note(who, "%s: the broker is down", point)
            raise OperationalError(f"simulated: the broker is down ({point})")
        if not self.faults_left or not self.strikes(self.fault_rate):
            return
        self.faults_left -= 1
        kind = self._chance.choice(kinds)
        self.struck[f"{kind}: {point}"] += 1
        self.note(who, "%s: FAULT %s", point, kind)
        if kind == CRASH:
            raise Crash(point)
        if kind == REFUSED:
            raise BackendStoreError(f"simulated: refused ({point})")
        raise OperationalError(f"simulated: connection lost ({point})")

    def strikes(self, rate: float) -> bool:
        """Draw whether something bad happens; never when the faults are over."""
        return self.t < self.horizon and self._chance.random() < rate

    # -- what became of messages

    def new_number(self) -> int:
        """Return a number for a message that is about to be published."""
        self._numbers += 1
        return self._numbers

    def record(self, call: Callable[..., Any], *args: Any) -> None:
        """Have `call(*args)` when the transaction around this is committed."""
        self._pending.append((call, args))

    def commit(self) -> None:
        """Make what was recorded true."""
        self.commits += 1
        self.just_marked = []
        pending, self._pending = self._pending, []
        for call, args in pending:
            call(*args)

    def rollback(self) -> None:
        """Forget what was recorded."""
        self._pending.clear()

    def published(self, who: str, copy: Copy) -> None:
        self.by_id.setdefault(copy.id, []).append(copy)
        self.note(who, "published #%s %s[%s]", copy.number, copy.task, copy.id)

    def polled(self, who: str, copy: Copy, fate: Optional[str]) -> None:
        copy.polled_at = self.commits
        self.note(who, "took #%s %s[%s]%s", copy.number, copy.task, copy.id, f", {fate}" if fate else "")

    def marked(self, who: str, copy: Copy) -> None:
        copy.marks += 1
        self.just_marked.append(copy)
        copy.starts += 1
        self.note(who, "marked #%s as started, start %d", copy.number, copy.starts)
        limit = self.delivery_limit * (1 + copy.doubles)
        if copy.starts > limit:
            self.violation(f"#{copy.number} {copy.id}: start {copy.starts}, the limit is {limit}")

    def ended(self, who: str, copy: Copy, how: str, succeeded: bool) -> None:
        copy.ended += 1
        copy.succeeded += succeeded
        self.note(who, "%s #%s", how, copy.number)

    def doubled(self, who: str, copy: Copy) -> None:
        copy.doubles += 1
        self.note(who, "FAULT the broker delivers #%s once more", copy.number)

    def released(self, who: str, copy: Copy, was_started: bool) -> None:
        copy.starts -= was_started
        self.note(who, "released #%s", copy.number)

    def requeued(self, who: str, copy: Copy) -> None:
        copy.starts = min(copy.starts, self.delivery_limit * (1 + copy.doubles) - 1)
        self.note(who, "requeued #%s", copy.number)

    def set_aside(self, who: str, copy: Copy, reason: str) -> None:
        self.dead.setdefault(copy.id, []).append(reason)
        self.ended(who, copy, "set aside", False)

    def revoked(self, who: str, task_ids: List[str]) -> None:
        for task_id in task_ids:
            self.revoked_at.setdefault(task_id, self.commits)
        self.note(who, "revoked %s", task_ids)

    def lost(self, who: str, copy: Copy, why: str) -> None:
        copy.losses += 1
        self.note(who, "#%s %s[%s] is cut off: %s", copy.number, copy.task, copy.id, why)


class Call:
    """A context around one call of a store: a fault before, a fault after, a commit where it stands alone."""

    __slots__ = ("world", "who", "point", "kinds", "kinds_after")

    def __init__(
        self,
        world: World,
        who: str,
        point: str,
        kinds: Tuple[str, ...],
        kinds_after: Optional[Tuple[str, ...]] = None,
    ) -> None:
        self.world = world
        self.who = who
        self.point = point
        self.kinds = kinds
        self.kinds_after = kinds if kinds_after is None else kinds_after

    def __enter__(self) -> None:
        self.world.strike(self.who, self.point, *self.kinds)
        self.world.depth += 1

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        world = self.world
        world.depth -= 1
        if world.depth == 0:
            if kind is not None:
                world.rollback()
            else:
                world.commit()
                # Done, but nobody hears of it.
                world.strike(self.who, f"after {self.point}", *self.kinds_after)


class Transaction:
    """A transaction of the real transport, with faults around its commit."""

    __slots__ = ("world", "who", "inner", "kinds_before", "kinds_after")

    def __init__(
        self, world: World, who: str, inner: Any, kinds_before: Tuple[str, ...], kinds_after: Tuple[str, ...]
    ) -> None:
        self.world = world
        self.who = who
        self.inner = inner
        self.kinds_before = kinds_before
        self.kinds_after = kinds_after

    def __enter__(self) -> None:
        self.inner.__enter__()
        self.world.depth += 1

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        world = self.world
        if kind is None:
            try:
                world.strike(self.who, "before the commit", *self.kinds_before)
            except BaseException as fault:
                world.depth -= 1
                world.rollback()
                self.inner.__exit__(type(fault), fault, None)
                raise
        world.depth -= 1
        try:
            self.inner.__exit__(kind, error, traceback)
        except BaseException:
            world.rollback()
            raise
        if kind is not None:
            world.rollback()
        elif world.depth == 0:
            world.commit()
            try:
                world.strike(self.who, "after the commit", *self.kinds_after)
            except OperationalError:
                for copy in world.just_marked:
                    world.lost(self.who, copy, "its worker does not know that it started")
                raise


class LogKeeper(logging.Handler):
    """Puts what miniq logs into the trace; an error that a safety net caught is a broken promise."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.WARNING)
        self.world = world
        self.caught: List[str] = []
        self.wrong: List[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.world.note("log", "%s", text)
        if "was given to another worker" in record.msg:
            (request,) = cast(Tuple[Any], record.args)
            if getattr(request.delivery.tag, "id", None) in self.world.settled_ids:
                self.wrong.append(f"{text}; but it was settled here")
        if record.exc_info and record.exc_info[1] is not None:
            self.caught.append(f"{text}: {logging.Formatter().formatException(record.exc_info)}")

# SPDX-License-Identifier: MIT
"""A fleet in one process: producers, workers that die and are replaced, one broker, one schedule.

`Fleet.run` plays the schedule of a seed.  Whoever is due first acts first, in drawn order among
equals: a worker turns its real loop once, or the next appointment of the agenda is kept (a producer
sends, a task is revoked, a worker is stopped, a death is noticed).  When all is quiet the promises
are checked; those about the start of a task were checked when it started.
"""

from __future__ import annotations

import heapq
import json
import logging
import traceback
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, cast

from simulation.brokers import FleetBroker, MemoryFleetBroker, RedisFleetBroker
from simulation.pool import SimPool
from simulation.seams import SimBackend, SimLoop, SimTransport
from simulation.world import CRASH, LOST, Copy, Crash, LogKeeper, Violation, World

from miniq import MiniQ, states
from miniq.backends.base import Backend, StoredResult
from miniq.exceptions import OperationalError, Reject
from miniq.producer import Producer
from miniq.trace import TaskRunner
from miniq.transports.base import Transport
from miniq.worker.worker import Worker

#: A schedule has the one that its seed tells.
BROKERS: Tuple[Callable[[World], FleetBroker], ...] = (MemoryFleetBroker, RedisFleetBroker)
#: Bounds of one schedule: steps in all, steps without time going on, virtual seconds of waiting at the end.
MAX_STEPS, MAX_STEPS_AT_ONCE, MAX_WAIT_S = 20_000, 1_000, 900.0
MAX_WORKERS = 7
#: Tasks per second and worker, and hard limit in seconds, of the tasks that have one.
RATE_PER_S, HARD_LIMIT_S = 2.0, 3.0

LOGGERS = ("miniq", "celery")


class Variant(NamedTuple):
    """What is different about this fleet, for showing that it would be found out."""

    consumer: Callable[[Any], Any] = lambda consumer: consumer
    transport: Callable[[Any], Any] = lambda transport: transport
    backend: Callable[[Any], Any] = lambda backend: backend
    settings: Mapping[str, Any] = {}
    deaf: bool = False  #: wake-ups are lost
    broker: Optional[Callable[[World], FleetBroker]] = None  #: None = one after the other


class Member:
    """One worker of the fleet, from its start to its end."""

    def __init__(self, who: str, loop: SimLoop, pool: SimPool, worker: Worker) -> None:
        self.who = who
        self.node = worker.hostname
        self.loop = loop
        self.pool = pool
        self.worker = worker
        self.alive = True
        self.stopping = False
        self.stalled_until = 0.0


class SimProducer(Producer):
    """The app's producer with a transport of the simulation."""

    def __init__(self, app: MiniQ, transport: SimTransport) -> None:
        super().__init__(app)
        self._sim_transport = transport

    def new_transport(self, write: bool) -> Transport:
        return cast(Transport, self._sim_transport)


class Call(NamedTuple):
    """One planned call of a task."""

    id: str
    task: str
    args: Tuple[Any, ...]
    options: Dict[str, Any]
    value: Any  #: what it returns when it succeeds


# -- tasks ---------------------------------------------------------------------------------------


def double(n: int) -> int:
    return 2 * n


def flaky(self: Any, n: int, fails: int, pause_s: float) -> int:
    if self.request.retries < fails:
        raise self.retry(countdown=pause_s)
    return 2 * n


def telling(self: Any, n: int) -> int:
    self.update_state(state="PROGRESS", meta=n)
    return 2 * n


def failing(n: int) -> None:
    raise ValueError(n)


def refusing(n: int) -> None:
    raise Reject(f"number {n}")


def listed(value: Any) -> List[Any]:
    return [value]


def same(failed_id: str) -> str:
    return failed_id


_LATE = {"acks_late": True, "reject_on_worker_lost": True}
#: name -> function and options.
TASKS: Dict[str, Tuple[Callable[..., Any], Dict[str, Any]]] = {
    "early": (double, {}),
    "late": (double, _LATE),
    "late_once": (double, {"acks_late": True}),
    "rated": (double, {"rate_limit": RATE_PER_S}),
    "rated_late": (double, {"rate_limit": RATE_PER_S, **_LATE}),
    "limited": (double, {"time_limit": HARD_LIMIT_S}),
    "limited_late": (double, {"time_limit": HARD_LIMIT_S, "acks_on_timeout": False, **_LATE}),
    "silent": (double, {"ignore_result": True}),
    "flaky": (flaky, {"bind": True}),
    "flaky_late": (flaky, {"bind": True, **_LATE}),
    "telling": (telling, {"bind": True, "track_started": True, **_LATE}),
    "failing": (failing, {}),
    "refusing": (refusing, _LATE),
    "poison": (double, _LATE),  # its process never lives to tell: see `SimPool`
    "callback": (listed, {}),
    "callback_late": (listed, _LATE),
    "errback": (same, {}),
}
#: What is called, and how often compared with the others; "unknown" is the name of no task.
KINDS = (
    *(name for name in TASKS if not name.startswith(("callback", "errback"))),
    *("early", "early", "late", "late", "flaky", "unknown"),
)


class Fleet:
    """All that takes part in the schedule of one seed."""

    def __init__(self, seed: int, variant: Optional[Variant] = None) -> None:
        self.variant = variant or Variant()
        self.world = world = World(seed)
        plan = world.plan
        kind = self.variant.broker or BROKERS[seed % len(BROKERS)]
        self.broker: FleetBroker = kind(world)
        settings = {
            "worker_deduplicate_successful_tasks": plan.random() < 0.3,
            "task_delivery_limit": world.delivery_limit,
            **self.variant.settings,
        }
        url = self.broker.url
        self.app = MiniQ("simulation", broker=url, set_as_current=False, wall=world.now, **settings)
        decorate: Any = self.app.task
        for name, (fun, options) in TASKS.items():
            decorate(name=name, **options)(fun)
        self.prefetch = plan.choice((1, 1, 2, 4))
        self.max_concurrency = plan.choice((1, 2, 3))
        #: Tasks are many and short, so that workers give them to their pools ahead.
        self.quick = plan.random() < 0.06
        # Tasks that store a state of their own do so without faults.
        cast(Any, self.app).new_backend = lambda url=None: self.broker.backend()
        self.producer = SimProducer(self.app, self.broker.producer())
        # Revocations go through the app's own producer.
        self.app.producer = self.producer
        self.members: List[Member] = []
        self.calls: Dict[str, Call] = {}
        self._agenda: List[Tuple[float, int, Callable[..., Any], Tuple[Any, ...]]] = []
        self._sequence = 0
        self._steps = 0
        self._steps_at_once = 0
        self._deadline = 0.0
        self._seen_version = -1
        self._seen: Dict[str, StoredResult] = {}

    # -- the plan

    def _at(self, t: float, call: Callable[..., Any], *args: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._agenda, (t, self._sequence, call, args))

    def _make_plan(self) -> None:
        world, plan = self.world, self.world.plan
        length_s = 0.02 if self.quick else plan.choice((0.5, 3.0, 10.0))
        # Now and then all calls are of one kind: a crowd shows other things than a mixture.
        kinds: Sequence[str] = KINDS if plan.random() < 0.8 else (plan.choice(KINDS),)
        if self.quick:
            kinds = plan.choice((("early",), ("early",), ("late",), ("silent",)))
        for number in range(plan.randint(8, 22) + 80 * self.quick):
            call = self._plan_call(number, kinds)
            self.calls[call.id] = call
            t = plan.random() * length_s
            self._at(t, self._send, call, plan.choice((0, 1, 3)))
            if plan.random() < 0.12:
                self._at(t + plan.choice((-0.1, 0.0, 0.3, 2.0)), self._revoke, call.id, plan.random() < 0.5)
        world.horizon = length_s + plan.choice((1.0, 5.0, 15.0))
        self._deadline = world.horizon + MAX_WAIT_S
        if plan.random() < 0.15:
            begin = plan.random() * world.horizon
            world.down = (begin, min(begin + plan.choice((0.2, 1.0, 6.0)), world.horizon))
        for _ in range(2):
            self._at(plan.choice((0.0, 0.0, 0.5, 2.0)), self._start_worker)
        if plan.random() < 0.35:
            self._at(plan.random() * world.horizon, self._stop_worker, plan.choice(("warm", "cold")))
        self._at(world.horizon, self._start_last_worker)

    def _plan_call(self, number: int, kinds: Sequence[str]) -> Call:
        plan = self.world.plan
        task = plan.choice(kinds)
        task_id = f"{task}-{number}"
        options: Dict[str, Any] = {}
        if plan.random() < 0.25:
            options["countdown"] = plan.choice((0.05, 1.0, 6.5, 15.0))
        if plan.random() < 0.12:
            options["expires"] = plan.choice((0.01, 1.0, 8.0))
        if plan.random() < 0.2:
            options["priority"] = plan.choice((1, 5, 9))
        if plan.random() < 0.3 and task != "unknown":
            callback = plan.choice(("callback", "callback_late"))
            options["link"] = self.app.tasks[callback].s().set(task_id=f"{task_id}-link")
            self._plan_follower(f"{task_id}-link", callback, [2 * number])
        if plan.random() < 0.3 and task != "unknown":
            options["link_error"] = self.app.tasks["errback"].s().set(task_id=f"{task_id}-error")
            self._plan_follower(f"{task_id}-error", "errback", task_id)
        args: Tuple[Any, ...] = (number,)
        if task.startswith("flaky"):
            args = (number, plan.choice((0, 1, 2, 3, 5)), plan.choice((0, 0.2, 3.0)))
        return Call(task_id, task, args, options, 2 * number)

    def _plan_follower(self, task_id: str, task: str, value: Any) -> None:
        self.calls[task_id] = Call(task_id, task, (), {}, value)

    # -- appointments

    def _send(self, call: Call, tries_left: int) -> None:
        world = self.world
        try:
            self.app.send_task(
                call.task, call.args, task_id=call.id, producer=self.producer, retry=False, **call.options
            )
        except OperationalError:
            if tries_left:
                self._at(world.t + world.plan.choice((0.01, 0.5)), self._send, call, tries_left - 1)
        else:
            if call.id not in world.by_id:
                world.violation(f"{call.id} was sent without an error, but the broker does not have it")

    def _revoke(self, task_id: str, terminate: bool) -> None:
        try:
            self.app.control.revoke(task_id, terminate=terminate)
        except OperationalError as error:
            self.world.note("control", "could not revoke %s: %s", task_id, error)

    def _start_worker(self, limit: int = MAX_WORKERS, node: str = "") -> None:
        """Start one more worker; under the `node` name of a dead one its death is noticed at once."""
        if len(self.members) >= limit:
            return
        world, variant = self.world, self.variant
        number = len(self.members) + 1
        who = f"w{number}"
        # Powers of two keep sums with them exact.
        loop = SimLoop(world, 4096.0 * 2 ** (number % 3))
        transport, results = self.broker.worker(who, loop.sim_selector, variant)
        transport.variant = variant.consumer
        transport.deaf = variant.deaf
        backend = SimBackend(variant.backend(results), world, who, (CRASH, LOST))
        node = node or f"{who}@simulation"
        concurrency = world.plan.randint(1, self.max_concurrency)
        pool = SimPool(world, transport, TaskRunner(self.app, node), concurrency, self._duration_s)
        worker = Worker(
            self.app, node, concurrency, pool, prefetch_multiplier=self.prefetch,
            loop=loop, transport=cast(Transport, transport), backend=cast(Backend, backend),
        )  # fmt: skip
        member = Member(who, loop, pool, worker)
        self.members.append(member)
        world.note(who, "begins with %d slots", concurrency)
        self._guarded(member, worker.begin)

    def _duration_s(self, task: str) -> float:
        if self.quick:
            return self.world.pools.choice((0.0002,) * 30 + (0.0008,) * 9 + (0.3,))
        return self.world.pools.choice((0.001, 0.03, 0.4, 2.0, 5.0 if task.startswith("limited") else 0.1))

    def _start_last_worker(self) -> None:
        if all(member.stopping for member in self._living()):
            self.world.note("fleet", "nobody is left, a last worker begins")
            self._start_worker(MAX_WORKERS + 1)

    def _stop_worker(self, how: str) -> None:
        living = self._living()
        if living:
            member = self.world.plan.choice(living)
            self.world.note(member.who, "is told to stop (%s)", how)
            member.stopping = True
            member.worker.stop(how)
            self._at(self.world.t + 1.0, self._start_worker)

    def _notice_death(self, member: Member) -> None:
        self.world.note("fleet", "%s is seen to be dead", member.who)
        self.broker.see_dead(member.node, member.pool.transport)

    def _start_again(self, member: Member) -> None:
        """Do as a supervisor does: start a dead worker again, under the same name."""
        self._notice_death(member)
        self._start_worker(node=member.node)

    # -- turns

    def _guarded(self, member: Member, call: Callable[..., Any], *args: Any) -> None:
        """Let a worker act; it may die of it."""
        world = self.world
        try:
            call(*args)
        except (Crash, OperationalError) as error:
            # An OperationalError comes out only where a worker begins: it leaves, and is started again.
            world.note(member.who, "DIES: %s", error)
            world.depth = 0
            world.rollback()
            member.alive = False
            member.loop.close()
            self.broker.died(member.who)
            if world.plan.random() < 0.2:
                self._at(world.t + world.plan.choice((0.1, 1.0)), self._start_again, member)
                return
            self._at(world.t + world.plan.choice((0.0, 0.3, 2.0, 8.0)), self._notice_death, member)
            if world.plan.random() < 0.8:
                self._at(world.t + world.plan.choice((0.1, 1.0, 5.0)), self._start_worker)

    def _turn(self, member: Member) -> None:
        world = self.world
        if world.t < world.horizon and world.order.random() < 0.02:
            member.stalled_until = world.t + world.order.random() * self.broker.longest_stall_s
            world.note(member.who, "stands still until %f", member.stalled_until)
            return
        world.strike(member.who, "between two turns", CRASH)
        self.broker.disturb(member.who)
        member.loop.run_once(0)
        if member.loop.left:
            self.broker.forget_leaving(member.node, member.pool.transport)
            member.worker._clean()
            member.alive = False
            world.note(member.who, "has left")
            # What it could not say while leaving is told by the end of its process.
            self.broker.died(member.who)
            self._at(world.t + 0.1, self.broker.see_dead, member.node, member.pool.transport)

    def _step(self) -> None:
        """Let whoever is due first act."""
        world = self.world
        dues = [(max(member.loop.due(), member.stalled_until), member) for member in self._living()]
        first = min([due for due, _ in dues] + [self._agenda[0][0] if self._agenda else float("inf")])
        self._steps += 1
        self._steps_at_once = self._steps_at_once + 1 if first <= world.t else 0
        if self._steps > MAX_STEPS or self._steps_at_once > MAX_STEPS_AT_ONCE:
            world.violation(f"no end: {self._steps} steps, {self._steps_at_once} in this moment")
        if first > self._deadline:
            world.violation(f"no end: still not quiet {MAX_WAIT_S:g} s after the last fault; {self._left()}")
        world.advance(first)
        acting: List[Optional[Member]] = [member for due, member in dues if due <= world.t]
        if self._agenda and self._agenda[0][0] <= world.t:
            acting.append(None)
        chosen = acting[0] if len(acting) == 1 else world.order.choice(acting)
        if chosen is None:
            _, _, call, args = heapq.heappop(self._agenda)
            call(*args)
        else:
            self._guarded(chosen, self._turn, chosen)
        if self.broker.version != self._seen_version:
            self._check_results()
        if self.keeper.caught:
            world.violation(f"a safety net caught an error: {self.keeper.caught[0]}")
        if self.keeper.wrong:
            world.violation(f"a line in the log is wrong: {self.keeper.wrong[0]}")

    def _left(self) -> str:
        running = [request for member in self._living() for request in member.worker.tasks.running.values()]
        return f"in the broker: {list(self.broker.left())}; running: {running}"

    def _is_quiet(self) -> bool:
        if self._agenda or any(self.broker.left()):
            return False
        return all(member.worker.tasks.settled and member.pool.idle for member in self._living())

    def _living(self) -> List[Member]:
        return [member for member in self.members if member.alive]

    # -- from the beginning to the end

    def run(self) -> None:
        """Play the schedule; raises `Violation`."""
        loggers = [logging.getLogger(name) for name in LOGGERS]
        before = [(logger, logger.level, logger.propagate) for logger in loggers]
        self.keeper = LogKeeper(self.world)
        for logger in loggers:
            logger.addHandler(self.keeper)
            logger.setLevel(logging.WARNING)
            logger.propagate = False
        try:
            self._make_plan()
            while not self._is_quiet():
                self._step()
            for member in self._living():
                member.worker.stop()
            while self._living():
                self._step()
            self._check_end()
        finally:
            for logger, level, propagate in before:
                logger.removeHandler(self.keeper)
                logger.setLevel(level)
                logger.propagate = propagate
            for member in self.members:
                member.loop.close()
            self.app.close()
            self.broker.close()

    # -- promises

    def _check_results(self) -> None:
        """Check that no stored result went backwards since the last look."""
        self._seen_version = self.broker.version
        for task_id, result in self.broker.results():
            old = self._seen.get(task_id)
            if old is result:
                continue
            self._seen[task_id] = result
            if old is not None and (
                old.state == states.SUCCESS
                or (old.state in states.READY_STATES and result.state not in states.READY_STATES)
            ):
                self.world.violation(f"the result of {task_id} went from {old.state} to {result.state}")

    def _check_end(self) -> None:
        world = self.world
        if any(self.broker.left()):
            world.violation(f"left at the end: {self._left()}")
        if sum(map(len, world.dead.values())) != self.broker.dead_letters():
            world.violation(f"{self.broker.dead_letters()} dead letters, but set aside were {world.dead}")
        for task_id, copies in world.by_id.items():
            self._check_task(self.calls[task_id], copies)
        for call in self.calls.values():
            copies = world.by_id.get(call.id, [])
            if "link" in call.options:
                self._check_links(call, copies)
            if "link_error" in call.options:
                self._check_errbacks(call, copies)
        for (who, task), starts in world.submissions.items():
            if task.startswith("rated"):
                self._check_rate(who, task, starts)

    def _check_task(self, call: Call, copies: List[Copy]) -> None:
        """Check that what became of a task is what may have become of it."""
        violation = self.world.violation
        for copy in copies:
            if copy.ended != 1 + copy.doubles:
                violation(f"#{copy.number} {call.id} was acknowledged or set aside {copy.ended} times")
        found = self._seen.get(call.id)
        runs, losses = sum(copy.runs for copy in copies), sum(copy.losses for copy in copies)
        if (found is None or found.state not in states.READY_STATES) and self.world.refusals[call.id] >= 2:
            return  # given up, with a line in the log
        if found is None:
            skipped = call.id in self.world.revoked_at or any(copy.expires for copy in copies)
            if call.task == "silent" and (runs or losses or skipped):
                return
            violation(f"{call.id} is lost: there is no result")
        meta = json.loads(found.body)
        if found.state == states.SUCCESS:
            if not runs:
                violation(f"{call.id} succeeded without having been run")
            if meta["result"] != call.value:
                violation(f"{call.id} returned {meta['result']!r}, not {call.value!r}")
        elif found.state == states.REVOKED:
            if call.id not in self.world.revoked_at and not any(copy.expires for copy in copies):
                violation(f"{call.id} is REVOKED, but nobody revoked it and it cannot expire")
        elif found.state == states.FAILURE:
            reason = self._why_it_may_not_have_failed(call, copies, meta["result"]["exc_type"], losses)
            if reason:
                violation(f"{call.id} is a FAILURE, {meta['result']}: {reason}")
        else:
            violation(f"{call.id} is left in the state {found.state}")

    def _why_it_may_not_have_failed(self, call: Call, copies: List[Copy], error: str, losses: int) -> str:
        """Return what is wrong with the failure of a task, nothing where it may have failed so."""
        expected = {
            "failing": "ValueError", "refusing": "Reject", "unknown": "NotRegistered",
            "flaky": "MaxRetriesExceededError", "flaky_late": "MaxRetriesExceededError",
            "limited": "TimeLimitExceeded",
        }  # fmt: skip
        if error == expected.get(call.task):
            if call.task.startswith("flaky") and call.args[1] <= 3:
                return "it was to be retried only as often as allowed"
            return ""
        if error == "BackendStoreError":
            return "" if call.id in self.world.refusals else "the backend refused nothing"
        if error == "WorkerLostError":
            if not losses:
                return "nothing that ran it was lost"
            task = self.app.tasks[call.task]
            if task.reject_on_worker_lost and max(copy.starts for copy in copies) < self.world.delivery_limit:
                return "it may be started again"
            if task.reject_on_worker_lost and call.id not in self.world.dead:
                return "it was not set aside"
            return ""
        return "nothing here fails so"

    def _check_links(self, call: Call, copies: List[Copy]) -> None:
        succeeded = sum(copy.succeeded for copy in copies)
        sent = len(self.world.by_id.get(f"{call.id}-link", ()))
        if sent != succeeded:
            self.world.violation(f"{call.id} succeeded {succeeded} times, its callback was sent {sent} times")

    def _check_errbacks(self, call: Call, copies: List[Copy]) -> None:
        sent = len(self.world.by_id.get(f"{call.id}-error", ()))
        ended = sum(copy.ended - copy.succeeded for copy in copies)
        found = self._seen.get(call.id)
        failed = found is not None and found.state == states.FAILURE
        if sent > ended or (failed and not sent):
            self.world.violation(f"{call.id} failed {ended} times, its errback was sent {sent} times")

    def _check_rate(self, who: str, task: str, starts: List[float]) -> None:
        """Check the rate over every stretch.

        A start may come a tenth of an interval early; what was prefetched had its turn before.
        """
        allowed = 1 + (self.prefetch - 1) * self.max_concurrency
        for first in range(len(starts)):
            for last in range(first + 1, len(starts)):
                count, within_s = last - first + 1, starts[last] - starts[first]
                if count > allowed + within_s * RATE_PER_S + 0.11:
                    self.world.violation(f"{who} started {task} {count} times in {within_s:.3f} s")


def play(seed: int, variant: Optional[Variant] = None) -> Tuple[Fleet, Optional[Violation]]:
    """Play the schedule of a seed; return the fleet and the broken promise, if there is one."""
    fleet = Fleet(seed, variant)
    try:
        fleet.run()
    except Violation as violation:
        return fleet, violation
    except Exception as error:  # came out of a worker or of this harness: both must not happen
        fleet.world.note("fleet", "%s", traceback.format_exc())
        return fleet, Violation(f"{type(error).__name__} came out of the fleet: {error}")
    return fleet, None

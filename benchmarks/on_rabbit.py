# SPDX-License-Identifier: MIT
"""miniq on RabbitMQ, beside the codec over a bare socket, Celery and dramatiq.

All of them take turns within each benchmark, so that what else the machine does meets them alike;
everyone has a virtual host of its own.  Figures are medians of the turns, the best one beside them.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import ours
import rabbit_floors
import redis_floors
from measuring import (
    FIGURES,
    Target,
    by_turns,
    cpu_of,
    how_quiet,
    latencies_by_turns,
    middle,
    note,
    percentile,
    percentiles,
    rate,
    rate_of_drain,
    show,
    show_targets,
)
from peering import CELERY, DRAMATIQ, Workers, load, missing, program
from rabbit_floors import QUEUE, Asking, Place

CONFIRMED, UNCONFIRMED = "with confirms", "no confirms"
#: How many messages each one drains in a round.
DRAINED = {"miniq": 6000, "Celery": 2000, "dramatiq": 3000}


class Side(NamedTuple):
    """One of those compared: `app` as in `peering`, on an empty `place`, `workers` not yet started."""

    name: str
    place: Place
    app: Any
    queue: str
    workers: Workers


def ratio(own: List[float], others: List[float]) -> float:
    """The median of how many times as much it is, turn by turn: the machine's speed changes meanwhile."""
    return percentile([a / b for a, b in zip(own, others)], 0.5)


def label(who: str) -> str:
    return "rabbit" if who == "miniq" else who


class Run:
    """One run of the benchmarks on one server, with all that they make; `redis` where it is installed."""

    def __init__(
        self, server: Any, redis: Optional[redis_floors.Server], options: argparse.Namespace
    ) -> None:
        self.server = server
        self.redis = redis
        self.scale: float = options.scale
        self._places: List[Place] = []
        self._celery = self._dramatiq = options.peers
        if options.peers:
            self._celery = not missing("celery")
            self._dramatiq = not missing("dramatiq", "pika", "redis")
            for name, found in (("Celery", self._celery), ("dramatiq[rabbitmq]", self._dramatiq)):
                if not found:
                    print(f"{name}: not installed, left out (python -m tox -e bench installs it)")

    def place(self) -> Place:
        place = Place(self.server)
        self._places.append(place)
        return place

    def clear(self) -> None:
        """Delete all places made so far."""
        while self._places:
            self._places.pop().close()

    def miniq(self, results: str = "", confirms: bool = True) -> Side:
        place = self.place()
        options = {} if confirms else {"confirm_publish": False}
        app = ours.app_on(place.url, results, **options)
        workers = Workers(ours.FOLDER, [ours.command_line("-c", "2")], ours.environment())
        return Side("miniq", place, app, "celery", workers)

    def celery(self, results: str = "", confirms: bool = False) -> List[Side]:
        """Return Celery's side, nothing where it is left out."""
        if not self._celery:
            return []
        place = self.place()
        options = {"broker_transport_options": {"confirm_publish": True}} if confirms else {}
        app, env = load(ours.FOLDER, "rabbit_celery", CELERY, place.url, results, **options)
        command = program("celery", "-A", "rabbit_celery", "worker", "-c", "2")
        return [Side("Celery", place, app, "celery", Workers(ours.FOLDER, [command], env))]

    def dramatiq(self, results: str = "", confirms: bool = False) -> List[Side]:
        """The same of dramatiq, which has no results over rpc."""
        if not self._dramatiq:
            return []
        place = self.place()
        # Its client beats only while it is used, which here it is not for minutes.
        url = f"{place.url}?heartbeat=0"
        options = {"confirm_delivery": True} if confirms else {}
        app, env = load(ours.FOLDER, "rabbit_dramatiq", DRAMATIQ, url, results, **options)
        command = program("dramatiq", "rabbit_dramatiq", "--processes", "2", "--threads", "1")
        return [Side("dramatiq", place, app, "default", Workers(ours.FOLDER, [command], env))]

    def message(self) -> Any:
        """Return the message that miniq sends for a task, which the floors send too."""
        side = self.miniq()
        side.app.send(side.app.nothing)
        return side.place.wire.take(side.queue)


# -- enqueue -------------------------------------------------------------------------------------


class Sender(NamedTuple):
    """Who enqueues how, and what does it; its messages come to a queue at a place."""

    name: str
    how: str
    call: Callable[[], object]
    place: Place
    queue: str


def of_side(side: Side, how: str, call: Callable[[], object]) -> Sender:
    return Sender(side.name, how, call, side.place, side.queue)


Turns = List[Tuple[float, float]]


def in_turns(
    senders: List[Sender], turns: int, calls: int, messages: int = 1
) -> Dict[Tuple[str, str], Turns]:
    """Let each make `calls` calls of `messages` messages a turn; return (messages/s, CPU seconds each).

    After a turn all its messages arrive, untimed, and are taken away: nobody pays for another's.
    """

    def clear(index: int) -> None:
        sender = senders[index]
        sender.place.settle(sender.queue, calls * messages)
        sender.place.purge(sender.queue)

    by_turns([sender.call for sender in senders], 1, calls, clear)
    found = by_turns([sender.call for sender in senders], turns, calls, clear)
    return {
        (sender.name, sender.how): [(speed * messages, used / messages) for speed, used in pairs]
        for sender, pairs in zip(senders, found)
    }


def tell(what: str, found: Dict[Tuple[str, str], Turns], quiet: str) -> None:
    """Print and note what each one came to beside the floor that does it the same way."""
    speeds = {key: [speed for speed, _ in pairs] for key, pairs in found.items()}
    for (who, how), own in speeds.items():
        if who == "floor":
            continue
        floor = ("floor", how if ("floor", how) in found else CONFIRMED)
        used, bare_used = (
            percentile([used for _, used in found[key]], 0.5) * 1e6 for key in ((who, how), floor)
        )
        told = f"best {rate(max(own))}; CPU {used:.0f} us, floor {bare_used:.0f} us; {quiet}"
        show(
            f"{label(who)}: {what}, {how}", rate(note(f"{what} {how}", percentile(own, 0.5), who)),
            rate(percentile(speeds[floor], 0.5)), f"{ratio(own, speeds[floor]):.0%}; {told}",
        )  # fmt: skip
        for (other, other_how), others in speeds.items():
            note(f"{what} {how} over {other} {other_how}", ratio(own, others), who)


def bench_enqueue(run: Run) -> None:
    content = run.message()
    senders: List[Sender] = []
    for how, confirms in ((CONFIRMED, True), (UNCONFIRMED, False)):
        place = run.place()
        bare = rabbit_floors.publisher(place.new_wire(confirms), QUEUE, content)
        senders.append(Sender("floor", how, bare, place, QUEUE))
        sides = [run.miniq(confirms=confirms), *run.celery(confirms=confirms)]
        sides += run.dramatiq(confirms=confirms)
        senders += [of_side(side, how, partial(side.app.send, side.app.nothing)) for side in sides]
    quiet = how_quiet()
    tell("enqueue", in_turns(senders, max(5, int(40 * run.scale)), 100), quiet)


def bench_bulk(run: Run) -> None:
    content = run.message()
    place = run.place()
    wire = place.new_wire(confirms=True)
    bare = partial(wire.publish, QUEUE, [content] * 1000)
    senders = [Sender("floor", CONFIRMED, bare, place, QUEUE)]
    sides = [(side, CONFIRMED) for side in [run.miniq(), *run.dramatiq(confirms=True)]]
    sides += [(side, UNCONFIRMED) for side in [*run.celery(), *run.dramatiq()]]
    senders += [of_side(side, how, partial(side.app.bulk, side.app.nothing, 1000)) for side, how in sides]
    quiet = how_quiet()
    tell("bulk of 1,000", in_turns(senders, max(3, int(10 * run.scale)), 1, 1000), quiet)


# -- drain ---------------------------------------------------------------------------------------


class Drained(NamedTuple):
    """Tasks per second, and what one task costs the workers (their start included) and the server."""

    per_s: float
    worker_us: float
    server_us: float


def drained(run: Run, side: Side, task: Any, n: int) -> Drained:
    """Fill the queue and let the side's workers empty it."""
    side.app.bulk(task, n)
    side.place.settle(side.queue, n)
    server = cpu_of([run.server.pid])
    with side.workers:
        found = rate_of_drain(lambda: side.place.left(side.queue), n)
        done = n - side.place.left(side.queue)
        used = cpu_of(side.workers.pids()), cpu_of([run.server.pid]) - server
    side.place.purge(side.queue)
    return Drained(found, *(seconds / done * 1e6 for seconds in used))


def bench_drain(run: Run) -> None:
    content = run.message()
    place = run.place()
    kinds = [("no results", "")]
    if run.redis is not None:
        kinds.append(("redis results", run.redis.url))
    kinds.append(("rpc results", "rpc://"))
    for word, results in kinds:
        sides = [run.miniq(results), *run.celery(results)]
        sides += [] if results else run.dramatiq()
        found: Dict[str, List[Drained]] = {side.name: [] for side in sides}
        floors: Dict[str, List[float]] = {"through pipes": [], "batched": []}
        quiet = how_quiet()
        for _ in range(max(1, int(5 * run.scale))):
            n = max(2000, int(DRAINED["miniq"] * run.scale))
            if "redis" not in word:
                bare = rabbit_floors.drain_with_children(place, n, 2, content, rpc=bool(results))
                floors["through pipes"].append(bare)
            if not results:
                floors["batched"].append(rabbit_floors.drain_batched(place, n, 100, content))
            for side in sides:
                task = side.app.add if results else side.app.nothing
                n = max(1000, int(DRAINED[side.name] * run.scale))
                found[side.name].append(drained(run, side, task, n))
        for who, rounds in found.items():
            own = [drain.per_s for drain in rounds]
            middle_rate = note(f"drain, {word}", percentile(own, 0.5), who)
            measured = [(name, bare) for name, bare in floors.items() if bare]
            floor = ", ".join(f"{rate(percentile(bare, 0.5))} {name}" for name, bare in measured)
            told = [f"{ratio(own, bare):.0%}" for _, bare in measured] + [f"best {rate(max(own))}", quiet]
            show(f"{label(who)}: drain, 2 processes, {word}", rate(middle_rate), floor, "; ".join(told))
            cpu = [percentile(list(column), 0.5) for column in list(zip(*rounds))[1:]]
            print(f"    each task: CPU {cpu[0]:.0f} us worker (its start included), {cpu[1]:.0f} us server")
            for other, theirs in found.items():
                note(f"drain, {word} over {other}", ratio(own, [drain.per_s for drain in theirs]), who)


# -- others --------------------------------------------------------------------------------------


def bench_codec(run: Run) -> None:
    length, encode, decode = rabbit_floors.codec(run.place().wire, run.message())
    quiet = how_quiet()
    written, read = by_turns([encode, decode], max(5, int(40 * run.scale)), 500)
    parts = [1e6 / middle(written), 1e6 / middle(read)]
    best = 1e6 / max(written)[0] + 1e6 / max(read)[0]
    told = f"encode {parts[0]:.1f} us, decode {parts[1]:.1f} us; best {best:.1f} us; {quiet}"
    show(f"rabbit: codec, a task of {length} bytes", f"{sum(parts):.1f} us", "", told)


def bench_roundtrip(run: Run) -> None:
    content = run.message()
    for word, results in (("redis", run.redis.url if run.redis else ""), ("rpc", "rpc://")):
        if not results:
            print("rabbit: round trip: no redis-server is installed here, results in Redis are left out")
            continue
        place = run.place()
        sides = [run.miniq(results), *run.celery(results)]
        sides += run.dramatiq(results) if word == "redis" else []
        with ExitStack() as stack:
            bare = stack.enter_context(Asking(place, content, run.redis if word == "redis" else None))
            for side in sides:
                stack.enter_context(side.workers)
            asks = [bare.ask, *(side.app.ask for side in sides)]
            latencies_by_turns(asks, 5)
            time.sleep(1.0)
            quiet = how_quiet()
            floor, *found = latencies_by_turns(asks, max(50, int(500 * run.scale)))
        for side, times in zip(sides, found):
            note(f"p50, {word}", percentile(times, 0.5), side.name)
            best = f"best {min(times) * 1e3:.2f} ms"
            name = f"{label(side.name)}: round trip, {word} results"
            show(name, percentiles(times), percentiles(floor), f"{best}; {quiet}")


def bench_idle(run: Run) -> None:
    if not os.path.exists("/proc/self/stat"):
        print("rabbit: idle: this system does not tell CPU of processes through /proc")
        return
    seconds = max(3.0, 15.0 * run.scale)
    for side in [run.miniq(), *run.celery(), *run.dramatiq()]:
        side.app.send(side.app.nothing)
        clients = side.place.traffic()
        with side.workers:
            side.app.bulk(side.app.nothing, 100)
            side.place.drain(side.queue)
            time.sleep(2.0)
            quiet = how_quiet()
            pids = side.workers.pids()
            used, before = cpu_of(pids), side.place.traffic()
            time.sleep(seconds)
            share = (cpu_of(pids) - used) / seconds
            after = side.place.traffic()
        carried = sum(count - before.get(port, 0) for port, count in after.items() if port not in clients)
        note("idle CPU", share, side.name)
        traffic = f"{carried / seconds:,.0f} bytes/s on {len(after.keys() - clients.keys())} connections"
        show(f"{label(side.name)}: idle over {seconds:.0f} s", f"{share:.2%} CPU", "", f"{traffic}; {quiet}")


TARGETS = [
    Target(f"enqueue {CONFIRMED}: of the bare codec loop", f"enqueue {CONFIRMED} over floor {CONFIRMED}", 85,
           unit=" %", scale=100),
    Target(f"enqueue {CONFIRMED}: times Celery's without", f"enqueue {CONFIRMED} over Celery {UNCONFIRMED}",
           1),
    Target(f"enqueue {UNCONFIRMED}: times Celery's", f"enqueue {UNCONFIRMED} over Celery {UNCONFIRMED}", 4),
    Target(f"bulk of 1,000 {CONFIRMED}", f"bulk of 1,000 {CONFIRMED}", 8000, unit="/s"),
    Target("drain, no results: times Celery's", "drain, no results over Celery", 4),
    Target("drain, redis results: times Celery's", "drain, redis results over Celery", 4),
    Target("drain, rpc results: times Celery's", "drain, rpc results over Celery", 4),
    Target("drain, no results: times dramatiq's", "drain, no results over dramatiq", 1.5),
    Target("round trip, redis results, p50", "p50, redis", 3, at_most=True, unit=" ms", scale=1e3),
    Target("round trip, rpc results, p50", "p50, rpc", 3, at_most=True, unit=" ms", scale=1e3),
]  # fmt: skip

BENCHMARKS: Dict[str, Callable[[Run], None]] = {
    "rabbit_codec": bench_codec,
    "rabbit_enqueue": bench_enqueue,
    "rabbit_bulk": bench_bulk,
    "rabbit_drain": bench_drain,
    "rabbit_roundtrip": bench_roundtrip,
    "rabbit_idle": bench_idle,
}


def run(folder: str, names: List[str], options: argparse.Namespace) -> None:
    """Run those benchmarks on a server of our own."""
    FIGURES.clear()
    with ExitStack() as stack:
        server = rabbit_floors.started(folder)
        if server is None:
            return
        stack.callback(server.stop)
        redis = redis_floors.Server.started(folder)
        if redis is not None:
            stack.callback(redis.stop)
        version = server.eval("list_to_binary(rabbit_misc:version())")
        print(f"rabbit {version}, durable classic queues, on 127.0.0.1:{server.port}")
        this = Run(server, redis, options)
        for name in names:
            BENCHMARKS[name](this)
            this.clear()
        few = " (with so few rounds nothing to go by)" if options.quick else ""
        show_targets(f"rabbit: targets{few}", TARGETS)

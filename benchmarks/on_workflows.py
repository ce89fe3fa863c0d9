# SPDX-License-Identifier: MIT
"""Workflows on each store, beside Celery: a chord of 1,000 members and a chain of 200 steps.

Told of each: how long it takes to send, how long until its result is here, and what its store got for
it: messages, and bytes.  miniq and Celery take turns, each with a worker of two processes; a figure is
the median of the turns.  On a SQLite file miniq is alone.
"""

from __future__ import annotations

import argparse
import sqlite3
import time
from contextlib import ExitStack
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import ours
import rabbit_floors
import redis_floors
from measuring import FIGURES, Target, how_quiet, note, percentile, show, show_targets
from peering import CELERY, Workers, load, missing, program

#: Seconds until a workflow that does not end is given up.
TIMEOUT_S = 300.0
#: Members of the chord, steps of the chain.
SIZES = {"chord": 1000, "chain": 200}

CELERY_WORKFLOWS = (
    CELERY
    + """
from celery import chain, chord

@app.task
def total(values):
    return sum(values)

def chord_of(n):
    return chord(add.s(1, 1) for _ in range(n))(total.s())

def chain_of(n):
    return chain(add.s(1, 1), *[add.s(1) for _ in range(n - 1)])()
"""
)

#: Returns (messages, bytes) that the store got so far.
Counter = Callable[[], Tuple[int, int]]


class Side(NamedTuple):
    """Who does it: the app in this process, its workers, and what counts at the store."""

    name: str
    app: Any
    workers: Workers
    counted: Counter
    word: str = "messages"


class Taken(NamedTuple):
    """What one workflow took."""

    sent_s: float
    done_s: float
    messages: int
    bytes: int


def of_workflow(side: Side, kind: str, n: int) -> Taken:
    """Send one and wait for its result, which has to be right."""
    begin_messages, begin_bytes = side.counted()
    begin = time.perf_counter()
    result = (side.app.chord_of if kind == "chord" else side.app.chain_of)(n)
    sent_s = time.perf_counter() - begin
    value = result.get(timeout=TIMEOUT_S)
    done_s = time.perf_counter() - begin
    expected = 2 * n if kind == "chord" else n + 1
    if value != expected:
        raise RuntimeError(f"{side.name}: {kind} of {n} came to {value!r}, not {expected}")
    # The result is told before the last acknowledgement, and that before counters are brought up to date.
    time.sleep(0.3)
    messages, octets = side.counted()
    return Taken(sent_s, done_s, messages - begin_messages, octets - begin_bytes)


def compare(where: str, sides: List[Side], scale: float) -> None:
    """Let the sides take turns with each workflow; print and note what they took."""
    turns = max(1, int(5 * scale))
    with ExitStack() as stack:
        for side in sides:
            stack.enter_context(side.workers)
            side.app.add.delay(1, 1).get(timeout=60)
        for kind, n in SIZES.items():
            n = max(10, int(n * min(1.0, scale * 10)))
            quiet = how_quiet()
            found: Dict[str, List[Taken]] = {side.name: [] for side in sides}
            for _ in range(turns):
                for side in sides:
                    found[side.name].append(of_workflow(side, kind, n))
            for who, turns_of in found.items():
                taken = Taken(*(percentile(list(column), 0.5) for column in zip(*turns_of)))  # type: ignore[arg-type]
                note(f"{where}: {kind}", 1 / taken.done_s, who)
                note(f"{where}: bytes of a {kind}", taken.bytes, who)
                label = f"{where}: {kind} of {n}" if who == "miniq" else f"  {who}"
                told = f"sent after {taken.sent_s * 1e3:.0f} ms; {taken.messages:,.0f} {sides[0].word}"
                each = f"{taken.bytes / n:,.0f} bytes for each"
                show(label, f"{taken.done_s * 1e3:,.0f} ms", "", f"{told}, {each}; {quiet}")


# -- the stores ----------------------------------------------------------------------------------


def on_sqlite(folder: str) -> Side:
    """A new file; a trigger in it counts."""
    app = ours.fresh_app("workflows.db")
    app.add.delay(1, 1)
    file = sqlite3.connect(ours.path("workflows.db"), timeout=30.0, isolation_level=None)
    file.execute("CREATE TABLE counted(messages INTEGER, bytes INTEGER)")
    file.execute("INSERT INTO counted VALUES (0, 0)")
    file.execute(
        "CREATE TRIGGER count_messages AFTER INSERT ON messages BEGIN UPDATE counted SET"
        " messages = messages + 1, bytes = bytes + length(NEW.envelope) + length(NEW.body); END"
    )

    def counted() -> Tuple[int, int]:
        (row,) = file.execute("SELECT messages, bytes FROM counted")
        return row[0], row[1]

    return Side("miniq", app, _our_workers(), counted)


def _our_workers() -> Workers:
    return Workers(ours.FOLDER, [ours.command_line("-c", "2")], ours.environment())


def _celery(name: str, url: str, results: str, counted: Counter) -> Side:
    app, env = load(ours.FOLDER, name, CELERY_WORKFLOWS, url, results)
    command = program("celery", "-A", name, "worker", "-c", "2")
    return Side("Celery", app, Workers(ours.FOLDER, [command], env), counted)


def count_on_redis(server: redis_floors.Server) -> Counter:
    """What was pushed to lists (many messages in one push are one), and all bytes that came in."""

    def counted() -> Tuple[int, int]:
        stats = server.wire.call("INFO", "stats").decode()
        octets = next(line for line in stats.splitlines() if line.startswith("total_net_input_bytes:"))
        calls = server.commands()
        return calls.get("lpush", 0) + calls.get("rpush", 0), int(octets.partition(":")[2])

    return counted


def count_on_rabbit(server: Any, place: rabbit_floors.Place) -> Counter:
    """The server's count of what was published, and what this place's connections carried."""

    def counted() -> Tuple[int, int]:
        messages = server.eval(
            "lists:sum([maps:get(messages_received_total, Counters, 0) ||"
            " {Labels, Counters} <- maps:to_list(rabbit_global_counters:overview()),"
            " not lists:keymember(queue_type, 1, Labels)])"
        )
        return messages, sum(place.traffic().values())

    return counted


# -- a run ---------------------------------------------------------------------------------------


def bench_sqlite(folder: str, options: argparse.Namespace) -> None:
    compare("sqlite", [on_sqlite(folder)], options.scale)


def bench_redis(folder: str, options: argparse.Namespace) -> None:
    celery = _has_celery(options)
    server = redis_floors.Server.started(folder)
    others = redis_floors.Server.started(folder) if celery else None
    if server is None:
        print("redis: no redis-server is installed here, its workflows are left out")
        return
    try:
        sides = [Side("miniq", ours.app_on(server.url), _our_workers(), count_on_redis(server), "pushes")]
        if others is not None:
            sides.append(_celery("redis_workflows", others.url, others.url, count_on_redis(others)))
        compare("redis", sides, options.scale)
    finally:
        for one in filter(None, (server, others)):
            one.stop()


def bench_rabbit(folder: str, options: argparse.Namespace) -> None:
    celery = _has_celery(options)
    server = rabbit_floors.started(folder)
    redis = redis_floors.Server.started(folder)
    if server is None or redis is None:
        print("rabbit: its workflows need rabbitmq-server and redis-server, they are left out")
        return
    places = [rabbit_floors.Place(server) for _ in range(3)]
    try:
        counters = [count_on_rabbit(server, place) for place in places]
        sides = [Side("miniq", ours.app_on(places[0].url, redis.url), _our_workers(), counters[0])]
        if celery:
            results = redis.url.replace("/0", "/1")
            sides.append(_celery("rabbit_workflows", places[1].url, results, counters[1]))
        compare("rabbit, results in redis", sides, options.scale)
        # Celery has no chords over rpc.
        compare(
            "rabbit, results over rpc",
            [Side("miniq", ours.app_on(places[2].url, "rpc://"), _our_workers(), counters[2])],
            options.scale,
        )
    finally:
        for place in places:
            place.close()
        server.stop()
        redis.stop()


def _has_celery(options: argparse.Namespace) -> bool:
    if options.peers and missing("celery"):
        print("Celery: not installed, left out (python -m tox -e bench installs it)")
        return False
    return bool(options.peers)


TARGETS = [
    Target(f"{where}: a {kind}, times as fast as Celery's", f"{where}: {kind}", 1,
           base=lambda what=f"{where}: {kind}": FIGURES.get(("Celery", what)))
    for where in ("redis", "rabbit, results in redis")
    for kind in SIZES
]  # fmt: skip

BENCHMARKS: "Dict[str, Callable[[str, argparse.Namespace], None]]" = {
    "sqlite_workflows": bench_sqlite,
    "redis_workflows": bench_redis,
    "rabbit_workflows": bench_rabbit,
}


def run(folder: str, names: List[str], options: argparse.Namespace) -> None:
    """Run those benchmarks."""
    FIGURES.clear()
    for name in names:
        BENCHMARKS[name](folder, options)
    few = " (with so few rounds nothing to go by)" if options.quick else ""
    show_targets(f"workflows: targets{few}", TARGETS)

# SPDX-License-Identifier: MIT
"""miniq on a Redis server, beside bare socket loops on the same server."""

from __future__ import annotations

import argparse
import os
import time
from typing import Any, Callable, Dict, List

import redis_floors
from measuring import (
    FIGURES,
    Target,
    by_turns,
    cpu_of,
    family,
    how_quiet,
    middle,
    note,
    of_celery,
    of_fastest_peer,
    percentile,
    percentiles,
    rate,
    rate_of_drain,
    show,
    show_targets,
)
from ours import app_on, worker


def on_redis(server: redis_floors.Server) -> Any:
    """Return the benchmark app on an empty server."""
    server.clear()
    return app_on(server.url)


def length_of_message(server: redis_floors.Server) -> int:
    """How long the message is that miniq puts into the list; the floors take equally long ones."""
    tasks = on_redis(server)
    tasks.nothing.delay(2, 3)
    (message,) = server.wire.call("LRANGE", redis_floors.QUEUE, 0, -1)
    server.clear()
    return len(message)


def bench_enqueue(server: redis_floors.Server, scale: float) -> None:
    length, turns = length_of_message(server), max(5, int(40 * scale))
    quiet = how_quiet()
    tasks = on_redis(server)
    for _ in range(100):
        tasks.nothing.delay(2, 3)
    wire = redis_floors.Wire(server.port)
    floor, writing = redis_floors.pusher(wire, length), redis_floors.writing_pusher(wire, length)
    ours, bare, written = by_turns([lambda: tasks.nothing.delay(2, 3), floor, writing], turns)
    wire.close()
    note("enqueue", middle(ours))
    share = note("enqueue over floor", percentile([a[0] / b[0] for a, b in zip(ours, bare)], 0.5))
    with_json = f"{middle(ours) / middle(written):.0%} of {rate(middle(written))} with its JSON"
    name = f"redis: enqueue, {length} bytes"
    show(name, rate(middle(ours)), rate(middle(bare)), f"{share:.0%}; {with_json}; {quiet}")
    cpu = ", ".join(f"{min(used for _, used in pairs) * 1e6:.0f} us" for pairs in (ours, bare, written))
    print(f"    CPU of the client: {cpu} (ours, floor, floor with JSON); best {rate(max(ours)[0])}")
    server.clear()


def bench_bulk(server: redis_floors.Server, scale: float) -> None:
    length, rounds = length_of_message(server), max(3, int(20 * scale))
    quiet = how_quiet()
    floor = redis_floors.bulk(server, rounds, length)
    tasks = on_redis(server)
    tasks.bulk(tasks.nothing, 1000)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        tasks.bulk(tasks.nothing, 1000)
        times.append(time.perf_counter() - start)
    ours = note("bulk", 1000 / min(times))
    show(
        "redis: bulk enqueue of 1,000", rate(ours), rate(floor) + " pipelined",
        f"{ours / floor:.0%}; median {1000 / percentile(times, 0.5):,.0f}/s; {quiet}",
    )  # fmt: skip


def bench_drain(server: redis_floors.Server, scale: float) -> None:
    n, length = max(2000, int(30000 * scale)), length_of_message(server)
    for results in (False, True):
        word = "results" if results else "no results"
        quiet = how_quiet()
        batched = redis_floors.drain_batched(server, n, 100, results, length)
        piped = redis_floors.drain_with_children(server, n, 2, results, length)
        tasks = on_redis(server)
        tasks.bulk(tasks.add if results else tasks.nothing, n)
        before, used = server.commands(), cpu_of([server.pid])
        with worker("-c", "2", wait=False) as process:
            ours = note(f"drain, {word}", rate_of_drain(server.left, n))
            share = n - server.left()
            of_server = (cpu_of([server.pid]) - used) / share
            of_worker = cpu_of(family(process.pid)) / share
            calls = redis_floors.commands_between(before, server.commands())
        show(
            f"redis: drain, prefork 2, {word}", rate(ours), rate(batched) + " batched",
            f"{ours / batched:.0%}; {ours / piped:.0%} of {rate(piped)} through pipes; {quiet}",
        )  # fmt: skip
        cpu = f"CPU {of_worker * 1e6:.0f} us worker (its start included), {of_server * 1e6:.0f} us server"
        print(f"    each task: {cpu}; commands {told(calls, share)}")
    server.clear()


def told(calls: Dict[str, int], over: float) -> str:
    """Say how often the most frequent commands were called per unit of `over`."""
    most = list(calls.items())[:6]
    words = [f"{name} {count / over:.2f}" for name, count in most]
    return f"{sum(calls.values()) / over:.2f} ({', '.join(words)})"


def bench_roundtrip(server: redis_floors.Server, scale: float) -> None:
    n, length = max(50, int(500 * scale)), length_of_message(server)
    quiet = how_quiet()
    floor = redis_floors.roundtrip(server, n, length)
    tasks = on_redis(server)
    times = []
    with worker("-c", "2"):
        for i in range(n):
            time.sleep(0.002)
            begin = time.perf_counter()
            tasks.add.delay(1, i).get(timeout=10)
            times.append(time.perf_counter() - begin)
    note("p50", percentile(times, 0.5))
    show("redis: round trip, idle worker", percentiles(times), percentiles(floor), quiet)
    server.clear()


def bench_idle(server: redis_floors.Server, scale: float) -> None:
    if not os.path.exists("/proc/self/stat"):
        print("redis: idle: this system does not tell CPU of processes through /proc")
        return
    seconds = max(3.0, 15.0 * scale)
    tasks = on_redis(server)
    with worker("-c", "2") as process:
        for i in range(100):
            tasks.add.delay(1, i).get(timeout=10)
        time.sleep(1.0)
        quiet = how_quiet()
        pids = family(process.pid)
        used, before = cpu_of(pids), server.commands()
        time.sleep(seconds)
        calls = redis_floors.commands_between(before, server.commands())
        share = note("idle CPU", (cpu_of(pids) - used) / seconds)
    note("idle commands", sum(calls.values()) / seconds)
    commands = f"commands/s: {told(calls, seconds)}"
    show(f"redis: idle over {seconds:.0f} s", f"{share:.2%} CPU", "", f"{commands}; {quiet}")
    server.clear()


TARGETS = [
    Target("enqueue, of the bare socket loop", "enqueue over floor", 60, unit=" %", scale=100),
    Target("enqueue, times Celery's", "enqueue", 8, base=lambda: of_celery("enqueue")),
    Target("bulk enqueue of 1,000", "bulk", 25_000, unit="/s"),
    *(
        target
        for what in ("drain, no results", "drain, results")
        for target in (
            Target(f"{what}: times Celery's", what, 6, base=lambda what=what: of_celery(what)),
            Target(f"{what}: times the fastest other", what, 2, base=lambda what=what: of_fastest_peer(what)),
        )
    ),
    Target("round trip on an idle worker, p50", "p50", 2, at_most=True, unit=" ms", scale=1e3),
    Target("idle worker, CPU", "idle CPU", 0.5, at_most=True, unit=" %", scale=100),
    Target("idle worker, commands per second", "idle commands", 5, at_most=True, unit="/s"),
]  # fmt: skip

BENCHMARKS: Dict[str, Callable[[redis_floors.Server, float], None]] = {
    "redis_enqueue": bench_enqueue,
    "redis_bulk": bench_bulk,
    "redis_drain": bench_drain,
    "redis_roundtrip": bench_roundtrip,
    "redis_idle": bench_idle,
}


def run(folder: str, names: List[str], options: argparse.Namespace) -> None:
    """Run those benchmarks on a server of our own, and the others' beside them."""
    server = redis_floors.Server.started(folder)
    if server is None:
        print("redis: no redis-server is installed here, its benchmarks are left out")
        return
    FIGURES.clear()
    try:
        print(f"redis {server.version} without persistence, on 127.0.0.1:{server.port}")
        for name in names:
            BENCHMARKS[name](server, options.scale)
        if options.peers:
            import redis_peers

            parts = tuple(part for part in redis_peers.PARTS if f"redis_{part}" in names)
            redis_peers.run(server, folder, options.scale, parts)
        few = " (with so few rounds nothing to go by)" if options.quick else ""
        show_targets(f"redis: targets{few}", TARGETS)
    finally:
        server.stop()

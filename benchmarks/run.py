# SPDX-License-Identifier: MIT
"""Benchmarks of miniq on a SQLite file and on a Redis server, each beside its floor.  See README.rst."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [HERE, ROOT]

import floors  # noqa: E402
import redis_floors  # noqa: E402
from measuring import (  # noqa: E402
    FIGURES,
    Target,
    by_turns,
    cpu_of,
    family,
    how_quiet,
    percentile,
    percentiles,
    pss_kib,
    rate,
    rate_of_drain,
    show,
    show_targets,
)

FOLDER = ""


def path(name: str) -> str:
    return os.path.join(FOLDER, name)


def fresh_app(name: str, options: str = "") -> Any:
    """Return the benchmark app on a new file, in this process."""
    return app_on(f"sqlite:///{path(name)}", options)


def app_on(url: str, options: str = "") -> Any:
    """Return the benchmark app with `url` for broker and results, in this process."""
    os.environ["BENCH_BROKER"] = url
    os.environ["BENCH_OPTIONS"] = options
    sys.modules.pop("tasks", None)
    import tasks

    return tasks


@contextmanager
def worker(*args: str, wait: bool = True) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a worker process of the benchmark app."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([HERE, ROOT]))
    process = subprocess.Popen(
        [sys.executable, "-m", "miniq", "-q", "-A", "tasks", "worker", *args],
        env=env, cwd=FOLDER, stderr=subprocess.DEVNULL if "-l" not in args else None,
    )  # fmt: skip
    try:
        if wait:
            import tasks

            tasks.add.delay(1, 1).get(timeout=30)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# -- the benchmarks ------------------------------------------------------------------------------


def bench_enqueue(scale: float, options: argparse.Namespace) -> None:
    for level, n in (("FULL", 5000), ("NORMAL", 20000)):
        n = max(200, int(n * scale))
        best_floor = max(floors.enqueue(path(f"floor-{level}-{i}.db"), n, level) for i in range(2))
        ours = 0.0
        for attempt in range(2):
            tasks = fresh_app(f"enqueue-{level}-{attempt}.db", f"synchronous={level}")
            for _ in range(100):
                tasks.nothing.delay(2, 3)
            start = time.perf_counter()
            for _ in range(n):
                tasks.nothing.delay(2, 3)
            ours = max(ours, n / (time.perf_counter() - start))
        show(
            f"enqueue, synchronous={level}",
            rate(ours),
            rate(best_floor),
            f"{ours / best_floor:.0%} of the floor",
        )


def preload(tasks: Any, task: Any, n: int) -> None:
    """Put `n` messages of one task into the queue quickly, through the transport itself."""
    producer = tasks.app.producer
    transport = producer.transport
    transport.declare(tasks.app.router.queues["celery"])
    for begin in range(0, n, 1000):
        transport.publish(
            [
                producer.prepare(
                    task.name, (2, 3), {}, {"ignore_result": task.ignore_result}, task
                ).publication
                for _ in range(begin, min(n, begin + 1000))
            ],
            60.0,
        )


def drained(tasks: Any, n: int, worker_args: List[str]) -> float:
    """Time from half drained to empty... measured between two observed depths; return tasks per second."""
    transport = tasks.app.producer.transport

    def left() -> int:
        return sum(s.ready + s.waiting for s in transport.sizes() if s.queue == "celery")

    with worker(*worker_args, wait=False):
        total = left()
        while left() > total * 0.9:
            time.sleep(0.005)
        begin, at = left(), time.perf_counter()
        stop_at = begin - int(n * 0.8)
        while True:
            now_left = left()
            if now_left <= max(0, stop_at):
                return (begin - now_left) / (time.perf_counter() - at)
            time.sleep(0.02)


def bench_drain(scale: float, options: argparse.Namespace) -> None:
    n = max(2000, int(30000 * scale))
    for results in (False, True):
        word = "results" if results else "no results"
        batched = floors.drain_batched(path(f"floor-batch-{results}.db"), n, 100, results)
        piped = floors.drain_with_children(path(f"floor-pipe-{results}.db"), n, 2, results)
        for name, args in (("prefork 2", ["-c", "2"]), ("threads 8", ["-P", "threads", "-c", "8"])):
            tasks = fresh_app(f"drain-{name[:2]}-{results}.db")
            preload(tasks, tasks.add if results else tasks.nothing, n)
            ours = drained(tasks, n, args)
            show(
                f"drain, {name}, {word}", rate(ours), rate(batched) + " batched",
                f"{ours / batched:.0%}; {ours / piped:.0%} of {rate(piped)} through pipes",
            )  # fmt: skip


def bench_roundtrip(scale: float, options: argparse.Namespace) -> None:
    n = max(50, int(500 * scale))
    floor = floors.roundtrip(path("floor-rtt.db"), n)
    tasks = fresh_app("rtt.db")
    times = []
    with worker("-c", "2"):
        for i in range(n):
            time.sleep(0.002)
            begin = time.perf_counter()
            tasks.add.delay(1, i).get(timeout=10)
            times.append(time.perf_counter() - begin)
    show("round trip, idle worker", percentiles(times), percentiles(floor))


def lines_of(name: str) -> List[float]:
    """Return the numbers in a file, sorted; none while there is no file."""
    if not os.path.exists(name):
        return []
    with open(name) as file:
        return sorted(float(line) for line in file)


def bench_idle(scale: float, options: argparse.Namespace) -> None:
    if not os.path.exists("/proc/self/smaps_rollup"):
        print("idle: this system does not tell CPU and memory of processes through /proc")
        return
    seconds = max(5.0, 30.0 * scale)
    tasks = fresh_app("idle.db")
    with worker("-c", "2") as process:
        for i in range(100):
            tasks.add.delay(1, i).get(timeout=10)
        time.sleep(1.0)
        pids = family(process.pid)
        before = cpu_of(pids)
        time.sleep(seconds)
        used = cpu_of(pids) - before
        memory = sum(pss_kib(pid) for pid in pids)
        bare = subprocess.Popen([sys.executable, "-c", "import sqlite3, time; time.sleep(30)"])
        time.sleep(0.5)
        bare_memory = pss_kib(bare.pid)
        bare.kill()
        bare.wait()
    show(f"idle CPU over {seconds:.0f} s", f"{used / seconds:.2%}")
    show(
        "memory of the worker, 2 children (PSS)",
        f"{memory / 1024:.1f} MB",
        f"{bare_memory / 1024:.1f} MB bare Python",
    )


def bench_start(scale: float, options: argparse.Namespace) -> None:
    times = []
    for attempt in range(5):
        tasks = fresh_app(f"start-{attempt}.db")
        result = tasks.add.delay(1, 2)
        begin = time.perf_counter()
        with worker("-c", "2", wait=False):
            result.get(timeout=30, interval=0.005)
            times.append(time.perf_counter() - begin)
    bare = sorted(floors.start_of_python() for _ in range(5))[2]
    show("start of the worker to its first result", f"{sorted(times)[2]:.3f} s", f"{bare:.3f} s bare Python")


def bench_import(scale: float, options: argparse.Namespace) -> None:
    code = "import time; t = time.perf_counter(); import miniq; print(time.perf_counter() - t)"
    env = dict(os.environ, PYTHONPATH=ROOT, PYTHONPYCACHEPREFIX=path("pyc"))
    subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    times = sorted(
        float(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
        for _ in range(9)
    )
    show("import miniq", f"{times[4] * 1e3:.1f} ms")


def bench_calls(scale: float, options: argparse.Namespace) -> None:
    tasks = fresh_app("calls.db")
    for _ in range(10):
        tasks.add.delay(2, 3)
    count = 0

    def profiler(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profiler)
    tasks.add.delay(2, 3)
    sys.setprofile(None)
    show("Python calls in one delay()", str(count))


def bench_backlog(scale: float, options: argparse.Namespace) -> None:
    n = max(2000, int(20000 * scale))
    first: Optional[float] = None
    for waiting in (1000, 50_000, 1_000_000) if options.million else (1000, 50_000):
        tasks = fresh_app(f"backlog-{waiting}.db", "synchronous=OFF")
        total = max(waiting, n if waiting == 1000 else waiting)
        preload(tasks, tasks.nothing, total)
        os.environ["BENCH_OPTIONS"] = ""
        ours = drained(tasks, min(n, total), ["-c", "2"])
        first = first or ours
        show(
            f"drain, prefork 2, {max(waiting, total):,} waiting",
            rate(ours),
            "",
            f"{ours / first:.0%} of the first",
        )


def bench_eta(scale: float, options: argparse.Namespace) -> None:
    n = max(100, int(500 * scale))
    tasks = fresh_app("eta.db")
    out = path("late.txt")
    with worker("-c", "2"):
        for i in range(n):
            due = time.time() + 1.0 + 3.0 * i / n
            tasks.stamp.apply_async((out, due), countdown=due - time.time())
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            time.sleep(0.2)
            late = lines_of(out)
            if len(late) >= n:
                break
    ok = sum(1 for one in late if 0 <= one <= 0.1) / n
    show(
        f"ETA, {n} tasks", percentiles(late), "", f"earliest {late[0] * 1e3:+.2f} ms; {ok:.1%} within 100 ms"
    )


# -- Redis ---------------------------------------------------------------------------------------


def on_redis(server: "redis_floors.Server") -> Any:
    """Return the benchmark app on an empty server."""
    server.clear()
    return app_on(server.url)


def length_of_message(server: "redis_floors.Server") -> int:
    """How long the message is that miniq puts into the list; the floors take equally long ones."""
    tasks = on_redis(server)
    tasks.nothing.delay(2, 3)
    (message,) = server.wire.call("LRANGE", redis_floors.QUEUE, 0, -1)
    server.clear()
    return len(message)


def note(what: str, value: float) -> float:
    FIGURES["miniq", what] = value
    return value


def middle(pairs: List[Tuple[float, float]]) -> float:
    """The median rate of what `by_turns` found."""
    return percentile([rate for rate, _ in pairs], 0.5)


def bench_redis_enqueue(server: "redis_floors.Server", scale: float) -> None:
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


def bench_redis_bulk(server: "redis_floors.Server", scale: float) -> None:
    length, rounds = length_of_message(server), max(3, int(20 * scale))
    quiet = how_quiet()
    floor = redis_floors.bulk(server, rounds, length)
    tasks = on_redis(server)
    preload(tasks, tasks.nothing, 1000)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        preload(tasks, tasks.nothing, 1000)
        times.append(time.perf_counter() - start)
    ours = note("bulk", 1000 / min(times))
    show(
        "redis: bulk enqueue of 1,000", rate(ours), rate(floor) + " pipelined",
        f"{ours / floor:.0%}; median {1000 / percentile(times, 0.5):,.0f}/s; {quiet}",
    )  # fmt: skip


def bench_redis_drain(server: "redis_floors.Server", scale: float) -> None:
    n, length = max(2000, int(30000 * scale)), length_of_message(server)
    for results in (False, True):
        word = "results" if results else "no results"
        quiet = how_quiet()
        batched = redis_floors.drain_batched(server, n, 100, results, length)
        piped = redis_floors.drain_with_children(server, n, 2, results, length)
        tasks = on_redis(server)
        preload(tasks, tasks.add if results else tasks.nothing, n)
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


def bench_redis_roundtrip(server: "redis_floors.Server", scale: float) -> None:
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


def bench_redis_idle(server: "redis_floors.Server", scale: float) -> None:
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


def of_fastest_peer(what: str) -> Optional[float]:
    found = [value for (name, figure), value in FIGURES.items() if name != "miniq" and figure == what]
    return max(found) if found else None


def of_celery(what: str) -> Optional[float]:
    return FIGURES.get(("Celery", what))


REDIS_TARGETS = [
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


def run_redis(names: List[str], options: argparse.Namespace) -> None:
    """Run those benchmarks on a server of our own, and the others' beside them."""
    server = redis_floors.Server.started(FOLDER)
    if server is None:
        print("redis: no redis-server is installed here, its benchmarks are left out")
        return
    try:
        print(f"redis {server.version} without persistence, on 127.0.0.1:{server.port}")
        for name in names:
            REDIS_BENCHMARKS[name](server, options.scale)
        if options.peers:
            import redis_peers

            parts = tuple(part for part in redis_peers.PARTS if f"redis_{part}" in names)
            redis_peers.run(server, FOLDER, options.scale, parts)
        few = " (with so few rounds nothing to go by)" if options.quick else ""
        show_targets(f"redis: targets{few}", REDIS_TARGETS)
    finally:
        server.stop()


REDIS_BENCHMARKS: Dict[str, Callable[["redis_floors.Server", float], None]] = {
    "redis_enqueue": bench_redis_enqueue,
    "redis_bulk": bench_redis_bulk,
    "redis_drain": bench_redis_drain,
    "redis_roundtrip": bench_redis_roundtrip,
    "redis_idle": bench_redis_idle,
}
SQLITE_BENCHMARKS: Dict[str, Callable[[float, argparse.Namespace], None]] = {
    "enqueue": bench_enqueue,
    "drain": bench_drain,
    "roundtrip": bench_roundtrip,
    "idle": bench_idle,
    "start": bench_start,
    "import": bench_import,
    "calls": bench_calls,
    "backlog": bench_backlog,
    "eta": bench_eta,
}
#: Words that stand for several.
GROUPS = {"sqlite": list(SQLITE_BENCHMARKS), "redis": list(REDIS_BENCHMARKS)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    known = [*GROUPS, *SQLITE_BENCHMARKS, *REDIS_BENCHMARKS]
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(known)} (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="fewer (0.1) or more (2) rounds")
    parser.add_argument("--quick", action="store_true", help="the fewest rounds: does it all still run?")
    parser.add_argument("--million", action="store_true", help="backlog: also with a million messages")
    parser.add_argument("--peers", action="store_true", help="others beside it, where importable")
    options = parser.parse_args()
    if options.quick:
        options.scale = 0.02
    global FOLDER
    # What is installed has its byte code beside it; so shall what is measured.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    names: List[str] = []
    for name in options.names or GROUPS:
        if name not in known:
            parser.error(f"unknown benchmark {name!r}; known: {', '.join(known)}")
        names += GROUPS.get(name, [name])
    on_sqlite = [name for name in names if name in SQLITE_BENCHMARKS]
    FOLDER = tempfile.mkdtemp(prefix="miniq-bench-")
    try:
        for name in on_sqlite:
            SQLITE_BENCHMARKS[name](options.scale, options)
        if options.peers and on_sqlite:
            import peers

            peers.run(FOLDER, options.scale)
        if len(on_sqlite) < len(names):
            run_redis([name for name in names if name in REDIS_BENCHMARKS], options)
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: MIT
"""miniq on a SQLite file, beside bare loops over sqlite3 and pipes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from typing import Any, Callable, Dict, List, Optional

import floors
from measuring import cpu_of, family, percentiles, pss_kib, rate, show
from ours import ROOT, fresh_app, path, worker


def bench_enqueue(scale: float, options: argparse.Namespace) -> None:
    for level, n in (("FULL", 5000), ("NORMAL", 20000)):
        n = max(200, int(n * scale))
        best_floor = max(floors.enqueue(path(f"floor-{level}-{i}.db"), n, level) for i in range(2))
        ours = 0.0
        for attempt in range(2):
            tasks = fresh_app(f"enqueue-{level}-{attempt}.db", synchronous=level)
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
            tasks.bulk(tasks.add if results else tasks.nothing, n)
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
    code = "import time; t = time.perf_counter(); from miniq import MiniQ; print(time.perf_counter() - t)"
    env = dict(os.environ, PYTHONPATH=ROOT, PYTHONPYCACHEPREFIX=path("pyc"))
    subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    times = sorted(
        float(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
        for _ in range(9)
    )
    show("from miniq import MiniQ", f"{times[4] * 1e3:.1f} ms")


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
        tasks = fresh_app(f"backlog-{waiting}.db", synchronous="OFF")
        total = max(waiting, n if waiting == 1000 else waiting)
        tasks.bulk(tasks.nothing, total)
        os.environ["BENCH_OPTIONS"] = "{}"
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


BENCHMARKS: Dict[str, Callable[[float, argparse.Namespace], None]] = {
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


def run(folder: str, names: List[str], options: argparse.Namespace) -> None:
    """Run those benchmarks, and the others' beside them."""
    for name in names:
        BENCHMARKS[name](options.scale, options)
    if options.peers:
        import peers

        peers.run(folder, options.scale)

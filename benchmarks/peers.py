# SPDX-License-Identifier: MIT
"""The same work done by huey (its SQLite storage) and Celery (SQLAlchemy transport), where installed.

huey pops a task from its table and keeps no record of it while it runs; Celery's SQLAlchemy
transport is its only broker that needs no server and runs on one file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any, Callable, List

from measuring import rate_of_drain, show

HUEY_APP = """
import os
from huey import SqliteHuey
fsync = os.environ["HUEY_FSYNC"] == "1"
huey = SqliteHuey("bench", filename=os.environ["HUEY_FILE"], results=True, fsync=fsync)

@huey.task()
def add(x, y):
    return x + y

@huey.task()
def nothing(x, y):
    return None
"""
CELERY_APP = """
import os
from celery import Celery
app = Celery("bench", broker="sqla+sqlite:///" + os.environ["CELERY_FILE"],
             backend="db+sqlite:///" + os.environ["CELERY_FILE"] + "-results")
app.conf.worker_prefetch_multiplier = 4

@app.task
def add(x, y):
    return x + y

@app.task(ignore_result=True)
def nothing(x, y):
    return None
"""


def run(folder: str, scale: float) -> None:
    sys.path.insert(0, folder)
    for name, source, bench in (("huey", HUEY_APP, _huey), ("celery", CELERY_APP, _celery)):
        try:
            __import__(name)
        except ImportError:
            print(f"{name}: not installed, left out (python -m tox -e bench installs it)")
            continue
        with open(os.path.join(folder, f"peer_{name}.py"), "w") as file:
            file.write(source)
        bench(folder, scale)


def _consumer(args: List[str], folder: str) -> "subprocess.Popen[bytes]":
    env = dict(os.environ, PYTHONPATH=folder)
    return subprocess.Popen(args, env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _huey(folder: str, scale: float) -> None:
    n = max(1000, int(6000 * scale))
    for fsync in ("1", "0"):
        word = "fsync" if fsync == "1" else "no fsync"
        os.environ["HUEY_FSYNC"] = fsync
        for task in ("nothing", "add"):
            os.environ["HUEY_FILE"] = os.path.join(folder, f"huey-{fsync}-{task}.db")
            sys.modules.pop("peer_huey", None)
            import peer_huey  # type: ignore[import-not-found]

            send = getattr(peer_huey, task)
            start = time.perf_counter()
            for _ in range(n):
                send(2, 3)
            if task == "nothing":
                show(f"huey: enqueue, {word}", f"{n / (time.perf_counter() - start):,.0f}/s")
            consumer = os.path.join(os.path.dirname(sys.executable), "huey_consumer")
            process = _consumer(
                [sys.executable, consumer, "peer_huey.huey", "-w", "2", "-k", "process", "-q"], folder
            )
            try:
                results = "no results" if task == "nothing" else "results"
                rate = rate_of_drain(peer_huey.huey.storage.queue_size, n)
                show(f"huey: drain, 2 processes, {word}, {results}", f"{rate:,.0f}/s")
            finally:
                _stop(process)


def _celery(folder: str, scale: float) -> None:
    n = max(300, int(1500 * scale))
    os.environ["CELERY_FILE"] = os.path.join(folder, "celery.db")
    import peer_celery  # type: ignore[import-not-found]

    peer_celery.nothing.delay(2, 3)
    start = time.perf_counter()
    for _ in range(n):
        peer_celery.nothing.delay(2, 3)
    show("celery: enqueue, SQLAlchemy on SQLite", f"{n / (time.perf_counter() - start):,.0f}/s")
    left = _celery_left(os.environ["CELERY_FILE"])
    process = _consumer([sys.executable, "-m", "celery", "-A", "peer_celery", "worker", "-c", "2"], folder)
    try:
        show("celery: drain, prefork 2, no results", f"{rate_of_drain(left, n):,.0f}/s")
    finally:
        _stop(process)


def _celery_left(path: str) -> Callable[[], int]:
    import sqlite3

    db: Any = sqlite3.connect(path, timeout=30)
    return lambda: db.execute("SELECT count(*) FROM kombu_message WHERE visible = 1").fetchone()[0]

# SPDX-License-Identifier: MIT
"""The same work done by Celery, RQ, huey and dramatiq on the same Redis server, where installed.

Each runs as its documentation shows it, two processes wide; `ask` waits for a result in its own way.
Not all of them promise the same: huey keeps no record of a task while it runs, dramatiq and RQ do.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from typing import Any, Callable, List, NamedTuple, Tuple

from measuring import (
    FIGURES,
    by_turns,
    cpu_of,
    family,
    how_quiet,
    percentile,
    percentiles,
    rate,
    rate_of_drain,
    show,
)
from redis_floors import Server, commands_between

CELERY = """
import os
from celery import Celery, group
app = Celery("peer", broker=os.environ["PEER_URL"], backend=os.environ["PEER_URL"])

@app.task
def add(x, y):
    return x + y

@app.task(ignore_result=True)
def nothing(x, y):
    return None

def send(task):
    task.delay(2, 3)

def bulk(task, n):
    group(task.s(2, 3) for _ in range(n)).apply_async()

def ask():
    return add.delay(2, 3).get(timeout=30)
"""
RQ = """
import os
from redis import Redis
from rq import Queue
queue = Queue("peer", connection=Redis.from_url(os.environ["PEER_URL"]))

def add(x, y):
    return x + y

def nothing(x, y):
    return None

def ttl(task):
    return 0 if task is nothing else 500

def send(task):
    queue.enqueue(task, args=(2, 3), result_ttl=ttl(task))

def bulk(task, n):
    queue.enqueue_many([Queue.prepare_data(task, (2, 3), result_ttl=ttl(task)) for _ in range(n)])

def ask():
    return queue.enqueue(add, args=(2, 3), result_ttl=500).latest_result(timeout=30).return_value
"""
HUEY = """
import os
from huey import RedisHuey
# Told of results only where they are waited for: that is not the default, and costs two commands.
huey = RedisHuey("peer", url=os.environ["PEER_URL"], notify_result=os.environ["PEER_WAITS"] == "1")

@huey.task()
def add(x, y):
    return x + y

@huey.task()
def nothing(x, y):
    return None

def send(task):
    task(2, 3)

def bulk(task, n):
    for _ in range(n):
        task(2, 3)

def ask():
    return add(2, 3).get(blocking=True, timeout=30)
"""
DRAMATIQ = """
import os
import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
broker = RedisBroker(url=os.environ["PEER_URL"])
broker.add_middleware(Results(backend=RedisBackend(url=os.environ["PEER_URL"])))
dramatiq.set_broker(broker)

@dramatiq.actor(store_results=True)
def add(x, y):
    return x + y

@dramatiq.actor
def nothing(x, y):
    return None

def send(task):
    task.send(2, 3)

def bulk(task, n):
    dramatiq.group([task.message(2, 3) for _ in range(n)]).run()

def ask():
    return add.send(2, 3).get_result(block=True, timeout=30000)
"""


class Peer(NamedTuple):
    """One other queue: `key` is the list that waits, `consumers` the programs that drain it."""

    name: str
    package: str
    source: str
    key: str
    consumers: List[List[str]]
    n: int  #: how many to drain
    client: bool = True  #: False: the same client as above, under other workers


def _program(name: str, *args: str) -> List[str]:
    return [os.path.join(os.path.dirname(sys.executable), name), *args]


def _rq(worker_class: str) -> List[List[str]]:
    return 2 * [_program("rq", "worker", "-q", "-u", "PEER_URL", "-P", ".", "-w", worker_class, "peer")]


PEERS = (
    Peer("Celery", "celery", CELERY, "celery", [_program("celery", "-A", "APP", "worker", "-c", "2")], 4000),
    Peer("RQ", "rq", RQ, "rq:queue:peer", _rq("rq.Worker"), 300),
    Peer("RQ, SimpleWorker", "rq", RQ, "rq:queue:peer", _rq("rq.SimpleWorker"), 2000, False),
    Peer(
        "huey", "huey", HUEY, "huey.redis.peer",
        [_program("huey_consumer", "APP.huey", "-k", "process", "-w", "2", "-q")], 10000,
    ),
    Peer(
        "dramatiq", "dramatiq", DRAMATIQ, "dramatiq:default",
        [_program("dramatiq", "APP", "--processes", "2", "--threads", "1")], 6000,
    ),
)  # fmt: skip
PARTS = ("enqueue", "bulk", "drain", "roundtrip", "idle")


def run(server: Server, folder: str, scale: float, parts: Tuple[str, ...] = PARTS) -> None:
    """Measure those `parts` of every peer that can be imported."""
    sys.path.insert(0, folder)
    os.environ["PEER_URL"] = server.url
    missing = set()
    for peer in PEERS:
        if importlib.util.find_spec(peer.package) is None:
            if peer.package not in missing:
                print(f"{peer.name}: not installed, left out (python -m tox -e bench installs it)")
            missing.add(peer.package)
            continue
        for part in parts:
            _MEASURES[part](server, folder, scale, peer)


def _app(folder: str, peer: Peer, waits: bool = False) -> Tuple[str, Any]:
    """Return name and module of the peer's app, freshly imported."""
    os.environ["PEER_WAITS"] = "1" if waits else "0"
    name = f"redis_peer_{peer.package}"
    with open(os.path.join(folder, f"{name}.py"), "w") as file:
        file.write(peer.source)
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    return name, importlib.import_module(name)


class _Consumers:
    """The peer's worker processes, for the length of a with-block."""

    def __init__(self, folder: str, peer: Peer, app: str) -> None:
        env = dict(os.environ, PYTHONPATH=folder)
        words = {"APP": app, "PEER_URL": os.environ["PEER_URL"]}
        self._processes = [
            subprocess.Popen(
                [words.get(arg, arg.replace("APP.", f"{app}.")) for arg in args],
                env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for args in peer.consumers
        ]  # fmt: skip

    def __enter__(self) -> "_Consumers":
        return self

    def pids(self) -> List[int]:
        return [pid for process in self._processes for pid in family(process.pid)]

    def __exit__(self, *exc_info: Any) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _note(peer: Peer, what: str, value: float) -> None:
    FIGURES[peer.name, what] = value


def _enqueue(server: Server, folder: str, scale: float, peer: Peer) -> None:
    if not peer.client:
        return
    app = _app(folder, peer)[1]
    quiet = how_quiet()
    for _ in range(20):
        app.send(app.nothing)
    (pairs,) = by_turns([lambda: app.send(app.nothing)], max(5, int(20 * scale)), 100)
    found = percentile([rate for rate, _ in pairs], 0.5)
    _note(peer, "enqueue", found)
    show(f"{peer.name}: enqueue", rate(found), "", f"best {rate(max(pairs)[0])}; {quiet}")
    server.clear()


def _bulk(server: Server, folder: str, scale: float, peer: Peer) -> None:
    if not peer.client:
        return
    app = _app(folder, peer)[1]
    app.send(app.nothing)
    quiet = how_quiet()
    best = 0.0
    for _ in range(2):
        start = time.perf_counter()
        app.bulk(app.nothing, 1000)
        best = max(best, 1000 / (time.perf_counter() - start))
    _note(peer, "bulk", best)
    show(f"{peer.name}: bulk enqueue of 1,000", rate(best), "", quiet)
    server.clear()


def _drain(server: Server, folder: str, scale: float, peer: Peer) -> None:
    n = max(100, int(peer.n * scale))
    for results in (False, True):
        name, app = _app(folder, peer)
        server.clear()
        done = 0
        while done < n:
            app.bulk(app.add if results else app.nothing, min(1000, n - done))
            done += 1000
        word = "results" if results else "no results"
        quiet = how_quiet()
        with _Consumers(folder, peer, name):
            found = rate_of_drain(lambda: server.left(peer.key), n)
        _note(peer, f"drain, {word}", found)
        show(f"{peer.name}: drain, 2 processes, {word}", rate(found), "", quiet)
    server.clear()


def _roundtrip(server: Server, folder: str, scale: float, peer: Peer) -> None:
    n = max(20, int((100 if peer.package == "rq" else 300) * scale))
    name, app = _app(folder, peer, waits=True)
    times = []
    with _Consumers(folder, peer, name):
        app.ask()
        time.sleep(1.0)
        quiet = how_quiet()
        for _ in range(n):
            time.sleep(0.002)
            begin = time.perf_counter()
            app.ask()
            times.append(time.perf_counter() - begin)
    _note(peer, "p50", percentile(times, 0.5))
    show(f"{peer.name}: round trip, idle worker", percentiles(times), "", quiet)
    server.clear()


def _idle(server: Server, folder: str, scale: float, peer: Peer) -> None:
    seconds = max(3.0, 15.0 * scale)
    name, app = _app(folder, peer, waits=True)
    with _Consumers(folder, peer, name) as consumers:
        for _ in range(20):
            app.ask()
        time.sleep(2.0)
        quiet = how_quiet()
        pids = consumers.pids()
        used, before = cpu_of(pids), server.commands()
        time.sleep(seconds)
        calls = sum(commands_between(before, server.commands()).values())
        share = (cpu_of(pids) - used) / seconds
    _note(peer, "idle CPU", share)
    _note(peer, "idle commands", calls / seconds)
    commands = f"{calls / seconds:.1f} commands/s"
    show(f"{peer.name}: idle over {seconds:.0f} s", f"{share:.2%} CPU", "", f"{commands}; {quiet}")
    server.clear()


_MEASURES: "dict[str, Callable[[Server, str, float, Peer], None]]" = {
    "enqueue": _enqueue,
    "bulk": _bulk,
    "drain": _drain,
    "roundtrip": _roundtrip,
    "idle": _idle,
}

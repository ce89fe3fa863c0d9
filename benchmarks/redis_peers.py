# SPDX-License-Identifier: MIT
"""The same work done by Celery, RQ, huey and dramatiq on the same Redis server, where installed.

Each runs as its documentation shows it, two processes wide; `ask` waits for a result in its own way.
Not all of them promise the same: huey keeps no record of a task while it runs, dramatiq and RQ do.
"""

from __future__ import annotations

import os
import time
from typing import Any, Callable, List, NamedTuple, Tuple

from measuring import (
    by_turns,
    cpu_of,
    how_quiet,
    middle,
    note,
    percentile,
    percentiles,
    rate,
    rate_of_drain,
    show,
)
from peering import CELERY, DRAMATIQ, Workers, load, missing, program
from redis_floors import Server, commands_between

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


class Peer(NamedTuple):
    """One other queue: `key` is the list that waits, `consumers` the programs that drain it."""

    name: str
    package: str
    source: str
    key: str
    consumers: List[List[str]]
    n: int  #: how many to drain
    client: bool = True  #: False: the same client as above, under other workers


def _rq(worker_class: str) -> List[List[str]]:
    return 2 * [program("rq", "worker", "-q", "-u", "PEER_URL", "-P", ".", "-w", worker_class, "peer")]


PEERS = (
    Peer("Celery", "celery", CELERY, "celery", [program("celery", "-A", "APP", "worker", "-c", "2")], 4000),
    Peer("RQ", "rq", RQ, "rq:queue:peer", _rq("rq.Worker"), 300),
    Peer("RQ, SimpleWorker", "rq", RQ, "rq:queue:peer", _rq("rq.SimpleWorker"), 2000, False),
    Peer(
        "huey", "huey", HUEY, "huey.redis.peer",
        [program("huey_consumer", "APP.huey", "-k", "process", "-w", "2", "-q")], 10000,
    ),
    Peer(
        "dramatiq", "dramatiq", DRAMATIQ, "dramatiq:default",
        [program("dramatiq", "APP", "--processes", "2", "--threads", "1")], 6000,
    ),
)  # fmt: skip
PARTS = ("enqueue", "bulk", "drain", "roundtrip", "idle")


def run(server: Server, folder: str, scale: float, parts: Tuple[str, ...] = PARTS) -> None:
    """Measure those `parts` of every peer that can be imported."""
    told = set()
    for peer in PEERS:
        if missing(peer.package):
            if peer.package not in told:
                print(f"{peer.name}: not installed, left out (python -m tox -e bench installs it)")
            told.add(peer.package)
            continue
        for part in parts:
            _MEASURES[part](server, folder, scale, peer)


def _app(server: Server, folder: str, peer: Peer, waits: bool = False) -> Tuple[Any, Workers]:
    """Return the peer's app, freshly imported, and its workers to be started."""
    os.environ["PEER_WAITS"] = "1" if waits else "0"
    name = f"redis_peer_{peer.package}"
    app, env = load(folder, name, peer.source, server.url)
    words = {"APP": name, "PEER_URL": server.url}
    commands = [[words.get(arg, arg.replace("APP.", f"{name}.")) for arg in args] for args in peer.consumers]
    return app, Workers(folder, commands, env)


def _enqueue(server: Server, folder: str, scale: float, peer: Peer) -> None:
    if not peer.client:
        return
    app = _app(server, folder, peer)[0]
    quiet = how_quiet()
    for _ in range(20):
        app.send(app.nothing)
    (pairs,) = by_turns([lambda: app.send(app.nothing)], max(5, int(20 * scale)), 100)
    found = middle(pairs)
    note("enqueue", found, peer.name)
    show(f"{peer.name}: enqueue", rate(found), "", f"best {rate(max(pairs)[0])}; {quiet}")
    server.clear()


def _bulk(server: Server, folder: str, scale: float, peer: Peer) -> None:
    if not peer.client:
        return
    app = _app(server, folder, peer)[0]
    app.send(app.nothing)
    quiet = how_quiet()
    best = 0.0
    for _ in range(2):
        start = time.perf_counter()
        app.bulk(app.nothing, 1000)
        best = max(best, 1000 / (time.perf_counter() - start))
    note("bulk", best, peer.name)
    show(f"{peer.name}: bulk enqueue of 1,000", rate(best), "", quiet)
    server.clear()


def _drain(server: Server, folder: str, scale: float, peer: Peer) -> None:
    n = max(100, int(peer.n * scale))
    for results in (False, True):
        app, workers = _app(server, folder, peer)
        server.clear()
        done = 0
        while done < n:
            app.bulk(app.add if results else app.nothing, min(1000, n - done))
            done += 1000
        word = "results" if results else "no results"
        quiet = how_quiet()
        with workers:
            found = rate_of_drain(lambda: server.left(peer.key), n)
        note(f"drain, {word}", found, peer.name)
        show(f"{peer.name}: drain, 2 processes, {word}", rate(found), "", quiet)
    server.clear()


def _roundtrip(server: Server, folder: str, scale: float, peer: Peer) -> None:
    n = max(20, int((100 if peer.package == "rq" else 300) * scale))
    app, workers = _app(server, folder, peer, waits=True)
    times = []
    with workers:
        app.ask()
        time.sleep(1.0)
        quiet = how_quiet()
        for _ in range(n):
            time.sleep(0.002)
            begin = time.perf_counter()
            app.ask()
            times.append(time.perf_counter() - begin)
    note("p50", percentile(times, 0.5), peer.name)
    show(f"{peer.name}: round trip, idle worker", percentiles(times), "", quiet)
    server.clear()


def _idle(server: Server, folder: str, scale: float, peer: Peer) -> None:
    seconds = max(3.0, 15.0 * scale)
    app, workers = _app(server, folder, peer, waits=True)
    with workers:
        for _ in range(20):
            app.ask()
        time.sleep(2.0)
        quiet = how_quiet()
        pids = workers.pids()
        used, before = cpu_of(pids), server.commands()
        time.sleep(seconds)
        calls = sum(commands_between(before, server.commands()).values())
        share = (cpu_of(pids) - used) / seconds
    note("idle CPU", share, peer.name)
    note("idle commands", calls / seconds, peer.name)
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

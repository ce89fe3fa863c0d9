# SPDX-License-Identifier: MIT
"""A SQLite file used by many processes, some of which are killed: nothing is lost, nothing runs twice."""

from __future__ import annotations

import os
import random
import select
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Set

import pytest
from waiting import wait_until

from miniq.message import Message
from miniq.routing import Queue
from miniq.transports.base import Publication
from miniq.transports.sqlite import SQLiteConsumer, SQLiteTransport

ROOT = str(Path(__file__).resolve().parent.parent)
DEADLINE_S = 40.0

COMMON = """
import os, sys, time, select, signal
from miniq.exceptions import OperationalError
from miniq.message import Message
from miniq.routing import Queue
from miniq.backends.base import StoredResult
from miniq.backends.sqlite import SQLiteBackend
from miniq.transports.base import Publication
from miniq.transports.sqlite import SQLiteTransport
url, name = sys.argv[1], sys.argv[2]
transport = SQLiteTransport(url, {}, time.time)
def message(task_id):
    return Message(b"body", "application/json", "utf-8", {"task": "t", "id": task_id}, {})
def say(*words):
    print(*words, flush=True)
"""

#: Publishes argv[3] messages, one by one.
PRODUCER = """
for number in range(int(sys.argv[3])):
    transport.publish([Publication(message(f"{name}-{number}"), "", "work")], 30)
transport.close()
"""

#: Takes two at a time in one transaction with results and acks; stores a line for each that ended.
WORKER = """
backend = SQLiteBackend(url, {}, time.time)
consumer = transport.consumer(name, [Queue("work")])
consumer.delivery_limit = 0
say("ready")
held, kept = [], time.monotonic()
while True:
    try:
        with transport.transaction():
            ended = [d.message.headers["id"] for d in held]
            backend.store([StoredResult(id, "SUCCESS", name.encode(), "", "", None) for id in ended])
            for delivery in held:
                assert consumer.ack(delivery)
            new = consumer.poll(2)
            consumer.start(new)
        held = new
        if time.monotonic() - kept > 0.2:
            consumer.housekeep()
            kept = time.monotonic()
    except OperationalError:
        time.sleep(0.01)
        continue
    if not held:
        select.select([consumer.fileno()], [], [], consumer.poll_interval_s)
        consumer.on_readable()
"""

#: Takes one message early and one late, says so and waits to be killed.
HOLDER = """
consumer = transport.consumer(name, [Queue("work")])
found = consumer.poll(3)
found[0].early = True
consumer.start(found[:2])
say("holds", *(d.message.headers["id"] for d in found))
time.sleep(600)
"""


def put(transport: SQLiteTransport, *names: str) -> None:
    transport.publish(
        [Publication(Message(b"body", "", "", {"task": "t", "id": name}, {}), "", "work") for name in names],
        30,
    )


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/q.db"


@pytest.fixture
def start(url: str) -> Iterator[Start]:
    """Start scripts; end at last by their pids what still runs."""
    children: List["subprocess.Popen[str]"] = []

    def run(script: str, name: str, *arguments: object) -> "subprocess.Popen[str]":
        code = COMMON + textwrap.dedent(script)
        child = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, url, name, *map(str, arguments)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        children.append(child)
        return child

    yield run
    for child in children:
        child.kill()
        child.communicate(timeout=30)


@pytest.fixture
def transport(url: str) -> Iterator[SQLiteTransport]:
    opened = SQLiteTransport(url, {}, time.time)
    opened.declare(Queue("work"))
    yield opened
    opened.close()


def line(child: "subprocess.Popen[str]") -> str:
    assert child.stdout is not None and child.stderr is not None
    found = child.stdout.readline().strip()
    assert found, child.stderr.read()
    return found


def has_results(transport: SQLiteTransport, number: int) -> bool:
    return count(transport, "results") >= number


def has_ready(transport: SQLiteTransport, number: int) -> bool:
    return transport.sizes()[0].ready >= number


def integrity(url: str) -> str:
    plain = sqlite3.connect(url[len("sqlite:///") :])
    try:
        found: str = plain.execute("PRAGMA integrity_check").fetchone()[0]
        return found
    finally:
        plain.close()


def finish(child: "subprocess.Popen[str]") -> None:
    _, errors = child.communicate(timeout=DEADLINE_S)
    assert (child.returncode, errors) == (0, "")


def test_many_processes_with_kills_lose_and_repeat_nothing(
    url: str, transport: SQLiteTransport, start: Start
) -> None:
    producers = [start(PRODUCER, f"p{n}", 150) for n in range(3)]
    workers = [start(WORKER, f"w{n}") for n in range(2)]
    expected = {f"p{n}-{number}" for n in range(3) for number in range(150)}
    for kill in range(3):
        line(workers[kill])
        reached = 60 * (kill + 1)
        wait_until(partial(has_results, transport, reached), DEADLINE_S, f"{reached} results")
        workers[kill].send_signal(signal.SIGKILL)
        workers.append(start(WORKER, f"w{kill + 2}"))
    for producer in producers:
        finish(producer)
    wait_until(lambda: count(transport, "results") == len(expected), DEADLINE_S, "all results")
    wait_until(lambda: transport.sizes()[0][1:4] == (0, 0, 0), DEADLINE_S, "an empty queue")
    for worker in workers:
        assert worker.poll() in (None, -signal.SIGKILL), worker.communicate()[1]
    found = {row[0] for row in transport._database().read("SELECT task_id FROM results")}
    assert found == expected
    assert transport.dead_letters() == []
    assert integrity(url) == "ok"


def count(transport: SQLiteTransport, table: str) -> int:
    found: int = transport._database().read(f"SELECT count(*) FROM {table}")[0][0]
    return found


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_workers_messages_are_back_at_once(transport: SQLiteTransport, start: Start) -> None:
    put(transport, "early", "late", "reserved", "other")
    holder = start(HOLDER, "holder")
    assert line(holder) == "holds early late reserved"
    consumer = transport.consumer("survivor", [Queue("work")])
    assert [d.message.headers["id"] for d in consumer.poll(9)] == ["other"]
    consumer.housekeep()
    assert consumer.poll(9) == []
    holder.send_signal(signal.SIGKILL)
    holder.wait(DEADLINE_S)
    consumer.housekeep()
    found = {d.message.headers["id"]: (d.fate, d.lost_by, d.deliveries) for d in consumer.poll(9)}
    assert found == {"early": ("lost", "holder", 1), "late": (None, "", 1), "reserved": (None, "", 0)}


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_stopped_worker_keeps_its_messages(transport: SQLiteTransport, start: Start) -> None:
    put(transport, "early", "late", "reserved")
    holder = start(HOLDER, "holder")
    line(holder)
    holder.send_signal(signal.SIGSTOP)
    consumer = transport.consumer("other", [Queue("work")])
    for _ in range(3):
        consumer.housekeep()
        assert consumer.poll(9) == []
    holder.send_signal(signal.SIGCONT)


def test_publish_wakes_a_consumer_of_another_process(transport: SQLiteTransport, start: Start) -> None:
    consumer = transport.consumer("w", [Queue("work")])
    assert consumer.poll(1) == []
    producer = start(PRODUCER, "p", 1)
    fd = consumer.fileno()
    assert fd is not None
    assert select.select([fd], [], [], DEADLINE_S)[0]
    consumer.on_readable()
    wait_until(lambda: len(consumer.poll(1)) == 1, DEADLINE_S, "the message")
    finish(producer)


def test_consumer_without_a_socket_looks_more_often(
    transport: SQLiteTransport, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SQLiteConsumer, "_bind", lambda self: None)
    consumer = transport.consumer("w", [Queue("work")])
    while consumer.changed():
        pass
    assert consumer.fileno() is None
    finish(start(PRODUCER, "p", 1))
    assert consumer.changed()
    assert len(consumer.poll(5)) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", ["os._exit(0)", "sys.exit(0)"])
def test_parent_and_forked_child_use_the_same_transport(
    url: str, transport: SQLiteTransport, start: Start, how: str
) -> None:
    """Opened before the fork, with a consumer; both publish, the child ends first, the parent consumes."""
    script = f"""
        import warnings
        warnings.simplefilter("error")
        backend = SQLiteBackend(url, {{}}, time.time)
        backend.fetch(["x"])
        transport.publish([Publication(message("before"), "", "work")], 30)
        consumer = transport.consumer(name, [Queue("work")])
        held = consumer.poll(1)
        consumer.start(held)
        pid = os.fork()
        if pid == 0:
            for number in range(50):
                transport.publish([Publication(message(f"child-{{number}}"), "", "work")], 30)
            assert set(backend.fetch(["x"])) == set()
            consumer.close()
            transport.close()
            {how}
        for number in range(50):
            transport.publish([Publication(message(f"parent-{{number}}"), "", "work")], 30)
        assert os.waitpid(pid, 0)[1] == 0
        transport.publish([Publication(message("after"), "", "work")], 30)
        assert consumer.ack(held[0])
        other = SQLiteTransport(url, {{}}, time.time)
        found = []
        while True:
            more = consumer.poll(7)
            if not more:
                break
            found += [d.message.headers["id"] for d in more]
        say(len(found), len(set(found)))
        say("held")
        sys.stdin.readline()
    """
    child = start(script, "forker")
    assert line(child) == "101 101"
    assert line(child) == "held"
    consumer = transport.consumer("other", [Queue("work")])
    # The child's end must not have let go of the parent's lock.
    assert consumer.poll(1) == []
    assert child.poll() is None
    assert integrity(url) == "ok"


def test_random_kills_inside_transactions_leave_whole_ones(
    url: str, transport: SQLiteTransport, start: Start
) -> None:
    """Each transaction moves one message on by two; a half of one would break the pairs."""
    script = """
        number = 0
        say("ready")
        while True:
            with transport.transaction():
                transport.publish([Publication(message(f"{name}-{number}-a"), "", "work")], 30)
                transport.publish([Publication(message(f"{name}-{number}-b"), "", "work")], 30)
            number += 1
    """
    chance = random.Random(5)
    for turn in range(4):
        child = start(script, f"k{turn}")
        line(child)
        before = transport.sizes()[0].ready
        wait_until(partial(has_ready, transport, before + chance.randint(2, 20)), DEADLINE_S, "some pairs")
        child.kill()
        child.wait(DEADLINE_S)
    pairs: Dict[str, Set[str]] = {}
    for (task_id,) in transport._database().read("SELECT task_id FROM messages"):
        pairs.setdefault(task_id[:-2], set()).add(task_id[-1])
    assert all(halves == {"a", "b"} for halves in pairs.values())
    assert integrity(url) == "ok"

# SPDX-License-Identifier: MIT
"""What is particular to a SQLite file as the broker: its rows, its costs, bad rows in it."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest

from miniq.backends.base import StoredResult
from miniq.backends.sqlite import SQLiteBackend
from miniq.message import Message
from miniq.routing import Queue
from miniq.times import to_iso
from miniq.transports.base import Publication
from miniq.transports.sqlite import SQLiteConsumer, SQLiteTransport

WORK = Queue("work")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/q.db"


@pytest.fixture
def transport(url: str) -> Iterator[SQLiteTransport]:
    opened = SQLiteTransport(url, {}, time.time)
    yield opened
    opened.close()


@pytest.fixture
def consumer(transport: SQLiteTransport) -> SQLiteConsumer:
    return transport.consumer("w", [WORK])


def put(transport: SQLiteTransport, *names: str, **headers: Any) -> None:
    transport.publish(
        [
            Publication(Message(b"body", "", "", {"task": "t", "id": n, **headers}, {}), "", "work")
            for n in names
        ],
        30,
    )


def steps(transport: SQLiteTransport, call: Callable[[], Any]) -> int:
    """Return how many hundreds of instructions of its virtual machine SQLite needs for a call."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    database = transport._database().connection
    database.set_progress_handler(tick, 100)
    try:
        call()
    finally:
        database.set_progress_handler(None, 0)
    return count


@pytest.mark.parametrize("in_transaction", [False, True])
def test_poll_costs_what_it_returns_however_many_rows_wait(
    transport: SQLiteTransport, consumer: SQLiteConsumer, in_transaction: bool
) -> None:
    def turn() -> None:
        if in_transaction:
            with transport.transaction():
                consumer.start(consumer.poll(2))
                consumer.next_due()
        else:
            consumer.start(consumer.poll(2))
            consumer.next_due()

    put(transport, *map(str, range(20)))
    small = steps(transport, turn)
    put(transport, *(f"ready {n}" for n in range(3000)))
    put(transport, *(f"later {n}" for n in range(3000)), eta=to_iso(time.time() + 3600))
    assert steps(transport, turn) <= small + 1
    assert steps(transport, consumer.housekeep) <= 5


def test_rows_that_are_no_messages_come_out_as_garbage_and_stop_nobody(
    transport: SQLiteTransport, consumer: SQLiteConsumer
) -> None:
    put(transport, "first")
    envelopes: List[Any] = [
        "no json", b"\xff\xfe\x00", None, "[1, 2]",
        '{"headers": 5, "properties": {}}', '{"headers": {}}', "[" * 100_000,
    ]  # fmt: skip
    database = transport._database()
    with database.transaction():
        for number, envelope in enumerate(envelopes):
            database.write(
                "INSERT INTO messages(queue, state, priority, due, deliveries, envelope, body)"
                " VALUES('work', 2, 0, ?, 0, ?, ?)",
                (time.time(), envelope, f"body {number}"),
            )
        database.write(
            "INSERT INTO messages(queue, state, priority, due, deliveries, exchange, routing_key,"
            " envelope, body) VALUES('work', 2, 0, ?, 0, CAST(x'ff41' AS TEXT), CAST(x'fe' AS TEXT),"
            ' \'{"headers": {}, "properties": {}}\', NULL)',
            (time.time(),),
        )
    put(transport, "last")
    found = consumer.poll(100)
    assert [delivery.fate for delivery in found] == [None, *["garbage"] * (len(envelopes) + 1), None]
    assert found[1].message.body == b"body 0"
    assert found[1].message.headers == {}
    for delivery in found[1:-1]:
        assert consumer.dead_letter(delivery, "no message")
    letters = transport.dead_letters()
    assert [letter.message.body for letter in letters[1:3]] == [b"body 6", b"body 5"]
    assert transport.replay(letters[-1].id)
    assert [delivery.fate for delivery in consumer.poll(100)] == ["garbage"]


def test_thousands_that_fall_due_together_come_out_by_due_in_portions(
    transport: SQLiteTransport, consumer: SQLiteConsumer
) -> None:
    past = time.time() - 1000
    names = [f"{n:04}" for n in range(1000)]
    put(transport, *names)
    with transport._database().transaction() as database:
        database.write("UPDATE messages SET state=3, due=?+id", (past - 10_000,))
    found: List[str] = []
    while len(found) < 1000:
        more = [delivery.message.headers["id"] for delivery in consumer.poll(64)]
        assert more
        found += more
    assert found == names


def test_row_numbers_that_come_again_confuse_nobody(
    transport: SQLiteTransport, consumer: SQLiteConsumer
) -> None:
    put(transport, "a")
    (first,) = consumer.poll(1)
    assert consumer.ack(first)
    put(transport, "b")
    (second,) = consumer.poll(1)
    assert first.tag[0] == second.tag[0]
    assert not consumer.ack(first)
    assert consumer.ack(second)


def test_follow_up_is_taken_in_the_transaction_that_published_it(
    transport: SQLiteTransport, consumer: SQLiteConsumer, url: str
) -> None:
    backend = SQLiteBackend(url, {}, time.time)
    put(transport, "a")
    held = consumer.poll(1)
    consumer.start(held)
    with transport.transaction():
        backend.store([StoredResult("a", "SUCCESS", b"1", "", "", None)])
        put(transport, "b")
        assert consumer.ack(held[0])
        new = consumer.poll(1)
        consumer.start(new)
    assert new[0].message.headers["id"] == "b"
    plain = sqlite3.connect(transport._path)
    assert plain.execute("SELECT task_id, state, deliveries FROM messages").fetchall() == [("b", 4 + 1, 1)]
    assert plain.execute("SELECT task_id FROM results").fetchall() == [("a",)]
    plain.close()
    backend.close()


def test_idle_polls_and_housekeeping_write_nothing(
    transport: SQLiteTransport, consumer: SQLiteConsumer
) -> None:
    put(transport, "later", eta=to_iso(time.time() + 3600))
    before = transport._database().connection.total_changes
    blocker = sqlite3.connect(transport._path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    for _ in range(3):
        assert consumer.poll(5) == []
        with transport.transaction():
            assert consumer.poll(5) == []
        consumer.housekeep()
    blocker.close()
    assert transport._database().connection.total_changes == before


def test_revocations_are_forgotten_in_portions(transport: SQLiteTransport, consumer: SQLiteConsumer) -> None:
    transport.revoke((f"id {n}" for n in range(1000)), time.time() - 1)
    database = transport._database()
    for _ in range(5):
        consumer.housekeep()
    assert database.read("SELECT count(*) FROM revoked") == [(0,)]


def test_purge_of_many_takes_more_than_one_transaction(transport: SQLiteTransport) -> None:
    put(transport, *map(str, range(12_000)))
    assert transport.purge("work") == 12_000


def test_waiters_for_many_results_use_few_queries(transport: SQLiteTransport, url: str) -> None:
    backend = SQLiteBackend(url, {}, time.time)
    names = [f"task {n}" for n in range(5000)]
    backend.store([StoredResult(name, "SUCCESS", b"", "", "", None) for name in names])
    queries: List[str] = []
    backend._database().connection.set_trace_callback(queries.append)
    assert len(list(backend.wait(names, 5))) == 5000
    backend._database().connection.set_trace_callback(None)
    assert len(queries) <= 12
    backend.close()


# -- the journal of starts


def test_token_of_one_worker_means_nothing_for_the_next(
    transport: SQLiteTransport, consumer: SQLiteConsumer, url: str
) -> None:
    put(transport, "a", "b")
    journal = consumer.start_journal()
    assert journal is not None
    found = consumer.poll(2)
    for delivery in found:
        delivery.token = journal.token()
    consumer.start(found)
    consumer.release(found)
    other = SQLiteTransport(url, {}, time.time)
    second = other.consumer("second", [WORK])
    assert second.start_journal() is not None
    assert [delivery.deliveries for delivery in second.poll(2)] == [0, 0]
    consumer._recover(second._owner, "second", time.time())
    assert [delivery.deliveries for delivery in consumer.poll(2)] == [0, 0]
    other.close()


def test_started_messages_that_were_not_noted_go_back_and_the_others_are_lost(
    transport: SQLiteTransport, consumer: SQLiteConsumer, url: str
) -> None:
    put(transport, "a", "b", "c")
    other = SQLiteTransport(url, {}, time.time)
    dying = other.consumer("dying", [WORK])
    journal = dying.start_journal()
    assert journal is not None
    found = dying.poll(3)
    for delivery in found:
        delivery.early = True
        delivery.token = journal.token()
    dying.start(found)
    journal.mark(found[1].token or 0)
    consumer._recover(dying._owner, "dying", time.time())
    consumer.housekeep()
    fates = {d.message.headers["id"]: (d.fate, d.deliveries) for d in consumer.poll(3)}
    assert fates == {"a": (None, 0), "b": ("lost", 1), "c": (None, 0)}
    assert not Path(journal.path).exists()
    other.close()

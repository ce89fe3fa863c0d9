# SPDX-License-Identifier: MIT
"""What a Redis broker survives that nobody planned: foreign keys, odd texts, full or emptied servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
from proxy import Proxy
from servers import RedisServer

from miniq.backends.base import StoredResult
from miniq.backends.redis import RedisBackend
from miniq.connections.owners import OwnerLocks
from miniq.connections.redis import Server
from miniq.exceptions import ImproperlyConfigured, OperationalError
from miniq.message import Delivery, Message
from miniq.routing import Exchange, Queue
from miniq.testing import start_worker
from miniq.times import to_iso
from miniq.transports.base import Publication
from miniq.transports.redis import RedisTransport
from miniq.transports.redis_consumer import RedisConsumer
from miniq.transports.redis_upkeep import local_path

WORK = Queue("work")
Open = Callable[..., RedisTransport]
Ask = Callable[..., Any]


class Clock:
    """Epoch seconds that move only when told."""

    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_transport(redis_url: str, clock: Clock) -> Iterator[Open]:
    """Open transports: ``open_transport(url=redis_url, **transport options)``."""
    opened: List[RedisTransport] = []

    def new(url: str = redis_url, **options: Any) -> RedisTransport:
        opened.append(RedisTransport(url, options, clock))
        return opened[-1]

    yield new
    for transport in reversed(opened):
        transport.close()
    Server.close_all()


@pytest.fixture
def transport(open_transport: Open) -> RedisTransport:
    return open_transport()


@pytest.fixture
def consumer(transport: RedisTransport) -> RedisConsumer:
    return transport.consumer("one@host", [WORK])


@pytest.fixture
def ask(redis_server: RedisServer, redis_url: str) -> Ask:
    """Run a command in this test's database, past the code under test."""
    db = int(redis_url.rpartition("/")[2])
    return lambda *parts: redis_server.command(*parts, db=db)


def put(transport: RedisTransport, *names: str, queue: str = "work", **headers: Any) -> None:
    messages = [
        Message(b"body", "application/json", "utf-8", {"task": "t", "id": name, **headers}, {})
        for name in names
    ]
    transport.publish([Publication(message, "", queue) for message in messages], 30.0)


def ids(deliveries: List[Delivery]) -> List[str]:
    return [delivery.message.headers["id"] for delivery in deliveries]


def die(consumer: RedisConsumer) -> None:
    """Let go of the lock, as the kernel does when a process is gone."""
    OwnerLocks.of(local_path()).drop(int(consumer.owner, 16))


# -- keys of other programs


def test_queue_whose_key_is_another_programs_costs_no_message_of_the_others(
    transport: RedisTransport, ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    put(transport, "a", "b", "c")
    ask("SET", "other", "a text")
    consumer = transport.consumer("w", [WORK, Queue("other")])
    assert ids(consumer.poll(2)) == ["a", "b"]
    assert ids(consumer.poll(5)) == ["c"]
    told = [record.getMessage() for record in caplog.records if "another program" in record.getMessage()]
    assert len(told) == 1 and "b'other'" in told[0]


def test_nothing_is_taken_where_it_cannot_be_recorded(
    transport: RedisTransport, consumer: RedisConsumer, ask: Ask
) -> None:
    put(transport, "a", "b")
    ask("RPUSH", "unacked", "not a hash")
    for _ in range(2):
        with pytest.raises(ImproperlyConfigured, match="WRONGTYPE"):
            consumer.poll(5)
    assert ask("LLEN", "work") == 2
    ask("DEL", "unacked")
    assert ids(consumer.poll(5)) == ["a", "b"]


def test_parked_message_whose_list_is_another_programs_waits_and_holds_up_no_other(
    transport: RedisTransport, consumer: RedisConsumer, clock: Clock, ask: Ask
) -> None:
    put(transport, "later", eta=to_iso(clock.now + 10))
    assert consumer.poll(5) == []
    ask("SET", "work", "a text")
    clock.now += 20
    assert consumer.poll(5) == []
    assert consumer.next_due() == clock.now + 60
    ask("DEL", "work")
    clock.now += 61
    assert ids(consumer.poll(5)) == ["later"]


def test_step_with_a_result_that_cannot_be_stored_publishes_nothing_however_often_it_is_tried(
    transport: RedisTransport, consumer: RedisConsumer, redis_url: str, clock: Clock, ask: Ask
) -> None:
    put(transport, "a")
    (found,) = consumer.poll(1)
    ask("SADD", "celery-task-meta-a", "not a result")
    backend = RedisBackend(redis_url, {}, clock)
    result = StoredResult("a", "SUCCESS", b'{"status": "SUCCESS"}', "application/json", "utf-8", None)
    for _ in range(3):
        with pytest.raises(ImproperlyConfigured, match="WRONGTYPE"), transport.transaction():
            put(transport, "follow-up", queue="next")
            backend.store([result])
            consumer.ack(found)
    assert ask("LLEN", "next") == 0
    assert consumer.ack(found)


@pytest.mark.parametrize("name", ["unacked", "unacked_index", "a\0b"])
def test_queue_with_a_name_that_cannot_work_is_refused(transport: RedisTransport, name: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="cannot be called so"):
        transport.consumer("w", [Queue(name)])


@pytest.mark.parametrize("name", ["a b", "a|b", "a:1", "ä☃😀", 'a/b"\\', "{x}", "9", "x" * 3000])
def test_queue_with_an_odd_name_gets_its_lost_dead_and_parked_messages(
    open_transport: Open, clock: Clock, name: str
) -> None:
    transport = open_transport()
    dying = transport.consumer("w", [Queue(name)])
    put(transport, "now", queue=name)
    put(transport, "later", queue=name, eta=to_iso(clock.now + 5))
    (found,) = dying.poll(5)
    found.early = True
    dying.start([found])
    die(dying)
    other = open_transport()
    consumer = other.consumer("v", [Queue(name)])
    consumer.housekeep()
    (lost,) = consumer.poll(5)
    assert (lost.fate, lost.queue) == ("lost", name)
    assert consumer.dead_letter(lost, "why")
    (letter,) = other.dead_letters()
    assert other.replay(letter.id)
    clock.now += 10
    assert sorted(ids(consumer.poll(5))) == ["later", "now"]


def test_id_that_is_no_proper_text_holds_up_nothing(
    transport: RedisTransport, consumer: RedisConsumer, ask: Ask
) -> None:
    item = {"body": "", "headers": {"task": "t", "id": "\ud800"}, "properties": {}}
    ask("LPUSH", "work", json.dumps(item))
    put(transport, "good")
    transport.revoke(["\ud800"], 1.8e9)
    found = consumer.poll(5)
    assert [(one.message.headers["id"], one.fate) for one in found] == [("\ud800", "revoked"), ("good", None)]


def test_more_messages_start_and_end_in_one_step_than_lua_takes_arguments(
    transport: RedisTransport, consumer: RedisConsumer, ask: Ask
) -> None:
    put(transport, *(f"m{number}" for number in range(9000)))
    found = consumer.poll(9000)
    assert len(found) == 9000
    consumer.start(found)
    with transport.transaction():
        assert all(consumer.ack(one) for one in found)
    assert not consumer.held
    assert ask("EXISTS", "unacked", "unacked_index", f"_miniq.held.{consumer.owner}") == 0


# -- who lives


def test_living_worker_of_this_machine_keeps_its_messages_when_the_server_was_away_for_longer_than_a_lease(
    open_transport: Open, consumer: RedisConsumer, transport: RedisTransport, ask: Ask
) -> None:
    put(transport, "a")
    (found,) = consumer.poll(1)
    consumer.start([found])
    ask("DEL", f"_miniq.alive.{consumer.owner}")
    quicker = open_transport().consumer("quicker", [WORK])
    quicker.housekeep()
    assert quicker.poll(5) == []
    consumer.housekeep()
    assert consumer.ack(found)


def test_worker_that_takes_messages_after_it_was_taken_for_dead_is_recovered_when_it_dies(
    open_transport: Open, consumer: RedisConsumer, transport: RedisTransport, ask: Ask
) -> None:
    ask("DEL", f"_miniq.alive.{consumer.owner}")
    ask("HDEL", "_miniq.owners", consumer.owner)
    put(transport, "a")
    assert ids(consumer.poll(5)) == ["a"]
    die(consumer)
    survivor = open_transport().consumer("survivor", [WORK])
    survivor.housekeep()
    assert ids(survivor.poll(5)) == ["a"]


def test_worker_is_known_to_live_though_the_file_with_its_lock_was_cleared_away(
    open_transport: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    consumer = open_transport().consumer("w", [WORK])
    os.unlink(local_path() + "-owners")
    consumer.housekeep()
    code = f"""
import sys, tempfile
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
tempfile.tempdir = {str(tmp_path)!r}
from miniq.connections.owners import OwnerLocks
from miniq.transports.redis_upkeep import local_path
print(OwnerLocks.of(local_path()).is_alive({int(consumer.owner, 16)}))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "True\n"
    consumer.close()


def test_lease_is_renewed_and_due_messages_are_taken_while_the_memory_is_full(
    new_redis: Callable[..., RedisServer], open_transport: Open, clock: Clock
) -> None:
    server = new_redis()
    transport = open_transport(server.url())
    consumer = transport.consumer("w", [WORK])
    put(transport, "later", eta=to_iso(clock.now + 10))
    assert consumer.poll(5) == []
    server.command("CONFIG", "SET", "maxmemory", "1mb")
    clock.now += 20
    with pytest.raises(OperationalError, match="OOM"):
        put(transport, "too much")
    server.command("DEL", f"_miniq.alive.{consumer.owner}")
    consumer.housekeep()
    assert server.command("EXISTS", f"_miniq.alive.{consumer.owner}") == 1
    assert ids(consumer.poll(5)) == ["later"]
    server.command("CONFIG", "SET", "maxmemory", "0")


# -- lines and servers


def test_worker_declares_its_queues_anew_after_the_server_was_emptied(
    transport: RedisTransport, ask: Ask
) -> None:
    topic = Queue("topic", Exchange("events", "topic"), "a.#")
    consumer = transport.consumer("w", [WORK, topic])
    ask("FLUSHDB")
    consumer.housekeep()
    assert [size.queue for size in transport.sizes()] == ["topic", "work"]
    message = Message(b"body", "application/json", "utf-8", {"task": "t", "id": "a"}, {})
    transport.publish([Publication(message, "events", "a.b")], 30.0)
    assert ids(consumer.poll(5)) == ["a"]


def test_parked_message_whose_worker_is_gone_is_seen_without_pushes_too(
    new_redis: Callable[..., RedisServer], open_transport: Open, clock: Clock
) -> None:
    server = new_redis(arguments=["--rename-command", "HELLO", ""])
    idle = open_transport(server.url()).consumer("idle", [WORK])
    assert idle.poll(5) == [] and idle.next_due() is None
    transport = open_transport(server.url())
    parking = transport.consumer("parking", [WORK])
    put(transport, "later", eta=to_iso(clock.now + 10))
    assert parking.poll(5) == []
    parking.close()
    idle.housekeep()
    assert idle.changed() and idle.next_due() == clock.now + 10


def test_poll_that_failed_asks_for_less_and_then_for_more_again(
    open_transport: Open, transport: RedisTransport, redis_server: RedisServer, redis_url: str
) -> None:
    names = [f"m{number}" for number in range(20)]
    put(transport, *names)
    with Proxy(redis_server.port) as proxy:
        consumer = open_transport(proxy.url(redis_url), socket_timeout=1.0).consumer("w", [WORK])
        proxy.black_hole()
        with pytest.raises(OperationalError):
            consumer.poll(20)
        proxy.forward()
        found = [consumer.poll(20) for _ in range(3)]
        assert [len(portion) for portion in found] == [5, 10, 5]
        assert ids(found[0] + found[1] + found[2]) == names


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_connections_that_broke_while_nobody_watched_them_are_closed(
    transport: RedisTransport, consumer: RedisConsumer
) -> None:
    consumer.housekeep()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        transport.link.connection().break_off("a test")
        consumer.housekeep()
    assert len(os.listdir("/proc/self/fd")) == before


def test_refused_message_whose_result_cannot_be_stored_holds_up_no_other(
    make_app: Callable[..., Any], redis_url: str, ask: Ask
) -> None:
    app = make_app(broker=redis_url, backend=redis_url)

    @app.task  # type: ignore[untyped-decorator, unused-ignore]
    def add(left: int, right: int) -> int:
        return left + right

    ask("SADD", "celery-task-meta-odd", "not a result")
    app.send_task("unknown", task_id="odd")
    with start_worker(app):
        assert add.delay(1, 2).get(timeout=20) == 3
    assert [letter.message.headers["id"] for letter in app.producer.transport.dead_letters()] == ["odd"]


def test_old_journals_of_the_dead_are_cleared_away(
    open_transport: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, young, living = (Path(f"{local_path()}-starts-{number:014x}") for number in (1, 2, 3))
    for path in (old, young, living):
        path.touch()
    for path in (old, living):
        os.utime(path, (1.0, 1.0))
    program = f"import time, miniq.connections.owners as o; o.OwnerLocks.of({local_path()!r}).take(3)"
    program += "; print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        try:
            open_transport().consumer("one@host", [WORK])
            assert not old.exists()
            assert young.exists()
            assert living.exists()
        finally:
            other.kill()

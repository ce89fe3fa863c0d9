# SPDX-License-Identifier: MIT
"""What is particular to a Redis server as the broker: Celery's layout, leases, answers that get lost."""

from __future__ import annotations

import json
import random
import select
import subprocess
import sys
import threading
from base64 import b64encode
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

import pytest
from proxy import Proxy
from servers import RedisServer
from waiting import wait_until
from workers import environment

from miniq import MiniQ
from miniq.connections.owners import OwnerLocks
from miniq.connections.redis import Server
from miniq.exceptions import ImproperlyConfigured, OperationalError
from miniq.message import Delivery, Message
from miniq.routing import Exchange, Queue
from miniq.times import to_iso
from miniq.transports.base import NotOurs, Publication
from miniq.transports.redis import RedisTransport
from miniq.transports.redis_consumer import RedisConsumer
from miniq.transports.redis_upkeep import local_path

WORK = Queue("work")
CAPTURED: Dict[str, Dict[str, Any]] = {
    vector["name"]: vector
    for vector in json.loads(
        (Path(__file__).parent / "vectors" / "redis_messages.json").read_text(encoding="utf-8")
    )
}
Open = Callable[..., RedisTransport]
NewRedis = Callable[..., RedisServer]
Ask = Callable[..., Any]


class Clock:
    """Epoch seconds that move only when told."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

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
        transport = RedisTransport(url, options, clock)
        opened.append(transport)
        return transport

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


def message(task_id: str, priority: Optional[int] = None, **headers: Any) -> Message:
    properties: Dict[str, Any] = {} if priority is None else {"priority": priority}
    return Message(b"body", "application/json", "utf-8", {"task": "t", "id": task_id, **headers}, properties)


def put(transport: RedisTransport, *messages: Message, queue: str = "work", exchange: str = "") -> None:
    transport.publish([Publication(message, exchange, queue) for message in messages], 30.0)


def put_names(transport: RedisTransport, *names: str, **headers: Any) -> None:
    put(transport, *(message(name, **headers) for name in names))


def ids(deliveries: List[Delivery]) -> List[str]:
    return [delivery.message.headers["id"] for delivery in deliveries]


def poll_all(consumer: RedisConsumer, count: int) -> List[Delivery]:
    """Poll until so many have come: what is broadcast may be a moment on its way."""
    found: List[Delivery] = []

    def has_all() -> bool:
        found.extend(consumer.poll(count - len(found)))
        return len(found) == count

    wait_until(has_all)
    return found


def facts(deliveries: List[Delivery]) -> Dict[str, Tuple[Any, ...]]:
    """Return fate, by whom it was lost, and the count, by id."""
    return {d.message.headers["id"]: (d.fate, d.lost_by, d.deliveries) for d in deliveries}


def keys(ask: Ask) -> Set[str]:
    return {key.decode() for key in ask("KEYS", "*")}


def held_keys(ask: Ask) -> Set[str]:
    """Return the keys that say what somebody holds."""
    return {key for key in keys(ask) if "unacked" in key or "held" in key}


def hash_of(ask: Ask, key: str) -> Dict[str, str]:
    flat = [part.decode() for part in ask("HGETALL", key)]
    return dict(zip(flat[::2], flat[1::2]))


# -- what lies on the server


def test_item_is_an_envelope_as_celery_writes_it(transport: RedisTransport, ask: Ask) -> None:
    sent = Message(
        b"\x00\xff", "application/x-python-serialize", "binary", {"task": "t", "id": "a", "lang": "py"},
        {"correlation_id": "a", "reply_to": "r", "delivery_mode": 2, "priority": 5},
    )  # fmt: skip
    put(transport, sent, message("b"))
    envelope = json.loads(ask("LINDEX", "work\x06\x163", -1))
    tag = envelope["properties"].pop("delivery_tag")
    assert envelope == {
        "body": b64encode(b"\x00\xff").decode(),
        "content-encoding": "binary",
        "content-type": "application/x-python-serialize",
        "headers": {"task": "t", "id": "a", "lang": "py"},
        "properties": {
            "correlation_id": "a", "reply_to": "r", "delivery_mode": 2, "priority": 5,
            "delivery_info": {"exchange": "", "routing_key": "work"}, "body_encoding": "base64",
        },
    }  # fmt: skip
    other = json.loads(ask("LINDEX", "work", -1))["properties"]
    assert other["priority"] == 0
    assert tag != other["delivery_tag"]


def test_held_messages_lie_where_celery_looks_and_early_ones_it_does_not_find(
    transport: RedisTransport, consumer: RedisConsumer, ask: Ask
) -> None:
    names = ("reserved", "late", "early", "late too")
    put_names(transport, *names)
    items = dict(zip(names, reversed(ask("LRANGE", "work", 0, -1))))
    found = {delivery.message.headers["id"]: delivery for delivery in consumer.poll(4)}
    found["early"].early = True
    consumer.start([found["late"], found["early"], found["late too"]])
    unacked = hash_of(ask, "unacked")
    assert len(unacked) == 4
    # Celery's workers find what they restore by the index.
    scores = {id_: ask("ZSCORE", "unacked_index", id_) for id_ in unacked}
    # By the server's clock: they and ours have to agree on one.
    now = int(ask("TIME")[0])
    lease_s = transport.link.options.lease
    for id_, value in unacked.items():
        envelope, exchange, routing_key = json.loads(value)
        name, score = envelope["headers"]["id"], scores[id_]
        assert envelope == json.loads(items[name])
        assert (exchange, routing_key) == ("", "work")
        assert score is None if name == "early" else now - 20 < float(score) - lease_s <= now
    assert all(consumer.ack(delivery) for delivery in found.values())
    assert not held_keys(ask)


def test_after_the_last_ack_only_what_is_declared_remains(
    transport: RedisTransport, consumer: RedisConsumer, ask: Ask, clock: Clock
) -> None:
    put_names(transport, "a", "b", "c", "d", "e")
    put_names(transport, "later", eta=to_iso(clock.now + 10))
    transport.revoke(["b"], clock.now + 100)
    found = consumer.poll(5)
    assert consumer.poll(5) == []
    found[0].early = True
    consumer.start(found[:3])
    assert consumer.ack(found[0]) and consumer.ack(found[1])
    assert consumer.reject(found[2], requeue=True)
    assert consumer.defer(found[3], clock.now + 5)
    assert consumer.dead_letter(found[4], "why not")
    clock.now += 200
    rest = consumer.poll(9)
    assert ids(rest) == ["d", "later", "c"]
    assert all(consumer.ack(delivery) for delivery in rest)
    assert transport.drop(transport.dead_letters()[0].id)
    consumer.housekeep()
    consumer.close()
    assert keys(ask) == {"_miniq.queues"}


def test_message_started_and_settled_in_one_transaction_leaves_nothing(
    transport: RedisTransport, consumer: RedisConsumer, ask: Ask
) -> None:
    put_names(transport, "late", "early", "given back")
    with transport.transaction():
        found = consumer.poll(3)
        found[1].early = True
        consumer.start(found)
        assert consumer.ack(found[0]) and consumer.ack(found[1])
        consumer.release(found[2:])
    assert not held_keys(ask)
    assert facts(consumer.poll(5)) == {"given back": (None, "", 0)}


def test_renewal_moves_what_celery_goes_by(
    transport: RedisTransport, consumer: RedisConsumer, ask: Ask
) -> None:
    put_names(transport, "a", "b")
    held = consumer.poll(2)
    ids_at_the_server = [name.decode() for name in ask("HKEYS", "unacked")]
    for name in ids_at_the_server:
        ask("ZADD", "unacked_index", 1, name)
    ask("PEXPIRE", f"_miniq.alive.{consumer.owner}", 5000)
    assert consumer.ack(held[0])
    consumer.housekeep()
    ((name, score),) = zip(*[iter(ask("ZRANGE", "unacked_index", 0, -1, "WITHSCORES"))] * 2)
    assert name.decode() in ids_at_the_server
    assert float(score) > 1e9
    assert ask("PTTL", f"_miniq.alive.{consumer.owner}") > 5000


def sweep_as_celery_does(ask: Ask, older_than: float) -> int:
    """Put back what is in the index with a lower score; return how much."""
    names = ask("ZRANGEBYSCORE", "unacked_index", "-inf", older_than)
    for name in names:
        envelope, _, routing_key = json.loads(ask("HGET", "unacked", name))
        ask("ZREM", "unacked_index", name)
        ask("HDEL", "unacked", name)
        envelope["headers"]["redelivered"] = True
        envelope["properties"]["delivery_info"]["redelivered"] = True
        ask("RPUSH", routing_key, json.dumps(envelope))
    return len(names)


def test_message_swept_by_a_celery_worker_is_ours_no_more_and_comes_again(
    transport: RedisTransport, consumer: RedisConsumer, ask: Ask
) -> None:
    put_names(transport, "late", "early", "reserved", "deferred", "released")
    found = consumer.poll(5)
    found[1].early = True
    consumer.start(found[:2])
    assert sweep_as_celery_does(ask, 1e9) == 0
    assert sweep_as_celery_does(ask, 1e12) == 4
    assert not consumer.ack(found[0])
    assert consumer.ack(found[1])
    with pytest.raises(NotOurs) as caught:
        consumer.start(found[2:3])
    assert caught.value.gone == found[2:3]
    assert not consumer.defer(found[3], 1e12)
    consumer.release(found[4:])
    again = consumer.poll(9)
    assert sorted(ids(again)) == ["deferred", "late", "released", "reserved"]
    assert all(consumer.ack(delivery) for delivery in again)
    assert consumer.poll(9) == []


def test_prefix_is_before_every_key_and_channel(
    open_transport: Open, ask: Ask, clock: Clock, redis_url: str
) -> None:
    transport = open_transport(global_keyprefix="pre:")
    news = Queue("news", Exchange("news", "fanout"))
    topic = Queue("topic", Exchange("t", "topic"), "a.*", auto_delete=True)
    consumer, listener = transport.consumer("w", [WORK, topic]), transport.consumer("l", [news])
    put_names(transport, "a", "b", "c", "d", "held", "not taken")
    put_names(transport, "later", eta=to_iso(clock.now + 10))
    put(transport, message("low", 9), message("low too", 3))
    put(transport, message("x"), queue="a.b", exchange="t")
    put(transport, message("y"), queue="", exchange="news")
    transport.revoke(["b"], clock.now + 100)
    found = consumer.poll(5)
    found[0].early = True
    consumer.start(found[:2])
    assert consumer.defer(found[1], clock.now + 10)
    assert consumer.dead_letter(found[2], "why not")
    consumer.housekeep()
    assert [size.queue for size in transport.sizes()] == ["news", "topic", "work"]
    assert ids(poll_all(listener, 1)) == ["y"]
    seen = keys(ask)
    assert {"pre:unacked", "pre:unacked_index", "pre:work", "pre:_kombu.binding.t", "pre:_miniq.dead"} <= seen
    assert [key for key in seen if not key.startswith("pre:")] == []
    channel = f"/{redis_url.rpartition('/')[2]}.news"
    assert (ask("PUBLISH", channel, "x"), ask("PUBLISH", "pre:" + channel, "x")) == (0, 1)


def test_names_of_keys_can_be_chosen(open_transport: Open, ask: Ask) -> None:
    transport = open_transport(unacked_key="mine", unacked_index_key="mine_index")
    consumer = transport.consumer("w", [WORK])
    put_names(transport, "a")
    (found,) = consumer.poll(1)
    assert {"mine", "mine_index"} <= keys(ask)
    assert consumer.ack(found)


# -- order


def test_priorities_are_floored_to_the_steps_and_lower_ones_come_first(
    transport: RedisTransport, consumer: RedisConsumer, ask: Ask
) -> None:
    put(transport, *(message(str(n), n) for n in (5, 0, 9, 3, 7, 1, 8, 2, 6, 4)), message("none"))
    put(transport, message("255", 255))
    lists = ("work", "work\x06\x163", "work\x06\x166", "work\x06\x169")
    assert [ask("LLEN", key) for key in lists] == [4, 3, 3, 2]
    found = consumer.poll(20)
    assert ids(found) == ["0", "1", "2", "none", "5", "3", "4", "7", "8", "6", "9", "255"]
    assert found[-1].message.properties["priority"] == 255


def test_steps_and_separator_can_be_chosen(open_transport: Open, ask: Ask) -> None:
    transport = open_transport(priority_steps=[0, 5], sep=":")
    put(transport, message("low", 9), message("high", 4))
    assert keys(ask) == {"work", "work:5"}
    transport.declare(Queue("q", Exchange("x"), "key"))
    assert ask("SMEMBERS", "_kombu.binding.x") == [b"key::q"]
    assert ids(transport.consumer("w", [WORK]).poll(5)) == ["high", "low"]


def test_ten_thousand_that_are_not_due_do_not_hold_up_one_behind_them(
    transport: RedisTransport, consumer: RedisConsumer, clock: Clock
) -> None:
    eta = to_iso(clock.now + 3600)
    put(transport, *(message(str(n), eta=eta) for n in range(10_000)), message("plain"))
    found: List[Delivery] = []
    for _ in range(5):
        found = consumer.poll(2)
        if found:
            break
        # Otherwise the worker would wait although there is something to do.
        assert consumer.woken
    assert ids(found) == ["plain"]
    ((_, ready, waiting, unacked, *_),) = transport.sizes()
    assert (ready, waiting, unacked) == (0, 10_000, 1)
    assert consumer.next_due() == clock.now + 3600


def test_thousands_that_fall_due_together_come_out_by_due(
    transport: RedisTransport, consumer: RedisConsumer, clock: Clock
) -> None:
    numbers = list(range(1500))
    random.Random(3).shuffle(numbers)
    put(transport, *(message(str(n), eta=to_iso(clock.now + 10 + n)) for n in numbers))
    assert consumer.poll(1) == []
    clock.now += 10_000
    found: List[str] = []
    while True:
        more = consumer.poll(64)
        found += ids(more)
        if not more:
            break
    assert found == [str(n) for n in range(1500)]


# -- exchanges


def test_fanout_reaches_listeners_of_other_transports_and_nobody_else(
    open_transport: Open, redis_url: str
) -> None:
    sender, one, two = (open_transport() for _ in range(3))
    fan = Exchange("fan", "fanout")
    sender.declare(Queue("f0", fan))
    listeners = [t.consumer("l", [Queue(f"f{n}", fan)]) for n, t in enumerate((one, two), 1)]
    other = two.consumer("other", [Queue("f3", Exchange("unheard", "fanout"))])
    put(sender, message("a"), message("b"), queue="", exchange="fan")
    for listener in listeners:
        fd = listener.fileno()
        assert fd is not None
        assert select.select([fd], [], [], 10)[0]
        found = poll_all(listener, 2)
        assert ids(found) == ["a", "b"]
        assert [(d.exchange, d.fate, d.deliveries) for d in found] == [("fan", None, 0)] * 2
        listener.start(found)
        assert all(listener.ack(delivery) for delivery in found)
        assert not listener.ack(found[0])
    assert other.poll(5) == []


def test_broadcast_taken_in_a_transaction_that_fails_comes_again_once(open_transport: Open) -> None:
    transport = open_transport()
    listener = transport.consumer("l", [Queue("f", Exchange("fan", "fanout"))])
    put(transport, message("a"), message("b"), message("c"), queue="", exchange="fan")
    listener.release(poll_all(listener, 3))
    with pytest.raises(ZeroDivisionError), transport.transaction():
        found = listener.poll(3)
        listener.release(found[2:])
        raise ZeroDivisionError
    assert ids(listener.poll(9)) == ["a", "b", "c"]
    assert listener.poll(9) == []


def test_celerys_broadcast_is_heard_and_ours_goes_where_celery_listens(
    open_transport: Open, redis_server: RedisServer, redis_url: str, ask: Ask
) -> None:
    db = redis_url.rpartition("/")[2]
    transport = open_transport()
    queue = Queue("f1", Exchange("fan", "fanout"), routing_key="celery")
    listener = transport.consumer("l", [queue])
    control = CAPTURED["revoke_broadcast_1"]
    mailbox = transport.consumer("m", [Queue("w1.pidbox", Exchange("celery.pidbox", "fanout"))])
    ask("PUBLISH", control["redis_channel"].replace("/0.", f"/{db}."), json.dumps(control["redis_envelope"]))
    (found,) = poll_all(mailbox, 1)
    assert found.message.headers == control["redis_envelope"]["headers"]
    assert (found.queue, found.exchange) == ("w1.pidbox", "celery.pidbox")
    envelope = json.loads(json.dumps(CAPTURED["exchange_types_worker_1"]["redis_envelope"]))
    envelope["properties"]["delivery_info"] = {"exchange": "fan", "routing_key": "celery"}
    ask("PUBLISH", f"/{db}.fan/celery", json.dumps(envelope))
    (found,) = poll_all(listener, 1)
    assert found.message.headers == envelope["headers"]
    assert (found.queue, found.exchange, found.routing_key) == ("f1", "fan", "celery")
    ears = transport.link.server.connect(5.0)
    try:
        ears.call("PSUBSCRIBE", f"/{db}.fan/celery", f"/{db}.celery.pidbox")
        put(transport, message("a"), queue="celery", exchange="fan")
        transport.declare(Queue("box", Exchange("celery.pidbox", "fanout")))
        put(transport, message("b"), queue="", exchange="celery.pidbox")
        heard: List[Any] = []

        def has_heard_both() -> bool:
            heard.extend(push for push in ears.take_pushes() if push[0] == b"pmessage")
            return len(heard) == 2

        wait_until(has_heard_both)
        assert [push[2].decode() for push in heard] == [f"/{db}.fan/celery", f"/{db}.celery.pidbox"]
        assert json.loads(heard[0][3])["headers"]["id"] == "a"
    finally:
        ears.close()


def test_bindings_that_celery_wrote_are_followed(
    transport: RedisTransport, consumer: RedisConsumer, ask: Ask
) -> None:
    for key, members in CAPTURED["bindings"]["bindings"].items():
        ask("SADD", key, *members)
    for name, routing_key in (
        ("png", "media.image.png"),
        ("video", "media.video"),
        ("deep", "media.image.a.b"),
    ):
        put(transport, message(name), queue=routing_key, exchange="media")
    put(transport, message("direct"), queue="celery", exchange="celery")
    found = {name: ids(transport.consumer(name, [Queue(name)]).poll(9)) for name in ("img", "all", "celery")}
    assert found == {"img": ["png"], "all": ["png", "video", "deep"], "celery": ["direct"]}
    with pytest.raises(ImproperlyConfigured, match="'other'"):
        put(transport, message("lost"), queue="other", exchange="media")


# -- answers that get lost


class Cutter:
    """Has the server do a command whose answer never arrives."""

    def __init__(self, server: RedisServer, proxy: Proxy) -> None:
        self.server, self.proxy = server, proxy

    @contextmanager
    def answer_lost(self) -> Iterator[None]:
        """Within it the first command is done, and its connection breaks before the answer."""
        self.server.pause()
        before = self.proxy.up
        helper = threading.Thread(target=self._cut, args=(before,), name="cutter")
        helper.start()
        try:
            with pytest.raises(OperationalError):
                yield
        finally:
            helper.join(30)
            assert not helper.is_alive()

    def _cut(self, before: int) -> None:
        try:
            wait_until(lambda: self.proxy.up > before, 10, "a command")
            self.proxy.close()
        finally:
            self.server.resume()


@pytest.fixture
def cutter(new_redis: NewRedis) -> Iterator[Cutter]:
    server = new_redis()
    with Proxy(server.port) as proxy:
        yield Cutter(server, proxy)


@pytest.fixture
def cut_transport(cutter: Cutter, open_transport: Open) -> RedisTransport:
    return open_transport(cutter.proxy.url(cutter.server.url()), socket_timeout=30.0)


class Turns:
    """A worker's turns: settle what has run, take, start.  `ran` and `settled` are what it believes."""

    def __init__(self, cutter: Cutter, transport: RedisTransport) -> None:
        self.cutter, self.transport = cutter, transport
        self.consumer = transport.consumer("w", [WORK])
        self.running: List[Delivery] = []
        self.ran: List[str] = []
        self.settled: List[str] = []

    def turn(self, cut: str = "", early: bool = False, limit: int = 2) -> None:
        """Have one turn; `cut` is the step whose answer gets lost: claim, settle or start."""
        new: List[Delivery] = []
        done = False
        try:
            with ExitStack() as stack:
                with self.transport.transaction():
                    for delivery in self.running:
                        assert self.consumer.ack(delivery)
                    if cut == "claim" or (cut == "settle" and self.running):
                        stack.enter_context(self.cutter.answer_lost())
                    if cut != "settle":
                        new = self.consumer.poll(limit)
                        self.settled += ids(self.running)
                        self.running = []
                    for delivery in new:
                        delivery.early = early
                    self.consumer.start(new)
                    if cut == "start" and new:
                        stack.enter_context(self.cutter.answer_lost())
                done = True
        except NotOurs as error:
            assert not error.gone
            self.settled += ids(error.settled)
            self.running = [delivery for delivery in self.running if delivery not in error.settled]
            return
        if done:
            self.settled += ids(self.running)
            self.running = new
            self.ran += ids(new)

    def finish(self, wanted: List[str]) -> None:
        """Have turns until there is nothing more to do; every message ran and was settled once."""
        while self.running or self.transport.sizes()[0][1:4] != (0, 0, 0):
            before = len(self.settled), len(self.running)
            self.turn()
            assert (len(self.settled), len(self.running)) != before, "nothing moves"
        assert sorted(self.ran) == sorted(self.settled) == sorted(wanted)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("cut", ["claim", "settle", "start"])
def test_lost_answer_strands_and_repeats_nothing(
    cutter: Cutter, cut_transport: RedisTransport, cut: str, early: bool
) -> None:
    turns = Turns(cutter, cut_transport)
    names = [str(n) for n in range(8)]
    put_names(cut_transport, *names)
    turns.turn(early=early)
    assert turns.ran == names[:2]
    turns.turn(cut, early)
    assert turns.ran == names[:2]
    turns.finish(names)
    # What was taken by a step whose answer was lost is at its old place.
    assert turns.ran == names


@pytest.mark.parametrize("seed", range(3))
def test_many_lost_answers_strand_and_repeat_nothing(
    cutter: Cutter, cut_transport: RedisTransport, seed: int
) -> None:
    chance = random.Random(seed)
    turns = Turns(cutter, cut_transport)
    names = [str(n) for n in range(25)]
    put_names(cut_transport, *names)
    for _ in range(12):
        turns.turn(
            chance.choice(["", "claim", "settle", "start"]), chance.random() < 0.5, chance.randint(1, 3)
        )
    turns.finish(names)


def test_start_whose_answer_got_lost_can_be_repeated(cutter: Cutter, cut_transport: RedisTransport) -> None:
    consumer = cut_transport.consumer("w", [WORK])
    put_names(cut_transport, "early", "late")
    found = consumer.poll(2)
    found[0].early = True
    with cutter.answer_lost():
        consumer.start(found)
    consumer.start(found)
    assert consumer.poll(5) == []
    assert all(consumer.ack(delivery) for delivery in found)
    assert cutter.server.command("KEYS", "*held*") == cutter.server.command("KEYS", "unacked*") == []


def test_ack_whose_answer_got_lost_counts_as_done_the_second_time(
    cutter: Cutter, cut_transport: RedisTransport
) -> None:
    consumer = cut_transport.consumer("w", [WORK])
    put_names(cut_transport, "a")
    (found,) = consumer.poll(1)
    consumer.start([found])
    with cutter.answer_lost():
        consumer.ack(found)
    assert consumer.ack(found)
    assert not consumer.ack(found)


def test_all_connections_killed_strand_nothing(
    redis_server: RedisServer, transport: RedisTransport, consumer: RedisConsumer
) -> None:
    names = [str(n) for n in range(6)]
    put_names(transport, *names)
    held = consumer.poll(3)
    assert consumer.fileno() is not None
    redis_server.kill_clients()
    with pytest.raises(OperationalError):
        consumer.poll(1)
    more = consumer.poll(9)
    assert consumer.moved
    assert ids(held) + ids(more) == names
    assert all(consumer.ack(delivery) for delivery in (*held, *more))


def test_poll_that_fails_in_its_middle_strands_nothing(
    transport: RedisTransport, consumer: RedisConsumer, ask: Ask, clock: Clock
) -> None:
    put_names(transport, "later", eta=to_iso(clock.now + 10))
    put_names(transport, "a", "b")
    ask("SET", "_miniq.revoked", "another program's")
    for _ in range(2):
        with pytest.raises(ImproperlyConfigured, match="WRONGTYPE"):
            consumer.poll(2)
    ask("DEL", "_miniq.revoked")
    assert ids(consumer.poll(5)) == ["a", "b"]
    clock.now += 10
    assert ids(consumer.poll(5)) == ["later"]


# -- servers that refuse


def test_full_server_is_named_to_the_caller(
    new_redis: NewRedis, make_app: Callable[..., MiniQ], open_transport: Open
) -> None:
    server = new_redis()
    app = make_app(broker=server.url(), backend="disabled://")

    @app.task(name="t")
    def t() -> None:
        pass

    t.delay()
    consumer = open_transport(server.url()).consumer("w", [Queue("celery")])
    server.command("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(OperationalError, match="OOM.*memory is full"):
        t.apply_async(retry=False)
    server.command("CONFIG", "SET", "maxmemory", 0)
    t.delay()
    assert len(consumer.poll(5)) == 2


def test_cluster_is_refused_with_what_to_do(new_redis: NewRedis, open_transport: Open) -> None:
    server = new_redis(arguments=["--cluster-enabled", "yes"])
    transport = open_transport(server.url())
    with pytest.raises(ImproperlyConfigured, match="CLUSTERDOWN.*Redis Cluster, which miniq does not speak"):
        put_names(transport, "a")
    with pytest.raises(ImproperlyConfigured, match="use a single server or sentinel"):
        transport.consumer("w", [WORK])


# -- leases


def die(ask: Ask, consumer: RedisConsumer) -> None:
    """Let the lease be over, as when the worker was stopped for long."""
    assert ask("DEL", f"_miniq.alive.{consumer.owner}") == 1


def take_over(survivor: RedisConsumer, dead: RedisConsumer, ask: Ask) -> None:
    """Let the lease of the survivor go by half, until he takes the other for dead."""
    wait_until(lambda: survivor.housekeep() or not ask("EXISTS", f"_miniq.held.{dead.owner}"))


def test_worker_that_lost_its_lease_settles_nothing(
    open_transport: Open, transport: RedisTransport, consumer: RedisConsumer, ask: Ask
) -> None:
    put_names(transport, "a", "b", "c")
    survivor = open_transport(lease=0.1).consumer("survivor", [WORK])
    held = consumer.poll(3)
    consumer.start(held[:2])
    die(ask, consumer)
    take_over(survivor, consumer, ask)
    assert not consumer.ack(held[0])
    with pytest.raises(NotOurs) as caught, transport.transaction():
        put_names(transport, "follow-up")
        assert consumer.ack(held[1])
        consumer.start(held[2:])
    assert (caught.value.gone, caught.value.settled) == (held[1:], [])
    found = survivor.poll(9)
    # Nothing of the transaction was done.
    assert facts(found) == {"a": (None, "", 1), "b": (None, "", 1), "c": (None, "", 0)}
    assert all(survivor.ack(delivery) for delivery in found)
    # It is an owner again as soon as it renews its lease.
    consumer.housekeep()
    put_names(transport, "d")
    assert ids(consumer.poll(5)) == ["d"]


def test_lease_that_was_renewed_in_time_is_not_recovered(
    open_transport: Open, transport: RedisTransport, consumer: RedisConsumer, ask: Ask
) -> None:
    put_names(transport, "a")
    (found,) = consumer.poll(1)
    survivor = open_transport().consumer("survivor", [WORK])
    die(ask, consumer)
    consumer.housekeep()
    survivor.housekeep()
    assert survivor.poll(5) == []
    assert consumer.ack(found)


def test_started_messages_that_no_child_began_go_back_and_the_others_are_lost(
    open_transport: Open, consumer: RedisConsumer, transport: RedisTransport
) -> None:
    put_names(transport, "early", "early and begun", "late", "late and begun")
    dying = open_transport().consumer("dying", [WORK])
    journal = dying.start_journal()
    assert journal is not None
    found = dying.poll(4)
    for number, delivery in enumerate(found):
        delivery.early = number < 2
        delivery.token = journal.token()
    dying.start(found)
    for delivery in (found[1], found[3]):
        journal.mark(delivery.token or 0)
    # As the kernel does when the process is gone: the journal tells what will not begin any more.
    OwnerLocks.of(local_path()).drop(int(dying.owner, 16))
    consumer.housekeep()
    assert facts(consumer.poll(9)) == {
        "early": (None, "", 0),
        "early and begun": ("lost", "dying", 1),
        "late": (None, "", 0),
        "late and begun": (None, "", 1),
    }
    assert not Path(journal.path).exists()


HOLDER = """
import sys, time
from miniq.routing import Queue
from miniq.transports.redis import RedisTransport
transport = RedisTransport(sys.argv[1], {}, time.time)
consumer = transport.consumer("holder", [Queue("work")])
found = consumer.poll(3)
found[0].early = True
consumer.start(found[:2])
print("holds", *(d.message.headers["id"] for d in found), flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_workers_messages_are_back_at_once_on_the_same_machine(
    transport: RedisTransport, redis_url: str, ask: Ask
) -> None:
    put_names(transport, "early", "late", "reserved", "other")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, redis_url], env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().split() == ["holds", "early", "late", "reserved"]
        consumer = transport.consumer("survivor", [WORK])
        assert ids(consumer.poll(9)) == ["other"]
        consumer.housekeep()
        assert consumer.poll(9) == []
    finally:
        holder.kill()
        holder.communicate(timeout=30)
    (owner,) = [name.decode() for name in ask("HKEYS", "_miniq.owners") if name.decode() != consumer.owner]
    assert ask("PTTL", f"_miniq.alive.{owner}") > 0
    consumer.housekeep()
    found = consumer.poll(9)
    assert facts(found) == {
        "early": ("lost", "holder", 1), "late": (None, "", 1), "reserved": (None, "", 0)
    }  # fmt: skip
    assert all(consumer.ack(delivery) for delivery in found)
    assert ask("HKEYS", "_miniq.owners") == [consumer.owner.encode()]


# -- what is no message


def test_items_that_are_no_messages_come_out_as_garbage_and_stop_nobody(
    transport: RedisTransport, consumer: RedisConsumer, ask: Ask, clock: Clock
) -> None:
    put_names(transport, "first")
    items: List[Any] = [
        "no json", b"\xff\xfe\x00", "", "[1, 2]", '{"headers": 5, "properties": {}}', '{"headers": {}}',
        "[" * 100_000, '{"body": "*", "headers": {}, "properties": {"body_encoding": "base64"}}',
    ]  # fmt: skip
    ask("LPUSH", "work", *items)
    put_names(transport, "last")
    found = consumer.poll(100)
    fates = [delivery.fate for delivery in found]
    assert fates[0] is fates[-1] is None
    assert set(fates[1:7]) == {"garbage"}
    assert found[1].message.body == b"no json"
    garbage = [delivery for delivery in found if delivery.fate == "garbage"]
    assert consumer.reject(garbage[0], requeue=True)
    for delivery in garbage[1:]:
        clock.now += 1
        assert consumer.dead_letter(delivery, "no message")
    letter = transport.dead_letters()[-1]
    assert letter.message.body == b"\xff\xfe\x00"
    assert transport.replay(letter.id)
    again = consumer.poll(100)
    assert [(d.fate, d.message.body) for d in again] == [
        ("garbage", b"no json"), ("garbage", b"\xff\xfe\x00")
    ]  # fmt: skip

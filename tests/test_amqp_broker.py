# SPDX-License-Identifier: MIT
"""What is particular to RabbitMQ as the broker: its exchanges and arguments, its clock, its refusals."""

from __future__ import annotations

import logging
import os
import time
import warnings
from contextlib import suppress
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from patience import Patient, PatientTransport, wait_until_gone
from servers import RabbitServer
from waiting import wait_until

from miniq.connections.amqp import Server
from miniq.exceptions import ImproperlyConfigured, OperationalError
from miniq.message import Delivery, Message
from miniq.routing import Binding, Broadcast, Exchange, Queue
from miniq.times import to_iso
from miniq.transports.amqp_consumer import AmqpConsumer
from miniq.transports.amqp_delay import ENTRANCE, routing_key
from miniq.transports.base import Publication

WORK = Queue("work")
QUORUM = {"x-queue-type": "quorum"}
NO_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
#: Holds what is not due in the consumer, but what is due later than this real time allows.
LONG = 3600.0

Open = Callable[..., PatientTransport]


@pytest.fixture
def vhost(rabbit_url: str) -> str:
    return rabbit_url.rpartition("/")[2]


@pytest.fixture
def open_transport(rabbit_url: str) -> Iterator[Open]:
    """Open transports: ``open_transport(url=rabbit_url, wall=time.time, **transport options)``."""
    opened: List[PatientTransport] = []

    def new(url: str = rabbit_url, wall: Callable[[], float] = time.time, **options: Any) -> PatientTransport:
        transport = PatientTransport(url, options, wall)
        opened.append(transport)
        return transport

    yield new
    for transport in reversed(opened):
        transport.close()
    Server.close_all()


@pytest.fixture
def transport(open_transport: Open) -> PatientTransport:
    transport = open_transport()
    transport.declare(WORK)
    return transport


@pytest.fixture
def consumer(transport: PatientTransport) -> Patient:
    return transport.consumer("one@host", [WORK])


@pytest.fixture(scope="module")
def strict_rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A server that waits two seconds for an acknowledgement, takes no large messages, and is blocked."""
    settings = {"consumer_timeout": 2000, "max_message_size": 100_000}
    with RabbitServer(tmp_path_factory.mktemp("strict"), settings) as server:
        yield server
        server.kill()


def message(task_id: str, body: bytes = b"body", properties: Any = None, **headers: Any) -> Message:
    headers = {"task": "t", "id": task_id, **headers}
    return Message(body, "application/json", "utf-8", headers, dict(properties or {}))


def put(transport: PatientTransport, *messages: Message, queue: str = "work", exchange: str = "") -> None:
    transport.publish([Publication(message, exchange, queue) for message in messages], 10.0)


def put_names(transport: PatientTransport, *names: str, **headers: Any) -> None:
    put(transport, *(message(name, **headers) for name in names))


def ids(deliveries: List[Delivery]) -> List[str]:
    return [delivery.message.headers["id"] for delivery in deliveries]


def until(consumer: Patient, count: int, timeout_s: float = 20.0) -> List[Delivery]:
    """Poll until so many have come."""
    found: List[Delivery] = []

    def has_all() -> bool:
        consumer.housekeep()
        found.extend(consumer.poll(count - len(found)))
        return len(found) == count

    wait_until(has_all, timeout_s, lambda: f"{count} messages, got {ids(found)}", 0.05)
    return found


class Places:
    """How many messages there are in each queue of a virtual host, held ones too."""

    def __init__(self, server: RabbitServer, vhost: str) -> None:
        self.server, self.vhost = server, vhost

    def rows(self) -> Dict[str, Dict[str, Any]]:
        return self.server.queues(self.vhost)

    def now(self) -> Dict[str, int]:
        rows = self.rows().items()
        return {name: row["messages"] for name, row in rows if row["messages"] and row["type"] != "stream"}

    def wait(self, **wanted: int) -> None:
        wait_until(lambda: self.now() == wanted, 10, self.now)

    def wait_held(self, ready: int, held: int) -> None:
        wait_until(lambda: self.held() == (ready, held), 10, self.held)

    def held(self, queue: str = "work") -> Tuple[int, int]:
        """Return how many are ready and how many somebody has."""
        row = self.rows()[queue]
        return row["messages_ready"], row["messages_unacknowledged"]


@pytest.fixture
def places(rabbit_server: RabbitServer, vhost: str) -> Places:
    return Places(rabbit_server, vhost)


# -- exchanges


def test_exchanges_of_all_types_lead_to_the_queues_that_are_bound(
    transport: PatientTransport, places: Places
) -> None:
    topic, fanout = Exchange("logs", "topic"), Exchange("news", "fanout")
    colours = Exchange("colours", "headers")
    queues = [
        Queue("errors", topic, "*.error"),
        Queue("all", topic, "#", bindings=[Binding(fanout)]),
        Queue("red", colours, binding_arguments={"x-match": "all", "colour": "red", "size": 3}),
        Queue("any", colours, binding_arguments={"x-match": "any", "colour": "red", "size": 3}),
    ]
    for queue in queues:
        transport.declare(queue)
    put(transport, message("1"), exchange="logs", queue="disk.error")
    put(transport, message("2"), exchange="logs", queue="disk.info")
    put(transport, message("3"), exchange="news", queue="whatever")
    put(transport, message("4", colour="red", size=3), exchange="colours", queue="")
    put(transport, message("5", colour="red", size=4), exchange="colours", queue="")
    places.wait(errors=1, all=3, red=1, any=2)
    found = transport.consumer("w", queues[:1]).poll(3)
    assert [(d.queue, d.exchange, d.routing_key) for d in found] == [("errors", "logs", "disk.error")]
    with pytest.raises(ImproperlyConfigured, match="exchange 'colours'"):
        put(transport, message("6", colour="blue"), exchange="colours", queue="")


def test_every_worker_gets_what_is_broadcast_and_its_queue_goes_with_it(
    transport: PatientTransport, places: Places
) -> None:
    workers = [transport.consumer(f"w{n}", [WORK, Broadcast("news")]) for n in range(3)]
    put(transport, message("a"), exchange="news", queue="")
    for worker in workers:
        (found,) = until(worker, 1)
        assert (ids([found]), found.exchange) == (["a"], "news")
        assert worker.ack(found)
        worker.close()
    wait_until(lambda: not [name for name in places.rows() if name.startswith("news.")], 10)


def test_exchange_that_was_deleted_is_declared_again_at_the_next_publish(
    transport: PatientTransport, consumer: Patient, places: Places
) -> None:
    transport.declare(Queue("bound", Exchange("mine", "topic"), "a.#"))
    with transport.link.channel() as channel:
        channel.call("exchange.delete", exchange="mine")
    # Its bindings are gone with it.
    with pytest.raises(ImproperlyConfigured, match="exchange 'mine'"):
        put(transport, message("a"), exchange="mine", queue="a.b")
    transport.link.declared.clear()
    transport.declare(Queue("bound", Exchange("mine", "topic"), "a.#"))
    put(transport, message("a"), exchange="mine", queue="a.b")
    places.wait(bound=1)


def test_control_message_that_nobody_takes_is_no_error(transport: PatientTransport) -> None:
    control = Message(b"{}", "application/json", "utf-8", {}, {})
    put(transport, control, exchange="celery.pidbox", queue="")
    put(transport, control, queue="the reply queue of somebody who is gone")


# -- what is declared


def test_arguments_reach_the_server_and_others_are_refused(
    transport: PatientTransport, places: Places
) -> None:
    queue = Queue(
        "full", max_priority=7, message_ttl=60, expires=300, max_length=10, max_length_bytes=1000,
        queue_arguments={"x-overflow": "reject-publish"},
    )  # fmt: skip
    transport.declare(queue)
    assert places.rows()["full"]["arguments"] == {
        "x-max-priority": 7, "x-message-ttl": 60000, "x-expires": 300000, "x-max-length": 10,
        "x-max-length-bytes": 1000, "x-overflow": "reject-publish",
    }  # fmt: skip
    with pytest.raises(ImproperlyConfigured, match="queue 'full'.*406.*'x-max-priority'.*other arguments"):
        transport.declare(queue.replace(max_priority=8))
    transport.declare(Queue("bound", Exchange("mine"), "key"))
    with pytest.raises(ImproperlyConfigured, match="exchange 'mine'.*406.*'type'.*other arguments"):
        transport.declare(Queue("too", Exchange("mine", "topic"), "key"))
    with pytest.raises(ImproperlyConfigured, match="queue 'work'"):
        transport.consumer("w", [WORK.replace(max_priority=3)])
    # What was refused did no harm.
    put_names(transport, "a")


def test_rejected_and_expired_messages_go_to_the_dead_letter_exchange_of_their_queue(
    transport: PatientTransport, places: Places
) -> None:
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "graveyard"}
    queue = Queue("mortal", message_ttl=0.3, queue_arguments=arguments)
    transport.declare(Queue("graveyard"))
    consumer = transport.consumer("w", [queue])
    put(transport, message("rejected"), message("acked"), message("early"), queue="mortal")
    rejected, acked, early = consumer.poll(3)
    early.early = True
    consumer.start([rejected, acked, early])
    assert consumer.reject(rejected, requeue=False, reason="no good")
    assert not consumer.reject(rejected, requeue=False)
    assert consumer.ack(acked)
    # What the server does not have any more is set aside here.
    assert consumer.reject(early, requeue=False, reason="no good")
    put(transport, message("expired"), queue="mortal")
    places.wait(graveyard=2, **{"_miniq.dead": 1})
    found = transport.consumer("g", [Queue("graveyard")]).poll(5)
    assert ids(found) == ["rejected", "expired"]
    assert "x-death" not in found[0].message.headers
    assert [letter.message.headers["id"] for letter in transport.dead_letters()] == ["early"]


# -- queues that are deleted


def test_queue_deleted_under_its_consumer_is_declared_again_and_others_go_on(
    transport: PatientTransport,
    places: Places,
    rabbit_server: RabbitServer,
    vhost: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    consumer = transport.consumer("w", [WORK, Queue("other")])
    put(transport, message("runs"), queue="other")
    found = consumer.poll(2)
    consumer.start(found)
    rabbit_server.delete_queue("work", vhost)
    wait_until(lambda: consumer.kept_up() and "work" in places.rows(), 10)
    assert "queue work was deleted" in caplog.text
    put_names(transport, "a")
    assert ids(until(consumer, 1)) == ["a"]
    assert consumer.ack(found[0])
    places.wait(work=1)


@pytest.mark.parametrize("arguments", [None, QUORUM], ids=["classic", "quorum"])
def test_queue_deleted_before_a_publish_is_declared_again_and_nothing_is_lost(
    transport: PatientTransport,
    places: Places,
    rabbit_server: RabbitServer,
    vhost: str,
    caplog: pytest.LogCaptureFixture,
    arguments: Optional[Dict[str, str]],
) -> None:
    queue = Queue("mine", queue_arguments=arguments)
    transport.declare(queue)
    put(transport, message("later", eta=to_iso(time.time() + LONG)), queue="mine")
    rabbit_server.delete_queue("mine", vhost)
    put(transport, message("a"), message("b"), queue="mine")
    assert "queue mine was deleted; it is declared again" in caplog.text
    wait_until(lambda: places.now().get("mine") == 2, 10, places.now)
    # What was put off before would still find it.
    bindings = rabbit_server.eval(
        f'[Key || {{binding, {{resource, _, exchange, <<"_miniq.due">>}}, Key, _, _}} <-'
        f' rabbit_binding:list(<<"{vhost}">>)]'
    )
    assert bindings == ([] if arguments is None else ["mine"])


# -- messages that are not due


def test_messages_wait_in_the_server_and_come_out_when_they_are_due(
    open_transport: Open, places: Places
) -> None:
    transport = open_transport(hold=0.5)
    queues = [WORK, Queue("safe", queue_arguments=QUORUM)]
    consumer = transport.consumer("w", queues)
    due: Dict[str, float] = {}
    for queue in queues:
        for countdown_s in (0.2, 1.4, 3.3):
            name = f"{queue.name} {countdown_s}"
            due[name] = time.time() + countdown_s
            put(transport, message(name, eta=to_iso(due[name])), queue=queue.name)
    # As a Celery client sends to a quorum queue.
    due["native"] = time.time() + 2
    put(transport, message("native"), exchange=ENTRANCE, queue=routing_key(2.5, "safe"))
    # 3.3 s: two of them there, and then once more one second.
    assert {"_miniq.delay.1", "_miniq.delay.2", "_miniq.delay.quorum.2"} <= places.rows().keys()
    came: Dict[str, float] = {}

    def all_came() -> bool:
        for delivery in consumer.poll(9):
            came[ids([delivery])[0]] = time.time()
            assert delivery.routing_key == delivery.queue
            assert not delivery.redelivered and "x-death" not in delivery.message.headers
            assert consumer.ack(delivery)
        return came.keys() == due.keys()

    wait_until(all_came, 20, lambda: f"{due.keys() - came.keys()} in {places.now()}")
    for name, moment in due.items():
        assert came[name] >= moment - 0.01, name
    places.wait()


def put_by_stranger(transport: PatientTransport, *names: str, eta: float) -> None:
    """Publish to the queue itself, as a client does that holds nothing back."""
    with transport.link.server.borrow(5.0) as connection:
        items = [
            ("", "work", {"delivery_mode": 2}, {"task": "t", "id": name, "eta": to_iso(eta)}, b"", True)
            for name in names
        ]
        assert connection.publisher().publish(items, 5.0) == [None] * len(names)


def test_message_of_a_stranger_that_is_not_due_for_long_goes_to_where_it_waits(
    transport: PatientTransport, consumer: Patient, places: Places
) -> None:
    put_by_stranger(transport, "later", "too", eta=time.time() + LONG)
    put_names(transport, "now")
    assert ids(until(consumer, 1)) == ["now"]
    places.wait(work=1, **{"_miniq.delay.2048": 2})


class Died(BaseException):
    """A process ends."""


@pytest.mark.parametrize("survives", [True, False])
def test_worker_that_breaks_between_copy_and_acknowledgement_loses_nothing(
    transport: PatientTransport,
    consumer: Patient,
    places: Places,
    rabbit_server: RabbitServer,
    monkeypatch: pytest.MonkeyPatch,
    survives: bool,
) -> None:
    send = transport.link.send_now

    def send_and_break(*args: Any) -> None:
        monkeypatch.undo()
        send(*args)
        consumer.drop_connection()
        if not survives:
            raise Died

    monkeypatch.setattr(transport.link, "send_now", send_and_break)
    put_by_stranger(transport, "later", eta=time.time() + LONG)
    if survives:
        # It knows what it has put off, and acknowledges it when it comes again.
        wait_until(lambda: consumer.poll(1) or places.now() == {"_miniq.delay.2048": 1}, 10, places.now)
    else:
        with pytest.raises(Died):
            consumer.poll(1)
        assert places.now()["_miniq.delay.2048"] == 1
        wait_until_gone(rabbit_server, consumer.node)
        other = transport.consumer("other", [WORK])
        wait_until(lambda: other.poll(1) or places.now() == {"_miniq.delay.2048": 2}, 10, places.now)


def test_where_messages_wait_is_declared_again_when_it_was_deleted(
    transport: PatientTransport, places: Places
) -> None:
    later = message("later", eta=to_iso(time.time() + LONG))
    put(transport, later)
    for kind in ("queue", "exchange"):
        with transport.link.channel() as channel:
            channel.call(f"{kind}.delete", None, **{kind: "_miniq.delay.2048"})
        with pytest.raises(OperationalError, match="wait to be due (is|are) gone"):
            put(transport, later)
        put(transport, later)
    assert places.now()["_miniq.delay.2048"] >= 1


# -- refusals

#: The second one has room.
KEYS_OF_THREE = [("b", "full"), ("c", "work"), ("d", "full")]


def test_message_to_a_full_queue_is_refused(transport: PatientTransport, places: Places) -> None:
    arguments = {"x-overflow": "reject-publish"}
    transport.declare(Queue("full", max_length=1, queue_arguments=arguments))
    put(transport, message("a"), queue="full")
    with pytest.raises(OperationalError, match="refused 2 of 3 messages .*'full'"):
        transport.publish([Publication(message(name), "", key) for name, key in KEYS_OF_THREE], 5.0)
    places.wait(full=1, work=1)


def test_unroutable_key_is_refused_by_name(transport: PatientTransport) -> None:
    transport.declare(Queue("q", Exchange("direct"), "right"))
    with pytest.raises(ImproperlyConfigured, match="exchange 'direct'.*for 'wrong'"):
        put(transport, message("a"), exchange="direct", queue="wrong")
    put(transport, message("a"), exchange="direct", queue="right")


def test_accepted_messages_are_not_sent_again_when_their_transaction_is_repeated(
    transport: PatientTransport, consumer: Patient, places: Places
) -> None:
    put_names(transport, "runs")
    (found,) = consumer.poll(1)
    consumer.start([found])
    good = [Publication(message(f"good {n}"), "", "work") for n in range(3)]
    bad = Publication(message("bad"), "", "missing")
    for _ in range(3):
        with pytest.raises(ImproperlyConfigured, match="'missing'"), transport.transaction():
            transport.publish([good[0], bad, *good[1:]], 5.0)
            assert consumer.reject(found, requeue=True)
    with transport.transaction():
        transport.publish(good, 5.0)
        assert consumer.reject(found, requeue=True)
    places.wait(work=4)
    assert ids(consumer.poll(9)) == ["good 0", "good 1", "good 2", "runs"]


def test_message_that_is_too_large_is_refused(strict_rabbit: RabbitServer, open_transport: Open) -> None:
    transport = open_transport(strict_rabbit.url())
    transport.declare(WORK)
    with pytest.raises(OperationalError, match="message size 200000 is larger than.*100000"):
        put(transport, message("a", b"x" * 200_000))
    put(transport, message("a", b"x" * 90_000))
    assert transport.purge("work") == 1


def test_server_that_is_short_of_memory_refuses_at_the_deadline_and_takes_messages_later(
    strict_rabbit: RabbitServer, open_transport: Open
) -> None:
    transport = open_transport(strict_rabbit.url())
    transport.declare(WORK)
    put_names(transport, "before")
    consumer = transport.consumer("w", [WORK])
    strict_rabbit.raise_memory_alarm()
    try:
        for _ in range(2):
            begun_mono = time.monotonic()
            with pytest.raises(OperationalError, match="blocked by the server.*low on memory"):
                transport.publish([Publication(message("blocked"), "", "work")], 0.5)
            assert time.monotonic() - begun_mono < 5
        # Who consumes is served.
        (found,) = wait_until(partial(AmqpConsumer.poll, consumer, 1), 10)
        assert ids([found]) == ["before"]
        consumer.start([found])
        assert consumer.ack(found)
    finally:
        strict_rabbit.clear_memory_alarm()
    put_names(transport, "after")
    # What was sent just before the server said that it is blocked may have arrived.
    assert "after" in ids(consumer.poll(5))
    transport.purge("work")


# -- how many are taken


def test_worker_that_is_busy_holds_no_more_than_it_runs(
    transport: PatientTransport, consumer: Patient, places: Places
) -> None:
    put_names(transport, *"abcdef")
    found = consumer.poll(2)
    consumer.start(found)
    places.wait_held(4, 2)
    consumer.housekeep()
    # A slot is free after a while.
    consumer._satisfied_mono -= 10
    with transport.transaction():
        assert consumer.ack(found[0])
        more = consumer.poll(1)
        consumer.start(more)
    assert ids(more) == ["c"]
    consumer.catch_up()
    places.wait_held(3, 2)
    with transport.transaction():
        assert consumer.ack(found[1])
    consumer.catch_up()
    places.wait_held(3, 1)


def test_worker_that_is_quick_has_some_ahead_and_what_is_not_wanted_goes_back(
    transport: PatientTransport, consumer: Patient, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However slow this machine is.
    monkeypatch.setattr("miniq.transports.amqp_consumer.QUICK_S", 10.0)
    names = [f"{n:03}" for n in range(100)]
    put_names(transport, *names)
    done = []
    for _ in range(10):
        with transport.transaction():
            found = consumer.poll(2)
            consumer.start(found)
        with transport.transaction():
            assert all(consumer.ack(delivery) for delivery in found)
        done += ids(found)
    assert done == names[:20]
    consumer.catch_up()
    wait_until(lambda: sum(places.held()) == 80, 10, places.held)
    ready, ahead = places.held()
    assert 10 <= ahead <= 40
    # All in one acknowledgement, most of the time: the server is not told of each.
    wait_until(lambda: consumer.kept_up() and places.held() == (80, 0), 10, places.held, 0.1)
    other = transport.consumer("other", [WORK])
    found = other.poll(80)
    assert ids(found) == names[20:]
    assert [delivery.deliveries for delivery in found] == [1] * ahead + [0] * ready


def test_worker_that_does_not_poll_any_more_gives_back_what_comes(
    transport: PatientTransport, consumer: Patient
) -> None:
    assert consumer.poll(4) == []
    put_names(transport, "a", "b")
    other = transport.consumer("other", [WORK])

    def found() -> List[Delivery]:
        consumer.housekeep()
        return other.poll(5)

    assert ids(wait_until(found, 10, "they went back", 0.1)) == ["a", "b"]
    # It has nothing to do with what comes later either.
    put_names(transport, "c")
    assert ids(other.poll(5)) == ["c"]


def test_many_are_acknowledged_together_and_what_runs_stays(
    transport: PatientTransport, consumer: Patient, places: Places
) -> None:
    put_names(transport, *(str(n) for n in range(20)))
    found = consumer.poll(20)
    consumer.start(found)
    with transport.transaction():
        assert all(consumer.ack(delivery) for delivery in (*found[:9], found[10], found[15]))
    consumer.catch_up()
    places.wait_held(0, 9)
    for delivery in [found[9], *found[11:15], *found[16:]]:
        assert consumer.ack(delivery)
    consumer.catch_up()
    places.wait_held(0, 0)


# -- lines that break


def test_messages_of_running_tasks_join_their_runs_when_all_connections_were_closed(
    transport: PatientTransport, consumer: Patient, places: Places, rabbit_server: RabbitServer
) -> None:
    put_names(transport, *"abcdef")
    found = consumer.poll(3)
    found[2].early = True
    consumer.start(found)
    rabbit_server.close_connections()
    wait_until(partial(is_joined, consumer, 2), 20)
    assert consumer.moved
    # The slot that is free is not taken by what runs here.
    more = consumer.poll(1)
    assert (ids(more), more[0].redelivered) == (["d"], False)
    consumer.start(more)
    assert all(consumer.ack(delivery) for delivery in (*found, *more))
    consumer.catch_up()
    places.wait(work=2)


def test_last_step_of_what_replaced_a_task_is_not_taken_for_that_task_which_has_ended(
    transport: PatientTransport, consumer: Patient, places: Places
) -> None:
    put(transport, message("x"))
    (replaced,) = consumer.poll(1)
    consumer.start([replaced])
    assert consumer.ack(replaced)
    # The step has the id of the task whose acknowledgement may still be lost with the connection.
    assert consumer.poll(1) == []
    put(transport, message("x", parent_id="first step"))
    wait_until(lambda: places.held() == (0, 1), 10, places.held)
    consumer.drop_connection()
    (again,) = until(consumer, 1)
    assert (ids([again]), again.redelivered) == (["x"], True)
    assert again.message.headers["parent_id"] == "first step"
    consumer.start([again])
    assert consumer.ack(again)
    consumer.catch_up()
    places.wait()


def is_joined(consumer: Patient, count: int) -> bool:
    with suppress(OperationalError):
        consumer.housekeep()
    return not consumer._orphans and sum(held.started for held in consumer._unsettled.values()) == count


def test_slots_that_are_free_get_messages_while_another_worker_has_one_that_runs_here(
    transport: PatientTransport, consumer: Patient, places: Places, rabbit_server: RabbitServer
) -> None:
    put_names(transport, "a")
    (runs,) = consumer.poll(3)
    consumer.start([runs])
    consumer.drop_connection()
    wait_until_gone(rabbit_server, consumer.node)
    other = transport.consumer("other", [WORK])
    (twice,) = other.poll(1)
    assert (ids([twice]), twice.redelivered) == (["a"], True)
    other.start([twice])
    assert consumer.poll(2) == []
    for _ in range(3):
        # Time for it to ask for what runs here.
        consumer._seek_mono = 0.0
        consumer.housekeep()
        time.sleep(0.6)
    consumer.housekeep()
    put_names(transport, "b")
    wait_until(lambda: consumer.changed() or consumer.woken, 10)
    assert ids(consumer.poll(2)) == ["b"]
    assert consumer.ack(runs) and other.ack(twice)


def test_worker_that_asks_for_what_runs_there_does_not_pile_up_what_others_could_run(
    transport: PatientTransport,
    consumer: Patient,
    places: Places,
    rabbit_server: RabbitServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("miniq.transports.amqp_consumer.QUICK_S", 0.0)
    put_names(transport, "x", "y", "z")
    runs = consumer.poll(4)
    consumer.start(runs)
    consumer.drop_connection()
    wait_until_gone(rabbit_server, consumer.node)
    other = transport.consumer("other", [WORK])
    other.start(other.poll(3))
    names = [f"{n:02}" for n in range(60)]
    put_names(transport, *names)
    done = []
    for _ in range(30):
        (found,) = until(consumer, 1)
        with transport.transaction():
            consumer.start([found])
        done += ids([found])
        assert consumer.ack(found)
    assert done == names[:30]
    consumer.catch_up()
    wait_until(lambda: sum(places.held()) == 33, 10, places.held)
    held = places.held()[1]
    # Three has the other; some are ahead or on their way here, and not more with each turn.
    assert held < 12


def test_channel_closed_by_consumer_timeout_while_a_task_runs_joins_its_run(
    strict_rabbit: RabbitServer, open_transport: Open, caplog: pytest.LogCaptureFixture
) -> None:
    vhost = strict_rabbit.new_vhost()
    transport, places = open_transport(strict_rabbit.url(vhost)), Places(strict_rabbit, vhost)
    consumer = transport.consumer("w", [WORK])
    put_names(transport, "long")
    (long,) = consumer.poll(1)
    consumer.start([long])
    for _ in range(2):
        epoch = consumer._epoch

        def is_closed(before: int = epoch) -> bool:
            consumer.housekeep()
            return consumer._epoch > before

        wait_until(is_closed, 30, "the server closes the channel", 0.05)
        wait_until(partial(is_joined, consumer, 1), 10, "the message joins its run", 0.05)
        assert consumer.poll(0) == []
    assert consumer.ack(long)
    consumer.catch_up()
    places.wait()
    told = [record for record in caplog.records if "consumer_timeout" in record.message]
    assert len(told) == 1
    assert "The 1 tasks that run go on" in told[0].message


def test_lost_acknowledgements_are_repeated_when_the_messages_come_again(
    transport: PatientTransport, consumer: Patient, places: Places
) -> None:
    put_names(transport, "late", "early", "running", "refused", "requeued")
    found = {delivery.message.headers["id"]: delivery for delivery in consumer.poll(5)}
    found["early"].early = True
    consumer.start(list(found.values()))
    # The server takes no acknowledgement after one that is wrong.
    consumer._connected().ack(1_000_000)
    with transport.transaction():
        assert consumer.ack(found["late"]) and consumer.ack(found["early"])
        assert consumer.reject(found["refused"], requeue=False)
        assert consumer.reject(found["requeued"], requeue=True)

    def all_ended() -> bool:
        with suppress(OperationalError):
            assert [d for d in consumer.poll(1) if d.message.headers["id"] != "requeued"] == []
        return places.now() == {"work": 2, "_miniq.dead": 1}

    wait_until(all_ended, 20, places.now)
    assert consumer.ack(found["running"])
    assert not consumer.ack(found["late"])


def test_messages_without_an_id_are_not_taken_for_each_other(
    transport: PatientTransport, consumer: Patient, rabbit_server: RabbitServer
) -> None:
    bare = [Message(body, "application/json", "utf-8", {}, {}) for body in (b"one", b"two")]
    put(transport, *bare)
    put(transport, message("odd", retries={"a": 1}))
    found = consumer.poll(3)
    consumer.start(found)
    assert consumer.ack(found[0])
    consumer.catch_up()
    consumer.drop_connection()
    wait_until_gone(rabbit_server, consumer.node)
    wait_until(lambda: len(consumer._orphans) == 0 or consumer.poll(1), 10)
    assert [delivery.message.body for delivery in consumer.poll(3)] in ([], [b"two"])


# -- notes


def test_revocations_reach_consumers_that_start_later_and_those_that_run(open_transport: Open) -> None:
    first, second = open_transport(), open_transport()
    running = second.consumer("running", [WORK])
    first.revoke(["a"], time.time() + 100)
    first.revoke(["over"], time.time() - 1)
    with pytest.raises(ZeroDivisionError), first.transaction():
        first.revoke(["undone"], time.time() + 100)
        raise ZeroDivisionError
    with first.transaction():
        first.revoke(["b"], time.time() + 100)
    later = open_transport().consumer("later", [WORK])
    assert later.notes is not None and running.notes is not None
    assert later.notes.revoked.keys() == {"a", "b"}
    notes = running.notes
    wait_until(lambda: running.kept_up() and notes.revoked.keys() == {"a", "b"}, 10)
    put_names(first, "b", "c")
    assert [delivery.fate for delivery in running.poll(2)] == ["revoked", None]


def test_notes_go_on_where_they_ended_when_the_line_broke(open_transport: Open) -> None:
    transport = open_transport()
    consumer = transport.consumer("w", [WORK])
    for name in ("a", "b", "c"):
        open_transport().revoke([name], time.time() + 100)
        consumer.drop_connection()
        notes = consumer.notes
        assert notes is not None
        wait_until(partial(knows, consumer, name), 10)


def knows(consumer: Patient, task_id: str) -> bool:
    with suppress(OperationalError):
        consumer.housekeep()
    return consumer.notes is not None and consumer.notes.is_revoked(task_id)


@pytest.mark.parametrize("allowed", ["configure", "read", "write"])
def test_worker_that_may_not_use_the_notes_goes_on_without(
    rabbit_server: RabbitServer,
    vhost: str,
    open_transport: Open,
    caplog: pytest.LogCaptureFixture,
    allowed: str,
) -> None:
    caplog.set_level(logging.INFO)
    user = f"user-{vhost}-{allowed}"
    rabbit_server.add_user(user, "secret")
    not_notes = "^(?!_miniq[.]notes).*"
    rights = {name: ".*" if name == allowed else not_notes for name in ("configure", "read", "write")}
    rabbit_server.set_permissions(user, vhost, **rights)
    transport = open_transport(rabbit_server.url(vhost, user, "secret"))
    consumer = transport.consumer("w", [WORK])
    assert "notes" in caplog.text
    transport.revoke(["b"], time.time() + 100)
    put_names(transport, "a", "b")
    found = consumer.poll(2)
    assert [delivery.fate for delivery in found] == [None, "revoked"]
    consumer.start(found[:1])
    consumer.drop_connection()
    wait_until_gone(rabbit_server, "w")
    wait_until(partial(is_joined, consumer, 1), 10)
    assert consumer.ack(found[0])
    (again,) = consumer.poll(1)
    # A start of what came again is not noted, and starts all the same.
    consumer.start([again])
    assert consumer.ack(again)


# -- dead letters


def test_dead_letters_are_listed_replayed_and_dropped_by_two_readers(
    transport: PatientTransport, consumer: Patient, open_transport: Open, places: Places
) -> None:
    put_names(transport, *"abcdef")
    for found in consumer.poll(6):
        assert consumer.dead_letter(found, f"no {found.message.headers['id']}")
    second = open_transport()
    letters = transport.dead_letters()
    assert [letter.id for letter in second.dead_letters()] == [letter.id for letter in letters]
    assert [letter.reason for letter in letters] == [f"no {name}" for name in "fedcba"]
    assert second.replay(letters[0].id)
    assert transport.drop(letters[1].id)
    assert not transport.replay(letters[0].id) and not second.drop(letters[1].id)
    with pytest.raises(ImproperlyConfigured, match="'work'"):
        with transport.link.channel() as channel:
            channel.call("queue.delete", queue="work")
        second.replay(letters[2].id)
    # It is not lost by that.
    assert [letter.reason for letter in second.dead_letters()] == [f"no {name}" for name in "dcba"]
    assert transport.replay(letters[2].id)
    places.wait(work=1, **{"_miniq.dead": 3})


# -- forks


def in_child(work: Callable[[], Any]) -> None:
    """Run `work` in a forked child; its exit code tells whether it raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads, from 3.12 on
        pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


@NO_FORK
def test_forked_child_publishes_and_consumes_over_lines_of_its_own(
    transport: PatientTransport, consumer: Patient, places: Places
) -> None:
    put_names(transport, "before")
    (found,) = consumer.poll(1)
    consumer.start([found])

    def child() -> None:
        transport.declare(WORK)
        put_names(transport, "from the child")
        other = transport.consumer("child", [WORK])
        (got,) = other.poll(1)
        other.start([got])
        assert other.ack(got)
        put_names(transport, "too")
        transport.close()

    in_child(child)
    # The parent's line has not noticed anything.
    epoch = consumer._epoch
    assert consumer.ack(found)
    assert ids(consumer.poll(2)) == ["too"]
    assert consumer._epoch == epoch
    put_names(transport, "after")
    assert ids(consumer.poll(2)) == ["after"]
    places.wait(work=2)

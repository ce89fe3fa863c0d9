# SPDX-License-Identifier: MIT
"""What every transport must do.  A new store is one subclass of `TransportSuite` with two methods."""

from __future__ import annotations

import random
import select
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest

from miniq.exceptions import ImproperlyConfigured
from miniq.message import Delivery, Message
from miniq.routing import Binding, Exchange, Queue
from miniq.times import to_iso
from miniq.transports.base import Consumer, Publication, Transport, pause_after_loss_s, transport_class

WORK = Queue("work")
OTHER = Queue("other")


class Clock:
    """Epoch seconds that move only when told."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Steady(random.Random):
    """Chance without chance."""

    def random(self) -> float:
        return 0.5


def message(
    task_id: str, priority: Optional[int] = None, eta: Optional[float] = None, **headers: Any
) -> Message:
    fields: Dict[str, Any] = {
        "task": "t",
        "id": task_id,
        "eta": None if eta is None else to_iso(eta),
        **headers,
    }
    properties: Dict[str, Any] = {} if priority is None else {"priority": priority}
    return Message(f"body of {task_id}".encode(), "application/json", "utf-8", fields, properties)


def ids(deliveries: List[Delivery]) -> List[str]:
    return [delivery.message.headers["id"] for delivery in deliveries]


class Boom(Exception):
    """What a test raises to leave a transaction."""


class TransportSuite:
    """The suite; `url` names an empty broker, `lose` lets a worker die."""

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    def lose(self, transport: Transport, consumer: Consumer) -> None:
        """Let the consumer's worker be dead as far as the broker can tell."""
        raise NotImplementedError

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def open_transport(self, url: str, clock: Clock) -> Iterator[Callable[[], Transport]]:
        opened: List[Transport] = []

        def new() -> Transport:
            transport = transport_class(url)(url, {}, clock)
            opened.append(transport)
            return transport

        yield new
        for transport in reversed(opened):
            transport.close()

    @pytest.fixture
    def transport(self, open_transport: Callable[[], Transport]) -> Transport:
        transport = open_transport()
        transport.declare(WORK)
        return transport

    @pytest.fixture
    def consumer(self, transport: Transport) -> Consumer:
        return self.new_consumer(transport, "one@host", WORK)

    def new_consumer(self, transport: Transport, node: str, *queues: Queue) -> Consumer:
        consumer = transport.consumer(node, queues)
        setattr(consumer, "random", Steady())  # noqa: B010 - not part of the seam
        return consumer

    def put(self, transport: Transport, *messages: Message, queue: str = "work", exchange: str = "") -> None:
        transport.publish([Publication(message, exchange, queue) for message in messages], 5.0)

    # -- carrying

    def test_message_comes_out_as_it_went_in(self, transport: Transport, consumer: Consumer) -> None:
        sent = message("a", 3, custom={"deep": [1, None, "ü"]})
        sent.properties["correlation_id"] = "a"
        self.put(transport, sent)
        (found,) = consumer.poll(10)
        assert found.message.headers == sent.headers
        assert found.message.properties == sent.properties
        assert (found.message.body, found.message.content_type) == (sent.body, sent.content_type)
        assert (found.queue, found.exchange, found.routing_key) == ("work", "", "work")
        assert (found.deliveries, found.fate, found.info["redelivered"]) == (0, None, False)

    def test_polled_message_is_not_polled_again(self, transport: Transport, consumer: Consumer) -> None:
        self.put(transport, message("a"), message("b"))
        assert ids(consumer.poll(1)) == ["a"]
        assert ids(consumer.poll(5)) == ["b"]
        assert consumer.poll(5) == []
        assert consumer.poll(0) == []

    def test_two_consumers_share_a_queue(self, transport: Transport, consumer: Consumer) -> None:
        second = self.new_consumer(transport, "two@host", WORK)
        self.put(transport, *(message(str(n)) for n in range(4)))
        assert ids(consumer.poll(2)) + ids(second.poll(9)) == ["0", "1", "2", "3"]

    def test_undeclared_queue_stores_what_is_sent(self, transport: Transport) -> None:
        self.put(transport, message("a"), queue="nobody knows")
        found = self.new_consumer(transport, "w", Queue("nobody knows")).poll(2)
        assert ids(found) == ["a"]

    def test_change_by_the_receiver_does_not_reach_the_store(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        self.put(transport, message("a"))
        (found,) = consumer.poll(1)
        found.message.headers["id"] = "changed"
        consumer.release([found])
        assert ids(consumer.poll(1)) == ["a"]

    # -- order

    def test_higher_priority_comes_first_and_none_is_zero(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        if not transport.priority:
            pytest.skip("no priorities here")
        self.put(transport, message("none"), message("five", 5), message("zero", 0), message("nine", 9))
        self.put(transport, message("nine later", 9))
        assert ids(consumer.poll(9)) == ["nine", "nine later", "five", "none", "zero"]

    def test_several_queues_come_out_merged(self, transport: Transport, clock: Clock) -> None:
        consumer = self.new_consumer(transport, "w", WORK, OTHER)
        for number, queue in enumerate(("work", "other", "other", "work", "other")):
            clock.now += 1
            self.put(transport, message(str(number), 9 if number == 3 else 0), queue=queue)
        assert ids(consumer.poll(3)) == ["3", "0", "1"]
        assert ids(consumer.poll(3)) == ["2", "4"]

    def test_eta_holds_a_message_until_it_is_due(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        if not transport.delay:
            pytest.skip("holds nothing back here")
        self.put(
            transport,
            message("later", eta=clock.now + 60),
            message("sooner", eta=clock.now + 30),
            message("now"),
        )
        assert ids(consumer.poll(9)) == ["now"]
        assert consumer.next_due() == clock.now + 30
        clock.now += 61
        assert ids(consumer.poll(9)) == ["sooner", "later"]
        assert consumer.next_due() is None

    def test_eta_that_is_no_date_does_not_hold_the_message(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        broken = message("a")
        broken.headers["eta"] = "the day after tomorrow"
        self.put(transport, broken)
        assert ids(consumer.poll(1)) == ["a"]

    # -- settling

    def test_ack_ends_the_message_once(self, transport: Transport, consumer: Consumer) -> None:
        self.put(transport, message("a"))
        (found,) = consumer.poll(1)
        consumer.start([found])
        assert consumer.ack(found) is True
        assert consumer.ack(found) is False
        assert transport.sizes()[0][:4] == ("work", 0, 0, 0)

    def test_stale_delivery_cannot_settle_a_newer_message(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        self.put(transport, message("a"))
        (old,) = consumer.poll(1)
        consumer.ack(old)
        clock.now += 1
        self.put(transport, message("b"))
        (new,) = consumer.poll(1)
        assert not consumer.ack(old)
        assert not consumer.reject(old, requeue=True)
        assert not consumer.defer(old, clock.now)
        assert not consumer.dead_letter(old, "x")
        assert consumer.ack(new)

    def test_release_keeps_place_and_count(self, transport: Transport, consumer: Consumer) -> None:
        self.put(transport, message("a"), message("b"))
        consumer.release(consumer.poll(1))
        found = consumer.poll(2)
        assert ids(found) == ["a", "b"]
        assert found[0].deliveries == 0

    def test_requeue_goes_behind_its_equals_and_counts(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        self.put(transport, message("a"), message("b"))
        (first,) = consumer.poll(1)
        consumer.start([first])
        clock.now += 1
        assert consumer.reject(first, requeue=True)
        found = consumer.poll(2)
        assert ids(found) == ["b", "a"]
        assert [delivery.deliveries for delivery in found] == [0, 1]
        assert found[1].info["redelivered"] is True

    def test_deferred_message_waits_and_keeps_its_count(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        self.put(transport, message("a"))
        (found,) = consumer.poll(1)
        consumer.start([found])
        assert consumer.defer(found, clock.now + 10)
        assert consumer.poll(1) == []
        assert consumer.next_due() == clock.now + 10
        clock.now += 10
        (again,) = consumer.poll(1)
        assert again.deliveries == 1

    def test_over_the_delivery_limit_comes_out_lost(self, transport: Transport, consumer: Consumer) -> None:
        self.put(transport, message("a"))
        for count in range(3):
            (found,) = consumer.poll(1)
            assert (found.deliveries, found.fate) == (count, None)
            consumer.start([found])
            consumer.defer(found, 0.0)
        (found,) = consumer.poll(1)
        assert (found.deliveries, found.fate) == (3, "lost")

    def test_what_goes_back_on_purpose_never_reaches_the_delivery_limit(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        self.put(transport, message("a"))
        for _ in range(6):
            (found,) = consumer.poll(1)
            assert found.fate is None
            consumer.start([found])
            consumer.reject(found, requeue=True)

    def test_released_after_its_start_was_marked_is_not_counted(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        self.put(transport, message("a"), message("b"))
        found = consumer.poll(1)
        consumer.start(found)
        consumer.release(found)
        again = consumer.poll(2)
        assert ids(again) == ["a", "b"]
        assert again[0].deliveries == 0

    # -- dead letters

    def test_dead_letter_is_listed_replayed_and_dropped(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        self.put(transport, message("a", 4), message("b", 3), message("c", 2))
        for found in consumer.poll(3):
            consumer.start([found])
            clock.now += 1
            assert consumer.reject(found, requeue=False, reason=f"no {found.message.headers['id']}")
        letters = transport.dead_letters()
        assert [letter.reason for letter in letters] == ["no c", "no b", "no a"]
        assert [letter.reason for letter in transport.dead_letters(limit=1)] == ["no c"]
        assert letters[2].queue == "work"
        assert letters[2].at == clock.now - 2
        assert letters[2].message.body == b"body of a"
        assert transport.replay(letters[2].id) is True
        assert transport.replay(letters[2].id) is False
        assert transport.drop(letters[1].id) is True
        assert transport.drop(letters[1].id) is False
        assert not transport.replay("unheard of")
        (again,) = consumer.poll(9)
        assert (ids([again]), again.deliveries, again.message.priority) == (["a"], 0, 4)
        assert len(transport.dead_letters()) == 1

    # -- revocation

    def test_revoked_message_comes_with_its_fate(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        transport.revoke(["a", "c"], clock.now + 100)
        self.put(transport, message("a"), message("b"), message("c", eta=clock.now + 50))
        assert [delivery.fate for delivery in consumer.poll(2)] == ["revoked", None]
        clock.now += 60
        consumer.housekeep()
        assert [delivery.fate for delivery in consumer.poll(2)] == ["revoked"]

    def test_revocation_ends_with_its_time(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        transport.revoke(["a"], clock.now + 100)
        transport.revoke(["a"], clock.now + 50)
        clock.now += 99
        consumer.housekeep()
        self.put(transport, message("a"))
        (found,) = consumer.poll(1)
        assert found.fate == "revoked"
        consumer.release([found])
        clock.now += 2
        assert consumer.poll(1)[0].fate is None
        consumer.housekeep()

    # -- death of a worker

    def test_reserved_messages_of_a_dead_worker_keep_their_place(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        dying = self.new_consumer(transport, "dying@host", WORK)
        self.put(transport, message("a"), message("b"))
        assert ids(dying.poll(1)) == ["a"]
        self.lose(transport, dying)
        consumer.housekeep()
        found = consumer.poll(2)
        assert ids(found) == ["a", "b"]
        assert found[0].deliveries == 0

    def test_late_message_of_a_dead_worker_runs_again_with_growing_pauses_then_is_lost(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        self.put(transport, message("a"))
        pauses = []
        for count in range(3):
            dying = self.new_consumer(transport, f"dying{count}@host", WORK)
            (found,) = dying.poll(1)
            assert (found.deliveries, found.fate) == (count, None)
            dying.start([found])
            self.lose(transport, dying)
            consumer.housekeep()
            assert not dying.ack(found)
            due = consumer.next_due()
            pauses.append(0.0 if due is None else due - clock.now)
            clock.now += pauses[-1]
        assert pauses == pytest.approx([0.0, pause_after_loss_s(2, 0.5), 0.0])
        (found,) = consumer.poll(1)
        assert (found.fate, found.lost_by, found.deliveries) == ("lost", "dying2@host", 3)
        assert consumer.ack(found)

    def test_early_message_of_a_dead_worker_is_lost_once(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        dying = self.new_consumer(transport, "dying@host", WORK)
        self.put(transport, message("a"))
        (found,) = dying.poll(1)
        found.early = True
        dying.start([found])
        self.lose(transport, dying)
        consumer.housekeep()
        (lost,) = consumer.poll(5)
        assert (lost.fate, lost.lost_by) == ("lost", "dying@host")
        assert consumer.dead_letter(lost, "worker lost")
        assert consumer.poll(5) == []
        assert transport.dead_letters()[0].reason == "worker lost"

    def test_lost_message_stays_lost_whatever_happens_to_its_finder(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        first, second = (self.new_consumer(transport, name, WORK) for name in ("first", "second"))
        self.put(transport, message("a"))
        (found,) = first.poll(1)
        found.early = True
        first.start([found])
        self.lose(transport, first)
        second.housekeep()
        (found,) = second.poll(1)
        second.release([found])
        (found,) = second.poll(1)
        assert second.defer(found, clock.now + 5)
        clock.now += 5
        (found,) = second.poll(1)
        assert found.fate == "lost"
        self.lose(transport, second)
        consumer.housekeep()
        (found,) = consumer.poll(1)
        assert (found.fate, found.lost_by) == ("lost", "first")

    def test_lost_message_reaches_workers_of_other_queues(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        dying = self.new_consumer(transport, "dying", OTHER)
        self.put(transport, message("a"), queue="other")
        (found,) = dying.poll(1)
        found.early = True
        dying.start([found])
        self.lose(transport, dying)
        consumer.housekeep()
        assert [(d.fate, d.queue) for d in consumer.poll(1)] == [("lost", "other")]

    def test_lost_message_does_not_reach_a_mailbox(self, transport: Transport, consumer: Consumer) -> None:
        mailbox = self.new_consumer(transport, "mail", Queue("mail", auto_delete=True))
        dying = self.new_consumer(transport, "dying", WORK)
        self.put(transport, message("a"))
        (found,) = dying.poll(1)
        found.early = True
        dying.start([found])
        self.lose(transport, dying)
        mailbox.housekeep()
        assert mailbox.poll(1) == []
        consumer.housekeep()
        assert ids(consumer.poll(1)) == ["a"]

    def test_living_worker_keeps_what_it_holds(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        other = self.new_consumer(transport, "other@host", WORK)
        self.put(transport, message("a"), message("b"))
        found = other.poll(2)
        other.start(found[:1])
        clock.now += 1e6
        consumer.housekeep()
        assert consumer.poll(2) == []
        assert all(other.ack(delivery) for delivery in found)

    def test_closed_consumer_gives_back_what_it_held(self, transport: Transport, consumer: Consumer) -> None:
        closing = self.new_consumer(transport, "closing", WORK)
        self.put(transport, message("a"), message("b"))
        found = closing.poll(2)
        closing.start(found[:1])
        closing.close()
        closing.close()
        assert [(d.message.headers["id"], d.deliveries) for d in consumer.poll(3)] == [("a", 1), ("b", 0)]

    # -- queues and exchanges

    def test_fanout_copies_to_every_bound_queue(self, transport: Transport) -> None:
        exchange = Exchange("news", "fanout")
        readers = [self.new_consumer(transport, f"r{n}", Queue(f"news.{n}", exchange)) for n in range(2)]
        self.put(transport, message("a"), exchange="news", queue="")
        for reader in readers:
            (found,) = reader.poll(2)
            assert (ids([found]), found.exchange) == (["a"], "news")
            assert reader.ack(found)

    def test_fanout_to_nobody_is_no_error(self, transport: Transport) -> None:
        self.put(transport, message("a"), exchange="nobody listens", queue="")
        assert [size.queue for size in transport.sizes()] == ["work"]

    def test_direct_and_topic_exchanges_choose_by_key(self, transport: Transport) -> None:
        direct, topic = Exchange("d"), Exchange("t", "topic")
        queues = [
            Queue("q1", direct, "one"),
            Queue("q2", direct, "two", bindings=[Binding(topic, "logs.#")]),
            Queue("q3", topic, "logs.*"),
        ]
        for queue in queues:
            transport.declare(queue)
        self.put(transport, message("a"), exchange="d", queue="two")
        self.put(transport, message("b"), exchange="t", queue="logs.x.y")
        self.put(transport, message("c"), exchange="t", queue="logs.x")
        found = {
            name: ids(self.new_consumer(transport, name, Queue(name)).poll(9)) for name in ("q1", "q2", "q3")
        }
        assert found == {"q1": [], "q2": ["a", "b", "c"], "q3": ["c"]}

    def test_task_that_fits_no_queue_is_refused(self, transport: Transport) -> None:
        transport.declare(Queue("q1", Exchange("d"), "one"))
        with pytest.raises(ImproperlyConfigured, match="exchange 'd'.*'two'"):
            self.put(transport, message("a"), message("b"), exchange="d", queue="two")
        with transport.transaction():
            self.put(transport, message("c"))
            with pytest.raises(ImproperlyConfigured):
                self.put(transport, message("a"), exchange="d", queue="two")
        assert [(size.queue, size.ready) for size in transport.sizes()] == [("q1", 0), ("work", 1)]

    def test_auto_delete_queue_goes_with_its_last_consumer(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        queue = Queue("reply", Exchange("replies", "fanout"), auto_delete=True)
        first = self.new_consumer(transport, "first", queue)
        second = self.new_consumer(transport, "second", queue)
        self.put(transport, message("a"), exchange="replies", queue="")
        first.close()
        assert "reply" in [size.queue for size in transport.sizes()]
        self.lose(transport, second)
        consumer.housekeep()
        assert "reply" not in [size.queue for size in transport.sizes()]
        self.put(transport, message("b"), exchange="replies", queue="")
        assert "reply" not in [size.queue for size in transport.sizes()]

    def test_unused_queue_expires_and_a_used_one_does_not(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        used, unused = Queue("used", expires=60), Queue("unused", expires=60)
        reader = self.new_consumer(transport, "reader", used)
        transport.declare(unused)
        clock.now += 59
        transport.declare(unused)
        clock.now += 2
        consumer.housekeep()
        assert [size.queue for size in transport.sizes()] == ["unused", "used", "work"]
        clock.now += 60
        consumer.housekeep()
        assert [size.queue for size in transport.sizes()] == ["used", "work"]
        reader.close()
        clock.now += 61
        consumer.housekeep()
        assert [size.queue for size in transport.sizes()] == ["work"]

    def test_message_past_its_time_to_live_does_not_come_out(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        queue = Queue("short", message_ttl=10)
        reader = self.new_consumer(transport, "reader", queue)
        expiring = message("c")
        expiring.properties["expiration"] = "12000"
        task = message("d", expires=to_iso(clock.now + 12))
        task.properties["expiration"] = "12000"
        self.put(transport, message("a"), queue="short")
        clock.now += 9
        self.put(transport, message("b"), queue="short")
        self.put(transport, expiring, task)
        clock.now += 2
        assert ids(reader.poll(5)) == ["b"]
        clock.now += 11
        assert ids(consumer.poll(5)) == ["d"]

    def test_time_to_live_counts_where_nobody_reads(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        transport.declare(Queue("short", message_ttl=10))
        self.put(transport, message("a"), queue="short")
        clock.now += 11
        consumer.housekeep()
        assert ("short", 0) in [(size.queue, size.ready) for size in transport.sizes()]

    def test_queues_are_added_and_cancelled_while_consuming(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        self.put(transport, message("a"), queue="other")
        assert consumer.poll(1) == []
        consumer.add_queue(OTHER)
        (found,) = consumer.poll(1)
        consumer.cancel_queue("other")
        consumer.cancel_queue("never added")
        self.put(transport, message("b"), queue="other")
        assert consumer.poll(1) == []
        assert consumer.ack(found)

    def test_sizes_count_and_purge_empties(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        self.put(transport, message("held"), message("a"), message("b"), message("c", eta=clock.now + 60))
        consumer.start(consumer.poll(1))
        clock.now += 7
        assert transport.sizes() == [("work", 2, 1, 1, 7.0)]
        assert transport.purge("work") == 3
        assert transport.purge("work") == 0
        assert transport.sizes() == [("work", 0, 0, 1, None)]

    # -- transactions

    def test_transaction_left_by_an_exception_leaves_no_trace(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        self.put(transport, message("a"), message("b"), message("c"))
        held = consumer.poll(2)
        consumer.start(held)
        with pytest.raises(Boom), transport.transaction():
            assert consumer.ack(held[0])
            assert consumer.dead_letter(held[1], "why not")
            self.put(transport, message("d"))
            transport.revoke(["c"], 1e12)
            assert ids(consumer.poll(2)) == ["c", "d"]
            raise Boom
        assert transport.dead_letters() == []
        assert transport.sizes()[0][1:4] == (1, 0, 2)
        (found,) = consumer.poll(5)
        assert (ids([found]), found.fate, found.deliveries) == (["c"], None, 0)
        assert all(consumer.ack(delivery) for delivery in held)

    def test_settling_and_polling_in_one_transaction(self, transport: Transport, consumer: Consumer) -> None:
        self.put(transport, message("a"), message("b"), message("c"))
        with transport.transaction():
            held = consumer.poll(1)
            more = consumer.poll(1)
            consumer.start(held)
        assert (ids(held), ids(more)) == (["a"], ["b"])
        with transport.transaction():
            with transport.transaction():
                self.put(transport, message("d"))
            consumer.release(more)
            assert consumer.ack(held[0])
            new = consumer.poll(2)
            assert ids(new) == ["b", "c"]
            assert consumer.ack(new[0])
            consumer.start(new[1:])
        assert transport.sizes()[0][1:4] == (1, 0, 1)

    # -- waking

    def test_consumer_is_woken_by_a_publish(
        self, transport: Transport, consumer: Consumer, open_transport: Callable[[], Transport], clock: Clock
    ) -> None:
        fd = consumer.fileno()
        assert fd is not None
        consumer.on_readable()
        consumer.poll(1)
        while consumer.changed():
            consumer.poll(1)
        assert not select.select([fd], [], [], 0)[0]
        sender = open_transport()
        self.put(sender, message("a", eta=clock.now + 5))
        assert select.select([fd], [], [], 5)[0]
        assert consumer.changed()
        consumer.on_readable()
        consumer.poll(1)
        assert not select.select([fd], [], [], 0)[0]
        with transport.transaction():
            self.put(transport, message("b"))
        assert select.select([fd], [], [], 5)[0]

    # -- against a model

    @pytest.mark.parametrize("seed", range(12))
    def test_random_operations_agree_with_a_list(self, transport: Transport, clock: Clock, seed: int) -> None:
        Comparison(self, transport, clock, seed).run(150)


class Row:
    """What the model knows of a message."""

    def __init__(self, id_: str, seq: int, queue: str, priority: int, due: float) -> None:
        self.id, self.seq, self.queue, self.priority, self.due = id_, seq, queue, priority, due
        self.state = "ready"
        self.node: Optional[str] = None
        self.count = 0
        self.lost_by: Optional[str] = None

    def snapshot(self) -> Dict[str, Any]:
        return dict(vars(self))


class Comparison:
    """Random operations on a transport and on a plain list, compared at every poll."""

    def __init__(self, suite: TransportSuite, transport: Transport, clock: Clock, seed: int) -> None:
        self.suite, self.transport, self.clock, self.seed = suite, transport, clock, seed
        self.random = random.Random(seed)
        self.rows: List[Row] = []
        self.held: List[Any] = []  # (node, delivery, row)
        self.dead: List[str] = []
        self.names = self.deaths = 0
        self.consumers = {node: self.start(node) for node in ("n0", "n1")}
        self.log: List[str] = []

    def start(self, node: str) -> Consumer:
        queues = (WORK, OTHER) if node.endswith("0") else (WORK,)
        return self.suite.new_consumer(self.transport, node, *queues)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.clock.now += self.random.choice((0, 0.5, 3))
            getattr(self, self.random.choice(self.OPERATIONS))()
        self.drain()

    OPERATIONS = (
        "publish", "publish", "publish", "poll", "poll", "poll", "begin", "begin", "ack", "requeue", "refuse",
        "defer", "release", "crash", "roll_back",
    )  # fmt: skip

    def fail(self, what: str) -> str:
        return f"seed {self.seed}: {what}\n" + "\n".join(self.log[-30:])

    def publish(self) -> None:
        for _ in range(self.random.randint(1, 3)):
            self.names += 1
            name = f"m{self.names}"
            priority = self.random.choice((0, 0, 5))
            queue = self.random.choice(("work", "other"))
            eta = self.clock.now + self.random.choice((1, 4)) if self.random.random() < 0.3 else None
            self.suite.put(self.transport, message(name, priority, eta), queue=queue)
            row = Row(name, self.names, queue, priority, self.clock.now if eta is None else eta)
            self.rows.append(row)
            self.log.append(f"publish {vars(row)}")

    def expected(self, node: str, limit: int) -> List[Row]:
        queues = ("work", "other") if node.endswith("0") else ("work",)
        lost = [row for row in self.rows if row.state == "lost"]
        ready = [
            row
            for row in self.rows
            if row.state == "ready" and row.due <= self.clock.now and row.queue in queues
        ]
        lost.sort(key=lambda row: row.seq)
        ready.sort(key=lambda row: (-row.priority, row.due, row.seq))
        return (lost + ready)[:limit]

    def poll(self) -> None:
        node = self.random.choice(sorted(self.consumers))
        limit = self.random.randint(1, 4)
        expected = self.expected(node, limit)
        self.consumers[node].housekeep()
        found = self.consumers[node].poll(limit)
        self.log.append(f"{node} polls {ids(found)}")
        limit_of = self.consumers[node].delivery_limit
        facts = [(d.message.headers["id"], d.deliveries, d.fate, d.lost_by) for d in found]
        wanted = [
            (r.id, r.count, "lost" if r.lost_by or r.count >= limit_of else None, r.lost_by or "")
            for r in expected
        ]
        assert facts == wanted, self.fail(f"{node} got {facts}, not {wanted}")
        for delivery, row in zip(found, expected):
            row.state, row.node = "reserved", node
            self.held.append((node, delivery, row))

    def pick(self) -> Any:
        return self.held.pop(self.random.randrange(len(self.held)))

    def begin(self) -> None:
        waiting = [entry for entry in self.held if entry[2].state == "reserved"]
        for node, delivery, row in waiting[:2]:
            delivery.early = self.random.random() < 0.3
            self.consumers[node].start([delivery])
            row.state = "early" if delivery.early else "late"
            row.count += 1
            self.log.append(f"{node} starts {row.id} {row.state}")

    def settle(self, what: str, call: Callable[[Consumer, Delivery], Any]) -> Optional[Row]:
        if not self.held:
            return None
        node, delivery, row = self.pick()
        self.log.append(f"{node} {what} {row.id}")
        assert call(self.consumers[node], delivery) in (True, None), self.fail(
            f"{what} of {row.id} was refused"
        )
        found: Row = row
        return found

    def ack(self) -> None:
        row = self.settle("acks", lambda consumer, delivery: consumer.ack(delivery))
        if row is not None:
            self.rows.remove(row)

    def requeue(self) -> None:
        row = self.settle("requeues", lambda consumer, delivery: consumer.reject(delivery, requeue=True))
        if row is not None:
            row.state, row.due, row.lost_by = "ready", self.clock.now, None
            row.count = min(row.count, Consumer.delivery_limit - 1)

    def refuse(self) -> None:
        row = self.settle("refuses", lambda consumer, delivery: consumer.reject(delivery, requeue=False))
        if row is not None:
            self.rows.remove(row)
            self.dead.append(row.id)

    def defer(self) -> None:
        until = self.clock.now + self.random.choice((-1, 2))
        row = self.settle("defers", lambda consumer, delivery: consumer.defer(delivery, until))
        if row is not None:
            row.state, row.due = "ready", until

    def release(self) -> None:
        row = self.settle("releases", lambda consumer, delivery: consumer.release([delivery]))
        if row is not None:
            row.count -= row.state in ("early", "late")
            row.state = "lost" if row.lost_by else "ready"

    def crash(self) -> None:
        node = self.random.choice(sorted(self.consumers))
        consumer = self.consumers.pop(node)
        self.log.append(f"{node} dies")
        self.suite.lose(self.transport, consumer)
        survivor = next(iter(self.consumers.values()))
        survivor.housekeep()
        for _, delivery, row in [entry for entry in self.held if entry[0] == node]:
            assert not consumer.ack(delivery), self.fail(f"dead {node} could ack {row.id}")
            if row.lost_by is not None:
                row.state = "lost"
            elif row.state == "late" and row.count < consumer.delivery_limit:
                row.state = "ready"
                if row.count > 1:
                    row.due = self.clock.now + pause_after_loss_s(row.count, 0.5)
            elif row.state == "reserved":
                row.state = "ready"
            else:
                row.state, row.lost_by = "lost", node
        self.held = [entry for entry in self.held if entry[0] != node]
        self.deaths += 1
        name = f"n{self.deaths}_{node[-1]}"
        self.consumers[name] = self.start(name)

    def roll_back(self) -> None:
        """A turn of a worker that is undone in its middle."""
        node = self.random.choice(sorted(self.consumers))
        consumer = self.consumers[node]
        mine = [entry for entry in self.held if entry[0] == node][:2]
        consumer.housekeep()
        self.log.append(f"{node} undoes")
        with pytest.raises(Boom), self.transport.transaction():
            for _, delivery, _ in mine:
                assert consumer.ack(delivery) is True, self.fail("ack in a transaction")
            self.suite.put(self.transport, message("undone", 9))
            new = consumer.poll(self.random.randint(1, 3))
            assert new
            consumer.start(new[:1])
            raise Boom

    def drain(self) -> None:
        self.clock.now += 1e5
        for node, delivery, row in self.held:
            assert self.consumers[node].ack(delivery), self.fail(f"last ack of {row.id}")
            self.rows.remove(row)
        self.held = []
        node = next(node for node in sorted(self.consumers) if node.endswith("0"))
        for _ in range(len(self.rows)):
            self.poll_one(node)
        assert [row.id for row in self.rows] == [], self.fail("messages are missing")
        assert self.consumers[node].poll(5) == [], self.fail("messages came twice")
        letters = [letter.message.headers["id"] for letter in self.transport.dead_letters(1000)]
        assert sorted(letters) == sorted(self.dead), self.fail("dead letters differ")

    def poll_one(self, node: str) -> None:
        (row,) = self.expected(node, 1)
        self.consumers[node].housekeep()
        (found,) = self.consumers[node].poll(1)
        assert ids([found]) == [row.id], self.fail("order while draining")
        assert self.consumers[node].ack(found)
        self.rows.remove(row)

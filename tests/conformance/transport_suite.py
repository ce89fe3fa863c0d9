# SPDX-License-Identifier: MIT
"""What every transport must do.  A new store is one subclass of `TransportSuite` with two methods."""

from __future__ import annotations

import random
import select
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

import pytest
from waiting import wait_until

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


def awake(consumer: Consumer) -> bool:
    """Say whether a worker's loop would poll now: told by the descriptor, or by `woken`."""
    fd = consumer.fileno()
    assert fd is not None
    return consumer.woken or bool(select.select([fd], [], [], 0)[0])


class TransportSuite:
    """The suite; `url` names an empty broker, `lose` lets a worker die."""

    #: Queues take turns where their messages have an equal priority; else they are merged by time.
    takes_turns = False
    #: Messages to a queue that nobody declared are kept.
    keeps_for_undeclared = True
    #: What is taken, given back and taken again is read anew.
    reads_again = True
    #: A message that was only reserved by a worker that died or closed has this count.
    count_of_reserved = 0
    #: The store knows who had started what, so that early messages of a dead worker come out as lost.
    knows_starts = True
    #: What was ended in a transaction that failed after its poll may be ended once more.
    ends_again = False
    #: What is wrong with a publish in a transaction is told by the call, not by the transaction's end.
    tells_at_once = True
    #: Times to live are counted by the clock of the suite.
    keeps_its_clock = True

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    def new_order(self, transport: Transport, clock: Clock) -> Order:
        """Return the model of what this store hands out next."""
        return ByTime(clock)

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

    def assert_size(self, transport: Transport, ready: int, waiting: int, unacked: int) -> None:
        """Make sure of what is in the queue "work"."""
        (size,) = [size for size in transport.sizes(["work"]) if size.queue == "work"]
        assert size[1:4] == (ready, waiting, unacked)

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
        if not self.keeps_for_undeclared:
            pytest.skip("a message to a queue that is not there is refused here")
        self.put(transport, message("a"), queue="nobody knows")
        found = self.new_consumer(transport, "w", Queue("nobody knows")).poll(2)
        assert ids(found) == ["a"]

    def test_change_by_the_receiver_does_not_reach_the_store(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        if not self.reads_again:
            pytest.skip("what is released is handed out again as it is here")
        self.put(transport, message("a"))
        (found,) = consumer.poll(1)
        found.message.headers["id"] = "changed"
        consumer.release([found])
        assert ids(consumer.poll(1)) == ["a"]

    # -- order

    def test_priorities_come_in_the_stores_order_and_none_is_zero(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        if not transport.priority:
            pytest.skip("no priorities here")
        self.put(transport, message("none"), message("five", 5), message("zero", 0), message("nine", 9))
        self.put(transport, message("nine later", 9))
        expected = {
            "higher first": ["nine", "nine later", "five", "none", "zero"],
            "lower first": ["none", "zero", "five", "nine", "nine later"],
        }
        assert ids(consumer.poll(9)) == expected[transport.priority_order]

    def test_several_queues_come_out_merged(self, transport: Transport, clock: Clock) -> None:
        if self.takes_turns:
            pytest.skip("queues take turns here")
        consumer = self.new_consumer(transport, "w", WORK, OTHER)
        for number, queue in enumerate(("work", "other", "other", "work", "other")):
            clock.now += 1
            self.put(transport, message(str(number), 9 if number == 3 else 0), queue=queue)
        assert ids(consumer.poll(3)) == ["3", "0", "1"]
        assert ids(consumer.poll(3)) == ["2", "4"]

    def test_several_queues_take_turns_where_priorities_are_equal(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        if not (self.takes_turns and transport.priority):
            pytest.skip("queues are merged by time here, or have no priorities")
        both = self.new_consumer(transport, "both", WORK, OTHER)
        first, last = (9, 0) if transport.priority_order == "higher first" else (0, 9)
        self.put(transport, *(message(f"last{n}", last) for n in range(2)), queue="other")
        for queue in ("work", "other"):
            self.put(transport, *(message(f"{queue}{n}", first) for n in range(3)), queue=queue)
        turns = [both.poll(1)[0] for _ in range(6)]
        assert sorted(ids(turns)) == sorted(f"{queue}{n}" for queue in ("work", "other") for n in range(3))
        for one, next_one in zip(turns, turns[1:]):
            assert one.queue != next_one.queue
        assert ids(both.poll(5)) == ["last0", "last1"]

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
        self.assert_size(transport, 0, 0, 0)

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
        self.put(transport, message("a", 4), message("b", 4), message("c", 4))
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
        assert [delivery.deliveries for delivery in found] == [self.count_of_reserved, 0]

    def test_late_message_of_a_dead_worker_runs_again_with_growing_pauses_then_is_lost(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        if not self.knows_starts:
            pytest.skip("nobody knows here what a dead worker had started")
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
        if not self.knows_starts:
            pytest.skip("nobody knows here what a dead worker had started")
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
        if not self.knows_starts:
            pytest.skip("nobody knows here what a dead worker had started")
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
        if not self.knows_starts:
            pytest.skip("nobody knows here what a dead worker had started")
        dying = self.new_consumer(transport, "dying", OTHER)
        self.put(transport, message("a"), queue="other")
        (found,) = dying.poll(1)
        found.early = True
        dying.start([found])
        self.lose(transport, dying)
        consumer.housekeep()
        assert [(d.fate, d.queue) for d in consumer.poll(1)] == [("lost", "other")]

    def test_lost_message_does_not_reach_a_mailbox(self, transport: Transport, consumer: Consumer) -> None:
        if not self.knows_starts:
            pytest.skip("nobody knows here what a dead worker had started")
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
        again = [(d.message.headers["id"], d.deliveries) for d in consumer.poll(3)]
        assert again == [("a", 1), ("b", self.count_of_reserved)]

    # -- queues and exchanges

    def test_fanout_copies_to_every_bound_queue(self, transport: Transport) -> None:
        exchange = Exchange("news", "fanout")
        readers = [self.new_consumer(transport, f"r{n}", Queue(f"news.{n}", exchange)) for n in range(2)]
        self.put(transport, message("a"), exchange="news", queue="")
        for reader in readers:
            (found,) = wait_until(partial(reader.poll, 2), 5, "the message")
            assert (ids([found]), found.exchange) == (["a"], "news")
            assert reader.ack(found)

    def test_fanout_to_nobody_is_no_error(self, transport: Transport) -> None:
        if not self.keeps_for_undeclared:
            pytest.skip("a message to an exchange that is not there is refused here")
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
        if not self.tells_at_once:
            pytest.skip("what is published in a transaction is looked at when it is done here")
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
        assert "reply" in [size.queue for size in transport.sizes(["reply"])]
        self.lose(transport, second)
        consumer.housekeep()
        assert "reply" not in [size.queue for size in transport.sizes(["reply"])]
        self.put(transport, message("b"), exchange="replies", queue="")
        assert "reply" not in [size.queue for size in transport.sizes(["reply"])]

    def test_unused_queue_expires_and_a_used_one_does_not(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        if not self.keeps_its_clock:
            pytest.skip("the server has a clock of its own here")
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
        if not self.keeps_its_clock:
            pytest.skip("the server has a clock of its own here")
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
        if not self.keeps_its_clock:
            pytest.skip("the server has a clock of its own here")
        transport.declare(Queue("short", message_ttl=10))
        self.put(transport, message("a"), queue="short")
        clock.now += 11
        consumer.housekeep()
        assert ("short", 0) in [(size.queue, size.ready) for size in transport.sizes()]

    def test_queues_are_added_and_cancelled_while_consuming(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        transport.declare(OTHER)
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
        if not self.knows_starts:
            pytest.skip("only what is ready is told here")
        # A store may not know that a message is not due until somebody wants to take it.
        self.put(transport, message("c", eta=clock.now + 60), message("held"), message("a"), message("b"))
        consumer.start(consumer.poll(1))
        clock.now += 7
        assert transport.sizes() == [("work", 2, 1, 1, 7.0, 1)]
        assert transport.purge("work") == 3
        assert transport.purge("work") == 0
        assert transport.sizes() == [("work", 0, 0, 1, None, 1)]

    # -- transactions

    def test_transaction_left_by_an_exception_leaves_no_trace(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        if not transport.rolls_back:
            pytest.skip("what was called before a poll stays done here")
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
        self.assert_size(transport, 1, 0, 2)
        (found,) = consumer.poll(5)
        assert (ids([found]), found.fate, found.deliveries) == (["c"], None, 0)
        assert all(consumer.ack(delivery) for delivery in held)

    def test_transaction_left_by_an_exception_leaves_no_trace_since_its_last_poll(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        later = message("later", eta=clock.now + 60)
        self.put(transport, message("a"), message("b"), later, message("c"), message("d"))
        held = consumer.poll(2)
        consumer.start(held)
        with pytest.raises(Boom), transport.transaction():
            found = consumer.poll(1)
            assert ids(found) == ["c"]
            consumer.start(found)
            assert consumer.ack(held[0])
            assert consumer.dead_letter(held[1], "why not")
            self.put(transport, message("e"))
            transport.revoke(["c"], 1e12)
            raise Boom
        assert transport.dead_letters() == []
        again = consumer.poll(5)
        assert ids(again) == ["c", "d"]
        assert [(delivery.fate, delivery.deliveries) for delivery in again] == [(None, 0)] * 2
        assert all(consumer.ack(delivery) for delivery in (*held, *again))
        clock.now += 60
        assert ids(consumer.poll(5)) == ["later"]

    def test_what_was_called_before_a_poll_stays_done_where_nothing_rolls_back(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        if transport.rolls_back:
            pytest.skip("an exception undoes all of a transaction here")
        self.put(transport, message("a"), message("b"), message("c"))
        held = consumer.poll(2)
        consumer.start(held)
        with pytest.raises(Boom), transport.transaction():
            assert consumer.ack(held[0])
            assert consumer.dead_letter(held[1], "why not")
            self.put(transport, message("d"))
            transport.revoke(["c"], 1e12)
            assert [(d.message.headers["id"], d.fate) for d in consumer.poll(1)] == [("c", "revoked")]
            raise Boom
        assert [letter.reason for letter in transport.dead_letters()] == ["why not"]
        found = consumer.poll(5)
        assert [(d.message.headers["id"], d.fate) for d in found] == [("c", "revoked"), ("d", None)]
        assert [consumer.ack(delivery) for delivery in held] == [self.ends_again] * 2

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
        self.assert_size(transport, 1, 0, 1)

    # -- waking

    def test_consumer_is_woken_by_a_publish(
        self, transport: Transport, consumer: Consumer, open_transport: Callable[[], Transport], clock: Clock
    ) -> None:
        assert consumer.fileno() is not None
        consumer.on_readable()
        consumer.poll(1)
        while consumer.changed():
            consumer.poll(1)
        assert not awake(consumer)
        sender = open_transport()
        self.put(sender, message("a", eta=clock.now + 5))
        wait_until(partial(awake, consumer), 5, "a wake-up by another's message")
        assert consumer.changed()
        consumer.on_readable()
        consumer.poll(1)
        assert not awake(consumer)
        with transport.transaction():
            self.put(transport, message("b"))
        wait_until(partial(awake, consumer), 5, "a wake-up by a message of the own transport")

    # -- against a model

    @pytest.mark.parametrize("seed", range(20))
    def test_random_operations_agree_with_a_model(
        self, transport: Transport, clock: Clock, seed: int
    ) -> None:
        Comparison(self, transport, clock, seed).run(150)


# -- the model -----------------------------------------------------------------------------------


class Row:
    """What the model knows of a message."""

    def __init__(self, id_: str, seq: int, queue: str, priority: int, due: float) -> None:
        self.id, self.seq, self.queue, self.priority, self.due = id_, seq, queue, priority, due
        #: Of one that is held: reserved, late or early.
        self.state = ""
        self.count = 0
        self.lost_by = ""

    def __repr__(self) -> str:
        lost = f" lost by {self.lost_by}" if self.lost_by else ""
        return f"{self.id} in {self.queue} priority {self.priority} due {self.due} starts {self.count}{lost}"


class Order:
    """What waits in a store and which of it comes next: the part of the model that stores differ in."""

    END, FRONT, DUE = "end", "front", "due"

    def put(self, row: Row, place: str) -> None:
        """Add a message: new ones at the END, given back ones at the FRONT, others when they are DUE."""
        raise NotImplementedError

    def take(self, found: Sequence[str], queues: Sequence[str], limit: int) -> List[Row]:
        """Take out what a poll of these queues gave; `AssertionError` if that was not what comes next."""
        raise NotImplementedError


class ByTime(Order):
    """What was lost, then by priority, then by when it is due, all queues as one; places do not matter."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.lost: List[Row] = []
        self.rows: List[Row] = []

    def put(self, row: Row, place: str) -> None:
        # What was lost and is deferred waits in its queue.
        (self.lost if row.lost_by and place != Order.DUE else self.rows).append(row)

    def take(self, found: Sequence[str], queues: Sequence[str], limit: int) -> List[Row]:
        ready = [row for row in self.rows if row.due <= self.clock.now and row.queue in queues]
        ready.sort(key=lambda row: (-row.priority, row.due, row.seq))
        rows = [*sorted(self.lost, key=lambda row: row.seq), *ready][:limit]
        assert list(found) == [row.id for row in rows]
        for row in rows:
            (self.lost if row in self.lost else self.rows).remove(row)
        return rows


class Held(NamedTuple):
    """A message that one of the consumers has."""

    node: str
    delivery: Delivery
    row: Row


class Comparison:
    """Random operations on a transport and on a model, compared at every poll."""

    def __init__(self, suite: TransportSuite, transport: Transport, clock: Clock, seed: int) -> None:
        self.suite, self.transport, self.clock, self.seed = suite, transport, clock, seed
        self.random = random.Random(seed)
        self.order = suite.new_order(transport, clock)
        self.alive: Dict[str, Row] = {}
        self.held: List[Held] = []
        self.dead: List[str] = []
        self.names = self.deaths = 0
        self.log: List[str] = []
        self.consumers = {node: self.start(node) for node in ("n0", "n1")}

    def start(self, node: str) -> Consumer:
        return self.suite.new_consumer(self.transport, node, *map(Queue, self.queues_of(node)))

    @staticmethod
    def queues_of(node: str) -> Sequence[str]:
        return ("work", "other") if node.endswith("0") else ("work",)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.clock.now += self.random.choice((0, 0.5, 3))
            getattr(self, self.random.choice(self.OPERATIONS))()
        self.drain()

    OPERATIONS = (
        "publish", "publish", "publish", "poll", "poll", "poll", "begin", "begin", "ack", "requeue", "refuse",
        "defer", "release", "crash", "turn", "turn_undone",
    )  # fmt: skip

    def fail(self, what: str) -> str:
        return f"seed {self.seed}: {what}\n" + "\n".join(self.log[-30:])

    def new(self, priority: int, queue: str, eta: Optional[float] = None) -> Row:
        """Publish a message and return its row, which is not in the model yet."""
        self.names += 1
        row = Row(f"m{self.names}", self.names, queue, priority, self.clock.now if eta is None else eta)
        self.log.append(f"publish {row}")
        self.suite.put(self.transport, message(row.id, priority, eta), queue=queue)
        return row

    def add(self, row: Row) -> None:
        self.alive[row.id] = row
        self.order.put(row, Order.END)

    def publish(self) -> None:
        for _ in range(self.random.randint(1, 3)):
            eta = self.clock.now + self.random.choice((1, 4)) if self.random.random() < 0.3 else None
            self.add(self.new(self.random.choice((0, 0, 5)), self.random.choice(("work", "other")), eta))

    def choose(self) -> str:
        return self.random.choice(sorted(self.consumers))

    def poll(self) -> None:
        node, limit = self.choose(), self.random.randint(1, 4)
        self.consumers[node].housekeep()
        self.compare(node, self.consumers[node].poll(limit), limit)

    def compare(self, node: str, found: List[Delivery], limit: int) -> List[Row]:
        """Take out of the model what a node got, if that is right; it is held from now on."""
        self.log.append(f"{node} got {ids(found)} of {limit} at {self.clock.now}")
        try:
            rows = self.order.take(ids(found), self.queues_of(node), limit)
        except AssertionError as error:
            raise AssertionError(self.fail(str(error))) from None
        most = self.consumers[node].delivery_limit
        facts = [(d.deliveries, d.fate, d.lost_by) for d in found]
        wanted = [(r.count, "lost" if r.lost_by or r.count >= most else None, r.lost_by) for r in rows]
        assert facts == wanted, self.fail(f"{node} got {facts}, not {wanted}")
        assert [d.queue for d in found] == [r.queue for r in rows], self.fail("queues")
        for delivery, row in zip(found, rows):
            row.state = "reserved"
            self.held.append(Held(node, delivery, row))
        return rows

    def begin(self) -> None:
        for held in [held for held in self.held if held.row.state == "reserved"][:2]:
            held.delivery.early = self.random.random() < 0.3
            self.consumers[held.node].start([held.delivery])
            self.has_begun(held)

    def has_begun(self, held: Held) -> None:
        held.row.state = "early" if held.delivery.early else "late"
        held.row.count += 1
        self.log.append(f"{held.node} starts {held.row.id} {held.row.state}")

    def settle(self, what: str, call: Callable[[Consumer, Delivery], Any]) -> Optional[Row]:
        if not self.held:
            return None
        node, delivery, row = self.held.pop(self.random.randrange(len(self.held)))
        self.log.append(f"{node} {what} {row}")
        done = call(self.consumers[node], delivery)
        assert done in (True, None), self.fail(f"{what} of {row} was refused")
        return row

    def ack(self) -> None:
        row = self.settle("acks", lambda consumer, delivery: consumer.ack(delivery))
        if row is not None:
            del self.alive[row.id]

    def requeue(self) -> None:
        row = self.settle("requeues", lambda consumer, delivery: consumer.reject(delivery, requeue=True))
        if row is not None:
            row.due, row.lost_by = self.clock.now, ""
            row.count = min(row.count, Consumer.delivery_limit - 1)
            self.order.put(row, Order.END)

    def refuse(self) -> None:
        row = self.settle("refuses", lambda consumer, delivery: consumer.reject(delivery, requeue=False))
        if row is not None:
            del self.alive[row.id]
            self.dead.append(row.id)

    def defer(self) -> None:
        until = self.clock.now + self.random.choice((-1, 2))
        row = self.settle("defers", lambda consumer, delivery: consumer.defer(delivery, until))
        if row is not None:
            row.due = until
            self.order.put(row, Order.DUE)

    def release(self) -> None:
        row = self.settle("releases", lambda consumer, delivery: consumer.release([delivery]))
        if row is not None:
            row.count -= row.state in ("early", "late")
            self.order.put(row, Order.FRONT)

    def crash(self) -> None:
        node = self.choose()
        consumer = self.consumers.pop(node)
        self.log.append(f"{node} dies")
        self.suite.lose(self.transport, consumer)
        next(iter(self.consumers.values())).housekeep()
        # The first one last: at the front it is before the others again.
        for _, delivery, row in reversed([held for held in self.held if held.node == node]):
            assert not consumer.ack(delivery), self.fail(f"dead {node} could ack {row}")
            place = Order.FRONT
            if row.state == "late" and row.count < consumer.delivery_limit and not row.lost_by:
                if row.count > 1:
                    row.due = self.clock.now + pause_after_loss_s(row.count, 0.5)
                    place = Order.DUE
            elif row.state != "reserved" and not row.lost_by:
                row.lost_by, place = node, Order.END
            self.order.put(row, place)
        self.held = [held for held in self.held if held.node != node]
        self.deaths += 1
        name = f"n{self.deaths}_{node[-1]}"
        self.consumers[name] = self.start(name)

    def turn(self, undone: bool = False) -> None:
        """A turn of a worker, which may be undone at its end."""
        node, limit = self.choose(), self.random.randint(1, 3)
        consumer = self.consumers[node]
        mine = [held for held in self.held if held.node == node][:2]
        consumer.housekeep()
        self.log.append(f"{node} has a turn{', which is undone' if undone else ''}")
        try:
            with self.transport.transaction():
                for held in mine:
                    assert consumer.ack(held.delivery) is True, self.fail("ack in a transaction")
                published = self.new(9, "work")
                found = consumer.poll(limit)
                assert found, self.fail("nothing came")
                consumer.start(found[:1])
                if undone:
                    raise Boom
        except Boom:
            pass
        if undone and self.transport.rolls_back:
            return
        # What was called before the poll is done all the same; what was polled is not held.
        self.held = [held for held in self.held if held not in mine]
        for held in mine:
            del self.alive[held.row.id]
        self.add(published)
        rows = self.compare(node, found, limit)
        taken = self.held[-len(rows) :]
        if undone:
            consumer.housekeep()
            del self.held[-len(rows) :]
            for row in reversed(rows):
                self.order.put(row, Order.FRONT)
        else:
            self.has_begun(taken[0])

    def turn_undone(self) -> None:
        self.turn(undone=True)

    def drain(self) -> None:
        self.clock.now += 1e5
        for node, delivery, row in self.held:
            assert self.consumers[node].ack(delivery), self.fail(f"last ack of {row}")
            del self.alive[row.id]
        self.held = []
        node = next(node for node in sorted(self.consumers) if node.endswith("0"))
        consumer = self.consumers[node]
        consumer.housekeep()
        while self.alive:
            found = consumer.poll(1)
            assert found, self.fail(f"these are missing: {list(self.alive.values())}")
            (row,) = self.compare(node, found, 1)
            assert consumer.ack(found[0]), self.fail(f"last ack of {row}")
            del self.alive[row.id]
        assert consumer.poll(5) == [], self.fail("messages came twice")
        letters = [letter.message.headers["id"] for letter in self.transport.dead_letters(1000)]
        assert sorted(letters) == sorted(self.dead), self.fail("dead letters differ")

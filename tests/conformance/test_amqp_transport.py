# SPDX-License-Identifier: MIT
"""The transport suite over amqp://, with classic and with quorum queues.

RabbitMQ pushes, keeps time itself, and does not tell what others hold.  So a poll here waits until
the server has sent what it has, and what the suite says of the clock is shown with real seconds.
"""

from __future__ import annotations

import random
import re
import time
from functools import partial
from typing import Any, Callable, ClassVar, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

import pytest
from patience import Patient, PatientTransport, wait_until_gone
from servers import RabbitServer
from transport_suite import OTHER, WORK, Boom, Clock, TransportSuite, ids, message
from waiting import wait_until

from miniq.connections.amqp import Server
from miniq.exceptions import ImproperlyConfigured, OperationalError
from miniq.message import Delivery
from miniq.routing import Exchange, Queue
from miniq.transports import amqp_consumer
from miniq.transports.amqp import AmqpTransport
from miniq.transports.base import Consumer, NotOurs, Publication, Transport, pause_after_loss_s

#: Consumers hold what is not due, so that the clock of the suite rules.
OPTIONS = {"hold": 9e5}


class ClassicTransport(PatientTransport):
    """Declares its lasting queues with priorities."""

    def kind(self, queue: Queue) -> Queue:
        known: Queue = queue if queue.auto_delete else queue.replace(max_priority=10)
        return known


class QuorumTransport(PatientTransport):
    """Declares its lasting queues as quorum queues."""

    priority = False

    def __init__(self, url: str, options: Mapping[str, Any], wall: Callable[[], float]) -> None:
        super().__init__(url, options, wall)
        # Nothing here waits in the server, and to declare where it would takes half a second.
        setattr(self.link.waiting, "bind", lambda *_: None)  # noqa: B010

    def kind(self, queue: Queue) -> Queue:
        if queue.auto_delete:
            return queue
        known: Queue = queue.replace(queue_arguments={"x-queue-type": "quorum"})
        return known


class AmqpSuite(TransportSuite):
    """What the suite says where it holds, and what holds instead where it does not."""

    takes_turns = True
    keeps_for_undeclared = False
    reads_again = False
    count_of_reserved = 1
    knows_starts = False
    ends_again = True
    tells_at_once = False
    keeps_its_clock = False
    #: So many seconds late the server tells how many messages there are.
    counts_lag_s = 0.0

    transport_class: ClassVar["type[PatientTransport]"]
    rabbit: RabbitServer

    @pytest.fixture(autouse=True)
    def nothing_ahead(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have consumers take only what they are asked for, however quickly that happens."""
        monkeypatch.setattr(amqp_consumer, "QUICK_S", 0.0)

    @pytest.fixture
    def url(self, rabbit_server: RabbitServer, rabbit_url: str) -> Iterator[str]:
        self.rabbit = rabbit_server
        yield rabbit_url
        Server.close_all()

    @pytest.fixture
    def open_transport(self, url: str, clock: Clock) -> Iterator[Callable[[], Transport]]:
        opened: List[Transport] = []

        def new() -> Transport:
            transport = self.transport_class(url, OPTIONS, clock)
            opened.append(transport)
            return transport

        yield new
        for transport in reversed(opened):
            transport.close()

    def at_the_server(self, transport: Transport) -> Dict[str, int]:
        """Return how many messages there are in each queue that has some, held ones too."""
        rows = self.rabbit.queues(self.vhost(transport))
        return {
            name: row["messages"] for name, row in rows.items() if row["messages"] and row["type"] != "stream"
        }

    @staticmethod
    def vhost(transport: Transport) -> str:
        assert isinstance(transport, AmqpTransport)
        (place,) = transport.link.server.endpoints
        return place.virtual_host

    def assert_size(self, transport: Transport, ready: int, waiting: int, unacked: int) -> None:
        # Some of the ready ones may be on the way to a consumer, and then are not told as such.
        (size,) = [size for size in transport.sizes(["work"]) if size.queue == "work"]
        assert size.ready <= ready
        assert size[2:5] == (None, None, None)
        wait_until(
            lambda: self.at_the_server(transport).get("work", 0) == ready + waiting + unacked,
            5,
            lambda: self.at_the_server(transport),
        )

    def lose(self, transport: Transport, consumer: Consumer) -> None:
        assert isinstance(consumer, Patient)
        # What it told the server shall arrive: tests with real processes are elsewhere.
        for _ in range(3):
            try:
                consumer.catch_up()
                break
            except OperationalError:
                pass  # it notices only now that its line had broken
        consumer.drop_connection()
        wait_until_gone(self.rabbit, consumer.node)

    # -- what is refused

    def test_message_to_a_queue_that_is_not_there_is_refused(self, transport: Transport) -> None:
        with pytest.raises(ImproperlyConfigured, match="no queue 'nobody knows' on the server"):
            self.put(transport, message("a"), queue="nobody knows")
        with pytest.raises(ImproperlyConfigured, match="no exchange 'nobody knows'"):
            self.put(transport, message("a"), exchange="nobody knows")

    def test_fanout_to_nobody_is_no_error_where_the_exchange_is_declared(self, transport: Transport) -> None:
        transport.declare(Queue("gone", Exchange("news", "fanout")))
        assert isinstance(transport, AmqpTransport)
        with transport.link.channel() as channel:
            channel.call("queue.delete", queue="gone")
        self.put(transport, message("a"), exchange="news", queue="")
        assert [size.queue for size in transport.sizes()] == ["work"]

    def test_what_is_refused_in_a_transaction_is_told_at_its_end(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        with pytest.raises(ImproperlyConfigured, match="nobody knows"), transport.transaction():
            self.put(transport, message("a"), queue="nobody knows")
            assert consumer.queue_names == ["work"]  # type: ignore[attr-defined]
        with pytest.raises(ImproperlyConfigured, match="nobody knows"), transport.transaction():
            self.put(transport, message("a"), queue="nobody knows")
            consumer.poll(1)
            raise AssertionError("the poll does what was called before it")
        assert consumer.poll(1) == []

    # -- order

    def test_queues_take_turns(self, transport: Transport) -> None:
        both = self.new_consumer(transport, "both", WORK, OTHER)
        for queue in ("work", "other"):
            self.put(transport, *(message(f"{queue}{n}") for n in range(4)), queue=queue)
        turns = both.poll(1) + both.poll(1) + both.poll(3) + both.poll(3)
        for one, next_one in zip(turns, turns[1:]):
            assert one.queue != next_one.queue
        assert len(turns) == 8

    # -- settling

    def test_released_delivery_is_handed_out_again_as_the_same(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        self.put(transport, message("a"))
        found = consumer.poll(1)
        consumer.release(found)
        (again,) = consumer.poll(1)
        assert again is found[0]

    def test_released_ones_come_in_their_order_whatever_order_they_were_released_in(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        self.put(transport, *(message(name) for name in "abcd"))
        a, b, c = consumer.poll(3)
        consumer.release([a])
        consumer.release([c])
        consumer.release([b])
        assert ids(consumer.poll(9)) == ["a", "b", "c", "d"]

    def test_release_and_defer_of_what_is_not_held_change_nothing(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        self.put(transport, message("a"), message("b"))
        a, b = consumer.poll(2)
        consumer.release([a])
        consumer.release([a])
        assert consumer.defer(b, clock.now + 5)
        assert consumer.defer(b, clock.now + 5)
        assert ids(consumer.poll(9)) == ["a"]
        clock.now += 6
        assert ids(consumer.poll(9)) == ["b"]
        self.assert_size(transport, 0, 0, 2)

    def test_what_was_released_in_a_transaction_that_failed_is_handed_out_once(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        self.put(transport, message("a"), message("b"))
        with pytest.raises(Boom), transport.transaction():
            found = consumer.poll(2)
            consumer.release(found[1:])
            raise Boom
        assert ids(consumer.poll(9)) == ["a", "b"]

    def test_released_message_goes_back_to_the_others_when_it_is_not_wanted_here(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        other = self.new_consumer(transport, "other", WORK)
        self.put(transport, message("a"), message("b"))
        consumer.release(consumer.poll(2))

        def found() -> List[Delivery]:
            consumer.housekeep()
            return other.poll(2)

        assert ids(wait_until(found, 10, "they went back", 0.1)) == ["a", "b"]

    # -- death of a worker

    def test_late_message_of_dead_workers_runs_again_with_growing_pauses_then_is_lost(
        self, transport: Transport, clock: Clock
    ) -> None:
        self.put(transport, message("a"))
        pauses = []
        for count in range(3):
            dying = self.new_consumer(transport, f"dying{count}", WORK)
            found = dying.poll(1)
            due = dying.next_due()
            pauses.append(0.0 if due is None else due - clock.now)
            clock.now += pauses[-1]
            found = found or dying.poll(1)
            assert [(one.deliveries, one.fate, one.info["redelivered"]) for one in found] == [
                (count, None, count > 0)
            ]
            dying.start(found)
            self.lose(transport, dying)
            # Its worker is dead in the eyes of the server, which cannot tell it so.
            assert dying.ack(found[0])
        assert pauses == pytest.approx([0.0, 0.0, pause_after_loss_s(2, 0.5)])
        (lost,) = self.new_consumer(transport, "last", WORK).poll(1)
        assert (lost.fate, lost.lost_by, lost.deliveries) == ("lost", "", 3)

    def test_message_that_was_only_reserved_by_dead_workers_is_never_lost(self, transport: Transport) -> None:
        self.put(transport, message("a"))
        for count in range(5):
            dying = self.new_consumer(transport, f"dying{count}", WORK)
            (found,) = dying.poll(1)
            assert (found.deliveries, found.fate, found.redelivered) == (min(count, 1), None, count > 0)
            self.lose(transport, dying)

    @staticmethod
    def poll_when_due(consumer: Consumer, clock: Clock) -> List[Delivery]:
        """Poll one message; if it is held because of what became of its worker, let time pass."""
        found = consumer.poll(1)
        due = consumer.next_due()
        if not found and due is not None:
            clock.now = due
            found = consumer.poll(1)
        return found

    def test_starts_before_it_was_put_back_count_once_and_reservations_after_it_do_not(
        self, transport: Transport, clock: Clock
    ) -> None:
        self.put(transport, message("a"))
        first, second = (self.new_consumer(transport, name, WORK) for name in ("first", "second"))
        first.start(first.poll(1))
        self.lose(transport, first)
        (found,) = second.poll(1)
        second.start([found])
        assert second.reject(found, requeue=True)
        for count in range(3):
            (found,) = self.poll_when_due(second, clock)
            assert (found.deliveries, found.fate) == (2, None)
            self.lose(transport, second)
            second = self.new_consumer(transport, f"after{count}", WORK)
        (found,) = self.poll_when_due(second, clock)
        second.start([found])
        self.lose(transport, second)
        (found,) = self.new_consumer(transport, "last", WORK).poll(1)
        assert (found.deliveries, found.fate) == (3, "lost")

    @staticmethod
    def starts_noted(consumer: Patient) -> bool:
        consumer.housekeep()
        return consumer.notes is not None and bool(consumer.notes.starts)

    def test_count_of_starts_reaches_workers_that_run(self, transport: Transport, consumer: Consumer) -> None:
        assert isinstance(consumer, Patient)
        self.put(transport, message("a"))
        for name in ("first", "second"):
            dying = self.new_consumer(transport, name, WORK)
            dying.start(dying.poll(1))
            if name == "second":
                wait_until(partial(self.starts_noted, consumer), 5, "the note of the second start")
            self.lose(transport, dying)
        assert consumer.poll(1) == []
        assert consumer.next_due() is not None

    def test_early_message_of_a_dead_worker_is_gone(self, transport: Transport, consumer: Consumer) -> None:
        dying = self.new_consumer(transport, "dying", WORK)
        self.put(transport, message("a"), message("b"))
        found = dying.poll(2)
        found[0].early = True
        dying.start(found)
        self.lose(transport, dying)
        assert ids(consumer.poll(5)) == ["b"]

    # -- queues

    def test_unused_queue_expires_by_the_servers_clock_and_a_used_one_does_not(
        self, transport: Transport
    ) -> None:
        used, unused = Queue("used", expires=0.4), Queue("unused", expires=0.4)
        reader = self.new_consumer(transport, "reader", used)
        self.put(transport, message("a"), message("b"), queue="used")
        transport.declare(unused)
        names = {"used", "unused"}
        # All slots of its worker are taken.
        (found,) = reader.poll(1)

        def left() -> Set[str]:
            # Not by `sizes`: who asks for a queue uses it.
            return names & set(self.rabbit.queues(self.vhost(transport)))

        wait_until(lambda: left() == {"used"}, 10, left)
        reader.housekeep()
        assert reader.ack(found)
        assert ids(reader.poll(1)) == ["b"]
        reader.close()
        wait_until(lambda: not left(), 10, left)

    def test_auto_delete_queue_stays_while_its_worker_wants_no_messages(self, transport: Transport) -> None:
        queue = Queue("mine", auto_delete=True)
        reader = self.new_consumer(transport, "reader", queue)
        self.put(transport, *(message(name) for name in "abcdef"), queue="mine")
        for names in ("a", "bc", "def"):
            found = reader.poll(len(names))
            assert ids(found) == list(names)
            reader.housekeep()
            assert all(reader.ack(delivery) for delivery in found)
        assert reader.poll(1) == []

    def test_message_past_its_time_to_live_by_the_servers_clock_does_not_come_out(
        self, transport: Transport, consumer: Consumer, clock: Clock
    ) -> None:
        transport.declare(Queue("short", message_ttl=0.2))
        expiring = message("c")
        expiring.properties["expiration"] = "200"
        self.put(transport, message("a"), queue="short")
        self.put(transport, expiring, message("d"))
        wait_until(lambda: self.at_the_server(transport) == {"work": 1}, 10, "both expired")
        assert ids(self.new_consumer(transport, "reader", Queue("short", message_ttl=0.2)).poll(2)) == []
        assert ids(consumer.poll(5)) == ["d"]

    def test_sizes_tell_what_is_ready_and_purge_deletes_it(
        self, transport: Transport, consumer: Consumer
    ) -> None:
        self.put(transport, message("held"), message("a"), message("b"))
        (held,) = consumer.poll(1)
        consumer.start([held])
        # Who wants no message just now is no consumer, so that number may be 0 or 1.
        work = ("work", 2, None, None, None)
        assert [size[:5] for size in transport.sizes()] == [work]
        assert [size[:5] for size in transport.sizes(["other"])] == [work]
        transport.declare(OTHER)
        assert [size[:5] for size in transport.sizes()] == [("other", 0, None, None, None), work]
        assert transport.purge("work") == 2
        assert transport.purge("work") == 0
        assert transport.purge("not there") == 0
        self.assert_size(transport, 0, 0, 1)
        assert consumer.ack(held)

    # -- at random

    @pytest.mark.parametrize("seed", range(4))
    def test_random_operations_agree_with_a_model(  # type: ignore[override]
        self,
        open_transport: Callable[[], Transport],
        clock: Clock,
        seed: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.storm(open_transport, clock, seed, monkeypatch)

    def storm(
        self,
        open_transport: Callable[[], Transport],
        clock: Clock,
        seed: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # With every other seed consumers have some ahead.
        monkeypatch.setattr(amqp_consumer, "QUICK_S", seed % 2 * 0.1)
        Storm(self, open_transport, clock, seed).run(100)


# -- random operations ---------------------------------------------------------------------------


def close_line(server: RabbitServer, name: str) -> None:
    """Have the server close the connections with a name."""
    wanted = f'{{<<"connection_name">>, longstr, <<"{name}">>}}'
    rows = "rabbit_networking:connection_info_all([pid, client_properties])"
    server.eval(
        '[rabbit_networking:close_connection(Pid, "closed by the test") ||'
        f" [{{pid, Pid}}, {{client_properties, Told}}] <- {rows}, lists:member({wanted}, Told)]"
    )


class Row:
    """What is known of a message."""

    def __init__(self, id_: str, seq: int, queue: str, priority: int, due: float) -> None:
        self.id, self.seq, self.queue, self.priority = id_, seq, queue, priority
        #: Not to come out before; of a message that was deferred, only where it was not handed out since.
        self.eta = self.due = due
        self.deferred_by = ""
        self.starts = self.ends = 0
        #: It is not where it was when it was published; and it was handed out before, by the server's word.
        self.moved = self.came_back = False
        self.revoked = False
        #: A line broke on which it was: another worker may get it as well.
        self.loose = False
        #: And a copy may have been made of it meanwhile.
        self.wild = False
        #: Living workers that started or ended it.
        self.seen_by: Set[str] = set()

    def __repr__(self) -> str:
        words = [word for word in ("moved", "revoked", "loose", "wild") if getattr(self, word)]
        return f"{self.id} in {self.queue} starts {self.starts} ends {self.ends} {' '.join(words)}"


class Taken:
    """A message that one of the workers has."""

    def __init__(self, node: str, delivery: Delivery, row: Row) -> None:
        self.node, self.delivery, self.row = node, delivery, row
        #: "reserved", "late" or "early"; and whether its line broke since.
        self.state = "reserved"
        self.shaky = False

    @property
    def is_void(self) -> bool:
        """Say whether it is none any more, as its line broke, or is about not to be."""
        return self.shaky and self.state == "reserved"


class Storm:
    """Random operations on workers with lines that break; every message must end, and once.

    Not the order is compared, which RabbitMQ does not promise to several workers, but what must be so
    whatever happens.
    """

    def __init__(self, suite: AmqpSuite, new: Callable[[], Transport], clock: Clock, seed: int) -> None:
        self.suite, self.new, self.clock, self.seed = suite, new, clock, seed
        self.random = random.Random(seed)
        self.rows: Dict[str, Row] = {}
        self.taken: List[Taken] = []
        self.dead: List[Row] = []
        self.log: List[str] = []
        self.workers = 0
        self.transports: Dict[str, Transport] = {}
        self.consumers: Dict[str, Patient] = {}
        #: Worker -> the epoch of its consumer that is over, though it may not know.
        self.doomed: Dict[str, int] = {}
        self.hire((WORK, OTHER))
        self.hire((WORK,))

    OPERATIONS = (
        "publish", "publish", "publish", "poll", "poll", "poll", "begin", "begin", "ack", "requeue", "refuse",
        "defer", "release", "turn", "turn_undone", "crash", "break_line", "close_channel", "close_line",
        "revoke",
    )  # fmt: skip

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.clock.now += self.random.choice((0, 0.5, 3))
            getattr(self, self.random.choice(self.OPERATIONS))()
        self.drain()

    def fail(self, what: str) -> str:
        names = re.findall(r"\bm[0-9]+\b", what)
        lines = [line for line in self.log[:-40] if any(re.search(rf"\b{name}\b", line) for name in names)]
        return "\n".join([f"seed {self.seed}: {what}", *lines[-20:], "...", *self.log[-40:]])

    # -- workers

    def hire(self, queues: Sequence[Queue]) -> None:
        self.workers += 1
        node = f"w{self.workers}"
        transport = self.transports[node] = self.new()
        for queue in (WORK, OTHER):
            transport.declare(queue)
        consumer = self.suite.new_consumer(transport, node, *queues)
        assert isinstance(consumer, Patient)
        self.consumers[node] = consumer

    def choose(self) -> str:
        return self.random.choice(sorted(self.consumers))

    def upkeep(self, node: str) -> bool:
        """Do the upkeep of a worker, and return True: for conditions."""
        try:
            self.consumers[node].housekeep()
        except OperationalError as error:
            self.log.append(f"{node}: {error}")
        return True

    def crash(self) -> None:
        """A process ends; what it told the server has arrived."""
        node = self.choose()
        self.log.append(f"{node} dies")
        consumer, transport = self.consumers.pop(node), self.transports.pop(node)
        self.suite.lose(transport, consumer)
        transport.close()
        self.forget_deferred(node)
        for one in [one for one in self.taken if one.node == node]:
            self.taken.remove(one)
            one.row.moved = True
            one.row.due = 0.0
            if one.state == "early":
                one.row.ends += 1
        for row in self.rows.values():
            row.seen_by.discard(node)
        self.hire([Queue(name) for name in consumer.queue_names])

    def forget_deferred(self, node: str) -> None:
        """What a worker held until it was due comes out sooner when its line breaks."""
        for row in self.rows.values():
            if row.deferred_by == node:
                row.due = 0.0

    # -- lines

    def break_line(self) -> None:
        self.shake(lambda consumer: consumer.drop_connection())

    def close_line(self) -> None:
        self.shake(lambda consumer: close_line(self.suite.rabbit, consumer.node))

    def close_channel(self) -> None:
        def close(consumer: Patient) -> None:
            channel = consumer._connected()
            # Never delivered: the server closes the channel.
            channel.ack(1_000_000)
            channel.connection.flush()

        self.shake(close)

    def shake(self, breaking: Callable[[Patient], Any]) -> None:
        """Break a line; its worker may notice it at once or not."""
        node = self.choose()
        consumer, notices, arrives = (
            self.consumers[node], self.random.random() < 0.5, self.random.random() < 0.5,
        )  # fmt: skip
        self.log.append(f"a line of {node} breaks{', which it notices' if notices else ''}")
        if not arrives:
            # What it acknowledged a moment before may be lost.
            for row in self.rows.values():
                row.loose = row.loose or node in row.seen_by
        for _ in range(3):
            try:
                if arrives:
                    consumer.catch_up()
                breaking(consumer)
                break
            except OperationalError as error:
                # It was broken before.
                self.log.append(f"{node}: {error}")
        self.doomed[node] = consumer._epoch
        channel = consumer._channel
        if notices and channel is not None:
            wait_until(lambda: self.upkeep(node) and consumer._channel is not channel, 10)
        self.forget_deferred(node)
        for one in [one for one in self.taken if one.node == node]:
            one.shaky = True
            one.row.moved = True
            one.row.due = 0.0
            if one.state != "reserved" or not notices:
                one.row.loose = True

    # -- messages

    def new_row(self, priority: int, queue: str, eta: Optional[float] = None) -> Tuple[Row, Publication]:
        name = f"m{len(self.rows) + 1}"
        row = Row(name, len(self.rows), queue, priority, eta or 0.0)
        self.rows[name] = row
        self.log.append(f"publish {row}")
        return row, Publication(message(name, priority, eta), "", queue)

    def publish(self) -> None:
        some = []
        for _ in range(self.random.randint(1, 3)):
            eta = self.clock.now + self.random.choice((1, 4)) if self.random.random() < 0.2 else None
            queue = self.random.choice(("work", "other"))
            some.append(self.new_row(self.random.choice((0, 0, 5)), queue, eta)[1])
        self.transports[self.choose()].publish(some, 20.0)

    def revoke(self) -> None:
        row = self.random.choice(list(self.rows.values()) or [None])
        if row is not None:
            self.log.append(f"revoke {row}")
            row.revoked = True
            self.transports[self.choose()].revoke([row.id], self.clock.now + 1e7)
            for node in self.consumers:
                wait_until(partial(self.knows, node, row.id), 10, self.fail(f"{node} hears of {row}"))

    def knows(self, node: str, task_id: str) -> bool:
        self.upkeep(node)
        notes = self.consumers[node].notes
        return notes is not None and notes.is_revoked(task_id)

    def poll(self) -> None:
        node, limit = self.choose(), self.random.randint(1, 4)
        self.upkeep(node)
        for _ in range(3):
            try:
                found = self.consumers[node].poll(limit)
                break
            except OperationalError as error:
                self.log.append(f"{node}: {error}")
        else:
            raise AssertionError(self.fail(f"{node} cannot poll"))
        self.check(node, found)

    def check(self, node: str, found: List[Delivery]) -> List[Taken]:
        """See that a worker may have what it got; it has it from now on."""
        if found:
            self.log.append(f"{node} got {[(*ids([d]), d.deliveries, d.redelivered) for d in found]}")
        taken = []
        for delivery in found:
            row = self.rows[delivery.message.headers["id"]]
            if delivery.tag.epoch == self.doomed.get(node):
                row.loose = True
            having = [one for one in self.taken if one.row is row and not one.is_void]
            if not row.wild:
                assert node not in row.seen_by, self.fail(f"{row} came to {node} a second time")
                assert row.loose or not (row.ends or having), self.fail(f"{node} got {row}, others have it")
                self.check_facts(row, delivery)
            self.taken = [
                one for one in self.taken if not (one.row is row and one.node == node and one.is_void)
            ]
            one = Taken(node, delivery, row)
            one.shaky = delivery.tag.epoch == self.doomed.get(node)
            taken.append(one)
        in_place = [
            one.row for one in taken if not (one.row.moved or one.delivery.redelivered or one.row.eta)
        ]
        for place in {(row.queue, row.priority) for row in in_place}:
            seqs = [row.seq for row in in_place if (row.queue, row.priority) == place]
            assert seqs == sorted(seqs), self.fail(f"{node} got {place} out of order")
        self.taken += taken
        return taken

    def check_facts(self, row: Row, delivery: Delivery) -> None:
        assert delivery.queue == row.queue
        assert row.eta <= self.clock.now and row.due <= self.clock.now, self.fail(f"{row} is not due")
        fates = {"revoked", "lost"} if row.revoked else {None, "lost"}
        assert delivery.fate in fates, self.fail(f"{row} has fate {delivery.fate}")
        row.came_back = row.came_back or delivery.redelivered
        if not row.loose:
            # Whether it was started the first time, the server cannot tell.
            least, most = (min(row.starts, 1), row.starts + 1) if row.came_back else (row.starts, row.starts)
            assert least <= delivery.deliveries <= most, self.fail(f"{delivery.deliveries} for {row}")
            if delivery.fate == "lost":
                assert row.starts >= Consumer.delivery_limit - 1, self.fail(f"{row} is lost")

    def begin(self) -> None:
        for one in [one for one in self.taken if one.state == "reserved"][:2]:
            one.delivery.early = self.random.random() < 0.3
            try:
                with self.transports[one.node].transaction():
                    self.consumers[one.node].start([one.delivery])
            except (NotOurs, OperationalError) as error:
                self.log.append(f"{one.node} cannot start {one.row}: {error}")
                assert one.shaky, self.fail(f"{one.row} cannot be started")
                one.delivery.early = False
                if isinstance(error, NotOurs):
                    self.taken.remove(one)
            else:
                self.has_begun(one)

    def has_begun(self, one: Taken) -> None:
        one.state = "early" if one.delivery.early else "late"
        one.row.starts += 1
        one.row.seen_by.add(one.node)
        self.log.append(f"{one.node} starts {one.row} {one.state}")

    def settle(self, what: str, call: Callable[[Consumer, Delivery], Any]) -> Optional[Taken]:
        """Have a worker do something with one that it has; None if that was not its any more."""
        if not self.taken:
            return None
        one = self.taken.pop(self.random.randrange(len(self.taken)))
        self.log.append(f"{one.node} {what} {one.row} {one.state}{' shaky' if one.shaky else ''}")
        for _ in range(3):
            try:
                with self.transports[one.node].transaction():
                    done = call(self.consumers[one.node], one.delivery)
                break
            except OperationalError as error:
                self.log.append(f"{one.node}: {error}")
        else:
            raise AssertionError(self.fail(f"{what} of {one.row} does not work"))
        assert done is not False or one.shaky, self.fail(f"{what} of {one.row} was refused")
        one.row.moved = True
        return None if done is False else one

    def ack(self) -> None:
        one = self.settle("acks", lambda consumer, delivery: consumer.ack(delivery))
        if one is not None:
            one.row.ends += 1
            one.row.seen_by.add(one.node)

    def requeue(self) -> None:
        one = self.settle("requeues", lambda consumer, delivery: consumer.reject(delivery, requeue=True))
        if one is not None:
            one.row.starts = min(one.row.starts, Consumer.delivery_limit - 1)
            self.goes_back(one)

    def goes_back(self, one: Taken) -> None:
        one.row.seen_by.discard(one.node)
        one.row.due = 0.0
        one.row.wild = one.row.wild or one.row.loose

    def refuse(self) -> None:
        one = self.settle("refuses", lambda consumer, delivery: consumer.reject(delivery, requeue=False))
        if one is not None:
            one.row.ends += 1
            one.row.seen_by.add(one.node)
            self.dead.append(one.row)

    def defer(self) -> None:
        until = self.clock.now + self.random.choice((-1, 2))
        one = self.settle("defers", lambda consumer, delivery: consumer.defer(delivery, until))
        if one is not None:
            self.goes_back(one)
            if one.state != "early" and not one.row.loose:
                one.row.due, one.row.deferred_by = until, one.node

    def release(self) -> None:
        one = self.settle("releases", lambda consumer, delivery: consumer.release([delivery]))
        if one is not None:
            one.row.starts -= one.state != "reserved"
            self.goes_back(one)

    def turn(self, undone: bool = False) -> None:
        """A turn of a worker, which is repeated while its line breaks, and may be undone at its end."""
        node, limit = self.choose(), self.random.randint(1, 3)
        consumer, transport = self.consumers[node], self.transports[node]
        mine = [one for one in self.taken if one.node == node][:2]
        row, publication = self.new_row(0, "work")
        ends = [one.row.id for one in mine]
        self.log.append(f"{node} has a turn{', which is undone' if undone else ''}: ends {ends}")
        for _ in range(4):
            try:
                with transport.transaction():
                    ended = [one for one in mine if consumer.ack(one.delivery)]
                    transport.publish([publication], 20.0)
                    found = consumer.poll(limit)
                    begun = found[:1] if found else []
                    consumer.start(begun)
                    if undone:
                        raise Boom
            except OperationalError as error:
                self.log.append(f"{node}: {error}")
                continue
            except Boom:
                pass
            break
        else:
            raise AssertionError(self.fail(f"{node} has no turn"))
        for one in mine:
            assert one in ended or one.shaky, self.fail(f"{node} could not end {one.row}")
            self.taken.remove(one)
            if one in ended:
                one.row.ends += 1
                one.row.seen_by.add(node)
        taken = self.check(node, found)
        if undone:
            self.taken = [one for one in self.taken if one not in taken]
        elif taken:
            self.has_begun(taken[0])

    def turn_undone(self) -> None:
        self.turn(undone=True)

    # -- the end

    def drain(self) -> None:
        self.clock.now += 1e5
        self.log.append("the end")
        while self.taken:
            self.ack()
        watched = next(iter(self.transports.values()))

        def is_empty() -> bool:
            # Whoever gets what its workers died of holds it for a while.
            self.clock.now += 1e4
            for node, consumer in self.consumers.items():
                self.upkeep(node)
                try:
                    found = consumer.poll(50)
                except OperationalError as error:
                    self.log.append(f"{node}: {error}")
                    continue
                self.check(node, found)
            while self.taken:
                self.ack()
            # Early ones that were deferred wait in the server.
            return not set(self.suite.at_the_server(watched)) - {"_miniq.dead"}

        def what_is_left() -> str:
            held = {
                node: [(one.key, one.state, one.handed_out) for one in consumer._unsettled.values()]
                for node, consumer in self.consumers.items()
            }
            return self.fail(f"left are {self.suite.at_the_server(watched)}, held are {held}")

        for _ in range(2 if self.suite.counts_lag_s else 1):
            wait_until(is_empty, 20, what_is_left)
            time.sleep(self.suite.counts_lag_s)
        for row in self.rows.values():
            assert row.ends >= 1, self.fail(f"{row} is lost")
            assert row.ends == 1 or row.loose, self.fail(f"{row} ended {row.ends} times")
        found = sorted(letter.message.headers["id"] for letter in watched.dead_letters(1000))
        wanted = {row.id: not row.loose for row in self.dead}
        assert set(found) == set(wanted), self.fail("dead letters differ")
        assert all(found.count(name) == 1 for name, once in wanted.items() if once), self.fail(f"{found}")


class TestClassicQueues(AmqpSuite):
    transport_class = ClassicTransport

    @pytest.mark.parametrize("seed", range(4, 12))
    def test_more_random_operations_agree_with_a_model(
        self,
        open_transport: Callable[[], Transport],
        clock: Clock,
        seed: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.storm(open_transport, clock, seed, monkeypatch)


class TestQuorumQueues(AmqpSuite):
    transport_class = QuorumTransport
    counts_lag_s = 0.3

# SPDX-License-Identifier: MIT
"""A thread's link to a RabbitMQ server: what is declared there, the open transaction, what is published.

A transport and its consumers share one.  A step publishes and confirms first what was collected, and
then lets every consumer acknowledge what has ended; see `amqp` for why in this order.
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from time import monotonic
from typing import Any, Callable, Dict, Iterator, List, Optional, Protocol, Sequence, Tuple

from ..codecs.amqp_wire import encode_table
from ..connections.amqp import Channel, ChannelError, Options, Refusal, Server
from ..exceptions import EncodeError, ImproperlyConfigured, OperationalError
from ..message import Delivery, Message
from ..routing import Exchange, Queue
from ..text import truncate
from . import amqp_notes
from .amqp_message import COPY, UNTIL, to_content
from .amqp_topology import (
    CELERYS_OWN,
    declare_exchange,
    declare_queue,
    exchanges_of,
    goes_unused,
    is_quorum,
    left_until,
    refused,
)
from .amqp_waiting import DEAD, Waiting, declare_dead
from .base import due_at, what_is_unroutable

logger = logging.getLogger(__name__)

#: Exchanges of queues in which messages wait to be due.
WAITING_ROOMS = ("_miniq.delay", "celery_delayed_")
#: The header that says why a message was set aside, and the longest reason.
DEAD_HEADER = "x-miniq-dead"
MAX_REASON_CHARS = 1000
#: What is added to a message must not make its headers too long for a frame, of 128 KiB: then they are cut.
MAX_HEADER_BYTES = 120_000

#: What a channel publishes: exchange, routing key, properties, headers, body, mandatory.
Item = Tuple[str, str, Dict[str, Any], Dict[str, Any], bytes, bool]
#: What tells a message from others, and what its starts are noted by.
Key = amqp_notes.Start


class Held:
    """A message this consumer holds; the `tag` of its delivery."""

    __slots__ = (
        "consumer", "tag", "epoch", "subscription", "queue", "delivery", "key", "starts", "state",
        "handed_out", "started", "noted", "acked", "doubted", "due",
    )  # fmt: skip

    HERE, ENDING, GONE = range(3)

    def __init__(
        self,
        consumer: "Settling",
        tag: int,
        epoch: int,
        subscription: "Subscription",
        delivery: Delivery,
    ) -> None:
        self.consumer = consumer
        self.tag = tag
        #: The channel its tag belongs to.
        self.epoch = epoch
        self.subscription = subscription
        self.queue = subscription.queue.name
        self.delivery = delivery
        self.key: Key = ("", "", 0, 0, "")
        #: How often it was started, as far as is known; the start here included.
        self.starts = 0
        self.state = Held.HERE
        #: The worker has it; else it waits here.
        self.handed_out = False
        self.started = False
        #: Its start was noted.
        self.noted = False
        #: It was acknowledged at its start.
        self.acked = False
        #: Its end was told to the server in a step whose transaction failed.
        self.doubted = False
        self.due = 0.0


class Subscription:
    """A consumer as the server knows it: at most `window` messages of it are out."""

    __slots__ = ("queue", "tag", "window", "lasts", "out")

    def __init__(self, queue: Queue, tag: str, window: int, lasts: bool) -> None:
        self.queue = queue
        self.tag = tag
        self.window = window
        #: Without it the server would delete the queue.
        self.lasts = lasts
        self.out = 0


class Settling(Protocol):
    """A consumer, as its link sees it."""

    notes: Optional[amqp_notes.Notes]

    def settle(self) -> None:
        """Tell the server what has ended or started early."""

    def undo(self) -> None:
        """The transaction failed: what was not told yet is not to be told."""

    def unstart(self, held: "Held") -> None:
        """It was to be started in a transaction that failed."""

    def put_back(self, held: "Held") -> None:
        """It was taken in a transaction that failed."""

    def close(self) -> None:
        """Give everything unfinished back."""


class Step:
    """What an open transaction has collected since it was last done."""

    def __init__(self) -> None:
        self.items: List[Tuple[Message, Item]] = []
        self.timeout_s = 0.0
        #: (task ids, until when) that are noted as revoked.
        self.revoked: List[Tuple[List[str], float]] = []
        self.touched: List[Held] = []
        self.started: List[Held] = []
        #: What is done already, and what was taken, in this transaction.
        self.done: List[Held] = []
        self.sent: List[Message] = []
        self.taken: List[Held] = []


class Link:
    """One thread's way to a RabbitMQ server, for a transport and its consumers."""

    def __init__(self, url: str, options: Options, wall: Callable[[], float]) -> None:
        self.options = options
        self.wall = wall
        self.consumers: List[Settling] = []
        #: When one of their connections turned out to be dead.
        self.dead_mono = float("-inf")
        #: What was declared here, by name.
        self.declared: Dict[str, Queue] = {}
        self.exchanges: Dict[str, Exchange] = {}
        self.waiting = Waiting(options.hold, options.delayed_queue_type)
        self.open_step: Optional[Step] = None
        #: Messages the server has, of transactions that failed after that: they are not sent again.
        self.sent_before: Dict[int, Message] = {}
        self._url = url
        self._server: Optional[Server] = None
        self._pid = 0
        self._has_dead = self._has_notes = self._has_no_notes = False

    @property
    def server(self) -> Server:
        """The server, this process' way to it."""
        if self._server is None or self._pid != os.getpid():
            self._server = Server.of(self._url, self.options)
            self._pid = os.getpid()
        return self._server

    def suspect(self) -> None:
        """A connection turned out to be dead: those that lie idle in the pool most likely are, too."""
        self.dead_mono = monotonic()
        self.server.close()

    @contextmanager
    def channel(self, timeout_s: Optional[float] = None) -> Iterator[Channel]:
        """Give a channel for some calls."""
        timeout_s = timeout_s or self.options.socket_timeout
        deadline_mono = monotonic() + timeout_s
        with self.server.borrow(timeout_s) as connection:
            channel = connection.open_channel(left_until(deadline_mono))
            try:
                yield channel
            finally:
                channel.close(max(deadline_mono - monotonic(), 0.1))

    # -- declare

    def declare_on(self, channel: Channel, queue: Queue, deadline_mono: float) -> None:
        """Declare a queue; one that is exclusive belongs to the connection of who consumes from it."""
        if queue.exclusive:
            for exchange in exchanges_of(queue).values():
                declare_exchange(channel, exchange, deadline_mono)
        else:
            declare_queue(channel, queue, deadline_mono)
        self.remember(queue)

    def remember(self, queue: Queue) -> None:
        """Note that it was declared: if it is gone when something is published, it is declared again."""
        self.exchanges.update(exchanges_of(queue))
        if not goes_unused(queue):
            self.declared[queue.name] = queue

    def way(self, queue: str, left_s: float, deadline_mono: float) -> Tuple[str, str]:
        """Return exchange and routing key for a message to a queue which is due in `left_s`."""
        known = self.declared.get(queue)
        is_there, _, _, found = self.waiting.way(known, queue, left_s)
        if not is_there:
            with self.channel(left_until(deadline_mono)) as channel:
                self.waiting.declare_way(channel, known, queue, left_s, deadline_mono)
        return found

    def native_way(self, exchange: str, key: str, left_s: float, deadline_mono: float) -> Tuple[str, str]:
        """Return exchange and key for a message to a topic exchange, due in `left_s`.

        Which queues get it nobody knows here: where one of them is a quorum queue, it waits in Celery's
        layout before, and comes to the exchange when it is due.
        """
        for queue in self.declared.values():
            kind = exchanges_of(queue).get(exchange)
            if kind is None or kind.type != "topic" or not is_quorum(queue):
                continue
            if not self.waiting.is_natively_bound(queue):
                with self.channel(left_until(deadline_mono)) as channel:
                    self.waiting.bind(channel, queue, deadline_mono)
            return self.waiting.native_way(key, left_s) or (exchange, key)
        return exchange, key

    # -- publish

    def hand_over(self, items: List[Tuple[Message, Item]], timeout_s: float) -> None:
        """Send now, or with the open transaction; not what the server has of one that failed."""
        step = self.open_step
        if step is None:
            self.send(items, timeout_s)
        else:
            for one in items:
                if self.sent_before and self.sent_before.pop(id(one[0]), None) is not None:
                    step.sent.append(one[0])  # for this one may fail as well
                else:
                    step.items.append(one)
            step.timeout_s = max(step.timeout_s, timeout_s)

    def send(
        self,
        items: Sequence[Tuple[Message, Item]],
        timeout_s: float,
        again: bool = False,
        accepted: Optional[List[Message]] = None,
    ) -> None:
        """Publish now; what reaches no queue because one was deleted is sent `again` to it, once.

        When it raises, `accepted` holds the messages which the server is known to have.
        """
        deadline_mono = monotonic() + timeout_s
        try:
            with self.server.borrow(timeout_s) as connection:
                channel = connection.publisher(left_until(deadline_mono))
                refusals = channel.publish([item for _, item in items], left_until(deadline_mono))
        except ChannelError as error:
            if error.code == 404 and not again and self._declare_exchanges(items, deadline_mono):
                self.send(items, left_until(deadline_mono), True, accepted)
                return
            if error.code == 404 and "'_miniq." in error.text:
                raise OperationalError(f"where messages wait to be due is gone: {error}") from error
            raise refused(error, "publishing") from error
        except (TypeError, ValueError) as error:
            fitting = [(message, _cut(item)) for message, item in items]
            if any(new[1] is not old[1] for new, old in zip(fitting, items)):
                self.send(fitting, left_until(deadline_mono), again, accepted)
                return
            raise EncodeError(f"a message that AMQP cannot carry: {error}") from error
        bad = [(one, refusal) for one, refusal in zip(items, refusals) if refusal is not None]
        if bad:
            if accepted is not None:
                accepted += [one[0] for one, refusal in zip(items, refusals) if refusal is None]
            self._mend(bad, len(items), deadline_mono, again)

    def _declare_exchanges(self, items: Sequence[Tuple[Message, Item]], deadline_mono: float) -> bool:
        """Declare the exchanges which are known here and may be missing there; say whether any is."""
        known = {**CELERYS_OWN, **self.exchanges}
        names = {item[0] for _, item in items}
        found = [known[name] for name in names if name in known]
        if found:
            with self.channel(left_until(deadline_mono)) as channel:
                for exchange in found:
                    declare_exchange(channel, exchange, deadline_mono)
        if any(name.startswith(WAITING_ROOMS) for name in names):
            self.waiting.forget()
        return bool(found)

    def _mend(
        self,
        bad: List[Tuple[Tuple[Message, Item], Refusal]],
        count: int,
        deadline_mono: float,
        again: bool,
    ) -> None:
        """Send again what reached no queue because one was deleted; raise for the others."""
        missing: List[Tuple[Message, Item]] = []
        for one, refusal in bad:
            exchange, routing_key = one[1][:2]
            if refusal.kind != "returned":
                raise OperationalError(
                    f"{self.server.url}: the server refused {len(bad)} of {count} messages"
                    f" (to exchange {exchange!r} with key {routing_key!r}):"
                    f" {refusal.text or 'a queue is full'}"
                )
            if not exchange and routing_key in self.declared and not again:
                missing.append(one)
                continue
            if exchange.startswith(WAITING_ROOMS):
                self.waiting.forget()
                raise OperationalError(f"the queues in which messages wait to be due are gone: {exchange!r}")
            if not exchange and routing_key == DEAD:
                self._has_dead = False
                raise OperationalError(f"{self.server.url}: queue {DEAD} was deleted; it is declared again")
            kind = self.exchanges[exchange].type if exchange in self.exchanges else "direct"
            if not exchange:
                raise ImproperlyConfigured(
                    f"there is no queue {routing_key!r} on the server: the task would be lost; declare it,"
                    " as a worker does which consumes from it"
                )
            if kind == "headers":
                raise ImproperlyConfigured(
                    f"exchange {exchange!r}: no queue is bound for the headers of the task, it would be lost"
                )
            text = what_is_unroutable({kind}, exchange, routing_key)
            if text is not None:
                raise ImproperlyConfigured(text)
            logger.warning("nobody is bound to exchange %r: the task sent there is dropped", exchange)
        if missing:
            with self.channel(left_until(deadline_mono)) as channel:
                for name in {item[1] for _, item in missing}:
                    logger.warning("queue %s was deleted; it is declared again", name)
                    self.declare_on(channel, self.declared[name], deadline_mono)
                    self.waiting.lead_to(channel, self.declared[name], deadline_mono)
            self.send(missing, left_until(deadline_mono), again=True)

    # -- what consumers send

    def copy(self, delivery: Delivery, starts: int) -> Tuple[Message, Item]:
        """Return a copy of a message for the end of its queue."""
        return self._copy(delivery, starts, "", delivery.queue)

    def copy_until(self, delivery: Delivery, until: float, starts: int) -> Tuple[Message, Item]:
        """Return a copy of a message that waits in the server."""
        now = self.wall()
        left_s = until - now
        if left_s <= 0:
            return self.copy(delivery, starts)
        way = self.way(delivery.queue, left_s, monotonic() + self.options.socket_timeout)
        message, (exchange, key, properties, headers, body, mandatory) = self._copy(delivery, starts, *way)
        if due_at(message, now) < until:
            headers = {**headers, UNTIL: until}
        return message, (exchange, key, properties, headers, body, mandatory)

    def _copy(self, delivery: Delivery, starts: int, exchange: str, key: str) -> Tuple[Message, Item]:
        properties, headers = to_content(delivery.message, starts)
        headers = {**headers, COPY: os.urandom(6).hex()}
        return delivery.message, (exchange, key, properties, headers, delivery.message.body, True)

    def publish_copies(self, copies: List[Tuple[Message, Item]]) -> None:
        """Publish what takes the place of deliveries; in a transaction, with it."""
        self.hand_over(copies, self.options.socket_timeout)

    def send_now(self, copies: List[Tuple[Message, Item]], accepted: List[Message]) -> None:
        """Publish at once, whatever is open; see `send`."""
        self.send(copies, self.options.socket_timeout, accepted=accepted)

    def publish_dead(self, delivery: Delivery, reason: str, starts: int) -> None:
        """Set a message aside."""
        if not self._has_dead:
            with self.channel() as channel:
                declare_dead(channel, monotonic() + self.options.socket_timeout)
            self._has_dead = True
        message, (_, _, properties, headers, body, _) = self._copy(delivery, starts, "", DEAD)
        told = {
            "id": os.urandom(8).hex(), "queue": delivery.queue,
            "reason": truncate(reason, MAX_REASON_CHARS), "at": self.wall(),
        }  # fmt: skip
        headers = {**headers, DEAD_HEADER: told}
        # It stays until somebody looks at it.
        properties.pop("expiration", None)
        self.hand_over([(message, ("", DEAD, properties, headers, body, True))], self.options.socket_timeout)

    def tell_revoked(self, task_ids: List[str], until: float) -> None:
        """Let the consumers here know what is noted, at once."""
        for consumer in self.consumers:
            if consumer.notes is not None:
                consumer.notes.revoke(task_ids, until)

    def forget_notes(self) -> None:
        """The stream of notes was deleted: it is declared again before the next one."""
        self._has_notes = False

    def note(self, body: bytes, at_once: bool = False) -> None:
        """Write into the notes, if there are any; `at_once`, whatever is open."""
        if not (self._has_notes or self._has_no_notes):
            with self.channel() as channel:
                try:
                    amqp_notes.declare_stream(channel)
                    self._has_notes = True
                except ChannelError as error:
                    self._has_no_notes = True
                    text = "workers that do not run now will not know what is revoked: %s"
                    logger.warning(text, refused(error, "no stream queue"))
        if self._has_no_notes:
            return
        message = Message(body, "application/json", "utf-8", {}, {"delivery_mode": 2})
        item = ("", amqp_notes.STREAM, *to_content(message), body, False)
        (self.send if at_once else self.hand_over)([(message, item)], self.options.socket_timeout)

    # -- transactions

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Collect what is called; do it at the next poll and at the end."""
        if self.open_step is not None:
            yield
            return
        step = self.open_step = Step()
        try:
            yield
            self.step()
        except BaseException:
            self._undo(step)
            raise
        finally:
            self.open_step = None
        for held in step.done:
            held.doubted = False

    def step(self) -> None:
        """Do what was collected: first what is published, then what is acknowledged."""
        step = self.open_step
        if step is not None:
            if step.items:
                accepted: List[Message] = []
                try:
                    self.send(step.items, step.timeout_s, accepted=accepted)
                except BaseException:
                    step.sent += accepted
                    raise
                step.sent += [message for message, _ in step.items]
                step.items = []
            for task_ids, until in step.revoked:
                self.tell_revoked(task_ids, until)
            step.revoked = []
        for consumer in self.consumers:
            consumer.settle()
        if step is not None:
            for held in step.touched:
                if held.state == Held.ENDING:
                    held.state = Held.GONE
                    # Whoever waits for the end of the transaction does not know that yet.
                    held.doubted = True
            step.done += step.touched
            step.touched, step.started = [], []

    def _undo(self, step: Step) -> None:
        for held in step.touched:
            if held.state == Held.ENDING:
                held.state = Held.HERE
        for consumer in self.consumers:
            consumer.undo()
        for held in step.started:
            held.consumer.unstart(held)
        for message in step.sent:
            self.sent_before[id(message)] = message
        while len(self.sent_before) > 10_000:
            del self.sent_before[next(iter(self.sent_before))]
        for held in reversed(step.taken):
            held.consumer.put_back(held)

    def touch(self, held: Held) -> None:
        """A consumer ends a message: with the open transaction, or now."""
        if self.open_step is not None:
            self.open_step.touched.append(held)
        else:
            self.step()
            held.state = Held.GONE

    def begin(self, helds: List[Held]) -> None:
        """A consumer starts messages: with the open transaction, or now."""
        if self.open_step is not None:
            self.open_step.started += helds
        else:
            self.step()

    def take(self, held: Held) -> None:
        """A consumer hands a message out; it takes it back if the transaction fails."""
        if self.open_step is not None:
            self.open_step.taken.append(held)


def _cut(item: Item) -> Item:
    """Return what takes the place of a delivery with headers that fit into a frame, if they did not.

    Nobody could settle that delivery otherwise, and all would wait for it.
    """
    exchange, routing_key, properties, headers, body, mandatory = item
    if COPY not in headers:
        return item
    try:
        encode_table(headers)
    except (TypeError, ValueError):
        return item  # it is not their length
    cut: List[str] = []
    for name in sorted(headers, key=lambda name: len(repr(headers[name])), reverse=True):
        if len(encode_table(headers)) <= MAX_HEADER_BYTES:
            break
        if not cut:
            headers = dict(headers)
        cut.append(name)
        value = headers[name]
        headers[name] = truncate(value, MAX_REASON_CHARS) if isinstance(value, str) else None
    if not cut:
        return item
    text = "The headers of message %.100r do not fit into a frame of AMQP: cut are %.300s"
    logger.warning(text, headers.get("id"), ", ".join(cut))
    return exchange, routing_key, properties, headers, body, mandatory

# SPDX-License-Identifier: MIT
"""RabbitMQ as the broker, with exchanges, queues and messages as Celery has them.

Publishing is confirmed: `publish` returns when the server has the messages on its disk (or, for
transient ones, in its queue), and raises when one reaches no queue.  It goes over connections that
the threads of a process share; a worker takes its messages over one of its own (`amqp_consumer`), as
a server that is short of memory stops reading from those who publish.

RabbitMQ has no transactions worth the name.  What is called in a transaction is done at the next
`Consumer.poll`, or at its end, and in this order: messages are published and confirmed, and only then
is acknowledged what they replace.  So whatever breaks in between, a message may be there twice for a
moment, and never not at all.

Besides Celery's there are queues whose names begin with ``_miniq.``: ``dead`` (messages that were set
aside), ``delay.*`` (messages that are not due) and ``notes`` (what workers tell each other).
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from time import monotonic
from typing import Any, Callable, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

from ..connections.amqp import Channel, ChannelError, Options
from ..routing import Queue
from ..times import to_epoch
from . import amqp_notes
from .amqp_consumer import AmqpConsumer
from .amqp_link import DEAD_HEADER, Item, Link
from .amqp_message import COPY, from_content, take_marks, to_content
from .amqp_topology import refused
from .amqp_waiting import DEAD, declare_dead
from .base import DeadLetter, Publication, QueueSize, Transport, due_at

#: Dead letters that are looked through at most.
MOST_DEAD = 10_000


class AmqpTransport(Transport):
    """One thread's way to a RabbitMQ server."""

    fanout = True
    priority = True
    delay = True
    rolls_back = False
    priority_order = "higher first"

    def __init__(self, url: str, options: Mapping[str, Any], wall: Callable[[], float]) -> None:
        self.link = Link(url, Options.read(options, url), wall)
        self.confirms = self.link.options.confirm_publish
        self._pid = os.getpid()

    # -- declare

    def declare(self, queue: Queue, timeout_s: Optional[float] = None) -> None:
        link = self.link
        known = link.declared.get(queue.name)
        if (known is queue or known == queue) and self._pid == os.getpid():
            return
        self._pid = os.getpid()
        timeout_s = link.options.socket_timeout if timeout_s is None else timeout_s
        deadline_mono = monotonic() + timeout_s
        with link.channel(timeout_s) as channel:
            link.declare_on(channel, queue, deadline_mono)

    # -- publish

    def publish(self, publications: Sequence[Publication], timeout_s: float) -> None:
        deadline_mono = monotonic() + timeout_s
        self.link.hand_over([(p.message, self._item(p, deadline_mono)) for p in publications], timeout_s)

    def _item(self, publication: Publication, deadline_mono: float) -> Item:
        message, exchange, routing_key = publication
        properties, headers = to_content(message)
        eta = message.headers.get("eta")
        if eta is not None:
            link = self.link
            left_s = due_at(message, link.wall()) - link.wall()
            if not exchange and link.waiting.is_far(left_s):
                exchange, routing_key = link.way(routing_key, left_s, deadline_mono)
            elif exchange and link.waiting.is_far(left_s):
                exchange, routing_key = link.native_way(exchange, routing_key, left_s, deadline_mono)
        return exchange, routing_key, properties, headers, message.body, "task" in headers

    # -- transactions

    def transaction(self) -> "AbstractContextManager[None]":
        return self.link.transaction()

    # -- consumers

    def consumer(self, node: str, queues: Iterable[Queue]) -> AmqpConsumer:
        return AmqpConsumer(self.link, node, queues)

    # -- looking and mending

    def purge(self, queue: str) -> int:
        with self.link.channel() as channel:
            try:
                reply = channel.call("queue.purge", queue=queue)
            except ChannelError as error:
                if error.code == 404:
                    return 0
                raise refused(error, f"queue {queue!r}") from error
        count: int = reply["message_count"]
        return count

    def sizes(self, names: Iterable[str] = ()) -> List[QueueSize]:
        known = {*names, *self.link.declared}
        found = []
        for name in sorted(known):
            try:
                with self.link.channel() as channel:
                    reply = channel.call("queue.declare", queue=name, passive=True)
            except ChannelError as error:
                if error.code != 404:
                    raise refused(error, f"queue {name!r}") from error
            else:
                consumers = reply["consumer_count"]
                found.append(QueueSize(name, reply["message_count"], None, None, None, consumers))
        return found

    def revoke(self, task_ids: Iterable[str], until: float) -> None:
        ids = list(task_ids)
        for start in range(0, len(ids), 1000):
            part = ids[start : start + 1000]
            self.link.note(amqp_notes.revocation(part, until))
            if self.link.open_step is not None:
                self.link.open_step.revoked.append((part, until))
            else:
                self.link.tell_revoked(part, until)

    def dead_letters(self, limit: int = 100) -> List[DeadLetter]:
        with self.link.channel() as channel:
            letters = [letter for _, letter in self._each_dead(channel)]
        # Closing the channel has put all of them back.
        return letters[: -limit - 1 : -1] if limit else []

    def _each_dead(self, channel: Channel) -> Iterator[Tuple[int, DeadLetter]]:
        """Take dead letters, the oldest first; they go back with the channel."""
        declare_dead(channel, monotonic() + self.link.options.socket_timeout)
        for _ in range(MOST_DEAD):
            found = channel.get(DEAD)
            if found is None:
                return
            message = from_content(found.content)
            told = message.headers.pop(DEAD_HEADER, None)
            added = take_marks(message.headers).added
            if not isinstance(told, dict):
                # By the server itself.
                told = {
                    "id": f"due-{message.headers.get('id')}", "queue": found.routing_key,
                    "reason": f"queue {found.routing_key} was gone when it was due",
                    "at": _died_at(added),
                }  # fmt: skip
            letter = DeadLetter(
                str(told.get("id", "")), str(told.get("queue", "")), str(told.get("reason", "")),
                _moment(told.get("at")), message,
            )  # fmt: skip
            yield found.delivery_tag, letter

    def replay(self, dead_letter_id: str) -> bool:
        with self.link.channel() as channel:
            for tag, letter in self._each_dead(channel):
                if letter.id == dead_letter_id:
                    self._publish_again(letter)
                    channel.ack(tag, False)
                    return True
        return False

    def _publish_again(self, letter: DeadLetter) -> None:
        """Publish a dead letter, at once: as a copy, which no worker takes for the message it once had."""
        timeout_s = self.link.options.socket_timeout
        publication = Publication(letter.message, "", letter.queue)
        exchange, key, properties, headers, body, _ = self._item(publication, monotonic() + timeout_s)
        headers = {**headers, COPY: os.urandom(6).hex()}
        # Mandatory, be it a task or not: it must not get lost where the queue is gone.
        self.link.send([(letter.message, (exchange, key, properties, headers, body, True))], timeout_s)

    def drop(self, dead_letter_id: str) -> bool:
        with self.link.channel() as channel:
            for tag, letter in self._each_dead(channel):
                if letter.id == dead_letter_id:
                    channel.ack(tag, False)
                    return True
        return False

    def close(self) -> None:
        for consumer in list(self.link.consumers):
            consumer.close()
        self.link.declared.clear()
        self.link.waiting.forget()


def _moment(value: Any) -> float:
    try:
        return float(value or 0.0)
    except (TypeError, ValueError):
        return 0.0


def _died_at(added: Mapping[str, Any]) -> float:
    """Return when the server took a message out of the queue in which it waited (epoch seconds)."""
    deaths = added.get("x-death")
    try:
        return to_epoch(deaths[0]["time"]) if deaths else 0.0
    except (KeyError, TypeError, ValueError):
        return 0.0

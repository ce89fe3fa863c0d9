# SPDX-License-Identifier: MIT
"""A broker in this process' memory: for tests, simulations and programs that are their own worker.

It does what the SQLite transport does, in the same order and with the same fates, and is the
reference for what the others must do.  Nothing outlives the process.

All time comes from the argument `wall` and all chance from `MemoryBroker.random`; a worker's death
is played with `MemoryBroker.owner_lost`.
"""

from __future__ import annotations

import heapq
import logging
import socket
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from ..connections.memory import (
    LOST,
    READY,
    RESERVED,
    STARTED_EARLY,
    STARTED_LATE,
    WAITING,
    MemoryBroker,
    Owner,
    QueueSettings,
    Row,
    broker_name,
    refuse_options,
)  # fmt: skip
from ..exceptions import ImproperlyConfigured
from ..message import Delivery, Message
from ..routing import Queue, key_matches
from .base import (
    Consumer,
    DeadLetter,
    Publication,
    QueueSize,
    Transport,
    due_at,
    has_died,
    pause_after_loss_s,
    what_is_unroutable,
)

logger = logging.getLogger(__name__)


class MemoryTransport(Transport):
    """One thread's way to a broker in memory."""

    fanout = True
    priority = True
    delay = True
    confirms = True
    in_process_only = True

    def __init__(self, url: str, options: Mapping[str, Any], wall: Callable[[], float]) -> None:
        refuse_options(url, options)
        self._name = broker_name(url)
        self._wall = wall
        self._broker: Optional[MemoryBroker] = None
        self._declared: Dict[str, Queue] = {}
        self._consumers: List[MemoryConsumer] = []

    @property
    def broker(self) -> MemoryBroker:
        """The broker, shared by everybody in this process who uses the same URL."""
        if self._broker is None:
            self._broker = MemoryBroker.get(self._name)
        else:
            self._broker.check_process()
        return self._broker

    def declare(self, queue: Queue, timeout_s: Optional[float] = None) -> None:
        if queue.expires is None and not queue.auto_delete:
            known = self._declared.get(queue.name)
            if (known is queue or known == queue) and queue.name in self.broker.queues:
                return
            self._declared[queue.name] = queue
        with self.broker as broker:
            settings = QueueSettings(queue.auto_delete, queue.expires, queue.message_ttl, self._wall())
            broker.set_item(broker.queues, queue.name, settings)
            for binding in queue.all_bindings:
                exchange = binding.exchange
                if exchange.name:
                    bound = broker.bindings.setdefault(exchange.name, set())
                    entry = (exchange.type, binding.routing_key, queue.name)
                    if entry not in bound:
                        broker.on_undo(bound.discard, entry)
                        bound.add(entry)

    def publish(self, publications: Sequence[Publication], timeout_s: float) -> None:
        now = self._wall()
        unroutable = None
        with self.broker as broker:
            copies: List[Tuple[str, Publication]] = []
            for publication in publications:
                message, exchange, routing_key = publication
                if not exchange:
                    copies.append((routing_key, publication))
                    continue
                bound = broker.bindings.get(exchange, ())
                found = sorted({queue for kind, key, queue in bound if key_matches(kind, key, routing_key)})
                if not found and "task" in message.headers and unroutable is None:
                    unroutable = what_is_unroutable({kind for kind, _, _ in bound}, exchange, routing_key)
                copies += [(queue, publication) for queue in found]
            if unroutable is None:
                for queue, (message, exchange, routing_key) in copies:
                    due = due_at(message, now)
                    broker.add(
                        queue, exchange, routing_key, _copy(message), WAITING if due > now else READY, due
                    )
        if unroutable is not None:
            # Raised out here: nothing was written, so a transaction around this one can go on.
            raise ImproperlyConfigured(unroutable)

    def transaction(self) -> MemoryBroker:
        return self.broker

    def consumer(self, node: str, queues: Iterable[Queue]) -> "MemoryConsumer":
        return MemoryConsumer(self, self.broker, self._wall, node, queues)

    def purge(self, queue: str) -> int:
        with self.broker as broker:
            rows = [
                row for row in broker.rows.values() if row.queue == queue and row.state in (READY, WAITING)
            ]
            for row in rows:
                broker.delete(row)
        return len(rows)

    def sizes(self, names: Iterable[str] = ()) -> List[QueueSize]:
        with self.broker as broker:
            now = self._wall()
            counts: Dict[str, List[Any]] = {name: [0, 0, 0, None] for name in broker.queues}
            for row in broker.rows.values():
                entry = counts.setdefault(row.queue, [0, 0, 0, None])
                entry[0 if row.state == READY else 1 if row.state == WAITING else 2] += 1
                if row.state == READY:
                    entry[3] = max(entry[3] or 0.0, now - row.due)
            taking = [name for owner in broker.owners.values() if owner.alive for name in owner.queues]
            return [QueueSize(name, *(*counts[name], taking.count(name))) for name in sorted(counts)]

    def revoke(self, task_ids: Iterable[str], until: float) -> None:
        with self.broker as broker:
            for task_id in task_ids:
                broker.set_item(broker.revoked, task_id, max(until, broker.revoked.get(task_id, 0.0)))

    def dead_letters(self, limit: int = 100) -> List[DeadLetter]:
        with self.broker as broker:
            newest = sorted(broker.dead_letters, reverse=True)[:limit]
            found = [(id_, *broker.dead_letters[id_]) for id_ in newest]
        return [
            DeadLetter(str(id_), queue, reason, at, _copy(row.message))
            for id_, queue, reason, at, row in found
        ]

    def replay(self, dead_letter_id: str) -> bool:
        with self.broker as broker:
            found = self._find_dead(broker, dead_letter_id)
            if found is None:
                return False
            id_, row = found
            broker.set_item(broker.dead_letters, id_, None)
            broker.add(row.queue, row.exchange, row.routing_key, row.message, READY, self._wall())
            return True

    def drop(self, dead_letter_id: str) -> bool:
        with self.broker as broker:
            found = self._find_dead(broker, dead_letter_id)
            if found is not None:
                broker.set_item(broker.dead_letters, found[0], None)
            return found is not None

    @staticmethod
    def _find_dead(broker: MemoryBroker, dead_letter_id: str) -> Optional[Tuple[int, Row]]:
        if not dead_letter_id.isdecimal() or int(dead_letter_id) not in broker.dead_letters:
            return None
        return int(dead_letter_id), broker.dead_letters[int(dead_letter_id)][3]

    def close(self) -> None:
        for consumer in list(self._consumers):
            consumer.close()
        self._broker = None


class MemoryConsumer(Consumer):
    """A worker's share of a broker in memory."""

    poll_interval_s = None

    #: Called in the sender's thread, under the broker's lock, when messages came; for those who
    #: have no loop that watches `fileno`.
    on_wake: Optional[Callable[[], None]] = None

    def __init__(
        self,
        transport: MemoryTransport,
        broker: MemoryBroker,
        wall: Callable[[], float],
        node: str,
        queues: Iterable[Queue],
    ) -> None:
        self.node = node
        self._transport = transport
        self._broker = broker
        self._wall = wall
        self._queues: Dict[str, Queue] = {}
        self._sockets: Optional[Tuple[socket.socket, socket.socket]] = None
        self._signalled = False
        self._seen = -1
        self._closed = False
        #: Where the jitter of pauses comes from.
        self.random = broker.random
        self._owner = Owner(broker.new_id(), node, self._wake)
        with broker:
            broker.set_item(broker.owners, self._owner.id, self._owner)
            for queue in queues:
                self.add_queue(queue)
        transport._consumers.append(self)

    # -- waking

    def _wake(self) -> None:
        if self.on_wake is not None:
            self.on_wake()
        if self._sockets is not None and not self._signalled:
            self._signalled = True
            self._sockets[1].send(b"\0")

    def fileno(self) -> Optional[int]:
        with self._broker:
            if self._sockets is None:
                # A pair of sockets, not a pipe: selectors on Windows take nothing else.
                self._sockets = socket.socketpair()
                for end in self._sockets:
                    end.setblocking(False)
                self._wake()
            return self._sockets[0].fileno()

    def on_readable(self) -> None:
        with self._broker:
            if self._sockets is not None and self._signalled:
                self._signalled = False
                self._sockets[0].recv(16)

    def changed(self) -> bool:
        version = self._broker.version
        if version == self._seen:
            return False
        self._seen = version
        return True

    def next_due(self) -> Optional[float]:
        with self._broker as broker:
            row = broker.first_waiting()
            return None if row is None else row.due

    def not_due(self, limit: int) -> List[Tuple[float, Delivery]]:
        now = self._wall()
        with self._broker as broker:
            rows = heapq.nsmallest(
                limit,
                (
                    row
                    for row in broker.rows.values()
                    if row.state == WAITING and row.queue in self._queues and row.due > now
                ),
                key=lambda row: row.due,
            )
            return [
                (row.due, Delivery(row.message, None, row.queue, row.exchange, row.routing_key))
                for row in rows
            ]

    # -- taking

    def poll(self, limit: int) -> List[Delivery]:
        found: List[Delivery] = []
        now = self._wall()
        with self._broker as broker:
            row = broker.first_waiting()
            while row is not None and row.due <= now:
                broker.change(row, READY, lost_by=row.lost_by)
                row = broker.first_waiting()
            while len(found) < limit:
                row = (self._takes_lost() and broker.first_lost()) or self._next()
                if row is None:
                    break
                if row.lost_by is None and self._is_over(row, now):
                    broker.delete(row)
                else:
                    found.append(self._take(row, now))
        return found

    def _takes_lost(self) -> bool:
        """Say whether lost messages may go here: the mailbox of one worker must not swallow tasks."""
        return any(not queue.auto_delete for queue in self._queues.values())

    def _is_over(self, row: Row, now: float) -> bool:
        ttl = self._queues[row.queue].message_ttl
        return (ttl is not None and row.due + ttl <= now) or has_died(row.message, row.due, now)

    def _next(self) -> Optional[Row]:
        rows = [row for row in map(self._broker.first_ready, self._queues) if row is not None]
        return min(rows, key=_place) if len(rows) > 1 else rows[0] if rows else None

    def _take(self, row: Row, now: float) -> Delivery:
        self._broker.change(row, RESERVED, owner=self._owner.id, lost_by=row.lost_by)
        fate = None
        if row.lost_by is not None or (self.delivery_limit and row.deliveries >= self.delivery_limit):
            fate = "lost"
        elif self._broker.revoked and self._broker.revoked.get(row.message.headers.get("id", ""), 0.0) > now:
            fate = "revoked"
        return Delivery(
            _copy(row.message),
            row.id,
            row.queue,
            row.exchange,
            row.routing_key,
            row.deliveries,
            fate,
            row.lost_by or "",
        )

    def start(self, deliveries: Sequence[Delivery]) -> None:
        with self._broker as broker:
            for delivery in deliveries:
                row = self._ours(delivery)
                if row is not None:
                    state = STARTED_EARLY if delivery.early else STARTED_LATE
                    broker.change(row, state, owner=self._owner.id, lost_by=row.lost_by)
                    row.deliveries += 1

    # -- settling

    def _ours(self, delivery: Delivery) -> Optional[Row]:
        row = self._broker.rows.get(delivery.tag)
        return row if row is not None and row.owner == self._owner.id else None

    def ack(self, delivery: Delivery) -> bool:
        with self._broker as broker:
            row = self._ours(delivery)
            if row is not None:
                broker.delete(row)
            return row is not None

    def reject(self, delivery: Delivery, requeue: bool, reason: str = "rejected") -> bool:
        if not requeue:
            return self.dead_letter(delivery, reason)
        with self._broker as broker:
            row = self._ours(delivery)
            if row is not None:
                broker.change(row, READY, self._wall())
                if self.delivery_limit:
                    # Sent back on purpose: that is no loss, it does not bring it nearer to its limit.
                    row.deliveries = min(row.deliveries, self.delivery_limit - 1)
            return row is not None

    def release(self, deliveries: Sequence[Delivery]) -> None:
        with self._broker as broker:
            for delivery in deliveries:
                row = self._ours(delivery)
                if row is not None:
                    was_started = row.state in (STARTED_EARLY, STARTED_LATE)
                    broker.change(row, READY if row.lost_by is None else LOST, lost_by=row.lost_by)
                    row.deliveries -= was_started

    def defer(self, delivery: Delivery, until: float) -> bool:
        with self._broker as broker:
            row = self._ours(delivery)
            if row is not None:
                broker.change(row, WAITING if until > self._wall() else READY, until, lost_by=row.lost_by)
            return row is not None

    def dead_letter(self, delivery: Delivery, reason: str) -> bool:
        with self._broker as broker:
            row = self._ours(delivery)
            if row is not None:
                broker.set_item(broker.dead_letters, row.id, (row.queue, reason, self._wall(), row))
                broker.delete(row)
            return row is not None

    # -- upkeep

    def housekeep(self) -> None:
        now = self._wall()
        with self._broker as broker:
            for owner in [owner for owner in broker.owners.values() if not owner.alive]:
                if owner is not self._owner:
                    count = self._recover(owner, now)
                    if count:
                        logger.warning(
                            "worker %s is gone: %d messages of it are recovered", owner.node, count
                        )
            for task_id in [task_id for task_id, until in broker.revoked.items() if until <= now]:
                broker.set_item(broker.revoked, task_id, None)
            for name, settings in list(broker.queues.items()):
                if (
                    settings.expires is not None
                    and settings.used + settings.expires <= now
                    and not self._is_used(name)
                ):
                    self._delete_queue(name)
                elif settings.message_ttl is not None:
                    row = broker.first_ready(name)
                    while row is not None and row.due + settings.message_ttl <= now:
                        broker.delete(row)
                        row = broker.first_ready(name)

    def _recover(self, owner: Owner, now: float) -> int:
        """Give back what a dead owner held; return how many messages that were."""
        broker, limit = self._broker, self.delivery_limit
        rows = [row for row in broker.rows.values() if row.owner == owner.id]
        for row in rows:
            if row.lost_by is not None:
                broker.change(row, LOST, lost_by=row.lost_by)
            elif row.state == RESERVED:
                broker.change(row, READY)
            elif row.state == STARTED_LATE and (not limit or row.deliveries < limit):
                pause_s = pause_after_loss_s(row.deliveries, self.random.random())
                if pause_s:
                    broker.change(row, WAITING, now + pause_s)
                else:
                    broker.change(row, READY)
            else:
                broker.change(row, LOST, lost_by=owner.node)
        broker.set_item(broker.owners, owner.id, None)
        for name in sorted(owner.queues):
            self._leave(name, now)
        return len(rows)

    def _is_used(self, queue: str) -> bool:
        return any(queue in owner.queues for owner in self._broker.owners.values())

    def _leave(self, queue: str, now: float) -> None:
        """Delete a queue that goes with its last consumer, or start its time to expire."""
        settings = self._broker.queues.get(queue)
        if settings is None or self._is_used(queue):
            return
        if settings.auto_delete:
            self._delete_queue(queue)
        else:
            settings.used = now

    def _delete_queue(self, name: str) -> None:
        broker = self._broker
        broker.set_item(broker.queues, name, None)
        for bound in broker.bindings.values():
            for entry in [entry for entry in bound if entry[2] == name]:
                broker.on_undo(bound.add, entry)
                bound.remove(entry)
        row = broker.first_ready(name)
        while row is not None:
            broker.delete(row)
            row = broker.first_ready(name)

    # -- queues

    def add_queue(self, queue: Queue) -> None:
        with self._broker as broker:
            self._transport.declare(queue)
            broker.on_undo(self._owner.queues.discard, queue.name)
            self._owner.queues.add(queue.name)
            self._queues[queue.name] = queue
        self._seen = -1

    def cancel_queue(self, name: str) -> None:
        if self._queues.pop(name, None) is not None:
            with self._broker:
                self._owner.queues.discard(name)
                self._leave(name, self._wall())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with self._broker:
            self._recover(self._owner, self._wall())
        self._transport._consumers.remove(self)
        if self._sockets is not None:
            for end in self._sockets:
                end.close()
            self._sockets = None


def _copy(message: Message) -> Message:
    """Return a copy whose dicts nobody else changes."""
    return Message(
        message.body,
        message.content_type,
        message.content_encoding,
        dict(message.headers),
        dict(message.properties),
    )


def _place(row: Row) -> Tuple[int, float, int]:
    return -row.priority, row.due, row.id

# SPDX-License-Identifier: MIT
"""The transport suite over redis://."""

from __future__ import annotations

from collections import defaultdict
from typing import DefaultDict, Dict, List, Sequence, Set

import pytest
from transport_suite import Clock, Order, Row, TransportSuite

from miniq.connections.owners import OwnerLocks
from miniq.transports.base import Consumer, Transport
from miniq.transports.redis import RedisTransport
from miniq.transports.redis_consumer import RedisConsumer
from miniq.transports.redis_envelope import decode_envelope
from miniq.transports.redis_upkeep import local_path

STEPS = (0, 3, 6, 9)
LOST = "what was lost"


class InLists(Order):
    """A list for what was lost and one for each queue and priority step; what is not due is parked.

    A message that is not due when it is published is in its list until a claim has come to it; how
    far a claim looks is the store's affair, so what is parked the model asks the store.
    """

    def __init__(self, transport: RedisTransport, clock: Clock) -> None:
        self.transport, self.clock = transport, clock
        self.lists: DefaultDict[str, List[Row]] = defaultdict(list)
        self.parked: List[Row] = []
        #: id -> when it was due; among those of one moment there is no order.
        self.were_due: Dict[str, float] = {}

    def list_of(self, row: Row) -> List[Row]:
        if row.lost_by:
            return self.lists[LOST]
        return self.lists[f"{row.queue} {max(step for step in STEPS if step <= row.priority)}"]

    def put(self, row: Row, place: str) -> None:
        self.were_due.pop(row.id, None)
        if place == Order.END:
            self.list_of(row).append(row)
        elif place == Order.DUE and row.due > self.clock.now:
            self.parked.append(row)
        else:
            self.list_of(row).insert(0, row)

    def take(self, found: Sequence[str], queues: Sequence[str], limit: int) -> List[Row]:
        for queue in queues:
            self.put_what_is_due_to_the_front(queue)
        taken: List[Row] = []
        for id_ in found:
            heads = self.heads(queues)
            assert id_ in [row.id for row in heads], f"{id_} came out and not one of {heads}"
            (row,) = [row for row in heads if row.id == id_]
            self.list_of(row).remove(row)
            taken.append(row)
        assert len(found) == limit or not self.heads(queues), f"{self.heads(queues)} did not come out"
        self.see_what_is_parked(queues)
        return taken

    def put_what_is_due_to_the_front(self, queue: str) -> None:
        due = [row for row in self.parked if row.queue == queue and row.due <= self.clock.now]
        self.parked = [row for row in self.parked if row not in due]
        for row in sorted(due, key=lambda row: row.due, reverse=True):
            self.list_of(row).insert(0, row)
            self.were_due[row.id] = row.due

    def heads(self, queues: Sequence[str]) -> List[Row]:
        """Return what may come next: the first ones of the lists with the strictest step."""
        for level in [[LOST], *([f"{queue} {step}" for queue in queues] for step in STEPS)]:
            lists = [[row for row in self.lists[name] if row.due <= self.clock.now] for name in level]
            if any(lists):
                return [row for rows in lists for row in rows if self.is_equal(row, rows[0])]
        return []

    def is_equal(self, row: Row, first: Row) -> bool:
        moment = self.were_due.get(first.id)
        return row is first or (moment is not None and moment == self.were_due.get(row.id))

    def see_what_is_parked(self, queues: Sequence[str]) -> None:
        known = {row.id for row in self.parked}
        for queue in queues:
            for id_ in self.parked_at_the_server(queue) - known:
                (row,) = [row for rows in self.lists.values() for row in rows if row.id == id_]
                assert row.due > self.clock.now, f"{row} was parked"
                self.list_of(row).remove(row)
                self.parked.append(row)

    def parked_at_the_server(self, queue: str) -> Set[str]:
        with self.transport.link.using() as connection:
            members = connection.call("ZRANGE", self.transport.link.layout.parked(queue), 0, -1)
        items = [member.partition(b"\0")[2] for member in members]
        return {decode_envelope(item).message.headers["id"] for item in items}


class TestRedisTransport(TransportSuite):
    takes_turns = True

    @pytest.fixture
    def url(self, redis_url: str) -> str:
        return redis_url

    def new_order(self, transport: Transport, clock: Clock) -> Order:
        assert isinstance(transport, RedisTransport)
        return InLists(transport, clock)

    def lose(self, transport: Transport, consumer: Consumer) -> None:
        # What kernel and server do when a process is gone; tests with real processes are elsewhere.
        assert isinstance(transport, RedisTransport)
        assert isinstance(consumer, RedisConsumer)
        with transport.link.using() as connection:
            connection.call("DEL", transport.link.layout.alive(consumer.owner))
        OwnerLocks.of(local_path()).drop(int(consumer.owner, 16))

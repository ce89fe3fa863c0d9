# SPDX-License-Identifier: MIT
"""The way of messages that are not due, and that it is there.

What is put off here goes up the ladder: queues of the type that the task's queue has, so that a
message is nowhere kept less safely than in its own.  Celery's native layout is declared, and leads into
the quorum queues that are consumed here, for what Celery's clients send through it (`amqp_delay` has
both as data, and what is wrong with the native one).

What is declared is remembered, until the server turns out to have lost it.
"""

from __future__ import annotations

from time import monotonic
from typing import Any, Dict, Iterable, Optional, Set, Tuple

from ..connections.amqp import Channel, ChannelError
from ..routing import Queue
from . import amqp_delay as layout
from .amqp_topology import is_quorum, left_until, refused

#: Where messages are set aside.
DEAD = layout.DEAD
#: Seconds for the declaration of the whole native layout, 57 objects and their bindings.
NATIVE_TIMEOUT_S = 30.0


class Waiting:
    """What one link knows of the layouts on its server."""

    def __init__(self, hold_s: float, native_type: str) -> None:
        self._hold_s = hold_s
        self._native_type = native_type
        #: (type, level) of the ladder, and quorum queues that what is due comes to.
        self._levels: Set[Tuple[str, int]] = set()
        self._ends: Set[str] = set()
        self._natively: Set[str] = set()
        self._has_native = self._has_end = False

    def forget(self) -> None:
        """Declare everything again when it is needed: the server does not have it any more."""
        self._levels.clear()
        self._ends.clear()
        self._natively.clear()
        self._has_native = self._has_end = False

    def is_far(self, left_s: float) -> bool:
        """Say whether a message is due so late that it waits in the server."""
        return layout.level(left_s, self._hold_s) is not None

    def way(
        self, queue: Optional[Queue], name: str, left_s: float
    ) -> Tuple[bool, str, int, Tuple[str, str]]:
        """Return whether the way to the queue `name` is there, its type, its level, and (exchange, key)."""
        kind = "quorum" if is_quorum(queue) else "classic"
        level = layout.level(left_s, 0.0) or 0
        is_there = (kind, level) in self._levels and (kind == "classic" or name in self._ends)
        return is_there, kind, level, (layout.ladder_name(level, kind), name)

    def declare_way(
        self, channel: Channel, queue: Optional[Queue], name: str, left_s: float, deadline_mono: float
    ) -> None:
        """Declare what `way` needs."""
        _, kind, level, _ = self.way(queue, name, left_s)
        if kind == "quorum":
            assert queue is not None
            self.lead_to(channel, queue, deadline_mono)
        self._declare(channel, layout.ladder_declarations(level, kind), deadline_mono)
        self._levels.add((kind, level))

    def lead_to(self, channel: Channel, queue: Queue, deadline_mono: float) -> None:
        """Let what was put off come to a queue, if it is a quorum queue: others are found by name."""
        if not is_quorum(queue):
            return
        if not self._has_end:
            declare_dead(channel, deadline_mono)
            self._declare(channel, layout.due_declarations(), deadline_mono)
            self._has_end = True
        self._declare(channel, layout.due_bindings(queue), deadline_mono)
        self._ends.add(queue.name)

    def bind(self, channel: Channel, queue: Queue, deadline_mono: float) -> None:
        """Let both layouts lead into a queue that is consumed from here, if it is a quorum queue."""
        if not is_quorum(queue):
            return
        self.lead_to(channel, queue, deadline_mono)
        if not self._has_native:
            declarations = layout.native_declarations(self._native_type)
            self._declare(channel, declarations, monotonic() + NATIVE_TIMEOUT_S)
            self._has_native = True
        self._declare(channel, layout.native_bindings(queue), deadline_mono)
        self._natively.add(queue.name)

    def native_way(self, key: str, left_s: float) -> Optional[Tuple[str, str]]:
        """Return (exchange, key) by which a message for an exchange goes through Celery's layout.

        None where its key leaves no room for that.
        """
        try:
            return layout.ENTRANCE, layout.routing_key(left_s, key)
        except ValueError:
            return None

    def is_natively_bound(self, queue: Queue) -> bool:
        """Say whether `bind` was called for it."""
        return queue.name in self._natively

    def _declare(
        self, channel: Channel, declarations: Iterable[Tuple[str, Dict[str, Any]]], deadline_mono: float
    ) -> None:
        for method, arguments in declarations:
            _call(channel, method, arguments, deadline_mono)


def declare_dead(channel: Channel, deadline_mono: float) -> None:
    """Declare the queue of what was set aside, with the exchange to which the server sets aside."""
    _call(channel, "exchange.declare", {"exchange": DEAD, "type": "fanout", "durable": True}, deadline_mono)
    _call(channel, "queue.declare", {"queue": DEAD, "durable": True}, deadline_mono)
    _call(channel, "queue.bind", {"queue": DEAD, "exchange": DEAD}, deadline_mono)


def _call(channel: Channel, method: str, arguments: Dict[str, Any], deadline_mono: float) -> None:
    try:
        channel.call(method, timeout_s=left_until(deadline_mono), **arguments)
    except ChannelError as error:
        name = arguments.get("queue") or arguments.get("exchange") or arguments.get("destination")
        raise refused(error, f"{method} of {name!r}, where messages wait or are set aside") from error

# SPDX-License-Identifier: MIT
"""The way of messages that are not due: which of the two layouts, and that it is there.

Messages for a quorum queue go through Celery's native layout, all others through the ladder
(`amqp_delay` has both as data).  What is declared is remembered for this process, until the server
turns out to have lost it.
"""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any, Dict, Iterable, Optional, Set, Tuple

from ..connections.amqp import Channel, ChannelError
from ..routing import Queue
from . import amqp_delay as layout
from .amqp_topology import is_quorum, left_until, refused

logger = logging.getLogger(__name__)

#: Seconds for the declaration of the whole native layout, 56 objects and their bindings.
NATIVE_TIMEOUT_S = 30.0


class Waiting:
    """What one transport knows of the layouts on its server."""

    def __init__(self, hold_s: float, queue_type: str) -> None:
        self._hold_s = hold_s
        self._queue_type = queue_type
        self._levels: Set[int] = set()
        self._has_native = False
        self._bound: Set[str] = set()

    def forget(self) -> None:
        """Declare everything again when it is needed: the server does not have it any more."""
        self._levels.clear()
        self._bound.clear()
        self._has_native = False

    def is_far(self, left_s: float) -> bool:
        """Say whether a message is due so late that it waits in the server."""
        return layout.level(left_s, self._hold_s) is not None

    def known_way(self, queue: Optional[Queue], name: str, left_s: float) -> Optional[Tuple[str, str]]:
        """Return what `way` does, None where something is to be declared first."""
        if queue is not None and is_quorum(queue) and layout.can_be_reached(name):
            return (layout.ENTRANCE, layout.routing_key(left_s, name)) if name in self._bound else None
        level = layout.level(left_s, 0.0) or 0
        return (layout.ladder_name(level), name) if level in self._levels else None

    def way(
        self, channel: Channel, queue: Optional[Queue], name: str, left_s: float, deadline_mono: float
    ) -> Tuple[str, str]:
        """Return exchange and routing key for a message to the queue `name`, due in `left_s`."""
        if queue is not None and is_quorum(queue) and layout.can_be_reached(name):
            self.bind(channel, queue, deadline_mono)
        else:
            level = layout.level(left_s, 0.0) or 0
            self._declare(channel, layout.ladder_declarations(level), deadline_mono)
            self._levels.add(level)
        found = self.known_way(queue, name, left_s)
        assert found is not None
        return found

    def bind(self, channel: Channel, queue: Queue, deadline_mono: float) -> None:
        """Let the native layout lead into a quorum queue; nothing to do for others."""
        if queue.name in self._bound or not is_quorum(queue):
            return
        if not self._has_native:
            self._declare_native(channel)
        self._declare(channel, layout.native_bindings(queue), deadline_mono)
        self._bound.add(queue.name)

    def _declare_native(self, channel: Channel) -> None:
        deadline_mono = monotonic() + NATIVE_TIMEOUT_S
        # The last binding of it is seen by nobody; but whoever began to declare it goes on to its end.
        self._declare(channel, layout.native_declarations(self._queue_type), deadline_mono)
        self._has_native = True

    def _declare(
        self, channel: Channel, declarations: Iterable[Tuple[str, Dict[str, Any]]], deadline_mono: float
    ) -> None:
        for method, arguments in declarations:
            try:
                channel.call(method, timeout_s=left_until(deadline_mono), **arguments)
            except ChannelError as error:
                name = arguments.get("queue") or arguments.get("exchange") or arguments.get("destination")
                raise refused(error, f"{method} of {name!r}, where messages wait to be due") from error

# SPDX-License-Identifier: MIT
"""EventReceiver: hears the events of all workers and senders, and hands each to a handler.

It has a queue of its own for as long as it listens.  A lost connection is made anew; what was told
meanwhile is gone, as a broker keeps an event for seconds only.

Source: the interface of Celery's class of this name.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

from .. import _state
from ..event import event_queue, is_event
from ..exceptions import MiniqError
from ..mailbox import Inbox
from ..message import Message
from ..serialization import loads, prepare_accept

logger = logging.getLogger(__name__)

#: Seconds between two looks at `should_stop` while nothing comes.
LOOK_INTERVAL_S = 0.5
#: A sender of tasks hears of nobody, so its own clock says nothing: just before what came last.
CLIENT_CLOCK_SKEW = -1


class EventReceiver:
    """Hears events.  `channel` is a connection of an app, or None with `app`.

    `handlers`: type of event -> function of the event; ``"*"`` is for all that have none.
    """

    app: Any = None

    def __init__(
        self,
        channel: Any = None,
        handlers: Optional[Mapping[str, Callable[[Dict[str, Any]], Any]]] = None,
        routing_key: str = "#",
        node_id: Optional[str] = None,
        app: Any = None,
        queue_prefix: Optional[str] = None,
        accept: Optional[Iterable[str]] = None,
        queue_ttl: Optional[float] = None,
        queue_expires: Optional[float] = None,
    ) -> None:
        self.app = app or getattr(channel, "app", None) or self.app or _state.current_app()
        self.handlers = dict(handlers or {})
        self.queue = event_queue(self.app, routing_key, node_id, queue_prefix, queue_ttl, queue_expires)
        self.accept = prepare_accept(accept or ["json"])
        #: Set it to make `capture` return soon.
        self.should_stop = False

    def process(self, type: str, event: Dict[str, Any]) -> None:  # noqa: A002 - Celery's name for it
        """Hand an event to its handler."""
        handler = self.handlers.get(type) or self.handlers.get("*")
        if handler is not None:
            handler(event)

    def capture(
        self, limit: Optional[int] = None, timeout: Optional[float] = None, wakeup: bool = True
    ) -> None:
        """Listen until `limit` messages came, or for ever; each may carry several events.

        Raises `socket.timeout` when none came for `timeout` seconds.  With `wakeup`, workers are asked
        to tell at once that they are there.
        """
        for _ in self.itercapture(limit, timeout, wakeup):
            pass

    def itercapture(
        self, limit: Optional[int] = None, timeout: Optional[float] = None, wakeup: bool = True
    ) -> Iterator[None]:
        """Do the same, and yield after each message."""
        with Inbox(self.app, self.queue) as inbox:
            if wakeup:
                self.wakeup_workers()
            taken = 0
            heard_mono = time.monotonic()
            while not self.should_stop and (not limit or taken < limit):
                quiet_s = time.monotonic() - heard_mono
                if timeout is not None and quiet_s >= timeout:
                    raise socket.timeout(f"no event came within {timeout:g} s")
                left_s = LOOK_INTERVAL_S if timeout is None else min(timeout - quiet_s, LOOK_INTERVAL_S)
                message = inbox.receive(left_s)
                if message is not None:
                    self._receive(message)
                    taken += 1
                    heard_mono = time.monotonic()
                    yield

    def wakeup_workers(self, channel: Any = None) -> None:
        """Ask workers to tell at once that they are there."""
        self.app.control.broadcast("heartbeat")

    def _receive(self, message: Message) -> None:
        try:
            body = loads(message.body, message.content_type, message.content_encoding, self.accept)
        except MiniqError as error:
            logger.error("A message in the queue of events cannot be read and is dropped: %s", error)
            return
        events: List[Any] = body if isinstance(body, list) else [body]
        for event in events:
            if is_event(event):
                self.process(*self.event_from_message(event))
            else:
                logger.error("What came in the queue of events is none and is dropped: %.200r", event)

    def event_from_message(self, body: Dict[str, Any], localize: bool = True) -> Tuple[str, Dict[str, Any]]:
        """Return type and event; adds `local_received`, and takes its number into the app's clock.

        Celery adds the difference of the time zones (`utcoffset`) to `timestamp`.  That is seconds
        since the epoch, the same everywhere, and stays as it is here.
        """
        kind, clock = body["type"], self.app.clock
        if kind == "task-sent":
            body["clock"] = (clock.value or 1) + CLIENT_CLOCK_SKEW
            clock.adjust(body["clock"])
        elif isinstance(body.get("clock"), int):
            clock.adjust(body["clock"])
        else:
            body["clock"] = clock.forward()
        body["local_received"] = self.app.wall()
        return kind, body

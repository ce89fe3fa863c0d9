# SPDX-License-Identifier: MIT
"""EventDispatcher: sends events, and keeps a bounded number of them while the broker is away.

Those of groups in `buffer_group` (a worker's: ``task``) are collected until `flush` and then go as
arrays.  What could not be sent waits, the oldest goes first when there are too many, and how many
went is told when the broker is back: one line in the log for the loss, one for the recovery.

Source: the interface of Celery's class of this name.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from itertools import islice
from typing import Any, Callable, Deque, Dict, Iterable, List, Mapping, Optional, Tuple

from .. import _state
from ..event import MULTI_KEY, EventWriter, group_from, key_of
from ..exceptions import OperationalError
from ..transports.base import Publication, Transport

logger = logging.getLogger(__name__)

#: Events that wait at most.  Their texts are bounded, most take well under a kilobyte.
MOST_EVENTS = 10_000
#: Events that go out together.
MOST_TOGETHER = 500


class EventDispatcher:
    """Sends events in the name of `hostname`; used in one thread.

    `connection` is anything of an app, or None with `app`.  `groups`: send only events of these.
    `on_send_buffered` is called when one was put into the buffer, else it is sent when `buffer_limit` are in
    it.  `transport` and `timeout_s` (seconds for one message): else as the app has them.  `channel`,
    `serializer` and `delivery_mode` are Celery's and have no effect.  A context manager: `close` at the end
    sends what is buffered.
    """

    app: Any = None

    def __init__(
        self,
        connection: Any = None,
        hostname: Optional[str] = None,
        enabled: bool = True,
        channel: Any = None,
        buffer_while_offline: bool = True,
        app: Any = None,
        serializer: Optional[str] = None,
        groups: Optional[Iterable[str]] = None,
        delivery_mode: int = 1,
        buffer_group: Optional[Iterable[str]] = None,
        buffer_limit: int = 24,
        on_send_buffered: Optional[Callable[[], Any]] = None,
        transport: Optional[Transport] = None,
        timeout_s: Optional[float] = None,
    ) -> None:
        self.app = app or getattr(connection, "app", None) or self.app or _state.current_app()
        self.hostname = hostname or self.app.identity[0]
        self.enabled = enabled
        self.buffer_while_offline = buffer_while_offline
        self.groups = set(groups or ())
        self.buffer_group = frozenset(buffer_group or ())
        self.buffer_limit = buffer_limit
        self.on_send_buffered = on_send_buffered
        #: Events that were dropped because too many waited.
        self.dropped = 0
        self._writer = EventWriter(self.app, self.hostname)
        self._transport = transport
        self._timeout_s = self.app.conf.task_publish_timeout if timeout_s is None else timeout_s
        #: (routing key, event); `MULTI_KEY` for what goes into an array.
        self._waiting: Deque[Tuple[str, Dict[str, Any]]] = deque()
        self._away_since_mono: Optional[float] = None
        self._dropped_before = 0

    def __enter__(self) -> "EventDispatcher":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def enable(self) -> None:
        """Send from now on."""
        self.enabled = True

    def disable(self) -> None:
        """Send nothing from now on."""
        self.enabled = False

    @property
    def is_away(self) -> bool:
        """Whether the last try to send failed."""
        return self._away_since_mono is not None

    def send(
        self,
        type: str,  # noqa: A002 - Celery's name for it
        blind: bool = False,
        utcoffset: Any = None,
        retry: bool = False,
        retry_policy: Any = None,
        Event: Any = None,
        **fields: Any,
    ) -> None:
        """Send an event, or put it where `flush` takes it from.

        Raises `OperationalError` unless `buffer_while_offline`.  `utcoffset`, `retry`, `retry_policy`
        and `Event` are Celery's and have no effect.
        """
        if not self.enabled:
            return
        group = group_from(type)
        if self.groups and group not in self.groups:
            return
        if group in self.buffer_group:
            self.collect(type, fields, blind)
            if self.on_send_buffered is not None:
                self.on_send_buffered()
            elif len(self._waiting) >= self.buffer_limit:
                self.flush()
            return
        self._keep(key_of(type), self._writer.make(type, fields, blind))
        if not self.flush() and type == "worker-heartbeat":
            self._waiting.pop()  # nobody wants to know later

    def collect(self, type: str, fields: Mapping[str, Any], blind: bool = False) -> None:  # noqa: A002
        """Put an event of a task where `flush` takes it from, whatever is enabled."""
        self._keep(MULTI_KEY, self._writer.make(type, fields, blind))

    def flush(self, errors: bool = True, groups: bool = True) -> bool:
        """Send what waits; return whether nothing does any more.

        Raises `OperationalError` unless `buffer_while_offline`.  The arguments are Celery's, without effect.
        """
        waiting = self._waiting
        if not waiting:
            return True
        try:
            while waiting:
                publications, count = self._next_batch()
                transport = self._transport or self.app.producer.transport
                transport.publish(publications, self._timeout_s)
                for _ in range(count):
                    waiting.popleft()
        except OperationalError as error:
            if not self.buffer_while_offline:
                waiting.clear()
                raise
            self._failed(error)
            return False
        if self._away_since_mono is not None:
            self._recovered(self._away_since_mono)
        return True

    def extend_buffer(self, other: "EventDispatcher") -> None:
        """Take over what waits in another one."""
        for key, event in other._waiting:
            self._keep(key, event)

    def close(self) -> None:
        """Send what waits, if that is possible; what is not sent is lost."""
        if not self.flush() and self._waiting:
            text = "%d events of %s could not be sent and are lost"
            logger.warning(text, len(self._waiting), self.hostname)
        self._waiting.clear()

    def _keep(self, key: str, event: Dict[str, Any]) -> None:
        waiting = self._waiting
        waiting.append((key, event))
        if len(waiting) > MOST_EVENTS:
            waiting.popleft()
            self.dropped += 1

    def _next_batch(self) -> Tuple[List[Publication], int]:
        """Return the first messages of what waits, and how many events are in them."""
        publications: List[Publication] = []
        array: List[Dict[str, Any]] = []
        make = self._writer.publication
        together = list(islice(self._waiting, MOST_TOGETHER))
        for key, event in together:
            if key == MULTI_KEY:
                array.append(event)
                continue
            # What came before it goes before it.
            if array:
                publications.append(make(MULTI_KEY, array))
                array = []
            publications.append(make(key, event))
        if array:
            publications.append(make(MULTI_KEY, array))
        return publications, len(together)

    def _failed(self, error: OperationalError) -> None:
        if self._away_since_mono is None:
            self._away_since_mono = time.monotonic()
            self._dropped_before = self.dropped
            logger.warning(
                "Events of %s cannot be sent: %s; the last %d are kept.", self.hostname, error, MOST_EVENTS
            )

    def _recovered(self, since_mono: float) -> None:
        dropped = self.dropped - self._dropped_before
        logger.warning(
            "Events of %s are sent again after %.1f s%s.",
            self.hostname,
            time.monotonic() - since_mono,
            f", {dropped} of them were dropped" if dropped else "",
        )
        self._away_since_mono = None

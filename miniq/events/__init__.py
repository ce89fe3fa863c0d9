# SPDX-License-Identifier: MIT
"""Events: what workers and senders tell of their tasks, for whoever wants to listen.

`Events` is what an app has as ``app.events``.  Celery's monitors work as they are::

    with app.connection() as connection:
        receiver = app.events.Receiver(connection, handlers={"task-failed": announce})
        receiver.capture(limit=None, timeout=None, wakeup=True)

    dispatcher  sends        receiver  hears        state  remembers        snapshot  takes pictures of it
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator, Optional

from ..event import Event, event_exchange, group_from
from .dispatcher import EventDispatcher
from .receiver import EventReceiver
from .snapshot import Polaroid, evcam
from .state import State


class Events:
    """The parts, for one app."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.Receiver = type("EventReceiver", (EventReceiver,), {"app": app})
        self.Dispatcher = type("EventDispatcher", (EventDispatcher,), {"app": app})
        self.State = State

    @contextmanager
    def default_dispatcher(
        self, hostname: Optional[str] = None, enabled: bool = True, buffer_while_offline: bool = False
    ) -> Iterator[EventDispatcher]:
        """Give a dispatcher that sends at once, over this thread's connection; errors as of a `Transport`."""
        with EventDispatcher(
            app=self.app, hostname=hostname, enabled=enabled, buffer_while_offline=buffer_while_offline
        ) as dispatcher:
            yield dispatcher


__all__ = [
    "Event",
    "EventDispatcher",
    "EventReceiver",
    "Events",
    "Polaroid",
    "State",
    "evcam",
    "event_exchange",
    "group_from",
]

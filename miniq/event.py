# SPDX-License-Identifier: MIT
"""One event: what is in it, and the message and the queue it travels by.

An event is a flat dict of JSON values, in Celery's form; `uuid` and the rest depend on its type::

    {"hostname": node, "utcoffset": hours west of UTC, "pid": n, "clock": n, ..., "timestamp": epoch seconds,
     "type": "task-received"}

It goes to the exchange ``celeryev`` with its type as the key (``task.received``); many of tasks go
together as an array with the key ``task.multi``.  Who wants to hear them binds a queue of its own.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any, Dict, Mapping, Optional

from .message import Message
from .routing import Exchange, Queue
from .signatures import new_task_id
from .text import safe_repr
from .transports.base import TRANSPORTS, Publication

EXCHANGE = "celeryev"
#: Key of a message with an array of events of tasks.
MULTI_KEY = "task.multi"

#: Times of events (epoch seconds) are less: calendars end soon after.
MAX_TIME = 1e11
#: Group -> what has to be text if it is there.
_TEXTS = {"task": ("uuid", "name", "parent_id", "root_id", "exception", "traceback")}

# Values that JSON does not have are shown rather than refused: an event is for people to look at.
_encode = json.JSONEncoder(default=safe_repr).encode


def Event(type: str, _fields: Optional[Mapping[str, Any]] = None, **fields: Any) -> Dict[str, Any]:  # noqa: N802, A002
    """Return an event of this type; it happened now unless `timestamp` is among the fields."""
    event = {**(_fields or {}), **fields, "type": type}
    event.setdefault("timestamp", time.time())
    return event


def group_from(type: str) -> str:  # noqa: A002 - Celery's name for it
    """Return the group of a type of event: ``task`` for ``task-sent``."""
    return type.partition("-")[0]


def is_event(value: Any) -> bool:
    """Say whether what came is an event that can be worked with; anybody may have sent it."""
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        return False
    texts = ("hostname", *_TEXTS.get(group_from(value["type"]), ()))
    numbers = value.get("timestamp", 0), value.get("freq") or 0
    return all(isinstance(value.get(name), (str, type(None))) for name in texts) and all(
        isinstance(number, (int, float)) and 0 <= number < MAX_TIME for number in numbers
    )


def utcoffset() -> float:
    """Return how many hours this machine's time is behind UTC (New York: 5.0, or 4.0 in summer)."""
    return (time.altzone if time.localtime().tm_isdst > 0 else time.timezone) / 3600


class EventWriter:
    """Makes the events of one sender, and messages of them."""

    def __init__(self, app: Any, hostname: str) -> None:
        self.app = app
        self.hostname = hostname
        self._pid = 0
        self._until_mono = 0.0
        self._head: Dict[str, Any] = {}

    def make(self, type: str, fields: Mapping[str, Any], blind: bool = False) -> Dict[str, Any]:  # noqa: A002
        """Return an event; a `blind` one does not count in the logical clock.

        Fields may stand for the common ones, as `timestamp`.
        """
        mono = time.monotonic()
        if mono >= self._until_mono or self._pid != os.getpid():
            self._begin(mono)
        clock = {} if blind else {"clock": self.app.clock.forward()}
        event = {**self._head, **clock, **fields}
        if "timestamp" not in fields:
            event["timestamp"] = self.app.wall()
        event["type"] = type
        return event

    def _begin(self, mono: float) -> None:
        self._pid, self._until_mono = os.getpid(), mono + 60.0  # until summer time may have begun
        self._head = {"hostname": self.hostname, "utcoffset": utcoffset(), "pid": self._pid}

    def publication(self, key: str, what: Any) -> Publication:
        """Return the message of an event, or of an array of them."""
        headers, properties = {"hostname": self.hostname}, {"delivery_mode": 1, "priority": 0}
        try:
            body = _encode(what)
        except (TypeError, ValueError, RecursionError):  # keys that are no text, circles
            body = _encode([_shown(one) for one in what] if isinstance(what, list) else _shown(what))
        message = Message(body.encode(), "application/json", "utf-8", headers, properties)
        return Publication(message, EXCHANGE, key)


def _shown(event: Mapping[str, Any]) -> Dict[str, Any]:
    """Return an event with text in place of whatever has parts of its own."""
    plain = (str, int, float, type(None))
    return {name: value if isinstance(value, plain) else safe_repr(value) for name, value in event.items()}


def key_of(type: str) -> str:  # noqa: A002 - Celery's name for it
    """Return the routing key of a type of event."""
    return type.replace("-", ".")


def sent_event(app: Any, publication: Publication, queue: Optional[str] = None) -> Publication:
    """Return the event ``task-sent`` of a task, to be published with it."""
    message, exchange, routing_key = publication
    headers = message.headers
    fields = {
        "uuid": headers["id"],
        "root_id": headers["root_id"],
        "parent_id": headers["parent_id"],
        "name": headers["task"],
        "args": headers["argsrepr"],
        "kwargs": headers["kwargsrepr"],
        "retries": headers["retries"],
        "eta": headers["eta"],
        "expires": headers["expires"],
        "queue": queue or (routing_key if not exchange else None),
        "exchange": exchange,
        "routing_key": routing_key,
    }
    writer = EventWriter(app, app.identity[0])
    return writer.publication("task.sent", writer.make("task-sent", fields))


def event_exchange(app: Any) -> Exchange:
    """Return the exchange of events: fanout on Redis, where Celery's is, else topic."""
    scheme = app.broker_url().partition("://")[0].lower()
    return Exchange(EXCHANGE, "fanout" if TRANSPORTS.get(scheme) == TRANSPORTS["redis"] else "topic")


def event_queue(
    app: Any,
    routing_key: str = "#",
    node_id: Optional[str] = None,
    prefix: Optional[str] = None,
    ttl_s: Optional[float] = None,
    expires_s: Optional[float] = None,
) -> Queue:
    """Return the queue of somebody who hears events; None = as the settings say.

    It goes with its reader; where that could not say good-bye, `expires_s` later.
    """
    conf = app.conf
    return Queue(
        f"{conf.event_queue_prefix if prefix is None else prefix}.{node_id or new_task_id()}",
        event_exchange(app),
        routing_key=routing_key,
        durable=conf.event_queue_durable,
        exclusive=conf.event_queue_exclusive,
        auto_delete=True,
        expires=conf.event_queue_expires if expires_s is None else expires_s,
        message_ttl=conf.event_queue_ttl if ttl_s is None else ttl_s,
        no_ack=True,
    )

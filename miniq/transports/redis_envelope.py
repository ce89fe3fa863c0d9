# SPDX-License-Identifier: MIT
"""A message as an item of a Redis list: one JSON object, as Celery's transport writes it.

    {"body": base64, "content-encoding": ..., "content-type": ..., "headers": {...},
     "properties": {..., "delivery_info": {"exchange", "routing_key"}, "priority", "body_encoding",
                    "delivery_tag"}}

A message that was started and came back says so in ``properties["x-miniq"]``, which Celery hands on
as it is.
"""

from __future__ import annotations

import json
import os
import re
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from typing import Any, Dict, NamedTuple, Optional, Tuple

from ..message import Message

_encode = json.JSONEncoder().encode
_decode = json.JSONDecoder().decode

#: A time that a delivery tag of ours may tell, in epoch ms: what is later is no time (year 3084).
_LAST_MS = 1 << 45


class Envelope(NamedTuple):
    """A list item, taken apart.

    `starts` counts how often it was started before, `lost_by` names the worker that died with it.
    """

    message: Message
    exchange: str
    routing_key: str
    tag: str
    starts: int
    lost_by: str
    queue: str
    redelivered: bool

    @property
    def published(self) -> Optional[float]:
        """When it was sent (epoch seconds), where its tag tells that."""
        return published_at(self.tag)


def encode_envelope(
    message: Message,
    exchange: str,
    routing_key: str,
    tag: str,
    starts: int = 0,
    lost_by: str = "",
    queue: str = "",
) -> bytes:
    """Return the list item for a message; the last three are only written where there is something."""
    properties = message.properties
    headers = message.headers
    info: Dict[str, Any] = {"exchange": exchange, "routing_key": routing_key}
    if starts or lost_by:
        info["redelivered"] = True
        headers = {**headers, "redelivered": True}
    wire = {
        **properties,
        "delivery_info": info,
        "priority": properties.get("priority") or 0,
        "body_encoding": "base64",
        "delivery_tag": tag,
    }
    if starts or lost_by:
        wire["x-miniq"] = {"starts": starts, "lost_by": lost_by, "queue": queue}
    envelope = {
        "body": b64encode(message.body).decode("ascii"),
        "content-encoding": message.content_encoding,
        "content-type": message.content_type,
        "headers": headers,
        "properties": wire,
    }
    return _encode(envelope).encode()


def decode_envelope(data: bytes) -> Envelope:
    """Take a list item apart; `ValueError` says what is wrong with it."""
    try:
        found = _decode(data.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if type(found) is not dict:
        raise ValueError("it is no JSON object")
    headers, wire, body = found.get("headers"), found.get("properties"), found.get("body")
    if headers is None:
        headers = {}
    if type(headers) is not dict or type(wire) is not dict or type(body) is not str:
        raise ValueError("it lacks headers, properties or body")
    tag = wire.pop("delivery_tag", None)
    if wire.pop("body_encoding", None) == "base64":
        try:
            raw = b64decode(body)
        except Base64Error as error:
            raise ValueError(f"its body is not base64: {error}") from None
    else:
        raw = body.encode("utf-8", "surrogatepass")
    info = wire.pop("delivery_info", None)
    if type(info) is not dict:
        info = {}
    own = wire.pop("x-miniq", None)
    if type(own) is not dict:
        own = {}
    starts = own.get("starts")
    priority = wire.get("priority", 0)
    if type(priority) is not int:
        wire["priority"] = 0
    return Envelope(
        Message(raw, _text(found.get("content-type")), _text(found.get("content-encoding")), headers, wire),
        _text(info.get("exchange")),
        _text(info.get("routing_key")),
        _text(tag),
        starts if type(starts) is int and starts > 0 else 0,
        _text(own.get("lost_by")),
        _text(own.get("queue")),
        info.get("redelivered") is True,
    )


def _text(value: Any) -> str:
    return value if type(value) is str else ""


class DeliveryTags:
    """Makes delivery tags: a UUID of version 7, so that a message tells when it was sent."""

    __slots__ = ("pid", "tail", "number")

    def __init__(self) -> None:
        self.pid = -1
        self.tail = ""
        self.number = 0

    def new(self, now: float) -> str:
        """Return a new tag that tells `now` (epoch seconds)."""
        if self.pid != os.getpid() or self.number >= 0xFFFFFF:
            self.pid, self.number = os.getpid(), 0
            text = os.urandom(10).hex()
            self.tail = f"-7{text[:3]}-{'89ab'[int(text[3], 16) & 3]}{text[4:7]}-{text[7:13]}"
        self.number += 1
        text = format(max(0, int(now * 1000)), "012x")
        return f"{text[:8]}-{text[8:]}{self.tail}{self.number:06x}"


_TAG = re.compile(r"([0-9a-f]{8})-([0-9a-f]{4})-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}\Z")


def published_at(tag: str) -> Optional[float]:
    """Return the epoch seconds that a delivery tag tells; None for a tag of Celery's."""
    found = _TAG.match(tag)
    milliseconds = int(found[1] + found[2], 16) if found else _LAST_MS
    return milliseconds / 1000 if milliseconds < _LAST_MS else None


def counted(
    found: Envelope, starts: int, lost_by: str = "", queue: str = "", item: Optional[bytes] = None
) -> bytes:
    """Return the list item with another count; `item` itself where it says so already."""
    if item is not None and starts == found.starts and lost_by == found.lost_by:
        return item
    return encode_envelope(
        found.message, found.exchange, found.routing_key, found.tag, starts, lost_by, queue
    )


def published_in(item: Optional[bytes]) -> Optional[float]:
    """Return when an item was sent, where it tells."""
    try:
        return decode_envelope(item).published if item is not None else None
    except ValueError:
        return None


# -- dead letters --------------------------------------------------------------------------------


def dead_record(queue: str, reason: str, at: float, item: bytes) -> bytes:
    """Return the record of a dead letter: a line of JSON, then the item as it is."""
    return _encode({"queue": queue, "reason": reason, "at": at}).encode() + b"\n" + item


def split_dead(record: bytes) -> Tuple[Dict[str, Any], bytes]:
    """Return what `dead_record` was made from: (queue, reason, at), item."""
    head, _, item = record.partition(b"\n")
    return _decode(head.decode()), item


def shown(item: bytes) -> Message:
    """Return the message of a dead letter; of one that is none, the bytes."""
    try:
        return decode_envelope(item).message
    except ValueError:
        return Message(item, "", "", {}, {})

# SPDX-License-Identifier: MIT
"""A message as AMQP content: the parts of protocol 2 are the protocol's own, nothing is wrapped.

    properties  content_type, content_encoding, and those of the message
    headers     the headers of the message; ``x-miniq-starts`` where it was started before
    body        its bytes

Other clients put into headers what a `Message` cannot hold, since that promises JSON values:
moments, decimals and bytes become text.  And the broker writes its own notes between the headers
of a message that it hands out; they have to go before the message is published again.

Source: AMQP 0-9-1 4.2.6; RabbitMQ's guides to dead-lettering, quorum queues and sender-selected
distribution.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Dict, NamedTuple, Tuple

from ..codecs.amqp import Content
from ..codecs.amqp_wire import PROPERTY_NAMES
from ..message import Message

#: Header of a message that was started before: how often.
STARTS = "x-miniq-starts"
#: The header by which a message that was published again is told from the one whose place it takes.
COPY = "x-miniq-copy"
#: The header that says when a copy is due (epoch seconds), where its eta does not.
UNTIL = "x-miniq-until"

#: Headers that are the broker's, or meant for it.  Published again they do harm: it drops what died in
#: the same queue before (x-death), goes on counting (x-delivery-count), sends copies (CC, BCC).
ADDED = frozenset({
    "x-death", "x-first-death-exchange", "x-first-death-queue", "x-first-death-reason",
    "x-last-death-exchange", "x-last-death-queue", "x-last-death-reason",
    "x-delivery-count", "x-acquired-count", "x-stream-offset", "CC", "BCC",
})  # fmt: skip

_OWN_PROPERTIES = frozenset(PROPERTY_NAMES) - {"content_type", "content_encoding"}
_PLAIN = frozenset({str, int, float, bool, type(None)})


# -- between the two -----------------------------------------------------------------------------


def to_content(message: Message, starts: int = 0) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Return (properties, headers) of a message as the codec takes them, for its body.

    Properties that AMQP does not have, left there by another transport, stay behind.  Values are
    not looked at: the codec names the one that does not fit.
    """
    properties: Dict[str, Any] = {
        "content_type": message.content_type or None,
        "content_encoding": message.content_encoding or None,
    }
    for name, value in message.properties.items():
        if value is not None and name in _OWN_PROPERTIES:
            properties[name] = value
    headers = message.headers
    return properties, {**headers, STARTS: starts} if starts else headers


def from_content(content: Content) -> Message:
    """Return the message in a content, whose dicts it takes over.

    The headers are complete: take off what is not the sender's with `take_marks`.
    """
    properties, headers, body = content
    for name, value in headers.items():
        if type(value) not in _PLAIN:
            headers[name] = as_plain(value)
    pop = properties.pop
    return Message(body, pop("content_type", ""), pop("content_encoding", ""), headers, properties)


def as_plain(value: Any) -> Any:
    """Return a value of a field table as a JSON value; what JSON has no form for becomes text."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return [as_plain(item) for item in value]
    if kind is dict:
        return {name: as_plain(item) for name, item in value.items()}
    if kind is bytes:
        return value.decode("utf-8", "backslashreplace")
    return value.isoformat() if isinstance(value, datetime) else str(value)


# -- headers that are not the sender's -----------------------------------------------------------


class Marks(NamedTuple):
    """What the headers of a message say that is not its sender's."""

    #: How often it was started before.
    starts: int
    #: Names the copy that was published in the place of a message; "" is the message itself.
    copy: str
    #: Epoch seconds before which a copy is not due.
    until: float
    #: Headers that are the broker's, or meant for it.
    added: Dict[str, Any]


def take_marks(headers: Dict[str, Any]) -> Marks:
    """Take off the headers that are not the sender's, and return what they say."""
    starts, until = headers.pop(STARTS, 0), headers.pop(UNTIL, 0.0)
    return Marks(
        starts if type(starts) is int and starts > 0 else 0,
        str(headers.pop(COPY, "")),
        until if isinstance(until, (int, float)) else 0.0,
        take_added(headers),
    )


def take_added(headers: Dict[str, Any]) -> Dict[str, Any]:
    """Take off the headers that are the broker's or meant for it, and return them."""
    if ADDED.isdisjoint(headers):
        return {}
    return {name: headers.pop(name) for name in ADDED.intersection(headers)}

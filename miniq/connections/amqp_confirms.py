# SPDX-License-Identifier: MIT
"""Messages that were published, and what the server says of them: confirms counted, returns recognised.

Confirms name a message by its number on the channel, one at a time in any order or all up to one.  A
mandatory message that no queue takes comes back without its number, in the order of publishing, and
is confirmed afterwards like the others.

Source: RabbitMQ's page on publisher confirms.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..codecs.amqp import Acked, Event, Nacked, Returned

#: Bytes that are published in one write.  Twice as many at most are under way unconfirmed: a server whose
#: returned messages nobody reads would stop to read too.
PUBLISH_BYTES = 256 * 1024
#: What makes a message that comes back known again, beside its route and body.
_IDS = ("correlation_id", "message_id")

#: One message to publish: exchange, routing key, properties, headers, body, mandatory.
Item = Tuple[str, str, Dict[str, Any], Optional[Dict[str, Any]], bytes, bool]


class Refusal(NamedTuple):
    """Why the server does not take a message: `kind` is "nack" or "returned"."""

    kind: str
    code: int
    text: str


class Batch:
    """Messages whose confirms are awaited: the first has the number `first`."""

    __slots__ = ("first", "items", "sent", "wanted", "settled", "refusals", "_open", "_low", "_returned")

    def __init__(self, first: int, items: Sequence[Item]) -> None:
        count = len(items)
        self.first = first
        self.items = items
        self.sent = 0
        self.wanted = count  # how many must be settled to go on
        self.settled = 0
        self.refusals: List[Optional[Refusal]] = [None] * count
        self._open = bytearray(b"\x01") * count
        self._low = 0  # all before it are settled
        self._returned = 0  # where to look for the next one that is returned

    def take(self, event: Event) -> bool:
        """Note what the server says of a message; False where it is none of these."""
        if isinstance(event, (Acked, Nacked)):
            refusal = Refusal("nack", 0, "the server refused the message") if type(event) is Nacked else None
            index = event.delivery_tag - self.first
            if event.multiple:
                for one in range(self._low, min(index + 1, self.sent)):
                    self._settle(one, refusal)
                self._low = max(self._low, min(index + 1, self.sent))
            elif 0 <= index < self.sent:
                self._settle(index, refusal)
            return True  # one that is none of these is of a publish that was given up
        return isinstance(event, Returned) and self._take_back(event)

    def _settle(self, index: int, refusal: Optional[Refusal]) -> None:
        if self._open[index]:
            self._open[index] = 0
            self.settled += 1
            if refusal is not None:
                self.refusals[index] = refusal

    def _take_back(self, event: Returned) -> bool:
        """Find the message that came back: they do in the order in which they were sent."""
        route, content = (event.exchange, event.routing_key), event.content
        ids = [content.properties.get(name) for name in _IDS]
        for index in range(self._returned, self.sent):
            exchange, routing_key, properties, _, body, _ = self.items[index]
            if (
                (exchange, routing_key) == route
                and [properties.get(name) for name in _IDS] == ids
                and body == content.body
            ):
                self.refusals[index] = Refusal("returned", event.code, event.text)
                self._returned = index + 1
                return True
        return False


def pieces(frames: Sequence[bytes]) -> List[Tuple[int, int]]:
    """Return from where to where to send at once."""
    found: List[Tuple[int, int]] = []
    start = size = 0
    for index, frame in enumerate(frames):
        if size and size + len(frame) > PUBLISH_BYTES:
            found.append((start, index))
            start, size = index, 0
        size += len(frame)
    if size:
        found.append((start, len(frames)))
    return found

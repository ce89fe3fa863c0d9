# SPDX-License-Identifier: MIT
"""What the workers of a RabbitMQ server tell each other and their successors: a log in a stream queue.

RabbitMQ keeps messages in queues, and has no place for a value under a name.  A stream keeps what is
written, for a day or so, and every reader may begin at its first entry.  Two things are noted:

    {"revoked": [task id, ...], "until": epoch seconds}      these tasks are not to start
    {"started": [[queue, task id, retries, n, copy], ...]}   messages that had come back were started
    {"released": [...]}                                      and were given back before they had ended

The second is the count of starts that a classic queue does not keep: it says only that a message was
handed out before.  So a message that kills its worker again and again is found, and one that was only
waiting in a worker that was stopped is not taken for it.

Where streams are not to be had (before RabbitMQ 3.9, or by permissions), there are no notes: a
revocation reaches the workers that run, and nothing counts what whole workers died of.
"""

from __future__ import annotations

import json
import logging
import os
from time import monotonic
from typing import Any, Callable, Dict, List, Optional, Tuple

from ..codecs.amqp import Cancelled, ChannelClosed, Deliver
from ..connections.amqp import Channel, ChannelError, Connection
from ..exceptions import OperationalError

logger = logging.getLogger(__name__)

STREAM = "_miniq.notes"
ARGUMENTS = {
    "x-queue-type": "stream",
    "x-max-age": "1D",
    "x-max-length-bytes": 20_000_000,
    "x-stream-max-segment-size-bytes": 1_000_000,
}
#: Entries read ahead of their acknowledgement.
WINDOW = 200
#: How much of each kind is remembered; the oldest go first.
MOST_REMEMBERED = 50_000
#: Seconds to read what was noted before.
READ_TIMEOUT_S = 10.0

#: What a start is counted by: queue, task id, retries, how often it was started before it was put into the
#: queue, and which copy it is.
Start = Tuple[str, str, int, int, str]


def declare_stream(channel: Channel, timeout_s: Optional[float] = None) -> None:
    """Create the stream, or find it; `ChannelError` where the server has no such thing."""
    channel.call("queue.declare", timeout_s=timeout_s, queue=STREAM, durable=True, arguments=ARGUMENTS)


def revocation(task_ids: List[str], until: float) -> bytes:
    """Return the note that revokes tasks."""
    return json.dumps({"revoked": task_ids, "until": until}).encode()


def started(starts: List[Start]) -> bytes:
    """Return the note of starts."""
    return json.dumps({"started": starts}).encode()


def released(starts: List[Start]) -> bytes:
    """Return the note that takes starts back."""
    return json.dumps({"released": starts}).encode()


class Notes:
    """The reader of one consumer."""

    def __init__(self, wall: Callable[[], float]) -> None:
        #: Task id -> until when it is revoked (epoch seconds).
        self.revoked: Dict[str, float] = {}
        #: How often a message was started after it had come back.
        self.starts: Dict[Start, int] = {}
        self.enabled = True
        self._wall = wall
        #: It was deleted, and is to be attached again.
        self.is_lost = False
        self._channel: Optional[Channel] = None
        self._next_offset = 0
        self._mark = ""
        self._marked = False

    def attach(self, connection: Connection, write: Callable[[bytes], None]) -> None:
        """Begin to read on a new connection, from where the last one ended; the first time, read all.

        `write` writes a note, over another connection.
        """
        if self._channel is not None and self._channel.connection is connection:
            self._channel.close()
        self._channel = None
        self.is_lost = False
        if not self.enabled:
            return
        try:
            channel = connection.open_channel()
            declare_stream(channel)
            channel.call("basic.qos", prefetch_count=WINDOW)
            channel.on_event = self._on_event
            channel.call(
                "basic.consume",
                queue=STREAM,
                consumer_tag="notes",
                arguments={"x-stream-offset": self._next_offset or "first"},
            )
        except ChannelError as error:
            self.enabled = False
            logger.info(
                "%s: no stream queue %r (%s): revocations are kept by running workers only, and deliveries"
                " to workers that died are not counted", connection.url, STREAM, error.text,
            )  # fmt: skip
            return
        self._channel = channel
        if not self._marked:
            self._read_all(connection, write)

    def _read_all(self, connection: Connection, write: Callable[[bytes], None]) -> None:
        """Wait until all is read that was there before: a note of our own ends it."""
        self._mark = os.urandom(8).hex()
        try:
            write(json.dumps({"mark": self._mark}).encode())
        except OperationalError as error:
            # A server that is short of memory takes nothing, and yet hands out what it has.
            logger.warning("notes of other workers may come late: %s", error)
            self._marked = True
            return
        connection.wait(
            lambda: self._marked or self._channel is None, monotonic() + READ_TIMEOUT_S, "reading the notes"
        )

    def _on_event(self, event: Any) -> None:
        if isinstance(event, Deliver):
            channel = self._channel
            self._next_offset = event.content.headers.get("x-stream-offset", self._next_offset) + 1
            self._take(event.content.body)
            if channel is not None:
                channel.ack(event.delivery_tag, True)
        elif isinstance(event, ChannelClosed):
            logger.warning("the notes of other workers cannot be read any more: %s", event.text)
            self._channel = None
        elif isinstance(event, Cancelled):
            logger.warning("the notes of workers (queue %s) were deleted; they begin anew", STREAM)
            self.starts.clear()
            self._next_offset = 0
            self.is_lost = True

    def _take(self, body: bytes) -> None:
        try:
            note = json.loads(body)
            if "mark" in note:
                self._marked = self._marked or note["mark"] == self._mark
            elif "revoked" in note:
                self.revoke(note["revoked"], float(note["until"]))
            else:
                by = 1 if "started" in note else -1
                for queue, task_id, retries, counted, copy in note["started" if by > 0 else "released"]:
                    self.count((queue, task_id, retries, counted, copy), by)
        except (ValueError, TypeError, KeyError) as error:
            logger.debug("a note that cannot be read is skipped: %s", error)

    def revoke(self, task_ids: List[str], until: float) -> None:
        """Remember a revocation; a longer one stays."""
        if until <= self._wall():
            return
        for task_id in task_ids:
            self.revoked[task_id] = max(until, self.revoked.get(task_id, until))
        _forget_oldest(self.revoked)

    def count(self, start: Start, by: int) -> None:
        """Count a start, or that it was none."""
        self.starts[start] = self.starts.pop(start, 0) + by
        _forget_oldest(self.starts)

    def is_revoked(self, task_id: Any) -> bool:
        """Say whether a task is not to start."""
        until = self.revoked.get(task_id)
        if until is None:
            return False
        if until <= self._wall():
            del self.revoked[task_id]
            return False
        return True


def _forget_oldest(found: Dict[Any, Any]) -> None:
    while len(found) > MOST_REMEMBERED:
        del found[next(iter(found))]

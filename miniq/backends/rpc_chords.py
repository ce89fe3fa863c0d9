# SPDX-License-Identifier: MIT
"""How chords are counted where results are messages: a queue for each, which holds what its members came to.

A queue is no set and has no transactions, but it has three things that are enough: messages in it are
counted, a message for a queue that is gone comes back, and a consumer can be the only one.  What a chord
is, stands in its queue, one record a message; none is taken out before the chord has ended::

    queue      celery.chord.<group id>    durable, x-expires = how long an unfinished chord is kept
    type       start               part                 more            over                     look
    headers    size, again         index, id            count, token
    body       the chord's body    entry of a member                    entry that ends the chord

A look is of nobody who counts: only somebody who asked whether there is such a queue.

The queue is made before the first message of the header is sent.  So who finds none is too late: the
chord has ended.  Who adds a part asks how many records there are; with enough of them he becomes the
only consumer and reads all: that is his claim.  It is the server's to give, and ends with the
connection of who has it, which is watched by heartbeats; no clock is compared.  Where members are
missing all goes back, and is counted again, as nobody else could see what came meanwhile.

Where who has the claim dies, or members never come, the task ``celery.chord_unlock`` looks again.

Source: RabbitMQ's pages on queues, publishers and consumers; decision 16.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from contextlib import contextmanager
from time import monotonic
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from ..codecs.amqp import Cancelled, Content, Deliver
from ..connections.amqp import Channel, ChannelError, Connection, Item, Options, Server
from ..connections.replies import MAX_LEASE_MS
from ..exceptions import BackendStoreError, OperationalError
from .base import CLAIM_S, DONE_S, MOST_LEFT_OVER, SENDING_S, Arrival, Backend, ChordPart
from .chords import LAST_PLACE

logger = logging.getLogger(__name__)

PREFIX = "celery.chord."
_DONE = ".done"
#: The longest name of a queue.
MAX_NAME_BYTES = 255
#: Looks at a chord in one turn; each but the first is for records that came during the one before.
MOST_LOOKS = 100
#: Seconds that a chord's queue is kept at least.  The task that looks, at intervals of a minute and less,
#: has to find it: without, nobody would end a chord whose time is over.
LEAST_KEPT_S = 180.0
#: There is no such chord, or it has ended.
_OVER = Arrival(0, None, None, True)


class Standing:
    """What the records of a chord come to."""

    __slots__ = ("size", "body", "again", "added", "parts", "over")

    def __init__(self, records: Sequence[Content]) -> None:
        self.size: Optional[int] = None
        self.body = b""
        #: The chord was begun by a worker, who may do that again.
        self.again = False
        self.added = 0
        #: (place, task id) -> entry; the first end that a member told is the one.
        self.parts: Dict[Tuple[int, str], bytes] = {}
        self.over: Optional[bytes] = None
        tokens: Set[str] = set()
        for properties, headers, body in records:
            kind = properties.get("type")
            if kind == "part":
                self.parts.setdefault((headers["index"], headers["id"]), body)
            elif kind == "start":
                self.size, self.body, self.again = headers["size"], body, self.again or headers["again"]
            elif kind == "over":
                self.over = body
            elif kind == "more" and headers["token"] not in tokens:
                self.added += headers["count"]
                tokens |= {headers["token"]} - {""}

    @property
    def is_complete(self) -> bool:
        """Say whether nobody is waited for."""
        total = self.total
        return total is not None and (len(self.parts) >= total or self.over is not None)

    @property
    def total(self) -> Optional[int]:
        """How many members there will be."""
        return None if self.size is None else self.size + self.added

    def entries(self) -> List[bytes]:
        """Return the entries in the order of the header."""
        found = [self.parts[key] for key in sorted(self.parts)]
        return found if self.over is None or len(found) >= (self.total or 0) else [*found, self.over]

    def arrival(self, claim: Optional[str]) -> Arrival:
        """Return it as it is told."""
        return Arrival(len(self.parts), self.total, claim, False)


class _Claim:
    """A claim: the channel whose consumer is the only one, and what came through it."""

    __slots__ = ("channel", "standing", "token", "until")

    def __init__(self, channel: Channel, standing: Standing, token: str, until: float) -> None:
        self.channel = channel
        self.standing = standing
        self.token = token
        #: Then it is given to the next in this process who asks; for others it lasts on.
        self.until = until

    @property
    def is_held(self) -> bool:
        """Say whether it still is one, as far as is known."""
        return self.channel.closed is None and not self.channel.connection.broken


class ChordQueues(Backend):
    """A backend that counts chords in queues; it has the methods that are not given here."""

    counts_chords = True
    watches_chords = True
    _server: Server
    _options: Options
    _wall: Callable[[], float]

    def __init__(self) -> None:
        #: The claims of this thread; all of them end with its line, which is for nothing else.
        self._claims: Dict[str, _Claim] = {}
        #: Of chords whose body is sent, and whose queue could not be deleted yet.
        self._ended: Dict[str, _Claim] = {}
        self._line: Optional[Connection] = None
        #: Chords that somebody else has, with their bodies, to be looked at again: he may die, or it may be
        #: a lost connection of our own, which the server has not noticed yet.
        self._missed: Dict[str, bytes] = {}

    # -- how chords begin and grow

    def start_chord(
        self, group_id: str, size: int, body: bytes, expires_s: Optional[float], anew: bool = True
    ) -> None:
        queue, done = _queue_of(group_id), _done_queue_of(group_id)
        start = _record(queue, "start", {"size": size, "again": not anew}, body)
        with self._asking(group_id) as connection:
            if not anew and self._send(connection, [_record(done, "over", {}, b"")])[0]:
                return  # it has ended, and that is not forgotten yet
            kept_s = None if expires_s is None else max(expires_s, LEAST_KEPT_S)
            self._declare(connection.publisher(), queue, kept_s)
            self._send(connection, [start])

    def add_to_chord(
        self, group_id: str, count: int = 1, token: str = "", expires_s: Optional[float] = None
    ) -> bool:
        more = _record(_queue_of(group_id), "more", {"count": count, "token": token}, b"")
        with self._asking(group_id) as connection:
            return self._send(connection, [more])[0]

    def has_chord(self, group_id: str) -> bool:
        """Say whether a chord has been started and has not ended."""
        # Not by asking for the queue: where there is none, that would be an error in the server's log.
        with self._asking(group_id) as connection:
            return self._send(connection, [_record(_queue_of(group_id), "look", {}, b"")])[0]

    # -- counting

    def arrive_at_chords(self, parts: Sequence[ChordPart]) -> List[Arrival]:
        """See `Backend.arrive_at_chords`; of several parts of one chord the last is told of the claim.

        A part without a task's id is none: with an entry it ends the chord as it stands, without one it
        only has somebody look whether all have arrived.
        """
        if not parts:
            return []
        now = self._wall()
        last = {part.group_id: index for index, part in enumerate(parts)}
        self._forget_lost()
        new = [part for part in parts if not self._is_mine(part.group_id, part.token, now)]
        with self._asking(parts[0].group_id) as connection:
            taken = self._send(connection, [_record_of(part) for part in new])
            gone = {part.group_id for part, there in zip(new, taken) if not there} | self._ended.keys()
            counts = {
                group_id: None if group_id in gone else self._count(connection, group_id)
                for group_id in last
                if group_id not in self._claims
            }
        stands = {
            group_id: self._stand(parts[index], counts.get(group_id), now) for group_id, index in last.items()
        }
        return [
            stands[part.group_id]
            if last[part.group_id] == index
            else stands[part.group_id]._replace(claim=None)
            for index, part in enumerate(parts)
        ]

    def claim_chord(self, group_id: str, token: str = "") -> Arrival:
        return self.arrive_at_chord(ChordPart(group_id, None, "", b"", None, b"", token))

    def _stand(self, part: ChordPart, count: Optional[int], now: float) -> Arrival:
        """Return how a chord stands of which `count` records are there, with a claim if there is one."""
        group_id, token = part.group_id, part.token
        own = self._claims.get(group_id)
        if own is not None:
            if own.token != token and own.until > now:
                return own.standing.arrival(None)
            own.token, own.until = token or uuid.uuid4().hex, now + CLAIM_S
            return own.standing.arrival(own.token)
        body = self._missed.pop(group_id, part.body)
        if count is None:
            return _OVER
        size = _size_in(part.body)
        if not count:
            # All are with somebody who has the claim, or looks.
            self._miss(group_id, body)
            return Arrival(0, size, None, False)
        if size is not None and count <= size and not (part.entry and not part.task_id):
            return Arrival(count - 1, size, None, False)
        with _translated(group_id):
            return self._read(group_id, body, count, token or uuid.uuid4().hex, now)

    def _read(self, group_id: str, body: bytes, count: int, token: str, now: float) -> Arrival:
        """Read at least `count` records; keep them if the chord is complete."""
        line = self._claiming_line()
        for _ in range(MOST_LOOKS):
            channel = line.open_channel()
            records: List[Content] = []
            try:
                if not self._consume(channel, _queue_of(group_id), records, count):
                    self._miss(group_id, body)
                    return Arrival(0, None, None, False)
                standing = Standing(records)
                if standing.is_complete:
                    channel.on_event = None
                    self._claims[group_id] = _Claim(channel, standing, token, now + CLAIM_S)
                    return standing.arrival(token)
                seen = len(records)
            finally:
                if group_id not in self._claims:
                    channel.close()
            # All of them are back.  What came after we looked was given to us: nobody else has seen it.
            with self._asking(group_id) as connection:
                ready = self._count(connection, group_id)
            if ready is None:
                return _OVER
            if ready <= seen:
                break
            count = ready
        return standing.arrival(None)

    def _consume(self, channel: Channel, queue: str, records: List[Content], count: int) -> bool:
        """Take all records of a queue; False: somebody else does, or it is gone.

        None is ever taken out of the queue: at least as many come as were counted before.
        """
        gone: List[Any] = []

        def take(event: Any) -> None:
            if type(event) is Deliver:
                records.append(event.content)
            elif type(event) is Cancelled:
                gone.append(event)

        channel.on_event = take
        try:
            channel.call("basic.consume", queue=queue, exclusive=True)
        except ChannelError as error:
            if error.code == 404 or (error.code == 403 and "exclusive" in error.text):
                return False
            raise
        connection = channel.connection
        deadline_mono = connection.deadline(None)
        connection.wait(
            lambda: len(records) >= count or bool(gone) or channel.closed is not None,
            deadline_mono,
            "the records of a chord",
        )
        channel.check()
        return not gone

    # -- claims

    def chord_entries(self, group_id: str) -> List[bytes]:
        """Return the entries, to who has the claim."""
        own = self._claims.get(group_id)
        return [] if own is None else own.standing.entries()

    def extend_chord(self, group_id: str, claim: str) -> bool:
        now = self._wall()
        if not self._is_mine(group_id, claim, now):
            return False
        self._claims[group_id].until = now + SENDING_S
        return True

    def finish_chord(self, group_id: str, claim: str) -> bool:
        """Delete the queue, later if that cannot be done now: the body is sent, so it has ended."""
        own = self._claims.get(group_id)
        if own is None or own.token != claim:
            return False
        self._ended[group_id] = self._claims.pop(group_id)
        try:
            self._delete_ended()
        except BackendStoreError as error:
            logger.warning("Chord %s has ended, its queue is deleted later: %s", group_id, error)
        return True

    def _delete_ended(self) -> None:
        """Delete the queues of chords that have ended; the claims are kept until then."""
        for group_id, own in list(self._ended.items()):
            with self._asking(group_id) as connection:
                if own.standing.again:
                    self._declare(connection.publisher(), _done_queue_of(group_id), DONE_S)
                connection.publisher().call("queue.delete", queue=_queue_of(group_id))
            own.channel.close()
            del self._ended[group_id]

    def abandon_chord(self, group_id: str) -> None:
        """See to it that the body is never sent; nothing of the chord stays."""
        own = self._claims.pop(group_id, None)
        with self._asking(group_id) as connection:
            connection.publisher().call("queue.delete", queue=_queue_of(group_id))
            if own is not None:
                own.channel.close()

    def chords_left_over(self, now: float) -> List[Tuple[str, bytes]]:
        """Return those that this thread claimed and did not finish, or would have claimed.

        Others are found by the task that looks after them.
        """
        self._stay_alive()
        self._forget_lost()
        try:
            self._delete_ended()
        except BackendStoreError as error:
            logger.debug("queues of chords are deleted later: %s", error)
        left_over = dict(self._missed)
        left_over.update((name, own.standing.body) for name, own in self._claims.items() if own.until <= now)
        return list(left_over.items())[:MOST_LEFT_OVER]

    def close(self) -> None:
        """Let go of all claims."""
        self._claims.clear()
        self._ended.clear()
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def _is_mine(self, group_id: str, token: str, now: float) -> bool:
        """Say whether the claim with this token is ours and lasts."""
        own = self._claims.get(group_id)
        return own is not None and own.is_held and own.token == token and own.until > now

    def _miss(self, group_id: str, body: bytes) -> None:
        if body:
            self._missed[group_id] = body

    def _forget_lost(self) -> None:
        for group_id in [group_id for group_id, own in self._claims.items() if not own.is_held]:
            self._missed[group_id] = self._claims.pop(group_id).standing.body

    def _claiming_line(self) -> Connection:
        """Return the connection for claims; it has heartbeats, so that the server knows who is alive."""
        self._stay_alive()
        if self._line is None:
            self._line = self._server.connect(self._options.connect_timeout, heartbeat=True)
        return self._line

    def _stay_alive(self) -> None:
        """Take and send heartbeats; drop the connection if it is lost, and its claims with it."""
        line = self._line
        if line is None:
            return
        try:
            line.read_ready()
            line.keep_alive(monotonic())
        except OperationalError as error:
            logger.debug("claims on chords are lost: %s", error)
            self._line = None
            line.close()

    # -- asking the server

    @contextmanager
    def _asking(self, group_id: str) -> Iterator[Connection]:
        with _translated(group_id), self._server.borrow(self._options.socket_timeout) as connection:
            yield connection

    def _send(self, connection: Connection, records: Sequence[Item]) -> List[bool]:
        """Add records to queues; return for each whether there is such a queue."""
        if not records:
            return []
        channel, timeout_s = connection.publisher(), self._options.socket_timeout
        own = None if channel.confirms else connection.open_channel()
        try:
            if own is not None:
                own.select_confirms()
            refusals = (own or channel).publish(records, timeout_s)
        finally:
            if own is not None:
                own.close()
        for refusal in refusals:
            if refusal is not None and refusal.kind != "returned":
                raise OperationalError(f"{connection.url}: what became of its members: {refusal.text}")
        return [refusal is None for refusal in refusals]

    def _count(self, connection: Connection, group_id: str) -> Optional[int]:
        """Return how many records nobody has taken, None where there is no queue."""
        try:
            reply = connection.publisher().call("queue.declare", queue=_queue_of(group_id), passive=True)
        except ChannelError as error:
            if error.code != 404:
                raise
            return None
        count: int = reply["message_count"]
        return count

    def _declare(self, channel: Channel, queue: str, kept_s: Optional[float]) -> None:
        # Of no other type by a default of the virtual host: a quorum queue drops what is given back often.
        arguments: Dict[str, Any] = {"x-queue-type": "classic"}
        if kept_s is not None:
            arguments["x-expires"] = min(max(1, round(kept_s * 1000)), MAX_LEASE_MS)
        channel.call("queue.declare", queue=queue, durable=True, arguments=arguments)


@contextmanager
def _translated(group_id: str) -> Iterator[None]:
    """Make what goes wrong with the server an error of the result store."""
    try:
        yield
    except ChannelError as error:
        raise BackendStoreError(f"chord {group_id!r}: {error}") from error.translated()
    except OperationalError as error:
        raise BackendStoreError(f"chord {group_id!r}: {error}") from error


def _queue_of(group_id: str) -> str:
    """Return the name of a chord's queue; an id that is too long for one is hashed."""
    name = PREFIX + group_id
    if len(name.encode("utf-8", "surrogatepass")) + len(_DONE) > MAX_NAME_BYTES:
        return PREFIX + hashlib.sha256(group_id.encode("utf-8", "surrogatepass")).hexdigest()
    return name


def _done_queue_of(group_id: str) -> str:
    """Return the name of the queue that is there, for no reader, while a chord is known to be done."""
    return _queue_of(group_id) + _DONE


def _record(queue: str, kind: str, headers: Dict[str, Any], body: bytes) -> Item:
    return ("", queue, {"type": kind, "delivery_mode": 2}, headers, body, True)


def _record_of(part: ChordPart) -> Item:
    queue = _queue_of(part.group_id)
    if not part.task_id:
        return _record(queue, "over" if part.entry else "look", {}, part.entry)
    place = LAST_PLACE if part.index is None else part.index
    return _record(queue, "part", {"index": place, "id": part.task_id}, part.entry)


def _size_in(body: bytes) -> Optional[int]:
    """Return how many members a chord's body says that it waits for, None where it does not."""
    if not body:
        return None
    found: Mapping[str, Any] = json.loads(body)
    size = found.get("chord_size")
    return size if isinstance(size, int) else None

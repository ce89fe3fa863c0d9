# SPDX-License-Identifier: MIT
"""A channel of an AMQP connection: calls, acks, publishing with and without confirms.

A channel that the server closes is an event of that channel, and a `ChannelError` for whoever uses it;
the connection goes on.
"""

from __future__ import annotations

import logging
import selectors
from time import monotonic
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from ..codecs.amqp import Acked, Cancelled, ChannelClosed, ConnectionClosed, Deliver, GetOk, Method, Returned
from ..exceptions import ImproperlyConfigured, MiniqError, OperationalError
from ..text import truncate
from .amqp_confirms import Batch, Item, Refusal, pieces
from .amqp_line import Line, hint_for, told

logger = logging.getLogger(__name__)


class ChannelError(Exception):
    """The server closed a channel; the connection goes on.  `method` is what made it do so, or ""."""

    def __init__(self, url: str, code: int, text: str, method: str) -> None:
        super().__init__(url, code, text, method)
        self.url = url
        self.code = code
        self.text = text
        self.method = method

    def __str__(self) -> str:
        return told(self.url, self.method, self.code, self.text)

    def translated(self) -> MiniqError:
        """Return miniq's error for it: `ImproperlyConfigured` where the operator must act."""
        # A connection that owns something may be dead, and the server has not noticed yet (405).
        must_act = self.code != 405 and hint_for(self.code, self.text)
        kind = ImproperlyConfigured if must_act else OperationalError
        return kind(str(self))


class Channel:
    """A channel of a connection, used by the same thread.

    `closed` tells why the server closed it; then every use raises `ChannelError`.  `on_event` is called
    for what nobody waits for: `Deliver`, `Cancelled`, `Returned`, `ChannelClosed`, and with confirms that
    nobody awaits `Acked` and `Nacked`.  It may use the connection.
    """

    __slots__ = (
        "number", "connection", "closed", "on_event", "confirms", "was_told",
        "_asked", "_answer", "_published", "_batch",
    )  # fmt: skip

    def __init__(self, connection: "Line[Channel]", number: int) -> None:
        self.number = number
        self.connection = connection
        self.closed: Optional[ChannelClosed] = None
        self.on_event: Optional[Callable[[Any], None]] = None
        self.confirms = False
        #: Somebody got an error because of `closed`.
        self.was_told = False
        self._asked = ""  # the method whose answer is awaited
        self._answer: Any = None
        self._published = 0  # the number of the last message, as confirms count them
        self._batch: Optional[Batch] = None

    # -- calls

    def call(self, name: str, timeout_s: Optional[float] = None, **args: Any) -> Dict[str, Any]:
        """Send a method and return the arguments of its answer.

        Raises `ChannelError` when the server closes the channel instead, ValueError or TypeError for
        arguments that cannot be sent.
        """
        answer: Method = self._call(name, timeout_s, args)
        return answer.args

    def get(self, queue: str, no_ack: bool = False, timeout_s: Optional[float] = None) -> Optional[GetOk]:
        """Take one message out of a queue, None where it is empty."""
        answer = self._call("basic.get", timeout_s, {"queue": queue, "no_ack": no_ack})
        return answer if isinstance(answer, GetOk) else None

    def _call(self, name: str, timeout_s: Optional[float], args: Mapping[str, Any]) -> Any:
        connection = self.connection
        self.check()
        self._check_free(name)
        deadline_mono = connection.deadline(timeout_s)
        connection.out += connection.peer.method(self.number, name, **args)
        self._asked = name
        self._answer = None
        try:
            connection.wait(self._is_answered, deadline_mono, name)
        except BaseException as error:
            # The answer may still come: nobody must take it for another's.
            connection.break_off(truncate(str(error) or repr(error), 300))
            raise
        finally:
            self._asked = ""
        if self._answer is None:
            self.check()
        return self._answer

    def _is_answered(self) -> bool:
        return self._answer is not None or (self.closed is not None and self._asked != "channel.close")

    @property
    def is_busy(self) -> bool:
        """Say whether an answer or confirms are awaited."""
        return bool(self._asked) or self._batch is not None

    def check(self) -> None:
        """Raise if it cannot be used any more."""
        self.connection.check()
        if self.closed is not None:
            self.was_told = True
            raise ChannelError(self.connection.url, self.closed.code, self.closed.text, self.closed.method)

    def _check_free(self, name: str) -> None:
        if self.is_busy:
            raise RuntimeError(f"{name} on channel {self.number}, which is in the middle of something else")

    def send(self, name: str, **args: Any) -> None:
        """Send a method that has no answer (nowait) with the next flush."""
        self.check()
        self.connection.write(self.connection.peer.method(self.number, name, **args))

    def ack(self, delivery_tag: int, multiple: bool = False) -> None:
        """Acknowledge a delivery, or all up to it, with the next flush."""
        self._settle(self.connection.peer.ack, delivery_tag, multiple)

    def nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = True) -> None:
        """Refuse a delivery, or all up to it, with the next flush."""
        self._settle(self.connection.peer.nack, delivery_tag, multiple, requeue)

    def reject(self, delivery_tag: int, requeue: bool = True) -> None:
        """Refuse one delivery with the next flush."""
        self._settle(self.connection.peer.reject, delivery_tag, requeue)

    def _settle(self, frame: Callable[..., bytes], *args: Any) -> None:
        if self.closed is not None:
            self.check()
        try:
            data = frame(self.number, *args)
        except ValueError:
            told = [one for one in self.connection.events if one.channel in (0, self.number)]
            if any(isinstance(one, (ChannelClosed, ConnectionClosed)) for one in told):
                return  # the server has closed it, which we are about to take: it wants no ack any more
            raise
        self.connection.write(data)

    def close(self, timeout_s: Optional[float] = None) -> None:
        """Close it and free its number; does nothing where server or line were first."""
        connection = self.connection
        if self.closed is not None or connection.broken:
            return
        self.on_event = None
        try:
            self._call("channel.close", timeout_s, {"reply_code": 200})
        except (OperationalError, ChannelError) as error:
            logger.debug("%s: a channel is closed without a goodbye: %s", connection.url, error)
        self.closed = ChannelClosed(self.number, 200, "it was closed here", "")
        self.was_told = True
        connection.channels.pop(self.number, None)
        # Not for the next channel of this number.
        left = [event for event in connection.events if event.channel != self.number]
        connection.events.clear()
        connection.events.extend(left)

    # -- publishing

    def select_confirms(self, timeout_s: Optional[float] = None) -> None:
        """Have the server confirm every message from now on."""
        if not self.confirms:
            self.call("confirm.select", timeout_s)
            self.confirms = True

    def publish(self, items: Sequence[Item], timeout_s: float) -> List[Optional[Refusal]]:
        """Publish messages; return for each None or why the server refused it, once all are confirmed.

        Without `select_confirms` it returns when the system has the bytes: what was wrong with them raises
        `ChannelError` at the next use, and messages that are returned go to `on_event`.

        Raises `ChannelError` when the server closes the channel, `OperationalError` when the line is
        lost or the deadline over (what has arrived then is not known, but nothing is sent to a server
        that is known to block us), ValueError or TypeError for what cannot be sent, before anything is.
        """
        connection = self.connection
        deadline_mono = connection.deadline(timeout_s)
        if not self.confirms:
            self._publish_unconfirmed(items, deadline_mono)
            return [None] * len(items)
        if connection.broken or self.closed is not None:
            self.check()
        if len(items) != 1 or connection.blocked is not None or connection.out or self.is_busy:
            return self._publish_confirmed(items, deadline_mono)
        # One message, the usual case: one write, one read.
        peer = connection.peer
        data = peer.publish(self.number, *items[0])
        connection.broken = True
        try:
            connection.stream.send(data, deadline_mono)
            self._published = tag = self._published + 1
            peer.feed(connection.stream.recv(deadline_mono))
            event = peer.next_event()
            if type(event) is Acked and event.delivery_tag == tag and event.channel == self.number:
                event = peer.next_event()
                done = True
            else:
                done = False
            if event is not None:
                connection.events.append(event)
                connection.collect()
        except BaseException as error:
            connection.fail(error, "basic.publish")
        connection.broken = False
        connection.heard_mono = monotonic()
        if not done:
            batch = Batch(tag, items)
            batch.sent = 1
            return self._await(batch, deadline_mono)
        if event is not None:
            connection.dispatch()
        return [None]

    def _publish_confirmed(self, items: Sequence[Item], deadline_mono: float) -> List[Optional[Refusal]]:
        """Publish in pieces, the next one when all but the last are confirmed."""
        connection = self.connection
        self._check_free("basic.publish")
        if connection.blocked is not None:
            self._await_unblocked(deadline_mono)
        number, publish = self.number, connection.peer.publish
        frames = [publish(number, *item) for item in items]
        batch = Batch(self._published + 1, items)
        before = 0
        for start, stop in pieces(frames):
            if connection.out:
                connection.flush(deadline_mono)
            connection.send(b"".join(frames[start:stop]), deadline_mono, "basic.publish")
            batch.sent = stop
            self._published += stop - start
            if stop < len(frames):
                batch.wanted = before
                self._await(batch, deadline_mono)
            before = stop
        batch.wanted = len(items)
        return self._await(batch, deadline_mono)

    def _await(self, batch: Batch, deadline_mono: float) -> List[Optional[Refusal]]:
        """Read until as many messages as wanted are confirmed."""
        connection = self.connection
        self._batch = batch
        try:
            connection.dispatch()
            while batch.settled < batch.wanted and self.closed is None:
                if connection.out:
                    connection.flush(deadline_mono)
                if connection.blocked is not None and not self._is_readable(deadline_mono):
                    # The connection is kept: late confirms do no harm, and it is known to be blocked.
                    raise connection.blocked_error()
                connection.receive(deadline_mono, "basic.publish")
                connection.dispatch()
        finally:
            self._batch = None
        if batch.settled < batch.wanted:
            self.check()
        return batch.refusals

    def _await_unblocked(self, deadline_mono: float) -> None:
        """Wait until the server takes messages; nothing was sent before."""
        connection = self.connection
        connection.read_ready()
        while connection.blocked is not None:
            if not self._is_readable(deadline_mono):
                raise connection.blocked_error()
            connection.read_ready()
        self.check()

    def _is_readable(self, deadline_mono: float) -> bool:
        """Wait for something to read, at most until the deadline."""
        stream = self.connection.stream
        if stream.has_input():
            return True
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            return bool(selector.select(max(deadline_mono - monotonic(), 0)))

    def _publish_unconfirmed(self, items: Sequence[Item], deadline_mono: float) -> None:
        connection = self.connection
        if connection.stream.has_input() or connection.events:
            connection.read_ready()
        self.check()
        if connection.blocked is not None:
            self._await_unblocked(deadline_mono)
        number, publish = self.number, connection.peer.publish
        frames = [publish(number, *item) for item in items]
        for start, stop in pieces(frames):
            if start and connection.has_input():
                connection.read_ready()
                self.check()
            if connection.out:
                connection.flush(deadline_mono)
            connection.send(b"".join(frames[start:stop]), deadline_mono, "basic.publish")

    # -- events

    def take(self, event: Any) -> None:
        """Act on an event of this channel; the connection calls this."""
        kind = type(event)
        if kind is not Deliver:
            if self.take_awaited(event):
                return
            if kind is ChannelClosed:
                self._end(event)
        if self.on_event is not None:
            self.on_event(event)
        elif kind is Returned:
            logger.warning(
                "%s: a message is lost, no queue takes it: exchange %r, routing key %r: %d %s",
                self.connection.url, event.exchange, event.routing_key, event.code, event.text,
            )  # fmt: skip
        elif kind is Deliver or kind is Cancelled:
            logger.debug("%s: nobody takes a %s", self.connection.url, kind.__name__)

    def take_awaited(self, event: Any) -> bool:
        """Act on an event if somebody waits for it; say whether it was so."""
        kind = type(event)
        if kind is Method or kind is GetOk:
            if kind is GetOk or event.name != "channel.flow":
                self._answer = event
            return True
        if kind is ChannelClosed and self.is_busy:
            self._end(event)
            return True
        return self._batch is not None and self._batch.take(event)

    def _end(self, event: ChannelClosed) -> None:
        self.closed = event
        if self._asked != "channel.close":  # then both sides close at once: it is free when ours is answered
            self.connection.channels.pop(self.number, None)

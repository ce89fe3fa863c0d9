# SPDX-License-Identifier: MIT
"""The socket of an AMQP conversation: bytes in both directions, events handed to their channels, the end.

What arrives is turned into events at once, and these are handed to their channels; an event that
somebody waits for ends his waiting, the others go to the channel's `on_event`.  What is only to be
sent (acks, nowait methods) is kept until `flush`, so that many travel in one write.

What leaves the conversation unfinished (an error of the line, garbage, a deadline, an exception from a
signal) breaks it for good, so that an answer is never taken for another's.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from time import monotonic
from typing import Any, Callable, Deque, Dict, Generic, NoReturn, Optional, Protocol, TypeVar

from ..codecs.amqp import Blocked, ConnectionClosed, Event, Heartbeat, Method, Peer, Unblocked
from ..codecs.amqp_wire import ProtocolError
from ..exceptions import ImproperlyConfigured, OperationalError
from ..text import truncate
from .stream import Stream

logger = logging.getLogger(__name__)

#: Buffered bytes that are sent without a `flush`.
MAX_BUFFERED_BYTES = 64 * 1024
#: Reads of one turn of `read_ready`: a server that never stops must not keep us there.
MAX_READS = 16
CLOSE_TIMEOUT_S = 1.0

#: The operator must act: code -> what to say.
_FOR_THE_OPERATOR = {
    403: "the server does not allow this to the user of the URL; see rabbitmqctl list_permissions",
    404: "declare it, or check the name",
    405: "another connection owns it alone; do two workers have the same node name?",
    406: "it is there with other arguments: use those or another name, or delete it",
    530: "check the virtual host, the path of the URL, and who may use it",
    540: "the server does not know this; is it too old, or no RabbitMQ?",
}


def hint_for(code: int, text: str) -> str:
    """Return what the operator can do about an error of the server, "" where it may pass by itself."""
    if (code == 406 and "inequivalent arg" not in text) or (code == 530 and "limit" in text):
        return ""
    return _FOR_THE_OPERATOR.get(code, "")


def told(url: str, doing: str, code: int, text: str) -> str:
    """Return the text of an error of the server; `doing` is what made it say so, or ""."""
    hint = hint_for(code, text)
    return f"{url}: {doing}{': ' if doing else ''}{code} {truncate(text, 300)}{f' ({hint})' if hint else ''}"


class Receiver(Protocol):
    """A channel, as far as the line knows it."""

    def take(self, event: Any) -> None:
        """Act on an event of this channel."""

    def take_awaited(self, event: Any) -> bool:
        """Act on an event if somebody waits for it; say whether it was so."""


R = TypeVar("R", bound=Receiver)


class Line(Generic[R]):
    """One socket with channels in it, used by one thread at a time.

    `peer`, `out` (bytes for the next `flush`), `events` (read, and not yet handed on) and `stream` are
    for channels: these know best how to be quick.
    """

    __slots__ = (
        "url", "broken", "blocked", "pid", "stream", "peer", "out", "events", "channels", "heard_mono",
        "said_mono", "_reason", "_timeout_s", "_answer", "_blocked_mono", "_handing",
        "__weakref__",
    )  # fmt: skip

    def __init__(self, stream: Stream, url: str, timeout_s: float) -> None:
        self.url = url
        self.broken = False
        self.blocked: Optional[str] = None
        self.pid = os.getpid()
        self.stream = stream
        self.peer = Peer()
        self.out = bytearray()
        self.events: Deque[Event] = deque()
        self.channels: Dict[int, R] = {}
        self.heard_mono = self.said_mono = monotonic()
        self._reason = ""
        self._timeout_s = timeout_s
        self._answer: Optional[Method] = None  # of the connection itself
        self._blocked_mono = 0.0
        self._handing = False  # somebody is called with an event

    # -- reading and writing

    def read_ready(self) -> None:
        """Take what has arrived, without waiting, and hand the events to their channels.

        Raises `OperationalError` when the server has closed the connection.
        """
        self.check()
        self.dispatch()
        for _ in range(MAX_READS):
            self.broken = True
            try:
                data = self.stream.recv_ready()
                if data:
                    self.peer.feed(data)
                    self.collect()
            except BaseException as error:
                self.fail(error, "reading")
            self.broken = False
            if not data:
                break
            self.heard_mono = monotonic()
            # At once, so that the server's reason for closing is told, and not only that it closed.
            self.dispatch()
            if self.broken:
                return  # somebody who got an event has closed it
        if self.out:
            self.flush()

    def wait(self, until: Callable[[], bool], deadline_mono: float, doing: str) -> None:
        """Send what is buffered; read, and hand out events, until ``until()`` holds.

        `doing` is for errors.  When the deadline is over the connection is broken.
        """
        self.check()
        if self.out:
            self.flush(deadline_mono)
        self.dispatch()
        while not until():
            self.receive(deadline_mono, doing)
            self.dispatch()
            if self.out:
                self.flush(deadline_mono)

    def write(self, data: bytes) -> None:
        """Send `data` with the next `flush`."""
        self.out += data
        if len(self.out) > MAX_BUFFERED_BYTES:
            self.flush()

    def flush(self, deadline_mono: Optional[float] = None) -> None:
        """Send what is buffered, in one write."""
        self.check()
        if self.out:
            data = bytes(self.out)
            self.out.clear()
            self.send(data, self.deadline(None) if deadline_mono is None else deadline_mono)

    def send(self, data: bytes, deadline_mono: float, doing: str = "sending") -> None:
        """Send `data` now; what is buffered comes later."""
        self.broken = True
        try:
            self.stream.send(data, deadline_mono)
        except BaseException as error:
            self.fail(error, doing)
        self.broken = False
        self.said_mono = monotonic()

    def receive(self, deadline_mono: float, doing: str) -> None:
        """Wait for bytes; what they say is then among the events."""
        self.broken = True
        try:
            self.peer.feed(self.stream.recv(deadline_mono))
            self.collect()
        except BaseException as error:
            self.fail(error, doing)
        self.broken = False
        self.heard_mono = monotonic()

    def collect(self) -> None:
        """Put what was fed onto the list of events, and what it makes us answer to what is sent next."""
        next_event, events = self.peer.next_event, self.events
        event = next_event()
        while event is not None:
            events.append(event)
            event = next_event()
        self.out += self.peer.take_replies()

    def dispatch(self) -> None:
        """Hand the events to those they are for.

        Not while reading, so that whoever gets one may use the connection.  What he waits for then, he
        gets; the other events stay for later, in their order, so that nobody is called while he is busy.
        """
        events, channels = self.events, self.channels
        if self._handing:
            for _ in range(len(events)):
                event = events.popleft()
                if not event.channel:
                    self._take(event)
                elif event.channel not in channels or not channels[event.channel].take_awaited(event):
                    events.append(event)
            return
        self._handing = True
        try:
            while events:
                event = events.popleft()
                number = event.channel
                if number:
                    channel = channels.get(number)
                    if channel is not None:  # else it was closed here meanwhile
                        channel.take(event)
                else:
                    self._take(event)
        finally:
            self._handing = False

    def _take(self, event: Event) -> None:
        """Act on an event of the connection itself."""
        if isinstance(event, Method):
            self._answer = event
        elif isinstance(event, Blocked):
            self.blocked = event.reason or "no reason given"
            self._blocked_mono = monotonic()
            logger.warning("%s: the server takes no messages for now: %s", self.url, self.blocked)
        elif isinstance(event, Unblocked):
            blocked_s = monotonic() - self._blocked_mono
            self.blocked = None
            logger.info("%s: the server takes messages again, after %.1f s", self.url, blocked_s)
        elif isinstance(event, ConnectionClosed):
            error = OperationalError(told(self.url, event.method, event.code, event.text))
            try:
                self.stream.send(bytes(self.out), monotonic() + CLOSE_TIMEOUT_S)
            except OperationalError:
                pass  # it does not wait for our answer
            self.break_off(f"{event.code} {truncate(event.text, 300)}")
            raise error
        else:
            assert isinstance(event, Heartbeat)  # any byte is as good, and was noted

    # -- state

    @property
    def pending(self) -> int:
        """How much is there to take of which no selector tells: bytes inside of TLS, events."""
        return self.stream.pending + len(self.events)

    def fileno(self) -> int:
        """Return the descriptor, for an event loop; it is valid until `close`, broken or not."""
        return self.stream.fileno()

    def has_input(self) -> bool:
        """Say whether something came, or the server closed: `read_ready` then tells."""
        return self.broken or bool(self.events) or self.stream.has_input()

    def break_off(self, reason: str) -> None:
        """Never use it again; the descriptor stays valid until `close`."""
        self.broken = True
        if not self._reason:
            self._reason = reason
            if self.pid == os.getpid():  # in a forked child the conversation is still the parent's
                self.stream.shut_down()

    def deadline(self, timeout_s: Optional[float]) -> float:
        """Return the deadline; raises where it is over already, which need not break the connection."""
        if timeout_s is None:
            timeout_s = self._timeout_s
        elif timeout_s <= 0:
            raise OperationalError(f"{self.url}: no time was left to ask the server")
        return monotonic() + timeout_s

    def check(self) -> None:
        """Raise if it cannot be used any more."""
        if self.broken:
            raise self.broken_error()

    def broken_error(self) -> OperationalError:
        """Return the error of one that is used although it is broken."""
        reason = self._reason or "it was left, or is used, in the middle of something"
        return OperationalError(f"{self.url}: this connection is of no more use: {reason}")

    def blocked_error(self) -> OperationalError:
        """Return the error of one who wants to publish and may not."""
        return OperationalError(
            f"{self.url}: basic.publish: blocked by the server, the time for it was over: {self.blocked}"
        )

    def fail(self, error: BaseException, doing: str) -> NoReturn:
        """Break the connection off because of `error` and raise it, with what was done."""
        inherited = self.pid != os.getpid()
        reason = "it was inherited through a fork" if inherited else str(error) or repr(error)
        self.break_off(truncate(reason, 300))
        if inherited:
            raise self.broken_error() from error
        if isinstance(error, ProtocolError):
            raise OperationalError(f"{self.url}: {doing}: the answer is not AMQP 0-9-1: {error}") from error
        if isinstance(error, (OperationalError, ImproperlyConfigured)):
            blocked = f"; blocked by the server: {self.blocked}" if self.blocked is not None else ""
            raise type(error)(f"{error} ({doing}{blocked})") from error
        raise error

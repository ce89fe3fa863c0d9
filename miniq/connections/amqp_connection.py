# SPDX-License-Identifier: MIT
"""A conversation with one RabbitMQ server: handshake, channels, publishing with confirms, heartbeats.

A `Connection` is one socket with channels in it, used by one thread at a time.  What arrives is
turned into events at once, and these are handed to their channels; an event that somebody waits for
ends his waiting, the others go to the channel's `on_event`.  What is only to be sent (acks, nowait
methods) is kept until `flush`, so that many travel in one write.

A channel that the server closes is an event of that channel and a `ChannelError` for whoever uses it.
What leaves the conversation itself unfinished (an error of the line, garbage, a deadline, an exception
from a signal) breaks the connection for good, so that an answer is never taken for another's.

Source: AMQP 0-9-1, and RabbitMQ's pages on confirms, blocked connections and heartbeats.
"""

from __future__ import annotations

import logging
import os
import re
from time import monotonic
from typing import Any, Dict, Optional, Tuple

from ..codecs.amqp import ConnectionClosed
from ..codecs.amqp_wire import encode_table
from ..exceptions import ImproperlyConfigured, MiniqError, OperationalError
from ..text import truncate
from .amqp_channel import Channel, ChannelError
from .amqp_line import CLOSE_TIMEOUT_S, Line, hint_for, told
from .amqp_options import Endpoint, Options
from .stream import Stream

logger = logging.getLogger(__name__)

#: Most channels that we ask for, RabbitMQ's own default.
MAX_CHANNELS = 2047
#: Heartbeat intervals without a byte from the server after which it is taken for dead.
MISSED_HEARTBEATS = 2

#: What a server is told that we understand; the authentication failure makes it say why it closes.
CAPABILITIES = {
    "authentication_failure_close": True,
    "basic.nack": True,
    "connection.blocked": True,
    "consumer_cancel_notify": True,
    "exchange_exchange_bindings": True,
    "publisher_confirms": True,
}


class Connection(Line[Channel]):
    """A conversation with one server, in one virtual host.  `Server` makes them.

    `OperationalError` is raised where trying again may help, `ChannelError` where the server closed the
    channel that was used.  `timeout_s` is for all of a call, None = the option ``socket_timeout``.  Once
    `broken`, it stays so: `close` it.  (It also is while bytes are on their way: wherever a signal's
    exception strikes, what it leaves unfinished cannot be used.)

    `blocked` is the server's reason while it takes no messages (memory, disk), else None.  `heartbeat_s`
    is 0 where there are no heartbeats; otherwise somebody must call `keep_alive` and `read_ready`.
    """

    __slots__ = (
        "name", "server_properties", "server_version", "heartbeat_s", "idle_since_mono", "_confirms",
        "_channel_max", "_publisher",
    )  # fmt: skip

    def __init__(self, stream: Stream, url: str, options: Options) -> None:
        super().__init__(stream, url, options.socket_timeout)
        self.name = ""
        self.server_properties: Dict[str, Any] = {}
        self.server_version: Tuple[int, ...] = ()
        self.heartbeat_s = 0
        self.idle_since_mono = 0.0
        self._confirms = options.confirm_publish
        self._channel_max = MAX_CHANNELS
        self._publisher: Optional[Channel] = None

    # -- channels

    def open_channel(self, timeout_s: Optional[float] = None) -> Channel:
        """Open a channel; numbers of closed ones are used again."""
        self.check()
        for number in range(1, self._channel_max + 1):
            if number not in self.channels:
                break
        else:
            raise OperationalError(f"{self.url}: all {self._channel_max} channels of a connection are open")
        channel = self.channels[number] = Channel(self, number)
        try:
            channel.call("channel.open", timeout_s)
        except BaseException:
            self.channels.pop(number, None)
            raise
        return channel

    def publisher(self, timeout_s: Optional[float] = None) -> Channel:
        """Return this connection's channel for publishing, with confirms unless the options say otherwise.

        One that the server closed is replaced.  Where there are no confirms, that raises `ChannelError`
        once, if nobody was told yet: something that was published before is lost.
        """
        channel = self._publisher
        if channel is not None:
            closed = channel.closed
            if closed is None:
                return channel
            self._publisher = None
            if not channel.was_told:
                if not channel.confirms:
                    channel.check()
                logger.warning("%s: a channel is replaced, the server closed it: %s", self.url, closed.text)
        deadline_mono = self.deadline(timeout_s)
        channel = self.open_channel(deadline_mono - monotonic())
        if self._confirms:
            channel.select_confirms(deadline_mono - monotonic())
        self._publisher = channel
        return channel

    # -- staying alive

    def keep_alive(self, mono: float) -> None:
        """Send a heartbeat if one is due; raise `OperationalError` when the server is silent for too long."""
        interval_s = self.heartbeat_s
        if not interval_s:
            return
        self.check()
        if mono - self.heard_mono > MISSED_HEARTBEATS * interval_s:
            self.read_ready()  # perhaps it was we who did not listen
            silent_s = mono - self.heard_mono
            if silent_s > MISSED_HEARTBEATS * interval_s:
                reason = f"no heartbeat for {silent_s:.0f} s, the server or the line is dead"
                self.break_off(reason)
                raise OperationalError(f"{self.url}: {reason}")
        if mono - self.said_mono >= interval_s / 2:
            self.out += self.peer.heartbeat()
            self.flush()

    def probe(self, timeout_s: float) -> None:
        """Make sure that the server answers; it need not change anything for that.

        One that blocks us reads nothing, and cannot be asked: whoever publishes then learns more.
        """
        self.check()
        if self.blocked is not None:
            return
        for channel in self.channels.values():
            if not channel.is_busy:
                try:
                    channel.call("channel.flow", timeout_s, active=True)  # as it is anyway
                except ChannelError:
                    channel.was_told = False  # an answer too, and for whoever uses that channel
                return
        self.open_channel(timeout_s).close()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Say goodbye, if there is somebody to listen, and close it; may be called again."""
        if not self.broken and self.pid == os.getpid() and self.blocked is None:
            deadline_mono = monotonic() + timeout_s
            self._answer = None
            for channel in self.channels.values():
                channel.on_event = None
            try:
                self.out += self.peer.method(0, "connection.close", reply_code=200, reply_text="")
                self.wait(lambda: self._answer is not None, deadline_mono, "connection.close")
            except (MiniqError, ValueError) as error:
                logger.debug("%s: closed without a goodbye: %s", self.url, error)
        self.broken = True
        self._reason = self._reason or "it was closed"
        self.stream.close()
        self.channels.clear()
        self._publisher = None

    # -- the beginning

    @classmethod
    def open(
        cls,
        stream: Stream,
        endpoint: Endpoint,
        options: Options,
        name: str,
        deadline_mono: float,
        heartbeat_s: Optional[int] = 0,
    ) -> "Connection":
        """Shake hands over `stream`; it is closed if that fails.

        `heartbeat_s` is what we want: 0 no heartbeats, None the server's interval.
        """
        self = cls(stream, endpoint.url, options)
        self.name = name or options.client_name
        try:
            self._shake_hands(endpoint, options, deadline_mono, heartbeat_s)
        except BaseException:
            self.break_off("the handshake failed")
            self.close()
            raise
        return self

    def _shake_hands(
        self, endpoint: Endpoint, options: Options, deadline_mono: float, heartbeat_s: Optional[int]
    ) -> None:
        peer = self.peer
        self.write(peer.header())
        start = self._ask("connection.start", deadline_mono, "handshake")
        self.server_properties = start["server_properties"]
        self.server_version = tuple(
            int(number) for number in re.findall(r"\d+", str(self.server_properties.get("version", "")))[:3]
        )
        method = options.login_method or "PLAIN"
        offered = str(start["mechanisms"]).split()
        if method not in offered:
            raise ImproperlyConfigured(
                f"{self.url}: the server does not know the login_method {method}, it offers:"
                f" {', '.join(offered)}"
            )
        properties: Dict[str, Any] = {"product": "miniq", "platform": "Python"}
        if self.name:
            properties["connection_name"] = self.name
        properties.update(options.client_properties)
        properties["capabilities"] = CAPABILITIES
        self.out += peer.method(
            0,
            "connection.start-ok",
            client_properties=properties,
            mechanism=method,
            response=_login(method, endpoint),
            locale="en_US",
        )
        tune = self._ask("connection.tune", deadline_mono, "login")
        self._channel_max = min(tune["channel_max"] or MAX_CHANNELS, MAX_CHANNELS)
        offer_s = tune["heartbeat"]
        if heartbeat_s is None:
            self.heartbeat_s = offer_s
        elif heartbeat_s:
            self.heartbeat_s = min(heartbeat_s, offer_s or heartbeat_s)
        self.out += peer.method(
            0,
            "connection.tune-ok",
            channel_max=self._channel_max,
            frame_max=tune["frame_max"],
            heartbeat=self.heartbeat_s,
        )
        peer.tune(self._channel_max, tune["frame_max"])
        self.out += peer.method(0, "connection.open", vhost=endpoint.virtual_host)
        self._ask("connection.open-ok", deadline_mono, f"virtual host {endpoint.virtual_host!r}")

    def _ask(self, answer: str, deadline_mono: float, doing: str) -> Dict[str, Any]:
        """Send what is buffered and return the arguments of the answer, a method of the connection."""
        self._answer = None
        self.flush(deadline_mono)
        while self._answer is None:
            self.receive(deadline_mono, doing)
            for event in self.events:
                if isinstance(event, ConnectionClosed):
                    if event.code == 403:
                        text = truncate(event.text, 300)
                        raise ImproperlyConfigured(
                            f"{self.url}: {doing}: 403 {text} (check user and password in the URL)"
                        )
                    kind = ImproperlyConfigured if hint_for(event.code, event.text) else OperationalError
                    raise kind(told(self.url, doing, event.code, event.text))
            self.dispatch()
        name, args = self._answer.name, self._answer.args
        if name != answer:
            raise OperationalError(f"{self.url}: {doing}: {name} came where {answer} was expected")
        return args


def _login(method: str, endpoint: Endpoint) -> bytes:
    """Return the response of SASL."""
    if method == "EXTERNAL":
        return b""
    if method == "AMQPLAIN":
        return encode_table({"LOGIN": endpoint.username, "PASSWORD": endpoint.password})[4:]
    return f"\0{endpoint.username}\0{endpoint.password}".encode()

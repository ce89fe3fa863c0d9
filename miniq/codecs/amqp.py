# SPDX-License-Identifier: MIT
"""The client's side of an AMQP 0-9-1 connection, without input or output.

A `Peer` is fed whatever the socket gave and hands out one event at a time; its other methods
return the bytes to be sent.  What the protocol makes a client answer by itself (channel.close-ok
and the like) waits in `take_replies`.

::

    connection   start > auth > tuned > open > closing > closed        (the server closes: > closed)
    channel      opening > open > closing > (gone)                     (the server closes: > gone)
    content      method, then its header, then as many bodies as make up the size the header tells

Strategy: frames are cut out of the bytes as they were fed; those that came too early wait until
there are enough of them, so that no byte is copied for each piece that comes.  Every channel has
its own state, since the contents of several may come in turns.  Whatever a server may not send at
this point ends in `ProtocolError`, and nothing that it says is believed before it was checked.

Source: the AMQP 0-9-1 specification (2.2.4, 2.3.7, 4.2) and RabbitMQ's additions to it.
"""

from __future__ import annotations

from struct import Struct
from struct import error as StructError
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple, Union

from .amqp_wire import (
    FRAME_BODY,
    FRAME_END,
    FRAME_HEADER,
    FRAME_HEARTBEAT,
    FRAME_METHOD,
    FRAME_MIN_BYTES,
    FRAME_OVERHEAD_BYTES,
    METHODS,
    OVERRUN,
    PROTOCOL_HEADER,
    ProtocolError,
    decode_header,
    decode_method,
    encode_frame,
    encode_header,
    encode_method,
    method_name,
    method_spec,
    pack_frame,
    text_of,
    unpack_frame,
)

#: Frames may be as big until a size was agreed on: RabbitMQ's own default.
_FRAME_BYTES = 131072
_MAX_CHANNELS = 65535
#: As many beginnings of basic.publish are remembered.
_MAX_ROUTES = 256
_END = FRAME_END[0]
_FRAME_TYPES = {
    FRAME_METHOD: "method", FRAME_HEADER: "header", FRAME_BODY: "body", FRAME_HEARTBEAT: "heartbeat",
}  # fmt: skip

_HEARTBEAT = encode_frame(FRAME_HEARTBEAT, 0, b"")
_DELIVER, _ACK = METHODS["basic.deliver"].begin, METHODS["basic.ack"].begin
_OPEN_OK = METHODS["channel.open-ok"].begin
_tag_at = Struct(">QB").unpack_from
#: A whole frame of basic.ack, basic.reject or basic.nack: they differ in their ids only.
_settle = Struct(">BHIHHQBB").pack


# -- events --------------------------------------------------------------------------------------


class Content(NamedTuple):
    """A message as it travels: properties without the headers, headers, body."""

    properties: Dict[str, Any]
    headers: Dict[str, Any]
    body: bytes


class Method(NamedTuple):
    """Any method that has no event of its own, such as ``queue.declare-ok``."""

    channel: int
    name: str
    args: Dict[str, Any]


class Deliver(NamedTuple):
    """A message for a consumer."""

    channel: int
    consumer_tag: str
    delivery_tag: int
    redelivered: bool
    exchange: str
    routing_key: str
    content: Content


class GetOk(NamedTuple):
    """The message that was asked for with basic.get."""

    channel: int
    delivery_tag: int
    redelivered: bool
    exchange: str
    routing_key: str
    message_count: int
    content: Content


class Returned(NamedTuple):
    """A mandatory message that no queue takes."""

    channel: int
    code: int
    text: str
    exchange: str
    routing_key: str
    content: Content


class Acked(NamedTuple):
    """The server has a published message, or all up to it."""

    channel: int
    delivery_tag: int
    multiple: bool


class Nacked(NamedTuple):
    """The server refuses a published message, or all up to it."""

    channel: int
    delivery_tag: int
    multiple: bool


class Cancelled(NamedTuple):
    """The server ended a consumer, for instance because its queue was deleted."""

    channel: int
    consumer_tag: str


class ChannelClosed(NamedTuple):
    """The server closed a channel; `method` is the name of the method that made it do so, or ""."""

    channel: int
    code: int
    text: str
    method: str


class ConnectionClosed(NamedTuple):
    """The server closed the connection; `method` as in `ChannelClosed`."""

    channel: int
    code: int
    text: str
    method: str


class Blocked(NamedTuple):
    """The server reads nothing more that is published, for this reason."""

    channel: int
    reason: str


class Unblocked(NamedTuple):
    """The server reads again."""

    channel: int


class Heartbeat(NamedTuple):
    """The server is there."""

    channel: int


Event = Union[
    Method, Deliver, GetOk, Returned, Acked, Nacked, Cancelled, ChannelClosed, ConnectionClosed,
    Blocked, Unblocked, Heartbeat,
]  # fmt: skip


# -- the machine ---------------------------------------------------------------------------------

_START, _AUTH, _TUNED, _OPEN, _CLOSING, _CLOSED = "start", "auth", "tuned", "open", "closing", "closed"
_OPENING = "opening"

#: Which methods of the connection the server may send in which state, and to which state they lead.
_FROM_SERVER: Dict[str, Dict[str, str]] = {
    _START: {"connection.start": _AUTH},
    _AUTH: {"connection.secure": _AUTH, "connection.tune": _TUNED},
    _TUNED: {"connection.open-ok": _OPEN},
    _OPEN: {
        "connection.blocked": _OPEN, "connection.unblocked": _OPEN, "connection.update-secret-ok": _OPEN,
    },
}  # fmt: skip
#: In which state the client may send a method of the connection.
_FROM_CLIENT = {
    "connection.start-ok": _AUTH, "connection.secure-ok": _AUTH, "connection.tune-ok": _TUNED,
    "connection.open": _TUNED, "connection.update-secret": _OPEN,
}  # fmt: skip
#: What the machine sends itself, and what has a method of its own because a message belongs to it.
_NOT_CALLED = (
    "basic.publish", "basic.cancel-ok", "channel.flow-ok", "channel.close-ok", "connection.close-ok",
)  # fmt: skip


class _Channel:
    """What is known of one channel: its state, what was asked on it, the message that is coming."""

    __slots__ = ("state", "awaited", "made", "known", "properties", "headers", "missing", "pieces")

    def __init__(self) -> None:
        self.state = _OPENING
        #: Replies that are still to come.  RabbitMQ may overtake itself, so their order tells nothing.
        self.awaited: List[str] = []
        #: The event to be made of the message that is coming, and what its method told.
        self.made: Optional[Callable[..., Event]] = None
        self.known: Tuple[Any, ...] = ()
        #: What its header told, None before that, and the bytes of the body that are still to come.
        self.properties: Optional[Dict[str, Any]] = None
        self.headers: Dict[str, Any] = {}
        self.missing = 0
        self.pieces: List[bytes] = []


class Peer:
    """The client's end of one connection.  Used by one thread at a time.

    Reading raises `ProtocolError`, then and ever after.  Writing raises ValueError or TypeError for
    what cannot be sent, with nothing changed.
    """

    __slots__ = (
        "_data", "_at", "_held", "_failure", "_state", "_channels", "_closed_there", "_replies", "_routes",
        "_max_body_bytes", "_max_payload_bytes", "_channel_max",
    )  # fmt: skip

    def __init__(self, max_body_bytes: int = 512 * 1024 * 1024) -> None:
        self._max_body_bytes = max_body_bytes
        self._max_payload_bytes = _FRAME_BYTES - FRAME_OVERHEAD_BYTES
        self._channel_max = _MAX_CHANNELS
        #: Unread from `_at` on.
        self._data = b""
        self._at = 0
        #: What was fed while `_data` was not empty, and comes after it.
        self._held = bytearray()
        self._failure: Optional[str] = None
        self._state = _START
        self._channels: Dict[int, _Channel] = {}
        #: Channels that the server closed, until they are open again: messages may still be on their way.
        self._closed_there: Set[int] = set()
        self._replies: List[bytes] = []
        #: (channel, exchange, routing key, mandatory) -> frame of basic.publish.
        self._routes: Dict[Tuple[int, str, str, bool], bytes] = {}

    # -- reading

    def feed(self, data: bytes) -> None:
        """Take bytes from the server.  Raises ProtocolError after an earlier one."""
        if self._failure is not None:
            raise ProtocolError(self._failure)
        if self._data or self._held:
            self._held += data
        else:
            self._data = data

    def next_event(self) -> Optional[Event]:
        """Return the next event, None while there is none.  Raises ProtocolError, then and ever after."""
        if self._failure is not None:
            raise ProtocolError(self._failure)
        try:
            while True:
                data, at = self._data, self._at
                there = len(data)
                if there > at and data[at] not in _FRAME_TYPES:
                    raise ProtocolError(_no_frame(data[at : at + 40]))
                stop = at + 7
                if stop < there:
                    kind, number, size = unpack_frame(data, at)
                    stop += size
                    if size > self._max_payload_bytes:
                        what = f"a frame of {size} bytes on channel {number}"
                        raise ProtocolError(f"{what}, the limit is {self._max_payload_bytes}")
                if stop >= there:
                    if self._refill(stop + 1 - there):
                        continue
                    return None
                if data[stop] != _END:
                    what = f"a frame of {size} bytes on channel {number} without its end"
                    raise ProtocolError(f"{what}: {data[stop : stop + 40]!r}")
                payload = data[at + 7 : stop]
                if stop + 1 < there:
                    self._at = stop + 1
                else:
                    self._data, self._at = b"", 0
                event = self._frame_came(kind, number, payload)
                if event is not None:
                    return event
        except ProtocolError as error:
            self._failure = str(error)
            self._data, self._held = b"", bytearray()
            self._channels = {}
            raise

    def _refill(self, missing: int) -> bool:
        """Put the bytes held behind those unread, if they are at least as many as missing."""
        if missing > len(self._held):
            return False
        self._data = self._data[self._at :] + self._held
        self._at = 0
        self._held = bytearray()
        return True

    def _frame_came(self, kind: int, number: int, payload: bytes) -> Optional[Event]:
        if kind == FRAME_HEARTBEAT:
            if number or payload:
                raise ProtocolError(f"a heartbeat on channel {number} with {len(payload)} bytes")
            return Heartbeat(0)
        if not number:
            if kind != FRAME_METHOD:
                raise ProtocolError(f"a {_FRAME_TYPES[kind]} on channel 0, which carries no messages")
            return self._connection_method(payload)
        if self._state is _CLOSING or self._state is _CLOSED:
            return None
        channel = self._channels.get(number)
        if number in self._closed_there and (kind != FRAME_METHOD or payload[:4] != _OPEN_OK):
            return None
        if channel is None:
            raise ProtocolError(f"a {_FRAME_TYPES[kind]} on channel {number}, which is not open")
        if channel.state is _CLOSING:
            return self._method_while_closing(number, payload) if kind == FRAME_METHOD else None
        if kind == FRAME_METHOD:
            return self._method_came(number, channel, payload)
        return self._content_came(number, channel, kind, payload)

    def _content_came(self, number: int, channel: _Channel, kind: int, payload: bytes) -> Optional[Event]:
        """Take the header or a part of the body of a message; return its event when it is complete."""
        made, properties = channel.made, channel.properties
        if made is None or (kind == FRAME_HEADER) == (properties is not None):
            raise ProtocolError(f"a {_FRAME_TYPES[kind]} on channel {number} where none belongs")
        if properties is None:
            missing, properties, channel.headers = decode_header(payload)
            if missing > self._max_body_bytes:
                raise ProtocolError(f"a message of {missing} bytes, at most {self._max_body_bytes} are taken")
            payload = b""
        else:
            missing = channel.missing - len(payload)
            if missing < 0 or not payload:
                raise ProtocolError(
                    f"a body of {len(payload)} bytes on channel {number}, {channel.missing} were missing"
                )
        if missing:
            if payload:
                channel.pieces.append(payload)
            channel.properties, channel.missing = properties, missing
            return None
        if channel.pieces:
            channel.pieces.append(payload)
            payload = b"".join(channel.pieces)
            channel.pieces = []
        channel.made = channel.properties = None
        return made(*channel.known, Content(properties, channel.headers, payload))

    def _method_came(self, number: int, channel: _Channel, payload: bytes) -> Optional[Event]:
        if channel.made is not None:
            raise ProtocolError(
                f"{decode_method(payload)[0]} on channel {number} where the rest of a message should come"
            )
        begin = payload[:4]
        if begin == _DELIVER:
            channel.made, channel.known = Deliver, _deliver(number, payload)
            return None
        if begin == _ACK and len(payload) == 13:
            tag, bits = _tag_at(payload, 4)
            return Acked(number, tag, bits & 1 == 1)
        name, args = decode_method(payload)
        spec = METHODS[name]
        if not spec.by_server or name.startswith("connection."):
            raise ProtocolError(f"{name} on channel {number}, which a server may not send there")
        if name == "channel.close":
            return self._channel_closed(number, args, False)
        if name == "basic.return":
            channel.made, channel.known = Returned, (number, *args.values())
            return None
        if name == "basic.nack":
            return Nacked(number, args["delivery_tag"], args["multiple"])
        if name == "basic.cancel":
            if not args["nowait"]:
                self._reply(number, "basic.cancel-ok", {"consumer_tag": args["consumer_tag"]})
            return Cancelled(number, args["consumer_tag"])
        if name == "channel.flow":
            self._reply(number, "channel.flow-ok", args)
            return Method(number, name, args)
        try:
            channel.awaited.remove("basic.get-ok" if name == "basic.get-empty" else name)
        except ValueError:
            raise ProtocolError(f"{name} on channel {number}, which nothing asked for") from None
        if name == "basic.get-ok":
            channel.made, channel.known = GetOk, (number, *args.values())
            return None
        if name == "channel.open-ok":
            channel.state = _OPEN
            self._closed_there.discard(number)
        return Method(number, name, args)

    def _method_while_closing(self, number: int, payload: bytes) -> Optional[Event]:
        """Take what counts after our channel.close: its answer, and a close of the server that met it."""
        name, args = decode_method(payload)
        if name == "channel.close-ok":
            del self._channels[number]
            return Method(number, name, args)
        if name == "channel.close":
            return self._channel_closed(number, args, True)
        return None

    def _channel_closed(self, number: int, args: Dict[str, Any], closing: bool) -> Event:
        """Answer the server's channel.close; if ours is under way, the number is free when it is answered.

        RabbitMQ goes on sending messages until it has our answer.
        """
        self._reply(number, "channel.close-ok", {})
        if not closing:
            del self._channels[number]
            self._closed_there.add(number)
        cause = method_name(args["class_id"], args["method_id"])
        return ChannelClosed(number, args["reply_code"], args["reply_text"], cause)

    def _connection_method(self, payload: bytes) -> Optional[Event]:
        name, args = decode_method(payload)
        state = self._state
        if state is _CLOSED:
            return None
        if name == "connection.close":
            self._reply(0, "connection.close-ok", {})
            self._state = _CLOSED
            cause = method_name(args["class_id"], args["method_id"])
            return ConnectionClosed(0, args["reply_code"], args["reply_text"], cause)
        if state is _CLOSING:
            if name != "connection.close-ok":
                return None
            self._state = _CLOSED
            return Method(0, name, args)
        following = _FROM_SERVER[state].get(name)
        if following is None:
            raise ProtocolError(f"{name} on channel 0 in the state {state!r} of the connection")
        self._state = following
        if name == "connection.blocked":
            return Blocked(0, args["reason"])
        if name == "connection.unblocked":
            return Unblocked(0)
        return Method(0, name, args)

    def _reply(self, number: int, name: str, args: Mapping[str, Any]) -> None:
        self._replies.append(encode_frame(FRAME_METHOD, number, encode_method(name, args)))

    # -- writing

    def header(self) -> bytes:
        """Return what a client says first."""
        return PROTOCOL_HEADER

    def tune(self, channel_max: int, frame_max: int) -> None:
        """Keep to what was agreed on: highest channel number, bytes of a frame; 0 is no limit.

        Raises ProtocolError for frames smaller than AMQP allows.
        """
        if frame_max and frame_max < FRAME_MIN_BYTES:
            raise ProtocolError(f"frame_max={frame_max}: less than the {FRAME_MIN_BYTES} bytes of AMQP")
        most = self._max_body_bytes + FRAME_OVERHEAD_BYTES
        self._max_payload_bytes = min(frame_max or most, most) - FRAME_OVERHEAD_BYTES
        self._channel_max = channel_max or _MAX_CHANNELS

    def take_replies(self) -> bytes:
        """Return what the protocol makes us answer, to be sent before what is made after this call."""
        replies = b"".join(self._replies)
        self._replies.clear()
        return replies

    def heartbeat(self) -> bytes:
        """Return a heartbeat."""
        return _HEARTBEAT

    def method(self, channel: int, name: str, /, **args: Any) -> bytes:
        """Return a method as bytes, after the replies that wait; arguments not given are 0, "", False, {}.

        Raises ValueError or TypeError that name an unknown method or argument, a value that does not
        fit, or what is not possible in the state of the channel.
        """
        spec = method_spec(name)
        if not spec.by_client or name in _NOT_CALLED:
            raise ValueError(f"{name} is not for a client to send like this")
        if not 0 <= channel <= self._channel_max:
            raise ValueError(f"channel {channel}: numbers are 1 to {self._channel_max} here")
        frame = self._method_frame(channel, name, args)
        if channel:
            self._sent_on_channel(channel, name, spec.reply, args)
        else:
            self._sent_on_connection(name)
        if self._replies:
            return self.take_replies() + frame
        return frame

    def _method_frame(self, channel: int, name: str, args: Mapping[str, Any]) -> bytes:
        payload = encode_method(name, args)
        if len(payload) > self._max_payload_bytes:
            raise ValueError(
                f"{name} of {len(payload)} bytes does not fit into a frame of {self._max_payload_bytes}"
            )
        return encode_frame(FRAME_METHOD, channel, payload)

    def _sent_on_connection(self, name: str) -> None:
        if not name.startswith("connection."):
            raise ValueError(f"{name} is sent on a channel above 0")
        if name == "connection.close":
            if self._state is not _CLOSED:
                self._state = _CLOSING
                return
        elif self._state is _FROM_CLIENT[name]:
            return
        raise ValueError(f"{name} cannot be sent in the state {self._state!r} of the connection")

    def _sent_on_channel(self, number: int, name: str, reply: str, args: Mapping[str, Any]) -> None:
        if name.startswith("connection."):
            raise ValueError(f"{name} is sent on channel 0, not on {number}")
        if name == "channel.open":
            if self._state is not _OPEN:
                raise ValueError(f"channel {number}: the connection is in the state {self._state!r}")
            if number in self._channels:
                raise ValueError(f"channel {number}: it is {self._channels[number].state} already")
            self._channels[number] = _Channel()
        channel = self._open_channel(number)
        if name == "channel.close":
            channel.state = _CLOSING
        elif reply and not args.get("nowait"):
            channel.awaited.append(reply)

    def _open_channel(self, number: int) -> _Channel:
        channel = self._channels.get(number)
        if channel is None or channel.state is _CLOSING or self._state is not _OPEN:
            raise ValueError(f"channel {number} is not open")
        return channel

    def publish(
        self,
        channel: int,
        exchange: str,
        routing_key: str,
        properties: Dict[str, Any],
        headers: Optional[Dict[str, Any]],
        body: bytes,
        mandatory: bool = False,
    ) -> bytes:
        """Return a message as bytes: basic.publish, its header, as many bodies as it takes.

        Raises ValueError or TypeError that name what cannot be sent.
        """
        self._open_channel(channel)
        route = channel, exchange, routing_key, mandatory
        first = self._routes.get(route) or self._route(*route)
        size = len(body)
        header = encode_header(size, properties, headers)
        limit = self._max_payload_bytes
        if len(header) > limit:
            raise ValueError(
                f"properties and headers of {len(header)} bytes do not fit into a frame of {limit}"
            )
        parts: List[Union[bytes, memoryview]] = [first]
        parts += pack_frame(FRAME_HEADER, channel, len(header)), header
        if size <= limit:
            if size:
                parts += FRAME_END, pack_frame(FRAME_BODY, channel, size), body
        else:
            view = memoryview(body)
            for at in range(0, size, limit):
                piece = view[at : at + limit]
                parts += FRAME_END, pack_frame(FRAME_BODY, channel, len(piece)), piece
        parts.append(FRAME_END)
        return b"".join(parts)

    def _route(self, channel: int, exchange: str, routing_key: str, mandatory: bool) -> bytes:
        args = {"exchange": exchange, "routing_key": routing_key, "mandatory": mandatory}
        frame = self._method_frame(channel, "basic.publish", args)
        if len(self._routes) >= _MAX_ROUTES:
            self._routes.clear()  # replies go to a queue for each client: nothing is used for ever
        self._routes[channel, exchange, routing_key, mandatory] = frame
        return frame

    def ack(self, channel: int, tag: int, multiple: bool = False) -> bytes:
        """Return the acknowledgement of a delivery, or of all up to it."""
        return self._settled(channel, 80, tag, multiple)

    def nack(self, channel: int, tag: int, multiple: bool = False, requeue: bool = True) -> bytes:
        """Return the refusal of a delivery, or of all up to it."""
        return self._settled(channel, 120, tag, multiple | requeue << 1)

    def reject(self, channel: int, tag: int, requeue: bool) -> bytes:
        """Return the refusal of one delivery."""
        return self._settled(channel, 90, tag, requeue)

    def _settled(self, number: int, method_id: int, tag: int, bits: int) -> bytes:
        self._open_channel(number)
        try:
            return _settle(FRAME_METHOD, number, 13, 60, method_id, tag, bits, _END)
        except StructError:
            raise ValueError(f"a delivery tag is a number from 0 to 2**64 - 1, not {tag!r:.40}") from None


def _no_frame(data: bytes) -> str:
    if PROTOCOL_HEADER[:4].startswith(data[:4]):
        return f"the server does not speak AMQP 0-9-1, it offers {data[:8]!r}"
    return f"no frame of AMQP begins like this: {data!r}"


def _deliver(number: int, payload: bytes) -> Tuple[Any, ...]:
    """Return what basic.deliver says, without its content."""
    try:
        at = 5 + payload[4]
        consumer_tag = text_of(payload[5:at])
        delivery_tag, redelivered = _tag_at(payload, at)
        start = at + 10
        at = start + payload[at + 9]
        exchange = text_of(payload[start:at])
        start = at + 1
        at = start + payload[at]
        routing_key = text_of(payload[start:at])
    except OVERRUN:
        at = -1
    if at != len(payload):
        raise ProtocolError(f"basic.deliver whose arguments are not as long as its frame: {payload[:40]!r}")
    return number, consumer_tag, delivery_tag, redelivered & 1 == 1, exchange, routing_key

# SPDX-License-Identifier: MIT
"""A client's AMQP connection: whole conversations replayed, the rules of its states, garbage, bounds."""

from __future__ import annotations

import base64
import random
import tracemalloc
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import pytest
from test_amqp_wire import TRANSCRIPTS, args_of, header_of

from miniq.codecs.amqp import (
    Acked,
    Blocked,
    Cancelled,
    ChannelClosed,
    ConnectionClosed,
    Content,
    Deliver,
    GetOk,
    Heartbeat,
    Method,
    Nacked,
    Peer,
    Returned,
    Unblocked,
)
from miniq.codecs.amqp_wire import (
    METHODS,
    ProtocolError,
    encode_frame,
    encode_header,
    encode_method,
    encode_table,
    method_name,
)

Frame = Dict[str, Any]
#: A frame of the server with the event it completes, or a call of the client with what it must give.
Step = Tuple[str, bytes, Any]


# -- conversations that were captured


def frame_bytes(frame: Frame) -> bytes:
    if "repeats" in frame:
        payload = (frame["repeats"] * (frame["size"] // 16 + 1))[: frame["size"]].encode()
        return encode_frame(3, frame["channel"], payload)
    return base64.b64decode(frame["bytes"])


def content_of(frames: Sequence[Frame]) -> Content:
    """Return the message in a header and its bodies."""
    _, properties, headers = header_of(frames[0])
    return Content(properties, headers or {}, b"".join(frame_bytes(frame)[7:-1] for frame in frames[1:]))


def event_of(frames: Sequence[Frame]) -> Any:
    """Return the event that a method of the server, with its content, must become."""
    first = frames[0]
    if first["kind"] == "heartbeat":
        return Heartbeat(0)
    channel, name, args = first["channel"], first["method"], args_of(first)
    if name == "basic.deliver":
        return Deliver(channel, *args.values(), content_of(frames[1:]))
    if name == "basic.get-ok":
        return GetOk(channel, *args.values(), content_of(frames[1:]))
    if name == "basic.return":
        return Returned(channel, *args.values(), content_of(frames[1:]))
    if name in ("basic.ack", "basic.nack"):
        kind = Acked if name == "basic.ack" else Nacked
        return kind(channel, args["delivery_tag"], args["multiple"])
    if name == "basic.cancel":
        return Cancelled(channel, args["consumer_tag"])
    if name in ("channel.close", "connection.close"):
        closed = ChannelClosed if channel else ConnectionClosed
        cause = method_name(args["class_id"], args["method_id"])
        return closed(channel, args["reply_code"], args["reply_text"], cause)
    if name == "connection.blocked":
        return Blocked(0, args["reason"])
    if name == "connection.unblocked":
        return Unblocked(0)
    return Method(channel, name, args)


def messages(frames: Sequence[Frame]) -> Iterator[List[Frame]]:
    """Give out methods each with the content that follows it, and the other frames alone."""
    at = 0
    while at < len(frames):
        end = at + 1
        while end < len(frames) and frames[end]["kind"] in ("header", "body"):
            end += 1
        yield list(frames[at:end])
        at = end


def steps_of(frames: Sequence[Frame]) -> List[Step]:
    """Return a conversation as steps: ("server", bytes, event) and ("client", bytes, frames)."""
    steps: List[Step] = []
    for group in messages(frames):
        data = b"".join(map(frame_bytes, group))
        if group[0]["dir"] == "s2c":
            steps.append(("server", data, event_of(group)))
        else:
            steps.append(("client", data, group))
    return steps


def connections() -> Iterator[Tuple[str, List[Step]]]:
    for one in TRANSCRIPTS:
        numbers = sorted({frame.get("conn", 0) for frame in one["frames"]})
        for number in numbers:
            frames = [frame for frame in one["frames"] if frame.get("conn", 0) == number]
            yield f"{one['name']}{number or ''}", steps_of(frames)


CONVERSATIONS = dict(connections())
conversation = pytest.mark.parametrize("steps", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())


def say(peer: Peer, frames: Sequence[Frame]) -> bytes:
    """Return what the peer writes where the captured client wrote these frames."""
    first = frames[0]
    if first["kind"] == "protocol-header":
        return peer.header()
    if first["kind"] == "heartbeat":
        return peer.heartbeat()
    channel, name, args = first["channel"], first["method"], args_of(first)
    if name in ("channel.close-ok", "connection.close-ok"):
        return peer.take_replies()
    if name == "basic.publish":
        _, properties, headers = header_of(frames[1])
        route = channel, args["exchange"], args["routing_key"]
        return peer.publish(*route, properties, headers, content_of(frames[1:]).body, args["mandatory"])
    if name == "basic.ack":
        return peer.ack(channel, args["delivery_tag"], args["multiple"])
    if name == "basic.reject":
        return peer.reject(channel, args["delivery_tag"], args["requeue"])
    if name == "connection.tune-ok":
        peer.tune(args["channel_max"], args["frame_max"])
    return peer.method(channel, name, **args)


def test_all_transcripts_are_here():
    assert len(TRANSCRIPTS) == 23
    assert len(CONVERSATIONS) == 27


@conversation
def test_conversation_fed_in_whole_messages_is_understood_and_written_byte_for_byte(steps):
    peer = Peer()
    for side, data, expected in steps:
        if side == "client":
            assert say(peer, expected) == data
        else:
            peer.feed(data)
            assert peer.next_event() == expected
            assert peer.next_event() is None


@conversation
def test_conversation_fed_byte_by_byte_gives_each_event_with_its_last_byte(steps):
    peer = Peer()
    for side, data, expected in steps:
        if side == "client":
            assert say(peer, expected) == data
            continue
        for at in range(len(data) - 1):
            peer.feed(data[at : at + 1])
            assert peer.next_event() is None
        peer.feed(data[-1:])
        assert peer.next_event() == expected
        assert peer.next_event() is None


@conversation
@pytest.mark.parametrize("trailing", [1, 7, 10**9])
def test_conversation_fed_with_trailing_bytes_leaves_them_to_the_next_event(steps, trailing):
    peer = Peer()
    coming = [data for side, data, _ in steps if side == "server"]
    fed = 0  # bytes of the message that came already
    for side, data, expected in steps:
        if side == "client":
            assert say(peer, expected) == data
            continue
        following = coming[1] if len(coming) > 1 else b""
        # Its first frame must not be complete before the client asked for it.
        ahead = min(trailing, int.from_bytes(following[3:7], "big") + 7) if following else 0
        peer.feed(data[fed:] + following[:ahead])
        assert peer.next_event() == expected
        assert peer.next_event() is None
        del coming[0]
        fed = ahead


@conversation
def test_captured_calls_are_the_same_by_their_names(steps):
    """ack and reject have methods of their own; the general one gives the same."""
    peer = Peer()
    for side, data, expected in steps:
        if side == "server":
            peer.feed(data)
            peer.next_event()
        elif expected[0].get("method") in ("basic.ack", "basic.reject"):
            args = args_of(expected[0])
            assert peer.method(expected[0]["channel"], expected[0]["method"], **args) == data
        else:
            say(peer, expected)


# -- a server by hand


def server(name: str, channel: int = 0, **args: Any) -> bytes:
    return encode_frame(1, channel, encode_method(name, args))


def header(size: int, channel: int = 1, headers: Optional[Dict[str, Any]] = None) -> bytes:
    return encode_frame(2, channel, encode_header(size, {}, headers))


def body(data: bytes, channel: int = 1) -> bytes:
    return encode_frame(3, channel, data)


def deliver(data: bytes = b"", channel: int = 1, tag: int = 1) -> bytes:
    message = server("basic.deliver", channel, consumer_tag="c", delivery_tag=tag, routing_key="q")
    return message + header(len(data), channel) + (body(data, channel) if data else b"")


def delivered(data: bytes = b"", channel: int = 1, tag: int = 1) -> Deliver:
    return Deliver(channel, "c", tag, False, "", "q", Content({}, {}, data))


def events(peer: Peer, data: bytes = b"") -> List[Any]:
    peer.feed(data)
    return list(iter(peer.next_event, None))


def opened(*channels: int, frame_max: int = 131072, channel_max: int = 2047, **limits: int) -> Peer:
    """Return a peer after the handshake, with channels that are open."""
    peer = Peer(**limits)
    assert peer.header() == b"AMQP\x00\x00\x09\x01"
    assert events(peer, server("connection.start")) == [
        Method(0, "connection.start", _defaults("connection.start"))
    ]
    peer.method(0, "connection.start-ok", mechanism="PLAIN", response="\0guest\0guest")
    events(peer, server("connection.tune", channel_max=channel_max, frame_max=frame_max, heartbeat=60))
    peer.tune(channel_max, frame_max)
    peer.method(0, "connection.tune-ok", channel_max=channel_max, frame_max=frame_max)
    peer.method(0, "connection.open", vhost="/")
    assert [event.name for event in events(peer, server("connection.open-ok"))] == ["connection.open-ok"]
    for channel in channels:
        peer.method(channel, "channel.open")
        assert events(peer, server("channel.open-ok", channel)) == [
            Method(channel, "channel.open-ok", {"reserved1": ""})
        ]
    return peer


def _defaults(name: str) -> Dict[str, Any]:
    empty = {"s": "", "S": "", "F": {}, "b": False}
    return {argument: empty.get(kind, 0) for argument, kind in METHODS[name].arguments}


def refused(peer: Peer, data: bytes, text: str) -> None:
    """Assert that these bytes end the connection with an error of this text, now and ever after."""
    peer.feed(data)
    with pytest.raises(ProtocolError) as caught:
        for _ in range(100):
            peer.next_event()
    assert text in str(caught.value)
    assert len(str(caught.value)) < 350
    dead: Tuple[Callable[[], Any], ...] = (peer.next_event, lambda: peer.feed(b"\x08"), peer.next_event)
    for call in dead:
        with pytest.raises(ProtocolError) as again:
            call()
        assert str(again.value) == str(caught.value)
    with pytest.raises(ValueError, match="channel 1 is not open"):
        peer.ack(1, 1)


# -- frames


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "no frame of AMQP begins like this: b'HTTP/1.1 400"),
        (b"H", "begins like this: b'H'"),
        (b"\x15\x03\x03\x00\x02\x02\x28", "begins like this: b'\\x15"),
        (b"AMQP\x00\x01\x00\x00", "does not speak AMQP 0-9-1, it offers b'AMQP\\x00\\x01\\x00\\x00'"),
        (b"\x00" * 8, "begins like this"),
        (b"\x04\x00\x01\x00\x00\x00\x00\xce", "begins like this"),
        (
            b"\x01\x00\x01\xff\xff\xff\xff\x00",
            "a frame of 4294967295 bytes on channel 1, the limit is 131064",
        ),
        (b"\x03\x00\x01\x00\x01\xff\xf9\x00", "a frame of 131065 bytes"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00", "without its end: b'\\x00'"),
        (server("channel.open-ok", 1)[:-1] + b"\x00", "a frame of 8 bytes on channel 1 without its end"),
        (b"\x08\x00\x01\x00\x00\x00\x00\xce", "a heartbeat on channel 1 with 0 bytes"),
        (b"\x08\x00\x00\x00\x00\x00\x01a\xce", "a heartbeat on channel 0 with 1 bytes"),
        (header(1, 0), "a header on channel 0, which carries no messages"),
        (body(b"a", 0), "a body on channel 0"),
        (body(b"", 1), "a body on channel 1 where none belongs"),
        (server("channel.open-ok", 7), "a method on channel 7, which is not open"),
        (header(0, 7), "a header on channel 7, which is not open"),
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "bytes"])
def test_frame_that_is_none_ends_the_connection(data, text, whole):
    peer = opened(1)
    if not whole:
        for at in range(len(data) - 1):
            peer.feed(data[at : at + 1])
            try:
                assert peer.next_event() is None
            except ProtocolError:
                return  # noticed before all of it came
        data = data[-1:]
    refused(peer, data, text)


def test_server_of_another_version_is_named_before_anything_else():
    peer = Peer()
    refused(peer, b"AMQP\x01\x01\x00\x0a", "the server does not speak AMQP 0-9-1, it offers b'AMQP")


def test_heartbeats_come_in_any_state_and_between_the_parts_of_a_message():
    beat = b"\x08\x00\x00\x00\x00\x00\x00\xce"
    peer = Peer()
    assert peer.heartbeat() == beat
    assert events(peer, beat) == [Heartbeat(0)]
    peer = opened(1)
    first = server("basic.deliver", 1, consumer_tag="c", delivery_tag=1, routing_key="q")
    parts = beat.join((first, header(2), body(b"a"), body(b"b")))
    assert events(peer, parts) == [Heartbeat(0)] * 3 + [delivered(b"ab")]


def test_frame_of_the_agreed_size_is_read_and_one_byte_more_refused():
    peer = opened(1, frame_max=4096)
    start = server("basic.deliver", 1, consumer_tag="c", delivery_tag=1, routing_key="q") + header(5000)
    assert events(peer, start + body(b"a" * 4088)) == []
    refused(peer, body(b"a" * 4089), "a frame of 4089 bytes on channel 1, the limit is 4088")


@pytest.mark.parametrize("frame_max", [1, 4095])
def test_frames_smaller_than_amqp_allows_are_not_agreed_on(frame_max):
    with pytest.raises(ProtocolError, match=f"frame_max={frame_max}: less than the 4096 bytes"):
        Peer().tune(0, frame_max)


def test_frames_without_a_limit_are_bounded_by_the_size_of_a_message():
    peer = opened(1, frame_max=0, channel_max=0, max_body_bytes=200_000)
    peer.method(65535, "channel.open")
    events(peer, deliver(bytes(200_000)))
    sent = peer.publish(1, "", "q", {}, None, bytes(150_000))
    assert sent.endswith(header(150_000) + body(bytes(150_000)))
    refused(peer, body(bytes(200_001)), "a frame of 200001 bytes on channel 1, the limit is 200000")


# -- messages


def test_message_without_a_body_is_complete_with_its_header():
    assert events(opened(1), deliver()) == [delivered()]


def test_message_may_come_in_many_bodies():
    pieces = [b"a", b"bc", b"d" * 1000, b"e"]
    data = b"".join(pieces)
    first = server("basic.deliver", 1, consumer_tag="c", delivery_tag=1, routing_key="q")
    peer = opened(1)
    for _ in range(2):
        parts = first + header(len(data)) + b"".join(map(body, pieces))
        assert events(peer, parts + deliver(b"x")) == [delivered(data), delivered(b"x")]


def test_messages_of_several_channels_may_come_in_turns():
    peer = opened(1, 2, 3)
    starts = [
        server("basic.deliver", channel, consumer_tag="c", delivery_tag=channel, routing_key="q")
        for channel in (1, 2, 3)
    ]
    data = b"".join(starts) + header(2, 2) + header(4, 1) + body(b"ab", 1) + body(b"x", 2) + header(0, 3)
    data += body(b"y", 2) + server("basic.ack", 2, delivery_tag=9) + body(b"cd", 1)
    assert events(peer, data) == [
        delivered(b"", 3, 3), delivered(b"xy", 2, 2), Acked(2, 9, False), delivered(b"abcd", 1, 1),
    ]  # fmt: skip


def test_message_returned_and_message_asked_for_come_whole():
    peer = opened(1)
    peer.method(1, "basic.get", queue="q")
    returned = server("basic.return", 1, reply_code=312, reply_text="NO_ROUTE", exchange="x", routing_key="k")
    got = server(
        "basic.get-ok", 1, delivery_tag=5, redelivered=True, exchange="x", routing_key="k", message_count=3
    )
    content = encode_frame(2, 1, encode_header(1, {"priority": 4}, {"a": None})) + body(b"b")
    expected = Content({"priority": 4}, {"a": None}, b"b")
    assert events(peer, returned + content + got + content) == [
        Returned(1, 312, "NO_ROUTE", "x", "k", expected),
        GetOk(1, 5, True, "x", "k", 3, expected),
    ]


def test_names_that_are_not_text_reach_the_client_and_leave_as_they_came():
    raw = encode_method("basic.deliver", {"consumer_tag": "c", "delivery_tag": 1, "routing_key": "\udcff"})
    assert raw.endswith(b"\x01\xff")
    peer = opened(1)
    (event,) = events(peer, encode_frame(1, 1, raw) + header(0))
    assert event.routing_key == "\udcff"
    assert b"\x01\xff" in peer.publish(1, "", event.routing_key, {}, {}, b"")


DELIVER = server("basic.deliver", 1, consumer_tag="c", delivery_tag=1, routing_key="q")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (header(0), "a header on channel 1 where none belongs"),
        (body(b"a"), "a body on channel 1 where none belongs"),
        (DELIVER + body(b"a"), "a body on channel 1 where none belongs"),
        (DELIVER + header(1) + header(1), "a header on channel 1 where none belongs"),
        (deliver(b"a") + body(b"a"), "a body on channel 1 where none belongs"),
        (deliver() + body(b""), "a body on channel 1 where none belongs"),
        (DELIVER + header(3) + body(b"ab") + body(b"cd"), "a body of 2 bytes on channel 1, 1 were missing"),
        (DELIVER + header(3) + body(b""), "a body of 0 bytes on channel 1, 3 were missing"),
        (DELIVER + header(2001), "a message of 2001 bytes, at most 2000 are taken"),
        (DELIVER + header(2**64 - 1), "a message of 18446744073709551615 bytes, at most 2000"),
        (DELIVER + DELIVER, "basic.deliver on channel 1 where the rest of a message should come"),
        (
            DELIVER + header(3) + server("channel.close", 1),
            "channel.close on channel 1 where the rest of a message should come",
        ),
        (server("basic.return", 1) + server("basic.ack", 1), "basic.ack on channel 1 where the rest"),
        (encode_frame(1, 1, DELIVER[7:-2]), "basic.deliver whose arguments are not as long as its frame"),
        (encode_frame(1, 1, DELIVER[7:-1] + b"a"), "basic.deliver whose arguments"),
        (encode_frame(1, 1, DELIVER[7:12]), "basic.deliver whose arguments"),
        (encode_frame(1, 1, DELIVER[7:14]), "basic.deliver whose arguments"),
        (DELIVER + encode_frame(2, 1, b"\x00\x3c"), "a content header whose parts"),
        (encode_frame(1, 1, server("basic.ack", 1)[7:-2]), "basic.ack whose arguments"),
    ],
)
def test_message_in_disorder_ends_the_connection(data, text):
    refused(opened(1, max_body_bytes=2000, frame_max=4096), data, text)


# -- channels


def test_channel_error_is_an_event_with_its_cause_and_the_number_is_free_again():
    peer = opened(1, 2)
    peer.publish(1, "missing", "k", {}, {}, b"")
    close = server("channel.close", 1, reply_code=404, reply_text="NOT_FOUND", class_id=60, method_id=40)
    assert events(peer, close + deliver(b"a", 2)) == [
        ChannelClosed(1, 404, "NOT_FOUND", "basic.publish"),
        delivered(b"a", 2),
    ]
    for call in (
        lambda: peer.ack(1, 1),
        lambda: peer.nack(1, 1),
        lambda: peer.reject(1, 1, True),
        lambda: peer.publish(1, "", "q", {}, {}, b""),
        lambda: peer.method(1, "queue.declare"),
        lambda: peer.method(1, "channel.close"),
    ):
        with pytest.raises(ValueError, match="channel 1 is not open"):
            call()
    assert peer.take_replies() == server("channel.close-ok", 1)
    assert peer.take_replies() == b""
    assert peer.method(1, "channel.open") == server("channel.open", 1)


def test_channel_opened_again_is_opened_after_the_close_is_answered():
    peer = opened(1)
    assert events(peer, server("channel.close", 1, reply_code=406, reply_text="no")) == [
        ChannelClosed(1, 406, "no", "")
    ]
    assert peer.method(1, "channel.open") == server("channel.close-ok", 1) + server("channel.open", 1)
    assert peer.take_replies() == b""


def test_replies_of_a_channel_that_was_closed_are_not_awaited_any_more():
    peer = opened(1)
    peer.method(1, "queue.declare")
    events(peer, server("channel.close", 1))
    peer.method(1, "channel.open")
    events(peer, server("channel.open-ok", 1))
    refused(peer, server("queue.declare-ok", 1), "queue.declare-ok on channel 1, which nothing asked for")


def test_channel_closed_by_the_client_takes_nothing_but_the_answer():
    peer = opened(1)
    assert peer.method(1, "channel.close") == server("channel.close", 1)
    late = deliver(b"a") + server("queue.declare-ok", 1) + DELIVER + server("basic.ack", 1)
    assert events(peer, late) == []
    with pytest.raises(ValueError, match="channel 1 is not open"):
        peer.method(1, "queue.declare")
    with pytest.raises(ValueError, match="channel 1: it is closing already"):
        peer.method(1, "channel.open")
    assert events(peer, server("channel.close-ok", 1)) == [Method(1, "channel.close-ok", {})]
    assert peer.take_replies() == b""
    peer.method(1, "channel.open")


def test_closes_of_a_channel_that_meet_are_both_answered():
    peer = opened(1)
    peer.method(1, "channel.close")
    assert events(peer, server("channel.close", 1, reply_code=404, reply_text="a")) == [
        ChannelClosed(1, 404, "a", "")
    ]
    assert peer.take_replies() == server("channel.close-ok", 1)
    assert events(peer, server("channel.close-ok", 1)) == [Method(1, "channel.close-ok", {})]
    peer.method(1, "channel.open")


def test_channel_closed_in_the_middle_of_a_message_forgets_it():
    peer = opened(1)
    assert events(peer, DELIVER + header(5) + body(b"ab")) == []
    peer.method(1, "channel.close")
    assert events(peer, body(b"cde") + server("channel.close-ok", 1)) == [Method(1, "channel.close-ok", {})]
    peer.method(1, "channel.open")
    assert [type(event) for event in events(peer, server("channel.open-ok", 1) + deliver())] == [
        Method,
        Deliver,
    ]


def test_calls_may_follow_the_opening_of_a_channel_before_it_is_answered():
    peer = opened()
    peer.method(3, "channel.open")
    peer.method(3, "confirm.select")
    peer.publish(3, "", "q", {}, {}, b"")
    found = events(peer, server("channel.open-ok", 3) + server("confirm.select-ok", 3))
    assert [event.name for event in found] == ["channel.open-ok", "confirm.select-ok"]


def test_replies_may_overtake_each_other_but_not_come_twice():
    """RabbitMQ answers basic.consume from another process than the rest."""
    peer = opened(1)
    for name in ("basic.consume", "basic.qos", "basic.get", "basic.get"):
        peer.method(1, name)
    names = ["basic.qos-ok", "basic.get-empty", "basic.consume-ok", "basic.get-empty"]
    data = b"".join(server(name, 1) for name in names)
    assert [event.name for event in events(peer, data)] == names
    refused(peer, server("basic.consume-ok", 1), "basic.consume-ok on channel 1, which nothing asked for")


def test_call_that_wants_no_reply_gets_none():
    peer = opened(1)
    peer.method(1, "queue.declare", nowait=True)
    refused(peer, server("queue.declare-ok", 1), "queue.declare-ok on channel 1, which nothing asked for")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("queue.declare-ok", "queue.declare-ok on channel 1, which nothing asked for"),
        ("basic.get-ok", "basic.get-ok on channel 1, which nothing asked for"),
        ("basic.get-empty", "basic.get-empty on channel 1, which nothing asked for"),
        ("channel.open-ok", "channel.open-ok on channel 1, which nothing asked for"),
        ("channel.close-ok", "channel.close-ok on channel 1, which nothing asked for"),
        ("tx.commit-ok", "tx.commit-ok on channel 1, which nothing asked for"),
        ("basic.publish", "basic.publish on channel 1, which a server may not send there"),
        ("queue.declare", "queue.declare on channel 1, which a server may not send there"),
        ("connection.close", "connection.close on channel 1, which a server may not send there"),
        ("connection.blocked", "connection.blocked on channel 1, which a server may not send there"),
    ],
)
def test_method_that_does_not_belong_on_a_channel_ends_the_connection(name, text):
    refused(opened(1), server(name, 1), text)


def test_consumer_ended_by_the_server_is_an_event_and_answered_where_that_is_wanted():
    peer = opened(1)
    assert events(peer, server("basic.cancel", 1, consumer_tag="c", nowait=True)) == [Cancelled(1, "c")]
    assert peer.take_replies() == b""
    assert events(peer, server("basic.cancel", 1, consumer_tag="d")) == [Cancelled(1, "d")]
    assert peer.take_replies() == server("basic.cancel-ok", 1, consumer_tag="d")


def test_flow_of_the_server_is_answered():
    peer = opened(1)
    assert events(peer, server("channel.flow", 1, active=True)) == [
        Method(1, "channel.flow", {"active": True})
    ]
    assert peer.take_replies() == server("channel.flow-ok", 1, active=True)


def test_confirms_come_as_events():
    data = server("basic.ack", 1, delivery_tag=2**64 - 1, multiple=True) + server(
        "basic.ack", 1, delivery_tag=1
    )
    data += server("basic.nack", 1, delivery_tag=2, multiple=True, requeue=True)
    assert events(opened(1), data) == [Acked(1, 2**64 - 1, True), Acked(1, 1, False), Nacked(1, 2, True)]


def test_bits_without_a_meaning_are_not_looked_at():
    ack = server("basic.ack", 1, delivery_tag=3)[:-2]
    assert events(opened(1), ack + b"\xff\xce" + ack + b"\xfe\xce") == [Acked(1, 3, True), Acked(1, 3, False)]
    at = DELIVER.index(b"\x01q") - 2
    for bits, redelivered in ((0xFF, True), (0xFE, False)):
        (event,) = events(opened(1), DELIVER[:at] + bytes((bits,)) + DELIVER[at + 1 :] + header(0))
        assert event == delivered()._replace(redelivered=redelivered)


# -- the connection


def test_connection_error_is_an_event_and_the_end():
    peer = opened(1)
    close = server(
        "connection.close", reply_code=320, reply_text="CONNECTION_FORCED", class_id=10, method_id=40
    )
    assert events(peer, close + deliver(b"late") + b"garbage"[:0]) == [
        ConnectionClosed(0, 320, "CONNECTION_FORCED", "connection.open")
    ]
    assert peer.take_replies() == server("connection.close-ok")
    assert events(peer, server("connection.close") + server("connection.blocked")) == []
    for call in (
        lambda: peer.method(1, "queue.declare"),
        lambda: peer.publish(1, "", "q", {}, {}, b""),
        lambda: peer.ack(1, 1),
    ):
        with pytest.raises(ValueError, match="channel 1 is not open"):
            call()
    with pytest.raises(ValueError, match="channel 2: the connection is in the state 'closed'"):
        peer.method(2, "channel.open")
    with pytest.raises(ValueError, match="connection.close cannot be sent in the state 'closed'"):
        peer.method(0, "connection.close")


def test_connection_closed_by_the_client_takes_nothing_but_the_answer():
    peer = opened(1)
    assert peer.method(0, "connection.close", reply_code=200, reply_text="bye") == server(
        "connection.close", reply_code=200, reply_text="bye"
    )
    late = (
        deliver(b"a")
        + server("connection.blocked")
        + server("channel.close", 1)
        + server("channel.open-ok", 9)
    )
    assert events(peer, late) == []
    assert events(peer, server("connection.close-ok")) == [Method(0, "connection.close-ok", {})]
    assert peer.take_replies() == b""


def test_closes_of_the_connection_that_meet_are_both_answered():
    peer = opened(1)
    peer.method(0, "connection.close")
    assert events(peer, server("connection.close", reply_code=320)) == [ConnectionClosed(0, 320, "", "")]
    assert peer.take_replies() == server("connection.close-ok")
    assert events(peer, server("connection.close-ok")) == []


def test_connection_refused_in_the_handshake_is_an_event():
    peer = Peer()
    events(peer, server("connection.start"))
    peer.method(0, "connection.start-ok")
    assert events(peer, server("connection.close", reply_code=403, reply_text="ACCESS_REFUSED")) == [
        ConnectionClosed(0, 403, "ACCESS_REFUSED", "")
    ]


def test_challenges_may_be_exchanged_before_tuning():
    peer = Peer()
    events(peer, server("connection.start"))
    peer.method(0, "connection.start-ok")
    for _ in range(2):
        assert events(peer, server("connection.secure", challenge=b"\xff")) == [
            Method(0, "connection.secure", {"challenge": b"\xff"})
        ]
        assert peer.method(0, "connection.secure-ok", response=b"\xfe") == server(
            "connection.secure-ok", response=b"\xfe"
        )
    assert len(events(peer, server("connection.tune"))) == 1


def test_blocked_and_unblocked_are_events():
    data = server("connection.blocked", reason="low on memory") + server("connection.unblocked")
    assert events(opened(), data) == [Blocked(0, "low on memory"), Unblocked(0)]


def test_secret_may_be_renewed():
    peer = opened()
    assert peer.method(0, "connection.update-secret", new_secret="s", reason="r") == server(
        "connection.update-secret", new_secret="s", reason="r"
    )
    assert events(peer, server("connection.update-secret-ok")) == [
        Method(0, "connection.update-secret-ok", {})
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["connection.tune"],
        ["connection.open-ok"],
        ["connection.start", "connection.start"],
        ["connection.start", "connection.open-ok"],
        ["connection.start", "connection.blocked"],
        ["connection.start", "connection.tune", "connection.secure"],
        ["connection.start", "connection.tune", "connection.tune"],
        ["connection.start", "connection.tune", "connection.open-ok", "connection.open-ok"],
        ["connection.start", "connection.tune", "connection.open-ok", "connection.start"],
        ["connection.start", "connection.tune", "connection.open-ok", "connection.close-ok"],
        ["connection.start", "connection.tune", "connection.open-ok", "connection.open"],
        ["connection.start", "connection.tune", "connection.open-ok", "basic.deliver"],
    ],
)
def test_method_of_another_state_ends_the_connection(names):
    peer = Peer()
    events(peer, b"".join(map(server, names[:-1])))
    refused(peer, server(names[-1]), f"{names[-1]} on channel 0 in the state")


def test_channels_before_the_connection_is_open_end_it():
    peer = Peer()
    events(peer, server("connection.start"))
    refused(peer, server("channel.open-ok", 1), "a method on channel 1, which is not open")


# -- calls


@pytest.mark.parametrize(
    ("channel", "name", "args", "text"),
    [
        (1, "queue.delcare", {}, "no method 'queue.delcare'"),
        (1, "queue.declare", {"durabel": True}, "queue.declare has no argument 'durabel'"),
        (1, "queue.declare", {"queue": "x" * 256}, "queue.declare: queue="),
        (1, "queue.declare", {"arguments": {"a": "x" * 200_000}}, "does not fit into a frame of 131064"),
        (1, "queue.declare-ok", {}, "queue.declare-ok is not for a client to send"),
        (1, "basic.publish", {}, "basic.publish is not for a client to send like this"),
        (1, "channel.close-ok", {}, "channel.close-ok is not for a client to send like this"),
        (0, "connection.close-ok", {}, "connection.close-ok is not for a client to send like this"),
        (1, "connection.close", {}, "connection.close is sent on channel 0, not on 1"),
        (0, "queue.declare", {}, "queue.declare is sent on a channel above 0"),
        (0, "channel.open", {}, "channel.open is sent on a channel above 0"),
        (0, "connection.open", {}, "connection.open cannot be sent in the state 'open'"),
        (0, "connection.start-ok", {}, "connection.start-ok cannot be sent in the state 'open'"),
        (2, "queue.declare", {}, "channel 2 is not open"),
        (1, "channel.open", {}, "channel 1: it is open already"),
        (11, "channel.open", {}, "channel 11: numbers are 1 to 10 here"),
        (11, "queue.declare", {}, "channel 11: numbers are 1 to 10 here"),
        (-1, "channel.open", {}, "channel -1: numbers are 1 to 10 here"),
    ],
)
def test_call_that_is_not_possible_is_refused_by_name_and_changes_nothing(channel, name, args, text):
    peer = opened(1, channel_max=10)
    with pytest.raises(ValueError) as caught:
        peer.method(channel, name, **args)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 250
    assert events(peer, deliver(b"a")) == [delivered(b"a")]
    assert peer.method(2, "channel.open") == server("channel.open", 2)


def test_settling_is_written_like_any_method():
    peer = opened(1)
    for tag in (0, 1, 2**64 - 1):
        for first in (True, False):
            assert peer.ack(1, tag, first) == server("basic.ack", 1, delivery_tag=tag, multiple=first)
            assert peer.reject(1, tag, first) == server("basic.reject", 1, delivery_tag=tag, requeue=first)
            for second in (True, False):
                assert peer.nack(1, tag, first, second) == server(
                    "basic.nack", 1, delivery_tag=tag, multiple=first, requeue=second
                )
    assert peer.nack(1, 7) == server("basic.nack", 1, delivery_tag=7, requeue=True)
    for tag in (-1, 2**64, "7", None):
        with pytest.raises(ValueError, match="a delivery tag is a number from 0"):
            peer.ack(1, tag)


@pytest.mark.parametrize("size", [0, 1, 4087, 4088, 4089, 8176, 8177, 10_000])
def test_body_is_split_at_the_agreed_size(size):
    data = random.Random(size).randbytes(size)
    peer = opened(1, frame_max=4096)
    pieces = [data[at : at + 4088] for at in range(0, size, 4088)]
    expected = server("basic.publish", 1, exchange="x", routing_key="k", mandatory=True) + header(size, 1, {})
    assert peer.publish(1, "x", "k", {}, {}, data, True) == expected + b"".join(map(body, pieces))
    assert peer.publish(1, "x", "k", {}, {}, memoryview(data), True) == expected + b"".join(map(body, pieces))


@pytest.mark.parametrize(
    ("routing_key", "properties", "headers", "error", "text"),
    [
        ("k" * 256, {}, {}, ValueError, "basic.publish: routing_key='kkk"),
        ("k", {"prio": 1}, {}, ValueError, "no property 'prio'"),
        ("k", {}, {"a": {1}}, TypeError, "headers: 'a': a value of type set"),
        ("k", {}, {"a": "x" * 4090}, ValueError, "4115 bytes do not fit into a frame of 4088"),
    ],
)
def test_message_that_cannot_be_sent_is_refused_by_name(routing_key, properties, headers, error, text):
    with pytest.raises(error) as caught:
        opened(1, frame_max=4096).publish(1, "", routing_key, properties, headers, b"")
    assert text in str(caught.value)


def test_headers_as_large_as_a_frame_are_sent():
    headers = {"a": "x" * (4088 - 14 - len(encode_table({"a": ""})))}
    sent = opened(1, frame_max=4096).publish(1, "", "q", {}, headers, b"")
    assert sent.endswith(header(0, 1, headers))
    assert len(header(0, 1, headers)) == 4096


def test_routes_remembered_are_bounded():
    peer = opened(1)
    for number in range(2000):
        sent = peer.publish(1, "", f"reply.{number}", {}, {}, b"", number % 2 == 1)
        assert sent == peer.publish(1, "", f"reply.{number}", {}, {}, b"", number % 2 == 1)
        start = server("basic.publish", 1, routing_key=f"reply.{number}", mandatory=number % 2 == 1)
        assert sent == start + header(0, 1, {})
    assert len(peer._routes) <= 256


def test_what_a_client_publishes_is_what_a_consumer_gets():
    for seed in range(300):
        rng = random.Random(seed)
        frame_max = rng.choice((4096, 5000, 131072))
        peer = opened(1, frame_max=frame_max)
        sent = Content(
            {"content_type": "application/json", "priority": rng.randrange(10)},
            {"id": "x" * rng.randrange(600), "retries": rng.randrange(5), "timelimit": [None, 1.5]},
            rng.randbytes(rng.choice((0, 1, 600, frame_max - 8, 20_000))),
        )
        data = peer.publish(1, "", "q", *sent)
        begin = server("basic.publish", 1, routing_key="q")
        assert data.startswith(begin)
        data = DELIVER + data[len(begin) :]
        found: List[Any] = []
        at = 0
        while at < len(data):
            size = rng.randint(1, rng.choice((10, 3000, 70_000)))
            found += events(peer, data[at : at + size])
            at += size
        assert found == [Deliver(1, "c", 1, False, "", "q", sent)], f"seed {seed}"


# -- garbage


def play(steps: Sequence[Step], rng: Optional[random.Random] = None) -> List[Any]:
    """Return all events of a conversation and the error that ended it, fed whole or in random pieces."""
    peer = Peer()
    found: List[Any] = []
    try:
        for side, data, expected in steps:
            if side == "client":
                try:
                    say(peer, expected)
                except ValueError as error:  # what came before was not what the captured client saw
                    found.append(str(error))
                continue
            at = 0
            while at < len(data):
                size = rng.randint(1, 40) if rng else len(data)
                peer.feed(data[at : at + size])
                found.extend(iter(peer.next_event, None))
                at += size
    except ProtocolError as error:
        found.append(str(error).partition(":")[0])  # behind it is as much as had come by then
    return found


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 3)):
        at = rng.randrange(len(changed))
        how = rng.randrange(4)
        if how == 0:
            changed[at] = rng.choice((rng.randrange(256), changed[at] ^ 1, 0, 1, 2, 3, 8, 0xCE))
        elif how == 1:
            del changed[at : at + rng.randrange(1, 5)]
            changed += b"\xce"  # never empty
        elif how == 2:
            changed[at:at] = changed[at : at + rng.randrange(1, 12)]
        else:
            changed += rng.choice((data, rng.randbytes(20)))
    return bytes(changed)


def test_mutated_conversations_give_events_or_a_protocol_error_however_they_are_cut():
    usual = [steps for steps in CONVERSATIONS.values() if len(steps) < 60]
    ended = 0
    for seed in range(1500):
        rng = random.Random(seed)
        steps = list(rng.choice(usual))
        places = [place for place, step in enumerate(steps) if step[0] == "server"]
        place = rng.choice(places)
        side, data, expected = steps[place]
        steps[place] = side, mutated(data, rng), expected
        try:
            whole, pieces = play(steps), play(steps, rng)
        except Exception as error:
            pytest.fail(f"seed {seed}: {error!r} for {steps[place][1][:300]!r}")
        assert whole == pieces, f"seed {seed}: {steps[place][1][:300]!r}"
        ended += bool(whole) and isinstance(whole[-1], str)
    assert ended > 500


def test_random_frames_give_events_or_a_protocol_error():
    ended = 0
    for seed in range(2000):
        rng = random.Random(seed)
        peer = opened(1, 2)
        for name in ("queue.declare", "basic.get", "basic.consume"):
            peer.method(1, name)
        try:
            for _ in range(30):
                kind = rng.choice((1, 1, 2, 3, 8))
                payload = (
                    encode_method(rng.choice(list(METHODS)), {})
                    if kind == 1
                    else rng.randbytes(rng.randrange(9))
                )
                payload = encode_header(rng.randrange(4), {}, {}) if kind == 2 else payload
                events(peer, encode_frame(kind, rng.randrange(3), payload if rng.random() < 0.9 else b""))
        except ProtocolError:
            ended += 1
        except Exception as error:
            pytest.fail(f"seed {seed}: {error!r}")
    assert ended > 1500


# -- bounds


class Counting(Peer):
    """A peer that counts the bytes it puts together."""

    def __init__(self) -> None:
        super().__init__()
        self.copied_bytes = 0

    def _refill(self, missing: int) -> bool:
        came = super()._refill(missing)
        self.copied_bytes += len(self._data) if came else 0
        return came


def counting() -> Counting:
    peer = Counting()
    events(peer, server("connection.start") + server("connection.tune") + server("connection.open-ok"))
    peer.method(1, "channel.open")
    events(peer, server("channel.open-ok", 1))
    peer.copied_bytes = 0
    return peer


def long_message(size: int) -> bytes:
    pieces = [bytes(min(131064, size - at)) for at in range(0, size, 131064)]
    return DELIVER + header(size) + b"".join(map(body, pieces))


@pytest.mark.parametrize("piece_bytes", [1500, 65536])
def test_message_of_16_mb_in_pieces_is_put_together_once(piece_bytes):
    peer = counting()
    size = 16_000_000
    data = long_message(size)
    for at in range(0, len(data), piece_bytes):
        found = events(peer, data[at : at + piece_bytes])
        assert len(found) == (at + piece_bytes >= len(data))
    assert found[0].content.body == bytes(size)
    # The rest of a piece that a frame ends in is copied with the next frame.
    assert peer.copied_bytes < 2 * size


def test_many_frames_read_slower_than_they_come_are_copied_once():
    peer = counting()
    piece = deliver(b"a" * 50) * 20
    for _ in range(500):
        peer.feed(piece)
        assert peer.next_event() == delivered(b"a" * 50)
    assert len(events(peer)) == 500 * 20 - 500
    assert peer.copied_bytes < 2 * 500 * len(piece)


def test_size_that_was_only_claimed_takes_no_memory():
    peer = opened(1)
    tracemalloc.start()
    try:
        assert events(peer, DELIVER + header(500 * 1024 * 1024) + body(b"a")) == []
        assert events(peer, body(bytes(131064))[:9]) == []
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 500_000


def test_message_that_was_read_is_not_kept():
    peer = opened(1)
    data = long_message(8_000_000)
    tracemalloc.start()
    try:
        assert len(events(peer, data)) == 1
        kept_bytes, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes > 8_000_000
    assert kept_bytes < 100_000

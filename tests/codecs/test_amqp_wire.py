# SPDX-License-Identifier: MIT
"""Parts of AMQP 0-9-1: methods, content headers and tables both ways, and what is refused."""

from __future__ import annotations

import base64
import enum
import json
import math
import random
import struct
import tracemalloc
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

from miniq.codecs import amqp_wire
from miniq.codecs.amqp_wire import (
    MAX_DEPTH,
    METHODS,
    PROPERTY_NAMES,
    ProtocolError,
    decode_header,
    decode_method,
    encode_frame,
    encode_header,
    encode_method,
    encode_table,
    method_name,
)

TRANSCRIPTS: List[Dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "vectors" / "amqp_transcripts.json").read_text(encoding="utf-8")
)
#: Frames that were captured, each kind of them once: same bytes, same frame.
FRAMES = list(
    {frame["bytes"]: frame for one in TRANSCRIPTS for frame in one["frames"] if "bytes" in frame}.values()
)
UTC = timezone.utc
D = datetime


def payload_of(frame: Dict[str, Any]) -> bytes:
    return base64.b64decode(frame["bytes"])[7:-1]


def python_of(tagged: Any) -> Any:
    """Return the value of a field as the transcripts show it: ``[type, value]``."""
    tag, value = tagged
    if tag == "F":
        return {name: python_of(one) for name, one in value.items()}
    if tag == "A":
        return [python_of(one) for one in value]
    return b"\xff\x00" if value == "\\xff\x00" else value


def args_of(frame: Dict[str, Any]) -> Dict[str, Any]:
    """Return the arguments of a captured method as values: what is a dict is a table."""
    return {
        name: python_of(("F", value)) if isinstance(value, dict) else value
        for name, value in frame["args"].items()
    }


def header_of(frame: Dict[str, Any]) -> Tuple[int, Dict[str, Any], Any]:
    """Return size, properties and headers (None if there are none) of a captured content header."""
    properties = dict(frame["properties"])
    headers = properties.pop("headers", None)
    return frame["body_size"], properties, None if headers is None else python_of(("F", headers))


# -- what was captured


@pytest.mark.parametrize(
    "frame", [one for one in FRAMES if one["kind"] == "method"], ids=lambda one: one["method"]
)
def test_captured_method_is_read_and_written_byte_for_byte(frame):
    payload = payload_of(frame)
    assert decode_method(payload) == (frame["method"], args_of(frame))
    assert encode_method(frame["method"], args_of(frame)) == payload
    not_default = {name: value for name, value in args_of(frame).items() if value or isinstance(value, bytes)}
    assert encode_method(frame["method"], not_default) == payload
    assert encode_frame(1, frame["channel"], payload) == base64.b64decode(frame["bytes"])


@pytest.mark.parametrize(
    "frame", [one for one in FRAMES if one["kind"] == "header"], ids=lambda one: one["flags"]
)
def test_captured_content_header_is_read_and_written_byte_for_byte(frame):
    payload = payload_of(frame)
    size, properties, headers = header_of(frame)
    assert decode_header(payload) == (size, properties, headers or {})
    assert encode_header(size, properties, headers) == payload
    shuffled = dict(sorted(properties.items()))
    assert encode_header(size, {**shuffled, "cluster_id": None}, headers) == payload


def test_method_of_every_class_was_captured():
    captured = {frame["method"].split(".")[0] for frame in FRAMES if frame["kind"] == "method"}
    assert captured == {"connection", "channel", "exchange", "queue", "basic", "confirm"}
    assert captured | {"tx"} == {name.split(".")[0] for name in METHODS}


# -- field tables

#: (name, value, bytes of the field after its name): written and read.
FIELDS: List[Tuple[str, Any, bytes]] = [
    ("text", "grün", b"S\0\0\0\x05gr\xc3\xbcn"),
    ("empty text", "", b"S\0\0\0\0"),
    ("text of 511 bytes", "x" * 511, b"S\0\0\x01\xff" + b"x" * 511),
    ("text of 512 bytes", "x" * 512, b"S\0\0\x02\0" + b"x" * 512),
    ("text with half a character", "a\ud800", b"S\0\0\0\x04a\xed\xa0\x80"),
    ("bytes", b"\xff\0", b"S\0\0\0\x02\xff\0"),
    ("true", True, b"t\x01"),
    ("false", False, b"t\0"),
    ("nothing", None, b"V"),
    ("zero", 0, b"I\0\0\0\0"),
    ("least of 32 bits", -(2**31), b"I\x80\0\0\0"),
    ("greatest of 32 bits", 2**31 - 1, b"I\x7f\xff\xff\xff"),
    ("more than 32 bits", 2**31, b"L\0\0\0\0\x80\0\0\0"),
    ("less than 32 bits", -(2**31) - 1, b"L\xff\xff\xff\xff\x7f\xff\xff\xff"),
    ("greatest of 64 bits", 2**63 - 1, b"L\x7f" + b"\xff" * 7),
    ("least of 64 bits", -(2**63), b"L\x80" + b"\0" * 7),
    ("float", 1.5, b"d\x3f\xf8" + b"\0" * 6),
    ("infinity", math.inf, b"d\x7f\xf0" + b"\0" * 6),
    ("moment", D(2026, 11, 21, 6, 0, tzinfo=UTC), b"T" + struct.pack(">q", 1795240800)),
    ("moment before the epoch", D(1969, 12, 31, 23, 59, 59, tzinfo=UTC), b"T" + b"\xff" * 8),
    ("decimal", Decimal("10.500"), b"D\x03\0\0\x29\x04"),
    ("negative decimal", Decimal("-0.01"), b"D\x02\xff\xff\xff\xff"),
    ("decimal of 255 places", Decimal((0, (7,), -255)), b"D\xff\0\0\0\x07"),
    ("list", [1, "a", None], b"A\0\0\0\x0cI\0\0\0\x01S\0\0\0\x01aV"),
    ("empty list", [], b"A\0\0\0\0"),
    ("lists in a list", [[True], [[]]], b"A\0\0\0\x11A\0\0\0\x02t\x01A\0\0\0\x05A\0\0\0\0"),
    ("table", {"k": {"z": 1}}, b"F\0\0\0\x0e\x01kF\0\0\0\x07\x01zI\0\0\0\x01"),
    ("empty table", {}, b"F\0\0\0\0"),
    ("table in a list", [{"a": False}], b"A\0\0\0\x09F\0\0\0\x04\x01at\0"),
]  # fmt: skip

#: (name, bytes, value): read only, since others write it.
READ: List[Tuple[str, bytes, Any]] = [
    ("b", b"b\xff", -1),
    ("B", b"B\xff", 255),
    ("s", b"s\xff\xfe", -2),
    ("u", b"u\xff\xfe", 65534),
    ("i", b"i\xff\xff\xff\xff", 2**32 - 1),
    ("l", b"l" + b"\xff" * 8, -1),
    ("f", b"f\x3f\xc0\0\0", 1.5),
    ("x", b"x\0\0\0\x02ab", b"ab"),
    ("t that is not 1", b"t\x02", True),
    ("T of a peer's milliseconds", b"T" + struct.pack(">q", 1795240800000), 1795240800000),
    ("greatest T", b"T\x7f" + b"\xff" * 7, 2**63 - 1),
    ("S that is not UTF-8", b"S\0\0\0\x01\x80", b"\x80"),
]

#: (name, value, type of the error, part of its message): never written.
UNWRITABLE: List[Tuple[str, Any, type, str]] = [
    ("more than 64 bits", 2**63, ValueError, "more than 64 bits"),
    ("less than 64 bits", -(2**63) - 1, ValueError, "more than 64 bits"),
    ("decimal that is no number", Decimal("NaN"), ValueError, "32 bits and up to 255 places"),
    ("decimal of 33 bits", Decimal(2**31), ValueError, "32 bits and up to 255 places"),
    ("decimal of 256 places", Decimal((0, (7,), -256)), ValueError, "32 bits and up to 255 places"),
    ("decimal that is short to write", Decimal("1E+999999"), ValueError, "32 bits and up to 255 places"),
    ("set", {1}, TypeError, "type set has no type in AMQP"),
    ("difference of time", timedelta(1), TypeError, "type timedelta has no type in AMQP"),
    ("number as a name", {1: 2}, TypeError, "text is needed, not int"),
    ("long name", {"x" * 256: 2}, ValueError, "has 256 bytes, at most 255"),
]  # fmt: skip


def table_of(field: bytes) -> bytes:
    """Return the payload of a header with the one field ``a``."""
    table = b"\x01a" + field
    return struct.pack(">HHQHI", 60, 0, 0, 0x2000, len(table)) + table


def nested(depth: int, made: Any = dict) -> Any:
    value: Any = made()
    for _ in range(depth - 1):
        value = {"a": value} if made is dict else [value]
    return value


@pytest.mark.parametrize(("value", "field"), [row[1:] for row in FIELDS], ids=[row[0] for row in FIELDS])
def test_field_is_written_and_read(value, field):
    assert encode_table({"a": value}) == struct.pack(">I", len(field) + 2) + b"\x01a" + field
    assert encode_header(0, {}, {"a": value}) == table_of(field)
    _, _, headers = decode_header(table_of(field))
    assert headers == {"a": value}
    assert type(headers["a"]) is type(value)
    # The same inside of a list, where there is other code for it.
    _, _, headers = decode_header(table_of(b"A" + struct.pack(">I", len(field)) + field))
    assert headers == {"a": [value]}


@pytest.mark.parametrize(("field", "value"), [row[1:] for row in READ], ids=[row[0] for row in READ])
def test_field_that_others_write_is_read(field, value):
    assert decode_header(table_of(field)) == (0, {}, {"a": value})


class Color(str, enum.Enum):
    RED = "red"


def test_value_is_written_as_the_type_it_is_derived_from():
    odd = {
        "enum": Color.RED,
        "tuple": (1,),
        "naive": D(1970, 1, 1, 0, 0, 1, 999999),
        "power": Decimal("1E+3"),
    }
    _, _, headers = decode_header(encode_header(0, {}, odd))
    assert headers == {
        "enum": "red", "tuple": [1], "naive": D(1970, 1, 1, 0, 0, 1, tzinfo=UTC), "power": Decimal(1000),
    }  # fmt: skip


def test_not_a_number_is_read_back():
    _, _, headers = decode_header(encode_header(0, {}, {"a": math.nan}))
    assert math.isnan(headers["a"])


@pytest.mark.parametrize(
    ("value", "error", "text"), [row[1:] for row in UNWRITABLE], ids=[row[0] for row in UNWRITABLE]
)
def test_value_without_a_type_is_refused_by_the_name_of_its_field(value, error, text):
    for table in ({"good": 1, "wrong": value}, {"wrong": [value]}, {"outer": {"wrong": value}}):
        with pytest.raises(error, match="'wrong'") as caught:
            encode_table(table)
        assert text in str(caught.value)
        with pytest.raises(error, match="headers: .*'wrong'"):
            encode_header(0, {}, table)
        with pytest.raises(error, match="queue.declare: arguments=dict: .*'wrong'"):
            encode_method("queue.declare", {"arguments": table})


def test_name_of_255_bytes_is_written_and_read():
    table = {"é" * 127 + "x": 1, "": 2}
    assert decode_header(encode_header(0, {}, table))[2] == table


def test_names_that_are_not_text_leave_as_they_came():
    field = b"\x02\xff\xfeV"
    payload = struct.pack(">HHQHI", 60, 0, 0, 0x2000, len(field)) + field
    _, _, headers = decode_header(payload)
    assert headers == {"\udcff\udcfe": None}
    assert encode_header(0, {}, headers) == payload


@pytest.mark.parametrize("made", [dict, list])
def test_nesting_is_bounded_in_writing_and_stays_bytes_in_reading(made):
    deepest = {"a": nested(MAX_DEPTH, made)}
    assert decode_header(encode_header(0, {}, deepest))[2] == deepest
    with pytest.raises(ValueError, match="nested deeper than 32 levels"):
        encode_table({"a": nested(MAX_DEPTH + 1, made)})
    field = b"S\0\0\0\x01x"
    for _ in range(20_000):
        field = b"A" + struct.pack(">I", len(field)) + field
        if len(field) > 100_000:
            break
    _, _, headers = decode_header(table_of(field))
    value, depth = headers["a"], 0
    while isinstance(value, list):
        (value,), depth = value, depth + 1
    assert depth == MAX_DEPTH
    assert field.endswith(value)


def test_table_inside_of_itself_is_refused():
    table: Dict[str, Any] = {}
    table["again"] = table
    with pytest.raises(ValueError, match="nested deeper"):
        encode_table(table)


# -- methods


@pytest.mark.parametrize(
    ("name", "args", "error", "text"),
    [
        ("queue.delcare", {}, ValueError, "no method 'queue.delcare'"),
        ("queue.declare", {"durabel": True}, ValueError, "no argument 'durabel', it has: reserved1, queue,"),
        ("tx.select", {"nowait": True}, ValueError, "no argument 'nowait', it has: none"),
        ("queue.declare", {"queue": "x" * 256}, ValueError, "queue.declare: queue='xxx"),
        ("queue.declare", {"queue": b"x"}, TypeError, "queue=b'x': text is needed, not bytes"),
        ("queue.declare", {"queue": "\ud800"}, ValueError, "surrogates not allowed"),
        ("queue.declare", {"arguments": [1]}, TypeError, "arguments=list: a dict is needed"),
        ("basic.qos", {"prefetch_count": 65536}, ValueError, "prefetch_count=65536"),
        ("basic.qos", {"prefetch_count": -1}, ValueError, "prefetch_count=-1"),
        ("basic.qos", {"prefetch_count": "7"}, ValueError, "prefetch_count='7'"),
        ("basic.ack", {"delivery_tag": 2**64}, ValueError, "delivery_tag=1844"),
        ("connection.secure-ok", {"response": 5}, TypeError, "text or bytes are needed, not int"),
    ],
)
def test_method_that_cannot_be_written_is_refused_by_name(name, args, error, text):
    with pytest.raises(error) as caught:
        encode_method(name, args)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 250


def test_arguments_not_given_are_empty():
    for name, spec in METHODS.items():
        empty = {"s": "", "S": "", "F": {}, "b": False}
        assert decode_method(encode_method(name, {})) == (
            name,
            {argument: empty.get(kind, 0) for argument, kind in spec.arguments},
        )


def test_method_is_named_by_its_numbers():
    assert method_name(50, 10) == "queue.declare"
    assert method_name(0, 0) == ""
    assert method_name(60, 999) == "60.999"


def random_text(rng: random.Random, longest: int) -> str:
    return "".join(rng.choices("ab.é\udcff\x00", k=rng.randrange(longest)))


def random_value(rng: random.Random, depth: int) -> Any:
    """Return a value that comes back as it went."""
    kind = rng.randrange(11 if depth else 9)
    if kind < 2:
        return random_text(rng, 9).replace("\udcff", "")
    if kind == 2:
        return b"\xff" + rng.randbytes(rng.randrange(600))
    if kind == 3:
        return rng.choice((0, 1, -1, 2**31 - 1, 2**31, -(2**31), 10**12, -(2**63), 2**63 - 1))
    if kind == 4:
        return rng.choice((True, False, None))
    if kind == 5:
        return rng.choice((rng.random() * 10 ** rng.randrange(-20, 20), math.inf, -0.5))
    if kind == 6:
        return D(1900, 1, 1, tzinfo=UTC) + timedelta(seconds=rng.randrange(10**10))
    if kind == 7:
        return Decimal((rng.randrange(2), (rng.randrange(1, 10), rng.randrange(10)), -rng.randrange(256)))
    if kind == 8:
        return "x" * rng.choice((0, 1, 255, 256, 511, 512, 70_000))
    if kind == 9:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(5))]
    return random_table(rng, depth - 1)


def random_table(rng: random.Random, depth: int = 3) -> Dict[str, Any]:
    return {random_text(rng, 12): random_value(rng, depth) for _ in range(rng.randrange(6))}


def random_args(rng: random.Random, name: str) -> Dict[str, Any]:
    made = {
        "s": lambda: random_text(rng, 40),
        "S": lambda: random_text(rng, 300).replace("\udcff", ""),
        "F": lambda: random_table(rng),
        "b": lambda: rng.random() < 0.5,
        "o": lambda: rng.choice((0, 1, 255)),
        "h": lambda: rng.choice((0, 1, 65535)),
        "l": lambda: rng.choice((0, 1, 2**32 - 1)),
        "q": lambda: rng.choice((0, 1, 2**64 - 1)),
    }
    return {argument: made[kind]() for argument, kind in METHODS[name].arguments}


def random_properties(rng: random.Random) -> Dict[str, Any]:
    numbers = {"delivery_mode": 255, "priority": 255, "timestamp": 2**64 - 1}
    names = rng.sample(PROPERTY_NAMES, rng.randrange(len(PROPERTY_NAMES)))
    return {
        name: rng.choice((0, 1, numbers[name])) if name in numbers else random_text(rng, 60) for name in names
    }


def test_any_method_is_read_back():
    for seed in range(600):
        rng = random.Random(seed)
        name = rng.choice(list(METHODS))
        args = random_args(rng, name)
        assert decode_method(encode_method(name, args)) == (name, args), f"seed {seed}"


def test_any_content_header_is_read_back():
    for seed in range(600):
        rng = random.Random(seed)
        size, properties, headers = rng.randrange(2**64), random_properties(rng), random_table(rng)
        assert decode_header(encode_header(size, properties, headers)) == (size, properties, headers), (
            f"seed {seed}"
        )


# -- properties


@pytest.mark.parametrize(
    ("properties", "text"),
    [
        ({"content-type": "a"}, "no property 'content-type', it has: content_type,"),
        ({"headers": {}}, "no property 'headers'"),
        ({"priority": 256}, "priority=256: a number from 0 to 255"),
        ({"delivery_mode": "2"}, "delivery_mode='2': a number"),
        ({"expiration": 1000}, "expiration=1000: text of at most 255 bytes"),
        ({"type": b"a"}, "type=b'a': text"),
        ({"reply_to": "x" * 256}, "reply_to='xxx"),
        ({"correlation_id": "\ud800"}, "correlation_id="),
        ({"timestamp": -1}, "timestamp=-1: seconds since the epoch"),
        ({"timestamp": 1.5}, "timestamp=1.5: seconds"),
    ],
)
def test_property_that_cannot_be_written_is_refused_by_name(properties, text):
    for _ in range(2):  # the second time its layout may be known
        with pytest.raises(ValueError) as caught:
            encode_header(0, {"message_id": "m", **properties}, {})
        assert text in str(caught.value)
        assert len(str(caught.value)) < 300


def test_timestamp_may_be_a_moment_and_is_read_as_seconds():
    payload = encode_header(0, {"timestamp": D(2026, 11, 21, 6, 0, tzinfo=UTC)}, None)
    assert decode_header(payload) == (0, {"timestamp": 1795240800}, {})


def test_properties_that_are_none_and_headers_that_are_none_are_left_out():
    assert encode_header(7, {"priority": None, "type": None}, None) == struct.pack(">HHQH", 60, 0, 7, 0)


# -- garbage

#: (name, payload, part of the message).
GARBAGE: List[Tuple[str, bytes, str]] = [
    ("empty", b"", "does not have: b''"),
    ("half an id", b"\0\x32\0", "does not have"),
    ("unknown class", b"\0\x63\0\x0a", "does not have"),
    ("unknown method", b"\0\x32\0\x63", "does not have"),
    ("no arguments", b"\0\x32\0\x0b", "queue.declare-ok whose arguments"),
    ("text beyond the end", b"\0\x3c\0\x15\x05abcd", "basic.consume-ok whose"),
    ("more than its arguments", b"\0\x14\0\x29\0", "channel.close-ok whose"),
    ("number beyond the end", b"\0\x32\0\x1f\0\0\0", "queue.purge-ok whose"),
    ("bits beyond the end", b"\0\x14\0\x14", "channel.flow whose"),
    ("long string beyond the end", b"\0\x0a\0\x14\xff\xff\xff\xffabc", "connection.secure whose"),
    ("table beyond the end", b"\0\x0a\0\x0a\0\x09\xff\xff\xff\xffabc", "connection.start whose"),
]  # fmt: skip

#: (name, bytes of the table in the header, part of the message).
GARBAGE_TABLES: List[Tuple[str, bytes, str]] = [
    ("name beyond the end", b"\x05abc", "not as long"),
    ("field without a type", b"\x01a", "not as long"),
    ("unknown type", b"\x01aZ", "unknown type b'Z'"),
    ("no flag", b"\x01at", "not as long"),
    ("half a number", b"\x01aI\0\0\0", "not as long"),
    ("half a size", b"\x01aS\0\0\0", "not as long"),
    ("text beyond the end", b"\x01aS\0\0\0\x03ab", "not as long"),
    ("text of 4 GB", b"\x01aS\xff\xff\xff\xffab", "not as long"),
    ("bytes of 4 GB", b"\x01ax\xff\xff\xff\xffab", "not as long"),
    ("list of 4 GB", b"\x01aA\xff\xff\xff\xffVV", "not as long"),
    ("table of 4 GB", b"\x01aF\xff\xff\xff\xff\x01bV", "not as long"),
    ("value over the end of its table", b"\x01aF\0\0\0\x04\x01bI\0\0\0\x01", "not as long"),
    ("text over the end of its table", b"\x01aF\0\0\0\x08\x01bS\0\0\0\x09xxxxxxxxxx", "not as long"),
    ("value over the end of its list", b"\x01aA\0\0\0\x02I\0\0\0\x01", "not as long"),
    ("half a decimal", b"\x01aD\x02\0\0", "not as long"),
    ("half a moment", b"\x01aT\0\0\0\0", "not as long"),
]  # fmt: skip


@pytest.mark.parametrize(("payload", "text"), [row[1:] for row in GARBAGE], ids=[row[0] for row in GARBAGE])
def test_garbage_instead_of_a_method_is_a_protocol_error(payload, text):
    with pytest.raises(ProtocolError) as caught:
        decode_method(payload)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("table", "text"), [row[1:] for row in GARBAGE_TABLES], ids=[row[0] for row in GARBAGE_TABLES]
)
def test_garbage_instead_of_a_table_is_a_protocol_error(table, text):
    header = struct.pack(">HHQHI", 60, 0, 0, 0x2000, len(table)) + table
    method = b"\0\x0a\0\x0a\0\x09" + struct.pack(">I", len(table)) + table + b"\0" * 8
    with pytest.raises(ProtocolError) as caught:
        decode_header(header)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 350
    with pytest.raises(ProtocolError):
        decode_method(method)


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"", "not as long"),
        (struct.pack(">HHQ", 60, 0, 0), "not as long"),
        (struct.pack(">HHQH", 50, 0, 0, 0), "class 50"),
        (struct.pack(">HHQH", 60, 1, 0, 0), "weight 1"),
        (struct.pack(">HHQH", 60, 0, 0, 1), "flags that AMQP 0-9-1 does not have: 0x0001"),
        (struct.pack(">HHQH", 60, 0, 0, 0x8002), "0x8002"),
        (struct.pack(">HHQH", 60, 0, 0, 0x8000), "not as long"),
        (struct.pack(">HHQH", 60, 0, 0, 0x1000), "not as long"),
        (struct.pack(">HHQHI", 60, 0, 0, 0x0040, 0), "not as long"),
        (struct.pack(">HHQHI", 60, 0, 0, 0x2000, 1), "not as long"),
        (struct.pack(">HHQHB", 60, 0, 0, 0, 0), "not as long"),
    ],
)
def test_garbage_instead_of_a_content_header_is_a_protocol_error(payload, text):
    with pytest.raises(ProtocolError, match=text):
        decode_header(payload)


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed))
        how = rng.randrange(4)
        if how == 0:
            changed[at] = rng.choice((rng.randrange(256), changed[at] ^ 1, 0, 255, *b"SIAFTVx"))
        elif how == 1:
            del changed[at : at + rng.randrange(1, 5)]
            changed += b"\x00"  # never empty
        elif how == 2:
            changed[at:at] = changed[at : at + rng.randrange(1, 12)]
        else:
            changed[at : at + 4] = struct.pack(">I", rng.choice((2**32 - 1, 2**31, 70_000, len(changed))))
    return bytes(changed)


def test_mutated_payloads_are_read_or_a_protocol_error():
    outcomes = {True: 0, False: 0}
    for seed in range(6000):
        rng = random.Random(seed)
        if rng.random() < 0.5:
            name = rng.choice(("queue.declare", "connection.start", "basic.deliver", "connection.close"))
            data, decode = encode_method(name, random_args(rng, name)), decode_method
        else:
            data, decode = encode_header(5, random_properties(rng), random_table(rng)), decode_header  # type: ignore[assignment]
        sent = mutated(data, rng)
        try:
            decode(sent)
            outcomes[True] += 1
        except ProtocolError:
            outcomes[False] += 1
        except Exception as error:
            pytest.fail(f"seed {seed}: {error!r} for {sent[:200]!r}")
    assert min(outcomes.values()) > 500


def test_random_bytes_are_a_protocol_error_and_no_large_allocation():
    tracemalloc.start()
    try:
        for seed in range(2000):
            rng = random.Random(seed)
            data = rng.randbytes(rng.randrange(200))
            for decode, begin in ((decode_method, b"\0\x0a\0\x0a\0\x09"), (decode_header, b"\0\x3c\0\0")):
                with pytest.raises(ProtocolError):
                    decode(begin + data)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 1_000_000


def test_names_and_layouts_remembered_are_bounded():
    for number in range(3000):
        encode_table({f"name {number}": 1})
    for flags in range(0, 1 << 16, 4):
        try:
            decode_header(struct.pack(">HHQH", 60, 0, 0, flags))
        except ProtocolError:
            pass
    for seed in range(3000):
        encode_header(0, dict.fromkeys(random_properties(random.Random(seed))), None)
    for remembered in (amqp_wire._ENCODED_NAMES, amqp_wire._LAYOUTS, amqp_wire._LAYOUTS_BY_FLAGS):
        assert 256 < len(remembered) <= 1024

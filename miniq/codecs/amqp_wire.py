# SPDX-License-Identifier: MIT
"""What AMQP 0-9-1 consists of on the wire: frames, methods, content headers, field tables.

::

    frame    type (1 octet: 1 method, 2 header, 3 body, 8 heartbeat), channel (2), size (4), payload, 0xCE
    method   class id (2), method id (2), arguments; bits in a row share octets, the first is the lowest
    header   class id (2), weight 0 (2), size of the body (8), property flags (2), properties
    table    size (4), then for each field: name (short string), type (1 octet), value
    strings  short: size (1) and text, long: size (4) and anything

Strategy: the methods are data, read by one encoder and one decoder.  A decoder gets a payload that
is complete and reads without looking back; whatever claims more than there is runs over the end,
and that is noticed at the latest when the positions are compared.  Nothing is set aside for a
length that was only claimed.

Source: the AMQP 0-9-1 specification and RabbitMQ's list of what it does differently (types of
fields, added methods).  Which type a Python value gets is what Celery's client does.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from decimal import Decimal
from struct import Struct
from struct import error as StructError
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

#: What the client says first: the protocol and its version.
PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"

FRAME_METHOD, FRAME_HEADER, FRAME_BODY, FRAME_HEARTBEAT = 1, 2, 3, 8
FRAME_END = b"\xce"
#: Type, channel and size before the payload of a frame, and its end: octets that are no payload.
FRAME_OVERHEAD_BYTES = 8
#: Smallest frame_max that may be agreed on (AMQP 0-9-1 4.2.3).
FRAME_MIN_BYTES = 4096

#: As deep may tables and lists be inside of each other.  RabbitMQ knows no limit.
MAX_DEPTH = 32
MAX_SHORT_BYTES = 255
#: As many names, layouts and keys are remembered, so that no peer can fill the memory with them.
_MAX_REMEMBERED = 1024

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_BASIC = 60

_FRAME = Struct(">BHI")
_OCTET, _SHORT, _LONG, _LONGLONG = Struct(">B"), Struct(">H"), Struct(">I"), Struct(">Q")
_CONTENT = Struct(">HHQH")

pack_frame = _FRAME.pack
unpack_frame = _FRAME.unpack_from
_long_at = _LONG.unpack_from
_content_at = _CONTENT.unpack_from

#: What reading past the end of a payload raises.
OVERRUN = (IndexError, StructError)


class ProtocolError(Exception):
    """The peer sent what is not AMQP 0-9-1, or not at this point: the connection is of no more use."""


# -- methods -------------------------------------------------------------------------------------

#: Class, id, method, who sends it (S the server, C the client, B both), arguments with their types:
#: o octet, h short, l long, q long long, s short string, S long string, F table, b bit.
_METHODS = """
connection 10  10 start            S  version_major:o version_minor:o server_properties:F mechanisms:S locales:S
connection 10  11 start-ok         C  client_properties:F mechanism:s response:S locale:s
connection 10  20 secure           S  challenge:S
connection 10  21 secure-ok        C  response:S
connection 10  30 tune             S  channel_max:h frame_max:l heartbeat:h
connection 10  31 tune-ok          C  channel_max:h frame_max:l heartbeat:h
connection 10  40 open             C  vhost:s reserved1:s reserved2:b
connection 10  41 open-ok          S  reserved1:s
connection 10  50 close            B  reply_code:h reply_text:s class_id:h method_id:h
connection 10  51 close-ok         B
connection 10  60 blocked          S  reason:s
connection 10  61 unblocked        S
connection 10  70 update-secret    C  new_secret:S reason:s
connection 10  71 update-secret-ok S
channel    20  10 open             C  reserved1:s
channel    20  11 open-ok          S  reserved1:S
channel    20  20 flow             B  active:b
channel    20  21 flow-ok          B  active:b
channel    20  40 close            B  reply_code:h reply_text:s class_id:h method_id:h
channel    20  41 close-ok         B
exchange   40  10 declare          C  reserved1:h exchange:s type:s passive:b durable:b auto_delete:b internal:b nowait:b arguments:F
exchange   40  11 declare-ok       S
exchange   40  20 delete           C  reserved1:h exchange:s if_unused:b nowait:b
exchange   40  21 delete-ok        S
exchange   40  30 bind             C  reserved1:h destination:s source:s routing_key:s nowait:b arguments:F
exchange   40  31 bind-ok          S
exchange   40  40 unbind           C  reserved1:h destination:s source:s routing_key:s nowait:b arguments:F
exchange   40  51 unbind-ok        S
queue      50  10 declare          C  reserved1:h queue:s passive:b durable:b exclusive:b auto_delete:b nowait:b arguments:F
queue      50  11 declare-ok       S  queue:s message_count:l consumer_count:l
queue      50  20 bind             C  reserved1:h queue:s exchange:s routing_key:s nowait:b arguments:F
queue      50  21 bind-ok          S
queue      50  30 purge            C  reserved1:h queue:s nowait:b
queue      50  31 purge-ok         S  message_count:l
queue      50  40 delete           C  reserved1:h queue:s if_unused:b if_empty:b nowait:b
queue      50  41 delete-ok        S  message_count:l
queue      50  50 unbind           C  reserved1:h queue:s exchange:s routing_key:s arguments:F
queue      50  51 unbind-ok        S
basic      60  10 qos              C  prefetch_size:l prefetch_count:h global:b
basic      60  11 qos-ok           S
basic      60  20 consume          C  reserved1:h queue:s consumer_tag:s no_local:b no_ack:b exclusive:b nowait:b arguments:F
basic      60  21 consume-ok       S  consumer_tag:s
basic      60  30 cancel           B  consumer_tag:s nowait:b
basic      60  31 cancel-ok        B  consumer_tag:s
basic      60  40 publish          C  reserved1:h exchange:s routing_key:s mandatory:b immediate:b
basic      60  50 return           S  reply_code:h reply_text:s exchange:s routing_key:s
basic      60  60 deliver          S  consumer_tag:s delivery_tag:q redelivered:b exchange:s routing_key:s
basic      60  70 get              C  reserved1:h queue:s no_ack:b
basic      60  71 get-ok           S  delivery_tag:q redelivered:b exchange:s routing_key:s message_count:l
basic      60  72 get-empty        S  reserved1:s
basic      60  80 ack              B  delivery_tag:q multiple:b
basic      60  90 reject           C  delivery_tag:q requeue:b
basic      60 100 recover-async    C  requeue:b
basic      60 110 recover          C  requeue:b
basic      60 111 recover-ok       S
basic      60 120 nack             B  delivery_tag:q multiple:b requeue:b
confirm    85  10 select           C  nowait:b
confirm    85  11 select-ok        S
tx         90  10 select           C
tx         90  11 select-ok        S
tx         90  20 commit           C
tx         90  21 commit-ok        S
tx         90  30 rollback         C
tx         90  31 rollback-ok      S
"""  # noqa: E501 (a table: one method, one line)


class MethodSpec(NamedTuple):
    """A method: how it begins on the wire, its arguments as (name, type), who may send it."""

    name: str
    ids: Tuple[int, int]
    begin: bytes
    arguments: Tuple[Tuple[str, str], ...]
    by_server: bool
    by_client: bool
    #: Name of the method that answers it, "" if none does.
    reply: str


def _read_methods() -> Dict[str, MethodSpec]:
    rows = [line.split() for line in _METHODS.strip().splitlines()]
    names = {f"{row[0]}.{row[3]}" for row in rows}
    found = {}
    for family, class_id, method_id, method, sender, *arguments in rows:
        name = f"{family}.{method}"
        ids = int(class_id), int(method_id)
        pairs = tuple((one[:-2], one[-1]) for one in arguments)
        reply = name + "-ok" if name + "-ok" in names else ""
        found[name] = MethodSpec(
            name, ids, Struct(">HH").pack(*ids), pairs, sender in "SB", sender in "CB", reply
        )
    return found


METHODS: Dict[str, MethodSpec] = _read_methods()
_BY_BEGIN: Dict[bytes, MethodSpec] = {spec.begin: spec for spec in METHODS.values()}
_BY_IDS: Dict[Tuple[int, int], str] = {spec.ids: spec.name for spec in METHODS.values()}
_INTEGERS = {"o": _OCTET, "h": _SHORT, "l": _LONG, "q": _LONGLONG}


def method_spec(name: str) -> MethodSpec:
    """Return what is known of a method.  ValueError if there is none of that name."""
    spec = METHODS.get(name)
    if spec is None:
        raise ValueError(f"AMQP 0-9-1 has no method {name[:80]!r}")
    return spec


def method_name(class_id: int, method_id: int) -> str:
    """Return the name of a method; "" for 0, 0 and the numbers for one that is unknown."""
    if not class_id and not method_id:
        return ""
    return _BY_IDS.get((class_id, method_id)) or f"{class_id}.{method_id}"


def encode_method(name: str, args: Mapping[str, Any]) -> bytes:
    """Return the payload of a method frame.  Arguments not given are False, 0, "" or an empty table.

    Raises ValueError for an unknown method, an unknown argument or a value that does not fit,
    TypeError for one of a wrong type.
    """
    spec = method_spec(name)
    parts = [spec.begin]
    bits = used = found = 0
    for argument, kind in spec.arguments:
        value = args.get(argument)
        if argument in args:
            found += 1
        if kind == "b":
            if value:
                bits |= 1 << used
            used += 1  # no method has more than eight bits in a row
            continue
        if used:
            parts.append(_OCTET.pack(bits))
            bits = used = 0
        try:
            if kind == "s":
                parts.append(encode_short(value or ""))
            elif kind == "S":
                parts.append(_encode_long(value or b""))
            elif kind == "F":
                parts.append(encode_table(value or {}))
            else:
                parts.append(_INTEGERS[kind].pack(value or 0))
        except (ValueError, TypeError, StructError) as error:
            raise _named(f"{name}: {argument}={_shown(value)}", error) from error
    if used:
        parts.append(_OCTET.pack(bits))
    if found != len(args):
        known = [argument for argument, _ in spec.arguments]
        unknown = next(argument for argument in args if argument not in known)
        raise ValueError(f"{name} has no argument {unknown!r}, it has: {', '.join(known) or 'none'}")
    return b"".join(parts)


def decode_method(payload: bytes) -> Tuple[str, Dict[str, Any]]:
    """Return name and arguments of the method in a frame's payload.  Raises ProtocolError."""
    spec = _BY_BEGIN.get(payload[:4])
    if spec is None:
        raise ProtocolError(f"a method that AMQP 0-9-1 does not have: {payload[:4]!r}")
    args: Dict[str, Any] = {}
    at, bit = 4, 8
    size = len(payload)
    try:
        for argument, kind in spec.arguments:
            if kind == "b":
                if bit == 8:
                    bits, bit, at = payload[at], 0, at + 1
                args[argument] = bool(bits >> bit & 1)
                bit += 1
                continue
            bit = 8
            if kind == "s":
                start = at + 1
                at = start + payload[at]
                args[argument] = text_of(payload[start:at])
            elif kind == "S":
                start = at + 4
                at = start + _long_at(payload, at)[0]
                args[argument] = _string_of(payload[start:at])
            elif kind == "F":
                start = at + 4
                at = start + _long_at(payload, at)[0]
                if at <= size:
                    args[argument] = _read_table(payload, start, at, MAX_DEPTH)
            else:
                number = _INTEGERS[kind]
                args[argument] = number.unpack_from(payload, at)[0]
                at += number.size
    except OVERRUN:
        at = size + 1
    if at != size:
        raise ProtocolError(f"{spec.name} whose arguments are not as long as its frame: {payload[:40]!r}")
    return spec.name, args


# -- strings -------------------------------------------------------------------------------------


def encode_short(text: str) -> bytes:
    """Return a short string with its size.  ValueError above 255 bytes, TypeError if not text."""
    if not isinstance(text, str):
        raise TypeError(f"text is needed, not {type(text).__name__}")
    # What is not UTF-8 came from a peer as surrogates (see `text_of`), and leaves as it came.
    raw = text.encode("utf-8", "surrogateescape")
    if len(raw) > MAX_SHORT_BYTES:
        raise ValueError(f"{text[:40]!r}... has {len(raw)} bytes, at most {MAX_SHORT_BYTES} are possible")
    return _OCTET.pack(len(raw)) + raw


def text_of(raw: bytes) -> str:
    """Return the text of a short string.  Any client may have written it: no byte makes it unreadable."""
    return raw.decode("utf-8", "surrogateescape")


def _encode_long(value: Union[str, bytes]) -> bytes:
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    if not isinstance(value, bytes):
        raise TypeError(f"text or bytes are needed, not {type(value).__name__}")
    return _LONG.pack(len(value)) + value


def _string_of(raw: bytes) -> Any:
    """Return the value of a long string: text if it is UTF-8, else the bytes."""
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return raw


def _named(what: str, error: Exception) -> Exception:
    """Return the error to raise instead, which says what it is about."""
    return (TypeError if isinstance(error, TypeError) else ValueError)(f"{what}: {error}")


def _shown(value: Any) -> str:
    shown = repr(value) if isinstance(value, (str, bytes, int, float)) else type(value).__name__
    return shown if len(shown) <= 80 else shown[:77] + "..."


# -- field tables --------------------------------------------------------------------------------

#: Names as they begin a field.
_ENCODED_NAMES: Dict[str, bytes] = {}

#: Types that are a number.
_NUMBERS: Dict[int, Struct] = {ord(tag): Struct(">" + code) for tag, code in zip("bBsuIilLfd", "bBhHiIqqfd")}
_TRUE, _FALSE, _NONE = b"t\x01", b"t\x00", b"V"
_TAG_S, _TAG_I, _TAG_V, _TAG_T, _TAG_A, _TAG_F, _TAG_D, _TAG_X, _TAG_BOOL = b"SIVTAFDxt"
_pack_sized = Struct(">cI").pack
_pack_int = Struct(">ci").pack
_pack_long = Struct(">cq").pack
_pack_double = Struct(">cd").pack
_pack_decimal = Struct(">cBi").pack
_decimal_at = Struct(">Bi").unpack_from
_int_at = Struct(">i").unpack_from
_second_at = Struct(">q").unpack_from
#: Beginnings of the usual long strings.
_SIZED = [_pack_sized(b"S", size) for size in range(512)]


def encode_table(table: Dict[str, Any]) -> bytes:
    """Return a field table with its size.

    str and bytes become long strings, bool, None, float, datetime (seconds), Decimal what they are,
    int the type for 32 bits if that is enough, else that for 64, list and tuple an array, dict a
    table.  Raises TypeError for other values and ValueError for those that do not fit, both naming
    the field.
    """
    if not isinstance(table, dict):
        raise TypeError(f"a dict is needed, not {type(table).__name__}")
    parts: List[bytes] = []
    _write_table(table, parts, MAX_DEPTH)
    raw = b"".join(parts)
    return _LONG.pack(len(raw)) + raw


def _write_table(table: Dict[str, Any], parts: List[bytes], depth: int) -> None:
    names = _ENCODED_NAMES
    for name, value in table.items():
        encoded = names.get(name)
        if encoded is None:
            encoded = _encode_name(name)
        if value is None:
            parts += encoded, _NONE
        elif type(value) is str:
            raw = value.encode("utf-8", "surrogatepass")
            size = len(raw)
            parts += encoded, _SIZED[size] if size < 512 else _pack_sized(b"S", size), raw
        elif value is True:
            parts += encoded, _TRUE
        elif value is False:
            parts += encoded, _FALSE
        else:
            parts.append(encoded)
            try:
                _write_value(value, parts, depth)
            except (ValueError, TypeError) as error:
                raise _named(repr(name[:80]), error) from error


def _encode_name(name: str) -> bytes:
    encoded = encode_short(name)
    if len(_ENCODED_NAMES) < _MAX_REMEMBERED:
        _ENCODED_NAMES[name] = encoded
    return encoded


def _write_value(value: Any, parts: List[bytes], depth: int) -> None:
    if value is None:
        parts.append(_NONE)
    elif value is True or value is False:
        parts.append(_TRUE if value else _FALSE)
    elif isinstance(value, int):
        if -0x80000000 <= value < 0x80000000:
            parts.append(_pack_int(b"I", value))
        elif -(1 << 63) <= value < 1 << 63:
            parts.append(_pack_long(b"L", value))
        else:
            raise ValueError("an integer of more than 64 bits")
    elif isinstance(value, (str, bytes)):
        parts += b"S", _encode_long(value)
    elif isinstance(value, float):
        parts.append(_pack_double(b"d", value))
    elif isinstance(value, (dict, list, tuple)):
        if not depth:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        inside: List[bytes] = []
        if isinstance(value, dict):
            _write_table(value, inside, depth - 1)
        else:
            for item in value:
                _write_value(item, inside, depth - 1)
        raw = b"".join(inside)
        parts += _pack_sized(b"F" if isinstance(value, dict) else b"A", len(raw)), raw
    elif isinstance(value, datetime):
        parts.append(_pack_long(b"T", seconds_of(value)))
    elif isinstance(value, Decimal):
        parts.append(_encode_decimal(value))
    else:
        raise TypeError(f"a value of type {type(value).__name__} has no type in AMQP: convert it first")


def seconds_of(moment: datetime) -> int:
    """Return the whole seconds since the epoch; a moment without a zone is taken as UTC."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return (moment - _EPOCH) // timedelta(seconds=1)


def _encode_decimal(value: Decimal) -> bytes:
    sign, digits, exponent = value.as_tuple()
    # Checked before it is made of digits: 1E+999999 is short to write.
    if isinstance(exponent, int) and -256 < exponent < 11 and len(digits) < 20:
        number = int("".join(map(str, digits)) or "0") * 10 ** max(exponent, 0)
        if number < 0x80000000:
            return _pack_decimal(b"D", max(-exponent, 0), -number if sign else number)
    raise ValueError("a decimal that is not 32 bits and up to 255 places")


def _read_table(data: bytes, at: int, end: int, depth: int) -> Dict[str, Any]:
    """Return the fields between two positions of `data`, of which `end` is not beyond its end.

    Raises IndexError where the last one runs over that, as reading past the end of `data` does.
    """
    table: Dict[str, Any] = {}
    value: Any
    while at < end:
        start = at + 1
        at = start + data[at]
        name = data[start:at].decode("utf-8", "surrogateescape")
        tag = data[at]
        if tag == _TAG_S:
            start = at + 5
            at = start + _long_at(data, at + 1)[0]
            raw = data[start:at]
            try:
                value = raw.decode()
            except UnicodeDecodeError:
                value = _string_of(raw)
        elif tag == _TAG_V:
            value = None
            at += 1
        elif tag == _TAG_BOOL:
            value = data[at + 1] != 0
            at += 2
        elif tag == _TAG_I:
            value = _int_at(data, at + 1)[0]
            at += 5
        else:
            value, at = _read_value(data, at, end, depth)
        table[name] = value
    if at != end:
        raise IndexError
    return table


def _read_value(data: bytes, at: int, end: int, depth: int) -> Tuple[Any, int]:
    """Return the value whose type is at a position, and where it ends."""
    tag = data[at]
    at += 1
    number = _NUMBERS.get(tag)
    if number is not None:
        return number.unpack_from(data, at)[0], at + number.size
    if tag == _TAG_V:
        return None, at
    if tag == _TAG_BOOL:
        return data[at] != 0, at + 1
    if tag == _TAG_T:
        return _moment_of(_second_at(data, at)[0]), at + 8
    if tag == _TAG_D:
        places, digits = _decimal_at(data, at)
        return Decimal((int(digits < 0), tuple(map(int, str(abs(digits)))), -places)), at + 5
    if tag not in b"SxAF":
        raise ProtocolError(f"a field of the unknown type {bytes((tag,))!r}")
    start = at + 4
    stop = start + _long_at(data, at)[0]
    if stop > end:
        raise IndexError
    if tag == _TAG_S:
        return _string_of(data[start:stop]), stop
    # What is nested too deep stays bytes: one message like this must not end every connection it
    # is delivered on.
    if tag == _TAG_X or not depth:
        return data[start:stop], stop
    if tag == _TAG_F:
        return _read_table(data, start, stop, depth - 1), stop
    items = []
    while start < stop:
        item, start = _read_value(data, start, stop, depth - 1)
        items.append(item)
    if start != stop:
        raise IndexError
    return items, stop


def _moment_of(seconds: int) -> Any:
    """Return a moment in UTC, or the number where there is no such date (as of a peer's milliseconds)."""
    try:
        return _EPOCH + timedelta(seconds=seconds)
    except OverflowError:
        return seconds


# -- content headers -----------------------------------------------------------------------------

#: (name, type) by flag, from bit 15 down; headers (F) are handed out apart.
_PROPERTIES: Tuple[Tuple[str, str], ...] = (
    ("content_type", "s"), ("content_encoding", "s"), ("headers", "F"), ("delivery_mode", "o"),
    ("priority", "o"), ("correlation_id", "s"), ("reply_to", "s"), ("expiration", "s"),
    ("message_id", "s"), ("timestamp", "q"), ("type", "s"), ("user_id", "s"), ("app_id", "s"),
    ("cluster_id", "s"),
)  # fmt: skip
PROPERTY_NAMES = tuple(name for name, _ in _PROPERTIES if name != "headers")
_FLAGS: Dict[str, int] = {name: 1 << (15 - place) for place, (name, _) in enumerate(_PROPERTIES)}
_HEADERS_FLAG = _FLAGS["headers"]

_Layout = Tuple[int, Tuple[Tuple[str, str], ...]]
#: By the names given, in their order, and by the flags that came: flags, and what follows them.
_LAYOUTS: Dict[Tuple[str, ...], _Layout] = {}
_LAYOUTS_BY_FLAGS: Dict[int, _Layout] = {}


def _layout_of(flags: int) -> _Layout:
    layout = _LAYOUTS_BY_FLAGS.get(flags)
    if layout is None:
        if flags & 3:
            raise ProtocolError(f"property flags that AMQP 0-9-1 does not have: {flags:#06x}")
        layout = flags, tuple(pair for pair in _PROPERTIES if flags & _FLAGS[pair[0]])
        if len(_LAYOUTS_BY_FLAGS) < _MAX_REMEMBERED:
            _LAYOUTS_BY_FLAGS[flags] = layout
    return layout


def _layout_for(names: Tuple[str, ...]) -> _Layout:
    flags = _HEADERS_FLAG
    for name in names:
        if name not in PROPERTY_NAMES:
            raise ValueError(f"AMQP has no property {name!r}, it has: {', '.join(PROPERTY_NAMES)}")
        flags |= _FLAGS[name]
    layout = _layout_of(flags)
    if len(_LAYOUTS) < _MAX_REMEMBERED:
        _LAYOUTS[names] = layout
    return layout


def encode_header(body_bytes: int, properties: Dict[str, Any], headers: Optional[Dict[str, Any]]) -> bytes:
    """Return the payload of a content header: size of the body, properties, headers.

    What is None is left out, a property or the headers; the latter may be an empty table, as Celery's.
    `timestamp` is seconds since the epoch or a datetime.  Raises ValueError and TypeError as
    `encode_method` does, naming the property or header.
    """
    names = tuple(properties)
    layout = _LAYOUTS.get(names) or _layout_for(names)
    parts = [b""]
    flags, fields = layout
    for name, kind in fields:
        if kind == "F":
            if headers is None:
                flags ^= _HEADERS_FLAG
                continue
            try:
                parts.append(encode_table(headers))
            except (ValueError, TypeError) as error:
                raise _named("headers", error) from error
            continue
        value = properties[name]
        if value is None:
            flags ^= _FLAGS[name]
            continue
        try:
            if kind == "s":
                raw = value.encode("utf-8", "surrogateescape")
                parts += _OCTET.pack(len(raw)), raw
            elif kind == "o":
                parts.append(_OCTET.pack(value))
            else:
                parts.append(_LONGLONG.pack(seconds_of(value) if isinstance(value, datetime) else value))
        except (ValueError, AttributeError, StructError) as error:
            raise _refused_property(name, kind, value) from error
    parts[0] = _CONTENT.pack(_BASIC, 0, body_bytes, flags)
    return b"".join(parts)


def _refused_property(name: str, kind: str, value: Any) -> ValueError:
    wanted = {"s": f"text of at most {MAX_SHORT_BYTES} bytes", "o": "a number from 0 to 255"}
    needed = wanted.get(kind, "seconds since the epoch")
    return ValueError(f"property {name}={_shown(value)}: {needed} is needed")


def decode_header(payload: bytes) -> Tuple[int, Dict[str, Any], Dict[str, Any]]:
    """Return size of the body, properties and headers of a content header.  Raises ProtocolError."""
    properties: Dict[str, Any] = {}
    headers: Dict[str, Any] = {}
    size = len(payload)
    try:
        class_id, weight, body_bytes, flags = _content_at(payload, 0)
        if class_id != _BASIC or weight:
            raise ProtocolError(f"a content header of class {class_id} and weight {weight}, not 60 and 0")
        layout = _LAYOUTS_BY_FLAGS.get(flags) or _layout_of(flags)
        at = 14
        for name, kind in layout[1]:
            if kind == "s":
                start = at + 1
                at = start + payload[at]
                properties[name] = payload[start:at].decode("utf-8", "surrogateescape")
            elif kind == "F":
                start = at + 4
                at = start + _long_at(payload, at)[0]
                if at > size:
                    break
                headers = _read_table(payload, start, at, MAX_DEPTH)
            elif kind == "o":
                properties[name] = payload[at]
                at += 1
            else:
                properties[name] = _LONGLONG.unpack_from(payload, at)[0]
                at += 8
    except OVERRUN:
        at = size + 1
    if at != size:
        raise ProtocolError(f"a content header whose parts are not as long as its frame: {payload[:40]!r}")
    return body_bytes, properties, headers


# -- frames --------------------------------------------------------------------------------------


def encode_frame(kind: int, channel: int, payload: bytes) -> bytes:
    """Return a whole frame."""
    return pack_frame(kind, channel, len(payload)) + payload + FRAME_END

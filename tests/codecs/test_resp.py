# SPDX-License-Identifier: MIT
"""RESP2 and RESP3: vectors read three ways, garbage, bounds, and commands read back."""

from __future__ import annotations

import enum
import math
import pickle
import random
import tracemalloc
from typing import Any, Iterator, List, Optional, Tuple

import pytest

from miniq.codecs.resp import (
    MAX_LINE_BYTES,
    NEED_DATA,
    Parser,
    ProtocolError,
    Push,
    ReplyError,
    encode,
    encode_many,
)

#: (name, bytes, reply).  Those with a star are what Redis 7.0 sent.
VECTORS: List[Tuple[str, bytes, Any]] = [
    # one line
    ("ok", b"+OK\r\n", b"OK"),
    ("status", b"+PONG\r\n", b"PONG"),
    ("empty status", b"+\r\n", b""),
    ("status that is not utf-8", b"+\xff\xfe\r\n", b"\xff\xfe"),
    ("longest status", b"+" + b"x" * MAX_LINE_BYTES + b"\r\n", b"x" * MAX_LINE_BYTES),
    ("error", b"-ERR unknown\r\n", ReplyError("ERR unknown")),
    ("error that is one word", b"-LOADING\r\n", ReplyError("LOADING")),
    ("empty error", b"-\r\n", ReplyError("")),
    ("error that is not utf-8", b"-ERR \xff\r\n", ReplyError("ERR \\xff")),
    ("zero", b":0\r\n", 0),
    ("small integer", b":511\r\n", 511),
    ("integer", b":512\r\n", 512),
    ("integer with minus", b":-1\r\n", -1),
    ("integer with plus", b":+7\r\n", 7),
    ("greatest integer", b":9223372036854775807\r\n", 2**63 - 1),
    ("least integer", b":-9223372036854775808\r\n", -(2**63)),
    ("null", b"_\r\n", None),
    ("true", b"#t\r\n", True),
    ("false", b"#f\r\n", False),
    ("double", b",3.141\r\n", 3.141),
    ("double without fraction", b",10\r\n", 10.0),
    ("double with exponent", b",1e+22\r\n", 1e22),
    ("double with all parts", b",-1.5E-3\r\n", -0.0015),
    ("infinity", b",inf\r\n", math.inf),
    ("minus infinity", b",-inf\r\n", -math.inf),
    ("not a number", b",nan\r\n", math.nan),
    ("not a number, as libc writes it", b",-nan\r\n", math.nan),
    ("big number", b"(1234567999999999999999999999999999999\r\n", 1234567999999999999999999999999999999),
    ("negative big number", b"(-3492890328409238509324850943850943825024385\r\n",
     -3492890328409238509324850943850943825024385),
    ("longest big number", b"(" + b"9" * 640 + b"\r\n", int("9" * 640)),
    # with a length
    ("bulk", b"$5\r\nhello\r\n", b"hello"),
    ("empty bulk", b"$0\r\n\r\n", b""),
    ("null bulk", b"$-1\r\n", None),
    ("bulk of line ends", b"$6\r\n\r\n\r\n\r\n\r\n", b"\r\n\r\n\r\n"),
    ("bulk that looks like replies", b"$10\r\n$-1\r\n:1\r\n\n\r\n", b"$-1\r\n:1\r\n\n"),
    ("bulk of all bytes", b"$256\r\n" + bytes(range(256)) + b"\r\n", bytes(range(256))),
    ("bulk of 600 bytes", b"$600\r\n" + b"x" * 600 + b"\r\n", b"x" * 600),
    ("blob error", b"!21\r\nSYNTAX invalid syntax\r\n", ReplyError("SYNTAX invalid syntax")),
    ("blob error of two lines", b"!6\r\nE a\r\nb\r\n", ReplyError("E a\r\nb")),
    ("verbatim *", b"=29\r\ntxt:This is a verbatim\nstring\r\n", b"This is a verbatim\nstring"),
    ("empty verbatim", b"=4\r\nmkd:\r\n", b""),
    # aggregates
    ("array", b"*3\r\n:0\r\n$1\r\na\r\n+b\r\n", [0, b"a", b"b"]),
    ("empty array", b"*0\r\n", []),
    ("null array", b"*-1\r\n", None),
    ("array of nulls", b"*3\r\n$-1\r\n*-1\r\n_\r\n", [None, None, None]),
    ("arrays in arrays", b"*2\r\n*2\r\n:1\r\n*0\r\n*1\r\n*1\r\n:2\r\n", [[1, []], [[2]]]),
    ("array with an error *", b"*5\r\n:1\r\n$1\r\na\r\n$-1\r\n-ERR x\r\n+fine\r\n",
     [1, b"a", None, ReplyError("ERR x"), b"fine"]),
    ("array of 600", b"*600\r\n" + b":1\r\n" * 600, [1] * 600),
    ("set *", b"~3\r\n:0\r\n:1\r\n:2\r\n", [0, 1, 2]),
    ("empty set", b"~0\r\n", []),
    ("map *", b"%3\r\n:0\r\n#f\r\n:1\r\n#t\r\n:2\r\n#f\r\n", {0: False, 1: True, 2: False}),
    ("empty map", b"%0\r\n", {}),
    ("HELLO 3 *", b"%2\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nmodules\r\n*0\r\n",
     {b"server": b"redis", b"modules": []}),
    ("map in a map in an array", b"*1\r\n%1\r\n+a\r\n%1\r\n+b\r\n~1\r\n_\r\n", [{b"a": {b"b": [None]}}]),
    ("ZRANGE WITHSCORES *", b"*2\r\n*2\r\n$1\r\nb\r\n,-inf\r\n*2\r\n$1\r\nc\r\n,1e+22\r\n",
     [[b"b", -math.inf], [b"c", 1e22]]),
    ("EXEC *", b"*2\r\n-WRONGTYPE Operation against a key\r\n:1\r\n",
     [ReplyError("WRONGTYPE Operation against a key"), 1]),
    ("push", b">2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\nk\r\n", Push([b"invalidate", [b"k"]])),
    ("SUBSCRIBE *", b">3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n", Push([b"subscribe", b"c", 1])),
    # attributes are as if they were not there
    ("attribute *", b"|1\r\n$14\r\nkey-popularity\r\n*2\r\n$7\r\nkey:123\r\n:90\r\n$4\r\nreal\r\n", b"real"),
    ("empty attribute", b"|0\r\n:1\r\n", 1),
    ("attributes in a row", b"|1\r\n+a\r\n+b\r\n|0\r\n|1\r\n+c\r\n%1\r\n+d\r\n:1\r\n*0\r\n", []),
    ("attribute inside of an array", b"*3\r\n:1\r\n|1\r\n+ttl\r\n:3600\r\n:2\r\n|0\r\n:3\r\n", [1, 2, 3]),
    ("attribute inside of an attribute", b"|1\r\n+a\r\n|1\r\n+b\r\n:1\r\n:2\r\n+x\r\n", b"x"),
    ("attribute before a map value", b"%1\r\n+k\r\n|1\r\n+a\r\n+b\r\n+v\r\n", {b"k": b"v"}),
    ("attribute with aggregates as keys", b"|1\r\n*1\r\n:1\r\n+v\r\n:1\r\n", 1),
]  # fmt: skip

#: (name, bytes, part of the message).  Never complete without an error, however they are cut.
ERRORS: List[Tuple[str, bytes, str]] = [
    ("HTTP", b"HTTP/1.1 400 Bad Request\r\n", "begins like this: b'HTTP/1.1 400"),
    ("TLS alert", b"\x15\x03\x03\x00\x02\x02\x28\r\n", "begins like this"),
    ("empty line", b"\r\n", "begins like this"),
    ("chunk of a streamed string", b";4\r\nabcd\r\n", "begins like this"),
    ("end of a streamed aggregate", b".\r\n", "begins like this"),
    ("streamed string", b"$?\r\n;0\r\n", "streamed"),
    ("streamed array", b"*?\r\n.\r\n", "streamed"),
    ("streamed map", b"%?\r\n.\r\n", "streamed"),
    ("streamed set", b"~?\r\n.\r\n", "streamed"),
    ("no length", b"$\r\n\r\n", "not a length"),
    ("length with plus", b"$+5\r\nhello\r\n", "not a length"),
    ("length with zeros", b"$05\r\nhello\r\n", "not a length"),
    ("length of zeros", b"*00\r\n", "not a length"),
    ("length with a space", b"$ 5\r\nhello\r\n", "not a length"),
    ("length with an underscore", b"$1_0\r\nhellohello\r\n", "not a length"),
    ("length that is a fraction", b"*1.0\r\n:1\r\n", "not a length"),
    ("length in another script", "$٣\r\n".encode(), "not a length"),
    ("length with a lone line feed", b"$5\nhello\r\n", "not a length"),
    ("length of many digits", b"$99999999999999999999\r\n", "not a length"),
    ("bulk of minus two", b"$-2\r\n", "not a length"),
    ("bulk of minus zero", b"$-0\r\n\r\n", "not a length"),
    ("array of minus two", b"*-2\r\n", "not a length"),
    ("null blob error", b"!-1\r\n", "not a length"),
    ("null verbatim", b"=-1\r\n", "not a length"),
    ("null map", b"%-1\r\n", "not a length"),
    ("null set", b"~-1\r\n", "not a length"),
    ("null push", b">-1\r\n", "not a length"),
    ("null attribute", b"|-1\r\n", "not a length"),
    ("bulk too large", b"$536870913\r\n", "above the limit of 536870912"),
    ("array too large", b"*4194305\r\n", "above the limit of 4194304"),
    ("map too large", b"%2097153\r\n", "more than 4194304 elements"),
    ("bulk longer than it says", b"$4\r\nhello\r\n", "where its length says: b'$4"),
    ("bulk shorter than it says", b"$6\r\nhello\r\n:1\r\n", "where its length says"),
    ("bulk with half an end", b"$1\r\na\rb", "where its length says"),
    ("header without end", b"$" + b"1" * 40, "too long"),
    ("array header without end", b"*" + b" " * 40, "too long"),
    ("status without end", b"+" + b"x" * (MAX_LINE_BYTES + 3), "too long"),
    ("status too long", b"+" + b"x" * (MAX_LINE_BYTES + 1) + b"\r\n", "too long"),
    ("error too long", b"-" + b"x" * (MAX_LINE_BYTES + 1) + b"\r\n", "too long"),
    ("status of two lines", b"+a\nb\r\n", "line break"),
    ("status with a lone return", b"+a\rb\r\n", "line break"),
    ("error of two lines", b"-ERR a\nb\r\n", "line break"),
    ("no integer", b":\r\n", "not a 64 bit integer"),
    ("sign without integer", b":-\r\n", "not a 64 bit integer"),
    ("integer with zeros", b":007\r\n", "not a 64 bit integer"),
    ("integer with a space", b": 1\r\n", "not a 64 bit integer"),
    ("integer with an underscore", b":1_0\r\n", "not a 64 bit integer"),
    ("integer too great", b":9223372036854775808\r\n", "not a 64 bit integer"),
    ("integer too small", b":-9223372036854775809\r\n", "not a 64 bit integer"),
    ("null with something", b"_x\r\n", "not a value"),
    ("boolean with something", b"#tt\r\n", "not a value"),
    ("boolean with nothing", b"#\r\n", "not a value"),
    ("boolean as a number", b"#1\r\n", "not a value"),
    ("no double", b",\r\n", "not a value"),
    ("double without integral part", b",.5\r\n", "not a value"),
    ("double in words", b",infinity\r\n", "not a value"),
    ("double with an underscore", b",1_0.5\r\n", "not a value"),
    ("double of too many digits", b"," + b"1" * 641 + b"\r\n", "not a value"),
    ("no big number", b"(\r\n", "not a value"),
    ("big number with fraction", b"(1.5\r\n", "not a value"),
    ("big number of too many digits", b"(" + b"1" * 641 + b"\r\n", "not a value"),
    ("verbatim without format", b"=3\r\ntxt\r\n", "format"),
    ("verbatim with a long format", b"=6\r\ntext:x\r\n", "format"),
    ("array as a map's key", b"%1\r\n*0\r\n:1\r\n", "aggregate as key"),
    ("map as a map's key", b"%1\r\n%0\r\n:1\r\n", "aggregate as key"),
    ("push inside of an array", b"*1\r\n>1\r\n+a\r\n", "inside of a reply"),
    ("empty push", b">0\r\n", "push that is empty"),
    ("push without a kind", b">1\r\n:1\r\n", "begin with its kind"),
    ("nested too deep", b"*1\r\n" * 33, "deeper than 32"),
    ("attributes too deep", b"|1\r\n" * 33, "deeper than 32"),
    ("error inside of an array", b"*2\r\n:1\r\nx\r\n", "begins like this"),
]  # fmt: skip

TRAILING = b"*1\r\n$4\r\nnext\r\n"


def shape(value: Any) -> Tuple[type, str]:
    """Return what two equal replies have in common, also where they are errors or not numbers."""
    return type(value), repr(value)


def replies(parser: Parser) -> Iterator[Any]:
    """Give out replies until there are no more."""
    while True:
        reply = parser.get()
        if reply is NEED_DATA:
            return
        yield reply


def read(data: bytes, longest: Optional[int] = None, seed: int = 0, **limits: int) -> List[Any]:
    """Return the shapes of all replies in the bytes, and ProtocolError if that ended them.

    Fed whole, or in random pieces of at most `longest` bytes.
    """
    rng = random.Random(seed)
    parser = Parser(**limits)
    found: List[Any] = []
    at = 0
    try:
        while at < len(data):
            size = rng.randint(1, longest) if longest else len(data)
            parser.feed(data[at : at + size])
            at += size
            found += map(shape, replies(parser))
    except ProtocolError as error:
        found.append(type(error))
        for dead in (parser.get, lambda: parser.feed(b":1\r\n"), parser.get):
            with pytest.raises(ProtocolError) as again:
                dead()
            assert str(again.value) == str(error)
    return found


def named(table: List[Tuple[Any, ...]]) -> Any:
    return pytest.mark.parametrize(
        ("data", "expected"), [row[1:] for row in table], ids=[row[0] for row in table]
    )


# -- replies


@named(VECTORS)
def test_reply_fed_whole_is_read(data, expected):
    assert read(data) == [shape(expected)]


@named(VECTORS)
def test_reply_fed_byte_by_byte_comes_with_its_last_byte(data, expected):
    parser = Parser()
    for at in range(len(data) - 1):
        parser.feed(data[at : at + 1])
        assert parser.get() is NEED_DATA
    parser.feed(data[-1:])
    assert shape(parser.get()) == shape(expected)
    assert parser.get() is NEED_DATA


@named(VECTORS)
def test_reply_with_trailing_bytes_leaves_them_to_the_next(data, expected):
    for end in range(len(TRAILING)):
        parser = Parser()
        parser.feed(data + TRAILING[:end])
        assert shape(parser.get()) == shape(expected)
        assert parser.get() is NEED_DATA
        parser.feed(TRAILING[end:])
        assert parser.get() == [b"next"]
        assert parser.get() is NEED_DATA


def test_error_reply_has_a_code_and_the_whole_text():
    error = ReplyError("WRONGTYPE Operation against a key")
    assert (error.code, error.text, str(error)) == (
        "WRONGTYPE",
        error.text,
        "WRONGTYPE Operation against a key",
    )
    assert shape(pickle.loads(pickle.dumps(error))) == shape(error)


def test_parser_without_bytes_needs_data():
    parser = Parser()
    assert parser.get() is NEED_DATA
    parser.feed(b"")
    assert parser.get() is NEED_DATA
    assert repr(NEED_DATA) == "NEED_DATA"


def test_pieces_fed_ahead_of_get_are_kept_in_order():
    parser = Parser()
    for piece in (b":1\r\n:2\r", b"\n:3", b"\r\n*2\r\n:4\r\n", b":5\r\n", b":6\r\n"):
        parser.feed(piece)
    assert parser.get() == 1
    parser.feed(b":7\r\n")
    assert list(replies(parser)) == [2, 3, [4, 5], 6, 7]


def test_piece_fed_after_one_that_waits_comes_after_it():
    parser = Parser()
    parser.feed(b":1\r\n")
    parser.feed(b":2\r\n")
    assert parser.get() == 1
    parser.feed(b":3\r\n")
    assert list(replies(parser)) == [2, 3]


def test_pushes_between_replies_come_as_pushes_in_their_place():
    parser = Parser()
    parser.feed(b":1\r\n>2\r\n+message\r\n*0\r\n:2\r\n>1\r\n+bye\r\n")
    found = list(replies(parser))
    assert found == [1, [b"message", []], 2, [b"bye"]]
    assert [type(reply) for reply in found] == [int, Push, int, Push]


# -- garbage


@named(ERRORS)
@pytest.mark.parametrize("longest", [None, 1], ids=["whole", "bytes"])
def test_garbage_is_a_protocol_error_and_the_end(data, expected, longest):
    assert read(data, longest) == [ProtocolError]
    assert read(b":1\r\n" + data + TRAILING, longest) == [shape(1), ProtocolError]
    parser = Parser()
    with pytest.raises(ProtocolError) as caught:
        for at in range(0, len(data), 1000):
            parser.feed(data[at : at + 1000])
            parser.get()
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 250


def test_random_bytes_give_replies_or_a_protocol_error_however_they_are_cut():
    alphabet = b"+-:$*_#,(!=%~>|" + b"\r\n" * 8 + b"0123456789" * 2 + b"tfinxe.;?"
    for seed in range(3000):
        rng = random.Random(seed)
        lines = bytes(rng.choices(alphabet, k=rng.randrange(60)))
        data = rng.choice((lines, lines.replace(b"\r", b"").replace(b"\n", b"\r\n"), rng.randbytes(40)))
        assert read(data) == read(data, 8, seed), f"seed {seed}: {data!r}"


def test_mutated_replies_give_replies_or_a_protocol_error_however_they_are_cut():
    usual = [data for _, data, _ in VECTORS if len(data) < 1000]
    for seed in range(3000):
        rng = random.Random(seed)
        data = bytearray(b"".join(rng.choices(usual, k=rng.randrange(1, 5))))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            rng.choice((mutate_byte, mutate_cut, mutate_copy))(data, at, rng)
        sent = bytes(data)
        whole = read(sent, max_depth=5, max_elements=1000)
        pieces = read(sent, 20, seed, max_depth=5, max_elements=1000)
        assert whole == pieces, f"seed {seed}: {sent!r}"


def mutate_byte(data: bytearray, at: int, rng: random.Random) -> None:
    data[at] = rng.choice((rng.randrange(256), data[at] ^ 1, *b"\r\n-0919$*%>|"))


def mutate_cut(data: bytearray, at: int, rng: random.Random) -> None:
    del data[at : at + rng.randrange(1, 4)]
    data += b":"  # never empty


def mutate_copy(data: bytearray, at: int, rng: random.Random) -> None:
    data[at:at] = data[at : at + rng.randrange(1, 12)]


# -- every reply


def random_reply(rng: random.Random, depth: int) -> Any:
    """Return a value as the parser gives it out."""
    kind = rng.randrange(10 if depth else 7)
    if kind < 3:
        return rng.randbytes(rng.choice((0, 1, 5, 511, 512, 700)))
    if kind == 3:
        return rng.choice((0, 1, -1, 511, 512, 10**6, -(2**63), 2**63 - 1, 10**30))
    if kind == 4:
        return rng.choice((None, True, False))
    if kind == 5:
        return rng.choice((rng.random() * 10 ** rng.randrange(-20, 20), math.inf, -math.inf, 0.0))
    if kind == 6:
        return ReplyError("ERR " + "x" * rng.randrange(9))
    if kind == 7:
        return {rng.randbytes(4): random_reply(rng, depth - 1) for _ in range(rng.randrange(4))}
    return [random_reply(rng, depth - 1) for _ in range(rng.randrange(5))]


def written(value: Any, rng: random.Random) -> bytes:
    """Return a value in any of the ways in which a server may write it."""
    attribute = b"|1\r\n+a\r\n*1\r\n:1\r\n" if not rng.randrange(9) else b""
    if value is None:
        return attribute + rng.choice((b"_\r\n", b"$-1\r\n", b"*-1\r\n"))
    if isinstance(value, bool):
        return attribute + (b"#t\r\n" if value else b"#f\r\n")
    if isinstance(value, int):
        sign = b":" if -(2**63) <= value < 2**63 else b"("
        return attribute + sign + b"%d\r\n" % value
    if isinstance(value, float):
        return attribute + b",%b\r\n" % repr(value).encode()
    if isinstance(value, bytes):
        verbatim = b"=%d\r\ntxt:%b\r\n" % (len(value) + 4, value)
        return attribute + rng.choice((b"$%d\r\n%b\r\n" % (len(value), value), verbatim))
    if isinstance(value, ReplyError):
        return attribute + b"-%b\r\n" % value.text.encode()
    if isinstance(value, dict):
        inside = [written(part, rng) for item in value.items() for part in item]
        return attribute + b"%%%d\r\n" % len(value) + b"".join(inside)
    return (
        attribute
        + rng.choice(b"*~").to_bytes(1, "big")
        + b"%d\r\n" % len(value)
        + b"".join(written(part, rng) for part in value)
    )


def test_any_replies_are_read_back_at_any_split_points():
    for seed in range(400):
        rng = random.Random(seed)
        values = [random_reply(rng, 4) for _ in range(rng.randrange(1, 6))]
        data = b"".join(written(value, rng) for value in values)
        longest = rng.choice((1, 3, 50, 2000))
        expected = list(map(shape, values))
        assert read(data, longest, seed) == expected, f"seed {seed}"


# -- bounds


class Counting(Parser):
    """A parser that counts what it does more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0
        self.copied_bytes = 0

    def _integer(self, line: bytes) -> int:
        self.numbers += 1
        return super()._integer(line)

    def _refill(self, at: int, missing: int) -> bool:
        came = super()._refill(at, missing)
        self.copied_bytes += len(self._data) if came else 0
        return came


def feed_in_pieces(parser: Parser, data: bytes, size: int) -> Any:
    """Return the reply that the last of the pieces completes."""
    for at in range(0, len(data), size):
        parser.feed(data[at : at + size])
        reply = parser.get()
        assert (reply is NEED_DATA) == (at + size < len(data))
    return reply


def test_bulk_of_32_mb_in_pieces_is_put_together_once():
    parser = Counting()
    size = 32_000_000
    reply = feed_in_pieces(parser, b"$%d\r\n%b\r\n" % (size, bytes(size)), 64 * 1024)
    assert len(reply) == size
    assert parser.copied_bytes < size + 1000
    parser.feed(b"+OK\r\n+")
    assert parser.get() == b"OK"


def test_reply_that_was_read_is_not_kept():
    parser = Parser()
    tracemalloc.start()
    try:
        parser.feed(b"$8000000\r\n%b\r\n" % bytes(8_000_000))
        assert len(parser.get()) == 8_000_000
        kept_bytes, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes > 8_000_000
    assert kept_bytes < 100_000


@pytest.mark.parametrize("piece_bytes", [1, 3, 1000])
def test_array_of_100_000_in_pieces_is_parsed_once(piece_bytes):
    parser = Counting()
    data = b"*100000\r\n" + b":1000\r\n" * 100_000
    assert feed_in_pieces(parser, data, piece_bytes) == [1000] * 100_000
    assert parser.numbers == 100_000
    # A line of 7 bytes that comes byte by byte is copied when it has its end, at most twice more.
    assert parser.copied_bytes < 3 * len(data)


def test_longest_line_byte_by_byte_is_put_together_once():
    parser = Counting()
    data = b"+" + b"x" * MAX_LINE_BYTES + b"\r\n"
    assert feed_in_pieces(parser, data, 1) == data[1:-2]
    assert parser.copied_bytes < 2 * len(data)


def test_pipeline_read_slower_than_it_comes_is_copied_once():
    parser = Counting()
    piece = b":1000\r\n" * 100
    for _ in range(1000):
        parser.feed(piece)
        assert parser.get() == 1000
    assert sum(1 for _ in replies(parser)) == 99_000
    assert parser.copied_bytes < 2 * 1000 * len(piece)


def test_limits_given_are_kept():
    assert read(b"$10\r\n0123456789\r\n", max_bulk_bytes=10) == [shape(b"0123456789")]
    assert read(b"$11\r\n", max_bulk_bytes=10) == [ProtocolError]
    assert read(b"=11\r\n", max_bulk_bytes=10) == [ProtocolError]
    assert read(b"*1\r\n*1\r\n:1\r\n", max_depth=2) == [shape([[1]])]
    assert read(b"*1\r\n*1\r\n*0\r\n", max_depth=2) == [ProtocolError]
    assert read(b"*3\r\n:1\r\n:2\r\n:3\r\n", max_elements=3) == [shape([1, 2, 3])]
    assert read(b"*4\r\n", max_elements=3) == [ProtocolError]
    assert read(b"%2\r\n", max_elements=3) == [ProtocolError]
    assert read(b"*2\r\n*1\r\n:1\r\n*1\r\n", max_elements=3) == [ProtocolError]
    assert read(b"*1\r\n|1\r\n+a\r\n+b\r\n*1\r\n", max_elements=3) == [ProtocolError]


def test_elements_are_counted_anew_for_each_reply():
    assert read(b"*3\r\n:1\r\n:2\r\n:3\r\n" * 5, max_elements=3) == [shape([1, 2, 3])] * 5


# -- commands


class Color(str, enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 9


def test_command_is_an_array_of_bulk_strings():
    assert encode(b"PING") == b"*1\r\n$4\r\nPING\r\n"
    assert encode("SET", b"k", "") == b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$0\r\n\r\n"


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("grün", "grün".encode()), (0, b"0"), (-5, b"-5"), (2**70, b"%d" % 2**70), (1.5, b"1.5"),
        (1e22, b"1e+22"), (0.1, b"0.1"), (math.inf, b"inf"), (-math.inf, b"-inf"), (b"\r\n\x00", b"\r\n\x00"),
        (Color.RED, b"red"), (Level.HIGH, b"9"),
    ],
)  # fmt: skip
def test_part_goes_out_as_its_text(part, text):
    assert read(encode("ECHO", part)) == [shape([b"ECHO", text])]


@pytest.mark.parametrize("part", [None, True, ["a"], object(), bytearray(b"a")])
def test_part_of_another_type_is_refused_by_name(part):
    with pytest.raises(TypeError, match=f"not {type(part).__name__}: convert"):
        encode("SET", "k", part)


def test_command_without_parts_is_refused():
    with pytest.raises(ValueError, match="at least its name"):
        encode()


def test_commands_are_read_back_by_a_server():
    for seed in range(300):
        rng = random.Random(seed)
        commands = [
            [rng.randbytes(rng.choice((0, 1, 9, 600))) for _ in range(rng.randrange(1, 12))]
            for _ in range(rng.randrange(5))
        ]
        data = encode_many(commands)
        assert data == b"".join(encode(*command) for command in commands), f"seed {seed}"
        assert read(data, 700, seed) == list(map(shape, commands)), f"seed {seed}"

# SPDX-License-Identifier: MIT
"""The protocol of Redis, RESP2 and RESP3, without input or output.

`encode` turns a command into bytes.  A `Parser` is fed whatever the socket gave and hands out one
reply at a time, or NEED_DATA::

    +OK   -ERR text   :1   $5 hello   *2 items   _   #t   ,1.5   (12345678901234567890
    =9 txt:hello   !9 ERR hello   %1 key value   ~2 items   >2 push   |1 key value (skipped)

Strategy: one loop without recursion over the bytes as they were fed, so that most replies are cut
out of them with no other copy.  Open arrays are kept on a stack from call to call, and bytes that
came too early to be of use wait in `_held` until there are enough of them: however small the
pieces, no array is begun again and no string is put together twice.  Nothing that
the peer says is believed before it was checked, no memory is set aside on its word, and whatever
is not RESP ends in `ProtocolError`.

Source: the RESP specification of redis.io, and of RESP3 what Redis 6.2 and later send; streamed
strings and aggregates, which no server sends, are refused.
"""

from __future__ import annotations

import re
from itertools import starmap
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

#: What a command consists of; text goes out as UTF-8.
Part = Union[bytes, str, int, float]

#: Longest simple string or error, in bytes: what is longer must come with its length.
MAX_LINE_BYTES = 64 * 1024

#: Longest line of any other type: 20 characters of a number, and some.
_MAX_HEADER_BYTES = 32
#: More digits than this may be refused by int(), by the user's setting (sys.set_int_max_str_digits).
_MAX_DIGITS = 640

_SIMPLE, _ERROR, _INTEGER, _BULK, _ARRAY = b"+-:$*"
_NULL, _BOOLEAN, _DOUBLE, _BIG_NUMBER, _BLOB_ERROR, _VERBATIM = b"_#,(!="
_MAP, _SET, _PUSH, _ATTRIBUTE = b"%~>|"
_SIZED = b"$=!"
_AGGREGATES = b"*%~>|"
_PAIRS = b"%|"
_LINES = b"+-,("
_TYPES = b"+-:$*_#,(!=%~>|"
_CRLF = b"\r\n"
_ZERO = 0x30
_UNKNOWN = "no reply of a Redis server begins like this"

#: The usual lengths and numbers as they are written: looking one up is faster than int(), and strict.
_SMALL: Dict[bytes, int] = {b"%d" % number: number for number in range(512)}
_NUMBER = re.compile(rb"[+-]?(?:0|[1-9][0-9]{0,18})")
_DOUBLE_TEXT = re.compile(rb"[+-]?(?:inf|nan|[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)")
_BIG_NUMBER_TEXT = re.compile(rb"[+-]?[0-9]{1,%d}" % _MAX_DIGITS)


class ProtocolError(Exception):
    """The peer sent what is not RESP, or more than was allowed: the connection is of no more use."""


class ReplyError(Exception):
    """An error reply of the server: `text` as it came, `code` its first word, such as ``WRONGTYPE``."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text
        self.code = text.partition(" ")[0]


class Push(List[Any]):
    """What a RESP3 server sent unasked: its kind (bytes) and whatever belongs to it."""

    __slots__ = ()


class _NeedData:
    __slots__ = ()

    def __repr__(self) -> str:
        return "NEED_DATA"


#: What `Parser.get` returns while the next reply is not complete.
NEED_DATA = _NeedData()


# -- commands ------------------------------------------------------------------------------------


def encode(*parts: Part) -> bytes:
    """Return a command as bytes: an array of bulk strings.

    Raises TypeError for a part that is neither bytes, str, int nor float, ValueError without parts.
    """
    if not parts:
        raise ValueError("a command has at least its name")
    pieces = [b"*%d" % len(parts)]
    for part in parts:
        if type(part) is not bytes:
            part = _as_bytes(part)
        pieces += b"$%d" % len(part), part
    pieces.append(b"")
    return _CRLF.join(pieces)


def encode_many(commands: Iterable[Sequence[Part]]) -> bytes:
    """Return several commands as bytes, to be sent in one write."""
    return b"".join(starmap(encode, commands))


def _as_bytes(part: Part) -> bytes:
    if isinstance(part, str):
        return part.encode("utf-8", "surrogatepass")
    if isinstance(part, int) and not isinstance(part, bool):
        return b"%d" % part
    if isinstance(part, float):
        return float.__repr__(part).encode()
    if isinstance(part, bytes):
        return part
    raise TypeError(
        f"a part of a command is bytes, str, int or float, not {type(part).__name__}: convert it first"
    )


# -- replies -------------------------------------------------------------------------------------


class Parser:
    """Reads replies: `feed` it with bytes, then `get` until it says NEED_DATA.

    Strings come as bytes, nulls as None, sets as list, maps as dict, errors as `ReplyError` (as a
    value, also inside of arrays), pushes as `Push`.  Once it raised `ProtocolError` it raises that
    for ever: where the next reply would begin is not known.  Used by one thread at a time.
    """

    __slots__ = (
        "_data", "_at", "_held", "_stack", "_frame", "_elements", "_sizes", "_failure",
        "_max_bulk_bytes", "_max_depth", "_max_elements",
    )  # fmt: skip

    def __init__(
        self, max_bulk_bytes: int = 512 * 1024 * 1024, max_depth: int = 32, max_elements: int = 1 << 22
    ) -> None:
        """`max_elements` counts what all arrays and maps of one reply, nested ones too, say they hold."""
        self._max_bulk_bytes = max_bulk_bytes
        self._max_depth = max_depth
        self._max_elements = max_elements
        self._sizes = _SMALL if max_bulk_bytes >= len(_SMALL) else {}
        #: Unread from `_at` on.
        self._data = b""
        self._at = 0
        #: What was fed while `_data` was not empty, and comes after it.
        self._held = bytearray()
        #: The innermost open aggregate (type, elements so far, how many are left); around it, the others.
        self._frame: Tuple[int, List[Any], int] = (0, [], 0)
        self._stack: List[Tuple[int, List[Any], int]] = []
        self._elements = 0
        self._failure: Optional[str] = None

    def feed(self, data: bytes) -> None:
        """Take bytes from the peer.  Raises ProtocolError after an earlier one."""
        if self._failure is not None:
            raise ProtocolError(self._failure)
        if self._data or self._held:
            self._held += data
        else:
            self._data = data

    def get(self) -> Any:
        """Return the next reply, or NEED_DATA.  Raises ProtocolError, then and ever after."""
        if self._failure is not None:
            raise ProtocolError(self._failure)
        data, at, stack = self._data, self._at, self._stack
        kind, items, left = self._frame
        small, sizes = _SMALL, self._sizes
        value: Any
        while True:
            end = data.find(_CRLF, at)
            if end < 0:
                if self._line_came(at):
                    data, at = self._data, 0
                    continue
                self._frame = kind, items, left
                return NEED_DATA
            found = data[at]
            if found in _SIZED:
                size = sizes.get(data[at + 1 : end])
                if size is None:
                    size = self._length(data[at:end], self._max_bulk_bytes)
                start = end + 2
                stop = start + size
                if size < 0:
                    value = None
                    at = start
                elif data[stop : stop + 2] == _CRLF:
                    value = data[start:stop]
                    at = stop + 2
                    if found != _BULK:
                        value = self._sized(found, value)
                elif stop + 2 <= len(data):
                    raise self._garbage("a string without its end where its length says", data[at : at + 40])
                elif self._refill(at, stop + 2 - len(data)):
                    data, at = self._data, 0
                    continue
                else:
                    self._frame = kind, items, left
                    return NEED_DATA
            elif found == _SIMPLE:
                value = data[at + 1 : end]
                if value != b"OK":
                    self._check_text(value)
                at = end + 2
            elif found == _INTEGER:
                value = small.get(data[at + 1 : end])
                if value is None:
                    value = self._integer(data[at:end])
                at = end + 2
            elif found in _AGGREGATES:
                count = small.get(data[at + 1 : end])
                if count is None:
                    count = self._length(data[at:end], self._max_elements)
                at = end + 2
                if count < 0:
                    value = None
                else:
                    self._check_aggregate(found, count)
                    if count:
                        stack.append((kind, items, left))
                        kind, items, left = found, [], count * 2 if found in _PAIRS else count
                        continue
                    if found == _ATTRIBUTE:
                        continue
                    value = {} if found == _MAP else []
            else:
                value = self._line(found, data[at:end])
                at = end + 2
            # A value is complete, and with it perhaps the aggregates around it.
            while stack:
                items.append(value)
                left -= 1
                if left:
                    break
                closed, value = kind, items
                kind, items, left = stack.pop()
                if closed == _ATTRIBUTE:
                    break
                if closed != _ARRAY:
                    value = self._closed(closed, value)
            else:
                if at < len(data):
                    self._at = at
                else:
                    self._data, self._at = b"", 0
                self._frame = kind, items, left
                return value

    def _refill(self, at: int, missing: int) -> bool:
        """Put the bytes held behind those unread from `at` on, if they are at least as many as missing."""
        if missing > len(self._held):
            self._at = at
            return False
        self._data = self._data[at:] + self._held
        self._at = 0
        self._held.clear()
        return True

    def _line_came(self, at: int) -> bool:
        """Refill if the rest of the line from `at` on may be there; raise if no end could make it right."""
        start, held = self._data[at : at + 1], self._held
        if start not in _TYPES:
            raise self._garbage(_UNKNOWN, self._data[at : at + 40])
        limit = MAX_LINE_BYTES + 2 if start in _LINES else _MAX_HEADER_BYTES
        unread = len(self._data) - at
        ended = not start or b"\n" in held
        if unread > limit or (not ended and unread + len(held) > limit):
            raise self._garbage("a line is too long", self._data[at : at + 40])
        return self._refill(at, 1 if ended else len(held) + 1)

    def _length(self, line: bytes, limit: int) -> int:
        """Return the length in a line, -1 for the null of RESP2."""
        digits = line[1:]
        if digits.isdigit() and len(digits) < 20 and (digits[0] != _ZERO or len(digits) == 1):
            length = int(digits)
            if length <= limit:
                return length
            raise self._garbage(f"a length above the limit of {limit}", line)
        if digits == b"-1" and line[0] in b"$*":
            return -1
        if digits == b"?":
            raise self._garbage("streamed strings and aggregates are not supported", line)
        raise self._garbage("not a length", line)

    def _integer(self, line: bytes) -> int:
        if _NUMBER.fullmatch(line, 1):
            number = int(line[1:])
            if -(1 << 63) <= number < 1 << 63:
                return number
        raise self._garbage("not a 64 bit integer", line)

    def _check_aggregate(self, kind: int, count: int) -> None:
        """Raise for an aggregate that is too deep, too big, or not in its place."""
        depth = len(self._stack)
        if depth >= self._max_depth:
            raise self._garbage(f"nested deeper than {self._max_depth} levels")
        self._elements = (self._elements if depth else 0) + (count * 2 if kind in _PAIRS else count)
        if self._elements > self._max_elements:
            raise self._garbage(f"a reply of more than {self._max_elements} elements")
        if kind == _PUSH and (depth or not count):
            raise self._garbage("a push that is empty or inside of a reply", b">%d" % count)

    def _closed(self, kind: int, items: List[Any]) -> Any:
        """Return the value of a complete aggregate other than an array."""
        if kind == _MAP:
            keys = items[::2]
            for key in keys:
                if isinstance(key, (list, dict)):
                    raise self._garbage("a map with an aggregate as key")
            return dict(zip(keys, items[1::2]))
        if kind == _PUSH:
            if not isinstance(items[0], bytes):
                raise self._garbage("a push that does not begin with its kind")
            return Push(items)
        return items

    def _sized(self, kind: int, value: bytes) -> Any:
        """Return the value of a string with a length that is not just a string."""
        if kind == _BLOB_ERROR:
            return ReplyError(value.decode(errors="backslashreplace"))
        if value[3:4] != b":":
            raise self._garbage("a verbatim string without its format", value)
        return value[4:]

    def _check_text(self, text: bytes) -> None:
        """Raise for the text of a simple string or error that is too long or is not one line."""
        if len(text) > MAX_LINE_BYTES:
            raise self._garbage("a line is too long", text)
        if b"\n" in text or b"\r" in text:
            raise self._garbage("a line break inside of a line", text)

    def _line(self, kind: int, line: bytes) -> Any:
        """Return the value of a type that is one line and has no branch of its own in `get`."""
        text = line[1:]
        if kind == _ERROR:
            self._check_text(text)
            return ReplyError(text.decode(errors="backslashreplace"))
        if kind == _NULL and not text:
            return None
        if kind == _BOOLEAN and text in (b"t", b"f"):
            return text == b"t"
        if kind == _DOUBLE and len(text) <= _MAX_DIGITS and _DOUBLE_TEXT.fullmatch(text):
            return float(text)
        if kind == _BIG_NUMBER and _BIG_NUMBER_TEXT.fullmatch(text):
            return int(text)
        raise self._garbage("not a value of its type" if kind in _TYPES else _UNKNOWN, line)

    def _garbage(self, what: str, line: bytes = b"") -> ProtocolError:
        """Return the error to raise, and remember it for all calls to come."""
        self._failure = f"{what}: {line[:40]!r}" if line else what
        self._data, self._held = b"", bytearray()
        self._stack, self._frame = [], (0, [], 0)
        return ProtocolError(self._failure)

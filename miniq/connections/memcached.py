# SPDX-License-Identifier: MIT
"""memcached's text protocol: replies from bytes, one connection, and which server has a key.

A command is a line; values follow it as so many bytes and a line end.  Replies come in the order of
the commands, so many can be on the way at once.  Of the replies only what is asked for here is
known, the rest is garbage: some other program listens there::

    get <key>...                          VALUE <key> <flags> <bytes> [<token>] / <value> ... END
    gets <key>...                         the same with tokens
    add <key> 0 <exptime> <bytes>         STORED | NOT_STORED
    cas <key> 0 <exptime> <bytes> <token> STORED | EXISTS | NOT_FOUND
    delete <key>                          DELETED | NOT_FOUND
    (any)                                 ERROR | CLIENT_ERROR <text> | SERVER_ERROR <text>

Source: memcached's doc/protocol.txt; the choice of the server is pymemcache's.
"""

from __future__ import annotations

import math
import os
import struct
from time import monotonic
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from ..exceptions import ImproperlyConfigured, OperationalError
from ..text import mask_url, truncate
from .stream import Address, Stream

DEFAULT_PORT = 11211
#: Longer keys are refused by the server; so are spaces and control characters in them.
MAX_KEY_BYTES = 250
#: Larger ones are neither written nor read; memcached itself takes 1 MB, unless it is told otherwise.
MAX_VALUE_BYTES = 256 * 1024 * 1024
#: Commands, or keys of one, that are sent before their replies are read.  The replies to writes are
#: so short that the server never has to wait until they are read.
MAX_AT_ONCE = 100
#: And bytes of commands, if it is more than one.
MAX_BYTES_AT_ONCE = 1 << 20
#: A line is shorter: a key, four numbers, or the text of an error.
MAX_LINE_BYTES = 2048
#: What is written with a longer time in seconds, memcached takes for a date.
MAX_RELATIVE_S = 30 * 86400
#: Times are 32 bits there.
MAX_EXPTIME = 2**31 - 1

TOO_LARGE = b"SERVER_ERROR object too large for cache"

_LINES = frozenset((b"STORED", b"NOT_STORED", b"EXISTS", b"NOT_FOUND", b"DELETED", b"ERROR"))
_ERRORS = (b"CLIENT_ERROR", b"SERVER_ERROR")


class ProtocolError(Exception):
    """Bytes that memcached does not send."""


class Value(NamedTuple):
    """A stored value; `token` is what ``cas`` wants, empty after ``get``."""

    body: bytes
    token: bytes


#: A line as it is, or all values up to END by their keys.
Reply = Union[bytes, Dict[bytes, Value]]


class Parser:
    """Replies from bytes: `feed` what arrives, `get` until it returns None for "more is needed"."""

    __slots__ = ("_buffer", "_pos", "_values", "_header")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._pos = 0
        self._values: Dict[bytes, Value] = {}
        #: Of the value whose bytes are awaited: key, size, token.
        self._header: Optional[Tuple[bytes, int, bytes]] = None

    @property
    def idle(self) -> bool:
        """Say whether there is nothing left over."""
        return self._pos == len(self._buffer) and self._header is None and not self._values

    def feed(self, data: bytes) -> None:
        """Add bytes."""
        if self._pos:
            del self._buffer[: self._pos]
            self._pos = 0
        self._buffer += data

    def get(self) -> Optional[Reply]:
        """Return the next reply; raises `ProtocolError`, after which the connection is of no use."""
        while True:
            if self._header is not None and not self._take_value(*self._header):
                return None
            line = self._take_line()
            if line is None:
                return None
            if line.startswith(b"VALUE "):
                self._header = _read_header(line)
            elif line == b"END":
                values, self._values = self._values, {}
                return values
            elif self._values or not (line in _LINES or line.startswith(_ERRORS)):
                raise ProtocolError(f"unexpected line {truncate(repr(line), 100)}")
            else:
                return line

    def _take_line(self) -> Optional[bytes]:
        end = self._buffer.find(b"\r\n", self._pos, self._pos + MAX_LINE_BYTES)
        if end < 0:
            if len(self._buffer) - self._pos >= MAX_LINE_BYTES:
                raise ProtocolError(f"no end of the line within {MAX_LINE_BYTES} bytes")
            return None
        line = bytes(self._buffer[self._pos : end])
        self._pos = end + 2
        return line

    def _take_value(self, key: bytes, size: int, token: bytes) -> bool:
        end = self._pos + size
        if len(self._buffer) < end + 2:
            return False
        if self._buffer[end : end + 2] != b"\r\n":
            raise ProtocolError(f"no line end after a value of {size} bytes")
        if len(self._values) >= MAX_AT_ONCE:
            raise ProtocolError("more values than keys were asked for")
        self._values[key] = Value(bytes(self._buffer[self._pos : end]), token)
        self._pos, self._header = end + 2, None
        return True


def _read_header(line: bytes) -> Tuple[bytes, int, bytes]:
    parts = line.split(b" ")
    if not (4 <= len(parts) <= 5 and all(part.isdigit() and len(part) <= 20 for part in parts[2:])):
        raise ProtocolError(f"unexpected line {truncate(repr(line), 100)}")
    size = int(parts[3])
    if size > MAX_VALUE_BYTES:
        raise ProtocolError(f"a value of {size} bytes, the most is {MAX_VALUE_BYTES}")
    return parts[1], size, parts[4] if len(parts) == 5 else b""


class Write(NamedTuple):
    """A value to be written: where nothing is when `token` is empty, else where that is unchanged."""

    key: bytes
    body: bytes
    exptime: int
    token: bytes = b""

    def encode(self) -> bytes:
        """Return the command."""
        key, body, exptime, token = self
        if token:
            return b"cas %b 0 %d %d %b\r\n%b\r\n" % (key, exptime, len(body), token, body)
        return b"add %b 0 %d %d\r\n%b\r\n" % (key, exptime, len(body), body)


class Connection:
    """One connection to one server, for one thread.

    Connects when it is first used, and anew after an error, in a forked child, and once where a
    connection that was used before turns out to be gone.  Raises `OperationalError`.
    """

    def __init__(self, address: Address, timeout_s: float, connect_timeout_s: float) -> None:
        self.name = node_name(address)
        self._address = address
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._stream: Optional[Stream] = None
        self._parser = Parser()
        self._pid = 0

    def get(
        self, keys: Sequence[bytes], tokens: bool = False, timeout_s: Optional[float] = None
    ) -> Dict[bytes, Value]:
        """Return the values of those keys that have one; `timeout_s` may shorten the usual time."""
        found: Dict[bytes, Value] = {}
        verb = b"gets " if tokens else b"get "
        for begin in range(0, len(keys), MAX_AT_ONCE):
            some = keys[begin : begin + MAX_AT_ONCE]
            (reply,) = self._ask(verb + b" ".join(some) + b"\r\n", 1, timeout_s)
            if not isinstance(reply, dict):
                raise self._broken(f"cannot read: {_shown(reply)}")
            if not reply.keys() <= set(some):
                raise self._broken("a value was returned that was not asked for")
            found.update(reply)
        return found

    def write(self, writes: Sequence[Write]) -> List[bytes]:
        """Write values; return a reply for each: STORED, or why not.

        The server's own trouble (`TOO_LARGE`, out of memory) is a reply, too.
        """
        return self._lines([write.encode() for write in writes])

    def delete(self, keys: Sequence[bytes]) -> None:
        """Delete what is there."""
        for line in self._lines([b"delete " + key + b"\r\n" for key in keys]):
            if line not in (b"DELETED", b"NOT_FOUND"):
                raise self._broken(f"cannot delete: {_shown(line)}")

    def _lines(self, commands: Sequence[bytes]) -> List[bytes]:
        found: List[bytes] = []
        while len(found) < len(commands):
            some = commands[len(found) : len(found) + MAX_AT_ONCE]
            size = len(some[0])
            for count, command in enumerate(some[1:], 1):
                size += len(command)
                if size > MAX_BYTES_AT_ONCE:
                    some = some[:count]
                    break
            for reply in self._ask(b"".join(some), len(some)):
                if isinstance(reply, dict) or reply.startswith((b"ERROR", b"CLIENT_ERROR")):
                    # It takes what followed for commands by now.
                    raise self._broken(f"a command was refused: {_shown(reply)}")
                found.append(reply)
        return found

    def _ask(self, request: bytes, replies: int, timeout_s: Optional[float] = None) -> List[Reply]:
        """Send commands and return their replies; once more where the connection was stale."""
        timeout_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        deadline_mono = monotonic() + timeout_s
        if self._is_usable():
            try:
                return self._exchange(request, replies, deadline_mono)
            except OperationalError:
                if monotonic() >= deadline_mono:
                    raise
        return self._exchange(request, replies, deadline_mono)

    def _is_usable(self) -> bool:
        stream = self._stream
        # Nothing was asked, so what there is to read is the end, or nothing good.
        if stream is not None and (self._pid != os.getpid() or not self._parser.idle or stream.has_input()):
            self.close()
        return self._stream is not None

    def _exchange(self, request: bytes, replies: int, deadline_mono: float) -> List[Reply]:
        try:
            stream = self._stream
            if stream is None:
                until_mono = min(deadline_mono, monotonic() + self._connect_timeout_s)
                stream = Stream.connect(self._address, until_mono, f"memcached at {self.name}")
                self._stream, self._parser, self._pid = stream, Parser(), os.getpid()
            stream.send(request, deadline_mono)
            found: List[Reply] = []
            while len(found) < replies:
                reply = self._parser.get()
                if reply is None:
                    self._parser.feed(stream.recv(deadline_mono))
                else:
                    found.append(reply)
            return found
        except ProtocolError as error:
            raise self._broken(f"{error}; does something else than memcached listen there?") from error
        except BaseException:
            # Also what a signal raised: the reply that is under way would be taken for the next one.
            self.close()
            raise

    def _broken(self, text: str) -> OperationalError:
        self.close()
        return OperationalError(f"memcached at {self.name}: {text}")

    def close(self) -> None:
        """Let go of the connection; the next call makes a new one."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _shown(reply: Reply) -> str:
    return "values" if isinstance(reply, dict) else truncate(reply.decode("ascii", "replace"), 200)


def exptime_of(expires_s: Optional[float], now: float) -> int:
    """Return how long a value is kept as memcached wants it: seconds, or a date, or 0 for ever."""
    if expires_s is None:
        return 0
    seconds = max(1, math.ceil(expires_s))
    return seconds if seconds <= MAX_RELATIVE_S else min(math.ceil(now + seconds), MAX_EXPTIME)


# -- several servers -----------------------------------------------------------------------------


def addresses_of(url: str) -> List[Address]:
    """Return the servers in ``memcache://host[:port][;host2[:port2]...]`` (or paths of Unix sockets).

    Raises `ImproperlyConfigured` for what is none.
    """
    found: List[Address] = []
    for part in url.partition("://")[2].rstrip("/").split(";"):
        if part:
            address = _address(part)
            if address is None:
                raise ImproperlyConfigured(
                    f"{mask_url(url)!r}: {truncate(mask_url(part), 200)!r} is no server:"
                    " write memcache://host:port or memcache://host1:port1;host2:port2"
                )
            if address not in found:
                found.append(address)
    if not found:
        raise ImproperlyConfigured(f"{mask_url(url)!r} names no server: write memcache://host:port")
    return found


def _address(part: str) -> Optional[Address]:
    if part.startswith(("/", "unix:")):
        return part[len("unix:") :] if part.startswith("unix:") else part
    host, colon, port = part, "", ""
    if not part.endswith("]"):
        head, colon, tail = part.rpartition(":")
        host, port = (head, tail) if colon else (part, "")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or any(letter in host for letter in "@/?#[] "):
        return None
    if not colon:
        return host, DEFAULT_PORT
    return (host, int(port)) if port.isdecimal() and 0 < int(port) < 65536 else None


def node_name(address: Address) -> str:
    """Return what a server is called in `choose`: ``host:port``, as in the URL."""
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


def choose(names: Sequence[str], key: str) -> str:
    """Return the one of `names` that has `key`: the one whose hash with the key is the highest.

    pymemcache's `HashClient` does the same, as long as it holds no server for dead.
    """
    if len(names) == 1:
        return names[0]
    return max((murmur3_32(f"{name}-{key}".encode()), name) for name in names)[1]


def murmur3_32(data: bytes) -> int:
    """Return Austin Appleby's MurmurHash3 (x86, 32 bits, seed 0) of `data`."""
    state = 0
    rest = len(data) & 3
    # The end, padded with zeros, is mixed in like the other words but for the last step.
    words = struct.unpack(f"<{len(data) + 3 >> 2}I", data + bytes(-len(data) & 3))
    for word in words:
        word = word * 0xCC9E2D51 & 0xFFFFFFFF
        state ^= (word << 15 | word >> 17) * 0x1B873593 & 0xFFFFFFFF
        last, state = state, ((state << 13 | state >> 19) & 0xFFFFFFFF) * 5 + 0xE6546B64 & 0xFFFFFFFF
    state = (last if rest else state) ^ len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    state = (state ^ state >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return state ^ state >> 16

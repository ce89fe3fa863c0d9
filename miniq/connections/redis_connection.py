# SPDX-License-Identifier: MIT
"""A conversation with one Redis server: handshake, commands, pipelines, scripts, pushes, errors.

A `Connection` is one socket, used by one thread at a time.  What leaves it unfinished (an error of
the line, garbage, a deadline, an exception from a signal) breaks it for good, so that an answer is
never taken for that of another command.

A handshake is one round trip: HELLO 3 with login and name, SELECT, and a PING because HELLO alone
does not tell that the server still loads its data.  Where HELLO is refused, as by some proxies, it
is AUTH and RESP2 instead.

Source: the command reference of redis.io; Redis 6.2 and later, Valkey.
"""

from __future__ import annotations

import hashlib
import os
import re
from time import monotonic
from typing import Any, Callable, List, NoReturn, Optional, Sequence, Tuple, Type, Union

from ..codecs.resp import NEED_DATA, Parser, ProtocolError, Push, ReplyError, encode, encode_many
from ..exceptions import ImproperlyConfigured, MiniqError, OperationalError
from ..text import truncate
from .redis_options import Endpoint, Options
from .stream import Stream

#: What a command is made of; text goes out as UTF-8.
Part = Union[bytes, str, int, float]

MIN_VERSION = (6, 2)
#: Pushes kept for `take_pushes` where nobody is called for each; one that reads none is broken then.
MAX_KEPT_PUSHES = 10_000

#: Commands whose answers are pushes in RESP3, and what these are called.
_SUBSCRIBING = frozenset(
    {b"subscribe", b"psubscribe", b"ssubscribe", b"unsubscribe", b"punsubscribe", b"sunsubscribe"}
)

# -- what the server's errors mean ---------------------------------------------------------------

#: The operator must act: code -> what to say.
_FOR_THE_OPERATOR = {
    "WRONGPASS": "check user and password in the URL",
    "NOAUTH": "the server wants a password: write redis://user:password@host or redis://:password@host",
    "NOPERM": "the server's access list does not allow this to the user of the URL",
    "WRONGTYPE": "another program uses this key: use another database or a global_keyprefix",
    **dict.fromkeys(
        ("MOVED", "ASK", "CROSSSLOT", "CLUSTERDOWN"),
        "this is a Redis Cluster, which miniq does not speak; use a single server or sentinel",
    ),
}
#: The same for errors without a code of their own: how the text begins -> what to say.
_ERR_FOR_THE_OPERATOR = {
    "ERR DB index is out of range": "the server has fewer databases: use a lower number in the URL",
    "ERR invalid DB index": "use a database number that the server has",
    "ERR unknown command": "the server is too old, or the command is renamed or forbidden there",
    "ERR AUTH <password> called without any password": "take the password out of the URL",
    "ERR SELECT is not allowed in cluster mode": _FOR_THE_OPERATOR["MOVED"],
}
#: Trying again may help, and what to say; every code that is not listed is taken as such too.
_PASSING = {
    "LOADING": "the server has just started and reads its data",
    "READONLY": "this server is a replica: the master moved",
    "MASTERDOWN": "this server is a replica that has lost its master",
    "BUSY": "a script runs too long there",
    "OOM": "the server's memory is full (maxmemory)",
    "MISCONF": "the server cannot save to its disk",
    "NOREPLICAS": "the server has too few replicas to take writes",
}
#: After these another connection, perhaps to another server, has better chances.
_LEAVE = frozenset({"READONLY", "LOADING", "MASTERDOWN", "NOAUTH", "CLUSTERDOWN"})
#: Redis 6.2 wraps an error inside of a script into one of the script.
_IN_SCRIPT = re.compile(r"ERR Error running script .*?: -?([A-Z]{3,}) ")


#: A server, or a proxy before it, that leaves us RESP2.
_HELLO_REFUSED = re.compile("NOPROTO|NOPERM|ERR unknown command")


class Script:
    """A Lua script, sent by its hash and only once as text."""

    __slots__ = ("source", "sha")

    def __init__(self, source: str) -> None:
        self.source = source
        # What Redis names scripts by; no protection of anything.
        self.sha = hashlib.sha1(source.encode()).hexdigest()


class Connection:
    """A conversation with one server, in one database.  `Server` makes them.

    Errors of `call` and `run`: `OperationalError` where trying again may help, `ImproperlyConfigured`
    where the operator must act; the server's `ReplyError` is their ``__cause__``.  `timeout_s` is for
    all of a call, None = the option ``socket_timeout``.  Once `broken`, it stays so: `close` it.
    (It also is while a command is under way: wherever a signal's exception strikes, what it leaves
    unfinished cannot be used.)

    Pushes go to `on_push` as they are met, which must not use the connection; without one they are
    kept for `take_pushes`.  `pushes` is
    False where the server speaks RESP2 only: then only a connection that does nothing but subscribe
    (`send`, `take_pushes`) gets messages.
    """

    __slots__ = (
        "url", "name", "broken", "pushes", "on_push", "server_version", "role", "idle_since_mono", "pid",
        "_reason", "_stream", "_parser", "_timeout_s", "_kept", "_subscribed", "__weakref__",
    )  # fmt: skip

    def __init__(self, stream: Stream, url: str, timeout_s: float) -> None:
        self.url = url
        self.name = ""
        self.broken = False
        self.pushes = False
        self.on_push: Optional[Callable[[Push], Any]] = None
        self.server_version: Tuple[int, ...] = ()
        self.role = ""
        self.idle_since_mono = 0.0
        self.pid = os.getpid()
        self._reason = ""
        self._stream = stream
        self._parser = Parser()
        self._timeout_s = timeout_s
        self._kept: List[Push] = []
        self._subscribed = False

    # -- commands

    def call(self, *parts: Part, timeout_s: Optional[float] = None) -> Any:
        """Run one command and return its reply.

        For SUBSCRIBE and its kin, with RESP3, that is the last confirmation.
        """
        data = encode(*parts)
        if self.broken:
            raise self._is_broken()
        deadline_mono = monotonic() + self._timeout_s if timeout_s is None else self._until(timeout_s)
        stream, parser = self._stream, self._parser
        self.broken = True
        try:
            stream.send(data, deadline_mono)
            parser.feed(stream.recv(deadline_mono))
            reply = parser.get()
            if reply is NEED_DATA or type(reply) is Push:
                reply = self._next_reply(reply, parts, deadline_mono)
            if self.on_push is not None:
                self._drain()
        except BaseException as error:
            self._fail(error, parts[0])
        self.broken = False
        if type(reply) is ReplyError:
            raise self.translated(reply, parts[0]) from reply
        return reply

    def pipeline(self, commands: Sequence[Sequence[Part]], *, timeout_s: Optional[float] = None) -> List[Any]:
        """Send all commands in one write and return all replies; errors stay in the list.

        What a `ReplyError` in it means tells `translated`.
        """
        data = encode_many(commands)
        wanted = len(commands)
        if self.broken:
            raise self._is_broken()
        deadline_mono = self._until(timeout_s)
        replies: List[Any] = []
        stream, parser = self._stream, self._parser
        get = parser.get
        self.broken = True
        try:
            if wanted:
                stream.send(data, deadline_mono)
            while len(replies) < wanted:
                parser.feed(stream.recv(deadline_mono))
                while True:
                    reply = get()
                    if reply is NEED_DATA:
                        break
                    if type(reply) is Push:
                        self._pushed(reply)
                    else:
                        replies.append(reply)
            if len(replies) > wanted:
                raise ProtocolError(f"{len(replies)} replies for {wanted} commands")
        except BaseException as error:
            told = f"{wanted} commands, the first {_shown(commands[0][0])}" if wanted else ""
            if replies and type(replies[-1]) is ReplyError:  # perhaps why it closed the connection
                told += f"; the last answer: {truncate(replies[-1].text, 200)}"
            self._fail(error, told)
        self.broken = False
        return replies

    def run(
        self,
        script: Script,
        keys: Sequence[Part],
        args: Sequence[Part] = (),
        *,
        timeout_s: Optional[float] = None,
    ) -> Any:
        """Run a script and return its reply; the text is sent only if the server does not know it."""
        try:
            return self.call("EVALSHA", script.sha, len(keys), *keys, *args, timeout_s=timeout_s)
        except OperationalError as error:
            cause = error.__cause__
            if not isinstance(cause, ReplyError) or cause.code != "NOSCRIPT":
                raise
        return self.call("EVAL", script.source, len(keys), *keys, *args, timeout_s=timeout_s)

    # -- pushes

    def send(self, commands: Sequence[Sequence[Part]], *, timeout_s: Optional[float] = None) -> None:
        """Send commands whose answers are pushes (SUBSCRIBE and its kin) and return at once.

        They come as all pushes do.  With RESP2 that is the end of `call` on this connection.
        """
        data = encode_many(commands)
        if self.broken:
            raise self._is_broken()
        deadline_mono = self._until(timeout_s)
        self._subscribed = not self.pushes
        self.broken = True
        try:
            self._stream.send(data, deadline_mono)
        except BaseException as error:
            self._fail(error, commands[0][0])
        self.broken = False

    def take_pushes(self) -> List[Push]:
        """Read what has arrived, without waiting; return the pushes that were kept.

        With `on_push` that is called for each, and nothing is returned.  Raises `OperationalError`
        when the server has closed the connection.
        """
        if self.broken:
            raise self._is_broken()
        stream = self._stream
        self.broken = True
        try:
            self._drain()
            # A peer that never stops must not keep us here: the rest is for the next turn.
            for _ in range(16):
                data = stream.recv_ready()
                if not data:
                    break
                self._parser.feed(data)
                self._drain()
        except BaseException as error:
            self._fail(error, "reading pushes")
        self.broken = False
        kept, self._kept = self._kept, []
        return kept

    def _next_reply(self, reply: Any, parts: Sequence[Part], deadline_mono: float) -> Any:
        """Go on reading until a reply is there which is no push."""
        stream, parser = self._stream, self._parser
        unconfirmed = 0
        if _shown(parts[0]).lower().encode() in _SUBSCRIBING:
            unconfirmed = max(len(parts) - 1, 1)
        while True:
            if reply is NEED_DATA:
                parser.feed(stream.recv(deadline_mono))
            elif type(reply) is Push:
                self._pushed(reply)
                if unconfirmed and reply[0] in _SUBSCRIBING:
                    unconfirmed -= 1
                    if not unconfirmed:
                        return reply
            else:
                return reply
            reply = parser.get()

    def _drain(self) -> None:
        """Hand out the pushes that were fed already; anything else there is nobody's answer."""
        get = self._parser.get
        while True:
            reply = get()
            if reply is NEED_DATA:
                return
            if type(reply) is Push:
                self._pushed(reply)
            elif self._subscribed and isinstance(reply, list):
                self._pushed(Push(reply))
            elif type(reply) is ReplyError:
                raise self.translated(reply, "unasked")
            else:
                raise ProtocolError("a reply that nobody asked for")

    def _pushed(self, push: Push) -> None:
        if self.on_push is not None:
            self.on_push(push)
        elif len(self._kept) >= MAX_KEPT_PUSHES:
            raise OperationalError(f"{self.url}: {MAX_KEPT_PUSHES} pushes came and nobody took them")
        else:
            self._kept.append(push)

    # -- state

    def fileno(self) -> int:
        """Return the descriptor, for an event loop; it is valid until `close`, broken or not."""
        return self._stream.fileno()

    def has_input(self) -> bool:
        """Say whether something came, or the server closed: `take_pushes` then tells."""
        return self.broken or self._stream.has_input()

    def break_off(self, reason: str) -> None:
        """Never use it again; the descriptor stays valid until `close`."""
        if not self._reason:
            self.broken = True
            self._reason = reason
            if self.pid == os.getpid():  # in a forked child the conversation is still the parent's
                self._stream.shut_down()

    def close(self) -> None:
        """Close it; may be called again."""
        self.broken = True
        self._reason = self._reason or "it was closed"
        self._stream.close()

    def _until(self, timeout_s: Optional[float]) -> float:
        """Return the deadline; raises where it is over already, which need not break the connection."""
        if timeout_s is None:
            timeout_s = self._timeout_s
        elif timeout_s <= 0:
            raise OperationalError(f"{self.url}: no time was left for the command")
        return monotonic() + timeout_s

    def _is_broken(self) -> OperationalError:
        reason = self._reason or "it was left, or is used, in the middle of a command"
        return OperationalError(f"{self.url}: this connection is of no more use: {reason}")

    def _fail(self, error: BaseException, command: Part) -> NoReturn:
        """Break the connection off because of `error` and raise it, with the command's name."""
        inherited = self.pid != os.getpid()
        reason = "it was inherited through a fork" if inherited else str(error) or repr(error)
        self.break_off(truncate(reason, 300))
        if inherited:
            raise self._is_broken() from error
        if isinstance(error, ProtocolError):
            raise OperationalError(
                f"{self.url}: {_shown(command)}: the answer is not Redis' protocol: {error}"
            ) from error
        if isinstance(error, (OperationalError, ImproperlyConfigured)):
            raise type(error)(f"{error} ({_shown(command)})") from error
        raise error

    def translated(self, reply: ReplyError, command: Part = "") -> MiniqError:
        """Return miniq's error for one of the server's; its text says what to do.

        Breaks the connection off where another one has better chances, as on a replica.
        """
        code, text = reply.code, reply.text
        inner = _IN_SCRIPT.match(text) if code == "ERR" else None
        if inner:
            code = inner.group(1)
        hint = _FOR_THE_OPERATOR.get(code, "")
        if code == "ERR":
            hint = next((told for start, told in _ERR_FOR_THE_OPERATOR.items() if text.startswith(start)), "")
        kind: Type[MiniqError] = ImproperlyConfigured if hint else OperationalError
        hint = hint or _PASSING.get(code, "")
        if code in _LEAVE:
            self.break_off(truncate(text, 300))
        what = f"{_shown(command)}: " if command else ""
        return kind(f"{self.url}: {what}{truncate(text, 300)}{f' ({hint})' if hint else ''}")

    # -- the beginning

    @classmethod
    def open(
        cls, stream: Stream, endpoint: Endpoint, options: Options, name: str, deadline_mono: float
    ) -> "Connection":
        """Shake hands over `stream`; it is closed if that fails."""
        self = cls(stream, endpoint.url, options.socket_timeout)
        try:
            self._shake_hands(endpoint, _client_name(name or options.client_name), deadline_mono)
        except BaseException:
            self.close()
            raise
        return self

    def _shake_hands(self, endpoint: Endpoint, name: str, deadline_mono: float) -> None:
        login: List[Part] = []
        if endpoint.password is not None:
            login = ["AUTH", endpoint.username or "default", endpoint.password]
        commands: List[List[Part]] = [["HELLO", 3, *login, *(["SETNAME", name] if name else [])]]
        commands += [["SELECT", endpoint.db]] if endpoint.db else []
        commands += [["PING"]]
        replies = self.pipeline(commands, timeout_s=left_until(deadline_mono))
        hello = replies[0]
        if isinstance(hello, ReplyError) and _HELLO_REFUSED.match(hello.text):
            self._shake_hands_in_resp2(endpoint, name, deadline_mono)
            return
        self._raise_first(commands, replies)
        if not isinstance(hello, dict):
            shown = truncate(repr(hello), 100)
            raise OperationalError(f"{self.url}: HELLO: no Redis answers like this: {shown}")
        self.pushes = True
        self.server_version = _version(hello.get(b"version"))
        self.role = text_of(hello.get(b"role"))
        self.name = name
        self._check_version()

    def _shake_hands_in_resp2(self, endpoint: Endpoint, name: str, deadline_mono: float) -> None:
        commands: List[List[Part]] = []
        if endpoint.password is not None:
            user: List[Part] = [endpoint.username] if endpoint.username else []
            commands += [["AUTH", *user, endpoint.password]]
        commands += [["SELECT", endpoint.db]] if endpoint.db else []
        commands += [["PING"]]
        asked = len(commands)
        commands += [["INFO", "server"], ["ROLE"]]
        commands += [["CLIENT", "SETNAME", name]] if name else []
        replies = self.pipeline(commands, timeout_s=left_until(deadline_mono))
        self._raise_first(commands, replies[:asked])
        info, role = replies[asked : asked + 2]
        # What the server does not tell us, perhaps because it must not, is taken to be in order.
        found = re.search(rb"(?m)^redis_version:([^\r\n]+)", info) if isinstance(info, bytes) else None
        self.server_version = _version(found.group(1)) if found else MIN_VERSION
        self.role = text_of(role[0]) if isinstance(role, list) and role else ""
        self.name = name
        self._check_version()

    def _raise_first(self, commands: Sequence[Sequence[Part]], replies: Sequence[Any]) -> None:
        for command, reply in zip(commands, replies):
            # A PING is refused for reasons that concern writers too; whether to write is not decided here.
            if isinstance(reply, ReplyError) and (command[0] != "PING" or reply.code in _LEAVE):
                raise self.translated(reply, command[0]) from reply

    def _check_version(self) -> None:
        if self.server_version < MIN_VERSION:
            found = ".".join(map(str, self.server_version)) or "unknown"
            raise ImproperlyConfigured(
                f"{self.url}: the server's version is {found}; miniq needs 6.2 or later"
            )


def _shown(command: Part) -> str:
    text = command.decode("utf-8", "replace") if isinstance(command, bytes) else str(command)
    return truncate(text, 100)


def text_of(value: Any) -> str:
    """Return a string reply as text, ``""`` for any other reply."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else ""


def _version(value: Any) -> Tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text_of(value))[:3])


def left_until(deadline_mono: float) -> float:
    """Return the seconds until a deadline; below 0 when it is over."""
    return deadline_mono - monotonic()


def _client_name(name: str) -> str:
    """Return a name as CLIENT SETNAME takes it: visible ASCII without spaces."""
    return re.sub(r"[^!-~]", "-", name)

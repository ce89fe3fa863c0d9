# SPDX-License-Identifier: MIT
"""One stream socket, TCP, Unix or TLS: blocking, with deadlines, used by one thread at a time.

The socket keeps a time limit of its own, and every `send` and `recv` brings a deadline.  The limit
is set anew only where it is more than 2 % from what is left until the deadline: in a series of
quick commands with one timeout that is never, while a peer that dribbles byte by byte still meets
the deadline.  (Receive timeouts of the kernel would save a `poll` of 0.5 us, but begin again with
every signal: a program with an interval timer would wait forever for a peer that is silent.)

After an error the socket is shut down but its descriptor stays valid until `close`, so that an
event loop can stop watching it before its number means something else.  In a forked child all
inherited streams are closed without a word: closing a descriptor there says nothing to the peer.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from time import monotonic
from typing import TYPE_CHECKING, Any, List, NamedTuple, Optional, Tuple, Union

from ..exceptions import ImproperlyConfigured, MiniqError, OperationalError
from .forks import close_in_children

if TYPE_CHECKING:
    import ssl

#: Most bytes taken from the socket at once.
RECV_BYTES = 65536
#: Most bytes given to a slow socket at once, and the size of a record of TLS.
SEND_BYTES = 16384
#: A peer that answers no probe, or takes nothing of what was sent, for about 20 s is gone.
KEEPALIVE_IDLE_S = 10
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 2
SENT_UNANSWERED_MS = 20_000

#: ``(host, port)``, or the path of a Unix socket.
Address = Union[Tuple[str, int], str]


class TLS(NamedTuple):
    """How to speak TLS; the peer's certificate and name are verified unless that is turned off.

    `cert_reqs` is "required", "optional" or "none".  `ca_certs` and `ca_path` are a file and a folder,
    `ca_data` is PEM text; without any, the system's authorities count.  `certfile` and `keyfile` are ours.
    """

    cert_reqs: str = "required"
    ca_certs: Optional[str] = None
    ca_path: Optional[str] = None
    ca_data: Optional[str] = None
    certfile: Optional[str] = None
    keyfile: Optional[str] = None
    password: Optional[str] = None
    check_hostname: bool = True
    ciphers: Optional[str] = None


def tls_context(tls: TLS) -> "ssl.SSLContext":
    """Return a context for `tls`; `ImproperlyConfigured` names a file that cannot be used.

    Made for each connection, so that certificates which were renewed on the disk are used.
    """
    import ssl  # 2 MB and 15 ms, for those who use TLS

    try:
        context = ssl.create_default_context(
            cafile=tls.ca_certs or None, capath=tls.ca_path or None, cadata=tls.ca_data or None
        )
        if tls.certfile:
            # Without a password given, OpenSSL would ask at the terminal for that of an encrypted key.
            context.load_cert_chain(tls.certfile, tls.keyfile or None, tls.password or "")
        if tls.ciphers:
            context.set_ciphers(tls.ciphers)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        named = {
            "ca_certs": tls.ca_certs, "ca_path": tls.ca_path, "certfile": tls.certfile,
            "keyfile": tls.keyfile, "ciphers": tls.ciphers,
        }  # fmt: skip
        given = ", ".join(f"{name}={value!r}" for name, value in named.items() if value)
        raise ImproperlyConfigured(f"TLS: cannot use {given or 'ca_data'}: {error}") from error
    context.check_hostname = tls.check_hostname and tls.cert_reqs != "none"
    modes = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
    context.verify_mode = modes[tls.cert_reqs]
    return context


class Stream:
    """A connected socket.  Make it with `connect`.

    Every method raises `OperationalError` when the peer is gone or the deadline over, and
    `ImproperlyConfigured` where TLS was refused for a reason that will not pass; the text begins
    with `name`.  After that the stream is of no more use: `shut_down` and `close` it.
    """

    __slots__ = ("name", "_socket", "_limit_s", "_fd", "_poll", "_is_tls", "__weakref__")

    def __init__(self, connected: socket.socket, name: str) -> None:
        self.name = name
        self._socket = connected
        self._limit_s: float = connected.gettimeout() or 0.0
        self._is_tls = hasattr(connected, "pending")
        #: For plain writes, -1 where these need the socket's own methods.
        self._fd = -1 if self._is_tls or os.name != "posix" else connected.fileno()
        self._poll: Any = None
        if hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(connected, select.POLLIN)
        close_in_children(self)

    @classmethod
    def connect(
        cls,
        address: Address,
        deadline_mono: float,
        name: str = "",
        tls: Optional[TLS] = None,
        keepalive: bool = True,
        keepalive_options: Tuple[Tuple[int, int], ...] = (),
    ) -> "Stream":
        """Connect, with TLS its handshake too; `name` is how errors call the peer.

        The addresses of a host are tried one after the other, each with its share of the time.
        (Only the look-up of a host's name knows no deadline but the system's own.)
        """
        name = name or (address if isinstance(address, str) else f"{address[0]}:{address[1]}")
        context = tls_context(tls) if tls else None
        failure: Optional[BaseException] = None
        try:
            found = _look_up(address)
        except OSError as error:
            raise OperationalError(f"{name}: the host's name cannot be looked up: {error}") from error
        for index, (family, target) in enumerate(found):
            left_s = (deadline_mono - monotonic()) / (len(found) - index)
            if left_s <= 0:
                break
            connecting = socket.socket(family, socket.SOCK_STREAM)
            try:
                connecting.settimeout(left_s)
                connecting.connect(target)
                if family != getattr(socket, "AF_UNIX", None):
                    _tune(connecting, keepalive, keepalive_options)
                if context is not None:
                    connecting.settimeout(max(deadline_mono - monotonic(), 0.001))
                    connecting = context.wrap_socket(
                        connecting, server_hostname=str(address[0]), do_handshake_on_connect=False
                    )
                    connecting.do_handshake()
                return cls(connecting, name)
            except (OSError, ValueError) as error:  # ValueError: a host that no certificate can name
                connecting.close()
                failure = error
                if isinstance(error, ValueError) or _is_for_the_operator(error):
                    break
            except BaseException:
                connecting.close()
                raise
        if failure is None:
            raise OperationalError(f"{name}: no connection, the time for it was over")
        raise _translated(name, failure, "no connection") from failure

    # -- sending and receiving

    def send(self, data: bytes, deadline_mono: float) -> None:
        """Hand all of `data` to the system."""
        left_s = deadline_mono - monotonic()
        limit_s = self._limit_s
        if not limit_s * 0.98 <= left_s <= limit_s:
            self._limit(left_s, "sending")
        try:
            if self._fd >= 0:
                # Saves the `poll` before each `send`: a command nearly always fits into the buffer.
                sent = os.write(self._fd, data)
                if sent == len(data):
                    return
                data = data[sent:]
        except BlockingIOError:
            pass
        except OSError as error:
            raise _translated(self.name, error, "sending") from error
        self._send_slowly(data, deadline_mono)

    def _send_slowly(self, data: bytes, deadline_mono: float) -> None:
        """Send `data` piece by piece, as the peer takes it."""
        try:
            with memoryview(data) as left:
                at = 0
                while at < len(left):
                    self._limit(deadline_mono - monotonic(), "sending")
                    # In pieces: TLS gives the whole time to each record of what it gets at once.
                    at += self._socket.send(left[at : at + SEND_BYTES])
        except OSError as error:
            raise _translated(self.name, error, "sending") from error

    def recv(self, deadline_mono: float) -> bytes:
        """Wait for bytes and return what is there, never ``b""``: the peer's end is an error."""
        left_s = deadline_mono - monotonic()
        limit_s = self._limit_s
        if not limit_s * 0.98 <= left_s <= limit_s:
            self._limit(left_s, "waiting for the answer")
        try:
            data = self._socket.recv(RECV_BYTES)
        except OSError as error:
            raise _translated(self.name, error, "waiting for the answer") from error
        if not data:
            raise OperationalError(f"{self.name}: the server closed the connection")
        return data

    def recv_ready(self) -> bytes:
        """Return what has arrived, ``b""`` where nothing has; never waits."""
        try:
            self._limit_s = 0.0  # so that the next call sets one, whatever happens here
            self._socket.settimeout(0)
            data = self._socket.recv(RECV_BYTES)
        except BlockingIOError:
            return b""
        except OSError as error:
            if type(error).__name__ in ("SSLWantReadError", "SSLWantWriteError"):  # ssl may not be loaded
                return b""
            raise _translated(self.name, error, "reading") from error
        if not data:
            raise OperationalError(f"{self.name}: the server closed the connection")
        return data

    def has_input(self) -> bool:
        """Say whether there is something to read: bytes, or the peer's end."""
        if self._is_tls and self.pending:
            return True
        if self._poll is not None:
            return bool(self._poll.poll(0))
        return bool(select.select([self._socket], [], [], 0)[0])

    @property
    def pending(self) -> int:
        """How many bytes TLS has decrypted that nobody took: no selector tells of them."""
        return self._socket.pending() if self._is_tls else 0  # type: ignore[attr-defined]

    def fileno(self) -> int:
        """Return the descriptor; it is valid until `close`."""
        return self._socket.fileno()

    def _limit(self, left_s: float, doing: str) -> None:
        if left_s <= 0:
            raise OperationalError(f"{self.name}: {doing}: the time for it was over")
        # A little more than is left: the next call with the same timeout will do with it.
        self._limit_s = left_s * 1.01
        try:
            self._socket.settimeout(self._limit_s)
        except OSError as error:
            raise OperationalError(f"{self.name}: this connection is closed") from error

    # -- the end

    def shut_down(self) -> None:
        """End the conversation; the descriptor stays valid, and readable, until `close`."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was first, or it is closed

    def close(self) -> None:
        """Close the descriptor; may be called again."""
        self._fd = -1  # the number may soon be another file's
        self._socket.close()

    def __del__(self) -> None:
        connected: Optional[socket.socket] = getattr(self, "_socket", None)
        if connected is not None:
            connected.close()


# -- making a socket -----------------------------------------------------------------------------


def _look_up(address: Address) -> List[Tuple[int, Any]]:
    """Return ``[(family, what to connect to), ...]``."""
    if isinstance(address, str):
        family = getattr(socket, "AF_UNIX", None)
        if family is None:
            raise ImproperlyConfigured(f"unix socket {address!r}: this system has none; use TCP")
        return [(family, address)]
    try:
        found = socket.getaddrinfo(address[0], address[1], type=socket.SOCK_STREAM)
    except UnicodeError as error:  # labels of a host name that are empty or too long
        raise ImproperlyConfigured(f"host {address[0]!r} is no host's name: {error}") from error
    return [(int(family), target) for family, _, _, _, target in found]


def _tune(connected: socket.socket, keepalive: bool, options: Tuple[Tuple[int, int], ...]) -> None:
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wanted = {"TCP_USER_TIMEOUT": SENT_UNANSWERED_MS}
    if keepalive:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        wanted.update(
            TCP_KEEPIDLE=KEEPALIVE_IDLE_S, TCP_KEEPALIVE=KEEPALIVE_IDLE_S, TCP_KEEPINTVL=KEEPALIVE_INTERVAL_S,
            TCP_KEEPCNT=KEEPALIVE_PROBES,
        )  # fmt: skip
    for option, value in wanted.items():
        number = getattr(socket, option, None)
        if number is not None:
            connected.setsockopt(socket.IPPROTO_TCP, number, value)
    for number, value in options:
        connected.setsockopt(socket.IPPROTO_TCP, number, value)


# -- errors --------------------------------------------------------------------------------------

_REASONS = {
    errno.ECONNREFUSED: "connection refused, no server listens there",
    errno.ECONNRESET: "the server closed the connection",
    errno.EPIPE: "the server closed the connection",
    errno.ENOENT: "there is no such socket, is the server running?",
}


#: Parts of OpenSSL's names for failures that no second attempt mends.
_REASONS_TO_STAY = (
    "CERT", "UNKNOWN_CA", "WRONG_VERSION", "PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "NO_SHARED_CIPHER",
    "HANDSHAKE_FAILURE",
)  # fmt: skip


def _translated(name: str, error: BaseException, doing: str) -> MiniqError:
    """Return miniq's error for one of the system's."""
    if isinstance(error, socket.timeout):
        return OperationalError(f"{name}: {doing}: the time for it was over")
    if _is_for_the_operator(error):
        return ImproperlyConfigured(f"{name}: TLS failed: {_tls_reason(error)}")
    reason = _REASONS.get(getattr(error, "errno", None) or 0) or str(error) or type(error).__name__
    return OperationalError(f"{name}: {doing}: {reason}")


def _is_for_the_operator(error: BaseException) -> bool:
    """Say whether TLS failed for a reason which time does not heal: certificates, versions."""
    reason = getattr(error, "reason", None)  # only errors of ssl have it; None where the line broke
    return isinstance(error, ValueError) or (
        isinstance(reason, str) and any(word in reason for word in _REASONS_TO_STAY)
    )


def _tls_reason(error: BaseException) -> str:
    text = str(error)
    reason = getattr(error, "reason", "")
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        told = getattr(error, "verify_message", "") or text
        return f"the server's certificate was not accepted ({told}); name its authority with ssl_ca_certs"
    if "WRONG_VERSION" in reason:
        return f"the server does not speak TLS there ({text}); check the port, or use the scheme without TLS"
    if "CERT" in reason or "HANDSHAKE" in reason:
        return f"the server refused us ({text}); does it want a certificate (ssl_certfile, ssl_keyfile)?"
    return text

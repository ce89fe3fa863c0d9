# SPDX-License-Identifier: MIT
"""A TCP proxy on the loopback, for tests of what networks do to connections.

One thread with non-blocking sockets owns everything.  The methods hand it a function and wait until
it has run: what a method says is so when it returns.  (Beside a second thread prefork pools do not
fork: the workers that a test sends through a proxy are processes of their own.)
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections import deque
from types import TracebackType
from typing import Callable, Deque, List, NamedTuple, Optional, Set, Tuple, Type, TypeVar
from urllib.parse import urlsplit

from servers import HOST, free_port

T = TypeVar("T")
#: A side that sends more than this, while the other side does not take it, has to wait.
MAX_PENDING_BYTES = 1 << 20
#: Seconds for the thread to do what it is told, or for the target to accept a connection.
TIMEOUT_S = 10.0


class Peer(NamedTuple):
    """A connection through the proxy: `up` bytes went to the server and `down` bytes to the client."""

    client_port: int
    up: int
    down: int
    silent: bool


class Proxy:
    """Listens on `port` and forwards to `target_port`, both on 127.0.0.1, from the start on.

    `accepted` counts all connections, `up` and `down` all bytes, those of ended connections too.
    Setting `target_port` sends new connections elsewhere.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = free_port()
        self.accepted = self.up = self.down = 0
        self._links: Set[_Link] = set()
        self._delay_s = 0.0
        self._dribble_pause_s: Optional[float] = None
        self._listener: Optional[socket.socket] = None
        self._admit()
        self._orders: Deque[Callable[[], None]] = deque()
        self._alarm, self._waker = socket.socketpair()
        self._running = True
        self._thread = threading.Thread(target=self._run, name=f"proxy on port {self.port}", daemon=True)
        self._thread.start()

    def url(self, url: str) -> str:
        """Return the server's `url` with the proxy's port."""
        parts = urlsplit(url)
        assert parts.port == self.target_port, f"{self} does not forward to {url}"
        login, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{login}{at}{HOST}:{self.port}").geturl()

    @property
    def connections(self) -> List[Peer]:
        """The connections that are open now, the oldest first."""
        return self._have(lambda: [link.peer for link in sorted(self._links, key=lambda link: link.number)])

    def forward(self) -> None:
        """End all faults: new connections are accepted, bytes flow at once, in silent connections too."""
        self._have(self._forward)

    def black_hole(self) -> None:
        """Pass nothing any more in the connections there are, nor their end; new ones are not concerned."""
        self._have(self._silence)

    def reset(self) -> None:
        """Break all connections (RST, to both sides); new ones are not concerned."""
        self._have(lambda: self._drop_all(reset=True))

    def close(self) -> None:
        """Close all connections in good order (FIN, to both sides); new ones are not concerned."""
        self._have(lambda: self._drop_all(reset=False))

    def refuse(self) -> None:
        """Refuse new connections, as where no server runs; those there are go on."""
        self._have(self._refuse)

    def dribble(self, pause_s: float = 0.0) -> None:
        """Pass the bytes one by one, `pause_s` apart, in both directions."""
        self._have(lambda: setattr(self, "_dribble_pause_s", pause_s))

    def delay(self, delay_s: float) -> None:
        """Pass what comes from now on `delay_s` later, in both directions."""
        self._have(lambda: setattr(self, "_delay_s", delay_s))

    def stop(self) -> None:
        """Close everything and end the thread; nothing happens the second time."""
        if self._running:
            self._have(lambda: setattr(self, "_running", False))
            self._thread.join(TIMEOUT_S)
            assert not self._thread.is_alive(), f"{self} did not end"

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Proxy from port {self.port} to {self.target_port}>"

    def _have(self, function: Callable[[], T]) -> T:
        """Have the thread call a function; return what that returns."""
        assert self._running, f"{self} was stopped"
        found: List[T] = []
        done = threading.Event()

        def order() -> None:
            found.append(function())
            done.set()

        self._orders.append(order)
        self._waker.send(b"!")
        assert done.wait(TIMEOUT_S), f"{self} does not do what it is told"
        return found[0]

    # All that follows runs in the thread.

    def _run(self) -> None:
        while self._running:
            self._turn()
        self._drop_all(reset=False)
        self._refuse()
        self._alarm.close()
        self._waker.close()

    def _turn(self) -> None:
        mono = time.monotonic()
        flows = [flow for link in self._links if not link.silent for flow in (link.up, link.down)]
        sources = {flow.source: flow for flow in flows if flow.takes_more}
        waiting = [flow for flow in flows if flow.pending]
        targets = {flow.target: flow for flow in waiting if flow.due_mono <= mono}
        wait_s = min((flow.due_mono - mono for flow in waiting if flow.due_mono > mono), default=None)
        listeners = [self._listener] if self._listener else []
        readable, writable, _ = select.select([self._alarm, *listeners, *sources], list(targets), [], wait_s)
        for source in readable:
            if source in sources:
                self._read(sources[source])
        for target in writable:
            self._write(targets[target])
        if self._listener in readable:
            self._accept()
        # Last, for it may close what else is readable.
        if self._alarm in readable:
            self._alarm.recv(1)
            self._orders.popleft()()

    def _read(self, flow: _Flow) -> None:
        if flow.link in self._links:
            try:
                flow.read(self._delay_s)
            except OSError:
                self._drop(flow.link, reset=True)

    def _write(self, flow: _Flow) -> None:
        link = flow.link
        if link not in self._links:
            return
        before = flow.passed
        try:
            flow.write(self._dribble_pause_s)
        except OSError:
            # One side broke the connection: the other shall see it broken too.
            self._drop(link, reset=True)
            return
        if flow is link.up:
            self.up += flow.passed - before
        else:
            self.down += flow.passed - before
        if link.up.ended and link.down.ended:
            self._drop(link, reset=False)

    def _accept(self) -> None:
        assert self._listener is not None
        client, address = self._listener.accept()
        self.accepted += 1
        try:
            server = socket.create_connection((HOST, self.target_port), TIMEOUT_S)
        except OSError:
            # Too late to refuse it.
            _close(client, reset=True)
            return
        self._links.add(_Link(self.accepted, address[1], client, server))

    def _admit(self) -> None:
        if not self._listener:
            self._listener = socket.create_server((HOST, self.port), backlog=128)

    def _refuse(self) -> None:
        if self._listener:
            self._listener.close()
            self._listener = None

    def _forward(self) -> None:
        self._admit()
        self._delay_s, self._dribble_pause_s = 0.0, None
        for link in self._links:
            link.silent = False
            link.up.hurry()
            link.down.hurry()

    def _silence(self) -> None:
        for link in self._links:
            link.silent = True

    def _drop_all(self, reset: bool) -> None:
        for link in list(self._links):
            self._drop(link, reset)

    def _drop(self, link: _Link, reset: bool) -> None:
        self._links.remove(link)
        _close(link.up.source, reset)
        _close(link.up.target, reset)


class _Link:
    """A client's socket and the one to the server, with the flows between them."""

    def __init__(self, number: int, client_port: int, client: socket.socket, server: socket.socket) -> None:
        self.number = number
        self.client_port = client_port
        self.silent = False
        for one in (client, server):
            one.setblocking(False)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.up = _Flow(self, client, server)
        self.down = _Flow(self, server, client)

    @property
    def peer(self) -> Peer:
        return Peer(self.client_port, self.up.passed, self.down.passed, self.silent)


class _Flow:
    """One direction of a connection: what was read and has to wait for its time or for room."""

    def __init__(self, link: _Link, source: socket.socket, target: socket.socket) -> None:
        self.link, self.source, self.target = link, source, target
        #: (when to pass it on, what); empty bytes are the end.
        self.pending: Deque[Tuple[float, memoryview]] = deque()
        self.passed = 0
        self.ended = False
        self._pending_bytes = 0
        self._end_read = False

    @property
    def takes_more(self) -> bool:
        return not self._end_read and self._pending_bytes < MAX_PENDING_BYTES

    @property
    def due_mono(self) -> float:
        return self.pending[0][0]

    def read(self, delay_s: float) -> None:
        try:
            data = self.source.recv(1 << 16)
        except BlockingIOError:
            return
        self._end_read = not data
        self._pending_bytes += len(data)
        self.pending.append((time.monotonic() + delay_s, memoryview(data)))

    def write(self, dribble_pause_s: Optional[float]) -> None:
        """Pass on the first piece, or its first byte."""
        due_mono, data = self.pending.popleft()
        if not data:
            self.target.shutdown(socket.SHUT_WR)
            self.ended = True
            return
        count = 0
        try:
            count = self.target.send(data if dribble_pause_s is None else data[:1])
        except BlockingIOError:
            pass  # no room after all
        self.passed += count
        self._pending_bytes -= count
        if count < len(data):
            due_mono = due_mono if dribble_pause_s is None else time.monotonic() + dribble_pause_s
            self.pending.appendleft((due_mono, data[count:]))

    def hurry(self) -> None:
        """Make all that waits for its time due now."""
        self.pending = deque((0.0, data) for _, data in self.pending)


def _close(one: socket.socket, reset: bool) -> None:
    if reset:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()

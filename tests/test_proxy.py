# SPDX-License-Identifier: MIT
"""The proxy that tests put between a client and a server: each fault is what it says."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Iterator, List

import pytest
from proxy import MAX_PENDING_BYTES, Peer, Proxy
from servers import HOST
from waiting import wait_until

#: Long enough that what comes at all has come; nothing is asserted to take less.
SILENCE_S = 0.05


class Echo:
    """A server that sends back what it gets; `peers` are its ends of the connections."""

    def __init__(self) -> None:
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        self.peers: List[socket.socket] = []
        self.ends: List[str] = []
        self._stopping = False
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            peer, _ = self._listener.accept()
            if self._stopping:
                peer.close()
                return
            self.peers.append(peer)
            self._threads.append(threading.Thread(target=self._serve, args=(peer,)))
            self._threads[-1].start()

    def _serve(self, peer: socket.socket) -> None:
        try:
            while True:
                data = peer.recv(4096)
                if not data:
                    self.ends.append("end")
                    return
                peer.sendall(data)
        except OSError as error:
            self.ends.append(type(error).__name__)
        finally:
            peer.close()

    def stop(self) -> None:
        self._stopping = True
        socket.create_connection((HOST, self.port)).close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.stop()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as one:
        yield one


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with connect(proxy) as peer:
        yield peer


def connect(proxy: Proxy) -> socket.socket:
    """Connect, and wait for the echo of one byte: then the server has accepted it too."""
    peer = socket.create_connection((HOST, proxy.port), 10)
    try:
        peer.sendall(b"+")
        assert read(peer, 1) == b"+"
    except BaseException:
        peer.close()
        raise
    return peer


def read(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = peer.recv(count - len(data))
        assert piece, f"the end after {data!r}"
        data += piece
    return data


def assert_silent(peer: socket.socket) -> None:
    peer.settimeout(SILENCE_S)
    with pytest.raises(OSError, match="timed out"):
        peer.recv(1)
    peer.settimeout(10)


def test_bytes_pass_in_both_directions_and_are_counted(proxy: Proxy, client: socket.socket) -> None:
    client.sendall(b"hello")
    assert read(client, 5) == b"hello"
    other = connect(proxy)
    port = client.getsockname()[1]
    assert proxy.connections == [Peer(port, 6, 6, False), Peer(other.getsockname()[1], 1, 1, False)]
    other.close()
    wait_until(lambda: len(proxy.connections) == 1, what="the end has passed")
    assert (proxy.accepted, proxy.up, proxy.down) == (2, 7, 7)


def test_more_than_its_buffers_passes_whole(client: socket.socket) -> None:
    data = os.urandom(3 * MAX_PENDING_BYTES)
    sender = threading.Thread(target=client.sendall, args=(data,))
    sender.start()
    assert read(client, len(data)) == data
    sender.join()


def test_end_of_one_direction_leaves_the_other_open(proxy: Proxy, client: socket.socket) -> None:
    client.sendall(b"last")
    client.shutdown(socket.SHUT_WR)
    assert read(client, 4) == b"last"
    assert client.recv(1) == b""
    wait_until(lambda: not proxy.connections, what="the connection is gone")


def test_black_hole_swallows_old_connections_only(echo: Echo, proxy: Proxy, client: socket.socket) -> None:
    proxy.black_hole()
    client.sendall(b"lost")
    echo.peers[0].sendall(b"gone")
    assert_silent(client)
    with connect(proxy) as other:
        other.sendall(b"heard")
        assert read(other, 5) == b"heard"
    assert proxy.connections[0] == Peer(client.getsockname()[1], up=1, down=1, silent=True)
    client.close()
    wait_until(lambda: len(proxy.connections) == 1, what="the new connection is gone, the silent one open")
    assert echo.ends == ["end"]
    proxy.forward()
    wait_until(lambda: not proxy.connections, what="the end of the old connection has passed too")


def test_healed_black_hole_passes_what_waited(proxy: Proxy, client: socket.socket) -> None:
    proxy.black_hole()
    client.sendall(b"late")
    assert_silent(client)
    proxy.forward()
    assert read(client, 4) == b"late"


def test_reset_breaks_both_sides(echo: Echo, proxy: Proxy, client: socket.socket) -> None:
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    wait_until(lambda: echo.ends == ["ConnectionResetError"], what=lambda: echo.ends)
    assert proxy.connections == []
    connect(proxy).close()


def test_reset_by_one_side_reaches_the_other(echo: Echo, proxy: Proxy, client: socket.socket) -> None:
    # What was not read when a socket is closed makes the kernel send a reset.
    client.sendall(b"x")
    wait_until(lambda: proxy.down == 2, what="the echo was sent")
    client.close()
    wait_until(lambda: echo.ends == ["ConnectionResetError"], what=lambda: echo.ends)


def test_close_ends_both_sides(echo: Echo, proxy: Proxy, client: socket.socket) -> None:
    proxy.close()
    assert client.recv(1) == b""
    wait_until(lambda: echo.ends == ["end"], what=lambda: echo.ends)
    connect(proxy).close()


def test_refuse_concerns_new_connections_only(proxy: Proxy, client: socket.socket) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    client.sendall(b"on")
    assert read(client, 2) == b"on"
    proxy.forward()
    connect(proxy).close()


def test_connection_is_reset_when_the_target_refuses(proxy: Proxy, echo: Echo) -> None:
    with socket.socket() as unheard:
        unheard.bind((HOST, 0))
        proxy.target_port = unheard.getsockname()[1]
        with pytest.raises(ConnectionError):
            connect(proxy)
    proxy.target_port = echo.port
    connect(proxy).close()


def test_dribble_passes_single_bytes(proxy: Proxy, client: socket.socket) -> None:
    proxy.dribble(pause_s=0.005)
    client.sendall(b"0123456789")
    pieces: List[bytes] = []
    while sum(map(len, pieces)) < 10:
        pieces.append(client.recv(10))
    assert b"".join(pieces) == b"0123456789"
    # A slow reader may find several; one that finds all at once had no dribbling proxy.
    assert len(pieces) > 1
    proxy.forward()
    client.sendall(b"x" * 100)
    assert read(client, 100) == b"x" * 100


def test_delay_comes_in_both_directions(proxy: Proxy, client: socket.socket) -> None:
    proxy.delay(0.05)
    start_mono = time.monotonic()
    client.sendall(b"a")
    assert read(client, 1) == b"a"
    assert time.monotonic() - start_mono >= 0.1
    proxy.delay(3600)
    client.sendall(b"b")
    assert_silent(client)
    proxy.forward()
    assert read(client, 1) == b"b"


def test_url_gets_the_port_of_the_proxy() -> None:
    with Proxy(6379) as proxy:
        url = proxy.url("redis://:p%40ss@127.0.0.1:6379/3?a=b")
        assert url == f"redis://:p%40ss@{HOST}:{proxy.port}/3?a=b"
        with pytest.raises(AssertionError, match="does not forward to"):
            proxy.url("redis://127.0.0.1:6380/3")


def test_stopped_proxy_leaves_no_thread_and_no_fd() -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    with socket.create_server((HOST, 0)) as target:
        before = threading.active_count(), open_files()
        for _ in range(3):
            proxy = Proxy(target.getsockname()[1])
            with socket.create_connection((HOST, proxy.port)):
                wait_until(lambda proxy=proxy: proxy.connections, what="accepted")  # type: ignore[misc]
                proxy.stop()
            proxy.stop()
            assert (threading.active_count(), open_files()) == before
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((HOST, proxy.port))

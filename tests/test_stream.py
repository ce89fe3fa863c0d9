# SPDX-License-Identifier: MIT
"""Streams over real sockets: deadlines, ends, TLS, signals and forks."""

from __future__ import annotations

import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
from peers import hold, listening
from servers import Certificates, certificates, free_port
from waiting import wait_until
from workers import environment

from miniq.connections.stream import TLS, Stream, tls_context
from miniq.exceptions import ImproperlyConfigured, OperationalError

HAS_UNIX = hasattr(socket, "AF_UNIX")


def soon(timeout_s: float = 10.0) -> float:
    return time.monotonic() + timeout_s


@pytest.fixture
def pair() -> Iterator[Any]:
    """A stream and the socket at its other end."""
    ours, theirs = socket.socketpair()
    stream = Stream(ours, "test://peer")
    yield stream, theirs
    stream.close()
    theirs.close()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"))


# -- connecting ----------------------------------------------------------------------------------


def test_connection_refused_is_an_operational_error_with_the_address() -> None:
    port = free_port()
    with pytest.raises(OperationalError, match=f"127.0.0.1:{port}: no connection: connection refused"):
        Stream.connect(("127.0.0.1", port), soon())


def test_all_addresses_of_a_host_are_tried() -> None:
    # Where localhost is ::1 first, nobody listens there.
    with listening(hold) as address:
        stream = Stream.connect(("localhost", address[1]), soon())
        assert stream.fileno() >= 0
        stream.close()


def test_impossible_host_name_is_for_the_operator() -> None:
    with pytest.raises(ImproperlyConfigured, match="no host's name"):
        Stream.connect(("x" * 80, 6379), soon())


def test_no_time_left_is_an_operational_error() -> None:
    with pytest.raises(OperationalError, match="time for it was over"):
        Stream.connect(("127.0.0.1", free_port()), soon(-1))


@pytest.mark.skipif(not HAS_UNIX, reason="no Unix sockets here")
def test_unix_socket_connects_and_a_missing_one_is_named(tmp_path: Path) -> None:
    with listening(lambda peer: peer.sendall(peer.recv(100)), tmp_path / "s") as address:
        stream = Stream.connect(str(address), soon())
        stream.send(b"hello", soon())
        assert stream.recv(soon()) == b"hello"
        stream.close()
    with pytest.raises(OperationalError, match="missing.*no such socket"):
        Stream.connect(str(tmp_path / "missing"), soon())


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPCNT"), reason="no such options here")
def test_dead_peers_are_noticed_by_the_system_too() -> None:
    with listening(hold) as address:
        stream = Stream.connect(address, soon(), keepalive_options=((socket.TCP_KEEPCNT, 7),))
        get = stream._socket.getsockopt
        assert get(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert get(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert get(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 7
        stream.close()
        stream = Stream.connect(address, soon(), keepalive=False)
        assert not stream._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        stream.close()


# -- deadlines -----------------------------------------------------------------------------------


def test_silent_peer_ends_at_the_deadline(pair: Any) -> None:
    stream, _ = pair
    began = time.monotonic()
    with pytest.raises(OperationalError, match="test://peer: waiting for .* time for it was over"):
        stream.recv(soon(0.1))
    assert time.monotonic() - began >= 0.1


def test_shorter_deadline_after_a_long_one_counts(pair: Any) -> None:
    stream, peer = pair
    peer.sendall(b"x")
    assert stream.recv(soon(60)) == b"x"
    with pytest.raises(OperationalError):
        stream.recv(soon(0.05))
    with pytest.raises(OperationalError):
        stream.recv(soon(-1))


def test_longer_deadline_after_a_short_one_counts(pair: Any) -> None:
    stream, peer = pair
    with pytest.raises(OperationalError):
        stream.recv(soon(0.01))
    timer = threading.Timer(0.1, peer.sendall, (b"late",))
    timer.start()
    assert stream.recv(soon()) == b"late"
    timer.join()


def test_dribbling_peer_does_not_move_the_deadline() -> None:
    def dribble(peer: socket.socket) -> None:
        while True:
            peer.sendall(b"x")
            time.sleep(0.01)

    with listening(dribble) as address:
        stream = Stream.connect(address, soon())
        deadline_mono = soon(0.2)
        with pytest.raises(OperationalError, match="time for it was over"):
            while time.monotonic() < deadline_mono + 5:
                stream.recv(deadline_mono)
        assert time.monotonic() < deadline_mono + 5
        stream.close()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals between threads here")
def test_signals_do_not_move_the_deadline(pair: Any) -> None:
    stream, _ = pair
    caught: List[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
    main, done = threading.main_thread().ident, threading.Event()
    assert main is not None

    def disturb() -> None:
        while not done.wait(0.02):
            signal.pthread_kill(main, signal.SIGUSR1)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        began = time.monotonic()
        with pytest.raises(OperationalError):
            stream.recv(soon(0.3))
        assert time.monotonic() - began < 5
        assert caught
    finally:
        done.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def test_peer_that_takes_nothing_ends_at_the_deadline(pair: Any) -> None:
    stream, _ = pair
    with pytest.raises(OperationalError, match="sending: the time for it was over"):
        stream.send(b"x" * 50_000_000, soon(0.1))


def test_slow_reader_gets_every_byte(pair: Any) -> None:
    stream, peer = pair
    data = os.urandom(3_000_000)
    got = bytearray()

    def read() -> None:
        while len(got) < len(data):
            got.extend(peer.recv(10_000))

    thread = threading.Thread(target=read)
    thread.start()
    stream.send(data, soon(60))
    thread.join()
    assert got == data


# -- reading without waiting, and the end --------------------------------------------------------


def test_recv_ready_never_waits_and_recv_goes_on_after_it(pair: Any) -> None:
    stream, peer = pair
    assert stream.recv_ready() == b""
    assert not stream.has_input()
    peer.sendall(b"now")
    assert stream.has_input()
    assert stream.recv_ready() == b"now"
    threading.Timer(0.05, peer.sendall, (b"later",)).start()
    assert stream.recv(soon()) == b"later"


@pytest.mark.parametrize("read", ["recv", "recv_ready"])
def test_end_of_the_peer_is_an_error(pair: Any, read: str) -> None:
    stream, peer = pair
    peer.close()
    assert stream.has_input()
    with pytest.raises(OperationalError, match="test://peer: the server closed the connection"):
        stream.recv(soon()) if read == "recv" else stream.recv_ready()


def test_sending_to_a_closed_peer_is_an_error(pair: Any) -> None:
    stream, peer = pair
    peer.close()
    with pytest.raises(OperationalError, match="sending: the server closed the connection"):
        stream.send(b"x", soon())


def test_descriptor_stays_valid_and_readable_until_close(pair: Any) -> None:
    stream, peer = pair
    descriptor = stream.fileno()
    stream.shut_down()
    stream.shut_down()
    assert stream.fileno() == descriptor
    assert select.select([stream], [], [], 0)[0]
    assert peer.recv(1) == b""
    stream.close()
    stream.close()
    assert stream.fileno() == -1


def test_closed_stream_writes_into_no_other_file(pair: Any, tmp_path: Path) -> None:
    stream, _ = pair
    descriptor = stream.fileno()
    stream.close()
    with open(tmp_path / "other", "wb") as other:
        # The new file may have got the number already; if not, it gets it now.
        moved = other.fileno() if other.fileno() == descriptor else os.dup2(other.fileno(), descriptor)
        with pytest.raises(OperationalError, match="closed"):
            stream.send(b"secret", soon())
        if moved != other.fileno():
            os.close(moved)
    assert (tmp_path / "other").read_bytes() == b""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_closes_its_copy_and_the_parent_goes_on(pair: Any) -> None:
    stream, peer = pair
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert stream.fileno() == -1
            try:
                stream.send(b"from the child", soon())
            except OperationalError:
                code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    stream.send(b"from the parent", soon())
    assert peer.recv(100) == b"from the parent"
    peer.sendall(b"answer")
    assert stream.recv(soon()) == b"answer"


# -- TLS -----------------------------------------------------------------------------------------


@pytest.fixture
def tls_peer(files: Certificates) -> Callable[..., Any]:
    """Listen with TLS: ``with tls_peer(talk, client_ca="", host="127.0.0.1") as address``."""

    def listen(talk: Callable[[ssl.SSLSocket], None], client_ca: str = "", host: str = "127.0.0.1") -> Any:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.server_certificate, files.server_key)
        if client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(client_ca)

        def shake_hands(peer: socket.socket) -> None:
            with context.wrap_socket(peer, server_side=True) as wrapped:
                talk(wrapped)

        return listening(shake_hands, host=host)

    return listen


def echo(peer: socket.socket) -> None:
    while True:
        data = peer.recv(65536)
        if not data:
            return
        peer.sendall(data)


def test_tls_verifies_by_default_and_knows_the_authority_it_is_given(
    tls_peer: Callable[..., Any], files: Certificates
) -> None:
    with tls_peer(echo) as address:
        with pytest.raises(ImproperlyConfigured, match="certificate was not accepted.*ssl_ca_certs"):
            Stream.connect(address, soon(), tls=TLS())
        stream = Stream.connect(address, soon(), tls=TLS(ca_certs=str(files.ca)))
        stream.send(b"hello", soon())
        assert stream.recv(soon()) == b"hello"
        stream.close()
        stream = Stream.connect(address, soon(), tls=TLS(ca_data=files.ca.read_text()))
        stream.close()


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is no address here")
def test_tls_refuses_a_certificate_for_another_name(
    tls_peer: Callable[..., Any], files: Certificates
) -> None:
    with tls_peer(echo, host="127.0.0.2") as address:
        tls = TLS(ca_certs=str(files.ca))
        with pytest.raises(ImproperlyConfigured, match="certificate was not accepted"):
            Stream.connect(address, soon(), tls=tls)
        for lenient in (tls._replace(check_hostname=False), TLS(cert_reqs="none")):
            stream = Stream.connect(address, soon(), tls=lenient)
            stream.send(b"hello", soon())
            assert stream.recv(soon()) == b"hello"
            stream.close()


def test_tls_shows_the_client_certificate(tls_peer: Callable[..., Any], files: Certificates) -> None:
    tls = TLS(ca_certs=str(files.ca))
    with tls_peer(echo, client_ca=str(files.ca)) as address:
        # The refusal comes after the handshake, with the first bytes.
        with pytest.raises((ImproperlyConfigured, OperationalError)):
            stream = Stream.connect(address, soon(), tls=tls)
            try:
                stream.recv(soon())
            finally:
                stream.close()
        own = tls._replace(certfile=str(files.client_certificate), keyfile=str(files.client_key))
        stream = Stream.connect(address, soon(), tls=own)
        stream.send(b"hello", soon())
        assert stream.recv(soon()) == b"hello"
        stream.close()


def test_tls_with_a_server_that_speaks_none_names_the_port() -> None:
    def talk(peer: socket.socket) -> None:
        peer.recv(1000)
        peer.sendall(b"-ERR Protocol error: unbalanced quotes\r\n")

    with listening(talk) as address, pytest.raises(ImproperlyConfigured, match="does not speak TLS.*port"):
        Stream.connect(address, soon(), tls=TLS())


def test_tls_handshake_keeps_the_deadline() -> None:
    with listening(hold) as address:
        began = time.monotonic()
        with pytest.raises(OperationalError, match="no connection: the time for it was over"):
            Stream.connect(address, soon(0.2), tls=TLS())
        assert time.monotonic() - began < 5


def test_tls_keeps_deadlines_and_tells_what_is_decrypted(
    tls_peer: Callable[..., Any], files: Certificates
) -> None:
    big = os.urandom(300_000)
    with tls_peer(echo) as address:
        stream = Stream.connect(address, soon(), tls=TLS(ca_certs=str(files.ca)))
        assert stream.recv_ready() == b""
        with pytest.raises(OperationalError, match="time for it was over"):
            stream.recv(soon(0.05))
        stream.close()

        stream = Stream.connect(address, soon(), tls=TLS(ca_certs=str(files.ca)))
        stream.send(big[:100], soon())
        wait_until(stream.has_input, what="the echo")
        got = b""
        while len(got) < 100:
            wait_until(stream.has_input, what="the echo")
            got += stream.recv_ready()
        assert got == big[:100]
        sender = threading.Thread(target=stream.send, args=(big[:100_000], soon()))
        sender.start()
        sender.join()
        got = b""
        while len(got) < 100_000:
            got += stream.recv(soon())
        assert got == big[:100_000]
        assert stream.pending == 0
        stream.close()
        stream.close()


def test_tls_peer_that_takes_nothing_ends_at_the_deadline(
    tls_peer: Callable[..., Any], files: Certificates
) -> None:
    done = threading.Event()
    with tls_peer(lambda peer: done.wait(20) and None) as address:
        stream = Stream.connect(address, soon(), tls=TLS(ca_certs=str(files.ca)))
        with pytest.raises(OperationalError, match="sending: the time for it was over"):
            stream.send(b"x" * 50_000_000, soon(0.2))
        done.set()
        stream.close()


@pytest.mark.parametrize(
    "tls",
    [TLS(ca_certs="/no/file"), TLS(certfile="/no/file"), TLS(ca_data="no PEM"), TLS(ciphers="none")],
)
def test_tls_files_that_cannot_be_used_are_named(tls: TLS) -> None:
    wrong = tls.ca_certs or tls.certfile or tls.ciphers or "ca_data"
    with pytest.raises(ImproperlyConfigured, match=f"TLS: cannot use .*{wrong}"):
        tls_context(tls)


def test_ssl_is_not_loaded_without_tls() -> None:
    code = "import sys, miniq.connections.redis; assert 'ssl' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), timeout=60)


def test_streams_that_are_forgotten_close_without_a_warning(recwarn: Any) -> None:
    ours, theirs = socket.socketpair()
    Stream(ours, "forgotten")
    del ours
    assert theirs.recv(1) == b""
    theirs.close()
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]

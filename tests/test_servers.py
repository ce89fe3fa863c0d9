# SPDX-License-Identifier: MIT
"""The servers of the tests: what the tests of Redis and memcached rely on."""

from __future__ import annotations

import signal
import socket
import ssl
import sys
from pathlib import Path
from typing import Callable

import pytest
import servers
from servers import HOST, Certificates, ErrorReply, MemcachedServer, RedisServer, certificates, find_program
from waiting import wait_until
from workers import Program, environment, is_alive


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"))


def ping(peer: socket.socket) -> bytes:
    peer.settimeout(10)
    peer.sendall(b"PING\r\n")
    return peer.recv(100)


def test_shared_server_gives_an_empty_database(redis_server: RedisServer, redis_url: str) -> None:
    db = int(redis_url.rpartition("/")[2])
    assert redis_server.command("DBSIZE", db=db) == 0
    assert redis_server.command("RPUSH", "list", b"\x00\xff", 5, 1.5, db=db) == 3
    assert redis_server.command("LRANGE", "list", 0, -1, db=db) == [b"\x00\xff", b"5", b"1.5"]
    assert redis_server.command("GET", "nothing", db=db) is None
    with pytest.raises(ErrorReply, match="WRONGTYPE"):
        redis_server.command("GET", "list", db=db)


def test_killed_server_has_its_data_and_port_again_after_start(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis(appendonly=True)
    port, pid = server.port, server.pid
    server.command("SET", "key", "value")
    server.kill()
    assert not server.running and not is_alive(pid)
    server.start()
    assert (server.port, server.command("GET", "key")) == (port, b"value")
    assert server.restart().command("GET", "key") == b"value"


def test_paused_server_is_silent_until_it_is_resumed(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    server.pause()
    with pytest.raises(OSError, match="timed out"):
        server.command("PING", timeout_s=0.05)
    server.resume()
    assert server.command("PING") == b"PONG"
    server.pause()


def test_server_with_password_refuses_who_does_not_know_it(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis(password="p@ss:word")
    assert server.url(3) == f"redis://:p%40ss%3Aword@{HOST}:{server.port}/3"
    assert server.command("PING", db=3) == b"PONG"
    server.password = None
    with pytest.raises(ErrorReply, match="NOAUTH"):
        server.command("PING")


def test_clients_are_listed_and_killed(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis(maxmemory="10mb")
    with socket.create_connection((HOST, server.port)) as peer:
        assert ping(peer) == b"+PONG\r\n"
        assert [client["cmd"] for client in server.clients()] == ["ping"]
        assert server.kill_clients() == 1
        assert peer.recv(100) == b""
    assert server.info("memory")["maxmemory"] == "10485760"


def test_tls_server_is_verified_with_the_authority(
    new_redis: Callable[..., RedisServer], files: Certificates
) -> None:
    server = new_redis(tls=files, tls_clients=True)
    context = ssl.create_default_context(cafile=str(files.ca))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_cert_chain(str(files.client_certificate), str(files.client_key))
    for name in ("localhost", HOST):
        plain = socket.create_connection((HOST, server.port))
        with context.wrap_socket(plain, server_hostname=name) as peer:
            assert ping(peer) == b"+PONG\r\n"
    assert server.url(1, ssl_ca_certs="a b").endswith("/1?ssl_ca_certs=a+b")


def test_server_that_cannot_start_tells_its_log(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="(?s)ended at the start.*nonsense"):
        RedisServer(tmp_path / "redis", arguments=["--nonsense", "1"]).start()


def test_new_server_evades_a_port_that_is_taken(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis")
    taken = server.port
    with socket.socket() as peer:
        peer.bind((HOST, taken))
        peer.listen()
        with server:
            assert server.port != taken
            assert server.info()["tcp_port"] == str(server.port)


def test_memcached_answers(tmp_path: Path) -> None:
    with MemcachedServer(tmp_path / "memcached") as server:
        assert server.command("set key 0 0 5\r\nvalue") == b"STORED\r\n"
        assert server.command("get key") == b"VALUE key 0 5\r\nvalue\r\nEND\r\n"
        assert server.restart().command("get key") == b"END\r\n"


TESTS_WITH_A_SERVER = """
import pathlib, sys, time
from servers import RedisServer
server = RedisServer(pathlib.Path(sys.argv[1])).start()
print(server.pid, flush=True)
time.sleep(60)
"""


def test_server_ends_when_its_tests_are_killed(
    program: Callable[..., Program], tmp_path_factory: pytest.TempPathFactory
) -> None:
    find_program(*RedisServer.programs)
    folder = tmp_path_factory.mktemp("redis")
    command = [sys.executable, "-c", TESTS_WITH_A_SERVER, str(folder)]
    one = program(command, folder, environment(Path(servers.__file__).parent))
    wait_until(lambda: one.log.endswith("\n"), 30, lambda: f"its pid is told: {one.log}")
    pid = int(one.log)
    assert is_alive(pid)
    one.send(signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), 10, "the server has ended too")


def test_missing_program_skips_the_test_but_fails_it_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-server or no-such-fork is not installed"):
        find_program("no-such-server", "no-such-fork")
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="no-such-server is not installed: required in CI"):
        find_program("no-such-server")

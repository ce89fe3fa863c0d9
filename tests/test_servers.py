# SPDX-License-Identifier: MIT
"""The servers of the tests: what the tests of Redis, memcached and RabbitMQ rely on."""

from __future__ import annotations

import signal
import socket
import ssl
import struct
import sys
from pathlib import Path
from typing import Callable

import pytest
import servers
from servers import (
    HOST,
    Certificates,
    ErrorReply,
    MemcachedServer,
    RabbitError,
    RabbitServer,
    RedisServer,
    certificates,
    find_program,
)
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


def new_queue(server: RabbitServer, vhost: str, name: str, kind: str = "classic") -> None:
    server.eval(
        f'Name = rabbit_misc:r(<<"{vhost}">>, queue, <<"{name}">>),'
        f' Arguments = [{{<<"x-queue-type">>, longstr, <<"{kind}">>}}],'
        " {new, _} = rabbit_amqqueue:declare(Name, true, false, Arguments, none, <<>>), ok"
    )


class Login:
    """A connection to RabbitMQ that has logged in: just so much of AMQP 0-9-1 as that takes."""

    def __init__(self, peer: socket.socket, vhost: str, user: str = "guest", password: str = "guest") -> None:
        self.peer = peer
        peer.settimeout(20)
        peer.sendall(b"AMQP\0\0\x09\x01")
        self.expect(10, 10)  # connection.start
        login = f"\0{user}\0{password}".encode()
        self.send(10, 11, struct.pack(">L6pL", 0, b"PLAIN", len(login)) + login + b"\x05en_US")
        self.send(10, 31, self.expect(10, 30))  # connection.tune-ok, with what tune says
        self.send(10, 40, bytes([len(vhost)]) + vhost.encode() + b"\0\0")
        self.expect(10, 41)  # connection.open-ok

    def send(self, number: int, method: int, arguments: bytes) -> None:
        size = len(arguments) + 4
        self.peer.sendall(struct.pack(">BHLHH", 1, 0, size, number, method) + arguments + b"\xce")

    def expect(self, number: int, method: int) -> bytes:
        """Read a method; return its arguments."""
        _, _, size, *found = struct.unpack(">BHLHH", self._read(11))
        arguments = self._read(size - 3)[:-1]
        assert found == [number, method], (found, arguments)
        return arguments

    def _read(self, size: int) -> bytes:
        # Not MSG_WAITALL, which TLS does not know.
        found = b""
        while len(found) < size:
            more = self.peer.recv(size - len(found))
            assert more, "RabbitMQ closed the connection"
            found += more
        return found


def test_shared_rabbit_gives_a_virtual_host_of_the_test(rabbit_server: RabbitServer, rabbit_url: str) -> None:
    assert int(bytes(rabbit_server.eval("os:getpid()"))) == rabbit_server.pid
    vhost = rabbit_url.rpartition("/")[2]
    assert rabbit_url == f"amqp://guest:guest@{HOST}:{rabbit_server.port}/{vhost}"
    assert vhost != rabbit_server.new_vhost()
    for number, kind in enumerate(("classic", "quorum")):
        new_queue(rabbit_server, vhost, kind, kind)
        assert len(rabbit_server.queues(vhost)) == number + 1
        queue = rabbit_server.queues(vhost)[kind]
        assert (queue["type"], queue["messages"], queue["durable"]) == (kind, 0, True)
        assert queue["arguments"] == {"x-queue-type": kind}
    rabbit_server.delete_queue("classic", vhost)
    assert list(rabbit_server.queues(vhost)) == ["quorum"]


def test_rabbit_evaluates_erlang(rabbit_server: RabbitServer) -> None:
    assert rabbit_server.eval("[1, 2.5, atom, true, undefined, {}]") == [1, 2.5, "atom", True, None, []]
    assert rabbit_server.eval('#{<<"ä\U0001f407\\""/utf8>> => {<<>>}}') == {'ä\U0001f407"': [""]}
    assert rabbit_server.eval("A = 1, A + 1") == 2
    assert rabbit_server.eval("self()").startswith("<0.")
    for wrong, reason in (("1 = 2", "badmatch"), ("1 +", "syntax error"), ("lists:nothing()", "undef")):
        with pytest.raises(RabbitError, match=f"(?s){wrong[:1]}.*{reason}"):
            rabbit_server.eval(wrong)
    with pytest.raises(OSError, match="timed out"):
        rabbit_server.eval("timer:sleep(20000)", timeout_s=0.05)


def test_rabbitmqctl_reaches_the_server(rabbit_server: RabbitServer, rabbit_url: str) -> None:
    assert rabbit_url.rpartition("/")[2] in rabbit_server.ctl("list_vhosts").split()
    with pytest.raises(AssertionError, match="(?s)rabbitmqctl list_queues -p nowhere.*not_found|nowhere"):
        rabbit_server.ctl("delete_vhost", "nowhere")


def test_rabbit_lists_and_closes_connections(rabbit_server: RabbitServer, rabbit_url: str) -> None:
    vhost = rabbit_url.rpartition("/")[2]
    with socket.create_connection((HOST, rabbit_server.port)) as peer:
        login = Login(peer, vhost)
        (row,) = [row for row in rabbit_server.connections() if row["vhost"] == vhost]
        assert (row["user"], row["channels"], row["client_properties"]) == ("guest", 0, {})
        assert rabbit_server.close_connections("said the test") == 1
        assert b"said the test" in login.expect(10, 50)  # connection.close
        login.send(10, 51, b"")  # connection.close-ok
        wait_until(lambda: not rabbit_server.connections(), what="the connection is gone")
    assert rabbit_server.close_connections() == 0


def test_rabbit_knows_users_and_their_permissions(rabbit_server: RabbitServer, rabbit_url: str) -> None:
    vhost = rabbit_url.rpartition("/")[2]
    rabbit_server.add_user("käthe", "p@ss:wörd")
    url = rabbit_server.url(vhost, "käthe", "p@ss:wörd", heartbeat=3)
    assert url.startswith("amqp://k%C3%A4the:p%40ss%3Aw%C3%B6rd@") and url.endswith(f"/{vhost}?heartbeat=3")
    address = (HOST, rabbit_server.port)
    with socket.create_connection(address) as peer, pytest.raises(AssertionError, match="NOT_ALLOWED"):
        Login(peer, vhost, "käthe", "p@ss:wörd")
    rabbit_server.set_permissions("käthe", vhost, write="^$")
    with socket.create_connection(address) as peer:
        Login(peer, vhost, "käthe", "p@ss:wörd")
    assert rabbit_server.url() == f"amqp://guest:guest@{HOST}:{rabbit_server.port}/%2F"


def test_killed_rabbit_has_its_queues_and_port_again(new_rabbit: Callable[..., RabbitServer]) -> None:
    server = new_rabbit(settings={"consumer_timeout": 60000})
    assert server.eval("application:get_env(rabbit, consumer_timeout)") == ["ok", 60000]
    vhost, port, pid = server.new_vhost(), server.port, server.pid
    new_queue(server, vhost, "queue")
    server.pause()
    with pytest.raises(OSError, match="timed out"):
        server.eval("1", timeout_s=0.05)
    server.resume()
    server.raise_memory_alarm()
    assert "memory" in str(server.alarms())
    server.clear_memory_alarm()
    server.keep_declarations()
    server.pause()
    server.kill()
    assert not is_alive(pid)
    with pytest.raises(OSError):
        server.eval("1")
    server.start()
    assert server.port == port and list(server.queues(vhost)) == ["queue"]
    assert server.new_vhost() != vhost
    server.stop()
    assert not server.running


def test_tls_rabbit_evades_a_port_that_is_taken(
    tmp_path_factory: pytest.TempPathFactory, files: Certificates
) -> None:
    server = RabbitServer(tmp_path_factory.mktemp("rabbit"), tls=files, tls_clients=True)
    taken = server.node_port
    context = ssl.create_default_context(cafile=str(files.ca))
    context.load_cert_chain(str(files.client_certificate), str(files.client_key))
    with socket.socket() as other:
        other.bind((HOST, taken))
        other.listen()
        with server:
            assert server.node_port != taken
            assert server.url(ssl_ca_certs="a b").startswith("amqps://guest:guest@")
            plain = socket.create_connection((HOST, server.port))
            with context.wrap_socket(plain, server_hostname="localhost") as peer:
                Login(peer, "/")
            server.kill()


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

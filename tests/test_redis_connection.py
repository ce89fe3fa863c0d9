# SPDX-License-Identifier: MIT
"""Connections to real Redis servers, and to peers that answer as a real one only rarely does."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import threading
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest
from peers import hold, listening
from proxy import Proxy
from servers import HOST, Certificates, RedisServer, certificates, free_port
from waiting import wait_until

from miniq.connections.redis import Connection, Options, ReplyError, Script, Server
from miniq.connections.redis_options import endpoints
from miniq.exceptions import ImproperlyConfigured, OperationalError

NO_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    yield
    Server.close_all()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"))


def server_for(url: str, **options: Any) -> Server:
    return Server.of(url, Options.read(options, url))


@pytest.fixture
def connect() -> Iterator[Callable[..., Connection]]:
    """Make connections that are closed at the end: ``connect(url, **options)``."""
    made: List[Connection] = []

    def make(url: str, timeout_s: float = 10.0, name: str = "", **options: Any) -> Connection:
        made.append(server_for(url, **options).connect(timeout_s, name))
        return made[-1]

    yield make
    for one in made:
        one.close()


# -- URLs and options ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "address", "db", "username", "password", "tls"),
    [
        ("redis://", ("localhost", 6379), 0, None, None, False),
        ("redis://host", ("host", 6379), 0, None, None, False),
        ("REDIS://host:1234/5", ("host", 1234), 5, None, None, False),
        ("redis://:secret@host/", ("host", 6379), 0, None, "secret", False),
        ("redis://user:p%40s%2Fs%23@host/1", ("host", 6379), 1, "user", "p@s/s#", False),
        ("redis://host?db=7&username=u&password=hidden", ("host", 6379), 7, "u", "hidden", False),
        ("redis://[::1]:1234/2", ("::1", 1234), 2, None, None, False),
        ("rediss://host", ("host", 6379), 0, None, None, True),
        ("valkey://host/3", ("host", 6379), 3, None, None, False),
        ("valkeys://host/3", ("host", 6379), 3, None, None, True),
        ("redis+socket:///run/redis.sock", "/run/redis.sock", 0, None, None, False),
        ("redis+socket://:pw@/run/r.sock?virtual_host=4", "/run/r.sock", 4, None, "pw", False),
        ("unix:///run/r%20s?db=2", "/run/r s", 2, None, None, False),
    ],
)
def test_url_is_read(
    url: str, address: Any, db: int, username: Optional[str], password: Optional[str], tls: bool
) -> None:
    (found,) = endpoints(url, Options.read({}, url))
    read = (found.address, found.db, found.username, found.password, found.tls)
    assert read == (address, db, username, password, tls)
    assert not password or password not in found.url


@pytest.mark.parametrize(
    "url",
    [
        "sentinel://:pw@h1:1,h2/3?master_name=m",
        "sentinel://h1:1;sentinel://:pw@h2/3?master_name=m",
        "sentinel://:pw@h1:1/3?master_name=m;sentinel://h2:26379",
    ],
)
def test_sentinels_are_read_in_both_forms(url: str) -> None:
    (found,) = endpoints(url, Options.read({}, url))
    assert found.sentinels == (("h1", 1), ("h2", 26379))
    assert (found.master_name, found.db, found.password) == ("m", 3, "pw")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "no Redis URL"),
        ("host:6379", "no scheme"),
        ("rediz://host", "did you mean redis://"),
        ("redis://:pa/ss@host/1", "percent-encoded"),
        ("redis://:pa#ss@host/1", "percent-encoded"),
        ("redis://host:port", "port is no number"),
        ("redis://host:99999", "port is no number"),
        ("redis://[::1/0", "Invalid IPv6"),
        ("redis://host/x", "database is a number, not 'x'"),
        ("redis://one,two", "redis://one;redis://other"),
        ("redis+socket://", "path of the socket is missing"),
        ("sentinel://host/0", "master_name"),
    ],
)
def test_url_that_cannot_work_says_why_and_shows_no_password(url: str, told: str) -> None:
    with pytest.raises(ImproperlyConfigured) as raised:
        Server.of(url, Options())
    assert told in str(raised.value)
    assert "pa/ss" not in str(raised.value) and "pa#ss" not in str(raised.value)


def test_options_come_from_the_dict_and_the_query_which_wins() -> None:
    url = "rediss://h?socket_timeout=7&ssl_cert_reqs=CERT_NONE&ssl_check_hostname=false&max_connections=3"
    options = Options.read(
        {"socket_timeout": 1, "lease": 5, "visibility_timeout": 60, "client_name": None, "sep": ":"}, url
    )
    assert (options.socket_timeout, options.max_connections, options.lease) == (7.0, 3, 5.0)
    assert (options.visibility_timeout, options.client_name, options.sep) == (60.0, "", ":")
    assert options.tls().cert_reqs == "none" and not options.tls().check_hostname
    assert Options.read({"ssl_cert_reqs": 2}).ssl_cert_reqs == "required"
    assert Options.read({"priority_steps": range(10)}).priority_steps == tuple(range(10))
    assert Options.read({"fanout_prefix": "/my."}).fanout_prefix == "/my."
    assert Options.read({"fanout_prefix": False}).fanout_prefix is False
    sentinels = Options.read({"sentinel_kwargs": {"password": "hidden"}, "password": "hidden too"})
    assert sentinels.for_sentinels().password == "hidden"
    assert "hidden" not in repr(sentinels)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"socket_timeot": 1}, "did you mean socket_timeout"),
        ({"socket_timeout": 0}, "socket_timeout must be a number of seconds above 0, not 0"),
        ({"socket_timeout": "soon"}, "not 'soon'"),
        ({"max_connections": 0.5}, "a number from 1"),
        ({"socket_keepalive": "maybe"}, "true or false"),
        ({"ssl_cert_reqs": "sometimes"}, "required, optional or none"),
        ({"priority_steps": []}, "a list of numbers"),
        ({"password": 123}, "password must be text, not **"),
        ({"sentinel_kwargs": {"passwrd": "x"}}, "did you mean password"),
    ],
)
def test_option_that_cannot_work_is_named(options: Dict[str, Any], told: str) -> None:
    with pytest.raises(ImproperlyConfigured) as raised:
        Options.read(options, "redis://:secret@host")
    assert told in str(raised.value)
    assert "secret" not in str(raised.value)


def test_options_without_a_meaning_here_are_accepted_and_logged(caplog: Any) -> None:
    with caplog.at_level(logging.DEBUG, "miniq"):
        assert Options.read({"retry_on_timeout": True, "polling_interval": 3}) == Options()
    assert "polling_interval has no meaning here" in caplog.text


def test_equal_urls_and_options_are_one_server_and_equal_places_one_key() -> None:
    one = server_for("redis://localhost:1/2")
    assert server_for("redis://localhost:1/2") is one
    other = server_for("valkey://user:pw@localhost:1/2", socket_timeout=9)
    assert other is not one and other.key == one.key
    assert server_for("redis://localhost:1/3").key != one.key


# -- commands ------------------------------------------------------------------------------------


def test_commands_and_pipelines_give_replies(redis_url: str, connect: Any) -> None:
    redis = connect(redis_url)
    assert redis.pushes and redis.server_version >= (6, 2)
    assert redis.call("SET", "key", b"\x00\xff") == b"OK"
    assert redis.call("GET", "key") == b"\x00\xff"
    assert redis.call("GET", "missing") is None
    assert redis.call("INCRBY", "n", 7) == 7
    replies = redis.pipeline([("GET", "n"), ("LPUSH", "key", 1), ("HGETALL", "missing")])
    assert replies[0] == b"7" and replies[2] == {}
    assert replies[1].code == "WRONGTYPE"
    assert redis.pipeline([]) == []


def test_transaction_is_a_pipeline(redis_url: str, connect: Any) -> None:
    redis = connect(redis_url)
    replies = redis.pipeline([("MULTI",), ("SET", "key", 1), ("LPUSH", "key", 1), ("EXEC",)])
    assert replies[0] == b"OK" and replies[3][0] == b"OK"
    assert isinstance(redis.translated(replies[3][1], "LPUSH"), ImproperlyConfigured)
    with pytest.raises(OperationalError, match="EXEC: ERR EXEC without MULTI"):
        redis.call("EXEC")


def test_error_replies_say_who_must_act(redis_url: str, connect: Any) -> None:
    redis = connect(redis_url)
    redis.call("SET", "key", 1)
    with pytest.raises(ImproperlyConfigured, match="LPUSH: WRONGTYPE.*another program") as raised:
        redis.call("LPUSH", "key", 1)
    cause = raised.value.__cause__
    assert isinstance(cause, ReplyError) and cause.code == "WRONGTYPE"
    with pytest.raises(ImproperlyConfigured, match="unknown command"):
        redis.call("NOSUCH")
    with pytest.raises(OperationalError, match="SET: ERR syntax error"):
        redis.call("SET", "key", 1, "BUT")
    with pytest.raises(TypeError):
        redis.call("SET", "key", None)
    assert redis.call("GET", "key") == b"1"


def test_big_values_and_big_pipelines_arrive_whole(redis_url: str, connect: Any) -> None:
    redis = connect(redis_url, socket_timeout=60)
    value = os.urandom(8_000_000)
    redis.call("SET", "big", value)
    assert redis.call("GET", "big") == value
    body = b"x" * 900
    assert redis.pipeline([("RPUSH", "list", body)] * 20_000) == list(range(1, 20_001))
    assert redis.pipeline([("GET", "big")] * 5 + [("LLEN", "list")]) == [value] * 5 + [20_000]
    redis.call("DEL", "big", "list")


def test_script_is_sent_again_after_script_flush(
    redis_server: RedisServer, redis_url: str, connect: Any
) -> None:
    redis = connect(redis_url)
    script = Script("return {KEYS[1], ARGV[1]} -- " + redis_url)
    for _ in range(2):
        redis_server.command("SCRIPT", "FLUSH")
        assert redis.run(script, ["k"], ["v"]) == [b"k", b"v"]
        assert redis_server.command("SCRIPT", "EXISTS", script.sha) == [1]
        assert redis.run(script, ["k"], [2]) == [b"k", b"2"]
    with pytest.raises(ImproperlyConfigured, match="WRONGTYPE"):
        redis.run(Script("redis.call('SET', KEYS[1], 1) return redis.call('LPUSH', KEYS[1], 1)"), ["k"])


def test_names_are_shown_by_the_server(redis_server: RedisServer, redis_url: str, connect: Any) -> None:
    connect(redis_url, name="miniq test of näme")
    connect(redis_url, client_name="given")
    names = {row["name"] for row in redis_server.clients()}
    assert {"miniq-test-of-n-me", "given"} <= names


def test_no_time_left_does_not_break_the_connection(redis_url: str, connect: Any) -> None:
    redis = connect(redis_url)
    with pytest.raises(OperationalError, match="no time was left"):
        redis.call("PING", timeout_s=-0.1)
    assert redis.call("PING") == b"PONG"


# -- pushes --------------------------------------------------------------------------------------


def test_pushes_are_kept_for_whoever_takes_them(
    redis_server: RedisServer, redis_url: str, connect: Any
) -> None:
    redis, other = connect(redis_url), connect(redis_url)
    redis.call("CLIENT", "TRACKING", "ON")
    redis.call("GET", "watched")
    assert redis.take_pushes() == []
    other.call("SET", "watched", 1)
    wait_until(redis.has_input, what="the push")
    assert redis.take_pushes() == [[b"invalidate", [b"watched"]]]
    # One that is met on the way to a reply is kept as well.
    redis.call("GET", "watched")
    other.call("SET", "watched", 2)
    wait_until(redis.has_input, what="the push")
    assert redis.call("PING") == b"PONG"
    assert redis.take_pushes() == [[b"invalidate", [b"watched"]]]


def test_on_push_gets_every_push_at_once(redis_url: str, connect: Any) -> None:
    redis, other = connect(redis_url), connect(redis_url)
    got: List[Any] = []
    redis.on_push = got.append
    channel = f"channel {redis_url}"
    assert redis.call("SUBSCRIBE", channel, channel + "2") == [b"subscribe", (channel + "2").encode(), 2]
    assert len(got) == 2
    # Sent by itself: message and reply come together, in whatever order.
    assert redis.pipeline([("PUBLISH", channel, "one"), ("PUBLISH", channel, "two")]) == [1, 1]
    other.call("PUBLISH", channel, "three")
    wait_until(lambda: redis.take_pushes() or len(got) == 5, what="three messages")
    assert [push[2] for push in got[2:]] == [b"one", b"two", b"three"]
    redis.send([("UNSUBSCRIBE", channel), ("UNSUBSCRIBE", channel + "2")])
    wait_until(lambda: redis.take_pushes() or len(got) == 7, what="confirmations")
    assert redis.call("PING") == b"PONG"


def test_on_push_must_not_use_the_connection(redis_url: str, connect: Any) -> None:
    redis = connect(redis_url)
    redis.on_push = lambda push: redis.call("PING")
    with pytest.raises(OperationalError, match="in the middle of a command"):
        redis.call(b"psubscribe", f"channel {redis_url}")
    assert redis.broken


def test_take_pushes_raises_when_the_server_has_closed(
    redis_server: RedisServer, redis_url: str, connect: Any
) -> None:
    redis = connect(redis_url)
    redis_server.command("CLIENT", "KILL", "ID", redis.call("CLIENT", "ID"))
    wait_until(redis.has_input, what="the end")
    descriptor = redis.fileno()
    with pytest.raises(OperationalError, match="server closed the connection"):
        redis.take_pushes()
    assert redis.broken and redis.fileno() == descriptor
    with pytest.raises(OperationalError, match="no more use"):
        redis.take_pushes()


# -- login, database, ways to connect ------------------------------------------------------------


def test_password_is_needed_and_checked(new_redis: Callable[..., RedisServer], connect: Any) -> None:
    server = new_redis(password="p@ss/w#rd %")
    assert connect(server.url(1)).call("PING") == b"PONG"
    with pytest.raises(ImproperlyConfigured, match="NOAUTH.*wants a password"):
        connect(f"redis://{HOST}:{server.port}")
    with pytest.raises(ImproperlyConfigured, match="WRONGPASS.*check user and password") as raised:
        connect(f"redis://:guessed@{HOST}:{server.port}")
    assert "guessed" not in str(raised.value)
    assert connect(f"redis://{HOST}:{server.port}", password=server.password).call("PING") == b"PONG"
    assert connect(server.socket_url(1)).call("CLIENT", "INFO").count(b"db=1 ") == 1


def test_user_of_an_access_list_may_do_what_it_may(
    new_redis: Callable[..., RedisServer], connect: Any
) -> None:
    server = new_redis()
    server.command("ACL", "SETUSER", "alice", "on", ">s3cret", "~*", "&*", "+@all", "-lpush")
    redis = connect(f"redis://alice:s3cret@{HOST}:{server.port}/2")
    assert redis.call("ACL", "WHOAMI") == b"alice"
    with pytest.raises(ImproperlyConfigured, match="LPUSH: NOPERM.*access list"):
        redis.call("LPUSH", "key", 1)
    assert redis.call("PING") == b"PONG"


def test_database_that_the_server_lacks_is_for_the_operator(redis_server: RedisServer, connect: Any) -> None:
    with pytest.raises(ImproperlyConfigured, match="SELECT: ERR DB index is out of range.*lower number"):
        connect(redis_server.url(99_999))


def test_unix_socket_in_both_forms(redis_server: RedisServer, connect: Any) -> None:
    for url in (redis_server.socket_url(3), f"unix://{redis_server.socket_path}?db=3"):
        assert b"db=3 " in connect(url).call("CLIENT", "INFO")


def test_tls_with_verification_and_client_certificate(
    new_redis: Callable[..., RedisServer], files: Certificates, connect: Any
) -> None:
    server = new_redis(tls=files)
    with pytest.raises(ImproperlyConfigured, match="certificate was not accepted"):
        connect(server.url())
    assert connect(server.url(), ssl_ca_certs=str(files.ca)).call("PING") == b"PONG"
    assert connect(server.url(ssl_cert_reqs="none")).call("PING") == b"PONG"
    plain = server.url().replace("rediss", "redis")
    assert connect(plain, ssl=True, ssl_ca_certs=str(files.ca)).call("PING") == b"PONG"
    with pytest.raises(OperationalError):
        connect(plain)

    strict = new_redis(tls=files, tls_clients=True)
    with pytest.raises((ImproperlyConfigured, OperationalError)):
        connect(strict.url(), ssl_ca_certs=str(files.ca))
    redis = connect(
        strict.url(ssl_ca_certs=files.ca),
        ssl_certfile=str(files.client_certificate),
        ssl_keyfile=str(files.client_key),
    )
    assert redis.pipeline([("SET", "big", b"x" * 500_000), ("GET", "big")])[1] == b"x" * 500_000
    redis.call("CLIENT", "TRACKING", "ON")
    redis.call("GET", "big")
    strict.command("SET", "big", 1)
    wait_until(redis.has_input, what="the push")
    assert wait_until(redis.take_pushes) == [[b"invalidate", [b"big"]]]


def test_server_without_hello_is_spoken_to_in_resp2(
    new_redis: Callable[..., RedisServer], connect: Any
) -> None:
    server = new_redis(password="secret", arguments=["--rename-command", "HELLO", ""])
    redis = connect(server.url(4), name="old")
    assert not redis.pushes and redis.server_version >= (6, 2) and redis.role == "master"
    assert b"db=4 " in redis.call("CLIENT", "LIST")
    assert {row["name"] for row in server.clients()} == {"old"}
    with pytest.raises(ImproperlyConfigured, match="WRONGPASS"):
        connect(f"redis://:wrong@{HOST}:{server.port}")
    got: List[Any] = []
    redis.on_push = got.append
    redis.send([("SUBSCRIBE", "channel")])
    wait_until(lambda: redis.take_pushes() or got, what="the confirmation")
    server.command("PUBLISH", "channel", "hello")
    wait_until(lambda: redis.take_pushes() or len(got) == 2, what="the message")
    assert got == [[b"subscribe", b"channel", 1], [b"message", b"channel", b"hello"]]


# -- servers that answer late, wrongly or never --------------------------------------------------


def test_silent_server_ends_the_attempt_at_the_deadline() -> None:
    with listening(hold) as (_, port):
        began = time.monotonic()
        with pytest.raises(
            OperationalError, match=f"redis://:.*@{HOST}:{port}/0.*time for it was over"
        ) as raised:
            server_for(f"redis://:secret@{HOST}:{port}/0").connect(0.3)
        assert 0.25 < time.monotonic() - began < 5
        assert "secret" not in str(raised.value)


def test_server_that_falls_silent_breaks_the_connection(
    new_redis: Callable[..., RedisServer], connect: Any
) -> None:
    server = new_redis()
    redis = connect(server.url(), socket_timeout=0.2)
    server.pause()
    began = time.monotonic()
    with pytest.raises(OperationalError, match=r"waiting for the answer: .*\(GET\)"):
        redis.call("GET", "key")
    assert time.monotonic() - began < 5
    server.resume()
    # The late answer must never be taken for that of the next command.
    with pytest.raises(OperationalError, match="no more use"):
        redis.call("PING")
    assert redis.broken and redis.fileno() >= 0
    redis.close()
    assert redis.fileno() == -1


def test_dribbling_server_is_understood_within_the_deadline_and_not_beyond(redis_server: RedisServer) -> None:
    with Proxy(redis_server.port) as proxy:
        server = server_for(proxy.url(redis_server.url()))
        proxy.dribble()
        redis = server.connect(20)
        assert redis.call("ECHO", "x" * 200, timeout_s=20) == b"x" * 200
        proxy.dribble(0.01)
        began = time.monotonic()
        with pytest.raises(OperationalError, match="time for it was over"):
            redis.call("ECHO", "x" * 5000, timeout_s=0.3)
        assert time.monotonic() - began < 5
        redis.close()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals between threads here")
def test_exception_from_a_signal_breaks_the_connection(
    redis_server: RedisServer, redis_url: str, connect: Any
) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted

    redis = connect(redis_url)
    client = str(redis.call("CLIENT", "ID"))
    main = threading.main_thread().ident

    def wait_and_kill() -> None:
        wait_until(
            lambda: [row for row in redis_server.clients() if row["id"] == client and "b" in row["flags"]]
        )
        assert main is not None
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    try:
        with pytest.raises(Interrupted):
            redis.call("BLPOP", "nothing", 0, timeout_s=60)
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert redis.broken


HELLO = {b"server": b"redis", b"version": b"7.0.0", b"proto": 3, b"role": b"master"}


def answers(**replies: bytes) -> Callable[[socket.socket], None]:
    """Return a conversation in RESP: the reply for each command, ``+OK`` for all others."""
    hello = b"%" + b"%d\r\n" % len(HELLO)
    for key, value in HELLO.items():
        shown = b":%d\r\n" % value if isinstance(value, int) else b"+%s\r\n" % value
        hello += b"+%s\r\n" % key + shown
    replies.setdefault("HELLO", hello)
    replies.setdefault("PING", b"+PONG\r\n")

    def talk(peer: socket.socket) -> None:
        with peer.makefile("rb") as lines:
            for line in lines:
                parts = []
                for _ in range(int(line[1:])):
                    parts.append(lines.read(int(lines.readline()[1:]) + 2)[:-2])
                peer.sendall(replies.get(parts[0].decode(), b"+OK\r\n"))

    return talk


@pytest.mark.parametrize(
    ("replies", "kind", "told"),
    [
        ({"PING": b"-LOADING Redis is loading\r\n"}, OperationalError, "LOADING.*just started"),
        ({"HELLO": b"%1\r\n+version\r\n+6.0.16\r\n"}, ImproperlyConfigured, "6.0.16; miniq needs 6.2"),
        ({"HELLO": b"+OK\r\n"}, OperationalError, "no Redis answers like this"),
        ({"HELLO": b"HTTP/1.1 400 Bad Request\r\n"}, OperationalError, "not Redis' protocol"),
        ({"HELLO": b"%2\r\n+version\r\n+7.0.0\r\n+role\r\n+replica\r\n"}, OperationalError, "replica"),
    ],
)
def test_handshake_that_must_fail_says_why(replies: Dict[str, bytes], kind: Any, told: str) -> None:
    with listening(answers(**replies)) as (host, port), pytest.raises(kind, match=told):
        server_for(f"redis://{host}:{port}").connect(10)


@pytest.mark.parametrize(
    ("reply", "kind", "told", "broken"),
    [
        (b"-MOVED 3999 127.0.0.1:6381\r\n", ImproperlyConfigured, "Redis Cluster.*sentinel", False),
        (b"-CROSSSLOT Keys in request\r\n", ImproperlyConfigured, "Redis Cluster", False),
        (b"-READONLY You can't write against\r\n", OperationalError, "the master moved", True),
        (
            b"-ERR Error running script (call to f_1): @user_script:1: -READONLY You can't write\r\n",
            OperationalError,
            "the master moved",
            True,
        ),
        (b"-LOADING Redis is loading\r\n", OperationalError, "just started", True),
        (b"-BUSY Redis is busy\r\n", OperationalError, "script runs too long", False),
        (b"-MISCONF cannot save\r\n", OperationalError, "disk", False),
        (b":1\r\n:2\r\n", None, "nobody asked for", True),
        (b"%1\r\n", OperationalError, "time for it was over", True),
        (b"nonsense\r\n", OperationalError, "not Redis' protocol", True),
    ],
)
def test_answer_that_is_rare_is_understood(
    reply: bytes, kind: Any, told: str, broken: bool, connect: Any
) -> None:
    with listening(answers(LPUSH=reply)) as (host, port):
        redis = connect(f"redis://{host}:{port}", socket_timeout=5 if kind else 0.2)
        if kind:
            with pytest.raises(kind, match=told):
                redis.call("LPUSH", "key", 1, timeout_s=0.2 if "time" in told else None)
        else:
            redis.call("LPUSH", "key", 1)
            with pytest.raises(OperationalError, match=told):
                redis.take_pushes()
        assert redis.broken == broken
        redis.close()


def test_memory_that_is_full_is_passing(new_redis: Callable[..., RedisServer], connect: Any) -> None:
    server = new_redis(maxmemory="1")
    redis = connect(server.url())
    with pytest.raises(OperationalError, match="OOM.*maxmemory"):
        redis.call("SET", "key", "x")
    server.command("CONFIG", "SET", "maxmemory", 0)
    assert redis.call("SET", "key", "x") == b"OK"


def test_server_with_too_many_clients_says_so(new_redis: Callable[..., RedisServer], connect: Any) -> None:
    server = new_redis(arguments=["--maxclients", "2"])
    for _ in range(2):
        connect(server.url())
    with pytest.raises(OperationalError, match="max number of clients|closed the connection"):
        connect(server.url())


# -- the pool ------------------------------------------------------------------------------------


def test_connection_of_the_pool_is_used_again(redis_server: RedisServer, redis_url: str) -> None:
    server = server_for(redis_url)
    with server.borrow(10) as first:
        number = first.call("CLIENT", "ID")
    with server.borrow(10) as again:
        assert again is first and again.call("CLIENT", "ID") == number


def test_connection_closed_while_idle_is_replaced(redis_server: RedisServer, redis_url: str) -> None:
    server = server_for(redis_url)
    with server.borrow(10) as first:
        number = first.call("CLIENT", "ID")
    redis_server.command("CLIENT", "KILL", "ID", number)
    wait_until(first.has_input, what="the end")
    with server.borrow(10) as second:
        assert second.call("CLIENT", "ID") != number
    assert first.broken and first.fileno() == -1


def test_connection_that_was_idle_for_long_is_asked_first(redis_server: RedisServer, redis_url: str) -> None:
    server = server_for(redis_url, health_check_interval=1e-9)
    with server.borrow(10) as redis:
        number = str(redis.call("CLIENT", "ID"))
    with server.borrow(10) as again:
        assert again is redis
        (row,) = (row for row in redis_server.clients() if row["id"] == number)
        assert row["cmd"] == "ping"


def test_idle_connections_into_a_black_hole_are_replaced(redis_server: RedisServer) -> None:
    with Proxy(redis_server.port) as proxy:
        server = server_for(proxy.url(redis_server.url()), health_check_interval=1e-9, socket_timeout=0.2)
        with server.borrow(10) as first, server.borrow(10) as second:
            pass
        proxy.black_hole()
        with server.borrow(10) as third:
            assert third.call("PING") == b"PONG"
        assert first.broken and second.broken
        Server.close_all()


def test_one_that_broke_has_the_others_asked_first(redis_server: RedisServer) -> None:
    with Proxy(redis_server.port) as proxy:
        server = server_for(proxy.url(redis_server.url()), socket_timeout=0.2)
        with server.borrow(10), server.borrow(10), server.borrow(10):
            pass
        proxy.black_hole()
        with pytest.raises(OperationalError), server.borrow(10) as redis:
            redis.call("PING")
        for _ in range(3):
            with server.borrow(10) as redis:
                assert redis.call("PING") == b"PONG"
        Server.close_all()


def test_broken_connection_is_not_put_back(redis_server: RedisServer, redis_url: str) -> None:
    server = server_for(redis_url, max_connections=1)
    for _ in range(3):
        with pytest.raises(OperationalError), server.borrow(10) as redis:
            redis.call("BLPOP", "nothing", 0, timeout_s=0.02)
        assert redis.broken and redis.fileno() == -1
    with server.borrow(10) as redis:
        assert redis.call("PING") == b"PONG"


def test_pool_that_is_lent_out_names_its_limit(redis_url: str) -> None:
    server = server_for(redis_url, max_connections=2)
    told = "all 2 connections of the pool.*max_connections"
    with server.borrow(10), server.borrow(10), pytest.raises(OperationalError, match=told):
        server.take(0.05)


def test_who_waits_gets_what_is_given_back(redis_url: str) -> None:
    server = server_for(redis_url, max_connections=1)
    got: List[Connection] = []

    def borrow() -> None:
        with server.borrow(20) as redis:
            got.append(redis)

    with server.borrow(10) as redis:
        threads = [threading.Thread(target=borrow) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server._waiting == 4, what="four who wait")
    for thread in threads:
        thread.join(20)
    assert got == [redis] * 4


def test_connection_that_was_lost_makes_room_when_it_is_collected(redis_url: str) -> None:
    server = server_for(redis_url, max_connections=1)
    lost = server.take(10)
    number = lost.call("CLIENT", "ID")
    del lost
    gc.collect()
    with server.borrow(10) as redis:
        assert redis.call("CLIENT", "ID") != number


def test_failed_connecting_leaves_the_pool_its_room() -> None:
    server = server_for(f"redis://{HOST}:{free_port()}", max_connections=1)
    for _ in range(3):
        with pytest.raises(OperationalError, match="connection refused"):
            server.take(10)


def test_many_threads_get_each_their_own_answers(redis_url: str) -> None:
    server = server_for(redis_url, max_connections=3)
    wrong: List[Any] = []

    def work(number: int) -> None:
        for turn in range(100):
            text = f"{number}:{turn}".encode()
            with server.borrow(60) as redis:
                if redis.pipeline([("ECHO", text), ("ECHO", text[::-1])]) != [text, text[::-1]]:
                    wrong.append(text)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert len(server._members) <= 3


# -- forks ---------------------------------------------------------------------------------------


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; return its exit code, 0 where it raised nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads, from 3.12 on
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            os.write(2, f"in the child: {error!r}\n".encode())
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


@NO_FORK
def test_child_has_connections_of_its_own_and_the_parent_keeps_its(
    redis_server: RedisServer, redis_url: str, connect: Any
) -> None:
    server = server_for(redis_url, max_connections=1)
    own = connect(redis_url)
    parents = own.call("CLIENT", "ID")
    with server.borrow(10) as lent:

        def work() -> None:
            assert own.fileno() == lent.fileno() == -1
            with pytest.raises(OperationalError, match="inherited through a fork"):
                own.call("SET", "by", "the child")
            # The parent lent its only one: that is nothing to the child.
            with server.borrow(10) as redis:
                assert redis.call("CLIENT", "ID") != parents
                redis.call("SET", "child", 1)
            with server_for(redis_url, max_connections=1).borrow(10) as redis:
                redis.call("SET", "child", 2)

        # As if another thread had been about to take one.
        with server._returned:
            assert in_child(work) == 0
        assert lent.call("GET", "child") == b"2"
        assert lent.call("EXISTS", "by") == 0
    assert own.call("CLIENT", "ID") == parents


@NO_FORK
def test_child_that_leaves_the_parents_loan_closes_nothing_of_it(redis_url: str) -> None:
    server = server_for(redis_url, max_connections=1)
    loan = server.borrow(10)
    redis = loan.__enter__()

    def work() -> None:
        loan.__exit__(None, None, None)
        with server.borrow(10) as mine:
            assert mine is not redis and mine.call("PING") == b"PONG"

    assert in_child(work) == 0
    assert redis.call("PING") == b"PONG"
    loan.__exit__(None, None, None)


# -- failover ------------------------------------------------------------------------------------


def test_next_url_is_used_when_one_fails_and_remembered(
    new_redis: Callable[..., RedisServer], connect: Any
) -> None:
    one, two = new_redis(), new_redis()
    urls = f"{one.url()};{two.url()}"
    redis = connect(urls)
    assert redis.url == one.url()
    one.stop()
    with pytest.raises(OperationalError):
        redis.call("PING")
    assert connect(urls).url == two.url()
    one.start()
    assert connect(urls).url == two.url()
    two.stop()
    assert connect(urls).url == one.url()
    one.stop()
    with pytest.raises(
        OperationalError, match=f"none of 2 servers.*{one.port}.*refused.*{two.port}.*refused"
    ):
        connect(urls)


def test_silent_server_leaves_time_for_the_next_url(redis_server: RedisServer, connect: Any) -> None:
    with listening(hold) as (host, port):
        redis = connect(f"redis://{host}:{port};{redis_server.url()}", timeout_s=1.0)
        assert redis.url == redis_server.url()
        redis.close()


def test_replica_is_no_master_and_a_master_may_become_one(
    new_redis: Callable[..., RedisServer], connect: Any
) -> None:
    # A master that is asked to end waits for its replicas otherwise.
    at_once = ["--shutdown-timeout", "0"]
    one, two = new_redis(arguments=at_once), new_redis(arguments=at_once)
    two.command("REPLICAOF", HOST, one.port)
    with pytest.raises(OperationalError, match="is a replica"):
        connect(two.url())
    urls = f"{two.url()};{one.url()}"
    redis = connect(urls)
    assert redis.url == one.url()
    two.command("REPLICAOF", "NO", "ONE")
    one.command("REPLICAOF", HOST, two.port)
    with pytest.raises(OperationalError, match="READONLY.*the master moved"):
        redis.call("LPUSH", "key", 1)
    assert redis.broken
    assert connect(urls).call("LPUSH", "key", 1) == 1


class Sentinel(RedisServer):
    """A redis-sentinel with a password that watches `master` under the name mymaster."""

    def __init__(self, folder: Path, master: RedisServer, password: str) -> None:
        super().__init__(folder, password=password)
        self.configuration = folder / "sentinel.conf"
        self.configuration.write_text(
            f"port {self.port}\nbind {HOST}\nunixsocket {self.socket_path}\ndir {folder}\n"
            f"requirepass {password}\nsentinel monitor mymaster {HOST} {master.port} 1\n"
            "sentinel down-after-milliseconds mymaster 700\nsentinel failover-timeout mymaster 1000\n"
        )

    def _arguments(self) -> List[str]:
        return [str(self.configuration), "--sentinel"]

    def knows_a_good_replica(self) -> bool:
        fields = [field for row in self.command("SENTINEL", "REPLICAS", "mymaster") for field in row]
        told = dict(zip(fields[::2], fields[1::2]))
        return told.get(b"flags") == b"slave" and told.get(b"master-link-status") == b"ok"


def test_sentinels_tell_the_master_and_the_one_after_it(
    new_redis: Callable[..., RedisServer], tmp_path: Path, connect: Any
) -> None:
    one, two = (new_redis(password="secret", arguments=["--shutdown-timeout", "0"]) for _ in range(2))
    for server in (one, two):
        server.command("CONFIG", "SET", "masterauth", "secret", "repl-diskless-sync-delay", 0)
    two.command("REPLICAOF", HOST, one.port)
    wait_until(lambda: two.info("replication")["master_link_status"] == "up", what="the replica's sync")
    with Sentinel(tmp_path / "sentinel", one, "guarded") as sentinel:
        sentinel.command("SENTINEL", "SET", "mymaster", "auth-pass", "secret")
        # Ten seconds and one otherwise; a replica it has not heard of lately it does not make the master.
        sentinel.command("SENTINEL", "DEBUG", "INFO-PERIOD", 100, "PING-PERIOD", 200)
        wait_until(sentinel.knows_a_good_replica, what=lambda: f"a replica:\n{sentinel.log}")
        # The first sentinel is down: the next one is asked.
        urls = f"sentinel://:secret@{HOST}:{free_port()},{HOST}:{sentinel.port}/1?master_name="
        kwargs = {"sentinel_kwargs": {"password": "guarded"}}
        redis = connect(urls + "mymaster", **kwargs)
        assert f"{HOST}:{one.port}" in redis.url and "secret" not in redis.url
        assert b"db=1 " in redis.call("CLIENT", "INFO")
        with pytest.raises(OperationalError, match="knows no master called 'other'"):
            connect(urls + "other", **kwargs)
        with pytest.raises(OperationalError, match="NOAUTH"):
            connect(urls + "mymaster")
        one.kill()

        def moved() -> Any:
            try:
                return connect(urls + "mymaster", timeout_s=1.0, **kwargs)
            except OperationalError:
                return None

        redis = wait_until(moved, 30, lambda: f"the new master:\n{sentinel.log}", pause_s=0.05)
        assert f"{HOST}:{two.port}" in redis.url
        assert redis.call("LPUSH", "key", 1) == 1

# SPDX-License-Identifier: MIT
"""memcached: replies from bytes, the choice of a server, results on real servers in good and bad times."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from servers import MemcachedServer
from waiting import wait_until
from workers import WorkerProcess

from miniq import MiniQ
from miniq.backends.base import StoredResult
from miniq.backends.cache import MemcachedBackend
from miniq.connections.memcached import (
    MAX_AT_ONCE,
    MAX_BYTES_AT_ONCE,
    MAX_EXPTIME,
    MAX_LINE_BYTES,
    Connection,
    Parser,
    ProtocolError,
    Reply,
    Value,
    Write,
    addresses_of,
    choose,
    exptime_of,
    murmur3_32,
    node_name,
)
from miniq.exceptions import BackendGetMetaError, BackendStoreError, ImproperlyConfigured, OperationalError
from miniq.serialization import compress


def result(task_id: str, state: str = "SUCCESS", value: Any = None, expires_s: Any = None) -> StoredResult:
    body = json.dumps({"status": state, "result": value, "task_id": task_id}).encode()
    return StoredResult(task_id, state, body, "application/json", "utf-8", expires_s)


# -- replies from bytes ----------------------------------------------------------------------------

REPLIES: List[Tuple[bytes, Reply]] = [
    (b"STORED\r\n", b"STORED"),
    (b"NOT_STORED\r\n", b"NOT_STORED"),
    (b"EXISTS\r\n", b"EXISTS"),
    (b"NOT_FOUND\r\n", b"NOT_FOUND"),
    (b"DELETED\r\n", b"DELETED"),
    (b"ERROR\r\n", b"ERROR"),
    (b"CLIENT_ERROR bad data chunk\r\n", b"CLIENT_ERROR bad data chunk"),
    (b"SERVER_ERROR out of memory storing object\r\n", b"SERVER_ERROR out of memory storing object"),
    (b"END\r\n", {}),
    (b"VALUE k 0 3\r\nabc\r\nEND\r\n", {b"k": Value(b"abc", b"")}),
    (b"VALUE k 5 0 17\r\n\r\nEND\r\n", {b"k": Value(b"", b"17")}),
    (
        b"VALUE a 0 5 1\r\nEND\r\n\r\nVALUE b 0 2 18446744073709551615\r\n\r\n\r\nEND\r\n",
        {b"a": Value(b"END\r\n", b"1"), b"b": Value(b"\r\n", b"18446744073709551615")},
    ),
]


def replies_in(parser: Parser) -> List[Reply]:
    return list(iter(parser.get, None))


@pytest.mark.parametrize(("data", "reply"), REPLIES)
def test_reply_is_the_same_whole_in_pieces_and_with_more_behind_it(data: bytes, reply: Reply) -> None:
    whole = Parser()
    whole.feed(data)
    assert (replies_in(whole), whole.idle) == ([reply], True)
    pieces = Parser()
    for index in range(len(data)):
        assert pieces.get() is None
        pieces.feed(data[index : index + 1])
    assert (replies_in(pieces), pieces.idle) == ([reply], True)
    trailing = Parser()
    trailing.feed(data + data + b"VAL")
    assert (replies_in(trailing), trailing.idle) == ([reply, reply], False)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"-ERR unknown command\r\n",
        b"\r\n",
        b"stored\r\n",
        b"VALUE k 0\r\n",
        b"VALUE k 0 -1\r\n",
        b"VALUE k 0 x\r\n",
        b"VALUE k 0 1 2 3\r\n",
        b"VALUE k 0 99999999999\r\n",
        b"VALUE k 0 " + b"9" * 1000 + b"\r\n",
        b"VALUE k 0 3\r\nabcdEND\r\n",
        b"VALUE k 0 1\r\na\r\nSTORED\r\n",
        b"x" * MAX_LINE_BYTES,
        b"".join(b"VALUE %d 0 1\r\na\r\n" % number for number in range(MAX_AT_ONCE + 1)),
    ],
)
def test_what_memcached_does_not_send_is_an_error(data: bytes) -> None:
    parser = Parser()
    parser.feed(data)
    with pytest.raises(ProtocolError):
        replies_in(parser)


def test_garbage_gives_protocol_errors_only() -> None:
    seed = random.randrange(10**9)
    chance = random.Random(seed)
    for _ in range(3000):
        parser = Parser()
        data = bytearray(b"".join(chance.choice(REPLIES)[0] for _ in range(3)))
        for _ in range(chance.randrange(4)):
            data[chance.randrange(len(data))] = chance.choice(b"\r\n 09VE\0\xff")
        try:
            while data:
                size = chance.randrange(1, 20)
                parser.feed(bytes(data[:size]))
                del data[:size]
                for reply in replies_in(parser):
                    assert isinstance(reply, (bytes, dict)), f"seed {seed}"
        except ProtocolError:
            continue


# -- the choice of a server ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0),
        (b"\0\0\0\0", 0x2362F9DE),
        (b"a", 0x3C2569B2),
        (b"test", 0xBA6BD213),
        (b"Hello, world!", 0xC0363E43),
        (b"The quick brown fox jumps over the lazy dog", 0x2E4FF723),
    ],
)
def test_hash_is_murmur3(data: bytes, value: int) -> None:
    assert murmur3_32(data) == value


def test_servers_are_chosen_as_pymemcache_does() -> None:
    # What HashClient of pymemcache 4.0.0 chooses for these servers and keys.
    url = "memcache://mc1;mc2.example:11212;[::1]:11213;10.0.0.1:11211;/run/mc.sock/"
    names = [node_name(address) for address in addresses_of(url)]
    keys = [f"celery-task-meta-00000000-0000-4000-8000-{number:012d}" for number in range(12)]
    assert [names.index(choose(names, key)) for key in keys] == [1, 0, 3, 3, 4, 4, 4, 0, 1, 0, 1, 4]


def test_when_a_server_is_taken_away_only_its_keys_move() -> None:
    names = ["a:1", "b:1", "c:1", "d:1"]
    keys = [f"key {number}" for number in range(500)]
    before = {key: choose(names, key) for key in keys}
    assert set(before.values()) == set(names)
    for key in keys:
        if before[key] != "b:1":
            assert choose(["d:1", "a:1", "c:1"], key) == before[key]


@pytest.mark.parametrize(
    ("url", "addresses"),
    [
        ("memcache://localhost", [("localhost", 11211)]),
        ("memcache://localhost:1234/", [("localhost", 1234)]),
        ("cache+memcached://h1:1;h2;h1:1;/", [("h1", 1), ("h2", 11211)]),
        ("memcache://[::1];[fe80::1]:5", [("::1", 11211), ("fe80::1", 5)]),
        ("memcache:///run/mc.sock;unix:/run/mc2.sock", ["/run/mc.sock", "/run/mc2.sock"]),
    ],
)
def test_servers_in_a_url(url: str, addresses: List[Any]) -> None:
    assert addresses_of(url) == addresses


@pytest.mark.parametrize(
    "url",
    [
        "memcache://",
        "memcache://;/",
        "memcache://host:port",
        "memcache://host:0",
        "memcache://host:70000",
        "memcache://host:11211/0",
        "memcache://user:secret@host",
        "memcache://:11211",
        "memcache://host?x=secret",
    ],
)
def test_url_that_names_no_server_is_refused(url: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="no server: write memcache://host:port") as caught:
        addresses_of(url)
    assert "secret@" not in str(caught.value)


@pytest.mark.parametrize(
    ("expires_s", "exptime"),
    [
        (None, 0),
        (0.0, 1),
        (0.2, 1),
        (10.0, 10),
        (10.5, 11),
        (30 * 86400.0, 30 * 86400),
        (30 * 86400.0 + 1, 1_700_000_000 + 30 * 86400 + 1),
        (1e12, MAX_EXPTIME),
    ],
)
def test_time_to_keep_is_seconds_or_a_date_and_never_at_once(expires_s: Any, exptime: int) -> None:
    assert exptime_of(expires_s, 1_700_000_000.0) == exptime


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"socket_timout": 1}, "did you mean socket_timeout"),
        ({"socket_timeout": 0}, "socket_timeout must be a number of seconds above 0, not 0"),
        ({"socket_timeout": True}, "socket_timeout must be"),
        ({"socket_connect_timeout": "4"}, "socket_connect_timeout must be"),
        ({"global_keyprefix": "a b"}, "global_keyprefix must be"),
        ({"global_keyprefix": None}, "global_keyprefix must be"),
    ],
)
def test_wrong_option_is_refused(options: Dict[str, Any], text: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=text):
        MemcachedBackend("memcache://localhost", options, time.time)


# -- real servers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemcachedServer]:
    with MemcachedServer(tmp_path_factory.mktemp("memcached")) as server:
        yield server


@pytest.fixture
def server(shared: MemcachedServer) -> MemcachedServer:
    """A server for tests that leave it running."""
    shared.command("flush_all")
    return shared


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[MemcachedServer]:
    """A server for a test that stops it."""
    with MemcachedServer(tmp_path / "memcached") as server:
        yield server


@pytest.fixture
def connect() -> Iterator[Callable[..., MemcachedBackend]]:
    made: List[MemcachedBackend] = []

    def new(*servers: MemcachedServer, **options: Any) -> MemcachedBackend:
        names = ";".join(f"127.0.0.1:{server.port}" for server in servers)
        made.append(MemcachedBackend(f"memcache://{names}/", options, time.time))
        return made[-1]

    yield new
    for backend in made:
        backend.close()


def connections(server: MemcachedServer) -> int:
    """Return how many connections the server ever had, but for that which asks."""
    lines = dict(line.split()[1:3] for line in server.command("stats").splitlines() if line[:4] == b"STAT")
    return int(lines[b"total_connections"])


def freeze(server: MemcachedServer) -> None:
    """Have the server stand still; the signal alone has only been sent, and threads go on for a moment."""
    server.pause()
    tasks = Path(f"/proc/{server.pid}/task")
    if tasks.is_dir():
        wait_until(
            lambda: all(
                (task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.iterdir()
            ),
            what=f"{server} has stopped",
        )


def test_key_value_and_time_are_celerys(server: MemcachedServer, connect: Any) -> None:
    backend = connect(server)
    backend.store([result("one", expires_s=100.0), result("two"), result("three", expires_s=1e7)])
    body = result("one").body
    assert server.command("get celery-task-meta-one") == (
        b"VALUE celery-task-meta-one 0 %d\r\n%b\r\nEND\r\n" % (len(body), body)
    )
    left = {name: server.command(f"mg celery-task-meta-{name} t") for name in ("one", "two", "three")}
    assert left["two"] == b"HD t-1\r\n"
    assert 90 <= int(left["one"][4:]) <= 100
    assert 1e7 - 10 <= int(left["three"][4:]) <= 1e7 + 2


def test_global_key_prefix_is_before_the_key(server: MemcachedServer, connect: Any) -> None:
    connect(server, global_keyprefix="app2").store([result("one")])
    assert server.command("get app2_celery-task-meta-one").startswith(b"VALUE")
    assert connect(server).fetch(["one"]) == {}


def test_id_that_no_key_may_hold_is_hashed(server: MemcachedServer, connect: Any) -> None:
    backend = connect(server)
    ids = ["a b", "a\r\nflush_all", "ü", "x" * 300, "x" * 234, "\0", "\x7f", "plain"]
    backend.store([result(task_id, value=number) for number, task_id in enumerate(ids)])
    found = backend.fetch(ids)
    assert [json.loads(found[task_id].body)["result"] for task_id in ids] == list(range(len(ids)))
    backend.forget(ids[:-1])
    assert list(backend.fetch(ids)) == ["plain"]


def test_several_servers_share_the_results(own_server: MemcachedServer, server: Any, connect: Any) -> None:
    backend = connect(own_server, server)
    ids = [str(number) for number in range(300)]
    backend.store([result(task_id) for task_id in ids])
    assert set(backend.fetch(ids)) == set(ids)
    names = [f"127.0.0.1:{one.port}" for one in (own_server, server)]
    for one, name in zip((own_server, server), names):
        mine = [task_id for task_id in ids if choose(names, f"celery-task-meta-{task_id}") == name]
        assert 50 < len(mine) < 250
        asked = " ".join(f"celery-task-meta-{task_id}" for task_id in ids[:100])
        there = one.command(f"get {asked}").count(b"VALUE")
        assert there == len(set(mine) & set(ids[:100]))
    assert len(list(backend.wait(ids, 0))) == 300
    backend.forget(ids)
    assert backend.fetch(ids) == {}


def test_one_round_trip_stores_new_results_and_fetches_a_hundred(
    server: MemcachedServer, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[bytes] = []
    exchange = Connection._exchange

    def counted(self: Connection, request: bytes, replies: int, deadline_mono: float) -> Any:
        asked.append(request)
        return exchange(self, request, replies, deadline_mono)

    monkeypatch.setattr(Connection, "_exchange", counted)
    backend = connect(server)
    ids = [str(number) for number in range(100)]
    backend.store([result(task_id) for task_id in ids])
    assert len(asked) == 1
    backend.fetch(ids)
    assert len(asked) == 2


def test_results_of_one_task_in_one_batch_end_as_the_last_that_may(server: Any, connect: Any) -> None:
    backend = connect(server)
    backend.store([result("one", state) for state in ("STARTED", "RETRY", "SUCCESS", "STARTED")])
    assert backend.fetch(["one"])["one"].state == "SUCCESS"
    backend.store([result("two", "STARTED", 1)])
    backend.store([result("two", "PROGRESS", 2), result("two", "PROGRESS", 3)])
    assert json.loads(backend.fetch(["two"])["two"].body)["result"] == 3


def test_threads_that_race_agree_on_the_first_success(server: MemcachedServer, connect: Any) -> None:
    told: Dict[int, List[Any]] = {}
    gate = threading.Barrier(4)

    def race(me: int) -> None:
        backend = connect(server)
        told[me] = []
        gate.wait()
        for number in range(50):
            for state in ("STARTED", "FAILURE", "SUCCESS", "RETRY"):
                backend.store([result(str(number), state, me)])
            found = backend.fetch([str(number)])[str(number)]
            told[me].append((found.state, json.loads(found.body)["result"]))

    threads = [threading.Thread(target=race, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told[0]) == 50 and {state for state, _ in told[0]} == {"SUCCESS"}
    assert all(told[me] == told[0] for me in told)


def test_value_changed_by_others_each_time_is_given_up_after_so_many_rounds(
    server: MemcachedServer, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, other = connect(server), connect(server)
    other.store([result("one", "PROGRESS")])
    get = Connection.get
    rounds: List[int] = []

    def meddle(self: Connection, keys: Any, tokens: bool = False, timeout_s: Any = None) -> Any:
        found = get(self, keys, tokens, timeout_s)
        if self is next(iter(backend._servers.values())):
            rounds.append(1)
            other.store([result("one", "PROGRESS", len(rounds))])
        return found

    monkeypatch.setattr(Connection, "get", meddle)
    with pytest.raises(BackendStoreError, match="task one was changed by others 50 times"):
        backend.store([result("one")])
    assert len(rounds) == 50


def test_too_large_result_is_refused_for_good_and_the_others_are_stored(server: Any, connect: Any) -> None:
    backend = connect(server)
    with pytest.raises(BackendStoreError, match="is too large for memcached: it takes 1 MB") as caught:
        backend.store([result("one"), result("large", value="x" * 3_000_000), result("two")])
    assert (caught.value.task_id, caught.value.state) == ("large", "SUCCESS")
    # No use in trying again: the task's outcome has to be another one.
    assert caught.value.__cause__ is None
    assert set(backend.fetch(["one", "large", "two"])) == {"one", "two"}


def test_large_batches_go_in_portions(
    server: MemcachedServer, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: List[int] = []
    exchange = Connection._exchange

    def measured(self: Connection, request: bytes, replies: int, deadline_mono: float) -> Any:
        sizes.append(len(request))
        return exchange(self, request, replies, deadline_mono)

    monkeypatch.setattr(Connection, "_exchange", measured)
    backend = connect(server)
    ids = [str(number) for number in range(30)]
    backend.store([result(task_id, value="x" * 400_000) for task_id in ids])
    assert 400_000 < max(sizes) <= MAX_BYTES_AT_ONCE
    assert set(backend.fetch(ids)) == set(ids)


def test_compressed_result_is_handed_out_as_its_serializer_wrote_it(server: Any, connect: Any) -> None:
    backend = connect(server)
    packed, content_type = compress(result("one").body, "gzip")
    value = b"\0celery-compressed\0" + content_type.encode() + b"\0" + packed
    raw = next(iter(backend._servers.values()))
    assert raw.write([Write(b"celery-task-meta-one", value, 0)]) == [b"STORED"]
    assert backend.fetch(["one"]) == {"one": result("one")}


def test_garbage_is_an_error_that_names_the_key_and_is_mended(
    server: MemcachedServer, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    backend = connect(server)
    raw = next(iter(backend._servers.values()))
    raw.write([Write(b"celery-task-meta-one", b"garbage", 0)])
    with pytest.raises(BackendGetMetaError, match="celery-task-meta-one.* holds no result"):
        backend.fetch(["one"])
    backend.store([result("one")])
    assert set(backend.fetch(["one"])) == {"one"}
    assert "it is replaced" in caplog.text


# -- bad times -------------------------------------------------------------------------------------


def test_connection_that_the_server_closed_is_made_anew_without_an_error(
    own_server: MemcachedServer, connect: Any
) -> None:
    backend = connect(own_server)
    backend.store([result("one")])
    own_server.restart()
    backend.store([result("two")])
    assert set(backend.fetch(["one", "two"])) == {"two"}
    own_server.kill()
    with pytest.raises(BackendStoreError, match="no server listens there") as caught:
        backend.store([result("three")])
    assert isinstance(caught.value.__cause__, OperationalError)
    own_server.start()
    backend.store([result("three")])


def test_silent_server_is_an_error_in_time(own_server: MemcachedServer, connect: Any) -> None:
    backend = connect(own_server, socket_timeout=0.2)
    backend.store([result("one")])
    freeze(own_server)
    try:
        for call in (
            lambda: backend.fetch(["one"]),
            lambda: backend.store([result("two")]),
            lambda: backend.forget(["one"]),
            lambda: list(backend.wait(["two"], 0)),
        ):
            before = time.monotonic()
            with pytest.raises((BackendStoreError, BackendGetMetaError), match="the time for it was over"):
                call()
            assert time.monotonic() - before < 2.0
        # Who waits does so for as long as he said.
        before = time.monotonic()
        assert list(backend.wait(["two"], 0.3)) == []
        assert 0.3 <= time.monotonic() - before < 2.0
    finally:
        own_server.resume()
    # What was asked in vain is answered by now, on connections that nobody uses any more.
    assert set(backend.fetch(["one"])) <= {"one"}
    backend.store([result("four", value=4)])
    assert backend.fetch(["four"]) == {"four": result("four", value=4)}


def test_waiter_survives_a_restart(
    own_server: MemcachedServer, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    backend = connect(own_server)
    found: List[StoredResult] = []
    waiting = threading.Thread(target=lambda: found.extend(backend.wait(["one"], 20.0)))
    waiting.start()
    wait_until(lambda: connections(own_server) > 2, what="the waiter has asked")
    own_server.kill()
    wait_until(lambda: "waited for all the same" in caplog.text, what="the waiter has noticed")
    own_server.start()
    connect(own_server).store([result("one")])
    waiting.join()
    assert [stored.task_id for stored in found] == ["one"]
    assert caplog.text.count("waited for all the same") == 1


def test_call_that_a_signal_breaks_off_does_not_shift_the_answers(
    own_server: MemcachedServer, connect: Any
) -> None:
    if not hasattr(signal, "pthread_kill"):
        pytest.skip("no signals to a thread here")
    backend = connect(own_server)
    backend.store([result("one"), result("two")])

    class Broken(Exception):
        pass

    def break_off(*_: Any) -> None:
        raise Broken

    before = signal.signal(signal.SIGUSR1, break_off)
    main = threading.main_thread().ident
    assert main is not None
    freeze(own_server)
    try:
        timer = threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGUSR1))
        timer.start()
        with pytest.raises(Broken):
            backend.fetch(["one"])
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
        own_server.resume()
    assert backend.fetch(["two"]) == {"two": result("two")}


class Peer:
    """Some program that answers every connection with the same bytes."""

    def __init__(self, answer: bytes, pause_s: float = 0.0) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._answer, self._pause_s = answer, pause_s
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            peer, _ = self._listener.accept()
            with peer:
                peer.settimeout(10.0)
                if not peer.recv(65536):
                    return  # `close` below
                try:
                    step = 1 if self._pause_s else len(self._answer)
                    for begin in range(0, len(self._answer), step):
                        peer.sendall(self._answer[begin : begin + step])
                        time.sleep(self._pause_s)
                    while peer.recv(65536):
                        pass  # no second answer; and an end without unread bytes, which would be a reset
                except OSError:
                    pass  # the other side had enough

    def close(self) -> None:
        socket.create_connection(("127.0.0.1", self.port)).close()
        self._thread.join()
        self._listener.close()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does something else than memcached listen there?"),
        (b"-ERR unknown command 'get'\r\n", "does something else than memcached listen there?"),
        (b"ERROR\r\n", "cannot read: ERROR"),
        (b"SERVER_ERROR busy\r\n", "cannot read: SERVER_ERROR busy"),
        (b"VALUE other 0 1\r\na\r\nEND\r\n", "not asked for"),
    ],
)
def test_peer_that_is_no_memcached_is_named(answer: bytes, text: str) -> None:
    peer = Peer(answer)
    connection = Connection(("127.0.0.1", peer.port), 5.0, 5.0)
    try:
        with pytest.raises(OperationalError) as caught:
            connection.get([b"one"])
    finally:
        connection.close()
        peer.close()
    assert text in str(caught.value) and f"127.0.0.1:{peer.port}" in str(caught.value)


def test_peer_that_dribbles_meets_the_deadline() -> None:
    peer = Peer(b"VALUE one 0 1000\r\n" + b"x" * 1000, pause_s=0.01)
    connection = Connection(("127.0.0.1", peer.port), 0.2, 5.0)
    before = time.monotonic()
    try:
        with pytest.raises(OperationalError, match="the time for it was over"):
            connection.get([b"one"])
        assert time.monotonic() - before < 2.0
    finally:
        connection.close()
        peer.close()


def test_answer_that_nobody_asked_for_is_not_taken_for_the_next() -> None:
    peer = Peer(b"END\r\nVALUE one 0 1\r\nx\r\nEND\r\n", pause_s=0.001)
    connection = Connection(("127.0.0.1", peer.port), 5.0, 5.0)
    try:
        for _ in range(3):
            assert connection.get([b"one"]) == {}
            stream = connection._stream
            assert stream is not None
            wait_until(stream.has_input, what="the rest has arrived")
    finally:
        connection.close()
        peer.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a full queue is another matter")
def test_host_that_does_not_answer_is_an_error_when_the_time_to_connect_is_over() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        waiting = [socket.socket() for _ in range(3)]
        try:
            for one in waiting:
                one.setblocking(False)
                one.connect_ex(("127.0.0.1", port))
            connection = Connection(("127.0.0.1", port), 20.0, 0.2)
            before = time.monotonic()
            with pytest.raises(OperationalError, match="no connection: the time for it was over"):
                connection.get([b"one"])
            assert time.monotonic() - before < 5.0
        finally:
            for one in waiting:
                one.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_has_a_connection_of_its_own(server: MemcachedServer, connect: Any) -> None:
    backend = connect(server)
    backend.store([result("one", value="parent")])
    before = connections(server)
    child = os.fork()
    if child == 0:
        try:
            for number in range(50):
                backend.store([result(f"child {number}")])
                assert backend.fetch([f"child {number}"])
            os._exit(0)
        finally:
            os._exit(1)
    for _ in range(50):
        assert backend.fetch(["one"]) == {"one": result("one", value="parent")}
    assert os.waitpid(child, 0)[1] == 0
    # One for the child, one for asking.
    assert connections(server) == before + 2


# -- through an app --------------------------------------------------------------------------------

PROJECT = """
    from miniq import MiniQ

    app = MiniQ("proj", backend={backend!r}, task_track_started=True)

    @app.task
    def add(x, y):
        return x + y

    @app.task
    def large():
        return "x" * 2_000_000
"""


def test_results_of_a_real_worker_are_waited_for(
    server: MemcachedServer, make_app: Callable[..., MiniQ], worker_process: Callable[..., WorkerProcess]
) -> None:
    app = make_app("proj", backend=server.url())
    worker = worker_process(PROJECT.format(backend=server.url()), "-P", "solo")
    large = app.send_task("proj.large")
    added = [app.send_task("proj.add", (number, 1)) for number in range(5)]
    assert [one.get(timeout=20) for one in added] == [1, 2, 3, 4, 5]
    with pytest.raises(BackendStoreError, match="too large for memcached"):
        large.get(timeout=20)
    assert worker.stop() == 0

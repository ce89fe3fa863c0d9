# SPDX-License-Identifier: MIT
"""Results on a real redis-server: Celery's values, waiting threads, lost connections, chords.

The values in ``vectors/redis_results.json`` were written by Celery 5.7.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import threading
import time
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import pytest
from proxy import Proxy
from servers import RedisServer, certificates
from waiting import wait_until
from wire import read_vectors

from miniq.backends import redis as backend_module
from miniq.backends.base import ChordPart, ClaimLost, StoredResult
from miniq.backends.redis import LOOK_S, RedisBackend
from miniq.connections import listener as listener_module
from miniq.connections.listener import Listener, Waiter
from miniq.connections.redis import Server
from miniq.connections.redis_session import Session, run_ops
from miniq.exceptions import (
    BackendGetMetaError,
    BackendStoreError,
    ImproperlyConfigured,
    OperationalError,
)
from miniq.message import Message
from miniq.result import read_meta
from miniq.routing import Queue
from miniq.serialization import exception_from_dict, prepare_accept
from miniq.states import may_replace
from miniq.transports.base import Publication
from miniq.transports.redis import RedisTransport

VECTORS: List[Dict[str, Any]] = json.loads(
    (Path(__file__).parent / "vectors" / "redis_results.json").read_text(encoding="utf-8")
)
#: Chords as Celery 5.7 counted them: its scripts with the arguments of its workers, and what these left.
CHORDS = read_vectors("redis_chords")
BODY = b'{"task": "body"}'
ACCEPT = prepare_accept(["json", "pickle"])
META = "celery-task-meta-"
GROUP = "celery-taskset-meta-"


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    yield
    for (pid, _), one in listener_module._listeners.items():
        if pid == os.getpid():
            assert (one._reader, one._wanted, one._sleepers, list(one._left)) == (None, {}, {}, [])
    listener_module.close_all()
    listener_module._listeners.clear()
    Server.close_all()


class Clock:
    """Epoch seconds that move only when told; the server has its own."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


def find(name: str) -> Dict[str, Any]:
    (found,) = [vector for vector in VECTORS if vector["name"] == name]
    return found


def open_backend(url: str, **options: Any) -> RedisBackend:
    return RedisBackend(url, options, time.time)


def result(
    task_id: str, state: str = "SUCCESS", value: Any = None, expires_s: Optional[float] = 60.0
) -> StoredResult:
    body = json.dumps({"status": state, "result": value, "task_id": task_id}).encode()
    return StoredResult(task_id, state, body, "application/json", "utf-8", expires_s)


def value_of(stored: StoredResult) -> Any:
    return read_meta(stored, ACCEPT)["result"]


def db_of(url: str) -> int:
    return int(url.rpartition("/")[2])


def calls(server: RedisServer, command: str) -> int:
    """Return how often the server ran a command."""
    told = server.info("commandstats").get(f"cmdstat_{command}", "calls=0")
    return int(told.partition("calls=")[2].partition(",")[0])


def listeners_of(server: RedisServer) -> List[Dict[str, str]]:
    return [client for client in server.clients() if client["name"] == "miniq-results"]


def channels(server: RedisServer) -> List[bytes]:
    found: List[bytes] = server.command("PUBSUB", "CHANNELS", "*")
    return found


class Waiting:
    """Threads that wait, each for results of its own; use it as a context: they end at its end."""

    def __init__(self, url: str, ids: Sequence[Sequence[str]], timeout_s: Optional[float] = 30.0) -> None:
        self.found: List[List[StoredResult]] = [[] for _ in ids]
        self.errors: List[BaseException] = []
        self.threads = [
            threading.Thread(target=self._wait, args=(url, one, timeout_s, found))
            for one, found in zip(ids, self.found)
        ]

    def _wait(self, url: str, ids: Sequence[str], timeout_s: Optional[float], found: Any) -> None:
        try:
            found += open_backend(url).wait(ids, timeout_s)
        except Exception as error:
            self.errors.append(error)

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def __enter__(self) -> "Waiting":
        self.start()
        return self

    def join(self) -> None:
        for thread in self.threads:
            thread.join(60.0)
            assert not thread.is_alive(), "still waiting"

    def __exit__(self, *error: Any) -> None:
        self.join()


# -- what is stored ------------------------------------------------------------------------------

STORED = [
    (vector["name"], key, stored["value"])
    for vector in VECTORS
    for key, stored in vector.get("keys", {}).items()
    if META in key
] + [
    (f"{vector['name']} {number}", step["key"], json.dumps(step["value"]))
    for vector in VECTORS
    for number, step in enumerate(vector.get("steps", ()))
    if step["cmd"] == "SETEX" and META in step["key"]
]


@pytest.mark.parametrize(("name", "key", "value"), STORED, ids=[f"{one[0]} {one[1][-4:]}" for one in STORED])
def test_result_written_by_celery_is_read(
    redis_server: RedisServer, redis_url: str, name: str, key: str, value: Any
) -> None:
    prefix, _, task_id = key.rpartition(META)
    raw = b64decode(value["b64"]) if isinstance(value, dict) else value.encode()
    redis_server.command("SET", key, raw, "EX", 100, db=db_of(redis_url))
    backend = open_backend(redis_url, **({"global_keyprefix": prefix.rstrip("_")} if prefix else {}))
    stored = backend.fetch([task_id])[task_id]
    meta = read_meta(stored, ACCEPT)
    assert (meta["status"], meta["task_id"]) == (stored.state, task_id)
    assert stored.expires_s is not None and 0 < stored.expires_s <= 100
    if not isinstance(value, dict):
        assert stored.body == raw
    if meta["status"] == "FAILURE":
        error = meta["result"]
        assert isinstance(error if isinstance(error, Exception) else exception_from_dict(error), Exception)
    # It is as good as one of ours: a final one stays.
    backend.store([result(task_id, "STARTED")])
    found = backend.fetch([task_id])[task_id]
    assert (found.state == "STARTED") is may_replace("STARTED", stored.state)


def test_result_is_stored_as_celery_stores_it(redis_server: RedisServer, redis_url: str) -> None:
    backend, db = open_backend(redis_url, global_keyprefix="res"), db_of(redis_url)
    with Waiting(f"{redis_url}?global_keyprefix=res", [["a"]]) as waiting:
        wait_until(lambda: channels(redis_server) == [b"res_celery-task-meta-a"])
        backend.store([result("a", expires_s=86400.0)])
    assert waiting.found == [[result("a", expires_s=None)]]
    assert redis_server.command("KEYS", "*", db=db) == [b"res_celery-task-meta-a"]
    assert redis_server.command("GET", "res_celery-task-meta-a", db=db) == result("a").body
    assert 86390 < redis_server.command("TTL", "res_celery-task-meta-a", db=db) <= 86400
    backend.store([result("b", expires_s=None), result("c", expires_s=0.0001)])
    assert redis_server.command("TTL", "res_celery-task-meta-b", db=db) == -1
    wait_until(lambda: not redis_server.command("EXISTS", "res_celery-task-meta-c", db=db))


@pytest.mark.parametrize("prefix", ["a:", "a_", "a-", "a."])
def test_prefix_with_an_end_of_its_own_is_taken_as_it_is(
    redis_server: RedisServer, redis_url: str, prefix: str
) -> None:
    backend = open_backend(redis_url, global_keyprefix=prefix)
    backend.store([result("x")])
    backend.save_group("g", b"{}", None)
    keys = redis_server.command("KEYS", "*", db=db_of(redis_url))
    assert sorted(keys) == [f"{prefix}{META}x".encode(), f"{prefix}{GROUP}g".encode()]


def test_many_results_are_one_command(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    backend = open_backend(server.url())
    backend.store([result("first")])
    before = calls(server, "evalsha")
    backend.store([result(str(n)) for n in range(500)])
    assert calls(server, "evalsha") == before + 1
    assert calls(server, "publish") == 501
    assert len(backend.fetch([str(n) for n in range(500)])) == 500
    assert calls(server, "mget") == 1


def test_compressed_result_has_its_state_beside_it(redis_server: RedisServer, redis_url: str) -> None:
    (stored,) = find("result_compression")["keys"].values()
    theirs = b64decode(stored["value"]["b64"])
    backend, db = open_backend(redis_url), db_of(redis_url)
    compressed = StoredResult("a", "FAILURE", theirs, "application/json", "utf-8", 60.0)
    backend.store([compressed])
    assert redis_server.command("GET", f"_miniq.state.{META}a", db=db) == b"FAILURE"
    backend.store([result("a", "RETRY")])
    assert redis_server.command("GET", f"{META}a", db=db) == theirs
    assert set(value_of(backend.fetch(["a"])["a"])) == {"a"}
    backend.forget(["a"])
    assert redis_server.command("KEYS", "*", db=db) == []


def test_value_that_is_no_result_is_named(redis_server: RedisServer, redis_url: str) -> None:
    redis_server.command("SET", f"{META}a", b"\xff\xfe no meta", db=db_of(redis_url))
    backend = open_backend(redis_url)
    with pytest.raises(BackendGetMetaError, match="celery-task-meta-a.*no meta"):
        backend.fetch(["a"])
    with pytest.raises(BackendGetMetaError):
        list(backend.wait(["a"], 10.0))


def test_store_joins_the_open_transaction(redis_url: str) -> None:
    backend = open_backend(redis_url)
    server = Server.of(redis_url, backend._options)
    session = Session(server)
    session.open()
    try:
        backend.store([result("a"), result("b")])
        backend.save_group("g", b"{}", 60.0)
        assert len(session.ops) == 4
        assert backend.fetch(["a", "b"]) == {}
        with server.borrow(5.0) as connection:
            run_ops(connection, session.ops)
    finally:
        session.close()
    assert sorted(backend.fetch(["a", "b"])) == ["a", "b"]
    assert backend.load_group("g") == b"{}"


def test_server_that_is_not_there_is_an_error_at_once(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    backend = open_backend(server.url())
    server.stop()
    for refused, kind in (
        (lambda: backend.store([result("a")]), BackendStoreError),
        (lambda: backend.forget(["a"]), BackendStoreError),
        (lambda: backend.fetch(["a"]), BackendGetMetaError),
        (lambda: list(backend.wait(["a"], 0)), BackendGetMetaError),
        (lambda: list(backend.wait(["a"], None)), BackendGetMetaError),
    ):
        with pytest.raises(kind, match="refused") as raised:
            refused()
        assert isinstance(raised.value.__cause__, OperationalError)


def test_connection_that_was_closed_while_idle_does_no_harm(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    backend = open_backend(server.url())
    backend.store([result("a")])
    for _ in range(5):
        server.kill_clients()
        assert "a" in backend.fetch(["a"])
        server.kill_clients()
        backend.store([result("b")])


def test_wrong_option_is_an_error_when_the_backend_is_made() -> None:
    with pytest.raises(ImproperlyConfigured, match="global_keyprefix"):
        open_backend("redis://127.0.0.1/0", global_key_prefix="x")
    with pytest.raises(ImproperlyConfigured, match="port"):
        open_backend("redis://127.0.0.1:none/0")


# -- waiting -------------------------------------------------------------------------------------


def test_64_threads_wait_on_one_connection(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    names = [str(n) for n in range(64)]
    with Waiting(server.url(), [[name] for name in names]) as waiting:
        wait_until(lambda: len(channels(server)) == 64)
        assert len(listeners_of(server)) == 1
        backend = open_backend(server.url())
        random.Random(1).shuffle(names)
        for name in names:
            backend.store([result(name)])
        # Two, and the pool.
        assert len(server.clients()) <= 2 + 10
    assert waiting.errors == []
    assert [found[0].task_id for found in waiting.found] == [str(n) for n in range(64)]
    wait_until(lambda: channels(server) == [])
    backend.close()
    wait_until(lambda: listeners_of(server) == [])


def test_all_threads_that_wait_for_one_result_get_it(redis_server: RedisServer, redis_url: str) -> None:
    with Waiting(redis_url, [["same", f"own {n}"] for n in range(20)]) as waiting:
        wait_until(lambda: len(channels(redis_server)) == 21)
        open_backend(redis_url).store([result("same"), *(result(f"own {n}") for n in range(20))])
    assert [len(found) for found in waiting.found] == [2] * 20


def test_waits_with_timeouts_leave_no_subscription(redis_server: RedisServer, redis_url: str) -> None:
    def wait_often(thread: int) -> None:
        backend, random_ = open_backend(redis_url), random.Random(thread)
        for n in range(250):
            assert list(backend.wait([f"{thread} {n}", "shared"], random_.choice((0, 0.0005, 0.003)))) == []

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(wait_often, range(20)))
    wait_until(lambda: channels(redis_server) == [])
    (one,) = listener_module._listeners.values()
    assert (one._sent, one._changed) == (set(), {})
    assert len(listeners_of(redis_server)) <= 1


def test_sending_and_looking_subscribes_to_nothing(redis_server: RedisServer, redis_url: str) -> None:
    backend = open_backend(redis_url)
    backend.store([result("a")])
    backend.fetch(["a", "b"])
    assert [stored.task_id for stored in backend.wait(["a"], 10.0)] == ["a"]
    assert list(backend.wait(["b"], 0)) == []
    assert listeners_of(redis_server) == []


def test_10000_results_are_waited_for_in_batches(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    names = [f"task {n}" for n in range(10_000)]
    with Waiting(server.url(), [names], 60.0) as waiting:
        wait_until(lambda: calls(server, "subscribe") >= 10, 30.0)
        wait_until(lambda: len(channels(server)) == 10_000, 30.0)
        backend = open_backend(server.url())
        for start in range(0, 10_000, 1000):
            backend.store([result(name) for name in names[start : start + 1000]])
    assert sorted(stored.task_id for stored in waiting.found[0]) == sorted(names)
    wait_until(lambda: not channels(server))
    assert calls(server, "subscribe") == 10
    assert calls(server, "unsubscribe") <= 10


def test_result_that_was_not_published_is_found(redis_server: RedisServer, redis_url: str) -> None:
    with Waiting(redis_url, [["a"], ["b"]]) as waiting:
        wait_until(lambda: len(channels(redis_server)) == 2)
        wait_until(lambda: [c["cmd"] for c in listeners_of(redis_server)] == ["subscribe"])
        for name in "ab":
            redis_server.command("SET", META + name, result(name).body, db=db_of(redis_url))
    assert [found[0].task_id for found in waiting.found] == ["a", "b"]


def test_rubbish_that_is_published_ends_no_wait(redis_server: RedisServer, redis_url: str) -> None:
    with Waiting(redis_url, [["a"]]) as waiting:
        wait_until(lambda: channels(redis_server))
        redis_server.command("PUBLISH", f"{META}a", b"\xff")
        redis_server.command("PUBLISH", f"{META}a", b"{}")
        open_backend(redis_url).store([result("a", value="real")])
    assert [value_of(stored) for stored in waiting.found[0]] == ["real"]


def test_wait_without_timeout_sees_every_state(redis_server: RedisServer, redis_url: str) -> None:
    seen: List[str] = []

    def watch() -> None:
        seen.extend(stored.state for stored in open_backend(redis_url).wait(["a"], None, unready=True))

    thread = threading.Thread(target=watch)
    thread.start()
    wait_until(lambda: channels(redis_server))
    backend = open_backend(redis_url)
    wanted = ["STARTED", "PROGRESS", "RETRY", "SUCCESS"]
    for number, state in enumerate(wanted):
        backend.store([result("a", state)])
        wait_until(lambda n=number: len(seen) > n)  # type: ignore[misc]
    thread.join()
    assert seen == wanted


@pytest.mark.parametrize("how", ["close", "drop", "collect"])
def test_wait_that_is_left_unsubscribes(redis_server: RedisServer, redis_url: str, how: str) -> None:
    backend = open_backend(redis_url)
    backend.store([result("there")])
    waiting: Any = backend.wait(["there", "missing"], None, unready=True)
    assert next(waiting).task_id == "there"
    storing = threading.Timer(0.05, backend.store, [[result("missing", "STARTED")]])
    storing.start()
    assert next(waiting).state == "STARTED"
    storing.join()
    assert channels(redis_server) == [f"{META}missing".encode()]
    if how == "close":
        waiting.close()
    elif how == "collect":
        circle: List[Any] = [waiting]
        circle.append(circle)
        del circle
    del waiting
    gc.collect()
    wait_until(lambda: channels(redis_server) == [])


def test_reader_that_is_interrupted_hands_over(redis_server: RedisServer, redis_url: str) -> None:
    listener = Listener.of(open_backend(redis_url)._server)
    mine, other = f"{META}mine".encode(), f"{META}other".encode()
    others = Waiting(redis_url, [["other"]])

    def reads(channel: bytes) -> bool:
        reader = listener._reader
        return isinstance(reader, Waiter) and channel in reader.channels

    def interrupt() -> None:
        wait_until(lambda: reads(mine) and channels(redis_server) == [mine])
        others.start()
        wait_until(lambda: len(channels(redis_server)) == 2 and reads(mine))
        os.kill(os.getpid(), signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    with pytest.raises(KeyboardInterrupt):
        list(open_backend(redis_url).wait(["mine"], 30.0))
    helper.join()
    wait_until(lambda: reads(other) and channels(redis_server) == [other])
    open_backend(redis_url).store([result("other")])
    others.join()
    assert [stored.task_id for stored in others.found[0]] == ["other"]


def test_sleeper_that_is_interrupted_leaves_the_reader_alone(
    redis_server: RedisServer, redis_url: str
) -> None:
    with Waiting(redis_url, [["other"]]) as waiting:
        wait_until(lambda: channels(redis_server))
        for n in range(3):
            interrupt = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT))
            interrupt.start()
            with pytest.raises(KeyboardInterrupt):
                list(open_backend(redis_url).wait([f"mine {n}"], 30.0))
            interrupt.join()
        wait_until(lambda: channels(redis_server) == [f"{META}other".encode()])
        open_backend(redis_url).store([result("other")])
    assert [stored.task_id for stored in waiting.found[0]] == ["other"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_child_forked_while_others_wait_listens_for_itself(redis_server: RedisServer, redis_url: str) -> None:
    backend = open_backend(redis_url)
    backend.store([result("first")])
    mine = backend.wait(["first", "second"], 30.0)
    assert next(mine).task_id == "first"
    with Waiting(redis_url, [["third"]]) as waiting:
        wait_until(lambda: len(channels(redis_server)) == 1)
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            # No assertion here: pytest must not go on in the child.
            try:
                found = [*mine, *backend.wait(["third"], 30.0)]
                os.write(write_end, " ".join(stored.task_id for stored in found).encode())
            finally:
                os._exit(0)
        os.close(write_end)
        wait_until(lambda: len(listeners_of(redis_server)) == 2)
        store = open_backend(redis_url)
        store.store([result("second")])
        store.store([result("third")])
        assert [stored.task_id for stored in mine] == ["second"]
        os.waitpid(pid, 0)
        assert os.read(read_end, 100) == b"second third"
        os.close(read_end)
    assert [stored.task_id for stored in waiting.found[0]] == ["third"]


def test_connection_is_closed_a_while_after_the_last_wait(
    redis_server: RedisServer, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_backend(redis_url)
    for _ in range(2):
        assert list(backend.wait(["a"], 0.01)) == []
        assert len(listeners_of(redis_server)) == 1
    monkeypatch.setattr(listener_module, "IDLE_S", 0.0)
    assert Listener.of(backend._server).connected
    Listener.of(backend._server).close_idle(0.0)
    wait_until(lambda: listeners_of(redis_server) == [])


# -- connections that are lost -------------------------------------------------------------------


def test_all_who_wait_get_theirs_when_all_connections_are_killed(
    new_redis: Callable[..., RedisServer],
) -> None:
    server = new_redis()
    names = [str(n) for n in range(50)]
    with Waiting(server.url(), [[name] for name in names]) as waiting:
        for round_ in range(5):
            wait_until(lambda: len(channels(server)) == 50 - 10 * round_)  # noqa: B023
            server.kill_clients()
            backend = open_backend(server.url())
            backend.store([result(name) for name in names[round_ * 10 : round_ * 10 + 10]])
            server.kill_clients()
    assert waiting.errors == []
    assert [found[0].task_id for found in waiting.found] == names
    wait_until(lambda: channels(server) == [])
    assert len(listeners_of(server)) <= 1


def test_who_waits_survives_a_restart_of_the_server(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis(appendonly=True)
    with Waiting(server.url(), [[f"before {n}", f"after {n}"] for n in range(10)]) as waiting:
        wait_until(lambda: len(channels(server)) == 20)
        # Written where nobody is told, so that only the look after the restart can find it.
        for n in range(10):
            server.command("SET", f"{META}before {n}", result(f"before {n}").body)
        server.stop()
        time.sleep(0.3)
        server.start()
        wait_until(lambda: len(channels(server)) == 20)
        open_backend(server.url()).store([result(f"after {n}") for n in range(10)])
    assert waiting.errors == []
    assert [len(found) for found in waiting.found] == [2] * 10


def test_server_that_stays_away_is_an_error_in_the_end(
    new_redis: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "PATIENCE_S", 0.5)
    server = new_redis()
    with Waiting(server.url(), [["a"], ["b"]], None) as waiting:
        wait_until(lambda: len(channels(server)) == 2)
        server.stop()
    assert [type(error) for error in waiting.errors] == [BackendGetMetaError] * 2


def test_deadline_holds_while_the_server_is_silent(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    with Waiting(server.url(), [[str(n)] for n in range(8)], 1.5) as waiting:
        wait_until(lambda: len(channels(server)) == 8)
        server.pause()
        try:
            start = time.monotonic()
            waiting.join()
            # A command alone would have waited for 5 s.
            assert time.monotonic() - start < 4.0
        finally:
            server.resume()
    assert waiting.errors == []


def test_silent_connection_is_noticed_and_replaced(
    new_redis: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "SILENCE_S", 0.1)
    monkeypatch.setattr(listener_module, "ANSWER_S", 0.3)
    monkeypatch.setattr(backend_module, "FIRST_LOOK_S", 60.0)
    server = new_redis()
    with Proxy(server.port) as proxy:
        url = proxy.url(server.url())
        with Waiting(f"{url}?socket_timeout=0.3", [["a"], ["b"]]) as waiting:
            wait_until(lambda: len(channels(server)) == 2)
            before = calls(server, "subscribe")
            proxy.black_hole()
            wait_until(lambda: calls(server, "subscribe") > before)
            open_backend(server.url()).store([result("a"), result("b")])
        assert waiting.errors == []
        assert [found[0].task_id for found in waiting.found] == ["a", "b"]


def test_waiting_works_byte_by_byte(redis_server: RedisServer, redis_url: str) -> None:
    with Proxy(redis_server.port) as proxy:
        proxy.dribble()
        with Waiting(proxy.url(redis_url), [["a"]]) as waiting:
            wait_until(lambda: channels(redis_server))
            open_backend(redis_url).store([result("a")])
        assert len(waiting.found[0]) == 1


def test_waiting_works_over_tls(new_redis: Callable[..., RedisServer], tmp_path: Path) -> None:
    made = certificates(tmp_path / "certificates")
    server = new_redis(tls=made)
    url = server.url(ssl_ca_certs=str(made.ca))
    big = "x" * 300_000
    with Waiting(url, [[str(n)] for n in range(10)]) as waiting:
        wait_until(lambda: len(channels(server)) == 10)
        open_backend(url).store([result(str(n), value=big) for n in range(10)])
    assert waiting.errors == []
    assert all(value_of(found[0]) == big for found in waiting.found)


def test_waiting_works_where_hello_is_refused(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    server.command("ACL", "SETUSER", "old", "on", ">secret", "~*", "&*", "+@all", "-hello")
    url = f"redis://old:secret@127.0.0.1:{server.port}/0"
    with Waiting(url, [["a"]]) as waiting:
        wait_until(lambda: channels(server))
        open_backend(url).store([result("a")])
    assert len(waiting.found[0]) == 1


def test_where_subscribing_is_forbidden_results_are_looked_for(
    new_redis: Callable[..., RedisServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = new_redis()
    server.command("ACL", "SETUSER", "deaf", "on", ">secret", "~*", "resetchannels", "+@all")
    url = f"redis://deaf:secret@127.0.0.1:{server.port}/0"
    with Waiting(url, [["a"], ["b"]]) as waiting:
        wait_until(lambda: "looked for again and again" in caplog.text)
        before = calls(server, "mget")
        wait_until(lambda: calls(server, "mget") > before + 4)
        open_backend(server.url()).store([result("a"), result("b")])
    assert [len(found) for found in waiting.found] == [1, 1]
    assert "secret" not in caplog.text


@pytest.mark.parametrize("seed", [1, 2])
def test_threads_that_wait_in_any_order_under_kills_all_get_theirs(
    new_redis: Callable[..., RedisServer], seed: int
) -> None:
    server = new_redis()
    url = server.url()
    stop = threading.Event()
    asked: "List[str]" = []

    def client(thread: int) -> int:
        random_, backend, got = random.Random(seed * 1000 + thread), open_backend(url), 0
        for n in range(12):
            names = [f"{seed} {thread} {n} {k}" for k in range(random_.randrange(1, 6))]
            asked.extend(names)
            left = random_.random() < 0.2
            for _ in backend.wait(names, 60.0):
                got += 1
                if left:
                    break
            assert left or all(name in backend.fetch(names) for name in names)
        return got

    def worker() -> None:
        backend, done = open_backend(url), 0
        while not stop.is_set() or done < len(asked):
            batch = asked[done : done + 20]
            done += len(batch)
            if batch:
                backend.store([result(name) for name in batch])
            else:
                stop.wait(0.001)

    def killer() -> None:
        random_ = random.Random(seed)
        while not stop.wait(random_.uniform(0.02, 0.1)):
            for client_ in listeners_of(server):
                server.command("CLIENT", "KILL", "ID", client_["id"])
            gc.collect()

    helpers = [threading.Thread(target=target) for target in (worker, killer)]
    for helper in helpers:
        helper.start()
    try:
        with ThreadPoolExecutor(32) as pool:
            assert all(got >= 12 for got in pool.map(client, range(32))), f"seed {seed}"
    finally:
        stop.set()
        for helper in helpers:
            helper.join()
    wait_until(lambda: channels(server) == [])


# -- groups and chords ---------------------------------------------------------------------------


def test_group_is_saved_as_celery_saves_it(redis_server: RedisServer, redis_url: str) -> None:
    db = db_of(redis_url)
    ((key, theirs),) = [item for item in find("group_saved")["keys"].items() if item[0].startswith(GROUP)]
    group_id = key[len(GROUP) :]
    backend = open_backend(redis_url)
    assert backend.load_group(group_id) is None
    before = calls(redis_server, "publish")
    backend.save_group(group_id, theirs["value"].encode(), 86400.0)
    assert calls(redis_server, "publish") == before + 1
    assert redis_server.command("GET", key, db=db) == theirs["value"].encode()
    assert 86390 < redis_server.command("TTL", key, db=db) <= 86400
    assert backend.load_group(group_id) == theirs["value"].encode()
    backend.delete_group(group_id)
    assert backend.load_group(group_id) is None


def snapshot(server: RedisServer, db: int, group_id: str) -> Dict[str, Any]:
    """Return a chord's keys in the form of the vectors, those of results left out."""
    found: Dict[str, Any] = {}
    for key in sorted(server.command("KEYS", f"{GROUP}{group_id}*", db=db)):
        kind = server.command("TYPE", key, db=db).decode()
        command: Sequence[Any] = {
            "string": ("GET", key),
            "set": ("SMEMBERS", key),
            "list": ("LRANGE", key, 0, -1),
            "zset": ("ZRANGE", key, 0, -1, "WITHSCORES"),
        }[kind]
        value = server.command(*command, db=db)
        if kind == "zset":
            value = [[member.decode(), float(score)] for member, score in zip(value[::2], value[1::2])]
        elif kind == "string":
            value = value.decode()
        else:
            value = [one.decode() for one in value]
        found[key.decode()] = {"type": kind, "value": sorted(value) if kind == "set" else value}
    return found


def part(
    group_id: str, index: Optional[int], entry: bytes = b"", expires_s: float = 60.0, body: bytes = b""
) -> ChordPart:
    """Return a part of a chord; without an `entry`, one that is made up."""
    entry = entry or b'[1, "t%d", "SUCCESS", null]' % (index or 0)
    return ChordPart(group_id, index, json.loads(entry)[1], entry, expires_s, body)


@pytest.mark.parametrize("name", ["chord_ordered_in_progress", "chord_unordered"])
def test_chord_in_progress_leaves_what_celery_leaves(
    redis_server: RedisServer, redis_url: str, name: str
) -> None:
    keys = {key: stored for key, stored in find(name)["keys"].items() if key.startswith(GROUP)}
    group_id = next(iter(keys))[len(GROUP) : -2]
    entries = [one if isinstance(one, str) else one[0] for one in keys[f"{GROUP}{group_id}.j"]["value"]]
    backend = open_backend(redis_url, result_chord_ordered=name != "chord_unordered")
    backend.start_chord(group_id, 3, BODY, 86400.0)
    for index, entry in enumerate(entries):
        for _ in range(2):
            arrival = backend.arrive_at_chord(part(group_id, index, entry.encode(), 86400.0))
            assert arrival == (index + 1, 3, None, False)
    theirs = {
        key: {
            "type": stored["type"],
            "value": sorted(stored["value"]) if stored["type"] == "set" else stored["value"],
        }
        for key, stored in keys.items()
    }
    assert snapshot(redis_server, db_of(redis_url), group_id) == theirs
    for key in keys:
        assert 86390 < redis_server.command("TTL", key, db=db_of(redis_url)) <= 86400
    assert backend.chord_entries(group_id) == [entry.encode() for entry in entries]


@pytest.mark.parametrize("vector", CHORDS, ids=[vector["name"] for vector in CHORDS])
def test_every_step_of_a_chord_leaves_what_celerys_scripts_leave(
    redis_server: RedisServer, redis_url: str, vector: Dict[str, Any]
) -> None:
    backend, db = open_backend(redis_url), db_of(redis_url)
    claim = ""
    for step in vector["steps"]:
        group_id = step["group"]
        if step["op"] == "start":
            backend.start_chord(group_id, step["size"], BODY, step["expires_s"])
        elif step["op"] == "arrive":
            ends = part(group_id, step["index"], step["entry"].encode(), step["expires_s"])
            assert ends.task_id == step["task_id"]
            arrival = backend.arrive_at_chord(ends)
            assert arrival.count == step["count"] and (arrival.claim is not None) is step["claimed"]
            claim = arrival.claim or claim
        elif step["op"] == "extend":
            assert backend.extend_chord(group_id, claim)
        elif step["op"] == "finish":
            assert backend.finish_chord(group_id, claim)
        else:
            backend.abandon_chord(group_id)
            # Celery forgets its claim in a moment; here the chord is over for as long as a finished one.
            step["keys"][".c"].update(value="done", ttl=300)
        ours = snapshot(redis_server, db, group_id)
        theirs = {f"{GROUP}{group_id}{suffix}": stored for suffix, stored in step["keys"].items()}
        assert list(ours) == list(theirs)
        for key, stored in theirs.items():
            wanted = claim if stored["value"] == "<claim>" else stored["value"]
            assert ours[key] == {"type": stored["type"], "value": wanted}
            assert stored["ttl"] - 2 <= redis_server.command("TTL", key, db=db) <= stored["ttl"]


def test_all_that_is_kept_of_a_chord_expires(redis_server: RedisServer, redis_url: str) -> None:
    backend, db = open_backend(redis_url, global_keyprefix="p"), db_of(redis_url)
    backend.add_to_chord("g", 1, "", 60.0)
    backend.start_chord("g", 1, BODY, 60.0)
    arrivals = backend.arrive_at_chords([part("g", 0), part("g", 1)])
    keys = [key.decode() for key in redis_server.command("KEYS", "*", db=db)]
    group = f"p_{GROUP}g"
    assert sorted(keys) == [
        "p__miniq.chord.g", "p__miniq.chords", *(f"{group}.{letter}" for letter in "cdjst")
    ]  # fmt: skip
    left = {key: redis_server.command("TTL", key, db=db) for key in keys}
    assert 5 <= left.pop(f"{group}.c") <= 6
    assert 600_000 < left.pop("p__miniq.chords") <= 7 * 86400
    assert all(58 <= seconds <= 60 for seconds in left.values())
    assert backend.finish_chord("g", arrivals[-1].claim or "")
    assert redis_server.command("KEYS", "*", db=db) == [f"{group}.c".encode()]


def test_chord_that_celery_started_is_left_over_with_the_body_of_its_members(
    redis_server: RedisServer, redis_url: str
) -> None:
    db, clock = db_of(redis_url), Clock()
    backend = RedisBackend(redis_url, {}, clock)
    redis_server.command("SET", f"{GROUP}g.s", "2", "EX", "60", db=db)
    assert backend.arrive_at_chord(part("g", 0, body=BODY)).claim is None
    assert backend.arrive_at_chord(part("g", 1, body=BODY)).claim
    redis_server.command("DEL", f"{GROUP}g.c", db=db)
    clock.now += 7
    assert backend.chords_left_over(clock()) == [("g", BODY)]
    assert 0 < redis_server.command("TTL", "_miniq.chord.g", db=db) <= 60


def test_chord_that_a_celery_worker_completed_and_did_not_end_is_left_over(
    redis_server: RedisServer, redis_url: str
) -> None:
    db, clock = db_of(redis_url), Clock()
    backend = RedisBackend(redis_url, {}, clock)
    backend.start_chord("g", 2, BODY, 60.0)
    backend.arrive_at_chord(part("g", 0))
    redis_server.command("ZADD", f"{GROUP}g.j", "1", '[1, "t1", "SUCCESS", 1]', db=db)
    redis_server.command("SET", f"{GROUP}g.c", "its claim", "EX", "6", db=db)
    clock.now += LOOK_S
    assert backend.chords_left_over(clock()) == []
    redis_server.command("DEL", f"{GROUP}g.c", db=db)
    assert backend.chords_left_over(clock()) == []
    clock.now += 7
    assert backend.chords_left_over(clock()) == [("g", BODY)]


@pytest.mark.parametrize("end", [("SET", "c", "done"), ("DEL", "s")])
def test_chord_that_a_celery_worker_ended_is_forgotten(
    redis_server: RedisServer, redis_url: str, end: Sequence[str]
) -> None:
    db, clock = db_of(redis_url), Clock()
    backend = RedisBackend(redis_url, {}, clock)
    backend.start_chord("g", 2, BODY, 60.0)
    redis_server.command(end[0], f"{GROUP}g.{end[1]}", *end[2:], db=db)
    clock.now += LOOK_S
    assert backend.chords_left_over(clock()) == []
    assert redis_server.command("KEYS", "_miniq*", db=db) == []


def test_index_does_not_keep_what_nobody_looked_for(redis_server: RedisServer, redis_url: str) -> None:
    db, clock = db_of(redis_url), Clock()
    backend = RedisBackend(redis_url, {}, clock)
    backend.start_chord("old", 2, BODY, 60.0)
    clock.now += 8 * 86400
    backend.start_chord("new", 2, BODY, 60.0)
    assert redis_server.command("ZRANGE", "_miniq.chords", 0, -1, db=db) == [b"new"]


def test_parts_of_one_turn_are_one_command_and_each_costs_the_same(
    new_redis: Callable[..., RedisServer],
) -> None:
    server = new_redis()
    backend = open_backend(server.url())
    backend.start_chord("g", 1000, BODY, 60.0)
    backend.arrive_at_chord(part("g", 999))

    def commands() -> int:
        stats = server.info("commandstats")
        return sum(int(told.partition("calls=")[2].partition(",")[0]) for told in stats.values())

    costs = []
    for start in range(0, 900, 100):
        runs, before = calls(server, "evalsha"), commands()
        backend.arrive_at_chords([part("g", n) for n in range(start, start + 100)])
        assert calls(server, "evalsha") == runs + 1
        # One of them is the question itself.
        costs.append(commands() - before - 1)
    assert len(set(costs)) == 1 and costs[0] < 100 * 15


def test_end_of_a_chord_is_one_script_with_what_else_is_done(
    new_redis: Callable[..., RedisServer],
) -> None:
    server = new_redis()
    transport = RedisTransport(server.url(), {}, time.time)
    backend = open_backend(server.url())
    queue = Queue("work")
    transport.declare(queue)
    message = Message(b"[]", "application/json", "utf-8", {"task": "t", "id": "t0"}, {})
    transport.publish([Publication(message, "", "work")], 5.0)
    consumer = transport.consumer("worker@here", [queue])
    backend.start_chord("g", 1, BODY, 60.0)
    (delivery,) = consumer.poll(1)
    consumer.start([delivery])
    with transport.transaction():
        arrival = backend.arrive_at_chord(part("g", 0))
        runs = calls(server, "evalsha")
        backend.store([result("t0")])
        transport.publish([Publication(message, "", "work")], 5.0)
        assert backend.finish_chord("g", arrival.claim or "")
        consumer.ack(delivery)
        assert backend.chord_entries("g") and calls(server, "evalsha") == runs
    assert calls(server, "evalsha") == runs + 1
    assert server.command("GET", f"{GROUP}g.c") == b"done"
    assert server.command("LLEN", "work") == 1 and server.command("HLEN", "unacked") == 0
    consumer.close()
    transport.close()


def test_lost_claim_leaves_the_whole_step_undone_and_the_rest_can_be_done_again(
    redis_server: RedisServer, redis_url: str
) -> None:
    db = db_of(redis_url)
    transport, backend = RedisTransport(redis_url, {}, time.time), open_backend(redis_url)
    queue = Queue("work")
    transport.declare(queue)
    message = Message(b"[]", "application/json", "utf-8", {"task": "t", "id": "t0"}, {})
    transport.publish([Publication(message, "", "work")], 5.0)
    consumer = transport.consumer("worker@here", [queue])
    for name in "gh":
        backend.start_chord(name, 1, BODY, 60.0)
    (delivery,) = consumer.poll(1)
    consumer.start([delivery])
    good, bad = backend.arrive_at_chords([part("g", 0), part("h", 0)])
    redis_server.command("SET", f"{GROUP}h.c", "another's", db=db)
    with pytest.raises(ClaimLost) as raised, transport.transaction():
        transport.publish([Publication(message, "", "work")], 5.0)
        assert backend.finish_chord("g", good.claim or "") and backend.finish_chord("h", bad.claim or "")
        consumer.ack(delivery)
    assert raised.value.group_ids == ["h"]
    assert redis_server.command("LLEN", "work", db=db) == 0
    assert redis_server.command("HLEN", "unacked", db=db) == 1
    with transport.transaction():
        assert backend.finish_chord("g", good.claim or "")
        consumer.ack(delivery)
    assert redis_server.command("HLEN", "unacked", db=db) == 0
    assert backend.arrive_at_chord(part("g", 0)).done
    consumer.close()
    transport.close()

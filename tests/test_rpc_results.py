# SPDX-License-Identifier: MIT
"""Results over rpc:// on a real RabbitMQ server: messages, waiting threads, lost connections, bounds."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from base64 import b64decode
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence
from urllib.parse import unquote

import pytest
from proxy import Proxy
from servers import RabbitServer
from waiting import wait_until
from workers import environment

from miniq import MiniQ, _state
from miniq.backends import rpc as backend_module
from miniq.backends.base import StoredResult
from miniq.backends.rpc import RpcBackend
from miniq.connections import kept as kept_module
from miniq.connections import replies as replies_module
from miniq.connections.amqp import Options, Server
from miniq.connections.kept import REPLY_BYTES, Kept
from miniq.connections.replies import Replies
from miniq.exceptions import (
    BackendGetMetaError,
    BackendStoreError,
    ImproperlyConfigured,
    OperationalError,
    TaskRevokedError,
    TimeoutError,
)
from miniq.result import allow_join_result, read_meta
from miniq.serialization import prepare_accept
from miniq.states import READY_STATES, may_replace
from miniq.task import Context

ME = "11111111-2222-4333-8444-555555555555"
ACCEPT = prepare_accept(["json"])

#: What Celery 5.7 sent for ``add.apply_async((2, 3))``: its content header and body.
CELERYS_HEADER = (
    "ADwAAAAAAAAAAACp/AAQYXBwbGljYXRpb24vanNvbgV1dGYtOAAAAAABACQwMDAwMDAwMC0wMDAwLTQwMDAtODAwMC0wMDAwMDAwMDAwMDE="
)
CELERYS_BODY = (
    b'{"status": "SUCCESS", "result": 5, "traceback": null, "children": [], "date_done":'
    b' "2026-11-21T06:07:28.368594+00:00", "task_id": "00000000-0000-4000-8000-000000000001"}'
)
CELERYS_PROPERTIES = {
    "content_type": "application/json",
    "content_encoding": "utf-8",
    "delivery_mode": 1,
    "priority": 0,
    "correlation_id": "00000000-0000-4000-8000-000000000001",
}


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    yield
    for (pid, _, _), one in replies_module._replies.items():
        if pid == os.getpid():
            assert (one._reader, one._wanted, one._sleepers, list(one._left)) == (None, {}, {}, [])
            assert not one._consuming
    replies_module.delete_all()
    replies_module._replies.clear()
    Server.close_all()


@pytest.fixture(scope="module")
def faulty_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A server that tests of this module stop, and start again."""
    with RabbitServer(tmp_path_factory.mktemp("rabbit")) as server:
        yield server


def open_backend(
    url: str, address: str = ME, expires_s: Optional[float] = 60.0, **options: Any
) -> RpcBackend:
    own = {"reply_address": lambda: address, "result_expires": expires_s, **options}
    return RpcBackend(url, own, time.time)


def caller(url: str, **options: Any) -> RpcBackend:
    """Return the backend of somebody who has called a task."""
    backend = open_backend(url, **options)
    backend.before_call(10.0)
    return backend


def result(task_id: str, state: str = "SUCCESS", value: Any = None, reply_to: str = ME) -> StoredResult:
    body = json.dumps({"status": state, "result": value, "task_id": task_id}).encode()
    return StoredResult(task_id, state, body, "application/json", "utf-8", 60.0, reply_to)


def states_of(found: Sequence[StoredResult]) -> List[str]:
    return [f"{stored.task_id} {stored.state}" for stored in found]


def vhost_of(url: str) -> str:
    return unquote(url.rpartition("/")[2].partition("?")[0])


def queue(server: RabbitServer, url: str = "") -> Dict[str, Any]:
    return server.queues(vhost_of(url) if url else "/").get(ME, {})


def replies_of(backend: RpcBackend) -> "Replies[StoredResult]":
    return backend._replies


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
            found += caller(url).wait(ids, timeout_s)
        except Exception as error:
            self.errors.append(error)

    def __enter__(self) -> "Waiting":
        for thread in self.threads:
            thread.start()
        return self

    def join(self) -> None:
        for thread in self.threads:
            thread.join(60.0)
            assert not thread.is_alive(), "still waiting"

    def __exit__(self, *error: Any) -> None:
        self.join()


# -- messages ------------------------------------------------------------------------------------


def test_result_is_the_message_that_celery_sends(rabbit_url: str) -> None:
    backend = caller(rabbit_url)
    task_id = CELERYS_PROPERTIES["correlation_id"]
    backend.store(
        [StoredResult(str(task_id), "SUCCESS", CELERYS_BODY, "application/json", "utf-8", 60.0, ME)]
    )
    with Server.of(rabbit_url, Options.read({}, rabbit_url)).borrow(5.0) as connection:
        found = connection.publisher().get(ME, no_ack=True)
    assert found is not None
    assert (found.exchange, found.routing_key) == ("", ME)
    assert found.content == (CELERYS_PROPERTIES, {}, CELERYS_BODY)
    # The same flags and order, byte for byte but for the size: our codec reads Celery's header so.
    assert b64decode(CELERYS_HEADER).endswith(str(task_id).encode())


def test_reply_queue_is_celerys_but_for_the_auto_delete(
    rabbit_server: RabbitServer, rabbit_url: str
) -> None:
    backend = caller(rabbit_url, expires_s=86400.0)
    made = queue(rabbit_server, rabbit_url)
    assert (made["durable"], made["exclusive"], made["auto_delete"]) == (True, False, False)
    assert made["arguments"] == {"x-expires": 86400000, "x-message-ttl": 86400000}
    # Who waits, and waits no more, leaves it there.
    assert list(backend.wait(["a"], 0.2)) == []
    wait_until(lambda: queue(rabbit_server, rabbit_url)["consumers"] == 0)


def test_results_without_end_still_leave_no_queue_for_ever(
    rabbit_server: RabbitServer, rabbit_url: str
) -> None:
    caller(rabbit_url, expires_s=None)
    assert queue(rabbit_server, rabbit_url)["arguments"] == {"x-expires": 2**32 - 1}


def test_reply_queue_goes_with_its_process(rabbit_server: RabbitServer, rabbit_url: str) -> None:
    text = f"""
        import time
        from miniq.backends.rpc import RpcBackend
        backend = RpcBackend({rabbit_url!r}, {{"reply_address": lambda: {ME!r}}}, time.time)
        backend.before_call(10.0)
        print(list(backend.wait(["a"], 0.05)))
    """
    command = [sys.executable, "-c", textwrap.dedent(text)]
    subprocess.run(command, env=environment(Path.cwd()), check=True, timeout=60.0)
    assert queue(rabbit_server, rabbit_url) == {}
    assert f"'{ME}'" not in str(rabbit_server.queues(vhost_of(rabbit_url)))


def test_result_without_address_is_sent_nowhere(rabbit_server: RabbitServer, rabbit_url: str) -> None:
    backend = caller(rabbit_url)
    backend.store([result("a", reply_to=""), result("b"), result("c", reply_to="nobody")])
    assert states_of(list(backend.wait(["a", "b", "c"], 0.2))) == ["b SUCCESS"]


def test_what_is_no_result_is_passed_over_with_a_warning(
    rabbit_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = caller(rabbit_url)
    backend.store([result("a")._replace(body=b"nonsense"), result("b")])
    assert sorted(backend.fetch(["a", "b"])) == ["b"]
    assert "result of task 'a' is none" in caplog.text


def test_result_without_the_property_task_id_is_nobodys(rabbit_url: str) -> None:
    backend = caller(rabbit_url)
    with Server.of(rabbit_url, Options.read({}, rabbit_url)).borrow(5.0) as connection:
        assert connection.publisher().publish([("", ME, {}, {}, result("a").body, True)], 5.0) == [None]
    assert backend.fetch(["a"]) == {}
    assert read_meta(result("a"), ACCEPT)["status"] == "SUCCESS"


# -- waiting -------------------------------------------------------------------------------------


def test_sending_calls_holds_nothing_and_subscribes_to_nothing(
    rabbit_server: RabbitServer, rabbit_url: str
) -> None:
    backend = caller(rabbit_url)
    for n in range(200):
        backend.before_call(5.0)
        backend.store([result(str(n))])
    assert replies_of(backend)._connection is None
    assert len(replies_of(backend)._kept) == 0
    wait_until(lambda: queue(rabbit_server, rabbit_url)["messages"] == 200)
    assert queue(rabbit_server, rabbit_url)["consumers"] == 0


def test_threads_share_one_connection_and_each_gets_its_own(
    rabbit_server: RabbitServer, rabbit_url: str
) -> None:
    backend, names = caller(rabbit_url), [str(n) for n in range(40)]
    with Waiting(rabbit_url, [[name] for name in names]) as waiting:
        wait_until(lambda: len(replies_of(backend)._wanted) == 40)
        wait_until(lambda: queue(rabbit_server, rabbit_url)["consumers"] == 1)
        random.Random(1).shuffle(names)
        for name in names:
            backend.store([result(name)])
    assert waiting.errors == []
    assert [states_of(found) for found in waiting.found] == [[f"{n} SUCCESS"] for n in range(40)]
    assert len([one for one in rabbit_server.connections() if "results" in str(one)]) <= 1
    wait_until(lambda: queue(rabbit_server, rabbit_url)["consumers"] == 0)
    wait_until(lambda: queue(rabbit_server, rabbit_url)["messages"] == 0)


def test_reply_for_another_who_waits_later_is_kept(rabbit_server: RabbitServer, rabbit_url: str) -> None:
    backend = caller(rabbit_url)
    backend.store([result(str(n)) for n in range(100)])
    assert states_of(list(backend.wait(["99"], 20.0))) == ["99 SUCCESS"]
    backend.store([result("0", "STARTED")])
    assert states_of(list(backend.wait([str(n) for n in range(100)], 20.0))) == [
        f"{n} SUCCESS" for n in range(100)
    ]


def test_result_whose_names_no_message_can_have_is_lost_alone(
    rabbit_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = caller(rabbit_url)
    backend.store([result("x" * 256), result("\ud800"), result("b", reply_to="y" * 256), result("a")])
    assert states_of(list(backend.wait(["a"], 20.0))) == ["a SUCCESS"]
    assert len([record for record in caplog.records if "is lost" in record.message]) == 3


def test_many_that_have_come_are_fetched_with_few_round_trips(
    rabbit_server: RabbitServer, rabbit_url: str
) -> None:
    backend, names = caller(rabbit_url), [str(n) for n in range(3000)]
    waiting = backend.wait(["first", "last"], 30.0)
    backend.store([result("first")])
    assert next(waiting).task_id == "first"
    # Once beside a consumer that nobody reads for now, and once without one.
    for half in (names[:1500], names[1500:]):
        backend.store([result(name) for name in half])
        wait_until(lambda: len(backend.fetch(half)) == 1500)  # noqa: B023
        waiting = iter(())  # leaves
    assert sorted(backend.fetch(names)) == sorted(names)
    assert queue(rabbit_server, rabbit_url)["messages"] == 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_order_of_states_ends_as_may_replace_says(rabbit_url: str, seed: int) -> None:
    random_ = random.Random(seed)
    backend = caller(rabbit_url)
    known: Dict[str, str] = {}
    for _ in range(200):
        name = str(random_.randrange(10))
        state = random_.choice(["STARTED", "RETRY", "PROGRESS", "FAILURE", "REVOKED", "SUCCESS"])
        backend.store([result(name, state)])
        if name not in known or may_replace(state, known[name]):
            known[name] = state
        if random_.random() < 0.1:
            # With one that is unknown: where all are final nobody looks any more.
            found = backend.fetch([str(n) for n in range(11)])
            assert {name: stored.state for name, stored in found.items()} == known, f"seed {seed}"
    ended = [name for name, state in known.items() if state in READY_STATES]
    assert sorted(stored.task_id for stored in backend.wait(ended, 20.0)) == sorted(ended), f"seed {seed}"


def test_many_waits_that_end_in_vain_leave_nothing(rabbit_server: RabbitServer, rabbit_url: str) -> None:
    backend = caller(rabbit_url)
    for n in range(500):
        assert list(backend.wait([str(n)], 0.0 if n % 10 else 0.001)) == []
    mine = replies_of(backend)
    assert (mine._wanted, len(mine._kept)) == ({}, 0)
    wait_until(lambda: queue(rabbit_server, rabbit_url)["consumers"] == 0)


def test_interrupted_wait_loses_nothing(rabbit_url: str) -> None:
    if not hasattr(signal, "setitimer"):
        pytest.skip("no interval timer here")
    backend = caller(rabbit_url)
    for n in range(3):
        interrupt = threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            list(backend.wait(["a"], 30.0))
        interrupt.join()
        backend.store([result(f"b{n}")])
    backend.store([result("a")])
    assert states_of(list(backend.wait(["b0", "b1", "b2", "a"], 20.0))) == [
        "b0 SUCCESS", "b1 SUCCESS", "b2 SUCCESS", "a SUCCESS",
    ]  # fmt: skip


def test_deleted_queue_is_made_anew_under_who_waits(rabbit_server: RabbitServer, rabbit_url: str) -> None:
    backend = caller(rabbit_url)
    with Waiting(rabbit_url, [["a"], ["b"]]) as waiting:
        wait_until(lambda: queue(rabbit_server, rabbit_url).get("consumers") == 1)
        rabbit_server.delete_queue(ME, vhost_of(rabbit_url))
        wait_until(lambda: queue(rabbit_server, rabbit_url).get("consumers") == 1)
        backend.store([result("a"), result("b")])
    assert waiting.errors == []
    assert [states_of(found) for found in waiting.found] == [["a SUCCESS"], ["b SUCCESS"]]


def test_expired_reply_is_gone_here_and_at_the_server(rabbit_server: RabbitServer, rabbit_url: str) -> None:
    backend = caller(rabbit_url, expires_s=1.0)
    backend.store([result("a")])
    assert list(backend.fetch(["a"])) == ["a"]
    backend.store([result("b")])
    wait_until(lambda: not backend.fetch(["a"]))
    # With its messages the queue itself may be over: nobody has used it.
    wait_until(lambda: not queue(rabbit_server, rabbit_url).get("messages"))


# -- elsewhere -----------------------------------------------------------------------------------


def test_process_that_called_nothing_is_told_so(rabbit_url: str, caplog: pytest.LogCaptureFixture) -> None:
    backend = open_backend(rabbit_url)
    backend_module._warned.clear()
    for _ in range(2):
        assert backend.fetch(["a"]) == {}
        assert list(backend.wait(["a"], 0)) == []
    (record,) = [record for record in caplog.records if "come only to the process" in record.message]
    assert record.levelname == "WARNING"
    for timeout_s in (None, 5.0):
        with pytest.raises(ImproperlyConfigured, match="come only to the process that sent the task"):
            next(backend.wait(["a"], timeout_s))
    backend.forget(["a"])


def test_task_that_may_not_wait_makes_no_queue(
    make_app: Callable[..., MiniQ], rabbit_server: RabbitServer, rabbit_url: str
) -> None:
    app = make_app(broker=rabbit_url, backend="rpc://")

    @app.task
    def add(a: int, b: int) -> int:
        return a + b

    token = _state.push_frame(add, Context(id="outer", called_directly=False))
    try:
        sent = add.delay(1, 1)
        with allow_join_result():
            with pytest.raises(ImproperlyConfigured, match="inside of allow_join_result"):
                sent.get(timeout=5.0)
            assert sorted(rabbit_server.queues(vhost_of(rabbit_url))) == ["celery"]
            add.delay(1, 1)
    finally:
        _state.pop_frame(token)
    assert sorted(rabbit_server.queues(vhost_of(rabbit_url))) == sorted(["celery", app.thread_oid])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_is_told_that_replies_go_to_its_parent(rabbit_url: str) -> None:
    backend = caller(rabbit_url)
    backend.store([result("a")])
    mine = backend.wait(["a", "b"], 30.0)
    assert next(mine).task_id == "a"
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        # No assertion here: pytest must not go on in the child.
        try:
            try:
                next(mine)
            except BackendGetMetaError as error:
                os.write(write_end, str(error).encode())
            backend.store([result("b")])
        finally:
            os._exit(0)
    os.close(write_end)
    assert states_of(list(mine)) == ["b SUCCESS"]
    os.waitpid(pid, 0)
    assert b"which was forked from it" in os.read(read_end, 1000)
    os.close(read_end)


# -- connections that are lost -------------------------------------------------------------------


def test_all_who_wait_get_theirs_when_all_connections_are_closed(
    faulty_server: RabbitServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = faulty_server
    names = [str(n) for n in range(40)]
    backend = caller(server.url())
    with Waiting(server.url(), [[name] for name in names]) as waiting:
        for round_ in range(4):
            wait_until(lambda: len(replies_of(backend)._wanted) == 40 - 10 * round_)  # noqa: B023
            wait_until(lambda: queue(server).get("consumers") == 1)
            server.close_connections()
            mine = [result(name) for name in names[round_ * 10 : round_ * 10 + 10]]
            wait_until(lambda: _stored(backend, mine))  # noqa: B023
            server.close_connections()
    assert waiting.errors == []
    assert [found[0].task_id for found in waiting.found] == names


def _stored(backend: RpcBackend, results: Sequence[StoredResult]) -> bool:
    try:
        backend.store(results)
    except BackendStoreError:
        return False
    return True


def test_who_waits_survives_a_restart_of_the_server_and_so_do_persistent_results(
    faulty_server: RabbitServer,
) -> None:
    url = faulty_server.url()
    backend = caller(url)
    lasting = caller(url, result_persistent=True)
    with Waiting(url, [[f"before {n}", f"after {n}"] for n in range(5)]) as waiting:
        wait_until(lambda: len(replies_of(backend)._wanted) == 10)
        lasting.store([result(f"before {n}") for n in range(5)])
        other = caller(url, address="other", result_persistent=True)
        other.store([result("lasting", reply_to="other")])
        other._delivery_mode = 1
        other.store([result("passing", reply_to="other")])
        faulty_server.kill()
        faulty_server.start()
        wait_until(lambda: _stored(backend, [result(f"after {n}") for n in range(5)]))
    assert waiting.errors == []
    assert [len(found) for found in waiting.found] == [2] * 5
    assert list(other.fetch(["lasting", "passing"])) == ["lasting"]


def test_deadlines_hold_while_the_server_is_silent(rabbit_server: RabbitServer, rabbit_url: str) -> None:
    with Proxy(rabbit_server.port) as proxy:
        url = proxy.url(rabbit_url)
        backend = caller(url)
        with Waiting(url, [[str(n)] for n in range(5)], 1.0) as waiting:
            wait_until(lambda: queue(rabbit_server, rabbit_url).get("consumers") == 1)
            proxy.black_hole()
            start = time.monotonic()
            waiting.join()
            assert time.monotonic() - start < 4.0
        assert waiting.errors == []
        proxy.reset()
        proxy.forward()
        backend.store([result("0")])
        assert states_of(list(backend.wait(["0"], 30.0))) == ["0 SUCCESS"]


def test_silent_connection_is_noticed_and_replaced(
    rabbit_server: RabbitServer, rabbit_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies_module, "SILENCE_S", 0.2)
    monkeypatch.setattr(replies_module, "ANSWER_S", 0.5)
    with Proxy(rabbit_server.port) as proxy:
        url = proxy.url(rabbit_url)
        with Waiting(url, [["a"], ["b"]]) as waiting:
            wait_until(lambda: queue(rabbit_server, rabbit_url).get("consumers") == 1)
            # New connections are forwarded, those that there are lead nowhere.
            proxy.black_hole()
            proxy.forward()
            open_backend(rabbit_url).store([result("a"), result("b")])
        assert waiting.errors == []
        assert [len(found) for found in waiting.found] == [1, 1]


def test_waiting_works_byte_by_byte(rabbit_server: RabbitServer, rabbit_url: str) -> None:
    with Proxy(rabbit_server.port) as proxy:
        backend = caller(rabbit_url)
        proxy.dribble()
        backend.store([result("a", value="x" * 2000)])
        assert len(list(caller(proxy.url(rabbit_url)).wait(["a"], 30.0))) == 1


def test_results_arrive_while_memory_is_short(faulty_server: RabbitServer) -> None:
    server = faulty_server
    backend = caller(server.url())
    backend.store([result(str(n)) for n in range(1000)])
    server.raise_memory_alarm()
    try:
        assert len(list(backend.wait([str(n) for n in range(1000)], 30.0))) == 1000
        assert backend.fetch(["nobody"]) == {}
    finally:
        server.clear_memory_alarm()


def test_missing_permission_is_an_error_for_the_operator(
    rabbit_server: RabbitServer, rabbit_url: str
) -> None:
    rabbit_server.add_user("narrow", "secret")
    rabbit_server.set_permissions("narrow", vhost_of(rabbit_url), "^celery", ".*", ".*")
    url = rabbit_server.url(vhost_of(rabbit_url), "narrow", "secret")
    with pytest.raises(ImproperlyConfigured, match="names are UUIDs"):
        open_backend(url).before_call(5.0)


@pytest.mark.parametrize("seed", [1, 2])
def test_threads_that_wait_in_any_order_under_kills_all_get_theirs(
    faulty_server: RabbitServer, seed: int
) -> None:
    server = faulty_server
    url, ended = server.url(), threading.Event()
    caller(url)
    errors: List[BaseException] = []

    def client(thread: int) -> None:
        random_, backend = random.Random(seed * 1000 + thread), open_backend(url)
        try:
            for n in range(15):
                names = [f"{thread} {n} {k}" for k in range(random_.randrange(1, 6))]
                answers = [result(name, state) for name in names for state in ("STARTED", "SUCCESS")]
                sender = threading.Thread(
                    target=wait_until, args=(lambda: _stored(backend, answers), 30.0)  # noqa: B023
                )
                sender.start()
                left = random_.random() < 0.3
                found: List[str] = []
                for stored in backend.wait(names, 60.0):
                    found.append(stored.task_id)
                    if left:
                        break
                sender.join()
                assert left or sorted(found) == names, f"seed {seed}"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    random_ = random.Random(seed)
    for _ in range(8):
        ended.wait(random_.uniform(0.02, 0.2))
        server.close_connections()
    for thread in threads:
        thread.join(90.0)
    assert errors == []


def test_server_that_stays_away_is_an_error_in_the_end(
    faulty_server: RabbitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies_module, "PATIENCE_S", 0.3)
    server = faulty_server
    backend = caller(server.url())
    with Waiting(server.url(), [["a"], ["b"]], None) as waiting:
        wait_until(lambda: queue(server).get("consumers") == 1)
        server.kill()
    assert [type(error) for error in waiting.errors] == [BackendGetMetaError] * 2
    with pytest.raises(BackendGetMetaError):
        backend.fetch(["a"])
    with pytest.raises(BackendStoreError):
        backend.store([result("a")])
    with pytest.raises(OperationalError):
        caller(server.url(), address="other")


# -- what is kept --------------------------------------------------------------------------------


def test_kept_replies_are_bounded_and_the_oldest_unasked_go(monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(result("0000").body) + REPLY_BYTES
    monkeypatch.setattr(kept_module, "MAX_BYTES", 100 * size)
    kept: Kept[StoredResult] = Kept(10.0)
    for n in range(150):
        assert kept.put(result(f"{n:04}"), 0.0)
        if n < 20:
            kept.tell(f"{n:04}")
    assert (len(kept), kept.bytes, kept.dropped) == (100, 100 * size, 30)
    assert kept.get("0049", 0.0) is None
    assert kept.get("0050", 0.0) == result("0050")
    # An endless one is kept alone.
    assert kept.put(result("big", value="x" * 1000 * size), 0.0)
    assert len(kept) == 1 and kept.get("big", 9.9) is not None and kept.get("big", 10.0) is None
    kept.drop("big")
    assert (len(kept), kept.bytes) == (0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_kept_replies_against_a_model(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "MAX_TOLD", 5)
    random_, kept, mono = random.Random(seed), Kept[StoredResult](5.0), 0.0
    model: Dict[str, Any] = {}
    for _ in range(2000):
        mono += random_.random() / 10
        name = str(random_.randrange(30))
        model = {one: (reply, until) for one, (reply, until) in model.items() if until > mono}
        act = random_.randrange(4)
        if act < 2:
            state = random_.choice(["STARTED", "PROGRESS", "FAILURE", "SUCCESS"])
            new = result(name, state, random_.randrange(3))
            old = kept.get(name, mono)
            expected = old is None or (may_replace(new.state, old.state) and new.body != old.body)
            assert kept.put(new, mono) is expected, f"seed {seed}"
            if expected:
                model[name] = (new, mono + 5.0)
        elif act == 2:
            kept.tell(name)
        else:
            kept.drop(name)
            model.pop(name, None)
        for one, (reply, _) in model.items():
            assert kept.get(one, mono) in (reply, None), f"seed {seed}"
        items = [*kept._unasked.values(), *kept._told.values()]
        assert kept.bytes == sum(len(reply.body) + REPLY_BYTES for reply, _ in items), f"seed {seed}"
        assert len(kept._told) <= 5 and not set(kept._told) & set(kept._unasked), f"seed {seed}"


def test_dropping_replies_is_said_once(
    rabbit_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kept_module, "MAX_BYTES", 20_000)
    backend = caller(rabbit_url)
    for turn in range(2):
        backend.store([result(f"{turn} {n}") for n in range(200)])
        assert states_of(list(backend.wait([f"{turn} 199"], 20.0))) == [f"{turn} 199 SUCCESS"]
    assert replies_of(backend)._kept.bytes <= 20_000
    assert len([record for record in caplog.records if "nobody asked for" in record.message]) == 1


# -- the app -------------------------------------------------------------------------------------


@pytest.mark.parametrize("broker", ["memory://", "redis://localhost:1/0", "sqlite:///x.db"])
def test_another_broker_is_refused(make_app: Callable[..., MiniQ], broker: str) -> None:
    app = make_app(broker=broker, backend="rpc://")
    with pytest.raises(ImproperlyConfigured, match="through a RabbitMQ broker"):
        app.backend  # noqa: B018


def test_backend_uses_the_brokers_url_and_options(make_app: Callable[..., MiniQ]) -> None:
    app = make_app(
        broker="amqp://localhost:1/host;amqp://localhost:2/host",
        backend="rpc://",
        broker_transport_options={"socket_timeout": 3.0},
        result_persistent=True,
        result_expires=5,
    )
    backend = app.backend
    assert isinstance(backend, RpcBackend)
    assert [endpoint.address[1] for endpoint in backend._server.endpoints] == [1, 2]
    assert (backend._options.socket_timeout, backend._delivery_mode, backend._expires_s) == (3.0, 2, 5)
    assert backend._address() == app.thread_oid
    with pytest.warns(UserWarning, match="write rpc://"):
        app.new_backend("rpc://somebody@elsewhere")


def test_embedded_worker_answers(make_app: Callable[..., MiniQ], rabbit_url: str) -> None:
    app = make_app(broker=rabbit_url, backend="rpc://", result_extended=True)

    @app.task
    def add(a: int, b: int) -> int:
        return a + b

    @app.task
    def fail() -> None:
        raise ValueError("boom")

    @app.task(bind=True)
    def tell(self: Any) -> str:
        self.update_state(state="PROGRESS", meta={"done": 1})
        return "told"

    @app.task
    def parent() -> Any:
        with allow_join_result():
            return add.delay(2, 2).get(timeout=30.0)

    with app.worker(concurrency=2):
        assert add.delay(2, 3).get(timeout=30.0) == 5
        with pytest.raises(ValueError, match="boom"):
            fail.delay().get(timeout=30.0)
        seen: List[Any] = []
        assert tell.delay().get(timeout=30.0, on_message=seen.append) == "told"
        assert [meta["status"] for meta in seen][-1] == "SUCCESS"
        results = [add.delay(n, n) for n in range(50)]
        for n in reversed(range(50)):
            assert results[n].get(timeout=30.0) == 2 * n
            assert results[n].ready() and app.AsyncResult(results[n].id).state == "SUCCESS"
        with pytest.raises(TimeoutError):
            app.AsyncResult("unknown").get(timeout=0.05)
        assert parent.delay().get(timeout=30.0) == 4
        ignored = add.apply_async((1, 1), ignore_result=True)
        assert app.AsyncResult(ignored.id).state == "PENDING"
        first = add.apply_async((1, 1), chain=[add.s(10).set(task_id="last")])
        assert first.get(timeout=30.0) == 2
        assert app.AsyncResult("last").get(timeout=30.0) == 12
        broken = fail.apply_async(chain=[add.s(1).set(task_id="never")])
        with pytest.raises(ValueError, match="boom"):
            app.AsyncResult("never").get(timeout=30.0)
        assert broken.failed()
        revoked = add.apply_async((1, 1), countdown=0.5)
        revoked.revoke()
        with pytest.raises(TaskRevokedError):
            revoked.get(timeout=30.0)

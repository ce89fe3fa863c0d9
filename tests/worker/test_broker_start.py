# SPDX-License-Identifier: MIT
"""A worker whose broker is a server: not there yet, loading, refusing, or gone later."""

from __future__ import annotations

import os
import re
import sqlite3
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

import pytest
from servers import RedisServer, free_port
from waiting import wait_until

from miniq import MiniQ
from miniq.connections import listener
from miniq.connections.redis import Server
from miniq.exceptions import ImproperlyConfigured, OperationalError
from miniq.worker import worker as worker_module

SOURCE = """
    import os
    from miniq import MiniQ

    app = MiniQ("proj", broker=os.environ["URL"], backend=os.environ["URL"])
    app.conf.update({settings!r})

    @app.task
    def add(x, y):
        return x + y
"""


@pytest.fixture(autouse=True)
def no_connections_stay() -> Iterator[None]:
    yield
    listener.close_all()
    Server.close_all()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that was not started, at a port where nobody listens."""
    server = RedisServer(tmp_path / "redis")
    yield server
    server.stop()


def source(**settings: Any) -> str:
    return SOURCE.format(settings=settings)


def tries(log: str) -> List[Tuple[str, str]]:
    """Return what was logged of each try: the pause and the number."""
    return re.findall(r"Cannot connect to the broker: .*Trying again in (\S+) seconds\.\.\. \((\S+)\)", log)


def test_worker_started_before_its_server_works_when_that_is_there(
    worker_process: Any, server: RedisServer, make_app: Callable[..., MiniQ]
) -> None:
    worker = worker_process(source(), "-c", "1", wait=False, env={"URL": server.url()})
    log = worker.wait_for("(2/100)")
    assert f"{server.url()}: " in log and "refused" in log
    assert tries(log)[:2] == [("0.50", "1/100"), ("1.00", "2/100")]
    assert log.count("Cannot connect") == len(tries(log)), "one line for each try"
    server.start()
    worker.wait_ready()
    assert re.search(r"Broker reached after \d\.\d s\.", worker.log)
    assert "Traceback" not in worker.log
    client = make_app("client", broker=server.url(), result_backend=server.url())
    assert client.send_task("proj.add", (2, 3)).get(timeout=15) == 5
    assert worker.stop() == 0


def test_worker_waits_for_a_server_that_loads_its_data(worker_process: Any, server: RedisServer) -> None:
    server.start()
    server.commands([("SET", f"key-{n}", os.urandom(1100)) for n in range(1000)])
    server.command("SAVE")
    server.stop()
    # Slow (microseconds for each key), so that it does not end before the worker has seen it.
    server.arguments = ["--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024"]
    server.start(wait=False)
    worker = worker_process(source(), "-c", "1", wait=False, env={"URL": server.url()})
    worker.wait_for("LOADING")
    server.command("CONFIG", "SET", "key-load-delay", 0)
    worker.wait_ready()
    assert tries(worker.log) and "Broker reached after" in worker.log
    assert worker.stop() == 0


def test_worker_waits_for_a_server_that_accepts_and_does_not_answer(
    new_redis: Callable[..., RedisServer], worker_process: Any
) -> None:
    server = new_redis()
    server.pause()
    settings = source(broker_connection_timeout=0.2)
    worker = worker_process(settings, "-c", "1", wait=False, env={"URL": server.url()})
    worker.wait_for("the time for it was over")
    server.resume()
    worker.wait_ready()
    assert worker.stop() == 0


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_worker_that_waits_for_its_server_can_be_stopped(
    worker_process: Any, server: RedisServer, pool: str
) -> None:
    worker = worker_process(source(), "-P", pool, "-c", "1", wait=False, env={"URL": server.url()})
    worker.wait_for("(3/100)")
    assert worker.stop() == 0
    assert len(tries(worker.log)) < 5, "it had two seconds until the next, and four until the one after it"
    assert "Shutdown (warm) by SIGTERM: the broker was not reached yet." in worker.log
    assert "Traceback" not in worker.log


def test_without_retries_the_start_fails_at_once(worker_process: Any, server: RedisServer) -> None:
    settings = source(broker_connection_retry_on_startup=False)
    worker = worker_process(settings, "-c", "2", wait=False, env={"URL": server.url()})
    assert worker.wait() == 1
    assert not tries(worker.log) and "Traceback" not in worker.log
    assert re.search(rf"^Error: {re.escape(server.url())}: .*refused", worker.log, re.MULTILINE)


def test_tries_are_counted(worker_process: Any, server: RedisServer) -> None:
    settings = source(broker_connection_max_retries=2)
    worker = worker_process(settings, "-c", "1", wait=False, env={"URL": server.url()})
    assert worker.wait() == 1
    assert tries(worker.log) == [("0.50", "1/2"), ("1.00", "2/2")]
    assert "Error: " in worker.log


def test_a_wrong_password_is_not_tried_again(
    new_redis: Callable[..., RedisServer], worker_process: Any
) -> None:
    server = new_redis(password="secret")
    url = server.url().replace("secret", "wrong-one")
    worker = worker_process(source(), "-c", "2", wait=False, env={"URL": url})
    assert worker.wait() == 1
    assert "WRONGPASS" in worker.log and "check user and password" in worker.log
    assert not tries(worker.log) and "Traceback" not in worker.log and "wrong-one" not in worker.log


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://{place}/99", "DB index is out of range"),
        ("redis://{place}/nine", "the database is a number"),
        ("redis://{place}?leese=3", "did you mean lease"),
        ("rediss+ssl://{place}", "unknown scheme"),
    ],
)
def test_a_url_that_cannot_be_right_is_not_tried_again(
    redis_server: RedisServer, make_app: Callable[..., MiniQ], url: str, told: str, caplog: Any
) -> None:
    app = make_app(broker=url.format(place=f"127.0.0.1:{redis_server.port}"))
    with pytest.raises(ImproperlyConfigured, match=told):
        app.worker(concurrency=1).run()
    assert not tries(caplog.text)


def test_second_url_is_used_where_the_first_is_away(
    new_redis: Callable[..., RedisServer], worker_process: Any, make_app: Callable[..., MiniQ]
) -> None:
    server = new_redis()
    urls = f"redis://127.0.0.1:{free_port()}/0;{server.url()}"
    worker = worker_process(source(), "-c", "1", env={"URL": urls})
    client = make_app("client", broker=urls.split(";"), result_backend=urls)
    assert client.send_task("proj.add", (2, 3)).get(timeout=15) == 5
    assert worker.stop() == 0
    assert not tries(worker.log)


def test_worker_in_a_thread_gives_up_and_leaves_nothing_behind(
    server: RedisServer, make_app: Callable[..., MiniQ]
) -> None:
    app = make_app(broker=server.url())
    before = threading.active_count()
    worker = app.worker(concurrency=1)
    with pytest.raises(OperationalError, match=r"did not start within 0\.2 s: redis://.*refused"):
        worker.start_in_thread(timeout_s=0.2)
    wait_until(lambda: threading.active_count() == before, what=threading.enumerate)
    impatient = make_app(broker=server.url(), broker_connection_retry_on_startup=False)
    with pytest.raises(OperationalError, match="refused"), impatient.worker(concurrency=1):
        raise AssertionError("it started")
    wait_until(lambda: threading.active_count() == before, what=threading.enumerate)


def test_pauses_between_tries_grow_to_32_seconds() -> None:
    pauses = worker_module.START_PAUSES_S
    assert pauses[:3] == (0.5, 1.0, 2.0) and pauses[-1] == 32.0
    assert list(pauses) == sorted(pauses)


def test_what_waits_is_purged_once(
    server: RedisServer, make_app: Callable[..., MiniQ]
) -> None:
    # What was sent between the purge and the try that succeeds was sent after the start.
    server.start()
    app = make_app(broker=server.url())
    app.send_task("early")
    worker = app.worker(concurrency=1, purge=True)
    worker._start_pool()
    worker._open_broker()
    assert server.command("LLEN", "celery") == 0
    worker.transport.close()
    app.send_task("late")
    worker._open_broker()
    assert server.command("LLEN", "celery") == 1
    worker._break_off()
    worker._clean()


def test_with_retries_off_a_worker_leaves_when_it_loses_its_broker(
    new_redis: Callable[..., RedisServer], worker_process: Any
) -> None:
    server = new_redis()
    settings = source(broker_connection_retry=False, broker_transport_options={"lease": 1.5})
    worker = worker_process(settings, "-c", "1", env={"URL": server.url()})
    server.stop()
    assert worker.wait(30) == 1
    assert "broker_connection_retry is off: this worker leaves" in worker.log
    assert "Shutdown (warm) by the loss of its broker" in worker.log


def test_with_retries_on_it_waits_for_a_lost_broker(
    new_redis: Callable[..., RedisServer], worker_process: Any, make_app: Callable[..., MiniQ]
) -> None:
    server = new_redis(appendonly=True)
    worker = worker_process(source(), "-c", "1", env={"URL": server.url()})
    server.stop()
    worker.wait_for("tries again")
    server.start()
    client = make_app("client", broker=server.url(), result_backend=server.url())
    assert client.send_task("proj.add", (2, 3)).get(timeout=15) == 5
    assert worker.stop() == 0


def test_a_file_is_not_waited_for(make_app: Callable[..., MiniQ], sqlite_url: str, caplog: Any) -> None:
    app = make_app(broker_transport_options={"busy_timeout": 0.05, "worker_busy_timeout": 0.05})
    app.send_task("first")  # makes the file
    with sqlite3.connect(sqlite_url[len("sqlite:///") :], isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError, match="locked"):
            app.worker(concurrency=1).run()
    other.close()
    assert not tries(caplog.text)

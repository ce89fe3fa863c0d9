# SPDX-License-Identifier: MIT
"""A worker inside another program: in a thread, in the foreground, two at once, from a script."""

from __future__ import annotations

import logging
import os
import signal
import sys
import textwrap
import threading
import time
from typing import Any, Callable, Dict

import pytest
from waiting import wait_until
from workers import environment

from miniq import MiniQ
from miniq.exceptions import ImproperlyConfigured


def with_tasks(app: MiniQ) -> MiniQ:
    @app.task(name="add")
    def add(x: int, y: int) -> int:
        return x + y

    @app.task(name="wait")
    def wait(path: str) -> str:
        while not os.path.exists(path):
            time.sleep(0.01)
        return "waited"

    return app


def state_of_the_host() -> Dict[str, Any]:
    numbers = [number for number in signal.valid_signals() if number not in (signal.SIGURG,)]
    loggers = [logging.getLogger(name) for name in ("", "celery", "celery.task", "miniq")]
    return {
        "signals": {number: signal.getsignal(number) for number in numbers},
        "loggers": [(list(one.handlers), one.level, one.propagate) for one in loggers],
        "streams": (sys.stdout, sys.stderr),
        "threads": {thread.name for thread in threading.enumerate()},
    }


@pytest.mark.parametrize("pool", ["threads", "solo", "asyncio"])
def test_worker_in_a_thread_leaves_the_host_as_it_was(make_app: Callable[..., MiniQ], pool: str) -> None:
    app = with_tasks(make_app())
    before = state_of_the_host()
    with app.worker(concurrency=2, pool=pool):
        during = state_of_the_host()
        assert app.tasks["add"].delay(2, 3).get(timeout=10) == 5
    wait_until(lambda: state_of_the_host() == before, what=state_of_the_host)
    assert before["signals"] == during["signals"] and before["streams"] == during["streams"]
    assert before["loggers"] == during["loggers"]


def test_worker_ends_quickly_and_finishes_what_runs(make_app: Callable[..., MiniQ], tmp_path: Any) -> None:
    app = with_tasks(make_app())
    worker = app.worker(concurrency=1)
    worker.start_in_thread()
    result = app.tasks["wait"].delay(str(tmp_path / "go"))
    wait_until(lambda: worker.tasks.running)
    worker.stop()
    wait_until(lambda: worker.shutdown == "warm")
    assert result.state == "PENDING"
    began = time.monotonic()
    (tmp_path / "go").touch()
    worker.close()
    assert time.monotonic() - began < 1
    assert result.get(timeout=1) == "waited" and worker.exitcode == 0


def test_worker_that_is_not_done_in_time_is_stopped_cold(
    make_app: Callable[..., MiniQ], tmp_path: Any
) -> None:
    app = with_tasks(make_app(worker_max_abandoned_threads=5))
    worker = app.worker(concurrency=1)
    worker.start_in_thread()
    result = app.tasks["wait"].delay(str(tmp_path / "go"))
    wait_until(lambda: worker.tasks.running)
    worker.close(timeout_s=0.1)
    assert worker.exitcode == 1
    assert "Worker stopped" in str(result.get(timeout=1, propagate=False))
    (tmp_path / "go").touch()
    wait_until(lambda: not any("ThreadPoolWorker" in thread.name for thread in threading.enumerate()))


def test_two_workers_in_one_program_share_the_queue(make_app: Callable[..., MiniQ], tmp_path: Any) -> None:
    app = with_tasks(make_app())
    with (
        app.worker(hostname="one@%h", concurrency=1) as one,
        app.worker(hostname="two@%h", concurrency=1) as two,
    ):
        held = [app.tasks["wait"].delay(str(tmp_path / "go")) for _ in range(2)]
        wait_until(lambda: one.tasks.running and two.tasks.running)
        (tmp_path / "go").touch()
        assert [result.get(timeout=10) for result in held] == ["waited"] * 2


def test_worker_in_the_foreground_returns_its_exit_code(make_app: Callable[..., MiniQ]) -> None:
    app = with_tasks(make_app())
    results = []

    def use() -> None:
        assert worker.started.wait(10)
        results.append(app.tasks["add"].delay(1, 2).get(timeout=10))
        app.close()
        worker.stop()

    for pool in ("threads", "solo"):
        worker = app.worker(pool=pool, concurrency=1)
        thread = threading.Thread(target=use)
        thread.start()
        assert worker.run() == 0
        thread.join()
    assert results == [3, 3]


def test_error_at_the_start_is_raised_in_the_host(make_app: Callable[..., MiniQ], tmp_path: Any) -> None:
    with (
        pytest.raises(ImproperlyConfigured, match="does not exist"),
        make_app(broker=f"sqlite:///{tmp_path}/none/x.db").worker(),
    ):
        pass
    with pytest.raises(ImproperlyConfigured, match="is never reached"):
        make_app().worker(time_limit=1, soft_time_limit=2)
    with pytest.raises(ImproperlyConfigured, match="cannot leave out queue 'mail'"):
        make_app().worker(exclude_queues="mail")
    with pytest.raises(ImproperlyConfigured, match="nothing remains"):
        make_app().worker(exclude_queues=["celery"])
    with pytest.raises(ImproperlyConfigured, match="result_serializer: unknown serializer 'jason'"):
        make_app(result_serializer="jason").worker()
    with pytest.raises(ImproperlyConfigured, match="at least 1"):
        make_app().worker(concurrency=0)
    with pytest.raises(ImportError, match="no_such_module"):
        make_app(imports=["no_such_module"]).worker()


SCRIPT = """
    import sys, threading
    from miniq import MiniQ

    app = MiniQ(broker={url!r}, worker_pool_start_method=sys.argv[1])

    @app.task
    def add(x, y):
        return x + y

    @app.task(bind=True)
    def where(self):
        import multiprocessing
        return multiprocessing.current_process().name

    if __name__ == "__main__":
        if sys.argv[2] == "thread":
            with app.worker(pool="prefork", concurrency=1):
                print(add.name, add.delay(2, 3).get(timeout=20), where.delay().get(timeout=20))
        else:
            worker = app.worker(pool="prefork", concurrency=1)
            worker.loop.call_soon(lambda: worker.loop.call_later(0.2, worker.stop))
            result = add.delay(2, 3)
            print(add.name, worker.run(), result.get(timeout=20))
    """


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"] if hasattr(os, "fork") else ["spawn"])
def test_script_with_a_worker_and_pool_processes(
    program: Any, tmp_path: Any, sqlite_url: str, method: str
) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT.format(url=sqlite_url)))
    env = environment(tmp_path)
    thread = program([sys.executable, "script.py", method, "thread"], env=env)
    assert thread.wait() == 0, thread.log
    # A program with several threads is not forked, it is started anew.
    process = "ForkServer" if method == "forkserver" else "Spawn"
    assert f"add 5 {process}PoolWorker-1\n" in thread.log
    if method == "fork":
        foreground = program([sys.executable, "script.py", method, "foreground"], env=env)
        assert foreground.wait() == 0
        assert foreground.log == "__main__.add 0 5\n"


@pytest.mark.skipif(os.name != "posix", reason="sends itself SIGINT")
def test_ctrl_c_in_a_foreground_worker_settles_and_is_raised(
    program: Any, tmp_path: Any, sqlite_url: str, client: Any
) -> None:
    script = f"""
    import sys, time
    from miniq import MiniQ

    app = MiniQ("proj", broker={sqlite_url!r})

    @app.task(acks_late=True, name="proj.late")
    def late():
        open("held", "w").close()
        time.sleep(600)

    try:
        app.worker(pool="prefork", concurrency=1).run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    result = client.send("late")
    one = program([sys.executable, "script.py"], env=environment(tmp_path))
    wait_until(lambda: (tmp_path / "held").exists() or one.exitcode is not None)
    one.send(signal.SIGINT)
    assert one.wait() == 0, one.log
    assert "interrupted" in one.log
    assert result.state == "PENDING" and client.waiting() == (1, 0, 0)


def test_memory_broker_and_child_processes_are_refused_together(make_app: Callable[..., MiniQ]) -> None:
    app = with_tasks(make_app(broker_url="memory://"))
    with pytest.raises(ImproperlyConfigured, match="lives in one process"):
        app.worker(pool="prefork", concurrency=1).run()

# SPDX-License-Identifier: MIT
"""What becomes of a task whose process or worker dies."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest
from waiting import wait_until

from miniq import states
from miniq.exceptions import WorkerLostError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes by signals")

SOURCE = """
    import os, signal, sys, time
    from miniq import MiniQ

    app = MiniQ("proj", task_track_started=True, task_delivery_limit=2)

    def note(name):
        with open(name, "a") as file:
            file.write(f"{os.getpid()}\\n")

    def die(how):
        if how == "sys.exit(3)":
            sys.exit(3)
        elif how == "os._exit(3)":
            os._exit(3)
        else:
            os.kill(os.getpid(), getattr(signal, how))

    @app.task
    def add(x, y):
        return x + y

    @app.task
    def early(how):
        die(how)

    @app.task(acks_late=True)
    def late(how):
        die(how)

    @app.task(acks_late=True, reject_on_worker_lost=True, priority=9)
    def again(how):
        note("again")
        if not os.path.exists("harmless"):
            die(how)
        return "survived"

    @app.task(default_retry_delay=0.1, max_retries=2)
    def retried():
        note("retried")
        die("SIGKILL")

    retried.retry_on_worker_lost = True

    @app.task(acks_late=True, acks_on_failure=False)
    def refused():
        raise ValueError("no")

    @app.task
    def tell(failed_id):
        note("told")

    @app.task
    def sleep(name, seconds):
        note(name)
        time.sleep(seconds)
        return "slept"

    @app.task(acks_late=True)
    def sleep_late(name, seconds):
        note(name)
        while not os.path.exists("wake-up"):
            time.sleep(0.02)
        return "slept"
    """


def test_task_whose_process_dies_fails_with_the_reason_and_others_go_on(
    worker_process: Any, client: Any
) -> None:
    worker = worker_process(SOURCE, "-c", "2")
    endings = {
        "sys.exit(3)": "Worker exited prematurely: exitcode 3",
        "os._exit(3)": "Worker exited prematurely: exitcode 3",
        "SIGKILL": "Worker exited prematurely: signal 9 (SIGKILL)",
        "SIGSEGV": "Worker exited prematurely: signal 11 (SIGSEGV)",
    }
    results = {(name, how): client.send(name, how) for how in endings for name in ("early", "late")}
    for (name, how), result in results.items():
        error = client.error_of(result)
        assert isinstance(error, WorkerLostError), (name, how, error)
        assert str(error).startswith(endings[how])
        assert result.state == states.FAILURE
    assert client.run("add", 2, 3) == 5
    wait_until(lambda: client.waiting() == (0, 0, 0), what=client.waiting)
    assert client.dead() == []
    log = worker.log
    assert log.count("raised unexpected: WorkerLostError") == len(results)
    assert "likely out of memory" not in str(client.error_of(results["early", "sys.exit(3)"]))
    wait_until(lambda: len(worker.children) == 2)
    assert worker.stop() == 0


def test_errback_of_a_killed_task_is_sent(worker_process: Any, client: Any, lines: Any) -> None:
    worker_process(SOURCE, "-c", "1")
    errback = client.app.signature("proj.tell")
    client.error_of(client.send("early", "SIGKILL", link_error=errback))
    wait_until(lambda: len(lines("told")) == 1)


def test_deadly_task_is_started_until_the_limit_then_set_aside_and_can_be_replayed(
    worker_process: Any, client: Any, lines: Any, tmp_path: Any, program: Any, sqlite_url: str
) -> None:
    worker = worker_process(SOURCE, "-c", "1")
    result = client.send("again", "SIGKILL")
    error = client.error_of(result)
    assert str(error).startswith("Worker exited prematurely: signal 9 (SIGKILL)")
    assert str(error).endswith("(start 2 of at most 2)")
    assert len(lines("again")) == 2
    [letter] = client.dead()
    assert letter.message.headers["id"] == result.id
    assert worker.log.count("is set aside as a dead letter") == 1
    assert "dead replay" in worker.log
    assert client.run("add", 1, 1) == 2

    def dead(*args: str) -> str:
        one = program([sys.executable, "-m", "miniq", "-b", sqlite_url, "dead", *args])
        assert one.wait() == 0, one.log
        return str(one.log)

    listed = dead("list")
    assert f"proj.again[{result.id}]" in listed and "start 2 of at most 2" in listed
    shown = dead("show", letter.id)
    assert "('SIGKILL',)" in shown and result.id in shown
    (tmp_path / "harmless").touch()
    assert "1 back" in dead("replay", letter.id)
    wait_until(lambda: client.app.AsyncResult(result.id).state == states.SUCCESS)
    assert client.dead() == []


def test_retry_on_worker_lost_is_a_counted_retry(worker_process: Any, client: Any, lines: Any) -> None:
    worker_process(SOURCE, "-c", "1")
    error = client.error_of(client.send("retried"))
    assert "signal 9" in str(error) and type(error).__name__ == "MaxRetriesExceededError"
    assert len(lines("retried")) == 3


def test_failure_with_acks_on_failure_off_is_set_aside(worker_process: Any, client: Any) -> None:
    worker_process(SOURCE, "-c", "1")
    assert isinstance(client.error_of(client.send("refused")), ValueError)
    [letter] = client.dead()
    assert "acks_on_failure is off" in letter.reason


def test_killed_worker_fails_early_tasks_and_gives_late_ones_to_the_next(
    worker_process: Any, client: Any, lines: Any, tmp_path: Any
) -> None:
    first = worker_process(SOURCE, "-c", "2")
    errback = client.app.signature("proj.tell")
    early = client.send("sleep", "early", 600, link_error=errback)
    late = client.send("sleep_late", "late", 600)
    wait_until(lambda: lines("early") and lines("late"))
    wait_until(lambda: early.state == late.state == states.STARTED)
    assert early.info["pid"] == int(lines("early")[0])
    queued = [client.send("add", n, n) for n in range(3)]
    first.kill()
    second = worker_process(None, "-c", "2")
    error = client.error_of(early)
    assert isinstance(error, WorkerLostError) and "died while it ran the task" in str(error)
    assert [result.get(timeout=10) for result in queued] == [0, 2, 4]
    wait_until(lambda: len(lines("late")) == 2)
    (tmp_path / "wake-up").touch()
    assert late.get(timeout=10) == "slept"
    wait_until(lambda: len(lines("told")) == 1)
    assert len(lines("early")) == 1
    assert second.stop() == 0


def test_task_that_kills_its_whole_worker_is_stopped_by_the_limit(
    worker_process: Any, client: Any, lines: Any
) -> None:
    source = (
        SOURCE
        + """
    @app.task(acks_late=True)
    def kill_worker():
        note("kill_worker")
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    """
    )
    result = None
    for _ in range(2):
        worker = worker_process(source, "-c", "1")
        result = result or client.send("kill_worker")
        assert worker.wait() == -signal.SIGKILL
    worker_process(source, "-c", "1")
    error = client.error_of(result)
    assert isinstance(error, WorkerLostError) and "(start 2 of at most 2)" in str(error)
    assert len(lines("kill_worker")) == 2
    assert len(client.dead()) == 1
    assert client.run("add", 1, 1) == 2

# SPDX-License-Identifier: MIT
"""When a task starts, if at all: ETA, expiry, revocation, rate limits, retries, priorities."""

from __future__ import annotations

import os
import time
from datetime import datetime, timedelta, timezone
from typing import Any, List

import pytest
from waiting import wait_until

from miniq import states
from miniq.exceptions import TaskRevokedError

SOURCE = """
    import os, time
    from miniq import MiniQ
    from miniq.exceptions import Ignore, Reject
    from miniq.signals import task_revoked, worker_ready

    app = MiniQ("proj")

    def note(name, value=""):
        with open(name, "a") as file:
            file.write(f"{time.time()} {value}\\n")

    @task_revoked.connect(weak=False)
    def on_revoked(sender, request, terminated, signum, expired, **_):
        print("REVOKED", sender.name, request.id, terminated, signum, expired, flush=True)

    @app.task
    def add(x, y):
        return x + y

    @app.task
    def mark(name, value=""):
        note(name, value)

    @app.task(track_started=True)
    def sleep(seconds):
        note("sleep")
        time.sleep(seconds)
        return "slept"

    @app.task(rate_limit="10/s")
    def ten(value):
        note("ten", value)

    @app.task(rate_limit="1/m")
    def rare(value):
        note("rare", value)

    @app.task(bind=True, default_retry_delay=0.1, max_retries=3)
    def flaky(self, failures):
        note("flaky", self.request.retries)
        if self.request.retries < failures:
            raise self.retry(exc=ValueError(self.request.retries))
        return self.request.retries

    @app.task(bind=True, max_retries=1)
    def plain_retry(self):
        raise self.retry(countdown=0)

    @app.task
    def ignore():
        raise Ignore()

    @app.task
    def reject(requeue):
        note("reject")
        raise Reject("not here", requeue=requeue)

    @app.task(acks_late=True)
    def reject_late(requeue):
        note("reject_late")
        raise Reject("not here", requeue=requeue)
    """


def moments(lines: List[str]) -> List[float]:
    return [float(line.split()[0]) for line in lines]


def test_eta_countdown_expiry_and_retries(worker_process: Any, client: Any, lines: Any) -> None:
    worker = worker_process(SOURCE, "-c", "2")
    now = time.time()
    client.send("mark", "eta", eta=datetime.now(timezone.utc) + timedelta(seconds=0.4))
    client.send("mark", "countdown", countdown=0.3)
    client.send("mark", "past", eta=datetime.now(timezone.utc) - timedelta(hours=1))
    expired = client.send("mark", "expired", expires=datetime.now(timezone.utc) - timedelta(seconds=1))
    expiring = client.send("mark", "expired", countdown=0.3, expires=0.1)
    error = client.error_of(expired)
    assert isinstance(error, TaskRevokedError) and str(error) == "expired"
    assert expired.state == states.REVOKED
    assert client.run("flaky", 2) == 2
    exhausted = client.error_of(client.send("flaky", 9))
    assert isinstance(exhausted, ValueError)
    assert type(client.error_of(client.send("plain_retry"))).__name__ == "MaxRetriesExceededError"
    wait_until(lambda: lines("eta") and lines("countdown") and lines("past"))
    assert expiring.get(timeout=10, propagate=False).args == ("expired",)
    assert 0.4 <= moments(lines("eta"))[0] - now < 1.4
    assert 0.3 <= moments(lines("countdown"))[0] - now < 1.3
    assert moments(lines("past"))[0] - now < 1
    assert lines("expired") == []
    retries = [line.split()[1] for line in lines("flaky")]
    assert retries == ["0", "1", "2", "0", "1", "2", "3"]
    starts = moments(lines("flaky"))
    assert all(later - earlier >= 0.1 for earlier, later in zip(starts[:3], starts[1:3]))
    log = worker.wait_for(f"REVOKED proj.mark {expired.id} False None True")
    assert log.count(f"Discarding expired task: proj.mark[{expired.id}]") == 1
    assert "retry: Retry in 0.1s: ValueError(0)" in log


def test_ignored_and_rejected_tasks(worker_process: Any, client: Any, lines: Any) -> None:
    worker = worker_process(SOURCE, "-c", "1")
    ignored = client.send("ignore")
    refused = client.send("reject", False)
    late = client.send("reject_late", False)
    assert "not here" in str(client.error_of(refused)) and "not here" in str(client.error_of(late))
    wait_until(lambda: len(client.dead()) == 2)
    # A task that asks for it is run again and again, until something else becomes of it.
    endless = client.send("reject_late", True)
    wait_until(lambda: len(lines("reject_late")) > 6)
    client.app.control.revoke(endless.id)
    assert isinstance(client.error_of(endless), TaskRevokedError)
    assert ignored.state == states.PENDING
    wait_until(lambda: client.waiting() == (0, 0, 0))
    assert f"Task proj.ignore[{ignored.id}] ignored" in worker.log


def test_revoked_before_any_worker_and_while_waiting(worker_process: Any, client: Any, lines: Any) -> None:
    early, waiting = client.send("mark", "early"), client.send("mark", "waiting", countdown=4)
    control = client.app.control
    control.revoke(early.id)
    assert early.state == states.REVOKED
    worker = worker_process(SOURCE, "-c", "1")
    control.revoke(waiting.id)
    error = client.error_of(waiting)
    assert isinstance(error, TaskRevokedError)
    worker.wait_for(f"Discarding revoked task: proj.mark[{early.id}]")
    log = worker.wait_for(f"Discarding revoked task: proj.mark[{waiting.id}]")
    assert f"REVOKED proj.mark {early.id} False None False" in log
    assert client.waiting() == (0, 0, 0)
    assert lines("early") == lines("waiting") == []
    # After the end it changes nothing.
    done = client.send("add", 1, 1)
    assert done.get(timeout=10) == 2
    control.revoke(done.id, terminate=True)
    worker.wait_for("add")
    assert client.app.AsyncResult(done.id).state == states.SUCCESS


@pytest.mark.skipif(os.name != "posix", reason="stops processes by signals")
def test_revoke_with_terminate_stops_only_the_process_that_runs_the_task(
    worker_process: Any, client: Any, lines: Any
) -> None:
    worker = worker_process(SOURCE, "-c", "2")
    wait_until(lambda: len(worker.children) == 2)
    before = worker.children
    other, stopped = client.send("sleep", 0.6), client.send("sleep", 60)
    wait_until(lambda: other.state == stopped.state == states.STARTED)
    client.app.control.revoke(stopped.id, terminate=True, signal="SIGKILL")
    error = client.error_of(stopped)
    assert isinstance(error, TaskRevokedError) and str(error) == "terminated"
    assert client.app.AsyncResult(stopped.id).state == states.REVOKED
    assert other.get(timeout=10) == "slept"
    wait_until(lambda: len(worker.children) == 2)
    assert len(set(before) & set(worker.children)) == 1
    worker.wait_for(f"REVOKED proj.sleep {stopped.id} True SIGKILL False")
    # A name that is no signal stops nothing.
    client.app.control.revoke("nobody", terminate=True, signal="SIGNAL")
    assert client.run("add", 1, 1) == 2


def test_terminate_in_a_pool_of_threads_is_refused_with_a_warning(
    worker_process: Any, client: Any, lines: Any
) -> None:
    worker = worker_process(SOURCE, "-c", "2", "-P", "threads")
    result = client.send("sleep", 0.3)
    wait_until(lambda: result.state == states.STARTED)
    client.app.control.revoke(result.id, terminate=True)
    worker.wait_for("runs in a pool that cannot stop it; it goes on")
    assert result.get(timeout=10) == "slept"


def test_rate_limits_are_kept_and_block_nobody_else(worker_process: Any, client: Any, lines: Any) -> None:
    for value in range(100):
        client.send("rare", value)
    worker_process(SOURCE, "-c", "2")
    began = time.monotonic()
    assert client.run("add", 2, 3) == 5
    assert time.monotonic() - began < 1
    assert len(lines("rare")) == 1
    for value in range(12):
        client.send("ten", value)
    wait_until(lambda: len(lines("ten")) == 12)
    starts = moments(lines("ten"))
    # A window of one second never holds more than the rate and the first one.
    for index, start in enumerate(starts):
        assert sum(start <= other < start + 0.95 for other in starts[index:]) <= 11
    assert 1.0 < starts[-1] - starts[0] < 2.5
    assert [line.split()[1] for line in lines("ten")] == [str(value) for value in range(12)]
    assert len(lines("rare")) == 1
    assert client.waiting()[1] == 99


def test_changed_rate_and_disabled_rates(worker_process: Any, client: Any, lines: Any) -> None:
    worker = worker_process(SOURCE, "-c", "1")
    client.send("rare", "first").get(timeout=10)
    client.app.control.rate_limit("proj.rare", "1000/s")
    client.app.control.rate_limit("proj.nobody", "1/s")
    client.app.control.rate_limit("proj.add", "fast")
    worker.wait_for("rate_limit({'task_name': 'proj.add', 'rate_limit': 'fast'}) failed")
    for _ in range(3):
        client.send("rare", "more").get(timeout=10)
    worker.stop()
    worker_process(
        SOURCE.replace('MiniQ("proj")', 'MiniQ("proj", worker_disable_rate_limits=True)'), "-c", "1"
    )
    for _ in range(3):
        client.send("rare", "unlimited").get(timeout=10)


def test_higher_priority_starts_first(worker_process: Any, client: Any, lines: Any) -> None:
    for value, priority in enumerate([0, 3, 9, 3, 0, 9]):
        client.send("mark", "order", value, priority=priority)
    worker_process(SOURCE, "-c", "1")
    wait_until(lambda: len(lines("order")) == 6)
    assert [line.split()[1] for line in lines("order")] == ["2", "5", "1", "3", "0", "4"]

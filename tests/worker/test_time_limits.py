# SPDX-License-Identifier: MIT
"""Soft and hard time limits in every pool, told to hooks, errbacks and waiters."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from waiting import wait_until

from miniq import states
from miniq.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded

SOURCE = """
    import asyncio, time
    from miniq import MiniQ
    from miniq.exceptions import SoftTimeLimitExceeded
    from miniq.signals import task_failure
    from miniq.worker.request import Request

    app = MiniQ("proj")

    class Telling(Request):
        def on_timeout(self, soft, timeout):
            print(f"ON_TIMEOUT {self.name} soft={soft} {timeout}", flush=True)
            raise RuntimeError("a hook may fail")

        def on_failure(self, exc_info, send_failed_event=True, return_ok=False):
            print(f"ON_FAILURE {self.task_id} {exc_info.exception!r}", flush=True)

    @task_failure.connect(weak=False)
    def on_failure(sender, exception, **_):
        print(f"TASK_FAILURE {sender.name} {type(exception).__name__}", flush=True)

    def spin(seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.005)
        return "spun"

    async def wait(seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await asyncio.sleep(0.005)
        return "waited"

    def plain(how):
        try:
            spin()
        except SoftTimeLimitExceeded:
            if how == "raise":
                raise
            return "cleaned up"

    async def awaiting(how):
        try:
            await wait()
        except SoftTimeLimitExceeded:
            if how == "raise":
                raise
            return "cleaned up"

    def stubborn():
        while True:
            try:
                spin()
            except Exception:
                pass

    async def stubborn_awaiting():
        while True:
            try:
                await wait()
            except Exception:
                pass

    app.task(plain, name="proj.soft", soft_time_limit=0.1)
    app.task(awaiting, name="proj.soft_async", soft_time_limit=0.1)
    limits = {"soft_time_limit": 0.05, "time_limit": 0.15, "Request": Telling}
    app.task(stubborn, name="proj.hard", **limits)
    app.task(stubborn_awaiting, name="proj.hard_async", **limits)
    app.task(stubborn, name="proj.hard_late", acks_late=True, acks_on_timeout=False, time_limit=0.1)
    app.task(spin, name="proj.unlimited")
    app.task(wait, name="proj.unlimited_async")

    @app.task
    def add(x, y):
        return x + y

    @app.task
    def tell(failed_id):
        print("TOLD", failed_id, flush=True)
    """

POOLS = [
    pytest.param(["-P", "threads"], "", id="threads"),
    pytest.param(["-P", "solo"], "", id="solo"),
    pytest.param(["-P", "asyncio"], "_async", id="asyncio"),
    pytest.param(["-P", "prefork", "--pool-start-method", "spawn"], "", id="spawn"),
]
if hasattr(os, "fork"):
    POOLS.append(pytest.param(["-P", "prefork", "--pool-start-method", "fork"], "", id="fork"))


@pytest.mark.parametrize(("flags", "kind"), POOLS)
def test_limits_are_kept_and_the_worker_goes_on(
    worker_process: Any, client: Any, flags: Any, kind: str
) -> None:
    worker = worker_process(SOURCE, "-c", "1", "--time-limit", "0.2", *flags)
    began = time.monotonic()
    assert client.run("soft" + kind, "clean") == "cleaned up"
    error = client.error_of(client.send("soft" + kind, "raise"))
    assert isinstance(error, SoftTimeLimitExceeded)
    hard = client.send("hard" + kind, link_error=client.app.signature("proj.tell"))
    error = client.error_of(hard)
    assert isinstance(error, TimeLimitExceeded) and error.args == (0.15,)
    assert client.app.AsyncResult(hard.id).state == states.FAILURE
    # The worker's own limit, for a task without one; and one of the message.
    assert client.error_of(client.send("unlimited" + kind)).args == (0.2,)
    assert client.error_of(client.send("unlimited" + kind, time_limit=0.1)).args == (0.1,)
    assert client.run("add", 2, 3) == 5
    assert time.monotonic() - began < 10
    log = worker.wait_for(f"TOLD {hard.id}")
    assert f"ON_TIMEOUT proj.hard{kind} soft=False 0.15" in log
    assert "Telling.on_timeout failed" in log
    assert f"ON_FAILURE {hard.id} TimeLimitExceeded(0.15" in log
    assert f"TASK_FAILURE proj.hard{kind} TimeLimitExceeded" in log
    assert log.count("Hard time limit (0.15s) exceeded") == 1
    wait_until(lambda: client.waiting() == (0, 0, 0))


def test_acks_on_timeout_off_gives_the_message_back_until_the_delivery_limit(
    worker_process: Any, client: Any
) -> None:
    worker = worker_process(SOURCE, "-c", "1")
    error = client.error_of(client.send("hard_late"))
    assert "3 of at most 3" in str(error)
    assert worker.log.count("Hard time limit (0.1s) exceeded") == 3
    assert len(client.dead()) == 1


def test_worker_with_too_many_stuck_threads_finishes_and_leaves_with_1(
    worker_process: Any, client: Any
) -> None:
    source = (
        SOURCE.replace('MiniQ("proj")', 'MiniQ("proj", worker_max_abandoned_threads=2)')
        + """
    @app.task(time_limit=0.05)
    def stuck():
        time.sleep(30)
    """
    )
    worker = worker_process(source, "-c", "4", "-P", "threads")
    results = [client.send("stuck") for _ in range(2)]
    running = client.send("unlimited", 0.5)
    for result in results:
        assert isinstance(client.error_of(result), TimeLimitExceeded)
    assert worker.wait() == 1
    assert running.get(timeout=5) == "spun"
    assert "cannot be stopped; this worker finishes what else runs and leaves" in worker.log


def test_solo_worker_held_by_a_stuck_task_leaves_with_1(worker_process: Any, client: Any) -> None:
    source = (
        SOURCE
        + """
    import signal, miniq.worker.worker as worker
    worker.STUCK_S = worker.MAIN_THREAD_LEAVES_S = 0.2

    @app.task(time_limit=0.05)
    def stuck():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGURG])
        time.sleep(30)
    """
    )
    worker = worker_process(source, "-P", "solo")
    stuck, waiting = client.send("stuck"), client.send("add", 1, 2)
    assert isinstance(client.error_of(stuck), TimeLimitExceeded)
    assert worker.wait() == 1
    assert "A task that cannot be stopped holds the main thread." in worker.log
    assert waiting.state == states.PENDING and client.waiting() == (1, 0, 0)

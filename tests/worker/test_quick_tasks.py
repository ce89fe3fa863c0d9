# SPDX-License-Identifier: MIT
"""Quick tasks that wait inside children: none may start twice or get lost, none may wait for long."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from miniq import states
from miniq.exceptions import WorkerLostError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes by signals")

SOURCE = """
    import os, time
    from miniq import MiniQ

    app = MiniQ("proj")
    log = os.open("runs", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    @app.task
    def quick(n):
        os.write(log, f"{n}\\n".encode())

    @app.task(rate_limit="6/m")
    def limited():
        return time.time()

    @app.task
    def sometimes_long(seconds):
        time.sleep(seconds)
        return time.time()
    """


def kill_tree(worker: Any) -> None:
    """Kill a worker and its children in one moment, as a machine that runs out of memory may."""
    for pid in [worker.pid, *worker.children]:
        os.kill(pid, signal.SIGKILL)
    worker.process.wait()


def test_early_acked_tasks_of_killed_workers_run_at_most_once_and_only_the_running_ones_fail(
    worker_process: Any, client: Any, tmp_path: Path, lines: Any
) -> None:
    n, kills = 4000, 3
    producer = client.app.producer
    options = {"ignore_result": False}
    prepared = [producer.prepare("proj.quick", (i,), {}, dict(options)) for i in range(n)]
    producer.transport.publish([one.publication for one in prepared], 30.0)
    for kill in range(1, kills + 1):
        worker = worker_process(SOURCE, "-c", "2", loglevel="WARNING")
        enough = kill * n // 5
        wait_until(lambda enough=enough: len(lines("runs")) >= enough, 30)
        kill_tree(worker)
    worker_process(SOURCE, "-c", "2", loglevel="WARNING")
    wait_until(lambda: client.waiting() == (0, 0, 0), 30, client.waiting)
    runs = Counter(lines("runs"))
    twice = {number: count for number, count in runs.items() if count > 1}
    assert not twice, f"started more than once: {twice}"
    failed = []
    for i, one in enumerate(prepared):
        result = client.app.AsyncResult(one.task_id)
        if result.state != states.SUCCESS:
            assert result.state == states.FAILURE and isinstance(result.result, WorkerLostError), (
                i,
                result.state,
            )
            failed.append(i)
    # At most what ran, or was about to be settled, at each kill: never what only waited in a child.
    missing = [i for i in range(n) if str(i) not in runs]
    assert len(missing) <= 2 * kills, missing
    assert set(missing) <= set(failed)
    assert not list(tmp_path.glob("*-starts-*"))[2:], "journals of dead workers are removed"


def test_short_tasks_do_not_wait_behind_one_that_turns_out_long(worker_process: Any, client: Any) -> None:
    worker_process(SOURCE, "-c", "2", loglevel="WARNING")
    learn = [client.send("sometimes_long", 0) for _ in range(200)]
    for result in learn:
        result.get(timeout=15)
    producer = client.app.producer
    calls = [producer.prepare("proj.sometimes_long", (s,), {}, {}) for s in [0] * 20 + [3.0] + [0] * 60]
    begin = time.time()
    producer.transport.publish([one.publication for one in calls], 10.0)
    results = [client.app.AsyncResult(one.task_id) for one in calls]
    short = results[:20] + results[21:]
    ends = [result.get(timeout=15) for result in short]
    assert max(ends) - begin < 2.5, "they ran while the long one did"
    assert results[20].get(timeout=15) - begin >= 3.0


def test_rate_limited_task_among_quick_ones_does_not_lose_its_turn(worker_process: Any, client: Any) -> None:
    producer = client.app.producer
    quick = [producer.prepare("proj.quick", (n,), {}, {}).publication for n in range(1500)]
    limited = producer.prepare("proj.limited", (), {}, {})
    begin = time.time()
    producer.transport.publish([*quick[:1000], limited.publication, *quick[1000:]], 10.0)
    worker_process(SOURCE, "-c", "2", loglevel="WARNING")
    assert client.app.AsyncResult(limited.task_id).get(timeout=9) - begin < 9, "the next turn is 10 s later"

# SPDX-License-Identifier: MIT
"""Several producers and workers on one file, and workers that are killed again and again."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, List

import pytest
from waiting import wait_until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes by signals")

PRODUCERS, WORKERS, TASKS, KILLS = 4, 3, 150, 8

SOURCE = """
    import os, random, time
    from miniq import MiniQ

    # No delivery limit: a worker that is killed by chance says nothing about the task.
    app = MiniQ("proj", task_delivery_limit=0)

    @app.task(acks_late=True, reject_on_worker_lost=True)
    def work(number):
        time.sleep(random.random() * 0.02)
        log = os.open("done", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(log, f"{number}\\n".encode())
        os.close(log)
        return number
    """

PRODUCE = """
import sys, time
import proj
first, n = int(sys.argv[1]), int(sys.argv[2])
proj.app.conf.broker_url = sys.argv[3]
for number in range(first, first + n):
    print(number, proj.work.delay(number).id, flush=True)
    time.sleep(0.005)
"""


def test_nothing_is_lost_while_workers_are_killed(
    worker_process: Any, program: Any, client: Any, lines: Any, tmp_path: Path, sqlite_url: str
) -> None:
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    workers: List[Any] = [worker_process(SOURCE, "-c", "2", loglevel="WARNING") for _ in range(WORKERS)]
    producers = [
        program([sys.executable, "-c", PRODUCE, str(i * TASKS), str(TASKS), sqlite_url])
        for i in range(PRODUCERS)
    ]
    for _ in range(KILLS):
        time.sleep(chance.uniform(0.05, 0.5))
        victim = chance.randrange(WORKERS)
        # Alone, or with its children as by a machine's memory killer.
        pids = [workers[victim].pid, *(workers[victim].children if chance.random() < 0.5 else [])]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        workers[victim].process.wait()
        workers[victim] = worker_process(SOURCE, "-c", "2", loglevel="WARNING")
    accepted = {}
    for producer in producers:
        assert producer.wait(60) == 0, f"seed {seed}: a producer failed:\n{producer.log}"
        for line in producer.log.splitlines():
            number, task_id = line.split()
            accepted[int(number)] = task_id
    assert len(accepted) == PRODUCERS * TASKS
    wait_until(lambda: client.waiting() == (0, 0, 0), 60, lambda: f"seed {seed}: {client.waiting()}")
    done = Counter(map(int, lines("done")))
    missing = sorted(set(accepted) - set(done))
    assert not missing, (
        f"seed {seed}: {len(missing)} of {len(accepted)} accepted tasks never ran: {missing[:20]}"
    )
    assert client.dead() == []
    unfinished = {n: client.app.AsyncResult(i).state for n, i in accepted.items()}
    assert set(unfinished.values()) == {"SUCCESS"}, f"seed {seed}: {Counter(unfinished.values())}"
    for worker in workers:
        assert worker.stop() == 0
        assert "database is locked" not in worker.log
    db = sqlite3.connect(sqlite_url[len("sqlite:///") :])
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()

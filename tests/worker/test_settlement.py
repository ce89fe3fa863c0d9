# SPDX-License-Identifier: MIT
"""Outcomes that are hard to settle: refused follow-ups, a backend that is away, messages taken over."""

from __future__ import annotations

import sqlite3
from typing import Any

from waiting import wait_until

from miniq import states

SOURCE = """
    import os, time
    from miniq import MiniQ, Queue, Exchange

    app = MiniQ("proj")
    {more}

    @app.task
    def add(x, y):
        return x + y

    @app.task(acks_late=True)
    def hold(name):
        open(f"held-{{name}}", "w").close()
        while not os.path.exists("release"):
            time.sleep(0.01)
        return name
    """


def test_outcome_whose_followup_reaches_no_queue_fails_alone(worker_process: Any, client: Any) -> None:
    more = """app.conf.task_queues = [
        Queue("celery"), Queue("other", Exchange("letters", "direct"), routing_key="known")
    ]"""
    worker = worker_process(SOURCE.format(more=more), "-c", "2", "-Q", "celery,other")
    lost = client.app.signature("proj.add", (1,), exchange="letters", routing_key="unknown")
    results = [client.send("add", number, 0, link=lost if number == 2 else None) for number in range(5)]
    values = [result.get(timeout=10, propagate=False) for result in results]
    assert [value for value in values if isinstance(value, int)] == [0, 1, 3, 4]
    assert "no queue is bound with a key for 'unknown'" in str(values[2])
    assert worker.log.count("its outcome cannot be settled") == 1
    assert client.run("add", 2, 3) == 5
    wait_until(lambda: client.waiting() == (0, 0, 0))


def test_backend_that_is_away_is_waited_for(worker_process: Any, client: Any, tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/results.db"
    # Its own file, whose lock is waited for a moment only.
    more = f"""app.conf.result_backend = {url!r}
    app.conf.result_backend_transport_options = {{"busy_timeout": 0.05}}"""
    worker = worker_process(SOURCE.format(more=more), "-c", "2")
    client.app.conf.result_backend = url
    assert client.run("add", 1, 1) == 2
    db = sqlite3.connect(tmp_path / "results.db", timeout=10, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    results = [client.send("add", number, 0) for number in range(6)]
    worker.wait_for("Result backend: ")
    db.execute("ROLLBACK")
    db.close()
    assert [result.get(timeout=10) for result in results] == list(range(6))
    worker.wait_for("Result backend reached again after")
    assert worker.log.count("tries again") == 1
    assert worker.log.count("] received") == 7


def test_backend_that_stays_away_costs_the_results_only(
    worker_process: Any, client: Any, tmp_path: Any
) -> None:
    url = f"sqlite:///{tmp_path}/results.db"
    more = f"""app.conf.result_backend = {url!r}
    app.conf.result_backend_transport_options = {{"busy_timeout": 0.02}}
    import miniq.worker.consumer as consumer
    consumer.RESULT_PATIENCE_S = 0.3"""
    worker = worker_process(SOURCE.format(more=more), "-c", "1")
    client.app.conf.result_backend = url
    client.run("add", 1, 1)
    db = sqlite3.connect(tmp_path / "results.db", timeout=10, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    lost = client.send("add", 1, 1)
    worker.wait_for(f"Task proj.add[{lost.id}]: its result is lost, the backend does not take it")
    wait_until(lambda: client.waiting() == (0, 0, 0))
    db.execute("ROLLBACK")
    db.close()
    assert client.run("add", 2, 2) == 4
    assert lost.state == states.PENDING


def test_outcome_of_a_message_that_another_worker_has_is_dropped(
    worker_process: Any, client: Any, tmp_path: Any
) -> None:
    worker = worker_process(SOURCE.format(more=""), "-c", "2")
    taken, kept = client.send("hold", "taken"), client.send("hold", "kept")
    wait_until(lambda: (tmp_path / "held-taken").exists() and (tmp_path / "held-kept").exists())
    db = sqlite3.connect(tmp_path / "queue.db", timeout=10)
    with db:
        db.execute("UPDATE messages SET owner=owner+1000 WHERE task_id=?", (taken.id,))
    db.close()
    (tmp_path / "release").touch()
    assert kept.get(timeout=10) == "kept"
    worker.wait_for(f"Task proj.hold[{taken.id}] was given to another worker meanwhile")
    assert taken.state == states.PENDING
    assert client.run("add", 2, 3) == 5
    worker.stop()
    assert "leaves: 3 finished, 0 handed back, 1 lost." in worker.log

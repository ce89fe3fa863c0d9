# SPDX-License-Identifier: MIT
"""A delivery ends with its channel, a run does not: each task runs once, and its message is gone then."""

from __future__ import annotations

import time
from typing import Any, Callable, List

import pytest
from faults import FULL, Sender, rounds, when_full
from rabbit_fleet import Fleet
from waiting import wait_until


def check_ran_once(fleet: Fleet, names: List[str]) -> None:
    """Wait until the queue is empty; then each began once and ended once."""
    wait_until(lambda: not fleet.queues()["celery"]["messages"], 10.0, lambda: f"an empty queue: {fleet}")
    assert sorted(fleet.lines("began")) == sorted(fleet.lines("ended")) == sorted(names), fleet


@pytest.mark.parametrize("results", ["redis", pytest.param("rpc", marks=when_full)])
def test_tasks_longer_than_the_consumer_timeout_run_once_and_others_go_on(
    new_fleet: Callable[..., Fleet], results: str, tell: Callable[[str], None]
) -> None:
    timeout_s, task_s = (4.0, 10.0) if FULL else (1.5, 4.0)
    fleet = new_fleet() if results == "redis" else new_fleet("rpc://")
    names: List[str] = []
    with fleet.consumer_timeout(timeout_s):
        worker = fleet.start_worker("-c", "4", task_track_started=True)
        for number in rounds():
            fleet.check_no_growth()
            of_round = [f"{kind}-{number}" for kind in ("late", "early", "eta")]
            late = fleet.send("nap", of_round[0], task_s)
            early = fleet.send("early_nap", of_round[1], task_s)
            eta = fleet.send("nap", of_round[2], 0, countdown=task_s)
            names += of_round
            longest_s = 0.0
            with Sender(fleet, pause_s=0.05) as sender:
                while not late.ready():
                    longest_s = max(longest_s, fleet.wait_consuming())
            assert [one.get(timeout=10) for one in (late, early, eta)] == of_round
            fleet.check_nothing_lost(sender.accepted)
            check_ran_once(fleet, names)
            assert worker.exitcode is None
        fleet.check_no_growth()
        fleet.check_no_leftovers()
    assert worker.log.count("not acknowledged within its consumer_timeout") == 1, "told, and only once"
    assert worker.log.count("joins its run") >= number + 1, worker.log
    assert not fleet.doubles(), fleet
    tell(f"RabbitMQ, {task_s:g} s tasks, {timeout_s:g} s consumer_timeout: others waited {longest_s:.1f} s")


def cut(fleet: Fleet) -> None:
    fleet.proxy.reset()


def close_connections(fleet: Fleet) -> None:
    assert fleet.server.close_connections()


def restart(fleet: Fleet) -> None:
    fleet.server.restart()


@pytest.mark.parametrize(
    "fault",
    [cut, pytest.param(close_connections, marks=when_full), pytest.param(restart, marks=when_full)],
)
@pytest.mark.parametrize(
    "pool, results", [("prefork", "redis"), ("threads", "rpc"), ("solo", "redis"), ("asyncio", "rpc")]
)
def test_long_task_outlives_its_connection_and_runs_once(
    new_fleet: Callable[..., Fleet], pool: str, results: str, fault: Callable[[Fleet], None]
) -> None:
    task_s = 5.0 if FULL else 1.5
    fleet = new_fleet() if results == "redis" else new_fleet("rpc://")
    fleet.start_worker("-P", pool)
    names: List[str] = []
    for number in rounds():
        names.append(f"late-{number}")
        result = fleet.send("nap", names[-1], task_s)
        fleet.wait_for_lines("began", number + 1)
        fault(fleet)
        if fault is cut:
            time.sleep(task_s / 5)
            fault(fleet)
        assert result.get(timeout=task_s + 10) == names[-1]
        check_ran_once(fleet, names)
        fleet.check_no_growth()
    fleet.wait_consuming()
    fleet.check_no_leftovers()
    assert not fleet.doubles(), fleet


def test_queue_that_is_deleted_is_declared_again(new_fleet: Callable[..., Fleet]) -> None:
    fleet = new_fleet()
    worker = fleet.start_worker()
    names: List[str] = []
    for number in rounds():
        fleet.check_no_growth()
        # Idle; then while a task runs, whose message goes with the queue, but not its result.
        fleet.server.delete_queue("celery", fleet.vhost)
        fleet.wait_consuming()
        names.append(f"late-{number}")
        result: Any = fleet.send("hold", names[-1], f"go{number}")
        fleet.wait_for_lines("began", number + 1)
        fleet.server.delete_queue("celery", fleet.vhost)
        fleet.wait_consuming()
        fleet.release(f"go{number}")
        assert result.get(timeout=10) == names[-1]
        check_ran_once(fleet, names)
    assert worker.log.count("queue celery was deleted") == 2 * (number + 1), worker.log
    fleet.check_no_growth()
    fleet.check_no_leftovers()
    assert not fleet.doubles(), fleet

# SPDX-License-Identifier: MIT
"""A delivery ends with its channel, a run does not: each task runs once, and its message is gone then."""

from __future__ import annotations

import time
from typing import Any, Callable, List

import pytest
from faults import FULL, Sender, rounds, when_full
from rabbit_fleet import Fleet
from waiting import wait_until

POOLS = ("prefork", "threads", "solo", "asyncio")


def check_ran_once(fleet: Fleet, names: List[str]) -> None:
    """Wait until the queues are empty; then each began once and ended once."""

    def left() -> int:
        return sum(row["messages"] for name, row in fleet.queues().items() if name in ("celery", *POOLS))

    wait_until(lambda: not left(), 10.0, lambda: f"empty queues: {fleet}")
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


@pytest.mark.parametrize("results", ["rpc", pytest.param("redis", marks=when_full)])
@pytest.mark.parametrize(
    "fault",
    [cut, pytest.param(close_connections, marks=when_full), pytest.param(restart, marks=when_full)],
)
def test_long_task_in_each_pool_outlives_its_connection_and_runs_once(
    new_fleet: Callable[..., Fleet], results: str, fault: Callable[[Fleet], None]
) -> None:
    task_s = 5.0 if FULL else 2.0
    fleet = new_fleet() if results == "redis" else new_fleet("rpc://")
    for pool in POOLS:
        fleet.start_worker("-P", pool, "-Q", f"celery,{pool}", wait=False)
    for worker in fleet.workers:
        worker.wait_ready()
    names: List[str] = []
    for number in rounds():
        of_round = [f"{pool}-{number}" for pool in POOLS]
        names += of_round
        sent = [fleet.send("nap", name, task_s, queue=pool) for name, pool in zip(of_round, POOLS)]
        fleet.wait_for_lines("began", len(names))
        for _ in range(2 if fault is cut else 1):
            fault(fleet)
            time.sleep(task_s / 5)
        assert [one.get(timeout=task_s + 10) for one in sent] == of_round
        check_ran_once(fleet, names)
        fleet.check_no_growth()
    fleet.wait_consuming()
    fleet.check_no_leftovers()


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

# SPDX-License-Identifier: MIT
"""Workers that are killed or frozen: what they held is back in time, and nothing runs twice without need."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from faults import FULL, Sender, cpu_s, kill_parent, kill_tree, rounds, when_full
from redis_fleet import Fleet, commands_of
from waiting import wait_until
from workers import WorkerProcess

from miniq.exceptions import WorkerLostError

#: What starting a process or a slow machine may add to a time that was promised.
SLACK_S = 2.0


@pytest.mark.parametrize(
    "kill, where",
    [
        (kill_tree, "here"),
        (kill_parent, "elsewhere"),
        pytest.param(kill_parent, "here", marks=when_full),
        pytest.param(kill_tree, "elsewhere", marks=when_full),
    ],
)
def test_messages_of_a_killed_worker_are_back_within_twice_the_lease(
    new_fleet: Callable[..., Fleet], kill: Callable[[WorkerProcess], None], where: str, tmp_path: Path
) -> None:
    lease_s = 5.0 if FULL else 1.0
    fleet = new_fleet()
    # On the same machine, files in the folder for temporary ones tell of its death.
    folder = tmp_path / "other_machine"
    folder.mkdir()
    env = {"TMPDIR": str(folder)} if where == "elsewhere" else {}
    for number in rounds():
        first = fleet.start_worker(env=env, lease_s=lease_s)
        late = fleet.send("hold", f"late-{number}", f"go{number}")
        early = fleet.send("early_hold", f"early-{number}", f"go{number}")
        fleet.wait_for_lines("began", 3 * number + 2)
        second = fleet.start_worker(lease_s=lease_s)
        with Sender(fleet) as sender:
            sender.wait_for_more(20)
        kill(first)
        fleet.wait_for_lines("began", 3 * number + 3, 2 * lease_s + SLACK_S)
        fleet.release(f"go{number}")
        assert late.get(timeout=10) == f"late-{number}"
        error = early.get(timeout=2 * lease_s, propagate=False)
        assert isinstance(error, WorkerLostError) and early.state == "FAILURE", error
        fleet.check_nothing_lost(sender.accepted)
        assert second.stop() == 0
    assert not [name for name in fleet.lines("ended") if name.startswith("early")]
    starts = [f"late-{n}" for n in range(number + 1)] * 2 + [f"early-{n}" for n in range(number + 1)]
    assert sorted(fleet.lines("began")) == sorted(starts)
    fleet.check_no_leftovers()


def freeze(worker: WorkerProcess, seconds: float, children: bool = True) -> None:
    tree = [worker.pid, *(worker.children if children else ())]
    for pid in tree:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in tree:
        os.kill(pid, signal.SIGCONT)


def owner_of(fleet: Fleet, result: Any) -> WorkerProcess:
    """Return the worker that has received a task."""
    (owner,) = [worker for worker in fleet.workers if f"[{result.id}] received" in worker.log]
    return owner


def test_long_task_runs_once_and_its_workers_idle_meanwhile(
    new_fleet: Callable[..., Fleet], tell: Callable[[str], None]
) -> None:
    task_s, lease_s = (60.0, 5.0) if FULL else (12.0, 2.0)
    fleet = new_fleet()
    for _ in range(2):
        fleet.start_worker(lease_s=lease_s)
    result = fleet.send("nap", "long", task_s)
    fleet.wait_for_lines("began", 1)
    used_s: Dict[int, float] = {worker.pid: cpu_s(worker.pid) for worker in fleet.workers}
    commands = commands_of(fleet.server)
    # For less than the lease, renewed when a third of it is over.
    freeze(owner_of(fleet, result), lease_s / 2)
    assert result.get(timeout=task_s + 10) == "long"
    assert fleet.lines("began") == fleet.lines("ended") == ["long"], fleet
    rate = (commands_of(fleet.server) - commands) / task_s
    shares = [(cpu_s(pid) - before_s) / task_s for pid, before_s in used_s.items()]
    tell(f"two workers, {task_s:g} s task, {lease_s:g} s lease: {rate:.1f} commands/s, CPU {shares}")
    assert max(shares) < 0.02
    fleet.check_no_leftovers()


@pytest.mark.parametrize("children", [False, pytest.param(True, marks=when_full)])
def test_worker_frozen_for_three_leases_drops_its_outcome(
    new_fleet: Callable[..., Fleet], children: bool
) -> None:
    lease_s = 5.0 if FULL else 1.0
    fleet = new_fleet()
    for _ in range(2):
        fleet.start_worker(lease_s=lease_s)
    for number in rounds():
        fleet.check_no_growth()
        result = fleet.send("hold", f"{number}", f"go{number}")
        fleet.wait_for_lines("began", 2 * number + 1)
        owner = owner_of(fleet, result)
        freeze(owner, 3 * lease_s, children)
        fleet.wait_for_lines("began", 2 * number + 2, 5.0)
        fleet.release(f"go{number}")
        assert result.get(timeout=15) == f"{number}"
        dropped = f"[{result.id}] was given to another worker meanwhile; its outcome here is dropped"
        wait_until(lambda: dropped in owner.log, 10.0, lambda: repr(fleet))  # noqa: B023
        fleet.wait_consuming()
    starts: List[str] = fleet.lines("began")
    assert len(starts) == 2 * number + 2 and fleet.lines("ended").count("0") == 2
    fleet.check_no_growth()
    fleet.check_no_leftovers()

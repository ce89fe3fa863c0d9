# SPDX-License-Identifier: MIT
"""Workers that are killed, once or by one task again and again, that are asked to leave; and two of them."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Callable, Dict, List

import pytest
from faults import FULL, Sender, kill_parent, kill_tree, rounds, when_full
from rabbit_fleet import Fleet
from waiting import wait_until
from workers import WorkerProcess

from miniq.exceptions import WorkerLostError


@pytest.mark.parametrize("kill", [kill_tree, pytest.param(kill_parent, marks=when_full)])
def test_late_tasks_of_a_killed_worker_soon_run_elsewhere_and_early_ones_once(
    new_fleet: Callable[..., Fleet], kill: Callable[[WorkerProcess], None], tell: Callable[[str], None]
) -> None:
    fleet = new_fleet()
    longest_s, doubles = 0.0, 0
    for number in rounds():
        first = fleet.start_worker()
        late = fleet.send("hold", f"late-{number}", f"go{number}")
        fleet.send("early_hold", f"early-{number}", f"go{number}")
        fleet.wait_for_lines("began", 3 * number + 2)
        second = fleet.start_worker()
        before = len(fleet.doubles())
        with Sender(fleet, retry=False) as sender:
            sender.wait_for_more(20)
            kill(first)
            killed_mono = time.monotonic()
            fleet.wait_for_lines("began", 3 * number + 3, 5.0)
            longest_s = max(longest_s, time.monotonic() - killed_mono)
        fleet.release(f"go{number}")
        assert late.get(timeout=10) == f"late-{number}"
        fleet.check_nothing_lost(sender.accepted)
        doubles += len(fleet.doubles()) - before
        assert second.stop() == 0
    assert not [name for name in fleet.lines("ended") if name.startswith("early")]
    starts = [f"late-{n}" for n in range(number + 1)] * 2 + [f"early-{n}" for n in range(number + 1)]
    assert sorted(fleet.lines("began")) == sorted(starts)
    fleet.check_no_leftovers()
    # Both slots of the one that was killed were taken, so no short task was cut off.
    assert not doubles, fleet
    tell(f"RabbitMQ, kill -9 of a worker: its late task ran elsewhere after {longest_s:.2f} s")


@pytest.mark.parametrize(
    "pool, limit", [("threads", 3), *(pytest.param("solo", limit, marks=when_full) for limit in (3, 5))]
)
def test_task_that_kills_its_worker_again_and_again_is_set_aside_and_others_flow(
    new_fleet: Callable[..., Fleet], pool: str, limit: int
) -> None:
    fleet = new_fleet(task_delivery_limit=limit)
    for number in rounds():
        name = f"deadly-{number}"
        starts_mono: List[float] = []
        worker = fleet.start_worker("-P", pool)
        # Others go on meanwhile; they may run twice, as they die with their worker.
        with Sender(fleet, pause_s=0.05, retry=False) as sender:
            sender.wait_for_more(3)
            result = fleet.send("die", name)
            while len(starts_mono) < limit:
                fleet.wait_for_lines("began", limit * number + len(starts_mono) + 1)
                starts_mono.append(time.monotonic())
                assert worker.wait() == -signal.SIGKILL, fleet
                worker = fleet.start_worker("-P", pool, wait=False)
            error = result.get(timeout=15, propagate=False)
            assert isinstance(error, WorkerLostError), error
            assert f"start {limit} of at most {limit}" in str(error)
            fleet.wait_consuming()
        fleet.check_nothing_lost(sender.accepted)
        assert fleet.lines("began") == [f"deadly-{n}" for n in range(number + 1) for _ in range(limit)], fleet
        pauses_s = [after - before for before, after in zip(starts_mono[1:], starts_mono[2:])]
        assert all(pause_s > 2.0**index for index, pause_s in enumerate(pauses_s)), pauses_s
        transport = fleet.client.producer.transport
        (letter,) = transport.dead_letters()
        assert letter.message.headers["id"] == result.id and letter.queue == "celery"
        assert transport.drop(letter.id)
        assert worker.stop() == 0
    fleet.check_no_leftovers()


def test_worker_that_is_asked_to_leave_keeps_its_connection_and_finishes(
    new_fleet: Callable[..., Fleet],
) -> None:
    task_s = 10.0 if FULL else 3.0
    fleet = new_fleet()
    names: List[str] = []
    for number in rounds():
        worker = fleet.start_worker(broker_transport_options={"heartbeat": 1})
        names += [f"late-{number}", f"early-{number}"]
        results = [fleet.send("nap", names[-2], task_s), fleet.send("early_nap", names[-1], task_s)]
        fleet.wait_for_lines("began", 2 * number + 2)
        worker.send(signal.SIGTERM)
        worker.wait_for("Shutdown (warm)")
        accepted = fleet.proxy.accepted
        # What is sent now is for others.
        later = fleet.send("note", fleet.next_number())
        assert [one.get(timeout=task_s + 10) for one in results] == names[-2:]
        assert worker.wait() == 0
        assert fleet.proxy.accepted == accepted, "it made no new connection"
        assert not later.ready()
        assert fleet.queues()["celery"]["messages"] == 1
        assert fleet.client.producer.transport.purge("celery") == 1
    assert sorted(fleet.lines("began")) == sorted(fleet.lines("ended")) == sorted(names), fleet
    fleet.check_no_leftovers()


def cut(fleet: Fleet) -> None:
    fleet.proxy.reset()


def kill(fleet: Fleet) -> None:
    fleet.server.kill()
    fleet.server.start()


def kill_worker(fleet: Fleet) -> None:
    """Kill the older one; another takes its place."""
    kill_tree(fleet.workers[-2])
    fleet.start_worker()


@pytest.mark.parametrize(
    "fault",
    [kill_worker, pytest.param(cut, marks=when_full), pytest.param(kill, marks=when_full)],
)
def test_two_workers_lose_nothing(
    new_fleet: Callable[..., Fleet],
    fault: Callable[[Fleet], None],
    tell: Callable[[str], None],
    tmp_path: Path,
) -> None:
    fleet = new_fleet()
    for _ in range(2):
        fleet.start_worker()
    results: Dict[str, str] = {}
    count = 0
    for number in rounds():
        long = [fleet.send("nap", f"{number}-{n}", 1.0) for n in range(2)]
        fleet.wait_for_lines("began", 2 * number + 2)
        with Sender(fleet, retry=False) as sender:
            sender.wait_for_more(30)
            fault(fleet)
            fleet.wait_consuming()
            sender.wait_for_more(10)
        fleet.check_nothing_lost(sender.accepted)
        count += len(sender.accepted)
        results.update((f"{number}-{n}", one.get(timeout=15)) for n, one in enumerate(long))
    assert all(name == found for name, found in results.items())
    wait_until(lambda: not fleet.queues()["celery"]["messages"], 10.0, lambda: f"an empty queue: {fleet}")
    fleet.check_no_leftovers()
    # A message whose channel is lost may go to the other worker: late-acked, at least once.
    doubles, long_doubles = fleet.doubles(), fleet.doubles("ended")
    assert len(doubles) <= 4 * (number + 1), fleet
    tell(
        f"RabbitMQ, two workers, {fault.__name__}: {len(doubles)} of {count} short tasks"
        f" and {len(long_doubles)} of {len(results)} long ones ran twice"
    )

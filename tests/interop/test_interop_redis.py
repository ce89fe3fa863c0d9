# SPDX-License-Identifier: MIT
"""What is of Redis alone: priorities in steps, and workers that take back what others hold."""

from __future__ import annotations

import json
import time
from typing import Dict, Iterator, Tuple

import pytest
from interop_fleet import LEASE, PAIRS, TIMEOUT_S, Backlog, Fleet, get, new_key, skip_without_celery
from waiting import wait_until

skip_without_celery()

#: Number of the database; that of its results is one higher.
DB = 2
#: Priorities as they are sent, and as they must be run: steps of three, the lowest first, each in turn.
SENT = [5, 0, 9, 3, 7, 1, 8, 2, 6, 4, None]
RUN = [0, 1, 2, None, 5, 3, 4, 7, 8, 6, 9]
#: A Celery worker so that everything is put back that was not acknowledged within a second.
SWEEPING = {"visibility_timeout": 1, "unacked_restore_interval": 0.2, "unacked_restore_throttle": 1}
LONG_S = 6.0


@pytest.fixture(scope="module")
def late(fleet: Fleet) -> Backlog:
    workers = {"celery": {"broker_transport_options": SWEEPING}, "miniq": LEASE}
    return Backlog(fleet, DB, SENT, {}, workers)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_priority_0_runs_first(late: Backlog, pair: Tuple[str, str]) -> None:
    assert late.lines(pair) == RUN


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pickle_is_refused_where_it_is_not_accepted(late: Backlog, pair: Tuple[str, str]) -> None:
    late.check_the_refused_one(pair)


@pytest.fixture(scope="module")
def long_tasks(late: Backlog) -> Iterator[Dict[str, str]]:
    """Start one task of six seconds in a worker of each kind beside a worker of the other that sweeps.

    The keys under which they note their starts, by kind.
    """
    fleet, keys = late.fleet, {"celery": new_key(), "miniq": new_key()}
    for name in ("celery", "miniq", "late_celery", "late_miniq"):
        fleet.workers[name].wait_ready()
    results = [
        # The miniq worker there takes back what was held longer than LEASE_S by one that is gone.
        fleet.side("miniq").call("work_late", keys["celery"], LONG_S, queue="to_celery"),
        fleet.side("celery", DB).call(
            "work_late", keys["miniq"], LONG_S, queue=late.queue("celery", "miniq")
        ),
    ]
    yield keys
    for result in results:
        assert get(result)


def test_a_celery_worker_that_sweeps_leaves_a_running_miniq_worker_its_message(
    late: Backlog, long_tasks: Dict[str, str]
) -> None:
    journal, key = late.fleet.journal, long_tasks["miniq"]
    wait_until(lambda: journal.of(key), TIMEOUT_S, "the task runs")
    started = journal.of(key)[0][2]
    sweeps = 0
    while time.time() < started + LONG_S:
        sweeps += 1
        sweep(late.fleet, sweeps)
    assert sweeps > 3
    wait_until(lambda: late.fleet.nothing_held(DB), TIMEOUT_S, "the message is acknowledged")
    assert [line[0] for line in journal.of(key)] == ["miniq"]
    assert late.fleet.server.command("EXISTS", late.queue("celery", "miniq"), db=DB) == 0


def sweep(fleet: Fleet, number: int) -> None:
    """Have the broker believe that a worker took a message long ago; wait until it is put back."""
    tag = f"stale-{number}"
    envelope = {
        "body": "", "content-type": "application/json", "headers": {},
        "properties": {"delivery_tag": tag, "delivery_info": {"exchange": "", "routing_key": "nobody"}},
    }  # fmt: skip
    commands = [
        ("HSET", "unacked", tag, json.dumps([envelope, "", "nobody"])),
        ("ZADD", "unacked_index", time.time() - 3600, tag),
    ]
    fleet.server.commands(commands, db=DB)
    wait_until(lambda: fleet.server.command("LLEN", "nobody", db=DB) == number, TIMEOUT_S, "it was put back")


def is_held(fleet: Fleet, key: str) -> bool:
    """Say whether a Celery worker has a message with this argument."""
    return any(key.encode() in envelope for envelope in fleet.server.command("HVALS", "unacked"))


def test_a_miniq_worker_leaves_a_running_celery_worker_its_message(
    fleet: Fleet, long_tasks: Dict[str, str]
) -> None:
    key = long_tasks["celery"]
    wait_until(lambda: fleet.journal.of(key), TIMEOUT_S, "the task runs")
    # Others may be held there: a revoked one, say, until it is due.
    wait_until(lambda: not is_held(fleet, key), TIMEOUT_S, "the message is acknowledged")
    assert [line[0] for line in fleet.journal.of(key)] == ["celery"]
    assert time.time() - fleet.journal.of(key)[0][2] >= LONG_S
    assert fleet.server.command("EXISTS", "to_celery") == 0


def test_what_a_killed_miniq_worker_held_is_run_by_a_celery_worker(late: Backlog) -> None:
    fleet, queue, key = late.fleet, "handed_on", new_key()
    victim = fleet.start("victim", "miniq", queue, "-P", "solo", space=DB, **LEASE).wait_ready()
    heir = fleet.workers["late_celery"].wait_ready()
    side = fleet.side("miniq", DB)
    result = side.call("hold_late", key, queue=queue)
    wait_until(lambda: fleet.journal.of(key), TIMEOUT_S, "the task runs")
    victim.kill()
    side.app.control.add_consumer(queue, destination=["late_celery@interop"])
    wait_until(lambda: len(fleet.journal.of(key)) == 2, TIMEOUT_S, lambda: f"it runs again in {heir}")
    fleet.journal.let_go(key)
    assert get(result) == key
    assert [line[0] for line in fleet.journal.of(key)] == ["miniq", "celery"]
    wait_until(lambda: fleet.nothing_held(DB), TIMEOUT_S, "the message is acknowledged")

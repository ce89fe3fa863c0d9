# SPDX-License-Identifier: MIT
"""The worker's connections break again and again, at any moment: each task runs once, each result arrives.

Where an answer is lost, the worker cannot know whether it has taken, started or settled a message; it
asks again, and is told.
"""

from __future__ import annotations

import random
import time
from typing import Callable

import pytest
from faults import FULL, Mixture, rounds, when_full
from redis_fleet import Fleet
from servers import ErrorReply


def reset(fleet: Fleet, rand: random.Random) -> None:
    fleet.proxy.reset()


def close(fleet: Fleet, rand: random.Random) -> None:
    fleet.proxy.close()


def kill_one(fleet: Fleet, rand: random.Random) -> None:
    """Have the server close one of the worker's connections."""
    ids = [one["id"] for one in fleet.server.clients() if one["name"] == "worker1@h"]
    if ids:
        try:
            fleet.server.command("CLIENT", "KILL", "ID", rand.choice(ids))
        except ErrorReply as error:
            assert "No such client" in str(error)


@pytest.mark.parametrize(
    "pool, how, delay_s",
    [
        # A delay makes it likely that it is the answer that gets lost.
        ("prefork", reset, 0.004),
        pytest.param("threads", reset, 0.004, marks=when_full),
        pytest.param("prefork", reset, 0.0, marks=when_full),
        pytest.param("prefork", close, 0.0, marks=when_full),
        pytest.param("prefork", kill_one, 0.0, marks=when_full),
        pytest.param("threads", kill_one, 0.0, marks=when_full),
    ],
)
def test_each_task_runs_once_and_its_result_arrives(
    new_fleet: Callable[..., Fleet], pool: str, how: Callable[..., None], delay_s: float
) -> None:
    fleet = new_fleet()
    fleet.start_worker("-P", pool)
    # Both slots work once: a pool of threads starts them when they are needed.
    results = [fleet.send("nap", f"first-{index}", 0.2) for index in range(2)]
    assert [one.get(timeout=15) for one in results] == ["first-0", "first-1"]
    fleet.proxy.delay(delay_s)
    for _ in rounds():
        fleet.check_no_growth()
        seed = random.randrange(10**6)
        rand = random.Random(seed)
        with Mixture(fleet, seed, 25 if delay_s else 150) as mixture:
            end_mono = time.monotonic() + (10.0 if FULL else 1.5)
            while time.monotonic() < end_mono:
                time.sleep(rand.choice([rand.uniform(0.0, 0.02), rand.uniform(0.0, 0.2)]))
                how(fleet, rand)
        for result in mixture.results:
            result.get(timeout=30)
        again = fleet.doubles("ended")
        assert not again, f"seed {seed}: {again}"
    fleet.check_no_growth()
    fleet.proxy.forward()
    fleet.check_no_leftovers()

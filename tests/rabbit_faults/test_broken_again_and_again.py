# SPDX-License-Identifier: MIT
"""The worker's connections break again and again, at any moment: each task runs once, each result arrives.

What is acknowledged may have arrived or not: the message comes again, and is known.  What is published
may be there though its confirm got lost, and is published again: a follow-up may run twice.
"""

from __future__ import annotations

import random
import time
from typing import Any, Callable, Dict

import pytest
from faults import FULL, Mixture, rounds, when_full
from rabbit_fleet import Fleet

from miniq.exceptions import MiniqError


def reset(fleet: Fleet, rand: random.Random) -> None:
    fleet.proxy.reset()


def close(fleet: Fleet, rand: random.Random) -> None:
    fleet.proxy.close()


QUORUM = {"task_default_queue_type": "quorum"}


@pytest.mark.parametrize(
    "pool, how, delay_s, settings",
    [
        # A delay makes it likely that it is the confirm that gets lost.
        ("prefork", reset, 0.004, {}),
        pytest.param("threads", reset, 0.004, {}, marks=when_full),
        pytest.param("prefork", reset, 0.0, {}, marks=when_full),
        pytest.param("prefork", close, 0.0, {}, marks=when_full),
        pytest.param("prefork", reset, 0.0, QUORUM, marks=when_full),
        pytest.param("solo", reset, 0.0, {}, marks=when_full),
    ],
)
def test_each_task_runs_once_and_its_result_arrives(
    new_fleet: Callable[..., Fleet],
    pool: str,
    how: Callable[..., None],
    delay_s: float,
    settings: Dict[str, Any],
    tell: Callable[[str], None],
) -> None:
    fleet = new_fleet(**settings)
    fleet.start_worker("-P", pool)
    # Both slots work once: a pool of threads starts them when they are needed.
    results = [fleet.send("nap", f"first-{index}", 0.2) for index in range(2)]
    assert [one.get(timeout=15) for one in results] == ["first-0", "first-1"]
    count = 0
    for _ in rounds():
        fleet.check_no_growth()
        fleet.proxy.delay(delay_s)
        seed = random.randrange(10**6)
        rand = random.Random(seed)
        with Mixture(fleet, seed, 25 if delay_s else 150) as mixture:
            end_mono = time.monotonic() + (10.0 if FULL else 1.5)
            while time.monotonic() < end_mono:
                time.sleep(rand.choice([rand.uniform(0.0, 0.02), rand.uniform(0.0, 0.2)]))
                how(fleet, rand)
        fleet.proxy.forward()
        for result in mixture.results:
            try:
                result.get(timeout=30)
            except MiniqError as error:
                raise AssertionError(f"seed {seed}: {result}: {error}: {fleet.queues()}: {fleet}") from error
        count += len(mixture.results)
        again = [name for name in fleet.doubles("ended") if not name.startswith("link")]
        assert not again, f"seed {seed}: {again}: {fleet}"
    fleet.check_no_growth()
    fleet.check_no_leftovers()
    doubles = len(fleet.doubles("ended"))
    tell(f"RabbitMQ, {pool}, {how.__name__} at any moment: {doubles} of {count} tasks (follow-ups) ran twice")

# SPDX-License-Identifier: MIT
"""The worker's connections break again and again, at any moment: each task runs once, each result arrives.

Where an answer is lost, the worker cannot know whether it has taken, started or settled a message; it
asks again, and is told.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from typing import Any, Callable, Dict, List, Optional

import pytest
from redis_fleet import FULL, Fleet, rounds, when_full
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


class Mixture:
    """A thread that sends tasks of all kinds for the time of a ``with``; all their results are kept."""

    def __init__(self, fleet: Fleet, seed: int, per_second: float) -> None:
        self.results: List[Any] = []
        self._fleet, self._rand, self._per_second = fleet, random.Random(seed), per_second
        self._crash: Optional[BaseException] = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Mixture:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._stop.set()
        self._thread.join()
        if self._crash is not None and error is None:
            raise self._crash

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._rand.expovariate(self._per_second)):
                self._send(self._fleet.next_number())
        except BaseException as error:
            self._crash = error
        finally:
            self._fleet.client.producer.close()

    def _send(self, number: int) -> None:
        fleet, rand = self._fleet, self._rand
        kind = rand.choice(["late", "early", "later", "linked"])
        seconds = rand.choice([0.0, 0.001, 0.02])
        options: Dict[str, Any] = {}
        if kind == "later":
            options["countdown"] = rand.uniform(0.0, 0.5)
        elif kind == "linked":
            task_id = str(uuid.uuid4())
            link = fleet.client.signature("proj.nap", (f"link-{number}", 0), immutable=True)
            options["link"] = link.set(task_id=task_id)
            self.results.append(fleet.client.AsyncResult(task_id))
        name = "early_nap" if kind == "early" else "nap"
        self.results.append(fleet.send(name, f"{kind}-{number}", seconds, **options))


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
        again = {name: count for name, count in Counter(fleet.lines("ended")).items() if count > 1}
        assert not again, f"seed {seed}: {again}"
    fleet.check_no_growth()
    fleet.proxy.forward()
    fleet.check_no_leftovers()

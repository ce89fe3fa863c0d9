# SPDX-License-Identifier: MIT
"""Threads: made when needed, abandoned when they do not end, and never hit outside a task's own code."""

from __future__ import annotations

import threading
import time
from typing import Any, Iterator

import pytest
from runners import Driver, value_of
from waiting import wait_until

from miniq.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from miniq.pools.threads import Abandoned, ThreadGuard
from miniq.runner import Outcome


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver("threads", 2)
    yield driver
    driver.stop(within_s=0)


def threads() -> int:
    return sum(thread.name.startswith("ThreadPoolWorker") for thread in threading.enumerate())


def test_threads_come_when_they_are_needed(driver: Driver) -> None:
    wait_until(lambda: threads() == 0)
    for _ in range(5):
        driver.call("add", 1, 2)
    assert threads() == 1
    for job in [driver.submit("nap", 0.1) for _ in range(2)]:
        driver.value(job)
    assert threads() == 2


def test_jobs_run_side_by_side(driver: Driver) -> None:
    names = {driver.value(job) for job in [driver.submit("sleep", 0.05), driver.submit("thread_name")]}
    assert "slept" in names and any(name.startswith("ThreadPoolWorker-") for name in names)


def test_abandoned_thread_is_counted_until_it_ends_and_its_outcome_dropped(driver: Driver) -> None:
    jobs = [driver.submit("sleep", 0.5, hard=0.05) for _ in range(2)]
    for job in jobs:
        assert isinstance(driver.error(job), TimeLimitExceeded)
    assert driver.pool.abandoned == 2
    assert driver.pool.info()["abandoned"] == 2
    others = [driver.submit("add", n, 1) for n in range(2)]
    assert [driver.value(job) for job in others] == [1, 2]
    driver.until(lambda: driver.pool.abandoned == 0)
    assert len(driver.came_back) == 4
    driver.stop()
    wait_until(lambda: threads() == 0)


def test_abandoned_task_that_swallows_exceptions_is_ended(driver: Driver) -> None:
    job = driver.submit("stubborn", 15, hard=0.1)
    assert isinstance(driver.error(job), TimeLimitExceeded)
    driver.until(lambda: driver.pool.abandoned == 0, "the end of a stubborn task", 10.0)


def test_soft_limit_waits_for_a_blocking_call_to_return(driver: Driver) -> None:
    result = driver.result(driver.submit("sleep", 0.3, soft=0.05))
    assert isinstance(result, Outcome)
    assert value_of(result) == "SoftTimeLimitExceeded(0.05)"
    assert driver.call("blocking_c", 0.0) == 0
    result = driver.result(driver.submit("blocking_c", 10, soft=0.05))
    assert value_of(result) == "SoftTimeLimitExceeded(0.05)"


def test_guard_lets_nothing_through_outside_the_tasks_own_code() -> None:
    for throw_before, throw_after in ((True, False), (False, True), (False, False)):
        guard = ThreadGuard(1.5)
        if throw_before:
            guard.throw(SoftTimeLimitExceeded)
            with pytest.raises(SoftTimeLimitExceeded) as caught, guard:
                raise AssertionError("not reached")
            assert caught.value.args == (1.5,)
            continue
        with guard:
            pass
        if throw_after:
            guard.throw(Abandoned)
        for _ in range(1000):
            pass  # an exception on its way would arrive here


def test_what_is_thrown_between_two_steps_waits_at_the_door_and_comes_once() -> None:
    guard = ThreadGuard(2.5)
    with guard:
        pass
    guard.throw(SoftTimeLimitExceeded)
    with pytest.raises(SoftTimeLimitExceeded), guard:
        raise AssertionError("not reached")
    with guard:
        total(50)
    with pytest.raises(SoftTimeLimitExceeded) as caught, guard:
        guard.throw(SoftTimeLimitExceeded)  # this thread's own: it arrives at once
        total(50)
    assert caught.value.args == (2.5,)
    with guard:
        total(50)


def test_guard_hammered_from_another_thread_only_ever_raises_inside() -> None:
    raised = {"inside": 0, "outside": 0, "without its limit": 0}
    guards: "list[ThreadGuard]" = []
    stop = threading.Event()

    def hammer() -> None:
        last = None
        while not stop.is_set():
            for guard in guards[-1:]:
                if guard is not last:  # one limit, one exception
                    guard.throw(SoftTimeLimitExceeded)
                    last = guard

    thread = threading.Thread(target=hammer)
    thread.start()
    try:
        end = time.monotonic() + 0.4
        while time.monotonic() < end:
            try:
                guard = ThreadGuard(0.5)
                guards.append(guard)
                try:
                    with guard:
                        total(50)
                except SoftTimeLimitExceeded as error:
                    raised["inside"] += 1
                    raised["without its limit"] += error.args != (0.5,)
                guards.clear()
                total(50)
            except SoftTimeLimitExceeded:
                raised["outside"] += 1
    finally:
        stop.set()
        thread.join()
    assert raised["inside"] > 0
    assert raised["outside"] == raised["without its limit"] == 0


def total(n: int) -> int:
    return sum(number for number in range(n))


def test_stop_at_the_deadline_leaves_threads_that_do_not_end(driver: Driver) -> None:
    job: Any = driver.submit("sleep", 0.4)
    began = time.monotonic()
    driver.stop(within_s=0.05)
    assert time.monotonic() - began < 0.4
    assert "given up" in str(driver.error(job))
    wait_until(lambda: threads() == 0)

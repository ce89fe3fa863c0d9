# SPDX-License-Identifier: MIT
"""Coroutines: many at once, limits that reach the ``await`` where they stand, loops that are blocked."""

from __future__ import annotations

import threading
import time
from typing import Iterator

import pytest
from runners import Driver, value_of
from waiting import wait_until

from miniq.exceptions import TimeLimitExceeded, WorkerLostError
from miniq.runner import Outcome


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver("asyncio", 100)
    yield driver
    driver.stop(within_s=0)
    wait_until(lambda: not any(thread.name.startswith("AsyncioPool") for thread in threading.enumerate()))


def test_many_coroutines_wait_at_the_same_time(driver: Driver) -> None:
    began = time.monotonic()
    jobs = [driver.submit("anap", 0.3) for _ in range(100)]
    assert driver.pool.free_slots == 0
    assert [driver.value(job) for job in jobs] == ["napped"] * 100
    assert time.monotonic() - began < 10  # 30 s one after the other


def test_soft_limit_reaches_a_task_that_waits_for_another(driver: Driver) -> None:
    assert driver.call("await_a_task", 0.01) == "inner"
    result = driver.result(driver.submit("await_a_task", 15, soft=0.05))
    assert isinstance(result, Outcome)
    assert value_of(result) == "SoftTimeLimitExceeded(0.05)"


def test_task_cancelled_by_itself_is_lost_and_the_pool_goes_on(driver: Driver) -> None:
    assert isinstance(driver.error(driver.submit("cancel_self")), WorkerLostError)
    assert driver.call("add", 1, 2) == 3


def test_soft_limit_counts_as_no_cancelling_afterwards(driver: Driver) -> None:
    assert driver.call("use_timeout_after_soft_limit", soft=0.05) == "timeout works"


def test_task_that_ignores_being_cancelled_is_counted_until_it_ends(driver: Driver) -> None:
    job = driver.submit("astubborn", 0.3, hard=0.1)
    assert isinstance(driver.error(job), TimeLimitExceeded)
    assert driver.pool.abandoned == 1
    assert driver.call("add", 1, 2) == 3
    driver.until(lambda: driver.pool.abandoned == 0)


def test_blocked_asyncio_loop_is_replaced(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    blocking = driver.submit("sleep", 1.4, hard=0.1)
    waiting = driver.submit("add", 5, 6)
    assert isinstance(driver.error(blocking), TimeLimitExceeded)
    driver.until(lambda: "a task blocks the asyncio loop" in caplog.text)
    assert driver.call("add", 1, 2) == 3
    assert driver.value(waiting) == 11
    driver.until(lambda: driver.pool.abandoned == 0)
    wait_until(lambda: driver.loop.run_once(0.01) or threading.active_count() == 2, what=threading.enumerate)


def test_tasks_left_in_the_background_are_cancelled_at_the_end(driver: Driver) -> None:
    assert driver.call("leave_a_task_behind") == "left"
    driver.stop()

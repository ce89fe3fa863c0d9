# SPDX-License-Identifier: MIT
"""Tasks in the main thread, the loop in another: here pytest's own main thread runs the tasks."""

from __future__ import annotations

import queue
import signal
import threading
import time
from typing import Any, Callable, Iterator, List, Tuple

import pytest
from runners import Driver, Spec, value_of
from waiting import wait_until

from miniq.exceptions import TimeLimitExceeded, WorkerLostError
from miniq.loop import Loop
from miniq.pools.base import Job, Lost, PoolOptions
from miniq.pools.solo import SoloPool
from miniq.runner import Outcome

pytestmark = pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals between threads")


class Solo:
    """A solo pool whose loop runs in a thread; `jobs` are submitted one after the other there."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.pool = SoloPool(PoolOptions(1), Spec())
        self.waiting: "queue.SimpleQueue[Job]" = queue.SimpleQueue()
        self.came_back: List[Tuple[Job, Any]] = []
        self.wanted = 0
        self.pool.start(self.loop, self.fill)
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def add(self, *args: Any, **limits: float) -> Job:
        job = Driver.job(self, *args, **limits)  # type: ignore[arg-type]
        self.waiting.put(job)
        self.wanted += 1
        return job

    def fill(self) -> None:
        while self.pool.free_slots and not self.waiting.empty():
            self.pool.submit(self.waiting.get())

    def _on_done(self, job: Job, result: Any) -> None:
        self.came_back.append((job, result))
        if len(self.came_back) == self.wanted:
            self.pool.stop(float("inf"), self.loop.stop)
        self.fill()

    def run(self) -> List[Any]:
        """Run all jobs in this thread; return their results."""
        self.pool.run_forever()
        self.thread.join(20)
        assert not self.thread.is_alive()
        return [result for _, result in self.came_back]


@pytest.fixture
def solo() -> Iterator[Solo]:
    solo = Solo()
    yield solo
    solo.loop.stop()
    solo.thread.join()
    solo.loop.close()


def test_tasks_run_in_the_main_thread_one_after_the_other(solo: Solo) -> None:
    for _ in range(3):
        solo.add("thread_name")
    assert [value_of(result) for result in solo.run()] == [threading.main_thread().name] * 3
    assert signal.getsignal(signal.SIGURG) == signal.SIG_DFL


@pytest.mark.parametrize("task", ["sleep", "nap", "spin", "blocking_c"])
def test_soft_limit_interrupts_whatever_the_task_does(solo: Solo, task: str) -> None:
    solo.add(task, 15, soft=0.05)
    solo.add("add", 1, 2)
    began = time.monotonic()
    failed, after = solo.run()
    assert time.monotonic() - began < 10
    assert isinstance(failed, Outcome)
    assert value_of(failed) == "SoftTimeLimitExceeded(0.05)"
    assert value_of(after) == 3


def test_soft_limit_can_be_caught_and_comes_once(solo: Solo) -> None:
    solo.add("clean_up", 15, soft=0.05)
    solo.add("nap", 0.1)
    assert [value_of(result) for result in solo.run()] == ["cleaned up", "napped"]


def test_hard_limit_reports_lost_and_ends_the_task(solo: Solo) -> None:
    solo.add("stubborn", 15, soft=0.05, hard=0.2)
    solo.add("add", 1, 2)
    began = time.monotonic()
    lost, after = solo.run()
    assert isinstance(lost, Lost)
    assert isinstance(lost.error, TimeLimitExceeded)
    assert value_of(after) == 3
    assert time.monotonic() - began < 10
    assert solo.pool.abandoned == 0


def test_last_instant_limits_leave_no_job_unsettled(solo: Solo) -> None:
    for n in range(100):
        solo.add("spin", 0.002, soft=0.0015 + n % 20 * 0.00005)
    solo.add("add", 1, 2)
    results = solo.run()
    assert len(results) == 101
    assert all(isinstance(result, Outcome) for result in results)
    assert value_of(results[-1]) == 3


def test_ctrl_c_leaves_run_forever_and_settles_the_job(solo: Solo) -> None:
    solo.add("sleep", 15)

    def press_ctrl_c() -> None:
        wait_until(lambda: not solo.pool.free_slots and solo.waiting.empty())
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    presser = threading.Thread(target=press_ctrl_c)
    presser.start()
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            solo.pool.run_forever()
    finally:
        signal.signal(signal.SIGINT, previous)
    presser.join()
    wait_until(lambda: solo.came_back)
    assert isinstance(solo.came_back[0][1].error, WorkerLostError)
    assert solo.pool.free_slots == 0


def test_stuck_task_leaves_the_slot_taken_until_it_ends() -> None:
    driver = Driver("solo", 1)
    assert isinstance(driver.error(driver.submit("sleep", 0.5, hard=0.05)), TimeLimitExceeded)
    assert (driver.pool.abandoned, driver.pool.free_slots) == (1, 0)
    freed = driver.freed
    driver.until(lambda: driver.pool.free_slots == 1)
    assert (driver.pool.abandoned, driver.freed) == (0, freed + 1)
    driver.stop()


def test_runner_that_cannot_be_built_raises_out_of_run_forever() -> None:
    class Broken:
        def build(self) -> Any:
            raise LookupError("no such module")

    loop = Loop()
    pool = SoloPool(PoolOptions(1), Broken())
    pool.start(loop, lambda: None)
    with pytest.raises(LookupError):
        pool.run_forever()
    loop.run_once(0)
    assert pool.free_slots == 0
    stopped: List[bool] = []
    done: Callable[[], None] = lambda: stopped.append(True)  # noqa: E731
    pool.stop(float("inf"), done)
    wait_until(lambda: loop.run_once(0.01) or stopped)
    loop.close()

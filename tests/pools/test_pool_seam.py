# SPDX-License-Identifier: MIT
"""What every pool promises, asked of all of them.  A capability that is off is a skip with a reason."""

from __future__ import annotations

import os
import threading
import time
from typing import Any, Callable, Iterator

import pytest
from runners import Driver, Spec, open_files, value_of
from waiting import wait_until

from miniq.exceptions import ImproperlyConfigured, TimeLimitExceeded, WorkerLostError
from miniq.loop import Loop
from miniq.message import Message
from miniq.pools.base import Lost, PoolOptions, pool_class
from miniq.runner import Outcome

POOLS = ["prefork", "threads", "solo", "asyncio"]

MakeDriver = Callable[..., Driver]


@pytest.fixture(params=POOLS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(name: str) -> Iterator[MakeDriver]:
    """Make drivers of the pool; they are stopped at the end, by force if need be."""
    drivers = []

    def make_driver(concurrency: int = 2, **options: Any) -> Driver:
        driver = Driver(name, concurrency, **options)
        drivers.append(driver)
        return driver

    yield make_driver
    for driver in drivers:
        driver.stop(within_s=0)


def test_job_done_returns_its_outcome_whole(make: MakeDriver) -> None:
    driver = make()
    job = driver.submit("add", "4", "2", headers={"followup": 1, "n": [1, None, {"a": 2.5}]})
    result = driver.result(job)
    assert isinstance(result, Outcome)
    assert (result.state, value_of(result), result.runtime_s) == ("SUCCESS", "42", 0.25)
    (followup,) = result.followups
    assert isinstance(followup.message, Message)
    assert (followup.message.body, followup.routing_key) == (job.run.body, "next")
    assert result.results[0].content_type == "application/x-pickle"


def test_failing_task_returns_its_outcome(make: MakeDriver) -> None:
    result = (driver := make()).result(driver.submit("fail", "no"))
    assert isinstance(result, Outcome)
    assert (result.state, value_of(result)) == ("FAILURE", "ValueError('no')")


def test_many_jobs_each_come_back_exactly_once(make: MakeDriver) -> None:
    driver = make()
    jobs = [driver.submit("add", n, 1) for n in range(300)]
    assert [driver.value(job) for job in jobs] == [n + 1 for n in range(300)]
    assert len(driver.came_back) == 300


def test_big_arguments_and_results_pass_while_the_loop_turns(make: MakeDriver) -> None:
    driver = make()
    size = 8 * 1024 * 1024
    jobs = [driver.submit("length", b"x" * size), driver.submit("make", size)]
    assert driver.value(jobs[0]) == size
    assert len(driver.value(jobs[1])) == size


def test_submit_without_a_free_slot_is_refused(make: MakeDriver) -> None:
    driver = make(1)
    job = driver.submit("nap", 0.05)
    assert driver.pool.free_slots == 0
    with pytest.raises(RuntimeError, match="free slot"):
        driver.pool.submit(driver.job("add", 1, 2))
    driver.value(job)
    assert driver.call("add", 1, 2) == 3


def test_start_is_reported_before_the_end(make: MakeDriver) -> None:
    driver = make()
    job = driver.submit("pid", wants_start=True)
    assert driver.value(job) == driver.started[0][1]
    assert [started for started, _ in driver.started] == [done for done, _ in driver.came_back] == [job]


def test_failing_callback_is_logged_and_the_pool_goes_on(
    make: MakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    driver = make()

    def on_done(job: Any, result: Any) -> None:
        seen.append(job)
        raise LookupError("from on_done")

    def on_start(job: Any, pid: int) -> None:
        raise LookupError("from on_start")

    seen: "list[Any]" = []
    job = driver.job("add", 1, 2)
    job.on_done, job.on_start, job.wants_start = on_done, on_start, True
    driver.until(lambda: driver.pool.free_slots)
    driver.pool.submit(job)
    driver.until(lambda: seen)
    assert driver.call("add", 1, 2) == 3
    assert seen == [job]
    assert "from on_done" in caplog.text and "from on_start" in caplog.text


def test_job_submitted_from_on_done_runs(make: MakeDriver) -> None:
    driver = make(1)
    second = driver.job("add", 3, 4)
    first = driver.job("add", 1, 2)

    def on_done(job: Any, result: Any) -> None:
        driver.came_back.append((job, result))
        driver.pool.submit(second)

    first.on_done = on_done
    driver.until(lambda: driver.pool.free_slots)
    driver.pool.submit(first)
    assert driver.value(second) == 7


def test_soft_limit_raises_inside_the_task(make: MakeDriver, name: str) -> None:
    driver = make()
    task = "aclean_up" if name == "asyncio" else "clean_up"
    began = time.monotonic()
    assert driver.call(task, 15, soft=0.05) == "cleaned up"
    assert time.monotonic() - began < 10
    result = driver.result(driver.submit("anap" if name == "asyncio" else "nap", 15, soft=0.05))
    assert isinstance(result, Outcome)
    assert (result.state, value_of(result)) == ("FAILURE", "SoftTimeLimitExceeded(0.05)")


def test_limits_of_a_job_that_is_quicker_never_show(make: MakeDriver, name: str) -> None:
    driver = make()
    jobs = [driver.submit("add", n, 1, soft=30, hard=60) for n in range(50)]
    assert [driver.value(job) for job in jobs] == [n + 1 for n in range(50)]


def test_limit_of_one_job_never_hits_the_next(make: MakeDriver) -> None:
    driver = make(1)
    for n in range(20):
        assert driver.call("add", n, 1, soft=0.25, hard=0.3) == n + 1
    assert driver.call("nap", 0.35) == "napped"


def test_hard_limit_reports_lost_and_the_next_task_runs(make: MakeDriver, name: str) -> None:
    driver = make()
    task = "anap" if name == "asyncio" else "nap"
    job = driver.submit(task, 15, hard=0.1)
    error = driver.error(job)
    assert isinstance(error, TimeLimitExceeded)
    assert error.args == (0.1,)
    result = driver.result(job)
    assert isinstance(result, Lost)
    assert 0.05 < result.runtime_s < 10
    driver.all_up(driver.pool.size)
    assert driver.call("add", 1, 2) == 3
    driver.until(lambda: driver.pool.abandoned == 0, "the abandoned task's end")


def test_task_that_swallows_the_soft_limit_meets_the_hard_one(make: MakeDriver, name: str) -> None:
    driver = make()
    task = "astubborn" if name == "asyncio" else "stubborn"
    error = driver.error(driver.submit(task, 0.5, soft=0.05, hard=0.2))
    assert isinstance(error, TimeLimitExceeded)
    driver.all_up(driver.pool.size)
    assert driver.call("add", 1, 2) == 3
    driver.until(lambda: driver.pool.abandoned == 0, "the abandoned task's end")


def test_soft_limits_in_the_last_instant_leave_no_job_unsettled(make: MakeDriver, name: str) -> None:
    driver = make(1)
    task = "anap" if name == "asyncio" else "spin"
    for n in range(40):
        # The limit falls around the end of the task: before, in and behind the guard.
        limit_s = 0.002 + (n % 30 - 15) * 0.0001
        result = driver.result(driver.submit(task, 0.002, soft=limit_s))
        assert isinstance(result, Outcome), result
        value = value_of(result)
        assert result.state == "SUCCESS" or value == f"SoftTimeLimitExceeded({limit_s})", (n, value)
    assert driver.call("add", 1, 2) == 3


def test_sys_exit_in_a_task_loses_the_job_and_no_slot(make: MakeDriver) -> None:
    driver = make()
    assert isinstance(driver.error(driver.submit("soft_exit", 3)), WorkerLostError)
    driver.all_up(driver.pool.size)
    assert driver.call("add", 1, 2) == 3


def test_terminate_stops_a_job_where_the_pool_can(make: MakeDriver, name: str) -> None:
    driver = make()
    job = driver.submit("anap" if name == "asyncio" else "nap", 15 if driver.pool.can_terminate else 0.1)
    if not driver.pool.can_terminate:
        assert driver.pool.terminate(job) is False
        assert driver.value(job) == "napped"
        pytest.skip(f"the {name} pool cannot terminate")
    assert driver.pool.terminate(job, "SIGTERM") is True
    error = driver.error(job)
    assert (type(error).__name__, error.args) == ("Terminated", (15,))
    assert driver.pool.terminate(job) is False
    with pytest.raises(ValueError, match="SIGNOTHING"):
        driver.pool.terminate(job, "SIGNOTHING")


def test_grow_and_shrink_change_the_number_of_slots(make: MakeDriver, name: str) -> None:
    driver = make(1)
    driver.all_up(1)
    driver.pool.grow(2)
    if name == "solo":
        assert driver.pool.size == 1
        pytest.skip("the solo pool has one slot")
    driver.all_up(3)
    running = [driver.submit("anap" if name == "asyncio" else "nap", 0.15) for _ in range(3)]
    assert driver.pool.free_slots == 0
    driver.pool.shrink(2)
    assert driver.pool.size == 1
    assert [driver.value(job) for job in running] == ["napped"] * 3
    driver.all_up(1)
    driver.pool.shrink(5)
    assert driver.pool.size == 1
    assert driver.call("add", 1, 2) == 3


def test_stop_lets_running_jobs_finish(make: MakeDriver) -> None:
    driver = make()
    job = driver.submit("nap", 0.1)
    driver.stop()
    assert [(done is job, value_of(result)) for done, result in driver.came_back] == [(True, "napped")]
    assert driver.pool.free_slots == 0


def test_stop_with_a_deadline_reports_what_still_runs_as_lost(make: MakeDriver, name: str) -> None:
    driver = make()
    job = driver.submit("astubborn" if name == "asyncio" else "stubborn", 0.5)
    began = time.monotonic()
    driver.stop(within_s=0.1)
    ((done, result),) = driver.came_back
    assert done is job
    assert isinstance(result, Lost)
    assert isinstance(result.error, WorkerLostError)
    assert time.monotonic() - began < 10


def test_stop_called_again_moves_the_deadline(make: MakeDriver, name: str) -> None:
    driver = make()
    job = driver.submit("astubborn" if name == "asyncio" else "stubborn", 0.5)
    driver.pool.stop(float("inf"), lambda: None)
    driver.stop(within_s=0.05)
    assert isinstance(driver.error(job), WorkerLostError)


def test_runner_is_prepared_before_the_first_job_and_says_good_bye(
    make: MakeDriver, name: str, tmp_path: Any
) -> None:
    log = tmp_path / "log"
    driver = make(1, spec=Spec(str(log)))
    pid = driver.call("pid")
    assert log.read_text() == f"{pid} init\n"
    driver.stop()
    # A shutdown includes the exit of the thread that it is in.
    said = {"threads": ["thread exit", "shutdown 0"], "solo": ["shutdown 0", "thread exit"]}
    assert log.read_text().splitlines() == [
        f"{pid} {text}" for text in ["init", *said.get(name, ["shutdown 0"])]
    ]


def test_cycles_of_start_and_stop_leave_nothing_behind(make: MakeDriver) -> None:
    def cycle() -> None:
        driver = make()
        assert driver.call("add", 1, 2) == 3
        driver.stop()

    cycle()
    files, threads = len(open_files()), threading.active_count()
    for _ in range(3):
        cycle()
    wait_until(lambda: threading.active_count() <= threads, what=threading.enumerate)
    assert len(open_files()) <= files, open_files()


def test_info_names_the_implementation(make: MakeDriver, name: str) -> None:
    driver = make()
    driver.all_up(driver.pool.size)
    info = driver.pool.info()
    assert info["implementation"].startswith("miniq.pools.")
    assert info["max-concurrency"] == driver.pool.size
    assert len(driver.pool.pids()) == (2 if name == "prefork" else 0)
    assert os.getpid() not in driver.pool.pids()


def test_unknown_pool_name_is_refused_with_a_hint() -> None:
    with pytest.raises(ImproperlyConfigured, match="did you mean prefork"):
        pool_class("prefrok")


def test_stop_before_anything_ran_ends_at_once(name: str) -> None:
    loop = Loop()
    pool = pool_class(name)(PoolOptions(2), Spec())
    pool.start(loop, lambda: None)
    stopped: "list[bool]" = []
    pool.stop(float("inf"), lambda: stopped.append(True))

    def turn() -> bool:
        loop.run_once(0.05)
        return bool(stopped)

    wait_until(turn)
    loop.close()

# SPDX-License-Identifier: MIT
"""Child processes: how they come, work, are hurt, and go.  Real processes and real signals."""

from __future__ import annotations

import logging
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
from runners import (
    BrokenSpec,
    Driver,
    DyingSpec,
    HangingSpec,
    Spec,
    open_files,
    process_exists,
    read_number,
    value_of,
)
from waiting import wait_until

from miniq.exceptions import ImproperlyConfigured, Terminated, TimeLimitExceeded, WorkerLostError
from miniq.pools.base import Lost, PoolOptions, pool_class
from miniq.pools.child import FrameReader, SoftLimit, pack
from miniq.pools.prefork import PreforkPool
from miniq.trace import Outcome

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="written for POSIX processes and signals")

METHODS = ["fork", "forkserver", "spawn"]
ROOT = Path(__file__).resolve().parents[2]

MakeDriver = Callable[..., Driver]


@pytest.fixture
def make() -> Iterator[MakeDriver]:
    drivers = []

    def make_driver(concurrency: int = 2, **options: Any) -> Driver:
        options.setdefault("start_method", "fork")
        driver = Driver("prefork", concurrency, **options)
        drivers.append(driver)
        return driver

    yield make_driver
    for driver in drivers:
        driver.stop(within_s=0)
    assert not zombies()


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def zombies() -> List[str]:
    """Return those of our children that have ended and were not collected."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    state, parent = file.read().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state == "Z" and int(parent) == os.getpid():
                found.append(name)
    return found


# -- every start method ------------------------------------------------------------------------


def test_children_work_under_every_start_method(make: MakeDriver, method: str) -> None:
    driver = make(start_method=method)
    driver.all_up(2)
    pid, name, daemon = driver.call("where")
    assert pid in driver.pool.pids()
    prefix = {"fork": "Fork", "forkserver": "ForkServer", "spawn": "Spawn"}[method]
    assert name.startswith(f"{prefix}PoolWorker-")
    assert daemon is False
    size = 8 * 1024 * 1024
    jobs = [driver.submit("length", b"x" * size), driver.submit("make", size)]
    assert (driver.value(jobs[0]), len(driver.value(jobs[1]))) == (size, size)
    assert driver.call("clean_up", 15, soft=0.05) == "cleaned up"
    lost = [driver.submit("kill_self", "SIGKILL"), driver.submit("stubborn", 15, soft=0.05, hard=0.2)]
    assert isinstance(driver.error(lost[0]), WorkerLostError)
    assert isinstance(driver.error(lost[1]), TimeLimitExceeded)
    driver.all_up(2)
    assert driver.call("add", 1, 2) == 3
    driver.stop()
    assert driver.pool.pids() == []


@pytest.mark.parametrize(
    ("task", "argument", "text"),
    [
        ("kill_self", "SIGKILL", "Worker exited prematurely: signal 9 (SIGKILL), not sent by this worker"),
        ("kill_self", "SIGSEGV", "Worker exited prematurely: signal 11 (SIGSEGV)"),
        ("hard_exit", 3, "Worker exited prematurely: exitcode 3"),
        ("hard_exit", 0, "Worker exited prematurely: exitcode 0"),
        ("soft_exit", 3, "Worker exited prematurely: exitcode 3"),
    ],
)
def test_death_in_a_task_is_lost_with_how_it_ended(
    make: MakeDriver, method: str, task: str, argument: Any, text: str
) -> None:
    if method != "fork" and (task, argument) != ("hard_exit", 3):
        pytest.skip("told by the system in the same way for all start methods")
    driver = make(1, start_method=method)
    driver.all_up(1)
    (pid,) = driver.pool.pids()
    result = driver.result(driver.submit(task, argument))
    assert isinstance(result, Lost)
    assert str(result.error).startswith(text)
    assert result.pid == pid
    driver.all_up(1)
    assert driver.call("pid") != pid


def test_peak_memory_of_a_killed_child_is_told(make: MakeDriver) -> None:
    driver = make(1, start_method="fork")
    driver.call("eat_memory", 120)
    text = str(driver.error(driver.submit("kill_self", "SIGKILL")))
    if "peak memory" not in text:
        pytest.skip("an earlier child of this process was larger")
    assert int(text.rpartition("process: ")[2].split()[0]) > 120 * 1024


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_script_that_defines_its_spec_in_main_works(method: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), method=method))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.returncode) == ("42", 0), done.stderr


SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/pools"]
from runners import Driver, TASKS, TestRunner

def answer():
    return 42

TASKS["answer"] = answer

class Spec:
    def build(self):
        return TestRunner(None)

if __name__ == "__main__":
    driver = Driver("prefork", 1, Spec(), start_method={method!r})
    print(driver.call("answer"))
    driver.stop()
"""


def test_start_that_cannot_work_raises(make: MakeDriver) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        make(1, spec=type("Local", (), {"build": lambda self: None})(), start_method="spawn")
    with pytest.raises(ImproperlyConfigured, match="'spoon'.*known: "):
        make(1, start_method="spoon")


def test_process_with_threads_spawns_instead_of_forking(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        with caplog.at_level(logging.INFO):
            driver = Driver("prefork", 1, start_method="fork")
        assert isinstance(driver.pool, PreforkPool)
        assert driver.pool.start_method == "spawn"
        assert "more than one thread" in caplog.text
        assert driver.call("where")[1].startswith("SpawnPoolWorker-")
    finally:
        release.set()
        thread.join()
    driver.stop(within_s=0)


# -- one job at a time, and slots ----------------------------------------------------------------


def test_short_jobs_never_wait_behind_a_long_one(make: MakeDriver) -> None:
    driver = make(2)
    long = driver.submit("nap", 15)
    for n in range(100):
        assert driver.call("add", n, 1) == n + 1
    assert [job is long for job, _ in driver.came_back].count(True) == 0
    assert driver.pool.terminate(long, "KILL")
    assert isinstance(driver.error(long), Terminated)


def test_recycled_children_are_new_and_never_more_run_than_wanted(make: MakeDriver) -> None:
    driver = make(2, max_tasks_per_child=1)
    driver.all_up(2)
    driver.call("add", 1, 2)
    files = len(open_files())
    jobs = []
    for _ in range(50):
        jobs.append(driver.submit("pid"))
        running = sum(job.slot.job is job for job in jobs[-4:])
        assert running <= 2
    pids = [driver.value(job) for job in jobs]
    assert len(set(pids)) == 50
    driver.until(lambda: len(driver.pool.pids()) == 2 and driver.pool.free_slots == 2)
    driver.until(lambda: not zombies())
    assert len(open_files()) <= files, open_files()
    assert not any(process_exists(pid) for pid in set(pids) - set(driver.pool.pids()))


def test_child_is_replaced_while_it_runs_its_last_job(make: MakeDriver) -> None:
    driver = make(1, max_tasks_per_child=2)
    driver.call("pid")
    last = driver.submit("nap", 0.3)
    driver.until(lambda: len(driver.pool.pids()) == 2, "the replacement")
    assert driver.pool.free_slots == 0
    assert driver.value(last) == "napped"
    driver.until(lambda: len(driver.pool.pids()) == 1)


def test_child_over_its_memory_limit_is_replaced(make: MakeDriver) -> None:
    ours_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    driver = make(1, max_memory_per_child_kib=ours_kib + 20 * 1024)
    pid = driver.call("pid")
    assert driver.call("pid") == pid
    assert driver.call("eat_memory", 60 + ours_kib // 1024) == 1
    driver.all_up(1)
    assert driver.call("pid") != pid


def test_limit_below_a_fresh_child_warns_once_and_does_not_thrash(
    make: MakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    driver = make(1, max_memory_per_child_kib=100)
    assert len({driver.call("pid") for _ in range(5)}) == 1
    assert caplog.text.count("fresh pool process already holds") == 1


def test_shrinking_takes_idle_children_first(make: MakeDriver) -> None:
    driver = make(3)
    driver.all_up(3)
    job = driver.submit("nap", 0.3)
    driver.pool.shrink(2)
    driver.until(lambda: len(driver.pool.pids()) == 1)
    assert driver.value(job) == "napped"
    assert driver.call("add", 1, 2) == 3


# -- hurt children -------------------------------------------------------------------------------


def test_job_sent_to_a_child_that_just_died_runs_in_another(make: MakeDriver) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells what a dead peer had not read")
    driver = make(2)
    driver.all_up(2)
    for _ in range(5):
        victims = driver.pool.pids()
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(process_exists, victims)))  # noqa: B023 - called at once
        jobs = [driver.job("add", n, 1) for n in range(2)]
        for job in jobs:
            driver.pool.submit(job)  # the loop has not turned: both still look idle
        assert [driver.value(job) for job in jobs] == [1, 2]
        driver.all_up(2)


def test_stopped_idle_child_is_found_out_and_its_job_runs_in_another(make: MakeDriver) -> None:
    driver = make(1, alive_timeout_s=0.5)
    driver.all_up(1)
    (pid,) = driver.pool.pids()
    os.kill(pid, signal.SIGSTOP)
    assert driver.call("pid") != pid
    assert not process_exists(pid)


def test_long_job_is_not_taken_for_one_that_was_not_accepted(make: MakeDriver) -> None:
    driver = make(1, alive_timeout_s=0.2)
    assert driver.call("nap", 0.8) == "napped"


def test_stopped_busy_child_is_killed_by_the_hard_limit(make: MakeDriver, tmp_path: Path) -> None:
    driver = make(1)
    job = driver.submit("write_pid_and_nap", str(tmp_path / "pid"), 15, hard=0.3)
    driver.until((tmp_path / "pid").exists)
    pid = read_number(str(tmp_path / "pid"))
    os.kill(pid, signal.SIGSTOP)
    assert isinstance(driver.error(job), TimeLimitExceeded)
    assert not process_exists(pid)


@pytest.mark.parametrize("task", ["close_all_descriptors", "write_garbage"])
def test_child_that_breaks_its_link_is_killed_and_replaced(make: MakeDriver, task: str) -> None:
    driver = make(1)
    pid = driver.call("pid")
    assert isinstance(driver.error(driver.submit(task)), WorkerLostError)
    assert not process_exists(pid)
    driver.all_up(1)
    assert driver.call("add", 1, 2) == 3


def test_signals_for_the_worker_leave_children_working(make: MakeDriver, tmp_path: Path) -> None:
    driver = make(1)
    job = driver.submit("write_pid_and_nap", str(tmp_path / "pid"), 0.3)
    driver.until((tmp_path / "pid").exists)
    pid = read_number(str(tmp_path / "pid"))
    assert os.getpgid(pid) == pid != os.getpgrp()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)
        os.killpg(pid, number)
    assert driver.value(job) == "napped"
    assert driver.call("pid") == pid


def test_random_kills_lose_only_what_ran_and_slots_come_back(make: MakeDriver) -> None:
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    driver = make(2, max_tasks_per_child=7, alive_timeout_s=0.4)
    jobs = []
    for _ in range(150):
        jobs.append(driver.submit("length", b"x" * chance.choice((10, 300_000)), hard=1.0))
        if chance.random() < 0.2:
            for pid in chance.sample(driver.pool.pids(), 1):
                number = chance.choice([signal.SIGKILL] * 5 + [signal.SIGTERM] * 5 + [signal.SIGSTOP])
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass
    results = [driver.result(job) for job in jobs]
    lost = [result for result in results if isinstance(result, Lost)]
    kinds = (WorkerLostError, TimeLimitExceeded)
    assert all(isinstance(result.error, kinds) for result in lost), f"seed {seed}"
    assert len(driver.came_back) == 150, f"seed {seed}"
    driver.until(lambda: driver.pool.free_slots == 2, f"both slots, seed {seed}")


# -- children that do not come up ----------------------------------------------------------------


def test_child_that_cannot_start_is_retried_less_and_less_and_says_why(
    make: MakeDriver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    driver = make(1, spec=BrokenSpec(str(tmp_path / "module")))
    pool = driver.pool
    assert isinstance(pool, PreforkPool)
    driver.until(lambda: caplog.text.count("the next start is in") >= 2)
    assert caplog.text.count("LookupError: no such module: shop.tasks") == 1
    assert "LookupError" in pool.start_error
    (tmp_path / "module").touch()
    assert driver.call("add", 1, 2) == 3
    assert "start again after" in caplog.text
    assert pool.start_error == ""


def test_children_that_die_at_once_are_no_fork_storm(
    make: MakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    driver = make(2, spec=DyingSpec())
    end = time.monotonic() + 0.4
    driver.until(lambda: time.monotonic() > end)
    assert 2 <= caplog.text.count("exited with 'exitcode 7'") <= 12


def test_child_that_does_not_come_up_in_time_is_killed(
    make: MakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    driver = make(1, spec=HangingSpec(), alive_timeout_s=0.2)
    (pid,) = driver.pool.pids()
    driver.until(lambda: pid not in driver.pool.pids())
    assert "is not up after 0.2 s" in caplog.text


# -- what a task may do --------------------------------------------------------------------------


def test_tasks_may_use_processes_of_their_own(make: MakeDriver) -> None:
    driver = make(1)
    assert driver.call("use_multiprocessing", 10) == 45
    assert driver.call("stop_program") == -signal.SIGTERM
    assert driver.call("add", 1, 2) == 3


@pytest.mark.parametrize("task", ["start_program", "start_process"])
def test_hard_limit_kills_what_the_task_started(make: MakeDriver, task: str, tmp_path: Path) -> None:
    driver = make(1)
    job = driver.submit(task, str(tmp_path / "pid"), hard=0.5)
    driver.until((tmp_path / "pid").exists)
    grandchild = read_number(str(tmp_path / "pid"))
    assert process_exists(grandchild)
    assert isinstance(driver.error(job), TimeLimitExceeded)
    wait_until(lambda: not process_exists(grandchild))
    driver.all_up(1)


def test_death_of_a_child_takes_what_it_started_along(make: MakeDriver, tmp_path: Path) -> None:
    driver = make(1)
    error = driver.error(driver.submit("start_program_and_die", str(tmp_path / "pid")))
    assert "exitcode 3" in str(error)
    grandchild = read_number(str(tmp_path / "pid"))
    wait_until(lambda: not process_exists(grandchild))


def test_child_holds_no_socket_of_its_siblings_nor_the_parents_ends(make: MakeDriver) -> None:
    driver = make(3)
    driver.all_up(3)
    jobs = [driver.submit("sockets") for _ in range(3)]
    ours = {link for link in open_files() if link.startswith("socket:")}
    theirs = [set(driver.value(job)) for job in jobs]
    assert sum(map(len, theirs)) == len(set.union(*theirs))
    # Of the end on which permits come the parent holds a duplicate, to take them back.
    assert [len(each & ours) for each in theirs] == [1, 1, 1]


# -- the end of the parent -----------------------------------------------------------------------

PARENT = """
import os, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/pools"]
from runners import Driver
from miniq.pools import child

if __name__ == "__main__":
    if {thread}:
        child._kernel_kills_group = lambda lifeline: False
    driver = Driver("prefork", 2, start_method={method!r})
    driver.all_up(2)
    for number, task in enumerate(("start_program", "start_process")):
        driver.submit(task, {path!r} + str(number))
    driver.until(lambda: os.path.exists({path!r} + "0") and os.path.exists({path!r} + "1"))
    {then}
"""


def run_parent(
    tmp_path: Path, method: str, then: str, thread: bool = False
) -> "tuple[subprocess.Popen[str], List[int]]":
    """Start a parent with two busy children; return it and the pids of all below it.

    With `thread` the children do as on a system whose kernel cannot kill them.
    """
    script = tmp_path / "parent.py"
    path = str(tmp_path / "grandchild")
    report = f"print(*driver.pool.pids(), flush=True); {then}"
    script.write_text(PARENT.format(root=str(ROOT), method=method, path=path, then=report, thread=thread))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(word) for word in parent.stdout.readline().split()]
    grandchildren = [read_number(path + "0"), read_number(path + "1")]
    assert len(children) == 2
    return parent, children + grandchildren


@pytest.mark.parametrize(
    ("method", "thread"), [("fork", False), ("fork", True), ("forkserver", False), ("spawn", False)]
)
def test_kill_9_of_the_parent_leaves_no_child_and_no_grandchild(
    method: str, thread: bool, tmp_path: Path
) -> None:
    parent, below = run_parent(tmp_path, method, "time.sleep(60)", thread)
    try:
        assert all(map(process_exists, below))
    finally:
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()
    wait_until(lambda: not any(map(process_exists, below)), 10.0, lambda: list(filter(process_exists, below)))


def test_fork_of_the_parent_does_not_keep_children_alive(tmp_path: Path) -> None:
    then = "helper = os.fork(); print(helper, flush=True) if helper else None; time.sleep(60)"
    parent, below = run_parent(tmp_path, "fork", then)
    assert parent.stdout is not None
    helper = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        wait_until(lambda: not any(map(process_exists, below)))
        assert process_exists(helper)
    finally:
        os.kill(helper, signal.SIGKILL)
        parent.stdout.close()


def test_leaving_without_stop_does_not_wait_for_children(tmp_path: Path) -> None:
    parent, below = run_parent(tmp_path, "fork", "sys.exit(5)")
    assert parent.wait(timeout=20) == 5
    assert parent.stdout is not None
    parent.stdout.close()
    wait_until(lambda: not any(map(process_exists, below)))


# -- the words between parent and child ----------------------------------------------------------


def test_frames_survive_being_cut_anywhere() -> None:
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    values = [(n, b"x" * chance.choice((0, 1, 5, 1000)), {"n": [n]}) for n in range(30)]
    stream = b"".join(map(pack, values))
    for cut in ("whole", "bytes", "random"):
        reader, found, position = FrameReader(), [], 0
        while position < len(stream):
            size = {"whole": len(stream), "bytes": 1, "random": chance.randint(1, 200)}[cut]
            found += reader.feed(stream[position : position + size])
            position += size
        assert found == values, f"seed {seed}, cut {cut}"


def test_soft_limit_raises_only_when_armed_and_due_and_only_once() -> None:
    guard = SoftLimit()
    guard.begin(1000.0)
    with guard:
        guard.on_signal()  # too early
    guard.begin(0.0)
    guard.on_signal()  # due, but the task's code has not begun
    with pytest.raises(Exception, match=r"\(0\.0,\)"), guard:
        raise AssertionError("not reached: it was due at the door")
    with guard:
        guard.on_signal()  # it was raised already


def test_soft_limits_at_the_very_end_never_lose_a_job(make: MakeDriver) -> None:
    driver = make(2)
    # The signal comes about 2 ms after the limit: before, at and after the task's end.
    jobs = [driver.submit("spin", 0.004, soft=0.001 + n % 20 * 0.0001) for n in range(150)]
    kinds = set()
    for job in jobs:
        result = driver.result(job)
        assert isinstance(result, Outcome), result
        kinds.add(result.state)
        assert result.state == "SUCCESS" or value_of(result).startswith("SoftTimeLimitExceeded(")
    assert kinds == {"SUCCESS", "FAILURE"}


def test_pool_options_reach_info(make: MakeDriver) -> None:
    driver = make(2, max_tasks_per_child=10)
    driver.all_up(2)
    driver.call("add", 1, 2)
    info = driver.pool.info()
    assert info["processes"] == driver.pool.pids()
    assert info["max-tasks-per-child"] == 10
    assert info["put-guarded-by-semaphore"] is False
    assert info["writes"]["total"] == 1
    assert pool_class("processes")(PoolOptions(1), Spec()).info()["processes"] == []

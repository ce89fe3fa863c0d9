# SPDX-License-Identifier: MIT
"""Jobs that are sent to a busy child ahead of their turn: who gets them, and who gets them back."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from runners import Driver

from miniq.connections.starts import PLACES, StartJournal
from miniq.exceptions import WorkerLostError
from miniq.pools.base import Job
from miniq.pools.prefork import AHEAD, PreforkPool
from miniq.runner import Outcome

pytestmark = pytest.mark.skipif(not PreforkPool.can_take_ahead, reason="nothing is taken ahead here")


class AheadDriver(Driver):
    """A pool with a journal, and what came back without having begun."""

    def __init__(self, folder: Path, concurrency: int = 2, **options: Any) -> None:
        self.handed_back: List[Job] = []
        self.journal = StartJournal(str(folder / "starts"), create=True)
        super().__init__("prefork", concurrency, **options)
        self.pool.use_journal(self.journal)
        self.all_up(concurrency)

    def with_token(self, name: str, *args: Any) -> Job:
        job = self.job(name, *args)
        job.on_back = self.handed_back.append
        job.token = self.journal.token()
        return job

    def now(self, name: str, *args: Any) -> Job:
        job = self.with_token(name, *args)
        self.pool.submit(job)
        return job

    def ahead(self, name: str, *args: Any) -> Job:
        job = self.with_token(name, *args)
        self.pool.submit_ahead([job])
        return job

    def settled(self, jobs: List[Job]) -> None:
        """Wait until each of `jobs` came back, one way and once."""
        done = [job for job, _ in self.came_back]
        self.until(lambda: len(self.came_back) + len(self.handed_back) >= len(jobs))
        done = [job for job, _ in self.came_back]
        assert sorted(map(id, done + self.handed_back)) == sorted(map(id, jobs))


@pytest.fixture(params=["fork", "spawn"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def drivers(tmp_path: Path) -> Iterator[Any]:
    made: List[AheadDriver] = []

    def make(concurrency: int = 2, **options: Any) -> AheadDriver:
        driver = AheadDriver(tmp_path, concurrency, **options)
        made.append(driver)
        return driver

    yield make
    for driver in made:
        driver.stop(within_s=0)
        driver.journal.close()


def test_jobs_ahead_run_in_order_and_are_noted_as_begun(drivers: Any, method: str) -> None:
    driver = drivers(1, start_method=method)
    jobs = [driver.now("add", 0, 0)] + [driver.ahead("add", n, n) for n in range(1, AHEAD)]
    driver.settled(jobs)
    # On a machine that is busy elsewhere some may have been taken back; the others kept their order.
    ran = [job for job in jobs if job not in driver.handed_back]
    assert [job for job, _ in driver.came_back] == ran
    assert [driver.value(job) for job in ran] == [2 * jobs.index(job) for job in ran]
    assert [driver.journal.has_begun(job.token) for job in jobs] == [job in ran for job in jobs]


def test_jobs_behind_a_long_one_come_back_while_it_runs_on(drivers: Any) -> None:
    driver = drivers(1)
    long = driver.now("sleep", 0.6)
    short = [driver.ahead("add", n, 1) for n in range(5)]
    driver.until(lambda: len(driver.handed_back) == 5, "all came back")
    assert driver.came_back == []
    assert not any(driver.journal.has_begun(job.token) for job in short)
    assert driver.value(long)
    # The child finds nothing left of them, and works on.
    assert driver.call("add", 2, 2) == 4
    assert len(driver.came_back) == 2


def test_job_ahead_without_a_busy_child_comes_back(drivers: Any) -> None:
    driver = drivers(1)
    job = driver.ahead("add", 1, 1)
    driver.until(lambda: driver.handed_back == [job])


def test_large_job_is_not_sent_ahead(drivers: Any) -> None:
    driver = drivers(1)
    first = driver.now("sleep", 0.1)
    big = driver.ahead("length", b"x" * 100_000)
    driver.until(lambda: driver.handed_back == [big])
    assert driver.value(first)


def test_killed_child_loses_the_running_job_alone(drivers: Any) -> None:
    driver = drivers(1)
    for _ in range(3):
        deadly = driver.now("kill_self", "SIGKILL")
        behind = [driver.ahead("add", n, 1) for n in range(3)]
        assert isinstance(driver.error(deadly), WorkerLostError)
        driver.until(lambda: len(driver.handed_back) == 3)
        assert driver.handed_back == behind
        driver.handed_back.clear()
        driver.all_up(1)


def test_stop_hands_back_what_has_not_begun(drivers: Any) -> None:
    driver = drivers(1)
    running = driver.now("sleep", 0.3)
    behind = [driver.ahead("add", n, 1) for n in range(3)]
    driver.stop(within_s=5)
    assert driver.handed_back == behind
    assert isinstance(driver.result(running), Outcome)


def test_whoever_reads_the_permit_has_the_job_whatever_the_moment(drivers: Any) -> None:
    """Kills, long jobs and short jobs at random: each job comes back once, begun or not."""
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    driver = drivers(2)
    jobs: List[Job] = []
    end = time.monotonic() + 3.0
    while time.monotonic() < end and len(jobs) < PLACES - 100:
        while driver.pool.free_slots:
            kind = chance.choice([("add", 1, 2)] * 8 + [("sleep", 0.03), ("kill_self", "SIGKILL")])
            jobs.append(driver.now(*kind))
        for _ in range(chance.randrange(6)):
            if driver.pool.ahead_slots:
                jobs.append(driver.ahead("add", 3, 4))
        pids = driver.pool.pids()
        if pids and chance.random() < 0.02:
            with suppress(ProcessLookupError):
                os.kill(chance.choice(pids), signal.SIGKILL)
        driver.loop.run_once(0.002)
    driver.until(lambda: len(driver.came_back) + len(driver.handed_back) >= len(jobs), f"seed {seed}")
    driver.settled(jobs)
    for job in driver.handed_back:
        assert not driver.journal.has_begun(job.token), f"seed {seed}: handed back, but it had begun"
    for job, result in driver.came_back:
        if isinstance(result, Outcome):
            assert driver.journal.has_begun(job.token), f"seed {seed}: ran without being noted"


# -- the journal ---------------------------------------------------------------------------------


def test_token_is_begun_only_once_it_was_marked(tmp_path: Path) -> None:
    journal = StartJournal(str(tmp_path / "starts"), create=True)
    other = StartJournal(journal.path)
    first, second = journal.token(), journal.token()
    assert first is not None and second is not None
    other.mark(first)
    assert journal.has_begun(first) and not journal.has_begun(second)
    journal.free(first)
    again = journal.token()
    assert again is not None and not journal.has_begun(again), "a place that is used again begins clean"
    other.close()
    journal.close()


def test_no_token_is_given_while_all_places_are_taken(tmp_path: Path) -> None:
    journal = StartJournal(str(tmp_path / "starts"), create=True)
    tokens = [journal.token() for _ in range(PLACES)]
    assert None not in tokens and len(set(tokens)) == PLACES
    assert journal.token() is None
    journal.free(tokens[7] or 0)
    assert journal.token() is not None
    journal.close()


def test_journal_of_another_boot_is_not_believed(tmp_path: Path) -> None:
    journal = StartJournal(str(tmp_path / "starts"), create=True)
    journal.close()
    with open(journal.path, "r+b") as file:
        file.write(b"another boot")
    with pytest.raises(ValueError, match="since this machine was started"):
        StartJournal(journal.path)

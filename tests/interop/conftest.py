# SPDX-License-Identifier: MIT
"""Real Celery beside miniq: one Redis server, a worker of each kind, callers of each kind.

Needs Celery, which nothing else here does: without it these tests are skipped.  With
MINIQ_TESTS_NEED_CELERY set, as in the tox environment ``interop``, that is an error.

Tests are written once, in the words that both have in common, and run for three pairs: Celery calls
miniq, miniq calls Celery, and Celery calls Celery, which shows that what is expected is so there.
"""

from __future__ import annotations

import os
from typing import Iterator

import pytest
from interop_fleet import LEASE_S, MISSING, PAIRS, Fleet, Pair

if MISSING and os.environ.get("MINIQ_TESTS_NEED_CELERY"):
    raise ImportError(f"these tests need celery[redis]; not installed: {', '.join(MISSING)}")

FLEET = pytest.StashKey[Fleet]()


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Fleet]:
    """The server with one worker of each kind, which share the queue ``both``."""
    fleet = Fleet(tmp_path_factory.mktemp("interop"))
    pytestconfig.stash[FLEET] = fleet
    with fleet.server:
        fleet.start("celery", "celery", "to_celery,both", "-c", "2")
        fleet.start("miniq", "miniq", "to_miniq,both", "-c", "2", broker_transport_options={"lease": LEASE_S})
        try:
            yield fleet
        finally:
            complaints = fleet.stop()
    assert not complaints, complaints


@pytest.fixture(params=PAIRS, ids=[f"{caller}-calls-{worker}" for caller, worker in PAIRS])
def pair(request: pytest.FixtureRequest, fleet: Fleet) -> Pair:
    """A caller and a worker that is ready; the other worker takes what `other_queue` names."""
    caller, worker = request.param
    other = "celery" if caller == worker or worker == "miniq" else "miniq"
    for kind in {worker, other}:
        fleet.workers[kind].wait_ready()
    return Pair(fleet, fleet.side(caller), worker, f"to_{worker}", other, f"to_{other}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: "pytest.CallInfo[None]") -> Iterator[None]:
    """Show of a failed test what the workers logged since it began."""
    outcome = yield
    fleet = item.config.stash.get(FLEET, None)
    for worker in fleet.workers.values() if fleet else ():
        log = worker.log
        report = outcome.get_result()  # type: ignore[attr-defined]
        if report.failed:
            report.sections.append((f"log of {worker!r}, exit code {worker.exitcode}", log[worker.seen :]))
        elif report.when == "teardown":
            worker.seen = len(log)

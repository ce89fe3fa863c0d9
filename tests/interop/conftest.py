# SPDX-License-Identifier: MIT
"""Real Celery beside miniq: one broker, a worker of each kind, callers of each kind.

Needs Celery, which nothing else here does: without it these tests are skipped.  With
MINIQ_TESTS_NEED_CELERY set, as in the tox environment ``interop``, that is an error.

Tests are written once, in the words that both have in common, and run for three pairs: Celery calls
miniq, miniq calls Celery, and Celery calls Celery, which shows that what is expected is so there.
They run over Redis; those with the mark ``over`` over the stores that it names (`STORES`).
"""

from __future__ import annotations

import os
from typing import Iterator

import pytest
from interop_fleet import LEASE, MISSING, PAIRS, AmqpFleet, Fleet, Pair, RedisFleet
from servers import RabbitServer, RedisServer

if MISSING and os.environ.get("MINIQ_TESTS_NEED_CELERY"):
    raise ImportError(f"these tests need celery[redis]; not installed: {', '.join(MISSING)}")

FLEET = pytest.StashKey[Fleet]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "over(*stores): run over these instead of Redis alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Have the fixture `fleet` be of each store that the test asks for."""
    if "fleet" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("over")
        metafunc.parametrize("fleet", mark.args if mark else ["redis"], indirect=True, scope="session")


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    server = RabbitServer(tmp_path_factory.mktemp("rabbit"))
    try:
        yield server.start()
    finally:
        server.kill()  # nothing is to be saved, which takes a second


@pytest.fixture(scope="session")
def fleet(
    request: pytest.FixtureRequest,
    redis: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Iterator[Fleet]:
    """A broker with one worker of each kind, which share the queue ``both``."""
    folder = tmp_path_factory.mktemp("interop") / request.param
    fleet: Fleet
    if request.param == "redis":
        fleet = RedisFleet(folder, redis)
    else:
        rabbit = request.getfixturevalue("rabbit")
        fleet = AmqpFleet(folder, rabbit, redis if request.param == "amqp+redis" else None)
    pytestconfig.stash[FLEET] = fleet
    for kind, more in (("celery", {}), ("miniq", LEASE if request.param == "redis" else {})):
        # That it looks for others, for a second, is shown over the other stores.
        args = ["--without-mingle"] if (kind, request.param) == ("celery", "amqp+rpc") else []
        queues = f"to_{kind},both,news_{kind}"
        fleet.start(kind, kind, queues, "-c", "2", *args, news=f"news_{kind}", **more)
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

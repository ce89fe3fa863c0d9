# SPDX-License-Identifier: MIT
"""Fixtures of the tests of faults; see `rabbit_fleet`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
from rabbit_fleet import Fleet
from servers import RabbitServer
from workers import WorkerProcess

from miniq import MiniQ
from miniq.connections import listener, redis, replies
from miniq.connections.amqp import Server


@pytest.fixture(autouse=True)
def no_connections_stay() -> Iterator[None]:
    """Close what the test process keeps open for its clients."""
    yield
    listener.close_all()
    replies.delete_all()
    Server.close_all()
    redis.Server.close_all()


@pytest.fixture(scope="session")
def server_for_faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """The server that these tests stop, kill and freeze."""
    server = RabbitServer(tmp_path_factory.mktemp("rabbit"))
    yield server
    if server.running:
        server.kill()


@pytest.fixture
def server(server_for_faults: RabbitServer) -> Iterator[RabbitServer]:
    """The same, well at the beginning of a test, whatever the last one has left."""
    server = server_for_faults
    mend(server)
    seen = len(server.log)
    yield server
    # Shown by pytest when the test failed.
    print(f"--- {server}:\n{server.log[seen:][-8000:]}")


def mend(server: RabbitServer) -> None:
    """Undo what a test that failed has left undone."""
    if not server.running:
        server.start()
    server.resume()
    if server.alarms():
        server.clear_memory_alarm()


@pytest.fixture
def new_fleet(
    tmp_path: Path,
    server: RabbitServer,
    redis_url: str,
    worker_process: Callable[..., WorkerProcess],
    make_app: Callable[..., MiniQ],
) -> Iterator[Callable[..., Fleet]]:
    """Make fleets: ``new_fleet(results="rpc://", **settings)``; results go to Redis unless given."""
    made: List[Fleet] = []

    def make(results: str = redis_url, **settings: Any) -> Fleet:
        number = 1_000_000 * len(made)
        made.append(Fleet(server, results, tmp_path, worker_process, make_app, number, **settings))
        return made[-1]

    yield make
    mend(server)
    for fleet in made:
        fleet.end()

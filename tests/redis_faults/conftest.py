# SPDX-License-Identifier: MIT
"""Fixtures of the tests of faults; see `redis_fleet`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
from redis_fleet import Fleet
from servers import RedisServer
from workers import WorkerProcess

from miniq import MiniQ
from miniq.connections import listener
from miniq.connections.redis import Server


@pytest.fixture(autouse=True)
def no_connections_stay() -> Iterator[None]:
    """Close what the test process keeps open for its clients."""
    yield
    listener.close_all()
    Server.close_all()


@pytest.fixture
def new_fleet(
    tmp_path: Path,
    new_redis: Callable[..., RedisServer],
    worker_process: Callable[..., WorkerProcess],
    make_app: Callable[..., MiniQ],
) -> Iterator[Callable[..., Fleet]]:
    """Make fleets: ``new_fleet(**options of RedisServer)``."""
    made: List[Fleet] = []

    def make(**options: Any) -> Fleet:
        made.append(Fleet(new_redis(**options), tmp_path, worker_process, make_app, 1_000_000 * len(made)))
        return made[-1]

    yield make
    for fleet in made:
        fleet.end()

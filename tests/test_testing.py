# SPDX-License-Identifier: MIT
"""A worker inside the test's own process: `miniq.testing.start_worker`."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Callable, List

import pytest

from miniq import MiniQ, signals
from miniq.exceptions import ImproperlyConfigured
from miniq.testing import start_worker


@pytest.fixture(params=["sqlite", "memory"])
def app(request: Any, make_app: Callable[..., MiniQ]) -> MiniQ:
    app = make_app() if request.param == "sqlite" else make_app(broker=f"memory://{request.node.name}")

    @app.task(name="add")
    def add(x: int, y: int) -> int:
        return x + y

    @app.task(name="double")
    async def double(x: int) -> int:
        return 2 * x

    return app


@pytest.mark.parametrize("pool", ["threads", "solo", "asyncio"])
def test_tasks_run_while_the_block_runs_and_it_ends_quickly(app: MiniQ, pool: str) -> None:
    began = time.monotonic()
    with start_worker(app, pool=pool) as worker:
        assert app.tasks["add"].delay(2, 3).get(timeout=10) == 5
        assert app.tasks["double"].delay(4).get(timeout=10) == 8
        assert worker.tasks.total["add"] == 1
    assert time.monotonic() - began < 1
    late = app.tasks["add"].delay(1, 1)
    assert late.state == "PENDING"


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_event_loops_of_async_tasks_are_closed_with_their_threads(app: MiniQ, pool: str) -> None:
    loops: List[Any] = []
    ended: List[str] = []

    async def background() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            ended.append("cancelled")

    @app.task(name="note")
    async def note() -> None:
        loops.append((asyncio.get_running_loop(), asyncio.ensure_future(background())))
        await asyncio.sleep(0)

    with start_worker(app, pool=pool):
        for _ in range(2):
            note.delay().get(timeout=10)
        assert loops[0][0] is loops[1][0]
        assert not loops[0][0].is_closed()
    assert loops[0][0].is_closed()
    assert ended == ["cancelled"] * 2


def test_arguments_and_signals_of_celerys_function_are_known(make_app: Callable[..., MiniQ]) -> None:
    app = make_app(broker="memory://known")
    seen: List[str] = []

    def starting(**given: Any) -> None:
        seen.append("starting")

    def started(worker: Any, consumer: Any, **given: Any) -> None:
        seen.append(f"started {worker.tasks is consumer}")

    def stopped(worker: Any, **given: Any) -> None:
        seen.append("stopped")

    signals.test_worker_starting.connect(starting)
    signals.test_worker_started.connect(started)
    signals.test_worker_stopped.connect(stopped)
    with start_worker(app, perform_ping_check=True, ping_task_timeout=1, loglevel="info", logfile=None):
        assert seen == ["starting", "started True"]
    assert seen[-1] == "stopped"


def test_what_prevents_the_start_is_raised(make_app: Callable[..., MiniQ], tmp_path: Any) -> None:
    with pytest.raises(ImproperlyConfigured, match="'thread'"), start_worker(make_app(), pool="thread"):
        pass
    nowhere = make_app(broker=f"sqlite:///{tmp_path}/no/folder.db")
    with pytest.raises(ImproperlyConfigured, match="does not exist"), start_worker(nowhere):
        pass
    with pytest.raises(TypeError, match="concurency"), start_worker(make_app(), concurency=2):
        pass

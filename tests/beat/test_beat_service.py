# SPDX-License-Identifier: MIT
"""Beat as a service: in a thread, inside a worker, with signals; it notices changes and ends when told."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Callable, List

import pytest
from waiting import wait_until
from workers import WorkerProcess

from miniq import MiniQ, signals
from miniq.beat import Beat, Scheduler
from miniq.connections import listener
from miniq.connections.amqp import Server as RabbitServer
from miniq.connections.redis import Server as RedisServer
from miniq.exceptions import ImproperlyConfigured
from miniq.testing import start_worker


def quick_app(url: str, **settings: Any) -> "tuple[MiniQ, List[int]]":
    """Return an app whose task notes its runs, and runs five times a second."""
    ran: List[int] = []
    app = MiniQ("proj", broker=url, **settings)

    @app.task(name="note")
    def note(number: int) -> None:
        ran.append(number)

    app.add_periodic_task(0.2, note.s(1), name="note")
    return app, ran


def test_beat_in_a_thread_sends_and_ends(sqlite_url: str) -> None:
    heard: List[Any] = []

    def on_init(sender: Any, **_: Any) -> None:
        heard.append(sender)

    signals.beat_init.connect(on_init)
    signals.beat_embedded_init.connect(on_init)
    app, ran = quick_app(sqlite_url)
    try:
        with app.Beat() as beat, start_worker(app):
            wait_until(lambda: len(ran) > 1, 10, "two runs")
        assert heard == [beat] and beat.failure is None
    finally:
        signals.beat_init.disconnect(on_init)
        signals.beat_embedded_init.disconnect(on_init)
        app.close()


def test_beat_that_has_ended_does_not_run_again(sqlite_url: str) -> None:
    app, _ = quick_app(sqlite_url)
    beat = app.Beat()
    beat.stop()
    beat.run()
    with pytest.raises(RuntimeError, match="make a new one"):
        beat.run()
    with pytest.raises(ImproperlyConfigured, match="max_interval"):
        app.Beat(max_interval=-1)
    app.close()


def test_beat_in_a_worker_sends_over_memory_and_ends_with_it(sqlite_url: str) -> None:
    heard: List[Any] = []

    def on_init(sender: Any, **_: Any) -> None:
        heard.append(sender)

    signals.beat_embedded_init.connect(on_init)
    app, ran = quick_app("memory://beat-in-worker")
    try:
        with start_worker(app, beat=True) as worker:
            wait_until(lambda: len(ran) > 1, 10, "two runs")
            assert heard == [worker.beat]
        assert not [thread for thread in threading.enumerate() if thread.name == "miniq-beat"]
    finally:
        signals.beat_embedded_init.disconnect(on_init)
        app.close()


def test_beats_over_rabbitmq_share_the_store_of_results(rabbit_url: str, redis_url: str) -> None:
    app, ran = quick_app(rabbit_url, backend=redis_url)
    other, _ = quick_app(rabbit_url, backend=redis_url)
    with app.Beat() as beat, other.Beat(), start_worker(app):
        wait_until(lambda: len(ran) > 4, 20, "five runs")
        assert not beat.scheduler.is_atomic and beat.scheduler.info == redis_url
    with app.schedules as schedules:
        state = schedules.records()["note"]
        # All is well, so nothing was sent twice: there is a run for each tick.
        assert state.claim is None and len(ran) <= state.runs
    app.close()
    other.close()
    listener.close_all()
    RedisServer.close_all()
    RabbitServer.close_all()


def test_worker_whose_beat_makes_no_sense_does_not_start(sqlite_url: str) -> None:
    app = MiniQ("proj", broker=sqlite_url, beat_schedule={"entry": {"task": "t"}})
    with pytest.raises(ImproperlyConfigured, match="'entry' needs both"):
        app.worker(beat=True)
    app.close()


def test_worker_whose_beat_ends_leaves_with_code_1(sqlite_url: str) -> None:
    class Broken(Scheduler):
        def tick(self) -> float:
            raise ZeroDivisionError("a scheduler of the user's")

    app = MiniQ("proj", broker=sqlite_url)
    worker = app.worker(beat={"scheduler": Broken}, pool="threads", concurrency=1)
    assert worker.run() == 1
    assert isinstance(worker.beat.failure, ZeroDivisionError)
    app.close()


def test_sleeping_beat_notices_what_others_change(sqlite_url: str) -> None:
    app = MiniQ("proj", broker=sqlite_url, beat_schedule={"far": {"task": "t", "schedule": 9000}})
    with Beat(app) as beat:
        schedules = app.schedules
        wait_until(lambda: "far" in schedules.records(), 10, "beat has begun")
        schedules.save(name="near", task="t", schedule=0.1)
        wait_until(lambda: schedules.records()["near"].runs > 0, 10, "the new entry is sent")
        assert set(beat.scheduler.schedule) == {"far", "near"}
    schedules.close()
    app.close()


def test_sleeping_beat_notices_that_the_clock_was_set(sqlite_url: str) -> None:
    ahead = [0.0]
    app = MiniQ(
        "proj", broker=sqlite_url, wall=lambda: time.time() + ahead[0],
        beat_schedule={"far": {"task": "t", "schedule": 9000}, "near": {"task": "t", "schedule": 0.2}},
    )  # fmt: skip
    with Beat(app):
        schedules = app.schedules
        wait_until(lambda: "far" in schedules.records(), 10, "beat has begun")
        ahead[0] = 9001.0
        wait_until(lambda: schedules.records()["far"].runs == 1, 10, "the tick is sent")
        wait_until(lambda: schedules.records()["near"].last_due > app.wall() - 5, 20, "it has caught up")
        ahead[0] -= 50.0
        runs = schedules.records()["near"].runs
        wait_until(lambda: schedules.records()["near"].runs > runs + 1, 20, "an interval begins anew")
    schedules.close()
    app.close()


@pytest.mark.parametrize("broker", ["sqlite", "redis"])
def test_beats_answer_pings_and_nothing_else_where_that_is_asked_for(
    broker: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(f"{broker}_url")
    app = MiniQ("proj", broker=url, beat_enable_remote_control=True)
    silent = MiniQ("proj", broker=url)
    with Beat(app, hostname="beat@a"), Beat(app, hostname="beat@a"), Beat(silent, hostname="beat@silent"):
        answers = [{"beat@a": {"ok": "pong"}}] * 2
        wait_until(lambda: app.control.ping(timeout=0.5) == answers, 20, "two answers")
        assert app.control.inspect(timeout=0.3).stats() is None
    app.close()
    RedisServer.close_all()


def test_beat_answers_the_first_ping_after_its_server_was_restarted(new_redis: Callable[..., Any]) -> None:
    server = new_redis()
    app = MiniQ("proj", broker=server.url(), beat_enable_remote_control=True)
    answer = [{"beat@a": {"ok": "pong"}}]
    with Beat(app, hostname="beat@a"):
        wait_until(lambda: app.control.ping(timeout=0.5, limit=1) == answer, 20, "an answer")
        server.stop()
        server.start()
        wait_until(lambda: server.command("PUBSUB", "NUMPAT") == 1, 20, "beat listens again")
        assert app.control.ping(timeout=10, limit=1) == answer
    app.close()
    RedisServer.close_all()


def test_idle_beat_does_next_to_nothing(sqlite_url: str) -> None:
    app = MiniQ("proj", broker=sqlite_url, beat_schedule={"far": {"task": "t", "schedule": 9000}})
    beat = Beat(app)
    beat.scheduler.tick()
    beat.scheduler.tick()
    turns = beat.loop.turns
    timer = threading.Timer(1.5, beat.stop)
    timer.start()
    begun_mono = time.monotonic()
    beat.run()
    timer.join()
    # One a second, and those of the beginning and the end.
    assert beat.loop.turns - turns <= 3 + (time.monotonic() - begun_mono)
    app.close()


def test_worker_process_with_beat_replaces_its_children(
    worker_process: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    source = """
        import os
        from miniq import MiniQ

        app = MiniQ("proj", beat_schedule={"note": {"task": "proj.note", "schedule": 0.1}})

        @app.task(name="proj.note")
        def note():
            with open("pids", "a") as file:
                file.write(f"{os.getpid()}\\n")
    """
    worker = worker_process(source, "-B", "-c", "1", "--max-tasks-per-child", "1")

    def pids() -> List[str]:
        path = tmp_path / "pids"
        return path.read_text().split() if path.exists() else []

    wait_until(lambda: len(set(pids())) >= 3, 20, "three children had a run")
    assert worker.stop() == 0
    assert "beat: Shutting down" in worker.log and "spawned from now on" in worker.log
    assert len(set(pids())) == len(pids())

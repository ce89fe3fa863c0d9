# SPDX-License-Identifier: MIT
"""What a worker tells: of itself, and of each of its tasks from its arrival to its end."""

from __future__ import annotations

import json
import os
import time
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from waiting import wait_until

from miniq import MiniQ, __version__
from miniq.event import event_queue
from miniq.exceptions import ImproperlyConfigured, OperationalError, Reject
from miniq.loop import Loop
from miniq.mailbox import Inbox
from miniq.transports.base import Publication
from miniq.worker.events import LONGEST_PAUSE_S, WorkerEvents

WORKER_FIELDS = [
    "hostname", "utcoffset", "pid", "clock", "freq", "active", "processed", "loadavg", "sw_ident", "sw_ver",
    "sw_sys", "timestamp", "type",
]  # fmt: skip


class Ears:
    """Hears all events of a broker, from the moment it is made."""

    def __init__(self, app: MiniQ) -> None:
        self._inbox = Inbox(app, event_queue(app))
        #: (routing key is not told) events in their order.
        self.heard: List[Dict[str, Any]] = []
        self.messages: List[Any] = []

    def listen(self) -> List[Dict[str, Any]]:
        while True:
            message = self._inbox.receive(0.0)
            if message is None:
                return self.heard
            body = json.loads(message.body)
            self.messages.append(body)
            self.heard += body if isinstance(body, list) else [body]

    def of_task(self, uuid: str, last: str) -> List[Dict[str, Any]]:
        """Wait until a task has an event of the type `last`; return all of its events."""

        def found() -> List[Dict[str, Any]]:
            events = [one for one in self.listen() if one.get("uuid") == uuid]
            return events if any(one["type"] == f"task-{last}" for one in events) else []

        return wait_until(found, 20.0, lambda: f"task-{last} among {self.heard}")

    def wait_for(self, kind: str, count: int = 1) -> List[Dict[str, Any]]:
        def found() -> List[Dict[str, Any]]:
            events = [one for one in self.listen() if one["type"] == kind]
            return events if len(events) >= count else []

        return wait_until(found, 20.0, lambda: f"{kind} among {self.heard}")

    def close(self) -> None:
        self._inbox.close()


@pytest.fixture
def app(make_app: Callable[..., MiniQ]) -> MiniQ:
    app = make_app("proj")

    def task(**options: Any) -> Callable[[Any], Any]:
        return lambda fun: app.task(name=f"proj.{fun.__name__}", **options)(fun)

    @task()
    def add(x: int, y: int) -> int:
        return x + y

    @task()
    def fail() -> None:
        raise ValueError("no")

    @task(bind=True)
    def again(self: Any) -> str:
        if not self.request.retries:
            raise self.retry(exc=KeyError("later"), countdown=0)
        return "x" * 2000

    @task(acks_late=True, bind=True)
    def requeued(self: Any) -> None:
        if not self.request.delivery_info["redelivered"]:
            raise Reject("not here", requeue=True)

    @task(send_events=False)
    def quiet() -> None: ...

    @task(bind=True)
    def talks(self: Any) -> None:
        self.send_event("task-progress", percent=50)

    @task(acks_late=True)
    def unreadable() -> Any:
        return object()

    return app


@pytest.fixture
def ears(app: MiniQ) -> Iterator[Ears]:
    ears = Ears(app)
    yield ears
    ears.close()


def types(events: List[Dict[str, Any]]) -> List[str]:
    return [one["type"].partition("-")[2] for one in events]


def test_every_end_of_a_task_is_told_with_celerys_fields(app: MiniQ, ears: Ears) -> None:
    task = app.tasks
    with app.worker(hostname="w1@h", concurrency=1, task_events=True):
        received, started, succeeded = ears.of_task(task["proj.add"].delay(2, 3).id, "succeeded")
        assert types([received, started, succeeded]) == ["received", "started", "succeeded"]
        common = ["hostname", "utcoffset", "pid", "clock", "uuid"]
        assert list(received) == [
            *common, "name", "args", "kwargs", "root_id", "parent_id", "retries", "eta", "expires",
            "timestamp", "type",
        ]  # fmt: skip
        assert (received["name"], received["args"], received["kwargs"]) == ("proj.add", "(2, 3)", "{}")
        assert (received["root_id"], received["hostname"]) == (received["uuid"], "w1@h")
        assert list(started) == [*common, "timestamp", "type"]
        assert list(succeeded) == [*common, "result", "runtime", "timestamp", "type"]
        assert succeeded["result"] == "5" and 0 <= succeeded["runtime"] < 10
        assert received["clock"] < started["clock"] < succeeded["clock"]

        events = ears.of_task(task["proj.fail"].delay().id, "failed")
        assert types(events) == ["received", "started", "failed"]
        assert list(events[-1]) == [*common, "exception", "traceback", "timestamp", "type"]
        assert events[-1]["exception"] == "ValueError('no')"
        assert 'raise ValueError("no")' in events[-1]["traceback"]

        events = ears.of_task(task["proj.again"].delay().id, "succeeded")
        assert types(events) == ["received", "started", "retried", "received", "started", "succeeded"]
        assert events[2]["exception"] == "KeyError('later')" and "Retry" in events[2]["traceback"]
        assert events[3]["retries"] == 1
        assert len(events[-1]["result"]) == 1024

        events = ears.of_task(task["proj.requeued"].delay().id, "succeeded")
        assert types(events) == ["received", "started", "rejected", "received", "started", "succeeded"]
        assert events[2]["requeue"] is True

        events = ears.of_task(task["proj.unreadable"].delay().id, "failed")
        assert types(events) == ["received", "started", "failed"]
        assert events[-1]["exception"].startswith("EncodeError(")

        result = task["proj.talks"].delay()
        assert set(types(ears.of_task(result.id, "progress"))) >= {"progress"}
        (progress,) = ears.wait_for("task-progress")
        assert (progress["hostname"], progress["percent"]) == ("w1@h", 50)

        events = ears.of_task(app.send_task("proj.nobody_knows").id, "failed")
        assert types(events) == ["failed"] and "traceback" not in events[0]
        assert events[0]["exception"].startswith("NotRegistered(")

        events = ears.of_task(task["proj.add"].apply_async((1, 1), expires=0.000001).id, "revoked")
        assert types(events) == ["revoked"]
        assert list(events[0]) == [*common, "terminated", "signum", "expired", "timestamp", "type"]
        assert [events[0][name] for name in ("terminated", "signum", "expired")] == [False, None, True]

        task["proj.quiet"].delay().get(timeout=20)
        ears.of_task(task["proj.add"].delay(1, 1).id, "succeeded")
    assert "proj.quiet" not in {one.get("name") for one in ears.heard}
    arrays = [body for body in ears.messages if isinstance(body, list)]
    assert all(one["type"].startswith("task-") for body in arrays for one in body)
    assert any(len(body) >= 3 for body in arrays), "what belongs together goes together"


def test_a_worker_tells_that_it_comes_lives_and_goes(app: MiniQ, ears: Ears) -> None:
    with app.worker(hostname="w1@h", concurrency=1, heartbeat_interval=0.05):
        app.tasks["proj.add"].delay(1, 1).get(timeout=20)
        beat = ears.wait_for("worker-heartbeat", 3)[-1]
    (offline,) = ears.wait_for("worker-offline")
    assert {one["type"] for one in ears.heard} == {"worker-online", "worker-heartbeat", "worker-offline"}
    assert (ears.heard[0]["type"], ears.heard[-1]) == ("worker-online", offline)
    for one in (ears.heard[0], beat, offline):
        assert list(one) == WORKER_FIELDS
    assert (offline["processed"], offline["active"], offline["freq"]) == (1, 0, 0.05)
    assert (offline["sw_ident"], offline["sw_ver"], offline["pid"]) == ("miniq", __version__, os.getpid())
    assert len(offline["loadavg"]) == 3


def test_without_heartbeats_and_events_nothing_is_told(app: MiniQ, ears: Ears) -> None:
    with app.worker(concurrency=1, without_heartbeat=True) as worker:
        app.tasks["proj.add"].delay(1, 1).get(timeout=20)
        worker.events.heartbeat()
    assert ears.listen() == []


def test_events_are_turned_on_and_off_while_the_worker_runs(app: MiniQ, ears: Ears) -> None:
    app.conf.worker_send_task_events = True
    add = app.tasks["proj.add"]
    with app.worker(concurrency=1, without_heartbeat=True) as worker:

        def do(what: Callable[[], Any]) -> Any:
            """Call it in the worker's own thread."""
            told: List[Any] = []
            worker.loop.call_threadsafe(lambda: told.append(what()))
            return wait_until(lambda: told)[0]

        assert worker.events.enabled
        ears.of_task(add.delay(1, 1).id, "succeeded")
        assert (do(worker.events.disable), do(worker.events.disable)) == (True, False)
        silent = add.delay(1, 1)
        silent.get(timeout=20)
        assert (do(worker.events.enable), do(worker.events.enable)) == (True, False)
        ears.of_task(add.delay(1, 1).id, "succeeded")
    assert not [one for one in ears.heard if one.get("uuid") == silent.id]


def test_what_a_run_sends_is_told_when_it_is_settled(app: MiniQ, ears: Ears) -> None:
    app.conf.task_send_sent_event = True
    add = app.tasks["proj.add"]
    with app.worker(concurrency=1, without_heartbeat=True):
        assert (add.s(1, 1) | add.s(10)).delay().get(timeout=20) == 12
        first, second = ears.wait_for("task-sent", 2)
    assert (first["args"], second["args"]) == ("(1, 1)", "(2, 10)")
    assert (second["parent_id"], second["root_id"]) == (first["uuid"], first["uuid"])


PREFORK = """
    import os, time
    from miniq import MiniQ
    app = MiniQ("proj", broker={url!r}, backend={url!r})

    @app.task
    def quick(n):
        if n == 150:
            time.sleep(0.5)  # what waits behind it is taken back
        return n

    @app.task
    def slow(seconds):
        time.sleep(seconds)

    @app.task
    def dies():
        os._exit(3)
"""


def test_processes_tell_of_many_quick_tasks_and_of_those_that_did_not_end_well(
    redis_url: str, worker_process: Any
) -> None:
    with MiniQ("proj", broker=redis_url, backend=redis_url) as app:
        ears = Ears(app)
        try:
            worker = worker_process(
                PREFORK.format(url=redis_url), "-c", "2", "-E", "-n", "w@h", "--heartbeat-interval", "0.5",
            )  # fmt: skip
            # Long enough for tasks to be handed out ahead of a free slot.
            ids = [app.send_task("proj.quick", (n,)).id for n in range(300)]
            for uuid in ids:
                # One that is taken back from a process before it begins is received once more.
                ways = types(ears.of_task(uuid, "succeeded"))
                assert list(dict.fromkeys(ways)) == ["received", "started", "succeeded"]
                assert ways[-2:] == ["started", "succeeded"] and ways.count("started") == 1
            by_id = {one["uuid"]: one["result"] for one in ears.heard if one["type"] == "task-succeeded"}
            assert [by_id[uuid] for uuid in ids] == [str(n) for n in range(300)]

            limited = app.send_task("proj.slow", (60,), time_limit=0.2).id
            dead = app.send_task("proj.dies").id
            stopped = app.send_task("proj.slow", (60,)).id
            ears.of_task(stopped, "started")
            app.control.revoke(stopped, terminate=True, signal="SIGKILL")
            events = ears.of_task(stopped, "revoked")
            assert types(events) == ["received", "started", "revoked"]
            revoked = events[-1]
            assert [revoked[name] for name in ("terminated", "signum", "expired")] == [True, 9, False]
            assert ears.of_task(limited, "failed")[-1]["exception"].startswith("TimeLimitExceeded(")
            assert ears.of_task(dead, "failed")[-1]["exception"].startswith("WorkerLostError(")
            for uuid in (limited, dead):
                assert types(ears.of_task(uuid, "failed")) == ["received", "started", "failed"]
            (online,) = ears.wait_for("worker-online")
            assert (online["pid"], online["hostname"], online["freq"]) == (worker.pid, "w@h", 0.5)
            assert worker.stop() == 0
            (offline,) = ears.wait_for("worker-offline")
            assert offline["processed"] == 303
        finally:
            ears.close()


# -- when the broker is away ---------------------------------------------------------------------


class Broken:
    """A transport of which publishing fails as it is told to."""

    def __init__(self) -> None:
        self.error: Any = None
        self.tries = 0
        self.types: List[str] = []

    def publish(self, publications: List[Publication], timeout_s: float) -> None:
        self.tries += 1
        if self.error is not None:
            raise self.error
        for message, _, _ in publications:
            body = json.loads(message.body)
            self.types += [one["type"] for one in (body if isinstance(body, list) else [body])]


@pytest.fixture
def played() -> "Iterator[Tuple[WorkerEvents, Broken, Callable[[float], None]]]":
    """Events of a worker under a clock that is turned by hand."""
    moment = [100.0]
    loop = Loop(lambda: moment[0], lambda: moment[0])
    transport = Broken()
    app = MiniQ("t", broker="memory://", wall=lambda: moment[0])
    events = WorkerEvents(app, loop, "w@h", True, 2.0, transport)  # type: ignore[arg-type]

    def advance(seconds: float) -> None:
        until = moment[0] + seconds
        while moment[0] < until:
            due = loop.next_due()
            moment[0] = until if due is None else min(until, max(moment[0], due))
            loop.run_once(0.0)

    events.start()
    yield events, transport, advance
    loop.close()


def test_a_broker_that_is_away_is_tried_ever_more_rarely_and_gets_all_of_it(played: Any) -> None:
    events, transport, advance = played
    transport.error = OperationalError("away")
    begun = time.monotonic()
    for number in range(100):
        events.tell_of_task("task-started", {"uuid": str(number)})
        advance(6.0)
    assert 10 <= transport.tries <= 10 + 600 / LONGEST_PAUSE_S
    transport.error = None
    advance(2 * LONGEST_PAUSE_S)
    assert transport.types.count("task-started") == 100
    beats = transport.types.count("worker-heartbeat")
    advance(10.0)
    assert transport.types.count("worker-heartbeat") == beats + 5
    events.close()
    assert transport.types[-1] == "worker-offline"
    assert time.monotonic() - begun < 60.0, "no real time passes"


def test_a_worker_that_leaves_does_not_wait_for_a_broker_that_is_away(played: Any) -> None:
    events, transport, advance = played
    transport.error = OperationalError("away")
    advance(3.0)
    tries = transport.tries
    events.close()
    assert transport.tries == tries


def test_a_refusal_ends_the_events_and_not_the_worker(played: Any, caplog: pytest.LogCaptureFixture) -> None:
    events, transport, advance = played
    transport.error = ImproperlyConfigured("access refused")
    advance(10.0)
    assert transport.tries == 2 and not events.enabled
    assert "its events are refused: access refused" in caplog.text
    events.tell_of_task("task-started", {"uuid": "1"})
    events.heartbeat()
    events.close()

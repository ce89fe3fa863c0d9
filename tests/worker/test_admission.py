# SPDX-License-Identifier: MIT
"""Messages that cannot be run: reported once, FAILURE where an id is known, set aside, replayable."""

from __future__ import annotations

import json
import os
import pickle
import sqlite3
import zlib
from typing import Any, Dict, Optional

from waiting import wait_until

from miniq import states
from miniq.exceptions import NotRegistered
from miniq.message import Message
from miniq.transports.base import Publication

SOURCE = """
    import os
    from miniq import MiniQ
    from miniq.signals import task_received, task_rejected, task_unknown

    app = MiniQ("proj", worker_deduplicate_successful_tasks=True)

    @app.task
    def add(x, y=0):
        return x + y

    @app.task(acks_late=True)
    def once():
        with open("once", "a") as file:
            file.write("ran\\n")

    if os.path.exists("deployed"):
        @app.task
        def subtract(x, y):
            return x - y

    @task_unknown.connect(weak=False)
    def on_unknown(sender, name, id, message, exc, **_):
        print("UNKNOWN", sender, name, id, type(exc).__name__, flush=True)

    @task_received.connect(weak=False)
    def on_received(sender, request, **_):
        print("RECEIVED", sender, request.name, request.id, flush=True)
    """


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def put(
    client: Any,
    body: bytes,
    headers: Optional[Dict[str, Any]] = None,
    content_type: str = "application/json",
    encoding: str = "utf-8",
    **more: Any,
) -> None:
    if headers is None:
        headers = {"task": "proj.add", "id": f"id-{len(body)}", "lang": "py"}
    message = Message(body, content_type, encoding, {**headers, **more}, {"delivery_mode": 2})
    client.app.producer.transport.publish((Publication(message, "", "celery"),), 5.0)


def insert(tmp_path: Any, envelope: bytes, body: bytes, deliveries: int = 0, task_id: str = "") -> None:
    """Put a row into the broker's file by hand."""
    db = sqlite3.connect(tmp_path / "queue.db", timeout=10)
    with db:
        db.execute(
            "INSERT INTO messages(queue, state, priority, due, deliveries, task_id, envelope, body)"
            " VALUES('celery', 2, 0, 0, ?, ?, ?, ?)",
            (deliveries, task_id, envelope, body),
        )
    db.close()


GOOD = json.dumps([[2, 3], {}, {}]).encode()


def test_messages_that_cannot_run_are_set_aside_and_the_worker_goes_on(
    worker_process: Any, client: Any, tmp_path: Any
) -> None:
    worker = worker_process(SOURCE, "-c", "1")
    evil = pickle.dumps([[Evil(str(tmp_path / "executed"))], {}, {}])
    packer = zlib.compressobj(1)
    bomb = b"".join([packer.compress(b" " * (1 << 20)) for _ in range(257)] + [packer.flush()])
    # id -> (body, content type, headers, what the reason says)
    cases: Dict[str, Any] = {
        "truncated": (GOOD[:-4], "application/json", {}, "DecodeError"),
        "binary": (bytes(range(256)), "application/json", {}, "DecodeError"),
        "empty": (b"", "application/json", {}, "Error"),
        "no-list": (b'{"a": 1}', "application/json", {}, "InvalidTaskError"),
        "two-parts": (b"[[], {}]", "application/json", {}, "InvalidTaskError"),
        "bad-args": (b'["ab", {}, {}]', "application/json", {}, "InvalidTaskError"),
        "pickle": (evil, "application/x-python-serialize", {}, "ContentDisallowed"),
        "no-type": (GOOD, "", {}, "ContentDisallowed"),
        "strange-type": (GOOD, "text/x-strange", {}, "ContentDisallowed"),
        "bomb": (bomb, "application/json", {"compression": "application/x-gzip"}, "Error"),
        "no-gzip": (GOOD, "application/json", {"compression": "application/x-gzip"}, "DecodeError"),
        "compression": (GOOD, "application/json", {"compression": "squeeze"}, "Error"),
        "unknown": (GOOD, "application/json", {"task": "proj.ad"}, "the nearest is proj.add"),
        "eta": (GOOD, "application/json", {"eta": "tomorrow"}, "'eta'"),
        "expires": (GOOD, "application/json", {"expires": "soon"}, "'expires'"),
        "eta-list": (GOOD, "application/json", {"eta": [1]}, "'eta'"),
        "retries": (GOOD, "application/json", {"retries": "many"}, "'retries'"),
        "timelimit": (GOOD, "application/json", {"timelimit": ["x", None]}, "'timelimit'"),
        "task-number": (GOOD, "application/json", {"task": 7}, "'task'"),
        "stamps": (GOOD, "application/json", {"stamps": "all"}, "'stamps'"),
    }
    for task_id, (body, content_type, headers, _) in cases.items():
        put(client, body, {"task": "proj.add", "id": task_id, **headers}, content_type)
    # No id that anybody could wait for, and what is no message at all.
    put(client, b"what is this", {}, "text/plain")
    put(client, b"[]", {})
    put(client, b"{}", {"id": "v1-junk"})
    junk = Message(b"", "application/json", "utf-8", {"task": "proj.add", "id": ["junk"]}, {})
    insert(tmp_path, json.dumps(junk.envelope()).encode(), GOOD)
    insert(tmp_path, b"\xff\x00", b"x")
    count = len(cases) + 5
    assert client.run("add", 2, 3) == 5
    wait_until(lambda: len(client.dead()) == count, what=lambda: (count, client.dead(), worker.log))
    letters = {str(letter.message.headers.get("id")): letter for letter in client.dead()}
    for task_id, (_, _, _, reason) in cases.items():
        result = client.app.AsyncResult(task_id)
        assert result.state == states.FAILURE, task_id
        assert reason in letters[task_id].reason, (task_id, letters[task_id].reason)
    assert letters["None"].message.headers == {}
    assert not (tmp_path / "executed").exists()
    log = worker.log
    assert log.count("set aside as a dead letter") == count
    assert "Traceback" not in log
    assert f"UNKNOWN {log.split('worker ')[1].split()[0]} proj.ad unknown NotRegistered" in log
    assert log.count("RECEIVED") == log.count("] received") == 9 + 1
    assert worker.stop() == 0


def test_wrong_arguments_fail_the_task_alone(worker_process: Any, client: Any) -> None:
    worker = worker_process(SOURCE, "-c", "1")
    for args in ((), (1, 2, 3), (1, "a")):
        assert isinstance(client.error_of(client.send("add", *args)), TypeError)
    assert client.dead() == []
    assert worker.log.count("raised unexpected: TypeError") == 3


def test_unknown_task_can_be_replayed_when_it_is_deployed(
    worker_process: Any, client: Any, tmp_path: Any
) -> None:
    first = worker_process(SOURCE, "-c", "1")
    result = client.send("subtract", 5, 2)
    error = client.error_of(result)
    assert isinstance(error, NotRegistered) and "proj.subtract" in str(error)
    first.stop()
    (tmp_path / "deployed").touch()
    worker_process(SOURCE, "-c", "1")
    [letter] = client.dead()
    assert client.app.producer.transport.replay(letter.id)
    wait_until(lambda: client.app.AsyncResult(result.id).state == states.SUCCESS)
    assert client.app.AsyncResult(result.id).get(timeout=5) == 3


def test_protocol_1_message_runs(worker_process: Any, client: Any) -> None:
    worker_process(SOURCE, "-c", "1")
    body = {"task": "proj.add", "id": "v1", "args": [4], "kwargs": {"y": 5}, "retries": 0, "eta": None}
    put(client, json.dumps(body).encode(), {})
    late = {**body, "id": "v1-late", "expires": "2020-01-01T00:00:00"}
    put(client, zlib.compress(json.dumps(late).encode()), {"compression": "application/x-gzip"})
    assert client.app.AsyncResult("v1").get(timeout=10) == 9
    wait_until(lambda: client.app.AsyncResult("v1-late").state == states.REVOKED)


def test_redelivery_of_a_task_that_had_succeeded_is_skipped(
    worker_process: Any, client: Any, lines: Any, tmp_path: Any
) -> None:
    worker = worker_process(SOURCE, "-c", "1")
    result = client.send("once")
    result.get(timeout=10)
    # What a worker leaves that dies between the result and the acknowledgement.
    again = Message(b"", "application/json", "utf-8", {"task": "proj.once", "id": result.id}, {})
    insert(tmp_path, json.dumps(again.envelope()).encode(), b"[[], {}, {}]", 1, result.id)
    worker.wait_for("had succeeded already")
    assert lines("once") == ["ran"]
    wait_until(lambda: client.waiting() == (0, 0, 0))

# SPDX-License-Identifier: MIT
"""``miniq migrate``: nothing is lost between any two brokers, nothing changed, and what stays is said."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterable, List, Tuple

import pytest
from waiting import wait_until
from workers import environment

from miniq import MiniQ
from miniq.cli.main import main
from miniq.message import Message
from miniq.transports.base import Publication, Transport, transport_class


def send_all_kinds(app: MiniQ) -> Dict[str, str]:
    """Send what a queue may hold; return {id: queue}."""
    sent = {}
    kinds: List[Tuple[str, Dict[str, Any]]] = [
        ("celery", {}),
        ("mail", {"priority": 7}),
        ("celery", {"countdown": 5000}),
        ("mail", {"countdown": 90_000, "priority": 3}),
        ("celery", {"expires": 9000, "countdown": 100}),
        ("celery", {"headers": {"own": {"a": [1, None]}}}),
    ]
    for number, (queue, options) in enumerate(kinds):
        task_id = f"id-{number}"
        app.send_task("proj.add", (number, "é"), {"k": number}, task_id=task_id, queue=queue, **options)
        sent[task_id] = queue
    return sent


def taken_from(url: str, names: Iterable[str], far: bool = True) -> Dict[str, Tuple[str, Message]]:
    """Take all from a store, with a clock that makes everything due; return {id: (queue, message)}."""
    app = MiniQ("taker", broker=url, set_as_current=False)
    ahead_s = 10 * 365 * 86400.0 if far else 0.0
    transport = transport_class(url)(url, app.broker_options(url), lambda: time.time() + ahead_s)
    consumer = transport.consumer("taker", [app.router.queues[name] for name in names])
    found: Dict[str, Tuple[str, Message]] = {}
    while True:
        deliveries = consumer.poll(100)
        if not deliveries:
            break
        for delivery in deliveries:
            found[delivery.message.headers["id"]] = (delivery.queue, delivery.message)
            consumer.ack(delivery)
    consumer.close()
    transport.close()
    app.close()
    return found


@pytest.mark.parametrize(
    "way", ["sqlite to sqlite", "sqlite to redis", "redis to sqlite", "memory to sqlite"]
)
def test_all_kinds_of_messages_arrive_as_they_were(
    way: str, tmp_path: Path, make_app: Any, request: Any, capsys: Any
) -> None:
    def url(kind: str, number: int) -> str:
        if kind == "redis":
            return str(request.getfixturevalue("redis_url"))
        return f"memory://migrate-{tmp_path.name}" if kind == "memory" else f"sqlite:///{tmp_path}/{number}.db"

    source, destination = (url(kind, number) for number, kind in enumerate(way.split(" to ")))
    app = make_app(broker=source)
    before = send_all_kinds(app)
    assert main(["migrate", source, destination, "-t", "0", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"moved": 6, "queues": {"celery": 4, "mail": 2}, "left": 0}
    assert {size.queue: size.ready + size.waiting for size in app.producer.transport.sizes()} in (
        {"celery": 0, "mail": 0}, {},
    )  # fmt: skip
    # What is due is out at once; the rest still waits, and comes when it is due.
    now = taken_from(destination, ("celery", "mail"), far=False)
    assert set(now) == {"id-0", "id-1", "id-5"}
    later = taken_from(destination, ("celery", "mail"))
    assert set(later) == {"id-2", "id-3", "id-4"}
    for task_id, (queue, message) in {**now, **later}.items():
        assert queue == before[task_id]
        assert message.headers["own"] == {"a": [1, None]} if task_id == "id-5" else True
        assert (message.headers["eta"] is not None) == (task_id in later)
        assert json.loads(message.body)[0] == [int(task_id[3:]), "é"]
        assert message.priority == {"id-1": 7, "id-3": 3}.get(task_id, 0)
        assert message.properties["correlation_id"] == task_id


def test_queues_are_chosen_and_renamed_tasks_chosen_and_numbers_kept(
    tmp_path: Path, make_app: Any, capsys: Any
) -> None:
    source, destination = f"sqlite:///{tmp_path}/a.db", f"sqlite:///{tmp_path}/b.db"
    app = make_app(broker=source)
    for number in range(6):
        app.send_task(f"t{number % 2}", (), queue="mail" if number < 4 else "celery", task_id=str(number))
    app.control.revoke("2")

    def moved(*words: str) -> Any:
        assert main(["migrate", source, destination, "-t", "0", "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    assert moved("-Q", "mail:post", "-T", "t1") == {"moved": 2, "queues": {"post": 2}, "left": 2}
    assert moved("-n", "1")["moved"] == 1
    assert moved("-n", "0")["moved"] == 0
    assert moved()["moved"] == 3
    assert moved()["moved"] == 0
    # What was revoked stays so on the other side.
    there = MiniQ("there", broker=destination, set_as_current=False)
    consumer = there.producer.transport.consumer("w", [there.router.queues["mail"]])
    fates = {delivery.message.headers["id"]: delivery.fate for delivery in consumer.poll(10)}
    consumer.close()
    there.close()
    assert fates == {"0": None, "2": "revoked"}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["sqlite:///x.db", "sqlite:///x.db"], 1, "source and destination are the same broker"),
        (["sqlite:///x.db", "sqlite:///y.db", "-Q", "no"], 1, "has no queue no; it has: none"),
        (["redis://u:secret@localhost:1/0", "sqlite:///y.db"], 1, "u:**@localhost:1/0: no connection"),
        (["sqlite:///x.db", "amqp://u:secret@localhost:1/"], 1, "no server listens there"),
        (["amqp://localhost:1/", "sqlite:///x.db"], 1, "no server listens there"),
        (["sqlite:///x.db", "nosuch://h"], 1, "unknown scheme 'nosuch'"),
        (["sqlite:///x.db"], 2, "required: DESTINATION"),
        (["sqlite:///jbos.db", "sqlite:///y.db"], 1, "sqlite:///jbos.db: there is no such file"),
        (["sqlite:///x.db", "sqlite:///y.db", "-n", "-1"], 2, "'-1' is not a whole number from 0 up"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    words: List[str], code: int, said: str, tmp_path: Path, monkeypatch: Any, capsys: Any, make_app: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    app = make_app(broker="sqlite:///x.db")
    app.producer.transport.sizes()  # makes the file
    if "amqp" in words[-1]:
        app.send_task("t", ())
    assert main(["migrate", *words, "-t", "0"]) == code
    err = capsys.readouterr().err
    assert said in err and "secret" not in err and "Traceback" not in err


def fill(transport: Transport, count: int) -> List[str]:
    ids = [f"id-{number}" for number in range(count)]
    body, kind = b"[[], {}, {}]", "application/json"
    messages = [Message(body, kind, "utf-8", {"task": "t", "id": one}, {}) for one in ids]
    transport.publish([Publication(message, "", "celery") for message in messages], 30)
    return ids


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="nothing to kill with")
def test_killed_in_the_middle_nothing_is_lost_and_the_next_run_finishes(
    tmp_path: Path, make_app: Any, program: Any
) -> None:
    source, destination = f"sqlite:///{tmp_path}/a.db", f"sqlite:///{tmp_path}/b.db"
    here, there = make_app(broker=source), make_app(broker=destination)
    here.producer.transport.declare(here.router.queues["celery"])
    ids = fill(here.producer.transport, 12_000)
    command = [sys.executable, "-m", "miniq", "migrate", source, destination]

    def ready(app: MiniQ) -> int:
        return sum(size.ready + (size.unacked or 0) for size in app.producer.transport.sizes())

    running = program(command, env=environment(tmp_path))
    wait_until(lambda: ready(there) > 300 or running.exitcode is not None)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert 0 < ready(here) < len(ids)
    running = program(command, env=environment(tmp_path))
    assert running.wait(60) == 0, running.log
    assert "messages moved" in running.log and ready(here) == 0
    # Only what was on its way may be there twice.
    assert len(ids) <= ready(there) <= len(ids) + 100
    assert set(taken_from(destination, ["celery"])) == set(ids)


def test_rabbitmq_takes_and_gives_what_waits_too(
    rabbit_url: str, tmp_path: Path, make_app: Any, capsys: Any
) -> None:
    source, back = f"sqlite:///{tmp_path}/a.db", f"sqlite:///{tmp_path}/b.db"
    sent = send_all_kinds(make_app(broker=source))
    app = make_app(broker=rabbit_url, task_queues=["celery", "mail"])
    assert main(["migrate", source, rabbit_url, "-t", "0"], app=app) == 0
    assert "6 messages moved" in capsys.readouterr().out
    sizes = {size.queue: size for size in app.producer.transport.sizes(["celery", "mail"])}
    assert (sizes["celery"].ready, sizes["mail"].ready, sizes["mail"].consumers) == (2, 1, 0)
    # One queue alone: what waits for the other one goes on waiting.
    assert main(["migrate", rabbit_url, back, "-Q", "mail", "-t", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["queues"] == {"mail": 2}
    assert main(["migrate", rabbit_url, back, "-t", "0", "--json"], app=app) == 0
    assert json.loads(capsys.readouterr().out)["queues"] == {"celery": 4}
    now, later = taken_from(back, ("celery", "mail"), far=False), taken_from(back, ("celery", "mail"))
    assert set(now) == {"id-0", "id-1", "id-5"} and set(later) == {"id-2", "id-3", "id-4"}
    for task_id, (queue, message) in {**now, **later}.items():
        assert queue == sent[task_id] and json.loads(message.body)[1] == {"k": int(task_id[3:])}
        assert set(message.headers) >= {"task", "id", "eta", "argsrepr"}
        assert not any(name.startswith("x-") for name in message.headers)
    assert message.priority == 0 or message.headers["id"] in ("id-1", "id-3")

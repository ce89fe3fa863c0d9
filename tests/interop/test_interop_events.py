# SPDX-License-Identifier: MIT
"""Events between both: each hears the other's workers and senders, and Flower shows a worker of ours."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from interop_fleet import HERE, TIMEOUT_S, Fleet, new_key, skip_without_celery
from interop_tasks import BACKEND, BROKER, FOLDER, MORE
from waiting import wait_until
from workers import Program, environment

skip_without_celery()

pytestmark = pytest.mark.over("redis", "amqp+redis")
KINDS = ("celery", "miniq")
#: Fields whose values differ from run to run; their names must be the same.
VARYING = {
    "hostname", "utcoffset", "pid", "clock", "timestamp", "local_received", "uuid", "root_id", "parent_id",
    "runtime", "traceback", "eta", "loadavg", "active", "processed", "sw_ident", "sw_ver", "queue",
    "routing_key", "args",
}  # fmt: skip


class Listener:
    """A receiver of one kind, in a thread."""

    def __init__(self, app: Any) -> None:
        self.heard: List[Dict[str, Any]] = []
        self.state = app.events.State()
        self._connection = app.connection_for_read()
        self._receiver = app.events.Receiver(self._connection, handlers={"*": self._hear})
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _hear(self, event: Dict[str, Any]) -> None:
        self.heard.append(dict(event))
        self.state.event(event)

    def _listen(self) -> None:
        self._receiver.capture(limit=None, timeout=None, wakeup=True)

    def of(self, uuid: str) -> List[Dict[str, Any]]:
        return [one for one in list(self.heard) if one.get("uuid") == uuid]

    def types(self, uuid: str) -> List[str]:
        return [one["type"] for one in self.of(uuid)]

    def close(self) -> None:
        self._receiver.should_stop = True
        self._thread.join()
        self._connection.release()


@pytest.fixture(scope="module")
def telling(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet, whose workers and senders tell of tasks meanwhile."""
    control = fleet.side("celery").app.control
    for kind in KINDS:
        fleet.workers[kind].wait_ready()
        fleet.side(kind).app.conf.task_send_sent_event = True
    replies: Dict[str, Any] = {}

    def enabled() -> bool:
        for reply in control.enable_events(reply=True, timeout=2.0, limit=2) or []:
            replies.update(reply)
        return len(replies) >= len(KINDS)

    wait_until(enabled, TIMEOUT_S, lambda: replies)
    yield fleet
    control.disable_events(reply=True, timeout=2.0, limit=2)
    for kind in KINDS:
        fleet.side(kind).app.conf.task_send_sent_event = False


@pytest.fixture(scope="module")
def listeners(telling: Fleet) -> Iterator[Dict[str, Listener]]:
    found = {kind: Listener(telling.side(kind).app) for kind in KINDS}
    try:
        # Workers of both kinds answer to the request for a heartbeat, or send the next one.
        for one in found.values():
            wait_until(
                lambda: {"celery@interop", "miniq@interop"} <= set(one.state.workers),  # noqa: B023
                TIMEOUT_S,
                lambda: one.heard,  # noqa: B023
            )
        yield found
    finally:
        for one in found.values():
            one.close()


#: Task, arguments, types of its events in their order.  What is sent comes from another process.
RUNS: Dict[str, Tuple[str, Tuple[Any, ...], str]] = {
    "success": ("add", (2, 3), "received started succeeded"),
    "failure": ("fail", ("builtin",), "received started failed"),
    "retry": ("put_off", ("key", 0.1), "received started retried received started succeeded"),
}


@pytest.mark.parametrize("run", RUNS)
def test_both_receivers_hear_the_same_of_both_kinds_of_workers(
    telling: Fleet, listeners: Dict[str, Listener], run: str
) -> None:
    name, args, words = RUNS[run]
    types = words.split()
    expected = [f"task-{one}" for one in types]
    forms: Dict[Any, Any] = {}
    for worker in KINDS:
        for caller in KINDS:
            uuid = telling.side(caller).call(name, *args, queue=f"to_{worker}").id
            for kind, listener in listeners.items():

                def heard() -> bool:
                    # A message that Celery's worker sends again may be there before what it tells of that.
                    found = listener.types(uuid)  # noqa: B023
                    ran = sorted(one for one in found if one != "task-sent")
                    return ran == sorted(expected) and "task-sent" in found

                wait_until(heard, TIMEOUT_S, lambda: listener.of(uuid))  # noqa: B023
                events = listener.of(uuid)
                by = {one["hostname"] for one in events if one["type"] != "task-sent"}
                assert by == {f"{worker}@interop"}
                task = listener.state.tasks[uuid]
                last = {"failed": "FAILURE", "succeeded": "SUCCESS"}[types[-1]]
                assert (task.state, task.name) == (last, f"interop.{name}")
                if run != "retry":
                    assert [one["type"] for one in events if one["type"] != "task-sent"] == expected
                forms[worker, caller, kind] = sorted(
                    [(name, "" if name in VARYING else repr(one[name])) for name in sorted(one)]
                    for one in events
                    if one["type"] != "task-sent" or not one["retries"]
                )
    first = forms["celery", "celery", "celery"]
    for key, form in forms.items():
        assert form == first, key


def test_revoked_tasks_and_heartbeats_are_told_alike(telling: Fleet, listeners: Dict[str, Listener]) -> None:
    forms: List[Any] = []
    for worker in KINDS:
        key = new_key()
        result = telling.side("celery").call("hold", key, queue=f"to_{worker}")
        wait_until(lambda: telling.journal.of(key), TIMEOUT_S)  # noqa: B023
        telling.side("miniq").app.control.revoke(result.id, terminate=True)
        for listener in listeners.values():
            wait_until(lambda: "task-revoked" in listener.types(result.id), TIMEOUT_S)  # noqa: B023
            assert listener.state.tasks[result.id].state == "REVOKED"
            (event,) = [one for one in listener.of(result.id) if one["type"] == "task-revoked"]
            forms.append({name: None if name in VARYING else event[name] for name in event})
    for one in forms:
        assert one == forms[0]
    for listener in listeners.values():
        beats: Dict[str, Any] = {}

        def both() -> bool:
            for one in list(listener.heard):  # noqa: B023
                # What Celery answers when it is asked for a heartbeat has fewer fields.
                if one["type"] == "worker-heartbeat" and "active" in one:
                    beats[one["hostname"]] = one  # noqa: B023
            return {"miniq@interop", "celery@interop"} <= beats.keys()  # noqa: B023

        wait_until(both, TIMEOUT_S)
        ours, theirs = beats["miniq@interop"], beats["celery@interop"]
        assert sorted(ours) == sorted(theirs)
        assert (ours["freq"], ours["sw_sys"], ours["sw_ident"]) == (theirs["freq"], theirs["sw_sys"], "miniq")
        assert {worker.hostname for worker in listener.state.alive_workers()} >= set(beats)


@pytest.fixture
def start(telling: Fleet, tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start a program of one kind as a process: ``start("celery", "events", "--dump")``."""
    started: List[Program] = []
    broker, backend = telling.urls(0)
    variables = {BROKER: broker, BACKEND: backend, FOLDER: str(telling.folder), MORE: json.dumps({})}

    def run(kind: str, *args: str, **more: str) -> Program:
        env = environment(HERE, HERE.parent, **variables, **more)
        env.pop("PYTHONWARNINGS" if kind == "celery" else "", None)
        command = [sys.executable, "-m", kind, "-A", f"{kind}_app:app", *args]
        started.append(Program(command, tmp_path, f"{kind}{len(started)}", env))
        return started[-1]

    yield run
    complaints: List[str] = []
    for one in started:
        print(f"--- {one}:\n{one.log[-5000:]}")
        complaints += one.clean_up()

    assert not complaints, complaints


def test_both_dumps_show_both_kinds(telling: Fleet, start: Callable[..., Program]) -> None:
    dumps = {"celery": start("celery", "events", "--dump"), "miniq": start("miniq", "events", "--dump")}

    def shown() -> bool:
        for worker in KINDS:
            telling.side("miniq").call("add", 1, 1, queue=f"to_{worker}")
        return all(
            re.search(rf"^{worker}@interop \[.*\] task succeeded: interop\.add\(.+\) args=", dump.log, re.M)
            for dump in dumps.values()
            for worker in KINDS
        )

    wait_until(shown, TIMEOUT_S, lambda: [dump.log[-2000:] for dump in dumps.values()], 0.2)


def test_flower_lists_our_worker_and_its_tasks(telling: Fleet, start: Callable[..., Program]) -> None:
    if importlib.util.find_spec("flower") is None:
        assert not os.environ.get("MINIQ_TESTS_NEED_CELERY"), "flower is not installed"
        pytest.skip("flower is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = start(
        "celery", "flower", f"--port={port}", "--address=127.0.0.1", FLOWER_UNAUTHENTICATED_API="true"
    )

    def ask(path: str) -> Dict[str, Any]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}", timeout=TIMEOUT_S) as answer:
                found: Dict[str, Any] = json.load(answer)
                return found
        except (urllib.error.URLError, ConnectionError):  # not up yet
            return {}

    wait_until(lambda: "miniq@interop" in ask("workers?refresh=1"), TIMEOUT_S, lambda: program.log, 0.2)
    worker = ask("workers")["miniq@interop"]
    assert worker["stats"]["pool"]["max-concurrency"] == 2
    assert {queue["name"] for queue in worker["active_queues"]} >= {"to_miniq", "both"}
    # A changed rate limit stands behind the name.
    assert "interop.add" in {name.partition(" ")[0] for name in worker["registered"]}
    client = telling.side("miniq")
    states = {
        client.call("add", 2, 3, queue="to_miniq").id: ("SUCCESS", "interop.add"),
        client.call("fail", "builtin", queue="to_miniq").id: ("FAILURE", "interop.fail"),
        client.call("put_off", new_key(), 0.1, queue="to_miniq").id: ("SUCCESS", "interop.put_off"),
        client.call("put_off", new_key(), 600.0, queue="to_miniq").id: ("RETRY", "interop.put_off"),
    }
    key = new_key()
    held = client.call("hold", key, queue="to_miniq").id
    states[held] = ("REVOKED", "interop.hold")
    wait_until(lambda: telling.journal.of(key), TIMEOUT_S)
    client.app.control.revoke(held, terminate=True)

    def known() -> bool:
        tasks = ask("tasks")
        found = {uuid: (tasks[uuid]["state"], tasks[uuid]["name"]) for uuid in states if uuid in tasks}
        return found == states

    wait_until(known, TIMEOUT_S, lambda: ask("tasks"), 0.2)
    shown = ask("tasks")
    assert {shown[uuid]["worker"] for uuid in states} == {"miniq@interop"}
    (added,) = [uuid for uuid, (_, name) in states.items() if name == "interop.add"]
    assert (shown[added]["result"], shown[added]["args"]) == ("5", "(2, 3)")

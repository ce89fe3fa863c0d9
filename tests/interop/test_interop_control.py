# SPDX-License-Identifier: MIT
"""Each command line of one kind asks and tells a worker of the other kind, command by command.

The command lines run in this process, as ``app.start([...])``, but for one of each kind.
"""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import pytest
from interop_fleet import HERE, TIMEOUT_S, Fleet, Side, skip_without_celery
from interop_tasks import BACKEND, BROKER, FOLDER
from waiting import wait_until
from workers import environment

skip_without_celery()
pytestmark = pytest.mark.over("redis", "amqp+redis")

#: A space that no other test has.
DB = 6
#: Who asks, and who is asked.
DIRECTIONS = (("celery", "miniq"), ("miniq", "celery"))
TASK_INFO = {
    "id", "name", "args", "kwargs", "type", "hostname", "time_start", "acknowledged", "delivery_info",
    "worker_pid",
}  # fmt: skip


class Operator(NamedTuple):
    """A command line, and the worker it talks to."""

    fleet: Fleet
    side: Side
    worker: str
    capfd: Any

    @property
    def node(self) -> str:
        return f"{self.worker}@interop"

    @property
    def queue(self) -> str:
        return f"to_{self.worker}"

    def run(self, *words: str) -> Tuple[Any, str]:
        """Run the command line; return its exit code and what it printed."""
        self.capfd.readouterr()
        code = self.side.app.start(list(words))
        return code, self.capfd.readouterr().out

    def ask(self, kind: str, *words: str) -> Any:
        """Return what the worker answers."""
        where = ["-d", self.node, "-t", str(TIMEOUT_S), "--json"]
        _, out = self.run(kind, *where, *words)
        found = json.loads(out)
        replies: List[Dict[str, Any]] = [found] if isinstance(found, dict) else found
        assert [list(reply) for reply in replies] == [[self.node]], out
        return replies[0][self.node]


@pytest.fixture(params=DIRECTIONS, ids=[f"{asks}-asks-{asked}" for asks, asked in DIRECTIONS])
def operator(request: pytest.FixtureRequest, fleet: Fleet, capfd: Any) -> Operator:
    asks, asked = request.param
    fleet.workers[asked].wait_ready()
    return Operator(fleet, fleet.side(asks), asked, capfd)


def test_each_question_is_answered(operator: Operator) -> None:
    key, queue = f"control {uuid.uuid4()}", operator.queue
    held = operator.side.call("hold", key, queue=queue)
    later = operator.side.call("add", 1, 2, queue=queue, countdown=3600)
    journal = operator.fleet.journal
    wait_until(lambda: journal.of(key))
    try:
        ask = operator.ask
        [told] = [one for one in ask("inspect", "active") if one["id"] == held.id]
        assert set(told) == TASK_INFO and told["args"] == [key] and told["acknowledged"] is True
        assert told["delivery_info"]["routing_key"] == queue and told["hostname"] == operator.node
        stats = ask("inspect", "stats")
        assert {"total", "pid", "clock", "uptime", "pool", "broker", "prefetch_count", "rusage"} <= set(stats)
        assert stats["pid"] == operator.fleet.workers[operator.worker].pid
        assert told["worker_pid"] in stats["pool"]["processes"]
        assert ask("inspect", "query_task", held.id, "unknown").keys() == {held.id}
        assert ask("inspect", "ping") == {"ok": "pong"}
        assert isinstance(ask("inspect", "reserved"), list) and isinstance(ask("inspect", "scheduled"), list)
        queues = {one["name"]: one for one in ask("inspect", "active_queues")}
        assert queues[queue]["exchange"]["type"] == "direct" and len(queues[queue]) == 18
        assert "interop.add" in ask("inspect", "registered")
        assert any("max_retries=3" in name for name in ask("inspect", "registered", "max_retries"))
        assert ask("inspect", "clock")["clock"] > 0
        assert "broker_url" in ask("inspect", "conf")
        assert "software" in ask("inspect", "report")["ok"]
        assert isinstance(ask("inspect", "revoked"), list)
        ask("inspect", "memsample"), ask("inspect", "memdump", "2")
        assert ask("control", "revoke", "some-id") == {"ok": "tasks {'some-id'} flagged as revoked"}
        operator.side.app.control.revoke(later.id)
        wait_until(lambda: {later.id, "some-id"} <= set(ask("inspect", "revoked")))
        wait_until(lambda: later.state == "REVOKED")
        inspect = operator.side.app.control.inspect([operator.node], timeout=TIMEOUT_S)
        hello = inspect.hello("other@interop", revoked=["an-id"])[operator.node]
        assert {"an-id", later.id} <= set(hello["revoked"]) and hello["clock"] > 0
    finally:
        journal.let_go(key)
    held.get(timeout=TIMEOUT_S)


def test_each_command_is_carried_out(operator: Operator) -> None:
    ask: Callable[..., Any] = operator.ask
    assert ask("control", "rate_limit", "interop.add", "1000/s") == {"ok": "new rate limit set successfully"}
    assert ask("control", "rate_limit", "interop.add", "0")
    assert ask("control", "rate_limit", "interop.nope", "1/s") == {"error": "unknown task"}
    assert "Invalid rate limit" in ask("control", "rate_limit", "interop.add", "ten")["error"]
    assert ask("control", "time_limit", "interop.add", "100", "200") == {"ok": "time limits set successfully"}
    assert ask("control", "time_limit", "interop.nope", "1", "2") == {"error": "unknown task"}
    extra = f"extra_{operator.worker}"
    assert ask("control", "add_consumer", extra) == {"ok": f"add consumer {extra}"}
    assert operator.side.call("add", 2, 3, queue=extra).get(timeout=TIMEOUT_S) == 5
    assert ask("control", "cancel_consumer", extra) == {"ok": f"no longer consuming from {extra}"}
    assert extra not in {one["name"] for one in ask("inspect", "active_queues")}
    assert ask("control", "pool_grow", "1") == {"ok": "pool will grow"}
    wait_until(lambda: ask("inspect", "stats")["pool"]["processes"][2:])
    assert ask("control", "pool_shrink", "1") == {"ok": "pool will shrink"}
    assert "Autoscale not enabled" in ask("control", "autoscale", "3", "1")["error"]
    assert "Pool restarts not enabled" in ask("control", "pool_restart")["error"]
    assert "task events" in ask("control", "enable_events")["ok"]
    assert "task events" in ask("control", "disable_events")["ok"]
    assert ask("control", "heartbeat") is None
    assert ask("control", "revoke_by_stamped_headers", "control=x")["ok"].endswith("but not terminated")
    key = f"control {uuid.uuid4()}"
    held = operator.side.call("hold", key, queue=operator.queue)
    wait_until(lambda: operator.fleet.journal.of(key))
    assert ask("control", "terminate", "SIGKILL", held.id) == {"ok": f"terminate: {held.id}"}
    wait_until(lambda: held.state == "REVOKED", TIMEOUT_S)
    operator.fleet.journal.let_go(key)
    stamped = operator.side.sig("note", key).set(queue=operator.queue)
    stamped.stamp(control="x")
    dropped = stamped.apply_async()
    wait_until(lambda: dropped.state == "REVOKED", TIMEOUT_S)
    broadcast = operator.side.app.control.broadcast
    options: Any = {"destination": [operator.node], "reply": True, "timeout": TIMEOUT_S}
    unknown = {operator.node: {"error": "KeyError('no_such_command')"}}
    assert broadcast("no_such_command", **options) == [unknown]
    [told] = broadcast("rate_limit", arguments={"x": 1}, **options)
    assert "missing 2 required positional arguments" in told[operator.node]["error"]


@pytest.mark.over("redis")
def test_patterns_and_silence(operator: Operator) -> None:
    control = operator.side.app.control
    pong = [{operator.node: {"ok": "pong"}}]
    options: Any = {"reply": True, "timeout": TIMEOUT_S, "limit": 1}
    pattern = f"{operator.worker[:3]}*@interop"
    assert control.broadcast("ping", pattern=pattern, matcher="glob", **options) == pong
    assert control.broadcast("ping", pattern=f"^{operator.worker}@", matcher="pcre", **options) == pong
    assert control.ping(destination=["nobody@interop"], timeout=0.1) == []
    seen = {node for reply in control.ping(timeout=1.0) for node in reply}
    assert {"celery@interop", "miniq@interop"} <= seen, "both kinds hear what is for all"


@pytest.mark.over("redis")
def test_the_command_line_as_a_process(operator: Operator) -> None:
    fleet, kind = operator.fleet, operator.side.kind
    broker, backend = fleet.urls(0)
    env = environment(
        HERE, HERE.parent, **{BROKER: broker, BACKEND: backend, FOLDER: str(fleet.folder), "NO_COLOR": "1"}
    )
    if kind == "celery":
        del env["PYTHONWARNINGS"]
    command = [sys.executable, "-m", kind, "-A", f"{kind}_app:app"]

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*command, *words], env=env, cwd=fleet.folder, capture_output=True, text=True, timeout=60
        )

    done = run("status", "-d", operator.node, "-t", str(TIMEOUT_S))
    assert (done.returncode, done.stdout.strip()) == (0, f"->  {operator.node}: OK\n\n1 node online."), done
    done = run("inspect", "-d", "nobody@interop", "-t", "0.1", "ping")
    assert done.returncode == 69 and "No nodes replied within time constraint" in done.stderr + done.stdout


@pytest.mark.over("redis")
def test_a_worker_leaves_when_told_to(fleet: Fleet) -> None:
    for _, asked in DIRECTIONS:
        fleet.start(f"leaver_{asked}", asked, f"leave_{asked}", space=DB)
    for asks, asked in DIRECTIONS:
        leaver = fleet.workers[f"leaver_{asked}"].wait_ready()
        control, node = fleet.side(asks, space=DB).app.control, [f"leaver_{asked}@interop"]
        # Celery's worker is ready a little before it hears.
        wait_until(lambda: control.ping(destination=node, timeout=0.5), TIMEOUT_S)  # noqa: B023 - at once
        control.shutdown(destination=node)
        assert leaver.wait(TIMEOUT_S) == 0

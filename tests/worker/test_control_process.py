# SPDX-License-Identifier: MIT
"""Commands to a worker in a process of its own, from a program and from the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from waiting import wait_until
from workers import environment

from miniq.cli.main import main

SOURCE = """
    import time
    from miniq import MiniQ
    from miniq.worker.control import inspect_command

    app = MiniQ("proj", worker_pool_restarts=True, broker_heartbeat=7)

    @inspect_command(args=[("n", int)], signature="<n>")
    def double(state, n):
        "Tell twice as much."
        return {"ok": 2 * n}

    @app.task
    def add(x, y):
        return x + y

    @app.task
    def hold(*args):
        time.sleep(60)
"""
#: Not over before anything that happens here, however slow the machine.
TIMEOUT_S = 30.0


def run(tmp_path: Path, sqlite_url: str, *words: str, broker: Optional[str] = None) -> Tuple[int, str, str]:
    """Run the command line as a process; return its exit code and what it wrote."""
    command = [sys.executable, "-m", "miniq", "-A", "proj", *(["-b", broker] if broker else []), *words]
    env = environment(tmp_path, MINIQ_BROKER_URL=sqlite_url)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_a_worker_is_asked_and_told_from_elsewhere(
    worker_process: Any, client: Any, tmp_path: Path, sqlite_url: str, capfd: Any
) -> None:
    worker = worker_process(SOURCE, "-c", "2", "-n", "w1@h")
    control = client.app.control
    ask = control.inspect("w1@h", timeout=TIMEOUT_S)
    options: Dict[str, Any] = {"destination": "w1@h", "reply": True, "timeout": TIMEOUT_S}

    # -- what runs in which process; stopping it by a stamp and by its id

    held = client.send("hold", [1], stamped_headers=["customer"], customer="a")
    other = client.send("hold", 2)
    told = {one["id"]: one for one in wait_until(lambda: len(ask.active()) == 2 and ask.active())}
    assert told[held.id]["args"] == [[1]] and told[other.id]["args"] == [2]
    assert {one["worker_pid"] for one in told.values()} == set(worker.children)
    stats = ask.stats()
    assert stats["pool"]["processes"] == worker.children and stats["pid"] == worker.pid
    assert stats["total"] == {"proj.hold": 2} and stats["broker"]["heartbeat"] == 7
    kill: Any = {"terminate": True, "signal": "SIGKILL", **options}
    [reply] = control.revoke_by_stamped_headers({"customer": "a"}, **kill)
    assert reply == {"w1@h": {"ok": "headers {'customer': ['a']} revoked"}}
    wait_until(lambda: held.state == "REVOKED")
    [reply] = control.terminate([other.id, "unknown"], signal="SIGKILL", **options)
    assert reply == {"w1@h": {"ok": f"terminate: {other.id}"}}
    wait_until(lambda: other.state == "REVOKED")
    wait_until(lambda: ask.active() == [])

    # -- new processes for old ones

    before = set(wait_until(lambda: len(worker.children) == 2 and worker.children))
    assert control.pool_restart(**options) == [{"w1@h": {"ok": "reload started"}}]
    wait_until(lambda: len(worker.children) == 2 and not before & set(worker.children))
    assert client.run("add", 2, 3) == 5

    # -- the command line: each case as a process

    def cli(*words: str, **more: Any) -> Tuple[int, str, str]:
        return run(tmp_path, sqlite_url, *words, **more)

    here = ("-d", "w1@h", "-t", "30")
    assert cli("inspect", "active", *here) == (0, "->  w1@h: OK\n    - empty -\n\n1 node online.\n", "")
    code, out, _ = cli("inspect", "stats", *here, "--json")
    assert (code, json.loads(out)["w1@h"]["pid"]) == (0, worker.pid)
    assert cli("control", "rate_limit", "proj.add", "9/m", *here) == (
        0, "->  w1@h: OK\n    new rate limit set successfully\n", ""
    )  # fmt: skip
    assert cli("control", "rate_limit", "proj.nope", "9/m", *here, "-j") == (
        1, '[{"w1@h": {"error": "unknown task"}}]\n', ""
    )  # fmt: skip
    assert cli("status", *here) == (0, "->  w1@h: OK\n\n1 node online.\n", "")
    nobody = "Error: No nodes replied within time constraint"
    assert cli("status", "-d", "nobody@h", "-t", "0.1") == (69, "", f"{nobody}\n")
    code, out, err = cli("control", "revoke", "some-id", "-d", "nobody@h", "-t", "0.1")
    assert (code, out) == (69, "") and err.startswith(nobody)
    code, out, err = cli("inspect", "activ")
    assert (code, out) == (2, "") and "did you mean 'active'?" in err
    code, out, err = cli("status", broker="redis://127.0.0.1:1")
    assert (code, out) == (1, "") and err.startswith("Error: ") and "127.0.0.1:1" in err

    # -- and the rest of it in this process, which is quicker

    def words(*given: str) -> List[Any]:
        code = main(given, app=client.app)
        captured = capfd.readouterr()
        return [code, captured.out, captured.err]

    code, out, _ = words("inspect", "registered", *here)
    assert code == 0 and "    * proj.add [rate_limit=9/m]\n    * proj.hold\n" in out
    assert words("status", *here, "-j")[:2] == [0, '{"w1@h": {"ok": "pong"}}\n']
    code, out, _ = words("inspect", "conf", "yes", *here, "-j")
    assert json.loads(out)["w1@h"]["broker_heartbeat"] == 7
    assert words("inspect", "query_task", "x", "y", *here)[1].startswith("->  w1@h: OK\n    {}\n")
    assert words("inspect", "objgraph", *here)[0] == 1
    assert words("inspect", "objgraph", "-d", "nobody@h", "-t", "0.1")[0] == 69
    for kind, name in (("inspect", "active_queues"), ("control", "terminate")):
        assert re.search(rf"^{name}\b.*\n    \w", words(kind, "--list")[1], re.M)
    for wrong, why in (
        (("inspect",), "which command?"),
        (("inspect", "revoke"), "`control`: control revoke"),
        (("inspect", "ping", "x"), "takes no argument 'x'"),
        (("inspect", "conf", "perhaps"), "cannot be 'perhaps'"),
        (("control", "pool_grow", "many"), "cannot be 'many'"),
        (("control", "rate_limit", "proj.add"), "more arguments; usage: control rate_limit <task_name>"),
        (("control", "revoke"), "needs more arguments"),
    ):
        code, out, err = words(*wrong)
        assert (code, out) == (2, "") and why in err, wrong
    assert words("control", "terminate", "SIGKILL", "x", *here)[1].endswith("terminate: tasks unknown\n")
    assert words("control", "revoke_by_stamped_headers", "k=v", *here)[0] == 0
    assert words("control", "add_consumer", "mail", *here)[1].endswith("add consumer mail\n")
    assert cli("inspect", "double", "4", *here)[:2] == (0, "->  w1@h: OK\n    8\n\n1 node online.\n")
    assert words("control", "shutdown", *here) == [0, "->  w1@h: OK\n    shutdown asked for\n", ""]
    assert worker.wait() == 0
    assert control.ping(timeout=0.05) == []

# SPDX-License-Identifier: MIT
"""The signals of a worker: in which process, in which order, with which arguments."""

from __future__ import annotations

import os
from typing import Any, Dict, List

import pytest
from waiting import wait_until

SOURCE = """
    import json, os
    from miniq import MiniQ, signals

    app = MiniQ("proj")

    def listen(name):
        def hear(signal, sender, **given):
            shown = {key: value if isinstance(value, (int, str, type(None))) else type(value).__name__
                     for key, value in given.items()}
            line = [name, os.getpid(), sender if isinstance(sender, str) else type(sender).__name__, shown]
            with open("heard", "a") as file:
                file.write(json.dumps(line) + "\\n")
        getattr(signals, name).connect(hear, weak=False)

    for name in (
        "celeryd_init", "celeryd_after_setup", "import_modules", "worker_init", "worker_process_init",
        "worker_process_shutdown", "worker_ready", "worker_shutting_down", "worker_shutdown",
        "task_received", "task_prerun", "task_postrun", "task_success", "task_failure", "task_retry",
        "task_rejected", "setup_logging" if os.environ.get("OWN_LOGGING") else "after_setup_logger",
    ):
        listen(name)

    if os.environ.get("CONCURRENCY"):
        @signals.celeryd_init.connect(weak=False)
        def configure(sender, instance, conf, options, **_):
            conf.worker_concurrency = int(os.environ["CONCURRENCY"])
            conf.task_default_queue = "chosen"

    @signals.worker_ready.connect(weak=False)
    def broken(**_):
        raise RuntimeError("a receiver may fail")

    @app.task
    def add(x, y):
        return x + y

    @app.task(acks_late=True)
    def refuse():
        from miniq.exceptions import Reject
        raise Reject("no")
    """


def heard(lines: Any) -> "List[Any]":
    import json

    return [json.loads(line) for line in lines("heard")]


@pytest.mark.parametrize("method", ["fork", "spawn"] if hasattr(os, "fork") else ["spawn"])
def test_signals_come_in_order_in_the_right_process_with_their_arguments(
    worker_process: Any, client: Any, lines: Any, method: str
) -> None:
    worker = worker_process(SOURCE, "-c", "1", "-n", "w@here", "--pool-start-method", method)
    assert client.run("add", 2, 3) == 5
    client.error_of(client.send("add", 2, "a"))
    client.error_of(client.send("refuse"))
    [child] = worker.children
    assert worker.stop() == 0
    found = heard(lines)
    parents = [entry[0] for entry in found if entry[1] == worker.pid]
    children = [entry[0] for entry in found if entry[1] == child]
    life = [name for name in parents if not name.startswith("task_")]
    assert life == [
        "import_modules", "celeryd_init", "celeryd_after_setup", "after_setup_logger", "worker_init",
        "worker_ready", "worker_shutting_down", "worker_shutdown",
    ]  # fmt: skip
    assert [name for name in parents if name.startswith("task_")] == ["task_received"] * 3 + ["task_rejected"]
    if method == "spawn":
        assert children[:2] == ["import_modules", "after_setup_logger"]
        del children[:2]
    assert children == [
        "worker_process_init",
        "task_prerun", "task_success", "task_postrun",
        "task_prerun", "task_failure", "task_postrun",
        "task_prerun", "task_failure", "task_postrun",
        "worker_process_shutdown",
    ]  # fmt: skip
    told: Dict[str, Any] = {entry[0]: entry[2:] for entry in found}
    assert told["celeryd_init"] == ["w@here", {"instance": "Worker", "conf": "Settings", "options": "dict"}]
    assert told["celeryd_after_setup"] == ["w@here", {"instance": "Worker", "conf": "Settings"}]
    assert told["worker_init"] == told["worker_ready"] == told["worker_shutdown"] == ["Worker", {}]
    assert told["worker_shutting_down"] == ["w@here", {"sig": "SIGTERM", "how": "Warm", "exitcode": 0}]
    assert told["worker_process_shutdown"] == ["NoneType", {"pid": child, "exitcode": 0}]
    assert told["task_received"] == ["w@here", {"request": "Request"}]
    assert told["task_rejected"] == ["w@here", {"message": "Message", "exc": None}]
    assert told["task_success"] == ["add", {"result": 5, "runtime": "float"}]
    assert worker.log.count("RuntimeError: a receiver may fail") == 1


def test_receiver_of_celeryd_init_configures_the_worker(worker_process: Any, client: Any, lines: Any) -> None:
    worker = worker_process(SOURCE, env={"CONCURRENCY": "3"})
    assert "3 at once" in worker.log and "queues   chosen" in worker.log
    if os.name == "posix":
        wait_until(lambda: len(worker.children) == 3)
    assert client.run("add", 2, 3, queue="chosen") == 5


def test_receiver_of_setup_logging_is_in_charge(worker_process: Any, client: Any, lines: Any) -> None:
    worker = worker_process(SOURCE, "-c", "1", env={"OWN_LOGGING": "1"})
    assert client.run("add", 2, 3) == 5
    worker.stop()
    assert "received" not in worker.log
    [entry] = [entry for entry in heard(lines) if entry[0] == "setup_logging"]
    assert entry[3] == {"loglevel": 20, "logfile": None, "format": entry[3]["format"], "colorize": None}

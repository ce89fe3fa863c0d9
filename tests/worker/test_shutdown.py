# SPDX-License-Identifier: MIT
"""How a worker ends: warm, cold, soft, at once; what runs, what waits, and what it says."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import time
from typing import Any

import pytest
from waiting import wait_until
from workers import is_alive

from miniq import states
from miniq.exceptions import WorkerLostError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="ends workers by signals")

SOURCE = """
    import os, time
    from miniq import MiniQ

    app = MiniQ("proj")

    def hold(name):
        open(f"held-{name}", "w").close()
        while not os.path.exists("release"):
            time.sleep(0.01)
        return name

    app.task(hold, name="proj.early")
    app.task(hold, name="proj.late", acks_late=True)

    @app.task
    def add(x, y):
        return x + y
    """


def is_held(tmp_path: Any, *names: str) -> bool:
    return all((tmp_path / f"held-{name}").exists() for name in names)


@pytest.mark.parametrize(
    ("name", "to_group"), [("SIGTERM", False), ("SIGINT", False), ("SIGTERM", True), ("SIGINT", True)]
)
def test_first_signal_finishes_what_runs_and_hands_back_the_rest(
    worker_process: Any, client: Any, tmp_path: Any, name: str, to_group: bool
) -> None:
    worker = worker_process(SOURCE, "-c", "1", "--prefetch-multiplier", "3")
    running = client.send("early", "one")
    wait_until(lambda: is_held(tmp_path, "one"))
    waiting = [client.send("add", number, 0) for number in range(4)]
    wait_until(lambda: client.waiting() == (2, 0, 3))
    number = getattr(signal, name)
    if to_group:
        # As `timeout` and some init programs do it: to the process, and to the group it is in.
        os.kill(worker.pid, number)
        os.killpg(worker.pid, number)
    else:
        worker.send(number)
    worker.wait_for(f"Shutdown (warm) by {name}: 1 tasks running.")
    second = worker_process(None, "-c", "1")
    began = time.monotonic()
    assert [result.get(timeout=10) for result in waiting] == [0, 1, 2, 3]
    assert time.monotonic() - began < 1
    (tmp_path / "release").touch()
    assert worker.wait() == 0
    assert running.get(timeout=5) == "one"
    assert worker.log.count("Shutdown") == 1
    assert "leaves: 1 finished, 2 handed back, 0 lost." in worker.log
    assert second.stop() == 0


@pytest.mark.parametrize("signals", [("SIGTERM", "SIGINT"), ("SIGQUIT",)], ids=["twice", "quit"])
def test_cold_shutdown_fails_early_tasks_and_hands_back_late_ones(
    worker_process: Any, client: Any, tmp_path: Any, signals: Any
) -> None:
    worker = worker_process(SOURCE, "-c", "2")
    early, late = client.send("early", "early"), client.send("late", "late")
    wait_until(lambda: is_held(tmp_path, "early", "late"))
    children = worker.children
    for name in signals:
        worker.send(getattr(signal, name))
        worker.wait_for(f"by {name}: 2 tasks running.")
    assert worker.wait() == 1
    assert f"Task proj.late[{late.id}] was cut off by the shutdown and goes back to its queue" in worker.log
    assert "leaves: 0 finished, 1 handed back, 1 lost." in worker.log
    assert isinstance(client.error_of(early), WorkerLostError)
    assert client.waiting() == (1, 0, 0)
    assert not any(map(is_alive, children))
    (tmp_path / "release").touch()
    worker_process(None, "-c", "1")
    assert late.get(timeout=10) == "late"


def test_cold_shutdown_that_loses_nothing_leaves_with_0(
    worker_process: Any, client: Any, tmp_path: Any
) -> None:
    worker = worker_process(SOURCE, "-c", "1")
    client.send("late", "late")
    wait_until(lambda: is_held(tmp_path, "late"))
    worker.send(signal.SIGQUIT)
    assert worker.wait() == 0
    assert client.waiting() == (1, 0, 0)


def test_soft_shutdown_waits_so_long_and_no_longer(worker_process: Any, client: Any, tmp_path: Any) -> None:
    source = SOURCE.replace('MiniQ("proj")', 'MiniQ("proj", worker_soft_shutdown_timeout=0.4)')
    for name in ("SIGTERM", "SIGQUIT"):
        worker = worker_process(source, "-c", "1")
        client.send("late", name)
        wait_until(lambda: is_held(tmp_path, name))  # noqa: B023 - called at once
        began = time.monotonic()
        worker.send(getattr(signal, name))
        assert worker.wait() == 0
        assert 0.4 <= time.monotonic() - began < 5
        assert f"Shutdown (warm) by {name}: 1 tasks" in worker.log
        assert "Shutdown (cold) by the end of 0.4 s: 1 tasks" in worker.log
        client.app.producer.transport.purge("celery")


def test_remapped_term_means_quit_and_a_third_signal_ends_at_once(
    worker_process: Any, client: Any, tmp_path: Any
) -> None:
    worker = worker_process(SOURCE, "-c", "1", env={"REMAP_SIGTERM": "SIGQUIT"})
    client.send("late", "one")
    wait_until(lambda: is_held(tmp_path, "one"))
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0
    assert "Shutdown (cold) by SIGQUIT" in worker.log
    # Solo: the task holds the main thread, only the third signal is stronger.
    source = (
        SOURCE
        + """
    @app.task
    def stubborn():
        open("held-two", "w").close()
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
    """
    )
    pid_file = tmp_path / "worker.pid"
    worker = worker_process(source, "-P", "threads", "-Q", "solo", "--pidfile", str(pid_file))
    client.send("stubborn", queue="solo")
    wait_until(lambda: is_held(tmp_path, "two"))
    worker.send(signal.SIGINT)
    worker.wait_for("Shutdown (warm) by SIGINT: 1 tasks running.")
    os.kill(worker.pid, signal.SIGSTOP)
    for name in ("SIGTERM", "SIGHUP"):
        worker.send(getattr(signal, name))
    os.kill(worker.pid, signal.SIGCONT)
    assert worker.wait() == 1
    assert not pid_file.exists()


def test_shutdown_while_the_broker_is_locked_settles_as_soon_as_it_is_free(
    worker_process: Any, client: Any, tmp_path: Any
) -> None:
    worker = worker_process(SOURCE, "-c", "2", "--prefetch-multiplier", "2")
    results = [client.send("early", number) for number in range(4)]
    wait_until(lambda: client.waiting() == (0, 0, 4))
    wait_until(lambda: is_held(tmp_path, "0", "1"))
    db = sqlite3.connect(tmp_path / "queue.db", timeout=10, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    (tmp_path / "release").touch()
    worker.send(signal.SIGTERM)
    worker.wait_for("stayed locked by another process")
    assert worker.exitcode is None
    db.execute("ROLLBACK")
    db.close()
    assert worker.wait() == 0
    assert " reached again after" in worker.log
    assert "leaves: 2 finished, 2 handed back, 0 lost." in worker.log
    assert [result.get(timeout=5) for result in results[:2]] == [0, 1]
    assert client.waiting() == (2, 0, 0)


def test_broker_locked_for_a_while_loses_and_repeats_nothing(
    worker_process: Any, client: Any, tmp_path: Any
) -> None:
    worker = worker_process(SOURCE, "-c", "2")
    held = client.send("early", "one")
    wait_until(lambda: is_held(tmp_path, "one"))
    db = sqlite3.connect(tmp_path / "queue.db", timeout=10, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    (tmp_path / "release").touch()
    worker.wait_for("this worker keeps its 1 outcomes and tries again")
    db.execute("COMMIT")
    db.close()
    assert held.get(timeout=10) == "one"
    assert client.run("add", 2, 3) == 5
    worker.wait_for(" reached again after")
    assert worker.log.count("tries again") == 1


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "--pid", "--fork", "true"], stderr=subprocess.DEVNULL).returncode != 0,
    reason="needs a process namespace of its own",
)
def test_as_process_1_it_obeys_signals_and_collects_orphans(
    program: Any, client: Any, tmp_path: Any, sqlite_url: str
) -> None:
    source = f"""
    import os, subprocess, sys, time
    from miniq import MiniQ
    from miniq.signals import worker_ready

    app = MiniQ("proj", broker={sqlite_url!r})

    @app.task
    def orphan():
        # Its parent, a shell, ends at once; what remains belongs to process 1.
        subprocess.run(["sh", "-c", "sleep 0.1 & exit 0"], stdout=subprocess.DEVNULL)
        return os.getppid()

    @app.task
    def zombies():
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with open(f"/proc/{{name}}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    found.append(name)
        return found
    """
    import sys
    import textwrap

    from workers import environment

    (tmp_path / "proj.py").write_text(textwrap.dedent(source))
    command = [sys.executable, "-m", "miniq", "-A", "proj", "worker", "-l", "INFO", "-c", "1"]
    worker = program(
        ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *command], env=environment(tmp_path)
    )
    assert client.run("orphan") == 1
    assert "(pid 1)" in worker.log
    wait_until(lambda: client.run("zombies") == [], pause_s=0.2)
    [inner] = worker.children
    os.kill(inner, signal.SIGTERM)
    assert worker.wait() == 0
    assert "Shutdown (warm) by SIGTERM" in worker.log


def test_state_of_a_task_cut_off_is_never_left_started(
    worker_process: Any, client: Any, tmp_path: Any
) -> None:
    worker = worker_process(
        SOURCE.replace('MiniQ("proj")', 'MiniQ("proj", task_track_started=True)'), "-c", "1"
    )
    result = client.send("early", "one")
    wait_until(lambda: result.state == states.STARTED)
    worker.send(signal.SIGQUIT)
    assert worker.wait() == 1
    assert result.state == states.FAILURE

# SPDX-License-Identifier: MIT
"""``miniq health``: what a worker shows of itself, what is said of it, and what a look costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
from waiting import wait_until
from workers import ROOT, environment

from miniq import health
from miniq.cli.health import is_asked
from miniq.cli.health import main as run_alone
from miniq.cli.main import main

APP = "from miniq import MiniQ\napp = MiniQ('proj')\n"
#: A look every few seconds is to cost little; the machine of a test may be busy.
GOAL_MS = 100


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Any) -> Path:
    """The folder of the health files of this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Path(health.default_folder())


@pytest.fixture
def ask(folder: Path, capsys: Any) -> Callable[..., Tuple[int, str, str]]:
    """Run ``miniq health ...`` in this process."""

    def ask(*args: str) -> Tuple[int, str, str]:
        code = main(["health", *args])
        return (code, *capsys.readouterr())

    return ask


def show(node: str, state: str = health.CONSUMING, age_s: float = 0.0, **changes: Any) -> Path:
    path = health.default_path(node)
    health.HealthFile(path, node).show(state, time.time() - age_s, time.monotonic() - age_s)
    record = {**json.loads(Path(path).read_text()), **changes}
    Path(path).write_text(json.dumps(record))
    return Path(path)


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("health", True),
        ("-q -A proj health --json", True),
        ("--workdir health worker", False),
        ("-A=x worker health", False),
        ("worker -n health", False),
        ("", False),
    ],
)
def test_command_is_recognized_without_the_parser(words: str, asked: bool) -> None:
    assert is_asked(words.split()) is asked


def test_nobody_there_is_code_69_and_says_where_was_looked(ask: Any, folder: Path) -> None:
    for args, where in (((), str(folder)), (("-n", "a@h"), "a@h"), (("--health-file", "/no/x"), "/no/x")):
        code, out, err = ask(*args)
        assert (code, out) == (69, "")
        assert err == f"Error: no worker found: there is no health file {'of' if args else 'in'} {where}\n"


def test_all_workers_are_looked_at_or_the_one_that_is_named(ask: Any) -> None:
    show("good@h")
    assert ask() == (0, ask()[1], "") and "worker good@h" in ask()[1] and ": healthy: consuming" in ask()[1]
    show("stuck@h", age_s=60)
    code, out, _ = ask()
    assert code == 1 and "stuck@h" in out and "not healthy: its loop did not turn for 60 s (consuming)" in out
    assert ask("-n", "good@h")[0] == 0
    assert ask("--max-age", "100")[0] == 0
    code, out, _ = ask("--json")
    assert code == 1
    told = [(one["node"], one["healthy"]) for one in json.loads(out)]
    assert told == [("good@h", True), ("stuck@h", False)]


@pytest.mark.parametrize(
    ("changes", "args", "code", "said"),
    [
        ({"state": health.NO_BROKER, "broker_away_since": time.time() - 5}, (), 0, "healthy: no broker for "),
        ({"state": health.NO_BROKER}, ("--consuming",), 1, "it takes no messages (no broker)"),
        ({"state": health.STARTING}, ("--consuming",), 1, "it takes no messages (starting)"),
        ({"turn_mono": time.monotonic() + 1e6}, (), 1, "its process is gone"),
        ({"pid": 2**31 - 1}, (), 1, "its process is gone"),
    ],
)
def test_what_is_wrong_is_said(
    ask: Any, changes: Dict[str, Any], args: Tuple[str, ...], code: int, said: str
) -> None:
    show("w@h", **changes)
    got, out, _ = ask(*args)
    assert got == code and said in out, out


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="this system does not tell")
def test_process_that_has_ended_is_gone_though_nobody_collected_it(ask: Any) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        show("w@h", pid=process.pid)
        code, out, _ = ask()
    assert code == 1 and "its process is gone" in out


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"pid": "x"}', "\x00\xff"])
def test_file_that_is_none_of_ours_is_no_worker(ask: Any, tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.health"
    path.write_text(text)
    assert ask("--health-file", str(path))[0] == 69


def test_app_may_be_called_as_the_command_is(folder: Path, capsys: Any) -> None:
    assert run_alone(["-A", "health", "--workdir", "health", "health", "--json"]) == 69
    assert "no worker found" in capsys.readouterr().err


def test_node_name_makes_a_safe_file_name_and_left_over_files_go(folder: Path) -> None:
    path = show("a/../b c@h", pid=2**31 - 1)
    living = show("w@h")
    assert path.parent == folder and path.name == "a_.._b_c@h.health"
    health.remove_left_over()
    assert not path.exists() and living.exists()


def test_folder_comes_and_goes_with_its_files(folder: Path) -> None:
    one, other = (health.HealthFile(health.default_path(node), node) for node in ("one@h", "other@h"))
    one.show(health.CONSUMING, 0.0, 0.0)
    one.remove()
    assert not folder.exists()
    other.show(health.CONSUMING, 0.0, 0.0)
    one.show(health.CONSUMING, 0.0, 0.0)
    other.remove()
    assert [path.name for path in folder.iterdir()] == ["one@h.health"]


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs root to own things")
def test_folder_of_another_user_is_not_used(folder: Path) -> None:
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        health.default_path("w@h")


def look(*args: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "miniq", "-A", "nowhere", "health", *args],
        cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=30,
    )  # fmt: skip


def test_worker_shows_its_life_and_a_look_loads_nothing_else(
    worker_process: Any, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    temporary = {"TMPDIR": str(tmp_path)}
    worker = worker_process(APP, "-P", "solo", "-n", "w@h", env=temporary)
    times: List[float] = []
    for _ in range(3):
        began_mono = time.monotonic()
        seen = look("--consuming", **temporary)
        times.append(time.monotonic() - began_mono)
        assert seen.returncode == 0, seen
    assert f"worker w@h (pid {worker.pid}): healthy: consuming" in seen.stdout
    tell(f"miniq health takes {min(times) * 1000:.0f} ms here (goal: {GOAL_MS})")
    loaded = look(**temporary, PYTHONPROFILEIMPORTTIME="1").stderr
    ours = {line.rpartition("|")[2].strip() for line in loaded.splitlines() if "miniq" in line}
    assert ours == {"miniq", "miniq.cli", "miniq.health", "miniq.cli.health"}

    if hasattr(signal, "SIGSTOP"):
        worker.send(signal.SIGSTOP)
        try:
            wait_until(lambda: "did not turn" in look("--max-age", "0.2", **temporary).stdout)
        finally:
            worker.send(signal.SIGCONT)
    wait_until(lambda: look(**temporary).returncode == 0)
    assert worker.stop() == 0
    assert look(**temporary).returncode == 69

    worker = worker_process(None, "-P", "solo", "-n", "killed@h", env=temporary)
    worker.kill()
    seen = look("-n", "killed@h", **temporary)
    assert seen.returncode == 1 and "its process is gone" in seen.stdout
    path = tmp_path / "own.health"
    worker = worker_process(
        None, "-P", "solo", "--health-file", str(tmp_path / "%n.health"), "-n", "own@h", env=temporary
    )
    assert json.loads(path.read_text())["state"] == "consuming"
    worker_process(None, "-P", "solo", "--health-file=", "-n", "none@h", env=temporary)
    assert look("-n", "none@h", **temporary).returncode == 69


def test_worker_without_broker_is_healthy_but_does_not_consume(worker_process: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "w.health")
    source = "from miniq import MiniQ\napp = MiniQ('proj', broker='redis://localhost:1/0')\n"
    worker = worker_process(source, "-P", "solo", "--health-file", path, wait=False)
    worker.wait_for("Cannot connect to the broker")
    record = wait_until(lambda: (health.read(path) or {}).get("broker_away_since") and health.read(path))
    assert record is not None and record["state"] == health.NO_BROKER
    assert main(["health", "--health-file", path]) == 0
    assert main(["health", "--health-file", path, "--consuming"]) == 1
    worker.stop()
    assert not os.path.exists(path)


def test_beat_shows_its_life_too(program: Any, tmp_path: Path, sqlite_url: str) -> None:
    (tmp_path / "proj.py").write_text(APP)
    env = environment(tmp_path, MINIQ_BROKER_URL=sqlite_url)
    path = tmp_path / "beat.health"
    command = [sys.executable, "-m", "miniq", "-A", "proj", "beat", "--health-file", str(path)]
    beat = program(command, env=env)
    wait_until(lambda: health.read(str(path)), what=lambda: beat.log)
    record = health.read(str(path))
    assert record is not None and (record["kind"], record["state"]) == ("beat", health.SENDING)
    assert main(["health", "--health-file", str(path), "--consuming"]) == 0
    assert beat.stop() == 0
    assert not path.exists()

# SPDX-License-Identifier: MIT
"""The commands beat and schedule: what they print, and with which code they end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from workers import Program, environment

from miniq import MiniQ
from miniq.cli.main import main

SOURCE = """
from miniq import MiniQ
from miniq.schedules import crontab

app = MiniQ("proj")

@app.task(name="proj.add")
def add(x, y):
    return x + y

app.conf.beat_schedule = {
    "nightly": {"task": "proj.add", "schedule": crontab(minute=30, hour=2), "args": (1, 2)},
    "often": {"task": "proj.add", "schedule": 0.2, "args": (1, 2)},
}
"""

Inside = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def inside(tmp_path: Path, sqlite_url: str, monkeypatch: Any, capsys: Any) -> Iterator[Inside]:
    """Run the command line in this process."""
    app = MiniQ("proj", broker=sqlite_url)
    app.task(name="proj.add")(lambda x, y: x + y)
    app.conf.beat_schedule = {"nightly": {"task": "proj.add", "schedule": 3600.0, "args": (1, 2)}}
    monkeypatch.chdir(tmp_path)

    def inside(*args: str) -> "tuple[int, str, str]":
        code = main(args, app=app)
        out, err = capsys.readouterr()
        return code, out, err

    yield inside
    app.close()


def test_beat_runs_until_it_is_told_to_stop(
    program: Callable[..., Program], tmp_path: Path, sqlite_url: str
) -> None:
    (tmp_path / "proj.py").write_text(SOURCE)
    env = environment(tmp_path, MINIQ_BROKER_URL=sqlite_url)
    miniq = [sys.executable, "-m", "miniq", "-A", "proj"]
    beat = program([*miniq, "beat", "-l", "INFO", "--pidfile", "beat.pid"], env=env)
    beat.wait_for("Scheduler: Sending due task often (proj.add)")
    assert f"beat (pid {beat.pid})" in beat.log and f"state    {sqlite_url}" in beat.log
    assert (tmp_path / "beat.pid").read_text() == f"{beat.pid}\n"
    second = program([*miniq, "beat", "--pidfile", "beat.pid"], env=env)
    listed = program([*miniq, "schedule", "list", "--json", "--next", "2"], env=env)
    assert second.wait() == 73 and "which is alive" in second.log
    assert listed.wait() == 0
    rows = {row["name"]: row for row in json.loads(listed.log)}
    assert rows["often"]["runs"] > 0 and len(rows["nightly"]["next"]) == 2
    assert rows["nightly"]["next"][0].endswith("T02:30:00+00:00")

    app = MiniQ("proj", broker=sqlite_url)
    with app.schedules as schedules:
        schedules.pause("often")
        beat.send(signal.SIGTERM)
        assert beat.wait() == 0
        assert "beat: Shutting down..." in beat.log and not (tmp_path / "beat.pid").exists()
        # What was paused stays so over a restart.
        before = schedules.records()["often"]
        again = program([*miniq, "beat", "-l", "INFO"], env=env)
        again.wait_for("beat: Starting...")
        again.send(signal.SIGINT)
        assert again.wait() == 0 and schedules.records()["often"].runs == before.runs
    app.close()


def test_beat_waits_for_a_server_that_is_down(program: Callable[..., Program], tmp_path: Path) -> None:
    (tmp_path / "proj.py").write_text(SOURCE)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"redis://:secret@127.0.0.1:{unused.getsockname()[1]}/0"
        env = environment(tmp_path, MINIQ_BROKER_URL=url)
        beat = program([sys.executable, "-m", "miniq", "-A", "proj", "beat", "-l", "INFO"], env=env)
        beat.wait_for("trying again, nothing is lost meanwhile")
        assert beat.stop() == 0
        assert "secret" not in beat.log
        command = [sys.executable, "-m", "miniq", "-A", "proj", "schedule", "list"]
        ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30)
        assert ended.returncode == 1 and "connection refused" in ended.stderr
        assert "secret" not in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["-S", "persistant"], "did you mean persistent"),
        (["-S", "no.module:Scheduler"], "there is no module 'no"),
        (["-S", "miniq.schedules:crontab"], "'miniq.schedules:crontab' is no scheduler"),
        (["-l", "loud"], "unknown log level 'loud'"),
    ],
)
def test_values_beat_cannot_start_with_are_explained(inside: Inside, args: Any, said: str) -> None:
    code, _, err = inside("beat", *args)
    assert code == 1 and said in err and "Traceback" not in err


def test_interval_that_is_none_is_a_wrong_command_line(inside: Inside) -> None:
    code, _, err = inside("beat", "--max-interval", "-1")
    assert code == 2 and "'-1' is not a number of seconds above 0" in err


def test_beat_needs_to_know_its_app(capsys: Any) -> None:
    assert main(["beat"]) == 1
    assert "give it with -A" in capsys.readouterr().err


def test_schedule_is_listed_added_paused_run_and_removed(inside: Inside) -> None:
    code, out, _ = inside("schedule", "list", "--next", "1")
    assert code == 0 and "nightly" in out and "never" in out and "new" in out
    more = ["-k", '{"z": 1}', "--queue", "q", "--expires", "60", "--catch-up", "skip"]
    assert (
        inside("schedule", "add", "hourly", "proj.add", "--cron", "0 * * * *", "-a", "[1, 2]", *more)[0] == 0
    )
    assert inside("schedule", "add", "sunrise", "proj.add", "--solar", "sunrise", "48.85", "2.35")[0] == 0
    assert (
        inside("schedule", "add", "often", "proj.add", "--every", "10", "--relative", "-a", "[1, 2]")[0] == 0
    )
    rows = {row["name"]: row for row in json.loads(inside("schedule", "list", "--json")[1])}
    hourly = rows["hourly"]
    assert hourly["args"] == [1, 2] and hourly["kwargs"] == {"z": 1} and hourly["catch_up"] == "skip"
    assert hourly["options"] == {"queue": "q", "expires": 60.0} and len(hourly["next"]) == 5
    assert rows["sunrise"]["schedule"] == "sunrise at 48.85 N, 2.35 E" and len(rows["sunrise"]["next"]) == 5
    assert rows["often"]["schedule"] == "every 10 seconds by the clock"
    assert inside("schedule", "pause", "hourly") == (0, "hourly: paused\n", "")
    row = next(row for row in json.loads(inside("schedule", "list", "--json")[1]) if row["name"] == "hourly")
    assert row["state"] == "paused" and row["next"] == []
    assert inside("schedule", "resume", "hourly")[0] == 0
    code, out, _ = inside("schedule", "run-now", "often")
    assert code == 0 and len(out.strip()) == 36
    assert json.loads(inside("queues", "--json")[1])[0]["ready"] == 1
    code, _, err = inside("schedule", "run-now", "sunrise")
    assert code == 1 and "'sunrise' cannot be sent" in err
    for name in ("hourly", "sunrise", "often"):
        assert inside("schedule", "remove", name)[0] == 0
    assert [row["name"] for row in json.loads(inside("schedule", "list", "--json")[1])] == ["nightly"]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["pause", "nightli"], 1, "did you mean 'nightly'?"),
        (["remove", "nightly"], 1, "is in the code"),
        (["add", "nightly", "t", "--every", "5"], 1, "already"),
        (["add", "x", "t", "--cron", "99 * * * *"], 1, "minute '99' is out of range"),
        (["add", "x", "t", "--cron", "* * *"], 1, "crontab"),
        (["add", "x", "t", "--every", "-5"], 2, "'-5' is not a number of seconds above 0"),
        (["add", "x", "t", "--every", "5", "--priority", "999"], 2, "'999' is not a priority: 0 to 255"),
        (["add", "x", "t", "--every", "5", "--expires", "nan"], 2, "'nan' is not a number of seconds"),
        (["add", "x", "t", "--solar", "sunrize", "1", "2"], 1, "sunrise"),
        (["add", "x", "t", "--solar", "sunrise", "north", "2"], 1, "north"),
        (["add", "x", "t", "--every", "5", "-a", "{}"], 1, "--args must be a JSON array"),
        (["add", "x", "t", "--every", "5", "--cron", "* * * * *"], 2, "not allowed with"),
        (["add", "x", "t"], 2, "one of the arguments --every --cron --solar is required"),
        (["add", "x", "t", "--every", "5", "--catch-up", "al"], 2, "--catch-up"),
        (["list", "--next", "0"], 2, "from 1 to 1000"),
        (["lst"], 2, "did you mean 'list'"),
        ([], 2, "ACTION"),
    ],
)
def test_what_is_wrong_with_a_change_is_said(inside: Inside, args: Any, code: int, said: str) -> None:
    found, _, err = inside("schedule", *args)
    assert (found, said in err) == (code, True), err
    assert "Traceback" not in err


def test_scheduler_that_keeps_its_entries_itself_says_so(inside: Inside, capsys: Any) -> None:
    class Theirs:
        def __init__(self, app: Any, **_: Any) -> None:
            pass

        def tick(self) -> float:
            return 1.0

        def close(self) -> None:
            pass

    app = MiniQ("proj", broker="memory://theirs", beat_scheduler=Theirs)
    assert main(["schedule", "list"], app=app) == 1
    assert "keeps its entries itself" in capsys.readouterr().err

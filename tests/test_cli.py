# SPDX-License-Identifier: MIT
"""The command line: finding the app, flags, pid file, banner, the small commands, what it says when not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Callable, List, Optional

import pytest
from storing import store
from waiting import wait_until
from workers import environment

from miniq import MiniQ, __version__
from miniq.cli.main import main
from miniq.result import GroupResult

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path, sqlite_url: str) -> Run:
    """Run ``python -m miniq ...`` in the test's folder and return how it ended."""

    def run(*args: str, env: Optional["dict[str, str]"] = None, stdin: str = "") -> Any:
        variables = environment(tmp_path, **{"MINIQ_BROKER_URL": sqlite_url, **(env or {})})
        variables["PYTHONWARNINGS"] = "default"
        command = [sys.executable, "-m", "miniq", *args]
        return subprocess.run(
            command, cwd=tmp_path, env=variables, input=stdin, capture_output=True, text=True, timeout=30
        )

    return run


@pytest.fixture
def inside(
    tmp_path: Path, sqlite_url: str, monkeypatch: Any, capsys: Any, make_app: Any
) -> Callable[..., "tuple[int, str, str]"]:
    """Run the command line in this process: quick, for all that needs no process of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    app = make_app("cli")

    def inside(*args: str) -> "tuple[int, str, str]":
        code = main(args, app=app)
        out, err = capsys.readouterr()
        return code, out, err

    return inside


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


# -- without a command, help, typing errors -------------------------------------------------------


def test_without_a_command_help_is_shown_and_the_code_is_2(run: Run) -> None:
    ended = run()
    assert ended.returncode == 2
    assert "usage: python -m miniq" in ended.stdout and "examples:" in ended.stdout
    assert run("--version").stdout == f"miniq {__version__}\n"


@pytest.mark.parametrize("command", ["", "worker", "call", "result", "purge", "queues", "dead"])
def test_help_is_readable_and_shows_examples(inside: Any, command: str) -> None:
    code, out, err = inside(*filter(None, [command]), "--help")
    assert code == 0 and err == ""
    assert "usage: python -m miniq" in out
    assert max(map(len, out.splitlines())) <= 120
    assert "example" in out
    assert "%%" not in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["wrker"], "did you mean 'worker'?"),
        (["worker", "--concurency", "2"], "unknown argument '--concurency': did you mean --concurrency?"),
        (["worker", "--pool-start-method", "forkk"], "'forkk' is not one of fork, forkserver, spawn"),
        (["worker", "-O", "faire"], "did you mean 'fair'?"),
        (["worker", "-A", "proj"], "it goes before the command, as in python -m miniq -A ... worker"),
        (["worker", "-c", "0"], "'0' is not a whole number from 1 up"),
        (["worker", "-c", "two"], "argument -c/--concurrency: 'two' is not a whole number"),
        (["worker", "--time-limit", "-1"], "'-1' is not a number of seconds above 0"),
        (["worker", "--soft-time-limit", "nan"], "'nan' is not a number of seconds"),
        (["worker", "--autoscale", "3,2,1"], "'3,2,1' is not MAX,MIN"),
        (["worker", "--autoscale", "0"], "is not MAX,MIN"),
        (["worker", "--prefetch-multiplier", "-1"], "'-1' is not a whole number from 0 up"),
        (["call"], "the following arguments are required: task"),
        (["call", "x", "--wait", "nan"], "'nan' is not a number of seconds from 0 up"),
        (["result", "x", "--watch", "--timeout=-1"], "'-1' is not a number of seconds from 0 up"),
        (["queues", "--watch", "0"], "'0' is not a number of seconds above 0"),
        (["status", "-t", "inf"], "'inf' is not a number of seconds from 0 up"),
        (["dead", "list", "--limit", "-3"], "'-3' is not a whole number from 1 up"),
        (["dead", "lst"], "did you mean 'list'?"),
        (["--brokr=x", "queues"], "unknown argument '--brokr=x': did you mean --broker?"),
        (["-b", "redis://u:secret@h", "quues"], "did you mean 'queues'?"),
    ],
)
def test_wrong_command_line_is_explained_with_code_2(inside: Any, args: List[str], said: str) -> None:
    code, out, err = inside(*args)
    assert code == 2 and out == ""
    assert said in err, err
    assert "--help" in err and "Traceback" not in err and "secret" not in err


# -- finding the app ------------------------------------------------------------------------------

APP = "from miniq import MiniQ\n{name} = MiniQ({main!r})\n"


def test_app_is_found_by_celerys_rules(run: Run, tmp_path: Path) -> None:
    from miniq.cli.main import load_app

    app, celery, other = (APP.format(name=name, main=name) for name in ("app", "celery", "other"))
    write(tmp_path, "one.py", app + celery)
    write(tmp_path, "two.py", other + celery)
    write(tmp_path, "three.py", other)
    write(tmp_path, "pkg/__init__.py", "from .celery import queue\n")
    write(tmp_path, "pkg/celery.py", APP.format(name="queue", main="queue"))
    write(tmp_path, "deep/__init__.py", APP.format(name="other", main="own"))
    write(tmp_path, "deep/celery.py", APP.format(name="app", main="sub"))
    write(tmp_path, "deep/tasks.py", APP.format(name="second", main="second"))
    sys.path.insert(0, str(tmp_path))
    try:
        found = {
            name: load_app(name, True).main
            for name in ("one", "one:celery", "two", "three", "three:other", "pkg", "deep", "deep.tasks",
                         "deep.tasks:second", "deep.tasks.second")
        }  # fmt: skip
    finally:
        sys.path.remove(str(tmp_path))
        for name in ("one", "two", "three", "pkg", "pkg.celery", "deep", "deep.celery", "deep.tasks"):
            sys.modules.pop(name, None)
    assert found == {
        "one": "app", "one:celery": "celery", "two": "celery", "three": "other", "three:other": "other",
        "pkg": "queue", "deep": "sub", "deep.tasks": "second", "deep.tasks:second": "second",
        "deep.tasks.second": "second",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "-A nowhere: there is no module 'nowhere'"),
        ("nowhere:app", "there is no module 'nowhere'"),
        ("empty", "-A empty: the module has no app"),
        ("good:ap", "good has no 'ap' (did you mean 'app'?)"),
        ("good:number", "-A good:number: this is int, not an app"),
    ],
)
def test_app_that_cannot_be_found_is_explained(run: Run, tmp_path: Path, name: str, said: str) -> None:
    write(tmp_path, "empty.py", "x = 1\n")
    write(tmp_path, "good.py", APP.format(name="app", main="good") + "number = 1\n")
    ended = run("-A", name, "worker")
    assert ended.returncode == 1
    assert said in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_of_this_name\n", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("from os import nothing_of_this_name\n", "ImportError: cannot import name"),
        ("def broken(:\n", "SyntaxError"),
        ("1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_error_inside_the_users_module_shows_its_traceback(
    run: Run, tmp_path: Path, text: str, said: str
) -> None:
    write(tmp_path, "broken/__init__.py", "")
    write(tmp_path, "broken/tasks.py", text)
    write(tmp_path, "proj.py", "import broken.tasks\n" + APP.format(name="app", main="proj"))
    ended = run("-A", "proj", "worker")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr and said in ended.stderr and "tasks.py" in ended.stderr


@pytest.mark.parametrize(
    "how", ["app.conf.include = {}", "app.conf.imports = {}", "app.autodiscover_tasks({})"]
)
def test_error_inside_an_included_module_shows_its_traceback(run: Run, tmp_path: Path, how: str) -> None:
    write(tmp_path, "broken/__init__.py", "")
    write(tmp_path, "broken/tasks.py", "import nothing_of_this_name\n")
    names = ["broken"] if "autodiscover" in how else ["broken.tasks"]
    write(tmp_path, "proj.py", APP.format(name="app", main="proj") + how.format(names))
    ended = run("-A", "proj", "worker")
    assert ended.returncode == 1
    assert "No module named 'nothing_of_this_name'" in ended.stderr and "tasks.py" in ended.stderr


def test_module_that_does_not_exist_is_named_in_one_line(run: Run, tmp_path: Path) -> None:
    write(tmp_path, "proj.py", APP.format(name="app", main="proj"))
    ended = run("-A", "proj", "worker", "-I", "proj_tasks")
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines() == [
        "Error: there is no module 'proj_tasks', which is to be imported"
    ]
    ended = run("worker")
    assert ended.returncode == 1 and "give it with -A" in ended.stderr


# -- the worker's flags ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["-s", "file"], "belong to -B"),
        (["-P", "thread"], "did you mean threads?"),
        (["-n", "%x@host"], "unknown '%x'"),
        (["-l", "loud"], "unknown log level 'loud'"),
        (["-X", "nothing"], "cannot leave out queue 'nothing'"),
        (["--time-limit", "1", "--soft-time-limit", "2"], "is never reached"),
        (["-P", "no.module:Pool"], "there is no module 'no"),
    ],
)
def test_values_a_worker_cannot_start_with_are_explained(inside: Any, args: List[str], said: str) -> None:
    code, _, err = inside("worker", *args)
    assert code == 1 and said in err, err
    assert "Traceback" not in err


def test_log_file_that_cannot_be_opened_is_explained_and_one_without_effect_too(
    run: Run, tmp_path: Path
) -> None:
    app = APP.format(name="app", main="proj")
    write(tmp_path, "proj.py", app)
    for name, said in (("no/folder/x.log", "cannot open the log file"), ("%z.log", "unknown '%z'")):
        ended = run("-A", "proj", "worker", "-f", name)
        assert ended.returncode == 1 and said in ended.stderr and "Traceback" not in ended.stderr
    write(tmp_path, "proj.py", "import logging\nlogging.basicConfig()\n" + app)
    ended = run("-A", "proj", "-b", "sqlite:///no/file.db", "worker", "-f", "x.log")
    assert ended.returncode == 1 and "--logfile=x.log has no effect" in ended.stderr
    assert not (tmp_path / "x.log").exists()


def test_bad_settings_and_brokers_are_explained_without_the_password(run: Run, tmp_path: Path) -> None:
    write(tmp_path, "proj.py", APP.format(name="app", main="proj") + "app.conf.task_acks_latee = True\n")
    ended = run("-A", "proj", "-b", "redsi://user:hunter2@host/0", "worker")
    assert ended.returncode == 1
    assert "hunter2" not in ended.stderr and "did you mean" in ended.stderr
    assert "Warning: " in ended.stderr and "task_acks_late" in ended.stderr
    write(tmp_path, "proj.py", APP.format(name="app", main="proj") + "app.conf.worker_concurrency = '5'\n")
    ended = run("-A", "proj", "worker")
    assert ended.returncode == 1 and "worker_concurrency" in ended.stderr


def test_banner_names_everything_and_hides_passwords(
    worker_process: Any, tmp_path: Path, sqlite_url: str
) -> None:
    source = """
    from miniq import MiniQ
    from miniq.exceptions import UnknownSettingWarning
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownSettingWarning)
        app = MiniQ("proj", worker_prefetch_multiplyer=3)

    @app.task
    def add(x, y):
        return x + y
    """
    worker = worker_process(source, "-P", "threads", "-c", "3", "-n", "mail@%n", "-Q", "a,b")
    host = re.escape(os.uname().nodename.partition(".")[0]) if hasattr(os, "uname") else ".*"
    log = worker.log
    assert re.search(
        rf"^miniq {re.escape(__version__)}: worker mail@{host} \(pid {worker.pid}\)$", log, re.MULTILINE
    )
    assert "  pool     ThreadPool, 3 at once\n" in log
    assert "  queues   a, b\n" in log and "  tasks    proj.add\n" in log
    assert f"  broker   {sqlite_url}\n" in log
    assert "  warning  " in log and "worker_prefetch_multiplier" in log
    from miniq.cli.main import build_parser
    from miniq.cli.worker import banner

    app = MiniQ("masked", broker="memory://x", set_as_current=False)
    shown = app.worker(pool="solo")
    app.conf.broker_url = "redis://user:hunter2@host/0"
    text = banner(shown, build_parser().parse_args(["worker"]))
    shown.loop.close()
    assert "hunter2" not in text and "redis://user:**@host/0" in text


def test_pid_file_is_held_replaced_and_refused(worker_process: Any, run: Run, tmp_path: Path) -> None:
    source = "from miniq import MiniQ\napp = MiniQ('proj')\n"
    pattern, path = str(tmp_path / "%n.pid"), tmp_path / "w.pid"
    stale = subprocess.Popen([sys.executable, "-c", ""])
    stale.wait()
    path.write_text(f"{stale.pid}\n")
    args = ("-P", "solo", "-n", "w@h", "--pidfile", pattern)
    worker = worker_process(source, *args)
    assert path.read_text() == f"{worker.pid}\n"
    assert "was left by a process that is gone; replaced" in worker.log
    refused = run("-A", "proj", "worker", *args)
    assert refused.returncode == 73
    assert f"belongs to process {worker.pid}, which is alive" in refused.stderr
    assert path.read_text() == f"{worker.pid}\n"
    worker.stop()
    assert not path.exists()
    # A worker that was killed leaves it; in a container the next one may even have the same number.
    path.write_text("no number")
    worker_process(None, *args).stop()
    refused = run("-A", "proj", "worker", "--pidfile", str(tmp_path / "no" / "w.pid"))
    assert refused.returncode == 73 and "cannot make the pid file" in refused.stderr
    refused = run("-A", "proj", "worker", "--pidfile", str(tmp_path))
    assert refused.returncode == 73


def test_configuration_by_environment_command_line_and_module(
    run: Run, tmp_path: Path, sqlite_url: str
) -> None:
    write(tmp_path, "proj.py", APP.format(name="app", main="proj"))
    write(tmp_path, "settings.py", f"broker_url = 'sqlite:///{tmp_path}/config.db'\n")
    mine = f"sqlite:///{tmp_path}/mine.db"
    for args, env, name in (
        ([], {}, "queue.db"),
        ([], {"MINIQ_BROKER_URL": "", "CELERY_BROKER_URL": mine}, "mine.db"),
        (["-b", mine], {}, "mine.db"),
        (["--config", "settings"], {}, "config.db"),
        (["--config", "settings", "-b", mine], {}, "mine.db"),
    ):
        for path in tmp_path.glob("*.db*"):
            path.unlink()
        ended = run("-A", "proj", *args, "call", "proj.add", env=env)
        assert ended.returncode == 0, ended.stderr
        assert [path.name for path in tmp_path.glob("*.db")] == [name]
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    ended = run("--workdir", str(folder), "-b", "sqlite:///here.db", "call", "add")
    assert ended.returncode == 0 and (folder / "here.db").exists()
    ended = run("--workdir", str(tmp_path / "none"), "queues")
    assert ended.returncode == 1 and "--workdir" in ended.stderr


# -- the small commands ---------------------------------------------------------------------------


def test_call_result_queues_and_purge(inside: Any, worker_process: Any, run: Run) -> None:
    code, out, _ = inside("call", "proj.add", "-a", "[2, 3]", "--countdown", "60")
    assert code == 0 and re.fullmatch(r"[0-9a-f-]{36}\n", out)
    inside("call", "proj.add", "-k", '{"x": 1}', "--queue", "mail", "--priority", "5")
    code, out, _ = inside("queues")
    assert code == 0
    assert [line.split()[:4] for line in out.splitlines()] == [
        ["queue", "ready", "waiting", "unacked"],
        ["celery", "0", "1", "0"],
        ["mail", "1", "0", "0"],
    ]
    code, out, _ = inside("queues", "--json")
    assert [size["queue"] for size in json.loads(out)] == ["celery", "mail"]
    ended = run("purge", stdin="no\n")
    assert ended.returncode == 1 and "Nothing was deleted." in ended.stdout
    code, out, _ = inside("purge", "-f", "-Q", "mail, celery", "-X", "mail")
    assert (code, out) == (0, "celery: 1 deleted\n")
    ended = run("purge", "-Q", "mail", "--json", stdin="yes\n")
    assert ended.returncode == 0 and json.loads(ended.stdout) == {"mail": 1}
    assert "Really? [yes/no]" in ended.stderr
    code, out, err = inside("purge", "-f", "-Q", "maill", "--json")
    assert code == 1 and json.loads(out) == {"maill": 0} and "there is no queue maill: did you mean" in err
    assert inside("purge", "-f", "-X", "celery")[0] == 1

    source = """
    from miniq import MiniQ
    app = MiniQ("proj")

    @app.task
    def add(x, y):
        return x + y
    """
    worker_process(source, "-P", "threads", "-c", "1")
    ended = run("call", "proj.add", "-a", "[2, 3]", "--wait", "10")
    task_id, value = ended.stdout.split()
    assert value == "5"
    assert inside("result", task_id) == (0, "SUCCESS: 5\n", "")
    code, out, _ = inside("call", "proj.add", "-a", "[2, 3]", "--wait", "10", "--json")
    told = json.loads(out)
    assert code == 0 and told == {"id": told["id"], "state": "SUCCESS", "result": 5}
    code, out, err = inside("call", "proj.add", "-a", "[2]", "--wait", "10", "--json")
    assert code == 1 and json.loads(out)["state"] == "FAILURE" and "the task failed: TypeError" in err
    code, out, _ = inside("result", task_id, "--json")
    assert json.loads(out) == {"id": task_id, "state": "SUCCESS", "result": 5, "traceback": None}
    ended = run("call", "proj.add", "-a", '[2, "a"]', "--wait", "10")
    assert ended.returncode == 1 and "the task failed: TypeError" in ended.stderr
    task_id = ended.stdout.strip()
    code, out, _ = inside("result", task_id, "--traceback")
    assert code == 0 and "Traceback (most recent call last)" in out
    code, out, _ = inside("result", "nobody")
    assert code == 0 and out.startswith("PENDING")


def test_watch_follows_tasks_and_saved_groups(
    inside: Any, program: Any, make_app: Any, tmp_path: Path, sqlite_url: str
) -> None:
    app = make_app("proj")
    error = {"exc_type": "ValueError", "exc_message": ["no"], "exc_module": "builtins"}
    store(app, "good", "SUCCESS", 5)
    store(app, "bad", "FAILURE", error)
    store(app, "half", "PROGRESS", {"current": 1, "total": 2})
    for group_id, ids in (("ended", ("good", "bad")), ("going", ("good", "half"))):
        GroupResult(group_id, [app.AsyncResult(one) for one in ids], app=app).save()

    assert inside("result", "good", "--watch") == (0, "SUCCESS: 5\n", "100 %  SUCCESS  0:00\n")
    code, out, _ = inside("result", "bad", "--watch")
    assert (code, out) == (1, "FAILURE: ValueError('no')\n")
    code, out, err = inside("result", "half", "--watch", "--timeout", "0.01")
    assert (code, out) == (1, "PROGRESS: {'current': 1, 'total': 2}\n")
    assert err.splitlines()[0] == "50 %  1/2  PROGRESS  0:00"
    code, out, err = inside("result", "ended", "--watch", "--json")
    told = {"id": "ended", "state": "FAILURE", "result": [5, "ValueError('no')"], "traceback": None}
    assert (code, json.loads(out)) == (1, told) and "2/2  FAILURE, 1 failed" in err
    code, out, err = inside("result", "going", "--watch", "--timeout", "0")
    assert (code, out, err) == (1, "STARTED: None\n", "75 %  1/2  STARTED  0:00\n")

    variables = environment(tmp_path, MINIQ_BROKER_URL=sqlite_url)
    watching = program([sys.executable, "-m", "miniq", "result", "half", "--watch"], env=variables)
    watching.wait_for("50 %")
    watching.send(signal.SIGINT)
    assert watching.wait() == 130 and "Traceback" not in watching.log


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["call", "x", "-a", "[1"], "--args '[1' is not JSON"),
        (["call", "x", "-a", "{}"], "--args must be a JSON array"),
        (["call", "x", "-k", "[]"], "--kwargs must be a JSON object"),
        (["call", "x", "--eta", "tomorrow"], "eta"),
        (["call", "x", "--expires", "whenever"], "expires"),
        (["call", "x", "--priority", "900"], "priority"),
        (["call", "x", "--serializer", "jason"], "jason"),
        (["call", "x", "--wait", "0.01"], "did not end within"),
        (["call", ""], "its name is empty"),
        (["result", ""], "its id is empty"),
        (["-b", "", "queues"], "broker_url: the URL on the command line is empty"),
        (["dead", "replay"], "dead replay: which?"),
        (["dead", "drop", "77"], "no dead letter with id 77"),
        (["-b", "sqlite:///no/such/folder/x.db", "queues"], "does not exist"),
    ],
)
def test_commands_that_fail_say_why_with_code_1(inside: Any, args: List[str], said: str) -> None:
    code, _, err = inside(*args)
    assert code == 1
    assert said in err and "Traceback" not in err, err


def test_dead_letters_are_listed_replayed_and_dropped(
    inside: Any, worker_process: Any, run: Run, tmp_path: Path
) -> None:
    for number in range(3):
        inside("call", "proj.unknown", "-a", f"[{number}]")
    worker = worker_process("from miniq import MiniQ\napp = MiniQ('proj')\n", "-P", "solo")
    wait_until(lambda: len(inside("dead", "list")[1].splitlines()) == 4)
    worker.stop()
    code, out, _ = inside("dead", "list", "--json", "--limit", "2")
    newest, middle = json.loads(out)
    assert newest["args"] == "[2]" and newest["task"] == "proj.unknown"
    assert "NotRegistered" in newest["reason"]
    code, out, _ = inside("dead", "show", newest["id"])
    assert code == 0 and "proj.unknown" in out and "[2]" in out and "[1]" not in out
    assert inside("dead", "drop", newest["id"]) == (0, "1 dropped\n", "")
    assert inside("dead", "replay", middle["id"])[1] == "1 back in their queues\n"
    assert inside("dead", "replay", "all")[1] == "1 back in their queues\n"
    assert inside("queues")[1].splitlines()[1].split()[:2] == ["celery", "2"]


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_reader_that_stops_early_is_no_error(tmp_path: Path) -> None:
    # Nobody reads from the first moment on.
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen(
        [sys.executable, "-m", "miniq", "--help"],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.close(writing)
        assert process.communicate(timeout=20) == (None, "")
    assert process.returncode in (0, 1)


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("queues >&-", 0, ""),
        ("purge <&-", 1, ""),
        ("queues <&- >&- 2>&-", 0, ""),
        ("queues >/dev/full", 1, "Error: cannot write: No space left on device\n"),
    ],
)
def test_streams_that_are_closed_or_full_are_no_error_of_the_program(
    tmp_path: Path, sqlite_url: str, command: str, code: int, said: str
) -> None:
    if "/dev/full" in command and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    env = environment(tmp_path, MINIQ_BROKER_URL=sqlite_url)
    line = f"exec {sys.executable} -m miniq {command}"
    ended = subprocess.run(
        ["sh", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (code, said)


def test_names_that_the_terminal_cannot_show_are_written_as_escapes(run: Run) -> None:
    assert run("call", "x", "--queue", "größe").returncode == 0
    ended = run("queues", env={"PYTHONIOENCODING": "ascii"})
    assert ended.returncode == 0 and "gr\\xf6\\xdfe" in ended.stdout

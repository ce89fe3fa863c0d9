# SPDX-License-Identifier: MIT
"""report, list, graph, shell, logtool, upgrade, completion, queues --watch: what they print and return."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
from waiting import wait_until
from workers import environment

from miniq import __version__
from miniq.cli.logtool import entries
from miniq.cli.main import COMMANDS, build_parser, main
from miniq.cli.upgrade import rewritten

Ended = Tuple[int, str, str]


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: Any, capsys: Any) -> Callable[..., Ended]:
    """Run the command line in this process."""
    monkeypatch.chdir(tmp_path)

    def inside(*words: str, app: Any = None) -> Ended:
        code = main(words, app=app)
        return (code, *capsys.readouterr())

    return inside


def test_commands_are_told_by_help_and_a_known_one_loads_its_own_module_alone(tmp_path: Path) -> None:
    subparsers: Any = build_parser()._subparsers
    assert set(COMMANDS) == set(subparsers._group_actions[0].choices)
    code = "import sys; from miniq.cli.main import main; main({!r}); print(*sys.modules)"
    env = environment(tmp_path)
    for words, used, unused in (
        (["-b", "memory://", "queues"], "miniq.cli.commands", {"miniq.cli.worker", "miniq.cli.events"}),
        (["logtool", "debug"], "miniq.cli.logtool", {"miniq.cli.commands", "miniq.cli.amqp"}),
    ):
        ended = subprocess.run(
            [sys.executable, "-c", code.format(words)], env=env, input="", capture_output=True, text=True
        )
        loaded = ended.stdout.split()
        assert used in loaded and not unused & set(loaded), ended
    known, everything = build_parser("queues"), build_parser()
    assert len(known.format_help()) < len(everything.format_help())


# -- report, list, graph -------------------------------------------------------------------------


def test_report_names_versions_and_settings_and_hides_secrets(inside: Any, make_app: Any) -> None:
    app = make_app("proj", broker="redis://u:hunter2@h/0", redis_password="hunter2", task_acks_late=True)
    code, out, err = inside("report", app=app)
    assert code == 0 and "hunter2" not in out + err
    assert f"software -> miniq:{__version__} py:" in out and "broker   -> redis://u:**@h/0" in out
    assert "task_acks_late: True" in out
    code, out, _ = inside("report", "--json", app=app)
    told = json.loads(out)
    assert code == 0 and "hunter2" not in out and told["app"] == "proj"
    assert told["settings"]["task_acks_late"] is True


def test_bindings_are_listed_as_the_settings_have_them(inside: Any, make_app: Any) -> None:
    mail = {"exchange": "media", "exchange_type": "topic", "routing_key": "m.#"}
    app = make_app(task_queues={"mail": mail})
    code, out, _ = inside("list", "bindings", app=app)
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["queue", "exchange", "type", "routing_key"], ["mail", "media", "topic", "m.#"]
    ]  # fmt: skip
    code, out, _ = inside("list", "bindings", "--json", app=app)
    assert json.loads(out)[0]["routing_key"] == "m.#"
    code, _, err = inside("list", "binding", app=app)
    assert code == 2 and "did you mean 'bindings'?" in err


def test_graph_of_a_worker_names_the_classes_that_it_would_have(inside: Any, make_app: Any) -> None:
    code, out, _ = inside("graph", "bootsteps", app=make_app(worker_pool="threads"))
    assert code == 0 and out.startswith("digraph dependencies {")
    assert '"Worker" -> "ThreadPool";' in out and '"TaskConsumer" -> "SQLiteTransport";' in out
    assert '"Commands"' in out
    out = inside("graph", "bootsteps", app=make_app(worker_enable_remote_control=False))[1]
    assert '"Worker" -> "Commands"' not in out


def test_graph_of_workers_shows_who_answers_and_69_where_nobody_does(inside: Any, make_app: Any) -> None:
    app = make_app(task_queues=["mail"])
    code, out, err = inside("graph", "workers", "-t", "0.1", app=app)
    assert (code, out) == (69, "") and "no worker answered" in err
    with app.worker(hostname="w@h", concurrency=1):
        code, out, err = inside("graph", "workers", "-t", "1", app=app)
    assert code == 0, err
    assert '"queue mail" -> "w@h";' in out


# -- shell ---------------------------------------------------------------------------------------


def test_shell_runs_what_is_piped_with_tasks_and_words(
    inside: Any, make_app: Any, monkeypatch: Any, sqlite_url: str
) -> None:
    app = make_app("proj")

    @app.task(name="proj.add")
    def add(x: int, y: int) -> int:
        return x + y

    @app.task(name="other.chain")
    def not_shown(x: int) -> int:
        return x

    def run(text: str, *flags: str) -> Ended:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return inside("shell", *flags, app=app)  # type: ignore[no-any-return]

    code, out, _ = run("print(add.name, app is celery, (add.s(1, 2) | add.s(3)).id, chain.__module__)\n")
    assert (code, out) == (0, "proj.add True None miniq.canvas\n")
    code, _, err = run("add\n1 / 0\n")
    assert code == 1 and "ZeroDivisionError" in err
    code, _, err = run("x = = 1\n")
    assert code == 1 and "SyntaxError" in err and "Traceback" not in err
    assert run("print(__name__)\n")[1] == "__main__\n"
    code, _, err = run("add\n", "--without-tasks", "--python")
    assert code == 1 and "NameError" in err
    if shutil.which("bpython") is None:
        code, _, err = run("", "--bpython")
        assert code == 1 and "bpython is not installed" in err


# -- logtool -------------------------------------------------------------------------------------

LOG = """\
banner
[2026-01-01 00:00:00,000: INFO/MainProcess] celery@h ready.
[2026-01-01 00:00:01,000: INFO/MainProcess] Task proj.add[id-1] received
[2026-01-01 00:00:01,100: INFO/ForkPoolWorker-1] Task proj.add[id-1] succeeded in 0.01s: 5
[2026-01-01 00:00:02,000: INFO/MainProcess] Received task: proj.add[id-2]
[2026-01-01 00:00:02,100: ERROR/ForkPoolWorker-1] Task proj.add[id-2] raised unexpected: ValueError('x')
Traceback (most recent call last):
  File "proj.py", line 1, in add
ValueError: x
[2026-01-01 00:00:03,000: INFO/MainProcess] Task proj.mul[id-3] received
[2026-01-01 00:00:03,100: INFO/ForkPoolWorker-1] Task proj.mul[id-3] retry: Retry in 3s
[2026-01-01 00:00:04,000: INFO/MainProcess] Task proj.mul[id-4] received
[2026-01-01 00:00:05,000: ERROR/MainProcess] consumer: Cannot connect to redis://h: refused.
[2026-01-01 00:00:06,000: INFO/MainProcess] Task proj.mul[id-5] received
[2026-01-01 00:00:06,100: WARNING/ForkPoolWorker-1] Task proj.mul[id-5] rejected: 'no'
"""


@pytest.fixture
def log(tmp_path: Path) -> str:
    path = tmp_path / "w.log"
    path.write_text(LOG)
    return str(path)


def test_logtool_counts_tasks_by_their_last_word(inside: Any, log: str) -> None:
    code, out, _ = inside("logtool", "stats", log, "--json")
    assert code == 0
    assert json.loads(out) == {
        "tasks": 5, "received": 5, "ended": 3, "succeeded": 1, "failed": 1,
        "by_name": {
            "proj.add": {"succeeded": 1, "failed": 1},
            "proj.mul": {"retried": 1, "received": 1, "rejected": 1},
        },
    }  # fmt: skip
    out = inside("logtool", "stats", log)[1]
    assert "     tasks  5\n" in out and "proj.add: 1 failed, 1 succeeded\n" in out


def test_logtool_reads_what_is_piped_whatever_its_bytes(inside: Any, monkeypatch: Any) -> None:
    data = b"[2026-01-01 00:00:03,000: INFO/MainProcess] Task proj.\xff[id-3] received\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    assert inside("logtool", "incomplete") == (0, "proj.\ufffd[id-3]\n", "")


def test_logtool_shows_errors_traces_the_rest_and_what_never_ended(
    inside: Any, log: str, monkeypatch: Any
) -> None:
    lines = LOG.splitlines()
    assert inside("logtool", "errors", log)[1].splitlines() == [lines[5], lines[12]]
    assert inside("logtool", "traces", log)[1].splitlines() == lines[5:9]
    assert inside("logtool", "incomplete", log)[1].splitlines() == ["proj.mul[id-3]", "proj.mul[id-4]"]
    assert inside("logtool", "debug", log)[1].splitlines() == [lines[1], lines[12]]
    monkeypatch.setattr(sys, "stdin", io.StringIO(LOG))
    assert json.loads(inside("logtool", "incomplete", "--json")[1])[0] == {"id": "id-3", "task": "proj.mul"}
    code, _, err = inside("logtool", "stats", "no.log")
    assert code == 1 and err == "Error: cannot read no.log: No such file or directory\n"
    assert inside("logtool", "stat")[0] == 2


def test_logtool_understands_the_log_of_this_very_worker(
    inside: Any, make_app: Any, worker_process: Any, tmp_path: Path
) -> None:
    source = """
    from miniq import MiniQ
    app = MiniQ("proj")

    @app.task
    def div(x, y):
        return x / y
    """
    worker = worker_process(source, "-P", "solo")
    app = make_app("proj")
    app.send_task("proj.div", (1, 2)).get(timeout=10)
    app.send_task("proj.div", (1, 0)).get(timeout=10, propagate=False)
    worker.stop()
    counts: Dict[str, int] = {}
    for entry in entries(worker.log.splitlines(keepends=True)):
        counts[entry.state] = counts.get(entry.state, 0) + 1
    assert (counts["received"], counts["succeeded"], counts["failed"]) == (2, 1, 1)


# -- upgrade -------------------------------------------------------------------------------------

OLD = """\
# BROKER_URL is said twice
BROKER_URL = 'amqp://h'  # é
CELERY_TASK_SERIALIZER = "json"
if True:
    CELERYD_CONCURRENCY = 4; CELERY_RESULT_BACKEND = BROKER_URL
conf = {'CELERY_ACKS_LATE': True, "other": "CELERY_ACKS_LATE is late"}
OWN = 1
"""


@pytest.mark.parametrize(
    ("with_prefix", "expected"),
    [
        (False, ["broker_url", "task_serializer", "worker_concurrency", "result_backend", "task_acks_late"]),
        (True, ["CELERY_BROKER_URL", "CELERY_TASK_SERIALIZER", "CELERY_WORKER_CONCURRENCY",
                "CELERY_RESULT_BACKEND", "CELERY_TASK_ACKS_LATE"]),
    ],
)  # fmt: skip
def test_old_names_become_new_ones_and_all_else_stays(with_prefix: bool, expected: List[str]) -> None:
    text, changes = rewritten(OLD, with_prefix)
    url, serializer, concurrency, backend, late = expected
    assert text == textwrap.dedent(f"""\
        # BROKER_URL is said twice
        {url} = 'amqp://h'  # é
        {serializer} = "json"
        if True:
            {concurrency} = 4; {backend} = {url}
        conf = {{'{late}': True, "other": "CELERY_ACKS_LATE is late"}}
        OWN = 1
        """)
    assert set(changes.values()) <= set(expected)
    assert rewritten(text, with_prefix) == (text, {})


def test_upgrade_keeps_the_old_file_and_says_what_it_did(inside: Any, tmp_path: Path) -> None:
    path = tmp_path / "celeryconfig.py"
    path.write_text(OLD, encoding="utf-8")
    code, out, err = inside("upgrade", "settings", str(path))
    assert code == 0 and out == f"{path}: 5 names changed\n" and "BROKER_URL -> broker_url" in err
    assert (tmp_path / "celeryconfig.py.orig").read_text(encoding="utf-8") == OLD
    assert inside("upgrade", "settings", str(path)) == (0, f"{path}: nothing to change\n", "")
    path.write_text(OLD, encoding="utf-8")
    (tmp_path / "celeryconfig.py.orig").unlink()
    assert inside("upgrade", "settings", str(path), "--django", "--no-backup")[0] == 0
    assert sorted(one.name for one in tmp_path.iterdir()) == ["celeryconfig.py"]
    path.write_text("def (:\n")
    code, _, err = inside("upgrade", "settings", str(path))
    assert code == 1 and "is not Python" in err
    code, _, err = inside("upgrade", "settings", "no.py")
    assert code == 1 and err == "Error: no.py: No such file or directory\n"


# -- completion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_for_completion_is_what_its_shell_understands(
    inside: Any, shell: str, tmp_path: Path
) -> None:
    code, out, _ = inside("completion", shell, "--name", "mq")
    assert code == 0 and "--max-tasks-per-child" in out.replace("-l max", "--max") and "--detached" not in out
    if shutil.which(shell) is not None:
        done = subprocess.run([shell, "-n"], input=out, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    if shell == "bash" and shutil.which("bash") is not None:
        ask = "COMP_WORDS=({}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _mq; echo ${{COMPREPLY[@]}}\n"
        lines = ["mq work", "mq -A proj worker --po", "mq --ver", "mq dead re", "mq worker --logfile x.l",
                 "mq control pool_g", "mq multi sto", "mq schedule pau"]  # fmt: skip
        (tmp_path / "x.log").write_text("")
        script = out + "".join(ask.format(line) for line in lines)
        done = subprocess.run(
            ["bash", "--norc"], cwd=tmp_path, input=script, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines() == [
            "worker", "--pool --pool-start-method", "--version", "replay", "x.log", "pool_grow",
            "stop stopwait stop_verify", "pause",
        ]  # fmt: skip


# -- queues --watch, and what goes wrong with the small commands ---------------------------------


def test_watched_queues_are_told_again_and_again_until_interrupted(
    make_app: Any, program: Any, tmp_path: Path, sqlite_url: str, capsys: Any
) -> None:
    app = make_app()
    app.send_task("t", ())
    env = environment(tmp_path, MINIQ_BROKER_URL=sqlite_url)
    watching = program([sys.executable, "-m", "miniq", "queues", "--watch", "0.05"], env=env)
    watching.wait_for("celery: 1 ready, 0 waiting, 0 unacked, 0 consumers, oldest ")
    app.send_task("t", ())
    watching.wait_for("celery: 2 ready")
    with app.worker(concurrency=1, queues="other"):
        watching.wait_for("other: 0 ready, 0 waiting, 0 unacked, 1 consumers")
        assert main(["queues", "--all", "--json"], app=app) == 0
        assert ".pidbox" in capsys.readouterr().out
    assert ".pidbox" not in watching.log
    watching.send(signal.SIGINT)
    assert watching.wait() == 130 and "Traceback" not in watching.log


@pytest.mark.parametrize("store", ["sqlite_url", "redis_url", "memory", "rabbit_url"])
def test_consumers_of_queues_are_counted(store: str, make_app: Any, request: Any, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}" if store == "memory" else request.getfixturevalue(store)
    app = make_app(broker=url, task_queues=["mail"])

    def consumers() -> Dict[str, Any]:
        sizes = app.producer.transport.sizes(["mail"])
        return {size.queue: size.consumers for size in sizes if size.queue == "mail"}

    with app.worker(concurrency=1, hostname="one@h"), app.worker(concurrency=1, hostname="two@h"):
        wait_until(lambda: consumers() == {"mail": 2}, what=consumers)
    wait_until(lambda: consumers() in ({"mail": 0}, {}), what=consumers)


@pytest.mark.parametrize("url", ["amqp://u:secret@localhost:1//", "redis://u:secret@localhost:1/0"])
@pytest.mark.parametrize(
    "words",
    ["call t", "purge -f", "queues --json", "dead list", "dead drop all", "graph workers", "result x"],
)
def test_broker_that_is_down_is_one_line_and_code_1(inside: Any, url: str, words: str) -> None:
    code, out, err = inside("-b", url, "--result-backend", "redis://u:secret@localhost:1/0", *words.split())
    assert code == 1 and len(err.splitlines()) == 1, err
    assert err.startswith("Error: ") and "no server listens there" in err and "secret" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("result x -t nosuch", "there is no task 'nosuch'"),
        ("--result-backend disabled:// result x", "No result backend is configured"),
        ("call t --eta soon", "eta: not an ISO 8601 date and time: 'soon'"),
        ("call t --serializer nope", "unknown serializer 'nope'"),
        ("call t -a 5", "--args must be a JSON array"),
        ("dead show 77", "no dead letter with id 77"),
        ("dead replay", "which?"),
    ],
)
def test_wrong_names_and_values_are_one_line_and_code_1(
    inside: Any, sqlite_url: str, words: str, said: str
) -> None:
    code, out, err = inside("-b", sqlite_url, *words.split())
    assert code == 1 and out == "" and len(err.splitlines()) == 1
    assert err.startswith("Error: ") and said in err

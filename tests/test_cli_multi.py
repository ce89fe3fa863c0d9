# SPDX-License-Identifier: MIT
"""``miniq multi`` and ``--detach``: what words mean, and workers that are started, found and stopped."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

import pytest
from waiting import wait_until
from workers import environment, is_alive

from miniq.cli import daemon
from miniq.cli.main import main
from miniq.cli.multi import Misuse, nodes_of, signal_of
from miniq.exceptions import ImproperlyConfigured
from miniq.text import host_name

pytestmark = pytest.mark.skipif(os.name != "posix", reason="for Unix systems")

HOST = host_name()
APP = "from miniq import MiniQ\napp = MiniQ('proj')\n"


def commands(words: str) -> List[str]:
    """Return what starts the nodes, from the command ``worker`` on, without what all of them have."""
    found = [" ".join(node.command()) for node in nodes_of(words.split())]
    common = (" --detach", " --pidfile=%n.pid", " --logfile=%n%I.log", f"{sys.executable} -m miniq ")
    for text in common:
        found = [command.replace(text, "") for command in found]
    return [command.replace(HOST, "HOST") for command in found]


# What Celery's own parser makes of the same words.
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("2", ["worker -n celery1@HOST", "worker -n celery2@HOST"]),
        ("2 --range-prefix=w -l INFO", ["worker -n w1@HOST -l INFO", "worker -n w2@HOST -l INFO"]),
        ("a b@x -c3", ["worker -n a@HOST -c3", "worker -n b@x -c3"]),
        ("a b -n x.org -c 3", ["worker -n a@x.org -c 3", "worker -n b@x.org -c 3"]),
        ("a b --hostname=x", ["worker -n a@x", "worker -n b@x"]),
        ("a --prefix=p --suffix=s", ["worker -n pa@s"]),
        ("3 -c 3 -c:1-2 8", ["worker -n celery1@HOST -c 8", "worker -n celery2@HOST -c 8",
                             "worker -n celery3@HOST -c 3"]),
        ("a b c -c:2,3 8", ["worker -n a@HOST", "worker -n b@HOST -c 8", "worker -n c@HOST -c 8"]),
        ("a b -Q:b mail -Q x", ["worker -n a@HOST -Q x", "worker -n b@HOST -Q mail"]),
        ("a b --purge:a@%h", ["worker -n a@HOST --purge", "worker -n b@HOST"]),
        ("1 -A proj -l INFO -b redis://h", ["-A proj -b redis://h worker -n celery1@HOST -l INFO"]),
        ("1 --app=proj --no-color -- x.y=z", ["--app=proj --no-color worker -n celery1@HOST x.y=z"]),
    ],
)  # fmt: skip
def test_words_are_read_as_celery_reads_them(words: str, expected: List[str]) -> None:
    assert commands(words) == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [("-A proj", "which workers?"), ("a b -c:3 1", ":3: no such worker"), ("a -c:x 1", ":x: no such worker")],
)
def test_words_without_a_meaning_are_refused(words: str, said: str) -> None:
    with pytest.raises(Misuse, match=re.escape(said)):
        nodes_of(words.split())


def test_signals_are_found_among_the_words() -> None:
    assert signal_of(["3", "-A", "proj"]) == (signal.SIGTERM, ["3", "-A", "proj"])
    assert signal_of(["3", "-QUIT", "-c", "2"]) == (signal.SIGQUIT, ["3", "-c", "2"])
    assert signal_of(["-SIGUSR1", "3", "-9"]) == (signal.SIGKILL, ["3"])
    with pytest.raises(Misuse, match="-199: there is no such signal"):
        signal_of(["3", "-199"])


def test_commands_that_only_print(capsys: Any) -> None:
    def said(*words: str) -> Tuple[int, List[str]]:
        return main(["multi", *words]), capsys.readouterr().out.splitlines()

    assert said("names", "2") == (0, [f"celery1@{HOST}", f"celery2@{HOST}"])
    assert said("expand", "/run/%n-%h.pid", "a@x", "b@y") == (0, ["/run/a-x.pid", "/run/b-y.pid"])
    code, lines = said("show", "2", "-A", "proj")
    assert code == 0 and len(lines) == 2 and "-m miniq -A proj worker --detach -n celery1@" in lines[0]
    assert said("get", "celery2", "2", "-A", "proj") == (0, lines[1:])
    code, lines = said("help")
    assert code == 0 and any("stopwait NODES" in line for line in lines)
    assert main(["multi", "strt", "2"]) == 2
    assert "did you mean 'start'?" in capsys.readouterr().err
    assert main(["multi", "get", "x", "2"]) == 2 and main(["multi", "expand"]) == 2


Run = Callable[..., Tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, sqlite_url: str, monkeypatch: Any, capsys: Any) -> Iterator[Run]:
    """Run the command line in this process, what it starts in others; these end with the test."""
    (tmp_path / "proj.py").write_text(APP)
    (tmp_path / "broken.py").write_text(f"{APP}1 / 0\n")
    monkeypatch.chdir(tmp_path)
    for name, value in environment(tmp_path, MINIQ_BROKER_URL=sqlite_url, TMPDIR=str(tmp_path)).items():
        monkeypatch.setenv(name, value)

    def run(*words: str) -> Tuple[int, str, str]:
        code = main(words)
        return (code, *capsys.readouterr())

    yield run
    for path in tmp_path.glob("*.pid"):
        pid = daemon.read_pid(str(path))
        if pid is not None and is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_workers_are_started_found_restarted_and_stopped(run: Run, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    words = ("2", "-A", "proj", "-P", "solo", "-l", "INFO", "--pidfile=../%n.pid", "--logfile=../logs/%n.log",
             "--workdir=work")  # fmt: skip
    code, out, err = run("multi", "start", *words)
    assert code == 0, err
    assert [line.strip() for line in out.splitlines()[1:]] == [
        "> Starting nodes...", f"> celery1@{HOST}: OK", f"> celery2@{HOST}: OK"
    ]  # fmt: skip
    pids = [daemon.read_pid(str(tmp_path / f"celery{number}.pid")) for number in (1, 2)]
    for pid in pids:
        assert pid is not None and is_alive(pid) and os.getsid(pid) == pid
    log = tmp_path / "logs" / "celery1.log"
    wait_until(lambda: "ready." in log.read_text(), what=log.read_text)
    # One that runs is not started again; its own words say why.
    code, _, err = run("multi", "start", "1", *words[1:])
    assert code == 1
    assert "FAILED (exit code 73)" in err and f"belongs to process {pids[0]}" in err
    code, out, err = run("multi", "--nosplash", "restart", "1", *words[1:], "-INT")
    assert code == 0 and f"celery1@{HOST}: SIGINT -> {pids[0]}" in out, err
    assert pids[0] is not None and not is_alive(pids[0])
    assert run("multi", "stopwait", *words, "--quiet") == (0, "", "")
    assert not list(tmp_path.glob("*.pid"))
    assert "Shutdown (warm) by SIGTERM" in (tmp_path / "logs" / "celery2.log").read_text()
    code, out, _ = run("multi", "kill", *words)
    assert code == 0 and out.count("DOWN") == 2


def test_pid_of_another_process_is_not_signalled(run: Run, tmp_path: Path) -> None:
    if not os.path.isdir("/proc/self"):
        pytest.skip("this system does not tell what a process is")
    pid_file = tmp_path / "celery1.pid"
    program = "import sys; sys.stdin.read()"
    for words, is_told in (
        ([], False),
        (["-m", "miniq", "worker", "-n", "celery2@%h"], False),
        (["-m", "miniq", "worker", "-n", "celery1@%h"], True),  # started in another way
    ):
        with subprocess.Popen([sys.executable, "-c", program, *words], stdin=subprocess.PIPE) as other:
            # Until it has been started, it still shows the words of this process.
            wait_until(lambda: program.encode() in Path(f"/proc/{other.pid}/cmdline").read_bytes())
            pid_file.write_text(f"{other.pid}\n")
            assert ("DOWN" in run("multi", "kill", "1")[1]) is not is_told
            assert is_told or other.poll() is None
            assert other.stdin is not None
            other.stdin.close()
            assert other.wait(20) == (-signal.SIGKILL if is_told else 0)


def test_words_that_make_no_sense_end_with_code_2(run: Run) -> None:
    for words, said in (
        (("stopwait", "1", "--wait=soon"), "'soon' is not a number of seconds from 0 up"),
        (("stopwait", "1", "--wait=nan"), "'nan' is not a number of seconds from 0 up"),
        (("start", "0", "-A", "proj"), "which workers?"),
    ):
        code, _, err = run("multi", *words)
        assert code == 2 and said in err


@pytest.mark.parametrize(
    ("words", "expected", "said"),
    [
        ("-A nowhere worker --detach", 1, "there is no module 'nowhere'"),
        ("-A broken worker --detach", 1, "ZeroDivisionError"),
        ("-A proj worker -DE -P thread", 1, "did you mean threads?"),
        ("-A proj worker -D --executable /no/python", 1, "cannot run /no/python"),
        ("-A proj worker -D --pidfile no/x.pid", 73, "cannot make the pid file"),
        ("-A proj worker -D -f no/x.log", 1, "cannot open the log file"),
        ("-A proj events -D --dump", 1, "--detach is for --camera"),
    ],
)
def test_what_goes_wrong_at_a_detached_start_is_told_with_its_exit_code(
    run: Run, words: str, expected: int, said: str
) -> None:
    code, _, err = run(*words.split())
    assert code == expected and said in err, err


# -- becoming somebody else ----------------------------------------------------------------------

BECOME = """
import argparse, os, sys
from miniq.cli import daemon
daemon.become(argparse.Namespace(uid={uid!r}, gid={gid!r}, umask=0o27))
print(os.getuid(), os.geteuid(), os.getgid(), os.getgroups(), oct(os.umask(0)))
"""


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root may become another")
def test_root_becomes_another_user_with_his_groups_alone() -> None:
    def become(uid: Any, gid: Any) -> "subprocess.CompletedProcess[str]":
        code = BECOME.format(uid=uid, gid=gid)
        return subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)

    assert become("12345", "23456").stdout == "12345 12345 23456 [23456] 0o27\n"
    ended = become("nobody", None)
    uid, euid, gid = ended.stdout.split()[:3]
    assert uid == euid != "0" and gid != "0", ended
    assert become(None, "23456").stdout == "0 0 23456 [23456] 0o27\n"
    for user, group, said in (("no-such", None, "--uid no-such: there is no such user"),
                              (None, "no-such", "--gid no-such: there is no such group")):  # fmt: skip
        assert said in become(user, group).stderr


def test_wrong_umask_is_explained(capsys: Any) -> None:
    assert main(["worker", "--umask", "99"]) == 2
    assert "'99' is not an octal number from 0 to 777" in capsys.readouterr().err


def test_root_with_pickle_is_refused_unless_forced(monkeypatch: Any) -> None:
    monkeypatch.delenv("C_FORCE_ROOT", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 0)
    daemon.check_privileges(["json"])
    for accepted in (["json", "pickle"], ["application/x-python-serialize"]):
        with pytest.raises(ImproperlyConfigured, match="runs as root and accepts pickle"):
            daemon.check_privileges(accepted)
    monkeypatch.setenv("C_FORCE_ROOT", "1")
    daemon.check_privileges(["pickle"])
    monkeypatch.delenv("C_FORCE_ROOT")
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    daemon.check_privileges(["pickle"])


def test_program_that_gives_its_app_cannot_detach(make_app: Any, capsys: Any) -> None:
    assert main(["worker", "--detach"], app=make_app()) == 1
    assert "give it with -A" in capsys.readouterr().err


def test_daemon_options_are_the_same_for_all_commands() -> None:
    parser = argparse.ArgumentParser()
    daemon.add_arguments(parser, short="")
    options = parser.parse_args(["--detach", "--uid", "u", "--gid", "g", "--umask", "022"])
    assert (options.detach, options.uid, options.gid, options.umask) == (True, "u", "g", 0o22)

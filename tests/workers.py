# SPDX-License-Identifier: MIT
"""Programs as real processes: started, watched through their log, ended by pid with a deadline.

Every process gets a session of its own: by that is known what it left running, and nothing else is
touched.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

from waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent
POSIX = os.name == "posix"
#: Names the file that a worker of `WorkerProcess` makes when it takes messages.
READY_FILE = "MINIQ_TESTS_READY_FILE"
#: Added to the module of a worker: the signal is the fact, whatever is logged.
TELL_READY = f"""

import os as _os
import miniq.signals as _signals

@_signals.worker_ready.connect(weak=False)
def _tell_ready(**_):
    open(_os.environ[{READY_FILE!r}], "w").close()
"""


def environment(*folders: Path, **variables: str) -> Dict[str, str]:
    """Return an environment in which miniq and the modules in `folders` can be imported.

    Nothing that would configure an app is passed on, and warnings are errors.
    """
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MINIQ_", "CELERY_", "PYTHON", "COV_")) and key != "APP"
    }
    env["PYTHONPATH"] = os.pathsep.join(map(str, (*folders, ROOT)))
    env["PYTHONUNBUFFERED"] = env["PYTHONDONTWRITEBYTECODE"] = "1"
    env["PYTHONIOENCODING"] = "utf-8"
    env["PYTHONWARNINGS"] = "error"
    env["C_FORCE_ROOT"] = "1"  # containers of CI run as root; without it there is no pickle
    env.update(variables)
    return env


class Row(NamedTuple):
    """A living process as the system lists it; `session` is 0 where that cannot be told."""

    pid: int
    parent: int
    group: int
    session: int
    command: str


def processes() -> List[Row]:
    """Return all living processes, zombies left out; empty where there is neither /proc nor ps."""
    if os.path.isdir("/proc/self"):
        return _processes_in_proc()
    return _processes_by_ps() if POSIX else []


def _processes_in_proc() -> List[Row]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path("/proc", name, "stat").read_text(errors="replace")
            command = Path("/proc", name, "cmdline").read_text(errors="replace").replace("\0", " ")
        except OSError:  # ended meanwhile
            continue
        state, parent, group, session = stat.rpartition(")")[2].split()[:4]
        if state not in "ZX":
            found.append(Row(int(name), int(parent), int(group), int(session), command))
    return found


def _processes_by_ps() -> List[Row]:
    command = ["ps", "-A", "-o", "pid=,ppid=,pgid=,stat=,command="]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ps:
        assert ps.stdout is not None
        rows = [line.split(None, 4) for line in ps.stdout]
    return [
        Row(int(row[0]), int(row[1]), int(row[2]), 0, row[4])
        for row in rows
        if len(row) == 5 and int(row[0]) != ps.pid and not row[3].startswith("Z")
    ]


def children_of(pid: int) -> List[Row]:
    """Return the living children of a process."""
    return [row for row in processes() if row.parent == pid]


def is_alive(pid: int) -> bool:
    """Say whether a process exists that is not just a zombie."""
    return any(row.pid == pid for row in processes())


class Program:
    """A program that runs: its output in a file, its end within a deadline."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        name: str = "program",
        env: Optional[Mapping[str, str]] = None,
    ) -> None:
        self.command = list(command)
        self.folder = folder
        self._log_file = folder / f"{name}.log"
        with open(self._log_file, "wb") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=str(folder),
                env=dict(env if env is not None else environment(folder)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=POSIX,
            )
        self.pid = self.process.pid

    @property
    def log(self) -> str:
        """What it wrote so far, standard output and errors in one."""
        return self._log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def exitcode(self) -> Optional[int]:
        """The exit code (-n = ended by signal n), None while it runs."""
        return self.process.poll()

    @property
    def children(self) -> List[int]:
        """The pids of its living children: with the pool prefork, the pool's processes."""
        ours = children_of(self.pid)
        return sorted(child.pid for child in ours if "resource_tracker" not in child.command)

    def wait_for(self, text: str, timeout_s: float = 15.0) -> str:
        """Wait until `text` is in the log; return the log."""

        def seen() -> bool:
            return text in self.log

        def ended() -> bool:
            # Only what was written before the end counts, so the log is read once more after it.
            return seen() or self.exitcode is not None

        wait_until(ended, timeout_s, lambda: f"{text!r} in the log of {self}:\n{self.log}")
        assert seen(), f"{self} ended without {text!r} in its log:\n{self.log}"
        return self.log

    def send(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 15.0) -> int:
        """Wait for its end; return the exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self} did not end within {timeout_s:g} s:\n{self.log}") from None

    def stop(self, timeout_s: float = 15.0) -> int:
        """Ask it to end (SIGTERM) and wait; return the exit code."""
        self.process.terminate()
        return self.wait(timeout_s)

    def kill(self) -> None:
        """Kill it alone, as the kernel does when memory runs out; its children are not asked."""
        self.process.kill()
        self.process.wait()

    def clean_up(self, timeout_s: float = 10.0) -> List[str]:
        """End it and all that it started; return what had to be complained about."""
        complaints = []
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                complaints.append(f"{self} had to be killed: SIGTERM did not end it in {timeout_s:g} s")
                self.kill()
        deadline_mono = time.monotonic() + timeout_s
        while self._offspring() and time.monotonic() < deadline_mono:
            time.sleep(0.01)
        for row in self._offspring():
            complaints.append(f"{self} left behind process {row.pid}, which was killed: {row.command}")
            os.kill(row.pid, signal.SIGKILL)
        return complaints

    def _offspring(self) -> List[Row]:
        """What it started and what these started; pool children are in groups of their own."""
        return [row for row in processes() if row.pid != self.pid and self.pid in (row.group, row.session)]

    def __repr__(self) -> str:
        return f"<{' '.join(self.command[1:])} (pid {self.pid})>"


class WorkerProcess(Program):
    """``python -m miniq -A module worker ...``: exists from the moment it takes messages."""

    def __init__(
        self,
        module: str,
        args: Sequence[str],
        folder: Path,
        name: str,
        loglevel: str,
        env: Mapping[str, str],
        package: str = "miniq",
    ) -> None:
        self.module = module
        self._ready_file = folder / f"{name}.ready"
        command = [sys.executable, "-m", package, "-A", module, "worker", "-l", loglevel, *args]
        super().__init__(command, folder, name, {**env, READY_FILE: str(self._ready_file)})

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Wait until the worker takes messages."""
        wait_until(
            lambda: self._ready_file.exists() or self.exitcode is not None,
            timeout_s,
            lambda: f"{self} takes messages; its log:\n{self.log}",
        )
        assert self._ready_file.exists(), f"{self} ended with {self.exitcode} at the start:\n{self.log}"

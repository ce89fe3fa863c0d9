# SPDX-License-Identifier: MIT
"""Daemons: leaving the terminal, becoming another user, and the file that holds the process id.

``--detach`` starts the same command line anew, in a session of its own, and waits until it has done
what can fail: found its app, opened its log, taken its pid file.  What it says until then is shown, and
if it ends, its exit code is that of the command.  A new process instead of a fork: the app may have
threads and connections by the time it is known that all is well, and these do not survive one.

Source: daemon(7); Celery's ``--detach``, ``--uid``, ``--gid``, ``--umask`` and ``C_FORCE_ROOT``.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, Optional, Sequence

from .. import health
from ..exceptions import ImproperlyConfigured, MiniqError
from ..health import is_alive
from ..text import expand_file_name, node_name

EX_CANTCREAT = 73
#: Seconds a detached process gets to start; then it is left alone, whatever became of it.
START_S = 60.0
#: Where a detached process logs unless it is told.
LOG_FILE = "%n%I.log"
#: Names of the serializer that runs what a message says.
_PICKLE = {"pickle", "application/x-python-serialize"}


def add_arguments(parser: argparse.ArgumentParser, short: str = "-D") -> None:
    """Declare what all commands have that run for long; `short` is the short flag of ``--detach``."""
    add = parser.add_argument
    flags = [short, "--detach"] if short else ["--detach"]
    default = LOG_FILE.replace("%", "%%")
    add(*flags, action="store_true", help=f"run in the background (logs to {default} unless told)")
    add("--detached", action="store_true", help=argparse.SUPPRESS)
    add("--uid", metavar="USER", help="become this user (name or number) before anything is imported")
    add("--gid", metavar="GROUP", help="become this group (default: that of the user)")
    add("--umask", type=_octal, help="mask for the modes of new files, octal, as 022")
    add("--executable", metavar="FILE", help="the Python to run in the background (with --detach)")


def add_health_file(parser: argparse.ArgumentParser) -> None:
    """Declare the option of commands whose loop can be asked after."""
    text = "show here that it lives (default: one in the temporary folder; '' = nowhere)"
    parser.add_argument("--health-file", metavar="FILE", help=text)


def health_file(options: argparse.Namespace, setting: Optional[str], node: str) -> str:
    """Return the name of the health file, its format characters still in it; empty for none.

    `node` may have some, too.
    """
    given = setting if options.health_file is None else options.health_file
    if given is not None:
        return str(given)
    try:
        health.remove_left_over()
        return health.default_path(node_name(node)).replace("%", "%%")
    except OSError as error:
        print(f"Warning: no health file: {error}; name one with --health-file", file=sys.stderr)
        return ""


def _octal(text: str) -> int:
    try:
        value = int(text, 8)
    except ValueError:
        value = -1
    if not 0 <= value <= 0o777:
        raise argparse.ArgumentTypeError(f"{text!r} is not an octal number from 0 to 777, as 022")
    return value


# -- leaving the terminal ------------------------------------------------------------------------


def detach(words: Sequence[str], package: str, executable: Optional[str] = None) -> int:
    """Run the command line `words` in the background; return its exit code if it ended at once, else 0."""
    if os.name != "posix":
        raise MiniqError("--detach needs a Unix system; here, let a service manager run the command")
    command = [executable or sys.executable, "-m", package]
    command += [*words, "--detached"]
    reading, writing = os.pipe()
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing, start_new_session=True
        )
    except OSError as error:
        raise MiniqError(f"cannot run {command[0]}: {error.strerror}") from error
    finally:
        os.close(writing)
    all_said = _pass_on(reading)
    os.close(reading)
    try:
        # It closed its end of the pipe: it works, or it ends.
        return child.wait(0.2 if all_said else 0)
    except subprocess.TimeoutExpired:
        pass
    if not all_said:
        print(f"process {child.pid} is still starting after {START_S:g} s; see its log", file=sys.stderr)
    child.returncode = 0  # it stays behind on purpose: Popen is not to complain of that
    return 0


def _pass_on(reading: int) -> bool:
    """Copy what comes to standard error; say whether all came before the time was over."""
    deadline_mono = time.monotonic() + START_S
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, deadline_mono - time.monotonic()))
        if not ready:
            return False
        data = os.read(reading, 65536)
        if not data:
            return True
        sys.stderr.write(data.decode("utf-8", "replace"))
        sys.stderr.flush()


def log_file(options: argparse.Namespace) -> Optional[str]:
    """Return the log file to use: that of the command line, or the one of a detached process."""
    given: Optional[str] = options.logfile
    return LOG_FILE if given is None and options.detached else given


def log_options(app: Any, options: argparse.Namespace) -> Dict[str, Any]:
    """Return what a service's own command line and its app say of its log, for `setup_worker_logging`."""
    conf = app.conf
    return {
        "level": options.loglevel,
        "logfile": log_file(options),
        "color": False if options.no_color else conf.worker_log_color,
        "hijack": conf.worker_hijack_root_logger,
        "fmt": conf.worker_log_format,
        "task_fmt": conf.worker_task_log_format,
        "datefmt": conf.worker_log_datefmt,
        "task_datefmt": conf.worker_task_log_datefmt,
    }


@contextmanager
def on_signals(names: Iterable[str], handler: Callable[[int, Any], None]) -> Iterator[bool]:
    """Have `handler` called for those signals that this system has, while the block runs.

    Yields False, and nothing is done, outside of the main thread: there signals are the program's business.
    """
    before: Dict[int, Any] = {}
    is_ours = True
    try:
        for name in names:
            number = getattr(signal, name, None)
            if number is not None:
                before[number] = signal.signal(number, handler)
    except ValueError:
        is_ours = False
    try:
        yield is_ours
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def let_go(options: argparse.Namespace, node: str) -> None:
    """In a detached process, once it works: say no more to the terminal; what is printed goes to the log."""
    if not options.detached:
        return
    path = expand_file_name(log_file(options) or os.devnull, node)
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if log > 2:
        os.close(log)


# -- becoming somebody else ----------------------------------------------------------------------


def become(options: argparse.Namespace) -> None:
    """Take on the umask, group and user that the command line names; before the app is imported."""
    if getattr(options, "umask", None) is not None:
        os.umask(options.umask)
    user, group = getattr(options, "uid", None), getattr(options, "gid", None)
    if user is not None or group is not None:
        if not hasattr(os, "setuid"):
            raise MiniqError("--uid and --gid need a Unix system")
        _set_ids(user, group)


def _set_ids(user: Optional[str], group: Optional[str]) -> None:
    # On Unix only.
    import grp
    import pwd

    entry = None
    try:
        if user is not None:
            entry = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    except KeyError:
        if not user.isdigit():  # type: ignore[union-attr]
            raise ImproperlyConfigured(f"--uid {user}: there is no such user") from None
    try:
        gid = entry.pw_gid if entry is not None else None
        if group is not None:
            gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise ImproperlyConfigured(f"--gid {group}: there is no such group") from None
    uid = entry.pw_uid if entry is not None else None if user is None else int(user)
    if (uid is None or uid == os.getuid()) and (gid is None or gid == os.getgid()):
        return
    try:
        # In this order: who is another user may not change his groups any more.
        if gid is not None:
            if entry is not None:
                os.initgroups(entry.pw_name, gid)
            else:
                os.setgroups([gid])
            os.setgid(gid)
        if uid is not None:
            os.setuid(uid)
    except PermissionError:
        raise ImproperlyConfigured(
            f"--uid {user}, --gid {group}: only root may become somebody else" if user and group
            else f"--uid {user}: only root may become somebody else" if user
            else f"--gid {group}: only root may change the group"
        ) from None  # fmt: skip
    if uid:
        try:
            os.setuid(0)
        except PermissionError:
            return  # as it should be
        raise ImproperlyConfigured(f"--uid {user}: the rights of root were not given up")


def check_privileges(accept_content: Sequence[str]) -> None:
    """Refuse to run whatever messages say as root; ``C_FORCE_ROOT`` in the environment allows it."""
    is_root = hasattr(os, "geteuid") and 0 in (os.getuid(), os.geteuid())
    if is_root and _PICKLE & set(accept_content) and not os.environ.get("C_FORCE_ROOT"):
        raise ImproperlyConfigured(
            "a worker that runs as root and accepts pickle would do whatever any message says, as root;"
            " use --uid to become another user, or leave pickle out of accept_content"
            " (C_FORCE_ROOT=1 in the environment allows it all the same)"
        )


# -- the pid file --------------------------------------------------------------------------------


@contextmanager
def pid_file(path: Optional[str], node: str) -> Iterator[Callable[[], None]]:
    """Hold a pid file while the block runs; exit with 73 when a living process holds it.

    Yields what removes it before time.
    """
    if not path:
        yield lambda: None
        return
    path = expand_file_name(path, node)
    owner = read_pid(path)
    # Our own number: in a container each start has the same one.
    if owner is not None and owner != os.getpid() and is_alive(owner):
        raise _cannot_create(f"the pid file {path} belongs to process {owner}, which is alive")
    try:
        if os.path.exists(path):
            os.unlink(path)
            print(
                f"Warning: the pid file {path} was left by a process that is gone; replaced", file=sys.stderr
            )
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        raise _cannot_create(f"the pid file {path} was just made by another process") from None
    except OSError as error:
        raise _cannot_create(f"cannot make the pid file {path}: {error.strerror}") from None
    with os.fdopen(handle, "w") as file:
        file.write(f"{os.getpid()}\n")

    def remove() -> None:
        if read_pid(path) == os.getpid():
            os.unlink(path)

    try:
        yield remove
    finally:
        remove()


def _cannot_create(why: str) -> SystemExit:
    print(f"Error: {why}", file=sys.stderr)
    return SystemExit(EX_CANTCREAT)


def read_pid(path: str) -> Optional[int]:
    """Return the number in a pid file; None where there is none."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return int(file.read(32))
    except (OSError, ValueError):
        return None

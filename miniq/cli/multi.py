# SPDX-License-Identifier: MIT
"""``miniq multi``: starts, stops and restarts several workers of this machine, as ``celery multi`` does.

A worker is started detached (see `daemon`) and found again by its pid file; nothing runs in between.
Words are read as Celery reads them: ``--option=value``, ``-o value``, and ``-o:NODES value`` for some nodes
only, where NODES are names, numbers (the order in which they are named, from 1), or ``1-3`` after a count.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from .. import __version__
from ..exceptions import MiniqError
from ..health import is_alive
from ..text import expand_file_name, nearest, node_name, split_node_name
from .arguments import seconds_or_0
from .daemon import LOG_FILE, read_pid

PACKAGE = (__package__ or "miniq.cli").rpartition(".")[0]
PID_FILE = "%n.pid"
RANGE_PREFIX = "celery"
#: Seconds that `stopwait` and `restart` wait for workers to end, unless told.
WAIT_S = 600.0
_LOOK_INTERVAL_S = 0.05

#: Options of the program, which go before the command ``worker``; with a value, and without one.
_BEFORE = frozenset("-A --app -b --broker --result-backend --config --workdir".split())
_BEFORE_ALONE = frozenset("-C --no-color -q --quiet".split())

COMMANDS = tuple("start stop stopwait stop_verify restart kill show names get expand help".split())
DESCRIPTION = "Start and stop several workers on this machine."
EPILOG = """\
commands:
  start NODES [worker options]     start them in the background
  stop NODES [-SIGNAL]             ask them to end (TERM), and do not wait
  stopwait NODES [-SIGNAL]         the same, and wait (--wait=SECONDS, default 600); also: stop_verify
  restart NODES [worker options]   stopwait, then start
  kill NODES                       end them at once (KILL): tasks are lost, or run again
  show NODES [worker options]      print the commands that start them
  names NODES                      print their names
  get NODE NODES [worker options]  print the command that starts this one
  expand TEMPLATE NODES            print a text for each, with its %n, %h, %d, %p filled in

NODES are names, or one number: 3 means celery1 celery2 celery3 (--range-prefix=NAME changes that).
Options are --option=value or -o value, for some nodes only as -c:1-2 8 or -Q:mail@%h mail.
The pid files are --pidfile=%n.pid and the logs --logfile=%n%I.log, in the current folder, unless told.
They are how stop finds what start started: give both the same.

exit codes:
  0  done    1  a worker did not start, or did not end    2  wrong command line

examples:
  python -m miniq multi start 3 -A proj -l INFO -c 4
  python -m miniq multi start mail reports -A proj -Q:mail mail -Q:reports reports -c:2 1
  python -m miniq multi restart 3 -A proj -l INFO -c 4 --pidfile=/run/miniq/%n.pid
  python -m miniq multi stopwait 3 --pidfile=/run/miniq/%n.pid
"""


class Misuse(Exception):
    """The command line makes no sense; the text says why."""


class Node(NamedTuple):
    """A worker: its name, its options in the order they were given, and what goes to it as it is."""

    name: str
    options: Dict[str, Optional[str]]
    rest: Tuple[str, ...]

    @property
    def pid_path(self) -> str:
        """Its pid file."""
        return self.path(self.options.get("--pidfile") or PID_FILE)

    def path(self, template: str) -> str:
        """Return a file's name as the worker sees it, which may be told to change to another folder."""
        return os.path.join(self.options.get("--workdir") or "", expand_file_name(template, self.name))

    @property
    def pid(self) -> Optional[int]:
        """Its process; None where it does not run."""
        pid = read_pid(self.pid_path)
        return pid if pid is not None and is_alive(pid) and self._is_mine(pid) else None

    def _is_mine(self, pid: int) -> bool:
        """Say that the process may be this worker: another one may have got its number meanwhile."""
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().decode("utf-8", "replace").split("\0")
        except OSError:
            return True  # this system does not tell
        # By its name, however it was given: a worker that was started in another way is found, too.
        given = [after for word, after in zip(words, words[1:]) if word in ("-n", "--hostname")]
        given += [word.partition("=")[2] for word in words if word.startswith("--hostname=")]
        return self.name in words or any(node_name(name) == self.name for name in given)

    def command(self) -> List[str]:
        """Return what starts it."""
        before: List[str] = []
        after: List[str] = []
        for name, value in self.options.items():
            words = [name] if value is None else [f"{name}={value}"] if name[:2] == "--" else [name, value]
            if name in _BEFORE or name in _BEFORE_ALONE:
                before += words
            elif name != "--executable":
                after += words
        if "--pidfile" not in self.options:
            after.append(f"--pidfile={PID_FILE}")
        if not {"--logfile", "-f"} & set(self.options):
            after.append(f"--logfile={LOG_FILE}")
        python = self.options.get("--executable") or sys.executable
        words = [python, "-m", PACKAGE, *before, "worker", "--detach", "-n", self.name]
        return [*words, *after, *self.rest]


# -- reading the words ---------------------------------------------------------------------------


Values = Dict[str, Optional[str]]


def parse(words: Sequence[str]) -> Tuple[List[str], Values, Dict[str, Values], Tuple[str, ...]]:
    """Return (names, options of all, {nodes: options of these}, what follows ``--``)."""
    names: List[str] = []
    options: Values = {}
    special: Dict[str, Values] = {}
    rest: Tuple[str, ...] = ()
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "--":
            rest = tuple(words[at:])
            break
        value: Optional[str] = None
        if word.startswith("--"):
            name, equals, text = word.partition("=")
            value = text if equals else None
            if name in _BEFORE and not equals and at < len(words):  # as they are written before a command
                value = words[at]
                at += 1
        elif word.startswith("-") and len(word) > 1:
            name = word
            if at < len(words) and not words[at].startswith("-"):
                value = words[at]
                at += 1
        else:
            names.append(word)
            continue
        name, colon, nodes = name.partition(":")
        (special.setdefault(nodes, {}) if colon else options)[name] = value
    return names, options, special, rest


def nodes_of(words: Sequence[str]) -> List[Node]:
    """Return the nodes that the words name, with their options.  Raises `Misuse`."""
    names, options, special, rest = parse(words)
    take = options.pop
    hostname = take("--hostname", None) or take("-n", None)
    prefix, suffix = take("--prefix", None) or "", take("--suffix", None)
    range_prefix = take("--range-prefix", None) or RANGE_PREFIX
    if not names or names == ["0"]:
        raise Misuse("which workers? Give names, or a number of them")
    is_range = len(names) == 1 and names[0].isdigit()
    if is_range:
        names, prefix = [str(number + 1) for number in range(int(names[0]))], range_prefix
    host = (suffix if suffix is not None else hostname) or "%h"
    host = host.rpartition("@")[2]
    full = [node_name(name if "@" in name else f"{prefix}{name}@{host}") for name in names]
    own: List[Values] = [{} for _ in names]
    for key, values in special.items():
        for place in _places(key, names, full, is_range):
            own[place].update(values)
    return [Node(name, {**options, **extra}, rest) for name, extra in zip(full, own)]


def _places(key: str, names: Sequence[str], full: Sequence[str], is_range: bool) -> Iterable[int]:
    """Return the places of the nodes that the part of an option behind its colon means."""
    for part in key.split(","):
        first, dash, last = part.partition("-")
        if dash and is_range and first.isdigit() and last.isdigit():
            found = list(range(int(first) - 1, int(last)))
        elif part.isdigit():
            found = [int(part) - 1]
        else:
            wanted = node_name(part) if "@" in part else part
            found = [at for at, one in enumerate(full) if wanted in (names[at], one, split_node_name(one)[0])]
        if not found or not all(0 <= at < len(names) for at in found):
            raise Misuse(f":{key}: no such worker here; they are {', '.join(full)}")
        yield from found


def signal_of(words: Sequence[str]) -> "Tuple[signal.Signals, List[str]]":
    """Return the signal that a word like -9, -QUIT or -SIGQUIT names (else TERM), and the other words."""
    found, kept = signal.SIGTERM, []
    for word in words:
        number = None
        if word[:1] == "-" and word[1:2] != "-":
            text = word[1:]
            number = int(text) if text.isdigit() else getattr(signal, f"SIG{text.removeprefix('SIG')}", None)
        try:
            found = found if number is None else signal.Signals(number)
        except ValueError:
            raise Misuse(f"{word}: there is no such signal") from None
        if number is None:
            kept.append(word)
    return found, kept


# -- the commands --------------------------------------------------------------------------------


class Multi:
    """The commands; `say` prints for people, and nothing where --quiet was given."""

    def __init__(self, quiet: bool, verbose: bool, wait_s: float) -> None:
        self._quiet = quiet
        self._verbose = verbose
        self._wait_s = wait_s

    def say(self, text: str) -> None:
        """Print a line of progress."""
        if not self._quiet:
            print(text, flush=True)

    def start(self, words: Sequence[str]) -> bool:
        """Start all that do not run; say whether all did."""
        self.say("> Starting nodes...")
        started = [self._start(node) for node in nodes_of(words)]
        return all(started)

    def _start(self, node: Node) -> bool:
        command = node.command()
        if self._verbose:
            self.say(f"  {shlex.join(command)}")
        log = node.options.get("--logfile") or node.options.get("-f") or LOG_FILE
        for path in (node.pid_path, node.path(log)):
            folder = os.path.dirname(path)
            if folder:
                os.makedirs(folder, exist_ok=True)
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
        )
        if ended.returncode == 0:
            self.say(f"\t> {node.name}: OK")
            return True
        print(f"\t> {node.name}: FAILED (exit code {ended.returncode})", file=sys.stderr)
        for line in ended.stderr.decode("utf-8", "replace").splitlines():
            print(f"\t  {line}", file=sys.stderr)
        return False

    def stop(
        self, words: Sequence[str], verify: bool = False, number: Optional[signal.Signals] = None
    ) -> bool:
        """Send a signal to all that run; with `verify` wait for their ends, and say whether all ended."""
        given, words = signal_of(words)
        number = number or given
        self.say("> Stopping nodes...")
        told: Dict[int, str] = {}
        for node in nodes_of(words):
            pid = node.pid
            if pid is None:
                self.say(f"\t> {node.name}: DOWN")
                continue
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass  # it ended just now
            except PermissionError:
                raise MiniqError(f"{node.name}: process {pid} belongs to another user") from None
            told[pid] = node.name
            self.say(f"\t> {node.name}: {number.name} -> {pid}")
        if not verify:
            return True
        self.say(f"> Waiting for {len(told)} nodes...")
        until_mono = time.monotonic() + self._wait_s
        while told and time.monotonic() < until_mono:
            for pid in [pid for pid in told if not is_alive(pid)]:
                self.say(f"\t> {told.pop(pid)}: OK")
            if told:
                time.sleep(_LOOK_INTERVAL_S)
        for pid, name in told.items():
            print(f"\t> {name}: process {pid} still runs after {self._wait_s:g} s", file=sys.stderr)
        return not told

    def restart(self, words: Sequence[str]) -> bool:
        """Stop all, wait, and start all again."""
        _, others = signal_of(words)
        return self.stop(words, verify=True) and self.start(others)

    def kill(self, words: Sequence[str]) -> bool:
        """End all at once."""
        return self.stop(words, verify=True, number=getattr(signal, "SIGKILL", signal.SIGTERM))


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser("multi", help="start and stop several workers", epilog=EPILOG,
                                   description=DESCRIPTION)  # fmt: skip
    parser.set_defaults(run=run, needs_app=False, parser=parser, completed_words=COMMANDS)
    parser.add_argument("--nosplash", action="store_true", help="do not print the version")
    parser.add_argument("--quiet", action="store_true", dest="silent", help="print failures only")
    parser.add_argument("--verbose", action="store_true", help="print the commands that are run")
    parser.add_argument("--wait", type=seconds_or_0, default=WAIT_S, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="see below")


def run(app: Any, options: argparse.Namespace) -> int:
    """Do one command; return the exit code."""
    if os.name != "posix":
        raise MiniqError("multi needs a Unix system; here, let a service manager run the workers")
    words = list(options.words)
    flags = {"--nosplash": options.nosplash, "--quiet": options.silent, "--verbose": options.verbose}
    for flag in flags:
        flags[flag] = flags[flag] or flag in words or (options.quiet and flag != "--verbose")
        words = [word for word in words if word != flag]
    for flag, value in (("-A", options.app), ("-b", options.broker), ("--config", options.config),
                        ("--result-backend", options.result_backend)):  # fmt: skip
        words = [*words, flag, value] if value is not None else words
    name, *words = words or ["help"]
    try:
        wait_s = options.wait
        for word in [word for word in words if word.startswith("--wait=")]:
            words.remove(word)
            wait_s = seconds_or_0(word[7:])
        multi = Multi(flags["--quiet"], flags["--verbose"], wait_s)
        if name in ("start", "stop", "stopwait", "stop_verify", "restart", "kill"):
            if not flags["--nosplash"]:
                multi.say(f"{PACKAGE} multi v{__version__}")
            if name in ("stopwait", "stop_verify"):
                return 0 if multi.stop(words, verify=True) else 1
            return 0 if getattr(multi, name)(words) else 1
        return _tell(name, words, options)
    except (Misuse, argparse.ArgumentTypeError) as error:
        print(f"{options.parser.prog}: error: {error}", file=sys.stderr)
        return 2


def _tell(name: str, words: List[str], options: argparse.Namespace) -> int:
    """Do a command that only prints."""
    if name == "help":
        options.parser.print_help()
    elif name == "show":
        print("\n".join(shlex.join(node.command()) for node in nodes_of(words)))
    elif name == "names":
        print("\n".join(node.name for node in nodes_of(words)))
    elif name in ("get", "expand") and words:
        first, nodes = words[0], nodes_of(words[1:])
        if name == "expand":
            print("\n".join(expand_file_name(first, node.name) for node in nodes))
            return 0
        wanted = node_name(first) if "@" in first else first
        found = [node for node in nodes if wanted in (node.name, split_node_name(node.name)[0])]
        if not found:
            raise Misuse(f"get {first}: no such worker; there are {', '.join(node.name for node in nodes)}")
        print(shlex.join(found[0].command()))
    else:
        hint = nearest(name, COMMANDS)
        advice = f": did you mean {hint!r}?" if hint else ""
        raise Misuse(
            f"{name}: of what? see {options.parser.prog} help"
            if name in COMMANDS
            else f"{name!r} is not one of {', '.join(COMMANDS)}{advice}"
        )
    return 0

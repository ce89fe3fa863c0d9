# SPDX-License-Identifier: MIT
"""``miniq logtool``: what logs of workers tell, ours and Celery's: counts, errors, what never ended.

An entry is a line that begins with a date in brackets, and the lines after it that do not.  The last
word on a task counts: one that was retried and then succeeded has succeeded.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Tuple

from ..exceptions import MiniqError

_START = re.compile(r"\[\d{4}-\d\d-\d\d[ T]")
_TASK = re.compile(r"\] (?:Received task: |Task )(?:handler raised error: )?([^\s\[\]]+)\[([^\]\s]+)\](.*)")
#: What the text after ``name[id]`` begins with -> the state it means; None = it says nothing of that.
_STATES = (
    ("received", "received"),
    ("accepted", "received"),
    ("succeeded in", "succeeded"),
    ("raised expected", "failed"),
    ("raised unexpected", "failed"),
    ("INTERNAL ERROR", "failed"),
    ("retry", "retried"),
    ("rejected", "rejected"),
    ("ignored", "ignored"),
    ("revoked", "revoked"),
)
#: States after which nothing more is to come.
_ENDED = frozenset(("succeeded", "failed", "rejected", "ignored", "revoked"))

EPILOG = """\
commands:
  stats       how many tasks were received, ended and how, by name
  errors      the entries of level ERROR and CRITICAL, their first lines
  traces      the entries with a traceback, in full
  incomplete  tasks that were received and of whose end nothing is said
  debug       the entries that are not about a task

examples:
  python -m miniq logtool stats worker.log worker.log.1
  python -m miniq logtool incomplete --json < worker.log
"""


class Entry(NamedTuple):
    """One entry: its lines, and the task it is about, with "" for what is not said."""

    lines: List[str]
    task: str
    id: str
    state: str


def entries(lines: Iterable[str]) -> Iterator[Entry]:
    """Yield the entries of a log; lines before the first one are skipped."""
    found: List[str] = []
    for line in lines:
        line = line.rstrip("\r\n")
        if _START.match(line):
            if found:
                yield _entry(found)
            found = [line]
        elif found:
            found.append(line)
    if found:
        yield _entry(found)


def _entry(lines: List[str]) -> Entry:
    match = _TASK.search(lines[0])
    if match is None:
        return Entry(lines, "", "", "")
    name, task_id, rest = match.groups()
    if "] Received task: " in lines[0]:
        return Entry(lines, name, task_id, "received")
    text = rest.strip().lstrip(":").strip()
    state = next((state for begin, state in _STATES if text.lower().startswith(begin.lower())), "")
    return Entry(lines, name, task_id, state)


def _is_error(entry: Entry) -> bool:
    head = entry.lines[0].partition("] ")[0]
    return ": ERROR" in head or ": CRITICAL" in head


def _has_traceback(entry: Entry) -> bool:
    return any(line.startswith("Traceback (") for line in entry.lines[1:])


def _is_no_task(entry: Entry) -> bool:
    return not entry.task


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "logtool", help="what workers' logs tell: counts, errors, tracebacks", epilog=EPILOG,
        description="Read logs of workers, this project's and Celery's.",
    )  # fmt: skip
    parser.set_defaults(run=run, needs_app=False)
    add = parser.add_argument
    add("action", choices=("stats", "errors", "traces", "incomplete", "debug"))
    add("files", nargs="*", metavar="FILE", help="logs, the oldest first (default: standard input)")
    add("--json", action="store_true", help="print as JSON")


def run(app: Any, options: argparse.Namespace) -> int:
    """Read logs and print what was asked for."""
    if options.action in ("stats", "incomplete"):
        _print_tasks(options)
        return 0
    wanted = {"errors": _is_error, "traces": _has_traceback, "debug": _is_no_task}[options.action]
    for entry in _read(options.files):
        if wanted(entry):
            shown = entry.lines if options.action == "traces" else entry.lines[:1]
            text = "\n".join(shown)
            print(json.dumps({"task": entry.task, "id": entry.id, "text": text}) if options.json else text)
    return 0


def _read(files: List[str]) -> Iterator[Entry]:
    if not files:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # as the files are read
        yield from entries(sys.stdin)
    for path in files:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                yield from entries(file)
        except OSError as error:
            raise MiniqError(f"cannot read {path}: {error.strerror}") from None


def _print_tasks(options: argparse.Namespace) -> None:
    last, received = _follow(_read(options.files))
    if options.action == "incomplete":
        found = [(task_id, name) for task_id, (name, state) in last.items() if state not in _ENDED]
        if options.json:
            print(json.dumps([{"id": task_id, "task": name} for task_id, name in found]))
        else:
            for task_id, name in found:
                print(f"{name}[{task_id}]")
        return
    counts: Dict[str, Dict[str, int]] = {}
    for name, state in last.values():
        per_task = counts.setdefault(name, {})
        per_task[state] = per_task.get(state, 0) + 1
    total: Dict[str, int] = {}
    for per_task in counts.values():
        for state, count in per_task.items():
            total[state] = total.get(state, 0) + count
    summary = {"tasks": len(last), "received": received, "ended": sum(total.get(one, 0) for one in _ENDED),
               "succeeded": total.get("succeeded", 0), "failed": total.get("failed", 0)}  # fmt: skip
    if options.json:
        print(json.dumps({**summary, "by_name": counts}))
        return
    for key, count in summary.items():
        print(f"{key:>10}  {count}")
    for name in sorted(counts):
        told = ", ".join(f"{count} {state or 'unknown'}" for state, count in sorted(counts[name].items()))
        print(f"{name}: {told}")


def _follow(found: Iterable[Entry]) -> Tuple[Dict[str, Tuple[str, str]], int]:
    """Return {task id: (name, last state)}, and how many were received."""
    last: Dict[str, Tuple[str, str]] = {}
    received = 0
    for entry in found:
        if entry.state:
            received += entry.state == "received"
            last[entry.id] = (entry.task, entry.state)
    return last, received

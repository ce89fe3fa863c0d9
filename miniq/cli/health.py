# SPDX-License-Identifier: MIT
"""``miniq health``: says whether a worker lives, from the file that its loop writes.

For containers and service managers that ask every few seconds: it loads neither the app nor the
broker, nor the rest of the command line, which ``__main__`` leaves out where `is_asked`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .. import health

EX_UNAVAILABLE = 69
#: Options of the program that take a value: what follows them is no command.
_WITH_VALUE = frozenset("-A --app -b --broker --result-backend --config --workdir".split())

DESCRIPTION = """\
Say whether the workers of this user on this machine live and turn their loops.

A worker that waits for its broker is healthy, as starting it again would not bring the broker back;
with --consuming it has to take messages.  Neither the app nor the broker is loaded: options before the
command are not looked at."""
EPILOG = """\
exit codes:
  0  healthy    1  not: gone, stuck, or (--consuming) not taking messages
  2  wrong command line    69  no worker is known here

examples:
  python -m miniq health
  python -m miniq health -n mail@web1 --consuming
  python -m miniq health --health-file /run/miniq/mail.health --max-age 30 --json
"""


def command_of(words: Sequence[str]) -> Optional[str]:
    """Return the command of a command line: its first word that belongs to no option."""
    place = _place(words)
    return words[place] if place < len(words) else None


def _place(words: Sequence[str]) -> int:
    """Return where the command is; how many words there are, where there is none."""
    skip = False
    for place, word in enumerate(words):
        if skip:
            skip = False
        elif not word.startswith("-"):
            return place
        else:
            skip = word in _WITH_VALUE
    return len(words)


def is_asked(words: Sequence[str]) -> bool:
    """Say whether a command line is this command's."""
    return command_of(words) == "health"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    add = parser.add_argument
    add("-n", "--hostname", metavar="NODE", help="this worker only, by its node name (default: all)")
    add("--health-file", metavar="FILE", help="the file, where the worker was given one")
    add(
        "--max-age", type=float, default=health.MAX_AGE_S, metavar="SECONDS",
        help=f"how long a loop may take for a turn (default {health.MAX_AGE_S:g})",
    )  # fmt: skip
    add("--consuming", action="store_true", help="healthy is only one that takes messages")
    add("--json", action="store_true", help="print as JSON")


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "health", help="say whether a worker lives, without its broker", description=DESCRIPTION,
        epilog=EPILOG,
    )  # fmt: skip
    parser.set_defaults(run=lambda app, options: run(options), needs_app=False)
    add_arguments(parser)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Do the command without the rest of the command line."""
    words = sys.argv[1:] if argv is None else list(argv)
    program = f"python -m {(__package__ or 'miniq.cli').rpartition('.')[0]}"
    parser = argparse.ArgumentParser(
        prog=f"{program} health",
        description=DESCRIPTION,
        epilog=EPILOG.replace("python -m miniq", program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    return run(parser.parse_args(words[_place(words) + 1 :]))


def run(options: argparse.Namespace) -> int:
    """Print how the workers are; return the exit code."""
    found = _find(options.hostname, options.health_file)
    if not found:
        what = options.health_file or options.hostname
        where = f"of {what}" if what else f"in {health.default_folder()}"
        print(f"Error: no worker found: there is no health file {where}", file=sys.stderr)
        return EX_UNAVAILABLE
    mono, told = time.monotonic(), []
    for path, record in found:
        wrong = health.judge(record, mono, options.max_age)
        if not wrong and options.consuming and record["state"] not in (health.CONSUMING, health.SENDING):
            wrong = "it takes no messages"
        told.append({**record, "healthy": not wrong, "why": wrong, "file": path})
    if options.json:
        print(json.dumps(told))
    else:
        for one in told:
            print(_as_text(one, mono))
    return 0 if all(one["healthy"] for one in told) else 1


def _find(node: Optional[str], path: Optional[str]) -> List[Tuple[str, Dict[str, Any]]]:
    if path is not None:
        record = health.read(path)
        return [] if record is None or node not in (None, record["node"]) else [(path, record)]
    return [(path, record) for path, record in health.read_all() if node in (None, record["node"])]


def _as_text(one: Dict[str, Any], mono: float) -> str:
    words = f"{one['kind']} {one['node']} (pid {one['pid']}): "
    if one["why"]:
        return f"{words}not healthy: {one['why']} ({one['state']})"
    away = one.get("broker_away_since")
    told = f" for {time.time() - away:.0f} s" if isinstance(away, (int, float)) else ""
    return f"{words}healthy: {one['state']}{told}, last turn {mono - one['turn_mono']:.1f} s ago"

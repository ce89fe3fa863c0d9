# SPDX-License-Identifier: MIT
"""``miniq inspect``, ``control`` and ``status``: questions and commands to workers, in Celery's words."""

from __future__ import annotations

import argparse
import json
import pprint
import sys
import textwrap
from typing import Any, Dict, List, Tuple

from ..control import Reply, flatten_reply
from ..text import nearest, safe_repr
from ..worker.control import CommandInfo, Panel
from .arguments import seconds_or_0

#: sysexits.h: nobody is there to answer.
EX_UNAVAILABLE = 69

EXIT_CODES = """
exit codes:
  0  all who answered did what was asked    1  one of them could not, or the broker cannot be reached
  2  wrong command line                     69 nobody answered in time
"""
INSPECT_EPILOG = (
    """\
examples:
  python -m miniq -A proj inspect active
  python -m miniq -A proj inspect stats -d celery@box1,celery@box2 --json
  python -m miniq -A proj inspect query_task 5f1c... 77ab...
  python -m miniq -A proj inspect --list
"""
    + EXIT_CODES
)
CONTROL_EPILOG = (
    """\
examples:
  python -m miniq -A proj control rate_limit proj.add 10/m
  python -m miniq -A proj control revoke 5f1c... 77ab...
  python -m miniq -A proj control terminate SIGKILL 5f1c...
  python -m miniq -A proj control add_consumer reports -d celery@box1
  python -m miniq -A proj control shutdown
"""
    + EXIT_CODES
)
STATUS_EPILOG = "example:\n  python -m miniq -A proj status --timeout 3\n" + EXIT_CODES


def add_parsers(subparsers: Any) -> None:
    """Add the commands to the command line."""
    for name, text, epilog in (
        ("inspect", "ask workers what they do", INSPECT_EPILOG),
        ("control", "tell workers what to do", CONTROL_EPILOG),
    ):
        parser = subparsers.add_parser(name, help=text, description=f"{text.capitalize()}.", epilog=epilog)
        parser.set_defaults(run=run_remote, complain=parser.error, completed_words=sorted(_visible(name)))
        parser.add_argument("name", nargs="?", metavar="COMMAND", help="see --list")
        parser.add_argument("arguments", nargs="*", metavar="ARG", help="its arguments")
        parser.add_argument("-l", "--list", action="store_true", help="list the commands, and what they take")
        _add_options(parser)
    status = subparsers.add_parser("status", help="show which workers are online", epilog=STATUS_EPILOG)
    status.set_defaults(run=run_status)
    _add_options(status)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "-t", "--timeout", type=seconds_or_0, metavar="SECONDS",
        help="wait for answers no longer (default 1)",
    )  # fmt: skip
    add(
        "-d", "--destination", metavar="NODES",
        help="only these nodes (comma-separated); done as soon as all have answered",
    )  # fmt: skip
    add("-j", "--json", action="store_true", help="print the answers as JSON")


def _nodes(options: argparse.Namespace) -> Any:
    text = options.destination
    return None if text is None else [node.strip() for node in text.split(",") if node.strip()]


def run_status(app: Any, options: argparse.Namespace) -> int:
    """Print who is online."""
    replies = app.control.ping(_nodes(options), options.timeout or 1.0)
    if not replies:
        return _nobody()
    by_node = flatten_reply(replies)
    if options.json:
        print(json.dumps(by_node))
        return 0
    for node in sorted(by_node):
        print(f"->  {node}: OK")
    _print_count(len(by_node))
    return 0


def run_remote(app: Any, options: argparse.Namespace) -> int:
    """Send a command and print who answers what."""
    if options.app:
        app.import_modules()  # which may have commands of their own
    if options.list:
        return _list(options.command)
    try:
        info = _find(options)
        arguments = _parse(info, options)
    except SystemExit as leaving:  # what is wrong has been said
        return int(leaving.code or 0)
    timeout_s = options.timeout or max(1.0, info.default_timeout)
    replies = _send(app, info, arguments, _nodes(options), timeout_s)
    if not replies:
        kept = "; the broker keeps the revocation for workers to come" if info.name in _KEPT else ""
        return _nobody(kept)
    if options.json:
        answers: Any = flatten_reply(replies) if info.type == "inspect" else replies
        print(json.dumps(answers, default=safe_repr))
    else:
        for reply in replies:
            _print_reply(reply)
        if info.type == "inspect":
            _print_count(len(replies))
    return int(any(_is_error(value) for reply in replies for value in reply.values()))


#: Commands that hold although nobody hears them.
_KEPT = ("revoke", "terminate")


def _send(
    app: Any, info: CommandInfo, arguments: Dict[str, Any], nodes: Any, timeout_s: float
) -> List[Reply]:
    control = app.control
    found: List[Reply]
    if info.default_timeout > 1.0 and nodes is None:
        # So that nobody waits longer than those who are there take.
        nodes = sorted(flatten_reply(control.ping()))
        if not nodes:
            return []
    options = {"destination": nodes, "reply": True, "timeout": timeout_s}
    if info.name == "shutdown":
        # Nobody answers that, so those are told who have just said that they live.
        found = control.ping(nodes, timeout_s)
        if found:
            control.shutdown(sorted(flatten_reply(found)))
        return [{node: {"ok": "shutdown asked for"} for node in reply} for reply in found]
    if info.name in _KEPT:
        found = getattr(control, info.name)(**arguments, **options)
    else:
        found = control.broadcast(info.name, arguments, **options)
    return found


def _find(options: argparse.Namespace) -> CommandInfo:
    """Return the command that is meant; leave with exit code 2 where there is none."""
    kind = options.command
    known = {name: info for name, info in Panel.meta.items() if info.type == kind}
    known.update({info.alias: info for info in known.values() if info.alias})
    if options.name is None:
        options.complain(f"which command? {', '.join(sorted(_visible(kind)))}")
    if options.name in known:
        return known[options.name]
    other = Panel.meta.get(options.name)
    if other is not None:
        options.complain(f"{options.name} is a command of `{other.type}`: {other.type} {options.name} ...")
    hint = nearest(options.name, known)
    options.complain(
        f"unknown command {options.name!r}{f': did you mean {hint!r}?' if hint else '.'}"
        f" There are: {', '.join(sorted(_visible(kind)))}"
    )
    raise AssertionError("complain() does not return")


def _visible(kind: str) -> List[str]:
    return [name for name, info in Panel.meta.items() if info.type == kind and info.visible]


def _parse(info: CommandInfo, options: argparse.Namespace) -> Dict[str, Any]:
    """Return the arguments by name; leave with exit code 2 where they are wrong."""
    words = list(options.arguments)
    usage = f"usage: {info.type} {info.name} {info.signature}".rstrip()
    if len(words) < info.signature.count("<"):
        options.complain(f"{info.name} needs more arguments; {usage}")
    found: Dict[str, Any] = {}
    for (name, read), word in zip(info.args, words):
        try:
            found[name] = read(word)
        except (ValueError, TypeError) as error:
            options.complain(f"{info.name}: argument {name} cannot be {word!r}: {error}; {usage}")
    rest = words[len(info.args) :]
    if info.variadic:
        found[info.variadic] = rest
    elif rest:
        options.complain(f"{info.name} takes no argument {rest[0]!r}; {usage}")
    return found


def _list(kind: str) -> int:
    for name in sorted(_visible(kind)):
        info = Panel.meta[name]
        print(f"{name} {info.signature}".rstrip())
        print(textwrap.fill(info.help, 100, initial_indent="    ", subsequent_indent="    "))
    return 0


def _nobody(more: str = "") -> int:
    print(f"Error: No nodes replied within time constraint{more}", file=sys.stderr)
    return EX_UNAVAILABLE


# -- showing -------------------------------------------------------------------------------------


def _is_error(value: Any) -> bool:
    return isinstance(value, dict) and "error" in value and "ok" not in value


def _print_count(count: int) -> None:
    print(f"\n{count} node{'' if count == 1 else 's'} online.")


def _print_reply(reply: Reply) -> None:
    for node, value in reply.items():
        status, body = _pretty(value)
        print(f"->  {node}: {status}")
        if body:
            print(textwrap.indent(body, "    "))


def _pretty(value: Any) -> Tuple[str, str]:
    if isinstance(value, dict) and ("ok" in value or "error" in value):
        is_error = _is_error(value)
        return ("ERROR", _pretty(value["error"])[1]) if is_error else ("OK", _pretty(value["ok"])[1])
    if isinstance(value, list):
        return "OK", "\n".join(f"* {item}" for item in value) or "- empty -"
    if isinstance(value, dict):
        return "OK", json.dumps(value, sort_keys=True, indent=4, default=safe_repr)
    if value is None:
        return "OK", ""
    return "OK", value if isinstance(value, str) else pprint.pformat(value)

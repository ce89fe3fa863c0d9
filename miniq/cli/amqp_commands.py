# SPDX-License-Identifier: MIT
"""The commands of ``miniq amqp``: how they are written, what their words mean, what help says of them.

Most are one method of AMQP, with arguments called as AMQP calls them, in the order of ``celery amqp``.
"""

from __future__ import annotations

import json
import shlex
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from ..codecs.amqp_wire import PROPERTY_NAMES
from ..exceptions import MiniqError
from ..text import nearest


class Command(NamedTuple):
    """A command: arguments, those that may be left out with their defaults, what it does.

    `takes` is what may be named besides: ``-`` arguments of a declaration (these have a dash in their
    names), ``*`` those of a binding, ``p`` properties of a message.
    """

    required: Tuple[str, ...]
    optional: Mapping[str, str]
    takes: str
    what: str


#: Messages are mandatory unless that is taken back: one that reaches no queue would be lost in silence.
_COMMANDS = """
exchange.declare  exchange type=direct passive=no durable=yes auto_delete=no internal=no -  make an exchange
exchange.delete   exchange if_unused=no                                       delete an exchange
queue.declare     queue passive=no durable=yes exclusive=no auto_delete=no -  make a queue, or count
queue.bind        queue exchange routing_key *                                let messages come to a queue
queue.unbind      queue exchange routing_key *                                undo that
queue.delete      queue if_unused=no if_empty=no                              delete a queue and its messages
queue.purge       queue                                                       delete what waits in a queue
basic.publish     msg exchange routing_key mandatory=yes immediate=no p       send a message
basic.get         queue no_ack=no                                             take a message, and hold it
basic.ack         delivery_tag                                                be done with one that is held
basic.reject      delivery_tag requeue=yes                                    put one back, or drop it
"""


def _read_commands() -> Dict[str, Command]:
    found = {}
    for line in _COMMANDS.strip().splitlines():
        # Before the description are two spaces or more, as after the name.
        name, arguments, what = (part.strip() for part in line.split("  ") if part)
        words = arguments.split()
        takes = words.pop() if words[-1] in _TAKES else ""
        required = tuple(word for word in words if "=" not in word)
        optional = dict(word.split("=") for word in words if "=" in word)
        found[name] = Command(required, optional, takes, what)
    return found


#: `Command.takes`, and how that is written in a command's usage.
_TAKES = {"": "", "-": " [x-NAME=VALUE...]", "*": " [NAME=VALUE...]", "p": " [PROPERTY=VALUE...]"}
COMMANDS = _read_commands()
_YES, _NO = frozenset("yes y true t on 1".split()), frozenset("no n false f off 0".split())
#: Properties of a message that are numbers; the others are text.
_NUMBERS = ("delivery_mode", "priority", "timestamp")


class Misuse(MiniqError):
    """A command that makes no sense; the text says how it goes."""


class Call(NamedTuple):
    """A command with its arguments, and what was named besides (`Command.takes`)."""

    name: str
    args: Dict[str, Any]
    more: Dict[str, Any]


def usage(name: str) -> str:
    """Return how a command is written: ``queue.purge QUEUE``."""
    command = COMMANDS[name]
    optional = "".join(f" [{one}={default}]" for one, default in command.optional.items())
    return f"{' '.join((name, *map(str.upper, command.required)))}{optional}{_TAKES[command.takes]}"


def split(line: str) -> List[str]:
    """Return the words of a line, as a shell sees them; none for a comment."""
    if line.lstrip().startswith("#"):
        return []
    try:
        return shlex.split(line)
    except ValueError as error:
        raise Misuse(f"{error}: {line.strip()[:80]!r}") from None


def find(name: str) -> Command:
    """Return the command of that name.  `Misuse` names the nearest."""
    command = COMMANDS.get(name)
    if command is None:
        hint = nearest(name, COMMANDS)
        raise Misuse(f"unknown command {name[:80]!r}{f': did you mean {hint}?' if hint else ''} (try help)")
    return command


def parse(words: Sequence[str]) -> Call:
    """Return what the words of a command mean.  `Misuse` says what is wrong with them."""
    name, given = words[0], words[1:]
    command = find(name)
    count = len(command.required)
    if len(given) < count:
        missing = " and ".join(one.upper() for one in command.required[len(given) :])
        raise Misuse(f"{name}: {missing} must be given: {usage(name)}")
    args: Dict[str, Any] = dict(zip(command.required, given))
    texts, more = dict(command.optional), {}
    places = iter(command.optional)
    for word in given[count:]:
        key, equals, value = word.partition("=")
        if not equals:
            place = next(places, None)
            if place is None:
                raise Misuse(f"{name}: {word[:80]!r} is one argument too many: {usage(name)}")
            texts[place] = word
        elif key in texts:
            texts[key] = value
        else:
            more[key] = _named(name, command, key, value)
    for key, text in texts.items():
        is_flag = command.optional[key] in ("yes", "no")
        args[key] = _flag(f"{name}: {key}", text) if is_flag else text
    if "delivery_tag" in args:
        args["delivery_tag"] = _number(f"{name}: delivery_tag", args["delivery_tag"])
    return Call(name, args, more)


def _named(name: str, command: Command, key: str, text: str) -> Any:
    """Return the value of what is no argument of AMQP's method."""
    names: List[str] = list(command.optional)
    if command.takes == "p":
        if key in PROPERTY_NAMES:
            return _number(f"{name}: {key}", text) if key in _NUMBERS else text
        if key == "headers":
            headers = _json_or_text(text)
            if isinstance(headers, dict):
                return headers
            raise Misuse(f"{name}: headers must be a JSON object, not {text[:80]!r}")
        names += ["headers", *PROPERTY_NAMES]
    elif command.takes == "*" or (command.takes == "-" and "-" in key):
        return _json_or_text(text)
    hint = nearest(key, names)
    raise Misuse(f"{name}: unknown {key[:80]!r}{f': did you mean {hint}?' if hint else ''}: {usage(name)}")


def _flag(what: str, text: str) -> bool:
    word = text.lower()
    if word not in _YES and word not in _NO:
        raise Misuse(f"{what} must be yes or no, not {text[:80]!r}")
    return word in _YES


def _number(what: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise Misuse(f"{what} must be a number, not {text[:80]!r}") from None


def _json_or_text(text: str) -> Any:
    """Return 10 for ``10``, true for ``true``, and the text itself for what is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def command_list() -> str:
    """Return how all commands go."""
    return "\n".join(f"  {usage(name)}\n      {command.what}" for name, command in COMMANDS.items())


def help_text(names: Sequence[str]) -> str:
    """Return how these commands go, or which there are.  `Misuse` where there is no such one."""
    if not names:
        return f"{command_list()}\n\nhelp COMMAND tells more; exit or Ctrl-D ends."
    for name in names:
        find(name)
    return "\n".join(f"{usage(name)}\n  {COMMANDS[name].what}" for name in names)

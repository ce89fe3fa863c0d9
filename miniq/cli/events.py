# SPDX-License-Identifier: MIT
"""``miniq events``: what workers tell, as lines, on a screen, or in pictures that a camera takes."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import socket
import sys
from datetime import datetime, timezone
from typing import Any, Callable, Dict

from ..events import EventReceiver
from ..events.snapshot import Polaroid, evcam
from ..events.state import LRUCache
from ..exceptions import MiniqError
from ..log import setup_worker_logging
from ..text import import_object, node_name
from ..times import parse_rate
from . import daemon, events_screen

#: sysexits.h: nobody has told anything.
EX_UNAVAILABLE = 69
#: Tasks whose names are remembered for events that carry only an id.
MOST_NAMES = 10_000
EPILOG = """\
keys on the screen:
  j, k, arrows   the next task, the one before it;      i  all that is known of it
                 down and up in a long text             q  leave
  c              revoke it                              t  its traceback
  l              change the rate limit of its kind      r  its result

Workers tell of their tasks when they were started with -E, or after `control enable_events`.

exit codes:
  0  done    1  an error    2  wrong command line    69  nothing came within --timeout

examples:
  python -m miniq -A proj events                     the screen
  python -m miniq -A proj events --dump --json       one JSON object a line
  python -m miniq -A proj events -c proj.Pictures -F 10 -r 6/m
"""
_HUMAN = {"worker-offline": "shutdown", "worker-online": "started", "worker-heartbeat": "heartbeat"}


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "events", help="show what workers tell", description="Show what workers tell.", epilog=EPILOG
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("-d", "--dump", action="store_true", help="print one line for each event")
    add("-c", "--camera", metavar="PATH", help="have this camera take pictures: module.Class (a Polaroid)")
    add("-F", "--frequency", "--freq", type=_seconds, default=1.0, metavar="SECONDS",
        help="between two pictures (1)")  # fmt: skip
    add("-r", "--maxrate", type=_rate, metavar="RATE", help="take no more pictures than this: 10/m")
    add("--json", action="store_true", help="with --dump: as JSON")
    add("--limit", type=_count, metavar="N", help="with --dump: end after N messages")
    add("--timeout", type=_seconds, metavar="SECONDS", help="with --dump: end when nothing came for so long")
    add("-l", "--loglevel", default="INFO", help="of a camera: DEBUG, INFO (default), WARNING, ERROR")
    add("-f", "--logfile", help="log to this file")
    add("--pidfile", help="write the process id here; refuse to start when it names a living process")
    daemon.add_arguments(parser)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _rate(text: str) -> str:
    try:
        parse_rate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def run(app: Any, options: argparse.Namespace) -> int:
    """Show events until interrupted."""
    if options.detached and not options.camera:
        raise MiniqError("--detach is for --camera; what else there is to see needs somebody who looks")
    with app.connection_for_read() as connection:
        connection.connect()  # an error is told now, and not on a screen
    if options.camera:
        return _run_camera(app, options)
    try:
        if options.dump or options.json:
            return _dump(app, options)
        if not sys.stdout.isatty():
            raise MiniqError("the screen needs a terminal; without one use events --dump")
        return events_screen.run(app)
    except KeyboardInterrupt:
        return 0


# -- lines ---------------------------------------------------------------------------------------


class Dumper:
    """Writes events as lines for people."""

    def __init__(self, write: Callable[[str], Any]) -> None:
        self.write = write
        self._names: LRUCache[str, str] = LRUCache(MOST_NAMES)

    def on_event(self, event: Dict[str, Any]) -> None:
        """Write a line."""
        rest = dict(event)
        kind, hostname = rest.pop("type").lower(), rest.pop("hostname", "?")
        moment = datetime.fromtimestamp(rest.pop("timestamp", 0.0), timezone.utc)
        subject = ""
        if kind.startswith("task-") and "uuid" in rest:
            uuid = rest.pop("uuid")
            if "name" in rest:
                args, kwargs = rest.pop("args", None), rest.pop("kwargs", None)
                self._names[uuid] = f"{rest.pop('name')}({uuid}) args={args} kwargs={kwargs}"
            subject = f" {self._names.get(uuid, uuid)}"
        fields = ", ".join(f"{name}={rest[name]}" for name in sorted(rest))
        human = _HUMAN.get(kind) or kind.replace("-", " ")
        self.write(f"{hostname} [{moment}] {human}{':' if fields or subject else ''}{subject} {fields}")


def _dump(app: Any, options: argparse.Namespace) -> int:
    def write(line: str) -> None:
        print(line, flush=True)

    def write_json(event: Dict[str, Any]) -> None:
        write(json.dumps(event))

    handler = write_json if options.json else Dumper(write).on_event
    receiver = EventReceiver(app=app, handlers={"*": handler})
    if not options.json and not options.quiet:
        print("events: listening (Ctrl-C ends)", file=sys.stderr, flush=True)
    try:
        receiver.capture(limit=options.limit, timeout=options.timeout)
    except socket.timeout as error:
        print(f"events: {error}", file=sys.stderr)
        return EX_UNAVAILABLE
    return 0


# -- pictures ------------------------------------------------------------------------------------


def _run_camera(app: Any, options: argparse.Namespace) -> int:
    camera = import_object(options.camera)
    if not (isinstance(camera, type) and issubclass(camera, Polaroid)):
        raise MiniqError(f"{options.camera!r} is no camera; a camera is a class that comes from {Polaroid!r}")
    node = node_name("events@%h")
    setup = setup_worker_logging(
        level=options.loglevel,
        logfile=daemon.log_file(options),
        node=node,
        hijack=False,
        redirect_stdouts=False,
    )
    # Whoever ends a daemon wants its last picture and its pid file to be taken care of.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with daemon.pid_file(options.pidfile, node):
            daemon.let_go(options, node)
            logging.getLogger(__name__).info(
                "Taking pictures with %s every %g s.", options.camera, options.frequency
            )
            evcam(camera, options.frequency, options.maxrate, app=app)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        setup.undo()
    return 0

# SPDX-License-Identifier: MIT
"""The small commands: call, result, purge, queues, dead."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

from ..exceptions import BackendError, ImproperlyConfigured, MiniqError, OperationalError, TimeoutError
from ..result import GroupResult
from ..text import nearest, safe_repr
from ..times import to_iso
from ..transports.base import QueueSize
from .arguments import count, json_argument, seconds, seconds_or_0

#: Seconds between two looks of ``queues --watch``.
WATCH_INTERVAL_S = 2.0
#: To the first column of a terminal's first line, and nothing below it.
_CLEAR = "\033[H\033[J"


def add_parsers(subparsers: Any) -> None:
    """Add the commands to the command line."""
    call = subparsers.add_parser(
        "call",
        help="send a task by name; prints its id",
        epilog="example:\n  python -m miniq -A proj call proj.add -a '[2, 3]' --countdown 10 --wait 30",
    )
    call.set_defaults(run=run_call)
    call.add_argument("task", help="name of the task")
    call.add_argument("-a", "--args", default="[]", help="positional arguments, a JSON array")
    call.add_argument("-k", "--kwargs", default="{}", help="keyword arguments, a JSON object")
    call.add_argument("--countdown", type=float, help="seconds until it may start")
    call.add_argument("--eta", help="moment at which it may start, ISO 8601")
    call.add_argument("--expires", help="seconds, or a moment, after which it must not start")
    call.add_argument("--priority", type=int, help="0 to 255")
    call.add_argument("--queue", help="queue to send it to")
    call.add_argument("--exchange", help="exchange to send it to")
    call.add_argument("--routing-key", help="routing key")
    call.add_argument("--serializer", help="json (default), pickle, ...")
    call.add_argument(
        "--wait", type=seconds_or_0, metavar="SECONDS", help="wait for the result and print it as JSON"
    )
    call.add_argument("--json", action="store_true", help="print id, state and result as one JSON object")

    result = subparsers.add_parser(
        "result",
        help="print the result of a task",
        epilog="examples:\n"
        "  python -m miniq -A proj result 5f1c... --traceback\n"
        "  python -m miniq -A proj result 5f1c... --watch",
    )
    result.set_defaults(run=run_result)
    result.add_argument("id", help="id of the task, or of a group that was saved")
    result.add_argument("-t", "--task", help="name of the task (for its own backend)")
    result.add_argument("--traceback", action="store_true", help="print the traceback of a failure")
    result.add_argument("--json", action="store_true", help="print state and result as JSON")
    result.add_argument(
        "--watch", action="store_true", help="show how far it is until it ended; code 1 if it failed"
    )
    result.add_argument("--timeout", type=seconds_or_0, metavar="SECONDS", help="watch no longer than this")

    purge = subparsers.add_parser(
        "purge",
        help="delete all waiting messages",
        epilog="example:\n  python -m miniq -A proj purge -Q mail,reports",
    )
    purge.set_defaults(run=run_purge)
    purge.add_argument("-f", "--force", action="store_true", help="do not ask")
    purge.add_argument("-Q", "--queues", help="these queues only (comma-separated)")
    purge.add_argument("-X", "--exclude-queues", help="not these queues")
    purge.add_argument("--json", action="store_true", help="print {queue: how many were deleted} as JSON")

    queues = subparsers.add_parser(
        "queues",
        help="show how many messages are where",
        epilog="examples:\n"
        "  python -m miniq -A proj queues --json\n"
        "  python -m miniq -A proj queues --watch 5",
    )
    queues.set_defaults(run=run_queues)
    queues.add_argument("--json", action="store_true", help="print as JSON")
    queues.add_argument(
        "-a", "--all", action="store_true", help="those of single processes too: commands, replies, events"
    )
    queues.add_argument(
        "--watch", type=seconds, nargs="?", const=WATCH_INTERVAL_S, metavar="SECONDS",
        help=f"look again and again, so often (default {WATCH_INTERVAL_S:g}), until interrupted",
    )  # fmt: skip

    dead = subparsers.add_parser(
        "dead",
        help="messages that were set aside: list, show, replay, drop",
        epilog="examples:\n"
        "  python -m miniq -A proj dead list\n"
        "  python -m miniq -A proj dead show 7\n"
        "  python -m miniq -A proj dead replay 7 8\n"
        "  python -m miniq -A proj dead drop all",
    )
    dead.set_defaults(run=run_dead)
    dead.add_argument("action", choices=("list", "show", "replay", "drop"))
    dead.add_argument("id", nargs="*", help="which (replay and drop take 'all')")
    dead.add_argument("--json", action="store_true", help="print as JSON")
    dead.add_argument("--limit", type=count, default=100, help="how many to list (default 100)")


def run_call(app: Any, options: argparse.Namespace) -> int:
    """Send a task; wait for its result if asked to."""
    args = json_argument(options.args, "--args", list)
    kwargs = json_argument(options.kwargs, "--kwargs", dict)
    expires: Any = options.expires
    try:
        expires = float(expires) if expires else None
    except ValueError:
        pass  # a moment, then
    named = ("countdown", "eta", "priority", "queue", "exchange", "routing_key", "serializer")
    given = {name: getattr(options, name) for name in named if getattr(options, name) is not None}
    if not options.task:
        raise MiniqError("which task: its name is empty")
    if options.app:
        app.import_modules()
    try:
        result = app.send_task(options.task, args, kwargs, expires=expires, **given)
    except (ValueError, TypeError) as error:
        raise MiniqError(str(error)) from error
    told = {"id": result.id}
    if not options.json:
        print(result.id, flush=True)
    try:
        if options.wait is not None:
            told.update(result=result.get(timeout=options.wait), state="SUCCESS")
            if not options.json:
                print(json.dumps(told["result"], default=safe_repr))
    except TimeoutError as error:
        told["state"] = result.state
        raise MiniqError(str(error)) from error
    except (OperationalError, BackendError):
        raise  # not the task's: nobody knows what became of it
    except Exception as error:  # safety net: the task's own exception, of any kind
        told.update(state=result.state, error=repr(error))
        raise MiniqError(f"the task failed: {error!r}") from error
    finally:
        if options.json:  # in any case: the task was sent
            print(json.dumps(told, default=safe_repr))
    return 0


def run_result(app: Any, options: argparse.Namespace) -> int:
    """Print what is known of a task."""
    if not options.id:
        raise MiniqError("which task: its id is empty")
    try:
        return _print_result(app, options)
    except NotImplementedError as error:  # as the library has it, where there is no result backend
        raise MiniqError(f"{error}, or give it before the command: --result-backend URL") from error


def _print_result(app: Any, options: argparse.Namespace) -> int:
    result = app.AsyncResult(options.id)
    if options.task:
        app.import_modules()
        if options.task not in app.tasks:
            raise MiniqError(_no_task(options.task, app.tasks))
        result = app.tasks[options.task].AsyncResult(options.id)
    if options.watch:
        result = _saved_group(app, options.id) or result
        try:
            state = result.watch(timeout=options.timeout)
        except KeyboardInterrupt:
            return 130
    if isinstance(result, GroupResult):
        # Of a group that has not ended there is no value yet.
        value, text = result.get(timeout=0, propagate=False) if result.ready() else None, None
    else:
        state, value, text = result.state, result.result, result.traceback
    if options.json:
        print(
            json.dumps(
                {"id": options.id, "state": state, "result": value, "traceback": text}, default=safe_repr
            )
        )
    elif options.traceback and text:
        print(text)
    else:
        print(
            f"{state}: {value!r}"
            if state != "PENDING"
            else "PENDING: nothing is known of this id (yet, or any more)"
        )
    return int(options.watch and state != "SUCCESS")


def _no_task(name: str, known: Iterable[str]) -> str:
    hint = nearest(name, known)
    advice = f" (did you mean {hint!r}?)" if hint else ""
    return f"there is no task {name!r}{advice}; is its app given with -A?"


def _saved_group(app: Any, group_id: str) -> Optional[GroupResult]:
    try:
        return GroupResult.restore(group_id, app=app)
    except ImproperlyConfigured:
        return None  # the store keeps no groups, so it is no group's id


def run_purge(app: Any, options: argparse.Namespace) -> int:
    """Delete what waits in queues; asks first."""
    configured, excluded = list(app.router.queues), _names(options.exclude_queues)
    asked = configured if options.queues is None else _names(options.queues)
    names = [name for name in asked if name not in excluded]
    if not names:
        raise MiniqError("no queue is left to purge")
    # Where the answer is data, it is all that is on standard output.
    aside = sys.stderr if options.json else sys.stdout
    if not options.force:
        question = f"This deletes every waiting message of: {', '.join(names)}. Really? [yes/no] "
        print(question, end="", file=aside, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("Nothing was deleted.", file=aside)
            return 1
    transport = app.producer.transport
    known = {*configured, *(size.queue for size in transport.sizes(names))}
    deleted: Dict[str, int] = {}
    try:
        for name in names:
            deleted[name] = transport.purge(name)
            if not options.json:
                print(f"{name}: {deleted[name]} deleted", flush=True)
    finally:
        if options.json:
            print(json.dumps(deleted))
    # Redis lists only queues that miniq has made: what held messages was one all the same.
    unknown = [name for name in names if name not in known and not deleted[name]]
    if unknown:
        hint = nearest(unknown[0], known)
        raise MiniqError(
            f"there is no queue {', '.join(unknown)}{f': did you mean {hint!r}?' if hint else ''}"
        )
    return 0


def _names(text: Optional[str]) -> List[str]:
    """Return the names in a comma-separated list."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def run_queues(app: Any, options: argparse.Namespace) -> int:
    """Print the sizes of all queues, once or again and again."""
    if options.watch is None:
        _print_sizes(_sizes(app, options.all), options.json)
        return 0
    redraw = sys.stdout.isatty() and not options.json
    try:
        while True:
            try:
                sizes = _sizes(app, options.all)
            except OperationalError as error:
                print(f"{time.strftime('%H:%M:%S')}  {error}", file=sys.stderr, flush=True)
            else:
                if redraw:
                    print(f"{_CLEAR}{time.strftime('%H:%M:%S')}")
                if redraw or options.json:
                    _print_sizes(sizes, options.json)
                else:
                    print(time.strftime("%H:%M:%S"), *map(_size_as_text, sizes), sep="  ")
                sys.stdout.flush()
            time.sleep(max(options.watch, 0.05))
    except KeyboardInterrupt:
        return 130


def _sizes(app: Any, with_private: bool) -> List[QueueSize]:
    found: List[QueueSize] = app.producer.transport.sizes(app.router.queues)
    return [size for size in found if with_private or not is_private(size.queue)]


def is_private(queue: str) -> bool:
    """Say whether a queue is one process' own: for commands, replies or events."""
    return queue.endswith(".pidbox") or queue.startswith("celeryev.")


def _print_sizes(sizes: Sequence[QueueSize], as_json: bool) -> None:
    if as_json:
        print(json.dumps([size._asdict() for size in sizes]))
        return
    rows: List[Tuple[str, ...]] = [("queue", "ready", "waiting", "unacked", "consumers", "oldest")]
    for size in sizes:
        age = "" if size.oldest_s is None else f"{size.oldest_s:.0f} s"
        counts = (size.ready, size.waiting, size.unacked, size.consumers)
        rows.append((size.queue, *("-" if count is None else str(count) for count in counts), age))
    print_table(rows)


def _size_as_text(size: QueueSize) -> str:
    """Return a queue's numbers for a line that holds several queues."""
    named = (("ready", size.ready), ("waiting", size.waiting), ("unacked", size.unacked),
             ("consumers", size.consumers))  # fmt: skip
    told = [f"{count} {name}" for name, count in named if count is not None]
    if size.oldest_s is not None:
        told.append(f"oldest {size.oldest_s:.0f} s")
    return f"{size.queue}: {', '.join(told)}"


def run_dead(app: Any, options: argparse.Namespace) -> int:
    """List, show, replay or drop dead letters."""
    transport = app.producer.transport
    if options.action in ("list", "show"):
        letters = transport.dead_letters(1_000_000 if options.id else options.limit)
        if options.id:
            unknown = set(options.id) - {letter.id for letter in letters}
            if unknown:
                raise MiniqError(f"no dead letter with id {', '.join(sorted(unknown))}")
            letters = [letter for letter in letters if letter.id in options.id]
        if options.json:
            print(json.dumps([_dead_as_dict(letter) for letter in letters], default=safe_repr))
        elif options.action == "show":
            for letter in letters:
                for key, value in _dead_as_dict(letter).items():
                    print(f"{key:>9}  {value}")
                print()
        else:
            rows = [("id", "set aside", "queue", "task", "reason")]
            for letter in letters:
                headers = letter.message.headers
                when = to_iso(letter.at)[:19]
                rows.append(
                    (
                        letter.id,
                        when,
                        letter.queue,
                        f"{headers.get('task')}[{headers.get('id')}]",
                        letter.reason,
                    )
                )
            print_table(rows)
        return 0
    if not options.id:
        raise MiniqError(f"dead {options.action}: which? Give ids of `dead list`, or all")
    ids = options.id
    if ids == ["all"]:
        ids = [letter.id for letter in transport.dead_letters(1_000_000)]
    act = transport.replay if options.action == "replay" else transport.drop
    missing = [one for one in ids if not act(one)]
    count_done = len(ids) - len(missing)
    if options.json:
        key = "replayed" if options.action == "replay" else "dropped"
        print(json.dumps({key: count_done, "unknown": missing}))
    else:
        print(f"{count_done} {'back in their queues' if options.action == 'replay' else 'dropped'}")
    if missing:
        raise MiniqError(f"no dead letter with id {', '.join(missing)}")
    return 0


def _dead_as_dict(letter: Any) -> Any:
    message = letter.message
    return {
        "id": letter.id,
        "at": to_iso(letter.at),
        "queue": letter.queue,
        "reason": letter.reason,
        "task": message.headers.get("task"),
        "task_id": message.headers.get("id"),
        "args": message.headers.get("argsrepr"),
        "kwargs": message.headers.get("kwargsrepr"),
        "bytes": len(message.body),
    }


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns as wide as their longest cell."""
    widths: List[int] = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())

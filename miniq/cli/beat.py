# SPDX-License-Identifier: MIT
"""``miniq beat``: sends periodic tasks; ``miniq schedule``: shows and changes them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import datetime
from typing import Any, Dict, List, Optional, Tuple

from .. import __version__
from ..beat import SCHEDULERS, Beat, scheduler_class
from ..beat_entry import CATCH_UP, OVERLAP, ScheduleEntry, State
from ..exceptions import ImproperlyConfigured, MiniqError
from ..health import NO_BROKER, SENDING
from ..lifesign import LifeSign
from ..log import level_number, setup_worker_logging
from ..schedules import crontab, describe, schedule, solar
from ..text import expand_file_name, mask_url, safe_repr
from ..times import to_iso
from . import daemon
from .arguments import json_argument, priority, seconds
from .commands import print_table

EPILOG = """\
signals:
  TERM, INT, HUP  end; what is being sent is finished

exit codes:
  0  ended in order    1  an error    2  wrong command line
  73  the pid file cannot be made, or names a living process

Any number of beats may run: each tick is sent once (see docs/periodic-tasks.rst).

examples:
  python -m miniq -A proj beat -l INFO
  python -m miniq -A proj beat -s /var/lib/proj/schedule --pidfile=/run/beat.pid
  python -m miniq -A proj worker -B
"""
SCHEDULE_EPILOG = """\
exit codes:
  0  done    1  it failed, as where there is no such task    2  wrong command line

examples:
  python -m miniq -A proj schedule list --next 3
  python -m miniq -A proj schedule add nightly proj.clean --cron "30 2 * * *" -k '{"days": 7}'
  python -m miniq -A proj schedule pause nightly
  python -m miniq -A proj schedule run-now nightly
"""


def add_parsers(subparsers: Any) -> None:
    """Add the commands to the command line."""
    beat = subparsers.add_parser(
        "beat",
        help="send periodic tasks",
        description="Send periodic tasks when they are due.",
        epilog=EPILOG,
    )
    beat.set_defaults(run=run_beat)
    add = beat.add_argument
    _add_store(beat)
    add("-n", "--hostname", help="node name (default celerybeat@%%h)")
    add(
        "--enable-remote-control",
        action=argparse.BooleanOptionalAction,
        help="answer pings (see the setting beat_enable_remote_control)",
    )
    add("-S", "--scheduler", help=f"{min(SCHEDULERS, key=len)}, an entry point, or module:Class")
    add("--max-interval", type=seconds, metavar="SECONDS", help="the longest wait between two looks")
    add("-l", "--loglevel", default="WARNING", help="DEBUG, INFO, WARNING (default), ERROR or CRITICAL")
    add("-f", "--logfile", help="log to this file")
    add("--pidfile", help="write the process id here; refuse to start when it names a living process")
    daemon.add_health_file(beat)
    daemon.add_arguments(beat, short="")

    group = subparsers.add_parser(
        "schedule",
        help="periodic tasks: list, add, remove, pause, resume, run-now",
        description="Show and change periodic tasks.\n"
        "Beats that run notice within a second or two; none need run.",
        epilog=SCHEDULE_EPILOG,
    )
    group.set_defaults(run=run_schedule)
    actions = group.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help_: str, *, named: bool = True) -> Any:
        parser = actions.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".")
        if named:
            parser.add_argument("name", help="name of the entry")
        _add_store(parser)
        return parser

    listed = action("list", "show all entries with what they do next", named=False)
    listed.add_argument("--next", type=_count, default=5, metavar="N", help="how many moments (default 5)")
    listed.add_argument("--json", action="store_true", help="print as JSON")
    added = action("add", "add an entry, which lives in the store alone")
    added.add_argument("task", help="name of the task")
    when = added.add_mutually_exclusive_group(required=True)
    when.add_argument("--every", type=seconds, metavar="SECONDS", help="an interval")
    when.add_argument("--cron", metavar="TEXT", help="minute hour day-of-month month day-of-week")
    when.add_argument("--solar", nargs=3, metavar=("EVENT", "LAT", "LON"), help="as sunrise 48.85 2.35")
    added.add_argument("-a", "--args", default="[]", help="positional arguments, a JSON array")
    added.add_argument("-k", "--kwargs", default="{}", help="keyword arguments, a JSON object")
    added.add_argument("--queue", help="queue to send it to")
    added.add_argument("--priority", type=priority, help="0 to 255")
    added.add_argument("--expires", type=seconds, metavar="SECONDS", help="after which it must not start")
    added.add_argument(
        "--relative", action="store_true", help="with --every: by the clock (full minutes ...)"
    )
    added.add_argument(
        "--catch-up", choices=CATCH_UP, default="once", help="of what was missed (default once)"
    )
    added.add_argument(
        "--overlap", choices=OVERLAP, default="allow", help="while the last run has not ended (default allow)"
    )
    action("remove", "remove an entry that was added at run time")
    action("pause", "send an entry no more until resume")
    action("resume", "end a pause; what was due in it stays unsent")
    action("run-now", "send the task of an entry once, now; prints its id")


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-s", "--schedule", metavar="FILE", help="keep the state in this file, not at the broker"
    )


def _count(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1000")
    return value


# -- beat ----------------------------------------------------------------------------------------


def run_beat(app: Any, options: argparse.Namespace) -> int:
    """Run beat until it is told to stop; return the exit code."""
    level_number(options.loglevel)  # before anything is imported
    beat = Beat(app, options.scheduler, options.max_interval, options.schedule, hostname=options.hostname)
    node = beat.hostname
    if options.enable_remote_control is not None:
        app.conf.update({"beat_enable_remote_control": options.enable_remote_control}, "the command line")
    path = expand_file_name(daemon.health_file(options, None, node), node)
    life_sign = LifeSign(beat.loop, path, node, "beat", lambda: _state(beat)) if path else None
    with daemon.pid_file(options.pidfile, node):
        stderr = sys.stderr
        setup = setup_worker_logging(node=node, **daemon.log_options(app, options))
        try:
            with daemon.on_signals(("SIGTERM", "SIGINT", "SIGHUP"), lambda *_: beat.stop()):
                if not options.quiet:
                    print(banner(beat, options), file=stderr, flush=True)
                daemon.let_go(options, node)
                if life_sign is not None:
                    life_sign.start()
                beat.run()
        finally:
            if life_sign is not None:
                life_sign.stop()
            setup.undo()
    return 0


def _state(beat: Beat) -> str:
    """Return the word for the health file; another scheduler than ours does not say how it is."""
    return NO_BROKER if getattr(beat.scheduler, "away_since_mono", None) is not None else SENDING


def banner(beat: Beat, options: argparse.Namespace) -> str:
    """Return what is shown at the start; passwords are masked."""
    app, scheduler = beat.app, beat.scheduler
    lines = [
        f"miniq {__version__}: beat (pid {os.getpid()})",
        f"  app      {app.main or '__main__'}{f' ({options.app})' if options.app else ''}",
        f"  broker   {mask_url(app.broker_url(write=True))}",
        f"  state    {getattr(scheduler, 'info', type(scheduler).__name__)}",
        f"  entries  {len(scheduler.schedule)} in the code",
    ]
    lines += [f"  warning  {text}" for text in app.conf.warnings]
    return "\n".join(lines)


# -- schedule ------------------------------------------------------------------------------------


def run_schedule(app: Any, options: argparse.Namespace) -> int:
    """Show or change entries."""
    if options.app:
        app.import_modules()
    kind = scheduler_class(app.conf.beat_scheduler)
    scheduler = kind(app, schedule_filename=options.schedule)
    try:
        return _ACTIONS[options.action](scheduler, options)
    except AttributeError as error:
        if getattr(error, "obj", scheduler) is not scheduler or hasattr(scheduler, "save"):
            raise
        raise MiniqError(
            f"the scheduler {kind.__module__}.{kind.__qualname__} keeps its entries itself: change them there"
        ) from error
    finally:
        scheduler.close()


#: What is shown of an entry as it is.
_SHOWN = ("task", "args", "kwargs", "options", "catch_up", "overlap")


def _list(scheduler: Any, options: argparse.Namespace) -> int:
    entries = _entries(scheduler, options.next)
    if options.json:
        print(json.dumps(entries, default=safe_repr))
        return 0
    zone = scheduler.app.zone
    rows: List[Tuple[str, ...]] = [("name", "task", "schedule", "last run", "runs", "state", "next")]
    for one in entries:
        moments = [_shown(datetime.fromisoformat(text), zone) for text in one["next"]]
        last = one["last_run"] and _shown(datetime.fromisoformat(one["last_run"]), zone)
        first, *others = moments or ["-"]
        rows.append(
            (
                one["name"],
                one["task"],
                one["schedule"],
                last or "never",
                str(one["runs"]),
                one["state"],
                first,
            )
        )
        rows += [("", "", "", "", "", "", moment) for moment in others]
    print_table(rows)
    return 0


def _shown(moment: datetime, zone: Any) -> str:
    return moment.astimezone(zone).strftime("%Y-%m-%d %H:%M:%S %Z")


def _entries(scheduler: Any, count: int) -> List[Dict[str, Any]]:
    """Return all entries as plain values, those that only other code has as well."""
    records: Dict[str, State] = scheduler.records()
    names = sorted({*scheduler.schedule, *records})
    return [_row(scheduler, name, records.get(name), count) for name in names]


def _row(scheduler: Any, name: str, state: Optional[State], count: int) -> Dict[str, Any]:
    ours: Optional[ScheduleEntry] = scheduler.schedule.get(name)
    word = "new" if state is None else "on"
    if state is not None and state.paused:
        word = "paused"
    elif ours is not None and not ours.enabled:
        word = "off"
    elif ours is None and state is not None and state.source == "code":
        word = "not in this code"
    upcoming: List[float] = []
    try:
        entry: Optional[ScheduleEntry] = ours or scheduler.find(name)
    except MiniqError:
        entry = None  # of a class that only other code has
    if entry is not None:
        state = state or State("code", entry.mark, scheduler.app.wall())
        try:
            upcoming = scheduler.upcoming(entry, state, count)
        except Exception as error:  # safety net: a schedule may be the user's; the others are shown
            word = f"fails: {error!r:.100}"
        values = {key: getattr(entry, key) for key in _SHOWN}
        text = describe(entry.schedule)
    else:
        assert state is not None  # it has no entry, so its name came with a record
        spec = state.spec or {}
        values = {key: spec.get(key) for key in _SHOWN}
        text = spec.get("text", "?")
    return {
        "name": name,
        "schedule": text,
        "source": state.source,
        "state": word,
        "last_run": None if state.last_run is None else to_iso(state.last_run),
        "last_id": state.last_id,
        "runs": state.runs,
        "next": [to_iso(moment) for moment in upcoming],
        **values,
    }


def _add(scheduler: Any, options: argparse.Namespace) -> int:
    app = scheduler.app
    try:
        if options.cron is not None:
            when: Any = crontab.from_string(options.cron)
        elif options.solar is not None:
            event, lat, lon = options.solar
            when = solar(event, float(lat), float(lon))
        else:
            when = schedule(options.every, options.relative)
    except (TypeError, ValueError, OverflowError) as error:
        raise MiniqError(str(error)) from error
    chosen = {"queue": options.queue, "priority": options.priority, "expires": options.expires}
    entry = ScheduleEntry(
        options.name,
        options.task,
        schedule=when,
        args=json_argument(options.args, "--args", list),
        kwargs=json_argument(options.kwargs, "--kwargs", dict),
        options={key: value for key, value in chosen.items() if value is not None},
        app=app,
        catch_up=options.catch_up,
        overlap=options.overlap,
    )
    if options.app and options.task not in app.tasks:
        print(f"Warning: the app has no task {options.task!r}; workers may have it", file=sys.stderr)
    scheduler.save(entry)
    print(f"{entry.name}: added, {describe(entry.schedule)}")
    return 0


def _remove(scheduler: Any, options: argparse.Namespace) -> int:
    scheduler.remove(options.name)
    print(f"{options.name}: removed")
    return 0


def _pause(scheduler: Any, options: argparse.Namespace) -> int:
    scheduler.pause(options.name)
    print(f"{options.name}: paused")
    return 0


def _resume(scheduler: Any, options: argparse.Namespace) -> int:
    scheduler.resume(options.name)
    print(f"{options.name}: goes on")
    return 0


def _run_now(scheduler: Any, options: argparse.Namespace) -> int:
    try:
        print(scheduler.run_now(options.name))
    except (TypeError, ValueError) as error:
        raise ImproperlyConfigured(f"periodic task {options.name!r} cannot be sent: {error}") from error
    return 0


_ACTIONS = {
    "list": _list,
    "add": _add,
    "remove": _remove,
    "pause": _pause,
    "resume": _resume,
    "run-now": _run_now,
}

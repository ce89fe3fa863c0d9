# SPDX-License-Identifier: MIT
"""``miniq worker``: flags, banner, signals, pid file and logging around a `Worker`."""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional

from .. import __version__
from ..exceptions import ImproperlyConfigured, MiniqError
from ..log import get_logger, setup_worker_logging
from ..pools.base import POOLS
from ..text import expand_file_name, mask_url
from ..worker.worker import Worker

logger = get_logger(__name__)

EX_CANTCREAT = 73
EPILOG = """\
signals:
  TERM, INT   warm shutdown: finish what runs, hand back the rest; again: cold; a third time: at once
  QUIT        cold shutdown: stop what runs; late-acked tasks go back to their queue
  USR1        print the stacks of all threads

examples:
  python -m miniq -A proj worker -l INFO
  python -m miniq -A proj worker -P threads -c 20 -Q mail,reports
  python -m miniq -A proj worker -n mail@%h --logfile=/var/log/%n%I.log --pidfile=/run/%n.pid
"""
#: Flags of Celery's worker that change nothing here, and why.
WITHOUT_EFFECT = {
    "--without-gossip": "workers here do not gossip",
    "--without-mingle": "revocations are kept by the broker",
    "--without-heartbeat": "no heartbeat events are sent",
}


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser("worker", help="run tasks", description="Run tasks.", epilog=EPILOG)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("-n", "--hostname", help="node name; %%h host, %%n its first part, %%d its domain (default celery@%%h)")
    add("-c", "--concurrency", type=_count, help="how many tasks run at once (default: CPUs)")
    add("-P", "--pool", help=f"{', '.join(sorted(POOLS))}, or module:Class (default prefork)")
    add("-Q", "--queues", help="consume from these queues only (comma-separated)")
    add("-X", "--exclude-queues", help="do not consume from these queues")
    add("-I", "--include", help="import these modules first (comma-separated)")
    add("-l", "--loglevel", default="WARNING", help="DEBUG, INFO, WARNING (default), ERROR or CRITICAL")
    add("-f", "--logfile", help="log to this file; %%n %%h %%p node name, %%i %%I number of the child")
    add("--pidfile", help="write the process id here; refuse to start when it names a live process")
    add("-O", dest="optimization", choices=("default", "fair"), help="accepted; the pool is always fair")
    add("--time-limit", type=_seconds, help="hard time limit of tasks in seconds")
    add("--soft-time-limit", type=_seconds, help="soft time limit of tasks in seconds")
    add("--max-tasks-per-child", type=_count, help="replace a child after this many tasks")
    add("--max-memory-per-child", type=_count, help="replace a child that uses more KiB after a task")
    add("--pool-start-method", choices=("fork", "forkserver", "spawn"), help="how children are made")
    add("--prefetch-multiplier", type=_count, help="1: take messages for free slots only (default)")
    add("--disable-prefetch", action="store_true", help="the same as --prefetch-multiplier=1")
    add("--autoscale", type=_autoscale, metavar="MAX,MIN", help="grow and shrink the pool with the load")
    add("--purge", "--discard", action="store_true", help="delete what waits in the queues first")
    add("-B", "--beat", action="store_true", help="not available yet: schedules come with the command beat")
    for flag, why in WITHOUT_EFFECT.items():
        add(flag, action="store_true", help=f"accepted without effect: {why}")


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _autoscale(text: str) -> "tuple[int, int]":
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 2 or min(numbers) < 0 or max(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not MAX,MIN, for example 10,3")
    return max(numbers), min(numbers) if len(numbers) == 2 else 0


def run(app: Any, options: argparse.Namespace) -> int:
    """Run a worker until it is told to stop; return the exit code."""
    if options.beat:
        raise MiniqError(
            "-B: the scheduler (beat) is not part of this version; start the worker without -B and send"
            " periodic tasks from cron or a timer"
        )
    if options.include:
        app.conf.update({"include": [*app.conf.include, *options.include.split(",")]}, "the command line")
    worker = Worker(
        app,
        hostname=options.hostname,
        concurrency=options.concurrency,
        pool=options.pool,
        queues=options.queues,
        exclude_queues=options.exclude_queues,
        prefetch_multiplier=1 if options.disable_prefetch else options.prefetch_multiplier,
        time_limit=options.time_limit,
        soft_time_limit=options.soft_time_limit,
        max_tasks_per_child=options.max_tasks_per_child,
        max_memory_per_child=options.max_memory_per_child,
        start_method=options.pool_start_method,
        autoscale=options.autoscale,
        purge=options.purge,
        log=log_options(app, options),
    )
    app.import_modules()
    app.conf.check()
    with pid_file(options.pidfile, worker.hostname):
        setup = setup_worker_logging(**worker.log)  # type: ignore[arg-type]
        try:
            if not options.quiet:
                print(banner(worker, options), file=sys.stderr, flush=True)
            install_signals(worker)
            return worker.run()
        finally:
            setup.undo()


def log_options(app: Any, options: argparse.Namespace) -> Dict[str, Any]:
    """Return the arguments of `setup_worker_logging`, for this process and spawned children."""
    conf = app.conf
    return {
        "level": options.loglevel,
        "logfile": options.logfile,
        "color": False if options.no_color else conf.worker_log_color,
        "hijack": conf.worker_hijack_root_logger,
        "redirect_stdouts": conf.worker_redirect_stdouts,
        "redirect_level": conf.worker_redirect_stdouts_level,
        "node": options.hostname or "",
        "fmt": conf.worker_log_format,
        "task_fmt": conf.worker_task_log_format,
        "datefmt": conf.worker_log_datefmt,
        "task_datefmt": conf.worker_task_log_datefmt,
    }


def banner(worker: Worker, options: argparse.Namespace) -> str:
    """Return what is shown at the start; passwords are masked."""
    app = worker.app
    pool = type(worker.pool).__name__
    slots = f"{worker.concurrency}" if not worker.autoscale else f"{worker.autoscale[1]} to {worker.autoscale[0]}"
    names = sorted(app.tasks)
    shown = names[:20] + ([f"... and {len(names) - 20} more"] if len(names) > 20 else [])
    where = app.broker_url()
    lines = [
        f"miniq {__version__}: worker {worker.hostname} (pid {os.getpid()})",
        f"  app      {app.main or '__main__'}{f' ({options.app})' if options.app else ''}",
        f"  broker   {mask_url(where)}",
        f"  results  {mask_url(app.backend_url())}",
        f"  pool     {pool}, {slots} at once",
        f"  queues   {', '.join(sorted(queue.name for queue in worker.queues))}",
        f"  tasks    {', '.join(shown) if shown else '(none: does the app import its task modules?)'}",
    ]
    lines += [f"  warning  {text}" for text in app.conf.warnings]
    return "\n".join(lines)


def install_signals(worker: Worker) -> None:
    """Make signals shut the worker down (see the epilog); only in the main thread of a program."""
    asked: List[str] = []

    def on_stop(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        asked.append(name)
        if len(asked) > 2:
            os._exit(1)
        cold = len(asked) > 1 or name == "SIGQUIT" or (name == "SIGTERM" and _term_is_quit())
        worker.stop("cold" if cold else "warm", name)

    for name in ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None:
            signal.signal(number, on_stop)
    if hasattr(signal, "SIGUSR1") and hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1, all_threads=True)


def _term_is_quit() -> bool:
    return os.environ.get("REMAP_SIGTERM") == "SIGQUIT"


@contextmanager
def pid_file(path: Optional[str], node: str) -> Iterator[None]:
    """Hold a pid file while the block runs; exit with 73 when a live process holds it."""
    if not path:
        yield
        return
    path = expand_file_name(path, node)
    for _ in range(2):
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            owner = _read_pid(path)
            if owner is not None and _is_alive(owner):
                print(f"Error: the pid file {path} belongs to process {owner}, which is alive", file=sys.stderr)
                raise SystemExit(EX_CANTCREAT) from None
            print(f"Warning: the pid file {path} was left by a process that is gone; replaced", file=sys.stderr)
            os.unlink(path)
            continue
        except OSError as error:
            print(f"Error: cannot make the pid file {path}: {error.strerror}", file=sys.stderr)
            raise SystemExit(EX_CANTCREAT) from None
        break
    else:
        raise ImproperlyConfigured(f"the pid file {path} comes back as soon as it is removed")
    with os.fdopen(handle, "w") as file:
        file.write(f"{os.getpid()}\n")
    try:
        yield
    finally:
        if _read_pid(path) == os.getpid():
            os.unlink(path)


def _read_pid(path: str) -> Optional[int]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return int(file.read(32))
    except (OSError, ValueError):
        return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # alive, but not ours
        return True
    return True

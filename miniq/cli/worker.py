# SPDX-License-Identifier: MIT
"""``miniq worker``: flags, banner, signals, pid file and logging around a `Worker`."""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List

from .. import __version__
from ..exceptions import MiniqError
from ..log import level_number
from ..pools.base import POOLS
from ..text import mask_url
from ..worker.worker import Worker
from . import daemon
from .arguments import count, count_or_0, seconds

#: The same signal again within this many seconds is one that came twice: once to the process and once
#: to its group, as `timeout`, shells and some init programs send it.
TWICE_S = 0.2

EPILOG = """\
signals:
  TERM, INT, HUP  warm shutdown: hand back what has not started, finish what runs (for at most
                  worker_soft_shutdown_timeout seconds, if set); again: cold; a third time: at once
  QUIT            cold shutdown: stop what runs; late-acked tasks go back to their queue
                  (warm for worker_soft_shutdown_timeout seconds first, if set)
  USR1            print the stacks of all threads
With REMAP_SIGTERM=SIGQUIT in the environment TERM means QUIT.

exit codes:
  0  all ended in order    1  an error, or running tasks were lost    2  wrong command line
  73  the pid file cannot be made, or names a living process

examples:
  python -m miniq -A proj worker -l INFO
  python -m miniq -A proj worker -P threads -c 20 -Q mail,reports
  python -m miniq -A proj worker -n mail@%h --logfile=/var/log/%n%I.log --pidfile=/run/%n.pid
"""
#: Flags of Celery's worker that change nothing here, and why.
WITHOUT_EFFECT = {
    "--without-gossip": "workers here do not gossip",
    "--without-mingle": "revocations are kept by the broker",
}


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser("worker", help="run tasks", description="Run tasks.", epilog=EPILOG)
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "-n",
        "--hostname",
        help="node name; %%h host, %%n its first part, %%d its domain (default celery@%%h)",
    )
    add("-c", "--concurrency", type=count, help="how many tasks run at once (default: CPUs)")
    add("-P", "--pool", help=f"{', '.join(sorted(POOLS))}, or module:Class (default prefork)")
    add("-Q", "--queues", help="consume from these queues only (comma-separated)")
    add("-X", "--exclude-queues", help="do not consume from these queues")
    add("-I", "--include", help="import these modules too (comma-separated)")
    add("-l", "--loglevel", default="WARNING", help="DEBUG, INFO, WARNING (default), ERROR or CRITICAL")
    add(
        "-f",
        "--logfile",
        help="log to this file; %%p node name, %%n %%h its parts, %%i %%I number of the child",
    )
    add("--pidfile", help="write the process id here; refuse to start when it names a living process")
    daemon.add_health_file(parser)
    daemon.add_arguments(parser)
    add("-O", dest="optimization", choices=("default", "fair"), help="accepted; the pool is always fair")
    add("--time-limit", type=seconds, help="hard time limit in seconds, for tasks that have none")
    add("--soft-time-limit", type=seconds, help="soft time limit in seconds, for tasks that have none")
    add("--max-tasks-per-child", type=count, help="replace a child after this many tasks")
    add("--max-memory-per-child", type=count, help="replace a child that uses more KiB after a task")
    add("--pool-start-method", choices=("fork", "forkserver", "spawn"), help="how children are made")
    add(
        "--prefetch-multiplier", type=count_or_0,
        help="1: take messages for free slots only (default); n: up to (n-1) x concurrency more; 0: many",
    )  # fmt: skip
    add("--disable-prefetch", action="store_true", help="the same as --prefetch-multiplier=1")
    add("--autoscale", type=_autoscale, metavar="MAX,MIN", help="grow and shrink the pool with the load")
    add("--purge", "--discard", action="store_true", help="delete what waits in the queues first")
    add("-B", "--beat", action="store_true", help="send periodic tasks as well (see the command beat)")
    add("-s", "--schedule-filename", "--schedule", metavar="FILE", help="with -B: the file of its state")
    add("--scheduler", help="with -B: name or class of the scheduler")
    add("-E", "--task-events", "--events", action="store_true", help="tell what becomes of tasks (events)")
    add("--without-heartbeat", action="store_true", help="do not tell every now and then that it lives")
    add("--heartbeat-interval", type=seconds, metavar="SECONDS", help="between two heartbeats (default 2)")
    add("-S", "--statedb", metavar="FILE", help="accepted without effect: the broker keeps revocations")
    for flag, why in WITHOUT_EFFECT.items():
        add(flag, action="store_true", help=f"accepted without effect: {why}")


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
    if not options.beat and (options.schedule_filename or options.scheduler):
        raise MiniqError("-s and --scheduler belong to -B: give that too, or run the command beat")
    level_number(options.loglevel)  # before anything is imported
    if options.include:
        app.conf.update({"include": [*app.conf.include, *_names(options.include)]}, "the command line")
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
        log={
            **daemon.log_options(app, options),
            "redirect_stdouts": app.conf.worker_redirect_stdouts,
            "redirect_level": app.conf.worker_redirect_stdouts_level,
        },
        beat=options.beat and {"schedule": options.schedule_filename, "scheduler": options.scheduler},
        task_events=options.task_events or None,
        without_heartbeat=options.without_heartbeat,
        heartbeat_interval=options.heartbeat_interval,
        health_file=daemon.health_file(options, app.conf.worker_health_file, options.hostname or "celery@%h"),
    )
    daemon.check_privileges(app.conf.accept_content)
    with daemon.pid_file(options.pidfile, worker.hostname) as remove_pid_file:

        def leave_now(code: int) -> None:
            remove_pid_file()
            if worker.life_sign is not None:
                worker.life_sign.stop()
            os._exit(code)

        worker.on_stuck = leave_now
        stderr = sys.stderr  # the banner is for people, also where the log goes to a file
        setup = worker.set_up_logging()
        if options.logfile and not setup.configured:
            print(
                f"Warning: the app has set up logging itself, --logfile={options.logfile} has no effect"
                " (worker_hijack_root_logger)",
                file=stderr,
            )
        try:
            with signals_to(worker, leave_now):
                if not options.quiet:
                    print(banner(worker, options), file=stderr, flush=True)
                daemon.let_go(options, worker.hostname)
                return worker.run()
        finally:
            setup.undo()


def _names(text: str) -> List[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def banner(worker: Worker, options: argparse.Namespace) -> str:
    """Return what is shown at the start; passwords are masked."""
    app = worker.app
    pool = type(worker.pool).__name__
    slots = (
        f"{worker.pool.size}" if not worker.autoscale else f"{worker.concurrency} to {worker.autoscale[0]}"
    )
    names = sorted(name for name in app.tasks if not name.startswith("celery."))
    shown = names[:20] + ([f"... and {len(names) - 20} more"] if len(names) > 20 else [])
    lines = [
        f"miniq {__version__}: worker {worker.hostname} (pid {os.getpid()})",
        f"  app      {app.main or '__main__'}{f' ({options.app})' if options.app else ''}",
        f"  broker   {mask_url(app.broker_url())}",
        f"  results  {mask_url(app.backend_url())}",
        f"  pool     {pool}, {slots} at once",
        f"  queues   {', '.join(sorted(queue.name for queue in worker.queues))}",
        f"  tasks    {', '.join(shown) if shown else '(none: does the app import its task modules?)'}",
    ]
    lines += [f"  warning  {text}" for text in app.conf.warnings]
    return "\n".join(lines)


@contextmanager
def signals_to(worker: Worker, leave_now: Callable[[int], None]) -> Iterator[None]:
    """Have signals shut the worker down (see the epilog) while the block runs."""
    asked: List[str] = []
    last_mono: Dict[int, float] = {}

    def on_stop(number: int, frame: Any) -> None:
        mono = time.monotonic()
        again = mono - last_mono.get(number, float("-inf")) < TWICE_S
        last_mono[number] = mono
        if again:
            return
        name = signal.Signals(number).name
        asked.append(name)
        if len(asked) > 2:
            leave_now(1)
        if name == "SIGTERM" and os.environ.get("REMAP_SIGTERM") == "SIGQUIT":
            name = "SIGQUIT"
        at_once = name == "SIGQUIT" and not worker.app.conf.worker_soft_shutdown_timeout
        worker.stop("cold" if at_once or len(asked) > 1 else "warm", name)

    stacks = getattr(signal, "SIGUSR1", None) if hasattr(faulthandler, "register") else None
    with daemon.on_signals(("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP"), on_stop) as is_ours:
        if is_ours and stacks is not None:
            faulthandler.register(stacks, sys.__stderr__ or 2, all_threads=True)
        try:
            yield
        finally:
            if stacks is not None:
                faulthandler.unregister(stacks)

# SPDX-License-Identifier: MIT
"""miniq as the benchmarks drive it: its app in this process, its workers beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import Any, Iterator, Optional

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
#: Where all files of a run are; set by who runs.
FOLDER = ""


def path(name: str) -> str:
    return os.path.join(FOLDER, name)


def fresh_app(name: str, **options: Any) -> Any:
    """Return the benchmark app on a new file, in this process."""
    return app_on(f"sqlite:///{path(name)}", **options)


def app_on(url: str, results: Optional[str] = None, **options: Any) -> Any:
    """Return the benchmark app in this process; it and the workers started from now on use `url`.

    Results go to `results`, to `url` too if None, nowhere if ""; `options` are the transport's.
    """
    os.environ["BENCH_BROKER"] = url
    os.environ["BENCH_RESULTS"] = url if results is None else results
    os.environ["BENCH_OPTIONS"] = json.dumps(options)
    sys.modules.pop("tasks", None)
    import tasks

    return tasks


def environment() -> "dict[str, str]":
    """What a worker of the app gets."""
    return dict(os.environ, PYTHONPATH=os.pathsep.join([HERE, ROOT]))


def command_line(*args: str) -> "list[str]":
    return [sys.executable, "-m", "miniq", "-q", "-A", "tasks", "worker", *args]


@contextmanager
def worker(*args: str, wait: bool = True) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a worker process of the benchmark app."""
    process = subprocess.Popen(
        command_line(*args),
        env=environment(), cwd=FOLDER, stderr=subprocess.DEVNULL if "-l" not in args else None,
    )  # fmt: skip
    try:
        if wait:
            import tasks

            tasks.add.delay(1, 1).get(timeout=30)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

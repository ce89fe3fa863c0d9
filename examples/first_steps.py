# SPDX-License-Identifier: MIT
"""First steps: tasks in this file, a queue in a SQLite file, a worker in processes of its own.

    python3 examples/first_steps.py

Needs nothing but Python, not even an installation.  The queue lives in a temporary folder, the
worker ends with the program, and nothing is left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import List

HERE = Path(__file__).resolve().parent
# Run from the clone, without miniq installed; and leave no __pycache__ in it.
sys.path[:0] = [str(HERE.parent), str(HERE)]
sys.dont_write_bytecode = True

from miniq import AsyncResult, MiniQ  # noqa: E402
from miniq.exceptions import WorkerLostError  # noqa: E402

app = MiniQ("first_steps")


@app.task
def add(x: int, y: int) -> int:
    """Return a sum: the task that every task queue begins with."""
    return x + y


@app.task
def where() -> int:
    """Return the id of the process that runs this."""
    time.sleep(0.05)
    return os.getpid()


@app.task(bind=True, autoretry_for=(ConnectionError,), default_retry_delay=0.2, max_retries=3)
def moody(self):
    """Fail twice, then succeed: as things on the other end of a network do."""
    if self.request.retries < 2:
        raise ConnectionError("the other side hung up")
    return f"went well at attempt {self.request.retries + 1}"


@app.task
def divide(x: float, y: float) -> float:
    """Divide; by zero it fails, as it should."""
    return x / y


@app.task
def crash() -> None:
    """End the process without a word, as a crash in C code or a lack of memory does."""
    os._exit(3)


def main() -> int:
    """Send tasks, start a worker, show what comes back."""
    with tempfile.TemporaryDirectory(prefix="miniq-") as folder:
        url = "sqlite:///" + (Path(folder) / "queue.db").as_posix()
        app.conf.broker_url = url
        say(f"The queue is a file: {Path(folder) / 'queue.db'}")

        results = [add.delay(n, n) for n in range(5)]
        say(f"Sent {len(results)} tasks.  No worker runs yet, so they wait: {results[0].state}")

        worker = start_worker(url)
        try:
            use(results)
        finally:
            code = stop(worker)
            app.close()
        say(f"The worker finished its work and ended with exit code {code}.")
    say(f"The queue is gone with its folder: {not os.path.exists(folder)}")
    return code


def use(results: List[AsyncResult]) -> None:
    """Show what tasks do: succeed, share the work, retry, fail, crash."""
    say(f"Their results: {[result.get(timeout=60) for result in results]}")

    pids = {result.get(timeout=60) for result in [where.delay() for _ in range(8)]}
    say(f"8 tasks ran in {len(pids)} processes, none of them this one: {os.getpid() not in pids}")

    say(f"A task that fails twice and is retried: {moody.delay().get(timeout=60)!r}")

    try:
        divide.delay(1, 0).get(timeout=60)
    except ZeroDivisionError as error:
        say(f"An exception in a task comes out of get(): {error!r}")

    try:
        crash.delay().get(timeout=60)
    except WorkerLostError as error:
        say(f"A task that killed its process is told as such: {error}")
    say(f"The worker goes on with a new process: 20 + 22 = {add.delay(20, 22).get(timeout=60)}")


def start_worker(url: str) -> "subprocess.Popen[bytes]":
    """Start ``python -m miniq`` as a process, as you would in a second terminal."""
    arguments = ["-m", "miniq", "-A", "first_steps", "-b", url, "--quiet", "worker", "--concurrency", "2"]
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    # This program makes errors on purpose and shows them itself.
    command = [sys.executable, *arguments, "--loglevel", "CRITICAL"]
    worker = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    say(f"Started a worker (process {worker.pid}): python -m miniq -A first_steps worker --concurrency 2")
    return worker


def stop(worker: "subprocess.Popen[bytes]") -> int:
    """Ask the worker to finish what it runs and leave; return its exit code."""
    worker.send_signal(signal.SIGTERM)
    try:
        return worker.wait(timeout=60)
    except subprocess.TimeoutExpired:
        worker.kill()
        return worker.wait()


def say(text: str) -> None:
    """Print a line at once."""
    print(f"- {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: MIT
"""What can go wrong with a task, and what then happens: retries, time limits, expiry, lost processes.

    python3 examples/retries_and_limits.py

The worker runs inside this program, but its tasks run in processes (the pool ``prefork``), because
only a process can be stopped from outside.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path

# Run from the clone, without miniq installed; and leave no __pycache__ in it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.dont_write_bytecode = True

from miniq import MiniQ  # noqa: E402
from miniq.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded  # noqa: E402

# These errors are made on purpose and shown below; the log need not repeat them.
logging.basicConfig(level=logging.CRITICAL)
app = MiniQ("retries_and_limits")


class Busy(Exception):
    """The service is busy; later it may not be."""


@app.task(bind=True, autoretry_for=(Busy,), default_retry_delay=0.1, max_retries=5)
def call_service(self):
    """Retried by itself, because Busy is in autoretry_for.

    With ``retry_backoff=True`` instead of the delay, the pauses grow: 1, 2, 4 ... seconds.
    """
    if self.request.retries < 3:
        raise Busy(f"attempt {self.request.retries + 1}")
    return f"answered at attempt {self.request.retries + 1}"


@app.task(bind=True, max_retries=2, default_retry_delay=0.1)
def never_works(self):
    """Retried by hand; when the retries are used up, the last error is the result."""
    try:
        raise OSError("no such host")
    except OSError as error:
        raise self.retry(exc=error) from error


@app.task(soft_time_limit=0.3)
def tidy():
    """Told after 0.3 seconds that time is over, and cleans up."""
    try:
        time.sleep(30)
    except SoftTimeLimitExceeded:
        return "stopped early, cleaned up"
    return "slept well"


@app.task(time_limit=0.5)
def stubborn():
    """Runs into the hard limit: its process is ended, and replaced."""
    time.sleep(30)


@app.task
def too_late():
    """Has no purpose any more when it waited for too long."""
    return "in time"


def main() -> None:
    """Let each of them go wrong in its own way."""
    with tempfile.TemporaryDirectory(prefix="miniq-") as folder:
        app.conf.broker_url = "sqlite:///" + (Path(folder) / "queue.db").as_posix()
        expired = too_late.apply_async(expires=0.001)
        time.sleep(0.01)
        with app.worker(pool="prefork", concurrency=2):
            print("retried:        ", call_service.delay().get(timeout=60))
            show("gave up:        ", never_works.delay(), OSError)
            print("soft time limit:", tidy.delay().get(timeout=60))
            show("hard time limit:", stubborn.delay(), TimeLimitExceeded)
            show("expired:        ", expired, TaskRevokedError)
        app.close()


def show(what, result, error_class) -> None:
    """Print the error that a task ended with."""
    try:
        result.get(timeout=60)
    except error_class as error:
        print(what, repr(error))


if __name__ == "__main__":
    main()

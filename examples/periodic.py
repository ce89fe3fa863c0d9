# SPDX-License-Identifier: MIT
"""Tasks that come round: a worker with beat inside, in this program.

    python3 examples/periodic.py

In a project beat is a program of its own, ``python -m miniq -A proj beat``, or lives in a worker,
``python -m miniq -A proj worker -B``.  Any number of them may run: each tick is sent once.
"""

from __future__ import annotations

import sys
import threading
import time
from datetime import datetime
from pathlib import Path

# Run from the clone, without miniq installed; and leave no __pycache__ in it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.dont_write_bytecode = True

from miniq import MiniQ  # noqa: E402
from miniq.schedules import crontab  # noqa: E402

app = MiniQ("periodic", broker="memory://")
weekdays_at_seven = crontab(minute=0, hour=7, day_of_week="mon-fri")
app.conf.beat_schedule = {
    "ticker": {"task": "periodic.say", "schedule": 0.5, "args": ("tick",)},
    "report": {"task": "periodic.say", "schedule": weekdays_at_seven},
}
said = threading.Semaphore(0)


@app.task(name="periodic.say")
def say(word: str = "good morning") -> None:
    """Stand for something that is done again and again."""
    print(f"{word} at {time.strftime('%X')}")
    said.release()


def main() -> None:
    """Let it tick three times, and see when the report is due."""
    with app.worker(concurrency=1), app.Beat():
        for _ in range(3):
            said.acquire(timeout=60)
    next_due = weekdays_at_seven.next_due(time.time(), app.zone)
    print("the next report is due", datetime.fromtimestamp(next_due, app.zone))
    app.close()


if __name__ == "__main__":
    main()

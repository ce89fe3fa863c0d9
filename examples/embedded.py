# SPDX-License-Identifier: MIT
"""A worker inside the program: no second process, no second terminal.

    python3 examples/embedded.py

For scripts, tests and small services.  The tasks run in threads of this program while the block
``with app.worker(...)`` is open; leaving it waits for those that run.  With ``memory://`` the queue
lives and dies with the program.  With a SQLite file, what was not finished is still there at the
next start.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

# Run from the clone, without miniq installed; and leave no __pycache__ in it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.dont_write_bytecode = True

from miniq import MiniQ  # noqa: E402

app = MiniQ("embedded", broker="memory://")


@app.task
def fetch(page: int) -> str:
    """Stand for something that waits: a download, a database."""
    time.sleep(0.1)
    return f"page {page} by {threading.current_thread().name}"


def main() -> None:
    """Fetch eight pages, four at a time."""
    with app.worker(concurrency=4):
        results = [fetch.delay(page) for page in range(8)]
        for result in results:
            print(result.get(timeout=60))
    app.close()


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""Benchmarks of miniq on a SQLite file, on Redis and on RabbitMQ, beside their floors.  See README.rst."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from typing import List

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

import on_rabbit  # noqa: E402
import on_redis  # noqa: E402
import on_sqlite  # noqa: E402
import on_workflows  # noqa: E402
import ours  # noqa: E402

STORES = {"sqlite": on_sqlite, "redis": on_redis, "rabbit": on_rabbit, "workflows": on_workflows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    known = [*STORES, *(name for store in STORES.values() for name in store.BENCHMARKS)]
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(known)} (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="fewer (0.1) or more (2) rounds")
    parser.add_argument("--quick", action="store_true", help="the fewest rounds: does it all still run?")
    parser.add_argument("--million", action="store_true", help="backlog: also with a million messages")
    parser.add_argument("--peers", action="store_true", help="others beside it, where importable")
    options = parser.parse_args()
    if options.quick:
        options.scale = 0.02
    # What is installed has its byte code beside it; so shall what is measured.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    names: List[str] = []
    for name in options.names or STORES:
        if name not in known:
            parser.error(f"unknown benchmark {name!r}; known: {', '.join(known)}")
        names += STORES[name].BENCHMARKS if name in STORES else [name]
    ours.FOLDER = tempfile.mkdtemp(prefix="miniq-bench-")
    try:
        for store in STORES.values():
            asked = [name for name in names if name in store.BENCHMARKS]
            if asked:
                store.run(ours.FOLDER, asked, options)
    finally:
        shutil.rmtree(ours.FOLDER, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: MIT
"""The app that the benchmarks drive; settings come from the environment."""

from __future__ import annotations

import os
import time

from miniq import MiniQ

url = os.environ.get("BENCH_BROKER", "sqlite:///bench.db")
app = MiniQ("bench", broker=url, backend=url)
app.conf.worker_enable_remote_control = True
if os.environ.get("BENCH_OPTIONS"):
    app.conf.broker_transport_options = dict(
        pair.split("=") for pair in os.environ["BENCH_OPTIONS"].split(",")
    )


@app.task
def add(x, y):
    return x + y


@app.task(ignore_result=True)
def nothing(x, y):
    return None


@app.task(ignore_result=True)
def stamp(path, due):
    """Append how late (seconds) this run is to a file."""
    late = time.time() - due
    with open(path, "a") as file:
        file.write(f"{late:.6f}\n")

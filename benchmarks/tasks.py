# SPDX-License-Identifier: MIT
"""The app that the benchmarks drive; settings come from the environment."""

from __future__ import annotations

import json
import os
import time

from miniq import MiniQ, chain, chord

url = os.environ.get("BENCH_BROKER", "sqlite:///bench.db")
app = MiniQ("bench", broker=url, backend=os.environ.get("BENCH_RESULTS", url) or None)
app.conf.worker_enable_remote_control = True
app.conf.broker_transport_options = json.loads(os.environ.get("BENCH_OPTIONS", "{}"))


@app.task
def add(x, y):
    return x + y


@app.task
def total(values):
    return sum(values)


@app.task(ignore_result=True)
def nothing(x, y):
    return None


@app.task(ignore_result=True)
def stamp(path, due):
    """Append how late (seconds) this run is to a file."""
    late = time.time() - due
    with open(path, "a") as file:
        file.write(f"{late:.6f}\n")


# The verbs that the apps of others have too.


def send(task):
    task.delay(2, 3)


def bulk(task, n):
    """Send `n` calls, a thousand at once, through the transport itself."""
    producer = app.producer
    producer.transport.declare(app.router.queues["celery"])
    if not task.ignore_result:
        app.backend.before_call(60.0)
    options = {"ignore_result": task.ignore_result}
    for begin in range(0, n, 1000):
        share = range(begin, min(n, begin + 1000))
        producer.transport.publish(
            [producer.prepare(task.name, (2, 3), {}, options, task).publication for _ in share], 60.0
        )


def chord_of(n):
    return chord(add.s(1, 1) for _ in range(n))(total.s())


def chain_of(n):
    return chain(add.s(1, 1), *[add.s(1) for _ in range(n - 1)])()


def ask():
    return add.delay(2, 3).get(timeout=30)

# SPDX-License-Identifier: MIT
"""How the benchmarks drive other queues: their apps in this process, their workers beside it.

An app is a module with two tasks, ``add`` and ``nothing``, and three verbs: ``send(task)`` enqueues
one call, ``bulk(task, n)`` many at once, ``ask()`` waits for a result in the peer's own way.  Each is
written as its documentation shows it; addresses and settings come from the environment.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from typing import Any, Dict, List, Optional, Tuple

from measuring import family

CELERY = """
import json, os
from celery import Celery, group
app = Celery("peer", broker=os.environ["PEER_URL"], backend=os.environ["PEER_RESULTS"] or None)
app.conf.update(json.loads(os.environ["PEER_OPTIONS"]))

@app.task
def add(x, y):
    return x + y

@app.task(ignore_result=True)
def nothing(x, y):
    return None

def send(task):
    task.delay(2, 3)

def bulk(task, n):
    group(task.s(2, 3) for _ in range(n)).apply_async()

def ask():
    return add.delay(2, 3).get(timeout=30)
"""
DRAMATIQ = """
import json, os
import dramatiq
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
if os.environ["PEER_URL"].startswith("amqp:"):
    from dramatiq.brokers.rabbitmq import RabbitmqBroker as Broker
else:
    from dramatiq.brokers.redis import RedisBroker as Broker
broker = Broker(url=os.environ["PEER_URL"], **json.loads(os.environ["PEER_OPTIONS"]))
results = os.environ["PEER_RESULTS"]
if results:
    broker.add_middleware(Results(backend=RedisBackend(url=results)))
dramatiq.set_broker(broker)

@dramatiq.actor(**({"store_results": True} if results else {}))
def add(x, y):
    return x + y

@dramatiq.actor
def nothing(x, y):
    return None

def send(task):
    task.send(2, 3)

def bulk(task, n):
    dramatiq.group([task.message(2, 3) for _ in range(n)], broker=broker).run()

def ask():
    return add.send(2, 3).get_result(block=True, timeout=30000)
"""


def missing(*packages: str) -> List[str]:
    """Return which of these cannot be imported here."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def program(name: str, *args: str) -> List[str]:
    """Return the command line of a program that a package brought."""
    return [os.path.join(os.path.dirname(sys.executable), name), *args]


def load(
    folder: str, name: str, source: str, url: str, results: Optional[str] = None, **options: Any
) -> Tuple[Any, Dict[str, str]]:
    """Write and import an app under that name; return the module and the environment of its workers.

    Results go to `results`, to `url` too if None, nowhere if "".  Every call makes an app of its own;
    those made before go on as they are.
    """
    os.environ["PEER_URL"] = url
    os.environ["PEER_RESULTS"] = url if results is None else results
    os.environ["PEER_OPTIONS"] = json.dumps(options)
    with open(os.path.join(folder, f"{name}.py"), "w") as file:
        file.write(source)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    return module, dict(os.environ, PYTHONPATH=folder)


class Workers:
    """Worker processes, for the length of a with-block."""

    def __init__(self, folder: str, commands: List[List[str]], env: Dict[str, str]) -> None:
        self._folder = folder
        self._commands = commands
        self._env = env
        self._processes: "List[subprocess.Popen[bytes]]" = []

    def __enter__(self) -> "Workers":
        quiet = subprocess.DEVNULL
        for args in self._commands:
            process = subprocess.Popen(args, env=self._env, cwd=self._folder, stdout=quiet, stderr=quiet)
            self._processes.append(process)
        return self

    def pids(self) -> List[int]:
        return [pid for process in self._processes for pid in family(process.pid)]

    def __exit__(self, *exc_info: Any) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes = []

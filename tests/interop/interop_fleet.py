# SPDX-License-Identifier: MIT
"""Workers and callers of both kinds over a broker and a result backend; see `conftest`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import uuid
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import pytest
from interop_tasks import BACKEND, BROKER, FOLDER, MORE, Journal, settings
from servers import RabbitServer, RedisServer
from waiting import wait_until
from workers import READY_FILE, Program, environment

#: What of Celery must be there and is not.
MISSING = [name for name in ("celery", "redis") if importlib.util.find_spec(name) is None]
HERE = Path(__file__).parent
#: Where messages are and where results are.
STORES = ("redis", "amqp+redis", "amqp+rpc")
#: caller, worker
PAIRS = (("celery", "celery"), ("celery", "miniq"), ("miniq", "celery"))
#: caller, worker of the first step, worker of the next one: both kinds take part in each but the first.
CROSSINGS = (
    ("celery", "celery", "celery"),
    ("celery", "celery", "miniq"),
    ("celery", "miniq", "celery"),
    ("miniq", "celery", "miniq"),
    ("miniq", "miniq", "celery"),
    ("celery", "miniq", "miniq"),
    ("miniq", "celery", "celery"),
)
#: Seconds; generous, nothing waits for them to pass.
TIMEOUT_S = 30.0
#: Seconds that a worker's hold on a message lasts unless renewed; short, so that a failure shows.
LEASE_S = 2.0
#: Settings with it.
LEASE: Dict[str, Any] = {"broker_transport_options": {"lease": LEASE_S}}
#: Number of the Redis database with the results of tasks that were sent over RabbitMQ.
RESULTS_DB = 8


class Worker(Program):
    """A worker process of either kind."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, env: Dict[str, str]) -> None:
        self.name = name
        self._ready_file = folder / f"{name}.ready"
        super().__init__(
            [sys.executable, "-m", *command], folder, name, {**env, READY_FILE: str(self._ready_file)}
        )
        #: Length of its log when the test began.
        self.seen = 0

    def wait_ready(self) -> "Worker":
        """Wait until it takes messages."""
        wait_until(
            lambda: self._ready_file.exists() or self.exitcode is not None,
            TIMEOUT_S,
            lambda: f"{self.name} takes messages; its log:\n{self.log}",
        )
        assert self._ready_file.exists(), f"{self.name} ended with {self.exitcode}; its log:\n{self.log}"
        return self

    def __repr__(self) -> str:
        return f"<worker {self.name} (pid {self.pid})>"


class Side:
    """A caller of one kind: its app, and its exceptions and workflows under the names both have."""

    def __init__(self, kind: str, app: Any) -> None:
        self.kind = kind
        self.app = app
        self.exceptions = importlib.import_module(f"{kind}.exceptions")
        self.canvas = importlib.import_module(f"{kind}.canvas")

    def call(self, name: str, *args: Any, kwargs: Optional[Dict[str, Any]] = None, **options: Any) -> Any:
        """Send ``interop.name``; return its result object."""
        return self.app.tasks[f"interop.{name}"].apply_async(args, kwargs or {}, **options)

    def sig(self, name: str, *args: Any, **options: Any) -> Any:
        """Return a signature of ``interop.name``, as by somebody who has only its name."""
        return self.app.signature(f"interop.{name}", args=args, **options)


class Fleet:
    """A broker and a result backend, the workers and the callers that use them.

    A `space` is a part of both that has nothing in common with the others; the workers that all tests
    share are in space 0.
    """

    #: One of `STORES`.
    store: str

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.journal = Journal(folder)
        self.workers: Dict[str, Worker] = {}
        self._sides: Dict[Tuple[str, int], Side] = {}

    def urls(self, space: int) -> Tuple[str, str]:
        """Return broker and backend."""
        raise NotImplementedError

    def ask_results(self, *command: str) -> Any:
        """Have the Redis with the results of space 0 run a command."""
        raise NotImplementedError

    def nothing_held(self, space: int = 0) -> bool:
        """Say whether the broker knows of no message that a worker holds."""
        return not self.held(space)

    def held(self, space: int = 0) -> int:
        """Return how many messages the broker has given to workers and not yet seen acknowledged."""
        raise NotImplementedError

    def waiting(self, queue: str, space: int = 0) -> int:
        """Return how many messages are in a queue which no worker has; 0 too where there is no queue."""
        raise NotImplementedError

    def start(self, name: str, kind: str, queues: str, *args: str, space: int = 0, **more: Any) -> Worker:
        """Start a worker; do not wait until it is ready.  `more` are settings; no `queues`: the default."""
        broker, backend = self.urls(space)
        variables = {BROKER: broker, BACKEND: backend, FOLDER: str(self.folder), MORE: json.dumps(more)}
        env = environment(HERE, HERE.parent, **variables)
        env["C_FORCE_ROOT"] = "1"  # containers of CI run as root; without it there is no pickle
        if kind == "celery":
            del env["PYTHONWARNINGS"]  # Celery's are its own business
        command = [kind, "-A", f"{kind}_app:app", "worker", "-l", "INFO", "-n", f"{name}@interop", *args]
        if queues:
            command += ["-Q", queues]
        worker = self.workers[name] = Worker(name, command, self.folder, env)
        return worker

    def side(self, kind: str, space: int = 0, **more: Any) -> Side:
        """Return the caller of this kind; `more` are settings for the first time."""
        found = self._sides.get((kind, space))
        if found is None:
            # Not at the top: without Celery this file must be importable.
            apps = importlib.import_module(f"{kind}_app")
            app = apps.make(**settings(*self.urls(space), **more))
            found = self._sides[kind, space] = Side(kind, app)
        return found

    def pair(self, crossing: Tuple[str, str, str]) -> "Pair":
        """Return one of `CROSSINGS`, whose workers are ready."""
        caller, worker, other = crossing
        for kind in {worker, other}:
            self.workers[kind].wait_ready()
        return Pair(self, self.side(caller), worker, f"to_{worker}", other, f"to_{other}")

    def stop(self) -> List[str]:
        """End workers and callers; return what there is to complain about."""
        complaints: List[str] = []
        for worker in self.workers.values():
            if worker.exitcode is None:
                worker.process.terminate()
        for worker in self.workers.values():
            complaints += worker.clean_up()
        for side in self._sides.values():
            if side.kind == "celery":
                self._close_celerys(side.app)
            side.app.close()
        return complaints

    def _close_celerys(self, app: Any) -> None:
        """Close what an app of Celery's leaves to the garbage collector."""
        consumer = app.backend.result_consumer
        if getattr(consumer, "_consumer", consumer) is not None:  # rpc:// has none if nobody waited
            consumer.stop()
        # Results unsubscribe when they are collected; those in the traceback of a failed test are so
        # when there is no server any more.
        app.backend.remove_pending_result = lambda result: None
        if hasattr(app.backend, "client"):
            app.backend.client.connection_pool.disconnect()
        app.pool.force_close_all()


class RedisFleet(Fleet):
    """Messages and results are in Redis: a space is a database, and the next one for the results."""

    store = "redis"

    def __init__(self, folder: Path, server: RedisServer) -> None:
        super().__init__(folder)
        self.server = server

    def urls(self, space: int) -> Tuple[str, str]:
        return self.server.url(space), self.server.url(space + 1)

    def ask_results(self, *command: str) -> Any:
        return self.server.command(*command, db=1)

    def held(self, space: int = 0) -> int:
        counts = self.server.commands([("HLEN", "unacked"), ("ZCARD", "unacked_index")], db=space)
        return int(max(counts))

    def waiting(self, queue: str, space: int = 0) -> int:
        return int(self.server.command("LLEN", queue, db=space))


class AmqpFleet(Fleet):
    """Messages are in RabbitMQ, each space a virtual host; results are in Redis, or sent to the caller."""

    def __init__(self, folder: Path, server: RabbitServer, results: Optional[RedisServer] = None) -> None:
        super().__init__(folder)
        self.server = server
        self._results = results
        self.store = "amqp+redis" if results else "amqp+rpc"
        self._vhosts: Dict[int, str] = {}

    def vhost(self, space: int) -> str:
        """Return the name of a virtual host, which exists then."""
        if space not in self._vhosts:
            self._vhosts[space] = self.server.new_vhost()
        return self._vhosts[space]

    def urls(self, space: int) -> Tuple[str, str]:
        backend = self._results.url(RESULTS_DB) if self._results else "rpc://"
        return self.server.url(self.vhost(space)), backend

    def ask_results(self, *command: str) -> Any:
        assert self._results, "results are sent to the caller"
        return self._results.command(*command, db=RESULTS_DB)

    def held(self, space: int = 0) -> int:
        queues = self.server.queues(self.vhost(space)).values()
        return sum(queue["messages_unacknowledged"] for queue in queues)

    def waiting(self, queue: str, space: int = 0) -> int:
        found = self.server.queues(self.vhost(space)).get(queue)
        return found["messages_ready"] if found else 0


class Pair(NamedTuple):
    """Who calls whom."""

    fleet: Fleet
    client: Side
    #: Kind and queue of the worker that is called, and of the other one.
    worker: str
    queue: str
    other: str
    other_queue: str

    @property
    def journal(self) -> Journal:
        return self.fleet.journal

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        """Send a task to the worker."""
        return self.client.call(name, *args, queue=self.queue, **options)

    def here(self, name: str, *args: Any, **options: Any) -> Any:
        """Return a signature for the worker."""
        return self.client.sig(name, *args, **options).set(queue=self.queue)

    def there(self, name: str, *args: Any, **options: Any) -> Any:
        """Return a signature for the other worker."""
        return self.client.sig(name, *args, **options).set(queue=self.other_queue)

    def started(self, key: str, count: int = 1) -> List[List[Any]]:
        """Wait until the journal has `count` lines under `key`; return them."""
        return wait_until(
            lambda: (lines := self.journal.of(key))[count - 1 :] and lines,
            TIMEOUT_S,
            lambda: f"{count} lines under {key}: {self.journal.of(key)}",
        )


class Backlog:
    """Calls of ``note`` that are in their queues before the workers come, by (caller, worker).

    `callers` are settings of the callers, `workers` those of each kind of worker.  None of them accepts
    the first call, which is pickled; the others have the priorities `sent`.
    """

    def __init__(
        self,
        fleet: Fleet,
        space: int,
        sent: Sequence[Optional[int]],
        callers: Mapping[str, Any],
        workers: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.fleet = fleet
        self.space = space
        self.sent = sent
        self.keys = {pair: new_key() for pair in PAIRS}
        self.refused: Dict[Tuple[str, str], Any] = {}
        for kind in ("celery", "miniq"):
            fleet.side(kind, space, **callers)
        for pair in PAIRS:
            self._send(*pair)
        for kind, more in workers.items():
            queues = ",".join(self.queue(*pair) for pair in PAIRS if pair[1] == kind)
            args = ["--without-mingle"] if kind == "celery" else []
            fleet.start(
                f"late_{kind}", kind, queues, "-P", "solo", *args,
                space=space, accept_content=["json"], **more,
            )  # fmt: skip

    @staticmethod
    def queue(caller: str, worker: str) -> str:
        return f"from_{caller}_to_{worker}"

    def _send(self, caller: str, worker: str) -> None:
        pair = caller, worker
        side, queue, key = self.fleet.side(caller, self.space), self.queue(*pair), self.keys[pair]
        self.refused[pair] = side.call("note", key, "pickled", queue=queue, serializer="pickle")
        for priority in self.sent:
            options: Dict[str, Any] = {} if priority is None else {"priority": priority}
            side.call("note", key, priority, queue=queue, **options)

    def lines(self, pair: Tuple[str, str]) -> List[Any]:
        """Wait for the worker and return what it noted of the calls, in its order."""
        self.fleet.workers[f"late_{pair[1]}"].wait_ready()
        journal, key = self.fleet.journal, self.keys[pair]
        wait_until(lambda: len(journal.of(key)) >= len(self.sent), TIMEOUT_S, lambda: journal.of(key))
        return [line[4] for line in journal.of(key)]

    def check_the_refused_one(self, pair: Tuple[str, str]) -> None:
        """Check what has become of the call that was pickled."""
        assert "pickled" not in self.lines(pair)
        result = self.refused[pair]
        if pair[1] == "celery":  # says so in its log only
            assert result.state == "PENDING"
            assert "Refusing to deserialize" in self.fleet.workers["late_celery"].log
        else:
            assert type(error_of(result)).__name__ == "ContentDisallowed"
            assert self.fleet.side("miniq", self.space).app.producer.transport.dead_letters()
        wait_until(lambda: self.fleet.nothing_held(self.space), TIMEOUT_S, "nothing is held")


def new_key() -> str:
    """Return a key for the journal that nobody else has."""
    return uuid.uuid4().hex


def get(result: Any) -> Any:
    """Wait for a result, with a deadline; Celery looks at the members of a group once in an interval."""
    return result.get(timeout=TIMEOUT_S, interval=0.02)


def error_of(result: Any) -> BaseException:
    """Wait for a failure; return the exception that the caller gets."""
    try:
        value = get(result)
    except Exception as error:
        return error
    raise AssertionError(f"the task returned {value!r}")


def skip_without_celery() -> None:
    """Skip the module that calls it where Celery is not installed."""
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}; tox -e interop has it", allow_module_level=True)

# SPDX-License-Identifier: MIT
"""Remote control, the worker's side: hears commands on its own queue and carries them out.

Its consumer is apart from that of tasks: a worker whose slots are all taken still hears.
"""

from __future__ import annotations

import fnmatch
import re
from typing import Any, Callable, Dict, List, Mapping, Optional, Protocol

from ..control import REVOKE_EXPIRES_S
from ..exceptions import MiniqError, OperationalError
from ..log import get_logger
from ..loop import Loop, Timer
from ..message import Delivery
from ..routing import Queue
from ..serialization import loads
from ..transports.base import Consumer
from .consumer import TaskConsumer

logger = get_logger(__name__)

#: Commands taken in one turn.
BATCH = 32
#: Seconds between two looks for a command whose wake-up was missed.
LOOK_INTERVAL_S = 0.5


class ControlledWorker(Protocol):
    """What commands need of a worker."""

    app: Any
    hostname: str
    tasks: TaskConsumer

    def stop(self) -> None:
        """Finish what runs and leave."""

    def add_queue(self, queue: Queue) -> None:
        """Consume from one more queue."""

    def cancel_queue(self, name: str) -> None:
        """Stop consuming from a queue."""


Handler = Callable[[ControlledWorker, Mapping[str, Any]], Any]
COMMANDS: Dict[str, Handler] = {}


def command(fun: Handler) -> Handler:
    """Make a function a command under its own name; it returns the reply."""
    COMMANDS[fun.__name__] = fun
    return fun


class CommandConsumer:
    """Reads the control queue in the worker's loop."""

    def __init__(self, worker: ControlledWorker, loop: Loop, consumer: Consumer) -> None:
        self.worker = worker
        self.loop = loop
        self.consumer = consumer
        self._net: Optional[Timer] = None
        self._fd: Optional[int] = None
        self._again: Optional[Timer] = None

    def start(self) -> None:
        """Begin to listen."""
        self._look_later()
        self._take()

    def close(self) -> None:
        """Stop listening; the queue goes with its worker."""
        self._unwatch()
        for timer in (self._net, self._again):
            if timer is not None:
                timer.cancel()
        self.consumer.close()

    def _watch(self) -> None:
        if self._fd is None or self.consumer.moved:
            self._unwatch()
            fd = self._fd = self.consumer.fileno()
            if fd is not None:
                self.loop.add_reader(fd, self._on_readable)

    def _unwatch(self) -> None:
        if self._fd is not None:
            self.loop.remove_reader(self._fd)
            self._fd = None

    def _look_later(self) -> None:
        if self.consumer.poll_interval_s is not None:
            interval_s = max(self.consumer.poll_interval_s, LOOK_INTERVAL_S)
            self._net = self.loop.call_later(interval_s, self._look)

    def _look(self) -> None:
        try:
            if self.consumer.changed() or self.consumer.moved:
                self._take()
        except OperationalError as error:
            self._trouble(error)
        self._look_later()

    def _on_readable(self) -> None:
        try:
            self.consumer.on_readable()
        except OperationalError as error:
            self._trouble(error)
        else:
            self._take()

    def _take(self) -> None:
        try:
            deliveries = self.consumer.poll(BATCH)
            for delivery in deliveries:
                self.consumer.ack(delivery)
            self._watch()
        except OperationalError as error:
            self._trouble(error)
            return
        for delivery in deliveries:
            self._carry_out(delivery)
        if len(deliveries) == BATCH:
            self.loop.call_soon(self._take)

    def _trouble(self, error: OperationalError) -> None:
        """Look again soon; a broken descriptor would be ready all the time."""
        logger.debug("control queue: %s", error)
        self._unwatch()
        if self._again is None:
            self._again = self.loop.call_later(LOOK_INTERVAL_S, self._take_again)

    def _take_again(self) -> None:
        self._again = None
        self._take()

    def _carry_out(self, delivery: Delivery) -> None:
        message = delivery.message
        try:
            body = loads(message.body, message.content_type, message.content_encoding, self.worker.app.accept)
            if not isinstance(body, dict) or not isinstance(body.get("method"), str):
                raise ValueError(f"no method: {body!r:.200}")
        except (MiniqError, ValueError) as error:
            logger.error("A control message cannot be read and is dropped: %s", error)
            return
        if not addressed(self.worker.hostname, body):
            return
        name, arguments = body["method"], body.get("arguments") or {}
        handler = COMMANDS.get(name)
        if handler is None:
            logger.error("No such control command: %r", name)
            return
        try:
            handler(self.worker, arguments)
        except Exception:  # safety net: a command must not stop the worker
            logger.exception("Control command %s(%r) failed", name, arguments)


def addressed(hostname: str, body: Mapping[str, Any]) -> bool:
    """Say whether a command is meant for the worker called `hostname`."""
    destination, pattern = body.get("destination"), body.get("pattern")
    if destination is not None:
        return hostname in destination
    if pattern is not None:
        if body.get("matcher") == "pcre":
            return re.match(pattern, hostname) is not None
        return fnmatch.fnmatchcase(hostname, pattern)
    return True


# -- the commands --------------------------------------------------------------------------------


@command
def revoke(worker: ControlledWorker, arguments: Mapping[str, Any]) -> Any:
    """Do not start these ids; with `terminate`, stop those that run."""
    given = arguments["task_id"]
    ids = [given] if isinstance(given, str) else list(given)
    until = worker.app.wall() + REVOKE_EXPIRES_S
    terminate = bool(arguments.get("terminate"))
    stopped: List[str] = worker.tasks.revoke(ids, until, terminate, arguments.get("signal") or "SIGTERM")
    if terminate:
        return {"ok": f"terminate: {', '.join(stopped) or 'tasks unknown'}"}
    return {"ok": f"tasks {ids} flagged as revoked"}


@command
def rate_limit(worker: ControlledWorker, arguments: Mapping[str, Any]) -> Any:
    """Change the rate limit of a task."""
    worker.tasks.admission.set_rate_limit(arguments["task_name"], arguments.get("rate_limit"))
    return {"ok": "new rate limit set successfully"}


@command
def time_limit(worker: ControlledWorker, arguments: Mapping[str, Any]) -> Any:
    """Change the time limits (seconds) of a task."""
    worker.tasks.admission.set_time_limit(
        arguments["task_name"], arguments.get("soft"), arguments.get("hard")
    )
    return {"ok": "time limits set successfully"}


@command
def add_consumer(worker: ControlledWorker, arguments: Mapping[str, Any]) -> Any:
    """Consume from one more queue."""
    name = arguments["queue"]
    worker.add_queue(worker.app.router.queues[name])
    return {"ok": f"add consumer {name}"}


@command
def cancel_consumer(worker: ControlledWorker, arguments: Mapping[str, Any]) -> Any:
    """Stop consuming from a queue."""
    worker.cancel_queue(arguments["queue"])
    return {"ok": f"no longer consuming from {arguments['queue']}"}


@command
def pool_grow(worker: ControlledWorker, arguments: Mapping[str, Any]) -> Any:
    """Add slots."""
    worker.tasks.pool.grow(int(arguments.get("n") or 1))
    return {"ok": "pool will grow"}


@command
def pool_shrink(worker: ControlledWorker, arguments: Mapping[str, Any]) -> Any:
    """Take slots away."""
    worker.tasks.pool.shrink(int(arguments.get("n") or 1))
    return {"ok": "pool will shrink"}


@command
def ping(worker: ControlledWorker, arguments: Mapping[str, Any]) -> Any:
    """Answer."""
    return {"ok": "pong"}


@command
def shutdown(worker: ControlledWorker, arguments: Mapping[str, Any]) -> Any:
    """Finish what runs and leave."""
    worker.stop()
    return None

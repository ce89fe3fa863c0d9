# SPDX-License-Identifier: MIT
"""Remote control, the worker's side: hears commands on its own queue and carries them out.

Its consumer is apart from that of tasks: a worker whose slots are all taken still hears.
"""

from __future__ import annotations

import fnmatch
import re
from typing import Any, Callable, Dict, List, Mapping, Protocol

from ..control import REVOKE_EXPIRES_S
from ..exceptions import MiniqError
from ..log import get_logger
from ..loop import Loop
from ..mailbox import Mailbox
from ..message import Message
from ..routing import Queue
from ..serialization import loads
from ..transports.base import Consumer
from .consumer import TaskConsumer

logger = get_logger(__name__)


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


class Commands:
    """Carries out what comes in the control queue, in the worker's loop."""

    def __init__(self, worker: ControlledWorker, loop: Loop, consumer: Consumer) -> None:
        self.worker = worker
        self.mailbox = Mailbox(loop, consumer, self._carry_out)

    def start(self) -> None:
        """Begin to listen."""
        self.mailbox.start()

    def close(self) -> None:
        """Stop listening; the queue goes with its worker."""
        self.mailbox.close()

    def _carry_out(self, message: Message) -> None:
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

# SPDX-License-Identifier: MIT
"""Remote control, the sender's side: commands to all workers, or to those that are named.

A command is one message on the fanout exchange ``celery.pidbox``; every worker has a queue bound to
it.  Body (Celery's form)::

    {"method": name, "arguments": {...}, "destination": [node, ...] or None,
     "pattern": None, "matcher": None}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Mapping, Optional, Union

from . import _state, states
from .exceptions import TaskRevokedError
from .message import Message
from .routing import Exchange, Queue
from .serialization import dumps, exception_to_dict
from .task import Context
from .transports.base import Publication

PIDBOX = "celery.pidbox"
#: Seconds a control message may wait for its worker before it is dropped.
MESSAGE_TTL_S = 300.0
#: Seconds a worker's control queue outlives its worker.
QUEUE_EXPIRES_S = 10.0
#: Seconds a revocation holds, as in Celery's workers.
REVOKE_EXPIRES_S = 10800.0
#: States over which a revocation is written at once: the task has not started.
_NOT_STARTED = frozenset({states.PENDING, states.RECEIVED, states.RETRY, states.REJECTED})


def control_queue(node: str) -> Queue:
    """Return the queue on which the worker called `node` hears commands."""
    return Queue(
        f"{node}.{PIDBOX}",
        Exchange(PIDBOX, "fanout", durable=False),
        routing_key="",
        durable=False,
        exclusive=True,
        auto_delete=True,
        expires=QUEUE_EXPIRES_S,
        message_ttl=MESSAGE_TTL_S,
        no_ack=True,
    )


class Control:
    """Commands to workers; reached as ``app.control``.  May be used from any thread."""

    def __init__(self, app: Any) -> None:
        self.app = app

    if not TYPE_CHECKING:  # a checker knows what there is

        def __getattr__(self, name: str) -> Any:
            raise _state.missing("app.control", name)

    def broadcast(
        self,
        command: str,
        arguments: Optional[Mapping[str, Any]] = None,
        destination: Optional[Iterable[str]] = None,
    ) -> None:
        """Send `command` to all workers, or to the node names in `destination`; wait for no answer."""
        app = self.app
        now = app.wall()
        body = {
            "method": command,
            "arguments": dict(arguments or {}),
            "destination": None if destination is None else list(destination),
            "pattern": None,
            "matcher": None,
        }
        content_type, encoding, data = dumps(body, "json")
        headers: Dict[str, Any] = {"clock": 0, "expires": now + MESSAGE_TTL_S}
        message = Message(data, content_type, encoding, headers, {"delivery_mode": 2})
        app.producer.transport.publish((Publication(message, PIDBOX, ""),), app.conf.task_publish_timeout)

    def revoke(
        self,
        task_id: Union[str, Iterable[str]],
        destination: Optional[Iterable[str]] = None,
        terminate: bool = False,
        signal: str = "SIGTERM",
    ) -> None:
        """Tell all workers not to run these ids; with `terminate`, stop them where they run.

        Holds even when no worker is up: the broker keeps the revocation for three hours, and a
        task that has not started is REVOKED at once.  With `destination` only those workers hear
        of it, as a command.
        """
        ids: List[str] = [task_id] if isinstance(task_id, str) else [str(one) for one in task_id]
        if destination is None:
            self._revoke_everywhere(ids)
        self.broadcast("revoke", {"task_id": ids, "terminate": terminate, "signal": signal}, destination)

    def _revoke_everywhere(self, ids: List[str]) -> None:
        app = self.app
        app.producer.transport.revoke(ids, app.wall() + REVOKE_EXPIRES_S)
        backend = app.backend
        if backend.enabled:
            known = backend.fetch(ids)
            cause = exception_to_dict(TaskRevokedError("revoked"))
            backend.store(
                [
                    app.runner.encode(Context(id=one, reply_to=app.thread_oid), states.REVOKED, cause, None)
                    for one in ids
                    if one not in known or known[one].state in _NOT_STARTED
                ]
            )

    def terminate(
        self,
        task_id: Union[str, Iterable[str]],
        destination: Optional[Iterable[str]] = None,
        signal: str = "SIGTERM",
    ) -> None:
        """Stop these ids where they run; they do not start anywhere else."""
        self.revoke(task_id, destination, terminate=True, signal=signal)

    def rate_limit(
        self, task_name: str, rate_limit: Any, destination: Optional[Iterable[str]] = None
    ) -> None:
        """Change the rate limit of a task in running workers."""
        self.broadcast("rate_limit", {"task_name": task_name, "rate_limit": rate_limit}, destination)

    def time_limit(
        self,
        task_name: str,
        soft: Optional[float] = None,
        hard: Optional[float] = None,
        destination: Optional[Iterable[str]] = None,
    ) -> None:
        """Change the time limits (seconds) of a task in running workers."""
        self.broadcast("time_limit", {"task_name": task_name, "soft": soft, "hard": hard}, destination)

    def add_consumer(self, queue: str, destination: Optional[Iterable[str]] = None) -> None:
        """Make workers consume from one more queue."""
        self.broadcast("add_consumer", {"queue": queue}, destination)

    def cancel_consumer(self, queue: str, destination: Optional[Iterable[str]] = None) -> None:
        """Make workers stop consuming from a queue."""
        self.broadcast("cancel_consumer", {"queue": queue}, destination)

    def pool_grow(self, n: int = 1, destination: Optional[Iterable[str]] = None) -> None:
        """Add `n` slots to each worker."""
        self.broadcast("pool_grow", {"n": n}, destination)

    def pool_shrink(self, n: int = 1, destination: Optional[Iterable[str]] = None) -> None:
        """Take `n` slots from each worker."""
        self.broadcast("pool_shrink", {"n": n}, destination)

    def shutdown(self, destination: Optional[Iterable[str]] = None) -> None:
        """Make workers finish what runs and leave."""
        self.broadcast("shutdown", {}, destination)

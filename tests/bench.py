# SPDX-License-Identifier: MIT
"""Runs messages without a worker: sent by the app's producer, run by the runner that pools use.

What a worker would publish and store is kept here, so that a test can look at each step, or have
everything settled until nothing is left.
"""

from __future__ import annotations

import json
from itertools import count
from typing import Any, Dict, List, Optional

from miniq import MiniQ
from miniq.backends.base import StoredResult
from miniq.message import Message
from miniq.trace import Outcome, Run, TaskRunner
from miniq.transports.base import Publication

HOSTNAME = "celery@bench"
_serial = count(1)


def new_broker() -> str:
    """Return the URL of a broker in memory that no other test knows."""
    return f"memory://bench{next(_serial)}"


class Bench:
    """One app's messages on their way."""

    def __init__(self, app: MiniQ) -> None:
        self.app = app
        self.runner = TaskRunner(app, HOSTNAME)
        #: Every outcome, by task id; a retried task has several.
        self.outcomes: Dict[str, List[Outcome]] = {}
        self.stored: Dict[str, StoredResult] = {}

    def prepare(self, task: Any, *args: Any, **options: Any) -> Publication:
        """Return the message of a call; `kwargs=` are the task's."""
        kwargs = options.pop("kwargs", {})
        name = task if isinstance(task, str) else task.name
        found = None if isinstance(task, str) else task
        return self.app.producer.prepare(name, args, kwargs, options, found).publication

    def run(self, publication: Publication, guard: Any = None, **info: Any) -> Outcome:
        """Run one message as a worker's child would."""
        outcome = self.runner.run(run_of(publication, **info), guard)
        task_id = publication.message.headers["id"]
        self.outcomes.setdefault(task_id, []).append(outcome)
        for result in outcome.results:
            self.stored[result.task_id] = result
        return outcome

    def call(self, task: Any, *args: Any, **options: Any) -> Outcome:
        """Send and run one call."""
        return self.run(self.prepare(task, *args, **options))

    def settle(self, task: Any, *args: Any, **options: Any) -> Outcome:
        """Send and run one call, then all that follows from it; return the first outcome."""
        first = self.call(task, *args, **options)
        left = list(first.followups)
        for _ in range(100):
            if not left:
                return first
            left += self.run(left.pop(0)).followups
        raise AssertionError("it never comes to an end")

    def meta(self, task_id: Optional[str] = None) -> Dict[str, Any]:
        """Return the decoded meta that was stored (of the only task, if no id is given)."""
        (task_id,) = [task_id] if task_id else list(self.stored)
        found: Dict[str, Any] = json.loads(self.stored[task_id].body)
        return found


def run_of(publication: Publication, **info: Any) -> Run:
    """Return what a pool gets of a message."""
    message = publication.message
    delivery_info = {
        "exchange": publication.exchange,
        "routing_key": publication.routing_key,
        "priority": message.priority,
        "redelivered": False,
        **info,
    }
    return Run(
        message.body,
        message.content_type,
        message.content_encoding,
        message.headers,
        message.properties,
        delivery_info,
    )


def body_of(publication: Publication) -> Any:
    """Return the decoded JSON body [args, kwargs, embed] of a message."""
    return json.loads(publication.message.body)


def changed(message: Message, **headers: Any) -> Message:
    """Return a copy of a message with other headers."""
    return Message(
        message.body,
        message.content_type,
        message.content_encoding,
        {**message.headers, **headers},
        message.properties,
    )

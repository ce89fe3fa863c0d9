# SPDX-License-Identifier: MIT
"""Request: the worker's own record of one task message, from its arrival to its settlement.

It decides by headers alone; the body stays bytes until it reaches the place where the task runs.
A task may name its own subclass (``Task.Request``) to hear, in the worker's main process, of time
limits and failures that its own process could not live to tell.
"""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

from .. import states
from ..exceptions import MiniqError
from ..message import Delivery
from ..pools.base import Job
from ..task import Context, Task
from ..times import TokenBucket
from ..trace import Execution, ExceptionInfo, Run, TaskRunner


class TaskPolicy:
    """What the worker does with messages of one task; read from task and settings once."""

    __slots__ = (
        "task", "acks_late", "reject_on_worker_lost", "acks_on_failure", "acks_on_timeout", "hard_limit_s",
        "soft_limit_s", "track_started", "bucket", "request_class",
    )  # fmt: skip

    def __init__(self, task: Task, conf: Any, request_class: "type[Request]", bucket: Optional[TokenBucket]) -> None:
        def option(name: str, value: Any) -> Any:
            return getattr(conf, "task_" + name) if value is None else value

        self.task = task
        self.acks_late = bool(option("acks_late", task.acks_late))
        self.reject_on_worker_lost = bool(option("reject_on_worker_lost", task.reject_on_worker_lost))
        both = bool(option("acks_on_failure_or_timeout", task.acks_on_failure_or_timeout))
        on_failure = option("acks_on_failure", task.acks_on_failure)
        on_timeout = option("acks_on_timeout", task.acks_on_timeout)
        self.acks_on_failure = both if on_failure is None else bool(on_failure)
        self.acks_on_timeout = both if on_timeout is None else bool(on_timeout)
        self.hard_limit_s: Optional[float] = option("time_limit", task.time_limit)
        self.soft_limit_s: Optional[float] = option("soft_time_limit", task.soft_time_limit)
        self.track_started = bool(option("track_started", task.track_started))
        self.bucket = bucket
        self.request_class = request_class


class Request:
    """One task message in this worker."""

    def __init__(self, delivery: Delivery, policy: TaskPolicy, hostname: str) -> None:
        headers = delivery.message.headers
        self.delivery = delivery
        self.policy = policy
        self.task = policy.task
        self.hostname = hostname
        self.id: str = headers["id"]
        self.name: str = headers["task"]
        limits = headers.get("timelimit") or (None, None)
        self.time_limit: Optional[float] = limits[0] or policy.hard_limit_s
        self.soft_time_limit: Optional[float] = limits[1] or policy.soft_limit_s
        self.job: Optional[Job] = None
        self.pid: Optional[int] = None
        self.time_start: Optional[float] = None
        #: Set when a running task is stopped on request: it ends as REVOKED, not as a failure.
        self.terminating: Optional[str] = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"

    def __str__(self) -> str:
        return f"{self.delivery.message.headers.get('shadow') or self.name}[{self.id}]"

    task_id = property(lambda self: self.id)
    task_name = property(lambda self: self.name)

    @property
    def acknowledged(self) -> bool:
        """Say whether the broker was told at the start already (early ack)."""
        return self.delivery.early

    def run(self) -> Run:
        """Return what the pool needs to run it."""
        delivery = self.delivery
        message = delivery.message
        return Run(
            message.body,
            message.content_type,
            message.content_encoding,
            message.headers,
            message.properties,
            delivery.info,
        )

    # -- to be overridden: called in the worker's main process

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Called when the hard time limit (seconds) was over and the task was stopped."""

    def on_failure(self, exc_info: ExceptionInfo, send_failed_event: bool = True, return_ok: bool = False) -> None:
        """Called when the task failed without being able to say so: killed, timed out, lost."""

    # -- a failure told here, because the task's process cannot

    def failed_here(self, runner: TaskRunner, error: BaseException, announce: bool) -> Tuple[List[Any], List[Any]]:
        """Return (results, follow-ups) of a failure of this request, handlers and signals included."""
        opened = runner.open(self.run())
        if isinstance(opened, Execution):
            ex = opened
        else:
            headers = self.delivery.message.headers
            ex = Execution(self.task, Context(headers, hostname=self.hostname, called_directly=False), [], {})
        text = f"{type(error).__name__}: {error}\n"
        ex.state, ex.error, ex.retval = states.FAILURE, error, error
        ex.einfo = ExceptionInfo(error, text)
        results, followups = runner.failure(ex.task, ex.request, error, text)
        if announce:
            self.on_failure(ex.einfo)
            runner.announce_failure(ex)
        return results, list(followups)


class Refusal(MiniqError):
    """A message that is not run here; the text is the reason it is set aside with."""

# SPDX-License-Identifier: MIT
"""Request: the worker's own record of one task message, from its arrival to its settlement.

It decides by headers alone; the body stays bytes until it reaches the place where the task runs.
A task may name its own subclass (``Task.Request``) to hear, in the worker's main process, of time
limits and failures that its own process could not live to tell.
"""

from __future__ import annotations

from typing import Any, Optional

from .. import states
from ..log import get_logger
from ..message import Delivery
from ..pools.base import Job
from ..runner import Ends
from ..task import Context, Task
from ..trace import ExceptionInfo, Execution, Run, TaskRunner

logger = get_logger(__name__)

#: A task is quick when so many runs were seen and the longer ones among the last took less (seconds).
ENOUGH_RUNS, QUICK_S = 32, 0.001


def run_of(delivery: Delivery) -> Run:
    """Return what runs a delivery: its message, and how it came."""
    message = delivery.message
    return Run(
        message.body,
        message.content_type,
        message.content_encoding,
        message.headers,
        message.properties,
        delivery.info,
    )


class TaskPolicy:
    """What the worker does with messages of one task; read from task and settings once."""

    __slots__ = (
        "task", "acks_late", "reject_on_worker_lost", "retry_on_worker_lost", "acks_on_failure",
        "acks_on_timeout", "hard_limit_s", "soft_limit_s", "track_started", "pace", "request_class",
        "runs", "usual_s",
    )  # fmt: skip

    def __init__(self, task: Task, conf: Any, request_class: "type[Request]") -> None:
        def option(name: str) -> Any:
            value = getattr(task, name, None)
            return getattr(conf, "task_" + name) if value is None else value

        self.task = task
        self.acks_late = bool(option("acks_late"))
        self.reject_on_worker_lost = bool(option("reject_on_worker_lost"))
        self.retry_on_worker_lost = bool(option("retry_on_worker_lost"))
        both = bool(option("acks_on_failure_or_timeout"))
        on_failure, on_timeout = option("acks_on_failure"), option("acks_on_timeout")
        self.acks_on_failure = both if on_failure is None else bool(on_failure)
        self.acks_on_timeout = both if on_timeout is None else bool(on_timeout)
        self.hard_limit_s: Optional[float] = option("time_limit")
        self.soft_limit_s: Optional[float] = option("soft_time_limit")
        self.track_started = bool(option("track_started"))
        #: An `admission.Pace`, None = no rate limit.
        self.pace: Any = None
        self.request_class = request_class
        #: How many runs were seen, and about how long the longer ones among the last took (seconds).
        self.runs = 0
        self.usual_s = 0.0

    def observe(self, runtime_s: float) -> None:
        """Learn from a run how long the next ones may take: long at once, short again slowly."""
        self.runs += 1
        self.usual_s = max(runtime_s, self.usual_s * 0.95)

    @property
    def is_quick(self) -> bool:
        """Say whether runs of this task are known to be so short that others may wait behind one."""
        return self.runs >= ENOUGH_RUNS and self.usual_s < QUICK_S


class Request:
    """One task message in this worker."""

    __slots__ = (
        "delivery", "policy", "task", "hostname", "id", "name", "time_limit", "soft_time_limit", "job", "pid",
        "time_start", "terminating", "__dict__",
    )  # fmt: skip

    def __init__(self, delivery: Delivery, policy: TaskPolicy, hostname: str) -> None:
        headers = delivery.message.headers
        self.delivery = delivery
        self.policy = policy
        self.task = policy.task
        self.hostname = hostname
        self.id: str = headers["id"]
        self.name: str = headers["task"]
        hard, soft = headers.get("timelimit") or (None, None)
        self.time_limit: Optional[float] = hard or policy.hard_limit_s
        self.soft_time_limit: Optional[float] = soft or policy.soft_limit_s
        self.job: Optional[Job] = None
        self.pid: Optional[int] = None
        self.time_start: Optional[float] = None
        #: Set when a running task is stopped on request: it ends as REVOKED, not as a failure.
        self.terminating: Optional[str] = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"

    def __str__(self) -> str:
        return f"{self.delivery.message.headers.get('shadow') or self.name}[{self.id}]"

    @property
    def task_id(self) -> str:
        """The task's id."""
        return self.id

    @property
    def task_name(self) -> str:
        """The task's name."""
        return self.name

    @property
    def may_go_ahead(self) -> bool:
        """Say whether it may wait in a child behind another task."""
        return (
            self.policy.is_quick
            and self.policy.pace is None
            and self.time_limit is None
            and self.soft_time_limit is None
            and not self.policy.track_started
        )

    @property
    def acknowledged(self) -> bool:
        """Say whether the broker was told at the start already (early ack)."""
        return self.delivery.early

    def run(self) -> Run:
        """Return what the pool needs to run it."""
        return run_of(self.delivery)

    # -- to be overridden: called in the worker's main process, outside of any transaction

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Called when the hard time limit (seconds) was over and the task was stopped."""

    def on_failure(
        self, exc_info: ExceptionInfo, send_failed_event: bool = True, return_ok: bool = False
    ) -> None:
        """Called when the task failed without being able to say so: killed, timed out, lost."""

    # -- what is told here, because the task's process cannot

    def context(self) -> Context:
        """Return the request as the task's handlers see it, without what is in the body."""
        message = self.delivery.message
        reply_to = message.properties.get("reply_to")
        return Context(message.headers, hostname=self.hostname, called_directly=False, reply_to=reply_to)

    def execution(self, runner: TaskRunner) -> Execution:
        """Return the run as its process would have begun it; without arguments if they cannot be read."""
        opened = runner.open(self.run())
        return opened if isinstance(opened, Execution) else Execution(self.task, self.context(), [], {})

    def failed_here(self, runner: TaskRunner, error: BaseException) -> Ends:
        """Return what is settled after a failure of this request; calls its handlers and errbacks."""
        ex = self.execution(runner)
        text = f"{type(error).__name__}: {error}\n"
        ex.state, ex.error, ex.retval = states.FAILURE, error, error
        ex.einfo = ExceptionInfo(error, text)
        ends = Ends()
        runner.failure(ex.task, ex.request, error, text, ends)
        self.tell("on_failure", ex.einfo)
        runner.announce_failure(ex)
        return ends

    def tell(self, hook: str, *args: Any) -> None:
        """Call one of the methods above; an error in it changes nothing."""
        try:
            getattr(self, hook)(*args)
        except Exception:  # safety net around user code
            logger.exception(
                "Task %s: %s.%s failed; the task's state stands", self, type(self).__name__, hook
            )

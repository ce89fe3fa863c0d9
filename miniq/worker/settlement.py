# SPDX-License-Identifier: MIT
"""Settlement: what becomes of a run that has ended, and of a message that is not run.

A decision is made once, outside of any transaction, and kept as a `Finished`: user code (hooks,
errbacks) runs at that moment and not again when the broker has to be asked twice.  A `Batch`
then carries decisions out: what concerns the broker is committed together, follow-ups and the end
of the message; results join that, or are stored before it where they are kept elsewhere.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, List, Optional, Tuple, Union

from .. import signals, states
from ..backends.base import Backend, StoredResult
from ..event import sent_event
from ..exceptions import (
    MaxRetriesExceededError,
    TaskRevokedError,
    Terminated,
    TimeLimitExceeded,
    WorkerLostError,
)
from ..log import get_logger
from ..loop import Loop
from ..message import Delivery
from ..pools.base import Lost
from ..runner import Ends, Outcome, Part, Start
from ..serialization import exception_to_dict
from ..task import Context
from ..text import safe_repr
from ..trace import TaskRunner, ignores_result
from ..transports.base import Consumer, NotOurs, Publication, Transport, pause_after_loss_s
from .chords import Chords
from .events import WorkerEvents
from .request import Request, run_of

logger = get_logger(__name__)

#: How this copy's command line is called.
PROGRAM = "python -m " + (__package__ or "miniq.worker").rpartition(".")[0]

Call = Callable[[], Any]


class Finished:
    """A run that has ended, and what is done about it.

    `end` settles the delivery and says whether it was still ours; `after` and then `tell`, which sends
    its event, are called when all that is committed.  `refusals` counts how often broker or backend would
    not have it.
    """

    __slots__ = ("request", "ends", "end", "after", "tell", "refusals")

    def __init__(
        self,
        request: Request,
        ends: Ends,
        end: Callable[[], bool],
        after: Optional[Call] = None,
        tell: Optional[Call] = None,
    ) -> None:
        self.request = request
        self.ends = ends
        self.end = end
        self.after = after
        self.tell = tell
        self.refusals = 0


class Batch:
    """What a turn is about to do, collected."""

    __slots__ = (
        "chords", "publications", "results", "parts", "starts", "finishing", "endings", "after", "stored",
    )  # fmt: skip

    def __init__(self, chords: Chords) -> None:
        self.chords = chords
        self.publications: List[Publication] = []
        self.results: List[StoredResult] = []
        #: Members of chords that end, chords that begin, and such that are complete.
        self.parts: List[Part] = []
        self.starts: List[Start] = []
        self.finishing: List[Call] = []
        #: (whose, how): None where nobody here waits for the end.
        self.endings: List[Tuple[Optional[Request], Callable[[], bool]]] = []
        #: Called after the commit, in this order.
        self.after: List[Call] = []
        #: Whether results were stored.
        self.stored = False

    def add(self, finished: Finished) -> None:
        """Add the settlement of one run."""
        self.add_ends(finished.ends)
        self.endings.append((finished.request, finished.end))
        if finished.after is not None:
            self.after.append(finished.after)
        if finished.tell is not None:
            self.after.append(finished.tell)

    def add_ends(self, ends: Ends) -> None:
        """Add what is settled with a message."""
        self.results += ends.results
        self.publications += ends.followups
        self.parts += ends.parts
        self.starts += ends.starts

    def write(self, transport: Transport, backend: Backend, timeout_s: float) -> None:
        """Do it, inside the turn's transaction; raises `NotOurs` at its end.

        A second call does what was added since.
        """
        if self.parts:
            self.chords.arrive(self.parts, backend, self)
        for group_id, size, body, expires_s in self.starts:
            # Not anew: this turn may have been tried before, and its messages sent.
            backend.start_chord(group_id, size, body, expires_s, anew=False)
        if self.publications:
            app, publications = self.chords.app, self.publications
            if app.conf.task_send_sent_event:
                publications = publications + [sent_event(app, one) for one in publications]
            transport.publish(publications, timeout_s)
        if self.results and backend.enabled:
            backend.store(self.results)
            self.stored = True
        if backend.joins:
            for finish in self.finishing:
                finish()
        else:
            # Only when the bodies are sent.
            self.after += self.finishing
        gone = [request.delivery for request, end in self.endings if not end() and request is not None]
        self.publications, self.results, self.endings = [], [], []
        self.parts, self.starts, self.finishing = [], [], []
        if gone:
            raise NotOurs(gone)


class Settler:
    """Decides; one per worker."""

    def __init__(
        self,
        app: Any,
        loop: Loop,
        consumer: Consumer,
        runner: TaskRunner,
        hostname: str,
        delivery_limit: int,
        events: WorkerEvents,
    ) -> None:
        self.app = app
        self.events = events
        self.loop = loop
        self.consumer = consumer
        self.runner = runner
        self.chords = Chords(app, runner)
        self.hostname = hostname
        self.delivery_limit = delivery_limit
        #: Late-acked tasks cut off by a cold shutdown go back instead of failing.
        self.cutting_off = False
        self.counts = {"finished": 0, "requeued": 0, "lost": 0}

    # -- a run has ended

    def ended(self, request: Request, outcome: Union[Outcome, Lost]) -> Finished:
        """Return what to do about a run."""
        if isinstance(outcome, Lost):
            return self._lost(request, outcome.error)
        self.counts["finished"] += 1
        delivery = request.delivery
        ends = Ends(outcome.results, outcome.followups, outcome.parts, outcome.starts)
        action, reason = outcome.action, outcome.reason
        tell = self._telling(request, outcome) if self.events.enabled else None
        if action == "ack":
            if delivery.early or outcome.state != states.FAILURE or request.policy.acks_on_failure:
                end = partial(self.consumer.ack, delivery)
                return Finished(request, ends, end, None, tell)
            action, reason = "reject", "it failed, and acks_on_failure is off"
        end = partial(self.consumer.reject, delivery, action == "requeue", reason)
        after = partial(_send_rejected, request) if signals.task_rejected.receivers else None
        return Finished(request, ends, end, after, tell)

    def _telling(self, request: Request, outcome: Outcome) -> Optional[Call]:
        """Return what sends the event of a run that has ended; None where there is none."""
        events, state, (shown, traceback) = self.events, outcome.state, outcome.shown
        if state == states.SUCCESS:
            return partial(events.succeeded, request, shown, outcome.runtime_s)
        if state == states.FAILURE:
            return partial(events.failed, "task-failed", request, shown, traceback)
        if state == states.RETRY:
            return partial(events.failed, "task-retried", request, shown, traceback)
        if state == states.REJECTED:
            return partial(events.task, "task-rejected", request, requeue=outcome.action == "requeue")
        return None

    def _telling_of_loss(self, kind: str, request: Request, error: BaseException) -> Optional[Call]:
        """Do the same for a run without an outcome."""
        if not self.events.enabled:
            return None
        if kind == "task-rejected":
            return partial(self.events.task, kind, request, requeue=True)
        text = f"{type(error).__name__}: {error}\n"
        return partial(self.events.failed, kind, request, safe_repr(error), text)

    def _lost(self, request: Request, error: BaseException) -> Finished:
        """Return what to do about a run whose process could not tell its outcome."""
        consumer, delivery, policy = self.consumer, request.delivery, request.policy
        ack = partial(consumer.ack, delivery)
        late = not delivery.early
        if request.terminating or isinstance(error, Terminated):
            after = partial(self.announce_revoked, delivery, True, request.terminating)
            return Finished(request, self.revoked(delivery, "terminated"), ack, after)
        if isinstance(error, TimeLimitExceeded):
            logger.error("Hard time limit (%ss) exceeded for %s", request.time_limit, request)
            request.tell("on_timeout", False, request.time_limit)
            may_run_again = not policy.acks_on_timeout
        elif late and self.cutting_off:
            self.counts["requeued"] += 1
            logger.warning("Task %s was cut off by the shutdown and goes back to its queue", request)
            tell = self._telling_of_loss("task-rejected", request, error)
            return Finished(request, Ends(), partial(_release, consumer, delivery), None, tell)
        elif policy.retry_on_worker_lost:
            return self._retried(request, error)
        else:
            may_run_again = policy.reject_on_worker_lost
        if late and may_run_again:
            return self._started_again(request, error)
        self.counts["lost"] += 1
        tell = self._telling_of_loss("task-failed", request, error)
        return Finished(request, request.failed_here(self.runner, error), ack, None, tell)

    def _started_again(self, request: Request, error: BaseException) -> Finished:
        """Give a message back whose process was killed; set it aside when that happened too often."""
        delivery = request.delivery
        starts = delivery.deliveries + 1
        if self.delivery_limit and starts >= self.delivery_limit:
            return self._set_aside(request, str(error), starts)
        self.counts["requeued"] += 1
        pause_s = pause_after_loss_s(starts, 0.0)
        when = f"in {pause_s:g} s" if pause_s else "at once"
        text = "Task %s: %s; it is started again %s (start %d)"
        logger.error(text, request, error, when, starts + 1)
        end = partial(self.consumer.defer, delivery, self.loop.now() + pause_s)
        return Finished(request, Ends(), end, None, self._telling_of_loss("task-rejected", request, error))

    def _set_aside(self, request: Request, cause: str, starts: int) -> Finished:
        """Fail a task that keeps killing what runs it; its message stays replayable."""
        self.counts["lost"] += 1
        text = f"{cause} (start {starts} of at most {self.delivery_limit})"
        logger.critical(
            "Task %s is set aside as a dead letter: %s. List it with `%s dead list`, run it"
            " again with `%s dead replay`.", request, text, PROGRAM, PROGRAM,
        )  # fmt: skip
        error = WorkerLostError(text)
        made = request.failed_here(self.runner, error)
        tell = self._telling_of_loss("task-failed", request, error)
        return Finished(request, made, partial(self.consumer.dead_letter, request.delivery, text), None, tell)

    def _retried(self, request: Request, error: BaseException) -> Finished:
        """Send a task again whose process died, counted as a retry."""
        ex = request.execution(self.runner)
        task, ack = request.task, partial(self.consumer.ack, request.delivery)
        retries = ex.request.retries + 1
        if task.max_retries is not None and retries > task.max_retries:
            self.counts["lost"] += 1
            last = MaxRetriesExceededError(f"Can't retry {request}: {error}")
            tell = self._telling_of_loss("task-failed", request, last)
            return Finished(request, request.failed_here(self.runner, last), ack, None, tell)
        self.counts["requeued"] += 1
        logger.error("Task %s: %s; retry %d in %ss", request, error, retries, task.default_retry_delay)
        countdown = task.default_retry_delay
        sig = task.signature_from_request(
            ex.request, ex.args, ex.kwargs, retries=retries, countdown=countdown
        )
        ends = Ends(followups=[self.app.prepare_signature(sig)])
        if not ignores_result(task, ex.request):
            cause = exception_to_dict(error)
            ends.results.append(self.runner.encode(ex.request, states.RETRY, cause, None, task))
        return Finished(request, ends, ack, None, self._telling_of_loss("task-retried", request, error))

    # -- a worker died with it, or it may not start

    def bury(self, request: Request) -> Finished:
        """Return what to do about a message that may not start again."""
        delivery = request.delivery
        if delivery.early:
            self.counts["lost"] += 1
            error = WorkerLostError(f"worker {delivery.lost_by} died while it ran the task")
            made = request.failed_here(self.runner, error)
            tell = self._telling_of_loss("task-failed", request, error)
            return Finished(request, made, partial(self.consumer.ack, delivery), None, tell)
        by = (
            f"worker {delivery.lost_by} died while it ran the task"
            if delivery.lost_by
            else "no start came to an end"
        )
        return self._set_aside(request, by, delivery.deliveries)

    def refused(self, finished: Finished, error: Exception) -> None:
        """Make the best of a settlement that broker or backend will never accept as it is.

        First the failure to settle becomes the task's result, then there is no result at all.
        """
        request = finished.request
        if finished.refusals == 0:
            logger.error(
                "Task %s: its outcome cannot be settled (%s); it is stored as a failure", request, error
            )
            finished.ends = self.runner.refusal(request.run(), error)
            finished.tell = self._telling_of_loss("task-failed", request, error)
        else:
            logger.error("Task %s: its result is lost, the backend does not take it: %s", request, error)
            finished.ends = Ends()
        finished.refusals += 1

    # -- results that are made here

    def started_result(self, request: Request, pid: int) -> StoredResult:
        """Return the state STARTED."""
        meta = {"pid": pid, "hostname": self.hostname}
        return self.runner.encode(request.context(), states.STARTED, meta, None)

    def refused_message(self, delivery: Delivery, error: BaseException) -> Ends:
        """Return what is settled with a message that cannot be run."""
        return self.runner.refusal(run_of(delivery), error)

    def revoked(self, delivery: Delivery, why: str) -> Ends:
        """Return what is settled with a message whose task was revoked: the state REVOKED, if one is kept."""
        return self.runner.refusal(run_of(delivery), TaskRevokedError(why), states.REVOKED)

    def announce_revoked(
        self, delivery: Delivery, terminated: bool = False, signum: Any = None, expired: bool = False
    ) -> None:
        """Write the log line and send `task_revoked`."""
        headers = delivery.message.headers
        why = "expired" if expired else "terminated" if terminated else "revoked"
        logger.info("Discarding %s task: %s[%s]", why, headers["task"], headers["id"])
        if signals.task_revoked.receivers:
            task = self.app.tasks.get(headers["task"])
            request = Context(headers, hostname=self.hostname)
            signals.task_revoked.send(
                sender=task, request=request, terminated=terminated, signum=signum, expired=expired
            )
        if self.events.enabled:
            self.events.revoked(headers["id"], terminated, signum, expired)


def _release(consumer: Consumer, delivery: Delivery) -> bool:
    consumer.release([delivery])
    return True


def _send_rejected(request: Request) -> None:
    signals.task_rejected.send(sender=request.hostname, message=request.delivery.message, exc=None)

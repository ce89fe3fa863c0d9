# SPDX-License-Identifier: MIT
"""TaskConsumer: takes messages, decides by their headers, gives them to the pool, settles them.

Everything happens in *turns*, one transaction each:

    settle what finished  (follow-ups + results + ack)
    take new messages, as many as there are free slots
    decide: refuse, revoke, expire, put off (rate limit), or start
    mark the starting ones as started
    ---- commit ----
    hand the started ones to the pool, write log lines, send signals

So nothing runs that the broker does not know to have started, no slot waits for a result to be
stored, and whatever fails before the commit is as if it had not been tried: the turn is repeated
with growing pauses.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, Callable, Deque, Dict, List, Optional, Set, Tuple, Union

from .. import signals, states
from ..backends.base import Backend, StoredResult
from ..exceptions import (
    BackendError,
    ContentDisallowed,
    InvalidTaskError,
    MiniqError,
    NotRegistered,
    OperationalError,
    TaskRevokedError,
    Terminated,
    TimeLimitExceeded,
    WorkerLostError,
)
from ..log import get_logger
from ..loop import Loop, Timer
from ..message import Delivery, upgrade_v1, validate_headers
from ..pools.base import Job, Lost, Pool
from ..serialization import decompress, dumps, exception_to_dict, loads
from ..task import Context
from ..text import import_object, nearest, safe_repr
from ..times import TokenBucket, parse_rate, to_epoch
from ..trace import Outcome, TaskRunner
from ..transports.base import Consumer, Publication, Transport
from .request import Request, TaskPolicy

logger = get_logger(__name__)

#: How many revoked ids a worker remembers; the broker keeps them too, where it can.
REVOKES_MAX = 50_000
#: Pauses between tries of a turn that failed, in seconds.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0

Finished = Tuple[Request, Union[Outcome, Lost]]


class NotOurs(Exception):
    """Raised inside a turn to undo it: a delivery belongs to another worker by now."""

    def __init__(self, requests: List[Request]) -> None:
        self.requests = requests


class TaskConsumer:
    """The heart of a worker; all methods are called in the loop's thread."""

    def __init__(
        self,
        app: Any,
        loop: Loop,
        transport: Transport,
        consumer: Consumer,
        backend: Backend,
        pool: Pool,
        runner: TaskRunner,
        hostname: str,
        concurrency: int,
        prefetch_multiplier: int,
    ) -> None:
        self.app = app
        self.loop = loop
        self.transport = transport
        self.consumer = consumer
        self.backend = backend
        self.pool = pool
        self.runner = runner
        self.hostname = hostname
        self.concurrency = concurrency
        self.prefetch_multiplier = prefetch_multiplier
        self.delivery_limit: int = app.conf.task_delivery_limit
        self.rate_limits = not app.conf.worker_disable_rate_limits

        self.consuming = False
        #: Late-acked tasks cut off by a cold shutdown go back instead of failing.
        self.cutting_off = False
        self.reserved: Deque[Request] = deque()
        self.running: Dict[int, Request] = {}
        self.revoked: Dict[str, float] = {}
        self.total: Dict[str, int] = {}
        self.counts = {"finished": 0, "requeued": 0, "lost": 0}
        self.on_idle: Optional[Callable[[], None]] = None

        self._policies: Dict[str, TaskPolicy] = {}
        #: Rate-limited task -> when (loop time) the next message that is put off gets its turn.
        self._places: Dict[str, float] = {}
        self._finished: List[Finished] = []
        self._started: List[Tuple[Request, int]] = []
        self._turn_due = False
        self._hungry = False
        self._watched: Optional[int] = None
        self._net: Optional[Timer] = None
        self._due: Optional[Timer] = None
        self._pause_s = 0.0
        self._trouble_since: Optional[float] = None

    # -- life

    def start(self) -> None:
        """Begin to take messages."""
        self.consuming = True
        self.schedule()

    def stop_taking(self) -> None:
        """Take no more messages; give back at once what has not started."""
        self.consuming = False
        self._be_fed()
        if self.reserved:
            deliveries = [request.delivery for request in self.reserved]
            self.reserved.clear()
            self.counts["requeued"] += len(deliveries)
            try:
                self.consumer.release(deliveries)
            except OperationalError as error:
                logger.warning(
                    "%d messages that had not started could not be handed back (%s); they go back when this"
                    " worker is gone", len(deliveries), error,
                )  # fmt: skip

    @property
    def settled(self) -> bool:
        """Say whether nothing runs and nothing waits to be settled."""
        return not self.running and not self._finished

    # -- turns

    def schedule(self) -> None:
        """Have a turn soon, unless one is due already or the last one failed a moment ago."""
        if not self._turn_due:
            self._turn_due = True
            if self._pause_s:
                self.loop.call_later(self._pause_s, self.turn)
            else:
                self.loop.call_soon(self.turn)

    def turn(self) -> None:
        """Settle, take, start: one transaction (see the module)."""
        self._turn_due = False
        finished, self._finished = self._finished, []
        started, self._started = self._started, []
        reserved = list(self.reserved)
        ready: List[Request] = []
        after: List[Callable[[], None]] = []
        asked = got = 0
        try:
            with self.transport.transaction():
                if finished or started:
                    self._settle(finished, started, after)
                if self.consuming:
                    free = self.pool.free_slots
                    while reserved and len(ready) < free:
                        self._take_reserved(reserved, ready, after)
                    extra = (self.prefetch_multiplier - 1) * self.concurrency
                    asked = free - len(ready) + max(0, extra - len(reserved))
                    if asked > 0:
                        deliveries = self.consumer.poll(asked)
                        got = len(deliveries)
                        for delivery in deliveries:
                            request = self._consider(delivery, after)
                            if request is None:
                                continue
                            if len(ready) < free:
                                ready.append(request)
                            else:
                                reserved.append(request)
                    if ready:
                        self.consumer.start([request.delivery for request in ready])
        except NotOurs as error:
            self._forget(finished, started, error.requests)
            return
        except BackendError as error:
            self._finished = finished + self._finished
            self._isolate(error)
            return
        except OperationalError as error:
            self._finished = finished + self._finished
            self._started = started + self._started
            self._trouble(error)
            return
        except Exception as error:  # safety net: nothing was committed, nothing may be forgotten
            logger.exception("A turn of the worker failed and is repeated")
            self._finished = finished + self._finished
            self._trouble(error)
            return
        if self._trouble_since is not None:
            logger.warning("Broker reached again after %.1f s.", self.loop.mono() - self._trouble_since)
            self._trouble_since, self._pause_s = None, 0.0
        self.reserved = deque(reserved)
        for request, _ in finished:
            self.running.pop(id(request), None)
        for call in after:
            call()
        for request in ready:
            self._submit(request)
        self._watch(asked, got)
        if self.on_idle is not None and self.settled:
            self.on_idle()

    def _watch(self, asked: int, got: int) -> None:
        """Decide what wakes the next turn: another poll, the broker's descriptor, a due message."""
        if not self.consuming or asked <= 0:
            self._be_fed()
        elif got >= asked:
            if self.pool.free_slots > 0:
                self.schedule()
        else:
            self._be_hungry()

    def _be_hungry(self) -> None:
        """There are free slots and no messages: watch for new ones."""
        consumer, loop = self.consumer, self.loop
        if not self._hungry:
            self._hungry = True
            fd = consumer.fileno()
            if fd is not None:
                loop.add_reader(fd, self._on_readable)
                self._watched = fd
            if consumer.poll_interval_s is not None:
                self._net = loop.call_later(consumer.poll_interval_s, self._look)
        if self._due is not None:
            self._due.cancel()
            self._due = None
        try:
            due = consumer.next_due()
        except OperationalError as error:
            self._trouble(error)
            return
        if due is not None:
            # A long wait is looked at again now and then: the wall clock may be set meanwhile.
            self._due = loop.call_later(min(max(0.0, due - loop.now()), 5.0), self.schedule)

    def _be_fed(self) -> None:
        """All slots are taken: stop watching, so that arriving messages cost nothing."""
        if not self._hungry:
            return
        self._hungry = False
        if self._watched is not None:
            self.loop.remove_reader(self._watched)
            self._watched = None
        for timer in (self._net, self._due):
            if timer is not None:
                timer.cancel()
        self._net = self._due = None

    def _on_readable(self) -> None:
        self.consumer.on_readable()
        self.schedule()

    def _look(self) -> None:
        """The net under the descriptor: ask the store itself whether something changed."""
        self._net = None
        if not self._hungry:
            return
        try:
            if self.consumer.changed():
                self.schedule()
        except OperationalError as error:
            self._trouble(error)
        if self.consumer.poll_interval_s is not None:
            self._net = self.loop.call_later(self.consumer.poll_interval_s, self._look)

    def _trouble(self, error: Exception) -> None:
        """The broker did not take the turn: nothing of it happened; try again after a pause."""
        if self._trouble_since is None:
            self._trouble_since = self.loop.mono()
            logger.error("Broker: %s; this worker keeps its %d outcomes and tries again.", error, len(self._finished))
        self._pause_s = min(max(FIRST_PAUSE_S, self._pause_s * 2), LONGEST_PAUSE_S)
        self.schedule()

    def _isolate(self, error: BackendError) -> None:
        """A result of the last turn could not be stored: settle one by one to find which."""
        logger.error("Result backend: %s", error)
        finished, self._finished = self._finished, []
        for request, outcome in finished:
            try:
                with self.transport.transaction():
                    self._settle([(request, outcome)], [], [])
            except OperationalError as trouble:
                self._finished.append((request, outcome))
                self._trouble(trouble)
                continue
            except BackendError as cause:
                self._finished.append((request, self._unstorable(request, outcome, cause)))
                self._pause_s = max(FIRST_PAUSE_S, min(self._pause_s * 2, LONGEST_PAUSE_S))
                continue
            except NotOurs as lost:
                self._forget([(request, outcome)], [], lost.requests)
                continue
            self.running.pop(id(request), None)
        self.schedule()

    def _unstorable(self, request: Request, outcome: Union[Outcome, Lost], cause: BackendError) -> Union[Outcome, Lost]:
        """Replace an outcome whose result the store refuses by the failure to store it."""
        if isinstance(outcome, Lost) or outcome.reason == _UNSTORABLE:
            # Not even the failure can be stored: settle the message without any result.
            return Outcome(states.FAILURE, [], [], "ack", _UNSTORABLE)
        logger.error("Task %s: its result could not be stored (%s); it is stored as a failure", request, cause)
        results, _ = request.failed_here(self.runner, cause, announce=False)
        return Outcome(states.FAILURE, results, outcome.followups, "ack", _UNSTORABLE)

    def _forget(self, finished: List[Finished], started: List[Tuple[Request, int]], gone: List[Request]) -> None:
        """Drop outcomes of messages that another worker has taken over; keep the rest."""
        for request in gone:
            logger.warning("Task %s was given to another worker meanwhile; its outcome here is dropped", request)
            self.running.pop(id(request), None)
            self.counts["lost"] += 1
        self._finished = [one for one in finished if one[0] not in gone] + self._finished
        self._started = [one for one in started if one[0] not in gone] + self._started
        self.schedule()

    # -- settle

    def _settle(
        self, finished: List[Finished], started: List[Tuple[Request, int]], after: List[Callable[[], None]]
    ) -> None:
        results: List[StoredResult] = []
        publications: List[Publication] = []
        endings: List[Tuple[Request, Callable[[], bool]]] = []
        ended = {id(request) for request, _ in finished}
        for request, pid in started:
            if id(request) not in ended and not self._ignores_result(request):
                results.append(self._started_result(request, pid))
        consumer = self.consumer
        for request, outcome in finished:
            delivery = request.delivery
            if isinstance(outcome, Lost):
                self._settle_lost(request, outcome, results, publications, endings, after)
                continue
            results.extend(outcome.results)
            publications.extend(outcome.followups)
            action, reason = outcome.action, outcome.reason
            if action == "ack" and outcome.state == states.FAILURE and not delivery.early:
                if not request.policy.acks_on_failure:
                    action, reason = "reject", "failed, and acks_on_failure is off"
            if action == "ack":
                endings.append((request, lambda d=delivery: consumer.ack(d)))  # type: ignore[misc]
            else:
                requeue = action == "requeue"
                endings.append(
                    (request, lambda d=delivery, q=requeue, r=reason: consumer.reject(d, q, r))  # type: ignore[misc]
                )
                if signals.task_rejected.receivers:
                    after.append(lambda r=request: _send_rejected(r))  # type: ignore[misc]
            self.counts["finished"] += 1
        if publications:
            self.transport.publish(publications, self.app.conf.task_publish_timeout)
        if results:
            self._store(results)
        gone = [request for request, end in endings if not end()]
        if gone:
            raise NotOurs(gone)

    def _store(self, results: List[StoredResult]) -> None:
        if self.backend.enabled:
            self.backend.store(results)

    def _settle_lost(
        self,
        request: Request,
        lost: Lost,
        results: List[StoredResult],
        publications: List[Publication],
        endings: List[Tuple[Request, Callable[[], bool]]],
        after: List[Callable[[], None]],
    ) -> None:
        """Settle a task whose process could not tell its outcome."""
        consumer, delivery, policy = self.consumer, request.delivery, request.policy
        error = lost.error
        late = not delivery.early
        if isinstance(error, Terminated) or request.terminating:
            results.extend(self._revoked_results(delivery, "terminated"))
            endings.append((request, lambda: consumer.ack(delivery)))
            after.append(lambda: self._announce_revoked(delivery, terminated=True, signum=request.terminating))
            return
        if isinstance(error, WorkerLostError) and late and self.cutting_off:
            endings.append((request, lambda: self._hand_back(delivery)))
            after.append(lambda: logger.warning("Task %s was cut off by the shutdown and is back in its queue", request))
            self.counts["requeued"] += 1
            return
        if isinstance(error, WorkerLostError) and late and policy.reject_on_worker_lost:
            starts = delivery.deliveries + 1
            if not self.delivery_limit or starts < self.delivery_limit:
                until = self.loop.now() + redelivery_pause_s(starts)
                endings.append((request, lambda: consumer.defer(delivery, until)))
                after.append(lambda: logger.error("Task %s: %s; start %d, it will be started again", request, error, starts))
                self.counts["requeued"] += 1
                return
            error = WorkerLostError(f"{error} (start {starts} of at most {self.delivery_limit})")
            self._fail(request, error, results, publications)
            endings.append((request, lambda: consumer.dead_letter(delivery, str(error))))
            after.append(lambda: log_set_aside(request, str(error)))
            return
        if isinstance(error, TimeLimitExceeded):
            request.on_timeout(False, request.time_limit or 0.0)
            after.append(lambda: logger.error("Hard time limit (%ss) exceeded for %s", request.time_limit, request))
            if late and not policy.acks_on_timeout:
                endings.append((request, lambda: consumer.reject(delivery, True)))
                return
        self.counts["lost"] += 1
        self._fail(request, error, results, publications)
        endings.append((request, lambda: consumer.ack(delivery)))

    def _fail(
        self, request: Request, error: BaseException, results: List[StoredResult], publications: List[Publication]
    ) -> None:
        made, followups = request.failed_here(self.runner, error, announce=True)
        results.extend(made)
        publications.extend(followups)

    def _hand_back(self, delivery: Delivery) -> bool:
        self.consumer.release([delivery])
        return True

    # -- admit

    def _consider(self, delivery: Delivery, after: List[Callable[[], None]]) -> Optional[Request]:
        """Admit a message; whatever is wrong with it is no reason to stop the others."""
        try:
            return self._admit(delivery, after)
        except (OperationalError, BackendError):
            raise
        except Exception as error:  # safety net: a message that breaks the worker is set aside
            logger.exception("A message from queue %s cannot be handled", delivery.queue)
            self._refuse(delivery, InvalidTaskError(f"it cannot be handled: {error!r:.500}"), after)
            return None

    def _admit(self, delivery: Delivery, after: List[Callable[[], None]]) -> Optional[Request]:
        """Decide what becomes of a message; return a request if it may start now."""
        message = delivery.message
        headers = message.headers
        if delivery.fate == "garbage":
            self._refuse(delivery, InvalidTaskError("it is not a message at all"), after)
            return None
        if "task" not in headers and not self._upgrade(delivery, after):
            return None
        headers = message.headers
        wrong = validate_headers(headers)
        if wrong is not None:
            self._refuse(delivery, InvalidTaskError(wrong), after)
            return None
        name, task_id = headers["task"], headers["id"]
        policy = self._policies.get(name)
        if policy is None:
            policy = self._make_policy(name)
            if policy is None:
                self._unknown(delivery, after)
                return None
        delivery.early = not policy.acks_late
        request = policy.request_class(delivery, policy, self.hostname)
        if delivery.fate == "lost":
            self._bury(request, after)
            return None
        if delivery.fate == "revoked" or (self.revoked and task_id in self.revoked):
            self._drop_revoked(delivery, "revoked", after)
            return None
        expires, eta = headers.get("expires"), headers.get("eta")
        if expires is not None or eta is not None:
            now = self.loop.now()
            try:
                expired = expires is not None and to_epoch(expires, self.app.zone) <= now
                due = now if eta is None else to_epoch(eta, self.app.zone)
            except ValueError as error:
                self._refuse(delivery, InvalidTaskError(f"eta or expires: {error}"), after)
                return None
            if expired:
                self._drop_revoked(delivery, "expired", after)
                return None
            if due > now:
                self.consumer.defer(delivery, due)
                return None
        if message.content_type not in self.app.accept:
            known = ", ".join(sorted(self.app.accept))
            what = f"content type {message.content_type!r:.100} is not accepted (accept_content allows {known})"
            self._refuse(delivery, ContentDisallowed(what), after)
            return None
        if delivery.deliveries and policy.acks_late and self._already_succeeded(request):
            self.consumer.ack(delivery)
            after.append(lambda: logger.info("Task %s had succeeded already, its redelivery is skipped", request))
            return None
        bucket = policy.bucket
        if bucket is not None and not bucket.can_consume(self.loop.mono()):
            self.consumer.defer(delivery, self.loop.now() + self._next_place(name, bucket))
            return None
        if logger.isEnabledFor(logging.INFO):
            after.append(lambda: logger.info("Task %s received", request))
        if signals.task_received.receivers:
            after.append(lambda: _send_received(request))
        return request

    def _take_reserved(self, reserved: List[Request], ready: List[Request], after: List[Callable[[], None]]) -> None:
        """Look once more at a message that waited here for a slot."""
        request = reserved.pop(0)
        delivery = request.delivery
        expires = delivery.message.headers.get("expires")
        if request.id in self.revoked:
            self._drop_revoked(delivery, "revoked", after)
        elif expires is not None and to_epoch(expires, self.app.zone) <= self.loop.now():
            self._drop_revoked(delivery, "expired", after)
        else:
            ready.append(request)

    def _upgrade(self, delivery: Delivery, after: List[Callable[[], None]]) -> bool:
        """Turn a protocol 1 message into protocol 2; the only body that is decoded here."""
        message = delivery.message
        try:
            body = message.body
            compression = message.headers.get("compression")
            if compression:
                body = decompress(body, compression)
            value = loads(body, message.content_type, message.content_encoding, self.app.accept)
            try:
                headers, new_body = upgrade_v1(value)
            except ValueError as error:
                raise InvalidTaskError(str(error)) from error
            message.content_type, message.content_encoding, message.body = dumps(
                new_body, "pickle" if "pickle" in message.content_type else "json"
            )
        except MiniqError as error:
            self._refuse(delivery, error, after)
            return False
        message.headers = {**message.headers, **headers}
        message.headers.pop("compression", None)
        return True

    def _make_policy(self, name: str) -> Optional[TaskPolicy]:
        task = self.app.tasks.get(name)
        if task is None:
            return None
        conf = self.app.conf
        request_class = task.Request or Request
        if isinstance(request_class, str):
            request_class = import_object(request_class)
        rate = None
        if self.rate_limits:
            rate = parse_rate(conf.task_default_rate_limit if task.rate_limit is None else task.rate_limit)
        bucket = TokenBucket(rate) if rate else None
        policy = self._policies[name] = TaskPolicy(task, conf, request_class, bucket)
        self._warn_of_limits(policy)
        return policy

    def _warn_of_limits(self, policy: TaskPolicy) -> None:
        """Say it when this pool cannot keep a limit that a task asks for."""
        pool = self.pool
        for kept, limit, word in (
            (pool.has_soft_limit, policy.soft_limit_s, "soft"),
            (pool.has_hard_limit, policy.hard_limit_s, "hard"),
        ):
            if limit and not kept:
                logger.warning(
                    "Task %s has a %s time limit (%ss) which the pool %s cannot keep",
                    policy.task.name, word, limit, type(pool).__name__,
                )  # fmt: skip

    def _next_place(self, name: str, bucket: TokenBucket) -> float:
        """Return the seconds until this message's turn comes, behind those that wait already."""
        mono = self.loop.mono()
        place = max(self._places.get(name, 0.0), mono + bucket.expected_wait(mono))
        self._places[name] = place + 1.0 / bucket.rate
        return place - mono

    def _already_succeeded(self, request: Request) -> bool:
        if not self.app.conf.worker_deduplicate_successful_tasks or not self.backend.enabled:
            return False
        found = self.backend.fetch([request.id]).get(request.id)
        return found is not None and found.state == states.SUCCESS

    # -- messages that do not run

    def _refuse(self, delivery: Delivery, error: MiniqError, after: List[Callable[[], None]]) -> None:
        """Set a message aside; its waiter gets FAILURE, where the message says who that is."""
        headers = delivery.message.headers
        task_id = headers.get("id")
        reason = f"{type(error).__name__}: {error}"
        if isinstance(task_id, str) and task_id and not headers.get("ignore_result"):
            request = Context(id=task_id, task=str(headers.get("task")), hostname=self.hostname)
            self._store([self.runner.encode(request, states.FAILURE, exception_to_dict(error), None)])
        self.consumer.dead_letter(delivery, reason)
        shown = f"{safe_repr(headers.get('task'))}[{safe_repr(task_id)}] from queue {delivery.queue}"
        after.append(
            lambda: logger.error("Message %s cannot be run and is set aside as a dead letter: %s", shown, reason)
        )

    def _unknown(self, delivery: Delivery, after: List[Callable[[], None]]) -> None:
        name = delivery.message.headers["task"]
        hint = nearest(name, self.app.tasks)
        text = f"{name}: no task of this name is registered here" + (f"; the nearest is {hint}" if hint else "")
        error = NotRegistered(text)
        self._refuse(delivery, error, after)
        if signals.task_unknown.receivers:
            task_id = delivery.message.headers["id"]
            after.append(lambda: _send_unknown(self.hostname, delivery, error, name, task_id))

    def _bury(self, request: Request, after: List[Callable[[], None]]) -> None:
        """A worker died with this message: it may not start again, so it ends here as a failure."""
        delivery = request.delivery
        results: List[StoredResult] = []
        publications: List[Publication] = []
        error = WorkerLostError(f"worker {delivery.lost_by} died while it ran the task")
        if not delivery.early:
            error = WorkerLostError(f"{error} (start {delivery.deliveries} of at most {self.delivery_limit})")
            after.append(lambda: log_set_aside(request, str(error)))
        self._fail(request, error, results, publications)
        if publications:
            self.transport.publish(publications, self.app.conf.task_publish_timeout)
        self._store(results)
        if delivery.early:
            self.consumer.ack(delivery)
        else:
            self.consumer.dead_letter(delivery, str(error))
        self.counts["lost"] += 1

    def _drop_revoked(self, delivery: Delivery, why: str, after: List[Callable[[], None]]) -> None:
        self._store(self._revoked_results(delivery, why))
        self.consumer.ack(delivery)
        after.append(lambda: self._announce_revoked(delivery, expired=why == "expired"))

    def _revoked_results(self, delivery: Delivery, why: str) -> List[StoredResult]:
        headers = delivery.message.headers
        if headers.get("ignore_result"):
            return []
        request = Context(headers, hostname=self.hostname)
        return [self.runner.encode(request, states.REVOKED, exception_to_dict(TaskRevokedError(why)), None)]

    def _announce_revoked(
        self, delivery: Delivery, terminated: bool = False, signum: Any = None, expired: bool = False
    ) -> None:
        headers = delivery.message.headers
        logger.info(
            "Discarding %s task: %s[%s]",
            "expired" if expired else "terminated" if terminated else "revoked", headers["task"], headers["id"],
        )  # fmt: skip
        if signals.task_revoked.receivers:
            task = self.app.tasks.get(headers["task"])
            request = Context(headers, hostname=self.hostname)
            signals.task_revoked.send(sender=task, request=request, terminated=terminated, signum=signum, expired=expired)

    # -- run

    def _submit(self, request: Request) -> None:
        self.running[id(request)] = request
        self.total[request.name] = self.total.get(request.name, 0) + 1
        request.time_start = self.loop.now()
        job = Job(
            request.run(),
            lambda job, outcome: self._done(request, outcome),
            (lambda job, pid: self._on_start(request, pid)) if request.policy.track_started else None,
            request.soft_time_limit,
            request.time_limit,
        )
        request.job = job
        self.pool.submit(job)
        if request.id in self.revoked and request.terminating is None:
            self.revoke_running(request, "SIGTERM")

    def _on_start(self, request: Request, pid: int) -> None:
        request.pid = pid
        self._started.append((request, pid))
        self.schedule()

    def _done(self, request: Request, outcome: Union[Outcome, Lost]) -> None:
        self._finished.append((request, outcome))
        self.schedule()

    def _ignores_result(self, request: Request) -> bool:
        ignored = request.delivery.message.headers.get("ignore_result")
        return bool(request.task.ignore_result if ignored is None else ignored)

    def _started_result(self, request: Request, pid: int) -> StoredResult:
        context = Context(request.delivery.message.headers, hostname=self.hostname)
        return self.runner.encode(context, states.STARTED, {"pid": pid, "hostname": self.hostname}, None)

    # -- commands

    def revoke(self, task_ids: Set[str], until: float, terminate: bool, signal: str) -> List[str]:
        """Remember revoked ids; return those which run here and were (with `terminate`) stopped."""
        for task_id in task_ids:
            self.revoked[task_id] = until
        while len(self.revoked) > REVOKES_MAX:
            del self.revoked[next(iter(self.revoked))]
        stopped = []
        if terminate:
            for request in list(self.running.values()):
                if request.id in task_ids and self.revoke_running(request, signal):
                    stopped.append(request.id)
        self.schedule()
        return stopped

    def revoke_running(self, request: Request, signal: str) -> bool:
        """Stop a running task; False where the pool cannot."""
        if request.job is None or not self.pool.terminate(request.job, signal):
            logger.warning("Task %s runs in a pool that cannot stop it; it goes on", request)
            return False
        request.terminating = signal
        return True

    def forget_old_revokes(self) -> None:
        """Drop revocations that are over."""
        now = self.loop.now()
        for task_id in [one for one, until in self.revoked.items() if until <= now]:
            del self.revoked[task_id]

    def set_rate_limit(self, name: str, rate: Any) -> None:
        """Change the rate limit of a task; raises `ValueError` or `NotRegistered`."""
        per_second = parse_rate(rate)
        task = self.app.tasks[name]
        task.rate_limit = rate
        policy = self._policies.get(name) or self._make_policy(name)
        if policy is not None:
            policy.bucket = TokenBucket(per_second) if per_second else None
            self._places.pop(name, None)

    def set_time_limit(self, name: str, soft: Optional[float], hard: Optional[float]) -> None:
        """Change the time limits of a task for runs that start from now on."""
        task = self.app.tasks[name]
        task.soft_time_limit, task.time_limit = soft, hard
        policy = self._policies.get(name) or self._make_policy(name)
        if policy is not None:
            policy.soft_limit_s, policy.hard_limit_s = soft, hard


_UNSTORABLE = "its result could not be stored"


def redelivery_pause_s(starts: int) -> float:
    """Return the pause before a message starts again whose worker or process died `starts` times."""
    return 0.0 if starts <= 1 else float(min(2 ** (starts - 2), 60))


def log_set_aside(request: Request, reason: str) -> None:
    """Write the one loud line about a message over its delivery limit."""
    logger.critical(
        "Task %s is set aside as a dead letter: %s. List it with `python -m miniq dead list`, run it again"
        " with `python -m miniq dead replay`.", request, reason,
    )  # fmt: skip


def _send_received(request: Request) -> None:
    signals.task_received.send(sender=request.hostname, request=request)


def _send_unknown(sender: str, delivery: Delivery, error: BaseException, name: str, task_id: str) -> None:
    signals.task_unknown.send(sender=sender, message=delivery.message, exc=error, name=name, id=task_id)


def _send_rejected(request: Request) -> None:
    signals.task_rejected.send(sender=request.hostname, message=request.delivery.message, exc=None)

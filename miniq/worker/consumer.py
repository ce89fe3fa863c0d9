# SPDX-License-Identifier: MIT
"""TaskConsumer: takes messages, gives them to the pool, settles them.

Everything happens in *turns*, one transaction each:

    settle what finished  (follow-ups + results + ack)
    take new messages, as many as there are free slots, some more while all of them are known to be quick
    decide: refuse, revoke, expire, put off (rate limit), or start        (see `admission`)
    mark the starting ones as started
    ---- commit ----
    hand the started ones to the pool, write log lines, send signals

So nothing runs that the broker does not know to have started, no slot waits for a result to be
stored, and whatever fails before the commit is as if it had not been tried: the turn is repeated
with growing pauses.  What has to be settled stays listed until it is committed.  A broker that cannot
undo commits a turn in two steps: what is settled when messages are taken, the rest at the end.
Where messages are at hand already, they start in a turn before that, and the tasks run while results
are stored.

While broker or result backend cannot be reached, nothing new is taken.  A settlement that fails for
another reason is found by settling one by one (`_careful`), and then less of it is settled.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from ..backends.base import Backend, ClaimLost
from ..exceptions import BackendError, OperationalError, WorkerLostError
from ..log import get_logger
from ..loop import Loop, Timer
from ..message import Delivery
from ..pools.base import Job, Lost, Pool
from ..runner import Ends
from ..trace import Outcome, TaskRunner, ignores_result
from ..transports.base import Consumer, NotOurs, Transport
from .admission import Admission, matching_stamps, stamp_values
from .chords import Chords
from .events import WorkerEvents
from .request import Request
from .settlement import Batch, Finished, Settler

logger = get_logger(__name__)

#: Pauses between tries of a turn that failed, in seconds.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
#: Trouble with the broker that is over sooner is not worth a line: a locked file, say.
TOLD_AFTER_S = 1.0
#: Seconds a result backend may be away until results are dropped (`result_backend_always_retry`: never).
RESULT_PATIENCE_S = 60.0
#: Messages held beyond the free slots with a prefetch multiplier of 0.
NO_LIMIT = 1000
#: How many messages are taken beyond the free slots at most; a pool may take fewer.
MOST_AHEAD = 64
#: After so many tries the results of messages that do not start are given up: they cannot be stored.
MOST_REFUSALS = 2
#: How long outcomes may wait to be settled together while there is enough to do.
LINGER_S = 0.005
#: Outcomes that may wait for that, where messages at hand are started before them.
MOST_UNSETTLED = 64
#: The wall clock may be set while a message waits to be due: it is looked at again this often.
WALL_CLOCK_CHECK_S = 5.0


class _Turn:
    """What one turn settles, and how far it got."""

    __slots__ = ("finished", "started", "returned", "batch", "is_settled", "settling_calls")

    def __init__(
        self,
        chords: Chords,
        finished: Sequence[Finished] = (),
        started: Sequence[Tuple[Request, int]] = (),
        returned: Sequence[Request] = (),
    ) -> None:
        self.finished = list(finished)
        self.started = list(started)
        self.returned = list(returned)
        self.batch = Batch(chords)
        #: The settling is committed, whatever becomes of the rest.
        self.is_settled = False
        #: How many of the batch's calls belong to it.
        self.settling_calls = 0


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
        prefetch_multiplier: int = 1,
        time_limit: Optional[float] = None,
        soft_time_limit: Optional[float] = None,
        events: Optional[WorkerEvents] = None,
    ) -> None:
        self.app = app
        self.loop = loop
        self.transport = transport
        self.consumer = consumer
        self.backend = backend
        self.pool = pool
        self.hostname = hostname
        self.events = events = WorkerEvents(app, loop, hostname) if events is None else events
        self.settler = Settler(app, loop, consumer, runner, hostname, consumer.delivery_limit, events)
        self.admission = Admission(
            app, loop, consumer, backend, pool, self.settler, time_limit, soft_time_limit
        )
        self.concurrency = concurrency
        self.prefetch_multiplier = prefetch_multiplier

        self.since_mono = loop.mono()
        self.consuming = False
        self.reserved: Deque[Request] = deque()
        self.running: Dict[int, Request] = {}
        #: Task name -> how many were started here.
        self.total: Dict[str, int] = {}
        self.on_idle: Optional[Callable[[], None]] = None

        #: How many messages are taken beyond the free slots; more only while all of them are quick.
        self._ahead = 0
        self._journal = consumer.start_journal() if pool.can_take_ahead else None
        if self._journal is not None:
            pool.use_journal(self._journal)
        #: Taken back from the pool before they began; given back to the broker in the next turn.
        self._returned: List[Request] = []
        self._finished: List[Finished] = []
        self._started: List[Tuple[Request, int]] = []
        #: How many of `_finished` are settled one by one, because one of them is bad.
        self._careful = 0
        #: Turns in a row that failed with nothing to settle; see `MOST_REFUSALS`.
        self._refusals = 0
        self._turn_due = False
        self._hungry = False
        self._watched: Optional[int] = None
        self._net: Optional[Timer] = None
        self._due: Optional[Timer] = None
        self._lingering: Optional[Timer] = None
        #: What has ended was not settled for long enough.
        self._overdue = False
        self._pause_s = 0.0
        self._trouble_since: Optional[float] = None
        self._trouble_told = ""  # who it was said of
        self._backend_away_since: Optional[float] = None

    # -- life

    def start(self) -> None:
        """Begin to take messages."""
        self.consuming = True
        self.schedule()

    def stop_taking(self) -> None:
        """Take no more messages; the next turn gives back what has not started."""
        self.consuming = False
        self._be_fed()
        self.schedule()

    @property
    def settled(self) -> bool:
        """Say whether nothing runs, waits to be settled, or waits to be given back."""
        return not (self.running or self.reserved)

    # -- turns

    def schedule(self) -> None:
        """Have a turn soon, unless one is due already or the last one failed a moment ago."""
        if not self._turn_due:
            self._turn_due = True
            if self._pause_s:
                self.loop.call_later(self._pause_s, self.turn)
            else:
                self.loop.call_soon(self.turn)

    def _linger(self) -> None:
        """Have a turn in a moment, so that it may settle more."""
        if not self._turn_due and self._lingering is None:
            self._lingering = self.loop.call_later(LINGER_S, self._end_lingering)

    def _end_lingering(self) -> None:
        self._lingering = None
        self._overdue = True
        self.schedule()

    def turn(self) -> None:
        """Have a turn (see the module); where more is at hand, let that start before the rest is settled."""
        self._turn_due = False
        overdue, self._overdue = self._overdue, False
        if not overdue and self._can_settle_later():
            before = len(self.running)
            if not self._turn(_Turn(self.settler.chords)):
                return
            if len(self.running) > before:
                # They run meanwhile, and what ends until then is settled together.
                self._linger()
                return
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        self._turn(
            _Turn(
                self.settler.chords,
                self._finished[:1] if self._careful else self._finished,
                self._started,
                self._returned,
            )
        )

    def _can_settle_later(self) -> bool:
        return (
            0 < len(self._finished) < MOST_UNSETTLED
            and self.consuming
            and not self._careful
            and not self._pause_s
            and self.pool.free_slots > 0
            and self.consumer.at_hand > 0
        )

    def _turn(self, turn: "_Turn") -> bool:
        """Settle, take, start: one transaction; return whether it was committed."""
        reserved = list(self.reserved)
        ready: List[Request] = []
        ahead: List[Request] = []
        batch = turn.batch
        asked = got = 0
        try:
            with self.transport.transaction():
                if turn.finished or turn.started:
                    self._settle(turn)
                if turn.returned:
                    self.consumer.release([request.delivery for request in turn.returned])
                if not self.consuming:
                    self._give_back(reserved)
                elif not self._careful:
                    asked, got = self._take(reserved, ready, ahead, turn)
        except Exception as error:  # named net: nothing was committed, so nothing is forgotten
            for request in ready + ahead:
                self._free_token(request)
            if turn.is_settled:
                self._after_settling(turn)
                del batch.after[turn.settling_calls :]
                self._call_after(batch)
            if isinstance(error, NotOurs):
                self._drop(error)
            elif isinstance(error, ClaimLost):
                self.schedule()  # others send that body: now nothing is claimed
            elif isinstance(error, OperationalError) or self._is_backend_away(error):
                self._trouble(error)
            else:
                self._contain(turn.finished, error)
            return False
        self._recovered(batch)
        self.reserved = deque(reserved)
        self._after_settling(turn)
        self._call_after(batch)
        if self.events.enabled:
            for request in ready:
                self.events.started(request)
            self.events.handed_ahead(ahead)
        for request in ready:
            self._submit([request], self._submit_one)
        if ahead:
            self._submit(ahead, self.pool.submit_ahead)
        self._watch(asked, got)
        if self.on_idle is not None and self.settled:
            self.on_idle()
        return True

    def _after_settling(self, turn: "_Turn") -> None:
        """Forget what is settled and committed."""
        for one in turn.finished:
            self._forget(one.request)
        for request in turn.returned:
            self._forget(request)
        del self._finished[: len(turn.finished)]
        del self._started[: len(turn.started)], self._returned[: len(turn.returned)]
        if self._careful and turn.finished:
            self._careful -= 1
            self.schedule()
        turn.finished, turn.started, turn.returned = [], [], []

    def _call_after(self, batch: Batch) -> None:
        for call in batch.after:
            self._call(call)

    def _reserve_room(self, reserved: int) -> int:
        """Return how many more messages may wait here for a free slot (`worker_prefetch_multiplier`)."""
        most = (self.prefetch_multiplier - 1) * self.concurrency if self.prefetch_multiplier else NO_LIMIT
        return max(0, most - reserved)

    def _settle(self, turn: "_Turn") -> None:
        batch = turn.batch
        for one in turn.finished:
            batch.add(one)
        if turn.started:
            ended = {id(one.request) for one in self._finished}
            for request, pid in turn.started:
                if id(request) not in ended and not ignores_result(request.task, request.context()):
                    batch.results.append(self.settler.started_result(request, pid))
        batch.write(self.transport, self.backend, self.app.conf.task_publish_timeout)

    def _take(
        self, reserved: List[Request], ready: List[Request], ahead: List[Request], turn: "_Turn"
    ) -> Tuple[int, int]:
        """Take messages and decide; return how many were asked for and how many came."""
        batch = turn.batch
        settling_calls = len(batch.after)
        free = self.pool.free_slots
        while reserved and len(ready) < free:
            request = reserved.pop(0)
            if self.admission.still_wanted(request, batch):
                ready.append(request)
        keep = self._reserve_room(len(reserved))
        beyond = min(self._ahead, self.pool.ahead_slots)
        asked = free - len(ready) + keep + beyond
        deliveries: List[Delivery] = []
        if asked > 0:
            deliveries = self.consumer.poll(asked)
            if not self.transport.rolls_back:
                turn.is_settled, turn.settling_calls = True, settling_calls
        surplus: List[Request] = []
        admitted_all = True
        for delivery in deliveries:
            admitted = self.admission.admit(delivery, batch)
            if admitted is None:
                admitted_all = False
            elif len(ready) < free:
                ready.append(admitted)
            elif len(ahead) < beyond and admitted.may_go_ahead:
                ahead.append(admitted)
            elif keep > 0 or admitted.policy.pace is not None:
                # One with a rate limit has taken its turn by now: given back, it would wait for another.
                keep -= 1
                reserved.append(admitted)
            else:
                surplus.append(admitted)
                continue
            if self.events.enabled and admitted is not None:
                batch.after.append(partial(self.events.received, admitted))
        if self._refusals >= MOST_REFUSALS and batch.results:
            text = "%d results of messages that do not start here are lost, they cannot be stored"
            batch.after.append(partial(logger.error, text, len(batch.results)))
            batch.results = []
        if batch.endings:
            batch.write(self.transport, self.backend, self.app.conf.task_publish_timeout)
        if surplus:
            self.consumer.release([request.delivery for request in surplus])
        self._adapt(asked, len(deliveries), admitted_all and not surplus, ready)
        starting = ready + ahead
        if starting:
            if self._journal is not None:
                for request in starting:
                    request.delivery.token = self._journal.token()
            # Last of all: what is not committed after this has not started.
            self.consumer.start([request.delivery for request in starting])
        return asked, len(deliveries)

    def _adapt(self, asked: int, got: int, all_welcome: bool, ready: List[Request]) -> None:
        """Take more beyond the free slots while the queue is long and quick, nothing otherwise."""
        if not all_welcome:
            self._ahead = 0
        elif self._journal is not None and 0 < asked == got and all(one.may_go_ahead for one in ready):
            self._ahead = min(2 * self._ahead or 2, MOST_AHEAD)

    def _forget(self, request: Request) -> None:
        """The request is settled or given back: it is not this worker's any more."""
        self.running.pop(id(request), None)
        self._free_token(request)

    def _free_token(self, request: Request) -> None:
        token, request.delivery.token = request.delivery.token, None
        if token is not None and self._journal is not None:
            self._journal.free(token)

    def _give_back(self, reserved: List[Request]) -> None:
        if reserved:
            self.consumer.release([request.delivery for request in reserved])
            self.settler.counts["requeued"] += len(reserved)
            reserved.clear()

    def _call(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception:  # named net: what was committed must still be handed to the pool
            logger.exception("What follows a turn failed; the worker goes on")

    def finish_chords_left_over(self) -> None:
        """Send the bodies of chords that are complete and that nobody has finished."""
        try:
            for group_id, body in self.backend.chords_left_over(self.loop.now()):
                batch = Batch(self.settler.chords)
                with self.transport.transaction():
                    self.settler.chords.finish_left_over(group_id, body, self.backend, batch)
                    batch.write(self.transport, self.backend, self.app.conf.task_publish_timeout)
                self._call_after(batch)
        except (OperationalError, BackendError, ClaimLost) as error:
            logger.debug("chords that are left over are looked for later: %s", error)

    # -- what wakes the next turn

    def _watch(self, asked: int, got: int) -> None:
        if not self.consuming or asked <= 0:
            self._be_fed()
        elif got < asked:
            self._be_hungry()
        elif self.pool.free_slots > 0:
            self.schedule()
        else:
            self._be_fed()

    def _be_hungry(self) -> None:
        """There are free slots and no messages: watch for new ones."""
        consumer, loop = self.consumer, self.loop
        if consumer.moved and self._watched is not None:
            loop.remove_reader(self._watched)
            self._watched = None
        if self._watched is None:
            fd = consumer.fileno()
            if fd is not None:
                loop.add_reader(fd, self._on_readable)
                self._watched = fd
        if not self._hungry:
            self._hungry = True
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
        if consumer.woken:
            self.schedule()
        if due is not None:
            self._due = loop.call_later(min(max(0.0, due - loop.now()), WALL_CLOCK_CHECK_S), self.schedule)

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
        try:
            self.consumer.on_readable()
        except OperationalError as error:
            self._trouble(error)
        else:
            self.schedule()

    def _look(self) -> None:
        """The net under the descriptor: ask the store itself whether something changed."""
        self._net = None
        if not self._hungry:
            return
        consumer = self.consumer
        try:
            if consumer.changed() or consumer.moved:
                self.schedule()
        except OperationalError as error:
            self._trouble(error)
            return
        if consumer.poll_interval_s is not None:
            self._net = self.loop.call_later(consumer.poll_interval_s, self._look)

    # -- turns that fail

    def _trouble(self, error: Exception) -> None:
        """The broker did not take the turn: nothing of it happened; try again after a pause."""
        # A broken descriptor would be ready all the time.
        self._be_fed()
        mono = self.loop.mono()
        if self._trouble_since is None:
            self._trouble_since = mono
        foreseen = isinstance(error, (OperationalError, BackendError))
        if not self._trouble_told and (mono - self._trouble_since >= TOLD_AFTER_S or not foreseen):
            self._trouble_told = "Result backend" if isinstance(error, BackendError) else "Broker"
            logger.error(
                "%s: %s; this worker keeps its %d outcomes and tries again.",
                self._trouble_told, error, len(self._finished), exc_info=None if foreseen else error,
            )  # fmt: skip
        self._pause_s = min(max(FIRST_PAUSE_S, self._pause_s * 2), LONGEST_PAUSE_S)
        self.schedule()

    @property
    def away_since_mono(self) -> Optional[float]:
        """Since when the broker (or the result backend) takes no turn of this worker; None while it does."""
        return self._trouble_since

    def _is_backend_away(self, error: Exception) -> bool:
        """Say whether the result backend could not be reached, and is worth waiting for."""
        if not isinstance(error, BackendError) or not isinstance(error.__cause__, OperationalError):
            return False
        if self._backend_away_since is None:
            self._backend_away_since = self.loop.mono()
        patient: bool = self.app.conf.result_backend_always_retry
        return patient or self.loop.mono() - self._backend_away_since < RESULT_PATIENCE_S

    def _recovered(self, batch: Batch) -> None:
        self._pause_s = 0.0
        self._refusals = 0
        if batch.stored:
            self._backend_away_since = None
        if self._trouble_since is not None:
            if self._trouble_told:
                away_s = self.loop.mono() - self._trouble_since
                logger.warning("%s reached again after %.1f s.", self._trouble_told, away_s)
            self._trouble_since, self._trouble_told = None, ""

    def _drop(self, error: NotOurs) -> None:
        """Drop outcomes of messages that another worker has taken over; keep the rest."""
        gone = {id(delivery) for delivery in error.gone}
        settled = {id(delivery) for delivery in error.settled}
        kept: List[Finished] = []
        for one in self._finished:
            name = id(one.request.delivery)
            if name in gone:
                text = "Task %s was given to another worker meanwhile; its outcome here is dropped"
                logger.warning(text, one.request)
                self.settler.counts["lost"] += 1
                self._forget(one.request)
            elif name in settled:
                self._forget(one.request)
                if one.after is not None:
                    self._call(one.after)
            else:
                kept.append(one)
        self._finished = kept
        self._careful = min(self._careful, len(self._finished))
        # What waited here for a slot is settled by nobody here: it is only not started.
        gone |= settled
        self.reserved = deque(one for one in self.reserved if id(one.delivery) not in gone)
        self.schedule()

    def _contain(self, finished: List[Finished], error: Exception) -> None:
        """The turn failed, and not because the broker is away: find the outcome which causes that."""
        if self._started:
            # The state STARTED is a courtesy: it must not keep a result from being stored.
            logger.warning("The state STARTED of %d tasks cannot be stored: %s", len(self._started), error)
            self._started.clear()
            self.schedule()
        elif not finished:
            # Perhaps a result of a message that is refused: it must not keep the others from being taken.
            self._refusals += 1
            self._trouble(error)
        elif not self._careful:
            self._careful = len(finished)
            self.schedule()
        else:
            one = finished[0]
            if one.refusals < 2:
                self.settler.refused(one, error)
            else:
                text = "Task %s cannot be settled and is left to the broker"
                logger.error(text, one.request, exc_info=error)
                self._forget(one.request)
                del self._finished[0]
                self._careful -= 1
            self.schedule()

    # -- run

    def _submit(self, requests: List[Request], submit: Callable[[List[Job]], None]) -> None:
        jobs = [self._make_job(request) for request in requests]
        try:
            submit(jobs)
        except Exception as error:  # named net: the tasks are started by the broker's books, so they must end
            for request, job in zip(requests, jobs):
                logger.exception("Task %s cannot be handed to the pool", request)
                self._done(request, job, Lost(WorkerLostError(f"not handed to the pool: {error}"), 0, 0.0))
            return
        if self.admission.revoked:
            for request in requests:
                if request.id in self.admission.revoked:
                    self.revoke_running(request, "SIGTERM")

    def _submit_one(self, jobs: List[Job]) -> None:
        self.pool.submit(jobs[0])

    def _make_job(self, request: Request) -> Job:
        self.running[id(request)] = request
        name = request.name
        self.total[name] = self.total.get(name, 0) + 1
        request.time_start = self.loop.now()
        run = request.run()
        if self.events.enabled:
            run = run._replace(wants_shown=True)
        job = request.job = Job(
            run,
            partial(self._done, request),
            partial(self._on_start, request) if request.policy.track_started else None,
            request.soft_time_limit,
            request.time_limit,
            partial(self._back, request),
            request.delivery.token,
        )
        return job

    def _on_start(self, request: Request, job: Job, pid: int) -> None:
        request.pid = pid
        self._started.append((request, pid))
        self.schedule()

    def _back(self, request: Request, job: Job) -> None:
        """The pool did not begin it: let whoever is free first have it."""
        self.events.taken_back(request)
        self.total[request.name] -= 1  # it is counted when it is handed out again
        self._ahead = 0
        self._returned.append(request)
        self.schedule()

    def _done(self, request: Request, job: Job, outcome: Union[Outcome, Lost]) -> None:
        if isinstance(outcome, Outcome):
            request.policy.observe(outcome.runtime_s)
        if self.events.enabled:
            self.events.ended(request, outcome.runtime_s)
        try:
            one = self.settler.ended(request, outcome)
        except Exception as error:  # named net: hooks and routes are the user's; the message must end
            logger.exception("Task %s: its end cannot be settled as it should", request)
            one = Finished(request, Ends(), partial(self.consumer.ack, request.delivery))
            self.settler.refused(one, error)
        self._finished.append(one)
        if len(self.running) - len(self._finished) > self.concurrency + self._ahead // 2:
            # Enough is left to do meanwhile: a larger turn costs less for each task.
            self._linger()
        else:
            self.schedule()

    # -- commands

    def revoke(self, task_ids: List[str], until: float, terminate: bool, signal: str) -> List[str]:
        """Remember revoked ids; return those which run here and were (with `terminate`) stopped."""
        self.admission.remember_revoked(task_ids, until)
        stopped = []
        if terminate:
            wanted = set(task_ids)
            for request in list(self.running.values()):
                if request.id in wanted and self.revoke_running(request, signal):
                    stopped.append(request.id)
        self.schedule()
        return stopped

    def revoke_by_stamps(
        self, stamps: Mapping[str, Any], until: float, terminate: bool, signal: str
    ) -> Dict[str, List[Any]]:
        """Remember revoked stamps; return those of tasks that run here and were (`terminate`) stopped."""
        self.admission.remember_revoked_stamps(stamps, until)
        stopped: Dict[str, List[Any]] = {}
        if terminate:
            wanted = {name: stamp_values(values) for name, values in stamps.items()}
            for request in list(self.running.values()):
                found = matching_stamps(request.delivery.message.headers, wanted)
                if found and self.revoke_running(request, signal):
                    for name, values in found.items():
                        known = stopped.setdefault(name, [])
                        known += [value for value in values if value not in known]
        self.schedule()
        return stopped

    def revoke_running(self, request: Request, signal: str) -> bool:
        """Stop a running task; False where the pool cannot."""
        if request.job is None or not self.pool.terminate(request.job, signal):
            logger.warning("Task %s runs in a pool that cannot stop it; it goes on", request)
            return False
        request.terminating = signal
        return True

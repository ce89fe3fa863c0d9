# SPDX-License-Identifier: MIT
"""Beat: sends periodic tasks when they are due.

Any number of beats may run over the same store.  Each computes the next tick of an entry from the
same record, and who replaces the record first has sent it; the message is part of the replacement
where broker and store are the same.  Where they are not, the tick is claimed for some seconds, sent,
and marked as sent; a beat that dies between leaves a tick that another one sends once more, under the
same task id.

A `Scheduler` knows the entries and does what is due in one `tick`; `Beat` is the service around it:
waits, looks for changes that others made, and notices a clock that was set.  Waiting is by the
monotonic clock, and the wall clock is looked at each second.

Source: Celery's beat (names, settings, log lines); what happens to missed ticks is our own rule.
"""

from __future__ import annotations

import threading
import time
import uuid
import warnings
from datetime import datetime
from typing import Any, Callable, Dict, List, Mapping, Optional, Set, Union

from . import _state, signals
from .backends.base import backend_class
from .beat_control import BeatCommands
from .beat_entry import (
    CLOCK_STEP_S,
    MOST_STEPS,
    NEVER,
    ON_TIME_S,
    BeatLazyFunc,
    ScheduleEntry,
    State,
    tick_id,
)
from .beat_store import ScheduleStore, open_store
from .exceptions import BackendError, ImproperlyConfigured, MiniqError, OperationalError
from .log import get_logger
from .loop import Loop
from .schedules import crontab, describe
from .states import READY_STATES
from .text import import_object, nearest, node_name

__all__ = ["Beat", "BeatLazyFunc", "ScheduleEntry", "Scheduler", "scheduler_class"]

logger = get_logger(__name__)

#: Name -> "module:Class", relative to this package; the latter ones are Celery's.
SCHEDULERS: Dict[str, str] = {
    "persistent": ".beat:Scheduler",
    "celery.beat:PersistentScheduler": ".beat:Scheduler",
    "celery.beat:Scheduler": ".beat:Scheduler",
    "celery.beat.PersistentScheduler": ".beat:Scheduler",
    "celery.beat.Scheduler": ".beat:Scheduler",
}
#: Tasks that nobody runs: they are sent as what they are made of.
WORKFLOWS = {
    "celery.chain": "chain", "celery.chord": "chord", "celery.chunks": None, "celery.group": "group",
}  # fmt: skip
#: Groups of entry points in which other packages name their schedulers.
ENTRY_POINTS = ("miniq.beat_schedulers", "celery.beat_schedulers")

#: The longest wait (seconds) where `beat_max_loop_interval` says nothing.
MAX_INTERVAL_S = 300.0
#: Seconds between two looks for changes made by others, and at the wall clock.
LOOK_S = 1.0
#: The wall clock moved by so much more (seconds) than the monotonic one: it was set.
CLOCK_SET_S = 0.5
#: Runs of one entry in one turn, so that one with much to catch up does not keep the others waiting.
MOST_RUNS_A_TURN = 20
#: Seconds for which a tick is claimed while it is sent, where broker and store are not the same.
LEASE_S = 10.0
#: Seconds until the next try to listen for pings.
LISTEN_PAUSE_S = 5.0
#: Seconds after which an entry is looked at again whose schedule failed.
AFTER_ERROR_S = 60.0
#: Seconds after which it is asked again whether the last run has ended, where nobody could tell.
ASK_AGAIN_S = 5.0
#: How often a change is tried while others are quicker.
MOST_TRIES = 20
#: Seconds until the next try when broker or store cannot be reached: the first, and the most.
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 15.0


class Scheduler:
    """The entries of an app, and their state in a store.

    Subclasses may override `setup_schedule`, `tick`, `apply_entry`, `sync` and `close`, as with
    Celery's class.  Making one opens nothing; `tick` does.  Used by one thread.
    """

    def __init__(
        self,
        app: Any,
        schedule: Optional[Dict[str, ScheduleEntry]] = None,
        max_interval: Optional[float] = None,
        schedule_filename: Optional[str] = None,
        lazy: bool = False,
        store: Optional[ScheduleStore] = None,
        **kwargs: Any,
    ) -> None:
        self.app = app
        self.max_interval = max_interval or app.conf.beat_max_loop_interval or MAX_INTERVAL_S
        if not self.max_interval > 0:
            raise ImproperlyConfigured(
                f"max_interval must be a number of seconds above 0, not {self.max_interval}"
            )
        #: Entries by name: those of the code, and after the first tick those of the store as well.
        self.schedule: Dict[str, ScheduleEntry] = {} if schedule is None else schedule
        self._filename = schedule_filename
        self._store = store
        self._version: Optional[str] = None
        self._is_loaded = self._is_stale = False
        self._pause_s = FIRST_PAUSE_S
        self._away_since: Optional[float] = None
        #: The wall clock was set back: intervals that wait for a moment that was already are to begin anew.
        self._was_set_back = False
        #: Names of entries that wait for the result backend to say whether their last run has ended.
        self._unanswered: Set[str] = set()
        #: Stands for this beat in claims.
        self._token = uuid.uuid4().hex
        if not lazy:
            self.setup_schedule()

    # -- entries

    def setup_schedule(self) -> None:
        """Make the entries of the code; raises `ImproperlyConfigured` where one makes no sense."""
        self.update_from_dict(self.app.conf.beat_schedule)
        self.update_from_dict(self.app.periodic_tasks)

    def update_from_dict(self, entries: Mapping[str, Any]) -> None:
        """Add entries, each as in the setting `beat_schedule`."""
        for name, values in entries.items():
            entry = ScheduleEntry.from_dict(name, values, self.app)
            self._check_overlap(entry)
            self.schedule[entry.name] = entry

    def add(self, **kwargs: Any) -> ScheduleEntry:
        """Add an entry for as long as this process runs; the arguments are those of `ScheduleEntry`."""
        entry = ScheduleEntry(app=self.app, **kwargs)
        self.schedule[entry.name] = entry
        self._is_stale = True
        return entry

    def _check_overlap(self, entry: ScheduleEntry) -> None:
        """Raise `ImproperlyConfigured` where nobody could tell whether the last run has ended."""
        if entry.overlap == "allow":
            return
        why = ""
        task = self.app.tasks.get(entry.task)
        ignored = entry.options.get("ignore_result", getattr(task, "ignore_result", None))
        if self.app.conf.task_ignore_result if ignored is None else ignored:
            why = "its task stores no result"
        elif not getattr(task, "_backend", None) and not backend_class(self.app.backend_url()).is_shared:
            why = "the result backend cannot tell"
        if why:
            raise ImproperlyConfigured(
                f"periodic task {entry.name!r}: overlap='skip' needs to know whether the last run has ended,"
                f" and {why}; give the task a result, or set overlap='allow'"
            )

    @property
    def store(self) -> ScheduleStore:
        """Where the state is."""
        if self._store is None:
            self._store = open_store(self.app, self._filename)
        return self._store

    @property
    def info(self) -> str:
        """Where the state is, for people."""
        alone = self.store.is_local and self.app.broker_is_server
        return self.store.where + (" (known to beats of this machine alone)" if alone else "")

    def changed(self) -> bool:
        """Say whether other processes have changed entries since they were read."""
        if not self._is_loaded or self._away_since is not None:
            return False  # the next tick reads all anyway, and comes when it is time to try again
        return self.store.version() != self._version

    def load(self) -> None:
        """Read all records; the first time, make those that are missing, and let changes of the code count.

        Of beats with different versions of the code, the one that was started last decides about an
        entry; the others take it from the record, or where it cannot be written there, leave it to that one.
        """
        # Before the records: a change between the two is seen at the next look.
        version = self.store.version()
        texts = self.store.load()
        self._version = version
        for name, entry in list(self.schedule.items()):
            text = texts.pop(name, None)
            if entry.state.source == "added" and text != entry.text:
                del self.schedule[name]  # removed, or made anew below
                if text is not None:
                    texts[name] = text
            else:
                self._meet(entry, text)
        for name, text in texts.items():
            try:
                self._take_added(name, text)
            except (MiniqError, ValueError) as error:
                logger.error("beat: entry %r in the store is left out: %s", name, error)
        self._is_loaded = True

    def _take_added(self, name: str, text: str) -> None:
        state = State.read(text)
        if state.source == "added":  # others are of code that this process does not have
            entry = ScheduleEntry.from_spec(name, state.spec or {}, self.app)
            self._check_overlap(entry)
            entry.take(state, text)
            self.schedule[name] = entry
            self._plan(entry)

    def _meet(self, entry: ScheduleEntry, text: Optional[str]) -> None:
        """Bring an entry of the code and its record together."""
        if text is not None and text == entry.text:
            return
        try:
            state = None if text is None else State.read(text)
        except ValueError as error:
            logger.warning("beat: entry %r begins anew: %s", entry.name, error)
            state = None
        if state is None or not self._is_loaded:
            wanted = self._wanted(entry, state)
            if wanted != state:
                # The first of all announces, so that the loss of a store is seen by its missing version.
                if not self.store.swap(entry.name, text, wanted.text(), announce=self._version is None):
                    self._refresh(entry)
                    return
                state, text = wanted, wanted.text()
        if state.mark != entry.mark:
            entry = self._as_later_code_has_it(entry, state)
        entry.take(state, text)
        self._plan(entry)

    def _as_later_code_has_it(self, entry: ScheduleEntry, state: State) -> ScheduleEntry:
        """Return the entry as code has it that was started later: that counts, also when its beat dies."""
        try:
            found = ScheduleEntry.from_spec(entry.name, state.spec or {}, self.app)
            self._check_overlap(found)
        except (MiniqError, ValueError, TypeError):
            found = entry  # what only that code can say
        if found.mark == state.mark:
            self.schedule[entry.name] = found
            logger.info("beat: entry %r is taken as code has it that was started later", entry.name)
        else:
            logger.warning(
                "beat: entry %r has another schedule in code that was started later; it is left to that beat",
                entry.name,
            )
        return found

    def _wanted(self, entry: ScheduleEntry, state: Optional[State]) -> State:
        """Return the record as this code wants it: another schedule counts from now."""
        try:
            spec = entry.spec()
        except (ValueError, TypeError):  # only the code can say what it is
            spec = {"task": entry.task, "text": describe(entry.schedule)}
        if state is None:
            return State("code", entry.mark, self.app.wall(), spec=spec)
        if state.mark != entry.mark:
            state = state._replace(mark=entry.mark, last_due=self.app.wall(), claim=None)
        return state._replace(source="code", spec=spec)

    def _refresh(self, entry: ScheduleEntry) -> None:
        """Read one record again: another process was quicker."""
        text = self.store.read(entry.name)
        state = _read(text)
        if state is None:
            entry.due = NEVER
            self._is_stale = True
        else:
            entry.take(state, text)
            self._plan(entry)

    def _plan(self, entry: ScheduleEntry) -> None:
        """Note when there is something to do for an entry."""
        state = entry.state
        entry.due = NEVER
        if state.paused or not entry.enabled or state.mark != entry.mark:
            return
        if state.claim is not None:
            entry.due = 0.0 if state.claim[2] == self._token else state.claim[1]
            return
        try:
            entry.due = entry.next_due(state.last_due, self.app.zone)
        except Exception as error:  # safety net: a schedule may be the user's; the others go on
            self._put_off(entry, error)

    def _put_off(self, entry: ScheduleEntry, error: Exception) -> None:
        logger.error(
            "beat: entry %r failed (%r); again in %g s", entry.name, error, AFTER_ERROR_S, exc_info=True
        )
        entry.due = self.app.wall() + AFTER_ERROR_S

    # -- what is due

    def tick(self) -> float:
        """Do what is due; return the seconds until something may be due again.

        A broker or store that cannot be reached is tried again, at growing intervals.
        """
        try:
            wait_s = self._tick()
        except OperationalError as error:
            self._is_stale = True
            if self._away_since is None:
                self._away_since, self._pause_s = time.monotonic(), FIRST_PAUSE_S
                logger.error("beat: %s; trying again, nothing is lost meanwhile", error)
            pause_s, self._pause_s = self._pause_s, min(self._pause_s * 2, LAST_PAUSE_S)
            return min(pause_s, self.max_interval)
        if self._away_since is not None:
            logger.warning("beat: reached again after %.1f s", time.monotonic() - self._away_since)
            self._away_since = None
        return wait_s

    def _tick(self) -> float:
        if self._is_stale or not self._is_loaded or self.changed():
            self._is_stale = False
            self.load()
        now: float = self.app.wall()
        ahead_s = 0.0 if self._was_set_back else CLOCK_STEP_S
        for entry in list(self.schedule.values()):
            if entry.is_from_the_future(now, ahead_s):
                self._begin_anew(entry, now)
            elif entry.due <= now:
                self._serve(entry, now)
        self._was_set_back = False
        next_due = min((entry.due for entry in self.schedule.values()), default=NEVER)
        return min(max(0.0, next_due - now), self.max_interval)

    @property
    def away_since_mono(self) -> Optional[float]:
        """Since when the broker, or where schedules are kept, cannot be reached; None while it can."""
        return self._away_since

    def clock_was_set_back(self) -> None:
        """Let the next tick begin intervals anew that wait for a moment which was already."""
        self._was_set_back = True

    def _begin_anew(self, entry: ScheduleEntry, now: float) -> None:
        logger.warning(
            "beat: entry %r was last due %.0f s in the future: the clock was set back, or is ahead elsewhere;"
            " it begins anew",
            entry.name,
            entry.state.last_due - now,
        )
        self._advance(entry, now)

    def _serve(self, entry: ScheduleEntry, now: float) -> None:
        """Do what is due of one entry, or a good part of it."""
        for _ in range(MOST_RUNS_A_TURN):
            if entry.due > now:
                return
            try:
                self._step(entry, now)
            except OperationalError:
                raise
            except BackendError as error:
                # Only this entry needs the result backend; the others go on without it.
                if entry.name not in self._unanswered:
                    self._unanswered.add(entry.name)
                    logger.error(
                        "beat: entry %r waits: whether its last run has ended cannot be told: %s",
                        entry.name,
                        error,
                    )
                entry.due = now + ASK_AGAIN_S
            except Exception as error:  # safety net: one entry must not keep the others from being sent
                self._put_off(entry, error)

    def _step(self, entry: ScheduleEntry, now: float) -> None:
        """Send the next tick, or leave some out."""
        state, zone = entry.state, self.app.zone
        if state.claim is not None:  # ours, or of one who died over it
            self._send(entry, state.claim[0], now)
            return
        if entry.schedule.polled:
            is_due, next_s = entry.schedule.is_due(datetime.fromtimestamp(state.last_due, zone))
            if not is_due:
                entry.due = now + next_s
                return
            due = more = now
        else:
            dues, more = entry.ticks(now, zone, 1 if entry.catch_up == "all" else MOST_STEPS)
            due = dues[-1]
        why = self._reason_to_leave_out(entry, due, more, now)
        if why is None:
            self._send(entry, due, now)
            return
        if why:
            logger.info("Scheduler: Leaving out due task %s (%s): %s", entry.name, entry.task, why)
        self._advance(entry, due)

    def _reason_to_leave_out(
        self, entry: ScheduleEntry, due: float, more: float, now: float
    ) -> Optional[str]:
        """Return why a tick is not sent, None where it is; "" where a later one stands for it."""
        if entry.catch_up != "all" and due < more <= now:
            return ""
        late_s = now - due
        most_s = ON_TIME_S if entry.catch_up == "skip" else NEVER
        deadline_s = self.app.conf.beat_cron_starting_deadline
        if deadline_s is not None and isinstance(entry.schedule, crontab):
            most_s = min(most_s, deadline_s)
        if late_s > most_s:
            return f"it is {late_s:.0f} s late"
        if entry.overlap == "skip" and self._still_runs(entry, now):
            return f"the run {entry.state.last_id} has not ended"
        return None

    def _still_runs(self, entry: ScheduleEntry, now: float) -> bool:
        """Say whether the last run has not ended; one whose result is no longer kept has.

        Raises `BackendError` where that cannot be told.
        """
        state = entry.state
        if state.last_id is None or state.last_run is None:
            return False
        kept_s = self.app.conf.result_expires
        if kept_s and now - state.last_run > kept_s:
            return False
        task = self.app.tasks.get(entry.task)
        result = self.app.AsyncResult(state.last_id) if task is None else task.AsyncResult(state.last_id)
        is_running: bool = result.state not in READY_STATES
        if entry.name in self._unanswered:
            self._unanswered.discard(entry.name)
            logger.warning("beat: entry %r goes on: the result backend answers again", entry.name)
        return is_running

    # -- sending

    def _send(self, entry: ScheduleEntry, due: float, now: float) -> None:
        """Send a tick, and have the store know: together, or one after the other under a claim."""
        task_id = entry.options.get("task_id") or tick_id(self.app.main, entry.name, due)
        try:
            if self.is_atomic:
                sent = entry.state.sent(due, now, task_id)
                won = self._swap(entry, sent, lambda: self.apply_entry(entry, task_id))
            else:
                won = self._send_claimed(entry, due, now, task_id)
        except OperationalError:
            raise
        except Exception as error:  # safety net: what is wrong with it is the user's; the next tick may do
            logger.error(
                "beat: entry %r could not be sent (%r): this tick is left out",
                entry.name,
                error,
                exc_info=True,
            )
            self._advance(entry, due)
            return
        if won:
            logger.info("Scheduler: Sending due task %s (%s)", entry.name, entry.task)
            logger.debug("%s sent. id->%s", entry.task, task_id)

    @property
    def is_atomic(self) -> bool:
        """Whether message and record are one: not so if tasks run at once, which takes its time."""
        return self.store.atomic and not self.app.conf.task_always_eager

    def _send_claimed(self, entry: ScheduleEntry, due: float, now: float, task_id: str) -> bool:
        lease_s = max(LEASE_S, 2 * self.app.conf.task_publish_timeout)
        claim = (due, now + lease_s, self._token)
        if not self._swap(entry, entry.state._replace(claim=claim)):
            return False
        self.apply_entry(entry, task_id)
        # Somebody may have paused it meanwhile: as long as the claim is there, it is ours.
        for _ in range(MOST_TRIES):
            if entry.state.claim != claim:
                break
            if self._swap(entry, entry.state.sent(due, now, task_id)):
                return True
        logger.warning(
            "beat: entry %r was taken over while it was sent: task %s may be sent twice", entry.name, task_id
        )
        return True

    def apply_entry(self, entry: ScheduleEntry, task_id: Optional[str] = None) -> Any:
        """Send the task of an entry now; return its result."""
        args, kwargs, options = entry.call()
        # What cannot be reached is tried again by the next tick, not in here.
        options["retry"] = False
        if task_id is not None:
            options["task_id"] = task_id
        if entry.task in WORKFLOWS:
            found = {"task": entry.task, "args": args, "kwargs": kwargs, "options": {}, "immutable": False}
            workflow = self.app.signature({**found, "subtask_type": WORKFLOWS[entry.task]})
            return workflow.apply_async((), {}, **options)
        task = self.app.tasks.get(entry.task)
        if task is None:
            return self.app.send_task(entry.task, args, kwargs, **options)
        return task.apply_async(args, kwargs, **options)

    def _advance(self, entry: ScheduleEntry, due: float) -> None:
        """Deal with all ticks up to `due` by sending none."""
        self._swap(entry, entry.state._replace(last_due=due, claim=None))

    def _swap(self, entry: ScheduleEntry, state: State, publish: Optional[Callable[[], Any]] = None) -> bool:
        text = state.text()
        if not self.store.swap(entry.name, entry.text, text, publish):
            self._refresh(entry)
            return False
        entry.take(state, text)
        self._plan(entry)
        return True

    # -- changes at run time

    def records(self) -> Dict[str, State]:
        """Return the readable records of all entries, of the code or not."""
        found = {}
        for name, text in self.store.load().items():
            try:
                found[name] = State.read(text)
            except ValueError as error:
                logger.warning("beat: entry %r: %s", name, error)
        return found

    def save(self, entry: Optional[ScheduleEntry] = None, **values: Any) -> ScheduleEntry:
        """Add an entry that lives in the store alone; beats that run begin with it within a second or two.

        It is an entry, or what makes one: name, task, schedule, args and so on.  Raises
        `ImproperlyConfigured` where the name is taken or the entry cannot be written as JSON.
        """
        if entry is None:
            entry = ScheduleEntry(app=self.app, **values)
        self._check_overlap(entry)
        try:
            spec = entry.spec()
        except (TypeError, ValueError) as error:
            raise ImproperlyConfigured(str(error)) from error
        state = State("added", entry.mark, self.app.wall(), spec=spec)
        if entry.name in self.schedule or not self.store.swap(entry.name, None, state.text(), announce=True):
            raise ImproperlyConfigured(
                f"there is a periodic task {entry.name!r} already: remove it first, or take another name"
            )
        return entry

    def remove(self, name: str) -> None:
        """Remove an entry that was added at run time, or one of code that is gone."""
        if name in self.schedule and self.schedule[name].state.source == "code":
            raise ImproperlyConfigured(f"periodic task {name!r} is in the code: remove it there, or pause it")
        text = self.store.read(name)
        if text is not None and _read(text) is None and self.store.swap(name, text, None, announce=True):
            return
        self._change(name, lambda state: None)

    def pause(self, name: str) -> None:
        """Send an entry no more until `resume`, over restarts as well."""
        self._change(name, lambda state: state._replace(paused=True))

    def resume(self, name: str) -> None:
        """End a pause; what was due in it stays unsent."""
        now = self.app.wall()
        self._change(
            name,
            lambda state: state._replace(paused=False, last_due=now, claim=None) if state.paused else state,
        )

    def run_now(self, name: str) -> str:
        """Send the task of an entry once, beside its schedule; return the task's id."""
        task_id = str(uuid.uuid4())
        entry = self.find(name)
        now = self.app.wall()

        def ran(state: State) -> State:
            return state._replace(last_run=now, runs=state.runs + 1, last_id=task_id)

        if self.is_atomic:
            self._change(name, ran, lambda: self.apply_entry(entry, task_id))
        else:
            self.apply_entry(entry, task_id)
            self._change(name, ran)
        return task_id

    def find(self, name: str) -> ScheduleEntry:
        """Return an entry by its name; `ImproperlyConfigured` names the nearest one."""
        if name in self.schedule:
            return self.schedule[name]
        records = self.records()
        state = records.get(name)
        if state is None:
            hint = nearest(name, {**self.schedule, **records})
            raise ImproperlyConfigured(
                f"there is no periodic task {name!r}{f', did you mean {hint!r}?' if hint else ''}"
            )
        try:
            return ScheduleEntry.from_spec(name, state.spec or {}, self.app)
        except ValueError as error:
            raise ImproperlyConfigured(
                f"periodic task {name!r} is known to other code only: {error}"
            ) from error

    def upcoming(self, entry: ScheduleEntry, state: State, count: int) -> List[float]:
        """Return the next moments (epoch seconds) at which an entry is due, overdue ones left out."""
        now, zone = self.app.wall(), self.app.zone
        if state.paused or not entry.enabled:
            return []
        if entry.schedule.polled:
            count = 1  # it knows no more than that
        entry.take(state, None)
        due = entry.ticks(now, zone)[1]
        found = [due if due > now else entry.next_due(now, zone)]
        while len(found) < count and found[-1] < NEVER:
            found.append(entry.next_due(found[-1], zone))
        return [one for one in found if one < NEVER]

    def _change(
        self,
        name: str,
        change: Callable[[State], Optional[State]],
        publish: Optional[Callable[[], Any]] = None,
    ) -> None:
        """Replace a record by what `change` makes of it, however often others are quicker."""
        for _ in range(MOST_TRIES):
            text = self.store.read(name)
            found = _read(text)
            if found is None:
                # Of the code, and no beat has seen it yet, or nobody can read it.
                begun = self._wanted(self.find(name), None).text()
                self.store.swap(name, text, begun, announce=True)
                continue
            state = change(found)
            if self.store.swap(name, text, state and state.text(), publish, announce=True):
                return
        raise OperationalError(f"periodic task {name!r} is changed by others all the time: try again")

    def __enter__(self) -> "Scheduler":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    # -- Celery's class has these

    def sync(self) -> None:
        """Do nothing: what was sent is stored with each tick."""

    def close(self) -> None:
        """Let go of the store and of this thread's connection."""
        self.sync()
        if self._store is not None:
            self._store.close()


class Beat:
    """The service: turns a scheduler until it is stopped.

    `run` blocks; ``with app.Beat(): ...`` runs it in a thread.  `stop` may be called from any thread
    or a signal handler.  Logging and signal handlers are left alone.
    """

    def __init__(
        self,
        app: Any,
        scheduler: Union[str, type, Scheduler, None] = None,
        max_interval: Optional[float] = None,
        schedule: Optional[str] = None,
        embedded: bool = False,
        hostname: Optional[str] = None,
    ) -> None:
        self.app = app
        self.embedded = embedded
        self.hostname = node_name(hostname or "celerybeat@%h")
        if not embedded:  # a worker has done that
            app.import_modules()
        if not isinstance(scheduler, (str, type, type(None))):
            self.scheduler: Any = scheduler
        else:
            found = scheduler_class(scheduler or app.conf.beat_scheduler)
            self.scheduler = found(app, max_interval=max_interval, schedule_filename=schedule)
        self.loop = Loop(wall=app.wall)
        #: By how much the wall clock is ahead of the monotonic one.
        self._ahead_s = self.loop.now() - self.loop.mono()
        self._stopping = self._ended = False
        self._commands: Optional[BeatCommands] = None
        #: When the last turn was done.
        self._ticked_mono = self.loop.mono()
        self._thread: Optional[threading.Thread] = None
        #: What ended it, where it ran in a thread.
        self.failure: Optional[BaseException] = None

    def run(self) -> None:
        """Send what is due until `stop`, once; raises what makes that impossible."""
        if self._ended:
            raise RuntimeError("this beat has ended: make a new one")
        _state.set_current_app(self.app)
        signals.beat_init.send(sender=self)
        if self.embedded:
            signals.beat_embedded_init.send(sender=self)
        logger.info("beat: Starting...")
        try:
            if self.app.conf.beat_enable_remote_control:
                self._listen()
            while not self._stopping:
                wait_s = self.scheduler.tick()
                self._ticked_mono = self.loop.mono()
                self._wait(wait_s)
        finally:
            logger.info("beat: Shutting down...")
            self._ended = True
            if self._commands is not None:
                self._commands.close()
            self.scheduler.close()
            self.app.close()
            self.loop.close()

    start = run

    def _listen(self) -> None:
        """Answer pings from now on, or as soon as the broker can be reached."""
        try:
            self._commands = BeatCommands(self.app, self.hostname, self.loop, self._is_well)
            self._commands.start()
        except OperationalError as error:
            logger.debug("beat: pings are not answered yet: %s", error)
            self.loop.call_later(LISTEN_PAUSE_S, self._listen)

    def _is_well(self) -> bool:
        most_s = self.app.conf.beat_remote_control_max_tick_age
        if most_s is None:
            most_s = max(2 * getattr(self.scheduler, "max_interval", MAX_INTERVAL_S), 60.0)
        return self.loop.mono() - self._ticked_mono <= most_s  # type: ignore[no-any-return]

    def stop(self) -> None:
        """End `run` soon."""
        self.loop.call_threadsafe(self._stop)

    def _stop(self) -> None:
        self._stopping = True

    def _wait(self, seconds: float) -> None:
        """Wait; shorter where others changed something, or the clock was set."""
        loop = self.loop
        changed: Callable[[], bool] = getattr(self.scheduler, "changed", lambda: False)
        until_mono = loop.mono() + seconds
        while True:
            loop.run_once(max(0.0, min(until_mono - loop.mono(), LOOK_S)))
            if self._stopping or self._clock_was_set() or loop.mono() >= until_mono:
                return
            try:
                if changed():
                    return
            except OperationalError:
                return  # the next tick comes to the same and says so

    def _clock_was_set(self) -> bool:
        """Say whether the wall clock jumped since the last look; the scheduler is told of a jump back."""
        before_s, self._ahead_s = self._ahead_s, self.loop.now() - self.loop.mono()
        if self._ahead_s - before_s < -CLOCK_SET_S and hasattr(self.scheduler, "clock_was_set_back"):
            self.scheduler.clock_was_set_back()
        return abs(self._ahead_s - before_s) > CLOCK_SET_S

    # -- in a thread

    def __enter__(self) -> "Beat":
        self.start_in_thread()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.join()
        if self.failure is not None:
            raise self.failure

    def start_in_thread(self) -> None:
        """Run in a thread of its own."""
        self._thread = threading.Thread(target=self._run_quietly, name="miniq-beat", daemon=True)
        self._thread.start()

    def _run_quietly(self) -> None:
        try:
            self.run()
        except BaseException as error:  # safety net: a thread cannot raise; whoever looks finds it
            logger.error("beat: ends: %r", error, exc_info=True)
            self.failure = error

    def join(self, timeout_s: float = 10.0) -> None:
        """Stop, and wait for the end."""
        if self._thread is None:
            return
        self.stop()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            warnings.warn(f"beat did not end within {timeout_s:g} s", ResourceWarning, stacklevel=2)


def _read(text: Optional[str]) -> Optional[State]:
    """Return a record, None where there is none or nobody can read it."""
    try:
        return None if text is None else State.read(text)
    except ValueError:
        return None


def scheduler_class(name: Union[str, type]) -> Any:
    """Return the scheduler class called `name`: one of `SCHEDULERS`, an entry point, or a dotted path."""
    found = _found(name) if isinstance(name, str) else name
    if isinstance(found, type) and not hasattr(found, "tick"):
        raise ImproperlyConfigured(
            f"{name!r} is no scheduler: it has no method tick() (see miniq.beat.Scheduler)"
        )
    return found


def _found(name: str) -> Any:
    target = SCHEDULERS.get(name)
    if target is not None:
        return import_object(target, package=__package__)
    if ":" in name or "." in name:
        return import_object(name)
    from importlib import metadata  # slow, and only for schedulers of other packages

    known = set(SCHEDULERS)
    for distribution in metadata.distributions():
        for point in distribution.entry_points:
            if point.group in ENTRY_POINTS:
                if point.name == name:
                    return point.load()
                known.add(point.name)
    hint = nearest(name, known)
    raise ImproperlyConfigured(
        f"unknown scheduler {name!r}{f' (did you mean {hint}?)' if hint else ''};"
        f" known: {', '.join(sorted(known))}"
    )

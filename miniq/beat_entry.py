# SPDX-License-Identifier: MIT
"""What beat knows of a periodic task: the entry (what to send, and when), and its state in the store.

An entry comes from the code (setting `beat_schedule`, `app.add_periodic_task`) or was added at run
time.  Its state is one small JSON record, which every beat reads and replaces by compare-and-set:
two beats that come to the same tick cannot both win.  Everything here is a function of the record
and the clock; nothing is read or sent.

A tick is (name, due moment).  `last_due` is the last one that was dealt with: sent, or left out on
purpose.  The next is always counted from there, so ticks neither drift nor depend on who sends.
"""

from __future__ import annotations

import json
import re
import uuid
from datetime import datetime, tzinfo
from math import isfinite
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

from .exceptions import ImproperlyConfigured
from .schedules import BaseSchedule, describe, from_json, maybe_schedule, schedule, to_json
from .text import nearest, safe_repr, truncate
from .times import UTC

#: What may become of ticks that nobody sent in time, and of one whose last run has not ended.
CATCH_UP = ("once", "skip", "all")
OVERLAP = ("allow", "skip")
#: So many seconds late a tick still counts as in time: whoever takes over from a dead beat is not quicker.
ON_TIME_S = 30.0
#: A clock that was set back by more than this many seconds makes intervals begin anew ...
CLOCK_STEP_S = 60.0
#: ... and by more than this one, all other schedules: it had been wrong before, nobody waits for that.
CLOCK_ERROR_S = 86400.0
#: Due moments that are counted in one step after a long absence.
MOST_STEPS = 1000
#: Never: nothing is due.
NEVER = float("inf")

#: Half a character: no store takes it.
_SURROGATE = re.compile("[\ud800-\udfff]")

_KEYS = (
    "task", "schedule", "args", "kwargs", "options", "relative", "enabled", "catch_up", "overlap",
)  # fmt: skip
_DEFAULTS = {
    "args": (), "kwargs": {}, "options": {}, "relative": False, "enabled": True, "catch_up": "once",
    "overlap": "allow",
}  # fmt: skip


class BeatLazyFunc:
    """An argument that is computed when its task is sent: ``args=(BeatLazyFunc(time.time),)``."""

    def __init__(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._func = func
        self._args = args
        self._kwargs = kwargs

    def __call__(self) -> Any:
        return self.delay()

    def delay(self) -> Any:
        """Compute it."""
        return self._func(*self._args, **self._kwargs)

    def __repr__(self) -> str:
        return f"<BeatLazyFunc {getattr(self._func, '__qualname__', self._func)}>"


class State(NamedTuple):
    """The record of an entry; all moments are epoch seconds."""

    source: str  #: "code", or "added" at run time
    mark: str  #: of the schedule: another one begins anew
    last_due: float  #: the last tick that was dealt with, or when the entry was first seen
    last_run: Optional[float] = None
    runs: int = 0
    last_id: Optional[str] = None  #: task id of the last run
    paused: bool = False
    spec: Optional[Dict[str, Any]] = None  #: the entry as JSON, as far as it can be written so
    #: Where broker and state are two stores: (tick, until when, whose).  Whoever finds it past its time
    #: sends that tick again, under the same id.
    claim: Optional[Tuple[float, float, str]] = None

    def text(self) -> str:
        """Return it as it is stored; equal states have equal texts."""
        values = {key: value for key, value in self._asdict().items() if value is not None}
        return json.dumps(values, separators=(",", ":"))

    def sent(self, due: float, now: float, task_id: str) -> "State":
        """Return what it is once the tick `due` was sent."""
        return self._replace(last_due=due, last_run=now, runs=self.runs + 1, last_id=task_id, claim=None)

    @classmethod
    def read(cls, text: str) -> "State":
        """Return what `text` wrote; `ValueError` where it is no record."""
        try:
            found = json.loads(text)
            state = cls(**{key: value for key, value in found.items() if key in cls._fields})
            claim = state.claim and (float(state.claim[0]), float(state.claim[1]), str(state.claim[2]))
            state = state._replace(
                last_due=float(state.last_due),
                last_run=None if state.last_run is None else float(state.last_run),
                runs=int(state.runs),
                claim=claim,
            )
            if not (isinstance(state.mark, str) and state.source in ("code", "added")):
                raise TypeError("mark or source")
            if not isinstance(state.spec, (dict, type(None))) or not isfinite(state.last_due):
                raise TypeError("spec or last_due")
        except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
            raise ValueError(f"no record of an entry ({error}): {truncate(text, 200)!r}") from None
        return state


class ScheduleEntry:
    """A periodic task: what is sent when, and as far as beat has looked, its state.

    `schedule` is seconds, a timedelta, or a schedule; `catch_up` and `overlap` are words of `CATCH_UP`
    and `OVERLAP`.  Raises `ImproperlyConfigured` naming the entry and what is wrong with it.
    """

    def __init__(
        self,
        name: Optional[str] = None,
        task: Any = None,
        last_run_at: Optional[datetime] = None,
        total_run_count: Optional[int] = None,
        schedule: Any = None,
        args: Any = (),
        kwargs: Optional[Mapping[str, Any]] = None,
        options: Optional[Mapping[str, Any]] = None,
        relative: bool = False,
        app: Any = None,
        enabled: bool = True,
        catch_up: str = "once",
        overlap: str = "allow",
    ) -> None:
        self.task = task if isinstance(task, str) else getattr(task, "name", task)
        self.name = name or str(self.task)
        if not isinstance(self.name, str) or _SURROGATE.search(self.name):
            raise ImproperlyConfigured(
                f"the name of a periodic task must be text, not {safe_repr(self.name, 100)}"
            )
        self.app = app
        self.args = args or ()
        for key, value in (("kwargs", kwargs), ("options", options)):
            if value is not None and not isinstance(value, Mapping):
                raise ImproperlyConfigured(
                    f"periodic task {name!r}: {key} must be a dict, not {safe_repr(value, 100)}"
                )
        self.kwargs = dict(kwargs or {})
        self.options = dict(options or {})
        self.relative = relative
        self.enabled = enabled
        self.catch_up = catch_up
        self.overlap = overlap
        if not isinstance(self.task, str) or not self.task:
            raise self._wrong(f"task must be a task or its name, not {safe_repr(task, 100)}")
        if not isinstance(self.args, (list, tuple)) and not isinstance(self.args, BeatLazyFunc):
            raise self._wrong(f"args must be a list or tuple, not {safe_repr(args, 100)}")
        if not isinstance(enabled, bool):
            raise self._wrong(f"enabled must be True or False, not {safe_repr(enabled, 100)}")
        for key, words in (("catch_up", CATCH_UP), ("overlap", OVERLAP)):
            if getattr(self, key) not in words:
                raise self._wrong(f"{key} must be one of {', '.join(words)}, not {getattr(self, key)!r}")
        try:
            self.schedule: BaseSchedule = maybe_schedule(schedule, relative, app)
        except (TypeError, ValueError) as error:
            raise self._wrong(f"schedule: {error}") from error
        if not isinstance(self.schedule, BaseSchedule):
            raise self._wrong(
                f"schedule must be seconds, a timedelta or a schedule, not {safe_repr(schedule, 100)}"
            )
        self.mark = _mark(self.schedule) + ("" if enabled else " (off)")
        #: The record as it was read last, its text, and when there is something to do for it.
        last_run = None if last_run_at is None else last_run_at.timestamp()
        self.state = State("code", self.mark, 0.0, last_run, total_run_count or 0)
        self.text: Optional[str] = None
        self.due = NEVER

    @classmethod
    def from_dict(cls, name: str, values: Any, app: Any) -> "ScheduleEntry":
        """Return the entry that a dict of the setting `beat_schedule` describes."""
        if isinstance(values, ScheduleEntry):
            return values
        if not isinstance(values, Mapping):
            raise ImproperlyConfigured(
                f"periodic task {name!r}: expected a dict, not {safe_repr(values, 100)}"
            )
        for key in values:
            if key not in _KEYS:
                hint = nearest(str(key), _KEYS)
                raise ImproperlyConfigured(
                    f"periodic task {name!r}: unknown key {key!r}"
                    + (f", did you mean {hint!r}?" if hint else "")
                )
        if "schedule" not in values or "task" not in values:
            raise ImproperlyConfigured(f"periodic task {name!r} needs both a task and a schedule")
        return cls(name=name, app=app, **values)

    @classmethod
    def from_spec(cls, name: str, spec: Mapping[str, Any], app: Any) -> "ScheduleEntry":
        """Return the entry that was stored; raises as the constructor, or `ValueError`."""
        return cls.from_dict(name, {**spec, "schedule": from_json(spec.get("schedule"))}, app)

    def spec(self) -> Dict[str, Any]:
        """Return the entry as JSON values; `ValueError` where something in it cannot be written so."""
        values = {key: getattr(self, key) for key in _KEYS if getattr(self, key) != _DEFAULTS.get(key)}
        values["schedule"] = to_json(self.schedule)
        try:
            found: Dict[str, Any] = json.loads(json.dumps(values))
        except (TypeError, ValueError) as error:
            raise ValueError(f"periodic task {self.name!r} cannot be written as JSON: {error}") from None
        return found

    def take(self, state: State, text: Optional[str]) -> None:
        """Note the record as it is in the store now."""
        self.state, self.text = state, text

    def next_due(self, after: float, zone: tzinfo) -> float:
        """Return the first tick after `after`; `NEVER` where there is none."""
        due = self.schedule.next_due(after, zone)
        if due is None:
            return NEVER
        if not due > after:
            raise self._wrong(
                f"its schedule gave {due!r} as the next tick after {after!r}: it does not move on"
            )
        return due

    def ticks(self, now: float, zone: tzinfo, most: int = MOST_STEPS) -> Tuple[List[float], float]:
        """Return the ticks after `last_due` up to `now`, at most `most`, and the one after these."""
        found: List[float] = []
        due = self.next_due(self.state.last_due, zone)
        while due <= now and len(found) < most:
            found.append(due)
            due = self.next_due(due, zone)
        return found, due

    def is_from_the_future(self, now: float, ahead_s: float = CLOCK_STEP_S) -> bool:
        """Say whether the clock was set back and the entry must begin anew.

        That is so for an interval whose last tick is more than `ahead_s` in the future.  For what is due
        at hours and days it is not before a whole day: those that come again were sent already.
        """
        state = self.state
        if state.paused or state.claim is not None:
            return False
        if not isinstance(self.schedule, schedule) or self.schedule.relative:
            ahead_s = CLOCK_ERROR_S
        return state.last_due - now > ahead_s

    def call(self) -> Tuple[List[Any], Dict[str, Any], Dict[str, Any]]:
        """Return args, kwargs and options of the next run; what is lazy is computed."""
        args = self.args() if isinstance(self.args, BeatLazyFunc) else self.args
        headers = {**(self.options.get("headers") or {}), "celery_beat_task": True}
        return (
            [_computed(arg) for arg in args],
            {key: _computed(value) for key, value in self.kwargs.items()},
            {**self.options, "headers": headers},
        )

    @property
    def last_run_at(self) -> Optional[datetime]:
        """When it was sent last; None = never."""
        run = self.state.last_run
        return None if run is None else datetime.fromtimestamp(run, self.app.zone if self.app else UTC)

    @property
    def total_run_count(self) -> int:
        """How often it was sent."""
        return self.state.runs

    def _wrong(self, what: str) -> ImproperlyConfigured:
        return ImproperlyConfigured(f"periodic task {self.name!r}: {what}")

    def __repr__(self) -> str:
        return f"<ScheduleEntry {self.name}: {self.task}, {describe(self.schedule)}>"


def tick_id(main: Optional[str], name: str, due: float) -> str:
    """Return the task id of a tick: the same whoever sends it, and however often."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"tick\n{main or ''}\n{name}\n{due!r}"))


def _computed(value: Any) -> Any:
    return value() if isinstance(value, BeatLazyFunc) else value


def _mark(found: BaseSchedule) -> str:
    """Return text that is equal for equal schedules, also in another process."""
    try:
        return json.dumps(to_json(found), separators=(",", ":"))
    except (TypeError, ValueError):  # a class of the user's
        text = repr(found)
        kind = type(found)
        return f"{kind.__module__}.{kind.__qualname__}" if " at 0x" in text else text

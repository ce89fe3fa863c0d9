# SPDX-License-Identifier: MIT
"""When periodic tasks are due: `schedule` (intervals), `crontab` and `solar`.

A schedule is a pure function: `next_due(after, zone)` gives the first due moment after another one.
All else follows from it, Celery's ``is_due()`` too.  The clock is asked by ``is_due()`` and
``remaining_estimate()`` only, through ``nowfun``, or else the app.  An object may be shared by threads.

Source: Celery's schedules (names, arguments, texts shown); the rule for changes of the clock is our own.
"""

from __future__ import annotations

from datetime import datetime, timedelta, tzinfo
from math import floor, isfinite
from typing import Any, Callable, ClassVar, Dict, NamedTuple, Optional, Set, Tuple, Union

from .cron import (
    DAY_OF_MONTH,
    DAY_OF_WEEK,
    HOUR,
    MINUTE,
    MONTH_OF_YEAR,
    Cronspec,
    ParseException,
    Pattern,
    expand,
    field_text,
)
from .sun import next_noon, next_passing
from .text import nearest, truncate
from .times import UTC, now_utc
from .wallclock import DAY_S, first_shown, offset_s

__all__ = [
    "BaseSchedule", "ParseException", "crontab", "describe", "from_json", "maybe_schedule",
    "schedstate", "schedule", "solar", "to_json",
]  # fmt: skip

#: What waits between two looks at a schedule that only its own `is_due` knows (seconds, at least).
_MIN_POLL_S = 0.001
#: Longer ones go past the last year that a datetime can name (seconds).
_MAX_INTERVAL_S = 1e11
#: 9999-12-30 (epoch seconds): what would be due later never is.
_LAST_MOMENT = 253402128000


class schedstate(NamedTuple):
    """Whether a task is due, and after how many seconds to look again."""

    is_due: bool
    next: float


class BaseSchedule:
    """What all schedules have in common.

    A subclass defines `next_due`, or, as in Celery, `is_due` (and `remaining_estimate`).  `nowfun`
    returns the present moment, aware or in UTC; the default is the clock of `app`, or the real one.
    """

    #: True if only `is_due` knows when: then `next_due` depends on the clock and is an estimate, at
    #: which `is_due` must be asked again.
    polled: ClassVar[bool] = False

    def __init__(self, nowfun: Optional[Callable[[], datetime]] = None, app: Any = None) -> None:
        self.nowfun = nowfun
        self.app = app

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "next_due" in own or "_next" in own:
            cls.polled = False
        elif "is_due" in own or "remaining_estimate" in own:
            cls.polled = True

    def next_due(self, after: float, zone: tzinfo) -> Optional[float]:
        """Return the first due moment strictly after `after` (epoch seconds); None = never again.

        Wall times are those of `zone`.
        """
        if not self.polled:
            return self._next(after, zone)
        due, next_s = self.is_due(datetime.fromtimestamp(after, zone))
        now = self.maybe_make_aware(self.now()).timestamp()
        return max(now if due else now + next_s, after + _MIN_POLL_S)

    def _next(self, after: float, zone: tzinfo) -> Optional[float]:
        raise NotImplementedError(f"{type(self).__name__} must define next_due() or is_due()")

    def is_due(self, last_run_at: datetime) -> schedstate:
        """Say whether a task that ran at `last_run_at` is due now, and after how many seconds to look again.

        A naive datetime is in UTC.
        """
        remaining_s = self.remaining_estimate(last_run_at).total_seconds()
        if remaining_s > 0:
            return schedstate(False, remaining_s)
        return schedstate(True, max(self.remaining_estimate(self.now()).total_seconds(), 0.0))

    def remaining_estimate(self, last_run_at: datetime) -> timedelta:
        """Return how long it is until a task that ran at `last_run_at` is due, negative if it is overdue.

        `timedelta.max` stands for never again.
        """
        find = self._next if self.polled else self.next_due
        due = find(self.maybe_make_aware(last_run_at).timestamp(), self.tz)
        if due is None:
            return timedelta.max
        return timedelta(seconds=due - self.maybe_make_aware(self.now()).timestamp())

    def now(self) -> datetime:
        """Return the present moment."""
        if self.nowfun is not None:
            return self.nowfun()
        return now_utc() if self.app is None else self.app.now()

    @property
    def tz(self) -> tzinfo:
        """The time zone of the app, UTC without one."""
        return UTC if self.app is None else self.app.zone

    def maybe_make_aware(self, dt: datetime, naive_as_utc: bool = True) -> datetime:
        """Return `dt` with a time zone: a naive one is in UTC, or else in the app's zone."""
        if dt.utcoffset() is not None:
            return dt
        return dt.replace(tzinfo=UTC if naive_as_utc else self.tz)

    def to_local(self, dt: datetime) -> datetime:
        """Return `dt` in the app's time zone."""
        return self.maybe_make_aware(dt).astimezone(self.tz)


class schedule(BaseSchedule):
    """Due again and again after `run_every` (seconds or a timedelta).

    With `relative` a moment is moved back to the last whole day, hour, minute or second by the wall
    clock, whichever is the greatest unit not longer than the interval: every two hours is due at 10:00 and
    12:00, and every day at midnight.  Raises `TypeError` or `ValueError` for what is no positive time.
    """

    def __init__(
        self,
        run_every: Union[float, timedelta, None] = None,
        relative: bool = False,
        nowfun: Optional[Callable[[], datetime]] = None,
        app: Any = None,
    ) -> None:
        if not isinstance(run_every, timedelta):
            seconds = _number(run_every, "an interval", "seconds or a timedelta")
            if abs(seconds) > _MAX_INTERVAL_S:
                raise ValueError(f"an interval must be shorter than {_MAX_INTERVAL_S:g} s, not {seconds:g} s")
            run_every = timedelta(seconds=seconds)
        if run_every <= timedelta(0):
            raise ValueError(f"an interval must be longer than 0 s, not {run_every.total_seconds():g} s")
        self.run_every = run_every
        self.relative = relative
        super().__init__(nowfun=nowfun, app=app)

    @property
    def seconds(self) -> float:
        """The interval in seconds."""
        return self.run_every.total_seconds()

    @property
    def human_seconds(self) -> str:
        """The interval as Celery shows it."""
        seconds = round(self.seconds, 2)
        for unit, unit_s in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
            if seconds >= unit_s:
                return f"{seconds / unit_s:.2f} {unit}{'' if seconds == unit_s else 's'}"
        return "now"

    def _next(self, after: float, zone: tzinfo) -> Optional[float]:
        seconds = self.seconds
        end = after + seconds
        if end > _LAST_MOMENT:
            return None
        if not self.relative:
            return end
        if seconds >= DAY_S:
            midnight = floor((end + offset_s(after, zone)) / DAY_S) * DAY_S
            due = first_shown(midnight, zone)
            # That midnight may have been shown, and be shown again as the clock was put back since.
            return due if due > after else first_shown(midnight + DAY_S, zone)
        unit_s = 3600 if seconds >= 3600 else 60 if seconds >= 60 else 1
        offset = offset_s(end, zone)
        due = floor((end + offset) / unit_s) * unit_s - offset
        return due if due > after else end

    def __repr__(self) -> str:
        return f"<freq: {self.human_seconds}>"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, schedule):
            return self.run_every == other.run_every and self.relative == other.relative
        return self.run_every == other

    def __hash__(self) -> int:
        return hash(self.run_every)

    def __reduce__(self) -> Tuple[Any, ...]:
        return self.__class__, (self.run_every, self.relative, self.nowfun)


class crontab(BaseSchedule):
    """Due whenever the wall clock agrees with all five fields.

    A field is a number, text, or several of them in a list or set.  Text has parts between commas: a number
    or name (``mon``, ``january``), a range (``8-17``; one like ``fri-mon`` goes on from the beginning), ``*``
    for all, each but single numbers with a step if wanted (``*/15``).  Sunday is 0.

    The days on which a zone changes its clock:

    - When all 24 hours are wanted (``*``), what counts is time that really passes: an hour that is repeated
      counts twice, one that is left out not at all.
    - Otherwise a wall time is due once, when the clock first shows it or is put forward past it: in an hour
      that is repeated the first time; those of an hour that is left out are due as one, right after it.

    Raises `ParseException` (a `ValueError`) for text that cannot be read, `ValueError` for a number out of
    range or a date that never comes, like the 30th of February, and `TypeError` for other objects.
    """

    def __init__(
        self,
        minute: Cronspec = "*",
        hour: Cronspec = "*",
        day_of_week: Cronspec = "*",
        day_of_month: Cronspec = "*",
        month_of_year: Cronspec = "*",
        nowfun: Optional[Callable[[], datetime]] = None,
        app: Any = None,
    ) -> None:
        self.minute = expand(minute, MINUTE)
        self.hour = expand(hour, HOUR)
        self.day_of_week = expand(day_of_week, DAY_OF_WEEK)
        self.day_of_month = expand(day_of_month, DAY_OF_MONTH)
        self.month_of_year = expand(month_of_year, MONTH_OF_YEAR)
        specs = minute, hour, day_of_week, day_of_month, month_of_year
        #: Text of the fields, as it was written where it was text, in the order of the arguments.
        self.texts = tuple(map(field_text, specs, self._fields))
        self._pattern = Pattern(*self._fields)
        if not self._pattern.ever:
            raise ValueError(
                f"Invalid crontab: day_of_month {self.texts[3]!r} never occurs"
                f" in month_of_year {self.texts[4]!r}"
            )
        super().__init__(nowfun=nowfun, app=app)

    @classmethod
    def from_string(cls, crontab: str) -> "crontab":
        """Return the crontab written as ``minute hour day-of-month month-of-year day-of-week``."""
        parts = crontab.split()
        if len(parts) != 5:
            raise ParseException(
                f"crontab {truncate(repr(crontab), 100)} has {len(parts)} fields, not the five"
                " 'minute hour day-of-month month-of-year day-of-week'"
            )
        minute, hour, day_of_month, month_of_year, day_of_week = parts
        return cls(minute, hour, day_of_week, day_of_month, month_of_year)

    @property
    def _fields(self) -> Tuple[Set[int], Set[int], Set[int], Set[int], Set[int]]:
        return self.minute, self.hour, self.day_of_week, self.day_of_month, self.month_of_year

    def _next(self, after: float, zone: tzinfo) -> Optional[float]:
        return self._pattern.next_due(after, zone)

    @property
    def text(self) -> str:
        """The fields as `from_string` reads them."""
        minute, hour, day_of_week, day_of_month, month_of_year = self.texts
        return f"{minute} {hour} {day_of_month} {month_of_year} {day_of_week}"

    def __repr__(self) -> str:
        return f"<crontab: {self.text} (m/h/dM/MY/d)>"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, crontab):
            return self._fields == other._fields and self.nowfun == other.nowfun
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(map(frozenset, self._fields)))

    def __reduce__(self) -> Tuple[Any, ...]:
        return self.__class__, self.texts, {"nowfun": self.nowfun}


class _Event(NamedTuple):
    """What a solar event is: the sun's centre passes a height (degrees; None = stands highest)."""

    height: Optional[float]
    rising: bool = False


#: The air lifts the sun by 34' at the horizon, and its upper edge is 16' above its centre.
_EDGE = -(34 + 16) / 60
_EVENTS = {
    "dawn_astronomical": _Event(-18, True),
    "dawn_nautical": _Event(-12, True),
    "dawn_civil": _Event(-6, True),
    "sunrise": _Event(_EDGE, True),
    "solar_noon": _Event(None),
    "sunset": _Event(_EDGE),
    "dusk_civil": _Event(-6),
    "dusk_nautical": _Event(-12),
    "dusk_astronomical": _Event(-18),
}


class solar(BaseSchedule):
    """Due at an event of the sun, at a place given in degrees (north and east are positive).

    Events: ``dawn_astronomical`` (the sun 18 degrees below the horizon), ``dawn_nautical`` (12),
    ``dawn_civil`` (6), ``sunrise``, ``solar_noon``, ``sunset``, ``dusk_civil``, ``dusk_nautical`` and
    ``dusk_astronomical``.  Days on which it does not happen, in polar day and night, are left out.

    Raises `ValueError` or `TypeError` for an unknown event or a place that does not exist.
    """

    def __init__(
        self,
        event: str,
        lat: float,
        lon: float,
        nowfun: Optional[Callable[[], datetime]] = None,
        app: Any = None,
    ) -> None:
        known = _EVENTS.get(event)
        if known is None:
            hint = nearest(str(event), _EVENTS)
            raise ValueError(
                f"Argument event {truncate(repr(event), 100)} is invalid"
                + (f" (did you mean {hint}?)" if hint else "")
                + f", must be one of {', '.join(sorted(_EVENTS))}."
            )
        _number(lat, "latitude", "degrees")
        _number(lon, "longitude", "degrees")
        if not -90 <= lat <= 90:
            raise ValueError(f"Argument latitude {lat} is invalid, must be between -90 and 90.")
        if not -180 <= lon <= 180:
            raise ValueError(f"Argument longitude {lon} is invalid, must be between -180 and 180.")
        self.event = event
        self.lat = lat
        self.lon = lon
        self._known = known
        super().__init__(nowfun=nowfun, app=app)

    def _next(self, after: float, zone: tzinfo) -> Optional[float]:
        height, rising = self._known
        if height is None:
            return next_noon(after, self.lon)
        return next_passing(after, self.lat, self.lon, height, rising)

    def __repr__(self) -> str:
        return f"<solar: {self.event} at latitude {self.lat}, longitude: {self.lon}>"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, solar):
            return (self.event, self.lat, self.lon) == (other.event, other.lat, other.lon)
        return NotImplemented

    def __hash__(self) -> int:
        return hash((self.event, self.lat, self.lon))

    def __reduce__(self) -> Tuple[Any, ...]:
        return self.__class__, (self.event, self.lat, self.lon), {"nowfun": self.nowfun}


def _number(value: object, what: str, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what} must be a number ({expected}), not {truncate(repr(value), 100)}")
    if not isfinite(value):
        raise ValueError(f"{what} must be a number ({expected}), not {value}")
    return value


# -- from what users write, to and from what is stored -------------------------------------------


def maybe_schedule(
    s: Union[float, timedelta, BaseSchedule], relative: bool = False, app: Any = None
) -> BaseSchedule:
    """Return the schedule for a number of seconds, a timedelta, or a schedule itself.

    `relative` is for the first two.  Raises `TypeError` for anything else.
    """
    if isinstance(s, BaseSchedule):
        if app is not None:
            s.app = app
        return s
    if isinstance(s, (int, float, timedelta)) and not isinstance(s, bool):
        return schedule(s, relative, app=app)
    hint = "; the text of a crontab goes through crontab.from_string()" if isinstance(s, str) else ""
    raise TypeError(
        "a schedule must be a number of seconds, a timedelta, a crontab, a solar or another BaseSchedule,"
        f" not {truncate(repr(s), 100)}{hint}"
    )


def to_json(s: BaseSchedule) -> Dict[str, Any]:
    """Return a schedule as a dict for JSON; `from_json` reads it.

    ``{"type": "interval", "every_s", "relative"}``, ``{"type": "crontab"}`` with the text of the five fields
    by their names, or ``{"type": "solar", "event", "lat", "lon"}``.  Raises `TypeError` for any other class,
    subclasses included: what they do is not known here.
    """
    if type(s) is schedule:
        return {"type": "interval", "every_s": s.seconds, "relative": s.relative}
    if type(s) is crontab:
        return {"type": "crontab", **dict(zip(_FIELD_NAMES, s.texts))}
    if type(s) is solar:
        return {"type": "solar", "event": s.event, "lat": s.lat, "lon": s.lon}
    raise TypeError(f"only intervals, crontab and solar can be stored, not {truncate(repr(s), 100)}")


_FIELD_NAMES = tuple(field.name for field in (MINUTE, HOUR, DAY_OF_WEEK, DAY_OF_MONTH, MONTH_OF_YEAR))


def from_json(value: Any, app: Any = None) -> BaseSchedule:
    """Return the schedule that `to_json` wrote.

    Raises `ValueError` naming the value for anything else.
    """
    try:
        kind = value["type"]
        if kind == "interval":
            return schedule(value["every_s"], bool(value.get("relative")), app=app)
        if kind == "crontab":
            return crontab(**{name: value[name] for name in _FIELD_NAMES}, app=app)
        if kind == "solar":
            return solar(value["event"], value["lat"], value["lon"], app=app)
        raise ValueError("its type is unknown")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"not a stored schedule: {truncate(repr(value), 200)} ({type(error).__name__}: {error})"
        ) from error


def describe(s: BaseSchedule) -> str:
    """Return a schedule as short text for people, for lists."""
    if type(s) is schedule:
        text = f"every {_duration(s.seconds)}"
        return f"{text} by the clock" if s.relative else text
    if type(s) is crontab:
        return f"crontab {s.text}"
    if type(s) is solar:
        north_south = f"{abs(s.lat):g} {'S' if s.lat < 0 else 'N'}"
        east_west = f"{abs(s.lon):g} {'W' if s.lon < 0 else 'E'}"
        return f"{s.event} at {north_south}, {east_west}"
    return truncate(repr(s), 100)


def _duration(seconds: float) -> str:
    """Return a duration in the greatest unit of which it is a whole number."""
    for unit, unit_s in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds % unit_s == 0:
            return f"{seconds / unit_s:.0f} {unit}s" if seconds != unit_s else unit
    return f"{seconds:g} seconds" if seconds != 1 else "second"

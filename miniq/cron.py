# SPDX-License-Identifier: MIT
"""The five fields of a crontab: their text, the wall times they name, and when these come.

A field becomes a set of numbers once, at construction; a search then goes field by field, from years
down to minutes, and looks at a time zone only where it has found something.  It takes microseconds,
however far away the next date is.

Source: Celery's crontab: its names, ranges that wrap around, and that all fields must agree, where
cron asks for either of the two fields of days.
"""

from __future__ import annotations

from bisect import bisect_left
from datetime import MAXYEAR, date, tzinfo
from math import ceil, floor
from typing import AbstractSet, Iterable, List, NamedTuple, Optional, Set, Tuple, Union

from .text import truncate
from .wallclock import DAY_S, EPOCH_DAY, change_between, first_shown, furthest_shown, offset_s

#: What users may write in a field.
Cronspec = Union[int, str, Iterable[Union[int, str]]]

#: The 29th of February falls on a given weekday every 28 years, or 40 across a year like 2100.
_MAX_YEARS = 40
_MINUTES_PER_DAY = 1440
_LONGEST = (0, 31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


class ParseException(ValueError):
    """The text of a crontab's field cannot be read; the message names the field and the text."""


class Field(NamedTuple):
    """One of the five fields; `words` are names of its numbers, the first one of `low`."""

    name: str
    low: int
    high: int
    words: Tuple[str, ...] = ()


MINUTE = Field("minute", 0, 59)
HOUR = Field("hour", 0, 23)
DAY_OF_WEEK = Field(
    "day_of_week", 0, 6, ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
)
DAY_OF_MONTH = Field("day_of_month", 1, 31)
MONTH_OF_YEAR = Field(
    "month_of_year", 1, 12,
    ("january", "february", "march", "april", "may", "june", "july",
     "august", "september", "october", "november", "december"),
)  # fmt: skip


# -- text to numbers -----------------------------------------------------------------------------


def expand(spec: Cronspec, field: Field) -> Set[int]:
    """Return the numbers that a field stands for.

    Raises `ParseException` for text that cannot be read, `ValueError` for a number that is out of range
    or no number at all, `TypeError` for what is neither text nor numbers.
    """
    if isinstance(spec, str):
        return _expand_text(spec, field)
    if isinstance(spec, int):
        return {_checked(spec, spec, field)}
    if not isinstance(spec, Iterable):
        raise TypeError(_not_a_field(spec, field))
    numbers: Set[int] = set()
    for item in spec:
        if not isinstance(item, (int, str)):
            raise TypeError(_not_a_field(item, field))
        numbers |= expand(item, field)
    if not numbers:
        raise ValueError(f"crontab: {field.name} is empty, so it would never be due; '*' means all")
    return numbers


def _not_a_field(value: object, field: Field) -> str:
    return (
        f"crontab: {field.name} must be an int, text like '*/15' or several of them,"
        f" not {truncate(repr(value), 100)}"
    )


def _expand_text(text: str, field: Field) -> Set[int]:
    numbers: Set[int] = set()
    for part in text.split(","):
        numbers.update(_expand_part(part.strip(), text, field))
    return numbers


def _expand_part(part: str, text: str, field: Field) -> List[int]:
    span, slash, step = part.partition("/")
    first, dash, last = span.partition("-")
    if not span:
        raise _unreadable(text, field, "a part is empty")
    if span == "*":
        numbers = list(range(field.low, field.high + 1))
    else:
        start = _number(first, text, field)
        if not dash:
            if slash:
                raise _unreadable(text, field, f"a step needs a range, like {start}-{field.high}/{step}")
            return [start]
        end = _number(last, text, field)
        numbers = list(range(start, end + 1))
        if end < start:  # past the end and on from the beginning
            numbers = [*range(start, field.high + 1), *range(field.low, end + 1)]
    if not slash:
        return numbers
    if not (step.isascii() and step.isdigit() and int(step)):
        raise _unreadable(text, field, f"the step must be a number from 1, not {truncate(step, 20)!r}")
    return numbers[:: int(step)]


def _number(word: str, text: str, field: Field) -> int:
    if word.isascii() and word.isdigit() and len(word) < 10:
        return _checked(int(word), text, field)
    lower = word.lower()
    if len(lower) >= 3:
        for number, name in enumerate(field.words, field.low):
            if name.startswith(lower):
                return number
    names = f" or a name like {field.words[0][:3]!r}" if field.words else ""
    raise _unreadable(
        text, field, f"{truncate(word, 20)!r} is not a number from {field.low} to {field.high}{names}"
    )


def _checked(number: int, spec: Union[int, str], field: Field) -> int:
    if field.low <= number <= field.high:
        return number
    sunday = "; Sunday is 0" if field is DAY_OF_WEEK and number == 7 else ""
    kind = ParseException if isinstance(spec, str) else ValueError
    raise kind(
        f"crontab: {field.name} {truncate(repr(spec), 100)} is out of range:"
        f" {number} is not from {field.low} to {field.high}{sunday}"
    )


def _unreadable(text: str, field: Field, why: str) -> ParseException:
    return ParseException(f"crontab: {field.name} {truncate(repr(text), 100)} cannot be read: {why}")


def field_text(spec: Cronspec, numbers: AbstractSet[int]) -> str:
    """Return a field as text: what was written, or the numbers it stands for."""
    return "".join(spec.split()) if isinstance(spec, str) else ",".join(map(str, sorted(numbers)))


# -- numbers to moments --------------------------------------------------------------------------


class Pattern:
    """The wall times on which five sets of numbers agree."""

    __slots__ = ("_minutes", "_hours", "_weekdays", "_days", "_months")

    def __init__(
        self,
        minutes: AbstractSet[int],
        hours: AbstractSet[int],
        weekdays: AbstractSet[int],
        days: AbstractSet[int],
        months: AbstractSet[int],
    ) -> None:
        self._minutes = sorted(minutes)
        self._hours = sorted(hours)
        self._weekdays = frozenset(weekdays)
        self._days = sorted(days)
        self._months = sorted(months)

    @property
    def ever(self) -> bool:
        """False if no month has one of these days."""
        return any(self._days[0] <= _LONGEST[month] for month in self._months)

    def next_due(self, after: float, zone: tzinfo) -> Optional[float]:
        """Return the first moment after `after`, by the rule of `schedules.crontab`; None = never again."""
        if len(self._hours) == 24:
            return self._next_real(after, zone)
        wall, shown = furthest_shown(after, zone)
        minute = self._next_wall(floor(wall / 60) + 1 if shown else ceil(wall / 60))
        return None if minute is None else first_shown(minute * 60, zone)

    def _next_real(self, after: float, zone: tzinfo) -> Optional[float]:
        """Return the first moment after `after` at which the clock shows what is wanted, again or not."""
        moment, later = after, True
        while True:  # once for each change of the clock near the two ends, at most a few times
            offset = offset_s(moment, zone)
            wall = (moment + offset) / 60
            minute = self._next_wall(floor(wall) + 1 if later else ceil(wall))
            if minute is None:
                return None
            due = minute * 60 - offset
            known = min(due, moment + DAY_S)
            later = False
            if offset_s(known, zone) != offset:
                moment = change_between(moment, known, zone)
            elif known == due:
                return due
            else:
                # Nothing is due in the days between, whatever the clock is put back or forward there.
                moment = max(known, due - 2 * DAY_S)

    def _next_wall(self, minute: int) -> Optional[int]:
        """Return the first wall time from `minute` on; both are minutes since 1970."""
        day, of_day = divmod(minute, _MINUTES_PER_DAY)
        first = self._next_day(day)
        if first == day:
            found = self._next_in_day(of_day)
            if found is not None:
                return day * _MINUTES_PER_DAY + found
            first = self._next_day(day + 1)
        return None if first is None else first * _MINUTES_PER_DAY + self._hours[0] * 60 + self._minutes[0]

    def _next_in_day(self, of_day: int) -> Optional[int]:
        hour, minute = divmod(of_day, 60)
        at = bisect_left(self._hours, hour)
        if at < len(self._hours) and self._hours[at] == hour:
            found = bisect_left(self._minutes, minute)
            if found < len(self._minutes):
                return hour * 60 + self._minutes[found]
            at += 1
        return self._hours[at] * 60 + self._minutes[0] if at < len(self._hours) else None

    def _next_day(self, day: int) -> Optional[int]:
        """Return the first day from `day` on; both are days since 1970."""
        start = date.fromordinal(day + EPOCH_DAY)
        for year in range(start.year, min(start.year + _MAX_YEARS, MAXYEAR) + 1):
            for month in self._months:
                if year == start.year and month < start.month:
                    continue
                last = _LONGEST[month]
                if month == 2 and (year % 4 or (not year % 100 and year % 400)):
                    last = 28
                eve = date(year, month, 1).toordinal() - 1
                earliest = start.day if (year, month) == (start.year, start.month) else 1
                for number in self._days[bisect_left(self._days, earliest) :]:
                    if number > last:
                        break
                    if (eve + number) % 7 in self._weekdays:  # ordinal 7 is a Sunday
                        return eve + number - EPOCH_DAY
        return None

# SPDX-License-Identifier: MIT
"""Crontabs where clocks are changed, against a scan of every minute.

The scan knows nothing of how `next_due` finds its moments: it reads the wall clock of each minute, and
writes down what is wanted by the rule that `schedules.crontab` states.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

import pytest
from test_times import needs_zones

from miniq.schedules import crontab
from miniq.times import UTC

MINUTE_S = 60
DAY_S = 86400
FIRST, LAST = (int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) for year in (2024, 2031))
ODD_ZONES = (
    "Australia/Lord_Howe", "Pacific/Chatham", "Antarctica/Troll", "Africa/Casablanca", "America/Santiago",
    "Africa/El_Aaiun",
)  # fmt: skip
EVERY_WEEKDAY, EVERY_DAY, EVERY_MONTH = set(range(7)), set(range(1, 32)), set(range(1, 13))


class Fields(NamedTuple):
    """What a crontab wants, written out."""

    minutes: Set[int]
    hours: Set[int] = set(range(24))  # noqa: RUF012 - never changed
    weekdays: Set[int] = EVERY_WEEKDAY
    days: Set[int] = EVERY_DAY
    months: Set[int] = EVERY_MONTH

    def want(self, wall: datetime) -> bool:
        return (
            wall.minute in self.minutes
            and wall.hour in self.hours
            and wall.day in self.days
            and wall.month in self.months
            and wall.isoweekday() % 7 in self.weekdays
        )

    def crontab(self) -> crontab:
        return crontab(self.minutes, self.hours, self.weekdays, self.days, self.months)


FIXED = (
    Fields({0}),
    Fields({15, 45}),
    Fields({0}, {0}),
    Fields({30}, {2}),
    Fields({0, 10, 20, 30, 40, 50}, {0, 1, 2, 3}),
    Fields(set(range(60)), {23, 0, 1}),
    Fields({5}, set(range(24)), {0}),
)


def some_fields(rand: random.Random) -> Fields:
    def some(low: int, high: int, most: int) -> Set[int]:
        return set(rand.sample(range(low, high + 1), rand.randint(1, most)))

    return Fields(
        some(0, 59, 4),
        rand.choice([set(range(24)), set(range(24)), some(0, 23, 5), {0, 1, 2, 3, 4}]),
        rand.choice([EVERY_WEEKDAY, some(0, 6, 4)]),
        rand.choice([EVERY_DAY, some(1, 31, 20)]),
        EVERY_MONTH,
    )


class Scan:
    """Each minute from `first` to `last`: what the clock shows, and which wall times it shows first.

    In the day before `first` the clock must not have been changed.
    """

    def __init__(self, zone: tzinfo, first: int, last: int) -> None:
        self.zone = zone
        self.minutes = range(first, last, MINUTE_S)
        # Of one zone: these are compared, and added to, as what a clock shows.
        self.walls = [datetime.fromtimestamp(minute, zone) for minute in self.minutes]
        #: (moment, wall time) in order: those left out are shown at the minute after them.
        self.firsts: List[Tuple[int, datetime]] = []
        step = timedelta(minutes=1)
        mark = self.walls[0] - step
        for minute, wall in zip(self.minutes, self.walls):
            while mark < wall:
                mark += step
                self.firsts.append((minute, mark))

        #: Other moments to begin at.
        self.afters: List[float] = []

    def due(self, fields: Fields) -> List[int]:
        want = fields.want
        if len(fields.hours) == 24:
            return [minute for minute, wall in zip(self.minutes, self.walls) if want(wall)]
        return sorted({minute for minute, wall in self.firsts if want(wall)})

    def check(self, fields: Fields, note: object) -> int:
        expected = self.due(fields)
        due = fields.crontab()
        found = list(moments(due, self.zone, self.minutes[0] - 1, self.minutes[-1]))
        assert found == expected, (
            f"{self.zone}, {fields}, {note}:"
            f" too many {texts(set(found) - set(expected), self.zone)},"
            f" missing {texts(set(expected) - set(found), self.zone)}"
        )
        for after in self.afters:
            later = expected[bisect_right(expected, after) :]
            if later:
                assert due.next_due(after, self.zone) == later[0], (self.zone, fields, after, note)
        return len(expected)


def moments(due: crontab, zone: tzinfo, after: float, last: float) -> Iterator[float]:
    while True:
        found = due.next_due(after, zone)
        if found is None or found > last:
            return
        assert found > after, f"{due!r}, {zone}: {found} is not after {after}"
        yield found
        after = found


def texts(moments: Set[Any], zone: tzinfo) -> List[str]:
    return [datetime.fromtimestamp(moment, zone).isoformat() for moment in sorted(moments)][:5]


def offset(moment: int, zone: tzinfo) -> timedelta:
    return datetime.fromtimestamp(moment, zone).utcoffset() or timedelta(0)


def changes(zone: tzinfo) -> Iterator[Tuple[int, timedelta, timedelta]]:
    """Yield when the clock is changed from 2024 to 2030, and the offsets before and after it."""
    low, before = FIRST, offset(FIRST, zone)
    while low < LAST:
        high = min(low + 10 * DAY_S, LAST)
        after = offset(high, zone)
        if after != before:
            first, last = low, high
            while last - first > 1:
                middle = (first + last) // 2
                first, last = (middle, last) if offset(middle, zone) == before else (first, middle)
            yield last, before, after
        low, before = high, after


@needs_zones
def test_every_change_of_a_clock_from_2024_to_2030() -> None:
    """Zones that change alike are one; and of equal changes, hours apart in the world, each is looked at."""
    import zoneinfo

    seed = random.randrange(2**32)
    rand = random.Random(seed)
    seen: Dict[Tuple[int, timedelta, timedelta], str] = {}
    for name in sorted(zoneinfo.available_timezones(), key=lambda name: (name not in ODD_ZONES, name)):
        for change in changes(zoneinfo.ZoneInfo(name)):
            seen.setdefault(change, name)
    assert len(seen) > 100
    assert set(ODD_ZONES) - {"Africa/El_Aaiun"} <= set(seen.values())  # that one changes as Casablanca does
    checked = 0
    for (moment, _, _), name in sorted(seen.items()):
        middle = moment - moment % MINUTE_S
        scan = Scan(zoneinfo.ZoneInfo(name), middle - 12 * 3600, middle + 15 * 3600)
        scan.afters = [moment + rand.uniform(-7200, 7200) for _ in range(6)]
        for fields in (rand.choice(FIXED), some_fields(rand), some_fields(rand)):
            checked += scan.check(fields, f"seed {seed}")
    assert checked > 1000


@needs_zones
@pytest.mark.parametrize("name", ODD_ZONES)
def test_two_months_in_odd_zones(name: str) -> None:
    import zoneinfo

    seed = random.randrange(2**32)
    rand = random.Random(seed)
    zone = zoneinfo.ZoneInfo(name)
    first = next(changes(zone))[0]
    first -= first % MINUTE_S + 14 * DAY_S
    scan = Scan(zone, first, first + 61 * DAY_S)
    for fields in (Fields({0, 30}), Fields({0, 15}, {1, 2, 3}), some_fields(rand), some_fields(rand)):
        scan.check(fields, f"seed {seed}")


@needs_zones
def test_a_whole_year_from_any_moment() -> None:
    import zoneinfo

    seed = random.randrange(2**32)
    rand = random.Random(seed)
    zone = zoneinfo.ZoneInfo("Australia/Lord_Howe")
    scan = Scan(zone, FIRST, FIRST + 366 * DAY_S)
    scan.afters = [rand.uniform(FIRST, FIRST + 365 * DAY_S) for _ in range(300)]
    for fields in (Fields({15}, {2, 14}, {0}), some_fields(rand), some_fields(rand)):
        scan.check(fields, f"seed {seed}")


# -- the rule, told by examples ------------------------------------------------------------------

EXAMPLES = """
# zone | crontab | after (local) | due moments, with their offsets
# a gap (02:00 to 03:00): fixed hours right after it, as one
America/New_York | 30 2 * * * | 2026-03-07T12:00 | 03-08T03:00-0400 03-09T02:30-0400
America/New_York | 0,20,40 2,3 * * * | 2026-03-08T01:00 | 03-08T03:00-0400 03-08T03:20-0400 03-08T03:40-0400
# all hours: nothing of the gap
America/New_York | 30 * * * * | 2026-03-08T01:00 | 03-08T01:30-0500 03-08T03:30-0400
# an overlap (02:00 back to 01:00): fixed hours the first time, all hours both times
America/New_York | 30 1 * * * | 2026-10-31T12:00 | 11-01T01:30-0400 11-02T01:30-0500
America/New_York | 30 0-23 * * * | 2026-11-01T00:45 | 11-01T01:30-0400 11-01T01:30-0500
America/New_York | 30 */2 * * * | 2026-11-01T00:00 | 11-01T00:30-0400 11-01T02:30-0500 11-01T04:30-0500
America/New_York | 0 14 * * * | 2026-10-31T12:00 | 10-31T14:00-0400 11-01T14:00-0500
America/New_York | 30 0-22 * * * | 2026-11-01T00:45 | 11-01T01:30-0400 11-01T02:30-0500
America/New_York | 40 1 * * * | 2026-11-01T01:20-05:00 | 11-02T01:40-0500
# at midnight: the day begins at 01:00, and ends twice
America/Santiago | 0 0 * * * | 2026-09-05T12:00 | 09-06T01:00-0300 09-07T00:00-0300
America/Santiago | 30 23 * * * | 2026-04-04T12:00 | 04-04T23:30-0300 04-05T23:30-0400
America/Santiago | 0 0 * * sun | 2026-04-04T12:00 | 04-05T00:00-0400 04-12T00:00-0400
America/Santiago | 0 0 * * * | 2026-04-04T23:30-04:00 | 04-05T00:00-0400 04-06T00:00-0400
America/Santiago | 30 * 4 4,12 * | 2026-04-04T23:00 | 04-04T23:30-0300 04-04T23:30-0400 12-04T00:30-0300
# half an hour
Australia/Lord_Howe | 15 2 * * * | 2026-10-03T12:00 | 10-04T02:30+1100 10-05T02:15+1100
Australia/Lord_Howe | 45 * * * * | 2026-04-05T01:00 | 04-05T01:45+1100 04-05T01:45+1030 04-05T02:45+1030
# two hours
Antarctica/Troll | 30 1,2 * * * | 2026-03-28T12:00 | 03-29T03:00+0200 03-30T01:30+0200
# a date that never was
Pacific/Apia | 0 12 30 * * | 2011-12-01T00:00 | 12-31T00:00+1400 01-30T12:00+1400
Pacific/Apia | 0 * 30 * * | 2011-12-01T00:00 | 01-30T00:00+1400
"""


@needs_zones
@pytest.mark.parametrize(
    "line", [line for line in EXAMPLES.strip().splitlines() if not line.startswith("#")]
)
def test_the_rule_by_example(line: str) -> None:
    import zoneinfo

    name, text, start, expected = (part.strip() for part in line.split("|"))
    zone = zoneinfo.ZoneInfo(name)
    found = []
    begin = datetime.fromisoformat(start)
    moment: Optional[float] = (begin if begin.tzinfo else begin.replace(tzinfo=zone)).timestamp()
    for _ in expected.split():
        assert moment is not None
        moment = crontab.from_string(text).next_due(moment, zone)
        assert moment is not None
        found.append(datetime.fromtimestamp(moment, zone).strftime("%m-%dT%H:%M%z"))
    assert found == expected.split()


class FoldlessZone(tzinfo):
    """A zone of the older kind: right when asked for a moment, knows nothing of `fold`."""

    def __init__(self, real: tzinfo) -> None:
        self.real = real

    def fromutc(self, dt: datetime) -> datetime:
        offset = dt.replace(tzinfo=UTC).astimezone(self.real).utcoffset() or timedelta(0)
        return (dt + offset).replace(tzinfo=timezone(offset))

    def utcoffset(self, dt: Optional[datetime]) -> timedelta:
        raise AssertionError("asked for the offset of a wall time")


@needs_zones
def test_zone_that_does_not_know_fold_gives_the_same_moments() -> None:
    import zoneinfo

    real = zoneinfo.ZoneInfo("Europe/Paris")
    start = datetime(2026, 10, 24, tzinfo=UTC).timestamp()
    for fields in FIXED:
        due = fields.crontab()
        found = list(moments(due, FoldlessZone(real), start, start + 3 * DAY_S))
        assert found == list(moments(due, real, start, start + 3 * DAY_S))


def test_offsets_of_seconds_are_kept() -> None:
    zone = timezone(timedelta(hours=5, minutes=30, seconds=20))
    moment = crontab(0, 12).next_due(1_800_000_000, zone)
    assert moment is not None
    assert datetime.fromtimestamp(moment, zone).strftime("%H:%M:%S") == "12:00:00"

# SPDX-License-Identifier: MIT
"""Intervals, the text of crontabs, Celery's way of asking, subclasses, and what is stored."""

from __future__ import annotations

import json
import pickle
import random
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any, Optional, Tuple

import pytest
from test_times import needs_zones

from miniq import schedules
from miniq.schedules import (
    BaseSchedule,
    ParseException,
    crontab,
    describe,
    from_json,
    maybe_schedule,
    schedstate,
    schedule,
    solar,
    to_json,
)
from miniq.times import UTC, zone

NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)  # a Saturday


class App:
    """As much of an app as a schedule asks for."""

    def __init__(self, zone: tzinfo = UTC, now: datetime = NOON) -> None:
        self.zone = zone
        self.moment = now

    def now(self) -> datetime:
        return self.moment.astimezone(self.zone)


def next_text(due: BaseSchedule, after: str, times: int = 1, zone: tzinfo = UTC) -> str:
    moment: Optional[float] = datetime.fromisoformat(after).replace(tzinfo=zone).timestamp()
    found = []
    for _ in range(times):
        assert moment is not None
        moment = due.next_due(moment, zone)
        assert moment is not None
        found.append(datetime.fromtimestamp(moment, zone).strftime("%Y-%m-%dT%H:%M:%S"))
    return " ".join(found)


def function_of_the_module() -> datetime:
    return NOON


# -- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [30, 30.0, timedelta(seconds=30)])
def test_interval_is_due_after_it(every: Any) -> None:
    due = schedule(every)
    assert due.next_due(1_800_000_000.25, UTC) == 1_800_000_030.25
    assert due.seconds == 30 and due.run_every == timedelta(seconds=30) and not due.relative


@pytest.mark.parametrize(
    ("every_s", "after", "expected"),
    [
        (2 * 3600, "2026-11-21T10:35:07", "2026-11-21T12:00:00"),
        (3600, "2026-11-21T10:00:00", "2026-11-21T11:00:00"),
        (5400, "2026-11-21T10:35:07", "2026-11-21T12:00:00"),
        (90, "2026-11-21T10:35:07", "2026-11-21T10:36:00"),
        (60, "2026-11-21T10:35:59.750", "2026-11-21T10:36:00"),
        (30, "2026-11-21T10:35:07.750", "2026-11-21T10:35:37"),
        (0.25, "2026-11-21T10:35:07.500", "2026-11-21T10:35:07"),  # nothing to round to: .75
        (86400, "2026-11-21T10:35:07", "2026-11-22T00:00:00"),
        (36 * 3600, "2026-11-21T10:35:07", "2026-11-22T00:00:00"),
        (7 * 86400, "2026-11-21T10:35:07", "2026-11-28T00:00:00"),
    ],
)
def test_relative_interval_is_moved_back_to_the_unit(every_s: float, after: str, expected: str) -> None:
    due = schedule(every_s, relative=True)
    assert next_text(due, after) == expected
    moment = due.next_due(NOON.timestamp(), UTC)
    assert moment is not None and moment > NOON.timestamp()


@needs_zones
def test_relative_day_is_a_day_of_the_calendar() -> None:
    """In Santiago 2026-09-06 begins at 01:00; 2026-04-04 ends twice, at 24:00."""
    santiago = zone("America/Santiago")
    daily = schedule(86400, relative=True)
    assert next_text(daily, "2026-09-05T12:00", 2, santiago) == "2026-09-06T01:00:00 2026-09-07T00:00:00"
    assert next_text(daily, "2026-04-04T12:00", 2, santiago) == "2026-04-05T00:00:00 2026-04-06T00:00:00"
    # In St. John's it was 00:01 and then 23:01 again: a day begins once.
    st_johns = zone("America/St_Johns")
    again = datetime(2010, 11, 6, 23, 30, tzinfo=st_johns, fold=1).timestamp()
    for after in (again - 3600, again):
        moment = daily.next_due(after, st_johns)
        expected = datetime(2010, 11, 7 if after < again else 8, tzinfo=st_johns)
        assert moment == expected.timestamp()


def test_interval_beyond_the_last_year_is_never_due() -> None:
    assert schedule(timedelta(days=3_000_000)).next_due(NOON.timestamp(), UTC) is None
    assert schedule(timedelta(days=3_000_000)).is_due(NOON).is_due is False


@pytest.mark.parametrize(
    ("every", "error", "text"),
    [
        (0, ValueError, "longer than 0 s, not 0 s"),
        (timedelta(seconds=-5), ValueError, "longer than 0 s, not -5 s"),
        (float("nan"), ValueError, "must be a number"),
        (1e12, ValueError, "shorter than"),
        (None, TypeError, "not None"),
        ("30", TypeError, "seconds or a timedelta.*not '30'"),
        (True, TypeError, "not True"),
    ],
)
def test_wrong_interval_is_named(every: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        schedule(every)


def test_interval_is_shown_as_celery_does() -> None:
    shown = [schedule(seconds).human_seconds for seconds in (0.001, 1, 30, 90, 3600, 86400, 100000)]
    assert shown == [
        "now", "1.00 second", "30.00 seconds", "1.50 minutes", "1.00 hour", "1.00 day", "1.16 days",
    ]  # fmt: skip
    assert repr(schedule(30)) == "<freq: 30.00 seconds>"


def test_intervals_are_equal_by_their_length() -> None:
    assert schedule(60) == schedule(timedelta(minutes=1)) == timedelta(minutes=1)
    assert schedule(60) != schedule(61) and schedule(60) != schedule(60, relative=True)
    assert len({schedule(60), schedule(60.0), timedelta(minutes=1)}) == 1
    assert schedule(60) != 60 and schedule(60) != crontab()


# -- the text of a crontab -----------------------------------------------------------------------

ALL_DAYS = set(range(7))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*", ALL_DAYS),
        ("0", {0}),
        ("mon", {1}),
        ("Monday", {1}),
        ("tues,thurs", {2, 4}),
        ("mon-fri", {1, 2, 3, 4, 5}),
        ("fri-mon", {5, 6, 0, 1}),
        ("fri-mon/2", {5, 0}),
        ("mon-sun", ALL_DAYS),
        ("*/2", {0, 2, 4, 6}),
        ("1-5/2", {1, 3, 5}),
        ("0, 3-4", {0, 3, 4}),
        (2, {2}),
        ([1, 2], {1, 2}),
        ({6}, {6}),
        (["mon", 3], {1, 3}),
        (range(1, 4), {1, 2, 3}),
        ((day for day in (1, 2)), {1, 2}),
    ],
)
def test_day_of_week_in_every_form(text: Any, expected: set) -> None:  # type: ignore[type-arg]
    assert crontab(day_of_week=text).day_of_week == expected


@pytest.mark.parametrize(
    ("field", "text", "expected"),
    [
        ("minute", "*/15", {0, 15, 30, 45}),
        ("minute", "1,13,30-32,50-59/4", {1, 13, 30, 31, 32, 50, 54, 58}),
        ("minute", "58-2", {58, 59, 0, 1, 2}),
        ("minute", "*/100", {0}),
        ("minute", "007", {7}),
        ("hour", "22-4", {22, 23, 0, 1, 2, 3, 4}),
        ("hour", "22-4/3", {22, 1, 4}),
        ("hour", "0,8-17/2", {0, 8, 10, 12, 14, 16}),
        ("day_of_month", "*/10", {1, 11, 21, 31}),
        ("day_of_month", "30-2", {30, 31, 1, 2}),
        ("month_of_year", "*/3", {1, 4, 7, 10}),
        ("month_of_year", "2-12/2", {2, 4, 6, 8, 10, 12}),
        ("month_of_year", "jan,JUNE,sept", {1, 6, 9}),
        ("month_of_year", "nov-feb", {11, 12, 1, 2}),
    ],
)
def test_ranges_steps_and_names(field: str, text: str, expected: set) -> None:  # type: ignore[type-arg]
    assert getattr(crontab(**{field: text}), field) == expected


@pytest.mark.parametrize(
    ("text", "after", "expected"),
    [
        ("* * * * *", "2026-11-21T12:00:30", "2026-11-21T12:01:00 2026-11-21T12:02:00"),
        ("*/15 * * * *", "2026-11-21T12:00", "2026-11-21T12:15:00 2026-11-21T12:30:00"),
        ("0 12 * * mon-fri", "2026-11-20T12:00", "2026-11-23T12:00:00 2026-11-24T12:00:00"),
        ("30 8,20 1 * *", "2026-11-21T12:00", "2026-12-01T08:30:00 2026-12-01T20:30:00"),
        ("0 0 31 * *", "2026-11-21T12:00", "2026-12-31T00:00:00 2027-01-31T00:00:00"),
        ("0 0 29 2 *", "2026-11-21T12:00", "2028-02-29T00:00:00 2032-02-29T00:00:00"),
        ("0 0 29 2 *", "2096-11-21T12:00", "2104-02-29T00:00:00 2108-02-29T00:00:00"),
        ("0 0 29 2 mon", "2072-02-29T00:00", "2112-02-29T00:00:00 2140-02-29T00:00:00"),
        # All fields must agree: the first Monday of a month.
        ("0  9 1-7 *  mon", "2026-11-21T12:00", "2026-12-07T09:00:00 2027-01-04T09:00:00"),
        ("59 23 31 12 *", "2026-12-31T23:59", "2027-12-31T23:59:00 2028-12-31T23:59:00"),
        ("0 0 1 1 *", "1969-12-01T00:00", "1970-01-01T00:00:00 1971-01-01T00:00:00"),
    ],
)
def test_crontab_from_string(text: str, after: str, expected: str) -> None:
    due = crontab.from_string(text)
    assert next_text(due, after, 2) == expected
    assert due.text == " ".join(text.split()) and crontab.from_string(due.text) == due


def test_due_moment_is_strictly_after() -> None:
    due = crontab(0, 12)
    noon = NOON.timestamp()
    assert due.next_due(noon - 0.001, UTC) == noon
    assert due.next_due(noon, UTC) == noon + 86400


def test_the_end_of_time_is_never() -> None:
    last = datetime(9999, 12, 1, tzinfo=UTC).timestamp()
    assert crontab(0, 0, day_of_month=1).next_due(last, UTC) is None


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"minute": "60"}, ParseException, "minute '60' is out of range: 60 is not from 0 to 59"),
        ({"minute": 60}, ValueError, "minute 60 is out of range"),
        ({"minute": "1-99"}, ParseException, "99 is not from 0 to 59"),
        ({"minute": -1}, ValueError, "-1 is not from 0 to 59"),
        ({"minute": "-1"}, ParseException, "'' is not a number"),
        ({"minute": ""}, ParseException, "a part is empty"),
        ({"minute": "1,,2"}, ParseException, "a part is empty"),
        ({"minute": "*/0"}, ParseException, "step must be a number from 1, not '0'"),
        ({"minute": "*/"}, ParseException, "step must be a number"),
        ({"minute": "*/x"}, ParseException, "not 'x'"),
        ({"minute": "5/10"}, ParseException, "a step needs a range, like 5-59/10"),
        ({"minute": "1-2-3"}, ParseException, "'2-3' is not a number"),
        ({"minute": "*5"}, ParseException, r"'\*5' is not a number"),
        ({"minute": "jan"}, ParseException, "'jan' is not a number from 0 to 59$"),
        ({"minute": "\u0665"}, ParseException, "is not a number"),
        ({"minute": "9" * 5000}, ParseException, "is not a number"),
        ({"minute": []}, ValueError, "minute is empty"),
        ({"minute": None}, TypeError, "minute must be an int, text like .*not None"),
        ({"minute": 1.5}, TypeError, "not 1.5"),
        ({"minute": [1.5]}, TypeError, "not 1.5"),
        ({"day_of_week": 7}, ValueError, "7 is not from 0 to 6; Sunday is 0"),
        ({"day_of_week": "mo"}, ParseException, "from 0 to 6 or a name like 'sun'"),
        ({"day_of_week": "mondag"}, ParseException, "'mondag' is not"),
        ({"day_of_week": "mar"}, ParseException, "'mar' is not"),
        ({"day_of_month": 0}, ValueError, "0 is not from 1 to 31"),
        ({"day_of_month": 30, "month_of_year": 2}, ValueError, "'30' never occurs in month_of_year '2'"),
        ({"day_of_month": 31, "month_of_year": "apr,jun,sep,nov"}, ValueError, "never occurs"),
    ],
)
def test_wrong_crontab_is_named(arguments: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        crontab(**arguments)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["", "* * * *", "@daily", "* * * * * *"])
def test_crontab_needs_five_fields(text: str) -> None:
    with pytest.raises(ParseException, match="not the five 'minute hour day-of-month mon"):
        crontab.from_string(text)


def test_crontab_is_shown_as_celery_does() -> None:
    due = crontab(minute={30, 0}, hour="8-17", day_of_week="mon-fri")
    assert repr(due) == "<crontab: 0,30 8-17 * * mon-fri (m/h/dM/MY/d)>"


def test_crontabs_are_equal_by_their_numbers() -> None:
    assert crontab(minute="*/30") == crontab(minute=[0, 30])
    assert hash(crontab(minute="*/30")) == hash(crontab(minute=[0, 30]))
    assert crontab() != crontab(minute=0)
    assert crontab() != crontab(nowfun=function_of_the_module)
    assert crontab() != "* * * * *"


@pytest.mark.parametrize(
    "due",
    [
        schedule(90, relative=True, nowfun=function_of_the_module),
        crontab("*/5", "8-17", "mon-fri", nowfun=function_of_the_module),
        solar("sunset", 52.5, 13.4, nowfun=function_of_the_module),
    ],
)
def test_schedules_survive_pickling(due: BaseSchedule) -> None:
    copy = pickle.loads(pickle.dumps(due))
    assert copy == due and type(copy) is type(due)
    assert copy.nowfun is function_of_the_module
    assert copy.next_due(NOON.timestamp(), UTC) == due.next_due(NOON.timestamp(), UTC)


# -- Celery's way of asking ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("due", "last_run_ago_s", "expected"),
    [
        (schedule(30), 10, (False, 20)),
        (schedule(30), 30, (True, 30)),
        (schedule(30), 1000, (True, 30)),
        (schedule(3600, relative=True), 60, (True, 3600)),  # 11:59 and an hour, moved back to 12:00
        (crontab(), 0, (False, 60)),
        (crontab(), 60, (True, 60)),
        (crontab(0, 13), 86400, (True, 3600)),
        (crontab(0, 13), 3600, (False, 3600)),
    ],
)
def test_is_due_gives_whether_and_when_to_look_again(
    due: BaseSchedule, last_run_ago_s: float, expected: Tuple[bool, float]
) -> None:
    due.nowfun = function_of_the_module
    last = NOON - timedelta(seconds=last_run_ago_s)
    state = due.is_due(last)
    assert state == expected and isinstance(state, schedstate)
    assert due.is_due(last.replace(tzinfo=None)) == expected  # naive is in UTC
    assert due.is_due(last.astimezone(timezone(timedelta(hours=9)))) == expected


def test_remaining_estimate_is_negative_when_overdue() -> None:
    due = schedule(30, nowfun=function_of_the_module)
    assert due.remaining_estimate(NOON - timedelta(seconds=10)) == timedelta(seconds=20)
    assert due.remaining_estimate(NOON - timedelta(seconds=100)) == timedelta(seconds=-70)


def test_the_clock_and_zone_are_the_apps() -> None:
    plus_two = timezone(timedelta(hours=2))
    app = App(plus_two)
    due = crontab(0, 14, app=app)  # it is 14:00 there
    assert due.now() == NOON and due.tz is plus_two and due.app is app
    assert due.is_due(NOON - timedelta(hours=1)) == (True, 86400)
    assert due.to_local(NOON).hour == 14 and due.to_local(NOON.replace(tzinfo=None)).hour == 14
    naive = datetime(2026, 11, 21, 14)
    assert due.maybe_make_aware(naive, naive_as_utc=False) == NOON
    assert due.maybe_make_aware(naive) == NOON + timedelta(hours=2)


def test_without_an_app_it_is_the_real_clock_in_utc() -> None:
    due = schedule(3600)
    before = datetime.now(UTC)
    assert before <= due.now() <= datetime.now(UTC)
    assert due.tz is UTC
    assert due.is_due(before - timedelta(hours=2)).is_due


# -- subclasses ----------------------------------------------------------------------------------


class OnlyIsDue(BaseSchedule):
    """As projects write them: whether it is due is known by asking alone."""

    due = False

    def is_due(self, last_run_at: datetime) -> schedstate:
        return schedstate(self.due, 5.0)


class OnWorkingDays(crontab):
    """A crontab with a condition."""

    open = True

    def is_due(self, last_run_at: datetime) -> schedstate:
        state = super().is_due(last_run_at)
        return state if self.open else schedstate(False, 60.0)


class Twice(BaseSchedule):
    """The pure kind: due at two moments."""

    def next_due(self, after: float, zone: tzinfo) -> Optional[float]:
        return min((moment for moment in (100.0, 200.0) if moment > after), default=None)


def test_subclass_with_is_due_alone_is_polled() -> None:
    due = OnlyIsDue(nowfun=function_of_the_module)
    now = NOON.timestamp()
    assert due.polled and not schedule(1).polled and not BaseSchedule.polled
    assert due.next_due(now - 100, UTC) == now + 5
    due.due = True
    assert due.next_due(now - 100, UTC) == now
    found = due.next_due(now, UTC)
    assert found is not None and now < found < now + 1


def test_is_due_of_a_subclass_may_ask_the_class_above() -> None:
    due = OnWorkingDays(0, 12, nowfun=function_of_the_module)
    assert due.polled
    assert due.is_due(NOON - timedelta(hours=1)) == (True, 86400)
    assert due.next_due(NOON.timestamp() - 3600, UTC) == NOON.timestamp()
    due.open = False
    assert due.next_due(NOON.timestamp() - 3600, UTC) == NOON.timestamp() + 60


def test_is_due_follows_from_next_due_of_a_subclass() -> None:
    due = Twice(nowfun=lambda: datetime.fromtimestamp(150, UTC))
    assert not due.polled
    assert due.is_due(datetime.fromtimestamp(0, UTC)) == (True, 50)
    assert due.is_due(datetime.fromtimestamp(100, UTC)) == (False, 50)
    assert due.remaining_estimate(datetime.fromtimestamp(200, UTC)) == timedelta.max


def test_subclass_with_neither_says_what_is_missing() -> None:
    class Nothing(BaseSchedule):
        pass

    with pytest.raises(NotImplementedError, match=r"Nothing must define next_due\(\) or is_due\(\)"):
        Nothing().next_due(0, UTC)
    with pytest.raises(NotImplementedError, match="Nothing"):
        Nothing().is_due(NOON)


# -- what users write, and what is stored --------------------------------------------------------


def test_maybe_schedule_takes_seconds_timedelta_or_schedule() -> None:
    app, due = App(), crontab()
    assert maybe_schedule(30) == maybe_schedule(30.0) == maybe_schedule(timedelta(seconds=30)) == schedule(30)
    made = maybe_schedule(3600, relative=True, app=app)
    assert made == schedule(3600, relative=True) and made.app is app
    assert maybe_schedule(due, app=app) is due and due.app is app
    assert maybe_schedule(due).app is app


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "not None$"), ("* * * * *", "crontab.from_string"), (True, "not True$"), ([30], "not .30.$")],
)
def test_maybe_schedule_refuses_the_rest(value: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        maybe_schedule(value)


@pytest.mark.parametrize(
    ("due", "stored", "described"),
    [
        (schedule(30), {"type": "interval", "every_s": 30.0, "relative": False}, "every 30 seconds"),
        (schedule(60, True), {"type": "interval", "every_s": 60, "relative": True},
         "every minute by the clock"),
        (schedule(7200), {"type": "interval", "every_s": 7200.0, "relative": False}, "every 2 hours"),
        (schedule(0.1), {"type": "interval", "every_s": 0.1, "relative": False}, "every 0.1 seconds"),
        (schedule(86400), {"type": "interval", "every_s": 86400.0, "relative": False}, "every day"),
        (schedule(90), {"type": "interval", "every_s": 90.0, "relative": False}, "every 90 seconds"),
        (schedule(1), {"type": "interval", "every_s": 1.0, "relative": False}, "every second"),
        (
            crontab([0, 30], "8-17", "mon-fri"),
            {
                "type": "crontab", "minute": "0,30", "hour": "8-17", "day_of_week": "mon-fri",
                "day_of_month": "*", "month_of_year": "*",
            },
            "crontab 0,30 8-17 * * mon-fri",
        ),
        (
            solar("sunset", -33.87, 151.21),
            {"type": "solar", "event": "sunset", "lat": -33.87, "lon": 151.21},
            "sunset at 33.87 S, 151.21 E",
        ),
    ],
)  # fmt: skip
def test_schedules_go_through_json(due: BaseSchedule, stored: Any, described: str) -> None:
    assert to_json(due) == stored
    app = App()
    again = from_json(json.loads(json.dumps(stored)), app=app)
    assert again == due and type(again) is type(due) and again.app is app
    assert describe(due) == described


def test_random_crontabs_go_through_json_and_text() -> None:
    seed = random.randrange(2**32)
    rand = random.Random(seed)
    for _ in range(200):
        due = crontab(
            rand.sample(range(60), rand.randint(1, 60)), rand.sample(range(24), rand.randint(1, 24)),
            rand.sample(range(7), rand.randint(1, 7)), rand.sample(range(1, 29), rand.randint(1, 28)),
            rand.sample(range(1, 13), rand.randint(1, 12)),
        )  # fmt: skip
        assert from_json(to_json(due)) == due == crontab.from_string(due.text), (due, f"seed {seed}")


@pytest.mark.parametrize("due", [OnlyIsDue(), OnWorkingDays(), Twice()])
def test_other_classes_cannot_be_stored(due: BaseSchedule) -> None:
    with pytest.raises(TypeError, match="only intervals, crontab and solar can be stored"):
        to_json(due)
    assert describe(due) == repr(due)[:100]


@pytest.mark.parametrize(
    "value",
    [
        None, 5, [], {}, {"type": "daily"}, {"type": "interval"}, {"type": "interval", "every_s": "5"},
        {"type": "crontab", "minute": "60"}, {"type": "solar", "event": "x", "lat": 0, "lon": 0},
        {"type": "interval", "every_s": -1, "relative": False},
    ],
)  # fmt: skip
def test_what_is_no_stored_schedule_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not a stored schedule") as caught:
        from_json(value)
    assert repr(value)[:100] in str(caught.value)


def test_the_names_that_projects_import_are_there() -> None:
    assert {"crontab", "schedule", "solar", "BaseSchedule", "maybe_schedule", "ParseException"} <= set(
        schedules.__all__
    )

# SPDX-License-Identifier: MIT
"""Solar schedules against an almanac, and where there is no sunrise for months."""

from __future__ import annotations

import pickle
from datetime import datetime
from typing import List

import pytest

from miniq.schedules import solar
from miniq.times import UTC

EVENTS = (
    "dawn_astronomical dawn_nautical dawn_civil sunrise solar_noon sunset"
    " dusk_civil dusk_nautical dusk_astronomical"
).split()
DAY_S = 86400

#: Event, latitude, longitude, a moment, and the next event after it by PyEphem 4.2.1 (the planetary theory
#: VSOP87): without elevation and pressure, horizon -0:34 for the upper edge, or else the centre.
ALMANAC = """
dawn_astronomical 35.68 139.69 2028-07-21T01:00 2028-07-21T17:59:18
dawn_nautical 1.35 103.82 2027-06-19T01:00 2027-06-19T22:11:21
dawn_civil 59.91 10.75 2030-01-03T13:00 2030-01-04T07:20:50
sunrise 51.51 -0.13 2026-04-03T17:00 2026-04-04T05:29:17
solar_noon 51.51 -0.13 2025-10-04T07:00 2025-10-04T11:49:10
sunset -54.8 -68.3 2025-10-19T12:00 2025-10-19T23:24:07
dusk_civil -0.18 -78.47 2031-01-18T04:00 2031-01-18T23:50:14
dusk_nautical 40.71 -74.01 2037-03-18T03:00 2037-03-19T00:05:40
dusk_astronomical 64.15 -21.94 2033-09-27T21:00 2033-09-27T21:56:28
dawn_astronomical 21.31 -157.86 2027-10-19T20:00 2027-10-20T15:14:38
dawn_nautical -33.87 151.21 2035-02-18T22:00 2035-02-19T18:37:46
dawn_civil 1.35 103.82 2025-10-07T15:00 2025-10-07T22:28:47
sunrise -54.8 -68.3 2037-06-15T18:00 2037-06-16T12:57:16
solar_noon 52.52 13.41 2035-05-08T05:00 2035-05-08T11:02:54
sunset -18.14 178.44 2031-02-19T09:00 2031-02-20T06:38:06
dusk_civil 59.91 10.75 2039-06-24T14:00 2039-06-24T22:26:51
dusk_nautical 40.71 -74.01 2026-02-17T13:00 2026-02-17T23:33:18
dusk_astronomical 21.31 -157.86 2034-03-16T13:00 2034-03-17T05:55:08
dawn_astronomical -0.18 -78.47 2026-09-19T10:00 2026-09-20T09:55:21
dawn_nautical 35.68 139.69 2035-10-16T18:00 2035-10-16T19:53:26
dawn_civil -21.14 -175.2 2038-02-27T02:00 2038-02-27T17:14:38
sunrise 40.71 -74.01 2039-12-22T02:00 2039-12-22T12:16:57
solar_noon -0.18 -78.47 2033-11-19T21:00 2033-11-20T16:59:36
sunset 52.52 13.41 2033-12-13T21:00 2033-12-14T14:52:02
dusk_civil 35.68 139.69 2024-08-12T05:00 2024-08-12T10:01:23
dusk_nautical -21.14 -175.2 2033-03-24T07:00 2033-03-25T06:35:10
dusk_astronomical 51.51 -0.13 2036-08-03T05:00 2036-08-03T22:27:20
dawn_astronomical 52.52 13.41 2036-09-09T04:00 2036-09-10T02:30:37
dawn_nautical 51.51 -0.13 2032-12-14T11:00 2032-12-15T06:36:43
dawn_civil -54.8 -68.3 2036-04-05T02:00 2036-04-05T10:30:15
sunrise 21.31 -157.86 2028-04-22T07:00 2028-04-22T16:06:16
solar_noon -0.18 -78.47 2039-10-06T08:00 2039-10-06T17:01:58
sunset 40.71 -74.01 2024-03-14T17:00 2024-03-14T23:02:19
dusk_civil 35.68 139.69 2034-03-23T16:00 2034-03-24T09:21:28
dusk_nautical 64.15 -21.94 2025-08-28T21:00 2025-08-28T23:10:20
dusk_astronomical -21.14 -175.2 2036-07-13T12:00 2036-07-14T06:33:42
dawn_astronomical 1.35 103.82 2039-11-13T01:00 2039-11-13T21:34:59
dawn_nautical -33.87 151.21 2026-04-15T05:00 2026-04-15T19:23:48
dawn_civil 1.35 103.82 2034-10-02T03:00 2034-10-02T22:30:13
sunrise -0.18 -78.47 2028-09-04T11:00 2028-09-04T11:09:29
solar_noon 64.15 -21.94 2024-02-28T06:00 2024-02-28T13:40:20
sunset 64.15 -21.94 2036-03-21T08:00 2036-03-21T19:48:05
dusk_civil 35.68 139.69 2035-08-04T03:00 2035-08-04T10:11:07
dusk_nautical 52.52 13.41 2038-08-16T09:00 2038-08-16T19:57:08
dusk_astronomical 1.35 103.82 2028-02-24T10:00 2028-02-24T12:30:03
dawn_astronomical -18.14 178.44 2032-08-27T22:00 2032-08-28T17:03:14
dawn_nautical 21.31 -157.86 2040-01-07T16:00 2040-01-07T16:19:02
dawn_civil 35.68 139.69 2028-12-18T00:00 2028-12-18T21:17:36
sunrise -21.14 -175.2 2040-05-21T02:00 2040-05-21T18:06:46
solar_noon -18.14 178.44 2032-09-12T05:00 2032-09-13T00:02:08
sunset 35.68 139.69 2031-09-18T16:00 2031-09-19T08:43:31
dusk_civil 35.68 139.69 2031-10-26T06:00 2031-10-26T08:19:12
dusk_nautical -21.14 -175.2 2031-07-24T07:00 2031-07-25T06:09:58
dusk_astronomical -33.87 151.21 2040-08-12T23:00 2040-08-13T08:48:50
"""
#: The same where days without the event come first.  The sun then passes the height at so flat an angle that
#: the third of a minute of arc by which its size varies in a year is a minute and more.
AFTER_LONG = """
sunset 78.22 15.65 2026-04-25T00:00 2026-08-24T22:28:06
sunrise 78.22 15.65 2026-10-28T00:00 2027-02-16T10:20:49
sunrise 69.65 18.96 2026-11-28T00:00 2027-01-15T10:34:38
sunset 69.65 18.96 2026-05-20T00:00 2026-07-25T22:36:23
dusk_astronomical 59.91 10.75 2026-05-01T00:00 2026-08-21T22:51:07
sunrise -77.85 166.67 2026-05-01T00:00 2026-08-19T00:20:26
"""


def epoch(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def year_of(event: str, lat: float, lon: float) -> List[float]:
    """Return the moments of an event in 2027."""
    due = solar(event, lat, lon)
    moments: List[float] = []
    moment = due.next_due(epoch("2027-01-01"), UTC)
    while moment is not None and moment < epoch("2028-01-01"):
        moments.append(moment)
        moment = due.next_due(moment, UTC)
    return moments


@pytest.mark.parametrize(("table", "limit_s"), [(ALMANAC, 3), (AFTER_LONG, 90)], ids=["daily", "rare"])
def test_events_agree_with_an_almanac(table: str, limit_s: float) -> None:
    wrong = []
    for line in table.strip().splitlines():
        event, lat, lon, after, expected = line.split()
        if event in ("sunrise", "sunset"):
            limit_s = max(limit_s, 7)  # its size is taken to be the same all year round
        found = solar(event, float(lat), float(lon)).next_due(epoch(after), UTC)
        if found is None or abs(found - epoch(expected)) > limit_s:
            wrong.append(f"{line}: {found and datetime.fromtimestamp(found, UTC)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("lon", [-180, 13.4, 180])
def test_every_event_happens_once_a_day_far_from_the_poles(lon: float) -> None:
    for event in EVENTS:
        moments = year_of(event, 35, lon)
        assert len(moments) in (364, 365, 366), event
        for one, other in zip(moments, moments[1:]):
            assert abs(other - one - DAY_S) < 200, (event, one)


def test_the_events_of_a_day_come_in_their_order() -> None:
    for lat in (-55, 0, 48):
        moment = solar("solar_noon", lat, 7).next_due(epoch("2027-03-04T18:00"), UTC)
        assert moment is not None
        moment -= DAY_S / 2
        for event in EVENTS:
            found = solar(event, lat, 7).next_due(moment, UTC)
            assert found is not None and moment < found < moment + DAY_S / 2, event
            moment = found


@pytest.mark.parametrize("lat", [90, -90])
def test_at_a_pole_the_sun_rises_and_sets_once_a_year(lat: float) -> None:
    for event in ("sunrise", "sunset", "dawn_civil", "dusk_astronomical"):
        assert len(year_of(event, lat, 0)) == 1
    assert len(year_of("solar_noon", lat, 0)) in (364, 365, 366)


def test_polar_day_and_night_are_left_out() -> None:
    moments = year_of("sunrise", 78.22, 15.65)
    gaps = [(later - one) / DAY_S for one, later in zip(moments, moments[1:])]
    assert sum(gap > 2 for gap in gaps) == 1  # the polar day; the night is at both ends of the year
    assert max(gaps) > 100
    assert moments[0] > epoch("2027-02-10") and moments[-1] < epoch("2027-11-01")


def test_the_answer_does_not_depend_on_when_it_is_asked() -> None:
    due = solar("sunset", 52.52, 13.41)
    first = due.next_due(epoch("2027-06-01T12:00"), UTC)
    assert first is not None and first == round(first)
    for before_s in (0.25, 1, 60, 3600, 20 * 3600):
        assert due.next_due(first - before_s, UTC) == first
    later = due.next_due(first, UTC)
    assert later is not None and later > first + DAY_S / 2


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("sunrize", 0, 0), ValueError, r"'sunrize' is invalid .did you mean sunrise\?., must be one of"),
        ((None, 0, 0), ValueError, "event None is invalid"),
        (("sunrise", 91, 0), ValueError, "latitude 91 is invalid, must be between -90 and 90"),
        (("sunrise", 0, -181), ValueError, "longitude -181 is invalid, must be between -180 and 180"),
        (("sunrise", float("nan"), 0), ValueError, "latitude must be a number"),
        (("sunrise", "52", 0), TypeError, "latitude must be a number .degrees., not '52'"),
    ],
)
def test_wrong_argument_is_named(arguments: tuple, error: type, text: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(error, match=text):
        solar(*arguments)


def test_equal_by_event_and_place_and_survives_pickling() -> None:
    one = solar("sunset", 59.33, 18.07)
    assert one == pickle.loads(pickle.dumps(one)) and hash(one) == hash(solar("sunset", 59.33, 18.07))
    assert one != solar("sunset", 59.33, 18.08) and one != solar("sunrise", 59.33, 18.07)
    assert one != "sunset"
    assert repr(one) == "<solar: sunset at latitude 59.33, longitude: 18.07>"
    assert (one.event, one.lat, one.lon) == ("sunset", 59.33, 18.07)

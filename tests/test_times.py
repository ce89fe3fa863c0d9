# SPDX-License-Identifier: MIT
"""ISO 8601 text, zones, ETA and expires, rates, backoff."""

from __future__ import annotations

import random
import sys
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest

from miniq import times
from miniq.exceptions import ImproperlyConfigured
from miniq.times import UTC, Moment

PARIS_WINTER = timezone(timedelta(hours=1))
NOW = 1_800_000_000.25


def has_zones() -> bool:
    import zoneinfo

    return bool(zoneinfo.available_timezones())


needs_zones = pytest.mark.skipif(not has_zones(), reason="this machine has no time zone database")

# -- ISO 8601 ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-21T05:42:46.616277+00:00", datetime(2026, 11, 21, 5, 42, 46, 616277, UTC)),
        ("2026-11-21T05:42:46+00:00", datetime(2026, 11, 21, 5, 42, 46, 0, UTC)),
        ("2026-11-21T05:42:46Z", datetime(2026, 11, 21, 5, 42, 46, 0, UTC)),
        ("2026-11-21t05:42:46z", datetime(2026, 11, 21, 5, 42, 46, 0, UTC)),
        ("2026-11-21 05:42:46", datetime(2026, 11, 21, 5, 42, 46, 0, PARIS_WINTER)),
        ("2026-11-21T05:42", datetime(2026, 11, 21, 5, 42, 0, 0, PARIS_WINTER)),
        ("2026-11-21", datetime(2026, 11, 21, 0, 0, 0, 0, PARIS_WINTER)),
        ("2026-11-21T05:42:46-0500", datetime(2026, 11, 21, 10, 42, 46, 0, UTC)),
        ("2026-11-21T05:42:46+05:30", datetime(2026, 11, 21, 0, 12, 46, 0, UTC)),
        ("2026-11-21T05:42:46 +05", datetime(2026, 11, 21, 0, 42, 46, 0, UTC)),
        ("2026-11-21T05:42:46+00:19:32", datetime(2026, 11, 21, 5, 23, 14, 0, UTC)),
        ("2026-11-21T05:42:46.123456789Z", datetime(2026, 11, 21, 5, 42, 46, 123456, UTC)),
        ("2026-11-21T05:42:46.5Z", datetime(2026, 11, 21, 5, 42, 46, 500000, UTC)),
        ("2026-11-21T05:42:46,25Z", datetime(2026, 11, 21, 5, 42, 46, 250000, UTC)),
        (" 2026-11-21T05:42:46Z\n", datetime(2026, 11, 21, 5, 42, 46, 0, UTC)),
    ],
)
def test_every_form_a_reader_must_accept(text: str, expected: datetime) -> None:
    found = times.parse_iso8601(text, PARIS_WINTER)
    assert found == expected
    assert found.utcoffset() is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tomorrow",
        "1234567890",
        "20261121T054246Z",
        "2026-W47-6",
        "2026-W47-6T05:42:46+00:00",
        "2026-13-01",
        "2026-02-30T00:00:00+00:00",
        "2026-11-21T25:00:00Z",
        "2026-11-21T05:42:46+99:99",
        "2026-11-21T05:42:46+24:00",
        "2026-11-21T",
        "2026-11-21T05",
        "2026-11-21T05:42:46.Z",
        "٢٠٢٦-11-21",
        "2026-11-21T05:42:46Zx",
        "x" * 10_000,
    ],
)
def test_other_text_is_a_value_error_that_shows_it(text: str) -> None:
    with pytest.raises(ValueError, match="not an ISO 8601 date and time") as caught:
        times.parse_iso8601(text)
    assert text[:20].strip() in str(caught.value)
    assert len(str(caught.value)) < 300


def test_what_isoformat_writes_is_read_back_exactly() -> None:
    seed = random.randrange(2**32)
    rand = random.Random(seed)
    for _ in range(2000):
        offset = timedelta(minutes=rand.randrange(-1439, 1440))
        moment = datetime(1, 1, 2, tzinfo=timezone(offset)) + timedelta(
            days=rand.randrange(3_600_000),
            seconds=rand.randrange(86400),
            microseconds=rand.choice((0, rand.randrange(10**6))),
        )
        assert times.parse_iso8601(moment.isoformat()) == moment, f"seed {seed}"
        assert times.parse_iso8601(moment.isoformat(" ")) == moment, f"seed {seed}"


def test_to_epoch_reads_datetimes_text_and_numbers() -> None:
    assert times.to_epoch(datetime(1970, 1, 2, tzinfo=UTC)) == 86400
    assert times.to_epoch(datetime(1970, 1, 2), PARIS_WINTER) == 86400 - 3600
    assert times.to_epoch("1970-01-02", PARIS_WINTER) == 86400 - 3600
    assert times.to_epoch(12) == 12.0
    for wrong in (True, None, date(2026, 1, 1), Decimal(1)):
        with pytest.raises(TypeError, match="a moment must be"):
            times.to_epoch(wrong)  # type: ignore[arg-type]
    for endless in (float("nan"), float("inf"), 10**400):
        with pytest.raises(ValueError, match="a moment must be"):
            times.to_epoch(endless)


def test_to_iso_is_utc_and_is_read_back() -> None:
    assert times.to_iso(0) == "1970-01-01T00:00:00+00:00"
    assert times.to_epoch(times.to_iso(NOW)) == NOW
    assert times.now_utc().utcoffset() == timedelta(0)


# -- zones ---------------------------------------------------------------------------------------


def test_utc_needs_no_database_and_loads_none() -> None:
    loaded = "zoneinfo" in sys.modules
    for name in ("UTC", "utc", "Etc/UTC", None):
        assert times.zone(name) is UTC
    assert times.zone(PARIS_WINTER) is PARIS_WINTER
    assert ("zoneinfo" in sys.modules) == loaded


@needs_zones
def test_a_naive_time_takes_the_offset_its_zone_has_then() -> None:
    paris = times.zone("Europe/Paris")
    assert times.to_epoch("2026-01-01T12:00", paris) == times.to_epoch("2026-01-01T11:00Z")
    assert times.to_epoch("2026-07-01T12:00", paris) == times.to_epoch("2026-07-01T10:00Z")


@pytest.mark.parametrize(
    "name", ["Europe/Pariss", "../etc/passwd", "", "Mars/Olympus", "/etc/localtime", "a\0b"]
)
def test_an_unknown_zone_is_the_operators_error(name: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="time zone"):
        times.zone(name)


@needs_zones
def test_an_unknown_zone_names_the_nearest() -> None:
    with pytest.raises(ImproperlyConfigured, match=r"'Europe/Pariss' \(did you mean Europe/Paris\?\)"):
        times.zone("Europe/Pariss")


# -- eta and expires -----------------------------------------------------------------------------


def test_a_countdown_becomes_utc_text_and_epoch() -> None:
    assert times.eta_moment(10, None, 0.0, PARIS_WINTER) == Moment("1970-01-01T00:00:10+00:00", 10.0)
    assert times.eta_moment(0.5, None, 0.0) == Moment("1970-01-01T00:00:00.500000+00:00", 0.5)


def test_nothing_or_a_countdown_of_zero_means_at_once() -> None:
    assert times.eta_moment(None, None, NOW) is None
    assert times.eta_moment(0, None, NOW) is None
    assert times.eta_moment(0, datetime(2030, 1, 1), NOW) is None


def test_an_eta_is_converted_once_and_only_utc_travels() -> None:
    expected = Moment("2030-01-01T11:00:00+00:00", 1893495600.0)
    for eta in ("2030-01-01T12:00:00", "2030-01-01T06:00:00-05:00", datetime(2030, 1, 1, 12),
                datetime(2030, 1, 1, 11, tzinfo=UTC)):  # fmt: skip
        assert times.eta_moment(None, eta, NOW, PARIS_WINTER) == expected
        assert times.expires_moment(eta, NOW, PARIS_WINTER) == expected


def test_moments_of_the_past_are_kept() -> None:
    past = times.eta_moment(None, "2001-01-01", NOW)
    assert past is not None and past.epoch < NOW
    assert times.expires_moment("2001-01-01", NOW) == past


def test_expires_in_seconds_counts_from_now() -> None:
    assert times.expires_moment(None, NOW) is None
    assert times.expires_moment(60, 0.0) == Moment("1970-01-01T00:01:00+00:00", 60.0)
    assert times.expires_moment(0, 0.0) == Moment("1970-01-01T00:00:00+00:00", 0.0)


@pytest.mark.parametrize("wrong", [True, [], Decimal(3), timedelta(1)])
def test_what_is_no_number_of_seconds_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match="countdown must be a number of seconds from now, not"):
        times.eta_moment(wrong, None, NOW)
    with pytest.raises(TypeError, match="expires must be a number of seconds from now, not"):
        times.expires_moment(wrong, NOW)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1, -0.001, 1e300, 10**400])
def test_seconds_that_lead_nowhere_are_a_value_error_naming_them(wrong: Any) -> None:
    with pytest.raises(ValueError, match="countdown") as caught:
        times.eta_moment(wrong, None, NOW)
    assert repr(wrong)[:20] in str(caught.value)
    with pytest.raises(ValueError, match="expires"):
        times.expires_moment(wrong, NOW)


def test_an_eta_that_is_no_moment_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"eta must be a datetime .*, not 5; seconds from now are called countdown"
    ):
        times.eta_moment(None, 5, NOW)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eta: not an ISO 8601 date and time: 'soon'"):
        times.eta_moment(None, "soon", NOW)
    with pytest.raises(ValueError, match="eta"):
        times.eta_moment(None, "0001-01-01T00:00:00+23:00", NOW)


# -- rates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "expected"),
    [("10/s", 10.0), ("90/m", 1.5), ("1800/h", 0.5), ("10", 10.0), (5, 5.0), (0.5, 0.5), (" 1.5 / s ", 1.5),
     (None, None), (0, None), ("0/m", None)],
)  # fmt: skip
def test_rates_become_tokens_per_second(rate: Any, expected: Any) -> None:
    assert times.parse_rate(rate) == expected


@pytest.mark.parametrize(
    "rate", ["", "ten", "10/d", "10/", "/s", "1/s/m", "nan", "inf/s", "-1/s", -1, True, [], float("nan")]
)
def test_an_invalid_rate_is_named(rate: Any) -> None:
    with pytest.raises(ValueError, match="Invalid rate limit string: ") as caught:
        times.parse_rate(rate)
    assert repr(rate) in str(caught.value)


# -- backoff -------------------------------------------------------------------------------------


def test_backoff_doubles_up_to_its_maximum() -> None:
    assert [times.backoff_s(1, n, 600, False, random.random) for n in (0, 1, 2, 3, 9, 10, 5000)] == [
        1, 2, 4, 8, 512, 600, 600,
    ]  # fmt: skip
    assert times.backoff_s(True, 2, 600, False, random.random) == 4
    assert times.backoff_s(2.9, 1, 600, False, random.random) == 4
    assert times.backoff_s(0.1, 1, 600, False, random.random) == 2
    assert times.backoff_s(5, 0, 3, False, random.random) == 3


def test_full_jitter_reaches_from_zero_to_the_whole_delay() -> None:
    rand = random.Random(1)
    drawn = {times.backoff_s(1, 2, 600, True, rand.random) for _ in range(500)}
    assert drawn == {0, 1, 2, 3, 4}

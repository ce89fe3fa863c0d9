# SPDX-License-Identifier: MIT
"""Moments and rates: ISO 8601 text, time zones, countdown / ETA / expires, rate limits, backoff.

Two clocks, two words: `now` is epoch seconds (people and the wire), `mono` monotonic seconds
(durations).  Both are arguments here; only `now_utc` looks at a clock.  A naive datetime means the
app's time zone and is converted once, where the task is called: on the wire there is only UTC.

Source: Celery's message protocol 2 (what readers must accept in ``eta`` and ``expires``), and its
rate limits and retry backoff.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone, tzinfo
from math import isfinite
from typing import Callable, NamedTuple, Optional, Union

from .exceptions import ImproperlyConfigured
from .text import nearest, truncate

UTC = timezone.utc

_ISO = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)"
    r"(?:[Tt ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d+))?)?"
    r"\s?(?:([Zz])|([+-])(\d\d):?(\d\d)?(?::?(\d\d)(?:\.\d+)?)?)?)?",
    re.ASCII,
)


def now_utc() -> datetime:
    """Return the present moment, aware, in UTC."""
    return datetime.now(UTC)


# -- text to moments and back --------------------------------------------------------------------


def parse_iso8601(text: str, default_zone: tzinfo = UTC) -> datetime:
    """Return the aware datetime written in `text`; one without an offset is in `default_zone`.

    Accepts an offset as ``+hh:mm``, ``+hhmm``, ``+hh`` or ``Z``, a space instead of ``T``, a date
    only (its midnight) and any number of fraction digits (microseconds are kept).  Raises
    `ValueError` with the text for everything else.
    """
    # What isoformat() writes in UTC is nearly all there is; other shapes fromisoformat reads
    # differently from one Python to the next, so they go through the pattern.
    if len(text) in (25, 32) and text[-6:] == "+00:00" and text[4] == text[7] == "-" and text[10] == "T":
        try:
            return datetime.fromisoformat(text)
        except ValueError:
            pass  # the pattern below decides, and names the text
    match = _ISO.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not an ISO 8601 date and time: {truncate(text, 100)!r}")
    year, month, day, hour, minute, second, fraction, z, sign, off_h, off_m, off_s = match.groups()
    zone = default_zone
    try:
        if z:
            zone = UTC
        elif sign:
            offset = timedelta(hours=int(off_h), minutes=int(off_m or 0), seconds=int(off_s or 0))
            zone = timezone(-offset if sign == "-" else offset) if offset else UTC
        return datetime(
            int(year), int(month), int(day), int(hour or 0), int(minute or 0), int(second or 0),
            int((fraction or "0")[:6].ljust(6, "0")), zone,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"not an ISO 8601 date and time: {truncate(text, 100)!r} ({error})") from None


def to_epoch(value: Union[datetime, str, float], default_zone: tzinfo = UTC) -> float:
    """Return epoch seconds for a datetime, ISO 8601 text or a number (taken as epoch seconds).

    What has no offset is in `default_zone`.  Raises `ValueError` or `TypeError` naming the value.
    """
    if isinstance(value, str):
        return parse_iso8601(value, default_zone).timestamp()
    if isinstance(value, datetime):
        return _aware(value, default_zone).timestamp()
    return _number(value, "a moment", "a datetime, ISO 8601 text or epoch seconds")


def to_iso(epoch: float) -> str:
    """Return epoch seconds as ISO 8601 text in UTC, as on the wire."""
    return datetime.fromtimestamp(epoch, UTC).isoformat()


def zone(name: Union[str, tzinfo, None]) -> tzinfo:
    """Return the time zone called `name`; None is UTC, and UTC needs no time zone database.

    Raises `ImproperlyConfigured` for a name that is not in this machine's database.
    """
    if name is None:
        return UTC
    if isinstance(name, tzinfo):
        return name
    if name.upper() in ("UTC", "ETC/UTC"):
        return UTC
    import zoneinfo  # most apps live in UTC and never need it

    try:
        return zoneinfo.ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # not found, not a key, a folder
        known = zoneinfo.available_timezones()
        if not known:
            raise ImproperlyConfigured(
                f"time zone {truncate(name, 100)!r}: this machine has no time zone database; install the"
                " system's (or PyPI's) tzdata package, or use UTC"
            ) from None
        hint = nearest(name, known)
        raise ImproperlyConfigured(
            f"unknown time zone {truncate(name, 100)!r}"
            + (f" (did you mean {hint}?)" if hint else "")
            + "; names look like Europe/Paris"
        ) from None


def _aware(moment: datetime, default_zone: tzinfo) -> datetime:
    return moment if moment.utcoffset() is not None else moment.replace(tzinfo=default_zone)


def _number(value: object, what: str, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what} must be {expected}, not {truncate(repr(value), 100)}")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if not isfinite(number):
        raise ValueError(f"{what} must be {expected}, not {truncate(repr(value), 100)}")
    return number


# -- when a task starts, and when it is too late -------------------------------------------------


class Moment(NamedTuple):
    """A moment as it travels (`text`: ISO 8601, UTC) and as it is compared (`epoch`: seconds)."""

    text: str
    epoch: float


def eta_moment(
    countdown: Optional[float],
    eta: Union[datetime, str, None],
    now: float,
    default_zone: tzinfo = UTC,
) -> Optional[Moment]:
    """Return when a task may start, from the calling options; None = at once.

    `countdown` (seconds from `now`) wins over `eta`, as in Celery, and 0 means at once.  An `eta` may be
    in the past.  Raises `TypeError` or `ValueError` naming the option and its value.
    """
    if countdown is not None:
        seconds = _seconds(countdown, "countdown")
        return _moment(now + seconds, "countdown", countdown) if seconds else None
    if eta is None:
        return None
    if not isinstance(eta, (datetime, str)):
        raise TypeError(
            f"eta must be a datetime or ISO 8601 text, not {truncate(repr(eta), 100)};"
            " seconds from now are called countdown"
        )
    return _moment(_epoch_of(eta, "eta", default_zone), "eta", eta)


def expires_moment(
    expires: Union[datetime, str, float, None],
    now: float,
    default_zone: tzinfo = UTC,
) -> Optional[Moment]:
    """Return after when a task must not start any more; None = never too late.

    A number is seconds from `now`.  A datetime or text may be in the past: the task is born expired.
    Raises `TypeError` or `ValueError` naming the option and its value.
    """
    if expires is None:
        return None
    if isinstance(expires, (datetime, str)):
        return _moment(_epoch_of(expires, "expires", default_zone), "expires", expires)
    return _moment(now + _seconds(expires, "expires"), "expires", expires)


def _seconds(value: float, what: str) -> float:
    kind = type(value)
    if kind not in (int, float) or not 0 <= value < 1e12:
        number = _number(value, what, "a number of seconds from now")
        if number < 0:
            raise ValueError(
                f"{what} must not be negative: {truncate(repr(value), 100)} seconds from now are over"
            )
        return number
    return value


def _epoch_of(value: Union[datetime, str], what: str, default_zone: tzinfo) -> float:
    try:
        return to_epoch(value, default_zone)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{what}: {error}") from None


def _moment(epoch: float, what: str, value: object) -> Moment:
    try:
        return Moment(datetime.fromtimestamp(epoch, UTC).isoformat(), epoch)
    except (ValueError, OverflowError, OSError):  # which one depends on the platform
        raise ValueError(f"{what} is out of range (years 1 to 9999): {truncate(repr(value), 100)}") from None


# -- rates ---------------------------------------------------------------------------------------

_PER_SECOND = {"s": 1.0, "m": 60.0, "h": 3600.0}
#: Whoever waits exactly `expected_wait` must find the token, whatever rounding did (tokens).  What
#: is given too early is owed, so the rate stays exact.
_ROUNDING = 1e-3


def parse_rate(rate: Union[str, float, None]) -> Optional[float]:
    """Return tokens per second for ``"10/s"``, ``"100/m"``, ``"1000/h"`` or a number; None = no limit.

    Raises `ValueError` for anything else, negative rates included; None, 0 and ``"0/m"`` mean no limit.
    """
    if rate is None:
        return None
    if isinstance(rate, str):
        amount, slash, unit = rate.partition("/")
        divisor = _PER_SECOND.get(unit.strip() if slash else "s")
        try:
            per_second = float(amount) / divisor if divisor else -1.0
        except ValueError:
            per_second = -1.0
    elif isinstance(rate, (int, float)) and not isinstance(rate, bool):
        per_second = float(rate)
    else:
        per_second = -1.0
    if not 0 <= per_second < float("inf"):
        raise ValueError(
            f"Invalid rate limit string: {truncate(repr(rate), 100)}; expected 10, '10/s', '100/m', '1000/h'"
        )
    return per_second or None


def backoff_s(factor: float, retries: int, maximum: float, jitter: bool, rand: Callable[[], float]) -> int:
    """Return how many seconds to wait before retry number `retries` (0 = the first one).

    ``factor * 2**retries`` (factor: whole seconds, at least 1), at most `maximum`; with `jitter` any
    whole number from 0 to that, drawn with `rand` (uniform in [0, 1)).
    """
    delay_s = int(max(0, min(maximum, int(max(1, factor)) * 2 ** min(max(retries, 0), 64))))
    return int(rand() * (delay_s + 1)) if jitter else delay_s

# SPDX-License-Identifier: MIT
"""What a clock on the wall of a time zone shows, and when it first shows it.

A zone is only ever asked for its offset at a moment, which every kind of `tzinfo` answers right (also
those that do not know ``fold``), so nothing here guesses at times that a change of the clock leaves
out or repeats.  Moments are epoch seconds.  A wall time is a number too: the seconds from 1970-01-01
00:00 of the wall clock to it, as if that clock had never been changed.

A zone that changes its clock twice within a day is taken to change it once.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone, tzinfo
from math import ceil, floor
from typing import Tuple

DAY_S = 86400
#: Number of 1970-01-01 among the days that `date.toordinal` counts.
EPOCH_DAY = 719163

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def offset_s(moment: float, zone: tzinfo) -> float:
    """Return how far the wall clock is ahead of UTC at a moment (seconds, negative west of Greenwich)."""
    # A moment made by addition may lie before 1970, which fromtimestamp() refuses on Windows.
    offset = (_EPOCH + timedelta(seconds=moment)).astimezone(zone).utcoffset()
    return offset.total_seconds() if offset is not None else 0.0


def change_between(low: float, high: float, zone: tzinfo) -> int:
    """Return the first whole second after `low` with the offset of `high`, which is not that of `low`."""
    before = offset_s(low, zone)
    first, last = floor(low), ceil(high)
    while last - first > 1:
        middle = (first + last) // 2
        if offset_s(middle, zone) == before:
            first = middle
        else:
            last = middle
    return last


def first_shown(wall: int, zone: tzinfo) -> float:
    """Return the moment at which the clock first shows a wall time, or is put forward past it."""
    before, after = offset_s(wall - DAY_S, zone), offset_s(wall + DAY_S, zone)
    moment = wall - before
    if before == after:
        return moment
    change = change_between(wall - DAY_S, wall + DAY_S, zone)
    return moment if moment < change else max(wall - after, change)


def furthest_shown(moment: float, zone: tzinfo) -> Tuple[float, bool]:
    """Return the latest wall time up to a moment, and whether the clock has shown it.

    It is what the clock shows, but for the time after it was put back: then it is the wall time at which
    that happened, which itself was not reached.
    """
    offset, before = offset_s(moment, zone), offset_s(moment - DAY_S, zone)
    shows = moment + offset
    if before > offset:
        mark = change_between(moment - DAY_S, moment, zone) + before
        if mark > shows:
            return mark, False
    return shows, True

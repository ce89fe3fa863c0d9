# SPDX-License-Identifier: MIT
"""Where the sun stands: its passing of the meridian, and of a given height, to within seconds.

The days of a place are cut into halves at noon and at midnight by the sun.  In one half its height only
grows or falls, so that a change of sign between the two ends is a passing, found by halving; a half
without one (polar day, polar night) is left out.  The halves are counted from 1970, so whoever asks, and
for whatever moment, gets the same answers.

Source: J. Meeus, Astronomical Algorithms, 2nd edition, chapters 12, 13 and 25: the sun's place to 0.01
degrees, without nutation, which moves the sun and the zero of sidereal time alike.
"""

from __future__ import annotations

from math import asin, atan2, cos, degrees, floor, radians, sin
from typing import Optional, Tuple

_HALF_DAY_S = 43200
#: 2000-01-01 12:00 UTC, from which the formulas count days.
_J2000 = 946728000
#: Even at the poles, where there is one day a year, everything happens within it.
_MAX_HALF_DAYS = 2 * 400


def _place(moment: float) -> Tuple[float, float, float]:
    """Return the sun's hour angle at Greenwich (degrees), the sine and the cosine of its declination."""
    days = (moment - _J2000) / 86400
    t = days / 36525
    anomaly = radians(357.52911 + t * (35999.05029 - t * 0.0001537))
    longitude = radians(
        280.46646 + t * (36000.76983 + t * 0.0003032)
        + (1.914602 - t * 0.004817) * sin(anomaly)
        + (0.019993 - t * 0.000101) * sin(2 * anomaly)
        + 0.000289 * sin(3 * anomaly)
        - 0.00569
    )  # fmt: skip
    tilt = radians(23.439291 - t * 0.0130042)
    ascension = degrees(atan2(cos(tilt) * sin(longitude), cos(longitude)))
    declination = asin(sin(tilt) * sin(longitude))
    sidereal = 280.46061837 + 360.98564736629 * days
    return sidereal - ascension, sin(declination), cos(declination)


def _height(moment: float, lat: float, lon: float) -> float:
    """Return the sine of the height of the sun's centre above the true horizon."""
    angle, sine, cosine = _place(moment)
    return sin(radians(lat)) * sine + cos(radians(lat)) * cosine * cos(radians(angle + lon))


def _turn(count: int, lon: float) -> float:
    """Return the moment of noon by the sun on 1970-01-01, `count` half days later: odd ones are midnights."""
    wanted = 180.0 * (count % 2)
    moment = (count + 1) * _HALF_DAY_S - lon * 240
    for _ in range(2):  # each round is a thousand times nearer, from a quarter of an hour to a millisecond
        angle = _place(moment)[0] + lon - wanted
        moment -= ((angle + 180) % 360 - 180) * 240
    return moment


def next_noon(after: float, lon: float) -> float:
    """Return the first moment after `after` (whole seconds) at which the sun stands highest."""
    count = 2 * floor((after + lon * 240) / 86400)
    while True:  # today's or tomorrow's
        moment = float(round(_turn(count, lon)))
        if moment > after:
            return moment
        count += 2


def next_passing(after: float, lat: float, lon: float, height: float, rising: bool) -> Optional[float]:
    """Return the first moment after `after` (whole seconds) at which the sun's centre passes a height.

    The height is in degrees.  None if that does not happen within 400 days.
    """
    wanted = sin(radians(height))
    count = 2 * floor((after + lon * 240) / 86400) - 2
    low = _turn(count, lon)
    is_up = _height(low, lat, lon) >= wanted
    for _ in range(_MAX_HALF_DAYS):
        count += 1
        high = _turn(count, lon)
        was_up, is_up = is_up, _height(high, lat, lon) >= wanted
        if is_up is rising and was_up is not rising and high > after:
            moment = _passing(low, high, lat, lon, wanted, rising)
            if moment > after:
                return moment
        low = high
    return None


def _passing(low: float, high: float, lat: float, lon: float, wanted: float, rising: bool) -> float:
    while high - low > 0.1:
        middle = (low + high) / 2
        if (_height(middle, lat, lon) >= wanted) is rising:
            high = middle
        else:
            low = middle
    return float(round(high))

# SPDX-License-Identifier: MIT
"""Readers of what options take: numbers within their bounds, and JSON.

Given to argparse as `type`: an `ArgumentTypeError` becomes one line and exit code 2.  Python's own
`float` would take ``nan``, with which every wait is endless, and ``-1``.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..exceptions import MiniqError

#: No wait is longer: 30 years.
MAX_S = 1e9


def count(text: str) -> int:
    """Return a whole number from 1 up."""
    return _whole(text, 1)


def count_or_0(text: str) -> int:
    """Return a whole number from 0 up."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up")
    return value


def priority(text: str) -> int:
    """Return a whole number from 0 to 255."""
    value = _whole(text, 0)
    if value > 255:
        raise argparse.ArgumentTypeError(f"{text!r} is not a priority: 0 to 255")
    return value


def seconds(text: str) -> float:
    """Return a number of seconds above 0."""
    value = _number(text)
    if not 0 < value < MAX_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def seconds_or_0(text: str) -> float:
    """Return a number of seconds, which may be 0."""
    value = _number(text)
    if not 0 <= value < MAX_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 up")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0


def json_argument(text: str, flag: str, kind: type) -> Any:
    """Return the value of a flag that takes JSON of a kind; `MiniqError` says what is wrong with it."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise MiniqError(f"{flag} {text!r} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise MiniqError(f"{flag} must be a JSON {'array' if kind is list else 'object'}, not {text!r}")
    return value

# SPDX-License-Identifier: MIT
"""Waiting for facts: look, and look again until it is so or the deadline is over.

No test sleeps for a number of seconds and hopes.  A deadline is there for the case that the test
fails, so it may be generous: nothing waits for it to pass.
"""

from __future__ import annotations

import time
from typing import Any, Callable, TypeVar, Union

T = TypeVar("T")


def wait_until(
    predicate: Callable[[], T],
    timeout_s: float = 10.0,
    what: Union[str, Callable[[], Any]] = "",
    pause_s: float = 0.005,
) -> T:
    """Return the first true value of `predicate`; `AssertionError` when `timeout_s` is over.

    `what` names the fact that was waited for; a callable is asked at the end and may tell more.
    """
    deadline_mono = time.monotonic() + timeout_s
    while True:
        found = predicate()
        if found:
            return found
        if time.monotonic() > deadline_mono:
            told = what() if callable(what) else what
            raise AssertionError(f"not so within {timeout_s:g} s: {told or predicate}")
        time.sleep(pause_s)

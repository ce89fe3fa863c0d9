# SPDX-License-Identifier: MIT
"""The worker's one loop: readiness of descriptors, one heap of timers, calls from other threads."""

from __future__ import annotations

import time
from typing import Any, Callable, Optional


class Timer:
    """A call that is due at a moment; `cancel` takes it back."""

    def cancel(self) -> None:
        """Never call it; harmless when it already ran."""
        raise NotImplementedError


class Loop:
    """Calls callbacks, in one thread.

    `clock` gives monotonic seconds (durations), `wall` epoch seconds (people and wire).  Both are
    arguments, so that tests can turn the hands.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        selector: Any = None,
    ) -> None:
        raise NotImplementedError

    def mono(self) -> float:
        """Return monotonic seconds."""
        raise NotImplementedError

    def now(self) -> float:
        """Return epoch seconds."""
        raise NotImplementedError

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> None:
        """Call in the next turn."""
        raise NotImplementedError

    def call_later(self, delay_s: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Call after `delay_s` seconds."""
        raise NotImplementedError

    def call_at(self, mono: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Call at a moment of `mono()`."""
        raise NotImplementedError

    def call_threadsafe(self, callback: Callable[..., Any], *args: Any) -> None:
        """Call in the next turn; may be called from any thread or a signal handler."""
        raise NotImplementedError

    def add_reader(self, fd: int, callback: Callable[[], Any]) -> None:
        """Call whenever `fd` is readable."""
        raise NotImplementedError

    def remove_reader(self, fd: int) -> None:
        """Stop watching; harmless when not watched."""
        raise NotImplementedError

    def add_writer(self, fd: int, callback: Callable[[], Any]) -> None:
        """Call whenever `fd` is writable."""
        raise NotImplementedError

    def remove_writer(self, fd: int) -> None:
        """Stop watching; harmless when not watched."""
        raise NotImplementedError

    def next_due(self) -> Optional[float]:
        """Return when the next timer is due (0.0 = work is waiting now), None when nothing is."""
        raise NotImplementedError

    def run_once(self, timeout_s: Optional[float] = None) -> None:
        """Do one turn: wait for what comes first (at most `timeout_s`), then call it all."""
        raise NotImplementedError

    def run_forever(self) -> None:
        """Turn until `stop`."""
        raise NotImplementedError

    def stop(self) -> None:
        """Leave `run_forever` after this turn; may be called from any thread."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of all descriptors and timers."""
        raise NotImplementedError

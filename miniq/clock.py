# SPDX-License-Identifier: MIT
"""The logical clock of an app: numbers that order events of many machines (Lamport, 1978).

A number goes out with every event, command and reply; whoever gets one goes on from there.  It says
what came before what among those who hear of each other, whatever their wall clocks say.
"""

from __future__ import annotations

import threading


class LamportClock:
    """A number that only grows.  May be used from any thread."""

    __slots__ = ("value", "_lock")

    def __init__(self, value: int = 0) -> None:
        self.value = value
        self._lock = threading.Lock()

    def forward(self) -> int:
        """Count one event of our own; return its number."""
        with self._lock:
            self.value += 1
            return self.value

    def adjust(self, other: int) -> int:
        """Count the arrival of something that had the number `other`; return its number here."""
        with self._lock:
            self.value = max(self.value, other) + 1
            return self.value

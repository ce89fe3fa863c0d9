# SPDX-License-Identifier: MIT
"""Shows that a loop turns: writes its health file (see `health`) every second, from the loop itself."""

from __future__ import annotations

from typing import Callable, Optional

from .health import INTERVAL_S, NO_BROKER, HealthFile
from .log import get_logger
from .loop import Loop, Timer

logger = get_logger(__name__)


class LifeSign:
    """The file `path` of a node, from `start` to `stop`; `state` is asked for what to write.

    In the loop's thread.  A file that cannot be written is told once, and tried again.
    """

    def __init__(self, loop: Loop, path: str, node: str, kind: str, state: Callable[[], str]) -> None:
        self._loop = loop
        self._file = HealthFile(path, node, kind)
        self._state = state
        self._timer: Optional[Timer] = None
        self._away_since: Optional[float] = None
        self._failed = False

    def start(self) -> None:
        """Write now, and every second from now on."""
        self.show()
        self._timer = self._loop.call_later(INTERVAL_S, self.start)

    def show(self) -> None:
        """Write now."""
        state, now = self._state(), self._loop.now()
        self._away_since = (self._away_since or now) if state == NO_BROKER else None
        try:
            self._file.show(state, now, self._loop.mono(), self._away_since)
            self._failed = False
        except OSError as error:
            if not self._failed:
                logger.warning("Health file %s: %s; it is tried again.", self._file.path, error)
            self._failed = True

    def stop(self) -> None:
        """Take the file away."""
        if self._timer is not None:
            self._timer.cancel()
        try:
            self._file.remove()
        except OSError as error:
            logger.warning("Health file %s: %s; it stays behind.", self._file.path, error)

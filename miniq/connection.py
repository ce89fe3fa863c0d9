# SPDX-License-Identifier: MIT
"""What ``app.connection()`` returns: the way to the broker, for programs that hand it on.

Connections are made and shared by miniq itself.  This one is for code written for Celery, which opens
one and gives it to a receiver of events, to a command, or to nobody, just to see whether it opens.
"""

from __future__ import annotations

import time
from typing import Any, Callable, Optional

from .exceptions import OperationalError
from .text import mask_url
from .transports.base import Transport, transport_class

#: Seconds between two tries to reach a broker.
FIRST_PAUSE_S, MORE_PAUSE_S, LONGEST_PAUSE_S = 2.0, 2.0, 30.0


class Connection:
    """A way to the broker of `app`, or to the one at `url`; opens at `connect`.  A context manager."""

    def __init__(self, app: Any, url: Optional[str] = None, write: bool = False) -> None:
        self.app = app
        self.url: str = url or app.broker_url(write)
        self._transport: Optional[Transport] = None

    def __repr__(self) -> str:
        return f"<Connection: {self.as_uri()}>"

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def as_uri(self, include_password: bool = False) -> str:
        """Return the broker's URL."""
        return self.url if include_password else mask_url(self.url)

    @property
    def connected(self) -> bool:
        """Whether `connect` has reached the broker."""
        return self._transport is not None

    def connect(self) -> "Connection":
        """Reach the broker; raises `OperationalError` where that fails."""
        if self._transport is None:
            app = self.app
            transport = transport_class(self.url)(self.url, app.broker_options(self.url), app.wall)
            try:
                # A question that every broker has to answer, and that changes nothing.
                transport.sizes((app.conf.task_default_queue,))
            except BaseException:
                transport.close()
                raise
            self._transport = transport
        return self

    def ensure_connection(
        self,
        errback: Optional[Callable[[Exception, float], Any]] = None,
        max_retries: Optional[int] = None,
        interval_start: float = FIRST_PAUSE_S,
        interval_step: float = MORE_PAUSE_S,
        interval_max: float = LONGEST_PAUSE_S,
        timeout: Optional[float] = None,
        **options: Any,
    ) -> "Connection":
        """Do the same, and try again `max_retries` times (None = for ever) with growing pauses (seconds).

        No try begins more than `timeout` seconds after the first.  `errback` gets each error and the pause
        after it.  Other options are Celery's and have no effect.
        """
        tries, pause_s = 0, interval_start
        until_mono = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return self.connect()
            except OperationalError as error:
                if max_retries is not None and tries >= max_retries:
                    raise
                if until_mono is not None and time.monotonic() + pause_s > until_mono:
                    raise
                if errback is not None:
                    errback(error, pause_s)
            tries += 1
            time.sleep(pause_s)
            pause_s = min(pause_s + interval_step, interval_max)

    def close(self) -> None:
        """Let go of the broker."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    release = close

# SPDX-License-Identifier: MIT
"""What a worker tells: that it lives, and, while anybody asked for it, what becomes of its tasks.

Events of tasks are collected and go out together a moment later, over a transport of their own: what
is wrong with events never holds up a task.  While they are off, a task costs one look at `enabled`.
"""

from __future__ import annotations

import os
import platform
from typing import Any, Callable, Dict, Iterable, Optional, Tuple

from .. import __version__
from ..events.dispatcher import EventDispatcher
from ..exceptions import MiniqError
from ..log import get_logger
from ..loop import Loop, Timer
from ..pools.base import signal_number
from ..transports.base import Transport
from .request import Request

logger = get_logger(__name__)

#: Seconds between two heartbeats, unless the worker is told otherwise; Celery's.
HEARTBEAT_INTERVAL_S = 2.0
#: Seconds that events of tasks are collected.
COLLECT_S = 0.05
#: Seconds for one message; the loop stands still meanwhile.
SEND_TIMEOUT_S = 2.0
#: Seconds between two tries while the broker is away.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
#: Characters kept of a traceback.
MAX_TRACEBACK_CHARS = 8192


def _nothing_runs() -> Tuple[int, int]:
    return 0, 0


class WorkerEvents:
    """The events of one worker; all methods are called in the loop's thread.

    `transport` is a new one of the app's unless given.  `counts` returns how many tasks run, and how
    many have begun.  Nothing is sent before `start`.
    """

    def __init__(
        self,
        app: Any,
        loop: Loop,
        hostname: str,
        task_events: bool = False,
        heartbeat_interval_s: Optional[float] = None,
        transport: Optional[Transport] = None,
        counts: Callable[[], Tuple[int, int]] = _nothing_runs,
    ) -> None:
        self.app = app
        self.loop = loop
        self.hostname = hostname
        #: Whether events of tasks are sent.
        self.enabled = task_events
        self.heartbeat_interval_s = heartbeat_interval_s
        self.counts = counts
        self._given_transport = transport
        self._transport: Optional[Transport] = None
        self._dispatcher: Optional[EventDispatcher] = None
        self._beat: Optional[Timer] = None
        self._flush: Optional[Timer] = None
        self._next_try_mono = 0.0
        self._pause_s = FIRST_PAUSE_S
        #: Handed to a process behind another task: their start is told at their end.
        self._ahead: Dict[int, Request] = {}

    # -- life

    def start(self) -> None:
        """Say that the worker is there; begin to send."""
        self._transport = self._given_transport or self.app.producer.new_transport(write=True)
        self._dispatcher = EventDispatcher(
            app=self.app,
            hostname=self.hostname,
            buffer_group={"task"},
            on_send_buffered=self._flush_soon,  # for events of one's own
            transport=self._transport,
            timeout_s=SEND_TIMEOUT_S,
        )
        if self.heartbeat_interval_s:
            self._tell("worker-online")
            self._beat = self.loop.call_later(self.heartbeat_interval_s, self._beat_again)

    def close(self) -> None:
        """Say good-bye; send what is left, unless the broker is away."""
        for timer in (self._beat, self._flush):
            if timer is not None:
                timer.cancel()
        self.enabled = False
        dispatcher, transport = self._dispatcher, self._transport
        if dispatcher is not None and transport is not None:
            if not dispatcher.is_away:
                if self.heartbeat_interval_s:
                    self._tell("worker-offline")
                self._safely(dispatcher.close)
            if transport is not self._given_transport:
                self._safely(transport.close)
        self._dispatcher = None

    def enable(self) -> bool:
        """Send events of tasks from now on; return whether that is a change."""
        changed = not self.enabled
        self.enabled = True
        return changed

    def disable(self) -> bool:
        """Send none from now on; return whether that is a change."""
        changed = self.enabled
        self.enabled = False
        self._ahead.clear()
        return changed

    def heartbeat(self) -> None:
        """Say now that the worker lives."""
        if self.heartbeat_interval_s:
            self._tell("worker-heartbeat")

    def _beat_again(self) -> None:
        self._beat = self.loop.call_later(self.heartbeat_interval_s or HEARTBEAT_INTERVAL_S, self._beat_again)
        self._tell("worker-heartbeat")

    def _tell(self, kind: str) -> None:
        if self.loop.mono() < self._next_try_mono:
            return
        active, processed = self.counts()
        self.send(
            kind,
            freq=self.heartbeat_interval_s,
            active=active,
            processed=processed,
            loadavg=load_average(),
            sw_ident="miniq",
            sw_ver=__version__,
            sw_sys=platform.system(),
        )

    def send(self, kind: str, **fields: Any) -> None:
        """Send an event of any type."""
        dispatcher = self._dispatcher
        if dispatcher is not None:
            self._safely(lambda: dispatcher.send(kind, **fields))
            self._see_how_it_went(dispatcher)

    def _flush_soon(self) -> None:
        if self._flush is None:
            wait_s = max(COLLECT_S, self._next_try_mono - self.loop.mono())
            self._flush = self.loop.call_later(wait_s, self._flush_now)

    def _flush_now(self) -> None:
        self._flush = None
        dispatcher = self._dispatcher
        if dispatcher is not None:
            self._safely(dispatcher.flush)
            self._see_how_it_went(dispatcher)

    def _see_how_it_went(self, dispatcher: EventDispatcher) -> None:
        """After a failure wait, longer each time: a try may stop the loop for `SEND_TIMEOUT_S`."""
        if not dispatcher.is_away:
            self._pause_s, self._next_try_mono = FIRST_PAUSE_S, 0.0
        elif self.loop.mono() >= self._next_try_mono:
            self._next_try_mono = self.loop.mono() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._flush_soon()

    def _safely(self, call: Callable[[], Any]) -> None:
        """Do it; what only the operator can mend ends the events, and not the worker."""
        try:
            call()
        except MiniqError as error:
            logger.error("Worker %s tells nothing any more: its events are refused: %s", self.hostname, error)
            self._dispatcher = None
            self.enabled = False

    # -- what becomes of tasks; to be called while `enabled`

    def task(self, kind: str, request: Request, **fields: Any) -> None:
        """Send an event of a task, unless it is one of which none are to be sent."""
        if request.task.send_events:
            self.tell_of_task(kind, {"uuid": request.id, **fields})

    def tell_of_task(self, kind: str, fields: Dict[str, Any]) -> None:
        """Put an event of a task among those that go out in a moment."""
        if self._dispatcher is not None:
            self._dispatcher.collect(kind, fields)
            if self._flush is None:
                self._flush_soon()

    def received(self, request: Request) -> None:
        """It was taken, and is going to be started."""
        headers = request.delivery.message.headers
        self.task(
            "task-received",
            request,
            name=headers.get("shadow") or request.name,
            args=headers.get("argsrepr") or "",
            kwargs=headers.get("kwargsrepr") or "",
            root_id=headers.get("root_id"),
            parent_id=headers.get("parent_id"),
            retries=headers.get("retries") or 0,
            eta=headers.get("eta"),
            expires=headers.get("expires"),
        )

    def started(self, request: Request) -> None:
        """It was handed to a free slot."""
        self.task("task-started", request)

    def handed_ahead(self, requests: Iterable[Request]) -> None:
        """They wait in a process behind another task."""
        for request in requests:
            self._ahead[id(request)] = request

    def taken_back(self, request: Request) -> None:
        """It did not begin there."""
        self._ahead.pop(id(request), None)

    def ended(self, request: Request, runtime_s: float) -> None:
        """It is over, however it ended: tell of its start, if that could not be seen."""
        if self._ahead and self._ahead.pop(id(request), None) is not None:
            self.task("task-started", request, timestamp=self.app.wall() - runtime_s)

    def succeeded(self, request: Request, result: str, runtime_s: float) -> None:
        """It returned."""
        self.task("task-succeeded", request, result=result, runtime=runtime_s)

    def failed(self, kind: str, request: Request, exception: str, traceback: str) -> None:
        """It raised (``task-failed``), or is to be run again (``task-retried``)."""
        if len(traceback) > MAX_TRACEBACK_CHARS:
            traceback = f"...\n{traceback[-MAX_TRACEBACK_CHARS:]}"
        self.task(kind, request, exception=exception, traceback=traceback)

    def revoked(self, task_id: str, terminated: bool, signum: Any, expired: bool) -> None:
        """It does not run, or was stopped; `signum` is a signal's name."""
        number = signal_number(signum) if signum else None
        told = {"uuid": task_id, "terminated": terminated, "signum": number, "expired": expired}
        self.tell_of_task("task-revoked", told)


def load_average() -> Tuple[float, ...]:
    """Return the load of this machine in the last 1, 5 and 15 minutes; zeros where that is not known."""
    if not hasattr(os, "getloadavg"):
        return 0.0, 0.0, 0.0
    return tuple(round(load, 2) for load in os.getloadavg())

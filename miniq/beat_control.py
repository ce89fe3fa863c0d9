# SPDX-License-Identifier: MIT
"""Beat's side of remote control: answers ``ping``, so that `inspect ping` shows which beats live.

All other commands are for workers.  Of beats with one node name each has a queue of its own, so all
of them answer.  A beat that has not finished a turn for too long stays silent.

Source: Celery 5.7 (setting `beat_enable_remote_control`).
"""

from __future__ import annotations

from typing import Any, Callable, Mapping

from .control import control_queue
from .loop import Loop
from .signatures import new_task_id
from .transports.base import Transport
from .worker.control import NO_REPLY, Commands
from .worker.panel import ok


class Speaker:
    """As much of a worker as answering needs."""

    def __init__(self, app: Any, hostname: str, transport: Transport) -> None:
        self.app = app
        self.hostname = hostname
        self.transport = transport


class BeatCommands(Commands):
    """Listens in beat's loop, over a connection of its own; `is_well` says whether to answer.

    Raises `OperationalError` where the broker cannot be reached.
    """

    def __init__(self, app: Any, hostname: str, loop: Loop, is_well: Callable[[], bool]) -> None:
        transport = self._heard_over = app.producer.new_transport(write=False)
        queue = control_queue(app, hostname, new_task_id())
        try:
            transport.declare(queue)
            consumer = transport.consumer(hostname, [queue])
        except BaseException:
            transport.close()
            raise
        # Answers go the way of the messages: a connection that only answers would not be known to be dead.
        speaker: Any = Speaker(app, hostname, app.producer.transport)
        super().__init__(speaker, loop, consumer)
        self._is_well = is_well

    def start(self) -> None:
        """Begin to listen."""
        self.mailbox.start()

    def close(self) -> None:
        """Stop listening, and let go of the connection."""
        super().close()
        self._heard_over.close()

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Answer a ping; nothing else is for beat."""
        return ok("pong") if name == "ping" and self._is_well() else NO_REPLY

    def _meet(self, headers: Mapping[str, Any], name: str, arguments: Any) -> None:
        """Take no notice of beats with the same name: that is in order."""

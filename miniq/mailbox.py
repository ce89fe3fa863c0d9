# SPDX-License-Identifier: MIT
"""Private queues: those on which a worker hears commands, a caller its replies, a monitor events.

    Mailbox   reads such a queue within a loop that somebody turns
    Inbox     reads one with a loop of its own, by calls that block until a deadline

What comes is acknowledged as it is taken: it is news, not work, and nobody else reads it.  A lost
connection is made anew by the consumer; what was sent meanwhile is the broker's to keep or drop.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, Callable, Deque, List, Optional

from .exceptions import OperationalError
from .loop import Loop, Timer
from .message import Delivery, Message
from .routing import Queue
from .transports.base import Consumer

logger = logging.getLogger(__name__)

#: Messages taken in one turn.
BATCH = 100
#: Seconds between two looks for a message whose wake-up was missed.
LOOK_INTERVAL_S = 0.5


class Mailbox:
    """Hands every message of a consumer to `receive`, in the thread that turns `loop`."""

    def __init__(self, loop: Loop, consumer: Consumer, receive: Callable[[Message], Any]) -> None:
        self.loop = loop
        self.consumer = consumer
        self.receive = receive
        self._net: Optional[Timer] = None
        self._fd: Optional[int] = None
        self._again: Optional[Timer] = None

    def start(self) -> None:
        """Begin to listen."""
        self._look_later()
        self._take()

    def close(self) -> None:
        """Stop listening; the queue goes with its consumer, or when it expires."""
        self._unwatch()
        for timer in (self._net, self._again):
            if timer is not None:
                timer.cancel()
        self.consumer.close()

    def _watch(self) -> None:
        if self._fd is None or self.consumer.moved:
            self._unwatch()
            fd = self._fd = self.consumer.fileno()
            if fd is not None:
                self.loop.add_reader(fd, self._on_readable)

    def _unwatch(self) -> None:
        if self._fd is not None:
            self.loop.remove_reader(self._fd)
            self._fd = None

    def _look_later(self) -> None:
        if self.consumer.poll_interval_s is not None:
            interval_s = max(self.consumer.poll_interval_s, LOOK_INTERVAL_S)
            self._net = self.loop.call_later(interval_s, self._look)

    def _look(self) -> None:
        try:
            if self.consumer.changed() or self.consumer.moved:
                self._take()
        except OperationalError as error:
            self._trouble(error)
        self._look_later()

    def _on_readable(self) -> None:
        try:
            self.consumer.on_readable()
        except OperationalError as error:
            self._trouble(error)
        else:
            self._take()

    def _take(self) -> None:
        deliveries: List[Delivery] = []
        in_trouble = False
        try:
            deliveries = self.consumer.poll(BATCH)
            for delivery in deliveries:
                self.consumer.ack(delivery)
            self._watch()
        except OperationalError as error:
            # What was taken nobody else gets: it is handed out all the same.
            self._trouble(error)
            in_trouble = True
        for delivery in deliveries:
            self.receive(delivery.message)
        # What was read together with an answer (to an acknowledgement, say) makes no descriptor readable.
        if not in_trouble and (len(deliveries) == BATCH or self.consumer.woken):
            self.loop.call_soon(self._take)

    def _trouble(self, error: OperationalError) -> None:
        """Look again soon; a broken descriptor would be ready all the time."""
        logger.debug("private queue: %s", error)
        self._unwatch()
        if self._again is None:
            self._again = self.loop.call_later(LOOK_INTERVAL_S, self._take_again)

    def _take_again(self) -> None:
        self._again = None
        self._take()


class Inbox:
    """A private queue of this thread, with a connection of its own; a context manager.

    Makes the queue, so that what is sent from then on arrives.  Errors as of a `Transport`, while it
    is made; afterwards a broken connection only means that nothing comes until it is back.
    """

    def __init__(self, app: Any, queue: Queue) -> None:
        self.transport = app.producer.new_transport(write=False)
        self._loop = Loop(wall=app.wall)
        self._arrived: Deque[Message] = deque()
        try:
            self.transport.declare(queue)
            consumer = self.transport.consumer(queue.name, [queue])
            self._mailbox = Mailbox(self._loop, consumer, self._arrived.append)
            self._mailbox.start()
        except BaseException:
            self._loop.close()
            self.transport.close()
            raise

    def receive(self, timeout_s: float) -> Optional[Message]:
        """Return the next message, None when none came within `timeout_s`."""
        until_mono = self._loop.mono() + timeout_s
        while not self._arrived:
            left_s = until_mono - self._loop.mono()
            self._loop.run_once(max(left_s, 0.0))
            if left_s <= 0:
                break
        return self._arrived.popleft() if self._arrived else None

    def close(self) -> None:
        """Let go of queue and connection."""
        try:
            self._mailbox.close()
        except OperationalError as error:
            logger.debug("while a private queue was left: %s", error)
        self._loop.close()
        try:
            self.transport.close()
        except OperationalError as error:
            logger.debug("while a private queue was left: %s", error)

    def __enter__(self) -> "Inbox":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

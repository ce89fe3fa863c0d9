# SPDX-License-Identifier: MIT
"""A consumer of RabbitMQ whose `poll` waits until the server has pushed what it has.

Not by the clock: a call on the consumer's channel is answered when all before it is done, and what
the server still counts as ready then is on its way to somebody.
"""

from __future__ import annotations

import time
from typing import Any, Dict, Iterable, List

from servers import RabbitServer
from waiting import wait_until

from miniq.connections.amqp import ChannelError
from miniq.message import Delivery
from miniq.routing import Queue
from miniq.transports.amqp import AmqpTransport
from miniq.transports.amqp_consumer import AmqpConsumer

#: Seconds for the server to push.
PUSH_TIMEOUT_S = 20.0


class Patient(AmqpConsumer):
    """A consumer that gets, with one `poll`, all that the server has for it, up to the limit."""

    transport: "PatientTransport"

    def poll(self, limit: int) -> List[Delivery]:
        found = super().poll(limit)
        deadline_mono = time.monotonic() + PUSH_TIMEOUT_S
        while len(found) < limit:
            self.catch_up()
            ready = self.transport.ready(self.queue_names)
            self.catch_up()
            more = super().poll(limit - len(found))
            found += more
            if not more and not sum(ready.values()):
                break
            assert more or time.monotonic() < deadline_mono, f"not pushed: {ready}"
        return found

    def catch_up(self) -> None:
        """Return when the server has done what it was told, and what it pushed before is here."""
        try:
            self._connected().call("channel.flow", active=True)
        except ChannelError:
            pass  # the next poll opens another

    def kept_up(self) -> bool:
        """Do the upkeep as a worker does, and return True: for conditions."""
        self.housekeep()
        return True

    def add_queue(self, queue: Queue) -> None:
        super().add_queue(self.transport.kind(queue))


class PatientTransport(AmqpTransport):
    """A transport whose consumers are patient, and which may declare another `kind` of queue."""

    def kind(self, queue: Queue) -> Queue:
        """Return the queue as it is declared here."""
        return queue

    def declare(self, queue: Queue, timeout_s: Any = None) -> None:
        super().declare(self.kind(queue), timeout_s)

    def consumer(self, node: str, queues: Iterable[Queue]) -> Patient:
        consumer = Patient(self.link, node, map(self.kind, queues))
        consumer.transport = self
        return consumer

    def ready(self, names: Iterable[str]) -> Dict[str, int]:
        """Return how many messages of these queues nobody has, without those that are empty."""
        wanted = set(names)
        return {size.queue: size.ready for size in self.sizes(wanted) if size.queue in wanted and size.ready}


def wait_until_gone(server: RabbitServer, name: str) -> None:
    """Wait until the server has no connection of this name, and has put back what it held."""

    def is_gone() -> bool:
        return all(row["client_properties"].get("connection_name") != name for row in server.connections())

    wait_until(is_gone, 10, f"the server sees that {name} is gone")

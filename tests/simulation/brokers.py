# SPDX-License-Identifier: MIT
"""The two kinds of brokers a fleet plays on, and what the fleet asks of them.

`MemoryFleetBroker` has transactions that roll back; the death of a worker is seen some time after it.
`RedisFleetBroker` does a turn in steps that stay done, sees the dead by their leases or, on their own
machine, by their files, and may take a worker for dead that only stood still.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, Optional, Tuple

from simulation.redis_model import Database
from simulation.redis_seams import (
    URL,
    Machine,
    Recorder,
    SimRedisBackend,
    SimRedisTransport,
    SimServer,
    number_in,
)
from simulation.seams import NUMBER, SimConsumer, SimJournal, SimSelector, SimTransport
from simulation.world import CRASH, LOST, World

from miniq.backends.base import Backend, StoredResult
from miniq.backends.memory import MemoryBackend
from miniq.backends.redis import _stored
from miniq.backends.stored import KEY_PREFIX
from miniq.connections import memory
from miniq.connections.memory import RESERVED, STARTED_EARLY, STARTED_LATE, MemoryBroker
from miniq.connections.redis import Options
from miniq.connections.redis_session import Layout
from miniq.transports.memory import MemoryTransport


class FleetBroker:
    """Broker and result backend of one schedule."""

    url: str
    #: A worker may stand still for so long (seconds).
    longest_stall_s = 1.0

    @property
    def version(self) -> int:
        """A number that grows with every change."""
        raise NotImplementedError

    def producer(self) -> SimTransport:
        """Return the transport of those who send: they live through everything, lost connections included."""
        raise NotImplementedError

    def backend(self) -> Backend:
        """Return a result backend without faults."""
        raise NotImplementedError

    def worker(self, who: str, selector: SimSelector, variant: Any) -> Tuple[SimTransport, Any]:
        """Return transport and result backend of one more worker."""
        raise NotImplementedError

    def died(self, who: str) -> None:
        """The process of a worker is no more."""

    def forget_leaving(self, node: str, transport: SimTransport) -> None:
        """A worker is about to leave as it should."""

    def see_dead(self, node: str, transport: SimTransport) -> None:
        """The death of a worker is noticed."""

    def left(self) -> Iterator[str]:
        """Yield what is there of messages of tasks."""
        raise NotImplementedError

    def disturb(self, who: str) -> None:
        """Perhaps let something happen that a worker has no part in."""

    def results(self) -> Iterator[Tuple[str, StoredResult]]:
        """Yield the results that may have changed since the last call; one that did not is the same."""
        raise NotImplementedError

    def dead_letters(self) -> int:
        """Return how many there are."""
        raise NotImplementedError

    def close(self) -> None:
        """Forget everything."""


class MemoryFleetBroker(FleetBroker):
    """A broker in memory."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.url = f"memory://{world.broker_name}"
        memory.reset(world.broker_name)
        self.broker = MemoryBroker.get(world.broker_name)
        self.broker.random.seed(f"{world.seed} broker")

    @property
    def version(self) -> int:
        return self.broker.version

    def producer(self) -> SimTransport:
        return SimTransport(self._transport(), self.world, "producer", (LOST,))

    def _transport(self) -> MemoryTransport:
        return MemoryTransport(self.url, {}, self.world.now)

    def backend(self) -> Backend:
        return MemoryBackend(self.url, {}, self.world.now)

    def worker(self, who: str, selector: SimSelector, variant: Any) -> Tuple[SimTransport, Any]:
        transport = SimTransport(variant.transport(self._transport()), self.world, who, selector=selector)
        if self.world.plan.random() < 0.5:
            transport.journal = SimJournal(self.world)
        return transport, self.backend()

    def forget_leaving(self, node: str, transport: SimTransport) -> None:
        self._record_losses(node, transport)

    def see_dead(self, node: str, transport: SimTransport) -> None:
        self._record_losses(node, transport)
        self.broker.owner_lost(node)

    def _record_losses(self, node: str, transport: SimTransport) -> None:
        """Note which messages had been started by a worker that is no more.

        Those which its journal knows not to have begun count as not started, as in the SQLite transport.
        """
        ids = {owner.id for owner in self.broker.owners.values() if owner.node == node}
        for row in list(self.broker.rows.values()):
            number = row.message.headers.get(NUMBER)
            if row.owner not in ids or row.state not in (STARTED_EARLY, STARTED_LATE) or number is None:
                continue
            copy, token = self.world.copies[number], transport.tokens.get(row.id)
            if token is not None and transport.journal is not None and not transport.journal.has_begun(token):
                with self.broker:
                    self.broker.change(row, RESERVED, owner=row.owner)
                    row.deliveries -= 1
                self.world.released(transport.who, copy, True)
            else:
                self.world.lost(transport.who, copy, "its worker is gone")

    def left(self) -> Iterator[str]:
        for row in self.broker.rows.values():
            if NUMBER in row.message.headers:
                yield f"{row.message!r} in state {row.state}, owner {row.owner}"

    def results(self) -> Iterator[Tuple[str, StoredResult]]:
        for task_id, (result, _) in self.broker.results.items():
            yield task_id, result

    def dead_letters(self) -> int:
        return len(self.broker.dead_letters)

    def close(self) -> None:
        memory.reset(self.world.broker_name)


class RedisFleetBroker(FleetBroker):
    """A Redis server for both; leases are short or as long as by default."""

    url = URL

    def __init__(self, world: World) -> None:
        self.world = world
        lease_s = world.plan.choice((1.0, 4.0, 30.0))
        self.options = {"lease": lease_s}
        self.longest_stall_s = min(3 * lease_s, 10.0)
        self.layout = Layout(Options.read(self.options, URL))
        self.database = Database(world.now, self.layout)
        self.recorder = Recorder(world)
        self.database.watch = self.recorder
        self.machines = [Machine(), world.plan.choice((None, Machine()))]
        self._servers: Dict[str, Tuple[SimServer, SimRedisTransport]] = {}

    @property
    def version(self) -> int:
        return self.database.version

    def producer(self) -> SimTransport:
        server = SimServer(self.world, self.database, "producer", (LOST,))
        return self._wrapped(self._transport(server, None), "producer")

    def _transport(self, server: SimServer, machine: Optional[Machine]) -> SimRedisTransport:
        return SimRedisTransport(server, self.options, machine, self.recorder)

    def _wrapped(self, transport: Any, who: str) -> SimTransport:
        # Faults strike the connection.
        made = SimTransport(transport, self.world, who, ())
        made.kinds_before_commit = made.kinds_after_commit = ()
        made.consumer_class = SimConsumer
        return made

    def backend(self) -> Backend:
        return SimRedisBackend(SimServer(self.world, self.database, "child"), {})

    def worker(self, who: str, selector: SimSelector, variant: Any) -> Tuple[SimTransport, Any]:
        server = SimServer(self.world, self.database, who, (CRASH, LOST), selector)
        server.deaf = variant.deaf
        transport = self._transport(server, self.world.plan.choice(self.machines))
        self._servers[who] = server, transport
        return self._wrapped(variant.transport(transport), who), SimRedisBackend(server, {})

    def died(self, who: str) -> None:
        server, transport = self._servers[who]
        server.close()
        for owner, worker in self.recorder.workers.items():
            if worker == who and transport.link.machine is not None:
                transport.link.machine.living.discard(owner)

    def disturb(self, who: str) -> None:
        world, (server, _) = self.world, self._servers[who]
        connections = [one for one in server.connections if one in self.database.clients]
        if connections and world.strikes(world.fault_rate / 2):
            world.note(who, "FAULT a connection of it is closed")
            world.order.choice(connections).kill()
        if world.strikes(world.fault_rate / 2):
            # There are workers of Celery's on the same queues.
            self.database.restore_overdue()

    def left(self) -> Iterator[str]:
        layout, database = self.layout, self.database
        for key in list(database.names):
            found = database.get(key)
            if found is None or isinstance(found, bytes) or key == layout.dead.encode():
                continue
            for item in found.values() if key == layout.unacked.encode() else found:
                number = number_in(item)
                if number is not None:
                    yield f"#{number} in {key!r}"

    def results(self) -> Iterator[Tuple[str, StoredResult]]:
        written, self.database.written = self.database.written, []
        for key in written:
            value = self.database.get(key)
            if value is not None and key.startswith(KEY_PREFIX.encode()):
                task_id = key[len(KEY_PREFIX) :].decode()
                yield task_id, _stored(task_id, value, None)

    def dead_letters(self) -> int:
        return len(self.database.get(self.layout.dead.encode()) or ())

# SPDX-License-Identifier: MIT
"""The real loop, transport and backend of a worker, with faults around their calls.

What is not written out here is handed on to the real object.  Descriptors are simulated too: a
selector of our own knows which are readable, so that the loop turns without the system's.
"""

from __future__ import annotations

import selectors
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    Union,
)

from simulation.world import CRASH, LOST, REFUSED, Call, Copy, Transaction, World

from miniq import states
from miniq.backends.base import StoredResult
from miniq.connections.memory import READY, MemoryBroker
from miniq.loop import Loop
from miniq.message import Delivery
from miniq.pools.base import Lost
from miniq.routing import Queue
from miniq.runner import Outcome
from miniq.times import to_epoch
from miniq.transports.base import Publication

#: Header by which a message is known from its publication to its end.
NUMBER = "simulation_number"
#: File descriptors that no process has.
FIRST_FD = 1_000_000


# -- the loop ------------------------------------------------------------------------------------


class SimSelector(selectors.BaseSelector):
    """Knows which of the simulated descriptors are readable; never waits."""

    def __init__(self) -> None:
        self._keys: Dict[int, selectors.SelectorKey] = {}
        self.readable: Set[int] = set()

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self._keys[fileobj] = selectors.SelectorKey(fileobj, fileobj, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def select(self, timeout: Optional[float] = None) -> List[Tuple[selectors.SelectorKey, int]]:
        return [(self._keys[fd], selectors.EVENT_READ) for fd in sorted(self.readable) if fd in self._keys]

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys


class SimLoop(Loop):
    """A worker's loop on virtual time; `offset_s` sets its monotonic clock apart from the others."""

    def __init__(self, world: World, offset_s: float) -> None:
        self.sim_selector = SimSelector()
        self.offset_s = offset_s
        #: The worker has told its loop to stop.
        self.left = False
        super().__init__(lambda: world.t + offset_s, world.now, self.sim_selector)

    def due(self) -> float:
        """Return when it wants to turn (virtual seconds; in the past = now)."""
        if self.sim_selector.select():
            return 0.0
        due = self.next_due()
        return float("inf") if due is None else due - self.offset_s

    def stop(self) -> None:
        self.left = True


# -- stores --------------------------------------------------------------------------------------


class Proxy:
    """Hands every call on to the real object; a variant overrides what it does differently."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class ConsumerProxy(Proxy):
    """The same for a consumer, whose limit is set by its worker."""

    @property
    def delivery_limit(self) -> int:
        """The limit of the real consumer."""
        limit: int = self.inner.delivery_limit
        return limit

    @delivery_limit.setter
    def delivery_limit(self, value: int) -> None:
        self.inner.delivery_limit = value


class Faulty(Proxy):
    """Puts faults around every call."""

    def __init__(self, inner: Any, world: World, who: str, kinds: Tuple[str, ...]) -> None:
        super().__init__(inner)
        self.world = world
        self.who = who
        self.kinds = kinds

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if not callable(found):
            return found

        def call(*args: Any) -> Any:
            with self._call(name):
                return found(*args)

        return call

    def _call(self, point: str) -> Call:
        return Call(self.world, self.who, point, self.kinds)


class SimJournal:
    """A journal of starts in memory, outliving its worker as the real one does."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._begun: Set[int] = set()

    def token(self) -> int:
        return self._world.new_number()

    def free(self, token: int) -> None:
        self._begun.discard(token)

    def mark(self, token: int) -> None:
        self._begun.add(token)

    def has_begun(self, token: int) -> bool:
        return token in self._begun


class SimTransport(Faulty):
    """The real transport as one worker or producer reaches it."""

    consumer_class: "Type[SimConsumer]"

    def __init__(
        self,
        inner: Any,
        world: World,
        who: str,
        kinds: Tuple[str, ...] = (CRASH, LOST),
        selector: Optional[SimSelector] = None,
    ) -> None:
        super().__init__(inner, world, who, kinds)
        self.selector = selector
        #: What may happen before a worker's commit, and when it is done.
        self.kinds_before_commit: Tuple[str, ...] = (CRASH, LOST)
        self.kinds_after_commit: Tuple[str, ...] = (CRASH,)
        #: What goes between a consumer and its faults: variants that shall be found out.
        self.variant: Callable[[Any], Any] = lambda consumer: consumer
        #: Wake-ups are lost: another such variant.
        self.deaf = False
        #: Number of a message -> what came of its last run here; and -> the tag of that delivery.
        self.outcomes: Dict[int, Union[Outcome, Lost]] = {}
        self.started: Dict[int, Any] = {}
        #: Tag of a delivery -> its name in the journal of starts, if this worker has one.
        self.tokens: Dict[Any, int] = {}
        self.journal: Optional[SimJournal] = None

    def transaction(self) -> Transaction:
        kinds = self.kinds_before_commit, self.kinds_after_commit
        return Transaction(self.world, self.who, self.inner.transaction(), *kinds)

    def consumer(self, node: str, queues: Iterable[Queue]) -> "SimConsumer":
        with self._call("consumer"):
            return self.consumer_class(self, self.inner.consumer(node, queues))

    def publish(self, publications: Sequence[Publication], timeout_s: float) -> None:
        world = self.world
        with self._call("publish"):
            all_headers = [publication.message.headers for publication in publications]
            copies = [self._copy(headers) for headers in all_headers if "task" in headers]
            # Recorded first: where it is not part of a transaction, it is done at once.
            for copy in copies:
                world.record(world.published, self.who, copy)
            self.inner.publish(publications, timeout_s)

    def _copy(self, headers: Dict[str, Any]) -> Copy:
        number = headers[NUMBER] = self.world.new_number()
        eta, expires = headers.get("eta"), headers.get("expires")
        # Known at once: a follow-up can be taken in the transaction that publishes it.
        copy = self.world.copies[number] = Copy(number, headers["id"], headers["task"])
        copy.eta = eta and to_epoch(eta)
        copy.expires = expires and to_epoch(expires)
        return copy

    def revoke(self, task_ids: Iterable[str], until: float) -> None:
        ids = list(task_ids)
        with self._call("revoke"):
            self.world.record(self.world.revoked, self.who, ids)
            self.inner.revoke(ids, until)


class SimConsumer(Faulty, ConsumerProxy):
    """The real consumer of one worker, with faults; what it does is recorded."""

    def __init__(self, transport: SimTransport, inner: Any) -> None:
        super().__init__(transport.variant(inner), transport.world, transport.who, transport.kinds)
        self.transport = transport

    def _copies(self, *deliveries: Delivery) -> Iterator[Tuple[Delivery, Copy]]:
        """Yield those deliveries that are tasks, with their records."""
        for delivery in deliveries:
            number = delivery.message.headers.get(NUMBER)
            if number is not None:
                yield delivery, self.world.copies[number]

    def poll(self, limit: int) -> List[Delivery]:
        world = self.world
        with Call(world, self.who, "poll", self.kinds, self.transport.kinds_after_commit):
            found: List[Delivery] = self.inner.poll(limit)
            for delivery, copy in self._copies(*found):
                world.record(world.polled, self.who, copy, delivery.fate)
                world.record(self.transport.started.pop, copy.number, None)
        return found

    def start(self, deliveries: Sequence[Delivery]) -> None:
        world, transport = self.world, self.transport
        with self._call("start"):
            self.inner.start(deliveries)
            for delivery, copy in self._copies(*deliveries):
                transport.outcomes.pop(copy.number, None)
                world.record(transport.started.__setitem__, copy.number, delivery.tag)
                self._record_start(delivery, copy)

    def _record_start(self, delivery: Delivery, copy: Copy) -> None:
        """Record what the broker does not tell of itself."""

    def ack(self, delivery: Delivery) -> bool:
        world, transport = self.world, self.transport
        with self._call("ack"):
            again = self._again(delivery)
            done: bool = self.inner.ack(delivery)
            for _, copy in self._copies(delivery) if done else ():
                outcome = transport.outcomes.get(copy.number) if self._was_started(delivery) else None
                succeeded = isinstance(outcome, Outcome) and outcome.state == states.SUCCESS
                world.record(world.ended, self.who, copy, "acknowledged", succeeded)
                if again is not None:
                    again()
                    world.record(world.doubled, self.who, copy)
        return done

    def _again(self, delivery: Delivery) -> Optional[Callable[[], None]]:
        """Perhaps return what lets the broker forget the coming ack of a late-acked message."""
        return None

    def reject(self, delivery: Delivery, requeue: bool, reason: str = "rejected") -> bool:
        with self._call("reject"):
            done: bool = self.inner.reject(delivery, requeue, reason)
            self._set_aside(delivery, reason, done and not requeue)
            for _, copy in self._copies(delivery) if done and requeue else ():
                self.world.record(self.world.requeued, self.who, copy)
        return done

    def release(self, deliveries: Sequence[Delivery]) -> None:
        with self._call("release"):
            self.inner.release(deliveries)
            for delivery, copy in self._copies(*deliveries):
                self.world.record(self._released, delivery, copy)

    def _released(self, delivery: Delivery, copy: Copy) -> None:
        self.transport.started.pop(copy.number, None)

    def _was_started(self, delivery: Delivery) -> bool:
        tag = self.transport.started.get(delivery.message.headers.get(NUMBER, 0))
        return tag is not None and bool(tag == delivery.tag)

    def dead_letter(self, delivery: Delivery, reason: str) -> bool:
        with self._call("dead_letter"):
            done: bool = self.inner.dead_letter(delivery, reason)
            self._set_aside(delivery, reason, done)
        return done

    def _set_aside(self, delivery: Delivery, reason: str, done: bool) -> None:
        for _, copy in self._copies(delivery) if done else ():
            self.world.record(self.world.set_aside, self.who, copy, reason)


class MemoryConsumer(SimConsumer):
    """The real consumer of a broker in memory, with wake-ups through the simulated selector."""

    def __init__(self, transport: SimTransport, inner: Any) -> None:
        super().__init__(transport, inner)
        assert transport.selector is not None
        self._readable = transport.selector.readable
        self._fd = FIRST_FD + transport.world.new_number()
        inner.on_wake = self.wake

    def wake(self) -> None:
        """Make the descriptor readable; the broker calls it."""
        if not self.transport.deaf:
            self._readable.add(self._fd)

    def fileno(self) -> int:
        self._readable.add(self._fd)
        return self._fd

    def on_readable(self) -> None:
        self._readable.discard(self._fd)

    def start_journal(self) -> Optional[SimJournal]:
        return self.transport.journal

    def _record_start(self, delivery: Delivery, copy: Copy) -> None:
        if delivery.token is not None:
            self.world.record(self.transport.tokens.__setitem__, delivery.tag, delivery.token)
        self.world.record(self.world.marked, self.who, copy)

    def _released(self, delivery: Delivery, copy: Copy) -> None:
        self.world.released(self.who, copy, self._was_started(delivery))
        super()._released(delivery, copy)

    def _again(self, delivery: Delivery) -> Optional[Callable[[], None]]:
        world, broker = self.world, MemoryBroker.get(self.world.broker_name)
        row = broker.rows.get(delivery.tag)
        if row is None or delivery.early or not world.strikes(world.fault_rate):
            return None

        def again() -> None:
            with broker:
                double = broker.add(row.queue, row.exchange, row.routing_key, row.message, READY, row.due)
                double.deliveries = row.deliveries

        return again

SimTransport.consumer_class = MemoryConsumer


class SimBackend(Faulty):
    """The real backend as one worker reaches it."""

    def store(self, results: Sequence[StoredResult]) -> None:
        world = self.world
        try:
            with Call(world, self.who, "store", (*self.kinds, REFUSED), self.kinds):
                self.inner.store(results)
                for result in results:
                    world.record(world.note, self.who, "stored %s of %s", result.state, result.task_id)
            world.strike(self.who, "after the store", *self.kinds)
        except Exception:
            world.refusals.update(result.task_id for result in results)
            raise

# SPDX-License-Identifier: MIT
"""The broker in memory: what transports and backends of one ``memory://`` name share.

One object per process and name, everything in plain dicts and heaps under one lock.  Whoever
changes something notes how to undo it, so that a transaction which is left by an exception, at
whatever point, leaves no trace.  Nothing here looks at a clock, and chance comes from `random`: a
simulation decides both.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import threading
from types import TracebackType
from typing import Any, Callable, Dict, List, Optional, Set, Tuple, Type

from ..exceptions import ImproperlyConfigured, OperationalError
from ..message import Message

READY, WAITING, RESERVED, STARTED_LATE, STARTED_EARLY, LOST = range(6)


class Row:
    """A message in the broker; see `transports.sqlite` for what the states mean."""

    __slots__ = (
        "id", "queue", "exchange", "routing_key", "message", "state", "priority", "due", "owner",
        "deliveries", "lost_by",
    )  # fmt: skip

    def __init__(
        self, id_: int, queue: str, exchange: str, routing_key: str, message: Message, state: int, due: float
    ) -> None:
        self.id = id_
        self.queue = queue
        self.exchange = exchange
        self.routing_key = routing_key
        self.message = message
        self.priority = message.priority
        self.state = state
        self.due = due
        self.owner = 0
        self.deliveries = 0
        self.lost_by: Optional[str] = None


class Owner:
    """A consumer as the broker sees it; `wake` is called when a queue of it got messages."""

    __slots__ = ("id", "node", "alive", "queues", "wake")

    def __init__(self, id_: int, node: str, wake: Callable[[], None]) -> None:
        self.id = id_
        self.node = node
        self.alive = True
        self.queues: Set[str] = set()
        self.wake = wake


class QueueSettings:
    """What was declared of a queue, and when it was used last."""

    __slots__ = ("auto_delete", "expires", "message_ttl", "used")

    def __init__(
        self, auto_delete: bool, expires: Optional[float], message_ttl: Optional[float], used: float
    ) -> None:
        self.auto_delete = auto_delete
        self.expires = expires
        self.message_ttl = message_ttl
        self.used = used


class MemoryBroker:
    """All that lives under one ``memory://`` name.  Use it as a context: the lock and a transaction.

    Entered again by the same thread it joins.  All is undone when an exception leaves it; one that
    leaves a nested context and is swallowed further out makes the outer one fail at its end.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid = os.getpid()
        self.random = random.Random()
        self.lock = threading.RLock()
        #: Notified whenever results were stored.
        self.stored = threading.Condition(self.lock)
        self.rows: Dict[int, Row] = {}
        self.owners: Dict[int, Owner] = {}
        self.queues: Dict[str, QueueSettings] = {}
        #: exchange -> {(type, routing key, queue)}
        self.bindings: Dict[str, Set[Tuple[str, str, str]]] = {}
        self.revoked: Dict[str, float] = {}
        #: id -> (queue, reason, at, row)
        self.dead_letters: Dict[int, Tuple[str, str, float, Row]] = {}
        #: task id -> (result, when it is over)
        self.results: Dict[str, Tuple[Any, Optional[float]]] = {}
        #: group id -> (body, when it is over)
        self.groups: Dict[str, Tuple[bytes, Optional[float]]] = {}
        #: group id -> record, body, and {(place, task id): entry}; see `backends.chords`.
        self.chords: Dict[str, Any] = {}
        self.chord_bodies: Dict[str, bytes] = {}
        self.chord_parts: Dict[str, Dict[Tuple[int, str], bytes]] = {}
        #: Grows with every change; a consumer compares it to see whether to look.
        self.version = 0
        # Heaps of candidates.  An entry counts only while its row still says the same.
        self._ready: Dict[str, List[Tuple[int, float, int]]] = {}
        self._waiting: List[Tuple[float, int]] = []
        self._lost: List[int] = []
        self._ids = itertools.count(1)
        self._depth = 0
        self._undo: List[Tuple[Callable[..., Any], Tuple[Any, ...]]] = []
        self._added: Set[str] = set()
        self._has_results = False
        self._doomed = False

    @classmethod
    def get(cls, name: str) -> "MemoryBroker":
        """Return this process' broker called `name`, made at the first call."""
        found = _brokers.get(name)
        if found is None:
            found = _brokers.setdefault(name, cls(name))
        found.check_process()
        return found

    def check_process(self) -> None:
        """Raise `ImproperlyConfigured` in a forked child: its copy would be read by nobody."""
        if self.pid != os.getpid():
            raise ImproperlyConfigured(
                f"broker memory://{self.name} lives in process {self.pid} and was used in its child"
                f" {os.getpid()}: use the pools threads or solo, or a broker that processes can share (sqlite:///miniq.db)"
            )

    def owner_lost(self, node: str) -> None:
        """Let the worker called `node` be dead: the next `housekeep` of another one recovers its messages."""
        with self:
            for owner in self.owners.values():
                if owner.node == node:
                    owner.alive = False

    # -- transactions

    def __enter__(self) -> "MemoryBroker":
        self.lock.acquire()
        self._depth += 1
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self._depth -= 1
        self._doomed = self._doomed or kind is not None
        try:
            if self._depth == 0:
                if not self._doomed:
                    self._commit()
                    return
                for undo, arguments in reversed(self._undo):
                    undo(*arguments)
                self._clear()
                if kind is None:
                    raise OperationalError(
                        f"memory://{self.name}: a part of the transaction had failed, all is undone"
                    )
        finally:
            self.lock.release()

    def _commit(self) -> None:
        if self._undo:
            self.version += 1
        if self._has_results:
            self.stored.notify_all()
        added = self._added
        self._added = set()
        self._clear()
        if added:
            for owner in list(self.owners.values()):
                if owner.alive and not added.isdisjoint(owner.queues):
                    owner.wake()

    def _clear(self) -> None:
        self._undo.clear()
        self._added.clear()
        self._has_results = self._doomed = False

    @property
    def is_open(self) -> bool:
        """Whether this thread is in a transaction."""
        with self.lock:
            return self._depth > 0

    def on_undo(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Note how to take back a change; called before it is made, inside the context."""
        self._undo.append((call, arguments))

    def set_item(self, table: Dict[Any, Any], key: Any, value: Any) -> None:
        """Change an entry of one of the dicts so that it can be undone; None deletes it."""
        old = table.get(key)
        if old is None:
            self.on_undo(table.pop, key, None)
        else:
            self.on_undo(table.__setitem__, key, old)
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value

    def results_changed(self) -> None:
        """Tell waiters when the transaction is over."""
        self._has_results = True

    def new_id(self) -> int:
        """Return a number that was not used before."""
        return next(self._ids)

    # -- rows

    def add(
        self, queue: str, exchange: str, routing_key: str, message: Message, state: int, due: float
    ) -> Row:
        """Store a message (not copied) and note that the queue got one."""
        row = Row(self.new_id(), queue, exchange, routing_key, message, state, due)
        self.on_undo(self.rows.pop, row.id, None)
        self.rows[row.id] = row
        self._enter(row)
        return row

    def change(
        self, row: Row, state: int, due: Optional[float] = None, owner: int = 0, lost_by: Optional[str] = None
    ) -> None:
        """Give a row another state and what goes with it; without `due` it keeps its place."""
        self.on_undo(self._restore, row, row.state, row.due, row.owner, row.lost_by, row.deliveries)
        row.state = state
        row.owner = owner
        row.lost_by = lost_by
        if due is not None:
            row.due = due
        self._enter(row)

    def delete(self, row: Row) -> None:
        """Take a row out."""
        self.on_undo(self._put_back, row)
        del self.rows[row.id]

    def _restore(
        self, row: Row, state: int, due: float, owner: int, lost_by: Optional[str], deliveries: int
    ) -> None:
        row.state, row.due, row.owner, row.lost_by, row.deliveries = state, due, owner, lost_by, deliveries
        self._enter(row)

    def _put_back(self, row: Row) -> None:
        self.rows[row.id] = row
        self._enter(row)

    def _enter(self, row: Row) -> None:
        if row.state == READY:
            heapq.heappush(self._ready.setdefault(row.queue, []), (-row.priority, row.due, row.id))
        elif row.state == WAITING:
            heapq.heappush(self._waiting, (row.due, row.id))
        elif row.state == LOST:
            heapq.heappush(self._lost, row.id)
        else:
            return
        self._added.add(row.queue)

    def first_ready(self, queue: str) -> Optional[Row]:
        """Return the row of the queue that is next."""
        heap = self._ready.get(queue)
        while heap:
            _, due, id_ = heap[0]
            row = self.rows.get(id_)
            if row is not None and row.state == READY and row.due == due:
                return row
            heapq.heappop(heap)
        self._ready.pop(queue, None)
        return None

    def first_lost(self) -> Optional[Row]:
        """Return the oldest row that is lost."""
        while self._lost:
            row = self.rows.get(self._lost[0])
            if row is not None and row.state == LOST:
                return row
            heapq.heappop(self._lost)
        return None

    def first_waiting(self) -> Optional[Row]:
        """Return the row that falls due next."""
        heap = self._waiting
        while heap:
            due, id_ = heap[0]
            row = self.rows.get(id_)
            if row is not None and row.state == WAITING and row.due == due:
                return row
            heapq.heappop(heap)
        return None


_brokers: Dict[str, MemoryBroker] = {}


def reset(name: Optional[str] = None) -> None:
    """Forget one broker, or all: who asks for it next gets an empty one.  For tests."""
    if name is None:
        _brokers.clear()
    else:
        _brokers.pop(name, None)


def broker_name(url: str) -> str:
    """Return the name in ``memory://name``; none is a name too."""
    return url.partition("://")[2].rstrip("/")


def refuse_options(url: str, options: Any) -> None:
    """Raise `ImproperlyConfigured` for any transport option: a broker in memory has none."""
    if options:
        raise ImproperlyConfigured(
            f"{url!r}: unknown transport option {next(iter(options))!r}; memory:// has none"
        )

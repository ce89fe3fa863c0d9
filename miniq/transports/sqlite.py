# SPDX-License-Identifier: MIT
"""A SQLite file as the broker: for everything that runs on one machine.

A message is a row in `messages`; `state` says where it stands::

    WAITING --due--> READY --poll--> RESERVED --start--> STARTED_LATE or STARTED_EARLY --ack--> gone

Ready rows come out by priority (higher first, none is 0), then by `due` (the moment of publishing,
or the eta), then in the order they were stored.  All indexes are partial, so a poll costs what it
returns, however many rows are ready, waiting or held.

A worker that dies leaves rows with its owner number; whoever keeps house next finds its lock free
(`connections.owners`) and recovers them.  Whatever has `lost_by` comes out with fate
"lost", to any worker, its queues or not.

Inside a transaction `poll` only reads: the rows are written once, by the `start` that follows, or
at the transaction's end.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

from ..connections.owners import OwnerLocks
from ..connections.sqlite import (
    LOST,
    READY,
    RESERVED,
    STARTED_EARLY,
    STARTED_LATE,
    WAITING,
    Database,
    Options,
    Participant,
    Transaction,
    path_of,
)
from ..connections.starts import StartJournal
from ..exceptions import ImproperlyConfigured, OperationalError
from ..message import Delivery, Message
from ..routing import Queue, key_matches
from ..text import host_name
from .base import (
    Consumer,
    DeadLetter,
    Publication,
    QueueSize,
    Transport,
    due_at,
    has_died,
    pause_after_loss_s,
    what_is_unroutable,
)

logger = logging.getLogger(__name__)

#: How many rows one statement of upkeep (falling due, expiring, purging) touches at most.
BATCH = 200
PURGE_BATCH = 5000
#: How long a consumer that closes waits for the write lock; then the others find its messages.
CLOSE_TIMEOUT_S = 2.0
MAX_COUNT = 2**31

_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder().decode

_INSERT = (
    "INSERT INTO messages(queue, state, priority, due, deliveries, task_id, exchange, routing_key, envelope,"
    " body) VALUES(?, ?, ?, ?, 0, ?, ?, ?, ?, ?)"
)
# CAST: whatever somebody else wrote there comes as bytes, and no row can fail the whole query.
_COLUMNS = (
    "id, due, priority, queue, exchange, routing_key, deliveries, lost_by, CAST(envelope AS BLOB),"
    " CAST(body AS BLOB), EXISTS(SELECT 1 FROM revoked WHERE revoked.task_id=messages.task_id AND until>?)"
)
_CLAIM = (
    f"SELECT {_COLUMNS} FROM messages INDEXED BY ready"
    f" WHERE state={READY} AND queue=? ORDER BY priority DESC, due, id LIMIT ?"
)
_ANY_READY = f"SELECT 1 FROM messages INDEXED BY ready WHERE state={READY} AND queue=? LIMIT 1"
_CLAIM_LOST = f"SELECT {_COLUMNS} FROM messages INDEXED BY lost WHERE state={LOST} ORDER BY id LIMIT ?"
_ANY_LOST = f"SELECT 1 FROM messages INDEXED BY lost WHERE state={LOST} LIMIT 1"
_ANY_DUE = f"SELECT 1 FROM messages INDEXED BY waiting WHERE state={WAITING} AND due<=? LIMIT 1"
_FALL_DUE = (
    f"UPDATE messages SET state={READY} WHERE id IN"
    f" (SELECT id FROM messages INDEXED BY waiting WHERE state={WAITING} AND due<=?"
    f" ORDER BY due LIMIT {BATCH})"
)
_NEXT_DUE = f"SELECT min(due) FROM messages INDEXED BY waiting WHERE state={WAITING}"
_NOT_DUE = (
    "SELECT due, exchange, routing_key, deliveries, envelope, body FROM messages INDEXED BY waiting"
    f" WHERE state={WAITING} AND due>? AND queue=? ORDER BY due LIMIT ?"
)
_RESERVE = f"UPDATE messages SET state={RESERVED}, owner=?, token=NULL WHERE id=?"
_START_CLAIMED = "UPDATE messages SET state=?, token=?, owner=?, deliveries=deliveries+1 WHERE id=?"
# A row number is used again when the last row is gone; together with `due` it is this message's.
_OURS = " WHERE id=? AND owner=? AND due=?"
_START = "UPDATE messages SET state=?, token=?, deliveries=deliveries+1" + _OURS
_DELETE = "DELETE FROM messages" + _OURS
# Sent back on purpose: that is no loss, so it does not bring the message nearer to its limit.
_REQUEUE = (
    f"UPDATE messages SET state={READY}, owner=NULL, token=NULL, lost_by=NULL, due=?,"
    " deliveries=min(deliveries, ?)" + _OURS
)
_DEFER = "UPDATE messages SET state=?, owner=NULL, token=NULL, due=?" + _OURS
_RELEASE = (
    f"UPDATE messages SET state=CASE WHEN lost_by IS NULL THEN {READY} ELSE {LOST} END,"
    " owner=NULL, token=NULL,"
    f" deliveries=deliveries-(state IN ({STARTED_LATE}, {STARTED_EARLY}))" + _OURS
)
_BURY = (
    "INSERT INTO dead_letters(queue, reason, at, priority, task_id, exchange, routing_key, envelope, body)"
    " SELECT queue, ?, ?, priority, task_id, exchange, routing_key, envelope, body FROM messages" + _OURS
)
_DEAD = "queue, priority, task_id, exchange, routing_key, envelope, body"


class SQLiteTransport(Transport):
    """One thread's way to a SQLite file.

    It opens this thread's handle at the first use, and another one where it finds itself in a
    forked child or another thread.
    """

    fanout = True
    priority = True
    delay = True
    confirms = True

    def __init__(self, url: str, options: Mapping[str, Any], wall: Callable[[], float]) -> None:
        self._path = path_of(url)
        self._options = Options.read(options, url)
        self._wall = wall
        self._db: Optional[Database] = None
        self._inherited: List[Database] = []
        self._declared: Dict[str, Queue] = {}
        self._consumers: List[SQLiteConsumer] = []

    def _database(self) -> Database:
        db = self._db
        if db is None or not db.usable_here():
            if db is not None:
                self._inherited.append(db)
                self._declared.clear()
            db = self._db = Database.open(self._path, self._options)
        return db

    def declare(self, queue: Queue, timeout_s: Optional[float] = None) -> None:
        known = self._declared.get(queue.name)
        if known is queue or known == queue:
            return
        db = self._database()
        bindings = [
            (binding.exchange.name, binding.exchange.type, binding.routing_key, queue.name)
            for binding in queue.all_bindings
            if binding.exchange.name
        ]
        # One that may vanish behind our back is declared again each time.
        lasting = not queue.auto_delete and queue.expires is None
        if lasting and self._is_declared(db, queue, bindings):
            self._declared[queue.name] = queue
            return
        with db.transaction(timeout_s=timeout_s):
            db.write(
                "INSERT INTO queues(name, auto_delete, expires, message_ttl, used) VALUES(?, ?, ?, ?, ?)"
                " ON CONFLICT(name) DO UPDATE SET auto_delete=excluded.auto_delete, expires=excluded.expires,"
                " message_ttl=excluded.message_ttl, used=excluded.used",
                (queue.name, int(queue.auto_delete), queue.expires, queue.message_ttl, self._wall()),
            )
            db.write_many(
                "INSERT OR REPLACE INTO bindings(exchange, type, routing_key, queue) VALUES(?, ?, ?, ?)",
                bindings,
            )

    @staticmethod
    def _is_declared(db: Database, queue: Queue, bindings: List[Tuple[str, str, str, str]]) -> bool:
        """Say whether the file knows the queue as it is; reading takes no lock from anybody."""
        settings = db.read("SELECT auto_delete, expires, message_ttl FROM queues WHERE name=?", (queue.name,))
        if settings != [(int(queue.auto_delete), queue.expires, queue.message_ttl)]:
            return False
        return not bindings or set(bindings) <= set(
            db.read("SELECT exchange, type, routing_key, queue FROM bindings WHERE queue=?", (queue.name,))
        )

    def publish(self, publications: Sequence[Publication], timeout_s: float) -> None:
        db = self._database()
        now = self._wall()
        rows = []
        routes: Dict[Tuple[str, str], List[str]] = {}
        for message, exchange, routing_key in publications:
            due = due_at(message, now)
            rows.append(
                (
                    routing_key, WAITING if due > now else READY, message.priority, due,
                    message.headers.get("id"), exchange, routing_key, _encode(message.envelope()).encode(),
                    message.body,
                )
            )  # fmt: skip
            routes[exchange, routing_key] = [routing_key]
        copied = any(exchange for exchange, _ in routes)
        unroutable = None
        with db.transaction(self._options.synchronous, timeout_s):
            db.begin()
            if copied:
                unroutable = self._choose_queues(db, routes, publications)
                rows = [(queue, *row[1:]) for row in rows for queue in routes[row[5], row[6]]]
            if unroutable is None:
                db.write_many(_INSERT, rows)
                for route in routes:
                    db.added(*route)
        if unroutable is not None:
            # Raised out here: nothing was written, so a transaction around this one can go on.
            raise ImproperlyConfigured(unroutable)

    @staticmethod
    def _choose_queues(
        db: Database, routes: Dict[Tuple[str, str], List[str]], publications: Sequence[Publication]
    ) -> Optional[str]:
        """Fill in the queues of routes through an exchange; return what is wrong if a task reaches none."""
        unroutable = None
        for route in routes:
            exchange, routing_key = route
            if not exchange:
                continue
            bindings = db.read("SELECT type, routing_key, queue FROM bindings WHERE exchange=?", (exchange,))
            found = {queue for kind, key, queue in bindings if key_matches(kind, key, routing_key)}
            routes[route] = sorted(found)
            if not found and any("task" in p.message.headers for p in publications if p[1:] == route):
                kinds = {kind for kind, _, _ in bindings}
                unroutable = what_is_unroutable(kinds, exchange, routing_key) or unroutable
        return unroutable

    def transaction(self) -> Transaction:
        return self._database().transaction()

    def consumer(self, node: str, queues: Iterable[Queue]) -> "SQLiteConsumer":
        return SQLiteConsumer(self, self._database(), self._wall, node, queues)

    def purge(self, queue: str) -> int:
        db = self._database()
        removed = 0
        (last,) = db.read("SELECT max(id) FROM messages")[0]
        for index, state in (("ready", READY), ("waiting", WAITING)):
            # In portions: one long transaction would hold up everybody else.
            while True:
                with db.transaction():
                    count = db.write(
                        f"DELETE FROM messages WHERE id IN (SELECT id FROM messages INDEXED BY {index}"
                        f" WHERE state={state} AND queue=? AND id<=? LIMIT {PURGE_BATCH})",
                        (queue, last),
                    )
                removed += count
                if count < PURGE_BATCH:
                    break
        return removed

    def sizes(self, names: Iterable[str] = ()) -> List[QueueSize]:
        db = self._database()
        counts: Dict[str, List[Any]] = {
            name: [0, 0, 0, None] for (name,) in db.read("SELECT name FROM queues")
        }
        found = [
            (
                0,
                f"SELECT queue, count(*), min(due) FROM messages INDEXED BY ready"
                f" WHERE state={READY} GROUP BY queue",
            ),
            (
                1,
                f"SELECT queue, count(*), 0 FROM messages INDEXED BY waiting"
                f" WHERE state={WAITING} GROUP BY queue",
            ),
            (
                2,
                "SELECT queue, count(*), 0 FROM messages INDEXED BY held"
                " WHERE owner IS NOT NULL GROUP BY queue",
            ),
            (2, f"SELECT queue, count(*), 0 FROM messages INDEXED BY lost WHERE state={LOST} GROUP BY queue"),
        ]
        now = self._wall()
        for place, sql in found:
            for queue, count, oldest in db.read(sql):
                entry = counts.setdefault(queue, [0, 0, 0, None])
                entry[place] += count
                if place == 0:
                    entry[3] = max(0.0, now - oldest)
        locks = OwnerLocks.of(db.path)
        taking = [
            name
            for owner, names in db.read("SELECT id, queues FROM owners")
            if locks.is_alive(owner)
            for name in json.loads(names)
        ]
        return [QueueSize(name, *(*counts[name], taking.count(name))) for name in sorted(counts)]

    def revoke(self, task_ids: Iterable[str], until: float) -> None:
        db = self._database()
        with db.transaction():
            db.write_many(
                "INSERT INTO revoked(task_id, until) VALUES(?, ?)"
                " ON CONFLICT(task_id) DO UPDATE SET until=max(until, excluded.until)",
                [(task_id, until) for task_id in task_ids],
            )

    def dead_letters(self, limit: int = 100) -> List[DeadLetter]:
        rows = self._database().read(
            "SELECT id, queue, reason, at, CAST(envelope AS BLOB), CAST(body AS BLOB) FROM dead_letters"
            " ORDER BY id DESC LIMIT ?",
            (limit,),
        )
        return [
            DeadLetter(str(id_), queue, reason, at, _message(envelope, body)[0])
            for id_, queue, reason, at, envelope, body in rows
        ]

    def replay(self, dead_letter_id: str) -> bool:
        db = self._database()
        with db.transaction(self._options.synchronous):
            db.begin()
            rows = db.read(f"SELECT {_DEAD} FROM dead_letters WHERE id=?", (dead_letter_id,))
            for queue, priority, task_id, exchange, routing_key, envelope, body in rows:
                values = (
                    queue,
                    READY,
                    priority,
                    self._wall(),
                    task_id,
                    exchange,
                    routing_key,
                    envelope,
                    body,
                )
                db.write(_INSERT, values)
                db.write("DELETE FROM dead_letters WHERE id=?", (dead_letter_id,))
                db.added("", queue)
        return bool(rows)

    def drop(self, dead_letter_id: str) -> bool:
        db = self._database()
        with db.transaction():
            return db.write("DELETE FROM dead_letters WHERE id=?", (dead_letter_id,)) > 0

    def close(self) -> None:
        for consumer in list(self._consumers):
            consumer.close()
        if self._db is not None:
            self._db.close()
            self._db = None
        self._declared.clear()


class SQLiteConsumer(Consumer, Participant):
    """A worker's share of a SQLite file."""

    poll_interval_s = 0.1

    def __init__(
        self,
        transport: SQLiteTransport,
        db: Database,
        wall: Callable[[], float],
        node: str,
        queues: Iterable[Queue],
    ) -> None:
        self.node = node
        self._transport = transport
        self._db = db
        self._wall = wall
        self._queues: Dict[str, Queue] = {}
        self._locks = OwnerLocks.of(db.path)
        #: Row number -> delivery, polled in the open transaction and not written yet.
        self._claimed: Dict[int, Delivery] = {}
        self._seen: Optional[Tuple[int, int]] = None
        self._any_lost = False
        self._closed = False
        #: Where the jitter of pauses comes from.
        self.random = random.Random()
        self._port = 0
        self._socket = self._bind()
        self._owner = self._register()
        self._journal: Optional[StartJournal] = None
        db.participants.append(self)
        transport._consumers.append(self)
        try:
            for queue in queues:
                # No loop turns yet that would stand still: a start may wait for the lock.
                self._add_queue(queue, db.options.busy_timeout)
            self._look_after_unclean_stop()
        except BaseException:
            self.close()
            raise

    def _bind(self) -> Optional[socket.socket]:
        bound: Optional[socket.socket] = None
        try:
            bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            bound.setblocking(False)
            # One datagram is as good as many.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            bound.bind(("127.0.0.1", 0))
            self._port = bound.getsockname()[1]
            return bound
        except OSError as error:
            if bound is not None:
                bound.close()
            self.poll_interval_s = 0.005
            logger.warning(
                "SQLite file %r: no socket to be woken by (%s), looking every 5 ms instead",
                self._db.path,
                error,
            )
            return None

    def _register(self) -> int:
        db = self._db
        try:
            with db.transaction(timeout_s=db.options.busy_timeout):
                db.write(
                    "INSERT INTO owners(node, pid, host, port, queues, started) VALUES(?, ?, ?, ?, '[]', ?)",
                    (self.node, os.getpid(), host_name(), self._port or None, self._wall()),
                )
                owner: int = db.read("SELECT last_insert_rowid()")[0][0]
                # Locked before anybody can see the row, else it would look dead.
                self._locks.take(owner)
            return owner
        except BaseException:
            if self._socket is not None:
                self._socket.close()
            raise

    def _look_after_unclean_stop(self) -> None:
        owners = self._db.read("SELECT id FROM owners")
        if not all(self._locks.is_alive(owner) for (owner,) in owners):
            self._db.check()

    # -- waking

    def fileno(self) -> Optional[int]:
        return None if self._socket is None else self._socket.fileno()

    def on_readable(self) -> None:
        if self._socket is None:
            return
        try:
            for _ in range(64):
                self._socket.recv(1)
        except BlockingIOError:
            return
        except OSError as error:  # Windows reports here what became of datagrams sent
            logger.debug("wake-up socket: %s", error)

    def changed(self) -> bool:
        version = self._db.version()
        if version == self._seen:
            return False
        self._seen = version
        return True

    def next_due(self) -> Optional[float]:
        due: Optional[float] = self._db.read(_NEXT_DUE)[0][0]
        return due

    def not_due(self, limit: int) -> List[Tuple[float, Delivery]]:
        now = self._wall()
        found = []
        for name in self._queues:
            for due, exchange, key, deliveries, envelope, body in self._db.read(_NOT_DUE, (now, name, limit)):
                message, sound = _message(envelope, body)
                if sound:
                    found.append((due, Delivery(message, None, name, exchange or "", key or "", deliveries)))
        found.sort(key=lambda one: one[0])
        return found[:limit]

    # -- taking

    def poll(self, limit: int) -> List[Delivery]:
        if limit <= 0:
            return []
        db = self._db
        now = self._wall()
        # Nothing to do is the common case, and then nobody's write lock is in the way.
        if not db.is_writing and not self._sees_something(now):
            return []
        with db.transaction():
            db.begin()
            return self._claim(limit, now)

    def _sees_something(self, now: float) -> bool:
        read = self._db.read
        return bool(
            self._any_lost
            or read(_ANY_DUE, (now,))
            or any(read(_ANY_READY, (name,)) for name in self._queues)
        )

    def _claim(self, limit: int, now: float) -> List[Delivery]:
        db = self._db
        if self._claimed:
            self.flush()
        if db.read(_ANY_DUE, (now,)):
            db.write(_FALL_DUE, (now,))
        found: List[Delivery] = []
        if self._any_lost:
            self._take(db.read(_CLAIM_LOST, (now, limit)), now, found)
            self._any_lost = bool(found)
        # More than one round only where rows turn out to be past their time to live.
        for _ in range(10):
            if len(found) >= limit:
                break
            left = limit - len(found)
            rows: List[Any] = []
            for name in self._queues:
                rows += db.read(_CLAIM, (now, name, left))
            if len(self._queues) > 1:
                rows.sort(key=_place)
                del rows[left:]
            if not self._take(rows, now, found):
                break
            if self._claimed:
                self.flush()
        db.has_looked(self._port)
        return found

    def _takes_lost(self) -> bool:
        """Say whether lost messages may go here: the mailbox of one worker must not swallow tasks."""
        return any(not queue.auto_delete for queue in self._queues.values())

    def _take(self, rows: List[Any], now: float, found: List[Delivery]) -> bool:
        """Turn rows into deliveries; say whether some were dropped as past their time to live."""
        limit = self.delivery_limit
        dropped = []
        for id_, due, _, queue, exchange, routing_key, deliveries, lost_by, envelope, body, revoked in rows:
            message, sound = _message(envelope, body)
            if lost_by is None:
                settings = self._queues[queue]
                ttl = settings.message_ttl
                if (ttl is not None and due + ttl <= now) or (sound and has_died(message, due, now)):
                    dropped.append((id_,))
                    continue
            if not sound:
                fate: Optional[str] = "garbage"
            elif lost_by is not None or (limit and deliveries >= limit):
                fate = "lost"
            else:
                fate = "revoked" if revoked else None
            delivery = Delivery(
                message, (id_, due), queue, exchange or "", routing_key or "", deliveries, fate, lost_by or ""
            )
            self._claimed[id_] = delivery
            found.append(delivery)
        if dropped:
            self._db.write_many("DELETE FROM messages WHERE id=?", dropped)
        return bool(dropped)

    def flush(self) -> None:
        owner = self._owner
        rows = [(owner, id_) for id_ in self._claimed]
        self._claimed.clear()
        if rows:
            self._db.write_many(_RESERVE, rows)

    def forget(self) -> None:
        self._claimed.clear()
        self._any_lost = self._takes_lost()  # perhaps; the next poll looks

    def start_journal(self) -> Optional[StartJournal]:
        if self._journal is None:
            try:
                self._journal = StartJournal(self._journal_path(self._owner), create=True)
            except OSError as error:
                logger.warning("no journal of starts (%s): tasks are handed out one at a time", error)
        return self._journal

    def start(self, deliveries: Sequence[Delivery]) -> None:
        db, owner, claimed = self._db, self._owner, self._claimed
        fresh, reserved = [], []
        for delivery in deliveries:
            id_, due = delivery.tag
            state = STARTED_EARLY if delivery.early else STARTED_LATE
            if claimed.pop(id_, None) is not None:
                fresh.append((state, delivery.token, owner, id_))
            else:
                reserved.append((state, delivery.token, id_, owner, due))
        if fresh:
            db.write_many(_START_CLAIMED, fresh)
        if reserved:
            with db.transaction():
                db.write_many(_START, reserved)

    # -- settling

    def _settle(self, sql: str, values: Tuple[Any, ...], delivery: Delivery) -> bool:
        id_, due = delivery.tag
        db = self._db
        if db.depth:
            if self._claimed:
                self.flush()
            return db.write(sql, (*values, id_, self._owner, due)) > 0
        with db.transaction():
            return db.write(sql, (*values, id_, self._owner, due)) > 0

    def ack(self, delivery: Delivery) -> bool:
        return self._settle(_DELETE, (), delivery)

    def reject(self, delivery: Delivery, requeue: bool, reason: str = "rejected") -> bool:
        if not requeue:
            return self.dead_letter(delivery, reason)
        most = self.delivery_limit - 1 if self.delivery_limit else MAX_COUNT
        return self._give_back(_REQUEUE, (self._wall(), most), delivery)

    def release(self, deliveries: Sequence[Delivery]) -> None:
        with self._db.transaction():
            for delivery in deliveries:
                self._give_back(_RELEASE, (), delivery)
                self._any_lost = self._any_lost or delivery.fate == "lost"

    def defer(self, delivery: Delivery, until: float) -> bool:
        return self._give_back(_DEFER, (WAITING if until > self._wall() else READY, until), delivery)

    def _give_back(self, sql: str, values: Tuple[Any, ...], delivery: Delivery) -> bool:
        db = self._db
        with db.transaction():
            db.added("", delivery.queue)
            db.has_looked(self._port)
            return self._settle(sql, values, delivery)

    def dead_letter(self, delivery: Delivery, reason: str) -> bool:
        with self._db.transaction():
            return self._settle(_BURY, (reason, self._wall()), delivery) and self._settle(
                _DELETE, (), delivery
            )

    # -- upkeep

    def housekeep(self) -> None:
        db = self._db
        now = self._wall()
        for owner, node in db.read("SELECT id, node FROM owners WHERE id<>?", (self._owner,)):
            if not self._locks.is_alive(owner):
                count = self._recover(owner, node, now)
                if count:
                    logger.warning("worker %s is gone: %d messages of it are recovered", node, count)
        if not self._any_lost and self._takes_lost():
            self._any_lost = bool(db.read(_ANY_LOST))
        if db.read("SELECT 1 FROM revoked WHERE until<=? LIMIT 1", (now,)):
            with db.transaction():
                db.write(
                    "DELETE FROM revoked WHERE task_id IN"
                    f" (SELECT task_id FROM revoked WHERE until<=? LIMIT {BATCH})",
                    (now,),
                )
        self._expire_queues(now)
        for name, ttl in db.read("SELECT name, message_ttl FROM queues WHERE message_ttl IS NOT NULL"):
            self._expire_messages(name, now - ttl)
        db.bound_log()

    def _recover(self, owner: int, node: str, now: float, timeout_s: Optional[float] = None) -> int:
        """Give back what a dead owner held; return how many messages that were."""
        db = self._db
        limit = self.delivery_limit
        journal = self._journal_of(owner)
        with db.transaction(timeout_s=timeout_s):
            db.begin()
            if not db.read("SELECT 1 FROM owners WHERE id=?", (owner,)):
                return 0  # somebody else was faster
            rows = db.read(
                "SELECT id, state, deliveries, due, lost_by, queue, token"
                " FROM messages INDEXED BY held WHERE owner=?",
                (owner,),
            )
            changes = []
            for id_, state, deliveries, due, lost_by, queue, token in rows:
                was_started = state in (STARTED_LATE, STARTED_EARLY)
                if was_started and token is not None and journal and not journal.has_begun(token):
                    state, deliveries = RESERVED, deliveries - 1
                may_run_again = state == RESERVED or (
                    state == STARTED_LATE and (not limit or deliveries < limit)
                )
                if lost_by is not None:
                    state = LOST
                elif not may_run_again:
                    state, lost_by = LOST, node
                else:
                    pause_s = (
                        0.0 if state == RESERVED else pause_after_loss_s(deliveries, self.random.random())
                    )
                    if pause_s:
                        state, due = WAITING, now + pause_s
                    else:
                        state = READY
                changes.append((state, due, lost_by, deliveries, id_))
                db.added("", queue)
            db.write_many(
                "UPDATE messages SET state=?, due=?, lost_by=?, deliveries=?, owner=NULL, token=NULL"
                " WHERE id=?",
                changes,
            )
            used = db.read("SELECT queue FROM consumers WHERE owner=?", (owner,))
            db.write("DELETE FROM consumers WHERE owner=?", (owner,))
            for (queue,) in used:
                self._leave(queue, now)
            db.write("DELETE FROM owners WHERE id=?", (owner,))
        if journal is not None:
            journal.close()
            _remove(journal.path)
        return len(rows)

    def _journal_of(self, owner: int) -> Optional[StartJournal]:
        """Return what an owner's children noted; None = nothing was handed out ahead, or nobody knows."""
        if owner == self._owner:
            return self._journal
        try:
            return StartJournal(self._journal_path(owner))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning(
                "%r cannot be used (%s): all that was marked as started counts as started",
                self._journal_path(owner), error,
            )  # fmt: skip
            return None

    def _journal_path(self, owner: int) -> str:
        return f"{self._db.path}-starts-{owner}"

    def _leave(self, queue: str, now: float) -> None:
        """Delete a queue that goes with its last consumer, or start its time to expire."""
        db = self._db
        if db.read("SELECT 1 FROM consumers WHERE queue=? LIMIT 1", (queue,)):
            return
        if db.read("SELECT 1 FROM queues WHERE name=? AND auto_delete", (queue,)):
            self._delete_queue(queue)
        else:
            db.write("UPDATE queues SET used=? WHERE name=?", (now, queue))

    def _delete_queue(self, queue: str) -> None:
        db = self._db
        db.write("DELETE FROM queues WHERE name=?", (queue,))
        db.write("DELETE FROM bindings WHERE queue=?", (queue,))
        db.write(f"DELETE FROM messages INDEXED BY ready WHERE state={READY} AND queue=?", (queue,))

    def _expire_queues(self, now: float) -> None:
        db = self._db
        sql = (
            "SELECT name FROM queues WHERE expires IS NOT NULL AND used+expires<=?"
            f" AND name NOT IN (SELECT queue FROM consumers) LIMIT {BATCH}"
        )
        if db.read(sql, (now,)):
            with db.transaction():
                db.begin()
                for (queue,) in db.read(sql, (now,)):
                    self._delete_queue(queue)

    def _expire_messages(self, queue: str, due: float) -> None:
        """Drop what is past its time to live at the head of a queue that nobody takes from."""
        db = self._db
        sql = (
            f"SELECT id FROM (SELECT id, due FROM messages INDEXED BY ready WHERE state={READY} AND queue=?"
            f" ORDER BY priority DESC, due, id LIMIT {BATCH}) WHERE due<=?"
        )
        if db.read(sql, (queue, due)):
            with db.transaction():
                db.begin()
                db.write_many("DELETE FROM messages WHERE id=?", db.read(sql, (queue, due)))

    # -- queues

    def add_queue(self, queue: Queue) -> None:
        self._add_queue(queue, None)

    def _add_queue(self, queue: Queue, timeout_s: Optional[float]) -> None:
        db = self._db
        with db.transaction(timeout_s=timeout_s):
            self._transport.declare(queue)
            if queue.auto_delete or queue.expires is not None:
                db.write(
                    "INSERT OR IGNORE INTO consumers(owner, queue) VALUES(?, ?)", (self._owner, queue.name)
                )
            self._publish_queues({*self._queues, queue.name})
        self._queues[queue.name] = queue
        self._seen = None

    def cancel_queue(self, name: str) -> None:
        if name not in self._queues:
            return
        db = self._db
        with db.transaction():
            if db.write("DELETE FROM consumers WHERE owner=? AND queue=?", (self._owner, name)):
                self._leave(name, self._wall())
            self._publish_queues(set(self._queues) - {name})
        del self._queues[name]

    def _publish_queues(self, names: Set[str]) -> None:
        """Let senders know whom to wake for which queue."""
        self._db.write("UPDATE owners SET queues=? WHERE id=?", (json.dumps(sorted(names)), self._owner))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        db = self._db
        self._transport._consumers.remove(self)
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if db.pid != os.getpid():
            return  # the owner is the parent process, which lives
        try:
            self._recover(self._owner, self.node, self._wall(), CLOSE_TIMEOUT_S)
        except OperationalError as error:
            logger.warning(
                "worker %s could not give its messages back, others will find them: %s", self.node, error
            )
        finally:
            db.participants.remove(self)
            self._locks.drop(self._owner)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError as error:
        logger.debug("%r stays: %s", path, error)


def _place(row: Any) -> Tuple[int, float, int]:
    return -row[2], row[1], row[0]


def _message(envelope: Optional[bytes], body: Optional[bytes]) -> Tuple[Message, bool]:
    """Return the message of a row and whether it is one; else its body is all there is to see."""
    try:
        found = _decode(str(envelope or b"", "utf-8"))
        if (
            type(found) is dict
            and type(found.get("headers")) is dict
            and type(found.get("properties")) is dict
            and body is not None
        ):
            return Message.from_envelope(found, body), True
    except (ValueError, RecursionError):
        pass
    return Message(body or b"", "", "", {}, {}), False

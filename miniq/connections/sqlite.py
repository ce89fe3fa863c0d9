# SPDX-License-Identifier: MIT
"""SQLite files: one handle per (file, process, thread), and the schema.

One file holds queues and results, so that a worker settles a result, the follow-up messages and
the acknowledgement in one transaction.  The strategy:

- Every write happens in ``BEGIN IMMEDIATE``; a nested `transaction` joins the outer one.
- SQLite's own busy handler is off.  Here the write lock is waited for with short, jittered pauses
  up to a deadline: a transaction takes some 60 us, the built-in handler sleeps whole milliseconds.
- WAL; what a producer wrote is synced to the disk before `publish` returns, what a worker settles
  is atomic but may be undone, youngest first, when the power fails.
- A handle inherited through a fork is neither used nor closed: closing would act on the parent's
  behalf.  The child opens its own.

Source: sqlite.org (wal, pragma, lockingv3, howtocorrupt); nothing newer than SQLite 3.34 is used.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import sqlite3
import threading
import time
from types import TracebackType
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
)

from ..exceptions import ImproperlyConfigured, MiniqError, OperationalError
from ..text import nearest

logger = logging.getLogger(__name__)

#: "mniq": marks a file as ours, so that no other program's tables are mixed with these.
APPLICATION_ID = 0x6D6E6971

#: States of a row in `messages`.  None is 0 or 1: those take no byte in a row, and a row that keeps
#: its size is rewritten in place.
READY, WAITING, RESERVED, STARTED_LATE, STARTED_EARLY, LOST = 2, 3, 4, 5, 6, 7

#: One tuple of statements per version; PRAGMA user_version says how many were run.
MIGRATIONS: Tuple[Tuple[str, ...], ...] = (
    (
        """CREATE TABLE messages(
            id INTEGER PRIMARY KEY, queue TEXT NOT NULL, state INTEGER NOT NULL, priority INTEGER NOT NULL,
            due REAL NOT NULL, owner INTEGER, token INTEGER, deliveries INTEGER NOT NULL, lost_by TEXT,
            task_id TEXT, exchange TEXT, routing_key TEXT, envelope BLOB, body BLOB)""",
        f"CREATE INDEX ready ON messages(queue, priority DESC, due, id) WHERE state={READY}",
        f"CREATE INDEX waiting ON messages(due, queue) WHERE state={WAITING}",
        f"CREATE INDEX lost ON messages(id) WHERE state={LOST}",
        "CREATE INDEX held ON messages(owner) WHERE owner IS NOT NULL",
        """CREATE TABLE dead_letters(
            id INTEGER PRIMARY KEY AUTOINCREMENT, queue TEXT NOT NULL, reason TEXT NOT NULL, at REAL NOT NULL,
            priority INTEGER NOT NULL, task_id TEXT, exchange TEXT, routing_key TEXT, envelope BLOB,
            body BLOB)""",
        """CREATE TABLE owners(
            id INTEGER PRIMARY KEY AUTOINCREMENT, node TEXT NOT NULL, pid INTEGER, host TEXT,
            port INTEGER, queues TEXT NOT NULL, started REAL)""",
        """CREATE TABLE queues(
            name TEXT PRIMARY KEY, auto_delete INTEGER NOT NULL, expires REAL, message_ttl REAL,
            used REAL NOT NULL) WITHOUT ROWID""",
        "CREATE TABLE consumers(owner INTEGER, queue TEXT, PRIMARY KEY(owner, queue)) WITHOUT ROWID",
        """CREATE TABLE bindings(
            exchange TEXT, routing_key TEXT, queue TEXT, type TEXT NOT NULL,
            PRIMARY KEY(exchange, routing_key, queue)) WITHOUT ROWID""",
        "CREATE TABLE revoked(task_id TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID",
        "CREATE INDEX revoked_until ON revoked(until)",
        # Not WITHOUT ROWID: ids are random, and a thin index spreads over fewer pages than the
        # bodies would (measured: 105 against 140 us for a settled pair of tasks).
        """CREATE TABLE results(
            task_id TEXT PRIMARY KEY, state TEXT NOT NULL, body BLOB, content_type TEXT,
            content_encoding TEXT, expires REAL)""",
        "CREATE INDEX results_expires ON results(expires) WHERE expires IS NOT NULL",
    ),
    (
        "CREATE TABLE groups(group_id TEXT PRIMARY KEY, body BLOB NOT NULL, expires REAL)",
        "CREATE INDEX groups_expires ON groups(expires) WHERE expires IS NOT NULL",
        # A record is rewritten with each arrival, so the body is not in it.
        """CREATE TABLE chords(
            group_id TEXT PRIMARY KEY, size INTEGER, extra INTEGER NOT NULL, arrived INTEGER NOT NULL,
            claim TEXT, claimed_until REAL, done INTEGER NOT NULL, expires REAL)""",
        "CREATE INDEX chords_claimed ON chords(claimed_until) WHERE claimed_until IS NOT NULL",
        "CREATE INDEX chords_expires ON chords(expires) WHERE expires IS NOT NULL",
        "CREATE TABLE chord_bodies(group_id TEXT PRIMARY KEY, body BLOB NOT NULL)",
        """CREATE TABLE chord_parts(
            group_id TEXT NOT NULL, place INTEGER NOT NULL, task_id TEXT NOT NULL, entry BLOB NOT NULL,
            PRIMARY KEY(group_id, place, task_id)) WITHOUT ROWID""",
        """CREATE TRIGGER chord_deleted AFTER DELETE ON chords BEGIN
            DELETE FROM chord_bodies WHERE group_id=old.group_id;
            DELETE FROM chord_parts WHERE group_id=old.group_id; END""",
    ),
    # Periodic tasks.
    ("CREATE TABLE schedule(name TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID",),
)

#: Largest number of ids in one statement; old SQLite allows 999 variables.
MAX_VARIABLES = 500
#: The write-ahead log is cut back to this size when it grew larger under long readers.
MAX_WAL_BYTES = 64 * 1024 * 1024
#: Files up to this size are checked when a worker starts after one that did not end in order.
MAX_CHECKED_BYTES = 16 * 1024 * 1024

_NETWORK_FILE_SYSTEMS = frozenset(
    "nfs nfs4 cifs smb3 smbfs fuse.sshfs ceph fuse.glusterfs afs 9p drvfs lustre gpfs".split()
)
_LEVELS = ("OFF", "NORMAL", "FULL", "EXTRA")

#: Connections inherited through forks, kept from being finalized in the child.
_inherited: List[sqlite3.Connection] = []
_warned_paths: Set[str] = set()


class Options(NamedTuple):
    """What ``broker_transport_options`` and ``result_backend_transport_options`` may hold here.

    `synchronous` is how far a publish goes before it returns (FULL: on the disk), and
    `worker_synchronous` the same for what a worker settles.  `busy_timeout` and
    `worker_busy_timeout` are the seconds to wait for the write lock where a call has no deadline of
    its own; the worker's is short because it waits in the loop and comes back by a timer.
    """

    synchronous: str = "FULL"
    worker_synchronous: str = "NORMAL"
    busy_timeout: float = 10.0
    worker_busy_timeout: float = 0.05
    cache_size_kib: int = 4096

    @classmethod
    def read(cls, options: Mapping[str, Any], url: str) -> "Options":
        """Check names and values; `ImproperlyConfigured` says which one and what is possible."""
        checked: Dict[str, Any] = {}
        for name, value in options.items():
            default = cls._field_defaults.get(name)
            if default is None:
                hint = nearest(name, cls._fields)
                raise ImproperlyConfigured(
                    f"{url!r}: unknown transport option {name!r}{f' (did you mean {hint}?)' if hint else ''};"
                    f" known: {', '.join(cls._fields)}"
                )
            if isinstance(default, str):
                if str(value).upper() not in _LEVELS:
                    raise ImproperlyConfigured(
                        f"{url!r}: transport option {name} must be one of {', '.join(_LEVELS)}, not {value!r}"
                    )
                checked[name] = str(value).upper()
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
                raise ImproperlyConfigured(
                    f"{url!r}: transport option {name} must be a number from 0, not {value!r}"
                )
            else:
                checked[name] = type(default)(value)
        return cls(**checked)


def path_of(url: str) -> str:
    """Return the absolute path in ``sqlite:///relative.db`` or ``sqlite:////absolute/path.db``."""
    rest = url.partition("://")[2]
    if not rest.startswith("/") or rest == "/":
        raise ImproperlyConfigured(
            f"{url!r} names no file: write sqlite:///relative/path.db or sqlite:////absolute/path.db"
        )
    if rest == "/:memory:":
        raise ImproperlyConfigured(f"{url!r}: a SQLite database in memory cannot be shared; use memory://")
    return os.path.realpath(rest[1:])


class Participant:
    """Something that has unwritten parts of a transaction: asked before its end, told of its failure."""

    def flush(self) -> None:
        """Write what was put off; the transaction is about to commit."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what was put off; the transaction was undone."""
        raise NotImplementedError


class Transaction:
    """A context in which everything on one handle becomes visible together.

    Entered again inside itself it joins.  All is undone when an exception leaves it; an exception
    that leaves a nested one and is swallowed further out makes the outer one fail at its end.
    """

    __slots__ = ("_database", "_synchronous", "_timeout_s")

    def __init__(
        self, database: "Database", synchronous: Optional[str] = None, timeout_s: Optional[float] = None
    ) -> None:
        self._database = database
        self._synchronous = synchronous
        self._timeout_s = timeout_s

    def __enter__(self) -> "Database":
        database = self._database
        database.enter(self._synchronous, self._timeout_s)
        return database

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self._database.leave(kind is None)


class Database:
    """The connection of one thread to one file.  Get it with `open`, give it back with `close`."""

    def __init__(self, path: str, options: Options) -> None:
        self.path = path
        self.options = options
        self.pid = os.getpid()
        self.thread = threading.get_ident()
        self.users = 0
        self.depth = 0
        #: Whoever consumes through this handle; with one of them it is a worker's.
        self.participants: List[Participant] = []
        self._doomed = False
        #: Synchronous level and timeout of an entered transaction until it takes the write lock.
        self._wanted: Optional[Tuple[Optional[str], Optional[float]]] = None
        self._synchronous = ""
        #: (exchange, routing key) of what the open transaction added, and the ports of consumers
        #: that looked afterwards and need no wake-up.
        self._added: Set[Tuple[str, str]] = set()
        self._ports_seen: Set[int] = set()
        self._ports: Dict[Tuple[str, str], List[int]] = {}
        self._ports_until_mono = 0.0
        self._socket: Optional[socket.socket] = None
        self.connection = self._connect()

    # -- open and close

    @classmethod
    def open(cls, path: str, options: Options) -> "Database":
        """Return this thread's handle of `path`, opened at the first call; each needs its `close`."""
        handles: Dict[str, Database] = _handles.__dict__
        found = handles.get(path)
        if found is None or found.users <= 0 or found.pid != os.getpid():
            found = handles[path] = cls(path, options)
        found.users += 1
        return found

    def usable_here(self) -> bool:
        """Say whether this process and thread may use the handle."""
        return self.users > 0 and self.thread == threading.get_ident() and self.pid == os.getpid()

    def close(self) -> None:
        """Give one `open` back; the last one closes the file.  Nothing happens in a forked child."""
        if self.users <= 0 or self.pid != os.getpid():
            return
        self.users -= 1
        if self.users == 0:
            handles: Dict[str, Database] = _handles.__dict__
            if handles.get(self.path) is self:
                del handles[self.path]
            self._close()

    def _close(self) -> None:
        self.connection.close()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __del__(self) -> None:
        connection = getattr(self, "connection", None)
        if connection is None:
            return
        if self.pid == os.getpid():
            self._close()
        else:
            _inherited.append(connection)

    def _connect(self) -> sqlite3.Connection:
        path = self.path
        if os.path.isdir(path):
            raise ImproperlyConfigured(f"SQLite file {path!r} is a directory: name a file in it")
        folder = os.path.dirname(path)
        if not os.path.isdir(folder):
            raise ImproperlyConfigured(
                f"SQLite file {path!r}: the folder {folder!r} does not exist, create it first"
            )
        _warn_of_network_file_system(path)
        try:
            # Another thread may finalize a handle, hence check_same_thread; no other use is made of it.
            connection = sqlite3.connect(
                path, timeout=0, isolation_level=None, check_same_thread=False, cached_statements=256
            )
        except sqlite3.Error as error:
            raise self.translated(error) from error
        try:
            self._retry(lambda: self._set_up(connection), self.options.busy_timeout)
        except BaseException:
            connection.close()
            raise
        return connection

    def _set_up(self, connection: sqlite3.Connection) -> None:
        execute = connection.execute
        (version,) = execute("PRAGMA user_version").fetchone()
        (mode,) = execute("PRAGMA journal_mode").fetchone()
        if mode != "wal":
            self._check_ours(connection)
            (mode,) = execute("PRAGMA journal_mode=WAL").fetchone()
            if mode != "wal":
                logger.warning(
                    "SQLite file %r: no write-ahead log here (%s), slower and more waiting", self.path, mode
                )
        if version != len(MIGRATIONS):
            self._migrate(connection)
        execute(f"PRAGMA cache_size=-{self.options.cache_size_kib}")
        execute(f"PRAGMA journal_size_limit={MAX_WAL_BYTES}")

    def _migrate(self, connection: sqlite3.Connection) -> None:
        execute = connection.execute
        execute("BEGIN IMMEDIATE")
        try:
            # Read again: another process may have been first.
            (version,) = execute("PRAGMA user_version").fetchone()
            if version > len(MIGRATIONS):
                raise ImproperlyConfigured(
                    f"SQLite file {self.path!r} has schema {version}, this miniq knows {len(MIGRATIONS)}:"
                    " upgrade miniq or use another file"
                )
            self._check_ours(connection)
            for statements in MIGRATIONS[version:]:
                for statement in statements:
                    execute(statement)
            execute(f"PRAGMA application_id={APPLICATION_ID}")
            execute(f"PRAGMA user_version={len(MIGRATIONS)}")
            execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                execute("ROLLBACK")
            raise

    def _check_ours(self, connection: sqlite3.Connection) -> None:
        (mark,) = connection.execute("PRAGMA application_id").fetchone()
        if mark == APPLICATION_ID:
            return
        if connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            raise ImproperlyConfigured(
                f"SQLite file {self.path!r} is the database of another program: give miniq a file of its own"
            )

    # -- transactions

    def transaction(
        self, synchronous: Optional[str] = None, timeout_s: Optional[float] = None
    ) -> Transaction:
        """Return a context; `synchronous` and `timeout_s` (for the write lock) default by role."""
        return Transaction(self, synchronous, timeout_s)

    def enter(self, synchronous: Optional[str], timeout_s: Optional[float]) -> None:
        """Enter a transaction or join the open one."""
        if not self.depth:
            self._wanted = (synchronous, timeout_s)
        self.depth += 1

    def begin(self) -> None:
        """Take the write lock, if the transaction has it not yet: the first statement that writes does.

        Raises `OperationalError` when others hold it until the transaction's `timeout_s` is over.
        """
        if self._wanted is None:
            return
        (synchronous, timeout_s), options = self._wanted, self.options
        if synchronous is None:
            synchronous = options.worker_synchronous if self.participants else options.synchronous
        try:
            if synchronous != self._synchronous:
                self.connection.execute("PRAGMA synchronous=" + synchronous)
                self._synchronous = synchronous
            self.connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            if not _is_busy(error):
                raise self.translated(error) from error
            if timeout_s is None:
                timeout_s = self.patience_s
            self._retry(lambda: self.connection.execute("BEGIN IMMEDIATE"), timeout_s)
        self._wanted = None

    @property
    def is_writing(self) -> bool:
        """Whether the write lock is held."""
        return self.depth > 0 and self._wanted is None

    def leave(self, success: bool) -> None:
        """Leave the innermost transaction; the outermost one commits or undoes."""
        if self.depth > 1:
            self.depth -= 1
            self._doomed = self._doomed or not success
            return
        if self._doomed or not success:
            self._undo()
            if success:
                raise OperationalError(
                    f"SQLite file {self.path!r}: a part of the transaction had failed, all is undone"
                )
            return
        if self._wanted is not None:
            self.depth = 0
            return
        try:
            for participant in self.participants:
                participant.flush()
            self.connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._undo()
            raise self.translated(error) from error
        except BaseException:
            self._undo()
            raise
        self.depth = 0
        if self._added:
            self._wake()

    def _undo(self) -> None:
        self.depth = 0
        self._doomed = False
        self._wanted = None
        self._added.clear()
        for participant in self.participants:
            participant.forget()
        # SQLite has undone it by itself after some errors (disk full).
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")

    # -- statements

    @property
    def patience_s(self) -> float:
        """How long to wait for a lock by default: a worker's loop only a moment."""
        return self.options.worker_busy_timeout if self.participants else self.options.busy_timeout

    def read(self, sql: str, parameters: Sequence[Any] = ()) -> List[Any]:
        """Run one query; return all rows."""
        try:
            return self.connection.execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            if "decode to UTF-8" in str(error):
                # Text that nobody could have written through here: shown mangled, not refused.
                self.connection.text_factory = _lenient_text
            elif not _is_busy(error):
                raise self.translated(error) from error
            rows: List[Any] = self._retry(
                lambda: self.connection.execute(sql, parameters).fetchall(), self.patience_s
            )
            return rows

    def write(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run one statement inside the open transaction; return the number of rows it changed."""
        if self._wanted is not None:
            self.begin()
        try:
            return self.connection.execute(sql, parameters).rowcount
        except sqlite3.Error as error:
            raise self.translated(error) from error

    def write_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> int:
        """Run one statement for each row inside the open transaction; return the rows changed."""
        if self._wanted is not None:
            self.begin()
        try:
            return self.connection.executemany(sql, rows).rowcount
        except sqlite3.Error as error:
            raise self.translated(error) from error

    def version(self) -> Tuple[int, int]:
        """Return a value that differs when this or another handle has written since."""
        return self.read("PRAGMA data_version")[0][0], self.connection.total_changes

    def _retry(self, call: Callable[[], Any], timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        pause_s = 0.0002
        while True:
            try:
                return call()
            except sqlite3.Error as error:
                left_s = deadline - time.monotonic()
                if not _is_busy(error):
                    raise self.translated(error) from error
                if left_s <= 0:
                    raise OperationalError(
                        f"SQLite file {self.path!r} stayed locked by another process for {timeout_s:g} s:"
                        " try again"
                    ) from error
            # Jitter, so that equal processes do not meet again and again.
            time.sleep(min(random.uniform(0.5, 1.0) * pause_s, left_s))
            pause_s = min(pause_s * 1.5, 0.02)

    def translated(self, error: sqlite3.Error) -> MiniqError:
        """Return miniq's error for one of sqlite3's; its text says what to do."""
        text = str(error)
        file = f"SQLite file {self.path!r}"
        if "full" in text:
            return OperationalError(
                f"{file}: the disk is full ({text}); nothing was stored, free space and try again"
            )
        if "disk I/O" in text:
            return OperationalError(
                f"{file}: {text}; nothing was stored, check the disk, its quota"
                " and that the file still exists"
            )
        if "readonly" in text:
            return ImproperlyConfigured(f"{file} or its folder is read-only: let this user write to both")
        if "not a database" in text:
            return ImproperlyConfigured(f"{file} is not a database: name another file or move this one away")
        if "malformed" in text:
            return ImproperlyConfigured(
                f"{file} is damaged ({text}): stop all workers, move it away together with its -wal and -shm"
                " files and save what is left with: sqlite3 FILE .recover"
            )
        if "unable to open" in text:
            return ImproperlyConfigured(
                f"{file} cannot be opened: check that this user may read and write it and its folder"
            )
        return OperationalError(f"{file}: {text}")

    # -- wake-ups

    def added(self, exchange: str, routing_key: str) -> None:
        """Note that the open transaction adds messages; consumers are woken when it commits."""
        self._added.add((exchange, routing_key))
        if self._ports_seen:
            self._ports_seen.clear()

    def has_looked(self, port: int) -> None:
        """Note that the consumer at `port` has seen what the open transaction added so far."""
        if self._added:
            self._ports_seen.add(port)

    def _wake(self) -> None:
        """Send one datagram to each consumer that may want what was added.

        The list of consumers is up to a second old: one that is missing in it, or does not get the
        datagram, finds the message when it looks by itself.
        """
        added, seen = self._added, self._ports_seen
        self._added, self._ports_seen = set(), set()
        try:
            mono = time.monotonic()
            if mono > self._ports_until_mono:
                self._ports.clear()
                self._ports_until_mono = mono + 1.0
            if not any(self._ports.values()):
                # "Nobody" is remembered for a moment only: a worker may just be starting.
                self._ports_until_mono = min(self._ports_until_mono, mono + 0.02)
            ports: Set[int] = set()
            for route in added:
                found = self._ports.get(route)
                if found is None:
                    found = self._ports[route] = self._ports_for(*route)
                ports.update(found)
            for port in ports - seen:
                if self._socket is None:
                    self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                    self._socket.setblocking(False)
                self._socket.sendto(b"", ("127.0.0.1", port))
        except (OSError, MiniqError) as error:
            # The messages are committed; their consumers look again within `poll_interval_s`.
            logger.debug("SQLite file %r: could not wake consumers: %s", self.path, error)

    def _ports_for(self, exchange: str, routing_key: str) -> List[int]:
        if exchange:
            # Any queue of the exchange: waking one too many is cheaper than matching topics again.
            queues = {row[0] for row in self.read("SELECT queue FROM bindings WHERE exchange=?", (exchange,))}
        else:
            queues = {routing_key}
        rows = self.read("SELECT port, queues FROM owners WHERE port IS NOT NULL")
        return [port for port, names in rows if not queues.isdisjoint(json.loads(names))]

    # -- upkeep

    def bound_log(self) -> None:
        """Cut the write-ahead log back where long readers made it grow."""
        try:
            size = os.stat(self.path + "-wal").st_size
        except FileNotFoundError:
            return
        if size > MAX_WAL_BYTES:
            self.read("PRAGMA wal_checkpoint(TRUNCATE)")

    def check(self) -> None:
        """Look for damage, if the file is small enough to do so in some ten milliseconds."""
        if os.stat(self.path).st_size > MAX_CHECKED_BYTES:
            return
        (finding,) = self.read("PRAGMA quick_check(1)")[0]
        if finding != "ok":
            raise self.translated(sqlite3.DatabaseError(f"malformed: {finding}"))


_handles = threading.local()


def _is_busy(error: sqlite3.Error) -> bool:
    text = str(error)
    return "locked" in text or "locking protocol" in text


def _lenient_text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _warn_of_network_file_system(path: str) -> None:
    if path in _warned_paths or not os.path.exists("/proc/mounts"):
        return
    _warned_paths.add(path)
    longest, kind = "", ""
    with open("/proc/mounts", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            fields = line.split(" ")
            point = fields[1].replace("\\040", " ")
            inside = path == point or path.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(longest):
                longest, kind = point, fields[2]
    if kind in _NETWORK_FILE_SYSTEMS:
        logger.warning(
            "SQLite file %r is on a network file system (%s at %s): locks are not reliable there, messages"
            " may be lost or run twice; use a local disk, or Redis or RabbitMQ as the broker",
            path,
            kind,
            longest,
        )

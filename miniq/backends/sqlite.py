# SPDX-License-Identifier: MIT
"""Results in a SQLite file, usually the one that is the broker too.

On the same file and thread as a transport it shares the handle, and what is written joins the open
transaction: result, part of a chord, follow-ups and acknowledgement happen together or not at all.

A waiter looks, then asks SQLite whether anybody has written since (some microseconds), with a
pause that grows with the time it has waited: a tenth of it, between half a millisecond and 50 ms.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

from ..connections.sqlite import MAX_VARIABLES, Database, Options, path_of
from ..exceptions import BackendGetMetaError, BackendStoreError, OperationalError
from ..states import READY_STATES, UNREADY_STATES
from .base import MOST_LEFT_OVER, SENDING_S, StoredResult, pause_between_looks_s
from .chords import MARK_PLACE, Chord, ChordBooks

#: Rows that one `expire` deletes in one transaction, and how many of these it does at most.
EXPIRE_BATCH = 1000
EXPIRE_ROUNDS = 100
#: The same of chords, which take their parts with them.
EXPIRE_CHORDS = 10
#: SQLite holds a row of at most 1,000,000,000 bytes.
MAX_BODY_BYTES = 999_000_000

_FINAL = ", ".join(f"'{state}'" for state in sorted(READY_STATES))
_UNREADY = ", ".join(f"'{state}'" for state in sorted(UNREADY_STATES))
# states.may_replace in SQL; a result past its time is as good as none.
_STORE = (
    "INSERT INTO results(task_id, state, body, content_type, content_encoding, expires)"
    " VALUES(?, ?, ?, ?, ?, ?)"
    " ON CONFLICT(task_id) DO UPDATE SET state=excluded.state, body=excluded.body, expires=excluded.expires,"
    " content_type=excluded.content_type, content_encoding=excluded.content_encoding"
    " WHERE (results.state<>'SUCCESS'"
    f" AND (excluded.state IN ({_FINAL}) OR results.state NOT IN ({_FINAL}))"
    f" AND (excluded.state<>'STARTED' OR results.state IN ({_UNREADY}))) OR results.expires<=?"
)


_WRITE_CHORD = (
    "INSERT INTO chords(group_id, size, extra, arrived, claim, claimed_until, done, expires)"
    " VALUES(?, ?, ?, ?, ?, ?, ?, ?)"
    " ON CONFLICT(group_id) DO UPDATE SET size=excluded.size, extra=excluded.extra, arrived=excluded.arrived,"
    " claim=excluded.claim, claimed_until=excluded.claimed_until, done=excluded.done,"
    " expires=excluded.expires"
)


class SQLiteBackend(ChordBooks):
    """One thread's way to the results in a SQLite file."""

    def __init__(self, url: str, options: Mapping[str, Any], wall: Callable[[], float]) -> None:
        self._path = path_of(url)
        self._options = Options.read(options, url)
        self._wall = wall
        self._db: Optional[Database] = None
        self._inherited: List[Database] = []

    def _database(self) -> Database:
        db = self._db
        if db is None or not db.usable_here():
            if db is not None:
                self._inherited.append(db)
            db = self._db = Database.open(self._path, self._options)
        return db

    def store(self, results: Sequence[StoredResult]) -> None:
        if not results:
            return
        now = self._wall()
        rows = [
            (
                task_id,
                state,
                body,
                content_type,
                encoding,
                None if expires_s is None else now + expires_s,
                now,
            )
            for task_id, state, body, content_type, encoding, expires_s, _ in results
        ]
        first = results[0]
        for result in results:
            if len(result.body) > MAX_BODY_BYTES:
                raise BackendStoreError(
                    f"SQLite file {self._path!r}: a result of {len(result.body)} bytes is too large,"
                    f" the most is {MAX_BODY_BYTES}", task_id=result.task_id, state=result.state,
                )  # fmt: skip
        joins = False
        try:
            db = self._database()
            joins = db.depth > 0
            with db.transaction(self._options.worker_synchronous):
                db.write_many(_STORE, rows)
        except OperationalError as error:
            if joins:
                # Not about these results: the whole transaction cannot be, and is to be tried again.
                raise
            raise BackendStoreError(str(error), task_id=first.task_id, state=first.state) from error

    @property
    def joins(self) -> bool:
        return self._database().depth > 0

    def fetch(self, task_ids: Sequence[str]) -> Dict[str, StoredResult]:
        return self._look(task_ids, "")

    def _look(self, task_ids: Sequence[str], condition: str) -> Dict[str, StoredResult]:
        now = self._wall()
        found: Dict[str, StoredResult] = {}
        try:
            db = self._database()
            for start in range(0, len(task_ids), MAX_VARIABLES):
                chunk = task_ids[start : start + MAX_VARIABLES]
                rows = db.read(
                    "SELECT task_id, state, body, content_type, content_encoding, expires FROM results"
                    f" WHERE task_id IN ({','.join('?' * len(chunk))})"
                    f" AND (expires IS NULL OR expires>?){condition}",
                    (*chunk, now),
                )
                for task_id, state, body, content_type, encoding, expires in rows:
                    left_s = None if expires is None else expires - now
                    found[task_id] = StoredResult(task_id, state, body, content_type, encoding, left_s)
        except OperationalError as error:
            raise BackendGetMetaError(str(error), task_id=task_ids[0]) from error
        return found

    def wait(
        self,
        task_ids: Sequence[str],
        timeout_s: Optional[float],
        interval_s: Optional[float] = None,
        unready: bool = False,
    ) -> Iterator[StoredResult]:
        longest_s = 0.05 if interval_s is None else min(max(interval_s, 0.0005), 0.05)
        pending = dict.fromkeys(task_ids)
        reported: Dict[str, Tuple[str, bytes]] = {}
        condition = "" if unready else f" AND state IN ({_FINAL})"
        start = progress = time.monotonic()
        version: Optional[Tuple[int, int]] = None
        while pending:
            look_s = 0.0
            latest = self._version()
            if latest != version:
                version = latest
                before = time.monotonic()
                found = self._look(list(pending), condition)
                look_s = time.monotonic() - before
                for task_id, stored in found.items():
                    if stored.state in READY_STATES:
                        del pending[task_id]
                    elif reported.get(task_id) == (stored.state, stored.body):
                        continue
                    reported[task_id] = (stored.state, stored.body)
                    progress = time.monotonic()
                    yield stored
                if not pending:
                    return
            mono = time.monotonic()
            left_s = float("inf") if timeout_s is None else start + timeout_s - mono
            if left_s <= 0:
                return
            time.sleep(min(pause_between_looks_s(mono - progress, look_s, longest_s), left_s))

    def _version(self) -> Tuple[int, int]:
        try:
            return self._database().version()
        except OperationalError as error:
            raise BackendGetMetaError(str(error)) from error

    def forget(self, task_ids: Iterable[str]) -> None:
        with self._changing() as db:
            db.write_many("DELETE FROM results WHERE task_id=?", [(task_id,) for task_id in task_ids])

    def expire(self) -> int:
        """See `Backend.expire`; a chord counts as one, whatever it had of parts."""
        return (
            self._expire("results", EXPIRE_BATCH)
            + self._expire("groups", EXPIRE_BATCH)
            + self._expire("chords", EXPIRE_CHORDS)
        )

    def _expire(self, table: str, batch: int) -> int:
        removed = 0
        due = f"SELECT rowid FROM {table} WHERE expires<=? LIMIT "
        for _ in range(EXPIRE_ROUNDS):
            now = self._wall()
            if not self._read(due + "1", (now,)):
                break
            with self._changing() as db:
                removed += db.write(f"DELETE FROM {table} WHERE rowid IN ({due}{batch})", (now,))
        return removed

    @contextmanager
    def _changing(self) -> Iterator[Database]:
        """Change something, now or with the open transaction."""
        joins = False
        try:
            db = self._database()
            joins = db.depth > 0
            with db.transaction():
                # First of all: what is read before it is changed must not change in between.
                db.begin()
                yield db
        except OperationalError as error:
            if joins:
                raise
            raise BackendStoreError(str(error)) from error

    def _read(self, sql: str, parameters: Sequence[Any]) -> List[Any]:
        try:
            return self._database().read(sql, parameters)
        except OperationalError as error:
            raise BackendGetMetaError(str(error)) from error

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    # -- groups

    def save_group(self, group_id: str, body: bytes, expires_s: Optional[float]) -> None:
        until = None if expires_s is None else self._wall() + expires_s
        with self._changing() as db:
            db.write(
                "INSERT OR REPLACE INTO groups(group_id, body, expires) VALUES(?, ?, ?)",
                (group_id, body, until),
            )

    def load_group(self, group_id: str) -> Optional[bytes]:
        rows = self._read(
            "SELECT body FROM groups WHERE group_id=? AND (expires IS NULL OR expires>?)",
            (group_id, self._wall()),
        )
        return rows[0][0] if rows else None

    def delete_group(self, group_id: str) -> None:
        with self._changing() as db:
            db.write("DELETE FROM groups WHERE group_id=?", (group_id,))

    # -- chords

    def _read_chord(self, group_id: str) -> Optional[Chord]:
        rows = self._database().read(
            "SELECT size, extra, arrived, claim, claimed_until, done, expires FROM chords WHERE group_id=?",
            (group_id,),
        )
        return Chord(*rows[0]) if rows else None

    def _write_chord(self, group_id: str, chord: Chord) -> None:
        self._database().write(_WRITE_CHORD, (group_id, *chord))

    def _write_body(self, group_id: str, body: bytes) -> None:
        self._database().write(
            "INSERT OR REPLACE INTO chord_bodies(group_id, body) VALUES(?, ?)", (group_id, body)
        )

    def _add_part(self, group_id: str, place: int, task_id: str, entry: bytes) -> bool:
        if len(entry) > MAX_BODY_BYTES:
            raise BackendStoreError(
                f"SQLite file {self._path!r}: a part of a chord of {len(entry)} bytes is too large, the most"
                f" is {MAX_BODY_BYTES}", task_id=task_id,
            )  # fmt: skip
        added = self._database().write(
            "INSERT OR IGNORE INTO chord_parts(group_id, place, task_id, entry) VALUES(?, ?, ?, ?)",
            (group_id, place, task_id, entry),
        )
        return added > 0

    def _drop_parts(self, group_id: str) -> None:
        db = self._database()
        db.write("DELETE FROM chord_bodies WHERE group_id=?", (group_id,))
        db.write("DELETE FROM chord_parts WHERE group_id=?", (group_id,))

    def chord_entries(self, group_id: str) -> List[bytes]:
        rows = self._read(
            "SELECT entry FROM chord_parts WHERE group_id=? AND place>? ORDER BY place, task_id",
            (group_id, MARK_PLACE),
        )
        return [entry for (entry,) in rows]

    def chords_left_over(self, now: float) -> List[Tuple[str, bytes]]:
        # A claim that lasts too long is of a clock that was set back.
        return self._read(
            "SELECT group_id, body FROM chords JOIN chord_bodies USING(group_id)"
            " WHERE (claimed_until<=? OR claimed_until>?) AND NOT done AND arrived>=size+extra"
            f" AND (expires IS NULL OR expires>?) LIMIT {MOST_LEFT_OVER}",
            (now, now + SENDING_S, now),
        )

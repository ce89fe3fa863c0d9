# SPDX-License-Identifier: MIT
"""Records of beat in a SQLite file: the broker's own, the result backend's, or one for beat alone.

In the broker's file a message and its tick are one transaction.  A file of beat's own that cannot be
read is renamed and a new one begun: the schedule is in the code, and what was added at run time can
be added again, while a beat that does not start sends nothing at all.  The broker's file is never
touched so: there are messages in it.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional

from .beat_store import Publish, ScheduleStore, new_version
from .connections.owners import OwnerLocks
from .connections.sqlite import Database, Options, path_of
from .exceptions import ImproperlyConfigured, OperationalError

logger = logging.getLogger(__name__)

#: The row that holds the version; no entry can be called so.
_VERSION = ""
#: The lock that is held while a file of beat's own is opened; workers' numbers begin with 1.
_OPENING = 0
#: So many seconds others may take to open it.
OPEN_PATIENCE_S = 5.0
_PUT = (
    "INSERT INTO schedule(name, record) VALUES(?, ?) ON CONFLICT(name) DO UPDATE SET record=excluded.record"
)


class SQLiteStore(ScheduleStore):
    """A table in a SQLite file, one handle per thread."""

    is_local = True

    def __init__(self, app: Any, url: str) -> None:
        self._path = path_of(url)
        broker = app.broker_url(write=True)
        self.atomic = broker.lower().startswith("sqlite:") and path_of(broker) == self._path
        results = app.backend_url()
        shared = self.atomic or (results.lower().startswith("sqlite:") and path_of(results) == self._path)
        self._is_own = not shared
        options = app.broker_options(broker) if self.atomic else {}
        self._options = Options.read(options, url)
        self.where = url
        self._db: Optional[Database] = None
        #: Handles of other threads and processes: neither used nor closed here.
        self._others: List[Database] = []

    def _database(self) -> Database:
        db = self._db
        if db is not None and db.usable_here():
            return db
        if db is not None:
            self._others.append(db)
        db = self._db = self._open_own() if self._is_own else Database.open(self._path, self._options)
        return db

    def _open_own(self) -> Database:
        with self._alone():
            try:
                return self._open_checked()
            except ImproperlyConfigured as error:
                if not _is_damage(error):
                    raise
                self._set_aside(error)
            return self._open_checked()

    def _open_checked(self) -> Database:
        db = Database.open(self._path, self._options)
        try:
            db.check()
        except BaseException:
            db.close()
            raise
        return db

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from opening the file: two that find it damaged must end with one new one.

        Nor may one that looks have it open while another moves it: SQLite cleans up by name.
        """
        locks = OwnerLocks.of(self._path)
        until_mono = time.monotonic() + OPEN_PATIENCE_S
        while True:
            try:
                locks.take(_OPENING)
                break
            except OperationalError:
                if time.monotonic() > until_mono:
                    raise
            time.sleep(0.01)
        try:
            yield
        finally:
            locks.drop(_OPENING)

    def _set_aside(self, error: Exception) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        aside = f"{self._path}.unreadable-{stamp}-{os.getpid()}"
        for suffix in ("", "-wal", "-shm"):
            try:
                os.replace(self._path + suffix, aside + suffix)
            except FileNotFoundError:
                pass  # it has no such part
        logger.warning(
            "beat: the state could not be read (%s); it is now %r and a new one is begun: what was added at"
            " run time is to be added again, all other entries begin anew",
            error,
            aside,
        )

    def load(self) -> Dict[str, str]:
        return dict(self._database().read("SELECT name, record FROM schedule WHERE name<>?", (_VERSION,)))

    def read(self, name: str) -> Optional[str]:
        rows = self._database().read("SELECT record FROM schedule WHERE name=?", (name,))
        return rows[0][0] if rows else None

    def version(self) -> Optional[str]:
        return self.read(_VERSION)

    def swap(
        self,
        name: str,
        old: Optional[str],
        new: Optional[str],
        publish: Publish = None,
        announce: bool = False,
    ) -> bool:
        db = self._database()
        if self.read(name) != old:
            return False  # looked at first: who comes too late takes no lock from the others
        with db.transaction(self._options.synchronous):
            db.begin()
            if self.read(name) != old:
                return False
            if new is None:
                db.write("DELETE FROM schedule WHERE name=?", (name,))
            else:
                db.write(_PUT, (name, new))
            if announce:
                db.write(_PUT, (_VERSION, new_version()))
            if publish is not None:
                publish()
        return True

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


def _is_damage(error: Exception) -> bool:
    """Say whether the file itself is unreadable, and not just out of reach."""
    return type(error.__cause__) is sqlite3.DatabaseError or "is damaged" in str(error)

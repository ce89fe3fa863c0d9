# SPDX-License-Identifier: MIT
"""Where beat keeps its records: the seam, and which store an app's schedule is in.

A store is text under names with compare-and-set.  `ScheduleStore.swap` replaces a record only if it
still is what the caller read, and where the store is also the broker, a message that is sent inside
goes with it: both happen or neither.  So a tick is sent once, whoever is killed or stopped when.

It is the broker's own store where that can keep records (SQLite, Redis, memory); with RabbitMQ the
result backend's, if that is Redis or SQLite; else, or where `beat_schedule_filename` says so, a
SQLite file of its own.  Only in the first case is sending part of the swap (`atomic`).
"""

from __future__ import annotations

import os
import uuid
import weakref
from typing import Any, Callable, Dict, Optional

from .backends.base import BACKENDS
from .connections.memory import MemoryBroker, broker_name
from .text import import_object, mask_url
from .transports.base import TRANSPORTS

#: Kind of store -> "module:Class", relative to this package.
STORES: Dict[str, str] = {
    "memory": ".beat_store:MemoryStore",
    "redis": ".beat_redis:RedisStore",
    "sqlite": ".beat_sqlite:SQLiteStore",
}
#: The file where neither broker nor results can keep records and no setting names one.
DEFAULT_FILE = "celerybeat-schedule"
FILE_SUFFIX = ".sqlite"

Publish = Optional[Callable[[], Any]]


class ScheduleStore:
    """Records of entries, for one thread at a time; `OperationalError` = try again later."""

    #: What is published inside `swap` happens together with it.
    atomic = False
    #: Only beats of one machine can share it.
    is_local = False
    #: Where it is, for people; passwords are masked.
    where = ""

    def load(self) -> Dict[str, str]:
        """Return all records: name -> text."""
        raise NotImplementedError

    def read(self, name: str) -> Optional[str]:
        """Return one record, None if there is none."""
        raise NotImplementedError

    def version(self) -> Optional[str]:
        """Return text that is another one after each swap with `announce`, and when all was lost."""
        raise NotImplementedError

    def swap(
        self,
        name: str,
        old: Optional[str],
        new: Optional[str],
        publish: Publish = None,
        announce: bool = False,
    ) -> bool:
        """Replace a record if it is still `old`, and call `publish` inside; False = it is not.

        None as `old` means that there must be none (then there is no `publish`), as `new` that it is
        deleted.  What `publish` raises leaves the record as it was.  `announce` tells other beats to
        read all records anew.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Let go of this thread's connection."""


class MemoryStore(ScheduleStore):
    """Records beside the messages of a ``memory://`` broker."""

    atomic = is_local = True

    def __init__(self, app: Any, url: str) -> None:
        self.where = url
        self._broker = MemoryBroker.get(broker_name(url))
        self._table: Dict[str, str] = _tables.setdefault(self._broker, {})

    def load(self) -> Dict[str, str]:
        with self._broker:
            return {key[1:]: text for key, text in self._table.items() if key[0] == "/"}

    def read(self, name: str) -> Optional[str]:
        with self._broker:
            return self._table.get("/" + name)

    def version(self) -> Optional[str]:
        with self._broker:
            return self._table.get("version")

    def swap(
        self,
        name: str,
        old: Optional[str],
        new: Optional[str],
        publish: Publish = None,
        announce: bool = False,
    ) -> bool:
        with self._broker as broker:
            if self._table.get("/" + name) != old:
                return False
            broker.set_item(self._table, "/" + name, new)
            if announce:
                broker.set_item(self._table, "version", new_version())
            if publish is not None:
                publish()
        return True


_tables: "weakref.WeakKeyDictionary[MemoryBroker, Dict[str, str]]" = weakref.WeakKeyDictionary()


def new_version() -> str:
    """Return text that was no version before."""
    return uuid.uuid4().hex


def open_store(app: Any, filename: Optional[str] = None) -> ScheduleStore:
    """Return the store of an app's schedule; `filename` (default: the setting) names a file of its own."""
    filename = filename or app.conf.beat_schedule_filename
    url = app.broker_url(write=True)
    kind = _kind(url, TRANSPORTS)
    if kind not in STORES:
        url = app.backend_url()
        kind = _kind(url, BACKENDS)
    if filename or kind not in STORES or (kind == "memory" and url != app.broker_url(write=True)):
        kind, url = "sqlite", "sqlite:///" + state_file(filename or DEFAULT_FILE)
    store: ScheduleStore = import_object(STORES[kind], package=__package__)(app, url)
    store.where = store.where or mask_url(url)
    return store


def state_file(name: str) -> str:
    """Return the name of a file of beat's own; one without an extension gets ``.sqlite``."""
    return name if os.path.splitext(name)[1] else name + FILE_SUFFIX


def _kind(url: str, table: Dict[str, str]) -> str:
    """Return the module that serves a URL: "sqlite", "redis" ..."""
    return table.get(url.partition("://")[0].lower(), "").partition(":")[0].lstrip(".")

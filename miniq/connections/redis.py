# SPDX-License-Identifier: MIT
"""Redis and Valkey servers: what a list of URLs names, with a pool, failover and sentinels.

A `Server` makes connections to the first server that answers and is a master, and keeps a small
pool of them.  It has no thread: a connection that died while it was idle is noticed when it is
taken.  What a connection can do is in `redis_connection`, and what URLs and options may say in
`redis_options`.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections import deque
from time import monotonic
from types import TracebackType
from typing import Deque, Dict, List, Optional, Tuple, Type

from ..codecs.resp import Push, ReplyError
from ..exceptions import ImproperlyConfigured, MiniqError, OperationalError
from ..text import mask_url
from .redis_connection import Connection, Part, Script, left_until, text_of
from .redis_options import Endpoint, Options, endpoints
from .stream import Stream

__all__ = ("Connection", "Options", "Part", "Push", "ReplyError", "Script", "Server")

logger = logging.getLogger(__name__)


class Server:
    """What a list of URLs names, for all threads of this process.  Get it with `of`.

    `url` is masked, for messages.  Two servers with an equal `key` are the same database.  A forked
    child may go on using its copy: that forgets the parent's connections and begins anew.
    """

    def __init__(self, urls: str, options: Options) -> None:
        """Parse `urls`; `ImproperlyConfigured` says what is wrong with them."""
        self.url = mask_url(urls)
        self.options = options
        self.endpoints = endpoints(urls, options)
        self.db = self.endpoints[0].db
        self.key = tuple(endpoint.key for endpoint in self.endpoints)
        self._begin_anew()

    @staticmethod
    def of(urls: str, options: Options) -> "Server":
        """Return this process' one for `urls` (several with ``;`` between them) and `options`."""
        place = (os.getpid(), urls, options)
        found = _servers.get(place)
        if found is None:
            _close_at_exit()
            # No lock that a fork could catch: the first of two threads wins.
            found = _servers.setdefault(place, Server(urls, options))
            for other in [key for key in list(_servers) if key[0] != place[0]]:
                _servers.pop(other, None)
        return found

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self._last_good = 0
        self._was_let_in = False
        self._good_sentinel = 0
        #: Free ones, the last used at the right; appending and popping are atomic.
        self._idle: Deque[Connection] = deque()
        #: All of the pool that live, lent ones too.  A weak set, not a counter: one that was lost, as
        #: by an exception from a signal at the wrong moment, makes room when it is collected.
        self._members: "weakref.WeakSet[Connection]" = weakref.WeakSet()
        self._connecting = 0
        self._waiting = 0
        self._broke_mono = 0.0  # when one of them last broke
        self._returned = threading.Condition(threading.Lock())

    # -- connecting

    def connect(self, timeout_s: float, name: str = "") -> Connection:
        """Return a new connection of the caller's own, to a master; `name` is for CLIENT LIST.

        The URLs are tried in turn, the last good one first, each with its share of the time.
        Raises `OperationalError`, or `ImproperlyConfigured` if none can be used as configured; once one
        could, that is `OperationalError` too: a password that is being changed must cost nobody his work.
        """
        if self._pid != os.getpid():
            self._begin_anew()
        deadline_mono = monotonic() + timeout_s
        failures: List[MiniqError] = []
        count = len(self.endpoints)
        first = self._last_good
        for turn in range(count):
            index = (first + turn) % count
            share_s = min(left_until(deadline_mono) / (count - turn), self.options.socket_connect_timeout)
            try:
                found = self._connect_to(self.endpoints[index], name, monotonic() + share_s)
            except (OperationalError, ImproperlyConfigured) as error:
                failures.append(error)
                continue
            self._last_good = index
            self._was_let_in = True
            return found
        if self._was_let_in:
            told = "; ".join(map(str, failures))
            text = told if count == 1 else f"none of {count} servers can be used: {told}"
            raise OperationalError(text) from failures[-1]
        if len(failures) == 1:
            raise failures[0]
        kinds = {type(failure) for failure in failures}
        kind = ImproperlyConfigured if kinds == {ImproperlyConfigured} else OperationalError
        raise kind(f"none of {count} servers can be used: {'; '.join(map(str, failures))}") from failures[-1]

    def _connect_to(self, endpoint: Endpoint, name: str, deadline_mono: float) -> Connection:
        if endpoint.sentinels:
            return self._ask_sentinels(endpoint, name, deadline_mono)
        found = _open(endpoint, self.options, name, deadline_mono)
        return _master(found)

    def _ask_sentinels(self, endpoint: Endpoint, name: str, deadline_mono: float) -> Connection:
        """Connect to the master that a sentinel names and that says itself it is one."""
        options = self.options.for_sentinels()
        failures: List[MiniqError] = []
        count = len(endpoint.sentinels)
        first = self._good_sentinel
        for turn in range(count):
            index = (first + turn) % count
            host, port = endpoint.sentinels[index]
            share_s = left_until(deadline_mono) / (count - turn)
            until_mono = monotonic() + share_s
            sentinel = endpoint._replace(
                url=f"sentinel {host}:{port}", address=(host, port), db=0,
                username=options.username, password=options.password, tls=options.ssl,
            )  # fmt: skip
            try:
                # Half of the time for the question, so that one which is silent leaves some for others.
                asking = _open(sentinel, options, name, monotonic() + share_s / 2)
                try:
                    answer = asking.call(
                        "SENTINEL",
                        "GET-MASTER-ADDR-BY-NAME",
                        endpoint.master_name,
                        timeout_s=left_until(until_mono),
                    )
                finally:
                    asking.close()
                if not answer:
                    raise ImproperlyConfigured(
                        f"{sentinel.url} knows no master called {endpoint.master_name!r}: check master_name"
                    )
                address = (text_of(answer[0]), int(answer[1]))
                master = endpoint._replace(
                    url=f"{endpoint.url} (master {address[0]}:{address[1]})", address=address
                )
                found = _master(_open(master, self.options, name, until_mono))
            except (OperationalError, ImproperlyConfigured) as error:
                failures.append(error)
                continue
            self._good_sentinel = index
            return found
        kinds = {type(failure) for failure in failures}
        kind = ImproperlyConfigured if kinds == {ImproperlyConfigured} else OperationalError
        raise kind(f"{endpoint.url}: no master found: {'; '.join(map(str, failures))}") from failures[-1]

    # -- the pool

    def borrow(self, timeout_s: float) -> "Loan":
        """Return a context that lends a connection of the pool: ``with server.borrow(5.0) as connection``.

        At most `max_connections` are lent at a time; who comes then waits, up to `timeout_s`, which
        is also for connecting.
        """
        return Loan(self, timeout_s)

    def take(self, timeout_s: float) -> Connection:
        """Take a connection out of the pool; give it back with `give_back`, whatever happens."""
        if self._pid != os.getpid():
            self._begin_anew()
        deadline_mono = monotonic() + timeout_s
        while True:
            try:
                connection: Optional[Connection] = self._idle.pop()
            except IndexError:
                connection = None
            # Out here, so that an error has no other one before it.
            if connection is None:
                connection = self._make_or_wait(deadline_mono)
                if connection is not None:
                    return connection
            elif self._is_usable(connection, deadline_mono):
                return connection

    def _is_usable(self, connection: Connection, deadline_mono: float) -> bool:
        """Say whether a connection that lay idle still is one; if not, drop it."""
        try:
            if connection.has_input():
                connection.take_pushes()  # raises if it is the server's goodbye
            idle_since = connection.idle_since_mono
            # What broke another one since then may have hit this one too.
            if idle_since < max(self._broke_mono, monotonic() - self.options.health_check_interval):
                # Half of the time at most: some is left to connect.
                left_s = left_until(deadline_mono) / 2
                connection.call("PING", timeout_s=min(left_s, self.options.socket_timeout))
            return True
        except (OperationalError, ImproperlyConfigured) as error:
            logger.debug("%s: the idle connections are replaced: %s", self.url, error)
            self._drop(connection)
            self.close()  # the others were idle for longer
            return False

    def _make_or_wait(self, deadline_mono: float) -> Optional[Connection]:
        """Return a new connection if there may be one more, None after a wait for another's return."""
        with self._returned:
            if self._idle:
                return None
            limit = self.options.max_connections
            if len(self._members) + self._connecting >= limit:
                left_s = left_until(deadline_mono)
                if left_s <= 0:
                    raise OperationalError(
                        f"{self.url}: all {limit} connections of the pool are in use, none came back in time;"
                        " raise the transport option max_connections, or use fewer threads"
                    )
                self._waiting += 1
                try:
                    # Not to the deadline in one go: a lost one that is collected tells nobody.
                    self._returned.wait(min(left_s, 1.0))
                finally:
                    self._waiting -= 1
                return None
            self._connecting += 1
        try:
            connection = self.connect(left_until(deadline_mono))
            self._members.add(connection)
            return connection
        finally:
            with self._returned:
                self._connecting -= 1
                self._returned.notify()

    def give_back(self, connection: Connection) -> None:
        """Put a connection back; one that broke is closed instead."""
        if connection.pid != os.getpid():
            connection.close()  # lent before a fork: none of this process' pool
        elif connection.broken:
            self._broke_mono = monotonic()
            self._drop(connection)
        else:
            connection.idle_since_mono = monotonic()
            self._idle.append(connection)
            if self._waiting:
                with self._returned:
                    self._returned.notify()

    def _drop(self, connection: Connection) -> None:
        connection.close()
        with self._returned:
            self._members.discard(connection)
            self._returned.notify()

    def close(self) -> None:
        """Close the connections that lie idle."""
        while self._idle and self._pid == os.getpid():
            self._drop(self._idle.pop())

    @staticmethod
    def close_all() -> None:
        """Close the idle connections of all servers of this process and forget these."""
        while _servers:
            _servers.popitem()[1].close()


class Loan:
    """A connection of the pool for the time of a ``with``."""

    __slots__ = ("_server", "_timeout_s", "_connection")

    def __init__(self, server: Server, timeout_s: float) -> None:
        self._server = server
        self._timeout_s = timeout_s

    def __enter__(self) -> Connection:
        self._connection = self._server.take(self._timeout_s)
        return self._connection

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self._server.give_back(self._connection)


#: (pid, URLs, options) -> the server.
_servers: Dict[Tuple[int, str, Options], Server] = {}
_hooked = False


def _close_at_exit() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        atexit.register(Server.close_all)


def _open(endpoint: Endpoint, options: Options, name: str, deadline_mono: float) -> Connection:
    stream = Stream.connect(
        endpoint.address,
        deadline_mono,
        endpoint.url,
        options.tls() if endpoint.tls else None,
        options.socket_keepalive,
        options.socket_keepalive_options,
    )
    return Connection.open(stream, endpoint, options, name, deadline_mono)


def _master(connection: Connection) -> Connection:
    """Return `connection` if its server is a master; otherwise close it and raise."""
    if connection.role in ("slave", "replica"):
        connection.close()
        raise OperationalError(f"{connection.url}: this server is a replica, it takes no writes")
    return connection

# SPDX-License-Identifier: MIT
"""What all servers have in common that are named by a list of URLs: failover, a small pool, one for all.

A `Server` makes connections to the first URL that can be used, and keeps a pool of them.  It has no
thread: a connection that died while it was idle is noticed when it is taken.  What a connection is,
and how one is made, each broker's own class tells.
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
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Generic,
    Hashable,
    List,
    Optional,
    Protocol,
    Tuple,
    Type,
    TypeVar,
)

from ..exceptions import ImproperlyConfigured, MiniqError, OperationalError
from ..text import mask_url

logger = logging.getLogger(__name__)


class Pooled(Protocol):
    """What the pool wants of a connection."""

    broken: bool
    pid: int  #: of the process that made it
    idle_since_mono: float  #: kept here by the pool

    def close(self) -> None:
        """Close it; never raises."""


class PoolOptions(Hashable, Protocol):
    """What it wants of options."""

    @property
    def connect_timeout(self) -> float:
        """Seconds to connect to one server."""

    @property
    def socket_timeout(self) -> float:
        """Seconds for an answer."""

    @property
    def max_connections(self) -> int:
        """How many the pool may have."""

    @property
    def health_check_interval(self) -> float:
        """Seconds of idleness after which a connection is asked before it is used."""


class Place(Protocol):
    """What it wants of an endpoint."""

    @property
    def key(self) -> Tuple[Any, ...]:
        """What makes two endpoints the same place."""


C = TypeVar("C", bound=Pooled)
O = TypeVar("O", bound=PoolOptions)  # noqa: E741 - options
E = TypeVar("E", bound=Place)
S = TypeVar("S", bound="Server[Any, Any, Any]")


class Server(Generic[C, O, E]):
    """What a list of URLs names, for all threads of this process.  Get it with `of`.

    `url` is masked, for messages.  Two servers with an equal `key` are the same place.  A forked
    child may go on using its copy: that forgets the parent's connections and begins anew.
    """

    def __init__(self, urls: str, options: O) -> None:
        """Parse `urls`; `ImproperlyConfigured` says what is wrong with them."""
        self.url = mask_url(urls)
        self.options = options
        self.endpoints = self._endpoints(urls)
        self.key = tuple(endpoint.key for endpoint in self.endpoints)
        self._begin_anew()

    @classmethod
    def of(cls: Type[S], urls: str, options: PoolOptions) -> S:
        """Return this process' one for `urls` (several with ``;`` between them) and `options`."""
        place = (os.getpid(), cls, urls, options)
        found = _servers.get(place)
        if found is None:
            _close_at_exit()
            # No lock that a fork could catch: the first of two threads wins.
            found = _servers.setdefault(place, cls(urls, options))
            for other in [key for key in list(_servers) if key[0] != place[0]]:
                _servers.pop(other, None)
        assert isinstance(found, cls)
        return found

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self._last_good = 0
        self._was_let_in = False
        #: Free ones, the last used at the right; appending and popping are atomic.
        self._idle: Deque[C] = deque()
        #: All of the pool that live, lent ones too.  A weak set, not a counter: one that was lost, as
        #: by an exception from a signal at the wrong moment, makes room when it is collected.
        self._members: "weakref.WeakSet[C]" = weakref.WeakSet()
        self._connecting = 0
        self._waiting = 0
        self._broke_mono = 0.0  # when one of them last broke
        self._returned = threading.Condition(threading.Lock())

    # -- for the broker's own class to tell

    def _endpoints(self, urls: str) -> Tuple[E, ...]:
        """Return the places that `urls` names."""
        raise NotImplementedError

    def connect(self, timeout_s: float, name: str = "") -> C:
        """Return a new connection of the caller's own; `name` is what the server calls it."""
        raise NotImplementedError

    def _look_at(self, connection: C) -> None:
        """Raise if what has arrived on an idle connection, if anything, is the server's goodbye."""
        raise NotImplementedError

    def _ask(self, connection: C, timeout_s: float) -> None:
        """Raise if the server does not answer on an idle connection."""
        raise NotImplementedError

    # -- connecting

    def _connect_in_turn(self, timeout_s: float, connect_to: Callable[[E, float], C]) -> C:
        """Return the first connection that ``connect_to(endpoint, deadline_mono)`` can make.

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
            share_s = min((deadline_mono - monotonic()) / (count - turn), self.options.connect_timeout)
            try:
                found = connect_to(self.endpoints[index], monotonic() + share_s)
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
        if count == 1:
            raise failures[0]
        raise all_failed(f"none of {count} servers can be used", failures) from failures[-1]

    # -- the pool

    def borrow(self, timeout_s: float) -> "Loan[C]":
        """Return a context that lends a connection of the pool: ``with server.borrow(5.0) as connection``.

        At most `max_connections` are lent at a time; who comes then waits, up to `timeout_s`, which
        is also for connecting.
        """
        return Loan(self, timeout_s)

    def take(self, timeout_s: float) -> C:
        """Take a connection out of the pool; give it back with `give_back`, whatever happens."""
        if self._pid != os.getpid():
            self._begin_anew()
        deadline_mono = monotonic() + timeout_s
        while True:
            try:
                connection: Optional[C] = self._idle.pop()
            except IndexError:
                connection = None
            # Out here, so that an error has no other one before it.
            if connection is None:
                connection = self._make_or_wait(deadline_mono)
                if connection is not None:
                    return connection
            elif self._is_usable(connection, deadline_mono):
                return connection

    def _is_usable(self, connection: C, deadline_mono: float) -> bool:
        """Say whether a connection that lay idle still is one; if not, drop it."""
        try:
            self._look_at(connection)
            idle_since = connection.idle_since_mono
            now_mono = monotonic()
            # What broke another one since then may have hit this one too.
            if idle_since < max(self._broke_mono, now_mono - self.options.health_check_interval):
                # Half of the time at most: some is left to connect.
                left_s = (deadline_mono - now_mono) / 2
                self._ask(connection, min(left_s, self.options.socket_timeout))
            return True
        except (OperationalError, ImproperlyConfigured) as error:
            logger.debug("%s: the idle connections are replaced: %s", self.url, error)
            self._drop(connection)
            self.close()  # the others were idle for longer
            return False

    def _make_or_wait(self, deadline_mono: float) -> Optional[C]:
        """Return a new connection if there may be one more, None after a wait for another's return."""
        with self._returned:
            if self._idle:
                return None
            limit = self.options.max_connections
            if len(self._members) + self._connecting >= limit:
                left_s = deadline_mono - monotonic()
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
            connection = self.connect(deadline_mono - monotonic())
            self._members.add(connection)
            return connection
        finally:
            with self._returned:
                self._connecting -= 1
                self._returned.notify()

    def give_back(self, connection: C) -> None:
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

    def _drop(self, connection: C) -> None:
        connection.close()
        with self._returned:
            self._members.discard(connection)
            self._returned.notify()

    def close(self) -> None:
        """Close the connections that lie idle."""
        while self._idle and self._pid == os.getpid():
            self._drop(self._idle.pop())

    @classmethod
    def close_all(cls) -> None:
        """Close the idle connections of all servers of this kind in this process and forget these."""
        for place, server in list(_servers.items()):
            if isinstance(server, cls) and _servers.pop(place, None) is not None:
                server.close()


class Loan(Generic[C]):
    """A connection of the pool for the time of a ``with``."""

    __slots__ = ("_server", "_timeout_s", "_connection")

    def __init__(self, server: "Server[C, Any, Any]", timeout_s: float) -> None:
        self._server = server
        self._timeout_s = timeout_s

    def __enter__(self) -> C:
        self._connection = self._server.take(self._timeout_s)
        return self._connection

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self._server.give_back(self._connection)


def all_failed(told: str, failures: List[MiniqError]) -> MiniqError:
    """Return the one error for those of all attempts: for the operator only if all of them are."""
    kinds = {type(failure) for failure in failures}
    kind = ImproperlyConfigured if kinds == {ImproperlyConfigured} else OperationalError
    return kind(f"{told}: {'; '.join(map(str, failures))}")


#: (pid, class, URLs, options) -> the server.
_servers: Dict[Tuple[int, Type[Any], str, PoolOptions], "Server[Any, Any, Any]"] = {}
_hooked = False


def _close_at_exit() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        atexit.register(Server.close_all)

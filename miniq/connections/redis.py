# SPDX-License-Identifier: MIT
"""Redis and Valkey servers: what a list of URLs names, with a pool, failover and sentinels.

A `Server` makes connections to the first server that answers and is a master; the pool is that of
all servers.  What a connection can do is in `redis_connection`, and what URLs and options may say in
`redis_options`.
"""

from __future__ import annotations

from time import monotonic
from typing import List, Tuple

from ..codecs.resp import Push, ReplyError
from ..exceptions import ImproperlyConfigured, MiniqError, OperationalError
from . import servers
from .redis_connection import Connection, Part, Script, left_until, text_of
from .redis_options import Endpoint, Options, endpoints
from .stream import Stream

__all__ = ("Connection", "Options", "Part", "Push", "ReplyError", "Script", "Server")


class Server(servers.Server[Connection, Options, Endpoint]):
    """What a list of URLs names, for all threads of this process.  Get it with `of`.

    `url` is masked, for messages.  Two servers with an equal `key` are the same database.  A forked
    child may go on using its copy: that forgets the parent's connections and begins anew.
    """

    def __init__(self, urls: str, options: Options) -> None:
        """Parse `urls`; `ImproperlyConfigured` says what is wrong with them."""
        super().__init__(urls, options)
        self.db = self.endpoints[0].db

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self._good_sentinel = 0

    def _endpoints(self, urls: str) -> Tuple[Endpoint, ...]:
        return endpoints(urls, self.options)

    def _look_at(self, connection: Connection) -> None:
        if connection.has_input():
            connection.take_pushes()

    def _ask(self, connection: Connection, timeout_s: float) -> None:
        connection.call("PING", timeout_s=timeout_s)

    def connect(self, timeout_s: float, name: str = "") -> Connection:
        """Return a new connection of the caller's own, to a master; `name` is for CLIENT LIST.

        The URLs are tried in turn, the last good one first, each with its share of the time.
        Raises `OperationalError`, or `ImproperlyConfigured` if none can be used as configured; once one
        could, that is `OperationalError` too: a password that is being changed must cost nobody his work.
        """
        return self._connect_in_turn(
            timeout_s, lambda endpoint, deadline_mono: self._connect_to(endpoint, name, deadline_mono)
        )

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
        raise servers.all_failed(f"{endpoint.url}: no master found", failures) from failures[-1]


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

# SPDX-License-Identifier: MIT
"""RabbitMQ servers: what a list of URLs names, with a pool and failover.

The connections of the pool are for publishing and for calls: nobody listens to them while they lie
idle, so they have no heartbeats, as those of Celery's clients.  Who consumes makes a connection of
his own, with heartbeats.  What a connection can do is in `amqp_connection`, and what URLs and
options may say in `amqp_options`.
"""

from __future__ import annotations

from typing import Tuple

from . import servers
from .amqp_channel import Channel, ChannelError
from .amqp_confirms import Item, Refusal
from .amqp_connection import Connection
from .amqp_options import Endpoint, Options, endpoints
from .stream import Stream

__all__ = ("Channel", "ChannelError", "Connection", "Item", "Options", "Refusal", "Server")


class Server(servers.Server[Connection, Options, Endpoint]):
    """What a list of URLs names, for all threads of this process.  Get it with `of`.

    `url` is masked, for messages.  Two servers with an equal `key` are the same virtual host.  A forked
    child may go on using its copy: that forgets the parent's connections and begins anew.
    """

    def _endpoints(self, urls: str) -> Tuple[Endpoint, ...]:
        return endpoints(urls, self.options)

    def _look_at(self, connection: Connection) -> None:
        if connection.has_input():
            connection.read_ready()

    def _ask(self, connection: Connection, timeout_s: float) -> None:
        connection.probe(timeout_s)

    def connect(self, timeout_s: float, name: str = "", heartbeat: bool = False) -> Connection:
        """Return a new connection of the caller's own; `name` is for the server's list of connections.

        With `heartbeat` the caller must call `keep_alive` and `read_ready` of it, at least every quarter
        of its `heartbeat_s`.

        The URLs are tried in turn, the last good one first, each with its share of the time.
        Raises `OperationalError`, or `ImproperlyConfigured` if none can be used as configured; once one
        could, that is `OperationalError` too: a password that is being changed must cost nobody his work.
        """
        options = self.options

        def connect_to(endpoint: Endpoint, deadline_mono: float) -> Connection:
            stream = Stream.connect(
                endpoint.address,
                deadline_mono,
                endpoint.url,
                options.tls() if endpoint.tls else None,
                options.socket_keepalive,
                options.socket_settings,
            )
            wanted_s = options.heartbeat if heartbeat else 0
            return Connection.open(stream, endpoint, options, name, deadline_mono, wanted_s)

        return self._connect_in_turn(timeout_s, connect_to)

# SPDX-License-Identifier: MIT
"""A fleet over RabbitMQ, in a virtual host of its own, with results elsewhere; see `faults`."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import faults
from faults import FULL
from servers import RabbitServer
from waiting import wait_until
from workers import WorkerProcess

from miniq import MiniQ

#: Worker settings with which a line that is dead is noticed early, on both of its sides: what the server
#: has sent into such a line, others get when the server notices.
IMPATIENT: Dict[str, Any] = {
    "broker_transport_options": {"heartbeat": 3} if FULL else {"heartbeat": 1, "socket_timeout": 0.5}
}
#: Seconds within which it is noticed.  Without such settings a worker may need some more: it asks what has
#: been silent for 5 s, looks every 2 s, and waits 5 s for the answer, and a moment for its other connections.
NOTICE_S, USUAL_NOTICE_S = 15.0, 18.0
#: What is not a queue of tasks: a stream keeps what was read.
NOTES = "_miniq.notes"


class Fleet(faults.Fleet):
    """A virtual host, a proxy before its server, workers behind that; clients and results go without it.

    `results` is the URL of the result backend.  `settings` are those of clients and workers both.
    """

    def __init__(
        self,
        server: RabbitServer,
        results: str,
        folder: Path,
        worker_process: Callable[..., WorkerProcess],
        make_app: Callable[..., MiniQ],
        first_number: int,
        **settings: Any,
    ) -> None:
        self.server, self.results, self.settings = server, results, settings
        self.vhost = server.new_vhost()
        super().__init__(server.port, folder, worker_process, make_app, first_number)

    def urls(self) -> Tuple[str, str]:
        return self.server.url(self.vhost), self.results

    def worker_urls(self) -> Tuple[str, str]:
        return self.proxy.url(self.server.url(self.vhost)), self.results

    def new_client(self, url: str = "", **settings: Any) -> MiniQ:
        """Return an app; `url` is that of its broker."""
        more = {"broker": url} if url else {}
        return super().new_client(**{**self.settings, **more, **settings})

    def start_worker(self, *args: str, wait: bool = True, **options: Any) -> WorkerProcess:
        worker = super().start_worker(*args, wait=wait, **{**self.settings, **options})
        if wait:
            # Now it has all its connections, that to the results too.
            number = self.next_number()
            assert self.send("note", number).get(timeout=15) == number
        return worker

    def end(self) -> None:
        super().end()
        self.server.delete_vhost(self.vhost)

    def queues(self) -> Dict[str, Dict[str, Any]]:
        """Return the queues of the virtual host, without the notes of workers."""
        return {name: row for name, row in self.server.queues(self.vhost).items() if name != NOTES}

    def connections(self) -> List[Dict[str, Any]]:
        """Return the connections of the workers as the server knows them."""
        rows = [row for row in self.server.connections() if row["vhost"] == self.vhost]
        return [row for row in rows if row["client_properties"].get("connection_name", "").endswith("@h")]

    def leftovers(self) -> List[str]:
        def found() -> List[str]:
            queues = self.queues()
            # Results that nobody has asked for.
            queues.pop(self.client.identity[1], None)
            held = [f"{name}: {row['messages']} messages" for name, row in queues.items() if row["messages"]]
            taken = [f"{name} has a consumer" for name, row in queues.items() if "worker" in name]
            return held + taken + [f"connection {row['name']}" for row in self.connections()]

        try:
            # It learns of the end of connections in its own time.
            wait_until(lambda: not found(), 5.0)
        except AssertionError:
            return found()
        return []

    @contextmanager
    def consumer_timeout(self, seconds: float) -> Iterator[None]:
        """Have the server close channels that do not acknowledge in time, of those opened from now on."""
        name = "rabbit, consumer_timeout"
        before = self.server.eval(f"{{ok, Before}} = application:get_env({name}), Before")
        self.server.eval(f"application:set_env({name}, {round(seconds * 1000)})")
        try:
            yield
        finally:
            self.server.eval(f"application:set_env({name}, {before})")

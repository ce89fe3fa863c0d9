# SPDX-License-Identifier: MIT
"""A fleet over Redis: broker and results on one server; see `faults`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, List, Optional, Tuple

import faults
from servers import RedisServer
from workers import WorkerProcess

from miniq import MiniQ

#: Keys that are there only while somebody consumes, or holds messages.
OF_OWNERS = ("unacked", "unacked_index", "_miniq.held.*", "_miniq.early.*", "_miniq.owners", "_miniq.alive.*")


def commands_of(server: RedisServer) -> int:
    """Return how many commands a server has carried out, those of scripts too, INFO not."""
    counts = server.info("commandstats")
    return sum(
        int(text.partition("calls=")[2].split(",")[0])
        for name, text in counts.items()
        if name != "cmdstat_info"
    )


class Fleet(faults.Fleet):
    """A server, a proxy before it, workers that go through the proxy, and a client that does not."""

    def __init__(
        self,
        server: RedisServer,
        folder: Path,
        worker_process: Callable[..., WorkerProcess],
        make_app: Callable[..., MiniQ],
        first_number: int,
    ) -> None:
        self.server = server
        super().__init__(server.port, folder, worker_process, make_app, first_number)

    def urls(self) -> Tuple[str, str]:
        return self.server.url(), self.server.url()

    def worker_urls(self) -> Tuple[str, str]:
        url = self.proxy.url(self.server.url())
        return url, url

    def start_worker(self, *args: str, lease_s: Optional[float] = None, **options: Any) -> WorkerProcess:
        if lease_s is not None:
            options["broker_transport_options"] = {"lease": lease_s}
        return super().start_worker(*args, **options)

    def leftovers(self) -> List[str]:
        patterns = (*OF_OWNERS, "celery")
        return [key.decode() for pattern in patterns for key in self.server.command("KEYS", pattern)]

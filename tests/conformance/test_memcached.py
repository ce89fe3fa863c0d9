# SPDX-License-Identifier: MIT
"""The suite over memcache://, with one server and with two."""

from __future__ import annotations

import time
from typing import Iterator, Tuple

import pytest
from backend_suite import BackendSuite
from servers import MemcachedServer
from transport_suite import Clock
from waiting import wait_until

from miniq.backends.cache import MemcachedBackend


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuple[MemcachedServer, MemcachedServer]]:
    """Two servers for all tests here."""
    new = tmp_path_factory.mktemp
    with MemcachedServer(new("memcached")) as first, MemcachedServer(new("memcached")) as second:
        yield first, second


class TestMemcachedBackend(BackendSuite):
    keeps_any_bytes = False
    knows_what_is_left = False
    needs_expire = False
    # memcached counts whole seconds, and nobody can set its clock.
    kept_s = 1.0

    @pytest.fixture
    def url(self, servers: Tuple[MemcachedServer, MemcachedServer]) -> str:
        servers[0].command("flush_all")
        self.used = servers[0].url()
        return self.used

    def pass_time(self, clock: Clock, seconds: float) -> None:
        backend = MemcachedBackend(self.used, {}, time.time)
        expiring = [str(number) for number in range(2100)]
        wait_until(lambda: not backend.fetch(expiring), what="all of it is over", pause_s=0.1)
        backend.close()


class TestTwoMemcachedServers(TestMemcachedBackend):
    @pytest.fixture
    def url(self, servers: Tuple[MemcachedServer, MemcachedServer]) -> str:
        for server in servers:
            server.command("flush_all")
        self.used = ";".join(f"127.0.0.1:{server.port}" for server in servers)
        self.used = f"cache+memcached://{self.used}/"
        return self.used

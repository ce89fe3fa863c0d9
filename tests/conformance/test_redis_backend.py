# SPDX-License-Identifier: MIT
"""The suite over redis://."""

from __future__ import annotations

from typing import Iterator

import pytest
from chord_suite import ChordSuite
from servers import RedisServer
from transport_suite import Clock

from miniq.connections import listener
from miniq.connections.redis import Server


class TestRedisBackend(ChordSuite):
    keeps_any_bytes = False
    slack_s = 5.0
    needs_expire = False
    arrives_in_transactions = False

    @pytest.fixture
    def url(self, redis_url: str, redis_server: RedisServer) -> Iterator[str]:
        self.server, self.db = redis_server, int(redis_url.rpartition("/")[2])
        yield redis_url
        listener.close_all()
        Server.close_all()

    def pass_time(self, clock: Clock, seconds: float) -> None:
        # The server's clock is the system's: whatever expires, does so sooner by as much.
        keys = self.server.command("KEYS", "*", db=self.db)
        left_ms = self.server.commands([("PTTL", key) for key in keys], db=self.db)
        shorter = [(key, ms - int(seconds * 1000)) for key, ms in zip(keys, left_ms) if ms >= 0]
        self.server.commands([("PEXPIRE", key, ms) for key, ms in shorter], db=self.db)
        clock.now += seconds

# SPDX-License-Identifier: MIT
"""The suite over rpc://, with one process that is both who asks and who answers."""

from __future__ import annotations

from typing import Callable, Iterator, List, Sequence

import pytest
from backend_suite import BackendSuite
from transport_suite import Clock

from miniq.backends.base import Backend, StoredResult
from miniq.backends.rpc import RpcBackend
from miniq.connections import replies
from miniq.connections.amqp import Server


class ToItself(RpcBackend):
    """Sends each result to where this process waits for it."""

    def store(self, results: Sequence[StoredResult]) -> None:
        super().store([result._replace(reply_to=self._address()) for result in results])


class TestRpcBackend(BackendSuite):
    keeps_any_bytes = False
    knows_what_is_left = False
    needs_expire = False

    @pytest.fixture
    def url(self, rabbit_url: str) -> Iterator[str]:
        yield rabbit_url
        replies.delete_all()
        replies._replies.clear()
        Server.close_all()

    @pytest.fixture
    def open_backend(self, url: str, clock: Clock) -> Iterator[Callable[[], Backend]]:
        opened: List[Backend] = []

        def new() -> Backend:
            backend = ToItself(url, {"reply_address": lambda: "tests", "result_expires": self.kept_s}, clock)
            # As if a task had been called.
            backend.before_call(5.0)
            opened.append(backend)
            return backend

        yield new
        for backend in opened:
            backend.close()

    def test_expired_result_is_unknown_and_removed(self, backend: Backend, clock: Clock) -> None:
        pytest.skip("the server's own clock decides, for all results of a queue: tests/test_rpc_results.py")

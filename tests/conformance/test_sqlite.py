# SPDX-License-Identifier: MIT
"""The suites over sqlite://."""

from __future__ import annotations

from pathlib import Path

import pytest
from chord_suite import ChordSuite
from transport_suite import TransportSuite

from miniq.transports.base import Consumer, Transport
from miniq.transports.sqlite import SQLiteConsumer


class TestSQLiteTransport(TransportSuite):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/q.db"

    def lose(self, transport: Transport, consumer: Consumer) -> None:
        # What the kernel does when the process ends; tests with real processes are elsewhere.
        assert isinstance(consumer, SQLiteConsumer)
        consumer._locks.drop(consumer._owner)


class TestSQLiteBackend(ChordSuite):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/q.db"

# SPDX-License-Identifier: MIT
"""The suites over memory://."""

from __future__ import annotations

from typing import Iterator

import pytest
from chord_suite import ChordSuite
from transport_suite import TransportSuite

from miniq.connections import memory
from miniq.transports.base import Consumer, Transport
from miniq.transports.memory import MemoryConsumer, MemoryTransport


@pytest.fixture
def memory_url() -> Iterator[str]:
    yield "memory://suite"
    memory.reset("suite")


class TestMemoryTransport(TransportSuite):
    @pytest.fixture
    def url(self, memory_url: str) -> str:
        return memory_url

    def lose(self, transport: Transport, consumer: Consumer) -> None:
        assert isinstance(transport, MemoryTransport) and isinstance(consumer, MemoryConsumer)
        transport.broker.owner_lost(consumer.node)


class TestMemoryBackend(ChordSuite):
    for_many_processes = False

    @pytest.fixture
    def url(self, memory_url: str) -> str:
        return memory_url

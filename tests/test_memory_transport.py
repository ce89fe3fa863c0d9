# SPDX-License-Identifier: MIT
"""What is particular to the broker in memory: names, threads, forks, deaths that are played."""

from __future__ import annotations

import os
import random
import select
import threading
import time
from typing import Iterator, List

import pytest

from miniq.backends.base import StoredResult
from miniq.backends.memory import MemoryBackend
from miniq.connections.memory import MemoryBroker, reset
from miniq.exceptions import ImproperlyConfigured
from miniq.message import Delivery, Message
from miniq.routing import Queue
from miniq.transports.base import Publication
from miniq.transports.memory import MemoryTransport

WORK = Queue("work")


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    reset()
    yield
    reset()


def transport_of(url: str = "memory://") -> MemoryTransport:
    return MemoryTransport(url, {}, time.time)


def put(transport: MemoryTransport, *names: str) -> None:
    transport.publish([Publication(Message(b"", "", "", {"id": name}, {}), "", "work") for name in names], 1)


def ids(deliveries: List[Delivery]) -> List[str]:
    return [delivery.message.headers["id"] for delivery in deliveries]


def test_one_name_is_one_broker_and_another_name_another() -> None:
    put(transport_of("memory://a"), "x")
    assert ids(transport_of("memory://a/").consumer("w", [WORK]).poll(5)) == ["x"]
    assert transport_of("memory://b").sizes() == []
    reset("a")
    assert transport_of("memory://a").sizes() == []


def test_backend_and_transport_of_one_name_share_transactions() -> None:
    transport, backend = transport_of("memory://a"), MemoryBackend("cache+memory://a", {}, time.time)
    with pytest.raises(ZeroDivisionError), transport.transaction():
        backend.store([StoredResult("x", "SUCCESS", b"", "", "", None)])
        put(transport, "y")
        raise ZeroDivisionError
    assert backend.fetch(["x"]) == {}
    assert transport.sizes() == []


def test_options_are_refused() -> None:
    for make in (MemoryTransport, MemoryBackend):
        with pytest.raises(ImproperlyConfigured, match="unknown transport option 'visibility_timeout'"):
            make("memory://", {"visibility_timeout": 1}, time.time)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_is_told_that_nobody_would_read() -> None:
    transport = transport_of("memory://a")
    put(transport, "x")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        told = []
        for late in (False, True):
            try:
                put(transport_of("memory://a") if late else transport, "y")
            except ImproperlyConfigured as error:
                told.append("in its child" in str(error))
        reset()
        put(transport_of("memory://a"), "own")
        os.write(write, repr(told).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 100) == b"[True, True]"
    os.close(read)
    os.close(write)
    assert transport.sizes()[0].ready == 1


def test_threads_share_a_broker_and_each_message_comes_out_once() -> None:
    found: List[str] = []

    def produce(name: str) -> None:
        transport = transport_of()
        for number in range(200):
            put(transport, f"{name}-{number}")

    def consume() -> None:
        transport = transport_of()
        consumer = transport.consumer(threading.current_thread().name, [WORK])
        fd = consumer.fileno()
        assert fd is not None
        while len(found) < 800:
            select.select([fd], [], [], 0.01)
            consumer.on_readable()
            while True:
                with transport.transaction():
                    more = consumer.poll(3)
                    consumer.start(more)
                if not more:
                    break
                for delivery in more:
                    assert consumer.ack(delivery)
                found.extend(ids(more))
        transport.close()

    threads = [threading.Thread(target=produce, args=(f"p{n}",)) for n in range(4)]
    threads += [threading.Thread(target=consume) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == len(set(found)) == 800


def test_callback_is_called_when_messages_came() -> None:
    transport = transport_of()
    consumer = transport.consumer("w", [WORK])
    calls: List[str] = []
    consumer.on_wake = lambda: calls.append("wake")
    with transport.transaction():
        put(transport, "a", "b")
        assert calls == []
    assert calls == ["wake"]
    consumer.ack(consumer.poll(1)[0])
    assert calls == ["wake"]


def test_simulated_death_is_replayable() -> None:
    def play(seed: int) -> List[float]:
        reset()
        now = 1000.0
        transport = MemoryTransport("memory://", {}, lambda: now)
        broker = MemoryBroker.get("")
        broker.random = random.Random(seed)
        survivor = transport.consumer("survivor", [WORK])
        put(transport, "a", "b", "c")
        for _ in range(2):
            dying = transport.consumer("dying", [WORK])
            dying.start(dying.poll(3))
            broker.owner_lost("dying")
            survivor.housekeep()
        pauses: List[float] = []
        while True:
            due = survivor.next_due()
            if due is None:
                return pauses
            pauses.append(due - now)
            now = due
            survivor.poll(1)

    assert len(play(1)) == 3
    assert play(1) == play(1) != play(2)

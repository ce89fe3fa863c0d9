# SPDX-License-Identifier: MIT
"""Private queues: what is sent to one arrives in time and in order, and nothing of it stays behind."""

from __future__ import annotations

import select
from typing import Callable, List

import pytest
from waiting import wait_until

from miniq import MiniQ
from miniq.clock import LamportClock
from miniq.loop import Loop
from miniq.mailbox import BATCH, Inbox, Mailbox
from miniq.message import Message
from miniq.routing import Exchange, Queue
from miniq.transports.base import Publication

REPLIES = Exchange("replies", "direct", durable=False)
NEWS = Exchange("news", "fanout", durable=False)


def private(name: str, exchange: Exchange, key: str = "") -> Queue:
    return Queue(
        name, exchange, routing_key=key, durable=False, auto_delete=True, expires=10.0, no_ack=True
    )


def send(app: MiniQ, exchange: str, key: str, *bodies: bytes) -> None:
    messages = [Message(body, "text/plain", "utf-8", {}, {}) for body in bodies]
    app.producer.transport.publish([Publication(message, exchange, key) for message in messages], 10.0)


def received(inbox: Inbox, count: int) -> List[bytes]:
    found = [inbox.receive(10.0) for _ in range(count)]
    return [message.body for message in found if message is not None]


def check(app: MiniQ) -> None:
    """Two inboxes with a direct exchange and two with a fanout one get what is theirs."""
    with Inbox(app, private("one.replies", REPLIES, "1")) as one, Inbox(
        app, private("two.replies", REPLIES, "2")
    ) as two:
        assert one.receive(0.0) is None
        many = [b"%d" % n for n in range(2 * BATCH + 1)]
        send(app, "replies", "1", *many)
        send(app, "replies", "2", b"other")
        assert received(one, len(many)) == many
        assert received(two, 1) == [b"other"]
        assert two.receive(0.01) is None
    with Inbox(app, private("one.news", NEWS)) as one, Inbox(app, private("two.news", NEWS)) as two:
        send(app, "news", "", b"first", b"second")
        assert received(one, 2) == received(two, 2) == [b"first", b"second"]
    with Inbox(app, private("one.replies", REPLIES, "1")) as one:
        assert one.receive(0.01) is None, "it begins empty"


def test_messages_arrive_in_memory() -> None:
    with MiniQ("t", broker="memory://", backend="memory://") as app:
        check(app)


def test_messages_arrive_in_a_file(make_app: Callable[..., MiniQ]) -> None:
    check(make_app())


def test_messages_arrive_over_redis(redis_url: str) -> None:
    with MiniQ("t", broker=redis_url, backend=redis_url) as app:
        check(app)


@pytest.mark.parametrize("exchange, key", [(REPLIES, "1"), (NEWS, "")])
def test_message_whose_wake_up_comes_with_another_answer_is_taken_at_once(
    redis_url: str, exchange: Exchange, key: str
) -> None:
    app, other = (MiniQ("t", broker=redis_url, backend=redis_url) for _ in range(2))
    transport = app.producer.new_transport(write=False)
    queue = private("queue", exchange, key)
    transport.declare(queue)
    consumer = transport.consumer("node", [queue])
    loop = Loop()
    heard: List[bytes] = []

    def receive(message: Message) -> None:
        heard.append(message.body)
        if len(heard) == 1:
            fd = consumer.fileno()
            assert fd is not None
            send(other, exchange.name, key, b"second")
            assert select.select([fd], [], [], 10)[0], "the server has told of it"
            # A command over the same connection: what the server told comes with its answer.
            consumer.woken = False
            assert consumer.changed()

    mailbox = Mailbox(loop, consumer, receive)
    mailbox.start()
    send(other, exchange.name, key, b"first")
    wait_until(lambda: loop.run_once(0.1) or heard, 10, "the first message")
    loop.run_once(0.0)
    assert heard == [b"first", b"second"]
    mailbox.close()
    loop.close()
    transport.close()
    app.close()
    other.close()


@pytest.mark.parametrize("heard, here", [(0, 6), (5, 6), (9, 10)])
def test_a_clock_goes_on_from_the_later_number(heard: int, here: int) -> None:
    clock = LamportClock(4)
    assert clock.forward() == 5
    assert clock.adjust(heard) == here
    assert clock.forward() == here + 1

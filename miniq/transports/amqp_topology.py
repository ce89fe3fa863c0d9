# SPDX-License-Identifier: MIT
"""What is declared on a RabbitMQ server: exchanges, queues and bindings, as Celery declares them.

A declaration is checked by the server against what exists: with other arguments it is refused, and
both programs have to say the same.  So nothing is added to what a queue's options say.

Source: AMQP 0-9-1, and the declarations that Celery's workers were seen to send.
"""

from __future__ import annotations

from time import monotonic
from typing import Dict, Optional

from ..connections.amqp import Channel, ChannelError
from ..exceptions import MiniqError, OperationalError
from ..routing import Exchange, Queue

#: Exchanges that control messages and events go to; their senders may come before any worker.
CELERYS_OWN = {
    "celery.pidbox": Exchange("celery.pidbox", "fanout", durable=False),
    "celeryev": Exchange("celeryev", "topic"),
}


def declare_exchange(channel: Channel, exchange: Exchange, deadline_mono: float) -> None:
    """Create an exchange, or find that it is as it should be."""
    if not exchange.name or exchange.no_declare:
        return
    passive = exchange.passive or exchange.name.startswith("amq.")
    try:
        channel.call(
            "exchange.declare",
            timeout_s=left_until(deadline_mono),
            exchange=exchange.name,
            type=exchange.type,
            passive=passive,
            durable=exchange.durable,
            auto_delete=exchange.auto_delete,
            arguments=dict(exchange.arguments or {}),
        )
    except ChannelError as error:
        raise refused(error, f"exchange {exchange.name!r}") from error


def declare_queue(channel: Channel, queue: Queue, deadline_mono: float) -> None:
    """Create a queue with its exchanges and bindings, or find that they are as they should be."""
    if queue.no_declare:
        return
    for binding in queue.all_bindings:
        declare_exchange(channel, binding.exchange, deadline_mono)
    try:
        channel.call(
            "queue.declare",
            timeout_s=left_until(deadline_mono),
            queue=queue.name,
            durable=queue.durable,
            exclusive=queue.exclusive,
            auto_delete=queue.auto_delete,
            arguments=queue.arguments,
        )
        for binding in queue.all_bindings:
            if binding.exchange.name:
                channel.call(
                    "queue.bind",
                    timeout_s=left_until(deadline_mono),
                    queue=queue.name,
                    exchange=binding.exchange.name,
                    routing_key=binding.routing_key,
                    arguments=dict(binding.arguments or {}),
                )
    except ChannelError as error:
        raise refused(error, f"queue {queue.name!r}") from error


def exchanges_of(queue: Queue) -> Dict[str, Exchange]:
    """Return the exchanges that a queue is bound to, by name."""
    return {b.exchange.name: b.exchange for b in queue.all_bindings if b.exchange.name}


def goes_unused(queue: Queue) -> bool:
    """Say whether the server deletes a queue from which nobody consumes, at once or after a time."""
    return queue.auto_delete or "x-expires" in queue.arguments


def is_quorum(queue: Optional[Queue]) -> bool:
    """Say whether a queue is declared as a quorum queue."""
    return queue is not None and (queue.queue_arguments or {}).get("x-queue-type") == "quorum"


def refused(error: ChannelError, what: str) -> MiniqError:
    """Return miniq's error for a refusal of the server that concerns `what`."""
    return type(error.translated())(f"{what}: {error}")


def left_until(deadline_mono: float) -> float:
    """Return the seconds that are left; raise `OperationalError` when none are."""
    left_s = deadline_mono - monotonic()
    if left_s <= 0:
        raise OperationalError("the time for it was over")
    return left_s

# SPDX-License-Identifier: MIT
"""Where messages wait in RabbitMQ until they are due: two layouts of TTL and dead-letter exchanges.

**Native** is Celery's: 28 levels, level n a queue whose messages leave after 2^n seconds.  The time
left stands as 28 binary digits before the routing key; a digit 1 sends the message through the queue
of its level, a 0 past it, to the next lower level::

    celery_delayed_27, key "0. ... .1.0.mail"  --2 s-->  celery_delayed_delivery  -->  queues

**Ladder** is our own: a queue for each power of two seconds, which gives the message to the queue that
its routing key names, and to no other.  A message waits in the longest that is not too long, comes
back early and waits in another, until it is nearly due::

    _miniq.delay.8, key "mail"  --8 s-->  queue mail

In both all messages of one queue wait equally long, so that none stands behind one due later.
Everything here is data and pure functions: a declaration is (AMQP method, its arguments).

A message must enter either without what the broker added to its headers when it came out (see
`amqp_message.take_added`): one that is to pass the same queue twice is dropped as running in circles.

Source: the layout of Celery 5.5 and later (kombu); RabbitMQ's guides to TTL and dead-lettering.
"""

from __future__ import annotations

import re
from typing import Any, Dict, List, Optional, Tuple

from ..routing import Queue

#: An AMQP method and its arguments; what is left out has the protocol's default.
Declaration = Tuple[str, Dict[str, Any]]

# -- Celery's layout -----------------------------------------------------------------------------

#: How many levels there are, and the seconds that do not fit any more (8.5 years).
LEVELS = 28
LIMIT_S = 1 << LEVELS
#: Exchanges: where messages are published to wait, and where they come out.
ENTRANCE = f"celery_delayed_{LEVELS - 1}"
EXIT = "celery_delayed_delivery"

_MAX_KEY_BYTES = 255
_ANY_PREFIX = "*." * LEVELS
_PREFIXES = re.compile(rf"(?:(?:[01]\.){{{LEVELS}}})+")


def native_name(level: int) -> str:
    """Return the name of a level's exchange and queue."""
    return f"celery_delayed_{level}"


def native_declarations(queue_type: str = "quorum") -> List[Declaration]:
    """Return all that the native layout consists of, in an order in which it can be declared.

    `queue_type` is "quorum" or "classic"; RabbitMQ refuses (406) another one than the queues have.
    """
    found = [_exchange(EXIT, "topic"), *(_exchange(native_name(n), "topic") for n in range(LEVELS))]
    for level in range(LEVELS):
        name, after = native_name(level), native_name(level - 1) if level else EXIT
        skipped = "*." * (LEVELS - 1 - level)
        found += [
            _waiting_queue(name, 1 << level, after, queue_type),
            ("queue.bind", {"queue": name, "exchange": name, "routing_key": f"{skipped}1.#"}),
            ("exchange.bind", {"destination": after, "source": name, "routing_key": f"{skipped}0.#"}),
        ]
    return found


def native_bindings(queue: Queue) -> List[Declaration]:
    """Return what leads from the native layout into a task queue.

    Its own name as the key always does: what came to several queues at once waits for each of them
    apart.  The keys of its exchanges do for what Celery's clients send, unless they are direct.

    Celery binds with ``#.<key>``, which also takes what is meant for ``eu.<key>``, and that task would
    run twice.  A star for each digit takes the same messages and no others.
    """
    found: List[Declaration] = []
    if can_be_reached(queue.name):
        found.append(_into_queue(queue, EXIT, queue.name))
    for exchange, key, _ in queue.all_bindings:
        if exchange.type == "direct" or not key or not _has_room(key):
            continue
        bound = {"destination": exchange.name, "source": EXIT, "routing_key": _ANY_PREFIX + key}
        found.append(("exchange.bind", bound))
        if exchange.type == "topic":
            found.append(_into_queue(queue, exchange.name, key))
    return found


def can_be_reached(queue_name: str) -> bool:
    """Say whether the native layout can lead to a queue by its name.

    Not where that leaves no room for the digits (more than 199 bytes), or is a pattern.
    """
    return _has_room(queue_name) and not {"*", "#"}.intersection(queue_name.split("."))


def routing_key(countdown_s: float, key: str) -> str:
    """Return the key with which `ENTRANCE` lets a message out under `key` after `countdown_s`.

    Cut to whole seconds, so that it comes out up to one early; what is `LIMIT_S` or longer comes out
    a second before that, to be sent on.  Raises `ValueError` for a key without room for the digits.
    """
    if not _has_room(key):
        raise ValueError(f"routing key {key[:100]!r}... is too long to be delayed: {LEVELS} digits go before")
    seconds = int(min(max(countdown_s, 0), LIMIT_S - 1))
    return ".".join(format(seconds, f"0{LEVELS}b")) + "." + key


def strip_prefix(key: str) -> str:
    """Return the routing key that a message had before it was delayed; any other key as it is.

    Older versions of Celery put digits before digits when they retried: all of them go.
    """
    found = _PREFIXES.match(key)
    return key[found.end() :] if found else key


def is_native(exchange: str) -> bool:
    """Say whether a message that comes with this exchange waited in the native layout."""
    return exchange.startswith("celery_delayed_")


def _has_room(key: str) -> bool:
    return len(_ANY_PREFIX) + len(key.encode("utf-8", "surrogateescape")) <= _MAX_KEY_BYTES


def _into_queue(queue: Queue, exchange: str, key: str) -> Declaration:
    return ("queue.bind", {"queue": queue.name, "exchange": exchange, "routing_key": _ANY_PREFIX + key})


# -- our ladder ----------------------------------------------------------------------------------

#: The highest level, 4.3 years: RabbitMQ takes ten years at most, and who waits longer comes again.
MAX_LEVEL = 27
#: How long before a message is due its level must be over: a broker is never quite on time.
MARGIN_S = 0.05
#: Where what waited in quorum queues comes out, and where that goes which nobody takes there.
DUE = "_miniq.due"
DEAD = "_miniq.dead"


def level(seconds_left: float, hold_s: float) -> Optional[int]:
    """Return n of the level, 2^n seconds, in which a message waits next; None = it is to be held.

    The longest one that is over before the message is due.  It is to be held from `hold_s` on, and
    where the shortest level, one second, is too long.
    """
    usable_s = seconds_left - MARGIN_S
    if seconds_left <= hold_s or usable_s < 1:
        return None
    return MAX_LEVEL if usable_s >= 1 << MAX_LEVEL else int(usable_s).bit_length() - 1


def ladder_name(level: int, queue_type: str = "classic") -> str:
    """Return the name of a level's exchange and queue."""
    return f"_miniq.delay.{'' if queue_type == 'classic' else queue_type + '.'}{1 << level}"


def ladder_declarations(level: int, queue_type: str = "classic") -> List[Declaration]:
    """Return what one level consists of, in an order in which it can be declared.

    A message enters with the name of its queue as the key.  The fanout exchange does not look at it,
    the one at the end goes by it: the default exchange, or `DUE` where the level is a quorum queue.
    Such a queue keeps a message until another has it; 32 for queues that are gone, and nothing would
    leave the level any more.
    """
    name = ladder_name(level, queue_type)
    return [
        _exchange(name, "fanout"),
        _waiting_queue(name, 1 << level, "" if queue_type == "classic" else DUE, queue_type),
        ("queue.bind", {"queue": name, "exchange": name, "routing_key": ""}),
    ]


def due_declarations() -> List[Declaration]:
    """Return the exchange `DUE`; what it cannot deliver goes to the exchange `DEAD`."""
    method, arguments = _exchange(DUE, "direct")
    return [(method, {**arguments, "arguments": {"alternate-exchange": DEAD}})]


def due_bindings(queue: Queue) -> List[Declaration]:
    """Return what leads from `DUE` into a task queue."""
    return [("queue.bind", {"queue": queue.name, "exchange": DUE, "routing_key": queue.name})]


# -- both ----------------------------------------------------------------------------------------


def _exchange(name: str, kind: str) -> Declaration:
    return ("exchange.declare", {"exchange": name, "type": kind, "durable": True})


def _waiting_queue(name: str, seconds: int, after: str, queue_type: str) -> Declaration:
    """Return a queue whose messages go to exchange `after` when their time is over."""
    arguments: Dict[str, Any] = {
        "x-queue-type": queue_type,
        # A full queue says no to the publisher; else it would drop its oldest.
        "x-overflow": "reject-publish",
        "x-message-ttl": seconds * 1000,
        "x-dead-letter-exchange": after,
    }
    if queue_type == "quorum":
        # Else it forgets a message before the next queue has it; a classic one never does.
        arguments["x-dead-letter-strategy"] = "at-least-once"
    return ("queue.declare", {"queue": name, "durable": True, "arguments": arguments})

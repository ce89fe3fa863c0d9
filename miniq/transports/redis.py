# SPDX-License-Identifier: MIT
"""Redis as the broker, in the layout of Celery's own transport, so that both may share the queues.

A message is an item of a list, one list per queue and priority step (lower is served first); what a
worker holds is in ``unacked`` and ``unacked_index`` as Celery's workers keep it (`redis_session` has
the drawing).  What Celery does not have is in keys that begin with ``_miniq.``: messages that are not
due (a sorted set per queue), living owners, dead letters, revocations, known queues.

Fanout exchanges are PUB/SUB: only who listens at the moment gets a copy, and nothing is kept.

What is called in a transaction is done at the next `Consumer.poll`, or at its end; an exception leaves
everything undone that was called since.  So a worker's turn goes as two scripts.

Source: the observed commands of kombu's Redis transport.
"""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import AbstractContextManager
from time import monotonic
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from ..connections.redis import Options
from ..connections.redis_session import pairs_of, pipeline
from ..exceptions import ImproperlyConfigured
from ..routing import Queue, key_matches
from .base import DeadLetter, Publication, QueueSize, Transport, what_is_unroutable
from .redis_consumer import RedisConsumer, is_fanout
from .redis_envelope import (
    DeliveryTags,
    decode_envelope,
    encode_envelope,
    published_in,
    shown,
    split_dead,
)
from .redis_link import Link

logger = logging.getLogger(__name__)

_encode = json.JSONEncoder().encode
_decode = json.JSONDecoder().decode

#: Bytes of messages that go out in one command, about.
BATCH_BYTES = 4_000_000
BATCH_MESSAGES = 1000
#: Exchanges that every Celery worker knows the type of, written down nowhere.
_CELERYS_OWN = {"celery.pidbox": "fanout", "celeryev": "fanout"}


class RedisTransport(Transport):
    """One thread's way to a Redis server."""

    fanout = True
    priority = True
    delay = True
    confirms = True
    rolls_back = False
    priority_order = "lower first"

    def __init__(self, url: str, options: Mapping[str, Any], wall: Callable[[], float]) -> None:
        self.link = Link(url, Options.read(options, url), wall)
        self._tags = DeliveryTags()
        #: What was declared here: queue name -> queue, exchange name -> type.
        self._declared: Dict[str, Queue] = {}
        self._types: Dict[str, str] = {}
        self._pid = os.getpid()
        self._consumers: List[RedisConsumer] = []

    # -- declare and publish

    def declare(self, queue: Queue, timeout_s: Optional[float] = None, again: bool = False) -> None:
        known = self._declared.get(queue.name)
        if (known is queue or known == queue) and self._pid == os.getpid() and not again:
            return
        self._pid = os.getpid()
        layout = self.link.layout
        if "\0" in queue.name or layout.prefix + queue.name in (layout.unacked, layout.index):
            raise ImproperlyConfigured(f"queue {queue.name!r}: on Redis a queue cannot be called so")
        lasting = not queue.auto_delete and queue.expires is None
        settings: Dict[str, Any] = {
            "auto_delete": queue.auto_delete,
            "expires": queue.expires,
            # Nothing lies in the lists of a fanout queue that could be too old.
            "message_ttl": None if is_fanout(queue) else queue.message_ttl,
            "bindings": [],
        }
        if not lasting:
            settings["used"] = self.link.wall()
        commands: List[Sequence[Any]] = []
        for binding in queue.all_bindings:
            exchange = binding.exchange
            if not exchange.name:
                continue
            sets = layout.bindings(exchange.name)
            member = self._member(exchange.type, binding.routing_key, queue.name)
            settings["bindings"].append((member, exchange.name))
            commands += [("SADD", key, member) for key in (sets if lasting else sets[:1])]
            if exchange.type != "direct":
                commands.append(("HSET", layout.exchanges, exchange.name, exchange.type))
            self._types[exchange.name] = exchange.type
        commands.append(("HSET", layout.queues, queue.name, _encode(settings)))
        with self.link.using(timeout_s) as connection:
            pipeline(connection, commands, timeout_s)
        if lasting:
            self._declared[queue.name] = queue

    def _member(self, kind: str, key: str, queue: str) -> str:
        pattern = ""
        if kind == "topic":
            words = {"*": r"[^\.]+", "#": ".*?"}
            pattern = "^" + r"\.".join(words.get(word, re.escape(word)) for word in key.split(".")) + "$"
        return self.link.layout.sep.join((key, pattern, queue))

    def publish(self, publications: Sequence[Publication], timeout_s: float) -> None:
        layout, wall, new_tag = self.link.layout, self.link.wall, self._tags.new
        session = self.link.session
        first = publications[0]
        if len(publications) == 1 and not first.exchange and session is None and not self._consumers:
            message, _, queue = first
            item = encode_envelope(message, "", queue, new_tag(wall()))
            begun_mono = monotonic()
            with self.link.server.borrow(timeout_s) as connection:
                left_s = begun_mono + timeout_s - monotonic()
                connection.call(b"LPUSH", layout.list_for(queue, message.priority), item, timeout_s=left_s)
            return
        routes: Dict[Tuple[str, str], List[str]] = {}
        for _, exchange, routing_key in publications:
            if exchange and self._type_of(exchange) != "fanout":
                routes[exchange, routing_key] = []
        if routes:
            self._choose_queues(routes, publications)
        pushes: Dict[str, List[bytes]] = {}
        commands: List[Tuple[Any, ...]] = []
        for message, exchange, routing_key in publications:
            if exchange and (exchange, routing_key) not in routes:
                item = encode_envelope(message, exchange, routing_key, new_tag(wall()))
                commands.append(("PUBLISH", self.link.channel(exchange, routing_key), item))
                continue
            for queue in routes[exchange, routing_key] if exchange else (routing_key,):
                item = encode_envelope(message, exchange, routing_key, new_tag(wall()))
                pushes.setdefault(layout.list_for(queue, message.priority), []).append(item)
        for key, items in pushes.items():
            commands += [("LPUSH", key, *part) for part in _portions(items)]
        if session is not None:
            for command in commands:
                session.add(("do", *command))
        elif commands:
            if len(commands) > 1:
                commands = [("MULTI",), *commands, ("EXEC",)]
            with self.link.using(timeout_s) as connection:
                pipeline(connection, commands, timeout_s)
            self.link.tell_consumers()

    def _type_of(self, exchange: str) -> str:
        """Return an exchange's type: as declared here, else as anybody declared it, else direct."""
        found = self._types.get(exchange) or _CELERYS_OWN.get(exchange)
        if found is None:
            with self.link.using() as connection:
                told = connection.call("HGET", self.link.layout.exchanges, exchange)
            found = self._types[exchange] = told.decode() if told else "direct"
        return found

    def _choose_queues(
        self, routes: Dict[Tuple[str, str], List[str]], publications: Sequence[Publication]
    ) -> None:
        """Fill in the queues; raise `ImproperlyConfigured` where a task reaches none."""
        unroutable = None
        sep = self.link.layout.sep
        with self.link.using() as connection:
            names = [self.link.layout.bindings(name)[0] for name, _ in routes]
            found = pipeline(connection, [("SMEMBERS", name) for name in names])
        for (route, queues), members in zip(routes.items(), found):
            exchange, routing_key = route
            kinds: Set[str] = set()
            chosen: Set[str] = set()
            for member in members:
                key, pattern, queue = [*member.decode().split(sep), "", ""][:3]
                kind = "topic" if pattern else self._type_of(exchange)
                kinds.add(kind)
                if key_matches(kind, key, routing_key):
                    chosen.add(queue)
            queues += sorted(chosen)
            if not chosen and any("task" in p.message.headers for p in publications if p[1:] == route):
                unroutable = what_is_unroutable(kinds, exchange, routing_key) or unroutable
        if unroutable is not None:
            raise ImproperlyConfigured(unroutable)

    # -- transactions

    def transaction(self) -> "AbstractContextManager[None]":
        return self.link.transaction()

    # -- consumers

    def consumer(self, node: str, queues: Iterable[Queue]) -> RedisConsumer:
        consumer = RedisConsumer(self.link, self.declare, node, queues, self._forget)
        self._consumers.append(consumer)
        return consumer

    def _forget(self, consumer: RedisConsumer) -> None:
        # One that could not be made is not among them.
        if consumer in self._consumers:
            self._consumers.remove(consumer)

    # -- looking and mending

    def purge(self, queue: str) -> int:
        lists = self.link.layout.lists(queue)
        parked = self.link.layout.parked(queue)
        commands: List[Sequence[Any]] = [("MULTI",)]
        commands += [("LLEN", key) for key in lists]
        commands += [("ZCARD", parked), ("UNLINK", *lists, parked), ("EXEC",)]
        with self.link.using() as connection:
            counts = pipeline(connection, commands)[-1]
        return sum(counts[:-1])

    def sizes(self, names: Iterable[str] = ()) -> List[QueueSize]:
        layout = self.link.layout
        with self.link.using() as connection:
            names = sorted(name.decode() for name in connection.call("HKEYS", layout.queues))
            pairs = pairs_of(connection.call("HGETALL", layout.owners))
            owners = [name.decode() for name, _ in pairs]
            commands: List[Sequence[Any]] = [("HVALS", layout.held(owner)) for owner in owners]
            for name in names:
                commands += [("LLEN", key) for key in layout.lists(name)]
                commands += [("LINDEX", key, -1) for key in layout.lists(name)]
                commands.append(("ZCARD", layout.parked(name)))
            commands += [("EXISTS", layout.alive(owner)) for owner in owners]
            found = pipeline(connection, commands) if commands else []
        queue_of = {key: name for name in names for key in layout.lists(name)}
        held = dict.fromkeys(names, 0)
        for values in found[: len(owners)]:
            for value in values:
                queue = queue_of.get(value.decode().split("|", 2)[2])
                if queue is not None:
                    held[queue] += 1
        now, steps, at = self.link.wall(), len(layout.steps), len(owners)
        alive = zip(pairs, found[len(found) - len(owners) :])
        taking = [name for (_, info), is_alive in alive if is_alive for name in _queues_of(info)]
        sizes = []
        for name in names:
            counts, firsts = found[at : at + steps], found[at + steps : at + 2 * steps]
            ages = [now - moment for moment in map(published_in, firsts) if moment is not None]
            oldest_s = max(ages) if ages else None
            waiting = found[at + 2 * steps]
            size = QueueSize(name, sum(counts), waiting, held[name], oldest_s, taking.count(name))
            sizes.append(size)
            at += 2 * steps + 1
        return sizes

    def revoke(self, task_ids: Iterable[str], until: float) -> None:
        pairs: List[Any] = []
        for task_id in task_ids:
            pairs += (repr(until), task_id)
        for start in range(0, len(pairs), 2 * BATCH_MESSAGES):
            command = ("ZADD", self.link.layout.revoked, "GT", *pairs[start : start + 2 * BATCH_MESSAGES])
            if self.link.session is not None:
                self.link.add(("do", *command))
            else:
                with self.link.using() as connection:
                    connection.call(*command)

    def dead_letters(self, limit: int = 100) -> List[DeadLetter]:
        layout = self.link.layout
        with self.link.using() as connection:
            names = connection.call("ZRANGE", layout.dead_index, 0, max(0, limit - 1), "REV")
            values = connection.call("HMGET", layout.dead, *names) if names else []
        found = []
        for name, value in zip(names, values):
            if value is not None:
                head, item = split_dead(value)
                found.append(
                    DeadLetter(name.decode(), head["queue"], head["reason"], head["at"], shown(item))
                )
        return found

    def replay(self, dead_letter_id: str) -> bool:
        layout = self.link.layout
        with self.link.using() as connection:
            value = connection.call("HGET", layout.dead, dead_letter_id)
            if value is None:
                return False
            head, item = split_dead(value)
            key = layout.lists(head["queue"])[0]
            try:
                found = decode_envelope(item)
            except ValueError:
                pass
            else:
                key = layout.list_for(head["queue"], found.message.priority)
                item = encode_envelope(
                    found.message, found.exchange, found.routing_key, self._tags.new(self.link.wall())
                )
            commands = [
                ("MULTI",),
                ("HDEL", layout.dead, dead_letter_id), ("ZREM", layout.dead_index, dead_letter_id),
                ("LPUSH", key, item), ("EXEC",),
            ]  # fmt: skip
            # Somebody else may replay it in the same moment: then only one of the two goes through.
            watched = pipeline(connection, [("WATCH", layout.dead), ("HEXISTS", layout.dead, dead_letter_id)])
            if not watched[1]:
                connection.call("UNWATCH")
                return False
            return pipeline(connection, commands)[-1] is not None

    def drop(self, dead_letter_id: str) -> bool:
        layout = self.link.layout
        with self.link.using() as connection:
            found = pipeline(
                connection,
                [("HDEL", layout.dead, dead_letter_id), ("ZREM", layout.dead_index, dead_letter_id)],
            )
        return bool(found[0])

    def close(self) -> None:
        for consumer in list(self._consumers):
            consumer.close()
        self.link.close()
        self._declared.clear()


def _queues_of(info: bytes) -> List[str]:
    """Return the queues that an owner takes from, as it says."""
    try:
        return [str(name) for name in json.loads(info)["queues"]]
    except (ValueError, TypeError, KeyError):
        return []


def _portions(items: List[bytes]) -> Iterator[List[bytes]]:
    """Cut into parts that one command may carry."""
    part: List[bytes] = []
    size = 0
    for item in items:
        part.append(item)
        size += len(item)
        if size > BATCH_BYTES or len(part) >= BATCH_MESSAGES:
            yield part
            part, size = [], 0
    if part:
        yield part

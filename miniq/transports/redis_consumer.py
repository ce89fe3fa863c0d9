# SPDX-License-Identifier: MIT
"""A worker's share of a Redis server: taking, settling, staying alive, and recovering the dead.

Waiting consumes nothing.  A claim that finds less than it may take makes the server remember the
lists it looked at, for this connection (``CLIENT TRACKING``), and push a word when one of them
changes; a look every two seconds is the net under that.  Where the server cannot push, the consumer
looks five times a second.

A message that is not due is parked when it is first taken.
"""

from __future__ import annotations

import heapq
import logging
import os
import random
from collections import deque
from time import monotonic
from typing import Any, Callable, Deque, Dict, Iterable, List, Optional, Sequence, Set, Tuple

from ..connections.redis import Connection
from ..connections.redis_session import MOST_CLAIMED, Claim, Op
from ..connections.starts import StartJournal
from ..exceptions import ImproperlyConfigured, OperationalError
from ..message import Delivery, Message
from ..routing import Queue
from .base import Consumer, NotOurs, due_at, has_died
from .redis_envelope import Envelope, counted, dead_record, decode_envelope
from .redis_link import Link
from .redis_upkeep import Ownership

logger = logging.getLogger(__name__)

#: Seconds between two looks where the server pushes, and where it cannot.
NET_INTERVAL_S, LOOK_INTERVAL_S = 2.0, 0.2
#: Seconds between two signs of life on a connection that only listens.
LISTEN_INTERVAL_S = 10.0
#: Claims of one poll at most, where what comes is not due or over.
ROUNDS = 20
#: No limit to what one poll takes.
NO_LIMIT = 1 << 30
#: Messages of a fanout exchange that wait here at most; older ones are dropped, with a line in the log.
MOST_HEARD = 10_000


class Held:
    """A message this consumer holds; the `tag` of its delivery.

    What only a listener got (fanout) has no list: the server knows nothing of it.
    """

    __slots__ = ("consumer", "id", "item", "list", "found", "delivery", "state", "starts", "doubted")

    HERE, ENDING, GONE = range(3)

    def __init__(self, consumer: "RedisConsumer", id_: str, item: bytes, list_: str) -> None:
        self.consumer = consumer
        self.id = id_
        self.item = item
        self.list = list_
        #: None when the item is no message.
        self.found: Optional[Envelope] = None
        self.delivery: Optional[Delivery] = None
        self.state = Held.HERE
        #: How often it was started, the start here included.
        self.starts = 0
        #: A step was to settle it, and its answer got lost, or what came after it failed.
        self.doubted = False

    def counted_item(self, starts: int, lost_by: str = "", queue: str = "") -> bytes:
        """Return the item with another count."""
        return self.item if self.found is None else counted(self.found, starts, lost_by, queue, self.item)

    # -- what the transport tells

    def undo(self) -> None:
        """The step did not happen, or nobody knows."""
        if self.state == Held.ENDING:
            self.state = Held.HERE

    def doubt(self) -> None:
        """A step with it may have happened or not."""
        self.doubted = self.doubted or self.state == Held.ENDING

    def done(self) -> None:
        """The step happened."""
        if self.state == Held.ENDING:
            # Whoever waits for the end of the transaction does not know that yet.
            self.doubted = True
            self.let_go()

    def let_go(self) -> None:
        """It is not this consumer's any more."""
        self.state = Held.GONE
        self.consumer.held.pop(self.id, None)

    def give_back(self) -> None:
        """Nobody will hear that it was taken: back to where it came from, at the next step."""
        if self.state != Held.GONE:
            self.let_go()
            if self.list:
                self.consumer.returning.append(self.id)
            else:
                self.consumer.hear_again(self)


class RedisConsumer(Consumer):
    """A worker's share of a Redis server."""

    #: How it is known as alive.
    ownership_class = Ownership

    def __init__(
        self,
        link: Link,
        declare: Callable[..., None],
        node: str,
        queues: Iterable[Queue],
        on_close: "Callable[[RedisConsumer], Any]",
    ) -> None:
        self.node = node
        self.random = random.Random()
        self.housekeep_interval_s = min(5.0, link.options.lease / 3)
        self.poll_interval_s = NET_INTERVAL_S
        self.moved = False
        self.held: Dict[str, Held] = {}
        #: Ids to be put back at the next step.
        self.returning: List[str] = []
        #: A claim may have happened of which nothing is known.
        self.in_doubt = False
        self._link = link
        self._declare = declare
        self._on_close = on_close
        self._layout = link.layout
        self._wall = link.wall
        self._queues: Dict[str, Queue] = {}
        self._lists: List[str] = []
        self._list_queues: List[str] = []
        #: Their keys and those of what is parked.  The server tells of more: of all keys of a script.
        self._looked_at: Set[bytes] = set()
        #: What made the descriptor readable was of no concern: the poll for which that was needs no claim.
        self._nothing_new = False
        self._turns = 0
        self._number = 0
        #: Messages that the next poll takes at most.
        self._most = NO_LIMIT
        #: A poll that failed after this time was not refused, it was too slow.
        self._patience_s = link.options.socket_timeout
        self.woken = True
        self._due: Optional[float] = None
        self._due_known = False
        #: What was heard from fanout exchanges, and what of it waits to be due.
        self._heard: Deque[Held] = deque()
        self._heard_later: List[Tuple[float, int, Held]] = []
        self._retired: List[Connection] = []
        #: The one whose descriptor was given out last.
        self._watched: Optional[Connection] = None
        #: Keys that are no lists, told in the log.
        self._bad: Set[bytes] = set()
        self._ears: Optional[Connection] = None
        self._closed = self._registered = False
        self._ownership = self.ownership_class(link, node, self._queues)
        self.owner = self._ownership.owner
        queues = list(queues)
        #: Whether this consumer listens on the transport's own connection.
        self.shares: bool = not any(map(is_fanout, queues)) and not any(
            consumer.shares for consumer in link.consumers
        )
        link.consumers.append(self)
        try:
            if self.shares and link.has_connection:
                self.on_connection(None, link.connection())
            for queue in queues:
                declare(queue)
                self._queues[queue.name] = queue
            self._arrange()
            self._ownership.renew()
            self._registered = True
            if not self.shares:
                self._open_ears()
        except BaseException:
            self.close()
            raise

    # -- waking

    def on_connection(self, old: Optional[Connection], new: Connection) -> None:
        """Told by the transport: its own connection is a new one."""
        self.in_doubt = self.in_doubt or old is not None
        if self.shares:
            if old is not None:
                self._retire(old)
            self._use(new)

    def _retire(self, connection: Connection) -> None:
        """Close it, or keep its descriptor valid while somebody may still watch that."""
        if connection is self._watched:
            self._retired.append(connection)
        else:
            connection.close()

    def _use(self, connection: Connection) -> None:
        """Listen on a connection."""
        self.moved = True
        self.woken = True
        connection.on_push = self._on_push
        tracked = False
        if connection.pushes:
            # What comes over this very connection is known here (`on_own_push`).
            (answer,) = connection.pipeline([("CLIENT", "TRACKING", "ON", "NOLOOP")])
            tracked = not isinstance(answer, Exception)
        self.poll_interval_s = NET_INTERVAL_S if tracked else LOOK_INTERVAL_S

    def _open_ears(self) -> Connection:
        """Return the connection that listens, for a consumer that does not share the transport's."""
        ears = self._ears
        if ears is not None and not ears.broken:
            return ears
        if ears is not None:
            self._retire(ears)
        ears = self._ears = self._link.connect(self.node)
        self._use(ears)
        self._subscribe(ears, self._queues.values())
        if not self._lists and self.poll_interval_s == NET_INTERVAL_S:
            self.poll_interval_s = LISTEN_INTERVAL_S
        return ears

    def _subscribe(self, ears: Connection, queues: Iterable[Queue]) -> None:
        channels = []
        for queue in filter(is_fanout, queues):
            for binding in queue.all_bindings:
                if binding.exchange.type == "fanout":
                    channels.append(
                        self._link.channel(binding.exchange.name, binding.routing_key.replace("#", "*"))
                    )
        if channels and not ears.pushes:
            raise ImproperlyConfigured(
                "this Redis server speaks no RESP3 (HELLO 3), which listening to a fanout exchange needs:"
                " turn off worker_enable_remote_control and use no Broadcast queues"
            )
        for channel in channels:
            ears.call("PSUBSCRIBE", channel)

    def _on_push(self, push: List[Any]) -> None:
        kind = push[0]
        if kind == b"invalidate":
            # None: all keys were deleted.
            self.woken = self.woken or push[1] is None or not self._looked_at.isdisjoint(push[1])
        elif kind in (b"pmessage", b"message"):
            self.woken = True
            if len(self._heard) >= MOST_HEARD:
                logger.error(
                    "worker %s is too slow for what is broadcast: the oldest message is dropped", self.node
                )
                self._heard.popleft()
            self._heard.append(Held(self, "", push[-1], ""))

    def on_own_push(self) -> None:
        """Told by the transport: it has put something into a list, which the server does not tell it."""
        self.woken = True

    def _ear(self) -> Connection:
        return self._link.connection() if self.shares else self._open_ears()

    def fileno(self) -> Optional[int]:
        ear = self._ear()
        self.moved = False
        for connection in self._retired:
            connection.close()
        self._retired.clear()
        self._watched = ear
        return ear.fileno()

    def on_readable(self) -> None:
        connection = self._link.connection() if self.shares else self._ears
        if connection is not None and not connection.broken:
            connection.take_pushes()
        self._nothing_new = not self.woken

    def changed(self) -> bool:
        if self.woken:
            return True
        ear = self._ear()
        if self._lists:
            # Not only a question: the server remembers it, and tells when the answer is another.
            return bool(ear.call("EXISTS", *self._lists)) or self.woken
        ear.call("PING")
        return self.woken

    def next_due(self) -> Optional[float]:
        if not self._due_known:
            with self._link.using() as connection:
                firsts = connection.pipeline(
                    [("ZRANGE", key, 0, 0, "WITHSCORES") for key in self._parked_keys()]
                )
            self._due = min((score for score in map(_first_score, firsts) if score is not None), default=None)
            self._due_known = True
        later = self._heard_later[0][0] if self._heard_later else None
        return min((due for due in (self._due, later) if due is not None), default=None)

    def not_due(self, limit: int) -> List[Tuple[float, Delivery]]:
        names = [name for name, queue in self._queues.items() if not is_fanout(queue)]
        now = repr(self._wall())
        with self._link.using() as connection:
            parts = connection.pipeline(
                [
                    ("ZRANGEBYSCORE", self._layout.parked(name), now, "+inf", "WITHSCORES", "LIMIT", 0, limit)
                    for name in names
                ]
            )
        heard = ((due, held.delivery) for due, _, held in self._heard_later)
        found = [(due, delivery) for due, delivery in heard if delivery is not None]
        for name, members in zip(names, parts):
            for member, due in _scores(members):
                try:
                    opened = decode_envelope(member.partition(b"\0")[2])
                except ValueError as error:
                    logger.debug("queue %s: what waits there is no message: %s", name, error)
                    continue
                queue, exchange, key = opened.queue or name, opened.exchange, opened.routing_key
                found.append((due, Delivery(opened.message, None, queue, exchange, key, opened.starts)))
        found.sort(key=lambda one: one[0])
        return found[:limit]

    # -- taking

    def _arrange(self) -> None:
        """List what is to be looked at, in the order of a claim."""
        names = [name for name, queue in self._queues.items() if not is_fanout(queue)]
        if names:
            at = self._turns % len(names)
            names = names[at:] + names[:at]
        lists = [self._layout.lists(name) for name in names]
        takes_lost = any(not self._queues[name].auto_delete for name in names)
        self._lists = [self._layout.lost] if takes_lost else []
        self._list_queues = ["_miniq.lost"] if takes_lost else []
        for step in range(len(self._layout.steps)):
            self._lists += [one[step] for one in lists]
            self._list_queues += names
        self._looked_at = {key.encode() for key in (*self._lists, *self._parked_keys())}

    def _parked_keys(self) -> List[str]:
        return [self._layout.parked(name) for name, queue in self._queues.items() if not is_fanout(queue)]

    def poll(self, limit: int) -> List[Delivery]:
        nothing_new, self._nothing_new = self._nothing_new, False
        if limit <= 0 or (nothing_new and not self.woken and not self._link.has_operations):
            return []
        now = self._wall()
        begun_mono = monotonic()
        self.woken = limit > self._most
        limit = min(limit, self._most)
        if not self.shares:
            ears = self._open_ears()
            if self._lists:
                ears.call("EXISTS", *self._lists)
            else:
                ears.take_pushes()
        found = self._take_heard(limit, now)
        if self._lists and len(found) < limit:
            try:
                with self._link.transaction():
                    self._take_waiting(found, limit, now)
            except BaseException as error:
                # What was taken and is not known here, the server will tell.
                self.in_doubt = True
                if isinstance(error, OperationalError) and monotonic() - begun_mono >= self._patience_s:
                    # It may have been more than the line brings in time.
                    self._most = max(1, limit // 4)
                raise
            self._most = min(2 * self._most, NO_LIMIT)
        return [held.delivery for held in found if held.delivery is not None]

    def _take_waiting(self, found: List[Held], limit: int, now: float) -> None:
        """Fill up `found` from the lists."""
        ops: List[Op] = []
        asked = limit - len(found)
        for _ in range(ROUNDS):
            if asked <= 0:
                break
            taken, any_revoked, more = self._claim(min(asked, MOST_CLAIMED), ops, now)
            ops = []
            good = [held for held in taken if self._is_good(held, now, ops)]
            if any_revoked:
                self._find_revoked(good, now)
            found += good
            if not more and not ops:
                break
            # Where nothing but what is not due comes, it is taken out of the way in larger portions.
            asked = limit - len(found) if good else 200
        else:
            # There may be more behind; others shall have their turn first.
            self.woken = True
        for held in reversed(found[limit:]):
            ops.append(("back", self.owner, held.id))
            held.let_go()
        del found[limit:]
        if ops:
            # Now: were it left to the transaction, its end by an exception would leave them with nobody.
            self._link.step(ops=ops)

    def _claim(self, limit: int, ops: List[Op], now: float) -> Tuple[List[Held], bool, bool]:
        """Take messages; return them, whether anything is revoked, and whether there may be more."""
        link = self._link
        if self.in_doubt:
            self._look_for_strays()
        returning = self._returning_ops()
        if len(self._queues) > 1:
            self._turns += 1
            self._arrange()
        claim = Claim(
            self.owner, limit, self._number, link.options.lease, now, self.shares, self._lists,
            self._list_queues, self._parked_keys(),
        )  # fmt: skip
        first = self._number
        # Whatever comes in between, the numbers of what may have been taken are not used again.
        self._number += limit
        claimed = link.step(claim, [*returning, *ops])
        self._number = first + len(claimed.items)
        del self.returning[: len(returning)]
        for key in claimed.bad:
            if key not in self._bad:
                self._bad.add(key)
                logger.error(
                    "another program uses the key %r: nothing can be taken from there; remove it, or use"
                    " another database or a global_keyprefix", key,
                )  # fmt: skip
        self._due, self._due_known = claimed.next_due, True
        taken = []
        for offset, (index, item) in enumerate(claimed.items):
            held = Held(self, f"{self.owner}:{first + offset}", item, self._lists[index])
            self._open(held, self._list_queues[index])
            self.held[held.id] = held
            link.take(held)
            taken.append(held)
        return taken, claimed.any_revoked, len(taken) == limit

    def _returning_ops(self) -> List[Op]:
        """Return what puts them back, the last one first, so that each comes to its old place."""
        return [("back", self.owner, id_) for id_ in sorted(self.returning, key=_number_of, reverse=True)]

    def _look_for_strays(self) -> None:
        """Find what the server has as ours and we do not know of: answers got lost."""
        with self._link.using() as connection:
            ids = [name.decode() for name in connection.call("HKEYS", self._layout.held(self.owner))]
        known = {*self.held, *self.returning}
        strays = [id_ for id_ in ids if id_ not in known]
        self.returning += strays
        self.in_doubt = False
        if strays:
            logger.info("%d messages were taken without this worker hearing of it and go back", len(strays))

    def _open(self, held: Held, queue: str) -> None:
        """Take the item apart."""
        try:
            found = held.found = decode_envelope(held.item)
        except ValueError as error:
            logger.debug("queue %s: an item is no message: %s", queue, error)
            held.delivery = Delivery(Message(held.item, "", "", {}, {}), held, queue, "", queue, 0, "garbage")
            return
        held.starts = found.starts
        fate = None
        if found.lost_by or (self.delivery_limit and found.starts >= self.delivery_limit):
            fate = "lost"
        held.delivery = Delivery(
            found.message, held, found.queue if held.list == self._layout.lost else queue, found.exchange,
            found.routing_key, found.starts, fate, found.lost_by,
        )  # fmt: skip
        held.delivery.redelivered = found.redelivered

    def _is_good(self, held: Held, now: float, ops: List[Op]) -> bool:
        """Say whether it may be handed out; else `ops` gets what is done with it."""
        found = held.found
        if found is None or found.lost_by:
            return True
        message = found.message
        eta = message.headers.get("eta")
        if eta is not None:
            due = due_at(message, now)
            if due > now:
                assert held.delivery is not None
                parked = self._layout.parked(held.delivery.queue)
                ops.append(("park", self.owner, held.id, parked, repr(due)))
                self._see_due(due)
                held.let_go()
                return False
        assert held.delivery is not None
        queue = self._queues.get(held.delivery.queue)
        ttl = None if queue is None else queue.message_ttl
        published = found.published if ttl is not None or "expiration" in message.properties else None
        if published is not None:
            begun = max(published, 0.0 if eta is None else due_at(message, 0.0))
            if (ttl is not None and begun + ttl <= now) or has_died(message, begun, now):
                ops.append(("drop", self.owner, held.id))
                held.let_go()
                return False
        return True

    def _see_due(self, due: float) -> None:
        if self._due is None or due < self._due:
            self._due = due

    def _find_revoked(self, taken: Sequence[Held], now: float) -> None:
        """Give those with a tombstone their fate."""
        asked = [
            (held.delivery, task_id)
            for held in taken
            if held.delivery is not None and held.delivery.fate is None
            for task_id in [held.delivery.message.headers.get("id")]
            if isinstance(task_id, str)
        ]
        if not asked:
            return
        with self._link.using() as connection:
            scores = connection.call("ZMSCORE", self._layout.revoked, *(task_id for _, task_id in asked))
        for (delivery, _), score in zip(asked, scores):
            if score is not None and float(score) > now:
                delivery.fate = "revoked"

    def _take_heard(self, limit: int, now: float) -> List[Held]:
        while self._heard_later and self._heard_later[0][0] <= now:
            self._heard.append(heapq.heappop(self._heard_later)[2])
        found: List[Held] = []
        while self._heard and len(found) < limit:
            held = self._heard.popleft()
            if held.delivery is None:
                self._open(held, "")
                delivery = held.delivery
                assert delivery is not None
                delivery.queue = self._queue_of(delivery.exchange)
                due = due_at(delivery.message, now)
                if due > now:
                    self._number += 1
                    heapq.heappush(self._heard_later, (due, self._number, held))
                    continue
            held.state = Held.HERE
            self._link.take(held)
            found.append(held)
        return found

    def hear_again(self, held: Held) -> None:
        """Told by a message of a fanout exchange: it comes next."""
        self._heard.appendleft(held)
        self.woken = True

    def _queue_of(self, exchange: str) -> str:
        for name, queue in self._queues.items():
            if any(binding.exchange.name == exchange for binding in queue.all_bindings):
                return name
        return next(iter(self._queues), "")

    # -- settling

    def start(self, deliveries: Sequence[Delivery]) -> None:
        link = self._link
        session = link.session
        if session is None:
            with link.transaction():
                self.start(deliveries)
            return
        for delivery in deliveries:
            held = self._mine(delivery)
            if held is None:
                raise NotOurs([delivery])
            held.starts = (0 if held.found is None else held.found.starts) + 1
            if held.list:
                settle = session.settle(self.owner)
                starts = settle.early if delivery.early else settle.late
                starts.append((held.id, "" if delivery.token is None else delivery.token))
                link.touch(held)

    def _mine(self, delivery: Delivery) -> Optional[Held]:
        held = delivery.tag
        return held if isinstance(held, Held) and held.consumer is self and held.state == Held.HERE else None

    def _to_settle(self, delivery: Delivery) -> Optional[Held]:
        """Return the message if it may be settled, or if it may have been: then the step will tell."""
        held = delivery.tag
        doubted = isinstance(held, Held) and held.consumer is self and held.doubted
        return held if doubted and self._link.session is not None else self._mine(delivery)

    def _do(self, ops: Sequence[Op], touched: Sequence[Held] = ()) -> None:
        link = self._link
        with link.transaction():
            for held in touched:
                link.touch(held)
            for op in ops:
                link.add(op)

    def _end(self, delivery: Delivery, *commands: Op) -> bool:
        """Settle, and do what comes instead of the message; say whether it was ours."""
        held = self._to_settle(delivery)
        if held is None:
            return False
        session = self._link.session
        if session is None:
            try:
                with self._link.transaction():
                    return self._end(delivery, *commands)
            except NotOurs as error:
                return bool(error.settled)
        for command in commands:
            session.add(("do", *command))
        if held.list:
            held.state = Held.ENDING
            session.forget_start(self.owner, held.id)
            session.settle(self.owner).ends.append(held.id)
            self._link.touch(held)
        else:
            held.state = Held.GONE
        return True

    def ack(self, delivery: Delivery) -> bool:
        return self._end(delivery)

    def reject(self, delivery: Delivery, requeue: bool, reason: str = "rejected") -> bool:
        if not requeue:
            return self.dead_letter(delivery, reason)
        held = self._to_settle(delivery)
        if held is None:
            return False
        if not held.list:
            held.let_go()
            self._heard.append(held)
            return True
        starts = held.starts
        if self.delivery_limit:
            # Sent back on purpose: that is no loss, it does not bring it nearer to its limit.
            starts = min(starts, self.delivery_limit - 1)
        key = held.list
        if key == self._layout.lost:
            # It is lost no more.
            key = self._layout.list_for(delivery.queue, delivery.message.priority)
        return self._end(delivery, ("LPUSH", key, held.counted_item(starts)))

    def release(self, deliveries: Sequence[Delivery]) -> None:
        ops: List[Op] = []
        touched = []
        for delivery in reversed(deliveries):
            held = self._mine(delivery)
            if held is not None and held.list:
                held.state = Held.ENDING
                if self._link.session is not None:
                    self._link.session.forget_start(self.owner, held.id)
                ops.append(("back", self.owner, held.id))
                touched.append(held)
            elif held is not None:
                held.let_go()
                self._heard.appendleft(held)
        if ops:
            self._do(ops, touched)

    def defer(self, delivery: Delivery, until: float) -> bool:
        held = self._to_settle(delivery)
        if held is None:
            return False
        if not held.list:
            held.let_go()
            self._number += 1
            heapq.heappush(self._heard_later, (until, self._number, held))
            return True
        found = held.found
        item = held.counted_item(
            held.starts, "" if found is None else found.lost_by, "" if found is None else found.queue
        )
        if until <= self._wall():
            return self._end(delivery, ("RPUSH", held.list, item))
        self._see_due(until)
        member = held.list.encode() + b"\0" + item
        return self._end(delivery, ("ZADD", self._layout.parked(delivery.queue), repr(until), member))

    def dead_letter(self, delivery: Delivery, reason: str) -> bool:
        held = self._to_settle(delivery)
        if held is None:
            return False
        at = self._wall()
        name = f"{int(at * 1000):011x}{os.urandom(4).hex()}"
        record = dead_record(delivery.queue, reason, at, held.item)
        layout = self._layout
        return self._end(
            delivery, ("HSET", layout.dead, name, record), ("ZADD", layout.dead_index, repr(at), name)
        )

    # -- upkeep

    def start_journal(self) -> Optional[StartJournal]:
        return self._ownership.journal

    def keep_alive(self) -> None:
        """Told by a consumer of this link that keeps house; for one that only listens nobody does."""
        self._ownership.renew_in_time()

    def housekeep(self) -> None:
        if self._ownership.recover_the_dead(self.delivery_limit, self.random.random):
            self.woken = True
        for consumer in self._link.consumers:
            if consumer is not self:
                consumer.keep_alive()
        # What others parked and then left behind, nobody tells of.
        known, self._due_known = self._due, False
        self.next_due()
        if self._due != known:
            self.woken = True
        for name in self._ownership.forgotten:
            logger.warning("queue %s was deleted on the server and is declared anew", name)
            self._declare(self._queues[name], again=True)
        if self.returning:
            self._do(self._returning_ops())
            self.returning.clear()

    # -- queues

    def add_queue(self, queue: Queue) -> None:
        if is_fanout(queue) and self.shares:
            raise ImproperlyConfigured(
                f"queue {queue.name!r} has a fanout exchange: name it when the worker is started (-Q)"
            )
        self._declare(queue)
        self._queues[queue.name] = queue
        self._arrange()
        self._due_known = False
        self.woken = True
        self._ownership.renew()
        if self._ears is not None and not self._ears.broken:
            self._subscribe(self._ears, [queue])

    def cancel_queue(self, name: str) -> None:
        queue = self._queues.pop(name, None)
        if queue is None:
            return
        self._arrange()
        self._due_known = False
        self._ownership.renew()
        with self._link.using() as connection:
            self._ownership.leave(connection, name, self.owner, self._wall())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        link, ownership = self._link, self._ownership
        here = link.is_in_its_process
        try:
            if here and self._registered:
                if self.returning:
                    self._do(self._returning_ops())
                ownership.close(self.delivery_limit, self.random.random)
        except OperationalError as error:
            logger.warning(
                "worker %s could not give its messages back, others will find them: %s", self.node, error
            )
        finally:
            link.consumers.remove(self)
            self._on_close(self)
            if self._ears is not None:
                self._retired.append(self._ears)
            for connection in self._retired:
                connection.close()
            if here:
                ownership.forget()


def is_fanout(queue: Queue) -> bool:
    """Say whether a queue gets what is broadcast."""
    return any(binding.exchange.type == "fanout" for binding in queue.all_bindings)


def _number_of(id_: str) -> int:
    return int(id_.rpartition(":")[2])


def _scores(found: Any) -> List[Tuple[bytes, float]]:
    """Return members and scores of a range WITHSCORES, RESP2 or RESP3."""
    if not found or isinstance(found, Exception):
        return []
    pairs = found if isinstance(found[0], list) else zip(found[::2], found[1::2])
    return [(member, float(score)) for member, score in pairs]


def _first_score(found: Any) -> Optional[float]:
    """Return the score of the first member of a ZRANGE ... WITHSCORES, RESP2 or RESP3."""
    if not found or isinstance(found, Exception):
        return None
    return float(found[0][1] if isinstance(found[0], list) else found[1])

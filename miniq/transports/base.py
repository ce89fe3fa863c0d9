# SPDX-License-Identifier: MIT
"""The seam between miniq and a broker: what a transport must do, and the table of transports.

Two objects.  A `Transport` is one thread's conversation with one broker: it declares and
publishes.  A `Consumer` takes messages for one worker.  Neither ever blocks longer than its
deadline, and neither is shared between threads.

The life of a delivery, whatever the store::

    poll() ----> start() ----> ack()           finished; an early one was already safe at start()
       |            \\-------> reject()        refused: dead letter, or back to the queue's end
       |            \\-------> defer()         back, not before a moment; the count stays
       \\---------> release()                  not started: back to its old place, not counted
       \\---------> dead_letter()              set aside with a reason, listed, replayable

All of these may be called inside ``with transport.transaction():`` together with `publish` and,
where the result backend is the same store, with the backend's `store`; what can be atomic there,
is.  A transport whose broker has no transactions runs them in the order of the calls.

Fanout: `declare` of a queue with a fanout exchange binds it; `publish` to that exchange copies
the message to every bound queue; nobody bound = nobody reads, no error.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from ..connections.starts import StartJournal
from ..exceptions import ImproperlyConfigured
from ..message import Delivery, Message
from ..routing import Queue
from ..text import import_object, mask_url, unknown_scheme
from ..times import to_epoch

logger = logging.getLogger(__name__)

#: URL scheme -> "module:Class", relative to this package.
TRANSPORTS: Dict[str, str] = {
    "amqp": ".amqp:AmqpTransport",
    "amqps": ".amqp:AmqpTransport",
    "memory": ".memory:MemoryTransport",
    "pyamqp": ".amqp:AmqpTransport",
    "pyamqps": ".amqp:AmqpTransport",
    "redis": ".redis:RedisTransport",
    "rediss": ".redis:RedisTransport",
    "redis+socket": ".redis:RedisTransport",
    "sentinel": ".redis:RedisTransport",
    "sqlite": ".sqlite:SQLiteTransport",
    "unix": ".redis:RedisTransport",
    "valkey": ".redis:RedisTransport",
    "valkey+socket": ".redis:RedisTransport",
    "valkeys": ".redis:RedisTransport",
}


class Publication(NamedTuple):
    """One message and where it goes."""

    message: Message
    exchange: str
    routing_key: str


class QueueSize(NamedTuple):
    """How a queue stands: messages, the age of the oldest ready one, workers; None = not told."""

    queue: str
    ready: int
    waiting: Optional[int]  #: not due yet
    unacked: Optional[int]  #: held or run by workers
    oldest_s: Optional[float]
    consumers: Optional[int] = None  #: living workers that take from it


class DeadLetter(NamedTuple):
    """A message that was set aside: `id` is what `replay` and `drop` take."""

    id: str
    queue: str
    reason: str
    at: float  #: epoch seconds
    message: Message


class NotOurs(Exception):
    """Some deliveries are not this worker's any more; nothing of the transaction was done.

    Raised by `Consumer.poll`, `Consumer.start` or at the end of a transaction, where the broker cannot
    tell at once.  `gone` went to others; `settled` had been settled before, by a step whose answer
    got lost.
    """

    def __init__(
        self, gone: Sequence[Optional[Delivery]], settled: Sequence[Optional[Delivery]] = ()
    ) -> None:
        super().__init__(f"{len(gone)} deliveries went to others, {len(settled)} were settled before")
        self.gone = [delivery for delivery in gone if delivery is not None]
        self.settled = [delivery for delivery in settled if delivery is not None]


class Transport:
    """One thread's conversation with one broker.

    Errors: `OperationalError` where trying again may help (text names the URL without its
    password), `ImproperlyConfigured` where the operator must act.
    """

    #: Copies to many queues. / Orders by priority. / Holds messages until they are due. /
    #: `publish` returns only when the broker has it.
    fanout = False
    priority = False
    delay = False
    confirms = False
    #: An exception undoes all of a transaction.  Where not, what was called before a `Consumer.poll` is
    #: done by that poll, and stays done.
    rolls_back = True
    #: Messages are in this process alone: no other process can consume them, not even a child.
    in_process_only = False
    #: How priorities sort here: "higher first" or "lower first".
    priority_order = "higher first"

    def __init__(self, url: str, options: Mapping[str, Any], wall: Callable[[], float]) -> None:
        """Remember `url` and `options` (``broker_transport_options``); open nothing yet.

        Unknown options raise `ImproperlyConfigured`.  `wall` gives epoch seconds.
        """
        raise NotImplementedError

    def declare(self, queue: Queue, timeout_s: Optional[float] = None) -> None:
        """Create `queue` with its exchange and bindings; cheap when already done here.

        Takes at most `timeout_s`, None = as the store is configured.
        """
        raise NotImplementedError

    def publish(self, publications: Sequence[Publication], timeout_s: float) -> None:
        """Hand messages over; return when the broker has all of them, else raise.

        Exchange ``""`` means: to the queue named by the routing key.  All are stored or none
        where the store can do that.
        """
        raise NotImplementedError

    def transaction(self) -> "AbstractContextManager[Any]":
        """Return a context in which calls become visible together (see the module)."""
        raise NotImplementedError

    def consumer(self, node: str, queues: Iterable[Queue]) -> "Consumer":
        """Return a consumer for the worker called `node`."""
        raise NotImplementedError

    def purge(self, queue: str) -> int:
        """Delete what waits in `queue` (ready and not due); return how many."""
        raise NotImplementedError

    def sizes(self, names: Iterable[str] = ()) -> List[QueueSize]:
        """Return the sizes of all known queues, sorted by name.

        A broker that cannot list its queues is asked for `names`; those it does not have are left out.
        """
        raise NotImplementedError

    def revoke(self, task_ids: Iterable[str], until: float) -> None:
        """Store tombstones: until `until` (epoch s) these ids come with fate "revoked"."""
        raise NotImplementedError

    def dead_letters(self, limit: int = 100) -> List[DeadLetter]:
        """Return the newest messages that were set aside."""
        raise NotImplementedError

    def replay(self, dead_letter_id: str) -> bool:
        """Put a dead letter back into its queue with a fresh count; False when unknown."""
        raise NotImplementedError

    def drop(self, dead_letter_id: str) -> bool:
        """Delete a dead letter; False when unknown."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the connection; everything unfinished of a consumer goes back."""
        raise NotImplementedError


class Consumer:
    """Takes messages for one worker.  Used in the loop's thread only.

    The broker knows that the worker is alive by something that ends with its process; when it
    ends, what the worker held is recovered by the others: messages that were not started or are
    late-acked go back (with a growing pause from the second loss on), early-acked ones and those
    over the delivery limit come out of `poll` once more, with fate "lost".
    """

    #: Not-started messages over this count of starts get fate "lost" (0 = no limit).
    delivery_limit = 3

    def fileno(self) -> Optional[int]:
        """Return a descriptor that is readable when `poll` may have something, or None."""
        raise NotImplementedError

    def on_readable(self) -> None:
        """Take the wake-up off the descriptor; called before `poll` when it was readable."""
        raise NotImplementedError

    def changed(self) -> bool:
        """Say, cheaply, whether `poll` may find something new since it last came back short.

        Called at the interval `poll_interval_s`; the net under the descriptor.
        """
        raise NotImplementedError

    #: Set when `fileno` would be another one than it was: stop watching that, then ask for the new one.
    moved = False
    #: Set when something may have come that the descriptor does not tell of; the next `poll` clears it.
    woken = False

    @property
    def at_hand(self) -> int:
        """How many messages `poll` has without asking its broker, which has sent them before."""
        return 0

    #: Seconds between two `changed` while idle; None = the descriptor alone is enough.
    poll_interval_s: Optional[float] = None

    def poll(self, limit: int) -> List[Delivery]:
        """Return at most `limit` deliveries, best first; never blocks.

        They are this worker's from now on, but not started.
        """
        raise NotImplementedError

    def next_due(self) -> Optional[float]:
        """Return when the next waiting message is due (epoch seconds), None if there is none."""
        raise NotImplementedError

    def not_due(self, limit: int) -> List[Tuple[float, Delivery]]:
        """Return messages of its queues that wait to be due, with when (epoch seconds), soonest first.

        To be looked at only, and as far as the broker can show them: the deliveries are nobody's.
        """
        raise NotImplementedError

    def start_journal(self) -> Optional[StartJournal]:
        """Return where children note which messages have begun, None where there is no such place.

        With it a started message whose `token` was never marked counts as not started when its
        worker dies; without it nothing is handed out ahead.
        """
        return None

    def start(self, deliveries: Sequence[Delivery]) -> None:
        """Count one start each; those with `early` are acknowledged and never start again."""
        raise NotImplementedError

    def ack(self, delivery: Delivery) -> bool:
        """End the delivery; False = it is not ours any more, drop its outcome.

        Where the broker tells later, `NotOurs` is raised then.
        """
        raise NotImplementedError

    def reject(self, delivery: Delivery, requeue: bool, reason: str = "rejected") -> bool:
        """Refuse: to the back of the queue, or set aside as a dead letter with `reason`."""
        raise NotImplementedError

    def release(self, deliveries: Sequence[Delivery]) -> None:
        """Give back what has not begun, be it marked as started: same place, same count."""
        raise NotImplementedError

    def defer(self, delivery: Delivery, until: float) -> bool:
        """Give back, not to come out before `until` (epoch seconds)."""
        raise NotImplementedError

    def dead_letter(self, delivery: Delivery, reason: str) -> bool:
        """Set aside; it can be listed and replayed."""
        raise NotImplementedError

    def housekeep(self) -> None:
        """Renew, recover from dead workers, expire; called every `housekeep_interval_s`."""
        raise NotImplementedError

    housekeep_interval_s: float = 1.0

    def add_queue(self, queue: Queue) -> None:
        """Consume from one more queue."""
        raise NotImplementedError

    def cancel_queue(self, name: str) -> None:
        """Stop consuming from a queue; what was taken from it stays taken."""
        raise NotImplementedError

    def close(self) -> None:
        """Give everything unfinished back and stop being known as alive."""
        raise NotImplementedError


def transport_class(url: str) -> "type[Transport]":
    """Return the class for the URL's scheme; `ImproperlyConfigured` names the known ones."""
    scheme = url.partition("://")[0].lower()
    target = TRANSPORTS.get(scheme)
    if "://" not in url or target is None:
        raise ImproperlyConfigured(f"broker URL {mask_url(url)!r}: {unknown_scheme(scheme, TRANSPORTS)}")
    found: "type[Transport]" = import_object(target, package=__package__)
    return found


# -- rules that every store keeps ----------------------------------------------------------------


def due_at(message: Message, now: float) -> float:
    """Return when the message may come out: its ``eta`` header, or `now` where it has none.

    An eta that is no date does not hold the message back: the worker says what is wrong with it.
    """
    eta = message.headers.get("eta")
    if eta is None:
        return now
    try:
        return max(now, to_epoch(eta))
    except (TypeError, ValueError, OverflowError):
        return now


def has_died(message: Message, published: float, now: float) -> bool:
    """Say whether the ``expiration`` property (ms, text) is over; then nobody gets the message.

    One with an ``expires`` header is a task: the worker takes it and stores that it came too late.
    """
    expiration = message.properties.get("expiration")
    if expiration is None or message.headers.get("expires") is not None:
        return False
    try:
        return published + float(expiration) / 1000 <= now
    except (TypeError, ValueError):
        return False


def pause_after_loss_s(starts: int, rand: float) -> float:
    """Return how long a message waits whose worker died after its `starts`-th start.

    Nothing after the first, then 1, 2, 4 ... seconds up to an hour and `rand` (0..1) of half of that.
    """
    return 0.0 if starts < 2 else min(2.0 ** (starts - 2), 3600.0) * (1.0 + rand / 2)


def what_is_unroutable(kinds: Set[str], exchange: str, routing_key: str) -> Optional[str]:
    """Return what is wrong when a task reaches no queue of `exchange`; None where that is in order.

    `kinds` are the types of its bindings.  With a fanout exchange, or where nobody is bound, nobody
    reads; the latter is logged, as it may be a wrong name.
    """
    if not kinds:
        logger.warning("nobody is bound to exchange %r: the task sent there is dropped", exchange)
    if kinds & {"direct", "topic"}:
        return (
            f"exchange {exchange!r}: no queue is bound with a key for {routing_key!r}, the task would be"
            " lost; declare a queue with this routing key or send to a queue by name"
        )
    return None

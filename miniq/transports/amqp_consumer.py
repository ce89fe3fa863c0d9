# SPDX-License-Identifier: MIT
"""A worker's share of a RabbitMQ server.

RabbitMQ pushes: it is told how many messages a consumer may have that are not acknowledged, and sends
these.  Whatever waits here for a free slot is kept from other workers, so the consumer subscribes to
its queues while it wants messages, for as many as it wants, and cancels that before it acknowledges
what would make room for more.  Only while messages are taken in quick succession it stays subscribed
and has some ahead; when the succession ends, they go back.

A delivery ends with its channel, a run does not.  What runs when a channel or connection is lost is
remembered by queue, id and retries: when the server hands it out again, and here, that joins the
run.  What had been acknowledged a moment before may come again too, and is acknowledged again.

A message that is due soon is held here; the others go to a queue in which they wait (see
`amqp_delay`), and only when the server has them there is the original acknowledged.
"""

from __future__ import annotations

import heapq
import logging
import os
import random
from collections import deque
from functools import partial
from time import monotonic
from typing import Any, Deque, Dict, Iterable, List, Optional, Sequence, Set, Tuple

from ..codecs.amqp import Cancelled, ChannelClosed, Deliver
from ..connections.amqp import Channel, ChannelError, Connection
from ..exceptions import ImproperlyConfigured, MiniqError, OperationalError
from ..message import Delivery, Message
from ..routing import Queue
from . import amqp_notes
from .amqp_delay import is_native
from .amqp_link import Held, Key, Link, Subscription
from .amqp_message import from_content, take_marks
from .amqp_topology import declare_queue, goes_unused
from .base import Consumer, NotOurs, due_at, pause_after_loss_s

logger = logging.getLogger(__name__)

#: Seconds between two looks at a connection on which nothing comes.
NET_INTERVAL_S = 2.0
#: A server that has been silent for so long is asked whether it is there, and has so long to answer.
SILENT_S, PROBE_TIMEOUT_S = 5.0, 5.0
#: It has less time where another connection to it was found dead so shortly before.
SUSPECT_S, SUSPECT_TIMEOUT_S = 10.0, 1.0
#: After so many such looks at messages that do not come, the connection is made anew.
MOST_OVERDUE = 3
#: Messages are taken in quick succession where the next ones are wanted so soon after the last.
QUICK_S = 0.02
#: What came ahead and is not wanted for so long goes back.
LINGER_S = 0.5
#: Messages a subscription is for, at least and at most, in quick succession.
LEAST_AHEAD, MOST_AHEAD = 32, 256
#: Messages held here until they are due, at most.
MOST_HELD = 1000
#: When what is not due cannot be sent to where it waits, that is tried again so much later.
FAR_PAUSE_S = 20.0
#: An acknowledgement may be lost with its connection for so long, and the message come again so much
#: later; so many are remembered at most.
DOUBT_S, DOUBTED_S, MOST_DOUBTED = 30.0, 600.0, 20_000


class AmqpConsumer(Consumer):
    """A worker's share of a RabbitMQ server."""

    def __init__(self, link: Link, node: str, queues: Iterable[Queue]) -> None:
        self.node = node
        self.random = random.Random()
        self.poll_interval_s = NET_INTERVAL_S
        self.moved = False
        self.woken = True
        self._link = link
        self._wall = link.wall
        self._hold_s = link.options.hold
        self._queues: Dict[str, Queue] = {queue.name: queue for queue in queues}
        self._connection: Optional[Connection] = None
        #: The one whose descriptor was given out last.
        self._watched: Optional[Connection] = None
        self._retired: List[Connection] = []
        self._channel: Optional[Channel] = None
        self._pid = os.getpid()
        self._epoch = 0
        self._prefetch = -1
        self._subscriptions: Dict[str, Subscription] = {}
        #: All that were made on this channel: a message may come from one that is cancelled.
        self._by_tag: Dict[str, Subscription] = {}
        self._made = 0
        self._turns = 0
        #: From which queue the last message was taken.
        self._last_queue = ""
        #: Tag -> what is not acknowledged, in the order of the tags.
        self._unsettled: Dict[int, Held] = {}
        self._ready: Dict[str, Deque[Held]] = {}
        self._later: List[Tuple[float, int, Held]] = []
        #: What is to go to a queue in which it waits.
        self._far: List[Held] = []
        self._far_mono = 0.0
        #: What the next step acknowledges, and what it refuses.
        self._acks: List[Held] = []
        self._refused: List[Held] = []
        self._orphans: Dict[Key, Held] = {}
        self._recent: Deque[Tuple[float, Key]] = deque()
        self._doubtful: Dict[Key, float] = {}
        #: How many of the starts that were noted never were any: the line broke, and nobody ran them.
        self._void: Dict[Key, int] = {}
        #: Queues that were deleted under us.
        self._deleted: Set[str] = set()
        #: While it is worth while to ask for what runs here: since when, and how long the next pause is.
        self._seeking = False
        self._seek_mono = 0.0
        self._seek_pause_s = 1.0
        self._quick = False
        #: Since when nothing is wanted, and since when something waits here that came since the last poll.
        self._satisfied_mono = self._arrived_mono = 0.0
        self._opened_mono = 0.0
        #: How often in a row the server had messages and sent none.
        self._overdue = 0
        self._refusal = ""
        self._heard_mono = monotonic()
        self._timeout_told = False
        self._closed = False
        lasting = [queue for queue in self._queues.values() if not queue.auto_delete]
        self.notes: Optional[amqp_notes.Notes] = amqp_notes.Notes(self._wall) if lasting else None
        link.consumers.append(self)
        try:
            self._connected()
        except BaseException:
            self.close()
            raise

    # -- the connection

    def _connected(self) -> Channel:
        """Return the channel; make connection and channel anew where they were lost."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._connection = self._channel = None
        connection, channel = self._connection, self._live()
        if channel is not None:
            return channel
        if self._refusal:
            # Not again at once: whoever asks makes a pause.
            text, self._refusal = self._refusal, ""
            raise OperationalError(text)
        if connection is None or connection.broken:
            server = self._link.server
            timeout_s = self._link.options.connect_timeout * len(server.endpoints)
            new = server.connect(timeout_s, name=self.node, heartbeat=True)
            if connection is not None and connection is self._watched:
                # Its descriptor stays valid while somebody may watch it.
                self._retired.append(connection)
            elif connection is not None:
                connection.close()
            self._connection = connection = new
            self.moved = True
            if self.notes is not None:
                self.notes.attach(connection, partial(self._link.note, at_once=True))
        channel = connection.open_channel()
        try:
            for queue in self._queues.values():
                self._declare(channel, queue)
        except BaseException as error:
            channel.close()
            if isinstance(error, ImproperlyConfigured) and self._opened_mono:
                # It could be done before: this may pass, and must cost nobody his work.
                raise OperationalError(str(error)) from error
            raise
        channel.on_event = self._on_event
        self._channel = channel
        self._opened_mono = self._heard_mono = monotonic()
        self._deleted.clear()
        self.woken = True
        self._keep_used()
        return channel

    def _declare(self, channel: Channel, queue: Queue) -> None:
        declare_queue(channel, queue, self._deadline())
        self._link.waiting.bind(channel, queue, self._deadline())
        self._link.remember(queue)

    def _declare_again(self, channel: Channel) -> None:
        """Declare what was deleted under us."""
        while self._deleted:
            name = self._deleted.pop()
            if name in self._queues:
                self._declare(channel, self._queues[name])

    def _keep_used(self) -> None:
        """Consume at all times from queues that the server would delete otherwise."""
        for queue in self._queues.values():
            if queue.name not in self._subscriptions and goes_unused(queue) and self._channel is not None:
                self._consume(self._channel, queue, MOST_AHEAD if queue.auto_delete else 1)

    def _live(self) -> Optional[Channel]:
        """Return the channel, None where it is lost; it may have been closed in the middle of a call."""
        connection, channel = self._connection, self._channel
        if connection is None or channel is None:
            return None
        if channel.closed is not None:
            self._on_channel_closed(channel.closed)
            return None
        if connection.broken:
            self._lose()
            return None
        return channel

    def _deadline(self) -> float:
        return monotonic() + self._link.options.socket_timeout

    def _lose(self) -> None:
        """The channel is gone, and with it everything that was not acknowledged."""
        self._channel = None
        self._epoch += 1
        self._prefetch = -1
        for held in self._unsettled.values():
            if held.started:
                self._orphans[held.key] = held
            else:
                held.state = Held.GONE
        now_mono = monotonic()
        # Of two with one id nobody could tell which one comes again.
        twins = {held.key for held in self._unsettled.values()}
        for moment, key in self._recent:
            if moment > now_mono - DOUBT_S and key not in twins:
                self._doubtful[key] = now_mono
        self._recent.clear()
        self._seeking, self._seek_mono, self._seek_pause_s = bool(self._orphans), now_mono, 1.0
        for mapping in (self._unsettled, self._subscriptions, self._by_tag, self._ready):
            mapping.clear()
        self._later.clear()
        self._far.clear()
        self._far_mono = 0.0

    def fileno(self) -> Optional[int]:
        self._connected()
        assert self._connection is not None
        self.moved = False
        for connection in self._retired:
            connection.close()
        self._retired.clear()
        self._watched = self._connection
        return self._connection.fileno()

    def on_readable(self) -> None:
        self._read()

    def _read(self) -> None:
        connection = self._connection
        if connection is None or connection.broken or self._pid != os.getpid():
            return
        if connection.has_input():
            self._heard_mono = monotonic()
            connection.read_ready()

    def changed(self) -> bool:
        self._keep_alive()
        return self.woken or bool(self._later and self._later[0][0] <= self._wall())

    def _keep_alive(self) -> None:
        """Read what has come, say that we live, and ask a server that is silent whether it does."""
        self._connected()
        self._read()
        connection = self._connection
        assert connection is not None
        mono = monotonic()
        try:
            connection.keep_alive(mono)
            if mono - self._heard_mono >= SILENT_S:
                is_suspect = mono - self._link.dead_mono < SUSPECT_S
                self._ask(connection, SUSPECT_TIMEOUT_S if is_suspect else PROBE_TIMEOUT_S)
                self._heard_mono = monotonic()
        except OperationalError:
            self._link.suspect()
            raise

    def _ask(self, connection: Connection, timeout_s: float) -> None:
        """See that a silent server answers, and has nothing that it should have sent."""
        idle = [one for one in self._subscriptions.values() if one.window > one.out]
        channel = self._channel
        if self._satisfied_mono or channel is None or not idle:
            self._overdue = 0
            connection.probe(timeout_s)
            return
        queue = idle[0].queue
        if len(idle) > 1:
            self._turns += 1
            queue = idle[self._turns % len(idle)].queue
        try:
            reply = channel.call("queue.declare", timeout_s, queue=queue.name, passive=True)
        except ChannelError as error:
            raise OperationalError(str(error)) from error
        alone = "x-single-active-consumer" in (queue.queue_arguments or {}) or queue.consumer_arguments
        self._overdue = self._overdue + 1 if reply["message_count"] and not alone and not self.woken else 0
        if self._overdue >= MOST_OVERDUE:
            self._overdue = 0
            reason = f"queue {queue.name} holds {reply['message_count']} messages and the server sends none"
            logger.error("%s: %s; connecting anew", connection.url, reason)
            connection.break_off(reason)
            raise OperationalError(f"{connection.url}: {reason}")

    def next_due(self) -> Optional[float]:
        return self._later[0][0] if self._later else None

    def not_due(self, limit: int) -> List[Tuple[float, Delivery]]:
        """Those that are here; what waits in the server's queues nobody can look at."""
        return [(due, held.delivery) for due, _, held in heapq.nsmallest(limit, self._later)]

    # -- what the server says

    def _on_event(self, event: Any) -> None:
        if isinstance(event, Deliver):
            self._on_deliver(event)
        elif isinstance(event, Cancelled):
            subscription = self._by_tag.get(event.consumer_tag)
            if subscription is not None:
                name = subscription.queue.name
                logger.warning("queue %s was deleted, or its consumer was ended; it begins anew", name)
                if self._subscriptions.get(name) is subscription:
                    del self._subscriptions[name]
                self._link.declared.pop(name, None)
                # Not here: an answer may be waited for on this channel.
                self._deleted.add(name)
                self.woken = True
        elif isinstance(event, ChannelClosed):
            self._on_channel_closed(event)

    def _on_channel_closed(self, event: ChannelClosed) -> None:
        running = sum(held.started for held in self._unsettled.values())
        if "timeout" in event.text:
            if not self._timeout_told:
                self._timeout_told = True
                logger.warning(
                    "RabbitMQ closed the channel of this worker because a message was not acknowledged within"
                    " its consumer_timeout (%s). The %d tasks that run go on; their messages are taken up"
                    " again when RabbitMQ hands them out. Raise consumer_timeout in rabbitmq.conf above the"
                    " longest late-acked task: another worker may get such a message and run it as well.",
                    event.text, running,
                )  # fmt: skip
        else:
            text = "RabbitMQ closed the channel of this worker (%s %s); it is opened again"
            logger.warning(text, event.code, event.text)
        if monotonic() - self._opened_mono < 1.0:
            self._refusal = f"the server closes the channel at once: {event.code} {event.text}"
        self._lose()
        self.woken = True

    def _on_deliver(self, event: Deliver) -> None:
        subscription = self._by_tag.get(event.consumer_tag)
        if subscription is None:
            # Never to be passed over: an acknowledgement of many would include it.
            if self._channel is not None:
                self._channel.nack(event.delivery_tag, False, True)
            return
        subscription.out += 1
        held = self._open(event, subscription)
        self._unsettled[event.delivery_tag] = held
        if event.redelivered and self._came_back(held):
            return
        self.woken = True
        message = held.delivery.message
        now = self._wall()
        due = due_at(message, now) if message.headers.get("eta") is not None else now
        due = max(due, held.due)
        if event.redelivered and held.starts > 1 and not 0 < self.delivery_limit <= held.starts:
            # It may be what its workers died of.
            due = max(due, now + pause_after_loss_s(held.starts, self.random.random()))
        self._put(held, due, now)

    def _put(self, held: Held, due: float, now: float) -> None:
        """Sort in what came, by when it is due."""
        if due <= now:
            self._ready.setdefault(held.queue, deque()).append(held)
            self._arrived_mono = self._arrived_mono or monotonic()
        elif due - now <= self._hold_s and len(self._later) < MOST_HELD:
            held.due = due
            heapq.heappush(self._later, (due, held.tag, held))
        else:
            held.due = due
            self._far.append(held)

    def _open(self, event: Deliver, subscription: Subscription) -> Held:
        message = from_content(event.content)
        headers = message.headers
        marks = take_marks(headers)
        starts = counted = marks.starts
        name, retries = headers.get("id"), headers.get("retries")
        if type(name) is not str:
            # As in protocol 1, or from a stranger; without a name nothing is taken for it.
            name = message.properties.get("correlation_id") or os.urandom(8).hex()
        retries = retries if type(retries) is int else 0
        exchange, routing_key = event.exchange, event.routing_key
        if is_native(exchange):
            # How it was published is not known any more; so a retry goes to this queue.
            exchange, routing_key = "", subscription.queue.name
        delivery = Delivery(message, None, subscription.queue.name, exchange, routing_key)
        held = Held(self, event.delivery_tag, self._epoch, subscription, delivery)
        # What a task was replaced by has its id, be it one task or the last of a chain: another message.
        which = f"{marks.copy}/{headers.get('replaced_task_nesting') or 0}/{headers.get('parent_id') or ''}"
        held.key = (subscription.queue.name, name, retries, counted, which)
        held.due = marks.until
        if event.redelivered:
            if self.notes is not None and self.notes.starts:
                starts += max(self.notes.starts.get(held.key, 0) - self._void.get(held.key, 0), 0)
            # The first start was not noted, or there was none.
            starts += not counted and self.delivery_limit != 1
        held.starts = delivery.deliveries = starts
        delivery.redelivered = event.redelivered
        delivery.tag = held
        return held

    def _came_back(self, held: Held) -> bool:
        """Say whether a message that comes again is known here: it runs, or had ended already."""
        orphan = self._orphans.pop(held.key, None)
        if orphan is not None:
            logger.info("the message of task %s came again and joins its run", held.key[1])
            orphan.tag, orphan.epoch, orphan.subscription = held.tag, held.epoch, held.subscription
            self._unsettled[held.tag] = orphan
            if orphan.acked:
                self._acknowledge([orphan])
            return True
        if self._doubtful.pop(held.key, None) is not None:
            logger.info("the message of task %s came again after its end and is acknowledged", held.key[1])
            held.state = Held.GONE
            self._acknowledge([held])
            return True
        return False

    # -- taking

    @property
    def at_hand(self) -> int:
        return sum(map(len, self._ready.values()))

    def poll(self, limit: int) -> List[Delivery]:
        link = self._link
        link.step()
        if limit <= 0:
            return []
        mono = monotonic()
        if self._satisfied_mono:
            self._quick = mono - self._satisfied_mono < QUICK_S
            self._satisfied_mono = 0.0
        self._connected()
        if self.at_hand < limit:
            self._read()
        self.woken = False
        if self._far and (mono >= self._far_mono or len(self._far) > MOST_HELD):
            self._send_far()
        now = self._wall()
        while self._later and self._later[0][0] <= now:
            _, _, held = heapq.heappop(self._later)
            self._ready.setdefault(held.queue, deque()).append(held)
        found = self._choose(limit)
        self._arrived_mono = 0.0
        self._subscribe(limit - len(found), limit)
        for held in found:
            held.handed_out = True
            link.take(held)
        return [self._told(held) for held in found]

    def _choose(self, limit: int) -> List[Held]:
        """Take what is next: the highest priority, and by turns where that is equal."""
        found: List[Held] = []
        names = [name for name, waiting in self._ready.items() if waiting]
        if len(names) > 1 and self._last_queue in names:
            at = names.index(self._last_queue) + 1
            names = names[at:] + names[:at]
        queues = [self._ready[name] for name in names]
        while len(queues) > 1 and len(found) < limit:
            # The first of those whose head has the highest priority.
            at = max(range(len(queues)), key=lambda at: queues[at][0].delivery.message.priority)
            waiting = queues.pop(at)
            found.append(waiting.popleft())
            if waiting:
                queues.append(waiting)
        for waiting in queues:
            while waiting and len(found) < limit:
                found.append(waiting.popleft())
        if found:
            self._last_queue = found[-1].queue
        return found

    def _told(self, held: Held) -> Delivery:
        delivery = held.delivery
        notes = self.notes
        if notes is not None and notes.is_revoked(held.key[1]):
            delivery.fate = delivery.fate or "revoked"
        elif delivery.fate == "revoked":
            delivery.fate = None
        if delivery.fate is None and self.delivery_limit and delivery.deliveries >= self.delivery_limit:
            delivery.fate = "lost"
        return delivery

    def _subscribe(self, wanted: int, limit: int) -> None:
        """Be a consumer for as many messages as are wanted, or for none."""
        sought = 0
        if self._seeking:
            # No more than that ahead: another worker may have them, and others could run what comes instead.
            sought = max(len(self._orphans) - sum(map(len, self._ready.values())), 0)
        if wanted <= 0:
            self._satisfied_mono = monotonic()
            if not sought:
                if not self._quick:
                    self._unsubscribe()
                return
        window = needed = max(wanted, 0) + sought
        if self._quick or self._far:
            window = min(max(LEAST_AHEAD, 4 * limit), MOST_AHEAD) + sought
        channel = self._connected()
        self._declare_again(channel)
        for queue in self._queues.values():
            known = self._subscriptions.get(queue.name)
            if known is None or known.window - known.out < needed:
                self._consume(channel, queue, window)

    def _consume(self, channel: Channel, queue: Queue, window: int) -> None:
        """Subscribe, in the place of an older subscription."""
        old = self._subscriptions.pop(queue.name, None)
        try:
            if old is not None and not old.lasts:
                self._cancel(channel, old)
            if self._prefetch != window:
                channel.call("basic.qos", prefetch_count=window)
                self._prefetch = window
            self._made += 1
            new = Subscription(queue, f"{self._made}", window, goes_unused(queue))
            self._subscriptions[queue.name] = self._by_tag[new.tag] = new
            channel.send(
                "basic.consume",
                queue=queue.name,
                consumer_tag=new.tag,
                arguments=dict(queue.consumer_arguments or {}),
                nowait=True,
            )
            if old is not None and old.lasts:
                self._cancel(channel, old)
        except ChannelError as error:
            # It was declared a moment ago: this may pass.
            raise OperationalError(f"queue {queue.name!r}: {error}") from error
        if len(self._by_tag) > 1000:
            recent = list(self._by_tag)[-100:]
            self._by_tag = {tag: one for tag, one in self._by_tag.items() if one.out or tag in recent}
        self._flush()

    def _unsubscribe(self) -> None:
        channel = self._live()
        if channel is not None:
            for name, subscription in list(self._subscriptions.items()):
                if not subscription.lasts:
                    self._cancel(channel, subscription)
                    del self._subscriptions[name]

    @staticmethod
    def _cancel(channel: Channel, subscription: Subscription) -> None:
        channel.send("basic.cancel", consumer_tag=subscription.tag, nowait=True)

    def _send_far(self) -> None:
        """Let what is not due for long wait in the server."""
        link = self._link
        far, self._far = self._far, []
        sent: List[Message] = []
        try:
            # A message that only came again was perhaps not started; of more than that there are notes.
            copies = [
                link.copy_until(held.delivery, held.due, held.starts if held.starts > 1 else held.key[3])
                for held in far
            ]
            link.send_now(copies, sent)
            sent = [held.delivery.message for held in far]
        except MiniqError as error:
            known = set(map(id, sent))
            left = [held for held in far if id(held.delivery.message) not in known]
            if isinstance(error, OperationalError):
                logger.warning("%d messages that are not due yet cannot be put off: %s", len(left), error)
                self._far = left
                # While the server takes nothing, each try costs the time that a run's end could have.
                self._far_mono = monotonic() + FAR_PAUSE_S
            else:
                logger.error("%d messages that are not due yet wait in this worker: %s", len(left), error)
                for held in left:
                    heapq.heappush(self._later, (held.due, held.tag, held))
            far = [held for held in far if id(held.delivery.message) in known]
        for held in far:
            held.state = Held.GONE
        self._acknowledge(far)

    # -- settling

    def start(self, deliveries: Sequence[Delivery]) -> None:
        gone = [d for d in deliveries if not self._has(d.tag) or d.tag.epoch != self._epoch]
        if gone:
            raise NotOurs(gone)
        takes_notes = self.notes is not None and self.notes.enabled
        marks = []
        for delivery in deliveries:
            held: Held = delivery.tag
            held.started = True
            held.starts += 1
            held.noted = False
            if delivery.early:
                held.acked = True
                self._acks.append(held)
            elif takes_notes and (delivery.redelivered or delivery.deliveries or self.delivery_limit == 1):
                held.noted = True
                marks.append(held.key)
        if marks:
            self._link.note(amqp_notes.started(marks))
        self._link.begin([delivery.tag for delivery in deliveries])

    @staticmethod
    def _has(held: Held) -> bool:
        """Say whether the worker has it."""
        return held.state == Held.HERE and held.handed_out

    def ack(self, delivery: Delivery) -> bool:
        held: Held = delivery.tag
        if not self._has(held):
            return held.doubted
        self._end(held)
        return True

    def _end(self, held: Held) -> None:
        """Acknowledge at the next step, if that is not done."""
        held.state = Held.ENDING
        if not held.acked:
            self._acks.append(held)
        self._link.touch(held)

    def reject(self, delivery: Delivery, requeue: bool, reason: str = "rejected") -> bool:
        held: Held = delivery.tag
        if not self._has(held):
            return held.doubted
        if requeue:
            starts = min(held.starts, max(self.delivery_limit - 1, 0)) if self.delivery_limit else held.starts
            self._link.publish_copies([self._link.copy(delivery, starts)])
            self._end(held)
            return True
        arguments = held.subscription.queue.queue_arguments or {}
        if "x-dead-letter-exchange" in arguments and not held.acked and held.epoch == self._epoch:
            # Whoever declared the queue so wants to have it there.
            held.state = Held.ENDING
            self._refused.append(held)
            self._link.touch(held)
            return True
        return self.dead_letter(delivery, reason)

    def release(self, deliveries: Sequence[Delivery]) -> None:
        marks = []
        for delivery in reversed(deliveries):
            held: Held = delivery.tag
            if not self._has(held):
                continue  # a turn that failed has released it before
            if held.started:
                held.started = False
                held.starts -= 1
                if held.noted:
                    marks.append(held.key)
            if held.acked:
                self._link.publish_copies([self._link.copy(delivery, held.starts)])
                self._end(held)
            elif held.epoch == self._epoch:
                delivery.deliveries = held.starts
                self._wait_again(held)
                self._satisfied_mono = self._satisfied_mono or monotonic()
            else:
                self._forget_orphan(held)
        if marks:
            self._link.note(amqp_notes.released(marks))

    def _wait_again(self, held: Held) -> None:
        """Let it wait here, in its old place: the server sent them in their order."""
        held.handed_out = False
        waiting = self._ready.setdefault(held.queue, deque())
        at = 0
        while at < len(waiting) and waiting[at].tag < held.tag:
            at += 1
        waiting.insert(at, held)
        self.woken = True

    def defer(self, delivery: Delivery, until: float) -> bool:
        held: Held = delivery.tag
        if not self._has(held):
            # Or a turn that failed has done it before.
            return held.doubted or held.state == Held.HERE
        now = self._wall()
        if held.acked or until - now > self._hold_s or len(self._later) >= MOST_HELD:
            self._link.publish_copies([self._link.copy_until(delivery, until, held.starts)])
            self._end(held)
        elif held.epoch != self._epoch:
            self._forget_orphan(held)
        else:
            held.started = held.handed_out = False
            delivery.deliveries = held.starts
            self._put(held, until, now)
            self.woken = self.woken or until <= now
        return True

    def dead_letter(self, delivery: Delivery, reason: str) -> bool:
        held: Held = delivery.tag
        if not self._has(held):
            return held.doubted
        self._link.publish_dead(delivery, reason, held.starts)
        self._end(held)
        return True

    def _forget_orphan(self, held: Held) -> None:
        """The server has it back already."""
        held.state = Held.GONE
        self._orphans.pop(held.key, None)

    # -- steps of the transport

    def settle(self) -> None:
        """Tell the server what has ended or started early, in one write."""
        if self._acks:
            acks, self._acks = self._acks, []
            self._acknowledge(acks)
        if self._refused:
            refused_ones, self._refused = self._refused, []
            for held in refused_ones:
                if self._live() is None or not self._is_open(held):
                    # It comes again, and must not be taken for one that still runs.
                    self._orphans.pop(held.key, None)
                elif self._channel is not None:
                    self._channel.reject(held.tag, False)
        self._flush()

    def _is_open(self, held: Held) -> bool:
        """Take it off what is not acknowledged; say whether it was there."""
        if held.epoch != self._epoch or self._unsettled.pop(held.tag, None) is None:
            return False
        held.subscription.out -= 1
        return True

    def _acknowledge(self, helds: List[Held]) -> None:
        """Acknowledge with the next write.

        Should the server not get that, and hand them out here again, they are known.
        """
        channel = self._live()
        now_mono = monotonic()
        tags = []
        for held in helds:
            if self._is_open(held):
                tags.append(held.tag)
                self._recent.append((now_mono, held.key))
            else:
                # Its channel is lost.
                self._orphans.pop(held.key, None)
                self._doubtful[held.key] = now_mono
        recent = self._recent
        while recent and (recent[0][0] < now_mono - DOUBT_S or len(recent) > MOST_DOUBTED):
            recent.popleft()
        if not tags or channel is None:
            return
        tags.sort()
        # All before the first one that stays, in one.
        first_open = next(iter(self._unsettled), None)
        before = tags if first_open is None else [tag for tag in tags if tag < first_open]
        if len(before) > 1:
            channel.ack(before[-1], True)
            tags = tags[len(before) :]
        for tag in tags:
            channel.ack(tag, False)

    def _flush(self) -> None:
        if self._connection is not None and not self._connection.broken:
            self._connection.flush()

    def undo(self) -> None:
        """The transaction failed: nothing is told to the server that was not told yet."""
        for held in self._acks:
            if held.state == Held.HERE:
                held.acked = False
        self._acks.clear()
        self._refused.clear()

    def unstart(self, held: Held) -> None:
        """Nobody will run it."""
        if self._has(held) and held.started:
            held.started = False
            held.starts -= 1
            if held.noted:
                held.noted = False
                self._void[held.key] = self._void.pop(held.key, 0) + 1
                while len(self._void) > MOST_DOUBTED:
                    del self._void[next(iter(self._void))]
            if held.acked:
                # The line broke when that was told: it will come again, and then it is to run.
                self._recent = deque(one for one in self._recent if one[1] != held.key)
                self._doubtful.pop(held.key, None)
                self._forget_orphan(held)

    def put_back(self, held: Held) -> None:
        """Nobody will hear that it was taken."""
        self.unstart(held)
        if self._has(held):
            if held.epoch == self._epoch:
                held.starts = held.delivery.deliveries
                self._wait_again(held)
            else:
                self._forget_orphan(held)

    # -- upkeep

    def housekeep(self) -> None:
        self._keep_alive()
        if self._deleted:
            self._declare_again(self._connected())
            self._keep_used()
        if self.notes is not None and self.notes.is_lost and self._connection is not None:
            self._link.forget_notes()
            self.notes.attach(self._connection, partial(self._link.note, at_once=True))
        mono = monotonic()
        idle_since = self._satisfied_mono or self._arrived_mono
        if idle_since and mono - idle_since > LINGER_S:
            self._quick = self._seeking = False
            self._unsubscribe()
            self._give_back_ahead()
        if self._orphans and mono >= self._seek_mono:
            # Their messages are at the head of their queues, unless another worker has them.
            self._seeking = True
            self._seek_mono, self._seek_pause_s = mono + self._seek_pause_s, min(2 * self._seek_pause_s, 60.0)
            if self._satisfied_mono:
                self._subscribe(0, 1)
        if self._far and mono >= self._far_mono:
            self._send_far()
        for key in [key for key, since in self._doubtful.items() if mono - since > DOUBTED_S]:
            del self._doubtful[key]
        while len(self._doubtful) > MOST_DOUBTED:
            del self._doubtful[next(iter(self._doubtful))]
        self._flush()

    def _give_back_ahead(self) -> None:
        """Let others have what came ahead and is not wanted."""
        for name, waiting in self._ready.items():
            # From where we have to consume they would only come again.
            if name not in self._subscriptions:
                self._give_back(waiting)
        self._arrived_mono = 0.0

    def _give_back(self, waiting: Deque[Held]) -> None:
        """Give back to their places; the first one first, as another may get it at once."""
        channel = self._live()
        while waiting:
            held = waiting.popleft()
            held.state = Held.GONE
            if self._is_open(held) and channel is not None:
                channel.nack(held.tag, False, True)

    # -- queues

    @property
    def queue_names(self) -> List[str]:
        """The queues this consumer takes from."""
        return list(self._queues)

    def add_queue(self, queue: Queue) -> None:
        self._declare(self._connected(), queue)
        self._queues[queue.name] = queue
        self._keep_used()
        self.woken = True

    def cancel_queue(self, name: str) -> None:
        if self._queues.pop(name, None) is None:
            return
        channel = self._live()
        subscription = self._subscriptions.pop(name, None)
        if subscription is not None and channel is not None:
            self._cancel(channel, subscription)
        self._give_back(self._ready.pop(name, deque()))
        self._flush()

    def drop_connection(self) -> None:
        """Let the line break, as when the process dies."""
        if self._connection is not None:
            self._connection.break_off("it was dropped")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._link.consumers.remove(self)
        for connection in self._retired:
            connection.close()
        if self._connection is not None and self._pid == os.getpid():
            self._connection.close()
        for held in self._unsettled.values():
            held.state = Held.GONE
        self._unsettled.clear()
        self._channel = None

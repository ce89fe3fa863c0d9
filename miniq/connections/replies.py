# SPDX-License-Identifier: MIT
"""The reply queue of this process: one queue and one connection for all threads that wait for replies.

There is no thread of its own.  Of the threads that wait, one at a time is the *reader*, who alone
uses the connection; the others sleep, each at its own gate, and whoever stops reading wakes the next.
The queue is consumed from only while somebody waits: what nobody waits for stays at the server until
its time is over.  Replies that come while somebody waits for others are kept here (`Kept`), within a
bound of bytes.

They are acknowledged once they are here, so that what was on its way when a connection breaks comes
again.  After any doubt, Ctrl-C in the middle of a step included, the reader drops the connection and
begins anew; the queue outlives it.

Source: AMQP 0-9-1; RabbitMQ's queue length, TTL and lease arguments.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import random
import select
import threading
from collections import deque
from operator import attrgetter
from time import monotonic, sleep
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Generic,
    Hashable,
    Iterable,
    List,
    Optional,
    Tuple,
    Union,
)

from ..codecs.amqp import Cancelled, ChannelClosed, Content, Deliver, GetOk
from ..exceptions import ImproperlyConfigured, MiniqError, OperationalError
from ..states import READY_STATES
from .amqp import Channel, ChannelError, Connection, Server
from .kept import MAX_BYTES, Kept, R

logger = logging.getLogger(__name__)

#: Replies on their way that the server need not hear back about.
PREFETCH = 500
#: More than so many are not fetched one by one: each is a round trip.
MANY = 50
#: Who is brought many has them all when nothing came for so long; whether it is so, is asked then.
QUIET_S = 0.05
#: The queue is declared again when a call is made so long after the last time.
RENEW_S = 30.0
#: The longest that a server keeps a queue nobody uses, in milliseconds.
MAX_LEASE_MS = 2**32 - 1
#: Nothing heard for so long: ask whether anybody is there.
SILENCE_S = 10.0
#: An answer may take so long, and the one to a question asked just before a deadline so long beyond it.
ANSWER_S = 5.0
GRACE_S = 0.5
#: Connecting may take so long, and a failed attempt is followed by a pause of at most so long.
CONNECT_S = 4.0
MAX_PAUSE_S = 2.0
#: Who waits bears with a server that was there and cannot be reached for so long.
PATIENCE_S = 60.0
#: Deleting the queue when the process ends may take so long.
GOODBYE_S = 1.0

_TAG = "miniq-results"


class Waiter(Generic[R]):
    """Somebody who waits for replies, up to `deadline_mono`; for one `Replies.join`.

    Only final states are told, with `unready` the others too.
    """

    __slots__ = ("task_ids", "deadline_mono", "_unready", "_box", "_gate")

    def __init__(self, task_ids: Iterable[str], deadline_mono: float, unready: bool = False) -> None:
        self.task_ids = dict.fromkeys(task_ids)
        self.deadline_mono = deadline_mono
        self._unready = unready
        #: The last of each task; in the order they came.
        self._box: Dict[str, R] = {}
        #: Held; released to wake who sleeps at it.
        self._gate = threading.Lock()
        self._gate.acquire()

    def take(self) -> List[R]:
        """Return what has come."""
        found, self._box = self._box, {}
        return list(found.values())

    def _put(self, reply: R) -> bool:
        if not self._unready and reply.state not in READY_STATES:
            return False
        self._box.pop(reply.task_id, None)
        self._box[reply.task_id] = reply
        return True


class Replies(Generic[R]):
    """The replies to one address of this process, for any number of threads.  Get it with `of`.

    `read` makes a reply of a message, or None of one that is none.  All methods raise
    `OperationalError`, and `ImproperlyConfigured` where the server will not have us.  In a forked child
    the parent's raises: the replies go to the parent.
    """

    def __init__(
        self, server: Server, queue: str, kept_s: Optional[float], read: Callable[[Content], Optional[R]]
    ) -> None:
        self._server = server
        self._queue = queue
        self._kept_s = kept_s
        self._read_reply = read
        self._pid = os.getpid()
        self._made_mono = -math.inf
        # Guards all down to the blank line.  Held for moments, never while the connection is used.
        self._lock = threading.Lock()
        self._kept: Kept[R] = Kept(math.inf if kept_s is None else kept_s)
        self._told_of_drops = False
        self._wanted: Dict[str, List[Waiter[R]]] = {}
        self._sleepers: Dict[Waiter[R], None] = {}
        self._reader: Optional[object] = None
        # A generator may be finalized wherever its thread happens to be, inside of the lock too: who
        # leaves is put here, and removed by whoever has the lock.
        self._left: Deque[Waiter[R]] = deque()

        # The reader's alone.
        self._connection: Optional[Connection] = None
        self._channel: Optional[Channel] = None
        self._poll: Any = None
        self._consuming = False
        # Whether something may be on its way to a consumer that is no more.
        self._in_flight = False
        self._got: List[Union[Deliver, GetOk]] = []
        self._unacked = 0
        self._gone = ""
        self._heard_mono = 0.0
        self._failures = 0
        self._retry_mono = 0.0
        self._lost_mono: Optional[float] = None

    @classmethod
    def of(
        cls, server: Server, queue: str, kept_s: Optional[float], read: Callable[[Content], Optional[R]]
    ) -> "Replies[R]":
        """Return this process' replies to the address `queue`, which the server keeps for `kept_s`."""
        key = (os.getpid(), server.key, queue)
        found = _replies.get(key)
        if found is None:
            _end_at_exit()
            found = _replies.setdefault(key, cls(server, queue, kept_s, read))
        return found

    # -- the queue

    @property
    def is_made(self) -> bool:
        """Whether the queue was ever declared: if not, nothing can have come."""
        return self._made_mono > -math.inf

    def make(self, timeout_s: float) -> None:
        """See that the queue exists, before somebody is told to reply to it."""
        renew_s = RENEW_S if self._kept_s is None else min(RENEW_S, self._kept_s / 4)
        if monotonic() - self._made_mono < renew_s:
            return
        try:
            with self._server.borrow(timeout_s) as connection:
                self._declare(connection.publisher(timeout_s), timeout_s)
        except ChannelError as error:
            raise self._translated(error) from error

    def _declare(self, channel: Channel, timeout_s: float) -> None:
        kept_ms = None if self._kept_s is None else max(1, min(int(self._kept_s * 1000), MAX_LEASE_MS))
        arguments = {"x-expires": MAX_LEASE_MS if kept_ms is None else kept_ms}
        if kept_ms is not None:
            arguments["x-message-ttl"] = kept_ms
        channel.call(
            "queue.declare", timeout_s=timeout_s, queue=self._queue, durable=True, arguments=arguments
        )
        self._made_mono = monotonic()

    def _translated(self, error: Union[OperationalError, ChannelError]) -> MiniqError:
        if isinstance(error, OperationalError):
            return error
        text = f"reply queue {self._queue!r}: {error}"
        if error.code == 403:
            return ImproperlyConfigured(
                f"{text}; results over rpc:// need the permission to configure, write and read queues whose"
                " names are UUIDs, as the calls' reply_to"
            )
        return OperationalError(text)

    # -- for those who ask

    def look(self, timeout_s: float) -> None:
        """Take what has come; where somebody reads anyway, that is done already."""
        self._check_process()
        deadline_mono = monotonic() + timeout_s
        token = object()
        try:
            if self._is_reader_after_all(token, deadline_mono):
                self._look(deadline_mono)
        finally:
            self._step_down(token)

    def _is_reader_after_all(self, token: object, deadline_mono: float) -> bool:
        """Become the reader; False where somebody who waits is, and so takes all that comes."""
        while not self._take_reading(token):
            if self._lost_mono is not None or monotonic() >= deadline_mono:
                raise OperationalError(f"{self._server.url}: the connection is lost, and is being made anew")
            if isinstance(self._reader, Waiter):
                return False
            sleep(0.001)  # somebody who looks, or has waited
        return True

    def _look(self, deadline_mono: float) -> None:
        """Drain the queue, over a new connection where the old one had died."""
        try:
            if self._channel is not None:
                try:
                    self._drain(deadline_mono)
                    return
                except (OperationalError, ChannelError) as error:
                    logger.debug("the connection for results had died: %s", error)
                    self._drop()
            self._connect(deadline_mono)
            self._drain(deadline_mono)
        except ChannelError as error:
            self._drop()
            raise self._translated(error) from error
        except BaseException:
            self._drop()
            raise

    def known(self, task_ids: Iterable[str]) -> List[R]:
        """Return what has come for these."""
        self._check_process()
        mono = monotonic()
        found: List[R] = []
        with self._lock:
            for task_id in task_ids:
                reply = self._kept.get(task_id, mono)
                if reply is not None:
                    found.append(reply)
                    self._kept.tell(task_id)
        self._remove_left()
        return found

    def forget(self, task_ids: Iterable[str]) -> None:
        """Drop what has come for these."""
        self._check_process()
        with self._lock:
            for task_id in task_ids:
                self._kept.drop(task_id)
        self._remove_left()

    # -- for those who wait

    def join(self, waiter: Waiter[R]) -> None:
        """Put what has come already into the waiter's hands, and from now on what comes; later `leave`."""
        self._check_process()
        mono = monotonic()
        with self._lock:
            for task_id in waiter.task_ids:
                self._wanted.setdefault(task_id, []).append(waiter)
                reply = self._kept.get(task_id, mono)
                if reply is not None and waiter._put(reply):
                    self._kept.tell(task_id)
        self._remove_left()

    def listen(self, waiter: Waiter[R], until_mono: float) -> None:
        """Return when there is something to `take`, or at `until_mono`."""
        try:
            while True:
                self._check_process()
                with self._lock:
                    if waiter._box:
                        return
                    if self._reader is None:
                        self._reader = waiter
                        break
                    self._sleepers[waiter] = None
                self._remove_left()
                if not self._sleep_at_gate(waiter, until_mono):
                    return
            self._read(waiter, until_mono)
        finally:
            self._step_down(waiter)

    def _sleep_at_gate(self, waiter: Waiter[R], until_mono: float) -> bool:
        """Sleep until woken; False when the time is over."""
        woken = False
        try:
            left_s = until_mono - monotonic()
            woken = left_s > 0 and waiter._gate.acquire(True, min(left_s, threading.TIMEOUT_MAX))
        finally:
            with self._lock:
                if self._sleepers.pop(waiter, waiter) is waiter and not woken:
                    # Woken all the same, too late: the gate is open and has to be shut.
                    waiter._gate.acquire(False)
                if not woken:
                    self._wake_reader()
        return woken

    def leave(self, waiter: Waiter[R]) -> None:
        """Wait no more; may be called from a finalizer, and after a fork."""
        if self._pid == os.getpid():
            self._left.append(waiter)
            self._remove_left()

    def close_idle(self) -> None:
        """Close the connection if nobody waits."""
        if self._connection is None or self._wanted or self._pid != os.getpid():
            return
        token = object()
        try:
            if self._take_reading(token) and not self._wanted:
                self._drop()
        finally:
            self._step_down(token)

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise OperationalError(
                f"results of calls that process {self._pid} made come to that process, and cannot be read in"
                f" {os.getpid()}, which was forked from it"
            )

    # -- who reads

    def _take_reading(self, token: object, waits: bool = True) -> bool:
        """Become the reader, if nobody is; without `waits`, if the lock is free as well."""
        if not self._lock.acquire(waits):
            return False
        try:
            if self._reader is None:
                self._reader = token
            return self._reader is token
        finally:
            self._lock.release()

    def _step_down(self, token: object) -> None:
        """Be the reader no more, if `token` was: wherever an exception struck, it is known here."""
        if self._reader is token:
            with self._lock:
                self._reader = None
                self._wake_reader()
            self._remove_left()

    def _wake_reader(self) -> None:
        """Have another one read on, if nobody does.  Under the lock."""
        if self._reader is None and self._sleepers:
            self._wake(next(iter(self._sleepers)))

    def _wake(self, waiter: Waiter[R]) -> None:
        """Under the lock."""
        if waiter in self._sleepers:
            del self._sleepers[waiter]
            waiter._gate.release()

    def _remove_left(self) -> None:
        """Remove those who have left; with the last one, stop consuming.

        Whoever has the lock instead calls this once it was released, so nobody is forgotten.
        """
        while self._left and self._lock.acquire(False):
            try:
                while self._left:
                    self._remove(self._left.popleft())
                self._wake_reader()
            finally:
                self._lock.release()
        if self._consuming and not self._wanted and self._reader is None:
            token = object()
            try:
                if self._take_reading(token, False) and not self._wanted:
                    self._cancel()
            finally:
                self._step_down(token)

    def _remove(self, waiter: Waiter[R]) -> None:
        """Under the lock."""
        for task_id in waiter.task_ids:
            others = self._wanted.get(task_id, [])
            if waiter in others:
                others.remove(waiter)
                if not others:
                    del self._wanted[task_id]
        self._sleepers.pop(waiter, None)
        if self._reader is waiter:
            self._reader = None

    # -- the reader

    def _read(self, waiter: Waiter[R], until_mono: float) -> None:
        """Read for all until there is something for `waiter`."""
        while True:
            mono = monotonic()
            if self._channel is None:
                if mono >= until_mono:
                    return
                if self._retry_mono > mono:
                    sleep(min(self._retry_mono, until_mono) - mono)
                    continue
                self._guarded(lambda: self._connect(waiter.deadline_mono))
            else:
                self._guarded(lambda: self._step(waiter.deadline_mono))
                if waiter._box or mono >= until_mono:
                    return
                if self._channel is not None:
                    self._guarded(lambda: self._sleep(until_mono))

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do something with the connection; drop that, and try again later, where it is lost.

        Raises at once where the server never could be reached, else after PATIENCE_S.
        """
        try:
            work()
        except (OperationalError, ChannelError) as failure:
            error = self._translated(failure)
            self._lost(error)
            if not self.is_made or monotonic() - (self._lost_mono or 0.0) > PATIENCE_S:
                raise error from failure
        except BaseException:
            # Half a command may be sent, half the messages handed out.
            self._drop()
            raise

    def _step(self, deadline_mono: float) -> None:
        """Hand out what has come; see that there is a consumer, and a server."""
        connection, channel = self._connection, self._channel
        assert connection is not None and channel is not None
        mono = monotonic()
        try:
            if mono - self._heard_mono > SILENCE_S:
                connection.probe(min(ANSWER_S, max(deadline_mono - mono, GRACE_S)))
                self._heard_mono = mono
            connection.read_ready()
            if self._gone:
                raise OperationalError(self._gone)
        except OperationalError as error:
            if self._consuming:
                raise
            logger.debug("the connection for results had died while nobody waited: %s", error)
            self._drop()
            return
        finally:
            self._hand_out()
        if not self._consuming:
            self._consume(channel)

    def _sleep(self, until_mono: float) -> None:
        """Wait for news, not longer than until it is time to ask or to give up."""
        connection = self._connection
        assert connection is not None
        self._acknowledge()
        connection.flush(monotonic() + ANSWER_S)
        if connection.has_input():
            return
        left_s = max(0.0, min(until_mono, self._heard_mono + SILENCE_S) - monotonic())
        if self._poll is not None:
            # Rounded up, or the last millisecond would be spent in a circle.
            self._poll.poll(left_s * 1000 + 1)
        else:
            select.select([connection.fileno()], [], [], left_s)

    def _drain(self, deadline_mono: float) -> None:
        """Take one reply after the other out of the queue, until it is empty."""
        connection, channel = self._connection, self._channel
        assert connection is not None and channel is not None
        again = self._in_flight
        try:
            while monotonic() < deadline_mono:
                found = channel.get(self._queue, timeout_s=deadline_mono - monotonic())
                if found is not None:
                    self._got.append(found)
                    if found.message_count > MANY:
                        self._be_brought(found.message_count, deadline_mono)
                        again = True
                        continue
                if found is None or not found.message_count:
                    if not again:
                        self._in_flight = self._consuming
                        break
                    # What was on its way to a consumer comes before the second answer.
                    again = False
        finally:
            self._hand_out()
        if self._gone:
            raise OperationalError(self._gone)
        self._acknowledge()
        connection.flush(monotonic() + ANSWER_S)

    def _be_brought(self, count: int, deadline_mono: float) -> None:
        """Consume for as long as it takes to get about so many replies."""
        connection, channel, consuming = self._connection, self._channel, self._consuming
        assert connection is not None and channel is not None
        if not consuming:
            self._consume(channel)
        quiet = False
        while count > 0 and not quiet and monotonic() < deadline_mono:
            self._sleep(min(deadline_mono, monotonic() + QUIET_S))
            connection.read_ready()
            quiet = not self._got
            count -= len(self._got)
            self._hand_out()
        if not consuming:
            self._stop_consuming(channel)

    def _consume(self, channel: Channel) -> None:
        channel.send("basic.consume", queue=self._queue, consumer_tag=_TAG, nowait=True)
        self._consuming = self._in_flight = True

    def _stop_consuming(self, channel: Channel) -> None:
        """What is on its way already is taken later."""
        self._acknowledge()
        channel.send("basic.cancel", consumer_tag=_TAG, nowait=True)
        self._consuming = False

    def _on_event(self, event: Any) -> None:
        if isinstance(event, Deliver):
            self._got.append(event)
        elif isinstance(event, ChannelClosed):
            self._gone = f"{self._server.url}: the server closed the channel: {event.code} {event.text}"
        elif isinstance(event, Cancelled):
            self._gone = f"{self._server.url}: the reply queue {self._queue!r} was deleted"

    def _hand_out(self) -> None:
        got, self._got = self._got, []
        if not got:
            return
        mono = self._heard_mono = monotonic()
        self._recovered()
        got.sort(key=_tag_of)  # one that was asked for may be behind others that came later
        self._unacked = got[-1].delivery_tag
        replies = [reply for reply in map(self._read_reply, [event.content for event in got]) if reply]
        with self._lock:
            for reply in replies:
                if self._kept.put(reply, mono):
                    waiters = [waiter for waiter in self._wanted.get(reply.task_id, ()) if waiter._put(reply)]
                    if waiters:
                        self._kept.tell(reply.task_id)
                        for waiter in waiters:
                            self._wake(waiter)
            too_many = self._kept.dropped > 0 and not self._told_of_drops
            if too_many:
                self._told_of_drops = True
        if too_many:
            logger.warning(
                "more than %d MB of results have come that nobody asked for: the oldest are dropped, and"
                " cannot be had any more; ask for results in the order of the calls, set ignore_result where"
                " nobody asks, or use another result backend", MAX_BYTES // 1024 // 1024,
            )  # fmt: skip
        self._remove_left()

    def _acknowledge(self) -> None:
        """Tell the server, with what is sent next, that the replies are here."""
        if self._unacked and self._channel is not None:
            self._channel.ack(self._unacked, multiple=True)
        self._unacked = 0

    def _cancel(self) -> None:
        """Stop consuming, nobody waits any more."""
        if self._channel is None or self._connection is None:
            return
        try:
            self._stop_consuming(self._channel)
            self._connection.flush(monotonic() + ANSWER_S)
        except (OperationalError, ChannelError) as error:
            logger.debug("the connection for results is dropped: %s", error)
            self._drop()
        except BaseException:
            self._drop()
            raise

    # -- the connection

    def _connect(self, deadline_mono: float) -> None:
        timeout_s = min(CONNECT_S, max(deadline_mono - monotonic(), GRACE_S))
        until_mono = monotonic() + timeout_s
        connection = self._server.connect(timeout_s, name="miniq-results")
        self._connection = connection
        channel = connection.open_channel(until_mono - monotonic())
        channel.on_event = self._on_event
        self._declare(channel, until_mono - monotonic())
        channel.call("basic.qos", timeout_s=until_mono - monotonic(), prefetch_count=PREFETCH)
        self._channel = channel
        self._heard_mono = monotonic()
        self._recovered()
        if hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(connection.fileno(), select.POLLIN)

    def _lost(self, error: MiniqError) -> None:
        """Drop the connection; try again after a pause that grows with the failures, and differs."""
        mono = monotonic()
        self._drop()
        if self._lost_mono is None:
            self._lost_mono = mono
            logger.warning("no news of results, trying again: %s", error)
        self._retry_mono = mono + random.uniform(0.5, 1.0) * min(MAX_PAUSE_S, 0.05 * 2**self._failures)
        self._failures = min(self._failures + 1, 10)

    def _recovered(self) -> None:
        self._failures = 0
        if self._lost_mono is not None:
            logger.info("news of results again, after %.1f s", monotonic() - self._lost_mono)
            self._lost_mono = None

    def _drop(self) -> None:
        connection, self._connection, self._channel, self._poll = self._connection, None, None, None
        self._consuming = self._in_flight = False
        self._got, self._unacked, self._gone = [], 0, ""
        if connection is not None:
            connection.close()

    # -- the end

    def delete(self, timeout_s: float) -> None:
        """Delete the queue: nobody else can use it."""
        if not self.is_made or self._pid != os.getpid():
            return
        self._made_mono = -math.inf
        try:
            with self._server.borrow(timeout_s) as connection:
                connection.publisher(timeout_s).call("queue.delete", timeout_s=timeout_s, queue=self._queue)
        except (MiniqError, ChannelError) as error:
            logger.debug("reply queue %r is left to expire: %s", self._queue, error)


_tag_of = attrgetter("delivery_tag")
#: (process, server, queue) -> its replies; those of a parent process are kept, so that nothing closes them.
_replies: Dict[Tuple[int, Hashable, str], Replies[Any]] = {}
_hooked = False


def _end_at_exit() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        atexit.register(delete_all)


def delete_all() -> None:
    """Close the connections of this process that nobody reads from, and delete its reply queues."""
    pid = os.getpid()
    for key, replies in list(_replies.items()):
        if key[0] == pid:
            replies.close_idle()
            replies.delete(GOODBYE_S)

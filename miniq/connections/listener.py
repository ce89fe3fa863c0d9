# SPDX-License-Identifier: MIT
"""One pub/sub connection per process and server, shared by all threads that wait for results.

It has no thread of its own.  Of the threads that wait, one at a time is the *reader*: it alone does
what concerns the socket (one of TLS must not be used by two threads at once).  The others sleep,
each at its own gate; what they want subscribed or unsubscribed they note in a table, and a byte in a
socket pair wakes the reader.  When the reader has what it waited for, or no more time, it wakes
another one to read on.

Nothing here is certain, and nothing needs to be: a message may be lost with its connection, so who
waits is told to *look* whenever its subscriptions are confirmed, the first time and after each lost
connection, and looks now and then in between.  So whatever happens inside of a step of the reader,
Ctrl-C included, the answer is to drop the connection and begin again.

Source: the pub/sub of RESP3, where pushes and replies share a connection; Redis 6.2.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import random
import select
import socket
import threading
import time
from collections import deque
from typing import Any, Deque, Dict, Iterable, List, Optional, Set, Tuple

from ..exceptions import ImproperlyConfigured, OperationalError
from .redis import Connection, Part, Push, Server

logger = logging.getLogger(__name__)

#: Channels that one step subscribes or unsubscribes; their confirmations are read before the next.
BATCH = 1000
#: Messages that wait for one who does not take them, beyond one for each of its channels.
MAX_WAITING = 1000
#: A connection nobody waits on is kept so long, in case somebody soon does.
IDLE_S = 10.0
#: Nothing heard for so long: ask whether anybody is there.
SILENCE_S = 10.0
#: An answer may take so long.
ANSWER_S = 5.0
#: Connecting may take so long, and a failed attempt is followed by a pause of at most so long.
CONNECT_S = 4.0
MAX_PAUSE_S = 2.0
#: After a refusal that time does not heal, nothing is tried for so long.
DEAF_S = 60.0

#: Unsubscribed from to have an answer: nobody ever subscribes to it.
_NOBODY = b"_miniq.nobody"


class Waiter:
    """Somebody who waits for messages of channels, up to `deadline_mono`; for one `Listener.join`."""

    __slots__ = ("channels", "look", "_deadline_mono", "_box", "_unconfirmed", "_gate")

    def __init__(self, channels: Iterable[bytes], deadline_mono: float) -> None:
        self.channels = dict.fromkeys(channels)
        self._deadline_mono = deadline_mono
        #: Set when messages may have been missed; who has looked resets it, before looking.
        self.look = False
        self._box: List[Tuple[bytes, bytes]] = []
        self._unconfirmed = 0
        #: Held; released to wake who sleeps at it.
        self._gate = threading.Lock()
        self._gate.acquire()

    def take(self) -> List[Tuple[bytes, bytes]]:
        """Return what has come: (channel, message)."""
        found, self._box = self._box, []
        return found


class Listener:
    """The pub/sub connection of this process to one server, for any number of threads.

    A listener inherited through a fork does nothing; `of` gives the child one of its own.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._pid = os.getpid()
        # Guards all down to the blank line.  Held for moments, never while a socket is used.
        self._lock = threading.Lock()
        self._wanted: Dict[bytes, List[Waiter]] = {}
        self._changed: Dict[bytes, None] = {}
        self._reader: Optional[object] = None
        self._sleepers: Dict[Waiter, None] = {}
        self._woken = False
        self._idle_mono = 0.0
        # A generator may be finalized wherever its thread happens to be, inside of the lock too: who
        # leaves is put here, and removed by whoever has the lock.
        self._left: Deque[Waiter] = deque()

        # The reader's, and under the lock where connection and subscriptions change.
        self._connection: Optional[Connection] = None
        self._sent: Set[bytes] = set()
        self._confirming: Dict[bytes, int] = {}
        self._bell: Optional[Tuple[socket.socket, socket.socket]] = None
        self._poll: Any = None
        self._heard_mono = 0.0
        self._asked_mono: Optional[float] = None
        self._failures = 0
        self._retry_mono = 0.0
        self._lost_mono: Optional[float] = None
        self._deaf_until_mono = 0.0
        self._got: List[Push] = []

        self._reached = False
        self._away_mono: Optional[float] = None

    @classmethod
    def of(cls, server: Server) -> "Listener":
        """Return this process' listener on `server`."""
        key = (os.getpid(), server.key)
        found = _listeners.get(key)
        if found is None:
            _close_at_exit()
            found = _listeners.setdefault(key, cls(server))
        return found

    @property
    def deaf(self) -> bool:
        """Say whether the server refuses to let us subscribe: who waits has to look."""
        return self._deaf_until_mono > time.monotonic()

    @property
    def connected(self) -> bool:
        """Say whether there is a connection that messages may come from."""
        return self._connection is not None

    def reached(self) -> None:
        """Note that the server answered somebody, on whatever connection."""
        self._reached = True
        self._away_mono = None

    def out_of_reach_s(self) -> float:
        """Note that it did not; return for how long now, infinity if it never did."""
        mono = time.monotonic()
        if self._away_mono is None:
            self._away_mono = mono
        return mono - self._away_mono if self._reached else math.inf

    # -- for those who wait

    def join(self, waiter: Waiter) -> None:
        """Subscribe; the first `listen` returns when that is confirmed, to look.  Later `leave`."""
        with self._lock:
            if not self._wanted and self._reader is None and self._idle_s() > IDLE_S:
                # Perhaps it is dead and the server could not say so.
                self._drop()
            for channel in waiter.channels:
                self._wanted.setdefault(channel, []).append(waiter)
                if channel not in self._sent:
                    self._changed[channel] = None
                    waiter._unconfirmed += 1
                elif channel in self._confirming:
                    waiter._unconfirmed += 1
            waiter.look = not waiter._unconfirmed
            self._ring()
        self._remove_left()

    def listen(self, waiter: Waiter, until_mono: float) -> bool:
        """Return when there is something to `take`, when `look` is set, or at `until_mono`.

        False, at once, where there is nothing to listen to: it is `deaf`, or inherited through a fork.
        """
        reads = False
        try:
            while not self.deaf and self._pid == os.getpid():
                with self._lock:
                    if waiter._box or waiter.look:
                        return True
                    if self._reader is None:
                        self._reader, reads = waiter, True
                        break
                    self._sleepers[waiter] = None
                self._remove_left()
                if not self._sleep_at_gate(waiter, until_mono):
                    return True
            else:
                return False
            self._read(waiter, until_mono)
            return not self.deaf
        finally:
            if reads:
                self._step_down()

    def _sleep_at_gate(self, waiter: Waiter, until_mono: float) -> bool:
        """Sleep until woken; False when the time is over."""
        woken = False
        try:
            left_s = until_mono - time.monotonic()
            woken = left_s > 0 and waiter._gate.acquire(True, left_s)
        finally:
            with self._lock:
                if self._sleepers.pop(waiter, waiter) is waiter and not woken:
                    # Woken all the same, too late: the gate is open and has to be shut.
                    waiter._gate.acquire(False)
                if not woken:
                    self._wake_reader()
        return woken

    def leave(self, waiter: Waiter) -> None:
        """Unsubscribe; may be called from a finalizer, and after a fork."""
        if self._pid == os.getpid():
            self._left.append(waiter)
            self._remove_left()

    def close_idle(self, idle_s: float = IDLE_S) -> None:
        """Close the connection if nobody has waited on it for so long."""
        if self._connection is not None and not self._wanted and self._pid == os.getpid():
            with self._lock:
                if not self._wanted and self._reader is None and self._idle_s() >= idle_s:
                    self._drop()

    # -- who reads

    def _step_down(self) -> None:
        with self._lock:
            self._reader = None
            self._wake_reader()
        self._remove_left()

    def _wake_reader(self) -> None:
        """Have another one read on, if nobody does.  Under the lock."""
        if self._reader is None and self._sleepers:
            self._wake(next(iter(self._sleepers)))

    def _wake(self, waiter: Waiter) -> None:
        """Under the lock."""
        if waiter in self._sleepers:
            del self._sleepers[waiter]
            waiter._gate.release()

    def _ring(self) -> None:
        """Tell the reader, if there is one, that the table has changed.  Under the lock."""
        if self._changed and self._reader is not None and self._bell is not None and not self._woken:
            self._woken = True
            self._bell[0].send(b"\0")

    def _remove_left(self) -> None:
        """Remove those who have left.

        Whoever has the lock instead calls this once it was released, so nobody is forgotten.
        """
        reads = False
        while self._left and self._lock.acquire(False):
            try:
                while self._left:
                    self._remove(self._left.popleft())
                if self._changed and self._connection is not None and self._reader is None:
                    # Nobody else would send it.
                    self._reader, reads = self, True
                self._ring()
                self._wake_reader()
            finally:
                self._lock.release()
        if reads:
            try:
                while self._step():
                    pass
            finally:
                self._step_down()

    def _remove(self, waiter: Waiter) -> None:
        """Under the lock."""
        for channel in waiter.channels:
            others = self._wanted.get(channel, [])
            if waiter in others:
                others.remove(waiter)
                if not others:
                    del self._wanted[channel]
                    if channel in self._sent:
                        self._changed[channel] = None
                    else:
                        self._changed.pop(channel, None)
        self._sleepers.pop(waiter, None)
        if self._reader is waiter:
            self._reader = None
        if not self._wanted:
            self._idle_mono = time.monotonic()

    def _idle_s(self) -> float:
        return time.monotonic() - self._idle_mono

    # -- the reader

    def _read(self, waiter: Waiter, until_mono: float) -> None:
        """Read for all until there is something for `waiter`."""
        while not self.deaf:
            mono = time.monotonic()
            if self._connection is None:
                if self._retry_mono <= mono:
                    self._connect(waiter._deadline_mono)
                elif mono < until_mono:
                    time.sleep(min(self._retry_mono, until_mono) - mono)
                if mono >= until_mono:
                    return
                continue
            more = self._step()
            if waiter._box or waiter.look or mono >= until_mono:
                return
            if not more:
                self._sleep(until_mono)

    def _sleep(self, until_mono: float) -> None:
        """Wait for the socket or the bell, not longer than until it is time to ask or to give up."""
        if self._connection is None or self._bell is None or self._connection.has_input():
            return
        if self._asked_mono is not None:
            until_mono = min(until_mono, self._asked_mono + ANSWER_S)
        else:
            until_mono = min(until_mono, self._heard_mono + SILENCE_S)
        left_s = max(0.0, until_mono - time.monotonic())
        if self._poll is not None:
            # Rounded up, or the last millisecond would be spent in a circle.
            self._poll.poll(left_s * 1000 + 1)
        else:
            select.select([self._connection.fileno(), self._bell[1].fileno()], [], [], left_s)

    def _step(self) -> bool:
        """Send changes and hand out what has come; return whether there is more to be sent."""
        connection = self._connection
        assert connection is not None
        try:
            subscribe, unsubscribe = self._changes()
            mono = time.monotonic()
            commands: List[Tuple[Part, ...]] = []
            if unsubscribe:
                commands.append(("UNSUBSCRIBE", *unsubscribe))
            if subscribe:
                commands.append(("SUBSCRIBE", *subscribe))
            if not commands and self._asked_mono is None and mono - self._heard_mono > SILENCE_S:
                commands.append(("UNSUBSCRIBE", _NOBODY))
            if commands:
                connection.send(commands, timeout_s=ANSWER_S)
                if self._asked_mono is None:
                    self._asked_mono = mono
            try:
                connection.take_pushes()
            finally:
                # Also what came before the connection broke.
                if self._got:
                    self._heard_mono = mono
                    self._asked_mono = None
                    self._hand_out()
            if self._asked_mono is not None and mono - self._asked_mono > ANSWER_S:
                raise OperationalError(f"{self._server.url}: no answer within {ANSWER_S:g} s")
        except OperationalError as error:
            self._lost(error)
        except ImproperlyConfigured as error:
            self._refused(error)
        except BaseException:
            # Half a command may be sent, half the messages handed out.
            with self._lock:
                self._drop()
            raise
        return self._connection is not None and bool(self._changed)

    def _changes(self) -> Tuple[List[bytes], List[bytes]]:
        subscribe: List[bytes] = []
        unsubscribe: List[bytes] = []
        with self._lock:
            if self._woken and self._bell is not None:
                self._woken = False
                self._bell[1].recv(1)
            while self._changed and len(subscribe) + len(unsubscribe) < BATCH:
                channel, _ = self._changed.popitem()
                if channel in self._wanted:
                    if channel not in self._sent:
                        self._sent.add(channel)
                        self._confirming[channel] = self._confirming.get(channel, 0) + 1
                        subscribe.append(channel)
                elif channel in self._sent:
                    self._sent.remove(channel)
                    unsubscribe.append(channel)
        self._remove_left()
        return subscribe, unsubscribe

    def _hand_out(self) -> None:
        self._recovered()
        pushes = self._got[:]
        self._got.clear()
        with self._lock:
            for push in pushes:
                if len(push) < 3:
                    continue  # nothing that we know
                kind, channel = push[0], push[1]
                if kind == b"message":
                    for waiter in self._wanted.get(channel, ()):
                        waiter._box.append((channel, push[2]))
                        if len(waiter._box) > MAX_WAITING + len(waiter.channels):
                            waiter.take()
                            waiter.look = True
                        self._wake(waiter)
                elif kind == b"subscribe" and channel in self._confirming:
                    self._confirming[channel] -= 1
                    if not self._confirming[channel]:
                        del self._confirming[channel]
                        for waiter in self._wanted.get(channel, ()):
                            waiter._unconfirmed -= 1
                            if not waiter._unconfirmed:
                                waiter.look = True
                                self._wake(waiter)
        self._remove_left()

    # -- the connection

    def _connect(self, deadline_mono: float) -> None:
        timeout_s = min(CONNECT_S, max(deadline_mono - time.monotonic(), 0.1))
        try:
            connection = self._server.connect(timeout_s, name="miniq-results")
        except OperationalError as error:
            self._lost(error)
            return
        except ImproperlyConfigured as error:
            self._refused(error)
            return
        self._got.clear()
        connection.on_push = self._got.append
        with self._lock:
            self._connection = connection
            self._heard_mono = time.monotonic()
            self._bell = socket.socketpair()
            for end in self._bell:
                end.setblocking(False)
            if hasattr(select, "poll"):
                self._poll = select.poll()
                self._poll.register(connection.fileno(), select.POLLIN)
                self._poll.register(self._bell[1], select.POLLIN)

    def _lost(self, error: OperationalError) -> None:
        """Drop the connection; try again after a pause that grows with the failures, and differs."""
        mono = time.monotonic()
        with self._lock:
            self._drop()
        if self._lost_mono is None:
            self._lost_mono = mono
            logger.warning("no news of results, trying again; they are looked for meanwhile: %s", error)
        self._retry_mono = mono + random.uniform(0.5, 1.0) * min(MAX_PAUSE_S, 0.05 * 2**self._failures)
        self._failures = min(self._failures + 1, 10)

    def _refused(self, error: ImproperlyConfigured) -> None:
        """Have those who wait look instead; what is wrong beyond that, a look will tell them."""
        logger.warning("no news of results, they have to be looked for again and again: %s", error)
        with self._lock:
            self._drop()
            self._deaf_until_mono = time.monotonic() + DEAF_S
            for waiter in list(self._sleepers):
                self._wake(waiter)

    def _recovered(self) -> None:
        self._failures = 0
        if self._lost_mono is not None:
            logger.info("news of results again, after %.1f s", time.monotonic() - self._lost_mono)
            self._lost_mono = None

    def _drop(self) -> None:
        """Close the connection and note that everything has to be subscribed again.  Under the lock."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if self._bell is not None:
            for end in self._bell:
                end.close()
        self._bell = self._poll = self._asked_mono = None
        self._woken = False
        self._sent.clear()
        self._confirming.clear()
        self._changed = dict.fromkeys(self._wanted)
        waiters = {waiter for waiting in self._wanted.values() for waiter in waiting}
        for waiter in waiters:
            waiter._unconfirmed = len(waiter.channels)


#: (process, server) -> its listener; those of a parent process are kept, so that nothing closes them.
_listeners: Dict[Tuple[int, Any], Listener] = {}
_hooked = False


def _close_at_exit() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        atexit.register(close_all)


def close_all() -> None:
    """Close the connections of this process that nobody reads from; for its end, and for tests."""
    pid = os.getpid()
    for (owner, _), listener in list(_listeners.items()):
        # Somebody interrupted at the wrong moment may have kept the lock.
        if owner == pid and listener._lock.acquire(timeout=1.0):
            try:
                if listener._reader is None:
                    listener._drop()
            finally:
                listener._lock.release()

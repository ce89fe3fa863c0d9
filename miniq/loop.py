# SPDX-License-Identifier: MIT
"""The worker's one loop: readiness of descriptors, one heap of timers, calls from other threads.

A turn waits for whatever comes first and then serves all three kinds of work, each kind only as
far as it stood when the turn began, so that none can starve another.  The selector and the
wake-up socket are made when they are first needed: a loop that only has timers and calls, as in a
simulation under a virtual clock (`next_due`, set the clock, ``run_once(0)``), owns no descriptor.

A callback that raises is logged and the loop goes on.  One that takes over 100 ms is logged by
name, because everything else waited for it.  A descriptor that is ready over and over without
getting anywhere (a hung-up peer nobody removes) is paused instead of burning a processor.

After a fork the child's copy of a loop is closed.  epoll is shared between the two processes:
unregistering in the child would deafen the parent, so descriptors are only closed there.
"""

from __future__ import annotations

import heapq
import logging
import select
import selectors
import socket
import time
from collections import deque
from typing import Any, Callable, Deque, Dict, List, Optional, Tuple

from .connections.forks import close_in_children

logger = logging.getLogger(__name__)

#: A callback that takes longer is logged: heartbeats and all other tasks waited for it.
SLOW_CALLBACK_S = 0.1
#: The longest single wait in the selector; a net, and below what any selector can count.
MAX_WAIT_S = 3600.0
#: A descriptor is looked at after this many wake-ups ...
SPIN_WAKEUPS = 2000
#: ... and paused if they took less than this and the peer is gone, as it was at the last look ...
SPIN_DEAD_S = 1.0
#: ... or less than this whatever its state: 100,000 a second is no traffic but a callback that does not read.
SPIN_ANY_S = 0.02
SPIN_FIRST_PAUSE_S = 0.1
SPIN_LAST_PAUSE_S = 10.0


class Timer:
    """A call that is due at a moment; `cancel` takes it back."""

    __slots__ = ("due", "callback", "args", "_heap_of")

    def __init__(
        self,
        due: float,
        callback: Callable[..., Any],
        args: Tuple[Any, ...],
        heap_of: "Optional[Loop]" = None,
    ) -> None:
        self.due = due
        self.callback: Optional[Callable[..., Any]] = callback
        self.args = args
        self._heap_of = heap_of  # the loop whose heap holds it, None when it is in no heap

    def cancel(self) -> None:
        """Never call it; harmless when it already ran."""
        if self.callback is not None:
            self.callback = None
            self.args = ()
            if self._heap_of is not None:
                self._heap_of._one_more_dead()


class _Watch:
    """What is to be called for one descriptor, and how often it was lately."""

    __slots__ = ("fd", "reader", "writer", "registered", "wakeups", "since", "dead", "pause_s", "timer")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.reader: Optional[Callable[[], Any]] = None
        self.writer: Optional[Callable[[], Any]] = None
        self.registered = 0  # the event mask the selector knows
        self.wakeups = 0
        self.since = 0.0
        self.dead = False  # had its peer gone at the last look
        self.pause_s = 0.0
        self.timer: Optional[Timer] = None  # runs while paused


class Loop:
    """Calls callbacks, in one thread.

    `clock` gives monotonic seconds (durations), `wall` epoch seconds (people and wire).  Both are
    arguments, so that tests can turn the hands.  `selector` is a `selectors.BaseSelector`, None =
    the best one here, made when first needed.
    """

    mono: Callable[[], float]  #: returns monotonic seconds
    now: Callable[[], float]  #: returns epoch seconds

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        selector: Any = None,
    ) -> None:
        self.mono = clock
        self.now = wall
        #: How many turns were done; a test of idleness reads it.
        self.turns = 0
        self._selector: Optional[selectors.BaseSelector] = selector
        self._watches: Dict[int, _Watch] = {}
        self._ready: Deque[Timer] = deque()
        self._heap: List[Tuple[float, int, Timer]] = []
        self._sequence = 0
        self._dead = 0
        self._wakeup: Optional[Tuple[socket.socket, socket.socket]] = None
        self._blocked = False
        self._stopping = False
        self._closed = False
        self._callback_began = 0.0
        close_in_children(self)

    # -- calls and timers ---------------------------------------------------------------------

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> None:
        """Call in the next turn."""
        self._ready.append(Timer(0.0, callback, args))

    def call_later(self, delay_s: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Call after `delay_s` seconds."""
        return self.call_at(self.mono() + delay_s, callback, *args)

    def call_at(self, mono: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Call at a moment of `mono()`."""
        timer = Timer(mono, callback, args, self)
        self._sequence += 1
        heapq.heappush(self._heap, (mono, self._sequence, timer))
        return timer

    def call_threadsafe(self, callback: Callable[..., Any], *args: Any) -> None:
        """Call in the next turn; may be called from any thread or a signal handler.

        Dropped when the loop is closed: there is nobody left to call it.
        """
        self._ready.append(Timer(0.0, callback, args))
        # The loop sets `_blocked` first and looks at `_ready` after that, so one of the two sees
        # the other; a byte too many only costs an empty turn.
        if self._blocked:
            self._wake()

    def _wake(self) -> None:
        pair = self._wakeup
        if pair is not None:
            try:
                pair[1].send(b"\0")
            except BlockingIOError:
                pass  # full of wake-ups that were not read yet: it will wake
            except OSError:
                if not self._closed:  # closed between the look and the write: nobody to wake
                    raise

    def _one_more_dead(self) -> None:
        self._dead += 1
        if self._dead > 64 and self._dead * 2 > len(self._heap):
            # In place: a turn may be walking over it.
            self._heap[:] = [entry for entry in self._heap if entry[2].callback is not None]
            heapq.heapify(self._heap)
            self._dead = 0

    def next_due(self) -> Optional[float]:
        """Return when the next timer is due (0.0 = work is waiting now), None when nothing is."""
        if self._ready:
            return 0.0
        heap = self._heap
        while heap and heap[0][2].callback is None:
            heapq.heappop(heap)
            self._dead -= 1
        return heap[0][0] if heap else None

    # -- descriptors --------------------------------------------------------------------------

    def add_reader(self, fd: int, callback: Callable[[], Any]) -> None:
        """Call whenever `fd` is readable.  Remove it before the descriptor is closed."""
        watch = self._watches.get(fd) or self._watch(fd)
        watch.reader = callback
        self._register(watch)

    def remove_reader(self, fd: int) -> None:
        """Stop watching; harmless when not watched."""
        watch = self._watches.get(fd)
        if watch is not None:
            watch.reader = None
            self._register(watch)

    def add_writer(self, fd: int, callback: Callable[[], Any]) -> None:
        """Call whenever `fd` is writable.  Remove it before the descriptor is closed."""
        watch = self._watches.get(fd) or self._watch(fd)
        watch.writer = callback
        self._register(watch)

    def remove_writer(self, fd: int) -> None:
        """Stop watching; harmless when not watched."""
        watch = self._watches.get(fd)
        if watch is not None:
            watch.writer = None
            self._register(watch)

    def _watch(self, fd: int) -> _Watch:
        self._open_selector()
        watch = self._watches[fd] = _Watch(fd)
        return watch

    def _register(self, watch: _Watch) -> None:
        """Tell the selector what `watch` wants; nothing while it is paused."""
        events = 0
        if watch.timer is None:
            if watch.reader is not None:
                events = selectors.EVENT_READ
            if watch.writer is not None:
                events |= selectors.EVENT_WRITE
        selector = self._selector
        if events != watch.registered and selector is not None:
            if not watch.registered:
                selector.register(watch.fd, events, watch)
            elif events:
                selector.modify(watch.fd, events, watch)
            else:
                selector.unregister(watch.fd)
            watch.registered = events
        if watch.reader is None and watch.writer is None:
            self._watches.pop(watch.fd, None)
            if watch.timer is not None:
                watch.timer.cancel()

    def _open_selector(self) -> selectors.BaseSelector:
        if self._closed:
            raise RuntimeError("this loop is closed (or was inherited through a fork); make a new one")
        if self._selector is None:
            self._selector = selectors.DefaultSelector()
        if self._wakeup is None:
            pair = self._wakeup = socket.socketpair()
            pair[0].setblocking(False)
            pair[1].setblocking(False)
            watch = self._watches[pair[0].fileno()] = _Watch(pair[0].fileno())
            watch.reader = self._read_wakeup
            self._register(watch)
        return self._selector

    def _read_wakeup(self) -> None:
        assert self._wakeup is not None
        try:
            self._wakeup[0].recv(4096)
        except BlockingIOError:
            pass  # an earlier turn has read it

    def _look_for_spin(self, watch: _Watch) -> None:
        """Pause a descriptor that woke the loop too often; called every `SPIN_WAKEUPS`."""
        mono = self.mono()
        elapsed_s, watch.since, watch.wakeups = mono - watch.since, mono, 0
        was_dead, watch.dead = watch.dead, elapsed_s < SPIN_DEAD_S and _is_dead(watch.fd)
        dead = was_dead and watch.dead
        if not dead and elapsed_s >= SPIN_ANY_S:
            watch.pause_s = 0.0
            return
        if not watch.pause_s:
            logger.warning(
                "descriptor %d (%s) woke the loop %d times in %.3f s%s; it is served in bursts from now on",
                watch.fd, callback_name(watch.reader or watch.writer), SPIN_WAKEUPS, elapsed_s,
                " although its peer is gone" if dead else "",
            )  # fmt: skip
        watch.pause_s = min(watch.pause_s * 2 or SPIN_FIRST_PAUSE_S, SPIN_LAST_PAUSE_S)
        watch.timer = self.call_later(watch.pause_s, self._end_pause, watch)
        self._register(watch)

    def _end_pause(self, watch: _Watch) -> None:
        watch.timer = None
        watch.since = self.mono()
        self._register(watch)

    # -- turning ------------------------------------------------------------------------------

    def run_once(self, timeout_s: Optional[float] = None) -> None:
        """Do one turn: wait for what comes first (at most `timeout_s`), then call it all."""
        self.turns += 1
        ready = self._ready
        heap = self._heap
        due = self.next_due()
        if due == 0.0 or timeout_s == 0:
            wait_s = 0.0
        else:
            wait_s = MAX_WAIT_S if due is None else min(max(due - self.mono(), 0.0), MAX_WAIT_S)
            if timeout_s is not None and timeout_s < wait_s:
                wait_s = timeout_s
        selector = self._selector
        if selector is None and wait_s > 0.0:
            selector = self._open_selector()
        if self._closed:
            raise RuntimeError("this loop is closed (or was inherited through a fork); make a new one")

        if selector is not None:
            if wait_s > 0.0:
                self._blocked = True
                if ready:  # came in before the flag was up: nobody woke us
                    wait_s = 0.0
            events = selector.select(wait_s)
            self._blocked = False
            mono = self._callback_began = self.mono()
            for key, mask in events:
                watch: _Watch = key.data
                watch.wakeups += 1
                if watch.wakeups >= SPIN_WAKEUPS:
                    self._look_for_spin(watch)
                if mask & selectors.EVENT_READ and watch.reader is not None:
                    self._call(watch.reader, ())
                # Looked up again: the reader may have removed the writer.
                if mask & selectors.EVENT_WRITE and watch.writer is not None:
                    self._call(watch.writer, ())
        else:
            mono = self._callback_began = self.mono()

        while heap and heap[0][0] <= mono:
            timer = heapq.heappop(heap)[2]
            if timer.callback is None:
                self._dead -= 1
            else:
                timer._heap_of = None
                ready.append(timer)
        for _ in range(len(ready)):
            if not ready:  # a callback has closed the loop
                return
            timer = ready.popleft()
            callback = timer.callback
            if callback is not None:
                args = timer.args
                timer.callback = None  # a cancel from now on is too late, and frees nothing
                self._call(callback, args)

    def _call(self, callback: Callable[..., Any], args: Tuple[Any, ...]) -> None:
        """Call; the loop's safety net: an error is logged and the loop goes on."""
        try:
            callback(*args)
        except Exception:  # named net: whatever a callback raises, the others are served
            logger.exception("callback %s failed; the loop goes on without it", callback_name(callback))
        mono = self.mono()
        if mono - self._callback_began > SLOW_CALLBACK_S:
            logger.warning(
                "callback %s took %.3f s; everything else waited for it",
                callback_name(callback), mono - self._callback_began,
            )  # fmt: skip
        self._callback_began = mono

    def run_forever(self) -> None:
        """Turn until `stop`."""
        try:
            while not self._stopping:
                self.run_once()
        finally:
            self._stopping = False

    def stop(self) -> None:
        """Leave `run_forever` after this turn; may be called from any thread."""
        self._stopping = True
        self.call_threadsafe(_nothing)

    def close(self) -> None:
        """Let go of all descriptors and timers."""
        self._closed = True
        if self._selector is not None:
            self._selector.close()
            self._selector = None
        if self._wakeup is not None:
            for end in self._wakeup:
                end.close()
            self._wakeup = None
        for watch in self._watches.values():
            watch.reader = watch.writer = None
        self._watches.clear()
        self._heap.clear()
        self._ready.clear()


def callback_name(callback: Any) -> str:
    """Return ``module.Class.method`` of a callback, or its repr, bounded."""
    callback = getattr(callback, "func", callback)  # functools.partial
    name = getattr(callback, "__qualname__", None)
    return f"{callback.__module__}.{name}" if name else repr(callback)[:200]


def _nothing() -> None:
    """Do nothing; what `stop` calls to wake the loop."""


def _is_dead(fd: int) -> bool:
    """Say whether the peer of `fd` has hung up or the descriptor is in error.

    False where the platform cannot tell.
    """
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))  # HUP, ERR and NVAL are always reported

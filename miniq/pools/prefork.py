# SPDX-License-Identifier: MIT
"""Runs every task in a child process: the default pool.

The parent's side.  Each child has its own socketpair (frames: see `child`); nothing is shared
between siblings, no queue, lock or semaphore, so no child can leave anything behind that hurts
another one.  The parent only ever writes without blocking, and gives a job only to a child that
is up and idle: `free_slots` counts such children.

A child's end is seen as the end of its link, and its exit status then says how.  What it had
written before (a finished job) is read first.  On Linux the link also tells whether the child had
read all that was sent to it: a job that it never read has not begun, and goes to another child.

Short jobs may be sent ahead to a child that is busy, and are taken back as soon as what runs before
them takes longer than `RECALL_S` (see `child` for how exactly one side gets each of them).

Killing a child means its process group, so that nothing which the task started survives it.
Start methods: fork while this process has one thread (a fork copies locks held by other threads
for ever), else spawn; a pool that has to change over stays with spawn.
"""

from __future__ import annotations

import array
import atexit
import logging
import multiprocessing
import multiprocessing.util  # its exit handler joins children: it must be registered before ours
import os
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from functools import partial
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Set

from ..backends.base import StoredResult
from ..connections.starts import StartJournal
from ..exceptions import ImproperlyConfigured, Terminated, TimeLimitExceeded, WorkerLostError
from ..loop import Loop, Timer
from ..runner import Outcome, RunnerSpec
from ..signals import worker_before_create_process
from .base import Job, Lost, Pool, PoolOptions, signal_number
from .child import DONE, FAILED, READY, RECV_BYTES, STARTED, FrameReader, main, pack

if sys.platform != "win32":
    import fcntl
    import resource
    import termios

logger = logging.getLogger(__name__)

#: How often children are looked at for what no event tells: stuck at the start, stopped, gone without a word.
MAX_CHECK_INTERVAL_S = 1.0
#: A child that closed its link must have ended after this; then it is killed ...
EXIT_TIMEOUT_S = 0.5
#: ... and after this long its job is reported whether the process can be seen to end or not.
GIVE_UP_S = 5.0
#: The soft limit is measured in the child, which got the job a moment later than we sent it.
SOFT_SLACK_S = 0.002
SOFT_FIRST_REPEAT_S = 0.01
SOFT_LAST_REPEAT_S = 5.0
#: A child that ends within this time without a job counts as one that could not start.
QUICK_DEATH_S = 1.0
MAX_BACKOFF_S = 30.0

#: How many jobs a child may be sent ahead, and how long they wait behind one before they are taken back.
AHEAD = 32
RECALL_S = 0.02
#: A larger job is not sent ahead (bytes): it might not fit into the link at once.
AHEAD_BYTES = 16384

_NAME_PREFIX = {"fork": "Fork", "forkserver": "ForkServer", "spawn": "Spawn"}


class _Child:
    """One child process as the parent sees it."""

    __slots__ = (
        "name", "process", "pid", "sock", "fd", "lifeline", "frames", "unsent", "began_mono", "ready_mono",
        "job", "again", "jobs", "retiring", "leave_by", "base_rss_kib", "soft_timer", "hard_timer",
        "accepted", "unread", "ahead", "permits", "permits_back", "last_permit", "link_lost", "killed_mono",
        "reason", "failed", "peak_kib",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        sock: socket.socket,
        lifeline: socket.socket,
        permits: socket.socket,
        permits_back: socket.socket,
        mono: float,
    ) -> None:
        self.name = name
        self.ahead: Deque[Job] = deque()  # sent while `job` ran, in this order
        self.permits = permits  # we write here ...
        self.permits_back = permits_back  # ... and can read, as the child does, at the other end
        self.last_permit = 0
        self.process: Any = None
        self.pid = 0
        self.sock = sock
        self.fd = sock.fileno()
        self.lifeline = lifeline
        self.frames = FrameReader()
        self.unsent: Optional[memoryview] = None  # the rest of a frame that the socket did not take
        self.began_mono = mono
        self.ready_mono: Optional[float] = None
        self.job: Optional[Job] = None
        self.again = False  # the job was given to another child before
        self.jobs = 0
        self.retiring = False  # gets no further job
        self.leave_by = float("inf")
        self.base_rss_kib = 0
        self.soft_timer: Optional[Timer] = None
        self.hard_timer: Optional[Timer] = None
        self.accepted = False  # seen to have read its job
        self.unread = False  # ended without having read all of its job
        self.link_lost: Optional[float] = None
        self.killed_mono: Optional[float] = None
        self.reason: Optional[BaseException] = None  # why we killed it, as its job will hear
        self.failed = False  # has told why it cannot start
        self.peak_kib = 0

    def close(self) -> None:
        self.sock.close()
        self.lifeline.close()
        self.permits.close()
        self.permits_back.close()


class PreforkPool(Pool):
    """Runs jobs in child processes."""

    can_terminate = True
    has_soft_limit = hasattr(signal, "SIGUSR1")
    has_hard_limit = True
    has_processes = True
    can_take_ahead = sys.platform != "win32"

    def __init__(self, options: PoolOptions, spec: RunnerSpec) -> None:
        methods = multiprocessing.get_all_start_methods()
        if options.start_method is not None and options.start_method not in methods:
            raise ImproperlyConfigured(
                f"pool start method {options.start_method!r} does not exist here; known: {', '.join(methods)}"
            )
        # macOS offers fork, but its system libraries break in the child.
        default = "fork" if "fork" in methods and sys.platform != "darwin" else "spawn"
        #: The start method in use; fork may turn into spawn, never back.
        self.start_method = options.start_method or default
        #: Traceback of the last child that could not start; empty as soon as one could.
        self.start_error = ""
        self._options = options
        self._spec = spec
        self._size = options.concurrency
        self._check_interval_s = min(MAX_CHECK_INTERVAL_S, options.alive_timeout_s / 2)
        self._loop: Loop
        self._on_free: Callable[[], None]
        self._children: Set[_Child] = set()  # all whose end was not seen yet
        self._idle: List[_Child] = []
        self._busy: Set[_Child] = set()
        self._unstarted: Deque[Job] = deque()  # taken back from children that never read them
        self._serial = 0
        self._quick_deaths = 0
        self._failing_since = 0.0
        self._not_before = 0.0
        self._fill_timer: Optional[Timer] = None
        self._check_timer: Optional[Timer] = None
        self._deadline_timer: Optional[Timer] = None
        self._stopping = False
        self._on_stopped: Optional[Callable[[], None]] = None
        self._warned_of_memory = False
        self._journal: Optional[StartJournal] = None
        self._recall_timer: Optional[Timer] = None

    # -- the seam -----------------------------------------------------------------------------

    def start(self, loop: Loop, on_free: Callable[[], None]) -> None:
        """Start the children; `on_free` is called as each of them is up.

        Raises what `multiprocessing` does when none can be started: `OSError`, or for spawn an
        error that the spec cannot be pickled or that the main module is not guarded.
        """
        self._loop = loop
        self._on_free = on_free
        _guard_exits(self)
        self._check_timer = loop.call_later(self._check_interval_s, self._check)
        try:
            for _ in range(self._size):
                self._start_child()
        except BaseException:
            self._stopping = True
            self._kill_all()
            raise

    @property
    def free_slots(self) -> int:
        """How many jobs may be submitted now."""
        if self._stopping:
            return 0
        # A replacement comes up while the child that it replaces still has its last job.
        free = min(len(self._idle), self._size - len(self._busy)) - len(self._unstarted)
        return free if free > 0 else 0

    @property
    def size(self) -> int:
        """How many children the pool is meant to have."""
        return self._size

    def submit(self, job: Job) -> None:
        """Send `job` to an idle child."""
        if self.free_slots <= 0:
            raise RuntimeError("the pool has no free slot")
        self._give(job)

    def use_journal(self, journal: StartJournal) -> None:
        """Have children note in `journal` which jobs begin; before the first job."""
        self._journal = journal
        for child in self._children:
            self._send(child, pack(journal.path))

    @property
    def ahead_slots(self) -> int:
        """How many short jobs may be sent to busy children."""
        options = self._options
        if self._journal is None or self._stopping:
            return 0
        if options.max_tasks_per_child or options.max_memory_per_child_kib:
            return 0  # a child that is about to be replaced after any job
        up = (child for child in self._children if child.ready_mono is not None and not child.retiring)
        return sum(AHEAD - len(child.ahead) for child in up)

    def submit_ahead(self, jobs: Sequence[Job]) -> None:
        """Send `jobs` to the busy children with the fewest before them, or back where none can take one."""
        frames: Dict[_Child, List[bytes]] = {}
        for job in jobs:
            best: Optional[_Child] = None
            for child in self._busy:
                takes = child.unsent is None and not child.retiring and child.link_lost is None
                if takes and len(child.ahead) < (AHEAD if best is None else len(best.ahead)):
                    best = child
            if best is None or len(job.run.body) > AHEAD_BYTES:
                self._hand_back(job)
                continue
            best.last_permit = (best.last_permit + 1) % 256
            frame = pack((tuple(job.run), None, False, best.last_permit, job.token))
            job.permit = best.last_permit
            job.slot = best
            best.ahead.append(job)
            frames.setdefault(best, []).append(frame)
        for child, packed in frames.items():
            sent = list(child.ahead)[-len(packed) :]
            try:
                child.permits.send(bytes(job.permit for job in sent if job.permit is not None))
            except OSError:  # it is gone; reading its link will say so
                for job in sent:
                    child.ahead.remove(job)
                    self._hand_back(job)
                continue
            self._send(child, b"".join(packed))
        if frames and self._recall_timer is None:
            self._recall_timer = self._loop.call_later(RECALL_S, self._recall_late)

    def terminate(self, job: Job, signal_name: str = "SIGTERM") -> bool:
        """Kill the child that runs `job`: `Lost` with ``Terminated(signal number)``."""
        error = Terminated(signal_number(signal_name))
        child = job.slot
        if isinstance(child, _Child) and child.job is job:
            self._kill(child, error)
            return True
        if isinstance(child, _Child) and job in child.ahead:
            self._recall(child)
            if job in child.ahead:  # it has begun, only the end of the one before was not read yet
                self._kill(child, error)
            return True
        if job in self._unstarted:
            self._unstarted.remove(job)
            self._loop.call_soon(job.on_done, job, Lost(error, 0, 0.0))
            return True
        return False

    def grow(self, n: int) -> None:
        """Add `n` children."""
        self._size += n
        self._fill()

    def shrink(self, n: int) -> None:
        """Remove `n` children (at least one stays); busy ones go when their job is done."""
        self._size = max(1, self._size - n)
        staying = [child for child in self._children if not child.retiring]
        staying.sort(key=lambda child: (child.job is not None, child.ready_mono is not None))
        for child in staying[: max(0, len(staying) - self._size)]:
            self._retire(child)

    def restart(self) -> bool:
        """Replace all children, busy ones when their job is done."""
        for child in [child for child in self._children if not child.retiring]:
            self._retire(child)
        self._fill()
        return True

    def pids(self) -> List[int]:
        """Return the process ids of children whose end was not collected yet; leave that to the pool."""
        return sorted(child.pid for child in self._children)

    def info(self) -> Dict[str, Any]:
        """Return what `inspect stats` shows under ``pool``, in Celery's words."""
        jobs = {child.pid: child.jobs for child in self._children}
        total = sum(jobs.values())
        return {
            "implementation": f"{type(self).__module__}:{type(self).__qualname__}",
            "max-concurrency": self._size,
            "processes": self.pids(),
            "max-tasks-per-child": self._options.max_tasks_per_child or "N/A",
            "put-guarded-by-semaphore": False,
            "start-method": self.start_method,
            "writes": {
                "total": total,
                "avg": f"{1 / len(jobs) if jobs else 0:.2%}",
                "all": ", ".join(f"{n / total if total else 0:.2%}" for n in jobs.values()),
                "raw": ", ".join(map(str, jobs.values())),
                "strategy": "fair",
                "inqueues": {"total": len(jobs), "active": len(self._busy)},
            },
        }

    def stop(self, deadline_mono: float, on_stopped: Callable[[], None]) -> None:
        """End idle children now, busy ones when their job is done; all at the deadline."""
        self._stopping = True
        self._on_stopped = on_stopped
        if self._fill_timer is not None:
            self._fill_timer.cancel()
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
        if deadline_mono != float("inf"):
            self._deadline_timer = self._loop.call_at(deadline_mono, self._kill_all)
        while self._unstarted:
            job = self._unstarted.popleft()
            error = WorkerLostError("Worker stopped before a process could take the job; it did not begin")
            self._loop.call_soon(job.on_done, job, Lost(error, 0, 0.0))
        for child in list(self._children):
            self._recall(child)
            self._retire(child)
        self._see_whether_stopped()

    # -- jobs ---------------------------------------------------------------------------------

    def _give(self, job: Job, again: bool = False) -> None:
        # May raise: nothing has changed yet.
        frame = pack((tuple(job.run), job.soft_limit_s, job.wants_start, None, job.token))
        job.permit = None  # it may have been sent ahead to another child before
        child = self._idle.pop()
        self._busy.add(child)
        child.job = job
        child.again = again
        child.accepted = child.unread = False
        child.jobs += 1
        job.slot = child
        job.started_mono = self._loop.mono()
        self._send(child, frame)
        if job.hard_limit_s is not None:
            child.hard_timer = self._loop.call_later(
                job.hard_limit_s, self._kill, child, TimeLimitExceeded(job.hard_limit_s)
            )
        if job.soft_limit_s is not None and self.has_soft_limit:
            child.soft_timer = self._loop.call_later(
                job.soft_limit_s + SOFT_SLACK_S, self._send_soft_limit, child, SOFT_FIRST_REPEAT_S
            )
        if child.jobs == self._options.max_tasks_per_child:
            child.retiring = True  # its last job; the child that replaces it comes up meanwhile
            self._loop.call_soon(self._fill)

    def _send(self, child: _Child, frame: bytes) -> None:
        if child.unsent is not None:  # a job that was taken back may still be on its way
            child.unsent = memoryview(bytes(child.unsent) + frame)
            return
        try:
            sent = child.sock.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError:
            child.unread = True  # it is gone; reading its link will say so
            return
        if sent < len(frame):
            child.unsent = memoryview(frame)[sent:]
            self._loop.add_writer(child.fd, partial(self._on_writable, child))

    def _on_writable(self, child: _Child) -> None:
        assert child.unsent is not None
        try:
            child.unsent = child.unsent[child.sock.send(child.unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self._loop.remove_writer(child.fd)  # reading its link will say what became of it
            return
        if not child.unsent:
            child.unsent = None
            self._loop.remove_writer(child.fd)

    def _on_readable(self, child: _Child) -> None:
        try:
            data = child.sock.recv(RECV_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:  # Linux: it ended and had not read all that we sent
            child.unread = True
            data = b""
        except OSError:
            data = b""
        if not data:
            self._lose_link(child)
            return
        try:
            frames = child.frames.feed(data)
        except Exception:  # named net: a task wrote into our link; nothing more can be read from it
            logger.exception("Process %r pid:%d sent what is no frame and is killed", child.name, child.pid)
            self._lose_link(child)
            self._kill(child, WorkerLostError("Worker sent unreadable data and was killed"))
            return
        for frame in frames:
            kind = frame[0]
            if kind == DONE:
                self._on_done(child, frame[1], frame[2])
            elif kind == STARTED:
                self._on_started(child)
            elif kind == READY:
                self._on_ready(child, frame[1])
            elif kind == FAILED:
                self._on_failed(child, frame[1])

    def _on_started(self, child: _Child) -> None:
        job = child.job
        child.accepted = True
        if job is None or job.on_start is None:
            return
        try:
            job.on_start(job, child.pid)
        except Exception:  # named net: DONE may be in the same chunk and must not be lost
            logger.exception("reporting the start of a job failed; the job goes on")

    def _on_done(self, child: _Child, fields: Any, rss_kib: int) -> None:
        job = self._take_job(child)
        if job is None:
            return
        self._quick_deaths = 0
        limit_kib = self._options.max_memory_per_child_kib
        if limit_kib is not None and rss_kib > limit_kib and child.base_rss_kib <= limit_kib:
            logger.info(
                "%s pid:%d holds %d KiB (limit %d) after its task and is replaced",
                child.name, child.pid, rss_kib, limit_kib,
            )  # fmt: skip
            child.retiring = True
        if child.ahead:
            self._busy.add(child)
            child.job = child.ahead.popleft()
            child.job.started_mono = self._loop.mono()
            child.again = child.accepted = False
            child.jobs += 1
        elif child.retiring:
            self._retire(child)
            self._loop.call_soon(self._fill)
        else:
            self._set_free(child)
        state, results, *rest = fields
        job.on_done(job, Outcome(state, [StoredResult._make(result) for result in results], *rest))

    def _hand_back(self, job: Job) -> None:
        assert job.on_back is not None
        self._loop.call_soon(job.on_back, job)

    def _recall(self, child: _Child) -> None:
        """Take back the jobs that were sent ahead to a child and have not begun."""
        if not child.ahead and (child.job is None or child.job.permit is None):
            return
        try:
            free = set(child.permits_back.recv(256))
        except BlockingIOError:
            return
        for job in [job for job in child.ahead if job.permit in free]:
            child.ahead.remove(job)
            self._hand_back(job)
        if child.job is not None and child.job.permit in free:
            # The one before it has ended, and the child did not get to this one (it is dead or stopped).
            job, child.job = child.job, None
            self._busy.discard(child)
            self._hand_back(job)
            if child.link_lost is None and not child.retiring:
                self._set_free(child)

    def _recall_late(self) -> None:
        """Take back what waits behind a job that turned out to be long."""
        self._recall_timer = None
        late = self._loop.mono() - RECALL_S
        waiting = False
        for child in list(self._busy):
            if child.ahead:
                if child.job is not None and child.job.started_mono <= late:
                    self._recall(child)
                waiting = waiting or bool(child.ahead)
        if waiting:
            self._recall_timer = self._loop.call_later(RECALL_S, self._recall_late)

    def _noted(self, job: Job) -> Optional[bool]:
        """Return whether the journal says that a job has begun, None where it says nothing of it."""
        if job.token is None or self._journal is None:
            return None
        return self._journal.has_begun(job.token)

    def _has_begun(self, child: _Child, job: Job) -> bool:
        """Say whether a job whose child has ended was begun; in doubt it was."""
        noted = self._noted(job)
        return not child.unread and child.unsent is None if noted is None else noted

    def _take_job(self, child: _Child) -> Optional[Job]:
        """Take the job off a child, and its time limits."""
        job, child.job = child.job, None
        self._busy.discard(child)
        if child.soft_timer is not None:
            child.soft_timer.cancel()
            child.soft_timer = None
        if child.hard_timer is not None:
            child.hard_timer.cancel()
            child.hard_timer = None
        return job

    def _set_free(self, child: _Child) -> None:
        self._idle.append(child)
        if self._unstarted:
            self._give(self._unstarted.popleft(), again=True)

    def _send_soft_limit(self, child: _Child, repeat_s: float) -> None:
        """Tell a child that its job's soft limit is over; again and again, see `child.SoftLimit`."""
        _signal(child, signal.SIGUSR1)
        child.soft_timer = None
        if repeat_s < SOFT_LAST_REPEAT_S:
            child.soft_timer = self._loop.call_later(repeat_s, self._send_soft_limit, child, repeat_s * 2)

    # -- children come ------------------------------------------------------------------------

    def _fill(self) -> None:
        """Start what is missing, unless children die as fast as they come."""
        mono = self._loop.mono()
        while not self._stopping and sum(not child.retiring for child in self._children) < self._size:
            if mono < self._not_before:
                if self._fill_timer is None:
                    self._fill_timer = self._loop.call_at(self._not_before, self._fill_after_backoff)
                return
            try:
                self._start_child()
            except Exception:  # named net: no memory, no process number; it is tried again, later each time
                self._note_start_error("a pool process could not be created", traceback.format_exc())
                self._count_quick_death()
                return

    def _fill_after_backoff(self) -> None:
        self._fill_timer = None
        self._fill()

    def _start_child(self) -> None:
        if self.start_method == "fork" and not _has_one_thread():
            logger.info(
                "this process has more than one thread, and a fork would copy their locks: "
                "pool processes are spawned from now on"
            )
            self.start_method = "spawn"
        if worker_before_create_process.receivers:
            worker_before_create_process.send(sender=self)
        self._serial += 1
        ours, theirs = socket.socketpair()
        lifeline, their_lifeline = socket.socketpair()
        permits, their_permits = socket.socketpair()
        permits_back = their_permits.dup()
        for sock in (ours, permits, permits_back):
            sock.setblocking(False)
        name = f"{_NAME_PREFIX[self.start_method]}PoolWorker-{self._serial}"
        child = _Child(name, ours, lifeline, permits, permits_back, self._loop.mono())
        self._children.add(child)  # before the fork: a child closes what it finds in here
        context: Any = multiprocessing.get_context(self.start_method)
        measure_rss = self._options.max_memory_per_child_kib is not None
        try:
            child.process = context.Process(
                target=main, args=(theirs, their_lifeline, their_permits, self._spec, measure_rss), name=name
            )
            child.process.start()
        except BaseException:
            self._children.discard(child)
            child.close()
            raise
        finally:
            theirs.close()
            their_lifeline.close()
            their_permits.close()
        child.pid = child.process.pid
        self._loop.add_reader(child.fd, partial(self._on_readable, child))
        if self._journal is not None:
            self._send(child, pack(self._journal.path))

    def _on_ready(self, child: _Child, rss_kib: int) -> None:
        child.ready_mono = self._loop.mono()
        child.base_rss_kib = rss_kib
        if self.start_error:
            logger.info(
                "pool processes start again after %.1f s of failing", self._loop.mono() - self._failing_since
            )
            self.start_error = ""
        limit_kib = self._options.max_memory_per_child_kib
        if limit_kib is not None and rss_kib > limit_kib and not self._warned_of_memory:
            self._warned_of_memory = True
            logger.warning(
                "a fresh pool process already holds %d KiB: raise the limit of %d KiB, it is not applied",
                rss_kib, limit_kib,
            )  # fmt: skip
        if child.retiring:
            self._retire(child)
        else:
            self._set_free(child)
            self._on_free()

    def _on_failed(self, child: _Child, text: str) -> None:
        child.failed = True
        self._note_start_error(f"Process {child.name!r} pid:{child.pid} cannot start", text)

    def _note_start_error(self, what: str, text: str) -> None:
        """Log why children cannot start, once for each reason."""
        if not self.start_error:
            self._failing_since = self._loop.mono()
        if text != self.start_error:
            logger.error("%s:\n%s", what, text)
        self.start_error = text

    def _count_quick_death(self) -> None:
        """Wait longer with each round of children that died at once; never a storm of forks."""
        self._quick_deaths += 1
        rounds = self._quick_deaths // self._size
        if rounds:
            pause_s = min(0.1 * 2 ** min(rounds - 1, 20), MAX_BACKOFF_S)
            self._not_before = self._loop.mono() + pause_s
            logger.warning(
                "%d pool processes in a row ended before their first job; the next start is in %.1f s",
                self._quick_deaths, pause_s,
            )  # fmt: skip
        self._loop.call_soon(self._fill)

    # -- children go --------------------------------------------------------------------------

    def _retire(self, child: _Child) -> None:
        """Let a child leave: now, or when its job is done."""
        child.retiring = True
        if child.job is not None or child.link_lost is not None:
            return
        if child in self._idle:
            self._idle.remove(child)
        if child.leave_by == float("inf"):
            child.leave_by = self._loop.mono() + self._options.alive_timeout_s
            try:
                child.sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it has left already; reading its link will say so
        if child.ready_mono is None:
            self._kill(child, None)  # nothing is lost with it, and its imports may take long

    def _kill(self, child: _Child, reason: Optional[BaseException]) -> None:
        """Kill a child with all that it started; its job comes back as `Lost` with `reason`.

        Unless it had finished: what the link still holds is read first.
        """
        if child.reason is None:
            child.reason = reason
        if child.killed_mono is None:
            child.killed_mono = self._loop.mono()
        child.retiring = True
        if child in self._idle:
            self._idle.remove(child)
        _kill_group(child)
        self._loop.call_soon(self._fill)

    def _kill_all(self) -> None:
        for child in list(self._children):
            self._kill(child, WorkerLostError("Worker stopped and killed the process: its time was over"))

    def _lose_link(self, child: _Child) -> None:
        """Note that a child's link ended: it is ending, or has ended."""
        self._loop.remove_reader(child.fd)
        self._loop.remove_writer(child.fd)
        child.link_lost = self._loop.mono()
        if child in self._idle:
            self._idle.remove(child)
        self._bury(child, 0.0005)

    def _bury(self, child: _Child, pause_s: float) -> None:
        """Wait for the exit status of a child whose link is lost, then settle what it leaves."""
        assert child.link_lost is not None
        exitcode = self._reap(child)
        waited_s = self._loop.mono() - child.link_lost
        if exitcode is None:
            if waited_s < GIVE_UP_S:
                if waited_s > EXIT_TIMEOUT_S and child.killed_mono is None:
                    self._kill(child, WorkerLostError("Worker closed its link to the parent and was killed"))
                self._loop.call_later(pause_s, self._bury, child, min(pause_s * 2, 0.1))
                return
            logger.error("Process %r pid:%d: no exit status to be had; it is given up", child.name, child.pid)
        self._forget(child, exitcode)

    def _reap(self, child: _Child) -> Optional[int]:
        """Return the exit code of a child that has ended, else None; never blocks.

        What is left of the group of a child that did not leave in order is killed.
        """
        direct = self.start_method != "forkserver" and hasattr(os, "waitid")
        if direct:
            # Before its status is collected: from then on its number may belong to others.
            try:
                status = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                pass  # collected in passing, by the start of another process
            else:
                if status is None:
                    return None
                if not child.retiring or status.si_code != os.CLD_EXITED or status.si_status != 0:
                    _kill_group(child)
        peak_before = _peak_kib_of_children()
        code: Optional[int] = child.process.exitcode
        peak = _peak_kib_of_children()
        if peak > peak_before:  # the largest one until now: then it is this child's number
            child.peak_kib = peak
        if code is not None and not direct and not (child.retiring and code == 0):
            _kill_group(child)
        return code

    def _forget(self, child: _Child, exitcode: Optional[int]) -> None:
        """Let go of a child that has ended, replace it, and settle its job."""
        self._children.discard(child)
        try:
            child.process.close()
        except ValueError:
            pass  # it runs on, unseen (logged above)
        self._recall(child)  # before its sockets are closed, and after all that it had written was read
        self._lose_ahead(child)
        child.close()
        ending = _describe_exit(exitcode)
        asked_to_leave = child.leave_by != float("inf")
        if child.killed_mono is None and not child.failed and not (asked_to_leave and exitcode == 0):
            logger.error("Process %r pid:%d exited with %r", child.name, child.pid, ending)
        mono = self._loop.mono()
        job = self._take_job(child)
        quick = child.ready_mono is None or mono - child.ready_mono < QUICK_DEATH_S
        if quick and not child.jobs and not asked_to_leave:
            self._count_quick_death()
        else:
            self._fill()
        may_go_elsewhere = child.reason is None and not child.again and not self._stopping
        if job is not None and may_go_elsewhere and not self._has_begun(child, job):
            logger.warning("the job of pid:%d had not begun and is given to another process", child.pid)
            self._unstarted.append(job)
            if self._idle:
                self._give(self._unstarted.popleft(), again=True)
            return
        self._see_whether_stopped()
        if job is not None:
            error = child.reason or WorkerLostError(_obituary(child, ending))
            job.on_done(job, Lost(error, child.pid, mono - job.started_mono))

    def _lose_ahead(self, child: _Child) -> None:
        """Report jobs whose permit a child had read when it died, though it cannot have begun two."""
        for job in child.ahead:
            error = WorkerLostError("Worker exited as it was about to begin the task")
            self._loop.call_soon(job.on_done, job, Lost(error, child.pid, 0.0))
        child.ahead.clear()

    def _see_whether_stopped(self) -> None:
        if self._stopping and not self._children and self._on_stopped is not None:
            for timer in (self._check_timer, self._deadline_timer):
                if timer is not None:
                    timer.cancel()
            self._loop.call_soon(self._on_stopped)  # not before the last `on_done`
            self._on_stopped = None

    # -- what no event tells ------------------------------------------------------------------

    def _check(self) -> None:
        """Look at each child for what its link does not tell."""
        self._check_timer = self._loop.call_later(self._check_interval_s, self._check)
        mono = self._loop.mono()
        timeout_s = self._options.alive_timeout_s
        for child in list(self._children):
            if child.link_lost is not None:
                continue
            if self._reap(child) is not None or (child.killed_mono or mono) < mono - GIVE_UP_S:
                # A process that it forked may still hold its end of the link open.
                if not _has_input(child.sock):
                    self._lose_link(child)
            elif child.killed_mono is not None:
                pass  # about to end
            elif child.ready_mono is None:
                if mono - child.began_mono > timeout_s:
                    logger.error("%s pid:%d is not up after %.1f s; killed", child.name, child.pid, timeout_s)
                    self._kill(child, None)
            elif child.job is None:
                if mono > child.leave_by:
                    logger.warning("%s pid:%d did not leave in time; killed", child.name, child.pid)
                    self._kill(child, None)
            elif not child.accepted and mono - child.job.started_mono > timeout_s:
                child.accepted = self._has_accepted(child, child.job)
                if not child.accepted:
                    logger.error(
                        "%s pid:%d did not accept its job in %.1f s; killed", child.name, child.pid, timeout_s
                    )
                    self._kill(child, None)


    def _has_accepted(self, child: _Child, job: Job) -> bool:
        noted = self._noted(job)
        return child.unsent is None and _peer_has_read_all(child.sock) if noted is None else noted


def _signal(child: _Child, number: int) -> None:
    try:
        os.kill(child.pid, number)
    except ProcessLookupError:
        pass  # it has just ended; its link will say so


def _kill_group(child: _Child) -> None:
    """Send SIGKILL to a child and all that it started; harmless when it has ended."""
    if hasattr(os, "killpg"):
        try:
            os.killpg(child.pid, signal.SIGKILL)
            return
        except (ProcessLookupError, PermissionError):
            pass  # it leads no group yet (or, on macOS, all of the group are zombies)
    child.process.kill()


def _describe_exit(exitcode: Optional[int]) -> str:
    if exitcode is None:
        return "unknown exit status"
    if exitcode >= 0:
        return f"exitcode {exitcode}"
    try:
        return f"signal {-exitcode} ({signal.Signals(-exitcode).name})"
    except ValueError:
        return f"signal {-exitcode}"


def _obituary(child: _Child, ending: str) -> str:
    text = f"Worker exited prematurely: {ending}"
    if "SIGKILL" in ending and child.killed_mono is None:
        text += ", not sent by this worker: likely out of memory"
    if child.peak_kib:
        text += f" (peak memory of the process: {child.peak_kib} KiB)"
    return text


def _peak_kib_of_children() -> int:
    """Return the peak memory of the largest child collected so far, 0 where nobody counts it."""
    if sys.platform == "win32":
        return 0
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def _has_input(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True  # data or the end: reading will tell


def _peer_has_read_all(sock: socket.socket) -> bool:
    """Say whether nothing we sent is still unread; True where the system does not tell."""
    if sys.platform != "linux":
        return True
    unread = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, unread)
    return unread[0] == 0


def _has_one_thread() -> bool:
    """Say whether only the calling thread exists, threads of C libraries included."""
    for _ in range(5):
        if threading.active_count() > 1:
            return False
        try:
            if len(os.listdir("/proc/self/task")) == 1:
                return True
        except OSError:
            return True  # nobody counts the others here
        time.sleep(0.001)  # one that was joined may be on its last steps
    return False


# -- the ends of this process --------------------------------------------------------------------

_pools: "weakref.WeakSet[PreforkPool]" = weakref.WeakSet()
_hooked = False


def _guard_exits(pool: PreforkPool) -> None:
    """See to it that a fork does not hold the links, and that leaving does not wait for children."""
    global _hooked
    _pools.add(pool)
    if not _hooked:
        _hooked = True
        atexit.register(_kill_at_exit)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_drop_inherited)


def _drop_inherited() -> None:
    for pool in list(_pools):
        for child in pool._children:
            child.close()
        pool._children.clear()
        pool._idle.clear()
        pool._busy.clear()
    _pools.clear()


def _kill_at_exit() -> None:
    """Kill the children of pools that were not stopped; `multiprocessing` would wait for them for ever."""
    for pool in list(_pools):
        for child in pool._children:
            _kill_group(child)

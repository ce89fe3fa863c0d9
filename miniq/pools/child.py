# SPDX-License-Identifier: MIT
"""The child process of the prefork pool: what it says, and how it lives and dies.

The link is one socketpair per child, shared with nobody.  Both directions carry frames: four
bytes of length (big endian), then a pickled tuple::

    parent -> child   (run, soft_limit_s or None, wants_start, permit or None, token or None)
                                                a job; half-closing the link says "leave"
                      path                      where to note what begins (`connections.starts`)
    child -> parent   (READY, rss_kib)          up; the child takes one job at a time from here on
                      (FAILED, traceback text)  cannot start; the process ends
                      (STARTED,)                the job begins; only if it asked for it
                      (DONE, outcome, rss_kib)  the job has ended

(`pickle` and `marshal` cost the same for such tuples, 1.6 + 2.7 us; `pickle` also takes the dates
and decimals that a broker's headers may hold.)

A job with a permit was sent ahead, while another one runs.  Its permit, one byte, went through a
socketpair of its own, of which both sides can read the child's end: whoever reads the byte has the
job.  The child reads it before the job begins; the parent reads it to take the job back.  The kernel
gives each byte to one of them.

The child must not outlive its parent, not even in the middle of a task or inside C code, nor may
anything that it started.  It leads a process group of its own, and a second socketpair, the
lifeline, on which nobody ever writes, tells of the parent's end.  Linux is told to kill the group
when that happens; elsewhere a thread waits for it.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
import traceback
from time import monotonic
from typing import Any, List, Optional, Tuple

from ..connections.starts import StartJournal
from ..exceptions import SoftTimeLimitExceeded
from ..runner import Outcome, Run, Runner, RunnerSpec

READY, FAILED, STARTED, DONE = 1, 2, 3, 4

#: Bytes asked of the socket at once: below the size from which malloc goes to the kernel.
RECV_BYTES = 65536

_LENGTH = struct.Struct("!I")


def pack(value: Any) -> bytes:
    """Return the frame that carries `value`; `OverflowError` from 4 GiB on."""
    data = pickle.dumps(value, 5)
    if len(data) > 0xFFFFFFFF:
        raise OverflowError(f"a job or outcome of {len(data)} bytes; at most 4 GiB pass between processes")
    return _LENGTH.pack(len(data)) + data


class FrameReader:
    """Turns chunks of bytes, cut anywhere, into the values of whole frames."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> List[Any]:
        """Take the next chunk; return the values it completes."""
        buffer = self._buffer
        if not buffer and len(data) >= 4 and _LENGTH.unpack_from(data)[0] == len(data) - 4:
            return [pickle.loads(memoryview(data)[4:])]  # the common case: no copy
        buffer += data
        values = []
        while len(buffer) >= 4:
            end = 4 + _LENGTH.unpack_from(buffer)[0]
            if len(buffer) < end:
                break
            with memoryview(buffer) as view, view[4:end] as payload:
                values.append(pickle.loads(payload))
            del buffer[:end]
        return values


class SoftLimit:
    """The guard around the task's own code: a SIGUSR1 raises only in there, and only once due.

    The parent sends the signal when its clock says so and repeats it some times, because the
    child's clock started a moment later; a task whose own code only begins when the limit is over
    is told at the door.  A signal that comes too late finds the guard disarmed, or the deadline of
    another job.  The guard may be entered again and again: a coroutine is run in steps.
    """

    __slots__ = ("_limit_s", "_deadline", "_armed")

    def __init__(self) -> None:
        self._limit_s = 0.0
        self._deadline = float("inf")
        self._armed = False

    def begin(self, limit_s: float) -> None:
        """Start the clock of a job."""
        self._limit_s = limit_s
        self._deadline = monotonic() + limit_s

    def __enter__(self) -> None:
        self._armed = True
        self.on_signal()

    def __exit__(self, *exc_info: object) -> None:
        self._armed = False

    def on_signal(self, *args: object) -> None:
        """Handle the signal: raise `SoftTimeLimitExceeded` if it is due here."""
        if self._armed and monotonic() >= self._deadline:
            self._armed = False
            self._deadline = float("inf")
            raise SoftTimeLimitExceeded(self._limit_s)


def plain_outcome(outcome: Outcome) -> Tuple[Any, ...]:
    """Return the outcome without our classes around its results (that is 5 us cheaper to pickle)."""
    return (outcome.state, [tuple(result) for result in outcome.results], *outcome[2:])


class Permits:
    """The child's side of the permits for jobs that were sent ahead."""

    __slots__ = ("_sock", "_held")

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._held: Optional[int] = None

    def take(self, permit: int) -> bool:
        """Take the permit of the next job; False = the parent took that job back."""
        if self._held is None:
            try:
                data = self._sock.recv(1)
            except BlockingIOError:
                return False
            self._held = data[0] if data else -1
        # Permits come in the order of the jobs: a later one means that this job's was taken.
        if self._held != permit:
            return False
        self._held = None
        return True


def main(
    sock: socket.socket, lifeline: socket.socket, permits: socket.socket, spec: RunnerSpec, measure_rss: bool
) -> None:
    """Be a pool's child until the parent closes its side of the link."""
    soft_limit = SoftLimit()
    _leave_parents_group()
    _reset_signals(soft_limit)
    _die_with_parent(lifeline)
    _keep_from_grandchildren(sock, lifeline, permits)
    try:
        runner = spec.build()
        runner.process_init()
    except (Exception, SystemExit):  # named net: the parent logs it and tries again, later each time
        sock.sendall(pack((FAILED, traceback.format_exc())))
        raise SystemExit(1) from None
    exitcode = 1
    try:
        sock.sendall(pack((READY, _rss_kib() if measure_rss else 0)))
        _serve(sock, Permits(permits), runner, soft_limit, measure_rss)
        exitcode = 0
    except SystemExit as leaving:
        exitcode = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        raise
    finally:
        runner.process_shutdown(exitcode)


def _serve(
    sock: socket.socket, permits: Permits, runner: Runner, soft_limit: SoftLimit, measure_rss: bool
) -> None:
    reader = FrameReader()
    journal: Optional[StartJournal] = None
    started = pack((STARTED,))
    rss_kib = 0
    while True:
        data = sock.recv(RECV_BYTES)
        if not data:
            return
        for frame in reader.feed(data):
            if type(frame) is str:
                journal = StartJournal(frame)
                continue
            run, soft_limit_s, wants_start, permit, token = frame
            if permit is not None and not permits.take(permit):
                continue
            if token is not None and journal is not None:
                journal.mark(token)
            if wants_start:
                sock.sendall(started)
            if soft_limit_s is None:
                outcome = runner.run(Run._make(run))
            else:
                soft_limit.begin(soft_limit_s)
                outcome = runner.run(Run._make(run), soft_limit)
            if measure_rss:
                rss_kib = _rss_kib()
            sock.sendall(pack((DONE, plain_outcome(outcome), rss_kib)))


def _rss_kib() -> int:
    """Return how much memory this process holds now; its peak where only that is known, else 0."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * (os.sysconf("SC_PAGE_SIZE") // 1024)
    except OSError:
        pass  # no /proc here
    try:
        import resource  # POSIX only
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


# -- the ties to the parent ----------------------------------------------------------------------


def _leave_parents_group() -> None:
    """Lead a group of our own: Ctrl-C does not reach us, and we can be killed with what we started."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def _ignore(*args: object) -> None:
    """Handle SIGINT and SIGTERM.

    A handler, not SIG_IGN: that would be inherited through exec, and a task could not stop the
    programs that it starts.
    """


def _reset_signals(soft_limit: SoftLimit) -> None:
    """Take back every handler inherited from the parent, then set the child's own."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ignore)
        if hasattr(signal, "siginterrupt"):
            signal.siginterrupt(number, False)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, soft_limit.on_signal)


def _keep_from_grandchildren(*links: socket.socket) -> None:
    """Have processes which a task forks drop the link, or our death would not be seen, and our handlers.

    SIGTERM waits meanwhile: in the first moments of such a process it would meet the handler
    inherited from us and be lost, and whoever sent it (``multiprocessing.Pool`` does) would wait
    for an end that never comes (5 of 1,800 pools did).
    """
    masks: List[Any] = []

    def before() -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM)))

    def after() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop())

    def in_grandchild() -> None:
        for link in links:
            link.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        after()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=after, after_in_child=in_grandchild)


def _die_with_parent(lifeline: socket.socket) -> None:
    if not _kernel_kills_group(lifeline):
        threading.Thread(target=_wait_for_parents_end, args=(lifeline,), daemon=True, name="lifeline").start()
    elif select.select([lifeline], [], [], 0)[0]:  # it died before the kernel was told
        _kill_group()


def _kernel_kills_group(lifeline: socket.socket) -> bool:
    """Have the kernel send SIGKILL to our group on any event of the lifeline; False = it cannot.

    No thread is needed for it (a task may fork), and code that holds the GIL cannot delay it.
    """
    if sys.platform != "linux":
        return False
    import fcntl  # not on Windows

    fd = lifeline.fileno()
    try:
        fcntl.fcntl(fd, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:
        return False
    return True


def _wait_for_parents_end(lifeline: socket.socket) -> None:
    try:
        lifeline.recv(1)
    except OSError:
        pass  # a reset is an end, too
    _kill_group()


def _kill_group() -> None:
    if hasattr(os, "killpg"):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)

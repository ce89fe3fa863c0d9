# SPDX-License-Identifier: MIT
"""What the tests of faults share: a server, a proxy before it, workers behind that, and a client.

By default each fault happens once, with short waits.  With MINIQ_FAULT_ROUNDS set it happens so often
(20 is the full dose), at the length that is promised, and in all its variants.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Set

import pytest
from proxy import Proxy
from servers import RedisServer
from waiting import wait_until
from workers import WorkerProcess

from miniq import MiniQ
from miniq.exceptions import OperationalError

ROUNDS = int(os.environ.get("MINIQ_FAULT_ROUNDS") or 0)
FULL = ROUNDS > 0
#: For variants that tell little beyond the others.
when_full = pytest.mark.skipif(not FULL, reason="only with MINIQ_FAULT_ROUNDS=n")
#: Seconds for a round until it is taken for hanging.
ROUND_LIMIT_S = 150.0
#: Keys that are there only while somebody consumes, or holds messages.
OF_OWNERS = ("unacked", "unacked_index", "_miniq.held.*", "_miniq.early.*", "_miniq.owners", "_miniq.alive.*")

SOURCE = """
    import os
    import time
    from miniq import MiniQ

    app = MiniQ("proj", broker=os.environ["URL"], backend=os.environ["URL"])
    app.conf.update({settings!r})

    def write(name, line):
        with open(name, "a") as file:
            file.write(f"{{line}}\\n")

    def hold_until(name, is_over):
        write("began", name)
        while not is_over():
            time.sleep(0.01)
        write("ended", name)
        return name

    @app.task(acks_late=True, reject_on_worker_lost=True)
    def note(number):
        write("ran", number)
        return number

    @app.task(acks_late=True, reject_on_worker_lost=True)
    def nap(name, seconds):
        end = time.monotonic() + seconds
        return hold_until(name, lambda: time.monotonic() >= end)

    @app.task(acks_late=True, reject_on_worker_lost=True)
    def hold(name, file):
        return hold_until(name, lambda: os.path.exists(file))

    @app.task
    def early_nap(name, seconds):
        end = time.monotonic() + seconds
        return hold_until(name, lambda: time.monotonic() >= end)

    @app.task
    def early_hold(name, file):
        return hold_until(name, lambda: os.path.exists(file))
"""


def rounds() -> Iterator[int]:
    """Give each round its number, and time of its own."""
    for number in range(max(1, ROUNDS)):
        signal.setitimer(signal.ITIMER_REAL, ROUND_LIMIT_S)
        yield number


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def commands_of(server: RedisServer) -> int:
    """Return how many commands a server has carried out, those of scripts too, INFO not."""
    counts = server.info("commandstats")
    return sum(
        int(text.partition("calls=")[2].split(",")[0])
        for name, text in counts.items()
        if name != "cmdstat_info"
    )


class Usage(NamedTuple):
    """What a process has open."""

    threads: int
    descriptors: List[str]

    @classmethod
    def of(cls, pid: int) -> Usage:
        found = []
        for name in sorted(os.listdir(f"/proc/{pid}/fd"), key=int):
            try:
                found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
            except FileNotFoundError:
                continue  # closed meanwhile
        return cls(len(os.listdir(f"/proc/{pid}/task")), found)

    def is_within(self, other: Usage) -> bool:
        return self.threads <= other.threads and len(self.descriptors) <= len(other.descriptors)


class Sender:
    """A thread that calls ``note`` with one number after the other, for the time of a ``with``."""

    def __init__(self, fleet: Fleet, pause_s: float = 0.005) -> None:
        self._fleet = fleet
        self._pause_s = pause_s
        #: The numbers for which the call returned, and what the others said.
        self.accepted: Set[int] = set()
        self.refused: List[str] = []
        self._crash: Optional[BaseException] = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sender")

    def __enter__(self) -> Sender:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._stop.set()
        self._thread.join()
        if self._crash is not None and error is None:
            raise self._crash

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._pause_s):
                number = self._fleet.next_number()
                try:
                    self._fleet.send("note", number)
                    self.accepted.add(number)
                except OperationalError as error:
                    self.refused.append(str(error))
        except BaseException as error:
            self._crash = error
        finally:
            self._fleet.client.producer.close()

    def wait_for_more(self, count: int) -> None:
        """Wait until so many more calls returned."""
        wanted = len(self.accepted) + count
        wait_until(lambda: len(self.accepted) >= wanted or self._crash, 20.0, f"{count} more calls returned")


class Fleet:
    """A server, a proxy before it, workers that go through the proxy, and a client that does not."""

    def __init__(
        self,
        server: RedisServer,
        folder: Path,
        worker_process: Callable[..., WorkerProcess],
        make_app: Callable[..., MiniQ],
        first_number: int,
    ) -> None:
        self.server, self.folder = server, folder
        self.proxy = Proxy(server.port)
        self.workers: List[WorkerProcess] = []
        self._worker_process, self._make_app = worker_process, make_app
        #: Fleets of one test share a folder, so the numbers of their tasks differ.
        self._number = first_number
        self._first_usage: Dict[int, Usage] = {}
        self.client = self.new_client()

    def new_client(self, url: str = "", **settings: Any) -> MiniQ:
        url = url or self.server.url()
        return self._make_app("client", **{"broker": url, "result_backend": url, **settings})

    def start_worker(
        self,
        *args: str,
        env: Optional[Mapping[str, str]] = None,
        lease_s: Optional[float] = None,
        **settings: Any,
    ) -> WorkerProcess:
        """Start a worker with two slots; `settings` are those of its app."""
        if lease_s is not None:
            settings["broker_transport_options"] = {"lease": lease_s}
        env = {"URL": self.proxy.url(self.server.url()), **(env or {})}
        args = ("-c", "2", "-n", f"worker{len(self.workers) + 1}@h", *args)
        self.workers.append(self._worker_process(SOURCE.format(settings=settings), *args, env=env))
        return self.workers[-1]

    def end(self) -> None:
        """End what a test that failed has left: the workers first, while they can reach the server."""
        self.proxy.forward()
        for worker in self.workers:
            if worker.exitcode is None:
                worker.kill()
        self.proxy.stop()

    # -- calls, and what the tasks wrote

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        return self.client.send_task(f"proj.{name}", args, **options)

    def lines(self, name: str) -> List[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def ran(self) -> Set[int]:
        return set(map(int, self.lines("ran")))

    def wait_for_lines(self, name: str, count: int, timeout_s: float = 15.0) -> None:
        wait_until(lambda: len(self.lines(name)) >= count, timeout_s, lambda: f"{count} {name}: {self}")

    def release(self, file: str) -> None:
        """Let go the tasks that hold until there is a file."""
        (self.folder / file).touch()

    # -- what must be so

    def wait_consuming(self, timeout_s: float = 5.0) -> None:
        """Wait until a task runs that is sent now."""
        began_mono = time.monotonic()
        number = self.next_number()
        while True:
            try:
                self.send("note", number, retry=False, timeout=1.0)
                break
            except OperationalError as error:
                assert time.monotonic() - began_mono < timeout_s, f"no call within {timeout_s:g} s: {error}"
                time.sleep(0.02)
        left_s = began_mono + timeout_s - time.monotonic()
        wait_until(lambda: number in self.ran(), left_s, lambda: f"a task runs again: {self}")

    def check_nothing_lost(self, accepted: Set[int]) -> None:
        """Wait until all has run that calls returned for."""

        def missing() -> str:
            left = sorted(accepted - self.ran())
            return f"the rest of {len(accepted)} runs: {left}: {self}"

        wait_until(lambda: accepted <= self.ran(), 30.0, missing)

    def check_no_growth(self) -> None:
        """Compare what the workers have open with the first time that this was called."""
        for worker in self.workers:
            if worker.exitcode is None:
                first = self._first_usage.setdefault(worker.pid, Usage.of(worker.pid))
                wait_until(
                    lambda pid=worker.pid, first=first: Usage.of(pid).is_within(first),  # type: ignore[misc]
                    10.0,
                    lambda pid=worker.pid, first=first: f"{Usage.of(pid)} is not more than {first}",  # type: ignore[misc]
                )

    def check_no_leftovers(self) -> None:
        """Stop the workers; then the server knows nothing of them any more, and holds no message."""
        for worker in self.workers:
            if worker.exitcode is None:
                assert worker.stop() == 0, worker.log
        patterns = (*OF_OWNERS, "celery")
        found = [key.decode() for pattern in patterns for key in self.server.command("KEYS", pattern)]
        assert not found, f"{found}: {self}"
        for worker in self.workers:
            assert "Traceback" not in worker.log, worker.log

    def __repr__(self) -> str:
        return "\n".join(f"{worker}:\n{worker.log[-4000:]}" for worker in self.workers)

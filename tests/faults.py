# SPDX-License-Identifier: MIT
"""What the tests of faults share, whatever the broker: a proxy, workers behind it, a client, what must hold.

By default each fault happens once, with short waits.  With MINIQ_FAULT_ROUNDS set it happens so often
(20 is the full dose), at the length that is promised, and in all its variants.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Set, Tuple, TypeVar

import pytest
from proxy import Proxy
from waiting import wait_until
from workers import WorkerProcess, is_alive

from miniq import MiniQ
from miniq.exceptions import OperationalError

ROUNDS = int(os.environ.get("MINIQ_FAULT_ROUNDS") or 0)
FULL = ROUNDS > 0
#: For variants that tell little beyond the others.
when_full = pytest.mark.skipif(not FULL, reason="only with MINIQ_FAULT_ROUNDS=n")
#: Seconds for a round until it is taken for hanging.
ROUND_LIMIT_S = 150.0
A = TypeVar("A", bound="Activity")

SOURCE = """
    import os
    import time
    from miniq import MiniQ

    app = MiniQ("proj", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
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

    @app.task(acks_late=True, reject_on_worker_lost=True)
    def die(name):
        write("began", name)
        os.kill(os.getpid(), 9)
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


def kill_tree(worker: WorkerProcess) -> None:
    """Kill a worker and its children."""
    worker.send(signal.SIGSTOP)  # or it would replace them
    for pid in worker.children:
        os.kill(pid, signal.SIGKILL)
    worker.kill()


def kill_parent(worker: WorkerProcess) -> None:
    """Kill a worker alone; its children see that, and end."""
    children = worker.children
    worker.kill()
    wait_until(lambda: not any(map(is_alive, children)), 10.0, "the children ended with their parent")


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


class Activity:
    """A thread that does something again and again for the time of a ``with``."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._crash: Optional[BaseException] = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=type(self).__name__)

    def _run(self) -> None:
        raise NotImplementedError

    def __enter__(self: A) -> A:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._stop.set()
        self._thread.join()
        if self._crash is not None and error is None:
            raise self._crash

    def _work(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self._crash = error
        finally:
            self._fleet.client.producer.close()


class Sender(Activity):
    """A thread that calls ``note`` with one number after the other; `options` are those of the calls."""

    def __init__(self, fleet: Fleet, pause_s: float = 0.005, **options: Any) -> None:
        super().__init__(fleet)
        self._pause_s = pause_s
        self._options = options
        #: The numbers for which the call returned, and what the others said.
        self.accepted: Set[int] = set()
        self.refused: List[str] = []

    def _run(self) -> None:
        while not self._stop.wait(self._pause_s):
            number = self._fleet.next_number()
            try:
                self._fleet.send("note", number, **self._options)
                self.accepted.add(number)
            except OperationalError as error:
                self.refused.append(str(error))

    def wait_for_more(self, count: int) -> None:
        """Wait until so many more calls returned."""
        wanted = len(self.accepted) + count
        wait_until(lambda: len(self.accepted) >= wanted or self._crash, 20.0, f"{count} more calls returned")


class Mixture(Activity):
    """A thread that sends tasks of all kinds; all their results are kept."""

    def __init__(self, fleet: Fleet, seed: int, per_second: float) -> None:
        super().__init__(fleet)
        self.results: List[Any] = []
        self._rand, self._per_second = random.Random(seed), per_second

    def _run(self) -> None:
        while not self._stop.wait(self._rand.expovariate(self._per_second)):
            self._send(self._fleet.next_number())

    def _send(self, number: int) -> None:
        fleet, rand = self._fleet, self._rand
        kind = rand.choice(["late", "early", "later", "linked"])
        seconds = rand.choice([0.0, 0.001, 0.02])
        options: Dict[str, Any] = {}
        if kind == "later":
            options["countdown"] = rand.uniform(0.0, 0.5)
        elif kind == "linked":
            task_id = str(uuid.uuid4())
            link = fleet.client.signature("proj.nap", (f"link-{number}", 0), immutable=True)
            options["link"] = link.set(task_id=task_id)
            self.results.append(fleet.client.AsyncResult(task_id))
        name = "early_nap" if kind == "early" else "nap"
        self.results.append(fleet.send(name, f"{kind}-{number}", seconds, **options))


class Fleet:
    """A proxy before a server's `port`, workers that go through the proxy, and a client that does not."""

    def __init__(
        self,
        port: int,
        folder: Path,
        worker_process: Callable[..., WorkerProcess],
        make_app: Callable[..., MiniQ],
        first_number: int,
    ) -> None:
        self.folder = folder
        self.proxy = Proxy(port)
        self.workers: List[WorkerProcess] = []
        self._worker_process, self._make_app = worker_process, make_app
        #: Fleets of one test share a folder, so the numbers of their tasks differ.
        self._number = first_number
        self._first_usage: Dict[int, Usage] = {}
        self.client = self.new_client()

    # -- for the broker's own class to tell

    def urls(self) -> Tuple[str, str]:
        """Return the URLs of broker and result backend, without the proxy."""
        raise NotImplementedError

    def worker_urls(self) -> Tuple[str, str]:
        """Return them as the workers have them, with the proxy."""
        raise NotImplementedError

    def leftovers(self) -> List[str]:
        """Return what the server still holds though no worker is there any more."""
        raise NotImplementedError

    # -- who takes part

    def new_client(self, url: str = "", **settings: Any) -> MiniQ:
        """Return an app; `url` is that of its broker and of its results."""
        broker, backend = (url, url) if url else self.urls()
        return self._make_app("client", **{"broker": broker, "result_backend": backend, **settings})

    def start_worker(
        self, *args: str, env: Optional[Mapping[str, str]] = None, wait: bool = True, **settings: Any
    ) -> WorkerProcess:
        """Start a worker with two slots; `settings` are those of its app."""
        broker, backend = self.worker_urls()
        env = {"BROKER": broker, "BACKEND": backend, **(env or {})}
        args = ("-c", "2", "-n", f"worker{len(self.workers) + 1}@h", *args)
        worker = self._worker_process(SOURCE.format(settings=settings), *args, env=env, wait=wait)
        self.workers.append(worker)
        return worker

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

    def doubles(self, name: str = "ran") -> Dict[str, int]:
        """Return the lines that are there more than once, with how often."""
        return {line: count for line, count in Counter(self.lines(name)).items() if count > 1}

    def wait_for_lines(self, name: str, count: int, timeout_s: float = 15.0) -> None:
        wait_until(lambda: len(self.lines(name)) >= count, timeout_s, lambda: f"{count} {name}: {self}")

    def release(self, file: str) -> None:
        """Let go the tasks that hold until there is a file."""
        (self.folder / file).touch()

    # -- what must be so

    def wait_consuming(self, timeout_s: float = 5.0) -> float:
        """Wait until a task runs that is sent now; return how long that took."""
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
        return time.monotonic() - began_mono

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

    def check_hears_commands(self, timeout_s: float = 15.0) -> None:
        """Tell the workers to leave, until they have."""

        def have_left() -> bool:
            self.client.control.shutdown()
            return all(worker.exitcode is not None for worker in self.workers)

        wait_until(have_left, timeout_s, lambda: f"the workers left: {self}", 0.2)
        assert all(worker.exitcode == 0 for worker in self.workers), self

    def check_no_leftovers(self) -> None:
        """Stop the workers; then the server knows nothing of them any more, and holds no message."""
        for worker in self.workers:
            if worker.exitcode is None:
                assert worker.stop() == 0, worker.log
        found = self.leftovers()
        assert not found, f"{found}: {self}"
        for worker in self.workers:
            assert "Traceback" not in worker.log, worker.log

    def __repr__(self) -> str:
        return "\n".join(f"{worker}:\n{worker.log[-4000:]}" for worker in self.workers)

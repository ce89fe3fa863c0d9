# SPDX-License-Identifier: MIT
"""A small runner for the pool tests, the tasks it knows, and a driver that turns a loop by hand.

A module of its own because spawned children import it.  The body of a run is pickled
``(task name, args)``; the outcome's result is the pickled return value, or the repr of the error.
"""

from __future__ import annotations

import asyncio
import faulthandler
import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

from waiting import wait_until

from miniq.backends.base import StoredResult
from miniq.exceptions import SoftTimeLimitExceeded
from miniq.loop import Loop
from miniq.message import Message
from miniq.pools.base import Job, Lost, Pool, PoolOptions, pool_class
from miniq.runner import Outcome, Run
from miniq.transports.base import Publication

#: Everything here must be over long before; a wait that reaches it is a failed test.
DEADLINE_S = 20.0

TASKS: Dict[str, Callable[..., Any]] = {}


def task(function: Callable[..., Any]) -> Callable[..., Any]:
    TASKS[function.__name__] = function
    return function


@task
def add(a: Any, b: Any) -> Any:
    return a + b


@task
def fail(text: str) -> None:
    raise ValueError(text)


@task
def length(data: bytes) -> int:
    return len(data)


@task
def make(n: int) -> bytes:
    return b"x" * n


@task
def pid() -> int:
    return os.getpid()


@task
def where() -> Tuple[int, str, bool]:
    return os.getpid(), multiprocessing.current_process().name, multiprocessing.current_process().daemon


@task
def thread_name() -> str:
    return threading.current_thread().name


@task
def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


@task
def spin(seconds: float) -> int:
    """Keep the interpreter busy."""
    end, n = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        n += 1
    return n


@task
def nap(seconds: float) -> str:
    """Sleep in short steps, so that an asynchronous exception finds a way in."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.002)
    return "napped"


@task
def blocking_c(seconds: float) -> int:
    """Stay in C code, in pieces of some ms."""
    end, n = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        hashlib.pbkdf2_hmac("sha256", b"p", b"s", 5000)
        n += 1
    return n


@task
def stubborn(seconds: float) -> str:
    """Swallow every exception it can."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            while time.monotonic() < end:
                time.sleep(0.002)
        except Exception:
            pass
    return "stubborn to the end"


@task
def clean_up(seconds: float) -> str:
    try:
        nap(seconds)
    except SoftTimeLimitExceeded:
        return "cleaned up"
    return "not interrupted"


@task
def kill_self(name: str) -> None:
    faulthandler.disable()  # inherited from pytest; a crash on purpose needs no report
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(DEADLINE_S)


@task
def hard_exit(code: int) -> None:
    os._exit(code)


@task
def soft_exit(code: int) -> None:
    sys.exit(code)


@task
def close_all_descriptors() -> None:
    os.closerange(3, 1000)
    time.sleep(DEADLINE_S)


@task
def write_garbage() -> None:
    for fd in range(3, 1000):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                os.write(fd, b"\0\0\0\7garbage")
        except OSError:
            pass
    time.sleep(DEADLINE_S)


@task
def sockets() -> List[str]:
    """Return the sockets that this process has open."""
    return [link for link in open_files() if link.startswith("socket:")]


def open_files() -> List[str]:
    """Return what the descriptors of this process are, stdio excluded."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            if int(fd) > 2:
                links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass  # the listing's own descriptor
    return links


@task
def start_program(path: str) -> int:
    """Start a program that outlives any test, write its pid, and wait."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    _write(path, process.pid)
    return process.wait()


@task
def start_program_and_die(path: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    _write(path, process.pid)
    os._exit(3)


@task
def start_process(path: str) -> None:
    """Fork a process that outlives any test, write its pid, and wait."""
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,))
    process.start()
    _write(path, process.pid)
    process.join()


@task
def use_multiprocessing(n: int) -> int:
    with multiprocessing.Pool(2) as pool:
        return sum(pool.map(abs, range(n)))


@task
def stop_program() -> int:
    """Start a program and end it with SIGTERM, which we ourselves ignore."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    process.terminate()
    return process.wait()


@task
def write_pid_and_nap(path: str, seconds: float) -> str:
    _write(path, os.getpid())
    return nap(seconds)


@task
def eat_memory(mib: int) -> int:
    _eaten.append(bytearray(os.urandom(1024) * 1024 * mib))
    return len(_eaten)


_eaten: List[bytearray] = []


def _write(path: str, number: Optional[int]) -> None:
    with open(path + ".part", "w") as file:
        file.write(str(number))
    os.replace(path + ".part", path)


@task
async def anap(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "napped"


@task
async def aclean_up(seconds: float) -> str:
    try:
        await asyncio.sleep(seconds)
    except SoftTimeLimitExceeded:
        await asyncio.sleep(0)
        return "cleaned up"
    return "not interrupted"


@task
async def astubborn(seconds: float) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            await asyncio.sleep(0.01)
        except (Exception, asyncio.CancelledError):
            pass
    return "stubborn to the end"


@task
async def await_a_task(seconds: float) -> str:
    return await asyncio.ensure_future(asyncio.sleep(seconds, "inner"))


@task
async def cancel_self() -> None:
    current = asyncio.current_task()
    assert current is not None
    current.cancel()
    await asyncio.sleep(DEADLINE_S)


@task
async def use_timeout_after_soft_limit() -> str:
    try:
        await asyncio.sleep(DEADLINE_S)
    except SoftTimeLimitExceeded:
        pass
    try:
        await asyncio.wait_for(asyncio.sleep(DEADLINE_S), 0.02)
    except asyncio.TimeoutError:
        return "timeout works"
    return "no timeout"


@task
async def leave_a_task_behind() -> str:
    _left.append(asyncio.ensure_future(asyncio.sleep(DEADLINE_S)))
    return "left"


_left: "List[asyncio.Future[None]]" = []


class TestRunner:
    __test__ = False

    def __init__(self, log_path: Optional[str]) -> None:
        self.log_path = log_path

    def _log(self, text: str) -> None:
        if self.log_path is not None:
            with open(self.log_path, "a") as file:
                file.write(f"{os.getpid()} {text}\n")

    def process_init(self) -> None:
        self._log("init")

    def thread_exit(self) -> None:
        self._log("thread exit")

    def process_shutdown(self, exitcode: int) -> None:
        self._log(f"shutdown {exitcode}")

    def run(self, run: Run, guard: Any = None) -> Outcome:
        name, args = pickle.loads(run.body)
        try:
            with guard or nullcontext():
                value = TASKS[name](*args)
        except Exception as error:
            return outcome("FAILURE", repr(error))
        return outcome("SUCCESS", value, run)

    async def run_async(self, run: Run, guard: Any = None) -> Outcome:
        name, args = pickle.loads(run.body)
        try:
            with guard or nullcontext():
                value = TASKS[name](*args)
                if asyncio.iscoroutine(value):
                    value = await value
        except Exception as error:
            return outcome("FAILURE", repr(error))
        return outcome("SUCCESS", value, run)


def outcome(state: str, value: Any, run: Optional[Run] = None) -> Outcome:
    result = StoredResult("id", state, pickle.dumps(value), "application/x-pickle", "binary", None)
    followups = []
    if run is not None and run.headers.get("followup"):
        followups = [Publication(Message(run.body, "text/plain", "utf-8", {"n": 1}, {}), "", "next")]
    return Outcome(state, [result], followups, runtime_s=0.25)


class Spec(NamedTuple):
    """Builds a `TestRunner`."""

    log_path: Optional[str] = None

    def build(self) -> Any:
        return TestRunner(self.log_path)


class BrokenSpec(NamedTuple):
    """Fails until the file exists."""

    path: str

    def build(self) -> Any:
        if not os.path.exists(self.path):
            raise LookupError("no such module: shop.tasks")
        return TestRunner(None)


class DyingSpec(NamedTuple):
    """Kills its process."""

    def build(self) -> Any:
        os._exit(7)


class HangingSpec(NamedTuple):
    """Never gets ready."""

    def build(self) -> Any:
        time.sleep(DEADLINE_S * 10)


class Driver:
    """A pool on a loop that the test turns; keeps everything that comes back."""

    def __init__(self, name: str, concurrency: int = 2, spec: Any = None, **options: Any) -> None:
        self.loop = Loop()
        self.pool: Pool = pool_class(name)(
            PoolOptions(concurrency, **options), Spec() if spec is None else spec
        )
        self.came_back: List[Tuple[Job, Union[Outcome, Lost]]] = []
        self.started: List[Tuple[Job, int]] = []
        self.freed = 0
        self.stopped = False
        self.loop_thread = threading.get_ident()
        self.wrong_thread = False
        self.runner_thread: Optional[threading.Thread] = None
        self.pool.start(self.loop, self._on_free)
        if self.pool.runs_in_main_thread:
            self.runner_thread = threading.Thread(target=self.pool.run_forever)
            self.runner_thread.start()

    def _on_free(self) -> None:
        self.freed += 1

    def _on_done(self, job: Job, result: Union[Outcome, Lost]) -> None:
        self.wrong_thread |= threading.get_ident() != self.loop_thread
        self.came_back.append((job, result))

    def _on_start(self, job: Job, pid: int) -> None:
        self.started.append((job, pid))

    def job(
        self,
        name: str,
        *args: Any,
        soft: Optional[float] = None,
        hard: Optional[float] = None,
        wants_start: bool = False,
        headers: Optional[Dict[str, Any]] = None,
    ) -> Job:
        run = Run(pickle.dumps((name, args)), "application/x-pickle", "binary", headers or {}, {}, {})
        return Job(run, self._on_done, self._on_start if wants_start else None, soft, hard)

    def submit(self, name: str, *args: Any, **options: Any) -> Job:
        """Wait for a free slot and submit."""
        job = self.job(name, *args, **options)
        self.until(lambda: self.pool.free_slots > 0, f"a free slot for {name}")
        self.pool.submit(job)
        return job

    def until(self, fact: Callable[[], Any], what: str = "", deadline_s: float = DEADLINE_S) -> None:
        """Turn the loop until `fact()` is true."""
        end = time.monotonic() + deadline_s
        while not fact():
            if time.monotonic() > end:
                raise AssertionError(f"not within {deadline_s} s: {what or fact}; {self.pool.info()}")
            self.loop.run_once(0.05)

    def result(self, job: Job) -> Union[Outcome, Lost]:
        """Wait for the job; it must come back exactly once."""
        self.until(lambda: any(done is job for done, _ in self.came_back), "the job's end")
        results = [result for done, result in self.came_back if done is job]
        assert len(results) == 1, results
        return results[0]

    def value(self, job: Job) -> Any:
        """Wait for the job and return its value; it must have succeeded."""
        result = self.result(job)
        assert isinstance(result, Outcome) and result.state == "SUCCESS", (result, value_of(result))
        return value_of(result)

    def error(self, job: Job) -> BaseException:
        """Wait for the job, which must be lost, and return why."""
        result = self.result(job)
        assert isinstance(result, Lost), (result, value_of(result))
        return result.error

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        return self.value(self.submit(name, *args, **options))

    def all_up(self, n: int) -> None:
        self.until(lambda: self.pool.free_slots == n, f"{n} free slots, now {self.pool.free_slots}")

    def stop(self, within_s: float = float("inf")) -> None:
        """Stop the pool, see that it did, and close the loop."""
        if self.stopped:
            return

        def on_stopped() -> None:
            self.stopped = True

        self.pool.stop(self.loop.mono() + within_s, on_stopped)
        self.until(lambda: self.stopped, "the pool's end")
        if self.runner_thread is not None:
            self.runner_thread.join(DEADLINE_S)
        self.loop.close()
        assert not self.wrong_thread


def value_of(result: Any) -> Any:
    return pickle.loads(result.results[0].body) if isinstance(result, Outcome) else result


def process_exists(number: int) -> bool:
    """Say whether a process lives; a zombie does not."""
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def read_number(path: str) -> int:
    """Wait for a file written by a task and return the number in it."""

    def content() -> str:
        try:
            with open(path) as file:
                return file.read()
        except FileNotFoundError:
            return ""

    return int(wait_until(content, DEADLINE_S, path))

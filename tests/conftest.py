# SPDX-License-Identifier: MIT
"""Fixtures for all tests, and the check at the end that nothing was left behind."""

from __future__ import annotations

import faulthandler
import itertools
import os
import shutil
import signal
import tempfile
import textwrap
import threading
from contextlib import ExitStack
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional

import pytest
from servers import RabbitServer, RedisServer
from workers import TELL_READY, Program, WorkerProcess, children_of, environment

from miniq import MiniQ, _state

#: Processes that multiprocessing itself keeps until the interpreter ends.
KEPT_BY_PYTHON = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


#: Seconds for a test, generously: one that hangs fails then, and the run goes on.
HARD_LIMIT_S = 150.0
#: Databases of the shared redis-server, given to tests in turn.
REDIS_DATABASES = 64
_redis_databases = itertools.cycle(range(REDIS_DATABASES))
#: Lines for the end of the run: what was measured and is not asserted.
TOLD = pytest.StashKey[List[str]]()


@pytest.fixture
def tell(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Print a line at the end of the run."""
    return pytestconfig.stash.setdefault(TOLD, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what tests had to tell."""
    for line in config.stash.get(TOLD, []):
        terminalreporter.write_line(line)


def pytest_configure(config: pytest.Config) -> None:
    """Have a test that hangs show the stacks of all threads, then fail.

    By a signal, not by a watchdog thread: with one, pools would not fork.
    """
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, _give_up)
        # Standard error as it is now, not as it will be captured.
        stderr = os.dup(2)
        config.add_cleanup(lambda: os.close(stderr))
        faulthandler.register(signal.SIGALRM, file=stderr, all_threads=True, chain=True)
        config.add_cleanup(lambda: faulthandler.unregister(signal.SIGALRM))


def _give_up(number: int, frame: Any) -> None:
    pytest.fail(f"over after {HARD_LIMIT_S:g} s: what it was waiting for is at the bottom of the traceback")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Set the alarm for a test."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, HARD_LIMIT_S)
    try:
        yield
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail at the end of the run if a child process or a thread of it still lives."""
    yield
    threads = [
        thread
        for thread in threading.enumerate()
        if thread is not threading.main_thread() and (not thread.daemon or thread.name.startswith("miniq"))
    ]
    assert not threads, f"threads left behind: {threads}"
    children = [
        child
        for child in children_of(os.getpid())
        if not any(kept in child.command for kept in KEPT_BY_PYTHON)
    ]
    assert not children, f"processes left behind: {children}"


@pytest.fixture(scope="session", autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep away from the real folder what processes tell of themselves there: health files, locks, journals.

    Not below `tmp_path`, which other users cannot enter and whose name is long for a socket.
    """
    tmp_path_factory.getbasetemp()  # made by now, that stays where people look for it
    folder = tempfile.mkdtemp(prefix="miniq-tests-")
    os.chmod(folder, 0o1777)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TMPDIR", "TEMP", "TMP"):
            patch.setenv(name, folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield
    # Not now: multiprocessing has a folder in it until the interpreter ends, and -100 is when that goes.
    Finalize(None, shutil.rmtree, (folder, True), exitpriority=-200)


@pytest.fixture(autouse=True)
def no_current_app() -> Iterator[None]:
    """Begin and end every test without a current app, a running task, or new shared tasks."""
    shared = list(_state._shared)
    _forget_apps()
    yield
    _forget_apps()
    _state._shared[:] = shared


def _forget_apps() -> None:
    _state._local.__dict__.clear()
    _state.set_default_app(None)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a SQLite file of this test."""
    return f"sqlite:///{tmp_path}/queue.db"


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The redis-server of all tests that neither stop it nor change its configuration."""
    folder = tmp_path_factory.mktemp("redis")
    with RedisServer(folder, arguments=["--databases", str(REDIS_DATABASES)]) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> Iterator[str]:
    """The URL of a database of the shared server, empty, and of this test alone.

    Pub/sub knows no databases: what is published there, all clients of the server can hear.
    """
    db = next(_redis_databases)
    redis_server.command("FLUSHDB", db=db)
    yield redis_server.url(db)
    redis_server.command("FLUSHDB", db=db)
    # Shown by pytest when the test failed.
    print(f"--- {redis_server}:\n{redis_server.log[-2000:]}")


@pytest.fixture
def new_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RedisServer]]:
    """Start servers for this test alone: ``new_redis(**options of RedisServer)``."""
    with ExitStack() as at_the_end:

        def start(**options: Any) -> RedisServer:
            # Not in tmp_path, whose name may be too long for a Unix socket.
            server = RedisServer(tmp_path_factory.mktemp("redis"), **options)
            at_the_end.callback(lambda: print(f"--- {server}:\n{server.log}"))
            at_the_end.callback(server.stop)
            return server.start()

        yield start


@pytest.fixture(scope="session")
def rabbit_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """The rabbitmq-server of all tests that neither stop it nor change its configuration."""
    with RabbitServer(tmp_path_factory.mktemp("rabbit")) as server:
        yield server
        # What it would keep is of no use.
        server.kill()


@pytest.fixture
def rabbit_url(rabbit_server: RabbitServer) -> Iterator[str]:
    """The URL of a virtual host of the shared server, empty, and of this test alone."""
    vhost = rabbit_server.new_vhost()
    seen = len(rabbit_server.log)
    yield rabbit_server.url(vhost)
    # Shown by pytest when the test failed.
    print(f"--- {rabbit_server}:\n{rabbit_server.log[seen:][-4000:]}")
    rabbit_server.delete_vhost(vhost)


@pytest.fixture
def new_rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RabbitServer]]:
    """Start servers for this test alone: ``new_rabbit(**options of RabbitServer)``."""
    with ExitStack() as at_the_end:

        def start(**options: Any) -> RabbitServer:
            server = RabbitServer(tmp_path_factory.mktemp("rabbit"), **options)
            at_the_end.callback(lambda: print(f"--- {server}:\n{server.log[-8000:]}"))
            at_the_end.callback(server.kill)
            return server.start()

        yield start


@pytest.fixture
def make_app(sqlite_url: str) -> Iterator[Callable[..., MiniQ]]:
    """Make apps: ``make_app(main="tests", **settings)``; the broker is `sqlite_url` unless given."""
    made: List[MiniQ] = []

    def make(main: Optional[str] = "tests", **settings: Any) -> MiniQ:
        if not {"broker", "broker_url"} & set(settings):
            settings["broker"] = sqlite_url
        app = MiniQ(main, **settings)
        made.append(app)
        return app

    yield make
    for app in made:
        app.close()


@pytest.fixture
def worker_process(tmp_path: Path, sqlite_url: str) -> Iterator[Callable[..., WorkerProcess]]:
    """Start workers as real processes: ``worker_process(source, *args, loglevel="INFO")``.

    `source` is the text of the module with the app (and may be indented); where it configures no
    broker, that is `sqlite_url`.  It is written to tmp_path as `module` (default ``proj``); None
    uses the module of that name which is there already.  Returns when the worker takes messages,
    unless `wait` is False.  What still runs at the end of the test is stopped; a worker that does
    not stop, or leaves processes behind, fails the test.
    """
    started: List[WorkerProcess] = []

    def start(
        source: Optional[str],
        *args: str,
        loglevel: str = "INFO",
        module: str = "proj",
        wait: bool = True,
        env: Optional["dict[str, str]"] = None,
    ) -> WorkerProcess:
        if source is not None:
            text = textwrap.dedent(source).rstrip() + TELL_READY
            (tmp_path / f"{module}.py").write_text(text, encoding="utf-8")
        variables = environment(tmp_path, MINIQ_BROKER_URL=sqlite_url, **(env or {}))
        name = f"worker{len(started) + 1}"
        worker = WorkerProcess(module, args, tmp_path, name, loglevel, variables)
        started.append(worker)
        if wait:
            worker.wait_ready()
        return worker

    yield start
    _end(started)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start any command as a process: ``program([sys.executable, ...], folder, env)``."""
    started: List[Program] = []

    def start(
        command: List[str], folder: Optional[Path] = None, env: Optional["dict[str, str]"] = None
    ) -> Program:
        one = Program(command, folder or tmp_path, f"program{len(started) + 1}", env)
        started.append(one)
        return one

    yield start
    _end(started)


def _end(started: "List[Any]") -> None:
    complaints: List[str] = []
    for one in started:
        complaints += one.clean_up()
        # Shown by pytest when the test failed.
        print(f"--- {one}, exit code {one.exitcode}:\n{one.log}")
    assert not complaints, complaints

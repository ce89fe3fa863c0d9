# SPDX-License-Identifier: MIT
"""The handle of a SQLite file: options, schema, waiting for locks, errors that say what to do."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, Iterator, List

import pytest

from miniq.backends import sqlite as sqlite_backend
from miniq.backends.base import StoredResult
from miniq.backends.sqlite import SQLiteBackend
from miniq.connections import sqlite as connection
from miniq.connections.owners import OwnerLocks
from miniq.connections.sqlite import Database, Options, path_of
from miniq.exceptions import (
    BackendGetMetaError,
    BackendStoreError,
    ImproperlyConfigured,
    MiniqError,
    OperationalError,
)
from miniq.message import Message
from miniq.routing import Queue
from miniq.transports.base import Publication
from miniq.transports.sqlite import SQLiteTransport

ROOT = str(Path(__file__).resolve().parent.parent)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "q.db")


@pytest.fixture
def database(path: str) -> Iterator[Database]:
    handle = Database.open(path, Options())
    yield handle
    handle.close()


def publication(task_id: str = "a", body: bytes = b"x") -> Publication:
    return Publication(
        Message(body, "application/json", "utf-8", {"task": "t", "id": task_id}, {}), "", "work"
    )


def transport_of(path: str, **options: Any) -> SQLiteTransport:
    return SQLiteTransport(f"sqlite:///{path}", options, time.time)


def run_python(code: str, *arguments: str) -> str:
    """Run code in another process; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- addresses and options


def test_url_names_a_relative_or_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert path_of("sqlite:///some/q.db") == os.path.realpath("some/q.db")
    assert path_of(f"sqlite:///{tmp_path}/q.db") == os.path.realpath(tmp_path / "q.db")


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite://q.db", "sqlite:///:memory:"])
def test_url_without_a_file_is_refused(url: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="sqlite"):
        path_of(url)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"synchronus": "FULL"}, "did you mean synchronous"),
        ({"visibility_timeout": 3600}, "unknown transport option 'visibility_timeout'.*known: synchronous"),
        ({"synchronous": "MAYBE"}, "one of OFF, NORMAL, FULL, EXTRA, not 'MAYBE'"),
        ({"busy_timeout": -1}, "busy_timeout must be a number"),
        ({"busy_timeout": "1"}, "busy_timeout must be a number"),
    ],
)
def test_wrong_option_is_refused_when_the_transport_is_made(options: Any, text: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=text):
        SQLiteTransport("sqlite:///q.db", options, time.time)


def test_options_are_read_in_any_case() -> None:
    assert Options.read({"synchronous": "off", "busy_timeout": 3}, "url") == Options(
        synchronous="OFF", busy_timeout=3.0
    )


# -- handles


def test_transport_and_backend_of_one_file_share_a_handle(path: str) -> None:
    transport, backend = transport_of(path), SQLiteBackend(f"sqlite:///{path}", {}, time.time)
    with transport.transaction():
        backend.store([StoredResult("a", "SUCCESS", b"", "", "", None)])
        assert set(backend.fetch(["a"])) == {"a"}
        other = sqlite3.connect(path)
        assert other.execute("SELECT count(*) FROM results").fetchone() == (0,)
        other.close()
    transport.close()
    assert set(backend.fetch(["a"])) == {"a"}
    backend.close()
    assert set(backend.fetch(["a"])) == {"a"}
    backend.close()


def test_transport_in_another_thread_gets_a_handle_of_its_own(path: str) -> None:
    transport = transport_of(path)
    transport.publish([publication("a")], 5)
    first = transport._db
    seen: List[Any] = []

    def run() -> None:
        transport.publish([publication("b")], 5)
        seen.append(transport._db)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen[0] is not first
    assert transport.sizes()[0].ready == 2
    transport.close()


def test_handle_of_a_finished_thread_is_closed(path: str) -> None:
    def run() -> None:
        transport_of(path).publish([publication()], 5)

    def descriptors() -> int:
        return sum(
            os.path.realpath(f"/proc/self/fd/{fd}").startswith(path) for fd in os.listdir("/proc/self/fd")
        )

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    for _ in range(3):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    gc.collect()
    assert descriptors() == 0


def test_program_that_closes_nothing_ends_in_silence(path: str) -> None:
    code = """
        import sys, threading, time
        from miniq.backends.sqlite import SQLiteBackend
        from miniq.message import Message
        from miniq.routing import Queue
        from miniq.transports.base import Publication
        from miniq.transports.sqlite import SQLiteTransport
        transport = SQLiteTransport(sys.argv[1], {}, time.time)
        transport.publish([Publication(Message(b"", "", "", {"id": "a"}, {}), "", "work")], 5)
        backend = SQLiteBackend(sys.argv[1], {}, time.time)
        backend.fetch(["a"])
        thread = threading.Thread(target=lambda: transport.sizes())
        thread.start()
        thread.join()
    """
    done = subprocess.run(
        [sys.executable, "-W", "always", "-X", "dev", "-c", textwrap.dedent(code), f"sqlite:///{path}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_swallowed_error_of_a_nested_transaction_fails_the_outer_one(database: Database) -> None:
    with (
        pytest.raises(OperationalError, match="a part of the transaction had failed"),
        database.transaction(),
    ):
        database.write("INSERT INTO revoked VALUES('a', 1)")
        with pytest.raises(ZeroDivisionError), database.transaction():
            raise ZeroDivisionError
    assert database.read("SELECT * FROM revoked") == []
    with database.transaction():
        database.write("INSERT INTO revoked VALUES('a', 1)")
    assert len(database.read("SELECT * FROM revoked")) == 1


def test_transaction_without_a_write_takes_no_lock(database: Database, path: str) -> None:
    other = sqlite3.connect(path, timeout=0, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with database.transaction():
        assert database.read("SELECT * FROM revoked") == []
    other.close()


def test_publish_is_synced_and_a_workers_turn_is_not(path: str) -> None:
    transport = transport_of(path)
    transport.publish([publication()], 5)
    db = transport._database()
    level = "PRAGMA synchronous"
    assert db.read(level) == [(2,)]
    consumer = transport.consumer("w", [Queue("work")])
    with transport.transaction():
        assert consumer.ack(consumer.poll(1)[0])
        transport.publish([publication("b")], 5)
    assert db.read(level) == [(1,)]
    transport.publish([publication("c")], 5)
    assert db.read(level) == [(2,)]
    transport.close()


# -- schema


def test_many_processes_create_one_schema(path: str) -> None:
    code = """
        import sys, time
        from miniq.connections.sqlite import Database, Options
        while time.time() < float(sys.argv[2]): pass
        Database.open(sys.argv[1], Options()).close()
    """
    start = str(time.time() + 0.7)
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(code), path, start],
            cwd=ROOT,
            stderr=subprocess.PIPE,
        )
        for _ in range(6)
    ]
    for child in children:
        assert child.communicate(timeout=60)[1] == b""
        assert child.returncode == 0
    with sqlite3.connect(path) as plain:
        assert plain.execute("PRAGMA user_version").fetchone() == (len(connection.MIGRATIONS),)
        assert plain.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    plain.close()


def test_file_of_a_newer_miniq_is_refused(path: str, database: Database) -> None:
    database.connection.execute("PRAGMA user_version=99")
    database.close()
    with pytest.raises(ImproperlyConfigured, match="schema 99.*upgrade miniq"):
        Database.open(path, Options())
    database.users = 0


def test_database_of_another_program_is_refused_and_left_alone(path: str) -> None:
    plain = sqlite3.connect(path)
    plain.execute("CREATE TABLE messages(mine)")
    plain.close()
    before = Path(path).read_bytes()
    with pytest.raises(ImproperlyConfigured, match="another program"):
        Database.open(path, Options())
    assert Path(path).read_bytes() == before


# -- things that are wrong with the file


def test_missing_folder_and_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImproperlyConfigured, match="folder .*nowhere' does not exist"):
        transport_of(str(tmp_path / "nowhere" / "q.db")).publish([publication()], 1)
    with pytest.raises(ImproperlyConfigured, match="is a directory"):
        transport_of(str(tmp_path)).sizes()


def test_file_that_is_no_database_is_named(path: str) -> None:
    Path(path).write_text("this is a letter to my aunt, not a database at all\n" * 200)
    with pytest.raises(ImproperlyConfigured, match="q.db' is not a database"):
        Database.open(path, Options())


def test_result_that_no_row_can_hold_is_refused_alone(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_backend, "MAX_BODY_BYTES", 10)
    backend = SQLiteBackend(f"sqlite:///{path}", {}, time.time)
    with pytest.raises(BackendStoreError, match="a result of 11 bytes is too large") as caught:
        backend.store([StoredResult("a", "SUCCESS", b"x" * 11, "", "", None)])
    assert (caught.value.task_id, caught.value.state) == ("a", "SUCCESS")
    backend.close()


def test_damaged_file_is_named_with_what_to_do(path: str) -> None:
    transport = transport_of(path)
    transport.publish([publication(str(n), b"x" * 500) for n in range(200)], 5)
    transport.close()
    content = bytearray(Path(path).read_bytes())
    for page in range(1, len(content) // 4096):
        content[page * 4096 : page * 4096 + 200] = b"\xff" * 200
    Path(path).write_bytes(content)
    with pytest.raises(ImproperlyConfigured, match=r"q.db' is damaged .*\.recover"):
        transport.consumer("w", [Queue("work")])
    transport.close()


def test_small_file_is_checked_when_a_worker_follows_one_that_was_killed(path: str) -> None:
    code = """
        import os, signal, sys, time
        from miniq.routing import Queue
        from miniq.transports.sqlite import SQLiteTransport
        SQLiteTransport(sys.argv[1], {}, time.time).consumer("dead", [Queue("work")])
        os._exit(0)
    """
    run_python(code, f"sqlite:///{path}")
    database = Database.open(path, Options())
    database.read("PRAGMA wal_checkpoint(TRUNCATE)")
    (page,) = database.read("SELECT rootpage FROM sqlite_master WHERE name='results_expires'")[0]
    database.close()
    # A page that nothing would touch for a long time.
    with open(path, "r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 100)
    transport = transport_of(path)
    with pytest.raises(ImproperlyConfigured, match="is damaged"):
        transport.consumer("w", [Queue("work")])
    transport.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs users as on Unix")
def test_read_only_file_can_be_read_and_says_so_when_written() -> None:
    folder = Path(tempfile.mkdtemp())  # not tmp_path, which other users cannot enter
    path = str(folder / "q.db")
    backend = SQLiteBackend(f"sqlite:///{path}", {}, time.time)
    backend.store([StoredResult("a", "SUCCESS", b"", "", "", None)])
    transport = transport_of(path)
    code = """
        import os, sys, time
        from miniq.backends.sqlite import SQLiteBackend
        from miniq.exceptions import ImproperlyConfigured
        from miniq.transports.sqlite import SQLiteTransport
        if os.getuid() == 0:
            os.setuid(65534)
        print(list(SQLiteBackend(sys.argv[1], {}, time.time).fetch(["a"])))
        try:
            SQLiteTransport(sys.argv[1], {}, time.time).revoke(["a"], 1.0)
        except ImproperlyConfigured as error:
            print(error)
    """
    transport.sizes()
    for file in folder.iterdir():
        os.chmod(file, 0o444)
    os.chmod(folder, 0o555)
    try:
        shown = run_python(code, f"sqlite:///{path}")
    finally:
        os.chmod(folder, 0o755)
        transport.close()
        backend.close()
        shutil.rmtree(folder)
    assert shown.splitlines()[0] == "['a']"
    assert "is read-only: let this user write to both" in shown


def test_full_disk_stores_nothing_and_heals(path: str) -> None:
    transport = transport_of(path)
    transport.publish([publication("before")], 5)
    db = transport._database()
    (pages,) = db.read("PRAGMA page_count")[0]
    db.read(f"PRAGMA max_page_count={pages + 2}")
    with pytest.raises(OperationalError, match="the disk is full.*free space"):
        transport.publish([publication(str(n), b"x" * 3000) for n in range(20)], 5)
    assert transport.sizes()[0].ready == 1
    backend = SQLiteBackend(f"sqlite:///{path}", {}, time.time)
    with pytest.raises(BackendStoreError, match="the disk is full"):
        backend.store([StoredResult("a", "SUCCESS", b"x" * 100_000, "", "", None)])
    with pytest.raises(OperationalError, match="the disk is full"), transport.transaction():
        backend.store([StoredResult("a", "SUCCESS", b"x" * 100_000, "", "", None)])
    db.read(f"PRAGMA max_page_count={pages + 1000}")
    transport.publish([publication("after")], 5)
    backend.store([StoredResult("a", "SUCCESS", b"x" * 100_000, "", "", None)])
    assert transport.sizes()[0].ready == 2
    transport.close()
    backend.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE as on Linux")
def test_write_that_the_system_refuses_is_an_operational_error(path: str) -> None:
    code = """
        import resource, sys, time
        from miniq.exceptions import OperationalError
        from miniq.message import Message
        from miniq.transports.base import Publication
        from miniq.transports.sqlite import SQLiteTransport
        transport = SQLiteTransport(sys.argv[1], {}, time.time)
        def put(n, size):
            message = Message(b"x" * size, "", "", {"id": str(n)}, {})
            transport.publish([Publication(message, "", "work")], 5)
        put(0, 10)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        done = 0
        try:
            for n in range(1000):
                put(n, 3000)
                done += 1
        except OperationalError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        put(0, 10)
        assert transport.sizes()[0].ready == done + 2, (transport.sizes(), done)
        assert transport._database().read("PRAGMA integrity_check") == [("ok",)]
        transport.close()
    """
    shown = run_python(code, f"sqlite:///{path}")
    assert "nothing was stored" in shown


def test_network_file_system_is_warned_of_once(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not os.path.exists("/proc/mounts"):
        pytest.skip("needs /proc/mounts")
    kinds = {line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()}
    monkeypatch.setattr(connection, "_NETWORK_FILE_SYSTEMS", kinds)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            Database.open(path, Options()).close()
    assert [record.getMessage().count("network file system") for record in caplog.records] == [1]


# -- waiting for locks


def hold_lock(path: str, seconds: float, locking: str = "NORMAL") -> "subprocess.Popen[str]":
    """Let another process hold the write lock; returns when it has it."""
    code = """
        import sqlite3, sys, time
        c = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)
        c.execute("PRAGMA locking_mode=" + sys.argv[3])
        c.execute("BEGIN EXCLUSIVE")
        c.execute("INSERT INTO revoked VALUES('lock', 1)")
        print("locked", flush=True)
        time.sleep(float(sys.argv[2]))
        c.execute("ROLLBACK")
        c.close()
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), path, str(seconds), locking],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "locked\n"
    return child


def end(child: "subprocess.Popen[str]") -> None:
    child.communicate(timeout=30)


def test_publish_waits_for_the_lock_of_another_process(path: str) -> None:
    transport = transport_of(path)
    transport.sizes()
    holder = hold_lock(path, 1.0)
    transport.publish([publication()], 30)
    assert transport.sizes()[0].ready == 1
    transport.close()
    end(holder)


def test_publish_gives_up_at_its_deadline(path: str) -> None:
    transport = transport_of(path)
    transport.sizes()
    holder = hold_lock(path, 60)
    before = time.monotonic()
    with pytest.raises(OperationalError, match=r"q.db' stayed locked by another process for 0.2 s"):
        transport.publish([publication()], 0.2)
    assert time.monotonic() - before >= 0.2
    holder.kill()
    end(holder)
    assert transport.sizes() == []
    transport.close()


def test_worker_does_not_wait_long_for_the_lock(path: str) -> None:
    transport = transport_of(path)
    transport.publish([publication()], 5)
    consumer = transport.consumer("w", [Queue("work")])
    holder = hold_lock(path, 60)
    with (
        pytest.raises(OperationalError, match="locked by another process for 0.05 s"),
        transport.transaction(),
    ):
        consumer.poll(1)
    backend = SQLiteBackend(f"sqlite:///{path}", {}, time.time)
    with pytest.raises(BackendStoreError, match="locked") as caught:
        backend.store([StoredResult("a", "SUCCESS", b"", "", "", None)])
    assert (caught.value.task_id, caught.value.state) == ("a", "SUCCESS")
    assert isinstance(caught.value.__cause__, OperationalError)
    holder.kill()
    end(holder)
    assert len(consumer.poll(1)) == 1
    transport.close()
    backend.close()


def test_start_of_a_consumer_waits_for_the_lock(path: str) -> None:
    transport = transport_of(path)
    transport.consumer("first", [Queue("work")])
    holder = hold_lock(path, 0.5)
    transport.consumer("second", [Queue("work")])
    end(holder)
    transport.close()


def test_reader_waits_for_an_exclusive_user_of_the_file(path: str) -> None:
    Database.open(path, Options()).close()
    holder = hold_lock(path, 0.5, "EXCLUSIVE")
    backend = SQLiteBackend(f"sqlite:///{path}", {}, time.time)
    assert backend.fetch(["a"]) == {}
    backend.close()
    end(holder)
    holder = hold_lock(path, 60, "EXCLUSIVE")
    impatient = SQLiteBackend(f"sqlite:///{path}", {"busy_timeout": 0.1}, time.time)
    with pytest.raises(MiniqError, match="locked by another process for 0.1 s") as caught:
        impatient.fetch(["a"])
    assert isinstance(caught.value, BackendGetMetaError)
    holder.kill()
    end(holder)


# -- owners


def test_owner_lives_as_long_as_its_process_holds_the_byte(path: str) -> None:
    locks = OwnerLocks.of(path)
    assert OwnerLocks.of(path) is locks
    locks.take(7)
    code = """
        import sys
        from miniq.connections.owners import OwnerLocks
        locks = OwnerLocks.of(sys.argv[1])
        print([locks.is_alive(owner) for owner in (6, 7, 8)])
    """
    assert run_python(code, path) == "[False, True, False]\n"
    assert [locks.is_alive(owner) for owner in (6, 7, 8)] == [False, True, False]
    # Looking at others must not have dropped the own lock.
    assert run_python(code, path) == "[False, True, False]\n"
    locks.drop(7)
    assert run_python(code, path) == "[False, False, False]\n"
    assert locks._fd == -1


# -- the log


def test_log_is_cut_back_after_a_long_reader(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_WAL_BYTES", 100_000)
    transport = transport_of(path)
    consumer = transport.consumer("w", [Queue("work")])
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM messages").fetchone()
    for n in range(50):
        transport.publish([publication(str(n), b"x" * 100_000)], 5)
    assert os.stat(path + "-wal").st_size > 1_000_000
    consumer.housekeep()
    reader.close()
    consumer.housekeep()
    assert os.stat(path + "-wal").st_size <= 100_000
    transport.close()

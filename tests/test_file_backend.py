# SPDX-License-Identifier: MIT
"""Results as files: names, ends, what others write beside us, locks between processes, failures."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest
from waiting import wait_until
from workers import Program, WorkerProcess, environment

from miniq import MiniQ
from miniq.backends import files
from miniq.backends.base import StoredResult
from miniq.backends.files import FileBackend, folder_of
from miniq.exceptions import (
    BackendError,
    BackendGetMetaError,
    BackendStoreError,
    ImproperlyConfigured,
    OperationalError,
)
from miniq.serialization import compress


def result(task_id: str, state: str = "SUCCESS", value: Any = None, expires_s: Any = None) -> StoredResult:
    body = json.dumps({"status": state, "result": value, "task_id": task_id}).encode()
    return StoredResult(task_id, state, body, "application/json", "utf-8", expires_s)


class Wall:
    """Now, and a while that a test lets pass."""

    passed_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.passed_s


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def backend(folder: Path, wall: Wall) -> Iterator[FileBackend]:
    made = FileBackend(f"file://{folder}", {}, wall)
    yield made
    made.close()


def visible(folder: Path) -> List[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".miniq-locks")


# -- names -----------------------------------------------------------------------------------------


def test_result_is_a_file_of_celerys_name_that_holds_the_meta_alone(
    backend: FileBackend, folder: Path
) -> None:
    stored = result("0b3d-1", expires_s=60.0)
    backend.store([stored])
    assert visible(folder) == ["celery-task-meta-0b3d-1"]
    assert (folder / "celery-task-meta-0b3d-1").read_bytes() == stored.body


def test_file_that_celery_wrote_is_read_and_kept(backend: FileBackend, folder: Path, wall: Wall) -> None:
    folder.mkdir()
    (folder / "celery-task-meta-one").write_bytes(result("one", "FAILURE").body)
    assert backend.fetch(["one"]) == {"one": result("one", "FAILURE")}
    wall.passed_s = 1e8
    assert backend.expire() == 0
    assert set(backend.fetch(["one"])) == {"one"}


def test_global_key_prefix_keeps_apps_apart(folder: Path, backend: FileBackend, wall: Wall) -> None:
    other = FileBackend(f"file://{folder}", {"global_keyprefix": "app2"}, wall)
    other.store([result("one", expires_s=10.0)])
    assert visible(folder) == ["app2_celery-task-meta-one"]
    wall.passed_s = 20
    assert backend.fetch(["one"]) == {}
    assert (backend.expire(), other.expire()) == (0, 1)


def test_no_id_leaves_the_folder(tmp_path: Path, backend: FileBackend, folder: Path) -> None:
    seed = random.randrange(10**9)
    chance = random.Random(seed)
    ids = ["..", "../../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "x" * 5000, "ü" * 200, "a\n", " ", "."]
    ids += ["\ud800", "con", "a.", "a ", "../celery-task-meta-x", "a/../b", ":", "A", "a"]
    letters = string.printable + "äß/\\.\0"
    ids += ["".join(chance.choices(letters, k=chance.randrange(1, 300))) for _ in range(200)]
    ids = list(dict.fromkeys(ids))
    backend.store([result(task_id, value=number) for number, task_id in enumerate(ids)])
    found = backend.fetch(ids)
    for number, task_id in enumerate(ids):
        assert json.loads(found[task_id].body)["result"] == number, f"seed {seed}: {task_id!r}"
    assert os.listdir(tmp_path) == ["results"], f"seed {seed}"
    names = visible(folder)
    assert len(names) == len(ids)
    assert all(name.startswith("celery-task-meta-") and len(name) < 200 for name in names), f"seed {seed}"
    backend.forget(ids)
    assert visible(folder) == []


# -- ends ------------------------------------------------------------------------------------------


def test_end_is_the_modification_time_and_what_is_kept_has_none(backend: FileBackend, folder: Path) -> None:
    before = time.time()
    backend.store([result("one", expires_s=3600.0), result("kept")])
    ends = {name: (folder / f"celery-task-meta-{name}").stat() for name in ("one", "kept")}
    assert before + 3600 - 0.001 <= ends["one"].st_mtime <= time.time() + 3600
    assert ends["kept"].st_mtime_ns <= ends["kept"].st_ctime_ns
    assert backend.fetch(["kept"])["kept"].expires_s is None


def test_result_that_is_over_is_replaced_by_a_weaker_one(backend: FileBackend, wall: Wall) -> None:
    backend.store([result("one", expires_s=10.0)])
    wall.passed_s = 11
    backend.store([result("one", "STARTED", expires_s=10.0)])
    assert backend.fetch(["one"])["one"].state == "STARTED"


def test_file_that_was_touched_after_its_end_loses_the_end_not_its_life(
    backend: FileBackend, folder: Path, wall: Wall
) -> None:
    backend.store([result("one", expires_s=10.0)])
    os.utime(folder / "celery-task-meta-one")
    wall.passed_s = 1e6
    assert backend.expire() == 0
    assert set(backend.fetch(["one"])) == {"one"}


def test_expire_goes_on_where_it_ended_and_leaves_nothing_open(
    backend: FileBackend, folder: Path, wall: Wall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "EXPIRE_PORTION", 10)
    backend.store([result(str(number), expires_s=10.0) for number in range(25)])
    assert backend.expire() == 0
    wall.passed_s = 11
    # Left in the middle, the folder is still open; a lock folder is among its entries.
    removed = [backend.expire() for _ in range(5)]
    assert sum(removed) == 25 and max(removed) == 10
    assert visible(folder) == []
    backend.expire()
    backend.close()


def test_result_that_was_renewed_while_expire_looked_stays(
    backend: FileBackend, folder: Path, wall: Wall, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = FileBackend(f"file://{folder}", {}, wall)
    backend.store([result("one", expires_s=10.0)])
    wall.passed_s = 11
    locked = FileBackend._locked

    def renewed(self: FileBackend, lock: int) -> Any:
        if self is backend:
            other.store([result("one", "STARTED", expires_s=60.0)])
        return locked(self, lock)

    monkeypatch.setattr(FileBackend, "_locked", renewed)
    assert backend.expire() == 0
    assert backend.fetch(["one"])["one"].state == "STARTED"


def test_half_written_files_of_killed_processes_are_removed(
    backend: FileBackend, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.store([result("one")])
    (folder / ".miniq-0011223344556677.tmp").write_bytes(b"{")
    backend.expire()
    assert len(visible(folder)) == 2
    monkeypatch.setattr(files, "LEFTOVER_S", -1.0)
    assert backend.expire() == 0
    assert visible(folder) == ["celery-task-meta-one"]


# -- what others leave there -----------------------------------------------------------------------


def test_empty_file_is_no_result_yet(backend: FileBackend, folder: Path) -> None:
    folder.mkdir()
    (folder / "celery-task-meta-one").write_bytes(b"")
    assert backend.fetch(["one"]) == {}
    backend.store([result("one")])
    assert set(backend.fetch(["one"])) == {"one"}


def test_garbage_is_an_error_that_names_the_file_and_is_mended_by_the_next_result(
    backend: FileBackend, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir()
    (folder / "celery-task-meta-one").write_bytes(b"garbage")
    with pytest.raises(BackendGetMetaError, match="celery-task-meta-one.* holds no result") as caught:
        backend.fetch(["one"])
    assert caught.value.task_id == "one"
    backend.store([result("one")])
    assert "it is replaced" in caplog.text
    assert set(backend.fetch(["one"])) == {"one"}


def test_compressed_result_is_handed_out_as_its_serializer_wrote_it(
    backend: FileBackend, folder: Path
) -> None:
    folder.mkdir()
    packed, content_type = compress(result("one").body, "bzip2")
    value = b"\0celery-compressed\0" + content_type.encode() + b"\0" + packed
    (folder / "celery-task-meta-one").write_bytes(value)
    assert backend.fetch(["one"]) == {"one": result("one")}
    backend.store([result("one", "FAILURE")])
    assert backend.fetch(["one"])["one"].state == "SUCCESS"


# -- waiting ---------------------------------------------------------------------------------------


def test_waiting_reads_a_file_only_when_it_changed(
    backend: FileBackend, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: List[str] = []
    read = FileBackend._read

    def counted(self: FileBackend, path: str, now: float) -> Any:
        reads.append(path)
        return read(self, path, now)

    backend.store([result("one", "STARTED")])
    monkeypatch.setattr(FileBackend, "_read", counted)
    monkeypatch.setattr(files, "TICK_S", -1.0)
    assert list(backend.wait(["one", "two"], 0.1)) == []
    assert len(reads) == 1
    # In place, as Celery writes.
    with open(folder / "celery-task-meta-one", "wb") as file:
        file.write(result("one").body)
    assert [found.state for found in backend.wait(["one"], 10.0)] == ["SUCCESS"]
    assert len(reads) == 2


def test_changes_within_one_tick_of_the_files_clock_are_seen(
    backend: FileBackend, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    path = folder / "celery-task-meta-one"
    path.write_bytes(result("one", "STARTED", 0).body)
    # As where the clock is coarse: inode, size and times are what they were.
    before = path.stat()
    monkeypatch.setattr(files, "_stat", lambda _: before)
    monkeypatch.setattr(files, "TICK_S", 1000.0)
    waiting = backend.wait(["one"], 5.0, unready=True)
    for number in range(1, 5):
        assert json.loads(next(waiting).body)["result"] == number - 1
        path.write_bytes(result("one", "STARTED", number).body)
    waiting.close()  # type: ignore[attr-defined]


# -- the folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///var/results", "/var/results"),
        ("file:///var/results/", "/var/results"),
        ("file://localhost/var/results", "/var/results"),
        ("file://results", "{cwd}/results"),
        ("file://./some/results", "{cwd}/some/results"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="paths of another kind")
def test_folder_in_a_url_is_read_as_celery_does(url: str, path: str) -> None:
    assert folder_of(url) == os.path.realpath(path.format(cwd=os.getcwd()))


@pytest.mark.parametrize("url", ["file://", "file:///", "file://localhost/"])
def test_url_without_a_folder_is_refused(url: str, wall: Wall) -> None:
    with pytest.raises(ImproperlyConfigured, match="names no folder"):
        FileBackend(url, {}, wall)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"global_key_prefix": "x"}, "did you mean global_keyprefix"),
        ({"socket_timeout": 1}, "unknown transport option 'socket_timeout'"),
        ({"global_keyprefix": "../x"}, "begins a file name"),
        ({"global_keyprefix": 3}, "begins a file name"),
    ],
)
def test_wrong_option_is_refused(options: Dict[str, Any], text: str, wall: Wall) -> None:
    with pytest.raises(ImproperlyConfigured, match=text):
        FileBackend("file:///tmp", options, wall)


def test_nothing_is_touched_before_it_is_used(folder: Path, backend: FileBackend) -> None:
    assert not folder.exists()
    assert backend.fetch(["one"]) == {}
    assert visible(folder) == []


def test_missing_parent_is_not_made(tmp_path: Path, wall: Wall) -> None:
    backend = FileBackend(f"file://{tmp_path}/not_mounted/results", {}, wall)
    for call in (lambda: backend.fetch(["one"]), lambda: backend.store([result("one")]), backend.expire):
        with pytest.raises(ImproperlyConfigured, match="not_mounted/results.* cannot be used: No such"):
            call()


def test_file_in_the_place_of_the_folder_is_named(folder: Path, backend: FileBackend) -> None:
    folder.write_text("")
    with pytest.raises(ImproperlyConfigured, match="results' cannot be used"):
        backend.store([result("one")])


@pytest.mark.skipif(not hasattr(os, "setresuid"), reason="no way to be another user for a while")
def test_folder_without_the_right_to_write_is_named_and_still_read(wall: Wall) -> None:
    nobody = 65534 if os.geteuid() == 0 else os.geteuid()
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        backend = FileBackend(f"file://{parent}/results", {}, wall)
        backend.store([result("one")])
        locks = os.path.join(parent, "results")
        os.chmod(locks, 0o555)
        before = os.getresuid()
        os.setresuid(nobody, nobody, -1)
        try:
            other = FileBackend(f"file://{parent}/results", {}, wall)
            assert set(other.fetch(["one"])) == {"one"}
            with pytest.raises(ImproperlyConfigured, match="results' cannot be used: no permission to write"):
                other.store([result("two")])
        finally:
            os.setresuid(*before)
            os.chmod(locks, 0o755)


def test_folder_that_was_deleted_is_made_again_by_the_next_try(folder: Path, backend: FileBackend) -> None:
    backend.store([result("one")])
    for path in [*folder.rglob("*")][::-1]:
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    assert backend.fetch(["one"]) == {}
    with pytest.raises(BackendStoreError) as caught:
        backend.store([result("two")])
    assert isinstance(caught.value.__cause__, OperationalError)
    backend.store([result("two")])
    assert set(backend.fetch(["one", "two"])) == {"two"}


def test_failed_write_leaves_the_old_result_and_no_half_file(backend: FileBackend, folder: Path) -> None:
    resource = pytest.importorskip("resource")
    backend.store([result("one", "STARTED")])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(BackendStoreError, match="cannot be written: File too large") as caught:
            backend.store([result("one", value="x" * 5000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.task_id == "one"
    assert isinstance(caught.value.__cause__, OperationalError)
    assert visible(folder) == ["celery-task-meta-one"]
    assert backend.fetch(["one"])["one"].state == "STARTED"


# -- processes -------------------------------------------------------------------------------------

RACER = """
import json, sys, time
from miniq.backends.base import StoredResult
from miniq.backends.files import FileBackend

url, me = sys.argv[1:]
backend = FileBackend(url, {}, time.time)
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    for state in ("STARTED", "FAILURE", "SUCCESS", "RETRY"):
        body = json.dumps({"status": state, "result": me}).encode()
        backend.store([StoredResult(str(number), state, body, "", "", 60.0)])
    found = backend.fetch([str(number)])[str(number)]
    assert found.state == "SUCCESS", found
    print(number, json.loads(found.body)["result"])
"""


def test_processes_that_race_agree_on_the_first_success(tmp_path: Path, folder: Path) -> None:
    command = [sys.executable, "-c", RACER, f"file://{folder}"]
    pipe = subprocess.PIPE
    racers = [
        subprocess.Popen([*command, str(me)], stdin=pipe, stdout=pipe, text=True, env=environment(tmp_path))
        for me in range(3)
    ]
    told = []
    try:
        for racer in racers:
            assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        for racer in racers:
            told.append(racer.communicate(timeout=60)[0].split("\n"))
            assert racer.returncode == 0
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert len(told[0]) == 101
    assert told[0] == told[1] == told[2]
    assert len(visible(folder)) == 100


def test_lock_of_another_is_waited_for_until_the_deadline(
    backend: FileBackend, folder: Path, wall: Wall, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.store([result("one", "STARTED")])
    monkeypatch.setattr(files, "LOCK_TIMEOUT_S", 0.05)
    other = FileBackend(f"file://{folder}", {}, wall)
    with other._locked(files._lock_of("celery-task-meta-one")):
        with pytest.raises(BackendStoreError, match="locked for 0.05 s by another process") as caught:
            backend.store([result("one")])
        # Reading needs no lock.
        assert backend.fetch(["one"])["one"].state == "STARTED"
    assert isinstance(caught.value.__cause__, OperationalError)
    backend.store([result("one")])
    assert backend.fetch(["one"])["one"].state == "SUCCESS"


def test_lock_of_a_killed_process_is_free(
    backend: FileBackend, folder: Path, tmp_path: Path, program: Callable[..., Program]
) -> None:
    code = (
        "import sys, time; from miniq.backends import files\n"
        "backend = files.FileBackend(sys.argv[1], {}, time.time); backend._check(writable=True)\n"
        "with backend._locked(files._lock_of('celery-task-meta-one')):\n"
        "    print('locked', flush=True); time.sleep(60)\n"
    )
    holder = program([sys.executable, "-c", code, f"file://{folder}"], env=environment(tmp_path))
    holder.wait_for("locked")
    storing = threading.Thread(target=backend.store, args=([result("one")],))
    storing.start()
    holder.kill()
    storing.join()
    assert set(backend.fetch(["one"])) == {"one"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_looks_through_the_folder_on_its_own(
    backend: FileBackend, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "EXPIRE_PORTION", 1000)
    backend.store([result("one")])
    # More than the system library reads of a folder at once.
    for number in range(3000):
        (folder / f"celery-task-meta-{number}").touch()
    seen = len(list(backend._portion()))
    child = os.fork()
    if child == 0:
        try:
            for _ in range(4):
                backend.expire()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    while backend._scan is not None:
        seen += len(list(backend._portion()))
    assert seen == 3002  # and the locks


# -- through an app --------------------------------------------------------------------------------

PROJECT = """
    from miniq import MiniQ

    app = MiniQ("proj", backend={backend!r}, task_track_started=True, result_expires=60)

    @app.task
    def add(x, y):
        return x + y

    @app.task
    def fail():
        raise KeyError("nope")
"""


def test_results_of_a_real_worker_are_waited_for(
    folder: Path, make_app: Callable[..., MiniQ], worker_process: Callable[..., WorkerProcess]
) -> None:
    app = make_app("proj", backend=f"file://{folder}")
    worker = worker_process(PROJECT.format(backend=f"file://{folder}"), "-P", "solo")
    added = [app.send_task("proj.add", (number, 1)) for number in range(5)]
    failed = app.send_task("proj.fail")
    assert [one.get(timeout=20) for one in added] == [1, 2, 3, 4, 5]
    with pytest.raises(KeyError, match="nope"):
        failed.get(timeout=20)
    assert worker.stop() == 0
    assert len(visible(folder)) == 6
    added[0].forget()
    wait_until(lambda: not added[0].exists(), what="the result is gone")


def test_result_in_a_broken_folder_is_an_error_for_who_asks(
    tmp_path: Path, make_app: Callable[..., MiniQ]
) -> None:
    app: Optional[MiniQ] = make_app("proj", backend=f"file://{tmp_path}/no/results")
    assert app is not None
    with pytest.raises(ImproperlyConfigured, match="make it, or give this user the right"):
        app.AsyncResult("one").get(timeout=1)
    assert not issubclass(ImproperlyConfigured, BackendError)

# SPDX-License-Identifier: MIT
"""The package works as a copy under another name, and nothing it writes down tells that name.

What is on disk must be readable by another copy, by an installed miniq, and by Celery.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import re
import shutil
import sqlite3
import sys
from pathlib import Path
from typing import Callable

import pytest
from workers import ROOT, Program, WorkerProcess, environment

VENDORED = "somepkg._vendor.miniq"

TASKS = """
import os, sys
from ._vendor.miniq import MiniQ
from ._vendor.miniq.exceptions import MaxRetriesExceededError
from ._vendor.miniq.signals import worker_ready

app = MiniQ(
    "somepkg",
    broker=os.environ["MINIQ_TESTS_URL"],
    accept_content=["json", "pickle"],
    result_serializer=os.environ["MINIQ_TESTS_SERIALIZER"],
)

def loaded():
    return sorted(name for name in sys.modules if name.partition(".")[0] == "miniq")

@app.task
def add(x, y):
    return x + y

@app.task
def foreign_modules():
    return loaded()

@app.task
def give_up():
    raise MaxRetriesExceededError("enough")

@app.task(bind=True, max_retries=1)
def again(self):
    if not self.request.retries:
        raise self.retry(countdown=0)
    return self.request.retries

@worker_ready.connect(weak=False)
def tell_ready(**_):
    assert not loaded(), loaded()
    open(os.environ["MINIQ_TESTS_READY_FILE"], "w").close()
"""

SENDER = """
import json
from somepkg.tasks import add, again, app, foreign_modules, give_up, loaded

def outcome(result):
    try:
        return result.get(timeout=60)
    except Exception as error:
        return [type(error).__module__, type(error).__name__]

found = {
    "add": outcome(add.apply_async((2, 3), link=add.s(10))),
    "pickled": outcome(add.apply_async((2, 3), serializer="pickle", link=add.s(10))),
    "again": outcome(again.delay()),
    "foreign": outcome(foreign_modules.delay()),
    "give_up": outcome(give_up.delay()),
    "unknown": outcome(app.send_task("somepkg.tasks.nobody_knows", (add.s(1),), serializer="pickle")),
    "here": loaded(),
}
app.close()
print(json.dumps(found))
"""


@pytest.fixture
def vendored(tmp_path: Path) -> Path:
    """A folder with the package ``somepkg`` in which miniq is a copied part."""
    package = tmp_path / "somepkg"
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "miniq", package / "_vendor" / "miniq", ignore=without_caches)
    (package / "__init__.py").touch()
    (package / "_vendor" / "__init__.py").touch()
    (package / "tasks.py").write_text(TASKS, encoding="utf-8")
    (tmp_path / "sender.py").write_text(SENDER, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("start_method", "serializer"), [("fork", "json"), ("spawn", "pickle")])
def test_vendored_copy_runs_tasks_and_writes_nothing_that_names_it(
    start_method: str, serializer: str, vendored: Path, sqlite_url: str, program: Callable[..., Program]
) -> None:
    if start_method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start_method} here")
    env = environment(MINIQ_TESTS_URL=sqlite_url, MINIQ_TESTS_SERIALIZER=serializer)
    env["PYTHONPATH"] = str(vendored)
    args = ["-c", "2", "--pool-start-method", start_method]
    worker = WorkerProcess("somepkg.tasks", args, vendored, "worker", "INFO", env, VENDORED)
    try:
        worker.wait_ready()
        sender = program([sys.executable, "sender.py"], vendored, env)
        assert sender.wait(90) == 0, sender.log
        assert worker.stop() == 0
    finally:
        print(worker.log)
        complaints = worker.clean_up()
    assert not complaints
    ours = f"{VENDORED}.exceptions"
    assert json.loads(sender.log) == {
        "add": 5,
        "pickled": 5,
        "again": 1,
        "foreign": [],
        "give_up": [ours, "MaxRetriesExceededError"],
        "unknown": [ours, "NotRegistered"],
        "here": [],
    }
    written = what_is_written(vendored / "queue.db")
    assert b"celery.exceptions" in written
    assert b"NotRegistered" in written
    assert b"somepkg.tasks.nobody_knows" in written
    assert b"_vendor.miniq" not in written


def what_is_written(path: Path) -> bytes:
    """Return all that is stored, but the line for people in which a traceback names what was raised."""
    with contextlib.closing(sqlite3.connect(str(path))) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = [row for table in tables for row in database.execute(f"SELECT * FROM {table}")]
    text = b"\n".join(cell if isinstance(cell, bytes) else str(cell).encode() for row in rows for cell in row)
    return re.sub(rb"[\w.]+MaxRetriesExceededError: enough", b"", text)


def test_vendored_command_line_calls_itself_by_its_own_name(
    vendored: Path, program: Callable[..., Program]
) -> None:
    env = environment()
    env["PYTHONPATH"] = str(vendored)
    for arguments in (["--help"], ["worker", "--help"]):
        help_ = program([sys.executable, "-m", VENDORED, *arguments], vendored, env)
        assert help_.wait() == 0
        assert f"usage: python -m {VENDORED}" in help_.log
        assert "-m miniq" not in help_.log

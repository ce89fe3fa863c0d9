# SPDX-License-Identifier: MIT
"""What the README says is so: its commands, its programs, its tables, its links."""

from __future__ import annotations

import configparser
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Callable, List

import pytest
from workers import ROOT, Program, environment

from miniq.pools.base import POOLS

README = (ROOT / "README.rst").read_text(encoding="utf-8")
RUN_TESTS = "python3 -m pip install tox && python3 -m tox"


def python_blocks() -> List[str]:
    """Return the programs in the README."""
    found = re.findall(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", README, re.MULTILINE)
    return [textwrap.dedent(block).strip() + "\n" for block in found]


def commands() -> List[str]:
    """Return the lines a reader would type."""
    return re.findall(r"^ +(python3 .*)$", README, re.MULTILINE)


def test_two_commands_are_its_core_and_ci_runs_the_second() -> None:
    first, second, *_ = commands()
    assert first == "python3 examples/first_steps.py"
    assert (ROOT / first.split()[1]).exists()
    assert second == RUN_TESTS
    ci = ROOT / ".ci" / "run"
    assert ci.read_text(encoding="utf-8").splitlines()[-1] == RUN_TESTS
    if os.name == "posix":
        assert os.access(ci, os.X_OK)


def test_twenty_lines_are_not_more_and_work(program: Callable[..., Program], tmp_path: Path) -> None:
    source = python_blocks()[0]
    assert len([line for line in source.splitlines() if line.strip()]) <= 20
    (tmp_path / "tasks.py").write_text(source, encoding="utf-8")
    start_worker, call = (line.split()[1:] for line in commands() if line.endswith(("INFO", "tasks.py")))
    env = environment(tmp_path)
    worker = program([sys.executable, *start_worker], tmp_path, env)
    caller = program([sys.executable, *call], tmp_path, env)
    assert caller.wait(60) == 0, f"{caller.log}\n{worker.log}"
    assert caller.log.split() == ["5"]
    assert worker.stop() == 0
    assert "Task tasks.add[" in worker.log
    dead = program([sys.executable, *"-m miniq -A tasks dead list".split()], tmp_path, env)
    assert dead.wait() == 0, dead.log


def test_embedded_worker_works_as_shown(program: Callable[..., Program], tmp_path: Path) -> None:
    whole, embedded = python_blocks()
    definitions = whole.partition("if __name__")[0]
    (tmp_path / "script.py").write_text(f"{definitions}\n{embedded}\napp.close()\n", encoding="utf-8")
    script = program([sys.executable, "script.py"], tmp_path)
    assert script.wait(60) == 0, script.log
    assert str([2 * n for n in range(10)]) in script.log


def test_table_of_pools_is_complete() -> None:
    rows = set(re.findall(r"^``(\w+)``  ", README, re.MULTILINE))
    # Celery's other name for the same pool needs no row.
    assert rows == set(POOLS) - {"processes"}


TEXTS = [ROOT / "README.rst", *sorted((ROOT / "docs").rglob("*.rst"))]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"`[^`<]*<([^>]+)>`_", path.read_text(encoding="utf-8"))
    missing = [one for one in targets if "://" not in one and not (path.parent / one).exists()]
    assert not missing


def test_python_versions_are_the_same_everywhere() -> None:
    setup, tox = configparser.ConfigParser(), configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    classified = re.findall(r"Python :: (3\.\d+)$", setup["metadata"]["classifiers"], re.MULTILINE)
    tested = [f"3.{minor}" for minor in sorted(map(int, re.findall(r"py3(\d+)", tox["tox"]["envlist"])))]
    assert classified == tested
    assert setup["options"]["python_requires"] == f">={classified[0]}"
    assert f"Python {classified[0]} to {classified[-1]}" in README
    assert "install_requires" not in setup["options"]

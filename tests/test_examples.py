# SPDX-License-Identifier: MIT
"""Every example runs from the clone as it stands, ends well, and leaves nothing behind."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Callable

import pytest
from waiting import wait_until
from workers import ROOT, Program, environment, processes

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: Example -> lines that show what it is about.
SHOWN = {
    "embedded": ("page 0 by", "page 7 by"),
    "first_steps": (
        "[0, 2, 4, 6, 8]",
        "8 tasks ran in",
        "went well at attempt 3",
        "ZeroDivisionError('division by zero')",
        "exitcode 3",
        "20 + 22 = 42",
        "exit code 0.",
        "gone with its folder: True",
    ),
    "periodic": ("tick at", "the next report is due", "07:00:00+00:00"),
    "retries_and_limits": (
        "answered at attempt 4",
        "OSError('no such host')",
        "stopped early, cleaned up",
        "TimeLimitExceeded(0.5)",
        "TaskRevokedError('expired')",
    ),
}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what an example needs, in which nobody else writes."""
    without_caches = shutil.ignore_patterns("__pycache__")
    for folder in ("miniq", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / "clone" / folder, ignore=without_caches)
    return tmp_path / "clone"


def test_every_example_is_known_here() -> None:
    assert {path.stem for path in EXAMPLES} == set(SHOWN)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_from_the_clone_and_leaves_nothing_behind(
    path: Path, clone: Path, program: Callable[..., Program], tmp_path: Path
) -> None:
    before = set(clone.rglob("*"))
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    # Nothing says where miniq is: the example finds it itself, with a bare Python.
    env = environment(TMPDIR=str(scratch), TEMP=str(scratch), TMP=str(scratch))
    del env["PYTHONPATH"], env["PYTHONDONTWRITEBYTECODE"]
    example = program([sys.executable, "-S", str(clone / "examples" / path.name)], tmp_path, env)
    assert example.wait(100) == 0, example.log
    missing = [text for text in SHOWN[path.stem] if text not in example.log]
    assert not missing, f"{missing} not in:\n{example.log}"
    assert "Traceback" not in example.log
    assert set(clone.rglob("*")) == before
    assert list(scratch.iterdir()) == []
    # A helper process of multiprocessing ends a moment after its parent.
    wait_until(
        lambda: not [row for row in processes() if example.pid in (row.group, row.session)],
        what="all its processes have ended",
    )

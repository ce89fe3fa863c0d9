# SPDX-License-Identifier: MIT
"""The suite over file://."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from backend_suite import BackendSuite
from transport_suite import Clock


class TestFileBackend(BackendSuite):
    keeps_any_bytes = False

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"file://{tmp_path}/results"

    @pytest.fixture
    def clock(self) -> Clock:
        # The times of files are the system's, and a result ends after it was written.
        return Clock(float(math.ceil(time.time())))

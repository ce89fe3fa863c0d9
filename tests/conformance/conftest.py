# SPDX-License-Identifier: MIT
"""The suites are no test files by name; their assertions shall be explained all the same."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("transport_suite", "backend_suite")

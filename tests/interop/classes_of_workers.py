# SPDX-License-Identifier: MIT
"""A class that callers do not have: only a running task imports this."""

from __future__ import annotations


class Hidden(Exception):
    """An error whose class the caller cannot find."""

# SPDX-License-Identifier: MIT
"""Classes that callers and workers can import."""

from __future__ import annotations

from typing import NamedTuple


class Refused(Exception):
    """An error with two arguments."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(what, code)
        self.what = what
        self.code = code


class Point(NamedTuple):
    """A value that only pickle keeps as what it is."""

    x: int
    y: int

# SPDX-License-Identifier: MIT
"""Fixtures of the tests of beat."""

from __future__ import annotations

import itertools
from typing import Iterator

import pytest
from beat_stage import Clock, Stage

from miniq.connections.memory import broker_name, reset

_names = itertools.count(1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stage(clock: Clock) -> Iterator[Stage]:
    url = f"memory://beat{next(_names)}"
    found = Stage(url, clock)
    yield found
    for app in found.apps:
        app.close()
    reset(broker_name(url))

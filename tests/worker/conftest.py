# SPDX-License-Identifier: MIT
"""What the tests of the worker share: an app that sends to the workers they start."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, List

import pytest

from miniq import AsyncResult, MiniQ

#: Nothing here takes that long; a result that does not come is a failed test.
RESULT_TIMEOUT_S = 15.0


class Client:
    """Sends tasks of the module ``proj`` by name and looks into the broker."""

    def __init__(self, app: MiniQ) -> None:
        self.app = app

    def send(self, name: str, *args: Any, **options: Any) -> AsyncResult:
        return self.app.send_task(f"proj.{name}", args, **options)

    def run(self, name: str, *args: Any, **options: Any) -> Any:
        """Send a task and return its value; raises its exception."""
        return self.send(name, *args, **options).get(timeout=RESULT_TIMEOUT_S)

    def error_of(self, result: AsyncResult) -> BaseException:
        """Wait for a task to fail; return its exception."""
        value = result.get(timeout=RESULT_TIMEOUT_S, propagate=False)
        assert isinstance(value, BaseException), f"{result.state}: {value!r}"
        return value

    def dead(self) -> List[Any]:
        return self.app.producer.transport.dead_letters()

    def waiting(self, queue: str = "celery") -> "tuple[int, int, int]":
        """Return how many messages of a queue are (ready, not due, held by workers)."""
        for size in self.app.producer.transport.sizes():
            if size.queue == queue:
                return size.ready, size.waiting, size.unacked
        return 0, 0, 0


@pytest.fixture
def client(make_app: Callable[..., MiniQ]) -> Client:
    return Client(make_app("client"))


@pytest.fixture
def lines(tmp_path: Path) -> Callable[[str], List[str]]:
    """Return the lines that tasks have appended to a file in their working folder."""

    def read(name: str) -> List[str]:
        path = tmp_path / name
        return path.read_text().splitlines() if path.exists() else []

    return read

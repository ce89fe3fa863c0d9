# SPDX-License-Identifier: MIT
"""The result store that keeps nothing: for projects that never ask what became of a task."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterable, Iterator, Mapping, Optional, Sequence

from .base import Backend, StoredResult


class DisabledBackend(Backend):
    """Stores nothing, finds nothing."""

    is_shared = False
    enabled = False
    keeps_no_groups = "no result backend is configured"

    def __init__(self, url: str, options: Mapping[str, Any], wall: Callable[[], float]) -> None:
        pass

    def store(self, results: Sequence[StoredResult]) -> None:
        pass

    def fetch(self, task_ids: Sequence[str]) -> Dict[str, StoredResult]:
        return {}

    def wait(
        self,
        task_ids: Sequence[str],
        timeout_s: Optional[float],
        interval_s: Optional[float] = None,
        unready: bool = False,
    ) -> Iterator[StoredResult]:
        return iter(())

    def forget(self, task_ids: Iterable[str]) -> None:
        pass

    def expire(self) -> int:
        return 0

    def close(self) -> None:
        pass

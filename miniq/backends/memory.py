# SPDX-License-Identifier: MIT
"""Results in this process' memory, beside the messages of the broker of the same name.

``memory://`` and ``cache+memory://`` mean the same.  `store` joins the transaction of a transport
with the same name; waiting threads are told at its end.
"""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

from ..connections.memory import MemoryBroker, broker_name, refuse_options
from ..states import READY_STATES, may_replace
from .base import Backend, StoredResult

#: Longest sleep of a waiter, so that it can be interrupted everywhere (Windows).
_LONGEST_SLEEP_S = 1.0


class MemoryBackend(Backend):
    """One thread's way to results in memory."""

    push_waits = True

    def __init__(self, url: str, options: Mapping[str, Any], wall: Callable[[], float]) -> None:
        refuse_options(url, options)
        self._name = broker_name(url)
        self._wall = wall
        self._broker: Optional[MemoryBroker] = None

    @property
    def broker(self) -> MemoryBroker:
        """The broker, shared by everybody in this process who uses the same name."""
        if self._broker is None:
            self._broker = MemoryBroker.get(self._name)
        else:
            self._broker.check_process()
        return self._broker

    def store(self, results: Sequence[StoredResult]) -> None:
        now = self._wall()
        with self.broker as broker:
            for result in results:
                old, until = broker.results.get(result.task_id, (None, None))
                over = until is not None and until <= now
                if old is None or over or may_replace(result.state, old.state):
                    expires_s = result.expires_s
                    broker.set_item(
                        broker.results,
                        result.task_id,
                        (result, None if expires_s is None else now + expires_s),
                    )
            broker.results_changed()

    def fetch(self, task_ids: Sequence[str]) -> Dict[str, StoredResult]:
        now = self._wall()
        found: Dict[str, StoredResult] = {}
        with self.broker as broker:
            for task_id in task_ids:
                result, until = broker.results.get(task_id, (None, None))
                if result is not None and (until is None or until > now):
                    found[task_id] = result._replace(expires_s=None if until is None else until - now)
        return found

    def wait(
        self,
        task_ids: Sequence[str],
        timeout_s: Optional[float],
        interval_s: Optional[float] = None,
        unready: bool = False,
    ) -> Iterator[StoredResult]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pending = dict.fromkeys(task_ids)
        reported: Dict[str, Tuple[str, bytes]] = {}
        broker = self.broker
        while pending:
            news: List[StoredResult] = []
            with broker.lock:
                for task_id, result in self.fetch(list(pending)).items():
                    seen = (result.state, result.body)
                    if result.state in READY_STATES:
                        del pending[task_id]
                        news.append(result)
                    elif unready and reported.get(task_id) != seen:
                        reported[task_id] = seen
                        news.append(result)
                if not news:
                    left_s = _LONGEST_SLEEP_S if deadline is None else deadline - time.monotonic()
                    if left_s <= 0:
                        return
                    broker.stored.wait(min(left_s, _LONGEST_SLEEP_S))
            # Handed out without the lock: whoever waits may take his time, or leave for good.
            yield from news

    def forget(self, task_ids: Iterable[str]) -> None:
        with self.broker as broker:
            for task_id in task_ids:
                broker.set_item(broker.results, task_id, None)

    def expire(self) -> int:
        now = self._wall()
        with self.broker as broker:
            over = [
                task_id
                for task_id, (_, until) in broker.results.items()
                if until is not None and until <= now
            ]
            for task_id in over:
                broker.set_item(broker.results, task_id, None)
        return len(over)

    def close(self) -> None:
        self._broker = None

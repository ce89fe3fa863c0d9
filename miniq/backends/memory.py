# SPDX-License-Identifier: MIT
"""Results in this process' memory, beside the messages of the broker of the same name.

``memory://`` and ``cache+memory://`` mean the same.  What is written joins the transaction of a
transport with the same name; waiting threads are told at its end.
"""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

from ..connections.memory import MemoryBroker, broker_name, refuse_options
from ..states import READY_STATES, may_replace
from .base import MOST_LEFT_OVER, StoredResult
from .chords import MARK_PLACE, Chord, ChordBooks

#: Longest sleep of a waiter, so that it can be interrupted everywhere (Windows).
_LONGEST_SLEEP_S = 1.0


class MemoryBackend(ChordBooks):
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

    @property
    def joins(self) -> bool:
        return self.broker.is_open

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
        now, removed = self._wall(), 0
        with self.broker as broker:
            for table in (broker.results, broker.groups):
                for key in [key for key, (_, until) in table.items() if until is not None and until <= now]:
                    broker.set_item(table, key, None)
                    removed += 1
            for group_id, chord in list(broker.chords.items()):
                if chord.expires is not None and chord.expires <= now:
                    broker.set_item(broker.chords, group_id, None)
                    self._drop_parts(group_id)
                    removed += 1
        return removed

    def close(self) -> None:
        self._broker = None

    # -- groups

    def save_group(self, group_id: str, body: bytes, expires_s: Optional[float]) -> None:
        until = None if expires_s is None else self._wall() + expires_s
        with self.broker as broker:
            broker.set_item(broker.groups, group_id, (body, until))

    def load_group(self, group_id: str) -> Optional[bytes]:
        with self.broker as broker:
            body, until = broker.groups.get(group_id, (None, None))
            return body if until is None or until > self._wall() else None

    def delete_group(self, group_id: str) -> None:
        with self.broker as broker:
            broker.set_item(broker.groups, group_id, None)

    # -- chords

    def _changing(self) -> MemoryBroker:
        return self.broker

    def _read_chord(self, group_id: str) -> Optional[Chord]:
        return self.broker.chords.get(group_id)

    def _write_chord(self, group_id: str, chord: Chord) -> None:
        broker = self.broker
        broker.set_item(broker.chords, group_id, chord)

    def _write_body(self, group_id: str, body: bytes) -> None:
        broker = self.broker
        broker.set_item(broker.chord_bodies, group_id, body)

    def _add_part(self, group_id: str, place: int, task_id: str, entry: bytes) -> bool:
        broker = self.broker
        parts = broker.chord_parts.get(group_id)
        if parts is None:
            parts = {}
            broker.set_item(broker.chord_parts, group_id, parts)
        if (place, task_id) in parts:
            return False
        broker.set_item(parts, (place, task_id), entry)
        return True

    def _drop_parts(self, group_id: str) -> None:
        broker = self.broker
        broker.set_item(broker.chord_bodies, group_id, None)
        broker.set_item(broker.chord_parts, group_id, None)

    def chord_entries(self, group_id: str) -> List[bytes]:
        with self.broker as broker:
            parts = broker.chord_parts.get(group_id, {})
            return [entry for (place, _), entry in sorted(parts.items()) if place != MARK_PLACE]

    def chords_left_over(self, now: float) -> List[Tuple[str, bytes]]:
        found: List[Tuple[str, bytes]] = []
        with self.broker as broker:
            for group_id, chord in broker.chords.items():
                if chord.is_left_over(now) and len(found) < MOST_LEFT_OVER:
                    found.append((group_id, broker.chord_bodies[group_id]))
        return found

# SPDX-License-Identifier: MIT
"""Replies in memory: what came while somebody waited for others, and what was handed out lately.

Bounded in bytes and in time; a state never goes backwards.  Not for several threads at once.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Optional, Protocol, Tuple, TypeVar

from ..states import may_replace

#: Bytes of all replies that are kept; a small one counts as so many.
MAX_BYTES = 64 * 1024 * 1024
REPLY_BYTES = 500
#: Replies kept that were handed out already, in case somebody asks again.
MAX_TOLD = 4000


class Reply(Protocol):
    """What is kept: the state of a task."""

    @property
    def task_id(self) -> str:
        """Whose it is."""

    @property
    def state(self) -> str:
        """One of `states`."""

    @property
    def body(self) -> bytes:
        """The encoded meta."""


R = TypeVar("R", bound=Reply)


class Kept(Generic[R]):
    """Replies in memory, the last of each task, for `kept_s` and up to MAX_BYTES.

    What was handed out goes first, then what came first.
    """

    def __init__(self, kept_s: float) -> None:
        self._kept_s = kept_s
        #: task id -> (reply, until when)
        self._unasked: "OrderedDict[str, Tuple[R, float]]" = OrderedDict()
        self._told: "OrderedDict[str, Tuple[R, float]]" = OrderedDict()
        self.bytes = 0
        #: How many went that nobody had asked for, before their time.
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._unasked) + len(self._told)

    def put(self, reply: R, mono: float) -> bool:
        """Keep a reply; False where it says nothing new, or what the task has left behind."""
        old = self.get(reply.task_id, mono)
        if old is not None and (
            not may_replace(reply.state, old.state) or (reply.state, reply.body) == (old.state, old.body)
        ):
            return False
        self.drop(reply.task_id)
        self._unasked[reply.task_id] = (reply, mono + self._kept_s)
        self.bytes += len(reply.body) + REPLY_BYTES
        self._make_room(mono)
        return True

    def get(self, task_id: str, mono: float) -> Optional[R]:
        """Return the reply for a task, if it is still there."""
        found = self._unasked.get(task_id) or self._told.get(task_id)
        return found[0] if found is not None and found[1] > mono else None

    def tell(self, task_id: str) -> None:
        """Note that the reply for a task was handed out."""
        found = self._unasked.pop(task_id, None)
        if found is not None:
            self._told[task_id] = found
            if len(self._told) > MAX_TOLD:
                self._drop_first(self._told)

    def drop(self, task_id: str) -> None:
        """Forget the reply for a task."""
        found = self._unasked.pop(task_id, None) or self._told.pop(task_id, None)
        if found is not None:
            self.bytes -= len(found[0].body) + REPLY_BYTES

    def _make_room(self, mono: float) -> None:
        while self._unasked and next(iter(self._unasked.values()))[1] <= mono:
            self._drop_first(self._unasked)
        while self.bytes > MAX_BYTES and len(self) > 1:
            if self._told:
                self._drop_first(self._told)
            else:
                self._drop_first(self._unasked)
                self.dropped += 1

    def _drop_first(self, items: "OrderedDict[str, Tuple[R, float]]") -> None:
        self.bytes -= len(items.popitem(last=False)[1][0].body) + REPLY_BYTES

# SPDX-License-Identifier: MIT
"""The seam between pools and the running of tasks: a `Run` goes in, an `Outcome` comes back.

Both are plain values that cross processes.  Pools know nothing else of tasks; the `Runner` that a
`RunnerSpec` builds for them is `trace.TaskRunner`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Dict, List, NamedTuple, Optional, Protocol, Tuple

from .backends.base import StoredResult
from .transports.base import Publication


class Run(NamedTuple):
    """What travels to the place where a task runs.  Plain values only: it crosses processes.

    `delivery_info` is what the task sees as ``request.delivery_info``.
    """

    body: bytes
    content_type: str
    content_encoding: str
    headers: Dict[str, Any]
    properties: Dict[str, Any]
    delivery_info: Dict[str, Any]
    #: The outcome is to be `shown`.
    wants_shown: bool = False


#: A member's end as `backends.base.ChordPart` has it, and a chord as ``Backend.start_chord`` takes it.
Part = Tuple[str, Optional[int], str, bytes, Optional[float], bytes]
Start = Tuple[str, int, bytes, Optional[float]]


class Ends:
    """What is settled together with a message: results, messages and marks in chords.

    The process that ran the task fills it, or the worker where that process could not.
    """

    __slots__ = ("results", "followups", "parts", "starts")

    def __init__(
        self,
        results: Optional[List[StoredResult]] = None,
        followups: Optional[List[Publication]] = None,
        parts: Optional[List[Part]] = None,
        starts: Optional[List[Start]] = None,
    ) -> None:
        self.results: List[StoredResult] = [] if results is None else results
        self.followups: List[Publication] = [] if followups is None else followups
        #: Members of chords that end with it.
        self.parts: List[Part] = [] if parts is None else parts
        #: Chords whose header is among the follow-ups.
        self.starts: List[Start] = [] if starts is None else starts


class Outcome(NamedTuple):
    """What a run hands back, ready to be settled by the worker.

    `state`      SUCCESS, FAILURE, RETRY, REVOKED, IGNORED or REJECTED
    `results`    what to store: the task's own, and on failure those of the chain steps after it
    `followups`  messages to publish: callbacks, the next chain step, a retry
    `action`     "ack", "reject" (dead letter) or "requeue"; a broker sees it when late-acked
    `reason`     for a reject: one line of text
    `runtime_s`  how long the body took
    `parts`      members of chords that end with it, and
    `starts`     chords whose header is among the follow-ups (see `Ends`)
    `shown`      if wanted: for people, the result and ``""``, or the exception and its traceback
    """

    state: str
    results: "List[StoredResult]" = []  # noqa: RUF012 - never mutated
    followups: "List[Publication]" = []  # noqa: RUF012 - never mutated
    action: str = "ack"
    reason: str = ""
    runtime_s: float = 0.0
    parts: "List[Any]" = []  # noqa: RUF012 - never mutated
    starts: "List[Any]" = []  # noqa: RUF012 - never mutated
    shown: Tuple[str, str] = ("", "")


class Runner(Protocol):
    """What a pool gets to run tasks with, one per process."""

    def process_init(self) -> None:
        """Prepare this process or thread group; called once, before the first run."""

    def run(self, run: Run, guard: "Optional[AbstractContextManager[Any]]" = None) -> Outcome:
        """Run one task to its outcome; never raises but for a bug.

        `guard` is entered around the task's own code only: the pool arms its soft limit in it.
        """

    async def run_async(self, run: Run, guard: "Optional[AbstractContextManager[Any]]" = None) -> Outcome:
        """Do the same inside a running asyncio loop; cancelling it cancels the task's code."""

    def thread_exit(self) -> None:
        """Let go of what this thread holds; called in each thread that ran tasks, when it ends.

        May be called again, and in a thread that ran none.
        """

    def process_shutdown(self, exitcode: int) -> None:
        """Say good-bye; called once when the process ends in order.  Includes `thread_exit`."""


class RunnerSpec(Protocol):
    """How to build the `Runner` in another process; picklable, for spawned children."""

    def build(self) -> Runner:
        """Import what is needed and return the runner."""

# SPDX-License-Identifier: MIT
"""Chords, the worker's side: members are counted when they are settled, and the last one brings the body.

A member counts once, by its id and its place in the header, whatever became of it.  Whoever is told that
all have arrived gets a claim, and adds the body's message, or its failure, to what is settled.  If he
does not get so far, the claim runs out and any worker finishes the chord.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any, Callable, List, Optional, Protocol, Set

from ..backends.base import Backend, ChordPart, ClaimLost, StoredResult
from ..chords import body_of, decode_body
from ..log import get_logger
from ..runner import Part, Start
from ..trace import TaskRunner
from ..transports.base import Publication

logger = get_logger(__name__)


class Collecting(Protocol):
    """What a turn is about to do, as far as chords add to it."""

    publications: List[Publication]
    results: List[StoredResult]
    parts: List[Part]
    starts: List[Start]
    finishing: List[Callable[[], Any]]


class Chords:
    """Counts and ends chords; one per worker."""

    def __init__(self, app: Any, runner: TaskRunner) -> None:
        self.app = app
        self.runner = runner
        #: By it the store knows this worker again: a turn that is repeated has the claims of the first try.
        self._token = os.urandom(8).hex()
        #: Where several members come in one batch, again or twice, each of them is told of the claim.
        self._batch: Optional[Collecting] = None
        self._ended: Set[str] = set()

    def arrive(self, parts: List[Part], backend: Backend, batch: Collecting) -> None:
        """Count members; add to `batch` what follows from chords which are complete by that.

        The failure of a body may be the end of a member of another chord: that is counted too.
        """
        if batch is not self._batch:
            self._batch, self._ended = batch, set()
        waiting = [ChordPart(*part, self._token) for part in parts if part[0]]
        while waiting and backend.counts_chords:
            arrivals = backend.arrive_at_chords(waiting)
            ended: List[Part] = []
            for part, arrival in zip(waiting, arrivals):
                if arrival.claim is not None and part.group_id not in self._ended:
                    self._ended.add(part.group_id)
                    ended += self._end(part.group_id, part.task_id, part.body, arrival.claim, backend, batch)
            waiting = [ChordPart(*part, self._token) for part in ended if part[0]]

    def finish_left_over(self, group_id: str, body: bytes, backend: Backend, batch: Collecting) -> None:
        """Do the same for a chord whose last member could not."""
        claim = backend.claim_chord(group_id, self._token).claim
        if claim is not None:
            logger.warning("Chord %s is complete and nobody sent its body: it is sent now", group_id)
            batch.parts += self._end(group_id, None, body, claim, backend, batch)

    def _end(
        self, group_id: str, parent_id: Any, encoded: bytes, claim: str, backend: Backend, batch: Collecting
    ) -> List[Part]:
        """Add the body, or its failure, to what is settled; return members of other chords that end so."""
        entries = backend.chord_entries(group_id)
        saved = None if backend.keeps_no_groups else backend.load_group(group_id)
        ends = body_of(self.app, self.runner, group_id, parent_id, decode_body(encoded), entries, saved)
        batch.publications += ends.followups
        batch.results += ends.results
        batch.starts += ends.starts
        batch.finishing.append(partial(_finish, backend, group_id, claim))
        return ends.parts


def _finish(backend: Backend, group_id: str, claim: str) -> None:
    if backend.finish_chord(group_id, claim):
        return
    if backend.joins:
        raise ClaimLost([group_id])
    logger.warning("Chord %s: the claim ran out while its body was sent; it may be sent again", group_id)

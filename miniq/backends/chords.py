# SPDX-License-Identifier: MIT
"""How chords are counted in stores with transactions of ours: one record a chord, and its parts.

What happens to a record is decided here, once; a store reads and writes records and parts inside of
its transaction.  Redis does the same in scripts (`backends.redis`).
"""

from __future__ import annotations

import uuid
from contextlib import AbstractContextManager
from typing import Any, Callable, List, NamedTuple, Optional, Sequence

from .base import CLAIM_S, DONE_S, SENDING_S, Arrival, Backend, ChordPart

#: The place of a part whose index is not known: behind the others.
LAST_PLACE = 2**63 - 1
#: The place of what is no part but a mark that members were added.
MARK_PLACE = -(2**63)


class Chord(NamedTuple):
    """A chord's record; `size` is None until it is started, `claimed_until` until it is complete."""

    size: Optional[int] = None
    extra: int = 0
    arrived: int = 0
    claim: Optional[str] = None
    claimed_until: Optional[float] = None
    done: bool = False
    expires: Optional[float] = None

    @property
    def total(self) -> Optional[int]:
        """How many members there will be."""
        return None if self.size is None else self.size + self.extra

    @property
    def is_complete(self) -> bool:
        """Say whether all members have arrived."""
        return self.size is not None and self.arrived >= self.size + self.extra

    def is_claimed(self, now: float) -> bool:
        """Say whether somebody has a claim that lasts; one that lasts too long is of a clock set back."""
        until = self.claimed_until
        return self.claim is not None and until is not None and now < until <= now + SENDING_S

    def is_left_over(self, now: float) -> bool:
        """Say whether all have arrived and nobody is about to send the body."""
        over = self.expires is not None and self.expires <= now
        return self.is_complete and not (self.done or over or self.is_claimed(now))

    def noticed(self, now: float) -> "Chord":
        """Return it as one that is left over, if nobody is to come any more who could claim it."""
        if self.is_complete and self.claimed_until is None:
            return self._replace(claimed_until=now)
        return self

    def is_claimed_by(self, claim: str, now: float) -> bool:
        """Say whether this claim is the one that lasts."""
        return not self.done and self.claim == claim and self.is_claimed(now)


class ChordBooks(Backend):
    """A backend whose store keeps records and parts of chords; it has the methods that are not given here."""

    counts_chords = True
    _wall: Callable[[], float]

    # -- what the store does

    def _changing(self) -> "AbstractContextManager[Any]":
        """Return a context in which all changes are one, and nobody else makes any."""
        raise NotImplementedError

    def _read_chord(self, group_id: str) -> Optional[Chord]:
        raise NotImplementedError

    def _write_chord(self, group_id: str, chord: Chord) -> None:
        raise NotImplementedError

    def _write_body(self, group_id: str, body: bytes) -> None:
        raise NotImplementedError

    def _add_part(self, group_id: str, place: int, task_id: str, entry: bytes) -> bool:
        """Add a part; False if it is there already."""
        raise NotImplementedError

    def _drop_parts(self, group_id: str) -> None:
        """Delete the body and all parts."""
        raise NotImplementedError

    # -- what is made of it

    def start_chord(
        self, group_id: str, size: int, body: bytes, expires_s: Optional[float], anew: bool = True
    ) -> None:
        now = self._wall()
        with self._changing():
            chord = self._chord(group_id, now)
            if chord.done:
                if not anew:
                    return
                self._drop_parts(group_id)
                chord = Chord()
            chord = chord._replace(size=size, expires=None if expires_s is None else now + expires_s)
            self._write_chord(group_id, chord.noticed(now))
            self._write_body(group_id, body)

    def arrive_at_chords(self, parts: Sequence[ChordPart]) -> List[Arrival]:
        now = self._wall()
        with self._changing():
            return [self._arrive(part, now) for part in parts]

    def _arrive(self, part: ChordPart, now: float) -> Arrival:
        group_id, index, task_id, entry, expires_s, _, token = part
        chord = self._chord(group_id, now)
        if chord.done:
            return Arrival(0, None, None, True)
        if self._add_part(group_id, LAST_PLACE if index is None else index, task_id, entry):
            chord = chord._replace(arrived=chord.arrived + 1)
        if expires_s is not None:
            chord = chord._replace(expires=now + expires_s)
        return self._claim(group_id, chord, token, now)

    def claim_chord(self, group_id: str, token: str = "") -> Arrival:
        now = self._wall()
        with self._changing():
            chord = self._chord(group_id, now)
            if chord.done or not chord.is_complete:
                return Arrival(chord.arrived, chord.total, None, chord.done)
            return self._claim(group_id, chord, token, now)

    def _claim(self, group_id: str, chord: Chord, token: str, now: float) -> Arrival:
        """Write the record, with a claim where one is to be had."""
        claim = None
        if chord.is_complete:
            if not chord.is_claimed(now):
                claim = token or uuid.uuid4().hex
                chord = chord._replace(claim=claim, claimed_until=now + CLAIM_S)
            elif chord.claim == token:
                claim = token
        self._write_chord(group_id, chord)
        return Arrival(chord.arrived, chord.total, claim, False)

    def extend_chord(self, group_id: str, claim: str) -> bool:
        now = self._wall()
        with self._changing():
            chord = self._chord(group_id, now)
            held = chord.is_claimed_by(claim, now)
            if held:
                self._write_chord(group_id, chord._replace(claimed_until=now + SENDING_S))
            return held

    def finish_chord(self, group_id: str, claim: str) -> bool:
        now = self._wall()
        with self._changing():
            held = self._chord(group_id, now).is_claimed_by(claim, now)
            if held:
                self._drop_parts(group_id)
                self._write_chord(group_id, Chord(done=True, expires=now + DONE_S))
            return held

    def abandon_chord(self, group_id: str) -> None:
        now = self._wall()
        with self._changing():
            chord = self._chord(group_id, now)
            expires = now + DONE_S if chord == Chord() else chord.expires
            self._write_chord(
                group_id, chord._replace(done=True, claim=None, claimed_until=None, expires=expires)
            )

    def add_to_chord(
        self, group_id: str, count: int = 1, token: str = "", expires_s: Optional[float] = None
    ) -> bool:
        now = self._wall()
        with self._changing():
            chord = self._chord(group_id, now)
            if chord.done:
                return False
            if not token or self._add_part(group_id, MARK_PLACE, token, b""):
                chord = chord._replace(extra=chord.extra + count)
            if expires_s is not None:
                chord = chord._replace(expires=now + expires_s)
            self._write_chord(group_id, chord.noticed(now))
            return True

    def _chord(self, group_id: str, now: float) -> Chord:
        """Return the record, a new one where there is none that is not past its time."""
        chord = self._read_chord(group_id)
        if chord is None:
            return Chord()
        if chord.expires is not None and chord.expires <= now:
            self._drop_parts(group_id)
            return Chord()
        return chord

# SPDX-License-Identifier: MIT
"""Claims on what only one may do, where the store tells at the end of a transaction that one was lost."""

from __future__ import annotations

from typing import Sequence


class ClaimLost(Exception):
    """The right to end some chords went to others meanwhile; nothing of the transaction was done.

    `group_ids` names them.  Whoever catches it leaves their bodies to the others and does the rest again.
    """

    def __init__(self, group_ids: Sequence[str]) -> None:
        super().__init__(f"others send the bodies of the chords {', '.join(group_ids)}")
        self.group_ids = list(group_ids)

# SPDX-License-Identifier: MIT
"""Task states: the words, their order and the sets that decide what may follow what.

    PENDING -> RECEIVED -> STARTED -> SUCCESS
                              |  \\-> FAILURE
                              |  \\-> RETRY -> STARTED ...
                              \\----> REVOKED

PENDING is never stored: it is the answer for an id nobody has heard of.  Any other upper-case
word is a custom state (``Task.update_state``).  The names and the precedence are Celery's, so
that both read each other's results.
"""

from __future__ import annotations

PENDING = "PENDING"
RECEIVED = "RECEIVED"
STARTED = "STARTED"
SUCCESS = "SUCCESS"
FAILURE = "FAILURE"
REVOKED = "REVOKED"
REJECTED = "REJECTED"
RETRY = "RETRY"
IGNORED = "IGNORED"

#: Final states: a result in one of these is never replaced by one that is not.
READY_STATES = frozenset({SUCCESS, FAILURE, REVOKED})
UNREADY_STATES = frozenset({PENDING, RECEIVED, STARTED, REJECTED, RETRY})
#: States whose result is an exception.
EXCEPTION_STATES = frozenset({RETRY, FAILURE, REVOKED})
#: States whose exception ``get()`` raises.
PROPAGATE_STATES = frozenset({FAILURE, REVOKED})
ALL_STATES = frozenset({PENDING, RECEIVED, STARTED, SUCCESS, FAILURE, RETRY, REVOKED})

#: From strongest to weakest; ``None`` stands for every custom state.
PRECEDENCE = (SUCCESS, FAILURE, None, REVOKED, STARTED, RECEIVED, REJECTED, RETRY, PENDING)
_RANK = {name: rank for rank, name in enumerate(PRECEDENCE)}
_CUSTOM_RANK = _RANK[None]


def precedence(state: str) -> int:
    """Return the rank of `state`: 0 is the strongest (SUCCESS)."""
    return _RANK.get(state, _CUSTOM_RANK)


def may_replace(new: str, old: str) -> bool:
    """Say whether a stored result in state `old` may be overwritten by one in state `new`.

    SUCCESS is final; a final state only gives way to another final one.  STARTED, which the worker tells,
    comes after what the task itself has told meanwhile, and does not replace that.
    """
    if old == SUCCESS:
        return False
    if new == STARTED:
        return old in UNREADY_STATES
    return new in READY_STATES or old not in READY_STATES


class state(str):
    """A state that compares by precedence: ``state("SUCCESS") > state("STARTED")``."""

    __slots__ = ()

    def __gt__(self, other: str) -> bool:
        return precedence(self) < precedence(other)

    def __ge__(self, other: str) -> bool:
        return precedence(self) <= precedence(other)

    def __lt__(self, other: str) -> bool:
        return precedence(self) > precedence(other)

    def __le__(self, other: str) -> bool:
        return precedence(self) >= precedence(other)

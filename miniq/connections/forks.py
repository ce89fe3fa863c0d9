# SPDX-License-Identifier: MIT
"""What a forked child must let go of: sockets and selectors that are its parent's.

The child only closes its copies of the descriptors.  A goodbye on a socket, or a change to an epoll
set, would reach the parent: they share those.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Inherited(Protocol):
    """Something that a child has a useless copy of."""

    def close(self) -> None:
        """Let go of the descriptors, and of nothing that the parent still uses."""


def close_in_children(owner: Inherited) -> None:
    """Have `owner`, while it lives, closed in every child forked from now on."""
    global _hooked
    _owners.add(owner)
    if not _hooked and hasattr(os, "register_at_fork"):
        _hooked = True
        os.register_at_fork(after_in_child=_close_inherited)


def _close_inherited() -> None:
    for owner in list(_owners):
        owner.close()
    _owners.clear()


_owners: "weakref.WeakSet[Inherited]" = weakref.WeakSet()
_hooked = False

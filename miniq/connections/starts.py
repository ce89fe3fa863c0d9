# SPDX-License-Identifier: MIT
"""Which of the messages that were handed to children have begun, readable after everybody's death.

A worker may hand a child several short tasks at once.  All of them are marked as started in the
database first, so that none can start twice; but if the whole worker is killed, most of them have
not begun, and an early-acked one among those must run elsewhere instead of counting as lost.  So a
child notes each beginning in a small file that is mapped into its memory: one store, no system
call, and the kernel keeps it whatever becomes of the processes.

Layout: 64 bytes that name the boot of the machine, then `PLACES` numbers of 8 bytes.  Mapped memory
survives processes, not a power failure: a journal from before a restart is not believed.

A message that is handed out ahead has a *token*, a number never used twice by its worker, whose low
bits name a place; it has begun when that place holds exactly this token.  A token is only trusted
while its place is not given to another message, so the worker frees it when the message is settled.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import List, Optional

_NUMBER = struct.Struct("=Q")
_PLACE_BITS = 13
PLACES = 1 << _PLACE_BITS
_HEADER_BYTES = 64
_FILE_BYTES = _HEADER_BYTES + PLACES * _NUMBER.size


def _boot() -> bytes:
    """Return what names this boot of the machine; the same always where nobody tells."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return file.read(_HEADER_BYTES).strip().ljust(_HEADER_BYTES, b" ")
    except OSError:
        return b"unknown".ljust(_HEADER_BYTES, b" ")


class StartJournal:
    """The file at `path`: made by the worker, marked by its children, read by whoever recovers."""

    def __init__(self, path: str, create: bool = False) -> None:
        """Map the file; with `create` it is made anew.

        Raises `OSError`, and `ValueError` for one that is no journal of this boot.
        """
        flags = os.O_RDWR | getattr(os, "O_BINARY", 0) | (os.O_CREAT | os.O_TRUNC if create else 0)
        fd = os.open(path, flags, 0o666)
        try:
            if create:
                os.ftruncate(fd, _FILE_BYTES)
            self._map = mmap.mmap(fd, _FILE_BYTES)
        finally:
            os.close(fd)
        if create:
            self._map[:_HEADER_BYTES] = _boot()
        elif self._map[:_HEADER_BYTES] != _boot():
            self._map.close()
            raise ValueError("it was not written since this machine was started")
        self.path = path
        self._free: List[int] = list(range(PLACES)) if create else []
        self._used = 0

    def token(self) -> Optional[int]:
        """Return a new token, None while all places are taken."""
        if not self._free:
            return None
        self._used += 1
        return self._used << _PLACE_BITS | self._free.pop()

    def free(self, token: int) -> None:
        """Take a token back: its message is settled or was given back."""
        self._free.append(token & (PLACES - 1))

    def mark(self, token: int) -> None:
        """Note that the message with this token begins."""
        _NUMBER.pack_into(self._map, _offset(token), token)

    def has_begun(self, token: int) -> bool:
        """Say whether the message with this token has begun."""
        found: int = _NUMBER.unpack_from(self._map, _offset(token))[0]
        return found == token

    def close(self) -> None:
        """Let go of the memory; the file stays."""
        self._map.close()


def _offset(token: int) -> int:
    return _HEADER_BYTES + (token & (PLACES - 1)) * _NUMBER.size

# SPDX-License-Identifier: MIT
"""Who is alive, on one machine: a worker lives as long as its process holds a lock on one byte.

Byte number N of the file ``<database>-owners`` stands for owner N of that database.  The kernel
lets go of the lock however the process ends, kill -9 included, and at no other time: a worker may
run one task for hours, or be stopped, and keeps what it holds.  The file stays empty; it must not
be deleted while workers run (`OwnerLocks.keep` is for folders where that happens all the same).

Source: fcntl(2), POSIX record locks; on Windows ``_locking``.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Dict, Set, Tuple

from ..exceptions import ImproperlyConfigured, OperationalError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


class OwnerLocks:
    """The locked bytes of ``<path>-owners`` that stand for this process' living owners.

    POSIX locks belong to the process: a child does not inherit them, and closing *any* descriptor
    of the file drops them all.  So there is one descriptor per process, open while an owner lives.
    """

    def __init__(self, path: str) -> None:
        self._path = path + "-owners"
        self._guard = threading.Lock()
        self._ids: Set[int] = set()
        self._fd = -1

    @classmethod
    def of(cls, path: str) -> "OwnerLocks":
        """Return this process' locks for the database at `path`."""
        key = (os.getpid(), path)
        return _owner_locks.get(key) or _owner_locks.setdefault(key, cls(path))

    def take(self, owner: int) -> None:
        """Say that `owner` lives; its number is new and nobody else's."""
        with self._guard:
            self._open()
            if not _lock_byte(self._fd, owner):
                raise OperationalError(
                    f"{self._path!r}: byte {owner} is locked by another process, try again"
                )
            self._ids.add(owner)

    def drop(self, owner: int) -> None:
        """Say that `owner` lives no more."""
        with self._guard:
            if owner in self._ids:
                self._ids.remove(owner)
                _unlock_byte(self._fd, owner)
                self._close_unused()

    def is_alive(self, owner: int) -> bool:
        """Say whether the process of `owner` lives, stopped or busy as it may be."""
        with self._guard:
            if owner in self._ids:
                return True
            self._open()
            try:
                if not _lock_byte(self._fd, owner):
                    return True
                _unlock_byte(self._fd, owner)
                return False
            finally:
                self._close_unused()

    def keep(self) -> None:
        """Make the file look used, for those who delete what is old; make it anew where they did."""
        with self._guard:
            if self._fd < 0:
                return
            if os.fstat(self._fd).st_nlink:
                os.utime(self._path)
                return
            os.close(self._fd)
            self._fd = -1
            self._open()
            for owner in self._ids:
                _lock_byte(self._fd, owner)

    def _open(self) -> None:
        if self._fd < 0:
            try:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            except OSError as error:
                raise ImproperlyConfigured(
                    f"{self._path!r} cannot be opened for writing: {error.strerror}"
                ) from error

    def _close_unused(self) -> None:
        if not self._ids:
            os.close(self._fd)
            self._fd = -1


_owner_locks: Dict[Tuple[int, str], OwnerLocks] = {}

if sys.platform == "win32":

    def _lock_byte(fd: int, offset: int) -> bool:
        os.lseek(fd, offset, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock_byte(fd: int, offset: int) -> None:
        os.lseek(fd, offset, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)

else:

    def _lock_byte(fd: int, offset: int) -> bool:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
        except OSError as error:
            if isinstance(error, (BlockingIOError, PermissionError)):
                return False
            raise OperationalError(
                f"this file system refuses locks: {error.strerror}; use a local disk"
            ) from error
        return True

    def _unlock_byte(fd: int, offset: int) -> None:
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, offset)

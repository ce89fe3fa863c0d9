# SPDX-License-Identifier: MIT
"""Results as files in one folder, as Celery's file-system backend keeps them: ``file:///folder``.

A result is the file ``celery-task-meta-<id>`` whose content is the encoded meta, nothing else, so
Celery reads it; a saved group is ``celery-taskset-meta-<id>``.  A file is written beside its place and
moved there, so a reader sees the old or the new one whole.  Whether it may replace the old one is
decided under a lock on one of sixteen files, which the kernel lets go of however a process ends.

When a result is over stands in its modification time: it is set ahead, to that moment.  What is
kept for ever, and what Celery wrote, was modified no later than its inode was changed; what was
touched or copied later loses its end rather than its life.  Thus content and end appear in one
step and there is no second file to lose.  Celery's own cleaning takes such a file later, never
earlier, than it should.

Nobody is told of a change: a waiter asks for the file's times, and reads it when these are new.
"""

from __future__ import annotations

import os
import re
import sys
import time
import zlib
from contextlib import contextmanager
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from ..exceptions import (
    BackendGetMetaError,
    BackendStoreError,
    DecodeError,
    ImproperlyConfigured,
    OperationalError,
)
from ..states import READY_STATES, may_replace
from ..text import nearest
from .base import Backend, StoredResult, pause_between_looks_s
from .stored import GROUP_KEY_PREFIX, describe, key_prefix, plain_or_hashed, readable_state, unwrap

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

#: Files that are locked; a result belongs to one of them by its name.
LOCKS = 16
#: Who holds a lock needs some 100 us; longer, and its process was stopped.
LOCK_TIMEOUT_S = 2.0
#: The end of a result has to be ahead of the moment at which its file is in place.
MIN_EXPIRES_S = 2.0
#: Files that one `expire` looks at; the next one goes on behind them.
EXPIRE_PORTION = 10_000
#: What a killed process left half written is removed after this time.
LEFTOVER_S = 3600.0
#: Before Linux 6.13 the clock of files ticks some hundred times a second, elsewhere even slower: two
#: changes may look like one, so a file is read again until it is older than this.
TICK_S = 1.0

_LOCK_FOLDER = ".miniq-locks"
_TEMPORARY = ".miniq-"
#: Ids that may be part of a file name: none with a separator.  Where capitals do not count, two ids
#: would be one file; Windows ignores a dot or space at the end, and reads a colon in its own way.
_PLAIN = re.compile(
    r"[a-z0-9_@%+=,.~ -]{0,159}[a-z0-9_@%+=,~-]"
    if sys.platform in ("win32", "darwin")
    else r"[A-Za-z0-9_@%+=,.:~ -]{0,159}[A-Za-z0-9_@%+=,.:~-]"
)
_PLAIN_PREFIX = re.compile(r"[\w-][\w.-]{0,59}" if os.name == "nt" else r"[\w-][\w.:-]{0,59}", re.ASCII)


class FileBackend(Backend):
    """One thread's way to the results in a folder."""

    def __init__(self, url: str, options: Mapping[str, Any], wall: Callable[[], float]) -> None:
        self._folder = folder_of(url)
        prefix = _read_options(options, url)
        self._prefix = key_prefix(prefix)
        self._group_prefix = key_prefix(prefix, GROUP_KEY_PREFIX)
        self._wall = wall
        self._is_there = self._is_writable = False
        self._scan: Any = None  # what os.scandir returns
        self._scan_pid = 0

    def _name(self, task_id: str) -> str:
        return self._prefix + plain_or_hashed(task_id, _PLAIN)

    # -- writing

    def store(self, results: Sequence[StoredResult]) -> None:
        by_lock: Dict[int, List[Tuple[str, StoredResult]]] = {}
        for result in results:
            name = self._name(result.task_id)
            by_lock.setdefault(_lock_of(name), []).append((name, result))
        self._check(writable=True)
        for lock, batch in by_lock.items():
            result = batch[0][1]
            try:
                with self._locked(lock):
                    for name, result in batch:
                        self._replace(name, result)
            except OSError as error:
                cause = self._cause("written", error)
                raise BackendStoreError(str(cause), task_id=result.task_id) from cause

    def _replace(self, name: str, result: StoredResult) -> None:
        """Put a result in its place, unless the one there is stronger; the lock is held."""
        path = os.path.join(self._folder, name)
        now = self._wall()
        found = self._read(path, now)
        if found is not None:
            state = readable_state(found.body, result.task_id)
            if state is not None and not may_replace(result.state, state):
                return
        self._write(path, result.body, result.expires_s, now)

    def _write(self, path: str, body: bytes, expires_s: Optional[float], now: float) -> None:
        """Put a file in its place whole."""
        temporary = os.path.join(self._folder, f"{_TEMPORARY}{os.urandom(8).hex()}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(body)
            if expires_s is not None:
                over_ns = round((now + max(expires_s, MIN_EXPIRES_S)) * 1e9)
                os.utime(temporary, ns=(over_ns, over_ns))
            _insist(os.replace, temporary, path)
        except BaseException:
            _remove(temporary)
            raise

    def forget(self, task_ids: Iterable[str]) -> None:
        for task_id in task_ids:
            try:
                _remove(os.path.join(self._folder, self._name(task_id)))
            except OSError as error:
                cause = self._cause("deleted", error)
                raise BackendStoreError(str(cause), task_id=task_id) from cause

    def expire(self) -> int:
        self._check(writable=True)
        now, started = self._wall(), time.time()
        over: Dict[int, List[str]] = {}
        removed = 0
        try:
            for entry in self._portion():
                if entry.name.startswith((self._prefix, self._group_prefix)):
                    if _is_over(entry.stat(), now):
                        over.setdefault(_lock_of(entry.name), []).append(entry.path)
                elif _is_temporary(entry.name) and started - entry.stat().st_ctime > LEFTOVER_S:
                    _remove(entry.path)
            for lock, paths in over.items():
                with self._locked(lock):
                    for path in paths:
                        # Looked at again: it may have been replaced before there was the lock.
                        stat = _stat(path)
                        if stat is not None and _is_over(stat, now):
                            _remove(path)
                            removed += 1
        except OSError as error:
            self._drop_scan()
            cause = self._cause("cleaned", error)
            raise BackendStoreError(str(cause)) from cause
        return removed

    def _portion(self) -> "Iterator[os.DirEntry[str]]":
        """Yield the next entries of the folder, from where the last call ended."""
        if self._scan is None or self._scan_pid != os.getpid():
            self._drop_scan()
            self._scan, self._scan_pid = os.scandir(self._folder), os.getpid()
        for _ in range(EXPIRE_PORTION):
            entry = next(self._scan, None)
            if entry is None:
                self._drop_scan()
                return
            try:
                entry.stat()
            except FileNotFoundError:
                continue  # gone meanwhile
            yield entry

    def _drop_scan(self) -> None:
        scan, self._scan = self._scan, None
        if scan is not None:
            scan.close()

    # -- reading

    def fetch(self, task_ids: Sequence[str]) -> Dict[str, StoredResult]:
        found: Dict[str, StoredResult] = {}
        self._check()
        now = self._wall()
        for task_id in task_ids:
            stored = self._fetch(task_id, os.path.join(self._folder, self._name(task_id)), now)
            if stored is not None:
                found[task_id] = stored
        return found

    def _fetch(self, task_id: str, path: str, now: float) -> Optional[StoredResult]:
        try:
            found = self._read(path, now)
            if found is None:
                return None
            body = unwrap(found.body)
            state, content_type, encoding = describe(body)
        except OSError as error:
            cause = self._cause("read", error)
            raise BackendGetMetaError(str(cause), task_id=task_id) from cause
        except DecodeError as error:
            raise BackendGetMetaError(f"{path!r} holds no result: {error}", task_id=task_id) from error
        return StoredResult(task_id, state, body, content_type, encoding, found.left_s)

    def _read(self, path: str, now: float) -> "Optional[_Found]":
        """Return a file's content, None where there is none that counts."""
        try:
            with open(path, "rb") as file:
                stat = os.fstat(file.fileno())
                if _is_over(stat, now):
                    return None
                body = file.read()
        except FileNotFoundError:
            return None
        # Empty: what Celery is about to write, or what a power failure left.
        over = _end_of(stat)
        return _Found(body, None if over is None else over - now) if body else None

    def wait(
        self,
        task_ids: Sequence[str],
        timeout_s: Optional[float],
        interval_s: Optional[float] = None,
        unready: bool = False,
    ) -> Iterator[StoredResult]:
        longest_s = 0.05 if interval_s is None else min(max(interval_s, 0.0005), 0.05)
        pending = {task_id: os.path.join(self._folder, self._name(task_id)) for task_id in task_ids}
        seen: Dict[str, Tuple[int, ...]] = {}
        reported: Dict[str, Tuple[str, bytes]] = {}
        start = progress = time.monotonic()
        self._check()
        while pending:
            before = time.monotonic()
            found = self._changed(pending, seen)
            look_s = time.monotonic() - before
            for stored in found:
                if stored.state in READY_STATES:
                    del pending[stored.task_id]
                elif not unready or reported.get(stored.task_id) == (stored.state, stored.body):
                    continue
                reported[stored.task_id] = (stored.state, stored.body)
                progress = time.monotonic()
                yield stored
            if not pending:
                return
            mono = time.monotonic()
            left_s = float("inf") if timeout_s is None else start + timeout_s - mono
            if left_s <= 0:
                return
            time.sleep(min(pause_between_looks_s(mono - progress, look_s, longest_s), left_s))

    def _changed(self, pending: Mapping[str, str], seen: Dict[str, Tuple[int, ...]]) -> List[StoredResult]:
        """Return the results which are new since `seen`, in the order they were written."""
        now, wall = self._wall(), time.time()
        found: List[Tuple[int, StoredResult]] = []
        for task_id, path in pending.items():
            try:
                stat = _stat(path)
            except OSError as error:
                cause = self._cause("read", error)
                raise BackendGetMetaError(str(cause), task_id=task_id) from cause
            if stat is None:
                continue
            mark = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)
            if seen.get(task_id) == mark and wall - stat.st_ctime > TICK_S:
                continue
            seen[task_id] = mark
            stored = self._fetch(task_id, path, now)
            if stored is not None:
                found.append((stat.st_ctime_ns, stored))
        found.sort(key=lambda pair: pair[0])
        return [stored for _, stored in found]

    # -- groups

    def _group_path(self, group_id: str) -> str:
        return os.path.join(self._folder, self._group_prefix + plain_or_hashed(group_id, _PLAIN))

    def save_group(self, group_id: str, body: bytes, expires_s: Optional[float]) -> None:
        self._check(writable=True)
        path = self._group_path(group_id)
        try:
            with self._locked(_lock_of(os.path.basename(path))):
                self._write(path, body, expires_s, self._wall())
        except OSError as error:
            cause = self._cause("written", error)
            raise BackendStoreError(str(cause)) from cause

    def load_group(self, group_id: str) -> Optional[bytes]:
        self._check()
        try:
            found = self._read(self._group_path(group_id), self._wall())
        except OSError as error:
            cause = self._cause("read", error)
            raise BackendGetMetaError(str(cause)) from cause
        return None if found is None else unwrap(found.body)

    def delete_group(self, group_id: str) -> None:
        self._check(writable=True)
        try:
            _remove(self._group_path(group_id))
        except OSError as error:
            cause = self._cause("deleted", error)
            raise BackendStoreError(str(cause)) from cause

    # -- the folder

    def _check(self, writable: bool = False) -> None:
        """Make the folder if only its last part is missing; `ImproperlyConfigured` where it cannot serve."""
        if self._is_writable if writable else self._is_there:
            return
        try:
            if not os.path.isdir(self._folder):
                # Not its parents: they are missing where a disk is not mounted, or a name is misspelt.
                _make_folder(self._folder)
            if writable:
                if not os.access(self._folder, os.W_OK | os.X_OK):
                    raise PermissionError(13, "no permission to write")
                _make_folder(os.path.join(self._folder, _LOCK_FOLDER))
        except OSError as error:
            raise ImproperlyConfigured(
                f"result backend: the folder {self._folder!r} cannot be used: {error.strerror};"
                " make it, or give this user the right to write there"
            ) from error
        self._is_there = True
        self._is_writable = self._is_writable or writable

    @contextmanager
    def _locked(self, lock: int) -> Iterator[None]:
        """Hold one of the locks.

        Opened anew each time: a descriptor shared with a forked child, or with another thread, would
        share the lock too.
        """
        path = os.path.join(self._folder, _LOCK_FOLDER, f"{lock:02d}")
        with open(path, "ab") as file:
            deadline_mono = time.monotonic() + LOCK_TIMEOUT_S
            pause_s = 0.0002
            while not _try_lock(file.fileno()):
                if time.monotonic() > deadline_mono:
                    raise TimeoutError(11, f"{path} is locked for {LOCK_TIMEOUT_S:g} s by another process")
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, 0.02)
            try:
                yield
            finally:
                _unlock(file.fileno())

    def _cause(self, what: str, error: OSError) -> OperationalError:
        """Return the cause of the error to raise: one that says that trying again may help."""
        if isinstance(error, FileNotFoundError):
            self._is_there = self._is_writable = False  # made again by the next try
        cause = OperationalError(f"results in {self._folder!r} cannot be {what}: {error.strerror or error}")
        cause.__cause__ = error
        return cause

    def close(self) -> None:
        self._drop_scan()


class _Found(NamedTuple):
    body: bytes
    left_s: Optional[float]


def _read_options(options: Mapping[str, Any], url: str) -> str:
    """Return the option `global_keyprefix`; `ImproperlyConfigured` for what is not known."""
    for name in options:
        if name != "global_keyprefix":
            hint = nearest(name, ["global_keyprefix"])
            raise ImproperlyConfigured(
                f"{url!r}: unknown transport option {name!r}{f' (did you mean {hint}?)' if hint else ''};"
                " known: global_keyprefix"
            )
    prefix = options.get("global_keyprefix") or ""
    if prefix and not (isinstance(prefix, str) and _PLAIN_PREFIX.fullmatch(prefix)):
        raise ImproperlyConfigured(
            f"{url!r}: transport option global_keyprefix begins a file name: at most 60 letters, digits,"
            f" '_', '-' and '.' and not {prefix!r}"
        )
    return prefix


def folder_of(url: str) -> str:
    """Return the path in ``file:///absolute/folder`` or ``file://relative/folder``, as Celery reads it."""
    rest = url.partition("://")[2]
    path = rest[len("localhost") :] if rest.startswith("localhost/") else rest
    if re.match(r"/[A-Za-z]:", path) and os.name == "nt":
        path = path[1:]
    if not path.strip("/"):
        raise ImproperlyConfigured(f"{url!r} names no folder: write file:///path/of/a/folder")
    return os.path.realpath(path)


def _lock_of(name: str) -> int:
    return zlib.crc32(name.encode("ascii")) % LOCKS


def _end_of(stat: os.stat_result) -> Optional[float]:
    """Return the moment at which a result is over, None for one that is kept."""
    return stat.st_mtime_ns / 1e9 if stat.st_mtime_ns > stat.st_ctime_ns else None


def _is_over(stat: os.stat_result, now: float) -> bool:
    over = _end_of(stat)
    return over is not None and over <= now


def _is_temporary(name: str) -> bool:
    return name.startswith(_TEMPORARY) and name.endswith(".tmp")


def _stat(path: str) -> Optional[os.stat_result]:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _make_folder(path: str) -> None:
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise


def _remove(path: str) -> None:
    try:
        _insist(os.unlink, path)
    except FileNotFoundError:
        pass  # gone already


def _insist(call: Callable[..., None], *paths: str) -> None:
    """Call; again for a moment on Windows, where a file that somebody reads cannot be replaced."""
    deadline_mono = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            return call(*paths)
        except PermissionError:
            if os.name != "nt" or time.monotonic() > deadline_mono:
                raise
            time.sleep(0.005)


if sys.platform == "win32":

    def _try_lock(fd: int) -> bool:
        os.lseek(fd, 0, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(fd: int) -> None:
        os.lseek(fd, 0, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)

else:

    def _try_lock(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)

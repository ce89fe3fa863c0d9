# SPDX-License-Identifier: MIT
"""A sign of life: a small file that a worker's loop writes about every second, and what reads it.

Written by the loop and by nothing else, so that a loop that is stuck or stopped shows as a file that
grows old.  It is one JSON object, replaced as a whole::

    {"pid": 4711, "node": "celery@host", "kind": "worker", "state": "consuming", "since": 1767225600.0,
     "broker_away_since": null, "turn": 1767225661.2, "turn_mono": 80641.7}

`since` (of this state), `broker_away_since` and `turn` are epoch seconds; ages are counted with
`turn_mono`, the monotonic clock that all processes of a machine share, as the other one may be set.
Who reads it needs neither the app nor the broker, and this module imports next to nothing: a container
asks every few seconds.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from typing import Any, Dict, List, Optional, Tuple

#: States.  A beat takes no messages: it sends.
STARTING, CONSUMING, SENDING, NO_BROKER, STOPPING = (
    "starting", "consuming", "sending", "no broker", "stopping"
)  # fmt: skip
#: Seconds between two signs of life.
INTERVAL_S = 1.0
#: Seconds without one after which the loop counts as stuck: more than one try to connect takes.
MAX_AGE_S = 15.0
SUFFIX = ".health"
#: No file of ours is larger.
_MAX_BYTES = 4096


def default_folder() -> str:
    """Return the folder of this user's health files; it need not exist.

    Of this user alone, as anybody may write to the folder for temporary files.
    """
    import tempfile  # loads what makes passwords and archives; not needed where a file is named

    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""  # on Windows each user has a folder
    return os.path.join(tempfile.gettempdir(), f"miniq{user}")


def default_path(node: str) -> str:
    """Return the health file of `node`; makes its folder.  `OSError` where that is not ours."""
    folder = default_folder()
    os.makedirs(folder, 0o700, exist_ok=True)
    found = os.lstat(folder)
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode)):
        raise PermissionError(f"{folder} belongs to another user")
    return os.path.join(folder, file_name(node))


def file_name(node: str) -> str:
    """Return the name of a node's file."""
    return "".join(char if char.isalnum() or char in "@._-" else "_" for char in node) + SUFFIX


class HealthFile:
    """Writes one file; in the loop's thread.  `OSError` where it cannot be written."""

    def __init__(self, path: str, node: str, kind: str = "worker") -> None:
        self.path = path
        self._node = node
        self._kind = kind
        self._state = ""
        self._since = 0.0
        self._beside = f"{path}.{os.getpid()}"
        self._is_in_our_folder = os.path.dirname(path) == default_folder()

    def show(self, state: str, now: float, mono: float, broker_away_since: Optional[float] = None) -> None:
        """Write that the loop turns; `now` and `broker_away_since` are epoch seconds."""
        if state != self._state:
            self._state, self._since = state, now
        record = {
            "pid": os.getpid(),
            "node": self._node,
            "kind": self._kind,
            "state": state,
            "since": self._since,
            "broker_away_since": broker_away_since,
            "turn": now,
            "turn_mono": mono,
        }
        try:
            self._write(record)
        except FileNotFoundError:
            if not self._is_in_our_folder:
                raise
            default_path(self._node)  # the last other one has just taken the folder away
            self._write(record)

    def _write(self, record: Dict[str, Any]) -> None:
        with open(self._beside, "w", encoding="utf-8") as file:
            json.dump(record, file)
        os.replace(self._beside, self.path)

    def remove(self) -> None:
        """Take the file away, at the end."""
        for path in (self._beside, self.path):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass  # never written, or cleaned up by others
        if self._is_in_our_folder:
            try:
                os.rmdir(os.path.dirname(self.path))
            except OSError:
                pass  # others have theirs in it


def read(path: str) -> Optional[Dict[str, Any]]:
    """Return what a file says; None where there is none, or it is no health file."""
    try:
        with open(path, encoding="utf-8") as file:
            record = json.loads(file.read(_MAX_BYTES))
        texts = (record[key] for key in ("node", "kind", "state"))
        if all(isinstance(text, str) for text in texts) and isinstance(record["pid"], int):
            return {**record, "turn_mono": float(record["turn_mono"])}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nobody wrote it, or not we
    return None


def read_all() -> List[Tuple[str, Dict[str, Any]]]:
    """Return (path, content) of all of this user's files, sorted by name."""
    folder = default_folder()
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    paths = [os.path.join(folder, name) for name in names if name.endswith(SUFFIX)]
    found = [(path, read(path)) for path in paths]
    return [(path, record) for path, record in found if record is not None]


def remove_left_over() -> None:
    """Delete the files of processes that were killed, so that nobody asks after them for ever."""
    for path, record in read_all():
        if not is_alive(record["pid"]):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass  # another one was faster


def judge(record: Dict[str, Any], mono: float, max_age_s: float) -> str:
    """Return what is wrong with the process of `record`; empty where it lives and its loop turns."""
    if not is_alive(record["pid"]):
        return "its process is gone"
    age_s = mono - record["turn_mono"]
    if not 0 <= age_s <= max_age_s:
        # Of the future: the machine was started anew, and another process has that number now.
        return f"its loop did not turn for {age_s:.0f} s" if age_s > 0 else "its process is gone"
    return ""


def is_alive(pid: int) -> bool:
    """Say whether there is a process `pid`, whoever owns it.

    One that has ended counts as gone, though its parent has not asked after it: in a container
    process 1 may never do.
    """
    if not 0 < pid < 1 << 31:
        return False
    if sys.platform == "win32":  # there, os.kill would end the process
        import ctypes  # needed nowhere else

        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
        ctypes.windll.kernel32.CloseHandle(handle)
        return bool(handle)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # alive, but not ours
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (OSError, IndexError):
        return True  # this system does not tell, or it ends at this moment

# SPDX-License-Identifier: MIT
"""How far tasks have come, read from their metas and shown on one line.

    [##########..........]  50 %  5/10  STARTED, 1 failed  0:07

On a terminal the line is drawn again in its place, with a carriage return and no other control
character; elsewhere a line is written now and then.  A task shows more than "not yet, done" if it
calls ``update_state(state="PROGRESS", meta={"current": 5, "total": 10})``; the state may have any name.
"""

from __future__ import annotations

import math
import os
import time
from typing import IO, Any, Callable, Mapping, Optional, Sequence, Tuple

from . import states
from .text import safe_repr

#: Where nobody looks at a terminal: seconds between two lines.
LINE_EVERY_S = 10.0
#: Columns of a terminal that does not say, of a bar at most, and of one that is worth drawing.
COLUMNS = 80
BAR_MAX = 40
BAR_MIN = 5
_MAX_STATE_CHARS = 40


def numbers_of(meta: Mapping[str, Any]) -> Optional[Tuple[float, float]]:
    """Return (current, total) as the running task told them, None if it did not."""
    info = meta.get("result")
    if meta["status"] in states.ALL_STATES or not isinstance(info, dict):
        return None
    current, total = (_number(info.get(key)) for key in ("current", "total"))
    if current is None or total is None or total <= 0:
        return None
    return min(max(current, 0.0), total), total


def _number(value: Any) -> Optional[float]:
    """Return `value` if it is a number to count with; it comes from a store, and may be anything."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300:
        return float(value)
    return None


def state_of(metas: Sequence[Mapping[str, Any]]) -> str:
    """Return one state for several tasks: the worst that one of them ended in, else how far they are."""
    found = {meta["status"] for meta in metas}
    if len(found) == 1:
        return str(found.pop())
    for state in (states.FAILURE, states.REVOKED):
        if state in found:
            return state
    return states.STARTED if found else states.SUCCESS


def describe(metas: Sequence[Mapping[str, Any]], state: str) -> Tuple[Optional[float], str]:
    """Return how much of the tasks is done, from 0 to 1 (None = nobody knows), and that in words."""
    parts, ended, failed = 0.0, 0, 0
    for meta in metas:
        told = numbers_of(meta)
        if meta["status"] in states.READY_STATES:
            ended += 1
            failed += meta["status"] != states.SUCCESS
        elif told is not None:
            parts += told[0] / told[1]
    shown = state if state.isprintable() and len(state) <= _MAX_STATE_CHARS else safe_repr(state, 40)
    if len(metas) == 1:
        told = numbers_of(metas[0])
        if told is None:
            return (1.0 if ended else None), shown
        return parts, f"{told[0]:g}/{told[1]:g}  {shown}"
    note = f", {failed} failed" if failed else ""
    done = (ended + parts) / len(metas) if metas else 1.0
    return done, f"{ended}/{len(metas)}  {shown}{note}"


class Meter:
    """A line that is kept up to date; see the module."""

    def __init__(self, file: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._start_mono = clock()
        self._is_terminal = file.isatty()
        self._shown = ""
        self._line_is_open = False
        self._next_line_mono = self._start_mono

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._line_is_open:
            self._file.write("\n")
            self._file.flush()

    def show(self, metas: Sequence[Mapping[str, Any]], state: str, last: bool = False) -> None:
        """Show how far `metas` are; `last` is not left out, however soon it comes."""
        done, words = describe(metas, state)
        mono = self._clock()
        text = words if done is None else f"{math.floor(done * 100):3d} %  {words}"
        if not self._is_terminal:
            if last or (text != self._shown and mono >= self._next_line_mono):
                self._shown, self._next_line_mono = text, mono + LINE_EVERY_S
                self._file.write(f"{text.strip()}  {_duration(mono - self._start_mono)}\n")
                self._file.flush()
            return
        text += f"  {_duration(mono - self._start_mono)}"
        # The last column stays free: some terminals begin a new line after it.
        room = _columns(self._file) - 1
        width = min(room - len(text) - 3, BAR_MAX)
        if done is not None and width >= BAR_MIN:
            text = f"[{('#' * math.floor(done * width)).ljust(width, '.')}] {text}"
        text = text[:room]
        # What is left of the line before is overwritten.
        self._file.write("\r" + text.ljust(min(len(self._shown), room)))
        self._file.flush()
        self._shown, self._line_is_open = text, True


def _columns(file: IO[str]) -> int:
    # Asked each time, a window may have another size now.  Of this very file: shutil's function asks standard
    # output, which may be a pipe, and loads what unpacks archives.
    try:
        return os.get_terminal_size(file.fileno()).columns or COLUMNS
    except (OSError, ValueError):
        return COLUMNS


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

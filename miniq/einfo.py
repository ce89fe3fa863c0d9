# SPDX-License-Identifier: MIT
"""What is told of a failed task: the exception, and its traceback as bounded text.

Text, because a traceback object would keep every local of the failed task alive, and because it
crosses processes.
"""

from __future__ import annotations

import os
import traceback as traceback_module

from .text import safe_repr

#: Frames and characters kept of a traceback; a recursion error would fill the store otherwise.
MAX_TRACEBACK_FRAMES = 100
MAX_TRACEBACK_CHARS = 64 * 1024
#: Modules whose frames lead to the task's own and say nothing of it.
_RUNNING = tuple(f"{__package__}.{name}" for name in ("trace", "eager", "coroutines"))


class ExceptionInfo:
    """An exception and its traceback as text; what handlers get as ``einfo``."""

    __slots__ = ("exception", "traceback", "type", "internal")

    def __init__(self, exception: BaseException, traceback: str, internal: bool = False) -> None:
        self.exception = exception
        self.traceback = traceback
        self.type = type(exception)
        self.internal = internal

    def __str__(self) -> str:
        return self.traceback

    def __repr__(self) -> str:
        return f"<ExceptionInfo: {safe_repr(self.exception)}>"


def format_traceback(error: BaseException) -> str:
    """Return the traceback of `error` as bounded text, without the frames that led to the task's own."""
    try:
        tb = entry = error.__traceback__
        while entry is not None:
            frame = entry.tb_frame
            if frame.f_globals.get("__name__") in _RUNNING:
                tb = entry.tb_next
            elif os.path.basename(os.path.dirname(frame.f_code.co_filename)) != "asyncio":
                break  # asyncio is between for a coroutine
            entry = entry.tb_next
        # Negative: the innermost frames, where it happened.
        lines = traceback_module.format_exception(type(error), error, tb, limit=-MAX_TRACEBACK_FRAMES)
        text = "".join(lines)
    except Exception as broken:  # safety net: __str__ or __cause__ of a user's exception may do anything
        text = f"{type(error).__name__}: (its traceback could not be written: {type(broken).__name__})\n"
    if len(text) > MAX_TRACEBACK_CHARS:
        half = MAX_TRACEBACK_CHARS // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters cut ...\n{text[-half:]}"
    return text

# SPDX-License-Identifier: MIT
"""Logging: the task logger, the formats, and a worker's set-up that can be undone.

Importing this module configures nothing, and nothing but a worker ever configures anything.  A
worker does so only where the root logger has no handler (or is told to replace them), never
changes a logger that somebody configured, and `LoggingSetup.undo` leaves all as it was.

The tree is the one Celery's users know: ``celery`` (the worker's own lines), ``celery.task`` (parent
of what `get_task_logger` returns) and ``celery.redirected`` (what was printed).
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from typing import Any, Callable, Iterable, List, Optional, TextIO, Tuple, Union

from . import _state, signals
from .exceptions import ImproperlyConfigured
from .text import expand_file_name, mask_urls, nearest, truncate

WORKER_FORMAT = "[%(asctime)s: %(levelname)s/%(processName)s] %(message)s"
TASK_FORMAT = "[%(asctime)s: %(levelname)s/%(processName)s] %(task_name)s[%(task_id)s]: %(message)s"

#: Names a log level may have in settings and on the command line.
LEVELS = {
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARNING": logging.WARNING,
    "WARN": logging.WARNING,
    "ERROR": logging.ERROR,
    "CRITICAL": logging.CRITICAL,
    "FATAL": logging.CRITICAL,
}

root_logger = logging.getLogger()
base_logger = logging.getLogger("celery")
task_logger = logging.getLogger("celery.task")
redirected_logger = logging.getLogger("celery.redirected")


def get_task_logger(name: str) -> logging.Logger:
    """Return the logger `name`, made a child of ``celery.task``: its lines name task and id.

    Where an ancestor of it was configured (it has a handler or a level), that one stays in charge.
    """
    if name in ("celery", "celery.task") or not name:
        raise RuntimeError(f"Logger name {name!r} is reserved!")
    logger = logging.getLogger(name)
    ancestor = logger.parent
    while ancestor is not None and ancestor is not task_logger and ancestor is not root_logger:
        if ancestor.handlers or ancestor.level != logging.NOTSET:
            return logger
        ancestor = ancestor.parent
    if ancestor is not task_logger:
        logger.parent = task_logger
        logger.setLevel(logger.level)  # makes logging forget what it remembers of the old parent
    return logger


def get_logger(name: str) -> logging.Logger:
    """Return the ``celery.`` logger for a module of this package (give its ``__name__``).

    The package's own name stays out of it: it is another one where the folder was vendored.
    """
    return base_logger.getChild(name.removeprefix(f"{__package__}."))


def level_number(level: Union[str, int]) -> int:
    """Return a level's number; `ImproperlyConfigured` for a name that is none."""
    if isinstance(level, int):
        return level
    number = LEVELS.get(level.upper())
    if number is None:
        hint = nearest(level.upper(), LEVELS)
        raise ImproperlyConfigured(
            f"unknown log level {truncate(level, 50)!r}"
            + (f" (did you mean {hint}?)" if hint else "")
            + f"; known: {', '.join(LEVELS)}"
        )
    return number


# -- formatters ----------------------------------------------------------------------------------

_RESET = "\033[0m"
_COLORS = {
    logging.DEBUG: "\033[1;34m",
    logging.WARNING: "\033[1;33m",
    logging.ERROR: "\033[1;31m",
    logging.CRITICAL: "\033[1;35m",
}


class ColorFormatter(logging.Formatter):
    """Colours a line by its level when `use_color` is set; masks passwords in URLs always."""

    def __init__(
        self, fmt: Optional[str] = None, use_color: bool = True, datefmt: Optional[str] = None
    ) -> None:
        super().__init__(fmt, datefmt)
        self.use_color = use_color

    def format(self, record: logging.LogRecord) -> str:
        text = mask_urls(super().format(record))
        color = _COLORS.get(record.levelno) if self.use_color else None
        return f"{color}{text}{_RESET}" if color else text


class TaskFormatter(ColorFormatter):
    """Knows ``%(task_name)s`` and ``%(task_id)s``; ``???`` outside of a task."""

    def format(self, record: logging.LogRecord) -> str:
        if "task_name" not in record.__dict__:
            info = _state.current_task_info()
            record.task_name, record.task_id = info or ("???", "???")
        return super().format(record)


def supports_color(stream: Any) -> bool:
    """Say whether lines on `stream` should be coloured: a terminal, and nobody said NO_COLOR."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or os.name == "nt":
        return False
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # no file, or a closed one
        return False


# -- what is printed -----------------------------------------------------------------------------


class LoggingProxy(io.TextIOBase):
    """A stdout or stderr whose lines go to a logger.

    A line is logged when it is whole; each thread has its own unfinished one.  What a handler
    writes while it handles such a line goes to `original`, so nothing can go round in circles.
    """

    #: An unfinished line longer than this is logged as it is (characters).
    MAX_LINE = 8192

    def __init__(self, logger: logging.Logger, level: int = logging.WARNING, original: Any = None) -> None:
        super().__init__()
        self._logger = logger
        self._level = level
        self._original = original
        self._thread = threading.local()

    def write(self, data: str) -> int:
        if getattr(self._thread, "inside", False):
            if self._original is not None:
                self._original.write(data)
            return len(data)
        text = getattr(self._thread, "pending", "") + data
        *lines, rest = text.split("\n")
        if len(rest) > self.MAX_LINE:
            lines.append(rest)
            rest = ""
        self._thread.pending = rest
        self._log(lines)
        return len(data)

    def flush(self) -> None:
        if getattr(self._thread, "inside", False):
            return
        rest = getattr(self._thread, "pending", "")
        self._thread.pending = ""
        self._log([rest])

    def _log(self, lines: Iterable[str]) -> None:
        self._thread.inside = True
        try:
            for line in lines:
                if line.strip():
                    self._logger.log(self._level, "%s", line.rstrip())
        finally:
            self._thread.inside = False

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        """Return the original's descriptor, for child programs and faulthandler."""
        if self._original is None:
            raise io.UnsupportedOperation("fileno")
        descriptor: int = self._original.fileno()
        return descriptor

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """Stay open: a program that closes its stdout shall not end the logging of others."""
        self.flush()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._original, "encoding", None) or "utf-8"

    @property
    def errors(self) -> Optional[str]:  # type: ignore[override]
        return getattr(self._original, "errors", None)

    @property
    def buffer(self) -> Any:
        """Return the original's byte stream: bytes bypass the log."""
        return self._original.buffer


# -- a worker's set-up ---------------------------------------------------------------------------


class LoggingSetup:
    """What `setup_worker_logging` did.

    `configured` says whether it set up handlers (False: the host, or a receiver of `setup_logging`,
    is in charge).
    """

    def __init__(self) -> None:
        self.configured = False
        self._handlers: List[Tuple[logging.Logger, logging.Handler]] = []
        self._undo: List[Callable[[], None]] = []
        self._per_child: Optional[Callable[[int], logging.Handler]] = None

    def add(self, logger: logging.Logger, handler: logging.Handler) -> None:
        """Put a handler of ours on `logger`."""
        logger.addHandler(handler)
        self._handlers.append((logger, handler))

    def reopen(self, index: int) -> None:
        """In child number `index` (from 1): go on in its own file, where the name has ``%i`` or ``%I``."""
        if self._per_child is None:
            return
        inherited, self._handlers = self._handlers, []
        for logger, old in inherited:
            handler = self._per_child(index)
            handler.setFormatter(old.formatter)
            self.add(logger, handler)
            logger.removeHandler(old)
            old.close()

    def undo(self) -> None:
        """Leave the process's logging and streams as they were; harmless when called again."""
        while self._undo:
            self._undo.pop()()
        for _, handler in self._handlers:
            handler.close()
        self._handlers.clear()
        self.configured = False


def setup_worker_logging(
    level: Union[str, int] = "WARNING",
    logfile: Optional[str] = None,
    color: Optional[bool] = None,
    hijack: bool = False,
    redirect_stdouts: bool = False,
    redirect_level: Union[str, int] = "WARNING",
    node: str = "",
    index: Optional[int] = None,
    fmt: str = WORKER_FORMAT,
    task_fmt: str = TASK_FORMAT,
    datefmt: Optional[str] = None,
    task_datefmt: Optional[str] = None,
) -> LoggingSetup:
    """Set up logging for a worker and return what can be undone.

    Does nothing to loggers when the root logger has a handler, unless `hijack`; nothing at all
    when a receiver of the signal `setup_logging` is connected.  `logfile` may have the format
    characters of `expand_file_name`; `index` is the number of the child this is called in.
    Raises `ImproperlyConfigured` for an unknown level or a file that cannot be opened.
    """
    number = level_number(level)
    redirect_number = level_number(redirect_level)
    setup = LoggingSetup()
    told = {"loglevel": number, "logfile": logfile, "format": fmt, "colorize": color}
    if signals.setup_logging.receivers:
        signals.setup_logging.send(sender=None, **told)
    else:
        if hijack or not root_logger.handlers:
            stream = sys.stderr
            if color is None:
                color = logfile is None and supports_color(stream)
            formatters = (
                ColorFormatter(fmt, color, datefmt),
                TaskFormatter(task_fmt, color, task_datefmt or datefmt),
            )
            _configure(setup, number, lambda: _handler(logfile, stream, node, index), formatters, hijack)
            if logfile is not None and ("%i" in logfile or "%I" in logfile):
                setup._per_child = lambda child: _handler(logfile, stream, node, child)
        signals.after_setup_logger.send(sender=None, logger=root_logger, **told)
        signals.after_setup_task_logger.send(sender=None, logger=task_logger, **{**told, "format": task_fmt})
    if redirect_stdouts:
        _redirect(setup, redirect_number)
    return setup


def _configure(
    setup: LoggingSetup,
    level: int,
    new_handler: Callable[[], logging.Handler],
    formatters: Tuple[logging.Formatter, logging.Formatter],
    hijack: bool,
) -> None:
    # Made first of all: opening a file may fail, and then nothing has changed.
    handlers = (new_handler(), new_handler())
    setup.configured = True
    loggers = (root_logger, base_logger, task_logger, redirected_logger)
    for logger in loggers:
        setup._undo.append(_restorer(logger))
        if hijack:
            logger.handlers[:] = []
            logger.setLevel(logging.NOTSET)
    root_logger.setLevel(level)
    for logger, handler, formatter in zip((root_logger, task_logger), handlers, formatters):
        handler.setFormatter(formatter)
        if not logger.handlers:
            setup.add(logger, handler)
            logger.propagate = logger is root_logger  # a task's line would come twice
        else:
            handler.close()


def _restorer(logger: logging.Logger) -> Callable[[], None]:
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate

    def restore() -> None:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate

    return restore


def _handler(logfile: Optional[str], stream: TextIO, node: str, index: Optional[int]) -> logging.Handler:
    if logfile is None:
        return logging.StreamHandler(stream)
    path = expand_file_name(logfile, node, index)
    try:
        if os.name == "nt":  # an open file cannot be renamed there, so none needs watching
            return logging.FileHandler(path, encoding="utf-8")
        from logging.handlers import WatchedFileHandler  # loads sockets and more: only for log files

        return WatchedFileHandler(path, encoding="utf-8")
    except OSError as error:
        raise ImproperlyConfigured(f"cannot open the log file {path!r}: {error}") from error


def _redirect(setup: LoggingSetup, level: int) -> None:
    stdout, stderr = sys.stdout, sys.stderr
    proxies: Tuple[LoggingProxy, LoggingProxy] = (
        LoggingProxy(redirected_logger, level, stdout),
        LoggingProxy(redirected_logger, level, stderr),
    )

    def restore() -> None:
        for proxy in proxies:
            proxy.flush()
        # Somebody may have put another stream there since: that one is not ours to remove.
        if sys.stdout is proxies[0]:
            sys.stdout = stdout
        if sys.stderr is proxies[1]:
            sys.stderr = stderr

    setup._undo.append(restore)
    sys.stdout, sys.stderr = proxies

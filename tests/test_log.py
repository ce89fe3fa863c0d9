# SPDX-License-Identifier: MIT
"""The task logger, the formatters, and a worker's set-up that can be undone."""

from __future__ import annotations

import io
import logging
import logging.config
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest

from miniq import _state, log, signals
from miniq.exceptions import ImproperlyConfigured

TREE = ("", "celery", "celery.task", "celery.redirected")


def snapshot() -> Any:
    loggers = [logging.getLogger(name) for name in TREE]
    return [(one.handlers[:], one.level, one.propagate) for one in loggers], sys.stdout, sys.stderr


_made: List[log.LoggingSetup] = []


def set_up(**options: Any) -> log.LoggingSetup:
    """Call `setup_worker_logging`; undone when `bare_logging` ends."""
    _made.append(log.setup_worker_logging(**options))
    return _made[-1]


@contextmanager
def bare_logging() -> Iterator[None]:
    """Logging as in a fresh process; put back afterwards.

    Around the test's body, not a fixture: pytest puts its own handlers on the root logger for each
    phase of a test.
    """
    kept = snapshot()
    for name in TREE:
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.setLevel(logging.WARNING if not name else logging.NOTSET)
        logger.propagate = True
    try:
        yield
    finally:
        while _made:
            _made.pop().undo()
        for name, (handlers, level, propagate) in zip(TREE, kept[0]):
            logger = logging.getLogger(name)
            logger.handlers[:] = handlers
            logger.setLevel(level)
            logger.propagate = propagate
        sys.stdout, sys.stderr = kept[1], kept[2]


class Task:
    name = "proj.add"


class Request:
    id: Optional[str] = "id-1"


@pytest.fixture
def in_task() -> Iterator[None]:
    token = _state.push_frame(Task(), Request())
    yield
    _state.pop_frame(token)


def lines(path: Path) -> List[str]:
    return path.read_text(encoding="utf-8").splitlines()


def record(message: str, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("x", level, __file__, 1, message, None, None)


# -- loggers -------------------------------------------------------------------------------------


def test_importing_configures_nothing() -> None:
    code = (
        "import logging, sys; before = (sys.stdout, sys.stderr)\n"
        "import miniq.log as log\n"
        "log.get_task_logger('proj.tasks')\n"
        "assert before == (sys.stdout, sys.stderr)\n"
        "assert not any(getattr(one, 'handlers', ()) for one in logging.Logger.manager.loggerDict.values())\n"
        "assert not logging.root.handlers and logging.root.level == logging.WARNING\n"
    )
    root = str(Path(log.__file__).parent.parent)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30, cwd=root)


@bare_logging()
def test_a_task_logger_hangs_below_celery_task() -> None:
    logger = log.get_task_logger("mqlogtest_one.tasks")
    assert logger.name == "mqlogtest_one.tasks"
    assert logger.parent is logging.getLogger("celery.task")
    assert log.get_task_logger("celery.task.mine").parent is logging.getLogger("celery.task")
    logging.getLogger("celery.task").setLevel(logging.DEBUG)
    assert logger.isEnabledFor(logging.DEBUG)


@bare_logging()
def test_a_task_logger_stays_with_a_parent_that_was_configured() -> None:
    parent = logging.getLogger("mqlogtest_two")
    parent.setLevel(logging.ERROR)
    assert log.get_task_logger("mqlogtest_two.tasks").parent is parent
    parent.setLevel(logging.NOTSET)
    assert log.get_task_logger("mqlogtest_two.tasks").parent is logging.getLogger("celery.task")


@bare_logging()
def test_a_logger_that_already_answered_hears_its_new_parent() -> None:
    logger = logging.getLogger("mqlogtest_three")
    assert not logger.isEnabledFor(logging.INFO)
    logging.getLogger("celery.task").setLevel(logging.INFO)
    log.get_task_logger("mqlogtest_three")
    assert logger.isEnabledFor(logging.INFO)


@pytest.mark.parametrize("name", ["celery", "celery.task", ""])
def test_reserved_logger_names_are_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match="reserved"):
        log.get_task_logger(name)


def test_modules_of_the_package_log_below_celery_wherever_it_lives() -> None:
    assert log.get_logger("miniq.worker.consumer").name == "celery.worker.consumer"
    assert log.get_logger("worker").name == "celery.worker"


@pytest.mark.parametrize(("level", "number"), [("INFO", 20), ("debug", 10), ("FATAL", 50), (15, 15)])
def test_levels(level: Any, number: int) -> None:
    assert log.level_number(level) == number


def test_an_unknown_level_is_the_operators_error() -> None:
    with pytest.raises(
        ImproperlyConfigured, match=r"unknown log level 'INOF' \(did you mean INFO\?\); known: DEBUG"
    ):
        log.level_number("INOF")


# -- formatters ----------------------------------------------------------------------------------


def test_a_line_is_coloured_by_its_level_and_the_record_left_alone() -> None:
    formatter = log.ColorFormatter("%(message)s")
    one = record("hot", logging.ERROR)
    assert formatter.format(one) == "\033[1;31mhot\033[0m"
    assert formatter.format(record("so so", logging.INFO)) == "so so"
    assert log.ColorFormatter("%(message)s", use_color=False).format(one) == "hot"


def test_no_password_of_a_url_reaches_a_line() -> None:
    try:
        raise OSError("cannot reach redis://:hunter2@h:1/0")
    except OSError:
        one = logging.LogRecord("x", 40, __file__, 1, "lost %s", ("amqp://u:hunter2@h//",), sys.exc_info())
    for formatter in (log.ColorFormatter(log.WORKER_FORMAT), log.TaskFormatter(log.TASK_FORMAT)):
        text = formatter.format(one)
        assert "hunter2" not in text
        assert "amqp://u:**@h//" in text and "redis://:**@h:1/0" in text


def test_task_lines_name_task_and_id_only_inside_a_task(in_task: None) -> None:
    formatter = log.TaskFormatter("%(task_name)s[%(task_id)s]: %(message)s", use_color=False)
    assert formatter.format(record("in")) == "proj.add[id-1]: in"
    seen: List[str] = []
    thread = threading.Thread(target=lambda: seen.append(formatter.format(record("out"))))
    thread.start()
    thread.join(10)
    assert seen == ["???[???]: out"]


def test_a_record_that_brings_its_own_task_keeps_it(in_task: None) -> None:
    one = record("x")
    one.task_name, one.task_id = "other", "id-2"
    assert log.TaskFormatter("%(task_name)s[%(task_id)s]", use_color=False).format(one) == "other[id-2]"


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert log.supports_color(Terminal()) == (os.name != "nt")
    assert not log.supports_color(io.StringIO())
    assert not log.supports_color(None)
    closed = io.StringIO()
    closed.close()
    assert not log.supports_color(closed)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not log.supports_color(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not log.supports_color(Terminal())


# -- set-up --------------------------------------------------------------------------------------


@bare_logging()
def test_with_nothing_configured_each_line_is_written_once(tmp_path: Path, in_task: None) -> None:
    path = tmp_path / "w.log"
    setup = set_up(level="INFO", logfile=str(path))
    assert setup.configured
    logging.getLogger("celery.worker").info("worker line é")
    log.get_task_logger("mqlogtest_four").info("task line")
    logging.getLogger("elsewhere").warning("other line")
    logging.getLogger("elsewhere").debug("too fine")
    assert [re.sub(r"^\[[^:]*:[^]]*: ", "[", line) for line in lines(path)] == [
        "[INFO/MainProcess] worker line é",
        "[INFO/MainProcess] proj.add[id-1]: task line",
        "[WARNING/MainProcess] other line",
    ]


@bare_logging()
def test_undo_leaves_everything_as_it_was(tmp_path: Path) -> None:
    kept = snapshot()
    setup = log.setup_worker_logging(logfile=str(tmp_path / "w.log"), redirect_stdouts=True, hijack=True)
    assert snapshot() != kept
    setup.undo()
    assert snapshot() == kept
    setup.undo()
    assert snapshot() == kept


@bare_logging()
def test_a_host_that_configured_logging_is_left_alone() -> None:
    stream = io.StringIO()
    logging.config.dictConfig(
        {
            "version": 1, "disable_existing_loggers": False,
            "formatters": {"own": {"format": "own %(message)s"}},
            "handlers": {"own": {"class": "logging.StreamHandler", "stream": stream, "formatter": "own"}},
            "root": {"level": "ERROR", "handlers": ["own"]},
        }
    )  # fmt: skip
    kept = snapshot()
    setup = log.setup_worker_logging(level="DEBUG")
    assert not setup.configured
    assert snapshot() == kept
    log.get_task_logger("mqlogtest_five").error("one line")
    logging.getLogger("celery.worker").warning("below the host's level")
    assert stream.getvalue() == "own one line\n"
    setup.undo()
    assert snapshot() == kept


@bare_logging()
def test_hijacking_replaces_the_hosts_handlers_until_undone(tmp_path: Path) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    logging.getLogger("celery.task").addHandler(handler)
    kept = snapshot()
    setup = log.setup_worker_logging(level="INFO", logfile=str(tmp_path / "w.log"), hijack=True)
    log.get_task_logger("mqlogtest_six").info("line")
    assert stream.getvalue() == ""
    assert len(lines(tmp_path / "w.log")) == 1
    setup.undo()
    assert snapshot() == kept


@bare_logging()
def test_a_receiver_of_setup_logging_takes_over() -> None:
    calls: List[Any] = []

    def mine(**kwargs: Any) -> None:
        calls.append((kwargs["loglevel"], kwargs["logfile"], kwargs["format"], kwargs["colorize"]))

    def never(**kwargs: Any) -> None:
        calls.append("never")

    kept = snapshot()
    signals.setup_logging.connect(mine)
    signals.after_setup_logger.connect(never)
    try:
        setup = log.setup_worker_logging(level="INFO", logfile="x.log", color=False, fmt="f", hijack=True)
    finally:
        signals.setup_logging.disconnect(mine)
        signals.after_setup_logger.disconnect(never)
    assert calls == [(20, "x.log", "f", False)]
    assert not setup.configured and snapshot() == kept


@bare_logging()
def test_receivers_may_change_what_was_set_up(tmp_path: Path) -> None:
    path = tmp_path / "w.log"

    def task_format(logger: logging.Logger, **kwargs: Any) -> None:
        for handler in logger.handlers:
            handler.setFormatter(logging.Formatter("mine %(message)s"))

    def root_format(logger: logging.Logger, **kwargs: Any) -> None:
        assert logger is logging.getLogger()

    signals.after_setup_task_logger.connect(task_format)
    signals.after_setup_logger.connect(root_format)
    try:
        set_up(level="INFO", logfile=str(path))
    finally:
        assert signals.after_setup_task_logger.disconnect(task_format)
        assert signals.after_setup_logger.disconnect(root_format)
    log.get_task_logger("mqlogtest_seven").info("line")
    assert lines(path) == ["mine line"]


@bare_logging()
def test_own_formats_and_dates(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    set_up(
        logfile=str(path), fmt="w %(asctime)s %(message)s", task_fmt="t %(asctime)s %(message)s", datefmt="D"
    )
    logging.getLogger("celery").warning("a")
    log.get_task_logger("mqlogtest_eight").warning("b")
    assert lines(path) == ["w D a", "t D b"]


@bare_logging()
def test_the_log_files_name_expands_and_a_child_gets_its_own(tmp_path: Path) -> None:
    setup = set_up(
        level="INFO",
        logfile=str(tmp_path / "%n%I.log"),
        node="w1@box",
        fmt="%(message)s",
        task_fmt="t %(message)s",
    )
    logging.getLogger("celery").info("parent")
    setup.reopen(2)
    logging.getLogger("celery").info("child")
    log.get_task_logger("mqlogtest_nine").info("task")
    assert lines(tmp_path / "w1.log") == ["parent"]
    assert lines(tmp_path / "w1-2.log") == ["child", "t task"]


@bare_logging()
def test_a_child_shares_a_file_without_a_number_in_its_name(tmp_path: Path) -> None:
    setup = set_up(level="INFO", logfile=str(tmp_path / "%n.log"), node="w1@box")
    kept = snapshot()
    setup.reopen(2)
    assert snapshot() == kept


@bare_logging()
def test_a_log_file_that_cannot_be_opened_changes_nothing(tmp_path: Path) -> None:
    kept = snapshot()
    wrong: List[Dict[str, Any]] = [
        {"logfile": str(tmp_path / "no" / "w.log")},
        {"level": "LOUD"},
        {"logfile": "%x"},
    ]
    for options in wrong:
        with pytest.raises(ImproperlyConfigured):
            log.setup_worker_logging(redirect_stdouts=True, **options)
        assert snapshot() == kept


# -- redirection ---------------------------------------------------------------------------------


@bare_logging()
def test_what_is_printed_goes_to_the_log_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    set_up(logfile=str(path), redirect_stdouts=True, fmt="%(name)s %(levelname)s %(message)s")
    print("one", "line")
    print("half", end="")
    sys.stdout.write(" and half\n\n  \nthree")
    assert len(lines(path)) == 2
    sys.stdout.flush()
    print("100 %s", file=sys.stderr)
    assert lines(path) == [
        "celery.redirected WARNING " + text for text in ("one line", "half and half", "three", "100 %s")
    ]


@bare_logging()
def test_undo_logs_the_last_unfinished_line_and_spares_a_foreign_stream(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    setup = log.setup_worker_logging(
        logfile=str(path), redirect_stdouts=True, redirect_level="ERROR", fmt="%(message)s"
    )
    print("rest", end="")
    foreign = io.StringIO()
    stdout = sys.stdout
    sys.stderr = foreign
    setup.undo()
    assert sys.stderr is foreign
    assert sys.stdout is not stdout
    assert lines(path) == ["rest"]


def test_a_handler_that_prints_does_not_go_round_in_circles() -> None:
    original = io.StringIO()
    logger = logging.Logger("circle")
    proxy = log.LoggingProxy(logger, logging.WARNING, original)

    class Printing(logging.Handler):
        def emit(self, one: logging.LogRecord) -> None:
            proxy.write(f"handled {one.getMessage()}\n")
            proxy.flush()

    logger.addHandler(Printing())
    assert proxy.write("hello\n") == 6
    assert original.getvalue() == "handled hello\n"


def test_threads_do_not_mix_their_unfinished_lines() -> None:
    stream = io.StringIO()
    logger = logging.Logger("threads")
    logger.addHandler(logging.StreamHandler(stream))
    proxy = log.LoggingProxy(logger)
    proxy.write("mine ")
    thread = threading.Thread(target=lambda: proxy.write("theirs\n"))
    thread.start()
    thread.join(10)
    proxy.write("too\n")
    assert stream.getvalue() == "theirs\nmine too\n"


def test_an_endless_line_is_not_kept() -> None:
    stream = io.StringIO()
    logger = logging.Logger("endless")
    logger.addHandler(logging.StreamHandler(stream))
    proxy = log.LoggingProxy(logger)
    for _ in range(100):
        proxy.write("x" * 1000)
    assert len(stream.getvalue()) > 90_000


def test_the_proxy_is_a_safe_stream(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w", encoding="utf-8") as original:
        proxy = log.LoggingProxy(logging.getLogger("celery.redirected"), original=original)
        assert proxy.fileno() == original.fileno()
        assert proxy.buffer is original.buffer
        assert (proxy.isatty(), proxy.writable(), proxy.encoding.lower()) == (False, True, "utf-8")
        proxy.close()
        assert not proxy.closed
    without = log.LoggingProxy(logging.getLogger("celery.redirected"))
    with pytest.raises(io.UnsupportedOperation):
        without.fileno()
    assert without.encoding == "utf-8"

# SPDX-License-Identifier: MIT
"""What a worker writes, and where: task loggers, redirection, files per child, colours, the host's set-up."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import pytest
from workers import environment

SOURCE = """
    import logging, sys
    from miniq import MiniQ
    from miniq.log import get_task_logger

    app = MiniQ("proj")
    logger = get_task_logger(__name__)
    plain = logging.getLogger("elsewhere")

    @app.task
    def talk():
        logger.warning("from the task logger")
        plain.warning("from another logger")
        print("from print")
        print("from stderr", file=sys.stderr)

    @app.task
    def connect():
        logger.warning("to redis://user:hunter2@host/0")
    """


def test_lines_name_task_and_id_and_hide_passwords(worker_process: Any, client: Any) -> None:
    worker = worker_process(SOURCE, "-c", "1")
    result = client.send("talk")
    result.get(timeout=10)
    client.run("connect")
    log = worker.log
    stamp = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}: "
    process = r"/\w+PoolWorker-1\] "
    assert re.search(stamp + f"INFO/MainProcess\\] Task proj.talk\\[{result.id}\\] received", log)
    assert re.search(stamp + "WARNING" + process + rf"proj.talk\[{result.id}\]: from the task logger", log)
    assert re.search(stamp + "WARNING" + process + "from another logger", log)
    assert re.search(
        stamp + "INFO" + process + rf"Task proj.talk\[{result.id}\] succeeded in [\d.e-]+s: None", log
    )
    assert re.search("^from print$", log, re.MULTILINE) and re.search("^from stderr$", log, re.MULTILINE)
    assert log.count("from the task logger") == 1
    assert "redis://user:**@host/0" in log and "hunter2" not in log


@pytest.mark.parametrize("method", ["fork", "spawn"] if hasattr(os, "fork") else ["spawn"])
def test_redirection_and_a_file_for_each_child(
    worker_process: Any, client: Any, tmp_path: Any, method: str
) -> None:
    source = SOURCE.replace(
        'MiniQ("proj")',
        'MiniQ("proj", worker_redirect_stdouts=True, worker_redirect_stdouts_level="ERROR",'
        ' worker_log_format="<%(levelname)s> %(message)s")',
    )
    logfile = str(tmp_path / "%n-at-%h%I.txt")
    worker = worker_process(
        source, "-c", "1", "-n", "w@here", "-f", logfile, "--pool-start-method", method, loglevel="WARNING"
    )
    client.run("talk")
    worker.stop()
    main, child = tmp_path / "w-at-here.txt", tmp_path / "w-at-here-1.txt"
    lines = child.read_text().splitlines()
    assert "<ERROR> from print" in lines and "<ERROR> from stderr" in lines
    assert "<WARNING> from another logger" in lines
    assert "from print" not in worker.log
    assert main.read_text() == "<WARNING> Shutdown (warm) by SIGTERM: 0 tasks running.\n"


def test_configured_host_keeps_its_handlers_and_levels(worker_process: Any, client: Any) -> None:
    source = """
    import logging.config

    logging.config.dictConfig({
        "version": 1, "disable_existing_loggers": False,
        "formatters": {"own": {"format": "OWN %(name)s %(message)s"}},
        "handlers": {"own": {"class": "logging.StreamHandler", "formatter": "own"}},
        "root": {"level": "WARNING", "handlers": ["own"]},
    })
    """
    worker = worker_process(source + SOURCE, "-c", "1")
    client.run("talk")
    worker.stop()
    own = [line for line in worker.log.splitlines() if "logger" in line]
    assert sorted(own) == ["OWN elsewhere from another logger", "OWN proj from the task logger"]
    assert "received" not in worker.log
    hijacked = source + SOURCE.replace('MiniQ("proj")', 'MiniQ("proj", worker_hijack_root_logger=True)')
    worker = worker_process(hijacked, "-c", "1")
    client.run("talk")
    worker.stop()
    assert "OWN" not in worker.log and "received" in worker.log
    assert worker.log.count("from another logger") == worker.log.count("from the task logger") == 1


@pytest.mark.skipif(os.name != "posix", reason="needs a terminal")
@pytest.mark.parametrize(
    ("flags", "env", "coloured"), [((), {}, True), (("-C",), {}, False), ((), {"NO_COLOR": "1"}, False)]
)
def test_colours_only_on_a_terminal_that_wants_them(
    sqlite_url: str, tmp_path: Any, flags: Any, env: Any, coloured: bool
) -> None:
    import pty

    text = f'from miniq import MiniQ\napp = MiniQ("proj", broker={sqlite_url!r})\n'
    (tmp_path / "proj.py").write_text(text)
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "miniq", "-A", "proj", *flags, "worker", "-P", "solo"]
        os.chdir(tmp_path)
        os.execve(sys.executable, command, environment(tmp_path, TERM="xterm", **env))
    output = b""
    try:
        while b"tasks    (none" not in output:
            output += os.read(terminal, 4096)
        os.write(terminal, b"\x03")  # Ctrl-C
        while True:
            output += os.read(terminal, 4096)
    except OSError:  # the worker has left its terminal
        pass
    finally:
        os.close(terminal)
        assert os.waitpid(pid, 0)[1] == 0
    assert b"Shutdown (warm) by SIGINT" in output
    assert (b"\x1b[1;33m[" in output) is coloured

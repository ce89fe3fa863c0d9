# SPDX-License-Identifier: MIT
"""``events``: lines, JSON, pictures, and the screen, played as text and once on a real terminal."""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from waiting import wait_until
from workers import environment

from miniq import MiniQ
from miniq.cli.events import Dumper
from miniq.cli.events_screen import KEY_NAMES, Screen, _log_on
from miniq.events import EventDispatcher, State

APP = """
from miniq import MiniQ
from miniq.events.snapshot import Polaroid

app = MiniQ("proj")

class Pictures(Polaroid):
    clear_after = True

    def on_shutter(self, state):
        with open("pictures", "a") as file:
            for uuid, task in state.tasks_by_time():
                file.write(f"{uuid} {task.state}\\n")
"""


@pytest.fixture
def ours(make_app: Callable[..., MiniQ], tmp_path: Path) -> Iterator[EventDispatcher]:
    """What tells: a dispatcher in the name of a worker."""
    (tmp_path / "proj.py").write_text(APP)
    with EventDispatcher(app=make_app("proj"), hostname="w1@h") as dispatcher:
        yield dispatcher


@pytest.fixture
def start(program: Any, tmp_path: Path, sqlite_url: str) -> Callable[..., Any]:
    """Start ``python -m miniq -A proj events ...`` as a process."""

    def start(*args: str) -> Any:
        command = [sys.executable, "-m", "miniq", "-A", "proj", "events", *args]
        return program(command, tmp_path, environment(tmp_path, MINIQ_BROKER_URL=sqlite_url))

    return start


def ended(tmp_path: Path, url: str, *args: str) -> "subprocess.CompletedProcess[str]":
    """Run it to its end."""
    command = [sys.executable, "-m", "miniq", "-A", "proj", "events", *args]
    env = environment(tmp_path, MINIQ_BROKER_URL=url)
    return subprocess.run(
        command, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def tell(ours: EventDispatcher, uuid: str = "1") -> None:
    ours.send("task-received", uuid=uuid, name="proj.add", args="(1, 2)", kwargs="{}", retries=0)
    ours.send("task-succeeded", uuid=uuid, result="3", runtime=0.5)


# -- lines ---------------------------------------------------------------------------------------


def test_events_are_shown_as_celery_shows_them() -> None:
    lines: List[str] = []
    dumper = Dumper(lines.append)
    common = {"hostname": "w1@h", "timestamp": 1795240620.5}
    dumper.on_event({"type": "worker-online", "freq": 2.0, "active": 0, **common})
    about = {"uuid": "1", "name": "add", "args": "()", "kwargs": "{}"}
    dumper.on_event({"type": "task-received", **about, **common})
    dumper.on_event({"type": "task-succeeded", "uuid": "1", "result": "3", **common})
    dumper.on_event({"type": "task-failed", "uuid": "2", **common})
    dumper.on_event({"type": "my-own", **common})
    when = "2026-11-21 05:57:00.500000+00:00"
    assert lines == [
        f"w1@h [{when}] started: active=0, freq=2.0",
        f"w1@h [{when}] task received: add(1) args=() kwargs={{}} ",
        f"w1@h [{when}] task succeeded: add(1) args=() kwargs={{}} result=3",
        f"w1@h [{when}] task failed: 2 ",
        f"w1@h [{when}] my own ",
    ]


def test_dump_prints_lines_or_json_and_ends_when_it_is_told_to(
    start: Callable[..., Any], ours: EventDispatcher
) -> None:
    text, lines, limited = start("--dump"), start("--dump", "--json"), start("--json", "--limit", "3")

    def all_heard() -> bool:
        tell(ours)
        return "task succeeded: proj.add(1)" in text.log and "task-succeeded" in lines.log and bool(
            limited.exitcode is not None
        )

    wait_until(all_heard, 20.0, lambda: [text.log, lines.log, limited.log], 0.05)
    assert text.log.startswith("events: listening (Ctrl-C ends)\n")
    found = [json.loads(line) for line in lines.log.splitlines()]
    assert {one["type"] for one in found} == {"task-received", "task-succeeded"}
    assert found[0]["hostname"] == "w1@h" and "local_received" in found[0]
    assert limited.exitcode == 0 and len(limited.log.splitlines()) == 3
    text.send(2)  # Ctrl-C
    assert text.wait() == 0 and "Traceback" not in text.log


def test_it_says_what_is_wrong(tmp_path: Path, ours: EventDispatcher, sqlite_url: str) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        away = f"redis://:secret@127.0.0.1:{closed.getsockname()[1]}/0"
        found = [
            ended(tmp_path, sqlite_url, "--dump", "--timeout", "0.05"),
            ended(tmp_path, away, "--dump"),
            ended(tmp_path, sqlite_url),
            ended(tmp_path, sqlite_url, "-c", "proj.Picture"),
            ended(tmp_path, sqlite_url, "-F", "0"),
            ended(tmp_path, sqlite_url, "-c", "proj.app"),
            ended(tmp_path, sqlite_url, "-r", "often"),
            ended(tmp_path, sqlite_url, "--limit", "-1"),
        ]
    assert [one.returncode for one in found] == [69, 1, 1, 1, 2, 1, 2, 2]
    quiet, no_broker, no_terminal, no_camera, wrong, other, rate, limit = [one.stderr for one in found]
    assert quiet.endswith("events: no event came within 0.05 s\n")
    assert no_broker.startswith("Error: ") and "redis://:**@127.0.0.1" in no_broker
    assert no_terminal == "Error: the screen needs a terminal; without one use events --dump\n"
    assert "did you mean 'Pictures'?" in no_camera
    assert "'0' is not a number of seconds above 0" in wrong
    assert other.startswith("Error: 'proj.app' is no camera; a camera is a class that comes from ")
    assert "Invalid rate limit string: 'often'" in rate and "'-1' is not a number above 0" in limit
    assert not any("Traceback" in one.stderr for one in found)


def test_a_camera_takes_pictures_until_it_is_stopped(
    start: Callable[..., Any], ours: EventDispatcher, tmp_path: Path
) -> None:
    camera = start("-c", "proj.Pictures", "-F", "0.05", "--pidfile", "cam.pid")
    pictures = tmp_path / "pictures"

    def taken() -> bool:
        tell(ours)
        return pictures.exists() and "1 SUCCESS\n" in pictures.read_text()

    wait_until(taken, 20.0, lambda: camera.log, 0.05)
    assert (tmp_path / "cam.pid").read_text() == f"{camera.pid}\n"
    assert "Taking pictures with proj.Pictures every 0.05 s." in camera.log
    assert camera.stop() == 0 and not (tmp_path / "cam.pid").exists()


# -- the screen ----------------------------------------------------------------------------------


class Control:
    """Writes down what the screen wants of workers."""

    def __init__(self) -> None:
        self.asked: List[Any] = []
        self.replies: Any = [{"w1@h": {"ok": "done"}}]

    def revoke(self, *args: Any, **options: Any) -> Any:
        self.asked.append(("revoke", *args))
        return self.replies

    def rate_limit(self, *args: Any, **options: Any) -> Any:
        self.asked.append(("rate_limit", *args))
        return self.replies


class FakeApp:
    def __init__(self) -> None:
        self.control = Control()


@pytest.fixture
def screen() -> Screen:
    state = State()
    number = 0

    def event(kind: str, **fields: Any) -> None:
        nonlocal number
        number += 1
        state.event(
            {"type": kind, "hostname": "w1@h", "clock": number, "timestamp": 1e9 + number, **fields}
        )

    for uuid in ("one", "two"):
        event("task-received", uuid=uuid, name=f"proj.{uuid}", args="()", kwargs="{}")
    event("task-succeeded", uuid="one", result="'fine'", runtime=0.1)
    event("task-failed", uuid="two", exception="E()", traceback="Traceback:\n  line\nE")
    return Screen(FakeApp(), state)


def shown(screen: Screen, width: int = 100, height: int = 20) -> str:
    lines = screen.lines(width, height)
    assert len(lines) <= height and all(len(line.text) <= width for line in lines)
    return "\n".join(line.text for line in lines)


def press(screen: Screen, keys: str) -> None:
    for key in keys.split():
        screen.press(KEY_NAMES.get(key, key))


def test_the_screen_lists_tasks_the_newest_first(screen: Screen) -> None:
    lines = screen.lines(100, 20)
    assert lines[0].text.split() == ["UUID", "TASK", "WORKER", "TIME", "STATE"]
    assert [(line.text.split()[:3], line.text.split()[-1], line.style) for line in lines[1:3]] == [
        (["two", "proj.two", "w1@h"], "FAILURE", "bad"), (["one", "proj.one", "w1@h"], "SUCCESS", "good"),
    ]  # fmt: skip
    assert "Info: events: 4  tasks: 2  workers: 0" in shown(screen)
    for width, height in ((1, 1), (20, 5), (300, 3), (80, 8)):
        shown(screen, width, height)


def test_a_long_page_goes_up_and_down(screen: Screen) -> None:
    lines = [f"line {number}" for number in range(50)]
    screen.state.event({"type": "task-failed", "uuid": "two", "traceback": "\n".join(lines),
                        "hostname": "w1@h", "timestamp": 2e9, "clock": 9})  # fmt: skip
    press(screen, "j t")
    assert "line 0\n" in shown(screen) and "line 16" not in shown(screen)
    assert shown(screen).endswith("(j, k: down and up; any other key: back)")
    for _ in range(100):
        press(screen, "j")
        last = shown(screen)
    assert "line 34\n" in last and "line 49\n" in last
    press(screen, "k")
    assert "line 48\n" in shown(screen) and "line 49" not in shown(screen)
    press(screen, "x")
    assert "UUID" in shown(screen)


def test_no_text_leaves_its_line_or_the_screen(screen: Screen) -> None:
    strange = "\x1b[2J\0\n\ud800" + "\u65e5\u672c" * 40  # the last two take two columns each
    screen.state.event({"type": "task-failed", "uuid": "two", "name": strange, "hostname": strange,
                        "traceback": f"first\n{strange}\nlast", "timestamp": 2e9, "clock": 9})  # fmt: skip
    press(screen, "j")
    found = [screen.lines(60, 20)]
    for keys in ("t", "x i"):
        press(screen, keys)
        found.append(screen.lines(60, 40))
    for line in (line.text for lines in found for line in lines):
        assert line.isprintable() and len(line) + sum(char in "\u65e5\u672c" for char in line) <= 60, line
    assert "".join(line.text for line in found[1]).count("\u65e5") == 40, "a page shows all of it"
    assert screen.lines(0, 20)


def test_keys_move_and_show_what_is_known(screen: Screen) -> None:
    press(screen, "j KEY_DOWN KEY_DOWN")
    assert screen.selected == "one"
    press(screen, "r")
    assert "'fine'" in shown(screen)
    press(screen, "x t")
    assert "UUID" in shown(screen), "it did not fail, so there is no traceback"
    press(screen, "k t")
    assert screen.selected == "two" and "Traceback:\n  line\nE" in shown(screen)
    press(screen, "x r")
    assert "E()" in shown(screen)
    press(screen, "x i")
    assert "state: FAILURE" in shown(screen, height=40) and "exception: E()" in shown(screen, height=40)
    press(screen, "x")
    assert [line.style for line in screen.lines(100, 20)][1] == "selected"
    press(screen, "q")
    assert screen.has_left


def test_what_is_logged_is_shown_and_not_written_over_the_screen(
    screen: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    root, logger = logging.getLogger(), logging.getLogger("miniq.somewhere")
    on_terminal = logging.StreamHandler(sys.stderr)
    root.addHandler(on_terminal)
    try:
        with _log_on(screen):
            logger.warning("clocks %s", "differ")
        assert "clocks differ" in shown(screen) and capsys.readouterr().err == ""
        logger.warning("afterwards")
        assert capsys.readouterr().err == "afterwards\n" and "afterwards" not in shown(screen)
    finally:
        root.removeHandler(on_terminal)


def test_keys_tell_workers_what_to_do(screen: Screen) -> None:
    control = screen.app.control
    press(screen, "c l i t r")
    assert control.asked == [], "nothing is selected"
    press(screen, "j c")
    assert control.asked == [("revoke", "two")]
    assert 'w1@h: {"ok": "done"}' in shown(screen)
    press(screen, "x l 1 0 0 KEY_BACKSPACE / m")
    assert shown(screen).endswith("New rate limit of proj.two: 10/m")
    press(screen, "KEY_ENTER")
    assert control.asked[1:] == [("rate_limit", "proj.two", "10/m")]
    control.replies = []
    press(screen, "x c")
    assert "No worker answered in time." in shown(screen)
    press(screen, "x l 5 \x1b c")
    assert len(control.asked) == 4, "the escape key leaves the question"


def test_a_long_list_goes_with_the_selected_task() -> None:
    state = State()
    for number in range(100):
        state.event({"type": "task-received", "uuid": f"id{number}", "name": "n", "hostname": "w",
                     "timestamp": 1e9 + number, "clock": number})  # fmt: skip
    screen = Screen(FakeApp(), state)
    for _ in range(50):
        screen.press("j")
    assert screen.selected == "id50"
    assert "id50" in shown(screen) and "id99" not in shown(screen)
    assert shown(screen).count("\n") == 19


@pytest.mark.skipif(os.name != "posix", reason="no terminals here")
def test_the_screen_works_on_a_terminal(tmp_path: Path, ours: EventDispatcher, sqlite_url: str) -> None:
    import fcntl
    import pty
    import struct
    import termios

    pytest.importorskip("curses")
    ours_end, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    env: Dict[str, str] = environment(tmp_path, MINIQ_BROKER_URL=sqlite_url, TERM="xterm-256color")
    process = subprocess.Popen(
        [sys.executable, "-m", "miniq", "-A", "proj", "events"],
        cwd=tmp_path, env=env, stdin=its_end, stdout=its_end, stderr=its_end, start_new_session=True,
    )  # fmt: skip
    os.close(its_end)
    written = bytearray()

    def seen(text: bytes) -> bool:
        while select.select([ours_end], [], [], 0.02)[0]:
            try:
                written.extend(os.read(ours_end, 65536))
            except OSError:  # it is gone
                break
        return text in written

    def listed() -> bool:
        tell(ours, "abcd-1234")
        return seen(b"abcd-1234")

    def wait_for(text: bytes) -> None:
        wait_until(lambda: seen(text), 20.0, lambda: written.decode(errors="replace"))

    try:
        wait_until(listed, 30.0, lambda: written.decode(errors="replace"))
        os.write(ours_end, b"j")
        wait_for(b"<Task: proj.add(abcd-1234)")
        os.write(ours_end, b"i")
        wait_for(b"press any key")
        os.write(ours_end, b"xq")
        wait_until(lambda: seen(b"nothing") or process.poll() is not None, 20.0)
        assert process.returncode == 0, written.decode(errors="replace")
    finally:
        process.kill()
        process.wait()
        os.close(ours_end)


@pytest.mark.skipif(os.name != "posix", reason="processes are not killed like this here")
def test_nothing_stays_behind_of_a_monitor_that_was_killed(
    start: Callable[..., Any], ours: EventDispatcher, tmp_path: Path
) -> None:
    (tmp_path / "proj.py").write_text(APP.replace('MiniQ("proj")', 'MiniQ("proj", event_queue_expires=1)'))
    app = ours.app
    monitor = start("--json")

    def heard() -> bool:
        tell(ours)
        return "task-succeeded" in monitor.log

    def queues() -> List[str]:
        return [size.queue for size in app.producer.transport.sizes() if size.queue.startswith("celeryev.")]

    wait_until(heard, 20.0, lambda: monitor.log, 0.05)
    assert len(queues()) == 1
    monitor.kill()
    with app.worker(concurrency=1):
        wait_until(lambda: not queues(), 20.0, "its queue is gone", 0.05)

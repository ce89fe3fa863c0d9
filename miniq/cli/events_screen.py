# SPDX-License-Identifier: MIT
"""The screen of ``miniq events``: the newest tasks, their states, and what can be done with them.

`Screen` knows nothing of terminals: keys go in by name, lines come out.  `run` puts these on one with
`curses`, which is imported there only, as not every Python has it.  Keys are those of Celery's evtop.
"""

from __future__ import annotations

import json
import logging
import sys
import textwrap
import threading
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional
from unicodedata import east_asian_width

from .. import states
from ..events import EventReceiver, State
from ..events.state import Task
from ..exceptions import MiniqError
from ..text import truncate

#: Seconds between two looks at the state, and for workers to answer a command.
LOOK_INTERVAL_S, REPLY_S = 0.2, 1.0
#: What a key is called here whose number or name in curses is on the left.
KEY_NAMES = {
    "KEY_DOWN": "down", "KEY_UP": "up", "KEY_ENTER": "enter", "\n": "enter", "\r": "enter", "KEY_BACKSPACE":
    "backspace", "\x7f": "backspace", "\x08": "backspace", "\x1b": "escape",
}  # fmt: skip
KEYS = "j:down k:up i:info t:traceback r:result c:revoke l:rate limit q:quit"
#: Widths of the columns but for the task's name, which gets the rest.
UUID_WIDTH, WORKER_WIDTH, TIME_WIDTH, STATE_WIDTH = 36, 16, 8, 8
MIN_NAME_WIDTH = 10
#: Lines around the list of tasks, and around a page.
LINES_AROUND, LINES_AROUND_PAGE = 6, 4
#: Keys that move within a page.
_SCROLLS = {"j": 1, "down": 1, "k": -1, "up": -1}


class Line(NamedTuple):
    """A line, and how it is to look: "", "title", "selected", "good", "bad", "busy"."""

    text: str
    style: str = ""


_STYLES = {states.SUCCESS: "good", states.FAILURE: "bad", states.REVOKED: "bad", states.STARTED: "busy"}


class Screen:
    """What is shown, and what keys do."""

    def __init__(self, app: Any, state: State) -> None:
        self.app = app
        self.state = state
        self.selected: Optional[str] = None
        self.has_left = False
        #: The last line of the log.
        self.log_line = ""
        #: Shown instead of the list until a key is pressed: title and text.
        self._page: Optional["tuple[str, str]"] = None
        #: Its first line that is shown.
        self._top = 0
        self._prompt: Optional[str] = None
        self._typed = ""
        self._on_enter: Callable[[str], None] = lambda text: None
        self._actions: Dict[str, Callable[[], None]] = {
            "j": self._down, "down": self._down, "k": self._up, "up": self._up, "i": self._info,
            "t": self._traceback, "r": self._result, "c": self._revoke, "l": self._rate_limit,
            "q": self._leave,
        }  # fmt: skip

    # -- keys

    def press(self, key: str) -> None:
        """Do what a key means."""
        if self._prompt is not None:
            self._type(key)
        elif self._page is not None:
            by = _SCROLLS.get(key)
            if by is None:
                self._page = None
            else:
                self._top = max(0, self._top + by)
        elif key in self._actions:
            try:
                self._actions[key]()
            except MiniqError as error:
                self._show("It failed", str(error))

    def _type(self, key: str) -> None:
        if key == "enter":
            self._prompt, typed = None, self._typed
            try:
                self._on_enter(typed)
            except (MiniqError, ValueError) as error:
                self._show("It failed", str(error))
        elif key == "escape":
            self._prompt = None
        elif key == "backspace":
            self._typed = self._typed[:-1]
        elif len(key) == 1 and key.isprintable():
            self._typed += key

    def _down(self) -> None:
        self._move(1)

    def _up(self) -> None:
        self._move(-1)

    def _move(self, by: int) -> None:
        ids = [uuid for uuid, _ in self.state.tasks_by_time()]
        if ids:
            at = ids.index(self.selected) + by if self.selected in ids else 0
            self.selected = ids[max(0, min(at, len(ids) - 1))]

    def _task(self) -> Optional[Task]:
        return self.state.tasks.get(self.selected) if self.selected else None

    def _info(self) -> None:
        task = self._task()
        if task is not None:
            fields = self.state.freeze_while(task.as_dict)
            known = {name: value for name, value in fields.items() if value not in (None, [])}
            width = max(map(len, known))
            self._show("Task", "\n".join(f"{name:>{width}}: {value}" for name, value in known.items()))

    def _traceback(self) -> None:
        task = self._task()
        if task is not None and task.state in states.EXCEPTION_STATES:
            self._show("Traceback", task.traceback or "There is none.")

    def _result(self) -> None:
        task = self._task()
        if task is not None:
            shown = task.exception if task.state in states.EXCEPTION_STATES else task.result
            self._show("Result", str(shown) if task.ready else "It has not ended.")

    def _revoke(self) -> None:
        if self.selected:
            self._show_replies(self.app.control.revoke(self.selected, reply=True, timeout=REPLY_S))

    def _rate_limit(self) -> None:
        task = self._task()
        if task is None or not task.name:
            return
        name = task.name

        def change(text: str) -> None:
            self._show_replies(self.app.control.rate_limit(name, text, reply=True, timeout=REPLY_S))

        self._prompt, self._typed, self._on_enter = f"New rate limit of {name}: ", "", change

    def _leave(self) -> None:
        self.has_left = True

    def _show(self, title: str, text: str) -> None:
        self._page, self._top = (title, text), 0

    def _show_replies(self, replies: Any) -> None:
        lines = [
            f"{node}: {json.dumps(value)}" for reply in replies or () for node, value in reply.items()
        ]
        self._show("Replies", "\n".join(lines) or "No worker answered in time.")

    # -- lines

    def lines(self, width: int, height: int) -> List[Line]:
        """Return what is on the screen, no more than `height` lines of `width` characters."""
        lines_of = self._lines_of_list if self._page is None else self._lines_of_page
        found = lines_of(width, height)
        if self._prompt is not None:
            found = [*found[: max(0, height - 1)], Line(self._prompt + self._typed, "title")]
        return [Line(_fit(line.text, width), line.style) for line in found[:height]]

    def _lines_of_page(self, width: int, height: int) -> List[Line]:
        title, text = self._page or ("", "")
        lines: List[Line] = []
        for paragraph in text.splitlines():
            room = width if paragraph.isascii() else width // 2  # wide characters take two columns
            lines += map(Line, textwrap.wrap(paragraph, max(1, room), drop_whitespace=False) or [""])
        room = max(1, height - LINES_AROUND_PAGE)
        self._top = min(self._top, max(0, len(lines) - room))
        keys = "(press any key)" if len(lines) <= room else "(j, k: down and up; any other key: back)"
        return [Line(title, "title"), Line(""), *lines[self._top : self._top + room], Line(""), Line(keys)]

    def _lines_of_list(self, width: int, height: int) -> List[Line]:
        state = self.state
        room = max(1, height - LINES_AROUND)
        tasks = state.freeze_while(lambda: list(state.tasks_by_time()))
        workers = state.freeze_while(lambda: list(state.alive_workers()))
        ids = [uuid for uuid, _ in tasks]
        first = max(0, ids.index(self.selected) - room + 1) if self.selected in ids else 0
        lines = [Line(_row(width, "UUID", "TASK", "WORKER", "TIME", "STATE"), "title")]
        for uuid, task in tasks[first : first + room]:
            style = "selected" if uuid == self.selected else _STYLES.get(task.state, "")
            lines.append(Line(_row_of(width, task), style))
        lines += [Line("")] * (room - len(lines) + 1)
        selected = self._task()
        about = "" if selected is None else f"{selected!r}"
        names = ", ".join(sorted(str(worker.hostname) for worker in workers)) or "none"
        counts = f"events: {state.event_count}  tasks: {state.task_count}  workers: {len(workers)}"
        return [
            *lines,
            Line(self.log_line, "bad"),
            Line(f"Selected: {about}"),
            Line(f"Workers online: {names}"),
            Line(f"Info: {counts}"),
            Line(f"Keys: {KEYS}", "title"),
        ]


def _fit(text: str, width: int) -> str:
    """Return as much as fits into so many columns, with nothing in it that would move the cursor."""
    text = truncate(text, width)[:width]
    if text.isascii() and text.isprintable():
        return text
    shown, left = [], width
    for char in text:
        left -= 2 if east_asian_width(char) in "FW" else 1
        if left < 0:
            break
        shown.append(char if char.isprintable() else "?")
    return "".join(shown)


def _row_of(width: int, task: Task) -> str:
    moment = datetime.fromtimestamp(task.newest[0]).strftime("%H:%M:%S") if task.newest[0] else ""
    worker = task.worker.hostname if task.worker is not None else ""
    return _row(width, str(task.uuid), task.name or "?", worker, moment, task.state)


def _row(width: int, uuid: str, name: str, worker: str, moment: str, state: str) -> str:
    name_width = max(MIN_NAME_WIDTH, width - UUID_WIDTH - WORKER_WIDTH - TIME_WIDTH - STATE_WIDTH - 4)
    columns = (
        (uuid, UUID_WIDTH),
        (name, name_width),
        (worker, WORKER_WIDTH),
        (moment, TIME_WIDTH),
        (state, STATE_WIDTH),
    )
    return " ".join(truncate(text, room).ljust(room) for text, room in columns)


# -- the terminal --------------------------------------------------------------------------------


def run(app: Any) -> int:
    """Show the screen until somebody leaves it."""
    try:
        import curses  # not in every Python: Windows has none
    except ImportError as error:
        raise MiniqError(f"this Python has no curses ({error}); use events --dump") from error
    state = State()
    screen = Screen(app, state)
    receiver = EventReceiver(app=app, handlers={"*": state.event})
    failed: List[BaseException] = []

    def listen() -> None:
        try:
            receiver.capture()
        except BaseException as error:  # named net: raised again by who waits for the thread
            failed.append(error)

    listener = threading.Thread(target=listen, name="miniq-events", daemon=True)
    listener.start()
    try:
        with _log_on(screen):
            curses.wrapper(_show, curses, screen, listener)
    finally:
        receiver.should_stop = True
        listener.join()
    if failed:
        raise failed[0]
    return 0


class _LastLine(logging.Handler):
    """Has the screen show what is logged."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.WARNING)
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self.screen.log_line = record.getMessage()


@contextmanager
def _log_on(screen: Screen) -> Iterator[None]:
    """Keep the log from being written over the screen: its last line is shown there."""
    root = logging.getLogger()
    before = list(root.handlers)
    others = [one for one in before if getattr(one, "stream", None) not in (sys.stdout, sys.stderr)]
    root.handlers[:] = [*others, _LastLine(screen)]
    try:
        yield
    finally:
        root.handlers[:] = before


def _show(window: Any, curses: Any, screen: Screen, listener: threading.Thread) -> None:
    curses.curs_set(0)
    window.timeout(int(LOOK_INTERVAL_S * 1000))
    looks = _looks(curses)
    while not screen.has_left and listener.is_alive():
        height, width = window.getmaxyx()
        window.erase()
        # The last place of a terminal cannot be written to.
        for number, line in enumerate(screen.lines(width - 1, height)):
            window.addstr(number, 0, line.text, looks.get(line.style, 0))
        window.refresh()
        try:
            key = window.getkey()
        except curses.error:  # none was pressed
            continue
        screen.press(KEY_NAMES.get(key, key))


def _looks(curses: Any) -> Dict[str, int]:
    """Return the attribute for each style."""
    looks = {"title": curses.A_BOLD, "selected": curses.A_STANDOUT}
    if curses.has_colors():
        curses.start_color()
        curses.use_default_colors()
        for number, (style, color) in enumerate(
            (("good", curses.COLOR_GREEN), ("bad", curses.COLOR_RED), ("busy", curses.COLOR_YELLOW)), 1
        ):
            curses.init_pair(number, color, -1)
            looks[style] = curses.color_pair(number)
    return looks

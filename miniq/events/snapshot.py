# SPDX-License-Identifier: MIT
"""Cameras: take a picture of the state of a cluster at intervals, to keep it somewhere.

A camera is a class with ``on_shutter(state)``, called while the state does not change::

    class Pictures(Polaroid):
        clear_after = True  # forget what has ended once it is in the picture

        def on_shutter(self, state):
            for uuid, task in state.tasks_by_time():
                save(task.as_dict())

Source: the interface of Celery's module of this name.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Callable, Optional, Union

from .. import _state
from ..signals import Signal
from ..text import import_object
from ..times import parse_rate
from .receiver import EventReceiver
from .state import State

logger = logging.getLogger(__name__)


class Polaroid:
    """Takes a picture every `freq` seconds, at most `maxrate` ("10/m") of them, in a thread of its own.

    `install` begins, `cancel` takes the last one and ends; so does a ``with`` block.
    """

    #: Forget tasks that have ended once they are in a picture.
    clear_after = False

    def __init__(
        self,
        state: State,
        freq: float = 1.0,
        maxrate: Union[str, float, None] = None,
        cleanup_freq: float = 3600.0,
        timer: Any = None,
        app: Any = None,
    ) -> None:
        self.app = app or _state.current_app()
        self.state = state
        self.freq = freq
        self.cleanup_freq = cleanup_freq
        self.shutter_signal = Signal("shutter")
        self.cleanup_signal = Signal("cleanup")
        per_second = parse_rate(maxrate)
        self._pause_s = 1.0 / per_second if per_second else 0.0
        self._next_mono = 0.0
        self._ended = threading.Event()
        self._thread: Optional[threading.Thread] = None

    def install(self) -> None:
        """Begin to take pictures."""
        if self._thread is not None:
            return
        self._ended.clear()
        self._thread = threading.Thread(target=self._run, name="miniq-camera", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        clean_mono = time.monotonic() + self.cleanup_freq
        while not self._ended.wait(self.freq):
            self._quietly(self.capture)
            if time.monotonic() >= clean_mono:
                clean_mono += self.cleanup_freq
                self._quietly(self.cleanup)

    @staticmethod
    def _quietly(call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception:  # safety net around user code: the next picture may turn out well
            logger.exception("The camera failed; it tries again next time")

    def on_shutter(self, state: State) -> Any:
        """Keep what is in the state; to be overridden."""

    def on_cleanup(self) -> Any:
        """Throw away old pictures; to be overridden."""

    def cleanup(self) -> None:
        """Throw away old pictures."""
        self.cleanup_signal.send(sender=self.state)
        self.on_cleanup()

    def shutter(self) -> None:
        """Take a picture now."""
        self._next_mono = time.monotonic() + self._pause_s
        self.shutter_signal.send(sender=self.state)
        self.on_shutter(self.state)

    def capture(self) -> None:
        """Take a picture while the state does not change, unless the last one was too short ago.

        Nothing is forgotten that is in no picture, because there was none or it failed.
        """
        if time.monotonic() >= self._next_mono:
            self.state.freeze_while(self.shutter, clear_after=self.clear_after)

    def cancel(self) -> None:
        """Take the last picture and end."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None
            self._next_mono = 0.0
            self._quietly(self.capture)

    def __enter__(self) -> "Polaroid":
        self.install()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.cancel()


def evcam(
    camera: Union[str, Callable[..., Polaroid]],
    freq: float = 1.0,
    maxrate: Union[str, float, None] = None,
    loglevel: Any = None,
    logfile: Any = None,
    pidfile: Any = None,
    timer: Any = None,
    app: Any = None,
) -> None:
    """Hear events and have `camera` (a class, or where it is) take pictures, until interrupted.

    `loglevel`, `logfile` and `pidfile` are Celery's; the command line sees to them.
    """
    app = app or _state.current_app()
    cls = import_object(camera) if isinstance(camera, str) else camera
    state = State()
    with cls(state, app=app, freq=freq, maxrate=maxrate):
        EventReceiver(app=app, handlers={"*": state.event}).capture(limit=None)

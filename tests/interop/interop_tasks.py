# SPDX-License-Identifier: MIT
"""One set of tasks and settings for apps of both kinds, Celery's and miniq's.

What a task does besides returning, it notes as a line in a journal that all processes share: who
started what, how often and when.  A test reads it with `Journal`; ``hold`` runs until a test lets
it go on.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Dict, List

from classes_of_both import Point, Refused

#: Set for workers: folder of the journal, URLs, and more settings as JSON.
FOLDER, BROKER, BACKEND, MORE = "INTEROP_FOLDER", "INTEROP_BROKER", "INTEROP_BACKEND", "INTEROP_SETTINGS"
#: Longest time (seconds) that a task waits to be let go.
HOLD_S = 60.0


def settings(broker: str, backend: str, **more: Any) -> Dict[str, Any]:
    """Return what both kinds of apps are configured with."""
    return {
        "broker_url": broker,
        "result_backend": backend,
        "task_track_started": True,
        "accept_content": ["json", "pickle"],
        # Sent without a queue, to make one value of a group's.
        "task_routes": {"celery.accumulate": {"queue": "both"}},
        **more,
    }


def worker_settings() -> Dict[str, Any]:
    """Return the settings of this worker process."""
    more = json.loads(os.environ.get(MORE, "{}"))
    return settings(os.environ[BROKER], os.environ[BACKEND], **more)


class Journal:
    """Lines that tasks wrote: each a JSON array ``[kind of worker, pid, epoch seconds, *words]``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "journal"

    def write(self, *words: Any) -> None:
        """Add a line; many processes may at the same time."""
        with open(self._file, "ab", buffering=0) as file:
            file.write(json.dumps(words).encode() + b"\n")

    def of(self, key: str) -> List[List[Any]]:
        """Return the lines whose first word is `key`."""
        if not self._file.exists():
            return []
        lines = [json.loads(line) for line in self._file.read_text("utf-8").splitlines()]
        return [line for line in lines if line[3] == key]

    def let_go(self, key: str) -> None:
        """Let the task that holds under `key` return."""
        (self.folder / f"{key}.go").touch()

    def may_go(self, key: str) -> bool:
        """Say whether it may return."""
        return (self.folder / f"{key}.go").exists()


def define(app: Any, kind: str) -> Any:
    """Add the tasks to an app; `kind` ("celery" or "miniq") is what they call themselves."""

    def task(fun: Any, **options: Any) -> Any:
        return app.task(name=f"interop.{fun.__name__}", shared=False, **options)(fun)

    def bound(fun: Any) -> Any:
        return task(fun, bind=True)

    def late(fun: Any) -> Any:
        return task(fun, acks_late=True)

    def note_line(*words: Any) -> None:
        journal = Journal(Path(os.environ[FOLDER]))
        journal.write(kind, os.getpid(), time.time(), *words)

    @task
    def add(x: Any, y: Any) -> Any:
        return x + y

    @task
    def echo(*args: Any, **kwargs: Any) -> Any:
        return [args, kwargs]

    @task
    def who(value: Any) -> Any:
        return [kind, value]

    @task
    def collect(values: Any, key: str) -> Any:
        """End a chord: note that it ran, and with what."""
        note_line(key, values)
        return [kind, values]

    @task
    def note(key: str, word: Any = None) -> None:
        note_line(key, word)

    @task
    def moment() -> float:
        return time.time()

    @task
    def spread(point: Any, numbers: Any) -> Any:
        return [isinstance(point, Point), point.x, sorted(numbers), isinstance(numbers, set)]

    @task
    def fail(which: str) -> None:
        if which == "builtin":
            raise ValueError("søren", 3)
        if which == "both":
            raise Refused("too late", 7)
        if which == "unreadable":
            raise ValueError("an object", object())
        from classes_of_workers import Hidden  # as late as this, so that callers never have it

        raise Hidden("nobody knows me", [1, {"a": None}])

    @task
    def unwritable() -> Any:
        return object()

    @bound
    def flaky(self: Any, key: str, failures: int) -> Any:
        note_line(key, self.request.retries, self.request.id)
        if self.request.retries < failures:
            error = Refused("not yet", self.request.retries)
            raise self.retry(exc=error, countdown=0.1, max_retries=failures)
        return self.request.retries

    @bound
    def put_off(self: Any, key: str, seconds: float = 0.5) -> Any:
        if not self.request.retries:
            raise self.retry(exc=Refused("not yet", 0), countdown=seconds)
        return self.request.retries

    @bound
    def give_up(self: Any, key: str, with_error: bool) -> None:
        note_line(key, self.request.retries)
        error = Refused("never", 0) if with_error else None
        raise self.retry(exc=error, countdown=0, max_retries=2)

    @bound
    def progress(self: Any, key: str) -> str:
        self.update_state(state="HALFWAY", meta={"done": 50, "unit": "%"})
        hold(key)
        return "done"

    @bound
    def about(self: Any, *args: Any) -> Dict[str, Any]:
        request = self.request
        return {
            "id": request.id,
            "root_id": request.root_id,
            "parent_id": request.parent_id,
            "retries": request.retries,
            "correlation_id": request.correlation_id,
            "routing_key": request.delivery_info["routing_key"],
            "priority": request.delivery_info["priority"],
            "redelivered": bool(request.delivery_info["redelivered"]),
            "mine": (request.headers or {}).get("mine"),
        }

    @bound
    def parent(self: Any, key: str, queue: str) -> str:
        """Send a task from inside a task, to a worker of the other kind."""
        return str(app.tasks["interop.who"].apply_async((key,), queue=queue).id)

    @bound
    def place(self: Any, *args: Any) -> Dict[str, Any]:
        """Return what a message says about its place in a workflow."""
        request = self.request
        return {
            "id": request.id,
            "root_id": request.root_id,
            "parent_id": request.parent_id,
            "group": request.group,
            "group_index": request.group_index,
            "stamps": {key: request.stamps[key] for key in request.stamped_headers or ()},
            "nesting": request.replaced_task_nesting,
        }

    @bound
    def instead(self: Any, sig: Any) -> Any:
        """Have a signature run in the place of this task."""
        raise self.replace(app.signature(sig))

    @bound
    def one_more(self: Any, sig: Any) -> Any:
        """Add a member to the chord that this task is in."""
        self.add_to_chord(app.signature(sig))
        return kind

    def hold(key: str) -> str:
        note_line(key)
        end_mono = time.monotonic() + HOLD_S
        journal = Journal(Path(os.environ[FOLDER]))
        while not journal.may_go(key):
            if time.monotonic() > end_mono:
                raise TimeoutError(f"nobody let {key} go")
            time.sleep(0.01)
        return key

    def hold_late(key: str) -> str:
        return hold(key)

    task(hold)
    late(hold_late)

    @late
    def work_late(key: str, seconds: float) -> str:
        note_line(key)
        time.sleep(seconds)
        return key

    @task
    def share(key: str, number: int) -> None:
        note_line(key, number)
        time.sleep(0.002)  # so that no worker is done with all before the other has seen one

    @task
    def sleep(seconds: float) -> None:
        time.sleep(seconds)

    @task
    def errback(task_id: str) -> None:
        note_line(task_id, "errback")

    @task
    def errback_inline(request: Any, error: Any, traceback: Any) -> None:
        note_line(request.id, "inline", type(error).__name__, list(error.args), "fail" in str(traceback))

    return app

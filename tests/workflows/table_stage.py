# SPDX-License-Identifier: MIT
"""An app with small tasks, and a worker in this process, on which one workflow at a time is played."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Iterator, List, Sequence

from waiting import wait_until

from miniq import MiniQ, Task, chord, group
from miniq.exceptions import Ignore, Reject
from miniq.testing import start_worker

#: Seconds for a workflow to end; nothing waits for them to pass.
TIMEOUT_S = 20.0
#: A queue that no worker consumes.
NOBODY = "nobody"


class Strange(Exception):
    """An exception that can be neither pickled nor made again from its arguments."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"code {code}: {reason}")
        self.callback = lambda: code


class Stage:
    """An app, its tasks, and what they noted."""

    def __init__(self, app: MiniQ) -> None:
        self.app = app
        #: Appended to by tasks, in the order of their runs.
        self.seen: List[Any] = []
        self.tasks = SimpleNamespace()
        self._add_tasks()

    @contextmanager
    def worker(self, **options: Any) -> Iterator[Any]:
        """Run a worker while the block runs, and until nothing is left to do."""
        options = {"concurrency": 2, "pool": "threads", **options}
        with start_worker(self.app, **options) as worker:
            yield worker
            self.wait_idle()

    def wait_idle(self) -> None:
        """Wait until no message is in a queue or with a worker."""
        wait_until(lambda: not any(self.left()), TIMEOUT_S, lambda: f"idle: {self.left()}")

    def left(self, queue: str = "celery") -> List[int]:
        """Return how many messages of a queue are ready, not due, and with workers."""
        found = [size for size in self.app.producer.transport.sizes([queue]) if size.queue == queue]
        return [count or 0 for size in found for count in (size.ready, size.waiting, size.unacked)]

    def state(self, result: Any) -> str:
        """Return the final state of a task."""
        return str(wait_until(lambda: result.ready() and result.state, TIMEOUT_S, lambda: result.state))

    def error(self, result: Any) -> BaseException:
        """Return what `get` raises."""
        try:
            value = result.get(timeout=TIMEOUT_S)
        except Exception as error:  # whatever the tasks raised
            return error
        raise AssertionError(f"it did not fail: {value!r}")

    def _add_tasks(self) -> None:
        app, seen, tasks = self.app, self.seen, self.tasks

        def task(fun: Any = None, **options: Any) -> Any:
            def add(fun: Any) -> Any:
                setattr(tasks, fun.__name__, app.task(name=fun.__name__, **options)(fun))
                return getattr(tasks, fun.__name__)

            return add if fun is None else add(fun)

        @task
        def add(x: Any, y: Any) -> Any:
            return x + y

        @task
        def ident(x: Any) -> Any:
            return x

        @task
        def total(values: Any) -> Any:
            seen.append(("total", values))
            return sum(values)

        @task
        def note(*args: Any, **kwargs: Any) -> Any:
            seen.append(("note", *args, *kwargs.items()))
            return args[0] if args else None

        @task
        def fail(*args: Any) -> Any:
            raise ValueError("no")

        @task
        def strange(*args: Any) -> Any:
            raise Strange(7, reason="odd")

        @task
        def errback(request: Any, exc: BaseException, traceback: Any) -> None:
            seen.append(("errback", request.id, type(exc).__name__))

        @task
        def by_id(task_id: str) -> None:
            seen.append(("by_id", task_id))

        @task(bind=True, max_retries=None)
        def flaky(self: Task, x: Any, times: int) -> Any:
            seen.append(("flaky", x, self.request.retries))
            if self.request.retries < times:
                raise self.retry(countdown=0)
            return x

        @task(bind=True, max_retries=1)
        def hopeless(self: Task, *args: Any) -> Any:
            raise self.retry(countdown=0, exc=ValueError("no"))

        @task
        def ignoring(*args: Any) -> Any:
            raise Ignore

        @task
        def rejecting(*args: Any) -> Any:
            raise Reject("no use")

        @task(ignore_result=True)
        def silent(x: Any) -> Any:
            return x

        @task
        def unsendable(*args: Any) -> Any:
            return object()

        @task(bind=True)
        def replaced(self: Task, kind: str) -> Any:
            kinds: Any = {
                "task": add.s(1, 2),
                "chain": add.s(1, 2) | add.s(3),
                "group": group(add.s(1, 2), add.s(3, 4)),
                "chord": chord([add.s(1, 2), add.s(3, 4)], total.s()),
                "itself": self.si("task"),
                "failing": add.s(1, 2) | fail.s(),
            }
            raise self.replace(kinds[kind])

        @task(bind=True)
        def adding(self: Task, x: Any) -> Any:
            self.add_to_chord(ident.s(100 * x))
            return x

        @task(bind=True)
        def stamped(self: Task, *args: Any) -> Any:
            seen.append(("stamped", self.request.stamped_headers, self.request.stamps))

        @task
        def waiting(how: str) -> Any:
            result = ident.delay(1)
            if how == "allowed":
                return result.get(timeout=TIMEOUT_S, disable_sync_subtasks=False)
            return result.get(timeout=TIMEOUT_S)

        @task
        def sleeping(seconds: float) -> Any:
            deadline_mono = time.monotonic() + seconds
            while time.monotonic() < deadline_mono:
                time.sleep(0.01)

        @task(acks_late=False)
        def dying(*args: Any) -> Any:
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

        @task(bind=True)
        def family(self: Task, x: Any) -> Any:
            return [self.request.id, self.request.root_id, self.request.parent_id]


def first_of(seen: Sequence[Any], what: str) -> List[Any]:
    """Return what tasks of one kind noted."""
    return [one[1:] for one in seen if one[0] == what]

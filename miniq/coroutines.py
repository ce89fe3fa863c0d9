# SPDX-License-Identifier: MIT
"""Running coroutines in threads that have no event loop of their own: ``async def`` tasks outside
the asyncio pool.

Each thread gets a loop with its first coroutine and keeps it, so that what a task left in it (a
client, a pool of connections) serves the next ones, until the thread ends.  A coroutine is driven
step by step through the pool's guard, so that its limits reach the coroutine and nothing around it.
"""

from __future__ import annotations

import contextvars
import os
import threading
from contextlib import AbstractContextManager
from typing import Any, List, Optional

from .log import get_logger

logger = get_logger(__name__)

#: Seconds between two looks at the guard of a coroutine that waits.
GUARD_INTERVAL_S = 0.1
#: Seconds what a task left running in its loop gets to end when the loop is closed.
LEFTOVERS_S = 1.0


class ThreadLoops:
    """The event loops of this process's threads, one each, and the running of coroutines in them.

    `keeps`: False where a loop is closed after each coroutine.  All methods may be called in any
    thread, and concern the loop of that one.
    """

    def __init__(self, keeps: bool) -> None:
        self.keeps = keeps
        self._local = threading.local()

    def run(self, coroutine: Any, guard: "Optional[AbstractContextManager[Any]]" = None) -> Any:
        """Run a coroutine to its end in this thread's loop.

        `guard` is entered around each of its steps, and looked at while it waits: what that raises
        is thrown into the coroutine, which can clean up with ``await`` before it ends.
        """
        import asyncio  # slow to import, and only async def tasks need it

        if asyncio._get_running_loop() is not None:
            return self._run_in_thread(coroutine)
        loop = self._loop()
        driver = _Driver(coroutine, guard)
        main = loop.create_task(driver.run())
        timer: Any = None

        def look() -> None:
            nonlocal timer
            driver.look(main)
            timer = loop.call_later(GUARD_INTERVAL_S, look)

        if guard is not None:
            timer = loop.call_later(GUARD_INTERVAL_S, look)
        try:
            return loop.run_until_complete(main)
        except asyncio.CancelledError as error:
            raise RuntimeError("the task's coroutine was cancelled") from error
        finally:
            if timer is not None:
                timer.cancel()
            if not main.done():  # the loop itself was interrupted: let the coroutine clean up
                main.cancel()
                loop.run_until_complete(asyncio.wait([main]))
            if not self.keeps:
                self.close()

    def close(self) -> None:
        """Close this thread's loop, if it has one; the next coroutine gets a new one."""
        local = self._local
        loop, local.loop = getattr(local, "loop", None), None
        if loop is None:
            return
        if local.pid != os.getpid():
            self._set_aside(loop)
            return
        try:
            _end_leftovers(loop)
        except Exception:  # safety net around user code: what is left is dropped with the loop
            logger.exception("what tasks left in their event loop could not be ended and is dropped")
        finally:
            loop.close()

    def _loop(self) -> Any:
        import asyncio  # loaded already: there is a coroutine to run

        local = self._local
        loop, pid = getattr(local, "loop", None), os.getpid()
        if loop is not None and local.pid != pid:
            self._set_aside(loop)
            loop = None
        if loop is None:
            loop = local.loop = asyncio.new_event_loop()
            local.pid = pid
        return loop

    def _set_aside(self, loop: Any) -> None:
        """Keep the loop that a fork copied from the parent, so that nothing finalizes it here."""
        self._local.inherited = (getattr(self._local, "inherited", None), loop)

    def _run_in_thread(self, coroutine: Any) -> Any:
        """Run in a thread of its own, in this context, and wait: asyncio loops do not nest."""
        ended: List[Any] = []
        errors: List[BaseException] = []

        def target() -> None:
            try:
                ended.append(self.run(coroutine))
            except BaseException as error:  # safety net: raised again below, in the thread that waits
                errors.append(error)
            finally:
                self.close()

        thread = threading.Thread(
            target=contextvars.copy_context().run, args=(target,), name="miniq-coroutine"
        )
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return ended[0]


def _end_leftovers(loop: Any) -> None:
    import asyncio  # loaded already: there is a loop

    leftovers = asyncio.all_tasks(loop)
    for task in leftovers:
        task.cancel()
    if leftovers:
        loop.run_until_complete(asyncio.wait(leftovers, timeout=LEFTOVERS_S))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())


class _Driver:
    """Passes the steps of a coroutine through a guard, and what the guard raises into the coroutine."""

    def __init__(self, coroutine: Any, guard: "Optional[AbstractContextManager[Any]]") -> None:
        self._coroutine = coroutine
        self._steps = coroutine.__await__()
        self._guard = guard
        #: What to throw instead of the CancelledError by which asyncio wakes a waiting task.
        self._error: Optional[BaseException] = None
        self._main: Any = None

    async def run(self) -> Any:
        return await self

    def __await__(self) -> "_Driver":
        return self

    __iter__ = __await__

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        return self._step(self._steps.send, value)

    def throw(self, error: Any, *rest: Any) -> Any:
        if self._error is not None:  # it was us who cancelled
            error, self._error, rest = self._error, None, ()
            if hasattr(self._main, "uncancel"):  # Python 3.11
                self._main.uncancel()
        return self._step(self._steps.throw, error, *rest)

    def close(self) -> None:
        self._steps.close()

    def _step(self, step: Any, *args: Any) -> Any:
        if self._guard is None:
            return step(*args)
        entered = False
        try:
            with self._guard:
                entered = True
                return step(*args)
        except BaseException as error:
            if entered:
                raise
            self._guard = None
            return self._steps.throw(error)

    def look(self, main: Any) -> None:
        """Throw into a waiting coroutine what its guard has to say."""
        try:
            if self._guard is not None:
                with self._guard:
                    pass
        except BaseException as error:
            self._guard, self._error, self._main = None, error, main
            main.cancel()


_CO_COROUTINE = 0x80


def is_coroutine_function(fun: Any) -> bool:
    """Say whether `fun` is an ``async def``; without importing inspect."""
    code = getattr(fun, "__code__", None) or getattr(getattr(fun, "__func__", None), "__code__", None)
    return code is not None and bool(code.co_flags & _CO_COROUTINE)

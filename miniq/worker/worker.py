# SPDX-License-Identifier: MIT
"""Worker: one process's worth of work, put together and taken through its life.

    begin()      open broker and backend, start pool, task consumer and control; returns
    run()        begin, turn the loop until everything has ended, clean up; the blocking form
    with worker: the same in a thread of its own, for scripts and tests

    stop()       warm: take nothing new, hand back what has not started, finish what runs
    terminate()  cold: stop what runs; late-acked tasks go back, early-acked ones end as failures

The loop, the transport, the backend and the pool are arguments, so that several workers can be
played through in one process under a virtual clock.  Nothing here touches signal handlers or
logging: that is the command line's business.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import warnings
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Union

from .. import _state, signals
from ..backends.base import Backend
from ..control import control_queue
from ..exceptions import BackendError, ImproperlyConfigured, OperationalError
from ..log import get_logger, setup_worker_logging
from ..loop import Loop, Timer
from ..pools.base import Pool, PoolOptions, pool_class
from ..routing import Queue
from ..text import import_object, node_name
from ..trace import TaskRunner
from ..transports.base import Transport
from .consumer import TaskConsumer
from .control import CommandConsumer

logger = get_logger(__name__)

#: Seconds between two looks for expired results and revocations.
CLEAN_UP_INTERVAL_S = 60.0
#: Seconds without more work before autoscaling takes a slot away, and between two looks.
AUTOSCALE_KEEPALIVE_S, AUTOSCALE_INTERVAL_S = 30.0, 1.0
#: Seconds a stopping worker tries to settle its last outcomes while the broker refuses.
LAST_SETTLE_S = 10.0
#: Seconds for what runs when a container is stopped (process 1), unless a setting says otherwise.
CONTAINER_GRACE_S = 25.0


class AppRunnerSpec:
    """How a child gets its runner: the app itself where it was forked, by name where it was spawned.

    `log` holds the arguments of `setup_worker_logging`, None = logging is the host's business.
    """

    def __init__(self, app: Any, hostname: str, log: Optional[Dict[str, Any]]) -> None:
        self.app = app
        self.hostname = hostname
        self.log = log
        self.path = ""
        self.settings: Dict[str, Any] = {}

    def __getstate__(self) -> Dict[str, Any]:
        settings = {name: value for name, (value, _) in self.app.conf.changes().items() if _can_pickle(value)}
        return {**self.__dict__, "app": None, "path": find_app(self.app), "settings": settings}

    def build(self) -> TaskRunner:
        """Return the runner; in a spawned child, import the app and its tasks first."""
        if self.app is None:
            self.app = import_object(self.path)
            self.app.conf.update(self.settings)
            self.app.import_modules()
            if self.log is not None:
                setup_worker_logging(**self.log)
        return TaskRunner(self.app, self.hostname)


def _can_pickle(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError):
        return False
    return True


def find_app(app: Any) -> str:
    """Return the ``module:name`` under which another process can import `app`."""
    names = ["__main__", *sorted({task.__module__ for task in app.tasks.values()}), *app.conf.include]
    for name in dict.fromkeys(names):
        for attribute, value in vars(sys.modules.get(name, _state)).items():
            if value is app:
                return f"{name}:{attribute}"
    for name, module in list(sys.modules.items()):
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if value is app:
                return f"{name}:{attribute}"
    raise ImproperlyConfigured(
        f"{app!r} is in no module's top level, so a spawned child cannot import it; put it there,"
        " or use the pool threads, or the start method fork"
    )


def default_concurrency() -> int:
    """Return the number of CPUs this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


class Worker:
    """A worker of `app`; options are those of the command ``worker``."""

    def __init__(
        self,
        app: Any,
        hostname: Optional[str] = None,
        concurrency: Optional[int] = None,
        pool: Union[str, Pool, None] = None,
        queues: Union[str, Iterable[str], None] = None,
        exclude_queues: Union[str, Iterable[str], None] = None,
        prefetch_multiplier: Optional[int] = None,
        time_limit: Optional[float] = None,
        soft_time_limit: Optional[float] = None,
        max_tasks_per_child: Optional[int] = None,
        max_memory_per_child: Optional[int] = None,
        start_method: Optional[str] = None,
        autoscale: "Optional[tuple[int, int]]" = None,
        purge: bool = False,
        loop: Optional[Loop] = None,
        transport: Optional[Transport] = None,
        backend: Optional[Backend] = None,
        log: Optional[Dict[str, Any]] = None,
    ) -> None:
        conf = app.conf
        self.app = app
        self.hostname = node_name(hostname or "celery@%h")
        if time_limit is not None:
            conf.task_time_limit = time_limit
        if soft_time_limit is not None:
            conf.task_soft_time_limit = soft_time_limit
        if autoscale is not None:
            autoscale = (max(autoscale), min(autoscale))
            concurrency = max(1, autoscale[1])
        self.autoscale = autoscale
        self.concurrency = int(concurrency or conf.worker_concurrency or default_concurrency())
        if self.concurrency < 1:
            raise ImproperlyConfigured(f"concurrency must be at least 1, not {self.concurrency}")
        self.prefetch_multiplier = int(
            conf.worker_prefetch_multiplier if prefetch_multiplier is None else prefetch_multiplier
        )
        self.queues = self._choose_queues(queues, exclude_queues)
        self.purge = purge
        self.loop = loop if loop is not None else Loop()
        self.log = log
        self._given_transport, self._given_backend = transport, backend
        self.runner = TaskRunner(app, self.hostname)
        options = PoolOptions(
            self.concurrency,
            max_tasks_per_child if max_tasks_per_child is not None else conf.worker_max_tasks_per_child,
            max_memory_per_child if max_memory_per_child is not None else conf.worker_max_memory_per_child,
            start_method or conf.worker_pool_start_method,
        )
        self.pool: Pool
        if isinstance(pool, Pool):
            self.pool = pool
        else:
            self.pool = pool_class(pool or conf.worker_pool)(options, AppRunnerSpec(app, self.hostname, log))
        self.tasks: TaskConsumer
        self.transport: Transport
        self.backend: Backend
        self.commands: Optional[CommandConsumer] = None
        #: None, "warm", "soft" or "cold": how it is being shut down.
        self.shutdown: Optional[str] = None
        self.exitcode = 0
        self.started = threading.Event()
        self._ended = threading.Event()
        self._thread: Optional[threading.Thread] = None
        self._failure: Optional[BaseException] = None
        self._timers: List[Timer] = []
        self._pool_stopped = False
        self._settle_deadline: Optional[Timer] = None
        self._last_grown = 0.0

    def _choose_queues(
        self, queues: Union[str, Iterable[str], None], exclude: Union[str, Iterable[str], None]
    ) -> List[Queue]:
        table = self.app.router.queues
        names = _names(queues)
        chosen = {name: table[name] for name in names} if names else dict(table.consume_from)
        for name in _names(exclude):
            if name not in chosen:
                raise ImproperlyConfigured(
                    f"cannot leave out queue {name!r}: this worker consumes from {', '.join(chosen)}"
                )
            del chosen[name]
        if not chosen:
            raise ImproperlyConfigured("every queue is left out: nothing remains to consume from")
        return list(chosen.values())

    # -- begin

    def begin(self) -> None:
        """Open everything and start; the loop is turned by the caller."""
        app, loop = self.app, self.loop
        _state.set_current_app(app)
        signals.celeryd_init.send(sender=self.hostname, instance=self, conf=app.conf, options={})
        app.import_modules()
        signals.celeryd_after_setup.send(sender=self.hostname, instance=self, conf=app.conf)
        signals.worker_init.send(sender=self)
        # The pool comes first: it forks while nothing is open yet.
        self.pool.start(loop, self._on_free)
        self.transport = self._given_transport or app.producer.new_transport(write=False)
        self.backend = self._given_backend or app.new_backend()
        for queue in self.queues:
            self.transport.declare(queue)
            if self.purge:
                logger.warning("Purged %d messages from queue %s", self.transport.purge(queue.name), queue.name)
        consumer = self.transport.consumer(self.hostname, self.queues)
        consumer.delivery_limit = app.conf.task_delivery_limit
        self.tasks = TaskConsumer(
            app,
            loop,
            self.transport,
            consumer,
            self.backend,
            self.pool,
            self.runner,
            self.hostname,
            self.concurrency,
            self.prefetch_multiplier,
        )
        if app.conf.worker_enable_remote_control and self.transport.fanout:
            queue = control_queue(self.hostname)
            self.transport.declare(queue)
            self.commands = CommandConsumer(self, loop, self.transport.consumer(self.hostname, [queue]))
            self.commands.start()
        self._every(consumer.housekeep_interval_s, self._housekeep)
        self._every(CLEAN_UP_INTERVAL_S, self._clean_up)
        if self.autoscale:
            self._every(AUTOSCALE_INTERVAL_S, self._scale)
        self._housekeep()
        self.tasks.start()
        self.started.set()
        signals.worker_ready.send(sender=self)

    def _every(self, interval_s: float, call: Callable[[], None]) -> None:
        slot = len(self._timers)

        def again() -> None:
            self._timers[slot] = self.loop.call_later(interval_s, again)
            call()

        self._timers.append(self.loop.call_later(interval_s, again))

    def _on_free(self) -> None:
        if hasattr(self, "tasks"):
            self.tasks.schedule()

    def _housekeep(self) -> None:
        try:
            self.tasks.consumer.housekeep()
        except OperationalError as error:
            logger.debug("housekeeping is put off: %s", error)
        if self.shutdown is None and getattr(self.pool, "exhausted", False):
            logger.error("The pool cannot go on; this worker finishes what runs and leaves to be restarted.")
            self.exitcode = 1
            self.stop()

    def _clean_up(self) -> None:
        self.tasks.forget_old_revokes()
        try:
            if self.backend.enabled and self.backend.expire():
                self.loop.call_later(0.1, self._clean_up)
        except (OperationalError, BackendError) as error:
            logger.debug("expiry of results is put off: %s", error)

    def _scale(self) -> None:
        """Grow at once while there is no free slot; shrink one by one after a quiet while."""
        if self.shutdown is not None or self.autoscale is None:
            return
        most, least = self.autoscale
        size, mono = self.pool.size, self.loop.mono()
        busy = len(self.tasks.running)
        if busy >= size and size < most:
            self.pool.grow(min(max(1, size), most - size))
            self._last_grown = mono
            logger.info("Scaling up to %d slots.", self.pool.size)
        elif busy >= size:
            self._last_grown = mono
        elif size > max(1, least) and mono - self._last_grown > AUTOSCALE_KEEPALIVE_S:
            self.pool.shrink(1)
            logger.info("Scaling down to %d slots.", self.pool.size)

    # -- commands that need the worker

    def add_queue(self, queue: Queue) -> None:
        """Consume from one more queue; in the loop's thread."""
        if queue.name not in {one.name for one in self.queues}:
            self.transport.declare(queue)
            self.tasks.consumer.add_queue(queue)
            self.queues.append(queue)
            self.tasks.schedule()

    def cancel_queue(self, name: str) -> None:
        """Stop consuming from a queue; in the loop's thread."""
        self.tasks.consumer.cancel_queue(name)
        self.queues = [one for one in self.queues if one.name != name]

    # -- run

    def run(self) -> int:
        """Work until stopped; return the exit code.  Raises what made the start impossible."""
        if self.pool.runs_in_main_thread:
            core = threading.Thread(target=self._run_core, name="miniq-loop")
            core.start()
            try:
                self.pool.run_forever()
            finally:
                if not self._ended.is_set():
                    self.stop()
                core.join()
        else:
            self._run_core()
        if self._failure is not None:
            raise self._failure
        return self.exitcode

    def _run_core(self) -> None:
        """Begin, turn the loop, clean up: the part that owns broker and backend."""
        try:
            self.begin()
            self.loop.run_forever()
        except BaseException as error:  # safety net: told to whoever waits for the start or the end
            self._failure = error
            self._abandon_pool()
        finally:
            self._clean()
            self.started.set()
            self._ended.set()

    def _abandon_pool(self) -> None:
        """After a failed start: end the children that are up already."""
        done: List[bool] = []
        self.pool.stop(self.loop.mono(), lambda: done.append(True))
        deadline = self.loop.mono() + 5.0
        while not done and self.loop.mono() < deadline:
            self.loop.run_once(0.05)

    def _clean(self) -> None:
        for timer in self._timers:
            timer.cancel()
        if self.commands is not None:
            _quietly(self.commands.close)
        if hasattr(self, "tasks"):
            _quietly(self.tasks.consumer.close)
        if hasattr(self, "transport") and self._given_transport is None:
            _quietly(self.transport.close)
        if hasattr(self, "backend") and self._given_backend is None:
            _quietly(self.backend.close)
        self.loop.close()
        signals.worker_shutdown.send(sender=self)

    # -- the end

    def stop(self, how: str = "warm", reason: str = "") -> None:
        """Shut down: "warm", "soft" (warm, then cold after a while) or "cold"; from any thread."""
        self.loop.call_threadsafe(self._shut_down, how, reason)

    def terminate(self) -> None:
        """Shut down cold; from any thread."""
        self.stop("cold")

    def _shut_down(self, how: str, reason: str) -> None:
        before, self.shutdown = self.shutdown, how
        if before == "cold" or (before is not None and how != "cold"):
            self.shutdown = before
            return
        signals.worker_shutting_down.send(sender=self.hostname, sig=reason, how=how.capitalize(), exitcode=self.exitcode)
        logger.warning("Shutdown (%s)%s: %d tasks running.", how, f" by {reason}" if reason else "", len(self.tasks.running))
        if before is None:
            self.tasks.stop_taking()
        grace_s = self.app.conf.worker_soft_shutdown_timeout
        if not grace_s and os.getpid() == 1:
            # An orchestrator kills after some 30 s; what is late-acked should be back before.
            grace_s = CONTAINER_GRACE_S
        if how == "cold":
            self.tasks.cutting_off = True
            deadline = self.loop.mono()
        elif grace_s:
            deadline = float("inf")
            self._timers.append(self.loop.call_later(grace_s, self._shut_down, "cold", f"{grace_s} s are over"))
        else:
            deadline = float("inf")
        self.pool.stop(deadline, self._on_pool_stopped)

    def _on_pool_stopped(self) -> None:
        if self._pool_stopped:
            return
        self._pool_stopped = True
        self.tasks.on_idle = self._leave
        self._settle_deadline = self.loop.call_later(LAST_SETTLE_S, self._leave)
        self.tasks.schedule()

    def _leave(self) -> None:
        """Everything is settled, or cannot be: write the last line and end the loop."""
        if self._settle_deadline is not None:
            self._settle_deadline.cancel()
        counts = self.tasks.counts
        left = len(self.tasks.running)
        log = logger.error if left else logger.info
        log(
            "Worker %s leaves: %d finished, %d handed back, %d lost%s.",
            self.hostname,
            counts["finished"],
            counts["requeued"],
            counts["lost"],
            f", {left} outcomes could not be settled with the broker" if left else "",
        )
        if left:
            self.exitcode = 1
        self.loop.stop()

    # -- in a thread: scripts and tests

    def __enter__(self) -> "Worker":
        self.start_in_thread()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def start_in_thread(self, timeout_s: float = 30.0) -> None:
        """Run in a thread; return when messages are being taken, raise what prevented it."""
        self._thread = threading.Thread(target=self._run_quietly, name="miniq-worker", daemon=True)
        self._thread.start()
        if not self.started.wait(timeout_s):
            raise OperationalError(f"the worker {self.hostname} did not start within {timeout_s} s")
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def _run_quietly(self) -> None:
        try:
            self.run()
        except BaseException as error:  # safety net: a thread cannot raise, start_in_thread and close do
            self._failure = error

    def close(self, timeout_s: Optional[float] = None) -> None:
        """Stop warm and wait for the end (`timeout_s`: then cold); raises what broke the worker."""
        if self._thread is None:
            return
        if not self._ended.is_set():
            self.stop()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.terminate()
            self._thread.join(LAST_SETTLE_S)
            if self._thread.is_alive():
                warnings.warn(f"the worker {self.hostname} did not end", ResourceWarning, stacklevel=2)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _names(value: Union[str, Iterable[str], None]) -> List[str]:
    parts: Sequence[str] = value.split(",") if isinstance(value, str) else list(value or ())
    return [part.strip() for part in parts if part.strip()]


def _quietly(close: Callable[[], None]) -> None:
    try:
        close()
    except OperationalError as error:
        logger.debug("while leaving: %s", error)

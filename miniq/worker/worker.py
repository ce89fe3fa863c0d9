# SPDX-License-Identifier: MIT
"""Worker: one process's worth of work, put together and taken through its life.

    Worker(...)  imports the app's modules, reads settings and options
    begin()      start the pool, open broker and backend, start task consumer and control; returns
    run()        the same, but with a broker that may not be there yet; turn the loop until everything has
                 ended, clean up; the blocking form
    with worker: the same in a thread of its own, for scripts and tests

    stop()       warm: take nothing new, hand back what has not started, finish what runs
    terminate()  cold: stop what runs; late-acked tasks go back, early-acked ones end as failures

The loop, the transport, the backend and the pool are arguments, so that several workers can be
played through in one process under a virtual clock.  Signal handlers and logging are left alone:
they are the command line's business.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Union

from .. import _state, signals
from ..backends.base import Backend
from ..control import control_queue
from ..exceptions import BackendError, ImproperlyConfigured, OperationalError
from ..health import CONSUMING, NO_BROKER, STARTING, STOPPING
from ..lifesign import LifeSign
from ..log import LoggingSetup, get_logger, setup_worker_logging
from ..loop import Loop, Timer
from ..pools.base import Pool, PoolOptions, pool_class
from ..routing import Queue
from ..serialization import serializer
from ..text import expand_file_name, mask_url, node_name
from ..trace import TaskRunner
from ..transports.base import Consumer, Transport
from .consumer import TaskConsumer
from .control import NAMESAKE_ADVICE, Commands
from .events import HEARTBEAT_INTERVAL_S, WorkerEvents
from .spec import AppRunnerSpec

logger = get_logger(__name__)

#: Seconds between two looks for expired results and revocations.
CLEAN_UP_INTERVAL_S = 60.0
#: Seconds between two looks for chords whose last member died before it could send the body.
CHORDS_INTERVAL_S = 5.0
#: Seconds without more work before autoscaling takes a slot away, and between two looks.
AUTOSCALE_KEEPALIVE_S, AUTOSCALE_INTERVAL_S = 30.0, 1.0
#: Seconds a stopping worker tries to settle its last outcomes while the broker refuses.
LAST_SETTLE_S = 10.0
#: Seconds after its hard limit until a task is taken for stuck that holds the only slot there is.
STUCK_S = 5.0
#: Seconds between two tries to open the broker at the start; the last is repeated.
START_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
#: What RabbitMQ says of a queue that belongs to another connection (AMQP 0-9-1).
RESOURCE_LOCKED = 405
#: Seconds for the main thread to come back from a task that was given up (pool solo).
MAIN_THREAD_LEAVES_S = 2.0
#: Seconds for what runs when a container is stopped (process 1), unless a setting says otherwise.
CONTAINER_GRACE_S = 25.0


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
        health_file: str = "",
        beat: Union[bool, Dict[str, Any]] = False,
        task_events: Optional[bool] = None,
        without_heartbeat: bool = False,
        heartbeat_interval: Optional[float] = None,
    ) -> None:
        self.app = app
        self.hostname = node_name(hostname or "celery@%h")
        self.autoscale = autoscale and (max(autoscale), min(autoscale))
        options = {
            "concurrency": concurrency, "pool": pool, "queues": queues, "exclude_queues": exclude_queues,
            "prefetch_multiplier": prefetch_multiplier, "time_limit": time_limit,
            "soft_time_limit": soft_time_limit, "max_tasks_per_child": max_tasks_per_child,
            "max_memory_per_child": max_memory_per_child, "start_method": start_method,
            "autoscale": autoscale, "purge": purge,
        }  # fmt: skip
        _state.set_current_app(app)
        app.import_modules()
        conf = app.conf
        signals.celeryd_init.send(sender=self.hostname, instance=self, conf=conf, options=options)
        conf.check()
        for setting in ("task_serializer", "result_serializer"):
            try:
                serializer(conf.get(setting))
            except ImproperlyConfigured as error:
                raise ImproperlyConfigured(f"{setting}: {error}") from error
        #: Limits in seconds of tasks that have none of their own; None = as the app is configured.
        self.time_limit, self.soft_time_limit = time_limit, soft_time_limit
        hard, soft = time_limit or conf.task_time_limit, soft_time_limit or conf.task_soft_time_limit
        if hard and soft and soft > hard:
            raise ImproperlyConfigured(
                f"the soft time limit of {soft:g} s is never reached: the hard one is {hard:g} s"
            )
        if self.autoscale:
            concurrency = max(1, self.autoscale[1])
        if concurrency is None:
            concurrency = conf.worker_concurrency or default_concurrency()
        if concurrency < 1:
            raise ImproperlyConfigured(f"concurrency must be at least 1, not {concurrency}")
        self.concurrency = concurrency
        if prefetch_multiplier is None:
            prefetch_multiplier = 1 if conf.worker_disable_prefetch else conf.worker_prefetch_multiplier
        self.prefetch_multiplier = prefetch_multiplier
        self.queues = self._choose_queues(queues, exclude_queues)
        self.purge = purge
        self.loop = loop if loop is not None else Loop()
        self.log = None if log is None else {"node": self.hostname, **log}
        self._given_transport, self._given_backend = transport, backend
        if without_heartbeat:
            heartbeat_interval = None
        elif heartbeat_interval is None and transport is None:
            heartbeat_interval = HEARTBEAT_INTERVAL_S
        #: What it tells of itself and its tasks.
        self.events = WorkerEvents(
            app,
            self.loop,
            self.hostname,
            conf.worker_send_task_events if task_events is None else task_events,
            heartbeat_interval,
            transport,
            self._counts,
        )
        path = expand_file_name(health_file, self.hostname)
        #: Shows that the loop turns, where it was given a file.
        self.life_sign = LifeSign(self.loop, path, self.hostname, "worker", self._state) if path else None
        self.runner = TaskRunner(app, self.hostname)
        self._spec = AppRunnerSpec(app, self.hostname, self.log)
        self.pool = pool if isinstance(pool, Pool) else self._make_pool(
            pool, max_tasks_per_child, max_memory_per_child, start_method
        )  # fmt: skip
        #: Sends periodic tasks in a thread, where that was asked for; `beat` may hold arguments of `Beat`.
        self.beat = app.Beat(embedded=True, **(beat if isinstance(beat, dict) else {})) if beat else None
        signals.celeryd_after_setup.send(sender=self.hostname, instance=self, conf=conf)
        self.tasks: TaskConsumer
        self.transport: Transport
        self.backend: Backend
        self.commands: Optional[Commands] = None
        #: None, "warm", "soft" or "cold": how it is being shut down.
        self.shutdown: Optional[str] = None
        self.exitcode = 0
        self.started = threading.Event()
        self._ended = threading.Event()
        self._thread: Optional[threading.Thread] = None
        self._failure: Optional[BaseException] = None
        #: What keeps it from starting, as long as that is tried again.
        self.start_error: Optional[OperationalError] = None
        self._timers: List[Timer] = []
        self._pool_started = self._pool_stopped = self._left = False
        self._settle_deadline: Optional[Timer] = None
        self._last_grown = 0.0
        self._stuck_since: Optional[float] = None
        #: Called with the exit code when a stuck task keeps `run` from returning (pool solo); a program of
        #: its own may end itself there, a host should not.
        self.on_stuck: Optional[Callable[[int], None]] = None
        #: Set when the pool was started, or never will be.
        self._pool_ready = threading.Event()
        self._main_free = threading.Event()
        #: Tasks lost before a cold shutdown began; any more make the exit code 1.
        self._lost_before: float = float("inf")

    def _make_pool(
        self, kind: Any, max_tasks: Optional[int], max_memory_kib: Optional[int], start_method: Optional[str]
    ) -> Pool:
        conf = self.app.conf
        options = PoolOptions(
            self.concurrency,
            conf.worker_max_tasks_per_child if max_tasks is None else max_tasks,
            conf.worker_max_memory_per_child if max_memory_kib is None else max_memory_kib,
            start_method or conf.worker_pool_start_method,
            conf.worker_proc_alive_timeout,
        )
        kind = kind or conf.worker_pool
        found = pool_class(kind) if isinstance(kind, str) else kind
        pool: Pool = found(options, self._spec)
        return pool

    def set_up_logging(self) -> LoggingSetup:
        """Set up logging as `log` says, here and in the pool's children; the caller undoes it."""
        setup = self._spec.log_setup = setup_worker_logging(**(self.log or {}))
        return setup

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
        self._start_pool()
        self._start_taking(*self._open_broker())

    def _start_pool(self) -> None:
        app, loop = self.app, self.loop
        _state.set_current_app(app)
        signals.worker_init.send(sender=self)
        self.transport = self._given_transport or app.producer.new_transport(write=False)
        if self.transport.in_process_only and self.pool.has_processes:
            raise ImproperlyConfigured(
                f"broker {mask_url(app.broker_url())!r} lives in one process: tasks in other processes could"
                " send nothing through it; use the pool threads, solo or asyncio, or a SQLite file"
            )
        # Nothing is open yet (a transport opens at its first use), so the pool forks cleanly.
        self._pool_started = True
        self.pool.start(loop, self._on_free)
        self._pool_ready.set()
        if self.life_sign is not None:
            self.life_sign.start()
        self.backend = self._given_backend or app.new_backend()

    def _open_broker(self) -> Tuple[Consumer, Optional[Consumer]]:
        """Declare the queues and become their consumer, and that of the control queue if there is to be one.

        After an error everything can be tried again, once the transport was closed.
        """
        transport = self.transport
        for queue in self.queues:
            transport.declare(queue)
            if self.purge:
                logger.warning("Purged %d messages from queue %s", transport.purge(queue.name), queue.name)
        # What is sent while the rest is tried again shall stay.
        self.purge = False
        consumer = transport.consumer(self.hostname, self.queues)
        if not (self.app.conf.worker_enable_remote_control and transport.fanout):
            return consumer, None
        try:
            return consumer, self._hear_commands()
        except BaseException:
            _quietly(consumer.close)
            raise

    def _hear_commands(self) -> Consumer:
        """Become the consumer of the control queue; of another one where a namesake has that.

        In a file or in memory nobody could tell, and both would share one queue.
        """
        suffix = "" if self.app.broker_is_server else os.urandom(4).hex()
        while True:
            mailbox = control_queue(self.app, self.hostname, suffix)
            self.transport.declare(mailbox)
            try:
                return self.transport.consumer(self.hostname, [mailbox])
            except OperationalError as error:
                if suffix or getattr(error.__cause__, "code", None) != RESOURCE_LOCKED:
                    raise
                suffix = os.urandom(4).hex()
                logger.warning(
                    "The queue of commands to %s belongs to another worker, or to a connection whose loss the"
                    " broker has not noticed yet; this one hears them on a queue of its own. %s",
                    self.hostname, NAMESAKE_ADVICE,
                )  # fmt: skip

    def _open_broker_patiently(self) -> "Optional[Tuple[Consumer, Optional[Consumer]]]":
        """Do the same with a server that is not there yet, or loads its data; None = stopped meanwhile.

        The loop turns in the pauses, for the pool and for who wants to stop it.  What only the operator
        can mend (a wrong password, say) is not tried again.
        """
        conf, loop = self.app.conf, self.loop
        most = conf.broker_connection_max_retries
        since_mono, tries = loop.mono(), 0
        while self.shutdown is None:
            try:
                opened = self._open_broker()
            except OperationalError as error:
                if not (conf.broker_connection_retry_on_startup and self.app.broker_is_server):
                    raise
                _quietly(self.transport.close)
                if most is not None and tries >= most:
                    raise
                self.start_error = error
                pause_s = START_PAUSES_S[min(tries, len(START_PAUSES_S) - 1)]
                tries += 1
                logger.error(
                    "consumer: Cannot connect to the broker: %s. Trying again in %.2f seconds... (%d%s)",
                    error, pause_s, tries, "" if most is None else f"/{most}",
                )  # fmt: skip
                until_mono = loop.mono() + pause_s
                while self.shutdown is None and loop.mono() < until_mono:
                    loop.run_once(until_mono - loop.mono())
            else:
                if tries:
                    logger.warning("Broker reached after %.1f s.", loop.mono() - since_mono)
                self.start_error = None
                return opened
        return None

    def _start_taking(self, consumer: Consumer, commands: Optional[Consumer]) -> None:
        app, loop = self.app, self.loop
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
            self.time_limit,
            self.soft_time_limit,
            self.events,
        )
        self.events.start()
        if commands is not None:
            self.commands = Commands(self, loop, commands)
            self.commands.start()
        self._every(consumer.housekeep_interval_s, self._housekeep)
        self._every(CLEAN_UP_INTERVAL_S, self._clean_up)
        if self.backend.counts_chords:
            self._every(CHORDS_INTERVAL_S, self.tasks.finish_chords_left_over)
        if self.autoscale:
            self._every(AUTOSCALE_INTERVAL_S, self._scale)
        self._housekeep()
        self.tasks.start()
        logger.info("%s ready.", self.hostname)
        self.started.set()
        if self.life_sign is not None:
            self.life_sign.show()
        if self.beat is not None:
            # Not before the pool's children were made: a fork copies locks that other threads hold.
            self.beat.start_in_thread()
        signals.worker_ready.send(sender=self)

    def _counts(self) -> Tuple[int, int]:
        """Return how many tasks run here, and how many have been started."""
        return len(self.tasks.running), sum(self.tasks.total.values())

    def _every(self, interval_s: float, call: Callable[[], None]) -> None:
        slot = len(self._timers)

        def again() -> None:
            self._timers[slot] = self.loop.call_later(interval_s, again)
            call()

        self._timers.append(self.loop.call_later(interval_s, again))

    def _state(self) -> str:
        """Return the word for the health file."""
        if self.shutdown is not None:
            return STOPPING
        tasks = getattr(self, "tasks", None)
        if self.start_error is not None or (tasks is not None and tasks.away_since_mono is not None):
            return NO_BROKER
        return CONSUMING if self.started.is_set() else STARTING

    def _on_free(self) -> None:
        if hasattr(self, "tasks"):
            self.tasks.schedule()

    def _housekeep(self) -> None:
        try:
            self.tasks.consumer.housekeep()
        except OperationalError as error:
            logger.debug("housekeeping is put off: %s", error)
            if not self.app.conf.broker_connection_retry and self.app.broker_is_server:
                self._leave_broker(error)
        self._look_for_stuck_tasks()
        if self.beat is not None and self.beat.failure is not None and self.shutdown is None:
            self.exitcode = 1
            self._shut_down("warm", "the end of its beat")
        if os.getpid() == 1:
            self._reap_strangers()

    def _leave_broker(self, error: OperationalError) -> None:
        if self.shutdown is None:
            logger.error("Broker: %s; broker_connection_retry is off: this worker leaves.", error)
            self.exitcode = 1
            self._shut_down("warm", "the loss of its broker")

    def _look_for_stuck_tasks(self) -> None:
        """Leave when too many tasks run on after their hard limit: a thread cannot be killed."""
        stuck = self.pool.abandoned
        mono = self.loop.mono()
        if not stuck:
            self._stuck_since = None
            return
        if self._stuck_since is None:
            self._stuck_since = mono
        limit: int = self.app.conf.worker_max_abandoned_threads
        if self.pool.runs_in_main_thread and mono - self._stuck_since > STUCK_S:
            limit = 1  # the only slot there is
        if self.shutdown is None and stuck >= limit:
            logger.error(
                "%d tasks run on after their hard time limit and cannot be stopped; this worker finishes what"
                " else runs and leaves with exit code 1, to be started again", stuck,
            )  # fmt: skip
            self.exitcode = 1
            # Where the stuck one holds the only slot, nothing else runs that could be waited for.
            self._shut_down("cold" if self.pool.runs_in_main_thread else "warm", "stuck tasks")

    def _reap_strangers(self) -> None:
        """As process 1 of a container: collect orphans, which nobody else can.

        Only with a pool of processes: there, no task's own subprocess is a child of this process.
        """
        ours = set(self.pool.pids())
        while ours and hasattr(os, "waitid"):
            try:
                status = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if status is None or status.si_pid in ours:
                return
            os.waitpid(status.si_pid, 0)

    def _clean_up(self) -> None:
        self.tasks.admission.forget_old_revokes()
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
                self._pool_ready.wait()
                if self._pool_started:
                    self.pool.run_forever()
            finally:
                self._main_free.set()
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
            self._start_pool()
            opened = self._open_broker_patiently()
            if opened is None:
                self._break_off()
            else:
                self._start_taking(*opened)
                self.loop.run_forever()
        except BaseException as error:  # named net: told to whoever waits for the start or the end
            self._failure = error
            self._break_off()
        finally:
            self._clean()
            self._pool_ready.set()
            self.started.set()
            self._ended.set()
        if self.pool.runs_in_main_thread and not self._main_free.wait(MAIN_THREAD_LEAVES_S):
            logger.error("A task that cannot be stopped holds the main thread.")
            if self.on_stuck is not None:
                self.on_stuck(self.exitcode or 1)

    def _break_off(self) -> None:
        """After a start that failed or was stopped, or Ctrl-C where nobody handles it: stop at once.

        What can be settled, is.
        """
        if not self._pool_started:
            return
        if self.started.is_set():
            self._shut_down("cold", "an error")
        else:
            self.pool.stop(self.loop.mono(), self._on_pool_stopped)
        deadline = self.loop.mono() + LAST_SETTLE_S
        while not self._left and self.loop.mono() < deadline:
            self.loop.run_once(0.05)

    def _clean(self) -> None:
        for timer in self._timers:
            timer.cancel()
        if self.life_sign is not None:
            self.life_sign.stop()
        _quietly(self.events.close)
        if self.commands is not None:
            _quietly(self.commands.close)
        if hasattr(self, "tasks"):
            _quietly(self.tasks.consumer.close)
        if hasattr(self, "transport") and self._given_transport is None:
            _quietly(self.transport.close)
        if hasattr(self, "backend") and self._given_backend is None:
            _quietly(self.backend.close)
        if self.beat is not None:
            self.beat.join()
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
        if self.shutdown == "cold" or (self.shutdown is not None and how != "cold"):
            return
        first, self.shutdown = self.shutdown is None, how
        signals.worker_shutting_down.send(
            sender=self.hostname, sig=reason, how=how.capitalize(), exitcode=self.exitcode
        )
        # A program that ends its own worker knows; a signal may be a surprise.
        level = logging.WARNING if reason else logging.INFO
        by = f" by {reason}" if reason else ""
        if not hasattr(self, "tasks"):
            logger.log(level, "Shutdown (%s)%s: the broker was not reached yet.", how, by)
            return
        logger.log(level, "Shutdown (%s)%s: %d tasks running.", how, by, len(self.tasks.running))
        if first:
            self.tasks.stop_taking()
            if self.beat is not None:
                self.beat.stop()
        if how == "cold":
            self._lost_before = min(self._lost_before, self.tasks.settler.counts["lost"])
            self.tasks.settler.cutting_off = True
            self.pool.stop(self.loop.mono(), self._on_pool_stopped)
            return
        self.pool.stop(float("inf"), self._on_pool_stopped)
        grace_s = self.app.conf.worker_soft_shutdown_timeout
        if not grace_s and os.getpid() == 1:
            # An orchestrator kills after some 30 s; what is late-acked should be back before.
            grace_s = CONTAINER_GRACE_S
        if grace_s:
            self._timers.append(
                self.loop.call_later(grace_s, self._shut_down, "cold", f"the end of {grace_s:g} s")
            )

    def _on_pool_stopped(self) -> None:
        if self._pool_stopped:
            return
        self._pool_stopped = True
        if not self.started.is_set():
            self._left = True
            return
        self.tasks.on_idle = self._leave
        self._settle_deadline = self.loop.call_later(LAST_SETTLE_S, self._leave)
        self.tasks.schedule()

    def _leave(self) -> None:
        """Everything is settled, or cannot be: write the last line and end the loop."""
        if self._left:
            return
        self._left = True
        if self._settle_deadline is not None:
            self._settle_deadline.cancel()
        counts = self.tasks.settler.counts
        left = len(self.tasks.running)
        logger.log(
            logging.ERROR if left else logging.INFO,
            "Worker %s leaves: %d finished, %d handed back, %d lost%s.",
            self.hostname,
            counts["finished"],
            counts["requeued"],
            counts["lost"],
            f", {left} outcomes could not be settled with the broker" if left else "",
        )
        if left or counts["lost"] > self._lost_before:
            self.exitcode = 1
        self.loop.stop()

    # -- in a thread: scripts and tests

    def __enter__(self) -> "Worker":
        self.start_in_thread()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def start_in_thread(self, timeout_s: float = 30.0) -> None:
        """Run in a thread; return when messages are being taken, raise what prevented it.

        A worker that takes longer than `timeout_s` is stopped, and OperationalError raised.
        """
        self._thread = threading.Thread(target=self._run_quietly, name="miniq-worker", daemon=True)
        self._thread.start()
        if not self.started.wait(timeout_s):
            cause = self.start_error
            self.close(0)
            why = f": {cause}" if cause else ""
            raise OperationalError(
                f"the worker {self.hostname} did not start within {timeout_s:g} s{why}"
            ) from cause
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

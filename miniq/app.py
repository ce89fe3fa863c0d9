# SPDX-License-Identifier: MIT
"""MiniQ: the application, one object that knows the settings, the tasks and the way to the broker.

It opens nothing by itself: the first call of a task makes this thread's connection, a worker makes
its own.  Where no broker is configured, ``sqlite:///miniq.db`` in the current folder is both the
broker and the result backend.
"""

from __future__ import annotations

import os
import random
import re
import sys
import threading
import time
import warnings
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Type,
    Union,
)

from . import _state, signals, workflow_tasks
from .backends.base import BACKENDS, CALLERS, Backend, backend_class
from .canvas import Signature, signature
from .clock import LamportClock
from .conf import Settings
from .connection import Connection
from .eager import EagerRunner
from .exceptions import AlwaysEagerIgnored, ImproperlyConfigured, MiniqError
from .flow import encode_start
from .plan import Plan, Step, poll, watch
from .producer import Prepared, Producer, check_options
from .registry import TaskRegistry, annotate, check_names, register, task_from_function
from .result import AsyncResult, GroupResult, result_from_tuple
from .resultset import ResultSet
from .routing import Router
from .serialization import dumps, loads, prepare_accept, serializer
from .shared import SharedTask, shared_task
from .signals import Signal
from .signatures import new_task_id
from .task import Parameters
from .task import Task as BaseTask
from .text import gen_task_name, host_name, import_module, import_object, is_missing, mask_url, truncate
from .times import zone
from .trace import TaskRunner
from .transports.base import TRANSPORTS, Publication

if TYPE_CHECKING:
    from datetime import datetime, tzinfo
    from typing import TypeVar, overload

    from typing_extensions import Literal, ParamSpec

    from .control import Control
    from .task import BoundDecorator, Decorator, TypedTask

    P = ParamSpec("P")
    C = TypeVar("C")

_NO_OPTIONS: Mapping[str, Any] = {}
#: Where messages and results go when nothing is configured.
DEFAULT_URL = "sqlite:///miniq.db"
#: How URLs begin of what lives on one machine, and cannot be elsewhere or away.
LOCAL_STORES = ("sqlite:", "memory:")
#: What stands between two URLs.
_URL_LIST = re.compile(r"[;\s]+(?=[A-Za-z][A-Za-z0-9+.\-]*://)")
#: Celery's short forms, which leave the server to the settings `redis_host`, `redis_port`, `redis_db`.
_BARE_REDIS_URL = re.compile(r"((?:redis|valkey)s?)(?::///?)?")
#: Arguments of Celery's app which plug in parts that miniq does not have.
REFUSED_ARGUMENTS = frozenset({"loader", "amqp", "events", "log", "control", "tasks", "fixups"})
#: Parts of upper floors that an app hands out: name -> "module:object", imported when asked for.
ENTRANCES = {
    "worker": ".worker.worker:Worker",
    "beat": ".beat:Beat",
    "scheduler": ".beat:scheduler_class",
    "main": ".cli.main:main",
    "events": ".events:Events",
    "control": ".control:Control",
}


class MiniQ:
    """A task queue application.

    `main` is the name that stands for ``__main__`` in task names; `broker`, `backend` are URLs;
    `include` names modules to import in workers; any setting may be given as a keyword.
    """

    #: The base class of this app's tasks; replace it to change all of them.
    Task: Type[BaseTask] = BaseTask

    def __init__(
        self,
        main: Optional[str] = None,
        broker: Union[str, Sequence[str], None] = None,
        backend: Optional[str] = None,
        include: Union[str, Sequence[str]] = (),
        task_cls: Union[str, Type[BaseTask], None] = None,
        set_as_current: bool = True,
        config_source: Any = None,
        namespace: Optional[str] = None,
        strict_typing: bool = True,
        changes: Optional[Mapping[str, Any]] = None,
        autofinalize: bool = True,
        wall: Callable[[], float] = time.time,
        **settings: Any,
    ) -> None:
        for name in REFUSED_ARGUMENTS & settings.keys():
            if settings.pop(name):
                raise ImproperlyConfigured(
                    f"argument {name}: this version of miniq has nothing to plug it into"
                )
        self.main = main
        self.strict_typing = strict_typing
        #: Epoch seconds; an argument so that tests can turn the hands.
        self.wall = wall
        #: Orders what this process tells and hears: events, commands, replies.
        self.clock = LamportClock()
        self.tasks = TaskRegistry()
        self.conf = Settings()
        self.on_configure = Signal("on_configure")
        self.on_after_configure = Signal("on_after_configure")
        self.on_after_finalize = Signal("on_after_finalize")
        self.finalized = False
        #: What `add_periodic_task` has added: name -> as in the setting `beat_schedule`.
        self.periodic_tasks: Dict[str, Dict[str, Any]] = {}
        self.user_options: Dict[str, Any] = {}
        self.producer = Producer(self)
        #: This process as a sender: the header `origin`, and the reply address.
        self._identity: Optional[Tuple[int, str, str]] = None
        self._seed = random.random()
        self._cache: Dict[str, Any] = {}
        self._backends = threading.local()
        self._lock = threading.RLock()
        self._annotations: Any = None
        self._autodiscover: List[Tuple[Any, Optional[str]]] = []
        if task_cls is not None:
            self.Task = import_object(task_cls) if isinstance(task_cls, str) else task_cls
        self.conf.on_change = self._settings_changed
        if config_source is not None:
            self.config_from_object(config_source, namespace=namespace)
        self.conf.update(dict(changes or {}))
        named = {"broker_url": broker, "result_backend": backend, "include": include or None}
        given = {key: value for key, value in named.items() if value is not None}
        self.conf.update({**given, **settings})
        if set_as_current:
            _state.set_current_app(self)
        _state.register_app(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.main or '__main__'}>"

    def __reduce__(self) -> Union[str, Tuple[Any, ...]]:
        # As the module's global that it is; nothing in the pickle names this package.
        module, _, attribute = self.import_path.partition(":")
        self.__dict__["__module__"] = module
        return attribute

    def __copy__(self) -> "MiniQ":
        return self

    def __deepcopy__(self, memo: Dict[int, Any]) -> "MiniQ":
        return self

    if not TYPE_CHECKING:  # a checker knows what there is

        def __getattr__(self, name: str) -> Any:
            raise _state.missing("the app", name)

    @property
    def import_path(self) -> str:
        """The ``module:name`` under which another process can import this app.

        Raises `ImproperlyConfigured` when it is at no module's top level.
        """
        first = ["__main__", *sorted({task.__module__ for task in self.tasks.values()})]
        for name in dict.fromkeys([*first, *sys.modules]):
            if name.startswith(f"{__package__}."):
                continue  # what is current or default here is not so in another process
            for attribute, value in list(getattr(sys.modules.get(name), "__dict__", {}).items()):
                if value is self:
                    return f"{name}:{attribute}"
        raise ImproperlyConfigured(
            f"{self!r} is at the top level of no module, so another process cannot import it; put it there"
        )

    def __enter__(self) -> "MiniQ":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close this thread's connections."""
        self.producer.close()
        for backend in getattr(self._backends, "by_url", {}).values():
            backend.close()
        self._backends.by_url = {}

    # -- settings

    def config_from_object(
        self, obj: Any, silent: bool = False, force: bool = False, namespace: Optional[str] = None
    ) -> None:
        """Read settings from a module, its name, an object or a dict.

        With `namespace` only names with that prefix count (``CELERY_TASK_SERIALIZER`` for
        ``"CELERY"``).  Both Celery's new and old names are understood.  `silent` passes over a
        module that does not exist, never over an error inside one.
        """
        if isinstance(obj, str):
            try:
                obj = import_object(obj)
            except ImportError as error:
                if silent and _is_own_error(error):
                    return
                raise
        self.conf.from_object(obj, namespace=namespace)

    def config_from_envvar(self, variable_name: str, silent: bool = False, force: bool = False) -> bool:
        """Read settings from the module that an environment variable names."""
        module = os.environ.get(variable_name)
        if not module:
            if silent:
                return False
            raise ImproperlyConfigured(
                f"the environment variable {variable_name!r} is not set; it should name a settings module"
            )
        self.config_from_object(module, silent=silent)
        return True

    def add_defaults(self, values: Union[Mapping[str, Any], Callable[[], Mapping[str, Any]]]) -> None:
        """Set what is not set yet."""
        self.conf.add_defaults(values() if callable(values) else values)

    def _settings_changed(self) -> None:
        self._cache.clear()
        annotations = self.conf.task_annotations
        if annotations is not self._annotations:
            self._annotations = annotations
            for task in self.tasks.values():
                annotate(task, annotations)

    def _cached(self, key: str, make: Callable[[], Any]) -> Any:
        try:
            return self._cache[key]
        except KeyError:
            value = self._cache[key] = make()
            return value

    @property
    def zone(self) -> "tzinfo":
        """The time zone in which naive datetimes are meant (`timezone`, default UTC)."""
        return self._cached("zone", lambda: zone(self.conf.timezone or "UTC"))  # type: ignore[no-any-return]

    @property
    def accept(self) -> Any:
        """Content types of messages that may be decoded."""
        return self._cached("accept", lambda: prepare_accept(self.conf.accept_content))

    @property
    def result_accept(self) -> Any:
        """Content types of results that may be decoded."""
        conf = self.conf

        def make() -> Any:
            return prepare_accept(conf.result_accept_content or conf.accept_content)

        return self._cached("result_accept", make)

    @property
    def router(self) -> Router:
        """Where messages of which task go."""

        def make() -> Router:
            conf = self.conf
            return Router(
                queues=conf.task_queues,
                routes=conf.task_routes,
                default_queue=conf.task_default_queue,
                default_queue_type=conf.task_default_queue_type,
                default_exchange=conf.task_default_exchange,
                default_exchange_type=conf.task_default_exchange_type,
                default_routing_key=conf.task_default_routing_key,
                create_missing=conf.task_create_missing_queues,
                create_missing_type=conf.task_create_missing_queue_type,
                create_missing_exchange_type=conf.task_create_missing_queue_exchange_type,
                max_priority=conf.task_queue_max_priority,
            )

        return self._cached("router", make)  # type: ignore[no-any-return]

    # -- who we are

    @property
    def identity(self) -> Tuple[str, str]:
        """This process as a sender: the header `origin`, and the reply address."""
        known = self._identity
        pid = os.getpid()
        if known is None or known[0] != pid:
            known = self._identity = (pid, f"gen{pid}@{host_name()}", new_task_id())
        return known[1:]

    @property
    def thread_oid(self) -> str:
        """The reply address of this process."""
        return self.identity[1]

    def now(self) -> "datetime":
        """Return the present moment in the app's time zone."""
        from datetime import datetime  # loaded already, and named here for checkers only

        return datetime.fromtimestamp(self.wall(), self.zone)

    @property
    def runner(self) -> TaskRunner:
        """What encodes results that no run of a task made."""
        return self._cached("runner", lambda: TaskRunner(self, host_name()))  # type: ignore[no-any-return]

    @property
    def eager_runner(self) -> EagerRunner:
        """What runs tasks here."""
        return self._cached("eager_runner", lambda: EagerRunner(self))  # type: ignore[no-any-return]

    # -- broker and backend

    def broker_url(self, write: bool = False) -> str:
        """Return the URL of the broker for reading or writing; several have ``;`` between them."""
        conf = self.conf
        url = (conf.broker_write_url if write else conf.broker_read_url) or conf.broker_url
        return self._in_order(";".join(url) if isinstance(url, (list, tuple)) else url or "", "brokers")

    def backend_url(self) -> str:
        """Return the URL of the result backend; several have ``;`` between them."""
        conf = self.conf
        url = conf.result_backend
        if url:
            return self._in_order(_whole_redis_url(url, conf), "result backends")
        broker = self.broker_url()
        return broker if broker.startswith(LOCAL_STORES) else "disabled://"

    def _in_order(self, urls: str, what: str) -> str:
        """Return a URL, or several in the order in which they are to be tried."""
        if urls.count("://") < 2:
            return urls or DEFAULT_URL
        several = _URL_LIST.split(urls.strip("; \t\n"))
        if len(several) > 1 and any(url.startswith(LOCAL_STORES) for url in several):
            raise ImproperlyConfigured(
                f"{mask_url(urls)!r} names {len(several)} {what}: of servers (redis://) there can be several,"
                " one of which is used, of files and memory only one"
            )
        if self.conf.broker_failover_strategy == "shuffle":
            # The same order for the same number each time: all of this process share connections.
            random.Random(self._seed).shuffle(several)
        return ";".join(several)

    @property
    def broker_is_server(self) -> bool:
        """Whether the broker is reached over a network, and so may come later than its workers."""
        return not self.broker_url().startswith(LOCAL_STORES)

    @property
    def backend(self) -> Backend:
        """This thread's connection to the result backend."""
        return self.backend_for(None)

    def backend_for(self, url: Any) -> Backend:
        """Return this thread's connection to the backend at `url` (None = the configured one)."""
        if url is not None and not isinstance(url, str):
            return url  # type: ignore[no-any-return]
        local = self._backends
        pid = os.getpid()
        if getattr(local, "pid", None) != pid:
            # After a fork the parent's connections are kept, so that nothing finalizes them here.
            local.inherited = (getattr(local, "inherited", None), getattr(local, "by_url", None))
            local.by_url, local.pid = {}, pid
        url = url or self.backend_url()
        found: Optional[Backend] = local.by_url.get(url)
        if found is None:
            found = local.by_url[url] = self.new_backend(url)
        return found

    def new_backend(self, url: Optional[str] = None) -> Backend:
        """Return a new connection to a result backend that nobody shares."""
        url, conf = url or self.backend_url(), self.conf
        if url.partition(":")[0].lower() == "rpc":
            return self._new_rpc_backend(url)
        is_redis = _is_served_as("redis", url, BACKENDS)
        options = conf.options_for_redis(True) if is_redis else conf.result_backend_transport_options
        return backend_class(url)(url, options, self.wall)

    def _new_rpc_backend(self, url: str) -> Backend:
        """Return a way to results that travel through the broker."""
        broker, conf = self.broker_url(write=True), self.conf
        if not _is_served_as("amqp", broker, TRANSPORTS):
            raise ImproperlyConfigured(
                f"result backend {mask_url(url)!r} sends results through a RabbitMQ broker (amqp://), and the"
                f" broker is {mask_url(broker)!r}; set result_backend to a store, or to the broker's own URL"
            )
        if url.partition("://")[2]:
            warnings.warn(
                f"result_backend {mask_url(url)!r}: results go through the broker {mask_url(broker)!r},"
                " whatever is written here; write rpc://",
                stacklevel=2,
            )
        options = {
            **self.broker_options(broker),
            "reply_address": lambda: self.identity[1],
            "result_expires": conf.result_expires,
            "result_persistent": conf.result_persistent,
        }
        return backend_class(url)(broker, options, self.wall)

    def _asked_before_calls(self, task: Optional[BaseTask]) -> Optional[Backend]:
        """Return the backend of the task where it has to do something before a call, else None."""
        url = task._backend if task is not None else None
        if url is None:
            url = self.conf.result_backend
        if isinstance(url, str):
            return self.backend_for(url) if url.startswith(CALLERS) else None
        return url if isinstance(url, Backend) else None

    def broker_options(self, url: str) -> Dict[str, Any]:
        """Return the options of the transport for this broker."""
        conf = self.conf
        if _is_served_as("redis", url, TRANSPORTS):
            return conf.options_for_redis(False)
        if _is_served_as("amqp", url, TRANSPORTS):
            return conf.options_for_amqp()
        return conf.broker_transport_options

    # -- tasks

    if TYPE_CHECKING:

        @overload
        def task(self, fun: Callable[P, C], /) -> TypedTask[P, C]: ...
        @overload
        def task(self, *, bind: Literal[True], **options: Any) -> BoundDecorator: ...
        @overload
        def task(self, **options: Any) -> Decorator: ...
        def task(self, *args: Any, **options: Any) -> Any: ...
    else:

        def task(self, *args: Any, **options: Any) -> Any:
            """Decorate a function to make it a task: ``@app.task`` or ``@app.task(bind=True, ...)``.

            Every keyword becomes an attribute of the task; one that nearly is a known option raises
            `TypeError` with the right name.
            """
            if len(args) == 1 and callable(args[0]) and not isinstance(args[0], type):
                return task_from_function(self, args[0], **options)
            if args:
                raise TypeError(
                    f"@app.task takes options as keywords only, not {args[0]!r};"
                    " to name a task write @app.task(name='...'), for a class app.register_task(Cls())"
                )
            return lambda fun: task_from_function(self, fun, **options)

    def register_task(self, task: Union[BaseTask, Type[BaseTask]], **options: Any) -> BaseTask:
        """Register an instance (or class) of a class-based task; return the instance."""
        if isinstance(task, type):
            task = task()
        if isinstance(task, SharedTask):
            return register(self, task._resolve())
        check_names(task.name or type(task).__name__, options, type(task))
        for key, value in options.items():
            setattr(task, key, value)
        cls = type(task)
        if not task.name:
            task.name = self.gen_task_name(cls.__name__, cls.__module__)
        task.app = self
        if task._check_arguments is None:
            parameters = Parameters(task.run, False)
            task._check_arguments = parameters.check
            task._positional = parameters.positional
        return register(self, task)

    def _task_named(self, name: str) -> BaseTask:
        return self.tasks[name]

    def gen_task_name(self, name: str, module: str) -> str:
        """Return the automatic name of a function; override to change all of them."""
        return gen_task_name(self.main, name, module)

    def finalize(self, auto: bool = False) -> None:
        """Say that all tasks are there; sends the app's signals once."""
        with self._lock:
            if self.finalized:
                return
            self.finalized = True
            workflow_tasks.add_to(self)
            self.on_configure.send(sender=self)
            self.on_after_configure.send(sender=self, source=self.conf)
            self.on_after_finalize.send(sender=self)

    def autodiscover_tasks(
        self,
        packages: Union[Iterable[str], Callable[[], Iterable[str]], None] = None,
        related_name: Optional[str] = "tasks",
        force: bool = False,
    ) -> None:
        """Import ``<package>.<related_name>`` of each package, now (`force`) or when a worker starts.

        Only a module that does not exist is passed over; an error inside one is raised.
        """
        if packages is None:
            raise ImproperlyConfigured(
                "autodiscover_tasks needs the packages to look in (a list, or a function that returns one);"
                " for Django: lambda: settings.INSTALLED_APPS"
            )
        if isinstance(packages, str):
            raise TypeError(f"autodiscover_tasks takes a list of packages, not {packages!r}")
        if force:
            _discover(packages, related_name)
        else:
            self._autodiscover.append((packages, related_name))

    def import_modules(self) -> None:
        """Import what workers need: settings `imports` and `include`, and discovered tasks."""
        for name in (*self.conf.imports, *self.conf.include):
            import_module(name)
        for packages, related_name in self._autodiscover:
            _discover(packages, related_name)
        signals.import_modules.send(sender=self)
        self.finalize()

    # -- commands and events

    @property
    def control(self) -> "Control":
        """Commands and questions to workers; see `miniq.control`."""
        found: Control = self._cached(
            "control", lambda: import_object(ENTRANCES["control"], package=__package__)(self)
        )
        return found

    @property
    def events(self) -> Any:
        """What sends and hears events, and knows the state of things from them; see `miniq.events`."""
        return self._cached("events", lambda: import_object(ENTRANCES["events"], package=__package__)(self))

    def connection_for_read(self, url: Optional[str] = None, **options: Any) -> Connection:
        """Return a connection for those who hand one on; see `miniq.connection`."""
        return Connection(self, url, write=False)

    def connection_for_write(self, url: Optional[str] = None, **options: Any) -> Connection:
        """Return a connection to the write side of the broker."""
        return Connection(self, url, write=True)

    connection = connection_for_read

    # -- periodic tasks

    def add_periodic_task(
        self,
        schedule: Any,
        sig: Any,
        args: Sequence[Any] = (),
        kwargs: Optional[Mapping[str, Any]] = None,
        name: Optional[str] = None,
        relative: bool = False,
        enabled: bool = True,
        catch_up: str = "once",
        overlap: str = "allow",
        **opts: Any,
    ) -> str:
        """Have beat send a task (a signature, a task, or its name) by a schedule; return the entry's name.

        `schedule` is seconds, a timedelta, or one of `miniq.schedules`; `opts` are calling options.  The
        rest is as in the setting `beat_schedule`.  A good place to call it is a receiver of
        `on_after_finalize`.
        """
        found = self.signature(sig if isinstance(sig, (str, Signature)) else sig.name)
        if args or kwargs:
            found = found.clone(args, kwargs)
        options = {key: value for key, value in {**found.options, **opts}.items() if value is not None}
        name = name or truncate(repr(found), 100)
        if name in self.periodic_tasks:
            warnings.warn(f"periodic task {name!r} replaces another one: give it a name", stacklevel=2)
        self.periodic_tasks[name] = {
            "task": found.task, "schedule": schedule, "args": tuple(found.args), "kwargs": found.kwargs,
            "options": options, "relative": relative, "enabled": enabled, "catch_up": catch_up,
            "overlap": overlap,
        }  # fmt: skip
        return name

    @property
    def schedules(self) -> Any:
        """The periodic tasks as their store has them, for changes at run time; see `miniq.beat.Scheduler`."""
        make = import_object(ENTRANCES["scheduler"], package=__package__)(self.conf.beat_scheduler)
        self.finalize()
        return make(self)

    # -- calling

    def send_task(
        self,
        name: str,
        args: Optional[Sequence[Any]] = None,
        kwargs: Optional[Mapping[str, Any]] = None,
        **options: Any,
    ) -> AsyncResult:
        """Send a task by name, without having its code; options as in `Task.apply_async`."""
        if self.conf.task_always_eager:
            warnings.warn(
                f"task_always_eager does not reach send_task: {name!r} is sent to the broker",
                AlwaysEagerIgnored,
                stacklevel=2,
            )
        return self._send(name, args or (), kwargs or {}, options, self.tasks.get(name))

    def _send(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Dict[str, Any],
        task: Optional[BaseTask],
    ) -> AsyncResult:
        get = options.get
        producer = get("producer") or self.producer
        if not isinstance(producer, Producer):
            raise TypeError(f"producer must be a miniq Producer, not {producer!r:.200}")
        prepared = producer.prepare(name, args, kwargs, options, task)
        timeout_s = get("timeout") or get("confirm_timeout")
        backend = self._asked_before_calls(task)
        if backend is not None and prepared.publication.message.headers["ignore_result"]:
            backend = None
        producer.publish(prepared, get("retry"), get("retry_policy"), timeout_s, backend)
        result: AsyncResult = AsyncResult(
            prepared.task_id,
            task._backend if task is not None else None,
            name,
            self,
            None,
            bool(prepared.publication.message.headers["ignore_result"]),
        )
        frame = _state.worker_frame()
        if frame is not None and get("add_to_parent") is not False and frame.task.trail:
            frame.request.children.append(result.as_tuple())
        return result

    def prepare_signature(self, sig: Signature) -> Publication:
        """Return the message of a signature, ready to be published by somebody else."""
        name = sig.task
        task = self.tasks.get(name)
        return self.producer.prepare(name, sig.args, sig.kwargs, sig.options, task).publication

    check_options = staticmethod(check_options)

    def prepare_step(self, step: Step) -> Publication:
        """Return the message of a step of a workflow."""
        return self._prepared(step, {}).publication

    def _prepared(self, step: Step, options: Mapping[str, Any]) -> Prepared:
        merged = {**step.options, **options}
        return self.producer.prepare(step.task, step.args, step.kwargs, merged, self.tasks.get(step.task))

    def send_plan(self, plan: Plan, options: Mapping[str, Any] = _NO_OPTIONS) -> Any:
        """Send a workflow; return its result, None for one without steps.

        All of its messages are made before the first is sent.  `options` are for the sending: timeout,
        retry and the like.
        """
        prepared = []
        for step in plan.steps:
            try:
                prepared.append(self._prepared(step, {}))
            except (MiniqError, TypeError, ValueError) as error:
                raise type(error)(f"{step.where}: {error}") from error
        starts = [encode_start(start, self.chord_expires_s) for start in plan.chords]
        backend = self._asked_before_calls(None)

        def start_chords() -> None:
            for start in starts:
                self.backend.start_chord(*start)

        if prepared:
            timeout_s = options.get("timeout") or options.get("confirm_timeout")
            self.producer.publish_many(prepared, timeout_s, backend, start_chords)
        if plan.result is None:
            return None
        frame = _state.worker_frame()
        if frame is not None and options.get("add_to_parent") is not False and frame.task.trail:
            frame.request.children.append(plan.result)
        return result_from_tuple(plan.result, self)

    def looked_after(self, plan: Plan) -> Plan:
        """Return a plan with the tasks that look after its chords, where the result store needs them.

        Raises `ImproperlyConfigured` where there is nothing to look at.
        """
        if not plan.chords:
            return plan
        url = self.backend_url()
        found = backend_class(url)
        if not (found.is_shared or found.counts_chords):
            raise ImproperlyConfigured(
                f"a chord needs a result store that workers can read, and {mask_url(url)!r} is none: set"
                " result_backend to one, as redis://"
            )
        if not found.counts_chords:
            return poll(plan, new_task_id)
        return watch(plan, new_task_id) if found.watches_chords else plan

    @property
    def chord_expires_s(self) -> Optional[float]:
        """How long a chord is kept that does not end (seconds)."""
        conf = self.conf
        expires_s: Optional[float] = conf.result_chord_expires or conf.result_expires
        return expires_s

    def loads_result(self, data: bytes) -> Any:
        """Decode what was written with `result_serializer`."""
        found = serializer(self.conf.result_serializer)
        return loads(data, found.content_type, found.content_encoding, frozenset({found.content_type}))

    def signature(self, *args: Any, **kwargs: Any) -> Signature:
        """Return a signature of this app."""
        kwargs["app"] = self
        return signature(*args, **kwargs)

    @property
    def GroupResult(self) -> Any:  # noqa: N802 - Celery's name
        """The class of a group's result, of this app."""
        return self._cached("GroupResult", lambda: type("GroupResult", (GroupResult,), {"_app": self}))

    @property
    def ResultSet(self) -> Any:  # noqa: N802 - Celery's name
        """The class of a set of results, of this app."""
        return self._cached("ResultSet", lambda: type("ResultSet", (ResultSet,), {"_app": self}))

    def AsyncResult(self, task_id: str, **kwargs: Any) -> AsyncResult:  # noqa: N802 - Celery's name
        """Return the result of the call with this id."""
        return AsyncResult(task_id, app=self, **kwargs)

    def through_serializer(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], serializer: Optional[str]
    ) -> Tuple[List[Any], Dict[str, Any]]:
        """Encode and decode arguments, so that an eager call sees what a worker would."""
        content_type, encoding, data = dumps(
            [list(args), dict(kwargs)], serializer or self.conf.task_serializer
        )
        args, kwargs = loads(data, content_type, encoding, frozenset({content_type}))
        return list(args), dict(kwargs)

    # -- entrances: upper floors, imported when asked for

    def worker(self, **options: Any) -> Any:
        """Return a worker for this program: ``with app.worker(concurrency=2): ...``.

        Runs in a thread of its own, with the pool "threads" unless another is asked for; leaves the
        program's signal handlers and logging alone.
        """
        options.setdefault("pool", "threads")
        return import_object(ENTRANCES["worker"], package=__package__)(self, **options)

    Worker = worker

    def Beat(self, **options: Any) -> Any:  # noqa: N802 - Celery's name
        """Return what sends periodic tasks: ``with app.Beat(): ...``, or ``app.Beat().run()``.

        `schedule` names a file for its state; `scheduler` and `max_interval` (seconds) are as in the
        settings.
        """
        return import_object(ENTRANCES["beat"], package=__package__)(self, **options)

    def worker_main(self, argv: Optional[Sequence[str]] = None) -> int:
        """Run the command ``worker`` with these arguments (default: the program's)."""
        argv = list(sys.argv[1:] if argv is None else argv)
        if "worker" not in argv:
            argv.insert(0, "worker")
        return self.start(argv)

    def start(self, argv: Optional[Sequence[str]] = None) -> int:
        """Run the command line with this app; return the exit code."""
        main = import_object(ENTRANCES["main"], package=__package__)
        code: int = main(list(sys.argv[1:] if argv is None else argv), app=self)
        return code

    # -- current

    def set_current(self) -> None:
        """Make this the current app of the thread."""
        _state.set_current_app(self)

    def set_default(self) -> None:
        """Make this the app of threads that have no current one."""
        _state.set_default_app(self)

    @property
    def current_task(self) -> Any:
        """The task that is running here, or None."""
        return _state.current_task()

    @property
    def current_worker_task(self) -> Any:
        """The task that came from a message and is running here, or None."""
        return _state.current_worker_task()


# -- small helpers -------------------------------------------------------------------------------


def _is_served_as(scheme: str, url: str, table: Mapping[str, str]) -> bool:
    """Say whether a URL, maybe the first of several, belongs to the same store as one with `scheme`."""
    return table.get(url.partition("://")[0].lower()) == table[scheme]


def _whole_redis_url(url: str, conf: Settings) -> str:
    """Return `url`; one that is nothing but ``redis://`` gets host, port and database from the settings."""
    found = _BARE_REDIS_URL.fullmatch(url)
    if found is None:
        return url
    host = conf.redis_host or "localhost"
    if ":" in host:
        host = f"[{host}]"
    return f"{found.group(1)}://{host}:{conf.redis_port or 6379}/{conf.redis_db or 0}"


def _discover(packages: Any, related_name: Optional[str]) -> None:
    for package in packages() if callable(packages) else packages:
        import_module(package)
        if related_name:
            try:
                import_module(f"{package}.{related_name}")
            except ModuleNotFoundError as error:
                if not is_missing(error):
                    raise


def _is_own_error(error: BaseException) -> bool:
    """Say whether `import_object` itself says that there is no such module, not something inside one."""
    entry = error.__traceback__
    while entry is not None and entry.tb_next is not None:
        entry = entry.tb_next
    return entry is not None and entry.tb_frame.f_code is import_object.__code__


def _default_app() -> MiniQ:
    return MiniQ("default", set_as_current=False)


_state.on_missing_app(_default_app)

__all__ = ["DEFAULT_URL", "MiniQ", "SharedTask", "TaskRegistry", "shared_task"]

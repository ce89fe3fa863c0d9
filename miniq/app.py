# SPDX-License-Identifier: MIT
"""MiniQ: the application, one object that knows the settings, the tasks and the way to the broker.

It opens nothing by itself: the first call of a task makes this thread's connection, a worker makes
its own.  Where no broker is configured, ``sqlite:///miniq.db`` in the current folder is both the
broker and the result backend.
"""

from __future__ import annotations

import os
import socket
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

from . import _state, signals, states
from .backends.base import Backend, StoredResult, backend_class
from .canvas import Signature, signature
from .conf import Settings
from .log import get_logger
from .control import Control
from .exceptions import (
    AlreadyRegistered,
    AlwaysEagerIgnored,
    DuplicateTaskNameWarning,
    ImproperlyConfigured,
    NotRegistered,
    Retry,
)
from .producer import TASK_OPTIONS, Prepared, Producer, check_options, new_task_id
from .result import AsyncResult, EagerResult
from .routing import Router
from .serialization import dumps, loads, prepare_accept
from .signals import Signal
from .task import DECORATOR_OPTIONS, Context, argument_checker
from .task import Task as BaseTask
from .text import gen_task_name, import_object, nearest
from .times import zone
from .trace import Execution, TaskRunner
from .transports.base import Publication

if TYPE_CHECKING:
    from datetime import tzinfo

logger = get_logger(__name__)

#: Where messages and results go when nothing is configured.
DEFAULT_URL = "sqlite:///miniq.db"
#: Parts of upper floors that an app hands out: name -> "module:object", imported when asked for.
ENTRANCES = {
    "worker": ".worker.worker:Worker",
    "main": ".cli.main:main",
}


class TaskRegistry(Dict[str, BaseTask]):
    """BaseTask name -> task."""

    def __missing__(self, name: str) -> BaseTask:
        raise NotRegistered(name)

    def register(self, task: BaseTask) -> None:
        """Add `task` under its name."""
        self[task.name] = task

    def unregister(self, name: Union[str, BaseTask]) -> None:
        """Remove a task; `NotRegistered` if there is none."""
        try:
            del self[getattr(name, "name", name)]  # type: ignore[arg-type]
        except KeyError:
            raise NotRegistered(name) from None


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
        include: Sequence[str] = (),
        task_cls: Union[str, Type[BaseTask], None] = None,
        set_as_current: bool = True,
        config_source: Any = None,
        namespace: Optional[str] = None,
        strict_typing: bool = True,
        changes: Optional[Mapping[str, Any]] = None,
        wall: Callable[[], float] = time.time,
        **settings: Any,
    ) -> None:
        self.main = main
        self.strict_typing = strict_typing
        #: Epoch seconds; an argument so that tests can turn the hands.
        self.wall = wall
        self.tasks = TaskRegistry()
        self.conf = Settings()
        self.on_configure = Signal("on_configure")
        self.on_after_configure = Signal("on_after_configure")
        self.on_after_finalize = Signal("on_after_finalize")
        self.finalized = False
        self.user_options: Dict[str, Any] = {}
        self.control = Control(self)
        self.producer = Producer(self)
        #: This process as a sender: the header `origin`, and the reply address.
        self._identity: Optional[Tuple[int, str, str]] = None
        self._cache: Dict[str, Any] = {}
        self._backends = threading.local()
        self._lock = threading.RLock()
        self._autodiscover: List[Tuple[Any, Optional[str], bool]] = []
        if task_cls is not None:
            self.Task = import_object(task_cls) if isinstance(task_cls, str) else task_cls
        self.conf.on_change = self._settings_changed
        if config_source is not None:
            self.config_from_object(config_source, namespace=namespace)
        self.conf.update(dict(changes or {}))
        given = {
            "broker_url": broker,
            "result_backend": backend,
            "include": tuple(include) or None,
            **settings,
        }
        self.conf.update({key: value for key, value in given.items() if value is not None})
        if set_as_current:
            _state.set_current_app(self)
        _state.register_app(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.main or '__main__'}>"

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
        ``"CELERY"``).  Both Celery's new and old names are understood.
        """
        if isinstance(obj, str):
            try:
                obj = import_object(obj)
            except ImportError:
                if silent:
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
        if annotations:
            for task in self.tasks.values():
                _annotate(task, annotations)

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
    def result_expires_s(self) -> Optional[float]:
        """Seconds a result is kept, None = for ever."""
        return self.conf.result_expires or None

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

    def _who(self) -> Tuple[int, str, str]:
        identity = self._identity
        pid = os.getpid()
        if identity is None or identity[0] != pid:
            identity = self._identity = (pid, f"gen{pid}@{socket.gethostname()}", new_task_id())
        return identity

    @property
    def origin(self) -> str:
        """This process as the header `origin` names it."""
        return self._who()[1]

    @property
    def thread_oid(self) -> str:
        """The reply address of this process."""
        return self._who()[2]

    # -- broker and backend

    def broker_url(self, write: bool = False) -> str:
        """Return the URL of the broker for reading or writing."""
        conf = self.conf
        url = (conf.broker_write_url if write else conf.broker_read_url) or conf.broker_url
        if isinstance(url, (list, tuple)):
            url = url[0] if url else None
        return url or DEFAULT_URL

    def backend_url(self) -> str:
        """Return the URL of the result backend."""
        url: Optional[str] = self.conf.result_backend
        if url:
            return url
        broker = self.broker_url()
        if broker.startswith(("sqlite:", "memory:")):
            return broker
        return "disabled://"

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
        url = url or self.backend_url()
        return backend_class(url)(url, self.conf.result_backend_transport_options, self.wall)

    # -- tasks

    def task(self, *args: Any, **opts: Any) -> Any:
        """Decorate a function to make it a task: ``@app.task`` or ``@app.task(bind=True, ...)``.

        Every keyword becomes an attribute of the task; one that nearly is a known option raises
        `TypeError` with the right name.
        """
        if len(args) == 1 and callable(args[0]) and not isinstance(args[0], type):
            return self._task_from_fun(args[0], **opts)
        if args:
            raise TypeError(
                f"@app.task takes options as keywords only, not {args[0]!r};"
                " to name a task write @app.task(name='...')"
            )
        return lambda fun: self._task_from_fun(fun, **opts)

    def _task_from_fun(self, fun: Callable[..., Any], **opts: Any) -> BaseTask:
        if isinstance(fun, BaseTask):
            raise TypeError(f"{fun!r} is a task already")
        if not callable(fun):
            raise TypeError(f"a task must be callable, not {fun!r}")
        opts.pop("lazy", None)
        opts.pop("filter", None)
        if opts.pop("shared", False):
            raise TypeError("shared=True: use @miniq.shared_task")
        bind = opts.pop("bind", False)
        base: Type[BaseTask] = opts.pop("base", None) or self.Task
        name = opts.pop("name", None) or self.gen_task_name(fun.__name__, fun.__module__)
        self._check_task_options(name, opts, base)
        known = self.tasks.get(name)
        if known is not None:
            same = known.__wrapped__
            if same is not None and (
                getattr(same, "__qualname__", None) != getattr(fun, "__qualname__", None)
                or getattr(same, "__module__", None) != getattr(fun, "__module__", None)
            ):
                warnings.warn(
                    f"task {name!r}: {fun.__module__}.{fun.__qualname__} replaces"
                    f" {same.__module__}.{same.__qualname__}; give one of them another name=",
                    DuplicateTaskNameWarning,
                    stacklevel=3,
                )
        attributes = {
            "app": self,
            "name": name,
            "run": fun if bind else staticmethod(fun),
            "__doc__": fun.__doc__,
            "__module__": fun.__module__,
            "__wrapped__": staticmethod(fun),
            **opts,
        }
        if isinstance(opts.get("backend"), str):
            attributes["_backend"] = attributes.pop("backend")
        task: BaseTask = type(getattr(fun, "__name__", "task"), (base,), attributes)()
        task.__dict__["_check_arguments"] = argument_checker(fun, bind)
        task.__dict__["takes_errback_arguments"] = not bind and _takes_several(fun)
        return self._register(task)

    @staticmethod
    def _check_task_options(name: str, opts: Mapping[str, Any], base: Type[BaseTask]) -> None:
        for key in opts:
            if key in DECORATOR_OPTIONS or hasattr(base, key):
                continue
            hint = nearest(key, DECORATOR_OPTIONS)
            if hint is not None:
                raise TypeError(f"task {name}: unknown option {key!r}: did you mean {hint!r}?")

    def register_task(self, task: Union[BaseTask, Type[BaseTask]], **options: Any) -> BaseTask:
        """Register an instance (or class) of a class-based task; return the instance."""
        if isinstance(task, type):
            task = task()
        for key, value in options.items():
            setattr(task, key, value)
        cls = type(task)
        if not task.name:
            task.name = self.gen_task_name(cls.__name__, cls.__module__)
        task.app = self
        if "_check_arguments" not in task.__dict__:
            task.__dict__["_check_arguments"] = argument_checker(cls.run, True)
        return self._register(task)

    def _register(self, task: BaseTask) -> BaseTask:
        annotations = self.conf.task_annotations
        if annotations:
            _annotate(task, annotations)
        self.tasks[task.name] = task
        type(task).on_bound(self)
        return task

    def gen_task_name(self, name: str, module: str) -> str:
        """Return the automatic name of a function; override to change all of them."""
        return gen_task_name(self.main, name, module)

    def finalize(self, auto: bool = False) -> None:
        """Say that all tasks are there; sends `on_after_finalize` once."""
        with self._lock:
            if self.finalized:
                return
            self.finalized = True
            for packages, related, _ in self._autodiscover:
                self._discover(packages, related)
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
        if force or self.finalized:
            self._discover(packages, related_name)
        else:
            self._autodiscover.append((packages, related_name, force))

    def _discover(self, packages: Any, related_name: Optional[str]) -> None:
        names = packages() if callable(packages) else packages
        for package in names or ():
            target = f"{package}.{related_name}" if related_name else package
            try:
                import_object(target)
            except ModuleNotFoundError as error:
                if error.name != target or not related_name:
                    raise
                import_object(package)  # a package that does not exist is an error

    def import_modules(self) -> None:
        """Import what workers need: settings `imports` and `include`, and discovered tasks."""
        for name in (*self.conf.imports, *self.conf.include):
            import_object(name)
        signals.import_modules.send(sender=self)
        self.finalize()

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
        task = self.tasks.get(name)
        if task is not None:
            for key in TASK_OPTIONS:
                value = getattr(task, key)
                if value is not None and options.get(key) is None:
                    options[key] = value
        return self._send(name, args or (), kwargs or {}, options, task)

    def _send(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Dict[str, Any],
        task: Optional[BaseTask],
    ) -> AsyncResult:
        if options.get("ignore_result") is None:
            options["ignore_result"] = self.conf.task_ignore_result
        producer: Producer = options.pop("producer", None) or self.producer
        prepared = producer.prepare(name, args, kwargs, options, task)
        producer.publish(prepared, options.get("retry"), options.get("retry_policy"), options.get("timeout"))
        result = AsyncResult(
            prepared.task_id,
            task._backend if task is not None else None,
            name,
            self,
            None,
            bool(options["ignore_result"]),
        )
        frame = _state.worker_frame()
        if frame is not None and options.get("add_to_parent", True) and frame.task.trail:
            frame.request.children.append(result.as_tuple())
        return result

    def prepare_signature(self, sig: Signature) -> Publication:
        """Return the message of a signature, ready to be published by somebody else."""
        name = sig["task"]
        options = dict(sig.options)
        check_options(options)
        task = self.tasks.get(name)
        if task is not None:
            for key in TASK_OPTIONS:
                value = getattr(task, key)
                if value is not None and options.get(key) is None:
                    options[key] = value
        if options.get("ignore_result") is None:
            options["ignore_result"] = self.conf.task_ignore_result
        return self.producer.prepare(name, sig.args, sig.kwargs, options, task).publication

    def signature(self, *args: Any, **kwargs: Any) -> Signature:
        """Return a signature of this app."""
        kwargs["app"] = self
        return signature(*args, **kwargs)

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

    def run_eagerly(
        self,
        task: BaseTask,
        args: List[Any],
        kwargs: Dict[str, Any],
        task_id: str,
        retries: int,
        link: List[Any],
        link_error: List[Any],
        throw: bool,
        options: Dict[str, Any],
    ) -> EagerResult:
        """Run a task here as a worker would; see `Task.apply`."""
        frame = _state.current_frame()
        above = frame.request if frame is not None else None
        request = Context(
            id=task_id,
            task=task.name,
            args=args,
            kwargs=kwargs,
            retries=retries,
            is_eager=True,
            called_directly=False,
            hostname=socket.gethostname(),
            callbacks=link,
            errbacks=link_error,
            headers=options.get("headers"),
            ignore_result=options.get("ignore_result", task.ignore_result),
            root_id=options.get("root_id") or (above.root_id or above.id if above else None) or task_id,
            parent_id=options.get("parent_id") or (above.id if above else None),
            delivery_info={"is_eager": True, "exchange": None, "routing_key": None, "priority": None},
        )
        runner = EagerRunner(self)
        execution = Execution(task, request, args, kwargs)
        outcome = runner.execute(execution)
        error = execution.error
        if isinstance(error, Retry) and error.sig is not None:
            sig = error.sig
            return self.run_eagerly(
                task, list(sig.args), dict(sig.kwargs), task_id, retries + 1, link, link_error, throw, options
            )
        if self.conf.task_store_eager_result and outcome.results:
            self.backend_for(task._backend).store(outcome.results)
        if throw and isinstance(error, BaseException) and outcome.state in states.PROPAGATE_STATES:
            raise error
        text = execution.einfo.traceback if execution.einfo else None
        return EagerResult(task_id, execution.retval, outcome.state, text, task.name, self)

    def store_state(self, task: BaseTask, task_id: str, state: str, meta: Any, request: Context) -> None:
        """Store a custom state; see `Task.update_state`."""
        if request.is_eager and not self.conf.task_store_eager_result:
            return
        own = request if request.id == task_id else Context(id=task_id)
        stored = TaskRunner(self, "").encode(own, state, meta, None, task)
        self.backend_for(task._backend).store([stored])

    # -- entrances: upper floors, imported when asked for

    def worker(self, **options: Any) -> Any:
        """Return a worker for this program: ``with app.worker(concurrency=2): ...``.

        Runs in a thread of its own, with the pool "threads" unless another is asked for; leaves the
        program's signal handlers and logging alone.
        """
        options.setdefault("pool", "threads")
        return import_object(ENTRANCES["worker"], package=__package__)(self, **options)

    Worker = worker

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


class EagerRunner(TaskRunner):
    """Runs tasks in the calling program: callbacks are run at once too."""

    def __init__(self, app: MiniQ) -> None:
        super().__init__(app, socket.gethostname())

    def _follow(self, request: Context, sig: Any, args: Tuple[Any, ...], options: Dict[str, Any]) -> Any:
        sig = sig.clone(args)
        task = self.app.tasks[sig["task"]]
        result = task.apply(sig.args, sig.kwargs, link=sig.options.get("link"), parent_id=request.id)
        request.children.append(result.as_tuple())
        return None


def shared_task(*args: Any, **opts: Any) -> Any:
    """Decorate a function to make it a task of every app, those of the future included.

    Returns a proxy: what is called is the task of the current app.
    """

    def decorate(fun: Callable[..., Any]) -> Any:
        def make(app: MiniQ) -> BaseTask:
            return app._task_from_fun(fun, **opts)

        _state.add_shared(make)
        return SharedTask(fun, opts.get("name"))

    if len(args) == 1 and callable(args[0]) and not opts:
        return decorate(args[0])
    if args:
        raise TypeError(f"@shared_task takes options as keywords only, not {args[0]!r}")
    return decorate


class SharedTask:
    """Stands for a shared task; every attribute is that of the current app's task."""

    def __init__(self, fun: Callable[..., Any], name: Optional[str]) -> None:
        self.__dict__.update(_fun=fun, _name=name, __wrapped__=fun, __doc__=fun.__doc__)

    def _resolve(self) -> BaseTask:
        app: MiniQ = _state.current_app()
        name = self._name or app.gen_task_name(self._fun.__name__, self._fun.__module__)
        return app.tasks[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._resolve()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._resolve(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._resolve(), name, value)

    def __repr__(self) -> str:
        return f"<shared task {self._name or self._fun.__qualname__}>"


def _takes_several(fun: Callable[..., Any]) -> bool:
    code = getattr(fun, "__code__", None)
    if code is None:
        return False
    return bool(code.co_argcount > 1 or code.co_flags & 0x04)


def _annotate(task: BaseTask, annotations: Any) -> None:
    """Apply `task_annotations`: {name or "*": {attribute: value}}, objects with annotate(task), or a list."""
    for annotation in annotations if isinstance(annotations, (list, tuple)) else (annotations,):
        if isinstance(annotation, str):
            annotation = import_object(annotation)
        if isinstance(annotation, dict):
            found = {**(annotation.get("*") or {}), **(annotation.get(task.name) or {})}
        else:
            found = annotation.annotate(task) or {}
        for key, value in found.items():
            setattr(task, key, value)


def _default_app() -> MiniQ:
    return MiniQ("default", set_as_current=False)


_state.on_missing_app(_default_app)

__all__ = [
    "DEFAULT_URL",
    "AlreadyRegistered",
    "MiniQ",
    "Prepared",
    "StoredResult",
    "TaskRegistry",
    "shared_task",
]

# SPDX-License-Identifier: MIT
"""Task: the object that is both the function and the way to call it from elsewhere.

One instance per name and process.  Called directly it runs the function here; `delay` and
`apply_async` send a message; `apply` runs it here as a worker would (eagerly).  Options are class
attributes; ``None`` means "as the app is configured".
"""

from __future__ import annotations

import random
from operator import methodcaller
from types import FunctionType, MethodType
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Mapping,
    NoReturn,
    Optional,
    Sequence,
    Tuple,
)

from . import _state
from .algebra import gathered, joined, kind_of, last_task, linked, made_chord
from .canvas import Signature, chunks, signature, xmap, xstarmap
from .exceptions import (
    Ignore,
    ImproperlyConfigured,
    MaxRetriesExceededError,
    MiniqError,
    Reject,
    Retry,
)
from .producer import check_limits, check_options
from .result import AsyncResult, EagerResult
from .runner import Ends
from .serialization import serializer_for
from .signatures import new_task_id
from .times import backoff_s, parse_rate

if TYPE_CHECKING:
    from typing import Coroutine, Generic, TypeVar, overload

    from typing_extensions import Concatenate, ParamSpec

    P = ParamSpec("P")
    C = TypeVar("C")
    R = TypeVar("R")


class Context:
    """What a task knows of its current run, as ``self.request``.

    Shapes: `delivery_info` is {exchange, routing_key, priority, redelivered}; `timelimit` is
    [hard, soft] in seconds; `chain` holds the steps after this one, the next one last; `children`
    the results of tasks this one sent.
    """

    id: Optional[str] = None
    task: Optional[str] = None
    args: Any = None
    kwargs: Any = None
    retries: int = 0
    eta: Optional[str] = None
    expires: Optional[str] = None
    is_eager: bool = False
    called_directly: bool = True
    hostname: Optional[str] = None
    delivery_info: Optional[Dict[str, Any]] = None
    reply_to: Optional[str] = None
    correlation_id: Optional[str] = None
    root_id: Optional[str] = None
    parent_id: Optional[str] = None
    group: Optional[str] = None
    group_index: Optional[int] = None
    chord: Any = None
    chain: Optional[List[Any]] = None
    callbacks: Optional[List[Any]] = None
    errbacks: Optional[List[Any]] = None
    timelimit: Optional[List[Optional[float]]] = None
    headers: Optional[Dict[str, Any]] = None
    properties: Optional[Dict[str, Any]] = None
    origin: Optional[str] = None
    shadow: Optional[str] = None
    stamps: Optional[Dict[str, Any]] = None
    stamped_headers: Optional[List[str]] = None
    replaced_task_nesting: int = 0
    ignore_result: Optional[bool] = None
    utc: bool = True
    loglevel: Optional[int] = None
    logfile: Optional[str] = None
    argsrepr: Optional[str] = None
    kwargsrepr: Optional[str] = None
    lang: Optional[str] = None
    compression: Optional[str] = None
    content_type: Optional[str] = None
    children: List[Any]
    #: What is settled with this run: a retry, say.
    ends: Ends

    def __init__(self, *args: Any, **values: Any) -> None:
        known = self.__dict__
        for mapping in args:
            known.update(mapping)
        known.update(values)
        # After the message's headers: nobody outside puts anything in here.
        self.children = []
        self.ends = Ends()

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value by name."""
        return getattr(self, key, default)

    def __repr__(self) -> str:
        return f"<Context: {self.__dict__!r}>"

    @property
    def time_limit(self) -> Optional[float]:
        """The hard limit of this run in seconds, if the message set one."""
        return self.timelimit[0] if self.timelimit else None

    @property
    def soft_time_limit(self) -> Optional[float]:
        """The soft limit of this run in seconds, if the message set one."""
        return self.timelimit[1] if self.timelimit else None


#: What a decorator may set; a name close to one of these is a typo, others become attributes.
DECORATOR_OPTIONS = frozenset(
    {
        "name", "bind", "base", "typing", "shared", "lazy", "filter", "throws", "rate_limit", "time_limit",
        "soft_time_limit", "ignore_result", "store_errors_even_if_ignored", "serializer", "compression",
        "backend", "acks_late", "acks_on_failure_or_timeout", "acks_on_failure", "acks_on_timeout",
        "reject_on_worker_lost", "retry_on_worker_lost", "track_started", "default_retry_delay",
        "max_retries", "autoretry_for", "dont_autoretry_for", "retry_kwargs", "retry_backoff",
        "retry_backoff_max", "retry_jitter",
        "Request", "send_events", "trail", "resultrepr_maxsize", "expires", "priority", "queue",
        "exchange", "routing_key", "delivery_mode", "before_start", "on_success", "on_failure", "on_retry",
        "after_return", "shadow_name",
    }
)  # fmt: skip
#: Task options of Celery that are refused here unless they are off.
REFUSED_OPTIONS = ("Strategy", "pydantic", "pydantic_strict", "pydantic_context", "pydantic_dump_kwargs")


class Task:
    """The base class of all tasks; subclass it for class-based tasks or as ``base=``."""

    app: Any = None
    name: str = ""
    typing: Optional[bool] = None

    max_retries: Optional[int] = 3
    default_retry_delay: float = 180  #: seconds
    rate_limit: Any = None
    ignore_result: Optional[bool] = None
    store_errors_even_if_ignored: Optional[bool] = None
    trail: bool = True
    send_events: bool = True
    serializer: Optional[str] = None
    compression: Optional[str] = None
    time_limit: Optional[float] = None
    soft_time_limit: Optional[float] = None
    track_started: Optional[bool] = None
    acks_late: Optional[bool] = None
    acks_on_failure_or_timeout: Optional[bool] = None
    acks_on_failure: Optional[bool] = None
    acks_on_timeout: Optional[bool] = None
    reject_on_worker_lost: Optional[bool] = None
    retry_on_worker_lost: Optional[bool] = None
    throws: Any = ()  #: exception classes, as all of these
    expires: Any = None
    priority: Optional[int] = None
    queue: Any = None
    exchange: Any = None
    routing_key: Optional[str] = None
    delivery_mode: Optional[int] = None
    resultrepr_maxsize: int = 1024
    autoretry_for: Any = ()
    dont_autoretry_for: Any = ()
    retry_kwargs: Mapping[str, Any] = {}
    retry_backoff: Any = False
    retry_backoff_max: float = 600
    retry_jitter: bool = True
    #: The worker's own record of a message of this task: a class or its dotted path.
    Request: Any = None
    #: Result backend of this task alone: a URL, or a backend; None = the app's.
    _backend: Any = None
    #: True for a function of several arguments that is not bound: as an errback it is called with
    #: (request, exc, traceback).
    takes_errback_arguments: bool = False
    #: The plain function behind the task, where there is one.
    __wrapped__: Callable[..., Any]
    #: Raises TypeError when called with arguments `run` would not take; built on registration.
    _check_arguments: Optional[Callable[..., None]] = None
    #: Names of the parameters that may be given by position.
    _positional: Tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # ``backend = "..."`` in a class means the store; the attribute gives this thread's way to it.
        if "backend" in cls.__dict__:
            cls._backend = cls.__dict__["backend"]
            del cls.backend

    # -- to be overridden

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The body of the task."""
        raise NotImplementedError("tasks must define the run method")

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Called in the worker before the body."""

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        """Called in the worker after the body returned."""

    def on_failure(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Called in the worker when the task failed for good."""

    def on_retry(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Called in the worker when the task will be tried again."""

    def after_return(
        self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any
    ) -> None:
        """Called in the worker after SUCCESS or FAILURE."""

    def shadow_name(self, args: Any, kwargs: Any, options: Any) -> Optional[str]:
        """Return a name to show instead of the task's in logs, or None."""
        return None

    @classmethod
    def on_bound(cls, app: Any) -> None:
        """Called when the class is bound to `app`."""

    # -- calling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body here, as a plain function."""
        frame = _state.current_frame()
        if frame is not None and frame.task is self and not frame.entered:
            frame.entered = True  # a worker runs the task through its own __call__
            return self.run(*args, **kwargs)
        token = _state.push_frame(self, Context(args=args, kwargs=kwargs))
        try:
            return self.run(*args, **kwargs)
        finally:
            _state.pop_frame(token)

    def delay(self, *args: Any, **kwargs: Any) -> AsyncResult:
        """Send a message with these arguments; shortcut of `apply_async`."""
        return self.apply_async(args, kwargs)

    def apply_async(
        self,
        args: Optional[Sequence[Any]] = None,
        kwargs: Optional[Mapping[str, Any]] = None,
        task_id: Optional[str] = None,
        **options: Any,
    ) -> AsyncResult:
        """Send a message; return when the broker has it.

        Options, with units: `countdown` (s from now), `eta` (datetime), `expires` (s or datetime),
        `queue`, `exchange`, `routing_key`, `priority` (0..255), `serializer`, `compression`,
        `link` / `link_error` (signatures), `ignore_result`, `time_limit` / `soft_time_limit` (s),
        `headers`, `shadow`, `argsrepr` / `kwargsrepr`, `retry` / `retry_policy`, `timeout` (s in all),
        `root_id`, `parent_id`, `reply_to`, `group_id`, `group_index`, `add_to_parent`, `chain` (the
        signatures to run after this one, the next one last).

        Raises `TypeError` for arguments the task does not take, `UnknownOption`, `EncodeError`,
        `QueueNotFound`; `OperationalError` when the broker did not take the message in time.
        """
        args = () if args is None else args
        kwargs = {} if kwargs is None else kwargs
        app = self.app or self._unregistered()
        self._check(args, kwargs)
        if task_id is not None:
            options["task_id"] = task_id
        if app.conf.task_always_eager:
            return self._apply_eagerly(args, kwargs, options)
        return app._send(self.name, args, kwargs, options, self)  # type: ignore[no-any-return]

    def _check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if isinstance(args, (str, bytes)):
            raise TypeError(f"args must be a list or tuple, not {args!r:.100}: write args=({args!r:.40},)")
        check = self._check_arguments
        if check is not None and (self.app.strict_typing if self.typing is None else self.typing):
            check(*args, **kwargs)

    def _unregistered(self) -> NoReturn:
        raise ImproperlyConfigured(
            f"the task class {type(self).__qualname__} belongs to no app:"
            f" app.register_task({type(self).__name__}())"
        )

    def apply(
        self,
        args: Optional[Sequence[Any]] = None,
        kwargs: Optional[Mapping[str, Any]] = None,
        link: Any = None,
        link_error: Any = None,
        task_id: Optional[str] = None,
        retries: int = 0,
        throw: Optional[bool] = None,
        **options: Any,
    ) -> EagerResult:
        """Run the task here, with everything a worker does; return an `EagerResult`.

        `throw` (default: `task_eager_propagates`) raises the task's exception here.  `options` are
        those of `apply_async`, and `logfile`, `loglevel` for the request.
        """
        app = self.app or self._unregistered()
        log: Dict[str, Any] = {key: options.pop(key) for key in ("logfile", "loglevel") if key in options}
        options["link"], options["link_error"] = link, link_error
        options["task_id"], options["retries"] = task_id or new_task_id(), retries
        check_options(options)
        return app.eager_runner.apply(  # type: ignore[no-any-return]
            self,
            list(args or ()),
            dict(kwargs or {}),
            {**options, **log},
            app.conf.task_eager_propagates if throw is None else throw,
        )

    def _apply_eagerly(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Dict[str, Any]
    ) -> EagerResult:
        check_options(options)
        args, kwargs = self.app.through_serializer(args, kwargs, options.get("serializer") or self.serializer)
        options.pop("producer", None)
        return self.apply(args, kwargs, **options)

    # -- signatures

    def signature(self, args: Any = None, *starargs: Any, **starkwargs: Any) -> Signature:
        """Return a signature of this task; see `miniq.canvas.Signature`."""
        starkwargs.setdefault("app", self.app)
        return signature(self, args, *starargs, **starkwargs)

    subtask = signature

    def s(self, *args: Any, **kwargs: Any) -> Signature:
        """Return a signature of a call with these arguments."""
        return self.signature(args, kwargs)

    def si(self, *args: Any, **kwargs: Any) -> Signature:
        """Return an immutable signature: a parent's result is not added to its arguments."""
        return self.signature(args, kwargs, immutable=True)

    def map(self, it: Iterable[Any]) -> Signature:
        """Return a signature that calls this task with each item, one after the other, in one message."""
        return xmap(self, it, app=self.app)

    def starmap(self, it: Iterable[Any]) -> Signature:
        """Do the same with each item as the arguments of a call."""
        return xstarmap(self, it, app=self.app)

    def chunks(self, it: Iterable[Any], n: int) -> Signature:
        """Return a group of messages, each a `starmap` of `n` items."""
        found: Signature = chunks(self, it, n, app=self.app)
        return found

    # -- from inside a run

    @property
    def request(self) -> Any:
        """The `Context` of the current run; one without an id where the task is not running."""
        return _state.request_of(self) or Context()

    def push_request(self, *args: Any, **values: Any) -> None:
        """Pretend to run: the values become `request` until `pop_request`.  For tests of a body."""
        _state.push_frame(self, Context(*args, **values))

    def pop_request(self) -> None:
        """Take back the last `push_request`."""
        _state.drop_frame()

    @property
    def backend(self) -> Any:
        """Where results of this task live."""
        return self.app.backend_for(self._backend)

    @backend.setter
    def backend(self, value: Any) -> None:
        self._backend = value

    def AsyncResult(self, task_id: str, **kwargs: Any) -> AsyncResult:  # noqa: N802 - Celery's name
        """Return the result of the call with this id."""
        return AsyncResult(task_id, app=self.app, backend=self._backend, task_name=self.name, **kwargs)

    def update_state(
        self,
        task_id: Optional[str] = None,
        state: Optional[str] = None,
        meta: Any = None,
        traceback: Optional[str] = None,
    ) -> None:
        """Store a custom state, with `meta` as its result, for this run (or another `task_id`)."""
        request = self.request
        task_id = task_id or request.id
        if not task_id:
            raise ValueError("update_state outside a running task needs task_id=")
        if not state:
            raise ValueError("update_state needs state=, an upper-case word such as 'PROGRESS'")
        own = request
        if request.id != task_id:
            own = Context(id=task_id, is_eager=request.is_eager, reply_to=request.reply_to)
        runner = self.app.eager_runner if own.is_eager else self.app.runner
        runner.store_state(self, own, state, meta, traceback)

    def retry(
        self,
        args: Optional[Sequence[Any]] = None,
        kwargs: Optional[Mapping[str, Any]] = None,
        exc: Optional[BaseException] = None,
        throw: bool = True,
        eta: Any = None,
        countdown: Optional[float] = None,
        max_retries: Optional[int] = None,
        **options: Any,
    ) -> Retry:
        """Run this task again later, under the same id; raises `Retry` (write ``raise self.retry()``).

        Waits `countdown` seconds, or until `eta`, else `default_retry_delay`.  After `max_retries`
        (default: the task's; None there = no end) it raises `exc`, or `MaxRetriesExceededError`
        without one.  `args` replace those of this run, `kwargs` and `options` (those of
        `apply_async`) replace them one by one.  With ``throw=False`` the `Retry` is returned instead.

        The new message is published when this run is settled; of several retries the last counts.
        One that cannot be sent raises `Reject`.
        """
        request = self.request
        if request.called_directly:
            # Not in a worker: there is nothing to send again, the caller gets the error itself.
            raise exc if exc is not None else Retry("the task was called directly: no message to retry")
        call_args, call_kwargs = self._merged_arguments(request, args, kwargs)
        retries = (request.retries or 0) + 1
        limit = self.max_retries if max_retries is None else max_retries
        if limit is not None and retries > limit:
            if exc is not None:
                raise exc
            raise MaxRetriesExceededError(
                f"Can't retry {self.name}[{request.id}] args:{request.argsrepr or call_args}"
                f" kwargs:{request.kwargsrepr or call_kwargs}",
                task_args=call_args,
                task_kwargs=call_kwargs,
            )
        if eta is not None:
            countdown = None
        elif countdown is None:
            countdown = self.default_retry_delay
        sig = self.signature_from_request(
            request, call_args, call_kwargs, retries=retries, countdown=countdown, eta=eta, **options
        )
        retry = Retry(exc=exc, when=countdown if eta is None else eta, is_eager=request.is_eager, sig=sig)
        try:
            self._check(call_args, call_kwargs)
            if not request.is_eager:
                request.ends.followups[:] = [self.app.prepare_signature(sig)]
        except (MiniqError, TypeError, ValueError) as error:
            raise Reject(error, requeue=False) from error
        if throw:
            raise retry
        return retry

    def _merged_arguments(
        self, request: Context, args: Optional[Sequence[Any]], kwargs: Optional[Mapping[str, Any]]
    ) -> Tuple[List[Any], Dict[str, Any]]:
        """Put new arguments over those of `request`, whichever way these were given."""
        call_args = list(request.args or () if args is None else args)
        call_kwargs = {**(request.kwargs or {}), **(kwargs or {})}
        for index, name in enumerate(self._positional[: len(call_args)]):
            if name in call_kwargs:
                if args is None:
                    call_args[index] = call_kwargs.pop(name)
                elif kwargs is None or name not in kwargs:
                    del call_kwargs[name]
        return call_args, call_kwargs

    def retry_after(self, error: Exception) -> Exception:
        """Return what ends the run instead of `error`: a `Retry`, where `autoretry_for` has it.

        `error` itself where it has not, or was the last one.
        """
        never = (Retry, Ignore, Reject, *self.dont_autoretry_for)
        if isinstance(error, never) or not isinstance(error, self.autoretry_for):
            return error
        options = {**self.retry_kwargs, "exc": error, "throw": False}
        if self.retry_backoff:
            options["countdown"] = backoff_s(
                float(self.retry_backoff),
                self.request.retries or 0,
                self.retry_backoff_max,
                self.retry_jitter,
                random.random,
            )
        traceback = error.__traceback__
        try:
            retry = self.retry(**options)
        except Exception as instead:  # safety net: the last error itself, or why it cannot be sent
            return instead.with_traceback(traceback) if instead is error else instead
        retry.__cause__ = error
        return retry

    def signature_from_request(
        self,
        request: Any = None,
        args: Any = None,
        kwargs: Any = None,
        queue: Optional[str] = None,
        **extra: Any,
    ) -> Signature:
        """Return a signature that repeats the current run: same id, place in its workflow, queue."""
        request = self.request if request is None else request
        info = request.delivery_info or {}
        written = serializer_for(request.content_type) if request.content_type else None
        options: Dict[str, Any] = {
            "task_id": request.id,
            "root_id": request.root_id,
            "parent_id": request.id,
            "link": request.callbacks,
            "link_error": request.errbacks,
            "group_id": request.group,
            "group_index": request.group_index,
            "chain": request.chain,
            "chord": request.chord,
            "expires": request.expires,
            # The header `origin` goes on to name the first sender.
            "headers": {**(request.headers or {}), "origin": request.origin} if request.origin else None,
            "serializer": written.name if written is not None else None,
            "compression": request.compression,
            "reply_to": request.reply_to,
            "priority": info.get("priority"),
            "ignore_result": request.ignore_result,
            "shadow": request.shadow,
            "time_limit": request.time_limit,
            "soft_time_limit": request.soft_time_limit,
            "argsrepr": request.argsrepr if args is None or args == request.args else None,
            "kwargsrepr": request.kwargsrepr if kwargs is None or kwargs == request.kwargs else None,
            "replaced_task_nesting": request.replaced_task_nesting,
        }
        if queue is not None:
            options["queue"] = queue
        elif "queue" not in extra and "exchange" not in extra and "routing_key" not in extra:
            # Back to where it came from; the default exchange names queues by routing key.
            if info.get("exchange"):
                options["exchange"] = info["exchange"]
                options["routing_key"] = info.get("routing_key")
            elif info.get("routing_key"):
                options["queue"] = info["routing_key"]
        options.update(extra)
        return self.signature(
            request.args if args is None else args,
            request.kwargs if kwargs is None else kwargs,
            {key: value for key, value in options.items() if value is not None},
            immutable=True,
        )

    # -- changing the workflow around the current run

    def replace(self, sig: Any) -> Any:
        """Run a signature in the place of this task: it gets its id, and what was to come after it.

        Write ``return self.replace(sig)`` or ``raise``; it never comes back.
        """
        request = self.request
        if request.called_directly:
            raise RuntimeError(f"task {self.name}: replace() is for runs in a worker, this was a plain call")
        instead: Dict[str, Any] = signature(sig, app=self.app)
        if kind_of(instead) == "group":
            instead = made_chord(instead, gathered(instead))
        elif last_task(instead) is None:
            # It ends in a group, and what it stands for has one value.
            instead = joined([instead, gathered(instead)])
        nesting = (request.replaced_task_nesting or 0) + 1
        rest = [_nested_deeper(step, nesting) for step in request.chain or ()]
        options = {
            "task_id": request.id,
            "chain": rest or None,
            "chord": request.chord,
            "group_id": request.group,
            "group_index": request.group_index,
            "replaced_task_nesting": nesting,
        }
        instead = linked(instead, request.callbacks, request.errbacks)
        runner = self.app.eager_runner if request.is_eager else self.app.runner
        request.ends.followups.clear()
        runner.start_workflow(
            instead,
            (),
            {key: value for key, value in options.items() if value is not None},
            request.root_id or request.id,
            request.id,
            request,
            request.ends,
        )
        replaced = Ignore("Replaced by new task")
        replaced.counts_later = True
        raise replaced

    def add_to_chord(self, sig: Any, lazy: bool = False) -> Any:
        """Add a member to the chord of which this task is a header member; return its result.

        With `lazy` it is not sent: that is the caller's, with the signature as it is then.
        """
        request = self.request
        if not request.chord or not request.group:
            raise ValueError("Current task is not member of any chord")
        added = signature(sig, app=self.app)
        if request.is_eager:
            grows = self.app.eager_runner.add_to_chord(request.group)
        else:
            grows = self.app.backend.add_to_chord(request.group, 1, "", self.app.chord_expires_s)
        if not grows:
            raise RuntimeError("the chord is complete: no member can be added")
        added.set(group_id=request.group, chord=request.chord, root_id=request.root_id or request.id)
        result = added.freeze()
        if lazy:
            return result
        return added.apply() if request.is_eager else added.apply_async(add_to_parent=False)

    def send_event(self, type_: str, retry: bool = True, retry_policy: Any = None, **fields: Any) -> None:
        """Send an event of one's own of the running task; `fields` are JSON values.

        Raises `OperationalError` where the broker cannot be reached.
        """
        request = self.request
        with self.app.events.default_dispatcher(hostname=request.hostname) as dispatcher:
            dispatcher.send(type_, uuid=request.id, **fields)

    def __repr__(self) -> str:
        return f"<@task: {self.name} of {self.app!r}>"

    def __reduce__(self) -> Any:
        # Through the app, so that what is written names the user's module and not this one.
        return methodcaller("_task_named", self.name), (self.app or self._unregistered(),)

    def __copy__(self) -> "Task":
        return self

    def __deepcopy__(self, memo: Dict[int, Any]) -> "Task":
        return self

    if not TYPE_CHECKING:  # a checker knows what there is

        def __getattr__(self, name: str) -> Any:
            raise _state.missing(f"task {self.name}", name)


if TYPE_CHECKING:
    # What the decorators return, for type checkers only: it keeps the parameters of the function.

    class TypedTask(Task, Generic[P, C]):
        """A task of ``Callable[P, C]``; an ``async def`` has its value, not the coroutine, as result."""

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> C: ...
        @overload
        def delay(
            self: TypedTask[P, Coroutine[Any, Any, R]], *args: P.args, **kwargs: P.kwargs
        ) -> AsyncResult[R]: ...
        @overload
        def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[C]: ...
        def delay(self, *args: Any, **kwargs: Any) -> Any: ...
        @overload
        def apply_async(
            self: TypedTask[P, Coroutine[Any, Any, R]],
            args: Optional[Sequence[Any]] = None,
            kwargs: Optional[Mapping[str, Any]] = None,
            task_id: Optional[str] = None,
            **options: Any,
        ) -> AsyncResult[R]: ...
        @overload
        def apply_async(
            self,
            args: Optional[Sequence[Any]] = None,
            kwargs: Optional[Mapping[str, Any]] = None,
            task_id: Optional[str] = None,
            **options: Any,
        ) -> AsyncResult[C]: ...
        def apply_async(self, *args: Any, **options: Any) -> Any: ...

    class CustomTask(TypedTask[P, C]):
        """The same with options: any of them may be an attribute that only the user knows."""

        def __getattr__(self, name: str) -> Any: ...

    class Decorator:
        """``@app.task(...)`` for a function."""

        def __call__(self, fun: Callable[P, C], /) -> CustomTask[P, C]: ...

    class BoundDecorator:
        """``@app.task(bind=True, ...)``: the first parameter is the task itself."""

        @overload
        def __call__(self, fun: Callable[Concatenate[Any, P], C], /) -> CustomTask[P, C]: ...
        @overload  # mypy takes no ``(self, **kwargs)`` for the one above
        def __call__(self, fun: Callable[..., C], /) -> CustomTask[..., C]: ...  # type: ignore[overload-cannot-match]
        def __call__(self, fun: Any, /) -> Any: ...


def _nested_deeper(step: Any, nesting: int) -> Any:
    return {**step, "options": {**(step.get("options") or {}), "replaced_task_nesting": nesting}}


# -- checks when a task is registered --------------------------------------------------------------


def check_task(task: Task) -> None:
    """Check the options of a task, wherever they come from; raises `TypeError` or `ValueError`.

    A single exception class becomes a tuple of one.
    """
    for option in REFUSED_OPTIONS:
        if getattr(type(task), option, None):
            raise ImproperlyConfigured(
                f"task {task.name}: option {option} is Celery's; this version of miniq does not have it"
            )
    for option in ("throws", "autoretry_for", "dont_autoretry_for"):
        value = getattr(task, option)
        classes = (value,) if isinstance(value, type) else tuple(value or ())
        if not all(isinstance(one, type) and issubclass(one, BaseException) for one in classes):
            raise TypeError(f"task {task.name}: {option} must hold exception classes, not {value!r:.200}")
        if classes != value:
            setattr(task, option, classes)
    try:
        parse_rate(task.rate_limit)
    except ValueError as error:
        raise ValueError(f"task {task.name}: {error}") from None
    check_limits(task.time_limit, task.soft_time_limit, f"task {task.name}")


class Parameters:
    """What a task function takes.

    `check(*args, **kwargs)` has the signature of the function and does nothing: calling it is the
    cheapest complete check there is, the interpreter's own, with its own words in the `TypeError`.
    None where the signature cannot be known (some builtins).  `positional` are the names of
    parameters that may be given by position.
    """

    __slots__ = ("check", "positional", "takes_several")

    def __init__(self, fun: Callable[..., Any], skip_first: bool) -> None:
        spec = _spec_of(fun)
        if spec and skip_first and spec[0][1].startswith("POSITIONAL"):
            del spec[0]
        self.check = None if spec is None else _compile_check(getattr(fun, "__name__", "task"), spec)
        names = [name for name, kind, _ in spec or () if kind.startswith("POSITIONAL")]
        self.positional = tuple(names)
        self.takes_several = len(names) > 1 or any(kind == "VAR_POSITIONAL" for _, kind, _ in spec or ())


#: Of each parameter: name, kind (as inspect calls it), whether it has a default.
_Spec = List[Tuple[str, str, bool]]


def _spec_of(fun: Callable[..., Any]) -> Optional[_Spec]:
    if isinstance(fun, MethodType):
        spec = _spec_of(fun.__func__)
        return spec[1:] if spec and spec[0][1].startswith("POSITIONAL") else spec
    if not isinstance(fun, FunctionType):
        import inspect  # slow to import, and only unusual callables need it

        try:
            # A decorated function takes what its wrapper takes, not what the wrapped one does.
            found = inspect.signature(fun, follow_wrapped=False).parameters.values()
        except (TypeError, ValueError):
            return None
        return [(p.name, p.kind.name, p.default is not p.empty) for p in found]
    code = fun.__code__
    names, count, kwonly = code.co_varnames, code.co_argcount, code.co_kwonlyargcount
    first_default = count - len(fun.__defaults__ or ())
    spec = [
        (
            names[i],
            "POSITIONAL_ONLY" if i < code.co_posonlyargcount else "POSITIONAL_OR_KEYWORD",
            i >= first_default,
        )
        for i in range(count)
    ]
    at = count + kwonly
    if code.co_flags & 0x04:  # *args
        spec.append((names[at], "VAR_POSITIONAL", False))
        at += 1
    defaults = fun.__kwdefaults__ or {}
    spec += [(names[i], "KEYWORD_ONLY", names[i] in defaults) for i in range(count, count + kwonly)]
    if code.co_flags & 0x08:  # **kwargs
        spec.append((names[at], "VAR_KEYWORD", False))
    return spec


def _compile_check(name: str, spec: _Spec) -> Callable[..., None]:
    parts: List[str] = []
    starred = False
    for index, (parameter, kind, optional) in enumerate(spec):
        if kind == "VAR_POSITIONAL":
            starred = True
            parts.append("*" + parameter)
        elif kind == "VAR_KEYWORD":
            parts.append("**" + parameter)
        else:
            if kind == "KEYWORD_ONLY" and not starred:
                starred = True
                parts.append("*")
            parts.append(parameter + ("=None" if optional else ""))
            following = spec[index + 1][1] if index + 1 < len(spec) else ""
            if kind == "POSITIONAL_ONLY" and following != "POSITIONAL_ONLY":
                parts.append("/")
    label = name if name.isidentifier() else "task"
    namespace: Dict[str, Any] = {}
    # The text is made of parameter names that already passed the compiler once.
    exec(f"def {label}({', '.join(parts)}): pass", namespace)  # noqa: S102
    check: Callable[..., None] = namespace[label]
    return check

# SPDX-License-Identifier: MIT
"""Task: the object that is both the function and the way to call it from elsewhere.

One instance per name and process.  Called directly it runs the function here; `delay` and
`apply_async` send a message; `apply` runs it here as a worker would (eagerly).  Options are class
attributes; ``None`` means "as the app is configured".
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Type,
)

from . import _state, states
from .canvas import Signature, as_list, signature
from .exceptions import Ignore, MaxRetriesExceededError, OperationalError, Reject, Retry
from .producer import TASK_OPTIONS, check_options, new_task_id
from .result import AsyncResult, EagerResult
from .times import backoff_s

if TYPE_CHECKING:
    from typing import Generic, TypeVar

    from typing_extensions import ParamSpec

    P = ParamSpec("P")
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
    children: List[Any]
    #: Messages the worker publishes when this run is settled (a retry).
    followups: List[Any]

    def __init__(self, *args: Any, **values: Any) -> None:
        self.children = []
        self.followups = []
        for mapping in args:
            self.__dict__.update(mapping)
        self.__dict__.update(values)

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


#: Name of every option a decorator may set; anything else close to one of these is a typo.
DECORATOR_OPTIONS = frozenset(
    {
        "name", "bind", "base", "typing", "shared", "lazy", "filter", "throws", "rate_limit", "time_limit",
        "soft_time_limit", "ignore_result", "store_errors_even_if_ignored", "serializer", "compression",
        "backend", "acks_late", "acks_on_failure_or_timeout", "acks_on_failure", "acks_on_timeout",
        "reject_on_worker_lost", "track_started", "default_retry_delay", "max_retries", "autoretry_for",
        "dont_autoretry_for", "retry_kwargs", "retry_backoff", "retry_backoff_max", "retry_jitter",
        "Request", "Strategy", "send_events", "trail", "resultrepr_maxsize", "expires", "priority", "queue",
        "exchange", "routing_key", "delivery_mode", "before_start", "on_success", "on_failure", "on_retry",
        "after_return",
    }
)  # fmt: skip


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
    throws: Tuple[Type[BaseException], ...] = ()
    expires: Any = None
    priority: Optional[int] = None
    queue: Any = None
    exchange: Any = None
    routing_key: Optional[str] = None
    delivery_mode: Optional[int] = None
    resultrepr_maxsize: int = 1024
    autoretry_for: Tuple[Type[BaseException], ...] = ()
    dont_autoretry_for: Tuple[Type[BaseException], ...] = ()
    retry_kwargs: Mapping[str, Any] = {}
    retry_backoff: Any = False
    retry_backoff_max: float = 600
    retry_jitter: bool = True
    #: The worker's own record of a message of this task: a class or its dotted path.
    Request: Any = None
    #: Result backend of this task alone: an URL; None = the app's.
    _backend: Any = None
    #: True for a function of more than one argument that is not bound: called as errback(request, exc, traceback).
    takes_errback_arguments: bool = False
    #: The plain function behind the task, for introspection.
    __wrapped__: Optional[Callable[..., Any]] = None
    #: Raises TypeError when called with arguments `run` would not take; built on registration.
    _check_arguments: Optional[Callable[..., None]] = None

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
        `root_id`, `parent_id`, `reply_to`, `group_id`, `group_index`, `add_to_parent`.

        Raises `TypeError` for arguments the task does not take, `UnknownOption`, `EncodeError`,
        `QueueNotFound`; `OperationalError` when the broker did not take the message in time.
        """
        args = args or ()
        kwargs = kwargs or {}
        app = self.app
        check = self._check_arguments
        if check is not None and (app.strict_typing if self.typing is None else self.typing):
            check(*args, **kwargs)
        if task_id is not None:
            options["task_id"] = task_id
        if app.conf.task_always_eager:
            return self._apply_eagerly(args, kwargs, options)
        for key in TASK_OPTIONS:
            value = getattr(self, key)
            if value is not None and options.get(key) is None:
                options[key] = value
        if options.get("shadow") is None:
            shadow = self.shadow_name(args, kwargs, options)
            if shadow is not None:
                options["shadow"] = shadow
        return app._send(self.name, args, kwargs, options, self)  # type: ignore[no-any-return]

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

        `throw` (default: `task_eager_propagates`) raises the task's exception here.
        """
        check_options(options)
        return self.app.run_eagerly(  # type: ignore[no-any-return]
            self,
            list(args or ()),
            dict(kwargs or {}),
            task_id or new_task_id(),
            retries,
            as_list(link),
            as_list(link_error),
            self.app.conf.task_eager_propagates if throw is None else throw,
            options,
        )

    def _apply_eagerly(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], options: Dict[str, Any]
    ) -> EagerResult:
        check_options(options)
        args, kwargs = self.app.through_serializer(args, kwargs, options.get("serializer") or self.serializer)
        known = ("link", "link_error", "task_id", "retries", "headers", "root_id", "parent_id")
        return self.apply(args, kwargs, **{key: options[key] for key in known if key in options})

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

    # -- from inside a run

    @property
    def request(self) -> Any:
        """The `Context` of the current run."""
        return _state.request_of(self) or _NO_REQUEST

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
        self, task_id: Optional[str] = None, state: Optional[str] = None, meta: Any = None, **kwargs: Any
    ) -> None:
        """Store a custom state, with `meta` as its result, for this run (or another `task_id`)."""
        task_id = task_id or self.request.id
        if not task_id:
            raise ValueError("update_state outside a running task needs task_id=")
        if not state:
            raise ValueError("update_state needs state=, an upper-case word such as 'PROGRESS'")
        self.app.store_state(self, task_id, state, meta, self.request)

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
        without one.  With ``throw=False`` the `Retry` is returned instead.  The new message is
        published together with the settlement of this run.
        """
        request = self.request
        retries = request.retries + 1
        limit = self.max_retries if max_retries is None else max_retries
        if request.called_directly:
            # Not in a worker: there is nothing to send again, the caller gets the error itself.
            raise (
                exc
                if exc is not None
                else Retry("the task was called directly, there is no message to retry")
            )
        if eta is None and countdown is None:
            countdown = self.default_retry_delay
        if eta is not None:
            countdown = None
        call_args = request.args if args is None else args
        call_kwargs = request.kwargs if kwargs is None else {**(request.kwargs or {}), **kwargs}
        if limit is not None and retries > limit:
            if exc is not None:
                raise exc
            raise MaxRetriesExceededError(
                f"Can't retry {self.name}[{request.id}] args:{call_args} kwargs:{call_kwargs}",
                task_args=call_args,
                task_kwargs=call_kwargs,
            )
        when: Any = countdown if eta is None else eta
        sig = self.signature_from_request(request, call_args, call_kwargs, retries=retries, **options)
        retry = Retry(exc=exc, when=when, is_eager=request.is_eager, sig=sig)
        if not request.is_eager:
            try:
                sig.options.update(countdown=countdown, eta=eta)
                request.followups.append(self.app.prepare_signature(sig))
            except OperationalError as error:
                raise Reject(error, requeue=False) from error
        if throw:
            raise retry
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
        options: Dict[str, Any] = {
            "task_id": request.id,
            "root_id": request.root_id,
            "parent_id": request.id,
            "link": request.callbacks,
            "link_error": request.errbacks,
            "group_id": request.group,
            "group_index": request.group_index,
            "chain": request.chain,
            "expires": request.expires,
            "headers": request.headers or None,
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

    @contextmanager
    def retrying_automatically(self) -> Iterator[None]:
        """Turn an exception of `autoretry_for` into a retry; wraps the body in a worker."""
        try:
            yield
        except (Retry, Ignore, Reject):
            raise
        except self.autoretry_for as error:
            if isinstance(error, tuple(self.dont_autoretry_for)):
                raise
            options = dict(self.retry_kwargs)
            if self.retry_backoff:
                options["countdown"] = backoff_s(
                    self.retry_backoff,
                    self.request.retries,
                    self.retry_backoff_max,
                    self.retry_jitter,
                    random.random,
                )
            raise self.retry(exc=error, **options) from error

    def __repr__(self) -> str:
        return f"<@task: {self.name} of {self.app!r}>"

    def __reduce__(self) -> Any:
        return _task_by_name, (self.name,)


_NO_REQUEST = Context()
_NO_REQUEST.children = []


def _task_by_name(name: str) -> Any:
    return _state.current_app().tasks[name]


def argument_checker(fun: Callable[..., Any], bound: bool) -> Callable[..., None]:
    """Return a function with the signature of `fun` that does nothing.

    Calling it is the cheapest complete check of arguments there is: the interpreter's own, with its
    own words in the TypeError.  `bound` leaves out the first parameter (the task itself).
    """
    code = getattr(fun, "__code__", None)
    if code is None or hasattr(fun, "__wrapped__"):
        import inspect  # slow to import, and only unusual callables need it

        parameters = list(inspect.signature(fun).parameters.values())[1 if bound else 0 :]
        spec = [(p.name, p.kind.name, p.default is not p.empty) for p in parameters]
    else:
        defaults = len(fun.__defaults__ or ())
        kw_defaults = fun.__kwdefaults__ or {}
        count, kwonly = code.co_argcount, code.co_kwonlyargcount
        names = code.co_varnames
        spec = [
            (
                names[i],
                "POSITIONAL_ONLY" if i < code.co_posonlyargcount else "POSITIONAL_OR_KEYWORD",
                i >= count - defaults,
            )
            for i in range(count)
        ]
        at = count + kwonly
        if code.co_flags & 0x04:
            spec.append((names[at], "VAR_POSITIONAL", False))
            at += 1
        spec += [(names[i], "KEYWORD_ONLY", names[i] in kw_defaults) for i in range(count, count + kwonly)]
        if code.co_flags & 0x08:
            spec.append((names[at], "VAR_KEYWORD", False))
        if bound:
            spec = spec[1:] if spec and spec[0][1].startswith("POSITIONAL") else spec
    return _compile_checker(getattr(fun, "__name__", "task"), spec)


def _compile_checker(name: str, spec: List[Tuple[str, str, bool]]) -> Callable[..., None]:
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
    checker: Callable[..., None] = namespace[label]
    return checker


__all__ = ["Context", "Task", "argument_checker", "states"]

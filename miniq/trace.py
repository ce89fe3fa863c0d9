# SPDX-License-Identifier: MIT
"""Running one task: from a message's bytes to an outcome.

`TaskRunner.run` walks one explicit record, `Execution`, through small steps:

    open      content type, decompress, decode, look up the task, build its request
    begin     task_prerun, before_start
    body      the task's own code, under the pool's soft limit (awaited, if it is a coroutine)
    end       one of succeeded, failed, retried, ignored, rejected; callbacks become messages
    conclude  on_* handlers, signals, the log line, after_return, task_postrun

Nothing here talks to a broker or a backend: the worker publishes the follow-ups and stores the
results in the same moment in which it acknowledges the message.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback as traceback_module
from contextlib import AbstractContextManager, nullcontext
from time import monotonic
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Protocol, Tuple

from . import _state, signals, states
from .backends.base import StoredResult
from .canvas import maybe_signature
from .exceptions import (
    DecodeError,
    EncodeError,
    Ignore,
    InvalidTaskError,
    MiniqError,
    NotRegistered,
    Reject,
    Retry,
)
from .log import get_logger
from .message import unpack_body
from .producer import new_task_id
from .serialization import decompress, dumps, exception_to_dict, loads
from .task import Context, Task
from .text import nearest, safe_repr
from .times import to_iso
from .transports.base import Publication

logger = get_logger(__name__)

#: Frames and characters kept of a traceback; a recursion error would fill the store otherwise.
MAX_TRACEBACK_FRAMES = 100
MAX_TRACEBACK_CHARS = 64 * 1024


class Run(NamedTuple):
    """What travels to the place where a task runs.  Plain values only: it crosses processes.

    `delivery_info` is what the task sees as ``request.delivery_info``.
    """

    body: bytes
    content_type: str
    content_encoding: str
    headers: Dict[str, Any]
    properties: Dict[str, Any]
    delivery_info: Dict[str, Any]


class Outcome(NamedTuple):
    """What a run hands back, ready to be settled by the worker.

    `state`      SUCCESS, FAILURE, RETRY, REVOKED, IGNORED or REJECTED
    `results`    what to store: the task's own, and on failure those of the chain steps after it
    `followups`  messages to publish: callbacks, the next chain step, a retry
    `action`     "ack", "reject" (dead letter) or "requeue"; a broker sees it when late-acked
    `reason`     for a reject: one line of text
    `runtime_s`  how long the body took
    """

    state: str
    results: "List[StoredResult]" = []  # noqa: RUF012 - never mutated
    followups: "List[Publication]" = []  # noqa: RUF012 - never mutated
    action: str = "ack"
    reason: str = ""
    runtime_s: float = 0.0


class Runner(Protocol):
    """What a pool gets to run tasks with, one per process."""

    def process_init(self) -> None:
        """Prepare this process or thread group; called once, before the first run."""

    def run(self, run: Run, guard: "Optional[AbstractContextManager[Any]]" = None) -> Outcome:
        """Run one task to its outcome; never raises but for a bug.

        `guard` is entered around the task's own code only: the pool arms its soft limit in it.
        """

    async def run_async(self, run: Run, guard: "Optional[AbstractContextManager[Any]]" = None) -> Outcome:
        """Do the same inside a running asyncio loop; cancelling it cancels the task's code."""

    def process_shutdown(self, exitcode: int) -> None:
        """Say good-bye; called once when the process ends in order."""


class RunnerSpec(Protocol):
    """How to build the `Runner` in another process; picklable, for spawned children."""

    def build(self) -> Runner:
        """Import what is needed and return the runner."""


class ExceptionInfo:
    """An exception and its traceback as text; what handlers get as ``einfo``."""

    __slots__ = ("exception", "traceback", "type", "internal")

    def __init__(self, exception: BaseException, traceback: str, internal: bool = False) -> None:
        self.exception = exception
        self.traceback = traceback
        self.type = type(exception)
        self.internal = internal

    def __str__(self) -> str:
        return self.traceback

    def __repr__(self) -> str:
        return f"<ExceptionInfo: {safe_repr(self.exception)}>"


class Execution:
    """One run on its way through the steps."""

    __slots__ = (
        "task", "request", "args", "kwargs", "state", "retval", "error", "einfo", "followups", "results",
        "action", "reason", "started_mono", "runtime_s", "token",
    )  # fmt: skip

    def __init__(self, task: Task, request: Context, args: List[Any], kwargs: Dict[str, Any]) -> None:
        self.task = task
        self.request = request
        self.args = args
        self.kwargs = kwargs
        self.state = states.PENDING
        self.retval: Any = None
        self.error: Optional[BaseException] = None
        self.einfo: Optional[ExceptionInfo] = None
        self.followups: List[Publication] = request.followups
        self.results: List[StoredResult] = []
        self.action = "ack"
        self.reason = ""
        self.started_mono = 0.0
        self.runtime_s = 0.0
        self.token: Any = None


class TaskRunner:
    """Runs tasks of one app; one object per process, used by all its threads."""

    def __init__(self, app: Any, hostname: str) -> None:
        self.app = app
        self.hostname = hostname
        self._loops = threading.local()

    # -- the process around it

    def process_init(self) -> None:
        """Tell receivers of `worker_process_init` that this process is up."""
        _state.set_current_app(self.app)
        signals.worker_process_init.send(sender=None)

    def process_shutdown(self, exitcode: int) -> None:
        """Tell receivers of `worker_process_shutdown` that this process ends."""
        signals.worker_process_shutdown.send(sender=None, pid=os.getpid(), exitcode=exitcode)
        loop = getattr(self._loops, "loop", None)
        if loop is not None:
            loop.close()

    # -- the two ways in

    def run(self, run: Run, guard: "Optional[AbstractContextManager[Any]]" = None) -> Outcome:
        """Run one task to its outcome.

        `SystemExit` and `KeyboardInterrupt` of the task's code go through: the pool reports the
        process (or thread) as lost.
        """
        opened = self.open(run)
        if not isinstance(opened, Execution):
            return opened
        return self.execute(opened, guard)

    def execute(self, ex: Execution, guard: "Optional[AbstractContextManager[Any]]" = None) -> Outcome:
        """Walk an opened execution through the remaining steps."""
        ex.token = _state.push_frame(ex.task, ex.request)
        try:
            try:
                self._begin(ex)
                with guard or _NO_GUARD:
                    value = (
                        ex.task.run(*ex.args, **ex.kwargs)
                        if not ex.task.autoretry_for
                        else self._autoretry(ex)
                    )
                    if hasattr(value, "__await__"):
                        value = self._run_coroutine(_awaited(ex.task, value))
            except Exception as error:  # safety net around user code: every error becomes a state
                self._end_with(ex, error)
            else:
                self._succeeded(ex, value)
            return self._conclude(ex)
        finally:
            _state.pop_frame(ex.token)

    async def run_async(self, run: Run, guard: "Optional[AbstractContextManager[Any]]" = None) -> Outcome:
        """Run one task inside a running asyncio loop; a plain function runs in a helper thread."""
        opened = self.open(run)
        if not isinstance(opened, Execution):
            return opened
        ex = opened
        if not is_coroutine_function(ex.task.run):
            import asyncio  # loaded already: only the asyncio pool comes here
            import contextvars

            context = contextvars.copy_context()
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(None, lambda: context.run(self.execute, ex, guard))
        ex.token = _state.push_frame(ex.task, ex.request)
        try:
            try:
                self._begin(ex)
                with guard or _NO_GUARD:
                    value = await _awaited(ex.task, ex.task.run(*ex.args, **ex.kwargs))
            except Exception as error:  # safety net around user code: every error becomes a state
                self._end_with(ex, error)
            else:
                self._succeeded(ex, value)
            return self._conclude(ex)
        finally:
            _state.pop_frame(ex.token)

    # -- open

    def open(self, run: Run) -> "Execution | Outcome":
        """Decode a message; return its execution, or the outcome where it cannot run."""
        headers = run.headers
        name = headers["task"]
        request = Context(
            headers,
            {
                "headers": self._custom_headers(headers),
                "properties": run.properties,
                "delivery_info": run.delivery_info,
                "correlation_id": run.properties.get("correlation_id"),
                "reply_to": run.properties.get("reply_to"),
                "hostname": self.hostname,
                "called_directly": False,
                "is_eager": False,
            },
        )
        try:
            task = self.app.tasks.get(name)
            if task is None:
                hint = nearest(name, self.app.tasks)
                raise NotRegistered(
                    name if hint is None else f"{name} (the nearest registered name is {hint})"
                )
            body = run.body
            if headers.get("compression"):
                body = decompress(body, headers["compression"])
            value = loads(body, run.content_type, run.content_encoding, self.app.accept)
            try:
                args, kwargs, embed = unpack_body(value)
            except ValueError as error:
                raise InvalidTaskError(str(error)) from error
            if embed["chord"] is not None:
                raise InvalidTaskError("it is a member of a chord, which this version of miniq does not run")
        except MiniqError as error:
            return self.refuse(request, error)
        request.__dict__.update(args=args, kwargs=kwargs, **embed)
        return Execution(task, request, args, kwargs)

    def refuse(self, request: Context, error: BaseException) -> Outcome:
        """Return the outcome of a message that cannot run: FAILURE, and set aside to be replayed."""
        reason = f"{type(error).__name__}: {error}"
        logger.error(
            "Task %s[%s] cannot run and is set aside as a dead letter: %s", request.task, request.id, reason
        )
        results = []
        if not request.ignore_result:
            results.append(self.encode(request, states.FAILURE, exception_to_dict(error), None))
        return Outcome(states.FAILURE, results, [], "reject", reason)

    @staticmethod
    def _custom_headers(headers: Mapping[str, Any]) -> Optional[Dict[str, Any]]:
        if len(headers) <= _STANDARD_COUNT and headers.keys() <= _STANDARD_HEADERS:
            return None
        return {key: value for key, value in headers.items() if key not in _STANDARD_HEADERS}

    # -- begin, body

    def _begin(self, ex: Execution) -> None:
        if signals.task_prerun.receivers:
            signals.task_prerun.send(
                sender=ex.task, task_id=ex.request.id, task=ex.task, args=ex.args, kwargs=ex.kwargs
            )
        task = ex.task
        if type(task).before_start is not Task.before_start:
            task.before_start(ex.request.id or "", ex.args, ex.kwargs)
        ex.started_mono = monotonic()

    @staticmethod
    def _autoretry(ex: Execution) -> Any:
        with ex.task.retrying_automatically():
            return ex.task.run(*ex.args, **ex.kwargs)

    def _run_coroutine(self, coroutine: Any) -> Any:
        """Run a coroutine to its end in this thread's own loop, kept for the next ones."""
        import asyncio  # slow to import, and only async def tasks need it

        loop = getattr(self._loops, "loop", None)
        if loop is None or self._loops.pid != os.getpid():
            loop = self._loops.loop = asyncio.new_event_loop()
            self._loops.pid = os.getpid()
        main = loop.create_task(coroutine)
        try:
            return loop.run_until_complete(main)
        except BaseException:
            # A soft limit hits the loop, not the coroutine: let it clean up before the next one.
            main.cancel()
            loop.run_until_complete(asyncio.gather(main, return_exceptions=True))
            raise

    # -- end: one of these

    def _succeeded(self, ex: Execution, value: Any) -> None:
        ex.runtime_s = monotonic() - ex.started_mono
        ex.retval = value
        request, task = ex.request, ex.task
        try:
            if not ignores_result(ex.task, ex.request):
                ex.results.append(self.encode(request, states.SUCCESS, value, None, task))
            if request.callbacks:
                ex.followups.extend(self._callbacks(request, value))
            if request.chain:
                ex.followups.append(self._next_step(request, value))
        except Exception as error:  # safety net: an unencodable value or unusable callback fails the task
            ex.results.clear()
            ex.followups.clear()
            self._failed(ex, error)
            return
        ex.state = states.SUCCESS

    def _end_with(self, ex: Execution, error: Exception) -> None:
        ex.runtime_s = monotonic() - ex.started_mono if ex.started_mono else 0.0
        if isinstance(error, Retry):
            self._retried(ex, error)
        elif isinstance(error, Ignore):
            ex.state = states.IGNORED
        elif isinstance(error, Reject) and error.requeue:
            ex.state, ex.action, ex.reason = states.REJECTED, "requeue", str(error.reason)
            ex.error = error
        else:
            self._failed(ex, error)
            if isinstance(error, Reject):
                ex.action, ex.reason = "reject", f"rejected by the task: {error.reason}"

    def _failed(self, ex: Execution, error: BaseException) -> None:
        text = format_traceback(error)
        ex.state = states.FAILURE
        ex.error = ex.retval = error
        ex.einfo = ExceptionInfo(error, text)
        results, followups = self.failure(ex.task, ex.request, error, text)
        ex.results.extend(results)
        ex.followups.extend(followups)

    def _retried(self, ex: Execution, retry: Retry) -> None:
        ex.state = states.RETRY
        ex.error = ex.retval = retry
        ex.einfo = ExceptionInfo(retry, format_traceback(retry.exc or retry))
        if not ignores_result(ex.task, ex.request):
            cause = exception_to_dict(retry.exc or retry)
            ex.results.append(self.encode(ex.request, states.RETRY, cause, ex.einfo.traceback, ex.task))

    def failure(
        self, task: Optional[Task], request: Context, error: BaseException, traceback: Optional[str]
    ) -> Tuple[List[StoredResult], List[Publication]]:
        """Return what a failure stores and sends: its result, that of later steps, its errbacks.

        Also used by the worker for tasks that ended without an outcome (killed, timed out).
        """
        results: List[StoredResult] = []
        cause = exception_to_dict(error)
        keeps = not ignores_result(task, request) or (
            task is not None and _setting(task, "store_errors_even_if_ignored", self.app)
        )
        if keeps:
            results.append(self.encode(request, states.FAILURE, cause, traceback, task))
        for step in request.chain or ():
            sig = maybe_signature(step, self.app)
            if sig is not None and sig.id:
                results.append(self.encode(Context(id=sig.id), states.FAILURE, cause, traceback))
        return results, self._errbacks(request, error, traceback)

    # -- follow-ups

    def _callbacks(self, request: Context, value: Any) -> List[Publication]:
        """One callback goes alone; several share a group id."""
        callbacks = request.callbacks or []
        group_id = new_task_id() if len(callbacks) > 1 else None
        found = []
        for index, callback in enumerate(callbacks):
            sig = maybe_signature(callback, self.app)
            if sig is None:
                continue
            options = {} if group_id is None else {"group_id": group_id, "group_index": index}
            found.append(self._follow(request, sig, (value,), options))
        return found

    def _next_step(self, request: Context, value: Any) -> Publication:
        """Send the next chain step, the rest of the chain with it."""
        chain = list(request.chain or [])
        sig = maybe_signature(chain.pop(), self.app)
        if sig is None:
            raise InvalidTaskError("a step of its chain is null")
        return self._follow(request, sig, (value,), {"chain": chain})

    def _errbacks(
        self, request: Context, error: BaseException, traceback: Optional[str]
    ) -> List[Publication]:
        """Call errbacks that take (request, exc, traceback) here; send the others the failed id."""
        found: List[Publication] = []
        errbacks = request.errbacks or []
        group_id = new_task_id() if errbacks else None
        for index, errback in enumerate(errbacks):
            try:
                sig = maybe_signature(errback, self.app)
                if sig is None:
                    continue
                task = self.app.tasks.get(sig["task"])
                if task is not None and task.takes_errback_arguments:
                    task(request, error, traceback, *sig.args, **sig.kwargs)
                else:
                    options = {"group_id": group_id, "group_index": index}
                    found.append(self._follow(request, sig, (request.id,), options))
            except Exception:  # safety net: one bad errback must not hide the failure or the other errbacks
                logger.exception(
                    "Task %s[%s]: its errback %r failed and is skipped", request.task, request.id, errback
                )
        return found

    def _follow(
        self, request: Context, sig: Any, args: Tuple[Any, ...], options: Dict[str, Any]
    ) -> Publication:
        sig = sig.clone(args, **options)
        sig.options.setdefault("root_id", request.root_id or request.id)
        sig.options.setdefault("parent_id", request.id)
        publication: Publication = self.app.prepare_signature(sig)
        request.children.append(((publication.message.headers["id"], None), None))
        return publication

    # -- conclude

    def _conclude(self, ex: Execution) -> Outcome:
        """Handlers, signals and the log line; their errors are logged and change nothing."""
        task, request, state = ex.task, ex.request, ex.state
        kind = type(task)
        task_id = request.id or ""
        if state == states.SUCCESS:
            if kind.on_success is not Task.on_success:
                self._handler(ex, task.on_success, ex.retval, task_id, ex.args, ex.kwargs)
            if signals.task_success.receivers:
                signals.task_success.send(sender=task, result=ex.retval, runtime=ex.runtime_s)
            if logger.isEnabledFor(logging.INFO):
                shown = safe_repr(ex.retval, task.resultrepr_maxsize)
                logger.info(
                    "Task %s[%s] succeeded in %ss: %s",
                    request.shadow or task.name,
                    task_id,
                    ex.runtime_s,
                    shown,
                )
        elif state == states.FAILURE:
            self.announce_failure(ex)
        elif state == states.RETRY:
            self._handler(ex, task.on_retry, ex.error, task_id, ex.args, ex.kwargs, ex.einfo)
            if signals.task_retry.receivers:
                signals.task_retry.send(sender=task, request=request, reason=ex.error, einfo=ex.einfo)
            logger.info("Task %s[%s] retry: %s", request.shadow or task.name, task_id, ex.error)
        elif state == states.IGNORED:
            logger.info("Task %s[%s] ignored", request.shadow or task.name, task_id)
        else:
            logger.warning(
                "Task %s[%s] rejected and requeued: %s", request.shadow or task.name, task_id, ex.reason
            )
        if state in (states.SUCCESS, states.FAILURE) and kind.after_return is not Task.after_return:
            self._handler(ex, task.after_return, state, ex.retval, task_id, ex.args, ex.kwargs, ex.einfo)
        if signals.task_postrun.receivers:
            signals.task_postrun.send(
                sender=task,
                task_id=task_id,
                task=task,
                args=ex.args,
                kwargs=ex.kwargs,
                retval=ex.retval,
                state=state,
            )
        return Outcome(state, ex.results, list(ex.followups), ex.action, ex.reason, ex.runtime_s)

    def announce_failure(self, ex: Execution) -> None:
        """Call on_failure, send task_failure, write the log line."""
        task, request, error, einfo = ex.task, ex.request, ex.error, ex.einfo
        text = einfo.traceback if einfo else ""
        self._handler(ex, task.on_failure, error, request.id, ex.args, ex.kwargs, einfo)
        if signals.task_failure.receivers:
            signals.task_failure.send(
                sender=task,
                task_id=request.id,
                exception=error,
                args=ex.args,
                kwargs=ex.kwargs,
                traceback=text,
                einfo=einfo,
            )
        name = request.shadow or task.name
        if isinstance(error, tuple(task.throws)):
            logger.info("Task %s[%s] raised expected: %s", name, request.id, safe_repr(error))
        elif isinstance(error, Reject):
            logger.warning("Task %s[%s] rejected: %s", name, request.id, error.reason)
        else:
            logger.error("Task %s[%s] raised unexpected: %s\n%s", name, request.id, safe_repr(error), text)

    def _handler(self, ex: Execution, handler: Any, *args: Any) -> None:
        try:
            handler(*args)
        except Exception:  # safety net around user code: the task's state stands
            logger.exception(
                "Task %s[%s]: its %s handler failed; the task stays %s",
                ex.task.name,
                ex.request.id,
                getattr(handler, "__name__", handler),
                ex.state,
            )

    # -- results

    def encode(
        self,
        request: Context,
        state: str,
        result: Any,
        traceback: Optional[str],
        task: Optional[Task] = None,
    ) -> StoredResult:
        """Return a result as it is stored; raises `EncodeError` for a value that cannot be."""
        app, conf = self.app, self.app.conf
        now = app.wall()
        meta: Dict[str, Any] = {
            "status": state,
            "result": result,
            "traceback": traceback,
            "children": request.children if task is None or task.trail else [],
            "date_done": to_iso(now) if state in states.READY_STATES else None,
        }
        if request.group:
            meta["group_id"] = request.group
        if request.parent_id:
            meta["parent_id"] = request.parent_id
        if conf.result_extended:
            meta.update(
                name=request.task,
                args=request.args,
                kwargs=request.kwargs,
                worker=request.hostname,
                retries=request.retries,
                queue=(request.delivery_info or {}).get("routing_key"),
            )
            if request.stamped_headers:
                meta["stamped_headers"] = request.stamped_headers
                meta.update(request.stamps or {})
        task_id = request.id or ""
        meta["task_id"] = task_id
        content_type, encoding, body = dumps(meta, conf.result_serializer)
        return StoredResult(task_id, state, body, content_type, encoding, app.result_expires_s)


# -- small helpers -------------------------------------------------------------------------------

_STANDARD_HEADERS = frozenset(
    (
        "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit",
        "root_id", "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result",
        "replaced_task_nesting", "stamped_headers", "stamps", "compression",
    )
)  # fmt: skip
_STANDARD_COUNT = len(_STANDARD_HEADERS)
_NO_GUARD: "AbstractContextManager[None]" = nullcontext()
_CO_COROUTINE = 0x80


def is_coroutine_function(fun: Any) -> bool:
    """Say whether `fun` is an ``async def``; without importing inspect."""
    code = getattr(fun, "__code__", None) or getattr(getattr(fun, "__func__", None), "__code__", None)
    return code is not None and bool(code.co_flags & _CO_COROUTINE)


async def _awaited(task: Task, awaitable: Any) -> Any:
    if task.autoretry_for:
        with task.retrying_automatically():
            return await awaitable
    return await awaitable


def _setting(task: Task, name: str, app: Any) -> Any:
    """Return a task option, or the app's setting where the task leaves it open."""
    value = getattr(task, name)
    return getattr(app.conf, "task_" + name) if value is None else value


def ignores_result(task: Optional[Task], request: Context) -> bool:
    """Say whether no result is kept: the caller's word in the message, else the task's, else False."""
    if request.ignore_result is not None:
        return bool(request.ignore_result)
    return task is not None and bool(task.ignore_result)


def format_traceback(error: BaseException) -> str:
    """Return the traceback of `error` as bounded text, without the frames of this module.

    Text from here on: a traceback object would keep every local of the failed task alive.
    """
    try:
        tb = error.__traceback__
        while tb is not None and tb.tb_frame.f_code.co_filename == __file__:
            tb = tb.tb_next
        lines = traceback_module.format_exception(type(error), error, tb, limit=MAX_TRACEBACK_FRAMES)
        text = "".join(lines)
    except Exception as broken:  # safety net: __str__ or __cause__ of a user's exception may do anything
        text = f"{type(error).__name__}: (its traceback could not be written: {type(broken).__name__})\n"
    if len(text) > MAX_TRACEBACK_CHARS:
        half = MAX_TRACEBACK_CHARS // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters cut ...\n{text[-half:]}"
    return text

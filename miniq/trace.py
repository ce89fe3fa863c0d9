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

import contextvars
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from time import monotonic
from typing import Any, Dict, List, Mapping, Optional, Tuple

from . import _state, signals, states
from .algebra import as_list, kind_of
from .backends.base import StoredResult
from .canvas import Signature, check_signatures, signature
from .coroutines import ThreadLoops, is_coroutine_function
from .einfo import ExceptionInfo, format_traceback
from .exceptions import (
    BackendError,
    EncodeError,
    Ignore,
    ImproperlyConfigured,
    InvalidTaskError,
    MiniqError,
    NotRegistered,
    Reject,
    Retry,
)
from .flow import context_of, encode_start, never_sent, part_of
from .log import get_logger
from .message import HEADER_NAMES, unpack_body
from .plan import plan
from .runner import Ends, Outcome, Part, Run, Runner, RunnerSpec
from .serialization import dumps, exception_to_dict, loads, serializer
from .signatures import new_task_id
from .task import Context, Task
from .text import nearest, safe_repr
from .times import to_iso
from .transports.base import Publication

logger = get_logger(__name__)


class Execution:
    """One run on its way through the steps."""

    __slots__ = (
        "task", "request", "args", "kwargs", "state", "retval", "error", "einfo", "ends",
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
        #: What is settled with its message; a retry or a replacement is among it already.
        self.ends = request.ends
        self.action = "ack"
        self.reason = ""
        self.started_mono = 0.0
        self.runtime_s = 0.0
        self.token: Any = None

    def forget(self) -> None:
        """Let go of the error: its frames lead back here, and hold everything in them till then."""
        self.error = self.einfo = self.retval = None


class TaskRunner:
    """Runs tasks of one app; one object per process, used by all its threads."""

    #: False where an event loop is closed after each coroutine.
    keeps_loops = True

    def __init__(self, app: Any, hostname: str) -> None:
        """Check what every run needs of the settings; raises `ImproperlyConfigured`."""
        self.app = app
        self.hostname = hostname
        self._loops = ThreadLoops(self.keeps_loops)
        conf = app.conf
        serializer(conf.result_serializer)
        if conf.result_compression:
            raise ImproperlyConfigured(
                f"result_compression = {conf.result_compression!r}:"
                " this version of miniq stores results as they are"
            )
        _ = app.accept, app.result_accept

    # -- the process around it

    def process_init(self) -> None:
        """Tell receivers of `worker_process_init` that this process is up."""
        _state.set_current_app(self.app)
        signals.worker_process_init.send(sender=None)

    def thread_exit(self) -> None:
        """Close the event loop that coroutines ran in here."""
        self._loops.close()

    def process_shutdown(self, exitcode: int) -> None:
        """Tell receivers of `worker_process_shutdown` that this process ends."""
        signals.worker_process_shutdown.send(sender=None, pid=os.getpid(), exitcode=exitcode)
        self.thread_exit()

    # -- the two ways in

    def run(self, run: Run, guard: "Optional[AbstractContextManager[Any]]" = None) -> Outcome:
        """Run one task to its outcome.

        `SystemExit` and `KeyboardInterrupt` of the task's code go through: the pool reports the
        process (or thread) as lost.
        """
        opened = self.open(run)
        if not isinstance(opened, Execution):
            return opened
        outcome = self.execute(opened, guard)
        if run.wants_shown:
            outcome = outcome._replace(shown=_shown(opened))
        opened.forget()
        return outcome

    def execute(self, ex: Execution, guard: "Optional[AbstractContextManager[Any]]" = None) -> Outcome:
        """Walk an opened execution through the remaining steps."""
        body = self._push(ex)
        try:
            try:
                self._begin(ex)
                with guard or _NO_GUARD:
                    value = body(*ex.args, **ex.kwargs)
                if hasattr(value, "__await__"):
                    value = self.run_coroutine(value, guard)
            except Exception as error:  # safety net around user code: every error becomes a state
                self._end_with(ex, error)
            else:
                self._succeeded(ex, value)
            return self._conclude(ex)
        finally:
            _state.pop_frame(ex.token)

    async def run_async(self, run: Run, guard: "Optional[AbstractContextManager[Any]]" = None) -> Outcome:
        """Run one task inside a running asyncio loop.

        A plain function runs in a helper thread, where nothing can interrupt it: `guard` is for
        coroutines.
        """
        opened = self.open(run)
        if not isinstance(opened, Execution):
            return opened
        ex = opened
        if not is_coroutine_function(ex.task.run):
            import asyncio  # loaded already: only the asyncio pool comes here

            context = contextvars.copy_context()
            loop = asyncio.get_running_loop()
            outcome = await loop.run_in_executor(None, lambda: context.run(self._execute_in_helper, ex))
            if run.wants_shown:
                outcome = outcome._replace(shown=_shown(ex))
            ex.forget()
            return outcome
        body = self._push(ex)
        try:
            try:
                self._begin(ex)
                with guard or _NO_GUARD:
                    value = await body(*ex.args, **ex.kwargs)
            except Exception as error:  # safety net around user code: every error becomes a state
                self._end_with(ex, error)
            else:
                self._succeeded(ex, value)
            outcome = self._conclude(ex)
            return outcome._replace(shown=_shown(ex)) if run.wants_shown else outcome
        finally:
            _state.pop_frame(ex.token)
            ex.forget()

    def _execute_in_helper(self, ex: Execution) -> Outcome:
        try:
            return self.execute(ex)
        finally:
            self.thread_exit()  # nobody says when an executor's thread ends

    @staticmethod
    def _push(ex: Execution) -> Any:
        """Make the task the current one; return its body: itself, where it has its own ``__call__``."""
        task = ex.task
        own_call = type(task).__call__ is not Task.__call__
        ex.token = _state.push_frame(task, ex.request, not own_call)
        return task if own_call else task.run

    # -- open

    def open(self, run: Run) -> "Execution | Outcome":
        """Decode a message; return its execution, or the outcome where it cannot run."""
        name = run.headers["task"]
        request = self._context(run)
        try:
            task = self.app.tasks.get(name)
            if task is None:
                hint = nearest(name, self.app.tasks)
                raise NotRegistered(
                    name if hint is None else f"{name} (the nearest registered name is {hint})"
                )
            self._read_body(run, request)
        except MiniqError as error:
            return self._refuse(run, error)
        return Execution(task, request, request.args, request.kwargs)

    def _context(self, run: Run) -> Context:
        headers = run.headers
        return Context(
            headers,
            {
                "retries": headers.get("retries") or 0,
                "headers": self._custom_headers(headers),
                "content_type": run.content_type,
                "properties": run.properties,
                "delivery_info": run.delivery_info,
                "correlation_id": run.properties.get("correlation_id"),
                "reply_to": run.properties.get("reply_to"),
                "hostname": self.hostname,
                "called_directly": False,
                "is_eager": False,
            },
        )

    def _read_body(self, run: Run, request: Context) -> None:
        """Put arguments and callbacks into `request`; a `MiniqError` says what is wrong with the body."""
        value = loads(
            run.body,
            run.content_type,
            run.content_encoding,
            self.app.accept,
            run.headers.get("compression"),
        )
        try:
            args, kwargs, embed = unpack_body(value)
            # Now rather than when the work is done and its callbacks turn out to be impossible.
            for key in ("callbacks", "errbacks", "chain", "chord"):
                if embed[key]:
                    check_signatures(as_list(embed[key]), key)
        except (ValueError, TypeError, ImproperlyConfigured) as error:
            raise InvalidTaskError(str(error)) from error
        request.__dict__.update(args=args, kwargs=kwargs, **embed)

    def request_of(self, run: Run) -> Context:
        """Return the request of a message that is not run here, with its body's part if it can be read."""
        request = self._context(run)
        try:
            self._read_body(run, request)
        except MiniqError as error:
            logger.debug("Task %s[%s]: its body cannot be read: %s", request.task, request.id, error)
        return request

    def refusal(self, run: Run, error: BaseException, state: str = states.FAILURE) -> Ends:
        """Return what is settled with a message that does not run."""
        ends = Ends()
        request = self.request_of(run)
        self.failure(self.app.tasks.get(request.task), request, error, None, ends, state)
        return ends

    def _refuse(self, run: Run, error: BaseException) -> Outcome:
        """Return the outcome of a message that cannot run: FAILURE, and set aside to be replayed."""
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        reason = f"{type(error).__name__}: {text}"
        headers = run.headers
        logger.error(
            "Task %s[%s] cannot run and is set aside as a dead letter: %s",
            headers["task"], headers["id"], reason,
        )  # fmt: skip
        ends = self.refusal(run, error)
        return Outcome(
            states.FAILURE, ends.results, ends.followups, "reject", reason, 0.0, ends.parts, ends.starts,
            (safe_repr(error), ""),
        )  # fmt: skip

    @staticmethod
    def _custom_headers(headers: Mapping[str, Any]) -> Optional[Dict[str, Any]]:
        if len(headers) <= _STANDARD_COUNT and headers.keys() <= _STANDARD_HEADERS:
            return None
        return {key: value for key, value in headers.items() if key not in _STANDARD_HEADERS}

    # -- begin, body

    def _begin(self, ex: Execution) -> None:
        task = ex.task
        if signals.task_prerun.receivers:
            signals.task_prerun.send(
                sender=task, task_id=ex.request.id, task=task, args=ex.args, kwargs=ex.kwargs
            )
        task.before_start(ex.request.id or "", ex.args, ex.kwargs)
        ex.started_mono = monotonic()

    def run_coroutine(self, coroutine: Any, guard: "Optional[AbstractContextManager[Any]]" = None) -> Any:
        """Run a coroutine to its end in this thread's own loop; see `ThreadLoops.run`."""
        return self._loops.run(coroutine, guard)

    # -- end: one of these

    def _succeeded(self, ex: Execution, value: Any) -> None:
        ex.runtime_s = monotonic() - ex.started_mono
        request, task, ends = ex.request, ex.task, ex.ends
        sent, started, children = len(ends.followups), len(ends.starts), len(request.children)
        try:
            if request.callbacks:
                self._callbacks(request, value, ends)
            if request.chain:
                self._next_step(request, value, ends)
            if request.chord:
                ends.parts.append(self.part(request, states.SUCCESS, value))
            if self.keeps(task, request):
                self._keep(ends.results, task, self.encode(request, states.SUCCESS, value, None, task))
        except Exception as error:  # safety net: an unencodable value or unusable callback fails the task
            del ends.followups[sent:], ends.starts[started:], request.children[children:]
            ends.parts.clear()
            self._failed(ex, error)
            return
        ex.retval = value
        ex.state = states.SUCCESS

    def _end_with(self, ex: Execution, error: Exception) -> None:
        if ex.started_mono:
            ex.runtime_s = monotonic() - ex.started_mono
            if ex.task.autoretry_for:
                error = ex.task.retry_after(error)
        if isinstance(error, Retry):
            self._retried(ex, error)
        elif isinstance(error, Ignore):
            ex.state, ex.error = states.IGNORED, error
            if not error.counts_later:
                # Nobody else would say so: its chord, and who asks for a later step, would wait for ever.
                self._breaks_off(ex.request, states.FAILURE, exception_to_dict(error), None, ex.ends)
        elif isinstance(error, Reject) and error.requeue:
            ex.state, ex.action, ex.reason = states.REJECTED, "requeue", _reason(error)
            ex.error = error
        else:
            self._failed(ex, error)
            if isinstance(error, Reject):
                ex.action, ex.reason = "reject", f"rejected by the task: {_reason(error)}"

    def _failed(self, ex: Execution, error: BaseException) -> None:
        text = format_traceback(error)
        ex.state = states.FAILURE
        ex.error = ex.retval = error
        ex.einfo = ExceptionInfo(error, text)
        self.failure(ex.task, ex.request, error, text, ex.ends)

    def _retried(self, ex: Execution, retry: Retry) -> None:
        ex.state = states.RETRY
        ex.error = ex.retval = retry
        ex.einfo = ExceptionInfo(retry, format_traceback(retry))
        if self.keeps(ex.task, ex.request, failed=True):
            cause = exception_to_dict(retry.exc or retry)
            result = self.encode(ex.request, states.RETRY, cause, ex.einfo.traceback, ex.task)
            self._keep(ex.ends.results, ex.task, result)

    def failure(
        self,
        task: Optional[Task],
        request: Context,
        error: BaseException,
        traceback: Optional[str],
        ends: Ends,
        state: str = states.FAILURE,
    ) -> None:
        """Add what a failure stores and sends: its result, those of later steps, its errbacks.

        Also used by the worker for tasks that ended without an outcome (killed, timed out), for those
        that were revoked (`state` REVOKED) and for the body of a chord whose header failed.
        """
        results = ends.results
        cause = exception_to_dict(error)
        if self.keeps(task, request, failed=True):
            self._keep(results, task, self.encode(request, state, cause, traceback, task))
        self._breaks_off(request, state, cause, traceback, ends)
        if state != states.REVOKED:
            self.call_errbacks(request, error, traceback, ends)

    def _breaks_off(
        self, request: Context, state: str, cause: Dict[str, Any], traceback: Optional[str], ends: Ends
    ) -> None:
        """Add what its chord is told of a task without a value, and the failure of all steps after it."""
        if request.chord:
            ends.parts.append(self.part(request, state, cause))
        for step in request.chain or ():
            for sig in never_sent(step):
                self.give_up(context_of(sig, request), cause, traceback, ends)

    def give_up(self, later: Context, cause: Any, traceback: Optional[str], ends: Ends) -> None:
        """Add the failure of a step that will never be sent; `cause` is the encoded exception."""
        if not later.id:
            return
        task = self.app.tasks.get(later.task)
        if self.keeps(task, later, failed=True):
            self._keep(ends.results, task, self.encode(later, states.FAILURE, cause, traceback, task))
        if later.chord:
            ends.parts.append(self.part(later, states.FAILURE, cause))

    def part(self, request: Context, state: str, value: Any) -> Part:
        """Return what a member of a chord came to."""
        conf = self.app.conf
        return part_of(request, state, value, conf.result_serializer, self.app.chord_expires_s)

    # -- results

    def keeps(self, task: Optional[Task], request: Context, failed: bool = False) -> bool:
        """Say whether a result is stored."""
        if not ignores_result(task, request):
            return True
        return failed and task is not None and bool(_setting(task, "store_errors_even_if_ignored", self.app))

    def _keep(self, results: List[StoredResult], task: Optional[Task], result: StoredResult) -> None:
        """Leave the result to the worker; where the task has a store of its own, write it there."""
        if task is None or task._backend is None:
            results.append(result)
            return
        try:
            self.app.backend_for(task._backend).store([result])
        except BackendError:
            logger.exception(
                "Task %s[%s]: its state %s could not be stored in the task's own backend and is lost",
                task.name, result.task_id, result.state,
            )  # fmt: skip

    def store_state(
        self, task: Task, request: Context, state: str, meta: Any, traceback: Optional[str] = None
    ) -> None:
        """Store a custom state at once; see `Task.update_state`."""
        if isinstance(meta, BaseException):
            meta = exception_to_dict(meta)
        result = self.encode(request, state, meta, traceback, task)
        self.app.backend_for(task._backend).store([result])

    # -- follow-ups

    def _callbacks(self, request: Context, value: Any, ends: Ends) -> None:
        """One callback goes alone; several share a group id."""
        callbacks = request.callbacks or []
        group_id = new_task_id() if len(callbacks) > 1 else None
        for index, callback in enumerate(callbacks):
            options = {} if group_id is None else {"group_id": group_id, "group_index": index}
            self._follow(request, signature(callback, app=self.app), (value,), options, ends)

    def _next_step(self, request: Context, value: Any, ends: Ends) -> None:
        """Send the next chain step, the rest of the chain with it."""
        rest = list(request.chain or ())
        step = signature(rest.pop(), app=self.app)
        # Who called the first step waits for the last one.
        if not step.options.get("reply_to"):
            step.options["reply_to"] = request.reply_to
        self._follow(request, step, (value,), {"chain": rest}, ends)

    def call_errbacks(
        self, request: Context, error: BaseException, traceback: Optional[str], ends: Ends
    ) -> None:
        """Call errbacks that take (request, exc, traceback) here; send the others the failed id."""
        errbacks = request.errbacks or []
        group_id = new_task_id() if errbacks else None
        for index, errback in enumerate(errbacks):
            try:
                sig = signature(errback, app=self.app)
                task = self.app.tasks.get(sig.task)
                if task is not None and task.takes_errback_arguments:
                    value = sig(request, error, traceback)
                    if hasattr(value, "__await__"):
                        self.run_coroutine(value)
                        if _state.current_frame() is None:  # the worker speaks for a process that is gone
                            self.thread_exit()
                else:
                    options = {"group_id": group_id, "group_index": index}
                    self._follow(request, sig, (request.id,), options, ends)
            except Exception:  # safety net: one bad errback must not hide the failure or the other errbacks
                logger.exception(
                    "Task %s[%s]: its errback %s failed and is skipped",
                    request.task, request.id, safe_repr(errback, 200),
                )  # fmt: skip

    def _follow(
        self, request: Context, sig: Signature, args: Tuple[Any, ...], options: Dict[str, Any], ends: Ends
    ) -> None:
        root_id, parent_id = request.root_id or request.id, request.id
        if kind_of(sig) is not None or sig["task"] == "celery.chunks":
            self.start_workflow(sig, args, options, root_id, parent_id, request, ends)
            return
        sig = sig.clone(args, **options)
        sig.options.setdefault("root_id", root_id)
        sig.options.setdefault("parent_id", parent_id)
        publication: Publication = self.app.prepare_signature(sig)
        ends.followups.append(publication)
        request.children.append(((publication.message.headers["id"], None), None))

    def start_workflow(
        self,
        sig: Mapping[str, Any],
        args: Tuple[Any, ...],
        options: Mapping[str, Any],
        root_id: Optional[str],
        parent_id: Optional[str],
        request: Context,
        ends: Ends,
    ) -> None:
        """Add what starts a workflow (or a task) after a run."""
        app = self.app
        found = plan(
            sig,
            args,
            {},
            options,
            new_id=new_task_id,
            root_id=root_id,
            parent_id=parent_id,
            reply_to=request.reply_to,
        )
        found = app.looked_after(found)
        ends.followups += [app.prepare_step(step) for step in found.steps]
        ends.starts += [encode_start(start, app.chord_expires_s) for start in found.chords]
        if found.result is not None:
            request.children.append(found.result)

    # -- conclude

    def _conclude(self, ex: Execution) -> Outcome:
        """Handlers, signals and the log line; their errors are logged and change nothing."""
        task, request, state = ex.task, ex.request, ex.state
        task_id = request.id or ""
        name = request.shadow or task.name
        if state == states.SUCCESS:
            self._handler(ex, task.on_success, ex.retval, task_id, ex.args, ex.kwargs)
            if signals.task_success.receivers:
                signals.task_success.send(sender=task, result=ex.retval, runtime=ex.runtime_s)
            if logger.isEnabledFor(logging.INFO):
                shown = safe_repr(ex.retval, task.resultrepr_maxsize)
                logger.info("Task %s[%s] succeeded in %ss: %s", name, task_id, ex.runtime_s, shown)
        elif state == states.FAILURE:
            self.announce_failure(ex)
        elif isinstance(ex.error, Retry):
            cause = ex.error.exc or ex.error
            self._handler(ex, task.on_retry, cause, task_id, ex.args, ex.kwargs, ex.einfo)
            if signals.task_retry.receivers:
                signals.task_retry.send(sender=task, request=request, reason=ex.error, einfo=ex.einfo)
            logger.info("Task %s[%s] retry: %s", name, task_id, ex.error)
        elif state == states.IGNORED:
            logger.info("Task %s[%s] ignored", name, task_id)
        else:
            logger.warning("Task %s[%s] rejected and requeued: %s", name, task_id, ex.reason)
        if state in states.READY_STATES:
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
        ends = ex.ends
        return Outcome(
            state, ends.results, list(ends.followups), ex.action, ex.reason, ex.runtime_s, ends.parts,
            list(ends.starts),
        )  # fmt: skip

    def announce_failure(self, ex: Execution) -> None:
        """Call on_failure, send task_failure, write the log line."""
        frame = _state.current_frame()
        if frame is None or frame.request is not ex.request:  # a worker speaks for a process that is gone
            token = _state.push_frame(ex.task, ex.request)
            try:
                self.announce_failure(ex)
            finally:
                _state.pop_frame(token)
            return
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
        if isinstance(error, task.throws):
            logger.info("Task %s[%s] raised expected: %s", name, request.id, safe_repr(error))
        elif isinstance(error, Reject):
            logger.warning("Task %s[%s] rejected: %s", name, request.id, _reason(error))
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
        try:
            content_type, encoding, body = dumps(meta, conf.result_serializer)
        except EncodeError:
            if not conf.result_extended:
                raise
            # Arguments that came in by another serializer are no reason to lose the result.
            meta.update(args=safe_repr(request.args), kwargs=safe_repr(request.kwargs))
            content_type, encoding, body = dumps(meta, conf.result_serializer)
        expires_s, reply_to = conf.result_expires, request.reply_to or ""
        return StoredResult(task_id, state, body, content_type, encoding, expires_s, reply_to)


# -- small helpers -------------------------------------------------------------------------------

_STANDARD_HEADERS = frozenset((*HEADER_NAMES, "compression"))
_STANDARD_COUNT = len(_STANDARD_HEADERS)
_NO_GUARD: "AbstractContextManager[None]" = nullcontext()


def _setting(task: Task, name: str, app: Any) -> Any:
    """Return a task option, or the app's setting where the task leaves it open."""
    value = getattr(task, name)
    return getattr(app.conf, "task_" + name) if value is None else value


def ignores_result(task: Optional[Task], request: Context) -> bool:
    """Say whether no result is kept: the caller's word in the message, else the task's, else the setting."""
    if request.ignore_result is not None:
        return bool(request.ignore_result)
    return task is not None and bool(_setting(task, "ignore_result", task.app))


def _shown(ex: Execution) -> Tuple[str, str]:
    """Return what is told of the end of a run."""
    error = ex.error
    if error is None:
        return safe_repr(ex.retval, ex.task.resultrepr_maxsize), ""
    if isinstance(error, Retry) and error.exc is not None:
        error = error.exc
    return safe_repr(error), ex.einfo.traceback if ex.einfo else ""


def _reason(error: Reject) -> str:
    return str(error.reason) if isinstance(error.reason, str) else safe_repr(error.reason, 500)


__all__ = [
    "ExceptionInfo",
    "Execution",
    "Outcome",
    "Run",
    "Runner",
    "RunnerSpec",
    "TaskRunner",
    "ignores_result",
]

# SPDX-License-Identifier: MIT
"""What a caller holds: the id of a task, and the way to its state and value.

Making a result subscribes to nothing and keeps nothing alive; only waiting talks to the backend.
An unknown id is PENDING, as in Celery: the store cannot tell "not yet" from "never".
"""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from . import _state, states
from .backends.base import Backend, StoredResult
from .exceptions import DecodeError, ImproperlyConfigured, TaskRevokedError, TimeoutError
from .serialization import exception_from_dict, loads

#: How a stored meta is read before anything is known: nothing stored.
_UNKNOWN: Dict[str, Any] = {"status": states.PENDING, "result": None, "traceback": None, "children": None}


class RemoteTraceback(Exception):
    """The traceback of the worker, as text; the `__cause__` of what `get` raises."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(text)

    def __str__(self) -> str:
        return "\n" + self.text


def assert_may_wait() -> None:
    """Raise `RuntimeError` inside a task of a worker, where waiting may deadlock."""
    if not _state.join_allowed():
        raise RuntimeError(
            "Never call result.get() within a task!  It holds a slot of the worker while it waits for"
            " another one.  Use link= or a chain; or, where the other task runs in other workers,"
            " `with miniq.result.allow_join_result():` or get(disable_sync_subtasks=False)."
        )


allow_join_result = _state.allow_join_result


class AsyncResult:
    """The result of one call.  May be used from any thread; every access asks the backend
    until the state is final, which is then remembered.
    """

    def __init__(
        self,
        id: str,  # noqa: A002 - Celery's public name
        backend: Any = None,
        task_name: Optional[str] = None,
        app: Any = None,
        parent: "Optional[AsyncResult]" = None,
        ignored: bool = False,
    ) -> None:
        if not id:
            raise ValueError(f"a result needs the id of a task, not {id!r}")
        self.id = id
        self.task_name = task_name
        self.parent = parent
        self.ignored = ignored
        self._app = app
        self._backend = backend
        self._final: Optional[Dict[str, Any]] = None

    # -- identity

    @property
    def app(self) -> Any:
        """The app whose settings and backend are used."""
        if self._app is None:
            self._app = _state.current_app()
        return self._app

    @property
    def backend(self) -> Backend:
        """The result store, this thread's connection to it."""
        return self.app.backend_for(self._backend)  # type: ignore[no-any-return]

    @property
    def task_id(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.id}>"

    def __str__(self) -> str:
        return self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, AsyncResult):
            return other.id == self.id
        if isinstance(other, str):
            return other == self.id
        return NotImplemented

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(self), (self.id, None, self.task_name)

    def as_tuple(self) -> Any:
        """Return ``((id, parent tuple or None), None)``, the form results have on the wire."""
        return (self.id, self.parent and self.parent.as_tuple()), None

    def as_list(self) -> List[str]:
        """Return the ids of this result and its parents."""
        found = [self.id]
        if self.parent is not None:
            found += self.parent.as_list()
        return found

    # -- state

    def _meta(self) -> Dict[str, Any]:
        if self._final is not None:
            return self._final
        stored = self.backend.fetch([self.id]).get(self.id)
        return self._read(stored) if stored is not None else _UNKNOWN

    def _read(self, stored: StoredResult) -> Dict[str, Any]:
        meta = read_meta(stored, self.app.result_accept)
        if meta["status"] in states.READY_STATES:
            self._final = meta
        return meta

    @property
    def state(self) -> str:
        """PENDING, STARTED, SUCCESS, ... (see `miniq.states`)."""
        return str(self._meta()["status"])

    status = state

    @property
    def result(self) -> Any:
        """The return value, or the exception (not raised), or the meta of a custom state."""
        return self._meta()["result"]

    info = result

    @property
    def traceback(self) -> Optional[str]:
        """The text of the traceback of a failure."""
        return self._meta().get("traceback")

    @property
    def date_done(self) -> Optional[str]:
        """When it ended, ISO 8601 text."""
        return self._meta().get("date_done")

    @property
    def children(self) -> "List[AsyncResult]":
        """The results of tasks that this one sent."""
        return [result_from_tuple(child, self.app) for child in self._meta().get("children") or ()]

    @property
    def name(self) -> Optional[str]:
        """The task's name; from the store with `result_extended`."""
        return self._meta().get("name") or self.task_name

    @property
    def args(self) -> Any:
        return self._meta().get("args")

    @property
    def kwargs(self) -> Any:
        return self._meta().get("kwargs")

    @property
    def worker(self) -> Optional[str]:
        return self._meta().get("worker")

    @property
    def retries(self) -> Optional[int]:
        return self._meta().get("retries")

    @property
    def queue(self) -> Optional[str]:
        return self._meta().get("queue")

    def ready(self) -> bool:
        """Say whether the state is final."""
        return self.state in states.READY_STATES

    def successful(self) -> bool:
        """Say whether it ended in SUCCESS."""
        return self.state == states.SUCCESS

    def failed(self) -> bool:
        """Say whether it ended in FAILURE."""
        return self.state == states.FAILURE

    # -- waiting

    def get(
        self,
        timeout: Optional[float] = None,
        propagate: bool = True,
        interval: float = 0.5,
        no_ack: bool = True,
        follow_parents: bool = True,
        callback: Optional[Callable[[str, Any], Any]] = None,
        on_message: Optional[Callable[[Dict[str, Any]], Any]] = None,
        on_interval: Optional[Callable[[], Any]] = None,
        disable_sync_subtasks: bool = True,
    ) -> Any:
        """Wait until the task ended; return its value or raise its exception.

        `timeout` in seconds (None = for ever, 0 = look once); `interval` is the longest pause
        between two looks where the backend cannot push.  `on_message` sees every meta on the way,
        `on_interval` is called at least every `interval` seconds, `callback(id, value)` at the end.

        Raises `miniq.exceptions.TimeoutError`; the task's own exception, with the worker's traceback
        as its cause; `RuntimeError` inside a task; `ImproperlyConfigured` when the result is ignored
        or no backend is configured: it would never come.
        """
        if disable_sync_subtasks:
            assert_may_wait()
        if self.ignored:
            raise ImproperlyConfigured(
                f"the result of task {self.id} is ignored (ignore_result), so it will never be there to get"
            )
        if follow_parents and propagate and self.parent is not None:
            for parent in self.parent._upwards():
                if parent.failed():
                    parent.maybe_throw()
        meta = self._final or self._wait(timeout, interval, on_message, on_interval)
        if propagate and meta["status"] in states.PROPAGATE_STATES:
            self._raise(meta)
        if callback is not None:
            callback(self.id, meta["result"])
        return meta["result"]

    wait = get

    def _wait(
        self,
        timeout: Optional[float],
        interval: float,
        on_message: Optional[Callable[[Dict[str, Any]], Any]],
        on_interval: Optional[Callable[[], Any]],
    ) -> Dict[str, Any]:
        backend = self.backend
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            step = left if on_interval is None else interval if left is None else min(interval, left)
            for stored in backend.wait([self.id], step, interval, on_message is not None):
                meta = self._read(stored)
                if on_message is not None:
                    on_message(meta)
                if meta["status"] in states.READY_STATES:
                    return meta
            if left is not None and (left <= 0 or on_interval is None):
                raise TimeoutError(
                    f"task {self.id} did not end within {timeout} s; its state is {self.state}"
                    " (PENDING is also what an unknown or expired id looks like)"
                )
            if on_interval is not None:
                on_interval()

    def maybe_throw(
        self, propagate: bool = True, callback: Optional[Callable[[str, Any], Any]] = None
    ) -> Any:
        """Raise the task's exception if it failed; else return what there is."""
        meta = self._meta()
        if propagate and meta["status"] in states.PROPAGATE_STATES:
            self._raise(meta)
        if callback is not None:
            callback(self.id, meta["result"])
        return meta["result"]

    maybe_reraise = maybe_throw

    def _raise(self, meta: Dict[str, Any]) -> None:
        error = meta["result"]
        if not isinstance(error, BaseException):
            error = (
                TaskRevokedError(str(error)) if meta["status"] == states.REVOKED else DecodeError(repr(error))
            )
        text = meta.get("traceback")
        if text:
            raise error from RemoteTraceback(text)
        raise error

    def _upwards(self) -> "Iterator[AsyncResult]":
        node: Optional[AsyncResult] = self
        while node is not None:
            yield node
            node = node.parent

    # -- influence

    def forget(self) -> None:
        """Delete the stored result, and those of its parents."""
        self._final = None
        self.backend.forget([node.id for node in self._upwards()])

    def revoke(self, connection: Any = None, terminate: bool = False, signal: Optional[str] = None) -> None:
        """Tell all workers not to run it; with `terminate`, stop it where it runs."""
        self.app.control.revoke(self.id, terminate=terminate, signal=signal or "SIGTERM")


class EagerResult(AsyncResult):
    """The result of a task that already ran, here."""

    def __init__(
        self,
        id: str,  # noqa: A002 - Celery's public name
        ret_value: Any,
        state: str,
        traceback: Optional[str] = None,
        name: Optional[str] = None,
        app: Any = None,
    ) -> None:
        super().__init__(id, task_name=name, app=app)
        self._eager: Dict[str, Any] = {
            "status": state,
            "result": ret_value,
            "traceback": traceback,
            "children": [],
            "name": name,
        }

    def _meta(self) -> Dict[str, Any]:
        return self._eager

    def get(  # type: ignore[override]
        self,
        timeout: Optional[float] = None,
        propagate: bool = True,
        disable_sync_subtasks: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Return the value or raise the exception, at once."""
        meta = self._eager
        if propagate and meta["status"] in states.PROPAGATE_STATES:
            self._raise(meta)
        return meta["result"]

    wait = get  # type: ignore[assignment]

    def _raise(self, meta: Dict[str, Any]) -> None:
        error = meta["result"]
        raise error if isinstance(error, BaseException) else TaskRevokedError(str(error))

    def forget(self) -> None:
        """Nothing is stored."""

    def revoke(self, *args: Any, **kwargs: Any) -> None:
        """Too late: mark it REVOKED."""
        self._eager["status"] = states.REVOKED


def read_meta(stored: StoredResult, accept: Any) -> Dict[str, Any]:
    """Decode a stored meta; exceptions come back as exception objects."""
    meta: Dict[str, Any] = loads(stored.body, stored.content_type, stored.content_encoding, accept)
    if not isinstance(meta, dict) or "status" not in meta:
        raise DecodeError(f"the stored result of task {stored.task_id} is no result meta: {meta!r:.200}")
    meta.setdefault("result", None)
    if meta["status"] in states.EXCEPTION_STATES and isinstance(meta["result"], dict):
        meta["result"] = exception_from_dict(meta["result"])
    return meta


def result_from_tuple(value: Any, app: Any = None) -> AsyncResult:
    """Build a result from `AsyncResult.as_tuple` (or a bare id)."""
    if isinstance(value, AsyncResult):
        return value
    if isinstance(value, str):
        return AsyncResult(value, app=app)
    head: Sequence[Any] = value[0]
    if isinstance(head, str):
        return AsyncResult(head, app=app)
    task_id, parent = head
    return AsyncResult(task_id, app=app, parent=result_from_tuple(parent, app) if parent else None)

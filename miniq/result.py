# SPDX-License-Identifier: MIT
"""What a caller holds: the id of a task, and the way to its state and value.

Making a result subscribes to nothing and keeps nothing alive; only waiting talks to the backend.
An unknown id is PENDING, as in Celery: the store cannot tell "not yet" from "never".
"""

from __future__ import annotations

import time
from collections import deque
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Callable, Deque, Dict, Generic, Iterator, List, Optional, Tuple

from . import _state, states
from .backends.base import Backend, StoredResult
from .exceptions import (
    BackendError,
    DecodeError,
    ImproperlyConfigured,
    IncompleteStream,
    TaskRevokedError,
    TimeoutError,
)
from .serialization import exception_from_dict, loads
from .times import parse_iso8601

if TYPE_CHECKING:
    from datetime import datetime

    from typing_extensions import TypeVar

    R = TypeVar("R", default=Any)
else:
    from typing import TypeVar

    R = TypeVar("R")

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


class AsyncResult(Generic[R]):
    """The result of one call.

    May be used from any thread; every access asks the backend until the state is final, which is
    then remembered.
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
        self._then: List[Tuple[Callable[[Any], Any], Optional[Callable[[Any], Any]]]] = []

    # -- identity

    @property
    def app(self) -> Any:
        """The app whose settings and backend are used."""
        if self._app is None:
            self._app = _state.current_app()
        return self._app

    @property
    def backend(self) -> Backend:
        """The result store, this thread's connection to it.

        Raises `NotImplementedError`, as in Celery, where no result is kept at all.
        """
        found: Backend = self.app.backend_for(self._backend)
        if not found.enabled:
            raise NotImplementedError("No result backend is configured: set result_backend")
        return found

    @property
    def task_id(self) -> str:
        """The id of the task."""
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
        # Through the app, so that what is written names the user's module and not this one.
        known = {"task_name": self.task_name, "parent": self.parent, "ignored": self.ignored}
        if isinstance(self._backend, str):
            known["backend"] = self._backend
        return methodcaller("AsyncResult", self.id, **known), (self.app,)

    def __copy__(self) -> "AsyncResult[R]":
        return self

    def __deepcopy__(self, memo: Dict[int, Any]) -> "AsyncResult[R]":
        return self

    if not TYPE_CHECKING:  # a checker knows what there is

        def __getattr__(self, name: str) -> Any:
            raise _state.missing(type(self).__name__, name)

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
            while self._then:
                self._tell(*self._then.pop(0))
        return meta

    @property
    def state(self) -> str:
        """PENDING, STARTED, SUCCESS, ... (see `miniq.states`)."""
        return str(self._meta()["status"])

    status = state

    @property
    def result(self) -> Any:
        """The return value, or the exception (not raised), or the meta of a custom state."""
        return _value(self._meta())

    info = result

    @property
    def traceback(self) -> Optional[str]:
        """The text of the traceback of a failure."""
        return self._meta().get("traceback")

    @property
    def date_done(self) -> "Optional[datetime]":
        """When it ended, in UTC."""
        text = self._meta().get("date_done")
        return parse_iso8601(text) if text else None

    @property
    def children(self) -> "List[AsyncResult]":
        """The results of tasks that this one sent; of a group, its members."""
        found: List[AsyncResult] = []
        for child in self._meta().get("children") or ():
            members = child[1] if isinstance(child, (list, tuple)) and len(child) > 1 else None
            found += [result_from_tuple(one, self.app) for one in members or (child,)]
        return found

    @property
    def name(self) -> Optional[str]:
        """The task's name; from the store with `result_extended`, as all the following."""
        return self._meta().get("name") or self.task_name

    @property
    def args(self) -> Any:
        """What it was called with."""
        return self._meta().get("args")

    @property
    def kwargs(self) -> Any:
        """What it was called with, by name."""
        return self._meta().get("kwargs")

    @property
    def worker(self) -> Optional[str]:
        """The node name of the worker."""
        return self._meta().get("worker")

    @property
    def retries(self) -> Optional[int]:
        """How often it was tried again."""
        return self._meta().get("retries")

    @property
    def queue(self) -> Optional[str]:
        """The queue it came from."""
        return self._meta().get("queue")

    def exists(self) -> bool:
        """Say whether anything is stored; a PENDING task that does not exist is unknown, or expired."""
        return self.id in self.backend.fetch([self.id])

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
    ) -> R:
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
            for parent in reversed(list(self.parent._upwards())):
                parent.maybe_throw()
        meta = self._final or self._wait(timeout, interval, on_message, on_interval)
        value: R = self._give(meta, propagate, callback)
        return value

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
                    f"task {self.id} did not end within {timeout} s; {self._state_in_words()}"
                )
            if on_interval is not None:
                on_interval()

    def _state_in_words(self) -> str:
        try:
            state = self.state
        except BackendError as error:
            return f"its state cannot be read: {error}"
        return f"its state is {state} (PENDING is also what an unknown or expired id looks like)"

    def maybe_throw(
        self, propagate: bool = True, callback: Optional[Callable[[str, Any], Any]] = None
    ) -> Any:
        """Raise the task's exception if it failed; else return what there is."""
        return self._give(self._meta(), propagate, callback)

    maybe_reraise = maybe_throw

    def _give(
        self, meta: Dict[str, Any], propagate: bool, callback: Optional[Callable[[str, Any], Any]]
    ) -> Any:
        value = _value(meta)
        if propagate and meta["status"] in states.PROPAGATE_STATES:
            if not isinstance(value, BaseException):
                kind = TaskRevokedError if meta["status"] == states.REVOKED else DecodeError
                value = kind(f"task {self.id} ended as {meta['status']} with {value!r:.200}")
            text = meta.get("traceback")
            try:
                if text:
                    raise value from RemoteTraceback(text)
                raise value
            finally:
                del value  # this frame and the error would hold each other
        if callback is not None:
            callback(self.id, value)
        return value

    def then(self, callback: Callable[[Any], Any], on_error: Optional[Callable[[Any], Any]] = None) -> None:
        """Call `callback(self)` when it is known to have succeeded, `on_error(self)` when it failed.

        At once if it has ended; else in the thread that finds that out, by `get` or `state`.
        """
        if self._final is None and not self.ready():
            self._then.append((callback, on_error))
        else:
            self._tell(callback, on_error)

    def _tell(self, callback: Callable[[Any], Any], on_error: Optional[Callable[[Any], Any]]) -> None:
        found = callback if self.successful() else on_error
        if found is not None:
            found(self)

    # -- relatives

    def _upwards(self) -> "Iterator[AsyncResult]":
        node: Optional[AsyncResult] = self
        while node is not None:
            yield node
            node = node.parent

    def iterdeps(self, intermediate: bool = False) -> "Iterator[Tuple[Optional[AsyncResult], AsyncResult]]":
        """Yield (parent, result) for this one and all that descend from it, nearest first.

        Raises `IncompleteStream` at one that has not ended, unless `intermediate`.
        """
        left: "Deque[Tuple[Optional[AsyncResult], AsyncResult]]" = deque([(None, self)])
        while left:
            parent, node = left.popleft()
            yield parent, node
            if node.ready():
                left.extend((node, child) for child in node.children)
            elif not intermediate:
                raise IncompleteStream(f"task {node.id} has not ended, its children are not known yet")

    def collect(self, intermediate: bool = False, **options: Any) -> "Iterator[Tuple[AsyncResult, Any]]":
        """Wait for this one and all that descend from it; yield (result, value).

        `options` are those of `get`.
        """
        for _, node in self.iterdeps(intermediate):
            yield node, node.get(**options)

    def get_leaf(self) -> Any:
        """Wait for the last of the descendants; return its value."""
        return deque(self.collect(), maxlen=1).pop()[1]

    # -- influence

    def forget(self) -> None:
        """Delete the stored result, and those of its parents."""
        self._final = None
        self.backend.forget([node.id for node in self._upwards()])

    def revoke(
        self,
        connection: None = None,
        terminate: bool = False,
        signal: Optional[str] = None,
        wait: bool = False,
        timeout: Optional[float] = None,
    ) -> None:
        """Tell all workers not to run it; with `terminate`, stop it where it runs.

        Nobody answers in this version of miniq, so ``wait=True`` raises `ImproperlyConfigured`.
        """
        if wait or connection is not None:
            raise ImproperlyConfigured("revoke: this version of miniq takes neither wait= nor connection=")
        self.app.control.revoke(self.id, terminate=terminate, signal=signal or "SIGTERM")


class EagerResult(AsyncResult[R]):
    """The result of a task that already ran, here."""

    def __init__(
        self,
        id: str,  # noqa: A002 - Celery's public name
        ret_value: Any,
        state: str,
        traceback: Optional[str] = None,
        name: Optional[str] = None,
        app: Any = None,
        children: Any = (),
    ) -> None:
        super().__init__(id, task_name=name, app=app)
        self._final = {
            "status": state,
            "result": ret_value,
            "traceback": traceback,
            "children": list(children),
            "name": name,
        }

    def __reduce__(self) -> Tuple[Any, ...]:
        raise TypeError("an EagerResult holds the task's own objects and is not pickled; pickle its value")

    @property
    def supports_native_join(self) -> bool:
        """False: there is nothing to wait for."""
        return False

    def ready(self) -> bool:
        """Return True: it already ran."""
        return True

    def _meta(self) -> Dict[str, Any]:
        assert self._final is not None  # set on creation
        return self._final

    def get(
        self,
        timeout: Optional[float] = None,
        propagate: bool = True,
        *_: Any,
        callback: Optional[Callable[[str, Any], Any]] = None,
        **__: Any,
    ) -> R:
        """Return the value or raise the exception, at once."""
        value: R = self._give({**self._meta(), "traceback": None}, propagate, callback)
        return value

    wait = get

    def forget(self) -> None:
        """Nothing is stored."""

    def revoke(self, *_: Any, **__: Any) -> None:
        """Too late: mark it REVOKED."""
        self._meta()["status"] = states.REVOKED


def read_meta(stored: StoredResult, accept: Any) -> Dict[str, Any]:
    """Decode a stored meta; an exception in it stays the dict that it is stored as."""
    meta: Dict[str, Any] = loads(stored.body, stored.content_type, stored.content_encoding, accept)
    if not isinstance(meta, dict) or "status" not in meta:
        raise DecodeError(f"the stored result of task {stored.task_id} is no result meta: {meta!r:.200}")
    meta.setdefault("result", None)
    return meta


def _value(meta: Dict[str, Any]) -> Any:
    """Return what `meta` holds.

    An exception is made anew each time: one that was raised keeps the frames it went through, and
    with them whatever their locals hold.
    """
    value = meta["result"]
    if meta["status"] in states.EXCEPTION_STATES and isinstance(value, dict):
        return exception_from_dict(value)
    return value


def result_from_tuple(value: Any, app: Any = None) -> AsyncResult:
    """Build a result from `AsyncResult.as_tuple` (or a bare id)."""
    if isinstance(value, AsyncResult):
        return value
    head = value if isinstance(value, str) else value[0]
    if isinstance(head, str):
        return AsyncResult(head, app=app)
    task_id, parent = head
    return AsyncResult(task_id, app=app, parent=result_from_tuple(parent, app) if parent else None)

# SPDX-License-Identifier: MIT
"""What a caller holds: the ids of one task or of many, and the way to their states and values.

Making a result subscribes to nothing and keeps nothing alive; only waiting talks to the backend.
An unknown id is PENDING, as in Celery: the store cannot tell "not yet" from "never".

A result as data, as it travels in messages and is stored with a group::

    ((task id, parent's tuple or None), None)
    ((group id, parent's tuple or None), [member's tuple, ...])

Source: the results of Celery 5.7, whose names and tuples these are.
"""

from __future__ import annotations

from collections import deque
from operator import methodcaller
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Deque,
    Dict,
    Generic,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Tuple,
    Union,
)

from . import _state, states
from .backends.base import StoredResult
from .exceptions import DecodeError, IncompleteStream, TaskRevokedError
from .graph import DependencyGraph
from .resultbase import (
    UNKNOWN,
    Leaf,
    Meta,
    Parents,
    RemoteTraceback,
    ResultBase,
    arrivals,
    assert_may_wait,
    enabled_backend,
    read_meta,
    refuse_ignored,
    value_of,
)
from .resultset import ResultSet
from .serialization import dumps, loads, serializer
from .times import parse_iso8601

if TYPE_CHECKING:
    from datetime import datetime

    from typing_extensions import TypeVar

    R = TypeVar("R", default=Any)
else:
    from typing import TypeVar

    R = TypeVar("R")

allow_join_result = _state.allow_join_result


class AsyncResult(ResultBase, Generic[R]):
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
        parent: Optional[ResultBase] = None,
        ignored: bool = False,
    ) -> None:
        if not id:
            raise ValueError(f"a result needs the id of a task, not {id!r}")
        self.id: str = id
        self.task_name = task_name
        self.parent = parent
        self.ignored = ignored
        if app is not None:
            self._app = app
        self._backend = backend
        self._final: Optional[Meta] = None
        self._then = []

    # -- identity

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

    def _leaves(self) -> Iterator[Leaf]:
        yield self

    @property
    def supports_native_join(self) -> bool:
        """True: many are waited for at once."""
        return True

    # -- state

    def _meta(self) -> Meta:
        if self._final is not None:
            return self._final
        stored = self.backend.fetch([self.id]).get(self.id)
        return self._read(stored) if stored is not None else UNKNOWN

    def _read(self, stored: StoredResult) -> Meta:
        meta = read_meta(stored, self.app.result_accept)
        if meta["status"] in states.READY_STATES:
            self._final = meta
            self._tell_all()
        return meta

    @property
    def state(self) -> str:
        """PENDING, STARTED, SUCCESS, ... (see `miniq.states`)."""
        return str(self._meta()["status"])

    status = state

    @property
    def result(self) -> Any:
        """The return value, or the exception (not raised), or the meta of a custom state."""
        return value_of(self._meta())

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
    def children(self) -> "List[AnyResult]":
        """The results of what this task sent: of tasks, and of groups with theirs."""
        return [result_from_tuple(child, self.app) for child in self._meta().get("children") or ()]

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

        With `follow_parents`, the error of a failed parent is raised where this task did not end: it
        never will.  A chord's header is no such parent: the body fails with `ChordError`, which is raised.

        Raises `miniq.exceptions.TimeoutError`; the task's own exception, with the worker's traceback
        as its cause; `RuntimeError` inside a task; `ImproperlyConfigured` when the result is ignored
        or no backend is configured: it would never come.
        """
        if disable_sync_subtasks:
            assert_may_wait()
        refuse_ignored((self,))
        if self._final is None:
            parents = Parents(self) if follow_parents and propagate and self.parent is not None else None
            for _ in arrivals((self,), timeout, interval, on_message, on_interval, parents):
                pass  # itself
        value: R = self._give(self._meta(), propagate, callback)
        return value

    wait = get

    def maybe_throw(
        self, propagate: bool = True, callback: Optional[Callable[[str, Any], Any]] = None
    ) -> Any:
        """Raise the task's exception if it failed; else return what there is."""
        return self._give(self._meta(), propagate, callback)

    maybe_reraise = maybe_throw

    def _give(self, meta: Meta, propagate: bool, callback: Optional[Callable[[str, Any], Any]] = None) -> Any:
        value = value_of(meta)
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

    def _outcome(self, propagate: bool) -> Any:
        return self._give(self._meta(), propagate)

    def _drop(self) -> None:
        self._final = None

    # -- relatives

    def iterdeps(self, intermediate: bool = False) -> "Iterator[Tuple[Optional[AnyResult], AnyResult]]":
        """Yield (parent, result) for this one and all that descend from it, nearest first.

        Raises `IncompleteStream` at one that has not ended, unless `intermediate`.
        """
        left: "Deque[Tuple[Optional[AnyResult], AnyResult]]" = deque([(None, self)])
        seen = set()
        while left:
            parent, node = left.popleft()
            yield parent, node
            key = node.id or id(node)
            if key in seen:
                continue
            seen.add(key)
            if node.ready():
                left.extend((node, child) for child in node.children)
            elif not intermediate:
                raise IncompleteStream(f"task {node.id} has not ended, its children are not known yet")

    def collect(self, intermediate: bool = False, **options: Any) -> "Iterator[Tuple[AnyResult, Any]]":
        """Wait for this one and all that descend from it; yield (result, value).

        `options` are those of `get`.
        """
        for _, node in self.iterdeps(intermediate):
            yield node, node.get(**options)

    def get_leaf(self) -> Any:
        """Wait for the last of the descendants; return its value."""
        return deque(self.collect(), maxlen=1).pop()[1]

    def build_graph(self, intermediate: bool = False) -> DependencyGraph:
        """Return this one and all that descend from it, with an edge from each to what it sent.

        Errors as `iterdeps`.
        """
        graph = DependencyGraph()
        for parent, node in self.iterdeps(intermediate):
            graph.add_arc(node)
            if parent is not None:
                graph.add_edge(parent, node)
        return graph

    @property
    def graph(self) -> DependencyGraph:
        """All that descends from it; see `build_graph`."""
        return self.build_graph()


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
        value: R = self._give(self._meta(), propagate, callback)
        return value

    wait = get

    def _give(self, meta: Meta, propagate: bool, callback: Optional[Callable[[str, Any], Any]] = None) -> Any:
        # The exception itself is here, with the traceback it was raised with.
        return super()._give({**meta, "traceback": None}, propagate, callback)

    def forget(self) -> None:
        """Nothing is stored."""

    def _drop(self) -> None:
        """Keep it: it is nowhere else."""

    def revoke(self, *_: Any, **__: Any) -> None:
        """Too late: mark it REVOKED."""
        self._meta()["status"] = states.REVOKED


class GroupResult(ResultSet):
    """The results of a group: a `ResultSet` with the group's id, which can be saved and restored by it."""

    def __init__(
        self,
        id: Optional[str] = None,  # noqa: A002 - Celery's public name
        results: Iterable[Any] = (),
        parent: Optional[ResultBase] = None,
        app: Any = None,
    ) -> None:
        super().__init__(results, app)
        self.id = id
        self.parent = parent

    def __bool__(self) -> bool:
        return bool(self.id or self.results)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, GroupResult):
            return (other.id, other.results, other.parent) == (self.id, self.results, self.parent)
        if isinstance(other, str):
            return other == self.id
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __str__(self) -> str:
        return str(self.id)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.id} [{', '.join(str(one.id) for one in self.results)}]>"

    def __reduce__(self) -> Tuple[Any, ...]:
        return methodcaller("GroupResult", self.id, self.results, parent=self.parent), (self.app,)

    # -- keeping

    def save(self, backend: Any = None) -> None:
        """Write down which tasks belong to it, in `backend` (default: the app's), for `restore`.

        Kept for `result_expires`.  Raises `BackendError`, and `ImproperlyConfigured` where the store
        keeps no groups.
        """
        if not self.id:
            raise ValueError(f"{self!r} has no id under which it could be saved")
        _, _, body = dumps({"result": self.as_tuple()}, self.app.conf.result_serializer)
        enabled_backend(self.app, backend).save_group(self.id, body, self.app.conf.result_expires)

    def delete(self, backend: Any = None) -> None:
        """Delete what `save` wrote; the results themselves stay."""
        if self.id:
            enabled_backend(self.app, backend).delete_group(self.id)

    @classmethod
    def restore(cls, id: str, backend: Any = None, app: Any = None) -> "Optional[GroupResult]":  # noqa: A002
        """Return the group that was saved under `id`, None if there is none.

        Raises `BackendError`, `ImproperlyConfigured` where the store keeps no groups, and `DecodeError`
        for what is none.
        """
        app = app or cls._app or _state.current_app()
        body = enabled_backend(app, backend).load_group(id)
        if body is None:
            return None
        by = serializer(app.conf.result_serializer)
        meta = loads(body, by.content_type, by.content_encoding, app.result_accept)
        try:
            found = result_from_tuple(meta["result"], app)
        except (TypeError, KeyError, ValueError) as error:
            raise DecodeError(f"what is saved under the group id {id!r} cannot be read: {error!r}") from error
        if not isinstance(found, GroupResult):
            raise DecodeError(f"what is saved under the group id {id!r} is no group: {meta!r:.200}")
        return found


AnyResult = Union[AsyncResult[Any], GroupResult]


def result_from_tuple(value: Any, app: Any = None, ended: Optional[Mapping[str, Meta]] = None) -> AnyResult:
    """Build a result, its members and its parents from `as_tuple` (or from a bare id).

    `ended` has the metas of tasks that ran here: their results are eager ones.  `ValueError` for what is
    no such tuple.
    """
    above: "List[Tuple[Any, Any]]" = []
    node = value
    while node is not None and not isinstance(node, (AsyncResult, GroupResult)):
        try:
            head, members = (node, None) if isinstance(node, str) else node
            found_id, node = (head, None) if isinstance(head, str) else head
        except (TypeError, ValueError):
            raise ValueError(f"no result as a tuple: {node!r:.200}") from None
        above.append((found_id, members))
    for found_id, members in reversed(above):
        if members is None and found_id and isinstance(found_id, str):
            meta = ended.get(found_id) if ended is not None else None
            if meta is None:
                node = AsyncResult(found_id, app=app, parent=node)
            else:
                node = _eager(found_id, meta, node, app)
        elif isinstance(members, (list, tuple)) and isinstance(found_id, (str, type(None))):
            node = GroupResult(found_id, [result_from_tuple(one, app, ended) for one in members], node, app)
        else:
            raise ValueError(f"no result as a tuple: {(found_id, members)!r:.200}")
    if node is None:
        raise ValueError("no result as a tuple: None")
    found: AnyResult = node
    return found


def _eager(task_id: str, meta: Meta, parent: Any, app: Any) -> EagerResult[Any]:
    found: EagerResult[Any] = EagerResult(task_id, None, meta["status"], name=meta["name"], app=app)
    # One meta however many hold it: what it lists as children may not be known yet.
    found._final, found.parent = meta, parent
    return found

# SPDX-License-Identifier: MIT
"""What results of one task and of many have in common: asking the store, waiting, and their parents.

Whatever the number of tasks, a store is asked once for all of them, and waited on once: results
that are known to be final are not asked for again.  Where a task stands at the end of a chain or is
the body of a chord, its *parents* are looked at now and then while it is waited for, since it will never
run if one of them failed and nobody was left to say so.
"""

from __future__ import annotations

import sys
import time
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Protocol,
    Sequence,
    Tuple,
)

from . import _state, states
from .backends.base import Backend, StoredResult
from .exceptions import BackendError, DecodeError, ImproperlyConfigured, TimeoutError
from .progress import Meter, state_of
from .serialization import exception_from_dict, loads

Meta = Dict[str, Any]

#: What an id looks like that nothing is stored for.
UNKNOWN: Meta = {"status": states.PENDING, "result": None, "traceback": None, "children": None}
#: Who waits looks at the parents at once, after so long, and then less and less often.
FIRST_LOOK_S = 1.0
MAX_LOOK_S = 30.0
#: A progress line is drawn at most so often.
MIN_REDRAW_S = 0.05


class RemoteTraceback(Exception):
    """The traceback of the worker, as text; the `__cause__` of what `get` raises."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(text)

    def __str__(self) -> str:
        return "\n" + self.text


class Leaf(Protocol):
    """The result of one task, as much of it as is needed here."""

    id: str
    ignored: bool
    _backend: Any
    _final: Optional[Meta]

    @property
    def app(self) -> Any: ...

    @property
    def backend(self) -> Backend: ...

    def _read(self, stored: StoredResult) -> Meta: ...

    def _drop(self) -> None: ...

    def maybe_throw(self) -> Any:
        """Raise its exception if it failed."""


def assert_may_wait() -> None:
    """Raise `RuntimeError` inside a task of a worker, where waiting may deadlock."""
    if not _state.join_allowed():
        raise RuntimeError(
            "Never call result.get() within a task!  It holds a slot of the worker while it waits for"
            " another one.  Use link= or a chain; or, where the other task runs in other workers,"
            " `with miniq.result.allow_join_result():` or get(disable_sync_subtasks=False)."
        )


def refuse_ignored(leaves: Iterable[Leaf]) -> None:
    """Raise `ImproperlyConfigured` where a result will never come."""
    for leaf in leaves:
        if leaf.ignored:
            raise ImproperlyConfigured(
                f"the result of task {leaf.id} is ignored (ignore_result), so it will never be there to get"
            )


def enabled_backend(app: Any, backend: Any) -> Backend:
    """Return the store that is set: a URL, a `Backend`, None = the app's.

    Raises `NotImplementedError`, as in Celery, where no result is kept at all.
    """
    found: Backend = app.backend_for(backend)
    if not found.enabled:
        raise NotImplementedError("No result backend is configured: set result_backend")
    return found


class ResultBase:
    """What `AsyncResult`, `ResultSet` and `GroupResult` have in common."""

    id: Optional[str] = None
    parent: "Optional[ResultBase]" = None
    #: A class made for one app has it here.
    _app: Any = None
    _backend: Any = None
    _is_set = False
    _then: List[Tuple[Callable[[Any], Any], Optional[Callable[[Any], Any]]]]

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
        return enabled_backend(self.app, self._backend)

    if not TYPE_CHECKING:  # a checker knows what there is

        def __getattr__(self, name: str) -> Any:
            raise _state.missing(type(self).__name__, name)

    # -- what the two kinds do differently

    def _leaves(self) -> Iterator[Leaf]:
        """Yield the tasks in it."""
        raise NotImplementedError

    def _members(self) -> "Sequence[ResultBase]":
        """Return the results in it; none of a task."""
        return ()

    def _outcome(self, propagate: bool) -> Any:
        """Return its value, or raise; all is known to be final."""
        raise NotImplementedError

    def ready(self) -> bool:
        """Say whether it ended."""
        raise NotImplementedError

    def successful(self) -> bool:
        """Say whether it ended in SUCCESS."""
        raise NotImplementedError

    # -- parents

    def _upwards(self) -> "Iterator[ResultBase]":
        node: Optional[ResultBase] = self
        while node is not None:
            yield node
            node = node.parent

    def _lineage(self) -> List[Leaf]:
        """Return the tasks in it and in its parents, the oldest first."""
        return [leaf for node in reversed(list(self._upwards())) for leaf in node._leaves()]

    def as_tuple(self) -> Any:
        """Return ``((id, parent's tuple or None), None or [member's tuple, ...])``, the form on the wire."""
        found: Any = None
        for node in reversed(list(self._upwards())):
            members = [one.as_tuple() for one in node._members()] if node._is_set else None
            found = (node.id, found), members
        return found

    def as_list(self) -> List[str]:
        """Return the ids of its tasks, then those of its parents."""
        return [leaf.id for node in self._upwards() for leaf in node._leaves()]

    # -- telling

    def then(self, callback: Callable[[Any], Any], on_error: Optional[Callable[[Any], Any]] = None) -> None:
        """Call `callback(self)` when it is known to have succeeded, `on_error(self)` when it failed.

        At once if it has ended; else in the thread that finds that out, by waiting or asking.
        """
        if self.ready():
            self._tell(callback, on_error)
        else:
            self._then.append((callback, on_error))

    def _tell(self, callback: Callable[[Any], Any], on_error: Optional[Callable[[Any], Any]]) -> None:
        found = callback if self.successful() else on_error
        if found is not None:
            found(self)

    def _tell_all(self) -> None:
        while self._then:
            self._tell(*self._then.pop(0))

    # -- influence

    def forget(self) -> None:
        """Delete what is stored of its tasks, and of its parents."""
        leaves = self._lineage()
        for leaf in leaves:
            leaf._drop()
        for backend, ids in _by_backend(leaves):
            backend.forget(list(ids))

    def revoke(
        self,
        connection: Any = None,
        terminate: bool = False,
        signal: Optional[str] = None,
        wait: bool = False,
        timeout: Optional[float] = None,
    ) -> None:
        """Tell all workers not to run its tasks; with `terminate`, stop them where they run.

        With `wait` it returns when workers have answered: after `timeout` seconds (default 1), as their
        number is not known.
        """
        ids = [leaf.id for leaf in self._leaves()]
        if ids:
            signal = signal or "SIGTERM"
            self.app.control.revoke(
                ids, terminate=terminate, signal=signal, connection=connection, reply=wait, timeout=timeout
            )

    def revoke_by_stamped_headers(
        self,
        headers: Mapping[str, Any],
        connection: Any = None,
        terminate: bool = False,
        signal: Optional[str] = None,
        wait: bool = False,
        timeout: Optional[float] = None,
    ) -> None:
        """Tell all workers not to run any task with one of these stamps: ``{name: value or values}``."""
        self.app.control.revoke_by_stamped_headers(
            headers,
            terminate=terminate,
            signal=signal or "SIGTERM",
            connection=connection,
            reply=wait,
            timeout=timeout,
        )

    # -- showing

    def watch(
        self, file: Optional[IO[str]] = None, interval: float = 0.5, timeout: Optional[float] = None
    ) -> str:
        """Show how far it is until it ended, on one line of `file` (standard error); return its state.

        Of a chain all steps count, of a chord the header too.  `interval` seconds are the pause
        between two looks; where `file` is no terminal, a line is written every ten seconds.  When
        `timeout` seconds are over it returns the state of that moment.

        Raises `RuntimeError` inside a task.
        """
        assert_may_wait()
        with Meter(sys.stderr if file is None else file) as meter:
            state = self._watch(meter, interval, timeout)
        self._known()
        return state

    def _watch(self, meter: Meter, interval: float, timeout: Optional[float]) -> str:
        leaves, own, parents = self._lineage(), list(self._leaves()), Parents(self)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            metas = ask(leaves)
            state = state_of(metas[len(metas) - len(own) :])
            mono = time.monotonic()
            left_s = interval if deadline is None else min(interval, deadline - mono)
            ended = all(leaf._final is not None for leaf in own)
            if not ended and parents.is_due(mono):
                culprit = parents.culprit(own)
                if culprit is not None and culprit._final is not None:
                    state, ended = culprit._final["status"], True
            ended = ended or (deadline is not None and mono >= deadline)
            meter.show(metas, state, last=ended)
            if ended:
                return state
            _pause(own, max(left_s, MIN_REDRAW_S))

    def _known(self) -> None:
        """Tell who asked for it, if all is known to be final."""
        if self._then and all(leaf._final is not None for leaf in self._leaves()):
            self._tell_all()


class Parents:
    """What a result and its members come after, looked at now and then while these are waited for."""

    def __init__(self, result: ResultBase) -> None:
        found: Dict[Optional[str], ResultBase] = {}
        inside = [result]
        for one in inside:  # grows as it goes
            inside += one._members()
            node = one.parent
            while node is not None and node.id not in found:
                found[node.id] = node
                node = node.parent
        self._nodes = list(reversed(list(found.values())))
        self._due_mono = 0.0
        self._pause_s = 0.0
        self._failed_headers: Dict[Optional[str], Leaf] = {}

    def due_s(self, mono: float) -> Optional[float]:
        """Return how many seconds from now the next look is due; None = never."""
        return max(0.0, self._due_mono - mono) if self._nodes else None

    def is_due(self, mono: float) -> bool:
        """Say whether it is time for a look."""
        return bool(self._nodes) and mono >= self._due_mono

    def culprit(self, own: Sequence[Leaf]) -> Optional[Leaf]:
        """Return a parent that failed, unless `own`, the tasks waited for, came to an end all the same.

        A chord's end is told by its body (`ChordError`), so that it does not depend on the moment:
        of its header a member is only returned where at two looks all had ended and the body had not.
        """
        alone = [leaf for node in self._nodes if not node._is_set for leaf in node._leaves()]
        headers = [node for node in self._nodes if node._is_set] if self._pause_s else []
        ask([*alone, *(leaf for node in headers for leaf in node._leaves())])
        found = next((leaf for leaf in alone if _failed(leaf)), None)
        for node in headers:
            leaves = list(node._leaves())
            failed = next((leaf for leaf in leaves if _failed(leaf)), None)
            if found is None and failed is not None and all(leaf._final is not None for leaf in leaves):
                found = self._failed_headers.get(node.id)
                self._failed_headers[node.id] = failed
        self._pause_s = min(self._pause_s * 2, MAX_LOOK_S) or FIRST_LOOK_S
        self._due_mono = time.monotonic() + self._pause_s
        if found is None:
            return None
        ask(own)
        return None if all(leaf._final is not None for leaf in own) else found


def _failed(leaf: Leaf) -> bool:
    return leaf._final is not None and leaf._final["status"] in states.PROPAGATE_STATES


def _by_backend(leaves: Iterable[Leaf]) -> "List[Tuple[Backend, Dict[str, List[Leaf]]]]":
    """Sort those that are not known to be final by store and id; the same id may be there twice."""
    found: Dict[Tuple[Any, Any], Dict[str, List[Leaf]]] = {}
    for leaf in leaves:
        if leaf._final is None:
            found.setdefault((leaf.app, leaf._backend), {}).setdefault(leaf.id, []).append(leaf)
    return [(next(iter(by_id.values()))[0].backend, by_id) for by_id in found.values()]


def ask(leaves: Sequence[Leaf]) -> List[Meta]:
    """Return what is known of each, after one question to each store for those not known to be final."""
    latest: Dict[str, Meta] = {}
    for backend, by_id in _by_backend(leaves):
        for task_id, stored in backend.fetch(list(by_id)).items():
            for leaf in by_id[task_id]:
                latest[task_id] = leaf._read(stored)
    return [latest.get(leaf.id, UNKNOWN) if leaf._final is None else leaf._final for leaf in leaves]


def _pause(leaves: Sequence[Leaf], timeout_s: float) -> None:
    """Let the time pass, or less if all have ended before."""
    for backend, by_id in _by_backend(leaves):
        start = time.monotonic()
        for stored in backend.wait(list(by_id), timeout_s):
            for leaf in by_id[stored.task_id]:
                leaf._read(stored)
        timeout_s = max(0.0, timeout_s - (time.monotonic() - start))


def arrivals(
    leaves: Sequence[Leaf],
    timeout: Optional[float],
    interval: float,
    on_message: Optional[Callable[[Meta], Any]] = None,
    on_interval: Optional[Callable[[], Any]] = None,
    parents: Optional[Parents] = None,
) -> Iterator[Leaf]:
    """Yield each of `leaves` as it is known to be final.

    Raises `miniq.exceptions.TimeoutError`, and what a parent failed with.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    waited_for = _by_backend(leaves)
    # Another thread may hold the same results, and learn more meanwhile: each is yielded once all the same.
    pending = {id(leaf) for _, by_id in waited_for for same in by_id.values() for leaf in same}
    yield from [leaf for leaf in leaves if id(leaf) not in pending]
    for backend, by_id in waited_for:
        while by_id:
            mono = time.monotonic()
            if parents is not None and parents.is_due(mono):
                culprit = parents.culprit([leaf for same in by_id.values() for leaf in same])
                if culprit is not None:
                    culprit.maybe_throw()
            left_s = None if deadline is None else max(0.0, deadline - mono)
            limits = (
                left_s,
                None if on_interval is None else interval,
                None if parents is None else parents.due_s(mono),
            )
            step_s = min((limit for limit in limits if limit is not None), default=None)
            for stored in backend.wait(list(by_id), step_s, interval, on_message is not None):
                same = by_id[stored.task_id]
                metas = [leaf._read(stored) for leaf in same]
                if on_message is not None:
                    on_message(metas[0])
                if metas[0]["status"] in states.READY_STATES:
                    del by_id[stored.task_id]
                    yield from same
            if by_id and deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(_overdue(leaves, timeout))
            if by_id and on_interval is not None:
                on_interval()


def _overdue(leaves: Sequence[Leaf], timeout: Optional[float]) -> str:
    late = [leaf for leaf in leaves if leaf._final is None]
    try:
        state = f"its state is {ask(late[:1])[0]['status']}"
        state += " (PENDING is also what an unknown or expired id looks like)"
    except BackendError as error:
        state = f"its state cannot be read: {error}"
    if len(leaves) == 1:
        return f"task {late[0].id} did not end within {timeout} s; {state}"
    return (
        f"{len(late)} of {len(leaves)} tasks did not end within {timeout} s; task {late[0].id} is one of"
        f" them, {state}"
    )


def read_meta(stored: StoredResult, accept: Any) -> Meta:
    """Decode a stored meta; an exception in it stays the dict that it is stored as."""
    meta: Meta = loads(stored.body, stored.content_type, stored.content_encoding, accept)
    if not isinstance(meta, dict) or "status" not in meta:
        raise DecodeError(f"the stored result of task {stored.task_id} is no result meta: {meta!r:.200}")
    meta.setdefault("result", None)
    return meta


def value_of(meta: Meta) -> Any:
    """Return what `meta` holds.

    An exception is made anew each time: one that was raised keeps the frames it went through, and
    with them whatever their locals hold.
    """
    value = meta["result"]
    if meta["status"] in states.EXCEPTION_STATES and isinstance(value, dict):
        return exception_from_dict(value)
    return value

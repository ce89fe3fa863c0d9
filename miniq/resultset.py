# SPDX-License-Identifier: MIT
"""Results of several tasks, to be asked and waited for together.

Whatever their number: one question to the store, and one wait.  `miniq.result` has this class too, and
the results of single tasks and of groups, which are the members.

Source: the result sets of Celery 5.7.
"""

from __future__ import annotations

from operator import methodcaller
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

from . import states
from .resultbase import (
    UNKNOWN,
    Leaf,
    Parents,
    ResultBase,
    arrivals,
    ask,
    assert_may_wait,
    refuse_ignored,
    value_of,
)


class ResultSet(ResultBase):
    """Some results, in an order, to be asked and waited for together; the same one is in it once.

    A member may be a `GroupResult`; its value is the list of its members' values.  May be used from any
    thread, as long as one at a time adds or removes members.
    """

    _is_set = True

    def __init__(self, results: Iterable[Any], app: Any = None) -> None:
        #: Its members.
        self.results: List[Any] = list(results)
        if app is None and self._app is None and self.results:
            app = self.results[0]._app
        if app is not None:
            self._app = app
        self._then = []

    # -- members

    def add(self, result: Any) -> None:
        """Append a result, unless it is a member."""
        self.update((result,))

    def update(self, results: Iterable[Any]) -> None:
        """Append those that are not members yet."""
        known = {result.id for result in self.results}
        for result in results:
            if result.id not in known:
                known.add(result.id)
                self.results.append(result)

    def remove(self, result: Any) -> None:
        """Take a member out, by itself or by its id; `KeyError` if it is none."""
        try:
            self.results.remove(result)  # a result equals its id
        except ValueError:
            raise KeyError(str(result)) from None

    def discard(self, result: Any) -> None:
        """Take a result out if it is a member."""
        if result in self.results:
            self.remove(result)

    def clear(self) -> None:
        """Take all members out."""
        self.results.clear()

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.results)

    def __getitem__(self, index: int) -> Any:
        return self.results[index]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ResultSet):
            return other.results == self.results
        return NotImplemented

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: [{', '.join(str(result.id) for result in self.results)}]>"

    def __reduce__(self) -> Tuple[Any, ...]:
        # Through the app, as an AsyncResult.
        return methodcaller("ResultSet", self.results), (self.app,)

    @property
    def supports_native_join(self) -> bool:
        """True: all are waited for at once."""
        return True

    @property
    def children(self) -> List[Any]:
        """Its members."""
        return self.results

    def _leaves(self) -> Iterator[Leaf]:
        for result in self.results:
            yield from result._leaves()

    def _members(self) -> List[Any]:
        return self.results

    # -- state: each of these asks the store once, for those that are not known to be final

    def _states(self) -> List[str]:
        found = [meta["status"] for meta in ask(list(self._leaves()))]
        self._known()
        return found

    def ready(self) -> bool:
        """Say whether all have ended."""
        return all(state in states.READY_STATES for state in self._states())

    def waiting(self) -> bool:
        """Say whether some have not ended."""
        return not self.ready()

    def successful(self) -> bool:
        """Say whether all ended in SUCCESS."""
        return all(state == states.SUCCESS for state in self._states())

    def failed(self) -> bool:
        """Say whether some ended in FAILURE."""
        return states.FAILURE in self._states()

    def completed_count(self) -> int:
        """Return how many members ended in SUCCESS."""
        self._states()
        return sum(
            all(leaf._final is not None and leaf._final["status"] == states.SUCCESS for leaf in one._leaves())
            for one in self.results
        )

    def maybe_throw(
        self, callback: Optional[Callable[[str, Any], Any]] = None, propagate: bool = True
    ) -> None:
        """Raise the exception of the first one that failed; else give what there is to `callback`."""
        self._states()
        for result in self.results:
            result.maybe_throw(callback=callback, propagate=propagate)

    maybe_reraise = maybe_throw

    # -- waiting

    def join(
        self,
        timeout: Optional[float] = None,
        propagate: bool = True,
        interval: float = 0.5,
        callback: Optional[Callable[[Any, Any], Any]] = None,
        no_ack: bool = True,
        on_message: Optional[Callable[[Dict[str, Any]], Any]] = None,
        disable_sync_subtasks: bool = True,
        on_interval: Optional[Callable[[], Any]] = None,
    ) -> List[Any]:
        """Wait until all have ended; return their values, in the order of the members.

        The exception of one that failed is raised as soon as that is known, unless `propagate` is
        False: then it stands among the values.  With a `callback` each ``(id, value)`` is handed over
        as it comes, in any order, and the list is empty.  The rest is as in `AsyncResult.get`.
        """
        if disable_sync_subtasks:
            assert_may_wait()
        refuse_ignored(self._leaves())
        members = list(self.results)
        values: List[Any] = [None] * len(members)
        places: Dict[int, List[int]] = {}
        missing = [0] * len(members)
        leaves: Dict[int, Leaf] = {}
        for place, member in enumerate(members):
            for leaf in member._leaves():
                leaves[id(leaf)] = leaf
                places.setdefault(id(leaf), []).append(place)
                missing[place] += 1

        def ended(place: int) -> None:
            value = members[place]._outcome(propagate)
            if callback is None:
                values[place] = value
            else:
                callback(members[place].id, value)

        for place, count in enumerate(missing):
            if not count:  # a group without members
                ended(place)
        parents = Parents(self) if propagate else None
        waited_for = list(leaves.values())
        for leaf in arrivals(waited_for, timeout, interval, on_message, on_interval, parents):
            if propagate:
                leaf.maybe_throw()
            for place in places[id(leaf)]:
                missing[place] -= 1
                if not missing[place]:
                    ended(place)
        self._known()
        return values if callback is None else []

    get = join_native = join

    def iter_native(
        self,
        timeout: Optional[float] = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_message: Optional[Callable[[Dict[str, Any]], Any]] = None,
        on_interval: Optional[Callable[[], Any]] = None,
    ) -> Iterator[Tuple[str, Dict[str, Any]]]:
        """Return an iterator over the (id, meta) of each task, as they end.

        A failure is not raised: `result` of the meta is the exception.  Errors as `join`.
        """
        assert_may_wait()
        leaves = list(self._leaves())
        refuse_ignored(leaves)
        return self._iter_metas(arrivals(leaves, timeout, interval, on_message, on_interval))

    def _iter_metas(self, found: Iterator[Leaf]) -> Iterator[Tuple[str, Dict[str, Any]]]:
        for leaf in found:
            meta = leaf._final or UNKNOWN
            yield leaf.id, {**meta, "result": value_of(meta)}
        self._known()

    def _outcome(self, propagate: bool) -> List[Any]:
        return [result._outcome(propagate) for result in self.results]

# SPDX-License-Identifier: MIT
"""What every result store must do.  A new store is one subclass of `BackendSuite` with one method."""

from __future__ import annotations

import itertools
import json
import threading
import time
from typing import Any, Callable, Iterator, List, Optional

import pytest
from transport_suite import Clock
from waiting import wait_until

from miniq import states
from miniq.backends.base import Backend, StoredResult, backend_class
from miniq.exceptions import ImproperlyConfigured


def result(
    task_id: str, state: str = "SUCCESS", value: Any = None, expires_s: Optional[float] = None
) -> StoredResult:
    """Return a result whose body is a meta: some stores keep nothing else of it."""
    meta = {"status": state, "result": value, "task_id": task_id}
    return StoredResult(
        task_id, state, json.dumps(meta).encode(), "application/json", "utf-8", expires_s
    )


class BackendSuite:
    """The suite; `url` names an empty store."""

    #: Whether the body may be any bytes; if not, it must be a meta, which is all that is kept.
    keeps_any_bytes = True
    #: Whether it knows how long a result is kept; `slack_s` is what may be missing from that.
    knows_what_is_left = True
    slack_s = 0.0
    #: Whether `expire` has anything to do.
    needs_expire = True
    #: Results in these tests are kept so long: short where only time itself makes time pass.
    kept_s = 10.0

    def pass_time(self, clock: Clock, seconds: float) -> None:
        """Let the store believe that so much time has passed."""
        clock.now += seconds

    def same(self, found: StoredResult, stored: StoredResult) -> bool:
        """Compare, but for how long it is kept."""
        return found._replace(expires_s=None) == stored._replace(expires_s=None)

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def open_backend(self, url: str, clock: Clock) -> Iterator[Callable[[], Backend]]:
        opened: List[Backend] = []

        def new() -> Backend:
            backend = backend_class(url)(url, {}, clock)
            opened.append(backend)
            return backend

        yield new
        for backend in opened:
            backend.close()

    @pytest.fixture
    def backend(self, open_backend: Callable[[], Backend]) -> Backend:
        return open_backend()

    def in_thread(
        self, open_backend: Callable[[], Backend], *batches: List[StoredResult]
    ) -> threading.Thread:
        """Store batches from another thread, each some milliseconds after the other."""

        def run() -> None:
            backend = open_backend()
            for batch in batches:
                time.sleep(0.01)
                backend.store(batch)
            backend.close()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def test_result_comes_back_as_it_was_stored(self, backend: Backend) -> None:
        first, second = result("a", "SUCCESS", {"ü": [1, None]}, 60.0), result("b", "PROGRESS")
        backend.store([first, second])
        found = backend.fetch(["a", "b", "unknown"])
        assert sorted(found) == ["a", "b"]
        assert self.same(found["a"], first) and self.same(found["b"], second)
        assert found["b"].expires_s is None
        assert backend.fetch([]) == {}
        backend.store([])

    def test_body_may_be_any_bytes(self, backend: Backend) -> None:
        if not self.keeps_any_bytes:
            pytest.skip("this store keeps nothing but the meta")
        first = StoredResult("a", "SUCCESS", b"\x00\xff", "application/x-own", "binary", 60.0)
        second = StoredResult("b", "PROGRESS", b"", "", "", None)
        backend.store([first, second])
        assert backend.fetch(["a", "b", "unknown"]) == {"a": first, "b": second}

    @pytest.mark.parametrize(
        ("old", "new"),
        list(itertools.product([*sorted(states.ALL_STATES - {"PENDING"}), "PROGRESS"], repeat=2)),
    )
    def test_state_is_replaced_only_where_it_may_be(self, backend: Backend, old: str, new: str) -> None:
        first, second = result("a", old, "old"), result("a", new, "new")
        backend.store([first])
        backend.store([second])
        assert self.same(backend.fetch(["a"])["a"], second if states.may_replace(new, old) else first)

    def test_state_is_replaced_only_where_it_may_be_within_one_call(self, backend: Backend) -> None:
        backend.store([result("a", "STARTED"), result("a", "SUCCESS", 1), result("a", "FAILURE", 2)])
        assert self.same(backend.fetch(["a"])["a"], result("a", "SUCCESS", 1))

    def test_many_results_are_fetched_at_once(self, backend: Backend) -> None:
        names = [f"task {n}" for n in range(2500)]
        backend.store([result(name) for name in names])
        assert list(backend.fetch(names)) != []
        assert set(backend.fetch(names)) == set(names)
        assert len(list(backend.wait(names, 0))) == 2500

    def test_forgotten_result_is_unknown(self, backend: Backend) -> None:
        backend.store([result("a"), result("b")])
        backend.forget(["a", "unknown"])
        assert list(backend.fetch(["a", "b"])) == ["b"]

    def test_expired_result_is_unknown_and_removed(self, backend: Backend, clock: Clock) -> None:
        kept_s = self.kept_s
        backend.store([result(str(n), expires_s=kept_s) for n in range(2100)] + [result("kept")])
        assert backend.expire() == 0
        self.pass_time(clock, kept_s)
        assert set(backend.fetch(["1", "kept"])) == {"kept"}
        backend.store([result("1", "STARTED", "again", 100.0)])
        assert backend.fetch(["1"])["1"].state == "STARTED"
        assert backend.expire() == (2099 if self.needs_expire else 0)
        assert backend.expire() == 0
        assert set(backend.fetch(["0", "1", "kept"])) == {"1", "kept"}

    def test_what_is_left_of_its_time_is_told(self, backend: Backend, clock: Clock) -> None:
        if not self.knows_what_is_left:
            pytest.skip("this store does not know how long it keeps a result")
        backend.store([result("a", expires_s=10.0), result("b")])
        self.pass_time(clock, 4)
        found = backend.fetch(["a", "b"])
        left_s = found["a"].expires_s
        assert left_s is not None and 6.0 - self.slack_s <= left_s <= 6.0
        assert found["b"].expires_s is None

    # -- groups

    def test_group_comes_back_as_it_was_saved(self, backend: Backend) -> None:
        self.need_groups(backend)
        assert backend.load_group("g") is None
        first, second = b'{"result": [["g", null], []]}', b'{"result": [["g", null], [[["a", null], null]]]}'
        for body in (first, second, second):
            backend.save_group("g", body, 60.0)
            assert backend.load_group("g") == body
        backend.save_group("other", first, None)
        backend.delete_group("g")
        backend.delete_group("unknown")
        assert backend.load_group("g") is None
        assert backend.load_group("other") == first
        # It is no result, nor the other way round.
        assert backend.fetch(["other"]) == {}

    def test_expired_group_is_unknown(self, backend: Backend, clock: Clock) -> None:
        self.need_groups(backend)
        backend.save_group("g", b"{}", self.kept_s)
        backend.save_group("kept", b"{}", None)
        assert backend.expire() == 0
        self.pass_time(clock, self.kept_s)
        wait_until(lambda: backend.load_group("g") is None)
        assert backend.expire() == (1 if self.needs_expire else 0)
        assert backend.load_group("kept") == b"{}"

    def need_groups(self, backend: Backend) -> None:
        """Skip the test where no groups are kept, and see that they are refused."""
        if backend.keeps_no_groups:
            for refused in (
                lambda: backend.save_group("g", b"{}", None),
                lambda: backend.load_group("g"),
                lambda: backend.delete_group("g"),
            ):
                with pytest.raises(ImproperlyConfigured, match="group 'g'.*result_backend"):
                    refused()
            pytest.skip(f"groups are refused: {backend.keeps_no_groups}")

    # -- waiting

    def test_wait_looks_once_with_timeout_zero(self, backend: Backend) -> None:
        backend.store([result("a"), result("b", "STARTED")])
        assert [found.task_id for found in backend.wait(["a", "b", "c"], 0)] == ["a"]

    def test_wait_ends_at_its_timeout(self, backend: Backend) -> None:
        before = time.monotonic()
        assert list(backend.wait(["a"], 0.05)) == []
        assert time.monotonic() - before >= 0.05

    def test_wait_yields_in_the_order_of_the_ends(self, backend: Backend, open_backend: Any) -> None:
        waiting = backend.wait(["a", "b", "c"], 20.0)
        for ended in ([result("b")], [result("x"), result("c", "FAILURE")], [result("a")]):
            # One after the other: a store that is looked at may be seen with all of them.
            thread = self.in_thread(open_backend, ended)
            assert next(waiting).task_id == ended[-1].task_id
            thread.join()
        assert list(waiting) == []

    def test_wait_yields_changes_on_request(self, backend: Backend, open_backend: Any) -> None:
        backend.store([result("a", "STARTED")])
        waiting = backend.wait(["a"], 20.0, unready=True)
        assert next(waiting).state == "STARTED"
        for state in ("PROGRESS", "SUCCESS"):
            thread = self.in_thread(open_backend, [result("a", state)])
            assert next(waiting).state == state
            thread.join()
        assert list(waiting) == []

    def test_wait_that_is_left_leaves_nothing_behind(self, backend: Backend, open_backend: Any) -> None:
        backend.store([result("a")])
        waiting = backend.wait(["a", "b"], None)
        assert next(waiting).task_id == "a"
        del waiting
        thread = self.in_thread(open_backend, [result("b")])
        thread.join()
        assert set(backend.fetch(["b"])) == {"b"}

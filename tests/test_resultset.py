# SPDX-License-Identifier: MIT
"""Results of several tasks: one question, one wait, order, groups that are kept, and how far they are."""

from __future__ import annotations

import gc
import io
import os
import random
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence

import pytest
from bench import Bench, new_broker
from servers import RedisServer
from storing import ERROR, STORES, encoded, make_app, store
from waiting import wait_until

from miniq import AsyncResult, EagerResult, MiniQ, states
from miniq.backends.base import StoredResult
from miniq.backends.memory import MemoryBackend
from miniq.exceptions import DecodeError, ImproperlyConfigured, TaskRevokedError, TimeoutError
from miniq.progress import LINE_EVERY_S, Meter, state_of
from miniq.result import GroupResult, ResultSet, allow_join_result

MANY = 2000


@pytest.fixture(params=STORES)
def app(request: Any) -> Iterator[MiniQ]:
    made = make_app(request)
    yield made
    made.close()


@pytest.fixture
def memory_app() -> Iterator[MiniQ]:
    made = MiniQ("tests", broker=new_broker())
    yield made
    made.close()


def results(app: MiniQ, ids: Iterable[str]) -> List[AsyncResult]:
    return [app.AsyncResult(one) for one in ids]


def group(app: MiniQ, ids: Iterable[str], group_id: str = "group") -> GroupResult:
    return GroupResult(group_id, results(app, ids), app=app)


class CountingBackend(MemoryBackend):
    """Notes how many ids each question and each wait was about."""

    def __init__(self, url: str) -> None:
        super().__init__(url, {}, time.time)
        self.fetches: List[int] = []
        self.waits: List[int] = []

    def fetch(self, task_ids: Sequence[str]) -> Dict[str, StoredResult]:
        if sys._getframe(1).f_code.co_name != "wait":
            self.fetches.append(len(task_ids))
        return super().fetch(task_ids)

    def wait(
        self,
        task_ids: Sequence[str],
        timeout_s: Optional[float],
        interval_s: Optional[float] = None,
        unready: bool = False,
    ) -> Iterator[StoredResult]:
        self.waits.append(len(task_ids))
        return super().wait(task_ids, timeout_s, interval_s, unready)


# -- joining ---------------------------------------------------------------------------------------


def test_values_come_in_the_order_of_the_members(app: MiniQ) -> None:
    ids = [f"task {number}" for number in range(5)]
    for one in reversed(ids):
        store(app, one, states.SUCCESS, one)
    found = ResultSet(results(app, ids))
    assert found.get(timeout=1) == found.join(timeout=1) == found.join_native(timeout=1) == ids
    assert [(one, meta["result"]) for one, meta in found.iter_native(timeout=1)] == [
        (one, one) for one in ids
    ]
    assert ResultSet([], app=app).get() == [] and GroupResult("none", app=app).get(timeout=0) == []


@pytest.mark.parametrize("seed", [random.randrange(10**6)])
def test_many_results_in_any_order_join_in_order(app: MiniQ, seed: int) -> None:
    rng = random.Random(seed)
    ids = [f"{seed}-{number}" for number in range(MANY)]
    order = rng.sample(ids, MANY)
    begun = threading.Event()

    def work() -> None:
        begun.wait(30)
        left = list(order)
        while left:
            batch = [left.pop() for _ in range(min(len(left), rng.randint(1, 400)))]
            app.backend.store([encoded(app, one, states.SUCCESS, one) for one in batch])
        app.close()

    thread = threading.Thread(target=work)
    thread.start()
    found = ResultSet(results(app, ids))
    try:
        with pytest.raises(TimeoutError, match=f"{MANY} of {MANY} tasks"):
            found.join(timeout=0)
        assert found.completed_count() == 0
        begun.set()
        assert found.join(timeout=60) == ids, f"seed {seed}"
    finally:
        begun.set()
        thread.join()
    assert found.completed_count() == MANY


def test_all_are_asked_for_and_waited_for_at_once(memory_app: MiniQ) -> None:
    app = memory_app
    backend = CountingBackend(app.backend_url())
    ids = [str(number) for number in range(100)]
    found = ResultSet([AsyncResult(one, backend, app=app) for one in ids])
    for one in ids[:30]:
        store(app, one)
    assert (found.completed_count(), found.ready(), found.successful(), found.failed()) == (
        30,
        False,
        False,
        False,
    )
    assert backend.fetches == [100, 70, 70, 70]
    for one in ids[30:]:
        store(app, one)
    assert found.get(timeout=1) == [None] * 100
    assert backend.waits == [70]
    assert found.successful() and found.completed_count() == 100
    assert len(backend.fetches) == 4


def test_a_failure_is_raised_as_soon_as_it_is_known(app: MiniQ) -> None:
    store(app, "b", states.FAILURE, ERROR)
    found = group(app, "abc")
    with pytest.raises(ValueError, match="no"):
        found.get()
    with pytest.raises(TimeoutError, match="2 of 3 tasks did not end within 0.01 s; task a is one"):
        found.get(timeout=0.01, propagate=False)
    store(app, "a", states.SUCCESS, 1)
    app.control.revoke("c")
    first, second, third = found.get(timeout=1, propagate=False)
    assert (first, repr(second), type(third)) == (1, "ValueError('no')", TaskRevokedError)
    with pytest.raises(ValueError, match="no"):
        found.maybe_throw()
    assert found.maybe_throw(propagate=False) is None
    assert dict(found.iter_native())["b"]["result"].args == ("no",)


def test_callbacks_and_messages(app: MiniQ) -> None:
    store(app, "a", "PROGRESS", {"current": 1, "total": 2})
    store(app, "b", states.SUCCESS, 2)
    found, seen, heard, beats = group(app, "ab"), [], [], []

    def beat() -> None:
        beats.append(1)
        store(app, "a", states.SUCCESS, 1)

    got = found.join(
        timeout=10,
        interval=0.01,
        callback=lambda *both: seen.append(both),
        on_message=lambda meta: heard.append((meta["task_id"], meta["status"])),
        on_interval=beat,
    )
    assert (got, sorted(seen)) == ([], [("a", 1), ("b", 2)])
    assert {("a", "PROGRESS"), ("a", "SUCCESS"), ("b", "SUCCESS")} == set(heard) and beats


def test_groups_in_groups_have_lists_as_values(app: MiniQ) -> None:
    for one in "abcd":
        store(app, one, states.SUCCESS, one)
    inner = GroupResult("inner", [app.AsyncResult("b"), group(app, "c", "innermost")], app=app)
    outer = GroupResult("outer", [app.AsyncResult("a"), inner, GroupResult("empty"), app.AsyncResult("d")])
    assert outer.get(timeout=1) == ["a", ["b", ["c"]], [], "d"]
    assert outer.completed_count() == len(outer) == 4
    assert outer.as_list() == ["a", "b", "c", "d"]
    seen: Dict[Any, Any] = {}
    outer.get(callback=seen.__setitem__)
    assert seen == {"a": "a", "inner": ["b", ["c"]], "empty": [], "d": "d"}


def test_a_group_of_what_ran_here_needs_no_store() -> None:
    app = MiniQ("tests", broker=new_broker(), backend="disabled://")
    found = GroupResult("group", [EagerResult(one, one, "SUCCESS", app=app) for one in "ab"], app=app)
    assert found.get(timeout=0) == ["a", "b"] and found.successful()
    found.forget()
    assert found.watch(io.StringIO()) == "SUCCESS" and found.get() == ["a", "b"]
    error = KeyError("x")
    found.add(EagerResult("c", error, "FAILURE", "Traceback ...", app=app))
    with pytest.raises(KeyError) as caught:
        found.get()
    assert caught.value is error and error.__cause__ is None
    for act in (ResultSet([app.AsyncResult("x")]).get, found.save, lambda: GroupResult.restore("x", app=app)):
        with pytest.raises(NotImplementedError, match="No result backend is configured"):
            act()


def test_members_that_cannot_come_are_refused_at_once(app: MiniQ) -> None:
    found = ResultSet([app.AsyncResult("a"), app.AsyncResult("b", ignored=True)])
    for act in (found.get, found.iter_native):
        with pytest.raises(ImproperlyConfigured, match="task b is ignored"):
            act()


def test_a_failed_parent_ends_the_wait_of_a_group(app: MiniQ) -> None:
    store(app, "top", states.FAILURE, ERROR)
    top = app.AsyncResult("top")
    inner = GroupResult("inner", [app.AsyncResult("b", parent=top)], app=app)
    for found in (
        GroupResult("group", results(app, "ab"), top, app),
        GroupResult("group", [app.AsyncResult("a"), inner], app=app),
    ):
        with pytest.raises(ValueError, match="no"):
            found.get(timeout=60)
    # What ended all the same counts more.
    store(app, "b", states.SUCCESS, 5)
    assert inner.get(timeout=1) == [5]


def test_waiting_inside_a_task_is_refused_unless_allowed(app: MiniQ) -> None:
    store(app, "other", states.SUCCESS, 5)

    @app.task(name="t")
    def wait(how: str) -> Any:
        found = group(app, ["other"])
        if how == "allowed":
            with allow_join_result():
                return [
                    *found.get(timeout=1),
                    *dict(found.iter_native(timeout=1)),
                    found.watch(io.StringIO()),
                ]
        if how == "this once":
            return found.join(timeout=1, disable_sync_subtasks=False)
        return found.watch() if how == "watch" else getattr(found, how)()

    bench = Bench(app)
    for how in ("join", "get", "join_native", "iter_native", "watch"):
        bench.call(wait, how, task_id=how)
        assert bench.meta(how)["result"]["exc_type"] == "RuntimeError"
    for how, value in (("allowed", [5, "other", "SUCCESS"]), ("this once", [5])):
        bench.call(wait, how, task_id=how)
        assert bench.meta(how)["result"] == value


def test_then_calls_when_all_are_known(app: MiniQ) -> None:
    seen: List[Any] = []
    good, bad = group(app, "ab", "good"), group(app, "ac", "bad")
    for found in (good, bad):
        found.then(lambda one: seen.append(("ok", one.id)), on_error=lambda one: seen.append(("no", one.id)))
    store(app, "a", states.SUCCESS, 1)
    assert not good.ready() and seen == []
    store(app, "b", states.SUCCESS, 2)
    store(app, "c", states.FAILURE, ERROR)
    assert good.get(timeout=1) == [1, 2]
    assert bad.failed()
    assert seen == [("ok", "good"), ("no", "bad")]
    good.then(lambda one: seen.append("late"))
    assert seen[2:] == ["late"]


# -- nothing is left behind ------------------------------------------------------------------------


def test_waits_that_are_over_leave_nothing_behind(
    redis_server: RedisServer, redis_url: str, tmp_path: Any
) -> None:
    app = MiniQ("tests", broker=new_broker(), backend=redis_url)
    prefix = os.path.basename(str(tmp_path))

    def channels() -> int:
        return sum(prefix.encode() in one for one in redis_server.command("PUBSUB", "CHANNELS"))

    found = group(app, [f"{prefix}{number}" for number in range(500)])
    try:
        found.save()
        assert channels() == 0
        for _ in range(5):
            with pytest.raises(TimeoutError):
                found.get(timeout=0.02)
        store(app, f"{prefix}7", states.FAILURE, ERROR)
        with pytest.raises(ValueError, match="no"):
            found.get(timeout=10)
        abandoned = found.iter_native(timeout=10)
        assert next(abandoned)[0] == f"{prefix}7"
        del abandoned

        def refuse() -> None:
            raise KeyError("enough")

        with pytest.raises(KeyError, match="enough"):
            found.get(timeout=10, propagate=False, interval=0.05, on_interval=refuse)
        wait_until(lambda: channels() == 0, what="channels that nobody listens to")

        waiting = threading.Thread(target=found.get, kwargs={"timeout": 30, "propagate": False})
        waiting.start()
        try:
            wait_until(lambda: channels() == 499)
        finally:
            app.backend.store([encoded(app, str(one.id), states.SUCCESS, 1) for one in found])
            waiting.join()
        wait_until(lambda: channels() == 0, what="channels that nobody listens to")
    finally:
        app.close()


def test_timeouts_keep_no_objects(app: MiniQ) -> None:
    def give_up(times: int) -> None:
        for number in range(times):
            # Ids of which there were never any, and no parents that could fail.
            with pytest.raises(TimeoutError):
                group(app, [f"{times}-{number}", "b"]).get(timeout=0)
            with pytest.raises(TimeoutError):
                app.AsyncResult("c", parent=group(app, "d")).get(timeout=0.0001)

    give_up(20)
    gc.collect()
    before = len(gc.get_objects())
    give_up(200)
    gc.collect()
    assert len(gc.get_objects()) - before < 100


# -- members, identity -----------------------------------------------------------------------------


def test_members_come_and_go(app: MiniQ) -> None:
    found = ResultSet([], app=app)
    found.add(app.AsyncResult("a"))
    found.add(app.AsyncResult("a"))
    found.update(results(app, "bab"))
    assert [one.id for one in found] == ["a", "b"] and len(found) == 2 and found[1] == "b"
    assert "a" in found and "x" not in found and bool(found)
    found.discard("x")
    found.remove(app.AsyncResult("a"))
    with pytest.raises(KeyError, match="a"):
        found.remove("a")
    assert repr(found) == "<ResultSet: [b]>"
    found.clear()
    assert not found and found.children == [] and found.ready() and not found.waiting()


def test_results_are_equal_where_their_members_are(app: MiniQ) -> None:
    assert ResultSet(results(app, "ab")) == ResultSet(results(app, "ab")) != ResultSet(results(app, "ba"))
    one, other = group(app, "ab"), group(app, "ab")
    assert one == other == "group" and one != group(app, "ab", "x") and len({one, other}) == 1
    assert one != GroupResult("group", results(app, "ab"), app.AsyncResult("parent"), app)
    assert (str(one), repr(one), bool(GroupResult("x"))) == ("group", "<GroupResult: group [a, b]>", True)
    assert not GroupResult() and one != 5
    with pytest.raises(TypeError, match="unhashable"):
        hash(ResultSet([]))
    with pytest.raises(AttributeError, match="iterate"):
        _ = one.iterate  # type: ignore[attr-defined]


def test_forget_and_revoke_reach_all(app: MiniQ) -> None:
    for one in ("a", "b", "c", "top"):
        store(app, one, states.SUCCESS, 1)
    inner = GroupResult("inner", results(app, "bc"), app=app)
    found = GroupResult("group", [app.AsyncResult("a"), inner], app.AsyncResult("top"), app)
    assert found.get(timeout=1) == [1, [1, 1]]
    found.forget()
    assert not app.backend.fetch(["a", "b", "c", "top"]) and found.waiting()
    found.revoke()
    assert [one.state for one in results(app, "abc")] == ["REVOKED"] * 3
    with pytest.raises(ImproperlyConfigured, match=r"connections of app"):
        found.revoke(connection=object())  # type: ignore[arg-type]
    ResultSet([], app=app).revoke()


# -- groups that are kept --------------------------------------------------------------------------


def test_a_saved_group_comes_back(app: MiniQ) -> None:
    found = GroupResult(
        "group", [app.AsyncResult("a"), group(app, "bc", "inner")], app.AsyncResult("top"), app
    )
    assert GroupResult.restore("group", app=app) is None
    found.save()
    back = GroupResult.restore("group", app=app)
    assert back is not None and back == found and back.as_tuple() == found.as_tuple()
    for one in "abc":
        store(app, one, states.SUCCESS, one)
    assert back.get(timeout=1) == ["a", ["b", "c"]]
    back.delete()
    assert GroupResult.restore("group", app=app) is None
    with pytest.raises(ValueError, match="no id"):
        GroupResult(None, results(app, "a"), app=app).save()


def test_a_class_made_for_an_app_needs_no_app_named(app: MiniQ) -> None:
    own = type("GroupResult", (GroupResult,), {"_app": app})
    MiniQ("another", broker=new_broker())
    own("group", results(app, "ab")).save()
    assert own("empty").app is app and own.restore("group") == group(app, "ab")


@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_groups_are_saved_with_the_serializer_of_results(app: MiniQ, serializer: str) -> None:
    app.conf.update(result_serializer=serializer, result_accept_content=[serializer])
    group(app, "ab").save()
    body = app.backend.load_group("group")
    if serializer == "json":
        assert body == b'{"result": [["group", null], [[["a", null], null], [["b", null], null]]]}'
    assert GroupResult.restore("group", app=app) == group(app, "ab")


def test_what_is_saved_and_no_group_is_refused(app: MiniQ) -> None:
    for body in (b"5", b"{}", b'{"result": 5}', b'{"result": [["a", null], null]}', b"\x80"):
        app.backend.save_group("group", body, None)
        with pytest.raises(DecodeError):
            GroupResult.restore("group", app=app)


# -- how far it is ---------------------------------------------------------------------------------


def meta(state: str, result: Any = None) -> Dict[str, Any]:
    return {"status": state, "result": result}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("state", "result", "shown"),
    [
        ("PENDING", None, "PENDING"),
        ("STARTED", {"current": 1, "total": 2}, "STARTED"),
        ("PROGRESS", {"current": 1, "total": 4}, "25 %  1/4  PROGRESS"),
        ("LOADING", {"current": 2.5, "total": 10}, "25 %  2.5/10  LOADING"),
        ("PROGRESS", {"current": 99, "total": 4}, "100 %  4/4  PROGRESS"),
        ("PROGRESS", {"current": -1, "total": 4}, "0 %  0/4  PROGRESS"),
        ("PROGRESS", {"current": "1", "total": 4}, "PROGRESS"),
        ("PROGRESS", {"current": 1, "total": 0}, "PROGRESS"),
        ("PROGRESS", {"current": float("nan"), "total": float("inf")}, "PROGRESS"),
        ("PROGRESS", {"current": True, "total": 10**400}, "PROGRESS"),
        ("PROGRESS", [1, 2], "PROGRESS"),
        ("\x1b[2J", None, repr("\x1b[2J")),
        ("SUCCESS", {"current": 1, "total": 4}, "100 %  SUCCESS"),
    ],
)
def test_a_task_is_shown_as_far_as_it_told(state: str, result: Any, shown: str) -> None:
    file = io.StringIO()
    Meter(file, Clock()).show([meta(state, result)], state)
    assert file.getvalue() == f"{shown}  0:00\n"


def test_of_many_the_ended_ones_are_counted() -> None:
    file, clock = io.StringIO(), Clock()
    metas = [
        meta("SUCCESS"),
        meta("FAILURE"),
        meta("PROGRESS", {"current": 1, "total": 2}),
        meta("PENDING"),
    ]
    with Meter(file, clock) as meter:
        meter.show(metas, state_of(metas))
        clock.now = 3700.0
        metas[2:] = [meta("REVOKED"), meta("SUCCESS")]
        meter.show(metas, state_of(metas), last=True)
    assert file.getvalue().splitlines() == [
        "62 %  2/4  FAILURE, 1 failed  0:00",
        "100 %  4/4  FAILURE, 2 failed  1:01:40",
    ]
    assert [state_of([meta(one) for one in many.split()]) for many in (
        "PENDING PENDING", "PENDING SUCCESS", "SUCCESS SUCCESS", "REVOKED SUCCESS", "REVOKED FAILURE", ""
    )] == ["PENDING", "STARTED", "SUCCESS", "REVOKED", "FAILURE", "SUCCESS"]  # fmt: skip


def test_without_a_terminal_a_line_is_written_now_and_then() -> None:
    file, clock = io.StringIO(), Clock()
    with Meter(file, clock) as meter:
        for second in range(int(LINE_EVERY_S) * 3 + 1):
            clock.now = float(second)
            meter.show([meta("PROGRESS", {"current": second, "total": 100})], "PROGRESS")
        clock.now += LINE_EVERY_S
        # Nothing is new: no line.
        meter.show([meta("PROGRESS", {"current": second, "total": 100})], "PROGRESS")
    text = file.getvalue()
    assert len(text.splitlines()) == 4 and text.endswith("30 %  30/100  PROGRESS  0:30\n")
    assert "\r" not in text and "\x1b" not in text


@pytest.fixture
def terminal() -> Iterator[Callable[..., Any]]:
    """Make a terminal: a file, a function that returns all that was written, and one that resizes."""
    fcntl = pytest.importorskip("fcntl")
    import struct
    import termios

    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    seen = bytearray()

    def resize(columns: int) -> None:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read() -> str:
        try:
            seen.extend(os.read(ours, 65536))
        except BlockingIOError:
            pass
        return seen.decode()

    with open(theirs, "w") as file:
        yield lambda: (file, read, resize)
    os.close(ours)


def test_on_a_terminal_the_line_is_drawn_again_in_its_place(terminal: Any) -> None:
    file, read, resize = terminal()
    resize(60)
    with Meter(file, Clock()) as meter:
        for current in (0, 5):
            meter.show([meta("PROGRESS", {"current": current, "total": 10})], "PROGRESS")
        resize(20)
        meter.show([meta("SUCCESS")], "SUCCESS")
    _, first, second, third, end = wait_until(lambda: read().endswith("\n") and read()).split("\r")
    assert first == "[.............................]   0 %  0/10  PROGRESS  0:00"
    assert second == "[##############...............]  50 %  5/10  PROGRESS  0:00"
    assert third.rstrip() == "100 %  SUCCESS  0:00"[:19] and len(third) == 19
    assert end == "\n" and len(first) == 59 and "\x1b" not in read()


def test_watch_shows_a_task_until_it_ended(app: MiniQ) -> None:
    file = io.StringIO()
    store(app, "one", "PROGRESS", {"current": 1, "total": 2})
    result = app.AsyncResult("one")
    told: List[Any] = []
    result.then(told.append)
    assert result.watch(file, interval=0.01, timeout=0) == "PROGRESS"

    def work() -> None:
        wait_until(lambda: file.getvalue().count("\n") == 2)
        store(app, "one", states.SUCCESS, 5)
        app.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert result.watch(file, interval=0.01) == "SUCCESS"
    finally:
        thread.join()
    lines = [line.rpartition("  ")[0] for line in file.getvalue().splitlines()]
    assert lines == ["50 %  1/2  PROGRESS", "50 %  1/2  PROGRESS", "100 %  SUCCESS"]
    assert told == [result]


def test_watch_counts_a_chords_header_and_a_chains_steps(app: MiniQ) -> None:
    for one in "abc":
        store(app, one, states.SUCCESS, 1)
    top = app.AsyncResult("top")
    header = GroupResult("header", results(app, "abc"), top, app)
    for parent, shown in ((header, "3/5"), (app.AsyncResult("c", parent=top), "1/3")):
        file = io.StringIO()
        assert app.AsyncResult("body", parent=parent).watch(file, timeout=0) == "PENDING"
        assert f"{shown}  PENDING" in file.getvalue()
    file = io.StringIO()
    assert group(app, "abc").watch(file) == "SUCCESS"
    assert "100 %  3/3  SUCCESS" in file.getvalue()


def test_watch_ends_where_a_parent_failed(app: MiniQ, capsys: Any) -> None:
    store(app, "top", states.FAILURE, ERROR)
    assert app.AsyncResult("one", parent=app.AsyncResult("top")).watch() == "FAILURE"
    assert "1/2  FAILURE, 1 failed" in capsys.readouterr().err

# SPDX-License-Identifier: MIT
"""Results: states, values, waiting, relatives, and what happens inside tasks."""

from __future__ import annotations

import copy
import datetime
import gc
import io
import json
import threading
import weakref
from typing import Any, Iterator, List

import pytest
from bench import Bench, new_broker
from storing import ERROR, STORES, make_app, store

from miniq import AsyncResult, MiniQ, Task, resultbase, states
from miniq.exceptions import (
    BackendGetMetaError,
    ChordError,
    DecodeError,
    ImproperlyConfigured,
    IncompleteStream,
    TaskRevokedError,
    TimeoutError,
)
from miniq.graph import DependencyGraph
from miniq.result import GroupResult, allow_join_result, result_from_tuple
from miniq.testing import start_worker


def nope() -> Any:
    raise KeyError("nope")


@pytest.fixture(params=STORES)
def app(request: Any) -> Iterator[MiniQ]:
    made = make_app(request)
    yield made
    made.close()


def ran(app: MiniQ, task: Any, *args: Any, **options: Any) -> AsyncResult:
    """Run a task with all that follows from it and store the results, as a worker would."""
    bench = Bench(app)
    bench.settle(task, *args, **{"task_id": "one", **options})
    app.backend.store(list(bench.stored.values()))
    return app.AsyncResult(options.get("task_id", "one"))


# -- states ----------------------------------------------------------------------------------------


def test_an_unknown_id_is_pending_and_does_not_exist(app: MiniQ) -> None:
    result = app.AsyncResult("nobody")
    assert (result.state, result.status, result.result, result.info) == ("PENDING", "PENDING", None, None)
    assert (result.traceback, result.children, result.date_done, result.name) == (None, [], None, None)
    assert (result.ready(), result.successful(), result.failed(), result.exists()) == (
        False,
        False,
        False,
        False,
    )


def test_a_value(app: MiniQ) -> None:
    result = ran(app, app.task(name="t")(lambda: {"a": [1, None]}))
    assert result.get(timeout=1) == result.result == {"a": [1, None]}
    assert (result.ready(), result.successful(), result.failed(), result.exists()) == (
        True,
        True,
        False,
        True,
    )
    assert isinstance(result.date_done, datetime.datetime)
    age = datetime.datetime.now(datetime.timezone.utc) - result.date_done
    assert datetime.timedelta() <= age < datetime.timedelta(minutes=5)


def test_a_failure_is_raised_with_the_workers_traceback_as_cause(app: MiniQ) -> None:
    result = ran(app, app.task(name="t")(lambda: nope()))
    assert (result.state, repr(result.result)) == ("FAILURE", "KeyError('nope')")
    assert result.traceback and "test_result.py" in result.traceback
    with pytest.raises(KeyError) as caught:
        result.get(timeout=1)
    assert "test_result.py" in str(caught.value.__cause__)
    assert repr(result.get(timeout=1, propagate=False)) == "KeyError('nope')"
    with pytest.raises(KeyError):
        result.maybe_throw()


def test_states_on_the_way(app: MiniQ) -> None:
    store(app, "one", states.STARTED, {"pid": 5, "hostname": "h"})
    result = app.AsyncResult("one")
    assert (result.state, result.info) == ("STARTED", {"pid": 5, "hostname": "h"})
    store(app, "one", "PROGRESS", {"done": 1})
    assert (result.state, result.info, result.ready()) == ("PROGRESS", {"done": 1}, False)
    store(app, "one", states.SUCCESS, 5)
    assert (result.state, result.get()) == ("SUCCESS", 5)


def test_what_was_revoked_raises_so(app: MiniQ) -> None:
    app.control.revoke("one")
    result = app.AsyncResult("one")
    assert result.state == "REVOKED"
    with pytest.raises(TaskRevokedError, match="revoked"):
        result.get(timeout=1)
    assert isinstance(result.result, TaskRevokedError)


def test_revoking_leaves_what_has_begun_or_ended(app: MiniQ) -> None:
    for state in (states.STARTED, states.SUCCESS, "PROGRESS"):
        store(app, state, state, None)
    app.control.revoke([states.STARTED, states.SUCCESS, "PROGRESS", "fresh"])
    found = [app.AsyncResult(one).state for one in (states.STARTED, states.SUCCESS, "PROGRESS", "fresh")]
    assert found == ["STARTED", "SUCCESS", "PROGRESS", "REVOKED"]


def test_a_revocation_for_some_workers_says_nothing_of_the_others(app: MiniQ) -> None:
    app.control.revoke("one", destination=["celery@somewhere"])
    assert app.AsyncResult("one").state == "PENDING"


def test_extended_results_tell_more(app: MiniQ) -> None:
    app.conf.result_extended = True
    result = ran(app, app.task(name="t")(lambda *a, **k: None), 1, kwargs={"a": 2}, queue="q", retries=1)
    found = (result.name, result.args, result.kwargs, result.worker, result.retries, result.queue)
    assert found == ("t", [1], {"a": 2}, "celery@bench", 1, "q")


def test_a_result_that_is_none_is_an_error_which_says_whose(app: MiniQ) -> None:
    store(app, "one", states.SUCCESS, 5)
    (good,) = app.backend.fetch(["one"]).values()
    app.backend.store([good._replace(task_id="two", body=b"[1]")])
    with pytest.raises((DecodeError, BackendGetMetaError), match="two"):
        _ = app.AsyncResult("two").state


# -- waiting ---------------------------------------------------------------------------------------


def test_get_waits_until_it_is_there(app: MiniQ) -> None:
    result = app.AsyncResult("one")
    go_on = threading.Event()

    def work() -> None:
        go_on.wait(10)
        store(app, "one", "PROGRESS", 1)
        store(app, "one", states.SUCCESS, 5)
        app.close()

    thread = threading.Thread(target=work)
    thread.start()
    seen: List[Any] = []
    try:
        found = result.get(
            timeout=10,
            interval=0.01,
            on_interval=go_on.set,
            on_message=lambda meta: seen.append(meta["status"]),
        )
    finally:
        thread.join()
    assert found == 5
    assert seen[-1] == "SUCCESS"


def test_get_gives_up_with_what_is_known(app: MiniQ) -> None:
    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError, match="task one did not end.*its state is PENDING"):
            app.AsyncResult("one").get(timeout=timeout)


def test_callback_gets_id_and_value(app: MiniQ) -> None:
    seen: List[Any] = []
    ran(app, app.task(name="t")(lambda: 5)).get(callback=lambda *both: seen.append(both))
    assert seen == [("one", 5)]


def test_an_ignored_result_is_not_waited_for(app: MiniQ) -> None:
    task = app.task(name="t", ignore_result=True)(lambda: 5)
    with pytest.raises(ImproperlyConfigured, match="ignore_result"):
        task.delay().get()
    assert task.apply_async(ignore_result=False).ignored is False


def test_without_a_backend_everything_that_needs_one_says_so() -> None:
    app = MiniQ("tests", broker=new_broker(), backend="disabled://")
    result = app.send_task("x")
    for act in (lambda: result.state, result.get, lambda: result.traceback, result.ready, result.forget):
        with pytest.raises(NotImplementedError, match="No result backend is configured"):
            act()
    app.control.revoke(result.id)


def test_parents_errors_are_raised_first(app: MiniQ) -> None:
    store(
        app,
        "above",
        states.FAILURE,
        {"exc_type": "ValueError", "exc_message": ["up"], "exc_module": "builtins"},
    )
    parent = app.AsyncResult("above")
    result = app.AsyncResult("one", parent=parent)
    with pytest.raises(ValueError, match="up"):
        result.get(timeout=10)
    with pytest.raises(TimeoutError):
        result.get(timeout=0, follow_parents=False)
    with pytest.raises(TimeoutError):
        result.get(timeout=0, propagate=False)
    store(app, "one", states.SUCCESS, 5)
    assert result.get(timeout=10) == 5


def test_a_parent_that_fails_later_ends_the_wait(app: MiniQ, monkeypatch: Any) -> None:
    monkeypatch.setattr(resultbase, "FIRST_LOOK_S", 0.01)
    top, middle = app.AsyncResult("top"), app.AsyncResult("middle")
    middle.parent = top
    result = app.AsyncResult("one", parent=middle)
    store(app, "top", states.SUCCESS, 1)
    fail = iter([lambda: None, lambda: app.control.revoke("middle")])
    with pytest.raises(TaskRevokedError):
        result.get(on_interval=lambda: next(fail, lambda: None)(), interval=0.01)
    with pytest.raises(TimeoutError, match="task one did not end"):
        result.get(timeout=0.01, follow_parents=False)


def test_a_chord_fails_with_what_its_body_says(app: MiniQ) -> None:
    header = GroupResult("header", [app.AsyncResult("a"), app.AsyncResult("b")], app=app)
    store(app, "a", states.FAILURE, ERROR)
    result = app.AsyncResult("body", parent=header)
    with pytest.raises(TimeoutError):
        result.get(timeout=0.05)

    def finish() -> None:
        error = {"exc_type": "ChordError", "exc_message": ["a raised"], "exc_module": "celery.exceptions"}
        store(app, "b", states.SUCCESS, 1)
        store(app, "body", states.FAILURE, error)

    with pytest.raises(ChordError, match="a raised"):
        result.get(on_interval=finish, interval=0.01)


def test_a_chord_whose_body_nobody_ended_fails_with_its_header(app: MiniQ, monkeypatch: Any) -> None:
    monkeypatch.setattr(resultbase, "FIRST_LOOK_S", 0.01)
    header = GroupResult("header", [app.AsyncResult("a"), app.AsyncResult("b")], app=app)
    store(app, "a", states.SUCCESS, 1)
    store(app, "b", states.FAILURE, ERROR)
    with pytest.raises(ValueError, match="no"):
        app.AsyncResult("body", parent=header).get(timeout=60)
    file = io.StringIO()
    assert app.AsyncResult("body", parent=header).watch(file, interval=0.01) == "FAILURE"


def test_a_raised_error_does_not_keep_the_callers_frames(app: MiniQ) -> None:
    class Big:
        pass

    result = ran(app, app.task(name="t")(lambda: nope()))

    def wait() -> Any:
        big = Big()
        try:
            result.get(timeout=1)
        except KeyError:
            return weakref.ref(big)

    gc.collect()
    gc.disable()
    try:
        assert wait()() is None
    finally:
        gc.enable()


def test_then_calls_when_it_is_known(app: MiniQ) -> None:
    seen: List[Any] = []
    good, bad = app.AsyncResult("good"), app.AsyncResult("bad")
    for result in (good, bad):
        result.then(lambda one: seen.append(("ok", one.id)), on_error=lambda one: seen.append(("no", one.id)))
    assert seen == []
    store(app, "good", states.SUCCESS, 5)
    store(app, "bad", states.FAILURE, {"exc_type": "ValueError", "exc_message": [], "exc_module": "builtins"})
    assert good.get() == 5
    assert bad.failed()
    assert seen == [("ok", "good"), ("no", "bad")]
    good.then(lambda one: seen.append("late"))
    bad.then(lambda one: seen.append("never"))
    assert seen[2:] == ["late"]


# -- inside tasks ----------------------------------------------------------------------------------


def test_waiting_inside_a_task_is_refused_unless_allowed(app: MiniQ) -> None:
    store(app, "other", states.SUCCESS, 5)

    @app.task(name="t")
    def wait(how: str) -> Any:
        if how == "allowed":
            with allow_join_result():
                return app.AsyncResult("other").get(timeout=1)
        if how == "this once":
            return app.AsyncResult("other").get(timeout=1, disable_sync_subtasks=False)
        if how == "in a plain call":
            return wait("refused")
        return app.AsyncResult("other").get(timeout=1)

    bench = Bench(app)
    for how, state in (
        ("refused", "FAILURE"),
        ("allowed", "SUCCESS"),
        ("this once", "SUCCESS"),
        ("in a plain call", "FAILURE"),
    ):
        bench.call(wait, how, task_id=how)
        assert bench.meta(how)["status"] == state
    assert bench.meta("refused")["result"]["exc_type"] == "RuntimeError"
    assert wait("refused") == 5


# -- relatives -------------------------------------------------------------------------------------


def test_children_can_be_followed(app: MiniQ) -> None:
    add = app.task(name="add")(lambda x, y: x + y)
    result = ran(app, add, 1, 2, link=add.s(10).set(link=add.s(100)))
    (child,) = result.children
    assert (child.get(timeout=1), result.get_leaf()) == (13, 113)
    assert [value for _, value in result.collect()] == [3, 13, 113]
    pairs = [(parent and parent.id, node.id) for parent, node in result.iterdeps()]
    assert pairs[:2] == [(None, "one"), ("one", child.id)]


def test_descendants_of_what_has_not_ended_are_unknown(app: MiniQ) -> None:
    with pytest.raises(IncompleteStream):
        list(app.AsyncResult("one").iterdeps())
    assert len(list(app.AsyncResult("one").iterdeps(intermediate=True))) == 1


def test_children_are_results_of_any_kind(app: MiniQ) -> None:
    group = (("group-id", None), [(("a", None), None), (("b", None), None)])
    store(app, "one", states.SUCCESS, 5, children=[group, (("c", (("above", None), None)), None)])
    for number, one in enumerate("abc"):
        store(app, one, states.SUCCESS, number)
    of_group, of_task = app.AsyncResult("one").children
    assert isinstance(of_group, GroupResult) and isinstance(of_task, AsyncResult)
    assert of_group.get(timeout=1) == [0, 1] and of_group.as_list() == ["a", "b"]
    assert (of_task.get(timeout=1), of_task.parent) == (2, "above")


def test_all_that_descends_from_a_task_can_be_drawn(app: MiniQ) -> None:
    group = (("group-id", None), [(("a", None), None), (("b", None), None)])
    store(app, "one", states.SUCCESS, 5, children=[group, (('say "c"', None), None)])
    for one in ("a", "b", 'say "c"'):
        store(app, one, states.SUCCESS, one)
    result = app.AsyncResult("one")
    graph = result.graph
    assert [(str(start), str(end)) for start, end in graph.edges()] == [
        ("one", "group-id"),
        ("one", 'say "c"'),
        ("group-id", "a"),
        ("group-id", "b"),
    ]
    assert [str(node) for node in graph.topsort()] == ["one", "group-id", 'say "c"', "a", "b"]
    assert len(graph) == 5 and result in graph and graph[result] == ["group-id", 'say "c"']
    file = io.StringIO()
    graph.to_dot(file)
    lines = file.getvalue().splitlines()
    assert lines[0] == "digraph dependencies {" and lines[-1] == "}"
    assert '    "one";' in lines and r'    "one" -> "say \"c\"";' in lines
    assert [value for _, value in result.collect()] == [5, ["a", "b"], 'say "c"', "a", "b"]


def test_descendants_in_a_circle_come_to_an_end(app: MiniQ) -> None:
    store(app, "one", states.SUCCESS, 1, children=[(("two", None), None)])
    store(app, "two", states.SUCCESS, 2, children=[(("one", None), None)])
    graph = app.AsyncResult("one").build_graph()
    assert list(graph) == ["one", "two"]
    with pytest.raises(ValueError, match="cycle"):
        graph.topsort()
    assert DependencyGraph().topsort() == []


def test_tuples_and_back(app: MiniQ) -> None:
    result = app.AsyncResult("c", parent=app.AsyncResult("b", parent=app.AsyncResult("a")))
    assert result.as_tuple() == (("c", (("b", (("a", None), None)), None)), None)
    assert result.as_list() == ["c", "b", "a"]
    back = result_from_tuple(result.as_tuple(), app)
    assert back.as_list() == ["c", "b", "a"]
    assert result_from_tuple("x").id == "x"
    assert result_from_tuple(back) is back


def test_trees_become_tuples_and_come_back(app: MiniQ) -> None:
    above = app.AsyncResult("above", parent=app.AsyncResult("top"))
    inner = GroupResult("inner", [app.AsyncResult("c", parent=app.AsyncResult("b"))], app=app)
    header = GroupResult("header", [app.AsyncResult("a"), inner], above, app)
    result = app.AsyncResult("body", parent=header)
    value = result.as_tuple()
    back = result_from_tuple(json.loads(json.dumps(value)), app)
    assert back.as_tuple() == value
    assert back == result and back.parent == header
    assert result.as_list() == ["body", "a", "c", "above", "top"]
    assert result_from_tuple((("g", None), []), app).as_tuple() == (("g", None), [])


def test_a_long_chain_of_parents_needs_no_deep_stack(app: MiniQ) -> None:
    result = app.AsyncResult("0")
    for number in range(1, 5000):
        result = app.AsyncResult(str(number), parent=result)
    back = result_from_tuple(result.as_tuple(), app)
    assert back.as_list() == [str(number) for number in reversed(range(5000))]
    with pytest.raises(TimeoutError):
        back.get(timeout=0)


@pytest.mark.parametrize(
    "value", [None, 5, [], ["a"], [["a"], None], [[5, None], None], [["", None], None], [["a", None], "bc"]]
)
def test_what_is_no_tuple_of_a_result_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="as a tuple"):
        result_from_tuple(value)


def test_forget_removes_it_and_its_parents(app: MiniQ) -> None:
    for one in "ab":
        store(app, one, states.SUCCESS, 5)
    result = app.AsyncResult("b", parent=app.AsyncResult("a"))
    assert result.get() == 5
    result.forget()
    assert (result.state, app.AsyncResult("a").exists()) == ("PENDING", False)
    for one in "abcd":
        store(app, one, states.SUCCESS, 5)
    header = GroupResult("header", [app.AsyncResult("b"), app.AsyncResult("c")], app.AsyncResult("a"), app)
    app.AsyncResult("d", parent=header).forget()
    assert not app.backend.fetch(list("abcd"))


# -- identity --------------------------------------------------------------------------------------


def test_results_are_compared_by_id(app: MiniQ) -> None:
    one = app.AsyncResult("one")
    assert one == AsyncResult("one") == "one"
    assert one != AsyncResult("two")
    assert one != 5
    assert len({one, AsyncResult("one")}) == 1
    assert (str(one), repr(one), one.task_id) == ("one", "<AsyncResult: one>", "one")
    assert copy.copy(one) is copy.deepcopy([one])[0] is one


def test_a_result_needs_an_id() -> None:
    with pytest.raises(ValueError, match="id"):
        AsyncResult("")


def test_without_an_app_the_current_one_is_asked(app: MiniQ) -> None:
    store(app, "one", states.SUCCESS, 5)
    assert AsyncResult("one").get(timeout=1) == 5


def test_revoke_takes_what_it_can_do(app: MiniQ) -> None:
    result = app.AsyncResult("one")
    with pytest.raises(ImproperlyConfigured, match=r"connections of app"):
        result.revoke(connection=object())  # type: ignore[arg-type]
    result.revoke(wait=True, timeout=0.01)
    result.revoke_by_stamped_headers({"customer": "a"})
    result.revoke(terminate=True, signal="SIGKILL")
    assert result.state == "REVOKED"
    with pytest.raises(AttributeError, match="no attribute"):
        _ = result.nothing  # type: ignore[attr-defined]


# -- with a worker ---------------------------------------------------------------------------------


def test_many_threads_wait_for_one_worker(app: MiniQ) -> None:
    @app.task(bind=True, name="t")
    def double(self: Task, x: int) -> int:
        return x * 2

    found: List[Any] = []

    def ask(number: int) -> None:
        found.append(double.delay(number).get(timeout=20) == number * 2)
        app.close()

    with start_worker(app, concurrency=2):
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 8


def test_links_retries_and_states_with_a_real_worker(app: MiniQ) -> None:
    @app.task(bind=True, name="flaky", max_retries=2)
    def flaky(self: Task, x: int) -> int:
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return x

    @app.task(name="later")
    async def later(x: int, y: int) -> int:
        return x + y

    with start_worker(app):
        result = flaky.apply_async((1,), link=later.s(10))
        assert result.get(timeout=20) == 1
        (child,) = result.children
        assert child.get(timeout=20) == 11
        assert child.parent is None
        with pytest.raises(TypeError):
            app.send_task("later").get(timeout=20)

# SPDX-License-Identifier: MIT
"""Results: states, values, waiting, relatives, and what happens inside tasks."""

from __future__ import annotations

import copy
import datetime
import gc
import threading
import weakref
from typing import Any, Iterator, List

import pytest
from bench import Bench, new_broker

from miniq import AsyncResult, MiniQ, Task, states
from miniq.exceptions import (
    DecodeError,
    ImproperlyConfigured,
    IncompleteStream,
    TaskRevokedError,
    TimeoutError,
)
from miniq.result import allow_join_result, result_from_tuple
from miniq.task import Context
from miniq.testing import start_worker


def nope() -> Any:
    raise KeyError("nope")


@pytest.fixture(params=["memory", "sqlite"])
def app(request: Any, sqlite_url: str) -> Iterator[MiniQ]:
    made = MiniQ("tests", broker=new_broker() if request.param == "memory" else sqlite_url)
    yield made
    made.close()


def store(app: MiniQ, task_id: str, state: str, value: Any, **request: Any) -> None:
    traceback = request.pop("traceback", None)
    children = request.pop("children", [])
    context = Context(id=task_id, **request)
    context.children.extend(children)
    app.backend.store([app.runner.encode(context, state, value, traceback)])


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
    with pytest.raises(DecodeError, match="two"):
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


def test_a_group_among_the_children_gives_its_members(app: MiniQ) -> None:
    group = (("group-id", None), [(("a", None), None), (("b", None), None)])
    store(app, "one", states.SUCCESS, 5, children=[group, (("c", None), None)])
    assert [child.id for child in app.AsyncResult("one").children] == ["a", "b", "c"]


def test_tuples_and_back(app: MiniQ) -> None:
    result = app.AsyncResult("c", parent=app.AsyncResult("b", parent=app.AsyncResult("a")))
    assert result.as_tuple() == (("c", (("b", (("a", None), None)), None)), None)
    assert result.as_list() == ["c", "b", "a"]
    back = result_from_tuple(result.as_tuple(), app)
    assert back.as_list() == ["c", "b", "a"]
    assert result_from_tuple("x").id == "x"
    assert result_from_tuple(back) is back


def test_forget_removes_it_and_its_parents(app: MiniQ) -> None:
    for one in "ab":
        store(app, one, states.SUCCESS, 5)
    result = app.AsyncResult("b", parent=app.AsyncResult("a"))
    assert result.get() == 5
    result.forget()
    assert (result.state, app.AsyncResult("a").exists()) == ("PENDING", False)


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
    with pytest.raises(ImproperlyConfigured, match="wait="):
        result.revoke(wait=True)
    result.revoke(terminate=True, signal="SIGKILL")
    assert result.state == "REVOKED"
    with pytest.raises(AttributeError, match="Celery has it"):
        _ = result.build_graph  # type: ignore[attr-defined]


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

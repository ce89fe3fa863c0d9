# SPDX-License-Identifier: MIT
"""Tasks that run in the calling program: `apply`, and `task_always_eager`."""

from __future__ import annotations

import asyncio
import datetime
import gc
from types import SimpleNamespace
from typing import Any, List

import pytest
from bench import new_broker

from miniq import AsyncResult, EagerResult, GroupResult, MiniQ, Task, chain, chord, group, signals
from miniq.exceptions import (
    ChordError,
    EncodeError,
    Ignore,
    ImproperlyConfigured,
    MaxRetriesExceededError,
    NotRegistered,
    Reject,
    UnknownOption,
)


def nope() -> Any:
    raise KeyError("nope")


@pytest.fixture
def app() -> MiniQ:
    return MiniQ("tests", broker=new_broker())


@pytest.fixture
def eager(app: MiniQ) -> MiniQ:
    app.conf.task_always_eager = True
    return app


def nothing_was_sent(app: MiniQ) -> bool:
    return all(size.ready == size.waiting == 0 for size in app.producer.transport.sizes())


# -- apply -----------------------------------------------------------------------------------------


def test_apply_runs_the_task_here(app: MiniQ) -> None:
    @app.task(bind=True, name="t")
    def act(self: Task, x: int, y: int = 0) -> Any:
        request = self.request
        return x + y, request.id, request.is_eager, request.called_directly, request.delivery_info["is_eager"]

    result = act.apply((1,), {"y": 2}, task_id="one")
    assert isinstance(result, EagerResult)
    assert result.get() == (3, "one", True, False, True)
    assert (result.id, result.state, result.name) == ("one", "SUCCESS", "t")
    assert (result.ready(), result.successful(), result.failed()) == (True, True, False)
    assert (result.traceback, result.children, result.info) == (None, [], result.get())
    assert nothing_was_sent(app)


def test_values_are_not_serialized_where_nothing_is_stored(app: MiniQ) -> None:
    value = object()
    assert app.task(name="t")(lambda: value).apply().get() is value
    assert app.task(name="u")(lambda x: x).apply((value,)).get() is value


def test_a_failure_is_raised_by_get_with_its_own_traceback(app: MiniQ) -> None:
    @app.task(name="t")
    def boom() -> None:
        raise ValueError("no") from KeyError("cause")

    result = boom.apply()
    assert (result.state, result.failed(), repr(result.result)) == ("FAILURE", True, "ValueError('no')")
    assert result.traceback.splitlines()[-1] == "ValueError: no"  # type: ignore[union-attr]
    assert result.get(propagate=False) is result.result
    with pytest.raises(ValueError) as caught:
        result.get()
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.traceback[-1].name == "boom"


def test_throw_raises_at_once(app: MiniQ) -> None:
    boom = app.task(name="t")(lambda: nope())
    with pytest.raises(KeyError):
        boom.apply(throw=True)
    app.conf.task_eager_propagates = True
    with pytest.raises(KeyError):
        boom.apply()
    assert boom.apply(throw=False).failed()


def test_retries_run_at_once_until_the_end(app: MiniQ) -> None:
    seen: List[Any] = []

    @app.task(bind=True, name="t", max_retries=2)
    def again(self: Task, x: int) -> Any:
        seen.append((x, self.request.retries, self.request.id))
        raise self.retry(args=(x + 1,), countdown=1000)

    result = again.apply((0,), task_id="one")
    assert seen == [(0, 0, "one"), (1, 1, "one"), (2, 2, "one")]
    assert isinstance(result.result, MaxRetriesExceededError)


def test_endless_retries_do_not_fill_the_stack(app: MiniQ) -> None:
    @app.task(bind=True, name="t", max_retries=None)
    def again(self: Task) -> int:
        if self.request.retries < 3000:
            raise self.retry()
        return int(self.request.retries)

    assert again.apply().get() == 3000


def test_autoretry_is_kept(app: MiniQ) -> None:
    tries: List[int] = []

    @app.task(name="t", autoretry_for=OSError, max_retries=1)
    def act() -> None:
        tries.append(1)
        raise OSError("down")

    with pytest.raises(OSError, match="down"):
        act.apply().get()
    assert len(tries) == 2


def test_links_run_too(app: MiniQ) -> None:
    seen: List[Any] = []

    @app.task(bind=True, name="note")
    def note(self: Task, *args: Any) -> Any:
        request = self.request
        seen.append((args, request.parent_id, request.root_id, request.is_eager))
        return sum(args)

    result = note.apply((1, 2), task_id="one", link=[note.s(10).set(link=note.s()), note.si(0)])
    assert [args for args, *_ in seen] == [(1, 2), (3, 10), (13,), (0,)]
    assert [parent for _, parent, *_ in seen[1:]] == ["one", result.children[0].id, "one"]
    assert {(root, is_eager) for *_, root, is_eager in seen} == {("one", True)}
    assert len(result.children) == 2


def test_chains_given_as_an_option_run_too(app: MiniQ) -> None:
    seen: List[Any] = []

    @app.task(name="add")
    def add(x: int, y: int) -> int:
        seen.append((x, y))
        return x + y

    add.apply((1, 2), chain=[add.s(100), add.s(10)])
    assert seen == [(1, 2), (3, 10), (13, 100)]


def test_errbacks_run_when_the_task_fails(app: MiniQ) -> None:
    seen: List[Any] = []
    boom = app.task(name="t")(lambda: nope())
    by_id = app.task(name="by_id")(lambda task_id: seen.append(task_id))
    inline = app.task(name="inline")(lambda request, exc, traceback: seen.append(repr(exc)))
    boom.apply(task_id="one", link_error=[by_id.s(), inline.s()], link=by_id.s())
    assert seen == ["KeyError('nope')", "one"]


def test_a_callback_that_fails_is_heard_of_where_errors_propagate(app: MiniQ) -> None:
    boom = app.task(name="boom")(lambda x: nope())
    ok = app.task(name="ok")(lambda: 1)
    assert ok.apply(link=boom.s()).state == "SUCCESS"
    with pytest.raises(KeyError):
        ok.apply(link=boom.s(), throw=True)
    with pytest.raises(NotRegistered):
        ok.apply(link=app.signature("elsewhere.task"))


def test_handlers_and_signals_are_those_of_a_worker(app: MiniQ) -> None:
    calls: List[str] = []

    class Recording(Task):
        def before_start(self, *args: Any) -> None:
            calls.append("before_start")

        def on_success(self, *args: Any) -> None:
            calls.append("on_success")

        def after_return(self, *args: Any) -> None:
            calls.append("after_return")

    def receiver(signal: Any, **_: Any) -> None:
        calls.append(signal.name)

    for signal in (signals.task_prerun, signals.task_success, signals.task_postrun):
        signal.connect(receiver)
    try:
        app.task(name="t", base=Recording)(lambda: 1).apply()
    finally:
        for signal in (signals.task_prerun, signals.task_success, signals.task_postrun):
            signal.disconnect(receiver)
    assert calls == [
        "task_prerun",
        "before_start",
        "on_success",
        "task_success",
        "after_return",
        "task_postrun",
    ]


def test_ignore_ends_without_a_value(app: MiniQ) -> None:
    @app.task(name="t")
    def act() -> None:
        raise Ignore

    result = act.apply()
    assert (result.state, result.get()) == ("IGNORED", None)


def test_options_reach_the_request(app: MiniQ) -> None:
    @app.task(bind=True, name="t")
    def look(self: Task) -> Any:
        request = self.request
        return (
            request.headers, request.tenant, request.timelimit, request.delivery_info["priority"],
            request.delivery_info["routing_key"], request.shadow, request.loglevel, request.group,
            request.retries,
        )  # fmt: skip

    options: Any = {"time_limit": 5, "priority": 3, "routing_key": "k", "shadow": "s", "group_id": "g"}
    assert look.apply(headers={"tenant": "acme"}, retries=1, loglevel=20, **options).get() == (
        {"tenant": "acme"}, "acme", [5, None], 3, "k", "s", 20, "g", 1,
    )  # fmt: skip


def test_unknown_options_and_what_is_no_signature_are_refused(app: MiniQ) -> None:
    task = app.task(name="t")(lambda: 1)
    with pytest.raises(UnknownOption, match="did you mean 'countdown'"):
        task.apply(contdown=3)
    with pytest.raises(ImproperlyConfigured, match="a group needs a list of tasks"):
        task.apply(link={"task": "celery.group", "subtask_type": "group"})
    with pytest.raises(TypeError, match=r"write t\.s\(\.\.\.\)"):
        task.apply(link=task)


def test_eager_tasks_may_wait_for_each_other(app: MiniQ) -> None:
    inner = app.task(name="inner")(lambda x: x + 1)
    outer = app.task(name="outer")(lambda: inner.apply((1,)).get())
    assert outer.apply().get() == 2


# -- workflows -------------------------------------------------------------------------------------


@pytest.fixture
def tasks(app: MiniQ) -> SimpleNamespace:
    """Tasks to make workflows of; `seen` is what some of them were called with, in order."""
    seen: List[Any] = []

    @app.task(name="add")
    def add(x: Any, y: Any) -> Any:
        seen.append((x, y))
        return x + y

    @app.task(name="total")
    def total(values: Any) -> Any:
        seen.append(values)
        return sum(values)

    @app.task(name="ident")
    def ident(x: Any) -> Any:
        return x

    @app.task(name="boom")
    def boom(*args: Any) -> Any:
        raise ValueError("no")

    @app.task(name="errback")
    def errback(request: Any, exc: BaseException, traceback: Any) -> None:
        seen.append((request.id, type(exc).__name__))

    return SimpleNamespace(add=add, total=total, ident=ident, boom=boom, errback=errback, seen=seen)


def test_a_chain_runs_here_and_its_result_walks_back(app: MiniQ, tasks: Any) -> None:
    result: Any = (tasks.add.s(1, 2) | tasks.add.s(3) | tasks.add.s(4)).apply()
    assert type(result) is EagerResult
    assert (result.get(), result.parent.get(), result.parent.parent.get()) == (10, 6, 3)
    assert result.parent.parent.parent is None
    assert [child.get() for child in result.parent.parent.children] == [6]
    assert [value for _, value in result.parent.parent.collect()] == [3, 6, 10]
    assert nothing_was_sent(app)


def test_a_long_chain_does_not_fill_the_stack(tasks: Any) -> None:
    assert chain(tasks.ident.s(1), *[tasks.add.s(1)] * 400).apply().get() == 401


def test_a_group_gives_its_values_in_order(tasks: Any) -> None:
    result = group(tasks.add.s(i, i) for i in range(3)).apply()
    assert isinstance(result, GroupResult)
    assert all(isinstance(one, EagerResult) for one in result)
    assert (result.get(), result.completed_count(), result.successful()) == ([0, 2, 4], 3, True)
    assert group().apply().get() == []


def test_chords_count_here(tasks: Any) -> None:
    add, total, ident = tasks.add, tasks.total, tasks.ident
    assert chord([add.s(i, i) for i in range(4)], total.s()).apply().get() == 12
    assert (group(add.s(1, 1), add.s(2, 2)) | total.s() | add.s(10)).apply().get() == 16
    nested = chord([add.s(1, 1) | add.s(2), ident.s(5) | group(add.s(5), add.s(6)), ident.s(0)], ident.s())
    assert nested.apply().get() == [4, [10, 11], 0]
    assert chord([], total.s()).apply().get() == 0
    assert (add.s(1, 1) | group(add.s(1), add.s(2)) | total.s()).apply().get() == 7
    assert [one.get() for one in chord([ident.s(1), ident.s(2)], total.s()).apply().parent] == [1, 2]


def test_many_calls_of_one_task_run_here(tasks: Any) -> None:
    assert tasks.add.starmap([(1, 2), (3, 4)]).apply().get() == [3, 7]
    assert tasks.ident.map([1, 2]).apply().get() == [1, 2]
    assert tasks.add.chunks([(i, i) for i in range(5)], 2).apply().get() == [[0, 2], [4, 6], [8]]


def test_a_failed_step_ends_all_after_it(tasks: Any) -> None:
    result = (tasks.boom.s() | tasks.add.s(1) | tasks.add.s(2)).on_error(tasks.errback.s()).apply()
    assert [one.state for one in (result, result.parent, result.parent.parent)] == ["FAILURE"] * 3
    assert tasks.seen == [(result.parent.parent.id, "ValueError")]
    with pytest.raises(ValueError, match="no"):
        result.get()


def test_a_failed_member_fails_the_body_and_its_errback_runs_once(tasks: Any) -> None:
    header = [tasks.boom.s(), tasks.ident.s(1), tasks.boom.s()]
    result = chord(header, tasks.total.s().on_error(tasks.errback.s())).apply()
    with pytest.raises(ChordError, match=r"Dependency .* raised ValueError\('no'\)"):
        result.get()
    assert tasks.seen == [(result.id, "ChordError")]
    outer = chord([chord(header, tasks.total.s()), tasks.ident.s(1)], tasks.total.s()).apply()
    assert (outer.state, outer.parent[0].state, outer.parent[1].state) == ("FAILURE", "FAILURE", "SUCCESS")


def test_throw_ends_a_workflow_with_its_first_failure_and_its_errbacks(tasks: Any) -> None:
    failing = tasks.boom.s().set(link_error=tasks.errback.s())
    with pytest.raises(ValueError, match="no"):
        chord([tasks.add.s(1, 1), failing, tasks.add.s(2, 2)], tasks.total.s()).apply(throw=True)
    assert [seen for seen in tasks.seen if seen[1] != "ValueError"] == [(1, 1)]
    assert len(tasks.seen) == 2
    tasks.boom.app.conf.task_eager_propagates = True
    with pytest.raises(ValueError, match="no"):
        (tasks.boom.s() | tasks.add.s(1)).apply()


def test_members_that_are_ignored_or_go_back_to_a_queue_fail_the_body(app: MiniQ, tasks: Any) -> None:
    @app.task(name="away")
    def away(error: str) -> None:
        raise Ignore if error == "ignore" else Reject("later", requeue=error == "requeue")

    for how in ("ignore", "reject", "requeue"):
        with pytest.raises(ChordError):
            chord([away.s(how), tasks.ident.s(1)], tasks.total.s()).apply().get()
    assert tasks.seen == []


def test_members_that_retry_count_once(app: MiniQ, tasks: Any) -> None:
    @app.task(name="again", bind=True)
    def again(self: Task, x: int) -> int:
        if self.request.retries < 2:
            raise self.retry(countdown=1000)
        return x

    assert chord([again.s(1), again.s(2)], tasks.total.s()).apply().get() == 3


def test_a_task_is_replaced_wherever_it_stands(app: MiniQ, tasks: Any) -> None:
    add, total, ident = tasks.add, tasks.total, tasks.ident

    @app.task(name="replaced", bind=True)
    def replaced(self: Task, kind: str) -> Any:
        kinds: Any = {
            "task": add.s(1, 2),
            "chain": add.s(1, 2) | add.s(3),
            "group": group(add.s(1, 2), add.s(3, 4)),
            "chord": chord([add.s(1, 2), add.s(3, 4)], total.s()),
        }
        raise self.replace(kinds[kind])

    for kind, value in {"task": 3, "chain": 6, "group": [3, 7], "chord": 10}.items():
        result = replaced.apply((kind,), task_id=f"id-{kind}")
        assert (result.id, result.state, result.get()) == (f"id-{kind}", "SUCCESS", value)
        assert (replaced.s(kind) | ident.s() | ident.s()).apply().get() == value
        assert chord([replaced.s(kind), ident.s(0)], ident.s()).apply().get() == [value, 0]
        assert replaced.s(kind).apply(link=ident.s()).get() == value


def test_a_member_adds_a_member(app: MiniQ, tasks: Any) -> None:
    @app.task(name="adding", bind=True)
    def adding(self: Task) -> int:
        assert self.add_to_chord(tasks.ident.s(100)).get() == 100
        return 1

    @app.task(name="lazily", bind=True)
    def lazily(self: Task) -> None:
        self.add_to_chord(tasks.ident.s(100), lazy=True)

    assert chord([adding.s(), tasks.ident.s(10)], tasks.total.s()).apply().get() == 111
    with pytest.raises(ChordError, match="1 of 3 members did not end"):
        chord([lazily.s(), tasks.ident.s(10)], tasks.total.s()).apply().get()


def test_workflows_go_through_the_serializer_step_by_step(app: MiniQ, tasks: Any) -> None:
    add, ident = tasks.add, tasks.ident
    assert (ident.s((1, 2)) | ident.s()).apply().get() == [1, 2]
    assert chord([ident.s((1,)), ident.s((2,))], ident.s()).apply().get() == [[1], [2]]
    with pytest.raises(EncodeError, match=r"chain\[0\]: "):
        (ident.s(object()) | add.s(1)).apply()
    unsendable = app.task(name="unsendable")(lambda: object())
    with pytest.raises(EncodeError):
        (unsendable.s() | ident.s()).apply().get()
    with pytest.raises(ChordError, match="EncodeError"):
        chord([unsendable.s(), ident.s(1)], ident.s()).apply().get()
    assert tasks.seen == []


def test_unknown_tasks_in_a_workflow_are_refused_before_the_first_runs(app: MiniQ, tasks: Any) -> None:
    with pytest.raises(NotRegistered, match=r"chain\[1\].*elsewhere.task"):
        chain(tasks.add.s(1, 1), app.signature("elsewhere.task")).apply()
    assert tasks.seen == []


def test_stamps_reach_every_request(app: MiniQ, tasks: Any) -> None:
    seen: List[Any] = []

    @app.task(name="look", bind=True)
    def look(self: Task, *args: Any) -> None:
        seen.append((self.request.stamped_headers, self.request.stamps))

    sig = look.s() | group(look.s(), look.s() | look.s())
    sig.stamp(tenant="acme")
    sig.apply()
    assert seen == [(["tenant"], {"tenant": "acme"})] * 4


def test_workflows_are_eager_under_the_setting(eager: MiniQ, tasks: Any) -> None:
    add, total = tasks.add, tasks.total
    result = chord([add.s(1, 1), add.s(2, 2)])(total.s())
    assert isinstance(result, EagerResult)
    assert result.get() == 6
    assert ~(add.s(1, 1) | add.s(1)) == 3
    assert group(add.s(1, 1)).delay().get() == [2]
    link = group(tasks.ident.s(), tasks.ident.s()) | total.s()
    assert add.apply_async((1, 1), link=link).children[0].get() == 4
    assert nothing_was_sent(eager)


def test_results_of_workflows_are_stored_when_told_so(eager: MiniQ, tasks: Any) -> None:
    eager.conf.task_store_eager_result = True
    result = chord([tasks.boom.s(), tasks.ident.s(1)], tasks.total.s()).apply_async()
    stored = [eager.AsyncResult(one) for one in (result.id, result.parent[0].id, result.parent[1].id)]
    assert [one.state for one in stored] == ["FAILURE", "FAILURE", "SUCCESS"]


# -- coroutines ------------------------------------------------------------------------------------


def test_coroutines_run_to_their_end_and_their_loop_is_closed(app: MiniQ) -> None:
    loops: List[Any] = []

    @app.task(bind=True, name="t")
    async def act(self: Task, x: int) -> Any:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return x, self.request.id

    assert act.apply((1,), task_id="one").get() == (1, "one")
    assert act.apply((2,), task_id="two").get() == (2, "two")
    assert [loop.is_closed() for loop in loops] == [True, True]
    gc.collect()  # an open loop would warn now


def test_coroutines_can_be_run_from_within_a_loop(app: MiniQ) -> None:
    @app.task(bind=True, name="t")
    async def act(self: Task, x: int) -> Any:
        await asyncio.sleep(0)
        if not x:
            raise ValueError("x")
        return x, self.request.id

    async def main() -> Any:
        return act.apply((1,), task_id="one").get(), act.apply((0,)).state

    assert asyncio.run(main()) == ((1, "one"), "FAILURE")


# -- task_always_eager -----------------------------------------------------------------------------


def test_delay_runs_here_and_sends_nothing(eager: MiniQ) -> None:
    add = eager.task(name="add")(lambda x, y: x + y)
    result = add.delay(2, 3)
    assert isinstance(result, EagerResult)
    assert isinstance(result, AsyncResult)
    assert result.get(timeout=1, interval=0.1, propagate=True, disable_sync_subtasks=False) == 5
    assert nothing_was_sent(eager)


def test_arguments_go_through_the_serializer(eager: MiniQ) -> None:
    kind = eager.task(name="kind")(lambda x: type(x).__name__)
    assert kind.delay((1, 2)).get() == "list"
    assert kind.delay(datetime.date(2024, 1, 2)).get() == "date"
    assert kind.apply_async(({1},), serializer="pickle").get() == "set"
    with pytest.raises(EncodeError):
        kind.delay(object())


def test_arguments_are_checked(eager: MiniQ) -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        eager.task(name="t")(lambda x: x).delay()  # type: ignore[call-overload]
    with pytest.raises(UnknownOption):
        eager.task(name="u")(lambda x: x).apply_async((1,), quueue="x")


def test_times_and_queues_do_not_matter(eager: MiniQ) -> None:
    task = eager.task(name="t")(lambda: 5)
    assert task.apply_async(countdown=1000, queue="x", expires=-1 + 1, producer=eager.producer).get() == 5


@pytest.mark.parametrize("propagates", [False, True])
def test_errors_propagate_when_told_so(eager: MiniQ, propagates: bool) -> None:
    eager.conf.task_eager_propagates = propagates
    boom = eager.task(name="t")(lambda: nope())
    if propagates:
        with pytest.raises(KeyError):
            boom.delay()
    else:
        assert boom.delay().failed()


def test_results_are_stored_when_told_so(eager: MiniQ) -> None:
    @eager.task(bind=True, name="t")
    def act(self: Task) -> int:
        self.update_state(state="PROGRESS", meta=1)
        return 5

    act.apply_async(task_id="one")
    assert not eager.AsyncResult("one").exists()
    eager.conf.task_store_eager_result = True
    act.apply_async(task_id="two")
    assert eager.AsyncResult("two").get(timeout=1) == 5
    act.apply_async(task_id="three", ignore_result=True)
    assert eager.AsyncResult("three").state == "PROGRESS"


def test_signatures_and_subtasks_are_eager_too(eager: MiniQ) -> None:
    add = eager.task(name="add")(lambda x, y: x + y)
    outer = eager.task(name="outer")(lambda: add.delay(1, 2).get())
    assert add.s(1).delay(2).get() == 3
    assert outer.delay().get() == 3
    assert ~add.s(1, 2) == 3


def test_an_eager_result_is_marked_revoked_and_not_pickled(eager: MiniQ) -> None:
    result = eager.task(name="t")(lambda: 5).delay()
    result.forget()
    result.revoke(terminate=True)
    assert result.state == "REVOKED"
    with pytest.raises(TypeError, match="not pickled"):
        result.__reduce__()

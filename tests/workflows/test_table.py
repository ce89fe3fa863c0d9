# SPDX-License-Identifier: MIT
"""Workflows case by case, each with a worker: what every form of canvas does, and what becomes of failures.

Most cases run over memory and SQLite, some over every pair of broker and result store.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any, Callable, List

import pytest
from table_stage import NOBODY, TIMEOUT_S, Stage, first_of
from waiting import wait_until

from miniq import GroupResult, MiniQ, chain, chord, chunks, group, signature
from miniq.backends.base import ChordPart
from miniq.backends.rpc_chords import ChordQueues
from miniq.canvas import StampingVisitor
from miniq.exceptions import ChordError, EncodeError, ImproperlyConfigured, TaskRevokedError, UnknownOption
from miniq.flow import part_of
from miniq.plan import Plan
from miniq.task import Context

_serial = itertools.count(1)

NEAR = ("memory", "sqlite")
FAR = ("redis", "rabbit+redis", "rabbit+rpc")
#: For a case that is played over every pair.
everywhere = pytest.mark.parametrize("stage", NEAR + FAR, indirect=True)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture(params=NEAR)
def stage(request: pytest.FixtureRequest, make_app: Callable[..., MiniQ]) -> Stage:
    """An app with tasks, over the pair of stores that is the parameter; no worker yet."""

    def url(fixture: str) -> str:
        return str(request.getfixturevalue(fixture))

    kind = request.param
    if kind == "memory":
        broker = backend = f"memory://table{next(_serial)}"
    elif kind == "files":
        broker, backend = f"memory://table{next(_serial)}", f"file://{url('tmp_path')}/results"
        Path(backend[len("file://") :]).mkdir()
    elif kind == "rabbit+redis":
        broker, backend = url("rabbit_url"), url("redis_url")
    elif kind == "rabbit+rpc":
        broker, backend = url("rabbit_url"), "rpc://"
    else:
        broker = backend = url(f"{kind}_url")
    return Stage(make_app("table", broker=broker, backend=backend))


# -- signatures ------------------------------------------------------------------------------------


def test_arguments_of_the_call_go_first_and_its_keywords_and_options_win(stage: Stage) -> None:
    note = stage.tasks.note
    with stage.worker():
        note.s(2, key="old", other=1).apply_async((1,), {"key": "new"}, task_id="given").get(TIMEOUT_S)
        note.s(2).delay(1).get(TIMEOUT_S)
        note.si(2).delay(1).get(TIMEOUT_S)
        assert stage.app.AsyncResult("given").successful()
    assert stage.seen == [("note", 1, 2, ("key", "new"), ("other", 1)), ("note", 1, 2), ("note", 2)]


def test_signatures_vary_freeze_and_travel_as_json(stage: Stage) -> None:
    add = stage.tasks.add
    with stage.worker():
        assert add.s(1).clone((5,)).delay().get(TIMEOUT_S) == 6
        assert add.s(1, 1).replace(args=(2, 2)).delay().get(TIMEOUT_S) == 4
        frozen = add.s(1, 2)
        result = frozen.freeze("frozen")
        assert (frozen.delay().id, result.get(TIMEOUT_S)) == ("frozen", 3)
        assert ~add.s(4, 4) == 8
        assert add.s(4)(5) == 9  # inline
        workflow = chord([add.s(1), add.s(2) | add.s(3)], stage.tasks.total.s()) | add.s(10)
        told = json.loads(json.dumps(workflow))
        assert signature(told, app=stage.app).delay(1).get(TIMEOUT_S) == 18
        assert told == json.loads(json.dumps(workflow))


def test_callbacks_and_theirs_run_after_success_and_errbacks_after_failure(stage: Stage) -> None:
    add, note, fail = stage.tasks.add, stage.tasks.note, stage.tasks.fail
    linked = add.s(1, 1)
    linked.link(add.s(1)).link(note.s("last"))
    assert [one.task for one in linked.flatten_links()] == ["add", "add", "note"]
    linked.link_error(stage.tasks.by_id.s())
    with stage.worker():
        linked.delay().get(TIMEOUT_S)
        failed = fail.s().on_error(stage.tasks.by_id.s()).on_error(stage.tasks.errback.s())
        failed.link(note.s("never"))
        failed = failed.delay()
        assert isinstance(stage.error(failed), ValueError)
    assert sorted(map(str, stage.seen)) == sorted(
        map(str, [("note", 3, "last"), ("by_id", failed.id), ("errback", failed.id, "ValueError")])
    )


# -- chains ----------------------------------------------------------------------------------------


@everywhere
def test_a_chain_hands_each_value_to_the_next_step(stage: Stage) -> None:
    add = stage.tasks.add
    with stage.worker():
        nested = chain(add.s(1), chain(add.s(2), chain(add.s(3))), add.s(4) | add.s(5))
        assert nested.delay(1).get(TIMEOUT_S) == 16
        result = chain(add.s(1, 2), add.si(5, 5), add.s(4))()
        assert result.get(TIMEOUT_S) == 14


def test_a_chains_result_is_that_of_its_last_step_and_walks_back(stage: Stage) -> None:
    add = stage.tasks.add
    with stage.worker():
        result = chain(add.s(1, 2), add.s(3), add.s(4)).apply_async(task_id="last")
        assert (result.id, result.get(TIMEOUT_S)) == ("last", 10)
        assert [one.get(TIMEOUT_S) for one in (result.parent, result.parent.parent)] == [6, 3]
        first = result.parent.parent
        assert first.parent is None
        assert first.children == [result.parent]
        stage.wait_idle()
        assert [value for _, value in first.collect()] == [3, 6, 10]
        assert len(first.graph) == 3
        again = stage.app.AsyncResult(first.id)
        assert again.children[0].children[0].get(TIMEOUT_S) == 10
    assert chain().apply_async() is None


def test_root_and_parent_are_told_to_every_step(stage: Stage) -> None:
    family = stage.tasks.family
    with stage.worker():
        result = (family.s(0) | family.s() | group(family.s(), family.s())).apply_async()
        members = result.get(TIMEOUT_S)
        first, second = result.parent.parent.id, result.parent.id
    assert [tuple(one) for one in members] == [(one.id, first, second) for one in result]


def test_the_callbacks_of_a_chain_are_its_last_steps_and_its_errbacks_are_all_steps(stage: Stage) -> None:
    add, fail, note, by_id = stage.tasks.add, stage.tasks.fail, stage.tasks.note, stage.tasks.by_id
    with stage.worker():
        good = (add.s(1, 1) | add.s(1)).apply_async(link=note.s(), link_error=by_id.s())
        assert good.get(TIMEOUT_S) == 3
        stage.wait_idle()
        assert stage.seen == [("note", 3)]
        bad = (add.s(1, 1) | fail.s() | add.s(1)).on_error(by_id.s()).apply_async(link=note.s())
        assert isinstance(stage.error(bad), ValueError)
    assert stage.seen[1:] == [("by_id", bad.parent.id)]


@everywhere
def test_a_failed_step_ends_all_after_it_with_the_same_error(stage: Stage) -> None:
    fail, note = stage.tasks.fail, stage.tasks.note
    with stage.worker():
        result = (fail.s() | note.s() | group(note.s(), note.s())).apply_async()
        assert isinstance(stage.error(result), ValueError)
        for one in (result[0], result[1], result.parent):
            assert isinstance(stage.error(one), ValueError)
        hopeless = (stage.tasks.hopeless.s() | note.s()).apply_async()
        assert isinstance(stage.error(hopeless), ValueError)
    assert stage.seen == []


@everywhere
def test_a_chain_of_200_steps_ends_and_its_messages_shrink(stage: Stage) -> None:
    add = stage.tasks.add
    workflow = chain(add.s(0, 0), *[add.s(1)] * 199)
    (step,) = workflow.plan().steps
    body = stage.app.prepare_step(step).message.body
    assert len(body) < 200 * 400
    with stage.worker():
        assert workflow.delay().get(TIMEOUT_S) == 199


# -- groups ----------------------------------------------------------------------------------------


@everywhere
def test_a_group_gives_its_values_in_the_order_written(stage: Stage) -> None:
    add, flaky = stage.tasks.add, stage.tasks.flaky
    with stage.worker():
        result = group(flaky.s(0, 2), add.s(1, 0), group(add.s(2, 0), group(add.s(3, 0))))()
        assert isinstance(result, GroupResult)
        assert result.get(timeout=TIMEOUT_S) == [0, 1, 2, 3]
        assert (len(result), result.completed_count(), result.successful()) == (4, 4, True)
        assert group(add.s(i) for i in range(3)).delay(10).get(timeout=TIMEOUT_S) == [10, 11, 12]


def test_small_and_empty_groups(stage: Stage) -> None:
    add = stage.tasks.add
    with stage.worker():
        assert group().apply_async().get(timeout=TIMEOUT_S) == []
        assert group([add.s(1, 1)]).apply_async().get(timeout=TIMEOUT_S) == [2]
        assert chain(add.s(1, 1), group(add.s(1)), add.s(1)).apply_async().get(TIMEOUT_S) == 4
        assert chain(add.s(1, 1), group(), add.s(1)).apply_async().get(TIMEOUT_S) == 3


def test_callbacks_of_a_group(stage: Stage) -> None:
    ident, fail, note, by_id = stage.tasks.ident, stage.tasks.fail, stage.tasks.note, stage.tasks.by_id
    with stage.worker():
        linked = group(ident.s(1), ident.s(2))
        linked.link(note.s("own"))
        linked.apply_async().get(timeout=TIMEOUT_S)
        stage.wait_idle()
        assert stage.seen == [("note", "own")]
        failing = group(fail.s(), fail.s())
        failing.link_error(by_id.s())
        result = failing.apply_async()
        assert [stage.state(one) for one in result] == ["FAILURE", "FAILURE"]
    assert {one.id for one in result} == {task_id for _, task_id in stage.seen[1:]}
    with pytest.raises(TypeError, match="chord"):
        group(ident.s(1), ident.s(2)).apply_async(link=note.s())


def test_skew_delays_the_members_one_after_the_other(stage: Stage) -> None:
    ident = stage.tasks.ident
    skewed = group(ident.s(i) for i in range(4)).skew(start=0.125, stop=0.375, step=0.125)
    assert [one.options["countdown"] for one in skewed.tasks] == [0.125, 0.25, 0.375, 0.375]
    with stage.worker():
        begun = time.monotonic()
        assert skewed.apply_async().get(timeout=TIMEOUT_S) == [0, 1, 2, 3]
        assert time.monotonic() - begun >= 0.25


def test_groups_in_a_row(stage: Stage) -> None:
    add, ident = stage.tasks.add, stage.tasks.ident
    with stage.worker():
        both = group(add.s(1, 1), add.s(2, 2)) | group(ident.s(), stage.tasks.total.s())
        assert both.apply_async().get(timeout=TIMEOUT_S) == [[2, 4], 6]
        spread = add.s(1, 1) | group(add.s(1), add.s(2) | add.s(10))
        assert spread.apply_async().get(timeout=TIMEOUT_S) == [3, 14]


# -- chords ----------------------------------------------------------------------------------------


@everywhere
def test_a_body_gets_the_values_of_its_header_in_order_and_runs_once(stage: Stage) -> None:
    add, total = stage.tasks.add, stage.tasks.total
    with stage.worker():
        header = [stage.tasks.flaky.s(7, 1), *(add.s(i, i) for i in range(5))]
        assert chord(header)(total.s()).get(timeout=TIMEOUT_S) == 27
        piped = group(add.s(1, 1), add.s(2, 2)) | total.s() | add.s(4)
        assert piped.apply_async().get(timeout=TIMEOUT_S) == 10
    assert first_of(stage.seen, "total") == [([7, 0, 2, 4, 6, 8],), ([2, 4],)]


@everywhere
def test_nested_chords_end(stage: Stage) -> None:
    add, total, ident = stage.tasks.add, stage.tasks.total, stage.tasks.ident
    inner = chord([add.s(1, 1), add.s(2, 2)], total.s())
    with stage.worker():
        deep = chord([inner, inner | add.s(1), ident.s(3) | group(add.s(1), add.s(2))], ident.s())
        bodies = chord([ident.s(1), ident.s(2)], total.s() | group(add.s(1), add.s(2)) | total.s() | add.s(1))
        of_groups = chord([ident.s(1), ident.s(2)], group(ident.s(), total.s()))
        results = [sig.apply_async() for sig in (deep, bodies, of_groups)]
        assert results[0].get(timeout=TIMEOUT_S) == [6, 7, [4, 5]]
        assert results[1].get(timeout=TIMEOUT_S) == 10
        assert results[2].get(timeout=TIMEOUT_S) == [[1, 2], 3]


def test_a_chord_with_nothing_in_its_header_runs_its_body(stage: Stage) -> None:
    with stage.worker():
        assert chord([], stage.tasks.total.s()).apply_async().get(timeout=TIMEOUT_S) == 0
        chained = stage.tasks.ident.s(1) | chord([], stage.tasks.total.si([5]))
        assert chained.apply_async().get(timeout=TIMEOUT_S) == 5


def test_ids_callbacks_and_delays_of_a_chord(stage: Stage) -> None:
    ident, total, note = stage.tasks.ident, stage.tasks.total, stage.tasks.note
    with stage.worker():
        begun = time.monotonic()
        sig = chord([ident.s(1), ident.s(2)], total.s())
        sig.link(note.s("after"))
        result = sig.apply_async(task_id="body", countdown=0.2)
        assert (result.id, result.get(timeout=TIMEOUT_S)) == ("body", 3)
        assert 0.2 <= time.monotonic() - begun < TIMEOUT_S
        assert isinstance(result.parent, GroupResult)
        assert result.parent.get(timeout=TIMEOUT_S) == [1, 2]
    assert stage.seen == [("total", [1, 2]), ("note", 3, "after")]


def test_the_header_of_a_chord_is_counted_and_no_message_looks_after_it(stage: Stage) -> None:
    plan = chord([stage.tasks.ident.s(1), stage.tasks.ident.s(2)], stage.tasks.total.s()).plan()
    assert [step.task for step in plan.steps] == ["ident", "ident"]
    assert [start.size for start in plan.chords] == [2]


@pytest.mark.parametrize("stage", ["files"], indirect=True)
def test_a_store_that_cannot_count_is_asked_by_a_task_and_the_chord_ends_all_the_same(stage: Stage) -> None:
    ident, total, fail = stage.tasks.ident, stage.tasks.total, stage.tasks.fail
    sig = chord([ident.s(1), ident.s(2)], total.s())
    assert [step.task for step in sig.plan().steps] == ["celery.chord_unlock", "ident", "ident"]
    with stage.worker():
        good = sig.apply_async()
        bad = chord([ident.s(1), fail.s()], total.s().on_error(stage.tasks.errback.s())).apply_async()
        assert good.get(timeout=TIMEOUT_S) == 3
        assert isinstance(stage.error(bad), ChordError)
    assert sorted(stage.seen) == [("errback", bad.id, "ChordError"), ("total", [1, 2])]


@pytest.mark.parametrize("stage", ["rabbit+rpc"], indirect=True)
def test_where_results_are_messages_a_task_watches_a_chord_whose_members_know_their_number(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miniq.plan.WATCH_S", 0.1)
    stage.app.conf.result_chord_expires = 1.5
    ident, total, errback = stage.tasks.ident, stage.tasks.total, stage.tasks.errback
    backend = stage.app.backend
    assert isinstance(backend, ChordQueues)

    def made(size: int) -> Plan:
        members = [ident.s(n).set(queue=NOBODY) for n in range(size)]
        found = chord(members, total.s().set(queue="celery").on_error(errback.s())).plan()
        unlock, first = found.steps[:2]
        assert (unlock.task, len(found.steps)) == ("celery.chord_unlock", size + 1)
        assert unlock.kwargs["result"] is None
        assert [unlock.options["countdown"], unlock.options["queue"]] == [0.1, NOBODY]
        unlock.options["queue"] = "celery"
        assert first.options["chord"]["chord_size"] == size == found.chords[0].size
        return found

    with stage.worker():
        # All have ended, and who was to send the body has died.
        done = made(2)
        result = stage.app.send_plan(done._replace(steps=done.steps[:1]))
        dying = stage.app.new_backend()
        for index, task_id in enumerate(done.chords[0].members):
            context = Context(id=task_id, group=done.chords[0].group_id, group_index=index, chord={})
            arrival = dying.arrive_at_chord(ChordPart(*part_of(context, "SUCCESS", 10 + index, "json", None)))
        assert arrival.claim
        dying.close()
        assert result.get(timeout=TIMEOUT_S) == 21
        wait_until(lambda: not backend.has_chord(done.chords[0].group_id), TIMEOUT_S, "the chord has ended")
        # A member never comes.
        late = stage.app.send_plan(made(1))
        error = stage.error(late)
        assert isinstance(error, ChordError)
        assert "not all of its 1 members ended in time" in str(error)
    assert stage.seen == [("total", [10, 11]), ("errback", late.id, "ChordError")]


# -- failures in headers ---------------------------------------------------------------------------


@everywhere
def test_a_failed_member_fails_the_body_once_and_the_others_run_on(stage: Stage) -> None:
    ident, fail, total, errback = stage.tasks.ident, stage.tasks.fail, stage.tasks.total, stage.tasks.errback
    with stage.worker():
        header = [fail.s(), ident.s(1) | ident.s(), fail.s()]
        result = chord(header, total.s().on_error(errback.s())).apply_async()
        error = stage.error(result)
        assert isinstance(error, ChordError)
        assert str(error) == f"Dependency {result.parent[0].id} raised ValueError('no')"
        assert result.parent[1].get(timeout=TIMEOUT_S) == 1
    assert stage.seen == [("errback", result.id, "ChordError")]


@pytest.mark.parametrize("how", ["ignoring", "rejecting", "hopeless", "strange", "unsendable", "unknown"])
def test_a_member_without_a_value_fails_the_body(stage: Stage, how: str) -> None:
    tasks = stage.tasks
    member = signature("elsewhere.task", app=stage.app) if how == "unknown" else getattr(tasks, how).s()
    with stage.worker():
        body = tasks.total.s().on_error(tasks.errback.s())
        result = chord([tasks.ident.s(1), member], body).apply_async()
        assert isinstance(stage.error(result), ChordError)
        chained = chord([tasks.ident.s(1), member | tasks.ident.s()], body).apply_async()
        assert isinstance(stage.error(chained), ChordError)
    assert stage.seen == [("errback", one.id, "ChordError") for one in (result, chained)]


@everywhere
def test_revoked_and_expired_members_fail_the_body(stage: Stage) -> None:
    tasks = stage.tasks
    body = tasks.total.s().on_error(tasks.errback.s())
    revoked = chord([tasks.ident.s(1), tasks.note.s().set(task_id="revoked")], body).apply_async()
    stage.app.AsyncResult("revoked").revoke()
    expired = chord([tasks.ident.s(1), tasks.note.s().set(countdown=0.01, expires=0.001)], body).apply_async()
    time.sleep(0.02)  # until it has expired, whoever looks at it
    with stage.worker():
        assert isinstance(stage.error(revoked), ChordError)
        assert isinstance(stage.error(expired), ChordError)
        with pytest.raises(TaskRevokedError):
            revoked.parent[1].get(timeout=TIMEOUT_S)
    assert sorted(stage.seen) == sorted(("errback", one.id, "ChordError") for one in (revoked, expired))


def test_members_over_their_time_limit_fail_the_body(stage: Stage) -> None:
    tasks = stage.tasks
    with stage.worker():
        for limit in ({"soft_time_limit": 0.05}, {"time_limit": 0.05}):
            sleeping = tasks.sleeping.s(0.5).set(**limit)
            result = chord([tasks.ident.s(1), sleeping], tasks.total.s()).apply_async()
            assert "TimeLimitExceeded" in str(stage.error(result))


KILLED = """
    import os, signal
    from miniq import MiniQ

    app = MiniQ("proj")

    @app.task(name="dying")
    def dying(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    @app.task(name="ident")
    def ident(x):
        return x
"""


@needs_fork
@pytest.mark.parametrize("stage", ["sqlite"], indirect=True)
def test_a_member_whose_process_is_killed_fails_the_body(stage: Stage, worker_process: Any) -> None:
    tasks = stage.tasks
    worker_process(KILLED, "-P", "prefork", "-c", "1")
    result = chord([tasks.ident.s(1), tasks.dying.s()], tasks.ident.s()).apply_async()
    assert "WorkerLostError" in str(stage.error(result))
    chained = (tasks.dying.s() | tasks.ident.s()).apply_async()
    assert type(stage.error(chained)).__name__ == "WorkerLostError"
    stage.wait_idle()


def test_failures_go_up_through_nested_chords(stage: Stage) -> None:
    tasks = stage.tasks
    inner = chord([tasks.fail.s(), tasks.ident.s(1)], tasks.total.s())
    with stage.worker():
        outer = chord([inner, tasks.ident.s(2)], tasks.total.s().on_error(tasks.errback.s()))
        result = (outer | tasks.ident.s() | tasks.ident.s()).apply_async()
        assert isinstance(stage.error(result), ChordError)
        body = result.parent.parent
        assert [one.state for one in (body, body.parent[0], body.parent[1])] == [
            "FAILURE", "FAILURE", "SUCCESS",
        ]  # fmt: skip
    assert stage.seen == [("errback", body.id, "ChordError")]


def test_an_errback_of_a_chord_reaches_its_members_where_that_is_set(stage: Stage) -> None:
    stage.app.conf.task_allow_error_cb_on_chord_header = True
    tasks = stage.tasks
    sig = chord([tasks.fail.s(), tasks.ident.s(1)], tasks.total.s())
    sig.link_error(tasks.errback.s())
    with stage.worker():
        result = sig.apply_async()
        assert isinstance(stage.error(result), ChordError)
        member = result.parent[0].id
    assert sorted(stage.seen) == sorted(
        [("errback", member, "ValueError"), ("errback", result.id, "ChordError")]
    )


@everywhere
def test_a_member_that_is_delivered_twice_counts_once(stage: Stage) -> None:
    add, total = stage.tasks.add, stage.tasks.total
    plan = chord([add.s(i, i) for i in range(3)], total.s()).plan()
    members = [step for step in plan.steps if step.task == "add"]
    twice = Plan([*members[:2], *plan.steps, *members], plan.chords, plan.result)
    with stage.worker():
        result = stage.app.send_plan(twice)
        assert result.get(timeout=TIMEOUT_S) == 6
    assert stage.seen == [("total", [0, 2, 4])]


# -- replace, add_to_chord ---------------------------------------------------------------------------


REPLACED = {"task": 3, "chain": 6, "group": [3, 7], "chord": 10, "itself": 3}


@everywhere
def test_a_replaced_task_has_its_value_from_what_runs_instead(stage: Stage) -> None:
    replaced, ident = stage.tasks.replaced, stage.tasks.ident
    with stage.worker():
        sent = []
        for kind, value in REPLACED.items():
            sent.append((replaced.apply_async((kind,), task_id=f"id-{kind}"), value))
            sent.append(((replaced.s(kind) | ident.s() | ident.s()).apply_async(), value))
            header = chord([ident.s(0), replaced.s(kind), replaced.s(kind) | ident.s()], ident.s())
            sent.append((header.apply_async(), [0, value, value]))
        for result, value in sent:
            assert result.get(timeout=TIMEOUT_S) == value
    assert sent[0][0].id == "id-task"


def test_callbacks_of_a_replaced_task_are_those_of_what_runs_instead(stage: Stage) -> None:
    tasks = stage.tasks
    with stage.worker():
        for kind, value in REPLACED.items():
            sig = tasks.replaced.s(kind)
            sig.link(tasks.note.s(kind))
            assert sig.apply_async().get(timeout=TIMEOUT_S) == value
        stage.wait_idle()
        assert first_of(stage.seen, "note") == [(value, kind) for kind, value in REPLACED.items()]
        stage.seen.clear()
        result = tasks.replaced.apply_async(("failing",), link_error=tasks.errback.s())
        assert isinstance(stage.error(result), ValueError)
        in_chord = chord([tasks.ident.s(1), tasks.replaced.s("failing")], tasks.total.s()).apply_async()
        assert isinstance(stage.error(in_chord), ChordError)
    assert stage.seen == [("errback", result.id, "ValueError")]


@everywhere
def test_a_member_adds_members(stage: Stage) -> None:
    tasks = stage.tasks
    with stage.worker():
        result = chord([tasks.adding.s(1), tasks.adding.s(2), tasks.ident.s(5)], tasks.total.s())()
        assert result.get(timeout=TIMEOUT_S) == 308
        error = stage.error(tasks.adding.delay(1))
        assert isinstance(error, ValueError)
        assert "not member of any chord" in str(error)
    ((values,),) = first_of(stage.seen, "total")
    assert (values[:3], sorted(values[3:])) == ([1, 2, 5], [100, 200])


# -- many calls of one task --------------------------------------------------------------------------


@everywhere
def test_map_starmap_and_chunks(stage: Stage) -> None:
    add, ident = stage.tasks.add, stage.tasks.ident
    with stage.worker():
        assert ident.map([1, 2, 3]).delay().get(timeout=TIMEOUT_S) == [1, 2, 3]
        assert add.starmap([(1, 2), (3, 4)]).delay().get(timeout=TIMEOUT_S) == [3, 7]
        in_pieces = add.chunks([(i, i) for i in range(5)], 2)
        assert in_pieces().get(timeout=TIMEOUT_S) == [[0, 2], [4, 6], [8]]
        assert chunks.apply_chunks(add, [(1, 1)], 5).get(timeout=TIMEOUT_S) == [[2]]
        assert (in_pieces | ident.s()).apply_async().get(timeout=TIMEOUT_S) == [[0, 2], [4, 6], [8]]


# -- stamps ------------------------------------------------------------------------------------------


class Tenant(StampingVisitor):
    """Stamps every task."""

    def on_signature(self, sig: Any, **headers: Any) -> Any:
        return {"tenant": "acme", "stamped_headers": ["tenant"]}


@everywhere
def test_stamps_reach_every_message_and_the_results(stage: Stage) -> None:
    stage.app.conf.result_extended = True
    stamped = stage.tasks.stamped
    with stage.worker():
        sig = chord([stamped.s(), stamped.s() | stamped.s()], stamped.s())
        sig.stamp(Tenant())
        result = sig.apply_async()
        result.get(timeout=TIMEOUT_S)
        meta = result._meta()
        assert (meta["stamped_headers"], meta["tenant"]) == (["tenant"], "acme")
        (stamped.s() | stamped.s()).stamp(team="a").apply_async().get(timeout=TIMEOUT_S)
    assert stage.seen == [
        *[("stamped", ["tenant"], {"tenant": "acme"})] * 4,
        *[("stamped", ["team"], {"team": "a"})] * 2,
    ]


# -- what is refused before anything is sent ---------------------------------------------------------


def _nested(sig: Any, depth: int) -> Any:
    for _ in range(depth):
        sig = {**group(), "kwargs": {"tasks": [sig]}}
    return sig


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda t: chain(t.ident.s(1), t.add.s(object())), EncodeError, r"chain\[0\]"),
        (lambda t: group(t.ident.s(1), t.ident.s(object())), EncodeError, r"group\[1\]"),
        (lambda t: chord([t.ident.s(1)], t.note.s(object())), EncodeError, r"header\[0\]"),
        (lambda t: group(t.ident.s(1), t.ident.s(2).set(quue="x")), UnknownOption, r"group\[1\].*quue"),
        (lambda t: chord([t.ident.s(1)]), ImproperlyConfigured, "body"),
        (lambda t: signature(_nested(t.ident.s(1), 500)), ValueError, "nested"),
        (lambda t: group(t.ident.s(1), t.ident.s(2).set(queue="nope")), Exception, "nope"),
    ],
)
def test_a_workflow_that_cannot_be_sent_is_refused_before_its_first_message(
    stage: Stage, make: Any, error: Any, match: str
) -> None:
    stage.app.conf.task_create_missing_queues = False
    with pytest.raises(error, match=match):
        make(stage.tasks).apply_async()
    assert not any(stage.left())


def test_what_is_no_signature_is_refused_where_it_is_written(stage: Stage) -> None:
    add = stage.tasks.add
    for kind, parts in ((chain, (add.s(1, 1), 5)), (group, (add,)), (chord, ([add.s(1), None], add.s()))):
        with pytest.raises(TypeError, match="no signature"):
            kind(*parts)
    with pytest.raises(TypeError):
        add.s(1) | 5


# -- results -----------------------------------------------------------------------------------------


def test_waiting_inside_a_task_raises_unless_allowed(stage: Stage) -> None:
    waiting = stage.tasks.waiting
    with stage.worker():
        error = stage.error(waiting.delay("forbidden"))
        assert isinstance(error, RuntimeError)
        assert "within a task" in str(error)
        assert waiting.delay("allowed").get(timeout=TIMEOUT_S) == 1


def test_getting_an_ignored_result_says_so_at_once(stage: Stage) -> None:
    silent = stage.tasks.silent
    with stage.worker():
        for result in (silent.delay(1), stage.tasks.ident.apply_async((1,), ignore_result=True)):
            with pytest.raises(ImproperlyConfigured, match="ignored"):
                result.get()


def test_members_that_ignore_their_results_count_all_the_same(stage: Stage) -> None:
    with stage.worker():
        header = [stage.tasks.silent.s(1), stage.tasks.ident.s(2).set(ignore_result=True)]
        assert chord(header, stage.tasks.total.s()).apply_async().get(timeout=TIMEOUT_S) == 3


def test_what_was_never_sent_does_not_exist(stage: Stage) -> None:
    with stage.worker():
        result = stage.tasks.ident.delay(1)
        result.get(timeout=TIMEOUT_S)
        assert result.exists()
    assert not stage.app.AsyncResult("never-sent").exists()
    assert stage.app.AsyncResult("never-sent").state == "PENDING"


def test_exceptions_come_back_under_their_name_with_the_workers_traceback(stage: Stage) -> None:
    with stage.worker():
        error = stage.error(stage.tasks.strange.delay())
        assert type(error).__name__ == "Strange"
        assert "code 7: odd" in str(error)
        assert "in strange" in str(error.__cause__)


def test_results_of_nested_groups_are_got_saved_and_restored(stage: Stage) -> None:
    add, ident = stage.tasks.add, stage.tasks.ident
    with stage.worker():
        result = (ident.s(1) | group(add.s(1), ident.s() | group(add.s(2), add.s(3)))).apply_async()
        assert result.get(timeout=TIMEOUT_S) == [2, [3, 4]]
        result.save()
        again = stage.app.GroupResult.restore(result.id)
        assert again == result
        assert again.get(timeout=TIMEOUT_S) == [2, [3, 4]]
        assert again.as_tuple() == result.as_tuple()
        assert result.parent.get(timeout=TIMEOUT_S) == 1


def test_messages_of_nested_workflows_grow_with_their_size_only(stage: Stage) -> None:
    ident, total = stage.tasks.ident, stage.tasks.total

    def size(depth: int) -> int:
        sig: Any = ident.s(1)
        for _ in range(depth):
            sig = chord([sig, ident.s(1)], total.s())
        return sum(len(stage.app.prepare_step(step).message.body) for step in sig.plan().steps)

    sizes: List[int] = [size(depth) for depth in (4, 8, 16)]
    # Each level has a member of its own, which carries the bodies of those around it.
    assert sizes[2] - sizes[1] < 5 * (sizes[1] - sizes[0])
    long = [chain(ident.s(1), *[ident.s()] * count).plan().steps for count in (100, 200)]
    short, double = (len(stage.app.prepare_step(steps[0]).message.body) for steps in long)
    assert double < 2.1 * short


def test_a_workflow_waits_in_the_queue_it_was_given(stage: Stage) -> None:
    ident = stage.tasks.ident
    group(ident.s(1), ident.s(2)).apply_async(queue=NOBODY)
    wait_until(lambda: stage.left(NOBODY)[:1] == [2], TIMEOUT_S, "both messages wait")

# SPDX-License-Identifier: MIT
"""Workflows whose parts are run by workers of both kinds, whoever sent them."""

from __future__ import annotations

import base64
import json
import re
import uuid
from typing import Any, Callable, Dict, List, Sequence

import pytest
from classes_of_both import Refused
from interop_fleet import (
    CROSSINGS,
    STORES,
    TIMEOUT_S,
    Fleet,
    Pair,
    Side,
    error_of,
    get,
    new_key,
    skip_without_celery,
)
from waiting import wait_until

skip_without_celery()

everywhere = pytest.mark.over(*STORES)
#: Chords need it; miniq's and Celery's workers count their members together.
with_results_kept = pytest.mark.over("redis", "amqp+redis")
#: Seconds that a task is put off.
LATER_S = 0.6
KINDS = ("celery", "miniq")


@pytest.fixture(params=CROSSINGS, ids="-".join)
def crossing(request: pytest.FixtureRequest, fleet: Fleet) -> Pair:
    """A caller, and two workers that take turns."""
    return fleet.pair(request.param)


def counters(fleet: Fleet, group_id: str) -> Dict[str, Any]:
    """Return what Redis has of a chord: kind of key -> its value, or how many are in it."""
    key = f"celery-taskset-meta-{group_id}"
    found = {
        "s": fleet.ask_results("GET", f"{key}.s"),
        "t": fleet.ask_results("GET", f"{key}.t"),
        "c": fleet.ask_results("GET", f"{key}.c"),
        "j": fleet.ask_results("ZCARD", f"{key}.j"),
        "d": fleet.ask_results("SCARD", f"{key}.d"),
    }
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def own_error(result: Any) -> BaseException:
    """Wait for a failure; return the exception of the task itself, not that of one before it."""
    with pytest.raises(Exception) as caught:
        result.get(timeout=TIMEOUT_S, follow_parents=False)
    return caught.value


#: Of a chord that is over.
OVER = {"s": None, "t": None, "c": "done", "j": 0, "d": 0}


def check_over(pair: Pair, group_id: str, key: str) -> None:
    """Check that a chord's body ran once, and that nothing of the chord is left."""
    over = lambda: counters(pair.fleet, group_id) == OVER  # noqa: E731
    wait_until(over, TIMEOUT_S, lambda: f"it is over: {counters(pair.fleet, group_id)}")
    assert len(pair.journal.of(key)) == 1


# -- chains --------------------------------------------------------------------------------------


@everywhere
def test_steps_of_a_chain_take_turns(crossing: Pair) -> None:
    c, chain = crossing, crossing.client.canvas.chain
    result = chain(c.here("who", 1), c.there("who"), c.here("who"), c.there("who")).apply_async()
    assert get(result) == [c.other, [c.worker, [c.other, [c.worker, 1]]]]
    if c.fleet.store != "amqp+rpc":
        assert get(result.parent.parent) == [c.other, [c.worker, 1]]
        get(result.parent)
        assert [child.id for child in result.parent.children] == [result.id]
    assert result.parent.parent.parent.parent is None


def test_steps_of_a_chain_know_where_they_stand(crossing: Pair) -> None:
    c = crossing
    steps = [c.here("place"), c.there("place", immutable=True), c.here("place", immutable=True)]
    result = c.client.canvas.chain(*steps).apply_async()
    last = get(result)
    ids = [result.parent.parent.id, result.parent.id, result.id]
    assert [last["root_id"], last["parent_id"], last["id"]] == ids
    second = get(result.parent)
    assert [second["root_id"], second["parent_id"], second["id"]] == [ids[0], *ids[:2]]


@everywhere
def test_a_chain_ends_with_the_step_that_fails(crossing: Pair) -> None:
    c, key = crossing, new_key()
    steps = [c.here("add", 1, 1), c.there("fail", "both", immutable=True), c.here("note", key)]
    result = c.client.canvas.chain(*steps, c.there("who")).apply_async(link_error=c.here("errback"))
    failed = result.parent.parent
    assert type(error_of(failed)) is Refused
    ((kind, _, _, _, word),) = c.started(failed.id)
    assert (kind, word) == (c.worker, "errback")
    if c.fleet.store != "amqp+rpc":
        wait_until(lambda: result.state == "FAILURE", TIMEOUT_S, "the last step has failed")
        assert [one.state for one in (result.parent, failed.parent)] == ["FAILURE", "SUCCESS"]
        with pytest.raises(Refused, match="too late"):
            get(result)
    assert c.journal.of(key) == []
    assert len(c.journal.of(failed.id)) == 1


def test_callbacks_may_be_workflows(crossing: Pair) -> None:
    c, canvas, key = crossing, crossing.client.canvas, new_key()
    ids = [new_key(), new_key()]
    callbacks = [
        canvas.chain(c.there("add", 10), c.here("who").set(task_id=ids[0])),
        canvas.chord(
            [c.here("add", 1), c.there("add", 2)], c.there("collect", key).set(task_id=ids[1])
        ),
    ]
    result = c.here("add", 2, 3).apply_async(link=callbacks)
    assert get(result) == 5
    assert get(c.client.app.AsyncResult(ids[0])) == [c.worker, 15]
    assert get(c.client.app.AsyncResult(ids[1])) == [c.other, [6, 7]]


def test_a_callback_of_a_chord_gets_the_value_of_its_body(crossing: Pair) -> None:
    c, task_id = crossing, new_key()
    chord = c.client.canvas.chord([c.here("add", 1, 1), c.there("add", 2, 2)], c.here("who"))
    chord.link(c.there("who").set(task_id=task_id))
    assert get(chord.apply_async()) == [c.worker, [2, 4]]
    assert get(c.client.app.AsyncResult(task_id)) == [c.other, [c.worker, [2, 4]]]


# -- groups --------------------------------------------------------------------------------------


@everywhere
def test_members_of_a_group_run_where_they_are_sent(crossing: Pair) -> None:
    c, group = crossing, crossing.client.canvas.group
    result = group((c.there if n % 2 else c.here)("who", n) for n in range(6)).apply_async()
    assert get(result) == [[c.other if n % 2 else c.worker, n] for n in range(6)]
    assert (result.completed_count(), result.successful()) == (6, True)


@everywhere
def test_members_of_a_group_know_their_places(crossing: Pair) -> None:
    c, group = crossing, crossing.client.canvas.group
    result = group(c.here("place"), c.there("place")).apply_async()
    found = get(result)
    assert [one["group"] for one in found] == [result.id] * 2
    assert [one["group_index"] for one in found] == [0, 1]
    assert [one["id"] for one in found] == [one.id for one in result.children]


@everywhere
def test_a_group_after_a_chain_gets_its_value(crossing: Pair) -> None:
    c, canvas = crossing, crossing.client.canvas
    last = canvas.group(c.here("add", 1), c.there("add", 2), canvas.chain(c.here("add", 3), c.there("who")))
    result = canvas.chain(c.here("add", 1, 1), c.there("add", 10), last).apply_async()
    assert get(result) == [13, 14, [c.other, 15]]


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # Celery's own
def test_a_saved_group_is_restored_by_the_other_side(crossing: Pair) -> None:
    c, group = crossing, crossing.client.canvas.group
    result = group(c.here("add", 1, 1), c.there("add", 2, 2)).apply_async()
    result.save()
    for kind in KINDS:
        app = c.fleet.side(kind).app
        found = app.GroupResult.restore(result.id)
        assert get(found) == [2, 4]
        assert (found.id, found.as_tuple()) == (result.id, result.as_tuple())
    found.delete()
    assert c.client.app.GroupResult.restore(result.id) is None


# -- chords --------------------------------------------------------------------------------------


@with_results_kept
@pytest.mark.parametrize("body", ["here", "there"])
def test_a_chord_of_both_counts_each_member_once_and_runs_its_body_once(crossing: Pair, body: str) -> None:
    c, canvas = crossing, crossing.client.canvas
    runs = []
    for _ in range(5):
        key = new_key()
        header = [(c.there if n % 2 else c.here)("who", n) for n in range(5)]
        runs.append((canvas.chord(header)(getattr(c, body)("collect", key)), key))
    values = [[c.other if n % 2 else c.worker, n] for n in range(5)]
    for result, key in runs:
        assert get(result) == [c.worker if body == "here" else c.other, values]
        check_over(c, result.parent.id, key)


def test_a_chord_of_many_that_both_take_from_one_queue_ends_once(crossing: Pair) -> None:
    c, canvas, key = crossing, crossing.client.canvas, new_key()
    header = canvas.group(c.client.sig("who", n).set(queue="both") for n in range(60))
    result = (header | c.client.sig("collect", key).set(queue="both")).apply_async()
    kind, values = get(result)
    assert [value for _, value in values] == list(range(60))
    check_over(c, result.parent.id, key)


def test_a_member_that_comes_twice_counts_once(crossing: Pair) -> None:
    c, canvas, key, hold, note = crossing, crossing.client.canvas, new_key(), new_key(), new_key()
    body = c.here("collect", key).set(task_id=new_key())
    result = canvas.chord([c.here("note", note), c.there("hold", hold)])(body)
    member, group_id = result.parent.children[0], result.parent.id
    get(member)
    options = {"task_id": member.id, "group_id": group_id, "group_index": 0, "chord": dict(body)}
    c.client.call("note", note, queue=c.other_queue, **options)
    c.started(note, 2)
    c.started(hold)
    wait_until(lambda: counters(c.fleet, group_id)["j"] == 1, TIMEOUT_S, "one has arrived")
    c.journal.let_go(hold)
    assert get(result) == [c.worker, [None, hold]]
    check_over(c, group_id, key)


@with_results_kept
@pytest.mark.parametrize("last", ["failed", "other"])
def test_a_body_fails_with_its_header_and_its_errback_is_told(crossing: Pair, last: str) -> None:
    c, canvas, key, hold = crossing, crossing.client.canvas, new_key(), new_key()
    fail = c.here("fail", "both")
    if last == "failed":
        fail = canvas.chain(c.there("hold", hold), c.here("fail", "both", immutable=True))
        header = [fail, c.there("add", 1, 1)]
    else:
        header = [fail, c.there("hold", hold)]
    body = c.there("collect", key)
    body.link_error(c.here("errback"))
    result = canvas.chord(header)(body)
    first, second = result.parent.children
    early = second if last == "failed" else first
    wait_until(early.ready, TIMEOUT_S, "the other one is over")
    c.started(hold)
    c.journal.let_go(hold)
    error = own_error(result)
    assert type(error) is c.client.exceptions.ChordError
    assert str(error) == f"Dependency {first.id} raised Refused('too late', 7)"
    ((kind, _, _, _, word),) = c.started(result.id)
    assert (kind, word) == (c.worker, "errback")
    assert c.journal.of(key) == []
    assert result.state == "FAILURE"


def test_what_comes_after_a_chord_fails_with_its_header(crossing: Pair) -> None:
    c, canvas, key = crossing, crossing.client.canvas, new_key()
    header = canvas.group(c.here("add", 1, 1), c.there("fail", "both"))
    ids = [new_key() for _ in range(3)]
    steps = [c.here("collect", key), c.there("note", key), c.here("who")]
    result = canvas.chain(header, *(step.set(task_id=one) for step, one in zip(steps, ids))).apply_async()
    assert type(own_error(result)) is c.client.exceptions.ChordError
    if c.worker == c.other == "miniq":  # Celery says it of the last one only
        assert {c.client.app.AsyncResult(one).state for one in ids} == {"FAILURE"}
    assert c.journal.of(key) == []


@pytest.mark.parametrize("how", ["expired", "revoked", "killed"])
def test_a_body_fails_if_a_member_does_not_come_to_its_end(fleet: Fleet, how: str) -> None:
    runs = []
    for c in map(fleet.pair, CROSSINGS):
        key, member_id = new_key(), new_key()
        member = {
            "expired": c.here("note", key).set(countdown=0.4, expires=0.2),
            "revoked": c.here("note", key).set(countdown=LATER_S),
            "killed": c.here("sleep", 60).set(time_limit=0.3),
        }[how]
        header = [member.set(task_id=member_id), c.there("add", 1, 1)]
        result = c.client.canvas.chord(header)(c.there("collect", key))
        if how == "revoked":
            c.client.app.control.revoke(member_id, destination=[f"{c.worker}@interop"])
        runs.append((c, result, key, member_id))
    for c, result, key, member_id in runs:
        error = own_error(result)
        assert type(error) is c.client.exceptions.ChordError
        assert str(error).startswith(f"Dependency {member_id} raised T")
        state = "FAILURE" if how == "killed" else "REVOKED"
        assert c.client.app.AsyncResult(member_id).state == state
        assert c.journal.of(key) == []


@pytest.mark.parametrize("caller", KINDS)
def test_a_body_fails_if_a_miniq_worker_does_not_know_a_member(fleet: Fleet, caller: str) -> None:
    # A Celery worker does not count such a member, and the chord waits for ever.
    c = fleet.pair((caller, "miniq", "celery"))
    member = c.client.app.signature("interop.nobody").set(queue=c.queue)
    result = c.client.canvas.chord([member, c.there("add", 1, 1)])(c.there("who"))
    error = own_error(result)
    assert type(error) is c.client.exceptions.ChordError
    assert "interop.nobody" in str(error)


def test_a_member_that_is_retried_counts_when_it_ends(crossing: Pair) -> None:
    c, canvas, key, body = crossing, crossing.client.canvas, new_key(), new_key()
    result = canvas.chord([c.here("flaky", key, 2), c.there("add", 1, 1)])(c.there("collect", body))
    assert get(result) == [c.other, [2, 2]]
    assert len(c.journal.of(key)) == 3
    check_over(c, result.parent.id, body)


# -- nesting -------------------------------------------------------------------------------------


@with_results_kept
def test_chords_in_a_chain_follow_each_other(crossing: Pair) -> None:
    c, canvas = crossing, crossing.client.canvas
    result = canvas.chain(
        c.here("add", 1, 1),
        canvas.group(c.there("add", 10), c.here("add", 20)),
        c.there("who"),
        c.here("echo"),
        canvas.group(c.here("who"), c.there("who")),
        c.here("who"),
    ).apply_async()
    inner = [[[c.other, [12, 22]]], {}]
    assert get(result) == [c.worker, [[c.worker, inner], [c.other, inner]]]


def test_members_of_a_header_may_be_chains_and_chords(crossing: Pair) -> None:
    c, canvas, key = crossing, crossing.client.canvas, new_key()
    header = [
        canvas.chain(c.here("add", 1, 1), c.there("add", 2), c.here("who")),
        canvas.chord([c.here("who", 1), c.there("who", 2)], c.there("who")),
        canvas.chain(c.there("add", 1, 1), canvas.group(c.here("add", 1), c.there("add", 2)), c.here("who")),
        c.there("who", 0),
    ]
    result = canvas.chord(header)(c.here("collect", key))
    value = [
        [c.worker, 4],
        [c.other, [[c.worker, 1], [c.other, 2]]],
        [c.worker, [3, 4]],
        [c.other, 0],
    ]
    assert get(result) == [c.worker, value]
    assert len(c.journal.of(key)) == 1


def test_members_of_a_header_may_end_in_groups(crossing: Pair) -> None:
    c, canvas, key = crossing, crossing.client.canvas, new_key()
    pair = [c.here("who"), c.there("who")]
    header = [
        c.here("who", 0),
        canvas.chain(c.there("add", 1, 1), canvas.group(c.here("add", 1), c.there("add", 2))),
        canvas.chord([c.there("add", 1, 1), c.here("add", 2, 2)], canvas.group(pair)),
    ]
    result = canvas.chord(header)(c.there("collect", key))
    value = [[c.worker, 0], [3, 4], [[c.worker, [2, 4]], [c.other, [2, 4]]]]
    assert get(result) == [c.other, value]
    assert len(c.journal.of(key)) == 1


def test_a_group_in_a_header_is_a_part_of_it(crossing: Pair) -> None:
    c, canvas = crossing, crossing.client.canvas
    inner = canvas.group(c.here("add", 1, 1), c.there("add", 2, 2))
    kind, values = get(canvas.chord([inner, c.there("add", 3, 3)])(c.here("who")))
    # Celery sends those of the inner group the other way round.
    assert (kind, values) == (c.worker, [4, 2, 6] if c.client.kind == "celery" else [2, 4, 6])


def test_a_body_may_be_a_group(crossing: Pair) -> None:
    c, canvas = crossing, crossing.client.canvas
    body = canvas.group(c.here("who"), c.there("who"))
    result = canvas.chord([c.here("add", 1, 1), c.there("add", 2, 2)], body).apply_async()
    assert get(result) == [[c.worker, [2, 4]], [c.other, [2, 4]]]


# -- replacing, adding ---------------------------------------------------------------------------


def test_a_step_is_replaced_by_one_elsewhere(crossing: Pair) -> None:
    c, chain = crossing, crossing.client.canvas.chain
    result = chain(c.here("instead", c.there("place")), c.there("who"), c.here("who")).apply_async()
    _, (_, place) = get(result)
    first = result.parent.parent
    assert (place["id"], place["root_id"], place["parent_id"]) == (first.id,) * 3
    assert place["nesting"] == 1
    assert get(first) == place


@with_results_kept
@pytest.mark.parametrize("by", ["task", "chain", "group", "chord"])
def test_a_member_is_replaced_by_any_signature(crossing: Pair, by: str) -> None:
    c, canvas, key = crossing, crossing.client.canvas, new_key()
    sigs = {
        "task": c.there("who", 1),
        "chain": canvas.chain(c.there("add", 1, 1), c.here("who")),
        "group": canvas.group(c.there("add", 1, 1), c.here("add", 2, 2)),
        "chord": canvas.chord([c.there("add", 1, 1), c.here("add", 2, 2)], c.there("who")),
    }
    values = {
        "task": [c.other, 1],
        "chain": [c.worker, 2],
        "group": [2, 4],
        "chord": [c.other, [2, 4]],
    }
    header = [c.here("instead", sigs[by]), c.there("who", 0)]
    result = canvas.chord(header)(c.there("collect", key))
    assert get(result) == [c.other, [values[by], [c.other, 0]]]
    assert get(result.parent.children[0]) == values[by]
    check_over(c, result.parent.id, key)


def test_a_member_adds_another_one(crossing: Pair) -> None:
    c, canvas, key = crossing, crossing.client.canvas, new_key()
    result = canvas.chord([c.here("one_more", c.there("add", 1, 1)), c.there("add", 2, 2)])(
        c.there("collect", key)
    )
    kind, values = get(result)
    assert kind == c.other
    assert sorted(map(str, values)) == ["2", "4", c.worker]
    check_over(c, result.parent.id, key)


# -- many calls of one task ------------------------------------------------------------------------


def test_maps_run_where_they_are_sent(crossing: Pair) -> None:
    c, tasks = crossing, crossing.client.app.tasks
    found = tasks["interop.who"].map([1, 2]).set(queue=c.queue).apply_async()
    assert get(found) == [[c.worker, 1], [c.worker, 2]]
    found = tasks["interop.add"].starmap([(n, n) for n in range(4)]).set(queue=c.other_queue).apply_async()
    assert get(found) == [0, 2, 4, 6]


def test_chunks_are_a_group(crossing: Pair) -> None:
    c, key, items = crossing, new_key(), [(n, n) for n in range(5)]
    chunks = c.client.app.tasks["interop.add"].chunks(items, 2)
    assert get(chunks.apply_async(queue=c.queue)) == [[0, 2], [4, 6], [8]]
    header = chunks.group()
    for member, queue in zip(header.tasks, [c.queue, c.other_queue, c.queue]):
        member.set(queue=queue)
    assert get((header | c.there("collect", key)).apply_async()) == [c.other, [[0, 2], [4, 6], [8]]]


# -- stamps --------------------------------------------------------------------------------------


def test_stamps_are_seen_in_each_step(crossing: Pair) -> None:
    c, canvas, mine = crossing, crossing.client.canvas, {"mine": "ø"}
    chain = canvas.chain(c.here("place"), c.there("echo"), c.here("place", immutable=True))
    chain.stamp(**mine)
    result = chain.apply_async()
    assert get(result)["stamps"] == mine
    assert get(result.parent)[0][0]["stamps"] == mine
    group = canvas.group(c.here("place"), c.there("place"))
    group.stamp(**mine)
    assert [one["stamps"] for one in get(group.apply_async())] == [mine, mine]


def test_stamps_go_on_to_a_callback(crossing: Pair) -> None:
    c, task_id = crossing, new_key()
    callback = c.there("place", immutable=True).set(task_id=task_id)
    sig = c.here("add", 1, 1)
    sig.link(callback)
    sig.stamp(mine="ø")
    get(sig.apply_async())
    assert get(c.client.app.AsyncResult(task_id))["stamps"] == {"mine": "ø"}


# -- signatures that change hands ------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["as written", "frozen"])
def test_a_workflow_written_by_one_is_sent_by_the_other(crossing: Pair, frozen: bool) -> None:
    c, canvas = crossing, crossing.client.canvas
    header = [c.here("add", 1, 1), c.there("add", 2, 2)]
    chain = canvas.chain(c.here("add", 1, 1), c.there("add", 2), c.here("who"))
    chord = canvas.chord(header, c.there("who"))
    group = canvas.group(c.here("add", 1), c.there("add", 3))
    nested = canvas.chain(c.there("add", 0, 1), group, c.here("who"))
    values = [[c.worker, 4], [c.other, [2, 4]], [c.worker, [2, 4]]]
    sender = c.fleet.side("miniq" if c.client.kind == "celery" else "celery").app
    for workflow, value in zip((chain, chord, nested), values):
        expected = workflow.freeze().id if frozen else None
        result = sender.signature(json.loads(json.dumps(workflow))).apply_async()
        assert get(result) == value
        if frozen:
            assert result.id == expected
            assert get(c.client.app.AsyncResult(expected)) == value


def test_a_workflow_is_an_argument_for_a_task_of_the_other_kind(crossing: Pair) -> None:
    c, canvas = crossing, crossing.client.canvas
    group = canvas.group(c.here("add", 1), c.there("add", 2))
    inner = canvas.chain(c.there("add", 1, 1), group, c.here("who"))
    assert get(c.here("instead", inner).apply_async()) == [c.worker, [3, 4]]


# -- messages ------------------------------------------------------------------------------------

ID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def taken(fleet: Fleet, queue: str, count: int) -> List[Any]:
    """Wait for messages in a queue of Redis; return them as they were sent, without what always varies."""
    wait_until(lambda: fleet.waiting(queue) >= count, TIMEOUT_S, lambda: f"{count} in {queue}")
    found = []
    for item in reversed(fleet.server.command("LRANGE", queue, "0", "-1", db=0)):
        message = json.loads(item)
        for part, names in VARYING.items():
            for name in names:
                message[part].pop(name, None)
        message["headers"]["ignore_result"] = bool(message["headers"]["ignore_result"])
        message["body"] = plain(json.loads(base64.b64decode(message["body"])))
        found.append(message)
    assert len(found) == count
    fleet.server.command("DEL", queue, db=0)
    return found


#: Part of an envelope -> what is different each time in it.
VARYING = {"headers": ("origin", "argsrepr", "kwargsrepr"), "properties": ("delivery_tag", "reply_to")}


def plain(value: Any) -> Any:
    """Return a body without what says nothing, or what its reader knows: an empty chain, the root."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    if "subtask_type" in value:
        options = value["options"]
        kept = {key: options[key] for key in options if key not in UNSAID and options[key] not in (None, [])}
        value = {**value, "options": kept}
    if "callbacks" in value:
        value = {key: one or None for key, one in value.items()}
    return {key: plain(one) for key, one in value.items()}


#: Options of signatures that Celery writes in some places and not in others.
UNSAID = ("add_to_parent", "root_id")


def numbered(messages: Sequence[Any]) -> List[Any]:
    """Return messages with numbers for their ids, in the order in which they are met."""
    known: Dict[str, str] = {}
    text = ID.sub(lambda m: known.setdefault(m[0], f"id {len(known)}"), json.dumps(messages, sort_keys=True))
    found: List[Any] = json.loads(text)
    return found


def workflows(side: Side, queue: str) -> Dict[str, Callable[[], Any]]:
    """Return workflows to be sent, by name; all their tasks are for one queue."""
    canvas, tasks = side.canvas, side.app.tasks
    chain, group, chord = canvas.chain, canvas.group, canvas.chord

    def sig(name: str, *args: Any, **options: Any) -> Any:
        return side.sig(name, *args, **options).set(queue=queue)

    def stamped(workflow: Any) -> Any:
        workflow.stamp(mine="ø")
        return workflow

    return {
        "chain": chain(sig("add", 1, 1), sig("add", 2).set(priority=3), sig("who", immutable=True)),
        "chain with errback": chain(sig("add", 1, 1), sig("who")).on_error(sig("errback")),
        "chain ending in a group": chain(sig("add", 1, 1), group(sig("add", 1), sig("add", 2))),
        "chain with a chord": chain(sig("add", 1, 1), group(sig("add", 1), sig("add", 2)), sig("who")),
        "chain in a chain": chain(sig("add", 1, 1), chain(sig("add", 2), sig("add", 3)), sig("who")),
        "group": group(sig("add", n, n) for n in range(3)),
        "group of chains": group(chain(sig("add", 1, 1), sig("who")), chain(sig("add", 2, 2), sig("who"))),
        "chord": chord([sig("add", 1, 1), sig("add", 2, 2)], sig("who")),
        "chord of chains": chord([chain(sig("add", 1, 1), sig("who")), sig("add", 2, 2)], sig("who")),
        "chord with more after it": chain(group(sig("add", 1, 1), sig("add", 2, 2)), sig("who"), sig("echo")),
        "chord with an errback": chord([sig("echo", 1), sig("echo", 2)], sig("who").on_error(sig("errback"))),
        "chord in a chord": chord([chord([sig("add", 1, 1), sig("add", 2, 2)], sig("who"))], sig("who")),
        "chunks": tasks["interop.add"].chunks([(1, 1), (2, 2), (3, 3)], 2).group().set(queue=queue),
        "map": tasks["interop.who"].map([1, 2]).set(queue=queue),
        "stamped chain": stamped(chain(sig("add", 1, 1), sig("who"))),
        "stamped group": stamped(group(sig("add", 1, 1), sig("add", 2, 2))),
    }


#: Names of those whose first messages are other than one, two for a chord.
COUNTS = {"group": 3, "chunks": 2, "stamped group": 2, "group of chains": 2}
SENT = [
    "chain", "chain with errback", "chain ending in a group", "chain with a chord", "chain in a chain",
    "group", "group of chains", "chord", "chord of chains", "chord with more after it",
    "chord with an errback", "chord in a chord", "chunks", "map", "stamped chain", "stamped group",
]  # fmt: skip


@pytest.mark.parametrize("name", SENT)
def test_both_callers_send_the_same_messages(fleet: Fleet, name: str) -> None:
    found = []
    for kind in KINDS:
        workflows(fleet.side(kind), "nobodys")[name].apply_async()
        count = COUNTS.get(name, 2 if name.startswith("chord") else 1)
        found.append(numbered(taken(fleet, "nobodys", count)))
    assert found[1] == found[0]


def followed(side: Side, at: str, to: str, hold: str) -> Dict[str, Any]:
    """Return workflows by name, and how many messages the worker at queue `at` sends to `to` in each."""
    canvas = side.canvas
    chain, group, chord = canvas.chain, canvas.group, canvas.chord

    def here(name: str, *args: Any, **options: Any) -> Any:
        return side.sig(name, *args, **options).set(queue=at)

    def then(name: str, *args: Any, **options: Any) -> Any:
        return side.sig(name, *args, **options).set(queue=to)

    def linked(sig: Any, *callbacks: Any) -> Any:
        for callback in callbacks:
            sig.link(callback)
        return sig

    def stamped(workflow: Any) -> Any:
        workflow.stamp(mine="ø")
        return workflow

    first, header = here("add", 1, 1), [here("add", 1, 1), here("hold", hold)]
    failing, pair = [here("fail", "both"), here("hold", hold)], group(then("add", 1), then("add", 2))
    return {
        "step": (chain(first, then("add", 2), then("who", immutable=True)), 1),
        "step with errback": (chain(first, then("add", 2), then("who")).on_error(then("errback")), 1),
        "last step": (chain(first, then("who").set(time_limit=9)), 1),
        "group": (chain(first, pair), 2),
        "group of chains": (chain(first, group(chain(then("add", 1), then("who")), then("who"))), 2),
        "chord": (chain(first, pair, then("who")), 2),
        "callback": (linked(first.clone(), then("who")), 1),
        "callback of a chain": (linked(first.clone(), chain(then("who"), then("echo"))), 1),
        "errback": (here("fail", "both").on_error(then("errback")), 1),
        "body": (chord(header, then("who")), 1),
        "body with more after it": (chain(group(header), then("who"), then("echo")), 1),
        "body that is a group": (chord(header, group(then("who"), then("echo"))), 2),
        "body of a failed header": (chord(failing, then("who").on_error(then("errback"))), 1),
        "stamped step": (stamped(chain(first, then("who"))), 1),
        "replacement": (here("instead", then("add", 1, 1)), 1),
        "replacement of a step": (chain(here("instead", then("add", 1, 1)), then("who")), 1),
        "replacement of a member": (chord([here("instead", then("who", 1)), header[1]], then("who")), 1),
    }  # fmt: skip


FOLLOWED = [
    "step", "step with errback", "last step", "group", "group of chains", "chord",
    "callback", "callback of a chain", "errback", "body", "body with more after it", "body that is a group",
    "body of a failed header", "stamped step", "replacement", "replacement of a step",
    "replacement of a member",
]  # fmt: skip


@pytest.mark.parametrize("caller", KINDS)
@pytest.mark.parametrize("name", FOLLOWED)
def test_both_kinds_of_workers_send_the_same_messages(fleet: Fleet, caller: str, name: str) -> None:
    assert sent_next(fleet, caller, "miniq", name) == sent_next(fleet, caller, "celery", name)


def sent_next(fleet: Fleet, caller: str, worker: str, name: str) -> List[Any]:
    """Return what a worker sends after the first tasks of a workflow, with the ids of these."""
    fleet.workers[worker].wait_ready()
    side, hold, queue = fleet.side(caller), str(uuid.uuid4()), f"after_{name}"
    workflow, count = followed(side, f"to_{worker}", queue, hold)[name]
    result = workflow.apply_async()
    ids = [result.id]
    if name.startswith("body"):
        header = result.parent or result[0].parent
        while not hasattr(header, "completed_count"):
            header = header.parent
        wait_until(header.children[0].ready, TIMEOUT_S, "the first member has ended")
        ids.append(header.id)
    fleet.journal.let_go(hold)
    messages = taken(fleet, queue, count)
    if name == "body of a failed header":
        del messages[0]["headers"]["root_id"]  # Celery has not kept it
    return numbered([ids, messages])



# -- rpc:// --------------------------------------------------------------------------------------


@pytest.mark.over("amqp+rpc")
def test_chords_over_rpc_are_miniqs_alone_and_celery_runs_their_bodies(fleet: Fleet) -> None:
    celery, queue = fleet.side("celery"), "no_chord"
    chord = celery.canvas.chord([celery.sig("add", 1, 1).set(queue=queue)], celery.sig("who"))
    with pytest.raises(NotImplementedError, match="chord"):
        chord.apply_async()
    assert fleet.waiting(queue) == 0
    c = fleet.pair(("miniq", "miniq", "celery"))
    header = [c.here("add", 1, 1), c.here("add", 2, 2)]
    assert get(c.client.canvas.chord(header, c.there("who")).apply_async()) == ["celery", [2, 4]]
    group = c.client.canvas.group(c.here("add", 1), c.here("add", 2))
    started_later = c.client.canvas.chain(c.there("add", 1, 1), c.here("add", 1), group, c.there("who"))
    assert get(started_later.apply_async()) == ["celery", [4, 5]]

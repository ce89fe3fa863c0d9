# SPDX-License-Identifier: MIT
"""Signatures and workflows: calls as data, and what their methods and operators make of them."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any, Dict, Iterator, List

import pytest
from bench import Bench, body_of, new_broker

from miniq import (
    MiniQ,
    Signature,
    StampingVisitor,
    chain,
    chord,
    chunks,
    group,
    maybe_signature,
    signature,
    xmap,
    xstarmap,
)
from miniq.canvas import Workflow
from miniq.exceptions import ImproperlyConfigured, NotRegistered
from miniq.testing import start_worker


@pytest.fixture
def app() -> MiniQ:
    return MiniQ("tests", broker=new_broker())


@pytest.fixture
def add(app: MiniQ) -> Any:
    return app.task(name="add")(lambda x, y=0, **more: x + y)


def sent(sig: Signature) -> Any:
    """Return (args, kwargs) and headers of what the signature would send."""
    publication = sig.app.prepare_signature(sig)
    return body_of(publication)[:2], publication.message.headers


def test_a_signature_is_the_dict_that_travels(add: Any) -> None:
    sig = add.s(1, y=2).set(countdown=3)
    assert json.loads(json.dumps(sig)) == {
        "task": "add", "args": [1], "kwargs": {"y": 2}, "options": {"countdown": 3},
        "subtask_type": None, "immutable": False,
    }  # fmt: skip
    assert (sig.task, sig.name, sig.args, sig.kwargs, sig.options) == (
        "add",
        "add",
        (1,),
        {"y": 2},
        {"countdown": 3},
    )
    assert (sig.id, sig.immutable, sig.type, repr(sig)) == (None, False, add, "add(1, y=2)")
    assert add.s().set(task_id="one").id == "one"


def test_signatures_are_made_of_tasks_names_and_dicts(app: MiniQ, add: Any) -> None:
    for sig in (
        signature(add, (1,), {"y": 2}, countdown=3),
        signature("add", args=(1,), kwargs={"y": 2}, options={"countdown": 3}, app=app),
        app.signature("add", (1,), {"y": 2}, countdown=3),
        signature({"task": "add", "args": (1,), "kwargs": {"y": 2}, "options": {"countdown": 3}}, app=app),
        add.signature((1,), {"y": 2}, countdown=3),
    ):
        assert sig == add.s(1, y=2).set(countdown=3)
        assert sig.app is app
        assert sig() == 3


def test_gaps_in_a_foreign_signature_are_filled(app: MiniQ) -> None:
    sig = signature({"task": "x", "args": None, "options": None}, app=app)
    assert dict(sig) == dict(Signature("x"))


def test_maybe_signature_leaves_none_and_signatures(app: MiniQ, add: Any) -> None:
    sig = Signature("add")
    assert maybe_signature(None) is None
    assert maybe_signature(sig, app) is sig
    assert sig.app is app
    assert isinstance(maybe_signature({"task": "x"}), Signature)


def test_call_time_arguments_go_in_front_and_options_over(add: Any) -> None:
    sig = add.s(10, y=1).set(queue="own", countdown=0)
    clone = sig.clone((5,), {"y": 2}, queue="other")
    assert (clone.args, clone.kwargs, clone.options) == (
        (5, 10),
        {"y": 2},
        {"queue": "other", "countdown": 0},
    )
    assert (sig.args, sig.options["queue"]) == ((10,), "own")
    assert sig.partial((5,)).args == (5, 10)


def test_immutable_signatures_take_options_only(add: Any) -> None:
    sig = add.si(1).clone((5,), {"y": 2}, queue="q")
    assert (sig.args, sig.kwargs, sig.options) == ((1,), {}, {"queue": "q"})
    assert add.s(1).set(immutable=True)(5) == 1


def test_calling_it_runs_the_task_here(app: MiniQ, add: Any) -> None:
    assert add.s(1)(2) == 3
    assert add.s(1).apply((2,)).get() == 3
    for method in ("__call__", "apply"):
        with pytest.raises(NotRegistered):
            getattr(app.signature("elsewhere"), method)()


def test_sending_it_is_calling_the_task(app: MiniQ, add: Any) -> None:
    ran: List[Any] = []
    note = app.task(name="note")(lambda *args, **kwargs: ran.append((args, kwargs)))
    with start_worker(app):
        note.s(1).delay(2, a=3).get(timeout=10)
        note.s(1).apply_async((2,), {"a": 3}, countdown=0).get(timeout=10)
        assert ~add.s(1, 2) == 3
    assert ran == [((2, 1), {"a": 3})] * 2
    assert app.signature("elsewhere").delay().task_name == "elsewhere"


def test_what_the_task_does_not_take_is_refused_here_too(add: Any) -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        add.s().delay()
    with pytest.raises(TypeError, match="did you mean 'countdown'"):
        add.s(1).set(contdown=3).delay()


def test_links_are_kept_once_each_and_returned(app: MiniQ, add: Any) -> None:
    sig, one, two = add.s(1), add.s(2), add.s(3)
    assert sig.link(one) is one
    assert sig.link(one) is one
    sig.link(two)
    assert sig.link_error(two) is two
    assert sig.on_error(one) is sig
    assert sig.options == {"link": [one, two], "link_error": [two, one]}
    clone = sig.clone()
    clone.link(add.s(4))
    assert len(sig.options["link"]) == 2
    body, headers = sent(sig)
    assert headers["task"] == "add"


def test_a_single_link_becomes_a_list(add: Any) -> None:
    assert add.s(1).set(link=add.s(2)).clone().options["link"] == [add.s(2)]
    assert add.signature((1,), link=add.s(2)).link(add.s(3)) == add.s(3)


def test_only_signatures_can_be_linked(add: Any) -> None:
    for wrong in (add, "add", 5, lambda x: x):
        with pytest.raises(TypeError, match="no signature"):
            add.s(1).link(wrong)
    with pytest.raises(ImproperlyConfigured, match="name of a task"):
        add.s(1).link({"args": []})


def test_it_is_pickled_as_a_dict_and_copied_as_a_signature(add: Any) -> None:
    sig = add.s([1], y=2).set(queue="q")
    assert type(pickle.loads(pickle.dumps(sig))) is dict
    for found in (copy.copy(sig), copy.deepcopy(sig)):
        assert isinstance(found, Signature)
        assert found == sig
        assert found is not sig
        assert found.app is sig.app
    assert copy.deepcopy(sig).args[0] is not sig.args[0]


def test_it_can_be_an_argument(app: MiniQ, add: Any) -> None:
    keep = app.task(name="keep")(lambda sig: signature(sig, app=app)())
    bench = Bench(app)
    bench.call(keep, add.s(1, 2))
    assert bench.meta()["result"] == 3


def test_it_can_be_shown_with_arguments_replaced_and_asked_for_what_it_links(add: Any) -> None:
    sig = add.s(1, y=2).set(queue="q", root_id="r", parent_id="p")
    assert sig.reprcall(0, z=3) == "add(0, 1, y=2, z=3)"
    assert (sig.root_id, sig.parent_id, sig.subtask_type) == ("r", "p", None)
    other = sig.replace(args=(5,), kwargs={}, options={"priority": 1})
    assert (other.args, other.kwargs, other.options) == ((5,), {}, {"priority": 1})
    assert (sig.replace(args=(7,)).kwargs, sig.args) == ({"y": 2}, (1,))
    one, two = add.s(1), add.s(2)
    sig.link(one)
    one.link(two)
    assert sig.flatten_links() == [sig, one, two]
    assert signature("x", link=add.s(1)).flatten_links()[1:] == [add.s(1)]


# -- workflows are signatures ----------------------------------------------------------------------


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.fixture
def flows(add: Any) -> Dict[str, Any]:
    return {
        "chain": chain(add.s(1), add.s(2)),
        "group": group(add.s(1), add.s(2)),
        "chord": chord([add.s(1), add.s(2)], add.s()),
        "chunks": chunks(add.s(), [(1, 2), (3, 4), (5, 6)], 2),
    }


@pytest.mark.parametrize("kind", ["chain", "group", "chord", "chunks"])
def test_a_workflow_is_a_dict_of_its_own_class_when_it_is_read(
    app: MiniQ, flows: Dict[str, Any], kind: str
) -> None:
    sig = flows[kind]
    cls = {"chain": chain, "group": group, "chord": chord, "chunks": chunks}[kind]
    written = plain(sig)
    for read in (signature(written, app=app), maybe_signature(written), Signature.from_dict(written)):
        assert type(read) is cls
        assert isinstance(read, Workflow)
        assert plain(read) == written
    assert maybe_signature(sig) is sig
    assert maybe_signature(sig, clone=True) is not sig
    for found in (sig.clone(), copy.copy(sig), copy.deepcopy(sig), signature(sig)):
        assert type(found) is cls
        assert plain(found) == written
        assert found is not sig
        assert found.app is app
    assert type(pickle.loads(pickle.dumps(sig))) is dict
    assert plain(pickle.loads(pickle.dumps(sig))) == written


def test_a_copy_shares_no_step_with_its_original(flows: Dict[str, Any]) -> None:
    for sig in flows.values():
        before = plain(sig)
        found = sig.clone()
        steps = [*found.tasks, found.body] if isinstance(found, chord) else getattr(found, "tasks", [])
        for step in steps:
            step.set(queue="other")
        assert plain(sig) == before


def test_reading_changes_nothing_of_what_was_read(app: MiniQ, add: Any) -> None:
    written = plain(chain(add.s(1), group(add.s(2), add.s(3)), add.s(4)))
    kept = copy.deepcopy(written)
    read = signature(written, app=app)
    assert read.tasks[1].body.set(queue="q")
    assert read.tasks[1].tasks[0].set(queue="q")
    assert type(read.tasks[1].tasks[0]) is Signature
    assert written == kept


def test_workflows_are_shown_as_they_are_written(app: MiniQ, add: Any, flows: Dict[str, Any]) -> None:
    assert repr(flows["chain"]) == "add(1) | add(2)"
    assert repr(flows["group"]) == "group([add(1), add(2)])"
    assert repr(flows["chord"]) == "chord([add(1), add(2)], add())"
    assert repr(chord([add.s(1)])) == "chord([add(1)], <no body>)"
    assert repr(group()) == "group(<empty>)"
    assert repr(chain()) == "chain(<empty>)"
    assert repr(xmap(add, [1, 2])) == "[add(x) for x in [1, 2]]"
    assert repr(xstarmap(add, [(1, 2)])) == "[add(*x) for x in [(1, 2)]]"
    assert repr(flows["chunks"]).startswith("celery.chunks(task=add()")
    assert repr(group(add.s(n) for n in range(1000))).endswith("... 980 more])")


def test_parts_can_be_set(app: MiniQ, add: Any, flows: Dict[str, Any]) -> None:
    flows["chain"].tasks = [add.s(7)]
    flows["group"].tasks = (plain(add.s(7)) for _ in range(2))
    flows["chord"].tasks = [plain(add.s(7))]
    flows["chord"].body = plain(add.s(8))
    assert [repr(sig) for sig in flows.values()][:3] == [
        "add(7)", "group([add(7), add(7)])", "chord([add(7)], add(8))",
    ]  # fmt: skip


def test_a_workflow_knows_its_app_by_what_is_in_it(app: MiniQ, add: Any) -> None:
    other = MiniQ("other", broker=new_broker())
    other.set_current()
    for sig in (
        chain(add.s(1), add.s(2)),
        group(chain(add.s(1), add.s(2))),
        chord([], add.s()),
        chord(group(add.s(1)), signature("x")),
        add.s(1) | signature("x"),
        signature("x") | add.s(1),
        chunks(add.s(), [], 1),
        xmap(add, []),
    ):
        assert sig.app is app
    assert group().app is other
    assert chain(add.s(1), app=other).app is other


# -- joining -------------------------------------------------------------------------------------


def shape(sig: Any) -> Any:
    """Return a signature as nested lists of names."""
    if isinstance(sig, chord):
        return {"header": [shape(one) for one in sig.tasks], "body": shape(sig.body)}
    if isinstance(sig, (chain, group)):
        return [type(sig).__name__, *(shape(one) for one in sig.tasks)]
    return sig.args[0] if sig.args else sig.task


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a | b", ["chain", "a", "b"]),
        ("a | b | c | d", ["chain", "a", "b", "c", "d"]),
        ("(a | b) | (c | d)", ["chain", "a", "b", "c", "d"]),
        ("chain(a, chain(b, chain(c)), d)", ["chain", "a", "b", "c", "d"]),
        ("chain([a, b])", ["chain", "a", "b"]),
        ("chain(x for x in (a, b))", ["chain", "a", "b"]),
        ("chain(a)", ["chain", "a"]),
        ("chain()", ["chain"]),
        ("chain() | a", "a"),
        ("a | group(b, c)", ["chain", "a", ["group", "b", "c"]]),
        ("a | group(b)", ["chain", "a", "b"]),
        ("a | group()", "a"),
        ("group(a, b) | c", {"header": ["a", "b"], "body": "c"}),
        ("group(a) | c", {"header": ["a"], "body": "c"}),
        ("group() | c", {"header": [], "body": "c"}),
        ("chain(group(a), c)", ["chain", "a", "c"]),
        ("chain(group(a, b), c, d)", {"header": ["a", "b"], "body": ["chain", "c", "d"]}),
        ("group(a, b) | c | d", {"header": ["a", "b"], "body": ["chain", "c", "d"]}),
        ("group(a, b) | group(c, d)", {"header": ["a", "b"], "body": ["group", "c", "d"]}),
        (
            "group(a, b) | group(c, d) | e",
            {"header": ["a", "b"], "body": {"header": ["c", "d"], "body": "e"}},
        ),
        ("a | group(b, c) | d", ["chain", "a", {"header": ["b", "c"], "body": "d"}]),
        (
            "chain(a, group(b, c), group(d, e), f)",
            ["chain", "a", {"header": ["b", "c"], "body": {"header": ["d", "e"], "body": "f"}}],
        ),
        ("chord([a], b) | c", {"header": ["a"], "body": ["chain", "b", "c"]}),
        ("chord([a], group(b)) | c", {"header": ["a"], "body": {"header": ["b"], "body": "c"}}),
        ("a | chord([b], c)", ["chain", "a", {"header": ["b"], "body": "c"}]),
        ("a | chord([b], c) | d", ["chain", "a", {"header": ["b"], "body": ["chain", "c", "d"]}]),
        (
            "chord([a], b) | chord([c], d)",
            {"header": ["a"], "body": ["chain", "b", {"header": ["c"], "body": "d"}]},
        ),
        ("chord([a]) | b", {"header": ["a"], "body": "b"}),
        ("chord(group(a, b), c)", {"header": ["a", "b"], "body": "c"}),
        ("chord(a, c)", {"header": ["a"], "body": "c"}),
        ("chord((x for x in (a, b)), c)", {"header": ["a", "b"], "body": "c"}),
        ("group([a, b])", ["group", "a", "b"]),
        ("group(x for x in (a, b))", ["group", "a", "b"]),
        ("group(a, group(b, c))", ["group", "a", ["group", "b", "c"]]),
        ("dict(a) | b", ["chain", "a", "b"]),
        ("a | dict(b)", ["chain", "a", "b"]),
    ],
)
def test_joining(add: Any, text: str, expected: Any) -> None:
    names = {name: add.s(name) for name in "abcdef"}
    before = plain(names)
    found = eval(text, {"chain": chain, "group": group, "chord": chord}, names)
    assert shape(found) == expected
    assert plain(names) == before, "joining changes neither side"


def test_joining_in_place_makes_a_new_one(add: Any) -> None:
    sig = first = add.s("a")
    sig |= add.s("b")
    assert (shape(sig), shape(first)) == (["chain", "a", "b"], "a")


def test_only_signatures_can_be_joined(add: Any) -> None:
    one: Any = add.s(1)
    for act in (
        lambda: one | 5,
        lambda: 5 | one,
        lambda: one | add,
        lambda: chain(one, 5),
        lambda: group(add),
    ):
        with pytest.raises(TypeError, match="is no signature"):
            act()
    with pytest.raises(TypeError, match=r"item 1 of the workflow: .* is no signature; write add.s\(\.\.\.\)"):
        chain(one, add)
    with pytest.raises(ImproperlyConfigured, match="name of a task"):
        {} | one


def test_what_a_chain_has_stays_with_its_steps_when_more_follows(add: Any) -> None:
    errback, callback = add.s("errback"), add.s("callback")
    first = chain(add.s("a"), add.s("b")).set(queue="q", link=callback).on_error(errback)
    a, b, c = (first | add.s("c")).tasks
    assert (a.options["queue"], a.options["link_error"], b.options["link_error"]) == (
        "q",
        [errback],
        [errback],
    )
    assert (b.options["link"], c.options) == ([callback], {})
    assert first.unchain_tasks() == [a, b]
    joined = chain(add.s("a"), chord([add.s("b")], add.s("c")), link=callback) | add.s("d")
    assert joined.tasks[1].body.tasks[0].options["link"] == [callback]


def test_options_of_a_chain_that_turns_out_to_be_a_chord_are_kept(add: Any) -> None:
    found = chain(group(add.s("a"), add.s("b")), add.s("c"), task_id="x", link=add.s("d"))
    assert type(found) is chord
    assert found.plan().result[0][0] == "x"
    assert found.body.options["link"] == [add.s("d")]


# -- callbacks, immutability, skew -----------------------------------------------------------------


def test_callbacks_of_a_group(add: Any, flows: Dict[str, Any]) -> None:
    sig, callback, errback = flows["group"], add.s("callback"), add.s("errback")
    sig.link(callback)
    sig.link_error(errback)
    assert sig.tasks[0].options["link"] == [add.si("callback")]
    assert "link" not in sig.tasks[1].options
    assert [task.options["link_error"] for task in sig.tasks] == [[errback], [errback]]
    with pytest.raises(TypeError, match=r"group\(...\) \| callback"):
        sig.apply_async(link=callback)
    with pytest.raises(ValueError, match="an empty group"):
        group().link(callback)


def test_callbacks_of_a_chord_are_its_bodys(add: Any, flows: Dict[str, Any]) -> None:
    sig, callback, errback = flows["chord"], add.s("callback"), add.s("errback")
    assert sig.link(callback) is callback
    assert sig.on_error(errback) is sig
    assert sig.body.options == {"link": [callback], "link_error": [errback]}
    assert all(task.options == {} for task in sig.tasks)
    with pytest.raises(ValueError, match="no body yet"):
        chord([add.s(1)]).link(callback)


def test_callbacks_of_a_chain(add: Any, flows: Dict[str, Any]) -> None:
    sig, callback, errback = flows["chain"], add.s("callback"), add.s("errback")
    sig.link(callback)
    sig.link_error(errback)
    assert sig.options == {"link": [callback], "link_error": [errback]}
    options = sig.plan().steps[0].options
    assert options["link_error"] == options["chain"][0]["options"]["link_error"] == [errback]
    assert (options.get("link"), options["chain"][0]["options"]["link"]) == (None, [callback])


def test_several_signatures_can_be_added_to_an_option_at_once(add: Any) -> None:
    sig = add.s(1)
    sig.extend_list_option("link", [add.s(2), add.s(3)])
    sig.extend_list_option("link", add.s(2))
    assert sig.options["link"] == [add.s(2), add.s(3)]


def test_immutability_of_workflows(add: Any, flows: Dict[str, Any]) -> None:
    for sig in flows.values():
        sig.set(immutable=True)
        assert all(0 not in step.args for step in sig.plan((0,)).steps)
    assert [task.immutable for task in flows["group"].tasks] == [True, True]
    assert [task.immutable for task in flows["chord"].tasks] == [True, True]
    assert not flows["chord"].body.immutable


def test_skew_delays_members_one_after_the_other(add: Any) -> None:
    sig = group(add.s(n) for n in range(6))
    assert sig.skew(1, 4) is sig
    assert [task.options["countdown"] for task in sig.tasks] == [1, 2, 3, 4, 4, 4]
    assert [task.options["countdown"] for task in sig.skew(0, step=0.5).tasks] == [0, 0.5, 1, 1.5, 2, 2.5]
    assert [task.options["countdown"] for task in sig.skew(1, 10, 2).tasks] == [1, 3, 5, 7, 9, 9]


def test_a_group_has_a_length_and_is_there_even_when_empty(add: Any) -> None:
    assert (len(group(add.s(1), add.s(2))), len(group()), bool(group())) == (2, 0, True)


# -- many calls ------------------------------------------------------------------------------------


def test_chunks_are_a_group_of_starmaps(app: MiniQ, add: Any) -> None:
    sig = chunks(add.s(), ((n, n) for n in range(5)), 2)
    found = sig.group()
    assert [member.task for member in found.tasks] == ["celery.starmap"] * 3
    assert [member.kwargs["it"] for member in found.tasks] == [[(0, 0), (1, 1)], [(2, 2), (3, 3)], [(4, 4)]]
    assert all(type(member) is xstarmap for member in found.tasks)
    assert [step.task for step in sig.plan().steps] == ["celery.starmap"] * 3
    assert shape(chain(add.s("a"), sig))[2][0] == "group"
    with pytest.raises(ImproperlyConfigured, match="a size n of at least 1, not 0"):
        chunks(add.s(), [1], 0)
    with pytest.raises(ImproperlyConfigured, match="not None"):
        chunks(None, [1], 1)


def test_maps_are_one_task(app: MiniQ, add: Any) -> None:
    for cls, name in ((xmap, "celery.map"), (xstarmap, "celery.starmap")):
        sig = cls(add, iter([1, 2]), queue="q")
        assert plain(sig) == {
            "task": name, "args": [], "kwargs": {"task": plain(add.s()), "it": [1, 2]},
            "options": {"queue": "q"}, "subtask_type": None, "immutable": True,
        }  # fmt: skip
        assert type(signature(plain(sig))) is cls
        assert type(sig.clone()) is cls
        assert cls(add.s(5), []).kwargs["task"] == add.s(5)


# -- freezing --------------------------------------------------------------------------------------


def ids_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "task_id" in value:
            yield value["task_id"]
        for one in value.values():
            yield from ids_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from ids_in(one)


def test_freezing_gives_ids_in_place_and_sending_uses_them(app: MiniQ, add: Any) -> None:
    sig = add.s(1)
    result = sig.freeze("own")
    assert (result.id, sig.id, sig.options["reply_to"]) == ("own", "own", app.identity[1])
    assert sig.freeze("other").id == "own"
    for sig in (
        chain(add.s(1), add.s(2)),
        group(add.s(1), add.s(2)),
        chord([add.s(1), add.s(2)], add.s()),
        chain(add.s(1), group(add.s(2), add.s(3)), add.s(4)),
    ):
        result = sig.freeze()
        known = set(ids_in(sig))
        assert result.id in known
        for found in (sig.plan(), signature(plain(sig), app=app).plan(), sig.clone().plan()):
            assert found.result[0][0] == result.id
            assert {step.options["task_id"] for step in found.steps} <= known
    assert chain().freeze() is None
    flow = chain(add.s(1), add.s(2))
    assert flow.freeze("last").id == flow.tasks[1].id == "last"


def test_freezing_takes_the_place_in_a_workflow(add: Any) -> None:
    sig = chain(add.s(1), add.s(2))
    sig.freeze(group_id="g", group_index=3, chord=plain(add.s(9)), root_id="r", parent_id="p")
    assert sig.tasks[1].options["group_id"] == "g"
    assert sig.tasks[1].options["group_index"] == 3
    assert sig.tasks[1].options["chord"]["args"] == [9]


# -- stamps ----------------------------------------------------------------------------------------


def stamps(sig: Any) -> Dict[str, Any]:
    return {name: sig.options[name] for name in sig.options.get("stamped_headers", ())}


def test_stamps_go_to_every_task_and_its_callbacks(add: Any) -> None:
    sig = chain(add.s(1).on_error(add.s("e")), group(add.s(2), chain(add.s(3), add.s(4))))
    sig.tasks[0].link(add.s("c"))
    assert sig.stamp(customer="acme", run=7) is sig
    found = plain(sig)
    first, side = found["kwargs"]["tasks"]
    for task in (
        first, first["options"]["link"][0], first["options"]["link_error"][0],
        side["kwargs"]["tasks"][0], *side["kwargs"]["tasks"][1]["kwargs"]["tasks"],
    ):  # fmt: skip
        assert task["options"]["customer"] == "acme"
        assert task["options"]["stamped_headers"] == ["customer", "run"]
    assert found["options"] == side["options"] == {}


def test_stamps_replace_or_append(add: Any) -> None:
    assert stamps(add.s(1).stamp(a=1).stamp(a=2, b=3)) == {"a": 2, "b": 3}
    assert stamps(add.s(1).stamp(a=1).stamp(append_stamps=True, a=2, b=3)) == {"a": [2, 1], "b": 3}
    assert stamps(add.s(1).stamp(a=[1, 2]).stamp(append_stamps=True, a=[2, 3])) == {"a": [2, 3, 1]}
    assert stamps(add.s(1).stamp(stamped_headers=["a"], a=1, queue="q")) == {"a": 1}


def test_the_body_of_a_chord_is_stamped_by_visitors_only(add: Any) -> None:
    sig = chord([add.s(1)], add.s(2)).stamp(a=1)
    assert (stamps(sig.tasks[0]), stamps(sig.body)) == ({"a": 1}, {})


class Visitor(StampingVisitor):
    """Writes down what it is asked, and stamps with it."""

    def __init__(self) -> None:
        self.seen: List[str] = []

    def mark(self, word: str) -> Dict[str, Any]:
        self.seen.append(word)
        return {word: True}

    def on_signature(self, sig: Any, **headers: Any) -> Any:
        return self.mark(f"sig {sig.args[0]}")

    def on_group_start(self, group: Any, **headers: Any) -> Any:
        return self.mark("in group")

    def on_group_end(self, group: Any, **headers: Any) -> None:
        self.seen.append("group end")

    def on_chain_start(self, chain: Any, **headers: Any) -> Any:
        return self.mark("in chain")

    def on_chain_end(self, chain: Any, **headers: Any) -> None:
        self.seen.append("chain end")

    def on_chord_body(self, sig: Any, **header: Any) -> Any:
        return self.mark("body")

    def on_callback(self, callback: Any, **header: Any) -> Any:
        return self.mark("callback")

    def on_errback(self, errback: Any, **header: Any) -> Any:
        return self.mark("errback")


def test_a_visitor_is_asked_about_everything_in_order(add: Any) -> None:
    visitor = Visitor()
    sig = chord([add.s(1).on_error(add.s("e")), chain(add.s(2), add.s(3))], add.s(4))
    sig.stamp(visitor, given=5)
    assert visitor.seen == [
        "in group", "errback", "sig e", "sig 1", "in chain", "sig 2", "sig 3", "chain end", "group end",
        "body", "sig 4",
    ]  # fmt: skip
    assert set(stamps(sig.tasks[0])) == {"given", "in group", "sig 1"}
    assert set(stamps(sig.tasks[1].tasks[1])) == {"given", "in group", "in chain", "sig 3"}
    assert set(stamps(sig.body)) == {"given", "body", "sig 4"}
    assert set(stamps(sig.tasks[0].options["link_error"][0])) == {"given", "in group", "errback", "sig e"}


def test_a_visitor_may_set_options_that_are_no_stamps(add: Any) -> None:
    class Routed(StampingVisitor):
        def on_signature(self, sig: Any, **headers: Any) -> Any:
            return {"customer": 1, "queue": "q", "stamped_headers": ["customer"]}

    sig = add.s(1).stamp(Routed())
    assert (stamps(sig), sig.options["queue"]) == ({"customer": 1}, "q")
    with pytest.raises(NotImplementedError, match="needs a method on_signature"):
        add.s(1).stamp(StampingVisitor())


def test_stamps_of_a_call_join_those_of_the_signature(add: Any) -> None:
    found = group(add.s(1).stamp(a=1), add.s(2)).plan((), {}, {"stamped_headers": ["b"], "b": 2})
    assert [sorted(step.options["stamped_headers"]) for step in found.steps] == [["a", "b"], ["b"]]


# -- sending -------------------------------------------------------------------------------------


@pytest.fixture
def handed(app: MiniQ) -> List[Any]:
    """What the app was given to send: (plan, options)."""
    found: List[Any] = []

    def send_plan(plan: Any, options: Any) -> str:
        found.append((plan, options))
        return "result"

    app.send_plan = send_plan  # type: ignore[assignment]
    app.conf.result_backend = "redis://localhost/0"  # counts; nothing connects
    return found


def test_a_workflow_is_handed_over_whole(add: Any, handed: List[Any], flows: Dict[str, Any]) -> None:
    for sig, count in zip(flows.values(), (1, 2, 2, 2)):
        assert sig.apply_async((0,), {"y": 1}, queue="q", timeout=3, retry=False) == "result"
        plan, options = handed.pop()
        assert options == {"timeout": 3, "retry": False}
        assert len(plan.steps) == count
        for step in plan.steps:
            assert step.options["queue"] == "q"
            assert "timeout" not in step.options


def test_each_way_to_send_one(add: Any, handed: List[Any], flows: Dict[str, Any]) -> None:
    chain(add.s(1), add.s(2))(0, y=1)
    chain(add.s(1), add.s(2)).delay(0, y=1)
    group(add.s(1))(0)
    chord([add.s(1)])(add.s("body"), countdown=3)
    chord([add.s(1)]).apply_async((), {"body": add.s("body")})
    chunks(add.s(), [(1, 2)], 1)(queue="q")
    chunks.apply_chunks(add.s(), [(1, 2)], 1)
    steps = [plan.steps[0] for plan, _ in handed]
    assert [step.args for step in steps[:5]] == [(0, 1), (0, 1), (0, 1), (1,), (1,)]
    assert [step.kwargs for step in steps[:2]] == [{"y": 1}, {"y": 1}]
    assert steps[3].options["countdown"] == 3
    assert [plan.chords[0].body["args"] for plan, _ in handed[3:5]] == [("body",), ("body",)]
    assert steps[5].options["queue"] == "q"


def test_nothing_is_handed_over_unless_all_can_be_sent(add: Any, handed: List[Any]) -> None:
    broken = chain(add.s(1), add.s(2))
    broken.tasks[1]["task"] = None
    with pytest.raises(ImproperlyConfigured, match=r"^chain\[1\]: "):
        broken.delay()
    with pytest.raises(ImproperlyConfigured, match="this chord has no body"):
        chord([add.s(1)]).delay()
    deep = add.s(1)
    for _ in range(101):
        deep = group(deep, add.s(2))
    with pytest.raises(ValueError, match="nested 100 deep"):
        deep.delay()
    assert handed == []


def test_a_workflow_can_be_a_callback_and_an_argument(app: MiniQ, add: Any, flows: Dict[str, Any]) -> None:
    for sig in flows.values():
        assert add.s(1).link(sig) is sig
        assert plain(add.s(sig))["args"] == [plain(sig)]
        read = signature(plain(add.s(1).set(link=[sig])), app=app)
        assert plain(read.options["link"]) == [plain(sig)]


def test_the_deepest_workflow_that_can_be_sent_is_copied_shown_and_read(app: MiniQ, add: Any) -> None:
    deep: Any = add.s("leaf")
    for _ in range(49):
        deep = chord([chain(add.s("a"), deep)], add.s("b"))
    found = deep.plan()
    assert repr(deep.clone())
    for step in found.steps:
        for rest in plain(step.options).get("chain", ()):
            assert signature(rest, app=app).clone()
    deep.freeze()
    assert plain(signature(plain(deep), app=app)) == plain(deep)

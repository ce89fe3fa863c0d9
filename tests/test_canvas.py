# SPDX-License-Identifier: MIT
"""Signatures: calls as data."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any, List

import pytest
from bench import Bench, body_of, new_broker

from miniq import MiniQ, Signature, maybe_signature, signature
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


@pytest.mark.parametrize("kind", ["chain", "group", "chord"])
def test_workflows_are_refused_wherever_they_are(app: MiniQ, add: Any, kind: str) -> None:
    flow = {"task": f"celery.{kind}", "args": [], "kwargs": {}, "options": {}, "subtask_type": kind}
    words = f"a {kind} cannot be sent by this version of miniq"
    for act in (
        lambda: signature(flow),
        lambda: maybe_signature(flow),
        lambda: add.s(1).link(flow),
        lambda: add.s(1).link(add.s().set(link_error=[flow])),
        lambda: add.s(1).set(link=flow).delay(),
    ):
        with pytest.raises(ImproperlyConfigured, match=words):
            act()


def test_a_pipe_between_signatures_is_refused_and_not_a_merged_dict(add: Any) -> None:
    one: Any = add.s(1)
    acts: List[Any] = [lambda: one | one, lambda: {} | one, lambda: one.__ior__(one)]
    for act in acts:
        with pytest.raises(ImproperlyConfigured, match=r"no chains.*link="):
            act()


def test_what_is_not_built_says_so(add: Any) -> None:
    with pytest.raises(AttributeError, match="'stamp': Celery has it"):
        add.s(1).stamp(x=1)


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

# SPDX-License-Identifier: MIT
"""What a workflow sends, as pure data: no app, no broker.

Plans are run by a small worker in this file that knows the wire form only, and compared with an
interpreter of the same trees that knows nothing of messages.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections import deque
from itertools import count
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest

from miniq.algebra import MAX_DEPTH, check, fold, joined, kind_of, made, made_chain, made_chord, made_group
from miniq.exceptions import ImproperlyConfigured, NotRegistered
from miniq.plan import Freezer, Plan, plan

Sig = Dict[str, Any]
TREES = int(os.environ.get("MINIQ_PLAN_TREES", "400"))


def task(name: str, *args: Any, immutable: bool = False, **options: Any) -> Sig:
    return made(name, args, {}, options, None, immutable)


def chain(*steps: Sig, **options: Any) -> Sig:
    return made_chain(list(steps), options)


def group(*members: Sig, **options: Any) -> Sig:
    return made_group(list(members), options)


def chord(header: Any, body: Any, **options: Any) -> Sig:
    return made_chord(header, body, options)


def chunks(name: str, items: List[Any], size: int) -> Sig:
    return made("celery.chunks", (), {"task": task(name), "it": items, "n": size}, {}, None, True)


def ids(prefix: str = "") -> Callable[[], str]:
    numbers = count(1)
    return lambda: f"{prefix}{next(numbers)}"


def planned(sig: Sig, *args: Any, **given: Any) -> Plan:
    given.setdefault("new_id", ids())
    given.setdefault("max_depth", MAX_DEPTH)
    return plan(sig, args, **given)


def names(found: Plan) -> List[str]:
    return [step.task for step in found.steps]


def plain(value: Any) -> Any:
    """Return `value` as it arrives."""
    return json.loads(json.dumps(value))


# -- a worker that knows the wire form, and an interpreter that does not ---------------------------


class Worker:
    """Runs messages until none is left; a task returns its name and arguments, and is written down."""

    def __init__(self, new_id: Callable[[], str], polled: bool = False, rng: Optional[random.Random] = None):
        self.new_id = new_id
        self.polled = polled
        self.rng = rng
        self.left: "deque[Any]" = deque()
        self.calls: List[Any] = []
        self.values: Dict[str, Any] = {}
        self.chords: Dict[str, Any] = {}
        self.parts: Dict[str, Dict[int, Any]] = {}
        self.waiting: List[Any] = []
        self.largest = 0

    def send(self, found: Plan) -> None:
        for start in found.chords:
            assert start.group_id not in self.chords, "a chord is started once"
            assert start.size == len(set(start.members)) == len(start.members)
            self.chords[start.group_id] = plain(start)
        for step in found.steps:
            encoded = json.dumps([step.task, step.args, step.kwargs, step.options])
            self.largest = max(self.largest, len(encoded))
            self.left.append(json.loads(encoded))

    def run(self, found: Plan) -> None:
        self.send(found)
        for _ in range(100_000):
            if not self.left:
                if not self._unlock():
                    return
                continue
            if self.rng is not None:
                self.left.rotate(self.rng.randrange(len(self.left)))
            self.one(*self.left.popleft())
        raise AssertionError("it never comes to an end")

    def one(self, name: str, args: List[Any], kwargs: Dict[str, Any], options: Dict[str, Any]) -> None:
        task_id = options["task_id"]
        assert task_id not in self.values, f"{name} ran twice under the id {task_id}"
        if name == "celery.chord_unlock":
            assert self.polled
            self.waiting.append((args, kwargs))
            return
        if name == "celery.accumulate":
            value = args[kwargs["index"]]
        elif name == "celery.starmap":
            value = [self.call(kwargs["task"]["task"], item) for item in kwargs["it"]]
        else:
            value = self.call(name, args)
        self.values[task_id] = value
        for callback in options.get("link") or ():
            self.follow(callback, value)
        rest = options.get("chain")
        if rest:
            self.follow(rest[-1], value, chain=rest[:-1])
        elif options.get("chord") and not self.polled:
            self.arrive(options, value)

    def call(self, name: str, args: Any) -> Any:
        value = [name, *args]
        self.calls.append(value)
        return value

    def follow(self, sig: Sig, *args: Any, **options: Any) -> None:
        self.send(plan(sig, args, options=options, new_id=self.new_id, polled=self.polled))

    def arrive(self, options: Dict[str, Any], value: Any) -> None:
        group_id, index = options["group_id"], options["group_index"]
        _, size, body, members = self.chords[group_id]
        assert members[index] == options["task_id"]
        assert body == options["chord"], "the store and the messages have the same body"
        parts = self.parts.setdefault(group_id, {})
        assert index not in parts, "each index is there once"
        parts[index] = value
        assert len(parts) <= size
        if len(parts) == size:
            self.follow(body, [parts[at] for at in range(size)])

    def _unlock(self) -> bool:
        """Look after the chords that are not counted; say whether one went on."""
        for at, ((_, body), kwargs) in enumerate(self.waiting):
            members = [head[0] for head, _ in kwargs["result"]]
            if all(one in self.values for one in members):
                del self.waiting[at]
                self.follow(body, [self.values[one] for one in members])
                return True
        assert not self.waiting, "a body is never called"
        assert all(len(self.parts[one]) == start[1] for one, start in self.chords.items())
        return False

    def value_of(self, result: Any) -> Any:
        """Return the value that a result tuple stands for."""
        (task_id, _), members = result
        if members is None:
            return self.values[task_id]
        return [self.value_of(one) for one in members]


class Oracle:
    """What a tree of signatures comes to, by definition."""

    def __init__(self) -> None:
        self.calls: List[Any] = []

    def value(self, sig: Sig, args: Tuple[Any, ...]) -> Any:
        kind = kind_of(sig)
        if kind is None and sig["task"] == "celery.chunks":
            items, size = sig["kwargs"]["it"], sig["kwargs"]["n"]
            parts = [items[at : at + size] for at in range(0, len(items), size)]
            return [[self.call(sig["kwargs"]["task"]["task"], item) for item in part] for part in parts]
        if kind is None:
            return self.call(sig["task"], [*(() if sig["immutable"] else args), *sig["args"]])
        if kind == "chain":
            return self.row(self.steps(sig), args)
        if kind == "group":
            return [self.value(one, args) for one in self.members(sig)]
        header = sig["kwargs"]["header"]
        members = header if isinstance(header, list) else [header]
        values = [self.value(one, args) for one in self.members(made_group(members))]
        return self.value(sig["kwargs"]["body"], (values,))

    def row(self, steps: List[Sig], args: Tuple[Any, ...]) -> Any:
        value = None
        for step in steps:
            value = self.value(step, args)
            args = (value,)
        return value

    def call(self, name: str, args: Any) -> Any:
        value = [name, *args]
        self.calls.append(value)
        return value

    def steps(self, sig: Sig) -> List[Sig]:
        """Return a chain's steps: chains in it flattened, groups of one replaced, empty ones left out."""
        if kind_of(sig) == "chain":
            return [step for one in sig["kwargs"]["tasks"] for step in self.steps(one)]
        if kind_of(sig) == "group" and len(self.members(sig)) < 2:
            return [step for one in self.members(sig) for step in self.steps(one)]
        if sig["task"] == "celery.chunks" and len(sig["kwargs"]["it"]) <= sig["kwargs"]["n"]:
            kwargs = {"task": sig["kwargs"]["task"], "it": sig["kwargs"]["it"]}
            return [made("celery.starmap", (), kwargs, {}, None, True)] if kwargs["it"] else []
        return [sig]

    def members(self, sig: Sig) -> List[Sig]:
        """Return a group's members, groups in it merged, chains of nothing left out."""
        found: List[Sig] = []
        for one in sig["kwargs"]["tasks"]:
            if one["task"] == "celery.chunks":
                items, size = one["kwargs"]["it"], one["kwargs"]["n"]
                parts = [items[at : at + size] for at in range(0, len(items), size)]
                found += [made("celery.starmap", (), {**one["kwargs"], "it": part}, {}) for part in parts]
            elif kind_of(one) == "group":
                found += self.members(one)
            elif kind_of(one) == "chain" and len(self.steps(one)) < 2:
                found += self.members(group(*self.steps(one)))
            else:
                found.append(one)
        return found


class StarmapOracle(Oracle):
    """The same with the one built-in task that trees hold themselves."""

    def value(self, sig: Sig, args: Tuple[Any, ...]) -> Any:
        if sig["task"] == "celery.starmap":
            return [self.call(sig["kwargs"]["task"]["task"], item) for item in sig["kwargs"]["it"]]
        return super().value(sig, args)


class Trees:
    """Random signatures; leaves have names of their own."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.names = ids("t")

    def tree(self, depth: int) -> Sig:
        rng = self.rng
        kind = rng.choice(["task", "chain", "chain", "group", "chord", "chunks"]) if depth else "task"
        if kind == "task":
            args = [rng.randrange(100) for _ in range(rng.randrange(3))]
            return task(self.names(), *args, immutable=rng.random() < 0.2)
        if kind == "chunks":
            size = rng.randrange(1, 4)
            return chunks(self.names(), [[n] for n in range(rng.randrange(5))], size)
        if kind == "chord":
            header: Any = self.trees(depth, 0)
            if rng.random() < 0.2:
                header = group(*header)
            return chord(header, self.body(depth))
        return (chain if kind == "chain" else group)(*self.trees(depth, 0))

    def body(self, depth: int) -> Sig:
        while True:
            found = self.tree(depth - 1)
            if fold([found]):
                return found

    def trees(self, depth: int, least: int) -> List[Sig]:
        return [self.tree(depth - 1) for _ in range(self.rng.randrange(least, 4))]


def canonical(calls: List[Any]) -> List[str]:
    return sorted(json.dumps(call) for call in calls)


def seeds() -> Iterator[int]:
    yield from range(TREES)


@pytest.mark.parametrize("polled", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_random_trees_come_to_what_their_definition_says(polled: bool, frozen: bool) -> None:
    for seed in seeds():
        rng = random.Random(seed)
        tree = Trees(rng).tree(4)
        args: Tuple[Any, ...] = (["given"],) if rng.random() < 0.5 else ()
        before = copy.deepcopy(tree)
        new_id = ids("i")
        sent = tree
        if frozen:
            sent, _ = Freezer(new_id, "me").freeze(tree)
            sent = plain(sent)
        found = plan(sent, args, new_id=new_id, polled=polled)
        assert tree == before, f"seed {seed}: planning changed the signature"
        worker, oracle = Worker(new_id, polled, rng), StarmapOracle()
        try:
            worker.run(found)
            expected = plain(oracle.value(tree, args) if fold([tree]) or kind_of(tree) == "group" else None)
            value = None if found.result is None else worker.value_of(found.result)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r} for {json.dumps(tree)}") from error
        if kind_of(tree) is None and tree["task"] == "celery.chunks":
            expected = expected or []
        assert value == expected, f"seed {seed}: {json.dumps(tree)}"
        assert canonical(worker.calls) == canonical(oracle.calls), f"seed {seed}: {json.dumps(tree)}"


def test_freezing_again_changes_nothing_and_the_plan_has_its_ids() -> None:
    for seed in range(TREES // 4):
        tree = Trees(random.Random(seed)).tree(4)
        new_id = ids()
        frozen, result = Freezer(new_id, "me").freeze(tree)
        again, same = Freezer(lambda: pytest.fail("everything has its id"), "me").freeze(plain(frozen))
        assert plain(again) == plain(frozen), f"seed {seed}"
        assert same == result, f"seed {seed}"
        found = planned(frozen, new_id=lambda: pytest.fail("everything has its id"))
        assert found.result == result, f"seed {seed}"


def test_folding_again_changes_nothing() -> None:
    for seed in range(TREES):
        once = joined([Trees(random.Random(seed)).tree(4)])
        assert plain(joined([once])) == plain(once), f"seed {seed}"


# -- what is sent --------------------------------------------------------------------------------


def test_a_chain_sends_its_first_task_with_the_rest_reversed() -> None:
    found = planned(chain(task("a", 1), task("b", 2), task("c")), 0, reply_to="me")
    (step,) = found.steps
    assert (step.task, step.args, step.kwargs, step.where) == ("a", (0, 1), {}, "chain[0]")
    assert step.options == {
        "task_id": "1",
        "reply_to": "me",
        "chain": [
            made("c", (), {}, {"task_id": "3", "reply_to": "me"}),
            made("b", (2,), {}, {"task_id": "2", "reply_to": "me"}),
        ],
    }
    assert found.chords == []
    assert found.result == [["3", [["2", [["1", None], None]], None]], None]


def test_a_group_sends_its_members_with_indexes_in_the_order_written() -> None:
    found = planned(
        group(task("a"), group(task("b"), group(task("c"))), chain(task("d"), task("e")), task("f"))
    )
    assert names(found) == ["a", "b", "c", "d", "f"]
    assert [step.options.get("group_index") for step in found.steps] == [0, 1, 2, None, 4]
    assert [step.options.get("group_id") for step in found.steps] == ["1", "1", "1", None, "1"]
    (last,) = found.steps[3].options["chain"]
    assert (last["task"], last["options"]["group_id"], last["options"]["group_index"]) == ("e", "1", 3)
    assert found.result is not None
    assert found.result[0] == ["1", None]
    assert [one[0][0] for one in found.result[1]] == ["2", "3", "4", "6", "7"]


def test_a_chord_starts_a_counter_of_its_members() -> None:
    found = planned(chord([task("a"), chain(task("b"), task("c"))], task("d", 9)))
    body = made("d", (9,), {}, {"task_id": "5", "group_id": "1"})
    assert found.chords == [("1", 2, body, ("2", "4"))]
    assert found.steps[0].options == {"task_id": "2", "group_id": "1", "group_index": 0, "chord": body}
    assert "chord" not in found.steps[1].options
    (last,) = found.steps[1].options["chain"]
    assert last["options"] == {"task_id": "4", "group_id": "1", "group_index": 1, "chord": body}
    assert found.result == [
        ["5", [["1", None], [[["2", None], None], [["4", [["3", None], None]], None]]]],
        None,
    ]


def test_a_header_member_that_ends_in_a_group_is_gathered_and_counts_once() -> None:
    found = planned(chord([chain(task("a"), group(task("b"), task("c"))), task("d")], task("e")))
    (start,) = found.chords
    assert start.size == 2
    (step,) = found.steps[0].options["chain"]
    assert (step["subtask_type"], step["kwargs"]["body"]["task"]) == ("chord", "celery.accumulate")
    assert step["kwargs"]["body"]["options"]["chord"]["task"] == "e"
    assert step["kwargs"]["body"]["options"]["task_id"] == start.members[0]


def test_a_chord_in_a_header_counts_by_its_body() -> None:
    found = planned(chord([chord([task("a"), task("b")], task("c")), task("d")], task("e")))
    inner, outer = found.chords
    assert (inner.size, outer.size) == (2, 2)
    assert inner.body["options"]["chord"] == outer.body
    assert inner.body["options"]["group_id"] == outer.group_id
    assert inner.body["options"]["group_index"] == 0
    assert outer.members == (inner.body["options"]["task_id"], found.steps[2].options["task_id"])
    assert "chord" not in outer.body["options"]


@pytest.mark.parametrize(
    ("tree", "sent", "last"),
    [
        (chain(group(task("a"), task("b")), task("c")), ["a", "b"], "c"),
        (chain(group(task("a")), task("b")), ["a"], "b"),
        (chain(task("a"), group(), task("b")), ["a"], "b"),
        (chain(chord([task("a")], task("b")), task("c"), task("d")), ["a"], "d"),
        (chain(chain(), chain(chain(task("a")))), ["a"], "a"),
        (chord([], task("a")), ["a"], "a"),
        (chord([group(), chain()], chain(task("a"), task("b"))), ["a"], "b"),
        (chord([task("a"), group(task("b"), task("c"))], task("d")), ["a", "b", "c"], "d"),
        (chunks("a", [[1], [2], [3]], 2), ["celery.starmap"] * 2, None),
        (chain(chunks("a", [[1], [2], [3]], 2), task("b")), ["celery.starmap"] * 2, "b"),
        (group(), [], None),
        (chain(), [], None),
        (chain(chain(), group()), [], None),
    ],
)
def test_folding(tree: Sig, sent: List[str], last: Optional[str]) -> None:
    new_id = ids()
    found = planned(tree, new_id=new_id)
    assert names(found) == sent
    worker = Worker(new_id)
    worker.run(found)
    if last is not None:
        assert found.result is not None
        assert worker.value_of(found.result)[0] == last


def test_an_empty_workflow_has_no_result_and_an_empty_group_an_empty_one() -> None:
    assert planned(chain()).result is None
    assert planned(group()).result == [["1", None], []]


def test_an_empty_header_calls_the_body_with_an_empty_list() -> None:
    found = planned(chord([], task("a", 1)))
    assert (found.steps[0].args, found.chords) == (([], 1), [])
    found = planned(chord([], group(task("a"), chain(task("b"), task("c")), task("d", immutable=True))))
    assert [step.args for step in found.steps] == [([],), ([],), ()]


def test_ids_given_stay_and_the_id_of_the_call_is_that_of_the_value() -> None:
    sent = chain(task("a", task_id="first"), task("b"))
    assert planned(sent, options={"task_id": "x"}).result == [["x", [["first", None], None]], None]
    assert planned(chain(task("a"), task("b"), task_id="x")).result[0][0] == "x"  # type: ignore[index]
    assert planned(group(task("a")), options={"task_id": "x"}).result[0][0] == "x"  # type: ignore[index]
    found = planned(chord([task("a")], chain(task("b"), task("c")), task_id="g"), options={"task_id": "x"})
    assert found.result is not None
    assert (found.result[0][0], found.chords[0].group_id) == ("x", "g")


def test_options_of_a_workflow_go_to_its_steps() -> None:
    errback, callback = task("errback"), task("callback")
    given = {"queue": "q", "link": callback, "link_error": errback}
    first = planned(chain(task("a"), task("b", queue="own"), task("c")), options=given).steps[0].options
    after = first["chain"]
    assert first["queue"] == "q"
    assert [one["options"].get("queue") for one in after] == [None, "own"]
    assert [one["options"].get("link") for one in (first, *after) if "options" in one] == [[callback], None]
    assert first["link_error"] == after[0]["options"]["link_error"] == [errback]

    found = planned(
        group(task("a"), chain(task("b"), task("c"))), options={"queue": "q", "link_error": errback}
    )
    assert [step.options["queue"] for step in found.steps] == ["q", "q"]
    assert found.steps[1].options["chain"][0]["options"]["link_error"] == [errback]

    found = planned(chord([task("a")], task("b")), options={**given, "countdown": 3, "expires": 60})
    (step,), (start,) = found.steps, found.chords
    assert (step.options["queue"], step.options["countdown"], step.options["expires"]) == ("q", 3, 60)
    assert "link" not in step.options
    assert start.body["options"] == {
        "queue": "q", "expires": 60, "link": [callback], "link_error": [errback],
        "task_id": "3", "group_id": "1",
    }  # fmt: skip


def test_ids_of_the_caller_go_to_the_messages_sent_now() -> None:
    found = planned(group(task("a"), chain(task("b"), task("c"))), root_id="r", parent_id="p")
    for step in found.steps:
        assert (step.options["root_id"], step.options["parent_id"]) == ("r", "p")
    assert "root_id" not in found.steps[1].options["chain"][0]["options"]
    same = planned(group(task("a")), options={"root_id": "r", "parent_id": "p"})
    assert same.steps[0].options["root_id"] == "r"


def test_an_immutable_step_takes_no_arguments_wherever_it_is() -> None:
    for sig in (
        task("a", 1, immutable=True),
        chain(task("a", 1, immutable=True), task("b")),
        {**chain(task("a", 1), task("b")), "immutable": True},
        chain(chain(), {**chain(chain(task("a", 1))), "immutable": True}),
        group({**group(task("a", 1)), "immutable": True}),
        {**chord([task("a", 1)], task("b")), "immutable": True},
    ):
        assert planned(sig, 5).steps[0].args == (1,), sig


# -- the rest of a workflow, in a worker ------------------------------------------------------------


def test_what_follows_a_workflow_is_put_behind_it() -> None:
    rest = [made("z", (), {}, {"task_id": "Z"}), made("y", (), {}, {"task_id": "Y"})]
    found = planned(task("a"), options={"chain": rest})
    assert found.steps[0].options["chain"] == rest
    found = planned(chain(task("a"), task("b")), options={"chain": rest})
    assert [one["task"] for one in found.steps[0].options["chain"]] == ["z", "y", "b"]
    found = planned(group(task("a"), task("b")), options={"chain": rest})
    (start,) = found.chords
    assert [one["task"] for one in start.body["kwargs"]["tasks"]] == ["y", "z"]
    found = planned(chord([task("a")], task("b", link=task("own"))), options={"chain": rest})
    assert [one["task"] for one in found.chords[0].body["kwargs"]["tasks"]] == ["b", "y", "z"]
    assert "link" in found.chords[0].body["kwargs"]["tasks"][0]["options"]
    assert found.result is not None
    assert found.result[0][0] == "Z"


def test_callbacks_of_a_chord_stay_at_its_value_when_more_follows() -> None:
    rest = [made("z", (), {}, {"task_id": "Z"})]
    found = planned(chord([task("a")], task("b")), options={"chain": rest, "link": task("own")})
    first, last = found.chords[0].body["kwargs"]["tasks"]
    assert (first["options"]["link"], last["options"].get("link")) == ([task("own")], None)


@pytest.mark.parametrize(
    "sig",
    [
        task("a"),
        chain(task("a"), task("b")),
        group(task("a"), task("b")),
        chord([task("a")], task("b")),
        chord([task("a")], group(task("b"), task("c"))),
        chain(task("a"), chunks("b", [[1]], 1)),
        chunks("b", [[1], [2]], 1),
    ],
)
def test_a_workflow_in_the_place_of_a_chord_member_counts_once(sig: Sig) -> None:
    body = plain(made("z", (), {}, {"task_id": "Z", "group_id": "G"}))
    new_id = ids()
    found = planned(
        sig, options={"chord": body, "group_id": "G", "group_index": 0, "task_id": "M"}, new_id=new_id
    )
    worker = Worker(new_id)
    worker.chords["G"] = ["G", 1, body, ["M"]]
    worker.run(found)
    assert worker.values["Z"][0] == "z"


def test_a_group_counted_by_its_sender_stays_as_it_is() -> None:
    """Celery counts the members of a group at the end of a header member one by one."""
    body = made("z", (), {}, {"task_id": "Z", "group_id": "G"})
    members = [
        made(name, (), {}, {"task_id": name, "group_id": "G", "group_index": index, "chord": body})
        for index, name in enumerate("ab")
    ]
    step = made_group(members, {"task_id": "inner", "chord": body, "group_id": "G", "root_id": None})
    found = planned(step, 1)
    assert [step.options for step in found.steps] == [one["options"] for one in members]
    assert found.chords == []


def test_stores_that_cannot_count_get_a_task_that_asks() -> None:
    found = planned(chord([task("a"), chain(task("b"), task("c"))], task("d", queue="q")), polled=True)
    assert names(found) == ["celery.chord_unlock", "a", "b"]
    assert found.chords == []
    unlock = found.steps[0]
    group_id, body = unlock.args
    assert group_id == found.steps[1].options["group_id"] == body["options"]["group_id"]
    assert unlock.kwargs == {
        "interval": None, "max_retries": None, "result": [[["2", None], None], [["4", None], None]],
    }  # fmt: skip
    assert {**unlock.options, "task_id": None} == {
        "task_id": None, "countdown": 1, "ignore_result": True, "queue": "q",
    }  # fmt: skip


def test_signatures_with_gaps_are_read() -> None:
    bare: List[Sig] = [{"task": "a"}, {"task": "b", "args": None, "options": None}]
    row = {"task": "celery.chain", "kwargs": {"tasks": bare}, "subtask_type": "chain"}
    side = {"task": "celery.group", "kwargs": {"tasks": bare}, "subtask_type": "group", "args": None}
    both = {"task": "celery.chord", "kwargs": {"header": side, "body": row}, "subtask_type": "chord"}
    for sig, first in ((bare[0], ["a"]), (row, ["a"]), (side, ["a", "b"]), (both, ["a", "b"])):
        assert names(planned(sig)) == first


# -- sizes ---------------------------------------------------------------------------------------


def encoded(found: Plan) -> List[int]:
    return [len(json.dumps(step[:4])) for step in found.steps]


def uuids() -> Callable[[], str]:
    numbers = count()
    return lambda: f"{next(numbers):036}"


def test_a_message_of_a_chain_carries_what_follows_once() -> None:
    (short,) = encoded(planned(chain(*(task("proj.add", n) for n in range(100))), new_id=uuids()))
    (long,) = encoded(planned(chain(*(task("proj.add", n) for n in range(200))), new_id=uuids()))
    assert long < 2.1 * short
    assert long < 64 * 1024


def test_messages_of_a_chord_carry_its_body_once_each() -> None:
    body = task("proj.sum", "x" * 1000)
    found = planned(chord([task("proj.add", n) for n in range(1000)], body), new_id=uuids())
    assert len(found.steps) == 1000
    assert max(encoded(found)) < 1800
    assert all(step.options["chord"] is found.chords[0].body for step in found.steps), "and not a copy"


def test_nesting_does_not_multiply_what_a_message_carries() -> None:
    def nested(depth: int) -> Sig:
        inner = nested(depth - 1) if depth else task("leaf")
        return chord([chain(task("a"), inner), task("b")], task("c", "x" * 100))

    sizes = []
    for depth in (4, 8, 16):
        new_id = uuids()
        worker = Worker(new_id)
        worker.run(planned(nested(depth), new_id=new_id))
        sizes.append(worker.largest)
    assert sizes[1] < 2.3 * sizes[0]
    assert sizes[2] < 2.3 * sizes[1]


def test_a_chain_of_groups_carries_the_rest_once_in_each_message() -> None:
    sizes = []
    for length in (10, 20, 40):
        row = chain(*(group(*(task("proj.add", n) for n in range(3))) for _ in range(length)))
        found = planned(row, new_id=uuids())
        assert len(found.steps) == 3
        sizes.append(max(encoded(found)))
    assert sizes[1] < 2.2 * sizes[0]
    assert sizes[2] < 2.2 * sizes[1]


# -- what cannot be sent --------------------------------------------------------------------------


def nest(depth: int) -> Sig:
    found = task("leaf")
    for _ in range(depth):
        found = group(found, task("x"))
    return found


def test_the_step_that_is_no_signature_is_named() -> None:
    class Add:
        name = "add"
        s = None

    wrong: Any = Add()
    for sig, words in (
        (chain(task("a"), 5), r"^chain\[1\]: 5 is no signature"),  # type: ignore[arg-type]
        (chain(task("a"), chord([task("b"), wrong], task("c"))), r"^chain\[1\].header\[1\]: .*write add.s\("),
        (chord(group(wrong), task("c")), r"^chord.header\[0\]: "),
        (chord([task("a")], "c"), r"^chord.body: 'c' is no signature"),
        (task("a", link=[task("b", link_error="c")]), r"^a.link\[0\].link_error\[0\]: "),
        (wrong, r"^workflow: .*write add.s\("),
    ):
        with pytest.raises(TypeError, match=words):
            planned(sig)


def test_what_a_signature_lacks_is_said() -> None:
    for sig, words in (
        (group({"args": []}), r"^group\[0\]: a signature needs the name of a task, not None"),
        (chord([task("a")], None), "^chord: this chord has no body"),
        (chord([task("a")], chain(chain())), "the body of a chord is an empty chain"),
        (chord(5, task("a")), "^chord: a chord needs a header, not 5"),
        (made("celery.chain", (), {}, {}, "chain"), "^chain: a chain needs a list of tasks, not None"),
        (chain(made("celery.x", (), {}, {}, "xy")), r"^chain\[0\]: there is no workflow of the kind 'xy'"),
        (chunks("a", [], 0), "^celery.chunks: chunks need a size n of at least 1, not 0"),
    ):
        with pytest.raises(ImproperlyConfigured, match=words):
            planned(sig)


def test_tasks_can_be_looked_up_before_anything_is_sent() -> None:
    known = {"proj.add", "proj.mul"}
    check(chain(task("proj.add"), group(task("proj.mul"))), known)
    with pytest.raises(NotRegistered, match=r"chain\[1\].body: proj.mull .*the nearest .* proj.mul\)"):
        check(chain(task("proj.add"), chord([], task("proj.mull"))), known)
    with pytest.raises(NotRegistered, match=r"proj.add.link_error\[0\]: other"):
        planned(task("proj.add", link_error=task("other")), known_tasks=known)


def test_calling_options_can_be_checked_wherever_they_are() -> None:
    def strict(options: Any) -> None:
        for name in options:
            if name != "queue":
                raise TypeError(f"unknown option {name}")

    planned(chain(task("a"), task("b", queue="q")), check_options=strict)
    with pytest.raises(TypeError, match=r"^chain\[1\].header\[0\]: unknown option quue"):
        planned(chain(task("a"), chord([task("b", quue="q")], task("c"))), check_options=strict)


def test_too_deep_is_refused_with_the_place() -> None:
    check(nest(MAX_DEPTH))
    with pytest.raises(ValueError, match=r"^group\[0\]\[0\].*nested 100 deep, and this is deeper") as caught:
        planned(nest(MAX_DEPTH + 1))
    assert len(str(caught.value)) < 500
    with pytest.raises(ValueError, match="deeper"):
        planned(nest(5000))


def test_the_deepest_that_is_allowed_can_be_sent_and_run() -> None:
    new_id = ids()
    deep = task("leaf")
    for _ in range(MAX_DEPTH // 2 - 1):
        deep = chord([chain(task("a"), deep)], task("b"))
    still = [task(name, immutable=True) for name in "ab"]  # what they return does not grow
    row = chain(*(group(*still) for _ in range(MAX_DEPTH - 1)))
    for sig in (deep, row):
        worker = Worker(new_id)
        worker.run(planned(sig, new_id=new_id))
        assert worker.values


def test_a_longer_chain_of_groups_is_refused_before_it_fills_the_stack() -> None:
    row = chain(*(group(task("a"), task("b")) for _ in range(MAX_DEPTH + 2)))
    with pytest.raises(ValueError, match="a chain of groups counts each of them"):
        planned(joined([row]))
    piped: Any = task("x")
    with pytest.raises(ValueError, match="deeper"):
        for _ in range(5000):
            piped = joined([piped, group(task("a"), task("b"))])


def test_a_signature_that_holds_itself_is_refused() -> None:
    ring = chain(task("a"))
    ring["kwargs"]["tasks"].append(ring)
    with pytest.raises(ValueError, match=r"^chain\[1\]: this chain holds itself"):
        planned(ring)
    link = task("a")
    link["options"]["link"] = [link]
    with pytest.raises(ValueError, match=r"^a.link\[0\]: this a holds itself"):
        planned(link)


def test_the_same_signature_may_stand_in_several_places() -> None:
    one = task("a")
    assert len({step.options["task_id"] for step in planned(group(one, one, one)).steps}) == 3


def test_the_same_id_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="two steps of the workflow have the same id 'x': task a and task b"):
        planned(group(task("a", task_id="x"), task("b", task_id="x")))
    with pytest.raises(ValueError, match="the same id 'x'"):
        planned(group(task("a", task_id="x"), group_id="x", task_id="x"))


def test_long_chains_need_no_stack() -> None:
    found = planned(chain(*(task("a") for _ in range(5000))))
    assert len(found.steps[0].options["chain"]) == 4999

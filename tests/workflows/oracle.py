# SPDX-License-Identifier: MIT
"""Random workflows, and what has to come of each: plain Python that knows nothing of the package.

A workflow is a tree of `Node`.  `predict` brings it to a normal form (`Form`: steps one after the
other, of which only the last may be a group or a chord) and walks that, as one would on paper: which
tasks run with which arguments, in which state each one ends, which errbacks hear of it.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

#: Values longer than this are cut and end in a digest.
LONGEST_VALUE = 150
#: How deep workflows are nested.
DEPTH = 4
#: Nodes of a tree at most, about.
MOST_NODES = 60

# -- trees ---------------------------------------------------------------------------------------


class Errback(NamedTuple):
    """An errback; `inline`: it takes (request, exc, traceback) and is called where the task failed."""

    label: str
    inline: bool


@dataclass
class Node:
    """A signature; `kind` is "task", "many", "chain", "group" or "chord".

    Of a task `how` says what it does (see `HOW`), `times` how often, `inner` what replaces it; of
    "many" `how` is "map", "starmap" or "chunks" and `items` are the calls.  A chord has its header in
    `parts`.  `piped` chains are written with ``|``.
    """

    kind: str
    label: str
    parts: List["Node"] = field(default_factory=list)
    body: Optional["Node"] = None
    how: str = "ok"
    times: int = 0
    inner: Optional["Node"] = None
    items: List[str] = field(default_factory=list)
    own: List[str] = field(default_factory=list)
    immutable: bool = False
    ignored: bool = False
    late: bool = False
    piped: bool = False
    links: List["Node"] = field(default_factory=list)
    errbacks: List[Errback] = field(default_factory=list)

    def __str__(self) -> str:
        inside = [str(one) for one in self.parts]
        if self.kind in ("task", "many"):
            name = self.label + (f":{self.how}" if self.how != "ok" else "") + str(self.times or "")
            inside = [*self.own, *self.items] + ([] if self.inner is None else [str(self.inner)])
        else:
            name = f"{self.label}:{self.kind}" + ("|" if self.piped else "")
        flags = "!" * self.immutable + "~" * self.ignored + "&" * self.late
        text = f"{name}{flags}({', '.join(inside)}{'' if self.body is None else f' => {self.body}'})"
        text += "".join(f".link({one})" for one in self.links)
        return text + "".join(f".link_error({one.label}{'*' * one.inline})" for one in self.errbacks)


#: What tasks do, and how often of a thousand.
HOW = {
    "ok": 760,
    "fail": 30,
    "retry": 45,  # `times` times, then ok
    "give_up": 15,  # fails after that
    "requeue": 20,  # is rejected once, and comes again
    "reject": 10,
    "ignore": 10,
    "odd": 10,  # returns what cannot be written
    "ghost": 10,  # nobody knows the task
    "revoked": 20,
    "expired": 20,
    "replace": 50,
}


class Generator:
    """Makes trees; the same ones for the same seed."""

    def __init__(self, seed: int, without: Tuple[str, ...] = ()) -> None:
        self.seed = seed
        self.rand = random.Random(seed)
        self.count = 0
        self.weights = {how: 0 if how in without else weight for how, weight in HOW.items()}
        self.calm = self.rand.random() < 0.3  # a tree in which nothing fails
        self.in_replaced = False

    def tree(self) -> Node:
        while True:
            found = self._node(DEPTH, self.rand.choice(["chain", "chain", "group", "chord", "chord"]))
            if normal(found):
                return found

    def _label(self) -> str:
        self.count += 1
        return f"s{self.seed}.{self.count}"

    def _node(self, depth: int, kind: Optional[str] = None, task_weight: int = 4) -> Node:
        rand = self.rand
        if depth <= 0 or self.count > MOST_NODES:
            kind = "task"
        if kind is None:
            kinds = ["task", "many", "chain", "group", "chord"]
            kind = rand.choices(kinds, [task_weight, 0.5, 2, 2, 1.5])[0]
        if kind == "task":
            return self._task(depth)
        if kind == "many":
            return self._many()
        label = self._label()
        few = [1, 2, 2, 2, 3, 3, 4] if self.count < MOST_NODES // 2 else [1, 2]
        size = 0 if rand.random() < 0.02 else rand.choice(few)
        parts = [self._node(depth - 1) for _ in range(size)]
        node = Node(kind, label, parts)
        if kind == "chord":
            node.body = self._body(depth - 1)
        node.piped = kind == "chain" and len(parts) > 1 and rand.random() < 0.5
        form = normal(node)
        if kind != "group" and form and ends_in_task(form) and rand.random() < 0.1:
            node.links.append(self._link(depth - 1))
        if form and rand.random() < 0.25 and (kind != "group" or form[-1].kind == "group"):
            node.errbacks.append(self._errback())
        return node

    def _body(self, depth: int) -> Node:
        while True:
            body = self._node(depth, task_weight=10)
            if normal(body):
                return body

    def _link(self, depth: int) -> Node:
        while True:
            found = self._node(min(depth, 2), task_weight=10)
            if normal(found):
                return found

    def _errback(self) -> Errback:
        return Errback(self._label() + "e", self.rand.random() < 0.5)

    def _many(self) -> Node:
        rand = self.rand
        node = Node("many", self._label(), how=rand.choice(["map", "starmap", "chunks"]))
        node.items = [f"{node.label}.{index}" for index in range(rand.randint(1, 5))]
        node.times = rand.randint(1, 3)  # the size of chunks
        return node

    def _task(self, depth: int) -> Node:
        rand = self.rand
        node = Node("task", self._label())
        if not self.calm:
            node.how = rand.choices(list(self.weights), list(self.weights.values()))[0]
        if self.in_replaced and node.how in ("revoked", "expired"):
            node.how = "ok"
        if node.how in ("retry", "give_up"):
            node.times = rand.randint(1, 2)
        node.late = node.how == "requeue" or rand.random() < 0.5
        node.own = [f"p{index}" for index in range(rand.choice([0, 0, 1, 2]))]
        node.immutable = rand.random() < 0.12
        if node.how == "replace":
            before, self.in_replaced = self.in_replaced, True
            while node.inner is None or not normal(node.inner):
                node.inner = self._node(min(depth, 2) if not before else 0)
            self.in_replaced = before
        elif node.how != "odd":  # what nobody has a use for is not written
            node.ignored = rand.random() < 0.06
        for _ in range(rand.choices([0, 1, 2], [85, 12, 3])[0]):
            node.links.append(self._link(depth - 1))
        for _ in range(rand.choices([0, 1, 2], [75, 20, 5])[0]):
            node.errbacks.append(self._errback())
        return node


def nodes_of(node: Optional[Node]) -> Iterator[Node]:
    """Yield a node and all in it."""
    if node is None:
        return
    yield node
    for one in (*node.parts, node.body, node.inner, *node.links):
        yield from nodes_of(one)


# -- the normal form -----------------------------------------------------------------------------


@dataclass
class Step:
    """A task (`node`), a group of several `members`, or a chord of `members` and a `body`."""

    kind: str
    node: Optional[Node] = None
    members: List["Form"] = field(default_factory=list)
    body: "Form" = field(default_factory=list)


#: Steps one after the other; the last may be a group or a chord.
Form = List[Step]


def normal(node: Node) -> Form:
    """Return the steps that a tree comes to; none where it is empty.

    Groups in groups are merged, a group of one is its member, chains in chains are flattened.
    """
    if node.kind == "task" or (node.kind == "many" and node.how != "chunks"):
        return [Step("task", replace(node, errbacks=list(node.errbacks), links=list(node.links)))]
    if node.kind == "many":
        return _grouped(members_of(node))
    if node.kind == "group":
        form = _grouped(members_of(node))
    elif node.kind == "chord":
        assert node.body is not None
        header = [member for part in node.parts for member in as_members(part)]
        form = [Step("chord", members=header, body=alone(node.body))]
    else:
        parts_of = [normal(part) for part in node.parts]
        if node.piped and node.parts[0].kind == "group":
            rest = fold([step for form in parts_of[1:] for step in form])
            if rest:
                # With | what follows a group gets a list, however many members it has.
                parts_of = [[Step("chord", members=members_of(node.parts[0]), body=rest)]]
        form = fold([step for form in parts_of for step in form])
    if node.kind != "group":
        for errback in node.errbacks:
            give_errback(form, errback)
    for link in node.links:
        end_of(form).links.append(link)
    return form


def alone(node: Node) -> Form:
    """Return the steps of a tree that is no step of another: there, a group of one is a group."""
    return [Step("group", members=members_of(node))] if is_group(node) else normal(node)


def is_group(node: Node) -> bool:
    return node.kind == "group" or (node.kind == "many" and node.how == "chunks")


def members_of(node: Node) -> List[Form]:
    """Return the members of a group, with its errbacks."""
    if node.kind == "many":
        chunks = [node.items[at : at + node.times] for at in range(0, len(node.items), node.times)]
        return [
            [Step("task", Node("many", f"{node.label}/{index}", how="starmap", items=items))]
            for index, items in enumerate(chunks)
        ]
    members = [member for part in node.parts for member in as_members(part)]
    for errback in node.errbacks:
        for member in members:
            give_errback(member, errback)
    return members


def as_members(part: Node) -> List[Form]:
    """Return the members that a part of a group comes to."""
    if is_group(part):
        return members_of(part)
    form = normal(part)
    if len(form) == 1 and form[0].kind == "group":
        return form[0].members
    return [form] if form else []


def _grouped(members: List[Form]) -> Form:
    return members[0] if len(members) == 1 else [Step("group", members=members)] if members else []


def fold(steps: List[Step]) -> Form:
    """Make chords of groups that something follows, and put what follows chords into their bodies."""
    for index, step in enumerate(steps[:-1]):
        if step.kind != "task":
            body = fold([*step.body, *steps[index + 1 :]])
            return [*steps[:index], Step("chord", members=step.members, body=body)]
    return steps


def give_errback(form: Form, errback: Errback) -> None:
    """Add an errback to all steps: of a group to its members, of a chord to the body."""
    for step in form:
        if step.node is not None:
            if errback not in step.node.errbacks:
                step.node.errbacks = [*step.node.errbacks, errback]
        elif step.kind == "group":
            for member in step.members:
                give_errback(member, errback)
        else:
            give_errback(step.body, errback)


def ends_in_task(form: Form) -> bool:
    return form[-1].kind == "task" or (form[-1].kind == "chord" and ends_in_task(form[-1].body))


def end_of(form: Form) -> Node:
    """Return the task in which a form ends."""
    last = form[-1]
    if last.kind == "chord":
        return end_of(last.body)
    assert last.node is not None
    return last.node


# -- values --------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """Return an argument or value as text."""
    return f"[{','.join(map(shown, value))}]" if isinstance(value, (list, tuple)) else str(value)


def value_of(label: str, args: Any) -> str:
    """Return what a task returns: who it is, and what it got."""
    text = f"{label}({','.join(map(shown, args))})"
    if len(text) > LONGEST_VALUE:
        text = f"{text[: LONGEST_VALUE - 20]}~{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return text


# -- prediction ----------------------------------------------------------------------------------


class Failed(Exception):
    """The end of a step that has no value; `kind` is the name of the exception's class."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


@dataclass
class Prediction:
    """What has to come of a workflow."""

    #: (label, arguments as text) -> how often it runs.
    runs: "Counter[Tuple[str, str]]" = field(default_factory=Counter)
    #: (errback's label, label of the task that failed) -> how often it is called.
    errors: "Counter[Tuple[str, str]]" = field(default_factory=Counter)
    #: Label -> (state, value or name of the exception's class); None: no result is kept.
    states: Dict[str, Optional[Tuple[str, Any]]] = field(default_factory=dict)
    #: Label -> label of the task whose id it runs under.
    aliases: Dict[str, str] = field(default_factory=dict)
    #: Labels that run once even where messages arrive twice: chords' bodies.
    once: Set[str] = field(default_factory=set)
    #: Of the whole: its value, or `Failed`.
    result: Any = None


class Oracle:
    """Walks a normal form."""

    def __init__(self) -> None:
        self.found = Prediction()
        #: How many things are around it that a message which arrives twice does twice, under new ids.
        self.repeatable = 0

    def run(self, form: Form, args: List[Any]) -> Any:
        """Return the value of a form; raises `Failed`."""
        step, rest = form[0], form[1:]
        if step.kind == "task":
            assert step.node is not None
            try:
                value = self._task(step.node, args)
            except Failed as failed:
                self._never(rest, failed.kind)
                raise
            return self.run(rest, [value]) if rest else value
        values, error = self._members(step.members, args)
        if step.kind == "group":
            if error is not None:
                raise error
            return values
        if error is not None:
            self._never(step.body, "ChordError")
            for node in answering(step.body):
                self._call_errbacks(node)
            raise Failed("ChordError")
        if not self.repeatable:
            self.found.once.update(first_labels(step.body))
        return self.run(step.body, [values])

    def _members(self, members: List[Form], args: List[Any]) -> Tuple[List[Any], Optional[Failed]]:
        values, error = [], None
        for member in members:
            try:
                values.append(self.run(member, args))
            except Failed as failed:
                error = error or failed
        return values, error

    def _never(self, form: Form, kind: str) -> None:
        """Say of all tasks in a form that they fail without having run."""
        for step in form:
            if step.node is not None:
                self._ends(step.node, "FAILURE", kind)
            for inner in (*step.members, step.body):
                self._never(inner, kind)

    def _ends(self, node: Node, state: str, value: Any) -> None:
        ignored = None if node.how != "revoked" else ("REVOKED", "TaskRevokedError")
        self.found.states[node.label] = ignored if node.ignored else (state, value)

    def _call_errbacks(self, node: Node) -> None:
        for errback in node.errbacks:
            self.found.errors[errback.label, node.label] += 1

    def _task(self, node: Node, args: List[Any]) -> Any:
        if node.kind == "gather":
            value: Any = args[0]
        elif node.kind == "many":
            for item in node.items:
                self.found.runs[item, ""] += 1
            value = [value_of(item, ()) for item in node.items]
        else:
            args = node.own if node.immutable else [*args, *node.own]
            value = self._work(node, args)
        if node.how != "replace":
            self._ends(node, "SUCCESS", value)
        self._linked(node, value)
        return value

    def _linked(self, node: Node, value: Any) -> None:
        self.repeatable += 1
        for link in node.links:
            try:
                self.run(alone(link), [value])
            except Failed:
                pass  # nobody waits for it
        self.repeatable -= 1

    def _work(self, node: Node, args: List[Any]) -> Any:
        how = node.how
        times = 0 if how in NEVER_BEGIN else 1 + node.times if how in ("retry", "give_up") else 1
        if how == "requeue":
            times = 2
        if times:
            self.found.runs[node.label, ",".join(map(shown, args))] += times
        if how == "replace":
            return self._replaced(node, args)
        kind = FAILURES.get(how)
        if kind is None:
            return value_of(node.label, args)
        if how == "ignore":
            self.found.states[node.label] = None
            raise Failed(kind)
        revoked = how in ("revoked", "expired")
        self._ends(node, "REVOKED" if revoked else "FAILURE", kind)
        if how == "revoked":
            self.found.states[node.label] = ("REVOKED", kind)  # by who revokes, and knows of no options
        if not revoked:
            self._call_errbacks(node)
        raise Failed(kind)

    def _replaced(self, node: Node, args: List[Any]) -> Any:
        assert node.inner is not None
        form = alone(node.inner)
        if not ends_in_task(form):
            # The values of a group are gathered, under the id of what it replaces.
            form = fold([*form, Step("task", Node("gather", f"{node.label}/all"))])
        self.found.aliases[end_of(form).label] = node.label
        for errback in node.errbacks:
            give_errback(form, errback)
        self.repeatable += 1
        try:
            return self.run(form, args)
        finally:
            self.repeatable -= 1


def answering(form: Form) -> Iterator[Node]:
    """Yield the tasks whose errbacks hear that a body cannot begin: its first ones, of a chord its body's.

    A chord that only gathers the values of a group is that group.
    """
    first = form[0]
    if first.node is not None:
        yield first.node
    elif first.kind == "chord":
        yield from answering(first.body)
        gathers = first.body[0].node is not None and first.body[0].node.kind == "gather"
        if gathers:
            for member in first.members:
                yield from answering(member)
    else:
        for member in first.members:
            yield from answering(member)


def first_labels(form: Form) -> Iterator[str]:
    """Yield the labels of the tasks that a form begins with."""
    first = form[0]
    if first.node is not None:
        yield from [first.node.label, *first.node.items]
    for member in first.members:
        yield from first_labels(member)


def predict(tree: Node, args: List[Any]) -> Prediction:
    """Return what has to come of a tree that is called with `args`."""
    oracle = Oracle()
    try:
        oracle.found.result = oracle.run(alone(tree), args)
    except Failed as failed:
        oracle.found.result = failed
    return oracle.found


NEVER_BEGIN = ("ghost", "revoked", "expired")
FAILURES = {
    "fail": "ValueError",
    "give_up": "ValueError",
    "reject": "Reject",
    "ignore": "Ignore",
    "odd": "EncodeError",
    "ghost": "NotRegistered",
    "revoked": "TaskRevokedError",
    "expired": "TaskRevokedError",
}

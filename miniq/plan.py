# SPDX-License-Identifier: MIT
"""What a workflow sends: pure functions on the data of signatures, without an app, a broker or a clock.

`plan` answers which messages start a workflow, in three passes over plain dicts:

    fold    the algebra: chains are flattened, a group that something follows becomes a chord, what
            follows a chord goes into its body, groups in groups are merged
    freeze  every step gets its id, options and partial arguments of workflows go to the steps
    begin   the steps that are sent now, each with all that comes after it and nothing else

Every member of a chord's header ends in exactly one task, which counts once, at the place where it
was written: a member that ends in a group is gathered by ``celery.accumulate`` first, so its value is
one list.  Nothing given is changed; a frozen workflow is itself a signature, and freezing it again
keeps its ids, so that a worker plans the rest of a chain with the same function.

Source: section "Canvas" of Celery's user guide; the wire form of its signatures.
"""

from __future__ import annotations

from typing import Any, Callable, Container, Dict, Iterable, List, Mapping, NamedTuple, Optional, Tuple

from .algebra import (
    MAX_FROZEN_DEPTH,
    Sig,
    as_group,
    bound,
    check,
    chord_of,
    end_of,
    fold,
    gathered,
    joined,
    kind_of,
    last_task,
    linked,
    made,
    made_chain,
    made_chord,
    made_group,
    members_of,
    options_of,
    shared_of,
    with_id,
    with_tail,
)
from .exceptions import ImproperlyConfigured

#: A result as Celery writes it: [[id, result of the parent or None], results of the members or None].
ResultTuple = List[Any]

#: Options that belong to the last step of a workflow: where its value goes.
_TAIL = ("group_id", "group_index", "chord")
#: Seconds until the first look at a chord that is watched.
WATCH_S = 30
#: Options of a chord that hold its header back, and so its body too.
_DELAYS = ("countdown", "eta")


class Step(NamedTuple):
    """One message to be sent now; `options` are those of `Task.apply_async`.

    ``options["chain"]`` holds the frozen signatures of what comes next, the next one last;
    ``options["chord"]`` the frozen body this task counts for.  `where` names it for people.
    """

    task: str
    args: Tuple[Any, ...]
    kwargs: Dict[str, Any]
    options: Dict[str, Any]
    where: str = ""


class ChordStart(NamedTuple):
    """A header of `size` members; to be written before the last of its messages is sent.

    `members` are the ids of the tasks that count, in the order of their results.
    """

    group_id: str
    size: int
    body: Sig
    members: Tuple[str, ...] = ()


class Plan(NamedTuple):
    """What starts a workflow: messages in the order of sending, counters, and its result.

    `result` is None where there is nothing to run (an empty chain).
    """

    steps: List[Step]
    chords: List[ChordStart]
    result: Optional[ResultTuple]


def plan(
    sig: Mapping[str, Any],
    args: Iterable[Any] = (),
    kwargs: Optional[Mapping[str, Any]] = None,
    options: Optional[Mapping[str, Any]] = None,
    *,
    new_id: Callable[[], str],
    root_id: Optional[str] = None,
    parent_id: Optional[str] = None,
    reply_to: Optional[str] = None,
    polled: bool = False,
    known_tasks: Optional[Container[str]] = None,
    check_options: Optional[Callable[[Mapping[str, Any]], None]] = None,
    max_depth: int = MAX_FROZEN_DEPTH,
) -> Plan:
    """Return what to send for a signature of any kind, called with `args`, `kwargs` and `options`.

    `options` may say where the value goes: `chain` (the steps after it, the next one last), `chord`
    with `group_id` and `group_index`; `task_id` is the id of the result.  `polled`: chords are not
    counted by the store but looked after by a task, see `poll`.

    Raises what `check` raises, and `ValueError` where two steps were given the same id.
    """
    check(sig, known_tasks, check_options, max_depth=max_depth)
    given = dict(options or {})
    root_id, parent_id = root_id or given.pop("root_id", None), parent_id or given.pop("parent_id", None)
    task_id = given.pop("task_id", None)
    node = bound(sig, tuple(args), kwargs or {}, given)
    if task_id is not None:
        node = with_id(node if given.get("chain") else _placed(node), task_id)
    frozen, result = Freezer(new_id, reply_to).freeze(node)
    found = Plan([], [], result)
    _begin(frozen, root_id, parent_id, kind_of(frozen) or frozen["task"], found)
    return poll(found, new_id) if polled else found


# -- freeze --------------------------------------------------------------------------------------


class Freezer:
    """Gives ids to the steps of a workflow, and options of workflows to their steps."""

    __slots__ = ("_new_id", "_reply_to", "_ids")

    def __init__(self, new_id: Callable[[], str], reply_to: Optional[str] = None) -> None:
        self._new_id = new_id
        self._reply_to = reply_to
        self._ids: Dict[str, str] = {}

    def freeze(self, sig: Sig, parent: Optional[ResultTuple] = None) -> Tuple[Sig, Optional[ResultTuple]]:
        """Return the frozen form of a checked signature and its result, whose parent is `parent`."""
        sig = _placed(sig)
        kind = kind_of(sig)
        if kind is None:
            return self._task(sig, parent)
        if kind == "chain":
            return self._chain(sig, parent)
        return self._group(sig, parent) if kind == "group" else self._chord(sig, parent)

    def _id(self, options: Mapping[str, Any], what: str) -> str:
        task_id = options.get("task_id")
        if task_id is None:
            return self._new_id()
        if task_id in self._ids:
            raise ValueError(
                f"two steps of the workflow have the same id {task_id!r}: {self._ids[task_id]} and {what};"
                " give each its own, or none"
            )
        self._ids[task_id] = what
        return str(task_id)

    def _task(self, sig: Sig, parent: Optional[ResultTuple]) -> Tuple[Sig, ResultTuple]:
        options = dict(options_of(sig))
        options["task_id"] = task_id = self._id(options, f"task {sig['task']}")
        if self._reply_to and not options.get("reply_to"):
            options["reply_to"] = self._reply_to
        frozen = made(
            sig["task"],
            sig.get("args") or (),
            sig.get("kwargs") or {},
            options,
            None,
            bool(sig.get("immutable")),
        )
        return frozen, [[task_id, parent], None]

    def _chain(self, sig: Sig, parent: Optional[ResultTuple]) -> Tuple[Sig, Optional[ResultTuple]]:
        steps, result = [], parent
        for step in fold([sig]):
            frozen, result = self.freeze(step, result)
            steps.append(frozen)
        if not steps:
            return made_chain([]), None
        assert result is not None  # no step of a folded chain is empty
        return made_chain(steps, {"task_id": result[0][0]}), result

    def _group(
        self, sig: Sig, parent: Optional[ResultTuple], in_one: bool = False
    ) -> Tuple[Sig, ResultTuple]:
        """Freeze a group; `in_one`: it is a header, whose members end in one task each."""
        options = options_of(sig)
        group_id = self._id(options, "a group")
        members: List[Sig] = []
        results: List[ResultTuple] = []
        for member in members_of(sig):
            if in_one:
                member = ending_in_one(member)
            frozen, result = self.freeze(member)
            assert result is not None  # only an empty chain has none
            last = last_task(frozen)
            if last is not None and (in_one or last["options"].get("chord") is None):
                frozen = with_tail(frozen, {"group_index": len(members)})
            members.append(frozen)
            results.append(result)
        kept = {"task_id": group_id, "root_id": options.get("root_id"), "parent_id": options.get("parent_id")}
        return made_group(members, kept), [[group_id, parent], results]

    def _chord(self, sig: Sig, parent: Optional[ResultTuple]) -> Tuple[Sig, Optional[ResultTuple]]:
        sig = _settled(sig)
        own, header, body = options_of(sig), sig["kwargs"]["header"], sig["kwargs"]["body"]
        if not isinstance(header, dict):
            header = made_group(list(header))
        elif header.get("subtask_type") != "group":
            header = made_group([header])
        partial_args, partial_kwargs, options = shared_of(sig)
        header = bound(header, partial_args, partial_kwargs, options)
        if own.get("task_id"):
            header["options"]["task_id"] = own["task_id"]
        header["options"].pop("chord", None)
        for delay in _DELAYS:
            options.pop(delay, None)
        frozen_header, result = self._group(header, parent, in_one=True)
        frozen_body, result_of_body = self.freeze(bound(body, (), {}, options), result)
        if result_of_body is None:
            raise ImproperlyConfigured("the body of a chord is an empty chain; it has nothing to call")
        frozen = made_chord(frozen_header, frozen_body, {"task_id": result[0][0]})
        return frozen, result_of_body


def _placed(sig: Sig) -> Sig:
    """Return `sig` such that where its value goes is said at its end, not by options of a workflow."""
    sig = as_group(sig)
    options = options_of(sig)
    rest = options.get("chain")
    tail = {key: options[key] for key in _TAIL if options.get(key) is not None}
    if kind_of(sig) is None or not (rest or tail):
        return sig
    sig = {**sig, "options": {k: v for k, v in options.items() if k != "chain" and k not in tail}}
    if rest:
        sig = joined([_settled(sig), *reversed(rest)])
    if "chord" in tail and not _is_counted(sig):
        sig = ending_in_one(sig)
    return with_tail(joined([sig]) if kind_of(sig) == "chain" else sig, tail)


def ending_in_one(sig: Sig) -> Sig:
    """Return `sig` such that it ends in one task: what ends in a group is gathered to one value."""
    sig = as_group(sig)
    kind = kind_of(sig)
    if kind == "group":
        return chord_of(sig, gathered(sig))
    if kind == "chord":
        body = ending_in_one(sig["kwargs"]["body"])
        return {**sig, "kwargs": {**sig["kwargs"], "body": body}}
    if kind == "chain":
        steps = fold([sig])
        steps[-1:] = [ending_in_one(step) for step in steps[-1:]]
        return steps[0] if len(steps) == 1 else made_chain(steps)
    return sig


def _settled(sig: Sig) -> Sig:
    """Return `sig`; if it is a chord, with its callbacks on the body, before that gets more steps."""
    options = options_of(sig)
    if kind_of(sig) != "chord" or not (options.get("link") or options.get("link_error")):
        return sig
    kept = {key: value for key, value in options.items() if key not in ("link", "link_error")}
    return linked({**sig, "options": kept}, options.get("link"), options.get("link_error"))


def _is_counted(sig: Sig) -> bool:
    """Say whether it ends in a group whose members say which chord they count for, as Celery has it."""
    end = end_of(sig)
    if end is None or kind_of(end) != "group" or not end["kwargs"]["tasks"]:
        return False
    last = last_task(end["kwargs"]["tasks"][0])
    return last is not None and last["options"].get("chord") is not None


# -- begin ---------------------------------------------------------------------------------------


def _begin(sig: Sig, root_id: Optional[str], parent_id: Optional[str], where: str, found: Plan) -> None:
    """Add what starts a frozen signature to `found`."""
    kind, options, kwargs = kind_of(sig), sig["options"], sig["kwargs"]
    if kind is None:
        options = {key: value for key, value in options.items() if value is not None}
        for key, value in (("root_id", root_id), ("parent_id", parent_id)):
            if value is not None:
                options[key] = value
        found.steps.append(Step(sig["task"], tuple(sig["args"]), kwargs, options, where))
    elif kind == "chain":
        first, rest = kwargs["tasks"][:1], kwargs["tasks"][:0:-1]
        for step in first:
            if rest:
                after = step["options"].get("chain") or ()
                step = {**step, "options": {**step["options"], "chain": [*rest, *after]}}
            _begin(step, root_id, parent_id, f"{where}[0]", found)
    elif kind == "group":
        group_id = options["task_id"]
        root_id, parent_id = root_id or options.get("root_id"), parent_id or options.get("parent_id")
        for index, member in enumerate(kwargs["tasks"]):
            last = last_task(member)
            if last is not None and last["options"].get("group_id") is None:
                member = with_tail(member, {"group_id": group_id})
            _begin(member, root_id, parent_id, f"{where}[{index}]", found)
    else:
        _begin_chord(kwargs["header"], kwargs["body"], root_id, parent_id, where, found)


def _begin_chord(
    header: Sig, body: Sig, root_id: Optional[str], parent_id: Optional[str], where: str, found: Plan
) -> None:
    group_id, members = header["options"]["task_id"], header["kwargs"]["tasks"]
    last = last_task(body)
    if last is not None and last["options"].get("group_id") is None:
        body = with_tail(body, {"group_id": group_id})
    if not members:
        _begin(bind_frozen(body, ([],)), root_id, parent_id, f"{where}.body", found)
        return
    ids = []
    for index, member in enumerate(members):
        member = with_tail(member, {"group_id": group_id, "group_index": index, "chord": body})
        last = last_task(member)
        assert last is not None  # frozen headers have members that end in one task
        ids.append(last["options"]["task_id"])
        _begin(member, root_id, parent_id, f"{where}.header[{index}]", found)
    found.chords.append(ChordStart(group_id, len(members), body, tuple(ids)))


def bind_frozen(sig: Sig, args: Tuple[Any, ...]) -> Sig:
    """Return a frozen signature with `args` put before those of the steps it begins with."""
    kind, kwargs = kind_of(sig), sig["kwargs"]
    if kind is None:
        return bound(sig, args, {}, {})
    if kind == "chord":
        return {**sig, "kwargs": {**kwargs, "header": bind_frozen(kwargs["header"], args)}}
    tasks = kwargs["tasks"]
    if kind == "chain":
        tasks = [*(bind_frozen(step, args) for step in tasks[:1]), *tasks[1:]]
    else:
        tasks = [bind_frozen(step, args) for step in tasks]
    return {**sig, "kwargs": {**kwargs, "tasks": tasks}}


def watch(found: Plan, new_id: Callable[[], str]) -> Plan:
    """Return a plan in which a task has a look at each chord now and then, though its members are counted.

    For stores that cannot tell which chords are left over.  The bodies say how many members they wait
    for, as a member has to know that to notice that it is the last one.
    """
    unlocks = []
    for start in found.chords:
        # In what the members hold too: it is the same dict, and made for this plan.
        start.body["chord_size"] = start.size
        of_header = (step for step in found.steps if step.options.get("group_id") == start.group_id)
        like = next(of_header, found.steps[0]).options
        unlocks.append(_unlock(start, None, WATCH_S, new_id(), like))
    return found._replace(steps=unlocks + found.steps)


def poll(found: Plan, new_id: Callable[[], str]) -> Plan:
    """Return a plan in which each chord is looked after by a task, ``celery.chord_unlock``.

    For stores that cannot count: the task asks for the members' results until all are there.
    """
    unlocks = []
    for start in found.chords:
        results = [[[task_id, None], None] for task_id in start.members]
        unlocks.append(_unlock(start, results, None, new_id(), start.body["options"]))
    return Plan(unlocks + found.steps, [], found.result)


def _unlock(
    start: ChordStart, results: Any, interval_s: Optional[float], task_id: str, like: Mapping[str, Any]
) -> Step:
    """Return the message of the task that looks; it goes where one with the options `like` goes."""
    kwargs = {"interval": interval_s, "max_retries": None, "result": results}
    options = {"task_id": task_id, "countdown": interval_s or 1, "ignore_result": True}
    for key in ("queue", "priority") if results else ("queue", "priority", "root_id"):
        if like.get(key) is not None:
            options[key] = like[key]
    return Step("celery.chord_unlock", (start.group_id, start.body), kwargs, options, "chord")

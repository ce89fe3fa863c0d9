# SPDX-License-Identifier: MIT
"""The algebra of workflows, on plain dicts: what signatures are, and what several of them come to.

`fold` turns any row of signatures into steps one after the other: chains are flattened, a group that
something follows becomes a chord, what follows a chord goes into its body.  `check` says first
whether it can be done.  Nothing given is changed: what differs is a new dict around the same parts.

Source: section "Canvas" of Celery's user guide; the wire form of its signatures.
"""

from __future__ import annotations

from typing import Any, Callable, Container, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

from .exceptions import ImproperlyConfigured, NotRegistered
from .text import nearest, safe_repr

#: How deep workflows may be nested; a chain of groups is one level deeper with each of them.
MAX_DEPTH = 100
#: The same for what arrives: frozen, a workflow has up to three levels for one (a header is a group, a
#: member holds the body it counts for), and whatever was sent must be able to go on.
MAX_FROZEN_DEPTH = 4 * MAX_DEPTH

#: A signature as a dict; see `miniq.canvas.Signature` for its keys.
Sig = Dict[str, Any]

#: Stands for a group, though it says that it is a task.
CHUNKS = "celery.chunks"
#: The task that makes one value of a group's.
GATHERED = "celery.accumulate"

#: Options that say which step it is; all others of a workflow are for its steps.
OWN_OPTIONS = frozenset({"task_id", "root_id", "parent_id", "group_id", "group_index", "chord", "chain"})
#: Those that hold signatures themselves.
NESTED_OPTIONS = ("link", "link_error", "chain", "chord")


# -- reading -------------------------------------------------------------------------------------


def kind_of(sig: Mapping[str, Any]) -> Optional[str]:
    """Return "chain", "group" or "chord"; None for a call of one task."""
    return sig.get("subtask_type")


def options_of(sig: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the options; other writers may leave them out."""
    return sig.get("options") or {}


def made(
    task: str,
    args: Any,
    kwargs: Dict[str, Any],
    options: Dict[str, Any],
    kind: Optional[str] = None,
    immutable: bool = False,
) -> Sig:
    """Return a signature with all its keys."""
    return {
        "task": task,
        "args": args,
        "kwargs": kwargs,
        "options": options,
        "subtask_type": kind,
        "immutable": immutable,
    }


def made_chain(steps: List[Any], options: Optional[Dict[str, Any]] = None) -> Sig:
    """Return the signature of a chain."""
    return made("celery.chain", (), {"tasks": steps}, options or {}, "chain")


def made_group(members: List[Any], options: Optional[Dict[str, Any]] = None) -> Sig:
    """Return the signature of a group."""
    return made("celery.group", (), {"tasks": members}, options or {}, "group")


def made_chord(header: Any, body: Any, options: Optional[Dict[str, Any]] = None) -> Sig:
    """Return the signature of a chord."""
    kwargs = {"kwargs": {}, "header": header, "body": body}
    return made("celery.chord", (), kwargs, options or {}, "chord")


def gathered(like: Mapping[str, Any]) -> Sig:
    """Return the signature of the task that makes one value of a group's.

    It goes where the first task of `like` goes: somebody consumes there.
    """
    first: Optional[Mapping[str, Any]] = like
    while first is not None and kind_of(first) is not None:
        kwargs = first["kwargs"]
        inner = kwargs["header"] if kind_of(first) == "chord" else kwargs["tasks"]
        first = inner if isinstance(inner, dict) else (inner or [None])[0]
    options = (first or {}).get("options") or {}
    place = {key: options[key] for key in _PLACE if options.get(key) is not None}
    return made(GATHERED, (), {"index": 0}, place)


def as_group(sig: Any) -> Any:
    """Return `sig`; one of ``celery.chunks`` as the group of ``celery.starmap`` that it stands for."""
    if sig["task"] != CHUNKS:
        return sig
    kwargs = sig["kwargs"]
    items, size = list(kwargs["it"]), kwargs["n"]
    parts = [items[at : at + size] for at in range(0, len(items), size)]
    members = [
        made("celery.starmap", (), {"task": kwargs["task"], "it": part}, {}, immutable=True) for part in parts
    ]
    return made_group(members, dict(options_of(sig)))


#: Options that say where a message goes.
_PLACE = ("queue", "exchange", "routing_key", "priority")


def as_list(value: Any) -> List[Any]:
    """Return callbacks as a list: none, one signature, or several."""
    if value is None:
        return []
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    return [value]


# -- partial arguments and options -----------------------------------------------------------------


def bound(
    sig: Mapping[str, Any], args: Tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> Sig:
    """Return `sig` with `args` before its own, `kwargs` and `options` over its own.

    An immutable one takes options only.  A workflow keeps what it got until it is frozen.
    """
    own = options_of(sig)
    merged = {**own, **options}
    if own.get("stamped_headers") and options.get("stamped_headers"):
        merged["stamped_headers"] = list(
            dict.fromkeys([*own["stamped_headers"], *options["stamped_headers"]])
        )
    own_args, own_kwargs = sig.get("args") or (), sig.get("kwargs") or {}
    immutable = bool(sig.get("immutable"))
    if not immutable and (args or kwargs):
        own_args = (*args, *own_args)
        if kind_of(sig) is None:
            own_kwargs = {**own_kwargs, **kwargs}
        else:  # a workflow's kwargs are its steps; the partial ones wait under a key of their own
            own_kwargs = {**own_kwargs, "kwargs": {**(own_kwargs.get("kwargs") or {}), **kwargs}}
    return made(sig["task"], own_args, own_kwargs, merged, kind_of(sig), immutable)


def linked(sig: Mapping[str, Any], link: Any, link_error: Any) -> Sig:
    """Return `sig` with more callbacks, each one once; those of a chord are its body's."""
    if kind_of(sig) == "chord" and sig["kwargs"]["body"] is not None:
        kwargs = sig["kwargs"]
        return {**sig, "kwargs": {**kwargs, "body": linked(kwargs["body"], link, link_error)}}
    options = dict(options_of(sig))
    for key, values in (("link", link), ("link_error", link_error)):
        for value in as_list(values):
            if value not in as_list(options.get(key)):
                options[key] = [*as_list(options.get(key)), value]
    return {**sig, "options": options}


def shared_of(sig: Mapping[str, Any]) -> Tuple[Tuple[Any, ...], Dict[str, Any], Dict[str, Any]]:
    """Return what a workflow has for its steps: args, kwargs, options other than callbacks and ids."""
    options = {
        key: value
        for key, value in options_of(sig).items()
        if key not in OWN_OPTIONS and key not in ("link", "link_error") and value is not None
    }
    return tuple(sig.get("args") or ()), sig["kwargs"].get("kwargs") or {}, options


def with_id(sig: Mapping[str, Any], task_id: str) -> Sig:
    """Return `sig` with the id of its result set: of a chord, that of the body."""
    if kind_of(sig) == "chord":
        return {**sig, "kwargs": {**sig["kwargs"], "body": with_id(sig["kwargs"]["body"], task_id)}}
    return {**sig, "options": {**options_of(sig), "task_id": task_id}}


def with_tail(sig: Sig, tail: Mapping[str, Any]) -> Sig:
    """Return `sig` whose last task has the options `tail`; a group has no last task and stays as it is."""
    kind = kind_of(sig)
    if kind is None:
        return {**sig, "options": {**options_of(sig), **tail}}
    if kind == "group":
        return sig
    key = "tasks" if kind == "chain" else "body"
    inner = sig["kwargs"][key]
    if kind == "chord":
        inner = with_tail(inner, tail)
    elif inner:
        inner = [*inner[:-1], with_tail(inner[-1], tail)]
    return {**sig, "kwargs": {**sig["kwargs"], key: inner}}


def last_task(sig: Sig) -> Optional[Sig]:
    """Return the task in which a signature ends; None where it is a group, or there is none."""
    last = end_of(sig)
    return None if last is None or kind_of(last) or last["task"] == CHUNKS else last


def end_of(sig: Sig) -> Optional[Sig]:
    """Return the task or group in which a signature ends; None for an empty chain."""
    last: Optional[Sig] = sig
    while last is not None and kind_of(last) in ("chain", "chord"):
        kwargs = last["kwargs"]
        last = kwargs["body"] if kind_of(last) == "chord" else (kwargs["tasks"] or [None])[-1]
    return last


# -- fold ----------------------------------------------------------------------------------------


def joined(sigs: Iterable[Mapping[str, Any]]) -> Sig:
    """Return one signature that runs these one after the other: a chain, or what a chain comes to."""
    steps = fold(sigs)
    return steps[0] if len(steps) == 1 else made_chain(steps)


def fold(sigs: Iterable[Any]) -> List[Any]:
    """Return the steps of these in a row: tasks, of which the last may be a group or a chord."""
    flat = [step for sig in sigs for step in _steps(sig)]
    return _folded(flat, [], 0)


def _steps(sig: Any) -> List[Any]:
    """Return a chain's steps, chains in it flattened; a group of one is its member, an empty one nothing."""
    sig = as_group(sig)
    kind = kind_of(sig)
    if kind == "group":
        tasks = sig["kwargs"]["tasks"]
        if len(tasks) > 1 and all(kind_of(task) is None and task["task"] != CHUNKS for task in tasks):
            return [sig]  # the usual one needs no closer look
        tasks = members_of(sig)
        if len(tasks) > 1:
            return [sig]
        found = [_steps(one) for one in tasks]
    elif kind == "chain":
        found = _steps_of_chain(sig)
    else:
        return [sig]
    flat = [step for steps in found for step in steps]
    if flat and sig.get("immutable"):
        flat[0] = {**flat[0], "immutable": True}
    if flat and kind == "chain":
        get = options_of(sig).get
        if get("link"):
            flat[-1] = linked(flat[-1], get("link"), ())
        if get("task_id"):
            flat[-1] = with_id(flat[-1], options_of(sig)["task_id"])
    return flat


def _steps_of_chain(sig: Any) -> List[List[Any]]:
    """Return the steps that each part of a chain comes to, with what the chain has for its first."""
    args, kwargs, options = shared_of(sig)
    link_error = options_of(sig).get("link_error")
    pending = bool(args or kwargs or options)
    found = []
    for part in sig["kwargs"]["tasks"]:
        if link_error:
            part = linked(part, (), link_error)
        found.append(_steps(bound(part, args, kwargs, options) if pending else part))
        pending = pending and not found[-1]
    return found


def _folded(flat: List[Any], rest: List[Any], depth: int) -> List[Any]:
    """Fold steps before `rest`, which are folded already."""
    if depth > MAX_DEPTH:
        raise too_deep("this chain")
    found = list(reversed(rest))
    for step in reversed(flat):
        if found and kind_of(step) == "group":
            after = found[0] if len(found) == 1 else made_chain(found[::-1])
            found = [chord_of(step, after)]
        elif found and kind_of(step) == "chord":
            kwargs = step["kwargs"]
            body = as_group(kwargs["body"] or made_chain([]))
            steps = [body] if kind_of(body) == "group" else _steps(body)
            steps = _folded(steps, found[::-1], depth + 1)
            after = steps[0] if len(steps) == 1 else made_chain(steps)
            found = [{**step, "kwargs": {**kwargs, "body": after}}]
        else:
            found.append(step)
    return found[::-1]


def chord_of(sig: Mapping[str, Any], body: Any) -> Sig:
    """Return a chord of a group and what follows it."""
    plain = not sig.get("args") and not any(value is not None for value in options_of(sig).values())
    tasks = sig["kwargs"]["tasks"]
    return made_chord(list(tasks) if plain and not sig["kwargs"].get("kwargs") else dict(sig), body)


def members_of(sig: Mapping[str, Any]) -> List[Sig]:
    """Return the members of a group with what it has for them, groups in it merged."""
    args, kwargs, options = shared_of(sig)
    get = options_of(sig).get
    found: List[Sig] = []
    for task in sig["kwargs"]["tasks"]:
        task = as_group(task)
        if args or kwargs or options:
            task = bound(task, args, kwargs, options)
        if get("link_error"):
            task = linked(task, (), get("link_error"))
        if kind_of(task) == "chain":
            steps = fold([task])  # of nothing but a group it is that group
            task = steps[0] if len(steps) == 1 else made_chain(steps)
        if kind_of(task) == "group":
            found += members_of(task)
        elif kind_of(task) != "chain" or task["kwargs"]["tasks"]:
            found.append(task)
    if found and get("link"):
        # Celery's rule: a group's callback is called once, with nothing, by the first of its members.
        found[0] = linked(found[0], [{**one, "immutable": True} for one in as_list(get("link"))], ())
    return found


# -- check ---------------------------------------------------------------------------------------


def check(
    sig: Any,
    known_tasks: Optional[Container[str]] = None,
    check_options: Optional[Callable[[Mapping[str, Any]], None]] = None,
    where: Optional[str] = None,
    max_depth: int = MAX_FROZEN_DEPTH,
) -> None:
    """Raise for a signature that cannot be sent, naming the step, as in ``chain[2].header[0]``.

    `TypeError` for what is no signature; `ImproperlyConfigured` for one without what it needs;
    `NotRegistered` for a task that is not in `known_tasks`, where these are given; `ValueError` for
    one nested deeper than `max_depth`, or holding itself; and what `check_options` raises for the
    calling options of any of them, with its place.
    """
    _check(sig, (known_tasks, check_options), where, max_depth, ())


def _check(sig: Any, given: Tuple[Any, Any], where: Optional[str], depth_left: int, above: Any) -> None:
    if not isinstance(sig, dict):
        hint = "" if not hasattr(sig, "s") else f"; write {getattr(sig, 'name', 'task')}.s(...)"
        raise TypeError(f"{where or 'workflow'}: {safe_repr(sig, 100)} is no signature{hint}")
    name, options = sig.get("task"), options_of(sig)
    where = where or kind_of(sig) or str(name)
    if not isinstance(name, str):
        raise ImproperlyConfigured(
            f"{where}: a signature needs the name of a task, not {safe_repr(name, 100)}"
        )
    if id(sig) in above:
        raise ValueError(f"{where}: this {kind_of(sig) or name} holds itself")
    if depth_left < 0:
        raise too_deep(where)
    known_tasks, check_options = given
    if known_tasks is not None and kind_of(sig) is None and name != CHUNKS and name not in known_tasks:
        near = nearest(name, known_tasks) if isinstance(known_tasks, Iterable) else None
        raise NotRegistered(f"{where}: {name}{f' (the nearest registered name is {near})' if near else ''}")
    if check_options is not None and options:
        try:
            check_options(options)
        except (TypeError, ValueError, ImproperlyConfigured) as error:
            raise type(error)(f"{where}: {error}") from error
    above = (*above, id(sig))
    for place, part in _parts(sig, where):
        _check(part, given, place, depth_left - 1, above)


def _parts(sig: Mapping[str, Any], where: str) -> Iterator[Tuple[str, Any]]:
    """Yield the signatures in this one, and where they are."""
    kind, kwargs = kind_of(sig), sig.get("kwargs") or {}
    if kind in ("chain", "group"):
        tasks = kwargs.get("tasks")
        if not isinstance(tasks, (list, tuple)):
            raise ImproperlyConfigured(
                f"{where}: a {kind} needs a list of tasks, not {safe_repr(tasks, 100)}"
            )
        for index, one in enumerate(tasks):
            yield f"{where}[{index}]", one
    elif kind == "chord":
        header, body = kwargs.get("header"), kwargs.get("body")
        if isinstance(header, dict):
            yield f"{where}.header", header
        elif isinstance(header, (list, tuple)):
            for index, one in enumerate(header):
                yield f"{where}.header[{index}]", one
        else:
            raise ImproperlyConfigured(f"{where}: a chord needs a header, not {safe_repr(header, 100)}")
        if body is None:
            raise ImproperlyConfigured(f"{where}: this chord has no body to be called with the results")
        yield f"{where}.body", body
    elif kind is not None:
        raise ImproperlyConfigured(f"{where}: there is no workflow of the kind {safe_repr(kind, 100)}")
    elif sig["task"] == CHUNKS:
        size = kwargs.get("n")
        if not isinstance(size, int) or size < 1:
            raise ImproperlyConfigured(
                f"{where}: chunks need a size n of at least 1, not {safe_repr(size, 100)}"
            )
    options = options_of(sig)
    for key in NESTED_OPTIONS:
        for index, one in enumerate(as_list(options.get(key))):
            yield f"{where}.{key}[{index}]", one


def too_deep(where: str) -> ValueError:
    """Return the error for a workflow that is nested too deep."""
    if len(where) > 200:
        where = f"{where[:100]}...{where[-100:]}"
    return ValueError(
        f"{where}: signatures can be nested {MAX_DEPTH} deep, and this is deeper; a chain of groups counts"
        " each of them: let a task in between start the rest"
    )

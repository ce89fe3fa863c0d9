# SPDX-License-Identifier: MIT
"""Workflows as Celery writes them: its signatures, and every message from the call to the last step.

Each is made again here from the text of the call.  Ids are compared by where they turn up again, not
by what they are.  What differs on purpose is undone in `LIKE_OURS`, one entry a difference.
"""

from __future__ import annotations

import base64
import copy
import json
import uuid
from collections import deque
from typing import Any, Callable, Dict, List

import pytest
from wire import VECTORS, make_app, read_vectors

import miniq
from miniq.plan import Plan, plan
from miniq.serialization import dumps
from miniq.signatures import new_task_id

SIGNATURES = read_vectors("signatures")
FLOWS = read_vectors("workflow_messages")
CALLED = [
    "chain_first_message", "chain_with_options", "chain_of_chains", "group_three", "group_of_chains",
    "chord_header_messages", "chord_with_link_error", "chain_group_upgraded_to_chord",
    "chain_task_then_group", "chain_task_then_chord", "map", "starmap", "chunks", "stamped",
    "chord_unlock_task",
]  # fmt: skip


# -- what differs on purpose -----------------------------------------------------------------------


def without_chord_in_header(sig: Any) -> None:
    """Celery's `freeze` writes the body into each member; stored in a chain it leaves that out, as here."""
    header = sig["kwargs"]["header"]
    for part in (header, *header["kwargs"]["tasks"]):
        del part["options"]["chord"]


def flat_group_in_order(messages: List[Any]) -> None:
    """Celery numbers the members of a group in a header from the last to the first."""
    first, second = messages[:2]
    first["body"][0], second["body"][0] = second["body"][0], first["body"][0]
    messages[-1]["body"][0][0][:2] = reversed(messages[-1]["body"][0][0][:2])


def body_group_with_its_own_id(messages: List[Any]) -> None:
    """Celery's messages of a group that is a body say the header's id; here they say the group's own."""
    for message in messages[:2]:
        body = message["body"][2]["chord"]
        del body["options"]["group_id"]
        for member in body["kwargs"]["tasks"]:
            del member["options"]["group_id"]
    for message in messages[2:]:
        message["headers"]["group"] = messages[0]["body"][2]["chord"]["options"]["task_id"]


def bodies_as_the_client_wrote_them(messages: List[Any]) -> None:
    """Celery's worker adds options to a body it starts: an empty chain, a priority of null, the root's id."""
    for message in messages:
        body = message["body"][2]["chord"]
        for name in ("chain", "priority", "root_id") if body else ():
            body["options"].pop(name, None)
    messages[-1]["body"][2]["chain"] = None


def first_tasks_have_no_chain(messages: List[Any]) -> None:
    """Celery's worker gives each member of a group at the end of a chain an empty chain."""
    for message in messages[1:]:
        assert message["body"][2]["chain"] == []
        message["body"][2]["chain"] = None


LIKE_OURS: Dict[str, Callable[[Any], None]] = {
    "frozen_chord": without_chord_in_header,
    "nested_chord": flat_group_in_order,
    "chord_body_group": body_group_with_its_own_id,
    "chain_task_group_task": bodies_as_the_client_wrote_them,
    "chain_task_group": first_tasks_have_no_chain,
}


# -- comparing -----------------------------------------------------------------------------------


def numbered(value: Any, known: Dict[str, str]) -> Any:
    """Return `value` with each id replaced by the number of its first appearance."""
    if isinstance(value, dict):
        return {key: numbered(one, known) for key, one in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [numbered(one, known) for one in value]
    if isinstance(value, str):
        try:
            uuid.UUID(value)
        except ValueError:
            return value
        return known.setdefault(value, f"id {len(known)}")
    return value


def plain(value: Any) -> Any:
    return json.loads(dumps(value, "json")[2])


def same(ours: Any, theirs: Any) -> None:
    left, right = numbered(plain(ours), {}), numbered(theirs, {})
    assert left == right


def make_names() -> Dict[str, Any]:
    app, names = make_app({})
    names.update(
        {name: getattr(miniq, name) for name in ("chain", "group", "chord", "signature")},
        xsum=app.task(name="wt.xsum")(sum),
    )
    return names


# -- signatures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", SIGNATURES, ids=lambda vector: str(vector["name"]))
def test_a_signature_is_written_as_celery_writes_it(vector: Any) -> None:
    theirs = copy.deepcopy(vector["signature"])
    LIKE_OURS.get(vector["name"], lambda _: None)(theirs)
    same(eval(vector["how_made"], make_names()), theirs)


@pytest.mark.parametrize("vector", SIGNATURES, ids=lambda vector: str(vector["name"]))
def test_what_celery_wrote_is_read_written_and_planned(vector: Any) -> None:
    app = make_names()["app"]
    read = app.signature(copy.deepcopy(vector["signature"]))
    assert plain(read) == vector["signature"]
    assert repr(read)
    if vector["name"] != "signature_options":  # there a single callback becomes a list
        assert plain(read.clone()) == vector["signature"]
    assert plan(read, new_id=new_task_id).steps


# -- messages ------------------------------------------------------------------------------------


def messages_of(found: Plan) -> List[Any]:
    """Return what a plan sends, as far as a workflow has a part in it."""
    sent = []
    for step in found.steps:
        get = step.options.get
        stamped = get("stamped_headers")
        embed = {
            "callbacks": get("link"),
            "errbacks": get("link_error"),
            "chain": get("chain"),
            "chord": get("chord"),
        }
        headers = {
            "task": step.task,
            "id": step.options["task_id"],
            "group": get("group_id"),
            "group_index": get("group_index"),
            "root_id": get("root_id") or step.options["task_id"],
            "parent_id": get("parent_id"),
            "stamped_headers": stamped,
            "stamps": {name: get(name) for name in stamped or ()},
        }
        sent.append({"headers": headers, "body": [list(step.args), step.kwargs, embed]})
    return sent


def plan_of(names: Dict[str, Any], text: str, polled: bool = False) -> Plan:
    """Make the call that `text` spells, and return what it would send."""
    plans: List[Plan] = []

    def send_plan(found: Plan, options: Any = None) -> None:
        plans.append(found)

    def send(name: str, args: Any, kwargs: Any, options: Any, task: Any) -> None:
        sig = {"task": name, "args": args, "kwargs": kwargs, "options": options}
        plans.append(plan(sig, new_id=new_task_id, reply_to=names["app"].identity[1]))

    app = names["app"]
    app.send_plan, app._send = send_plan, send
    app.conf.result_backend = "file:///nowhere" if polled else "redis://localhost/0"
    exec(text.partition(" with a database")[0], names)
    (found,) = plans
    return found


@pytest.mark.parametrize("name", CALLED)
def test_a_call_sends_what_celery_sends(name: str) -> None:
    (vector,) = [one for one in VECTORS if one["name"] == name]
    envelopes = vector["redis_envelope"]
    envelopes = envelopes if isinstance(envelopes, list) else [envelopes]
    theirs = []
    for envelope in envelopes:
        headers, body = envelope["headers"], json.loads(base64.b64decode(envelope["body"]))
        body[1].pop("_chord_unlock_exchange_type", None)  # a note from one Celery worker to another
        theirs.append({"headers": headers, "body": body})
    found = plan_of(make_names(), vector["how_made"], polled=name == "chord_unlock_task")
    ours = messages_of(found)
    for message in theirs:
        message["headers"] = {key: message["headers"][key] for key in ours[0]["headers"]}
    if name == "chord_unlock_task":  # of which only the one that asks was captured
        assert len(ours) == 3
        del ours[1:]
    same(ours, theirs)


def result_of(message: Any) -> Any:
    """Return what the captured worker's task returned."""
    task, args = message["headers"]["task"], message["body"][0]
    if task == "wt.echo":
        return {"args": args, "kwargs": {}}
    if task == "wt.fail":
        return None
    return {"wt.add": lambda: args[0] + args[1], "wt.mul": lambda: args[0] * args[1],
            "wt.xsum": lambda: sum(args[0]), "wt.ident": lambda: args[0]}[task]()  # fmt: skip


@pytest.mark.parametrize("vector", FLOWS, ids=lambda vector: str(vector["name"]))
def test_a_workflow_goes_on_as_it_does_in_celery(vector: Any) -> None:
    names = make_names()
    theirs = copy.deepcopy(vector["messages"])
    LIKE_OURS.get(vector["name"], lambda _: None)(theirs)
    first = plan_of(names, vector["how_made"])
    sizes = {start.group_id: start.size for start in first.chords}
    sent, left = [], deque(messages_of(first))
    parts: Dict[str, Dict[int, Any]] = {}
    while left:
        message = left.popleft()
        sent.append(message)
        headers, embed = message["headers"], message["body"][2]
        if headers["task"] == "wt.fail":
            del theirs[1:]  # what a failure sends is the worker's business
            continue
        value, root, own = result_of(message), headers["root_id"], headers["id"]
        follow: List[Any] = []
        if embed["chain"]:
            follow.append((embed["chain"][-1], (value,), {"chain": embed["chain"][:-1]}))
        elif embed["chord"]:
            counted = parts.setdefault(headers["group"], {})
            counted[headers["group_index"]] = value
            if len(counted) == sizes[headers["group"]]:
                follow.append((embed["chord"], ([counted[at] for at in sorted(counted)],), {}))
        for sig, args, options in follow:
            found = plan(sig, args, options=options, new_id=new_task_id, root_id=root, parent_id=own)
            sizes.update((start.group_id, start.size) for start in found.chords)
            left.extendleft(reversed(messages_of(found)))  # as that worker happened to take them
    same(sent, theirs)

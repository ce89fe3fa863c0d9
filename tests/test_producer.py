# SPDX-License-Identifier: MIT
"""What calls of a task share: the same messages with it and without, and no call gets what is out of date."""

from __future__ import annotations

import json
import os
from typing import Any, Callable, Dict, List, Tuple

import pytest
from bench import Bench, new_broker

from miniq import MiniQ, Queue, Task, signals
from miniq.producer import Prepared

#: Settings that calls depend on, each set to something that shows in messages.
SETTINGS: List[Dict[str, Any]] = [
    {},
    {"task_default_priority": 4},
    {"task_serializer": "pickle"},
    {"task_compression": "gzip"},
    {"task_ignore_result": True},
    {"task_default_delivery_mode": "transient"},
    {"task_repr_maxlevels": 1},
    {"task_default_queue": "other"},
    {"task_queues": [Queue("celery", routing_key="own")], "task_queue_max_priority": 9},
    {"task_routes": {"t": {"queue": "by_table", "priority": 2, "headers": {"x-route": [1]}}}},
    {"task_routes": {"t": {"exchange": "media", "routing_key": "img"}}},
    {"task_routes": {"t": {"expires": 60, "compression": "gzip"}}},
    {"task_routes": {"t": {"app_id": "me", "shadow": "by route", "reply_to": "you"}}},
    {"task_routes": [lambda name, args, kwargs, options, task=None: f"q{len(args)}{options['shadow']}"]},
    {"task_annotations": {"t": {"priority": 8, "queue": "annotated"}}},
]
TASKS: List[Dict[str, Any]] = [
    {},
    {"queue": "own"},
    {"queue": Queue("object")},
    {"exchange": "ex", "routing_key": "key"},
    {"priority": 3, "time_limit": 20, "soft_time_limit": 10.5},
    {"serializer": "pickle", "compression": "gzip", "delivery_mode": 1},
    {"ignore_result": False},
    {"expires": 30},
    {"shadow_name": lambda self, args, kwargs, options: f"{len(args)} of {sorted({*options} - {'task_id'})}"},
    {"shadow_name": lambda self, args, kwargs, options: "many" if len(args) > 1 else None},
]
ARGUMENTS: List[Tuple[Tuple[Any, ...], Dict[str, Any]]] = [
    ((), {}),
    (([[1]], "é%s\n"), {}),
    ((None, 1.5), {"y": {"deep": [True]}}),
    ((b"bytes",), {}),
]


def make(settings: Dict[str, Any], options: Dict[str, Any]) -> Task:
    app = MiniQ("tests", broker=new_broker(), wall=lambda: 1_700_000_000.0, **settings)
    task: Task = app.task(name="t", **options)(lambda *args, **kwargs: None)
    return task


def shared(task: Any, *args: Any, **kwargs: Any) -> Prepared:
    """Prepare a call without options, which may get what an earlier one left."""
    found: Prepared = task.app.producer.prepare(task.name, args, kwargs, {}, task)
    return found


def alone(task: Any, *args: Any, **kwargs: Any) -> Prepared:
    """Prepare the same call with an option that says nothing, for which nothing is shared."""
    found: Prepared = task.app.producer.prepare(task.name, args, kwargs, {"task_id": None}, task)
    return found


def told(prepared: Prepared) -> Tuple[Any, ...]:
    """Return all of a call, with words for ids; what is JSON as text, in which 1 is not True."""
    (message, exchange, routing_key), queue, task_id = prepared
    text = json.dumps([message.headers, message.properties]).replace(task_id, "the id")
    return text, message.body, message.content_type, message.content_encoding, exchange, routing_key, queue


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_calls_that_share_an_outline_are_like_those_that_do_not(settings: Dict[str, Any]) -> None:
    for options in TASKS:
        task = make(settings, options)
        for args, kwargs in [*ARGUMENTS, *ARGUMENTS]:
            found, wanted = shared(task, *args, **kwargs), alone(task, *args, **kwargs)
            assert told(found) == told(wanted), options
            assert found.task_id != wanted.task_id


@pytest.mark.parametrize(
    ("settings", "options", "is_shared"),
    [
        ({}, {}, True),
        ({}, {"queue": "own", "priority": 3}, True),
        ({"task_routes": {"t": "by_table"}}, {}, True),
        ({"task_routes": [lambda *_, **__: None]}, {}, False),
        ({}, {"expires": 30}, False),
        ({}, {"queue": Queue("object")}, False),
        ({}, {"exchange": "ex"}, False),
        ({}, {"routing_key": "key"}, False),
        ({"task_routes": {"t": {"countdown": 5}}}, {}, False),
    ],
    ids=str,
)
def test_what_depends_on_more_than_the_task_is_found_out_each_time(
    settings: Dict[str, Any], options: Dict[str, Any], is_shared: bool
) -> None:
    task = make(settings, options)
    shared(task)
    assert ("t" in task.app._cached("outlines", dict)) is is_shared


def name_shadow(args: Any, kwargs: Any, options: Any) -> str:
    return "new"


CHANGES: Dict[str, Callable[[Any], None]] = {
    **{
        " ".join(settings): lambda task, settings=settings: task.app.conf.update(settings)
        for settings in SETTINGS
        if settings
    },
    "an attribute of the task": lambda task: setattr(task, "priority", 7),
    "an attribute of its class": lambda task: setattr(type(task), "queue", "by_class"),
    "an attribute of its base class": lambda task: setattr(type(task).__mro__[1], "time_limit", 9),
    "a method of the task": lambda task: setattr(task, "shadow_name", name_shadow),
    "another queue of that name": lambda task: task.app.router.queues.add(Queue("celery", message_ttl=5)),
    "another task of that name": lambda task: task.app.register_task(Other()),
    "the process as a sender": lambda task: setattr(task.app, "_identity", (os.getpid(), "gen@x", "address")),
}


class Base(Task):
    """A class between the tasks here and the one that all tasks have."""


class Other(Task):
    name = "t"
    delivery_mode = 1

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore::miniq.exceptions.DuplicateTaskNameWarning")
def test_no_call_gets_what_is_out_of_date(change: str) -> None:
    base = type("Between", (Base,), {})
    task: Any = make({}, {"base": base})
    before = told(shared(task, [[1]]))
    assert told(shared(task, [[1]])) == before
    CHANGES[change](task)
    task = task.app.tasks["t"]
    after = told(shared(task, [[1]]))
    assert after != before
    assert after == told(alone(task, [[1]])) == told(shared(task, [[1]]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_names_itself() -> None:
    task = make({}, {})
    mine = shared(task).publication.message
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            message = shared(task).publication.message
            sent = [os.getpid(), message.headers["origin"], message.properties["reply_to"]]
            os.write(writing, json.dumps(sent).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        child, origin, address = json.loads(file.read())
    os.waitpid(pid, 0)
    assert child == pid
    assert origin.startswith(f"gen{pid}@")
    assert origin != mine.headers["origin"]
    assert address != mine.properties["reply_to"]


def test_a_call_inside_a_task_is_its_child_and_the_next_one_nobodys() -> None:
    task = make({"task_inherit_parent_priority": True}, {})
    sent: List[Prepared] = [shared(task)]
    parent = task.app.task(name="parent")(lambda: sent.append(shared(task)))
    Bench(task.app).call(parent, task_id="one", root_id="root", priority=6)
    sent.append(shared(task))
    headers = [one.publication.message.headers for one in sent]
    assert [(one["parent_id"], one["root_id"] == one["id"]) for one in headers] == [
        (None, True), ("one", False), (None, True),
    ]  # fmt: skip
    assert [one.publication.message.priority for one in sent] == [0, 6, 0]


def test_a_receiver_changes_one_message_and_no_other() -> None:
    task = make({"task_routes": {"t": {"queue": "q"}}}, {"time_limit": 5})
    before = told(shared(task, 1))

    def spoil(headers: Any, properties: Any, body: Any, declare: Any, **_: Any) -> None:
        headers.update({"x-own": 1, "task": "other"})
        headers["timelimit"][:] = [1, 1]
        headers["stamps"]["x"] = "y"
        properties.clear()
        body[2]["callbacks"] = [{}]
        declare.clear()

    signals.before_task_publish.connect(spoil)
    try:
        for one in (shared(task, 1), shared(task, 1)):
            message = one.publication.message
            assert (message.headers["x-own"], message.properties) == (1, {})
    finally:
        signals.before_task_publish.disconnect(spoil)
    assert told(shared(task, 1)) == before
    first, second = shared(task).publication.message, shared(task).publication.message
    mine, others = ([one.headers, one.properties, *one.headers.values()] for one in (first, second))
    assert not any(left is right and isinstance(left, (list, dict)) for left in mine for right in others)

# SPDX-License-Identifier: MIT
"""Messages as AMQP content: what Celery sent to RabbitMQ is understood, and ours are the same bytes.

The vectors hold the payload of the frame with properties and headers, so types and order count.  In
our own frames only what varies is replaced, by a value of the same type, before they are compared.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any, Dict, List

import pytest
from wire import (
    CALLED,
    LEAKS,
    VARYING,
    compare,
    compare_body,
    compare_meaning,
    compare_workflow,
    find,
    make_app,
    make_call,
    of_redis,
    read_vectors,
)

from miniq.codecs.amqp import Content
from miniq.codecs.amqp_wire import decode_header, encode_header
from miniq.message import Message, validate_headers
from miniq.transports.amqp_delay import ENTRANCE, is_native, routing_key, strip_prefix
from miniq.transports.amqp_message import from_content, take_added, to_content
from miniq.transports.base import Publication

CAPTURED: Dict[str, Dict[str, Any]] = {one["name"]: one for one in read_vectors("amqp_messages")}
DELAYED: Dict[str, Dict[str, Any]] = {one["name"]: one for one in read_vectors("amqp_delayed")}
#: Name of a call -> names of its messages.
OF_CALLS: Dict[str, List[str]] = {}
for _name, _one in CAPTURED.items():
    if "of" in _one:
        OF_CALLS.setdefault(_one["of"], []).append(_name)
#: Too large to be in a vector: only its size is.
WITHOUT_BODY = ("big_payload_100k",)


def payload_of(captured: Dict[str, Any]) -> bytes:
    return base64.b64decode(captured["header_frame_payload"])


def content_of(captured: Dict[str, Any]) -> Content:
    """Return the content as the codec reads it from the captured bytes."""
    _, properties, headers = decode_header(payload_of(captured))
    return Content(properties, headers, base64.b64decode(captured.get("body", "")))


def captured_call(name: str) -> Publication:
    """Return a captured message by what the codec makes of it."""
    captured = CAPTURED[name]["amqp_message"]
    message = from_content(content_of(captured))
    return Publication(message, captured["exchange"], captured["routing_key"])


# -- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_header_frame_decodes_to_what_was_meant(name: str) -> None:
    theirs = CAPTURED[name]["amqp_message"]
    size, properties, headers = decode_header(payload_of(theirs))
    assert size == (theirs["body_size"] if name in WITHOUT_BODY else len(base64.b64decode(theirs["body"])))
    assert list(properties.items()) == list(theirs["properties"].items())
    assert list(headers.items()) == list(theirs["headers"].items())


@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_message_sent_on_is_the_same_bytes(name: str) -> None:
    theirs = CAPTURED[name]["amqp_message"]
    message = from_content(content_of(theirs))
    assert message.content_type == theirs["properties"]["content_type"]
    assert not {"content_type", "content_encoding", "headers"} & set(message.properties)
    size = theirs.get("body_size", len(message.body))
    assert encode_header(size, *to_content(message)) == payload_of(theirs)


@pytest.mark.parametrize("name", [name for name in OF_CALLS if name in CAPTURED and name not in WITHOUT_BODY])
def test_a_captured_call_is_the_task_that_was_meant(name: str) -> None:
    vector = find(name)
    message, on_redis = captured_call(name).message, of_redis(vector["redis_envelope"]).message
    expected = dict(vector["expected"])
    # The same call, made once for each broker: what was random or depended on the time differs.
    if "task_id=" not in vector["how_made"]:
        expected.pop("id", None)
    if "embed" in expected:
        assert shape_of(message) == shape_of(on_redis)
        del expected["embed"]
    for moment in ("eta", "expires"):
        if message.headers.get(moment) != on_redis.headers.get(moment):
            assert "D(" not in vector["how_made"]
            expected[f"{moment}_utc"] = CAPTURED[name]["amqp_message"]["headers"][moment]
    compare_meaning(message, expected)


def shape_of(message: Message) -> Any:
    """Return callbacks and what else follows, without the ids and addresses in it."""
    text = json.dumps(json.loads(message.body)[2]) if "json" in message.content_type else ""
    return re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "an id", text)


@pytest.mark.parametrize("name", [name for name, one in CAPTURED.items() if "decoded_body" in one])
def test_what_clients_and_workers_sent_has_the_body_that_was_meant(name: str) -> None:
    message, body = captured_call(name).message, CAPTURED[name]["decoded_body"]
    if "task" in message.headers:
        assert validate_headers(message.headers) is None
        compare_body(message, body)
    else:
        assert json.loads(message.body) == body


# -- writing -------------------------------------------------------------------------------------


def frame_of(ours: Publication, theirs: Message) -> bytes:
    """Return our frame with their values where values vary; these have to be of the same type."""
    properties, headers = to_content(ours.message)
    headers = dict(headers)
    for values, others, names in (
        (headers, theirs.headers, ("id", "root_id", "eta", "expires", *VARYING)),
        (properties, theirs.properties, ("correlation_id", "reply_to", "expiration")),
    ):
        for name in names:
            assert type(values.get(name)) is type(others.get(name)), name
            if name in values:
                values[name] = others[name]
    if "priority" not in theirs.properties:
        # Left out by Celery where a queue was named and no priority; to RabbitMQ it is the same.
        assert properties.pop("priority") == 0
    return encode_header(len(ours.message.body), properties, headers)


@pytest.mark.parametrize("name", CALLED)
def test_our_frame_for_a_call_is_celerys(name: str) -> None:
    vector = find(name)
    (captured,) = OF_CALLS[name]
    theirs = captured_call(captured)
    _, names = make_app(vector.get("config", {}))
    ours = make_call(names, vector["how_made"])
    if name in WITHOUT_BODY:
        assert len(ours.message.body) == CAPTURED[name]["amqp_message"]["body_size"]
        theirs.message.body = ours.message.body
    frame = frame_of(ours, theirs.message)
    if "priority" not in theirs.message.properties:
        theirs.message.properties["priority"] = 0
    compare(ours, theirs, vector["how_made"])
    expected = payload_of(CAPTURED[captured]["amqp_message"])
    if len(ours.message.body) != len(theirs.message.body):
        # Other serializers and compressions may have another length; the size stands before the flags.
        assert ours.message.content_type != "application/json" or "compression" in ours.message.headers
        frame, expected = frame[:4] + frame[12:], expected[:4] + expected[12:]
    assert frame == expected


#: Workflows of which each task message but the first is sent by a worker.
FOLLOWED = {
    "rpc_retry": ("rpc_retry_1", "rpc_retry_2", "rpc_retry_4", "rpc_retry_6"),
    "rpc_chain": ("rpc_chain_1", "rpc_chain_2", "rpc_chain_4"),
    "link": ("link_1", "link_2"),
    "link_error": ("link_error_1", "link_error_3"),
}


@pytest.mark.parametrize("workflow", FOLLOWED)
def test_what_follows_a_captured_message_here_is_what_followed_it_there(workflow: str) -> None:
    compare_workflow([captured_call(name) for name in FOLLOWED[workflow]])


# -- delayed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("countdown_s, key", DELAYED["routing_keys"]["expected"]["countdown_to_key"])
def test_a_countdown_is_in_the_routing_key_as_by_celery(countdown_s: int, key: str) -> None:
    assert routing_key(countdown_s, "celery") == key
    assert routing_key(countdown_s + 0.9, "celery") == key
    assert strip_prefix(key) == "celery"


def test_a_message_that_came_out_of_celerys_layout_is_the_one_that_went_in() -> None:
    out, into = DELAYED["delivered_after_delay"]["amqp_message"], DELAYED["published"]["messages"][0]
    assert into["exchange"] == ENTRANCE
    assert is_native(out["args"]["exchange"]) and is_native(ENTRANCE) and not is_native("celery")
    assert out["args"]["routing_key"] == into["routing_key"] == routing_key(2, "celery")
    message = from_content(content_of(out))
    added = take_added(message.headers)
    assert message.headers == into["headers"]
    assert sorted(added) == sorted(set(out["headers"]) - set(into["headers"]))
    assert added["x-death"][0]["time"] == "2026-11-21T06:06:14+00:00"
    properties, headers = to_content(message)
    assert (properties, headers) == (into["properties"], into["headers"])
    assert not set(LEAKS) & set(properties)

# SPDX-License-Identifier: MIT
"""Messages as items of Redis lists: what Celery put there is understood, and ours look the same.

Three sources, all captured from Celery: the calls of `test_wire`, the messages which workers sent
while they ran workflows, and those of sessions that were recorded command by command.  Left out of
comparisons is what varies: ids nobody gave, delivery tags, the sender's name and reply address.
"""

from __future__ import annotations

import base64
import json
import time
from typing import Any, Dict, List, Tuple

import pytest
from servers import RedisServer
from wire import (
    CALLED,
    ENVELOPE_ONLY,
    LEAKS,
    VECTORS,
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

from miniq import Exchange, MiniQ, Queue
from miniq.connections.redis import Options
from miniq.connections.redis_session import Layout
from miniq.transports.base import Publication
from miniq.transports.redis import RedisTransport
from miniq.transports.redis_envelope import decode_envelope, encode_envelope

CAPTURED = read_vectors("redis_messages")
TAG = "00000000-0000-4000-8000-0000000000ff"


def all_envelopes() -> "List[Tuple[str, Dict[str, Any]]]":
    """Return every captured envelope under a name of its own."""
    found: List[Tuple[str, Dict[str, Any]]] = []
    for vector in VECTORS:
        many = vector["redis_envelope"]
        for index, one in enumerate(many if isinstance(many, list) else [many]):
            found.append((f"{vector['name']}-{index}", one))
    for vector in CAPTURED:
        if "redis_envelope" in vector:
            found.append((vector["name"], vector["redis_envelope"]))
        elif "unacked" in vector:
            found.append((vector["name"], vector["unacked"][0]))
    return found


ENVELOPES = dict(all_envelopes())
WITH_BODY = [vector for vector in CAPTURED if "decoded_body" in vector]


def captured(name: str) -> Dict[str, Any]:
    (found,) = [vector for vector in CAPTURED if vector["name"] == name]
    return found


def item_of(envelope: Dict[str, Any]) -> bytes:
    """Return an envelope as the bytes that were in the list."""
    return json.dumps(envelope).encode()


# -- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENVELOPES)
def test_a_captured_item_is_taken_apart_into_its_message(name: str) -> None:
    theirs = ENVELOPES[name]
    found = decode_envelope(item_of(theirs))
    message, properties = found.message, theirs["properties"]
    assert message.content_type == theirs["content-type"]
    assert message.content_encoding == theirs["content-encoding"]
    assert message.headers == theirs["headers"]
    assert message.properties == {key: properties[key] for key in properties if key not in ENVELOPE_ONLY}
    info = properties["delivery_info"]
    assert (found.exchange, found.routing_key) == (info["exchange"], info["routing_key"])
    assert found.tag == properties["delivery_tag"]
    assert (found.starts, found.lost_by, found.published) == (0, "", None)
    if properties.get("body_encoding") == "base64":
        assert message.body == base64.b64decode(theirs["body"])
    else:
        assert message.body == theirs["body"].encode()


@pytest.mark.parametrize("name", ENVELOPES)
def test_a_captured_item_put_back_is_the_same(name: str) -> None:
    theirs = ENVELOPES[name]
    found = decode_envelope(item_of(theirs))
    ours = json.loads(encode_envelope(found.message, found.exchange, found.routing_key, found.tag))
    if theirs["properties"].get("body_encoding") != "base64":
        ours["body"] = base64.b64decode(ours["body"]).decode()
        ours["properties"]["body_encoding"] = theirs["properties"].get("body_encoding")
    assert ours == theirs


@pytest.mark.parametrize("vector", [v for v in VECTORS if v["expected"]], ids=lambda v: v["name"])
def test_a_captured_call_is_the_task_that_was_meant(vector: Dict[str, Any]) -> None:
    compare_meaning(decode_envelope(item_of(vector["redis_envelope"])).message, vector["expected"])


@pytest.mark.parametrize("vector", WITH_BODY, ids=lambda v: v["name"])
def test_what_workers_sent_has_the_body_that_was_meant(vector: Dict[str, Any]) -> None:
    compare_body(decode_envelope(item_of(vector["redis_envelope"])).message, vector["decoded_body"])


# -- writing -------------------------------------------------------------------------------------


def compare_items(ours: Publication, theirs: Dict[str, Any], given: str) -> None:
    """Compare a message of ours as an item with a captured one; `given` is the text of the call."""
    compare(ours, of_redis(theirs), given)
    item = json.loads(encode_envelope(ours.message, ours.exchange, ours.routing_key, TAG))
    assert list(item) == list(theirs)
    left, right = item["properties"], dict(theirs["properties"])
    for name in LEAKS:
        right.pop(name, None)
    assert list(item["headers"]) == list(theirs["headers"])
    assert set(left) == set(right)
    assert left["delivery_info"] == right["delivery_info"]
    assert left["body_encoding"] == right["body_encoding"]
    assert left["priority"] == right["priority"]
    assert type(left["delivery_tag"]) is type(right["delivery_tag"])


@pytest.mark.parametrize("name", CALLED)
def test_our_item_for_a_call_is_celerys(name: str) -> None:
    vector = find(name)
    app, names = make_app(vector.get("config", {}))
    ours = make_call(names, vector["how_made"])
    compare_items(ours, vector["redis_envelope"], vector["how_made"])
    layout = Layout(Options.read({}, "redis://"))
    (queue,) = queues_of(app, ours)
    key = captured("lists")["redis_keys"].get(name, "celery")
    assert layout.list_for(queue, ours.message.priority) == key


def queues_of(app: MiniQ, publication: Publication) -> List[str]:
    """Return the queues of the app that a message reaches."""
    if not publication.exchange:
        return [publication.routing_key]
    return [
        queue.name
        for queue in app.router.queues.values()
        if any(binding.exchange.name == publication.exchange for binding in queue.all_bindings)
    ]


#: Workflows of which each message but the first is sent by a worker -> how many messages there are.
FOLLOWED = {
    "chain_three": 3,
    "link_success": 3,
    "link_single": 2,
    "link_error_bound_task": 2,
    "link_error_old_style": 2,
    "link_error_unregistered": 2,
    "retry_scheduled": 2,
    "retry_immediate_exhausted": 4,
}


@pytest.mark.parametrize("workflow", FOLLOWED)
def test_what_follows_a_captured_message_here_is_what_followed_it_there(workflow: str) -> None:
    items = [
        decode_envelope(item_of(captured(f"{workflow}_{number}")["redis_envelope"]))
        for number in range(1, FOLLOWED[workflow] + 1)
    ]
    compare_workflow([Publication(item.message, item.exchange, item.routing_key) for item in items])


# -- where messages go ---------------------------------------------------------------------------


def test_declared_queues_are_bound_as_by_celery(redis_server: RedisServer, redis_url: str) -> None:
    media = Exchange("media", "topic")
    queues = [
        Queue("img", media, routing_key="media.image.*"),
        Queue("all", media, routing_key="media.#"),
        Queue("exp", Exchange("exp"), routing_key="exp", expires=30),
        Queue("celery", Exchange("celery"), routing_key="celery"),
        Queue("f1", Exchange("fan", "fanout"), routing_key="celery"),
    ]
    transport = RedisTransport(redis_url, {}, time.time)
    for queue in queues:
        transport.declare(queue)
    transport.close()
    db = int(redis_url.rpartition("/")[2])
    for key, members in captured("bindings")["bindings"].items():
        found = redis_server.command("SMEMBERS", key, db=db)
        assert sorted(member.decode() for member in found) == members, key

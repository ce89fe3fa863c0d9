# SPDX-License-Identifier: MIT
"""Messages as items of Redis lists: what Celery put there is understood, and ours look the same.

Three sources, all captured from Celery: the calls of `test_wire`, the messages which workers sent
while they ran workflows, and those of sessions that were recorded command by command.  Left out of
comparisons is what varies: ids nobody gave, delivery tags, the sender's name and reply address.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import time
import uuid
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from bench import Bench, run_of
from servers import RedisServer
from test_wire import CHAINS, LEAKS, SENT, TZ, UTC, VECTORS, compare, find, make_app, make_call

from miniq import Exchange, MiniQ, Queue
from miniq.connections.redis import Options
from miniq.connections.redis_session import Layout
from miniq.exceptions import ImproperlyConfigured
from miniq.message import unpack_body, upgrade_v1
from miniq.serialization import dumps, loads
from miniq.times import to_epoch
from miniq.transports.base import Publication
from miniq.transports.redis import RedisTransport
from miniq.transports.redis_envelope import Envelope, decode_envelope, encode_envelope

CAPTURED: List[Dict[str, Any]] = json.loads(
    (Path(__file__).parent / "vectors" / "redis_messages.json").read_text(encoding="utf-8")
)
ACCEPT = frozenset(
    {"application/json", "application/x-python-serialize", "application/x-yaml", "application/x-msgpack"}
)
#: Not among the properties of a message: the transport puts them on the list and takes them off again.
OF_THE_LIST = ("delivery_info", "body_encoding", "delivery_tag")
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


def body_of(found: Envelope) -> Any:
    """Return the decoded body; skip where a library is missing for it."""
    message = found.message
    compression = message.headers.get("compression")
    try:
        return loads(message.body, message.content_type, message.content_encoding, ACCEPT, compression)
    except Exception as error:
        if "needs the library" not in str(error):
            raise
        pytest.skip(str(error))


# -- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENVELOPES)
def test_a_captured_item_is_taken_apart_into_its_message(name: str) -> None:
    theirs = ENVELOPES[name]
    found = decode_envelope(item_of(theirs))
    message, properties = found.message, theirs["properties"]
    assert message.content_type == theirs["content-type"]
    assert message.content_encoding == theirs["content-encoding"]
    assert message.headers == theirs["headers"]
    assert message.properties == {key: properties[key] for key in properties if key not in OF_THE_LIST}
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
    found = decode_envelope(item_of(vector["redis_envelope"]))
    expected, value = vector["expected"], body_of(found)
    headers = found.message.headers
    if not headers:
        headers, value = upgrade_v1(value)
    args, kwargs, embed = unpack_body(value)
    for header in ("id", "task", "retries"):
        if header in expected:
            assert headers[header] == expected[header]
    for name in ("eta", "expires"):
        if f"{name}_utc" in expected:
            # Naive times are meant in the worker's zone, here UTC.
            assert to_epoch(headers[name]) == to_epoch(expected[f"{name}_utc"])
    assert expected.get("extra_header", {}).items() <= headers.items()
    if "args_python" in expected:
        assert args == list(evaluated(expected["args_python"]))
    elif isinstance(expected.get("args"), list):
        assert as_json(args) == as_json(expected["args"])
    if "kwargs_python" in expected:
        assert kwargs == evaluated(expected["kwargs_python"])
    elif "kwargs" in expected:
        assert as_json(kwargs) == as_json(expected["kwargs"])
    if "embed" in expected:
        assert as_json(without_none(embed)) == as_json(without_none(expected["embed"]))


def without_none(value: Dict[str, Any]) -> Dict[str, Any]:
    return {key: one for key, one in value.items() if one is not None}


def evaluated(text: str) -> Any:
    names = {"datetime": dt.datetime, "date": dt.date, "time": dt.time, "utc": UTC, "TZ": TZ}
    return eval(text.replace("+05:30", "TZ"), names)


def as_json(value: Any) -> Any:
    """Return a value as text, in which NaN equals itself, and the types beyond JSON have their wire form."""
    return json.dumps(json.loads(dumps(value, "json")[2]), sort_keys=True)


@pytest.mark.parametrize("vector", WITH_BODY, ids=lambda v: v["name"])
def test_what_workers_sent_has_the_body_that_was_meant(vector: Dict[str, Any]) -> None:
    found = decode_envelope(item_of(vector["redis_envelope"]))
    assert json.loads(found.message.body) == vector["decoded_body"]
    args, kwargs, embed = unpack_body(body_of(found))
    assert len(args) == len(vector["decoded_body"][0])
    assert sorted(kwargs) == sorted(vector["decoded_body"][1])
    assert embed.keys() == vector["decoded_body"][2].keys()


# -- writing -------------------------------------------------------------------------------------


def compare_items(ours: Publication, theirs: Dict[str, Any], given: str) -> None:
    """Compare a message of ours as an item with a captured one; `given` is the text of the call."""
    compare(ours, theirs, given)
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


@pytest.mark.parametrize("name", [name for name in SENT if name not in CHAINS])
def test_our_item_for_a_call_is_celerys(name: str) -> None:
    vector = find(name)
    app, names = make_app(vector.get("config", {}))
    try:
        ours = make_call(names, vector["how_made"])
    except ImproperlyConfigured as error:
        if "needs the library" not in str(error):
            raise
        pytest.skip(str(error))
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
    app, _ = make_app({})
    app.task(fail, name="wt.fail")
    bench = Bench(app)
    waiting: List[Publication] = []
    for number in range(1, FOLLOWED[workflow] + 1):
        theirs = captured(f"{workflow}_{number}")["redis_envelope"]
        if number > 1:
            compare_follow_up(waiting.pop(0), theirs)
        if number < FOLLOWED[workflow]:
            found = decode_envelope(item_of(theirs))
            publication = Publication(found.message, found.exchange, found.routing_key)
            waiting += bench.runner.run(run_of(publication)).followups
    assert not waiting


def fail(text: str) -> None:
    raise ValueError(text)


def compare_follow_up(ours: Publication, theirs: Dict[str, Any]) -> None:
    """Compare what a worker sends: with the ids of the work-flow, but not those made on the way."""
    item = json.loads(encode_envelope(ours.message, ours.exchange, ours.routing_key, TAG))
    assert json.loads(base64.b64decode(item["body"])) == json.loads(base64.b64decode(theirs["body"]))
    left, right = item["headers"], dict(theirs["headers"])
    assert list(left) == list(right)
    for headers in (left, right):
        for name in ("origin", "argsrepr", "kwargsrepr"):
            assert isinstance(headers.pop(name), str)
        if headers["eta"]:
            headers["eta"] = "a moment from then on"
        if headers["group"]:
            headers["group"] = str(uuid.UUID(headers["group"])) and "a group"
    if left["id"] != right["id"]:
        assert uuid.UUID(left.pop("id")) and uuid.UUID(right.pop("id"))
    assert left == right
    left, right = item["properties"], dict(theirs["properties"])
    for name in ("correlation_id", "reply_to", "delivery_tag", "expiration"):
        assert type(left.pop(name, None)) is type(right.pop(name, None))
    # A calling option that leaks into Celery's properties by accident.
    for name in ("origin", *LEAKS):
        right.pop(name, None)
    assert left == right


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

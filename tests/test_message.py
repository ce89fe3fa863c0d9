# SPDX-License-Identifier: MIT
"""Messages that Celery wrote, and headers that nobody should have written."""

from __future__ import annotations

import base64
import datetime as dt
import importlib.util
import json
import math
import pathlib
import random

import pytest

from miniq.message import Delivery, Message, pack_body, unpack_body, upgrade_v1, validate_headers
from miniq.serialization import dumps, loads, prepare_accept

VECTORS = json.loads((pathlib.Path(__file__).parent / "vectors" / "task_messages.json").read_text("utf-8"))
ACCEPT = prepare_accept(["json", "pickle", "yaml", "msgpack"])
LIBRARIES = {
    "yaml": "yaml",
    "msgpack": "msgpack",
    "compression_brotli": "brotli",
    "compression_zstd": "compression",
}
UTC = dt.timezone.utc
INDIA = dt.timezone(dt.timedelta(hours=5, minutes=30))

#: What JSON cannot express: name of the vector -> arguments, keyword arguments.
PYTHON = {
    "ext_datetime": (
        [
            dt.datetime(2024, 2, 29, 12, 30, 15, 123456),
            dt.datetime(2024, 2, 29, 12, 30, 15, tzinfo=UTC),
            dt.datetime(2024, 2, 29, 12, 30, 15, tzinfo=INDIA),
            dt.date(2024, 2, 29),
            dt.time(23, 59, 1, 5),
            dt.time(1, 2, tzinfo=UTC),
        ],
        {},
    ),
    "pickle": ([1, "a", dt.datetime(2024, 1, 1, tzinfo=UTC), {1, 2}], {"k": b"\xff"}),
    "pickle_compressed": ([list(range(50))], {}),
    "yaml": ([1, "a", None, True, 2.5], {"k": [1, {"n": "v"}]}),
    "msgpack": ([1, "a", None, True, 2.5, -7], {"k": [1, {"n": b"\x00\xff"}]}),
}
for _name in ("gzip", "zlib", "bzip2", "bzip", "lzma", "xz", "brotli", "zstd"):
    PYTHON[f"compression_{_name}"] = (["squeeze me " * 20], {})


def message_of(envelope):
    body = envelope["body"]
    encoded = envelope["properties"].get("body_encoding") == "base64"
    return Message.from_envelope(envelope, base64.b64decode(body) if encoded else body.encode("utf-8"))


def decoded(message):
    compression = message.headers.get("compression")
    return loads(message.body, message.content_type, message.content_encoding, ACCEPT, compression)


def plain(value):
    """Return what `value` looks like on the wire, which is how the vectors show it."""
    return json.loads(dumps(value, "json")[2])


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_celery_message_is_read(vector):
    library = LIBRARIES.get(vector["name"])
    if library is not None and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    envelopes, expected = vector["redis_envelope"], vector["expected"]
    for envelope in envelopes if isinstance(envelopes, list) else [envelopes]:
        message = message_of(envelope)
        value = decoded(message)
        if "task" not in message.headers:
            headers, body = upgrade_v1(value)
        else:
            headers, body = message.headers, unpack_body(value)
        assert validate_headers(headers) is None
        args, kwargs, embed = body
        assert list(embed) == ["callbacks", "errbacks", "chain", "chord"]
    for header in ("task", "id", "retries"):
        if header in expected:
            assert headers[header] == expected[header]
    if vector["name"] in PYTHON:
        assert (args, kwargs) == PYTHON[vector["name"]]
    elif isinstance(expected.get("args"), list):
        assert plain(args) == expected["args"] and plain(kwargs) == expected["kwargs"]
    if "embed" in expected:
        meant = {key: value for key, value in expected["embed"].items() if value is not None}
        assert {key: plain(value) for key, value in embed.items() if value is not None} == meant


def test_numbers_at_the_edge_are_read():
    vector = next(vector for vector in VECTORS if vector["name"] == "numbers_edge")
    args, _, _ = unpack_body(decoded(message_of(vector["redis_envelope"])))
    assert args[:6] == [0, -1, 2**63, 2**100, 1e308, 0.1] and args[7:9] == [math.inf, -math.inf]
    assert math.copysign(1, args[6]) == -1 and math.isnan(args[9]) and args[10] is True


def test_protocol_1_has_the_same_parts_as_protocol_2():
    vector = next(vector for vector in VECTORS if vector["name"] == "protocol_1")
    headers, (args, kwargs, embed) = upgrade_v1(decoded(message_of(vector["redis_envelope"])))
    assert (headers["task"], headers["id"]) == ("wt.add", "00000000-0000-4000-8000-000000000095")
    assert headers["root_id"] == headers["id"] and headers["eta"] < headers["expires"]
    assert (args, kwargs) == ([2, 3], {}) and embed["callbacks"][0]["task"] == "wt.mul"


def test_protocol_1_with_the_least_there_can_be():
    headers, body = upgrade_v1({"task": "a", "id": "b", "args": [1]})
    assert validate_headers(headers) is None
    assert body == ([1], {}, dict.fromkeys(("callbacks", "errbacks", "chain", "chord")))


@pytest.mark.parametrize("value", [None, [], {}, {"task": "a"}, {"id": "a"}, "task", 5])
def test_body_of_neither_protocol_is_refused(value):
    with pytest.raises(ValueError, match="protocol 1"):
        upgrade_v1(value)


# -- bodies


def test_packed_body_is_unpacked_again():
    step = {"task": "a"}
    packed = pack_body((1,), {"k": 2}, [step], None, [step, step], step)
    embed = {"callbacks": [step], "errbacks": None, "chain": [step, step], "chord": step}
    assert unpack_body(packed) == ([1], {"k": 2}, embed)


@pytest.mark.parametrize("embed", [None, {}, {"unknown": 1}, {"chain": []}])
def test_embed_may_be_left_out_or_hold_more(embed):
    assert set(unpack_body([[], {}, embed])[2]) == {"callbacks", "errbacks", "chain", "chord"}


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (None, "NoneType"),
        ([[], {}], "2 elements"),
        ({"args": []}, "dict"),
        ([None, {}, {}], "args"),
        (["text", {}, {}], "args"),
        ([[], None, {}], "kwargs"),
        ([[], [], {}], "kwargs"),
        ([[], {}, []], "embed"),
        ([[], {}, {"callbacks": {"task": "a"}}], "callbacks"),
        ([[], {}, {"errbacks": ["a"]}], "errbacks"),
        ([[], {}, {"chain": "abc"}], "chain"),
    ],
)
def test_body_of_another_shape_says_what_is_wrong(value, word):
    with pytest.raises(ValueError, match=word):
        unpack_body(value)


# -- envelopes


def test_envelope_round_trips():
    message = Message(b"[]", "application/json", "utf-8", {"task": "a", "id": "b"}, {"priority": 3})
    again = Message.from_envelope(json.loads(json.dumps(message.envelope())), b"[]")
    assert again.envelope() == message.envelope() and again.priority == 3
    assert repr(again) == "<Message a[b] 2 bytes>"


def test_envelope_with_nothing_in_it_is_an_empty_message():
    message = Message.from_envelope({"content-type": ["x"], "headers": None}, b"")
    assert (message.content_type, message.content_encoding, message.headers, message.priority) == (
        "",
        "",
        {},
        0,
    )


def test_delivery_shows_what_a_task_sees():
    delivery = Delivery(Message(b"", "", "", {}, {"priority": 5}), 1, "celery", deliveries=2)
    assert delivery.info == {"exchange": "", "routing_key": "celery", "priority": 5, "redelivered": True}


# -- headers

GOOD = {"task": "a", "id": "b"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"timelimit": None},
        {"timelimit": [1, 2.5]},
        {"timelimit": [None, 0]},
        {"timelimit": (5, None)},
        {"retries": None},
        {"retries": 10**20},
        {"ignore_result": 1},
        {"stamps": {"a": [1]}, "stamped_headers": ["a"]},
        {"lang": "js", "x-mine": object()},
    ],
    ids=repr,
)
def test_sound_headers_have_nothing_wrong(more):
    assert validate_headers({**GOOD, **more}) is None


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ([], "headers must be an object"),
        (None, "headers must be an object"),
        ({}, "'task' is missing"),
        ({"task": "a"}, "'id' is missing"),
        ({"task": "a", "id": None}, "'id' is missing"),
        ({"task": "", "id": "b"}, "'task' must be text"),
        ({"task": ["a"], "id": "b"}, "'task' must be text"),
        ({"task": "a", "id": 5}, "'id' must be text"),
        ({**GOOD, "eta": 5.5}, "'eta' must be text or null, not 5.5"),
        ({**GOOD, "expires": 5}, "'expires' must be text or null"),
        ({**GOOD, "retries": "1"}, "'retries' must be a whole number"),
        ({**GOOD, "retries": -1}, "'retries' must be a count"),
        ({**GOOD, "retries": True}, "'retries' must be a whole number"),
        ({**GOOD, "timelimit": 5}, "'timelimit' must be"),
        ({**GOOD, "timelimit": [1]}, "'timelimit' must be"),
        ({**GOOD, "timelimit": ["1", None]}, "'timelimit' must be"),
        ({**GOOD, "timelimit": [-1, None]}, "'timelimit' must be"),
        ({**GOOD, "timelimit": [float("nan"), None]}, "'timelimit' must be"),
        ({**GOOD, "timelimit": {"a": 1, "b": 2}}, "'timelimit' must be"),
        ({**GOOD, "group": []}, "'group' must be"),
        ({**GOOD, "compression": {}}, "'compression' must be"),
        ({**GOOD, "stamps": []}, "'stamps' must be"),
        ({**GOOD, "shadow": "x" * 5, "root_id": ["y" * 10_000]}, "'root_id' must be"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_unsound_headers_have_a_short_reason(headers, reason):
    found = validate_headers(headers)
    assert found is not None and reason in found and len(found) < 250


def test_random_headers_never_raise():
    values = [
        None,
        "",
        "text",
        0,
        -1,
        1.5,
        float("nan"),
        True,
        [],
        [None, None],
        [1, 2, 3],
        {},
        {"a": 1},
        b"x",
    ]
    names = [
        "task",
        "id",
        "eta",
        "expires",
        "retries",
        "timelimit",
        "group",
        "group_index",
        "stamps",
        "shadow",
    ]
    for seed in range(3000):
        rng = random.Random(seed)
        headers = {name: rng.choice(values) for name in names if rng.random() < 0.8}
        found = validate_headers(headers)
        assert found is None or isinstance(found, str), f"seed {seed}"
        if found is None:
            assert headers["task"] and headers["id"] and isinstance(headers.get("eta"), (str, type(None))), (
                f"seed {seed}"
            )

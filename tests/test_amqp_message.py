# SPDX-License-Identifier: MIT
"""Messages as AMQP content, and what the broker adds to them."""

from __future__ import annotations

import json
import random
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any, Dict

import pytest

from miniq.codecs.amqp import Content
from miniq.codecs.amqp_wire import PROPERTY_NAMES, decode_header, encode_header
from miniq.message import Delivery, Message, validate_headers
from miniq.transports.amqp_message import (
    COPY,
    STARTS,
    UNTIL,
    as_plain,
    from_content,
    take_added,
    take_marks,
    to_content,
)

HEADERS: Dict[str, Any] = {"task": "a.b", "id": "1", "retries": 0, "timelimit": [None, 2.5], "stamps": {}}


def make_message(**properties: Any) -> Message:
    return Message(b"[[], {}, null]", "application/json", "utf-8", dict(HEADERS), properties)


def through_the_codec(message: Message, starts: int = 0) -> Message:
    """Return what arrives of a message that is published."""
    properties, headers = to_content(message, starts)
    size, properties, headers = decode_header(encode_header(len(message.body), properties, headers))
    assert size == len(message.body)
    return from_content(Content(properties, headers, message.body))


# -- there and back ------------------------------------------------------------------------------


def test_a_message_arrives_as_it_was_sent() -> None:
    given = {"correlation_id": "1", "reply_to": "me", "delivery_mode": 2, "priority": 9, "expiration": "1500"}
    sent = make_message(**given, message_id="m", app_id="a", type="t", timestamp=1_700_000_000)
    assert through_the_codec(sent).envelope() == sent.envelope()


@pytest.mark.parametrize("seed", range(20))
def test_any_message_of_json_values_arrives_as_it_was_sent(seed: int) -> None:
    rand = random.Random(seed)

    def value(depth: int) -> Any:
        kind = rand.randrange(8 if depth else 6)
        if kind == 6:
            return [value(depth - 1) for _ in range(rand.randrange(4))]
        if kind == 7:
            return {f"k{n}": value(depth - 1) for n in range(rand.randrange(4))}
        number = rand.randrange(-(1 << 63), 1 << 63)
        return (None, True, number, rand.random(), "é" * rand.randrange(9), 0)[kind]

    headers = {f"name{n}": value(4) for n in range(30)}
    names = [name for name in PROPERTY_NAMES if name not in ("content_type", "content_encoding")]
    numbers = {"delivery_mode": 2, "priority": rand.randrange(256), "timestamp": rand.randrange(1 << 40)}
    properties = {name: numbers.get(name, name) for name in names if rand.random() < 0.5}
    sent = Message(rand.randbytes(9), "a/b", "utf-8", headers, properties)
    arrived = through_the_codec(sent)
    assert arrived.envelope() == sent.envelope(), f"seed {seed}"
    assert arrived.body == sent.body


def test_what_has_no_value_is_left_out() -> None:
    properties, headers = to_content(Message(b"", "", "", {}, {"reply_to": None, "priority": 0}))
    assert headers == {}
    _, found, _ = decode_header(encode_header(0, properties, headers))
    assert found == {"priority": 0}
    arrived = from_content(Content(found, {}, b""))
    assert (arrived.content_type, arrived.content_encoding) == ("", "")


def test_a_property_that_only_another_transport_has_stays_behind() -> None:
    assert "origin" not in to_content(make_message(origin="gen1@host", x={}))[0]


def test_the_headers_of_a_message_are_not_touched_by_sending_it() -> None:
    message = make_message()
    to_content(message, starts=2)
    assert message.headers == HEADERS


# -- what other clients send ---------------------------------------------------------------------


def test_values_that_json_does_not_have_become_text() -> None:
    moment = datetime(2026, 11, 21, 12, tzinfo=timezone.utc)
    headers = {
        **HEADERS,
        "when": moment,
        "price": Decimal("1.50"),
        "text": "żółć".encode(),
        "raw": b"\xff\x00a",
        "deep": [{"list": [moment, b"x"]}, Decimal(2)],
    }
    message = from_content(Content({}, headers, b""))
    assert {name: message.headers[name] for name in ("when", "price", "text", "raw", "deep")} == {
        "when": "2026-11-21T12:00:00+00:00",
        "price": "1.50",
        "text": "żółć",
        "raw": "\\xff\x00a",
        "deep": [{"list": ["2026-11-21T12:00:00+00:00", "x"]}, "2"],
    }
    assert json.loads(json.dumps(message.envelope())) == message.envelope()


def test_numbers_that_stand_for_booleans_are_taken() -> None:
    message = from_content(Content({}, {**HEADERS, "ignore_result": 1}, b""))
    assert validate_headers(message.headers) is None


def test_a_message_without_headers_is_one() -> None:
    message = from_content(Content({"content_type": "application/json"}, {}, b"{}"))
    assert (message.headers, message.properties, message.body) == ({}, {}, b"{}")


def test_a_value_that_is_json_stays_as_it_is() -> None:
    value: Dict[str, Any] = {"a": [1, 2.5, None, True, "x", {"b": []}]}
    assert as_plain(value) == value


# -- headers that are not the sender's -----------------------------------------------------------


@pytest.mark.parametrize("starts", [0, 1, 7])
def test_a_count_of_starts_travels_in_a_header_and_is_taken_off(starts: int) -> None:
    arrived = through_the_codec(make_message(), starts)
    assert (STARTS in arrived.headers) == (starts > 0)
    assert take_marks(arrived.headers).starts == starts
    assert arrived.headers == HEADERS


@pytest.mark.parametrize("value", [-1, True, "3", None, 2.0, [1]])
def test_a_count_that_is_none_is_0_and_taken_off_too(value: Any) -> None:
    headers = {**HEADERS, STARTS: value}
    assert take_marks(headers).starts == 0
    assert headers == HEADERS


def test_the_marks_of_a_copy_are_taken_off() -> None:
    headers = {**HEADERS, COPY: "a1", UNTIL: 12.5, "CC": ["another"]}
    assert take_marks(headers) == (0, "a1", 12.5, {"CC": ["another"]})
    assert headers == HEADERS
    assert take_marks({UNTIL: "soon"}) == take_marks({}) == (0, "", 0.0, {})


def test_what_the_broker_added_is_taken_off() -> None:
    added = {
        "x-death": [{"count": 1, "queue": "_miniq.delay.1", "reason": "expired"}],
        "x-first-death-exchange": "e",
        "x-first-death-queue": "q",
        "x-first-death-reason": "expired",
        "x-last-death-exchange": "e",
        "x-last-death-queue": "q",
        "x-last-death-reason": "expired",
        "x-delivery-count": 3,
        "CC": ["another"],
        "BCC": ["a third"],
    }
    headers = {**added, **HEADERS, "x-tenant": "acme"}
    assert take_added(headers) == added
    assert headers == {**HEADERS, "x-tenant": "acme"}
    assert take_added(headers) == {}


def test_a_delivery_of_a_message_shows_the_priority_it_was_sent_with() -> None:
    delivery = Delivery(through_the_codec(make_message(priority=7)), 1, "celery")
    assert delivery.info["priority"] == 7
    assert Delivery(through_the_codec(make_message()), 1, "celery").info["priority"] == 0

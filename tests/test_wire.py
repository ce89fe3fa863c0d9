# SPDX-License-Identifier: MIT
"""Messages as Celery sends them: each captured call is made again here and compared field by field.

Captured on Redis; what belongs to the envelope there and not to the message is left out.
"""

from __future__ import annotations

import json
import pickle
import zlib
from typing import Any

import pytest
from bench import Bench, run_of
from wire import CALLED, CHAINS, NOT_SENT, SENT, VECTORS, compare, find, make_app, make_call, of_redis

from miniq.message import HEADER_NAMES
from miniq.serialization import decompress


def test_every_vector_is_compared_or_left_out_for_a_reason() -> None:
    names = {vector["name"] for vector in VECTORS}
    assert set(NOT_SENT) <= names


@pytest.mark.parametrize("name", CALLED)
def test_a_call_sends_what_celery_sends(name: str) -> None:
    vector = find(name)
    _, names = make_app(vector.get("config", {}))
    ours, theirs = make_call(names, vector["how_made"]), of_redis(vector["redis_envelope"])
    compare(ours, theirs, vector["how_made"])
    if ours.message.content_type != "application/json" or "compression" in ours.message.headers:
        return
    # Small differences in spacing would make every message larger than Celery's.
    assert len(ours.message.body) == len(theirs.message.body)


@pytest.mark.parametrize("name", CHAINS)
def test_the_rest_of_a_chain_travels_as_in_celery(name: str) -> None:
    vector = find(name)
    theirs = of_redis(vector["redis_envelope"])
    _, names = make_app({})
    names["rest"] = vector["expected"]["embed"]["chain"]
    call = f"add.apply_async((1,2), chain=rest, task_id={theirs.message.headers['id']!r}"
    if name == "chain_with_options":
        call += ", queue='prio', priority=5, link_error=errback.s()"
    ours = make_call(names, call + ")")
    compare(ours, theirs, call)


def test_headers_stand_in_celerys_order() -> None:
    _, names = make_app({})
    ours = make_call(names, "add.apply_async((2,3), headers={'mine': 1}, compression='gzip')")
    assert tuple(ours.message.headers) == (*HEADER_NAMES, "mine", "compression")


def test_what_celery_calls_gzip_is_a_zlib_stream() -> None:
    _, names = make_app({})
    ours = make_call(names, "echo.apply_async(('x' * 100,), compression='gzip')")
    assert ours.message.headers["compression"] == "application/x-gzip"
    assert json.loads(zlib.decompress(ours.message.body))[0] == ["x" * 100]
    assert decompress(ours.message.body, "application/x-gzip") == zlib.decompress(ours.message.body)


def test_pickles_are_of_protocol_4_and_name_nothing_of_ours() -> None:
    _, names = make_app({})
    ours = make_call(names, "echo.apply_async((add.s(1), 2), link=mul.s(2), serializer='pickle')")
    assert ours.message.body[:2] == b"\x80\x04"
    assert b"miniq" not in ours.message.body
    args, _, embed = pickle.loads(ours.message.body)
    assert type(args[0]) is dict
    assert type(embed["callbacks"][0]) is dict


@pytest.mark.parametrize("name", SENT)
def test_captured_messages_run_here(name: str) -> None:
    """Whatever Celery sends for a single task, the runner opens; its arguments are the captured ones."""
    vector = find(name)
    headers = vector["redis_envelope"]["headers"]
    app, _ = make_app({})
    app.conf.accept_content = ["json", "pickle", "yaml", "msgpack"]
    opened: Any = Bench(app).runner.open(run_of(of_redis(vector["redis_envelope"])))
    if not hasattr(opened, "request"):
        reason = opened.reason
        if "needs the library" in reason or "compression" in reason or "serializer" in reason:
            pytest.skip(reason)
        assert "NotRegistered" in reason, reason
        assert headers["task"] in ("other.module.task", "módulo.tarea")
        return
    assert opened.request.id == headers["id"]
    expected = vector["expected"]
    if isinstance(expected.get("args"), list):
        assert len(opened.args) == len(expected["args"])
    if expected.get("embed"):
        assert sorted(expected["embed"]) == sorted(
            key for key in ("callbacks", "errbacks", "chain") if getattr(opened.request, key)
        )

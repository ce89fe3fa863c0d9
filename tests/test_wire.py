# SPDX-License-Identifier: MIT
"""Messages as Celery sends them: each captured call is made again here and compared field by field.

The vectors hold what Celery put on the wire for a call, with the text of the call.  Left out are
what varies (ids nobody gave, the sender's name and reply address, display text), and what belongs
to the Redis envelope and not to the message.  Moments are compared as moments: here they always
travel in UTC, and those relative to "now" only by their distance to each other.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
import pickle
import re
import uuid
import zlib
from decimal import Decimal
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from bench import Bench, run_of

from miniq import Exchange, MiniQ, Queue, Task
from miniq.exceptions import ImproperlyConfigured
from miniq.message import HEADER_NAMES
from miniq.serialization import decompress, loads
from miniq.times import to_epoch
from miniq.transports.base import Publication

VECTORS: List[Dict[str, Any]] = json.loads(
    (Path(__file__).parent / "vectors" / "task_messages.json").read_text(encoding="utf-8")
)
UTC, TZ, D = dt.timezone.utc, dt.timezone(dt.timedelta(hours=5, minutes=30)), dt.datetime

#: What this version refuses to send, or what another sender makes -> why it is not compared.
NOT_SENT = {
    **dict.fromkeys(
        (
            "chain_of_chains", "group_three", "group_of_chains", "chord_header_messages",
            "chord_with_link_error", "chain_group_upgraded_to_chord", "chain_task_then_group",
            "chain_task_then_chord", "map", "starmap", "chunks", "stamped", "chord_unlock_task",
        ),
        "workflows and stamps are not in this version",
    ),
    **dict.fromkeys(("protocol_1", "protocol_1_plain"), "protocol 1 is only read"),
    "beat_message": "sent by the scheduler",
    "body_encoding_utf8": "an option of the Redis transport",
}  # fmt: skip
SENT = [vector["name"] for vector in VECTORS if vector["name"] not in NOT_SENT]
#: Made by a chain there, by the option of that name here.
CHAINS = ("chain_first_message", "chain_with_options")
#: Never compared: they vary.
VARYING = ("origin", "argsrepr", "kwargsrepr")
#: Parts of the Redis envelope.
ENVELOPE_ONLY = ("delivery_info", "body_encoding", "delivery_tag")
#: Calling options that leak into Celery's properties by accident.
LEAKS = ("argsrepr", "kwargsrepr")


def uid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def make_app(config: Dict[str, Any]) -> Tuple[MiniQ, Dict[str, Any]]:
    """Return the app the vectors were made with, and the names their calls use."""
    app = MiniQ("wt", broker="memory://wire")
    app.conf.task_queues = [
        Queue("celery", routing_key="celery"),
        Queue("prio", max_priority=10),
        Queue("topicq", Exchange("wt.topic", "topic"), routing_key="img.#"),
    ]
    if "task_default_queue" in config:
        app.conf.task_queues = None
    app.conf.update(config)

    def task(name: str, fun: Any, **options: Any) -> Any:
        return app.task(name=f"wt.{name}", **options)(fun)

    names = {
        "app": app,
        "add": task("add", lambda x, y: x + y),
        "mul": task("mul", lambda x, y: x * y),
        "ident": task("ident", lambda x: x),
        "echo": task("echo", lambda *a, **k: None),
        "nores": task("nores", lambda x: None, ignore_result=True),
        "limited": task("limited", lambda: None, time_limit=30, soft_time_limit=20),
        "errback": task("errback", lambda self, task_id: None, bind=True),
        "errback_id": task("errback_id", lambda task_id: None),
        "errback3": task("errback3", lambda request, exc, traceback: None),
        "retry_me": task("retry_me", retry_me, bind=True, max_retries=3),
        "uid": uid, "D": D, "dt": dt, "UTC": UTC, "TZ": TZ, "uuid": uuid, "Decimal": Decimal,
        "inf": math.inf, "nan": math.nan,
    }  # fmt: skip
    return app, names


def retry_me(self: Task, *args: Any, **kwargs: Any) -> None:
    raise self.retry(exc=ValueError("later"), **kwargs)


def make_call(names: Dict[str, Any], text: str) -> Publication:
    """Make the call that `text` spells; return its message instead of sending it."""
    sent: List[Publication] = []
    app = names["app"]
    app.producer.publish = lambda prepared, *_: sent.append(prepared.publication)
    eval(text, names)
    (publication,) = sent
    return publication


def decoded(body: bytes, headers: Dict[str, Any], content_type: str, encoding: str) -> Any:
    """Return a body as plain data; NaN as text, because it equals nothing."""
    accept = frozenset({content_type})
    value = loads(body, content_type, encoding, accept, headers.get("compression"))
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (float, Decimal)):
        return repr(value)
    return value


def compare(ours: Publication, theirs: Dict[str, Any], given: str) -> None:
    """Compare a message with a captured envelope; `given` is the text of the call."""
    message, info = ours.message, theirs["properties"]["delivery_info"]
    assert message.content_type == theirs["content-type"]
    assert message.content_encoding == theirs["content-encoding"]
    assert (ours.exchange, ours.routing_key) == (info["exchange"], info["routing_key"])

    left, right = dict(message.headers), dict(theirs["headers"])
    assert set(left) == set(right)
    for moment in ("eta", "expires"):
        a, b = left.pop(moment), right.pop(moment)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.endswith("+00:00")
            if "D.now" not in given and f"{moment}=D(" in given:
                assert to_epoch(a) == to_epoch(b)
    for name in VARYING:
        a, b = left.pop(name), right.pop(name)
        assert a == b if f"{name}=" in given else isinstance(a, str)
    if "task_id=" not in given:
        for headers in (left, right):
            assert headers.pop("id") == headers.pop("root_id")
    assert left == right

    left, right = dict(message.properties), dict(theirs["properties"])
    for name in (*ENVELOPE_ONLY, *LEAKS):
        right.pop(name, None)
    if "reply_to=" not in given:
        uuid.UUID(left.pop("reply_to"))
        right.pop("reply_to")
    if "task_id=" not in given:
        left.pop("correlation_id"), right.pop("correlation_id")
    if "expiration" in right:
        assert abs(int(left.pop("expiration")) - int(right.pop("expiration"))) < 30_000
    assert left == right

    assert decoded(message.body, message.headers, message.content_type, message.content_encoding) == decoded(
        base64.b64decode(theirs["body"]),
        theirs["headers"],
        theirs["content-type"],
        theirs["content-encoding"],
    )


def find(name: str) -> Dict[str, Any]:
    (found,) = [vector for vector in VECTORS if vector["name"] == name]
    return found


def test_every_vector_is_compared_or_left_out_for_a_reason() -> None:
    names = {vector["name"] for vector in VECTORS}
    assert set(NOT_SENT) <= names


@pytest.mark.parametrize("name", [name for name in SENT if name not in CHAINS])
def test_a_call_sends_what_celery_sends(name: str) -> None:
    vector = find(name)
    app, names = make_app(vector.get("config", {}))
    try:
        ours = make_call(names, vector["how_made"])
    except ImproperlyConfigured as error:
        missing = re.search(r"needs the library (\S+)", str(error))
        if missing is None:
            raise
        pytest.skip(f"{missing.group(1)} is not installed here")
    compare(ours, vector["redis_envelope"], vector["how_made"])
    if ours.message.content_type != "application/json" or "compression" in ours.message.headers:
        return
    # Small differences in spacing would make every message larger than Celery's.
    theirs = base64.b64decode(vector["redis_envelope"]["body"])
    assert len(ours.message.body) == len(theirs)


@pytest.mark.parametrize("name", CHAINS)
def test_the_rest_of_a_chain_travels_as_in_celery(name: str) -> None:
    vector = find(name)
    theirs = vector["redis_envelope"]
    _, names = make_app({})
    names["rest"] = vector["expected"]["embed"]["chain"]
    options = {key: theirs["headers"][key] for key in ("id",)}
    call = f"add.apply_async((1,2), chain=rest, task_id={options['id']!r}"
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
    envelope = vector["redis_envelope"]
    app, _ = make_app({})
    app.conf.accept_content = ["json", "pickle", "yaml", "msgpack"]
    bench = Bench(app)
    opened: Any = bench.runner.open(
        run_of(Bench(app).prepare("wt.echo"))._replace(
            body=base64.b64decode(envelope["body"]),
            content_type=envelope["content-type"],
            content_encoding=envelope["content-encoding"],
            headers=envelope["headers"],
            properties=envelope["properties"],
        )
    )
    if not hasattr(opened, "request"):
        reason = opened.reason
        if "needs the library" in reason or "compression" in reason or "serializer" in reason:
            pytest.skip(reason)
        assert "NotRegistered" in reason, reason
        assert envelope["headers"]["task"] in ("other.module.task", "módulo.tarea")
        return
    assert opened.request.id == envelope["headers"]["id"]
    expected = vector["expected"]
    if isinstance(expected.get("args"), list):
        assert len(opened.args) == len(expected["args"])
    if expected.get("embed"):
        assert sorted(expected["embed"]) == sorted(
            key for key in ("callbacks", "errbacks", "chain") if getattr(opened.request, key)
        )

# SPDX-License-Identifier: MIT
"""Messages captured from Celery, what they were made of, and how ours are compared with them.

A vector of a call holds what Celery put on the wire for it, and the text of the call, which can be
made again here.  Never compared is what varies: ids nobody gave, the sender's name and reply address,
display text.  Moments are compared as moments: here they always travel in UTC, and those relative
to "now" only by their distance to each other.

A captured message is a `Publication`, wherever it was captured, so that it compares with one of ours.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import pytest
from bench import Bench, run_of

from miniq import Exchange, MiniQ, Queue, Task
from miniq.exceptions import ImproperlyConfigured
from miniq.message import Message, unpack_body, upgrade_v1
from miniq.serialization import dumps, loads
from miniq.times import to_epoch
from miniq.transports.base import Publication


def read_vectors(name: str) -> List[Dict[str, Any]]:
    """Return the vectors in a file of the folder ``vectors``."""
    path = Path(__file__).parent / "vectors" / f"{name}.json"
    found: List[Dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


VECTORS = read_vectors("task_messages")
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
CALLED = [name for name in SENT if name not in CHAINS]
#: Never compared: they vary.
VARYING = ("origin", "argsrepr", "kwargsrepr")
#: Parts of the Redis envelope, not of the message.
ENVELOPE_ONLY = ("delivery_info", "body_encoding", "delivery_tag")
#: Calling options that leak into Celery's properties by accident.
LEAKS = ("argsrepr", "kwargsrepr")
ACCEPT = frozenset(
    {"application/json", "application/x-python-serialize", "application/x-yaml", "application/x-msgpack"}
)


def find(name: str) -> Dict[str, Any]:
    """Return the vector of a call."""
    (found,) = [vector for vector in VECTORS if vector["name"] == name]
    return found


def of_redis(envelope: Dict[str, Any]) -> Publication:
    """Return the message that was captured in a list of Redis."""
    info = envelope["properties"]["delivery_info"]
    properties = {k: v for k, v in envelope["properties"].items() if k not in ENVELOPE_ONLY}
    if envelope["properties"].get("body_encoding") == "base64":
        body = base64.b64decode(envelope["body"])
    else:
        body = envelope["body"].encode()
    headers = dict(envelope["headers"])
    message = Message(body, envelope["content-type"], envelope["content-encoding"], headers, properties)
    return Publication(message, info["exchange"], info["routing_key"])


# -- making the calls ----------------------------------------------------------------------------


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
        "fail": task("fail", fail),
        "uid": uid, "D": D, "dt": dt, "UTC": UTC, "TZ": TZ, "uuid": uuid, "Decimal": Decimal,
        "inf": math.inf, "nan": math.nan,
    }  # fmt: skip
    return app, names


def retry_me(self: Task, *args: Any, **kwargs: Any) -> None:
    raise self.retry(exc=ValueError("later"), **kwargs)


def fail(text: str) -> None:
    raise ValueError(text)


def make_call(names: Dict[str, Any], text: str) -> Publication:
    """Make the call that `text` spells; return its message instead of sending it.

    Skips the test where it needs a library that is not installed.
    """
    sent: List[Publication] = []
    app = names["app"]
    app.producer.publish = lambda prepared, *_: sent.append(prepared.publication)
    try:
        eval(text, names)
    except ImproperlyConfigured as error:
        skip_without_library(error)
        raise
    (publication,) = sent
    return publication


def skip_without_library(error: Exception) -> None:
    """Skip the test if that is what the error says."""
    if "needs the library" in str(error):
        pytest.skip(str(error))


# -- comparing -----------------------------------------------------------------------------------


def compare(ours: Publication, theirs: Publication, given: str) -> None:
    """Compare a message with the captured one; `given` is the text of the call."""
    message, captured = ours.message, theirs.message
    assert message.content_type == captured.content_type
    assert message.content_encoding == captured.content_encoding
    assert (ours.exchange, ours.routing_key) == (theirs.exchange, theirs.routing_key)

    left, right = dict(message.headers), dict(captured.headers)
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

    left, right = dict(message.properties), dict(captured.properties)
    for name in LEAKS:
        right.pop(name, None)
    if "reply_to=" not in given:
        uuid.UUID(left.pop("reply_to"))
        right.pop("reply_to")
    if "task_id=" not in given:
        left.pop("correlation_id"), right.pop("correlation_id")
    if "expiration" in right:
        assert abs(int(left.pop("expiration")) - int(right.pop("expiration"))) < 30_000
    assert left == right
    assert _plain(decoded(message)) == _plain(decoded(captured))


def compare_follow_up(ours: Publication, theirs: Publication) -> None:
    """Compare what a worker sends: with the ids of the work-flow, but not those made on the way."""
    message, captured = ours.message, theirs.message
    assert json.loads(message.body) == json.loads(captured.body)
    assert (ours.exchange, ours.routing_key) == (theirs.exchange, theirs.routing_key)
    left, right = dict(message.headers), dict(captured.headers)
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
    left, right = dict(message.properties), dict(captured.properties)
    for name in ("correlation_id", "reply_to", "expiration"):
        assert type(left.pop(name, None)) is type(right.pop(name, None))
    for name in ("origin", *LEAKS):
        right.pop(name, None)
    assert left == right


def compare_workflow(captured: Sequence[Publication]) -> None:
    """Run the messages of a work-flow one after the other: each sends the next, as there."""
    app, _ = make_app({})
    bench = Bench(app)
    waiting: List[Publication] = []
    for number, theirs in enumerate(captured, 1):
        if number > 1:
            compare_follow_up(waiting.pop(0), theirs)
        if number < len(captured):
            waiting += bench.runner.run(run_of(theirs)).followups
    assert not waiting


def compare_meaning(message: Message, expected: Dict[str, Any]) -> None:
    """Compare what a message decodes to with what was meant; skips where a library is missing."""
    value, headers = decoded(message), message.headers
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
        assert args == list(_evaluated(expected["args_python"]))
    elif isinstance(expected.get("args"), list):
        assert _as_json(args) == _as_json(expected["args"])
    if "kwargs_python" in expected:
        assert kwargs == _evaluated(expected["kwargs_python"])
    elif "kwargs" in expected:
        assert _as_json(kwargs) == _as_json(expected["kwargs"])
    if "embed" in expected:
        assert _as_json(_without_none(embed)) == _as_json(_without_none(expected["embed"]))


def compare_body(message: Message, body: Any) -> None:
    """Compare the body of a task message with that captured as JSON."""
    assert json.loads(message.body) == body
    args, kwargs, embed = unpack_body(decoded(message))
    assert len(args) == len(body[0])
    assert sorted(kwargs) == sorted(body[1])
    assert embed.keys() == body[2].keys()


def decoded(message: Message) -> Any:
    """Return the decoded body; skips the test where a library is missing for it."""
    compression = message.headers.get("compression")
    try:
        return loads(message.body, message.content_type, message.content_encoding, ACCEPT, compression)
    except Exception as error:
        skip_without_library(error)
        raise


def _plain(value: Any) -> Any:
    """Return a value without tuples and numbers that equal nothing."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (float, Decimal)):
        return repr(value)
    return value


def _without_none(value: Dict[str, Any]) -> Dict[str, Any]:
    return {key: one for key, one in value.items() if one is not None}


def _evaluated(text: str) -> Any:
    names = {"datetime": dt.datetime, "date": dt.date, "time": dt.time, "utc": UTC, "TZ": TZ}
    return eval(text.replace("+05:30", "TZ"), names)


def _as_json(value: Any) -> Any:
    """Return a value as text, in which NaN equals itself, and the types beyond JSON have their wire form."""
    return json.dumps(json.loads(dumps(value, "json")[2]), sort_keys=True)

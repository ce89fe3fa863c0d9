# SPDX-License-Identifier: MIT
"""The message between a producer and a worker: Celery's task message protocol 2, and reading 1.

A message is three things: `properties` (for the broker), `headers` (for the worker's core, which
decides by them alone) and an opaque `body` (decoded only where the task runs).  A stored message
splits into an *envelope*, a small JSON object

    {"content-type": ..., "content-encoding": ..., "headers": {...}, "properties": {...}}

and the body's bytes beside it.  With the body as base64 text in the key ``body`` this is what
Celery keeps in a Redis list, so a message can change transports without being rewritten.

Source: Celery's message protocol 2.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

from .text import safe_repr

#: Headers which Celery always writes, in its order.  All but `task` and `id` may be missing.
HEADER_NAMES = (
    "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries",
    "timelimit", "root_id", "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result",
    "replaced_task_nesting", "stamped_headers", "stamps",
)  # fmt: skip


class Message:
    """One message as bytes and dicts; nothing in it is decoded.

    `headers` and `properties` hold JSON values only.  `properties` may have: correlation_id,
    reply_to, delivery_mode (1 or 2), priority (0..255), expiration (text, ms).
    """

    __slots__ = ("body", "content_type", "content_encoding", "headers", "properties")

    def __init__(
        self,
        body: bytes,
        content_type: str,
        content_encoding: str,
        headers: Dict[str, Any],
        properties: Dict[str, Any],
    ) -> None:
        self.body = body
        self.content_type = content_type
        self.content_encoding = content_encoding
        self.headers = headers
        self.properties = properties

    def __repr__(self) -> str:
        return f"<Message {self.headers.get('task')}[{self.headers.get('id')}] {len(self.body)} bytes>"

    @property
    def priority(self) -> int:
        """The priority, 0 where the message has none."""
        return self.properties.get("priority") or 0

    def envelope(self) -> Dict[str, Any]:
        """Return all but the body as one JSON-able dict (shape: see the module)."""
        return {
            "content-type": self.content_type,
            "content-encoding": self.content_encoding,
            "headers": self.headers,
            "properties": self.properties,
        }

    @classmethod
    def from_envelope(cls, envelope: Dict[str, Any], body: bytes) -> "Message":
        """Build a message from what `envelope` returned; missing parts become empty."""
        content_type, content_encoding = envelope.get("content-type"), envelope.get("content-encoding")
        return cls(
            body,
            content_type if isinstance(content_type, str) else "",
            content_encoding if isinstance(content_encoding, str) else "",
            envelope.get("headers") or {},
            envelope.get("properties") or {},
        )


class Delivery:
    """A message handed to this worker, with what the broker says of it.

    `tag`        the consumer's own handle for settling it
    `queue`      name of the queue it came from
    `exchange`, `routing_key`   how it was published
    `deliveries` how often it was started before this time (0 = first); a lower bound where the
                 broker cannot count
    `fate`       None, or why it must not run: ``"revoked"`` (a stored revocation names it),
                 ``"lost"`` (the worker that had started it died and it may not start again),
                 ``"garbage"`` (what the broker holds is no message at all)
    `early`      set by the worker before `Consumer.start`: acknowledged at the start, not after
    `token`      set by the worker for a message handed to a child ahead of its turn (see
                 `Consumer.start_journal`)
    `lost_by`    with fate "lost": node name of the worker that died
    `redelivered`  the broker says that it was handed out before, started or not
    """

    __slots__ = (
        "message", "tag", "queue", "exchange", "routing_key", "deliveries", "fate", "early",
        "token", "lost_by", "redelivered",
    )  # fmt: skip

    def __init__(
        self,
        message: Message,
        tag: Any,
        queue: str,
        exchange: str = "",
        routing_key: str = "",
        deliveries: int = 0,
        fate: Optional[str] = None,
        lost_by: str = "",
    ) -> None:
        self.message = message
        self.tag = tag
        self.queue = queue
        self.exchange = exchange
        self.routing_key = routing_key or queue
        self.deliveries = deliveries
        self.fate = fate
        self.early = False
        self.token: Optional[int] = None
        self.lost_by = lost_by
        self.redelivered = False

    def __repr__(self) -> str:
        return f"<Delivery {self.tag!r} from {self.queue}: {self.message!r}>"

    @property
    def info(self) -> Dict[str, Any]:
        """What a task sees as ``request.delivery_info``."""
        return {
            "exchange": self.exchange,
            "routing_key": self.routing_key,
            "priority": self.message.priority,
            "redelivered": self.redelivered or self.deliveries > 0,
        }


# -- headers -------------------------------------------------------------------------------------

_TEXT = (frozenset({str, type(None)}), "text or null")
_COUNT = (frozenset({int, type(None)}), "a whole number or null")
#: header -> the types it may have, and those in words; null is as good as missing.
_HEADER_TYPES = (
    ("eta", *_TEXT),
    ("expires", *_TEXT),
    ("retries", *_COUNT),
    ("group", *_TEXT),
    ("group_index", *_COUNT),
    ("root_id", *_TEXT),
    ("parent_id", *_TEXT),
    ("shadow", *_TEXT),
    ("compression", *_TEXT),
    # An AMQP peer may send a boolean as 0 or 1.
    ("ignore_result", frozenset({bool, int, type(None)}), "a boolean or null"),
    ("replaced_task_nesting", *_COUNT),
    ("stamped_headers", frozenset({list, tuple, type(None)}), "an array or null"),
    ("stamps", frozenset({dict, type(None)}), "an object or null"),
)
_NO_LIMITS = (None, [None, None])


def validate_headers(headers: Any) -> Optional[str]:
    """Return what is wrong with the headers of a protocol 2 message, None when a worker can go by them.

    Checks what the worker's core decides by, and the types only: whether ``eta`` is a moment, or
    the task is known, is found out where it is used.
    """
    if type(headers) is not dict:
        return f"the headers must be an object, not {type(headers).__name__}"
    get = headers.get
    for name in ("task", "id"):
        value = get(name)
        if type(value) is not str or not value:
            return _wrong(name, value, "text that is not empty")
    for name, types, words in _HEADER_TYPES:
        if type(get(name)) not in types:
            return _wrong(name, get(name), words)
    if (get("retries") or 0) < 0:
        return _wrong("retries", get("retries"), "a count from 0 on")
    limits = get("timelimit")
    if limits not in _NO_LIMITS and not _are_limits(limits):
        return _wrong("timelimit", limits, "[hard, soft], each seconds or null")
    return None


def _are_limits(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    return all(
        limit is None or (type(limit) in (int, float) and 0 <= limit < float("inf")) for limit in value
    )


def _wrong(name: str, value: Any, expected: str) -> str:
    if value is None:
        return f"header {name!r} is missing"
    return f"header {name!r} must be {expected}, not {safe_repr(value, 100)}"


# -- body ----------------------------------------------------------------------------------------

#: What `Task.request` and follow-ups need of a body: args, kwargs, embed.
Body = Tuple[List[Any], Dict[str, Any], Dict[str, Any]]

_EMBED_KEYS = ("callbacks", "errbacks", "chain", "chord")


def pack_body(
    args: Any,
    kwargs: Any,
    callbacks: Optional[List[Any]] = None,
    errbacks: Optional[List[Any]] = None,
    chain: Optional[List[Any]] = None,
    chord: Any = None,
) -> Tuple[Any, Any, Dict[str, Any]]:
    """Return the three-element body of protocol 2; ``chain`` is reversed, the next step last."""
    return (args, kwargs, {"callbacks": callbacks, "errbacks": errbacks, "chain": chain, "chord": chord})


def unpack_body(value: Any) -> Body:
    """Check a decoded protocol 2 body and return ``(args, kwargs, embed)``.

    `embed` always has the keys callbacks, errbacks, chain and chord.  Raises `ValueError` whose
    text says what is wrong: the caller sets the message aside.
    """
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        shape = f"{len(value)} elements" if isinstance(value, (list, tuple)) else type(value).__name__
        raise ValueError(f"the body must be [args, kwargs, embed], this one is {shape}")
    args, kwargs, embed = value
    if not isinstance(args, (list, tuple)):
        raise ValueError(f"args must be an array, not {type(args).__name__}")
    if not isinstance(kwargs, dict):
        raise ValueError(f"kwargs must be an object, not {type(kwargs).__name__}")
    if embed is not None and not isinstance(embed, dict):
        raise ValueError(f"embed must be an object or null, not {type(embed).__name__}")
    embed = embed or {}
    found = {key: embed.get(key) for key in _EMBED_KEYS}
    for key in ("callbacks", "errbacks", "chain"):
        if found[key] and not _are_signatures(found[key]):
            raise ValueError(
                f"embed: {key} must be an array of signatures or null, not {safe_repr(found[key], 100)}"
            )
    return list(args), kwargs, found


def _are_signatures(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(step, dict) for step in value)


def upgrade_v1(value: Any) -> Tuple[Dict[str, Any], Body]:
    """Turn a decoded protocol 1 body (one object) into protocol 2 ``(headers, body)``.

    Raises `ValueError` when it lacks `task` or `id`.
    """
    if not isinstance(value, dict) or not value.get("task") or not value.get("id"):
        raise ValueError(
            "neither protocol 2 (there is no task header) nor a protocol 1 object with task and id"
        )
    headers: Dict[str, Any] = {
        "lang": "py",
        "task": value["task"],
        "id": value["id"],
        "shadow": None,
        "eta": value.get("eta"),
        "expires": value.get("expires"),
        "group": value.get("group") or value.get("taskset"),
        "group_index": value.get("group_index"),
        "retries": value.get("retries") or 0,
        "timelimit": value.get("timelimit") or [None, None],
        "root_id": value["id"],
        "parent_id": None,
        "argsrepr": None,
        "kwargsrepr": None,
        "origin": None,
    }
    body = unpack_body(
        [
            value.get("args") or [],
            value.get("kwargs") or {},
            {key: value.get(key) for key in _EMBED_KEYS},
        ]
    )
    return headers, body

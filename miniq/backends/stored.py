# SPDX-License-Identifier: MIT
"""What a stored value says about itself, for stores that keep the encoded meta and nothing beside it.

Redis, memcached and files hold the bytes that Celery writes and reads, so state and content type
have to be found in the bytes.  ``status`` is the first key of every meta, whoever wrote it, and so
the first bytes are enough::

    {"status": "SUCCESS", ...                        JSON
    80 04 95 <8 bytes> } 94 ( 8c 06 status ...       pickle: looked at, never loaded
    86 a6 status a7 SUCCESS ...                      MessagePack
    \\nstatus: SUCCESS\\n                              YAML, whose keys are sorted
    00 celery-compressed 00 <type> 00 <compressed>   any of these, compressed (`result_compression`)

Source: the values that Celery 5.7 leaves in Redis.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from typing import Optional, Pattern, Tuple

from ..exceptions import DecodeError
from ..serialization import decompress

logger = logging.getLogger(__name__)

#: Before the id of a task in the keys of a key-value store.
KEY_PREFIX = "celery-task-meta-"
#: The same for a saved group.
GROUP_KEY_PREFIX = "celery-taskset-meta-"
#: Before the hash of an id that the store's keys cannot hold.
HASHED = "sha256-"

_COMPRESSED = b"\0celery-compressed\0"
#: The content type of a compression is not longer.
_MAX_TYPE_BYTES = 100
#: An unreadable value shows this much in its error.
_EXCERPT_BYTES = 64

_JSON = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"status"[ \t\r\n]*:[ \t\r\n]*"([^"\\]+)"')
# Protocols 2 to 5: an opening frame and memos (94, or q and a number) are there or not.
_PICKLE = re.compile(
    rb"\x80[\x02-\x05](?:\x95.{8})?\}(?:\x94|q.)?\((?:\x8c\x06|X\x06\0\0\0)status(?:\x94|q.)?"
    rb"(?:\x8c(.)|X(.{4}))",
    re.DOTALL,
)
_MSGPACK = re.compile(
    rb"(?:[\x81-\x8f]|\xde..|\xdf.{4})(?:\xa6|\xd9\x06)status(?:([\xa1-\xbf])|\xd9(.))", re.DOTALL
)
_YAML = re.compile(rb"""^status: *['"]?([^\s'"]+)['"]?[ \r]*$""", re.MULTILINE)


def key_prefix(global_keyprefix: str, kind: str = KEY_PREFIX) -> str:
    """Return what stands before an id, with the option `global_keyprefix` joined as Celery does."""
    joint = "" if not global_keyprefix or global_keyprefix[-1] in ":_-." else "_"
    return f"{global_keyprefix}{joint}{kind}"


def plain_or_hashed(task_id: str, plain: Pattern[str]) -> str:
    """Return `task_id` where all of it matches `plain`, else its hash: ``sha256-<64 digits>``.

    Celery keeps no result under such an id in such a store, so nobody else looks for the key.
    """
    if plain.fullmatch(task_id) and not task_id.startswith(HASHED):
        return task_id
    return HASHED + hashlib.sha256(task_id.encode("utf-8", "surrogatepass")).hexdigest()


def describe(body: bytes) -> Tuple[str, str, str]:
    """Return ``(state, content_type, content_encoding)`` of an encoded meta, compressed or not.

    Nothing is decoded but JSON.  Raises `DecodeError` for bytes which are no meta.
    """
    found = _JSON.match(body)
    if found is not None:
        return _text(found.group(1), body), "application/json", "utf-8"
    if body.startswith(_COMPRESSED):
        return describe(unwrap(body))
    if body[:1] == b"\x80":
        found = _PICKLE.match(body)
        if found is not None:
            size = int.from_bytes(found.group(1) or found.group(2), "little")
            state = _text(body[found.end() : found.end() + size], body)
            return state, "application/x-python-serialize", "binary"
    else:
        found = _MSGPACK.match(body)
        if found is not None:
            size = found.group(1)[0] & 0x1F if found.group(1) else found.group(2)[0]
            return _text(body[found.end() : found.end() + size], body), "application/x-msgpack", "binary"
        state_in_json = _status_in_json(body)
        if state_in_json is not None:
            return state_in_json, "application/json", "utf-8"
        found = _YAML.search(body)
        if found is not None:
            return _text(found.group(1), body), "application/x-yaml", "utf-8"
    raise _no_meta(body)


def readable_state(body: bytes, task_id: str) -> Optional[str]:
    """Return the state of what is stored already; None, and a warning, where it is no result."""
    try:
        return describe(body)[0]
    except DecodeError as error:
        logger.warning("What is stored for task %s is no result, it is replaced: %s", task_id, error)
        return None


def unwrap(value: bytes) -> bytes:
    """Return the encoded meta as its serializer wrote it: `value`, or what is compressed in it.

    Raises `DecodeError`, also for a compression that is not known or not installed here.
    """
    if not value.startswith(_COMPRESSED):
        return value
    start = len(_COMPRESSED)
    end = value.find(b"\0", start, start + _MAX_TYPE_BYTES)
    plain = b"" if end < 0 else decompress(value[end + 1 :], value[start:end].decode("ascii", "replace"))
    # Once is enough: what is compressed again and again is nobody's result.
    if end < 0 or plain.startswith(_COMPRESSED):
        raise _no_meta(value)
    return plain


def _status_in_json(body: bytes) -> Optional[str]:
    """Read JSON whose writer had another order, or other letters, than Celery."""
    if body.lstrip()[:1] != b"{":
        return None
    try:
        meta = json.loads(body)
    except (ValueError, RecursionError):
        return None
    state = meta.get("status")
    return state if isinstance(state, str) and state else None


def _text(name: bytes, body: bytes) -> str:
    try:
        state = name.decode("utf-8")
    except UnicodeDecodeError:
        raise _no_meta(body) from None
    if not state:
        raise _no_meta(body)
    return state


def _no_meta(body: bytes) -> DecodeError:
    return DecodeError(f"{len(body)} bytes are no result meta; they begin {bytes(body[:_EXCERPT_BYTES])!r}")

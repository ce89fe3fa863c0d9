# SPDX-License-Identifier: MIT
"""What stored values say about themselves: state and content type, found without loading anything."""

from __future__ import annotations

import base64
import json
import pickle
import random
import re
from typing import Any, Dict

import pytest

from miniq.backends.stored import describe, key_prefix, plain_or_hashed, readable_state, unwrap
from miniq.exceptions import DecodeError
from miniq.serialization import compress

#: Written by Celery 5.7 with result_compression=gzip, and with result_serializer=pickle.
COMPRESSED = base64.b64decode(
    "AGNlbGVyeS1jb21wcmVzc2VkAGFwcGxpY2F0aW9uL3gtZ3ppcAB4nKtWKi5JLCktVrJSUAoOdXZ2DQ5W0lFQKkotLs0pAQkmjgKiASjkSooS"
    "k1OTEpOzgYGXV5qTAxRKzsjMSSlKzQOKRMcC+SmJJanxKfl5qaDwNTIwMtM1NNQ1MgwxMLMyNLUyMNEzNDMyNjHVNjCwMjAAm5lYnB2fmQJSbgAF"
    "umDCBERYwLhQYKhUCwAOvJ1J"
)
PICKLED = base64.b64decode(
    "gASVqgAAAAAAAAB9lCiMBnN0YXR1c5SMB1NVQ0NFU1OUjAZyZXN1bHSUfZSMAWGUXZQoSwFLAmVzjAl0cmFjZWJhY2uUTowIY2hpbGRyZW6UXZSM"
    "CWRhdGVfZG9uZZSMIDIwMjYtMTEtMjFUMDY6MTQ6NTYuNjY5NTU4KzAwOjAwlIwHdGFza19pZJSMJDAwMDAwMDAwLTAwMDAtNDAwMC04MDAwLTAw"
    "MDAwMDAwMDAwMZR1Lg=="
)
JSON, PICKLE = ("application/json", "utf-8"), ("application/x-python-serialize", "binary")


def meta(state: str = "SUCCESS", **more: Any) -> Dict[str, Any]:
    return {"status": state, "result": None, "traceback": None, "children": [], **more}


@pytest.mark.parametrize(
    ("body", "state", "kind"),
    [
        (json.dumps(meta()).encode(), "SUCCESS", JSON),
        (json.dumps(meta("Halb fertig")).encode(), "Halb fertig", JSON),
        (json.dumps(meta("Löscht")).encode(), "Löscht", JSON),
        (json.dumps(meta('"')).encode(), '"', JSON),
        (b' {\n "status" : "RETRY"}\n', "RETRY", JSON),
        (b'{"result": {"status": "FAILURE"}, "status": "STARTED"}', "STARTED", JSON),
        (b'{"status":"STARTED"', "STARTED", JSON),
        (PICKLED, "SUCCESS", PICKLE),
        *((pickle.dumps(meta("PROGRESS"), version), "PROGRESS", PICKLE) for version in range(2, 6)),
        (pickle.dumps(meta("ä" * 300)), "ä" * 300, PICKLE),
        (pickle.dumps(meta(result="x" * 100_000)), "SUCCESS", PICKLE),
        (b"\x85\xa6status\xa7SUCCESS\xa6result\xc0", "SUCCESS", ("application/x-msgpack", "binary")),
        (b"\xde\0\x10\xd9\x06status\xd9\x20" + b"X" * 32, "X" * 32, ("application/x-msgpack", "binary")),
        (b"children: []\nresult: null\nstatus: FAILURE\n", "FAILURE", ("application/x-yaml", "utf-8")),
        (b"result: |\n  status: STARTED\nstatus: 'NO'\n", "NO", ("application/x-yaml", "utf-8")),
    ],
)
def test_state_and_content_type_are_found_in_the_body(body: bytes, state: str, kind: Any) -> None:
    assert describe(body) == (state, *kind)


@pytest.mark.parametrize("name", ["gzip", "bzip2", "lzma"])
def test_compressed_value_is_described_and_unwrapped(name: str) -> None:
    body = json.dumps(meta("FAILURE")).encode()
    packed, content_type = compress(body, name)
    value = b"\0celery-compressed\0" + content_type.encode() + b"\0" + packed
    assert describe(value) == ("FAILURE", *JSON)
    assert unwrap(value) == body
    assert unwrap(body) is body


def test_what_celery_compressed_is_read() -> None:
    assert describe(COMPRESSED) == ("SUCCESS", *JSON)
    assert json.loads(unwrap(COMPRESSED))["status"] == "SUCCESS"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"status": 1}',
        b'{"status": ""}',
        b'{"status": "\xff"}',
        b"{" * 100_000,
        pickle.dumps({}),
        pickle.dumps({"result": 1, "status": "SUCCESS"}),
        b"\x80\x04}(\x8c\x06status\x8c\x00",
        b"\x81\xa6status",
        b"\0celery-compressed\0",
        b"\0celery-compressed\0application/x-gzip\0nonsense",
        b"\0celery-compressed\0application/x-nobody-knows\0" + b"{}",
        b"\0celery-compressed\0" + b"x" * 1000,
    ],
)
def test_what_is_no_meta_is_refused(body: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DecodeError):
        describe(body)
    assert readable_state(body, "one") is None
    assert "What is stored for task one is no result, it is replaced" in caplog.text


def test_values_compressed_again_and_again_are_not_unpacked_further() -> None:
    value = json.dumps(meta()).encode()
    for _ in range(2):
        packed, content_type = compress(value, "gzip")
        value = b"\0celery-compressed\0" + content_type.encode() + b"\0" + packed
    with pytest.raises(DecodeError, match="no result meta"):
        unwrap(value)


def test_garbage_gives_decode_errors_only() -> None:
    seed = random.randrange(10**9)
    chance = random.Random(seed)
    samples = [COMPRESSED, PICKLED, json.dumps(meta()).encode(), b"\x85\xa6status\xa7SUCCESS", b"status: A\n"]
    for _ in range(3000):
        body = bytearray(chance.choice(samples))
        for _ in range(chance.randrange(1, 4)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        del body[chance.randrange(1, len(body) + 1) :]
        try:
            state, _, _ = describe(bytes(body))
        except DecodeError:
            continue
        assert state, f"seed {seed}: {bytes(body)!r}"


def test_pickle_is_never_loaded() -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return pytest.fail, ("the pickle was loaded",)

    assert describe(pickle.dumps(meta(result=Trap()))) == ("SUCCESS", *PICKLE)


@pytest.mark.parametrize(
    ("option", "prefix"),
    [
        ("", "celery-task-meta-"),
        ("res", "res_celery-task-meta-"),
        ("res_", "res_celery-task-meta-"),
        ("res:", "res:celery-task-meta-"),
    ],
)
def test_global_key_prefix_is_joined_as_celery_does(option: str, prefix: str) -> None:
    assert key_prefix(option) == prefix


def test_id_that_a_key_cannot_hold_is_hashed_and_never_meets_another() -> None:
    plain = re.compile("[a-z0-9-]+")
    assert plain_or_hashed("some-id", plain) == "some-id"
    hashed = plain_or_hashed("Ü/..", plain)
    assert re.fullmatch("sha256-[0-9a-f]{64}", hashed)
    assert plain_or_hashed(hashed, plain) != hashed
    assert plain_or_hashed("\ud800", plain).startswith("sha256-")

# SPDX-License-Identifier: MIT
"""The pieces that the end of a run is made of, where it is part of a workflow; see `runner.Ends`."""

from __future__ import annotations

from typing import Any, Dict, Iterator, Mapping, Optional

from .algebra import as_list, kind_of
from .plan import ChordStart
from .runner import Part, Start
from .serialization import dumps
from .task import Context


def encode_start(start: ChordStart, expires_s: Optional[float]) -> Start:
    """Return a chord as it is told to the result store."""
    return (start.group_id, start.size, dumps(start.body, "json")[2], expires_s)


def part_of(request: Context, state: str, value: Any, serializer: str, expires_s: Optional[float]) -> Part:
    """Return what a member of a chord came to; raises `EncodeError` for a value that cannot be written."""
    entry = dumps([1, request.id, state, value], serializer)[2]
    encoded = encode_body(request.chord, request.root_id)
    return (request.group or "", request.group_index, request.id or "", entry, expires_s, encoded)


def encode_body(body: Mapping[str, Any], root_id: Optional[str]) -> bytes:
    """Return the body of a chord, with the root of its workflow, as it is told to the result store."""
    if root_id and not (body.get("options") or {}).get("root_id"):
        body = {**body, "options": {**(body.get("options") or {}), "root_id": root_id}}
    return dumps(body, "json")[2]


def never_sent(sig: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield every task of a frozen signature that will not be sent now."""
    kind, kwargs = kind_of(sig), sig.get("kwargs") or {}
    if kind == "chord":
        header = kwargs["header"]
        for one in header if isinstance(header, (list, tuple)) else [header]:
            yield from never_sent(one)
        yield from never_sent(kwargs["body"])
    elif kind is not None:
        for one in kwargs["tasks"]:
            yield from never_sent(one)
    else:
        yield sig


def context_of(sig: Mapping[str, Any], request: Context) -> Context:
    """Return the request that a step would have had which comes after `request`, or in its place."""
    options: Dict[str, Any] = sig.get("options") or {}
    get = options.get
    return Context(
        id=get("task_id"),
        task=sig["task"],
        args=list(sig.get("args") or ()),
        kwargs=sig.get("kwargs") or {},
        ignore_result=get("ignore_result"),
        reply_to=get("reply_to") or request.reply_to,
        root_id=get("root_id") or request.root_id,
        parent_id=get("parent_id") or request.parent_id,
        group=get("group_id"),
        group_index=get("group_index"),
        chord=get("chord"),
        chain=get("chain"),
        errbacks=as_list(get("link_error")),
        hostname=request.hostname,
    )

# SPDX-License-Identifier: MIT
"""What follows the header of a chord: its body, or the failure of everything that was to come.

Decided by whoever has all entries ``[1, task_id, state, result]`` of the members, in their order.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

from . import states
from .algebra import GATHERED, kind_of
from .exceptions import ChordError, MiniqError
from .flow import context_of, never_sent
from .log import get_logger
from .runner import Ends
from .serialization import exception_from_dict, exception_to_dict, loads
from .task import Context
from .text import safe_repr
from .trace import TaskRunner

logger = get_logger(__name__)

_JSON = frozenset({"application/json"})


def decode_body(encoded: bytes) -> Mapping[str, Any]:
    """Return a body as the result store has it."""
    body: Mapping[str, Any] = loads(encoded, "application/json", "utf-8", _JSON)
    return body


def body_of(
    app: Any,
    runner: TaskRunner,
    group_id: str,
    parent_id: Any,
    body: Mapping[str, Any],
    entries: List[bytes],
    saved: Optional[bytes] = None,
) -> Ends:
    """Return what follows a header of which all have ended; `parent_id` is the member that ended last.

    `saved` is the header as a saved group, if there is one: see `_nested`.
    """
    root_id = (body.get("options") or {}).get("root_id")
    request = Context(id=group_id, root_id=root_id, parent_id=parent_id, hostname=runner.hostname)
    ends = Ends()
    try:
        members = list(_members(app, entries))
        values = [value for _, value in members] if saved is None else _nested(app, members, saved)
        runner.start_workflow(body, (values,), {}, root_id, parent_id or group_id, request, ends)
    except ChordError as error:
        return failure_of(app, runner, request, body, error)
    except (MiniqError, TypeError, ValueError) as error:
        logger.error("Chord %s: its body cannot be sent: %s", group_id, error)
        return failure_of(app, runner, request, body, ChordError(f"the body cannot be sent: {error}"))
    return ends


def _members(app: Any, entries: List[bytes]) -> Iterator[Tuple[str, Any]]:
    """Yield ids and results; `ChordError` for the first member that failed."""
    for entry in entries:
        _, task_id, state, value = app.loads_result(entry)[:4]
        if state in states.PROPAGATE_STATES:
            error = exception_from_dict(value) if isinstance(value, dict) else value
            raise ChordError(f"Dependency {task_id} raised {safe_repr(error, 1000)}")
        yield task_id, value


def _nested(app: Any, members: List[Tuple[str, Any]], saved: bytes) -> List[Any]:
    """Return the results as they are nested in the saved header, those that are not in it last.

    Celery saves a header whose members end in groups: each of those tasks counts there, and the values of
    a group are a list.
    """
    left = dict(members)
    try:
        values = [_nested_value(one, left) for one in app.loads_result(saved)["result"][1]]
    except (MiniqError, TypeError, ValueError, LookupError) as error:
        logger.warning("The header saved with a chord is left aside, it is not what arrived: %r", error)
        return [value for _, value in members]
    return values + list(left.values())


def _nested_value(result: Any, left: Dict[str, Any]) -> Any:
    (task_id, _), members = result
    return left.pop(task_id) if members is None else [_nested_value(one, left) for one in members]


def failure_of(
    app: Any, runner: TaskRunner, request: Context, body: Mapping[str, Any], error: ChordError
) -> Ends:
    """Let everything fail that was to come after the header."""
    ends = Ends()
    cause = exception_to_dict(error)
    for sig in never_sent(body):
        runner.give_up(context_of(sig, request), cause, None, ends)
    for sig in _answerable(body):
        runner.call_errbacks(context_of(sig, request), error, None, ends)
    return ends


def _answerable(sig: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the tasks whose errbacks hear that a body failed: those it begins with, of a chord its body.

    A chord that only gathers the values of a group is that group.
    """
    kind, kwargs = kind_of(sig), sig.get("kwargs") or {}
    if kind == "chord":
        yield from _answerable(kwargs["body"])
        if kwargs["body"]["task"] == GATHERED:
            yield from _answerable(kwargs["header"])
    elif kind == "chain":
        for one in kwargs["tasks"][:1]:
            yield from _answerable(one)
    elif kind == "group":
        for one in kwargs["tasks"]:
            yield from _answerable(one)
    else:
        yield sig

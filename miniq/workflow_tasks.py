# SPDX-License-Identifier: MIT
"""Tasks that every app has, under Celery's names: parts of workflows that are messages of their own.

    celery.map, celery.starmap    one task for each item, one after the other, in one message
    celery.accumulate             its arguments as a list: gathers the members of a group
    celery.chord_unlock           looks after a chord where the result store cannot count its members
    celery.backend_cleanup        deletes expired results
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional

from . import states
from .algebra import as_list
from .canvas import signature
from .chords import body_of, failure_of
from .exceptions import ChordError
from .flow import encode_body
from .result import result_from_tuple
from .resultbase import read_meta
from .runner import Ends
from .serialization import dumps, exception_to_dict
from .task import Context

#: Seconds between two looks of `chord_unlock`, at most.
LONGEST_LOOK_S = 60.0
#: Options of what is never called by people.
_QUIET: Dict[str, Any] = {"ignore_result": True, "max_retries": None}
#: Of one that must not be lost with a worker: it may do its work twice.
_SAFE: Dict[str, Any] = {"acks_late": True, "reject_on_worker_lost": True}


def add_to(app: Any) -> None:
    """Register them."""
    app.task(name="celery.map")(_map(app, False))
    app.task(name="celery.starmap")(_map(app, True))
    app.task(name="celery.accumulate")(accumulate)
    app.task(name="celery.backend_cleanup", ignore_result=True)(lambda: app.backend.expire())
    app.task(name="celery.chord_unlock", bind=True, **_QUIET, **_SAFE)(chord_unlock)


def _map(app: Any, star: bool) -> Any:
    def run(task: Any, it: Any) -> List[Any]:
        called = signature(task, app=app)
        fun = app.tasks[called.task]
        return [fun(*item) if star else fun(item) for item in it]

    return run


def accumulate(*args: Any, index: Optional[int] = None) -> Any:
    """Return the arguments, or one of them."""
    return args if index is None else args[index]


def chord_unlock(
    self: Any,
    group_id: str,
    callback: Any,
    interval: Optional[float] = None,
    max_retries: Optional[int] = None,
    result: Any = None,
    **_: Any,
) -> None:
    """Send the body of a chord when all of its members have ended; look again later until then.

    The pauses grow, and when results are no longer kept the chord has failed: it does not wait for ever.
    """
    app = self.app
    own: Ends = self.request.ends
    if result is None:
        _watch(self, group_id, callback, interval or LONGEST_LOOK_S)
        return
    ids = [result_from_tuple(one, app).id for one in as_list(result)]
    found = app.backend.fetch(ids)
    metas = {task_id: read_meta(stored, app.result_accept) for task_id, stored in found.items()}
    waiting = [task_id for task_id in ids if metas.get(task_id, {}).get("status") not in states.READY_STATES]
    if waiting:
        retries = self.request.retries or 0
        first_s = interval or app.conf.result_chord_retry_interval
        given_up = (max_retries is not None and retries >= max_retries) or _is_over(app, first_s, retries)
        if not given_up:
            raise self.retry(countdown=_pause_s(first_s, retries))
        error = ChordError(f"{len(waiting)} members did not end in time")
        context = Context(id=group_id, hostname=self.request.hostname)
        ends = failure_of(app, app.runner, context, callback, error)
    else:
        kind = app.conf.result_serializer
        entries = [
            dumps([1, task_id, metas[task_id]["status"], metas[task_id]["result"]], kind)[2]
            for task_id in ids
        ]
        ends = body_of(app, app.runner, group_id, None, callback, entries)
    own.followups += ends.followups
    own.starts += ends.starts
    own.results += ends.results
    own.parts += ends.parts


def _watch(self: Any, group_id: str, callback: Any, first_s: float) -> None:
    """Have the worker look at a chord that is counted, until it has ended: nobody else may do that.

    The worker does it when this task is settled, as if a member had come; so the claim is the worker's.
    """
    app, request = self.app, self.request
    if not app.backend.has_chord(group_id):
        return
    retries = request.retries or 0
    is_over = _is_over(app, first_s, retries)
    entry = b""
    if is_over:
        error = ChordError(f"not all of its {callback.get('chord_size')} members ended in time")
        cause = exception_to_dict(error)
        entry = dumps([1, group_id, states.FAILURE, cause], app.conf.result_serializer)[2]
    root_id = request.root_id if request.root_id != request.id else None
    body = encode_body(callback, root_id)
    request.ends.parts.append((group_id, None, "", entry, app.chord_expires_s, body))
    if not is_over:
        raise self.retry(countdown=_pause_s(first_s, retries))


def _is_over(app: Any, first_s: float, looks: int) -> bool:
    """Say whether results are no longer kept that were there at the first of so many looks."""
    patience_s = app.chord_expires_s
    if patience_s is None:
        return False
    return bool(sum(_pause_s(first_s, n) for n in range(min(looks, 2000))) > patience_s)


def _pause_s(first_s: float, looks: int) -> float:
    """Return the seconds until the next look after so many; they grow up to the longest."""
    return min(first_s * 1.2 ** min(looks, 50), max(first_s, LONGEST_LOOK_S))

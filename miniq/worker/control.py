# SPDX-License-Identifier: MIT
"""Remote control, the worker's side: hears commands on its own queue, carries them out and answers.

Its consumer is apart from that of tasks: a worker whose slots are all taken still hears.  Here are
the commands that change something; those that tell something are in `inspection`.  A program adds
its own with `control_command` and `inspect_command`.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Dict, List, Mapping, Optional, Tuple

from ..control import KEPT, exchange_name, keep_revocation, matches, revoke_expires_s
from ..exceptions import BackendError, MiniqError, NotRegistered, OperationalError
from ..log import get_logger
from ..loop import Loop
from ..mailbox import Mailbox
from ..message import Message
from ..pools.base import signal_number
from ..routing import Queue
from ..serialization import dumps, loads
from ..signatures import new_task_id
from ..text import import_module, truncate
from ..transports.base import Consumer, Publication
from . import inspection
from .panel import (
    CommandInfo,
    ControlledWorker,
    Panel,
    control_command,
    inspect_command,
    nok,
    ok,
)

logger = get_logger(__name__)

__all__ = ["CommandInfo", "Commands", "Panel", "control_command", "inspect_command", "inspection"]

#: Larger replies are cut, where they are lists, or refused.
MAX_REPLY_BYTES = 1024 * 1024
#: Seconds a reply may take to be handed to the broker; tasks wait meanwhile.
REPLY_TIMEOUT_S = 1.0
#: Seconds by which clocks may differ before a command whose caller waits no more is taken for one.
CLOCKS_DIFFER_S = 10.0
#: Characters of ids that a reply repeats.
MAX_IDS_CHARS = 10_000


#: What to do about two workers with one name.
NAMESAKE_ADVICE = "Commands to this name reach both; give each worker a name of its own with -n."


class Commands:
    """Carries out what comes in the control queue, in the worker's loop."""

    def __init__(self, worker: ControlledWorker, loop: Loop, consumer: Consumer) -> None:
        self.worker = worker
        self.loop = loop
        self.mailbox = Mailbox(loop, consumer, self._carry_out)
        #: Tells what was sent here from what a namesake has sent.
        self._sender = new_task_id()
        self._met_namesake = False

    def start(self) -> None:
        """Begin to listen."""
        self.mailbox.start()
        self._call_namesakes()

    def close(self) -> None:
        """Stop listening; the queue goes with its worker."""
        self.mailbox.close()

    def _carry_out(self, message: Message) -> None:
        worker = self.worker
        try:
            body = loads(message.body, message.content_type, message.content_encoding, worker.app.accept)
            if not isinstance(body, dict) or not isinstance(body.get("method"), str):
                raise ValueError(f"no method: {body!r:.200}")
            heard = message.headers.get("clock")
            if isinstance(heard, int):
                worker.app.clock.adjust(heard)
            if not addressed(worker.hostname, body):
                return
        except (MiniqError, ValueError, TypeError) as error:
            logger.error("A control message cannot be read and is dropped: %s", error)
            return
        name, reply_to = body["method"], body.get("reply_to")
        late_s = self._late_s(message)
        if reply_to and late_s > CLOCKS_DIFFER_S:
            text = "Control command %s came %.1f s after its caller stopped waiting, and is not carried out"
            logger.warning(text, name, late_s)
            return
        self._meet(message.headers, name, body.get("arguments"))
        value = self.call(name, body.get("arguments") or {})
        is_done = isinstance(value, dict) and "ok" in value
        if name in ("revoke", "terminate") and is_done and not message.headers.get(KEPT):
            self._keep_revocation(body)
        if reply_to and value is not NO_REPLY:
            self._reply(name, reply_to, body.get("ticket"), value)

    def _call_namesakes(self) -> None:
        """Say our name to those who have the same."""
        worker = self.worker
        app, node = worker.app, worker.hostname
        body = {
            "method": "hello",
            "arguments": {"from_node": node},
            "destination": [node],
            "pattern": None,
            "matcher": None,
        }
        headers = {"clock": app.clock.forward(), "expires": 0, "sender": self._sender}
        try:
            content_type, encoding, data = dumps(body, app.conf.task_serializer)
            message = Message(data, content_type, encoding, headers, {"delivery_mode": 1})
            worker.transport.publish((Publication(message, exchange_name(app), ""),), REPLY_TIMEOUT_S)
        except MiniqError as error:
            logger.debug("namesakes are not looked for: %s", error)

    def _meet(self, headers: Mapping[str, Any], name: str, arguments: Any) -> None:
        """Warn once when somebody else says that he has our name, and let him know the same."""
        node = self.worker.hostname
        if name != "hello" or self._met_namesake or headers.get("sender") == self._sender:
            return
        if isinstance(arguments, dict) and arguments.get("from_node") == node:
            self._met_namesake = True
            logger.warning("Another worker is called %s, too. %s", node, NAMESAKE_ADVICE)
            self._call_namesakes()

    def _keep_revocation(self, body: Mapping[str, Any]) -> None:
        """Have a revocation by a client of Celery's hold as one of ours does: for all workers to come."""
        worker = self.worker
        if body.get("destination") is not None or body.get("pattern") is not None:
            return
        given = (body.get("arguments") or {}).get("task_id")
        running = {request.id for request in worker.tasks.running.values()}
        ids = [given] if isinstance(given, str) else [str(one) for one in given or ()]
        ids = [one for one in ids if one not in running]
        # Over rpc:// results go to who sent the task, and that is not known here.
        backend = worker.backend if worker.backend.is_shared else None
        try:
            keep_revocation(worker.app, worker.transport, backend, ids)
        except (OperationalError, BackendError) as error:
            logger.warning("Revoked ids are known to this worker alone: %s", error)

    def _late_s(self, message: Message) -> float:
        expires = message.headers.get("expires")
        if not isinstance(expires, (int, float)) or expires <= 0:
            return 0.0
        return self.loop.now() - expires

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Carry a command out; return what is to be answered."""
        handler = Panel.data.get(name)
        if handler is None:
            logger.error("No such control command: %r", name)
            return nok(repr(KeyError(name)))
        try:
            value = handler(self.worker, **arguments)
        except Exception as error:  # safety net: a command must not stop the worker; its caller is told
            logger.exception("Control command %s(%r) failed", name, arguments)
            return nok(repr(error))
        if isinstance(value, dict) and set(value) == {"error"}:
            logger.error("Control command %s(%r) failed: %s", name, arguments, value["error"])
        return value

    def _reply(self, name: str, reply_to: Any, ticket: Any, value: Any) -> None:
        worker = self.worker
        app = worker.app
        try:
            exchange, routing_key = reply_to["exchange"], reply_to["routing_key"]
            encoded, left_out = encode_reply(worker.hostname, value, app.conf.task_serializer)
            headers: Dict[str, Any] = {"ticket": ticket, "clock": app.clock.forward()}
            if left_out:
                headers["left_out"] = left_out
                logger.warning("The reply to %s is too large: %d entries are left out", name, left_out)
            content_type, encoding, body = encoded
            message = Message(body, content_type, encoding, headers, {"delivery_mode": 1})
            worker.transport.publish((Publication(message, exchange, routing_key),), REPLY_TIMEOUT_S)
        except (MiniqError, TypeError, KeyError) as error:
            logger.warning("The reply to control command %s cannot be sent: %s", name, error)


class _NoReply:
    """What a command returns to which nobody shall get an answer, though one was asked for."""


NO_REPLY = _NoReply()


def encode_reply(node: str, value: Any, serializer: str) -> Tuple[Tuple[str, str, bytes], int]:
    """Return ``(content type, encoding, bytes)`` of ``{node: value}``, and how many entries it lacks.

    A list that makes too much is cut; anything else, or what cannot be encoded, is replaced by an error.
    Errors are told as JSON: the serializer itself may be what is missing here.
    """
    left_out, has_failed = 0, False
    while True:
        try:
            encoded = dumps({node: value}, serializer)
        except MiniqError as error:
            if has_failed:
                raise
            has_failed = True
            value, left_out, serializer = nok(truncate(repr(error), 1000)), 0, "json"
            continue
        size = len(encoded[2])
        if size <= MAX_REPLY_BYTES:
            return encoded, left_out
        if isinstance(value, list) and len(value) > 1:
            keep = max(1, len(value) * MAX_REPLY_BYTES // size * 9 // 10)
            left_out += len(value) - keep
            value = value[:keep]
        else:
            value, left_out = nok(f"the reply has {size} bytes, more than {MAX_REPLY_BYTES}"), 0


def addressed(hostname: str, body: Mapping[str, Any]) -> bool:
    """Say whether a command is meant for the worker called `hostname`; `ValueError` for a bad pattern."""
    destination, pattern = body.get("destination"), body.get("pattern")
    if isinstance(destination, str):  # not what Celery sends; part of a name is not meant
        return hostname == destination
    if destination is not None:
        return hostname in destination
    return pattern is None or matches(hostname, pattern, body.get("matcher"))


# -- tasks ---------------------------------------------------------------------------------------


@control_command(variadic="task_id", signature="<id1> [id2 [... [idN]]]")
def revoke(
    state: ControlledWorker, task_id: Any, terminate: bool = False, signal: Optional[str] = None, **_: Any
) -> Dict[str, str]:
    """Do not start tasks, by their ids; with terminate, stop those that run."""
    ids = [task_id] if isinstance(task_id, str) else [str(one) for one in task_id]
    if terminate:
        signal_number(signal or "SIGTERM")  # a wrong name is said whether the task runs here or not
    until = state.app.wall() + revoke_expires_s()
    stopped: List[str] = state.tasks.revoke(ids, until, bool(terminate), signal or "SIGTERM")
    if terminate:
        return ok(f"terminate: {', '.join(stopped) or 'tasks unknown'}")
    told = truncate(", ".join(map(repr, sorted(set(ids)))), MAX_IDS_CHARS)
    return ok(f"tasks {{{told}}} flagged as revoked")


@control_command(args=[("signal", str)], variadic="task_id", signature="<signal> <id1> [id2 [... [idN]]]")
def terminate(state: ControlledWorker, signal: str, task_id: Any, **_: Any) -> Dict[str, str]:
    """Stop tasks where they run, by their ids, with a signal."""
    return revoke(state, task_id, terminate=True, signal=signal)


@control_command(variadic="headers", signature="<key1=value1> [key2=value2 [... [keyN=valueN]]]")
def revoke_by_stamped_headers(
    state: ControlledWorker, headers: Any, terminate: bool = False, signal: Optional[str] = None, **_: Any
) -> Dict[str, str]:
    """Do not start tasks with one of these stamps; with terminate, stop those that run."""
    if not isinstance(headers, Mapping):
        headers = _stamps_from_words(headers)
    until = state.app.wall() + revoke_expires_s()
    stopped = state.tasks.revoke_by_stamps(headers, until, bool(terminate), signal or "SIGTERM")
    if not terminate:
        return ok(f"headers {headers} flagged as revoked, but not terminated")
    return ok(f"headers {stopped} revoked" if stopped else f"headers {headers} were not terminated")


def _stamps_from_words(words: Any) -> Dict[str, List[str]]:
    found: Dict[str, List[str]] = {}
    for word in words:
        key, equals, value = str(word).partition("=")
        if not equals:
            raise ValueError(f"a stamp is written key=value, not {word!r:.100}")
        found.setdefault(key, []).append(value)
    return found


@control_command(
    args=[("task_name", str), ("rate_limit", str)],
    signature="<task_name> <rate_limit (e.g., 5/s | 5/m | 5/h)>",
)
def rate_limit(state: ControlledWorker, task_name: str, rate_limit: Any, **_: Any) -> Dict[str, str]:
    """Change the rate limit of a task."""
    try:
        state.tasks.admission.set_rate_limit(task_name, rate_limit)
    except NotRegistered:
        return nok("unknown task")
    except ValueError as error:
        return nok(f"Invalid rate limit string: {error!r}")
    # What runs meanwhile has its policy; this is what `registered` tells.
    state.app.tasks[task_name].rate_limit = rate_limit
    if not rate_limit or rate_limit == "0":
        return ok("rate limit disabled successfully")
    return ok("new rate limit set successfully")


@control_command(
    args=[("task_name", str), ("soft", float), ("hard", float)],
    signature="<task_name> <soft_secs> [hard_secs]",
)
def time_limit(
    state: ControlledWorker,
    task_name: str,
    hard: Optional[float] = None,
    soft: Optional[float] = None,
    **_: Any,
) -> Dict[str, str]:
    """Change the time limits (seconds) of a task."""
    for limit in (soft, hard):
        if limit is not None and not 0 <= limit < float("inf"):
            return nok(f"a time limit is a number of seconds from 0 up, not {limit!r:.100}")
    try:
        state.tasks.admission.set_time_limit(task_name, soft, hard)
    except NotRegistered:
        return nok("unknown task")
    task = state.app.tasks[task_name]
    task.soft_time_limit, task.time_limit = soft, hard
    return ok("time limits set successfully")


# -- queues --------------------------------------------------------------------------------------


@control_command(
    args=[("queue", str), ("exchange", str), ("exchange_type", str), ("routing_key", str)],
    signature="<queue> [exchange [type [routing_key]]]",
)
def add_consumer(
    state: ControlledWorker,
    queue: str,
    exchange: Optional[str] = None,
    exchange_type: Optional[str] = None,
    routing_key: Optional[str] = None,
    **options: Any,
) -> Dict[str, str]:
    """Consume from one more queue."""
    table = state.app.router.queues
    is_plain = exchange is None and (exchange_type or "direct") == "direct" and routing_key is None
    if queue in table or (is_plain and not options):
        found = table[queue]
    else:
        given = {"exchange": exchange or queue, "exchange_type": exchange_type or "direct", **options}
        found = Queue.from_dict(queue, {**given, "routing_key": routing_key})
    state.add_queue(found)
    return ok(f"add consumer {queue}")


@control_command(args=[("queue", str)], signature="<queue>")
def cancel_consumer(state: ControlledWorker, queue: str, **_: Any) -> Dict[str, str]:
    """Stop consuming from a queue."""
    state.cancel_queue(queue)
    return ok(f"no longer consuming from {queue}")


# -- the pool ------------------------------------------------------------------------------------


@control_command(args=[("n", int)], signature="[N=1]")
def pool_grow(state: ControlledWorker, n: int = 1, **_: Any) -> Dict[str, str]:
    """Add slots."""
    _resize(state, int(n))
    return ok("pool will grow")


@control_command(args=[("n", int)], signature="[N=1]")
def pool_shrink(state: ControlledWorker, n: int = 1, **_: Any) -> Dict[str, str]:
    """Take slots away."""
    _resize(state, int(n), shrink=True)
    return ok("pool will shrink")


def _resize(state: ControlledWorker, n: int, shrink: bool = False) -> None:
    if n < 0:
        raise ValueError(f"n is a number of slots from 0 up, not {n}")
    size = state.pool.size
    if shrink:
        state.pool.shrink(n)
        n = -n
    else:
        state.pool.grow(n)
    if state.autoscale:
        # So that it is not undone at once.
        most, least = state.autoscale
        state.autoscale = (max(most, size + n), least) if n >= 0 else (most, min(least, max(1, size + n)))


@control_command(args=[("max", int), ("min", int)], signature="[max [min]]")
def autoscale(
    state: ControlledWorker, max: Optional[int] = None, min: Optional[int] = None, **_: Any  # noqa: A002
) -> Dict[str, str]:
    """Change the bounds between which the pool grows and shrinks."""
    if not state.autoscale:
        raise ValueError("Autoscale not enabled")
    most = state.autoscale[0] if max is None else int(max)
    least = state.autoscale[1] if min is None else int(min)
    if not 0 <= least <= most or most < 1:
        raise ValueError(f"max={most} min={least}: the least must not be over the most, nor that under 1")
    state.autoscale = (most, least)
    if state.pool.size > most:
        state.pool.shrink(state.pool.size - most)
    return ok(f"autoscale now max={most} min={least}")


@control_command
def pool_restart(
    state: ControlledWorker,
    modules: Optional[List[str]] = None,
    reload: bool = False,
    reloader: Any = None,
    **_: Any,
) -> Dict[str, str]:
    """Import modules, or import them again, and replace the pool's processes."""
    if not state.app.conf.worker_pool_restarts:
        raise ValueError("Pool restarts not enabled")
    if not state.pool.has_processes:
        raise ValueError(f"the pool {type(state.pool).__name__} has no processes to replace")
    conf = state.app.conf
    for name in [*conf.imports, *conf.include] if modules is None else modules:
        if name not in sys.modules:
            import_module(name)
        elif reload:
            importlib.reload(sys.modules[name])
    state.pool.restart()
    return ok("reload started")


# -- events and the whole ------------------------------------------------------------------------


@control_command
def enable_events(state: ControlledWorker, **_: Any) -> Dict[str, str]:
    """Send events of tasks."""
    return ok("task events enabled" if state.events.enable() else "task events already enabled")


@control_command
def disable_events(state: ControlledWorker, **_: Any) -> Dict[str, str]:
    """Send no events of tasks."""
    return ok("task events disabled" if state.events.disable() else "task events already disabled")


@control_command
def heartbeat(state: ControlledWorker, **_: Any) -> None:
    """Send a heartbeat event at once."""
    state.events.heartbeat()


@control_command(visible=False)
def election(
    state: ControlledWorker, id: str, topic: str, action: Any = None, **_: Any  # noqa: A002 - Celery's
) -> None:
    """Leave elections to Celery's workers, which gossip."""
    logger.warning("Election %r on %r: workers of miniq take no part, only Celery's do", id, topic)


@control_command
def shutdown(state: ControlledWorker, msg: str = "remote control", **_: Any) -> Any:
    """Finish what runs and leave; there is no reply."""
    state.stop("warm", str(msg)[:200])
    return NO_REPLY

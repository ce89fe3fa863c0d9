# SPDX-License-Identifier: MIT
"""Remote control, the sender's side: commands to all workers, or to those that are named.

A command is one message on the fanout exchange ``celery.pidbox``; every worker has a queue bound to
it.  Body (Celery's form, the last two only where a reply is wanted)::

    {"method": name, "arguments": {...}, "destination": [node, ...] or None,
     "pattern": text or None, "matcher": "glob" or "pcre" or None,
     "ticket": id, "reply_to": {"exchange": "reply.celery.pidbox", "routing_key": id}}

Each worker that is meant sends one reply, ``{node: value}`` with the ticket in its headers, to the
direct exchange.  The caller's queue is made before the command is sent and goes when it has waited;
if the caller dies, it expires.

Source: what Celery's workers and clients were seen to send (kombu's pidbox).
"""

from __future__ import annotations

import fnmatch
import os
import re
import time
import warnings
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, Mapping, Optional, Union

from . import _state, states
from .backends.base import Backend
from .connection import Connection
from .exceptions import DuplicateNodenameWarning, ImproperlyConfigured, MiniqError, TaskRevokedError
from .log import get_logger
from .mailbox import Inbox
from .message import Message
from .routing import Exchange, Queue
from .serialization import dumps, exception_to_dict, loads
from .signatures import new_task_id
from .task import Context
from .text import safe_repr
from .transports.base import Publication, Transport

logger = get_logger(__name__)

#: Seconds that replies are waited for, unless the caller says otherwise.
TIMEOUT_S = 1.0
#: Seconds a revocation holds, as in Celery's workers; see `revoke_expires_s`.
REVOKE_EXPIRES_S = 10800.0
#: A header: the sender has stored by himself what Celery's clients leave to the workers.
KEPT = "kept"
#: Replies that are kept of one command; a fleet is smaller.
MOST_REPLIES = 10_000
#: States over which a revocation is written at once: the task has not started.
_NOT_STARTED = frozenset({states.PENDING, states.RECEIVED, states.RETRY, states.REJECTED})

Reply = Dict[str, Any]
Headers = Mapping[str, Union[str, Iterable[str]]]


def exchange_name(app: Any) -> str:
    """Return the name of the exchange on which commands go out."""
    return f"{app.conf.control_exchange}.pidbox"


def control_queue(app: Any, node: str, suffix: str = "") -> Queue:
    """Return the queue on which the worker called `node` hears commands.

    With a `suffix` it is another one than that of a second worker which has the same name.
    """
    exchange = Exchange(exchange_name(app), "fanout", durable=False)
    name = f"{node}.{suffix}.{exchange.name}" if suffix else f"{node}.{exchange.name}"
    return _private(app, name, exchange, "")


def reply_queue(app: Any, oid: str) -> Queue:
    """Return the queue for replies to the caller that calls itself `oid`."""
    exchange = Exchange(f"reply.{exchange_name(app)}", "direct", durable=False)
    return _private(app, f"{oid}.{exchange.name}", exchange, oid)


def _private(app: Any, name: str, exchange: Exchange, routing_key: str) -> Queue:
    return Queue(
        name,
        exchange,
        routing_key=routing_key,
        durable=False,
        exclusive=True,
        auto_delete=True,
        expires=app.conf.control_queue_expires,
        message_ttl=app.conf.control_queue_ttl,
        no_ack=True,
    )


def matches(node: str, pattern: str, matcher: Optional[str]) -> bool:
    """Say whether a node name is meant by a pattern: "glob" (default) or "pcre".

    Raises `ValueError` for another matcher, or a pattern that is no regular expression.
    """
    if matcher == "pcre":
        try:
            return re.match(pattern, node) is not None
        except re.error as error:
            raise ValueError(f"pattern {pattern!r:.200} is no regular expression: {error}") from error
    if matcher not in (None, "glob"):
        raise ValueError(f"matcher must be 'glob' or 'pcre', not {matcher!r:.100}")
    return fnmatch.fnmatchcase(node, pattern)


def _refuse_others(connection: Any, channel: Any = None) -> None:
    """Accept what ``app.connection()`` returns, as Celery's programs hand it on; it is not needed."""
    if channel is not None or not (connection is None or isinstance(connection, Connection)):
        raise ImproperlyConfigured(
            "app.control takes connections of app.connection() and no channels, not"
            f" {safe_repr(channel if channel is not None else connection, 200)}; leave them out"
        )


def flatten_reply(replies: Iterable[Reply]) -> Reply:
    """Merge ``[{node: value}, ...]`` into one dict; warns of node names that came twice."""
    found: Reply = {}
    twice = set()
    for reply in replies:
        twice |= found.keys() & reply.keys()
        found.update(reply)
    if twice:
        names = ", ".join(sorted(twice))
        warnings.warn(
            f"Received multiple replies from node {'name' if len(twice) == 1 else 'names'}: {names}."
            " Give each worker a name of its own with -n; of such replies the last one counts.",
            DuplicateNodenameWarning,
            stacklevel=3,
        )
    return found


def revoke_expires_s() -> float:
    """Return how long a revocation holds (seconds): ``CELERY_WORKER_REVOKE_EXPIRES``, or three hours."""
    return number_from_environment("CELERY_WORKER_REVOKE_EXPIRES", REVOKE_EXPIRES_S)


def number_from_environment(name: str, default: float) -> float:
    """Return a number above 0 that the environment sets; raises `ImproperlyConfigured` for another value."""
    text = os.environ.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ImproperlyConfigured(f"environment variable {name}={text!r:.100} is not a number above 0")
    return value


def keep_revocation(app: Any, transport: Transport, backend: Optional[Backend], ids: List[str]) -> None:
    """Let workers to come know of it, and those who wait for tasks that have not started."""
    transport.revoke(ids, app.wall() + revoke_expires_s())
    if backend is None or not backend.enabled:
        return
    known = backend.fetch(ids)
    cause = exception_to_dict(TaskRevokedError("revoked"))
    new = [one for one in ids if one not in known or known[one].state in _NOT_STARTED]
    if new:
        backend.store(
            [
                app.runner.encode(Context(id=one, reply_to=app.thread_oid), states.REVOKED, cause, None)
                for one in new
            ]
        )


class Inspect:
    """Questions to workers; reached as ``app.control.inspect(...)``.

    Each method returns ``{node: answer}``, None when nobody answered; where `destination` is one
    name and not a list of them, that node's answer alone.
    """

    def __init__(
        self,
        destination: Union[str, Iterable[str], None] = None,
        timeout: float = TIMEOUT_S,
        callback: Optional[Callable[[Reply], Any]] = None,
        connection: Any = None,
        app: Any = None,
        limit: Optional[int] = None,
        pattern: Optional[str] = None,
        matcher: Optional[str] = None,
    ) -> None:
        self.app = app if app is not None else _state.current_app()
        self.destination = destination
        self.timeout = timeout
        self.callback = callback
        self.connection = connection
        self.limit = limit
        self.pattern = pattern
        self.matcher = matcher

    def _request(self, command: str, **arguments: Any) -> Any:
        return self._prepare(
            self.app.control.broadcast(
                command,
                arguments,
                destination=self.destination,
                connection=self.connection,
                reply=True,
                timeout=self.timeout,
                limit=self.limit,
                callback=self.callback,
                pattern=self.pattern,
                matcher=self.matcher,
            )
        )

    def _prepare(self, replies: Optional[List[Reply]]) -> Any:
        if not replies:
            return None
        by_node = flatten_reply(replies)
        return by_node.get(self.destination) if isinstance(self.destination, str) else by_node

    def active(self, safe: Optional[bool] = None) -> Any:
        """Return what runs: a list of task infos; with `safe` arguments are reprs."""
        return self._request("active", safe=safe)

    def reserved(self, safe: Optional[bool] = None) -> Any:
        """Return what waits in workers for a free slot."""
        return self._request("reserved")

    def scheduled(self, safe: Optional[bool] = None) -> Any:
        """Return what is held by workers until it is due."""
        return self._request("scheduled")

    def active_queues(self) -> Any:
        """Return the queues that workers consume from, with all their options."""
        return self._request("active_queues")

    def registered(self, *taskinfoitems: str) -> Any:
        """Return the names of the tasks, with these attributes where they are set."""
        return self._request("registered", taskinfoitems=taskinfoitems)

    registered_tasks = registered

    def stats(self) -> Any:
        """Return counts, the pool, the broker, the use of resources."""
        return self._request("stats")

    def revoked(self) -> Any:
        """Return the ids that workers do not start."""
        return self._request("revoked")

    def query_task(self, *ids: Any) -> Any:
        """Return where tasks are: ``{id: [state, info]}``; unknown ids are left out."""
        if len(ids) == 1 and isinstance(ids[0], (list, tuple)):
            ids = tuple(ids[0])
        return self._request("query_task", ids=ids)

    def ping(self, destination: Union[str, Iterable[str], None] = None) -> Any:
        """Return ``{"ok": "pong"}`` of all that live."""
        if destination is not None:
            self.destination = destination
        return self._request("ping")

    def clock(self) -> Any:
        """Return the logical clocks."""
        return self._request("clock")

    def conf(self, with_defaults: bool = False) -> Any:
        """Return the settings; passwords are masked."""
        return self._request("conf", with_defaults=with_defaults)

    def report(self) -> Any:
        """Return what to tell when something is wrong: versions, system, settings."""
        return self._request("report")

    def hello(self, from_node: str, revoked: Optional[Iterable[str]] = None) -> Any:
        """Tell workers of another one; return what they have revoked, and their clocks."""
        return self._request("hello", from_node=from_node, revoked=revoked)

    def memsample(self) -> Any:
        """Return how much memory the workers use, and remember it for `memdump`."""
        return self._request("memsample")

    def memdump(self, samples: int = 10) -> Any:
        """Return the last samples of memory."""
        return self._request("memdump", samples=samples)

    def objgraph(self, type: str = "Request", n: int = 200, max_depth: int = 10) -> Any:  # noqa: A002
        """Draw what refers to objects of a type; needs objgraph where the worker is."""
        return self._request("objgraph", num=n, max_depth=max_depth, type=type)


class Control:
    """Commands to workers; reached as ``app.control``.  May be used from any thread.

    Options of every method, besides `destination` (node names, or one): `reply` True = wait for
    replies and return them, a list of ``{node: value}``; `timeout` seconds to wait at most; `limit`
    so many replies are enough (default: one for each destination); `callback` is called with each
    reply; `pattern` and `matcher` ("glob", "pcre") choose nodes by their names.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    if not TYPE_CHECKING:  # a checker knows what there is

        def __getattr__(self, name: str) -> Any:
            raise _state.missing("app.control", name)

    def broadcast(
        self,
        command: str,
        arguments: Optional[Mapping[str, Any]] = None,
        destination: Union[str, Iterable[str], None] = None,
        connection: Any = None,
        reply: bool = False,
        timeout: Optional[float] = TIMEOUT_S,
        limit: Optional[int] = None,
        callback: Optional[Callable[[Reply], Any]] = None,
        channel: Any = None,
        pattern: Optional[str] = None,
        matcher: Optional[str] = None,
        **more: Any,
    ) -> Optional[List[Reply]]:
        """Send `command` to all workers, or those chosen; see the class.  `more` are arguments, too.

        Returns replies as soon as all destinations have answered, else when `timeout` is over; None
        where none were asked for.  Raises `OperationalError` when the broker cannot be reached.
        """
        _refuse_others(connection, channel)
        if pattern is not None:
            matches("", pattern, matcher)  # what is wrong with it is said here, not in all workers' logs
            matcher = matcher or "glob"
        nodes = [destination] if isinstance(destination, str) else destination
        nodes = None if nodes is None else list(nodes)
        body = {
            "method": command,
            "arguments": {**(arguments or {}), **more},
            "destination": nodes,
            "pattern": pattern,
            "matcher": matcher,
        }
        if not reply:
            # A command that nobody waits for is good as long as a worker's queue keeps it.
            self._send(body, self.app.conf.control_queue_ttl)
            return None
        timeout_s = TIMEOUT_S if timeout is None else float(timeout)
        if limit is None and nodes:
            limit = len(nodes)
        oid, ticket = new_task_id(), new_task_id()
        queue = reply_queue(self.app, oid)
        body["ticket"] = ticket
        body["reply_to"] = {"exchange": queue.exchange.name, "routing_key": oid}
        with Inbox(self.app, queue) as inbox:
            self._send(body, timeout_s)
            return self._collect(inbox, ticket, timeout_s, limit or MOST_REPLIES, callback)

    def _send(self, body: Dict[str, Any], good_for_s: float) -> None:
        app = self.app
        transport = app.producer.transport
        if app.conf.control_exchange != "celery":
            # Only of Celery's own exchanges does a transport know the type beforehand.
            transport.declare(control_queue(app, app.thread_oid), app.conf.task_publish_timeout)
        content_type, encoding, data = dumps(body, app.conf.task_serializer)
        headers = {"clock": app.clock.forward(), "expires": app.wall() + good_for_s, KEPT: True}
        message = Message(data, content_type, encoding, headers, {"delivery_mode": 2})
        publication = Publication(message, exchange_name(app), "")
        transport.publish((publication,), app.conf.task_publish_timeout)

    def _collect(
        self,
        inbox: Inbox,
        ticket: str,
        timeout_s: float,
        limit: int,
        callback: Optional[Callable[[Reply], Any]],
    ) -> List[Reply]:
        until_mono = time.monotonic() + timeout_s
        found: List[Reply] = []
        while len(found) < limit:
            message = inbox.receive(max(0.0, until_mono - time.monotonic()))
            if message is None:
                break
            reply = self._read(message, ticket)
            if reply is not None:
                if callback is not None:
                    callback(reply)
                found.append(reply)
        return found

    def _read(self, message: Message, ticket: str) -> Optional[Reply]:
        """Return a reply; None for one to another question, or that cannot be read."""
        headers = message.headers
        if headers.get("ticket", ticket) != ticket:
            return None
        if isinstance(headers.get("clock"), int):
            self.app.clock.adjust(headers["clock"])
        try:
            reply = loads(message.body, message.content_type, message.content_encoding, self.app.accept)
            if not isinstance(reply, dict):
                raise ValueError(f"not {{node: value}} but {safe_repr(reply, 200)}")
        except (MiniqError, ValueError) as error:
            logger.error("A reply to a control command cannot be read and is left out: %s", error)
            return None
        if headers.get("left_out"):
            text = "The reply of %s was too large: %s entries were left out by the worker"
            logger.warning(text, ", ".join(reply), headers["left_out"])
        return reply

    # -- questions

    @property
    def inspect(self) -> Any:
        """The class of questions, of this app: ``app.control.inspect(destination=..., timeout=...)``."""
        return self.app._cached("Inspect", lambda: _bound_inspect(self.app))

    def ping(
        self,
        destination: Union[str, Iterable[str], None] = None,
        timeout: float = TIMEOUT_S,
        **options: Any,
    ) -> List[Reply]:
        """Return ``[{node: {"ok": "pong"}}, ...]`` of the workers that live."""
        return self.broadcast("ping", {}, destination, reply=True, timeout=timeout, **options) or []

    # -- tasks

    def revoke(
        self,
        task_id: Union[str, Iterable[str]],
        destination: Union[str, Iterable[str], None] = None,
        terminate: bool = False,
        signal: str = "SIGTERM",
        **options: Any,
    ) -> Optional[List[Reply]]:
        """Tell all workers not to run these ids; with `terminate`, stop them where they run.

        Holds even when no worker is up: the broker keeps the revocation for three hours, and a
        task that has not started is REVOKED at once.  With `destination` only those workers hear
        of it, as a command.
        """
        ids: List[str] = [task_id] if isinstance(task_id, str) else [str(one) for one in task_id]
        if destination is None and not options.get("pattern"):
            app = self.app
            keep_revocation(app, app.producer.transport, app.backend, ids)
        arguments = {
            "task_id": task_id if isinstance(task_id, str) else ids,
            "terminate": terminate,
            "signal": signal,
        }
        return self.broadcast("revoke", arguments, destination, **options)

    def terminate(
        self,
        task_id: Union[str, Iterable[str]],
        destination: Union[str, Iterable[str], None] = None,
        signal: str = "SIGTERM",
        **options: Any,
    ) -> Optional[List[Reply]]:
        """Stop these ids where they run; they do not start anywhere else."""
        return self.revoke(task_id, destination, terminate=True, signal=signal, **options)

    def revoke_by_stamped_headers(
        self,
        headers: Headers,
        destination: Union[str, Iterable[str], None] = None,
        terminate: bool = False,
        signal: str = "SIGTERM",
        **options: Any,
    ) -> Optional[List[Reply]]:
        """Tell all workers not to run tasks with one of these stamps: ``{name: value or values}``.

        Held in the memory of workers that are up: those that start later do not know of it.
        """
        stamps = {name: one if isinstance(one, str) else list(one) for name, one in headers.items()}
        arguments = {"headers": stamps, "terminate": terminate, "signal": signal}
        return self.broadcast("revoke_by_stamped_headers", arguments, destination, **options)

    def rate_limit(
        self,
        task_name: str,
        rate_limit: Union[str, float, None],
        destination: Union[str, Iterable[str], None] = None,
        **options: Any,
    ) -> Optional[List[Reply]]:
        """Change the rate limit of a task in running workers; None or 0 = no limit."""
        arguments = {"task_name": task_name, "rate_limit": rate_limit}
        return self.broadcast("rate_limit", arguments, destination, **options)

    def time_limit(
        self,
        task_name: str,
        soft: Optional[float] = None,
        hard: Optional[float] = None,
        destination: Union[str, Iterable[str], None] = None,
        **options: Any,
    ) -> Optional[List[Reply]]:
        """Change the time limits (seconds) of a task in running workers."""
        arguments = {"task_name": task_name, "hard": hard, "soft": soft}
        return self.broadcast("time_limit", arguments, destination, **options)

    # -- queues

    def add_consumer(
        self,
        queue: str,
        exchange: Optional[str] = None,
        exchange_type: str = "direct",
        routing_key: Optional[str] = None,
        options: Optional[Mapping[str, Any]] = None,
        destination: Union[str, Iterable[str], None] = None,
        **more: Any,
    ) -> Optional[List[Reply]]:
        """Make workers consume from one more queue; `options` are those of a queue that is not configured."""
        arguments = {
            "queue": queue,
            "exchange": exchange,
            "exchange_type": exchange_type,
            "routing_key": routing_key,
            **(options or {}),
        }
        return self.broadcast("add_consumer", arguments, destination, **more)

    def cancel_consumer(
        self, queue: str, destination: Union[str, Iterable[str], None] = None, **options: Any
    ) -> Optional[List[Reply]]:
        """Make workers stop consuming from a queue."""
        return self.broadcast("cancel_consumer", {"queue": queue}, destination, **options)

    # -- pools

    def pool_grow(
        self, n: int = 1, destination: Union[str, Iterable[str], None] = None, **options: Any
    ) -> Optional[List[Reply]]:
        """Add `n` slots to each worker."""
        return self.broadcast("pool_grow", {"n": n}, destination, **options)

    def pool_shrink(
        self, n: int = 1, destination: Union[str, Iterable[str], None] = None, **options: Any
    ) -> Optional[List[Reply]]:
        """Take `n` slots from each worker."""
        return self.broadcast("pool_shrink", {"n": n}, destination, **options)

    def autoscale(
        self,
        max: Optional[int],  # noqa: A002 - Celery's names
        min: Optional[int],  # noqa: A002
        destination: Union[str, Iterable[str], None] = None,
        **options: Any,
    ) -> Optional[List[Reply]]:
        """Change the bounds of workers that were started with ``--autoscale``."""
        return self.broadcast("autoscale", {"max": max, "min": min}, destination, **options)

    def pool_restart(
        self,
        modules: Optional[Iterable[str]] = None,
        reload: bool = False,
        reloader: Any = None,
        destination: Union[str, Iterable[str], None] = None,
        **options: Any,
    ) -> Optional[List[Reply]]:
        """Import `modules` in workers (again, with `reload`) and replace their processes.

        Only where the setting `worker_pool_restarts` is on.
        """
        names = None if modules is None else list(modules)
        arguments = {"modules": names, "reload": reload, "reloader": reloader}
        return self.broadcast("pool_restart", arguments, destination, **options)

    # -- events

    def enable_events(
        self, destination: Union[str, Iterable[str], None] = None, **options: Any
    ) -> Optional[List[Reply]]:
        """Make workers send events of tasks."""
        return self.broadcast("enable_events", {}, destination, **options)

    def disable_events(
        self, destination: Union[str, Iterable[str], None] = None, **options: Any
    ) -> Optional[List[Reply]]:
        """Make workers send no events of tasks."""
        return self.broadcast("disable_events", {}, destination, **options)

    def heartbeat(
        self, destination: Union[str, Iterable[str], None] = None, **options: Any
    ) -> Optional[List[Reply]]:
        """Make workers send a heartbeat event at once."""
        return self.broadcast("heartbeat", {}, destination, **options)

    def election(self, id: str, topic: str, action: Any = None, connection: Any = None) -> None:  # noqa: A002
        """Have Celery's workers choose one among them; those of miniq do not take part."""
        self.broadcast("election", {"id": id, "topic": topic, "action": action}, connection=connection)

    # -- the whole

    def shutdown(
        self, destination: Union[str, Iterable[str], None] = None, **options: Any
    ) -> Optional[List[Reply]]:
        """Make workers finish what runs and leave; they do not answer."""
        return self.broadcast("shutdown", {}, destination, **options)

    def purge(self, connection: Any = None) -> int:
        """Delete what waits in the queues that workers of this app consume from; return how many."""
        _refuse_others(connection)
        transport = self.app.producer.transport
        return sum(transport.purge(name) for name in self.app.router.queues.consume_from)

    discard_all = purge


def _bound_inspect(app: Any) -> Any:
    def __init__(self: Inspect, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("app", app)
        Inspect.__init__(self, *args, **kwargs)

    return type("Inspect", (Inspect,), {"__init__": __init__})

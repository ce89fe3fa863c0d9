# SPDX-License-Identifier: MIT
"""From a call to a message in the broker.

Two steps, apart: `Producer.prepare` turns name, arguments and options into a `Publication`
(serialized once, routed), `Producer.publish` hands publications to the broker under one total
deadline.  A task that runs in a worker only prepares its follow-ups; the worker publishes them
together with the task's result.

One transport per thread and process: the object is thread-safe, what it hands out is not shared.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from operator import attrgetter
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from . import _state, signals
from .algebra import as_list
from .backends.base import Backend
from .canvas import check_signatures
from .conf import SETTINGS
from .event import sent_event
from .exceptions import EncodeError, ImproperlyConfigured, OperationalError, UnknownOption
from .message import Message, pack_body, validate_headers
from .routing import Queue, Route, Router
from .serialization import compress, dumps
from .signatures import new_task_id
from .text import nearest, safe_repr
from .times import eta_moment, expires_moment
from .transports.base import Publication, Transport, transport_class

_NUMBER = (int, float)
_TEXT = (str,)
#: Broker properties that may be given as options and travel as they are.
PROPERTY_OPTIONS = frozenset({"message_id", "app_id", "type", "user_id", "cluster_id", "timestamp"})
#: Everything `apply_async` takes besides args and kwargs -> the types it may have, () = any.
CALL_OPTIONS: Dict[str, Tuple[type, ...]] = {
    "countdown": (), "eta": (), "expires": (), "link": (), "link_error": (),
    "chain": (list, tuple), "chord": (dict,),
    "task_id": _TEXT, "root_id": _TEXT, "parent_id": _TEXT, "group_id": _TEXT, "group_index": (int,),
    "shadow": _TEXT, "argsrepr": _TEXT, "kwargsrepr": _TEXT, "reply_to": _TEXT,
    "queue": (), "exchange": (), "routing_key": _TEXT, "priority": (int,), "delivery_mode": (int, str),
    "serializer": _TEXT, "compression": _TEXT, "headers": (dict,),
    "time_limit": _NUMBER, "soft_time_limit": _NUMBER, "ignore_result": (bool,), "retries": (int,),
    "add_to_parent": (bool,), "replaced_task_nesting": (int,), "stamped_headers": (list, tuple),
    "retry": (bool,), "retry_policy": (dict,), "timeout": _NUMBER, "confirm_timeout": _NUMBER, "producer": (),
    **dict.fromkeys(PROPERTY_OPTIONS, ()),
}  # fmt: skip
#: What Celery's apply_async takes and this one does not -> why.
REFUSED_OPTIONS = {
    "connection": "connections are miniq's own; another broker is another app",
    "mandatory": "publishing is always confirmed here",
    "immediate": "brokers have dropped it",
}

#: Attributes of a task that stand for calling options which were not given.
TASK_OPTIONS = (
    "queue", "exchange", "routing_key", "priority", "expires", "serializer", "compression",
    "delivery_mode", "time_limit", "soft_time_limit", "ignore_result",
)  # fmt: skip

_task_options = attrgetter(*TASK_OPTIONS)

#: Milliseconds: RabbitMQ refuses a larger per-message expiration.
MAX_EXPIRATION_MS = 315_360_000_000
_DELIVERY_MODES = {1: 1, 2: 2, "transient": 1, "persistent": 2}


class Prepared(NamedTuple):
    """A message on its way: `queue` is to be declared before (None: an exchange was named)."""

    publication: Publication
    queue: Optional[Queue]
    task_id: str


class Outline(NamedTuple):
    """A call without its ids and arguments; the calls of a task without options share one.

    `attributes` are those of the task that stand for options, `given` these and the call's options,
    `options` the route's as well; `version` is that of the router's queues when it was asked.  Headers
    and properties have all names in their order, None where a call has something of its own.
    """

    attributes: Tuple[Any, ...]
    given: Dict[str, Any]
    router: Router
    version: int
    route: Route
    options: Dict[str, Any]
    headers: Dict[str, Any]
    properties: Dict[str, Any]

    @property
    def is_lasting(self) -> bool:
        """Whether another call may get the same: nothing in it came from the arguments, or the clock."""
        given, headers = self.given, self.headers
        return (
            self.router.tables_only  # a function may decide by the arguments
            and given.get("exchange") is None
            and given.get("routing_key") is None
            and headers["shadow"] == self.route.options.get("shadow")
            and headers["eta"] is None
            and headers["expires"] is None
            and all(value is None or isinstance(value, (str, int, float)) for value in self.attributes)
        )

    def holds_for(self, task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Say whether a call without options would get it again, the settings being what they were."""
        return (
            self.attributes == _task_options(task)
            and self.version == self.router.queues.version
            and task.shadow_name(args, kwargs, dict(self.given)) is None
        )


def check_options(options: Mapping[str, Any]) -> None:
    """Check names and types of calling options.

    Raises `UnknownOption` with the nearest known name, `ImproperlyConfigured` for one of Celery's
    that is not built here, `TypeError` or `ValueError` for a value that cannot be.
    """
    stamps: Any = ()
    for name, value in options.items():
        types = CALL_OPTIONS.get(name)
        if types is None:
            stamps = stamps or as_list(options.get("stamped_headers"))
            if name not in stamps and (name not in REFUSED_OPTIONS or value):
                raise _unknown_option(name)
        elif types and value is not None and not isinstance(value, types):
            words = " or ".join(one.__name__ for one in types)
            raise TypeError(f"calling option {name} must be {words}, not {safe_repr(value, 100)}")


def _unknown_option(name: str) -> Exception:
    if name in REFUSED_OPTIONS:
        return ImproperlyConfigured(f"calling option {name}: {REFUSED_OPTIONS[name]}")
    hint = nearest(name, CALL_OPTIONS)
    return UnknownOption(
        f"unknown calling option {name!r}{f': did you mean {hint!r}?' if hint else ''}"
        " (arguments of the task itself go into args=(...) and kwargs={...})"
    )


def check_limits(hard: Optional[float], soft: Optional[float], what: str) -> None:
    """Raise `ValueError` for time limits (seconds) that cannot be kept."""
    for name, limit in (("time_limit", hard), ("soft_time_limit", soft)):
        if limit is not None and not 0 <= limit < float("inf"):
            raise ValueError(f"{what}: {name} must be a number of seconds, not {limit!r}")
    if hard and soft and soft > hard:
        raise ValueError(f"{what}: soft_time_limit={soft} is never reached, time_limit={hard} is shorter")


def _signatures(value: Any, option: str) -> Optional[List[Any]]:
    found = as_list(value)
    check_signatures(found, option)
    return found or None


class Producer:
    """Builds and publishes the messages of one app.  May be used from any thread."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._local = threading.local()
        #: Transports inherited through a fork: neither used nor closed, only kept from finalizing.
        self._inherited: List[Transport] = []
        self._random = random.Random()

    # -- build

    def prepare(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Dict[str, Any],
        task: Any = None,
    ) -> Prepared:
        """Serialize and route one call; sends `before_task_publish`.

        `options` are those of `Task.apply_async`; what they leave open comes from the task, the
        route, the settings.  Raises `EncodeError`, `QueueNotFound`, what `check_options` raises, and
        `ValueError` for values out of range.
        """
        frame = _state.worker_frame()
        if options or task is None or frame is not None:
            check_options(options)
            outline = self._outline(name, args, kwargs, options, task, frame)
            return self._complete(outline, args, kwargs, frame)
        # The app forgets them when a setting changes.
        outlines: Dict[str, Outline] = self.app._cached("outlines", dict)
        known = outlines.get(name)
        if known is None or not known.holds_for(task, args, kwargs):
            known = self._outline(name, args, kwargs, options, task, None)
            if known.is_lasting:
                outlines[name] = known
        return self._complete(known, args, kwargs, None)

    def _outline(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Dict[str, Any],
        task: Any,
        frame: Optional[_state.Frame],
    ) -> Outline:
        """Route a call and return all of its message in which neither ids nor arguments have a part."""
        app = self.app
        conf = app.conf
        attributes: Tuple[Any, ...] = ()
        if task is not None:
            options = dict(options)
            attributes = _task_options(task)
            for key, value in zip(TASK_OPTIONS, attributes):
                if value is not None and options.get(key) is None:
                    options[key] = value
        given = options
        if task is not None and options.get("shadow") is None:
            options = {**options, "shadow": task.shadow_name(args, kwargs, dict(options))}
        router = app.router
        version = router.queues.version
        route = router.route(options, name, args, kwargs, task)
        if route.options:
            options = {**route.options, **{k: v for k, v in options.items() if v is not None}}
        get = options.get

        eta_text = expires_text = expiration = None
        if get("countdown") is not None or get("eta") is not None or get("expires") is not None:
            now = app.wall()
            eta = eta_moment(get("countdown"), get("eta"), now, app.zone)
            expires = expires_moment(get("expires"), now, app.zone)
            eta_text = eta and eta.text
            if expires is not None:
                expires_text = expires.text
                # A broker would drop it without a word: where others wait for it, a worker has to say so.
                if not get("chord") and not get("chain"):
                    expiration = str(min(max(0, int((expires.epoch - now) * 1000)), MAX_EXPIRATION_MS))

        priority = get("priority")
        if priority is None and frame is not None and conf.task_inherit_parent_priority:
            priority = (frame.request.delivery_info or {}).get("priority")
        if priority is None:
            priority = conf.task_default_priority or 0
        elif not 0 <= priority <= 255:
            raise ValueError(f"priority must be a whole number from 0 to 255, not {priority!r}")
        hard, soft = get("time_limit"), get("soft_time_limit")
        if hard is not None or soft is not None:
            check_limits(hard, soft, f"task {name}")
        ignore_result = get("ignore_result")
        if ignore_result is None and task is not None:  # else the receiver's task decides
            ignore_result = conf.task_ignore_result
        headers: Dict[str, Any] = {
            "lang": "py",
            "task": name,
            "id": None,
            "shadow": get("shadow"),
            "eta": eta_text,
            "expires": expires_text,
            "group": get("group_id"),
            "group_index": get("group_index"),
            "retries": get("retries") or 0,
            "timelimit": None,
            "root_id": None,
            "parent_id": None,
            "argsrepr": None,
            "kwargsrepr": None,
            "origin": None,
            "ignore_result": ignore_result,
            "replaced_task_nesting": get("replaced_task_nesting") or 0,
            "stamped_headers": get("stamped_headers"),
            "stamps": None,
        }
        mode = get("delivery_mode")
        if mode is None:
            mode = conf.task_default_delivery_mode
        if mode not in _DELIVERY_MODES:
            raise ValueError(f"delivery_mode must be 1 (transient) or 2 (persistent), not {mode!r}")
        properties: Dict[str, Any] = {
            "correlation_id": None,
            "reply_to": None,
            "delivery_mode": _DELIVERY_MODES[mode],
            "priority": priority,
        }
        if expiration is not None:
            properties["expiration"] = expiration
        for key in options.keys() & PROPERTY_OPTIONS:
            if options[key] is not None:
                properties[key] = options[key]
        return Outline(attributes, given, router, version, route, options, headers, properties)

    def _complete(
        self, outline: Outline, args: Sequence[Any], kwargs: Mapping[str, Any], frame: Optional[_state.Frame]
    ) -> Prepared:
        """Return the message of one call; what can be changed in it is its own."""
        app = self.app
        conf = app.conf
        route, get, name = outline.route, outline.options.get, outline.headers["task"]
        task_id = get("task_id") or new_task_id()
        root_id, parent_id = get("root_id"), get("parent_id")
        if frame is not None:
            request = frame.request
            root_id = root_id or request.root_id or request.id
            parent_id = parent_id or request.id
        origin, reply_address = app.identity
        stamped, levels = get("stamped_headers"), conf.task_repr_maxlevels
        headers: Dict[str, Any] = {
            **outline.headers,
            "id": task_id,
            "timelimit": [get("time_limit"), get("soft_time_limit")],
            "root_id": root_id or task_id,
            "parent_id": parent_id,
            "argsrepr": get("argsrepr") or safe_repr(args, 1024, levels),
            "kwargsrepr": get("kwargsrepr") or safe_repr(kwargs, 1024, levels),
            "origin": origin,
            "stamps": {key: get(key) for key in stamped} if stamped else {},
        }
        compression = get("compression") or conf.task_compression
        extra = get("headers")
        if extra:
            _add_headers(headers, extra, name)
        properties: Dict[str, Any] = {
            **outline.properties,
            "correlation_id": task_id,
            "reply_to": get("reply_to") or reply_address,
        }
        link, link_error = get("link"), get("link_error")
        callbacks = None if link is None else _signatures(link, "link")
        errbacks = None if link_error is None else _signatures(link_error, "link_error")
        chain = get("chain")
        if chain:
            check_signatures(chain, "chain")
        chord = get("chord")
        if chord:
            check_signatures((chord,), "chord")
        body = pack_body(args, kwargs, callbacks, errbacks, chain, chord)
        if signals.before_task_publish.receivers:
            signals.before_task_publish.send(
                sender=name,
                body=body,
                exchange=route.exchange,
                routing_key=route.routing_key,
                headers=headers,
                properties=properties,
                declare=[route.queue] if route.queue else [],
                retry_policy=get("retry_policy") or conf.task_publish_retry_policy,
            )
        content_type, content_encoding, data = dumps(body, get("serializer") or conf.task_serializer)
        if compression:
            data, headers["compression"] = compress(data, compression)
        message = Message(data, content_type, content_encoding, headers, properties)
        return Prepared(Publication(message, route.exchange, route.routing_key), route.queue, headers["id"])

    # -- publish

    @property
    def transport(self) -> Transport:
        """This thread's transport to the write side of the broker."""
        local = self._local
        pid = os.getpid()
        found: Optional[Transport] = getattr(local, "transport", None)
        if found is not None and local.pid == pid:
            return found
        if found is not None:
            self._inherited.append(found)
        local.transport = transport = self.new_transport(write=True)
        local.pid = pid
        return transport

    def publish(
        self,
        prepared: Prepared,
        retry: Optional[bool] = None,
        retry_policy: Optional[Mapping[str, Any]] = None,
        timeout_s: Optional[float] = None,
        backend: Optional[Backend] = None,
    ) -> None:
        """Publish one message; return when the broker has it.

        `backend` is told before, where it has to do something for the answer.

        Raises `OperationalError` after `task_publish_timeout` (or `timeout_s`) seconds in all, or
        when the retry policy gives up earlier.
        """
        conf = self.app.conf
        queue = prepared.queue
        timeout_s = conf.task_publish_timeout if timeout_s is None else timeout_s
        if retry_policy:
            retry_policy = SETTINGS["task_publish_retry_policy"].checked(retry_policy)
        begun_mono = time.monotonic()
        failure: Optional[OperationalError] = None
        try:
            transport = self.transport
            left_s = timeout_s
            if backend is not None:
                backend.before_call(timeout_s)
                left_s = max(0.001, begun_mono + timeout_s - time.monotonic())
            if queue is not None:
                transport.declare(queue, left_s)
                left_s = max(0.001, begun_mono + timeout_s - time.monotonic())
            transport.publish(self._with_event(prepared), left_s)
        except OperationalError as error:
            if not (conf.task_publish_retry if retry is None else retry):
                raise
            failure = error
        if failure is not None:
            # Out here, so that what is raised at last is one error and not all of them.
            policy = retry_policy or conf.task_publish_retry_policy
            self._publish_again(prepared, policy, begun_mono + timeout_s, failure, backend)
        if signals.after_task_publish.receivers:
            self._tell_published(prepared)

    def publish_many(
        self,
        prepared: Sequence[Prepared],
        timeout_s: Optional[float] = None,
        backend: Optional[Backend] = None,
        before: Callable[[], Any] = lambda: None,
    ) -> None:
        """Publish the messages of a workflow together; `before` is called right before, within the deadline.

        Raises as `publish`, and tries once: where a broker has some of them by then, trying again would
        send these twice.
        """
        conf = self.app.conf
        timeout_s = conf.task_publish_timeout if timeout_s is None else timeout_s
        deadline_mono = time.monotonic() + timeout_s
        transport = self.transport
        if backend is not None:
            backend.before_call(timeout_s)
        for queue in {id(one.queue): one.queue for one in prepared if one.queue is not None}.values():
            transport.declare(queue, max(0.001, deadline_mono - time.monotonic()))
        before()
        publications = [publication for one in prepared for publication in self._with_event(one)]
        transport.publish(publications, max(0.001, deadline_mono - time.monotonic()))
        if signals.after_task_publish.receivers:
            for one in prepared:
                self._tell_published(one)

    def _with_event(self, prepared: Prepared) -> Tuple[Publication, ...]:
        """Return the message, and with it the event that it was sent, if that is told."""
        publication = prepared.publication
        if not self.app.conf.task_send_sent_event:
            return (publication,)
        queue = prepared.queue.name if prepared.queue is not None else None
        return publication, sent_event(self.app, publication, queue)

    def _tell_published(self, prepared: Prepared) -> None:
        publication = prepared.publication
        message = publication.message
        signals.after_task_publish.send(
            sender=message.headers["task"],
            headers=message.headers,
            body=message.body,
            exchange=publication.exchange,
            routing_key=publication.routing_key,
        )

    def _publish_again(
        self,
        prepared: Prepared,
        policy: Mapping[str, Any],
        deadline_mono: float,
        error: OperationalError,
        backend: Optional[Backend],
    ) -> None:
        """Retry by Celery's policy: pause interval_start, then interval_step more, up to interval_max."""
        pause_s: float = policy["interval_start"]
        attempts = policy["max_retries"]
        attempt = 0
        while attempts is None or attempt < attempts:
            attempt += 1
            if deadline_mono - time.monotonic() <= pause_s:
                break
            # Jitter, so that many clients do not come back in the same moment.
            time.sleep(pause_s * self._random.uniform(0.5, 1.0))
            pause_s = min(pause_s + policy["interval_step"], policy["interval_max"])
            try:
                transport = self.transport
                if backend is not None:
                    backend.before_call(max(0.001, deadline_mono - time.monotonic()))
                if prepared.queue is not None:
                    transport.declare(prepared.queue, max(0.001, deadline_mono - time.monotonic()))
                left_s = max(0.001, deadline_mono - time.monotonic())
                transport.publish(self._with_event(prepared), left_s)
                return
            except OperationalError as again:
                error = again
        raise error

    def close(self) -> None:
        """Close this thread's transport."""
        found = getattr(self._local, "transport", None)
        if found is not None and self._local.pid == os.getpid():
            found.close()
        self._local.transport = None

    def new_transport(self, write: bool) -> Transport:
        """Return a new transport that nobody shares; `write` picks `broker_write_url`."""
        url = self.app.broker_url(write)
        return transport_class(url)(url, self.app.broker_options(url), self.app.wall)


def _add_headers(headers: Dict[str, Any], extra: Mapping[str, Any], name: str) -> None:
    """Merge the caller's own headers in; they may replace miniq's, with something a worker can read."""
    try:
        json.dumps(extra)
    except (TypeError, ValueError) as error:
        raise EncodeError(f"task {name}: headers may hold plain JSON values only: {error}") from error
    headers.update(extra)
    wrong = validate_headers(headers)
    if wrong is not None:
        raise ValueError(f"task {name}: {wrong}")

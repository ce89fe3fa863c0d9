# SPDX-License-Identifier: MIT
"""From a call to a message in the broker.

Two steps, apart: `Producer.prepare` turns name, arguments and options into a `Publication`
(serialized once, routed), `Producer.publish` hands publications to the broker under one total
deadline.  A task that runs in a worker only prepares its follow-ups; the worker publishes them
together with the task's result.

One transport per thread and process: the object is thread-safe, what it hands out is not shared.
"""

from __future__ import annotations

import os
import random
import threading
import time
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

from . import _state, signals
from .canvas import as_list
from .exceptions import ImproperlyConfigured, OperationalError, UnknownOption
from .message import Message, pack_body
from .routing import Queue
from .serialization import compress, dumps
from .text import nearest, safe_repr
from .times import eta_moment, expires_moment
from .transports.base import Publication, Transport, transport_class

#: Broker properties that may be given as options and travel as they are.
PROPERTY_OPTIONS = frozenset(
    {"reply_to", "delivery_mode", "message_id", "app_id", "type", "user_id", "cluster_id", "timestamp"}
)
#: Everything `apply_async` takes besides args and kwargs.
CALL_OPTIONS = PROPERTY_OPTIONS | frozenset(
    {
        "countdown", "eta", "expires", "task_id", "link", "link_error", "shadow", "priority", "queue",
        "exchange", "routing_key", "serializer", "compression", "headers", "retry", "retry_policy",
        "add_to_parent", "ignore_result", "time_limit", "soft_time_limit", "argsrepr", "kwargsrepr",
        "root_id", "parent_id", "group_id", "group_index", "chain", "chord", "retries", "producer",
        "connection", "timeout", "confirm_timeout", "stamped_headers", "replaced_task_nesting",
        "mandatory", "immediate",
    }
)  # fmt: skip

#: Options that become broker arguments or a time limit when set as attributes of a task.
TASK_OPTIONS = (
    "queue", "exchange", "routing_key", "priority", "expires", "serializer", "compression",
    "delivery_mode", "time_limit", "soft_time_limit", "ignore_result",
)  # fmt: skip

#: Milliseconds: RabbitMQ refuses a larger per-message expiration.
MAX_EXPIRATION_MS = 315_360_000_000


class Prepared(NamedTuple):
    """A message on its way: `queue` is to be declared before (None: an exchange was named)."""

    publication: Publication
    queue: Optional[Queue]
    task_id: str


def new_task_id() -> str:
    """Return a random UUID4 as text."""
    text = os.urandom(16).hex()
    variant = "89ab"[int(text[16], 16) & 3]
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{variant}{text[17:20]}-{text[20:]}"


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `UnknownOption` naming the first unknown calling option and the nearest known one."""
    if options.keys() <= CALL_OPTIONS:
        return
    stamps = set(as_list(options.get("stamped_headers")))
    for name in options:
        if name not in CALL_OPTIONS and name not in stamps:
            hint = nearest(name, CALL_OPTIONS)
            raise UnknownOption(
                f"unknown calling option {name!r}{f': did you mean {hint!r}?' if hint else ''}"
                " (arguments of the task itself go into args=(...) and kwargs={...})"
            )


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
        """Serialize and route one call.

        `options` are those of `Task.apply_async`, already merged with the task's own.  Raises
        `EncodeError`, `UnknownOption`, `QueueNotFound`, `ValueError` for values out of range.
        """
        app = self.app
        conf = app.conf
        if not options.keys() <= CALL_OPTIONS:
            check_options(options)
        get = options.get
        if get("mandatory") or get("immediate"):
            raise ImproperlyConfigured("options mandatory and immediate: publishing is always confirmed here")
        if get("chord") is not None:
            raise ImproperlyConfigured("option chord: this version of miniq runs single tasks and callbacks")
        route = app.router.route(options, name, args, kwargs, task)
        if route.options:
            options = {**route.options, **{k: v for k, v in options.items() if v is not None}}
            get = options.get

        task_id = get("task_id") or new_task_id()
        eta_text = expires_text = expiration = None
        if get("countdown") is not None or get("eta") is not None or get("expires") is not None:
            now = app.wall()
            eta = eta_moment(get("countdown"), get("eta"), now, app.zone)
            expires = expires_moment(get("expires"), now, app.zone)
            eta_text = eta and eta.text
            if expires is not None:
                expires_text = expires.text
                expiration = str(min(max(0, int((expires.epoch - now) * 1000)), MAX_EXPIRATION_MS))

        frame = _state.worker_frame()
        root_id, parent_id = get("root_id"), get("parent_id")
        if frame is not None:
            request = frame.request
            root_id = root_id or request.root_id or request.id
            parent_id = parent_id or request.id
        ignore_result = get("ignore_result")
        headers: Dict[str, Any] = {
            "lang": "py",
            "task": name,
            "id": task_id,
            "shadow": get("shadow"),
            "eta": eta_text,
            "expires": expires_text,
            "group": get("group_id"),
            "group_index": get("group_index"),
            "retries": get("retries") or 0,
            "timelimit": [get("time_limit"), get("soft_time_limit")],
            "root_id": root_id or task_id,
            "parent_id": parent_id,
            "argsrepr": get("argsrepr") or safe_repr(args),
            "kwargsrepr": get("kwargsrepr") or safe_repr(kwargs),
            "origin": app.origin,
            "ignore_result": bool(ignore_result),
            "replaced_task_nesting": get("replaced_task_nesting") or 0,
            "stamped_headers": get("stamped_headers"),
            "stamps": {key: get(key) for key in get("stamped_headers") or ()},
        }
        body = pack_body(
            args,
            kwargs,
            as_list(get("link")) or None,
            as_list(get("link_error")) or None,
            get("chain"),
            None,
        )
        content_type, content_encoding, data = dumps(body, get("serializer") or conf.task_serializer)
        compression = get("compression") or conf.task_compression
        if compression:
            data, headers["compression"] = compress(data, compression)
        extra = get("headers")
        if extra:
            headers.update(extra)

        priority = get("priority")
        if priority is None:
            priority = conf.task_default_priority or 0
        elif not isinstance(priority, int) or not 0 <= priority <= 255:
            raise ValueError(f"priority must be a whole number from 0 to 255, not {priority!r}")
        properties: Dict[str, Any] = {
            "correlation_id": task_id,
            "reply_to": get("reply_to") or app.thread_oid,
            "delivery_mode": get("delivery_mode") or conf.task_default_delivery_mode,
            "priority": priority,
        }
        if expiration is not None:
            properties["expiration"] = expiration
        for key in options.keys() & PROPERTY_OPTIONS:
            if options[key] is not None:
                properties[key] = options[key]
        message = Message(data, content_type, content_encoding, headers, properties)
        return Prepared(Publication(message, route.exchange, route.routing_key), route.queue, task_id)

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
    ) -> None:
        """Publish one message; return when the broker has it.

        Raises `OperationalError` after `task_publish_timeout` seconds in all, or when
        `task_publish_retry_policy` gives up earlier.  Nothing was accepted then.
        """
        conf = self.app.conf
        publication, queue, _ = prepared
        message = publication.message
        if signals.before_task_publish.receivers:
            signals.before_task_publish.send(
                sender=message.headers["task"],
                body=message.body,
                exchange=publication.exchange,
                routing_key=publication.routing_key,
                headers=message.headers,
                properties=message.properties,
                declare=[queue] if queue else [],
                retry_policy=retry_policy or conf.task_publish_retry_policy,
            )
        timeout_s = conf.task_publish_timeout if timeout_s is None else timeout_s
        try:
            transport = self.transport
            if queue is not None:
                transport.declare(queue)
            transport.publish((publication,), timeout_s)
        except OperationalError as error:
            if not (conf.task_publish_retry if retry is None else retry):
                raise
            self._publish_again(
                prepared, {**conf.task_publish_retry_policy, **(retry_policy or {})}, timeout_s, error
            )
        if signals.after_task_publish.receivers:
            signals.after_task_publish.send(
                sender=message.headers["task"],
                headers=message.headers,
                body=message.body,
                exchange=publication.exchange,
                routing_key=publication.routing_key,
            )

    def _publish_again(
        self, prepared: Prepared, policy: Mapping[str, Any], timeout_s: float, error: OperationalError
    ) -> None:
        """Retry by Celery's policy: pause interval_start, then interval_step more, up to interval_max."""
        deadline = time.monotonic() + timeout_s
        pause: float = policy.get("interval_start", 0)
        attempts = policy.get("max_retries")
        attempt = 0
        while attempts is None or attempt < attempts:
            attempt += 1
            left = deadline - time.monotonic()
            if left <= pause:
                break
            # Jitter, so that many clients do not come back in the same moment.
            time.sleep(pause * self._random.uniform(0.5, 1.0))
            pause = min(pause + policy.get("interval_step", 0.2), policy.get("interval_max", 1))
            try:
                transport = self.transport
                if prepared.queue is not None:
                    transport.declare(prepared.queue)
                transport.publish((prepared.publication,), max(0.001, deadline - time.monotonic()))
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
        return transport_class(url)(url, self.app.conf.broker_transport_options, self.app.wall)

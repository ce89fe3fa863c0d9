# SPDX-License-Identifier: MIT
"""Admission: decides by its headers what becomes of a message that came from the broker.

It may start, or it is put off (not due, rate limit), dropped (revoked, expired, done already) or set
aside (no task, not readable).  Decisions are added to the turn's `Batch`; nothing is done here.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Dict, List, Mapping, Optional

from .. import signals, states
from ..backends.base import Backend
from ..control import number_from_environment
from ..coroutines import is_coroutine_function
from ..exceptions import (
    BackendError,
    ContentDisallowed,
    InvalidTaskError,
    MiniqError,
    NotRegistered,
    OperationalError,
)
from ..log import get_logger
from ..loop import Loop
from ..message import Delivery, upgrade_v1, validate_headers
from ..pools.base import Pool
from ..serialization import dumps, loads
from ..text import import_object, nearest, safe_repr
from ..times import parse_rate, to_epoch
from ..transports.base import Consumer
from .request import Request, TaskPolicy
from .settlement import Batch, Settler

logger = get_logger(__name__)

#: How many revoked ids a worker remembers, unless ``CELERY_WORKER_REVOKES_MAX`` says so; the broker keeps
#: them too, where it can.
REVOKES_MAX = 50_000
#: How many names of stamps with revoked values it remembers.
MOST_STAMPS = 50
#: A message over the rate limit is looked at again after this at the latest: the limit may be lifted.
LONGEST_PARK_S = 3600.0


def stamp_values(value: Any) -> List[Any]:
    """Return the values of a stamp: itself, or its elements; each can be a key."""
    values = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    return [one if isinstance(one, (str, int, float, type(None))) else repr(one) for one in values]


def matching_stamps(headers: Mapping[str, Any], wanted: Mapping[str, Any]) -> Dict[str, List[Any]]:
    """Return those stamps of a message that are among `wanted` (name -> container of values)."""
    stamps, found = headers.get("stamps"), {}
    if isinstance(stamps, dict):
        for name in wanted.keys() & stamps.keys():
            same = [value for value in stamp_values(stamps[name]) if value in wanted[name]]
            if same:
                found[name] = same
    return found


class Pace:
    """Spaces the starts of one rate-limited task: `interval_s` apart, and never less than 90 % of that.

    Messages that come too soon are put off to places one interval apart, in their order.  All times
    are monotonic seconds.
    """

    __slots__ = ("interval_s", "next_start", "next_place")

    def __init__(self, per_second: float) -> None:
        self.interval_s = 1.0 / per_second
        self.next_start = self.next_place = 0.0

    def place(self, mono: float) -> float:
        """Return when the message may start: `mono` or less = now, and then it has to."""
        early_s = self.next_start - mono
        if early_s <= self.interval_s * 0.1:
            # What is started a little early is owed: the next start is reckoned from when it was due.
            self.next_start = max(mono, self.next_start) + self.interval_s
            return mono
        if early_s < self.interval_s:
            return self.next_start  # whoever comes first then starts, the others get places
        place = max(self.next_start, self.next_place)
        self.next_place = place + self.interval_s
        return min(place, mono + LONGEST_PARK_S)


class Admission:
    """Decides; one per worker."""

    def __init__(
        self,
        app: Any,
        loop: Loop,
        consumer: Consumer,
        backend: Backend,
        pool: Pool,
        settler: Settler,
        time_limit: Optional[float] = None,
        soft_time_limit: Optional[float] = None,
    ) -> None:
        self.app = app
        self.loop = loop
        self.consumer = consumer
        self.backend = backend
        self.pool = pool
        self.settler = settler
        self.hostname = settler.hostname
        #: The worker's own limits in seconds, for tasks that have none.
        self.time_limit = time_limit
        self.soft_time_limit = soft_time_limit
        self.deduplicate: bool = app.conf.worker_deduplicate_successful_tasks
        #: Revoked id -> until when (epoch seconds).
        self.revoked: Dict[str, float] = {}
        #: Name of a stamp -> revoked value -> until when.
        self.revoked_stamps: Dict[str, Dict[Any, float]] = {}
        self.revokes_max = int(number_from_environment("CELERY_WORKER_REVOKES_MAX", REVOKES_MAX))
        self._policies: Dict[str, TaskPolicy] = {}
        #: Wall clock minus monotonic clock, as last used.
        self._offset_s = 0.0

    # -- decide

    def admit(self, delivery: Delivery, batch: Batch) -> Optional[Request]:
        """Return a request if the message may start now; else `batch` gets what is done instead.

        Whatever is wrong with one message is no reason to stop the others.
        """
        try:
            return self._admit(delivery, batch)
        except (OperationalError, BackendError):
            raise
        except MiniqError as error:
            self._refuse(delivery, error, batch)
        except Exception as error:  # named net: a message that breaks the worker is set aside
            logger.exception("A message from queue %s cannot be handled", delivery.queue)
            self._refuse(delivery, InvalidTaskError(f"it cannot be handled: {safe_repr(error, 500)}"), batch)
        return None

    def _admit(self, delivery: Delivery, batch: Batch) -> Optional[Request]:
        """Decide; a `MiniqError` says why the message is refused."""
        message = delivery.message
        if delivery.fate == "garbage":
            raise InvalidTaskError("it is not a message at all")
        if "task" not in message.headers:
            self._upgrade(delivery)
        headers = message.headers
        wrong = validate_headers(headers)
        if wrong is not None:
            raise InvalidTaskError(wrong)
        name, task_id = headers["task"], headers["id"]
        policy = self._policies.get(name) or self._make_policy(name)
        if policy is None:
            raise self._not_registered(delivery, batch)
        knows_revoked = self.revoked or self.revoked_stamps
        if delivery.fate == "revoked" or (knows_revoked and self._is_revoked(task_id, headers)):
            self._drop_revoked(delivery, "revoked", batch)
            return None
        delivery.early = not policy.acks_late
        request = policy.request_class(delivery, policy, self.hostname)
        if delivery.fate == "lost":
            batch.add(self.settler.bury(request))
            return None
        if headers.get("expires") is not None and self.has_expired(request):
            self._drop_revoked(delivery, "expired", batch)
            return None
        if headers.get("eta") is not None:
            due = self._moment(headers, "eta")
            if due > self.loop.now():
                self._put_off(delivery, due, batch)
                return None
        if message.content_type not in self.app.accept:
            known = ", ".join(sorted(self.app.accept))
            raise ContentDisallowed(
                f"content type {message.content_type!r:.100} is not accepted (accept_content allows {known})"
            )
        if delivery.deliveries and self.deduplicate and policy.acks_late and self._has_succeeded(task_id):
            batch.endings.append((None, partial(self.consumer.ack, delivery)))
            text = "Task %s had succeeded already, its redelivery is skipped"
            batch.after.append(partial(logger.info, text, request))
            return None
        if policy.pace is not None:
            mono = self.loop.mono()
            place = policy.pace.place(mono)
            if place > mono:
                self._put_off(delivery, self._wall(place), batch)
                return None
        if logger.isEnabledFor(logging.INFO):
            batch.after.append(partial(logger.info, "Task %s received", request))
        if signals.task_received.receivers:
            batch.after.append(partial(signals.task_received.send, sender=self.hostname, request=request))
        return request

    def still_wanted(self, request: Request, batch: Batch) -> bool:
        """Look once more at a message that waited here for a slot."""
        headers = request.delivery.message.headers
        is_revoked = self._is_revoked(request.id, headers)
        why = "revoked" if is_revoked else "expired" if self.has_expired(request) else ""
        if why:
            self._drop_revoked(request.delivery, why, batch)
        return not why

    def has_expired(self, request: Request) -> bool:
        """Say whether it is too late to start."""
        headers = request.delivery.message.headers
        return headers.get("expires") is not None and self._moment(headers, "expires") <= self.loop.now()

    def _moment(self, headers: Dict[str, Any], name: str) -> float:
        try:
            return to_epoch(headers[name], self.app.zone)
        except ValueError as error:
            raise InvalidTaskError(f"header {name!r}: {error}") from error

    def _has_succeeded(self, task_id: str) -> bool:
        if not self.backend.enabled:
            return False
        found = self.backend.fetch([task_id]).get(task_id)
        return found is not None and found.state == states.SUCCESS

    def _upgrade(self, delivery: Delivery) -> None:
        """Turn a protocol 1 message into protocol 2; the only body that is decoded in this process."""
        message = delivery.message
        value = loads(
            message.body,
            message.content_type,
            message.content_encoding,
            self.app.accept,
            message.headers.get("compression"),
        )
        try:
            headers, new_body = upgrade_v1(value)
        except ValueError as error:
            raise InvalidTaskError(str(error)) from error
        serializer = "pickle" if message.content_type == "application/x-python-serialize" else "json"
        message.content_type, message.content_encoding, message.body = dumps(new_body, serializer)
        message.headers = {**message.headers, **headers, "compression": None}

    # -- policies

    def policy_if_known(self, name: str) -> Optional[TaskPolicy]:
        """Return what is done with messages of a task; None for an unknown one."""
        return self._policies.get(name) or self._make_policy(name)

    def policy(self, name: str) -> TaskPolicy:
        """Return what is done with messages of a task; `NotRegistered` for an unknown one."""
        found = self.policy_if_known(name)
        if found is None:
            raise NotRegistered(name)
        return found

    def _make_policy(self, name: str) -> Optional[TaskPolicy]:
        task = self.app.tasks.get(name)
        if task is None:
            return None
        conf = self.app.conf
        request_class = task.Request or Request
        if isinstance(request_class, str):
            request_class = import_object(request_class)
        policy = TaskPolicy(task, conf, request_class)
        if task.time_limit is None and self.time_limit is not None:
            policy.hard_limit_s = self.time_limit
        if task.soft_time_limit is None and self.soft_time_limit is not None:
            policy.soft_limit_s = self.soft_time_limit
        self._set_rate(policy, conf.task_default_rate_limit if task.rate_limit is None else task.rate_limit)
        self._warn_of_limits(policy)
        self._policies[name] = policy
        return policy

    def _set_rate(self, policy: TaskPolicy, rate: Any) -> None:
        per_second = parse_rate(rate)
        limited = per_second and not self.app.conf.worker_disable_rate_limits
        policy.pace = Pace(per_second) if per_second and limited else None

    def _warn_of_limits(self, policy: TaskPolicy) -> None:
        """Say it when a limit of a task cannot be kept."""
        name, soft, hard, pool = policy.task.name, policy.soft_limit_s, policy.hard_limit_s, self.pool
        keeps_soft = pool.has_soft_limit and (
            pool.soft_limit_for_functions or is_coroutine_function(policy.task.run)
        )
        for kept, limit, word in ((keeps_soft, soft, "soft"), (pool.has_hard_limit, hard, "hard")):
            if limit and not kept:
                kind = type(pool).__name__
                logger.warning(
                    "Task %s has a %s time limit (%ss) which the pool %s cannot keep", name, word, limit, kind
                )
        if soft and hard and soft > hard:
            logger.warning(
                "Task %s: its soft time limit (%ss) is never reached, the hard one is %ss", name, soft, hard
            )

    def set_rate_limit(self, name: str, rate: Any) -> None:
        """Change the rate limit of a task; raises `ValueError` or `NotRegistered`."""
        self._set_rate(self.policy(name), rate)

    def set_time_limit(self, name: str, soft: Optional[float], hard: Optional[float]) -> None:
        """Change the time limits of a task for messages that come from now on."""
        policy = self.policy(name)
        policy.soft_limit_s, policy.hard_limit_s = soft, hard

    def _wall(self, mono: float) -> float:
        """Return the epoch seconds of a monotonic moment; equal moments give equal ones."""
        offset_s = self.loop.now() - self.loop.mono()
        if abs(offset_s - self._offset_s) > 0.01:
            self._offset_s = offset_s
        return mono + self._offset_s

    # -- revocations

    def remember_revoked(self, task_ids: List[str], until: float) -> None:
        """Do not start these ids until then (epoch seconds)."""
        for task_id in task_ids:
            self.revoked[task_id] = until
        while len(self.revoked) > self.revokes_max:
            del self.revoked[next(iter(self.revoked))]

    def remember_revoked_stamps(self, stamps: Mapping[str, Any], until: float) -> None:
        """Do not start tasks with one of these stamps (name -> value or values) until then."""
        for name, values in stamps.items():
            held = self.revoked_stamps.setdefault(name, {})
            held.update((value, until) for value in stamp_values(values))
            while len(held) > self.revokes_max // MOST_STAMPS + 1:
                del held[next(iter(held))]
        while len(self.revoked_stamps) > MOST_STAMPS:
            del self.revoked_stamps[next(iter(self.revoked_stamps))]

    def _is_revoked(self, task_id: str, headers: Mapping[str, Any]) -> bool:
        if task_id in self.revoked:
            return True
        return bool(self.revoked_stamps) and bool(matching_stamps(headers, self.revoked_stamps))

    def forget_old_revokes(self) -> None:
        """Drop revocations that are over."""
        now = self.loop.now()
        for held in (self.revoked, *self.revoked_stamps.values()):
            for one in [one for one, until in held.items() if until <= now]:
                del held[one]
        for name in [name for name, held in self.revoked_stamps.items() if not held]:
            del self.revoked_stamps[name]

    # -- what is done with a message that does not start

    def _put_off(self, delivery: Delivery, until: float, batch: Batch) -> None:
        batch.endings.append((None, partial(self.consumer.defer, delivery, until)))

    def _drop_revoked(self, delivery: Delivery, why: str, batch: Batch) -> None:
        batch.add_ends(self.settler.revoked(delivery, why))
        batch.endings.append((None, partial(self.consumer.ack, delivery)))
        batch.after.append(partial(self.settler.announce_revoked, delivery, expired=why == "expired"))

    def _refuse(self, delivery: Delivery, error: MiniqError, batch: Batch) -> None:
        """Set a message aside; its waiter gets FAILURE, where the message says who that is."""
        headers = delivery.message.headers
        task_id = headers.get("id")
        reason = f"{type(error).__name__}: {error.args[0] if error.args else ''}"
        if isinstance(task_id, str) and task_id:
            batch.add_ends(self.settler.refused_message(delivery, error))
            if self.settler.events.enabled:
                first = safe_repr(error.args[0] if error.args else "", 500)
                told = {"uuid": task_id, "exception": f"{type(error).__name__}({first})"}
                batch.after.append(partial(self.settler.events.tell_of_task, "task-failed", told))
        batch.endings.append((None, partial(self.consumer.dead_letter, delivery, reason)))
        text = "Message %s[%s] from queue %s cannot be run and is set aside as a dead letter: %s"
        shown = (safe_repr(headers.get("task"), 200), safe_repr(task_id, 100), delivery.queue, reason)
        batch.after.append(partial(logger.error, text, *shown))

    def _not_registered(self, delivery: Delivery, batch: Batch) -> NotRegistered:
        headers = delivery.message.headers
        name = headers["task"]
        hint = nearest(name, self.app.tasks)
        near = f"; the nearest is {hint}" if hint else ""
        error = NotRegistered(f"{name}: no task of this name is registered here{near}")
        if signals.task_unknown.receivers:
            told = {"message": delivery.message, "exc": error, "name": name, "id": headers["id"]}
            batch.after.append(partial(signals.task_unknown.send, sender=self.hostname, **told))
        return error

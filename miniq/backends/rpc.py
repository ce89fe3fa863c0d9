# SPDX-License-Identifier: MIT
"""Results as messages, through the RabbitMQ broker that the tasks go through: ``rpc://``.

Every process that calls tasks has a reply queue, named by the property ``reply_to`` of its calls.
The worker sends each state there as a message of its own; nothing is stored at a third place, and
only the process that made a call can learn what became of it, in any of its threads::

    exchange ""   routing key = reply_to   correlation_id = task id   delivery_mode 1   priority 0
    headers {}    content_type and content_encoding of the body, which is the encoded meta

Sending a call subscribes to nothing.  Where nobody waits, replies stay at the broker until
`result_expires`; the queue goes with the process, or as long after its last use.

Source: the result messages of Celery 5.7.
"""

from __future__ import annotations

import logging
import math
import os
import time
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence

from .. import _state
from ..codecs.amqp import Content
from ..connections.amqp import ChannelError, Item, Options, Server
from ..connections.replies import Replies, Waiter
from ..exceptions import (
    BackendGetMetaError,
    BackendStoreError,
    DecodeError,
    ImproperlyConfigured,
    OperationalError,
)
from ..states import READY_STATES
from .base import StoredResult
from .rpc_chords import ChordQueues
from .stored import describe, unwrap

logger = logging.getLogger(__name__)

#: What the app adds to the options of its broker; see `RpcBackend`.
OWN_OPTIONS = ("reply_address", "result_expires", "result_persistent")
#: The longest name that AMQP can send.
MAX_NAME_BYTES = 255
#: Who waits no longer than this looks first: the reply may be there, and no time to be brought it.
SHORT_S = 0.1
#: The longest sleep of a waiter, so that it can be interrupted everywhere (Windows).
LONGEST_SLEEP_S = 1.0


class RpcBackend(ChordQueues):
    """One thread's way to the results of this process' calls, and to the callers of the tasks it runs.

    `url` and `options` are those of the broker, with three options of its own: `reply_address`, a function
    that returns the address of this process, `result_expires` in seconds (None = for ever) and
    `result_persistent`, whether replies outlive the broker.
    """

    is_shared = False
    push_waits = True
    keeps_no_groups = "rpc:// sends each result to who asked for it and keeps nothing"

    def __init__(self, url: str, options: Mapping[str, Any], wall: Callable[[], float]) -> None:
        broker_options = {name: value for name, value in options.items() if name not in OWN_OPTIONS}
        self._options = Options.read(broker_options, url)
        self._server = Server.of(url, self._options)
        self._wall = wall
        super().__init__()
        self._address: Callable[[], str] = options["reply_address"]
        self._expires_s: Optional[float] = options.get("result_expires") or None
        self._delivery_mode = 2 if options.get("result_persistent") else 1

    @property
    def _replies(self) -> "Replies[StoredResult]":
        return Replies.of(self._server, self._address(), self._expires_s, _read)

    # -- calls

    def before_call(self, timeout_s: float) -> None:
        """See that there is a reply queue, before it is named in a message.

        None is made for what a task sends that may not wait for it: nobody would empty it.
        """
        if _state.join_allowed():
            self._replies.make(timeout_s)

    # -- results

    def store(self, results: Sequence[StoredResult]) -> None:
        """Send each result to who asked for it; one that nobody asked for is sent to nobody.

        What the receiver knows already decides there which of them count.  A receiver that is gone
        has taken its queue with it, and the broker drops what comes.
        """
        asked = [result for result in results if _is_asked_for(result)]
        if not asked:
            return
        messages: List[Item] = [
            ("", result.reply_to, self._properties(result), {}, result.body, False) for result in asked
        ]
        timeout_s = self._options.socket_timeout
        first = asked[0]
        try:
            with self._server.borrow(timeout_s) as connection:
                refusals = connection.publisher(timeout_s).publish(messages, timeout_s)
        except (OperationalError, ChannelError) as error:
            raise BackendStoreError(
                f"the result was not sent: {error}", task_id=first.task_id, state=first.state
            ) from error
        for result, refusal in zip(asked, refusals):
            if refusal is not None:
                raise BackendStoreError(
                    f"{self._server.url}: reply queue {result.reply_to!r} refused the result: {refusal.text}",
                    task_id=result.task_id,
                    state=result.state,
                )

    def _properties(self, result: StoredResult) -> Dict[str, Any]:
        return {
            "content_type": result.content_type,
            "content_encoding": result.content_encoding,
            "delivery_mode": self._delivery_mode,
            "priority": 0,
            "correlation_id": result.task_id,
        }

    def fetch(self, task_ids: Sequence[str]) -> Dict[str, StoredResult]:
        """See `Backend.fetch`; how long a result is kept is not known: `expires_s` is None."""
        replies = self._replies
        if not task_ids or not self._has_asked(replies, task_ids[0]):
            return {}
        try:
            self._look(replies, task_ids)
            return {stored.task_id: stored for stored in replies.known(task_ids)}
        except OperationalError as error:
            raise BackendGetMetaError(str(error), task_id=task_ids[0]) from error

    def _look(self, replies: "Replies[StoredResult]", task_ids: Sequence[str]) -> None:
        """Take what has come, unless all that is asked for is here."""
        found = replies.known(task_ids)
        if sum(stored.state in READY_STATES for stored in found) < len(task_ids):
            replies.look(self._options.socket_timeout)

    def _has_asked(self, replies: "Replies[StoredResult]", task_id: str) -> bool:
        if replies.is_made:
            return True
        _warn_once(f"{_ELSEWHERE.format(task_id)}; it looks as if it were PENDING")
        return False

    def forget(self, task_ids: Iterable[str]) -> None:
        """Drop what has come; what comes later is dropped when its time is over."""
        replies, task_ids = self._replies, list(task_ids)
        if replies.is_made:
            try:
                self._look(replies, task_ids)
                replies.forget(task_ids)
            except OperationalError as error:
                raise BackendStoreError(str(error)) from error

    def expire(self) -> int:
        """Return 0: the broker does it."""
        return 0

    def close(self) -> None:
        """Close connections that nobody uses now; who needs one again, opens it."""
        super().close()
        self._replies.close_idle()
        self._server.close()

    # -- waiting

    def wait(
        self,
        task_ids: Sequence[str],
        timeout_s: Optional[float],
        interval_s: Optional[float] = None,
        unready: bool = False,
    ) -> Iterator[StoredResult]:
        """See `Backend.wait`.

        Raises `ImproperlyConfigured` where no result can ever come to this process.  A broker that
        was there and goes away is an error after a minute (`connections.replies.PATIENCE_S`).
        """
        mono = time.monotonic()
        deadline_mono = math.inf if timeout_s is None else mono + timeout_s
        pending = dict.fromkeys(task_ids)
        replies = self._replies
        if not pending:
            return
        if not replies.is_made:
            if timeout_s is not None and timeout_s <= 0:
                self._has_asked(replies, task_ids[0])
                return
            raise ImproperlyConfigured(_ELSEWHERE.format(task_ids[0]))
        waiter: Waiter[StoredResult] = Waiter(pending, deadline_mono, unready)
        try:
            if timeout_s is not None and timeout_s < SHORT_S:
                self._look(replies, list(pending))
            replies.join(waiter)
            while True:
                for stored in waiter.take():
                    if stored.task_id in pending:
                        if stored.state in READY_STATES:
                            del pending[stored.task_id]
                        yield stored
                mono = time.monotonic()
                if not pending or mono >= deadline_mono:
                    return
                replies.listen(waiter, min(deadline_mono, mono + LONGEST_SLEEP_S))
        except OperationalError as error:
            raise BackendGetMetaError(str(error), task_id=next(iter(pending))) from error
        finally:
            replies.leave(waiter)


_ELSEWHERE = (
    "the result of task {} cannot be had here: results over rpc:// come only to the process that sent the"
    " task, and this one has sent none that it may wait for (a task that wants to wait for another one sends"
    " it inside of allow_join_result()); to read results anywhere, set result_backend to a store, as redis://"
)
_warned: List[int] = []


def _warn_once(text: str) -> None:
    """Write a warning, the first time in this process."""
    if os.getpid() not in _warned:
        _warned[:] = [os.getpid()]
        logger.warning("%s", text)


def _is_asked_for(result: StoredResult) -> bool:
    """Say whether there is an address; one that no message can have is an error in the log."""
    if not result.reply_to:
        logger.debug("the result of task %s is not sent, its message names no reply_to", result.task_id)
        return False
    try:
        longest = max(len(result.task_id.encode()), len(result.reply_to.encode()))
    except UnicodeEncodeError:
        longest = MAX_NAME_BYTES + 1
    if longest > MAX_NAME_BYTES:
        logger.error(
            "The result of task %.300r is lost: neither its id nor the address %.300r may be longer than %d"
            " bytes", result.task_id, result.reply_to, MAX_NAME_BYTES,
        )  # fmt: skip
        return False
    return True


def _read(content: Content) -> Optional[StoredResult]:
    """Return the result in a message; None, and a warning, where there is none."""
    properties = content.properties
    task_id = properties.get("correlation_id") or ""
    try:
        if not task_id:
            raise DecodeError("it has no correlation_id")
        body = unwrap(content.body)
        state, content_type, encoding = describe(body)
    except DecodeError as error:
        logger.warning("What came as the result of task %r is none, it is passed over: %s", task_id, error)
        return None
    return StoredResult(
        task_id,
        state,
        body,
        properties.get("content_type") or content_type,
        properties.get("content_encoding") or encoding,
        None,
    )

# SPDX-License-Identifier: MIT
"""The seam between miniq and a result store, and the one form results have in all of them.

A stored result is its *meta*, a dict with Celery's keys in Celery's order::

    status, result, traceback, children, date_done[, group_id][, parent_id]
    [, name, args, kwargs, worker, retries, queue, stamped headers...], task_id

`result` is the return value (SUCCESS), ``{"exc_type", "exc_message", "exc_module"}`` (FAILURE,
RETRY, REVOKED), ``{"pid", "hostname"}`` (STARTED) or the task's own meta (custom states).  The
process that ran the task encodes it once; stores keep the bytes.

Writes are conditional everywhere: `states.may_replace` decides.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence

from ..exceptions import ImproperlyConfigured
from ..text import import_object, mask_url, unknown_scheme

#: URL scheme -> "module:Class", relative to this package.
BACKENDS: Dict[str, str] = {
    "disabled": ".disabled:DisabledBackend",
    "memory": ".memory:MemoryBackend",
    "cache+memory": ".memory:MemoryBackend",
    "sqlite": ".sqlite:SQLiteBackend",
    "file": ".files:FileBackend",
    "memcache": ".cache:MemcachedBackend",
    "cache+memcached": ".cache:MemcachedBackend",
    "redis": ".redis:RedisBackend",
    "rediss": ".redis:RedisBackend",
    "redis+socket": ".redis:RedisBackend",
    "unix": ".redis:RedisBackend",
    "sentinel": ".redis:RedisBackend",
    "valkey": ".redis:RedisBackend",
    "valkey+socket": ".redis:RedisBackend",
    "valkeys": ".redis:RedisBackend",
    "rpc": ".rpc:RpcBackend",
}


#: Schemes whose backends have something to do before a call is published.
CALLERS = ("rpc",)


class StoredResult(NamedTuple):
    """An encoded meta, opaque to the store.

    `expires_s` is how long it is kept, None for ever.  `reply_to` is the address that the call named
    for its answer: what is sent there and not stored needs it.
    """

    task_id: str
    state: str
    body: bytes
    content_type: str
    content_encoding: str
    expires_s: Optional[float]
    reply_to: str = ""


class Backend:
    """One thread's conversation with one result store.

    Errors: `BackendStoreError` / `BackendGetMetaError`, with the cause chained.
    """

    #: True where a waiter is told; False where `wait` looks again and again (bounded).
    push_waits = False
    #: False for the store that keeps nothing.
    enabled = True

    def __init__(self, url: str, options: Mapping[str, Any], wall: Callable[[], float]) -> None:
        """Remember `url` and `options` (``result_backend_transport_options``); open nothing yet."""
        raise NotImplementedError

    def before_call(self, timeout_s: float) -> None:
        """Get ready for the answer, before a call that expects one is published.

        Only called where the scheme is one of CALLERS; raises `OperationalError`.
        """

    def store(self, results: Sequence[StoredResult]) -> None:
        """Write results, each only where `states.may_replace` allows it.

        Joins the transaction of a transport on the same store (see `transports.base`).
        """
        raise NotImplementedError

    def fetch(self, task_ids: Sequence[str]) -> Dict[str, StoredResult]:
        """Return what is stored and not expired; unknown ids are missing from the dict."""
        raise NotImplementedError

    def wait(
        self,
        task_ids: Sequence[str],
        timeout_s: Optional[float],
        interval_s: Optional[float] = None,
        unready: bool = False,
    ) -> Iterator[StoredResult]:
        """Yield each result as it becomes final, in the order they do, until all are.

        Returns early (without error) when `timeout_s` is over; 0 looks once.  `interval_s` is the
        longest pause between two looks where the store cannot push.  With `unready`, changes to
        states that are not final are yielded too.  Leaves nothing behind, however it is left.
        """
        raise NotImplementedError

    def forget(self, task_ids: Iterable[str]) -> None:
        """Delete results."""
        raise NotImplementedError

    def expire(self) -> int:
        """Delete what is past its time; return how many.  Nothing to do where the store does it."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the connection."""
        raise NotImplementedError


def backend_class(url: str) -> "type[Backend]":
    """Return the class for the URL's scheme; `ImproperlyConfigured` names the known ones."""
    scheme = url.partition("://")[0].lower()
    target = BACKENDS.get(scheme)
    if target is None:
        raise ImproperlyConfigured(f"result backend {mask_url(url)!r}: {unknown_scheme(scheme, BACKENDS)}")
    found: "type[Backend]" = import_object(target, package=__package__)
    return found


def pause_between_looks_s(quiet_s: float, look_s: float, longest_s: float) -> float:
    """Return how long a waiter sleeps where the store cannot push.

    A tenth of the time without news, from half a millisecond to `longest_s`.  A look for many takes its
    time, `look_s`: two thirds of it at least are left to others.
    """
    return max(min(max(quiet_s / 10, 0.0005), longest_s), 2 * look_s)

# SPDX-License-Identifier: MIT
"""Results in memcached: ``memcache://host:port[;host2:port2]`` (or ``cache+memcached://``, as Celery says).

Keys and values are Celery's, and so is the choice of the server by key where there are several.
A result is added where there is none; where there is one it is read with a token and replaced only
while it is unchanged (``gets`` and ``cas``), a bounded number of times.

memcached is a cache: it forgets results when its memory is full, and all of them when it ends.  It
tells nobody of changes, so a waiter looks again and again; nor does it tell what is left of a
value's time, so `fetch` returns None for that.
"""

from __future__ import annotations

import logging
import random
import re
import time
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

from ..connections.memcached import (
    MAX_KEY_BYTES,
    MAX_VALUE_BYTES,
    TOO_LARGE,
    Connection,
    Value,
    Write,
    addresses_of,
    choose,
    exptime_of,
    node_name,
)
from ..exceptions import (
    BackendGetMetaError,
    BackendStoreError,
    DecodeError,
    ImproperlyConfigured,
    OperationalError,
)
from ..states import READY_STATES, may_replace
from ..text import mask_url, nearest
from .base import Backend, StoredResult, pause_between_looks_s
from .stored import GROUP_KEY_PREFIX, describe, key_prefix, plain_or_hashed, readable_state, unwrap

logger = logging.getLogger(__name__)

#: Seconds, unless ``result_backend_transport_options`` says otherwise.
DEFAULTS = {"socket_timeout": 5.0, "socket_connect_timeout": 4.0, "global_keyprefix": ""}
#: How often a value that others write to at the same time is tried to be replaced.
CAS_ROUNDS = 50
#: A waiter takes no notice of servers that are away for less.
PATIENCE_S = 10.0

#: What may be part of a key; the rest is hashed.
_PREFIX = re.compile(r"[!-~]{0,100}")
_STORED, _REFUSED = b"STORED", frozenset((b"NOT_STORED", b"EXISTS", b"NOT_FOUND"))


class MemcachedBackend(Backend):
    """One thread's way to results in memcached servers."""

    def __init__(self, url: str, options: Mapping[str, Any], wall: Callable[[], float]) -> None:
        checked = _read_options(options, url)
        self._prefix = key_prefix(checked["global_keyprefix"])
        self._group_prefix = key_prefix(checked["global_keyprefix"], GROUP_KEY_PREFIX)
        self._plain = re.compile(rf"[!-~]{{1,{MAX_KEY_BYTES - len(self._prefix)}}}")
        self._plain_group = re.compile(rf"[!-~]{{1,{MAX_KEY_BYTES - len(self._group_prefix)}}}")
        self._wall = wall
        timeouts = checked["socket_timeout"], checked["socket_connect_timeout"]
        self._servers = {node_name(address): Connection(address, *timeouts) for address in addresses_of(url)}
        self._names = list(self._servers)

    def _key(self, task_id: str) -> str:
        return self._prefix + plain_or_hashed(task_id, self._plain)

    def _by_server(self, task_ids: Iterable[str]) -> "List[Tuple[Connection, Dict[bytes, str]]]":
        """Return the servers with what to ask them for: ids by key."""
        found: Dict[str, Dict[bytes, str]] = {}
        for task_id in task_ids:
            key = self._key(task_id)
            found.setdefault(choose(self._names, key), {})[key.encode("ascii")] = task_id
        return [(self._servers[name], ids) for name, ids in found.items()]

    # -- writing

    def store(self, results: Sequence[StoredResult]) -> None:
        by_id: Dict[str, List[StoredResult]] = {}
        for result in results:
            by_id.setdefault(result.task_id, []).append(result)
        now = self._wall()
        too_large: Optional[StoredResult] = None
        for server, ids in self._by_server(by_id):
            pending = [
                (result, Write(key, result.body, exptime_of(result.expires_s, now)))
                for key, task_id in ids.items()
                for result in by_id[task_id]
            ]
            try:
                too_large = self._write(server, pending) or too_large
            except OperationalError as error:
                first = pending[0][0]
                raise BackendStoreError(str(error), task_id=first.task_id, state=first.state) from error
        if too_large is not None:
            raise BackendStoreError(
                f"a result of {len(too_large.body)} bytes is too large for memcached: it takes 1 MB unless"
                " it was started with a larger -I", task_id=too_large.task_id, state=too_large.state,
            )  # fmt: skip

    def _write(
        self, server: Connection, pending: "List[Tuple[StoredResult, Write]]"
    ) -> Optional[StoredResult]:
        """Write results to one server, each where it may be; return one that was too large."""
        too_large = [result for result, _ in pending if len(result.body) > MAX_VALUE_BYTES]
        pending = [pair for pair in pending if pair[0] not in too_large] if too_large else pending
        for attempt in range(CAS_ROUNDS):
            refused: List[Tuple[StoredResult, Write]] = []
            for pair, reply in zip(pending, server.write([write for _, write in pending])):
                if reply == TOO_LARGE:
                    too_large.append(pair[0])
                elif reply in _REFUSED:
                    refused.append(pair)
                elif reply != _STORED:
                    raise OperationalError(f"memcached at {server.name}: {reply.decode('ascii', 'replace')}")
            if refused:
                found = server.get([write.key for _, write in refused], tokens=True)
                pending = [
                    (result, write._replace(token=found[write.key].token if write.key in found else b""))
                    for result, write in refused
                    if write.key not in found or self._may_replace(result, found[write.key])
                ]
            if not refused or not pending:
                return too_large[0] if too_large else None
            if attempt:
                # Others write to the same result; not in step with them.
                time.sleep(random.random() * 0.002)
        raise OperationalError(
            f"memcached at {server.name}: the result of task {pending[0][0].task_id} was changed by others"
            f" {CAS_ROUNDS} times while it was being written"
        )

    def _may_replace(self, result: StoredResult, old: Value) -> bool:
        state = readable_state(old.body, result.task_id)
        return state is None or may_replace(result.state, state)

    def forget(self, task_ids: Iterable[str]) -> None:
        for server, ids in self._by_server(task_ids):
            try:
                server.delete(list(ids))
            except OperationalError as error:
                raise BackendStoreError(str(error)) from error

    def expire(self) -> int:
        """Return 0: memcached does it."""
        return 0

    # -- reading

    def fetch(self, task_ids: Sequence[str]) -> Dict[str, StoredResult]:
        try:
            return self._look(self._by_server(task_ids))
        except OperationalError as error:
            raise BackendGetMetaError(str(error), task_id=task_ids[0]) from error

    def _look(
        self, asked: "List[Tuple[Connection, Dict[bytes, str]]]", timeout_s: Optional[float] = None
    ) -> Dict[str, StoredResult]:
        found: Dict[str, StoredResult] = {}
        for server, ids in asked:
            for key, value in server.get(list(ids), timeout_s=timeout_s).items():
                task_id = ids[key]
                try:
                    body = unwrap(value.body)
                    state, content_type, encoding = describe(body)
                except DecodeError as error:
                    raise BackendGetMetaError(
                        f"memcached at {server.name}: {key!r} holds no result: {error}", task_id=task_id
                    ) from error
                found[task_id] = StoredResult(task_id, state, body, content_type, encoding, None)
        return found

    def wait(
        self,
        task_ids: Sequence[str],
        timeout_s: Optional[float],
        interval_s: Optional[float] = None,
        unready: bool = False,
    ) -> Iterator[StoredResult]:
        longest_s = 0.05 if interval_s is None else min(max(interval_s, 0.0005), 0.05)
        asked = self._by_server(task_ids)
        reported: Dict[str, Tuple[str, bytes]] = {}
        start = progress = answered = time.monotonic()
        is_away = False
        while asked:
            before = time.monotonic()
            found: Dict[str, StoredResult] = {}
            try:
                # A silent server must not hold a waiter much longer than it wants to wait.
                found = self._look(asked, max(start + timeout_s - before, 0.1) if timeout_s else None)
                answered, is_away = time.monotonic(), False
            except OperationalError as error:
                if time.monotonic() - answered > PATIENCE_S or timeout_s == 0:
                    raise BackendGetMetaError(str(error), task_id=task_ids[0]) from error
                if not is_away:
                    logger.warning("%s; %d results are waited for all the same", error, len(task_ids))
                is_away = True
            look_s = time.monotonic() - before
            for task_id, stored in found.items():
                if stored.state in READY_STATES:
                    for _, ids in asked:
                        ids.pop(self._key(task_id).encode("ascii"), None)
                elif not unready or reported.get(task_id) == (stored.state, stored.body):
                    continue
                reported[task_id] = (stored.state, stored.body)
                progress = time.monotonic()
                yield stored
            asked = [(server, ids) for server, ids in asked if ids]
            if not asked:
                return
            mono = time.monotonic()
            left_s = float("inf") if timeout_s is None else start + timeout_s - mono
            if left_s <= 0:
                return
            time.sleep(min(pause_between_looks_s(mono - progress, look_s, longest_s), left_s))

    # -- groups

    def _group_key(self, group_id: str) -> "Tuple[Connection, bytes]":
        key = self._group_prefix + plain_or_hashed(group_id, self._plain_group)
        return self._servers[choose(self._names, key)], key.encode("ascii")

    def save_group(self, group_id: str, body: bytes, expires_s: Optional[float]) -> None:
        server, key = self._group_key(group_id)
        exptime = exptime_of(expires_s, self._wall())
        reply = b""
        try:
            for _ in range(CAS_ROUNDS):
                found = server.get([key], tokens=True).get(key)
                (reply,) = server.write([Write(key, body, exptime, b"" if found is None else found.token)])
                if reply not in _REFUSED:
                    break
        except OperationalError as error:
            raise BackendStoreError(str(error)) from error
        if reply != _STORED:
            raise BackendStoreError(
                f"memcached at {server.name} did not keep group {group_id!r} of {len(body)} bytes:"
                f" {reply.decode('ascii', 'replace')}"
            )

    def load_group(self, group_id: str) -> Optional[bytes]:
        server, key = self._group_key(group_id)
        try:
            found = server.get([key]).get(key)
        except OperationalError as error:
            raise BackendGetMetaError(str(error)) from error
        return None if found is None else unwrap(found.body)

    def delete_group(self, group_id: str) -> None:
        server, key = self._group_key(group_id)
        try:
            server.delete([key])
        except OperationalError as error:
            raise BackendStoreError(str(error)) from error

    def close(self) -> None:
        for server in self._servers.values():
            server.close()


def _read_options(options: Mapping[str, Any], url: str) -> Dict[str, Any]:
    """Return all options; `ImproperlyConfigured` says which one is unknown or wrong."""
    for name, value in options.items():
        if name not in DEFAULTS:
            hint = nearest(name, DEFAULTS)
            raise ImproperlyConfigured(
                f"{mask_url(url)!r}: unknown transport option {name!r}"
                f"{f' (did you mean {hint}?)' if hint else ''}; known: {', '.join(DEFAULTS)}"
            )
        if name == "global_keyprefix":
            wrong = not isinstance(value, str) or not _PREFIX.fullmatch(value)
            wanted = "at most 100 letters, digits and signs without spaces"
        else:
            wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6
            wanted = "a number of seconds above 0"
        if wrong:
            raise ImproperlyConfigured(
                f"{mask_url(url)!r}: transport option {name} must be {wanted}, not {value!r}"
            )
    return {**DEFAULTS, **options}

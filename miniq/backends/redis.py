# SPDX-License-Identifier: MIT
"""Results on a Redis server, in Celery's layout: Celery's clients and workers may use them too.

    celery-task-meta-ID           the encoded meta and nothing else; published on the channel of that name
    celery-taskset-meta-GROUP     a saved group; with .s .j .t .d .c behind it, what a chord counts
    _miniq.state.KEY              the state of a meta that we compressed, which the server cannot read

All with `global_keyprefix` before them.  Writing is one script (`connections.redis_session`) that
finds the old state in the old meta, so that a result never goes backwards whoever wrote it.

Who waits subscribes, looks once when that is confirmed, and listens (`connections.listener`).  Because
a message may be lost, and old peers may forget to publish, he looks now and then all the same.

Source: the result backend of Celery 5.7 and its key names; chords as 5.7 counts them.
"""

from __future__ import annotations

import math
import time
import uuid
from functools import partial
from operator import methodcaller
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
)

from ..connections.listener import Listener, Waiter
from ..connections.redis import Connection, Options, Part, ReplyError, Script, Server
from ..connections.redis_session import Op, Session, run_ops, store_op
from ..exceptions import BackendGetMetaError, BackendStoreError, DecodeError, OperationalError
from ..states import READY_STATES
from .base import Backend, StoredResult
from .stored import KEY_PREFIX, describe, key_prefix, unwrap

T = TypeVar("T")

#: Before the id of a group in its keys.
GROUP_KEY_PREFIX = "celery-taskset-meta-"
#: Keys that one command reads.
BATCH = 1000
#: Who waits looks again after so long without news, and then less and less often.
FIRST_LOOK_S = 0.5
MAX_LOOK_S = 5.0
#: The same where nothing is pushed: no RESP3 (first and last), or no connection just now (last).
FIRST_POLL_S = 0.001
MAX_POLL_S = 0.5
#: Who waits bears with a server that was there and cannot be reached for so long.
PATIENCE_S = 60.0
#: A connection that breaks within so long gets a second chance: it had been closed while it was idle.
SECOND_CHANCE_S = 0.5
#: The look at the end of a wait may take so long beyond it.
LAST_LOOK_S = 0.1
#: How long a claim on a chord's body lasts, first and while it is sent, and how long a chord is known
#: as done.
CLAIM_S = 6
SENDING_S = 21
DONE_S = 300


class Arrival(NamedTuple):
    """What the arrival of a chord's member came to.

    `arrived` is how many did so far, `size` None while it is not known how many there will be.
    Whoever has a `claim` has to send the body, and nobody else does while it lasts.  `done` says that
    the body was sent already.
    """

    arrived: int
    size: Optional[int]
    claim: Optional[str]
    done: bool


#: KEYS: .j .t .s .d G .c
#: ARGV: mark, entry, score or "" for a list, seconds or "" for ever, claim, seconds of the claim
_ARRIVE = Script(
    """
local call = redis.call
local entries, extra, size, marks, group, claim = unpack(KEYS)
if call('GET', claim) == 'done' then return {0, false, 0, 1} end
if call('SADD', marks, ARGV[1]) == 1 then
  if ARGV[3] == '' then call('RPUSH', entries, ARGV[2]) else call('ZADD', entries, ARGV[3], ARGV[2]) end
end
local count = ARGV[3] == '' and call('LLEN', entries) or call('ZCARD', entries)
if ARGV[4] ~= '' then
  for n = 1, 5 do call('EXPIRE', KEYS[n], ARGV[4]) end
end
local total = call('GET', size)
local claimed = 0
if total then
  total = tonumber(total) + tonumber(call('GET', extra) or 0)
  -- Asked a second time after a lost connection, the claim may be there and the asker's own.
  if count == total
    and (call('SET', claim, ARGV[5], 'NX', 'EX', ARGV[6]) or call('GET', claim) == ARGV[5]) then
    claimed = 1
  end
end
return {count, total, claimed, 0}
"""
)
#: KEYS: .c .s; ARGV: claim, seconds.
_EXTEND = Script(
    """
if redis.call('GET', KEYS[1]) ~= ARGV[1] or redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
return redis.call('EXPIRE', KEYS[1], ARGV[2])
"""
)
#: KEYS: .c .j .t .s .d; ARGV: claim, seconds.
_FINISH = Script(
    """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2], KEYS[3], KEYS[4], KEYS[5])
redis.call('SET', KEYS[1], 'done', 'EX', ARGV[2])
return 1
"""
)


class RedisBackend(Backend):
    """One thread's way to the results on a Redis server; connections are borrowed for each operation.

    Besides what every backend does it keeps Celery's books of groups and chords.  These methods raise
    `BackendStoreError` and `BackendGetMetaError` like the others.
    """

    push_waits = True

    def __init__(self, url: str, options: Mapping[str, Any], wall: Callable[[], float]) -> None:
        self._options = Options.read(options, url)
        self._server = Server.of(url, self._options)
        self._ordered = self._options.result_chord_ordered
        self._task_prefix = key_prefix(self._options.global_keyprefix)
        self._group_prefix = self._task_prefix[: -len(KEY_PREFIX)] + GROUP_KEY_PREFIX

    # -- results

    def store(self, results: Sequence[StoredResult]) -> None:
        if results:
            prefix = self._task_prefix
            first = results[0]
            self._write(
                [
                    store_op(prefix + task_id, body, expires_s, state)
                    for task_id, state, body, _, _, expires_s, _ in results
                ],
                first.task_id,
                first.state,
            )

    def fetch(self, task_ids: Sequence[str]) -> Dict[str, StoredResult]:
        found: Dict[str, StoredResult] = {}
        for batch in _batches(task_ids):
            for stored in self._ask(partial(self._read, batch), batch[0]):
                found[stored.task_id] = stored
        return found

    def _read(self, task_ids: Sequence[str], connection: Connection) -> List[StoredResult]:
        """Return what there is and how long it is kept, in one round trip."""
        keys = [self._task_prefix + task_id for task_id in task_ids]
        commands: List[Tuple[str, ...]] = [("MGET", *keys)]
        commands += [("PTTL", key) for key in keys]
        values, *left_ms = replies = connection.pipeline(commands)
        for command, reply in zip(commands, replies):
            if isinstance(reply, ReplyError):
                raise connection.translated(reply, command[0]) from reply
        found: List[StoredResult] = []
        for task_id, value, ms in zip(task_ids, values, left_ms):
            # -2: its time was over between the two commands.
            if value is not None and ms != -2:
                found.append(self._result(task_id, value, None if ms < 0 else ms / 1000))
        return found

    def _result(self, task_id: str, value: bytes, expires_s: Optional[float] = None) -> StoredResult:
        try:
            return _stored(task_id, value, expires_s)
        except DecodeError as error:
            key = self._task_prefix + task_id
            raise BackendGetMetaError(
                f"{self._server.url}: {key!r} holds no result: {error}", task_id=task_id
            ) from error

    def forget(self, task_ids: Iterable[str]) -> None:
        keys = [self._task_prefix + task_id for task_id in task_ids]
        for batch in _batches(keys):
            sidecars = [f"_miniq.state.{key}" for key in batch]
            self._do(methodcaller("call", "DEL", *batch, *sidecars))

    def expire(self) -> int:
        """Return 0: the server does it."""
        return 0

    def close(self) -> None:
        """Close connections that nobody uses now; who needs one again, opens it."""
        Listener.of(self._server).close_idle(0.0)
        self._server.close()

    # -- errors

    def _twice(self, work: Callable[[Connection], T], timeout_s: Optional[float] = None) -> T:
        """Do what may be done twice, over another connection where the first one breaks at once."""
        server = self._server
        listener = Listener.of(server)
        timeout_s = self._options.socket_timeout if timeout_s is None else timeout_s
        start = time.monotonic()
        try:
            with server.borrow(timeout_s) as connection:
                found = work(connection)
        except OperationalError:
            if time.monotonic() - start > SECOND_CHANCE_S:
                raise
            with server.borrow(timeout_s) as connection:
                found = work(connection)
        listener.reached()
        listener.close_idle()
        return found

    def _ask(self, work: Callable[[Connection], T], task_id: str = "") -> T:
        try:
            return self._twice(work)
        except OperationalError as error:
            raise BackendGetMetaError(str(error), task_id=task_id) from error

    def _do(self, work: Callable[[Connection], T], task_id: str = "", state: str = "") -> T:
        try:
            return self._twice(work)
        except OperationalError as error:
            raise BackendStoreError(str(error), task_id=task_id, state=state) from error

    def _write(self, ops: Sequence[Op], task_id: str = "", state: str = "") -> None:
        """Run operations, now or with the open transaction of this thread."""
        session = Session.joined(self._server)
        if session is None:
            self._do(lambda connection: run_ops(connection, ops), task_id, state)
        else:
            for op in ops:
                session.add(op)

    # -- waiting

    def wait(
        self,
        task_ids: Sequence[str],
        timeout_s: Optional[float],
        interval_s: Optional[float] = None,
        unready: bool = False,
    ) -> Iterator[StoredResult]:
        """See `Backend.wait`; how long a result is kept is not asked for: `expires_s` is None.

        A server that never could be reached raises at once, one that goes away after PATIENCE_S.
        """
        deadline_mono = math.inf if timeout_s is None else time.monotonic() + timeout_s
        once = timeout_s is not None and timeout_s <= 0
        longest_s = MAX_POLL_S if interval_s is None else min(max(interval_s, FIRST_POLL_S), MAX_POLL_S)
        pause_s, poll_s = FIRST_LOOK_S, FIRST_POLL_S
        news = _News(task_ids, unready)
        listener = Listener.of(self._server)
        waiter: Optional[Waiter] = None
        try:
            while True:
                before_mono = mono = time.monotonic()
                if waiter is not None:
                    waiter.look = False
                for batch in _batches(list(news.pending)):
                    found = self._look(batch, listener, deadline_mono, once)
                    if found is None:
                        pause_s = FIRST_LOOK_S
                        break
                    yield from news.sift(found)
                if not news.pending or once or before_mono >= deadline_mono:
                    return
                if waiter is None:
                    channels = [(self._task_prefix + task_id).encode() for task_id in news.pending]
                    waiter = Waiter(channels, deadline_mono)
                    listener.join(waiter)
                # Looking for many takes its time; most of it is left to others.
                mono = time.monotonic()
                look_mono = mono + max(pause_s, 4 * (mono - before_mono))
                while mono < deadline_mono and mono < look_mono and not waiter.look:
                    if not listener.listen(waiter, min(look_mono, deadline_mono)):
                        break
                    yield from news.sift(self._messages(waiter))
                    if not news.pending:
                        return
                    mono = time.monotonic()
                else:
                    pause_s = min(pause_s * 1.5, MAX_LOOK_S if listener.connected else MAX_POLL_S)
                    continue
                current = Listener.of(self._server)
                if current is not listener:
                    # This is a child that was forked while it waited.
                    listener, waiter = current, None
                else:
                    time.sleep(max(0.0, min(poll_s, deadline_mono - time.monotonic())))
                    poll_s = min(poll_s * 1.5, longest_s)
        finally:
            if waiter is not None:
                listener.leave(waiter)

    def _look(
        self, task_ids: Sequence[str], listener: Listener, deadline_mono: float, once: bool
    ) -> Optional[List[StoredResult]]:
        """Return what there is now; None where the server is away and may come back."""
        left_s = math.inf if once else max(deadline_mono - time.monotonic(), LAST_LOOK_S)
        timeout_s = min(left_s, self._options.socket_timeout)
        keys = [self._task_prefix + task_id for task_id in task_ids]
        try:
            values = self._twice(methodcaller("call", "MGET", *keys, timeout_s=timeout_s), timeout_s)
        except OperationalError as error:
            if once or listener.out_of_reach_s() > PATIENCE_S:
                raise BackendGetMetaError(str(error), task_id=task_ids[0]) from error
            return None
        return [self._result(task_id, value) for task_id, value in zip(task_ids, values) if value is not None]

    def _messages(self, waiter: Waiter) -> Iterator[StoredResult]:
        start = len(self._task_prefix.encode())
        for channel, value in waiter.take():
            try:
                yield _stored(channel[start:].decode(), value, None)
            except DecodeError:
                waiter.look = True  # anybody can publish anything; what is stored counts

    # -- groups

    def save_group(self, group_id: str, body: bytes, expires_s: Optional[float]) -> None:
        """Keep an encoded group, ``{"result": [[id, parent], [member, ...]]}``."""
        key = self._group_prefix + group_id
        kept: Tuple[Part, ...] = () if expires_s is None else ("PX", max(1, int(expires_s * 1000)))
        self._write([("do", "SET", key, body, *kept), ("do", "PUBLISH", key, body)])

    def load_group(self, group_id: str) -> Optional[bytes]:
        """Return a group as it was saved, None if there is none; DecodeError if it cannot be decompressed."""
        value = self._ask(methodcaller("call", "GET", self._group_prefix + group_id))
        return None if value is None else unwrap(value)

    def delete_group(self, group_id: str) -> None:
        """Forget a group; its members' results stay."""
        self._do(methodcaller("call", "DEL", self._group_prefix + group_id))

    # -- chords

    def start_chord(self, group_id: str, size: int, expires_s: Optional[float]) -> None:
        """Say how many results the header will have, just before its last message is sent."""
        key = self._group_prefix + group_id
        kept: Tuple[Part, ...] = () if expires_s is None else ("EX", math.ceil(expires_s))
        self._write([("do", "DEL", key + ".c"), ("do", "SET", key + ".s", size, *kept)])

    def arrive_at_chord(
        self, group_id: str, task_id: str, entry: bytes, index: Optional[int], expires_s: Optional[float]
    ) -> Arrival:
        """Count a member that ended (SUCCESS, FAILURE or REVOKED), once however often it is told.

        `entry` is the encoded ``[1, task_id, state, result]``, `index` its place in the header.
        """
        key = self._group_prefix + group_id
        place = "+inf" if index is None else str(index)
        score = place if self._ordered else ""
        kept = "" if expires_s is None else math.ceil(expires_s)
        claim = uuid.uuid4().hex
        args: List[Part] = [f"{task_id}:{place}", entry, score, kept, claim, CLAIM_S]
        keys = [key + ".j", key + ".t", key + ".s", key + ".d", key, key + ".c"]
        reply = self._do(lambda connection: connection.run(_ARRIVE, keys, args), task_id)
        count, size, claimed, done = reply
        return Arrival(count, size, claim if claimed else None, bool(done))

    def chord_entries(self, group_id: str) -> List[bytes]:
        """Return the entries that arrived, in the order of the header; DecodeError as in `load_group`."""
        command = "ZRANGE" if self._ordered else "LRANGE"
        values = self._ask(methodcaller("call", command, f"{self._group_prefix}{group_id}.j", 0, -1))
        return [unwrap(value) for value in values]

    def extend_chord(self, group_id: str, claim: str) -> bool:
        """Make a claim last while the body is sent; False: it is lost, and another one's turn."""
        key = self._group_prefix + group_id
        return bool(
            self._do(lambda connection: connection.run(_EXTEND, [key + ".c", key + ".s"], [claim, SENDING_S]))
        )

    def finish_chord(self, group_id: str, claim: str) -> bool:
        """Clear away after the body was sent; False if the claim was lost meanwhile."""
        key = self._group_prefix + group_id
        keys = [key + ".c", key + ".j", key + ".t", key + ".s", key + ".d"]
        return bool(self._do(lambda connection: connection.run(_FINISH, keys, [claim, DONE_S])))

    def abandon_chord(self, group_id: str) -> None:
        """See to it that the body is never sent: a member failed.  The entries stay until they expire."""
        self._do(methodcaller("call", "DEL", f"{self._group_prefix}{group_id}.s"))


class _News:
    """What is waited for, and what of it was told already."""

    def __init__(self, task_ids: Sequence[str], unready: bool) -> None:
        self.pending = dict.fromkeys(task_ids)
        self._unready = unready
        self._told: Dict[str, Tuple[str, bytes]] = {}

    def sift(self, found: Iterable[StoredResult]) -> Iterator[StoredResult]:
        """Yield what is to be told."""
        for stored in found:
            seen = (stored.state, stored.body)
            if stored.task_id not in self.pending:
                continue
            if stored.state in READY_STATES:
                del self.pending[stored.task_id]
            elif self._unready and self._told.get(stored.task_id) != seen:
                self._told[stored.task_id] = seen
            else:
                continue
            yield stored


def _batches(items: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _stored(task_id: str, value: bytes, expires_s: Optional[float]) -> StoredResult:
    """Return the result whose meta is `value`; DecodeError where it is none."""
    body = unwrap(value)
    state, content_type, content_encoding = describe(body)
    return StoredResult(task_id, state, body, content_type, content_encoding, expires_s)

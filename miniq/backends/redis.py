# SPDX-License-Identifier: MIT
"""Results on a Redis server, in Celery's layout: Celery's clients and workers may use them too.

    celery-task-meta-ID           the encoded meta and nothing else; published on the channel of that name
    celery-taskset-meta-GROUP     a saved group; with .s .j .t .d .c behind it, what a chord counts
    _miniq.state.KEY              the state of a meta that we compressed, which the server cannot read
    _miniq.chord.GROUP            the body of a chord, for who sends it after a crash
    _miniq.chords                 sorted set of chords that are not done: score = when to look whether one
                                  is complete and nobody ends it

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
from .base import (
    CLAIM_S,
    DONE_S,
    MOST_LEFT_OVER,
    SENDING_S,
    Arrival,
    Backend,
    ChordPart,
    ClaimLost,
    StoredResult,
)
from .stored import GROUP_KEY_PREFIX, describe, key_prefix, unwrap

T = TypeVar("T")

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
#: Parts of chords that one script counts.
PARTS_AT_ONCE = 100
#: A chord that is not complete is looked at so often, whether nobody ends it: one that a Celery worker
#: completed, which has no index.
LOOK_S = 30
#: The index is forgotten after so long without a new chord.
INDEX_KEPT_S = 7 * 86400

#: KEYS: index, and for each part .j .t .s .d G .c and the body
#: ARGV: seconds of a claim, now, seconds of the index; for each part group, mark or "" for none, entry,
#: score or "" for a list, seconds or "" for as they are, claim
#: Reply: for each part count, size, whether the claim is the asker's, done, whether there is the body
_ARRIVE = Script(
    """
local call = redis.call
local replies = {}
for n = 1, (#KEYS - 1) / 7 do
  local entries, extra, size, marks, group, claim, body = unpack(KEYS, 7 * n - 5, 7 * n + 1)
  local id, mark, entry, score, kept, token = unpack(ARGV, 6 * n - 2, 6 * n + 3)
  if call('GET', claim) == 'done' then
    replies[n] = {0, false, 0, 1, 1}
  else
    if mark ~= '' and call('SADD', marks, mark) == 1 then
      if score == '' then call('RPUSH', entries, entry) else call('ZADD', entries, score, entry) end
    end
    local count = score == '' and call('LLEN', entries) or call('ZCARD', entries)
    if kept ~= '' then
      for _, key in ipairs({entries, extra, size, marks, group, body}) do call('EXPIRE', key, kept) end
    end
    local total = call('GET', size)
    local claimed, known = 0, 1
    if total then
      total = tonumber(total) + tonumber(call('GET', extra) or 0)
      -- Asked a second time, the claim may be there and the asker's own.
      if count >= total
        and (call('SET', claim, token, 'NX', 'EX', ARGV[1]) or call('GET', claim) == token) then
        claimed, known = 1, call('EXISTS', body)
        call('ZADD', KEYS[1], ARGV[2] + ARGV[1], id)
        call('EXPIRE', KEYS[1], ARGV[3])
      end
    end
    replies[n] = {count, total, claimed, 0, known}
  end
end
return replies
"""
)
#: KEYS: .c .s index; ARGV: claim, seconds, when they are over, group.
_EXTEND = Script(
    """
if redis.call('GET', KEYS[1]) ~= ARGV[1] or redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
redis.call('ZADD', KEYS[3], ARGV[3], ARGV[4])
return redis.call('EXPIRE', KEYS[1], ARGV[2])
"""
)
#: KEYS: .c .t .d; ARGV: mark, count, seconds or "".
_ADD = Script(
    """
if redis.call('GET', KEYS[1]) == 'done' then return 0 end
if redis.call('SADD', KEYS[3], ARGV[1]) == 1 then redis.call('INCRBY', KEYS[2], ARGV[2]) end
if ARGV[3] ~= '' then
  redis.call('EXPIRE', KEYS[2], ARGV[3])
  redis.call('EXPIRE', KEYS[3], ARGV[3])
end
return 1
"""
)
#: KEYS: index; ARGV: now, how many, seconds until the next look, what is before a group in Celery's
#: keys and in that of the body, the command that counts.
_LEFT_OVER = Script(
    """
local call = redis.call
local found = {}
for _, id in ipairs(call('ZRANGE', KEYS[1], '-inf', ARGV[1], 'BYSCORE', 'LIMIT', 0, ARGV[2])) do
  local key, body = ARGV[4] .. id, ARGV[5] .. id
  local size, claim = call('GET', key .. '.s'), call('GET', key .. '.c')
  if not size or claim == 'done' then
    call('ZREM', KEYS[1], id)
    call('DEL', body)
  elseif claim then
    call('ZADD', KEYS[1], ARGV[1] + math.max(call('PTTL', key .. '.c'), 0) / 1000, id)
  elseif call(ARGV[6], key .. '.j') < size + tonumber(call('GET', key .. '.t') or 0) then
    call('ZADD', KEYS[1], ARGV[1] + ARGV[3], id)
  else
    local text = call('GET', body)
    if text then
      found[#found + 1] = id
      found[#found + 1] = text
    else
      call('ZREM', KEYS[1], id)
    end
  end
end
return found
"""
)


class RedisBackend(Backend):
    """One thread's way to the results on a Redis server; connections are borrowed for each operation.

    Groups and chords are kept in Celery's own books, and Celery's workers count with ours.
    """

    push_waits = True
    counts_chords = True

    def __init__(self, url: str, options: Mapping[str, Any], wall: Callable[[], float]) -> None:
        self._options = Options.read(options, url)
        self._server = Server.of(url, self._options)
        self._ordered = self._options.result_chord_ordered
        self._wall = wall
        prefix = self._options.global_keyprefix
        self._task_prefix = key_prefix(prefix)
        self._group_prefix = key_prefix(prefix, GROUP_KEY_PREFIX)
        self._body_prefix = key_prefix(prefix, "_miniq.chord.")
        self._chord_index = key_prefix(prefix, "_miniq.chords")

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

    @property
    def joins(self) -> bool:
        return Session.joined(self._server) is not None

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
        key = self._group_prefix + group_id
        kept: Tuple[Part, ...] = () if expires_s is None else ("PX", max(1, int(expires_s * 1000)))
        self._write([("do", "SET", key, body, *kept), ("do", "PUBLISH", key, body)])

    def load_group(self, group_id: str) -> Optional[bytes]:
        value = self._ask(methodcaller("call", "GET", self._group_prefix + group_id))
        return None if value is None else unwrap(value)

    def delete_group(self, group_id: str) -> None:
        self._do(methodcaller("call", "DEL", self._group_prefix + group_id))

    # -- chords

    def start_chord(
        self, group_id: str, size: int, body: bytes, expires_s: Optional[float], anew: bool = True
    ) -> None:
        key, index, now = self._group_prefix + group_id, self._chord_index, self._wall()
        kept: Tuple[Part, ...] = () if expires_s is None else ("EX", math.ceil(expires_s))
        self._write(
            [
                *([("do", "DEL", key + ".c")] if anew else ()),
                ("do", "SET", key + ".s", size, *kept),
                ("do", "SET", self._body_prefix + group_id, body, *kept),
                ("do", "ZREMRANGEBYSCORE", index, "-inf", repr(now - INDEX_KEPT_S)),
                ("do", "ZADD", index, repr(now + LOOK_S), group_id),
                ("do", "EXPIRE", index, INDEX_KEPT_S),
            ]
        )

    def arrive_at_chords(self, parts: Sequence[ChordPart]) -> List[Arrival]:
        """See `Backend.arrive_at_chords`; a step of its own, in one script, also inside of a transaction.

        What is counted twice by it, after a lost answer or by a message that came again, counts once.
        """
        arrivals: List[Arrival] = []
        for batch in _batches(parts, PARTS_AT_ONCE):
            arrivals += self._arrive(batch)
        return arrivals

    def claim_chord(self, group_id: str, token: str = "") -> Arrival:
        return self._arrive([ChordPart(group_id, None, "", b"", None, token=token)])[0]

    def _arrive(self, parts: Sequence[ChordPart]) -> List[Arrival]:
        """Count parts; one without a task id only asks."""
        keys: List[Part] = [self._chord_index]
        args: List[Part] = [CLAIM_S, repr(self._wall()), INDEX_KEPT_S]
        claims: List[str] = []
        for group_id, index, task_id, entry, expires_s, _, token in parts:
            key = self._group_prefix + group_id
            place = "+inf" if index is None else str(index)
            claim = token or uuid.uuid4().hex
            claims.append(claim)
            keys += [key + ".j", key + ".t", key + ".s", key + ".d", key, key + ".c"]
            keys.append(self._body_prefix + group_id)
            args += [group_id, f"{task_id}:{place}" if task_id else "", entry, place if self._ordered else ""]
            args += ["" if expires_s is None else math.ceil(expires_s), claim]
        replies = self._do(lambda connection: connection.run(_ARRIVE, keys, args), parts[0].task_id)
        arrivals: List[Arrival] = []
        for part, claim, (count, size, claimed, done, known) in zip(parts, claims, replies):
            arrivals.append(Arrival(count, size, claim if claimed else None, bool(done)))
            if part.body and not known:
                # Started by Celery: whoever has the claim may die, and then another one needs the body.
                kept = () if part.expires_s is None else ("EX", math.ceil(part.expires_s))
                key = self._body_prefix + part.group_id
                self._do(methodcaller("call", "SET", key, part.body, *kept), part.task_id)
        return arrivals

    def chord_entries(self, group_id: str) -> List[bytes]:
        """See `Backend.chord_entries`; DecodeError as in `load_group`.

        With the option ``result_chord_ordered`` off they come in the order in which they arrived.
        """
        command = "ZRANGE" if self._ordered else "LRANGE"
        values = self._ask(methodcaller("call", command, f"{self._group_prefix}{group_id}.j", 0, -1))
        return [unwrap(value) for value in values]

    def extend_chord(self, group_id: str, claim: str) -> bool:
        key = self._group_prefix + group_id
        keys = [key + ".c", key + ".s", self._chord_index]
        args: List[Part] = [claim, SENDING_S, repr(self._wall() + SENDING_S), group_id]
        return bool(self._do(lambda connection: connection.run(_EXTEND, keys, args)))

    def finish_chord(self, group_id: str, claim: str) -> bool:
        key = self._group_prefix + group_id
        gone = (key + ".j", key + ".t", key + ".s", key + ".d", self._body_prefix + group_id)
        try:
            self._write([("claim", key + ".c", claim, group_id), *self._end(group_id, gone)])
        except ClaimLost:
            return False
        return True

    def abandon_chord(self, group_id: str) -> None:
        key = self._group_prefix + group_id
        self._write(self._end(group_id, (key + ".s", self._body_prefix + group_id)))

    def _end(self, group_id: str, gone: Sequence[str]) -> List[Op]:
        return [
            ("do", "DEL", *gone),
            ("do", "SET", f"{self._group_prefix}{group_id}.c", "done", "EX", DONE_S),
            ("do", "ZREM", self._chord_index, group_id),
        ]

    def add_to_chord(
        self, group_id: str, count: int = 1, token: str = "", expires_s: Optional[float] = None
    ) -> bool:
        # Asked a second time after a lost connection, it must not count twice either.
        mark = f"+{token or uuid.uuid4().hex}"
        key = self._group_prefix + group_id
        keys = [key + ".c", key + ".t", key + ".d"]
        args: List[Part] = [mark, count, "" if expires_s is None else math.ceil(expires_s)]
        return bool(self._do(lambda connection: connection.run(_ADD, keys, args)))

    def chords_left_over(self, now: float) -> List[Tuple[str, bytes]]:
        args: List[Part] = [repr(now), MOST_LEFT_OVER, LOOK_S, self._group_prefix, self._body_prefix]
        args.append("ZCARD" if self._ordered else "LLEN")
        found = self._ask(lambda connection: connection.run(_LEFT_OVER, [self._chord_index], args))
        return [(group_id.decode(), body) for group_id, body in zip(found[::2], found[1::2])]


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


def _batches(items: Sequence[T], size: int = BATCH) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _stored(task_id: str, value: bytes, expires_s: Optional[float]) -> StoredResult:
    """Return the result whose meta is `value`; DecodeError where it is none."""
    body = unwrap(value)
    state, content_type, content_encoding = describe(body)
    return StoredResult(task_id, state, body, content_type, content_encoding, expires_s)

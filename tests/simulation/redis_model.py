# SPDX-License-Identifier: MIT
"""A Redis server in this process, as far as miniq's transport and result backend use one.

`Database` holds the keys and does commands and the two scripts that matter (`RUN` of
`connections.redis_session` and `RENEW` of `transports.redis_upkeep`), as the server would: one after
the other.  That it does what a real server does is tested with random steps over both
(`test_redis_model`).  It knows nothing of faults; `watch` is told what becomes of messages.
"""

from __future__ import annotations

import json
from collections import deque
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Protocol, Sequence, Set, Tuple

from miniq.connections.redis import Part
from miniq.connections.redis_session import Layout
from miniq.states import may_replace

#: Scores and values as bytes.
Item = Tuple[float, bytes]


def as_bytes(part: Part) -> bytes:
    """Return a part of a command as the server gets it."""
    return part if isinstance(part, bytes) else str(part).encode()


class Client(Protocol):
    """A connection, as the server sees it."""

    tracking: bool
    tracked: Set[bytes]
    patterns: Set[bytes]

    def push(self, push: List[Any]) -> None:
        """Send it something that it did not ask for."""


class Watcher(Protocol):
    """Is told what the scripts do with messages."""

    def started(self, owner: str, item: bytes) -> None:
        """A message was marked as started that was not."""

    def went_back(self, owner: str, item: bytes, was_started: bool) -> None:
        """A message is where it came from."""

    def ended(self, ids: List[bytes]) -> None:
        """Messages were settled by their owner."""

    def was_lost(self, owner: str, item: bytes) -> None:
        """A message was started by an owner that is gone."""


class Database:
    """The keys of one server, and who is connected to it."""

    def __init__(self, wall: Callable[[], float], layout: Layout) -> None:
        self.wall = wall
        self.layout = layout
        self.watch: Optional[Watcher] = None
        self.clients: List[Client] = []
        #: Grows with every change.
        self.version = 0
        #: Keys that were set, in order; who looks at them clears the list.
        self.written: List[bytes] = []
        #: Key -> what is there; ask `get`, which knows what is over.
        self.names: Dict[bytes, Any] = {}
        self._until: Dict[bytes, float] = {}

    # -- keys

    def get(self, key: bytes) -> Any:
        """Return what is under a key: bytes, a deque (list), a dict (hash, sorted set) or a set."""
        if key in self._until and self._until[key] <= self.wall():
            self._delete(key)
        return self.names.get(key)

    def _delete(self, key: bytes) -> bool:
        self._until.pop(key, None)
        return self.names.pop(key, None) is not None

    def _of_kind(self, key: bytes, kind: Callable[[], Any]) -> Any:
        """Return what is there to be changed, made where there is nothing."""
        found = self.get(key)
        if found is None:
            found = self.names[key] = kind()
        return found

    def _changed(self, key: bytes, by: Optional[Client]) -> None:
        self.version += 1
        if key in self.names and self.names[key] in (deque(), {}, set()):
            self._delete(key)
        for client in self.clients:
            if client is not by and key in client.tracked:
                client.tracked.discard(key)
                client.push([b"invalidate", [key]])

    # -- commands

    def do(self, client: Optional[Client], command: Sequence[Part]) -> Any:
        """Do one command and return its reply, RESP3."""
        name, *args = map(as_bytes, command)
        return getattr(self, "_" + name.decode().lower())(client, *args)

    def _ping(self, client: Optional[Client]) -> bytes:
        return b"PONG"

    def _client(self, client: Client, *args: bytes) -> bytes:
        client.tracking = True
        return b"OK"

    def _multi(self, client: Optional[Client]) -> bytes:
        return b"OK"

    _exec = _multi

    def _psubscribe(self, client: Client, pattern: bytes) -> None:
        client.patterns.add(pattern)

    def _publish(self, by: Optional[Client], channel: bytes, text: bytes) -> int:
        heard = 0
        for client in self.clients:
            for pattern in client.patterns:
                if pattern == channel or (pattern[-1:] == b"*" and channel.startswith(pattern[:-1])):
                    client.push([b"pmessage", pattern, channel, text])
                    heard += 1
        return heard

    def _exists(self, client: Optional[Client], *keys: bytes) -> int:
        if client is not None and client.tracking:
            client.tracked.update(keys)
        return sum(self.get(key) is not None for key in keys)

    def _del(self, client: Optional[Client], *keys: bytes) -> int:
        count = 0
        for key in keys:
            if self.get(key) is not None:
                count += self._delete(key)
                self._changed(key, client)
        return count

    _unlink = _del

    def _get(self, client: Optional[Client], key: bytes) -> Any:
        return self.get(key)

    def _mget(self, client: Optional[Client], *keys: bytes) -> List[Any]:
        return [self.get(key) for key in keys]

    def _pttl(self, client: Optional[Client], key: bytes) -> int:
        if self.get(key) is None:
            return -2
        until = self._until.get(key)
        return -1 if until is None else int((until - self.wall()) * 1000)

    def _set(
        self, client: Optional[Client], key: bytes, value: bytes, unit: bytes = b"", n: bytes = b""
    ) -> bytes:
        self._until.pop(key, None)
        self.names[key] = value
        self.written.append(key)
        if unit:
            self._until[key] = self.wall() + float(n) / (1000 if unit == b"PX" else 1)
        self._changed(key, client)
        return b"OK"

    def _hset(self, client: Optional[Client], key: bytes, *pairs: bytes) -> int:
        found = self._of_kind(key, dict)
        before = len(found)
        found.update(zip(pairs[::2], pairs[1::2]))
        self._changed(key, client)
        return len(found) - before

    def _hsetnx(self, client: Optional[Client], key: bytes, name: bytes, value: bytes) -> int:
        return 0 if name in (self.get(key) or {}) else self._hset(client, key, name, value)

    def _hget(self, client: Optional[Client], key: bytes, name: bytes) -> Any:
        return (self.get(key) or {}).get(name)

    def _hmget(self, client: Optional[Client], key: bytes, *names: bytes) -> List[Any]:
        return [(self.get(key) or {}).get(name) for name in names]

    def _hkeys(self, client: Optional[Client], key: bytes) -> List[bytes]:
        return list(self.get(key) or ())

    def _hgetall(self, client: Optional[Client], key: bytes) -> Dict[bytes, bytes]:
        return dict(self.get(key) or {})

    def _remove(self, client: Optional[Client], key: bytes, *names: bytes) -> int:
        found = self.get(key) or {}
        count = sum(found.pop(name, None) is not None for name in names)
        if count:
            self._changed(key, client)
        return count

    _hdel = _zrem = _remove

    def _sadd(self, client: Optional[Client], key: bytes, *members: bytes) -> int:
        found = self._of_kind(key, dict)  # in a dict they keep their order
        count = len(found)
        found.update(dict.fromkeys(members, b""))
        self._changed(key, client)
        return len(found) - count

    _srem = _remove
    _smembers = _hkeys

    def _lpush(self, client: Optional[Client], key: bytes, *items: bytes) -> int:
        found = self._of_kind(key, deque)
        found.extendleft(items)
        self._changed(key, client)
        return len(found)

    def _rpush(self, client: Optional[Client], key: bytes, *items: bytes) -> int:
        found = self._of_kind(key, deque)
        found.extend(items)
        self._changed(key, client)
        return len(found)

    def _rpop(self, client: Optional[Client], key: bytes, count: bytes) -> List[bytes]:
        found: Deque[bytes] = self.get(key) or deque()
        items = [found.pop() for _ in range(min(int(count), len(found)))]
        if items:
            self._changed(key, client)
        return items

    def _lrange(self, client: Optional[Client], key: bytes, first: bytes, last: bytes) -> List[bytes]:
        found = list(self.get(key) or ())
        return found[int(first) :] if last == b"-1" else found[int(first) : int(last) + 1]

    def _zadd(self, client: Optional[Client], key: bytes, *args: bytes) -> int:
        only_old = greater = False
        while args[0] in (b"XX", b"GT"):
            only_old, greater = only_old or args[0] == b"XX", greater or args[0] == b"GT"
            args = args[1:]
        found = self._of_kind(key, dict)
        before = len(found)
        for score, member in zip(args[::2], args[1::2]):
            if (member in found or not only_old) and not (greater and found.get(member, 0.0) > float(score)):
                found[member] = float(score)
        self._changed(key, client)
        return len(found) - before

    def _zmscore(self, client: Optional[Client], key: bytes, *members: bytes) -> List[Optional[float]]:
        return [(self.get(key) or {}).get(member) for member in members]

    def _zrange(self, client: Optional[Client], key: bytes, *args: bytes) -> List[Any]:
        """Return the first member with its score: nothing else is asked for."""
        assert args == (b"0", b"0", b"WITHSCORES")
        return [[member, score] for score, member in self._by_score(key)[:1]]

    def _zremrangebyscore(self, client: Optional[Client], key: bytes, low: bytes, high: bytes) -> int:
        over = [member for score, member in self._by_score(key) if score <= float(high)]
        return self._remove(client, key, *over)

    def _by_score(self, key: bytes) -> List[Item]:
        return sorted((score, member) for member, score in (self.get(key) or {}).items())

    def restore_overdue(self) -> None:
        """Put back what is past its lease, as a worker of Celery's does."""
        index, unacked = self.layout.index.encode(), self.layout.unacked.encode()
        for score, id_ in self._by_score(index):
            if score <= self.wall():
                owner = id_.rpartition(b":")[0]
                state = self.get(self.layout.held(owner.decode()).encode())[id_]
                head, tail, list_ = state.split(b"|", 2)
                item = self.get(unacked)[id_][1 : -int(tail)]
                self.do(None, [b"HDEL", unacked, id_])
                self.do(None, [b"ZREM", index, id_])
                self.do(None, [b"RPUSH", list_, item])
                if self.watch is not None:
                    self.watch.went_back(owner.decode(), item, head[:1] != b"r")

    # -- scripts

    def renew(self, client: Optional[Client], keys: Sequence[Part], args: Sequence[Part]) -> List[Any]:
        """Do `RENEW`."""
        alive, owners, held, index = map(as_bytes, keys)
        lease_ms, owner, info, lease_s, prefix = map(as_bytes, args)
        self._set(client, alive, b"1", b"PX", lease_ms)
        self._hset(client, owners, owner, info)
        ends = as_bytes(int(self.wall()) + float(lease_s))
        for id_ in self._hkeys(client, held):
            if id_ in (self.get(index) or {}):
                self._zadd(client, index, ends, id_)
        found = self._hgetall(client, owners)
        flat = [part for pair in found.items() for part in pair]
        return [flat, [name for name in found if self.get(prefix + name) is None]]

    def run(self, client: Optional[Client], keys: Sequence[Part], args: Sequence[Part]) -> List[Any]:
        """Do `RUN`."""
        return _Run(self, client, list(map(as_bytes, keys)), list(map(as_bytes, args))).reply()


class _Run:
    """One run of the script `RUN`."""

    def __init__(
        self, database: Database, client: Optional[Client], keys: List[bytes], args: List[bytes]
    ) -> None:
        self.database = database
        self.client = client
        self.keys = keys
        self.unacked, self.index = keys[:2]
        self.prefix = args[0]
        counts = int(args[1]), int(args[2])
        self._args = args
        self._at = 3
        self.ops = [self._take(int(self._take(2)[1]), 2) for _ in range(counts[0])]
        self.groups = [self._take_group() for _ in range(counts[1])]
        self.claim = args[self._at :]

    def _take(self, count: int, back: int = 0) -> List[bytes]:
        """Return the next arguments; with `back`, the code before their number as the first."""
        start = self._at
        self._at += count
        head = [self._args[start - 2]] if back else []
        return head + self._args[start : self._at]

    def _take_group(self) -> Tuple[bytes, List[bytes], List[Tuple[bytes, bytes, bytes]]]:
        """Return an owner, what it ends, and what it starts: (id, kind, token)."""
        owner, ends, late, early = self._take(4)
        ended = self._take(int(ends))
        ids = self._take(int(late) + int(early))
        kinds = [b"l"] * int(late) + [b"e"] * int(early)
        return owner, ended, list(zip(ids, kinds, self._take(len(ids))))

    def _held(self, owner: bytes) -> bytes:
        return self.prefix + b"_miniq.held." + owner

    def _find(self, owner: bytes, id_: bytes) -> Tuple[bytes, bytes, bytes]:
        """Return state, item and list of what an owner holds; empty where it does not."""
        database = self.database
        state: bytes = (database.get(self._held(owner)) or {}).get(id_, b"")
        value: bytes = (database.get(self.unacked) or {}).get(id_, b"")
        if not state:
            return b"", b"", b""
        head, tail, list_ = state.split(b"|", 2)
        return head, value[1 : -int(tail)], list_

    def reply(self) -> List[Any]:
        database, client = self.database, self.client
        gone = [b"alive" for op in self.ops if op[0] == b"dead" and database.get(op[1]) is not None][:1]
        index = database.get(self.index) or {}
        states: Dict[bytes, bytes] = {}
        for owner, ended, starts in self.groups:
            held = database.get(self._held(owner)) or {}
            for id_ in ended + [id_ for id_, _, _ in starts]:
                state = states[id_] = held.get(id_, b"")
                if not state or (state[:1] != b"e" and id_ not in index):
                    gone.append(id_)
        if gone:
            return [gone]
        for code, *rest in self.ops:
            if code == b"do":
                database.do(client, rest)
            elif code == b"store":
                self._store(*rest)
            elif code != b"dead":
                self._move(code, *rest)
        for owner, ended, starts in self.groups:
            self._settle(owner, ended, starts, states)
        if not self.claim or self.claim[0] == b"0":
            return [gone]
        return [gone, *self._claimed()]

    def _store(self, key: bytes, body: bytes, px: bytes, state: bytes) -> None:
        database = self.database
        old = database.get(key)
        if old is not None and not may_replace(state.decode(), json.loads(old)["status"]):
            return
        database.do(self.client, [b"SET", key, body] + ([b"PX", px] if px else []))
        database.do(self.client, [b"PUBLISH", key, body])

    def _forget(self, owner: bytes, *ids: bytes) -> None:
        for key in (self._held(owner), self.unacked, self.index):
            self.database.do(self.client, [b"HDEL", key, *ids])

    def _move(self, code: bytes, owner: bytes, id_: bytes, *rest: bytes) -> None:
        database, watch = self.database, self.database.watch
        state, item, list_ = self._find(owner, id_)
        if not state:
            return
        self._forget(owner, id_)
        if not item:  # one of Celery's has it
            return
        was_started = state[:1] != b"r"
        if code == b"back":
            database.do(self.client, [b"RPUSH", list_, item])
            if watch is not None:
                watch.went_back(owner.decode(), item, was_started)
        elif code == b"park":
            database.do(self.client, [b"ZADD", rest[0], rest[1], list_ + b"\0" + item])
        elif code == b"swap":
            database.do(self.client, rest)
            if watch is not None and was_started:
                watch.was_lost(owner.decode(), item)

    def _settle(
        self,
        owner: bytes,
        ended: List[bytes],
        starts: List[Tuple[bytes, bytes, bytes]],
        states: Mapping[bytes, bytes],
    ) -> None:
        database = self.database
        for id_, kind, token in starts:
            head, _, rest = states[id_].partition(b"|")
            database.do(self.client, [b"HSET", self._held(owner), id_, kind + token + b"|" + rest])
            if kind == b"e":
                database.do(self.client, [b"ZREM", self.index, id_])
            if database.watch is not None and head == b"r":
                database.watch.started(owner.decode(), self._find(owner, id_)[1])
        if ended:
            self._forget(owner, *ended)
            if database.watch is not None:
                database.watch.ended(ended)

    def _claimed(self) -> List[Any]:
        """Take messages; return when the next is due, whether any is revoked, and what was taken."""
        database, client = self.database, self.client
        limit, owner, number, lease_s, now, track, count = self.claim[:7]
        lists, queues = self.keys[2 : 2 + int(count)], self.claim[7:]
        next_due = None
        for key in self.keys[2 + int(count) :]:
            found = database._by_score(key)
            for _, member in reversed([one for one in found if one[0] <= float(now)]):
                list_, _, item = member.partition(b"\0")
                database.do(client, [b"RPUSH", list_, item])
                database.do(client, [b"ZREM", key, member])
            later = [score for score, _ in found if score > float(now)]
            if later and (next_due is None or later[0] < next_due):
                next_due = later[0]
        taken: List[Any] = []
        left, serial = int(limit), int(number)
        ends = as_bytes(int(database.wall()) + float(lease_s))
        for place, (key, queue) in enumerate(zip(lists, queues)):
            for item in database.do(client, [b"RPOP", key, as_bytes(left)]) if left else ():
                id_ = owner + b":" + as_bytes(serial)
                tail = b', "", ' + json.dumps(queue.decode()).encode() + b"]"
                state = b"r|" + as_bytes(len(tail)) + b"|" + key
                database.do(client, [b"HSET", self.unacked, id_, b"[" + item + tail])
                database.do(client, [b"ZADD", self.index, ends, id_])
                database.do(client, [b"HSET", self._held(owner), id_, state])
                taken += (place, item)
                left, serial = left - 1, serial + 1
        if taken:
            owners = self.prefix + b"_miniq.owners"
            database.do(client, [b"HSETNX", owners, owner, b'{"journal": true}'])
        if left and track == b"1":
            database.do(client, [b"EXISTS", *self.keys[2:]])
        revoked = database.do(None, [b"EXISTS", self.prefix + b"_miniq.revoked"])
        return [None if next_due is None else as_bytes(repr(next_due)), revoked, taken, []]

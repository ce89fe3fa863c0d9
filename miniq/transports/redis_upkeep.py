# SPDX-License-Identifier: MIT
"""The life of a consumer on a Redis server: its lease, and the recovery of those who died.

A consumer is an *owner* with a lease, a key that the server lets expire.  It is renewed three times
in its length or more often, whatever the tasks do, together with the scores that Celery's workers go
by.  When it is over, whoever keeps house next gives back what the owner held.

An owner also keeps a byte of a file locked in the folder for temporary files (`connections.owners`)
and a journal there of what its children began (`connections.starts`).  So on the same machine, for
the same user, its death is seen at once and nothing that was only handed out counts as started.
Others leave it half a lease longer to them.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import tempfile
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

from ..connections.owners import OwnerLocks
from ..connections.redis import Connection, Part, Script
from ..connections.redis_session import Op, pairs_of, pipeline, run_ops
from ..connections.starts import StartJournal
from ..exceptions import MiniqError
from ..text import host_name
from .base import pause_after_loss_s
from .redis_envelope import counted, decode_envelope, published_in
from .redis_link import Link

logger = logging.getLogger(__name__)

#: How many messages of a dead owner are given back in one step.
RECOVERED_AT_ONCE = 200
#: A journal of a dead owner that nobody has recovered for so long is of no more use.
OLD_JOURNAL_S = 7 * 86400.0

#: Renews a lease and the scores that Celery's workers go by.  KEYS: lease, owners, held, unacked_index; ARGV:
#: lease in ms, owner, what it says of itself, lease in s, what all lease keys begin with.
RENEW = Script(
    """
local call = redis.call
-- A full server lets a script go on writing that has begun with what frees memory.
call('HDEL', KEYS[2], '')
call('SET', KEYS[1], '1', 'PX', ARGV[1])
call('HSET', KEYS[2], ARGV[2], ARGV[3])
local ends = call('TIME')[1] + ARGV[4]
for _, id in ipairs(call('HKEYS', KEYS[3])) do
  call('ZADD', KEYS[4], 'XX', ends, id)
end
local owners = call('HGETALL', KEYS[2])
local dead = {}
for n = 1, #owners, 2 do
  if call('EXISTS', ARGV[5] .. owners[n]) == 0 then dead[#dead + 1] = owners[n] end
end
return {owners, dead}
"""
)


class Ownership:
    """A consumer as an owner of messages."""

    def __init__(self, link: Link, node: str, queues: Dict[str, Any]) -> None:
        self.node = node
        #: The consumer's queues by name, as they change.
        self.queues = queues
        self.lease_s: float = link.options.lease
        self._link = link
        self._layout = link.layout
        self._wall = link.wall
        self._dead_since: Dict[str, float] = {}
        #: Queues of ours that the server did not know at the last look, as after FLUSHALL.
        self.forgotten: List[str] = []
        #: Where durations are measured; a simulation has a clock of its own.
        self.mono: Callable[[], float] = time.monotonic
        self._renewed_mono = 0.0
        self._number = int.from_bytes(os.urandom(7), "big") >> 2
        self.owner = f"{self._number:014x}"
        #: Where children note what they begin; None where there is no such place.
        self.journal: Optional[StartJournal] = None
        self._locks: Optional[OwnerLocks] = None
        self._open_files()

    def _open_files(self) -> None:
        """Let others on this machine see that this owner lives, where there is a place for it."""
        try:
            locks = OwnerLocks.of(local_path())
            locks.take(self._number)
            self._locks = locks
            self.journal = StartJournal(_journal_path(self.owner), create=True)
            self._clear_away()
        except (OSError, MiniqError) as error:
            logger.debug("no file can tell others on this machine that this worker lives: %s", error)

    def _clear_away(self) -> None:
        """Remove journals of the dead that no server asks for any more."""
        for path in glob.glob(glob.escape(_journal_path("")) + "*"):
            owner = path[len(_journal_path("")) :]
            if os.path.getmtime(path) < time.time() - OLD_JOURNAL_S and self._died_here(owner):
                _remove(path)

    def recover_the_dead(self, limit: int, rand: Callable[[], float]) -> int:
        """Renew the lease, then give back what dead owners held; return how many messages that were.

        `limit` is the delivery limit, `rand` gives the chance in pauses.
        """
        owners, dead = self.renew()
        now, mono = self._wall(), self.mono()
        total = 0
        for owner, info in owners.items():
            if owner == self.owner:
                continue
            died_here = self._died_here(owner)
            if owner not in dead and not died_here:
                self._dead_since.pop(owner, None)
                continue
            since = self._dead_since.setdefault(owner, mono)
            # What its children had begun is written on its own machine: somebody there comes first.  And
            # where the server was away for longer than a lease, those who live must come to renew theirs.
            if info.get("journal") and not died_here and mono - since < self.lease_s / 2:
                continue
            if owner not in dead:
                with self._link.using() as connection:
                    connection.call("DEL", self._layout.alive(owner))
            count = self._recover(owner, str(info.get("node")), self._layout.alive(owner), limit, rand)
            self._dead_since.pop(owner, None)
            total += count
            if count:
                logger.warning("worker %s is gone: %d messages of it are recovered", info.get("node"), count)
        self._expire(owners, now)
        return total

    def close(self, limit: int, rand: Callable[[], float]) -> None:
        """Give back what this owner holds and be no owner any more."""
        self._recover(self.owner, self.node, None, limit, rand)
        with self._link.using() as connection:
            connection.call("DEL", self._layout.alive(self.owner))

    def forget(self) -> None:
        """Let go of the files."""
        if self.journal is not None:
            self._drop_journal(self.journal)
        if self._locks is not None:
            self._locks.drop(self._number)

    def _died_here(self, owner: str) -> bool:
        """Say whether an owner on this machine is known to be dead: its file is here, its lock is free."""
        if self._locks is None or not os.path.exists(_journal_path(owner)):
            return False
        try:
            return not self._locks.is_alive(int(owner, 16))
        except (ValueError, MiniqError):
            return False

    def renew_in_time(self) -> None:
        """Renew the lease if a third of it is over."""
        if self.mono() - self._renewed_mono >= self.lease_s / 3:
            self.renew()

    def renew(self) -> Tuple[Dict[str, Dict[str, Any]], Set[str]]:
        """Renew the lease; return all owners with what they say of themselves, and those that are dead."""
        layout = self._layout
        self._keep_files()
        info = {
            "node": self.node,
            "host": host_name(),
            "pid": os.getpid(),
            "journal": self.journal is not None,
            "queues": sorted(self.queues),
        }
        keys = [layout.alive(self.owner), layout.owners, layout.held(self.owner), layout.index]
        lease_ms = int(self.lease_s * 1000)
        args: List[Part] = [lease_ms, self.owner, json.dumps(info), self.lease_s, layout.alive("")]
        with self._link.using() as connection:
            found, dead = connection.run(RENEW, keys, args)
        self._renewed_mono = self.mono()
        owners = {}
        for name, text in pairs_of(found):
            try:
                owners[name.decode()] = dict(json.loads(text))
            except (ValueError, TypeError):
                owners[name.decode()] = {}
        return owners, {name.decode() for name in dead}

    def _keep_files(self) -> None:
        """See to it that nobody clears our files away for being old."""
        try:
            if self._locks is not None:
                self._locks.keep()
            if self.journal is not None:
                os.utime(self.journal.path)
        except (OSError, MiniqError) as error:
            logger.debug("others on this machine cannot be told that this worker lives: %s", error)

    def _recover(
        self, owner: str, node: str, guard: Optional[str], limit: int, rand: Callable[[], float]
    ) -> int:
        """Give back what an owner held; return how many messages that were.

        With `guard`, the key of its lease, nothing is done to an owner that lives after all.
        """
        layout = self._layout
        # One who only stood still goes on: what its children have not begun yet, they may begin now.
        journal = self._journal_of(owner) if owner == self.owner or self._died_here(owner) else None
        now = self._wall()
        guards: List[Op] = [("dead", guard)] if guard is not None else []
        count = 0
        with self._link.using() as connection:
            found = connection.call("HGETALL", layout.held(owner))
            states = sorted(
                ((id_.decode(), state.decode()) for id_, state in pairs_of(found)),
                key=_by_number,
                reverse=True,
            )
            for start in range(0, len(states), RECOVERED_AT_ONCE):
                part = states[start : start + RECOVERED_AT_ONCE]
                values = connection.call("HMGET", layout.unacked, *(id_ for id_, _ in part))
                ops = [
                    self._recovery(owner, node, id_, state, value, journal, limit, rand)
                    for (id_, state), value in zip(part, values)
                ]
                gone, _ = run_ops(connection, guards + ops, None, layout)
                if gone:
                    return count
                count += sum(value is not None for value in values)
            info = connection.call("HGET", layout.owners, owner)
            for queue in json.loads(info or b"{}").get("queues", ()):
                self.leave(connection, queue, owner, now)
            end: List[Op] = [
                ("do", "HDEL", layout.owners, owner),
                ("do", "UNLINK", layout.held(owner)),
            ]
            run_ops(connection, guards + end, None, layout)
        if journal is not None and owner != self.owner:
            self._drop_journal(journal)
        return count

    def _recovery(
        self, owner: str, node: str, id_: str, state: str, value: Optional[bytes],
        journal: Optional[StartJournal], limit: int, rand: Callable[[], float],
    ) -> Op:  # fmt: skip
        """Return what is done with one message of a dead owner."""
        layout = self._layout
        head, tail, list_ = state.split("|", 2)
        kind, token = head[0], head[1:]
        begun = kind != "r" and not (token and journal is not None and not journal.has_begun(int(token)))
        if value is None or not begun:
            return ("back", owner, id_)
        item = value[1 : -int(tail)]
        try:
            found = decode_envelope(item)
            queue = json.loads(value[-int(tail) : -1].decode()[6:])
        except ValueError:
            return ("back", owner, id_)
        starts = found.starts + 1
        if found.lost_by:
            item = counted(found, starts, found.lost_by, found.queue)
            return ("swap", owner, id_, "RPUSH", list_, item)
        if kind == "e" or (limit and starts >= limit):
            return ("swap", owner, id_, "LPUSH", layout.lost, counted(found, starts, node, queue))
        item = counted(found, starts)
        pause_s = pause_after_loss_s(starts, rand())
        if pause_s:
            member = list_.encode() + b"\0" + item
            return ("swap", owner, id_, "ZADD", layout.parked(queue), repr(self._wall() + pause_s), member)
        return ("swap", owner, id_, "RPUSH", list_, item)

    def _journal_of(self, owner: str) -> Optional[StartJournal]:
        """Return what an owner's children noted; None = nobody knows."""
        if owner == self.owner:
            return self.journal
        path = _journal_path(owner)
        try:
            return StartJournal(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning(
                "%r cannot be used (%s): all that was marked as started counts as started", path, error
            )
            return None

    @staticmethod
    def _drop_journal(journal: StartJournal) -> None:
        journal.close()
        _remove(journal.path)

    def _expire(self, owners: Dict[str, Dict[str, Any]], now: float) -> None:
        """Delete revocations, queues and messages that are past their time."""
        layout = self._layout
        with self._link.using() as connection:
            _, found = pipeline(
                connection,
                [("ZREMRANGEBYSCORE", layout.revoked, "-inf", repr(now)), ("HGETALL", layout.queues)],
            )
            pairs = pairs_of(found)
            known = {name.decode("utf-8", "replace") for name, _ in pairs}
            self.forgotten = [name for name in self.queues if name not in known]
            for name_bytes, text in pairs:
                name = name_bytes.decode("utf-8", "replace")
                try:
                    settings = dict(json.loads(text))
                except (ValueError, TypeError):
                    continue
                expires, ttl = settings.get("expires"), settings.get("message_ttl")
                used = any(name in info.get("queues", ()) for info in owners.values())
                if expires is not None and not used and settings.get("used", now) + expires <= now:
                    self._delete_queue(connection, name)
                elif ttl is not None:
                    self._expire_messages(connection, name, now - ttl)

    def _expire_messages(self, connection: Connection, queue: str, before: float) -> None:
        """Drop what was sent before that moment from the ends where it is taken."""
        lists = self._layout.lists(queue)
        for key, items in zip(lists, pipeline(connection, [("LRANGE", key, -200, -1) for key in lists])):
            old = [item for item in items if (published_in(item) or before + 1) <= before]
            if old:
                pipeline(connection, [("LREM", key, -1, item) for item in old])

    def leave(self, connection: Connection, queue: str, leaving: str, now: float) -> None:
        """Delete a queue that goes with its last consumer, or start its time to expire."""
        layout = self._layout
        text = connection.call("HGET", layout.queues, queue)
        if text is None:
            return
        settings = dict(json.loads(text))
        if not settings.get("auto_delete") and settings.get("expires") is None:
            return
        found = connection.call("HGETALL", layout.owners)
        for name, info in pairs_of(found):
            if name.decode() != leaving and queue in json.loads(info).get("queues", ()):
                return
        if settings.get("auto_delete"):
            self._delete_queue(connection, queue)
        else:
            connection.call("HSET", layout.queues, queue, json.dumps({**settings, "used": now}))

    def _delete_queue(self, connection: Connection, name: str) -> None:
        layout = self._layout
        commands: List[Sequence[Any]] = [
            ("HDEL", layout.queues, name),
            ("UNLINK", *layout.lists(name), layout.parked(name)),
        ]
        settings = connection.call("HGET", layout.queues, name)
        for member, exchange in json.loads(settings or b"{}").get("bindings", ()):
            commands += [("SREM", key, member) for key in layout.bindings(exchange)]
        pipeline(connection, commands)


def local_path() -> str:
    """Return what the names of this user's files begin with."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    return os.path.join(tempfile.gettempdir(), f"miniq-{user}")


def _journal_path(owner: str) -> str:
    return f"{local_path()}-starts-{owner}"


def _number_of(id_: str) -> int:
    return int(id_.rpartition(":")[2])


def _by_number(pair: Tuple[str, str]) -> int:
    return _number_of(pair[0])


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError as error:
        logger.debug("%r stays: %s", path, error)

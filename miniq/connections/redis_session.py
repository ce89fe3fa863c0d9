# SPDX-License-Identifier: MIT
"""What happens together on a Redis database: operations, collected and run as one script.

A `Session` is a thread's open transaction.  The transport adds what it publishes and settles, the
result backend on the same database adds what it stores, and all of it is sent as one script: one
round trip, atomic.  The script first looks whether every message that is to be settled or started
still belongs to its owner; if one does not, nothing is done at all and its id is returned.  With a
`Claim` the script goes on to take messages, so a worker's turn costs two round trips: one to settle
and take, one to mark what starts.

Where a message is while an owner (a worker's consumer) holds it:

    unacked             hash  id -> [envelope, "", queue]: what Celery's workers restore
    unacked_index       zset  id -> epoch seconds at which the owner's lease ends, unless it is renewed;
                              Celery's workers go by it, so one that was acknowledged at its start is
                              not in it: nobody may run that again
    _miniq.held.OWNER   hash  id -> state, token, length of the value's tail, list it came from

States: r reserved, l started (late ack), e started (early ack).  An id is OWNER:number.  A Celery
worker that finds a lease long over puts the message back, and then it is not the owner's any more.
"""

from __future__ import annotations

import os
import threading
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from .claims import ClaimLost
from .redis import Connection, Options, Part, ReplyError, Script, Server

#: A code of `RUN` and its arguments.
Op = Tuple[Part, ...]

#: Messages that one claim takes at most.
MOST_CLAIMED = 500

#: ARGV: prefix, number of operations, number of groups; each operation as code, number of arguments,
#: arguments; each group (`Settle`) as owner, three counts, ids, tokens of those that start; the claim.
#: Reply: ids that are not their owner's any more, and if there are none what was claimed.
#:
#:     store KEY BODY PX STATE       a result, where its state may replace what is there
#:     do COMMAND ...                any command
#:     back OWNER ID                 to where it is taken from next
#:     park OWNER ID KEY DUE         into a sorted set until it is due
#:     drop OWNER ID                 away
#:     swap OWNER ID COMMAND ...     away, and the command instead
#:     dead KEY                      nothing at all is done if this key exists: its owner lives
#:     claim KEY TOKEN GROUP         nothing at all is done if this key does not hold the token: another
#:                                   one ends the chord
#:
#: Operations pass over messages that are not the owner's any more; groups must not hold such a one.
RUN = Script(
    """
local call = redis.call
local unacked, index, prefix = KEYS[1], KEYS[2], ARGV[1]
local held = prefix .. '_miniq.held.'
local FINAL = {SUCCESS = true, FAILURE = true, REVOKED = true}
local UNREADY = {PENDING = true, RECEIVED = true, STARTED = true, REJECTED = true, RETRY = true}

-- Lua hands some 8000 values over at most; even, for pairs.
local MOST = 4000

local function in_parts(command, key, values, first, last)
  if last - first < MOST then return call(command, key, unpack(values, first, last)) end
  local found = {}
  for n = first, last, MOST do
    local part = call(command, key, unpack(values, n, math.min(n + MOST - 1, last)))
    if type(part) == 'table' then
      for m = 1, #part do found[#found + 1] = part[m] end
    end
  end
  return found
end

local function remove(owner, id, state)
  call('HDEL', held .. owner, id)
  call('HDEL', unacked, id)
  if string.byte(state) ~= 101 then call('ZREM', index, id) end
end

local function find(owner, id)
  local state = call('HGET', held .. owner, id)
  if not state then return nil end
  local value = call('HGET', unacked, id)
  local tail, list = string.match(state, '^%a%d*|(%d+)|(.*)$')
  call('LLEN', list) -- an error comes before it is removed
  return state, value and string.sub(value, 2, -1 - tail), list
end

local function state_of(key, value)
  local state = string.match(value, '^{"status": "([^"]*)"')
  if state then return state end
  if string.sub(value, 1, 19) == '\\0celery-compressed\\0' then
    -- One of Celery's does not tell: only what is final may replace it.
    return call('GET', '_miniq.state.' .. key) or 'FAILURE'
  end
  local at = string.find(value, 'status', 1, true)
  local near = at and string.sub(value, at + 6, at + 46) or ''
  local first = 1 / 0
  for name in pairs(FINAL) do
    local found = string.find(near, name, 1, true)
    if found and found < first then first, state = found, name end
  end
  return state or ''
end

local function store(key, body, px, state)
  local old = call('GET', key)
  if old then
    local had = state_of(key, old)
    if had == 'SUCCESS' or (FINAL[had] and not FINAL[state]) then return end
    if state == 'STARTED' and not UNREADY[had] then return end
  end
  local sidecar = '_miniq.state.' .. key
  local compressed = string.sub(body, 1, 19) == '\\0celery-compressed\\0'
  if px == '' then
    call('SET', key, body)
    if compressed then call('SET', sidecar, state) end
  else
    call('SET', key, body, 'PX', px)
    if compressed then call('SET', sidecar, state, 'PX', px) end
  end
  call('PUBLISH', key, body)
end

local ops, groups = tonumber(ARGV[2]), tonumber(ARGV[3])
local gone, lost = {}, {}
local at = 4
for _ = 1, ops do
  local code = ARGV[at]
  if code == 'dead' then
    if call('EXISTS', ARGV[at + 2]) == 1 then gone[1] = 'alive' end
  elseif code == 'claim' then
    if call('GET', ARGV[at + 2]) ~= ARGV[at + 3] then lost[#lost + 1] = ARGV[at + 4] end
  -- An error undoes nothing that was done before it: keys of another type are found before anything is.
  elseif code == 'store' then
    call('STRLEN', ARGV[at + 2])
  elseif code == 'do' and string.sub(ARGV[at + 2], -4) == 'PUSH' then
    call('LLEN', ARGV[at + 3])
  end
  at = at + 2 + ARGV[at + 1]
end
-- What is to be settled and started, of one owner each: is all of it still the owner's?
local settled = {}
for n = 1, groups do
  local owner, ends = ARGV[at], tonumber(ARGV[at + 1])
  local late, early = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local first, last = at + 4, at + 3 + ends + late + early
  local states = in_parts('HMGET', held .. owner, ARGV, first, last)
  local scores = in_parts('ZMSCORE', index, ARGV, first, last)
  for m = 1, #states do
    if not states[m] or (string.byte(states[m]) ~= 101 and not scores[m]) then
      gone[#gone + 1] = ARGV[first + m - 1]
    end
  end
  settled[n] = {owner, ends, late, first, states}
  at = last + 1 + late + early
end
if #gone + #lost > 0 then return {gone, lost} end
-- A full server lets a script go on writing that has begun with what frees memory: work must go on there.
if groups > 0 then call('HDEL', unacked, '') end
local claim = at

at = 4
for _ = 1, ops do
  local code, owner, id = ARGV[at], ARGV[at + 2], ARGV[at + 3]
  local last = at + 1 + ARGV[at + 1]
  if code == 'do' then
    call(unpack(ARGV, at + 2, last))
  elseif code == 'store' then
    store(ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], ARGV[at + 5])
  elseif code ~= 'dead' and code ~= 'claim' then
    -- These do nothing where the message is not the owner's any more.
    local state, item, list = find(owner, id)
    if state then remove(owner, id, state) end
    if item and code == 'back' then
      call('RPUSH', list, item)
    elseif item and code == 'park' then
      call('ZADD', ARGV[at + 4], ARGV[at + 5], list .. '\\0' .. item)
    elseif item and code == 'swap' then
      call(unpack(ARGV, at + 4, last))
    end
  end
  at = last + 1
end

for n = 1, groups do
  local owner, ends, late, first, states = unpack(settled[n])
  local there, changed = {}, {}
  for m = 1, #states do
    local id, is_early = ARGV[first + m - 1], string.byte(states[m]) == 101
    if m > ends then
      local token = ARGV[first + #states + m - ends - 1]
      changed[#changed + 1] = id
      changed[#changed + 1] = (m <= ends + late and 'l' or 'e') .. token .. string.match(states[m], '|.*$')
    end
    -- An early one may have left the index by a step whose answer got lost.
    if not is_early and (m <= ends or m > ends + late) then there[#there + 1] = id end
  end
  if ends > 0 then
    in_parts('HDEL', held .. owner, ARGV, first, first + ends - 1)
    in_parts('HDEL', unacked, ARGV, first, first + ends - 1)
  end
  if #changed > 0 then in_parts('HSET', held .. owner, changed, 1, #changed) end
  if #there > 0 then in_parts('ZREM', index, there, 1, #there) end
end

at = claim
local limit = tonumber(ARGV[at] or 0)
if limit == 0 then return {gone} end
local owner, number, lease, now = ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
local track, lists = ARGV[at + 5], tonumber(ARGV[at + 6])
at = at + 6

-- What is due goes where it is taken from, the latest first, so that the earliest is taken first.
local next_due = false
local bad = {} -- keys that are no lists: another program's
for n = 3 + lists, #KEYS do
  local first = call('ZRANGE', KEYS[n], 0, 0, 'WITHSCORES')
  while first[2] and tonumber(first[2]) <= tonumber(now) do
    local due = call('ZRANGE', KEYS[n], now, '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, 500)
    for m = 1, #due do
      local cut = string.find(due[m], '\\0', 1, true)
      local list = string.sub(due[m], 1, cut - 1)
      -- Removed first: a full server lets that go through, and then what follows.
      call('ZREM', KEYS[n], due[m])
      if type(redis.pcall('RPUSH', list, string.sub(due[m], cut + 1))) == 'table' then
        bad[#bad + 1] = list
        call('ZADD', KEYS[n], now + 60, due[m])
      end
    end
    first = call('ZRANGE', KEYS[n], 0, 0, 'WITHSCORES')
  end
  if first[2] and (not next_due or tonumber(first[2]) < tonumber(next_due)) then next_due = first[2] end
end

-- Of another type, these raise before anything is taken.
call('HLEN', unacked)
call('ZCARD', index)
local found = {}
local values, scores, states = {}, {}, {}
local ends
for n = 1, lists do
  local items = limit > 0 and redis.pcall('RPOP', KEYS[n + 2], limit)
  if items and items.err then
    bad[#bad + 1] = KEYS[n + 2]
  elseif items then
    if not ends then ends = call('TIME')[1] + lease end
    local tail = ', "", ' .. cjson.encode(ARGV[at + n]) .. ']'
    local state = 'r|' .. #tail .. '|' .. KEYS[n + 2]
    for m = 1, #items do
      local id = owner .. ':' .. string.format('%.0f', number)
      number = number + 1
      values[#values + 1] = id
      values[#values + 1] = '[' .. items[m] .. tail
      scores[#scores + 1] = ends
      scores[#scores + 1] = id
      states[#states + 1] = id
      states[#states + 1] = state
      found[#found + 1] = n - 1
      found[#found + 1] = items[m]
    end
    limit = limit - #items
  end
end
if #found > 0 then
  call('HSET', unacked, unpack(values))
  call('ZADD', index, unpack(scores))
  call('HSET', held .. owner, unpack(states))
  -- One who was taken for dead meanwhile: somebody must know of him when he really is.
  call('HSETNX', prefix .. '_miniq.owners', owner, '{"journal": true}')
end
-- Remembered by the server for this connection: it tells when one of them changes.
if limit > 0 and track == '1' then call('EXISTS', unpack(KEYS, 3)) end
return {gone, next_due, call('EXISTS', prefix .. '_miniq.revoked'), found, bad}
"""
)


class Layout:
    """The names of keys on one database, Celery's and ours."""

    def __init__(self, options: Options) -> None:
        prefix = self.prefix = options.global_keyprefix
        self.unacked = prefix + options.unacked_key
        self.index = prefix + options.unacked_index_key
        self.lost = prefix + "_miniq.lost"
        self.dead = prefix + "_miniq.dead"
        self.dead_index = prefix + "_miniq.dead_index"
        self.revoked = prefix + "_miniq.revoked"
        self.queues = prefix + "_miniq.queues"
        self.owners = prefix + "_miniq.owners"
        self.exchanges = prefix + "_miniq.exchanges"
        self.steps = sorted(options.priority_steps)
        self.sep = options.sep

    def lists(self, queue: str) -> List[str]:
        """Return the lists of a queue, the one that is served first at the beginning."""
        name = self.prefix + queue
        return [name if step == 0 else f"{name}{self.sep}{step}" for step in self.steps]

    def list_for(self, queue: str, priority: int) -> str:
        """Return the list for a priority: the steps are lower bounds."""
        chosen = self.steps[0]
        for step in self.steps:
            if step <= priority:
                chosen = step
        name = self.prefix + queue
        return f"{name}{self.sep}{chosen}" if chosen else name

    def parked(self, queue: str) -> str:
        """Return the sorted set of what is not due yet: score = when, member = list NUL item."""
        return f"{self.prefix}_miniq.parked.{queue}"

    def alive(self, owner: str) -> str:
        """Return the key that exists while the owner lives."""
        return f"{self.prefix}_miniq.alive.{owner}"

    def held(self, owner: str) -> str:
        """Return the hash of what the owner holds."""
        return f"{self.prefix}_miniq.held.{owner}"

    def bindings(self, exchange: str) -> Tuple[str, str]:
        """Return Celery's sets of the bindings of an exchange."""
        return (
            f"{self.prefix}_kombu.binding.{exchange}",
            f"{self.prefix}_kombu.binding_permanent.{exchange}",
        )


class Claim(NamedTuple):
    """What is to be taken: at most `limit` from `lists`, the first ones first."""

    owner: str
    limit: int
    number: int  #: the first id is OWNER:number
    lease_s: float
    now: float
    track: bool  #: let the server tell this connection when something comes, if less than `limit` is there
    lists: Sequence[str]
    queues: Sequence[str]  #: the queue of each list
    parked: Sequence[str]


class Claimed(NamedTuple):
    """What was taken: (number of the list, item) in the order of their ids."""

    next_due: Optional[float]
    any_revoked: bool
    items: List[Tuple[int, bytes]]
    bad: List[bytes]  #: keys of another type, passed over


class Settle:
    """What is settled (`ends`) and what starts, of one owner: ids, and (id, token) pairs."""

    __slots__ = ("ends", "late", "early")

    def __init__(self) -> None:
        self.ends: List[str] = []
        self.late: List[Tuple[str, Part]] = []
        self.early: List[Tuple[str, Part]] = []


def store_op(key: str, body: bytes, expires_s: Optional[float], state: str) -> Op:
    """Return the operation that writes a result where its state may replace what is there."""
    return ("store", key, body, "" if expires_s is None else max(1, int(expires_s * 1000)), state)


NO_SETTLES: Mapping[str, Settle] = {}


def run_ops(
    connection: Connection,
    ops: Sequence[Op],
    timeout_s: Optional[float] = None,
    layout: Optional[Layout] = None,
    claim: Optional[Claim] = None,
    settles: Mapping[str, Settle] = NO_SETTLES,
) -> Tuple[List[bytes], Claimed]:
    """Run operations, then a claim; return what of the operations is not its owner's, and the catch.

    If there is such an id, nothing was done; nor is it where `ClaimLost` is raised.  Stores need no
    `layout`.
    """
    keys: List[Part] = ["unacked", "unacked_index"] if layout is None else [layout.unacked, layout.index]
    args: List[Part] = ["" if layout is None else layout.prefix, len(ops), len(settles)]
    for op in ops:
        args.append(op[0])
        args.append(len(op) - 1)
        args += op[1:]
    for owner, settle in settles.items():
        args += (owner, len(settle.ends), len(settle.late), len(settle.early), *settle.ends)
        starts = settle.late + settle.early
        args += [id_ for id_, _ in starts]
        args += [token for _, token in starts]
    if claim is not None:
        keys += claim.lists
        keys += claim.parked
        args += (
            min(claim.limit, MOST_CLAIMED),
            claim.owner,
            claim.number,
            claim.lease_s,
            repr(claim.now),
            int(claim.track),
            len(claim.lists),
        )
        args += claim.queues
    reply: List[Any] = connection.run(RUN, keys, args, timeout_s=timeout_s)
    if len(reply) < 4:
        if len(reply) == 2 and not reply[0]:
            raise ClaimLost([group_id.decode() for group_id in reply[1]])
        return reply[0], _NOTHING
    _, due, revoked, found, bad = reply
    return reply[0], Claimed(
        None if due is None else float(due), bool(revoked), list(zip(found[::2], found[1::2])), bad
    )


def pipeline(
    connection: Connection, commands: Sequence[Sequence[Part]], timeout_s: Optional[float] = None
) -> List[Any]:
    """Send commands in one write; return the replies, raise the first error, within EXEC's reply too."""
    replies = connection.pipeline(commands, timeout_s=timeout_s)
    for command, reply in zip(commands, replies):
        for one in reply if isinstance(reply, list) else (reply,):
            if isinstance(one, ReplyError):
                raise connection.translated(one, command[0]) from one
    return replies


def pairs_of(reply: Any) -> List[Tuple[Any, Any]]:
    """Return the pairs of a reply that is a map: a dict with RESP3, else a flat list, as from scripts."""
    return list(reply.items()) if isinstance(reply, dict) else list(zip(reply[::2], reply[1::2]))


_NOTHING = Claimed(None, False, [], [])


class Session:
    """A thread's operations on one database, collected while a transaction is open."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.depth = 0
        self.ops: List[Op] = []
        #: Owner -> what of it is settled and started.
        self.settles: Dict[str, Settle] = {}
        self._key: Optional[Tuple[Any, ...]] = None

    @classmethod
    def joined(cls, server: Server) -> "Optional[Session]":
        """Return this thread's open transaction on the same database, None where there is none."""
        return _open.get((os.getpid(), threading.get_ident(), server.key))

    def open(self) -> None:
        """Let others of this thread join."""
        self._key = (os.getpid(), threading.get_ident(), self.server.key)
        _open[self._key] = self

    def clear(self) -> None:
        """Forget what was collected."""
        self.ops.clear()
        self.settles.clear()

    def close(self) -> None:
        """Stop collecting; what was not sent is forgotten."""
        self.clear()
        if self._key is not None:
            _open.pop(self._key, None)
            self._key = None

    @property
    def is_empty(self) -> bool:
        """Say whether nothing was collected."""
        return not (self.ops or self.settles)

    def add(self, op: Op) -> None:
        """Have it done at the next step."""
        self.ops.append(op)

    def settle(self, owner: str) -> Settle:
        """Return what is settled and started of an owner at the next step, to be added to."""
        found = self.settles.get(owner)
        if found is None:
            found = self.settles[owner] = Settle()
        return found

    def forget_start(self, owner: str, id_: str) -> None:
        """Do not start what is settled or given back in the same step."""
        found = self.settles.get(owner)
        if found is None or not (found.late or found.early):
            return
        found.late = [pair for pair in found.late if pair[0] != id_]
        found.early = [pair for pair in found.early if pair[0] != id_]
        if not (found.ends or found.late or found.early):
            del self.settles[owner]


_open: Dict[Tuple[Any, ...], Session] = {}

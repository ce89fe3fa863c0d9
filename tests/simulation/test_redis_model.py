# SPDX-License-Identifier: MIT
"""The model of a Redis server against a real one: the same random steps, the same replies and keys."""

from __future__ import annotations

import random
import time
from typing import Any, Dict, List, Sequence, Tuple, cast

import pytest
from simulation.redis_model import Database

from miniq.connections.redis import Connection, Options, Part, Server
from miniq.connections.redis_session import RUN, Claim, Layout, Op, Settle, run_ops, store_op
from miniq.transports.redis_upkeep import RENEW

SEEDS, STEPS = 8, 60
OWNERS = ("a", "b")
#: Longer than the test takes.
LEASE_S = 1000.0
STATES = ("STARTED", "RETRY", "REVOKED", "FAILURE", "SUCCESS")


class Modelled:
    """The model in the place of a connection."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def run(self, script: Any, keys: Sequence[Part], args: Sequence[Part], timeout_s: Any = None) -> Any:
        work = self.database.run if script is RUN else self.database.renew
        return work(None, keys, args)


class Steps:
    """Draws steps in which most of what is named is there."""

    def __init__(self, seed: int, database: Database, now: float) -> None:
        self.random: Any = random.Random(seed)
        self.database = database
        self.layout = database.layout
        self.now = now
        #: The next number of each owner.
        self.numbers = dict.fromkeys(OWNERS, 0)
        self.items = 0

    def _item(self) -> bytes:
        self.items += 1
        return b'{"number": %d}' % self.items

    def _list(self) -> str:
        return str(self.random.choice(self.layout.lists("work")))

    def _id(self, owner: str) -> str:
        held = self.database.get(self.layout.held(owner).encode())
        if held and self.random.random() < 0.9:
            return str(self.random.choice(sorted(held)).decode())
        return f"{owner}:{self.random.randrange(self.numbers[owner] + 1)}"

    def op(self) -> Op:
        """Return one operation."""
        draw, parked = self.random, self.layout.parked("work")
        kind = draw.choice(("push", "push", "later", "back", "park", "drop", "swap", "dead", "store"))
        owner = draw.choice(OWNERS)
        if kind == "push":
            return ("do", "LPUSH", self._list(), self._item(), self._item())
        if kind == "later":
            due = repr(self.now + draw.choice((-1, 0, LEASE_S)))
            return ("do", "ZADD", parked, due, self._list().encode() + b"\0" + self._item())
        if kind == "dead":
            return ("dead", self.layout.alive(draw.choice(("a", "c", "d", "e", "f"))))
        if kind == "store":
            state = draw.choice(STATES)
            body = b'{"status": "%s"}' % state.encode()
            return store_op(f"celery-task-meta-{draw.randrange(4)}", body, None, state)
        rest = {"park": (parked, repr(self.now + 1)), "swap": ("LPUSH", self.layout.lost, self._item())}
        return (kind, owner, self._id(owner), *rest.get(kind, ()))

    def settles(self) -> Dict[str, Settle]:
        """Return what is settled and started, of one owner or of both."""
        found = {}
        for owner in self.random.sample(OWNERS, self.random.choice((0, 1, 1, 2))):
            settle = found[owner] = Settle()
            ids = list(dict.fromkeys(self._id(owner) for _ in range(self.random.randint(1, 3))))
            for id_ in ids:
                kind = self.random.choice(("ends", "late", "early"))
                if kind == "ends":
                    settle.ends.append(id_)
                else:
                    starts = settle.late if kind == "late" else settle.early
                    starts.append((id_, self.random.choice(("", 7))))
        return found

    def claim(self) -> Claim:
        """Return a claim; `numbers` goes on with what it brings."""
        layout, owner = self.layout, self.random.choice(OWNERS)
        lists = [layout.lost, *layout.lists("work")]
        limit = self.random.choice((1, 2, 5))
        return Claim(
            owner, limit, self.numbers[owner], LEASE_S, self.now, False, lists,
            ["_miniq.lost"] + ["work"] * (len(lists) - 1), [layout.parked("work")],
        )  # fmt: skip


def everything(ask: Any, layout: Layout) -> Dict[bytes, Any]:
    """Return all keys with what they hold; of leases, which both clocks tell alike, not the end."""
    readers: Dict[bytes, Tuple[Any, ...]] = {
        b"string": ("GET",),
        b"hash": ("HGETALL",),
        b"list": ("LRANGE", 0, -1),
        b"zset": ("ZRANGE", 0, -1, "WITHSCORES"),
    }
    found = {}
    for key in ask("KEYS", "*"):
        name, *args = readers[ask("TYPE", key)]
        value = ask(name, key, *args)
        if name == "ZRANGE":
            value = dict(value)
        found[key] = sorted(value) if key == layout.index.encode() else value
    return found


def modelled(database: Database) -> Dict[bytes, Any]:
    """Return the same of the model."""
    found = {}
    for key in list(database.names):
        value = database.get(key)
        found[key] = value if isinstance(value, (bytes, dict)) else list(value)
    index = database.layout.index.encode()
    if index in found:
        found[index] = sorted(found[index])
    return found


@pytest.mark.parametrize("seed", range(SEEDS))
def test_model_replies_as_a_real_server_and_holds_the_same(redis_url: str, seed: int) -> None:
    options = Options.read({}, redis_url)
    layout = Layout(options)
    database = Database(time.time, layout)
    model = cast(Connection, Modelled(database))
    steps = Steps(seed, database, time.time())
    server = Server.of(redis_url, options)
    done = 0
    try:
        real = server.connect(5.0)
        for owner in OWNERS:
            keys = [layout.alive(owner), layout.owners, layout.held(owner), layout.index]
            args: List[Part] = [int(LEASE_S * 1000), owner, '{"node": "n"}', LEASE_S, layout.alive("")]
            told = real.run(RENEW, keys, args)
            assert model.run(RENEW, keys, args) == told
        for _ in range(STEPS):
            ops = [steps.op() for _ in range(steps.random.randint(0, 3))]
            settles, claim = steps.settles(), steps.random.choice((None, steps.claim(), steps.claim()))
            reply = run_ops(real, ops, None, layout, claim, settles)
            assert run_ops(model, ops, None, layout, claim, settles) == reply, f"seed {seed}: {ops} {claim}"
            if claim is not None:
                steps.numbers[claim.owner] += len(reply[1].items)
            done += not reply[0]
            assert modelled(database) == everything(real.call, layout), f"seed {seed}: after {ops} {claim}"
        real.close()
    finally:
        Server.close_all()
    assert done > STEPS / 4, f"seed {seed}: most steps settled what was not there"

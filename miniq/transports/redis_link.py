# SPDX-License-Identifier: MIT
"""A thread's link to a Redis broker: its connection, its open transaction, its steps.

A transport and its consumers share one.  Without consumers it borrows a connection of the process
for each use; with one it has a connection of its own.  Operations that are collected in a transaction
are done by the next `step`, in one script; an exception leaves undone what was added since.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Callable, Iterator, List, Optional, Protocol, Sequence

from ..connections.redis import Connection, Options, Server
from ..connections.redis_session import NO_SETTLES, Claim, Claimed, Layout, Op, Session, run_ops
from ..exceptions import OperationalError
from ..message import Delivery
from .base import NotOurs

#: Operations after which a list may hold more than before.
_PUSHING = frozenset({"do", "back", "swap"})


class HeldMessage(Protocol):
    """A message that takes part in a step, and is told what became of it."""

    id: str
    delivery: Optional[Delivery]
    doubted: bool

    def undo(self) -> None:
        """The step did not happen, or nobody knows."""

    def doubt(self) -> None:
        """The step may have happened: no answer came."""

    def done(self) -> None:
        """The step happened."""

    def let_go(self) -> None:
        """It is not this consumer's any more."""

    def give_back(self) -> None:
        """It was taken in a transaction that failed."""


class Listening(Protocol):
    """A consumer, as its link sees it."""

    node: str
    shares: bool  #: it listens on the link's own connection

    def on_connection(self, old: Optional[Connection], new: Connection) -> None:
        """The link's own connection is a new one; who shares it closes the old one."""

    def keep_alive(self) -> None:
        """Renew its lease, if it is time to."""

    def on_own_push(self) -> None:
        """Something was put into a list over this link."""


class Link:
    """One thread's way to a Redis server, for a transport and its consumers."""

    def __init__(self, url: str, options: Options, wall: Callable[[], float]) -> None:
        self.options = options
        self.layout = Layout(options)
        self.wall = wall
        self.consumers: List[Listening] = []
        self._url = url
        self._server: Optional[Server] = None
        self._pid = 0
        self._own: Optional[Connection] = None
        self._session: Optional[Session] = None
        #: What the next step of the open transaction settles or starts, and what was taken in it.
        self._touched: List[HeldMessage] = []
        self._taken: List[HeldMessage] = []

    # -- connections

    @property
    def server(self) -> Server:
        """The server, this process' way to it."""
        if self._server is None or self._pid != os.getpid():
            self._server = Server.of(self._url, self.options)
            self._pid = os.getpid()
            self._own = None
        return self._server

    def connect(self, name: str) -> Connection:
        """Return a new connection of the worker's own."""
        return self.server.connect(self.options.socket_connect_timeout, name)

    def connection(self) -> Connection:
        """Return the worker's own connection, made anew where it broke."""
        own = self._own if self.is_in_its_process else None
        if own is None or own.broken:
            name = self.consumers[0].node if self.consumers else ""
            self._own = self.connect(name)
            for consumer in self.consumers:
                consumer.on_connection(own, self._own)
            if own is not None and not any(consumer.shares for consumer in self.consumers):
                own.close()
        assert self._own is not None
        return self._own

    @contextmanager
    def using(self, timeout_s: Optional[float] = None) -> Iterator[Connection]:
        """Give a connection for some commands: the own one, or one of the process."""
        if self.consumers:
            yield self.connection()
        else:
            with self.server.borrow(timeout_s or self.options.socket_timeout) as connection:
                yield connection

    def close(self) -> None:
        """Let go of the own connection."""
        if self._own is not None:
            if self.is_in_its_process:
                self._own.close()
            self._own = None

    def channel(self, exchange: str, routing_key: str) -> str:
        """Return the PUB/SUB channel of a fanout exchange."""
        options = self.options
        prefix = options.fanout_prefix
        text = f"/{self.server.db}." if prefix is True else prefix or ""
        name = self.layout.prefix + text + exchange
        return f"{name}/{routing_key}" if routing_key and options.fanout_patterns else name

    # -- transactions

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Collect operations; what is left is done at the end."""
        session = self._session
        if session is None:
            session = self._session = Session(self.server)
            session.open()
        session.depth += 1
        try:
            yield
            if session.depth == 1 and not session.is_empty:
                self.step()
        except BaseException:
            if session.depth == 1:
                self._undo()
            raise
        finally:
            session.depth -= 1
            if session.depth == 0:
                session.close()
                self._session = None
                self._touched.clear()
                self._taken.clear()

    def _undo(self) -> None:
        for held in self._touched:
            held.undo()
        for held in reversed(self._taken):
            held.give_back()

    @property
    def session(self) -> Optional[Session]:
        """The open transaction."""
        return self._session

    @property
    def has_operations(self) -> bool:
        """Say whether something was collected that the next step does."""
        return self._session is not None and not self._session.is_empty

    @property
    def has_connection(self) -> bool:
        """Say whether there is a connection of its own that works."""
        return self.is_in_its_process and self._own is not None and not self._own.broken

    @property
    def is_in_its_process(self) -> bool:
        """Say whether this is still the process that opened it."""
        return self._pid in (0, os.getpid())

    def touch(self, held: HeldMessage) -> None:
        """Note a message that the open transaction settles or starts."""
        self._touched.append(held)

    def take(self, held: HeldMessage) -> None:
        """Note a message that was taken; it goes back if the transaction does not come to its end."""
        if self._session is not None:
            self._taken.append(held)

    def add(self, op: Op) -> None:
        """Do it with the open transaction."""
        assert self._session is not None
        self._session.add(op)

    def step(self, claim: Optional[Claim] = None, ops: Sequence[Op] = ()) -> Claimed:
        """Do `ops`, what was collected, and then the claim: one script.

        Raises `NotOurs`, and then nothing was done.
        """
        session = self._session
        todo: Sequence[Op] = ops
        settles = NO_SETTLES
        if session is not None:
            todo, settles = [*ops, *session.ops], session.settles
        with self.using() as connection:
            try:
                gone, claimed = run_ops(connection, todo, None, self.layout, claim, settles)
            except OperationalError:
                for held in self._touched:
                    held.doubt()
                raise
        if gone:
            names = {name.decode() for name in gone}
            lost = [held for held in self._touched if held.id in names]
            for held in lost:
                held.let_go()
            raise NotOurs(
                [held.delivery for held in lost if not held.doubted],
                [held.delivery for held in lost if held.doubted],
            )
        if claim is None and any(op[0] in _PUSHING for op in todo):
            self.tell_consumers()
        if session is not None:
            session.clear()
        for held in self._touched:
            held.done()
        self._touched.clear()
        return claimed

    def tell_consumers(self) -> None:
        """Let them look: the server does not tell a connection what came over it."""
        for consumer in self.consumers:
            consumer.on_own_push()

# SPDX-License-Identifier: MIT
"""The real Redis transport and result backend over a server in this process, with faults on the line.

Transport, consumer, link, session, ownership and result backend are the real ones; below them,
`SimConnection` takes the place of a socket.  A connection may be lost before a step is done, or after
it was done but before the answer came, or while nobody used it.  What was recorded becomes true with
the step that does it, not at the end of the transaction.
"""

from __future__ import annotations

import random
import re
from contextlib import contextmanager
from functools import partial
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
    Set,
    Tuple,
    TypeVar,
    cast,
)

from simulation.redis_model import Database, as_bytes
from simulation.seams import FIRST_FD, NUMBER, SimJournal, SimSelector
from simulation.world import Copy, World

from miniq.backends.redis import _LEFT_OVER, RedisBackend
from miniq.connections.redis import Connection, Options, Part, Script, Server
from miniq.connections.redis_session import RUN
from miniq.connections.starts import StartJournal
from miniq.exceptions import OperationalError
from miniq.routing import Queue
from miniq.transports.redis import RedisTransport
from miniq.transports.redis_consumer import RedisConsumer
from miniq.transports.redis_link import Link
from miniq.transports.redis_upkeep import RENEW, Ownership

T = TypeVar("T")

URL = "redis://simulation"
_NUMBER = re.compile(rb'"%s": (\d+)' % NUMBER.encode())
#: Commands that hand something over for good outside of a step.
_HANDING = frozenset({b"LPUSH", b"ZADD", b"EXEC"})


def number_in(item: bytes) -> Optional[int]:
    """Return the number of the task's message in a list item, None where it is another message."""
    found = _NUMBER.search(item)
    return int(found[1]) if found else None


class Machine:
    """What is in a machine's folder for temporary files: who lives there, and what children noted."""

    def __init__(self) -> None:
        self.living: Set[str] = set()
        self.journals: Dict[str, SimJournal] = {}


class Recorder:
    """Tells the world what the scripts do with messages."""

    def __init__(self, world: World) -> None:
        self.world = world
        #: Owner -> its worker.
        self.workers: Dict[str, str] = {}

    def _copy(self, item: bytes) -> Optional[Copy]:
        number = number_in(item)
        return None if number is None else self.world.copies[number]

    def started(self, owner: str, item: bytes) -> None:
        copy = self._copy(item)
        if copy is not None:
            self.world.marked(self.workers[owner], copy)

    def went_back(self, owner: str, item: bytes, was_started: bool) -> None:
        copy = self._copy(item)
        if copy is not None:
            self.world.released(self.workers[owner], copy, was_started)

    def ended(self, ids: List[bytes]) -> None:
        self.world.settled_ids.update(id_.decode() for id_ in ids)

    def was_lost(self, owner: str, item: bytes) -> None:
        copy = self._copy(item)
        if copy is not None:
            self.world.lost(self.workers[owner], copy, "its worker is gone, or was taken for it")


class SimConnection:
    """One connection; `kinds` are the faults that may strike it."""

    pushes = True

    def __init__(self, server: "SimServer") -> None:
        self.server = server
        self.broken = self._killed = False
        self.on_push: Optional[Callable[[Any], None]] = None
        self.tracking = False
        self.tracked: Set[bytes] = set()
        self.patterns: Set[bytes] = set()
        self._waiting: List[Any] = []
        self._fd = FIRST_FD + server.world.new_number()
        server.database.clients.append(self)

    # -- what the server pushes

    def push(self, push: List[Any]) -> None:
        if not self.server.deaf:
            self._waiting.append(push)
            self.server.readable.add(self._fd)

    def fileno(self) -> int:
        fd: int = self._fd
        return fd

    def take_pushes(self) -> None:
        if self.broken:
            raise OperationalError("simulated: it is broken")
        self._strike("listening")
        self._hear()
        if self._killed:
            self._find_killed()

    def kill(self) -> None:
        """Let the server close it."""
        self._killed = True
        self.server.readable.add(self._fd)
        self.server.database.clients.remove(self)

    def _find_killed(self) -> None:
        self.close()
        raise OperationalError("simulated: the server has closed the connection")

    def _hear(self) -> None:
        waiting, self._waiting = self._waiting, []
        self.server.readable.discard(self._fd)
        for push in waiting:
            if self.on_push is not None:
                self.on_push(push)

    # -- commands

    def call(self, *parts: Part, timeout_s: Optional[float] = None) -> Any:
        return self.pipeline([parts])[0]

    def pipeline(self, commands: Sequence[Sequence[Part]], timeout_s: Optional[float] = None) -> List[Any]:
        database = self.server.database
        hands_over = any(as_bytes(command[0]) in _HANDING for command in commands)
        return self._ask(
            "command", lambda: [database.do(self, command) for command in commands], hands_over
        )

    def run(
        self, script: Script, keys: Sequence[Part], args: Sequence[Part], timeout_s: Optional[float] = None
    ) -> Any:
        database = self.server.database
        if script is RENEW:
            return self._ask("renewal", partial(database.renew, self, keys, args), False)
        if script is _LEFT_OVER:
            return self._ask("look for chords", list, False)  # there are none here
        assert script is RUN
        return self._ask("step", partial(database.run, self, keys, args), True)

    def _ask(self, point: str, work: Callable[[], List[Any]], hands_over: bool) -> List[Any]:
        if self.broken:
            raise OperationalError("simulated: it is broken")
        if self._killed:
            self._find_killed()
        self._strike(point)
        reply = work()
        if hands_over and not (point == "step" and reply[0]):
            self.server.world.commit()
        self._strike(f"after the {point}")
        self._hear()
        return reply

    def _strike(self, point: str) -> None:
        server = self.server
        try:
            server.world.strike(server.who, point, *server.kinds)
        except OperationalError:
            self.close()
            raise

    def close(self) -> None:
        self.broken = True
        self.server.readable.discard(self._fd)
        if self in self.server.database.clients:
            self.server.database.clients.remove(self)


class SimServer:
    """The server as one worker or producer reaches it."""

    url = URL
    db = 0
    key = (URL,)

    def __init__(
        self,
        world: World,
        database: Database,
        who: str,
        kinds: Tuple[str, ...] = (),
        selector: Optional[SimSelector] = None,
    ) -> None:
        self.world = world
        self.database = database
        self.who = who
        self.kinds = kinds
        self.readable: Set[int] = set() if selector is None else selector.readable
        self.deaf = False
        self.connections: List[SimConnection] = []
        self._idle: List[SimConnection] = []

    def connect(self, timeout_s: float, name: str = "") -> Connection:
        if self.kinds:
            self.world.strike(self.who, "connecting", *self.kinds)
        made = SimConnection(self)
        self.connections.append(made)
        return cast(Connection, made)

    @contextmanager
    def borrow(self, timeout_s: float) -> Iterator[Connection]:
        connection = self._idle.pop() if self._idle else cast(SimConnection, self.connect(timeout_s))
        try:
            yield cast(Connection, connection)
        finally:
            if not connection.broken:
                self._idle.append(connection)

    def close(self) -> None:
        for connection in self.connections:
            connection.close()


class SimLink(Link):
    """The real link to a simulated server."""

    def __init__(
        self, server: SimServer, options: Options, machine: Optional[Machine], recorder: Recorder
    ) -> None:
        super().__init__(URL, options, server.world.now)
        self.sim_server = server
        self.machine = machine
        self.recorder = recorder

    @property
    def server(self) -> Server:
        return cast(Server, self.sim_server)


class SimOwnership(Ownership):
    """A real owner whose files are not written."""

    _link: SimLink

    def _open_files(self) -> None:
        link = self._link
        world = link.sim_server.world
        self.mono = lambda: world.t
        link.recorder.workers[self.owner] = link.sim_server.who
        if link.machine is not None:
            link.machine.living.add(self.owner)
            self.journal = cast(StartJournal, SimJournal(world))
            link.machine.journals[self.owner] = cast(SimJournal, self.journal)

    def _keep_files(self) -> None:
        pass

    def _died_here(self, owner: str) -> bool:
        machine = self._link.machine
        return machine is not None and owner in machine.journals and owner not in machine.living

    def _journal_of(self, owner: str) -> Optional[StartJournal]:
        machine = self._link.machine
        return None if machine is None else cast(Optional[StartJournal], machine.journals.get(owner))

    def forget(self) -> None:
        if self._link.machine is not None:
            self._link.machine.living.discard(self.owner)
            self._link.machine.journals.pop(self.owner, None)

    @staticmethod
    def _drop_journal(journal: StartJournal) -> None:
        pass


class SimRedisConsumer(RedisConsumer):
    """The real consumer as such an owner."""

    ownership_class = SimOwnership


class SimRedisTransport(RedisTransport):
    """The real transport on such a link."""

    def __init__(
        self, server: SimServer, options: Mapping[str, Any], machine: Optional[Machine], recorder: Recorder
    ) -> None:
        super().__init__(URL, options, server.world.now)
        self.link: SimLink = SimLink(server, Options.read(options, URL), machine, recorder)

    def consumer(self, node: str, queues: Iterable[Queue]) -> RedisConsumer:
        consumer = SimRedisConsumer(self.link, self.declare, node, queues, self._forget)
        consumer.random = random.Random(f"{self.link.sim_server.world.seed} {node}")
        self._consumers.append(consumer)
        return consumer


class SimRedisBackend(RedisBackend):
    """The real result backend on such a server."""

    def __init__(self, server: SimServer, options: Mapping[str, Any]) -> None:
        super().__init__(URL, options, server.world.now)
        self._server = cast(Server, server)

    def _twice(self, work: Callable[[Connection], T], timeout_s: Optional[float] = None) -> T:
        with self._server.borrow(0.0) as connection:
            return work(connection)

    def close(self) -> None:
        self._server.close()

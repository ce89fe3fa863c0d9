# SPDX-License-Identifier: MIT
"""``miniq migrate``: moves what waits on one broker to another one, of any kind.

A hundred messages at a time: taken from the source, published to the destination, which confirms that
it has them, and only then acknowledged.  Killed in between, what was taken goes back to the source: a
message may then be in both (under one id), and none is lost.  Ids, headers, priorities and ETAs stay as
they are; what is not due waits on the other side.

SQLite, memory and Redis give out what is not due if their clock says so: it is wound forward from one
ETA to the next, so that nothing else ages.  From RabbitMQ everything is taken with basic.get, also from
the queues in which messages wait there (`transports.amqp_delay`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from ..app import MiniQ
from ..connections.amqp import Channel, ChannelError, Connection, Options, Server
from ..exceptions import MiniqError
from ..progress import Meter
from ..routing import Queue
from ..text import mask_url
from ..transports.amqp_delay import LEVELS, MAX_LEVEL, ladder_name, native_name, strip_prefix
from ..transports.amqp_message import from_content, take_marks
from ..transports.base import TRANSPORTS, Publication, Transport, transport_class
from .arguments import count_or_0, seconds_or_0
from .commands import is_private

#: Messages that are published together.
BATCH = 100
#: Seconds between two looks at a source that is empty.
LOOK_INTERVAL_S = 0.5
#: Seconds that revoked ids stay revoked at the destination: as long as a revocation lasts.
REVOKED_S = 3 * 3600.0
#: A clock is wound this much past the moment at which a message is due.
_AFTER_DUE_S = 0.001

EPILOG = """\
A message is acknowledged at the source when the destination has it: nothing is lost if the command is
killed, but up to a hundred messages may then be on both sides, under the same ids.  Stop the workers of
the source first, or they go on taking messages there.  Results and dead letters stay where they are.

exit codes:
  0  done    1  an error; what was moved by then is moved    2  wrong command line

examples:
  python -m miniq migrate sqlite:///jobs.db amqp://user@host/vhost
  python -m miniq -A proj migrate redis://old/0 redis://new/0 -Q mail,reports:archive
  python -m miniq migrate redis://host/0 redis://host/1 -T proj.add,proj.mul -n 1000 --json
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "migrate", help="move messages from one broker to another", epilog=EPILOG,
        description="Move the messages that wait on one broker to another one, of whatever kind.",
    )  # fmt: skip
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="URL of the broker to take them from")
    add("destination", metavar="DESTINATION", help="URL of the broker to bring them to")
    add("-n", "--limit", type=count_or_0, metavar="N", help="move so many at most")
    add(
        "-t", "--timeout", type=seconds_or_0, default=1.0, metavar="SECONDS",
        help="end when nothing came for so long (default 1)",
    )  # fmt: skip
    add("-a", "--ack-messages", action="store_true", help="accepted; what was moved is always acknowledged")
    add("-T", "--tasks", help="these tasks only (comma-separated)")
    add("-Q", "--queues", help="these queues only (comma-separated; a:b brings what is in a to b)")
    add("-F", "--forever", action="store_true", help="go on until interrupted")
    add("--json", action="store_true", help="print what was done as JSON")


class Taken(NamedTuple):
    """A message that was taken, and what its source needs to acknowledge it."""

    message: Any  #: a `Message`; None where what came is none, or may not run any more
    queue: str
    handle: Any
    revoked: bool = False


def run(app: Any, options: argparse.Namespace) -> int:
    """Move messages; return the exit code."""
    names = _mapping(options.queues)
    if _same(options.source, options.destination) and all(old == new for old, new in names.items()):
        raise MiniqError(f"source and destination are the same broker: {mask_url(options.source)}")
    destination = _transport(app, options.destination, time.time)
    queues = dict(app.router.queues)
    if _is_rabbit(options.source):
        source: Any = _Rabbit(app, options.source, names or dict.fromkeys(queues, ""))
    else:
        source = _Store(app, options.source, names)
    moved: Dict[str, int] = {}
    try:
        move = _Move(source, destination, queues, names, options.tasks, app.conf.task_publish_timeout)
        with Meter(sys.stderr) as meter:
            try:
                _all(move, options, moved, None if options.quiet or options.json else meter)
            except KeyboardInterrupt:
                print("interrupted; what is moved, is moved", file=sys.stderr)
    finally:
        source.close()
        destination.close()
    if options.json:
        print(json.dumps({"moved": sum(moved.values()), "queues": moved, "left": len(move.left)}))
    else:
        left = f", {len(move.left)} left where they were" if move.left else ""
        print(f"{sum(moved.values())} messages moved{left}")
    return 0


def _all(
    move: "_Move", options: argparse.Namespace, moved: Dict[str, int], meter: Optional[Meter]
) -> None:
    done, idle_since_mono = 0, time.monotonic()
    total = move.source.total()
    most = float("inf") if options.limit is None else options.limit
    while done < most:
        taken, names = move.turn(int(min(BATCH, most - done)))
        for name in names:
            moved[name] = moved.get(name, 0) + 1
        done += len(names)
        mono = time.monotonic()
        if taken:
            idle_since_mono = mono
            if meter is not None and done:
                goal = max(min(total, most), done)
                meter.show([{"status": "MOVED", "result": {"current": done, "total": goal}}], "MOVED")
        elif not options.forever and mono - idle_since_mono >= options.timeout:
            break
        else:
            time.sleep(min(LOOK_INTERVAL_S, max(options.timeout, 0.01)))


class _Move:
    """One turn after the other from a source to a destination."""

    def __init__(
        self,
        source: Any,
        destination: Transport,
        queues: Dict[str, Queue],
        names: Dict[str, str],
        tasks: Optional[str],
        timeout_s: float,
    ) -> None:
        self.source = source
        #: What stays: not one of the tasks that were asked for, or no message at all.
        self.left: List[Any] = []
        self._destination = destination
        self._queues, self._names = queues, names
        self._tasks = {name.strip() for name in tasks.split(",")} if tasks else None
        self._timeout_s = timeout_s
        self._declared: Set[str] = set()

    def turn(self, limit: int) -> Tuple[int, List[str]]:
        """Move at most `limit` messages; return how many came, and in which queues the moved ones are now."""
        found: List[Taken] = []
        came = list(self.source.take(limit))
        for one in came:
            wanted = one.message is not None and (
                self._tasks is None or one.message.headers.get("task") in self._tasks
            )
            (found if wanted else self.left).append(one)
        names = [self._names.get(one.queue) or one.queue for one in found]
        for name in {*names} - self._declared:
            self._destination.declare(self._queues.get(name) or Queue(name))
            self._declared.add(name)
        revoked = [str(one.message.headers.get("id")) for one in found if one.revoked]
        if revoked:
            self._destination.revoke(revoked, time.time() + REVOKED_S)
        if found:
            pairs = zip(found, names)
            publications = [Publication(one.message, "", name) for one, name in pairs]
            self._destination.publish(publications, self._timeout_s)
            self.source.ack(found)
        return len(came), names


def _mapping(text: Optional[str]) -> Dict[str, str]:
    """Return {queue: where it goes} of ``a,b:c``."""
    pairs = [part.strip().partition(":") for part in (text or "").split(",") if part.strip()]
    return {old: new or old for old, _, new in pairs}


def _is_rabbit(url: str) -> bool:
    return TRANSPORTS.get(url.partition("://")[0].lower()) == TRANSPORTS["amqp"]


def _same(one: str, other: str) -> bool:
    return one.rstrip("/") == other.rstrip("/")


def _transport(app: Any, url: str, wall: Any) -> Transport:
    return transport_class(url)(url, _app_for(app, url).broker_options(url), wall)


def _app_for(app: Any, url: str) -> Any:
    """Return the app if `url` is of the same kind as its broker, else one with no options of another kind."""
    kinds = {TRANSPORTS.get(one.partition("://")[0].lower()) for one in (url, app.broker_url())}
    return app if len(kinds) == 1 else MiniQ("migrate", set_as_current=False)


# -- sources -------------------------------------------------------------------------------------


class _Store:
    """SQLite, memory, Redis: a consumer with a clock of its own."""

    def __init__(self, app: Any, url: str, names: Dict[str, str]) -> None:
        self._until = 0.0
        kind, _, path = url.partition(":///")
        if kind.lower() == "sqlite" and not os.path.exists(path):
            raise MiniqError(f"{url}: there is no such file")  # it would be made, and be empty
        self._transport = _transport(app, url, self._now)
        known = {size.queue for size in self._transport.sizes(app.router.queues)}
        missing = sorted(set(names) - known)
        if missing:
            self._transport.close()
            raise MiniqError(
                f"{mask_url(url)} has no queue {', '.join(missing)}; it has:"
                f" {', '.join(sorted(known)) or 'none'}"
            )
        self._names = sorted(names or (name for name in known if not is_private(name)))
        self._consumer: Any = None
        self._app = app

    def _now(self) -> float:
        return max(time.time(), self._until)

    def total(self) -> int:
        """Return how many messages there are."""
        sizes = [size for size in self._transport.sizes() if size.queue in self._names]
        return sum(size.ready + (size.waiting or 0) for size in sizes)

    def take(self, limit: int) -> Iterable[Taken]:
        """Return at most `limit` messages, empty when there are none, due or not."""
        if not self._names:
            return []
        if self._consumer is None:
            known = self._app.router.queues
            queues = [known.get(name) or Queue(name) for name in self._names]
            self._consumer = self._transport.consumer("migrate", queues)
            self._consumer.housekeep()  # what dead workers held, and an earlier run of this
        found = self._consumer.poll(limit)
        while not found:
            due = self._consumer.next_due()
            if due is None or due <= self._until:
                break
            self._until = due + _AFTER_DUE_S
            found = self._consumer.poll(limit)
        taken = []
        for one in found:
            message = None if one.fate in ("garbage", "lost") else one.message
            taken.append(Taken(message, one.queue, one, one.fate == "revoked"))
        return taken

    def ack(self, taken: Sequence[Taken]) -> None:
        """Take them away: the destination has them."""
        with self._transport.transaction():
            for one in taken:
                self._consumer.ack(one.handle)
        self._until = 0.0

    def close(self) -> None:
        """Give back what was not moved."""
        if self._consumer is not None:
            self._consumer.close()
        self._transport.close()


class _Rabbit:
    """RabbitMQ: basic.get, from queues and from where messages wait for them."""

    def __init__(self, app: Any, url: str, names: Dict[str, str]) -> None:
        options = Options.read(_app_for(app, url).broker_options(url), url)
        server = Server.of(url, options)
        self._connection: Connection = server.connect(options.connect_timeout, "miniq migrate")
        self._channel: Channel = self._connection.open_channel()
        self._names = {name for name in names if not is_private(name)}
        rooms = [native_name(level) for level in range(LEVELS)]
        for kind in ("classic", "quorum"):
            rooms += [ladder_name(level, kind) for level in range(MAX_LEVEL + 1)]
        self._sizes = self._look([*sorted(self._names), *rooms])
        missing = sorted(name for name in names if name not in self._sizes)
        if missing and not any(name in self._sizes for name in names):
            self.close()
            raise MiniqError(
                f"{mask_url(url)} has no queue {', '.join(missing)};"
                " name those to move with -Q, or the app with -A"
            )
        self._next: Optional[Iterator[Taken]] = None
        #: Of other queues: they go back, and are not taken again in this round.
        self._others: List[int] = []

    def _look(self, names: Iterable[str]) -> Dict[str, int]:
        """Return the sizes of those queues that exist."""
        found = {}
        for name in names:
            try:
                found[name] = self._channel.call("queue.declare", queue=name, passive=True)["message_count"]
            except ChannelError as error:
                if error.code != 404:
                    raise
                self._channel = self._connection.open_channel()
        return found

    def total(self) -> int:
        """Return how many messages there are, with those that wait for other queues."""
        return sum(self._sizes.values())

    def take(self, limit: int) -> Iterable[Taken]:
        """Return at most `limit` messages, empty when there are none, due or not."""
        if self._next is None:
            self._next = self._each()
        found = []
        for one in self._next:
            found.append(one)
            if len(found) == limit:
                return found
        self._next = None
        for tag in self._others:
            self._channel.reject(tag, True)
        self._others.clear()
        return found

    def _each(self) -> Iterator[Taken]:
        for queue in self._sizes:
            while True:
                got = self._channel.get(queue)
                if got is None:
                    break
                target = queue if queue in self._names else strip_prefix(got.routing_key)
                if target not in self._names:
                    self._others.append(got.delivery_tag)
                    continue
                message = from_content(got.content)
                take_marks(message.headers)
                yield Taken(message, target, got.delivery_tag)

    def ack(self, taken: Sequence[Taken]) -> None:
        """Take them away: the destination has them."""
        for one in taken:
            self._channel.ack(one.handle)
        self._channel.call("basic.qos")  # its answer says that the acks before it have arrived

    def close(self) -> None:
        """End; the server takes back what was not acknowledged."""
        self._connection.close()

# SPDX-License-Identifier: MIT
"""A RabbitMQ of the benchmark's own, and bare socket loops that do the work of a queue on it.

The loops are miniq's codec over one blocking socket, with nothing around it: basic.publish and the
wait for its confirm; basic.consume, basic.ack.  They send the very message that miniq sends.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Deque, Dict, List, Optional, Set, Tuple

import redis_floors
from children import Children
from ours import ROOT

from miniq.codecs.amqp import Acked, Content, Deliver, GetOk, Method, Peer
from miniq.codecs.amqp_wire import FRAME_METHOD, encode_frame, encode_method

if TYPE_CHECKING:
    from servers import RabbitServer

QUEUE = "floor"
REPLIES = "floor-replies"
#: What a result over rpc is: the body of a message to the queue of who waits.
RESULT = json.dumps(
    {
        "task_id": "0" * 36, "status": "SUCCESS", "result": 5, "traceback": None, "children": [],
        "date_done": "2024-01-01T00:00:00.000000+00:00",
    }
).encode()  # fmt: skip


class Wire:
    """One socket to a virtual host with channel 1 open on it; whatever the server refuses is raised."""

    def __init__(self, port: int, vhost: str, confirms: bool = False) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(None)
        self.peer = Peer()
        self.socket.sendall(self.peer.header())
        self._next(Method)
        tune = self.call(
            "connection.start-ok", channel=0,
            mechanism="PLAIN", response="\0guest\0guest", locale="en_US",
        )  # fmt: skip
        self.peer.tune(tune["channel_max"], tune["frame_max"])
        agreed = {"channel_max": tune["channel_max"], "frame_max": tune["frame_max"], "heartbeat": 0}
        self.socket.sendall(self.peer.method(0, "connection.tune-ok", **agreed))
        self.call("connection.open", channel=0, vhost=vhost)
        self.call("channel.open")
        self.confirms = confirms
        #: Of the messages published so far, counted from 1: all up to this one are confirmed, and these.
        self._published = self._confirmed = 0
        self._out_of_turn: Set[int] = set()
        if confirms:
            self.call("confirm.select")

    def call(self, name: str, channel: int = 1, **args: Any) -> Dict[str, Any]:
        """Send a method and return what the reply says."""
        self.socket.sendall(self.peer.method(channel, name, **args))
        reply: Dict[str, Any] = self._next(Method).args
        return reply

    def _next(self, kind: type) -> Any:
        """Wait for the next event, which has to be of that kind."""
        event = self.event()
        if not isinstance(event, kind):
            raise RuntimeError(f"RabbitMQ says {event} where {kind.__name__} was awaited")
        return event

    def event(self) -> Any:
        """Return the next event, wait for it if need be."""
        while True:
            event = self.peer.next_event()
            if event is not None:
                return event
            self._receive()

    def _receive(self, flags: int = 0) -> None:
        data = self.socket.recv(65536, flags)
        if not data:
            raise ConnectionError("RabbitMQ closed the connection")
        self.peer.feed(data)

    def events(self, wait: bool) -> List[Any]:
        """Return all events that have come, at least one if `wait`."""
        if not wait:
            try:
                self._receive(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return []
        found = [self.event()] if wait else []
        while True:
            event = self.peer.next_event()
            if event is None:
                return found
            found.append(event)

    def take(self, queue: str) -> Content:
        """Take the first message of a queue."""
        self.socket.sendall(self.peer.method(1, "basic.get", queue=queue, no_ack=True))
        content: Content = self._next(GetOk).content
        return content

    def publish(self, queue: str, contents: List[Content]) -> None:
        """Send messages in one write; with confirms wait until the server has them all."""
        encode = self.peer.publish
        self.socket.sendall(b"".join([encode(1, "", queue, *content, True) for content in contents]))
        if not self.confirms:
            return
        self._published += len(contents)
        while self._confirmed + len(self._out_of_turn) < self._published:
            _, tag, multiple = self._next(Acked)
            if multiple:
                self._confirmed = max(self._confirmed, tag)
                self._out_of_turn = {other for other in self._out_of_turn if other > tag}
            else:
                self._out_of_turn.add(tag)
            while self._confirmed + 1 in self._out_of_turn:
                self._confirmed += 1
                self._out_of_turn.remove(self._confirmed)

    def close(self) -> None:
        self.socket.close()


class Place:
    """A virtual host of its own, empty at first; `wire` is our own connection to it."""

    def __init__(self, server: "RabbitServer") -> None:
        self._server = server
        self._vhost = server.new_vhost()
        self.url = server.url(self._vhost)
        self.wire = self.new_wire()
        self.wire.call("queue.declare", queue=QUEUE, durable=True)
        self.wire.call("queue.declare", queue=REPLIES, durable=True)

    def new_wire(self, confirms: bool = False) -> Wire:
        return Wire(self._server.port, self._vhost, confirms)

    def left(self, queue: str) -> int:
        """How many wait in a queue."""
        count: int = self.wire.call("queue.declare", queue=queue, passive=True)["message_count"]
        return count

    def settle(self, queue: str, count: int) -> None:
        """Wait until that many wait in a queue: what was sent without confirms may be on its way."""
        self._wait(lambda: self.left(queue) >= count, f"{count} messages in {queue}")

    def drain(self, queue: str) -> None:
        """Wait until none waits in a queue."""
        self._wait(lambda: not self.left(queue), f"an empty {queue}")

    def _wait(self, predicate: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not predicate():
            if time.monotonic() > deadline:
                raise RuntimeError(f"RabbitMQ did not come to {what} in {timeout_s:.0f} s")
            time.sleep(0.002)

    def purge(self, queue: str) -> None:
        self.wire.call("queue.purge", queue=queue)

    def traffic(self) -> Dict[int, int]:
        """Return how many bytes each connection but `wire` carried so far, by its port."""
        rows = self._server.eval(
            "[[proplists:get_value(K, Row) || K <- [peer_port, vhost, recv_oct, send_oct]] ||"
            " Row <- rabbit_networking:connection_info_all([peer_port, vhost, recv_oct, send_oct])]"
        )
        own = self.wire.socket.getsockname()[1]
        return {
            port: taken + given for port, vhost, taken, given in rows if vhost == self._vhost and port != own
        }

    def close(self) -> None:
        self.wire.close()
        self._server.delete_vhost(self._vhost)


def started(folder: str) -> "Optional[RabbitServer]":
    """Return a new server, that of the tests; None, and why on the screen, where it cannot be had."""
    sys.path.append(os.path.join(ROOT, "tests"))
    try:
        from servers import RabbitServer
    except ImportError as error:
        print(f"rabbit: left out, its server is started by code of the tests: {error}")
        return None
    finally:
        sys.path.pop()
    if not any(shutil.which(program) for program in RabbitServer.programs):
        print("rabbit: no rabbitmq-server is installed here, its benchmarks are left out")
        return None
    return RabbitServer(Path(folder, "rabbit")).start()


# -- enqueue -------------------------------------------------------------------------------------


def publisher(wire: Wire, queue: str, content: Content) -> Callable[[], None]:
    """Return what sends one message, and waits for the confirm on a wire that has them."""
    send, receive, peer = wire.socket.sendall, wire.socket.recv, wire.peer
    properties, headers, body = content

    def enqueue() -> None:
        send(peer.publish(1, "", queue, properties, headers, body, True))

    def enqueue_confirmed() -> None:
        send(peer.publish(1, "", queue, properties, headers, body, True))
        while True:
            event = peer.next_event()
            if event is None:
                peer.feed(receive(65536))
            elif isinstance(event, Acked):
                return

    return enqueue_confirmed if wire.confirms else enqueue


# -- drain ---------------------------------------------------------------------------------------


def _fill(place: Place, content: Content, n: int) -> None:
    wire = place.new_wire(confirms=True)
    for begin in range(0, n, 1000):
        wire.publish(QUEUE, [content] * min(1000, n - begin))
    wire.close()


def _consuming(place: Place, prefetch: int) -> Wire:
    wire = place.new_wire()
    wire.call("basic.qos", prefetch_count=prefetch)
    wire.call("basic.consume", queue=QUEUE)
    return wire


def drain_batched(place: Place, n: int, batch: int, content: Content) -> float:
    """Take what comes and acknowledge it at once, no tasks run; return messages per second."""
    _fill(place, content, n)
    wire = _consuming(place, batch)
    done = 0
    start = time.perf_counter()
    while done < n:
        events = wire.events(wait=True)
        done += len(events)
        wire.socket.sendall(wire.peer.ack(1, events[-1].delivery_tag, multiple=True))
    rate = n / (time.perf_counter() - start)
    wire.close()
    return rate


def _args_of(body: bytes) -> Any:
    return json.loads(body)[0]


def drain_with_children(place: Place, n: int, children: int, content: Content, rpc: bool = False) -> float:
    """One message at a time to each of `children` processes over socketpairs, as a queue must.

    A few more than there are children wait here.  With `rpc` each result is a message.
    """
    _fill(place, content, n)
    wire = _consuming(place, 4 * children)
    peer = wire.peer
    pool = Children(children, _args_of)
    waiting: Deque[Deliver] = deque()
    done = 0
    start = time.perf_counter()
    while done < n:
        if pool.idle > len(waiting):
            waiting.extend(wire.events(wait=not pool.busy and not waiting))
        while waiting and pool.idle:
            event = waiting.popleft()
            pool.give(event, event.content.body)
        out = []
        for event, answer in pool.wait():
            if rpc:
                replied = {"correlation_id": event.content.properties["correlation_id"], "delivery_mode": 1}
                out.append(peer.publish(1, "", REPLIES, replied, {}, answer))
            out.append(peer.ack(1, event.delivery_tag))
            done += 1
        wire.socket.sendall(b"".join(out))
    rate = n / (time.perf_counter() - start)
    pool.close()
    wire.close()
    place.purge(REPLIES)
    return rate


# -- round trip ----------------------------------------------------------------------------------


class Asking:
    """One message to another process, its confirm, and the result that the process sends us.

    The result is a message, or with `redis` a key that is stored and published there.
    """

    def __init__(self, place: Place, content: Content, redis: Optional[redis_floors.Server]) -> None:
        properties = {**content.properties, "reply_to": REPLIES}
        self._wire = place.new_wire(confirms=True)
        self._publication = QUEUE, Content(properties, content.headers, content.body)
        self._listener: Optional[redis_floors.Wire] = None
        if redis is None:
            self._wire.call("basic.consume", queue=REPLIES, no_ack=True)
        else:
            self._listener = redis_floors.Wire(redis.port)
            self._listener.call("SUBSCRIBE", "done")
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_answer, args=(place, redis))
        self._process.start()

    def __enter__(self) -> "Asking":
        return self

    def ask(self) -> None:
        wire, (queue, content) = self._wire, self._publication
        wire.socket.sendall(wire.peer.publish(1, "", queue, *content, True))
        awaited = {Acked} if self._listener else {Acked, Deliver}
        while awaited:
            awaited.discard(type(wire.event()))
        if self._listener:
            self._listener.reply()

    def __exit__(self, *exc_info: Any) -> None:
        self._process.terminate()
        self._process.join()
        self._wire.close()
        if self._listener:
            self._listener.close()


def _answer(place: Place, redis: Optional[redis_floors.Server]) -> None:
    wire = _consuming(place, 8)
    store = redis and redis_floors.Wire(redis.port)
    write = redis_floors.command
    stored = write("SETEX", "result", 60, RESULT) + write("PUBLISH", "done", RESULT)
    while True:
        for event in wire.events(wait=True):
            out = wire.peer.ack(1, event.delivery_tag)
            if store:
                store.socket.sendall(stored)
                store.reply()
                store.reply()
            else:
                properties = event.content.properties
                replied = {"correlation_id": properties["correlation_id"], "delivery_mode": 1}
                out = wire.peer.publish(1, "", properties["reply_to"], replied, {}, RESULT) + out
            wire.socket.sendall(out)


# -- codec ---------------------------------------------------------------------------------------


def codec(wire: Wire, content: Content) -> Tuple[int, Callable[[], object], Callable[[], object]]:
    """Return how long a message is, what writes it as bytes, and what reads it from those of a delivery."""
    peer = wire.peer
    properties, headers, body = content
    written = peer.publish(1, "", QUEUE, properties, headers, body, True)
    arguments = {"consumer_tag": "1", "delivery_tag": 1, "routing_key": QUEUE}
    begin = encode_frame(FRAME_METHOD, 1, encode_method("basic.deliver", arguments))
    # Both are a method and a content; a frame is 8 bytes longer than it says at its fourth.
    delivery = begin + written[8 + int.from_bytes(written[3:7], "big") :]

    def encode() -> None:
        peer.publish(1, "", QUEUE, properties, headers, body, True)

    def decode() -> None:
        peer.feed(delivery)
        peer.next_event()

    peer.feed(delivery)
    event = peer.next_event()
    if not isinstance(event, Deliver) or event.content != content:
        raise RuntimeError(f"the codec reads {event} where {content} was written")
    return len(written), encode, decode

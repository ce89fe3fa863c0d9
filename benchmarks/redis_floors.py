# SPDX-License-Identifier: MIT
"""A Redis server of the benchmark's own, and bare socket loops that do the work of a queue on it.

The loops send the commands that a queue with Celery's layout cannot do without, already encoded:
LPUSH to enqueue; one script to pop and record in ``unacked``; SETEX and PUBLISH for a result; HDEL
and ZREM to acknowledge.
"""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import time
import uuid
from typing import Any, Callable, Dict, List, Optional, Tuple

from children import Children

QUEUE = "celery"
BODY = b'[[2, 3], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
RESULT = (
    b'{"status": "SUCCESS", "result": 5, "traceback": null, "children": [],'
    b' "date_done": "2024-01-01T00:00:00.000000+00:00", "task_id": "%s"}'
)

#: Keys: queue, unacked, unacked_index; arguments: how many, now.  Returns tag and message by turns.
CLAIM = """
local found = redis.call('RPOP', KEYS[1], ARGV[1])
if not found then return {} end
local out, entries, scores = {}, {}, {}
for i, message in ipairs(found) do
  local tag = string.match(message, '"delivery_tag": *"([^"]+)"')
  out[2 * i - 1], out[2 * i] = tag, message
  entries[2 * i - 1], entries[2 * i] = tag, '[' .. message .. ',"","' .. KEYS[1] .. '"]'
  scores[2 * i - 1], scores[2 * i] = ARGV[2], tag
end
redis.call('HSET', KEYS[2], unpack(entries))
redis.call('ZADD', KEYS[3], unpack(scores))
return out
"""


def command(*parts: "bytes | str | float") -> bytes:
    """Return a command as the bytes that go to the server."""
    found = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return b"*%d\r\n" % len(found) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in found)


class Wire:
    """One socket to a server, commands and replies in turn; errors of the server are raised."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(None)
        self.file = self.socket.makefile("rb")

    def call(self, *parts: "bytes | str | float") -> Any:
        self.socket.sendall(command(*parts))
        return self.reply()

    def reply(self) -> Any:
        line = self.file.readline()
        kind, rest = line[:1], line[1:-2]
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == b"-1" else self.file.read(int(rest) + 2)[:-2]
        if kind == b"*":
            return None if rest == b"-1" else [self.reply() for _ in range(int(rest))]
        raise RuntimeError(f"the server of the benchmark says {line!r}")

    def close(self) -> None:
        self.file.close()
        self.socket.close()


class Server:
    """A redis-server on a free loopback port, without persistence; `wire` is our own connection to it."""

    def __init__(self, folder: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", folder,
             "--save", "", "--appendonly", "no", "--loglevel", "warning"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.pid = self._process.pid
        deadline = time.monotonic() + 10
        while True:
            try:
                self.wire = Wire(self.port)
                break
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise
                time.sleep(0.01)
        info = self.wire.call("INFO", "server").decode()
        self.version = next(line[14:] for line in info.splitlines() if line.startswith("redis_version:"))

    @classmethod
    def started(cls, folder: str) -> "Optional[Server]":
        """Return a new server, None where there is no redis-server to start."""
        return cls(folder) if shutil.which("redis-server") else None

    def left(self, key: str = QUEUE) -> int:
        """How many wait in a list."""
        length: int = self.wire.call("LLEN", key)
        return length

    def clear(self) -> None:
        self.wire.call("FLUSHALL")

    def commands(self) -> Dict[str, int]:
        """Return how often each command was called, also within scripts; what is asked here is left out."""
        found = {}
        for line in self.wire.call("INFO", "commandstats").decode().splitlines():
            if line.startswith("cmdstat_"):
                name, _, stats = line[len("cmdstat_") :].partition(":")
                if name not in ("info", "llen"):
                    found[name] = int(stats.split(",")[0].partition("=")[2])
        return found

    def stop(self) -> None:
        if hasattr(self, "wire"):
            self.wire.close()
        self._process.terminate()
        self._process.wait(10)


def commands_between(before: Dict[str, int], after: Dict[str, int]) -> Dict[str, int]:
    """Return which commands were called how often, most of them first."""
    found = {name: after[name] - before.get(name, 0) for name in after}
    return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda pair: -pair[1]))


def envelope(length: int, tag: str = "0" * 36) -> bytes:
    """Return a message of about `length` bytes in Celery's form."""
    headers = {"lang": "py", "task": "tasks.add", "id": tag, "fill": ""}
    message = {
        "body": base64.b64encode(BODY).decode(), "content-encoding": "utf-8",
        "content-type": "application/json", "headers": headers,
        "properties": {"delivery_info": {"exchange": "", "routing_key": QUEUE}, "priority": 0,
                       "body_encoding": "base64", "delivery_tag": tag},
    }  # fmt: skip
    headers["fill"] = "e" * max(0, length - len(json.dumps(message)))
    return json.dumps(message).encode()


def pusher(wire: Wire, length: int) -> Callable[[], None]:
    """Return what sends one LPUSH and reads the reply."""
    send, receive = wire.socket.sendall, wire.socket.recv
    push = command("LPUSH", QUEUE, envelope(length))

    def enqueue() -> None:
        send(push)
        receive(4096)

    return enqueue


def writing_pusher(wire: Wire, length: int) -> Callable[[], None]:
    """The same with the message written anew each time: ids, base64, JSON, the command."""
    send, receive = wire.socket.sendall, wire.socket.recv
    message = json.loads(envelope(length))
    headers, properties = message["headers"], message["properties"]
    # As many keys as a task's message has; what fills it up is shorter for that.
    headers.update((f"header{n}", None) for n in range(16))
    headers["fill"] = headers["fill"][: -len(json.dumps(message)) + length]
    encode = json.JSONEncoder().encode

    def enqueue() -> None:
        headers["id"] = properties["delivery_tag"] = str(uuid.uuid4())
        message["body"] = base64.b64encode(json.dumps([[2, 3], {}, {"chain": None}]).encode()).decode()
        send(command("LPUSH", QUEUE, encode(message).encode()))
        receive(4096)

    return enqueue


def bulk(server: Server, rounds: int, length: int, n: int = 1000) -> float:
    """`n` LPUSH in one write, then all replies; return messages per second of the best round."""
    wire = Wire(server.port)
    message = envelope(length)
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        wire.socket.sendall(b"".join([command("LPUSH", QUEUE, message) for _ in range(n)]))
        replies = 0
        while replies < n:
            replies += wire.socket.recv(65536).count(b"\n")
        best = max(best, n / (time.perf_counter() - start))
    wire.close()
    return best


def fill(server: Server, n: int, length: int) -> None:
    server.clear()
    for begin in range(0, n, 1000):
        tags = range(begin, min(n, begin + 1000))
        server.wire.socket.sendall(
            b"".join(command("LPUSH", QUEUE, envelope(length, f"{tag:036}")) for tag in tags)
        )
        for _ in tags:
            server.wire.reply()


def _settling(tags: List[bytes], results: "Optional[List[bytes]]") -> List[bytes]:
    """Return the commands that end messages: their results, and the acks of all at once."""
    found = []
    for tag, result in zip(tags, results or ()):
        key = b"celery-task-meta-" + tag
        found += [command("SETEX", key, 86400, result), command("PUBLISH", key, result)]
    return [*found, command("HDEL", "unacked", *tags), command("ZREM", "unacked_index", *tags)]


def drain_batched(server: Server, n: int, batch: int, results: bool, length: int) -> float:
    """Claim and acknowledge in batches, one process, no tasks run; return messages per second."""
    fill(server, n, length)
    wire = Wire(server.port)
    sha = wire.call("SCRIPT", "LOAD", CLAIM)
    done = 0
    ending: List[bytes] = []
    start = time.perf_counter()
    while done < n:
        claim = command("EVALSHA", sha, 3, QUEUE, "unacked", "unacked_index", batch, time.time())
        wire.socket.sendall(b"".join(ending) + claim)
        for _ in ending:
            wire.reply()
        tags = wire.reply()[::2]
        done += len(tags)
        ending = _settling(tags, [RESULT % tag for tag in tags] if results else None)
    rate = n / (time.perf_counter() - start)
    wire.close()
    return rate


def _args_of(message: bytes) -> Any:
    return json.loads(base64.b64decode(json.loads(message)["body"]))[0]


def drain_with_children(server: Server, n: int, children: int, results: bool, length: int) -> float:
    """One message at a time to each of `children` processes over socketpairs, as a queue must.

    Messages are claimed as many as there are idle children; what has ended is settled in the same write.
    """
    fill(server, n, length)
    wire = Wire(server.port)
    sha = wire.call("SCRIPT", "LOAD", CLAIM)
    pool = Children(children, _args_of)
    ended: List[Tuple[bytes, bytes]] = []
    done = 0
    start = time.perf_counter()
    while done < n:
        ending = []
        if ended:
            tags = [tag for tag, _ in ended]
            ending = _settling(tags, [answer for _, answer in ended] if results else None)
            done += len(ended)
            ended = []
        claim = command("EVALSHA", sha, 3, QUEUE, "unacked", "unacked_index", pool.idle, time.time())
        wire.socket.sendall(b"".join(ending) + claim)
        for _ in ending:
            wire.reply()
        found = wire.reply()
        for tag, message in zip(found[::2], found[1::2]):
            pool.give(tag, message)
        if pool.busy:
            ended = pool.wait()
    rate = n / (time.perf_counter() - start)
    pool.close()
    wire.close()
    return rate


def roundtrip(server: Server, n: int, length: int) -> List[float]:
    """LPUSH to another process that waits in BRPOP, which stores and publishes a result for us."""
    server.clear()
    listener, wire = Wire(server.port), Wire(server.port)
    listener.call("SUBSCRIBE", "done")
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_answer, args=(server.port, n))
    process.start()
    push = command("LPUSH", QUEUE, envelope(length))
    times = []
    for _ in range(n):
        time.sleep(0.002)
        begin = time.perf_counter()
        wire.socket.sendall(push)
        wire.reply()
        listener.reply()
        times.append(time.perf_counter() - begin)
    process.join()
    wire.close()
    listener.close()
    return times


def _answer(port: int, n: int) -> None:
    wire = Wire(port)
    answer = command("SETEX", "result", 60, RESULT) + command("PUBLISH", "done", RESULT)
    for _ in range(n):
        wire.call("BRPOP", QUEUE, 10)
        wire.socket.sendall(answer)
        wire.reply()
        wire.reply()
    wire.close()
    os._exit(0)

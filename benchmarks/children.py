# SPDX-License-Identifier: MIT
"""The least that a pool of processes can be, for the floors: one message at a time over a socketpair."""

from __future__ import annotations

import json
import multiprocessing
import selectors
import socket
import struct
from typing import Any, Callable, List, Tuple, cast


def _run(link: socket.socket, args_of: Callable[[bytes], Any]) -> None:
    """Read messages, decode them, add, answer: the least a child can do."""
    while True:
        data = link.recv(65536)
        if not data:
            return
        args = args_of(data[4:])
        answer = json.dumps({"status": "SUCCESS", "result": args[0] + args[1]}).encode()
        link.send(struct.pack("!I", len(answer)) + answer)


class Children:
    """Processes that add; `args_of` finds what to add in the bytes that a child is given."""

    def __init__(self, count: int, args_of: Callable[[bytes], Any]) -> None:
        context = multiprocessing.get_context("fork")
        self._selector = selectors.DefaultSelector()
        self._processes = []
        self._idle: List[socket.socket] = []
        self._running: "dict[socket.socket, Any]" = {}
        for _ in range(count):
            ours, theirs = socket.socketpair()
            process = context.Process(target=_run, args=(theirs, args_of))
            process.start()
            theirs.close()
            self._selector.register(ours, selectors.EVENT_READ)
            self._processes.append((process, ours))
            self._idle.append(ours)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def busy(self) -> int:
        return len(self._running)

    def give(self, key: Any, message: bytes) -> None:
        """Let one that is idle run a message; `key` comes back with the answer."""
        link = self._idle.pop()
        self._running[link] = key
        link.send(struct.pack("!I", len(message)) + message)

    def wait(self) -> List[Tuple[Any, bytes]]:
        """Wait until some have ended; return key and answer of each."""
        ended = []
        for key, _ in self._selector.select():
            link = cast(socket.socket, key.fileobj)
            ended.append((self._running.pop(link), link.recv(65536)[4:]))
            self._idle.append(link)
        return ended

    def close(self) -> None:
        for process, link in self._processes:
            link.close()
            process.terminate()  # a sibling holds a copy of its link, so it would never see the end of it
            process.join()
        self._selector.close()

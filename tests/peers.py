# SPDX-License-Identifier: MIT
"""Peers that behave as no real server would: listening sockets whose conversation a test writes itself."""

from __future__ import annotations

import selectors
import socket
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional

#: Seconds after which a conversation that was left alone ends itself.
TIMEOUT_S = 20.0


@contextmanager
def listening(
    talk: Callable[[socket.socket], None], path: Optional[Path] = None, host: str = "127.0.0.1"
) -> Iterator[Any]:
    """Listen on a free loopback port, or a Unix socket at `path`; give the address.

    `talk` has one connection after the other, in a thread of its own, until the client closes it
    (`OSError` then ends the conversation, as its return does).  At the end the thread is gone.
    """
    listener = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
    listener.bind(str(path) if path else (host, 0))
    listener.listen(16)
    stop, stopped = socket.socketpair()
    failures: List[BaseException] = []

    def run() -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(stopped, selectors.EVENT_READ)
            while all(key.fileobj is listener for key, _ in selector.select()):
                connection, _ = listener.accept()
                connection.settimeout(TIMEOUT_S)
                with connection:
                    try:
                        talk(connection)
                    except OSError:
                        pass  # the client went away
                    except BaseException as error:
                        failures.append(error)

    thread = threading.Thread(target=run, name="peer", daemon=True)
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        stop.close()
        thread.join(TIMEOUT_S)
        listener.close()
        stopped.close()
    assert not thread.is_alive(), "the peer's conversation does not end"
    assert not failures, failures


def hold(connection: socket.socket) -> None:
    """Say nothing until the client closes the connection."""
    while connection.recv(65536):
        pass

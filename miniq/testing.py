# SPDX-License-Identifier: MIT
"""A worker inside a test: real messages, a real pool, gone when the block ends.

    from miniq.testing import start_worker

    with start_worker(app):
        assert add.delay(2, 3).get(timeout=5) == 5

Works with any broker; ``memory://`` needs nothing outside the process.  Signal handlers and
logging of the test program are left alone, and no ping task is needed: the block is entered when
the worker takes messages.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator

from . import signals
from .worker.worker import Worker

#: Arguments of Celery's function of this name that have no meaning here.
WITHOUT_EFFECT = ("loglevel", "logfile", "perform_ping_check", "ping_task_timeout")


@contextmanager
def start_worker(
    app: Any,
    concurrency: int = 1,
    pool: str = "threads",
    shutdown_timeout: float = 10.0,
    **options: Any,
) -> Iterator[Worker]:
    """Run a worker of `app` in a thread while the block runs.

    Leaving the block stops it warm, after `shutdown_timeout` seconds cold.  `options` are those of
    `miniq.worker.worker.Worker`; what only Celery's function knows (``perform_ping_check``, ...) is
    accepted without effect.  Raises what kept the worker from starting, or broke it.
    """
    for name in WITHOUT_EFFECT:
        options.pop(name, None)
    signals.test_worker_starting.send(sender=app)
    worker = Worker(app, concurrency=concurrency, pool=pool, **options)
    worker.start_in_thread()
    try:
        signals.test_worker_started.send(sender=app, worker=worker, consumer=worker.tasks)
        yield worker
    finally:
        worker.close(shutdown_timeout)
        signals.test_worker_stopped.send(sender=app, worker=worker)

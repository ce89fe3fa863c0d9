# SPDX-License-Identifier: MIT
"""Apps on each store that a test can do without a worker in, and results that are simply there."""

from __future__ import annotations

from typing import Any, Dict, Optional

from bench import new_broker

from miniq import MiniQ
from miniq.backends.base import StoredResult
from miniq.task import Context

#: The stores; the broker is the same, but for Redis, whose tests need a broker without a server only.
STORES = ("memory", "sqlite", "redis")
ERROR: Dict[str, Any] = {"exc_type": "ValueError", "exc_message": ["no"], "exc_module": "builtins"}


def make_app(request: Any, **settings: Any) -> MiniQ:
    """Return the app for ``request.param``, one of STORES."""
    broker = request.getfixturevalue("sqlite_url") if request.param == "sqlite" else new_broker()
    if request.param == "redis":
        settings["backend"] = request.getfixturevalue("redis_url")
    return MiniQ("tests", broker=broker, **settings)


def encoded(app: MiniQ, task_id: str, state: str, value: Any, **request: Any) -> StoredResult:
    """Return a result as a worker encodes it."""
    traceback: Optional[str] = request.pop("traceback", None)
    children = request.pop("children", [])
    context = Context(id=task_id, **request)
    context.children.extend(children)
    return app.runner.encode(context, state, value, traceback)


def store(app: MiniQ, task_id: str, state: str = "SUCCESS", value: Any = None, **request: Any) -> None:
    """Have a result stored."""
    app.backend.store([encoded(app, task_id, state, value, **request)])

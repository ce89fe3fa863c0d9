# SPDX-License-Identifier: MIT
"""The tasks that generated workflows are made of, and the way from a tree to signatures."""

from __future__ import annotations

import functools
import json
import operator
import os
import threading
from typing import Any, Callable, Dict, List, Optional

from oracle import Errback, Node, shown, value_of

from miniq import MiniQ, Signature, chain, chord, group
from miniq.exceptions import Ignore, Reject

#: Writes down ("run", label, arguments, task id) and ("error", errback's label, id of what failed).
Journal = Callable[..., None]


class Notes:
    """A journal in memory, of workers in this process."""

    def __init__(self) -> None:
        self.lines: List[List[Any]] = []

    def __call__(self, *line: Any) -> None:
        self.lines.append(list(line))

    def read(self) -> List[List[Any]]:
        return list(self.lines)


class File:
    """A journal in a file, of any number of processes: each line is written at once."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, *line: Any) -> None:
        data = json.dumps(line) + "\n"
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(fd, data.encode())
        finally:
            os.close(fd)

    def read(self) -> List[List[Any]]:
        if not os.path.exists(self.path):
            return []
        with open(self.path, encoding="utf-8") as file:
            return [json.loads(line) for line in file.read().splitlines()]


def add_tasks(app: MiniQ, journal: Any) -> None:
    """Register the tasks ``work``, ``late``, ``item``, ``note`` and ``tell``."""
    requeued = set()
    lock = threading.Lock()

    def work(
        self: Any, *args: Any, label: str, how: str = "ok", times: int = 0, inner: Optional[Any] = None
    ) -> Any:
        journal("run", label, ",".join(map(shown, args)), self.request.id)
        if how in ("fail", "give_up", "retry") and self.request.retries < times:
            raise self.retry(countdown=0)
        if how in ("fail", "give_up"):
            raise ValueError(label)
        if how == "requeue":
            with lock:
                again = label in requeued
                requeued.add(label)
            if not again:
                raise Reject(label, requeue=True)
        if how == "reject":
            raise Reject(label, requeue=False)
        if how == "ignore":
            raise Ignore(label)
        if how == "odd":
            return object()
        if how == "replace":
            return self.replace(app.signature(inner).clone(args))
        return value_of(label, args)

    @app.task(name="item")
    def item(label: str) -> str:
        journal("run", label, "", None)
        return value_of(label, ())

    @app.task(name="note")
    def note(failed_id: str, *, label: str) -> None:
        journal("error", label, failed_id)

    @app.task(name="tell")
    def tell(request: Any, exc: Any, traceback: Any, *, label: str) -> None:
        journal("error", label, request.id)

    app.task(name="work", bind=True, max_retries=None)(work)
    app.task(name="late", bind=True, max_retries=None, acks_late=True)(work)


def signature_of(app: MiniQ, node: Node, ids: Dict[str, str], explicit: bool = True) -> Signature:
    """Return the signature of a tree; `ids` are those its tasks get, by label."""
    made: Any
    if node.kind == "task":
        made = _task(app, node, ids, explicit)
    elif node.kind == "many":
        made = _many(app, node, ids, explicit)
    else:
        parts = [signature_of(app, one, ids, explicit) for one in node.parts]
        if node.kind == "group":
            made = group(*parts, app=app) if parts else group([], app=app)
        elif node.kind == "chord":
            assert node.body is not None
            made = chord(parts, signature_of(app, node.body, ids, explicit), app=app)
        elif node.piped:
            made = functools.reduce(operator.or_, parts)
        else:
            made = chain(*parts, app=app) if parts else chain([], app=app)
    for link in node.links:
        made.link(signature_of(app, link, ids, explicit))
    for errback in node.errbacks:
        made.link_error(_errback(app, errback))
    return made  # type: ignore[no-any-return]


def _task(app: MiniQ, node: Node, ids: Dict[str, str], explicit: bool) -> Signature:
    kwargs: Dict[str, Any] = {"label": node.label, "how": node.how, "times": node.times}
    if node.inner is not None:
        kwargs["inner"] = signature_of(app, node.inner, ids, explicit)
    options: Dict[str, Any] = {}
    if explicit:
        options["task_id"] = ids[node.label]
    if node.ignored:
        options["ignore_result"] = True
    if node.how == "expired":
        options["expires"] = "2001-01-01T00:00:00+00:00"
    name = "ghost" if node.how == "ghost" else "late" if node.late else "work"
    return Signature(name, tuple(node.own), kwargs, options, immutable=node.immutable, app=app)


def _many(app: MiniQ, node: Node, ids: Dict[str, str], explicit: bool) -> Any:
    task = app.tasks["item"]
    if node.how == "chunks":
        return task.chunks([(one,) for one in node.items], node.times)
    made = task.map(node.items) if node.how == "map" else task.starmap([(one,) for one in node.items])
    return made.set(task_id=ids[node.label]) if explicit else made


def _errback(app: MiniQ, errback: Errback) -> Signature:
    return Signature("tell" if errback.inline else "note", (), {"label": errback.label}, app=app)

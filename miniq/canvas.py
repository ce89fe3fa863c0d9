# SPDX-License-Identifier: MIT
"""Workflows: `chain`, `group`, `chord`, and many calls of one task (`chunks`, `xmap`, `xstarmap`).

Each is a `Signature` whose kwargs hold other signatures, so it is a plain dict too, can be an argument,
a step of another one or a callback, and is written in messages as Celery writes it.  What a workflow
sends is decided in `miniq.plan`, on plain data, and handed to the app as a whole: nothing here knows a
broker.

Source: section "Canvas" of Celery's user guide.
"""

from __future__ import annotations

from typing import Any, Iterable, List, Mapping, Optional, Sequence, Tuple

from .algebra import MAX_DEPTH, as_group, as_list, check, fold, kind_of, made_chain, made_chord
from .exceptions import ImproperlyConfigured
from .plan import Plan, plan
from .signatures import (
    Signature,
    check_signatures,
    maybe_signature,
    new_task_id,
    parts_in,
    signature,
    signature_of,
    subtask,
)
from .stamping import StampingVisitor
from .text import safe_repr

#: Calling options that say how messages are handed over, and not what is in them.
SENDING_OPTIONS = frozenset(
    {"producer", "retry", "retry_policy", "timeout", "confirm_timeout", "add_to_parent"}
)


class Workflow(Signature):
    """What chain, group, chord and chunks have in common: a plan is made, and sent as a whole."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Each kind is complete once it is created, and may turn out to be of another kind."""

    def plan(
        self,
        args: Any = (),
        kwargs: Optional[Mapping[str, Any]] = None,
        options: Optional[Mapping[str, Any]] = None,
    ) -> Plan:
        """Return what would be sent, without sending it."""
        app = self.app
        found = plan(
            self,
            args or (),
            kwargs,
            options,
            new_id=new_task_id,
            reply_to=app.identity[1],
            check_options=app.check_options,
            max_depth=MAX_DEPTH,
        )
        looked_after: Plan = app.looked_after(found)
        return looked_after

    def apply_async(self, args: Any = (), kwargs: Optional[Mapping[str, Any]] = None, **options: Any) -> Any:
        """Send it; return its result, None where it has no tasks.

        Arguments go before those of the tasks it begins with.  Options of a group go to all members, of
        a chord to header and body (`countdown` and `eta` to the header), of a chain to its first task;
        callbacks and `task_id` belong to the value of the whole.

        Nothing is sent unless all of it can be: see `miniq.algebra.check` for what is raised.
        """
        app = self.app
        if app.conf.task_always_eager:
            return self.apply(args, kwargs, **options)
        sending = {key: options.pop(key) for key in SENDING_OPTIONS & options.keys()}
        return app.send_plan(self.plan(args, kwargs, options), sending)

    def apply(self, args: Any = (), kwargs: Optional[Mapping[str, Any]] = None, **options: Any) -> Any:
        """Run it here, eagerly, one task after the other; see `Task.apply`.

        Arguments go through the serializer.  Raises `NotRegistered` where the code of a task is not here.
        """
        throw = options.pop("throw", None)
        for key in SENDING_OPTIONS & options.keys():
            del options[key]
        runner = self.app.eager_runner
        found = plan(
            self,
            args or (),
            kwargs,
            options,
            new_id=new_task_id,
            known_tasks=self.app.tasks,
            max_depth=MAX_DEPTH,
        )
        return runner.apply_plan(found, throw)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Send it with more arguments."""
        return self.apply_async(args, kwargs)

    @property
    def app(self) -> Any:
        """The app it is sent with: its own, else that of what is in it, else the current one."""
        for sig in (self, *self._inside()):
            if self._app is None:
                self._app = sig.app if sig is not self and isinstance(sig, Workflow) else sig._app
        return super().app

    def _inside(self) -> List[Signature]:
        """Return signatures in it that may know their app."""
        return []


class _Series(Workflow):
    """What chain and group have in common: a list of tasks."""

    def _wake(self) -> None:
        self["kwargs"]["tasks"] = list(self["kwargs"]["tasks"])

    def _clone_parts(self) -> None:
        self["kwargs"]["tasks"] = [one.clone() for one in self.tasks]

    @property
    def tasks(self) -> List[Signature]:
        """The signatures in it."""
        return parts_in(self["kwargs"], "tasks", self._app)

    @tasks.setter
    def tasks(self, tasks: Iterable[Any]) -> None:
        self["kwargs"]["tasks"] = [signature_of(one, self._app) for one in tasks]

    def _inside(self) -> List[Signature]:
        return self.tasks[:1]


@Signature.register_type()
class chain(_Series):
    """Tasks one after the other, each with the value of the one before as its first argument.

    ``chain(a, b, c)`` or ``a | b | c``.  Chains in it are flattened, a group of one is its member and an
    empty one nothing; a group that something follows makes it a `chord`.  Its value is the last one's.
    """

    def __new__(cls, *tasks: Any, app: Any = None, **options: Any) -> Any:
        steps = fold(_listed(tasks))
        if len(steps) == 1 and kind_of(steps[0]) == "chord":
            return signature_of(fold([made_chain(steps, options)])[0], app)
        return cls._made(made_chain(steps, options), app)

    def __repr__(self) -> str:
        return _shown(self.tasks, " | ") or "chain(<empty>)"


@Signature.register_type()
class group(_Series):
    """Tasks side by side: ``group(a, b)``, or of a list or generator, which is read at once.

    Groups in it are merged.  Its value is the list of theirs, in the order written.
    """

    def __new__(cls, *tasks: Any, app: Any = None, **options: Any) -> Any:
        return cls._made(
            {"task": "celery.group", "kwargs": {"tasks": _listed(tasks)}, "options": options,
             "subtask_type": "group"}, app,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.tasks)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"group([{_shown(self.tasks, ', ')}])" if self.tasks else "group(<empty>)"

    def apply_async(self, args: Any = (), kwargs: Optional[Mapping[str, Any]] = None, **options: Any) -> Any:
        """Send it; return a `GroupResult`.  A callback for all of it is what a chord is."""
        if options.get("link"):
            raise TypeError("a group has no callback of its own: write group(...) | callback, a chord")
        return super().apply_async(args, kwargs, **options)

    def __call__(self, *partial_args: Any, **options: Any) -> Any:
        """Send it with more arguments; keywords are options."""
        return self.apply_async(partial_args, **options)

    def link(self, callback: Signature) -> Any:
        """Send `callback` when the first member succeeds, with its own arguments only."""
        if not self.tasks:
            raise ValueError("an empty group has no task to link a callback to")
        return self.tasks[0].link(signature_of(callback, self._app).clone().set(immutable=True))

    def link_error(self, errback: Signature) -> Any:
        """Send `errback` whenever a member fails."""
        check_signatures((errback,), "link_error")
        for task in self.tasks:
            task.link_error(signature_of(errback, self._app).clone())
        return errback

    def set_immutable(self, immutable: bool) -> None:
        """Say it of all members."""
        for task in self.tasks:
            task.set_immutable(immutable)

    def skew(self, start: float = 1.0, stop: Optional[float] = None, step: float = 1.0) -> "group":
        """Delay the members by `start` seconds, `step` more from one to the next, up to `stop`."""
        for index, task in enumerate(self.tasks):
            countdown = start + index * step
            if stop is not None and countdown > stop:
                countdown = start + (stop - start) // step * step
            task.set(countdown=countdown)
        return self


@Signature.register_type()
class chord(Workflow):
    """A group and a task that gets the list of its values: ``chord(header, body)``, ``chord(header)(body)``.

    The body comes to an end whatever happens to the header: should a member fail, it fails with
    `ChordError`.  An empty header calls the body with ``[]``.
    """

    def __new__(
        cls,
        header: Any,
        body: Any = None,
        task: str = "celery.chord",
        args: Any = None,
        kwargs: Optional[Mapping[str, Any]] = None,
        app: Any = None,
        **options: Any,
    ) -> Any:
        if not isinstance(header, dict):
            header = _listed((header,))
        elif kind_of(header) != "group":
            header = [header]
        elif not header.get("args") and not any(header["options"].values()):
            header = header["kwargs"]["tasks"]
        if body is not None:
            check(body, where=None if isinstance(body, dict) else "the body of the chord")
        data = made_chord(header, body, options)
        data["args"], data["kwargs"]["kwargs"] = tuple(args or ()), dict(kwargs or {})
        return cls._made(data, app)

    def _wake(self) -> None:
        kwargs = self["kwargs"]
        if not isinstance(kwargs["header"], dict):
            kwargs["header"] = list(kwargs["header"])

    def _clone_parts(self) -> None:
        header = self.tasks
        self["kwargs"]["header"] = (
            header.clone() if isinstance(header, Signature) else [one.clone() for one in header]
        )
        if self.body is not None:
            self["kwargs"]["body"] = self.body.clone()

    @property
    def tasks(self) -> Any:
        """Its header: a list of signatures; once frozen, a group."""
        kwargs = self["kwargs"]
        if not isinstance(kwargs["header"], dict):
            return parts_in(kwargs, "header", self._app)
        kwargs["header"] = signature_of(kwargs["header"], self._app)
        return kwargs["header"]

    @tasks.setter
    def tasks(self, tasks: Any) -> None:
        self["kwargs"]["header"] = tasks if isinstance(tasks, dict) else list(tasks)

    @property
    def body(self) -> Any:
        """The signature that gets the list of values, or None."""
        kwargs = self["kwargs"]
        if kwargs["body"] is not None:
            kwargs["body"] = signature_of(kwargs["body"], self._app)
        return kwargs["body"]

    @body.setter
    def body(self, body: Any) -> None:
        self["kwargs"]["body"] = body

    def _members(self) -> List[Signature]:
        header: Any = self.tasks
        found: List[Signature] = header.tasks if isinstance(header, group) else header
        return found

    def _inside(self) -> List[Signature]:
        return [*self._members()[:1], *([] if self.body is None else [self.body])]

    def __repr__(self) -> str:
        body = "<no body>" if self.body is None else repr(self.body)
        return f"chord([{_shown(self._members(), ', ')}], {body})"

    def apply_async(self, args: Any = (), kwargs: Optional[Mapping[str, Any]] = None, **options: Any) -> Any:
        """Send it; return the result of the body, whose parent is that of the header."""
        kwargs = dict(kwargs or {})
        body = kwargs.pop("body", None)
        if body is not None:
            found = self.clone()
            found.body = body
            return found.apply_async(args, kwargs, **options)
        return super().apply_async(args, kwargs, **options)

    def __call__(self, body: Any = None, **options: Any) -> Any:
        """Send it, with `body` where it is given; keywords are options."""
        return self.apply_async((), {"body": body} if body is not None else {}, **options)

    def link(self, callback: Signature) -> Any:
        """Send `callback` with the value of the body; return `callback`."""
        return self._body().link(callback)

    def link_error(self, errback: Signature) -> Any:
        """Send `errback` when the body fails, be it because of its header; return `errback`.

        With the setting `task_allow_error_cb_on_chord_header` for each member that fails, too.
        """
        if self.app.conf.task_allow_error_cb_on_chord_header:
            for task in self._members():
                task.link_error(signature_of(errback, self._app).clone())
        return self._body().link_error(errback)

    def _body(self) -> Signature:
        if self.body is None:
            raise ValueError("this chord has no body yet to link a callback to")
        body: Signature = self.body
        return body

    def set_immutable(self, immutable: bool) -> None:
        """Say it of all members of the header."""
        for task in self._members():
            task.set_immutable(immutable)


# -- many calls of one task ------------------------------------------------------------------------


class _Map(Signature):
    """One message that calls a task for each item, one after the other; its value is their list."""

    _task_name = ""
    _shown = ""

    def __init__(self, task: Any = None, it: Iterable[Any] = (), app: Any = None, **options: Any) -> None:
        task = _as_signature(task)
        super().__init__(
            self._task_name, (), {"task": task, "it": list(it)}, options, immutable=True, app=app or task._app
        )

    def _wake(self) -> None:
        self["kwargs"]["task"] = signature_of(self["kwargs"]["task"], self._app)

    @property
    def type(self) -> Any:
        """The task that does it, which is in every app once that is complete."""
        self.app.finalize()
        return super().type

    def __repr__(self) -> str:
        return f"[{self.kwargs['task'].task}({self._shown}) for x in {safe_repr(self.kwargs['it'], 100)}]"


@Signature.register_type("celery.map")
class xmap(_Map):
    """Call a task with each item, in one message: ``task.map(items)``."""

    _task_name = "celery.map"
    _shown = "x"


@Signature.register_type("celery.starmap")
class xstarmap(_Map):
    """Call a task with each item as its arguments, in one message: ``task.starmap(items)``."""

    _task_name = "celery.starmap"
    _shown = "*x"


@Signature.register_type("celery.chunks")
class chunks(Workflow):
    """A group of `xstarmap`, each of `n` items: ``task.chunks(items, n)``."""

    def __new__(
        cls, task: Any = None, it: Iterable[Any] = (), n: int = 1, app: Any = None, **options: Any
    ) -> Any:
        task = _as_signature(task)
        kwargs = {"task": task, "it": list(it), "n": n}
        data = {"task": "celery.chunks", "kwargs": kwargs, "options": options, "immutable": True}
        check_signatures((data,), "chunks")
        return cls._made(data, app or task._app)

    def _wake(self) -> None:
        self["kwargs"]["task"] = signature_of(self["kwargs"]["task"], self._app)

    def _inside(self) -> List[Signature]:
        return [self["kwargs"]["task"]]

    def __repr__(self) -> str:
        return self.reprcall()

    def group(self) -> Any:
        """Return the group that it stands for."""
        return signature_of(as_group(self), self._app)

    def apply_async(self, args: Any = (), kwargs: Optional[Mapping[str, Any]] = None, **options: Any) -> Any:
        """Send it; return a `GroupResult` of lists."""
        return self.group().apply_async(args, kwargs, **options)

    def __call__(self, **options: Any) -> Any:
        """Send it; keywords are options."""
        return self.apply_async(**options)

    @classmethod
    def apply_chunks(cls, task: Any, it: Iterable[Any], n: int, app: Any = None) -> Any:
        """Make one and send it."""
        return cls(task, it, n, app=app)()


# -- small helpers -------------------------------------------------------------------------------


def _as_signature(task: Any) -> Signature:
    """Return a task, or a signature in any form, as a signature."""
    if isinstance(task, dict):
        return signature_of(task, None)
    if task is None:
        raise ImproperlyConfigured("this takes a task to call with each item, not None")
    return Signature(task)


def _listed(tasks: Tuple[Any, ...]) -> List[Any]:
    """Return what a workflow is made of: signatures, or one list, group or iterator of them."""
    given: Iterable[Any] = tasks
    if len(tasks) == 1 and not isinstance(tasks[0], dict) and hasattr(tasks[0], "__iter__"):
        given = tasks[0]
    found = list(given)
    for index, one in enumerate(found):
        check(one, where=None if isinstance(one, dict) else f"item {index} of the workflow")
    return found


def _shown(sigs: Sequence[Any], between: str) -> str:
    shown = [repr(one) for one in sigs[:20]]
    if len(sigs) > 20:
        shown.append(f"... {len(sigs) - 20} more")
    return between.join(shown)


__all__ = [
    "Signature",
    "StampingVisitor",
    "Workflow",
    "as_list",
    "chain",
    "check_signatures",
    "chord",
    "chunks",
    "group",
    "maybe_signature",
    "new_task_id",
    "signature",
    "signature_of",
    "subtask",
    "xmap",
    "xstarmap",
]

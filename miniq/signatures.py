# SPDX-License-Identifier: MIT
"""Signatures: a call of a task as data, to be sent now, later, or after another task.

A signature is a plain dict (it travels as JSON in messages), with methods::

    {"task": name, "args": [...], "kwargs": {...}, "options": {...},
     "subtask_type": None, "immutable": False}

`options` are those of `Task.apply_async`; `link` and `link_error` hold lists of signatures.  A
workflow is a signature whose `subtask_type` is "chain", "group" or "chord" and whose kwargs hold other
signatures (`miniq.canvas`); ``|`` joins any two.

Source: section "Signatures" of Celery's canvas, wire form of its message protocol 2.
"""

from __future__ import annotations

import copy
import os
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ClassVar,
    Dict,
    Iterable,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Type,
    TypeVar,
)

from . import _state
from .algebra import MAX_DEPTH, as_list, bound, check, chord_of, fold, joined, kind_of, with_id
from .plan import Freezer
from .result import result_from_tuple
from .stamping import StampingVisitor, stamp
from .text import safe_repr

S = TypeVar("S", bound="Signature")


def new_task_id() -> str:
    """Return a random UUID4 as text."""
    text = os.urandom(16).hex()
    variant = "89ab"[int(text[16], 16) & 3]
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{variant}{text[17:20]}-{text[20:]}"


class Signature(Dict[str, Any]):
    """A task call as a dict; make one with ``task.s(...)`` or `signature`."""

    #: subtask_type (of the three that have none: task name) -> class.
    TYPES: ClassVar[Dict[str, Type[Signature]]] = {}

    _app: Any
    _type: Any

    def __init__(
        self,
        task: Any = None,
        args: Optional[Any] = None,
        kwargs: Optional[Mapping[str, Any]] = None,
        options: Optional[Mapping[str, Any]] = None,
        type: Any = None,  # noqa: A002 - Celery's public name
        subtask_type: Optional[str] = None,
        immutable: bool = False,
        app: Any = None,
        **ex: Any,
    ) -> None:
        self._app = app
        self._type = type
        if isinstance(task, dict):
            super().__init__(task)
            self["args"] = self.get("args") or ()
            self["kwargs"] = self.get("kwargs") or {}
            self["options"] = self.get("options") or {}
            self.setdefault("subtask_type", None)
            self.setdefault("immutable", False)
            return
        if task is not None and not isinstance(task, str):
            self._type = task
            self._app = app or task.app
            task = task.name
        super().__init__(
            task=task,
            args=tuple(args or ()),
            kwargs=dict(kwargs or {}),
            options=dict(options or {}, **ex),
            subtask_type=subtask_type,
            immutable=immutable,
        )

    @classmethod
    def register_type(cls, name: Optional[str] = None) -> Callable[[Type[S]], Type[S]]:
        """Decorate a class that signatures with this `subtask_type` become when read from plain dicts."""

        def register(subclass: Type[S]) -> Type[S]:
            cls.TYPES[name or subclass.__name__] = subclass
            return subclass

        return register

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], app: Any = None) -> "Signature":
        """Return the signature that a plain dict is, of the class that it says, with all in it."""
        kind = d.get("subtask_type") or d.get("task")
        target = cls.TYPES.get(kind, Signature) if isinstance(kind, str) else Signature
        if isinstance(d, target):
            d._app = d._app or app
            return d
        return target._made(d, app)

    @classmethod
    def _made(cls: Type[S], data: Mapping[str, Any], app: Any = None, task: Any = None) -> S:
        """Return a signature of this class around `data`, whose parts become signatures too."""
        found: S = dict.__new__(cls)
        Signature.__init__(found, dict(data), app=app, type=task)
        found["kwargs"] = dict(found["kwargs"])
        found._wake()
        return found

    def _wake(self) -> None:
        """Make the containers in it its own; the signatures become objects when they are asked for."""

    # -- what it is

    @property
    def app(self) -> Any:
        """The app it is sent with: the task's own, else the current one."""
        if self._app is None:
            self._app = _state.current_app()
        return self._app

    @property
    def type(self) -> Any:
        """The task it calls, if that is registered here; else None."""
        return self._type or self.app.tasks.get(self["task"])

    @property
    def task(self) -> str:
        """The name of the task."""
        return str(self["task"])

    name = task

    @property
    def args(self) -> Any:
        """Its positional arguments."""
        return self["args"]

    @property
    def kwargs(self) -> Dict[str, Any]:
        """Its keyword arguments."""
        kwargs: Dict[str, Any] = self["kwargs"]
        return kwargs

    @property
    def options(self) -> Dict[str, Any]:
        """Its calling options."""
        options: Dict[str, Any] = self["options"]
        return options

    @property
    def id(self) -> Optional[str]:
        """The id it will run under, once frozen or given."""
        return self.options.get("task_id")

    @property
    def parent_id(self) -> Optional[str]:
        """The id of the task that sends it, once given."""
        return self.options.get("parent_id")

    @property
    def root_id(self) -> Optional[str]:
        """The id of the first task of its workflow, once given."""
        return self.options.get("root_id")

    @property
    def subtask_type(self) -> Optional[str]:
        """Return "chain", "group" or "chord"; None for a single task."""
        return self.get("subtask_type")

    @property
    def immutable(self) -> bool:
        """True where arguments given later are left out."""
        return bool(self.get("immutable"))

    def __repr__(self) -> str:
        return self.reprcall()

    def reprcall(self, *args: Any, **kwargs: Any) -> str:
        """Return the call as text, with these arguments added."""
        all_args, all_kwargs, _ = self._merged(args, kwargs, {})
        words = [safe_repr(arg) for arg in all_args]
        words += [f"{key}={safe_repr(value)}" for key, value in all_kwargs.items()]
        return f"{self['task']}({', '.join(words)})"

    def __reduce__(self) -> Tuple[Any, ...]:
        # Pickled as the plain dict that it is: whoever reads it may have miniq elsewhere, or Celery.
        return dict, (dict(self),)

    def __copy__(self: S) -> S:
        return self.clone()

    def __deepcopy__(self: S, memo: Dict[int, Any]) -> S:
        found = type(self)._made(copy.deepcopy(dict(self), memo), self._app, self._type)
        memo[id(self)] = found
        return found

    if not TYPE_CHECKING:  # a checker knows what there is

        def __getattr__(self, name: str) -> Any:
            raise _state.missing("a signature", name)

    # -- joining; a dict's own operators would merge the two into one call

    def __or__(self, other: Any) -> Any:
        """Run `other` after this one, with its value; see `chain`."""
        return _piped(self, other)

    __ior__ = __or__

    def __ror__(self, other: Any) -> Any:
        return _piped(other, self)

    def __invert__(self) -> Any:
        """Send it and wait for its value."""
        return self.apply_async().get()

    # -- variations

    def __call__(self, *partial_args: Any, **partial_kwargs: Any) -> Any:
        """Run the task inline, here and now; `NotRegistered` if its code is not here."""
        args, kwargs, _ = self._merged(partial_args, partial_kwargs, {})
        return self._local_task()(*args, **kwargs)

    def _local_task(self) -> Any:
        return self.type or self.app.tasks[self["task"]]

    def clone(self: S, args: Any = (), kwargs: Optional[Mapping[str, Any]] = None, **options: Any) -> S:
        """Return a copy with `args` put before its own, `kwargs` and `options` over its own."""
        merged = bound(self, tuple(args or ()), kwargs or {}, options)
        for key in ("link", "link_error"):
            if merged["options"].get(key):
                merged["options"][key] = as_list(merged["options"][key])
        found = type(self)._made({**self, **merged}, self._app, self._type)
        found._clone_parts()
        return found

    partial = clone

    def _clone_parts(self) -> None:
        """Make the signatures in it its own."""

    def replace(
        self: S,
        args: Optional[Sequence[Any]] = None,
        kwargs: Optional[Mapping[str, Any]] = None,
        options: Optional[Mapping[str, Any]] = None,
    ) -> S:
        """Return a copy with other args, kwargs or options, where they are given."""
        found = self.clone()
        if args is not None:
            found["args"] = tuple(args)
        if kwargs is not None:
            found["kwargs"] = dict(kwargs)
        if options is not None:
            found["options"] = dict(options)
        return found

    def set(self: S, immutable: Optional[bool] = None, **options: Any) -> S:
        """Set options in place; return itself."""
        if immutable is not None:
            self.set_immutable(immutable)
        self.options.update(options)
        return self

    def set_immutable(self, immutable: bool) -> None:
        """Say whether arguments given later are left out."""
        self["immutable"] = immutable

    def link(self, callback: "Signature") -> Any:
        """Send `callback` with the result when this task succeeds; return `callback`."""
        return self.append_to_list_option("link", callback)

    def link_error(self, errback: "Signature") -> Any:
        """Send `errback` when this task fails; return `errback`."""
        return self.append_to_list_option("link_error", errback)

    def on_error(self: S, errback: "Signature") -> S:
        """Do as `link_error`; return itself, for chaining of calls."""
        self.link_error(errback)
        return self

    def append_to_list_option(self, key: str, value: "Signature") -> "Signature":
        """Add a signature to those in option `key`, once; return it."""
        check_signatures((value,), key)
        known = as_list(self.options.get(key))
        if value not in known:
            known.append(value)
        self.options[key] = known
        return value

    def extend_list_option(self, key: str, value: Any) -> None:
        """Add one or several signatures to those in option `key`, each once."""
        for one in as_list(value):
            self.append_to_list_option(key, one)

    def flatten_links(self) -> "List[Signature]":
        """Return itself, its callbacks, theirs, and so on."""
        found: List[Signature] = [self]
        for callback in as_list(self.options.get("link")):
            found += signature_of(callback, self._app).flatten_links()
        return found

    def unchain_tasks(self) -> "List[Signature]":
        """Return the steps of a chain as signatures of their own, callbacks of the chain with them."""
        return [signature_of(step, self._app).clone() for step in fold([self])]

    def stamp(
        self: S, visitor: Optional[StampingVisitor] = None, append_stamps: bool = False, **headers: Any
    ) -> S:
        """Put stamps on it and all in it, in place: `headers`, and what `visitor` says; return itself.

        With `append_stamps` a stamp that is there already becomes a list, the new value first.
        """
        for key in ("link", "link_error"):
            if self.options.get(key):
                self.options[key] = [signature_of(one, self._app) for one in as_list(self.options[key])]
        stamp(self, visitor, append_stamps, headers)
        return self

    # -- sending

    def freeze(
        self,
        _id: Optional[str] = None,
        group_id: Optional[str] = None,
        chord: Optional[Mapping[str, Any]] = None,
        root_id: Optional[str] = None,
        parent_id: Optional[str] = None,
        group_index: Optional[int] = None,
    ) -> Any:
        """Give it, and all in it, the ids they will run under; return its result.

        Changes the signature in place; what already has an id keeps it.
        """
        given = {
            "group_id": group_id, "chord": chord, "root_id": root_id, "parent_id": parent_id,
            "group_index": group_index,
        }  # fmt: skip
        check(self, max_depth=MAX_DEPTH)
        node = bound(self, (), {}, {key: value for key, value in given.items() if value is not None})
        if _id is not None and not self.id:
            node = with_id(node, _id)
        frozen, result = Freezer(new_task_id, self.app.identity[1]).freeze(node)
        self.update(frozen)
        self._wake()
        return None if result is None else result_from_tuple(result, self.app)

    _freeze = freeze

    def election(self) -> Any:
        """Let the workers choose one of them to run it."""
        task_id = self.id or new_task_id()
        self.app.control.election(task_id, "task", self.clone(task_id=task_id))
        return self.app.AsyncResult(task_id)

    def delay(self, *args: Any, **kwargs: Any) -> Any:
        """Send it with more arguments; see `Task.delay`."""
        return self.apply_async(args, kwargs)

    def apply_async(self, args: Any = (), kwargs: Optional[Mapping[str, Any]] = None, **options: Any) -> Any:
        """Send it; arguments go before its own, options over its own."""
        all_args, all_kwargs, all_options = self._merged(args, kwargs or {}, options)
        task = self.type
        if task is not None:
            return task.apply_async(all_args, all_kwargs, **all_options)
        return self.app.send_task(self["task"], all_args, all_kwargs, **all_options)

    def apply(self, args: Any = (), kwargs: Optional[Mapping[str, Any]] = None, **options: Any) -> Any:
        """Run it here, eagerly; see `Task.apply`."""
        all_args, all_kwargs, all_options = self._merged(args, kwargs or {}, options)
        return self._local_task().apply(all_args, all_kwargs, **all_options)

    def _merged(
        self, args: Any, kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Tuple[Tuple[Any, ...], Dict[str, Any], Dict[str, Any]]:
        merged = bound(self, tuple(args or ()), kwargs, options)
        return tuple(merged["args"]), merged["kwargs"], merged["options"]


# -- making signatures -----------------------------------------------------------------------------


def signature(varies: Any, *args: Any, **kwargs: Any) -> Signature:
    """Return a signature of a task, a task name, or a signature that came as a plain dict.

    Raises what `miniq.algebra.check` raises for a dict that is none.
    """
    app = kwargs.pop("app", None)
    if isinstance(varies, dict):
        check_signatures((varies,), "signature")
        found = varies.clone() if isinstance(varies, Signature) else Signature.from_dict(varies, app)
        found._app = found._app or app
        return found
    kwargs["app"] = app
    return Signature(varies, *args, **kwargs)


subtask = signature


def maybe_signature(value: Any, app: Any = None, clone: bool = False) -> Optional[Signature]:
    """Return a signature for a dict, itself (or a copy) for a signature, None for None."""
    if value is None:
        return None
    if isinstance(value, Signature) and not clone:
        value._app = value._app or app
        return value
    return signature(value, app=app)


def signature_of(value: Any, app: Any) -> Signature:
    """Return the signature that `value` is: itself, or made of a plain dict."""
    if isinstance(value, Signature):
        return value
    check(value)
    return Signature.from_dict(value, app)


def parts_in(kwargs: Dict[str, Any], key: str, app: Any) -> List[Signature]:
    """Return the list of signatures under `key`; plain dicts in it have become objects."""
    found: List[Any] = kwargs[key]
    for index, one in enumerate(found):
        if not isinstance(one, Signature):
            found[index] = signature_of(one, app)
    return found


def check_signatures(values: Iterable[Any], what: str) -> None:
    """Raise unless all can be sent; `what` says where they are.  See `miniq.algebra.check`."""
    for value in values:
        check(value, where=what)


def _piped(left: Any, right: Any) -> Signature:
    for side in (left, right):
        if not isinstance(side, dict):
            check(side, where=f"{safe_repr(left, 60)} | {safe_repr(right, 60)}")
    left, right = signature_of(left, None), signature_of(right, None)
    after = fold([right])
    # However many members a group happens to have: what follows gets a list.
    found = chord_of(left, joined(after)) if after and kind_of(left) == "group" else joined([left, right])
    return signature_of(found, left._app or right._app)

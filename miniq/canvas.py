# SPDX-License-Identifier: MIT
"""Signatures: a call of a task as data, to be sent now, later, or after another task.

A signature is a plain dict (it travels as JSON in messages), with methods::

    {"task": name, "args": [...], "kwargs": {...}, "options": {...},
     "subtask_type": None, "immutable": False}

`options` are those of `Task.apply_async`; `link` and `link_error` hold lists of signatures.
Workflow types (chain, group, chord) are refused wherever one turns up: this version of miniq runs
single tasks with callbacks.

Source: section "Signatures" of Celery's canvas, wire form of its message protocol 2.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Mapping, Optional, Tuple, Union

from . import _state
from .exceptions import ImproperlyConfigured
from .text import safe_repr

#: Options of a signature that hold signatures themselves.
_NESTED = ("link", "link_error", "chain")


class Signature(Dict[str, Any]):
    """A task call as a dict; make one with ``task.s(...)`` or `signature`."""

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
    def immutable(self) -> bool:
        """True where arguments given later are left out."""
        return bool(self.get("immutable"))

    def __repr__(self) -> str:
        words = [safe_repr(arg) for arg in self.args]
        words += [f"{key}={safe_repr(value)}" for key, value in self.kwargs.items()]
        return f"{self['task']}({', '.join(words)})"

    def __reduce__(self) -> Tuple[Any, ...]:
        # Pickled as the plain dict that it is: whoever reads it may have miniq elsewhere, or Celery.
        return dict, (dict(self),)

    def __copy__(self) -> "Signature":
        return self.clone()

    def __deepcopy__(self, memo: Dict[int, Any]) -> "Signature":
        found = Signature(copy.deepcopy(dict(self), memo), type=self._type, app=self._app)
        memo[id(self)] = found
        return found

    if not TYPE_CHECKING:  # a checker knows what there is

        def __getattr__(self, name: str) -> Any:
            raise _state.missing("a signature", name)

    # A dict's own operator would merge the two into one call.
    def __or__(self, other: Any) -> Any:
        raise ImproperlyConfigured(
            f"{self!r} | {safe_repr(other, 100)}: this version of miniq has no chains;"
            " send the second one when the first succeeds with link="
        )

    __ror__ = __ior__ = __or__

    def __invert__(self) -> Any:
        """Send it and wait for its value."""
        return self.apply_async().get()

    # -- variations

    def __call__(self, *partial_args: Any, **partial_kwargs: Any) -> Any:
        """Run the task inline, here and now; `NotRegistered` if its code is not here."""
        args, kwargs, _ = self._merged(partial_args, partial_kwargs, {})
        return self._local_task()(*args, **kwargs)

    def _local_task(self) -> Any:
        return self._type or self.app.tasks[self["task"]]

    def clone(
        self, args: Any = (), kwargs: Optional[Mapping[str, Any]] = None, **options: Any
    ) -> "Signature":
        """Return a copy with `args` put before its own, `kwargs` and `options` over its own."""
        args, kwargs, options = self._merged(args, kwargs or {}, options)
        found = Signature(
            self["task"],
            args,
            kwargs,
            options,
            self._type,
            self.get("subtask_type"),
            self.immutable,
            self._app,
        )
        for key in ("link", "link_error"):
            if found.options.get(key):
                found.options[key] = as_list(found.options[key])
        return found

    partial = clone

    def set(self, immutable: Optional[bool] = None, **options: Any) -> "Signature":
        """Set options in place; return itself."""
        if immutable is not None:
            self["immutable"] = immutable
        self.options.update(options)
        return self

    def link(self, callback: "Signature") -> "Signature":
        """Send `callback` with the result when this task succeeds; return `callback`."""
        self._append("link", callback)
        return callback

    def link_error(self, errback: "Signature") -> "Signature":
        """Send `errback` when this task fails; return `errback`."""
        self._append("link_error", errback)
        return errback

    def on_error(self, errback: "Signature") -> "Signature":
        """Do as `link_error`; return itself, for chaining of calls."""
        self.link_error(errback)
        return self

    def _append(self, key: str, sig: "Signature") -> None:
        check_signatures((sig,), key)
        known = as_list(self.options.get(key))
        if sig not in known:
            known.append(sig)
        self.options[key] = known

    # -- sending

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
        all_options = {**self.options, **options}
        if self.immutable:
            return tuple(self.args), self.kwargs, all_options
        return tuple(args or ()) + tuple(self.args), {**self.kwargs, **kwargs}, all_options


def signature(varies: Any, *args: Any, **kwargs: Any) -> Signature:
    """Return a signature of a task, a task name, or a signature that came as a plain dict.

    Raises `ImproperlyConfigured` for workflow types (chain, group, chord).
    """
    app = kwargs.pop("app", None)
    if isinstance(varies, dict):
        check_signatures((varies,), "signature")
        found = varies.clone() if isinstance(varies, Signature) else Signature(varies)
        found._app = found._app or app
        return found
    kwargs["app"] = app
    return Signature(varies, *args, **kwargs)


def maybe_signature(value: Any, app: Any = None) -> Optional[Signature]:
    """Return a signature for a dict, itself for a signature, None for None."""
    if value is None:
        return None
    if isinstance(value, Signature):
        value._app = value._app or app
        return value
    return signature(value, app=app)


def as_list(value: Union[Mapping[str, Any], Iterable[Any], None]) -> List[Any]:
    """Return callbacks as a list: none, one signature, or several."""
    if value is None:
        return []
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    return [value]


def check_signatures(values: Iterable[Any], what: str) -> None:
    """Raise unless all are signatures of single tasks, and their own callbacks too.

    `TypeError` for what is no signature at all, `ImproperlyConfigured` for one that this version
    cannot send.  `what` says where they are.
    """
    for value in values:
        if not isinstance(value, dict):
            hint = "" if not hasattr(value, "s") else f"; write {getattr(value, 'name', 'task')}.s(...)"
            raise TypeError(f"{what}: {safe_repr(value, 100)} is no signature{hint}")
        kind = value.get("subtask_type")
        if kind:
            raise ImproperlyConfigured(f"{what}: a {kind} cannot be sent by this version of miniq")
        if not isinstance(value.get("task"), str):
            raise ImproperlyConfigured(
                f"{what}: a signature needs the name of a task, not {safe_repr(value.get('task'), 100)}"
            )
        options = value.get("options")
        if options:
            for key in _NESTED:
                if options.get(key):
                    check_signatures(as_list(options[key]), f"{what} of {value['task']}: {key}")

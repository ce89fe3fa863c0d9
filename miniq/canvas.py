# SPDX-License-Identifier: MIT
"""Signatures: a call of a task as data, to be sent now, later, or after another task.

A signature is a plain dict (it travels as JSON in messages), with methods::

    {"task": name, "args": [...], "kwargs": {...}, "options": {...},
     "subtask_type": None, "immutable": False}

`options` are those of `Task.apply_async`; `link` and `link_error` hold lists of signatures.
Source: section "Signatures" of Celery's canvas, wire form of its message protocol 2.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

from . import _state
from .exceptions import ImproperlyConfigured

#: Signature types this version can run, by their `subtask_type`.
_PLAIN = (None, "")


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
            self.setdefault("args", [])
            self.setdefault("kwargs", {})
            self.setdefault("options", {})
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
        return str(self["task"])

    name = task

    @property
    def args(self) -> Any:
        return self["args"]

    @property
    def kwargs(self) -> Dict[str, Any]:
        kwargs: Dict[str, Any] = self["kwargs"]
        return kwargs

    @property
    def options(self) -> Dict[str, Any]:
        options: Dict[str, Any] = self["options"]
        return options

    @property
    def id(self) -> Optional[str]:
        """The id it will run under, once frozen or given."""
        return self.options.get("task_id")

    @property
    def immutable(self) -> bool:
        return bool(self.get("immutable"))

    def __repr__(self) -> str:
        words = [repr(arg) for arg in self.args] + [f"{k}={v!r}" for k, v in self.kwargs.items()]
        return f"{self['task']}({', '.join(words)})"

    def __reduce__(self) -> Tuple[Any, ...]:
        return dict, (dict(self),)

    # -- variations

    def __call__(self, *partial_args: Any, **partial_kwargs: Any) -> Any:
        """Run the task inline, here and now."""
        args, kwargs, _ = self._merged(partial_args, partial_kwargs, {})
        return self.type(*args, **kwargs)

    def clone(
        self, args: Any = (), kwargs: Optional[Mapping[str, Any]] = None, **options: Any
    ) -> "Signature":
        """Return a copy with `args` put before its own, `kwargs` and `options` over its own."""
        args, kwargs, options = self._merged(args, kwargs or {}, options)
        copy = Signature(
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
            if copy.options.get(key):
                copy.options[key] = list(as_list(copy.options[key]))
        return copy

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
        known = list(as_list(self.options.get(key)))
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
        return self.type.apply(all_args, all_kwargs, **all_options)

    def _merged(
        self, args: Any, kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Tuple[Tuple[Any, ...], Dict[str, Any], Dict[str, Any]]:
        all_options = {**self.options, **options}
        if self.immutable:
            return tuple(self.args), self.kwargs, all_options
        return tuple(args or ()) + tuple(self.args), {**self.kwargs, **kwargs}, all_options


def signature(varies: Any, *args: Any, **kwargs: Any) -> Signature:
    """Return a signature of a task, a task name, or a signature that came as a plain dict.

    Raises `ImproperlyConfigured` for workflow types (chain, group, chord): this version runs
    single tasks with callbacks.
    """
    app = kwargs.pop("app", None)
    if isinstance(varies, dict):
        kind = varies.get("subtask_type")
        if kind not in _PLAIN:
            raise ImproperlyConfigured(
                f"a signature of type {kind!r} cannot be sent by this version of miniq"
            )
        if isinstance(varies, Signature):
            return varies.clone()
        if not isinstance(varies.get("task"), str):
            raise ImproperlyConfigured(f"a signature needs a task name, this one has {varies.get('task')!r}")
        return Signature(varies, app=app)
    kwargs["app"] = app
    return Signature(varies, *args, **kwargs)


def maybe_signature(value: Any, app: Any = None) -> Optional[Signature]:
    """Return a signature for a dict, itself for a signature, None for None."""
    if value is None or isinstance(value, Signature):
        return value
    return signature(value, app=app)


def as_list(value: Union[None, Mapping[str, Any], List[Any], Tuple[Any, ...]]) -> List[Any]:
    """Return callbacks as a list: none, one signature, or several."""
    if value is None:
        return []
    if isinstance(value, dict):
        return [value]
    return list(value)

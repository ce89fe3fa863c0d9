# SPDX-License-Identifier: MIT
"""The tasks of an app: how a function becomes one, what is checked, and under which name it is kept.

A task made of a function is the one instance of a class of its own, whose attributes are the
decorator's options, so that ``base=`` classes and options mean the same.
"""

from __future__ import annotations

import warnings
from types import FunctionType
from typing import Any, Callable, Dict, Iterable, Optional, Type, Union

from . import _state
from .exceptions import DuplicateTaskNameWarning, NotRegistered
from .task import DECORATOR_OPTIONS, REFUSED_OPTIONS, Parameters, check_task
from .task import Task as BaseTask
from .text import import_object, nearest

#: How like a known task option another one must be to be taken for a misspelling (difflib's ratio).
MISSPELLING = 0.78


class TaskRegistry(Dict[str, BaseTask]):
    """The tasks of an app, by name."""

    def __missing__(self, name: str) -> BaseTask:
        raise NotRegistered(name)

    def register(self, task: BaseTask) -> None:
        """Add `task` under its name."""
        self[task.name] = task

    def unregister(self, name: Union[str, BaseTask]) -> None:
        """Remove a task; `NotRegistered` if there is none."""
        try:
            del self[getattr(name, "name", name)]  # type: ignore[arg-type]
        except KeyError:
            raise NotRegistered(name) from None


def task_from_function(
    app: Any,
    /,
    fun: Callable[..., Any],
    name: Optional[str] = None,
    base: Optional[Type[BaseTask]] = None,
    bind: bool = False,
    shared: bool = False,
    lazy: bool = True,
    filter: Optional[Callable[[Any], Any]] = None,  # noqa: A002 - Celery's public name
    **options: Any,
) -> Any:
    """Make a task of a function and register it; see `MiniQ.task`."""
    if isinstance(fun, BaseTask) or not callable(fun):
        raise TypeError(f"a task is made of a function, not of {fun!r:.200}")
    module = getattr(fun, "__module__", None) or ""
    if shared:
        _state.add_shared(lambda other: task_from_function(other, fun, name, base, bind, **options))
    if name is None:
        if not hasattr(fun, "__name__"):
            raise TypeError(f"{fun!r:.200} has no __name__: give the task a name=")
        task_name = app.gen_task_name(fun.__name__, module)
    else:
        task_name = name
    cls = base or app.Task
    check_names(task_name, options, cls)
    known = app.tasks.get(task_name)
    if known is not None and getattr(known, "__wrapped__", None) is fun:
        return known
    attributes = {
        "app": app,
        "name": task_name,
        "run": _bindable(fun) if bind else staticmethod(fun),
        "__doc__": fun.__doc__,
        "__module__": module,
        "__wrapped__": staticmethod(fun),
        **options,
    }
    task: BaseTask = type(getattr(fun, "__name__", "task"), (cls,), attributes)()
    parameters = Parameters(fun, bind)
    task._check_arguments = parameters.check
    task._positional = parameters.positional
    task.takes_errback_arguments = parameters.takes_several and not bind
    register(app, task)
    return task if filter is None else filter(task)


def register(app: Any, task: BaseTask) -> BaseTask:
    """Add a task to those of `app`, with what the app's settings say of it; return it."""
    annotate(task, app.conf.task_annotations)
    known = app.tasks.get(task.name)
    if known is not None and known is not task:
        _warn_of_duplicate(known, task)
    app.tasks[task.name] = task
    type(task).on_bound(app)
    return task


def annotate(task: BaseTask, annotations: Any) -> None:
    """Apply the setting `task_annotations`: one annotation, or several.

    ``{name or "*": {attribute: value}}``, an object with ``annotate(task)`` that returns such
    attributes, the path of one, or a list of these.  A plain function becomes a method, as it
    would in the task's class.
    """
    for annotation in annotations if isinstance(annotations, (list, tuple)) else (annotations,):
        if isinstance(annotation, str):
            annotation = import_object(annotation)
        if isinstance(annotation, type):
            annotation = annotation()
        if isinstance(annotation, dict):
            found = {**(annotation.get("*") or {}), **(annotation.get(task.name) or {})}
        else:
            found = annotation.annotate(task) or {} if annotation is not None else {}
        check_names(f"{task.name} in task_annotations", found, type(task))
        for key, value in found.items():
            setattr(task, key, value.__get__(task) if isinstance(value, FunctionType) else value)
    check_task(task)


def check_names(name: str, options: Iterable[str], base: type) -> None:
    """Raise `TypeError` for an option that looks like a known one misspelt; others become attributes."""
    for key in options:
        if key in DECORATOR_OPTIONS or key in REFUSED_OPTIONS or hasattr(base, key):
            continue
        hint = nearest(key, DECORATOR_OPTIONS, only_typos=True)
        if hint is None:
            import difflib  # only for a task with an attribute of its own

            found = difflib.get_close_matches(key, DECORATOR_OPTIONS, 1, MISSPELLING)
            hint = found[0] if found else None
        if hint is not None:
            raise TypeError(
                f"task {name}: unknown option {key!r}: did you mean {hint!r}?"
                " (an attribute of your own that is so like it can be declared in a base= class)"
            )


def _bindable(fun: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fun` as something that becomes a method in a class body; only functions do by themselves."""
    if isinstance(fun, FunctionType):
        return fun
    return lambda task, *args, **kwargs: fun(task, *args, **kwargs)


def _warn_of_duplicate(known: BaseTask, task: BaseTask) -> None:
    """Warn when a name changes hands; the same source read again (a reload, a notebook) is no change."""
    old, new = (getattr(one, "__wrapped__", None) or type(one) for one in (known, task))
    same_place = _place(old) == _place(new)
    # Two closures made by one function share its code, but not what they enclose.
    if same_place and getattr(old, "__code__", None) is not getattr(new, "__code__", old):
        return
    if same_place and isinstance(new, type):
        return
    warnings.warn(
        f"task {task.name!r}: {_place(new)} takes the place of {_place(old)}, whose messages it will get;"
        " give one of them another name=",
        DuplicateTaskNameWarning,
        stacklevel=5,
    )


def _place(fun: Any) -> str:
    return f"{getattr(fun, '__module__', None)}.{getattr(fun, '__qualname__', None) or repr(fun)}"

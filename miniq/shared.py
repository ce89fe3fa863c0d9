# SPDX-License-Identifier: MIT
"""Tasks that belong to every app: `shared_task`, for code that must not name one.

What the decorator returns stands for the task of the app that is current when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Optional

from . import _state
from .registry import task_from_function
from .task import Task as BaseTask

if TYPE_CHECKING:
    from typing import TypeVar, overload

    from typing_extensions import Literal, ParamSpec

    from .task import BoundDecorator, Decorator, TypedTask

    P = ParamSpec("P")
    C = TypeVar("C")


class SharedTask:
    """Stands for a shared task; every attribute is that of the current app's task."""

    def __init__(self, fun: Callable[..., Any], name: Optional[str]) -> None:
        self.__dict__.update(_fun=fun, _name=name, __wrapped__=fun, __doc__=fun.__doc__)
        self.__dict__["__module__"] = fun.__module__

    def _resolve(self) -> BaseTask:
        app = _state.current_app()
        task: BaseTask = app.tasks[self._name or app.gen_task_name(self._fun.__name__, self._fun.__module__)]
        return task

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # so that isinstance() says what it stands for
        return BaseTask

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._resolve()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._resolve(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._resolve(), name, value)

    def __eq__(self, other: object) -> bool:
        return self is other or self._resolve() is other

    def __hash__(self) -> int:
        return hash(self._fun)

    def __repr__(self) -> str:
        return f"<shared task {self._name or self._fun.__qualname__}>"

    def __reduce_ex__(self, protocol: Any) -> str:
        name: str = self._fun.__qualname__
        return name


if TYPE_CHECKING:

    @overload
    def shared_task(fun: Callable[P, C], /) -> TypedTask[P, C]: ...
    @overload
    def shared_task(*, bind: Literal[True], **options: Any) -> BoundDecorator: ...
    @overload
    def shared_task(**options: Any) -> Decorator: ...
    def shared_task(*args: Any, **options: Any) -> Any: ...

else:

    def shared_task(*args: Any, **options: Any) -> Any:
        """Decorate a function to make it a task of every app, those of the future included.

        Returns a proxy: what is called is the task of the current app.
        """

        def decorate(fun: Callable[..., Any]) -> Any:
            _state.add_shared(lambda app: task_from_function(app, fun, **options))
            return SharedTask(fun, options.get("name"))

        if len(args) == 1 and callable(args[0]) and not options:
            return decorate(args[0])
        if args:
            raise TypeError(f"@shared_task takes options as keywords only, not {args[0]!r}")
        return decorate

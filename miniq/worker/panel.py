# SPDX-License-Identifier: MIT
"""The commands that a worker knows: a table of functions, and what the command line says of them.

A command is a function ``fun(state, **arguments)``; `state` is the worker.  What it returns is the
reply; an exception becomes ``{"error": repr}``.  It runs in the worker's loop: while it does, no
message is taken and no result stored, so it has to be quick.

    @control_command(args=[("n", int)], signature="[N=1]")      changes something
    @inspect_command(alias="dump_active")                       tells something

Source: Celery's decorators of the same names.
"""

from __future__ import annotations

from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ClassVar,
    Dict,
    List,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    TypeVar,
    overload,
)

from ..backends.base import Backend
from ..control import TIMEOUT_S
from ..log import get_logger
from ..pools.base import Pool
from ..routing import Queue
from ..transports.base import Transport
from .consumer import TaskConsumer
from .events import WorkerEvents

logger = get_logger(__name__)

Handler = Callable[..., Any]
F = TypeVar("F", bound=Handler)


class ControlledWorker(Protocol):
    """What commands need of a worker."""

    app: Any
    hostname: str
    concurrency: int
    prefetch_multiplier: int
    queues: List[Queue]
    tasks: TaskConsumer
    pool: Pool
    transport: Transport
    backend: Backend
    autoscale: "Optional[Tuple[int, int]]"
    events: WorkerEvents

    def stop(self, how: str = "warm", reason: str = "") -> None:
        """Finish what runs and leave."""

    def add_queue(self, queue: Queue) -> None:
        """Consume from one more queue."""

    def cancel_queue(self, name: str) -> None:
        """Stop consuming from a queue."""


class CommandInfo(NamedTuple):
    """What is known of a command besides its function.

    `args` are ``(name, type)`` of what the command line takes in turn, `variadic` names the argument
    that gets all the rest as a list; `signature` shows them to people.
    """

    name: str
    type: str  #: "control" or "inspect"
    alias: Optional[str] = None
    visible: bool = True
    default_timeout: float = TIMEOUT_S  #: seconds
    help: str = ""
    signature: str = ""
    args: Tuple[Tuple[str, Callable[[str], Any]], ...] = ()
    variadic: Optional[str] = None


class Panel:
    """The table of commands."""

    #: Name or alias -> function.
    data: ClassVar[Dict[str, Handler]] = {}
    #: Name -> what is known of it.
    meta: ClassVar[Dict[str, CommandInfo]] = {}

    @classmethod
    def register(cls, *functions: Any, **options: Any) -> Any:
        """Decorate a function to make it a command, with or without options; see `control_command`."""
        if functions:
            return cls._register(functions[0], **options)
        return lambda fun: cls._register(fun, **options)

    @classmethod
    def _register(
        cls,
        fun: F,
        type: str = "control",  # noqa: A002 - Celery's names
        name: Optional[str] = None,
        alias: Optional[str] = None,
        visible: bool = True,
        default_timeout: float = TIMEOUT_S,
        help: Optional[str] = None,  # noqa: A002
        signature: Optional[str] = None,
        args: Optional[Sequence[Tuple[str, Callable[[str], Any]]]] = None,
        variadic: Optional[str] = None,
    ) -> F:
        name = name or fun.__name__
        text = help or (fun.__doc__ or "").strip().partition("\n")[0]
        info = CommandInfo(
            name, type, alias, visible, default_timeout, text, signature or "", tuple(args or ()), variadic
        )
        cls.meta[name] = info
        for known in filter(None, (name, alias)):
            cls.data[known] = fun
        return fun


if TYPE_CHECKING:

    @overload
    def control_command(fun: F, /) -> F: ...
    @overload
    def control_command(**options: Any) -> Callable[[F], F]: ...
    def control_command(*functions: Any, **options: Any) -> Any: ...
    @overload
    def inspect_command(fun: F, /) -> F: ...
    @overload
    def inspect_command(**options: Any) -> Callable[[F], F]: ...
    def inspect_command(*functions: Any, **options: Any) -> Any: ...
else:

    def control_command(*functions: Any, **options: Any) -> Any:
        """Make a function a command that changes something; options as the fields of `CommandInfo`."""
        return Panel.register(*functions, type="control", **options)

    def inspect_command(*functions: Any, **options: Any) -> Any:
        """Make a function a command that tells something; options as the fields of `CommandInfo`."""
        return Panel.register(*functions, type="inspect", **options)


def truth(text: str) -> bool:
    """Return what a word of the command line says: yes or no.  Raises `ValueError`."""
    word = text.lower()
    if word in ("1", "true", "yes", "on", "t", "y"):
        return True
    if word in ("0", "false", "no", "off", "f", "n"):
        return False
    raise ValueError("neither yes nor no")


def ok(text: str) -> Dict[str, str]:
    """Return the reply of a command that did what it should."""
    return {"ok": text}


def nok(text: str) -> Dict[str, str]:
    """Return the reply of a command that could not."""
    return {"error": text}

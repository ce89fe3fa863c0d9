# SPDX-License-Identifier: MIT
"""``miniq shell``: Python with the app, its tasks and the words of workflows at hand."""

from __future__ import annotations

import argparse
import code
import sys
import traceback
from typing import Any, Dict

from .. import __version__
from ..canvas import chain, chord, chunks, group, signature, subtask, xmap, xstarmap
from ..exceptions import MiniqError
from ..result import AsyncResult, GroupResult
from ..resultset import ResultSet
from ..task import Task
from ..text import import_object

EPILOG = """\
names that are there:
  app, celery    the app
  add, ...       each task under its short name (not with -T)
  chain, group, chord, chunks, signature, subtask, xmap, xstarmap, AsyncResult, GroupResult, ResultSet, Task

examples:
  python -m miniq -A proj shell
  echo 'print(add.delay(2, 3).get(timeout=10))' | python -m miniq -A proj shell
"""
#: Flag -> (module, what is called with the names, as which argument).
SHELLS = {"ipython": ("IPython:start_ipython", "user_ns"), "bpython": ("bpython:embed", "locals_")}


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "shell", help="Python with the app and its tasks", epilog=EPILOG,
        description="Start Python with the app, its tasks and the words of workflows at hand.",
    )  # fmt: skip
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("-I", "--ipython", dest="kind", action="store_const", const="ipython", help="IPython")
    add("-B", "--bpython", dest="kind", action="store_const", const="bpython", help="bpython")
    add("--python", dest="kind", action="store_const", const="python", help="plain Python")
    add("-T", "--without-tasks", action="store_true", help="no names for tasks")


def names_for(app: Any, with_tasks: bool) -> Dict[str, Any]:
    """Return what the shell has; a task does not hide a word of this list."""
    words = (chain, chord, chunks, group, signature, subtask, xmap, xstarmap)
    names: Dict[str, Any] = {}
    if with_tasks:
        app.import_modules()
        for name, task in sorted(app.tasks.items()):
            if not name.startswith("celery."):
                names[name.rpartition(".")[2]] = task
    names.update({word.__name__: word for word in words})
    names.update(app=app, celery=app, AsyncResult=AsyncResult, GroupResult=GroupResult, ResultSet=ResultSet,
                 Task=Task)  # fmt: skip
    return names


def run(app: Any, options: argparse.Namespace) -> int:
    """Run a shell until it is left.

    Without a flag the first of IPython and bpython that is installed, else plain Python.  What comes from a
    pipe is run as a program: 1 is returned if it failed.
    """
    app.set_current()
    names = names_for(app, not options.without_tasks)
    if not sys.stdin.isatty() and options.kind in (None, "python"):
        program = _Program({"__name__": "__main__", **names})
        try:
            program.runcode(compile(sys.stdin.read(), "<stdin>", "exec"))
        except (SyntaxError, ValueError) as error:  # ValueError: a zero byte, in Python up to 3.11
            print(*traceback.format_exception_only(type(error), error), sep="", end="", file=sys.stderr)
            return 1
        return int(program.failed)
    for kind in ("ipython", "bpython") if options.kind is None else (options.kind,):
        if kind not in SHELLS:
            break
        target, argument = SHELLS[kind]
        try:
            start = import_object(target)
        except ImportError as error:
            if options.kind is not None:
                raise MiniqError(f"{kind} is not installed; --python needs nothing") from error
            continue
        arguments: Dict[str, Any] = {argument: names}
        if kind == "ipython":
            arguments["argv"] = []
        start(**arguments)
        return 0
    _plain(names)
    return 0


class _Program(code.InteractiveInterpreter):
    failed = False

    def showtraceback(self) -> None:
        """Show it, and remember that there was one."""
        self.failed = True
        super().showtraceback()


def _plain(names: Dict[str, Any]) -> None:
    try:
        import readline  # absent on Windows
        import rlcompleter

        readline.set_completer(rlcompleter.Completer(names).complete)
        readline.parse_and_bind("tab: complete")
    except ImportError:
        pass  # then without completion
    code.interact(f"miniq {__version__}: app is {names['app']!r}", local=names, exitmsg="")

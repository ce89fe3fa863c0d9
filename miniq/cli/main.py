# SPDX-License-Identifier: MIT
"""The command line: ``python -m miniq [-A app] [-b broker] COMMAND ...``.

Exit codes: 0 done, 1 it failed, 2 the command line makes no sense, 69 nobody is there to answer,
73 a file (pid file) cannot be made.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import warnings
from types import ModuleType
from typing import Any, NoReturn, Optional, Sequence

from .. import __version__
from ..app import MiniQ
from ..exceptions import MiniqError
from ..text import import_module, import_object, is_missing, mask_urls, nearest
from . import daemon
from .health import command_of

PROGRAM = "python -m " + (__package__ or "miniq.cli").rpartition(".")[0]
EPILOG = """\
examples:
  python -m miniq -A proj worker -l INFO -c 4      run a worker with 4 processes
  python -m miniq -A proj call proj.add -a '[2, 3]'
  python -m miniq -b sqlite:///jobs.db queues       what waits where
  python -m miniq -A proj dead list                 messages that were set aside

environment (where neither -b nor the app says otherwise):
  APP                                               as -A
  MINIQ_BROKER_URL, CELERY_BROKER_URL               as -b
  MINIQ_RESULT_BACKEND, CELERY_RESULT_BACKEND       as --result-backend
"""


class Parser(argparse.ArgumentParser):
    """argparse that names the nearest option or command to a mistyped one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A copy under another package name calls itself by that one.
        kwargs["epilog"] = (kwargs.get("epilog") or "").replace("python -m miniq", PROGRAM) or None
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            hint = nearest(word, self._option_string_actions) if word.startswith("-") else None
            advice = f": did you mean {hint}?" if hint else ""
            if word in GLOBAL_OPTIONS:
                program, _, name = self.prog.rpartition(" ")
                advice = f": it goes before the command, as in {program} {word} ... {name}"
            self.error(f"unknown argument {unknown[0]!r}{advice}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint = nearest(str(value), choices)
            text = (
                f"{value!r} is not one of {', '.join(choices)}{f': did you mean {hint!r}?' if hint else ''}"
            )
            raise argparse.ArgumentError(action, text)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {mask_urls(message)}\n(try {self.prog} --help)\n")


#: Options of the program, not of one command.
GLOBAL_OPTIONS = frozenset(
    "-A --app -b --broker --result-backend --config --workdir -C --no-color -q --quiet".split()
)


#: Command -> "module:function", which adds it, and others of its module, to the parser.
COMMANDS = {
    "worker": ".worker:add_parser",
    "beat": ".beat:add_parsers",
    "schedule": ".beat:add_parsers",
    "multi": ".multi:add_parser",
    "call": ".commands:add_parsers",
    "result": ".commands:add_parsers",
    "queues": ".commands:add_parsers",
    "purge": ".commands:add_parsers",
    "dead": ".commands:add_parsers",
    "inspect": ".control:add_parsers",
    "control": ".control:add_parsers",
    "status": ".control:add_parsers",
    "events": ".events:add_parser",
    "health": ".health:add_parser",
    "migrate": ".migrate:add_parser",
    "amqp": ".amqp:add_parser",
    "list": ".report:add_parsers",
    "report": ".report:add_parsers",
    "graph": ".report:add_parsers",
    "shell": ".shell:add_parser",
    "logtool": ".logtool:add_parser",
    "upgrade": ".upgrade:add_parser",
    "completion": ".completion:add_parser",
}


def build_parser(command: Optional[str] = None) -> Parser:
    """Return the parser of the whole command line, or of what `command` needs of it."""
    parser = Parser(prog=PROGRAM, description="miniq: a task queue.", epilog=EPILOG)
    parser.add_argument("-A", "--app", help="where the app is: module:attribute, or a module or package")
    parser.add_argument("-b", "--broker", help="URL of the broker (over the app's setting)")
    parser.add_argument("--result-backend", help="URL of the result backend (over the app's setting)")
    parser.add_argument("--config", help="name of a settings module")
    parser.add_argument("--workdir", help="change to this folder first")
    parser.add_argument("-C", "--no-color", action="store_true", help="no colours")
    parser.add_argument("-q", "--quiet", action="store_true", help="no banner")
    parser.set_defaults(whole_parser=parser)
    parser.add_argument("--version", action="version", version=f"miniq {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    # One command's modules where it is known which, as all of them take longer than most have to do.
    known = COMMANDS.get(command or "")
    for target in dict.fromkeys(COMMANDS.values()) if known is None else (known,):
        import_object(target, package=__package__)(subparsers)
    return parser


def main(argv: Optional[Sequence[str]] = None, app: Optional[MiniQ] = None) -> int:
    """Run the command line; return the exit code.  `app` stands in for ``-A``."""
    _complete_streams()
    try:
        code = _run(argv, app)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader (head, less) has seen enough; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return fail(f"cannot write: {error.strerror}")
    except KeyboardInterrupt:
        return 130


def _complete_streams() -> None:
    """Give a process that was started with closed streams empty ones, and let print write any name.

    Their numbers are taken then: a socket that got one of them would be written to by mistake.
    """
    for name, flags, mode in (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_WRONLY, "w"),
                              ("stderr", os.O_WRONLY, "w")):  # fmt: skip
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode, closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error has it


def _run(argv: Optional[Sequence[str]], app: Optional[MiniQ]) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    command = command_of(words)
    parser = build_parser(None if command == "completion" else command)
    try:
        options = parser.parse_args(words)
    except SystemExit as leaving:  # --help, --version, or a wrong command line
        return int(leaving.code or 0)
    if options.command is None:
        parser.print_help()
        return 2
    is_detaching = getattr(options, "detach", False) and not options.detached
    if options.workdir and not is_detaching:  # else the new process does, once
        try:
            os.chdir(options.workdir)
        except OSError as error:
            return fail(f"--workdir {options.workdir}: {error.strerror}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if options.no_color:
        os.environ["NO_COLOR"] = "1"
    with warnings.catch_warnings():
        _show_own_warnings_as_lines()
        try:
            if is_detaching:
                return _detach(words, app, options)
            daemon.become(options)
            if getattr(options, "needs_app", True):
                name = options.app or os.environ.get("APP")
                app = app or load_app(name, options.command in ("worker", "beat"))
            else:
                app = app or MiniQ("default")
            configure(app, options)
            code: int = options.run(app, options)
            return code
        except MiniqError as error:
            return fail(error)
        except (ImportError, AttributeError) as error:
            if is_missing(error):
                return fail(f"there is no module {getattr(error, 'name', None)!r}, which is to be imported")
            if not _is_of_import_by_name(error):
                raise  # the user's own code failed: the traceback tells where
            return fail(error)


def _detach(words: Sequence[str], app: Optional[MiniQ], options: argparse.Namespace) -> int:
    if app is not None:
        raise MiniqError("--detach starts a new Python, which must find the app: give it with -A")
    return daemon.detach(words, PROGRAM.rpartition(" ")[2], options.executable)


def _is_of_import_by_name(error: BaseException) -> bool:
    """Say whether `text.import_object` raised it: then its text says all."""
    entry = error.__traceback__
    while entry is not None and entry.tb_next is not None:
        entry = entry.tb_next
    return entry is not None and entry.tb_frame.f_globals.get("__name__") == import_object.__module__


def fail(error: object) -> int:
    """Print one line about what went wrong; return exit code 1."""
    print(f"Error: {mask_urls(str(error))}", file=sys.stderr)
    return 1


def _show_own_warnings_as_lines() -> None:
    """Show warnings about settings and the like as one line; those of other code stay as they are."""
    others = warnings.showwarning

    def show(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if category.__module__ == MiniqError.__module__ or category is UserWarning:
            print(f"Warning: {mask_urls(str(message))}", file=sys.stderr)
        else:
            others(message, category, filename, lineno, file, line)

    warnings.showwarning = show


def configure(app: MiniQ, options: argparse.Namespace) -> None:
    """Put settings of the command line and the environment over the app's."""
    if options.config:
        app.config_from_object(options.config)
    for name, given, variable in (
        ("broker_url", options.broker, "BROKER_URL"),
        ("result_backend", options.result_backend, "RESULT_BACKEND"),
    ):
        value = given
        if value == "":
            raise MiniqError(f"{name}: the URL on the command line is empty; give one, or leave it out")
        if value is None and app.conf.get(name) is None:
            value = os.environ.get(f"MINIQ_{variable}") or os.environ.get(f"CELERY_{variable}")
        if value:
            app.conf.update({name: value}, "the command line" if given else "the environment")


def load_app(name: Optional[str], needed: bool) -> MiniQ:
    """Return the app that ``-A`` names.

    ``module:attribute`` is taken as it is.  For a module: its attribute ``app``, else ``celery``,
    else (for a package) what its submodule ``celery`` has, else any app in it.
    """
    if not name:
        if needed:
            raise MiniqError(
                "workers and beat need to know their app: give it with -A, for example -A proj"
                " or -A proj.tasks:app"
            )
        return MiniQ("default")
    if ":" in name:
        found = import_object(name)
    else:
        try:
            found = import_module(name)
        except ModuleNotFoundError as error:
            if not is_missing(error):
                raise
            if "." not in name:
                raise MiniqError(
                    f"-A {name}: there is no module {error.name!r}"
                    f" (looked in {os.getcwd()} and the Python path)"
                ) from None
            found = import_object(name)
    app = _app_in(found) if isinstance(found, ModuleType) else found
    if app is None:
        raise MiniqError(
            f"-A {name}: the module has no app; make one with `app = MiniQ(...)` in it,"
            f" or say where it is: -A {name}:NAME"
        )
    if not isinstance(app, MiniQ):
        raise MiniqError(f"-A {name}: this is {type(app).__name__}, not an app (MiniQ)")
    return app


def _app_in(module: ModuleType) -> Optional[MiniQ]:
    for attribute in ("app", "celery"):
        found = getattr(module, attribute, None)
        if isinstance(found, MiniQ):
            return found
    if hasattr(module, "__path__"):
        try:
            found = _app_in(import_module(f"{module.__name__}.celery"))
        except ModuleNotFoundError as error:
            if not is_missing(error):
                raise
        else:
            if found is not None:
                return found
    for found in vars(module).values():
        if isinstance(found, MiniQ):
            return found
    return None

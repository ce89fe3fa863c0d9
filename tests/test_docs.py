# SPDX-License-Identifier: MIT
"""What the pages in docs/ say is so: their settings, flags, options, and programs."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Set, Tuple

import pytest
from workers import ROOT, Program, environment

from miniq import AsyncResult, MiniQ, Task, conf, signals
from miniq.cli.amqp_commands import COMMANDS
from miniq.cli.main import build_parser
from miniq.connections import amqp_options, redis_options
from miniq.connections.sqlite import Options
from miniq.pools.base import POOLS
from miniq.producer import CALL_OPTIONS
from miniq.task import DECORATOR_OPTIONS
from miniq.transports.base import transport_class

DOCS = ROOT / "docs"
README = ROOT / "README.rst"
PAGES = [README, *sorted(DOCS.rglob("*.rst"))]
NOT_USED = "Not used in this version."


def text_of(name: str) -> str:
    """Return a page of docs/."""
    return (DOCS / f"{name}.rst").read_text(encoding="utf-8")


def page_id(path: Path) -> str:
    """Return how a page is called in a test's name."""
    return path.relative_to(ROOT).with_suffix("").as_posix()


each_page = pytest.mark.parametrize("path", PAGES, ids=page_id)


# -- reading pages -------------------------------------------------------------------------------


def literals(text: str) -> List[str]:
    """Return what stands between double backquotes, and the lines of literal blocks."""
    return re.findall(r"``(.+?)``", text, re.DOTALL) + re.findall(r"^ {4,}(.*\S)", text, re.MULTILINE)


class Table(NamedTuple):
    """A simple table: its lines, and where its columns begin and end."""

    first_line: int
    columns: List[Tuple[int, int]]
    lines: List[str]


def tables(text: str) -> Iterator[Table]:
    """Yield the simple tables of a page."""
    lines = text.split("\n")
    borders = [at for at, line in enumerate(lines) if re.fullmatch(r"=+( +=+)+", line)]
    while borders:
        start = borders[0]
        end = start
        # The last border is the one before an empty line; a table has two or three.
        for end in borders[1:3]:
            if not lines[end + 1]:
                break
        borders = [at for at in borders if at > end]
        columns = [match.span() for match in re.finditer("=+", lines[start])]
        yield Table(start, columns, lines[start : end + 1])


def first_column(name: str, first_row: str) -> Set[str]:
    """Return the names in the first column of the table that has the row `first_row`."""
    for table in tables(text_of(name)):
        width = table.columns[0][1]
        cells = [line[:width] for line in table.lines]
        if any(first_row in cell for cell in cells):
            return set(re.findall(r"``(\w+)[^`]*``", "\n".join(cells)))
    raise AssertionError(f"{name}.rst has no table with a row {first_row!r}")


def python_blocks() -> Dict[str, str]:
    """Return all Python programs on the pages; the key says where."""
    found = {}
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", text, re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            found[f"{page_id(path)}:{line}"] = textwrap.dedent(match.group(1)).strip() + "\n"
    return found


BLOCKS = python_blocks()
#: Programs that stand on their own; the README's have a test of their own.
COMPLETE = [
    where
    for where, source in BLOCKS.items()
    if source.startswith(("import ", "from ")) and not where.startswith("README")
]


@each_page
def test_tables_keep_to_their_columns(path: Path) -> None:
    for table in tables(path.read_text(encoding="utf-8")):
        for number, line in enumerate(table.lines, table.first_line + 1):
            for (_, end), (start, _) in zip(table.columns, table.columns[1:]):
                assert not line[end:start].strip(), f"{page_id(path)}:{number}: text between columns"


# -- settings ------------------------------------------------------------------------------------

ENTRY = re.compile(
    r"^``(?P<name>\w+)`` : (?P<type>\S.*?), default ``(?P<default>.*?)``(?:, once ``(?P<old>\w+)``)?\n"
    r"(?P<text>(?:    .*\n)+)",
    re.MULTILINE,
)
ENTRIES = {match["name"]: match for match in ENTRY.finditer(text_of("settings") + "\n")}


def test_every_setting_is_documented_once() -> None:
    names = re.findall(r"^``(\w+)`` : ", text_of("settings"), re.MULTILINE)
    assert sorted(names) == sorted(conf.SETTINGS)


@pytest.mark.parametrize("name", sorted(conf.SETTINGS))
def test_setting_is_documented_as_it_is(name: str) -> None:
    setting, entry = conf.SETTINGS[name], ENTRIES[name]
    assert entry["default"] == repr(setting.default)
    assert entry["type"] == setting.type
    assert (entry["old"] or "") == setting.old_name


def test_settings_that_nothing_reads_are_marked_and_no_others() -> None:
    source = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "miniq").rglob("*.py") if path.name != "conf.py"
    )
    source += (ROOT / "miniq" / "conf.py").read_text(encoding="utf-8").partition("class Settings:")[2]
    fields = re.compile(r"^    \w+: .*$", re.MULTILINE)  # the annotations of `Settings` read nothing
    source = fields.sub("", source)

    def is_read(name: str) -> bool:
        # Options of tasks are looked up by their own names, "task_" is put before.
        by_task = name.startswith("task_") and re.search(
            rf'(?:option|_setting)\((?:task, )?"{name[5:]}"', source
        )
        return bool(by_task or re.search(rf"\b{name}\b", source))

    marked = {name for name, entry in ENTRIES.items() if NOT_USED in " ".join(entry["text"].split())}
    assert marked == {name for name in conf.SETTINGS if not is_read(name)}


#: What looks like a setting and is something else.
OTHER_NAMES = {
    *vars(signals), *vars(MiniQ), *vars(AsyncResult), *Options._fields, *redis_options.Options._fields,
    *amqp_options.Options._fields,
    *(path.stem for path in (ROOT / "miniq").rglob("*.py")),
    "task_id", "task_name", "task_cls", "task_ids",
}  # fmt: skip


@each_page
def test_page_names_no_setting_that_does_not_exist(path: Path) -> None:
    found = re.findall(
        r"(?<![\w./])(?:task|worker|broker|result|redis)_[a-z][a-z_]*[a-z](?![\w(]|\.\.\.)",
        "\n".join(literals(path.read_text(encoding="utf-8"))),
    )
    unknown = set(found) - set(conf.SETTINGS) - OTHER_NAMES
    assert not unknown


def test_defaults_that_differ_from_celery_are_told_right() -> None:
    section = text_of("porting-from-celery").partition("Settings with other defaults")[2]
    rows = re.findall(r"^``(\w+)`` +(\S+) +(\S+)  ", section, re.MULTILINE)
    assert len(rows) == 6
    for name, _, ours in rows:
        assert ours == repr(conf.SETTINGS[name].default)
    own = text_of("porting-from-celery").partition("Settings of miniq alone:")[2].partition(".")[0]
    assert set(re.findall(r"``(\w+)``", own)) == conf.OWN_SETTINGS


# -- the command line ----------------------------------------------------------------------------


def parsers() -> List[argparse.ArgumentParser]:
    """Return the parser of the program, those of its commands, and those of their actions."""
    found: List[argparse.ArgumentParser] = [build_parser()]
    for parser in found:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += action.choices.values()
    return found


@each_page
def test_page_names_no_flag_that_does_not_exist(path: Path) -> None:
    known = {flag for parser in parsers() for flag in parser._option_string_actions}
    used = set()
    for text in literals(path.read_text(encoding="utf-8")):
        if "celery -A" not in text and "pip" not in text:
            used |= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert not used - known


@each_page
def test_command_lines_on_page_are_understood(path: Path) -> None:
    command = re.compile(r"^ {4,}(?:ExecStart=\S*)?python3? -m [\w.]*miniq (.*)$", re.MULTILINE)
    for line in command.findall(path.read_text(encoding="utf-8")):
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                build_parser().parse_args(shlex.split(line, comments=True))
        except SystemExit:
            pytest.fail(f"{line}: {errors.getvalue()}")


def test_exit_codes_of_the_worker_are_those_in_its_help() -> None:
    worker = next(parser for parser in parsers() if parser.prog.endswith(" worker"))
    told = (worker.epilog or "").partition("exit codes:")[2].partition("examples:")[0]
    codes = re.findall(r"(?:^|\s\s)(\d+)  \w", told)
    shown = re.findall(r"^(\d+) {2,}", text_of("workers").partition("Exit code ")[2], re.MULTILINE)
    assert codes
    assert shown == codes


# -- options -------------------------------------------------------------------------------------


def test_task_options_are_all_there_with_their_defaults() -> None:
    rows = re.findall(
        r"^(``\w+``(?:, ``\w+``)*)  +(?:``(.*?)``|(\d+)|the app's)? ", text_of("tasks"), re.MULTILINE
    )
    documented = {}
    for names, quoted, number in rows:
        for name in re.findall(r"\w+", names):
            documented[name] = quoted or number
    handlers = {"before_start", "on_success", "on_failure", "on_retry", "after_return", "shadow_name"}
    without_meaning = {"shared", "lazy", "filter"}
    assert set(documented) == DECORATOR_OPTIONS - handlers - without_meaning
    for name, default in documented.items():
        if default and name != "bind":
            assert repr(getattr(Task, name)) == default, name


def test_calling_options_exist() -> None:
    assert first_column("calling", "``countdown``") <= set(CALL_OPTIONS)


def test_results_have_what_is_said() -> None:
    for name in first_column("calling", "``ready()``"):
        assert hasattr(AsyncResult, name), name


def test_options_of_the_sqlite_file_are_all_there_with_their_defaults() -> None:
    rows = re.findall(r"^``(\w+)`` +`*([\w.]+)`* ", text_of("sqlite").partition("Option  ")[2], re.MULTILINE)
    documented = dict(rows[: len(Options._fields)])
    assert documented == {name: str(default) for name, default in Options._field_defaults.items()}


def options_of(page: str) -> List[Tuple[str, str, str]]:
    """Return (name, default, meaning) of each option of a server, from its table."""
    table = text_of(page).partition("Option  ")[2].partition("\n\n")[0]
    return re.findall(r"^``(\w+)`` +`*(.+?)`*  +(.+)$", table, re.MULTILINE)


def sources_of(names: str) -> str:
    """Return the source of the modules with such names, and of what all servers share."""
    shared = [ROOT / "miniq" / "connections" / name for name in ("options.py", "servers.py")]
    files = [*(ROOT / "miniq").rglob(names), *shared]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


each_server = pytest.mark.parametrize(
    ("page", "module", "names"),
    [("redis", redis_options, "redis*.py"), ("rabbitmq", amqp_options, "amqp*.py")],
    ids=["redis", "rabbitmq"],
)


@each_server
def test_options_of_a_server_are_all_there_with_their_defaults(page: str, module: Any, names: str) -> None:
    documented = {name: default for name, default, _ in options_of(page)}
    assert documented == {name: repr(one) for name, one in module.Options._field_defaults.items()}


@each_server
def test_options_that_nothing_reads_are_said_to_be_without_effect_and_no_others(
    page: str, module: Any, names: str
) -> None:
    source = sources_of(names)
    marked = {name for name, _, text in options_of(page) if "without effect" in text}
    assert marked == {name for name in module.Options._fields if not re.search(rf"\.{name}\b", source)}


@each_server
def test_urls_on_the_page_of_a_server_are_understood(page: str, module: Any, names: str) -> None:
    shown = re.findall(r"^``(\S+://\S+)``  ", text_of(page), re.MULTILINE)
    assert len(shown) == {"redis": 7, "rabbitmq": 6}[page]
    for url in shown:
        assert module.endpoints(url, module.Options.read({}, url))
        transport_class(url)


def test_rabbitmq_urls_mean_what_is_said_of_them() -> None:
    rows = re.findall(r"^``(\S+://\S+)``  +the virtual host ``([^`]+)``", text_of("rabbitmq"), re.MULTILINE)
    assert len(rows) == 2
    for url, name in rows:
        assert amqp_options.endpoints(url, amqp_options.Options())[0].virtual_host == name


def test_other_names_of_options_of_rabbitmq_are_understood() -> None:
    table = text_of("rabbitmq").partition("Option  ")[2]
    rows = re.findall(r"^``(\w+)``  .*; also(.*\n(?: .*\n)*)", table, re.MULTILINE)
    assert [name for name, _ in rows] == ["connect_timeout", "socket_timeout"]
    for name, others in rows:
        for other in re.findall(r"``(\w+)``", others):
            assert getattr(amqp_options.Options.read({other: 1.5}), name) == 1.5, other


@pytest.mark.parametrize(("page", "names"), [("redis", "redis*.py"), ("rabbitmq", "amqp*.py")])
def test_names_on_the_server_are_those_that_are_written(page: str, names: str) -> None:
    own = re.compile(r"_miniq\.([a-z_]+)")
    source = sources_of(names)
    if page == "redis":
        for other in ("connections/listener.py", "beat_redis.py"):
            source += (ROOT / "miniq" / other).read_text(encoding="utf-8")
    # A channel that nobody ever subscribes to is no key.
    assert set(own.findall(text_of(page))) == set(own.findall(source)) - {"nobody"}


def test_commands_of_the_amqp_shell_are_all_there() -> None:
    table = text_of("rabbitmq").partition("\nCommand  ")[2].partition("\n\n")[0]
    rows = re.findall(r"^``(\S+)``  ", table, re.MULTILINE)
    assert rows == list(COMMANDS)


def test_pools_are_all_there() -> None:
    header = next(line for line in text_of("workers").split("\n") if line.startswith("``--pool``"))
    # Celery's other name for the same pool needs no column.
    assert set(re.findall(r"``(\w+)``", header)) == set(POOLS) - {"processes"}


# -- programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", BLOCKS)
def test_python_on_page_compiles(where: str) -> None:
    compile(BLOCKS[where], where, "exec")


@pytest.mark.parametrize("where", COMPLETE)
def test_complete_program_on_page_runs(where: str, program: Callable[..., Program], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(BLOCKS[where], encoding="utf-8")
    script = program([sys.executable, "script.py"], tmp_path, environment(tmp_path))
    assert script.wait(60) == 0, script.log

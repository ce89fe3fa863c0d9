# SPDX-License-Identifier: MIT
"""The house keeps its own rules: floors, imports, what an import does, and what every file says.

Read from the source with `ast`, and from what really happens in fresh interpreters.  Speed is told
at the end of the run but never asserted: the number of loaded modules stands in for it.
"""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set

import pytest
from workers import ROOT, environment

import miniq

PACKAGE = ROOT / "miniq"
#: First part of a module's name -> its floor.  A module imports from its own floor or below.
FLOORS = {
    name: floor
    for floor, names in enumerate(
        (
            "states exceptions text times health clock conf signals _state log",  # words
            "codecs serialization message routing schedules cron sun wallclock",  # pure
            "loop lifesign connections",  # input and output
            "transports backends",  # stores
            "algebra plan stamping graph progress runner resultbase resultset result signatures canvas task"
            " flow coroutines einfo trace chords workflow_tasks eager registry shared producer mailbox event"
            " events connection control app",
            "pools worker beat beat_control beat_entry beat_store beat_sqlite beat_redis",  # execution
            "cli testing contrib __main__",  # entrances
        )
    )
    for name in names.split()
}
#: miniq/__init__.py hands out the public names: it may reach up to the app, entrances may use it.
INIT_FLOOR = FLOORS["app"]
#: module -> its literal dict of names to "module:object", imported when asked for.
REGISTRIES = {
    "": "PUBLIC",
    "transports.base": "TRANSPORTS",
    "backends.base": "BACKENDS",
    "pools.base": "POOLS",
    "app": "ENTRANCES",
    "beat": "SCHEDULERS",
    "cli.main": "COMMANDS",
    "beat_store": "STORES",
}
#: Loaded only by those who use them.
HEAVY = {"ssl", "sqlite3", "asyncio", "multiprocessing"}
#: What `import miniq` may load in a bare interpreter, its own modules included (today 105 to 115).
MAX_MODULES = 125

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Module(NamedTuple):
    """A file of the package; `name` is dotted, relative to the package, "" for its __init__."""

    name: str
    path: Path
    source: str
    tree: ast.Module

    @property
    def floor(self) -> Optional[int]:
        return FLOORS.get(self.name.partition(".")[0]) if self.name else INIT_FLOOR

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


class Import(NamedTuple):
    """One imported module: `inside` the package by relative name, or an outside one's first name."""

    module: Module
    line: int
    target: str
    inside: bool
    in_function: bool
    for_types_only: bool

    @property
    def where(self) -> str:
        return f"{self.module.path.relative_to(ROOT)}:{self.line}"


def read_modules() -> Dict[str, Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text(encoding="utf-8")
        found[name] = Module(name, path, source, ast.parse(source, str(path)))
    return found


MODULES = read_modules()


def imports_of(module: Module) -> Iterator[Import]:
    def walk(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                yield Import(module, node.lineno, top, False, in_function, for_types)
        elif isinstance(node, ast.ImportFrom):
            for target, inside in targets(node):
                yield Import(module, node.lineno, target, inside, in_function, for_types)
        in_function = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in node.body:
                yield from walk(child, in_function, True)
            for child in node.orelse:
                yield from walk(child, in_function, for_types)
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, in_function, for_types)

    def targets(node: ast.ImportFrom) -> Iterator[Any]:
        if not node.level:
            yield (node.module or "").partition(".")[0], False
            return
        base = module.package.split(".") if module.package else []
        base = base[: len(base) - node.level + 1] + (node.module or "").split(".")
        start = ".".join(filter(None, base))
        for alias in node.names:
            name = f"{start}.{alias.name}".lstrip(".")
            yield (name if name in MODULES else start), True

    return walk(module.tree, False, False)


IMPORTS = [one for module in MODULES.values() for one in imports_of(module)]


def run(code: str, *flags: str, folder: Optional[Path] = None, path: Path = ROOT) -> str:
    """Run code in a fresh interpreter without site-packages; return what it prints."""
    code = f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {str(path)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", *flags, "-c", code],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- imports -------------------------------------------------------------------------------------


def test_every_module_has_a_floor() -> None:
    assert [module.name for module in MODULES.values() if module.floor is None] == []


def test_modules_import_from_their_own_floor_or_below() -> None:
    wrong = []
    for one in IMPORTS:
        here, there = one.module, MODULES.get(one.target)
        if one.inside and there is not None and (there.floor or 0) > (here.floor or 0):
            wrong.append(f"{one.where}: floor {here.floor} imports {there.name} of floor {there.floor}")
    assert not wrong, "\n".join(wrong)


def test_stores_do_not_know_each_other() -> None:
    def kind(name: str) -> str:
        return name.partition(".")[0]

    wrong = [
        f"{one.where}: {one.target}"
        for one in IMPORTS
        if {kind(one.module.name), kind(one.target)} == {"transports", "backends"}
        or (kind(one.module.name) == "codecs" and one.inside and kind(one.target) != "codecs")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_leads_back_to_where_it_began() -> None:
    edges: Dict[str, Set[str]] = {name: set() for name in MODULES}
    for one in IMPORTS:
        if one.inside and one.target != one.module.name:
            edges[one.module.name].add(one.target)
    done: Set[str] = set()

    def visit(name: str, trail: List[str]) -> None:
        assert name not in trail, "cycle: " + " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in MODULES:
        visit(name, [])


def test_imports_inside_the_package_are_relative() -> None:
    wrong = [f"{one.where}: {one.target}" for one in IMPORTS if not one.inside and one.target == PACKAGE.name]
    assert not wrong, "\n".join(wrong)


def test_only_the_standard_library_is_imported() -> None:
    known = standard_library()
    wrong = [
        f"{one.where}: {one.target}"
        for one in IMPORTS
        # What only type checkers read is never imported.
        if not one.inside and not one.for_types_only and one.target not in known
    ]
    assert not wrong, "\n".join(wrong)


def standard_library() -> Set[str]:
    if sys.version_info >= (3, 10):
        return set(sys.stdlib_module_names)
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = {info.name for info in pkgutil.iter_modules([str(folder), str(folder / "lib-dynload")])}
    return found | set(sys.builtin_module_names) | {"msvcrt", "winreg", "_winapi"}


def test_functions_import_nothing_of_the_package() -> None:
    wrong = [f"{one.where}: {one.target}" for one in IMPORTS if one.inside and one.in_function]
    assert not wrong, "\n".join(wrong)


def test_imports_in_functions_say_why() -> None:
    """Late imports are for what is slow or may be missing, and a comment says which it is."""
    wrong = []
    for one in IMPORTS:
        lines = one.module.source.splitlines()
        near = "".join(lines[max(0, one.line - 2) : one.line])
        if one.in_function and "#" not in near and not (one.line > 1 and "import" in lines[one.line - 2]):
            wrong.append(f"{one.where}: {one.target}")
    assert not wrong, "\n".join(wrong)


def test_registries_are_the_only_dynamic_imports_of_the_package() -> None:
    """By name are imported: what users name, what may be missing in a Python, and the registries."""
    importers = {"import_object", "import_module", "__import__"}
    wrong, in_registries = [], set()
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name.rpartition(".")[2] not in importers:
                continue
            first = node.args[0] if node.args else None
            constant = first.value if isinstance(first, ast.Constant) else ""
            if str(constant).startswith((".", PACKAGE.name)):
                wrong.append(f"{module.name}:{node.lineno}: {constant}")
            if any(keyword.arg == "package" for keyword in node.keywords):
                in_registries.add(module.name)
    assert not wrong, "\n".join(wrong)
    assert in_registries == set(REGISTRIES)


@pytest.mark.parametrize("name", sorted(REGISTRIES))
def test_registry_names_what_exists(name: str) -> None:
    path = f"miniq.{name}".rstrip(".")
    registry = getattr(importlib.import_module(path), REGISTRIES[name])
    package = path.rpartition(".")[0] or path
    missing = []
    for target in set(registry.values()):
        module_name, _, attribute = target.partition(":")
        try:
            getattr(importlib.import_module(module_name, package), attribute)
        except (ImportError, AttributeError) as error:
            missing.append(f"{target}: {error}")
    assert not missing, "\n".join(missing)


# -- what an import does -------------------------------------------------------------------------

WATCH_IMPORTS = """
import atexit, importlib, logging, os, pkgutil, signal, sys, threading

seen, package = [], os.path.join(sys.path[0], "miniq")

def ours():
    # A module of the package asks, and not the import system for it, nor the import of a library.
    frame = sys._getframe(2)
    while frame is not None and "importlib" not in frame.f_code.co_filename:
        if frame.f_code.co_filename.startswith(package):
            return True
        frame = frame.f_back
    return False

class Environment(type(os.environ)):
    def __getitem__(self, key):
        if ours():
            seen.append(f"read the environment: {key}")
        return super().__getitem__(key)
os.environ.__class__ = Environment

def watched(what, real):
    def call(*args, **kwargs):
        if ours():
            seen.append(f"{what}{args}")
        return real(*args, **kwargs)
    return call
atexit.register = watched("atexit.register", atexit.register)
if hasattr(os, "register_at_fork"):
    os.register_at_fork = watched("os.register_at_fork", os.register_at_fork)

WATCHED = ("socket.", "sqlite3.", "subprocess.", "os.", "_thread.start", "signal.", "shutil.", "tempfile.")
def hook(event, args):
    if event.startswith(WATCHED) and ours():
        seen.append(f"{event}{args}")
    if event == "open" and args[2] and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        seen.append(f"open for writing: {args}")
sys.addaudithook(hook)

handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
import miniq
for info in pkgutil.walk_packages(miniq.__path__, "miniq."):
    if info.name != "miniq.__main__":
        importlib.import_module(info.name)

assert threading.active_count() == 1, threading.enumerate()
assert handlers == {number: signal.getsignal(number) for number in signal.valid_signals()}
assert not logging.getLogger().handlers
for name, logger in logging.root.manager.loggerDict.items():
    found = [one for one in getattr(logger, "handlers", ()) if not isinstance(one, logging.NullHandler)]
    assert not found, (name, found)
assert not miniq._state.apps()
print("\\n".join(seen))
"""


def test_importing_every_module_does_nothing_but_define() -> None:
    assert run(WATCH_IMPORTS).strip() == ""


def test_module_level_reads_no_clock_no_chance_and_no_environment() -> None:
    """What is found at import is not what would be found in a forked child or a week later."""
    allowed = {"threading.local", "threading.Lock", "threading.RLock", "logging.getLogger"}
    roots = set("os socket time random subprocess threading logging signal platform uuid".split())
    builtins = {"open", "exec", "eval", "print", "input"}
    wrong = []
    for module in MODULES.values():
        for call in calls_at_import(module.tree):
            name = ast.unparse(call.func)
            if name in builtins or (name.partition(".")[0] in roots and name not in allowed):
                wrong.append(f"{module.path.relative_to(ROOT)}:{call.lineno}: {name}()")
    assert not wrong, "\n".join(wrong)


def calls_at_import(node: ast.AST) -> Iterator[ast.Call]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        defaults = [one for one in node.args.kw_defaults if one is not None]
        for child in [*node.decorator_list, *node.args.defaults, *defaults]:
            yield from calls_at_import(child)
        return
    if isinstance(node, ast.Lambda):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from calls_at_import(child)


def test_importing_the_package_alone_loads_nothing_of_it() -> None:
    """A probe of a worker's health begins with it, every few seconds."""
    loaded = run("import miniq\nprint(*(name for name in sys.modules if name.startswith('miniq')))").split()
    assert loaded == ["miniq"]


def test_import_miniq_loads_little(tell: Callable[[str], None]) -> None:
    code = "before = set(sys.modules)\nfrom miniq import MiniQ\nprint(*set(sys.modules) - before)"
    loaded = set(run(code).split())
    assert not loaded & HEAVY
    above = {name for name in loaded if name.startswith("miniq.") and FLOORS[name.split(".")[1]] > INIT_FLOOR}
    assert not above
    assert "miniq.loop" not in loaded, "a program that only sends tasks has no loop"
    own = sum(name.startswith("miniq") for name in loaded)
    tell(f"import miniq loads {len(loaded)} modules, {own} of its own")
    assert len(loaded) <= MAX_MODULES, sorted(loaded)


def test_import_time_is_told(tell: Callable[[str], None]) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-X", "importtime", "-c", "from miniq import MiniQ"],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    own_us = re.findall(r"^import time:\s+(\d+) \|", done.stderr, re.MULTILINE)
    assert len(own_us) > 40
    tell(f"from miniq import MiniQ: {sum(map(int, own_us)) / 1000:.0f} ms here, Python's own start included")


STORE_USE = """
import miniq
app = miniq.MiniQ("proj", broker={url!r})

@app.task
def add(x, y):
    return x + y

assert add.delay(2, 3).state == "PENDING"
app.close()
print(*sys.modules)
"""


@pytest.mark.parametrize(("used", "unused"), [("sqlite", "memory"), ("memory", "sqlite")])
def test_sending_a_task_loads_the_modules_of_its_store_alone(used: str, unused: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/queue.db" if used == "sqlite" else "memory://"
    loaded = set(run(STORE_USE.format(url=url)).split())
    for floor in ("connections", "transports", "backends"):
        assert f"miniq.{floor}.{used}" in loaded
        assert f"miniq.{floor}.{unused}" not in loaded
    assert loaded & HEAVY == ({"sqlite3"} if used == "sqlite" else set())
    assert not {name for name in loaded if name.startswith(("miniq.worker", "miniq.pools", "miniq.cli"))}


def test_package_works_from_a_zip_file_and_without_site_packages(tmp_path: Path) -> None:
    archive = tmp_path / "miniq.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for module in MODULES.values():
            file.write(module.path, str(module.path.relative_to(ROOT)))
    code = STORE_USE.format(url=f"sqlite:///{tmp_path}/queue.db") + (
        "print(miniq.__file__)\n"
        "from miniq.cli.main import main\n"
        f"assert main(['-b', 'sqlite:///{tmp_path}/queue.db', 'queues']) == 0\n"
    )
    printed = run(code, folder=tmp_path, path=archive)
    assert str(archive) in printed
    assert re.search(r"celery\s+.*1", printed), printed


# -- what every file says ------------------------------------------------------------------------


def python_files() -> List[Path]:
    folders = ("miniq", "tests", "examples", "benchmarks", "docs")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_nothing_is_left_to_do() -> None:
    unfinished = re.compile(r"\b(" + "|".join(("TO" "DO", "FIX" "ME", "XX" "X")) + r")\b")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in python_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if unfinished.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_file_begins_with_its_licence_and_says_what_it_is_for() -> None:
    wrong = []
    for path in python_files():
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        if lines and lines[0].startswith("#!"):
            del lines[0]
        if not lines or lines[0] != "# SPDX-License-Identifier: MIT":
            wrong.append(f"{path.relative_to(ROOT)}: the first line is not the SPDX line")
        # A package's empty __init__ has nothing to say.
        if len(lines) > 1 and not ast.get_docstring(ast.parse(source)):
            wrong.append(f"{path.relative_to(ROOT)}: no docstring")
    assert not wrong, "\n".join(wrong)


def test_every_public_name_has_a_docstring() -> None:
    """Functions and classes of modules, and public methods unless the method they replace has one."""
    wrong = []
    for name, module in MODULES.items():
        if name == "__main__":
            continue
        loaded = importlib.import_module(f"miniq.{name}".rstrip("."))
        for node in module.tree.body:
            if not isinstance(node, DEFINITIONS) or node.name.startswith("_"):
                continue
            found = getattr(loaded, node.name)
            if not ast.get_docstring(node):
                wrong.append(f"{module.path.relative_to(ROOT)}:{node.lineno}: {node.name}")
            if isinstance(node, ast.ClassDef):
                wrong += [
                    f"{module.path.relative_to(ROOT)}:{part.lineno}: {node.name}.{part.name}"
                    for part in methods_without_docstring(node)
                    if not any(hasattr(base, part.name) for base in found.__mro__[1:])
                ]
    assert not wrong, "\n".join(wrong)


def methods_without_docstring(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """Yield public methods without one; short properties explain themselves."""
    for part in node.body:
        if not isinstance(part, ast.FunctionDef) or part.name.startswith("_") or ast.get_docstring(part):
            continue
        decorators = {ast.unparse(one).rpartition(".")[2] for one in part.decorator_list}
        is_short_property = "property" in decorators and len(part.body) <= 2
        if not is_short_property and not decorators & {"overload", "setter"}:
            yield part


def test_exported_names_exist() -> None:
    wrong = []
    for name in MODULES:
        if name == "__main__":
            continue
        loaded = importlib.import_module(f"miniq.{name}".rstrip("."))
        for public in getattr(loaded, "__all__", ()):
            if not hasattr(loaded, public):
                wrong.append(f"miniq.{name}: {public}")
    assert not wrong, "\n".join(wrong)


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
    wrong = [
        str(module.path.relative_to(ROOT))
        for module in MODULES.values()
        if module.tree.body[1:] and "from __future__ import annotations" not in module.source
    ]
    assert not wrong, "\n".join(wrong)


def test_version_is_the_one_in_the_changelog() -> None:
    changes = (ROOT / "CHANGELOG.rst").read_text(encoding="utf-8")
    assert re.search(rf"^{re.escape(miniq.__version__)}\b", changes, re.MULTILINE)


def test_no_file_is_executable_by_accident() -> None:
    if os.name != "posix":
        pytest.skip("file modes say nothing here")
    wrong = [
        str(path.relative_to(ROOT))
        for path in python_files()
        if os.access(path, os.X_OK) and not path.read_text(encoding="utf-8").startswith("#!")
    ]
    assert not wrong, "\n".join(wrong)

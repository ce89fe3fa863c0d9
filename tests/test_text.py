# SPDX-License-Identifier: MIT
"""Reprs that never fail, masked URLs, imports by name, node and file names."""

from __future__ import annotations

import random
import socket
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import pytest

from miniq import text
from miniq.exceptions import ImproperlyConfigured

# -- safe_repr -----------------------------------------------------------------------------------


class Point(NamedTuple):
    x: int
    y: int


class Broken:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __repr__(self) -> str:
        raise self.error


class Shouting:
    def __init__(self, words: str) -> None:
        self.words = words

    def __repr__(self) -> str:
        return self.words


@pytest.mark.parametrize(
    "value",
    [
        (),
        {},
        [],
        set(),
        frozenset(),
        (1,),
        (1, "two", None, True, 2.5),
        {"k": 1, "l": "x"},
        {1: 2},
        [1, (2, [3])],
        {1},
        frozenset({1}),
        "text",
        b"bytes",
        "it's",
        "both ' and \"",
        (b"a", "ż\n"),
        OrderedDict(a=1),
        Point(1, 2),
        -1.5,
        10**50,
    ],
)
def test_what_is_small_reads_as_repr_does(value: Any) -> None:
    assert text.safe_repr(value) == repr(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, "two", None, True, 2.5, [1, [2]], {"k": {"n": [3]}}),
         "(1, 'two', None, True, 2.5, [1, [2]], {'k': {'n': [...]}})"),
        ({"deep": {"a": {"b": {"c": 1}}}}, "{'deep': {'a': {'b': {...}}}}"),
        ([((), None), ((1,), {})], "[((), None), ((1,), {})]"),
        ([[[(), set(), [1]]]], "[[[(), set(), [...]]]]"),
    ],
)  # fmt: skip
def test_nesting_is_cut_where_celery_cuts_it(value: Any, expected: str) -> None:
    assert text.safe_repr(value) == expected


def test_max_levels_counts_containers() -> None:
    assert text.safe_repr([[1]], max_levels=1) == "[[...]]"
    assert text.safe_repr((1,), max_levels=0) == "(...)"
    assert text.safe_repr({"a": {"b": 1}}, max_levels=1) == "{'a': {...}}"


def test_a_value_inside_itself_ends() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert text.safe_repr(loop) == "[1, [...]]"
    assert text.safe_repr({"self": loop}, max_levels=50) == "{'self': [1, [...]]}"


def test_long_text_is_cut_inside_its_quotes() -> None:
    shown = text.safe_repr(("a" * 5000, 1))
    assert shown.startswith("('aaa")
    assert shown.endswith("aaa...', ...)")
    assert len(shown) <= 1024


def test_many_items_are_cut_and_the_time_does_not_grow_with_them() -> None:
    class Counting(list):  # type: ignore[type-arg]
        seen = 0

        def __iter__(self) -> Iterator[Any]:
            for item in super().__iter__():
                self.seen += 1
                yield item

    items = Counting(range(1_000_000))
    shown = text.safe_repr([items])
    assert shown.startswith("[[0, 1, 2, ")
    assert shown.endswith(("...]]", "...], ...]"))
    assert items.seen < 1024


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), RecursionError(), SystemExit(1), MemoryError(), TypeError()],
)
def test_a_repr_that_raises_becomes_text(error: BaseException) -> None:
    shown = text.safe_repr((1, Broken(error)))
    assert shown == f"(1, <Broken: repr failed: {type(error).__name__}>)"


def test_ctrl_c_inside_a_repr_still_stops_the_program() -> None:
    with pytest.raises(KeyboardInterrupt):
        text.safe_repr([Broken(KeyboardInterrupt())])


def test_a_subclass_speaks_for_itself() -> None:
    class Secret(dict):  # type: ignore[type-arg]
        def __repr__(self) -> str:
            return "<hidden>"

    assert text.safe_repr([Secret(password="x")]) == "[<hidden>]"


def test_text_no_utf8_can_hold_is_escaped() -> None:
    shown = text.safe_repr([Shouting("bad \ud800")])
    assert shown.encode("utf-8") == b"[bad \\ud800]"


def test_an_int_too_long_for_python_to_write_does_not_raise() -> None:
    assert text.safe_repr((10**6000,)).startswith("(")


def test_random_values_never_raise_and_never_exceed_the_bound() -> None:
    seed = random.randrange(2**32)
    rand = random.Random(seed)

    def value(depth: int) -> Any:
        kind = rand.randrange(12 if depth else 8)
        if kind == 0:
            return rand.randrange(-(10**30), 10**30)
        if kind == 1:
            return "".join(map(chr, (rand.randrange(1, 0xD7FF) for _ in range(rand.randrange(60)))))
        if kind == 2:
            return bytes(rand.randrange(256) for _ in range(rand.randrange(60)))
        if kind == 3:
            return Broken(ValueError())
        if kind == 4:
            return Shouting("x" * rand.randrange(300))
        if kind == 5:
            return rand.random()
        if kind == 6:
            return None
        if kind == 7:
            return "q'\"\\\n" * rand.randrange(20)
        items = [value(depth - 1) for _ in range(rand.randrange(6))]
        if kind == 8:
            return tuple(items)
        if kind == 9:
            return dict(enumerate(items))
        if kind == 10:
            return {repr(item) if isinstance(item, (int, str)) else 0 for item in items}
        return items

    for _ in range(1500):
        bound = rand.choice((64, 200, 1024))
        shown = text.safe_repr(value(4), bound, rand.randrange(6))
        assert isinstance(shown, str), f"seed {seed}"
        assert len(shown) <= bound, f"seed {seed}"


def test_truncate() -> None:
    assert text.truncate("abcdef", 6) == "abcdef"
    assert text.truncate("abcdefg", 6) == "abc..."
    assert text.truncate("abcdefg", 2) == "..."


# -- nearest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("typo", ["rediss", "redi", "reids", "rexis", "xredis", "redis"])
def test_one_letter_away_is_found(typo: str) -> None:
    assert text.nearest(typo, ["amqp", "redis", "sqlite"]) == "redis"
    assert text.nearest(typo, ["amqp", "redis", "sqlite"], only_typos=True) == "redis"


def test_nearest_finds_what_is_alike_unless_only_typos_count() -> None:
    assert (
        text.nearest("prefetch_multiplier", ["worker_prefetch_multiplier", "timezone"])
        == "worker_prefetch_multiplier"
    )
    assert text.nearest("prefetch_multiplier", ["worker_prefetch_multiplier"], only_typos=True) is None
    assert text.nearest("zzz", ["amqp", "redis"]) is None
    assert text.nearest("", ["amqp"]) is None


def test_is_typo_knows_one_edit_from_two() -> None:
    for a, b in [
        ("abcd", "abcd"),
        ("abcd", "abd"),
        ("abcd", "abXcd"),
        ("abcd", "bacd"),
        ("abcd", "abdc"),
        ("ab", "a"),
    ]:
        assert text.is_typo(a, b)
        assert text.is_typo(b, a)
    for a, b in [("abcd", "ab"), ("abcd", "dcba"), ("abcd", "badc"), ("abcd", "cabd")]:
        assert not text.is_typo(a, b)


# -- URLs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://:pw@h:1/0", "redis://:**@h:1/0"),
        ("amqp://guest:guest@localhost:5672//", "amqp://guest:**@localhost:5672//"),
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://user@h/0", "redis://user@h/0"),
        ("sqlite:///miniq.db", "sqlite:///miniq.db"),
        ("sqlite:////srv/a@b/c:d.db?x=1", "sqlite:////srv/a@b/c:d.db?x=1"),
        ("redis://u:p@ss/w?rd@h/0", "redis://u:**@h/0"),
        ("redis://[::1]:6379/0?email=a@b", "redis://[::1]:6379/0?email=a@b"),
        ("redis://h/0?password=pw&db=1", "redis://h/0?password=**&db=1"),
        ("redis://:a@h/0?sentinel_password=pw", "redis://:**@h/0?sentinel_password=**"),
        ("amqp://u:pw1@h;amqp://u:pw2@i//", "amqp://u:**@h;amqp://u:**@i//"),
        (
            "sentinel://:pw@h1:26379;sentinel://:pw@h2:26379/0",
            "sentinel://:**@h1:26379;sentinel://:**@h2:26379/0",
        ),
        ("sentinel://h1:26379;h2:26379/0?master_name=m", "sentinel://h1:26379;h2:26379/0?master_name=m"),
        ("user:pw@host", "user:**@host"),
        ("redis://:pw;pw@host", "redis://:**@host"),
        ("", ""),
    ],
)
def test_passwords_are_masked_and_nothing_else(url: str, masked: str) -> None:
    assert text.mask_url(url) == masked


def test_a_password_never_survives_masking() -> None:
    seed = random.randrange(2**32)
    rand = random.Random(seed)
    alphabet = "abcXYZ019:/@?#&%!$ '\"[]{}"
    for _ in range(3000):
        inner = "".join(rand.choice(alphabet) for _ in range(rand.randrange(8)))
        password = f"S3C{inner}R3T"
        scheme = rand.choice(["redis", "amqp", "sentinel", "db+postgresql"])
        url = f"{scheme}://{rand.choice(['', 'user'])}:{password}@host:1/0?x=1"
        url = ";".join([url] * rand.randrange(1, 3))
        masked = text.mask_url(url)
        assert "S3C" not in masked and "R3T" not in masked, f"seed {seed}: {url} -> {masked}"


def test_urls_inside_of_text_are_masked() -> None:
    assert (
        text.mask_urls("cannot reach 'redis://:pw@h/0': refused") == "cannot reach 'redis://:**@h/0': refused"
    )
    assert text.mask_urls("mail a@b, see c:d") == "mail a@b, see c:d"


def test_an_unknown_scheme_names_the_nearest_and_all() -> None:
    assert text.unknown_scheme("redsi", ["sqlite", "redis"]) == (
        "unknown scheme 'redsi' (did you mean redis://?); known: redis://, sqlite://"
    )
    assert text.unknown_scheme("", ["redis"]) == "no scheme; known: redis://"
    assert "did you mean" not in text.unknown_scheme("zzzz", ["redis"])


# -- imports -------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `mqproj` that may be filled with modules; gone from sys.modules afterwards."""
    package = tmp_path / "mqproj"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tasks.py").write_text("value = 1\nclass Holder:\n    inner = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "mqproj"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("path", "package", "expected"),
    [
        ("mqproj.tasks:value", None, 1),
        ("mqproj.tasks.value", None, 1),
        ("mqproj.tasks:Holder.inner", None, 2),
        (".tasks:value", "mqproj", 1),
        (".tasks", "mqproj", sys),
        ("mqproj.tasks", None, sys),
    ],
)
def test_an_object_is_found_by_each_form_of_its_name(
    project: Path, path: str, package: Any, expected: Any
) -> None:
    found = text.import_object(path, package)
    assert found is sys.modules["mqproj.tasks"] if expected is sys else found == expected


@pytest.mark.parametrize(
    "path", ["mqproj.nope:x", "mqnope", "mqnope.a.b", "mqproj.nope.deeper.x", "mqproj.tasks.no.x"]
)
def test_a_missing_module_is_an_import_error_naming_it(project: Path, path: str) -> None:
    with pytest.raises(ImportError, match="there is no module 'mq") as caught:
        text.import_object(path)
    assert type(caught.value) is ImportError
    assert repr(path) in str(caught.value)


@pytest.mark.parametrize("path", ["", ".tasks:value", ":x"])
def test_a_name_that_leads_nowhere_is_an_import_error(path: str) -> None:
    with pytest.raises(ImportError, match="cannot import"):
        text.import_object(path)


@pytest.mark.parametrize("path", ["mqproj.tasks:Holdr", "mqproj.tasks.Holdr"])
def test_a_missing_attribute_names_the_nearest(project: Path, path: str) -> None:
    with pytest.raises(AttributeError, match=r"mqproj.tasks has no 'Holdr' .did you mean 'Holder'"):
        text.import_object(path)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import mq_not_there", ModuleNotFoundError),
        ("import mqproj.broken.deeper", ModuleNotFoundError),
        ("import mqproj.brokenn", ModuleNotFoundError),
        ("from mqproj import nothing", ImportError),
        ("1 / 0", ZeroDivisionError),
        ("def f(:", SyntaxError),
        ("raise AttributeError('mine')", AttributeError),
        ("from miniq.text import import_module; import_module('mqproj.nope')", ModuleNotFoundError),
        ("raise ModuleNotFoundError('mine', name='mqproj.broken')", ModuleNotFoundError),
    ],
)
def test_an_error_inside_the_module_passes_with_its_own_traceback(
    project: Path, code: str, error: "type[BaseException]"
) -> None:
    (project / "broken.py").write_text(code + "\n")
    for path in ("mqproj.broken:x", "mqproj.broken.x", "mqproj.broken"):
        with pytest.raises(error) as caught:
            text.import_object(path)
        assert not text.is_missing(caught.value)
        assert "there is no module" not in str(caught.value)
        if error is not SyntaxError:
            assert any(str(entry.path).endswith("broken.py") for entry in caught.traceback)


def test_a_package_whose_init_imports_the_asked_but_missing_module_is_broken_not_missing(
    project: Path,
) -> None:
    (project / "__init__.py").write_text("import mqproj.nope\n")
    with pytest.raises(ModuleNotFoundError) as caught:
        text.import_module("mqproj.nope")
    assert not text.is_missing(caught.value)


def test_is_missing_says_yes_only_for_the_asked_module(project: Path) -> None:
    with pytest.raises(ModuleNotFoundError) as caught:
        text.import_module("mqproj.nope")
    assert text.is_missing(caught.value)
    assert not text.is_missing(ModuleNotFoundError("no traceback at all"))
    assert not text.is_missing(ValueError())


# -- names ---------------------------------------------------------------------------------------


def test_task_names() -> None:
    assert text.gen_task_name("proj", "add", "proj.tasks") == "proj.tasks.add"
    assert text.gen_task_name("proj", "add", "__main__") == "proj.add"
    assert text.gen_task_name(None, "add", "__main__") == "__main__.add"
    assert text.gen_task_name("proj", "add", None) == "add"


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        ("w1@%h", "w1@box.example.com"),
        ("w1@%n", "w1@box"),
        ("w1@%d", "w1@example.com"),
        ("%n", "celery@box"),
        ("w1@", "w1@box.example.com"),
        ("@other", "celery@other"),
        ("other", "celery@other"),
        ("", "celery@box.example.com"),
        ("100%%@x", "100%@x"),
    ],
)
def test_node_names_read_as_celery_reads_them(fmt: str, expected: str) -> None:
    assert text.node_name(fmt, "box.example.com") == expected


def test_the_default_node_name_is_this_host() -> None:
    assert text.default_node_name() == f"celery@{socket.gethostname()}" == text.node_name("")


@pytest.mark.parametrize(
    ("path", "index", "expected"),
    [
        ("/log/%n%I.log", None, "/log/w1.log"),
        ("/log/%n%I.log", 2, "/log/w1-2.log"),
        ("/log/%n-%i.log", None, "/log/w1-0.log"),
        ("/log/%n-%i.log", 2, "/log/w1-2.log"),
        ("%p %h %d %%", 1, "w1@box.example.com box.example.com example.com %"),
        ("plain.log", 3, "plain.log"),
    ],
)
def test_file_names_expand(path: str, index: Any, expected: str) -> None:
    assert text.expand_file_name(path, "w1@box.example.com", index) == expected


@pytest.mark.parametrize("path", ["%x.log", "a%"])
def test_an_unknown_format_character_is_refused(path: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=r"unknown '%x?'; known: %p"):
        text.expand_file_name(path, "w1@h")

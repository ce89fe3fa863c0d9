# SPDX-License-Identifier: MIT
"""Serializers, the gate, compression and exceptions on the wire."""

from __future__ import annotations

import base64
import bz2
import collections
import datetime as dt
import decimal
import enum
import gzip
import importlib.util
import json
import lzma
import os
import pathlib
import pickle
import random
import subprocess
import sys
import threading
import types
import uuid
import zlib
import zoneinfo

import pytest

from miniq import exceptions, serialization
from miniq.exceptions import (
    ContentDisallowed,
    DecodeError,
    EncodeError,
    ImproperlyConfigured,
    SecurityError,
)
from miniq.serialization import (
    compress,
    decompress,
    dumps,
    exception_from_dict,
    exception_to_dict,
    loads,
    prepare_accept,
)

VECTORS = json.loads((pathlib.Path(__file__).parent / "vectors" / "serialization.json").read_text("utf-8"))
JSON = frozenset({"application/json"})
ALL = prepare_accept(["json", "pickle", "yaml", "msgpack", "raw", "text"])
#: Library behind an optional serializer or compression -> how it is imported.
LIBRARIES = {"yaml": "yaml", "msgpack": "msgpack", "brotli": "brotli", "zstd": "compression.zstd"}
LIBRARIES["zstandard"] = LIBRARIES["zstd"]


def need(name):
    """Skip where the library behind `name` is not installed."""
    library = LIBRARIES.get(name)
    if library is not None:
        top = library.partition(".")[0]
        if importlib.util.find_spec(top) is None or importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    if name == "brotli" and not hasattr(
        importlib.import_module("brotli").Decompressor, "can_accept_more_data"
    ):
        pytest.skip("brotli is too old to bound its output")


def write(value):
    return dumps(value, "json")[2].decode("ascii")


def read(text):
    return loads(text.encode("utf-8") if isinstance(text, str) else text, "application/json", "utf-8", JSON)


def vectors(kind):
    chosen = [vector for vector in VECTORS if vector["kind"] == kind]
    return pytest.mark.parametrize("vector", chosen, ids=[vector["name"] for vector in chosen])


# -- what the vectors' expressions mean


class _IntEnum(enum.IntEnum):
    A = 3


class _Color(enum.Enum):
    RED = 1


class _StrEnum(str, enum.Enum):
    X = "x"


class _Json:
    def __json__(self):
        return {"j": 1}


class _SubDict(dict):
    pass


NAMES = {
    "dt": dt,
    "datetime": dt,
    "D": dt.datetime,
    "UTC": dt.timezone.utc,
    "uuid": uuid,
    "UUID": uuid.UUID,
    "decimal": decimal,
    "Decimal": decimal.Decimal,
    "nan": float("nan"),
    "inf": float("inf"),
    "IC": _IntEnum,
    "Color": _Color,
    "S": _StrEnum,
    "NT": collections.namedtuple("NT", "a b"),
    "DC": types.SimpleNamespace,
    "J": _Json,
    "SubDict": _SubDict,
}


def evaluate(expression):
    names = dict(NAMES)
    if expression == "DC(1)":
        return types.SimpleNamespace(a=1)
    return eval(expression, names)  # noqa: S307 - our own test data


def same(left, right):
    """Compare, with NaN equal to itself and 1 different from True and 1.0."""
    return repr(left) == repr(right)


@vectors("json_encode")
def test_json_encode_vector(vector):
    try:
        value = evaluate(vector["python"])
    except zoneinfo.ZoneInfoNotFoundError as error:  # a time zone database is not everywhere
        pytest.skip(f"cannot make the value: {error!r}")
    if "error" in vector:
        with pytest.raises(EncodeError) as caught:
            write(value)
        reason = vector["error"].partition(": ")[2]
        for made, meant in (("SimpleNamespace", "DC"), ("_Color", "Color")):
            reason = reason.replace(f"type {meant} ", f"type {made} ")
        assert reason in str(caught.value)
        return
    text = write(value)
    assert text == vector["json"]
    assert same(read(text), evaluate(vector["decodes_to"]))
    if vector["round_trips_equal"]:
        assert read(text) == value


@vectors("json_decode")
def test_json_decode_vector(vector):
    if "error" in vector:
        with pytest.raises(DecodeError):
            read(vector["json"])
    else:
        assert same(read(vector["json"]), evaluate(vector["decodes_to"]))


@vectors("serializer")
def test_serializer_vector_both_ways(vector):
    name = vector.get("serializer") or vector["name"].rpartition("_")[2]
    need(name)
    value = evaluate(vector["python"])
    body = base64.b64decode(vector["body"])
    content_type, encoding, written = dumps(value, name)
    assert (content_type, encoding) == (vector["content_type"], vector["content_encoding"])
    assert loads(body, content_type, encoding, ALL) == value
    if name == "pickle":
        assert pickle.loads(written) == value and written[:2] == b"\x80\x04"
    else:
        assert written == body


@vectors("compression")
def test_compression_vector_both_ways(vector):
    need(vector["alias"])
    plain = evaluate(vector["python"])
    body = base64.b64decode(vector["body"])
    assert decompress(body, vector["header_value"]) == plain
    assert decompress(body, vector["alias"]) == plain
    compressed, header = compress(plain, vector["alias"])
    assert header == vector["header_value"]
    assert decompress(compressed, header) == plain


# -- JSON


def test_task_body_is_written_as_celery_writes_it():
    body = ([2, 3], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None})
    assert write(body) == (
        '[[2, 3], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
    )


def test_escaped_underscore_in_marker_is_still_a_marker():
    assert read('{"\\u005f_type__": "date", "__value__": "2024-02-29"}') == dt.date(2024, 2, 29)
    assert read('{"\\u005F_type__": "date", "__value__": "2024-02-29"}') == dt.date(2024, 2, 29)


def test_word_type_in_a_text_changes_nothing():
    value = {"text": "__type__", "__type__": 1}
    assert read(write(value)) == value


def test_white_space_around_is_fine_and_anything_else_is_not():
    assert read(" \r\n\t[1] \n") == [1]
    for text in ("[1] x", "[1][2]", "", " ", "\ufeff[1]", "\u00a0[1]"):
        with pytest.raises(DecodeError):
            read(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-02-29T12:30:15Z", dt.datetime(2024, 2, 29, 12, 30, 15, tzinfo=dt.timezone.utc)),
        ("2024-02-29 12:30", dt.datetime(2024, 2, 29, 12, 30)),
        ("2024-02-29T12:30:15.1234567", dt.datetime(2024, 2, 29, 12, 30, 15, 123456)),
        (
            "2024-02-29T12:30:15.5+0530",
            dt.datetime(2024, 2, 29, 12, 30, 15, 500000, dt.timezone(dt.timedelta(hours=5.5))),
        ),
        ("2024-02-29", dt.datetime(2024, 2, 29)),
    ],
)
def test_datetime_forms_of_other_writers_are_read_on_every_python(text, expected):
    found = read(json.dumps({"__type__": "datetime", "__value__": text}))
    assert found == expected and found.utcoffset() == expected.utcoffset()


def test_time_of_day_with_z_is_read_on_every_python():
    assert read('{"__type__": "time", "__value__": "10:20:30Z"}') == dt.time(
        10, 20, 30, tzinfo=dt.timezone.utc
    )


def test_subclass_of_known_type_is_written_as_that_type():
    class Stamp(dt.datetime):
        pass

    assert read(write(Stamp(2024, 1, 2))) == dt.datetime(2024, 1, 2)


def test_registered_type_round_trips_and_can_be_bare():
    class Point:
        def __init__(self, x, y):
            self.x, self.y = x, y

    class Lazy:
        pass

    serialization.register_type(Point, "test.point", lambda p: [p.x, p.y], lambda v: Point(*v))
    serialization.register_type(Lazy, None, lambda _: "now")
    try:
        text = write([Point(1, 2), Lazy()])
        assert text == '[{"__type__": "test.point", "__value__": [1, 2]}, "now"]'
        found = read(text)
        assert (found[0].x, found[0].y, found[1]) == (1, 2, "now")
    finally:
        serialization._encoders.pop(Point)
        serialization._encoders.pop(Lazy)
        serialization._decoders.pop("test.point")
    with pytest.raises(DecodeError, match=r"test\.point"):
        read(text)


def test_marker_without_decode_function_is_refused():
    with pytest.raises(TypeError, match="decode"):
        serialization.register_type(type("X", (), {}), "x", str)


def test_unknown_marker_names_the_nearest():
    with pytest.raises(DecodeError, match="did you mean 'decimal'"):
        read('{"__type__": "decimall", "__value__": "1"}')


# -- where a value cannot be written


def test_error_names_argument_key_and_type():
    with pytest.raises(EncodeError) as caught:
        dumps(([{"when": dt.timedelta(1)}], {}, {"callbacks": None}), "json")
    assert "args[0]['when'] (timedelta)" in str(caught.value)
    with pytest.raises(EncodeError, match=r"kwargs\['a'\]\[2\] \(set\)"):
        dumps(((), {"a": [1, 2, {3}]}, {}), "json")


def test_error_in_plain_value_is_named_value():
    with pytest.raises(EncodeError, match=r"value\[1\] \(set\)"):
        dumps([0, {1}], "json")
    with pytest.raises(EncodeError, match=r"the value \(set\)"):
        dumps({1}, "json")


def test_bad_key_names_the_dict():
    with pytest.raises(EncodeError, match=r"args\[0\] \(dict\): keys must be"):
        dumps(([{(1, 2): 3}], {}, {}), "json")


def test_structure_that_contains_itself_is_an_encode_error():
    ring = [1]
    ring.append([ring])
    with pytest.raises(EncodeError, match="contains itself"):
        dumps(ring, "json")


def test_too_deep_structure_is_an_encode_error():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(EncodeError):
        dumps(deep, "json")
    while deep:  # taken apart by hand: freeing it at once may recurse as deep
        deep = deep[0]


def test_failing_json_method_is_an_encode_error():
    class Bad:
        def __json__(self):
            raise OSError("no disk")

    with pytest.raises(EncodeError, match=r"value\['b'\] \(Bad\): no disk"):
        dumps({"a": 1, "b": Bad()}, "json")


def test_pickle_error_names_the_place_too():
    with pytest.raises(EncodeError, match=r"kwargs\['lock'\]"):
        dumps(((), {"lock": threading.Lock()}, {}), "pickle")


# -- registry and gate


def test_unknown_serializer_names_the_nearest():
    with pytest.raises(ImproperlyConfigured, match="did you mean 'json'"):
        dumps(1, "jsn")
    with pytest.raises(ImproperlyConfigured, match="known: .*msgpack"):
        serialization.serializer("")


def test_missing_library_is_named(monkeypatch):
    serialization.unregister("yaml")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImproperlyConfigured, match="PyYAML"):
        dumps(1, "yaml")
    with pytest.raises(DecodeError, match="PyYAML"):
        loads(b"1", "application/x-yaml", "utf-8", ALL)
    assert prepare_accept(["yaml"]) == {"application/x-yaml"}


def test_accept_takes_names_and_content_types():
    assert prepare_accept(["json", "application/x-thing"]) == {"application/json", "application/x-thing"}
    with pytest.raises(ImproperlyConfigured, match="did you mean 'pickle'"):
        prepare_accept(["pickel"])
    with pytest.raises(ImproperlyConfigured, match="list"):
        prepare_accept("json")


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "", None, [], "json"]
)
def test_content_type_is_compared_exactly(content_type):
    with pytest.raises(ContentDisallowed, match="application/json"):
        loads(b"[]", content_type, "utf-8", JSON)


def test_refused_content_is_neither_decompressed_nor_decoded():
    class Untouchable(bytes):
        def __getattribute__(self, name):
            raise AssertionError(f"looked at {name}")

    body = Untouchable(pickle.dumps(print))
    with pytest.raises(ContentDisallowed):
        loads(body, "application/x-python-serialize", "binary", JSON, "application/x-gzip")


def test_accepted_type_without_serializer_is_a_decode_error():
    with pytest.raises(DecodeError, match="no serializer is registered for application/x-thing"):
        loads(b"", "application/x-thing", "binary", frozenset({"application/x-thing"}))


def test_own_serializer_can_be_added_and_taken_out():
    serialization.register("rot", lambda v: v[::-1], lambda b: b.decode()[::-1], "application/x-rot")
    try:
        assert dumps("abc", "rot") == ("application/x-rot", "utf-8", b"cba")
        assert loads(b"cba", "application/x-rot", "utf-8", prepare_accept(["rot"])) == "abc"
        with pytest.raises(EncodeError, match="rot"):
            dumps(5, "rot")
        with pytest.raises(DecodeError, match="x-rot"):
            loads(b"\xff", "application/x-rot", "utf-8", prepare_accept(["rot"]))
    finally:
        serialization.unregister("rot")
        serialization.unregister("rot")
    with pytest.raises(ImproperlyConfigured):
        dumps("abc", "rot")


def test_raw_and_text_travel_as_they_are():
    assert dumps(b"\x00", "raw") == ("application/data", "binary", b"\x00")
    assert dumps("\u00e9", "text") == ("text/plain", "utf-8", b"\xc3\xa9")
    assert loads(b"\xc3\xa9", "text/plain", "utf-8", ALL) == "\u00e9"
    assert loads(b"\xc3\xa9", "application/data", "binary", ALL) == b"\xc3\xa9"
    with pytest.raises(EncodeError):
        dumps(1, "raw")


def test_undecodable_body_shows_a_bounded_excerpt():
    with pytest.raises(DecodeError) as caught:
        read(b"\x00secret" + b"x" * 100_000)
    assert "100007 bytes" in str(caught.value) and len(str(caught.value)) < 1000


# -- compression


@pytest.mark.parametrize("name", ["gzip", "bzip2", "lzma", "zstd", "brotli"])
def test_bomb_is_stopped_at_the_limit(name):
    need(name)
    body, header = compress(b"\0" * 5_000_000, name)
    with pytest.raises(DecodeError, match="limit of 100000 bytes"):
        decompress(body, header, 100_000)
    assert len(decompress(body, header, 5_000_000)) == 5_000_000


@pytest.mark.parametrize("name", ["gzip", "bzip2", "lzma", "zstd", "brotli"])
def test_every_truncation_is_a_decode_error(name):
    need(name)
    body, header = compress(b"some payload, some payload" * 20, name)
    for length in range(len(body)):
        with pytest.raises(DecodeError):
            decompress(body[:length], header)


def test_real_gzip_of_other_senders_is_read():
    assert decompress(gzip.compress(b"x" * 50), "application/x-gzip") == b"x" * 50


def test_celery_reads_our_compression_with_the_plain_functions():
    assert zlib.decompress(compress(b"abc", "gzip")[0]) == b"abc"
    assert bz2.decompress(compress(b"abc", "bzip2")[0]) == b"abc"
    assert lzma.decompress(compress(b"abc", "xz")[0]) == b"abc"


def test_unknown_compression_names_the_nearest():
    with pytest.raises(ImproperlyConfigured, match="did you mean 'gzip'"):
        compress(b"", "gzipp")
    with pytest.raises(DecodeError, match="did you mean"):
        decompress(b"", "application/x-gzp")


def test_missing_compression_module_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bz2", None)
    with pytest.raises(ImproperlyConfigured, match="bz2"):
        compress(b"", "bzip2")
    with pytest.raises(DecodeError, match="bz2"):
        decompress(b"", "application/x-bz2")


def test_own_compression_can_be_added():
    found = serialization.Compression("application/x-none", lambda: (bytes, lambda body, limit: body), "none")
    serialization.register_compression(found, "none")
    try:
        body, header = compress(b"abc", "none")
        assert decompress(body, header) == b"abc"
    finally:
        for name in ("none", "application/x-none"):
            serialization._compressions.pop(name)


def test_loads_decompresses_first():
    body, header = compress(b"[1, 2]", "zlib")
    assert loads(body, "application/json", "utf-8", JSON, header) == [1, 2]
    with pytest.raises(DecodeError, match="limit of 5 bytes"):
        loads(body, "application/json", "utf-8", JSON, header, 5)


# -- exceptions


class Outer:
    class Inner(Exception):
        pass


class NeedsKeyword(Exception):
    def __init__(self, *, code):
        self.code = code
        super().__init__()

    def __str__(self):
        return f"code {self.code}"


class MakesItsText(Exception):
    def __init__(self, code):
        super().__init__(f"code {code}")


class NeedsTwo(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


class Hostile(Exception):
    args = property(lambda self: 1 / 0)

    def __str__(self):
        raise SystemExit("no text")

    __repr__ = __str__

    def __reduce__(self):
        raise OSError("no pickle")


class HostileArgument:
    __class__ = property(lambda self: 1 / 0)

    def __repr__(self):
        raise ValueError("no repr")

    def __json__(self):
        raise ValueError("no json")


class NoSubclasses(Exception):
    def __init_subclass__(cls):
        raise TypeError("final")

    def __init__(self):
        super().__init__("final text")


def over_the_wire(error):
    found = read(write(exception_to_dict(error)))
    assert list(found) == ["exc_type", "exc_message", "exc_module"]
    return exception_from_dict(found)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x", 1, None, 2.5),
        KeyError("k"),
        OSError(2, "no such file"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        Outer.Inner("inner"),
        ValueError(dt.datetime(2024, 1, 1), b"\xff", decimal.Decimal("1.5")),
        exceptions.TaskRevokedError("revoked"),
        exceptions.MaxRetriesExceededError("x"),
        exceptions.NotRegistered("a.b"),
        exceptions.Reject("no", requeue=False),
        ZeroDivisionError(),
    ],
    ids=repr,
)
def test_exception_comes_back_as_itself(error):
    found = over_the_wire(error)
    assert type(found) is type(error)
    assert found.args == error.args and str(found) == str(error)


@pytest.mark.parametrize(
    ("error", "module"),
    [
        (exceptions.TaskRevokedError("revoked"), "celery.exceptions"),
        (exceptions.EncodeError("x"), "kombu.exceptions"),
        (ValueError("x"), "builtins"),
        (Outer.Inner("x"), __name__),
    ],
    ids=repr,
)
def test_exception_is_written_under_the_name_celery_knows(error, module):
    found = exception_to_dict(error)
    assert found == {
        "exc_type": type(error).__qualname__,
        "exc_message": list(error.args),
        "exc_module": module,
    }


def test_billiard_names_are_ours():
    found = exception_from_dict(
        {"exc_type": "WorkerLostError", "exc_message": ["gone"], "exc_module": "billiard.exceptions"}
    )
    assert type(found) is exceptions.WorkerLostError


@pytest.mark.parametrize(
    "error",
    [NeedsKeyword(code=7), MakesItsText(7), NeedsTwo(1, 2), NoSubclasses()],
    ids=lambda error: type(error).__name__,
)
def test_text_survives_a_constructor_that_refuses_it(error):
    text = str(error)
    found = over_the_wire(error)
    assert str(found) == text and found.args == (text,)
    if not isinstance(error, NoSubclasses):
        assert isinstance(found, type(error))
    assert type(found).__name__ == type(error).__name__


def test_hostile_exception_is_described_anyway():
    found = exception_to_dict(Hostile("a", HostileArgument(), threading.Lock(), float("nan")))
    assert found["exc_type"] == "Hostile" and found["exc_message"][0] == "a"
    assert "repr failed" in found["exc_message"][1] and "lock" in found["exc_message"][2]
    assert json.loads(json.dumps(found))["exc_type"] == "Hostile"
    assert "Hostile" in type(exception_from_dict(found)).__name__
    assert exception_to_dict(Hostile())["exc_message"] != [None]


def test_argument_with_its_own_json_form_is_read_back_before_it_is_stored():
    class Counts:
        calls = 0

        def __json__(self):
            Counts.calls += 1
            if Counts.calls > 1:
                raise ValueError("only once")
            return [1, {2}] if Counts.calls > 1 else [1, 2]

    assert json.dumps(exception_to_dict(ValueError(Counts()))["exc_message"]) == "[[1, 2]]"


@pytest.mark.parametrize(
    "argument",
    ["x" * 100_000_000, b"x" * 10_000_000, ["y" * 1000] * 10_000, {str(i): i for i in range(100_000)}],
    ids=["text", "bytes", "list", "dict"],
)
def test_huge_argument_is_cut(argument):
    found = exception_to_dict(ValueError(argument))
    assert len(found["exc_message"]) == 1 and len(found["exc_message"][0]) < 66_000
    assert found["exc_message"][0][:2] in ("xx", "b'", "['", "{'")


def test_many_arguments_are_cut():
    found = exception_to_dict(ValueError(*range(100_000)))
    assert len(found["exc_message"]) == 65 and "cut" in found["exc_message"][-1]


def test_recursive_cause_and_argument_are_no_trouble():
    error = ValueError("x")
    error.__cause__ = error
    ring = [error]
    ring.append(ring)
    error.args = (ring,)
    assert isinstance(exception_to_dict(error)["exc_message"][0], str)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups are new in Python 3.11")
def test_exception_group_keeps_its_text():
    group = ExceptionGroup("several", [ValueError(1), KeyError(2)])  # noqa: F821
    found = over_the_wire(group)
    assert (
        type(found).__name__ == "ExceptionGroup" and "several" in str(found) and "KeyError(2)" in str(found)
    )


def test_local_class_becomes_a_look_alike_of_the_same_name():
    class Local(Exception):
        pass

    found = over_the_wire(Local("x", 1))
    assert type(found).__name__ == "Local" and found.args == ("x", 1)
    assert type(found).__qualname__ == Local.__qualname__ and type(found).__module__ == __name__


def test_unknown_class_is_made_once_and_nothing_is_imported(tmp_path, monkeypatch):
    (tmp_path / "never_imported_module.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    description = {"exc_type": "Gone", "exc_message": ["a", 2], "exc_module": "never_imported_module"}
    first, second = exception_from_dict(description), exception_from_dict(description)
    assert type(first) is type(second) and first.args == ("a", 2)
    assert (type(first).__name__, type(first).__module__) == ("Gone", "never_imported_module")
    assert "never_imported_module" not in sys.modules


def test_module_with_getattr_hook_is_not_asked(monkeypatch):
    module = types.ModuleType("hooked_module")
    module.__getattr__ = lambda name: pytest.fail("asked")
    monkeypatch.setitem(sys.modules, "hooked_module", module)
    found = exception_from_dict({"exc_type": "X", "exc_message": [], "exc_module": "hooked_module"})
    assert type(found).__name__ == "X"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "dict"),
        ("os", "path.join"),
        ("os", "environ"),
        ("os", "path"),
    ],
)
def test_name_of_something_else_is_a_security_error(module, name):
    with pytest.raises(SecurityError, match=name):
        exception_from_dict({"exc_type": name, "exc_message": ["echo"], "exc_module": module})


@pytest.mark.parametrize(
    ("description", "name", "args"),
    [
        (
            {"exc_type": "ValueError", "exc_message": "plain", "exc_module": "builtins"},
            "ValueError",
            ("plain",),
        ),
        ({"exc_type": "ValueError", "exc_message": None, "exc_module": "builtins"}, "ValueError", ()),
        ({"exc_type": "ValueError"}, "ValueError", ()),
        ({"exc_type": "KeyError", "exc_message": ["k"], "exc_module": None}, "KeyError", ("k",)),
        ({"exc_type": "not a name\0", "exc_message": [1], "exc_module": "m"}, "UnknownError", (1,)),
        ({"exc_type": 5, "exc_message": [1], "exc_module": 6}, "Exception", (1,)),
        ({}, "Exception", ()),
        ("only text", "Exception", ("only text",)),
        (None, "Exception", ()),
        ({"exc_type": "E", "exc_message": {"a": 1}, "exc_module": ""}, "E", ({"a": 1},)),
    ],
)
def test_incomplete_description_still_gives_an_exception(description, name, args):
    found = exception_from_dict(description)
    assert isinstance(found, Exception) and type(found).__name__ == name and found.args == args


def test_exception_object_passes_through():
    error = ValueError(1)
    assert exception_from_dict(error) is error


def test_table_of_made_classes_is_bounded():
    for index in range(serialization.MAX_MADE_CLASSES + 50):
        exception_from_dict({"exc_type": f"E{index}", "exc_message": [], "exc_module": "nowhere"})
    assert len(serialization._made) <= serialization.MAX_MADE_CLASSES


# -- properties


def random_value(rng, depth=0):
    kind = rng.randrange(16 if depth < 4 else 12)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.randrange(-(10**18), 10**18)
    if kind == 2:
        return rng.uniform(-1e300, 1e300)
    if kind in (3, 4):
        return random_text(rng)
    if kind == 5:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(8)))
    if kind == 6:
        return dt.datetime.min + dt.timedelta(microseconds=rng.randrange(3 * 10**17))
    if kind == 7:
        zone = dt.timezone(dt.timedelta(minutes=rng.randrange(-1439, 1440)))
        return dt.datetime(rng.randrange(2, 9998), 6, 7, rng.randrange(24), tzinfo=zone)
    if kind == 8:
        return dt.date.fromordinal(rng.randrange(1, 3652059))
    if kind == 9:
        return dt.time(rng.randrange(24), rng.randrange(60), rng.randrange(60), rng.randrange(10**6))
    if kind == 10:
        return decimal.Decimal(rng.randrange(-(10**9), 10**9)).scaleb(rng.randrange(-30, 30))
    if kind == 11:
        return uuid.UUID(int=rng.getrandbits(128))
    if kind in (12, 13):
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {random_text(rng): random_value(rng, depth + 1) for _ in range(rng.randrange(5))}


def random_text(rng):
    alphabet = [
        '"',
        "\\",
        "/",
        "\0",
        "\x1f",
        "\u00e9",
        "\u2028",
        "\ud800",
        "\U0001f680",
        "__type__",
        "__value__",
        "a",
        " ",
    ]
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(6)))


def test_random_values_round_trip():
    for seed in range(500):
        rng = random.Random(seed)
        value = random_value(rng)
        body = dumps(value, "json")[2]
        assert loads(body, "application/json", "utf-8", JSON) == value, f"seed {seed}"
        assert body.isascii() and b"\n" not in body, f"seed {seed}"


def test_garbage_gives_decode_errors_only():
    pieces = [
        b"[",
        b"]",
        b"{",
        b"}",
        b":",
        b",",
        b'"',
        b"1e9",
        b"-",
        b"null",
        b"\\u",
        b"\xff",
        b"\xed\xa0\x80",
        b" ",
    ]
    pieces += [
        b'{"__type__":"',
        b'","__value__":',
        b"datetime",
        b"decimal",
        b"uuid",
        b"base64",
        b"bytes",
        b"time",
        b"date",
    ]
    pieces += [
        b'"__type__"',
        b'"__value__"',
        b"9" * 5000,
        b"Infinity",
        b'"2024-13-99"',
        b'{"hex":5}',
        b"[" * 3000,
    ]
    for seed in range(3000):
        rng = random.Random(seed)
        body = b"".join(rng.choice(pieces) for _ in range(rng.randrange(12)))
        try:
            read(body)
        except DecodeError as error:
            assert len(str(error)) < 1000, f"seed {seed}"
        except BaseException as error:
            pytest.fail(f"seed {seed}: {body[:100]!r} raised {error!r}")


def test_one_changed_byte_gives_a_value_or_a_decode_error():
    body = dumps(
        [dt.datetime(2024, 1, 1), uuid.UUID(int=5), decimal.Decimal("1.5"), b"\xff", {"a": [1.5, None]}],
        "json",
    )[2]
    for seed in range(3000):
        rng = random.Random(seed)
        changed = bytearray(body)
        changed[rng.randrange(len(body))] = rng.randrange(256)
        try:
            read(bytes(changed))
        except DecodeError:
            continue
        except BaseException as error:
            pytest.fail(f"seed {seed}: {bytes(changed)!r} raised {error!r}")


def test_garbage_descriptions_give_an_exception_or_a_security_error():
    words = [
        None,
        1,
        "",
        "ValueError",
        "os",
        "system",
        "builtins",
        "a.b.c",
        "..",
        "\ud800",
        [],
        ["x"],
        {"a": 1},
        True,
    ]
    for seed in range(2000):
        rng = random.Random(seed)
        description = {
            key: rng.choice(words) for key in ("exc_type", "exc_message", "exc_module") if rng.random() < 0.9
        }
        try:
            assert isinstance(exception_from_dict(description), BaseException), f"seed {seed}"
        except SecurityError:
            continue


# -- imports


def test_import_loads_no_slow_modules():
    package = os.path.dirname(serialization.__file__)
    # A bare package: what its __init__ imports is not the question here.
    code = (
        "import sys, types; package = types.ModuleType('miniq'); package.__path__ = [sys.argv[1]];"
        "sys.modules['miniq'] = package; import miniq.serialization, miniq.routing, miniq.message;"
        "slow = {'decimal', 'uuid', 'inspect', 'dataclasses', 'lzma', 'bz2', 'socket', 'difflib', 'asyncio'};"
        "print(*sorted(slow & set(sys.modules)))"
    )
    command = [sys.executable, "-S", "-c", code, package]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout.split(), run.stderr) == (0, [], "")

# SPDX-License-Identifier: MIT
"""Objects to bytes and back: serializers, the gate in front of them, compression, exceptions.

Three small registries, all by name: serializers (json and pickle built in, yaml and msgpack where
their libraries are installed, raw bytes and text), compressions, and types that JSON learns.
Reading asks the gate first: a content type that is not accepted is refused before its bytes are
decompressed or looked at.  Writing costs one call of the C encoder; where a value that cannot be
written sits is only searched for once it has failed.

On the wire everything is as Celery (kombu) writes it: JSON in ASCII with ``", "`` and ``": "``, and
two-key objects for what JSON has no form for::

    {"__type__": "datetime", "__value__": "2024-02-29T12:30:15+05:30"}
    date, time: ISO text   decimal: text   uuid: {"hex": ...}   bytes: text, or base64 with that name

Errors: `EncodeError` (the caller must act), `DecodeError` and `ContentDisallowed` (set the message
aside), `ImproperlyConfigured` (a name nobody knows, a library that is not installed).
"""

from __future__ import annotations

import binascii
import builtins
import importlib
import json
import pickle
import sys
from datetime import date, datetime, time, timedelta, timezone
from types import ModuleType
from typing import (
    Any,
    Callable,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
    Type,
)

from .exceptions import (
    BY_WIRE_NAME,
    WIRE_MODULES,
    ContentDisallowed,
    DecodeError,
    EncodeError,
    ImproperlyConfigured,
    SecurityError,
)
from .text import nearest, safe_repr, truncate
from .times import parse_iso8601

#: Decompressed bodies may not be larger than this, unless the caller says so.
MAX_BYTES = 256 * 1024 * 1024

#: Bytes of an undecodable body that its error shows.
_EXCERPT_BYTES = 64

# -- JSON ----------------------------------------------------------------------------------------

_encoders: Dict[type, Tuple[Optional[str], Callable[[Any], Any]]] = {}
_decoders: Dict[str, Callable[[Any], Any]] = {}

#: A zone nobody else has: marks text that was written without one.
_NAIVE = timezone(timedelta(0), "naive")


def register_type(
    cls: type,
    marker: Optional[str],
    encode: Callable[[Any], Any],
    decode: Optional[Callable[[Any], Any]] = None,
) -> None:
    """Teach JSON the type `cls` and its subclasses.

    `encode` makes a JSON value of an instance, `decode` the way back; on the wire it is
    ``{"__type__": marker, "__value__": ...}``, or the bare value when `marker` is None.  Readers
    without the same registration cannot decode it.
    """
    if marker is not None and not decode:
        raise TypeError(f"register_type({cls.__name__}): marker {marker!r} needs a decode function")
    _encoders[cls] = (marker, encode)
    if marker is not None and decode:
        _decoders[marker] = decode


def _read_datetime(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:  # before Python 3.11 it reads only what isoformat() writes
        moment: datetime = parse_iso8601(text, _NAIVE)
        return moment.replace(tzinfo=None) if moment.tzinfo is _NAIVE else moment


def _read_time(text: str) -> time:
    try:
        return time.fromisoformat(text)
    except ValueError:
        return _read_datetime(f"2000-01-01T{text}").timetz()


def _encode_bytes(value: bytes) -> Dict[str, str]:
    try:
        return {"__type__": "bytes", "__value__": value.decode("utf-8")}
    except UnicodeDecodeError:
        return {"__type__": "base64", "__value__": binascii.b2a_base64(value, newline=False).decode("ascii")}


register_type(datetime, "datetime", datetime.isoformat, _read_datetime)
register_type(date, "date", date.isoformat, lambda text: _read_datetime(text).date())
register_type(time, "time", time.isoformat, _read_time)
register_type(bytes, None, _encode_bytes)
_decoders["bytes"] = lambda text: text.encode("utf-8")
_decoders["base64"] = binascii.a2b_base64


def _register_slow_types() -> None:
    """Register what takes milliseconds to import, when something first asks for an unknown type."""
    from decimal import Decimal  # 4 ms
    from uuid import UUID  # 2 ms

    if Decimal not in _encoders:
        register_type(Decimal, "decimal", str, Decimal)
    if UUID not in _encoders:
        register_type(UUID, "uuid", lambda value: {"hex": value.hex}, lambda value: UUID(**value))


def _encode_other(value: Any) -> Any:
    """Return a JSON value for what the encoder does not know, else raise `TypeError`."""
    reducer = getattr(value, "__json__", None)
    if reducer is not None:
        return reducer()
    for attempt in (1, 2):
        for cls in type(value).__mro__:
            found = _encoders.get(cls)
            if found is not None:
                marker, encode = found
                return encode(value) if marker is None else {"__type__": marker, "__value__": encode(value)}
        if attempt == 1:
            _register_slow_types()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _decode_marked(value: Dict[str, Any]) -> Any:
    if len(value) != 2 or "__type__" not in value or "__value__" not in value:
        return value
    marker = value["__type__"]
    if not isinstance(marker, str):
        raise ValueError(f"__type__ must be text, not {safe_repr(marker, 100)}")
    decode = _decoders.get(marker)
    if decode is None:
        _register_slow_types()
        decode = _decoders.get(marker)
    if decode is None:
        raise ValueError(
            f"unsupported __type__ {truncate(marker, 100)!r}{_hint(marker, _decoders)}"
            " (the sender registered a type this reader does not know)"
        )
    return decode(value["__value__"])


# A structure that contains itself ends in a RecursionError as well, so the encoder need not watch
# out for it: 15 % of the time for a small body.
_write_json = json.JSONEncoder(check_circular=False, default=_encode_other).encode
_read_plain = json.JSONDecoder().raw_decode
_read_marked = json.JSONDecoder(object_hook=_decode_marked).raw_decode


def _json_dumps(value: Any) -> bytes:
    return _write_json(value).encode("ascii")


def _json_loads(body: bytes) -> Any:
    text = body.decode("utf-8").strip(" \t\n\r")
    # The hook costs a Python call for every object, and hardly any message needs it.  The second
    # test is for a writer that escapes the underscore.
    read = _read_marked if b"__type__" in body or b"\\u005" in body else _read_plain
    value, end = read(text)
    if end != len(text):
        raise ValueError(f"extra data after {end} characters")
    return value


# -- serializers ---------------------------------------------------------------------------------


class Serializer(NamedTuple):
    """One way to write objects; see `register`."""

    name: str
    content_type: str
    content_encoding: str
    dumps: Callable[[Any], bytes]
    loads: Callable[[bytes], Any]


def _pickle_dumps(value: Any) -> bytes:
    return pickle.dumps(value, protocol=4)


def _raw_dumps(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise TypeError(f"only bytes and text can be sent as they are, not {type(value).__name__}")


#: What the import of an optional library gives: dumps and loads.
_Codec = Tuple[Callable[[Any], bytes], Callable[[bytes], Any]]


def _yaml() -> _Codec:
    yaml: Any = importlib.import_module("yaml")
    return lambda value: yaml.safe_dump(value, allow_unicode=False).encode("utf-8"), yaml.safe_load


def _msgpack() -> _Codec:
    msgpack: Any = importlib.import_module("msgpack")
    return (
        lambda value: bytes(msgpack.packb(value, use_bin_type=True)),
        lambda body: msgpack.unpackb(body, raw=False, strict_map_key=False),
    )


_by_name: Dict[str, Serializer] = {}
_by_content_type: Dict[str, Serializer] = {}
#: name -> (content type, content encoding, what to install, how to get dumps and loads).
_OPTIONAL = {
    "yaml": ("application/x-yaml", "utf-8", "PyYAML", _yaml),
    "msgpack": ("application/x-msgpack", "binary", "msgpack", _msgpack),
}


def register(
    name: str,
    dumps: Callable[[Any], Any],
    loads: Callable[[bytes], Any],
    content_type: str,
    content_encoding: str = "utf-8",
) -> None:
    """Add a serializer, or replace the one of that name.

    `dumps` may return text, which is then encoded as `content_encoding` says; `loads` gets bytes.
    Whatever they raise becomes an `EncodeError` or `DecodeError`.
    """

    def dumps_bytes(value: Any) -> bytes:
        written = dumps(value)
        return written.encode(content_encoding) if isinstance(written, str) else bytes(written)

    unregister(name)
    _add(Serializer(name, content_type, content_encoding, dumps_bytes, loads))


def unregister(name: str) -> None:
    """Take a serializer out; harmless when there is none of that name."""
    known = _by_name.pop(name, None)
    if known is not None and _by_content_type.get(known.content_type) is known:
        del _by_content_type[known.content_type]


def _add(found: Serializer) -> Serializer:
    _by_name[found.name] = found
    _by_content_type[found.content_type] = found
    return found


_add(Serializer("json", "application/json", "utf-8", _json_dumps, _json_loads))
_add(Serializer("pickle", "application/x-python-serialize", "binary", _pickle_dumps, pickle.loads))
_add(Serializer("raw", "application/data", "binary", _raw_dumps, bytes))
_add(Serializer("text", "text/plain", "utf-8", _raw_dumps, lambda body: body.decode("utf-8")))


def serializer(name: str) -> Serializer:
    """Return the serializer called `name`.

    Raises `ImproperlyConfigured` when nobody knows it or its library is not installed.
    """
    found = _by_name.get(name)
    if found is not None:
        return found
    optional = _OPTIONAL.get(name)
    if optional is None:
        known = {*_by_name, *_OPTIONAL}
        raise ImproperlyConfigured(
            f"unknown serializer {name!r}{_hint(name, known)}; known: {', '.join(sorted(known))}"
        )
    content_type, content_encoding, library, load = optional
    try:
        dumps, loads = load()
    except ImportError as error:
        raise ImproperlyConfigured(
            f"serializer {name!r} needs the library {library}, which is not installed here"
        ) from error
    return _add(Serializer(name, content_type, content_encoding, dumps, loads))


def serializer_for(content_type: str) -> Optional[Serializer]:
    """Return the serializer that reads `content_type`; None when there is none.

    Raises `ImproperlyConfigured` when its library is not installed.
    """
    found = _by_content_type.get(content_type)
    if found is None:
        for name, optional in _OPTIONAL.items():
            if optional[0] == content_type:
                return serializer(name)
    return found


def content_type_of(name: str) -> str:
    """Return the content type of a serializer, whether or not its library is installed."""
    optional = _OPTIONAL.get(name)
    return optional[0] if optional is not None and name not in _by_name else serializer(name).content_type


def prepare_accept(names: Iterable[str]) -> FrozenSet[str]:
    """Return the content types for a setting like ``accept_content``: names or content types.

    A content type may be one that is not registered (yet).  Raises `ImproperlyConfigured` for an
    unknown name.
    """
    if isinstance(names, str):
        raise ImproperlyConfigured(
            f"accepted content must be a list such as ['json'], not the text {names!r}"
        )
    return frozenset(name if "/" in name else content_type_of(name) for name in names)


def dumps(value: Any, name: str) -> Tuple[str, str, bytes]:
    """Return ``(content_type, content_encoding, body)`` of `value` written by the serializer `name`.

    Raises `EncodeError` saying where in `value` the part is that cannot be written.
    """
    found = _by_name.get(name) or serializer(name)
    try:
        body = found.dumps(value)
    except Exception as error:  # safety net: values and serializers are the user's
        raise EncodeError(_explain(value, found, error)) from error
    if name == "raw" and isinstance(value, str):
        return found.content_type, "utf-8", body
    return found.content_type, found.content_encoding, body


def loads(
    body: bytes,
    content_type: str,
    content_encoding: str,
    accept: FrozenSet[str],
    compression: Optional[str] = None,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Return the object that `body` holds.

    `accept` is what `prepare_accept` returned; the comparison is exact.  `compression` is the
    message's header of that name, `max_bytes` bounds what comes out of it.  Raises
    `ContentDisallowed` before a byte is looked at, else `DecodeError`.
    """
    if not isinstance(content_type, str) or content_type not in accept:
        accepted = ", ".join(sorted(accept)) or "nothing"
        raise ContentDisallowed(
            f"refusing content of type {safe_repr(content_type, 100)}:"
            f" only {accepted} is accepted here (accept_content)"
        )
    if compression:
        body = decompress(body, compression, max_bytes)
    try:
        found = _by_content_type.get(content_type) or serializer_for(content_type)
        if found is None:
            raise LookupError(f"no serializer is registered for {content_type}")
        if content_type == "application/data" and content_encoding == "utf-8":
            return body.decode("utf-8")
        return found.loads(body)
    except Exception as error:  # safety net: whatever a decoder makes of foreign bytes
        reason = f"{type(error).__name__}: {error_text(error)}"
        raise DecodeError(
            f"cannot decode {len(body)} bytes as {content_type}: {reason};"
            f" they begin {bytes(body[:_EXCERPT_BYTES])!r}"
        ) from error


def error_text(error: BaseException, max_chars: int = 300) -> str:
    """Return ``str(error)`` in one line of at most `max_chars`; never raises."""
    try:
        text = str(error)
    except (Exception, SystemExit):  # safety net: a user's __str__ may do anything
        return safe_repr(error, max_chars)
    return truncate(" ".join(text[: 4 * max_chars].split()), max_chars)


# -- where an unwritable value sits --------------------------------------------------------------

#: How deep the search for it goes.
_MAX_DEPTH = 100


def _explain(value: Any, by: Serializer, error: BaseException) -> str:
    """Say where in `value` the part is that `by` cannot write.

    Descends into the first part that fails on its own, until all parts of a part are fine: that
    needs to know nothing about what a serializer can write.
    """
    # The body of a task message: its parts have names.
    is_body = isinstance(value, tuple) and len(value) == 3 and isinstance(value[2], dict)
    names = {0: "args", 1: "kwargs", 2: "embed"} if is_body else {}
    path, parents = "", [id(value)]
    while len(parents) < _MAX_DEPTH:
        for step, part in _parts(value):
            try:
                by.dumps(part)
            except Exception as part_error:  # safety net: values and serializers are the user's
                name = None if path else names.get(step)
                path = name or f"{path or 'value'}[{safe_repr(step, 60)}]"
                value, error = part, part_error
                break
        else:
            break
        if id(value) in parents:
            return f"cannot write as {by.name}: {path} contains itself"
        parents.append(id(value))
    text = f"cannot write as {by.name}: {path or 'the value'} ({type(value).__name__}): {error_text(error)}"
    if by.name == "json" and isinstance(error, TypeError) and not isinstance(value, dict):
        text += "; pass a plain value instead, give the class a __json__ method or use register_type()"
    return text


def _parts(value: Any) -> Iterator[Tuple[Any, Any]]:
    if isinstance(value, dict):
        return iter(list(value.items()))
    if isinstance(value, (list, tuple)):
        return iter(list(enumerate(value)))
    return iter(())


def _hint(name: Any, known: Iterable[str]) -> str:
    found = nearest(truncate(str(name), 100), known)
    return f": did you mean {found!r}?" if found else ""


# -- compression ---------------------------------------------------------------------------------


class Compression(NamedTuple):
    """One way to make bodies smaller.

    `load` imports what it needs and returns ``(compress(bytes), decompress(bytes, max_bytes))``;
    `library` names what is missing when that fails.
    """

    content_type: str
    load: Callable[[], Tuple[Callable[[bytes], bytes], Callable[[bytes, int], bytes]]]
    library: str


class _TooLarge(Exception):
    """More came out of the decompressor than was allowed."""


def _bounded(decompressor: Any, body: bytes, max_bytes: int) -> bytes:
    """Run a standard library decompressor over the whole of `body`."""
    found: bytes = decompressor.decompress(body, max_bytes + 1)
    if len(found) > max_bytes:
        raise _TooLarge
    if not decompressor.eof:
        raise EOFError("the data ends too early")
    return found


def _load_zlib() -> Any:
    import zlib  # a Python can be built without it

    # Celery's "gzip" is a zlib stream; wbits 47 also reads the real gzip of other senders.
    return zlib.compress, lambda body, limit: _bounded(zlib.decompressobj(wbits=47), body, limit)


def _load_bz2() -> Any:
    import bz2  # a Python can be built without it

    return bz2.compress, lambda body, limit: _bounded(bz2.BZ2Decompressor(), body, limit)


def _load_lzma() -> Any:
    import lzma  # a Python can be built without it

    # The dictionary is allocated before the first byte comes out: xz -9 needs 65 MiB, so 128 will do.
    return lzma.compress, lambda body, limit: _bounded(lzma.LZMADecompressor(memlimit=128 << 20), body, limit)


def _load_zstd() -> Any:
    try:  # the standard library has it since Python 3.14
        zstd = importlib.import_module("compression.zstd")
    except ImportError:
        zstd = importlib.import_module("backports.zstd")
    return zstd.compress, lambda body, limit: _bounded(zstd.ZstdDecompressor(), body, limit)


def _load_brotli() -> Any:
    brotli = importlib.import_module("brotli")
    if not hasattr(brotli.Decompressor, "can_accept_more_data"):
        raise ImportError("brotli before 1.2 cannot bound what comes out of it")

    def decompress_brotli(body: bytes, limit: int) -> bytes:
        decompressor = brotli.Decompressor()
        found = bytearray(decompressor.process(body, output_buffer_limit=limit + 1))
        while len(found) <= limit and not decompressor.is_finished():
            more = decompressor.process(b"", output_buffer_limit=limit + 1 - len(found))
            if not more:
                raise EOFError("the data ends too early")
            found += more
        if len(found) > limit:
            raise _TooLarge
        return bytes(found)

    return brotli.compress, decompress_brotli


_ZLIB = Compression("application/x-gzip", _load_zlib, "zlib (this Python was built without it)")
_BZIP2 = Compression("application/x-bz2", _load_bz2, "bz2 (this Python was built without it)")
_LZMA = Compression("application/x-lzma", _load_lzma, "lzma (this Python was built without it)")
_ZSTD = Compression("application/zstd", _load_zstd, "backports.zstd (part of Python 3.14)")
_BROTLI = Compression("application/x-brotli", _load_brotli, "brotli, 1.2 or newer")

#: Both names and content types: `compression` headers hold the latter.
_compressions: Dict[str, Compression] = {}


def register_compression(found: Compression, *names: str) -> None:
    """Add a compression under its content type and `names`."""
    for name in (found.content_type, *names):
        _compressions[name] = found


register_compression(_ZLIB, "gzip", "zlib")
register_compression(_BZIP2, "bzip2", "bzip")
register_compression(_LZMA, "lzma", "xz")
register_compression(_ZSTD, "zstd", "zstandard")
register_compression(_BROTLI, "brotli")


def compression(name: str) -> Compression:
    """Return the compression called `name`, ready to be used.

    Raises `ImproperlyConfigured` when nobody knows it or its library is not installed.
    """
    found = _compressions.get(name)
    if found is None:
        known = [known for known in _compressions if "/" not in known]
        raise ImproperlyConfigured(
            f"unknown compression {safe_repr(name, 100)}{_hint(name, _compressions)};"
            f" known: {', '.join(sorted(known))}"
        )
    try:
        found.load()
    except ImportError as error:
        raise ImproperlyConfigured(
            f"compression {name!r} needs the library {found.library}, which is not there: {error}"
        ) from error
    return found


def compress(body: bytes, name: str) -> Tuple[bytes, str]:
    """Return ``(compressed, content type for the compression header)``."""
    found = compression(name)
    return found.load()[0](body), found.content_type


def decompress(body: bytes, name: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Return `body` decompressed; `name` is a `compression` header (or an alias).

    Raises `DecodeError`, also when more than `max_bytes` would come out; no more than that is ever
    held.  Check the content type before: `loads` does both in the right order.
    """
    try:
        return compression(name).load()[1](body, max_bytes)
    except _TooLarge:
        raise DecodeError(
            f"{len(body)} bytes of {name} hold more than the limit of {max_bytes} bytes"
        ) from None
    except Exception as error:  # safety net: every library has its own errors for broken data
        raise DecodeError(
            f"cannot decompress {len(body)} bytes of {safe_repr(name, 100)}: {error_text(error)}"
        ) from error


# -- exceptions on the wire ----------------------------------------------------------------------

#: One argument of an exception may be this long (characters), and there may be so many of them.
MAX_ARGUMENT_CHARS = 64 * 1024
MAX_ARGUMENTS = 64
#: How many classes made for unknown exceptions are kept.
MAX_MADE_CLASSES = 512

_made: Dict[Tuple[str, str], Type[Exception]] = {}
#: The slot itself: a class may have put something else under the name `args`.
_args_of: Callable[[BaseException], Tuple[Any, ...]] = vars(BaseException)["args"].__get__


def exception_to_dict(error: BaseException) -> Dict[str, Any]:
    """Return ``{"exc_type", "exc_message", "exc_module"}`` with JSON values only.

    `exc_message` is a list of the exception's arguments; what JSON cannot hold, or is too long,
    is replaced by text.  Never raises, whatever the exception's own methods do.
    """
    cls = type(error)
    arguments = _args_of(error)[: MAX_ARGUMENTS + 1]
    found = [_bounded_argument(argument) for argument in arguments[:MAX_ARGUMENTS]]
    if len(arguments) > MAX_ARGUMENTS:
        found.append("... (more arguments were cut)")
    if not found:
        # An exception made with keywords only has its text nowhere else.
        text = error_text(error, 1024)
        found = [text] if text else []
    return {"exc_type": cls.__qualname__, "exc_message": found, "exc_module": _module_of(cls)}


def _module_of(cls: type) -> str:
    module = WIRE_MODULES.get(cls) or cls.__module__
    return module if isinstance(module, str) else "builtins"


def _bounded_argument(value: Any) -> Any:
    if type(value) is str and len(value) <= MAX_ARGUMENT_CHARS:
        return value
    try:
        if isinstance(value, str):
            text = str.__str__(value)
            cut = len(text) - MAX_ARGUMENT_CHARS
            return text if cut <= 0 else f"{text[:MAX_ARGUMENT_CHARS]}... ({cut} characters were cut)"
        if not isinstance(value, (bytes, list, tuple, dict)) or len(value) <= MAX_ARGUMENT_CHARS:
            text = _write_json(value)
            if len(text) <= MAX_ARGUMENT_CHARS:
                # Read back: what is stored later can neither change nor fail any more.
                return _read_plain(text)[0]
    except (Exception, SystemExit):  # safety net: the argument is the user's; what follows never raises
        return safe_repr(value, MAX_ARGUMENT_CHARS)
    return safe_repr(value, MAX_ARGUMENT_CHARS)


def exception_from_dict(found: Any) -> BaseException:
    """Return the exception that `exception_to_dict` (or a Celery worker) described.

    Looks for the class among miniq's own, the builtins and modules that are imported already;
    imports nothing.  An unknown class is made: same name, same module, same arguments.  Raises
    `SecurityError` when the name belongs to something that is not an exception.
    """
    if isinstance(found, BaseException):  # written by pickle
        return found
    if not isinstance(found, Mapping):
        return _make_class("builtins", "Exception")(*_arguments(found))
    qualname, module = found.get("exc_type"), found.get("exc_module")
    qualname = qualname if isinstance(qualname, str) and qualname else "Exception"
    module = module if isinstance(module, str) and module else "builtins"
    arguments = _arguments(found.get("exc_message"))
    cls = BY_WIRE_NAME.get((module, qualname)) or _find(module, qualname)
    if cls is None:
        return _make_class(module, qualname)(*arguments)
    if not isinstance(cls, type) or not issubclass(cls, BaseException):
        raise SecurityError(
            f"a stored result names {truncate(module, 100)}.{truncate(qualname, 100)} as its exception,"
            f" which is no exception class; its arguments: {safe_repr(arguments, 200)}"
        )
    return _instance(cls, arguments)


def _arguments(value: Any) -> Tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _find(module: str, qualname: str) -> Any:
    """Return what an imported module holds under a dotted name, None when there is nothing.

    Reads the dicts of modules and classes only: other access may run code, and that may import.
    """
    found: Any = builtins if module == "builtins" else sys.modules.get(module)
    for name in qualname.split("."):
        found = vars(found).get(name) if isinstance(found, (ModuleType, type)) else None
    return found


def _instance(cls: type, arguments: Tuple[Any, ...]) -> BaseException:
    """Make an instance with these arguments, even where the class itself refuses them."""
    try:
        return _checked(cls(*arguments), arguments)
    except (Exception, SystemExit):  # safety net: a user's class may do anything; a look-alike keeps the text
        try:
            return _checked(_stand_in(cls, arguments), arguments)
        except (Exception, SystemExit):  # safety net: it cannot be derived from either
            return _make_class(_module_of(cls), cls.__qualname__)(*arguments)


def _checked(error: BaseException, arguments: Tuple[Any, ...]) -> BaseException:
    """Return `error` with these arguments; raise whatever its `__str__` raises."""
    if _args_of(error) != arguments:
        # A class that makes its text from its arguments would now hold the text twice.
        error.args = arguments
    str(error)
    return error


def _stand_in(cls: type, arguments: Tuple[Any, ...]) -> BaseException:
    """Make an instance of a subclass which looks like `cls` and does not run its `__init__`."""
    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__init__": BaseException.__init__,
        "__str__": BaseException.__str__,
        "__repr__": BaseException.__repr__,
    }
    return BaseException.__new__(type(cls)(cls.__name__, (cls,), body), *arguments)


def _make_class(module: str, qualname: str) -> Type[Exception]:
    """Return a class of that name; the last `MAX_MADE_CLASSES` are the same object every time."""
    if (module, qualname) == ("builtins", "Exception"):
        return Exception
    made = _made.get((module, qualname))
    if made is None:
        name = qualname.rpartition(".")[2]
        body = {
            "__module__": module,
            "__qualname__": qualname,
            "__doc__": "Made for an exception unknown here.",
        }
        made = type(name if name.isidentifier() else "UnknownError", (Exception,), body)
        if len(_made) >= MAX_MADE_CLASSES:
            _made.pop(next(iter(_made)), None)
        _made[module, qualname] = made
    return made

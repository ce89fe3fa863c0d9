# SPDX-License-Identifier: MIT
"""Words for people and names for machines: safe reprs, masked URLs, node and task names, imports.

Everything here takes text or objects and gives text or objects; nothing does I/O but the import
of a module by name.  The safe repr runs twice in every ``delay()`` (arguments and keywords), so
small plain values take a path of a few C calls.

Source: what Celery shows as ``argsrepr`` (1024 characters, 3 levels), its node names and its
format characters in file names.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

from .exceptions import ImproperlyConfigured

# -- reprs ---------------------------------------------------------------------------------------

#: Types whose repr is short, safe and made in C.
_FLAT = frozenset({int, float, bool, type(None)})
#: A longer flat tuple or dict takes the careful path, where the cost is bounded.
_FLAT_MAX_ITEMS = 16

#: The builtin containers by their `__repr__`: a subclass with its own one speaks for itself.
_BRACKETS: Dict[Any, Tuple[str, str]] = {
    tuple.__repr__: ("(", ")"),
    list.__repr__: ("[", "]"),
    dict.__repr__: ("{", "}"),
    set.__repr__: ("{", "}"),
    frozenset.__repr__: ("frozenset({", "})"),
}
_EMPTY: Dict[Any, str] = {set.__repr__: "set()", frozenset.__repr__: "frozenset()"}


def safe_repr(value: object, max_chars: int = 1024, max_levels: int = 3) -> str:
    """Return ``repr(value)`` with at most `max_chars` characters and `max_levels` levels of nesting.

    Cuts show as ``...``, ``[...]`` and ``{...}``.  Never raises, whatever a user's `__repr__` does,
    and takes time in proportion to `max_chars`, not to the value.
    """
    kind = type(value)
    if kind is tuple or kind is dict:
        if not value:
            return "()" if kind is tuple else "{}"
        if max_levels > 0 and _is_flat(value, kind, max_chars):
            try:
                text = repr(value)
            except ValueError:  # an int with more digits than Python 3.11+ will write
                text = ""
            if text and len(text) <= max_chars:
                return text
    return truncate(_bounded_repr(value, max_chars, max_levels, ()), max_chars)


def _is_flat(value: Any, kind: type, max_chars: int) -> bool:
    if len(value) > _FLAT_MAX_ITEMS:
        return False
    if kind is dict:
        for key in value:
            if type(key) is not str or len(key) > max_chars:
                return False
        value = value.values()
    for item in value:
        kind = type(item)
        if kind not in _FLAT and (kind is not str or len(item) > max_chars):
            return False
    return True


def _bounded_repr(value: Any, room: int, levels: int, parents: Tuple[int, ...]) -> str:
    """Return a repr of at most about `room` characters; `parents` are the ids it is inside of."""
    try:
        kind = type(value)
        if kind is str or kind is bytes:
            return _bounded_string_repr(value, room)
        method = kind.__repr__
        brackets = _BRACKETS.get(method)
        if brackets is None:
            text = truncate(repr(value), room)
            # Text that no UTF-8 can hold would break the message's header later.
            return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")
        if not value:
            return _EMPTY.get(method) or "".join(brackets)
        if levels <= 0 or id(value) in parents:
            return "...".join(brackets)
        return _bounded_container_repr(value, brackets, room, levels - 1, (*parents, id(value)))
    except (Exception, SystemExit) as error:  # safety net: user code; its failure becomes the text
        return f"<{type(value).__name__}: repr failed: {type(error).__name__}>"


def _bounded_string_repr(value: Any, room: int) -> str:
    text = repr(value[: max(room, 0)])
    if len(text) <= room and len(value) <= room:
        return text
    return f"{text[: max(room - 4, 2)].rstrip(text[-1])}...{text[-1]}"


def _bounded_container_repr(
    value: Any, brackets: Tuple[str, str], room: int, levels: int, parents: Tuple[int, ...]
) -> str:
    opening, closing = brackets
    room -= len(opening) + len(closing)
    parts: List[str] = []
    is_dict = isinstance(value, dict)
    for item in value.items() if is_dict else value:
        if room <= 5:  # what ", ..." needs: kept free until here
            parts.append("...")
            break
        if is_dict:
            key = _bounded_repr(item[0], room, levels, parents)
            text = f"{key}: {_bounded_repr(item[1], room - len(key) - 7, levels, parents)}"
        else:
            text = _bounded_repr(item, room - 5, levels, parents)
        parts.append(text)
        room -= len(text) + 2
    else:
        if opening == "(" and len(parts) == 1:
            closing = ",)"
    return opening + ", ".join(parts) + closing


def truncate(text: str, max_chars: int) -> str:
    """Return `text`, cut to `max_chars` with ``...`` at its end where it is longer."""
    if len(text) <= max_chars:
        return text
    return text[: max(max_chars - 3, 0)] + "..."


def nearest(name: str, candidates: Iterable[str], only_typos: bool = False) -> Optional[str]:
    """Return the candidate most like `name`, None when none is near.

    One that is a typo away comes first; with `only_typos` no other counts, which is quick.
    """
    candidates = list(candidates)
    if len(name) > 2:
        for candidate in candidates:
            if is_typo(name, candidate):
                return candidate
    if only_typos:
        return None
    import difflib  # only needed on the way to an error message

    found = difflib.get_close_matches(name, candidates, n=1)
    return found[0] if found else None


def is_typo(a: str, b: str) -> bool:
    """Say whether `a` is `b` but for one letter that is missing, extra or wrong, or two swapped."""
    if abs(len(a) - len(b)) > 1:
        return False
    same = 0
    while same < len(a) and same < len(b) and a[same] == b[same]:
        same += 1
    a, b = a[same:], b[same:]
    return (
        a[1:] == b[1:] or a[1:] == b or a == b[1:] or (len(b) > 1 and a[:2] == b[1] + b[0] and a[2:] == b[2:])
    )


# -- URLs ----------------------------------------------------------------------------------------

_URL_LIST = re.compile(r"(?<=[;,\s])(?=[A-Za-z][A-Za-z0-9+.\-]*://)")
_HOST_ONLY = re.compile(r"(?:\[[^\]]*\]|[^:@/?#]*)(?::\d*)?(?:/[^@?]*)?(?:\?|$)")
_SECRET_PARAMETER = re.compile(
    r"([?&;][^=&;]*(?:pass|pwd|secret|token|credential)[^=&;]*=)[^&]*", re.IGNORECASE
)
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://\S+")


def mask_url(url: str) -> str:
    """Return `url` with every password as ``**``: before the ``@``, in the query, in each of a list.

    Where a password with unquoted ``@``, ``/`` or ``?`` makes the URL ambiguous, more is masked
    rather than less: broken URLs are the ones that get printed.
    """
    if "@" not in url and "=" not in url:
        return url
    return "".join(_mask_one(part) for part in _URL_LIST.split(url))


def mask_urls(text: str) -> str:
    """Return `text` with the passwords of all URLs in it masked."""
    if "://" not in text:
        return text
    return _URL_IN_TEXT.sub(lambda match: mask_url(match.group()), text)


def _mask_one(url: str) -> str:
    head, separator, rest = url.partition("://")
    if not separator:
        head, rest = "", url
    if not _HOST_ONLY.match(rest):
        userinfo, at, rest_of_url = rest.rpartition("@")
        user, colon, _ = userinfo.partition(":")
        if colon:
            rest = f"{user}:**{at}{rest_of_url}"
    return head + separator + _SECRET_PARAMETER.sub(r"\1**", rest)


def unknown_scheme(scheme: str, known: Iterable[str]) -> str:
    """Return the sentence which says that a URL's scheme is unknown and which ones are known."""
    names = sorted(known)
    what = f"unknown scheme {truncate(scheme, 64)!r}" if scheme else "no scheme"
    hint = nearest(scheme, names) if scheme else None
    suggestion = f" (did you mean {hint}://?)" if hint else ""
    return f"{what}{suggestion}; known: {', '.join(f'{name}://' for name in names)}"


# -- importing by name ---------------------------------------------------------------------------


def import_module(name: str, package: Optional[str] = None) -> ModuleType:
    """Import a module by name; `package` is what a leading dot is relative to.

    Raises `ModuleNotFoundError` whose `name` says what is missing when the module itself (or a
    package it is in) does not exist.  What goes wrong *inside* the module, a missing import
    included, passes unchanged with the user's own traceback: `is_missing` tells the two apart.
    """
    if not name or (name.startswith(".") and not package):
        raise ImportError(
            f"cannot import {name!r}: {'relative to which package?' if name else 'no name given'}"
        )
    return importlib.import_module(name, package)


def is_missing(error: BaseException) -> bool:
    """Say whether an error of `import_module` means that the named module itself does not exist."""
    if not isinstance(error, ModuleNotFoundError):
        return False
    entry = error.__traceback__
    while entry is not None and entry.tb_frame.f_code is not import_module.__code__:
        entry = entry.tb_next
    if entry is None:
        return False
    # Below that, only the import system's own frames: once a module began to run, it has one too.
    while entry.tb_next is not None:
        entry = entry.tb_next
        if entry.tb_frame.f_globals.get("__name__", "").partition(".")[0] != "importlib":
            return False
    return True


def import_object(path: str, package: Optional[str] = None) -> Any:
    """Return what `path` names: ``"pkg.mod:attr"``, ``".mod:Attr"``, ``"pkg.mod.attr"`` or ``"pkg.mod"``.

    `package` is what a leading dot is relative to.  Without a colon a module wins over an attribute
    of the same name.  Raises `ImportError` when the module does not exist and `AttributeError` when
    it lacks the attribute; an error inside the module passes unchanged.
    """
    module_name, colon, attribute = path.partition(":")
    attempts = [(module_name, attribute)]
    parent, _, last = module_name.rpartition(".")
    if not colon and parent.strip("."):
        attempts.append((parent, last))
    missing: Optional[str] = None
    for module_name, attribute in attempts:
        try:
            module = import_module(module_name, package)
        except ModuleNotFoundError as error:
            if not is_missing(error):
                raise
            missing = error.name
        else:
            return _attribute(module, attribute, path) if colon or attribute else module
    raise ImportError(f"cannot import {path!r}: there is no module {missing!r}", name=missing)


def _attribute(module: ModuleType, attribute: str, path: str) -> Any:
    found: Any = module
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            hint = nearest(name, [other for other in dir(found) if not other.startswith("__")])
            raise AttributeError(
                f"cannot import {path!r}: {module.__name__} has no {attribute!r}"
                + (f" (did you mean {hint!r}?)" if hint else "")
            ) from None
    return found


# -- names ---------------------------------------------------------------------------------------


def gen_task_name(app_main: Optional[str], name: str, module: Optional[str]) -> str:
    """Return the automatic name of a task: ``module.function``, with the app's name for ``__main__``."""
    if module in ("__main__", "__mp_main__"):  # the second is the first, in a spawned child
        module = app_main or "__main__"
    return f"{module}.{name}" if module else name


def host_name() -> str:
    """Return this machine's name, as in node names."""
    import socket  # a program that only sends tasks over a file needs no sockets

    return socket.gethostname()


def default_node_name() -> str:
    """Return the node name of a worker that was given none: ``celery@<host>``."""
    return f"celery@{host_name()}"


def node_name(fmt: str, hostname: Optional[str] = None) -> str:
    """Return the node name for a worker's ``-n`` value, as Celery reads it.

    ``%h`` is the host's full name, ``%n`` its first part, ``%d`` its domain; a value without ``@``
    is the host part.  Raises `ImproperlyConfigured` for any other ``%``.
    """
    host = hostname or host_name()
    short, _, domain = host.partition(".")
    text = _expand(fmt, {"h": host, "n": short, "d": domain}, "node name")
    name, at, where = text.rpartition("@")
    return f"{name if at and name else 'celery'}@{where or host}"


def split_node_name(node: str) -> Tuple[str, str]:
    """Return ``(name, host)`` of a node name."""
    name, _, host = node.rpartition("@")
    return name, host


def expand_file_name(path: str, node: str, index: Optional[int] = None) -> str:
    """Return a log or pid file's name with its format characters replaced.

    ``%p`` is the node name, ``%n`` its part before the ``@``, ``%h`` the host, ``%d`` the host's
    domain; ``%i`` is the number of the child (1 for the first, 0 in the worker itself), ``%I`` the
    same with a dash before it and nothing in the worker itself.
    """
    name, host = split_node_name(node)
    values = {
        "p": node,
        "n": name,
        "h": host,
        "d": host.partition(".")[2],
        "i": str(index or 0),
        "I": f"-{index}" if index else "",
    }
    return _expand(path, values, "file name")


def _expand(text: str, values: Mapping[str, str], what: str) -> str:
    if "%" not in text:
        return text

    def replace(match: re.Match[str]) -> str:
        letter = match.group(1)
        if letter == "%":
            return "%"
        if letter not in values:
            known = ", ".join(f"%{known}" for known in values)
            raise ImproperlyConfigured(
                f"{what} {truncate(text, 200)!r}: unknown {match.group()!r}; known: {known}, %%"
            )
        return values[letter]

    return re.sub(r"%(.?)", replace, text, flags=re.DOTALL)

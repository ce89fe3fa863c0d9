# SPDX-License-Identifier: MIT
"""Reading what URLs and transport options say: the rules that all brokers share.

A broker's options are a NamedTuple; how to read each of its fields is a table of `Kind`s.  What is
wrong is told with the name of the option, its value (never a secret's) and what is possible.
"""

from __future__ import annotations

import logging
import re
from typing import AbstractSet, Any, Callable, Dict, List, Mapping, NamedTuple, Tuple
from urllib.parse import parse_qsl, unquote

from ..exceptions import ImproperlyConfigured
from ..text import nearest, safe_repr
from .stream import TLS

logger = logging.getLogger(__name__)

_URL_LIST = re.compile(r"[;,\s]+(?=[A-Za-z][A-Za-z0-9+.\-]*://)")


# -- URLs ----------------------------------------------------------------------------------------


def split_urls(urls: str) -> List[str]:
    """Return the URLs in a list with ``;`` between them."""
    return [one.strip() for one in _URL_LIST.split(urls.strip().rstrip(";,")) if one.strip()]


def query_of(url: str) -> List[Tuple[str, str]]:
    """Return the parameters of a URL's query."""
    return parse_qsl(url.partition("?")[2], keep_blank_values=True)


def host_and_port(text: str, default_port: int) -> Tuple[str, int]:
    """Return what ``host``, ``host:port``, ``[::1]:port`` or nothing names; ValueError: no such port."""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.lstrip(":")
    else:
        host, _, port = text.partition(":")
    if port and not (port.isdigit() and 0 < int(port) < 65536):
        raise ValueError("the port is no number from 1 to 65535")
    return unquote(host) or "localhost", int(port or default_port)


# -- values --------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """How to read a value (ValueError, TypeError where it cannot be), and what to say of it."""

    read: Callable[[Any], Any]
    what: str


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not 0 < float(value) < 1e9:
        raise ValueError
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value) or not 0 < int(value) < 1e6:
        raise ValueError
    return int(value)


def flag(value: Any) -> bool:
    """Read true or false, as a value or a word."""
    if isinstance(value, str):
        return {"true": True, "yes": True, "on": True, "1": True,
                "false": False, "no": False, "off": False, "0": False, "": False}[value.lower()]  # fmt: skip
    if value in (0, 1):
        return bool(value)
    raise ValueError


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _cert_reqs(value: Any) -> str:
    if isinstance(value, int):  # ssl.CERT_REQUIRED and the others are numbers
        return ("none", "optional", "required")[range(3).index(value)]
    name = str(value).lower().replace("cert_", "")
    if name not in ("none", "optional", "required"):
        raise ValueError
    return name


def _socket_options(value: Any) -> Tuple[Tuple[int, int], ...]:
    return tuple(sorted((int(number), int(setting)) for number, setting in dict(value).items()))


SECONDS = Kind(_seconds, "a number of seconds above 0")
COUNT = Kind(_count, "a number from 1")
FLAG = Kind(flag, "true or false")
TEXT = Kind(_text, "text")
CERT_REQS = Kind(_cert_reqs, "required, optional or none")
SOCKET_OPTIONS = Kind(_socket_options, "a dict of numbers of TCP options")
#: By the type of the default; those without one are text.
_OF_TYPE: Dict[type, Kind] = {bool: FLAG, float: SECONDS, str: TEXT, type(None): TEXT}


def kinds_of(defaults: Mapping[str, Any], **special: Kind) -> Dict[str, Kind]:
    """Return how to read each field: as its default's type tells, but for `special` ones."""
    return {**{name: _OF_TYPE.get(type(default), TEXT) for name, default in defaults.items()}, **special}


def checked(
    given: Mapping[str, Any],
    known: Mapping[str, Kind],
    where: str,
    no_meaning: AbstractSet[str],
    secret: AbstractSet[str],
) -> Dict[str, Any]:
    """Read all that is `given`; `ImproperlyConfigured` begins with `where` and names what is wrong."""
    found: Dict[str, Any] = {}
    for name, value in given.items():
        if name in no_meaning:
            logger.debug("%s %s has no meaning here and is ignored", where, name)
            continue
        kind = known.get(name)
        if kind is None:
            hint = nearest(name, known)
            raise ImproperlyConfigured(
                f"{where} {safe_repr(name, 60)} is unknown{f' (did you mean {hint}?)' if hint else ''};"
                f" known: {', '.join(known)}"
            )
        try:
            found[name] = kind.read(value)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            shown = "**" if name in secret else safe_repr(value, 100)
            raise ImproperlyConfigured(f"{where} {name} must be {kind.what}, not {shown}") from error
    return found


def tls_of(options: Any) -> TLS:
    """Return how to speak TLS, from the fields that begin with ``ssl_``."""
    return TLS(
        options.ssl_cert_reqs, options.ssl_ca_certs, options.ssl_ca_path, options.ssl_ca_data,
        options.ssl_certfile, options.ssl_keyfile, options.ssl_password, options.ssl_check_hostname,
        options.ssl_ciphers,
    )  # fmt: skip


def shown(options: Any, secret: AbstractSet[str]) -> str:
    """Return the repr of options: what differs from the defaults, secrets masked."""
    said = (
        f"{name}={'**' if name in secret else repr(value)}"
        for name, value in options._asdict().items()
        if value != options._field_defaults[name]
    )
    return f"Options({', '.join(said)})"

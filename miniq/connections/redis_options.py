# SPDX-License-Identifier: MIT
"""Where a Redis server is and how to talk to it: URLs and transport options, read and checked once.

The forms of URLs that kombu, Celery and redis-py take::

    redis://[user:password@]host[:port][/db]        rediss:// with TLS; valkey://, valkeys:// are the same
    redis+socket:///path?virtual_host=db            unix:///path?db=n
    sentinel://[user:password@]host:port,host:port/db?master_name=name
    sentinel://host:port;sentinel://host:port/db    the same, as Celery writes it

Several URLs with ``;`` between them are tried in turn.  A password is percent-encoded.  Whatever may
stand in ``broker_transport_options`` may also stand in a URL's query; the query wins.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple
from urllib.parse import parse_qsl, unquote, urlsplit

from ..exceptions import ImproperlyConfigured
from ..text import mask_url, nearest, safe_repr, unknown_scheme
from .stream import TLS, Address

logger = logging.getLogger(__name__)

DEFAULT_PORT = 6379
DEFAULT_SENTINEL_PORT = 26379

#: URL scheme -> (what it is, with TLS).
_SCHEMES: Dict[str, Tuple[str, bool]] = {
    "redis": ("tcp", False),
    "rediss": ("tcp", True),
    "valkey": ("tcp", False),
    "valkeys": ("tcp", True),
    "redis+socket": ("unix", False),
    "valkey+socket": ("unix", False),
    "unix": ("unix", False),
    "sentinel": ("sentinel", False),
}
#: Parameters of a URL's query that belong to this URL and are no options.
_OF_ONE_URL = frozenset({"db", "virtual_host", "username", "password"})
#: Options of kombu, Celery and redis-py that have no meaning here.
_NO_MEANING = frozenset(
    "ack_emulation body_encoding confirm_publish decode_responses encoding encoding_errors errback"
    " interval_max interval_start interval_step lib_name lib_version max_retries min_other_sentinels"
    " polling_interval protocol retry retry_on_error retry_on_timeout retry_policy role socket_read_size"
    " socket_type ssl_min_version ssl_validate_ocsp ssl_validate_ocsp_stapled unacked_mutex_expire"
    " unacked_restore_limit visibility_timeout_policy".split()
)
_SECRET = frozenset({"password", "ssl_password", "sentinel_kwargs"})
_URL_LIST = re.compile(r"[;,\s]+(?=[A-Za-z][A-Za-z0-9+.\-]*://)")


class Options(NamedTuple):
    """What ``broker_transport_options`` and ``result_backend_transport_options`` may hold here.

    Times are in seconds; those of sockets are 5 and 4, not endless as Celery's.  `ssl` turns TLS on
    without a scheme that says so.  `sentinel_kwargs` is how to talk to the sentinels themselves:
    pairs of `username`, `password`, `ssl` and the ``ssl_`` options.  Celery's `visibility_timeout`
    is how long its workers keep a message; ours keep it for `lease` and renew that while they live.
    """

    socket_timeout: float = 5.0
    socket_connect_timeout: float = 4.0
    socket_keepalive: bool = True
    socket_keepalive_options: Tuple[Tuple[int, int], ...] = ()
    max_connections: int = 10
    health_check_interval: float = 25.0
    client_name: str = ""
    username: Optional[str] = None
    password: Optional[str] = None
    master_name: Optional[str] = None
    sentinel_kwargs: Tuple[Tuple[str, Any], ...] = ()
    ssl: bool = False
    ssl_cert_reqs: str = "required"
    ssl_check_hostname: bool = True
    ssl_ca_certs: Optional[str] = None
    ssl_ca_path: Optional[str] = None
    ssl_ca_data: Optional[str] = None
    ssl_certfile: Optional[str] = None
    ssl_keyfile: Optional[str] = None
    ssl_password: Optional[str] = None
    ssl_ciphers: Optional[str] = None
    global_keyprefix: str = ""
    priority_steps: Tuple[int, ...] = (0, 3, 6, 9)
    sep: str = "\x06\x16"
    visibility_timeout: Optional[float] = None
    lease: float = 30.0
    unacked_key: str = "unacked"
    unacked_index_key: str = "unacked_index"
    unacked_mutex_key: str = "unacked_mutex"
    fanout_prefix: Any = True  #: True, False, or the prefix itself with ``{db}`` in it
    fanout_patterns: bool = True
    queue_order_strategy: str = "round_robin"
    result_chord_ordered: bool = True

    @classmethod
    def read(cls, options: Mapping[str, Any], url: str = "") -> "Options":
        """Check names and values of `options` and of the query of `url`; None means the default.

        `ImproperlyConfigured` says which one is wrong and what is possible.
        """
        given: Dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        for one in split_urls(url):
            query = dict(_query(one))
            given.update({name: value for name, value in query.items() if name not in _OF_ONE_URL})
        return cls(**_checked(given, _KINDS, f"{mask_url(url)!r}: transport option"))

    def tls(self) -> TLS:
        """Return how to speak TLS with the server."""
        return TLS(
            self.ssl_cert_reqs, self.ssl_ca_certs, self.ssl_ca_path, self.ssl_ca_data, self.ssl_certfile,
            self.ssl_keyfile, self.ssl_password, self.ssl_check_hostname, self.ssl_ciphers,
        )  # fmt: skip

    def for_sentinels(self) -> "Options":
        """Return the options for conversations with the sentinels."""
        plain = {"username": None, "password": None, "ssl": False, "sentinel_kwargs": (), "client_name": ""}
        return self._replace(**{**plain, **dict(self.sentinel_kwargs)})

    def __repr__(self) -> str:
        said = (
            f"{name}={'**' if name in _SECRET else repr(value)}"
            for name, value in zip(self._fields, self)
            if value != self._field_defaults[name]
        )
        return f"Options({', '.join(said)})"


class Endpoint(NamedTuple):
    """A database at one server, or at whichever server the sentinels call the master.

    `url` is masked, for messages.  With `sentinels`, `address` is not used.
    """

    url: str
    address: Address
    sentinels: Tuple[Tuple[str, int], ...]
    master_name: str
    db: int
    username: Optional[str]
    password: Optional[str]
    tls: bool

    @property
    def key(self) -> Tuple[Any, ...]:
        """What makes two endpoints the same database."""
        if self.sentinels:
            return ("sentinel", tuple(sorted(self.sentinels)), self.master_name, self.db)
        return ("unix" if isinstance(self.address, str) else "tcp", self.address, self.db)


def split_urls(urls: str) -> List[str]:
    """Return the URLs in a list with ``;`` between them."""
    return [one.strip() for one in _URL_LIST.split(urls.strip().rstrip(";,")) if one.strip()]


def endpoints(urls: str, options: Options) -> Tuple[Endpoint, ...]:
    """Return the servers that `urls` names, in order; `ImproperlyConfigured` says what is wrong."""
    found: List[Endpoint] = []
    for url in split_urls(urls):
        try:
            endpoint = _endpoint(url, options)
        except ValueError as error:
            raise ImproperlyConfigured(
                f"Redis URL {mask_url(url)!r}: {error}"
                " (special characters in a password must be percent-encoded: '/' is %2F, '#' is %23)"
            ) from error
        if found and endpoint.sentinels and found[-1].sentinels:
            # Celery's form: one sentinel each URL, what belongs to the master in any of them.
            first = found[-1]
            found[-1] = first._replace(
                url=f"{first.url};{endpoint.url}",
                sentinels=first.sentinels + endpoint.sentinels,
                db=first.db or endpoint.db,
                username=first.username or endpoint.username,
                password=first.password or endpoint.password,
            )
        else:
            found.append(endpoint)
    if not found:
        raise ImproperlyConfigured(f"no Redis URL in {mask_url(urls)!r}: write redis://host:6379/0")
    return tuple(found)


def _endpoint(url: str, options: Options) -> Endpoint:
    """Return what one URL names; ValueError says what is wrong with it."""
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    if scheme not in _SCHEMES:
        raise ValueError(unknown_scheme(scheme, _SCHEMES))
    kind, tls = _SCHEMES[scheme]
    parts = urlsplit(url)
    if parts.fragment:
        raise ValueError("'#' is not allowed")
    query = dict(_query(url))
    login, _, hosts = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    path = unquote(parts.path)
    address: Address = ""
    sentinels: Tuple[Tuple[str, int], ...] = ()
    db = query.get("db") or query.get("virtual_host") or ("" if kind == "unix" else path.strip("/"))
    if kind == "unix":
        address = unquote(hosts) + path
        if address in ("", "/"):
            raise ValueError("the path of the socket is missing: write redis+socket:///run/redis.sock")
    elif kind == "tcp":
        if "," in hosts:
            raise ValueError(f"several hosts in one URL: write {scheme}://one;{scheme}://other")
        address = _host_and_port(hosts, DEFAULT_PORT)
    else:
        sentinels = tuple(_host_and_port(one, DEFAULT_SENTINEL_PORT) for one in hosts.split(","))
        if not options.master_name:
            raise ValueError(
                "which master? name it with ?master_name=... or the transport option master_name,"
                " as the line 'sentinel monitor NAME ...' of the sentinels' configuration does"
            )
    return Endpoint(
        mask_url(url),
        address,
        sentinels,
        options.master_name or "",
        _database(db),
        query.get("username") or unquote(username) or options.username or None,
        query.get("password") or unquote(password) or options.password or None,
        kind != "unix" and (tls or options.ssl),
    )


def _query(url: str) -> List[Tuple[str, str]]:
    return parse_qsl(url.partition("?")[2], keep_blank_values=True)


def _host_and_port(text: str, default_port: int) -> Tuple[str, int]:
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.lstrip(":")
    else:
        host, _, port = text.partition(":")
    if port and not (port.isdigit() and 0 < int(port) < 65536):
        raise ValueError("the port is no number from 1 to 65535")
    return unquote(host) or "localhost", int(port or default_port)


def _database(text: str) -> int:
    text = text.strip("/")
    if text and not text.isdigit():
        raise ValueError(f"the database is a number, not {safe_repr(text, 40)}")
    return int(text or 0)


# -- checking options ----------------------------------------------------------------------------


class _Kind(NamedTuple):
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


def _flag(value: Any) -> bool:
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


def _steps(value: Any) -> Tuple[int, ...]:
    if isinstance(value, str):
        value = value.split(",")
    steps = tuple(sorted({int(step) for step in value}))
    if not steps or steps[0] < 0 or len(steps) > 256:
        raise ValueError
    return steps


def _fanout_prefix(value: Any) -> Any:
    try:
        return _flag(value)
    except KeyError:
        return str(value)


def _socket_options(value: Any) -> Tuple[Tuple[int, int], ...]:
    return tuple(sorted((int(number), int(setting)) for number, setting in dict(value).items()))


def _sentinel_options(value: Any) -> Tuple[Tuple[str, Any], ...]:
    given = {name: one for name, one in dict(value).items() if one is not None}
    names = [name for name in _KINDS if name in ("username", "password") or name.startswith("ssl")]
    known = {name: _KINDS[name] for name in names}
    # Times are those of all; whatever else redis-py would take has no meaning for one question.
    known.update(socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS)
    return tuple(sorted(_checked(given, known, "sentinel_kwargs:").items()))


_SECONDS = _Kind(_seconds, "a number of seconds above 0")
_FLAG = _Kind(_flag, "true or false")
_TEXT = _Kind(_text, "text")
#: By the type of the default; those without one are text.
_OF_TYPE: Dict[type, _Kind] = {bool: _FLAG, float: _SECONDS, str: _TEXT, type(None): _TEXT}
_KINDS: Dict[str, _Kind] = {
    **{name: _OF_TYPE.get(type(default), _TEXT) for name, default in Options._field_defaults.items()},
    "visibility_timeout": _SECONDS,
    "max_connections": _Kind(_count, "a number from 1"),
    "ssl_cert_reqs": _Kind(_cert_reqs, "required, optional or none"),
    "priority_steps": _Kind(_steps, "a list of numbers from 0"),
    "fanout_prefix": _Kind(_fanout_prefix, "true, false or text"),
    "socket_keepalive_options": _Kind(_socket_options, "a dict of numbers of TCP options"),
    "sentinel_kwargs": _Kind(_sentinel_options, "a dict"),
}


def _checked(given: Mapping[str, Any], known: Mapping[str, _Kind], where: str) -> Dict[str, Any]:
    checked: Dict[str, Any] = {}
    for name, value in given.items():
        if name in _NO_MEANING:
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
            checked[name] = kind.read(value)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            shown = "**" if name in _SECRET else safe_repr(value, 100)
            raise ImproperlyConfigured(f"{where} {name} must be {kind.what}, not {shown}") from error
    return checked

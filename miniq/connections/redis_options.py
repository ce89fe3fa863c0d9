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

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple
from urllib.parse import unquote, urlsplit

from ..exceptions import ImproperlyConfigured
from ..text import mask_url, safe_repr, unknown_scheme
from . import options as reading
from .options import CERT_REQS, COUNT, SECONDS, SOCKET_OPTIONS, Kind, host_and_port, query_of, split_urls
from .stream import TLS, Address

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
            query = dict(query_of(one))
            given.update({name: value for name, value in query.items() if name not in _OF_ONE_URL})
        return cls(**_checked(given, _KINDS, f"{mask_url(url)!r}: transport option"))

    @property
    def connect_timeout(self) -> float:
        """Seconds to connect to one server, what all options of servers call so."""
        return self.socket_connect_timeout

    def tls(self) -> TLS:
        """Return how to speak TLS with the server."""
        return reading.tls_of(self)

    def for_sentinels(self) -> "Options":
        """Return the options for conversations with the sentinels."""
        plain = {"username": None, "password": None, "ssl": False, "sentinel_kwargs": (), "client_name": ""}
        return self._replace(**{**plain, **dict(self.sentinel_kwargs)})

    def __repr__(self) -> str:
        return reading.shown(self, _SECRET)


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
    query = dict(query_of(url))
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
        address = host_and_port(hosts, DEFAULT_PORT)
    else:
        sentinels = tuple(host_and_port(one, DEFAULT_SENTINEL_PORT) for one in hosts.split(","))
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


def _database(text: str) -> int:
    text = text.strip("/")
    if text and not text.isdigit():
        raise ValueError(f"the database is a number, not {safe_repr(text, 40)}")
    return int(text or 0)


# -- checking options ----------------------------------------------------------------------------


def _steps(value: Any) -> Tuple[int, ...]:
    if isinstance(value, str):
        value = value.split(",")
    steps = tuple(sorted({int(step) for step in value}))
    if not steps or steps[0] < 0 or len(steps) > 256:
        raise ValueError
    return steps


def _fanout_prefix(value: Any) -> Any:
    try:
        return reading.flag(value)
    except KeyError:
        return str(value)


def _sentinel_options(value: Any) -> Tuple[Tuple[str, Any], ...]:
    given = {name: one for name, one in dict(value).items() if one is not None}
    names = [name for name in _KINDS if name in ("username", "password") or name.startswith("ssl")]
    known = {name: _KINDS[name] for name in names}
    # Times are those of all; whatever else redis-py would take has no meaning for one question.
    known.update(socket_timeout=SECONDS, socket_connect_timeout=SECONDS)
    return tuple(sorted(_checked(given, known, "sentinel_kwargs:").items()))


_KINDS = reading.kinds_of(
    Options._field_defaults,
    visibility_timeout=SECONDS,
    max_connections=COUNT,
    ssl_cert_reqs=CERT_REQS,
    priority_steps=Kind(_steps, "a list of numbers from 0"),
    fanout_prefix=Kind(_fanout_prefix, "true, false or text"),
    socket_keepalive_options=SOCKET_OPTIONS,
    sentinel_kwargs=Kind(_sentinel_options, "a dict"),
)


def _checked(given: Mapping[str, Any], known: Mapping[str, Kind], where: str) -> Dict[str, Any]:
    return reading.checked(given, known, where, _NO_MEANING, _SECRET)

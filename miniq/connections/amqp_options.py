# SPDX-License-Identifier: MIT
"""Where a RabbitMQ server is and how to talk to it: URLs and transport options, read and checked once.

The forms of URLs that kombu and Celery take::

    amqp://[user:password@]host[:port][/vhost]      amqps:// with TLS
    pyamqp://...                                    the same, as kombu names its client

No path, ``/`` and ``//`` all mean the virtual host ``/``; a single slash before a name does not belong
to it.  User, password and virtual host are percent-encoded.  Several URLs with ``;`` between them are
tried in turn.  Whatever may stand in ``broker_transport_options`` may also stand in a URL's query; the
query wins.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple
from urllib.parse import unquote, urlsplit

from ..exceptions import ImproperlyConfigured
from ..text import mask_url, unknown_scheme
from . import options as reading
from .options import CERT_REQS, COUNT, SOCKET_OPTIONS, Kind, host_and_port, query_of, split_urls
from .stream import TLS

DEFAULT_PORT = 5672
DEFAULT_TLS_PORT = 5671

#: URL scheme -> with TLS.
_SCHEMES = {"amqp": False, "pyamqp": False, "amqps": True, "pyamqps": True}
#: Parameters of a URL's query that belong to this URL and are no options.
_OF_ONE_URL = frozenset({"virtual_host", "username", "password"})
#: Other names of options, of kombu, py-amqp and the broker-independent settings.
_ALIASES = {
    "read_timeout": "socket_timeout",
    "socket_connect_timeout": "connect_timeout",
    "connection_timeout": "connect_timeout",
    "socket_keepalive_options": "socket_settings",
    "auth_mechanism": "login_method",
}
#: Options of kombu, py-amqp and other brokers that have no meaning here.
_NO_MEANING = frozenset(
    "authentication channel_max confirm_timeout connection_attempts errback fanout_patterns fanout_prefix"
    " frame_max global_keyprefix interval_max interval_start interval_step locale login_response max_retries"
    " on_blocked on_open on_unblocked polling_interval priority_steps queue_order_strategy retry_policy sep"
    " unacked_index_key unacked_key visibility_timeout write_timeout".split()
)
_SECRET = frozenset({"password", "ssl_password"})
LOGIN_METHODS = ("PLAIN", "AMQPLAIN", "EXTERNAL")


class Options(NamedTuple):
    """What ``broker_transport_options`` may hold here.

    Times are in seconds: `connect_timeout` is for one server with its handshake, `socket_timeout` (also
    called `read_timeout`) for every answer.  `heartbeat` is the interval asked for where heartbeats are
    used; None takes the server's, 0 means none.  `login_method` None is PLAIN; EXTERNAL takes who we are
    from our certificate.  `client_name` and `client_properties` are for the server's list of connections.
    `hold` is for the worker: a message due sooner than this waits there, others in queues at the server,
    which are of the type `delayed_queue_type` where they have Celery's layout.
    """

    connect_timeout: float = 4.0
    socket_timeout: float = 5.0
    socket_keepalive: bool = True
    socket_settings: Tuple[Tuple[int, int], ...] = ()
    confirm_publish: bool = True
    max_connections: int = 10
    health_check_interval: float = 25.0
    heartbeat: Optional[int] = None
    login_method: Optional[str] = None
    username: Optional[str] = None
    password: Optional[str] = None
    client_name: str = ""
    client_properties: Tuple[Tuple[str, Any], ...] = ()
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
    hold: float = 2.0
    delayed_queue_type: str = "quorum"

    @classmethod
    def read(cls, options: Mapping[str, Any], url: str = "") -> "Options":
        """Check names and values of `options` and of the query of `url`; None means the default.

        `ImproperlyConfigured` says which one is wrong and what is possible.
        """
        given = {_ALIASES.get(name, name): value for name, value in options.items() if value is not None}
        for one in split_urls(url):
            query = dict(query_of(one))
            given.update({_ALIASES.get(n, n): value for n, value in query.items() if n not in _OF_ONE_URL})
        where = f"{mask_url(url)!r}: transport option"
        return cls(**reading.checked(given, _KINDS, where, _NO_MEANING, _SECRET))

    def tls(self) -> TLS:
        """Return how to speak TLS with the server."""
        return reading.tls_of(self)

    def __repr__(self) -> str:
        return reading.shown(self, _SECRET)


class Endpoint(NamedTuple):
    """A virtual host at one server; `url` is masked, for messages."""

    url: str
    address: Tuple[str, int]
    virtual_host: str
    username: str
    password: str
    tls: bool

    @property
    def key(self) -> Tuple[Any, ...]:
        """What makes two endpoints the same virtual host."""
        return ("tcp", self.address, self.virtual_host)


def endpoints(urls: str, options: Options) -> Tuple[Endpoint, ...]:
    """Return the servers that `urls` names, in order; `ImproperlyConfigured` says what is wrong."""
    found: List[Endpoint] = []
    for url in split_urls(urls):
        try:
            found.append(_endpoint(url, options))
        except ValueError as error:
            raise ImproperlyConfigured(
                f"RabbitMQ URL {mask_url(url)!r}: {error}"
                " (special characters in a password must be percent-encoded: '/' is %2F, '#' is %23)"
            ) from error
    if not found:
        raise ImproperlyConfigured(
            f"no RabbitMQ URL in {mask_url(urls)!r}: write amqp://user@host:5672/vhost"
        )
    return tuple(found)


def _endpoint(url: str, options: Options) -> Endpoint:
    """Return what one URL names; ValueError says what is wrong with it."""
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    if scheme not in _SCHEMES:
        raise ValueError(unknown_scheme(scheme, _SCHEMES))
    tls = _SCHEMES[scheme] or options.ssl
    parts = urlsplit(url)
    if parts.fragment:
        raise ValueError("'#' is not allowed")
    query = dict(query_of(url))
    login, _, host = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    if "," in host:
        raise ValueError(f"several hosts in one URL: write {scheme}://one;{scheme}://other")
    username = query.get("username") or unquote(username) or options.username or "guest"
    password = query.get("password") or unquote(password) or options.password or ""
    return Endpoint(
        mask_url(url),
        host_and_port(host, DEFAULT_TLS_PORT if tls else DEFAULT_PORT),
        query.get("virtual_host") or unquote(parts.path[1:]) or "/",
        username,
        password or ("guest" if username == "guest" else ""),
        tls,
    )


def _heartbeat(value: Any) -> int:
    seconds = float(value)
    if isinstance(value, bool) or not 0 <= seconds < 65536:
        raise ValueError
    return round(seconds) if seconds >= 1 or not seconds else 1


def _hold(value: Any) -> float:
    if isinstance(value, bool) or not 0 <= float(value) < 1e6:
        raise ValueError
    return float(value)


def _login_method(value: Any) -> str:
    return LOGIN_METHODS[LOGIN_METHODS.index(str(value).upper())]


def _queue_type(value: Any) -> str:
    if value not in ("quorum", "classic"):
        raise ValueError
    return str(value)


def _properties(value: Any) -> Tuple[Tuple[str, Any], ...]:
    found: Dict[str, Any] = dict(value)
    if not all(isinstance(one, (str, int, float)) for pair in found.items() for one in pair):
        raise TypeError
    return tuple(sorted((str(name), one) for name, one in found.items()))


_KINDS = reading.kinds_of(
    Options._field_defaults,
    max_connections=COUNT,
    heartbeat=Kind(_heartbeat, "a number of seconds from 0 (none) to 65535"),
    login_method=Kind(_login_method, " or ".join(LOGIN_METHODS)),
    client_properties=Kind(_properties, "a dict of texts and numbers"),
    socket_settings=SOCKET_OPTIONS,
    ssl_cert_reqs=CERT_REQS,
    hold=Kind(_hold, "a number of seconds from 0"),
    delayed_queue_type=Kind(_queue_type, "quorum or classic"),
)

# SPDX-License-Identifier: MIT
"""Settings as data, and the object that holds them.

`SETTINGS` is the table: name, type, default, range, one line of explanation.  A `Settings` object
keeps the values as plain instance attributes (reading one costs a dict look-up) and checks them
when they are set, whoever sets them; what cannot work raises `ImproperlyConfigured` then, not in
the middle of the night.  It accepts Celery's present names, its old upper-case ones, and both
mixed, remembers what was read from where, and never takes a misspelt name in silence.

Source: Celery's configuration reference; names, defaults and old names are Celery's where no
comment says otherwise.
"""

from __future__ import annotations

import math
import re
import warnings as _warnings
from datetime import timedelta, tzinfo
from types import ModuleType
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Tuple, Union

from .exceptions import ImproperlyConfigured, UnknownSettingWarning
from .log import LEVELS, TASK_FORMAT, WORKER_FORMAT
from .text import mask_urls, nearest, safe_repr
from .times import parse_rate, zone

#: A duration: seconds, may be given as a timedelta, is always kept as a number.
Seconds = float

# -- checks: each takes a value and returns what to keep, or raises ValueError with why ----------


class Setting(NamedTuple):
    """One row of the table.

    `type` is the annotation as text.  `minimum` and `maximum` are inclusive.  `check` takes the
    value after its type was checked and returns what to keep, or raises `ValueError`.
    """

    name: str
    type: str
    default: Any
    doc: str
    minimum: Optional[float] = None
    maximum: Optional[float] = None
    choices: Tuple[Any, ...] = ()
    check: Optional[Callable[[Any], Any]] = None

    @property
    def old_name(self) -> str:
        """The upper-case name Celery had before 4.0; empty for miniq's own settings."""
        return "" if self.name in OWN_SETTINGS else old_name(self.name)

    @property
    def expectation(self) -> str:
        """What a value must be, in words."""
        optional = self.type.startswith("Optional[")
        what = _TYPES[self.type[9:-1] if optional else self.type][0]
        if self.choices:
            what = "one of " + ", ".join(repr(choice) for choice in self.choices)
        elif self.minimum is not None and self.maximum is not None:
            what += f" from {self.minimum:g} to {self.maximum:g}"
        elif self.minimum is not None:
            what += f", at least {self.minimum:g}"
        return what + (" or None" if optional else "")

    def checked(self, value: Any) -> Any:
        """Return the value to keep; raises `ValueError` whose text says what was expected."""
        kind = self.type
        if kind.startswith("Optional["):
            if value is None:
                return None
            kind = kind[9:-1]
        try:
            value = _TYPES[kind][1](value)
        except (TypeError, ValueError):
            raise ValueError(f"expected {self.expectation}") from None
        if self.choices and value not in self.choices:
            raise ValueError(f"expected {self.expectation}")
        if isinstance(value, (int, float)):
            too_small = self.minimum is not None and value < self.minimum
            too_large = value > self.maximum if self.maximum is not None else value == float("inf")
            if too_small or too_large:
                raise ValueError(f"expected {self.expectation}")
        return value if self.check is None else self.check(value)


def _bool(value: Any) -> bool:
    if value is True or value is False:
        return bool(value)
    raise TypeError


def _int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise TypeError


def _float(value: Any) -> float:
    # NaN is what does not equal itself.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:  # noqa: PLR0124
        return value
    raise TypeError


def _str(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise TypeError


def _str_list(value: Any) -> List[str]:
    if isinstance(value, str):
        return [value]  # ``imports = "proj.tasks"`` means one module, not its letters
    if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(item, str) for item in value):
        return list(value)
    raise TypeError


def _str_or_list(value: Any) -> Union[str, List[str]]:
    return value if isinstance(value, str) else _str_list(value)


def _dict(value: Any) -> Dict[str, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError


def _any(value: Any) -> Any:
    return value


def _duration(value: Any) -> float:
    return value.total_seconds() if isinstance(value, timedelta) else _float(value)


def _zone(value: Any) -> Union[str, tzinfo]:
    if isinstance(value, (str, tzinfo)):
        return value
    raise TypeError


def _str_or_number(value: Any) -> Union[str, float]:
    return value if isinstance(value, str) else _float(value)


def _str_or_int(value: Any) -> Union[str, int]:
    return value if isinstance(value, str) else _int(value)


def _bool_or_dict(value: Any) -> Union[bool, Dict[str, Any]]:
    return _bool(value) if isinstance(value, bool) else _dict(value)


def _str_or_class(value: Any) -> Union[str, type]:
    if isinstance(value, (str, type)):
        return value
    raise TypeError


#: Annotation -> what it is in words, and its check.
_TYPES: Dict[str, Tuple[str, Callable[[Any], Any]]] = {
    "bool": ("True or False", _bool),
    "int": ("a whole number", _int),
    "float": ("a number", _float),
    "str": ("text", _str),
    "List[str]": ("a list of names", _str_list),
    "Dict[str, Any]": ("a dict", _dict),
    "Any": ("anything", _any),
    "Union[str, List[str]]": ("a URL or a list of URLs", _str_or_list),
    "Union[str, tzinfo]": ("the name of a time zone, such as 'Europe/Paris'", _zone),
    "Union[str, float]": ("text or a number", _str_or_number),
    "Union[str, int]": ("text or a whole number", _str_or_int),
    "Union[str, type]": ("a name or a class", _str_or_class),
    "Union[bool, Dict[str, Any]]": ("True, False or a dict", _bool_or_dict),
    # Kept as seconds, so that whoever reads it needs to know one form only.
    "Seconds": ("a number of seconds or a timedelta", _duration),
}


def _known_zone(value: Union[str, tzinfo]) -> Union[str, tzinfo]:
    try:
        zone(value)
    except ImproperlyConfigured as error:
        raise ValueError(str(error)) from None
    return value


def _valid_rate(value: Union[str, float]) -> Union[str, float]:
    parse_rate(value)
    return value


def _zero_is_none(value: Optional[float]) -> Optional[float]:
    """Keep one way of saying "no limit": Celery reads 0 as None here."""
    return value or None


def _level(value: Union[str, int]) -> Union[str, int]:
    if isinstance(value, str) and value.upper() not in LEVELS:
        raise ValueError("expected a log level: " + ", ".join(LEVELS))
    return value


_RETRY_POLICY = {"max_retries": 3, "interval_start": 0, "interval_step": 0.2, "interval_max": 1}


def _retry_policy(value: Dict[str, Any]) -> Dict[str, Any]:
    for key, number in value.items():
        if key not in _RETRY_POLICY and key != "retry_errors":
            raise ValueError(f"no {key!r} in it; it may have {', '.join(_RETRY_POLICY)}, retry_errors")
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool) and number >= 0
        if key != "retry_errors" and not is_number and not (key == "max_retries" and number is None):
            raise ValueError(f"{key} must be a number, at least 0")
    return {**_RETRY_POLICY, **value}


# -- the table -----------------------------------------------------------------------------------

#: Connections in a pool without a limit: more than a process can have threads that need one.
NO_POOL_LIMIT = 10_000

#: Settings that Celery does not have.
OWN_SETTINGS = frozenset(
    {"strict_settings", "task_delivery_limit", "task_publish_timeout", "worker_health_file",
     "worker_max_abandoned_threads"}
)

_S = Setting
# fmt: off
_TABLE: Tuple[Setting, ...] = (
    # general
    _S("accept_content", "List[str]", ["json"], "serializers or content types a worker accepts"),
    _S("result_accept_content", "Optional[List[str]]", None, "the same for results; None = accept_content"),
    _S("enable_utc", "bool", True, "messages carry UTC; miniq always writes UTC"),
    _S("timezone", "Optional[Union[str, tzinfo]]", None, "of naive times; None = UTC", check=_known_zone),
    _S("imports", "List[str]", [], "modules a worker imports at its start"),
    _S("include", "List[str]", [], "more of them, as given to the app"),
    _S("strict_settings", "bool", False, "an unknown setting is an error, not a warning"),
    # broker
    _S("broker_url", "Optional[Union[str, List[str]]]", None, "the broker; None = sqlite:///miniq.db"),
    _S("broker_read_url", "Optional[Union[str, List[str]]]", None, "another one to consume from"),
    _S("broker_write_url", "Optional[Union[str, List[str]]]", None, "another one to publish to"),
    _S("broker_transport_options", "Dict[str, Any]", {}, "options of the transport"),
    _S(
        "broker_failover_strategy", "Optional[str]", None, "how several URLs are tried; None = in turn",
        choices=("round-robin", "shuffle"),
    ),
    _S("broker_use_ssl", "Optional[Union[bool, Dict[str, Any]]]", None, "TLS, or its options"),
    _S("broker_pool_limit", "Optional[int]", 10, "connections in a process' pool; 0 or None = no limit",
       minimum=0, check=_zero_is_none),
    _S("broker_connection_timeout", "float", 4.0, "seconds to connect", minimum=0.001),
    _S("broker_heartbeat", "Optional[float]", 120.0, "seconds between signs of life; 0 or None = none"),
    _S(
        "broker_login_method", "Optional[str]", None, "how RabbitMQ is told who we are; None = PLAIN",
        choices=("PLAIN", "AMQPLAIN", "EXTERNAL"),
    ),
    _S(
        "broker_native_delayed_delivery_queue_type", "str", "quorum",
        "the type of the queues in which messages for quorum queues wait", choices=("classic", "quorum"),
    ),
    _S("broker_connection_retry_on_startup", "bool", True, "a starting worker waits for its broker"),
    _S(
        "broker_connection_max_retries", "Optional[int]", 100, "... for so many tries more; 0 or None = any",
        minimum=0, check=_zero_is_none,
    ),
    _S("broker_connection_retry", "bool", True, "a running worker waits for a lost broker"),
    # tasks: how they run
    _S("task_acks_late", "bool", False, "acknowledge after the run, not before it"),
    _S("task_acks_on_failure_or_timeout", "bool", True, "with acks_late: acknowledge a failed run too"),
    _S("task_acks_on_failure", "Optional[bool]", None, "... a failed one; None = as above"),
    _S("task_acks_on_timeout", "Optional[bool]", None, "... one over its limit; None = as above"),
    _S("task_reject_on_worker_lost", "Optional[bool]", None, "with acks_late: run again if its process died"),
    _S("task_retry_on_worker_lost", "bool", False, "a counted retry when its process died"),
    _S("task_delivery_limit", "int", 3, "starts of one message whose workers die; 0 = no limit", minimum=0),
    _S("task_time_limit", "Optional[float]", None, "seconds until a run is killed",
       minimum=0, check=_zero_is_none),
    _S(
        "task_soft_time_limit", "Optional[float]", None, "seconds until SoftTimeLimitExceeded in it",
        minimum=0, check=_zero_is_none,
    ),
    _S("task_ignore_result", "bool", False, "store no result"),
    _S("task_store_errors_even_if_ignored", "bool", False, "... but errors"),
    _S("task_track_started", "bool", False, "store the state STARTED"),
    _S("task_annotations", "Any", None, "attributes to set on tasks: {name or '*': {...}}"),
    _S("task_default_rate_limit", "Optional[Union[str, float]]", None, "10, '10/s', '100/m', ...",
       check=_valid_rate),
    _S("task_repr_maxlevels", "int", 3, "levels of nesting in argsrepr", minimum=1, maximum=20),
    _S("task_protocol", "int", 2, "version of the messages sent", choices=(2,)),
    _S("task_always_eager", "bool", False, "apply_async runs the task here and now"),
    _S("task_eager_propagates", "bool", False, "... and lets its exceptions out"),
    _S("task_store_eager_result", "bool", False, "... and stores its results"),
    # tasks: how they travel
    _S("task_serializer", "str", "json", "serializer of messages"),
    _S("task_compression", "Optional[str]", None, "compression of messages"),
    _S("task_routes", "Any", None, "router, dict, or list of them"),
    _S("task_queues", "Any", None, "queues or dict of them; None = the default queue"),
    _S("task_create_missing_queues", "bool", True, "a queue nobody configured is made when named"),
    _S(
        "task_create_missing_queue_type", "str", "classic", "... of this type", choices=("classic", "quorum"),
    ),
    _S("task_create_missing_queue_exchange_type", "Optional[str]", None, "... its exchange's type"),
    _S("task_default_queue", "str", "celery", "name of the default queue"),
    _S(
        "task_default_queue_type", "str", "classic", "its type, on RabbitMQ",
        choices=("classic", "quorum"),
    ),
    _S("task_default_exchange", "Optional[str]", None, "its exchange; None = the queue's name"),
    _S(
        "task_default_exchange_type", "str", "direct", "its exchange's type",
        choices=("direct", "topic", "fanout", "headers"),
    ),
    _S("task_default_routing_key", "Optional[str]", None, "its routing key; None = the queue's name"),
    _S(
        "task_default_delivery_mode", "Union[str, int]", 2, "2 = kept on disk by the broker",
        choices=(1, 2, "transient", "persistent"),
    ),
    _S("task_default_priority", "Optional[int]", None, "priority of messages", minimum=0, maximum=255),
    _S("task_queue_max_priority", "Optional[int]", None, "x-max-priority of queues", minimum=0, maximum=255),
    _S("task_inherit_parent_priority", "bool", False, "a task's calls have its priority"),
    _S("task_publish_retry", "bool", True, "publishing that failed is tried again"),
    _S("task_publish_retry_policy", "Dict[str, Any]", _RETRY_POLICY, "... so often", check=_retry_policy),
    _S(
        "task_allow_error_cb_on_chord_header", "bool", False,
        "errbacks of a chord are told of each failed member, too",
    ),
    _S("task_publish_timeout", "float", 5.0, "seconds for one publish, retries and all", minimum=0.001),
    # worker
    _S("worker_concurrency", "Optional[int]", None, "tasks at a time; None = number of CPUs", minimum=1),
    _S("worker_pool", "Union[str, type]", "prefork", "prefork, threads, solo, asyncio or module:Class"),
    _S(
        "worker_pool_start_method", "Optional[str]", None, "how children are made; None = the best here",
        choices=("fork", "forkserver", "spawn"),
    ),
    # Celery's default is 4: short tasks then wait behind long ones while other workers are free.
    _S(
        "worker_prefetch_multiplier", "int", 1,
        "1 = take messages for free slots only; n = (n-1) x concurrency more; 0 = no limit", minimum=0,
    ),
    _S("worker_disable_prefetch", "bool", False, "take messages for free slots only"),
    _S(
        "worker_max_tasks_per_child", "Optional[int]", None, "a child is replaced after so many tasks",
        minimum=0, check=_zero_is_none,
    ),
    _S(
        "worker_max_memory_per_child", "Optional[int]", None, "... when it is larger than so many KiB",
        minimum=0, check=_zero_is_none,
    ),
    # Celery's 4 seconds are short for an app that a spawned child must import first.
    _S("worker_proc_alive_timeout", "float", 10.0, "seconds for a new child to be up", minimum=0.001),
    _S("worker_max_abandoned_threads", "int", 3, "stuck threads until the worker stops", minimum=1),
    _S("worker_enable_remote_control", "bool", True, "a worker hears commands (revoke, rate_limit, ...)"),
    _S("worker_pool_restarts", "bool", False, "... pool_restart among them"),
    _S("control_exchange", "str", "celery", "commands go over the exchange of this name and .pidbox"),
    _S("control_queue_ttl", "float", 300.0, "seconds a command waits for a worker that does not listen",
       minimum=0.001),
    _S("control_queue_expires", "float", 10.0, "seconds a queue of commands or replies outlives its reader",
       minimum=1),
    _S("worker_send_task_events", "bool", False, "workers tell what becomes of their tasks (-E)"),
    _S("task_send_sent_event", "bool", False, "senders tell of the tasks they send"),
    _S("event_queue_ttl", "float", 5.0, "seconds an event waits for its reader", minimum=0.001),
    _S("event_queue_expires", "float", 60.0, "seconds a queue of events outlives its reader", minimum=1),
    _S("event_queue_prefix", "str", "celeryev", "names of these queues begin with it"),
    _S("event_queue_exclusive", "bool", True, "only the connection that made it may read such a queue"),
    _S("event_queue_durable", "bool", False, "such a queue outlives a restart of the broker"),
    _S("worker_disable_rate_limits", "bool", False, "rate limits are not kept"),
    _S("worker_health_file", "Optional[str]", None, "where it shows that it lives; None = temporary folder"),
    _S("worker_deduplicate_successful_tasks", "bool", False,
       "a redelivered task with a result is not run"),
    _S("worker_soft_shutdown_timeout", "float", 0.0, "seconds tasks get before a cold shutdown", minimum=0),
    # logging.  Celery replaces the host's handlers and catches print; miniq does so when told to.
    _S("worker_hijack_root_logger", "bool", False, "replace the root logger's handlers"),
    _S("worker_log_color", "Optional[bool]", None, "colour; None = on a terminal, unless NO_COLOR"),
    _S("worker_log_format", "str", WORKER_FORMAT, "format of log lines"),
    _S("worker_task_log_format", "str", TASK_FORMAT, "format of tasks' log lines"),
    _S("worker_log_datefmt", "Optional[str]", None, "format of their time"),
    _S("worker_task_log_datefmt", "Optional[str]", None, "format of their time, in tasks' lines"),
    _S("worker_redirect_stdouts", "bool", False, "stdout and stderr go to the log"),
    _S("worker_redirect_stdouts_level", "Union[str, int]", "WARNING", "... at this level", check=_level),
    # results
    _S("result_backend", "Optional[str]", None, "where results live; None = sqlite:///miniq.db"),
    _S("result_expires", "Optional[Seconds]", 86400, "seconds results are kept; 0 or None = for ever",
       minimum=0, check=_zero_is_none),
    _S("result_chord_expires", "Optional[float]", None, "the same for unfinished chords; None = as results",
       minimum=0.001),
    _S("result_chord_retry_interval", "float", 1.0,
       "seconds between two looks at a chord where its members cannot be counted", minimum=0.05),
    _S("result_extended", "bool", False, "results also keep name, arguments, worker, queue"),
    _S("result_serializer", "str", "json", "serializer of results"),
    _S("result_compression", "Optional[str]", None, "compression of results"),
    _S("result_backend_transport_options", "Dict[str, Any]", {}, "options of the result backend"),
    _S("result_persistent", "bool", False, "results over rpc:// outlive a restart of the broker"),
    _S("result_backend_always_retry", "bool", False, "storing that failed is tried again"),
    # periodic tasks
    _S("beat_schedule", "Dict[str, Any]", {}, "periodic tasks: name -> {task, schedule, ...}"),
    _S("beat_scheduler", "Union[str, type]", "persistent", "name or class of the scheduler"),
    _S("beat_schedule_filename", "Optional[str]", None, "file of the state; None = in the broker's store"),
    _S("beat_max_loop_interval", "float", 0.0, "seconds beat waits at most; 0 = 300", minimum=0),
    _S("beat_cron_starting_deadline", "Optional[Seconds]", None,
       "seconds after which a crontab tick is not sent any more", minimum=0),
    _S("beat_enable_remote_control", "bool", False, "beat answers pings"),
    _S("beat_remote_control_max_tick_age", "Optional[Seconds]", None,
       "seconds without a turn after which it does not; None = twice its interval, at least 60", minimum=0),
    # results on a Redis server: what their URL and result_backend_transport_options leave open
    _S("redis_host", "Optional[str]", None, "server of result_backend = 'redis://'; None = localhost"),
    _S("redis_port", "Optional[int]", None, "its port; None = 6379", minimum=1, maximum=65535),
    _S("redis_db", "Optional[int]", None, "its database; None = 0", minimum=0),
    _S("redis_username", "Optional[str]", None, "user for results"),
    _S("redis_password", "Optional[str]", None, "password for results"),
    _S("redis_backend_use_ssl", "Optional[Union[bool, Dict[str, Any]]]", None, "TLS, or its options"),
    _S("redis_client_name", "Optional[str]", None, "name of connections in CLIENT LIST"),
    _S(
        "redis_max_connections", "Optional[int]", None, "connections in a process' pool;"
        " None = broker_pool_limit", minimum=1,
    ),
    # Celery's 120 seconds are long for a caller who waits for them.
    _S("redis_socket_timeout", "float", 5.0, "seconds for one command", minimum=0.001),
    _S(
        "redis_socket_connect_timeout", "Optional[float]", None, "seconds to connect;"
        " None = broker_connection_timeout", minimum=0.001,
    ),
    # Celery's default is off: a peer that has gone is then noticed late, or never.
    _S("redis_socket_keepalive", "bool", True, "the system looks whether the peer is there"),
    _S(
        "redis_backend_health_check_interval", "Optional[float]", None,
        "seconds of idleness before a look; None = 25", minimum=0.001,
    ),
)
# fmt: on

#: name -> its row.
SETTINGS: Dict[str, Setting] = {setting.name: setting for setting in _TABLE}

#: What else Celery knows.  Set here it is kept and can be read back, and one warning says that
#: it does nothing.
CELERY_ONLY = frozenset(
    """
    broker_transport broker_host broker_port broker_user broker_password broker_vhost
    broker_pool_acquire_timeout
    broker_channel_error_retry broker_heartbeat_checkrate
    task_remote_tracebacks
    worker_eta_task_limit worker_enable_soft_shutdown_on_idle
    worker_pool_putlocks worker_enable_prefetch_count_reduction worker_autoscaler
    worker_agent worker_consumer worker_timer worker_timer_precision worker_lost_wait worker_state_db
    worker_direct
    worker_cancel_long_running_tasks_on_connection_loss
    worker_detect_quorum_queues
    worker_logfile worker_pidfile worker_uid worker_gid worker_umask worker_executable
    result_failure_expires result_exchange result_exchange_type
    result_cache_max result_chord_join_timeout result_chord_ordered
    result_backend_thread_safe override_backends result_backend_max_retries
    result_backend_base_sleep_between_retries_ms result_backend_max_sleep_between_retries_ms
    redis_retry_on_timeout redis_backend_credential_provider
    database_url database_engine_options database_engine_callback database_short_lived_sessions
    database_table_schemas database_table_names database_create_tables_at_setup
    cache_backend cache_backend_options
    couchbase_backend_settings arangodb_backend_settings mongodb_backend_settings
    control_queue_exclusive control_queue_durable
    event_serializer event_exchange
    beat_sync_every
    beat_logfile beat_pidfile beat_uid beat_gid beat_umask beat_executable
    events_logfile events_pidfile events_uid events_gid events_umask events_executable
    security_key security_key_password security_certificate security_cert_store security_digest
    """.split()
)
#: Families of settings of stores that miniq does not have.
_CELERY_ONLY_PREFIXES = ("cassandra_", "elasticsearch_", "s3_", "azureblockblob_", "gcs_", "cosmosdbsql_")

# -- names ---------------------------------------------------------------------------------------

_OLD_PREFIXES = (
    ("task_", "CELERY_"),
    ("worker_", "CELERYD_"),
    ("beat_", "CELERYBEAT_"),
    ("broker_", "BROKER_"),
)
_OLD_EXCEPTIONS = {
    "result_expires": "CELERY_TASK_RESULT_EXPIRES",
    "result_cache_max": "CELERY_MAX_CACHED_RESULTS",
    "database_url": "CELERY_RESULT_DBURI",
    "database_engine_options": "CELERY_RESULT_ENGINE_OPTIONS",
    "task_compression": "CELERY_MESSAGE_COMPRESSION",
    "task_protocol": "CELERY_TASK_PROTOCOL",
    "task_serializer": "CELERY_TASK_SERIALIZER",
    "task_publish_retry": "CELERY_TASK_PUBLISH_RETRY",
    "task_publish_retry_policy": "CELERY_TASK_PUBLISH_RETRY_POLICY",
    "task_eager_propagates": "CELERY_EAGER_PROPAGATES_EXCEPTIONS",
    "task_time_limit": "CELERYD_TASK_TIME_LIMIT",
    "task_soft_time_limit": "CELERYD_TASK_SOFT_TIME_LIMIT",
    "worker_direct": "CELERY_WORKER_DIRECT",
    "worker_enable_remote_control": "CELERY_ENABLE_REMOTE_CONTROL",
    "worker_disable_rate_limits": "CELERY_DISABLE_RATE_LIMITS",
    "worker_redirect_stdouts": "CELERY_REDIRECT_STDOUTS",
    "worker_redirect_stdouts_level": "CELERY_REDIRECT_STDOUTS_LEVEL",
    "worker_send_task_events": "CELERY_SEND_EVENTS",
}


def old_name(name: str) -> str:
    """Return the upper-case name which Celery used for a setting before 4.0."""
    if name in _OLD_EXCEPTIONS:
        return _OLD_EXCEPTIONS[name]
    for prefix, old_prefix in _OLD_PREFIXES:
        if name.startswith(prefix):
            return old_prefix + name[len(prefix) :].upper()
    return "CELERY_" + name.upper()


#: old upper-case name -> name.
_OLD_NAMES: Dict[str, str] = {
    old_name(name): name for name in (*sorted(CELERY_ONLY), *SETTINGS) if name not in OWN_SETTINGS
}


def resolve(key: str) -> Optional[str]:
    """Return the setting that `key` means (a present, upper-cased or old name), None if there is none."""
    if key in SETTINGS or key in CELERY_ONLY:
        return key
    found = _OLD_NAMES.get(key)
    if found is None and key.isupper():
        lower = key.lower()
        found = lower if lower in SETTINGS or lower in CELERY_ONLY else None
    if found is None and key.lower().startswith(_CELERY_ONLY_PREFIXES):
        found = key.lower()
    return found


def suggest(key: str, only_typos: bool = False) -> Optional[str]:
    """Return the known name most like a misspelt `key`, in the spelling (case) it was written in."""
    if key != key.upper():
        return nearest(key, (*SETTINGS, *CELERY_ONLY), only_typos)
    return nearest(key, (*_OLD_NAMES, *map(str.upper, SETTINGS)), only_typos)


def parse_setting(name: str, text: str) -> Any:
    """Return the value for a setting written as text, as on a command line.

    Raises `ImproperlyConfigured` for an unknown name or text that is no such value.
    """
    setting = SETTINGS.get(resolve(name) or "")
    if setting is None:
        hint = suggest(name)
        raise ImproperlyConfigured(f"unknown setting {name!r}" + (f" (did you mean {hint}?)" if hint else ""))
    kind = setting.type[9:-1] if setting.type.startswith("Optional[") else setting.type
    value: Any = text
    if setting.type.startswith("Optional[") and text.lower() in ("none", "null", ""):
        value = None
    elif kind == "bool":
        value = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }.get(text.lower(), text)
    elif kind == "List[str]":
        value = [item.strip() for item in text.split(",") if item.strip()]
    elif kind not in ("str", "Union[str, List[str]]", "Union[str, tzinfo]", "Union[str, type]"):
        import json  # only on a command line with overrides

        try:
            value = json.loads(text)
        except ValueError:
            value = text  # the check below says what was expected
    try:
        return setting.checked(value)
    except ValueError as error:
        raise ImproperlyConfigured(f"{name} = {_shown(setting.name, text)}: {error}") from None


# -- the values ----------------------------------------------------------------------------------

#: Who set a value: a later or equal one replaces it, an earlier one does not.
DEFAULT, APP_DEFAULT, CONFIG, CHANGE, COMMAND_LINE = range(5)

_HIDDEN = re.compile(
    r"pass|secret|token|credential|connection_string|(?<!routing)(?:^|_)key(?:$|_)", re.IGNORECASE
)
_HIDDEN_TEXT = "********"


def _tls_options(use_ssl: Union[bool, Dict[str, Any], None]) -> Dict[str, Any]:
    """Return the transport options that ``broker_use_ssl`` stands for.

    Celery has both spellings, with and without ``ssl_``, one for each kind of broker.
    """
    if not use_ssl:
        return {}
    given = {} if use_ssl is True else use_ssl
    return {"ssl": True, **{f"ssl_{name.replace('ssl_', '', 1)}": value for name, value in given.items()}}


class Settings:
    """The settings of one app: attributes, items and `update` read and write the same values.

    Setting a value checks it: `ImproperlyConfigured` names setting, value and expectation.  A name
    nobody knows is kept all the same and warned of (`UnknownSettingWarning`), or refused when
    `strict_settings` is on.  Configure in one thread; reading is safe from any.
    """

    # The table's types again, for type checkers; a test holds the two together.
    accept_content: List[str]
    result_accept_content: Optional[List[str]]
    enable_utc: bool
    timezone: Optional[Union[str, tzinfo]]
    imports: List[str]
    include: List[str]
    strict_settings: bool
    broker_url: Optional[Union[str, List[str]]]
    broker_read_url: Optional[Union[str, List[str]]]
    broker_write_url: Optional[Union[str, List[str]]]
    broker_transport_options: Dict[str, Any]
    broker_failover_strategy: Optional[str]
    broker_use_ssl: Optional[Union[bool, Dict[str, Any]]]
    broker_pool_limit: Optional[int]
    broker_connection_timeout: float
    broker_heartbeat: Optional[float]
    broker_login_method: Optional[str]
    broker_native_delayed_delivery_queue_type: str
    broker_connection_retry_on_startup: bool
    broker_connection_max_retries: Optional[int]
    broker_connection_retry: bool
    task_acks_late: bool
    task_acks_on_failure_or_timeout: bool
    task_acks_on_failure: Optional[bool]
    task_acks_on_timeout: Optional[bool]
    task_reject_on_worker_lost: Optional[bool]
    task_retry_on_worker_lost: bool
    task_delivery_limit: int
    task_time_limit: Optional[float]
    task_soft_time_limit: Optional[float]
    task_ignore_result: bool
    task_store_errors_even_if_ignored: bool
    task_track_started: bool
    task_annotations: Any
    task_default_rate_limit: Optional[Union[str, float]]
    task_repr_maxlevels: int
    task_protocol: int
    task_always_eager: bool
    task_eager_propagates: bool
    task_store_eager_result: bool
    task_serializer: str
    task_compression: Optional[str]
    task_routes: Any
    task_queues: Any
    task_create_missing_queues: bool
    task_create_missing_queue_type: str
    task_create_missing_queue_exchange_type: Optional[str]
    task_default_queue: str
    task_default_queue_type: str
    task_default_exchange: Optional[str]
    task_default_exchange_type: str
    task_default_routing_key: Optional[str]
    task_default_delivery_mode: Union[str, int]
    task_default_priority: Optional[int]
    task_queue_max_priority: Optional[int]
    task_inherit_parent_priority: bool
    task_publish_retry: bool
    task_publish_retry_policy: Dict[str, Any]
    task_allow_error_cb_on_chord_header: bool
    task_publish_timeout: float
    worker_concurrency: Optional[int]
    worker_pool: Union[str, type]
    worker_pool_start_method: Optional[str]
    worker_prefetch_multiplier: int
    worker_disable_prefetch: bool
    worker_max_tasks_per_child: Optional[int]
    worker_max_memory_per_child: Optional[int]
    worker_proc_alive_timeout: float
    worker_max_abandoned_threads: int
    worker_enable_remote_control: bool
    worker_pool_restarts: bool
    control_exchange: str
    control_queue_ttl: float
    control_queue_expires: float
    worker_send_task_events: bool
    task_send_sent_event: bool
    event_queue_ttl: float
    event_queue_expires: float
    event_queue_prefix: str
    event_queue_exclusive: bool
    event_queue_durable: bool
    worker_disable_rate_limits: bool
    worker_health_file: Optional[str]
    worker_deduplicate_successful_tasks: bool
    worker_soft_shutdown_timeout: float
    worker_hijack_root_logger: bool
    worker_log_color: Optional[bool]
    worker_log_format: str
    worker_task_log_format: str
    worker_log_datefmt: Optional[str]
    worker_task_log_datefmt: Optional[str]
    worker_redirect_stdouts: bool
    worker_redirect_stdouts_level: Union[str, int]
    result_backend: Optional[str]
    result_expires: Optional[Seconds]
    result_chord_expires: Optional[float]
    result_chord_retry_interval: float
    result_extended: bool
    result_serializer: str
    result_compression: Optional[str]
    result_backend_transport_options: Dict[str, Any]
    result_persistent: bool
    result_backend_always_retry: bool
    beat_schedule: Dict[str, Any]
    beat_scheduler: Union[str, type]
    beat_schedule_filename: Optional[str]
    beat_max_loop_interval: float
    beat_cron_starting_deadline: Optional[Seconds]
    beat_enable_remote_control: bool
    beat_remote_control_max_tick_age: Optional[Seconds]
    redis_host: Optional[str]
    redis_port: Optional[int]
    redis_db: Optional[int]
    redis_username: Optional[str]
    redis_password: Optional[str]
    redis_backend_use_ssl: Optional[Union[bool, Dict[str, Any]]]
    redis_client_name: Optional[str]
    redis_max_connections: Optional[int]
    redis_socket_timeout: float
    redis_socket_connect_timeout: Optional[float]
    redis_socket_keepalive: bool
    redis_backend_health_check_interval: Optional[float]

    _on_change: Optional[Callable[[], None]]
    _origins: Dict[str, Tuple[int, str]]
    _unknown: List[str]
    _warnings: List[str]

    def __init__(self, changes: Optional[Mapping[str, Any]] = None, source: str = "the app") -> None:
        values = self.__dict__
        for setting in _TABLE:
            default = setting.default
            values[setting.name] = default.copy() if isinstance(default, (list, dict)) else default
        values["_on_change"] = None
        values["_origins"] = {}
        values["_unknown"] = []
        values["_warnings"] = []
        if changes:
            self._apply([(key, resolve(key), value) for key, value in changes.items()], CHANGE, source)

    # -- reading

    def __getattr__(self, name: str) -> Any:
        """Find what is no plain attribute: old names, and the reason why there is nothing."""
        # Also reached by copy and pickle, before there is anything to look into.
        if not name.startswith("_"):
            known = resolve(name)
            if known is not None and known in self.__dict__:
                return self.__dict__[known]
            if known is not None:
                raise AttributeError(
                    f"{name} is a setting of Celery without effect in miniq, and it was not set"
                )
            hint = suggest(name)
            raise AttributeError(f"no setting {name!r}" + (f" (did you mean {hint}?)" if hint else ""))
        raise AttributeError(name)

    def __getitem__(self, name: str) -> Any:
        try:
            return self.__dict__[resolve(name) or name]
        except KeyError:
            raise KeyError(name) from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and not name.startswith("_") and (resolve(name) or name) in self.__dict__

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __repr__(self) -> str:
        return f"<Settings: {len(self._origins)} changed>"

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, `default` where there is no such setting."""
        return self.__dict__.get(resolve(name) or name, default)

    def keys(self) -> List[str]:
        """Return all names: the table's, and what else was set."""
        return [name for name in self.__dict__ if not name.startswith("_")]

    def items(self) -> List[Tuple[str, Any]]:
        """Return all names with their values."""
        return [(name, self.__dict__[name]) for name in self.keys()]

    @property
    def warnings(self) -> List[str]:
        """What was warned of: unknown names, settings without effect, two spellings of one."""
        return list(self._warnings)

    @property
    def on_change(self) -> Optional[Callable[[], None]]:
        """What is called after settings were set; whoever keeps something derived from them sets it."""
        return self._on_change

    @on_change.setter
    def on_change(self, callback: Optional[Callable[[], None]]) -> None:
        self.__dict__["_on_change"] = callback

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, "_on_change": None}

    def changes(self) -> Dict[str, Tuple[Any, str]]:
        """Return what was set: name -> (value, the name it was read under and where)."""
        return {name: (self.__dict__[name], where) for name, (_, where) in self._origins.items()}

    def table(self, with_defaults: bool = False, censored: bool = True) -> Dict[str, Any]:
        """Return names and values, sorted; passwords and keys are masked unless `censored` is off."""
        names = self.keys() if with_defaults else self._origins
        return {
            name: _censored(name, self.__dict__[name]) if censored else self.__dict__[name]
            for name in sorted(names)
        }

    def humanize(self, with_defaults: bool = False, censored: bool = True) -> str:
        """Return the same as text, one setting a line."""
        shown = self.table(with_defaults, censored)
        return "\n".join(f"{name}: {safe_repr(value)}" for name, value in shown.items())

    # -- writing

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "on_change":
            object.__setattr__(self, name, value)
            return
        self._apply([(name, resolve(name), value)], CHANGE, "app.conf")

    def __setitem__(self, name: str, value: Any) -> None:
        self._apply([(name, resolve(name), value)], CHANGE, "app.conf")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"settings cannot be deleted; set {name} to its default instead")

    def update(
        self,
        changes: Union[Mapping[str, Any], Iterable[Tuple[str, Any]], None] = None,
        source: str = "app.conf",
        rank: int = CHANGE,
        **more: Any,
    ) -> None:
        """Set several: all of them, or none when one is wrong (`ImproperlyConfigured`).

        A value of a higher `rank` is not replaced by one of a lower.
        """
        together = {**dict(changes or {}), **more}
        self._apply([(key, resolve(key), value) for key, value in together.items()], rank, source)

    def add_defaults(self, defaults: Mapping[str, Any], source: str = "app.add_defaults") -> None:
        """Set what holds where nobody says otherwise."""
        self.update(defaults, source, APP_DEFAULT)

    def from_object(self, obj: Any, namespace: Optional[str] = None, source: Optional[str] = None) -> None:
        """Read settings from a module, a dict or any object with attributes.

        With a namespace, ``CELERY`` say, the settings are what is called ``CELERY_...`` (upper or
        lower case); old names that say ``CELERY`` by themselves are read too.  Without one, every
        known name is read, and a name that is none is reported only if it is one letter from one, or
        the key of a dict: a module may hold other things.
        """
        if isinstance(obj, Mapping):
            pairs = [(key, value) for key, value in obj.items() if isinstance(key, str)]
        else:
            pairs = [(key, getattr(obj, key, None)) for key in dir(obj)]
        if source is None:
            source = _description(obj)
        prefix = namespace.rstrip("_").upper() + "_" if namespace else ""
        found: List[Tuple[str, Optional[str], Any]] = []
        for key, value in pairs:
            if key.startswith("_") or isinstance(value, ModuleType):
                continue
            name = _resolve_in(key, prefix)
            if name is not None:
                setting = SETTINGS.get(name)
                # ``from datetime import timezone`` in a configuration module sets no time zone.
                if not (callable(value) and setting is not None and not _accepts(setting, value)):
                    found.append((key, name, value))
            elif prefix:
                if key.upper().startswith(prefix):
                    found.append((key, None, value))
            elif isinstance(obj, Mapping) or (not callable(value) and suggest(key, only_typos=True)):
                found.append((key, None, value))
        self._apply(found, CONFIG, source, prefix)

    def options_for_redis(self, results: bool) -> Dict[str, Any]:
        """Return the transport options for a Redis server with messages, or with results.

        What `broker_transport_options` (`result_backend_transport_options`) leaves open, other settings
        say; where these agree, messages and results on one server share one pool of connections.
        """
        options = self._options_for_server()
        if not results:
            return {**options, **_tls_options(self.broker_use_ssl), **self.broker_transport_options}
        more = {
            "max_connections": self.redis_max_connections,
            "socket_connect_timeout": self.redis_socket_connect_timeout,
            "socket_timeout": self.redis_socket_timeout,
            "socket_keepalive": self.redis_socket_keepalive,
            "health_check_interval": self.redis_backend_health_check_interval,
            "client_name": self.redis_client_name,
            "username": self.redis_username,
            "password": self.redis_password,
        }
        options.update((name, value) for name, value in more.items() if value is not None)
        options.update(_tls_options(self.redis_backend_use_ssl))
        return {**options, **self.result_backend_transport_options}

    def options_for_amqp(self) -> Dict[str, Any]:
        """Return the transport options for RabbitMQ, for messages and for what comes over ``rpc://``."""
        return {
            **self._options_for_server(),
            "heartbeat": math.ceil(self.broker_heartbeat or 0),
            "login_method": self.broker_login_method,
            "delayed_queue_type": self.broker_native_delayed_delivery_queue_type,
            **_tls_options(self.broker_use_ssl),
            **self.broker_transport_options,
        }

    def _options_for_server(self) -> Dict[str, Any]:
        return {
            "max_connections": self.broker_pool_limit or NO_POOL_LIMIT,
            "socket_connect_timeout": self.broker_connection_timeout,
        }

    def check(self) -> None:
        """Check what several settings say together; raises `ImproperlyConfigured`."""
        soft, hard = self.task_soft_time_limit, self.task_time_limit
        if soft is not None and hard is not None and soft > hard:
            raise ImproperlyConfigured(
                f"task_soft_time_limit = {soft:g} can never be reached: task_time_limit = {hard:g} is shorter"
            )

    def _apply(
        self, found: List[Tuple[str, Optional[str], Any]], rank: int, source: str, prefix: str = ""
    ) -> None:
        """Take over ``(key as written, setting or None, value)``: check all, then set all, then warn."""
        chosen: Dict[str, Tuple[str, Any]] = {}
        unknown: List[Tuple[str, Any]] = []
        notes: List[Tuple[str, type]] = []
        for key, name, value in found:
            if name is None:
                unknown.append((key, value))
            elif name not in chosen:
                chosen[name] = (key, value)
            else:
                kept = key if key in (name, prefix + name.upper()) else chosen[name][0]
                other = chosen[name][0] if kept == key else key
                notes.append((f"{source} sets {name} twice; {kept} counts, {other} does not", UserWarning))
                if kept == key:
                    chosen[name] = (key, value)
        checked = {name: self._checked(name, key, value, source) for name, (key, value) in chosen.items()}
        texts = [self._unknown_text(key, prefix, source) for key, _ in unknown]
        if checked.get("strict_settings", self.strict_settings) and (texts or self._unknown):
            raise ImproperlyConfigured("; ".join(self._unknown + texts) + " (strict_settings is on)")

        values, origins = self.__dict__, self._origins
        # An unknown one may be the user's own and is kept, unless it would hide a part of this object.
        own = [
            (key, value) for key, value in unknown if not key.startswith("_") and not hasattr(Settings, key)
        ]
        for name, value in (*checked.items(), *own):
            if rank >= origins.get(name, (DEFAULT, ""))[0]:
                values[name] = value
                key = chosen[name][0] if name in chosen else name
                origins[name] = (rank, source if key == name else f"{key} in {source}")

        inert = [chosen[name][0] for name in chosen if name not in SETTINGS]
        if inert:
            notes.append((f"without effect in miniq: {', '.join(inert)} (from {source})", UserWarning))
        self._unknown.extend(texts)
        notes.extend((text, UnknownSettingWarning) for text in texts)
        for text, _ in notes:
            if text not in self._warnings:
                self._warnings.append(text)
        if found and self._on_change is not None:
            self._on_change()
        for text, category in notes:
            _warnings.warn(text, category, stacklevel=3)

    @staticmethod
    def _checked(name: str, key: str, value: Any, source: str) -> Any:
        setting = SETTINGS.get(name)
        if setting is None:
            return value
        try:
            return setting.checked(value)
        except (TypeError, ValueError) as error:
            raise ImproperlyConfigured(f"{key} = {_shown(name, value)} in {source}: {error}") from None

    @staticmethod
    def _unknown_text(key: str, prefix: str, source: str) -> str:
        if prefix:
            hint = suggest(key[len(prefix) :].lower())
            spelling = prefix + hint.upper() if hint else None
        else:
            spelling = suggest(key)
        return f"unknown setting {key!r} in {source}" + (f" (did you mean {spelling}?)" if spelling else "")


def _resolve_in(key: str, prefix: str) -> Optional[str]:
    """Return the setting that `key` means where settings begin with `prefix` (may be empty)."""
    if not prefix:
        return resolve(key)
    if key.upper().startswith(prefix):
        return resolve(key[len(prefix) :].lower()) or (_OLD_NAMES.get(key) if prefix == "CELERY_" else None)
    if prefix == "CELERY_" and key.startswith(("CELERYD_", "CELERYBEAT_")):
        return _OLD_NAMES.get(key)
    return None


def _accepts(setting: Setting, value: Any) -> bool:
    try:
        setting.checked(value)
    except (TypeError, ValueError):
        return False
    return True


def _description(obj: Any) -> str:
    if isinstance(obj, ModuleType):
        return f"module {obj.__name__}"
    if isinstance(obj, Mapping):
        return "a dict"
    owner = obj if isinstance(obj, type) else type(obj)
    return f"{owner.__module__}.{owner.__qualname__}"


def _censored(name: str, value: Any) -> Any:
    """Return `value` with what must not be shown replaced, in dicts and lists too."""
    if _HIDDEN.search(name) and value and not isinstance(value, (bool, int, float)):
        return _HIDDEN_TEXT
    if isinstance(value, str):
        return mask_urls(value)
    if isinstance(value, dict):
        return {key: _censored(str(key), item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_censored(name, item) for item in value]
    return value


def _shown(name: str, value: Any) -> str:
    return safe_repr(_censored(name, value), 200)

# SPDX-License-Identifier: MIT
"""Settings: the table, checks, old names, typos, sources, and what may be shown."""

from __future__ import annotations

import copy
import json
import pickle
import types
import warnings
from datetime import timedelta, timezone
from typing import Any, Callable, Dict, List

import pytest

from miniq import conf
from miniq.conf import CELERY_ONLY, OWN_SETTINGS, SETTINGS, Settings
from miniq.connections.redis_options import Options
from miniq.exceptions import ImproperlyConfigured, UnknownSettingWarning


def module(**values: Any) -> types.ModuleType:
    made = types.ModuleType("proj.settings")
    made.__dict__.update(values)
    return made


# -- the table -----------------------------------------------------------------------------------


def test_table_and_class_annotations_agree() -> None:
    declared = {name: kind for name, kind in Settings.__annotations__.items() if not name.startswith("_")}
    assert declared == {name: setting.type for name, setting in SETTINGS.items()}
    assert list(declared) == list(SETTINGS)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_each_row_is_whole_and_its_default_passes_its_own_check(setting: conf.Setting) -> None:
    assert setting.doc and setting.expectation
    assert setting.checked(setting.default) == setting.default
    if not setting.type.startswith("Optional[") and setting.type != "Any":
        with pytest.raises(ValueError, match="expected"):
            setting.checked(None)
    if setting.type != "Any":
        with pytest.raises(ValueError, match="expected"):
            setting.checked(object())


def test_no_name_means_two_things() -> None:
    names = [*SETTINGS, *sorted(CELERY_ONLY)]
    assert not SETTINGS.keys() & CELERY_ONLY
    assert not OWN_SETTINGS - SETTINGS.keys()
    old = [conf.old_name(name) for name in names if name not in OWN_SETTINGS]
    assert len(old) == len(set(old))
    for name in names:
        assert conf.resolve(name) == name
        assert conf.resolve(name.upper()) == name
        assert not hasattr(Settings, name), "a method of this name would be hidden"
        # With the namespace CELERY the prefix is only taken off.
        assert conf._resolve_in("CELERY_" + name.upper(), "CELERY_") == name
        if name not in OWN_SETTINGS:
            assert conf.resolve(conf.old_name(name)) == name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("CELERY_ACKS_LATE", "task_acks_late"),
        ("CELERYD_CONCURRENCY", "worker_concurrency"),
        ("BROKER_URL", "broker_url"),
        ("CELERY_RESULT_BACKEND", "result_backend"),
        ("CELERY_TASK_RESULT_EXPIRES", "result_expires"),
        ("CELERY_TIMEZONE", "timezone"),
        ("CELERY_MESSAGE_COMPRESSION", "task_compression"),
        ("CELERY_TASK_SERIALIZER", "task_serializer"),
        ("CELERYD_TASK_SOFT_TIME_LIMIT", "task_soft_time_limit"),
        ("CELERY_SEND_EVENTS", "worker_send_task_events"),
        ("CELERY_DISABLE_RATE_LIMITS", "worker_disable_rate_limits"),
        ("CELERY_REDIS_HOST", "redis_host"),
        ("CELERYBEAT_SCHEDULE", "beat_schedule"),
        ("CELERY_EVENT_QUEUE_TTL", "event_queue_ttl"),
        ("CELERY_EAGER_PROPAGATES_EXCEPTIONS", "task_eager_propagates"),
        ("CELERY_RESULT_DBURI", "database_url"),
        ("CELERYD_MAX_TASKS_PER_CHILD", "worker_max_tasks_per_child"),
        ("CELERY_DEFAULT_QUEUE", "task_default_queue"),
        ("CELERY_IMPORTS", "imports"),
        ("CELERYD_PREFETCH_MULTIPLIER", "worker_prefetch_multiplier"),
    ],
)
def test_old_names_are_known(old: str, new: str) -> None:
    assert conf.resolve(old) == new


def test_safer_defaults_than_celerys_and_the_same_elsewhere() -> None:
    settings = Settings()
    assert (settings.worker_prefetch_multiplier, settings.worker_hijack_root_logger) == (1, False)
    assert (settings.worker_redirect_stdouts, settings.task_delivery_limit) == (False, 3)
    assert settings.broker_url is None and settings.result_backend is None
    assert (settings.accept_content, settings.task_serializer, settings.result_expires) == (
        ["json"],
        "json",
        86400,
    )


def test_two_objects_share_no_default() -> None:
    one, two = Settings(), Settings()
    one.accept_content.append("pickle")
    one.task_publish_retry_policy["max_retries"] = 9
    assert two.accept_content == ["json"] == Settings().accept_content
    assert two.task_publish_retry_policy["max_retries"] == 3


# -- typos ---------------------------------------------------------------------------------------


def test_every_one_letter_deletion_suggests_the_name_that_was_meant() -> None:
    for setting in SETTINGS.values():
        for name in filter(None, (setting.name, setting.old_name)):
            for i in range(len(name)):
                typo = name[:i] + name[i + 1 :]
                if typo in ("beat_schedule", "CELERYBEAT_SCHEDULE"):
                    continue  # beat_scheduler without its last letter is another setting
                assert conf.resolve(typo) is None, typo
                # Only beat_schedule and beat_scheduler are as near to the same misspelling.
                assert conf.suggest(typo) in (name, name[:-1])


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("task_acks_latee", "task_acks_late"), ("worker_prefetch_multiplyer", "worker_prefetch_multiplier"),
     ("prefetch_multiplier", "worker_prefetch_multiplier"), ("BROKER_ULR", "BROKER_URL")],
)  # fmt: skip
def test_an_unknown_setting_is_warned_of_kept_and_remembered(typo: str, meant: str) -> None:
    settings = Settings()
    with pytest.warns(
        UnknownSettingWarning, match=rf"unknown setting '{typo}' in app.conf .did you mean {meant}"
    ):
        settings.update({typo: 5})
    assert len(settings.warnings) == 1
    assert settings[typo] == 5
    with pytest.warns(UnknownSettingWarning):
        setattr(settings, typo, 6)
    assert len(settings.warnings) == 1, "the same text once"
    with pytest.warns(UnknownSettingWarning, match="in the app "):
        Settings({typo: 5})


def test_strict_settings_refuse_the_unknown_in_any_order() -> None:
    with pytest.raises(
        ImproperlyConfigured, match=r"task_acks_latee.*did you mean task_acks_late.*strict_settings is on"
    ):
        Settings({"task_acks_latee": True, "strict_settings": True})
    settings = Settings()
    with pytest.warns(UnknownSettingWarning):
        settings.update(task_acks_latee=True)
    with pytest.raises(ImproperlyConfigured, match="task_acks_latee"):
        settings.strict_settings = True
    settings = Settings({"strict_settings": True})
    with pytest.raises(ImproperlyConfigured, match="nothing_like_it_at_all"):
        settings.nothing_like_it_at_all = 1
    assert "nothing_like_it_at_all" not in settings


def test_reading_an_unknown_name_suggests_one() -> None:
    settings = Settings()
    with pytest.raises(AttributeError, match=r"no setting 'task_serialiser' .did you mean task_serializer"):
        settings.task_serialiser  # noqa: B018
    with pytest.raises(AttributeError, match="without effect"):
        settings.mongodb_backend_settings  # noqa: B018
    with pytest.raises(KeyError):
        settings["nope"]
    assert settings.get("nope", 7) == 7


def test_an_unknown_name_cannot_hide_a_part_of_the_object() -> None:
    settings = Settings()
    with pytest.warns(UnknownSettingWarning):
        settings.update({"update": 1, "_origins": 2, "keys": 3})
    settings.update(task_acks_late=True)
    assert settings.keys()[: len(SETTINGS)] == list(SETTINGS)


# -- checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expectation"),
    [
        ("worker_concurrency", "5", "expected a whole number, at least 1 or None"),
        ("worker_concurrency", 0, "at least 1"),
        ("worker_concurrency", True, "whole number"),
        ("worker_prefetch_multiplier", -1, "at least 0"),
        ("worker_prefetch_multiplier", 1.5, "whole number"),
        ("task_acks_late", 1, "expected True or False"),
        ("task_acks_late", "yes", "True or False"),
        ("worker_proc_alive_timeout", float("nan"), "a number"),
        ("worker_proc_alive_timeout", float("inf"), "a number"),
        ("worker_proc_alive_timeout", 0, "at least 0.001"),
        ("task_default_priority", 256, "from 0 to 255"),
        ("task_serializer", None, "expected text"),
        ("accept_content", {"json": 1}, "a list of names"),
        ("accept_content", [1], "a list of names"),
        ("task_default_exchange_type", "drect", "one of 'direct', 'topic', 'fanout', 'headers'"),
        ("task_protocol", 1, "one of 2"),
        ("worker_pool_start_method", "clone", "one of 'fork', 'forkserver', 'spawn' or None"),
        ("task_default_rate_limit", "10/d", "Invalid rate limit string: '10/d'"),
        ("timezone", "Europe/Pariss", "unknown time zone 'Europe/Pariss'|no time zone database"),
        ("timezone", 3, "the name of a time zone"),
        ("worker_redirect_stdouts_level", "LOUD", "a log level: DEBUG"),
        ("task_publish_retry_policy", {"max_retrys": 3}, "no 'max_retrys' in it"),
        ("task_publish_retry_policy", {"max_retries": -1}, "max_retries must be a number, at least 0"),
        ("task_publish_retry_policy", {"interval_step": "1"}, "interval_step must be a number"),
        ("broker_transport_options", [], "a dict"),
        ("broker_url", 5, "a URL or a list of URLs"),
        ("result_expires", "1d", "a number of seconds or a timedelta"),
        ("result_expires", timedelta(-1), "at least 0"),
        ("broker_use_ssl", "yes", "True, False or a dict or None"),
        ("redis_port", 65536, "a whole number from 1 to 65535 or None"),
        ("broker_failover_strategy", "random", "one of 'round-robin', 'shuffle' or None"),
        ("broker_connection_timeout", 0, "a number, at least 0.001"),
    ],
)
def test_a_wrong_value_is_refused_naming_setting_value_and_expectation(
    name: str, value: Any, expectation: str
) -> None:
    settings = Settings()
    before = settings[name]
    writes: List[Callable[[], None]] = [
        lambda: setattr(settings, name, value),
        lambda: settings.update({name: value}),
        lambda: settings.__setitem__(name, value),
        lambda: settings.from_object({conf.old_name(name): value}),
    ]
    for write in writes:
        with pytest.raises(ImproperlyConfigured, match=expectation) as caught:
            write()
        assert str(caught.value).startswith((name, conf.old_name(name)))
    assert settings[name] == before
    assert not settings.changes()


def test_right_values_are_kept_in_one_form() -> None:
    settings = Settings(
        {
            "imports": "proj.tasks",
            "accept_content": ("json", "pickle"),
            "result_expires": timedelta(hours=1),
            "worker_max_tasks_per_child": 0,
            "task_time_limit": 1.5,
            "timezone": timezone.utc,
            "broker_url": ["a://", "b://"],
            "task_default_rate_limit": "10/m",
            "worker_redirect_stdouts_level": "info",
            "worker_pool": dict,
            "task_publish_retry_policy": {"max_retries": None},
        }
    )
    assert settings.imports == ["proj.tasks"]
    assert settings.accept_content == ["json", "pickle"]
    assert settings.result_expires == 3600.0
    assert settings.worker_max_tasks_per_child is None
    assert settings.task_time_limit == 1.5
    assert settings.task_publish_retry_policy["max_retries"] is None
    assert settings.task_publish_retry_policy["interval_step"] == 0.2, "what is not said keeps its default"


def test_an_update_with_one_wrong_value_changes_nothing() -> None:
    settings = Settings()
    with pytest.raises(ImproperlyConfigured):
        settings.update({"task_acks_late": True, "worker_concurrency": "2"})
    assert settings.task_acks_late is False
    assert not settings.changes()


def test_a_refused_value_is_shown_without_its_secrets() -> None:
    settings = Settings()
    with pytest.raises(ImproperlyConfigured, match="at least") as caught:
        settings.from_object({"CELERYD_PROC_ALIVE_TIMEOUT": -1})
    assert "CELERYD_PROC_ALIVE_TIMEOUT = -1 in a dict: expected" in str(caught.value)
    for name, value in (
        ("broker_url", {"u": "redis://:hunter2@h"}),
        ("broker_transport_options", ["redis://:hunter2@h"]),
        ("imports", {"password": "hunter2"}),
    ):
        with pytest.raises(ImproperlyConfigured) as caught:
            settings[name] = value
        assert "hunter2" not in str(caught.value)


def test_check_finds_a_soft_limit_beyond_the_hard_one() -> None:
    settings = Settings({"task_time_limit": 10, "task_soft_time_limit": 5})
    settings.check()
    settings.task_soft_time_limit = 60
    with pytest.raises(ImproperlyConfigured, match="task_soft_time_limit = 60 can never be reached"):
        settings.check()


# -- reading -------------------------------------------------------------------------------------


def test_attribute_item_and_get_read_the_same_by_every_name() -> None:
    settings = Settings()
    settings.task_acks_late = True
    assert settings.__dict__["task_acks_late"] is True, "a plain instance attribute"
    assert settings["task_acks_late"] is settings["CELERY_ACKS_LATE"] is settings.CELERY_ACKS_LATE is True
    assert settings.get("TASK_ACKS_LATE") is True
    assert "CELERY_ACKS_LATE" in settings and "task_acks_late" in settings and "_origins" not in settings
    settings.CELERYD_CONCURRENCY = 3
    assert settings.worker_concurrency == 3
    assert dict(settings.items()).keys() == set(settings) == set(settings.keys()) == SETTINGS.keys()
    assert len(settings) == len(SETTINGS)


def test_settings_survive_pickle_and_copies() -> None:
    settings = Settings({"task_acks_late": True})
    settings.on_change = lambda: None
    for other in (pickle.loads(pickle.dumps(settings)), copy.copy(settings), copy.deepcopy(settings)):
        assert other.task_acks_late is True
        assert other.changes() == settings.changes()
        assert other.on_change is None


def test_on_change_is_told_once_per_change() -> None:
    settings = Settings()
    seen: List[Any] = []
    settings.on_change = lambda: seen.append(settings.worker_concurrency)
    settings.worker_concurrency = 2
    settings.update(worker_concurrency=3, task_acks_late=True)
    settings.update({})
    assert seen == [2, 3]


def test_settings_cannot_be_deleted() -> None:
    settings = Settings()
    with pytest.raises(AttributeError, match="set task_acks_late to its default instead"):
        del settings.task_acks_late


# -- sources -------------------------------------------------------------------------------------


def test_old_and_new_names_mix_and_it_is_remembered_what_was_read_from_where() -> None:
    settings = Settings()
    settings.from_object(
        module(
            CELERY_ACKS_LATE=True, task_serializer="pickle", BROKER_URL="memory://", TASK_TRACK_STARTED=True
        )
    )
    settings.worker_concurrency = 4
    assert settings.changes() == {
        "task_acks_late": (True, "CELERY_ACKS_LATE in module proj.settings"),
        "task_serializer": ("pickle", "module proj.settings"),
        "broker_url": ("memory://", "BROKER_URL in module proj.settings"),
        "task_track_started": (True, "TASK_TRACK_STARTED in module proj.settings"),
        "worker_concurrency": (4, "app.conf"),
    }
    assert settings.warnings == []


def test_two_spellings_of_one_setting_are_told_and_the_present_one_counts() -> None:
    for values in (
        {"CELERY_ACKS_LATE": False, "task_acks_late": True},
        {"task_acks_late": True, "CELERY_ACKS_LATE": False},
    ):
        settings = Settings()
        with pytest.warns(
            UserWarning,
            match="a dict sets task_acks_late twice; task_acks_late counts, CELERY_ACKS_LATE does",
        ):
            settings.from_object(values)
        assert settings.task_acks_late is True


def test_a_namespace_takes_its_prefix_off_in_both_cases() -> None:
    settings = Settings()
    settings.from_object(
        module(
            CELERY_TASK_ACKS_LATE=True,
            celery_worker_concurrency=2,
            TASK_SERIALIZER="no",
            BROKER_URL="no://",
            CELERY_BROKER_URL="memory://",
            CELERY_TRACK_STARTED=True,
            CELERYD_TASK_TIME_LIMIT=9,
            DEBUG=True,
        ),
        namespace="CELERY",
    )
    assert settings.table() == {
        "broker_url": "memory://", "task_acks_late": True, "task_time_limit": 9, "task_track_started": True,
        "worker_concurrency": 2,
    }  # fmt: skip
    other = Settings()
    other.from_object({"MQ_TASK_ACKS_LATE": True, "CELERY_TASK_TIME_LIMIT": 9}, namespace="mq_")
    assert other.table() == {"task_acks_late": True}


def test_an_unknown_name_in_the_namespace_is_warned_of_in_its_own_spelling() -> None:
    settings = Settings()
    with pytest.warns(
        UnknownSettingWarning,
        match="'CELERY_TASK_ACKS_LAT' in module proj.settings .did you mean CELERY_TASK_ACKS_LATE",
    ):
        settings.from_object(module(CELERY_TASK_ACKS_LAT=True), namespace="CELERY")


def test_a_module_may_hold_other_things_but_near_misses_are_reported() -> None:
    settings = Settings()
    held = module(
        DEBUG=True, SECRET_KEY="x", tasks=[], Path=dict, json=json, helper=len, _private=1, tasks_late=1
    )
    settings.from_object(held)
    assert not settings.changes() and not settings.warnings
    held.__dict__.update(task_ack_late=True)
    held.__dict__.update(CELERYD_CONCURENCY=3)
    with pytest.warns(UnknownSettingWarning) as caught:
        settings.from_object(held)
    assert [str(warning.message) for warning in caught] == [
        "unknown setting 'CELERYD_CONCURENCY' in module proj.settings (did you mean CELERYD_CONCURRENCY?)",
        "unknown setting 'task_ack_late' in module proj.settings (did you mean task_acks_late?)",
    ]
    with pytest.raises(ImproperlyConfigured, match="CELERYD_CONCURENCY"):
        held.__dict__.update(strict_settings=True)
        Settings().from_object(held)


def test_every_unknown_key_of_a_dict_is_reported() -> None:
    with pytest.warns(UnknownSettingWarning, match="'DEBUG' in a dict"):
        Settings().from_object({"DEBUG": True, "_internal": 1, 5: 6})


def test_imported_names_that_happen_to_be_settings_are_not_settings() -> None:
    settings = Settings()
    settings.from_object(module(timezone=timezone, include=len, imports=json, task_routes=len))
    assert settings.table() == {"task_routes": len}, "a router may be a function"


def test_classes_and_instances_are_sources_too() -> None:
    class Base:
        task_acks_late = True

    class Config(Base):
        worker_concurrency = 2

        def __init__(self) -> None:
            self.task_serializer = "pickle"

        def helper(self) -> None: ...

    settings = Settings()
    settings.from_object(Config())
    assert settings.table() == {"task_acks_late": True, "task_serializer": "pickle", "worker_concurrency": 2}
    assert settings.changes()["task_acks_late"][1].endswith("Config")
    other = Settings()
    other.from_object(Config)
    assert other.table() == {"task_acks_late": True, "worker_concurrency": 2}


def test_the_later_or_stronger_source_wins() -> None:
    settings = Settings()
    settings.update({"worker_concurrency": 4}, source="the command line", rank=conf.COMMAND_LINE)
    settings.task_serializer = "pickle"
    settings.from_object({"worker_concurrency": 1, "task_serializer": "json", "task_acks_late": True})
    settings.add_defaults({"task_acks_late": False, "task_track_started": True})
    settings.worker_concurrency = 2
    assert settings.table() == {
        "task_acks_late": True,
        "task_serializer": "pickle",
        "task_track_started": True,
        "worker_concurrency": 4,
    }
    assert settings.changes()["worker_concurrency"] == (4, "the command line")
    settings.from_object({"task_acks_late": False})
    assert settings.task_acks_late is False


def test_celerys_other_settings_are_kept_and_named_in_one_warning() -> None:
    settings = Settings()
    with pytest.warns(UserWarning, match=r"without effect in miniq: .*mongodb") as caught:
        settings.from_object(
            {
                "mongodb_backend_settings": {"host": "h"},
                "CELERYD_AUTOSCALER": "a",
                "cassandra_port": 1,
                "worker_agent": None,
            }
        )
    assert len(caught) == 1
    assert not issubclass(caught[0].category, UnknownSettingWarning)
    assert all(
        name in str(caught[0].message) for name in ("CELERYD_AUTOSCALER", "cassandra_port", "worker_agent")
    )
    assert settings.mongodb_backend_settings == {"host": "h"} and settings.worker_autoscaler == "a"
    assert settings.warnings == [str(caught[0].message)]
    strict = Settings({"strict_settings": True})
    with pytest.warns(UserWarning, match="without effect"):
        strict.update(redis_retry_on_timeout=True)


def test_no_documented_celery_name_is_unknown() -> None:
    for name in (*SETTINGS, *CELERY_ONLY):
        if name in OWN_SETTINGS:
            continue
        for spelling in (name, conf.old_name(name)):
            settings = Settings()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                settings.from_object({spelling: SETTINGS[name].default if name in SETTINGS else None})
            assert not [one for one in caught if issubclass(one.category, UnknownSettingWarning)], spelling
            assert name in settings.changes()


# -- showing -------------------------------------------------------------------------------------


def test_secrets_are_masked_wherever_they_sit() -> None:
    settings = Settings(
        {
            "broker_url": "redis://:hunter2@h/0;redis://:hunter2@i/0",
            "result_backend": "sqlite:///x.db?password=hunter2",
            "broker_transport_options": {
                "sentinel_kwargs": {"password": "hunter2"},
                "urls": ["amqp://u:hunter2@h"],
                "db": 3,
            },
            "task_default_routing_key": "visible",
        }
    )
    with pytest.warns(UserWarning):
        settings.update(redis_password="hunter2", security_key="hunter2", redis_socket_keepalive=True)
    settings.redis_backend_use_ssl = {"ssl_password": "hunter2"}
    for text in (
        settings.humanize(),
        settings.humanize(with_defaults=True),
        repr(settings.table()),
        repr(settings),
    ):
        assert "hunter2" not in text
    assert settings.table()["task_default_routing_key"] == "visible"
    assert settings.table()["redis_socket_keepalive"] is True
    assert settings.table()["broker_transport_options"]["db"] == 3
    assert settings.table(censored=False)["redis_password"] == "hunter2"
    assert settings.table()["broker_url"] == "redis://:**@h/0;redis://:**@i/0"


def test_humanize_shows_what_was_set_or_all() -> None:
    settings = Settings({"worker_concurrency": 4, "task_acks_late": True})
    assert settings.humanize() == "task_acks_late: True\nworker_concurrency: 4"
    assert len(settings.humanize(with_defaults=True).splitlines()) == len(SETTINGS)


# -- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("worker_concurrency", "4", 4),
        ("worker_concurrency", "none", None),
        ("task_acks_late", "on", True),
        ("task_acks_late", "0", False),
        ("task_time_limit", "1.5", 1.5),
        ("imports", "a.b, c", ["a.b", "c"]),
        ("broker_url", "memory://", "memory://"),
        ("task_serializer", "json", "json"),
        ("broker_transport_options", '{"a": 1}', {"a": 1}),
        ("task_default_rate_limit", "10/m", "10/m"),
        ("CELERYD_CONCURRENCY", "2", 2),
        ("task_routes", '{"a": "q"}', {"a": "q"}),
        ("result_expires", "60", 60),
    ],
)
def test_settings_are_read_from_text(name: str, text: str, value: Any) -> None:
    assert conf.parse_setting(name, text) == value


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("worker_concurrency", "many", "worker_concurrency = 'many': expected a whole number"),
        ("task_acks_late", "perhaps", "expected True or False"),
        ("worker_concurency", "1", "did you mean worker_concurrency"),
    ],
)
def test_wrong_text_is_refused(name: str, text: str, error: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=error):
        conf.parse_setting(name, text)


def test_an_unknown_type_of_source_reads_nothing() -> None:
    empty: Dict[str, Any] = {}
    settings = Settings(empty)
    settings.from_object(object())
    assert settings.table() == {}


# -- Redis ---------------------------------------------------------------------------------------


def test_messages_and_results_on_one_redis_server_share_their_connections_unless_told_otherwise() -> None:
    settings = Settings()
    url = "redis://h"
    read = [Options.read(settings.options_for_redis(results), url) for results in (False, True)]
    assert read[0] == read[1] == Options()
    settings.update(broker_pool_limit=3, broker_connection_timeout=1.5)
    read = [Options.read(settings.options_for_redis(results), url) for results in (False, True)]
    assert read[0] == read[1]
    assert (read[0].max_connections, read[0].socket_connect_timeout) == (3, 1.5)


def test_settings_of_the_broker_connection_become_options_of_a_redis_broker() -> None:
    settings = Settings(
        {
            "broker_pool_limit": 0,
            "broker_connection_timeout": 2,
            "broker_use_ssl": {"keyfile": "k", "ssl_cert_reqs": "optional"},
            "redis_password": "for results",
            "redis_socket_timeout": 9,
        }
    )
    options = Options.read(settings.options_for_redis(False), "redis://h")
    assert settings.broker_pool_limit is None
    assert options == Options(
        max_connections=conf.NO_POOL_LIMIT, socket_connect_timeout=2, ssl=True, ssl_keyfile="k",
        ssl_cert_reqs="optional",
    )  # fmt: skip


#: Setting -> a value, the option, what that is then.
REDIS_SETTINGS = {
    "redis_username": ("u", "username", "u"),
    "redis_password": ("p", "password", "p"),
    "redis_client_name": ("me", "client_name", "me"),
    "redis_max_connections": (4, "max_connections", 4),
    "redis_socket_timeout": (7, "socket_timeout", 7.0),
    "redis_socket_connect_timeout": (3, "socket_connect_timeout", 3.0),
    "redis_socket_keepalive": (False, "socket_keepalive", False),
    "redis_backend_health_check_interval": (60, "health_check_interval", 60.0),
    "redis_backend_use_ssl": (True, "ssl", True),
}


@pytest.mark.parametrize("name", REDIS_SETTINGS)
def test_setting_becomes_an_option_of_redis_results(name: str) -> None:
    value, option, expected = REDIS_SETTINGS[name]
    settings = Settings({name: value})
    assert Options.read(settings.options_for_redis(True), "") == Options()._replace(**{option: expected})
    assert Options.read(settings.options_for_redis(False), "") == Options(), "none of the broker's"


def test_transport_options_go_before_settings_and_the_url_before_both() -> None:
    settings = Settings(
        {
            "broker_pool_limit": 3,
            "redis_socket_timeout": 7,
            "broker_transport_options": {"max_connections": 5, "visibility_timeout": 3600},
            "result_backend_transport_options": {"socket_timeout": 6, "global_keyprefix": "x"},
        }
    )
    broker = settings.options_for_redis(False)
    assert Options.read(broker, "redis://h").max_connections == 5
    assert Options.read(broker, "redis://h?max_connections=6").max_connections == 6
    results = Options.read(settings.options_for_redis(True), "redis://h")
    assert (results.socket_timeout, results.max_connections, results.global_keyprefix) == (6.0, 3, "x")

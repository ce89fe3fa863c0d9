# SPDX-License-Identifier: MIT
"""The app: its settings, its modules, what is current, and where messages and results go."""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from bench import Bench, new_broker

import miniq
from miniq import Celery, MiniQ, _state, signals
from miniq.app import DEFAULT_URL
from miniq.backends.base import StoredResult
from miniq.connections.redis import Options, Server
from miniq.exceptions import ImproperlyConfigured, UnknownSettingWarning

#: The class without its types: for what they would not allow.
make: Any = MiniQ


@pytest.fixture
def app() -> MiniQ:
    return MiniQ("tests", broker=new_broker())


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Write modules that can be imported during the test: ``write(name="source", ...)``."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def make(files: Dict[str, str]) -> None:
        for name, source in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")

    yield make
    for name in set(sys.modules) - before:
        del sys.modules[name]


# -- making one ------------------------------------------------------------------------------------


def test_nothing_configured_means_a_file_in_the_current_folder() -> None:
    app = MiniQ("proj")
    assert DEFAULT_URL == "sqlite:///miniq.db"
    assert (app.broker_url(), app.broker_url(write=True), app.backend_url()) == (DEFAULT_URL,) * 3
    assert repr(app) == "<MiniQ proj>"


def test_results_live_beside_the_messages_unless_told_otherwise() -> None:
    assert MiniQ(broker="memory://x").backend_url() == "memory://x"
    assert MiniQ(broker="memory://x", backend="memory://y").backend_url() == "memory://y"
    assert MiniQ(broker="memory://x", result_backend="disabled://").backend_url() == "disabled://"
    assert MiniQ(broker="redis://somewhere").backend_url() == "disabled://"


def test_any_setting_may_be_given_as_a_keyword() -> None:
    app = Celery(
        "proj", broker="memory://x", include="proj.tasks", task_acks_late=True, changes={"imports": "x"}
    )
    assert isinstance(app, MiniQ)
    assert (app.conf.include, app.conf.imports, app.conf.task_acks_late) == (["proj.tasks"], ["x"], True)
    with pytest.warns(UnknownSettingWarning, match="did you mean task_acks_late"):
        MiniQ("proj", task_acks_latee=True)


@pytest.mark.parametrize("argument", ["loader", "amqp", "fixups", "tasks"])
def test_plug_in_points_that_are_not_there_are_refused(argument: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=f"argument {argument}"):
        make("proj", **{argument: object()})
    make("proj", **{argument: None})


@pytest.mark.parametrize("name", ["setup_security", "event_dispatcher", "amqp", "steps"])
def test_what_is_not_built_says_so(app: MiniQ, name: str) -> None:
    with pytest.raises(AttributeError, match=f"'{name}': Celery has it, this version of miniq does not"):
        getattr(app, name)
    assert not hasattr(app, "nonsense")
    assert not hasattr(app.control, "nonsense")


def test_the_public_names_are_all_there() -> None:
    for name in miniq.__all__:
        assert getattr(miniq, name, None) is not None or name == "current_task"


# -- settings --------------------------------------------------------------------------------------


def test_settings_are_read_from_modules_objects_and_dicts(app: MiniQ, write: Any) -> None:
    write({"proj_config.py": "task_serializer = 'pickle'\nCELERY_ACKS_LATE = True\n"})
    app.config_from_object("proj_config")
    assert (app.conf.task_serializer, app.conf.task_acks_late) == ("pickle", True)
    app.config_from_object(types.SimpleNamespace(task_default_queue="q"))
    app.config_from_object({"worker_concurrency": 3})
    assert (app.conf.task_default_queue, app.conf.worker_concurrency) == ("q", 3)
    other = MiniQ("other", broker="memory://x", config_source="proj_config:__dict__")
    assert other.conf.task_serializer == "pickle"


def test_a_namespace_picks_its_own(app: MiniQ, write: Any) -> None:
    write(
        {"settings.py": "CELERY_TASK_SERIALIZER = 'pickle'\nTASK_DEFAULT_QUEUE = 'not mine'\nDEBUG = True\n"}
    )
    app.config_from_object("settings", namespace="CELERY")
    assert (app.conf.task_serializer, app.conf.task_default_queue) == ("pickle", "celery")
    with pytest.warns(UnknownSettingWarning, match="CELERY_TASK_SERIALIZER"):
        app.config_from_object({"CELERY_TASK_SERIALIZR": "json"}, namespace="CELERY")


def test_a_module_that_does_not_exist_may_be_passed_over_its_errors_never(app: MiniQ, write: Any) -> None:
    write(
        {"broken.py": "import does_not_exist_either\n", "bad_from.py": "from os import nothing_like_this\n"}
    )
    with pytest.raises(ImportError, match="does_not_exist"):
        app.config_from_object("does_not_exist")
    app.config_from_object("does_not_exist", silent=True)
    for name in ("broken", "bad_from"):
        with pytest.raises(ImportError):
            app.config_from_object(name, silent=True)


def test_settings_named_by_the_environment(app: MiniQ, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write({"env_config.py": "task_serializer = 'pickle'\n"})
    monkeypatch.delenv("PROJ_CONFIG", raising=False)
    with pytest.raises(ImproperlyConfigured, match="'PROJ_CONFIG' is not set"):
        app.config_from_envvar("PROJ_CONFIG")
    assert app.config_from_envvar("PROJ_CONFIG", silent=True) is False
    monkeypatch.setenv("PROJ_CONFIG", "env_config")
    assert app.config_from_envvar("PROJ_CONFIG") is True
    assert app.conf.task_serializer == "pickle"


def test_defaults_hold_where_nobody_says_otherwise(app: MiniQ) -> None:
    app.conf.task_serializer = "pickle"
    app.add_defaults({"task_serializer": "yaml", "task_default_queue": "mine"})
    app.add_defaults(lambda: {"worker_concurrency": 2})
    assert app.conf.task_serializer == "pickle"
    assert (app.conf.task_default_queue, app.conf.worker_concurrency) == ("mine", 2)


def test_what_is_derived_from_settings_follows_them(app: MiniQ) -> None:
    assert app.router.queues.default_queue == "celery"
    app.conf.update(task_default_queue="jobs", accept_content=["json", "pickle"], timezone="Europe/Paris")
    assert app.router.queues.default_queue == "jobs"
    assert "application/x-python-serialize" in app.accept
    assert app.result_accept == app.accept
    app.conf.result_accept_content = ["json"]
    assert app.result_accept == {"application/json"}
    assert str(app.zone) == "Europe/Paris"
    assert str(app.now().tzinfo) == "Europe/Paris"


# -- modules ---------------------------------------------------------------------------------------


def package(**modules: str) -> Dict[str, str]:
    files = {"proj/__init__.py": ""}
    files.update({f"proj/{name}.py": source for name, source in modules.items()})
    return files


def test_discovery_imports_the_related_modules_when_a_worker_starts(app: MiniQ, write: Any) -> None:
    write({**package(tasks="found = 1"), "other/__init__.py": ""})
    app.autodiscover_tasks(["proj", "other"])
    app.autodiscover_tasks(lambda: ["proj"])
    assert "proj.tasks" not in sys.modules
    app.import_modules()
    assert "proj.tasks" in sys.modules
    assert "other.tasks" not in sys.modules


def test_discovery_may_be_forced_and_look_for_other_names(app: MiniQ, write: Any) -> None:
    write(package(jobs="found = 1"))
    app.autodiscover_tasks(["proj"], related_name="jobs", force=True)
    assert "proj.jobs" in sys.modules
    app.autodiscover_tasks(["proj.jobs"], related_name=None, force=True)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("import does_not_exist_either", ModuleNotFoundError),
        ("from proj import nothing", ImportError),
        ("def broken(:", SyntaxError),
        ("raise RuntimeError('at import')", RuntimeError),
        ("from proj import tasks as again; again.nothing", AttributeError),
        ("import proj.tasks.deeper", ModuleNotFoundError),
    ],
)
@pytest.mark.parametrize("how", ["autodiscover", "include", "imports"])
def test_an_error_inside_a_module_always_surfaces(
    app: MiniQ, write: Any, source: str, kind: type, how: str
) -> None:
    write(package(tasks=source))
    if how == "autodiscover":
        app.autodiscover_tasks(["proj"])
    else:
        app.conf[how] = ["proj.tasks"]
    with pytest.raises(kind):
        app.import_modules()


def test_a_package_or_an_included_module_that_does_not_exist_is_an_error(app: MiniQ, write: Any) -> None:
    write(package())
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        app.autodiscover_tasks(["no_such_package"], force=True)
    app.conf.include = ["proj.tasks"]
    with pytest.raises(ModuleNotFoundError, match=r"proj\.tasks"):
        app.import_modules()


def test_discovery_says_what_it_cannot_do(app: MiniQ) -> None:
    with pytest.raises(ImproperlyConfigured, match="INSTALLED_APPS"):
        app.autodiscover_tasks()
    with pytest.raises(TypeError, match="list of packages"):
        app.autodiscover_tasks("proj")


def test_the_end_of_the_imports_is_announced_once(app: MiniQ) -> None:
    heard: List[str] = []

    @app.on_after_finalize.connect
    def finalized(sender: Any, **_: Any) -> None:
        heard.append(f"finalized {sender.main}")

    @app.on_after_configure.connect
    def configured(sender: Any, source: Any, **_: Any) -> None:
        heard.append(f"configured {source is app.conf}")

    @signals.import_modules.connect(sender=app)
    def importing(**_: Any) -> None:
        heard.append("importing")

    app.import_modules()
    app.finalize()
    assert heard == ["importing", "configured True", "finalized tests"]


# -- what is current -------------------------------------------------------------------------------


def in_thread(call: Callable[[], Any]) -> Any:
    found: List[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def test_the_app_made_last_is_current_in_all_threads() -> None:
    one = MiniQ("one")
    assert miniq.current_app is in_thread(lambda: miniq.current_app) is one
    two = MiniQ("two")
    assert miniq.current_app is in_thread(lambda: miniq.current_app) is two
    MiniQ("three", set_as_current=False)
    assert miniq.current_app is two
    one.set_current()
    assert miniq.current_app is in_thread(lambda: miniq.current_app) is one


def test_a_default_that_was_chosen_stays_for_other_threads() -> None:
    one = MiniQ("one", set_as_current=False)
    one.set_default()
    two = MiniQ("two")
    assert miniq.current_app is two
    assert in_thread(lambda: miniq.current_app) is one


def test_no_attribute_of_the_package_is_invented() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = miniq.nonsense


def test_an_app_that_nobody_holds_is_forgotten() -> None:
    import gc

    def make() -> None:
        MiniQ("gone", set_as_current=False).task(name="t")(len)

    make()
    gc.collect()
    assert "gone" not in {app.main for app in _state.apps()}


# -- stores ----------------------------------------------------------------------------------------


def test_each_thread_has_its_own_backend(app: MiniQ) -> None:
    mine = app.backend
    assert app.backend is mine
    assert in_thread(lambda: app.backend) is not mine
    with app as same:
        assert same.backend is mine
    assert app.backend is not mine, "closed by leaving the block"


def test_a_tasks_own_backend_is_a_url_or_an_object(app: MiniQ) -> None:
    url = new_broker()
    by_url = app.task(name="by_url", backend=url)(lambda: 1)
    by_object = app.task(name="by_object", backend=app.new_backend(url))(lambda: 2)
    bench = Bench(app)
    for task, value in ((by_url, 1), (by_object, 2)):
        outcome = bench.call(task, task_id=task.name)
        assert outcome.results == []
        assert task.AsyncResult(task.name).get(timeout=1) == value
        assert task.backend.fetch([task.name])
        assert not app.AsyncResult(task.name).exists()
    result = by_url.apply_async(task_id="by_url")
    assert result.get(timeout=1) == 1


def test_what_the_own_backend_does_not_take_is_told(app: MiniQ, caplog: Any, tmp_path: Path) -> None:
    task = app.task(name="t", backend=f"sqlite:///{tmp_path}/no/such/folder/x.db")(lambda: 1)
    with contextlib.suppress(ImproperlyConfigured):
        assert Bench(app).call(task).state == "SUCCESS"
        assert "is lost" in caplog.text


# -- servers ---------------------------------------------------------------------------------------


def test_several_urls_are_a_list_or_one_text() -> None:
    urls = ["redis://one:6379/0", "redis://two:6379/0"]
    for given in (urls, "; ".join(urls), ";".join(urls)):
        app = make("tests", broker=given, result_backend="redis://one;redis://two/1")
        assert app.broker_url() == app.broker_url(write=True) == ";".join(urls)
        assert app.backend_url() == "redis://one;redis://two/1"
    app.conf.update(broker_write_url=["redis://three", "redis://four"], broker_read_url="redis://five")
    assert app.broker_url(write=True) == "redis://three;redis://four"
    assert app.broker_url() == "redis://five"
    app.conf.update(broker_url=[], broker_read_url=None)
    assert app.broker_url() == DEFAULT_URL
    app.conf.broker_url = "sqlite:///a;b.db"
    assert app.broker_url() == "sqlite:///a;b.db", "a semicolon in a name is not two names"


@pytest.mark.parametrize(
    "urls", ["sqlite:///a.db;sqlite:///b.db", "memory://a;redis://h", "redis://u:hunter2@h;sqlite:///b.db"]
)
def test_there_cannot_be_several_files_or_memories(urls: str) -> None:
    app = make("tests", broker=urls.split(";"), result_backend=urls)
    with pytest.raises(ImproperlyConfigured, match="names 2 brokers: of servers .redis://. there can be"):
        app.broker_url()
    with pytest.raises(ImproperlyConfigured, match="names 2 result backends") as caught:
        app.backend_url()
    assert "hunter2" not in str(caught.value)


def test_shuffled_urls_keep_their_order_in_one_process() -> None:
    urls = [f"redis://host{n}" for n in range(10)]
    orders = set()
    for _ in range(20):
        app = make(
            "tests", broker=urls, result_backend=";".join(urls), broker_failover_strategy="shuffle",
        )  # fmt: skip
        order = app.broker_url()
        assert sorted(order.split(";")) == urls
        assert app.broker_url() == app.backend_url() == order, "so that they are the same servers"
        orders.add(order)
    assert len(orders) > 1
    app.conf.broker_failover_strategy = "round-robin"
    assert app.broker_url() == ";".join(urls)


@pytest.mark.parametrize("url", ["redis", "redis://", "redis:///"])
def test_a_bare_redis_backend_is_where_the_settings_say(url: str) -> None:
    app = make("tests", broker="memory://x", result_backend=url)
    assert app.backend_url() == "redis://localhost:6379/0"
    app.conf.update(redis_host="h", redis_port=7000, redis_db=5)
    assert app.backend_url() == "redis://h:7000/5"
    app.conf.update(redis_host="::1", result_backend=url.replace("redis", "rediss"))
    assert app.backend_url() == "rediss://[::1]:7000/5"
    app.conf.result_backend = "redis:///3"
    assert app.backend_url() == "redis:///3", "what says more says all"


def test_settings_reach_the_redis_transport_and_backend_and_nobody_else() -> None:
    app = make("tests", broker="redis://h", result_backend="redis://h")
    app.conf.update(broker_pool_limit=2, redis_socket_timeout=1, broker_transport_options={"lease": 9})
    transport, backend = app.producer.new_transport(True), app.new_backend()
    assert transport.link.options == Options(max_connections=2, lease=9.0)
    assert backend._options == Options(max_connections=2, socket_timeout=1.0)
    app.conf.update(broker_url="sqlite:///x.db", result_backend="sqlite:///x.db", broker_transport_options={})
    app.producer.new_transport(True)
    app.new_backend()
    assert app.broker_options("sqlite:///x.db") == {}


@pytest.mark.parametrize(
    ("broker", "expected"),
    [("redis://h", True), ("sentinel://h", True), (None, False), ("memory://x", False)],
)
def test_it_is_known_whether_the_broker_is_a_server(broker: Any, expected: bool) -> None:
    assert make("tests", broker=broker).broker_is_server is expected


def test_results_on_a_server_with_a_password_from_the_settings(new_redis: Any) -> None:
    server = new_redis(password="pass/word")
    app = make("tests", broker="memory://x", result_backend="redis://")
    app.conf.update(redis_host="127.0.0.1", redis_port=server.port, redis_db=3, redis_client_name="me")
    app.conf.redis_password = server.password
    result = StoredResult("id", "SUCCESS", b'{"status": "SUCCESS"}', "application/json", "utf-8", None)
    app.backend.store([result])
    assert server.command("EXISTS", "celery-task-meta-id", db=3) == 1
    assert [client["name"] for client in server.clients()] == ["me"]
    app.close()
    Server.close_all()


# -- entrances -------------------------------------------------------------------------------------


def test_the_app_gives_workers_and_the_command_line(app: MiniQ, capsys: Any) -> None:
    add = app.task(name="add")(lambda x, y: x + y)
    with app.worker(concurrency=1):
        assert add.delay(2, 3).get(timeout=10) == 5
    assert app.Worker.__func__ is MiniQ.worker  # type: ignore[attr-defined]
    assert app.worker_main(["--help"]) == 0
    assert "--concurrency" in capsys.readouterr().out


def test_a_setting_may_be_given_as_none() -> None:
    app = MiniQ("none", result_expires=None, set_as_current=False)
    assert app.conf.result_expires is None

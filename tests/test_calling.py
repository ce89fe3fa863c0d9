# SPDX-License-Identifier: MIT
"""Calling tasks: options, routing, what is refused, publishing and its deadline, what it costs."""

from __future__ import annotations

import datetime
import os
import socket
import sys
import threading
import time
from typing import Any, Callable, Dict, List, Mapping, Sequence

import pytest
from bench import Bench, body_of, new_broker

from miniq import AsyncResult, Exchange, MiniQ, Queue, Task, signals
from miniq.exceptions import (
    AlwaysEagerIgnored,
    EncodeError,
    ImproperlyConfigured,
    OperationalError,
    QueueNotFound,
    UnknownOption,
)
from miniq.producer import CALL_OPTIONS, new_task_id
from miniq.times import to_epoch
from miniq.transports.base import TRANSPORTS, Publication
from miniq.transports.memory import MemoryTransport


@pytest.fixture
def app() -> MiniQ:
    return MiniQ("tests", broker=new_broker())


@pytest.fixture
def add(app: MiniQ) -> Any:
    return app.task(name="add")(lambda x, y: x + y)


def prepared(task: Any, *args: Any, **options: Any) -> Publication:
    return Bench(task.app).prepare(task, *args, **options)


def taken(app: MiniQ, queue: str = "celery") -> List[Any]:
    """Take what is in a queue, as deliveries."""
    transport = app.producer.new_transport(write=False)
    consumer = transport.consumer("test@here", [app.router.queues[queue]])
    found = list(consumer.poll(100))
    consumer.start(found)
    for delivery in found:
        consumer.ack(delivery)
    consumer.close()
    return found


# -- what arrives ----------------------------------------------------------------------------------


def test_delay_and_apply_async_put_a_message_into_the_default_queue(app: MiniQ, add: Any) -> None:
    first = add.delay(1, y=2)
    second = add.apply_async((1, 2), task_id="my-id")
    assert isinstance(first, AsyncResult)
    assert (second.id, second.task_name, str(second)) == ("my-id", "add", "my-id")
    deliveries = taken(app)
    assert [delivery.message.headers["id"] for delivery in deliveries] == [first.id, "my-id"]
    assert [(one.exchange, one.routing_key, one.queue) for one in deliveries] == [
        ("", "celery", "celery")
    ] * 2


def test_ids_are_random_uuid4() -> None:
    ids = [new_task_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert {one[14] for one in ids} == {"4"}
    assert {one[19] for one in ids} == set("89ab")
    assert {tuple(map(len, one.split("-"))) for one in ids} == {(8, 4, 4, 4, 12)}


def test_arguments_may_be_left_out_or_any_sequence(app: MiniQ) -> None:
    task = app.task(name="t")(lambda *args, **kwargs: None)
    assert [body_of(prepared(task, *args))[:2] for args in ((), (1,))] == [[[], {}], [[1], {}]]
    task.apply_async()
    task.apply_async([1], None)
    task.apply_async((), {"a": 1})
    assert len(taken(app)) == 3


def test_send_task_needs_no_code_and_uses_the_options_of_what_is_registered(app: MiniQ) -> None:
    app.task(name="here", queue="special", priority=3)(len)
    app.send_task("elsewhere.task", args=["x"], kwargs={"y": 1}, task_id="one", countdown=0)
    app.send_task("here", [[1]], queue=None)
    (first,) = taken(app)
    assert (first.message.headers["task"], first.message.headers["id"]) == ("elsewhere.task", "one")
    (second,) = taken(app, "special")
    assert second.message.priority == 3


def test_send_task_is_never_eager_and_says_so(app: MiniQ) -> None:
    app.conf.task_always_eager = True
    with pytest.warns(AlwaysEagerIgnored, match=r"elsewhere\.task"):
        app.send_task("elsewhere.task")
    assert len(taken(app)) == 1


# -- times -----------------------------------------------------------------------------------------


def test_a_naive_eta_is_in_the_apps_zone_and_travels_in_utc(app: MiniQ, add: Any) -> None:
    app.conf.timezone = "America/New_York"
    naive = datetime.datetime(2030, 7, 1, 12, 0)
    assert prepared(add, 1, 2, eta=naive).message.headers["eta"] == "2030-07-01T16:00:00+00:00"
    aware = naive.replace(tzinfo=datetime.timezone(datetime.timedelta(hours=5, minutes=30)))
    assert prepared(add, 1, 2, eta=aware).message.headers["eta"] == "2030-07-01T06:30:00+00:00"
    assert prepared(add, 1, 2, expires=naive).message.headers["expires"] == "2030-07-01T16:00:00+00:00"


def test_countdown_and_expires_are_seconds_from_now(add: Any) -> None:
    now = time.time()
    message = prepared(add, 1, 2, countdown=30, expires=120.5).message
    assert 29 < to_epoch(message.headers["eta"]) - now < 31
    assert 119 < to_epoch(message.headers["expires"]) - now < 122
    assert 119_000 < int(message.properties["expiration"]) <= 120_500
    assert prepared(add, 1, 2, countdown=0).message.headers["eta"] is None


def test_the_clock_is_the_apps(add: Any) -> None:
    app = MiniQ("tests", broker=new_broker(), wall=lambda: 0.0)
    message = prepared(app.task(name="t")(len), [], countdown=60, expires=90).message
    assert message.headers["eta"] == "1970-01-01T00:01:00+00:00"
    assert message.properties["expiration"] == "90000"
    assert app.now().isoformat() == "1970-01-01T00:00:00+00:00"


def test_what_expired_already_and_what_never_does_have_a_valid_expiration(add: Any) -> None:
    past = prepared(add, 1, 2, expires=datetime.datetime(2001, 1, 1)).message
    assert past.properties["expiration"] == "0"
    far = prepared(add, 1, 2, expires=datetime.datetime(2999, 1, 1)).message
    assert far.properties["expiration"] == "315360000000"


def test_expires_and_priority_of_the_task_hold_for_every_call(app: MiniQ) -> None:
    task = app.task(name="t", expires=60, priority=7, time_limit=20, soft_time_limit=10)(len)
    message = prepared(task, []).message
    assert message.properties["expiration"] in ("60000", "59999")
    assert (message.priority, message.headers["timelimit"]) == (7, [20, 10])
    assert prepared(task, [], priority=0).message.priority == 0
    app.conf.task_default_priority = 4
    assert prepared(app.task(name="u")(len), []).message.priority == 4


# -- routing ---------------------------------------------------------------------------------------


def test_a_call_goes_before_the_task_and_the_task_before_the_route(app: MiniQ) -> None:
    app.conf.task_routes = {"t.*": {"queue": "by_route", "priority": 2, "serializer": "pickle"}}
    plain, own = app.task(name="t.plain")(len), app.task(name="t.own", queue="by_task", priority=5)(len)
    keys = [
        prepared(task, [], queue=queue).routing_key for task in (plain, own) for queue in (None, "by_call")
    ]
    assert keys == ["by_route", "by_call", "by_task", "by_call"]
    assert [prepared(task, []).message.priority for task in (plain, own)] == [2, 5]
    assert prepared(plain, []).message.content_type == "application/x-python-serialize"


def test_exchange_and_routing_key_travel(app: MiniQ, add: Any) -> None:
    app.conf.task_queues = [Queue("img", Exchange("media", "topic"), routing_key="img.#")]
    found = prepared(add, 1, 2, exchange="media", routing_key="img.resize")
    assert (found.exchange, found.routing_key) == ("media", "img.resize")


def test_a_queue_nobody_configured_is_refused_when_told_so(app: MiniQ, add: Any) -> None:
    app.conf.task_create_missing_queues = False
    with pytest.raises(QueueNotFound, match="nowhere"):
        add.apply_async((1, 2), queue="nowhere")


@pytest.mark.parametrize(("given", "sent"), [(None, 2), (1, 1), (2, 2), ("transient", 1), ("persistent", 2)])
def test_the_delivery_mode_is_a_number_on_the_wire(app: MiniQ, add: Any, given: Any, sent: int) -> None:
    assert prepared(add, 1, 2, delivery_mode=given).message.properties["delivery_mode"] == sent
    app.conf.task_default_delivery_mode = given or 2
    assert prepared(add, 1, 2).message.properties["delivery_mode"] == sent


# -- inside a task ---------------------------------------------------------------------------------


def test_calls_inside_a_task_know_where_they_come_from(app: MiniQ, add: Any) -> None:
    sent: List[Any] = []

    @app.task(name="parent")
    def parent() -> None:
        sent.append(prepared(add, 1, 2).message)
        sent.append(prepared(add, 1, 2, root_id="r", parent_id="p").message)

    app.conf.task_inherit_parent_priority = True
    Bench(app).call(parent, task_id="one", root_id="root", priority=6)
    assert [(one.headers["root_id"], one.headers["parent_id"]) for one in sent] == [
        ("root", "one"),
        ("r", "p"),
    ]
    assert sent[0].priority == 6
    parent()
    assert sent[2].headers["root_id"] == sent[2].headers["id"], "a plain call is nobody's parent"


# -- what is shown ---------------------------------------------------------------------------------


def test_argsrepr_and_kwargsrepr_hide_secrets(add: Any) -> None:
    headers = prepared(
        add, "s3cret", kwargs={"y": "s3cret"}, argsrepr="(***)", kwargsrepr="{}"
    ).message.headers
    assert (headers["argsrepr"], headers["kwargsrepr"]) == ("(***)", "{}")


def test_how_deep_arguments_are_shown_is_a_setting(app: MiniQ, add: Any) -> None:
    app.conf.task_repr_maxlevels = 1
    assert prepared(add, [[1]], 2).message.headers["argsrepr"] == "([...], 2)"


def test_shadow_name_is_asked_when_the_call_says_nothing(app: MiniQ) -> None:
    class Shadowing(Task):
        def shadow_name(self, args: Any, kwargs: Any, options: Any) -> str:
            return f"show-{args[0]}"

    task = app.task(name="t", base=Shadowing)(lambda x: x)
    assert prepared(task, 1).message.headers["shadow"] == "show-1"
    assert prepared(task, 1, shadow="mine").message.headers["shadow"] == "mine"


# -- headers ---------------------------------------------------------------------------------------


def test_custom_headers_are_merged_in(add: Any) -> None:
    headers = prepared(add, 1, 2, headers={"x-tenant": "acme", "shadow": "by header"}).message.headers
    assert (headers["x-tenant"], headers["shadow"]) == ("acme", "by header")


def test_headers_that_could_not_travel_are_refused(add: Any) -> None:
    with pytest.raises(EncodeError, match="headers may hold plain JSON values only"):
        add.apply_async((1, 2), headers={"x": object()})
    with pytest.raises(ValueError, match="'retries' must be a whole number"):
        add.apply_async((1, 2), headers={"retries": "two"})


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("contdown", "countdown"),
        ("quue", "queue"),
        ("expire", "expires"),
        ("soft_timelimit", "soft_time_limit"),
    ],
)
def test_an_unknown_option_names_the_nearest(add: Any, wrong: str, right: str) -> None:
    with pytest.raises(UnknownOption, match=f"'{wrong}': did you mean '{right}'"):
        add.apply_async((1, 2), **{wrong: 1})
    with pytest.raises(TypeError, match=wrong):
        add.app.send_task("x", **{wrong: 1})


@pytest.mark.parametrize("option", ["connection", "mandatory", "immediate"])
def test_what_celery_has_and_this_version_has_not_is_refused(add: Any, option: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=f"calling option {option}"):
        add.apply_async((1, 2), **{option: {"task": "x"}})
    prepared(add, 1, 2, **{option: None})


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"countdown": -1}, ValueError, "countdown"),
        ({"eta": 5}, TypeError, "countdown"),
        ({"priority": 256}, ValueError, "0 to 255"),
        ({"priority": "high"}, TypeError, "priority"),
        ({"task_id": 5}, TypeError, "task_id"),
        ({"time_limit": -1}, ValueError, "time_limit"),
        ({"time_limit": float("nan")}, ValueError, "time_limit"),
        ({"time_limit": 1, "soft_time_limit": 2}, ValueError, "never reached"),
        ({"headers": "x"}, TypeError, "headers"),
        ({"shadow": 5}, TypeError, "shadow"),
        ({"serializer": "jsn"}, ImproperlyConfigured, "json"),
        ({"compression": "gzp"}, ImproperlyConfigured, "gzip"),
        ({"delivery_mode": 3}, ValueError, "persistent"),
        ({"link": "add"}, TypeError, "no signature"),
        ({"link_error": [5]}, TypeError, "no signature"),
        ({"chain": [{"subtask_type": "chord"}]}, ImproperlyConfigured, "needs the name of a task"),
        ({"chain": [{"task": "celery.chord", "subtask_type": "chord"}]}, ImproperlyConfigured, "a header"),
        ({"chord": "add"}, TypeError, "chord"),
        ({"link": {"task": "celery.group", "subtask_type": "group"}}, ImproperlyConfigured, "list of tasks"),
        ({"producer": object()}, TypeError, "Producer"),
        ({"retry_policy": {"max_retry": 1}}, ValueError, "max_retry"),
    ],
)
def test_values_that_cannot_be_are_refused_before_anything_is_sent(
    app: MiniQ, add: Any, options: Dict[str, Any], kind: type, words: str
) -> None:
    with pytest.raises(kind, match=words):
        add.apply_async((1, 2), **options)
    assert taken(app) == []


def test_a_task_as_callback_is_told_how_to_write_it(add: Any) -> None:
    with pytest.raises(TypeError, match=r"write add\.s\(\.\.\.\)"):
        add.apply_async((1, 2), link=add)


def test_what_cannot_be_written_is_named(add: Any) -> None:
    with pytest.raises(EncodeError, match=r"args\[1\]\['deep'\] \(object\)"):
        add.delay(1, {"deep": object()})


def test_every_option_is_documented_or_known(add: Any) -> None:
    documented = Task.apply_async.__doc__ or ""
    internal = {
        "producer", "connection", "confirm_timeout", "delivery_mode", "retries", "stamped_headers", "task_id",
        "replaced_task_nesting", "chord", "message_id", "app_id", "type", "user_id", "cluster_id",
        "timestamp",
    }  # fmt: skip
    assert {option for option in CALL_OPTIONS if f"`{option}`" not in documented} <= internal


# -- signals ---------------------------------------------------------------------------------------


def test_publishing_sends_celerys_signals(app: MiniQ, add: Any) -> None:
    heard: List[Any] = []

    @signals.before_task_publish.connect
    def before(sender: Any, **arguments: Any) -> None:
        arguments.pop("signal")
        heard.append((sender, sorted(arguments)))
        arguments["headers"]["x-trace"] = "abc"
        arguments["body"][1]["y"] = 20
        arguments["properties"]["app_id"] = "me"

    @signals.after_task_publish.connect(sender="add")
    def after(sender: Any, **arguments: Any) -> None:
        arguments.pop("signal")
        heard.append((sender, sorted(arguments)))

    add.delay(1, y=2)
    assert heard == [
        ("add", ["body", "declare", "exchange", "headers", "properties", "retry_policy", "routing_key"]),
        ("add", ["body", "exchange", "headers", "routing_key"]),
    ]
    (delivery,) = taken(app)
    assert delivery.message.headers["x-trace"] == "abc"
    assert delivery.message.properties["app_id"] == "me"
    assert b'"y": 20' in delivery.message.body


def test_what_a_run_sends_on_is_announced_as_well(app: MiniQ) -> None:
    names: List[str] = []

    @signals.before_task_publish.connect
    def before(sender: Any, headers: Any, **_: Any) -> None:
        names.append(sender)
        headers["x-trace"] = "abc"

    bench = Bench(app)
    again = app.task(name="again", bind=True)(lambda self: self.retry())
    ok = app.task(name="ok")(lambda *args: None)
    followups = [*bench.call(again).followups, *bench.call(ok, link=ok.s()).followups]
    assert [one.message.headers["x-trace"] for one in followups] == ["abc", "abc"]
    assert names == ["again", "again", "ok", "ok"]


# -- publishing: retries and one deadline ----------------------------------------------------------


class Flaky(MemoryTransport):
    """A memory transport whose broker is away for a number of publishes."""

    away = 0
    attempts: List[float] = []  # noqa: RUF012

    def publish(self, publications: Sequence[Publication], timeout_s: float) -> None:
        self.attempts.append(timeout_s)
        if len(self.attempts) <= self.away:
            raise OperationalError(f"attempt {len(self.attempts)}")
        super().publish(publications, timeout_s)


@pytest.fixture
def flaky(app: MiniQ, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Publish one message while the broker is away for `away` attempts."""

    def publish(away: int, **options: Any) -> Any:
        monkeypatch.setattr(Flaky, "away", away)
        monkeypatch.setattr(Flaky, "attempts", [])
        app.producer._local.transport = Flaky(app.broker_url(), {}, app.wall)
        app.producer._local.pid = os.getpid()
        return app.send_task("x", **options)

    return publish


def test_a_broker_that_comes_back_in_time_is_no_error(app: MiniQ, flaky: Any) -> None:
    flaky(2, retry_policy={"interval_step": 0.001})
    assert len(Flaky.attempts) == 3
    assert len(taken(app)) == 1


def test_the_retry_policy_bounds_the_attempts(flaky: Any) -> None:
    with pytest.raises(OperationalError, match="attempt 4"):
        flaky(99, retry_policy={"max_retries": 3, "interval_step": 0})
    with pytest.raises(OperationalError, match="attempt 1"):
        flaky(99, retry=False)


def test_one_deadline_bounds_all_attempts_together(flaky: Any) -> None:
    begun = time.monotonic()
    with pytest.raises(OperationalError):
        flaky(
            10_000,
            timeout=0.2,
            retry_policy={"max_retries": None, "interval_start": 0.01, "interval_step": 0},
        )
    assert time.monotonic() - begun < 5
    assert 0 < Flaky.attempts[0] <= 0.2
    assert all(later < earlier for earlier, later in zip(Flaky.attempts, Flaky.attempts[1:]))


def test_the_setting_turns_retries_off(app: MiniQ, flaky: Any) -> None:
    app.conf.task_publish_retry = False
    with pytest.raises(OperationalError, match="attempt 1"):
        flaky(99)


# -- threads, processes, brokers -------------------------------------------------------------------


def test_each_thread_has_its_own_transport(app: MiniQ, add: Any) -> None:
    found = [app.producer.transport]

    def other() -> None:
        add.delay(1, 2)
        found.append(app.producer.transport)
        app.close()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found[0] is app.producer.transport
    assert found[1] is not found[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_another_sender_with_its_own_transport(sqlite_url: str) -> None:
    app = MiniQ("tests", broker=sqlite_url)
    add = app.task(name="add")(lambda x, y: x + y)
    add.delay(1, 1)
    before = app.identity
    pid = os.fork()
    if not pid:
        code = 1
        try:
            add.delay(2, 2)
            code = (
                0 if app.identity[0].startswith(f"gen{os.getpid()}@") and app.identity[1] != before[1] else 2
            )
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert app.identity == before == (f"gen{os.getpid()}@{socket.gethostname()}", before[1])
    assert len(taken(app)) == 2
    app.close()


def test_after_close_the_app_connects_again(sqlite_url: str) -> None:
    app = MiniQ("tests", broker=sqlite_url)
    app.send_task("x")
    app.close()
    app.send_task("x")
    assert len(taken(app)) == 2
    app.close()


def test_brokers_are_chosen_by_their_url(app: MiniQ) -> None:
    app.conf.broker_write_url = "memory://write"
    assert (app.broker_url(write=True), app.broker_url()) != (app.broker_url(), app.broker_url(write=True))
    for url in ("kafka://localhost", "qpid://guest:s3cret@localhost"):
        app.conf.broker_write_url = url
        with pytest.raises(ImproperlyConfigured) as caught:
            app.producer.new_transport(write=True)
        assert all(f"{name}://" in str(caught.value) for name in TRANSPORTS)
        assert "s3cret" not in str(caught.value)
    app.conf.broker_write_url = ["memory://a", "memory://b"]
    with pytest.raises(ImproperlyConfigured, match="2 brokers"):
        app.broker_url(write=True)


# -- what it costs ---------------------------------------------------------------------------------


def test_one_delay_is_few_python_calls(sqlite_url: str, tell: Any) -> None:
    app = MiniQ("tests", broker=sqlite_url)
    add = app.task(name="add")(lambda x, y: x + y)
    for _ in range(3):
        add.delay(1, 2)
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        add.delay(1, 2)
    finally:
        sys.setprofile(before)
    assert calls <= 60
    producer = app.producer
    started = time.perf_counter()
    for _ in range(1000):
        producer.prepare("add", (1, 2), {}, {}, add)
    tell(
        f"one delay() on SQLite: {calls} Python calls;"
        f" prepare: {(time.perf_counter() - started) * 1000:.0f} us"
    )
    app.close()


def test_sending_keeps_nothing(app: MiniQ, add: Any) -> None:
    import gc

    def objects() -> Mapping[str, int]:
        gc.collect()
        return {"results": sum(isinstance(one, AsyncResult) for one in gc.get_objects())}

    before = objects()
    for _ in range(100):
        add.delay(1, 2)
    assert objects() == before

# SPDX-License-Identifier: MIT
"""Remote control: requests and replies have Celery's forms, and callers wait as long as they must."""

from __future__ import annotations

import re
import sys
import threading
import time
from datetime import datetime
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest
from waiting import wait_until
from wire import read_vectors
from workers import environment

from miniq import MiniQ
from miniq.control import exchange_name, flatten_reply, matches, reply_queue
from miniq.exceptions import DuplicateNodenameWarning, ImproperlyConfigured
from miniq.mailbox import Inbox
from miniq.message import Message
from miniq.routing import Exchange, Queue
from miniq.serialization import dumps, loads
from miniq.transports.base import Publication
from miniq.worker.control import (
    MAX_REPLY_BYTES,
    Panel,
    addressed,
    control_command,
    encode_reply,
    inspect_command,
)

VECTORS = read_vectors("control")
#: Not over before anything that happens here, however slow the machine.
TIMEOUT_S = 30.0


def uid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


@pytest.fixture
def app(request: pytest.FixtureRequest) -> Iterator[MiniQ]:
    with MiniQ("t", broker=f"memory://{request.node.name}", backend="memory://control") as made:
        yield made


def ears(app: MiniQ, name: str = "ears") -> Inbox:
    """Return an inbox for all commands."""
    exchange = Exchange(exchange_name(app), "fanout", durable=False)
    return Inbox(app, Queue(f"{name}.celery.pidbox", exchange, durable=False, auto_delete=True))


def read(app: MiniQ, message: Message) -> Any:
    return loads(message.body, message.content_type, message.content_encoding, app.accept)


class Answerer:
    """Hears commands in a thread of its own; answers each with `answers`, as bytes or ``{node: value}``."""

    def __init__(self, app: MiniQ, *answers: Any) -> None:
        self.app = app
        self.answers = answers
        self.heard: List[Message] = []
        self._end = threading.Event()
        self._inbox = ears(app)
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        while not self._end.is_set():
            message = self._inbox.receive(0.05)
            if message is not None:
                self.heard.append(message)
                self._answer(read(self.app, message))
        self._inbox.close()
        self.app.close()

    def _answer(self, body: Dict[str, Any]) -> None:
        for answer in self.answers if "reply_to" in body else ():
            encoded = answer if isinstance(answer, tuple) else dumps(answer, "json")
            content_type, encoding, data = encoded
            headers = {"ticket": body["ticket"], "clock": 7}
            message = Message(data, content_type, encoding, headers, {"delivery_mode": 1})
            to = body["reply_to"]
            publication = Publication(message, to["exchange"], to["routing_key"])
            self.app.producer.transport.publish([publication], 5.0)

    def __enter__(self) -> "Answerer":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._end.set()
        self._thread.join()


# -- forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_a_call_sends_what_celery_sends_and_returns_what_celery_returns(
    app: MiniQ, vector: Dict[str, Any]
) -> None:
    reply = vector.get("reply")
    wait = "timeout=30, limit=1" if reply else "timeout=0.01"
    call = re.sub(r"timeout=[\d.]+", wait, vector["how_made"]).replace("I(", f"I({wait}, ")
    with Answerer(app, *([reply] if reply else [])) as answerer:
        names = {"C": app.control, "I": app.control.inspect, "uid": uid}
        found = eval(call, names)  # noqa: S307 - the vectors are ours
        wait_until(lambda: answerer.heard)
    assert found == vector["caller_gets"]
    [request] = answerer.heard
    body = read(app, request)
    expected = vector["request"]
    for made in (body, expected):
        if "reply_to" in made:
            made["reply_to"]["routing_key"] = made["ticket"] = "x"
    assert body == expected and list(body) == list(expected)
    assert set(request.headers) - {"kept"} == set(vector["request_headers"])
    assert request.properties["delivery_mode"] == 2
    if reply:
        assert app.clock.value > 7, "the clock goes on from the later number"


#: Replies that are the same each time; of the others the shape is compared.
EXACT = {
    "ping", "ping_destination", "ping_pattern", "revoke_list_reply", "revoke_terminate", "terminate",
    "revoke_by_stamped_headers", "rate_limit", "rate_limit_unknown", "rate_limit_off", "time_limit",
    "time_limit_unknown", "add_consumer", "add_consumer_topic", "active_queues", "cancel_consumer",
    "cancel_consumer2", "pool_grow", "pool_shrink", "autoscale_not_enabled", "enable_events_again",
    "unknown_command", "bad_arguments", "inspect_registered", "inspect_registered_attrs",
    "inspect_hello_self",
}  # fmt: skip
#: What only shows while tasks run or wait has tests of its own.
ELSEWHERE = {
    "inspect_active", "inspect_reserved", "inspect_scheduled", "inspect_query_task", "pool_restart",
    "inspect_memsample", "inspect_conf", "disable_events", "enable_events",
}  # fmt: skip


def shape(value: Any) -> Any:
    """Return what stays of a value when its numbers and words change."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return list
    return (int, float) if isinstance(value, (int, float)) else type(value)


def test_a_worker_answers_what_celerys_worker_answers(app: MiniQ) -> None:
    names = next(v["reply"]["w1@host1"] for v in VECTORS if v["name"] == "inspect_registered")
    for name in names:
        app.task(name=name, max_retries=0 if name == "wt.retry_out" else 3)(print)
    with app.worker(hostname="w1@host1", concurrency=2, task_events=True):
        for vector in VECTORS:
            request = vector["request"]
            if "reply" not in vector or vector["name"] in ELSEWHERE:
                continue
            [found] = app.control.broadcast(
                request["method"],
                request["arguments"],
                request["destination"],
                reply=True,
                timeout=TIMEOUT_S,
                limit=1,
                pattern=request["pattern"],
                matcher=request["matcher"],
            ) or [None]
            expected = vector["reply"]
            if vector["name"] in EXACT:
                assert in_order(found) == in_order(expected), vector["name"]
            elif vector["name"] == "inspect_stats":
                assert list(found["w1@host1"]) == list(expected["w1@host1"])
                assert set(found["w1@host1"]["broker"]) == set(expected["w1@host1"]["broker"])
                assert set(found["w1@host1"]["rusage"]) == set(expected["w1@host1"]["rusage"])
                assert found["w1@host1"]["clock"].isdigit()
            else:
                assert shape(found) == shape(expected), vector["name"]


def in_order(value: Any) -> Any:
    """Sort the ids of a set that was written as text."""
    text = repr(value)
    ids = re.findall(r"'0{8}-[-0-9]+'", text)
    return [re.sub(r"'0{8}-[-0-9]+'", "ID", text), sorted(ids)]


TASK_INFO = [
    "id", "name", "args", "kwargs", "type", "hostname", "time_start", "acknowledged", "delivery_info",
    "worker_pid",
]  # fmt: skip


def test_what_runs_waits_and_is_revoked_is_told(app: MiniQ) -> None:
    go, begun = threading.Event(), threading.Event()

    @app.task(name="t.hold")
    def hold(*args: Any, **kwargs: Any) -> None:
        begun.set()
        assert go.wait(TIMEOUT_S)

    try:
        with app.worker(hostname="w1@h", concurrency=1, prefetch_multiplier=3):
            running = hold.delay(1, "x", key=[2])
            assert begun.wait(TIMEOUT_S)
            waiting = hold.apply_async((2,), priority=3)
            app.control.revoke(waiting.id, reply=True, destination="nobody@x", timeout=0.01)
            ask = app.control.inspect("w1@h", timeout=TIMEOUT_S)
            [told] = ask.active()
            assert list(told) == TASK_INFO
            assert (told["id"], told["name"], told["type"]) == (running.id, "t.hold", "t.hold")
            assert (told["args"], told["kwargs"], told["acknowledged"]) == ([1, "x"], {"key": [2]}, True)
            assert told["time_start"] > 0 and told["worker_pid"] > 0
            [safe] = ask.active(safe=True)
            assert safe["args"] == "(1, 'x')"
            [reserved] = wait_until(ask.reserved)
            assert list(reserved) == TASK_INFO
            assert (reserved["args"], reserved["time_start"], reserved["worker_pid"]) == ([2], None, None)
            assert reserved["acknowledged"] is False and reserved["delivery_info"]["priority"] == 3
            found = ask.query_task(running.id, waiting.id, "unknown")
            assert {key: where for key, (where, _) in found.items()} == {
                running.id: "active",
                waiting.id: "reserved",
            }
            app.control.revoke(waiting.id, reply=True, destination="w1@h", timeout=TIMEOUT_S)
            assert ask.revoked() == [waiting.id]
            assert app.control.inspect().destination is None
            go.set()
            wait_until(lambda: waiting.state == "REVOKED")
    finally:
        go.set()


def test_settings_are_told_without_passwords(app: MiniQ) -> None:
    app.conf.update(redis_password="secret", timezone="Europe/Oslo")
    with app.worker(hostname="w1@h"):
        ask = app.control.inspect("w1@h", timeout=TIMEOUT_S)
        told = ask.conf()
        assert told["timezone"] == "Europe/Oslo" and "task_acks_late" not in told
        assert ask.conf(with_defaults=True)["task_acks_late"] is False
        assert "software -> miniq" in ask.report()["ok"]
        assert "secret" not in repr([told, ask.report(), ask.stats()])
        assert re.fullmatch(r"[\d.]+[kMG]B", ask.memsample())
        assert "rss (sample)" in ask.memdump(5)
        assert "objgraph" in ask.objgraph()["error"]


def check_scheduled(app: MiniQ) -> None:
    """Tasks of the worker's queues that are not due are told, the soonest first."""
    app.task(name="t.add")(print)
    with app.worker(hostname="w1@h", queues="one,two"):
        sent = [
            app.send_task("t.add", (n,), queue=queue, countdown=seconds)
            for n, (queue, seconds) in enumerate([("one", 20), ("two", 10), ("one", 15), ("three", 5)])
        ]
        ask = app.control.inspect("w1@h", timeout=TIMEOUT_S)
        told = wait_until(lambda: len(ask.scheduled()) == 3 and ask.scheduled())
        assert [list(one) for one in told] == [["eta", "priority", "request"]] * 3
        assert [one["request"]["id"] for one in told] == [sent[1].id, sent[2].id, sent[0].id]
        assert [list(one["request"]) for one in told] == [TASK_INFO] * 3
        first = told[0]["request"]
        assert (first["args"], first["time_start"], first["acknowledged"]) == ([1], None, False)
        assert first["delivery_info"]["routing_key"] == "two" and told[0]["priority"] == 6
        assert abs(datetime.fromisoformat(told[0]["eta"]).timestamp() - app.wall() - 10) < 9
        assert ask.query_task(sent[2].id) == {sent[2].id: ["scheduled", told[1]["request"]]}


def test_scheduled_in_memory(app: MiniQ) -> None:
    check_scheduled(app)


def test_scheduled_in_a_file(make_app: Callable[..., MiniQ]) -> None:
    check_scheduled(make_app())


def test_scheduled_over_redis(redis_url: str) -> None:
    with MiniQ("t", broker=redis_url) as app:
        check_scheduled(app)


# -- waiting -------------------------------------------------------------------------------------


def test_replies_are_waited_for_as_long_as_needed_and_no_longer(app: MiniQ) -> None:
    begun = time.monotonic()
    assert app.control.ping(timeout=0.05) == [], "nobody answers"
    assert time.monotonic() - begun >= 0.05
    with app.worker(hostname="a@h"), app.worker(hostname="b@h"):
        pong = {"ok": "pong"}
        told: List[Dict[str, Any]] = []
        # None of these has to wait until its time is over.
        found = app.control.ping(["a@h", "b@h"], timeout=TIMEOUT_S, callback=told.append)
        assert flatten_reply(found) == {"a@h": pong, "b@h": pong} and told == found
        assert app.control.ping("a@h", timeout=TIMEOUT_S) == [{"a@h": pong}]
        assert len(app.control.ping(limit=1, timeout=TIMEOUT_S)) == 1
        assert app.control.inspect("b@h", timeout=TIMEOUT_S).ping() == pong
        assert app.control.inspect(["b@h"], timeout=TIMEOUT_S).ping() == {"b@h": pong}
        assert app.control.inspect(timeout=TIMEOUT_S, limit=2).ping().keys() == {"a@h", "b@h"}
        for pattern, matcher in (("b@*", "glob"), ("b@*", None), ("(?!a)[a-z]@h", "pcre")):
            options: Any = {"pattern": pattern, "matcher": matcher, "limit": 1, "timeout": TIMEOUT_S}
            assert app.control.ping(**options) == [{"b@h": pong}]
        # An empty list is nobody, not everybody.
        assert app.control.ping([], timeout=0.05) == []
        assert app.control.inspect("c@h", timeout=0.05).active() is None


def test_what_cannot_be_meant_is_said_before_anything_is_sent(app: MiniQ) -> None:
    with pytest.raises(ValueError, match="regular expression"):
        app.control.ping(pattern="(", matcher="pcre")
    with pytest.raises(ValueError, match="matcher"):
        app.control.ping(pattern="x", matcher="regex")
    with pytest.raises(ImproperlyConfigured, match="channel"):
        app.control.broadcast("ping", channel=object())
    with pytest.raises(ImproperlyConfigured, match="connection"):
        app.control.broadcast("ping", connection=object())
    with app.connection() as connection:
        app.control.broadcast("ping", connection=connection)
    assert addressed("w1@h", {"destination": "w1@h"}) and not addressed("w1@h", {"destination": "w1@h2"})
    assert matches("w1@h", "w?@h", "glob") and not matches("w1@h", "W?@h", None)


def test_bad_and_foreign_replies_are_left_out(app: MiniQ, caplog: pytest.LogCaptureFixture) -> None:
    good = {"a@h": {"ok": "pong"}}
    garbage = ("application/json", "utf-8", b"{")
    refused = ("application/x-python-serialize", "binary", b"x")
    with Answerer(app, garbage, refused, dumps([1], "json"), good):
        assert app.control.ping(timeout=TIMEOUT_S, limit=1) == [good]
    assert caplog.text.count("cannot be read") == 3
    with Inbox(app, reply_queue(app, "me")) as inbox:
        message = Message(*_body(good), {"ticket": "of another question"}, {})
        app.producer.transport.publish([Publication(message, "reply.celery.pidbox", "me")], 5.0)
        assert app.control._collect(inbox, "mine", 0.1, 1, None) == []


def _body(value: Any) -> Any:
    content_type, encoding, data = dumps(value, "json")
    return data, content_type, encoding


def test_two_replies_from_one_name_are_warned_of(app: MiniQ) -> None:
    with Answerer(app, {"a@h": 1}, {"a@h": 2}), pytest.warns(DuplicateNodenameWarning, match="name: a@h"):
        assert app.control.inspect(timeout=TIMEOUT_S, limit=2).clock() == {"a@h": 2}


def check_namesakes(app: MiniQ, caplog: pytest.LogCaptureFixture, others: Optional[int] = None) -> None:
    """Two workers with one name both hear, both answer, and both say what is wrong."""
    with app.worker(hostname="same@h") as one, app.worker(hostname="same@h") as two:
        assert app.control.ping("same@h", timeout=TIMEOUT_S, limit=2) == [{"same@h": {"ok": "pong"}}] * 2
        wait_until(lambda: caplog.text.count("is called same@h, too") >= 2)
        app.control.pool_grow(2)
        wait_until(lambda: [one.pool.size, two.pool.size] == [one.concurrency + 2, two.concurrency + 2])
    assert caplog.text.count("is called same@h, too") == 2


def test_namesakes_in_memory(app: MiniQ, caplog: pytest.LogCaptureFixture) -> None:
    check_namesakes(app, caplog)


def test_namesakes_in_a_file(make_app: Callable[..., MiniQ], caplog: pytest.LogCaptureFixture) -> None:
    check_namesakes(make_app(), caplog)


def test_namesakes_over_redis(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    with MiniQ("t", broker=redis_url, backend=redis_url) as app:
        check_namesakes(app, caplog)


def test_another_exchange_keeps_apart_who_uses_one_broker(redis_url: str) -> None:
    shop, other = MiniQ("a", broker=redis_url, control_exchange="shop"), MiniQ("b", broker=redis_url)
    with shop, other, shop.worker(hostname="w@h"):
        assert other.control.ping(timeout=0.1) == []
        assert shop.control.ping("w@h", timeout=TIMEOUT_S) == [{"w@h": {"ok": "pong"}}]


def test_nothing_stays_behind_in_redis(redis_server: Any, redis_url: str) -> None:
    db = int(redis_url.rpartition("/")[2])
    with MiniQ("t", broker=redis_url, backend=redis_url) as app, app.worker(hostname="w@h"):
        before = set(redis_server.command("KEYS", "*", db=db))
        for _ in range(5):
            app.control.ping("w@h", timeout=TIMEOUT_S)
        assert set(redis_server.command("KEYS", "*", db=db)) == before


# -- what a worker does --------------------------------------------------------------------------


def test_a_command_whose_caller_is_gone_is_not_carried_out(
    app: MiniQ, caplog: pytest.LogCaptureFixture
) -> None:
    def send(expires: float, **more: Any) -> None:
        body = {"method": "pool_grow", "arguments": {"n": 1}, "destination": None, **more}
        message = Message(*_body(body), {"clock": 1, "expires": expires}, {})
        app.producer.transport.publish([Publication(message, "celery.pidbox", "")], 5.0)

    with app.worker(hostname="w@h", concurrency=1) as worker:
        reply_to = {"reply_to": {"exchange": "reply.celery.pidbox", "routing_key": "x"}, "ticket": "x"}
        send(app.wall() - 60, **reply_to)
        wait_until(lambda: "stopped waiting" in caplog.text)
        # A command that nobody waited for holds, however late; 0 is Celery's word for never.
        send(app.wall() - 60)
        send(0, **reply_to)
        wait_until(lambda: worker.pool.size == 3)
        # The reply to nobody has hurt nobody.
        assert app.control.ping("w@h", timeout=TIMEOUT_S)


def test_a_revocation_of_a_celery_client_holds_as_one_of_ours(app: MiniQ) -> None:
    app.task(name="t.add")(print)
    later, never = (app.send_task("t.add", countdown=3600) for _ in range(2))
    with app.worker(hostname="w@h"):
        for destination, id_ in ((None, later.id), (["w@h"], never.id)):
            body = {"method": "revoke", "arguments": {"task_id": id_}, "destination": destination}
            message = Message(*_body(body), {"clock": 1, "expires": app.wall() + 1}, {})
            app.producer.transport.publish([Publication(message, "celery.pidbox", "")], 5.0)
        wait_until(lambda: never.id in app.control.inspect("w@h", timeout=TIMEOUT_S).revoked())
        assert (later.state, never.state) == ("REVOKED", "PENDING"), "one worker alone was told of the other"
    broker = app.producer.transport.broker  # type: ignore[attr-defined]
    assert later.id in broker.revoked and never.id not in broker.revoked


def test_how_much_is_revoked_and_how_long_may_be_set(app: MiniQ, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_WORKER_REVOKES_MAX", "2")
    monkeypatch.setenv("CELERY_WORKER_REVOKE_EXPIRES", "60")
    with app.worker(hostname="w@h"):
        app.control.revoke(["a", "b", "c"], reply=True, limit=1, timeout=TIMEOUT_S)
        assert app.control.inspect("w@h", timeout=TIMEOUT_S).revoked() == ["b", "c"]
    broker = app.producer.transport.broker  # type: ignore[attr-defined]
    assert all(0 < until - app.wall() <= 60 for until in broker.revoked.values())
    monkeypatch.setenv("CELERY_WORKER_REVOKE_EXPIRES", "soon")
    with pytest.raises(ImproperlyConfigured, match="CELERY_WORKER_REVOKE_EXPIRES='soon'"):
        app.control.revoke("a")


def test_commands_of_ones_own(app: MiniQ) -> None:
    before = dict(Panel.data), dict(Panel.meta)
    try:

        @control_command(args=[("n", int)], signature="[N=1]")
        def hire(state: Any, n: int = 1) -> Any:
            """Hire some.

            More is not told.
            """
            return {"ok": f"{state.hostname} hires {n}"}

        @inspect_command
        def odd(state: Any) -> Any:
            return {1, 2, object()}

        @inspect_command(name="other", alias="another", default_timeout=3.0, visible=False)
        def fails(state: Any) -> Any:
            raise KeyError("why")

        assert Panel.meta["hire"].help == "Hire some." and Panel.meta["hire"].args == (("n", int),)
        assert (Panel.meta["odd"].type, Panel.meta["other"].default_timeout) == ("inspect", 3.0)
        with app.worker(hostname="w@h"):

            def ask(name: str, **arguments: Any) -> Any:
                replies = app.control.broadcast(name, arguments, "w@h", reply=True, timeout=TIMEOUT_S)
                assert replies
                return replies[0]["w@h"]

            assert ask("hire", n=3) == {"ok": "w@h hires 3"}
            assert ask("another") == {"error": "KeyError('why')"}
            assert "EncodeError" in ask("odd")["error"]
            assert ask("ping") == {"ok": "pong"}
    finally:
        Panel.data.clear(), Panel.meta.clear()
        Panel.data.update(before[0]), Panel.meta.update(before[1])


def test_every_command_of_celery_is_there() -> None:
    control = """revoke revoke_by_stamped_headers terminate rate_limit time_limit add_consumer cancel_consumer
        pool_grow pool_shrink pool_restart autoscale enable_events disable_events heartbeat election
        shutdown"""
    inspect = """active reserved scheduled active_queues stats registered ping hello clock conf report revoked
        query_task memsample memdump objgraph"""
    by_type: Dict[str, List[str]] = {"control": [], "inspect": []}
    for name, info in Panel.meta.items():
        by_type[info.type].append(name)
    assert sorted(by_type["control"]) == sorted(control.split())
    assert sorted(by_type["inspect"]) == sorted(inspect.split())
    for alias in "active reserved schedule revoked tasks conf".split():
        assert f"dump_{alias}" in Panel.data


def test_large_replies_are_cut_or_refused() -> None:
    many = [{"id": "x" * 100, "n": n} for n in range(50_000)]
    (_, _, data), left_out = encode_reply("w@h", many, "json")
    assert len(data) <= MAX_REPLY_BYTES
    kept = loads(data, "application/json", "utf-8", frozenset({"application/json"}))["w@h"]
    assert kept == many[: len(kept)] and left_out == len(many) - len(kept) and len(kept) > 1000
    for value in ({"ok": "x" * 2_000_000}, ["x" * 2_000_000]):
        (_, _, data), left_out = encode_reply("w@h", value, "json")
        assert b"bytes, more than" in data and left_out == 0
    (kind, _, data), _ = encode_reply("w@h", {"ok": "pong"}, "of nobody")
    assert kind == "application/json" and b"unknown serializer" in data


def test_stamps_revoke_tasks_that_have_them(app: MiniQ) -> None:
    ran: List[str] = []

    @app.task(name="t.note")
    def note(word: str) -> None:
        ran.append(word)

    def send(word: str, **stamps: Any) -> Any:
        return note.apply_async((word,), stamped_headers=list(stamps), **stamps)

    with app.worker(hostname="w@h", concurrency=1):
        options: Any = {"destination": "w@h", "reply": True, "timeout": TIMEOUT_S}
        [told] = app.control.revoke_by_stamped_headers({"customer": ["a", "b"], "n": "1"}, **options)
        assert told["w@h"]["ok"].endswith("flagged as revoked, but not terminated")
        [told] = app.control.broadcast("revoke_by_stamped_headers", {"headers": ["k=v", "k=w"]}, **options)
        assert told["w@h"]["ok"].startswith("headers {'k': ['v', 'w']} flagged")
        dropped = [
            send("1", customer="a"), send("2", customer=["x", "b"]), send("3", n="1"), send("4", k="w"),
        ]  # fmt: skip
        send("5", customer="c"), send("6", other="a")
        note.delay("7").get(timeout=TIMEOUT_S)
        assert ran == ["5", "6", "7"]
        assert [one.state for one in dropped] == ["REVOKED"] * 4
        [told] = app.control.revoke_by_stamped_headers({"customer": "z"}, terminate=True, **options)
        assert told["w@h"]["ok"] == "headers {'customer': 'z'} were not terminated"


def test_queues_and_limits_can_be_changed(app: MiniQ) -> None:
    app.task(name="t.add")(lambda x, y: x + y)
    with app.worker(hostname="w@h", concurrency=2, autoscale=(4, 1)) as worker:
        options: Any = {"destination": "w@h", "reply": True, "timeout": TIMEOUT_S}

        def value(replies: Any) -> Any:
            return replies[0]["w@h"]

        control = app.control
        plain = {"options": {"durable": False, "max_priority": 5}, **options}
        assert value(control.add_consumer("news", "x.news", "topic", "a.#", **plain)) == {
            "ok": "add consumer news"
        }
        [_, queue] = control.inspect("w@h", timeout=TIMEOUT_S).active_queues()
        assert (queue["exchange"]["name"], queue["exchange"]["type"]) == ("x.news", "topic")
        assert (queue["routing_key"], queue["durable"], queue["max_priority"]) == ("a.#", False, 5)
        assert "ok" in value(control.rate_limit("t.add", "5/m", **options))
        assert value(control.rate_limit("t.add", "ten", **options))["error"].startswith(
            "Invalid rate limit string: ValueError("
        )
        assert "ok" in value(control.time_limit("t.add", 3, 5, **options))
        told = control.inspect("w@h", timeout=TIMEOUT_S).registered("rate_limit", "time_limit", "_private")
        assert told == ["t.add [rate_limit=5/m time_limit=5]"]
        for wrong in (-1, float("nan")):
            [told] = control.time_limit("t.add", wrong, **options)
            assert "number of seconds from 0 up" in told["w@h"]["error"]
        assert app.tasks["t.add"].time_limit == 5
        size = worker.pool.size
        for change in (control.pool_grow, control.pool_shrink):
            assert "from 0 up, not -2" in value(change(-2, **options))["error"]
        assert worker.pool.size == size
        assert "unknown signal 'SIGNO'" in value(control.terminate("no", signal="SIGNO", **options))["error"]
        assert value(control.autoscale(6, 2, **options)) == {"ok": "autoscale now max=6 min=2"}
        assert "error" in value(control.autoscale(2, 6, **options))
        assert worker.autoscale == (6, 2)
        assert value(control.pool_restart(**options)) == {
            "error": "ValueError('Pool restarts not enabled')"
        }
        app.conf.worker_pool_restarts = True
        assert "has no processes" in value(control.pool_restart(**options))["error"]
        assert value(control.enable_events(**options)) == {"ok": "task events enabled"}
        assert value(control.enable_events(**options)) == {"ok": "task events already enabled"}
        assert value(control.disable_events(**options)) == {"ok": "task events disabled"}
        assert value(control.disable_events(**options)) == {"ok": "task events already disabled"}
        assert value(control.heartbeat(**options)) is None
        assert value(control.broadcast("election", {"id": "1", "topic": "task"}, **options)) is None
        assert control.shutdown("w@h", reply=True, timeout=0.05) == [], "there is no reply"
        wait_until(lambda: worker._ended.is_set())


def test_purge_empties_the_queues_of_the_app(app: MiniQ) -> None:
    for _ in range(3):
        app.send_task("t.add")
    assert app.control.purge() == 3
    assert app.control.discard_all() == 0


LEAVER = """
import sys, time
from miniq import MiniQ
from miniq.control import control_queue, reply_queue
from miniq.mailbox import Inbox
app = MiniQ("t", broker=sys.argv[1], control_queue_expires=1)
held = [Inbox(app, reply_queue(app, f"gone{n}")) for n in range(10)]
held += [Inbox(app, control_queue(app, f"gone{n}@h")) for n in range(10)]
print("ready", flush=True)
time.sleep(60)
"""


def check_that_nothing_stays(app: MiniQ, program: Any, traces: Callable[[], Any]) -> None:
    """Queues of callers and workers that were killed go, within the time that they may outlive them."""
    with app.worker(hostname="w@h"):
        assert app.control.ping("w@h", timeout=TIMEOUT_S)
        url = app.broker_url()
        one = program([sys.executable, "-c", LEAVER, url], env=environment(MINIQ_BROKER_URL=url))
        one.wait_for("ready")
        assert traces()
        one.kill()
        wait_until(lambda: not traces(), 30.0, traces)


def test_what_the_killed_leave_goes_from_a_file(make_app: Callable[..., MiniQ], program: Any) -> None:
    app = make_app()

    def traces() -> List[str]:
        return [size.queue for size in app.producer.transport.sizes() if "gone" in size.queue]

    check_that_nothing_stays(app, program, traces)


def test_what_the_killed_leave_goes_from_redis(redis_server: Any, redis_url: str, program: Any) -> None:
    db = int(redis_url.rpartition("/")[2])

    def traces() -> List[str]:
        keys = redis_server.command("KEYS", "*gone*", db=db)
        sets = redis_server.command("KEYS", "_kombu.binding*pidbox", db=db)
        members = [m for key in sets for m in redis_server.command("SMEMBERS", key.decode(), db=db)]
        queues = redis_server.command("HKEYS", "_miniq.queues", db=db)
        return [repr(one) for one in (*keys, *members, *queues) if b"gone" in one]

    with MiniQ("t", broker=redis_url) as app:
        check_that_nothing_stays(app, program, traces)

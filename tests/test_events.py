# SPDX-License-Identifier: MIT
"""Events on their way: what is sent, what waits while the broker is away, what a receiver hears."""

from __future__ import annotations

import json
import logging
import socket
import threading
from typing import Any, Callable, Dict, List
from urllib.parse import urlsplit

import pytest
from waiting import wait_until
from wire import read_vectors

from miniq import MiniQ, event
from miniq.event import Event, EventWriter, event_queue, group_from, key_of, sent_event, utcoffset
from miniq.events import EventDispatcher, EventReceiver
from miniq.events import dispatcher as dispatcher_module
from miniq.exceptions import OperationalError
from miniq.message import Message
from miniq.transports.base import Publication

Server = Any
VECTORS = read_vectors("events")


class Paper:
    """A transport that only writes down."""

    def __init__(self) -> None:
        self.messages: List[Publication] = []
        self.is_away = False

    def publish(self, publications: List[Publication], timeout_s: float) -> None:
        if self.is_away:
            raise OperationalError("nobody there")
        self.messages += publications

    def said(self) -> "List[tuple[str, Any]]":
        return [(key, json.loads(message.body)) for message, _, key in self.messages]

    def types(self) -> List[str]:
        bodies = [body for _, body in self.said()]
        return [one["type"] for body in bodies for one in (body if isinstance(body, list) else [body])]


@pytest.fixture
def app() -> MiniQ:
    return MiniQ("t", broker="memory://", backend="memory://", wall=lambda: 1000.5)


@pytest.fixture
def paper() -> Paper:
    return Paper()


def dispatcher(app: MiniQ, paper: Paper, **options: Any) -> EventDispatcher:
    return EventDispatcher(app=app, hostname="w1@host1", transport=paper, **options)  # type: ignore[arg-type]


# -- forms ---------------------------------------------------------------------------------------


def test_an_event_is_a_dict_with_type_and_time() -> None:
    found = Event("task-sent", {"uuid": "1"}, name="x")
    assert found.pop("timestamp") > 1e9
    assert found == {"uuid": "1", "name": "x", "type": "task-sent"}
    assert Event("a-b", timestamp=3.0) == {"type": "a-b", "timestamp": 3.0}
    assert (group_from("task-sent"), key_of("worker-heartbeat")) == ("task", "worker.heartbeat")


@pytest.mark.parametrize(
    ("zone", "hours"), [("UTC", 0.0), ("Asia/Kolkata", -5.5), ("Etc/GMT+5", 5.0), ("Asia/Kathmandu", -5.75)]
)
def test_the_offset_is_what_the_clock_is_behind_utc(zone: str, hours: float, monkeypatch: Any) -> None:
    if not hasattr(event.time, "tzset"):
        pytest.skip("the zone of a process cannot be changed here")
    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        event.time.tzset()
        found = utcoffset()
    event.time.tzset()
    assert found == hours


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_our_messages_have_the_form_of_celerys(vector: Dict[str, Any], app: MiniQ, paper: Paper) -> None:
    for captured in vector["messages"]:
        paper.messages.clear()
        hostname = captured["headers"]["hostname"]
        body = captured["body"]
        events = body if isinstance(body, list) else [body]
        ours = EventDispatcher(
            app=app,
            hostname=hostname,
            transport=paper,  # type: ignore[arg-type]
            buffer_group=["task"] if isinstance(body, list) else [],
            on_send_buffered=lambda: None,
        )
        for one in events:
            common = ("hostname", "utcoffset", "pid", "clock", "type")
            ours.send(one["type"], **{name: one[name] for name in one if name not in common})
        ours.flush()
        (message, exchange, key), *others = paper.messages
        assert not others
        assert (exchange, key) == (captured["exchange"], captured["key"])
        assert (message.headers, message.properties) == (captured["headers"], captured["properties"])
        assert message.content_type == captured["content_type"]
        assert message.content_encoding == captured["content_encoding"]
        made = json.loads(message.body)
        for mine, theirs in zip(made if isinstance(body, list) else [made], events):
            assert list(mine) == list(theirs)
            varying = ("utcoffset", "pid", "clock")
            assert {**mine, **dict.fromkeys(varying)} == {**theirs, **dict.fromkeys(varying)}


def test_the_event_of_a_sent_task_has_celerys_fields(app: MiniQ) -> None:
    @app.task(name="wt.add")
    def add(x: int, y: int) -> int:
        return x + y

    (theirs,) = (
        message["body"]
        for message in VECTORS[0]["messages"]
        if message["key"] == "task.sent"
    )
    prepared = app.producer.prepare("wt.add", (2, 3), {}, {"task_id": theirs["uuid"]}, add)
    message, exchange, key = sent_event(app, prepared.publication, "celery")
    assert (exchange, key) == ("celeryev", "task.sent")
    ours = json.loads(message.body)
    assert list(ours) == list(theirs)
    varying = ("hostname", "utcoffset", "pid", "clock", "timestamp")
    assert {**ours, **dict.fromkeys(varying)} == {**theirs, **dict.fromkeys(varying)}


def test_values_that_json_does_not_have_are_shown(app: MiniQ) -> None:
    writer = EventWriter(app, "w")
    body = writer.publication("a.b", writer.make("a-b", {"what": {1, 2}, "nan": "ü"})).message.body
    found = json.loads(body)
    assert (found["what"], found["nan"]) == ("{1, 2}", "ü")
    circle: List[Any] = []
    circle.append(circle)
    for strange in ({(1, 2): 3}, circle):
        event = writer.make("a-b", {"what": strange, "n": 1})
        for many in (event, [event, {"type": "a-c"}]):
            found = json.loads(writer.publication("a.b", many).message.body)
            first = found[0] if isinstance(many, list) else found
            assert (first["what"], first["n"], first["hostname"]) == (repr(strange), 1, "w")


def test_the_queue_of_a_reader_goes_soon(make_app: Callable[..., MiniQ]) -> None:
    app = make_app(broker="amqp://", event_queue_prefix="ev", event_queue_expires=7)
    queue = event_queue(app, "worker.#", "me")
    assert (queue.name, queue.routing_key) == ("ev.me", "worker.#")
    assert queue.arguments == {"x-expires": 7000, "x-message-ttl": 5000}
    assert (queue.exclusive, queue.auto_delete, queue.durable) == (True, True, False)
    assert (queue.exchange.name, queue.exchange.type, queue.exchange.durable) == ("celeryev", "topic", True)
    app = make_app(broker="redis://")
    assert event_queue(app).exchange.type == "fanout"


# -- the dispatcher ------------------------------------------------------------------------------


def test_events_of_tasks_go_as_an_array_and_others_alone_in_their_order(app: MiniQ, paper: Paper) -> None:
    ours = dispatcher(app, paper, buffer_group={"task"}, on_send_buffered=lambda: None)
    ours.send("task-received", uuid="1")
    ours.send("task-started", uuid="1")
    assert paper.messages == []
    ours.send("worker-heartbeat", freq=2.0)
    ours.send("task-succeeded", uuid="1")
    assert ours.flush()
    assert [key for key, _ in paper.said()] == ["task.multi", "worker.heartbeat", "task.multi"]
    assert paper.types() == ["task-received", "task-started", "worker-heartbeat", "task-succeeded"]
    first, (_, heartbeat), last = paper.said()
    clocks = [one["clock"] for one in (*first[1], heartbeat, *last[1])]
    assert clocks == [1, 2, 3, 4] and app.clock.value == 4


def test_a_buffer_that_nobody_flushes_goes_when_it_is_full(app: MiniQ, paper: Paper) -> None:
    ours = dispatcher(app, paper, buffer_group={"task"}, buffer_limit=3)
    for number in range(7):
        ours.send("task-started", uuid=str(number))
    assert [len(body) for _, body in paper.said()] == [3, 3]
    ours.close()
    assert [len(body) for _, body in paper.said()] == [3, 3, 1]


def test_nothing_is_sent_that_is_not_wanted(app: MiniQ, paper: Paper) -> None:
    ours = dispatcher(app, paper, groups=["worker"])
    ours.send("task-started", uuid="1")
    ours.send("worker-online")
    ours.disable()
    ours.send("worker-offline")
    ours.enable()
    ours.send("worker-heartbeat", blind=True)
    assert paper.types() == ["worker-online", "worker-heartbeat"]
    assert "clock" not in paper.said()[1][1]


def test_what_waits_is_bounded_and_told_once(
    app: MiniQ, paper: Paper, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatcher_module, "MOST_EVENTS", 10)
    paper.is_away = True
    with dispatcher(app, paper, buffer_group={"task"}, on_send_buffered=lambda: None) as ours:
        for number in range(14):
            ours.send("task-started", uuid=str(number))
            assert not ours.flush()
        ours.send("worker-heartbeat")
        assert (ours.is_away, ours.dropped) == (True, 5)
        paper.is_away = False
        assert ours.flush() and not ours.is_away
    assert [one["uuid"] for one in paper.said()[0][1]] == [str(number) for number in range(5, 14)]
    assert paper.types().count("worker-heartbeat") == 0, "a heartbeat says nothing later"
    first, second = [record.getMessage() for record in caplog.records]
    assert "cannot be sent: nobody there" in first
    assert "are sent again after " in second and " s, 5 of them were dropped" in second


def test_many_go_in_portions(app: MiniQ, paper: Paper, monkeypatch: Any) -> None:
    monkeypatch.setattr(dispatcher_module, "MOST_TOGETHER", 4)
    ours = dispatcher(app, paper, buffer_group={"task"}, on_send_buffered=lambda: None)
    for number in range(10):
        ours.send("task-started", uuid=str(number))
    ours.close()
    assert [[int(one["uuid"]) for one in body] for _, body in paper.said()] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9],
    ]  # fmt: skip


def test_who_does_not_want_a_buffer_gets_the_error(app: MiniQ, paper: Paper) -> None:
    paper.is_away = True
    ours = dispatcher(app, paper, buffer_while_offline=False)
    with pytest.raises(OperationalError):
        ours.send("a-b")
    paper.is_away = False
    ours.send("a-c")
    assert paper.types() == ["a-c"]


def test_what_could_not_be_sent_to_the_end_is_told(
    app: MiniQ, paper: Paper, caplog: pytest.LogCaptureFixture
) -> None:
    paper.is_away = True
    with dispatcher(app, paper) as ours:
        ours.send("a-b")
        other = dispatcher(app, paper)
        other.extend_buffer(ours)
    assert "1 events of w1@host1 could not be sent and are lost" in caplog.text
    paper.is_away = False
    other.flush()
    assert paper.types() == ["a-b"]


def test_events_wait_for_a_server_that_was_stopped(
    new_redis: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    server = new_redis()
    caplog.set_level(logging.WARNING)
    with MiniQ("t", broker=server.url(), backend="disabled://") as app:
        heard: List[Dict[str, Any]] = []
        receiver = EventReceiver(app=app, handlers={"*": heard.append})
        listener = threading.Thread(target=receiver.capture)
        listener.start()
        try:
            with EventDispatcher(app=app, hostname="w", timeout_s=0.5) as ours:

                def sent(number: int) -> bool:
                    ours.send("x-number", number=number)
                    return any(one.get("number") == number for one in heard)

                wait_until(lambda: sent(1), what="the receiver hears")
                server.stop()
                for number in range(2, 5):
                    ours.send("x-number", number=number)
                assert ours.is_away
                server.start()
                wait_until(lambda: ours.flush(), what="the server takes events again")
                # The receiver may need longer to be back; what went out before is lost for it.
                wait_until(lambda: sent(5), 20.0, "the receiver hears again")
        finally:
            receiver.should_stop = True
            listener.join()
    lines = [record.getMessage() for record in caplog.records if "Events of w" in record.getMessage()]
    assert len(lines) == 2 and "cannot be sent" in lines[0] and "sent again" in lines[1]


# -- the receiver --------------------------------------------------------------------------------


def check_monitor(app: MiniQ) -> None:
    """Hear with Celery's own words, what was sent with Celery's own words."""
    failed: List[Dict[str, Any]] = []
    others: List[Dict[str, Any]] = []
    state = app.events.State()

    def on_other(event: Dict[str, Any]) -> None:
        state.event(event)
        others.append(event)

    with app.connection() as connection:
        receiver = app.events.Receiver(connection, handlers={"task-failed": failed.append, "*": on_other})
        capture = receiver.itercapture(limit=None, timeout=10.0, wakeup=True)
        sender = threading.Thread(target=_send, args=(app,))
        # It has to listen before anything is sent: its first step makes the queue.
        begun = _begun(receiver, sender)
        for _ in capture:
            if failed:
                break
        capture.close()  # type: ignore[attr-defined]
        sender.join()
        assert begun
    assert [one["uuid"] for one in failed] == ["1"]
    assert [one["type"] for one in others] == ["task-received", "task-started"]
    (found,) = others[:1]
    assert found["local_received"] == pytest.approx(app.wall(), abs=60)
    assert (found["hostname"], found["name"]) == ("w1@host1", "proj.add")
    assert app.clock.value > found["clock"]
    assert state.tasks["1"].name == "proj.add"
    assert list(state.workers) == ["w1@host1"]


def _begun(receiver: EventReceiver, sender: threading.Thread) -> List[bool]:
    begun: List[bool] = []
    wake = receiver.wakeup_workers

    def wakeup_workers(channel: Any = None) -> None:
        wake(channel)
        begun.append(True)
        sender.start()

    receiver.wakeup_workers = wakeup_workers  # type: ignore[method-assign]
    return begun


def _send(app: MiniQ) -> None:
    with EventDispatcher(app=app, hostname="w1@host1", buffer_group={"task"}) as ours:
        ours.send("task-received", uuid="1", name="proj.add", args="()", kwargs="{}")
        ours.send("task-started", uuid="1")
        ours.send("task-failed", uuid="1", exception="E()", traceback="...")
    app.producer.close()


def test_celerys_monitor_works_in_memory() -> None:
    with MiniQ("t", broker="memory://", backend="memory://") as app:
        check_monitor(app)


def test_celerys_monitor_works_over_a_file(make_app: Callable[..., MiniQ]) -> None:
    check_monitor(make_app())


def test_celerys_monitor_works_over_redis(redis_url: str) -> None:
    with MiniQ("t", broker=redis_url, backend=redis_url) as app:
        check_monitor(app)


def test_nothing_stays_behind_of_a_receiver(make_app: Callable[..., MiniQ]) -> None:
    app = make_app()
    with pytest.raises(socket.timeout, match=r"no event came within 0\.01 s"):
        app.events.Receiver().capture(timeout=0.01, wakeup=False)
    assert [size.queue for size in app.producer.transport.sizes()] == []


def test_capture_ends_after_so_many_messages(app: MiniQ) -> None:
    heard: List[str] = []
    receiver = EventReceiver(app=app, handlers={"a-b": lambda one: heard.append(one["n"])})
    sender = threading.Thread(
        target=lambda: [EventDispatcher(app=app).send(kind, n=kind) for kind in ("a-b", "a-c", "a-b")]
    )
    _begun(receiver, sender)
    receiver.capture(limit=2, timeout=10.0)
    sender.join()
    assert heard == ["a-b"], "the second one has no handler"


def test_what_is_no_event_is_dropped_with_a_line_and_the_others_are_heard(
    app: MiniQ, caplog: pytest.LogCaptureFixture
) -> None:
    heard: List[Any] = []
    receiver = EventReceiver(app=app, handlers={"*": heard.append})
    for body, content_type in (
        (b"{", "application/json"), (b"[1, {}, null]", "application/json"),
        (b"x", "application/x-python-serialize"), (b'{"type": "a-b"}', "application/json"),
    ):  # fmt: skip
        receiver._receive(Message(body, content_type, "utf-8", {}, {}))
    assert [one["type"] for one in heard] == ["a-b"]
    assert len(caplog.records) == 5
    heard.clear()
    for wrong in (
        {"type": "task-started", "uuid": ["1"]}, {"type": "task-started", "parent_id": {}},
        {"type": "task-failed", "traceback": 5}, {"type": "a-b", "hostname": 7},
        {"type": "a-b", "timestamp": "now"}, {"type": "a-b", "timestamp": None},
        {"type": "a-b", "timestamp": 1e300}, {"type": "a-b", "timestamp": float("nan")},
        {"type": "worker-heartbeat", "freq": "2"},
    ):  # fmt: skip
        right = {"type": "a-b", "uuid": 1, "name": ["x"], "timestamp": 2}  # of a kind that is nobody's
        body = json.dumps([wrong, right]).encode()
        receiver._receive(Message(body, "application/json", "utf-8", {}, {}))
        assert [one["uuid"] for one in heard] == [1], wrong
        heard.clear()


def test_the_clock_of_a_sender_of_tasks_is_replaced(app: MiniQ) -> None:
    receiver = EventReceiver(app=app)
    _, found = receiver.event_from_message({"type": "task-started", "clock": 40})
    assert (found["clock"], app.clock.value) == (40, 41)
    _, found = receiver.event_from_message({"type": "task-sent", "clock": 7})
    assert found["clock"] == 40
    _, found = receiver.event_from_message({"type": "a-b", "timestamp": 5.0, "utcoffset": 3.0})
    assert found["clock"] == 43
    assert (found["timestamp"], found["local_received"]) == (5.0, 1000.5)


# -- what an app offers --------------------------------------------------------------------------


def test_a_connection_opens_when_it_is_asked_to(make_app: Callable[..., MiniQ]) -> None:
    app = make_app()
    with app.connection_for_write() as connection:
        assert not connection.connected
        assert connection.ensure_connection(max_retries=1).connected
    assert not connection.connected
    assert connection.as_uri().startswith("sqlite://")
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    closed.close()
    connection = app.connection(f"redis://:secret@127.0.0.1:{port}/0")
    assert repr(connection) == f"<Connection: redis://:**@127.0.0.1:{port}/0>"
    pauses: List[float] = []
    with pytest.raises(OperationalError):
        connection.ensure_connection(lambda error, pause_s: pauses.append(pause_s), 2, 0.01, 0.01, 0.015)
    assert pauses == [0.01, 0.015]
    pauses.clear()
    with pytest.raises(OperationalError):
        connection.ensure_connection(
            lambda error, pause_s: pauses.append(pause_s), interval_start=600, timeout=60
        )
    assert pauses == [], "no pause that ends too late"


def test_a_connection_that_opens_makes_nothing_on_the_server(rabbit_server: Server, rabbit_url: str) -> None:
    with MiniQ("t", broker=rabbit_url, backend="disabled://") as app, app.connection() as connection:
        assert connection.connect().connected
        assert rabbit_server.queues(urlsplit(rabbit_url).path[1:]) == {}


def test_a_sender_tells_of_tasks_if_it_is_set_to(app: MiniQ) -> None:
    heard: List[Dict[str, Any]] = []

    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    receiver = EventReceiver(app=app, handlers={"task-sent": heard.append})

    def send() -> None:
        add.delay(1, 1)
        app.conf.task_send_sent_event = True
        add.apply_async((2, 3), queue="other", task_id="x")
        (add.s(1, 1) | add.s(1)).delay()

    sender = threading.Thread(target=send)
    _begun(receiver, sender)
    receiver.capture(limit=2, timeout=10.0)
    sender.join()
    assert [(one["args"], one["queue"], one["hostname"]) for one in heard] == [
        ("(2, 3)", "other", app.identity[0]),
        ("(1, 1)", "celery", app.identity[0]),
    ]

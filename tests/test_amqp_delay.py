# SPDX-License-Identifier: MIT
"""Where messages wait that are not due: both layouts, as data and on a real server."""

from __future__ import annotations

import math
import random
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from wire import read_vectors

from miniq import Exchange, Queue
from miniq.codecs.amqp import Content, Deliver
from miniq.connections.amqp import Channel, Connection, Options, Server
from miniq.routing import Binding, topic_matches
from miniq.transports.amqp_delay import (
    DEAD,
    ENTRANCE,
    EXIT,
    LEVELS,
    LIMIT_S,
    MARGIN_S,
    MAX_LEVEL,
    Declaration,
    can_be_reached,
    due_bindings,
    due_declarations,
    is_native,
    ladder_declarations,
    ladder_name,
    level,
    native_bindings,
    native_declarations,
    routing_key,
    strip_prefix,
)
from miniq.transports.amqp_message import from_content, take_added, to_content

QUORUM = {"x-queue-type": "quorum"}
#: The layout as RabbitMQ listed it while a worker of Celery's ran.
(CAPTURED,) = [one for one in read_vectors("amqp_delayed") if one["name"] == "topology"]
DEADLINE_S = 30.0


def arguments_of(declarations: List[Declaration], method: str) -> List[Dict[str, Any]]:
    return [arguments for name, arguments in declarations if name == method]


# -- the native layout ---------------------------------------------------------------------------


def test_exchanges_are_celerys() -> None:
    ours = arguments_of(native_declarations(), "exchange.declare")
    assert all(one["durable"] for one in ours)
    assert {(one["exchange"], one["type"]) for one in ours} == {
        (one["name"], one["type"])
        for one in CAPTURED["exchanges"]
    }


def test_queues_are_celerys() -> None:
    ours = arguments_of(native_declarations(), "queue.declare")
    assert {one["queue"]: list(one["arguments"].items()) for one in ours} == {
        one["name"]: [(name, value) for name, _, value in one["arguments"]] for one in CAPTURED["queues"]
    }


def test_bindings_are_celerys() -> None:
    ours = {
        (one.get("source") or one["exchange"], one.get("destination") or one["queue"], one["routing_key"])
        for method, one in native_declarations()
        if method.endswith(".bind")
    }
    assert ours == {
        (one["source_name"], one["destination_name"], one["routing_key"])
        for one in CAPTURED["bindings"]
        if one["source_name"] != EXIT
    }


def test_classic_queues_have_no_arguments_that_only_quorum_queues_know() -> None:
    for one in arguments_of(native_declarations("classic"), "queue.declare"):
        assert one["arguments"]["x-queue-type"] == "classic"
        assert "x-dead-letter-strategy" not in one["arguments"]


def test_everything_is_declared_before_it_is_bound() -> None:
    known = set()
    for method, arguments in native_declarations():
        if method == "exchange.declare":
            known.add(arguments["exchange"])
        elif method == "queue.declare":
            known.add(arguments["queue"])
            assert arguments["arguments"]["x-dead-letter-exchange"] in known
        else:
            assert {value for key, value in arguments.items() if key != "routing_key"} <= known


def way_through(key: str) -> List[int]:
    """Return the levels whose queues a message passes, by the bindings; the exit is reached at the end."""
    queues: Dict[str, str] = {}
    exchanges: Dict[str, Tuple[str, str]] = {}
    after: Dict[str, str] = {}
    for method, one in native_declarations():
        if method == "queue.bind":
            queues[one["exchange"]] = one["routing_key"]
        elif method == "exchange.bind":
            exchanges[one["source"]] = one["routing_key"], one["destination"]
        elif method == "queue.declare":
            after[one["queue"]] = one["arguments"]["x-dead-letter-exchange"]
    passed, at = [], ENTRANCE
    while at != EXIT:
        pattern, destination = exchanges[at]
        waits = topic_matches(queues[at], key)
        assert waits != topic_matches(pattern, key)
        if waits:
            passed.append(int(at.rpartition("_")[2]))
        at = after[at] if waits else destination
    return passed


@pytest.mark.parametrize("seed", range(10))
def test_a_message_passes_levels_whose_seconds_add_up_to_its_countdown(seed: int) -> None:
    rand = random.Random(seed)
    countdown_s = rand.random() * 2 ** rand.uniform(0, LEVELS)
    key = routing_key(countdown_s, "some.key.1.0")
    assert sum(2**n for n in way_through(key)) == int(countdown_s), f"seed {seed}"
    assert strip_prefix(key) == "some.key.1.0"


@pytest.mark.parametrize("countdown_s", [-5, 0, 0.99])
def test_less_than_a_second_passes_no_level(countdown_s: float) -> None:
    assert way_through(routing_key(countdown_s, "q")) == []


@pytest.mark.parametrize("countdown_s", [LIMIT_S - 1, LIMIT_S, LIMIT_S * 10.0, math.inf])
def test_what_does_not_fit_waits_as_long_as_possible(countdown_s: float) -> None:
    assert way_through(routing_key(countdown_s, "q")) == list(range(LEVELS - 1, -1, -1))


@pytest.mark.parametrize("key", ["celery", "1.0.1", "a.b", "", "0." * 27 + "x", "2." * 28 + "x"])
def test_a_key_without_digits_before_it_stays(key: str) -> None:
    assert strip_prefix(key) == key


def test_digits_before_digits_are_taken_off_together() -> None:
    assert strip_prefix(routing_key(7, routing_key(300, "celery"))) == "celery"


def test_a_key_has_to_leave_room_for_the_digits() -> None:
    assert len(routing_key(1, "q" * 199)) == 255
    with pytest.raises(ValueError, match="'qqqq.* is too long to be delayed"):
        routing_key(1, "q" * 200)
    with pytest.raises(ValueError, match="too long"):
        routing_key(1, "é" * 100)


@pytest.mark.parametrize("name", ["celery", "eu.mail", "q" * 199, "a*"])
def test_a_queue_can_be_reached_by_its_name(name: str) -> None:
    assert can_be_reached(name)


@pytest.mark.parametrize("name", ["q" * 200, "#", "a.*", "*.b"])
def test_a_queue_whose_name_is_too_long_or_a_pattern_cannot_be_reached(name: str) -> None:
    assert not can_be_reached(name)
    assert native_bindings(Queue(name)) == []


def keys_into(queue: Queue) -> List[Tuple[str, str, str]]:
    """Return (from, to, key) of the bindings, the stars for the digits taken off."""
    found = []
    for method, one in native_bindings(queue):
        stars, key = one["routing_key"][: 2 * LEVELS], one["routing_key"][2 * LEVELS :]
        assert stars == "*." * LEVELS
        if method == "queue.bind":
            found.append((one["exchange"], one["queue"], key))
        else:
            found.append((one["source"], one["destination"], key))
    return found


def test_a_queue_on_a_direct_exchange_is_bound_by_its_name() -> None:
    assert keys_into(Queue("mail", Exchange("e"), "key")) == [(EXIT, "mail", "mail")]


def test_a_queue_on_a_topic_exchange_is_bound_through_that_too() -> None:
    queue = Queue("img", Exchange("media", "topic"), "img.#", bindings=[Binding(Exchange("t", "topic"), "k")])
    assert keys_into(queue) == [
        (EXIT, "img", "img"),
        (EXIT, "media", "img.#"),
        ("media", "img", "img.#"),
        (EXIT, "t", "k"),
        ("t", "img", "k"),
    ]


def test_a_fanout_exchange_gets_what_was_meant_for_it() -> None:
    queue = Queue("f", Exchange("fan", "fanout"), "celery")
    assert keys_into(queue) == [(EXIT, "f", "f"), (EXIT, "fan", "celery")]
    assert keys_into(Queue("f", Exchange("fan", "fanout"))) == [(EXIT, "f", "f")]


def test_what_came_through_the_layout_is_known_by_its_exchange() -> None:
    assert is_native(EXIT) and is_native(ENTRANCE)
    assert not is_native("") and not is_native("celery")


# -- the ladder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_message_is_early_at_each_level_and_held_in_the_end(seed: int) -> None:
    rand = random.Random(seed)
    hold_s = rand.choice([0.0, 0.5, 2.0, 60.0])
    left_s = 2 ** rand.uniform(-2, 31)
    hops = 0
    while True:
        found = level(left_s, hold_s)
        if found is None:
            break
        assert 0 <= found <= MAX_LEVEL
        assert 2**found <= left_s - MARGIN_S, f"seed {seed}"
        assert found == MAX_LEVEL or 2 ** (found + 1) > left_s - MARGIN_S, f"seed {seed}"
        left_s -= 2**found
        hops += 1
    assert left_s <= hold_s or left_s < 1 + MARGIN_S
    assert hops <= 50


@pytest.mark.parametrize(
    "seconds_left, hold_s, expected",
    [
        (-1, 2, None),
        (2, 2, None),
        (2.04, 2, 0),
        (1.0, 0, None),
        (1.06, 0, 0),
        (4.0, 2, 1),
        (4.1, 2, 2),
        (2**27 + 1, 2, 27),
        (1e12, 2, 27),
        (math.inf, 2, 27),
    ],
)
def test_the_level_is_the_longest_that_ends_in_time(
    seconds_left: float, hold_s: float, expected: Optional[int]
) -> None:
    assert level(seconds_left, hold_s) == expected


def test_a_level_of_classic_queues_gives_back_through_the_default_exchange() -> None:
    assert ladder_declarations(3) == [
        ("exchange.declare", {"exchange": "_miniq.delay.8", "type": "fanout", "durable": True}),
        (
            "queue.declare",
            {
                "queue": "_miniq.delay.8",
                "durable": True,
                "arguments": {
                    "x-queue-type": "classic",
                    "x-overflow": "reject-publish",
                    "x-message-ttl": 8000,
                    "x-dead-letter-exchange": "",
                },
            },
        ),
        ("queue.bind", {"queue": "_miniq.delay.8", "exchange": "_miniq.delay.8", "routing_key": ""}),
    ]


# -- on a server ---------------------------------------------------------------------------------


class Bed:
    """A connection on which queues are declared, and messages published and taken."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.channel: Channel = connection.open_channel()
        self.channel.select_confirms()
        self.channel.on_event = self.take
        #: Body -> (when it was sent, when it came, from which queue, delivery) for each time it came.
        self.came: Dict[str, List[Tuple[float, str, Deliver]]] = {}
        self.sent: Dict[str, float] = {}

    def declare(self, declarations: List[Declaration]) -> None:
        for method, arguments in declarations:
            self.channel.call(method, **arguments)

    def consume(self, queue: Queue) -> None:
        """Declare a queue with its exchange and take what comes."""
        self.channel.call(
            "queue.declare", queue=queue.name, durable=queue.durable, arguments=queue.arguments
        )
        for exchange, key, _ in queue.all_bindings:
            self.channel.call("exchange.declare", exchange=exchange.name, type=exchange.type, durable=True)
            self.channel.call("queue.bind", queue=queue.name, exchange=exchange.name, routing_key=key)
        self.channel.call("basic.consume", queue=queue.name, consumer_tag=queue.name, no_ack=True)

    def take(self, event: Any) -> None:
        if isinstance(event, Deliver):
            body = event.content.body.decode()
            self.came.setdefault(body, []).append((time.monotonic(), event.consumer_tag, event))

    def publish(self, exchange: str, key: str, body: str, headers: Optional[Dict[str, Any]] = None) -> None:
        self.sent[body] = time.monotonic()
        headers = {"task": "t", "id": body} if headers is None else headers
        properties = {"content_type": "application/json", "delivery_mode": 2}
        item = (exchange, key, properties, headers, body.encode(), True)
        assert self.channel.publish([item], 10.0) == [None]

    def wait(self, until: Callable[[], bool], doing: str) -> None:
        self.connection.wait(until, time.monotonic() + DEADLINE_S, doing)


@pytest.fixture
def bed(rabbit_url: str) -> Iterator[Bed]:
    server = Server.of(rabbit_url, Options.read({}, rabbit_url))
    connection = server.connect(10.0)
    yield Bed(connection)
    connection.close()


def test_messages_come_out_of_both_layouts_once_and_not_early(bed: Bed) -> None:
    queues = [
        Queue("classic", Exchange("classic"), "classic"),
        Queue("quorum", Exchange("quorum"), "quorum", queue_arguments=QUORUM),
        Queue("images", Exchange("media", "topic"), "img.#"),
        Queue("mail", Exchange("post", "topic"), "mail", queue_arguments=QUORUM),
        # Celery's way of binding would bring to "mail" what is meant for this one.
        Queue("eu.mail", Exchange("post", "topic"), "eu.mail", queue_arguments=QUORUM),
        Queue("everybody", Exchange("fan", "fanout"), "news", queue_arguments=QUORUM),
    ]
    bed.declare(native_declarations() + due_declarations())
    for kind in ("classic", "quorum"):
        for n in (0, 1):
            bed.declare(ladder_declarations(n, kind))
    for queue in queues:
        bed.consume(queue)
        bed.declare(native_bindings(queue) + due_bindings(queue))
    where: Dict[str, Tuple[str, int]] = {}

    def send(exchange: str, key: str, seconds: int, queue: str) -> None:
        body = f"{exchange} {key[-20:]} {seconds}"
        bed.publish(exchange, key, body)
        where[body] = queue, seconds

    for queue in queues:
        for seconds in (0, 1, 3):
            send(ENTRANCE, routing_key(seconds + 0.5, queue.name), seconds, queue.name)
        for kind in ("classic", "quorum"):
            for n in (0, 1):
                send(ladder_name(n, kind), queue.name, 1 << n, queue.name)
    # As Celery's clients send to exchanges.
    send(ENTRANCE, routing_key(2, "img.resize.small"), 2, "images")
    send(ENTRANCE, routing_key(2, "news"), 2, "everybody")
    bed.wait(lambda: len(bed.came) == len(where), "getting the delayed messages")
    # What came twice would have come by now: the last to come waited longest.
    bed.connection.read_ready()
    for body, (queue_name, seconds) in where.items():
        ((at, tag, _),) = bed.came[body]
        assert tag == queue_name, body
        assert at - bed.sent[body] > seconds - 0.01, body


def test_a_message_that_waits_again_passes_only_without_the_brokers_headers(bed: Bed) -> None:
    queue = Queue("mail", Exchange("mail"), "mail", queue_arguments=QUORUM)
    bed.declare(native_declarations("classic") + ladder_declarations(0))
    bed.consume(queue)
    bed.declare(native_bindings(queue))
    bed.publish(ENTRANCE, routing_key(1, "mail"), "native")
    bed.publish(ladder_name(0), "mail", "ladder")
    bed.wait(lambda: len(bed.came) == 2, "getting the delayed messages")
    for body, (exchange, key) in {
        "native": (ENTRANCE, routing_key(3, "mail")),
        "ladder": (ladder_name(0), "mail"),
    }.items():
        (_, _, delivery) = bed.came[body][0]
        assert strip_prefix(delivery.routing_key) == "mail"
        assert is_native(delivery.exchange) == (body == "native")
        message = from_content(Content(*delivery.content))
        added = take_added(message.headers)
        assert added["x-death"][0]["reason"] == "expired"
        if body == "native":
            # The queue of 1 s is behind that of 2 s: RabbitMQ takes it for a circle.
            bed.publish(exchange, key, "dropped", {**message.headers, **added})
        bed.publish(exchange, key, body, to_content(message)[1])
    bed.wait(lambda: {len(bed.came[body]) for body in ("native", "ladder")} == {2}, "getting them again")
    assert "dropped" not in bed.came


def test_messages_for_queues_that_are_gone_do_not_stop_a_quorum_queue(bed: Bed) -> None:
    call = bed.channel.call
    bed.declare(due_declarations() + ladder_declarations(0, "quorum"))
    call("exchange.declare", exchange=DEAD, type="fanout", durable=True)
    dead, alive = Queue(DEAD, Exchange(DEAD, "fanout")), Queue("alive", Exchange("alive"), "alive")
    for queue in (dead, alive):
        bed.consume(queue)
        bed.declare(due_bindings(queue))
    for number in range(40):
        bed.publish(ladder_name(0, "quorum"), "gone", f"gone {number}")
    bed.publish(ladder_name(0, "quorum"), "alive", "alive")
    bed.wait(lambda: len(bed.came) == 41, "getting all of them, wherever they go")
    assert {times[0][1] for body, times in bed.came.items() if body != "alive"} == {DEAD}
    ((_, tag, delivery),) = bed.came["alive"]
    assert (tag, delivery.exchange, delivery.routing_key) == ("alive", "_miniq.due", "alive")

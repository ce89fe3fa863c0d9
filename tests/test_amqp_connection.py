# SPDX-License-Identifier: MIT
"""Connections to real RabbitMQ servers, and to peers that answer as a real one only rarely does."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import warnings
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from peers import hold, listening
from proxy import Proxy
from servers import HOST, Certificates, RabbitServer, certificates, free_port
from waiting import wait_until

from miniq.codecs.amqp import Cancelled, Deliver, Returned
from miniq.codecs.amqp_wire import FRAME_HEARTBEAT, FRAME_METHOD, encode_frame, encode_method
from miniq.connections.amqp import Channel, ChannelError, Connection, Item, Options, Refusal, Server
from miniq.connections.amqp_options import endpoints
from miniq.exceptions import ImproperlyConfigured, OperationalError

NO_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
CLIENT = "client"  # the name in our certificate


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    yield
    Server.close_all()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory, files: Certificates) -> Iterator[RabbitServer]:
    """A server of these tests alone, over TLS, that takes who we are from our certificate if we have one."""
    settings = {
        "ssl_options.verify": "verify_peer",
        "ssl_cert_login_from": "common_name",
        "auth_mechanisms.1": "PLAIN",
        "auth_mechanisms.2": "AMQPLAIN",
        "auth_mechanisms.3": "EXTERNAL",
    }
    folder = tmp_path_factory.mktemp("rabbit")
    plugins = ["rabbitmq_auth_mechanism_ssl"]
    with RabbitServer(folder, settings, tls=files, plugins=plugins) as server:
        server.add_user(CLIENT, "never used")
        server.set_permissions(CLIENT, "/")
        yield server
        server.kill()


def server_for(url: str, **options: Any) -> Server:
    return Server.of(url, Options.read(options, url))


@pytest.fixture
def connect() -> Iterator[Callable[..., Connection]]:
    """Make connections that are closed at the end: ``connect(url, **options)``."""
    made: List[Connection] = []

    def make(
        url: str, timeout_s: float = 20.0, name: str = "", with_heartbeat: bool = False, **options: Any
    ) -> Connection:
        made.append(server_for(url, **options).connect(timeout_s, name, with_heartbeat))
        return made[-1]

    yield make
    for one in made:
        one.close()


def item(queue: str, body: bytes = b"body", exchange: str = "", mandatory: bool = True, **more: Any) -> Item:
    return exchange, queue, {"content_type": "text/plain", **more}, {"task": "tests.add"}, body, mandatory


def declare(channel: Channel, queue: str = "q", **arguments: Any) -> str:
    channel.call("queue.declare", queue=queue, durable=True, arguments=arguments)
    return queue


def vhost_of(url: str) -> str:
    return endpoints(url, Options())[0].virtual_host


def count(channel: Channel, queue: str = "q") -> int:
    return int(channel.call("queue.declare", queue=queue, passive=True)["message_count"])


def named(server: RabbitServer) -> Dict[str, Dict[str, Any]]:
    """Return the server's connections by the names that they were given."""
    return {row["client_properties"].get("connection_name", ""): row for row in server.connections()}


# -- URLs and options ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "address", "vhost", "username", "password", "tls"),
    [
        ("amqp://", ("localhost", 5672), "/", "guest", "guest", False),
        ("amqp://host", ("host", 5672), "/", "guest", "guest", False),
        ("amqp://host/", ("host", 5672), "/", "guest", "guest", False),
        ("amqp://host//", ("host", 5672), "/", "guest", "guest", False),
        ("amqp://host/%2F", ("host", 5672), "/", "guest", "guest", False),
        ("PYAMQP://host:1234/my%2Fhost", ("host", 1234), "my/host", "guest", "guest", False),
        ("amqp://host//absolute", ("host", 5672), "/absolute", "guest", "guest", False),
        ("amqp://user:p%40s%2Fs%23@host/v", ("host", 5672), "v", "user", "p@s/s#", False),
        ("amqp://user@host/v", ("host", 5672), "v", "user", "", False),
        ("amqp://h?virtual_host=v&username=u&password=hidden", ("h", 5672), "v", "u", "hidden", False),
        ("amqps://[::1]/v", ("::1", 5671), "v", "guest", "guest", True),
        ("amqp://h/v?ssl=true", ("h", 5671), "v", "guest", "guest", True),
    ],
)
def test_url_is_read(url: str, address: Any, vhost: str, username: str, password: str, tls: bool) -> None:
    (found,) = endpoints(url, Options.read({}, url))
    read = (found.address, found.virtual_host, found.username, found.password, found.tls)
    assert read == (address, vhost, username, password, tls)
    assert password in ("guest", "") or password not in found.url


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "no RabbitMQ URL"),
        ("host:5672", "no scheme"),
        ("amqpz://host", "did you mean amqp"),
        ("amqp://:pa/ss@host/1", "percent-encoded"),
        ("amqp://:pa#ss@host/1", "percent-encoded"),
        ("amqp://host:port", "port is no number"),
        ("amqp://[::1/0", "Invalid IPv6"),
        ("amqp://one,two", "amqp://one;amqp://other"),
    ],
)
def test_url_that_cannot_work_says_why_and_shows_no_password(url: str, told: str) -> None:
    with pytest.raises(ImproperlyConfigured) as raised:
        Server.of(url, Options())
    assert told in str(raised.value)
    assert "pa/ss" not in str(raised.value) and "pa#ss" not in str(raised.value)


def test_several_urls_are_several_servers() -> None:
    urls = "amqp://one/v;amqps://u:p@two:7/v"
    assert [one.address for one in endpoints(urls, Options())] == [("one", 5672), ("two", 7)]
    assert "u:p" not in server_for(urls).url


def test_options_come_from_the_dict_and_the_query_which_wins() -> None:
    url = "amqps://h?heartbeat=7&connection_timeout=3&ssl_cert_reqs=CERT_NONE&confirm_publish=no"
    options = Options.read(
        {"read_timeout": 9, "connect_timeout": 1, "client_name": None, "login_method": "amqplain", "hold": 0},
        url,
    )
    assert (options.socket_timeout, options.connect_timeout, options.heartbeat) == (9.0, 3.0, 7)
    assert (options.login_method, options.client_name, options.hold) == ("AMQPLAIN", "", 0.0)
    assert options.tls().cert_reqs == "none" and not options.confirm_publish
    assert Options.read({"socket_settings": {6: 1}}).socket_settings == ((6, 1),)
    assert Options.read({"client_properties": {"b": 1, "a": "x"}}).client_properties == (("a", "x"), ("b", 1))
    assert Options.read({"heartbeat": 0.4}).heartbeat == 1
    assert "hidden" not in repr(Options.read({"password": "hidden"}))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"socket_timeot": 1}, "did you mean socket_timeout"),
        ({"socket_timeout": 0}, "socket_timeout must be a number of seconds above 0, not 0"),
        ({"heartbeat": -1}, "from 0"),
        ({"heartbeat": 65536}, "from 0"),
        ({"hold": "soon"}, "hold must be a number of seconds from 0, not 'soon'"),
        ({"login_method": "GSSAPI"}, "PLAIN or AMQPLAIN or EXTERNAL"),
        ({"delayed_queue_type": "stream"}, "quorum or classic"),
        ({"client_properties": {"a": []}}, "a dict of texts and numbers"),
        ({"password": 123}, "password must be text, not **"),
    ],
)
def test_option_that_cannot_work_is_named(options: Dict[str, Any], told: str) -> None:
    with pytest.raises(ImproperlyConfigured) as raised:
        Options.read(options, "amqp://user:secret@host")
    assert told in str(raised.value)
    assert "secret" not in str(raised.value)


def test_options_without_a_meaning_here_are_accepted_and_logged(caplog: Any) -> None:
    with caplog.at_level(logging.DEBUG, "miniq"):
        assert Options.read({"max_retries": 3, "visibility_timeout": 3600}) == Options()
    assert "visibility_timeout has no meaning here" in caplog.text


def test_equal_urls_and_options_are_one_server_and_equal_places_one_key() -> None:
    one = server_for("amqp://localhost:1/v")
    assert server_for("amqp://localhost:1/v") is one
    other = server_for("pyamqp://user:pw@localhost:1/v", socket_timeout=9)
    assert other is not one and other.key == one.key
    assert server_for("amqp://localhost:1/w").key != one.key


# -- calls ---------------------------------------------------------------------------------------


def test_calls_give_the_arguments_of_their_answers(rabbit_url: str, connect: Any) -> None:
    rabbit = connect(rabbit_url)
    assert rabbit.server_version >= (3, 8) and rabbit.server_properties["product"] == "RabbitMQ"
    channel = rabbit.open_channel()
    answer = channel.call("queue.declare", queue="q", durable=True, arguments={"x-max-priority": 9})
    assert answer == {"queue": "q", "message_count": 0, "consumer_count": 0}
    assert channel.call("exchange.declare", exchange="e", type="topic", durable=True) == {}
    assert channel.call("queue.bind", queue="q", exchange="e", routing_key="a.#") == {}
    assert channel.get("q") is None
    channel.send("queue.declare", queue="second", nowait=True)
    assert count(channel, "second") == 0
    with pytest.raises(ValueError, match="no method"):
        channel.call("queue.declar", queue="q")
    with pytest.raises(ValueError, match="no argument 'nme'"):
        channel.call("queue.declare", nme="q")
    assert count(channel) == 0


def test_channel_that_the_server_closes_is_the_end_of_that_channel_only(
    rabbit_url: str, connect: Any
) -> None:
    rabbit = connect(rabbit_url)
    one, two = rabbit.open_channel(), rabbit.open_channel()
    events: List[Any] = []
    one.on_event = two.on_event = events.append
    declare(two)
    with pytest.raises(ChannelError, match=r"queue.declare: 404 NOT_FOUND.*'missing'.*declare it") as raised:
        one.call("queue.declare", queue="missing", passive=True)
    assert (raised.value.code, raised.value.method) == (404, "queue.declare")
    assert isinstance(raised.value.translated(), ImproperlyConfigured)
    assert one.closed is not None and one.closed.code == 404 and not events
    for use in (lambda: one.call("basic.qos"), lambda: one.send("basic.qos"), lambda: one.ack(1), one.check):
        with pytest.raises(ChannelError, match="404"):
            use()
    one.close()
    assert count(two) == 0 and not rabbit.broken
    assert rabbit.open_channel().number == one.number


def test_reasons_of_the_server_say_who_must_act(rabbit_url: str, connect: Any) -> None:
    rabbit = connect(rabbit_url)
    declare(rabbit.open_channel())
    with pytest.raises(ChannelError, match="406 PRECONDITION_FAILED.*'durable'.*other arguments") as raised:
        rabbit.open_channel().call("queue.declare", queue="q")
    assert isinstance(raised.value.translated(), ImproperlyConfigured)
    rabbit.open_channel().call("queue.declare", queue="mine", exclusive=True)
    with pytest.raises(ChannelError, match="405 RESOURCE_LOCKED.*node name"):
        connect(rabbit_url).open_channel().call("queue.declare", queue="mine", passive=True)
    # An unknown delivery tag is nothing that the operator could mend.
    channel = rabbit.open_channel()
    closed: List[Any] = []
    channel.on_event = closed.append
    channel.ack(7)
    rabbit.wait(lambda: closed, time.monotonic() + 10, "the error")
    assert (closed[0].code, closed[0].method) == (406, "basic.ack")
    with pytest.raises(ChannelError, match="unknown delivery tag 7$") as raised:
        channel.check()
    assert isinstance(raised.value.translated(), OperationalError)


def test_missing_permission_is_told_with_its_channel(
    rabbit_server: RabbitServer, rabbit_url: str, connect: Any
) -> None:
    vhost = vhost_of(rabbit_url)
    rabbit_server.add_user("reader " + vhost, "s3cret")
    with pytest.raises(
        ImproperlyConfigured, match=f"virtual host '{vhost}'.*530 NOT_ALLOWED.*path of the URL"
    ):
        connect(rabbit_server.url(vhost, "reader " + vhost, "s3cret"))
    rabbit_server.set_permissions("reader " + vhost, vhost, configure="^$", write="^$")
    rabbit = connect(rabbit_server.url(vhost, "reader " + vhost, "s3cret"))
    with pytest.raises(ChannelError, match="403 ACCESS_REFUSED.*list_permissions") as raised:
        declare(rabbit.open_channel())
    assert isinstance(raised.value.translated(), ImproperlyConfigured)
    declare(connect(rabbit_url).open_channel())
    with pytest.raises(ChannelError, match="basic.publish: 403"):
        rabbit.publisher().publish([item("q", exchange="amq.direct")], 10)
    assert rabbit.open_channel().get("q") is None


def test_no_time_left_does_not_break_the_connection(rabbit_url: str, connect: Any) -> None:
    rabbit = connect(rabbit_url)
    channel = rabbit.publisher()
    for use in (lambda: channel.call("basic.qos", timeout_s=-1), lambda: channel.publish([item("q")], 0)):
        with pytest.raises(OperationalError, match="no time was left"):
            use()
    declare(channel)
    assert channel.publish([item("q")], 10) == [None]


def test_all_channels_of_a_connection_may_be_used_and_no_more(
    tls_server: RabbitServer, files: Certificates, connect: Any
) -> None:
    rabbit = connect(tls_server.url(), ssl_ca_certs=str(files.ca))
    rabbit._channel_max = 3
    channels = [rabbit.open_channel() for _ in range(3)]
    with pytest.raises(OperationalError, match="all 3 channels"):
        rabbit.open_channel()
    channels[1].close()
    assert rabbit.open_channel().number == channels[1].number == 2


# -- publishing ----------------------------------------------------------------------------------


def test_published_message_arrives_as_it_was(rabbit_url: str, connect: Any) -> None:
    rabbit = connect(rabbit_url)
    channel = rabbit.publisher()
    declare(channel)
    properties = {"delivery_mode": 2, "correlation_id": "c", "priority": 0, "expiration": "60000"}
    bodies = [b"", b"x", os.urandom(1_000_000)]
    for body in bodies:
        assert channel.publish([item("q", body, **properties)], 20) == [None]
    assert channel.publish([], 1) == []
    for body in bodies:
        got = channel.get("q", no_ack=True)
        assert got is not None and got.routing_key == "q" and got.content.body == body
        assert got.content.properties == {"content_type": "text/plain", **properties}
        assert got.content.headers == {"task": "tests.add"}


def test_message_that_no_queue_takes_comes_back_among_those_that_one_takes(
    rabbit_url: str, connect: Any
) -> None:
    channel = connect(rabbit_url).publisher()
    declare(channel)
    returned = Refusal("returned", 312, "NO_ROUTE")
    assert channel.publish([item("nowhere")], 10) == [returned]
    assert channel.publish([item("nowhere", mandatory=False)], 10) == [None]
    places = ["q", "nowhere", "q", "elsewhere", "nowhere", "nowhere", "q"]
    items = [item(place, b"same", correlation_id=str(number)) for number, place in enumerate(places)]
    wanted = [None if place == "q" else returned for place in places]
    assert channel.publish(items, 10) == wanted
    assert channel.publish([item("q")], 10) == [None]
    assert count(channel) == 4


def test_message_that_a_full_queue_refuses_is_told(rabbit_url: str, connect: Any) -> None:
    channel = connect(rabbit_url).publisher()
    declare(channel, **{"x-max-length": 2, "x-overflow": "reject-publish"})
    assert channel.publish([item("q")] * 2, 10) == [None, None]
    assert [refusal.kind for refusal in channel.publish([item("q")] * 3, 10)] == ["nack"] * 3
    assert channel.publish([item("q")], 10)[0].kind == "nack"
    assert count(channel) == 2


def test_missing_exchange_closes_the_channel_and_the_next_publisher_is_a_new_one(
    rabbit_url: str, connect: Any
) -> None:
    rabbit = connect(rabbit_url)
    declare(rabbit.publisher())
    for items in ([item("q", exchange="missing")], [item("q"), item("q", exchange="missing"), item("q")]):
        with pytest.raises(ChannelError, match="basic.publish: 404 NOT_FOUND.*'missing'"):
            rabbit.publisher().publish(items, 10)
        assert rabbit.publisher().publish([item("q")], 10) == [None]


def test_what_cannot_be_encoded_is_refused_before_anything_is_sent(rabbit_url: str, connect: Any) -> None:
    channel = connect(rabbit_url).publisher()
    declare(channel)
    bad = item("q" * 300)
    worse = ("", "q", {}, {"object": object()}, b"", True)
    for items in ([bad], [worse], [item("q"), bad], [item("q"), worse]):
        with pytest.raises((ValueError, TypeError)):
            channel.publish(items, 10)
    assert count(channel) == 0
    assert channel.publish([item("q")] * 2, 10) == [None] * 2


def test_many_messages_are_confirmed_and_many_returned_ones_do_not_jam(rabbit_url: str, connect: Any) -> None:
    rabbit = connect(rabbit_url, socket_timeout=60)
    channel = rabbit.publisher()
    declare(channel)
    assert channel.publish([item("q", b"x" * 600)] * 5_000, 60) == [None] * 5_000
    assert count(channel) == 5_000
    refusals = channel.publish([item("nowhere", b"x" * 6_000)] * 2_000, 60)
    assert {refusal.kind for refusal in refusals} == {"returned"}
    mixed = [item("q" if number % 2 else "nowhere", os.urandom(400_000)) for number in range(10)]
    assert [refusal is None for refusal in channel.publish(mixed, 60)] == [False, True] * 5


def test_without_confirms_the_next_publish_tells_what_went_wrong(rabbit_url: str, connect: Any) -> None:
    rabbit = connect(rabbit_url, confirm_publish=False)
    channel = rabbit.publisher()
    declare(channel)
    assert channel.publish([item("q")], 10) == [None]
    assert channel.publish([item("q", b"x" * 1000)] * 1000, 10) == [None] * 1000
    assert channel.publish([item("q", exchange="missing")], 10) == [None]
    wait_until(rabbit.has_input, what="the error")
    with pytest.raises(ChannelError, match="basic.publish: 404"):
        channel.publish([item("q")], 10)
    channel = rabbit.publisher()
    channel.publish([item("q", exchange="missing")], 10)
    wait_until(rabbit.has_input, what="the error")
    rabbit.read_ready()
    # Read by somebody else: whoever publishes next is told all the same, once.
    with pytest.raises(ChannelError, match="basic.publish: 404"):
        rabbit.publisher()
    assert rabbit.publisher().publish([item("q")], 10) == [None]
    # The question overtakes messages that the queue has not looked at.
    wait_until(lambda: count(rabbit.publisher()) == 1002, what="all messages")


def test_without_confirms_returned_messages_go_to_on_event_or_to_the_log(
    rabbit_url: str, connect: Any, caplog: Any
) -> None:
    rabbit = connect(rabbit_url, confirm_publish=False)
    channel = rabbit.publisher()
    channel.publish([item("nowhere")], 10)
    wait_until(rabbit.has_input, what="the message")
    rabbit.read_ready()
    assert "a message is lost, no queue takes it" in caplog.text
    events: List[Any] = []
    channel.on_event = events.append
    channel.publish([item("nowhere", b"this")], 10)
    rabbit.wait(lambda: events, time.monotonic() + 10, "the message")
    assert isinstance(events[0], Returned) and events[0].content.body == b"this"


# -- consuming -----------------------------------------------------------------------------------


def test_deliveries_come_as_events_and_acks_travel_with_the_next_flush(rabbit_url: str, connect: Any) -> None:
    rabbit, other = connect(rabbit_url, with_heartbeat=True), connect(rabbit_url)
    channel = rabbit.open_channel()
    events: List[Any] = []
    channel.on_event = events.append
    declare(channel)
    channel.call("basic.qos", prefetch_count=4)
    tag = channel.call("basic.consume", queue="q")["consumer_tag"]
    assert other.publisher().publish([item("q", b"%d" % number) for number in range(6)], 10) == [None] * 6
    rabbit.wait(lambda: len(events) == 4, time.monotonic() + 10, "four")
    assert [event.content.body for event in events] == [b"0", b"1", b"2", b"3"]
    assert {(type(event), event.consumer_tag, event.redelivered) for event in events} == {
        (Deliver, tag, False)
    }
    channel.ack(events[1].delivery_tag, multiple=True)
    channel.nack(events[2].delivery_tag)
    channel.reject(events[3].delivery_tag, requeue=False)
    rabbit.flush()
    rabbit.wait(lambda: len(events) == 7, time.monotonic() + 10, "the others")
    assert sorted((event.content.body, event.redelivered) for event in events[4:]) == [
        (b"2", True), (b"4", False), (b"5", False)
    ]  # fmt: skip
    channel.ack(0, multiple=True)
    channel.call("basic.cancel", consumer_tag=tag)
    assert count(channel) == 0 and rabbit.pending == 0
    rabbit.close()
    assert count(other.publisher()) == 0


def test_whoever_gets_an_event_may_use_the_connection(rabbit_url: str, connect: Any) -> None:
    rabbit = connect(rabbit_url)
    channel, second = rabbit.open_channel(), rabbit.open_channel()
    declare(channel)
    declare(channel, "seen")
    bodies: List[bytes] = []
    depth: List[int] = []

    def consume(event: Any) -> None:
        assert not depth, "called while it is busy"
        depth.append(1)
        channel.ack(event.delivery_tag)
        assert rabbit.publisher().publish([item("seen", event.content.body)], 10) == [None]
        assert second.call("basic.qos", prefetch_count=len(bodies) + 1) == {}
        bodies.append(event.content.body)
        depth.clear()

    channel.on_event = consume
    rabbit.publisher().publish([item("q", b"%d" % number) for number in range(20)], 10)
    channel.call("basic.consume", queue="q")
    rabbit.wait(lambda: len(bodies) == 20, time.monotonic() + 10, "all")
    assert bodies == [b"%d" % number for number in range(20)]
    assert count(second) == 0 and count(second, "seen") == 20


def test_event_whose_taker_raises_is_the_only_one_that_is_lost(rabbit_url: str, connect: Any) -> None:
    rabbit = connect(rabbit_url)
    channel = rabbit.open_channel()
    declare(channel)
    bodies: List[bytes] = []

    def consume(event: Any) -> None:
        bodies.append(event.content.body)
        if event.content.body == b"0":
            raise LookupError

    channel.on_event = consume
    channel.call("basic.consume", queue="q")
    connect(rabbit_url).publisher().publish([item("q", b"%d" % number) for number in range(3)], 10)
    with pytest.raises(LookupError):
        rabbit.wait(lambda: len(bodies) == 3, time.monotonic() + 10, "three")
    rabbit.wait(lambda: len(bodies) == 3, time.monotonic() + 10, "three")
    assert bodies == [b"0", b"1", b"2"] and not rabbit.broken


def test_consumer_of_a_deleted_queue_is_cancelled(rabbit_url: str, connect: Any) -> None:
    rabbit, other = connect(rabbit_url), connect(rabbit_url)
    channel = rabbit.open_channel()
    events: List[Any] = []
    channel.on_event = events.append
    declare(channel)
    tag = channel.call("basic.consume", queue="q")["consumer_tag"]
    other.open_channel().call("queue.delete", queue="q")
    wait_until(rabbit.has_input, what="the event")
    rabbit.read_ready()
    assert events == [Cancelled(channel.number, tag)] and channel.closed is None


# -- servers that block, close, or end -----------------------------------------------------------


def test_blocked_publisher_raises_at_the_deadline_and_goes_on_when_it_may(
    tls_server: RabbitServer, files: Certificates, connect: Any, caplog: Any
) -> None:
    rabbit = connect(tls_server.url(), ssl_ca_certs=str(files.ca))
    channel = rabbit.publisher()
    declare(channel, "blocked")
    unconfirmed = connect(tls_server.url(), ssl_ca_certs=str(files.ca), confirm_publish=False)
    unconfirmed.publisher()
    tls_server.raise_memory_alarm()
    try:
        unconfirmed.publisher().publish([item("blocked", b"5")], 10)
        # The first one makes the server tell; of the second nothing is sent.
        for number in range(2):
            with pytest.raises(OperationalError, match="blocked by the server.*low on memory"):
                channel.publish([item("blocked", b"%d" % number)], 0.5 if number else 2.0)
            assert not rabbit.broken and rabbit.blocked == "low on memory"
        rabbit.probe(0.2)
        with pytest.raises(OperationalError, match="blocked by the server"):
            unconfirmed.publisher().publish([item("blocked", b"not sent")], 0.2)
        thread = threading.Timer(0.2, tls_server.clear_memory_alarm)
        thread.start()
        assert channel.publish([item("blocked", b"3")], 30) == [None]
        thread.join()
        assert rabbit.blocked is None
    finally:
        tls_server.clear_memory_alarm()
    assert [channel.publish([item("blocked", b"4")] * size, 10) for size in (1, 2)] == [[None], [None] * 2]
    got = [channel.get("blocked", no_ack=True) for _ in range(6)]
    assert sorted(one.content.body for one in got if one) == [b"0", b"3", b"4", b"4", b"4", b"5"]
    assert "takes no messages for now: low on memory" in caplog.text


def test_reason_of_an_operator_who_closes_connections_is_told(
    tls_server: RabbitServer, files: Certificates, connect: Any
) -> None:
    def new() -> Connection:
        made: Connection = connect(tls_server.url(), ssl_ca_certs=str(files.ca))
        return made

    told = "320 CONNECTION_FORCED - closed by the test"
    listening_, calling, publishing = new(), new(), new()
    channel, publisher = calling.open_channel(), publishing.publisher()
    assert tls_server.close_connections() == 3
    wait_until(listening_.has_input, what="the end")
    descriptor = listening_.fileno()
    with pytest.raises(OperationalError, match=told):
        listening_.read_ready()
    assert listening_.broken and listening_.fileno() == descriptor
    with pytest.raises(OperationalError, match=f"no more use: {told}"):
        listening_.read_ready()
    with pytest.raises(OperationalError, match=told):
        channel.call("basic.qos")
    with pytest.raises(OperationalError, match=told):
        publisher.publish([item("q")], 10)
    for one in (listening_, calling, publishing):
        one.close()
        assert one.fileno() == -1


def test_killed_server_breaks_connections_and_new_ones_work_when_it_is_back(
    tls_server: RabbitServer, files: Certificates
) -> None:
    server = server_for(tls_server.url(), ssl_ca_certs=str(files.ca))
    with server.borrow(20) as rabbit, server.borrow(20):
        declare(rabbit.publisher(), "kept")
        rabbit.publisher().publish([item("kept", delivery_mode=2)] * 3, 10)
    tls_server.kill()
    with pytest.raises(OperationalError, match="refused"), server.borrow(10) as rabbit:
        pass
    tls_server.start()
    with server.borrow(20) as rabbit:
        assert rabbit.publisher().publish([item("kept")], 10) == [None]
        assert count(rabbit.publisher(), "kept") == 4


# -- heartbeats ----------------------------------------------------------------------------------


def test_heartbeats_are_agreed_on_where_they_are_wanted(
    rabbit_server: RabbitServer, rabbit_url: str, connect: Any
) -> None:
    assert connect(rabbit_url, name="publishing", heartbeat=7).heartbeat_s == 0
    assert connect(rabbit_url, name="own", with_heartbeat=True, heartbeat=7).heartbeat_s == 7
    assert connect(rabbit_url, name="less", with_heartbeat=True, heartbeat=1000).heartbeat_s == 60
    assert connect(rabbit_url, name="server's", with_heartbeat=True).heartbeat_s == 60
    assert connect(rabbit_url, name="none", with_heartbeat=True, heartbeat=0).heartbeat_s == 0
    timeouts = {
        row["client_properties"].get("connection_name"): row["timeout"] for row in rabbit_server.connections()
    }
    assert timeouts == {"publishing": 0, "own": 7, "less": 60, "server's": 60, "none": 0}


def test_heartbeats_keep_an_idle_connection_and_a_silent_one_is_dropped(
    rabbit_url: str, connect: Any
) -> None:
    kept, left = (connect(rabbit_url, with_heartbeat=True, heartbeat=1) for _ in range(2))
    channel = kept.open_channel()
    # The server drops whom it has not heard for two intervals, and more.
    while not left.has_input() or kept.heard_mono - left.heard_mono < 2.5:
        kept.keep_alive(time.monotonic())
        if kept.has_input():
            kept.read_ready()
        if left.has_input():
            try:
                left.read_ready()
            except OperationalError:
                break
        time.sleep(0.02)
    assert channel.call("basic.qos") == {} and left.broken


# -- peers that behave as no server does ---------------------------------------------------------

START = {
    "version_major": 0, "version_minor": 9, "server_properties": {"version": "3.8.0"},
    "mechanisms": b"PLAIN AMQPLAIN", "locales": b"en_US",
}  # fmt: skip


def frame(name: str, channel: int = 0, **args: Any) -> bytes:
    return encode_frame(FRAME_METHOD, channel, encode_method(name, args))


def read_frame(peer: socket.socket) -> bytes:
    """Return the first ten bytes or so of the next frame, with class and method."""
    with peer.makefile("rb", buffering=0) as file:
        head = exactly(file, 7)
        return head + exactly(file, int.from_bytes(head[3:], "big") + 1)[:-1]


def exactly(file: Any, size: int) -> bytes:
    found = b""
    while len(found) < size:
        piece = file.read(size - len(found))
        if not piece:
            raise ConnectionError("the client went away")
        found += piece
    return found


def talking(*said: bytes, heartbeat: int = 0, then: Optional[Callable[[socket.socket], None]] = None) -> Any:
    """Return the conversation of a server that opens a connection and one channel.

    After that it answers each thing it hears with the next of `said`, then does what `then` does.
    """

    def talk(peer: socket.socket) -> None:
        peer.recv(8)
        peer.sendall(frame("connection.start", **START))
        read_frame(peer)
        peer.sendall(frame("connection.tune", channel_max=10, frame_max=131072, heartbeat=heartbeat))
        read_frame(peer)
        read_frame(peer)
        peer.sendall(frame("connection.open-ok"))
        read_frame(peer)
        peer.sendall(frame("channel.open-ok", 1))
        for data in said:
            read_frame(peer)
            peer.sendall(data)
        (then or hold)(peer)

    return talk


def url_of(address: Tuple[str, int]) -> str:
    return f"amqp://user:secret@{address[0]}:{address[1]}/v"


def test_silent_server_ends_the_attempt_at_the_deadline() -> None:
    with listening(hold) as address:
        began = time.monotonic()
        with pytest.raises(OperationalError, match=r"time for it was over \(handshake\)") as raised:
            server_for(url_of(address)).connect(0.3)
        assert 0.25 < time.monotonic() - began < 5
        assert "secret" not in str(raised.value) and f":{address[1]}/v" in str(raised.value)


def closing(code: int, text: str) -> bytes:
    return frame("connection.close", reply_code=code, reply_text=text)


BEGIN = frame("connection.start", **START)
TUNE = frame("connection.tune", channel_max=10, frame_max=131072, heartbeat=0)


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        ([b"AMQP\x00\x00\x09\x01"], OperationalError, "not AMQP 0-9-1.*does not speak AMQP 0-9-1"),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], OperationalError, "not AMQP 0-9-1"),
        ([b""], OperationalError, r"closed the connection \(handshake\)"),
        ([BEGIN.replace(b"PLAIN AMQPLAIN", b"SCRAM-SHA-1256")], ImproperlyConfigured, "offers: SCRAM"),
        ([BEGIN, closing(403, "no")], ImproperlyConfigured, "check user and password"),
        ([BEGIN, frame("connection.secure")], OperationalError, "secure came where"),
        ([BEGIN, TUNE, closing(530, "no vhost")], ImproperlyConfigured, "virtual host 'v'"),
        ([BEGIN, TUNE, closing(530, "limit (3)")], OperationalError, r"limit \(3\)"),
        ([BEGIN, TUNE, closing(541, "oops")], OperationalError, "541 oops"),
    ],
)  # fmt: skip
def test_handshake_that_must_fail_says_why(said: List[bytes], kind: Any, told: str) -> None:
    def talk(peer: socket.socket) -> None:
        peer.recv(8)
        for number, data in enumerate(said):
            if number:
                read_frame(peer)
            peer.sendall(data)
        if said[-1]:
            hold(peer)

    with listening(talk) as address, pytest.raises(kind, match=told) as raised:
        server_for(url_of(address)).connect(10)
    assert raised.type is kind


def test_server_that_falls_silent_breaks_the_connection(connect: Any) -> None:
    with listening(talking()) as address:
        rabbit = connect(url_of(address), socket_timeout=0.2)
        channel = rabbit.open_channel()
        began = time.monotonic()
        with pytest.raises(OperationalError, match=r"time for it was over \(basic.qos\)"):
            channel.call("basic.qos")
        assert time.monotonic() - began < 5
        # The late answer must never be taken for that of the next call.
        with pytest.raises(OperationalError, match="no more use"):
            channel.call("basic.qos")
        rabbit.close()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"nonsense", "not AMQP 0-9-1"),
        (frame("queue.purge-ok", 1), "which nothing asked for"),
        (frame("basic.qos-ok", 5), "channel 5, which is not open"),
        (b"\x01\x00\x01\xff\xff\xff\xff\x00", "131064"),
        (closing(505, "UNEXPECTED_FRAME"), "505 UNEXPECTED_FRAME"),
    ],
)
def test_answer_that_no_server_should_give_breaks_the_connection(
    said: bytes, told: str, connect: Any
) -> None:
    with listening(talking(said)) as address:
        rabbit = connect(url_of(address), socket_timeout=5)
        channel = rabbit.open_channel()
        with pytest.raises(OperationalError, match=told):
            channel.call("basic.qos")
        assert rabbit.broken
        rabbit.close()


def test_confirms_in_any_order_and_grouping_are_understood(connect: Any) -> None:
    def acks(*tags: int, kind: str = "basic.ack", multiple: bool = False) -> bytes:
        return b"".join(frame(kind, 1, delivery_tag=tag, multiple=multiple) for tag in tags)

    said = acks(3) + acks(2, multiple=True) + acks(5, kind="basic.nack") + acks(4, 4) + acks(6, multiple=True)
    more = acks(6, 7) + encode_frame(FRAME_HEARTBEAT, 0, b"")

    def then(peer: socket.socket) -> None:
        peer.recv(1 << 16)
        peer.sendall(said)
        peer.recv(1 << 16)
        # The first of these was confirmed before: one that came late.
        peer.sendall(more)
        hold(peer)

    with listening(talking(frame("confirm.select-ok", 1), then=then)) as address:
        rabbit = connect(url_of(address))
        channel = rabbit.publisher()
        refusals = channel.publish([item("q")] * 6, 10)
        assert [refusal and refusal.kind for refusal in refusals] == [None] * 4 + ["nack", None]
        assert channel.publish([item("q")], 10) == [None]
        rabbit.break_off("the peer knows no goodbye")
        rabbit.close()


def test_missing_confirm_is_an_error_at_the_deadline(connect: Any) -> None:
    with listening(talking(frame("confirm.select-ok", 1))) as address:
        rabbit = connect(url_of(address))
        channel = rabbit.publisher()
        began = time.monotonic()
        with pytest.raises(OperationalError, match=r"time for it was over \(basic.publish\)"):
            channel.publish([item("q")], 0.2)
        assert rabbit.broken and time.monotonic() - began < 5
        rabbit.close()


def test_heartbeats_go_out_when_due_and_silence_is_the_end(connect: Any) -> None:
    heard: List[bytes] = []

    def then(peer: socket.socket) -> None:
        peer.sendall(encode_frame(FRAME_HEARTBEAT, 0, b""))
        heard.append(read_frame(peer))
        hold(peer)

    with listening(talking(heartbeat=10, then=then)) as address:
        rabbit = connect(url_of(address), with_heartbeat=True)
        rabbit.open_channel()
        wait_until(rabbit.has_input, what="the server's heartbeat")
        rabbit.read_ready()
        mono = rabbit.said_mono
        rabbit.keep_alive(mono + 4)
        assert rabbit.said_mono == mono
        rabbit.keep_alive(mono + 6)
        assert rabbit.said_mono > mono
        wait_until(lambda: heard, what="our heartbeat")
        assert heard[0][0] == FRAME_HEARTBEAT
        with pytest.raises(OperationalError, match="no heartbeat for 2[12] s"):
            rabbit.keep_alive(rabbit.heard_mono + 21.5)
        assert rabbit.broken
        rabbit.close()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals between threads here")
def test_exception_from_a_signal_breaks_the_connection(connect: Any) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted

    main = threading.main_thread().ident
    assert main is not None

    def then(peer: socket.socket) -> None:
        read_frame(peer)
        signal.pthread_kill(main, signal.SIGUSR1)
        hold(peer)

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with listening(talking(frame("confirm.select-ok", 1), then=then)) as address:
            rabbit = connect(url_of(address))
            with pytest.raises(Interrupted):
                rabbit.publisher().publish([item("q")], 60)
            assert rabbit.broken
            rabbit.close()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_close_is_bounded_when_nobody_answers(connect: Any) -> None:
    with listening(talking()) as address:
        rabbit = connect(url_of(address))
        rabbit.open_channel()
        began = time.monotonic()
        rabbit.close(0.1)
        assert time.monotonic() - began < 3 and rabbit.broken and rabbit.fileno() == -1


# -- login ---------------------------------------------------------------------------------------


def test_wrong_password_and_wrong_virtual_host_are_for_the_operator(
    rabbit_server: RabbitServer, connect: Any
) -> None:
    with pytest.raises(
        ImproperlyConfigured, match="login: 403 ACCESS_REFUSED.*check user and password"
    ) as raised:
        connect(rabbit_server.url(password="guessed"))
    assert "guessed" not in str(raised.value)
    with pytest.raises(ImproperlyConfigured, match="'missing'.*530 NOT_ALLOWED - vhost missing not found"):
        connect(rabbit_server.url("missing"))
    with pytest.raises(ImproperlyConfigured, match="does not know the login_method EXTERNAL"):
        connect(rabbit_server.url(), login_method="EXTERNAL")
    # Once we were let in, it is passing: nobody shall lose his work because of it.
    server = server_for(rabbit_server.url())
    server.connect(10).close()
    server.endpoints = (server.endpoints[0]._replace(password="changed"),)
    with pytest.raises(OperationalError, match="ACCESS_REFUSED"):
        server.connect(10)


def test_password_with_special_characters_and_amqplain(
    rabbit_server: RabbitServer, rabbit_url: str, connect: Any
) -> None:
    vhost = vhost_of(rabbit_url)
    user, password = f"us:r@{vhost}", "p@ss/w#rd % ü"
    rabbit_server.add_user(user, password)
    rabbit_server.set_permissions(user, vhost)
    for method in (None, "PLAIN", "AMQPLAIN"):
        rabbit = connect(rabbit_server.url(vhost, user, password), login_method=method, name=f"{method}")
        assert rabbit.open_channel().number == 1
    shown = named(rabbit_server)
    assert {name: shown[name]["auth_mechanism"] for name in ("PLAIN", "AMQPLAIN")} == {
        "PLAIN": "PLAIN", "AMQPLAIN": "AMQPLAIN"
    }  # fmt: skip
    assert shown["None"]["user"] == user


def test_tls_with_verification_and_client_certificate(
    tls_server: RabbitServer, files: Certificates, connect: Any
) -> None:
    url = tls_server.url()
    with pytest.raises(ImproperlyConfigured, match="certificate was not accepted"):
        connect(url)
    with pytest.raises(OperationalError):
        connect(url.replace("amqps", "amqp"))
    for options in ({"ssl_ca_certs": str(files.ca)}, {"ssl_cert_reqs": "none"}):
        rabbit = connect(url, **options)
        channel = rabbit.publisher()
        declare(channel, "tls")
        body = os.urandom(500_000)
        assert channel.publish([item("tls", body)] * 3, 20) == [None] * 3
        got = [channel.get("tls", no_ack=True) for _ in range(3)]
        assert [one is not None and one.content.body == body for one in got] == [True] * 3
    ours = {
        "ssl_ca_certs": str(files.ca),
        "ssl_certfile": str(files.client_certificate),
        "ssl_keyfile": str(files.client_key),
    }
    connect(url, login_method="EXTERNAL", name="external", **ours).open_channel()
    assert named(tls_server)["external"]["user"] == CLIENT


# -- the pool ------------------------------------------------------------------------------------


def test_connection_and_publisher_of_the_pool_are_used_again(rabbit_url: str) -> None:
    server = server_for(rabbit_url)
    with server.borrow(10) as first:
        channel = first.publisher(10)
        assert channel.confirms
    with server.borrow(10) as again:
        assert again is first and again.publisher(10) is channel


def test_connection_closed_while_idle_is_replaced(tls_server: RabbitServer, files: Certificates) -> None:
    server = server_for(tls_server.url(), ssl_ca_certs=str(files.ca))
    with server.borrow(10) as first:
        first.publisher(10)
    tls_server.close_connections()
    wait_until(first.has_input, what="the end")
    with server.borrow(10) as second:
        assert second is not first and second.publisher(10).number == 1
    assert first.broken and first.fileno() == -1


def test_idle_connections_into_a_black_hole_are_replaced(
    rabbit_server: RabbitServer, rabbit_url: str
) -> None:
    with Proxy(rabbit_server.port) as proxy:
        server = server_for(proxy.url(rabbit_url), health_check_interval=1e-9, socket_timeout=0.3)
        with server.borrow(10) as first, server.borrow(10) as second:
            declare(first.publisher())
        with server.borrow(10) as again:
            assert again is first  # it was asked, and answered
        proxy.black_hole()
        with server.borrow(10) as third:
            assert third.publisher(10).publish([item("q")], 10) == [None]
        assert first.broken and second.broken
        Server.close_all()


def test_dribbling_server_is_understood_within_the_deadline_and_not_beyond(
    rabbit_server: RabbitServer, rabbit_url: str
) -> None:
    with Proxy(rabbit_server.port) as proxy:
        server = server_for(proxy.url(rabbit_url), connect_timeout=20)
        proxy.dribble()
        rabbit = server.connect(20)
        channel = rabbit.publisher(20)
        channel.call("queue.declare", queue="q", durable=True, timeout_s=20)
        assert channel.publish([item("q")], 20) == [None]
        proxy.dribble(0.05)
        began = time.monotonic()
        with pytest.raises(OperationalError, match="time for it was over"):
            channel.call("queue.declare", queue="q", durable=True, timeout_s=0.3)
        assert time.monotonic() - began < 5
        rabbit.close()


def test_pool_that_is_lent_out_names_its_limit(rabbit_url: str) -> None:
    server = server_for(rabbit_url, max_connections=2)
    told = "all 2 connections of the pool.*max_connections"
    with server.borrow(10), server.borrow(10), pytest.raises(OperationalError, match=told):
        server.take(0.05)


def test_many_threads_publish_each_with_its_own_confirms(rabbit_url: str, connect: Any) -> None:
    server = server_for(rabbit_url, max_connections=3)
    own = connect(rabbit_url).open_channel()
    declare(own)
    wrong: List[Any] = []

    def work(number: int) -> None:
        for turn in range(40):
            good = item("q", b"%d %d" % (number, turn))
            with server.borrow(60) as rabbit:
                channel = rabbit.publisher(60)
                if turn % 10 == 0:
                    refusals = channel.publish([good, item("nowhere"), good], 60)
                    if [one is None for one in refusals] != [True, False, True]:
                        wrong.append(refusals)
                elif channel.publish([good], 60) != [None]:
                    wrong.append(turn)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert len(server._members) <= 3
    assert count(own) == 8 * 44


# -- forks ---------------------------------------------------------------------------------------


@NO_FORK
def test_child_has_connections_of_its_own_and_the_parent_keeps_its(rabbit_url: str, connect: Any) -> None:
    server = server_for(rabbit_url, max_connections=1)
    own = connect(rabbit_url)
    channel = own.open_channel()
    declare(channel)
    with server.borrow(10) as lent:
        publisher = lent.publisher(10)

        def work() -> None:
            assert own.fileno() == lent.fileno() == -1
            with pytest.raises(OperationalError, match="inherited through a fork"):
                channel.call("basic.qos")
            with pytest.raises(OperationalError, match="inherited through a fork"):
                publisher.publish([item("q", b"by the child")], 10)
            # The parent lent its only one: that is nothing to the child.
            with server.borrow(10) as rabbit:
                assert rabbit is not lent
                assert rabbit.publisher(10).publish([item("q", b"child")], 10) == [None]
            own.close()
            Server.close_all()

        assert in_child(work) == 0
        assert publisher.publish([item("q", b"parent")], 10) == [None]
    got = [channel.get("q", no_ack=True) for _ in range(3)]
    assert [one and one.content.body for one in got] == [b"child", b"parent", None]


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; return its exit code, 0 where it raised nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads, from 3.12 on
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            os.write(2, f"in the child: {error!r}\n".encode())
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


# -- failover ------------------------------------------------------------------------------------


def test_next_url_is_used_when_one_fails_and_remembered(
    rabbit_server: RabbitServer, rabbit_url: str, connect: Any
) -> None:
    with Proxy(rabbit_server.port) as one, Proxy(rabbit_server.port) as two:
        urls = f"{one.url(rabbit_url)};{two.url(rabbit_url)}"
        assert f":{one.port}/" in connect(urls).url
        one.refuse()
        assert f":{two.port}/" in connect(urls).url
        one.forward()
        assert f":{two.port}/" in connect(urls).url
        two.refuse()
        assert f":{one.port}/" in connect(urls).url
        one.refuse()
        with pytest.raises(
            OperationalError, match=f"none of 2 servers.*{one.port}.*refused.*{two.port}.*refused"
        ):
            connect(urls)


def test_silent_server_leaves_time_for_the_next_url(rabbit_url: str, connect: Any) -> None:
    with listening(hold) as address:
        rabbit = connect(f"{url_of(address)};{rabbit_url}", timeout_s=2.0)
        assert rabbit.url.endswith(endpoints(rabbit_url, Options())[0].url)
        rabbit.close()


def test_nobody_listens_is_told_with_the_place() -> None:
    port = free_port()
    with pytest.raises(OperationalError, match=f"{HOST}:{port}.*connection refused"):
        server_for(f"amqp://{HOST}:{port}").connect(5)

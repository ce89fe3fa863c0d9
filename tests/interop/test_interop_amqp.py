# SPDX-License-Identifier: MIT
"""What is of RabbitMQ alone: messages and queues as it sees them, priorities, quorum queues, delays."""

from __future__ import annotations

import datetime as dt
import json
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Set, Tuple

import pytest
from interop_fleet import (
    PAIRS,
    TIMEOUT_S,
    AmqpFleet,
    Backlog,
    Fleet,
    Pair,
    Side,
    get,
    new_key,
    skip_without_celery,
)
from waiting import wait_until

from miniq import Exchange, Queue

skip_without_celery()
kombu = pytest.importorskip("kombu")

pytestmark = pytest.mark.over("amqp+redis")
KINDS = ("celery", "miniq")


# -- messages ------------------------------------------------------------------------------------


@pytest.fixture
def channel(fleet: Fleet) -> Iterator[Any]:
    """A channel of Celery's library, to look at what is in queues."""
    with fleet.side("celery").app.connection_for_read() as connection:
        yield connection.default_channel


def take(channel: Any, queue: str) -> Dict[str, Any]:
    """Return the next message of a queue as a dict of its parts."""
    message = wait_until(lambda: channel.basic_get(queue, no_ack=True), TIMEOUT_S, f"a message in {queue}")
    properties = dict(message.properties)
    headers = properties.pop("application_headers")
    return {**message.delivery_info, "properties": properties, "headers": headers, "body": message.body}


#: Name -> arguments of apply_async.
CALLS: Dict[str, Dict[str, Any]] = {
    "plain": {},
    "priority": {"priority": 7},
    "headers": {"headers": {"mine": {"deep": [1, 1 << 40, -2.5, None, True, "ø"]}}},
    "limits": {"time_limit": 9, "soft_time_limit": 4.5},
    "due": {"eta": dt.datetime(2020, 1, 1, 12, tzinfo=dt.timezone.utc)},
    "transient": {"delivery_mode": 1},
    "retried": {"retries": 2, "root_id": "root", "parent_id": "parent"},
    "ignored": {"ignore_result": True, "shadow": "other name"},
    "compressed": {"compression": "zlib"},
    "pickled": {"serializer": "pickle"},
}


def sent_by_both(fleet: Fleet, channel: Any, queue: str, **options: Any) -> List[Dict[str, Any]]:
    """Make the same call on both sides; return the messages, what is different each time left out."""
    found = []
    for kind in KINDS:
        fleet.side(kind).call("echo", 1, "ø", kwargs={"z": [None]}, queue=queue, task_id="this-id", **options)
        message = take(channel, queue)
        del message["delivery_tag"], message["message_count"]
        # Celery leaves it out when a call names the queue; absent is 0 to all that read it.
        message["properties"].setdefault("priority", 0)
        assert message["properties"].pop("reply_to")
        assert message["headers"].pop("origin").startswith("gen")
        found.append(message)
    return found


@pytest.mark.parametrize("name", CALLS)
def test_both_callers_put_the_same_message_into_the_same_queue(fleet: Fleet, channel: Any, name: str) -> None:
    celerys, miniqs = sent_by_both(fleet, channel, f"nobodys_{name}", **CALLS[name])
    assert miniqs == celerys


def test_both_callers_tell_rabbitmq_when_a_message_expires(fleet: Fleet, channel: Any) -> None:
    expires = dt.datetime.now(dt.timezone.utc) + dt.timedelta(hours=1)
    celerys, miniqs = sent_by_both(fleet, channel, "nobodys_expiring", expires=expires)
    left_ms = [int(message["properties"].pop("expiration")) for message in (celerys, miniqs)]
    assert 3_500_000 < left_ms[1] <= left_ms[0] <= 3_600_000
    assert miniqs == celerys


def test_header_values_of_every_kind_arrive_as_they_were(pair: Pair) -> None:
    mine: Dict[str, Any] = {"": [1, -1, 1 << 31, 1 << 62, 0.5, None, True, "ø" * 300, {"deep": [[], {}]}]}
    assert get(pair.call("about", headers={"mine": mine}))["mine"] == mine


@pytest.mark.parametrize("caller", KINDS)
def test_a_message_that_expires_in_its_queue_is_gone(fleet: Fleet, caller: str) -> None:
    queue = f"expiring_from_{caller}"
    fleet.side(caller).call("add", 1, 1, queue=queue)
    fleet.side(caller).call("add", 1, 1, queue=queue, expires=0.3)
    wait_until(lambda: fleet.waiting(queue) == 2, TIMEOUT_S, "both are there")
    fleet.side(caller).call("add", 1, 1, queue=f"{queue}_first", expires=0.3)
    wait_until(lambda: fleet.waiting(f"{queue}_first") == 0, TIMEOUT_S, "it is gone")


# -- queues --------------------------------------------------------------------------------------


def topology(fleet: AmqpFleet, space: int) -> Set[str]:
    """Return exchanges, queues and bindings of a space as lines.

    Left out is what RabbitMQ makes itself, and ``_miniq.``, the names of what Celery has nothing like.
    """
    vhost = f'<<"{fleet.vhost(space)}">>'
    found = set()
    for kind, items in (
        ("exchange", "name, type, durable, auto_delete, internal"),
        ("amqqueue", "name, type, durable, auto_delete, exclusive"),
        ("binding", "source_name, destination_name, destination_kind, routing_key"),
    ):
        for row in map(dict, fleet.server.eval(f"rabbit_{kind}:info_all({vhost}, [{items}, arguments])")):
            if kind != "binding":
                row["name"] = row["name"][-1]
            row["arguments"].sort()
            name = row.get("name", row.get("source_name"))
            if name and not name.startswith(("amq.", "_miniq.")):
                found.add(f"{kind} {json.dumps(row)}")
    return found


class Declared(NamedTuple):
    """A queue and its exchange in words that both sides know."""

    exchange: Dict[str, Any]
    queue: Dict[str, Any]
    key: str = "key"


#: A queue's numbers: seconds, bytes, messages.
NUMBERS = {"expires": 60.0, "message_ttl": 5.5, "max_length": 10, "max_length_bytes": 1 << 33}
QUORUM = {"x-queue-type": "quorum", "x-delivery-limit": 5, "x-dead-letter-strategy": "at-least-once"}
DECLARED = {
    "plain": Declared({}, {}),
    "numbers": Declared({}, {**NUMBERS, "max_priority": 5}),
    "transient": Declared({"durable": False}, {"durable": False, "auto_delete": True}),
    "topic": Declared({"type": "topic"}, {}, "a.*.#"),
    "fanout": Declared({"type": "fanout", "auto_delete": True}, {}, ""),
    "quorum": Declared({}, {"queue_arguments": QUORUM}),
    "headers": Declared({"type": "headers"}, {"binding_arguments": {"x-match": "all", "colour": "red"}}),
}


@pytest.mark.parametrize("name", DECLARED)
def test_a_queue_that_both_declare_is_the_same_to_rabbitmq(fleet: AmqpFleet, channel: Any, name: str) -> None:
    exchange, options, key = DECLARED[name]
    transport = fleet.side("miniq").app.producer.transport
    found: List[Set[str]] = []
    for first in KINDS:
        queue = f"{name}_{first}_first"
        celerys = kombu.Queue(queue, kombu.Exchange(queue, **exchange), key, **options)(channel)
        miniqs = Queue(queue, Exchange(queue, **exchange), key, **options)
        if first == "celery":
            celerys.declare()
            of_one = topology(fleet, 0)
            transport.declare(miniqs)
        else:
            transport.declare(miniqs)
            of_one = topology(fleet, 0)
            celerys.declare()
        for lines in (of_one, topology(fleet, 0)):
            found.append({line.replace(queue, "it") for line in lines if queue in line})
    assert len(found[0]) == 3
    assert found[1:] == found[:1] * 3


#: Settings of workers whose declarations are compared.
SETTINGS: Dict[str, Dict[str, Any]] = {
    "default": {},
    "priorities": {"task_queue_max_priority": 10},
    "quorum": {"task_default_queue_type": "quorum", "task_default_exchange_type": "topic"},
}
#: Space of the first one.
ALONE = 10


@pytest.fixture(scope="module")
def alone(fleet: AmqpFleet) -> Dict[Tuple[str, str], int]:
    """Start workers of each kind with each of `SETTINGS`, each alone in a space; the spaces."""
    spaces: Dict[Tuple[str, str], int] = {}
    for kind in KINDS:
        for name, more in SETTINGS.items():
            space = spaces[kind, name] = ALONE + len(spaces)
            # Gossip is between workers of Celery.
            args = ["--without-mingle", "--without-gossip"] if kind == "celery" else []
            fleet.start(f"{kind}_{name}", kind, "", "-P", "solo", *args, space=space, **more)
    return spaces


@pytest.mark.parametrize("name", SETTINGS)
def test_a_worker_declares_what_celerys_declares(
    fleet: AmqpFleet, alone: Dict[Tuple[str, str], int], name: str
) -> None:
    found = {}
    for kind in KINDS:
        fleet.workers[f"{kind}_{name}"].wait_ready()
        lines = (line.replace(f"{kind}_{name}@", "w1@") for line in topology(fleet, alone[kind, name]))
        # Events are Celery's alone.
        found[kind] = {line for line in lines if '"celeryev' not in line}
    if name == "quorum":
        # "#.celery" would take what is meant for "eu.celery" too: a star for each digit does not.
        stars = "*." * 28 + "celery"
        found["celery"] = {line.replace('"#.celery"', f'"{stars}"') for line in found["celery"]}
        (more,) = found["miniq"] - found["celery"]
        assert '"celery_delayed_delivery", "destination_name": "celery", "destination_kind": "queue"' in more
        found["miniq"].remove(more)
    assert found["miniq"] == found["celery"]
    assert len(found["celery"]) == {"quorum": 121}.get(name, 6)


@pytest.mark.parametrize("declarer, caller", [("celery", "miniq"), ("miniq", "celery")])
def test_what_one_side_binds_the_other_side_reaches(
    fleet: Fleet, channel: Any, declarer: str, caller: str
) -> None:
    images, everything, other = (f"{name}_by_{declarer}" for name in ("images", "everything", "other"))
    media, plain = f"media_{declarer}", f"plain_{declarer}"
    transport = fleet.side("miniq").app.producer.transport
    for queue, exchange, kind, key in (
        (images, media, "topic", "media.image.*"),
        (everything, media, "topic", "media.#"),
        (other, plain, "direct", "letter"),
    ):
        if declarer == "celery":
            kombu.Queue(queue, kombu.Exchange(exchange, kind), key)(channel).declare()
        else:
            transport.declare(Queue(queue, Exchange(exchange, kind), key))
    side = fleet.side(caller)
    for exchange, key in ((media, "media.image.png"), (media, "media.video"), (plain, "letter")):
        side.call("add", 1, 1, exchange=exchange, routing_key=key, ignore_result=True)
    counts = [(images, 1), (everything, 2), (other, 1)]
    wait_until(lambda: all(fleet.waiting(queue) == count for queue, count in counts), TIMEOUT_S, "arrived")


@pytest.mark.parametrize("caller", KINDS)
def test_what_goes_to_a_fanout_exchange_is_run_by_workers_of_both_kinds(fleet: Fleet, caller: str) -> None:
    for kind in KINDS:
        fleet.workers[kind].wait_ready()
    key, lines = new_key(), fleet.journal.of
    fleet.side(caller).call("note", key, exchange="news", routing_key="whatever", ignore_result=True)
    wait_until(lambda: len(lines(key)) == 2, TIMEOUT_S, lambda: f"both ran it: {lines(key)}")
    assert {line[0] for line in lines(key)} == set(KINDS)


@pytest.mark.parametrize("victim", KINDS)
def test_what_a_killed_worker_held_is_run_by_one_of_the_other_kind(fleet: Fleet, victim: str) -> None:
    key, queue, (heir,) = new_key(), f"handed_on_by_{victim}", set(KINDS) - {victim}
    args = ["--without-mingle"] if victim == "celery" else []
    killed = fleet.start(f"killed_{victim}", victim, queue, "-P", "solo", *args).wait_ready()
    side = fleet.side("miniq")
    result = side.call("hold_late", key, queue=queue)
    wait_until(lambda: fleet.journal.of(key), TIMEOUT_S, "the task runs")
    killed.kill()
    side.app.control.add_consumer(queue, destination=[f"{heir}@interop"])
    wait_until(lambda: len(fleet.journal.of(key)) == 2, TIMEOUT_S, f"it runs again in {heir}")
    fleet.journal.let_go(key)
    assert get(result) == key
    assert [line[0] for line in fleet.journal.of(key)] == [victim, heir]
    wait_until(fleet.nothing_held, TIMEOUT_S, "the message is acknowledged")


# -- priorities ----------------------------------------------------------------------------------

#: Priorities as they are sent, and as they must be run: the highest first, each in turn.
SENT = [5, 0, 9, 3, 7, 1, 8, 2, 6, 4, None]
RUN = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, None]


@pytest.fixture(scope="module")
def late(fleet: Fleet) -> Backlog:
    more = {"task_queue_max_priority": 10}
    return Backlog(fleet, 1, SENT, more, dict.fromkeys(KINDS, more))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_priority_9_runs_first(late: Backlog, pair: Tuple[str, str]) -> None:
    assert late.lines(pair) == RUN


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pickle_is_refused_where_it_is_not_accepted(late: Backlog, pair: Tuple[str, str]) -> None:
    late.check_the_refused_one(pair)


# -- delays --------------------------------------------------------------------------------------

#: Seconds that tasks are delayed: more than what a worker would rather hold itself.
DELAY_S = 3.0


def test_what_is_not_due_for_long_waits_in_rabbitmq_and_runs_once(fleet: AmqpFleet) -> None:
    sent_at, calls = time.time(), []
    # A caller of miniq sends it there; a worker of miniq puts there what it was sent.
    for caller, worker in (("miniq", "celery"), ("celery", "miniq")):
        fleet.workers[worker].wait_ready()
        key, queue = new_key(), f"to_{worker}"
        calls.append((key, fleet.side(caller).call("flaky", key, 0, queue=queue, countdown=DELAY_S)))

    def waiting() -> int:
        queues = fleet.server.queues(fleet.vhost(0)).items()
        return sum(queue["messages_ready"] for name, queue in queues if name.startswith("_miniq.delay."))

    wait_until(lambda: waiting() == len(calls), DELAY_S, lambda: f"{waiting()} wait there")
    wait_until(fleet.nothing_held, DELAY_S, "no worker holds one")
    for key, result in calls:
        get(result)
        (line,) = fleet.journal.of(key)
        assert line[2] >= sent_at + DELAY_S


# -- quorum queues, and Celery's native delayed delivery -----------------------------------------

#: `DELAY_S` of a retry, by worker.  Celery sends the headers along that RabbitMQ has put in; by these a
#: message that comes to a queue for the second time is seen as running in circles, and dropped.
RETRY_S = {"celery": 4.5, "miniq": DELAY_S}


class Delayed(NamedTuple):
    """Calls to workers with quorum queues, by (caller, worker)."""

    fleet: AmqpFleet
    sent_at: float
    keys: Dict[Tuple[str, str], str]
    results: Dict[Tuple[str, str], Any]
    retried: Dict[Tuple[str, str], Any]

    def side(self, kind: str) -> Side:
        return self.fleet.side(kind, 2)


@pytest.fixture(scope="module")
def delayed(fleet: AmqpFleet) -> Delayed:
    """Start workers of both kinds with quorum queues; send what takes its time to all of them at once."""
    more = {
        "task_default_queue_type": "quorum",
        "task_default_exchange_type": "topic",
        "task_create_missing_queue_type": "quorum",
        "task_create_missing_queue_exchange_type": "topic",
    }
    for kind in KINDS:
        args = ["--without-mingle"] if kind == "celery" else []
        fleet.start(f"quorum_{kind}", kind, f"to_{kind},both,celery", "-P", "solo", *args, space=2, **more)
        fleet.side(kind, 2, **more)
    for kind in KINDS:
        fleet.workers[f"quorum_{kind}"].wait_ready()
    found = Delayed(fleet, time.time(), {pair: new_key() for pair in PAIRS}, {}, {})
    for caller, worker in PAIRS:
        call = found.side(caller).call
        to: Dict[str, Any] = {"queue": f"to_{worker}", "countdown": DELAY_S}
        found.results[caller, worker] = call("flaky", found.keys[caller, worker], 0, **to)
        found.retried[caller, worker] = call("put_off", new_key(), RETRY_S[worker], **to)
    return found


def test_delayed_calls_wait_in_rabbitmq_and_not_in_a_worker(delayed: Delayed) -> None:
    vhost = f'<<"{delayed.fleet.vhost(2)}">>'
    # Names of both layouts, Celery's and ours; `queues` counts late where they are quorum queues.
    count = (
        f"lists:sum([Count || Queue <- rabbit_amqqueue:list({vhost}),"
        ' binary:match(element(4, amqqueue:get_name(Queue)), <<"delay">>) =/= nomatch,'
        " {ok, Count, _} <- [rabbit_amqqueue:stat(Queue)]])"
    )
    eval_ = delayed.fleet.server.eval
    wait_until(lambda: eval_(count) == 2 * len(PAIRS), DELAY_S, lambda: f"{eval_(count)} wait there")


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_call_by_way_of_quorum_queues_returns(delayed: Delayed, pair: Tuple[str, str]) -> None:
    side, queue = delayed.side(pair[0]), f"to_{pair[1]}"
    assert get(side.call("who", None, queue=queue)) == [pair[1], None]
    soon = time.time() + 1.2  # Celery refuses what is less than a second
    assert get(side.call("moment", queue=queue, countdown=1.2)) >= soon


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_delayed_call_runs_once_and_when_it_is_due(delayed: Delayed, pair: Tuple[str, str]) -> None:
    get(delayed.results[pair])
    (line,) = delayed.fleet.journal.of(delayed.keys[pair])
    assert line[0] == pair[1]
    assert line[2] >= delayed.sent_at + DELAY_S


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_delayed_call_is_delayed_again_by_its_retry(delayed: Delayed, pair: Tuple[str, str]) -> None:
    assert get(delayed.retried[pair]) == 1
    assert time.time() >= delayed.sent_at + DELAY_S + RETRY_S[pair[1]]


def test_workers_of_both_kinds_share_a_quorum_queue(delayed: Delayed) -> None:
    key, count, done = new_key(), 100, delayed.fleet.journal.of
    for number in range(count):
        delayed.side(KINDS[number % 2]).call("share", key, number, queue="both", ignore_result=True)
    wait_until(lambda: len(done(key)) >= count, TIMEOUT_S, lambda: f"{len(done(key))} of {count} are done")
    assert sorted(line[4] for line in done(key)) == list(range(count))
    assert {line[0] for line in done(key)} == set(KINDS)

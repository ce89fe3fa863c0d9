# SPDX-License-Identifier: MIT
"""Settings that change what is in Redis, the same on both sides; and queues on other exchanges."""

from __future__ import annotations

import time
from typing import Any, Dict, Iterator

import pytest
from interop_fleet import PAIRS, TIMEOUT_S, Fleet, Side, get, new_key, skip_without_celery
from waiting import wait_until

from miniq import Exchange, Queue

skip_without_celery()
kombu = pytest.importorskip("kombu")

#: Number of the database; that of its results is one higher.
DB = 4
SETTINGS: Dict[str, Any] = {
    "broker_transport_options": {"global_keyprefix": "shop:", "priority_steps": [0, 4, 8], "sep": "~"},
    "result_backend_transport_options": {"global_keyprefix": "shop"},
    "result_extended": True,
    "result_expires": None,
    "timezone": "America/New_York",
    "task_track_started": False,
}


@pytest.fixture(scope="module")
def shop(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet with one more worker of each kind, which has these settings."""
    more: Dict[str, Dict[str, Any]] = {
        # Large results of Celery's workers are compressed; both sides read them.
        "celery": {**SETTINGS, "result_compression": "zlib"},
        "miniq": SETTINGS,
    }
    for kind, options in more.items():
        fleet.start(
            f"shop_{kind}", kind, f"to_{kind},news_{kind}", "-c", "1",
            space=DB, news=f"news_{kind}", **options,
        )  # fmt: skip
        fleet.side(kind, DB, news="news_of_nobody", **options)
    for kind in more:
        fleet.workers[f"shop_{kind}"].wait_ready()
    yield fleet


@pytest.mark.parametrize("caller, worker", PAIRS)
def test_key_prefix_steps_and_separator_are_understood(shop: Fleet, caller: str, worker: str) -> None:
    side = shop.side(caller, DB)
    results = [side.call("who", n, queue=f"to_{worker}", priority=n) for n in (0, 3, 4, 9)]
    assert [get(result) for result in results] == [[worker, n] for n in (0, 3, 4, 9)]
    for db in (DB, DB + 1):
        keys = shop.server.command("KEYS", "*", db=db)
        assert [key for key in keys if not key.startswith(b"shop")] == []
    assert shop.server.command("TTL", f"shop_celery-task-meta-{results[0].id}", db=DB + 1) == -1


@pytest.mark.parametrize("caller, worker", PAIRS)
def test_an_extended_result_tells_of_its_task(shop: Fleet, caller: str, worker: str) -> None:
    side, queue = shop.side(caller, DB), f"to_{worker}"
    begun = time.time()
    result = side.call("echo", 1, kwargs={"text": "ø" * 1000}, queue=queue)
    assert get(result) == [[1], {"text": "ø" * 1000}]
    found = side.app.AsyncResult(result.id)
    assert (found.name, found.args, found.kwargs) == ("interop.echo", [1], {"text": "ø" * 1000})
    assert (found.worker, found.queue, found.retries) == (f"shop_{worker}@interop", queue, 0)
    assert begun - 1 <= found.date_done.timestamp() <= time.time() + 1


@pytest.mark.parametrize("caller, worker", PAIRS)
def test_times_of_another_zone_are_the_same_moment(shop: Fleet, caller: str, worker: str) -> None:
    side = shop.side(caller, DB)
    begun = time.time()
    later, over = (
        side.call("moment", queue=f"to_{worker}", countdown=0.5, expires=60),
        side.call("moment", queue=f"to_{worker}", countdown=0.5, expires=0.1),
    )
    assert begun + 0.5 <= get(later) < begun + 0.5 + TIMEOUT_S
    with pytest.raises(side.exceptions.TaskRevokedError, match="expired"):
        get(over)


@pytest.mark.parametrize("caller", ["celery", "miniq"])
def test_what_goes_to_a_fanout_exchange_is_run_by_workers_of_both_kinds(shop: Fleet, caller: str) -> None:
    key = new_key()
    shop.side(caller, DB).call("note", key, queue="news_of_nobody", ignore_result=True)
    lines = shop.journal.of
    wait_until(lambda: len(lines(key)) == 2, TIMEOUT_S, lambda: f"both ran it: {lines(key)}")
    assert {line[0] for line in lines(key)} == {"celery", "miniq"}


def send_through(side: Side, exchange: str, key: str) -> None:
    side.call("add", 1, 1, exchange=exchange, routing_key=key, ignore_result=True)


@pytest.mark.parametrize("declarer, caller", [("celery", "miniq"), ("miniq", "celery")])
def test_what_one_side_binds_the_other_side_reaches(fleet: Fleet, declarer: str, caller: str) -> None:
    images, everything, other = (f"{name}_by_{declarer}" for name in ("images", "everything", "other"))
    media, plain = f"media_{declarer}", f"plain_{declarer}"
    app = fleet.side(declarer).app
    if declarer == "celery":
        topic, direct = kombu.Exchange(media, "topic"), kombu.Exchange(plain, "direct")
        with app.connection_for_write() as connection:
            for queue in (
                kombu.Queue(images, topic, "media.image.*"),
                kombu.Queue(everything, topic, "media.#"),
                kombu.Queue(other, direct, "letter"),
            ):
                queue(connection.default_channel).declare()
    else:
        for ours in (
            Queue(images, Exchange(media, "topic"), routing_key="media.image.*"),
            Queue(everything, Exchange(media, "topic"), routing_key="media.#"),
            Queue(other, Exchange(plain, "direct"), routing_key="letter"),
        ):
            app.producer.transport.declare(ours)
    side = fleet.side(caller)
    if caller == "celery":
        # It takes an exchange for a direct one unless it was declared on the same connection.
        with side.app.producer_pool.acquire(block=True) as producer:
            kombu.Exchange(media, "topic")(producer.channel).declare()
    send_through(side, media, "media.image.png")
    send_through(side, media, "media.video")
    send_through(side, plain, "letter")
    lengths = fleet.server.commands([("LLEN", name) for name in (images, everything, other)])
    assert lengths == [1, 2, 1]


def test_what_a_leaving_celery_worker_hands_back_a_miniq_worker_runs(shop: Fleet) -> None:
    side, leaver, journal = shop.side("miniq", DB), shop.workers["shop_celery"], shop.journal
    keys = [new_key() for _ in range(4)]
    running = side.call("hold", keys[0], queue="to_celery")
    wait_until(lambda: journal.of(keys[0]), TIMEOUT_S, "the first one runs")
    waiting = [side.call("note", key, queue="to_celery") for key in keys[1:]]
    held = ("HLEN", "shop:unacked")
    wait_until(lambda: shop.server.command(*held, db=DB) == 3, TIMEOUT_S, "the others are prefetched")
    leaver.process.terminate()
    leaver.wait_for("Warm shutdown")
    journal.let_go(keys[0])
    assert get(running) == keys[0]
    leaver.wait(TIMEOUT_S)
    side.app.control.add_consumer("to_celery", destination=["shop_miniq@interop"])
    for result in waiting:
        get(result)
    assert [journal.of(key)[0][0] for key in keys] == ["celery", "miniq", "miniq", "miniq"]
    assert [len(journal.of(key)) for key in keys] == [1] * 4

# SPDX-License-Identifier: MIT
"""What is of ``rpc://`` alone: every state is a message to the caller, and there is nothing to look up."""

from __future__ import annotations

import json
import threading
from typing import Any, Dict, Iterator, List

import pytest
from classes_of_both import Refused
from interop_fleet import TIMEOUT_S, AmqpFleet, Pair, error_of, get, new_key, skip_without_celery
from waiting import wait_until

skip_without_celery()
kombu = pytest.importorskip("kombu")

pytestmark = pytest.mark.over("amqp+rpc")
KINDS = ("celery", "miniq")


@pytest.fixture
def channel(fleet: AmqpFleet) -> Iterator[Any]:
    """A channel of Celery's library."""
    with fleet.side("celery").app.connection_for_read() as connection:
        yield connection.default_channel


def replies(channel: Any, queue: str, until: str) -> List[Any]:
    """Take messages from a queue until one tells of the state `until`."""
    found: List[Any] = []
    while not found or json.loads(found[-1].body)["status"] != until:
        found.append(
            wait_until(lambda: channel.basic_get(queue, no_ack=True), TIMEOUT_S, f"a reply after {found}")
        )
    return found


@pytest.fixture
def reply_queue(channel: Any) -> Iterator[str]:
    name = f"replies-{new_key()}"
    kombu.Queue(name)(channel).declare()
    yield name
    channel.queue_delete(name)


def test_a_worker_sends_every_state_as_celerys_sends_it(pair: Pair, channel: Any, reply_queue: str) -> None:
    key = new_key()
    result = pair.call("progress", key, reply_to=reply_queue)
    messages = replies(channel, reply_queue, "HALFWAY")
    pair.journal.let_go(key)
    messages += replies(channel, reply_queue, "SUCCESS")
    metas = [json.loads(message.body) for message in messages]
    by_state = {meta["status"]: meta["result"] for meta in metas}
    assert by_state["STARTED"]["hostname"] == f"{pair.worker}@interop"
    assert (by_state["HALFWAY"], by_state["SUCCESS"]) == ({"done": 50, "unit": "%"}, "done")
    for message, meta in zip(messages, metas):
        assert list(meta) == ["status", "result", "traceback", "children", "date_done", "task_id"]
        assert (meta["task_id"], meta["traceback"], meta["children"]) == (result.id, None, [])
        assert message.properties == {
            "content_type": "application/json",
            "content_encoding": "utf-8",
            "application_headers": {},
            "delivery_mode": 1,
            "priority": 0,
            "correlation_id": result.id,
        }
        assert message.delivery_info["exchange"] == ""


def test_a_worker_sends_states_in_their_order(pair: Pair, channel: Any, reply_queue: str) -> None:
    key = new_key()
    pair.journal.let_go(key)
    for _ in range(8):
        pair.call("progress", key, reply_to=reply_queue)
        states = [json.loads(one.body)["status"] for one in replies(channel, reply_queue, "SUCCESS")]
        # What is over at once need not have been told to have started; and as that is told by a worker
        # of ours, not by the process of the task, it may come beside what the task tells.
        assert states[-1] == "SUCCESS"
        assert sorted(states[:-1]) in (["HALFWAY", "STARTED"], ["HALFWAY"])


def test_an_ignored_result_is_not_sent(pair: Pair, channel: Any, reply_queue: str) -> None:
    key = new_key()
    pair.call("note", key, ignore_result=True, reply_to=reply_queue)
    pair.started(key)
    result = pair.call("add", 1, 1, reply_to=reply_queue)
    messages = replies(channel, reply_queue, "SUCCESS")
    assert {message.properties["correlation_id"] for message in messages} == {result.id}


def test_both_callers_have_a_reply_queue_that_expires(fleet: AmqpFleet, channel: Any) -> None:
    found: List[Dict[str, Any]] = []
    for kind in KINDS:
        queue = f"nobodys_of_{kind}"
        fleet.side(kind).call("add", 1, 1, queue=queue)
        message = wait_until(lambda: channel.basic_get(queue, no_ack=True), what="the call")  # noqa: B023
        replies = fleet.server.queues(fleet.vhost(0))[message.properties["reply_to"]]
        found.append({name: replies[name] for name in ("durable", "exclusive", "type")})
        found[-1]["expires"] = replies["arguments"]["x-expires"]
    assert found[1] == found[0]


def test_who_waits_is_told_of_a_custom_state(pair: Pair) -> None:
    key, metas = new_key(), []

    def told(meta: Dict[str, Any]) -> None:
        metas.append(meta)
        if meta["status"] == "HALFWAY":
            pair.journal.let_go(key)

    assert pair.call("progress", key).get(timeout=TIMEOUT_S, on_message=told) == "done"
    assert [meta["result"] for meta in metas if meta["status"] == "HALFWAY"] == [{"done": 50, "unit": "%"}]
    assert metas[-1]["status"] == "SUCCESS"


def test_who_waits_is_told_of_retries(pair: Pair) -> None:
    metas: List[Dict[str, Any]] = []
    assert pair.call("put_off", new_key()).get(timeout=TIMEOUT_S, on_message=metas.append) == 1
    # STARTED is left out where it would be over at once.
    told = [meta["status"] for meta in metas if meta["status"] != "STARTED"]
    assert told == ["RETRY", "SUCCESS"]


def test_who_did_not_wait_long_enough_waits_again(pair: Pair) -> None:
    key = new_key()
    result = pair.call("hold", key)
    pair.started(key)
    with pytest.raises(pair.client.exceptions.TimeoutError):
        result.get(timeout=0.05)
    pair.journal.let_go(key)
    assert get(result) == key
    assert get(result) == key
    assert result.state == "SUCCESS"


def test_callbacks_and_errbacks_run_where_their_results_do_not_reach_the_caller(pair: Pair) -> None:
    sig, keys = pair.client.sig, [new_key(), new_key()]
    callbacks = [sig("note", key, immutable=True).set(queue=pair.other_queue) for key in keys]
    errback = sig("errback").set(queue=pair.other_queue)
    assert get(pair.call("add", 2, 3, link=callbacks[0], link_error=errback)) == 5
    assert get(pair.call("add", 2, 3, link=callbacks)) == 5
    failed = pair.call("fail", "both", link=callbacks[1], link_error=errback)
    assert type(error_of(failed)) is Refused
    lines = pair.started(keys[0], 2) + pair.started(keys[1]) + pair.started(failed.id)
    assert [line[0] for line in lines] == [pair.other] * 4
    assert len(pair.journal.of(keys[1])) == 1


@pytest.mark.parametrize("worker", KINDS)
def test_threads_of_a_caller_each_get_their_own_results(fleet: AmqpFleet, worker: str) -> None:
    side, found = fleet.side("miniq"), {}
    fleet.workers[worker].wait_ready()

    def call(thread: int) -> None:
        results = [side.call("add", thread, n, queue=f"to_{worker}") for n in range(10)]
        found[thread] = [get(result) for result in reversed(results)]

    threads = [threading.Thread(target=call, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {100 * n: [100 * n + m for m in reversed(range(10))] for n in range(4)}

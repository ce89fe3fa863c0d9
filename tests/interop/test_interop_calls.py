# SPDX-License-Identifier: MIT
"""Calls between Celery and miniq: what is sent on one side is run and read on the other."""

from __future__ import annotations

import datetime as dt
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import pytest
from classes_of_both import Point, Refused
from interop_fleet import STORES, TIMEOUT_S, Fleet, Pair, error_of, get, new_key, skip_without_celery
from waiting import wait_until

skip_without_celery()

#: Seconds that a task is put off.
LATER_S = 0.6
UTC = dt.timezone.utc


#: Values that JSON carries, some of them in the clothes of Celery's dialect.
VALUES = [
    None, True, -1, 1 << 70, 1.5, float("inf"), "", "smörgås 漢字 🎉 \x00 \u2028", [], {}, {"": [None]},
    {"ключ": {"nested": [1, [2, [3, {"deep": "ø"}]]]}},
    dt.datetime(2026, 2, 28, 23, 59, 59, 999999), dt.datetime(2026, 2, 28, 12, tzinfo=UTC),
    dt.datetime(2026, 2, 28, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30))),
    dt.date(2024, 2, 29), dt.time(23, 59, 1, 5), Decimal("10.500"), Decimal("-1E+30"),
    uuid.UUID("12345678-1234-5678-1234-567812345678"), b"", "caf\u00e9".encode(), b"\x00\xff\xfe",
    [dt.date(2024, 2, 29), {"a": [b"\xff", [Decimal("0.1"), uuid.UUID(int=7)]]}],
]  # fmt: skip

everywhere = pytest.mark.over(*STORES)
over_amqp = pytest.mark.over("amqp+redis", "amqp+rpc")
with_results_kept = pytest.mark.over("redis", "amqp+redis")


# -- values --------------------------------------------------------------------------------------


@everywhere
def test_a_call_returns_the_value_and_success(pair: Pair) -> None:
    result = pair.call("add", 2, 3)
    assert get(result) == 5
    assert (result.state, result.successful(), result.traceback) == ("SUCCESS", True, None)
    assert get(pair.call("who", None)) == [pair.worker, None]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_json_carries_a_value_there_and_back(pair: Pair, value: Any) -> None:
    (sent,), kwargs = get(pair.call("echo", value, kwargs={"word": value}))
    assert sent == kwargs["word"] == value
    assert type(sent) is type(value)
    if isinstance(value, dt.datetime):
        assert sent.utcoffset() == value.utcoffset()


@over_amqp
def test_json_carries_all_these_values_at_once(pair: Pair) -> None:
    sent, kwargs = get(pair.call("echo", *VALUES))
    assert sent == VALUES
    assert kwargs == {}
    assert list(map(type, sent)) == list(map(type, VALUES))


@with_results_kept
def test_keyword_arguments_keep_their_names_whatever_the_alphabet(pair: Pair) -> None:
    named = {"naïve": 1, "имя": 2, "x": 3}
    assert get(pair.call("echo", kwargs=named)) == [[], named]


@everywhere
def test_a_megabyte_travels_there_and_back(pair: Pair) -> None:
    text = "0123456789abcdeø" * 65536
    assert get(pair.call("echo", text)) == [[text], {}]


@with_results_kept
@pytest.mark.parametrize("compression", ["zlib", "gzip", "bzip2"])
def test_a_compressed_call_is_understood(pair: Pair, compression: str) -> None:
    text = "the same words " * 1000
    assert get(pair.call("echo", text, compression=compression)) == [[text], {}]


@with_results_kept
def test_a_pickled_call_is_understood_where_pickle_is_accepted(pair: Pair) -> None:
    point, numbers = Point(3, 4), {1, 2, 3}
    assert get(pair.call("spread", point, numbers, serializer="pickle")) == [True, 3, [1, 2, 3], True]
    assert get(pair.call("spread", point, numbers, serializer="pickle", compression="bzip2"))[0] is True


@with_results_kept
def test_the_task_sees_the_request_that_the_caller_made(pair: Pair) -> None:
    task_id = str(uuid.uuid4())
    result = pair.call("about", 1, task_id=task_id, priority=3, headers={"mine": "ø"})
    assert get(result) == {
        "id": task_id,
        "root_id": task_id,
        "parent_id": None,
        "retries": 0,
        "correlation_id": task_id,
        "routing_key": pair.queue,
        "priority": 3,
        "redelivered": False,
        "mine": "ø",
    }


# -- failures ------------------------------------------------------------------------------------


@everywhere
def test_a_builtin_exception_comes_back_as_itself(pair: Pair) -> None:
    result = pair.call("fail", "builtin")
    error = error_of(result)
    assert type(error) is ValueError
    assert error.args == ("søren", 3)
    assert result.state == "FAILURE"
    assert 'raise ValueError("søren", 3)' in result.traceback


@everywhere
def test_an_exception_class_of_both_sides_comes_back_as_itself(pair: Pair) -> None:
    with pytest.raises(Refused) as caught:
        get(pair.call("fail", "both"))
    assert (caught.value.what, caught.value.code) == ("too late", 7)


@everywhere
def test_an_exception_class_that_the_caller_lacks_comes_back_under_its_name(pair: Pair) -> None:
    error = error_of(pair.call("fail", "worker"))
    assert "classes_of_workers" not in sys.modules
    assert (type(error).__name__, error.args) == ("Hidden", ("nobody knows me", [1, {"a": None}]))


@everywhere
def test_an_argument_of_an_exception_that_json_cannot_hold_comes_as_text(pair: Pair) -> None:
    error = error_of(pair.call("fail", "unreadable"))
    assert type(error) is ValueError
    assert error.args[0] == "an object"
    assert "object object at" in error.args[1]


@everywhere
def test_a_value_that_cannot_be_written_fails_the_task(pair: Pair) -> None:
    error = error_of(pair.call("unwritable"))
    assert type(error).__name__ == "EncodeError"


@everywhere
def test_an_unknown_task_fails_with_not_registered(pair: Pair) -> None:
    result = pair.client.app.send_task("interop.nobody", queue=pair.queue)
    with pytest.raises(pair.client.exceptions.NotRegistered, match="interop.nobody"):
        get(result)
    assert result.state == "FAILURE"


# -- retries -------------------------------------------------------------------------------------


@everywhere
def test_a_retried_task_succeeds_under_its_id_with_its_count(pair: Pair) -> None:
    key = new_key()
    result = pair.call("flaky", key, 2)
    assert get(result) == 2
    lines = pair.journal.of(key)
    assert [line[4:] for line in lines] == [[0, result.id], [1, result.id], [2, result.id]]
    assert {line[0] for line in lines} == {pair.worker}


@with_results_kept
def test_while_it_waits_for_its_retry_a_task_is_in_state_retry(pair: Pair) -> None:
    result = pair.call("put_off", new_key())
    wait_until(lambda: result.state == "RETRY", TIMEOUT_S, lambda: f"RETRY, not {result.state}")
    assert isinstance(result.result, Refused)
    assert get(result) == 1


@everywhere
def test_retries_that_are_used_up_end_in_the_error_given(pair: Pair) -> None:
    key = new_key()
    with pytest.raises(Refused, match="never"):
        get(pair.call("give_up", key, True))
    assert [line[4] for line in pair.journal.of(key)] == [0, 1, 2]


@everywhere
def test_retries_that_are_used_up_without_an_error_end_in_max_retries_exceeded(pair: Pair) -> None:
    with pytest.raises(pair.client.exceptions.MaxRetriesExceededError):
        get(pair.call("give_up", new_key(), False))


# -- time ----------------------------------------------------------------------------------------


@everywhere
def test_countdown_and_eta_hold_a_task_back(pair: Pair) -> None:
    now = time.time()
    at = dt.datetime.fromtimestamp(now + LATER_S, UTC)
    elsewhere = at.astimezone(dt.timezone(dt.timedelta(hours=-3, minutes=-30)))
    results = [
        pair.call("moment", countdown=LATER_S),
        pair.call("moment", eta=at),
        pair.call("moment", eta=elsewhere),
    ]
    for started in map(get, results):
        assert now + LATER_S <= started


@everywhere
def test_an_eta_that_has_passed_holds_nothing_back(pair: Pair) -> None:
    assert get(pair.call("add", 1, 1, eta=dt.datetime(2020, 1, 1, tzinfo=UTC))) == 2


@everywhere
def test_a_task_that_expires_while_a_worker_holds_it_is_revoked_and_does_not_run(pair: Pair) -> None:
    key = new_key()
    result = pair.call("note", key, countdown=LATER_S, expires=LATER_S / 2)
    with pytest.raises(pair.client.exceptions.TaskRevokedError, match="expired"):
        get(result)
    assert result.state == "REVOKED"
    assert pair.journal.of(key) == []
    assert get(pair.call("add", 1, 1, expires=60)) == 2


def test_a_task_that_expired_before_a_worker_took_it_is_revoked_and_does_not_run(pair: Pair) -> None:
    key = new_key()
    result = pair.call("note", key, expires=dt.datetime.now(UTC) - dt.timedelta(seconds=5))
    with pytest.raises(pair.client.exceptions.TaskRevokedError, match="expired"):
        get(result)
    assert result.state == "REVOKED"
    assert pair.journal.of(key) == []


def test_the_callers_time_limits_hold(pair: Pair) -> None:
    hard = pair.call("sleep", 60, time_limit=0.5)
    soft = pair.call("sleep", 60, soft_time_limit=0.5, time_limit=50)
    with pytest.raises(pair.client.exceptions.SoftTimeLimitExceeded):
        get(soft)
    with pytest.raises(pair.client.exceptions.TimeLimitExceeded):
        get(hard)
    assert (soft.state, hard.state) == ("FAILURE", "FAILURE")


# -- callbacks -----------------------------------------------------------------------------------


@with_results_kept
def test_a_callback_runs_in_a_worker_of_the_other_kind(pair: Pair) -> None:
    callback = pair.client.sig("who").set(queue=pair.other_queue)
    result = pair.call("add", 2, 3, link=callback)
    assert get(result) == 5
    (child,) = result.children
    assert get(child) == [pair.other, 5]


@with_results_kept
def test_several_callbacks_each_run_with_their_own_arguments(pair: Pair) -> None:
    ids = [str(uuid.uuid4()) for _ in range(3)]
    sig = pair.client.sig
    callbacks = [
        sig("add", 10).set(queue=pair.other_queue, task_id=ids[0]),
        sig("who", "fixed", immutable=True).set(queue=pair.other_queue, task_id=ids[1]),
        sig("add", 20, link=[sig("who").set(queue=pair.queue, task_id=ids[2])]).set(queue=pair.other_queue),
    ]
    result = pair.call("add", 2, 3, link=callbacks)
    assert get(result) == 5
    found = [get(pair.client.app.AsyncResult(one)) for one in ids]
    assert found == [15, [pair.other, "fixed"], [pair.worker, 25]]


@everywhere
def test_an_errback_by_name_runs_in_a_worker_of_the_other_kind_with_the_id(pair: Pair) -> None:
    result = pair.call("fail", "builtin", link_error=pair.client.sig("errback").set(queue=pair.other_queue))
    assert type(error_of(result)) is ValueError
    (line,) = pair.started(result.id)
    assert (line[0], line[4]) == (pair.other, "errback")


@everywhere
def test_an_errback_with_three_arguments_runs_in_the_worker_itself(pair: Pair) -> None:
    errback = pair.client.sig("errback_inline").set(queue=pair.other_queue)
    result = pair.call("fail", "both", link_error=errback, link=pair.client.sig("note", "never"))
    assert type(error_of(result)) is Refused
    (line,) = pair.started(result.id)
    assert line[0] == pair.worker
    assert line[4:] == ["inline", "Refused", ["too late", 7], True]


@with_results_kept
def test_what_a_task_sends_itself_is_its_child(pair: Pair) -> None:
    result = pair.call("parent", "word", pair.other_queue)
    child_id = get(result)
    (child,) = result.children
    assert child.id == child_id
    assert get(child) == [pair.other, "word"]


# -- states and waiting --------------------------------------------------------------------------


@with_results_kept
def test_a_caller_that_waits_is_told_of_the_end(pair: Pair) -> None:
    key = new_key()
    result = pair.call("hold", key)
    assert pair.started(key)
    with pytest.raises(pair.client.exceptions.TimeoutError):
        result.get(timeout=0.05)
    wait_until(lambda: result.state == "STARTED", TIMEOUT_S, lambda: f"STARTED, not {result.state}")
    assert isinstance(result.info["pid"], int)
    assert result.info["hostname"] == f"{pair.worker}@interop"
    pair.journal.let_go(key)
    assert get(result) == key


@with_results_kept
def test_either_side_awaits_a_result_by_its_id_and_is_told_when_it_comes(pair: Pair) -> None:
    key = new_key()
    task_id = pair.call("hold", key).id
    pair.started(key)
    kinds = sorted({pair.client.kind, pair.other})
    readers = [pair.fleet.side(kind).app.AsyncResult(task_id) for kind in kinds]
    with ThreadPoolExecutor(len(readers)) as threads:
        values = [threads.submit(get, reader) for reader in readers]
        try:
            # Both wait before there is anything to get, and wait on the channel where Celery publishes.
            wait_until(lambda: subscribers(pair.fleet, task_id) == len(readers), TIMEOUT_S, "both subscribe")
        finally:
            pair.journal.let_go(key)
        assert [value.result() for value in values] == [key] * len(readers)
    for reader in readers:
        assert reader.successful()
        assert abs(reader.date_done.timestamp() - time.time()) < 60
    readers[0].forget()
    assert pair.client.app.AsyncResult(task_id).state == "PENDING"


def subscribers(fleet: Fleet, task_id: str) -> int:
    """Return how many connections wait for a result."""
    return int(fleet.ask_results("PUBSUB", "NUMSUB", f"celery-task-meta-{task_id}")[1])


@with_results_kept
def test_a_custom_state_is_seen_with_its_meta(pair: Pair) -> None:
    for key in (new_key() for _ in range(5)):
        result = pair.call("progress", key)
        pair.started(key)
        seen = [(result.state, result.info)]
        # What the worker does next does not undo it.
        assert get(pair.call("add", 1, 1)) == 2
        seen.append((result.state, result.info))
        pair.journal.let_go(key)
        assert get(result) == "done"
        assert seen == [("HALFWAY", {"done": 50, "unit": "%"})] * 2


@with_results_kept
def test_an_ignored_result_is_not_stored(pair: Pair) -> None:
    key = new_key()
    result = pair.call("note", key, ignore_result=True)
    assert pair.started(key)
    wait_until(pair.fleet.nothing_held, TIMEOUT_S, "the message is acknowledged")
    assert pair.client.app.AsyncResult(result.id).state == "PENDING"
    assert pair.fleet.ask_results("EXISTS", f"celery-task-meta-{result.id}") == 0


@everywhere
def test_many_results_are_there_for_a_caller_that_waits_for_all(pair: Pair) -> None:
    results = [pair.call("add", number, number) for number in range(50)]
    assert [get(result) for result in reversed(results)] == [2 * n for n in reversed(range(50))]


# -- messages ------------------------------------------------------------------------------------


@with_results_kept
def test_a_late_acknowledged_message_stays_until_the_task_ends(pair: Pair) -> None:
    key = new_key()
    result = pair.call("hold_late", key)
    pair.started(key)
    assert pair.fleet.held() == 1
    pair.journal.let_go(key)
    assert get(result) == key
    wait_until(pair.fleet.nothing_held, TIMEOUT_S, "the message is acknowledged")
    assert len(pair.journal.of(key)) == 1


@everywhere
def test_a_waiting_task_is_revoked_by_remote_control(pair: Pair) -> None:
    key = new_key()
    result = pair.call("note", key, countdown=LATER_S)
    # Only the one worker hears it: without a destination each of them would write the state.
    pair.client.app.control.revoke(result.id, destination=[f"{pair.worker}@interop"])
    with pytest.raises(pair.client.exceptions.TaskRevokedError, match="revoked"):
        get(result)
    assert result.state == "REVOKED"
    wait_until(pair.fleet.nothing_held, TIMEOUT_S, "the message is acknowledged")
    assert pair.journal.of(key) == []


@with_results_kept
def test_workers_of_both_kinds_share_a_queue(fleet: Fleet) -> None:
    for kind in ("celery", "miniq"):
        fleet.workers[kind].wait_ready()
    key, count = new_key(), 500
    sides = [fleet.side(kind) for kind in ("celery", "miniq")]
    for number in range(count):
        sides[number % 2].call("share", key, number, queue="both", ignore_result=True)
    done = fleet.journal.of
    wait_until(lambda: len(done(key)) >= count, TIMEOUT_S, lambda: f"{len(done(key))} of {count} are done")
    wait_until(fleet.nothing_held, TIMEOUT_S, "nothing is held")
    assert fleet.waiting("both") == 0
    lines = fleet.journal.of(key)
    assert sorted(line[4] for line in lines) == list(range(count))
    assert {line[0] for line in lines} == {"celery", "miniq"}

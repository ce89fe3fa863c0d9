# SPDX-License-Identifier: MIT
"""Running one message: outcomes, handlers, signals, results and what follows from a run."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import pickle
import re
import sys
import threading
import time
import weakref
from typing import Any, Callable, Dict, Iterator, List

import pytest
from bench import HOSTNAME, Bench, body_of, changed, new_broker, run_of

from miniq import MiniQ, Task, signals, states
from miniq.einfo import MAX_TRACEBACK_CHARS
from miniq.exceptions import (
    EncodeError,
    Ignore,
    ImproperlyConfigured,
    MaxRetriesExceededError,
    Reject,
    SoftTimeLimitExceeded,
)
from miniq.trace import TaskRunner


def nope() -> Any:
    raise KeyError("nope")


@pytest.fixture
def app() -> MiniQ:
    return MiniQ("tests", broker=new_broker())


@pytest.fixture
def bench(app: MiniQ) -> Iterator[Bench]:
    made = Bench(app)
    yield made
    made.runner.process_shutdown(0)


class Recording(Task):
    """Writes down every handler that is called, with its arguments."""

    def __init__(self) -> None:
        self.calls: List[Any] = []

    def before_start(self, task_id: Any, args: Any, kwargs: Any) -> None:
        self.calls.append(("before_start", task_id, args, kwargs))

    def on_success(self, retval: Any, task_id: Any, args: Any, kwargs: Any) -> None:
        self.calls.append(("on_success", retval, task_id, args, kwargs))

    def on_failure(self, exc: Any, task_id: Any, args: Any, kwargs: Any, einfo: Any) -> None:
        self.calls.append(("on_failure", repr(exc), task_id, args, kwargs, str(einfo).splitlines()[-1]))

    def on_retry(self, exc: Any, task_id: Any, args: Any, kwargs: Any, einfo: Any) -> None:
        self.calls.append(("on_retry", repr(exc), task_id, args, kwargs, str(einfo).splitlines()[-1]))

    def after_return(
        self, status: Any, retval: Any, task_id: Any, args: Any, kwargs: Any, einfo: Any
    ) -> None:
        self.calls.append(("after_return", status, repr(retval), task_id, args, kwargs))


@contextlib.contextmanager
def hearing(*wanted: signals.Signal) -> Iterator[List[Any]]:
    """Collect what is sent to these signals, as (name, sender, arguments)."""
    heard: List[Any] = []

    def receiver(signal: Any, sender: Any, **arguments: Any) -> None:
        heard.append((signal.name, sender, arguments))

    for signal in wanted:
        signal.connect(receiver, weak=False)
    try:
        yield heard
    finally:
        for signal in wanted:
            signal.disconnect(receiver)


# -- success ---------------------------------------------------------------------------------------


def test_a_value_is_stored_as_celerys_meta(app: MiniQ, bench: Bench) -> None:
    add = app.task(name="add")(lambda x, y: x + y)
    outcome = bench.call(add, 2, 3, task_id="one", parent_id="above", group_id="g")
    assert (outcome.state, outcome.action, outcome.followups) == ("SUCCESS", "ack", [])
    assert outcome.runtime_s >= 0
    (stored,) = outcome.results
    assert (stored.task_id, stored.state, stored.expires_s) == ("one", "SUCCESS", 86400)
    meta = bench.meta()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", meta.pop("date_done"))
    assert meta == {
        "status": "SUCCESS", "result": 5, "traceback": None, "children": [],
        "group_id": "g", "parent_id": "above", "task_id": "one",
    }  # fmt: skip


def test_handlers_are_called_in_order_with_celerys_arguments(app: MiniQ, bench: Bench) -> None:
    task = app.task(name="t", base=Recording)(lambda x, y=1: x + y)
    bench.call(task, 1, kwargs={"y": 2}, task_id="one")
    assert task.calls == [
        ("before_start", "one", [1], {"y": 2}),
        ("on_success", 3, "one", [1], {"y": 2}),
        ("after_return", "SUCCESS", "3", "one", [1], {"y": 2}),
    ]


def test_handlers_given_to_the_decorator_are_methods(app: MiniQ, bench: Bench) -> None:
    seen: List[Any] = []

    def on_success(self: Task, retval: Any, *rest: Any) -> None:
        seen.append((self.name, retval))

    bench.call(app.task(name="t", on_success=on_success)(lambda: 7))
    assert seen == [("t", 7)]


def test_signals_around_a_success(app: MiniQ, bench: Bench) -> None:
    task = app.task(name="t")(lambda x: x + 1)
    with hearing(signals.task_prerun, signals.task_success, signals.task_postrun) as heard:
        bench.call(task, 1, task_id="one")
    assert [(name, sender) for name, sender, _ in heard] == [
        ("task_prerun", task),
        ("task_success", task),
        ("task_postrun", task),
    ]
    runtime = heard[1][2].pop("runtime")
    assert runtime >= 0
    assert [arguments for _, _, arguments in heard] == [
        {"task_id": "one", "task": task, "args": [1], "kwargs": {}},
        {"result": 2},
        {"task_id": "one", "task": task, "args": [1], "kwargs": {}, "retval": 2, "state": "SUCCESS"},
    ]


def test_a_broken_handler_changes_nothing(app: MiniQ, bench: Bench, caplog: Any) -> None:
    class Broken(Recording):
        def on_success(self, *args: Any) -> None:
            raise RuntimeError("handler")

    task = app.task(name="t", base=Broken)(lambda: 1)
    with hearing(signals.task_success) as heard:
        assert bench.call(task).state == "SUCCESS"
    assert "on_success handler failed; the task stays SUCCESS" in caplog.text
    assert [call[0] for call in task.calls] == ["before_start", "after_return"]
    assert len(heard) == 1


def test_before_start_can_fail_the_task(app: MiniQ, bench: Bench) -> None:
    class Broken(Recording):
        def before_start(self, *args: Any) -> None:
            raise RuntimeError("not today")

    ran: List[int] = []
    task = app.task(name="t", base=Broken, autoretry_for=(RuntimeError,))(lambda: ran.append(1))
    assert bench.call(task).state == "FAILURE"
    assert ran == []


def test_the_log_has_celerys_lines(app: MiniQ, bench: Bench, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    task = app.task(name="t", resultrepr_maxsize=10)(lambda: "x" * 100)
    bench.call(task, task_id="one", shadow="pretty")
    assert re.search(r"Task pretty\[one\] succeeded in [\d.e-]+s: 'xxx", caplog.text)
    assert "x" * 20 not in caplog.text


# -- the request -----------------------------------------------------------------------------------


def test_the_request_tells_about_the_message(app: MiniQ, bench: Bench) -> None:
    seen: Dict[str, Any] = {}

    @app.task(bind=True, name="t")
    def look(self: Task, *args: Any, **kwargs: Any) -> None:
        request = self.request
        for name in (
            "id root_id parent_id correlation_id reply_to args kwargs retries eta expires hostname"
            " delivery_info group group_index timelimit time_limit soft_time_limit headers is_eager"
            " called_directly origin shadow ignore_result chain chord callbacks errbacks children"
            " properties utc"
        ).split():
            seen[name] = getattr(request, name)
        seen["custom"] = request.tenant
        seen["get"] = (request.get("nothing", 5), request.get("id"))

    bench.call(
        look, 1, kwargs={"a": 2}, task_id="one", root_id="root", parent_id="above", reply_to="me", priority=4,
        queue="q", headers={"tenant": "acme"}, time_limit=60, soft_time_limit=30, shadow="s", group_id="g",
        group_index=3, expires=100,
    )  # fmt: skip
    expires, origin = seen.pop("expires"), seen.pop("origin")
    properties = seen.pop("properties")
    assert expires.endswith("+00:00")
    assert origin.startswith("gen")
    assert properties["delivery_mode"] == 2
    assert seen == {
        "id": "one", "root_id": "root", "parent_id": "above", "correlation_id": "one", "reply_to": "me",
        "args": [1], "kwargs": {"a": 2}, "retries": 0, "eta": None, "hostname": HOSTNAME,
        "delivery_info": {"exchange": "", "routing_key": "q", "priority": 4, "redelivered": False},
        "group": "g", "group_index": 3, "timelimit": [60, 30], "time_limit": 60, "soft_time_limit": 30,
        "headers": {"tenant": "acme"}, "is_eager": False, "called_directly": False, "shadow": "s",
        "ignore_result": False, "chain": None, "chord": None, "callbacks": None, "errbacks": None,
        "children": [], "utc": True, "custom": "acme", "get": (5, "one"),
    }  # fmt: skip


def test_headers_cannot_reach_into_the_request(app: MiniQ, bench: Bench) -> None:
    seen: List[Any] = []

    @app.task(bind=True, name="t")
    def look(self: Task) -> None:
        seen.append((self.request.called_directly, self.request.hostname))

    publication = bench.prepare(look)
    hostile = changed(
        publication.message,
        followups=["x"],
        children=["y"],
        called_directly=True,
        hostname="z",
        is_eager=True,
    )
    outcome = bench.run(publication._replace(message=hostile))
    assert (outcome.state, outcome.followups) == ("SUCCESS", [])
    assert bench.meta()["children"] == []
    assert seen == [(False, HOSTNAME)]


def test_optional_headers_may_be_missing_or_null(app: MiniQ, bench: Bench) -> None:
    @app.task(bind=True, name="t", max_retries=1)
    def again(self: Task) -> None:
        raise self.retry()

    publication = bench.prepare(again)
    message = publication.message
    for headers in (
        {"task": "t", "id": "one"},
        {**message.headers, "retries": None, "timelimit": None, "root_id": None, "ignore_result": None},
    ):
        message.headers = headers
        assert bench.run(publication).state == "RETRY"


def test_current_task_and_app_are_those_of_the_run(app: MiniQ, bench: Bench) -> None:
    import miniq

    other = MiniQ("other", broker="memory://other")
    seen: List[Any] = []

    @app.task(name="t")
    def look() -> None:
        seen.append((miniq.current_task.name, miniq.current_app, app.current_task, app.current_worker_task))

    bench.call(look)
    assert seen == [("t", app, look, look)]
    assert miniq.current_app is other
    assert app.current_worker_task is None


# -- failure ---------------------------------------------------------------------------------------


def test_an_exception_is_stored_in_celerys_form(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t")
    def boom() -> None:
        raise KeyError("nope")

    outcome = bench.call(boom)
    assert (outcome.state, outcome.action) == ("FAILURE", "ack")
    meta = bench.meta()
    assert meta["result"] == {"exc_type": "KeyError", "exc_message": ["nope"], "exc_module": "builtins"}
    lines = meta["traceback"].splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert __file__ in lines[1], "the first frame is the task's own"
    assert lines[-1] == "KeyError: 'nope'"


def test_handlers_and_signals_of_a_failure(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", base=Recording)
    def boom(x: int) -> None:
        raise ValueError(x)

    with hearing(signals.task_failure, signals.task_postrun, signals.task_success) as heard:
        bench.call(boom, 1, task_id="one")
    assert boom.calls == [
        ("before_start", "one", [1], {}),
        ("on_failure", "ValueError(1)", "one", [1], {}, "ValueError: 1"),
        ("after_return", "FAILURE", "ValueError(1)", "one", [1], {}),
    ]
    assert [name for name, _, _ in heard] == ["task_failure", "task_postrun"]
    failure, postrun = heard[0][2], heard[1][2]
    assert sorted(failure) == ["args", "einfo", "exception", "kwargs", "task_id", "traceback"]
    assert (failure["task_id"], repr(failure["exception"]), failure["args"]) == ("one", "ValueError(1)", [1])
    assert failure["einfo"].traceback == failure["traceback"]
    assert (postrun["state"], repr(postrun["retval"])) == ("FAILURE", "ValueError(1)")


def test_a_wrong_call_is_a_failure(app: MiniQ, bench: Bench) -> None:
    task = app.task(name="t")(lambda x: x)
    assert bench.call(task).state == "FAILURE"
    assert bench.meta()["result"]["exc_type"] == "TypeError"


def test_expected_errors_are_logged_without_traceback(app: MiniQ, bench: Bench, caplog: Any) -> None:
    caplog.set_level(logging.INFO)

    @app.task(name="t", throws=(KeyError,))
    def boom(kind: str) -> None:
        raise {"key": KeyError, "value": ValueError}[kind]("x")

    assert bench.call(boom, "key").state == "FAILURE"
    assert "raised expected: KeyError('x')" in caplog.text
    assert "Traceback" not in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    bench.call(boom, "value")
    assert "raised unexpected: ValueError('x')" in caplog.text
    assert "Traceback" in caplog.text


class Unfriendly(Exception):
    """Refuses everything that can be asked of an exception."""

    def __init__(self, *, needed: int) -> None:
        super().__init__(lambda: needed, threading.Lock())

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__

    def __reduce__(self) -> Any:
        raise RuntimeError("no pickle")


def recursive() -> None:
    recursive()


def self_caused() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    raise one


def unfriendly() -> None:
    raise Unfriendly(needed=1)


def huge() -> None:
    raise ValueError("x" * 10_000_000)


def local() -> None:
    class Local(Exception):
        pass

    raise Local({1, 2})


@pytest.mark.parametrize(
    ("fun", "kind"),
    [
        (recursive, "RecursionError"),
        (self_caused, "ValueError"),
        (unfriendly, "Unfriendly"),
        (huge, "ValueError"),
        (local, "Local"),
    ],
)
@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_whatever_is_raised_ends_as_a_failure_that_can_be_read(
    app: MiniQ, bench: Bench, fun: Callable[[], None], kind: str, serializer: str
) -> None:
    app.conf.update(result_serializer=serializer, accept_content=["json", "pickle"])
    task = app.task(name=fun.__name__)(fun)
    outcome = bench.call(task, task_id="one")
    assert outcome.state == "FAILURE"
    (stored,) = outcome.results
    meta = json.loads(stored.body) if serializer == "json" else pickle.loads(stored.body)
    assert kind in meta["result"]["exc_type"]
    assert len(meta["traceback"]) < MAX_TRACEBACK_CHARS + 100
    app.backend.store(outcome.results)
    with pytest.raises(Exception) as caught:
        app.AsyncResult("one").get(timeout=1)
    assert kind in type(caught.value).__name__


def test_whatever_a_retry_is_for_can_be_stored(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", bind=True)
    def again(self: Task) -> None:
        raise self.retry(exc=Unfriendly(needed=1))

    assert bench.call(again).state == "RETRY"
    assert bench.meta()["result"]["exc_type"] == "Unfriendly"


def test_a_failure_told_by_the_worker_has_the_request_too(app: MiniQ, bench: Bench) -> None:
    seen: List[Any] = []

    class Looking(Task):
        def on_failure(self, *args: Any) -> None:
            seen.append(self.request.id)

    task = app.task(name="t", base=Looking)(lambda: None)
    opened: Any = bench.runner.open(run_of(bench.prepare(task, task_id="one")))
    opened.error = RuntimeError("killed")
    bench.runner.announce_failure(opened)
    assert seen == ["one"]
    assert app.current_task is None


def test_a_deep_traceback_keeps_the_place_where_it_happened(app: MiniQ, bench: Bench) -> None:
    def down(left: int) -> None:
        if not left:
            raise ValueError("here")
        up(left - 1)

    def up(left: int) -> None:
        down(left)

    bench.call(app.task(name="t")(down), 150)
    assert 'raise ValueError("here")' in bench.meta()["traceback"]


def test_a_value_that_cannot_be_written_is_a_failure_which_says_so(app: MiniQ, bench: Bench) -> None:
    task = app.task(name="t", base=Recording)(lambda: {"deep": [object()]})
    outcome = bench.call(task, link=app.task(name="next")(lambda x: x).s())
    assert outcome.state == "FAILURE"
    assert outcome.followups == []
    meta = bench.meta()
    assert meta["result"]["exc_type"] == "EncodeError"
    assert "['deep'][0] (object)" in meta["result"]["exc_message"][0]
    assert meta["children"] == []
    assert [call[0] for call in task.calls] == ["before_start", "on_failure", "after_return"]


def test_exit_and_interrupt_go_through_to_the_pool(app: MiniQ, bench: Bench) -> None:
    for kind in (SystemExit, KeyboardInterrupt):

        @app.task(name=kind.__name__)
        def leave(kind: Any = kind) -> None:
            raise kind

        with pytest.raises(kind):
            bench.call(leave)
    assert app.current_task is None


def test_a_failed_run_leaves_no_frames_alive(app: MiniQ, bench: Bench) -> None:
    class Big:
        pass

    alive: List[Any] = []

    @app.task(name="t")
    def boom() -> None:
        big = Big()
        alive.append(weakref.ref(big))
        try:
            raise KeyError("first")
        except KeyError:
            raise ValueError("second") from None

    gc.collect()
    gc.disable()
    try:
        bench.call(boom)
        assert alive[0]() is None
    finally:
        gc.enable()


# -- ignored results -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "option", "call", "kept"),
    [
        (False, None, None, True),
        (True, None, None, False),
        (True, False, None, True),
        (False, True, None, False),
        (False, True, False, True),
        (True, False, True, False),
    ],
)
def test_the_call_decides_over_the_task_and_the_task_over_the_setting(
    app: MiniQ, bench: Bench, setting: bool, option: Any, call: Any, kept: bool
) -> None:
    app.conf.task_ignore_result = setting
    task = app.task(name="t", ignore_result=option)(lambda: 1)
    publication = bench.prepare(task, ignore_result=call)
    assert publication.message.headers["ignore_result"] is not kept
    assert len(bench.run(publication).results) == kept
    # A sender that says nothing leaves it to the task here.
    silent = changed(publication.message, ignore_result=None)
    expected = kept if call is None else not (setting if option is None else option)
    assert len(bench.run(publication._replace(message=silent)).results) == expected


@pytest.mark.parametrize("by_setting", [True, False])
def test_errors_may_be_stored_even_if_ignored(app: MiniQ, bench: Bench, by_setting: bool) -> None:
    app.conf.task_store_errors_even_if_ignored = by_setting
    options = {} if by_setting else {"store_errors_even_if_ignored": True}

    @app.task(name="t", bind=True, ignore_result=True, **options)
    def act(self: Task, how: str) -> None:
        if how == "fail":
            raise ValueError("x")
        if how == "retry":
            raise self.retry(exc=ValueError("y"))

    assert bench.call(act, "succeed").results == []
    assert [result.state for result in bench.call(act, "fail").results] == ["FAILURE"]
    assert [result.state for result in bench.call(act, "retry").results] == ["RETRY"]


# -- semipredicates --------------------------------------------------------------------------------


def test_ignore_stores_nothing_and_acks(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", base=Recording)
    def act() -> None:
        raise Ignore()

    with hearing(signals.task_postrun) as heard:
        outcome = bench.call(act, link=act.s(), link_error=act.s())
    assert outcome[:5] == ("IGNORED", [], [], "ack", "")
    assert [call[0] for call in act.calls] == ["before_start"]
    assert heard[0][2]["state"] == "IGNORED"


def test_reject_sets_the_message_aside_and_stores_a_failure(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", base=Recording)
    def act() -> None:
        raise Reject("broken input")

    outcome = bench.call(act)
    assert (outcome.state, outcome.action) == ("FAILURE", "reject")
    assert "broken input" in outcome.reason
    assert bench.meta()["result"]["exc_type"] == "Reject"
    assert [call[0] for call in act.calls] == ["before_start", "on_failure", "after_return"]


def test_reject_with_requeue_stores_nothing(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", base=Recording)
    def act() -> None:
        raise Reject(OSError("busy"), requeue=True)

    outcome = bench.call(act)
    assert outcome[:4] == ("REJECTED", [], [], "requeue")
    assert "busy" in outcome.reason
    assert [call[0] for call in act.calls] == ["before_start"]


# -- retry -----------------------------------------------------------------------------------------


def seconds_until(text: str, app: MiniQ) -> float:
    from miniq.times import to_epoch

    return to_epoch(text) - app.wall()


def test_a_retry_is_the_same_call_once_more(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", bind=True, base=Recording)
    def again(self: Task, x: int, y: int = 0) -> None:
        raise self.retry(exc=ValueError("later"), countdown=45)

    publication = bench.prepare(
        again, 1, kwargs={"y": 2}, task_id="one", queue="special", priority=3, headers={"tenant": "acme"},
        time_limit=60, soft_time_limit=30, expires=600, link=again.s(), link_error=again.s(), reply_to="me",
        shadow="s", group_id="g", group_index=1, root_id="root", ignore_result=False, argsrepr="<a>",
        kwargsrepr="<k>", chain=[again.s()],
    )  # fmt: skip
    first = publication.message
    first.headers["origin"] = "gen1@elsewhere"
    with hearing(signals.task_retry) as heard:
        outcome = bench.run(publication)
    assert (outcome.state, outcome.action) == ("RETRY", "ack")
    (followup,) = outcome.followups
    second = followup.message
    assert (followup.exchange, followup.routing_key) == ("", "special")
    assert 40 < seconds_until(second.headers.pop("eta"), app) <= 45
    expected = {**first.headers, "retries": 1, "parent_id": "one"}
    del expected["eta"]
    assert second.headers == expected
    assert second.properties == first.properties
    assert body_of(followup) == body_of(publication)

    meta = bench.meta("one")
    assert (meta["status"], meta["date_done"]) == ("RETRY", None)
    assert meta["result"] == {"exc_type": "ValueError", "exc_message": ["later"], "exc_module": "builtins"}
    assert "Retry in 45s: ValueError('later')" in meta["traceback"]
    assert [call[:2] for call in again.calls] == [
        ("before_start", "one"),
        ("on_retry", "ValueError('later')"),
    ]
    (_, sender, arguments) = heard[0]
    assert sender is again
    assert sorted(arguments) == ["einfo", "reason", "request"]
    assert str(arguments["reason"]) == "Retry in 45s: ValueError('later')"


def test_a_retry_is_dropped_by_the_broker_no_later_than_the_first_try(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", bind=True)
    def again(self: Task) -> None:
        raise self.retry(countdown=45)

    publication = bench.prepare(again, expires=600)
    (followup,) = bench.run(publication).followups
    expiration = int(followup.message.properties["expiration"])
    assert 590_000 < expiration <= int(publication.message.properties["expiration"])


def test_what_others_wait_for_is_not_dropped_by_the_broker_when_it_expires(app: MiniQ, bench: Bench) -> None:
    task = app.task(name="t")(lambda *args: None)
    for options in ({"chain": [task.s()]}, {"chord": task.s(), "group_id": "g"}):
        message = bench.prepare(task, expires=600, **options).message
        assert message.headers["expires"]
        assert "expiration" not in message.properties


def test_a_retry_waits_the_default_delay(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", bind=True)
    def again(self: Any, **options: Any) -> None:
        raise self.retry(**options)

    def delay(**options: Any) -> Any:
        eta = bench.call(again, kwargs=options).followups[0].message.headers["eta"]
        return eta and seconds_until(eta, app)

    assert 175 < delay() <= 180
    again.default_retry_delay = 30
    assert 25 < delay() <= 30
    assert 5 < delay(countdown=10) <= 10
    assert delay(countdown=0) is None
    assert delay(eta="2999-01-01T00:00:00", countdown=5) > 86_000


def test_a_retry_may_change_arguments_and_options(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", bind=True)
    def again(self: Task, x: int, y: int, how: Any = None) -> None:
        raise self.retry(**how)

    def retried(how: Any) -> Any:
        publication = bench.call(again, 1, 2, kwargs={"how": how}).followups[0]
        body = body_of(publication)
        assert body[1].pop("how", None) == how
        return publication, body[0], body[1]

    assert retried({})[1:] == ([1, 2], {})
    assert retried({"args": [3, 4]})[1:] == ([3, 4], {})
    assert retried({"kwargs": {"y": 5}})[1:] == ([1, 5], {}), "given by name, although it came by position"
    moved = retried({"queue": "other", "priority": 9, "time_limit": 5})[0]
    assert moved.routing_key == "other"
    assert (moved.message.headers["timelimit"], moved.message.properties["priority"]) == ([5, None], 9)


def test_a_retry_of_keyword_arguments_takes_new_positional_ones(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", bind=True)
    def again(self: Task, x: int, y: int) -> None:
        raise self.retry(args=[8])

    assert body_of(bench.call(again, kwargs={"x": 1, "y": 2}).followups[0])[:2] == [[8], {"y": 2}]


def test_the_last_of_several_retries_counts(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", bind=True)
    def again(self: Task) -> None:
        try:
            raise self.retry(countdown=1)
        except Exception as error:  # what many tasks do, catching the Retry as well
            raise self.retry(exc=error, countdown=1000) from None

    (only,) = bench.call(again).followups
    assert seconds_until(only.message.headers["eta"], app) > 900
    assert only.message.headers["retries"] == 1


def test_throw_false_returns_and_the_task_goes_on(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", bind=True)
    def again(self: Task) -> str:
        retry = self.retry(throw=False, countdown=1)
        return str(retry)

    outcome = bench.call(again)
    assert outcome.state == "SUCCESS"
    assert len(outcome.followups) == 1
    assert bench.meta()["result"] == "Retry in 1s"


def test_out_of_retries_raises_the_error_given_or_its_own(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", bind=True, max_retries=2)
    def again(self: Task, given: bool) -> None:
        raise self.retry(exc=OSError("down") if given else None, countdown=0)

    for given, kind in ((True, "OSError"), (False, "MaxRetriesExceededError")):
        bench.settle(again, given, task_id=kind)
        assert [outcome.state for outcome in bench.outcomes[kind]] == ["RETRY", "RETRY", "FAILURE"]
        assert bench.meta(kind)["result"]["exc_type"] == kind
    assert bench.meta("MaxRetriesExceededError")["result"]["exc_message"] == [
        "Can't retry t[MaxRetriesExceededError] args:(False,) kwargs:{}"
    ]


def test_secrets_hidden_from_the_log_stay_hidden_at_the_end(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", bind=True, max_retries=0)
    def again(self: Task, password: str) -> None:
        raise self.retry()

    bench.call(again, "s3cret", argsrepr="(***)")
    assert "s3cret" not in bench.meta()["result"]["exc_message"][0]


def test_max_retries_none_never_ends_and_the_call_may_say_otherwise(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", bind=True, max_retries=None)
    def again(self: Task, limit: Any = None) -> None:
        raise self.retry(max_retries=limit)

    assert bench.call(again, retries=10_000).state == "RETRY"
    assert bench.call(again, 5, retries=5).state == "FAILURE"


@pytest.mark.parametrize(
    "options",
    [{"countdown": -1}, {"kwargs": {"nonsense": 1}}, {"queue": 5, "priority": 1000}, {"quee": "x"}],
)
def test_a_retry_that_cannot_be_sent_rejects_the_message(app: MiniQ, bench: Bench, options: Any) -> None:
    @app.task(name="t", bind=True)
    def again(self: Task) -> None:
        raise self.retry(**options)

    outcome = bench.call(again)
    assert (outcome.state, outcome.action) == ("FAILURE", "reject")


def test_a_retry_keeps_serializer_and_compression(app: MiniQ, bench: Bench) -> None:
    app.conf.accept_content = ["json", "pickle"]

    @app.task(name="t", bind=True)
    def again(self: Task, numbers: Any) -> None:
        raise self.retry()

    (followup,) = bench.call(again, {1, 2}, serializer="pickle", compression="gzip").followups
    assert followup.message.content_type == "application/x-python-serialize"
    assert followup.message.headers["compression"] == "application/x-gzip"
    assert bench.run(followup).state == "RETRY"


def test_autoretry_retries_what_it_names(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", autoretry_for=(OSError,), dont_autoretry_for=(FileNotFoundError,), max_retries=1)
    def act(kind: str) -> None:
        raise {
            "os": OSError,
            "file": FileNotFoundError,
            "value": ValueError,
            "ignore": Ignore,
            "reject": Reject,
        }[kind]("x")

    assert bench.call(act, "os").state == "RETRY"
    assert bench.call(act, "file").state == "FAILURE"
    assert bench.call(act, "value").state == "FAILURE"
    act.autoretry_for = (Exception,)
    assert bench.call(act, "ignore").state == "IGNORED"
    assert bench.call(act, "reject").action == "reject"
    last = bench.call(act, "os", retries=1, task_id="last")
    assert last.state == "FAILURE"
    meta = bench.meta("last")
    assert meta["result"]["exc_type"] == "OSError"
    assert "task.py" not in meta["traceback"], "only the user's own frames"


def test_autoretry_waits_the_default_delay_and_retry_kwargs_change_it(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", autoretry_for=(OSError,))
    def act() -> None:
        raise OSError("x")

    def delay() -> float:
        eta = bench.call(act).followups[0].message.headers["eta"]
        return seconds_until(eta, app)

    assert 175 < delay() <= 180
    act.retry_kwargs = {"countdown": 7, "max_retries": 9}
    assert 5 < delay() <= 7
    assert bench.call(act, retries=8).state == "RETRY"


@pytest.mark.parametrize(
    ("backoff", "retries", "maximum", "expected"),
    [
        (True, 0, 600, 1),
        (True, 3, 600, 8),
        (5, 2, 600, 20),
        (2.9, 0, 600, 2),
        (True, 20, 600, 600),
        (3, 4, 10, 10),
    ],
)
def test_backoff_doubles_up_to_its_maximum(
    app: MiniQ, bench: Bench, backoff: Any, retries: int, maximum: int, expected: int
) -> None:
    @app.task(
        name="t", autoretry_for=(OSError,), retry_backoff=backoff, retry_backoff_max=maximum,
        retry_jitter=False, max_retries=None, retry_kwargs={"countdown": 99},
    )  # fmt: skip
    def act() -> None:
        raise OSError("x")

    outcome = bench.call(act, retries=retries, task_id="one")
    assert f"Retry in {expected}s" in bench.meta("one")["traceback"]
    assert outcome.state == "RETRY"


def test_jitter_waits_anything_up_to_the_backoff(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", autoretry_for=(OSError,), retry_backoff=True, max_retries=None)
    def act() -> None:
        raise OSError("x")

    waits = set()
    for number in range(60):
        bench.call(act, retries=2, task_id=str(number))
        waits.add(int(re.search(r"Retry in (\d+)s", bench.meta(str(number))["traceback"]).group(1)))  # type: ignore[union-attr]
    assert waits <= {0, 1, 2, 3, 4}
    assert len(waits) > 2


# -- callbacks -------------------------------------------------------------------------------------


def tasks_for_links(app: MiniQ) -> Any:
    add = app.task(name="add")(lambda x, y: x + y)
    boom = app.task(name="boom")(lambda: nope())
    ran: List[Any] = []
    note = app.task(name="note")(lambda *args: ran.append(args))
    return add, boom, note, ran


def test_one_callback_goes_alone_with_the_result_in_front(app: MiniQ, bench: Bench) -> None:
    add, _, note, ran = tasks_for_links(app)
    outcome = bench.call(add, 2, 3, link=note.s("own"), task_id="one", root_id="root")
    (followup,) = outcome.followups
    headers = followup.message.headers
    assert body_of(followup)[0] == [5, "own"]
    assert (headers["group"], headers["root_id"], headers["parent_id"]) == (None, "root", "one")
    assert bench.meta("one")["children"] == [[[headers["id"], None], None]]
    bench.run(followup)
    assert ran == [(5, "own")]


def test_several_callbacks_share_a_group(app: MiniQ, bench: Bench) -> None:
    add, _, note, ran = tasks_for_links(app)
    outcome = bench.settle(add, 2, 3, link=[note.s(1), note.si("fixed")])
    headers = [followup.message.headers for followup in outcome.followups]
    assert headers[0]["group"] == headers[1]["group"] is not None
    assert [one["group_index"] for one in headers] == [0, 1]
    assert ran == [(5, 1), ("fixed",)]


def test_callbacks_have_callbacks(app: MiniQ, bench: Bench) -> None:
    add, _, note, ran = tasks_for_links(app)
    bench.settle(add, 1, 1, link=add.s(10).set(link=[note.s()], queue="special"))
    assert ran == [(12,)]


def test_chain_steps_follow_one_after_the_other(app: MiniQ, bench: Bench) -> None:
    add, _, note, ran = tasks_for_links(app)
    steps = [note.s().set(task_id="c"), add.s(10).set(task_id="b")]
    bench.settle(add, 1, 2, chain=steps, task_id="a")
    assert ran == [(13,)]
    assert [bench.meta(one)["status"] for one in "abc"] == ["SUCCESS"] * 3
    assert bench.meta("a")["children"] == [[["b", None], None]]
    assert bench.meta("b")["parent_id"] == "a"


def test_the_last_step_carries_an_empty_chain(app: MiniQ, bench: Bench) -> None:
    add, _, note, _ = tasks_for_links(app)
    (followup,) = bench.call(add, 1, 2, chain=[note.s()]).followups
    assert body_of(followup)[2]["chain"] == []


def test_a_failed_step_fails_the_later_ones(app: MiniQ, bench: Bench) -> None:
    add, boom, note, ran = tasks_for_links(app)
    chain = [note.s().set(task_id="c", ignore_result=True), add.s(1).set(task_id="b"), note.s()]
    outcome = bench.call(boom, chain=chain, task_id="a", link=note.s())
    assert outcome.followups == []
    assert [(one.task_id, one.state) for one in outcome.results] == [("a", "FAILURE"), ("b", "FAILURE")]
    assert bench.meta("b")["result"] == bench.meta("a")["result"]
    assert ran == []


def test_an_errback_of_one_argument_gets_the_failed_id(app: MiniQ, bench: Bench) -> None:
    _, boom, _, _ = tasks_for_links(app)
    ran: List[Any] = []
    errback = app.task(name="errback")(lambda task_id: ran.append(task_id))
    outcome = bench.settle(boom, link_error=errback.s(), task_id="one")
    headers = outcome.followups[0].message.headers
    assert ran == ["one"]
    assert (headers["parent_id"], headers["root_id"], headers["group_index"]) == ("one", "one", 0)
    assert headers["group"]


def test_an_errback_of_several_arguments_is_called_at_once(app: MiniQ, bench: Bench) -> None:
    _, boom, _, _ = tasks_for_links(app)
    ran: List[Any] = []

    @app.task(name="errback")
    def errback(request: Any, exc: Any, traceback: Any, *own: Any) -> None:
        ran.append((request.id, repr(exc), traceback.splitlines()[-1], own))

    outcome = bench.call(boom, link_error=[errback.s(), errback.s("own")], task_id="one")
    assert outcome.followups == []
    assert ran == [("one", "KeyError('nope')", "KeyError: 'nope'", own) for own in ((), ("own",))]


def test_an_async_errback_is_run_at_once_too(app: MiniQ, bench: Bench) -> None:
    _, boom, _, _ = tasks_for_links(app)
    ran: List[Any] = []

    @app.task(name="errback")
    async def errback(request: Any, exc: Any, traceback: Any) -> None:
        await asyncio.sleep(0)
        ran.append(request.id)

    bench.call(boom, link_error=errback.s(), task_id="one")
    asyncio.run(bench.runner.run_async(run_of(bench.prepare(boom, link_error=errback.s(), task_id="two"))))
    assert ran == ["one", "two"]


def test_an_async_errback_of_a_lost_task_leaves_no_loop_in_the_workers_thread(
    app: MiniQ, bench: Bench
) -> None:
    _, boom, _, _ = tasks_for_links(app)
    loops: List[Any] = []

    @app.task(name="errback")
    async def errback(request: Any, exc: Any, traceback: Any) -> None:
        loops.append(asyncio.get_running_loop())

    opened: Any = bench.runner.open(run_of(bench.prepare(boom, link_error=errback.s())))
    bench.runner.failure(opened.task, opened.request, OSError("gone"), None, opened.ends)
    assert loops[0].is_closed()


def test_a_bound_errback_is_sent_as_a_message(app: MiniQ, bench: Bench) -> None:
    _, boom, _, _ = tasks_for_links(app)
    ran: List[Any] = []

    @app.task(name="errback", bind=True)
    def errback(self: Task, task_id: str, more: int = 0) -> None:
        ran.append(task_id)

    outcome = bench.settle(boom, link_error=errback.s(), task_id="one")
    assert len(outcome.followups) == 1
    assert ran == ["one"]


def test_an_immutable_errback_gets_its_own_arguments(app: MiniQ, bench: Bench) -> None:
    _, boom, note, ran = tasks_for_links(app)
    one = app.task(name="one_argument")(lambda x: ran.append((x,)))
    bench.settle(boom, link_error=[note.si("inline"), one.si("sent")])
    assert ran == [("inline",), ("sent",)]


def test_an_errback_without_code_here_is_sent_and_a_broken_one_is_skipped(
    app: MiniQ, bench: Bench, caplog: Any
) -> None:
    _, boom, note, _ = tasks_for_links(app)

    @app.task(name="broken")
    def broken(request: Any, exc: Any, traceback: Any) -> None:
        raise RuntimeError("errback")

    outcome = bench.call(boom, link_error=[broken.s(), app.signature("elsewhere.task")])
    assert [one.message.headers["task"] for one in outcome.followups] == ["elsewhere.task"]
    assert "its errback broken() failed and is skipped" in caplog.text or "broken" in caplog.text


def test_a_retry_or_ignore_sends_no_callbacks(app: MiniQ, bench: Bench) -> None:
    _, _, note, ran = tasks_for_links(app)

    @app.task(name="t", bind=True)
    def again(self: Task) -> None:
        raise self.retry()

    outcome = bench.call(again, link=note.s(), link_error=note.s())
    assert [one.message.headers["task"] for one in outcome.followups] == ["t"]


def test_tasks_sent_by_a_task_are_its_children(app: MiniQ, bench: Bench) -> None:
    add, _, _, _ = tasks_for_links(app)

    @app.task(name="parent")
    def parent() -> str:
        add.apply_async((1, 2), add_to_parent=False)
        return str(add.delay(1, 2).id)

    bench.call(parent, task_id="one", root_id="root")
    meta = bench.meta("one")
    assert meta["children"] == [[[meta["result"], None], None]]
    parent.trail = False
    bench.call(parent, task_id="two")
    assert bench.meta("two")["children"] == []


# -- messages that cannot run ----------------------------------------------------------------------


def test_an_unknown_task_is_a_failure_and_a_dead_letter(app: MiniQ, bench: Bench, caplog: Any) -> None:
    app.task(name="proj.add")(len)
    outcome = bench.call("proj.ad", task_id="one")
    assert (outcome.state, outcome.action) == ("FAILURE", "reject")
    assert "the nearest registered name is proj.add" in outcome.reason
    assert bench.meta()["result"]["exc_type"] == "NotRegistered"
    assert len(caplog.records) == 1
    assert bench.call("proj.ad", ignore_result=True).results == []


@pytest.mark.parametrize(
    ("body", "content_type", "kind"),
    [
        (b"[[], {}]", "application/json", "InvalidTaskError"),
        (b"[[], [], {}]", "application/json", "InvalidTaskError"),
        (b'[[], {}, {"callbacks": [5]}]', "application/json", "InvalidTaskError"),
        (b"not json", "application/json", "DecodeError"),
        (b"\xff", "application/json", "DecodeError"),
        (b"cos\nsystem\n(S'false'\ntR.", "application/x-python-serialize", "ContentDisallowed"),
    ],
)
def test_a_body_that_cannot_be_used_is_set_aside(
    app: MiniQ, bench: Bench, body: bytes, content_type: str, kind: str
) -> None:
    publication = bench.prepare(app.task(name="t")(len), [])
    publication.message.body, publication.message.content_type = body, content_type
    outcome = bench.run(publication)
    assert (outcome.state, outcome.action) == ("FAILURE", "reject")
    assert bench.meta()["result"]["exc_type"] == kind


def test_what_is_not_accepted_is_not_even_decompressed(app: MiniQ, bench: Bench) -> None:
    publication = bench.prepare(app.task(name="t")(len), [])
    publication.message.content_type = "application/x-nonsense"
    publication.message.headers["compression"] = "application/x-gzip"
    assert "ContentDisallowed" in bench.run(publication).reason


@pytest.mark.parametrize("key", ["callbacks", "errbacks", "chain"])
@pytest.mark.parametrize("kind", ["group", "chain", "chord"])
def test_broken_workflows_are_refused_before_the_task_has_run(
    app: MiniQ, bench: Bench, key: str, kind: str
) -> None:
    ran: List[int] = []
    publication = bench.prepare(app.task(name="t")(lambda: ran.append(1)))
    flow = {"task": f"celery.{kind}", "args": [], "kwargs": {}, "options": {}, "subtask_type": kind}
    nested: Any = {"task": "t", "args": [], "kwargs": {}, "options": {"link": [flow]}, "subtask_type": None}
    for sig in (flow, nested):
        publication.message.body = json.dumps([[], {}, {key: [sig]}]).encode()
        outcome = bench.run(publication)
        assert outcome.action == "reject"
        assert f"a {kind} needs a" in outcome.reason
    publication.message.body = json.dumps([[], {}, {"chord": nested}]).encode()
    assert f"a {kind} needs a" in bench.run(publication).reason
    assert ran == []


# -- results ---------------------------------------------------------------------------------------


def test_extended_results_tell_how_it_was_called(app: MiniQ, bench: Bench) -> None:
    app.conf.result_extended = True
    bench.call(app.task(name="t")(lambda x, y=0: x), 1, kwargs={"y": 2}, queue="q", retries=1)
    meta = bench.meta()
    assert list(meta)[-7:] == ["name", "args", "kwargs", "worker", "retries", "queue", "task_id"]
    assert [meta[key] for key in list(meta)[-7:-1]] == ["t", [1], {"y": 2}, HOSTNAME, 1, "q"]


def test_extended_results_survive_arguments_of_another_serializer(app: MiniQ, bench: Bench) -> None:
    app.conf.update(result_extended=True, accept_content=["json", "pickle"])
    outcome = bench.call(app.task(name="t")(lambda x: 5), {1}, serializer="pickle")
    assert outcome.state == "SUCCESS"
    assert (bench.meta()["result"], bench.meta()["args"]) == (5, "[{1}]")


def test_results_may_never_expire(app: MiniQ, bench: Bench) -> None:
    app.conf.result_expires = 0
    assert bench.call(app.task(name="t")(lambda: 1)).results[0].expires_s is None


@pytest.mark.parametrize(
    ("setting", "value"),
    [("result_serializer", "jsn"), ("result_compression", "gzip"), ("accept_content", ["jsn"])],
)
def test_settings_that_would_break_every_run_are_refused_at_the_start(
    app: MiniQ, setting: str, value: Any
) -> None:
    app.conf[setting] = value
    with pytest.raises(ImproperlyConfigured):
        TaskRunner(app, "x")


def test_a_task_stores_states_of_its_own(app: MiniQ, bench: Bench) -> None:
    seen: List[Any] = []

    @app.task(name="t", bind=True)
    def act(self: Task) -> None:
        self.update_state(state="PROGRESS", meta={"done": 1})
        seen.append((self.AsyncResult(self.request.id).state, self.AsyncResult(self.request.id).info))
        self.update_state("other", state=states.FAILURE, meta=ValueError("x"))

    bench.call(act, task_id="one")
    assert seen == [("PROGRESS", {"done": 1})]
    assert isinstance(app.AsyncResult("other").result, ValueError)


# -- coroutines ------------------------------------------------------------------------------------


class Limit:
    """A guard whose limit is over when the test says so; raises once, as the pools' guards do."""

    def __init__(self, due: bool = False) -> None:
        self.due = due
        self.armed = 0

    def __enter__(self) -> None:
        if self.due:
            self.due = False
            raise SoftTimeLimitExceeded(1)
        self.armed += 1

    def __exit__(self, *exc_info: Any) -> None:
        self.armed -= 1


def test_a_coroutine_is_awaited_in_a_loop_that_stays(app: MiniQ, bench: Bench) -> None:
    loops: List[Any] = []

    @app.task(name="t", bind=True)
    async def wait(self: Task, x: int) -> int:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        assert self.request.id
        return x * 2

    assert [bench.call(wait, 4).state for _ in range(2)] == ["SUCCESS"] * 2
    assert loops[0] is loops[1]
    assert not loops[0].is_closed()
    bench.runner.process_shutdown(0)
    assert loops[0].is_closed()


def test_a_thread_that_ends_closes_its_own_loop_alone(app: MiniQ, bench: Bench) -> None:
    loops: List[Any] = []

    @app.task(name="t")
    async def note() -> None:
        loops.append(asyncio.get_running_loop())

    def other() -> None:
        bench.call(note)
        bench.runner.thread_exit()
        assert loops[1].is_closed()
        bench.call(note)
        bench.runner.thread_exit()
        bench.runner.thread_exit()

    bench.call(note)
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert [loop.is_closed() for loop in loops] == [False, True, True]
    bench.call(note)
    assert loops[3] is loops[0]


def test_an_error_while_a_loop_is_closed_is_logged_and_the_loop_closed(
    app: MiniQ, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    loops: List[Any] = []

    @app.task(name="t")
    async def spoil() -> None:
        loop: Any = asyncio.get_running_loop()
        loops.append(loop)
        loop.shutdown_asyncgens = None

    assert bench.call(spoil).state == "SUCCESS"
    bench.runner.thread_exit()
    assert loops[0].is_closed()
    assert "could not be ended" in caplog.text


def test_loops_of_threads_nobody_keeps_are_closed_at_once(app: MiniQ, bench: Bench) -> None:
    loops: List[Any] = []

    async def note() -> None:
        loops.append(asyncio.get_running_loop())

    @app.task(name="t")
    def plain() -> Any:
        return note()

    asyncio.run(bench.runner.run_async(run_of(bench.prepare(plain))))

    async def nested() -> None:
        bench.runner.run_coroutine(note())

    asyncio.run(nested())
    assert [loop.is_closed() for loop in loops] == [True, True]


def test_what_a_coroutine_left_running_is_cancelled_at_the_end(app: MiniQ, bench: Bench) -> None:
    ended: List[str] = []
    kept: List[Any] = []

    async def background() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            ended.append("cancelled")

    @app.task(name="t")
    async def start() -> None:
        kept.append(asyncio.ensure_future(background()))
        await asyncio.sleep(0)

    bench.call(start)
    assert ended == []
    bench.runner.process_shutdown(0)
    assert ended == ["cancelled"]


def test_a_coroutine_can_fail_retry_and_autoretry(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t", bind=True, autoretry_for=(OSError,))
    async def act(self: Task, how: str) -> None:
        await asyncio.sleep(0)
        if how == "retry":
            raise self.retry()
        raise {"os": OSError, "value": ValueError}[how]("x")

    async def in_loop(how: str) -> str:
        return (await bench.runner.run_async(run_of(bench.prepare(act, how)))).state

    expected = [("retry", "RETRY"), ("os", "RETRY"), ("value", "FAILURE")]
    assert [(how, bench.call(act, how).state) for how, _ in expected] == expected
    bench.call(act, "value", task_id="one")
    assert __file__ in bench.meta("one")["traceback"].splitlines()[1], "the first frame is the task's own"
    assert [(how, asyncio.run(in_loop(how))) for how, _ in expected] == expected


def test_a_coroutine_that_cancels_itself_is_a_failure(app: MiniQ, bench: Bench) -> None:
    @app.task(name="t")
    async def act() -> None:
        raise asyncio.CancelledError

    assert bench.call(act).state == "FAILURE"
    assert "cancelled" in bench.meta()["result"]["exc_message"][0]


def test_the_soft_limit_reaches_a_waiting_coroutine_which_cleans_up(app: MiniQ, bench: Bench) -> None:
    limit = Limit()
    seen: List[Any] = []

    @app.task(name="t")
    async def act() -> str:
        try:
            limit.due = True
            await asyncio.sleep(100)
        except SoftTimeLimitExceeded:
            await asyncio.sleep(0.001)
            seen.append("cleaned up")
        return "in time after all"

    outcome = bench.run(bench.prepare(act), limit)
    assert seen == ["cleaned up"]
    assert (outcome.state, limit.armed) == ("SUCCESS", 0)


def test_the_soft_limit_reaches_what_the_coroutine_waits_for(app: MiniQ, bench: Bench) -> None:
    limit = Limit()
    cancelled: List[int] = []

    async def part(number: int) -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            cancelled.append(number)
            raise

    @app.task(name="t")
    async def act() -> None:
        limit.due = True
        await asyncio.gather(part(1), part(2))

    assert bench.run(bench.prepare(act), limit).state == "FAILURE"
    assert bench.meta()["result"]["exc_type"] == "SoftTimeLimitExceeded"
    assert cancelled == [1, 2]


def test_the_soft_limit_reaches_a_coroutine_between_two_steps(app: MiniQ, bench: Bench) -> None:
    limit = Limit()

    @app.task(name="t")
    async def act() -> str:
        try:
            for _ in range(1000):
                limit.due = True
                await asyncio.sleep(0)
        except SoftTimeLimitExceeded:
            await asyncio.sleep(0)
            return "stopped"
        return "never stopped"

    bench.run(bench.prepare(act), limit)
    assert bench.meta()["result"] == "stopped"


def test_the_guard_is_armed_around_the_tasks_own_code_only(app: MiniQ, bench: Bench) -> None:
    limit = Limit()
    armed: List[Any] = []

    class Looking(Recording):
        def before_start(self, *args: Any) -> None:
            armed.append(("before_start", limit.armed))

        def on_success(self, *args: Any) -> None:
            armed.append(("on_success", limit.armed))

    task = app.task(name="t", base=Looking)(lambda: armed.append(("body", limit.armed)))
    bench.run(bench.prepare(task), limit)
    assert armed == [("before_start", 0), ("body", 1), ("on_success", 0)]


def test_a_soft_limit_that_was_over_before_the_start_fails_the_task(app: MiniQ, bench: Bench) -> None:
    ran: List[int] = []
    outcome = bench.run(bench.prepare(app.task(name="t")(lambda: ran.append(1))), Limit(due=True))
    assert outcome.state == "FAILURE"
    assert ran == []


def test_cancelling_run_async_cancels_the_tasks_code(app: MiniQ, bench: Bench) -> None:
    seen: List[str] = []

    @app.task(name="t")
    async def act() -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def main() -> None:
        running = asyncio.ensure_future(bench.runner.run_async(run_of(bench.prepare(act))))
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(main())
    assert seen == ["cancelled"]


def test_a_plain_function_does_not_block_the_loop_it_runs_in(app: MiniQ, bench: Bench) -> None:
    go_on = threading.Event()

    @app.task(name="t", bind=True)
    def act(self: Task) -> Any:
        return go_on.wait(10), self.request.id, threading.current_thread() is threading.main_thread()

    async def main() -> Any:
        running = asyncio.ensure_future(bench.runner.run_async(run_of(bench.prepare(act, task_id="one"))))
        await asyncio.sleep(0)
        go_on.set()
        return await running

    outcome = asyncio.run(main())
    assert json.loads(outcome.results[0].body)["result"] == [True, "one", False]


# -- the process around it -------------------------------------------------------------------------


def test_receivers_hear_of_the_process(app: MiniQ, bench: Bench) -> None:
    with hearing(signals.worker_process_init, signals.worker_process_shutdown) as heard:
        bench.runner.process_init()
        bench.runner.process_shutdown(3)
    assert [name for name, _, _ in heard] == ["worker_process_init", "worker_process_shutdown"]
    assert heard[1][2]["exitcode"] == 3


# -- what it costs ---------------------------------------------------------------------------------


def test_a_task_runs_few_frames_deep_and_costs_few_calls(app: MiniQ, bench: Bench, tell: Any) -> None:
    here = sys._getframe()
    depths: List[int] = []

    @app.task(name="t")
    def depth() -> None:
        frame: Any = sys._getframe(1)
        found = 0
        while frame is not None and frame is not here:
            found, frame = found + 1, frame.f_back
        depths.append(found)

    run = run_of(bench.prepare(depth))
    bench.runner.run(run)
    assert depths == [2], "between the runner's caller and the function"
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call"

    trivial = app.task(name="trivial")(lambda: None)
    run = run_of(bench.prepare(trivial))
    bench.runner.run(run)
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        bench.runner.run(run)
    finally:
        sys.setprofile(before)
    assert calls <= 50
    started = time.perf_counter()
    for _ in range(1000):
        bench.runner.run(run)
    tell(f"TaskRunner.run: {(time.perf_counter() - started) * 1000:.0f} us, {calls} Python calls")


def test_errors_have_the_public_names() -> None:
    assert issubclass(EncodeError, Exception)
    assert issubclass(MaxRetriesExceededError, Exception)

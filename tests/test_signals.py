# SPDX-License-Identifier: MIT
"""Signals: connecting, sending, and what an exception in a receiver does."""

from __future__ import annotations

import functools
import gc
import logging
import threading
from typing import Any, List

import pytest

from miniq import signals
from miniq.signals import Signal


@pytest.fixture
def signal() -> Signal:
    return Signal("fire", ("heat",))


def test_a_receiver_gets_signal_sender_and_arguments(signal: Signal) -> None:
    calls: List[Any] = []

    def receiver(sender: Any, heat: int, **kwargs: Any) -> str:
        calls.append((sender, heat, kwargs))
        return "ok"

    assert signal.connect(receiver) is receiver
    assert signal.send(sender="me", heat=3) == [(receiver, "ok")]
    assert signal.send_robust("me", heat=4) == [(receiver, "ok")]
    assert calls == [("me", 3, {"signal": signal}), ("me", 4, {"signal": signal})]


def test_connect_decorates_with_and_without_arguments(signal: Signal) -> None:
    @signal.connect
    def plain(**kwargs: Any) -> int:
        return 1

    @signal.connect()
    def called(**kwargs: Any) -> int:
        return 2

    @signal.connect(sender="proj.add", weak=False)
    def chosen(**kwargs: Any) -> int:
        return 3

    assert [response for _, response in signal.send("other")] == [1, 2]
    assert [response for _, response in signal.send("proj." + "add")] == [1, 2, 3]


def test_a_sender_is_compared_by_identity_unless_it_is_text(signal: Signal) -> None:
    class Equal:
        def __eq__(self, other: object) -> bool:
            return True

    wanted = Equal()
    signal.connect(lambda **kwargs: "heard", sender=wanted, weak=False)
    assert len(signal.send(wanted)) == 1
    assert signal.send(Equal()) == []
    assert signal.has_listeners(wanted)
    assert not signal.has_listeners(Equal())


def test_receivers_is_false_until_somebody_listens(signal: Signal) -> None:
    assert not signal.receivers

    def receiver(**kwargs: Any) -> None: ...

    signal.connect(receiver)
    assert signal.receivers
    assert signal.disconnect(receiver)
    assert not signal.receivers
    assert not signal.disconnect(receiver)


def test_a_weakly_connected_receiver_goes_with_its_last_reference(signal: Signal) -> None:
    def receiver(**kwargs: Any) -> None: ...

    signal.connect(receiver)
    del receiver
    gc.collect()
    assert not signal.receivers
    assert signal.send(None) == []


def test_a_bound_method_lives_as_long_as_its_object(signal: Signal) -> None:
    class Listener:
        def hear(self, **kwargs: Any) -> str:
            return "heard"

    listener = Listener()
    signal.connect(listener.hear)
    signal.connect(listener.hear)
    assert [response for _, response in signal.send(None)] == ["heard"], "one method, one connection"
    assert signal.disconnect(listener.hear)
    signal.connect(listener.hear)
    del listener
    gc.collect()
    assert not signal.receivers


def test_a_strongly_connected_receiver_stays(signal: Signal) -> None:
    signal.connect(lambda **kwargs: "here", weak=False)
    gc.collect()
    assert [response for _, response in signal.send(None)] == ["here"]


def test_a_dispatch_uid_connects_once_and_disconnects(signal: Signal) -> None:
    for _ in range(3):
        signal.connect(lambda **kwargs: "once", weak=False, dispatch_uid="mine")
    assert len(signal.send(None)) == 1
    assert signal.disconnect(dispatch_uid="mine")
    assert signal.send(None) == []


def test_a_receiver_without_kwargs_is_refused(signal: Signal) -> None:
    def narrow(sender: Any) -> None: ...

    with pytest.raises(ValueError, match=r"narrow.* of signal fire must accept \*\*kwargs"):
        signal.connect(narrow)

    class Narrow:
        def hear(self, sender: Any) -> None: ...

    with pytest.raises(ValueError, match="must accept"):
        signal.connect(Narrow().hear)


def test_an_exception_is_logged_returned_and_the_next_receiver_called(
    signal: Signal, caplog: pytest.LogCaptureFixture
) -> None:
    error = ValueError("broken")

    def broken(**kwargs: Any) -> None:
        raise error

    def fine(**kwargs: Any) -> str:
        return "fine"

    signal.connect(broken)
    signal.connect(fine)
    with caplog.at_level(logging.ERROR, "celery.signals"):
        assert signal.send(None) == [(broken, error), (fine, "fine")]
    [record] = caplog.records
    assert (
        "broken" in record.getMessage() and "fire" in record.getMessage() and "ignored" in record.getMessage()
    )
    assert record.exc_info is not None and record.exc_info[1] is error


def test_an_exit_request_of_a_receiver_gets_through(signal: Signal) -> None:
    def leave(**kwargs: Any) -> None:
        raise SystemExit(3)

    signal.connect(leave)
    with pytest.raises(SystemExit):
        signal.send(None)


def test_retry_calls_again_but_not_for_ever(signal: Signal, caplog: pytest.LogCaptureFixture) -> None:
    calls: List[int] = []

    def flaky(**kwargs: Any) -> str:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("not yet")
        return "done"

    def hopeless(**kwargs: Any) -> None:
        raise OSError("never")

    signal.connect(flaky, retry=True)
    signal.connect(hopeless, retry=True)
    responses = [response for _, response in signal.send(None)]
    assert responses[0] == "done"
    assert isinstance(responses[1], OSError)
    assert len(caplog.records) == 2 + signals.RETRY_ATTEMPTS


def test_threads_that_connect_at_once_lose_nothing(signal: Signal) -> None:
    receivers = [functools.partial(lambda number, **kwargs: number, n) for n in range(400)]
    threads = [
        threading.Thread(target=lambda part=part: [signal.connect(one) for one in part])
        for part in (receivers[:100], receivers[100:200], receivers[200:300], receivers[300:])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(response for _, response in signal.send(None)) == list(range(400))


def test_celerys_signals_exist_with_their_names_and_arguments() -> None:
    named = {name: value for name, value in vars(signals).items() if isinstance(value, Signal)}
    assert all(value.name == name and value.__doc__ for name, value in named.items())
    known = """
        before_task_publish after_task_publish task_received task_prerun task_postrun task_success
        task_retry task_failure task_internal_error task_revoked task_rejected task_unknown
        task_sent celeryd_init celeryd_after_setup import_modules worker_init
        worker_before_create_process worker_process_init worker_process_shutdown worker_ready
        worker_shutting_down worker_shutdown heartbeat_sent beat_init beat_embedded_init
        setup_logging after_setup_logger after_setup_task_logger eventlet_pool_started
        eventlet_pool_preshutdown eventlet_pool_postshutdown eventlet_pool_apply
        user_preload_options test_worker_starting test_worker_started test_worker_stopped
    """
    assert set(named) >= set(known.split())
    assert signals.task_revoked.arguments == ("request", "terminated", "signum", "expired")
    assert not any(value.receivers for value in named.values()), "importing connects nothing"

# SPDX-License-Identifier: MIT
"""Remote control over RabbitMQ: whose queues they are, and what becomes of them."""

from __future__ import annotations

from typing import Any

import pytest
from test_control import check_scheduled
from waiting import wait_until

from miniq import MiniQ

#: Not over before anything that happens here, however slow the machine.
TIMEOUT_S = 30.0


def test_namesakes_both_hear_and_no_queue_stays_behind(
    rabbit_server: Any, rabbit_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    vhost = rabbit_url.rpartition("/")[2]

    def queues() -> Any:
        return sorted(name for name in rabbit_server.queues(vhost) if "pidbox" in name)

    pong = {"same@h": {"ok": "pong"}}
    with MiniQ("t", broker=rabbit_url, backend="disabled://") as app:
        assert app.control.ping(timeout=0.05) == [], "nobody has declared the exchange yet"
        with app.worker(hostname="same@h"):
            wait_until(lambda: queues() == ["same@h.celery.pidbox"])
            with app.worker(hostname="same@h") as two:
                assert "hears them on a queue of its own" in caplog.text
                assert app.control.ping("same@h", timeout=TIMEOUT_S, limit=2) == [pong, pong]
                for number in range(5):
                    app.control.broadcast("pool_grow", {"n": number}, reply=True, limit=2, timeout=TIMEOUT_S)
                assert two.pool.size == two.concurrency + 10
                wait_until(lambda: len(queues()) == 2, what=queues)
            assert app.control.inspect("same@h", timeout=TIMEOUT_S).stats()["broker"]["transport"] == "amqp"
        wait_until(lambda: not queues(), what=queues)


def test_what_is_held_until_it_is_due_is_told(rabbit_url: str) -> None:
    # Else they would wait in the server, where nobody can look at them.
    hold = {"hold": 60}
    with MiniQ("t", broker=rabbit_url, backend="disabled://", broker_transport_options=hold) as app:
        check_scheduled(app)


def test_another_exchange_keeps_apart_who_uses_one_broker(rabbit_url: str) -> None:
    options: Any = {"broker": rabbit_url, "backend": "disabled://"}
    shop, other = MiniQ("a", control_exchange="shop", **options), MiniQ("b", **options)
    with shop, other, shop.worker(hostname="w@h"):
        assert other.control.ping(timeout=0.1) == []
        assert shop.control.ping("w@h", timeout=TIMEOUT_S) == [{"w@h": {"ok": "pong"}}]

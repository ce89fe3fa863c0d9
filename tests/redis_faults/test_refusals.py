# SPDX-License-Identifier: MIT
"""The server is there and refuses: another password, no memory, data that is still being loaded."""

from __future__ import annotations

import os
import time
from typing import Callable

import pytest
from faults import FULL, Sender, cpu_s, rounds, when_full
from redis_fleet import Fleet
from waiting import wait_until

from miniq.exceptions import OperationalError


@pytest.mark.parametrize(
    "results_db",
    [
        0,
        pytest.param(1, marks=when_full),
    ],
)
def test_worker_keeps_its_outcomes_until_the_password_is_right_again(
    new_fleet: Callable[..., Fleet], results_db: int
) -> None:
    fleet = new_fleet()
    server = fleet.server
    fleet.client = fleet.new_client(result_backend=server.url(results_db))
    worker = fleet.start_worker(result_backend=fleet.proxy.url(server.url(results_db)))
    fleet.wait_consuming()
    for number in rounds():
        fleet.check_no_growth()
        results = [fleet.send("hold", f"{number}-{index}", f"go{number}") for index in range(2)]
        fleet.wait_for_lines("began", 2 * number + 2)
        seen = len(worker.log)
        server.command("CONFIG", "SET", "requirepass", "secret")
        server.password = "secret"
        server.kill_clients()
        fleet.release(f"go{number}")
        wait_until(lambda: "NOAUTH" in worker.log[seen:], 10.0, lambda: worker.log)  # noqa: B023
        assert "the server wants a password" in worker.log[seen:]
        used_s = cpu_s(worker.pid)
        time.sleep(3.0 if FULL else 0.5)
        assert cpu_s(worker.pid) - used_s < 0.2, "it does not try in a circle"
        server.command("CONFIG", "SET", "requirepass", "")
        server.password = None
        fleet.wait_consuming()
        assert [one.get(timeout=10) for one in results] == [f"{number}-0", f"{number}-1"], worker.log
    fleet.check_no_growth()

    fleet.check_hears_commands()
    fleet.check_no_leftovers()


def test_full_memory_refuses_calls_and_costs_no_outcome(new_fleet: Callable[..., Fleet]) -> None:
    fleet = new_fleet(arguments=["--maxmemory-policy", "noeviction"])
    server = fleet.server
    worker = fleet.start_worker()
    fleet.wait_consuming()
    for number in rounds():
        fleet.check_no_growth()
        results = [fleet.send("hold", f"{number}-{index}", f"go{number}") for index in range(2)]
        fleet.wait_for_lines("began", 2 * number + 2)
        with Sender(fleet) as sender:
            sender.wait_for_more(20)
            server.command("CONFIG", "SET", "maxmemory", 1)
            with pytest.raises(OperationalError, match="OOM .*the server's memory is full"):
                fleet.send("note", 0)
            wait_until(lambda: sender.refused, 10.0, "another call is refused")
            fleet.release(f"go{number}")
            # Settling makes room: whether the worker can do it now already is the server's affair.
            fleet.wait_for_lines("ended", 2 * number + 2)
            time.sleep(3.0 if FULL else 0.3)
            server.command("CONFIG", "SET", "maxmemory", 0)
            fleet.wait_consuming()
        assert all("OOM" in text for text in sender.refused), sender.refused
        fleet.check_nothing_lost(sender.accepted)
        assert [one.get(timeout=10) for one in results] == [f"{number}-0", f"{number}-1"], worker.log
    fleet.check_no_growth()
    fleet.check_no_leftovers()


def test_worker_waits_for_a_server_that_loads_its_data(new_fleet: Callable[..., Fleet]) -> None:
    fleet = new_fleet()
    server = fleet.server
    worker = fleet.start_worker()
    fleet.wait_consuming()
    server.commands([("SET", f"key-{n}", os.urandom(1100)) for n in range(1000)])
    # Slow (microseconds for each key), so that it does not end before it was seen.
    slowly = ["--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024"]
    for _ in rounds():
        fleet.check_no_growth()
        seen = len(worker.log)
        with Sender(fleet) as sender:
            sender.wait_for_more(20)
        server.command("SAVE")
        server.stop()
        server.arguments = slowly
        server.start(wait=False)
        wait_until(lambda: "LOADING" in worker.log[seen:], 15.0, lambda: worker.log)  # noqa: B023
        with pytest.raises(OperationalError, match="LOADING .*has just started"):
            fleet.send("note", 0, retry=False)
        server.command("CONFIG", "SET", "key-load-delay", 0)
        server.wait_ready()
        fleet.wait_consuming()
        fleet.check_nothing_lost(sender.accepted)
    fleet.check_no_growth()
    fleet.check_no_leftovers()

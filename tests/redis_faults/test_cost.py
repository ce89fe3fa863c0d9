# SPDX-License-Identifier: MIT
"""What waiting costs: CPU time and commands of an idle worker, connections of workers and clients."""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, List

from faults import cpu_s, when_full
from redis_fleet import Fleet, commands_of
from waiting import wait_until

#: How long an idle worker is looked at.
SECONDS = 15.0


@when_full
def test_idle_worker_costs_next_to_nothing_with_connections_closed_by_the_server_too(
    new_fleet: Callable[..., Fleet], tell: Callable[[str], None]
) -> None:
    # The second server closes what is idle for longer than a worker's own signs of life are apart.
    fleets = [new_fleet(), new_fleet(arguments=["--timeout", "5"])]
    for fleet in fleets:
        fleet.start_worker()
        fleet.wait_consuming()
    time.sleep(1.0)  # what belongs to the task is over
    used_s = [cpu_s(fleet.workers[0].pid) for fleet in fleets]
    before = [commands_of(fleet.server) for fleet in fleets]
    time.sleep(SECONDS)
    for fleet, cpu_before_s, commands_before in zip(fleets, used_s, before):
        share = (cpu_s(fleet.workers[0].pid) - cpu_before_s) / SECONDS
        rate = (commands_of(fleet.server) - commands_before) / SECONDS
        tell(f"idle worker: {share:.2%} CPU, {rate:.1f} commands/s")
        # One tick of the clock that CPU time is counted with is 10 ms.
        assert share < 0.005 + 0.01 / SECONDS
        assert rate <= 5.0
        fleet.wait_consuming()
        fleet.check_no_leftovers()


@when_full
def test_workers_are_not_woken_by_what_others_start_and_settle(
    new_fleet: Callable[..., Fleet], tell: Callable[[str], None]
) -> None:
    fleet = new_fleet()
    for _ in range(3):
        fleet.start_worker()
    fleet.wait_consuming()

    def scripts() -> int:
        return int(fleet.server.info("commandstats")["cmdstat_evalsha"].partition("calls=")[2].split(",")[0])

    before, numbers = scripts(), [fleet.next_number() for _ in range(50)]
    for number in numbers:
        fleet.send("note", number)
        wait_until(lambda: number in fleet.ran(), 10.0)  # noqa: B023
        time.sleep(0.02)
    rate = (scripts() - before) / len(numbers)
    tell(f"three idle workers: {rate:.1f} scripts for a task")
    # Each of them looks when one comes; it is started and settled; some more for their upkeep.
    assert rate < 7.0
    fleet.check_no_leftovers()


@when_full
def test_what_hears_commands_lives_as_long_as_its_worker(new_fleet: Callable[..., Fleet]) -> None:
    fleet = new_fleet()
    fleet.start_worker(lease_s=1.0)
    queues = set(fleet.server.command("HKEYS", "_miniq.queues"))
    assert queues == {b"celery", b"worker1@h.celery.pidbox"}
    time.sleep(4.0)
    assert len(fleet.server.command("HKEYS", "_miniq.owners")) == 2
    assert set(fleet.server.command("HKEYS", "_miniq.queues")) == queues
    fleet.check_no_leftovers()


def test_worker_has_3_connections_and_a_client_12_for_40_threads(new_fleet: Callable[..., Fleet]) -> None:
    fleet = new_fleet()
    fleet.start_worker()
    fleet.wait_consuming()
    failed: List[BaseException] = []

    def call() -> None:
        try:
            for _ in range(20):
                number = fleet.next_number()
                assert fleet.send("note", number).get(timeout=20) == number
        except BaseException as error:
            failed.append(error)
        finally:
            fleet.client.producer.close()

    threads = [threading.Thread(target=call) for _ in range(40)]
    for thread in threads:
        thread.start()
    most_of_worker = most_of_client = 0
    while any(thread.is_alive() for thread in threads):
        found: List[Any] = fleet.server.clients()
        # The worker's go through the proxy, the client's do not.
        of_worker = len(fleet.proxy.connections)
        most_of_worker = max(most_of_worker, of_worker)
        most_of_client = max(most_of_client, len(found) - of_worker)
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert 2 <= most_of_worker <= 3
    assert 2 <= most_of_client <= 12
    names = [one["name"] for one in fleet.server.clients()]
    assert names.count("worker1@h") == 2 and names.count("miniq-results") == 1
    fleet.check_no_leftovers()

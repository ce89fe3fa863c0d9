# SPDX-License-Identifier: MIT
"""The server, or what is between, fails: nothing is lost, and the worker soon goes on by itself."""

from __future__ import annotations

import time
from typing import Any, Callable, Dict

import pytest
from faults import FULL, Sender, rounds, when_full
from rabbit_fleet import IMPATIENT, NOTICE_S, USUAL_NOTICE_S, Fleet
from waiting import wait_until


def black_hole(fleet: Fleet) -> None:
    """Existing connections pass nothing any more, new ones are good."""
    fleet.proxy.black_hole()


def reset(fleet: Fleet) -> None:
    fleet.proxy.reset()


def close(fleet: Fleet) -> None:
    fleet.proxy.close()


def dribble(fleet: Fleet) -> None:
    """What is said comes byte by byte for a while."""
    fleet.proxy.dribble(0.0005)
    time.sleep(3.0 if FULL else 0.3)
    fleet.proxy.forward()


def close_connections(fleet: Fleet) -> None:
    """As ``rabbitmqctl close_all_connections`` does."""
    assert fleet.server.close_connections()


def restart(fleet: Fleet) -> None:
    fleet.server.restart()


def kill(fleet: Fleet) -> None:
    fleet.server.kill()
    time.sleep(3.0 if FULL else 0.0)
    fleet.server.start()


def freeze(fleet: Fleet) -> None:
    fleet.server.pause()
    time.sleep(10.0 if FULL else 1.0)
    fleet.server.resume()


#: Fault -> seconds within which the worker consumes again when it is over.
FAULTS: Dict[Callable[[Fleet], None], float] = {
    black_hole: NOTICE_S,
    **dict.fromkeys((reset, close, dribble, close_connections, restart, kill, freeze), 5.0),
}


def settings_for(fault: Callable[[Fleet], None]) -> Dict[str, Any]:
    return IMPATIENT if fault is black_hole or not FULL else {}


each_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
QUORUM = {"task_default_queue_type": "quorum"}


@pytest.mark.parametrize(
    "settings", [{}, pytest.param(QUORUM, marks=when_full)], ids=["classic", "quorum"]
)
@each_fault
def test_nothing_is_lost_while_tasks_are_sent_and_run(
    new_fleet: Callable[..., Fleet],
    fault: Callable[[Fleet], None],
    settings: Dict[str, Any],
    tell: Callable[[str], None],
) -> None:
    fleet = new_fleet(**settings)
    fleet.start_worker(**settings_for(fault))
    fleet.wait_consuming()
    accepted = refused = 0
    longest_s = 0.0
    for _ in rounds():
        fleet.check_no_growth()
        # A call that is tried again may have sent its message twice, which no worker can know.
        with Sender(fleet, retry=False) as sender:
            sender.wait_for_more(30)
            fault(fleet)
            longest_s = max(longest_s, fleet.wait_consuming(FAULTS[fault]))
            sender.wait_for_more(10)
        fleet.check_nothing_lost(sender.accepted)
        accepted += len(sender.accepted)
        refused += len(sender.refused)
    fleet.check_no_growth()
    if fault in (black_hole, kill):
        fleet.check_hears_commands(20.0)
    fleet.check_no_leftovers()
    assert not fleet.doubles(), f"{fleet.doubles()}: {fleet}"
    tell(
        f"RabbitMQ, {fault.__name__}: consuming again after {longest_s:.1f} s;"
        f" {accepted} calls accepted, {refused} refused"
    )


@each_fault
@when_full
def test_idle_worker_takes_what_comes_after_the_fault(
    new_fleet: Callable[..., Fleet], fault: Callable[[Fleet], None], tell: Callable[[str], None]
) -> None:
    fleet = new_fleet()
    fleet.start_worker(**settings_for(fault))
    fleet.wait_consuming()
    longest_s = 0.0
    for number in rounds():
        fleet.check_no_growth()
        # At different times of its own looks, which are two seconds apart.
        time.sleep(number % 5 * 0.5)
        fault(fleet)
        longest_s = max(longest_s, fleet.wait_consuming(FAULTS[fault]))
    fleet.check_no_growth()
    # What hears them is the old connection's alone until the server gives that up.
    fleet.check_hears_commands(20.0)
    fleet.check_no_leftovers()
    assert not fleet.doubles(), fleet
    tell(f"RabbitMQ, {fault.__name__} while idle: consuming again after {longest_s:.1f} s")


@when_full
def test_worker_with_the_usual_heartbeats_takes_what_comes_later(
    new_fleet: Callable[..., Fleet], tell: Callable[[str], None]
) -> None:
    fleet = new_fleet()
    fleet.start_worker()
    longest_s = 0.0
    for _ in rounds():
        fleet.check_no_growth()
        fleet.proxy.black_hole()
        began_mono = time.monotonic()
        before = fleet.ran()
        with Sender(fleet, pause_s=0.1, retry=False) as sender:
            wait_until(
                lambda before=before: fleet.ran() > before,  # type: ignore[misc]
                USUAL_NOTICE_S,
                lambda: f"a task runs again: {fleet}",
            )
            longest_s = max(longest_s, time.monotonic() - began_mono)
        # What the server had sent into the black hole it has back when it gives that up.
        fleet.proxy.reset()
        fleet.check_nothing_lost(sender.accepted)
    fleet.check_no_growth()
    fleet.check_hears_commands()
    fleet.check_no_leftovers()
    assert not fleet.doubles(), fleet
    tell(f"RabbitMQ, black_hole with the usual heartbeats: consuming again after {longest_s:.1f} s")

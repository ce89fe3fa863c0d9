# SPDX-License-Identifier: MIT
"""The server, or what is between, fails: nothing is lost, and the worker soon goes on by itself."""

from __future__ import annotations

import time
from typing import Any, Callable, Dict

import pytest
from faults import FULL, Sender, rounds, when_full
from redis_fleet import Fleet

#: Commands give up early in the short version, so that a line that is dead is noticed early.
OPTIONS: Dict[str, Any] = {} if FULL else {"broker_transport_options": {"socket_timeout": 0.5}}


def black_hole(fleet: Fleet) -> None:
    """Existing connections pass nothing any more, new ones are good."""
    fleet.proxy.black_hole()


def reset(fleet: Fleet) -> None:
    fleet.proxy.reset()


def close(fleet: Fleet) -> None:
    fleet.proxy.close()


def dribble(fleet: Fleet) -> None:
    """Replies and commands come byte by byte for a while."""
    fleet.proxy.dribble(0.0005)
    time.sleep(3.0 if FULL else 0.3)
    fleet.proxy.forward()


def kill_clients(fleet: Fleet) -> None:
    fleet.server.kill_clients()


def restart(fleet: Fleet) -> None:
    fleet.server.restart()


def kill(fleet: Fleet) -> None:
    fleet.server.kill()
    time.sleep(3.0 if FULL else 0.3)
    fleet.server.start()


def freeze(fleet: Fleet) -> None:
    fleet.server.pause()
    time.sleep(20.0 if FULL else 1.0)
    fleet.server.resume()


#: Fault -> seconds within which the worker consumes again when it is over.
FAULTS: Dict[Callable[[Fleet], None], float] = {
    black_hole: 30.0,
    **dict.fromkeys((reset, close, dribble, kill_clients, restart, kill, freeze), 5.0),
}
each_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)


@each_fault
def test_nothing_is_lost_while_tasks_are_sent_and_run(
    new_fleet: Callable[..., Fleet], fault: Callable[[Fleet], None]
) -> None:
    fleet = new_fleet(appendonly=True)
    fleet.start_worker(**OPTIONS)
    fleet.wait_consuming()
    for _ in rounds():
        fleet.check_no_growth()
        with Sender(fleet) as sender:
            sender.wait_for_more(30)
            fault(fleet)
            fleet.wait_consuming(FAULTS[fault])
            sender.wait_for_more(10)
        fleet.check_nothing_lost(sender.accepted)
    fleet.check_no_growth()
    fleet.check_no_leftovers()


@each_fault
@when_full
def test_idle_worker_takes_what_comes_after_the_fault(
    new_fleet: Callable[..., Fleet], fault: Callable[[Fleet], None]
) -> None:
    fleet = new_fleet(appendonly=True)
    fleet.start_worker()
    fleet.wait_consuming()
    for number in rounds():
        fleet.check_no_growth()
        # At different times of its own looks, which are two seconds apart.
        time.sleep(number % 5 * 0.5)
        fault(fleet)
        fleet.wait_consuming(FAULTS[fault])
    fleet.check_no_growth()
    fleet.check_no_leftovers()

# SPDX-License-Identifier: MIT
"""The server does not let in, allows too little, or says nothing: a clear error, and in time."""

from __future__ import annotations

import socket
import time
from typing import Any, Callable, Dict, Tuple

import pytest
from faults import Sender, rounds, when_full
from peers import hold, listening
from rabbit_fleet import Fleet
from servers import HOST
from waiting import wait_until

from miniq.codecs.amqp_wire import FRAME_METHOD, encode_frame, encode_method
from miniq.exceptions import ImproperlyConfigured, OperationalError

#: Seconds of a call here, and what the machine may add.
TIMEOUT_S, SLACK_S = 1.0, 1.0


def wrong_password(fleet: Fleet) -> str:
    return fleet.server.url(fleet.vhost, password="secret word")


def wrong_vhost(fleet: Fleet) -> str:
    return fleet.server.url("nowhere")


def no_vhost_permission(fleet: Fleet) -> str:
    return _stranger(fleet)


def no_configure_permission(fleet: Fleet) -> str:
    return _stranger(fleet, configure="^$")


def no_write_permission(fleet: Fleet) -> str:
    return _stranger(fleet, write="^$")


def no_read_permission(fleet: Fleet) -> str:
    return _stranger(fleet, read="^$")


def _stranger(fleet: Fleet, **permissions: str) -> str:
    """Return the URL of a user who may do less in the virtual host, or not even enter it."""
    name = f"stranger of {fleet.vhost}"
    fleet.server.add_user(name, "password")
    if permissions:
        fleet.server.set_permissions(name, fleet.vhost, **permissions)
    return fleet.server.url(fleet.vhost, user=name, password="password")


#: What is closed -> what the error says.
DOORS: Dict[Callable[[Fleet], str], Tuple[str, ...]] = {
    wrong_password: ("403 ACCESS_REFUSED", "check user and password"),
    wrong_vhost: ("530 NOT_ALLOWED", "virtual host", "nowhere"),
    no_vhost_permission: ("530 NOT_ALLOWED", "check the virtual host", "who may use it"),
    no_configure_permission: ("403 ACCESS_REFUSED", "list_permissions"),
    no_write_permission: ("403 ACCESS_REFUSED", "list_permissions"),
    no_read_permission: ("403 ACCESS_REFUSED", "list_permissions"),
}


def check_told(text: str, told: Tuple[str, ...]) -> None:
    assert all(part in text for part in told), text
    assert "secret" not in text and "password@" not in text, text
    assert "Traceback" not in text, text


@pytest.mark.parametrize("door", [door for door in DOORS if door is not no_read_permission])
def test_call_says_at_once_what_is_wrong(
    new_fleet: Callable[..., Fleet], door: Callable[[Fleet], str]
) -> None:
    fleet = new_fleet()
    app = fleet.new_client(door(fleet))
    began_mono = time.monotonic()
    with pytest.raises(ImproperlyConfigured) as raised:
        app.send_task("proj.note", (1,))
    check_told(str(raised.value), DOORS[door])
    assert time.monotonic() - began_mono < TIMEOUT_S + SLACK_S


def test_worker_that_is_not_let_in_says_why_and_ends(new_fleet: Callable[..., Fleet]) -> None:
    fleet = new_fleet()
    fleet.client.send_task("proj.note", (1,))
    workers = []
    for door in DOORS:
        if door not in (no_vhost_permission, wrong_password, wrong_vhost):
            fleet = new_fleet()
        env = {"BROKER": door(fleet)}
        workers.append((door, fleet.start_worker(env=env, wait=False)))
    for door, worker in workers:
        assert worker.wait() not in (0, -9), worker.log
        check_told(worker.log, DOORS[door])


# -- servers that say nothing


def silent_after_the_handshake(connection: socket.socket) -> None:
    """Let a client in, and say nothing more."""

    def tell(name: str, **args: Any) -> None:
        connection.sendall(encode_frame(FRAME_METHOD, 0, encode_method(name, args)))

    connection.recv(8)
    tell(
        "connection.start", version_major=0, version_minor=9, server_properties={}, mechanisms="PLAIN",
        locales="en_US",
    )  # fmt: skip
    connection.recv(65536)
    tell("connection.tune", channel_max=100, frame_max=131072, heartbeat=60)
    connection.recv(65536)
    tell("connection.open-ok")
    hold(connection)


@pytest.mark.parametrize("talk", [hold, silent_after_the_handshake])
def test_silent_server_costs_a_call_its_deadline_and_a_worker_waits(
    new_fleet: Callable[..., Fleet], talk: Callable[[socket.socket], None]
) -> None:
    fleet = new_fleet()
    with listening(talk) as address:
        url = f"amqp://guest:secret@{HOST}:{address[1]}/"
        app = fleet.new_client(url)
        began_mono = time.monotonic()
        with pytest.raises(OperationalError, match=rf"{HOST}:{address[1]}.*") as raised:
            app.send_task("proj.note", (1,), timeout=TIMEOUT_S)
        assert TIMEOUT_S * 0.9 < time.monotonic() - began_mono < TIMEOUT_S + SLACK_S
        assert "secret" not in str(raised.value)
        app.close()
        options = {"connect_timeout": 0.5, "socket_timeout": 0.5}
        worker = fleet.start_worker(env={"BROKER": url}, wait=False, broker_transport_options=options)
        log = worker.wait_for("Cannot connect to the broker")
        assert "Trying again in 0.50 seconds... (1/100)" in worker.wait_for("Trying again"), log
        assert worker.stop() == 0, worker.log


def test_worker_started_before_its_server_works_when_that_is_there(new_fleet: Callable[..., Fleet]) -> None:
    fleet = new_fleet()
    fleet.proxy.refuse()
    worker = fleet.start_worker(wait=False)
    assert "refused" in worker.wait_for("Trying again in 0.50 seconds... (1/100)")
    fleet.proxy.forward()
    worker.wait_ready()
    fleet.wait_consuming()
    fleet.check_no_leftovers()


# -- callers of a server that fails


def refuse(fleet: Fleet) -> Callable[[], None]:
    fleet.proxy.refuse()
    fleet.proxy.reset()
    return fleet.proxy.forward


def black_hole(fleet: Fleet) -> Callable[[], None]:
    fleet.proxy.black_hole()
    return fleet.proxy.forward


def freeze(fleet: Fleet) -> Callable[[], None]:
    fleet.server.pause()
    return fleet.server.resume


def freeze_and_reset(fleet: Fleet) -> Callable[[], None]:
    fleet.server.pause()
    fleet.proxy.reset()
    return fleet.server.resume


def memory_alarm(fleet: Fleet) -> Callable[[], None]:
    fleet.server.raise_memory_alarm()
    return fleet.server.clear_memory_alarm


#: Fault -> what the error of a call says.
FAULTS: Dict[Callable[[Fleet], Callable[[], None]], str] = {
    refuse: "refused",
    black_hole: "the time for it was over",
    freeze: "the time for it was over",
    freeze_and_reset: "the time for it was over",
    memory_alarm: "blocked by the server.*memory",
}


@pytest.mark.parametrize("timeout_s", [0.5, pytest.param(None, marks=when_full)])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_call_keeps_its_deadline_and_the_next_one_works(
    new_fleet: Callable[..., Fleet], fault: Callable[[Fleet], Callable[[], None]], timeout_s: Any
) -> None:
    fleet = new_fleet()
    app = fleet.new_client(fleet.worker_urls()[0])
    options = {} if timeout_s is None else {"timeout": timeout_s}
    app.send_task("proj.note", (1,))
    mend = fault(fleet)
    began_mono = time.monotonic()
    with pytest.raises(OperationalError, match=FAULTS[fault]):
        app.send_task("proj.note", (2,), **options)
    limit_s = app.conf.task_publish_timeout if timeout_s is None else timeout_s
    assert time.monotonic() - began_mono < limit_s + SLACK_S
    mend()
    app.send_task("proj.note", (3,))


def test_memory_alarm_stops_callers_and_costs_no_outcome(new_fleet: Callable[..., Fleet]) -> None:
    fleet = new_fleet()
    server = fleet.server
    worker = fleet.start_worker(task_publish_timeout=0.5)
    for number in rounds():
        fleet.check_no_growth()
        link = fleet.client.signature("proj.note", (fleet.next_number(),), immutable=True)
        linked = fleet.send("hold", f"{number}-linked", f"go{number}", link=link)
        plain = fleet.send("hold", f"{number}-plain", f"go{number}")
        fleet.wait_for_lines("began", 2 * number + 2)
        waiting = [fleet.next_number() for _ in range(20)]
        for one in waiting:
            fleet.send("note", one)
        with Sender(fleet, retry=False, timeout=0.3) as sender:
            sender.wait_for_more(20)
            server.raise_memory_alarm()
            with pytest.raises(OperationalError, match="blocked by the server.*memory"):
                # It may arrive all the same, when the server takes messages again.
                fleet.send("note", fleet.next_number(), timeout=TIMEOUT_S)
            wait_until(lambda: sender.refused, 10.0, "another call is refused")
            # What needs no publishing goes on; a follow-up is kept, with the outcome that it belongs to.
            fleet.release(f"go{number}")
            fleet.wait_for_lines("ended", 2 * number + 2)
            server.clear_memory_alarm()
            fleet.wait_consuming()
            sender.wait_for_more(10)
        assert any("blocked by the server" in text for text in sender.refused), sender.refused
        fleet.check_nothing_lost({*sender.accepted, *waiting, *link.args})
        assert [one.get(timeout=10) for one in (linked, plain)] == [f"{number}-linked", f"{number}-plain"]
    fleet.check_no_growth()
    fleet.check_no_leftovers()
    assert not fleet.doubles() and not fleet.doubles("began"), fleet
    assert worker.exitcode == 0

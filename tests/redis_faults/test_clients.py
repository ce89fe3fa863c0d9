# SPDX-License-Identifier: MIT
"""Programs that call tasks while connections fail: in time, with every result, across forks."""

from __future__ import annotations

import random
import sys
import threading
import time
from typing import Any, Callable, Dict, List

import pytest
from faults import FULL, rounds, when_full
from redis_fleet import Fleet
from servers import ErrorReply
from waiting import wait_until
from workers import environment

from miniq.exceptions import OperationalError


def kill_some(fleet: Fleet, rand: random.Random) -> None:
    """Close some connections from the server's side: mostly one, sometimes most of them."""
    ids = [one["id"] for one in fleet.server.clients()]
    for one in rand.sample(ids, min(len(ids), rand.choice([1, 1, 2, 20]))):
        try:
            fleet.server.command("CLIENT", "KILL", "ID", one)
        except ErrorReply as error:
            assert "No such client" in str(error)


def test_every_call_of_many_threads_has_its_result_while_connections_are_killed(
    new_fleet: Callable[..., Fleet], tell: Callable[[str], None]
) -> None:
    threads_count, calls = (64, 200) if FULL else (64, 10)
    seed = random.randrange(10**6)
    rand = random.Random(seed)
    fleet = new_fleet()
    fleet.start_worker()
    fleet.check_no_growth()
    failed: List[BaseException] = []
    refused: List[OperationalError] = []

    def call() -> None:
        try:
            for _ in range(calls):
                number = fleet.next_number()
                try:
                    result = fleet.send("note", number)
                except OperationalError as error:
                    refused.append(error)
                else:
                    assert result.get(timeout=60) == number
        except BaseException as error:
            failed.append(error)
        finally:
            fleet.client.producer.close()

    threads = [threading.Thread(target=call) for _ in range(threads_count)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(rand.uniform(0.0, 0.1))
        kill_some(fleet, rand)
    for thread in threads:
        thread.join()
    assert not failed, f"seed {seed}: {failed[:5]}"
    tell(f"{threads_count * calls} calls while connections are killed: {len(refused)} refused")
    fleet.check_no_growth()
    fleet.check_no_leftovers()


def test_those_who_wait_get_their_results_though_everything_is_killed(
    new_fleet: Callable[..., Fleet],
) -> None:
    fleet = new_fleet()
    fleet.start_worker()
    found: Dict[str, Any] = {}

    def wait(name: str, result: Any) -> None:
        try:
            found[name] = result.get(timeout=20)
        except BaseException as error:
            found[name] = error

    for number in rounds():
        fleet.check_no_growth()
        names = [f"{number}-{index}" for index in range(2)]
        results = [fleet.send("hold", name, f"go{number}") for name in names]
        threads = [threading.Thread(target=wait, args=pair) for pair in zip(names, results)]
        for thread in threads:
            thread.start()
        fleet.wait_for_lines("began", 2 * number + 2)
        for _ in range(4):
            time.sleep(0.1)
            fleet.server.kill_clients()
        fleet.release(f"go{number}")
        for thread in threads:
            thread.join()
        assert [found[name] for name in names] == names
    assert sorted(fleet.lines("ended")) == sorted(found), "each ran once"
    fleet.check_no_growth()
    fleet.check_no_leftovers()


# -- deadlines


def refuse(fleet: Fleet) -> Callable[[], None]:
    fleet.proxy.refuse()
    fleet.proxy.reset()
    return fleet.proxy.forward


def accept_and_be_silent(fleet: Fleet) -> Callable[[], None]:
    fleet.server.pause()
    fleet.proxy.reset()
    return fleet.server.resume


def be_silent_after_the_handshake(fleet: Fleet) -> Callable[[], None]:
    fleet.proxy.black_hole()
    return fleet.proxy.forward


def freeze(fleet: Fleet) -> Callable[[], None]:
    fleet.server.pause()
    return fleet.server.resume


@pytest.mark.parametrize("timeout_s", [0.5, pytest.param(None, marks=when_full)])
@pytest.mark.parametrize("fault", [refuse, accept_and_be_silent, be_silent_after_the_handshake, freeze])
def test_call_keeps_its_deadline_and_the_next_one_works(
    new_fleet: Callable[..., Fleet], fault: Callable[[Fleet], Callable[[], None]], timeout_s: Any
) -> None:
    fleet = new_fleet()
    app = fleet.new_client(fleet.proxy.url(fleet.server.url()))
    options = {} if timeout_s is None else {"timeout": timeout_s}
    app.send_task("proj.note", (1,))
    mend = fault(fleet)
    began_mono = time.monotonic()
    with pytest.raises(OperationalError):
        app.send_task("proj.note", (2,), **options)
    limit_s = app.conf.task_publish_timeout if timeout_s is None else timeout_s
    assert time.monotonic() - began_mono < limit_s + 1.0
    mend()
    app.send_task("proj.note", (3,))


def test_call_keeps_its_deadline_when_the_server_freezes_within_a_large_message(
    new_fleet: Callable[..., Fleet],
) -> None:
    fleet = new_fleet()
    app = fleet.new_client(fleet.proxy.url(fleet.server.url()))
    app.send_task("proj.note", (1,))
    body = "x" * 20_000_000
    fleet.server.pause()
    began_mono = time.monotonic()
    with pytest.raises(OperationalError):
        app.send_task("proj.note", (body,), timeout=1.0)
    assert time.monotonic() - began_mono < 2.0
    fleet.server.resume()
    app.send_task("proj.note", (3,))
    assert fleet.server.command("LLEN", "celery") == 2, "the message that was cut off is not there"


# -- forks

FORKING = """
import os
from miniq import MiniQ

app = MiniQ("client", broker=os.environ["URL"], backend=os.environ["URL"])

def call(start):
    for number in range(start, start + 30):
        assert app.send_task("proj.note", (number,)).get(timeout=20) == number
    # Say which connections this process has.
    with open("/proc/self/net/tcp") as tcp_table:
        tcp = {f"socket:[{line.split()[9]}]" for line in tcp_table}
    found = set()
    for name in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{name}") or os.path.islink(f"/proc/self/fd/{name}"):
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    print(start, *sorted(found & tcp), flush=True)

call(1000)
child = os.fork()
call(2000 if child else 3000)
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
call(4000)
"""


def test_app_goes_on_in_parent_and_child_after_a_fork(new_fleet: Callable[..., Fleet], program: Any) -> None:
    fleet = new_fleet()
    fleet.start_worker()
    of_worker = fleet.proxy.accepted
    (fleet.folder / "forking.py").write_text(FORKING)
    env = environment(fleet.folder, URL=fleet.proxy.url(fleet.server.url()))
    client = program([sys.executable, "forking.py"], fleet.folder, env)
    assert client.wait(60) == 0, client.log
    sockets = {int(line.split()[0]): set(line.split()[1:]) for line in client.log.splitlines()}
    assert sorted(sockets) == [1000, 2000, 3000, 4000], client.log
    assert sockets[1000] and sockets[3000]
    assert sockets[1000] == sockets[2000] == sockets[4000], "the parent kept what it had"
    assert not sockets[2000] & sockets[3000], "the child has none of the parent's"
    wait_until(lambda: len(fleet.proxy.connections) <= of_worker, 5.0, "all connections of the client ended")
    fleet.check_no_leftovers()

# SPDX-License-Identifier: MIT
"""The loop: order, fairness, errors, wake-ups, forks, and that it does nothing when there is nothing."""

from __future__ import annotations

import functools
import os
import random
import signal
import socket
import threading
import time
from typing import Any, Callable, Iterator, List, Tuple

import pytest
from waiting import wait_until

from miniq.loop import SPIN_WAKEUPS, Loop, Timer, callback_name

Pair = Tuple[socket.socket, socket.socket]


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.mono = 100.0

    def __call__(self) -> float:
        return self.mono


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def manual(clock: Clock) -> Iterator[Loop]:
    """A loop under a virtual clock."""
    loop = Loop(clock=clock, wall=lambda: 1e9 + clock.mono)
    yield loop
    loop.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
    yield ends
    for end in ends:
        end.close()


# -- timers and calls, under a virtual clock ------------------------------------------------------


def test_timers_run_when_due_in_order_of_due_then_of_making(manual: Loop, clock: Clock) -> None:
    seen: List[str] = []
    manual.call_later(2.0, seen.append, "late")
    manual.call_at(101.0, seen.append, "early")
    manual.call_later(1.0, seen.append, "early, made second")
    assert (manual.mono(), manual.now()) == (100.0, 1e9 + 100.0)
    assert manual.next_due() == 101.0
    manual.run_once(0)
    assert seen == []
    clock.mono = 101.0
    manual.run_once(0)
    assert seen == ["early", "early, made second"]
    assert manual.next_due() == 102.0
    clock.mono = 500.0
    manual.run_once(0)
    assert seen[2:] == ["late"]
    assert manual.next_due() is None


def test_call_soon_runs_in_the_next_turn_not_in_this_one(manual: Loop) -> None:
    seen: List[int] = []

    def again() -> None:
        seen.append(1)
        manual.call_soon(again)

    manual.call_soon(again)
    assert manual.next_due() == 0.0
    for turn in range(1, 5):
        manual.run_once(0)
        assert len(seen) == turn
    manual.call_at(0.0, seen.append, 2)
    manual.run_once(0)
    assert seen[-1] == 2 or seen[-2] == 2  # a timer is not starved by calls


def test_timer_that_rearms_itself_at_once_leaves_the_turn(manual: Loop) -> None:
    seen: List[int] = []

    def again() -> None:
        seen.append(1)
        manual.call_later(0.0, again)

    again()
    manual.run_once(0)
    manual.run_once(0)
    assert len(seen) == 3


def test_cancelled_timer_does_not_run_and_cancelling_again_or_late_is_harmless(
    manual: Loop, clock: Clock
) -> None:
    seen: List[str] = []
    cancelled = manual.call_later(1.0, seen.append, "cancelled")
    ran = manual.call_later(1.0, seen.append, "ran")
    cancelled.cancel()
    cancelled.cancel()
    assert manual.next_due() == 101.0
    clock.mono = 101.0
    manual.run_once(0)
    ran.cancel()
    assert seen == ["ran"]
    assert manual.next_due() is None


def test_timer_cancelled_by_another_of_the_same_turn_does_not_run(manual: Loop, clock: Clock) -> None:
    seen: List[str] = []
    timers: List[Timer] = []
    manual.call_later(1.0, lambda: timers[0].cancel())
    timers.append(manual.call_later(1.0, seen.append, "cancelled"))
    clock.mono = 102.0
    manual.run_once(0)
    assert seen == []


def test_random_timers_behave_like_a_sorted_list(manual: Loop, clock: Clock) -> None:
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    expected: List[Tuple[float, int]] = []
    timers: "dict[int, Timer]" = {}
    ran: List[int] = []
    for n in range(3000):
        step = chance.random()
        if step < 0.5:
            due = clock.mono + chance.choice((0.0, 1.0, chance.random() * 50))
            timers[n] = manual.call_at(due, ran.append, n)
            expected.append((due, n))
        elif step < 0.9 and timers:
            number = chance.choice(list(timers))
            timers.pop(number).cancel()
            expected = [entry for entry in expected if entry[1] != number]
        else:
            clock.mono += chance.random() * 3
            manual.run_once(0)
            due_now = sorted(entry for entry in expected if entry[0] <= clock.mono)
            expected = [entry for entry in expected if entry[0] > clock.mono]
            assert ran == [number for _, number in due_now], f"seed {seed}"
            for number in ran:
                timers.pop(number)
            ran.clear()
            assert manual.next_due() == (min(expected)[0] if expected else None), f"seed {seed}"


def test_dead_timers_do_not_pile_up(manual: Loop) -> None:
    living = manual.call_later(1000.0, print)
    for _ in range(10_000):
        manual.call_later(500.0, print).cancel()
    assert len(manual._heap) < 200
    assert manual.next_due() == 1100.0
    living.cancel()


def test_loop_with_timers_only_owns_no_descriptor(clock: Clock) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    before = len(os.listdir("/proc/self/fd"))
    loop = Loop(clock=clock)
    loop.call_later(1.0, print)
    loop.call_threadsafe(lambda: None)
    loop.run_once(0)
    assert len(os.listdir("/proc/self/fd")) == before


# -- descriptors ----------------------------------------------------------------------------------


def test_reader_and_writer_are_called_until_removed(loop: Loop, pair: Pair) -> None:
    seen: List[str] = []
    ours, theirs = pair
    loop.add_reader(ours.fileno(), lambda: seen.append("read " + ours.recv(10).decode()))
    loop.run_once(0)
    assert seen == []
    theirs.send(b"a")
    loop.run_once(0)
    loop.add_writer(ours.fileno(), lambda: seen.append("write"))
    theirs.send(b"b")
    loop.run_once(0)
    loop.remove_reader(ours.fileno())
    theirs.send(b"c")
    loop.run_once(0)
    loop.remove_writer(ours.fileno())
    loop.remove_writer(ours.fileno())
    loop.remove_reader(ours.fileno())
    loop.run_once(0)
    assert seen == ["read a", "read b", "write", "write"]


def test_descriptor_number_used_again_is_watched_anew(loop: Loop) -> None:
    seen: List[int] = []
    for n in range(3):
        ours, theirs = socket.socketpair()
        loop.add_reader(ours.fileno(), lambda n=n: seen.append(n))  # type: ignore[misc]
        theirs.send(b"x")
        loop.run_once(0)
        loop.remove_reader(ours.fileno())
        ours.close()
        theirs.close()
    assert seen == [0, 1, 2]


def test_reader_removed_by_another_in_the_same_turn_is_not_called(loop: Loop) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    seen: List[int] = []

    def read(n: int) -> None:
        seen.append(n)
        loop.remove_reader(pairs[1 - n][0].fileno())

    for n in range(2):
        loop.add_reader(pairs[n][0].fileno(), lambda n=n: read(n))  # type: ignore[misc]
        pairs[n][1].send(b"x")
    loop.run_once(0)
    assert len(seen) == 1
    for ends in pairs:
        loop.remove_reader(ends[0].fileno())
        ends[0].close()
        ends[1].close()


def test_busy_descriptor_does_not_starve_timers_nor_they_it(loop: Loop, pair: Pair) -> None:
    counts = {"read": 0, "timer": 0, "soon": 0}
    pair[1].send(b"x")

    def count_reads() -> None:
        counts["read"] += 1

    def rearm() -> None:
        counts["timer"] += 1
        loop.call_later(0.0, rearm)

    def again() -> None:
        counts["soon"] += 1
        loop.call_soon(again)

    loop.add_reader(pair[0].fileno(), count_reads)
    rearm()
    again()
    for _ in range(100):
        loop.run_once(0)
    assert min(counts.values()) >= 100


def test_waiting_ends_when_a_descriptor_is_readable(loop: Loop, pair: Pair) -> None:
    seen: List[bytes] = []
    loop.add_reader(pair[0].fileno(), lambda: seen.append(pair[0].recv(10)))
    thread = threading.Thread(target=pair[1].send, args=(b"x",))
    thread.start()
    wait_until(lambda: loop.run_once(10.0) or seen)
    thread.join()
    assert seen == [b"x"]


# -- other threads and signals --------------------------------------------------------------------


def test_calls_of_many_threads_all_arrive_each_in_its_order(loop: Loop) -> None:
    seen: List[Tuple[int, int]] = []

    def call(thread: int) -> None:
        for n in range(500):
            loop.call_threadsafe(seen.append, (thread, n))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: loop.run_once(5.0) or len(seen) == 2000)
    for thread in threads:
        thread.join()
    for number in range(4):
        assert [n for thread, n in seen if thread == number] == list(range(500))


def test_blocked_loop_is_woken_by_a_call_and_by_stop() -> None:
    loop = Loop()
    began = threading.Event()
    ended: List[bool] = []

    def run() -> None:
        loop.call_soon(began.set)
        loop.run_forever()
        ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    began.wait(10)
    for _ in range(200):
        done = threading.Event()
        loop.call_threadsafe(done.set)
        assert done.wait(10)
    loop.stop()
    thread.join(10)
    assert ended == [True]
    loop.close()


def test_stop_before_running_leaves_at_once(loop: Loop) -> None:
    loop.stop()
    loop.run_forever()
    assert loop.turns == 0


def test_signal_handler_can_call_into_the_waiting_loop(loop: Loop) -> None:
    if not hasattr(signal, "setitimer"):
        pytest.skip("needs setitimer")
    previous = signal.signal(signal.SIGALRM, lambda *args: loop.call_threadsafe(loop.stop))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        loop.run_forever()
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_call_into_a_closed_loop_is_dropped() -> None:
    loop = Loop()
    loop.run_once(0.001)
    loop.close()
    loop.call_threadsafe(print)
    with pytest.raises(RuntimeError, match="closed"):
        loop.run_once(0)
    loop.close()


def test_loop_closed_by_a_callback_calls_nothing_more(clock: Clock) -> None:
    loop = Loop(clock=clock)
    seen: List[int] = []
    loop.call_soon(loop.close)
    loop.call_soon(seen.append, 1)
    loop.run_once(0)
    assert seen == []


# -- safety nets ----------------------------------------------------------------------------------


def test_failing_callback_is_logged_by_name_and_the_rest_runs(
    loop: Loop, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    seen: List[str] = []

    def fail_in_reader() -> None:
        pair[0].recv(10)
        raise LookupError("reader")

    def fail_in_timer() -> None:
        raise LookupError("timer")

    loop.add_reader(pair[0].fileno(), fail_in_reader)
    pair[1].send(b"x")
    loop.call_later(0.0, fail_in_timer)
    loop.call_soon(seen.append, "ran")
    loop.run_once(0)
    assert seen == ["ran"]
    assert "fail_in_reader failed" in caplog.text and "fail_in_timer failed" in caplog.text


def test_exit_leaves_the_loop_and_loses_nothing(loop: Loop) -> None:
    def leave() -> None:
        raise SystemExit(3)

    seen: List[int] = []
    loop.call_soon(leave)
    loop.call_soon(seen.append, 1)
    with pytest.raises(SystemExit):
        loop.run_forever()
    loop.run_once(0)
    assert seen == [1]


def test_slow_callback_is_logged_by_name(
    manual: Loop, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def dawdle() -> None:
        clock.mono += 0.25

    manual.call_soon(dawdle)
    manual.run_once(0)
    assert "dawdle took 0.250 s" in caplog.text
    caplog.clear()
    manual.call_soon(lambda: None)
    manual.run_once(0)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (lambda: None, "it is served in bursts"),
        (lambda: time.sleep(0.00003), "although its peer is gone; it is served in bursts"),
    ],
)
def test_hung_up_descriptor_that_nobody_removes_does_not_spin(
    loop: Loop, pair: Pair, caplog: pytest.LogCaptureFixture, callback: Callable[[], None], words: str
) -> None:
    def look() -> None:
        if words in caplog.text or loop.mono() - began > 10.0:
            loop.stop()
        else:
            loop.call_later(0.01, look)

    began = loop.mono()
    loop.add_reader(pair[0].fileno(), callback)
    pair[1].close()
    look()
    loop.run_forever()
    # From here on it is served in bursts: nearly all of the time the loop waits.
    turns = loop.turns
    loop.call_later(0.3, loop.stop)
    loop.run_forever()
    assert loop.turns - turns < 3 * SPIN_WAKEUPS
    assert caplog.text.count(words) == 1
    loop.remove_reader(pair[0].fileno())
    loop.run_once(0)
    assert loop.next_due() is None  # the end of its pause went with it


def test_traffic_is_not_taken_for_spinning(loop: Loop, pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    received = [0]

    def read() -> None:
        received[0] += len(pair[0].recv(1))

    loop.add_reader(pair[0].fileno(), read)
    total = 3 * SPIN_WAKEUPS
    sent = 0
    while received[0] < total:
        if sent - received[0] < 10 and sent < total:
            sent += pair[1].send(b"x" * min(20, total - sent))
        time.sleep(0.00001)  # as if each message also had to be worked on
        loop.run_once(0)
    assert caplog.text == ""
    loop.remove_reader(pair[0].fileno())


def test_idle_loop_does_not_turn(loop: Loop, pair: Pair) -> None:
    loop.add_reader(pair[0].fileno(), lambda: None)
    loop.call_later(0.3, loop.stop)
    loop.run_forever()
    assert loop.turns <= 4


def test_far_and_endless_dues_do_not_overflow(loop: Loop) -> None:
    loop.call_at(float("inf"), print)
    loop.call_later(1e12, print)
    loop.run_once(0.001)


# -- forks ----------------------------------------------------------------------------------------


def test_child_of_a_fork_does_not_disturb_the_parents_loop(loop: Loop, pair: Pair) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    seen: List[bytes] = []
    loop.add_reader(pair[0].fileno(), lambda: seen.append(pair[0].recv(10)))
    loop.run_once(0)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            loop.remove_reader(pair[0].fileno())
            loop.call_threadsafe(print)
            try:
                loop.run_once(0)
            except RuntimeError:
                code = 0
            loop.close()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    pair[1].send(b"x")
    wait_until(lambda: loop.run_once(0.1) or seen)
    assert seen == [b"x"]


def test_names_of_callbacks_are_readable() -> None:
    assert callback_name(functools.partial(Loop.close, Any)) == "miniq.loop.Loop.close"
    assert "Loop.close" in callback_name(Loop().close)
    assert callback_name(Clock()).startswith("<")

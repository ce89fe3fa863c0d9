# SPDX-License-Identifier: MIT
"""What a result store must do that counts the members of chords, besides what all must."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Iterator, List, Optional, Sequence

import pytest
from backend_suite import BackendSuite
from transport_suite import Clock
from workers import environment

from miniq.backends.base import (
    CLAIM_S,
    DONE_S,
    MOST_LEFT_OVER,
    SENDING_S,
    Arrival,
    Backend,
    ChordPart,
    ClaimLost,
)
from miniq.message import Message
from miniq.routing import Queue
from miniq.transports.base import Publication, Transport, transport_class

BODY = b'{"task": "body", "args": [], "kwargs": {}}'
NO_CHORD = Arrival(0, None, None, False)
OVER = Arrival(0, None, None, True)
#: Longer than any store takes to find what nobody ends.
LONG_S = 60.0
#: A process that lets the members of a chord arrive, in its own order, and tells its claims.
ARRIVING = """
    import random, sys
    from miniq.backends.base import ChordPart, backend_class

    url, size, now, seed = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    backend = backend_class(url)(url, {}, lambda: now)
    parts = [ChordPart("g", n, f"t{n}", b"[%d]" % n, 60.0) for n in range(size)]
    random.Random(seed).shuffle(parts)
    print("ready", flush=True)
    sys.stdin.readline()
    for part in parts:
        arrival = backend.arrive_at_chord(part)
        if arrival.claim:
            print(arrival.claim, flush=True)
    backend.close()
"""


def part(
    index: Optional[int],
    state: str = "SUCCESS",
    value: Any = None,
    expires_s: Optional[float] = 1000.0,
    task_id: str = "",
    group_id: str = "g",
) -> ChordPart:
    """Return what the member at `index` came to."""
    task_id = task_id or f"t{index}"
    return ChordPart(group_id, index, task_id, entry(task_id, state, value), expires_s)


def entry(task_id: str, state: str = "SUCCESS", value: Any = None) -> bytes:
    return json.dumps([1, task_id, state, value]).encode()


class ChordSuite(BackendSuite):
    """The suite of all stores and that of chords."""

    #: Whether arriving is part of an open transaction, or a step of its own.
    arrives_in_transactions = True
    #: Whether other processes can use the store.
    for_many_processes = True
    #: Whether members may come before the chord is started: a store that needs no more than their names.
    begins_with_members = True
    #: Whether who brings several members at once is told for each how many there were by then.
    counts_each = True

    def numbers(self, arrivals: Sequence[Arrival]) -> List[int]:
        """Return how many members there were, as far as that is told."""
        return [arrival.count for arrival in (arrivals if self.counts_each else arrivals[-1:])]

    def told(self, count: int) -> List[int]:
        """Return the same for so many that come one after the other."""
        return list(range(1, count + 1)) if self.counts_each else [count]

    def take_claim_away(self, backend: Backend, clock: Clock) -> None:
        backend.start_chord("g", 1, BODY, 1000.0)

    def complete(self, backend: Backend, size: int = 2, group_id: str = "g", anew: bool = True) -> str:
        """Let a chord become complete; return the claim."""
        backend.start_chord(group_id, size, BODY, 1000.0, anew)
        arrivals = backend.arrive_at_chords([part(n, group_id=group_id) for n in range(size)])
        claim = arrivals[-1].claim
        assert claim is not None
        return claim

    @pytest.fixture
    def transport(self, url: str, clock: Clock) -> Iterator[Transport]:
        transport = transport_class(url)(url, {}, clock)
        transport.declare(Queue("work"))
        yield transport
        transport.close()

    # -- counting

    @pytest.mark.parametrize("seed", range(5))
    def test_members_count_once_in_any_order_however_often_they_come(
        self, backend: Backend, seed: int
    ) -> None:
        chance = random.Random(seed)
        size = chance.randint(1, 12)
        coming = [chance.randrange(size) for _ in range(2 * size)] + list(range(size))
        chance.shuffle(coming)
        backend.start_chord("g", size, BODY, 1000.0)
        seen: "set[int]" = set()
        claims: List[str] = []
        for n in coming:
            # Only the first end of a member counts, whatever a second start of it comes to.
            ends = part(n, value="late" if n in seen else "first")
            is_last = n not in seen and len(seen) == size - 1
            seen.add(n)
            arrival = backend.arrive_at_chord(ends)
            assert arrival == (len(seen), size, arrival.claim, False), f"seed {seed}"
            assert (arrival.claim is not None) is is_last, f"seed {seed}"
            claims += [arrival.claim] if arrival.claim else []
        assert len(claims) == 1, f"seed {seed}"
        assert backend.chord_entries("g") == [entry(f"t{n}", value="first") for n in range(size)]

    def test_every_end_counts(self, backend: Backend) -> None:
        backend.start_chord("g", 3, BODY, None)
        states = ["FAILURE", "REVOKED", "SUCCESS"]
        arrivals = [backend.arrive_at_chord(part(n, state)) for n, state in enumerate(states)]
        assert [arrival.count for arrival in arrivals] == [1, 2, 3]
        assert [json.loads(one)[2] for one in backend.chord_entries("g")] == states

    def test_members_without_an_index_come_last_and_equal_ids_count_by_index(
        self, backend: Backend
    ) -> None:
        backend.start_chord("g", 5, BODY, None)
        parts = [part(None, task_id=name) for name in "ba"]
        parts += [part(n, value=n, task_id="t") for n in (7, 2, 4)]
        arrivals = backend.arrive_at_chords(parts)
        assert self.numbers(arrivals) == self.told(5)
        assert [json.loads(one)[1::2] for one in backend.chord_entries("g")] == [
            ["t", 2], ["t", 4], ["t", 7], ["a", None], ["b", None],
        ]  # fmt: skip

    def test_members_may_come_before_the_chord_is_started(self, backend: Backend) -> None:
        if not self.begins_with_members:
            assert backend.arrive_at_chord(part(1)) == OVER
            return
        assert backend.arrive_at_chord(part(1)) == (1, None, None, False)
        backend.start_chord("g", 2, BODY, 1000.0)
        arrival = backend.arrive_at_chord(part(0))
        assert arrival == (2, 2, arrival.claim, False) and arrival.claim

    def test_chord_nobody_knows_has_nothing(self, backend: Backend, clock: Clock) -> None:
        assert backend.chord_entries("g") == []
        assert backend.claim_chord("g") == (NO_CHORD if self.begins_with_members else OVER)
        assert not backend.extend_chord("g", "claim") and not backend.finish_chord("g", "claim")
        assert backend.chords_left_over(clock()) == []
        assert backend.arrive_at_chords([]) == []

    def test_chords_are_counted_apart(self, backend: Backend) -> None:
        for name in "ab":
            backend.start_chord(name, 2, BODY, 1000.0)
        arrivals = backend.arrive_at_chords([part(n, group_id=name) for n in range(2) for name in "ab"])
        assert [arrival.claim is None for arrival in arrivals] == [True, True, False, False]
        assert [self.numbers(arrivals[n::2]) for n in (0, 1)] == [self.told(2)] * 2
        assert len({arrival.claim for arrival in arrivals}) == 3

    def test_entries_may_be_large_and_hold_anything(self, backend: Backend) -> None:
        backend.start_chord("g", 2, BODY, 1000.0)
        entries = [entry("t0", value="ü\0" * 300_000), entry("t1", value={"a": [None]})]
        for n in (1, 0):
            backend.arrive_at_chord(ChordPart("g", n, f"t{n}", entries[n], 1000.0))
        assert backend.chord_entries("g") == entries

    def test_thousand_members_are_counted(self, backend: Backend) -> None:
        order = list(range(1000))
        random.Random(1).shuffle(order)
        backend.start_chord("g", 1000, BODY, 1000.0)
        arrivals: List[Arrival] = []
        for start in range(0, 1000, 250):
            arrivals += backend.arrive_at_chords([part(n) for n in order[start : start + 250]])
        assert self.numbers(arrivals) == self.told(1000)
        assert [n for n, arrival in enumerate(arrivals) if arrival.claim] == [999]
        assert backend.chord_entries("g") == [entry(f"t{n}") for n in range(1000)]
        assert arrivals[-1].claim and backend.finish_chord("g", arrivals[-1].claim)
        assert backend.chord_entries("g") == []

    # -- many at once

    def test_one_of_many_threads_has_the_claim(self, open_backend: Callable[[], Backend]) -> None:
        open_backend().start_chord("g", 40, BODY, 1000.0)
        all_have_asked = threading.Barrier(8)
        entries: List[bytes] = []

        def run(seed: int) -> List[Optional[str]]:
            backend = open_backend()
            order = list(range(40))
            random.Random(seed).shuffle(order)
            claims = [backend.arrive_at_chord(part(n)).claim for n in order[:30]]
            claims += [arrival.claim for arrival in backend.arrive_at_chords([part(n) for n in order[30:]])]
            if any(claims):
                entries.extend(backend.chord_entries("g"))
            all_have_asked.wait(60)
            backend.close()
            return claims

        with ThreadPoolExecutor(8) as pool:
            claims = [claim for found in pool.map(run, range(8)) for claim in found if claim]
        assert len(claims) == 1
        assert entries == [entry(f"t{n}") for n in range(40)]

    def test_one_of_two_processes_has_the_claim(
        self, backend: Backend, url: str, clock: Clock
    ) -> None:
        if not self.for_many_processes:
            pytest.skip("this store is in one process alone")
        backend.start_chord("g", 100, BODY, 1000.0)
        command = [sys.executable, "-c", textwrap.dedent(ARRIVING), url, "100", str(clock())]
        both = [
            subprocess.Popen(
                [*command, seed], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
            )
            for seed in "12"
        ]
        try:
            for one in both:
                assert one.stdout and one.stdout.readline() == "ready\n"
            for one in both:
                assert one.stdin
                one.stdin.write("go\n")
                one.stdin.flush()
            claims = "".join(one.communicate(timeout=60)[0] for one in both).split()
        finally:
            for one in both:
                one.kill()
                one.communicate()
        assert [one.returncode for one in both] == [0, 0]
        assert len(claims) == 1
        assert backend.chord_entries("g") == [b"[%d]" % n for n in range(100)]
        assert backend.finish_chord("g", claims[0])

    # -- claims

    def test_claim_that_ran_out_goes_to_the_next_who_asks(self, backend: Backend, clock: Clock) -> None:
        first = self.complete(backend)
        assert backend.arrive_at_chord(part(0)).claim is None
        assert backend.claim_chord("g") == (2, 2, None, False)
        self.pass_time(clock, CLAIM_S + 1)
        second = backend.arrive_at_chord(part(1)).claim
        assert second and second != first
        assert not backend.extend_chord("g", first) and not backend.finish_chord("g", first)
        self.pass_time(clock, CLAIM_S + 1)
        third = backend.claim_chord("g").claim
        assert third and third not in (first, second)
        assert backend.finish_chord("g", third)
        assert not backend.finish_chord("g", third) and backend.claim_chord("g").claim is None

    def test_claim_is_given_again_to_who_asks_with_the_same_token(
        self, backend: Backend, clock: Clock
    ) -> None:
        backend.start_chord("g", 1, BODY, 1000.0)
        own = part(0)._replace(token="own")
        for _ in range(2):
            assert backend.arrive_at_chord(own) == (1, 1, "own", False)
            assert backend.claim_chord("g", "own").claim == "own"
            assert backend.claim_chord("g", "another's").claim is None
        self.pass_time(clock, CLAIM_S + 1)
        assert backend.claim_chord("g", "another's").claim == "another's"
        assert backend.arrive_at_chord(own).claim is None and not backend.finish_chord("g", "own")
        assert backend.finish_chord("g", "another's")

    def test_extended_claim_lasts_longer(self, backend: Backend, clock: Clock) -> None:
        claim = self.complete(backend)
        assert not backend.extend_chord("g", "another's")
        assert backend.extend_chord("g", claim)
        self.pass_time(clock, SENDING_S - 2)
        assert backend.claim_chord("g").claim is None
        assert backend.extend_chord("g", claim)
        self.pass_time(clock, SENDING_S + 1)
        assert not backend.extend_chord("g", claim)
        assert backend.claim_chord("g").claim

    def test_claim_is_not_to_be_had_before_all_are_there(self, backend: Backend) -> None:
        backend.start_chord("g", 2, BODY, 1000.0)
        backend.arrive_at_chord(part(0))
        assert backend.claim_chord("g") == (1, 2, None, False)

    # -- the end

    def test_finished_chord_is_done_and_takes_nothing(self, backend: Backend, clock: Clock) -> None:
        claim = self.complete(backend)
        assert not backend.finish_chord("g", "another's")
        assert backend.finish_chord("g", claim)
        assert backend.chord_entries("g") == []
        assert backend.arrive_at_chord(part(0)) == OVER
        assert not backend.add_to_chord("g")
        self.pass_time(clock, LONG_S)
        assert backend.chords_left_over(clock()) == []
        assert backend.arrive_at_chord(part(1)) == OVER
        self.pass_time(clock, DONE_S)
        # What comes later may count, but never to an end: nobody knows of how many.
        assert backend.arrive_at_chord(part(1)) == (
            (1, None, None, False) if self.begins_with_members else OVER
        )

    def test_done_chord_may_be_started_anew(self, backend: Backend) -> None:
        backend.finish_chord("g", self.complete(backend))
        backend.start_chord("g", 1, BODY, 1000.0)
        assert backend.arrive_at_chord(part(0)).claim

    def test_done_chord_stays_done_for_who_tries_a_second_time(self, backend: Backend, clock: Clock) -> None:
        backend.finish_chord("g", self.complete(backend, anew=False))
        backend.start_chord("g", 2, BODY, 1000.0, anew=False)
        assert backend.arrive_at_chords([part(0), part(1)]) == [OVER, OVER]
        self.pass_time(clock, LONG_S)
        assert backend.chords_left_over(clock()) == []

    def test_chord_in_progress_goes_on_when_it_is_started_a_second_time(self, backend: Backend) -> None:
        backend.start_chord("g", 2, BODY, 1000.0)
        backend.arrive_at_chord(part(0))
        for anew in (True, False):
            backend.start_chord("g", 2, BODY, 1000.0, anew=anew)
        assert backend.arrive_at_chord(part(1)).claim

    def test_abandoned_chord_has_no_claim_and_keeps_its_entries(self, backend: Backend, clock: Clock) -> None:
        backend.start_chord("g", 2, BODY, 1000.0)
        backend.arrive_at_chord(part(0, "FAILURE"))
        backend.abandon_chord("g")
        assert backend.arrive_at_chord(part(1)) == OVER
        assert backend.chord_entries("g") == [entry("t0", "FAILURE")]
        self.pass_time(clock, LONG_S)
        assert backend.chords_left_over(clock()) == []
        assert not backend.add_to_chord("g")

    def test_claimed_chord_may_be_abandoned(self, backend: Backend, clock: Clock) -> None:
        claim = self.complete(backend)
        backend.abandon_chord("g")
        assert not backend.extend_chord("g", claim) and not backend.finish_chord("g", claim)
        self.pass_time(clock, LONG_S)
        assert backend.chords_left_over(clock()) == [] and backend.claim_chord("g").claim is None

    # -- more members

    def test_added_members_are_waited_for(self, backend: Backend) -> None:
        backend.start_chord("g", 2, BODY, 1000.0)
        assert backend.add_to_chord("g")
        assert backend.add_to_chord("g", 2, "by t0", 1000.0)
        assert backend.add_to_chord("g", 2, "by t0", 1000.0)
        arrivals = backend.arrive_at_chords([part(n) for n in range(5)])
        assert self.numbers(arrivals) == self.told(5) and arrivals[-1].size == 5
        assert [arrival.claim is not None for arrival in arrivals] == [False] * 4 + [True]
        assert backend.chord_entries("g") == [entry(f"t{n}") for n in range(5)]

    def test_members_may_be_added_before_the_chord_is_started(self, backend: Backend) -> None:
        if not self.begins_with_members:
            assert not backend.add_to_chord("g", expires_s=1000.0)
            return
        assert backend.add_to_chord("g", expires_s=1000.0)
        backend.start_chord("g", 1, BODY, 1000.0)
        first, second = backend.arrive_at_chords([part(0), part(1)])
        assert first.claim is None and second.claim

    def test_members_that_are_not_to_come_may_be_taken_back(self, backend: Backend) -> None:
        backend.start_chord("g", 1, BODY, 1000.0)
        backend.add_to_chord("g", 2)
        backend.add_to_chord("g", -2)
        assert backend.arrive_at_chord(part(0)).claim

    # -- left over

    def test_complete_chord_is_left_over_when_its_claim_ran_out(self, backend: Backend, clock: Clock) -> None:
        backend.start_chord("open", 1, BODY, 1000.0)
        self.complete(backend)
        assert backend.chords_left_over(clock()) == []
        self.pass_time(clock, CLAIM_S + 1)
        assert backend.chords_left_over(clock()) == [("g", BODY)]
        assert backend.chords_left_over(clock()) == [("g", BODY)]
        claim = backend.claim_chord("g").claim
        assert claim and backend.chords_left_over(clock()) == []
        assert backend.extend_chord("g", claim)
        self.pass_time(clock, CLAIM_S + 1)
        assert backend.chords_left_over(clock()) == []
        self.pass_time(clock, SENDING_S)
        assert backend.chords_left_over(clock()) == [("g", BODY)]
        claim = backend.claim_chord("g").claim
        assert claim and backend.finish_chord("g", claim)
        self.pass_time(clock, LONG_S)
        assert backend.chords_left_over(clock()) == []

    def test_chord_whose_members_all_came_before_it_was_started_is_left_over(
        self, backend: Backend, clock: Clock
    ) -> None:
        if not self.begins_with_members:
            pytest.skip("here a chord is started before any of its members")
        backend.arrive_at_chords([part(0), part(1)])
        backend.start_chord("g", 2, BODY, 1000.0)
        self.pass_time(clock, LONG_S)
        assert backend.chords_left_over(clock()) == [("g", BODY)]

    def test_chord_that_waits_for_added_members_is_not_left_over(
        self, backend: Backend, clock: Clock
    ) -> None:
        self.complete(backend)
        backend.add_to_chord("g")
        self.pass_time(clock, LONG_S)
        assert backend.chords_left_over(clock()) == []

    def test_chords_left_over_are_told_in_portions(self, backend: Backend, clock: Clock) -> None:
        for n in range(MOST_LEFT_OVER + 5):
            self.complete(backend, 1, f"g{n}")
        self.pass_time(clock, CLAIM_S + 1)
        found = [group_id for group_id, _ in backend.chords_left_over(clock())]
        assert len(set(found)) == MOST_LEFT_OVER
        for group_id in found:
            backend.finish_chord(group_id, backend.claim_chord(group_id).claim or "")
        assert len(backend.chords_left_over(clock())) == 5

    # -- time

    def test_chord_past_its_time_is_forgotten(self, backend: Backend, clock: Clock) -> None:
        backend.start_chord("g", 3, BODY, 100.0)
        backend.arrive_at_chords([part(n, expires_s=100.0) for n in (0, 1)])
        self.pass_time(clock, 90)
        # Each arrival keeps it for as long again.
        assert backend.arrive_at_chord(part(1, expires_s=100.0)) == (2, 3, None, False)
        self.pass_time(clock, 90)
        assert backend.arrive_at_chord(part(1, expires_s=100.0)) == (2, 3, None, False)
        self.pass_time(clock, 101)
        assert backend.claim_chord("g") == NO_CHORD
        assert backend.arrive_at_chord(part(2, expires_s=100.0)) == (1, None, None, False)
        assert backend.chord_entries("g") == [entry("t2")]
        backend.start_chord("g", 1, BODY, 100.0)
        self.pass_time(clock, 101)
        assert backend.expire() == (1 if self.needs_expire else 0)
        assert backend.chord_entries("g") == []
        assert backend.chords_left_over(clock()) == []

    def test_chord_is_kept_for_ever_where_results_are(self, backend: Backend, clock: Clock) -> None:
        backend.start_chord("g", 2, BODY, None)
        backend.arrive_at_chord(part(0, expires_s=None))
        self.pass_time(clock, 1e6)
        assert backend.expire() == 0
        assert backend.arrive_at_chord(part(1, expires_s=None)).claim

    # -- transactions

    def test_end_of_a_chord_is_one_with_the_message_of_its_body(
        self, backend: Backend, transport: Transport, clock: Clock
    ) -> None:
        backend.start_chord("g", 1, BODY, 1000.0)
        with pytest.raises(ZeroDivisionError), transport.transaction():
            self.end_in_transaction(backend, transport)
            raise ZeroDivisionError
        assert transport.sizes(["work"])[0].ready == 0
        if self.arrives_in_transactions:
            assert backend.claim_chord("g") == (0, 1, None, False)
        else:
            assert backend.claim_chord("g") == (1, 1, None, False)
            self.take_claim_away(backend, clock)
        with transport.transaction():
            self.end_in_transaction(backend, transport)
        assert transport.sizes(["work"])[0].ready == 1
        assert backend.arrive_at_chord(part(0)) == OVER

    def end_in_transaction(self, backend: Backend, transport: Transport) -> None:
        claim = backend.arrive_at_chord(part(0)).claim
        assert claim and backend.chord_entries("g") == [entry("t0")]
        message = Message(b"[]", "application/json", "utf-8", {"task": "body", "id": "b"}, {})
        transport.publish([Publication(message, "", "work")], 5.0)
        assert backend.finish_chord("g", claim)

    def test_body_is_not_sent_where_the_claim_was_lost(
        self, backend: Backend, transport: Transport, clock: Clock
    ) -> None:
        first = self.complete(backend)
        self.pass_time(clock, CLAIM_S + 1)
        second = backend.claim_chord("g").claim
        message = Message(b"[]", "application/json", "utf-8", {"task": "body", "id": "b"}, {})
        with pytest.raises(ClaimLost) as raised, transport.transaction():
            transport.publish([Publication(message, "", "work")], 5.0)
            if not backend.finish_chord("g", first):
                raise ClaimLost(["g"])
        assert raised.value.group_ids == ["g"]
        assert transport.sizes(["work"])[0].ready == 0
        assert second and backend.finish_chord("g", second)


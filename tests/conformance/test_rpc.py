# SPDX-License-Identifier: MIT
"""The suite over rpc://, with one process that is both who asks and who answers."""

from __future__ import annotations

import json
from typing import Callable, Iterator, List, Sequence
from urllib.parse import urlsplit

import pytest
from chord_suite import BODY, OVER, ChordSuite, entry, part
from proxy import Proxy
from servers import RabbitServer
from transport_suite import Clock
from waiting import wait_until

from miniq.backends.base import CLAIM_S, Backend, ChordPart, StoredResult
from miniq.backends.rpc import RpcBackend
from miniq.connections import replies
from miniq.connections.amqp import Server
from miniq.plan import WATCH_S
from miniq.transports.base import Transport
from miniq.workflow_tasks import LONGEST_LOOK_S


class ToItself(RpcBackend):
    """Sends each result to where this process waits for it."""

    def store(self, results: Sequence[StoredResult]) -> None:
        super().store([result._replace(reply_to=self._address()) for result in results])


class TestRpcBackend(ChordSuite):
    keeps_any_bytes = False
    knows_what_is_left = False
    needs_expire = False
    arrives_in_transactions = False
    for_many_processes = False
    begins_with_members = False
    counts_each = False

    @pytest.fixture
    def url(self, rabbit_url: str) -> Iterator[str]:
        yield rabbit_url
        replies.delete_all()
        replies._replies.clear()
        Server.close_all()

    @pytest.fixture
    def open_backend(self, url: str, clock: Clock) -> Iterator[Callable[[], Backend]]:
        opened: List[Backend] = []

        def new() -> Backend:
            backend = ToItself(url, {"reply_address": lambda: "tests", "result_expires": self.kept_s}, clock)
            # As if a task had been called.
            backend.before_call(5.0)
            opened.append(backend)
            return backend

        yield new
        for backend in opened:
            backend.close()

    def take_claim_away(self, backend: Backend, clock: Clock) -> None:
        self.pass_time(clock, CLAIM_S + 1)

    def test_abandoned_chord_has_no_claim_and_keeps_its_entries(self, backend: Backend, clock: Clock) -> None:
        backend.start_chord("g", 2, BODY, 1000.0)
        backend.arrive_at_chord(part(0, "FAILURE"))
        backend.abandon_chord("g")
        assert backend.arrive_at_chord(part(1)) == OVER
        assert not backend.add_to_chord("g")

    def test_chord_that_waits_for_added_members_is_not_left_over(
        self, backend: Backend, clock: Clock
    ) -> None:
        pytest.skip("who adds members has not ended, so nobody has a claim")

    def test_chords_left_over_are_told_in_portions(
        self, backend: Backend, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("miniq.backends.rpc_chords.MOST_LEFT_OVER", 3)
        claims = {name: self.complete(backend, 1, name) for name in "abcde"}
        self.pass_time(clock, CLAIM_S + 1)
        found = [group_id for group_id, _ in backend.chords_left_over(clock())]
        assert len(found) == 3
        for group_id in found:
            assert backend.finish_chord(group_id, claims[group_id])
        assert len(backend.chords_left_over(clock())) == 2

    def test_claim_is_lost_with_its_connection_and_goes_to_the_next_who_asks(
        self, open_backend: Callable[[], RpcBackend], clock: Clock
    ) -> None:
        first, second = open_backend(), open_backend()
        claim = self.complete(first)
        assert second.arrive_at_chord(part(0)._replace(body=BODY)).claim is None
        assert first._line is not None
        first._line.stream.shut_down()
        # Whoever asked looks again.
        assert first.chords_left_over(clock()) == [("g", BODY)] == second.chords_left_over(clock())
        assert not first.extend_chord("g", claim)
        found = wait_until(lambda: second.claim_chord("g").claim, 10, "the server has noticed")
        assert first.claim_chord("g").claim is None
        assert second.chord_entries("g") == [entry("t0"), entry("t1")] and second.finish_chord("g", found)
        assert first.claim_chord("g") == OVER and first.chords_left_over(clock()) == []
        # A body that is sent ends the chord, whatever became of the claim.
        claim = self.complete(first)
        first._line.stream.shut_down()
        assert first.finish_chord("g", claim) and not second.has_chord("g")

    def test_chord_whose_queue_cannot_be_deleted_has_ended_all_the_same(
        self, backend: RpcBackend, url: str, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Proxy(urlsplit(url).port or 0) as proxy:
            behind = ToItself(proxy.url(url), {"reply_address": lambda: "tests"}, clock)
            claim = self.complete(behind)
            proxy.refuse()
            proxy.reset()
            assert behind.finish_chord("g", claim)
            assert "Chord g has ended, its queue is deleted later" in caplog.text
            assert backend.has_chord("g")
            assert behind.chords_left_over(clock()) == []
            proxy.forward()
            assert behind.arrive_at_chord(part(0)) == OVER
            assert behind.chords_left_over(clock()) == []
            assert not backend.has_chord("g")
            behind.close()

    def test_looks_and_ends_without_a_member_count_for_nobody(self, backend: RpcBackend) -> None:
        body = json.dumps({"chord_size": 2}).encode()
        backend.start_chord("g", 2, body, 1000.0)
        assert backend.has_chord("g") and not backend.has_chord("another")
        look = ChordPart("g", None, "", b"", 1000.0, body)
        assert backend.arrive_at_chord(part(1)._replace(body=body)) == (1, 2, None, False)
        assert backend.arrive_at_chord(look) == (1, 2, None, False)
        assert backend.arrive_at_chord(look._replace(entry=entry("g", "FAILURE"))).claim
        assert backend.chord_entries("g") == [entry("t1"), entry("g", "FAILURE")]

    def test_names_too_long_for_a_queue_are_hashed(self, backend: RpcBackend) -> None:
        for name in ("g" * 240, "g" * 241, "ü" * 200, "g" * 100_000):
            claim = self.complete(backend, 1, name, anew=False)
            assert backend.finish_chord(name, claim)
            assert not backend.has_chord(name)

    def test_chord_is_kept_until_a_task_has_looked_however_short_its_time_is(
        self, backend: Backend, rabbit_server: RabbitServer, url: str
    ) -> None:
        longest_pause_s = max(WATCH_S, LONGEST_LOOK_S)
        for group_id, kept_s in (("short", 1.0), ("long", 1000.0)):
            backend.start_chord(group_id, 2, BODY, kept_s)
        queues = rabbit_server.queues(urlsplit(url).path[1:])
        short, long = (queues[f"celery.chord.{name}"]["arguments"] for name in ("short", "long"))
        assert short["x-expires"] >= 2000 * longest_pause_s and long["x-expires"] == 1_000_000

    def test_chord_past_its_time_is_forgotten(
        self, backend: Backend, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("miniq.backends.rpc_chords.LEAST_KEPT_S", 0.05)
        backend.start_chord("g", 2, BODY, 0.05)
        # Who asks keeps it for as long again, so it is not asked too often.
        late = lambda: backend.arrive_at_chord(part(0)) == OVER  # noqa: E731
        wait_until(late, 10, "the queue has expired", pause_s=0.3)

    def test_end_of_a_chord_is_one_with_the_message_of_its_body(
        self, backend: Backend, transport: Transport, clock: Clock
    ) -> None:
        pytest.skip("RabbitMQ has no transaction that a chord's queue could be part of")

    def test_expired_result_is_unknown_and_removed(self, backend: Backend, clock: Clock) -> None:
        pytest.skip("the server's own clock decides, for all results of a queue: tests/test_rpc_results.py")

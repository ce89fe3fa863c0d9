# SPDX-License-Identifier: MIT
"""Groups and chords in the single stores: what the suite of all stores cannot see."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Iterator, List

import pytest
from servers import MemcachedServer

from miniq.backends.base import CLAIM_S, SENDING_S, Backend, ChordPart, backend_class
from miniq.backends.cache import MemcachedBackend
from miniq.backends.chords import Chord
from miniq.backends.files import FileBackend
from miniq.backends.sqlite import SQLiteBackend
from miniq.connections import memory
from miniq.connections.sqlite import APPLICATION_ID, MIGRATIONS, Database, Options
from miniq.exceptions import BackendStoreError, DecodeError

BODY = b'{"task": "body"}'


def part(index: int, group_id: str = "g") -> ChordPart:
    return ChordPart(group_id, index, f"t{index}", b"[%d]" % index, 60.0)


# -- records


def test_claim_of_a_clock_that_was_set_back_does_not_last() -> None:
    claimed = Chord(size=1, arrived=1, claim="c", claimed_until=1000.0)
    assert claimed.is_claimed(1000.0 - CLAIM_S) and claimed.is_claimed(1000.0 - SENDING_S)
    assert not claimed.is_claimed(1000.0) and not claimed.is_claimed(500.0)
    assert claimed.is_left_over(500.0)


@pytest.mark.parametrize("scheme", ["memory", "sqlite"])
def test_chord_is_left_over_after_the_clock_was_set_back(scheme: str, tmp_path: Path) -> None:
    url = "memory://set-back" if scheme == "memory" else f"sqlite:///{tmp_path}/q.db"
    now = [1_700_000_000.0]
    backend = backend_class(url)(url, {}, lambda: now[0])
    backend.start_chord("g", 1, BODY, None)
    assert backend.arrive_at_chord(part(0)).claim
    now[0] -= 3600
    assert backend.chords_left_over(now[0]) == [("g", BODY)]
    assert backend.claim_chord("g").claim
    backend.close()
    memory.reset("set-back")


def test_nothing_is_left_of_a_chord_in_memory_when_it_is_over() -> None:
    now = [0.0]
    backend = backend_class("memory://left")("memory://left", {}, lambda: now[0])
    broker = memory.MemoryBroker.get("left")
    backend.start_chord("g", 2, BODY, 10.0)
    with pytest.raises(ZeroDivisionError), broker:
        backend.arrive_at_chord(part(0))
        backend.add_to_chord("g", 1, "token")
        raise ZeroDivisionError
    assert broker.chord_parts == {} and broker.chords["g"] == Chord(size=2, expires=10.0)
    backend.arrive_at_chord(part(0))
    now[0] = 100.0
    assert backend.expire() == 1
    assert (broker.chords, broker.chord_bodies, broker.chord_parts) == ({}, {}, {})
    memory.reset("left")


# -- SQLite


def open_sqlite(path: Path) -> SQLiteBackend:
    return SQLiteBackend(f"sqlite:///{path}", {"synchronous": "OFF"}, time.time)


def test_file_of_the_first_schema_keeps_what_it_has_and_gets_the_new_tables(tmp_path: Path) -> None:
    path = tmp_path / "q.db"
    old = sqlite3.connect(path)
    for statement in MIGRATIONS[0]:
        old.execute(statement)
    old.execute("INSERT INTO results VALUES('a', 'SUCCESS', x'7b7d', 'application/json', 'utf-8', NULL)")
    old.execute(f"PRAGMA application_id={APPLICATION_ID}")
    old.execute("PRAGMA user_version=1")
    old.commit()
    old.close()
    backend = open_sqlite(path)
    assert backend.fetch(["a"])["a"].body == b"{}"
    backend.start_chord("g", 1, BODY, None)
    backend.save_group("g", b"{}", None)
    assert backend.arrive_at_chord(part(0)).claim
    backend.close()


def test_each_arrival_costs_sqlite_the_same(tmp_path: Path) -> None:
    backend = open_sqlite(tmp_path / "q.db")
    backend.start_chord("g", 1000, BODY * 1000, None)
    database = Database.open(str(tmp_path / "q.db"), Options())
    steps = [0]

    def count() -> int:
        steps[0] += 1
        return 0

    database.connection.set_progress_handler(count, 1)
    costs: List[int] = []
    for start in range(0, 1000, 100):
        steps[0] = 0
        backend.arrive_at_chords([part(n) for n in range(start, start + 100)])
        costs.append(steps[0])
    database.connection.set_progress_handler(None, 1)
    assert max(costs) < 1.1 * min(costs), f"steps of SQLite's machine for 100 arrivals each: {costs}"
    database.close()
    backend.close()


def test_nothing_is_left_of_a_chord_in_sqlite_when_it_is_over(tmp_path: Path) -> None:
    now = [0.0]
    backend = SQLiteBackend(f"sqlite:///{tmp_path}/q.db", {"synchronous": "OFF"}, lambda: now[0])
    for n in range(25):
        backend.start_chord(f"g{n}", 2, BODY, 10.0)
        backend.arrive_at_chord(part(0, f"g{n}"))
    now[0] = 100.0
    assert backend.expire() == 25
    backend.close()
    plain = sqlite3.connect(tmp_path / "q.db")
    for table in ("chords", "chord_bodies", "chord_parts"):
        assert plain.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    plain.close()


def test_part_that_sqlite_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = open_sqlite(tmp_path / "q.db")
    monkeypatch.setattr("miniq.backends.sqlite.MAX_BODY_BYTES", 10)
    with pytest.raises(BackendStoreError, match="part of a chord of 11 bytes is too large"):
        backend.arrive_at_chord(ChordPart("g", 0, "t", b"x" * 11, None))
    assert backend.arrive_at_chord(part(0)).count == 1
    backend.close()


# -- groups where nothing is counted


def test_group_is_a_file_that_celery_reads(tmp_path: Path) -> None:
    backend = FileBackend(f"file://{tmp_path}", {"global_keyprefix": "p"}, time.time)
    backend.save_group("g", b"{}", 60.0)
    backend.save_group("../../g", b"[]", None)
    assert (tmp_path / "p_celery-taskset-meta-g").read_bytes() == b"{}"
    assert backend.load_group("../../g") == b"[]"
    assert not any(name.name.startswith("g") for name in tmp_path.parent.iterdir())
    (tmp_path / "p_celery-taskset-meta-bad").write_bytes(b"\0celery-compressed\0nonsense")
    with pytest.raises(DecodeError):
        backend.load_group("bad")
    assert not backend.counts_chords
    backend.close()


@pytest.fixture(scope="module")
def memcached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemcachedServer]:
    with MemcachedServer(tmp_path_factory.mktemp("memcached")) as server:
        yield server


def test_group_in_memcached_is_under_celerys_key(memcached: MemcachedServer) -> None:
    backend = MemcachedBackend(memcached.url(), {}, time.time)
    backend.save_group("g", b"{}", 60.0)
    assert b"{}" in memcached.command("get celery-taskset-meta-g")
    backend.save_group("g" * 300, b"[]", None)
    assert backend.load_group("g" * 300) == b"[]"
    with pytest.raises(BackendStoreError, match="group 'g' of 2000000 bytes.*too large"):
        backend.save_group("g", b"x" * 2_000_000, None)
    assert not backend.counts_chords
    backend.close()


def test_store_that_does_not_count_says_so() -> None:
    assert not Backend.counts_chords
    for url in ("memory://", "sqlite:///q.db", "redis://", "rpc://"):
        assert backend_class(url).counts_chords
        assert backend_class(url).watches_chords is (url == "rpc://")
    for url in ("file:///f", "memcache://h", "disabled://"):
        assert not backend_class(url).counts_chords

# SPDX-License-Identifier: MIT
"""What every store of beat's records must do; and which store an app gets."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
from beat_stage import Clock

from miniq import MiniQ
from miniq.beat import Scheduler
from miniq.beat_store import ScheduleStore, open_store
from miniq.connections.memory import reset
from miniq.connections.redis import Server
from miniq.exceptions import ImproperlyConfigured, OperationalError

ROOT = Path(__file__).parents[2]
KINDS = ("memory", "sqlite", "redis", "file", "other redis")


class Place:
    """A broker and a store, as a kind of app has them."""

    def __init__(self, kind: str, tmp_path: Path, redis_url: Callable[[], str]) -> None:
        self.kind = kind
        self.filename = str(tmp_path / "state") if kind == "file" else None
        self.urls: Dict[str, Any] = {"broker": f"sqlite:///{tmp_path}/broker.db"}
        if kind == "memory":
            self.urls["broker"] = "memory://beat-stores"
        elif kind == "redis":
            self.urls["broker"] = redis_url()
        elif kind == "other redis":
            # Where the broker can keep no records: a server that is never reached in these tests.
            self.urls = {"broker": "amqp://127.0.0.1:1//", "backend": redis_url()}
        self.apps: List[MiniQ] = []

    def app(self, **settings: Any) -> MiniQ:
        app = MiniQ("proj", **{**self.urls, **settings})
        self.apps.append(app)
        return app

    def store(self) -> ScheduleStore:
        return open_store(self.app(), self.filename)


@pytest.fixture(params=KINDS)
def place(request: Any, tmp_path: Path) -> Iterator[Place]:
    found = Place(request.param, tmp_path, lambda: request.getfixturevalue("redis_url"))
    yield found
    for app in found.apps:
        app.close()
    reset("beat-stores")
    Server.close_all()


@pytest.fixture
def store(place: Place) -> Iterator[ScheduleStore]:
    found = place.store()
    yield found
    found.close()


# -- records -------------------------------------------------------------------------------------


def test_record_is_made_replaced_and_deleted_only_as_it_was_read(store: ScheduleStore) -> None:
    assert store.load() == {} and store.read("a") is None
    assert store.swap("a", None, "one")
    assert not store.swap("a", None, "two") and not store.swap("a", "none", "two")
    assert store.swap("a", "one", "two") and store.read("a") == "two"
    assert store.swap("ü ☂ %s", None, "names are any text")
    assert store.load() == {"a": "two", "ü ☂ %s": "names are any text"}
    assert not store.swap("a", "one", None) and store.swap("a", "two", None)
    assert list(store.load()) == ["ü ☂ %s"]
    assert not store.swap("a", "two", "three")


def test_version_changes_with_what_is_announced_and_with_nothing_else(store: ScheduleStore) -> None:
    seen = [store.version()]
    store.swap("a", None, "one")
    assert store.version() == seen[0]
    for old, new in (("one", "two"), ("two", None), (None, "three")):
        assert store.swap("a", old, new, announce=True)
        assert store.version() not in seen
        seen.append(store.version())
    store.swap("a", "three", "four")
    assert not store.swap("a", "three", "five", announce=True)
    assert store.version() == seen[-1]


def test_record_stays_where_publishing_fails(store: ScheduleStore) -> None:
    store.swap("a", None, "one")

    def publish() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.swap("a", "one", "two", publish)
    assert store.read("a") == "one"
    assert store.swap("a", "one", "two")


def test_nothing_is_published_where_the_record_is_another_one(store: ScheduleStore) -> None:
    store.swap("a", None, "one")
    assert not store.swap("a", "none", "two", lambda: pytest.fail("published"))


def test_message_and_record_are_one_where_broker_and_store_are(place: Place) -> None:
    app, kind = place.app(), place.kind
    store = open_store(app, place.filename)
    assert store.atomic == (kind in ("memory", "sqlite", "redis"))
    if not store.atomic:
        store.close()
        return
    store.swap("a", None, "one")

    def ready() -> int:
        return sum(size.ready for size in app.producer.transport.sizes())

    def publish_and_fail() -> None:
        app.send_task("t")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.swap("a", "one", "two", publish_and_fail)
    assert (store.read("a"), ready()) == ("one", 0)

    def publish_too_late() -> None:
        # Another beat comes first, after this one has read the record.
        other = threading.Thread(target=lambda: place.store().swap("a", "one", "theirs"))
        other.start()
        if kind == "redis":
            other.join()
        app.send_task("t")

    won = store.swap("a", "one", "ours", publish_too_late)
    assert won == (kind != "redis")  # the others hold a lock by then
    assert ready() == int(won)
    assert store.read("a") == ("ours" if won else "theirs")
    store.close()


def test_of_many_threads_that_count_each_counts_once(place: Place) -> None:
    chance = random.Random(3)
    store = place.store()
    store.swap("n", None, "0")
    won: List[int] = []

    def count() -> None:
        own = place.store()
        while len(won) < 60:
            old = own.read("n") or ""
            if own.swap("n", old, str(int(old) + 1)):
                won.append(int(old))
            if chance.random() < 0.2:
                own.close()
        own.close()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(len(won))) and store.read("n") == str(len(won))
    store.close()


# -- which store ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"broker": "sqlite:///jobs.db"}, "sqlite:///jobs.db"),
        ({"broker": "memory://x", "backend": "redis://h/1"}, "memory://x"),
        ({"broker": "redis://:secret@h/1"}, "redis://:**@h/1"),
        ({"broker": "amqp://h", "backend": "redis://:secret@h/1"}, "redis://:**@h/1"),
        ({"broker": "amqp://h", "backend": "sqlite:///results.db"}, "sqlite:///results.db"),
        ({"broker": "amqp://h", "backend": "rpc://"}, "sqlite:///celerybeat-schedule.sqlite"),
        ({"broker": "amqp://h", "backend": "memory://x"}, "sqlite:///celerybeat-schedule.sqlite"),
        ({"broker": "amqp://h"}, "sqlite:///celerybeat-schedule.sqlite"),
        ({"broker": "redis://h", "beat_schedule_filename": "/var/state"}, "sqlite:////var/state.sqlite"),
        ({"broker": "memory://", "beat_schedule_filename": "a.db"}, "sqlite:///a.db"),
    ],
)
def test_store_is_at_the_broker_or_where_results_are_or_in_a_file(
    settings: Dict[str, Any], where: str
) -> None:
    assert open_store(MiniQ("proj", **settings)).where == where


def test_file_that_is_no_database_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state.sqlite"
    path.write_bytes(b"GDBM or something else" * 100)
    app = MiniQ("proj", broker=f"sqlite:///{tmp_path}/broker.db")
    store = open_store(app, str(path))
    assert store.swap("a", None, "one") and store.load() == {"a": "one"}
    (aside,) = tmp_path.glob("state.sqlite.unreadable-*")
    assert aside.read_bytes().startswith(b"GDBM") and "a new one is begun" in caplog.text
    store.close()


def test_beats_that_start_together_over_a_damaged_file_share_the_new_one(tmp_path: Path) -> None:
    source = """
        import sys
        from miniq import MiniQ
        from miniq.beat_store import open_store

        app = MiniQ("proj", broker="memory://")
        print("ready", flush=True)
        for line in sys.stdin:
            store = open_store(app, line.strip())
            assert store.swap(sys.argv[1], None, "one")
            store.close()
            print("ready", flush=True)
    """
    paths = [tmp_path / f"state{number}.sqlite" for number in range(20)]
    beats = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(source), f"beat{number}"],
            cwd=ROOT, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(3)
    ]  # fmt: skip
    for path in paths:
        path.write_bytes(b"no database" * 1000)
        for beat in beats:
            assert beat.stdout is not None and beat.stdout.readline() == b"ready\n"
        for beat in beats:
            assert beat.stdin is not None
            beat.stdin.write(f"{path}\n".encode())
    for beat in beats:
        _, said = beat.communicate(timeout=60)
        assert beat.returncode == 0, said
    app = MiniQ("proj", broker="memory://")
    for path in paths:
        store = open_store(app, str(path))
        assert sorted(store.load()) == ["beat0", "beat1", "beat2"]
        store.close()
        assert len(list(tmp_path.glob(f"{path.name}.unreadable-*"))) == 1


@pytest.mark.parametrize("kept", [0, 10, 100, 4096, 9000, 20000])
def test_beat_starts_with_a_truncated_file(
    tmp_path: Path, clock: Clock, kept: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state.sqlite"
    app = MiniQ(
        "proj", broker="memory://truncated", wall=clock, beat_schedule_filename=str(path),
        beat_schedule={f"entry{n}": {"task": "t", "schedule": 10} for n in range(50)},
    )  # fmt: skip
    first = Scheduler(app)
    first.tick()
    first.close()
    for suffix in ("-wal", "-shm"):
        if os.path.exists(f"{path}{suffix}"):
            os.unlink(f"{path}{suffix}")
    os.truncate(path, kept)
    again = Scheduler(app)
    again.tick()
    assert len(again.records()) == 50
    clock.now += 10
    again.tick()
    assert {state.runs for state in again.records().values()} == {1}
    assert bool(list(tmp_path.glob("*.unreadable-*"))) == (kept > 0) == ("could not be read" in caplog.text)
    again.close()
    app.close()
    reset("truncated")


def test_file_of_another_program_is_refused(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "django.db"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE theirs(x)")
    other.close()
    store = open_store(MiniQ("proj", broker="memory://"), str(path))
    with pytest.raises(ImproperlyConfigured, match="another program"):
        store.load()
    assert path.exists() and not list(tmp_path.glob("*.unreadable-*"))


def test_damaged_file_of_the_broker_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    path.write_bytes(b"not a database " * 100)
    with pytest.raises(ImproperlyConfigured, match="not a database"):
        open_store(MiniQ("proj", broker=f"sqlite:///{path}")).load()
    assert path.read_bytes().startswith(b"not a database")


def test_records_lost_under_a_running_beat_are_made_again(redis_url: str, clock: Clock) -> None:
    app = MiniQ("proj", broker=redis_url, wall=clock, beat_schedule={"entry": {"task": "t", "schedule": 10}})
    beat = Scheduler(app)
    beat.tick()
    beat.tick()
    with app.producer.transport.link.using() as connection:  # type: ignore[attr-defined]
        connection.call("FLUSHDB")
    assert beat.changed()
    clock.now += 5
    beat.tick()
    clock.now += 9
    beat.tick()
    assert beat.records()["entry"].runs == 0
    clock.now += 1
    beat.tick()
    assert beat.records()["entry"].runs == 1
    beat.close()
    app.close()
    Server.close_all()


# -- broker and store apart ----------------------------------------------------------------------


class Apart:
    """Beats whose store is not the broker; what they publish fails, or stops them, when told."""

    def __init__(self, clock: Clock, tmp_path: Path) -> None:
        self.clock = clock
        self.path = tmp_path
        self.apps: List[MiniQ] = []
        self.broken = False

    def beat(self) -> Scheduler:
        apart = self

        class Unsteady(Scheduler):
            def apply_entry(self, entry: Any, task_id: Any = None) -> Any:
                if apart.broken:
                    raise OperationalError("the broker is away")
                return super().apply_entry(entry, task_id)

        app = MiniQ(
            "proj", broker=f"sqlite:///{self.path}/broker.db", wall=self.clock,
            beat_schedule_filename=f"{self.path}/state",
            beat_schedule={"entry": {"task": "t", "schedule": 10, "catch_up": "all"}},
        )  # fmt: skip
        self.apps.append(app)
        beat = Unsteady(app)
        beat.tick()
        assert not beat.is_atomic
        return beat

    def ids(self) -> List[str]:
        """Return the ids of what was sent, taking it out."""
        from miniq.routing import Queue

        transport = self.apps[0].producer.new_transport(write=False)
        consumer = transport.consumer("test", [Queue("celery")])
        found = [str(one.message.headers["id"]) for one in consumer.poll(1000)]
        transport.close()
        return found


@pytest.fixture
def apart(clock: Clock, tmp_path: Path) -> Iterator[Apart]:
    found = Apart(clock, tmp_path)
    yield found
    for app in found.apps:
        app.close()


def test_tick_of_a_beat_that_died_while_sending_is_sent_by_another_under_the_same_id(apart: Apart) -> None:
    first, second = apart.beat(), apart.beat()
    apart.clock.now += 10
    apart.broken = True
    first.tick()  # claims, and gets no further
    apart.broken = False
    due = first.schedule["entry"].state.claim
    assert due is not None
    second.tick()
    assert apart.ids() == []  # it is another one's for the time being
    apart.clock.now += 11
    second.tick()
    second.tick()
    from miniq.beat_entry import tick_id

    assert apart.ids()[0] == tick_id("proj", "entry", due[0])
    # The first one comes back to life and finds that it is done.
    first.tick()
    first.tick()
    state = first.records()["entry"]
    assert state.runs == 2 and state.claim is None
    first.close()
    second.close()


def test_entry_that_is_changed_while_it_is_sent_is_sent_once(apart: Apart) -> None:
    beat, other = apart.beat(), apart.beat()
    send = beat.apply_entry

    def change_and_send(entry: Any, task_id: Any = None) -> Any:
        other.pause("entry")
        return send(entry, task_id)

    beat.apply_entry = change_and_send  # type: ignore[method-assign]
    apart.clock.now += 10
    beat.tick()
    state = beat.records()["entry"]
    assert state.paused and state.claim is None and state.runs == 1
    apart.clock.now += 30
    beat.tick()
    assert len(apart.ids()) == 1
    beat.close()
    other.close()


def test_beat_whose_broker_is_away_keeps_its_claim_and_sends_when_it_is_back(
    apart: Apart, caplog: pytest.LogCaptureFixture
) -> None:
    beat = apart.beat()
    apart.broken = True
    apart.clock.now += 10
    pauses = [beat.tick() for _ in range(8)]
    assert pauses == sorted(pauses) and 0 < pauses[0] < pauses[-1] <= 15
    assert caplog.text.count("the broker is away") == 1
    apart.broken = False
    assert beat.tick() > 0
    assert len(apart.ids()) == 1 and "reached again after" in caplog.text
    assert beat.away_since_mono is None and not beat.changed()
    beat.save(name="other", task="t", schedule=10)
    assert beat.changed(), "it looks for changes again"
    beat.close()


def test_beats_apart_from_their_broker_send_each_tick_once_while_all_is_well(apart: Apart) -> None:
    beats = [apart.beat() for _ in range(3)]
    for _ in range(20):
        apart.clock.now += 10
        for beat in beats:
            while beat.tick() == 0.0:
                pass
    ids = apart.ids()
    assert len(ids) == len(set(ids)) == 20
    for beat in beats:
        beat.close()

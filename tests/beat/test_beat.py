# SPDX-License-Identifier: MIT
"""What a scheduler sends, and when: over a broker in memory, by a clock that moves when told."""

from __future__ import annotations

import json
import logging
import random
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Dict, List

import pytest
from beat_stage import Clock, Stage
from wire import compare, find, of_redis

from miniq import MiniQ, chain, chord, group
from miniq.beat import ASK_AGAIN_S, BeatLazyFunc, Scheduler, scheduler_class
from miniq.beat_entry import State, tick_id
from miniq.exceptions import ImproperlyConfigured, UnknownOption
from miniq.schedules import BaseSchedule, crontab, schedstate, schedule, to_json


def every(when: Any, name: str = "entry", task: str = "add", **more: Any) -> Dict[str, Any]:
    """Return a schedule of one entry."""
    return {name: {"task": task, "schedule": when, **more}}


# -- ticks ---------------------------------------------------------------------------------------


def test_interval_is_sent_first_one_interval_after_it_was_first_seen(stage: Stage) -> None:
    beat = stage.beat(every(10))
    stage.pass_time(9.9, beat)
    assert stage.sent() == 0
    stage.pass_time(0.1, beat)
    assert stage.sent() == 1


def test_tick_says_how_long_until_the_next_one(stage: Stage) -> None:
    beat = stage.beat(every(10))
    assert beat.tick() == 10.0
    stage.clock.now += 4
    assert beat.tick() == 6.0
    assert stage.beat(every(1000), beat_max_loop_interval=60).tick() == 60.0
    assert stage.beat({}).tick() <= 300.0


def test_late_beat_does_not_move_later_ticks(stage: Stage) -> None:
    begun, beat = stage.clock.now, stage.beat(every(10))
    for late_s in (0.5, 3.0, 0.1):
        stage.clock.now = beat.schedule["entry"].due + late_s
        beat.tick()
    assert beat.schedule["entry"].state.last_due == begun + 30


def test_message_is_that_of_any_call_with_the_mark_of_beat(stage: Stage) -> None:
    lazy = BeatLazyFunc(lambda: 5)
    beat = stage.beat(every(10, args=(1, lazy), kwargs={}, options={"expires": 30, "headers": {"a": 1}}))
    due = beat.schedule["entry"].due
    stage.pass_time(10, beat)
    (message,) = stage.messages()
    assert json.loads(message.body)[0] == [1, 5]
    headers = message.headers
    assert headers["task"] == "add" and headers["celery_beat_task"] is True and headers["a"] == 1
    assert headers["id"] == headers["root_id"] == tick_id("proj", "entry", due)
    assert headers["parent_id"] is None
    assert headers["expires"] == datetime.fromtimestamp(stage.clock.now + 30, timezone.utc).isoformat()


def test_message_is_the_one_that_celerys_beat_sends(stage: Stage) -> None:
    app = stage.app()
    app.task(name="wt.add")(lambda x, y: x + y)
    app.add_periodic_task(1.0, "wt.add", (1, 2), name="entry", expires=30)
    beat = Scheduler(app)
    beat.tick()
    stage.pass_time(1, beat)
    (ours,) = stage.publications()
    compare(ours, of_redis(find("beat_message")["redis_envelope"]), "")


def test_task_that_only_workers_have_is_sent_by_name(stage: Stage) -> None:
    beat = stage.beat(every(10, task="elsewhere.task"))
    stage.pass_time(10, beat)
    assert [message.headers["task"] for message in stage.messages()] == ["elsewhere.task"]


def test_beats_over_one_store_send_each_tick_once(stage: Stage) -> None:
    begun, beats = stage.clock.now, [stage.beat(every(10, catch_up="all")) for _ in range(3)]
    chance = random.Random(7)
    for _ in range(60):
        chance.shuffle(beats)
        stage.pass_time(chance.choice((1, 5, 10, 25)), *beats[: chance.randint(1, 3)])
    stage.pass_time(0, *beats)
    ids = [message.headers["id"] for message in stage.messages()]
    assert len(set(ids)) == len(ids) == (stage.clock.now - begun) // 10
    state = beats[0].records()["entry"]
    assert state.runs == len(ids)


def test_entry_that_cannot_be_sent_does_not_stop_the_others(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("lazy")

    beat = stage.beat(
        {
            **every(10, "unserializable", args=(object(),)),
            **every(10, "unknown option", options={"quueue": "a"}),
            **every(10, "lazy", args=(BeatLazyFunc(broken),)),
            **every(10, "too many arguments", args=(1, 2, 3)),
            **every(10, "good"),
        }
    )
    stage.pass_time(10, beat)
    assert stage.sent() == 1
    for name in ("unserializable", "unknown option", "lazy", "too many arguments"):
        assert f"entry {name!r} could not be sent" in caplog.text
    state = beat.records()
    assert state["lazy"].runs == 0 and state["lazy"].last_due == state["good"].last_due
    stage.pass_time(10, beat)
    assert stage.sent() == 2


def test_schedule_that_fails_is_left_out_and_the_others_go_on(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    class Standing(BaseSchedule):
        def next_due(self, after: float, zone: Any) -> float:
            return after

    beat = stage.beat({**every(Standing(), "standing"), **every(10, "good")})
    stage.pass_time(10, beat)
    assert stage.sent() == 1
    assert "'standing' failed" in caplog.text and "does not move on" in caplog.text
    assert beat.tick() == 10.0


def test_schedule_that_only_knows_whether_it_is_due_is_asked(stage: Stage) -> None:
    answers: List[bool] = []

    class Celerys(BaseSchedule):
        def is_due(self, last_run_at: datetime) -> schedstate:
            passed_s = stage.clock.now - last_run_at.timestamp()
            answers.append(passed_s >= 7)
            return schedstate(passed_s >= 7, 7 if passed_s >= 7 else 7 - passed_s)

        def now(self) -> datetime:
            return datetime.fromtimestamp(stage.clock.now, timezone.utc)

    beat = stage.beat(every(Celerys()))
    for _ in range(30):
        stage.pass_time(1, beat)
    assert stage.sent() == 4 and any(answers)


def test_many_ticks_of_one_entry_do_not_keep_the_others_waiting(stage: Stage) -> None:
    beat = stage.beat({**every(1, "busy", catch_up="all"), **every(100, "other", task="silent")})
    stage.clock.now += 500
    assert beat.tick() == 0.0
    names = [message.headers["task"] for message in stage.messages()]
    assert "silent" in names and len(names) < 50


# -- what was missed -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("catch_up", "away_s", "sent"),
    [
        ("once", 35, 1),
        ("once", 36000, 1),
        ("all", 35, 3),
        ("all", 3600, 360),
        ("skip", 10, 1),  # in time
        ("skip", 39, 1),  # the newest is in time
        ("skip", 36005, 1),
    ],
)
def test_missed_ticks_follow_the_policy(stage: Stage, catch_up: str, away_s: float, sent: int) -> None:
    beat = stage.beat(every(10, catch_up=catch_up))
    stage.pass_time(away_s, beat)
    assert stage.sent() == sent
    # And then it goes on as before.
    stage.pass_time(10 - away_s % 10, beat)
    assert stage.sent() == sent + 1


def test_skip_drops_a_tick_that_is_late_and_sends_the_next(stage: Stage) -> None:
    beats = {way: stage.beat(every(3600, name=way, catch_up=way)) for way in ("skip", "once")}
    stage.pass_time(3600 + 600, *beats.values())
    records = beats["skip"].records()
    assert (records["skip"].runs, records["once"].runs) == (0, 1)
    stage.pass_time(3000, *beats.values())
    records = beats["skip"].records()
    assert (records["skip"].runs, records["once"].runs) == (1, 2)


def test_once_sends_the_newest_of_the_missed_ticks(stage: Stage) -> None:
    beat = stage.beat(every(crontab(minute=0)))  # 10:00 was when it was first seen
    stage.clock.set("2026-03-02T14:20:00")
    stage.pass_time(0, beat)
    noon = Clock("2026-03-02T14:00:00").now
    assert [message.headers["id"] for message in stage.messages()] == [tick_id("proj", "entry", noon)]


@pytest.mark.parametrize(("deadline_s", "sent"), [(60, 0), (1000, 1)])
def test_crontab_past_its_starting_deadline_is_not_sent(stage: Stage, deadline_s: int, sent: int) -> None:
    beat = stage.beat(every(crontab(minute=0, hour=11)), beat_cron_starting_deadline=deadline_s)
    stage.clock.set("2026-03-02T11:05:00")
    stage.pass_time(0, beat)
    assert stage.sent() == sent


def test_absence_of_a_year_is_made_up_for_quickly(stage: Stage) -> None:
    beat = stage.beat(every(timedelta(minutes=1)))
    stage.pass_time(365 * 86400, beat)
    assert stage.sent() == 1


# -- runs that last ------------------------------------------------------------------------------


def test_overlap_skip_leaves_a_tick_out_until_the_last_run_has_ended(stage: Stage) -> None:
    beat = stage.beat(every(10, overlap="skip"))
    stage.pass_time(10, beat)
    stage.pass_time(10, beat)
    assert stage.sent() == 1
    (message,) = stage.messages()
    _finish(beat.app, message.headers["id"])
    stage.pass_time(10, beat)
    assert stage.sent() == 2


def test_overlap_skip_takes_a_run_whose_result_is_no_longer_kept_for_ended(stage: Stage) -> None:
    beat = stage.beat(every(100, overlap="skip"), result_expires=1000)
    for _ in range(11):
        stage.pass_time(100, beat)
    assert stage.sent() == 1
    stage.pass_time(100, beat)
    assert stage.sent() == 2


def test_overlap_skip_waits_alone_while_the_result_backend_fails(
    stage: Stage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    entries = {**every(10, "careful", overlap="skip"), **every(10, "other", task="elsewhere")}
    beat = stage.beat(entries, result_backend=f"file://{tmp_path}")
    stage.pass_time(10, beat)
    (first,) = (message.headers["id"] for message in stage.messages() if message.headers["task"] == "add")
    in_the_way = tmp_path / f"celery-task-meta-{first}"
    in_the_way.mkdir()
    stage.pass_time(10, beat)
    stage.pass_time(ASK_AGAIN_S, beat)
    assert [message.headers["task"] for message in stage.messages()] == ["add", "elsewhere", "elsewhere"]
    in_the_way.rmdir()
    _finish(beat.app, first)
    stage.pass_time(ASK_AGAIN_S, beat)
    assert sorted(message.headers["task"] for message in stage.messages()) == ["add"] * 2 + ["elsewhere"] * 3
    told = [record.message for record in caplog.records]
    assert len(told) == 2 and "entry 'careful' waits" in told[0] and "'careful' goes on" in told[1]


def _finish(app: MiniQ, task_id: str) -> None:
    app.tasks["add"].update_state(task_id, "SUCCESS", 3)


@pytest.mark.parametrize(
    ("settings", "task", "options"),
    [
        ({"result_backend": "disabled://"}, "add", {}),
        ({}, "silent", {}),
        ({}, "add", {"ignore_result": True}),
        ({"task_ignore_result": True}, "elsewhere", {}),
    ],
)
def test_overlap_skip_without_results_is_refused_at_the_start(
    stage: Stage, settings: Dict[str, Any], task: str, options: Dict[str, Any]
) -> None:
    with pytest.raises(ImproperlyConfigured, match="overlap='skip' needs to know"):
        stage.beat(every(10, task=task, overlap="skip", options=options), **settings)


# -- the clock -----------------------------------------------------------------------------------


def test_clock_set_back_neither_doubles_a_crontab_tick_nor_stops_it(stage: Stage) -> None:
    beat = stage.beat(every(crontab(minute="*/10")))
    stage.pass_time(600, beat)
    stage.pass_time(-3000, beat)
    stage.pass_time(3000, beat)
    assert stage.sent() == 1
    stage.pass_time(600, beat)
    assert stage.sent() == 2


def test_clock_set_back_makes_an_interval_begin_anew(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    beat = stage.beat(every(10))
    stage.pass_time(10, beat)
    stage.pass_time(-5000, beat)
    assert "the clock was set back" in caplog.text
    assert beat.tick() == 10.0
    stage.pass_time(10, beat)
    assert stage.sent() == 2
    ids = [message.headers["id"] for message in stage.messages()]
    assert len(set(ids)) == 2


def test_crontab_that_was_sent_by_a_wrong_clock_does_not_wait_for_it(stage: Stage) -> None:
    beat = stage.beat(every(crontab(minute="*/10")))
    stage.pass_time(3 * 86400, beat)
    stage.pass_time(-3 * 86400, beat)
    stage.pass_time(600, beat)
    assert stage.sent() == 2


def test_clock_set_back_a_little_sends_nothing_twice(stage: Stage) -> None:
    beat = stage.beat(every(10))
    stage.pass_time(10, beat)
    stage.pass_time(-5, beat)
    stage.pass_time(5, beat)
    assert stage.sent() == 1


def test_clock_set_forward_is_an_absence(stage: Stage) -> None:
    beat = stage.beat(every(10))
    stage.pass_time(86400, beat)
    assert stage.sent() == 1 and beat.tick() == 10.0


@pytest.mark.parametrize(
    ("start", "times"),
    [
        # 02:30 does not exist on the 29th: right after the gap. On 2026-10-25 it comes twice: the first.
        ("2026-03-27T12:00:00", ["03-28T01:30", "03-29T01:00", "03-30T00:30"]),
        ("2026-10-23T12:00:00", ["10-24T00:30", "10-25T00:30", "10-26T01:30"]),
    ],
)
def test_fixed_hour_is_sent_once_on_days_when_the_clock_changes(
    stage: Stage, start: str, times: List[str]
) -> None:
    stage.clock.set(start)
    beat = stage.beat(every(crontab(minute=30, hour=2)), timezone="Europe/Paris")
    seen: List[str] = []
    while len(seen) < 3:
        stage.pass_time(60, beat)
        if stage.sent() > len(seen):
            seen.append(stage.clock.shown()[5:16])
    assert seen == times


# -- changes -------------------------------------------------------------------------------------


def test_changed_schedule_counts_from_now(stage: Stage) -> None:
    old = stage.beat(every(10))
    stage.pass_time(15, old)
    new = stage.beat(every(100))
    stage.pass_time(99, new)
    assert stage.sent() == 1
    stage.pass_time(1, new)
    assert stage.sent() == 2
    assert new.records()["entry"].runs == 2


def test_code_that_was_started_last_decides_about_an_entry(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    old = stage.beat({**every(10), **every(10, "gone")})
    new = stage.beat(every(100, options={"priority": 7}))
    stage.pass_time(10, old, new)
    assert old.records()["entry"].runs == 0 and old.records()["gone"].runs == 1
    assert "is taken as code has it that was started later" in caplog.text
    stage.pass_time(90, new, old)
    assert old.records()["entry"].runs == 1
    # The beat of the newer code dies.
    stage.pass_time(100, old)
    assert old.records()["entry"].runs == 2 and old.schedule["entry"].options == {"priority": 7}


class Every100(schedule):
    """A schedule that only code can say."""


def test_entry_that_cannot_be_written_is_left_to_the_beat_with_its_code(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    old = stage.beat(every(10))
    new = stage.beat(every(Every100(100)))
    stage.pass_time(10, old)
    assert "left to that beat" in caplog.text
    stage.pass_time(90, old)
    assert old.records()["entry"].runs == 0
    stage.pass_time(0, new)
    assert old.records()["entry"].runs == 1


def test_entry_gone_from_the_code_is_sent_no_more(stage: Stage) -> None:
    stage.beat({**every(10), **every(10, "gone")})
    new = stage.beat(every(10))
    stage.pass_time(10, new)
    assert stage.sent() == 1
    new.remove("gone")
    assert list(new.records()) == ["entry"]


def test_entry_that_is_not_enabled_is_not_sent_and_begins_anew_when_it_is(stage: Stage) -> None:
    off = stage.beat(every(10, enabled=False))
    stage.pass_time(100, off)
    assert stage.sent() == 0
    on = stage.beat(every(10))
    stage.pass_time(9, on)
    assert stage.sent() == 0
    stage.pass_time(1, on)
    assert stage.sent() == 1


def test_entries_added_at_run_time_are_sent_by_beats_that_run(stage: Stage) -> None:
    beat = stage.beat(every(1000))
    beat.tick()
    assert not beat.changed()
    other = stage.app().schedules
    other.save(name="late", task=other.app.tasks["add"], schedule=schedule(10), args=[1, 2])
    assert beat.changed()
    stage.pass_time(0, beat)
    stage.pass_time(10, beat)
    assert [json.loads(message.body)[0] for message in stage.messages()] == [[1, 2]]
    # They are there for a beat that starts later as well.
    later = stage.beat(every(1000))
    assert set(later.schedule) == {"entry", "late"}
    other.remove("late")
    stage.pass_time(10, beat, later)
    assert stage.sent() == 1 and set(beat.schedule) == {"entry"}


def test_paused_entry_is_not_sent_until_it_goes_on_and_nothing_is_made_up_for(stage: Stage) -> None:
    beat = stage.beat(every(10, catch_up="all"))
    at_run_time = stage.app(every(10, catch_up="all")).schedules
    at_run_time.pause("entry")
    stage.pass_time(100, beat)
    restarted = stage.beat(every(10, catch_up="all"))
    stage.pass_time(100, beat, restarted)
    assert stage.sent() == 0
    at_run_time.resume("entry")
    stage.pass_time(10, beat, restarted)
    assert stage.sent() == 1


def test_resume_of_what_is_not_paused_moves_no_tick(stage: Stage) -> None:
    beat = stage.beat(every(10))
    stage.pass_time(9, beat)
    beat.resume("entry")
    stage.pass_time(1, beat)
    assert stage.sent() == 1


def test_unreadable_records_can_be_changed_and_removed(stage: Stage) -> None:
    beat = stage.beat(every(10))
    assert beat.store.swap("added", None, "garbage")
    assert beat.store.swap("entry", beat.store.read("entry"), "{}")
    beat.pause("entry")
    assert beat.records()["entry"].paused
    beat.remove("added")
    assert list(beat.store.load()) == ["entry"]


def test_entry_that_no_beat_has_seen_yet_can_be_paused(stage: Stage) -> None:
    stage.app(every(10)).schedules.pause("entry")
    beat = stage.beat(every(10))
    stage.pass_time(10, beat)
    assert stage.sent() == 0


def test_looking_at_entries_from_other_code_does_not_take_them_over(stage: Stage) -> None:
    beat = stage.beat(every(10))
    other = stage.app(every(100)).schedules
    other.records()
    other.pause("entry")
    other.resume("entry")
    stage.pass_time(10, beat)
    assert stage.sent() == 1


def test_run_now_sends_once_beside_the_schedule(stage: Stage) -> None:
    beat = stage.beat(every(10, args=[4, 5]))
    task_id = stage.app(every(10, args=[4, 5])).schedules.run_now("entry")
    assert [message.headers["id"] for message in stage.messages()] == [task_id]
    stage.pass_time(10, beat)
    assert stage.sent() == 2 and beat.records()["entry"].runs == 2


def test_wrong_names_are_answered_with_the_nearest(stage: Stage) -> None:
    schedules = stage.app(every(10, "nightly")).schedules
    for act in (schedules.pause, schedules.resume, schedules.run_now, schedules.remove):
        with pytest.raises(ImproperlyConfigured, match="did you mean 'nightly'"):
            act("nightli")
    with pytest.raises(ImproperlyConfigured, match="is in the code"):
        schedules.remove("nightly")


def test_name_that_is_taken_is_refused(stage: Stage) -> None:
    schedules = stage.app(every(10)).schedules
    with pytest.raises(ImproperlyConfigured, match="already"):
        schedules.save(name="entry", task="add", schedule=5)
    schedules.save(name="other", task="add", schedule=5)
    with pytest.raises(ImproperlyConfigured, match="already"):
        schedules.save(name="other", task="add", schedule=5)
    with pytest.raises(ImproperlyConfigured, match="cannot be written as JSON"):
        schedules.save(name="third", task="add", schedule=5, args=(object(),))


def test_unreadable_record_is_replaced_with_a_warning(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    store = Scheduler(stage.app()).store
    assert store.swap("entry", None, '{"source": "code", "mark"')
    assert store.swap("added", None, '{"source": "added", "mark": "x", "last_due": 0}')
    assert store.swap("worse", None, "[]")
    for number, spec in enumerate(
        (None, {}, {"task": "t"}, {"schedule": 5}, {"task": "t", "schedule": {"type": "sundial"}},
         {"task": "t", "schedule": to_json(schedule(5)), "options": 5},
         {"task": "t", "schedule": to_json(schedule(5)), "unknown": 5})
    ):  # fmt: skip
        assert store.swap(f"bad{number}", None, State("added", "mark", 0.0, spec=spec).text())
    beat = stage.beat(every(10))
    stage.pass_time(10, beat)
    assert stage.sent() == 1
    assert "'entry' begins anew" in caplog.text and "'added' in the store is left out" in caplog.text
    assert all(f"'bad{number}' in the store is left out" in caplog.text for number in range(7))
    assert set(beat.schedule) == {"entry"}


@pytest.mark.parametrize("seed", range(20))
def test_record_reads_back_as_it_was_and_no_garbage_is_taken_for_one(seed: int) -> None:
    chance = random.Random(seed)
    state = State(
        chance.choice(("code", "added")),
        "mark",
        chance.uniform(0, 2e9),
        chance.choice((None, chance.uniform(0, 2e9))),
        chance.randrange(1000),
        chance.choice((None, "id")),
        chance.random() < 0.5,
        chance.choice((None, {"task": "add"})),
        chance.choice((None, (1.5, 2.5, "token"))),
    )
    text = state.text()
    assert State.read(text) == state
    at = chance.randrange(len(text))
    broken = text[:at] + chance.choice('\0{}[]",x9') + text[at + chance.randrange(2) :]
    try:
        State.read(broken)
    except ValueError as error:
        assert "no record" in str(error), (seed, broken)


# -- entries -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"task": "add", "schedule": 10, "sched": 5}, "unknown key 'sched', did you mean 'schedule'"),
        ({"task": "add"}, "needs both a task and a schedule"),
        ({"task": 5, "schedule": 10}, "task must be a task or its name"),
        ({"task": "add", "schedule": "daily"}, "schedule"),
        ({"task": "add", "schedule": -5}, "schedule"),
        ({"task": "add", "schedule": 10, "args": 5}, "args must be a list"),
        ({"task": "add", "schedule": 10, "catch_up": "never"}, "catch_up must be one of once, skip, all"),
        ({"task": "add", "schedule": 10, "overlap": "maybe"}, "overlap must be one of allow, skip"),
        ({"task": "add", "schedule": 10, "kwargs": [1]}, "kwargs must be a dict"),
        ({"task": "add", "schedule": 10, "options": "queue"}, "options must be a dict"),
        ({"task": "add", "schedule": 10, "enabled": "no"}, "enabled must be True or False"),
        ("add", "expected a dict"),
    ],
)
def test_entry_that_makes_no_sense_is_refused_at_the_start(stage: Stage, values: Any, said: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="'entry'") as caught:
        stage.beat({"entry": values})
    assert said in str(caught.value)


@pytest.mark.parametrize("name", [1, ("a",), "a\ud800"])
def test_name_that_no_store_takes_is_refused_at_the_start(stage: Stage, name: Any) -> None:
    with pytest.raises(ImproperlyConfigured, match="the name of a periodic task must be text"):
        stage.beat({name: {"task": "add", "schedule": 10}})


def test_entry_without_a_name_has_that_of_its_task(stage: Stage) -> None:
    beat = stage.beat({"": {"task": "add", "schedule": 10}})
    assert list(beat.schedule) == list(beat.records()) == ["add"]
    beat = stage.beat({"": {"task": "add", "schedule": 5}})
    stage.pass_time(5, beat)
    assert stage.sent() == 1, "as anew, it counts as another schedule"


def test_task_id_among_the_options_is_that_of_every_run(stage: Stage) -> None:
    beat = stage.beat(every(10, options={"task_id": "same"}))
    stage.pass_time(10, beat)
    stage.pass_time(10, beat)
    assert [message.headers["id"] for message in stage.messages()] == ["same", "same"]
    assert beat.schedule["entry"].state.last_id == "same"


def test_periodic_tasks_are_added_by_signature_task_or_name(stage: Stage) -> None:
    app = stage.app()

    @app.on_after_finalize.connect(weak=False)
    def add_all(sender: Any, **_: Any) -> None:
        add = sender.tasks["add"]
        sender.add_periodic_task(10, add.s(1, 2), name="by signature", queue="other")
        sender.add_periodic_task(10, add.s(1, 2).set(priority=3))
        sender.add_periodic_task(10.0, add, (3, 4), name="by task", catch_up="all")
        sender.add_periodic_task(crontab(minute=5), "add", kwargs={"x": 1}, name="by name", expires=5)

    app.finalize()
    assert sorted(app.periodic_tasks) == ["add(1, 2)", "by name", "by signature", "by task"]
    beat = Scheduler(app)
    beat.tick()
    entries = beat.schedule
    assert entries["add(1, 2)"].options["priority"] == 3
    assert entries["by signature"].options["queue"] == "other"
    assert entries["by task"].args == (3, 4) and entries["by task"].catch_up == "all"
    assert entries["by name"].kwargs == {"x": 1} and entries["by name"].options["expires"] == 5
    stage.pass_time(10, beat)
    assert stage.sent() == 3
    with pytest.warns(UserWarning, match="replaces another"):
        app.add_periodic_task(5, "add", name="by name")


def test_workflows_are_sent_as_what_they_are_made_of(stage: Stage) -> None:
    app = stage.app()
    add = app.tasks["add"]
    app.add_periodic_task(10, chain(add.s(1, 2), add.s(3)), name="chain")
    app.add_periodic_task(10, group(add.s(1, 2), add.s(3, 4)), name="group")
    app.add_periodic_task(10, chord([add.s(1, 2), add.s(3, 4)], add.s()))
    assert "add(1, 2)" in list(app.periodic_tasks)[2]
    beat = Scheduler(app)
    beat.tick()
    due = beat.schedule["chain"].due
    stage.pass_time(10, beat)
    messages = stage.messages()
    assert {message.headers["task"] for message in messages} == {"add"} and len(messages) == 5
    assert json.loads(messages[0].body)[2]["chain"][0]["options"]["task_id"] == tick_id("proj", "chain", due)


def test_overridden_apply_async_is_called(stage: Stage) -> None:
    app = stage.app(every(10, task="own"))

    class Own(app.Task):  # type: ignore[name-defined]
        name = "own"

        def run(self) -> None:
            pass

        def apply_async(self, *args: Any, **options: Any) -> Any:
            options["headers"] = {**options["headers"], "tenant": 7}
            return super().apply_async(*args, **options)

    app.register_task(Own())
    beat = Scheduler(app)
    beat.tick()
    stage.pass_time(10, beat)
    (message,) = stage.messages()
    assert message.headers["tenant"] == 7 and message.headers["celery_beat_task"] is True


def test_eager_tasks_run_in_beat(stage: Stage) -> None:
    beat = stage.beat(every(10), task_always_eager=True)
    stage.pass_time(10, beat)
    assert stage.sent() == 0 and beat.records()["entry"].runs == 1
    assert beat.records()["entry"].claim is None


# -- other schedulers ----------------------------------------------------------------------------


class FromElsewhere(Scheduler):
    """Entries of its own, as a scheduler that reads a database."""

    def setup_schedule(self) -> None:
        self.update_from_dict(every(10, "theirs"))


def test_scheduler_is_found_by_name_path_and_class(stage: Stage) -> None:
    for name in ("persistent", "celery.beat:PersistentScheduler", "miniq.beat:Scheduler"):
        assert scheduler_class(name) is Scheduler
    assert scheduler_class("test_beat.FromElsewhere").__name__ == "FromElsewhere"
    assert scheduler_class(FromElsewhere) is FromElsewhere
    with pytest.raises(ImproperlyConfigured, match="unknown scheduler 'persistant' .*persistent"):
        scheduler_class("persistant")


def test_scheduler_is_found_by_entry_point(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[celery.beat_schedulers]\ntheirs = test_beat:FromElsewhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert scheduler_class("theirs").__name__ == "FromElsewhere"
    with pytest.raises(ImproperlyConfigured, match="did you mean theirs"):
        scheduler_class("their")


def test_scheduler_with_entries_of_its_own_sends_them(stage: Stage) -> None:
    app = stage.app(every(10, "ours"))
    beat = FromElsewhere(app)
    beat.tick()
    stage.pass_time(10, beat)
    assert set(beat.schedule) == {"theirs"} and stage.sent() == 1


def test_log_lines_are_those_of_celery(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    beat = stage.beat(every(10))
    stage.pass_time(10, beat)
    assert "Scheduler: Sending due task entry (add)" in caplog.messages


def test_unknown_option_raises_when_it_is_run_now(stage: Stage) -> None:
    schedules = stage.app(every(10, options={"quueue": "a"})).schedules
    with pytest.raises(UnknownOption, match="queue"):
        schedules.run_now("entry")

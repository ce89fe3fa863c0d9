# SPDX-License-Identifier: MIT
"""What is known of workers and tasks from events: in order, out of order, in bounds; and cameras."""

from __future__ import annotations

import itertools
import logging
import pickle
import random
import threading
import time
from typing import Any, ClassVar, Dict, List, Optional

import pytest
from waiting import wait_until

from miniq import MiniQ, states
from miniq.events import EventDispatcher, Polaroid, State, evcam
from miniq.events.state import Task, Worker, heartbeat_expires

NOW = 1_000_000.0


class Story:
    """Makes the events of a cluster: each a second after the other, with clocks that go on."""

    def __init__(self) -> None:
        self._number = itertools.count(1)

    def event(self, kind: str, hostname: str = "w1@h", **fields: Any) -> Dict[str, Any]:
        number = next(self._number)
        return {
            "type": kind, "hostname": hostname, "pid": 7, "utcoffset": 0.0, "clock": number,
            "timestamp": NOW + number, "local_received": NOW + number + 0.25, **fields,
        }  # fmt: skip

    def run(self, uuid: str, end: str = "succeeded", name: str = "proj.add", **fields: Any) -> List[Any]:
        return [
            self.event("task-received", uuid=uuid, name=name, args="(1,)", kwargs="{}", retries=0),
            self.event("task-started", uuid=uuid),
            self.event(f"task-{end}", uuid=uuid, **fields),
        ]


@pytest.fixture
def story() -> Story:
    return Story()


def told(state: State, *events: Any) -> State:
    for event in events:
        state.event(event)
    return state


# -- tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("succeeded", "SUCCESS"), ("failed", "FAILURE"), ("retried", "RETRY"), ("revoked", "REVOKED"),
        ("rejected", "REJECTED"), ("progress", "PROGRESS"),
    ],
)  # fmt: skip
def test_a_task_has_the_state_that_its_last_event_means(story: Story, end: str, expected: str) -> None:
    state = State()
    seen = []
    for event in story.run("1", end):
        (what, created), subject = state.event(event)
        seen.append((what.state, created, subject))
    # That a message was given back is no step forward of its task.
    last = "STARTED" if end == "rejected" else expected
    assert seen == [("RECEIVED", True, "received"), ("STARTED", False, "started"), (last, False, end)]
    assert state.tasks["1"].ready == (expected in states.READY_STATES)


def test_fields_are_celerys(story: Story) -> None:
    sent = story.event(
        "task-sent", "gen1@h", uuid="1", name="proj.add", args="(1,)", kwargs="{}", retries=0, eta=None,
        expires=None, queue="celery", exchange="", routing_key="celery", root_id="1", parent_id=None,
    )  # fmt: skip
    received, started, succeeded = story.run("1", result="5", runtime=0.5)
    state = told(State(), sent, received, started, succeeded)
    task = state.tasks["1"]
    assert (task.uuid, task.id, task.name, task.state) == ("1", "1", "proj.add", "SUCCESS")
    assert [task.sent, task.received, task.started, task.succeeded] == [NOW + 1, NOW + 2, NOW + 3, NOW + 4]
    assert (task.failed, task.traceback, task.timestamp, task.clock) == (None, None, NOW + 4, 4)
    assert (task.client, task.worker.hostname, task.origin) == ("gen1@h", "w1@h", "w1@h.7")
    assert task.routing_key == "celery" and task.root is task and task.parent is None
    assert task.info() == {
        "args": "(1,)", "kwargs": "{}", "retries": 0, "result": "5", "runtime": 0.5, "exchange": "",
        "routing_key": "celery", "root_id": "1",
    }  # fmt: skip
    assert task.info(["uuid"], extra=["state"]) == {"uuid": "1", "state": "SUCCESS"}
    assert task.as_dict()["worker"] == "w1@h" and set(task.as_dict()) > set(task.info())
    assert repr(task) == "<Task: proj.add(1) SUCCESS clock:4>"
    assert (state.event_count, state.task_count) == (4, 1)
    with pytest.raises(AttributeError):
        _ = task.colour


def test_events_that_overtake_each_other_come_to_the_same(story: Story) -> None:
    """Every order of a run's events, and of a run after a retry with its parts told twice."""
    simple = story.run("1", "failed", exception="E()", traceback="...")
    retried = [*story.run("2", "retried", exception="later"), *story.run("2", result="5", runtime=0.1)]
    for events in (simple, retried):
        expected = None
        orders = list(itertools.permutations(events))
        seed = random.randrange(2**32)
        for order in [orders[0], *random.Random(seed).sample(orders, min(200, len(orders)))]:
            state = told(State(), *order)
            (task,) = state.tasks.values()
            found = {name: getattr(task, name) for name in ("state", "name", "args", "result", "exception")}
            # What the runs have in common.  That there was a retry may be heard before or after.
            expected = expected or found
            assert found["state"] == expected["state"], f"seed {seed}: {[one['type'] for one in order]}"
            assert (found["name"], found["args"]) == ("proj.add", "(1,)")
            assert found["result"] == expected["result"] and task.newest[0] == events[-1]["timestamp"]


def test_clocks_of_two_workers_are_not_compared(story: Story) -> None:
    first = story.run("1", "retried")
    for one in first:
        one["clock"] += 1000  # that worker has been there for long
    second = story.run("1")
    for one in second:
        one["hostname"] = "w2@h"
    state = told(State(), *first, *second)
    assert state.tasks["1"].state == "SUCCESS"
    assert state.tasks["1"].worker.hostname == "w2@h"


def test_a_message_that_is_delivered_again_runs_again(story: Story) -> None:
    state = told(State(), *story.run("1", "failed"))
    state.event(story.run("1")[0])
    assert state.tasks["1"].state == "RECEIVED"


def test_fields_of_an_event_do_not_hide_methods_or_what_is_known_otherwise(story: Story) -> None:
    own = {"worker": "x", "children": 3, "cluster_state": "y", "newest": 0}
    state = told(State(), *story.run("1", "progress", event=1, info=2, percent=50, **own))
    state.event(story.event("task-succeeded", uuid="1"))
    task = state.tasks["1"]
    assert (task.state, task.percent) == ("SUCCESS", 50)
    assert (task.as_dict()["worker"], task.as_dict()["children"]) == ("w1@h", [])
    assert list(state.tasks_by_time()) == [("1", task)]


def test_tasks_are_found_by_time_type_and_worker(story: Story) -> None:
    state = State()
    for number in range(4):
        told(state, *story.run(str(number), name=f"proj.t{number % 2}"))
    other = story.event("task-received", "w2@h", uuid="x", name="proj.other")
    told(state, other)
    assert [uuid for uuid, _ in state.tasks_by_time()] == ["x", "3", "2", "1", "0"]
    assert [uuid for uuid, _ in state.tasks_by_time(limit=2, reverse=False)] == ["0", "1"]
    assert [uuid for uuid, _ in state.tasks_by_type("proj.t1")] == ["3", "1"]
    assert [uuid for uuid, _ in state.tasks_by_worker("w1@h", limit=1)] == ["3"]
    assert [task.uuid for task in state.tasks_by_worker["w2@h"]] == ["x"]
    assert list(state.tasks_by_type("nobody")) == []
    assert state.task_types() == ["proj.other", "proj.t0", "proj.t1"]
    assert [uuid for uuid, _ in state.itertasks(limit=2)] == ["0", "1"]


def test_children_are_known_whoever_comes_first(story: Story) -> None:
    state = State()
    for uuid, parent in (("child1", "parent"), ("parent", None), ("child2", "parent")):
        state.event(story.event("task-received", uuid=uuid, name="n", parent_id=parent, root_id="parent"))
    parent = state.tasks["parent"]
    assert {child.uuid for child in parent.children} == {"child1", "child2"}
    assert state.tasks["child1"].parent is parent and state.tasks["child2"].root is parent
    assert parent.as_dict()["children"] == ["child1", "child2"]


def test_memory_is_bounded(story: Story) -> None:
    state = State(max_tasks_in_memory=10, max_workers_in_memory=3)
    for number in range(50):
        told(state, story.event("task-received", f"w{number}@h", uuid=str(number), name=f"n{number}",
                                parent_id="gone"))  # fmt: skip
        told(state, story.event("worker-heartbeat", f"w{number}@h"))
    # What something is still heard of is kept.
    told(state, story.event("task-started", "w49@h", uuid="40"))
    told(state, story.event("task-received", "w49@h", uuid="50"))
    assert list(state.tasks) == [*map(str, range(42, 50)), "40", "50"]
    assert list(state.workers) == ["w47@h", "w48@h", "w49@h"]
    assert len(state.task_types()) <= 12
    for number in range(2500):
        state.event(story.event("task-received", f"pod{number}@h", uuid=f"p{number}", name=f"n{number}"))
    assert len(state.tasks_by_type) <= 1010 and len(state.tasks_by_worker) <= 1010
    state.clear_tasks(ready=True)
    assert len(state.tasks) == 10
    state.clear(ready=False)
    assert (len(state.tasks), len(state.workers), state.event_count, state.task_types()) == (0, 0, 0, [])


def test_what_is_not_of_this_kind_changes_nothing(story: Story) -> None:
    state = State()
    for kind in ("other-thing", "nothing", "task-started", "worker-online"):
        event = story.event(kind)
        event["hostname"] = None
        assert state.event(event)[0] == (None, False)
    assert (len(state.tasks), len(state.workers), state.event_count) == (0, 0, 4)


# -- workers -------------------------------------------------------------------------------------


def test_a_worker_comes_lives_and_goes(story: Story) -> None:
    joined: List[Optional[str]] = []
    left: List[Optional[str]] = []
    state = State(
        on_node_join=lambda one: joined.append(one.hostname),
        on_node_leave=lambda one: left.append(one.hostname),
    )
    fields = {"freq": 2.0, "active": 1, "processed": 9, "loadavg": [1, 2, 3], "sw_ident": "miniq"}
    (worker, created), _ = state.event(story.event("worker-online", **fields))
    assert created and (worker.id, worker.active, worker.processed) == ("w1@h.7", 1, 9)
    assert worker.heartbeat_expires == NOW + 1.25 + 4.0
    assert worker.is_alive(NOW + 5.0) and not worker.is_alive(NOW + 6.0)
    assert (worker.alive, worker.status_string) == (False, "OFFLINE"), "that was long ago"
    for _ in range(6):
        state.event(story.event("worker-heartbeat", **fields))
    assert worker.heartbeats == [NOW + number + 0.25 for number in (4, 5, 6, 7)]
    assert (joined, left) == (["w1@h"], [])
    state.event(story.event("worker-offline", **fields))
    assert (left, worker.heartbeats, list(state.workers)) == (["w1@h"], [], [])
    assert heartbeat_expires(10.0, 2) == 14.0
    assert worker == Worker("w1@h") != Worker("w2@h") and hash(worker) == hash("w1@h")


def test_only_workers_that_were_heard_of_lately_are_alive(story: Story) -> None:
    state = told(State(), story.event("worker-online", "old@h", freq=2.0))
    told(state, story.event("worker-online", "new@h", freq=2.0, local_received=time.time()))
    assert [worker.hostname for worker in state.alive_workers()] == ["new@h"]
    assert repr(state.workers["new@h"]) == "<Worker: new@h (ONLINE)>"


def test_a_clock_that_is_wrong_is_told_once(story: Story, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    state = State()
    for _ in range(3):
        state.event(story.event("worker-heartbeat", local_received=NOW + 3600))
    assert len(caplog.records) == 1 and "w1@h" in caplog.text


# -- as a whole ----------------------------------------------------------------------------------


def test_a_state_can_be_kept_and_read_again(story: Story) -> None:
    state = State(max_tasks_in_memory=5)
    told(state, *story.run("1"), *story.run("2", "failed"), story.event("worker-online", freq=2.0))
    told(state, story.event("task-received", uuid="3", name="n", parent_id="2"))
    again = pickle.loads(pickle.dumps(state))
    assert [uuid for uuid, _ in again.tasks_by_time()] == ["3", "2", "1"]
    assert again.task_types() == ["n", "proj.add"] and again.event_count == state.event_count
    assert again.tasks["3"].parent is again.tasks["2"]
    assert [child.uuid for child in again.tasks["2"].children] == ["3"]
    told(again, *story.run("4"), *story.run("5"), *story.run("6"))
    assert len(again.tasks) == 5


def test_a_state_can_be_filled_by_hand(story: Story) -> None:
    state = State(tasks={"1": Task("1", name="n", state="STARTED")}, workers={"w": Worker("w")})
    state.tasks["2"] = Task("2", name="m", parent_id="1")
    state.rebuild_taskheap()
    assert state.task_types() == ["m", "n"] and state.tasks["2"].parent is state.tasks["1"]


def test_a_callback_hears_everything_first(story: Story) -> None:
    seen: List[Any] = []
    state = State(callback=lambda state, event: seen.append((event["type"], len(state.tasks))))
    told(state, *story.run("1"))
    assert seen == [("task-received", 0), ("task-started", 1), ("task-succeeded", 1)]


def test_nothing_changes_while_somebody_looks(story: Story) -> None:
    state = told(State(), *story.run("1"), *story.run("2")[:2])
    looking, go_on = threading.Event(), threading.Event()

    def look() -> int:
        looking.set()
        assert go_on.wait(20)
        return len(state.tasks)

    found: List[int] = []
    looker = threading.Thread(target=lambda: found.append(state.freeze_while(look, clear_after=True)))
    looker.start()
    assert looking.wait(20)
    writer = threading.Thread(target=state.event, args=(story.run("3")[0],))
    writer.start()
    go_on.set()
    looker.join()
    writer.join()
    assert found == [2]
    assert set(state.tasks) == {"2", "3"}, "what has ended is forgotten, what came is not"


# -- cameras -------------------------------------------------------------------------------------


class Pictures(Polaroid):
    clear_after = True
    taken: ClassVar[List[List[str]]] = []
    cleaned = 0

    def on_shutter(self, state: State) -> None:
        if state.event_count:
            self.taken.append(list(state.tasks))
            if self.taken.count(["bad"]) == 1:
                raise ValueError("the film is full")

    def on_cleanup(self) -> None:
        type(self).cleaned += 1


@pytest.fixture
def pictures(monkeypatch: Any) -> List[List[str]]:
    taken: List[List[str]] = []
    monkeypatch.setattr(Pictures, "taken", taken)
    return taken


@pytest.fixture
def app() -> MiniQ:
    return MiniQ("t", broker="memory://", backend="memory://")


def test_a_camera_takes_pictures_and_the_last_one_at_the_end(
    app: MiniQ, story: Story, pictures: List[List[str]], caplog: pytest.LogCaptureFixture
) -> None:
    state = State()
    seen: List[Any] = []
    with Pictures(state, freq=0.01, cleanup_freq=0.0, app=app) as camera:
        camera.shutter_signal.connect(lambda sender, **_: seen.append(sender), weak=False)
        camera.install()  # once more does nothing
        state.freeze_while(told, state, *story.run("1"))
        wait_until(lambda: pictures == [["1"]], what="a picture")
        state.freeze_while(told, state, *story.run("bad"))
        wait_until(lambda: len(pictures) == 3 and Pictures.cleaned, what="another one, as the first failed")
        wait_until(lambda: not state.tasks)
        state.freeze_while(told, state, *story.run("3"))
    assert pictures == [["1"], ["bad"], ["bad"], ["3"]]
    assert set(map(id, seen)) == {id(state)}
    assert "The camera failed" in caplog.text and "the film is full" in caplog.text


def test_a_camera_takes_no_more_pictures_than_it_may(app: MiniQ, story: Story, pictures: List[Any]) -> None:
    state = told(State(), *story.run("1"))
    camera = Pictures(state, maxrate="1/m", app=app)
    for _ in range(5):
        camera.capture()
        told(state, *story.run("2"))
    assert pictures == [["1"]]
    assert list(state.tasks) == ["2"], "it is in no picture yet"
    camera.shutter()
    assert pictures == [["1"], ["2"]]


def test_evcam_keeps_what_is_told(app: MiniQ, pictures: List[List[str]]) -> None:
    stop = KeyboardInterrupt("enough")

    class Once(Pictures):
        def on_shutter(self, state: State) -> None:
            super().on_shutter(state)
            if pictures:
                raise_in_receiver.set()

    raise_in_receiver = threading.Event()
    ended: List[BaseException] = []

    def watch() -> None:
        try:
            evcam(Once, freq=0.01, app=app)
        except BaseException as error:
            ended.append(error)

    real_event = State.event

    def event(self: State, event: Dict[str, Any]) -> Any:
        if raise_in_receiver.is_set():
            raise stop
        return real_event(self, event)

    State.event = event  # type: ignore[method-assign]
    try:
        watcher = threading.Thread(target=watch)
        watcher.start()
        ours = EventDispatcher(app=app, hostname="w@h")

        def told_and_ended() -> bool:
            ours.send("task-received", uuid="1", name="n")
            return bool(ended)

        wait_until(told_and_ended, 20.0, "evcam ends when it is interrupted", 0.02)
        watcher.join()
    finally:
        State.event = real_event  # type: ignore[method-assign]
    assert ended == [stop] and pictures[0] == ["1"]

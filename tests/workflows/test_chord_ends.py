# SPDX-License-Identifier: MIT
"""Ends of chords that generated workflows have come upon."""

from __future__ import annotations

from typing import Any, Callable, Iterator, List

import pytest

from miniq import MiniQ, chain, chord, group
from miniq.exceptions import ChordError, Ignore
from miniq.flow import part_of
from miniq.signatures import new_task_id
from miniq.task import Context
from miniq.testing import start_worker
from miniq.worker.settlement import Batch


@pytest.fixture
def app(make_app: Callable[..., MiniQ]) -> MiniQ:
    url = f"memory://{new_task_id()}"
    app = make_app("ends", broker=url, backend=url)

    @app.task(name="echo")
    def echo(*args: Any) -> List[Any]:
        return list(args)

    @app.task(name="ignore")
    def ignore(*_: Any) -> None:
        raise Ignore("on purpose")

    @app.task(name="fail")
    def fail(*_: Any) -> None:
        raise ValueError("on purpose")

    @app.task(name="instead", bind=True)
    def instead(self: Any, kind: str) -> None:
        item = app.signature("echo", (1,), immutable=True)
        self.replace(group(item) if kind == "group" else chain(item, group(item, item)))

    return app


@pytest.fixture
def working(app: MiniQ) -> Iterator[MiniQ]:
    with start_worker(app, pool="threads", concurrency=2):
        yield app


def test_chord_fails_whose_member_is_a_chain_that_ends_with_an_ignored_step(working: MiniQ) -> None:
    s = working.signature
    later = s("echo").set(task_id="later")
    result = chord([s("echo"), chain(s("ignore"), later)], s("echo")).apply_async()
    with pytest.raises(ChordError, match="later"):
        result.get(timeout=10)
    assert working.AsyncResult("later").state == "FAILURE"


def test_members_of_a_body_that_is_gathered_hear_that_the_header_failed(working: MiniQ) -> None:
    s = working.signature
    heard: List[str] = []

    @working.task(name="hear")
    def hear(request: Any, error: BaseException, traceback: Any) -> None:
        heard.append(request.id)

    body = group(s("echo").set(task_id=name).on_error(hear.s()) for name in ("one", "two"))
    inner = chord([s("fail")], body)
    with pytest.raises(ChordError):
        chord([inner, s("echo")], s("echo")).apply_async().get(timeout=10)
    assert sorted(heard) == ["one", "two"]


def test_group_before_an_empty_group_is_that_group(working: MiniQ) -> None:
    s = working.signature
    found = group(s("echo", (1,)), s("echo", (2,))) | group([], app=working)
    assert found.apply_async().get(timeout=10) == [[1], [2]]


@pytest.mark.parametrize("kind, value", [("group", [[1]]), ("chain", [[1], [1]])])
def test_what_ends_in_a_group_has_its_values_under_the_id_of_the_task_it_replaces(
    working: MiniQ, kind: str, value: Any
) -> None:
    assert working.signature("instead", (kind,)).apply_async().get(timeout=10) == value


def test_members_that_are_counted_again_in_one_batch_bring_one_body(app: MiniQ) -> None:
    with start_worker(app) as worker:
        chords, backend = worker.tasks.settler.chords, worker.tasks.backend
        body = app.signature("echo").set(task_id="body")
        backend.start_chord("g", 3, b"{}", None)
        parts = [
            part_of(
                Context(id=f"m{index}", group="g", group_index=index, chord=body, root_id="r"),
                "SUCCESS", index, "json", None,
            )
            for index in range(3)
        ]  # fmt: skip
        for _ in range(2):  # as after a turn whose answer got lost
            batch = Batch(chords)
            chords.arrive([*parts, *parts], backend, batch)
            assert [one.message.headers["id"] for one in batch.publications] == ["body"]

# SPDX-License-Identifier: MIT
"""Shared tasks: one function, a task in every app."""

from __future__ import annotations

import threading
from typing import Any, List

import pytest
from bench import Bench, new_broker

import miniq
from miniq import MiniQ, Task, shared_task
from miniq.exceptions import NotRegistered


def make_app(name: str, **settings: Any) -> MiniQ:
    return MiniQ(name, broker=new_broker(), **settings)


def test_it_is_in_apps_made_before_and_after() -> None:
    before = make_app("before")

    @shared_task
    def add_everywhere(x: int, y: int) -> int:
        return x + y

    after = make_app("after")
    name = f"{__name__}.add_everywhere"
    assert before.tasks[name].app is before
    assert after.tasks[name].app is after
    assert before.tasks[name] is not after.tasks[name]
    assert add_everywhere(2, 3) == 5


def test_what_is_called_belongs_to_the_current_app() -> None:
    one, two = make_app("one"), make_app("two")

    @shared_task(name="shared.where", bind=True)
    def where(self: Task) -> Any:
        return self.app

    assert where() is two
    one.set_current()
    assert where() is one
    assert where.name == "shared.where"
    assert where.delay().app is one


def test_options_hold_in_every_app() -> None:
    @shared_task(name="shared.options", max_retries=7, bind=True)
    def act(self: Task) -> None: ...

    app = make_app("app")
    assert (act.max_retries, app.tasks["shared.options"].max_retries) == (7, 7)


def test_it_stands_for_a_task_in_every_way() -> None:
    app = make_app("app")

    @shared_task(name="shared.everything")
    def act(x: int) -> int:
        """Act."""
        return x

    real = app.tasks["shared.everything"]
    assert isinstance(act, Task)
    assert act == real
    assert act.__doc__ == "Act."
    assert act.s(1) == real.s(1)
    assert app.register_task(act) is real
    act.max_retries = 1
    assert real.max_retries == 1
    assert repr(act) == "<shared task shared.everything>"
    assert Bench(app).call(real, 5).state == "SUCCESS"


def test_inside_a_task_it_is_the_task_of_that_tasks_app() -> None:
    first = make_app("first")
    second = make_app("second")

    @shared_task(name="shared.inner")
    def inner() -> None: ...

    seen: List[Any] = []
    outer = first.task(name="outer")(lambda: seen.append(inner.app))
    ended = threading.Thread(target=Bench(first).call, args=(outer,))
    ended.start()
    ended.join()
    assert seen == [first]
    assert miniq.current_app is second


def test_without_any_app_a_default_one_is_made() -> None:
    @shared_task(name="shared.default")
    def act() -> int:
        return 5

    assert act() == 5
    assert miniq.current_app.main == "default"
    assert "shared.default" in miniq.current_app.tasks


def test_the_name_follows_the_app_that_makes_names() -> None:
    class Upper(MiniQ):
        def gen_task_name(self, name: str, module: str) -> str:
            return name.upper()

    @shared_task
    def act_by_name() -> None: ...

    app = Upper("upper", broker=new_broker())
    assert "ACT_BY_NAME" in app.tasks
    assert act_by_name.name == "ACT_BY_NAME"


def test_an_app_task_can_be_shared_on_demand() -> None:
    one, two = make_app("one"), make_app("two")

    @one.task(name="shared.later", shared=True)
    def act() -> None: ...

    @one.task(name="not.shared")
    def mine() -> None: ...

    assert two.tasks["shared.later"].app is two
    assert act.app is one
    with pytest.raises(NotRegistered):
        two.tasks["not.shared"]


def test_positional_options_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="keywords only"):
        shared_task("name")  # type: ignore[call-overload]

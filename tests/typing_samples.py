# SPDX-License-Identifier: MIT
"""What type checkers make of tasks; checked by ``mypy --strict``, never run by pytest.

Every ``type: ignore`` in here is a mistake that must be found: with ``warn_unused_ignores`` (part
of strict) one that is not found is an error itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Coroutine, List, Optional

from miniq import AsyncResult, MiniQ, Task, shared_task

if TYPE_CHECKING:
    from typing_extensions import assert_type

    app = MiniQ("samples")

    # -- a plain function keeps its parameters and its value --------------------------------------

    @app.task
    def add(x: int, y: int = 0, *, label: str = "") -> float:
        return x + y

    assert_type(add(1, y=2), float)
    assert_type(add.delay(1, 2, label="x"), AsyncResult[float])
    assert_type(add.delay(1).get(timeout=5), float)
    assert_type(add.apply_async((1,), countdown=5).get(), float)
    assert_type(add.name, str)
    add.delay("1")  # type: ignore[arg-type]
    add.delay()  # type: ignore[call-arg]
    add.delay(1, labl="x")  # type: ignore[call-arg]
    add(1, 2, 3)  # type: ignore[arg-type, call-arg]
    add.dellay(1)  # type: ignore[attr-defined]
    add.apply_async(5)  # type: ignore[arg-type]

    @app.task
    def untyped(x, y):  # type: ignore[no-untyped-def]
        return x + y

    assert_type(untyped(1, 2), Any)
    assert_type(untyped.delay(1, 2).get(), Any)
    untyped.delay(1)  # type: ignore[call-overload]

    # -- with options, bound, asynchronous ---------------------------------------------------------

    @app.task(max_retries=5, autoretry_for=(OSError,))
    def fetch(url: str) -> bytes:
        return url.encode()

    assert_type(fetch.delay("x").get(), bytes)
    fetch.delay(5)  # type: ignore[arg-type]
    assert_type(fetch.some_attribute_of_mine, Any)

    @app.task(bind=True, max_retries=5)
    def again(self: Task, url: str) -> Optional[int]:
        raise self.retry(countdown=5)

    assert_type(again.delay("x").get(), Optional[int])
    assert_type(again("x"), Optional[int])
    again.delay()  # type: ignore[call-arg]

    @app.task(bind=True)
    def with_keywords(self: Task, **options: int) -> str:
        return ""

    assert_type(with_keywords.delay(a=1).get(), str)

    @app.task
    async def wait(seconds: float) -> str:
        return "done"

    assert_type(wait.delay(1.5).get(), str)
    wait.delay("1")  # type: ignore[call-overload]

    async def caller() -> None:
        assert_type(await wait(1), str)

    @app.task(queue="slow")
    async def wait_slowly(seconds: float) -> str:
        return "done"

    assert_type(wait_slowly.delay(1).get(), str)

    # -- shared tasks ---------------------------------------------------------------------------------

    @shared_task
    def everywhere(x: int) -> List[int]:
        return [x]

    assert_type(everywhere.delay(1).get(), List[int])
    everywhere.delay("1")  # type: ignore[arg-type]

    @shared_task(bind=True)
    def bound_everywhere(self: Task, x: int) -> int:
        return x

    assert_type(bound_everywhere.delay(1).get(), int)

    # -- what is not typed stays usable ------------------------------------------------------------------

    def takes_any_task(task: Task) -> AsyncResult:
        return task.delay(1, 2, 3)

    takes_any_task(add)
    takes_any_task(wait)
    unknown: AsyncResult = app.send_task("somewhere.else", (1,), queue="q")
    value: Any = unknown.get()
    call: Callable[[float], Coroutine[Any, Any, str]] = wait

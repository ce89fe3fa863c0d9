# SPDX-License-Identifier: MIT
"""Tasks: how they are defined, named, checked and called inline."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import pickle
import pickletools
import sys
import types
import warnings
from typing import Any, Callable, Iterator, List

import pytest
from bench import Bench, body_of, new_broker, run_of

import miniq
from miniq import MiniQ, Task
from miniq.exceptions import (
    DuplicateTaskNameWarning,
    ImproperlyConfigured,
    MaxRetriesExceededError,
    NotRegistered,
    Retry,
)


@pytest.fixture
def app() -> MiniQ:
    return MiniQ("tests", broker=new_broker())


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    """A module in which something can be defined so that others can import it."""
    made = types.ModuleType("made_up_project")
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]


# -- names and the registry ------------------------------------------------------------------------


def test_a_decorated_function_is_a_registered_task_and_still_a_function(app: MiniQ) -> None:
    @app.task
    def add(x: int, y: int) -> int:
        """Add."""
        return x + y

    assert add.name == f"{__name__}.add"
    assert app.tasks[add.name] is add
    assert isinstance(add, Task)
    assert isinstance(add, app.Task)
    assert add(2, 3) == 5
    assert add.__doc__ == "Add."
    assert add.__wrapped__(1, 1) == 2


def test_main_stands_for_the_module_of_a_script_and_of_its_spawned_children(app: MiniQ) -> None:
    for module in ("__main__", "__mp_main__"):
        assert app.gen_task_name("add", module) == "tests.add"
        assert MiniQ(broker="memory://task").gen_task_name("add", module) == "__main__.add"
    assert app.gen_task_name("add", "proj.tasks") == "proj.tasks.add"


def test_gen_task_name_can_be_overridden() -> None:
    class Short(MiniQ):
        def gen_task_name(self, name: str, module: str) -> str:
            return name.upper()

    app = Short("tests", broker="memory://task")

    @app.task
    def add() -> None: ...

    assert add.name == "ADD"


def test_an_unknown_name_raises_not_registered(app: MiniQ) -> None:
    with pytest.raises(NotRegistered):
        app.tasks["nobody"]
    with pytest.raises(NotRegistered):
        app.tasks.unregister("nobody")


def test_a_task_can_be_unregistered_by_name_or_object(app: MiniQ) -> None:
    one, two = app.task(name="one")(lambda: 1), app.task(name="two")(lambda: 2)
    app.tasks.unregister(one)
    app.tasks.unregister("two")
    assert not app.tasks
    app.tasks.register(two)
    assert "two" in app.tasks


def test_another_function_under_a_name_that_is_taken_warns(app: MiniQ) -> None:
    app.task(name="same")(sorted)
    with pytest.warns(
        DuplicateTaskNameWarning, match=r"'same': builtins.len takes the place of builtins.sorted"
    ):
        app.task(name="same")(len)


def test_two_closures_of_one_function_warn(app: MiniQ) -> None:
    def make(factor: int) -> Any:
        @app.task
        def scale(x: int) -> int:
            return x * factor

        return scale

    make(2)
    with pytest.warns(DuplicateTaskNameWarning, match="scale"):
        make(3)


def test_the_same_function_again_is_the_same_task(app: MiniQ) -> None:
    def add() -> None: ...

    assert app.task(add) is app.task(add)


def test_a_module_that_is_read_again_replaces_its_tasks_silently(app: MiniQ) -> None:
    source = "@app.task\ndef add(): return {}"
    for value in (1, 2):
        exec(source.format(value), {"app": app, "__name__": "notebook"})
    assert app.tasks["notebook.add"]() == 2


# -- what can be a task ----------------------------------------------------------------------------


def test_the_name_as_a_positional_argument_is_a_type_error(app: MiniQ) -> None:
    with pytest.raises(TypeError, match="name='...'"):
        app.task("proj.add")  # type: ignore[call-overload]


@pytest.mark.parametrize("wrong", [None, 5, "text"])
def test_what_is_not_callable_is_a_type_error(app: MiniQ, wrong: Any) -> None:
    with pytest.raises(TypeError, match="made of a function"):
        app.task(name="x")(wrong)


def test_a_task_of_a_task_is_a_type_error(app: MiniQ) -> None:
    with pytest.raises(TypeError, match="made of a function"):
        app.task(app.task(lambda: 1))


def test_a_partial_needs_a_name_and_then_works(app: MiniQ) -> None:
    with pytest.raises(TypeError, match="name="):
        app.task(functools.partial(pow, 2))
    power = app.task(name="power")(functools.partial(pow, 2))
    assert power(5) == 32
    assert Bench(app).call(power, 3).state == "SUCCESS"


def test_a_callable_object_can_be_bound(app: MiniQ) -> None:
    class Adder:
        def __call__(self, task: Any, x: int) -> Any:
            return task.name, x

    adder = app.task(name="adder", bind=True)(Adder())
    assert adder(3) == ("adder", 3)


def test_a_bound_method_can_be_a_task(app: MiniQ) -> None:
    class Greeter:
        def greet(self, name: str) -> str:
            return f"hello {name}"

    greet = app.task(Greeter().greet)
    assert greet("you") == "hello you"
    greet.delay("you")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'name'"):
        greet.delay()  # type: ignore[call-arg]


def test_a_builtin_without_a_signature_is_not_checked(app: MiniQ) -> None:
    largest = app.task(name="largest")(max)
    assert Bench(app).call(largest, 1, 2).state == "SUCCESS"


# -- options ---------------------------------------------------------------------------------------


def test_every_keyword_becomes_an_attribute(app: MiniQ) -> None:
    @app.task(max_retries=7, my_own_thing="x", queue="q")
    def add() -> None: ...

    assert (add.max_retries, add.my_own_thing, add.queue) == (7, "x", "q")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_retry", "max_retries"),
        ("rate_limits", "rate_limit"),
        ("autoretry", "autoretry_for"),
        ("acks_latee", "acks_late"),
        ("ignore_results", "ignore_result"),
        ("soft_limit", "soft_time_limit"),
    ],
)
def test_a_misspelt_option_names_the_right_one(app: MiniQ, wrong: str, right: str) -> None:
    with pytest.raises(TypeError, match=f"{wrong}.*did you mean '{right}'"):
        app.task(**{wrong: 1})(len)


def test_an_attribute_of_the_base_class_is_no_misspelling(app: MiniQ) -> None:
    class Base(Task):
        max_retry = 3

    assert app.task(base=Base, max_retry=5)(len).max_retry == 5


@pytest.mark.parametrize("option", ["pydantic", "Strategy"])
def test_an_option_that_is_not_built_is_refused(app: MiniQ, option: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=f"option {option} is Celery's"):
        app.task(**{option: True})(len)


def test_a_soft_limit_over_the_hard_one_is_refused(app: MiniQ) -> None:
    with pytest.raises(ValueError, match="soft_time_limit=20 is never reached"):
        app.task(time_limit=10, soft_time_limit=20)(len)


def test_a_rate_limit_that_is_none_is_refused_where_it_is_written(app: MiniQ) -> None:
    with pytest.raises(ValueError, match="10/fortnight"):
        app.task(rate_limit="10/fortnight")(len)


def test_exception_classes_may_be_given_alone_or_in_a_list(app: MiniQ) -> None:
    task = app.task(name="t", throws=KeyError, autoretry_for=[OSError], dont_autoretry_for=None)(len)
    assert (task.throws, task.autoretry_for, task.dont_autoretry_for) == ((KeyError,), (OSError,), ())
    with pytest.raises(TypeError, match="throws must hold exception classes"):
        app.task(throws=["KeyError"])(len)


def test_filter_gets_the_task_and_its_answer_is_what_the_decorator_returns(app: MiniQ) -> None:
    found: Any = app.task(filter=lambda task: [task], name="x")(len)
    assert found == [app.tasks["x"]]


def test_defaults_are_celerys(app: MiniQ) -> None:
    task = app.task(len)
    assert (task.max_retries, task.default_retry_delay, task.retry_backoff_max) == (3, 180, 600)
    assert (task.retry_backoff, task.retry_jitter, task.trail, task.resultrepr_maxsize) == (
        False,
        True,
        True,
        1024,
    )
    assert (task.acks_late, task.ignore_result, task.rate_limit, task.serializer) == (None, None, None, None)


# -- classes ---------------------------------------------------------------------------------------


def test_bind_gives_the_task_as_first_argument(app: MiniQ) -> None:
    @app.task(bind=True)
    def whoami(self: Task, x: int) -> Any:
        return self.name, x

    assert whoami(3) == (f"{__name__}.whoami", 3)


def test_base_is_the_class_and_made_once(app: MiniQ) -> None:
    made: List[Task] = []

    class Base(Task):
        def __init__(self) -> None:
            made.append(self)

    task = app.task(base=Base)(len)
    bench = Bench(app)
    bench.call(task, [1])
    bench.call(task, [1])
    assert isinstance(task, Base)
    assert made == [task]


def test_task_cls_is_the_base_of_all_tasks(module: Any) -> None:
    class Base(Task): ...

    module.Base = Base
    assert isinstance(MiniQ("a", broker="memory://task", task_cls=Base).task(len), Base)
    assert isinstance(MiniQ("a", broker="memory://task", task_cls="made_up_project:Base").task(len), Base)


def test_app_task_can_be_replaced(app: MiniQ) -> None:
    class Base(app.Task):  # type: ignore[name-defined, misc]
        ignore_result = True

    app.Task = Base
    assert app.task(len).ignore_result is True


def test_a_class_based_task_is_registered_as_instance_or_class(app: MiniQ) -> None:
    class Add(Task):
        def run(self, x: int, y: int) -> int:
            return x + y

    class Named(Add):
        name = "my.name"

    add = app.register_task(Add())
    assert add.name == f"{__name__}.Add"
    assert app.register_task(Named).name == "my.name"
    assert Bench(app).call(add, 2, 3).state == "SUCCESS"
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'"):
        add.delay(1)
    assert inspect.unwrap(add) is add


def test_a_class_that_was_not_registered_says_so_when_it_is_called() -> None:
    class Add(Task): ...

    with pytest.raises(ImproperlyConfigured, match=r"register_task\(Add\(\)\)"):
        Add().delay()


def test_a_class_without_a_body_says_so(app: MiniQ) -> None:
    class Empty(Task): ...

    with pytest.raises(NotImplementedError, match="run"):
        app.register_task(Empty)()


def test_a_base_with_its_own_call_wraps_the_body_in_a_worker(app: MiniQ) -> None:
    seen: List[Any] = []

    class InContext(Task):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            seen.append("in")
            try:
                return super().__call__(*args, **kwargs)
            finally:
                seen.append("out")

    @app.task(base=InContext, bind=True)
    def body(self: Task) -> None:
        seen.append(self.request.id)

    Bench(app).call(body, task_id="my-id")
    assert seen == ["in", "my-id", "out"]


def test_a_base_whose_call_runs_the_body_itself_keeps_the_request(app: MiniQ) -> None:
    class FlaskLike(Task):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.run(*args, **kwargs)

    @app.task(base=FlaskLike, bind=True)
    def body(self: Task) -> Any:
        return self.request.id

    bench = Bench(app)
    bench.call(body, task_id="my-id")
    assert bench.meta()["result"] == "my-id"


def test_a_backend_in_a_class_is_the_tasks_own_store(app: MiniQ) -> None:
    class Apart(Task):
        backend = "memory://apart"

        def run(self) -> int:
            return 5

    task = app.register_task(Apart())
    outcome = Bench(app).call(task, task_id="x")
    assert outcome.results == []
    assert task.AsyncResult("x").get(timeout=1) == 5
    assert not app.AsyncResult("x").exists()


# -- arguments are checked before anything is sent -------------------------------------------------


def plain(x: int, y: int) -> None: ...
def defaults(x: int, y: int = 2) -> None: ...
def keyword_only(x: int, *, y: int) -> None: ...
def keyword_only_default(x: int, *, y: int = 1) -> None: ...
def positional_only(x: int, /, y: int) -> None: ...
def variable(x: int, *rest: int, y: int = 1, **more: int) -> None: ...


@functools.wraps(plain)
def adding_one(*args: Any, **kwargs: Any) -> None:
    return plain(1, *args, **kwargs)


@pytest.mark.parametrize(
    ("fun", "args", "kwargs", "words"),
    [
        (plain, (1, 2), {}, None),
        (plain, (1,), {"y": 2}, None),
        (plain, (1,), {}, r"plain\(\) missing 1 required positional argument: 'y'"),
        (plain, (1, 2, 3), {}, r"plain\(\) takes 2 positional arguments but 3 were given"),
        (plain, (1, 2), {"z": 3}, r"plain\(\) got an unexpected keyword argument 'z'"),
        (plain, (1, 2), {"y": 3}, r"plain\(\) got multiple values for argument 'y'"),
        (defaults, (1,), {}, None),
        (defaults, (), {"y": 1}, "missing 1 required positional argument: 'x'"),
        (keyword_only, (1,), {"y": 2}, None),
        (keyword_only, (1, 2), {}, "takes 1 positional argument"),
        (keyword_only, (1,), {}, "missing 1 required keyword-only argument: 'y'"),
        (keyword_only_default, (1,), {}, None),
        (positional_only, (1, 2), {}, None),
        (positional_only, (), {"x": 1, "y": 2}, "positional-only"),
        (variable, (1, 2, 3), {"z": 3}, None),
        (variable, (), {}, "missing 1 required positional argument: 'x'"),
        (adding_one, (2,), {}, None),
    ],
)
def test_arguments_are_checked_with_the_words_of_python(
    app: MiniQ, fun: Callable[..., Any], args: Any, kwargs: Any, words: Any
) -> None:
    task = app.task(fun)
    if words is None:
        task.apply_async(args, kwargs)
        return
    with pytest.raises(TypeError, match=words):
        task.apply_async(args, kwargs)


def test_the_task_itself_is_left_out_of_the_check_when_bound(app: MiniQ) -> None:
    @app.task(bind=True)
    def bound(self: Task, x: int) -> None: ...

    bound.delay(1)
    with pytest.raises(TypeError, match=r"bound\(\) missing 1 required positional argument: 'x'"):
        bound.delay()  # type: ignore[call-arg]


def test_async_functions_are_checked_too(app: MiniQ) -> None:
    @app.task
    async def wait(x: int) -> None: ...

    with pytest.raises(TypeError, match=r"wait\(\) missing"):
        wait.delay()  # type: ignore[call-overload]


def test_typing_off_leaves_the_check_to_the_worker(app: MiniQ) -> None:
    task = app.task(name="unchecked", typing=False)(plain)
    task.delay()  # type: ignore[call-arg]
    outcome = Bench(app).call(task)
    assert outcome.state == "FAILURE"
    lax = MiniQ("lax", broker="memory://task", strict_typing=False)
    lax.task(plain).delay()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        lax.task(name="checked", typing=True)(plain).delay()  # type: ignore[call-arg]


def test_text_as_args_is_refused(app: MiniQ) -> None:
    with pytest.raises(TypeError, match=r"args=\('hello',\)"):
        app.task(len).apply_async("hello")


# -- annotations -----------------------------------------------------------------------------------


def test_annotations_change_tasks_defined_before_and_after(app: MiniQ) -> None:
    before = app.task(name="before")(len)
    app.conf.task_annotations = {"*": {"max_retries": 9}, "after": {"rate_limit": "10/s", "max_retries": 1}}
    after = app.task(name="after")(len)
    assert (before.max_retries, before.rate_limit) == (9, None)
    assert (after.max_retries, after.rate_limit) == (1, "10/s")


def test_an_annotated_function_is_a_method(app: MiniQ) -> None:
    seen: List[Any] = []

    def on_failure(self: Task, exc: Any, task_id: Any, args: Any, kwargs: Any, einfo: Any) -> None:
        seen.append((self.name, exc))

    app.conf.task_annotations = {"*": {"on_failure": on_failure}}

    @app.task(name="boom")
    def boom() -> None:
        raise ValueError("no")

    Bench(app).call(boom)
    assert [(name, str(exc)) for name, exc in seen] == [("boom", "no")]


def test_annotations_may_be_objects_paths_or_a_list(app: MiniQ, module: Any) -> None:
    class Annotate:
        def annotate(self, task: Task) -> Any:
            return {"max_retries": 5} if task.name.startswith("a") else None

    module.Annotate = Annotate
    app.conf.task_annotations = ["made_up_project:Annotate", {"b": {"max_retries": 6}}]
    assert [app.task(name=name)(len).max_retries for name in "abc"] == [5, 6, 3]
    app.conf.task_annotations = None  # the path leads nowhere after this test


def test_a_misspelt_annotation_is_refused(app: MiniQ) -> None:
    app.task(name="t")(len)
    with pytest.raises(TypeError, match="task_annotations.*did you mean 'rate_limit'"):
        app.conf.task_annotations = {"t": {"rate_limt": "1/s"}}


def test_other_settings_leave_what_was_set_by_hand(app: MiniQ) -> None:
    app.conf.task_annotations = {"*": {"max_retries": 9}}
    task = app.task(len)
    task.max_retries = 2
    app.conf.task_serializer = "pickle"
    assert task.max_retries == 2


# -- inline calls ----------------------------------------------------------------------------------


def test_a_direct_call_has_a_request_of_its_own(app: MiniQ) -> None:
    @app.task(bind=True)
    def outer(self: Task, depth: int) -> Any:
        seen = [(self.request.called_directly, self.request.args, self.request.id)]
        return seen + (outer(depth - 1) if depth else [])

    assert outer(1) == [(True, (1,), None), (True, (0,), None)]
    bench = Bench(app)
    bench.call(outer, 1, task_id="my-id")
    assert bench.meta()["result"] == [[False, [1], "my-id"], [True, [0], None]]


def test_outside_of_a_run_the_request_is_empty(app: MiniQ) -> None:
    task = app.task(len)
    assert task.request.id is None
    assert task.request.called_directly is True
    assert miniq.current_task is None


def test_a_request_can_be_pretended_for_tests_of_a_body(app: MiniQ) -> None:
    @app.task(bind=True)
    def body(self: Task) -> Any:
        return self.request.retries

    body.push_request(retries=2, called_directly=False)
    try:
        assert body.run() == 2
    finally:
        body.pop_request()
    assert body.request.retries == 0


def test_a_coroutine_function_called_directly_gives_a_coroutine(app: MiniQ) -> None:
    @app.task(bind=True)
    async def wait(self: Task, x: int) -> int:
        assert self.request.called_directly
        return x

    assert asyncio.run(wait(3)) == 3


def test_each_asyncio_task_sees_its_own_request(app: MiniQ) -> None:
    @app.task(bind=True)
    async def wait(self: Task) -> Any:
        await asyncio.sleep(0)
        return self.request.id

    bench = Bench(app)
    runs = [bench.prepare(wait, task_id=str(number)) for number in range(5)]

    async def main() -> Any:
        return await asyncio.gather(*(bench.runner.run_async(run_of(one)) for one in runs))

    outcomes = asyncio.run(main())
    assert [
        b'"result": "%d"' % number in outcome.results[0].body for number, outcome in enumerate(outcomes)
    ] == [True] * 5


# -- retry outside of a worker ---------------------------------------------------------------------


def test_retry_called_directly_raises_the_error_itself(app: MiniQ) -> None:
    @app.task(bind=True)
    def again(self: Task, given: bool) -> None:
        raise self.retry(exc=KeyError("x") if given else None)

    with pytest.raises(KeyError):
        again(True)
    with pytest.raises(Retry, match="called directly"):
        again(False)


# -- signatures, pickling, copies ------------------------------------------------------------------


def test_shortcuts_make_signatures(app: MiniQ) -> None:
    task = app.task(name="t")(len)
    assert dict(task.s(1, a=2)) == {
        "task": "t", "args": (1,), "kwargs": {"a": 2}, "options": {},
        "subtask_type": None, "immutable": False,
    }  # fmt: skip
    assert task.si(1).immutable is True
    assert task.signature((1,), countdown=3).options == {"countdown": 3}
    assert task.subtask((1,)).args == (1,)


def pickles(value: Any) -> Any:
    """Return what comes back; nothing on the way may name this package."""
    data = pickle.dumps(value)
    names = [arg for _, arg, _ in pickletools.genops(data) if isinstance(arg, str)]
    assert not [name for name in names if name.startswith("miniq")], names
    return pickle.loads(data)


def test_tasks_apps_and_results_are_pickled_by_the_name_of_the_users_module(module: Any) -> None:
    module.app = app = MiniQ("made_up_project", broker="memory://task")
    module.add = add = app.task(name="made_up_project.add")(lambda x: x)
    assert pickles(app) is app
    assert pickles(add) is add
    result = pickles(add.delay(1))
    assert isinstance(result, miniq.AsyncResult)
    assert result.task_name == add.name
    assert pickles(add.s(1)) == dict(add.s(1))


def test_shared_tasks_are_pickled_as_the_global_they_are(module: Any) -> None:
    def mul() -> None: ...

    mul.__module__, mul.__qualname__ = module.__name__, "mul"
    module.mul = proxy = miniq.shared_task(mul)
    assert pickles(proxy) is proxy


def test_what_cannot_be_found_again_is_not_pickled(app: MiniQ) -> None:
    with pytest.raises(ImproperlyConfigured, match="top level of no module"):
        pickle.dumps(app.task(len))


def test_copies_of_a_task_are_the_task(app: MiniQ) -> None:
    task = app.task(len)
    assert copy.copy(task) is task
    assert copy.deepcopy({"t": [task], "a": app}) == {"t": [task], "a": app}


@pytest.mark.parametrize("name", ["delay_on_commit", "on_replace"])
def test_what_is_not_built_says_so(app: MiniQ, name: str) -> None:
    with pytest.raises(AttributeError, match=f"'{name}': Celery has it, this version of miniq does not"):
        getattr(app.task(len), name)


def test_an_attribute_that_nobody_has_is_a_plain_error(app: MiniQ) -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'$"):
        _ = app.task(len).nonsense  # type: ignore[attr-defined]


def test_update_state_needs_a_state_and_an_id(app: MiniQ) -> None:
    task = app.task(len)
    with pytest.raises(ValueError, match="task_id"):
        task.update_state(state="PROGRESS")
    with pytest.raises(ValueError, match="state="):
        task.update_state("some-id")
    task.update_state("some-id", "PROGRESS", {"done": 1})
    assert (app.AsyncResult("some-id").state, app.AsyncResult("some-id").info) == ("PROGRESS", {"done": 1})


def test_the_exceptions_keep_what_a_task_was_called_with() -> None:
    error = MaxRetriesExceededError("x", task_args=[1], task_kwargs={"a": 2})
    assert (error.task_args, error.task_kwargs) == ([1], {"a": 2})


def test_no_warning_is_left_behind(app: MiniQ) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert body_of(Bench(app).prepare(app.task(name="x")(len), [1]))[0] == [[1]]

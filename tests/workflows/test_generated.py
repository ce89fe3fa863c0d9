# SPDX-License-Identifier: MIT
"""Generated workflows end as an oracle says: states, values, errbacks, and how often everything runs.

`MINIQ_WORKFLOWS` multiplies how many are run on each store, `MINIQ_WORKFLOWS_SEED` runs the one with
that seed everywhere.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Set, Tuple
from urllib.parse import urlsplit

import pytest
from faults import kill_tree
from generated_tasks import File, Notes, add_tasks, signature_of
from oracle import Failed, Generator, Node, Prediction, nodes_of, predict
from proxy import Proxy
from servers import RedisServer
from waiting import wait_until
from workers import POSIX, ROOT, WorkerProcess

from miniq import MiniQ, signals
from miniq.resultbase import read_meta
from miniq.signatures import new_task_id
from miniq.testing import start_worker
from miniq.transports.base import Publication

TIMES = float(os.environ.get("MINIQ_WORKFLOWS", "1"))
ONLY_SEED = os.environ.get("MINIQ_WORKFLOWS_SEED")
#: Seconds for all workflows of a test to end.
TIMEOUT_S = 30.0
ARGS = ["in"]
#: So many workflows are on their way at once.
AT_ONCE = 150
#: How often connections are broken at most, and workers killed.
MOST_BREAKS, KILLS = 10, 2


def seeds(first: int, count: int) -> List[int]:
    """Return the seeds that a test runs."""
    return [int(ONLY_SEED)] if ONLY_SEED else list(range(first, first + max(1, int(count * TIMES))))


class Case:
    """One workflow: sent, and compared with what the oracle says."""

    def __init__(
        self,
        seed: int,
        without: Tuple[str, ...] = (),
        drops_expired: bool = False,
        late: bool = False,
        only_answers: bool = False,
    ) -> None:
        self.seed = seed
        self.tree: Node = Generator(seed, without).tree()
        self.expected: Prediction = predict(self.tree, ARGS)
        #: Every third leaves the ids to miniq; what needs them is not looked at.
        self.explicit = seed % 3 != 0
        self.ids: Dict[str, str] = {}
        self.revoked: List[str] = []
        for node in nodes_of(self.tree):
            node.late |= late
            self.ids[node.label] = new_task_id()
            if node.how == "revoked":
                self.revoked.append(self.ids[node.label])
                self.explicit = True
        for label, alias in self.expected.aliases.items():
            self.ids[label] = self.ids.get(alias) or self.ids[self.expected.aliases[alias]]
        #: RabbitMQ drops what expires before a worker sees it, and no state says so.
        self.may_be_dropped = {
            node.label for node in nodes_of(self.tree) if drops_expired and node.how == "expired"
        }
        if only_answers:
            # Nobody is told of a revoked task whose result nobody wants; callbacks answer to the worker.
            for node in nodes_of(self.tree):
                if node.how == "revoked" and node.ignored:
                    self.may_be_dropped.add(node.label)
                for link in node.links:
                    self.may_be_dropped |= {one.label for one in nodes_of(link)}
        self.result: Any = None

    def send(self, app: MiniQ) -> None:
        try:
            self.result = signature_of(app, self.tree, self.ids, self.explicit).apply_async(ARGS)
        except Exception as error:
            raise AssertionError(f"MINIQ_WORKFLOWS_SEED={self.seed}: {self.tree}") from error

    def differences(
        self, lines: List[List[Any]], states: Dict[str, Tuple[str, Any]], again: bool = False
    ) -> List[str]:
        """Return what is not as expected; `again`: messages may have arrived more than once."""
        found: List[str] = []
        expected = self.expected
        runs: "Counter[Tuple[str, str]]" = Counter()
        errors: "Counter[Tuple[str, str]]" = Counter()
        label_of = {task_id: label for label, task_id in self.ids.items()}
        for label in expected.aliases:
            label_of[self.ids[label]] = label
        for kind, label, what, *rest in lines:
            if kind == "run":
                runs[label, what] += 1
                wanted = self.ids.get(label)
                if self.explicit and rest[0] is not None and wanted not in (None, rest[0]):
                    found.append(f"{label} ran under the id {rest[0]}, not {wanted}")
            else:
                errors[label, label_of.get(what, "?") if self.explicit else "?"] += 1
        wanted_errors: "Counter[Tuple[str, str]]" = Counter()
        for (label, failed), count in expected.errors.items():
            wanted_errors[label, failed if self.explicit and failed in self.ids else "?"] += count
        found += _compare("runs", runs, expected.runs, again, expected.once)
        found += _compare("errbacks", errors, wanted_errors, again, set())
        if self.explicit:
            for label, state in expected.states.items():
                if label not in self.ids:
                    continue
                seen = states.get(self.ids[label])
                if seen is None and label.partition("/")[0] in self.may_be_dropped:
                    continue
                if seen != state and label not in expected.aliases.values():
                    found.append(f"state of {label}: {seen}, not {state}")
        return found

    def check_result(self) -> List[str]:
        """Return what the caller's result says that it should not."""
        if any(node.ignored or node.how == "ignore" for node in nodes_of(self.tree)):
            return []
        expected = self.expected.result
        try:
            value = self.result.get(timeout=5)
        except Exception as error:  # whatever the tasks raised
            if isinstance(expected, Failed):
                return []
            return [f"get() raised {error!r}, not {expected}"]
        if isinstance(expected, Failed) or value != expected:
            return [f"get() returned {value}, not {expected}"]
        return []


def _compare(
    what: str, seen: "Counter[Any]", wanted: "Counter[Any]", again: bool, once: "set[str]"
) -> List[str]:
    found = []
    for key in sorted({*seen, *wanted}):
        enough = seen[key] == wanted[key] or (again and key[0] not in once and 0 < wanted[key] <= seen[key])
        if not enough:
            found.append(f"{what}: {key} seen {seen[key]} times, not {wanted[key]}")
    return found


class Field:
    """Many workflows at once, over one app."""

    def __init__(self, app: MiniQ, journal: Any, cases: List[Case], again: bool = False) -> None:
        self.app, self.journal, self.cases, self.again = app, journal, cases, again

    def revoke(self, worker: Any) -> None:
        """Revoke what is to be revoked, before it is sent."""
        ids = [one for case in self.cases for one in case.revoked]
        if ids:
            self.app.control.revoke(ids)
            wait_until(lambda: set(ids) <= set(worker.tasks.admission.revoked), 10, "revoked ids are known")

    def send(self) -> None:
        for case in self.cases:
            case.send(self.app)

    def differences(self) -> Dict[int, List[str]]:
        lines: Dict[str, List[List[Any]]] = {}
        for line in self.journal.read():
            lines.setdefault(line[1].partition(".")[0], []).append(line)
        ids = [one for case in self.cases for one in case.ids.values()]
        states = {}
        for task_id, stored in self.app.backend.fetch(ids).items():
            meta = read_meta(stored, self.app.result_accept)
            value = meta["result"]
            if isinstance(value, dict) and "exc_type" in value:
                value = value["exc_type"]
            elif isinstance(value, BaseException):
                value = type(value).__name__
            states[task_id] = (meta["status"], value)
        found = {}
        for case in self.cases:
            wrong = case.differences(lines.get(f"s{case.seed}", []), states, self.again)
            if wrong:
                found[case.seed] = wrong
        return found

    def check(self, timeout_s: float = TIMEOUT_S, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until all is as expected, and nothing more is to come; look once more then."""
        deadline_mono = time.monotonic() + timeout_s
        pause_s = 0.02
        while time.monotonic() < deadline_mono and (self.differences() or not self.is_idle()):
            meanwhile()
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, 0.5)
        found = self.differences()
        if not found:
            for case in self.cases:
                wrong = case.check_result()
                if wrong:
                    found[case.seed] = wrong
        assert not found, "\n".join(self.told(found))
        assert self.is_idle()

    def is_idle(self) -> bool:
        return all(
            not (size.ready or size.waiting or size.unacked) for size in self.app.producer.transport.sizes()
        )

    def told(self, found: Dict[int, List[str]]) -> List[str]:
        lines = [f"{len(found)} of {len(self.cases)} workflows are not as expected"]
        by_seed = {case.seed: case for case in self.cases}
        for seed, wrong in list(found.items())[:5]:
            lines += [
                f"MINIQ_WORKFLOWS_SEED={seed}: {by_seed[seed].tree}",
                *(f"    {one}" for one in wrong[:12]),
            ]
        return lines


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep no logs: tasks fail here on purpose, by the hundred."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


class Doubler:
    """Has messages arrive twice: some of those that a worker receives are published again, as they are.

    Bodies of chords are not: of these, nobody else may make a second one.
    """

    def __init__(self, cases: List[Case], seed: int) -> None:
        self._rand = random.Random(seed)
        self._spared = {
            case.ids[label] for case in cases for label in case.expected.once if label in case.ids
        }
        self._seen: Set[str] = set()
        self._waiting: Deque[Publication] = deque()
        self.count = 0

    def __call__(self, request: Any, **_: Any) -> None:
        delivery = request.delivery
        task_id = request.id
        if (
            task_id in self._spared
            or task_id in self._seen
            or request.name in ("celery.map", "celery.starmap")
        ):
            return
        self._seen.add(task_id)
        if self._rand.random() < 0.3:
            copy = Publication(delivery.message, delivery.exchange, delivery.routing_key)
            self._waiting.append(copy)

    def send(self, app: MiniQ) -> None:
        """Publish what was received until now; called again and again, in the thread of the test."""
        while self._waiting:
            self.count += 1
            app.producer.transport.publish([self._waiting.popleft()], 10.0)


@pytest.fixture
def grow(make_app: Callable[..., MiniQ]) -> Callable[..., None]:
    """Run workflows with a worker in this process: ``grow(url, cases, results)``.

    With `again` messages arrive twice; `meanwhile` is called again and again until all have ended,
    `workers` are the URLs (broker, results) that the worker has.
    """

    def run(
        url: str,
        cases: List[Case],
        results: Optional[str] = None,
        again: bool = False,
        meanwhile: Callable[[], None] = lambda: None,
        workers: Optional[Tuple[str, str]] = None,
    ) -> None:
        journal = Notes()
        app = make_app("workflows", broker=url, backend=results or url)
        add_tasks(app, journal)
        at_work = app
        if workers:
            at_work = make_app("workflows", broker=workers[0], backend=workers[1])
            add_tasks(at_work, journal)
        with start_worker(at_work, pool="threads", concurrency=4) as worker:
            for start in range(0, len(cases), AT_ONCE):
                some = cases[start : start + AT_ONCE]
                field = Field(app, journal, some, again or workers is not None)
                doubler = Doubler(some, some[0].seed)
                if again:
                    signals.task_received.connect(doubler)
                field.revoke(worker)
                field.send()

                def look(doubler: Doubler = doubler) -> None:
                    doubler.send(app)
                    meanwhile()

                try:
                    field.check(meanwhile=look)
                finally:
                    signals.task_received.disconnect(doubler)
                assert doubler.count or not again or ONLY_SEED
                journal.lines.clear()

    return run


def test_workflows_end_as_the_oracle_says_in_memory(grow: Callable[..., None]) -> None:
    grow(f"memory://{new_task_id()}", [Case(seed) for seed in seeds(1, 150)])


def test_workflows_end_as_the_oracle_says_in_sqlite(grow: Callable[..., None], sqlite_url: str) -> None:
    grow(sqlite_url, [Case(seed) for seed in seeds(100_001, 40)])


def test_workflows_end_as_the_oracle_says_in_redis(grow: Callable[..., None], redis_url: str) -> None:
    grow(redis_url, [Case(seed) for seed in seeds(200_001, 30)])


def test_workflows_end_as_the_oracle_says_over_rabbitmq_and_redis(
    grow: Callable[..., None], rabbit_url: str, redis_url: str
) -> None:
    cases = [Case(seed, drops_expired=True) for seed in seeds(300_001, 20)]
    grow(rabbit_url, cases, redis_url)


def test_workflows_end_as_the_oracle_says_over_rabbitmq_alone(
    grow: Callable[..., None], rabbit_url: str
) -> None:
    cases = [Case(seed, drops_expired=True, only_answers=True) for seed in seeds(700_001, 10)]
    grow(rabbit_url, cases, "rpc://")


# -- with faults ---------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["memory", "sqlite", "redis", "rabbit", "rpc"])
def test_bodies_run_once_though_messages_arrive_twice(
    grow: Callable[..., None], store: str, request: pytest.FixtureRequest
) -> None:
    first = 400_001
    if store == "memory":
        grow(f"memory://{new_task_id()}", named_cases(first, 40), again=True)
    elif store in ("rabbit", "rpc"):
        url = request.getfixturevalue("rabbit_url")
        results = "rpc://" if store == "rpc" else request.getfixturevalue("redis_url")
        cases = named_cases(first, 10, drops_expired=True, only_answers=store == "rpc")
        grow(url, cases, results, again=True)
    else:
        grow(request.getfixturevalue(f"{store}_url"), named_cases(first, 15), again=True)


def named_cases(first: int, count: int, **options: Any) -> List[Case]:
    """Return cases all of whose ids are known."""
    cases = [Case(seed, **options) for seed in seeds(first, count)]
    for case in cases:
        case.explicit = True
    return cases


@pytest.mark.parametrize("store", ["redis", "rabbit", "rpc"])
def test_workflows_end_as_the_oracle_says_though_connections_break(
    grow: Callable[..., None], store: str, request: pytest.FixtureRequest, redis_server: RedisServer
) -> None:
    results = "rpc://" if store == "rpc" else request.getfixturevalue("redis_url")
    cases = named_cases(500_001, 15, drops_expired=store != "redis", only_answers=store == "rpc")
    if store != "redis":
        for case in cases:
            case.expected.once.clear()  # a confirm that got lost is a message that is sent again
    rand = random.Random(cases[0].seed)
    url = results if store == "redis" else request.getfixturevalue("rabbit_url")
    port = urlsplit(url).port
    assert port is not None
    broken = 0
    with Proxy(port) as proxy:

        def reset() -> None:
            nonlocal broken
            if broken < MOST_BREAKS and rand.random() < 0.5:
                broken += 1
                proxy.reset()

        behind = proxy.url(url)
        grow(url, cases, results, meanwhile=reset, workers=(behind, behind if store == "redis" else results))
    assert broken


SOURCE = """
    from pathlib import Path

    from miniq import MiniQ
    from generated_tasks import File, add_tasks

    app = MiniQ("workflows", broker={broker!r}, backend={results!r})
    app.conf.update({settings!r})
    add_tasks(app, File({journal!r}))
"""


@pytest.mark.skipif(not POSIX, reason="kills process groups")
@pytest.mark.parametrize(
    "store",
    [
        "sqlite",
        "redis",
        pytest.param("rabbit", marks=pytest.mark.skipif(TIMES <= 1, reason="only with MINIQ_WORKFLOWS=n")),
        pytest.param("rpc", marks=pytest.mark.skipif(TIMES <= 1, reason="only with MINIQ_WORKFLOWS=n")),
    ],
)
def test_workflows_end_as_the_oracle_says_though_workers_are_killed(
    make_app: Callable[..., MiniQ],
    worker_process: Callable[..., WorkerProcess],
    tmp_path: Path,
    store: str,
    request: pytest.FixtureRequest,
    tell: Callable[[str], None],
) -> None:
    broker = request.getfixturevalue("rabbit_url" if store == "rpc" else f"{store}_url")
    results = "rpc://" if store == "rpc" else broker
    if store == "rabbit":
        results = request.getfixturevalue("redis_url")
    settings: Dict[str, Any] = {"task_acks_late": True, "task_reject_on_worker_lost": True}
    if store == "redis":
        settings["broker_transport_options"] = {"lease": 1.0}
    journal = File(str(tmp_path / "journal"))
    app = make_app("workflows", broker=broker, backend=results, **settings)
    add_tasks(app, journal)
    cases = named_cases(
        600_001,
        8,
        without=("revoked",),
        drops_expired=store in ("rabbit", "rpc"),
        late=True,
        only_answers=store == "rpc",
    )
    for case in cases:
        case.expected.once.clear()  # what is killed while it runs runs again
    rand = random.Random(cases[0].seed)
    source = SOURCE.format(broker=broker, results=results, settings=settings, journal=journal.path)
    folder = str(Path(__file__).parent)
    alive: List[WorkerProcess] = []

    def start() -> None:
        name = f"w{len(kills) + len(alive)}@h"
        args = ("-P", "prefork", "-c", "2", "-n", name)
        env = {"PYTHONPATH": os.pathsep.join((str(tmp_path), folder, str(ROOT)))}
        alive.append(worker_process(source, *args, loglevel="WARNING", env=env))

    kills: List[str] = []
    start()
    start()
    field = Field(app, journal, cases, again=True)
    for number in range(KILLS):
        before = len(journal.read())
        some = cases[number::KILLS]
        sender = threading.Thread(target=Field(app, journal, some).send)
        sender.start()

        def is_at_work(before: int = before, most: int = 3 * len(some), sender: Any = sender) -> bool:
            return len(journal.read()) > before + most or (not sender.is_alive() and field.is_idle())

        wait_until(is_at_work, 20)
        victim = alive.pop(rand.randrange(2))
        kills.append(str(victim))
        kill_tree(victim)
        sender.join()
        start()
    field.check(timeout_s=60.0)
    ran = Counter((line[1], line[2]) for line in journal.read() if line[0] == "run")
    wanted = sum((case.expected.runs for case in cases), Counter())
    again = sum((ran - wanted).values())
    tell(f"{store}, {KILLS} workers killed: {again} runs more than {sum(wanted.values())}")

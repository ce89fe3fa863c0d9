# SPDX-License-Identifier: MIT
"""State: what is known of workers and tasks from the events that were heard, bounded and in order.

Events come from many machines and may overtake each other, so a task's state is not that of the
event that came last: one that logically comes before the present state only fills in what is not known
yet, and a final state gives way to nothing that happened before it.  What came first is told by the
logical clock among events of one worker, else by the time.

Source: the interface of Celery's module of this name, its attributes and limits included.
"""

from __future__ import annotations

import bisect
import logging
import threading
import time
import weakref
from collections import OrderedDict
from itertools import islice
from typing import (
    Any,
    Callable,
    Dict,
    Generic,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
    TypeVar,
)

from .. import states

logger = logging.getLogger(__name__)

#: A worker is gone when it was silent for so many per cent of its interval between two heartbeats.
HEARTBEAT_EXPIRE_WINDOW = 200
#: Clocks that differ by more (seconds) are worth a line in the log.
HEARTBEAT_DRIFT_MAX = 16
#: Heartbeats of a worker that are remembered.
HEARTBEATS_MAX = 4
#: Names of tasks and workers of which nothing is remembered any more, until they are looked for.
EMPTY_KEYS_MAX = 1000
#: Children that are remembered of parents that nothing was heard of.
MOST_PENDING_CHILDREN = 10_000

#: Last part of an event's type -> the state that it means.
TASK_EVENT_TO_STATE = {
    "sent": states.PENDING,
    "received": states.RECEIVED,
    "started": states.STARTED,
    "failed": states.FAILURE,
    "retried": states.RETRY,
    "succeeded": states.SUCCESS,
    "revoked": states.REVOKED,
    "rejected": states.REJECTED,
}
#: What an event that came late may still tell: state -> fields.
_MERGED = {
    states.RECEIVED: ("name", "args", "kwargs", "parent_id", "root_id", "retries", "eta", "expires"),
    states.PENDING: (
        "name", "args", "kwargs", "parent_id", "root_id", "retries", "eta", "expires", "queue", "exchange",
        "routing_key", "client",
    ),
}  # fmt: skip

#: Attributes of a task that are never taken from an event.
_OWN = frozenset({"worker", "children", "cluster_state", "newest"})

K = TypeVar("K")
V = TypeVar("V")


def heartbeat_expires(
    timestamp: float, freq: float = 60, expire_window: float = HEARTBEAT_EXPIRE_WINDOW
) -> float:
    """Return when a worker that was heard of at `timestamp` is taken for gone."""
    return timestamp + float(freq) * expire_window / 100


class LRUCache(OrderedDict, Generic[K, V]):  # type: ignore[type-arg]
    """A dict of the `limit` entries that were set last."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > self.limit:
            self.popitem(last=False)

    def __reduce__(self) -> Any:
        return _cache_of, (type(self), self.limit, list(self.items()))


def _cache_of(cls: Any, limit: int, items: Iterable[Tuple[Any, Any]]) -> Any:
    made = cls(limit)
    for key, value in items:
        made[key] = value
    return made


class Worker:
    """What is known of a worker."""

    heartbeat_max = HEARTBEATS_MAX
    expire_window = HEARTBEAT_EXPIRE_WINDOW

    _fields = (
        "hostname", "pid", "freq", "heartbeats", "clock", "active", "processed", "loadavg", "sw_ident",
        "sw_ver", "sw_sys",
    )  # fmt: skip

    def __init__(
        self,
        hostname: Optional[str] = None,
        pid: Optional[int] = None,
        freq: float = 60,
        heartbeats: Optional[List[float]] = None,
        clock: int = 0,
        active: Optional[int] = None,
        processed: Optional[int] = None,
        loadavg: Any = None,
        sw_ident: Optional[str] = None,
        sw_ver: Optional[str] = None,
        sw_sys: Optional[str] = None,
    ) -> None:
        self.hostname = hostname
        self.pid = pid
        self.freq = freq
        #: When it was heard of, by the clock here; the newest last.
        self.heartbeats: List[float] = [] if heartbeats is None else heartbeats
        self.clock = clock or 0
        self.active = active
        self.processed = processed
        self.loadavg = loadavg
        self.sw_ident = sw_ident
        self.sw_ver = sw_ver
        self.sw_sys = sw_sys

    def __repr__(self) -> str:
        return f"<Worker: {self.hostname} ({self.status_string})>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Worker) and self.hostname == other.hostname

    def __hash__(self) -> int:
        return hash(self.hostname)

    @property
    def id(self) -> str:
        """Name and process id."""
        return f"{self.hostname}.{self.pid}"

    @property
    def status_string(self) -> str:
        """``ONLINE`` or ``OFFLINE``."""
        return "ONLINE" if self.alive else "OFFLINE"

    @property
    def heartbeat_expires(self) -> float:
        """When it is taken for gone if nothing more is heard of it (epoch seconds)."""
        return heartbeat_expires(self.heartbeats[-1], self.freq or 60, self.expire_window)

    @property
    def alive(self) -> bool:
        """Whether it was heard of lately, and has not said good-bye."""
        return self.is_alive(time.time())

    def is_alive(self, now: float) -> bool:
        """Say whether it was alive at `now` (epoch seconds)."""
        return bool(self.heartbeats) and now < self.heartbeat_expires

    def update(self, f: Mapping[str, Any] = {}, **kw: Any) -> None:
        """Take over fields; others are left out."""
        for name, value in {**f, **kw}.items():
            if name in self._fields:
                setattr(self, name, value)

    def event(
        self,
        type_: Optional[str],
        timestamp: Optional[float] = None,
        local_received: Optional[float] = None,
        fields: Optional[Mapping[str, Any]] = None,
    ) -> None:
        """Take over an event: ``online``, ``heartbeat``, ``offline``, or None for one of its tasks."""
        if fields:
            self.update({name: value for name, value in fields.items() if name != "heartbeats"})
        if type_ == "offline":
            self.heartbeats = []
        elif local_received:
            if timestamp is not None and type_ is not None:
                self._look_for_drift(timestamp, local_received)
            bisect.insort(self.heartbeats, local_received)
            del self.heartbeats[: -self.heartbeat_max]

    def _look_for_drift(self, timestamp: float, local_received: float) -> None:
        drift_s = abs(local_received - timestamp)
        if drift_s > HEARTBEAT_DRIFT_MAX and not self.__dict__.get("_drift_told"):
            self.__dict__["_drift_told"] = True
            logger.warning(
                "The clock of worker %s and the one here differ by %.0f s; events may seem out of order",
                self.hostname, drift_s,
            )  # fmt: skip


class Task:
    """What is known of a task: its fields are attributes, None where nothing told them."""

    #: Celery's names, and what each is before anything was heard.
    _defaults: Dict[str, Any] = dict.fromkeys(
        "name received sent started rejected succeeded failed retried revoked args kwargs eta expires retries"
        " worker result exception timestamp runtime traceback exchange routing_key root_id parent_id client"
        " queue".split()
    )
    _defaults.update(state=states.PENDING, clock=0)
    _fields = ("uuid", *_defaults)
    _info_fields = (
        "args", "kwargs", "retries", "result", "eta", "runtime", "expires", "exception", "exchange",
        "routing_key", "root_id", "parent_id",
    )  # fmt: skip

    uuid: Optional[str]
    state: str
    clock: int

    def __init__(
        self, uuid: Optional[str] = None, cluster_state: "Optional[State]" = None, **kwargs: Any
    ) -> None:
        self.uuid = uuid
        #: Tasks that this one has sent, as far as they are remembered.
        self.children: "weakref.WeakSet[Task]" = weakref.WeakSet()
        self.cluster_state = cluster_state
        #: When the newest event happened, its number and who told it.
        self.newest: Tuple[float, int, Optional[str]] = (0.0, 0, None)
        self.__dict__.update(kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return Task._defaults[name]
        except KeyError:
            raise AttributeError(f"a task of events has no {name!r}") from None

    def __repr__(self) -> str:
        return f"<Task: {self.name}({self.uuid}) {self.state} clock:{self.clock}>"

    def __getstate__(self) -> Dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "children"}

    def __setstate__(self, values: Dict[str, Any]) -> None:
        self.__dict__.update(values, children=weakref.WeakSet())

    def event(
        self,
        type_: str,
        timestamp: Optional[float] = None,
        local_received: Optional[float] = None,
        fields: Optional[Mapping[str, Any]] = None,
    ) -> None:
        """Take over an event, ``succeeded`` for example; an unknown one is a custom state of that name."""
        values = dict(fields or {})
        state = TASK_EVENT_TO_STATE.get(type_)
        if state is None:
            state = type_.upper()
        else:
            self.__dict__[type_] = timestamp
        at = (timestamp or 0.0, values.get("clock") or 0, values.pop("hostname", None))
        is_older = self._is_older(at)
        if self._comes_before(state, is_older):
            values = {name: values[name] for name in _MERGED.get(state, ()) if name in values}
        else:
            values.update(state=state, timestamp=timestamp)
        if not is_older:
            self.newest = at
        # Events are made by anybody: none may put itself before a method or what is known otherwise.
        self.__dict__.update(
            (name, value) for name, value in values.items() if name not in _OWN and not hasattr(Task, name)
        )

    def _is_older(self, at: Tuple[float, int, Optional[str]]) -> bool:
        """Say whether something happened before the newest event that was heard of."""
        timestamp, clock, hostname = self.newest
        # The numbers of two workers that do not hear of each other cannot be compared.
        return at[1] < clock if at[2] == hostname else at[0] < timestamp

    def _comes_before(self, state: str, is_older: bool) -> bool:
        """Say whether this state was logically before the present one."""
        present = self.state
        if present in states.READY_STATES and state not in states.READY_STATES:
            # Also a retry that is heard of too late; but what was received anew runs again.
            return is_older or state != states.RECEIVED
        if states.RETRY in (state, present):
            return is_older
        return states.precedence(state) > states.precedence(present)

    def info(self, fields: Optional[Iterable[str]] = None, extra: Iterable[str] = ()) -> Dict[str, Any]:
        """Return what is known, of these fields."""
        names = [*(self._info_fields if fields is None else fields), *extra]
        return {name: value for name in names for value in [getattr(self, name, None)] if value is not None}

    def as_dict(self) -> Dict[str, Any]:
        """Return all fields."""
        found = {name: getattr(self, name) for name in self._fields}
        found["worker"] = self.worker.hostname if self.worker is not None else None
        found["children"] = sorted(str(child.uuid) for child in self.children)
        return found

    @property
    def id(self) -> Optional[str]:
        """The task's id."""
        return self.uuid

    @property
    def origin(self) -> Optional[str]:
        """Who told of it: its worker, else its sender."""
        return self.client if self.worker is None else self.worker.id  # type: ignore[no-any-return]

    @property
    def ready(self) -> bool:
        """Whether it has ended."""
        return self.state in states.READY_STATES

    @property
    def parent(self) -> "Optional[Task]":
        """The task that has sent it, if that is remembered."""
        return self._other(self.parent_id)

    @property
    def root(self) -> "Optional[Task]":
        """The first task of its workflow, if that is remembered."""
        return self._other(self.root_id)

    def _other(self, uuid: Optional[str]) -> "Optional[Task]":
        return self.cluster_state.tasks.get(uuid) if uuid and self.cluster_state is not None else None


class Changed(NamedTuple):
    """What an event has changed: a worker or a task, and whether it was new."""

    what: Any
    created: bool


class _Index(Dict[str, "weakref.WeakSet[Task]"]):
    """Tasks by something; a call returns them in their order, as the attribute of Celery's State does."""

    def __init__(self, state: "State") -> None:
        super().__init__()
        self._state = state

    def __missing__(self, key: str) -> "weakref.WeakSet[Task]":
        if len(self) % EMPTY_KEYS_MAX == EMPTY_KEYS_MAX - 1:
            self.drop_empty()
        made: "weakref.WeakSet[Task]" = weakref.WeakSet()
        self[key] = made
        return made

    def drop_empty(self) -> None:
        """Forget names of which no task is remembered."""
        for key in [key for key, tasks in self.items() if not tasks]:
            del self[key]

    def __call__(
        self, key: str, limit: Optional[int] = None, reverse: bool = True
    ) -> Iterator[Tuple[Optional[str], Task]]:
        for task in islice(self._state._sorted(self.get(key, ()), reverse), limit):
            yield task.uuid, task


class State:
    """Workers and tasks, from events; give it to a receiver as ``handlers={"*": state.event}``.

    May be used from several threads.  `callback` is called with the state and each event before it
    is taken over; `on_node_join`, `on_node_leave` with a worker.
    """

    def __init__(
        self,
        callback: "Optional[Callable[[State, Dict[str, Any]], Any]]" = None,
        workers: Optional[Mapping[str, Worker]] = None,
        tasks: Optional[Mapping[str, Task]] = None,
        taskheap: Any = None,
        max_workers_in_memory: int = 5000,
        max_tasks_in_memory: int = 10000,
        on_node_join: Optional[Callable[[Worker], Any]] = None,
        on_node_leave: Optional[Callable[[Worker], Any]] = None,
    ) -> None:
        self.event_callback = callback
        self.max_workers_in_memory = max_workers_in_memory
        self.max_tasks_in_memory = max_tasks_in_memory
        self.on_node_join = on_node_join
        self.on_node_leave = on_node_leave
        self.workers: LRUCache[str, Worker] = LRUCache(max_workers_in_memory)
        self.tasks: LRUCache[str, Task] = LRUCache(max_tasks_in_memory)
        #: Events, and tasks that were received by a worker.
        self.event_count = 0
        self.task_count = 0
        self._mutex = threading.RLock()
        self._set_up()
        self.workers.update(workers or {})
        self.tasks.update(tasks or {})
        self._index()

    def _set_up(self) -> None:
        self.tasks_by_type = _Index(self)
        self.tasks_by_worker = _Index(self)
        #: Parent -> children that came before it.
        self._orphans: LRUCache[str, Any] = LRUCache(MOST_PENDING_CHILDREN)

    def _index(self) -> None:
        for task in self.tasks.values():
            task.cluster_state = self
            self._file(task)

    def __getstate__(self) -> Dict[str, Any]:
        left_out = {"_mutex", "tasks_by_type", "tasks_by_worker", "_orphans", "event_callback"}
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, values: Dict[str, Any]) -> None:
        self.__dict__.update(values, _mutex=threading.RLock(), event_callback=None)
        self._set_up()
        self._index()

    def __repr__(self) -> str:
        return f"<State: events={self.event_count} tasks={self.task_count}>"

    # -- events

    def event(self, event: Dict[str, Any]) -> "Tuple[Changed, str]":
        """Take over an event; return what it has changed, and the last part of its type."""
        with self._mutex:
            return self._event(event)

    def _event(self, event: Dict[str, Any]) -> "Tuple[Changed, str]":
        self.event_count += 1
        if self.event_callback is not None:
            self.event_callback(self, event)
        group, _, subject = event["type"].partition("-")
        if group == "worker" and event.get("hostname"):
            return self._worker_event(subject, event), subject
        if group == "task" and event.get("uuid"):
            return self._task_event(subject, event), subject
        return Changed(None, False), subject

    def _worker_event(self, subject: str, event: Dict[str, Any]) -> Changed:
        hostname = event["hostname"]
        worker = self.workers.get(hostname)
        is_new = worker is None
        if worker is None:
            worker = Worker(hostname)
        if subject != "offline":
            self.workers[hostname] = worker
        worker.event(subject, event.get("timestamp"), event.get("local_received"), event)
        if self.on_node_join is not None and subject != "offline" and (is_new or subject == "online"):
            self.on_node_join(worker)
        if subject == "offline":
            self.workers.pop(hostname, None)
            if self.on_node_leave is not None:
                self.on_node_leave(worker)
        return Changed(worker, is_new)

    def _task_event(self, subject: str, event: Dict[str, Any]) -> Changed:
        uuid, hostname = event["uuid"], event.get("hostname")
        task, is_new = self.get_or_create_task(uuid)
        self.tasks.move_to_end(uuid)
        fields = {name: event[name] for name in event if name not in ("type", "uuid", "pid")}
        if subject == "sent":
            task.__dict__["client"] = hostname
        elif hostname is not None:
            worker, _ = self.get_or_create_worker(hostname)
            task.__dict__["worker"] = worker
            worker.event(None, None, event.get("local_received"), {"pid": event.get("pid") or worker.pid})
        if subject == "received":
            self.task_count += 1
        task.event(subject, event.get("timestamp"), event.get("local_received"), fields)
        self._file(task)
        return Changed(task, is_new)

    def _file(self, task: Task) -> None:
        """Put a task into the indexes."""
        if task.name is not None:
            self.tasks_by_type[task.name].add(task)
        if task.worker is not None:
            self.tasks_by_worker[task.worker.hostname].add(task)
        parent_id = task.parent_id
        if parent_id:
            parent = self.tasks.get(parent_id)
            if parent is not None:
                parent.children.add(task)
            else:
                if parent_id not in self._orphans:
                    self._orphans[parent_id] = weakref.WeakSet()
                self._orphans[parent_id].add(task)
        if self._orphans:
            for child in self._orphans.pop(task.uuid, ()):
                task.children.add(child)

    def get_or_create_worker(self, hostname: str, **kwargs: Any) -> Tuple[Worker, bool]:
        """Return a worker, and whether nothing was known of it."""
        worker = self.workers.get(hostname)
        if worker is not None:
            if kwargs:
                worker.update(kwargs)
            return worker, False
        worker = self.workers[hostname] = Worker(hostname, **kwargs)
        return worker, True

    def get_or_create_task(self, uuid: str) -> Tuple[Task, bool]:
        """Return a task, and whether nothing was known of it."""
        task = self.tasks.get(uuid)
        if task is not None:
            return task, False
        task = self.tasks[uuid] = Task(uuid, self)
        return task, True

    # -- looking

    def freeze_while(
        self, fun: Callable[..., Any], *args: Any, clear_after: bool = False, **kwargs: Any
    ) -> Any:
        """Call a function while nothing changes; with `clear_after`, forget then what has ended.

        If the function raises, nothing is forgotten.
        """
        with self._mutex:
            found = fun(*args, **kwargs)
            if clear_after:
                self._clear(True)
            return found

    def clear_tasks(self, ready: bool = True) -> None:
        """Forget tasks: those that have not ended are kept, unless `ready` is False."""
        with self._mutex:
            self._clear_tasks(ready)

    def _clear_tasks(self, ready: bool) -> None:
        kept = [] if not ready else [item for item in self.tasks.items() if not item[1].ready]
        self.tasks.clear()
        for uuid, task in kept:
            self.tasks[uuid] = task
        self.tasks_by_type.drop_empty()
        self.tasks_by_worker.drop_empty()

    def clear(self, ready: bool = True) -> None:
        """Forget tasks as `clear_tasks` does, all workers, and the counts."""
        with self._mutex:
            self._clear(ready)

    def _clear(self, ready: bool) -> None:
        if not ready:
            self.workers.clear()
        self._clear_tasks(ready)
        self.event_count = 0
        self.task_count = 0

    def _sorted(self, tasks: Iterable[Task], reverse: bool) -> List[Task]:
        return sorted(tasks, key=_order, reverse=reverse)

    def itertasks(self, limit: Optional[int] = None) -> Iterator[Tuple[str, Task]]:
        """Yield (id, task), as they became known."""
        yield from islice(list(self.tasks.items()), limit)

    def tasks_by_time(
        self, limit: Optional[int] = None, reverse: bool = True
    ) -> Iterator[Tuple[Optional[str], Task]]:
        """Yield (id, task), the newest first, or last."""
        for task in islice(self._sorted(list(self.tasks.values()), reverse), limit):
            yield task.uuid, task

    tasks_by_timestamp = tasks_by_time

    def task_types(self) -> List[str]:
        """Return the names of all tasks that were heard of."""
        return sorted(name for name, tasks in list(self.tasks_by_type.items()) if tasks)

    def alive_workers(self) -> Iterator[Worker]:
        """Yield the workers that are there."""
        return (worker for worker in list(self.workers.values()) if worker.alive)

    def rebuild_taskheap(self) -> None:
        """Put into the indexes what was put into `tasks` by hand; their order is found when asked for."""
        with self._mutex:
            self._index()


def _order(task: Task) -> Tuple[float, int]:
    return task.newest[:2]


__all__ = ["HEARTBEAT_DRIFT_MAX", "HEARTBEAT_EXPIRE_WINDOW", "State", "Task", "Worker", "heartbeat_expires"]

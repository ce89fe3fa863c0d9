# SPDX-License-Identifier: MIT
"""Commands that tell something of a worker, in Celery's words and forms.

Arguments of tasks are shown as they are where that costs little: JSON of a moderate size is decoded
here, for people to read; of anything else there is what the sender wrote for display (`argsrepr`).
"""

from __future__ import annotations

import gc
import os
import platform
import sys
import tempfile
from collections import deque
from datetime import datetime
from typing import Any, Deque, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple
from urllib.parse import urlsplit

from .. import __version__
from ..control import revoke_expires_s
from ..exceptions import MiniqError
from ..log import get_logger
from ..serialization import loads
from ..text import import_module, mask_url, safe_repr
from .panel import ControlledWorker, inspect_command, nok, ok, truth
from .request import Request

logger = get_logger(__name__)

#: Larger bodies are not decoded to show what is in them.
MAX_SHOWN_BYTES = 16 * 1024
#: Revoked ids that are told at most: the last ones.
MOST_REVOKED_TOLD = 20_000
#: Tasks that are not due which are told at most: the next ones.
MOST_SCHEDULED_TOLD = 1000
#: The attributes of tasks that are told, unless others are asked for.
TASK_INFO_ITEMS = ("exchange", "routing_key", "rate_limit")
#: The priority of timers in Celery, which `scheduled` tells.
TIMER_PRIORITY = 6
#: Memory in use, as `memsample` found it.
_samples: Deque[str] = deque(maxlen=100)


# -- tasks ---------------------------------------------------------------------------------------


def task_info(worker: ControlledWorker, request: Request, safe: bool = False) -> Dict[str, Any]:
    """Return what is told of one message that the worker holds."""
    args, kwargs = _arguments(request, safe)
    return {
        "id": request.id,
        "name": request.name,
        "args": args,
        "kwargs": kwargs,
        "type": request.name,
        "hostname": request.hostname,
        "time_start": request.time_start,
        "acknowledged": request.time_start is not None and request.acknowledged,
        "delivery_info": request.delivery.info,
        "worker_pid": _pid_of(worker, request),
    }


def _arguments(request: Request, safe: bool) -> Tuple[Any, Any]:
    message = request.delivery.message
    headers = message.headers
    shown = headers.get("argsrepr"), headers.get("kwargsrepr")
    # Reading pickle would run the sender's code in this process.
    is_cheap = message.content_type == "application/json" and len(message.body) <= MAX_SHOWN_BYTES
    if safe or not is_cheap or headers.get("compression"):
        return shown
    try:
        accept = frozenset({message.content_type})
        args, kwargs, _ = loads(message.body, message.content_type, message.content_encoding, accept)
    except (MiniqError, ValueError, TypeError):
        return shown  # whoever runs it says what is wrong with it
    return args, kwargs


def _pid_of(worker: ControlledWorker, request: Request) -> Optional[int]:
    if request.time_start is None:
        return None
    slot = request.job.slot if request.job is not None else None
    return request.pid or getattr(slot, "pid", None) or (None if worker.pool.has_processes else os.getpid())


@inspect_command(alias="dump_active")
def active(state: ControlledWorker, safe: Any = False, **_: Any) -> List[Dict[str, Any]]:
    """List the tasks that run now."""
    return [task_info(state, request, bool(safe)) for request in list(state.tasks.running.values())]


@inspect_command(alias="dump_reserved")
def reserved(state: ControlledWorker, **_: Any) -> List[Dict[str, Any]]:
    """List the tasks that wait in the worker for a free slot."""
    return [task_info(state, request) for request in state.tasks.reserved]


@inspect_command(alias="dump_schedule")
def scheduled(state: ControlledWorker, **_: Any) -> List[Dict[str, Any]]:
    """List the tasks of the worker's queues that wait to be due, the soonest first."""
    told = []
    for due, delivery in state.tasks.consumer.not_due(MOST_SCHEDULED_TOLD):
        headers = delivery.message.headers
        name = headers.get("task")
        policy = state.tasks.admission.policy_if_known(name) if isinstance(name, str) else None
        if policy is not None and isinstance(headers.get("id"), str):
            request = policy.request_class(delivery, policy, state.hostname)
            moment = datetime.fromtimestamp(due, state.app.zone).isoformat()
            told.append({"eta": moment, "priority": TIMER_PRIORITY, "request": task_info(state, request)})
    return told


@inspect_command(variadic="ids", signature="<id1> [id2 [... [idN]]]")
def query_task(state: ControlledWorker, ids: Any, **_: Any) -> Dict[str, Any]:
    """Say where tasks are, by their ids."""
    wanted = {ids} if isinstance(ids, str) else set(ids)
    found: Dict[str, Any] = {
        one["request"]["id"]: ["scheduled", one["request"]]
        for one in scheduled(state)
        if one["request"]["id"] in wanted
    }
    for where, requests in (("reserved", state.tasks.reserved), ("active", state.tasks.running.values())):
        for request in requests:
            if request.id in wanted:
                found[request.id] = [where, task_info(state, request)]
    return found


@inspect_command(alias="dump_revoked")
def revoked(state: ControlledWorker, **_: Any) -> List[str]:
    """List the ids that are not to be started."""
    return list(state.tasks.admission.revoked)[-MOST_REVOKED_TOLD:]


@inspect_command(alias="dump_tasks", variadic="taskinfoitems", signature="[attr1 [attr2 [... [attrN]]]]")
def registered(
    state: ControlledWorker, taskinfoitems: Optional[Sequence[str]] = None, builtins: bool = False, **_: Any
) -> List[str]:
    """List the tasks that the worker knows, with some of their attributes."""
    if isinstance(taskinfoitems, str):
        taskinfoitems = [taskinfoitems]
    items = [str(item) for item in taskinfoitems or TASK_INFO_ITEMS if not str(item).startswith("_")]
    tasks = state.app.tasks
    found = []
    for name in sorted(tasks):
        if builtins or not name.startswith("celery."):
            values = ((item, getattr(tasks[name], item, None)) for item in items)
            told = " ".join(f"{item}={value!s:.200}" for item, value in values if value is not None)
            found.append(f"{name} [{told}]" if told else name)
    return found


# -- the worker ----------------------------------------------------------------------------------


@inspect_command(default_timeout=0.2)
def ping(state: ControlledWorker, **_: Any) -> Dict[str, str]:
    """Say that the worker is there."""
    return ok("pong")


@inspect_command
def clock(state: ControlledWorker, **_: Any) -> Dict[str, int]:
    """Tell the logical clock."""
    return {"clock": state.app.clock.value}


@inspect_command(visible=False)
def hello(
    state: ControlledWorker, from_node: str, revoked: Optional[Iterable[str]] = None, **_: Any
) -> Optional[Dict[str, Any]]:
    """Take another worker's revocations, and tell ours."""
    if from_node == state.hostname:
        return None
    logger.info("sync with %s", from_node)
    if revoked:
        until = state.app.wall() + revoke_expires_s()
        state.tasks.admission.remember_revoked([str(one) for one in revoked], until)
    return {
        "revoked": list(state.tasks.admission.revoked)[-MOST_REVOKED_TOLD:],
        "clock": state.app.clock.forward(),
    }


@inspect_command
def active_queues(state: ControlledWorker, **_: Any) -> List[Dict[str, Any]]:
    """List the queues that the worker consumes from."""
    return [plain(queue.as_dict()) for queue in state.queues]


@inspect_command
def stats(state: ControlledWorker, **_: Any) -> Dict[str, Any]:
    """Tell counts, the pool, the broker, the use of resources."""
    tasks, admission = state.tasks, state.tasks.admission
    pool = state.pool.info()
    pool.setdefault("processes", state.pool.pids())
    pool.setdefault("timeouts", [admission.soft_time_limit or 0, admission.time_limit or 0])
    found = {
        "total": dict(tasks.total),
        "pid": os.getpid(),
        "clock": str(state.app.clock.value),
        "uptime": int(tasks.loop.mono() - tasks.since_mono),
        "pool": plain(pool),
        "broker": broker_info(state.app),
        "prefetch_count": state.concurrency * state.prefetch_multiplier,
        "rusage": _resource_usage(),
    }
    if state.autoscale:
        most, least = state.autoscale
        size, busy = state.pool.size, len(tasks.running)
        found["autoscaler"] = {"max": most, "min": least, "current": size, "qty": busy}
    return found


def broker_info(app: Any) -> Dict[str, Any]:
    """Return what is told of the broker, in the words of kombu's connections; without its password."""
    first, *others = app.broker_url().split(";")
    parts = urlsplit(first)
    try:
        port = parts.port
    except ValueError:  # several hosts, as with sentinel://
        port = None
    return {
        "hostname": parts.hostname,
        "userid": parts.username,
        "virtual_host": parts.path.lstrip("/") or "/",
        "port": port,
        "insist": False,
        "ssl": parts.scheme.endswith("s") and bool(parts.hostname),
        "transport": parts.scheme,
        "connect_timeout": app.conf.broker_connection_timeout,
        "transport_options": plain(app.conf.table()["broker_transport_options"])
        if "broker_transport_options" in app.conf.changes()
        else {},
        "login_method": app.conf.broker_login_method,
        "uri_prefix": None,
        "heartbeat": app.conf.broker_heartbeat,
        "failover_strategy": app.conf.broker_failover_strategy or "round-robin",
        "alternates": [mask_url(url) for url in others],
        "credential_provider": None,
    }


def _resource_usage() -> Any:
    try:
        import resource  # not on Windows
    except ImportError:
        return "N/A"
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {name[3:]: getattr(used, name) for name in dir(used) if name.startswith("ru_")}


@inspect_command(alias="dump_conf", signature="[include_defaults=False]", args=[("with_defaults", truth)])
def conf(state: ControlledWorker, with_defaults: bool = False, **_: Any) -> Dict[str, Any]:
    """Tell the settings that were changed, or all of them; passwords are masked."""
    found: Dict[str, Any] = plain(state.app.conf.table(with_defaults=with_defaults))
    return found


@inspect_command
def report(state: ControlledWorker, **_: Any) -> Dict[str, str]:
    """Tell versions, system and settings, to be sent along when something is wrong."""
    return ok(report_text(state.app))


def report_text(app: Any) -> str:
    """Return the text of `report`; passwords are masked."""
    lines = [
        f"software -> miniq:{__version__} py:{platform.python_version()}",
        f"platform -> system:{platform.system()} arch:{platform.machine()}"
        f" kernel version:{platform.release()} imp:{platform.python_implementation()}",
        f"settings -> broker:{mask_url(app.broker_url())} results:{mask_url(app.backend_url())}",
        "",
        app.conf.humanize(),
    ]
    return "\n".join(lines) + "\n"


def plain(value: Any) -> Any:
    """Return `value` as lists, dicts, text and numbers; what is neither, as its repr."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return safe_repr(value, 500)


# -- memory --------------------------------------------------------------------------------------


@inspect_command
def memsample(state: ControlledWorker, **_: Any) -> Optional[str]:
    """Tell how much memory the worker uses, and remember it for memdump."""
    used = memory_in_use()
    if used is not None:
        _samples.append(used)
    return used


@inspect_command(args=[("samples", int)], signature="[n_samples=10]")
def memdump(state: ControlledWorker, samples: int = 10, **_: Any) -> str:
    """Tell some of the remembered samples of memory, and what it is now, garbage collected."""
    remembered = list(_samples)
    every = max(1, len(remembered) // max(1, int(samples)))
    lines = ["- rss (sample):", *(f"-    > {sample}," for sample in remembered[::every])]
    gc.collect()
    lines.append(f"- rss (end): {memory_in_use()}.")
    return "\n".join(lines) + "\n"


def memory_in_use() -> Optional[str]:
    """Return this process' resident memory as text, None where that cannot be told."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            size = float(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError):
        return None
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1024 or unit == "GB":
            break
        size /= 1024
    return f"{size:.5g}{unit}"


@inspect_command(
    default_timeout=60.0,
    args=[("type", str), ("num", int), ("max_depth", int)],
    signature="[object_type=Request] [num=200 [max_depth=10]]",
)
def objgraph(
    state: ControlledWorker, num: int = 200, max_depth: int = 10, type: str = "Request", **_: Any  # noqa: A002
) -> Dict[str, str]:
    """Draw what refers to objects of a type (needs objgraph); the worker does nothing else meanwhile."""
    try:
        drawing: Any = import_module("objgraph")
    except ImportError:
        raise ImportError("Requires the objgraph library") from None
    objects = drawing.by_type(type)[: max(0, min(int(num), 200))]
    if not objects:
        return nok(f"no objects of type {type!r:.100}")
    with tempfile.NamedTemporaryFile(prefix="cobjg", suffix=".png", delete=False) as file:
        path = file.name
    drawing.show_backrefs(objects, max_depth=min(int(max_depth), 10), filename=path)
    return {"filename": path, "python": sys.version.split()[0]}

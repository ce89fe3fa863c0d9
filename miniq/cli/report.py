# SPDX-License-Identifier: MIT
"""``miniq report``, ``list bindings`` and ``graph``: what there is, for people and for Graphviz."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, Dict, List

from .. import __version__
from ..backends.base import backend_class
from ..exceptions import MiniqError
from ..graph import DependencyGraph
from ..pools.base import pool_class
from ..text import mask_url, safe_repr
from ..transports.base import transport_class
from .arguments import seconds_or_0
from .commands import print_table

EX_UNAVAILABLE = 69


def add_parsers(subparsers: Any) -> None:
    """Add the commands to the command line."""
    report = subparsers.add_parser(
        "report",
        help="versions, platform and settings, for a bug report",
        description="Print versions, platform and the app's settings; passwords are masked.",
        epilog="example:\n  python -m miniq -A proj report --json",
    )
    report.set_defaults(run=run_report)
    report.add_argument("--json", action="store_true", help="print as JSON")

    listing = subparsers.add_parser(
        "list",
        help="list what the app declares: bindings",
        description="List the bindings of the app's queues, as its settings have them.",
        epilog="example:\n  python -m miniq -A proj list bindings",
    )
    listing.set_defaults(run=run_list)
    listing.add_argument("what", choices=("bindings",))
    listing.add_argument("--json", action="store_true", help="print as JSON")

    graph = subparsers.add_parser(
        "graph",
        help="draw a worker's parts, or the workers, for Graphviz",
        description="Print a graph in the language of Graphviz.",
        epilog="exit codes:\n  0  done    69  no worker answered (graph workers)\n\n"
        "examples:\n"
        "  python -m miniq -A proj graph bootsteps | dot -Tsvg > worker.svg\n"
        "  python -m miniq -A proj graph workers --timeout 2",
    )
    graph.set_defaults(run=run_graph)
    graph.add_argument("what", choices=("bootsteps", "workers"))
    graph.add_argument(
        "-t", "--timeout", type=seconds_or_0, default=1.0, metavar="SECONDS",
        help="how long workers may take to answer (default 1)",
    )  # fmt: skip


# -- report --------------------------------------------------------------------------------------


def run_report(app: Any, options: argparse.Namespace) -> int:
    """Print what a bug report needs."""
    told = describe(app)
    if options.json:
        print(json.dumps(told, default=safe_repr))
        return 0
    for part in ("software", "platform"):
        words = " ".join(f"{key}:{value}" for key, value in told[part].items())
        print(f"{part:<8} -> {words}")
    print(f"app      -> {told['app']}")
    print(f"broker   -> {told['broker']}")
    print(f"results  -> {told['results']}")
    print("settings ->")
    for name, value in told["settings"].items():
        print(f"  {name}: {safe_repr(value)}")
    for text in told["warnings"]:
        print(f"  warning: {text}")
    return 0


def describe(app: Any) -> Dict[str, Any]:
    """Return versions, platform and settings; passwords are masked."""
    import platform  # slow, and of use here alone

    return {
        "software": {"miniq": __version__, "py": platform.python_version()},
        "platform": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
            "imp": platform.python_implementation(),
        },
        "app": app.main or "__main__",
        "broker": mask_url(app.broker_url()),
        "results": mask_url(app.backend_url()),
        "settings": app.conf.table(),
        "warnings": list(app.conf.warnings),
    }


# -- list ----------------------------------------------------------------------------------------


def run_list(app: Any, options: argparse.Namespace) -> int:
    """Print the bindings of all queues."""
    rows: List[Dict[str, Any]] = []
    for name, queue in sorted(app.router.queues.items()):
        for binding in queue.all_bindings:
            exchange = binding.exchange
            rows.append(
                {"queue": name, "exchange": exchange.name, "type": exchange.type,
                 "routing_key": binding.routing_key, "arguments": binding.arguments or {}}
            )  # fmt: skip
    if options.json:
        print(json.dumps(rows, default=safe_repr))
        return 0
    keys = ("queue", "exchange", "type", "routing_key")
    print_table([keys, *(tuple(str(row[key]) for key in keys) for row in rows)])
    return 0


# -- graph ---------------------------------------------------------------------------------------


def run_graph(app: Any, options: argparse.Namespace) -> int:
    """Print a graph."""
    graph = bootsteps(app) if options.what == "bootsteps" else workers(app, options.timeout)
    if graph is None:
        print("Error: no worker answered", file=sys.stderr)
        return EX_UNAVAILABLE
    graph.to_dot(sys.stdout)
    return 0


def bootsteps(app: Any) -> DependencyGraph:
    """Return what a worker of this app is made of; an edge leads to what a part needs."""
    conf = app.conf
    kind = conf.worker_pool
    pool = f"{(pool_class(kind) if isinstance(kind, str) else kind).__name__}"
    transport = transport_class(app.broker_url()).__name__
    backend = backend_class(app.backend_url()).__name__
    graph = DependencyGraph()
    for start, end in (
        ("Worker", "Loop"), ("Worker", pool), ("Worker", "TaskConsumer"), ("Worker", "Commands"),
        ("Commands", transport), ("TaskConsumer", "Admission"), ("TaskConsumer", "Settler"),
        ("TaskConsumer", pool), ("TaskConsumer", transport), ("Settler", backend), ("Settler", transport),
        (pool, "Loop"), (transport, "Loop"),
    ):  # fmt: skip
        if end != "Commands" or conf.worker_enable_remote_control:
            graph.add_edge(start, end)
    return graph


def workers(app: Any, timeout_s: float) -> Any:
    """Return the workers that answer, with their queues, the broker and the results; None if none does."""
    found = app.control.inspect(timeout=timeout_s).active_queues()
    if not found:
        return None
    if not isinstance(found, dict):
        raise MiniqError(f"workers answered something else than their queues: {found!r:.200}")
    graph = DependencyGraph()
    broker, results = f"broker {mask_url(app.broker_url())}", f"results {mask_url(app.backend_url())}"
    for node, queues in sorted(found.items()):
        for queue in queues:
            graph.add_edge(f"queue {queue['name']}", node)
            graph.add_edge(broker, f"queue {queue['name']}")
        graph.add_edge(node, results)
    return graph

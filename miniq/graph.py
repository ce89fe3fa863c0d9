# SPDX-License-Identifier: MIT
"""A directed graph, as far as results need one: nodes, edges, an order, and a drawing of it.

`AsyncResult.build_graph` makes one of a result and all that descends from it; an edge leads from a
task to one that it sent.  The drawing is in the language of Graphviz: ``dot -Tsvg graph.dot``.
"""

from __future__ import annotations

from typing import IO, Any, Callable, Dict, Iterator, List, Tuple


class DependencyGraph:
    """Hashable nodes and the edges between them, in the order in which they were added."""

    def __init__(self) -> None:
        self._edges: Dict[Any, List[Any]] = {}

    def add_arc(self, node: Any) -> None:
        """Add a node, unless it is there."""
        self._edges.setdefault(node, [])

    def add_edge(self, start: Any, end: Any) -> None:
        """Add an edge from `start` to `end`; both are added too."""
        self.add_arc(start)
        self.add_arc(end)
        self._edges[start].append(end)

    def edges(self) -> List[Tuple[Any, Any]]:
        """Return all edges, as pairs."""
        return [(start, end) for start, ends in self._edges.items() for end in ends]

    def __getitem__(self, node: Any) -> List[Any]:
        return self._edges[node]

    def __contains__(self, node: Any) -> bool:
        return node in self._edges

    def __iter__(self) -> Iterator[Any]:
        return iter(self._edges)

    def __len__(self) -> int:
        return len(self._edges)

    def topsort(self) -> List[Any]:
        """Return the nodes so that every edge leads forwards; `ValueError` where they go in circles."""
        incoming = dict.fromkeys(self._edges, 0)
        for _, end in self.edges():
            incoming[end] += 1
        found = [node for node, count in incoming.items() if not count]
        for node in found:  # grows as it goes
            for end in self._edges[node]:
                incoming[end] -= 1
                if not incoming[end]:
                    found.append(end)
        if len(found) < len(self):
            raise ValueError("the graph has a cycle, so its nodes have no order")
        return found

    def to_dot(self, fh: IO[str], label: Callable[[Any], str] = str) -> None:
        """Write the graph to `fh` in the language of Graphviz; `label` names the nodes."""
        names = {node: _quoted(label(node)) for node in self}
        fh.write("digraph dependencies {\n")
        for name in names.values():
            fh.write(f"    {name};\n")
        for start, end in self.edges():
            fh.write(f"    {names[start]} -> {names[end]};\n")
        fh.write("}\n")


def _quoted(text: str) -> str:
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{text}"'

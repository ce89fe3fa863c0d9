# SPDX-License-Identifier: MIT
"""Stamps: named values put on every task of a workflow, which travel with it and can be looked for.

In a signature's options a stamp is a key of its own, and ``stamped_headers`` lists which keys are
stamps; in a message they are the header ``stamps``.  A visitor decides by itself what to put where.

Source: section "Stamping" of Celery's canvas.
"""

from __future__ import annotations

from typing import Any, Dict, Mapping, Optional

from .algebra import as_list

#: Stamps on their way down a workflow: their values, and ``stamped_headers`` once there are any.
Stamps = Dict[str, Any]


class StampingVisitor:
    """Walks a workflow with `Signature.stamp`; each method returns the stamps to put there, or None.

    `headers` are the stamps that came from above.  With a key ``stamped_headers`` only the keys it
    lists are stamps, and the others calling options.
    """

    def on_group_start(self, group: Any, **headers: Any) -> Optional[Mapping[str, Any]]:
        """Stamp the members of a group, before they are visited."""
        return None

    def on_group_end(self, group: Any, **headers: Any) -> None:
        """The members of the group have been visited."""

    def on_chain_start(self, chain: Any, **headers: Any) -> Optional[Mapping[str, Any]]:
        """Stamp the steps of a chain, before they are visited."""
        return None

    def on_chain_end(self, chain: Any, **headers: Any) -> None:
        """The steps of the chain have been visited."""

    def on_signature(self, sig: Any, **headers: Any) -> Optional[Mapping[str, Any]]:
        """Stamp a single task; every visitor needs this one."""
        raise NotImplementedError(f"{type(self).__name__} needs a method on_signature")

    def on_chord_header_start(self, sig: Any, **header: Any) -> Optional[Mapping[str, Any]]:
        """Stamp the members of a chord's header, by default as those of a group."""
        return self.on_group_start(sig, **header)

    def on_chord_header_end(self, sig: Any, **header: Any) -> None:
        """The header has been visited."""
        self.on_group_end(sig, **header)

    def on_chord_body(self, sig: Any, **header: Any) -> Optional[Mapping[str, Any]]:
        """Stamp the body of a chord, before it is visited."""
        return None

    def on_callback(self, callback: Any, **header: Any) -> Optional[Mapping[str, Any]]:
        """Stamp a callback, before it is visited."""
        return None

    def on_errback(self, errback: Any, **header: Any) -> Optional[Mapping[str, Any]]:
        """Stamp an errback, before it is visited."""
        return None


def stamp(sig: Any, visitor: Optional[StampingVisitor], append: bool, headers: Mapping[str, Any]) -> None:
    """Put stamps on a signature and all in it, in place; see `Signature.stamp`."""
    above = _with(dict(headers), {}) if headers else {}
    for key, method in (("link", "on_callback"), ("link_error", "on_errback")):
        for callback in as_list(sig.options.get(key)):
            stamp(callback, visitor, append, _with(above, _ask(visitor, method, callback, above)))
    kind = sig.get("subtask_type")
    if kind is None:
        _put(sig.options, _with(above, _ask(visitor, "on_signature", sig, above)), append)
        return
    start = "on_chord_header_start" if kind == "chord" else f"on_{kind}_start"
    inside = _with(above, _ask(visitor, start, sig, above))
    steps = sig.tasks
    if isinstance(steps, dict):  # the header of a chord may be a group
        steps = steps["kwargs"]["tasks"]
    for step in steps:
        stamp(step, visitor, append, inside)
    if visitor is None:
        return  # a chord's body is stamped by visitors only
    getattr(visitor, start.replace("start", "end"))(sig, **inside)
    if kind == "chord" and sig.body is not None:
        stamp(sig.body, visitor, append, _with(above, _ask(visitor, "on_chord_body", sig, above)))


def _ask(visitor: Optional[StampingVisitor], method: str, sig: Any, above: Stamps) -> Mapping[str, Any]:
    return {} if visitor is None else getattr(visitor, method)(sig, **above) or {}


def _with(above: Stamps, given: Mapping[str, Any]) -> Stamps:
    """Return stamps with `given` over them, and all of their names in ``stamped_headers``."""
    merged = {**above, **given}
    named = given.get("stamped_headers")
    names = [*as_list(above.get("stamped_headers")), *(given if named is None else as_list(named))]
    if "stamped_headers" not in above:
        names = [*above, *names]
    if names:
        merged["stamped_headers"] = [name for name in dict.fromkeys(names) if name != "stamped_headers"]
    return merged


def _put(options: Dict[str, Any], stamps: Stamps, append: bool) -> None:
    names = as_list(stamps.get("stamped_headers"))
    known = as_list(options.get("stamped_headers"))
    for name, value in stamps.items():
        if append and name in known and name in names:
            value = list(dict.fromkeys([*as_list(value), *as_list(options[name])]))
        options[name] = value
    if names or known:
        options["stamped_headers"] = list(dict.fromkeys([*known, *names]))

# SPDX-License-Identifier: MIT
"""Running tasks and workflows in the calling program: `apply`, and every call under `task_always_eager`.

The same steps as in a worker, walked here: retries follow at once, what comes after a task runs when it
has ended, and nothing is sent.  What a worker would publish is a `plan.Step`, put on a stack instead;
what it would count in the result store is counted in memory.  Arguments go from step to step through the
serializer, as in messages.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

from . import _state, states
from .algebra import NESTED_OPTIONS, as_list
from .canvas import Signature, check_signatures
from .chords import body_of, decode_body, failure_of
from .exceptions import ChordError, Ignore, MiniqError, Retry
from .plan import ChordStart, Plan, Step, plan
from .producer import check_options
from .result import AnyResult, result_from_tuple
from .resultbase import Meta
from .runner import Ends
from .serialization import exception_from_dict
from .signatures import new_task_id
from .task import Context, Task
from .text import host_name
from .trace import Execution, TaskRunner


class _Chord:
    """The header of a chord: `entries` has what members came to, (place, entry) by the member's id."""

    __slots__ = ("size", "body", "entries")

    def __init__(self, start: ChordStart) -> None:
        self.size = start.size
        self.body = start.body
        self.entries: Dict[str, Tuple[int, bytes]] = {}


class _Drive:
    """One call of `apply` with all that follows from it; a call inside one of its tasks has its own."""

    __slots__ = ("above", "chords", "metas")

    def __init__(self, above: "Optional[_Drive]") -> None:
        self.above = above
        #: Chords that have not ended, by their group's id.
        self.chords: Dict[str, _Chord] = {}
        #: What tasks came to, by id.
        self.metas: Dict[str, Meta] = {}

    def start(self, chords: Iterable[ChordStart]) -> None:
        """Count the members of chords from now on."""
        self.chords.update((start.group_id, _Chord(start)) for start in chords)

    def owner(self, group_id: Optional[str]) -> "Optional[_Drive]":
        """Return the drive in which this chord was started and has not ended."""
        drive: Optional[_Drive] = self
        while drive is not None and group_id not in drive.chords:
            drive = drive.above
        return drive


_drive: "ContextVar[Optional[_Drive]]" = ContextVar("miniq_eager_drive", default=None)


class EagerRunner(TaskRunner):
    """Runs tasks in the calling program, retries and all that follows too."""

    keeps_loops = False

    def __init__(self, app: Any) -> None:
        super().__init__(app, host_name())
        app.finalize()  # parts of workflows are tasks that every app gets then

    # -- the two ways in

    def apply(
        self, task: Task, args: List[Any], kwargs: Dict[str, Any], options: Dict[str, Any], throw: bool
    ) -> Any:
        """Run `task` to its end; see `Task.apply`.  `options` are calling options, task_id included.

        The arguments are given as they are.
        """
        for key in NESTED_OPTIONS:
            check_signatures(as_list(options.get(key)), f"{key} of task {task.name}")
        drive = self._run_all([Step(task.name, tuple(args), kwargs, options)], (), throw, task)
        return result_from_tuple(options["task_id"], self.app, drive.metas)

    def apply_plan(self, found: Plan, throw: Optional[bool] = None) -> Optional[AnyResult]:
        """Run a workflow to its end; return its result, None for one without steps.

        Every task in that is an `EagerResult`.  All messages are made before the first task runs.
        """
        steps = [self._made(step) for step in found.steps]
        throw = self.app.conf.task_eager_propagates if throw is None else throw
        drive = self._run_all(steps, found.chords, bool(throw))
        return None if found.result is None else result_from_tuple(found.result, self.app, drive.metas)

    def add_to_chord(self, group_id: str) -> bool:
        """Say that the chord of a running task gets one more member; False where there is no such chord."""
        drive = _drive.get()
        owner = drive.owner(group_id) if drive is not None else None
        if owner is None:
            return False
        owner.chords[group_id].size += 1
        return True

    # -- walking

    def _run_all(
        self, steps: Iterable[Step], chords: Iterable[ChordStart], throw: bool, task: Optional[Task] = None
    ) -> _Drive:
        """Run steps, and whatever follows from each before the next one; `task` is that of the first.

        With `throw` it ends with the first failure, after its errbacks.
        """
        drive = _Drive(_drive.get())
        drive.start(chords)
        token = _drive.set(drive)
        stack = list(steps)[::-1]
        raised: Optional[BaseException] = None
        try:
            while stack or drive.chords:
                if stack:
                    ends, error = self._run(stack.pop(), task)
                    task = None
                    if throw and error is not None and raised is None:
                        raised = error
                        stack.clear()
                        drive.chords.clear()
                else:
                    ends = self._incomplete(drive)
                if ends.results:
                    self.app.backend_for(None).store(ends.results)
                drive.start(ends.starts)
                stack += ends.followups[::-1]
        finally:
            _drive.reset(token)
        if raised is not None:
            raise raised
        for meta in drive.metas.values():
            meta["children"] = [result_from_tuple(child, self.app, drive.metas) for child in meta["children"]]
        return drive

    def _run(self, step: Step, task: Optional[Task]) -> "Tuple[Any, Optional[BaseException]]":
        """Run one task, retries and all; return what follows from it, and what it failed with."""
        task = self.app.tasks[step.task] if task is None else task
        args, kwargs, retries = list(step.args), dict(step.kwargs), step.options.get("retries") or 0
        while True:
            request = self._request(task, args, kwargs, retries, step.options)
            ex = Execution(task, request, args, kwargs)
            outcome = self.execute(ex)
            retry = ex.error
            if not isinstance(retry, Retry) or retry.sig is None:
                break
            args, kwargs = list(retry.sig.args), dict(retry.sig.kwargs)
            retries += 1
        ends = Ends(outcome.results, outcome.followups, outcome.parts, outcome.starts)
        text = ex.einfo.traceback if ex.einfo else None
        if not (isinstance(ex.error, Ignore) and ex.error.counts_later):  # replaced: it runs again as another
            self._ended(request, outcome.state, ex.retval, text)
        self._count(ends)
        return ends, ex.error if outcome.state in states.PROPAGATE_STATES else None

    def _request(
        self, task: Task, args: List[Any], kwargs: Dict[str, Any], retries: int, options: Mapping[str, Any]
    ) -> Context:
        get, custom = options.get, options.get("headers") or None
        frame = _state.worker_frame()
        above = frame.request if frame is not None else None
        task_id, stamped = get("task_id"), get("stamped_headers")
        return Context(
            custom or {},
            id=task_id,
            task=task.name,
            args=args,
            kwargs=kwargs,
            retries=retries,
            is_eager=True,
            called_directly=False,
            hostname=self.hostname,
            correlation_id=task_id,
            headers=custom,
            callbacks=as_list(get("link")),
            errbacks=as_list(get("link_error")),
            chain=as_list(get("chain")),
            chord=get("chord"),
            group=get("group_id"),
            group_index=get("group_index"),
            root_id=get("root_id") or (above and (above.root_id or above.id)) or task_id,
            parent_id=get("parent_id") or (above and above.id),
            ignore_result=get("ignore_result"),
            timelimit=[get("time_limit"), get("soft_time_limit")],
            shadow=get("shadow") or task.shadow_name(args, kwargs, options),
            reply_to=get("reply_to"),
            replaced_task_nesting=get("replaced_task_nesting") or 0,
            stamped_headers=stamped,
            stamps={key: get(key) for key in stamped} if stamped else {},
            loglevel=get("loglevel"),
            logfile=get("logfile"),
            delivery_info={
                "is_eager": True,
                "exchange": get("exchange"),
                "routing_key": get("routing_key"),
                "priority": get("priority"),
            },
        )

    # -- chords

    def _count(self, ends: Any) -> None:
        """Count members of chords that end; add what follows from chords which are complete by that."""
        drive = _drive.get()
        assert drive is not None  # tasks run in one
        while ends.parts:
            parts, ends.parts = ends.parts, []
            for group_id, index, task_id, entry, _, body in parts:
                owner = drive.owner(group_id)
                if owner is None:
                    continue
                chord = owner.chords[group_id]
                place = len(chord.entries) + chord.size if index is None else index
                chord.entries.setdefault(task_id, (place, entry))
                if len(chord.entries) == chord.size:
                    del owner.chords[group_id]
                    entries = [entry for _, entry in sorted(chord.entries.values())]
                    _add(ends, body_of(self.app, self, group_id, task_id, decode_body(body), entries))

    def _incomplete(self, drive: _Drive) -> Ends:
        """End a chord of which a member will never end: it was to be run again later, or never sent."""
        group_id, chord = drive.chords.popitem()
        missing = chord.size - len(chord.entries)
        error = ChordError(f"{missing} of {chord.size} members did not end in this eager run")
        ends = failure_of(self.app, self, Context(id=group_id, hostname=self.hostname), chord.body, error)
        self._count(ends)
        return ends

    # -- what a worker's runner does differently

    def start_workflow(
        self,
        sig: Mapping[str, Any],
        args: Tuple[Any, ...],
        options: Mapping[str, Any],
        root_id: Optional[str],
        parent_id: Optional[str],
        request: Context,
        ends: Ends,
    ) -> None:
        """Add what follows a run, as steps to be run here."""
        found = plan(sig, args, {}, options, new_id=new_task_id, root_id=root_id, parent_id=parent_id)
        followups: List[Any] = ends.followups
        followups += [self._made(step) for step in found.steps]
        starts: List[Any] = ends.starts
        starts += found.chords
        if found.result is not None:
            request.children.append(found.result)

    def _follow(
        self, request: Context, sig: Signature, args: Tuple[Any, ...], options: Dict[str, Any], ends: Ends
    ) -> None:
        self.start_workflow(sig, args, options, request.root_id or request.id, request.id, request, ends)

    def _made(self, step: Step) -> Step:
        """Return a step with the arguments that a message would bring; errors name it."""
        try:
            check_options(step.options)
            task = self.app.tasks.get(step.task)
            by = step.options.get("serializer") or (task.serializer if task is not None else None)
            args, kwargs = self.app.through_serializer(step.args, step.kwargs, by)
        except (MiniqError, TypeError, ValueError) as error:
            raise type(error)(f"{step.where}: {error}") from error
        return step._replace(args=tuple(args), kwargs=kwargs)

    def give_up(self, later: Context, cause: Any, traceback: Optional[str], ends: Ends) -> None:
        """Add the failure of a step that will never run."""
        super().give_up(later, cause, traceback, ends)
        self._ended(later, states.FAILURE, exception_from_dict(cause), traceback)

    def _ended(self, request: Context, state: str, value: Any, traceback: Optional[str]) -> None:
        """Keep what a task came to for its result."""
        drive = _drive.get()
        assert drive is not None  # tasks run in one
        drive.metas[request.id or ""] = {
            "status": state,
            "result": value,
            "traceback": traceback,
            "children": request.children,
            "name": request.task,
        }

    def keeps(self, task: Optional[Task], request: Context, failed: bool = False) -> bool:
        """Say whether a result is stored: only where `task_store_eager_result` is on."""
        return self.app.conf.task_store_eager_result and super().keeps(task, request, failed)

    def store_state(
        self, task: Task, request: Context, state: str, meta: Any, traceback: Optional[str] = None
    ) -> None:
        """Store a custom state, where results are stored at all."""
        if self.app.conf.task_store_eager_result:
            super().store_state(task, request, state, meta, traceback)


def _add(ends: Any, more: Ends) -> None:
    ends.followups += more.followups
    ends.starts += more.starts
    ends.results += more.results
    ends.parts += more.parts

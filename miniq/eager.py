# SPDX-License-Identifier: MIT
"""Running tasks in the calling program: `Task.apply`, and every call under `task_always_eager`.

The same steps as in a worker, walked here: retries follow at once, callbacks run after their task,
and nothing is sent.  What follows from a run is a signature instead of a message.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

from . import _state, states
from .canvas import Signature, as_list, check_signatures
from .exceptions import Retry
from .producer import new_task_id
from .result import EagerResult
from .task import Context, Task
from .text import host_name
from .trace import Execution, TaskRunner


class EagerRunner(TaskRunner):
    """Runs tasks in the calling program, retries and callbacks too."""

    keeps_loops = False

    def __init__(self, app: Any) -> None:
        super().__init__(app, host_name())

    def apply(
        self, task: Task, args: List[Any], kwargs: Dict[str, Any], options: Dict[str, Any], throw: bool
    ) -> EagerResult:
        """Run `task` to its end; see `Task.apply`.  `options` are calling options, task_id included."""
        get = options.get
        task_id = get("task_id")
        custom = get("headers") or None
        link, link_error, chain = as_list(get("link")), as_list(get("link_error")), as_list(get("chain"))
        check_signatures((*link, *link_error, *chain), f"callbacks of task {task.name}")
        frame = _state.worker_frame()
        above = frame.request if frame is not None else None
        retries = get("retries") or 0
        while True:
            request = Context(
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
                callbacks=link,
                errbacks=link_error,
                chain=chain,
                group=get("group_id"),
                group_index=get("group_index"),
                root_id=get("root_id") or (above and (above.root_id or above.id)) or task_id,
                parent_id=get("parent_id") or (above and above.id),
                ignore_result=get("ignore_result"),
                timelimit=[get("time_limit"), get("soft_time_limit")],
                shadow=get("shadow") or task.shadow_name(args, kwargs, options),
                reply_to=get("reply_to"),
                loglevel=get("loglevel"),
                logfile=get("logfile"),
                delivery_info={
                    "is_eager": True,
                    "exchange": get("exchange"),
                    "routing_key": get("routing_key"),
                    "priority": get("priority"),
                },
            )
            ex = Execution(task, request, args, kwargs)
            outcome = self.execute(ex)
            retry = ex.error
            if not isinstance(retry, Retry) or retry.sig is None:
                break
            args, kwargs = list(retry.sig.args), dict(retry.sig.kwargs)
            retries += 1
        if outcome.results:
            self.app.backend_for(None).store(outcome.results)
        for sig in ex.followups:
            self._run_followup(sig, throw)
        error, text = ex.error, ex.einfo.traceback if ex.einfo else None
        if throw and error is not None and outcome.state in states.PROPAGATE_STATES:
            raise error
        return EagerResult(
            task_id or "", ex.retval, outcome.state, text, task.name, self.app, request.children
        )

    def _run_followup(self, sig: Any, throw: bool) -> None:
        task = self.app.tasks[sig.task]
        options = {"task_id": sig.id, **sig.options}
        self.apply(task, list(sig.args), dict(sig.kwargs), options, throw)

    def _follow(
        self, request: Context, sig: Signature, args: Tuple[Any, ...], options: Dict[str, Any]
    ) -> Any:
        sig = sig.clone(args, **options)
        for key, value in (
            ("task_id", new_task_id()),
            ("root_id", request.root_id),
            ("parent_id", request.id),
        ):
            sig.options.setdefault(key, value)
        request.children.append(((sig.id, None), None))
        return sig

    def keeps(self, task: Optional[Task], request: Context, failed: bool = False) -> bool:
        """Say whether a result is stored: only where `task_store_eager_result` is on."""
        return self.app.conf.task_store_eager_result and super().keeps(task, request, failed)

    def store_state(
        self, task: Task, request: Context, state: str, meta: Any, traceback: Optional[str] = None
    ) -> None:
        """Store a custom state, where results are stored at all."""
        if self.app.conf.task_store_eager_result:
            super().store_state(task, request, state, meta, traceback)

# SPDX-License-Identifier: MIT
"""miniq's side; a worker process imports it as ``python -m miniq -A miniq_app:app``."""

from __future__ import annotations

import os
from typing import Any

from interop_tasks import BROKER, define, worker_settings
from workers import READY_FILE

from miniq import Exchange, MiniQ, Queue
from miniq.signals import worker_ready


def make(news: str = "", **settings: Any) -> MiniQ:
    """Return an app with these settings and the tasks; `news` names its queue of the fanout exchange."""
    app = MiniQ("interop")
    app.conf.update(settings)
    if news:
        app.conf.task_queues = [Queue(news, Exchange("news", type="fanout"), routing_key="today")]
    return define(app, "miniq")


@worker_ready.connect(weak=False)
def tell_ready(**_: Any) -> None:
    open(os.environ[READY_FILE], "w").close()


if BROKER in os.environ:
    app = make(**worker_settings())

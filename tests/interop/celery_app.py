# SPDX-License-Identifier: MIT
"""Celery's side; a worker process imports it as ``celery -A celery_app:app``."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.signals import worker_ready
from interop_tasks import BROKER, define, worker_settings
from kombu import Exchange, Queue
from workers import READY_FILE


def make(news: str = "", **settings: Any) -> Celery:
    """Return an app with these settings and the tasks; `news` names its queue of the fanout exchange."""
    app = Celery("interop")
    app.conf.update(settings)
    if news:
        app.conf.task_queues = [Queue(news, Exchange("news", type="fanout"), routing_key="today")]
    return define(app, "celery")


@worker_ready.connect(weak=False)
def tell_ready(**_: Any) -> None:
    open(os.environ[READY_FILE], "w").close()


if BROKER in os.environ:
    app = make(**worker_settings())

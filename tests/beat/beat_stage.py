# SPDX-License-Identifier: MIT
"""A stage for schedulers: a clock that moves when told, a broker in memory, and what was sent."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, Dict, List, Optional

from miniq import MiniQ
from miniq.beat import Scheduler
from miniq.connections.memory import MemoryBroker, broker_name
from miniq.message import Message
from miniq.transports.base import Publication


class Clock:
    """Epoch seconds that move only when told."""

    def __init__(self, text: str = "2026-03-02T10:00:00") -> None:
        self.set(text)

    def __call__(self) -> float:
        return self.now

    def set(self, text: str) -> None:
        """Turn the hands to a moment in UTC."""
        self.now = datetime.fromisoformat(text).replace(tzinfo=timezone.utc).timestamp()

    def shown(self) -> str:
        return datetime.fromtimestamp(self.now, timezone.utc).isoformat()[:19]


class Stage:
    """Beats over one store and one clock, in this process."""

    def __init__(self, url: str, clock: Clock) -> None:
        self.url = url
        self.clock = clock
        self.apps: List[MiniQ] = []

    def app(self, schedule: Optional[Dict[str, Any]] = None, **settings: Any) -> MiniQ:
        """Return an app with the tasks add and fail, and these periodic tasks."""
        app = MiniQ("proj", broker=self.url, wall=self.clock, beat_schedule=schedule or {}, **settings)
        app.task(name="add")(lambda x=0, y=0: x + y)
        app.task(name="silent", ignore_result=True)(lambda: None)
        self.apps.append(app)
        return app

    def beat(self, schedule: Optional[Dict[str, Any]] = None, **settings: Any) -> Scheduler:
        """Return a scheduler that has looked once."""
        found = Scheduler(self.app(schedule, **settings))
        found.tick()
        return found

    def pass_time(self, seconds: float, *beats: Scheduler) -> None:
        """Let time pass, and each beat do what is due then."""
        self.clock.now += seconds
        for beat in beats:
            while beat.tick() == 0.0:
                pass

    def messages(self) -> List[Message]:
        """Return the messages that were sent so far, in their order."""
        return [publication.message for publication in self.publications()]

    def publications(self) -> List[Publication]:
        """Return them with where they went."""
        rows = [row for _, row in sorted(MemoryBroker.get(broker_name(self.url)).rows.items())]
        return [Publication(row.message, row.exchange, row.routing_key) for row in rows]

    def sent(self) -> int:
        return len(self.messages())

# SPDX-License-Identifier: MIT
"""Three beats over one store, killed, stopped and with a clock that jumps: each tick is sent once.

Over a SQLite file and over Redis at the same time.  ``MINIQ_BEAT_CHAOS_S=180`` makes it three minutes.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
from waiting import wait_until
from workers import Program, environment

from miniq import MiniQ
from miniq.beat_entry import tick_id
from miniq.connections.redis import Server
from miniq.routing import Queue

CHAOS_S = float(os.environ.get("MINIQ_BEAT_CHAOS_S", "3"))
BEATS = 3
#: Sent again and again, and never run: there is no worker.
SOURCE = """
import time
from miniq import MiniQ
from miniq.schedules import schedule

def wall():
    with open("clock") as file:
        return time.time() + float(file.read())

app = MiniQ("proj", wall=wall)
app.conf.beat_schedule = {
    # By the clock: on each full second there is a tick, whatever happens to the clock.
    "all": {"task": "t", "schedule": schedule(1, relative=True), "catch_up": "all"},
    "once": {"task": "t", "schedule": 1.0},
}
"""
_SENT = re.compile(r"^\[(\S+ \S+),(\d+): .*Sending due task once", re.MULTILINE)


class Fleet:
    """Beats over one broker; a dead one is replaced."""

    def __init__(self, start: Callable[..., Program], folder: Path, url: str, chance: random.Random) -> None:
        self.url = url
        self._start = start
        self._folder = folder
        self._chance = chance
        self.programs: List[Program] = []
        self.beats = [self.start() for _ in range(BEATS)]
        self.stopped: Dict[Program, float] = {}
        self.counts = {"killed": 0, "stopped": 0}

    def start(self) -> Program:
        env = environment(self._folder, MINIQ_BROKER_URL=self.url)
        found = self._start([sys.executable, "-m", "miniq", "-A", "chaos", "beat", "-l", "INFO"], env=env)
        self.programs.append(found)
        return found

    def disturb(self) -> None:
        """Kill one, or stop one for a while."""
        mono = time.monotonic()
        for beat, until_mono in list(self.stopped.items()):
            if mono > until_mono:
                beat.send(signal.SIGCONT)
                del self.stopped[beat]
        at = self._chance.randrange(BEATS)
        beat = self.beats[at]
        if self._chance.random() < 0.4:
            self.stopped.pop(beat, None)
            beat.kill()
            self.counts["killed"] += 1
            self.beats[at] = self.start()
        elif beat not in self.stopped:
            beat.send(signal.SIGSTOP)
            self.counts["stopped"] += 1
            self.stopped[beat] = mono + self._chance.uniform(0.1, 2.0)

    def calm(self) -> None:
        for beat in self.stopped:
            beat.send(signal.SIGCONT)
        self.stopped.clear()

    def end(self) -> None:
        assert [beat.stop() for beat in self.beats] == [0] * BEATS

    def longest_gap_s(self) -> float:
        """Return the longest time without a run of the entry "once", by the logs (which lose some lines)."""
        moments = sorted(
            datetime.fromisoformat(day).timestamp() + int(ms) / 1000
            for program in self.programs
            for day, ms in _SENT.findall(program.log)
        )
        return max(b - a for a, b in zip(moments, moments[1:]))


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped here")
def test_beats_that_are_killed_stopped_and_misled_send_each_tick_once(
    program: Callable[..., Program],
    tmp_path: Path,
    redis_url: str,
    tell: Callable[[str], None],
) -> None:
    if CHAOS_S > 60:
        signal.setitimer(signal.ITIMER_REAL, CHAOS_S + 90)  # the limit of a test is shorter
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    print(f"seed {seed}")
    (tmp_path / "chaos.py").write_text(SOURCE)
    clock, ahead_s = tmp_path / "clock", 0.0

    def set_clock(seconds: float) -> None:
        (tmp_path / "clock.new").write_text(repr(seconds))
        os.replace(tmp_path / "clock.new", clock)

    set_clock(0.0)
    fleets = [Fleet(program, tmp_path, url, chance) for url in (f"sqlite:///{tmp_path}/jobs.db", redis_url)]
    for fleet in fleets:
        wait_until(lambda fleet=fleet: any("Sending" in one.log for one in fleet.beats), 20, "a first tick")
    jumps = 0
    until_mono = time.monotonic() + CHAOS_S
    while time.monotonic() < until_mono:
        time.sleep(chance.uniform(0.1, 0.5))
        if chance.random() < 0.15:
            ahead_s += chance.choice((-90, -20, -1.5, 0.7, 25, 90))
            jumps += 1
            set_clock(ahead_s)
        else:
            chance.choice(fleets).disturb()
    for fleet in fleets:
        fleet.calm()
    seen = [_runs(fleet.url)["once"] for fleet in fleets]
    for fleet, before in zip(fleets, seen):
        # It went on, whatever the clock did.
        wait_until(lambda fleet=fleet, n=before: _runs(fleet.url)["once"] > n + 1, 20, f"{fleet.url} goes on")
    for fleet in fleets:
        fleet.end()
        app = MiniQ("proj", broker=fleet.url)
        state = app.schedules.records()["all"]
        ids = _ids(app)
        assert len(set(ids)) == len(ids), f"seed {seed}: sent twice over {fleet.url}"
        wanted = {tick_id("proj", "all", state.last_due - n) for n in range(state.runs)}
        assert wanted <= set(ids), f"seed {seed}: {len(wanted - set(ids))} ticks are missing, {fleet.url}"
        assert len(ids) == state.runs + app.schedules.records()["once"].runs, f"seed {seed}: {fleet.url}"
        gap_s = fleet.longest_gap_s()
        tell(
            f"beat over {fleet.url.partition(':')[0]}: {len(ids)} ticks, each once, in {CHAOS_S:g} s with"
            f" {fleet.counts['killed']} killed, {fleet.counts['stopped']} stopped, {jumps} clock jumps;"
            f" longest gap {gap_s:.1f} s"
        )
        app.close()
    Server.close_all()


def _runs(url: str) -> Dict[str, int]:
    app = MiniQ("proj", broker=url)
    try:
        return {name: state.runs for name, state in app.schedules.records().items()}
    finally:
        app.close()


def _ids(app: MiniQ) -> List[str]:
    transport: Any = app.producer.new_transport(write=False)
    consumer = transport.consumer("test", [Queue("celery")])
    found: List[str] = []
    while True:
        some = consumer.poll(500)
        found += [str(one.message.headers["id"]) for one in some]
        if not some:
            transport.close()
            return found

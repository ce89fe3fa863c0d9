# SPDX-License-Identifier: MIT
"""What all benchmarks share: lines and targets, rates, CPU and memory of processes, how quiet it is."""

from __future__ import annotations

import os
import time
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

#: Everything that the targets of one run speak of: (who, what) -> per second, seconds or a share.
FIGURES: Dict[Tuple[str, str], float] = {}


def note(what: str, value: float, who: str = "miniq") -> float:
    FIGURES[who, what] = value
    return value


def show(name: str, value: str, floor: str = "", ratio: str = "") -> None:
    print(f"{name:<46} {value:>22}  {('floor ' + floor) if floor else '':<28} {ratio}".rstrip(), flush=True)


def rate(value: float) -> str:
    return f"{value:,.0f}/s"


def percentile(times: List[float], share: float) -> float:
    times = sorted(times)
    return times[min(len(times) - 1, int(len(times) * share))]


def percentiles(times: List[float]) -> str:
    return f"p50 {percentile(times, 0.5) * 1e3:.2f} ms, p99 {percentile(times, 0.99) * 1e3:.2f} ms"


def by_turns(
    calls: List[Callable[[], object]],
    turns: int,
    n: int = 250,
    between: Callable[[int], object] = lambda index: None,
) -> List[List[Tuple[float, float]]]:
    """Time `n` of each call, one kind after the other, again and again, so that a disturbance meets all.

    After each turn `between` is called with the index of the call, untimed.
    Return for each call its (calls per second, CPU seconds of this process per call), one pair a turn.
    """
    found: List[List[Tuple[float, float]]] = [[] for _ in calls]
    for _ in range(turns):
        for index, (call, pairs) in enumerate(zip(calls, found)):
            cpu, start = time.process_time(), time.perf_counter()
            for _ in range(n):
                call()
            took, used = time.perf_counter() - start, time.process_time() - cpu
            pairs.append((n / took, used / n))
            between(index)
    return found


def middle(pairs: List[Tuple[float, float]]) -> float:
    """The median rate of what `by_turns` found."""
    return percentile([rate for rate, _ in pairs], 0.5)


def latencies_by_turns(calls: List[Callable[[], object]], n: int) -> List[List[float]]:
    """Time each call `n` times, one of each in turn with a short rest before it; return seconds."""
    found: List[List[float]] = [[] for _ in calls]
    for _ in range(n):
        for call, times in zip(calls, found):
            time.sleep(0.002)
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return found


def rate_of_drain(left: Callable[[], int], n: int, timeout_s: float = 120.0) -> float:
    """Return tasks per second between 90 % and 10 % of `n` left."""
    deadline = time.monotonic() + timeout_s
    while left() > n * 0.9 and time.monotonic() < deadline:
        time.sleep(0.005)
    begin, at = left(), time.perf_counter()
    now_left = begin
    while now_left > n * 0.1 and time.monotonic() < deadline:
        time.sleep(0.02)
        now_left = left()
    return (begin - now_left) / (time.perf_counter() - at)


# -- processes -----------------------------------------------------------------------------------


def cpu_of(pids: List[int]) -> float:
    """User + system seconds of processes so far."""
    ticks = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> List[int]:
    """A process and all that came from it, threads' children included."""
    found = [pid]
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children") as file:
            for child in file.read().split():
                found += family(int(child))
    return found


def pss_kib(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


def _busy_ticks() -> int:
    with open("/proc/stat") as file:
        fields = [int(field) for field in file.readline().split()[1:]]
    return sum(fields) - fields[3] - fields[4]


def how_quiet() -> str:
    """Say what others do on this machine, by looking while we do nothing ourselves."""
    if not os.path.exists("/proc/stat"):
        return "this system does not tell how busy it is"
    before = _busy_ticks()
    time.sleep(0.5)
    busy = (_busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / 0.5
    cores = os.cpu_count() or 1
    return f"load {os.getloadavg()[0]:.2f}, others on {busy:.1f} of {cores} cores"


# -- targets -------------------------------------------------------------------------------------


class Target(NamedTuple):
    """What shall hold of a figure: at least (or at most) `bound`, as it is or over a base.

    `base` names the figure to divide by; `bound` counts in units of it then.
    """

    text: str
    what: str
    bound: float
    at_most: bool = False
    base: Optional[Callable[[], Optional[float]]] = None
    unit: str = "x"
    scale: float = 1.0


def of_fastest_peer(what: str) -> Optional[float]:
    found = [value for (name, figure), value in FIGURES.items() if name != "miniq" and figure == what]
    return max(found) if found else None


def of_celery(what: str) -> Optional[float]:
    return FIGURES.get(("Celery", what))


def show_targets(title: str, targets: List[Target]) -> None:
    """Print each target of which something was measured, with what it came to."""
    lines = []
    for target in targets:
        value = FIGURES.get(("miniq", target.what))
        if value is None:
            continue
        if target.base is not None:
            base = target.base()
            if not base:
                lines.append(f"  {target.text:<46} {'nothing to compare with':>22}")
                continue
            value /= base
        value *= target.scale
        met = value <= target.bound if target.at_most else value >= target.bound
        bound = f"{'<=' if target.at_most else '>='} {target.bound:,g}{target.unit}"
        measured = f"{value:,.2f}{target.unit}"
        lines.append(f"  {target.text:<46} {measured:>22}  target {bound:<14} {'met' if met else 'MISSED'}")
    if lines:
        print("\n".join((title, *lines)), flush=True)

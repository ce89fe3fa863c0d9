# SPDX-License-Identifier: MIT
"""Options of a worker: queues, purge, prefetch, the size and the life of its pool."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from waiting import wait_until

SOURCE = """
    import os, time
    from miniq import MiniQ, Queue

    app = MiniQ("proj", task_queues=[Queue("celery"), Queue("mail"), Queue("reports")])

    @app.task
    def add(x, y):
        return x + y

    @app.task
    def pid():
        return os.getpid()

    @app.task
    def hold(name):
        open(f"held-{name}", "w").close()
        while not os.path.exists("release"):
            time.sleep(0.01)
        return name

    kept = []

    @app.task
    def grow(mib):
        kept.append(bytearray(os.urandom(1024) * 1024 * mib))
        return os.getpid()
    """


def held(tmp_path: Any) -> int:
    return sum(name.startswith("held-") for name in os.listdir(tmp_path))


def test_queues_can_be_chosen_left_out_added_and_cancelled(
    worker_process: Any, client: Any, tmp_path: Any
) -> None:
    (tmp_path / "extra.py").write_text(
        "from proj import app\n@app.task(name='proj.extra')\ndef extra(): return 'extra'\n"
    )
    worker = worker_process(SOURCE, "-c", "1", "-Q", "mail, other", "-I", "extra")
    assert "queues   mail, other" in worker.log
    ours = client.send("add", 1, 2, queue="mail")
    other = client.send("add", 2, 2, queue="other")
    reports = client.send("add", 3, 2, queue="reports")
    assert (ours.get(timeout=10), other.get(timeout=10)) == (3, 4)
    assert client.run("extra", queue="mail") == "extra"
    assert client.waiting("reports") == (1, 0, 0)
    client.app.control.add_consumer("reports")
    assert reports.get(timeout=10) == 5
    client.app.control.cancel_consumer("mail")
    client.app.control.broadcast("ping")
    wait_until(lambda: "mail" not in _consumed(client))
    left = client.send("add", 4, 4, queue="mail")
    assert client.run("add", 5, 5, queue="other") == 10
    assert client.waiting("mail") == (1, 0, 0)
    worker.stop()
    second = worker_process(None, "-c", "1", "-X", "celery,reports")
    assert "queues   mail" in second.log
    assert left.get(timeout=10) == 8


def _consumed(client: Any) -> str:
    [row] = client.app.producer.transport._database().read("SELECT group_concat(queues) FROM owners")
    return str(row[0])


def test_purge_deletes_what_waits_before_anything_starts(worker_process: Any, client: Any) -> None:
    for number in range(3):
        client.send("add", number, number)
    client.send("add", 1, 1, countdown=60)
    worker = worker_process(SOURCE, "-c", "1", "--purge")
    assert "Purged 4 messages from queue celery" in worker.log
    assert client.waiting() == (0, 0, 0)
    assert client.run("add", 2, 2) == 4
    assert worker.log.count("] received") == 1


def test_prefetched_messages_are_handed_back_at_the_shutdown(
    worker_process: Any, client: Any, tmp_path: Any
) -> None:
    results = [client.send("hold", number) for number in range(8)]
    first = worker_process(SOURCE, "-c", "1", "--prefetch-multiplier", "4")
    wait_until(lambda: client.waiting() == (4, 0, 4) and held(tmp_path) == 1, what=client.waiting)
    first.process.terminate()
    wait_until(lambda: client.waiting() == (7, 0, 1), what=client.waiting)
    second = worker_process(None, "-c", "2")
    wait_until(lambda: client.waiting() == (5, 0, 3), what=client.waiting)
    (tmp_path / "release").touch()
    assert sorted(result.get(timeout=10) for result in results) == list(range(8))
    assert first.wait() == 0
    assert "1 finished, 3 handed back, 0 lost" in first.log
    assert second.log.count("] received") == 7


def test_short_tasks_are_not_bound_to_a_busy_worker(worker_process: Any, client: Any, tmp_path: Any) -> None:
    source = SOURCE + '\n    print("multiplier", app.conf.worker_prefetch_multiplier)\n'
    first = worker_process(source, "-c", "2")
    long = [client.send("hold", number) for number in range(2)]
    wait_until(lambda: held(tmp_path) == 2)
    short = [client.send("add", number, 0) for number in range(20)]
    assert client.waiting() == (20, 0, 2)
    worker_process(None, "-c", "1")
    assert [result.get(timeout=10) for result in short] == list(range(20))
    (tmp_path / "release").touch()
    assert [result.get(timeout=10) for result in long] == [0, 1]
    assert first.log.count("] received") == 2


@pytest.mark.skipif(os.name != "posix", reason="counts child processes")
def test_autoscale_grows_under_load_and_shrinks_afterwards(
    worker_process: Any, client: Any, tmp_path: Any
) -> None:
    source = (
        SOURCE
        + """
    import miniq.worker.worker as worker
    worker.AUTOSCALE_KEEPALIVE_S, worker.AUTOSCALE_INTERVAL_S = 0.3, 0.05
    """
    )
    worker = worker_process(source, "--autoscale", "1,3")
    assert "1 to 3 at once" in worker.log
    wait_until(lambda: len(worker.children) == 1)
    results = [client.send("hold", number) for number in range(5)]
    wait_until(lambda: held(tmp_path) == 3)
    assert len(worker.children) == 3
    (tmp_path / "release").touch()
    assert sorted(result.get(timeout=10) for result in results) == list(range(5))
    wait_until(lambda: len(worker.children) == 1)
    assert client.run("add", 1, 2) == 3
    assert "Scaling up to 3 slots." in worker.log and "Scaling down to 1 slots." in worker.log


@pytest.mark.skipif(os.name != "posix", reason="has pool processes of its own making")
def test_children_are_replaced_after_so_many_tasks_or_so_much_memory(
    worker_process: Any, client: Any
) -> None:
    worker_process(SOURCE, "-c", "1", "--max-tasks-per-child", "2", "--max-memory-per-child", "120000")
    pids = [client.run("pid") for _ in range(6)]
    assert len(set(pids)) == 3
    assert pids[0] == pids[1] != pids[2] == pids[3]
    small = client.run("grow", 1)
    big = client.run("grow", 150)
    assert small == big
    first = client.run("grow", 150)
    assert first != client.run("pid")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads CPU times from /proc")
def test_idle_worker_uses_hardly_any_cpu(worker_process: Any, client: Any) -> None:
    worker = worker_process(SOURCE, "-c", "2")
    client.run("add", 1, 2)

    def cpu_s() -> float:
        total = 0
        for pid in (worker.pid, *worker.children):
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return float(total) / os.sysconf("SC_CLK_TCK")

    before, mono = cpu_s(), time.monotonic()
    wait_until(lambda: time.monotonic() - mono > 2.0, pause_s=0.2)
    used_s = cpu_s() - before
    # 5 %: ten times what is meant, so that no slow machine fails it.
    assert used_s <= 0.05 * (time.monotonic() - mono), f"{used_s} s of CPU"

# SPDX-License-Identifier: MIT
"""Bare loops over sqlite3 and pipes that do the work of a queue and nothing else."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sqlite3
import subprocess
import sys
import time
from typing import Any, List, Tuple

from children import Children

ENVELOPE = "e" * 800  #: about what headers and properties of a message take
BODY = b'[[2, 3], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'

SCHEMA = """
CREATE TABLE messages(id INTEGER PRIMARY KEY, queue TEXT, state INTEGER, priority INTEGER, due REAL,
    owner INTEGER, deliveries INTEGER, envelope TEXT, body BLOB);
CREATE INDEX ready ON messages(queue, priority DESC, due, id) WHERE state = 0;
CREATE TABLE results(task_id TEXT PRIMARY KEY, body BLOB);
"""


def connect(path: str, synchronous: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, timeout=10)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute(f"PRAGMA synchronous = {synchronous}")
    return db


def create(path: str) -> None:
    db = connect(path, "NORMAL")
    db.executescript(SCHEMA)
    db.close()


INSERT = (
    "INSERT INTO messages(queue, state, priority, due, deliveries, envelope, body)"
    " VALUES('celery', 0, 0, ?, 0, ?, ?)"
)


def enqueue(path: str, n: int, synchronous: str) -> float:
    """Insert `n` messages one by one; return messages per second."""
    create(path)
    db = connect(path, synchronous)
    start = time.perf_counter()
    for _ in range(n):
        db.execute(INSERT, (time.time(), ENVELOPE, BODY))
    return n / (time.perf_counter() - start)


def fill(path: str, n: int) -> None:
    create(path)
    db = connect(path, "OFF")
    db.execute("BEGIN")
    db.executemany(INSERT, ((time.time(), ENVELOPE, BODY) for _ in range(n)))
    db.execute("COMMIT")
    db.close()


def drain_batched(path: str, n: int, batch: int, results: bool) -> float:
    """Claim and delete in batches, one process, no tasks run; return messages per second."""
    fill(path, n)
    db = connect(path, "NORMAL")
    done = 0
    start = time.perf_counter()
    while done < n:
        db.execute("BEGIN IMMEDIATE")
        rows = db.execute(
            "SELECT id, envelope, body FROM messages WHERE state = 0 AND queue = 'celery'"
            " ORDER BY priority DESC, due, id LIMIT ?",
            (batch,),
        ).fetchall()
        ids = [(row[0],) for row in rows]
        db.executemany(
            "UPDATE messages SET state = 1, owner = 1, deliveries = deliveries + 1 WHERE id = ?", ids
        )
        db.execute("COMMIT")
        db.execute("BEGIN IMMEDIATE")
        if results:
            db.executemany(
                "INSERT INTO results VALUES(?, ?)",
                ((os.urandom(16).hex(), b'{"status": "SUCCESS"}') for _ in ids),
            )
        db.executemany("DELETE FROM messages WHERE id = ? AND owner = 1", ids)
        db.execute("COMMIT")
        done += len(ids)
    return n / (time.perf_counter() - start)


def _args_of(body: bytes) -> Any:
    return json.loads(body)[0]


def drain_with_children(path: str, n: int, children: int, results: bool) -> float:
    """One message at a time to each of `children` processes over socketpairs, as a queue must.

    Start is marked before the child gets the message, the end deletes it; all that is ready goes
    into one transaction.
    """
    fill(path, n)
    db = connect(path, "NORMAL")
    pool = Children(children, _args_of)
    done = 0
    ended: List[Tuple[int, bytes]] = []
    start = time.perf_counter()
    while done < n:
        db.execute("BEGIN IMMEDIATE")
        if ended:
            if results:
                db.executemany(
                    "INSERT INTO results VALUES(?, ?)", ((os.urandom(16).hex(), b) for _, b in ended)
                )
            db.executemany("DELETE FROM messages WHERE id = ? AND owner = 1", [(i,) for i, _ in ended])
        rows = db.execute(
            "SELECT id, envelope, body FROM messages WHERE state = 0 AND queue = 'celery'"
            " ORDER BY priority DESC, due, id LIMIT ?",
            (pool.idle,),
        ).fetchall()
        db.executemany(
            "UPDATE messages SET state = 1, owner = 1, deliveries = deliveries + 1 WHERE id = ?",
            [(row[0],) for row in rows],
        )
        db.execute("COMMIT")
        done += len(ended)
        ended = []
        for row in rows:
            pool.give(row[0], row[2])
        if pool.busy:
            ended = pool.wait()
    rate = n / (time.perf_counter() - start)
    pool.close()
    return rate


def roundtrip(path: str, n: int) -> "list[float]":
    """Insert, wake another process by a datagram, which claims, stores a result and wakes us."""
    create(path)
    context = multiprocessing.get_context("fork")
    mine = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    mine.bind(("127.0.0.1", 0))
    theirs = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    theirs.bind(("127.0.0.1", 0))
    process = context.Process(target=_answer, args=(path, theirs, mine.getsockname(), n))
    process.start()
    db = connect(path, "FULL")
    times = []
    for _ in range(n):
        begin = time.perf_counter()
        db.execute(INSERT, (time.time(), ENVELOPE, BODY))
        mine.sendto(b"x", theirs.getsockname())
        mine.recv(16)
        db.execute("SELECT body FROM results ORDER BY rowid DESC LIMIT 1").fetchone()
        times.append(time.perf_counter() - begin)
    process.join()
    return times


def _answer(path: str, mine: socket.socket, address: "tuple[str, int]", n: int) -> None:
    db = connect(path, "NORMAL")
    for i in range(n):
        mine.recv(16)
        db.execute("BEGIN IMMEDIATE")
        row = db.execute("SELECT id FROM messages WHERE state = 0 AND queue = 'celery' LIMIT 1").fetchone()
        db.execute("UPDATE messages SET state = 1, owner = 1 WHERE id = ?", row)
        db.execute("COMMIT")
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO results VALUES(?, ?)", (str(i), b"{}"))
        db.execute("DELETE FROM messages WHERE id = ?", row)
        db.execute("COMMIT")
        mine.sendto(b"x", address)


def start_of_python() -> float:
    """Seconds from the start of a bare interpreter to its first line."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "print()"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin

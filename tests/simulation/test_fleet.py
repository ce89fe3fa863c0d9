# SPDX-License-Identifier: MIT
"""A thousand schedules of a small fleet, each with its own deaths, lost connections and doubles.

Half of them over a broker whose transactions roll back, half over Redis, which does a turn in steps that
stay done: there, answers get lost too, connections are closed, leases are over while a worker stands
still, and a worker of Celery's puts back what is past its lease.

What is promised whatever happens: no accepted task is lost, an early-acked one never starts twice,
a late-acked one not more often than its limit, none before its eta, after its expiry or revocation;
results never go backwards; callbacks are sent once for each success; rate limits are kept; no worker
says that an outcome was dropped which it has settled.

`MINIQ_SIM_SCHEDULES` sets how many schedules are played, `MINIQ_SIM_SEED` plays a single one.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Tuple

import pytest
from simulation.brokers import MemoryFleetBroker, RedisFleetBroker
from simulation.fleet import Fleet, Variant, play
from simulation.seams import ConsumerProxy, Proxy
from simulation.world import Violation

from miniq.backends.base import StoredResult
from miniq.message import Delivery, Message
from miniq.transports.base import NotOurs, Publication

SCHEDULES = int(os.environ.get("MINIQ_SIM_SCHEDULES", "1000"))
ONLY_SEED = os.environ.get("MINIQ_SIM_SEED")
#: Among so many schedules a fleet that breaks a promise must be found out.
ENOUGH = 400
#: Failing schedules that are looked for before the shortest of them is shown.
MAX_FAILURES = 5

#: Every kind of fault and where it must have struck in a thousand schedules.
STRUCK = {
    *(f"{kind}: {point}" for kind in ("crash", "lost connection") for point in (
        "connecting", "command", "after the command", "step", "after the step", "renewal", "listening",
    )),
    *(f"crash: {point}" for point in (
        "poll", "start", "publish", "store", "after the store", "ack", "before the commit",
        "after the commit", "committed, not given to the pool yet", "between two turns", "housekeep",
    )),
    *(f"lost connection: {point}" for point in (
        "poll", "start", "publish", "after publish", "store", "ack", "before the commit", "housekeep",
    )),
    "refused: store",
}  # fmt: skip


def report(fleet: Fleet, violation: Violation, seeds: Iterable[int]) -> str:
    """Return what to read when schedules fail, and how to play one again."""
    seed = fleet.world.seed
    return "\n".join(
        [
            *fleet.world.told(),
            f"schedule {seed}: {violation}",
            f"failing schedules: {', '.join(map(str, seeds))}; above is the shortest. To play it again:",
            f"MINIQ_SIM_SEED={seed} python -m pytest tests/simulation -k promises",
        ]
    )


def test_promises_are_kept_in_every_schedule() -> None:
    seeds = range(SCHEDULES) if ONLY_SEED is None else [int(ONLY_SEED)]
    failed: List[Tuple[Fleet, Violation]] = []
    struck: "Counter[str]" = Counter()
    for seed in seeds:
        fleet, violation = play(seed)
        struck += fleet.world.struck
        if violation is not None:
            failed.append((fleet, violation))
            if len(failed) == MAX_FAILURES:
                break
    if failed:
        shortest = min(failed, key=lambda one: len(one[0].world.trace))
        pytest.fail(report(*shortest, [fleet.world.seed for fleet, _ in failed]), pytrace=False)
    if len(seeds) >= 1000:
        assert struck.keys() >= STRUCK, f"no fault has struck here: {sorted(STRUCK - struck.keys())}"


# -- the harness itself --------------------------------------------------------------------------


def trace_of(seeds: Iterable[int]) -> str:
    """Return a digest of the traces of some schedules."""
    digest = hashlib.sha256()
    for seed in seeds:
        digest.update("\n".join(play(seed)[0].world.told()).encode())
    return digest.hexdigest()


def test_a_seed_plays_the_same_schedule_again_in_another_process() -> None:
    code = "from simulation.test_fleet import trace_of; print(trace_of(range(20)))"
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests.parent), str(tests)])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == trace_of(range(20)), done.stderr


class AckAtTheStart(ConsumerProxy):
    """Tells the broker of late-acked messages what is true of early-acked ones."""

    def start(self, deliveries: Sequence[Delivery]) -> None:
        early = [delivery.early for delivery in deliveries]
        for delivery in deliveries:
            delivery.early = True
        self.inner.start(deliveries)
        for delivery, before in zip(deliveries, early):
            delivery.early = before


class StartUntold(ConsumerProxy):
    """Lets messages start without telling the broker."""

    def start(self, deliveries: Sequence[Delivery]) -> None:
        pass


class ReleaseForgets(ConsumerProxy):
    """Acknowledges what should go back."""

    def release(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self.inner.ack(delivery)


class NoRecovery(ConsumerProxy):
    """Leaves to the dead what they held."""

    def housekeep(self) -> None:
        pass


class AlwaysDue(ConsumerProxy):
    """Sends the worker round and round."""

    def next_due(self) -> "float":
        return 0.0


class NoTransactions(Proxy):
    """Commits every call for itself."""

    def transaction(self) -> Any:
        return nullcontext()


class SendsTwice(Proxy):
    """Publishes every message twice."""

    def publish(self, publications: Sequence[Publication], timeout_s: float) -> None:
        self.inner.publish(publications, timeout_s)
        self.inner.publish(publications, timeout_s)


class EtaUnknown(Proxy):
    """Publishes messages without their eta."""

    def publish(self, publications: Sequence[Publication], timeout_s: float) -> None:
        self.inner.publish([without(publication, "eta") for publication in publications], timeout_s)


class ExpiryUnknown(Proxy):
    """Publishes messages without their end."""

    def publish(self, publications: Sequence[Publication], timeout_s: float) -> None:
        lasting = [without(publication, "expires", "expiration") for publication in publications]
        self.inner.publish(lasting, timeout_s)


def without(publication: Publication, *names: str) -> Publication:
    """Return a copy of a publication that lacks some headers and properties."""
    message = publication.message
    headers, properties = (
        {name: value for name, value in given.items() if name not in names}
        for given in (message.headers, message.properties)
    )
    message = Message(message.body, message.content_type, message.content_encoding, headers, properties)
    return publication._replace(message=message)


class HearsNoRevocation(ConsumerProxy):
    """Neither asks the broker for revocations nor listens to commands."""

    def poll(self, limit: int) -> List[Delivery]:
        found = [delivery for delivery in self.inner.poll(limit) if "task" in delivery.message.headers]
        for delivery in found:
            if delivery.fate == "revoked":
                delivery.fate = None
        return found


class ForgetsDoubt(ConsumerProxy):
    """Does not look for messages that were taken by a step whose answer got lost."""

    def poll(self, limit: int) -> List[Delivery]:
        self.inner.in_doubt = False
        found: List[Delivery] = self.inner.poll(limit)
        return found


class DoubtedIsLost(ConsumerProxy):
    """Takes what it settled, by a step whose answer got lost, for a message that went to others."""

    def ack(self, delivery: Delivery) -> bool:
        delivery.tag.doubted = False
        done: bool = self.inner.ack(delivery)
        return done


class TakesTheLivingForDead(ConsumerProxy):
    """Recovers what others hold, and goes by what their children have noted."""

    def housekeep(self) -> None:
        self.inner._ownership._died_here = lambda owner: True
        self.inner.housekeep()


class StartsOthers(Proxy):
    """Starts what is not its own any more."""

    @contextmanager
    def transaction(self) -> Iterator[None]:
        at_its_end = False
        try:
            with self.inner.transaction():
                yield
                at_its_end = True
        except NotOurs:
            if not at_its_end:
                raise


class LastWriteWins(Proxy):
    """Stores whatever comes over whatever is there."""

    def store(self, results: Sequence[StoredResult]) -> None:
        self.inner.forget([result.task_id for result in results])
        self.inner.store(results)


class StoresLess(Proxy):
    """Loses results of failures."""

    def store(self, results: Sequence[StoredResult]) -> None:
        self.inner.store([result for result in results if result.state != "FAILURE"])


BROKEN: Dict[str, Tuple[Variant, str]] = {
    "acknowledges late tasks at the start": (Variant(consumer=AckAtTheStart), "may be started again"),
    "does not tell the broker of starts": (Variant(consumer=StartUntold), "starts a second time"),
    "drops what it gives back": (Variant(consumer=ReleaseForgets), "0 times"),
    "recovers nothing from the dead": (Variant(consumer=NoRecovery), "no end"),
    "turns without end": (Variant(consumer=AlwaysDue), "no end"),
    "settles in pieces": (Variant(transport=NoTransactions), "or set aside 0 times"),
    "sends everything twice": (Variant(transport=SendsTwice), "starts a second time"),
    "ignores etas": (Variant(transport=EtaUnknown), "before its eta"),
    "ignores expiry": (Variant(transport=ExpiryUnknown), "after it had expired"),
    "ignores revocations": (Variant(consumer=HearsNoRevocation), "was revoked before"),
    "overwrites results": (Variant(backend=LastWriteWins), "went from"),
    "loses results": (Variant(backend=StoresLess), "is lost"),
    "hears no wake-ups": (Variant(deaf=True, broker=MemoryFleetBroker), "no end"),
    "ignores rate limits": (Variant(settings={"worker_disable_rate_limits": True}), "started rated"),
    "starts too often": (Variant(settings={"task_delivery_limit": 0}), "the limit is 3"),
    "forgets what is in doubt": (Variant(consumer=ForgetsDoubt, broker=RedisFleetBroker), "no end"),
    "takes what it settled for lost": (
        Variant(consumer=DoubtedIsLost, broker=RedisFleetBroker), "but it was settled here"
    ),
    "takes the living for dead": (
        Variant(consumer=TakesTheLivingForDead, broker=RedisFleetBroker), "starts a second time"
    ),
    "starts what went to others": (
        Variant(transport=StartsOthers, broker=RedisFleetBroker), "the broker does not know that it did"
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_fleet_that_is_broken_is_found_out(name: str) -> None:
    variant, expected = BROKEN[name]
    for seed in range(ENOUGH):
        violation = play(seed, variant)[1]
        if violation is not None and expected in str(violation):
            return
    pytest.fail(f"a fleet that {name} was not found out in {ENOUGH} schedules")

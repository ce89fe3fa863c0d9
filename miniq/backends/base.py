# SPDX-License-Identifier: MIT
"""The seam between miniq and a result store, and the one form results have in all of them.

A stored result is its *meta*, a dict with Celery's keys in Celery's order::

    status, result, traceback, children, date_done[, group_id][, parent_id]
    [, name, args, kwargs, worker, retries, queue, stamped headers...], task_id

`result` is the return value (SUCCESS), ``{"exc_type", "exc_message", "exc_module"}`` (FAILURE,
RETRY, REVOKED), ``{"pid", "hostname"}`` (STARTED) or the task's own meta (custom states).  The
process that ran the task encodes it once; stores keep the bytes.

Writes are conditional everywhere: `states.may_replace` decides.

A store that counts chords keeps, for each, what its members came to, until all have arrived; then one
of those who ask gets a *claim*, and with it the duty to send the body and to call `finish_chord`.  A claim
runs out, so that a chord whose claimer died is not lost: another one gets it.
"""

from __future__ import annotations

from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

from ..connections.claims import ClaimLost
from ..exceptions import ImproperlyConfigured
from ..text import import_object, mask_url, unknown_scheme

__all__ = (
    "Arrival", "Backend", "ChordPart", "ClaimLost", "StoredResult", "backend_class", "pause_between_looks_s",
)  # fmt: skip

#: URL scheme -> "module:Class", relative to this package.
BACKENDS: Dict[str, str] = {
    "disabled": ".disabled:DisabledBackend",
    "memory": ".memory:MemoryBackend",
    "cache+memory": ".memory:MemoryBackend",
    "sqlite": ".sqlite:SQLiteBackend",
    "file": ".files:FileBackend",
    "memcache": ".cache:MemcachedBackend",
    "cache+memcached": ".cache:MemcachedBackend",
    "redis": ".redis:RedisBackend",
    "rediss": ".redis:RedisBackend",
    "redis+socket": ".redis:RedisBackend",
    "unix": ".redis:RedisBackend",
    "sentinel": ".redis:RedisBackend",
    "valkey": ".redis:RedisBackend",
    "valkey+socket": ".redis:RedisBackend",
    "valkeys": ".redis:RedisBackend",
    "rpc": ".rpc:RpcBackend",
}


#: Schemes whose backends have something to do before a call is published.
CALLERS = ("rpc",)

#: How long a claim on a chord lasts, first and while its body is sent, and how long a chord is known to
#: be done.  Celery's figures.
CLAIM_S = 6
SENDING_S = 21
DONE_S = 300
#: Chords that `Backend.chords_left_over` names at once.
MOST_LEFT_OVER = 100


class StoredResult(NamedTuple):
    """An encoded meta, opaque to the store.

    `expires_s` is how long it is kept, None for ever.  `reply_to` is the address that the call named
    for its answer: what is sent there and not stored needs it.
    """

    task_id: str
    state: str
    body: bytes
    content_type: str
    content_encoding: str
    expires_s: Optional[float]
    reply_to: str = ""


class ChordPart(NamedTuple):
    """What a member of a chord's header came to: its end, whatever that was, never a retry.

    `index` is its place in the header and `entry` the JSON text ``[1, task_id, state, result]``.
    `expires_s` is how long the chord is kept from now on, None leaves that as it is.  `body` is the
    chord's body as the member's message has it: for one that Celery started.  `token` is to be a unique
    text: who asks again with the same one gets the claim again that it got before.
    """

    group_id: str
    index: Optional[int]  # type: ignore[assignment]  # hides a method of tuples that nobody needs here
    task_id: str
    entry: bytes
    expires_s: Optional[float]
    body: bytes = b""
    token: str = ""


class Arrival(NamedTuple):
    """How a chord stands: `count` of its `size` members arrived; None while the size is not known.

    Who has a `claim` has to send the body and to finish the chord, and nobody else has one while it lasts.
    `done`: that was done already, or the chord was abandoned.
    """

    count: int  # type: ignore[assignment]  # hides a method of tuples that nobody needs here
    size: Optional[int]
    claim: Optional[str]
    done: bool


class Backend:
    """One thread's conversation with one result store.

    Errors: `BackendStoreError` / `BackendGetMetaError`, with the cause chained.
    """

    #: True where a waiter is told; False where `wait` looks again and again (bounded).
    push_waits = False
    #: False for the store that keeps nothing.
    enabled = True
    #: True where members of a chord are counted, False where a task has to look for them.
    counts_chords = False
    #: True where a task looks after chords although they are counted.
    watches_chords = False
    #: False where only the process that called a task can read its result.
    is_shared = True
    #: What is wrong with saving groups here; empty where they are kept.
    keeps_no_groups = ""

    def __init__(self, url: str, options: Mapping[str, Any], wall: Callable[[], float]) -> None:
        """Remember `url` and `options` (``result_backend_transport_options``); open nothing yet."""
        raise NotImplementedError

    @property
    def joins(self) -> bool:
        """Whether what is written now is one step with an open transaction of a transport."""
        return False

    def before_call(self, timeout_s: float) -> None:
        """Get ready for the answer, before a call that expects one is published.

        Only called where the scheme is one of CALLERS; raises `OperationalError`.
        """

    def store(self, results: Sequence[StoredResult]) -> None:
        """Write results, each only where `states.may_replace` allows it.

        Joins the transaction of a transport on the same store (see `transports.base`).
        """
        raise NotImplementedError

    def fetch(self, task_ids: Sequence[str]) -> Dict[str, StoredResult]:
        """Return what is stored and not expired; unknown ids are missing from the dict."""
        raise NotImplementedError

    def wait(
        self,
        task_ids: Sequence[str],
        timeout_s: Optional[float],
        interval_s: Optional[float] = None,
        unready: bool = False,
    ) -> Iterator[StoredResult]:
        """Yield each result as it becomes final, in the order they do, until all are.

        Returns early (without error) when `timeout_s` is over; 0 looks once.  `interval_s` is the
        longest pause between two looks where the store cannot push.  With `unready`, changes to
        states that are not final are yielded too.  Leaves nothing behind, however it is left.
        """
        raise NotImplementedError

    def forget(self, task_ids: Iterable[str]) -> None:
        """Delete results."""
        raise NotImplementedError

    def expire(self) -> int:
        """Delete what is past its time; return how many.  Nothing to do where the store does it."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the connection."""
        raise NotImplementedError

    # -- groups

    def save_group(self, group_id: str, body: bytes, expires_s: Optional[float]) -> None:
        """Keep an encoded group, ``{"result": [[id, parent], [member, ...]]}``, in the place of an older one.

        All three raise `ImproperlyConfigured` where no groups are kept.
        """
        raise self._no_groups(group_id)

    def load_group(self, group_id: str) -> Optional[bytes]:
        """Return a group as it was saved, None if there is none; DecodeError if it cannot be decompressed."""
        raise self._no_groups(group_id)

    def delete_group(self, group_id: str) -> None:
        """Forget a group; its members' results stay."""
        raise self._no_groups(group_id)

    def _no_groups(self, group_id: str) -> ImproperlyConfigured:
        return ImproperlyConfigured(
            f"group {group_id!r} can be neither saved nor restored: {self.keeps_no_groups};"
            " set result_backend to a store, as redis:// or sqlite:///miniq.db"
        )

    # -- chords, where `counts_chords`

    def start_chord(
        self, group_id: str, size: int, body: bytes, expires_s: Optional[float], anew: bool = True
    ) -> None:
        """Say how many members the header has, before its last message is sent.

        `body` is its frozen signature in JSON, for who has to send it after a crash.  One that is done is
        counted again from nothing; not with `anew` False, which is for the second try of a step that may
        have been sent before.

        This, finishing and abandoning join an open transaction; so does all that changes chords, but on
        Redis, where what has an answer is a step of its own.
        """
        raise NotImplementedError

    def arrive_at_chords(self, parts: Sequence[ChordPart]) -> List[Arrival]:
        """Count members, each once by its id and index: the first end that is told of it is the one.

        To be called before the member's message is settled: where this is a step of its own and the
        process dies in between, the message comes again, and with it a part that is known already.
        """
        raise NotImplementedError

    def arrive_at_chord(self, part: ChordPart) -> Arrival:
        """Count one member."""
        return self.arrive_at_chords((part,))[0]

    def claim_chord(self, group_id: str, token: str = "") -> Arrival:
        """Ask for the claim without being a member: for a chord that is left over."""
        raise NotImplementedError

    def chord_entries(self, group_id: str) -> List[bytes]:
        """Return the entries that arrived, in the order of the header, those without an index last."""
        raise NotImplementedError

    def extend_chord(self, group_id: str, claim: str) -> bool:
        """Make a claim last SENDING_S from now, while the body is sent; False: it is lost."""
        raise NotImplementedError

    def finish_chord(self, group_id: str, claim: str) -> bool:
        """Note that what follows the chord, its body or the errbacks, is sent; its parts are not needed now.

        False, and nothing is done, if the claim was lost.  In a transaction on the same Redis that is found
        at its end: then nothing of the transaction is done, and `ClaimLost` is raised there.
        """
        raise NotImplementedError

    def abandon_chord(self, group_id: str) -> None:
        """See to it that the body is never sent.  The entries stay until they expire."""
        raise NotImplementedError

    def add_to_chord(
        self, group_id: str, count: int = 1, token: str = "", expires_s: Optional[float] = None
    ) -> bool:
        """Let the header have more members; called by one of them before it ends.  False: it is too late.

        Told again with the same `token` it counts once.
        """
        raise NotImplementedError

    def chords_left_over(self, now: float) -> List[Tuple[str, bytes]]:
        """Return (id, body) of chords whose members have all arrived and which nobody ends.

        That is so when a claim ran out; `claim_chord` gives it to another one.  At most MOST_LEFT_OVER.
        """
        raise NotImplementedError


def backend_class(url: str) -> "type[Backend]":
    """Return the class for the URL's scheme; `ImproperlyConfigured` names the known ones."""
    scheme = url.partition("://")[0].lower()
    target = BACKENDS.get(scheme)
    if target is None:
        raise ImproperlyConfigured(f"result backend {mask_url(url)!r}: {unknown_scheme(scheme, BACKENDS)}")
    found: "type[Backend]" = import_object(target, package=__package__)
    return found


def pause_between_looks_s(quiet_s: float, look_s: float, longest_s: float) -> float:
    """Return how long a waiter sleeps where the store cannot push.

    A tenth of the time without news, from half a millisecond to `longest_s`.  A look for many takes its
    time, `look_s`: two thirds of it at least are left to others.
    """
    return max(min(max(quiet_s / 10, 0.0005), longest_s), 2 * look_s)

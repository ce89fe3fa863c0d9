# SPDX-License-Identifier: MIT
"""Where a message goes: exchanges, queues, and the way from a call to one of them.

`Queues` is the table of what is configured: gaps are filled from the ``task_default_*`` settings
and, where that is allowed, unknown names become direct queues of their own.  `Router` merges the
destinations that a call may have, strongest first::

    apply_async(queue=...)  >  task attribute  >  task_routes  >  task_default_queue

and turns the winner into an exchange and a routing key.  A queue with a direct exchange is always
reached through the default exchange ``""`` under its own name, so that the broker needs no
binding to deliver.  The names and the merging are Celery's (and kombu's).
"""

from __future__ import annotations

import fnmatch
import os
import re
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from .exceptions import ImproperlyConfigured, QueueNotFound
from .text import import_object, nearest, safe_repr

#: Options which say where a message goes; the rest of a route are calling options.
DESTINATION_OPTIONS = ("queue", "exchange", "exchange_type", "routing_key")

#: What else a route may say: calling options that make sense for many calls.
ROUTE_OPTIONS = frozenset(DESTINATION_OPTIONS) | {
    "priority", "serializer", "compression", "delivery_mode", "countdown", "eta", "expires", "time_limit",
    "soft_time_limit", "ignore_result", "shadow", "headers", "link", "link_error", "retry", "retry_policy",
    "reply_to", "add_to_parent", "app_id", "type", "user_id", "cluster_id",
}  # fmt: skip

#: How many task names, and queues that are not configured, are remembered.
_REMEMBERED = 2048


# -- exchanges and queues ------------------------------------------------------------------------


class _Record:
    """A value with named fields: fixed once made, compared by its fields."""

    __slots__ = ()
    _fields: Tuple[str, ...] = ()

    def _fill(self, values: Mapping[str, Any]) -> None:
        """Set the fields from the local variables of `__init__`, with unknown keywords as `unknown`."""
        if values["unknown"]:
            name = next(iter(values["unknown"]))
            raise TypeError(f"{type(self).__name__}: unknown option {name!r}{_hint(name, self._fields)}")
        for field in self._fields:
            object.__setattr__(self, field, values[field])

    def __setattr__(self, field: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is fixed: make another one with .replace({field}=...)")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and _values(self) == _values(other)

    def __hash__(self) -> int:
        return hash((type(self), _values(self)["name"]))

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), _values(self))

    def replace(self, **changes: Any) -> Any:
        """Return a copy with other values in some fields."""
        return _rebuild(type(self), {**_values(self), **changes})


def _values(record: Any) -> Dict[str, Any]:
    return {field: getattr(record, field) for field in record._fields}


def _rebuild(cls: type, values: Dict[str, Any]) -> Any:
    record: Any = object.__new__(cls)
    for field, value in values.items():
        object.__setattr__(record, field, value)
    return record


class Exchange(_Record):
    """Where messages are published: `type` is direct, topic, fanout or headers."""

    name: str
    type: str
    arguments: Optional[Mapping[str, Any]]
    durable: bool
    passive: bool
    auto_delete: bool
    delivery_mode: Optional[int]
    no_declare: bool
    __slots__ = _fields = tuple(__annotations__)

    def __init__(
        self,
        name: str = "",
        type: str = "direct",  # noqa: A002 - the field's name for it
        *,
        durable: bool = True,
        auto_delete: bool = False,
        delivery_mode: Union[int, str, None] = None,
        arguments: Optional[Mapping[str, Any]] = None,
        passive: bool = False,
        no_declare: bool = False,
        **unknown: Any,
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"an exchange's name must be text, not {safe_repr(name, 100)}")
        delivery_mode = {"transient": 1, "persistent": 2}.get(str(delivery_mode), delivery_mode)
        if delivery_mode not in (None, 1, 2):
            raise ValueError(f"delivery_mode must be 1 (transient) or 2 (persistent), not {delivery_mode!r}")
        self._fill(locals())

    def __repr__(self) -> str:
        return f"<Exchange {self.name!r} {self.type}>"

    def as_dict(self) -> Dict[str, Any]:
        """Return the fields as ``inspect active_queues`` shows them."""
        return _values(self)


class Binding(NamedTuple):
    """One more way into a queue (see `Queue.bindings`)."""

    exchange: Exchange
    routing_key: str = ""
    arguments: Optional[Mapping[str, Any]] = None


#: Options of a queue that are numbers -> the argument a broker knows, and its units in ours.
_NUMBERS = {
    "expires": ("x-expires", 1000),
    "message_ttl": ("x-message-ttl", 1000),
    "max_length": ("x-max-length", 1),
    "max_length_bytes": ("x-max-length-bytes", 1),
    "max_priority": ("x-max-priority", 1),
}


class Queue(_Record):
    """Where messages wait.

    `exchange` and `routing_key` bind it; what is left out is filled in by `Queues`.  `expires` and
    `message_ttl` are seconds.  `queue_arguments` go to the broker as they are
    (``{"x-queue-type": "quorum"}``); `bindings` are further `Binding`s.  `alias` is a second name
    that calls may use.  Unknown options raise `TypeError`.
    """

    name: str
    exchange: Exchange
    routing_key: str
    queue_arguments: Optional[Mapping[str, Any]]
    binding_arguments: Optional[Mapping[str, Any]]
    consumer_arguments: Optional[Mapping[str, Any]]
    durable: bool
    exclusive: bool
    auto_delete: bool
    no_ack: bool
    alias: Optional[str]
    bindings: Tuple[Binding, ...]
    no_declare: Optional[bool]
    expires: Optional[float]
    message_ttl: Optional[float]
    max_length: Optional[int]
    max_length_bytes: Optional[int]
    max_priority: Optional[int]
    __slots__ = _fields = tuple(__annotations__)

    def __init__(
        self,
        name: str,
        exchange: Union[Exchange, str, None] = None,
        routing_key: Optional[str] = None,
        *,
        durable: bool = True,
        exclusive: bool = False,
        auto_delete: bool = False,
        expires: Optional[float] = None,
        message_ttl: Optional[float] = None,
        max_length: Optional[int] = None,
        max_length_bytes: Optional[int] = None,
        max_priority: Optional[int] = None,
        queue_arguments: Optional[Mapping[str, Any]] = None,
        binding_arguments: Optional[Mapping[str, Any]] = None,
        consumer_arguments: Optional[Mapping[str, Any]] = None,
        no_ack: bool = False,
        alias: Optional[str] = None,
        bindings: Iterable[Binding] = (),
        no_declare: Optional[bool] = None,
        **unknown: Any,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"a queue needs a name, and {safe_repr(name, 100)} is none")
        if exchange is None or isinstance(exchange, str):
            exchange = Exchange(exchange or "")
        if not isinstance(exchange, Exchange):
            raise TypeError(f"queue {name!r}: exchange must be an Exchange or its name, not {exchange!r}")
        routing_key = routing_key or ""
        # An exclusive queue goes with its connection anyway; brokers want to be told so.
        auto_delete = auto_delete or exclusive
        bindings = tuple(bindings or ())
        self._fill(locals())
        for option in _NUMBERS:
            number = getattr(self, option)
            if number is not None and (not isinstance(number, (int, float)) or not number >= 0):
                raise TypeError(f"queue {name!r}: {option} must be a number from 0 on, not {number!r}")

    @classmethod
    def from_dict(cls, name: str, options: Mapping[str, Any]) -> "Queue":
        """Make a queue from an entry of a ``task_queues`` dict.

        Besides the options of `Queue`: `binding_key` (another name for routing_key), `delivery_mode`,
        and the options of the exchange with the prefix ``exchange_``.
        """
        left = {key: value for key, value in options.items() if value is not None}
        exchange = left.pop("exchange", "")
        of_exchange = {"durable": left.get("durable", True), "delivery_mode": left.pop("delivery_mode", None)}
        for option in [option for option in left if option.startswith("exchange_")]:
            of_exchange[option[len("exchange_") :]] = left.pop(option)
        if not isinstance(exchange, Exchange):
            exchange = Exchange(exchange, **of_exchange)
        binding_key = left.pop("binding_key", name)
        return cls(name, exchange, left.pop("routing_key", binding_key), **left)

    def __repr__(self) -> str:
        exchange = self.exchange
        return f"<Queue {self.name!r} on {exchange.name!r} ({exchange.type}) key {self.routing_key!r}>"

    @property
    def all_bindings(self) -> Tuple[Binding, ...]:
        """Every way into this queue, its own exchange first."""
        own = Binding(self.exchange, self.routing_key, self.binding_arguments)
        return (own, *self.bindings) if self.exchange.name else self.bindings

    @property
    def arguments(self) -> Dict[str, Any]:
        """What a broker is told when the queue is declared; times in whole milliseconds."""
        found = dict(self.queue_arguments or {})
        for option, (argument, factor) in _NUMBERS.items():
            number = getattr(self, option)
            if number is not None:
                found.setdefault(argument, int(number * factor))
        return found

    def as_dict(self) -> Dict[str, Any]:
        """Return the fields as ``inspect active_queues`` shows them."""
        bindings = [{**b._asdict(), "exchange": b.exchange.as_dict()} for b in self.bindings]
        return {**_values(self), "exchange": self.exchange.as_dict(), "bindings": bindings}


class Broadcast(Queue):
    """A queue of this process's own on a fanout exchange: every worker gets every message.

    Calls name the exchange (``apply_async(queue="news")``); the queue itself is called
    ``news.<random>`` and goes away with its consumer.
    """

    __slots__ = ()

    def __init__(self, name: str, exchange: Union[Exchange, str, None] = None, **options: Any) -> None:
        options.setdefault("auto_delete", True)
        options.setdefault("alias", name)
        suffix = os.urandom(16).hex()
        super().__init__(f"{name}.{suffix}", exchange or Exchange(name, "fanout"), **options)


# -- matching ------------------------------------------------------------------------------------


def topic_matches(pattern: str, key: str) -> bool:
    """Say whether `key` fits `pattern`: ``*`` is exactly one word, ``#`` any number, none included.

    Words are what stands between dots (AMQP 0-9-1 3.1.3.3).  Takes at most len(pattern) x len(key)
    steps, whatever the pattern.
    """
    if pattern == key or pattern == "#":
        return True
    if "*" not in pattern and "#" not in pattern:
        return False
    patterns, words = pattern.split("."), key.split(".") if key else []
    p = w = 0
    #: Where to go on when it does not fit: behind the last #, with one word more eaten by it.
    retry_p, retry_w = -1, 0
    while w < len(words):
        if p < len(patterns) and patterns[p] == "#":
            retry_p, retry_w = p + 1, w
            p += 1
        elif p < len(patterns) and (patterns[p] == "*" or patterns[p] == words[w]):
            p += 1
            w += 1
        elif retry_p >= 0:
            retry_w += 1
            p, w = retry_p, retry_w
        else:
            return False
    return all(left == "#" for left in patterns[p:])


def key_matches(exchange_type: str, binding_key: str, routing_key: str) -> bool:
    """Say whether an exchange of this type hands a message on to a queue bound with `binding_key`."""
    if exchange_type == "topic":
        return topic_matches(binding_key, routing_key)
    return exchange_type == "fanout" or binding_key == routing_key


# -- the table of queues -------------------------------------------------------------------------


class Queues(Dict[str, Queue]):
    """The configured queues by name; looking up another one makes it or raises `QueueNotFound`.

    `queues` is a list of `Queue` (or names), or a dict ``name -> options``; None = the default queue
    alone.  A queue that was only looked up is remembered, but not configured: no worker consumes
    from it unless it is selected.
    """

    def __init__(
        self,
        queues: Union[Iterable[Any], Mapping[str, Any], None] = None,
        default_queue: str = "celery",
        default_queue_type: str = "classic",
        default_exchange: Optional[str] = None,
        default_exchange_type: str = "direct",
        default_routing_key: Optional[str] = None,
        create_missing: bool = True,
        create_missing_type: str = "classic",
        create_missing_exchange_type: Optional[str] = None,
        max_priority: Optional[int] = None,
    ) -> None:
        super().__init__()
        #: Grows with every change, so that a router knows when to forget.
        self.version = 0
        self.default_queue = default_queue
        self.default_exchange = Exchange(default_exchange or default_queue, default_exchange_type)
        self.default_routing_key = default_routing_key or default_queue
        self._max_priority = max_priority
        self._create_missing = create_missing
        self._missing_arguments = _queue_type(create_missing_type)
        self._missing_exchange_type = create_missing_exchange_type or "direct"
        self._aliases: Dict[str, Queue] = {}
        self._made: Dict[str, Queue] = {}
        self._selected: Optional[Dict[str, Queue]] = None
        if not queues:
            queues = [Queue(default_queue, queue_arguments=_queue_type(default_queue_type))]
        try:
            if isinstance(queues, Mapping):
                for name, options in queues.items():
                    self.add(name, options)
            else:
                for queue in queues:
                    self.add(queue)
        except (TypeError, ValueError) as error:
            raise ImproperlyConfigured(f"task_queues: {error}") from error

    def __missing__(self, name: str) -> Queue:
        found = self._aliases.get(name) or self._made.get(name)
        if found is not None:
            return found
        if not isinstance(name, str) or not name:
            raise QueueNotFound(f"a queue's name must be text, not {safe_repr(name, 100)}")
        if not self._create_missing and name != self.default_queue:
            raise QueueNotFound(
                f"queue {name!r} is not in task_queues{_hint(name, [*self, *self._aliases])}"
                " (add it there, or set task_create_missing_queues)"
            )
        exchange = Exchange(name, self._missing_exchange_type)
        if len(self._made) >= _REMEMBERED:
            self._made.clear()
            self.version += 1
        found = self._complete(Queue(name, exchange, name, queue_arguments=self._missing_arguments))
        self._made[name] = found
        return found

    def add(self, queue: Union[Queue, str], options: Optional[Mapping[str, Any]] = None) -> Queue:
        """Configure one more queue: fill in what it leaves open, and return it.

        `queue` is a `Queue`, or a name to which `options` belong as in a ``task_queues`` dict.
        """
        if isinstance(queue, str) and (options is None or isinstance(options, Mapping)):
            queue = Queue.from_dict(queue, options or {})
        if not isinstance(queue, Queue):
            what = safe_repr(queue if options is None else options, 200)
            raise TypeError(f"{what} is neither a Queue nor a name with a dict of options")
        if queue.name in self._aliases:
            raise TypeError(f"the name {queue.name!r} is already the alias of {self._aliases[queue.name]!r}")
        found = self._complete(queue)
        self[found.name] = found
        if found.alias:
            self._aliases[found.alias] = found
        self.version += 1
        return found

    def _complete(self, queue: Queue) -> Queue:
        changes: Dict[str, Any] = {}
        if not queue.exchange.name and not queue.bindings:
            changes["exchange"] = self.default_exchange
        if not queue.routing_key:
            changes["routing_key"] = self.default_routing_key
        if self._max_priority is not None and "x-max-priority" not in queue.arguments:
            changes["max_priority"] = self._max_priority
        completed: Queue = queue.replace(**changes) if changes else queue
        return completed

    def known(self) -> List[Queue]:
        """Return the configured queues and those that were looked up."""
        return [*self.values(), *self._made.values()]

    @property
    def consume_from(self) -> Dict[str, Queue]:
        """The queues a worker of this app consumes from: the selected ones, or all configured."""
        return dict(self) if self._selected is None else self._selected

    def select(self, names: Union[str, Iterable[str]]) -> None:
        """Consume from these queues only (``worker -Q``); a text may hold several, with commas."""
        chosen = [self[name] for name in _names(names)]
        if chosen:
            self._selected = {queue.name: queue for queue in chosen}

    def deselect(self, names: Union[str, Iterable[str]]) -> None:
        """Do not consume from these queues (``worker -X``)."""
        left = dict(self.consume_from)
        for name in _names(names):
            found = self.get(name) or self._aliases.get(name)
            if found is None and name not in left:
                hint = _hint(name, self)
                raise QueueNotFound(f"cannot leave out queue {name!r}: it is not in task_queues{hint}")
            left.pop(found.name if found else name, None)
        if not left:
            raise ImproperlyConfigured("every queue is left out: nothing remains to consume from")
        self._selected = left


def _names(names: Union[str, Iterable[str]]) -> List[str]:
    parts = names.split(",") if isinstance(names, str) else names
    return [part for part in (part.strip() for part in parts) if part]


def _queue_type(name: Optional[str]) -> Optional[Dict[str, Any]]:
    """Classic is every broker's default, and saying so would not match a queue declared without."""
    return {"x-queue-type": name} if name and name != "classic" else None


def _hint(name: str, known: Iterable[str]) -> str:
    found = nearest(name, known)
    return f": did you mean {found!r}?" if found else ""


# -- routes --------------------------------------------------------------------------------------


class Route(NamedTuple):
    """Where a call goes.

    `queue` is what has to exist before (None: nothing known to declare); `options` is what the
    route adds to the call (serializer, priority, ...), weaker than the call's own options.
    """

    queue: Optional[Queue]
    exchange: str
    routing_key: str
    options: Dict[str, Any] = {}  # noqa: RUF012 - never mutated


#: ``router(name, args, kwargs, options, task=task)`` returns a queue's name, a `Queue`, a dict, or None.
RouterFunction = Callable[..., Any]


class MapRoute:
    """A route table: exact names first, then globs and regular expressions in their order."""

    def __init__(self, entries: Iterable[Tuple[Any, Any]], where: str) -> None:
        self._exact: Dict[str, Any] = {}
        self._patterns: List[Tuple[Any, Any]] = []
        for key, target in entries:
            _check_target(target, f"{where}: entry {key!r}")
            if isinstance(key, re.Pattern):
                self._patterns.append((key.match, target))
            elif not isinstance(key, str) or not key:
                raise ImproperlyConfigured(
                    f"{where}: the key {key!r} is neither a task name, a glob nor a regular expression"
                )
            elif any(sign in key for sign in "*?["):
                self._patterns.append((re.compile(fnmatch.translate(key)).match, target))
            else:
                self._exact[key] = target

    def __call__(self, name: str, *_args: Any, **_kwargs: Any) -> Any:
        target = self._exact.get(name)
        if target is not None:
            return target
        for matches, target in self._patterns:
            if target is not None and matches(name):
                return target
        return None


class Router:
    """Finds the `Route` of a call.

    `routes` is what ``task_routes`` may hold: a dict, a function, the dotted path of one, an object
    with `route_for_task`, or a list of these and of ``(key, target)`` pairs.  They are asked in
    order; the first that does not answer None wins.
    """

    def __init__(
        self,
        queues: Union[Queues, Iterable[Any], Mapping[str, Any], None] = None,
        routes: Any = None,
        **settings: Any,
    ) -> None:
        """`settings` are those of `Queues` (default_queue=..., create_missing=..., ...)."""
        self.queues = queues if isinstance(queues, Queues) else Queues(queues, **settings)
        self._routers = _prepare(routes)
        #: Only tables can be remembered by the task's name; a function may decide by the arguments.
        self.tables_only = all(isinstance(router, MapRoute) for router in self._routers)
        self._by_task: Dict[str, Route] = {}
        self._by_queue: Dict[str, Route] = {}
        self._version = self.queues.version

    def route(
        self,
        options: Mapping[str, Any],
        name: str,
        args: Sequence[Any] = (),
        kwargs: Optional[Mapping[str, Any]] = None,
        task: Any = None,
    ) -> Route:
        """Return where the call of task `name` goes.

        `options` are the call's, already merged over the task's attributes; None counts as not
        given.  Raises `QueueNotFound`, and `ImproperlyConfigured` for a route that makes no sense.
        """
        get = options.get
        queue = get("queue")
        if get("exchange") is None and get("routing_key") is None:
            remembered, key = None, name
            if queue is None:
                remembered = self._by_task if self.tables_only else None
            elif type(queue) is str and not self._routers:
                remembered, key = self._by_queue, queue
            if remembered is not None:
                if self._version != self.queues.version or len(remembered) >= _REMEMBERED:
                    self._by_task.clear()
                    self._by_queue.clear()
                    self._version = self.queues.version
                found = remembered.get(key)
                if found is None:
                    found = self._destination(self._ask(options, name, args, kwargs, task), options)
                    remembered[key] = found
                return found
        return self._destination(self._ask(options, name, args, kwargs, task), options)

    def _ask(
        self, options: Mapping[str, Any], name: str, args: Any, kwargs: Any, task: Any
    ) -> Mapping[str, Any]:
        """Return the answer of the first router that has one, as a dict."""
        for router in self._routers:
            target = router(name, args, kwargs or {}, options, task=task)
            if target is not None:
                _check_target(target, f"task_routes: {router!r} for task {name!r}")
                return target if isinstance(target, Mapping) else {"queue": target}
        return {}

    def _destination(self, route: Mapping[str, Any], options: Mapping[str, Any]) -> Route:
        """Merge `route` under `options` and turn the result into exchange and routing key."""
        queues = self.queues
        queue: Any
        queue, exchange, routing_key = (
            route.get(option) if options.get(option) is None else options[option]
            for option in ("queue", "exchange", "routing_key")
        )
        exchange_type: Optional[str] = route.get("exchange_type")
        extra = {key: value for key, value in route.items() if key not in DESTINATION_OPTIONS}
        if isinstance(exchange, Exchange):
            exchange_type = exchange_type or exchange.type
            exchange = exchange.name
        if queue is None and exchange is not None:
            # Named by the caller: it is not for us to replace it by the default queue.
            if exchange == "" and routing_key:
                return Route(queues[routing_key], "", routing_key, extra)
            if exchange:
                return self._through(exchange, exchange_type, routing_key, extra)
        found: Queue = queue if isinstance(queue, Queue) else queues[queue or queues.default_queue]
        if (not exchange or not routing_key) and (exchange_type or found.exchange.type) == "direct":
            return Route(found, "", found.name, extra)
        exchange = exchange or found.exchange.name or queues.default_exchange.name
        routing_key = routing_key or found.routing_key or queues.default_routing_key
        return Route(_to_declare(found), exchange, routing_key, extra)

    def _through(
        self, exchange: str, exchange_type: Optional[str], routing_key: Optional[str], extra: Dict[str, Any]
    ) -> Route:
        """Publish to a named exchange; a configured queue that would get the message is declared before."""
        first: Optional[Queue] = None
        for queue in self.queues.known():
            for binding in queue.all_bindings:
                if binding.exchange.name == exchange and (
                    routing_key is None
                    or key_matches(exchange_type or binding.exchange.type, binding.routing_key, routing_key)
                ):
                    routing_key = binding.routing_key if routing_key is None else routing_key
                    first = first or queue
        if routing_key is None:
            routing_key = self.queues.default_routing_key
        return Route(_to_declare(first), exchange, routing_key, extra)


def _to_declare(queue: Optional[Queue]) -> Optional[Queue]:
    """Nobody would ever read a sender's own copy of a broadcast queue."""
    return None if isinstance(queue, Broadcast) else queue


def _check_target(target: Any, where: str) -> None:
    """Raise `ImproperlyConfigured` unless `target` is a queue's name, a `Queue`, a dict or None."""
    if isinstance(target, Mapping):
        for key in target.keys() - ROUTE_OPTIONS:
            raise ImproperlyConfigured(f"{where}: unknown option {key!r}{_hint(str(key), ROUTE_OPTIONS)}")
        if target.get("queue") is None or isinstance(target["queue"], (str, Queue)):
            return
    elif target is None or isinstance(target, Queue) or (isinstance(target, str) and target):
        return
    raise ImproperlyConfigured(
        f"{where} must be a queue's name, a Queue or a dict of options like {{'queue': 'name'}},"
        f" not {safe_repr(target, 200)}"
    )


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, (tuple, list)) and len(entry) == 2 and isinstance(entry[0], (str, re.Pattern))


def _prepare(routes: Any) -> List[RouterFunction]:
    """Turn the setting ``task_routes`` into a list of callables."""
    if routes is None:
        return []
    found: List[RouterFunction] = []
    pairs: List[Any] = []  # neighbouring pairs make one table
    for position, entry in enumerate(routes if isinstance(routes, (list, tuple)) else (routes,)):
        where = f"task_routes[{position}]" if isinstance(routes, (list, tuple)) else "task_routes"
        if _is_pair(entry):
            pairs.append(entry)
            continue
        if pairs:
            found.append(MapRoute(pairs, "task_routes"))
            pairs = []
        if isinstance(entry, Mapping):
            found.append(MapRoute(entry.items(), where))
        elif isinstance(entry, (list, tuple)):
            if not all(_is_pair(pair) for pair in entry):
                raise ImproperlyConfigured(
                    f"{where} must hold (task name, target) pairs, not {safe_repr(entry, 200)}"
                )
            found.append(MapRoute(entry, where))
        elif isinstance(entry, str):
            found.append(_ByPath(entry, where))
        elif callable(entry) or hasattr(entry, "route_for_task"):
            found.append(_as_function(entry))
        else:
            raise ImproperlyConfigured(
                f"{where} must be a dict, a function, its dotted path or a list of pairs,"
                f" not {safe_repr(entry, 200)}"
            )
    if pairs:
        found.append(MapRoute(pairs, "task_routes"))
    return found


def _as_function(router: Any) -> RouterFunction:
    """Accept the older form too: an object (or its class) with ``route_for_task(name, args, kwargs)``."""
    if not hasattr(router, "route_for_task"):
        function: RouterFunction = router
        return function
    target = router() if isinstance(router, type) else router

    def ask(name: str, args: Any, kwargs: Any, _options: Any, task: Any = None) -> Any:
        return target.route_for_task(name, args, kwargs)

    return ask


class _ByPath:
    """A router function given by its dotted path, imported when it is first asked.

    Not earlier: the module it lives in may itself import the app that is being configured.
    """

    def __init__(self, path: str, where: str) -> None:
        self._path = path
        self._where = where
        self._function: Optional[RouterFunction] = None

    def __repr__(self) -> str:
        return self._path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._function is None:
            try:
                found = import_object(self._path)
            except (ImportError, AttributeError, ValueError) as error:
                raise ImproperlyConfigured(
                    f"{self._where}: cannot import router {self._path!r}: {error}"
                ) from error
            if not callable(found) and not hasattr(found, "route_for_task"):
                raise ImproperlyConfigured(
                    f"{self._where}: {self._path!r} is not a function but {safe_repr(found, 200)}"
                )
            self._function = _as_function(found)
        return self._function(*args, **kwargs)

# SPDX-License-Identifier: MIT
"""Queues, topic patterns, and who decides where a task goes."""

from __future__ import annotations

import pickle
import random
import re
import sys
import types

import pytest

from miniq.exceptions import ImproperlyConfigured, QueueNotFound
from miniq.routing import Binding, Broadcast, Exchange, Queue, Queues, Router, key_matches, topic_matches

MEDIA = Exchange("media", "topic")


def where(route):
    """Return the parts of a route that can be compared with a literal."""
    return (route.queue and route.queue.name, route.exchange, route.routing_key)


# -- exchanges and queues


def test_queue_shows_the_keys_that_celery_shows():
    queue = Queue("extra2", Exchange("x.topic", "topic", durable=False), "a.#", durable=False)
    exchange = {
        "name": "x.topic", "type": "topic", "arguments": None, "durable": False, "passive": False,
        "auto_delete": False, "delivery_mode": None, "no_declare": False,
    }  # fmt: skip
    assert queue.as_dict() == {
        "name": "extra2", "exchange": exchange, "routing_key": "a.#", "queue_arguments": None,
        "binding_arguments": None, "consumer_arguments": None, "durable": False, "exclusive": False,
        "auto_delete": False, "no_ack": False, "alias": None, "bindings": [], "no_declare": None,
        "expires": None, "message_ttl": None, "max_length": None, "max_length_bytes": None,
        "max_priority": None,
    }  # fmt: skip
    assert list(queue.as_dict()["exchange"]) == list(exchange)


def test_queue_options_become_broker_arguments():
    queue = Queue(
        "q",
        expires=10,
        message_ttl=1.5,
        max_length=3,
        max_length_bytes=4,
        max_priority=9,
        queue_arguments={"x-queue-type": "quorum", "x-max-length": 5},
    )
    assert queue.arguments == {
        "x-queue-type": "quorum", "x-max-length": 5, "x-expires": 10000, "x-message-ttl": 1500,
        "x-max-length-bytes": 4, "x-max-priority": 9,
    }  # fmt: skip
    assert Queue("q").arguments == {}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Queue("q", rooting_key="a"), "unknown option 'rooting_key': did you mean 'routing_key'"),
        (lambda: Exchange("e", durabel=True), "unknown option 'durabel': did you mean 'durable'"),
        (lambda: Broadcast("b", aliass="c"), "did you mean 'alias'"),
        (lambda: Queue(""), "needs a name"),
        (lambda: Queue(5), "needs a name"),
        (lambda: Queue("q", 5), "exchange must be"),
        (lambda: Queue("q", max_priority=-1), "max_priority"),
        (lambda: Queue("q", expires="1"), "expires"),
        (lambda: Queue("q", message_ttl=float("nan")), "message_ttl"),
        (lambda: Exchange(None), "name must be text"),
    ],
)
def test_wrong_option_is_a_type_error_that_names_it(make, words):
    with pytest.raises(TypeError, match=words):
        make()


def test_delivery_mode_may_be_a_word():
    assert Exchange("e", delivery_mode="transient").delivery_mode == 1
    with pytest.raises(ValueError, match="delivery_mode"):
        Exchange("e", delivery_mode=3)


def test_queue_is_fixed_comparable_hashable_and_picklable():
    queue = Queue("q", "e", "k", queue_arguments={"x": 1}, bindings=[Binding(MEDIA, "a")])
    with pytest.raises(AttributeError, match="replace"):
        queue.routing_key = "other"
    assert queue == Queue("q", "e", "k", queue_arguments={"x": 1}, bindings=[Binding(MEDIA, "a")])
    assert queue != Queue("q", "e", "k") and queue != "q"
    assert len({queue, pickle.loads(pickle.dumps(queue))}) == 1
    other = queue.replace(routing_key="new")
    assert (other.routing_key, queue.routing_key, other.exchange) == ("new", "k", Exchange("e"))
    assert queue.all_bindings == (Binding(Exchange("e"), "k"), Binding(MEDIA, "a"))


def test_exclusive_queue_is_deleted_with_its_connection():
    assert Queue("q", exclusive=True).auto_delete


def test_broadcast_is_a_private_queue_on_a_fanout_exchange():
    one, two = Broadcast("news"), Broadcast("news")
    assert one.name != two.name and one.name.startswith("news.")
    assert one.exchange == two.exchange == Exchange("news", "fanout")
    assert one.alias == "news" and one.auto_delete and one.durable
    assert one.replace(routing_key="x").name == one.name
    assert pickle.loads(pickle.dumps(one)) == one


# -- matching


@pytest.mark.parametrize(
    ("pattern", "key", "fits"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("*", "a", True),
        ("*", "", False),
        ("*", "a.b", False),
        ("#", "", True),
        ("#", "a.b.c", True),
        ("a.*", "a", False),
        ("a.*", "a.b", True),
        ("a.#", "a", True),
        ("a.#", "ab", False),
        ("a.#", "a.b.c", True),
        ("#.c", "c", True),
        ("#.c", "a.b.c", True),
        ("#.c", "a.c.b", False),
        ("a.#.c", "a.c", True),
        ("a.#.c", "a.b.b.c", True),
        ("a.#.c", "a.b.b", False),
        ("*.#", "", False),
        ("#.*", "a", True),
        ("#.#", "", True),
        ("a*", "ab", False),
        ("*.stock.#", "usd.stock.db", True),
        ("a.b", "a.b.", False),
    ],
)
def test_topic_pattern(pattern, key, fits):
    assert topic_matches(pattern, key) is fits


def brute_force(patterns, words):
    if not patterns:
        return not words
    if patterns[0] == "#":
        return any(brute_force(patterns[1:], words[n:]) for n in range(len(words) + 1))
    return bool(words) and patterns[0] in ("*", words[0]) and brute_force(patterns[1:], words[1:])


def test_topic_patterns_agree_with_brute_force():
    for seed in range(5000):
        rng = random.Random(seed)
        patterns = [rng.choice("ab*#") for _ in range(rng.randrange(1, 6))]
        words = [rng.choice("ab") for _ in range(rng.randrange(7))]
        found = topic_matches(".".join(patterns), ".".join(words))
        assert found is brute_force(patterns, words), f"seed {seed}: {patterns} {words}"


def test_evil_topic_pattern_takes_no_exponential_time():
    assert topic_matches(".".join(["#", "a"] * 200), ".".join(["a"] * 500)) is True
    assert topic_matches(".".join(["#", "a"] * 200) + ".b", ".".join(["a"] * 500)) is False


def test_keys_match_by_exchange_type():
    assert key_matches("direct", "a", "a") and not key_matches("direct", "a.#", "a.b")
    assert key_matches("fanout", "a", "b") and key_matches("topic", "a.#", "a.b")


# -- the table of queues


def test_default_is_celerys_queue():
    queues = Queues()
    assert dict(queues) == {"celery": Queue("celery", "celery", "celery")}


def test_gaps_are_filled_from_the_defaults():
    queues = Queues(
        [Queue("a"), Queue("b", MEDIA, "x.#"), "c", Queue("d", queue_arguments={"x-max-priority": 3})],
        default_exchange="ex",
        default_exchange_type="topic",
        default_routing_key="key",
        max_priority=9,
    )
    assert (queues["a"].exchange, queues["a"].routing_key) == (Exchange("ex", "topic"), "key")
    assert (queues["b"].exchange, queues["b"].routing_key) == (MEDIA, "x.#")
    assert (queues["c"].exchange, queues["c"].routing_key) == (Exchange("ex", "topic"), "c")
    assert [queues[name].arguments["x-max-priority"] for name in "abd"] == [9, 9, 3]


def test_queues_may_be_a_dict_of_options():
    queues = Queues(
        {
            "a": {"exchange": "ex", "exchange_type": "topic", "binding_key": "a.#", "max_priority": 5},
            "b": {"exchange": "ex", "exchange_durable": False, "routing_key": "bb", "durable": True},
            "c": {},
            "d": None,
        }
    )
    assert queues["a"] == Queue("a", Exchange("ex", "topic"), "a.#", max_priority=5)
    assert queues["b"] == Queue("b", Exchange("ex", durable=False), "bb")
    assert queues["c"] == Queue("c", "celery", "c") and queues["d"] == Queue("d", "celery", "d")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ([5], "5 is neither"),
        ({"a": 5}, "5 is neither"),
        ({"a": {"exchagne": "x"}}, "did you mean 'exchange'"),
        ({"a": {"exchange_tpye": "x"}}, "did you mean 'type'"),
        ([Queue("a", alias="b"), Queue("b")], "alias"),
    ],
)
def test_queue_setting_that_makes_no_sense_is_named(setting, words):
    with pytest.raises(ImproperlyConfigured, match=words):
        Queues(setting)


def test_missing_queue_is_made_but_not_consumed_from():
    queues = Queues(create_missing_type="quorum", create_missing_exchange_type="topic")
    found = queues["new"]
    assert found == Queue("new", Exchange("new", "topic"), "new", queue_arguments={"x-queue-type": "quorum"})
    assert queues["new"] is found and "new" not in queues
    assert list(queues.consume_from) == ["celery"]
    assert found in queues.known()


def test_missing_queue_is_refused_where_it_may_not_be_made():
    queues = Queues([Queue("images"), Queue("video")], default_queue="other", create_missing=False)
    with pytest.raises(QueueNotFound, match="did you mean 'images'"):
        queues["imags"]
    assert queues["other"].name == "other"
    with pytest.raises(QueueNotFound):
        queues[""]


def test_queues_made_on_demand_are_bounded():
    queues = Queues()
    for index in range(5000):
        assert queues[f"q{index}"].name == f"q{index}"
    assert len(queues.known()) < 3000


def test_alias_names_the_queue():
    queue = Broadcast("news")
    assert Queues([queue])["news"].name == queue.name


def test_select_and_deselect():
    queues = Queues([Queue("a"), Queue("b"), Broadcast("c")])
    queues.deselect("b, c")
    assert list(queues.consume_from) == ["a"]
    queues.select("b,new")
    assert list(queues.consume_from) == ["b", "new"]
    queues.deselect(["new"])
    assert list(queues.consume_from) == ["b"]
    with pytest.raises(ImproperlyConfigured, match="nothing remains"):
        queues.deselect("b")
    with pytest.raises(QueueNotFound, match="bb"):
        queues.deselect("bb")
    assert list(queues.consume_from) == ["b"]


def test_unknown_queue_cannot_be_selected_where_it_may_not_be_made():
    with pytest.raises(QueueNotFound, match="did you mean 'images'"):
        Queues([Queue("images")], create_missing=False).select("image")


# -- destinations


def test_call_without_anything_goes_to_the_default_queue():
    router = Router()
    route = router.route({}, "a.b")
    assert where(route) == ("celery", "", "celery") and route.options == {}
    assert router.route({"queue": None, "exchange": None}, "a.b") is route


def test_renamed_default_queue_is_reached_by_its_name():
    router = Router(default_queue="jobs", default_exchange="jobsx", default_routing_key="jobs.key")
    assert where(router.route({}, "t")) == ("jobs", "", "jobs")
    assert router.queues["jobs"] == Queue("jobs", "jobsx", "jobs.key")


def test_named_queue_is_reached_through_the_default_exchange():
    router = Router([Queue("prio"), Queue("topicq", Exchange("wt.topic", "topic"), "img.#")])
    assert where(router.route({"queue": "prio"}, "t")) == ("prio", "", "prio")
    assert where(router.route({"queue": "brand_new"}, "t")) == ("brand_new", "", "brand_new")
    assert where(router.route({"queue": Queue("own", "e", "k")}, "t")) == ("own", "", "own")
    assert where(router.route({"queue": "prio", "routing_key": "other"}, "t")) == ("prio", "", "prio")


def test_topic_queue_is_reached_through_its_exchange():
    router = Router([Queue("topicq", Exchange("wt.topic", "topic"), "img.#")])
    assert where(router.route({"queue": "topicq"}, "t")) == ("topicq", "wt.topic", "img.#")
    options = {"queue": "topicq", "routing_key": "img.big"}
    assert where(router.route(options, "t")) == ("topicq", "wt.topic", "img.big")


def test_named_exchange_is_used_and_its_queue_declared():
    router = Router([Queue("other"), Queue("topicq", Exchange("wt.topic", "topic"), "img.#")])
    options = {"exchange": "wt.topic", "routing_key": "img.resize"}
    assert where(router.route(options, "t")) == ("topicq", "wt.topic", "img.resize")
    options = {"exchange": Exchange("wt.topic", "topic"), "routing_key": "nobody"}
    assert where(router.route(options, "t")) == (None, "wt.topic", "nobody")
    assert where(router.route({"exchange": "wt.topic"}, "t")) == ("topicq", "wt.topic", "img.#")
    assert where(router.route({"exchange": "unknown"}, "t")) == (None, "unknown", "celery")
    assert where(router.route({"exchange": "", "routing_key": "other"}, "t")) == ("other", "", "other")


def test_broadcast_is_sent_to_its_exchange_and_not_declared_by_the_sender():
    router = Router([Broadcast("news")])
    assert where(router.route({"queue": "news"}, "t")) == (None, "news", "celery")


def test_default_topic_exchange_takes_the_routing_key_of_the_call():
    router = Router([Queue("q", routing_key="task.#")], default_queue="q", default_exchange_type="topic")
    assert where(router.route({"routing_key": "task.video"}, "t")) == ("q", "q", "task.video")


def test_queue_added_later_is_seen_by_remembered_routes():
    router = Router()
    assert where(router.route({}, "t")) == ("celery", "", "celery")
    assert where(router.route({"queue": "x"}, "t")) == ("x", "", "x")
    router.queues.add(Queue("celery", MEDIA, "all"))
    router.queues.add(Queue("x", MEDIA, "xs"))
    assert where(router.route({}, "t")) == ("celery", "media", "all")
    assert where(router.route({"queue": "x"}, "t")) == ("x", "media", "xs")


def test_remembered_routes_are_bounded():
    router = Router(routes={"a.*": "a"})
    for index in range(6000):
        assert router.route({}, f"a.{index}").routing_key == "a"
        router.route({"queue": f"q{index}"}, "b")
    assert len(router._by_task) < 3000 and len(router._by_queue) < 3000


# -- routes


def test_call_wins_over_route_and_route_over_default():
    router = Router(routes={"t": {"queue": "routed", "priority": 3, "serializer": "json"}})
    route = router.route({}, "t")
    assert where(route) == ("routed", "", "routed")
    assert route.options == {"priority": 3, "serializer": "json"}
    route = router.route({"queue": "called"}, "t")
    assert where(route) == ("called", "", "called") and route.options["priority"] == 3
    assert where(router.route({"queue": None}, "other")) == ("celery", "", "celery")


def test_exact_name_wins_over_patterns_and_first_pattern_over_later():
    router = Router(routes={"feed.*": "glob", re.compile(r"(feed|web)\.im"): "regex", "feed.exact": "exact"})
    names = ["feed.exact", "feed.import", "web.import", "web.other"]
    assert [router.route({}, name).routing_key for name in names] == ["exact", "glob", "regex", "celery"]


def by_name(name, args, kwargs, options, task=None, **kw):
    return {"queue": args[0]} if args else None


class OldRouter:
    def route_for_task(self, task, args=None, kwargs=None):
        return "old" if task == "old.task" else None


def test_routers_are_asked_in_order(monkeypatch):
    module = types.ModuleType("some_routers")
    module.by_name = by_name
    monkeypatch.setitem(sys.modules, "some_routers", module)
    router = Router(
        routes=["some_routers.by_name", OldRouter, {"x": None, "y": {}}, ("x", "pair"), ("z.*", "zs")]
    )
    assert router.route({}, "x", ("first",)).routing_key == "first"
    assert router.route({}, "old.task").routing_key == "old"
    assert router.route({}, "x").routing_key == "pair"
    assert router.route({}, "y").routing_key == "celery"
    assert router.route({}, "z.1").routing_key == "zs"


@pytest.mark.parametrize(
    "routes",
    [
        {"x": "q"},
        {"x": {"queue": "q"}},
        {"x": Queue("q")},
        [("x", "q")],
        (["x", "q"],),
        ([("y", "other"), ("x", {"queue": "q"})],),
        lambda name, args, kwargs, options, task=None: "q",
        [lambda name, *args, **kwargs: None, OldRouter(), lambda name, *args, **kwargs: Queue("q")],
    ],
    ids=str,
)
def test_all_forms_of_routes(routes):
    router = Router(routes=routes)
    assert where(router.route({}, "x")) == where(router.route({}, "x")) == ("q", "", "q")


def test_router_function_gets_what_it_decides_by():
    seen = []
    router = Router(routes=lambda *args, **kwargs: seen.append((args, kwargs)))
    router.route({"priority": 1}, "t", (1,), {"a": 2}, task="the task")
    router.route({"queue": "q"}, "t")
    assert seen == [
        (("t", (1,), {"a": 2}, {"priority": 1}), {"task": "the task"}),
        (("t", (), {}, {"queue": "q"}), {"task": None}),
    ]


def test_route_may_name_exchange_and_key():
    router = Router(
        [Queue("q"), Queue("images", MEDIA, "image.*")],
        routes={
            "a": {"exchange": "media", "exchange_type": "topic", "routing_key": "image.compress"},
            "b": {"queue": "images", "routing_key": "image.big"},
            "c": {"exchange": "d", "exchange_type": "direct", "routing_key": "k"},
        },
    )
    assert where(router.route({}, "a")) == ("images", "media", "image.compress")
    assert where(router.route({}, "b")) == ("images", "media", "image.big")
    assert where(router.route({}, "c")) == (None, "d", "k")


def test_answer_of_a_function_is_not_changed():
    answer = {"queue": "q", "priority": 5}
    router = Router(routes=lambda *args, **kwargs: answer)
    router.route({"queue": "x"}, "t")
    assert answer == {"queue": "q", "priority": 5}


@pytest.mark.parametrize(
    ("routes", "words"),
    [
        ({"x": 5}, r"task_routes: entry 'x' must be"),
        ({"x": ""}, "entry 'x'"),
        ({"x": {"queue": 5}}, "entry 'x'"),
        ({"x": {"queu": "a"}}, "entry 'x': unknown option 'queu': did you mean 'queue'"),
        ({5: "a"}, "key 5"),
        ({"": "a"}, "key ''"),
        ([5], r"task_routes\[0\] must be"),
        ([{}, [("x",)]], r"task_routes\[1\] must hold"),
        (5, "task_routes must be"),
    ],
)
def test_route_that_makes_no_sense_is_named_when_configured(routes, words):
    with pytest.raises(ImproperlyConfigured, match=words):
        Router(routes=routes)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no_such_module_at_all.router", "no_such_module_at_all"),
        ("os.no_such_name", "no_such_name"),
        ("os.sep", "not a"),
    ],
)
def test_path_that_is_no_router_is_named_when_first_asked(path, words):
    router = Router(routes=[path])
    with pytest.raises(ImproperlyConfigured, match=words):
        router.route({}, "t")


def test_wrong_answer_of_a_router_is_named():
    router = Router(routes=lambda *args, **kwargs: 5)
    with pytest.raises(ImproperlyConfigured, match="for task 't'"):
        router.route({}, "t")


def test_route_to_a_queue_that_may_not_be_made():
    router = Router([Queue("images")], routes={"t": "imags"}, create_missing=False)
    with pytest.raises(QueueNotFound, match="did you mean 'images'"):
        router.route({}, "t")

# SPDX-License-Identifier: MIT
"""``miniq amqp``: what its commands mean, and what they do at a real server: once, piped in, at a prompt."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest
from proxy import Proxy
from servers import RabbitServer, free_port
from waiting import wait_until
from workers import environment

from miniq.cli.amqp import Session, Shell, Unreachable
from miniq.cli.amqp_commands import COMMANDS, Call, Misuse, parse, split, usage
from miniq.cli.main import main
from miniq.connections.amqp import Options, Server
from miniq.exceptions import MiniqError

Inside = Callable[..., "tuple[int, str, str]"]
Pipe = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def inside(rabbit_url: str, capsys: Any) -> Inside:
    """Run ``amqp ...`` in this process; return code, output and errors."""

    def inside(*words: str) -> "tuple[int, str, str]":
        code = main(["-b", rabbit_url, "amqp", *words])
        return (code, *capsys.readouterr())

    return inside


@pytest.fixture
def pipe(rabbit_url: str, tmp_path: Path) -> Pipe:
    """Run ``python -m miniq amqp ...`` with lines on its standard input."""

    def pipe(lines: bytes, *words: str, url: str = "") -> "subprocess.CompletedProcess[bytes]":
        command = [sys.executable, "-m", "miniq", "-b", url or rabbit_url, "amqp", *words]
        return subprocess.run(
            command, input=lines, capture_output=True, cwd=tmp_path, env=environment(), timeout=30
        )

    return pipe


class Notes(List[str]):
    """What a session had to tell."""

    def take(self) -> str:
        text = "\n".join(self)
        self.clear()
        return text


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def new_session(notes: Notes) -> Iterator[Callable[..., Session]]:
    """Make a session: ``new_session(url, **options)``; what it tells goes to `notes`."""
    made: List[Session] = []

    def new(url: str, **options: Any) -> Session:
        made.append(Session(Server(url, Options.read(options, url)), notes.append))
        return made[-1]

    yield new
    for session in made:
        session.close()


def do(session: Session, *words: str) -> Any:
    return session.run(parse(words))


# -- what words mean ------------------------------------------------------------------------------

NO = {"passive": False, "durable": False, "auto_delete": False, "internal": False}


@pytest.mark.parametrize(
    ("line", "args", "more"),
    [
        # In the order of `celery amqp`.
        ("exchange.declare e topic no no yes no", {**NO, "type": "topic", "auto_delete": True}, {}),
        ("exchange.declare e", {**NO, "type": "direct", "durable": True}, {}),
        ("exchange.declare e fanout durable=off internal=1", {**NO, "type": "fanout", "internal": True}, {}),
        ("exchange.declare e alternate-exchange=x", {"durable": True}, {"alternate-exchange": "x"}),
        ("exchange.delete e yes", {"exchange": "e", "if_unused": True}, {}),
        ("queue.declare q yes no yes no", {"passive": True, "durable": False, "exclusive": True}, {}),
        ("queue.declare q auto_delete=TRUE", {"durable": True, "exclusive": False, "auto_delete": True}, {}),
        (
            "queue.declare a=b x-max-priority=10 yes x-queue-type=quorum x-x=",
            {"queue": "a=b", "passive": True},
            {"x-max-priority": 10, "x-queue-type": "quorum", "x-x": ""},
        ),
        ("queue.bind q e a.#", {"queue": "q", "exchange": "e", "routing_key": "a.#"}, {}),
        ("queue.unbind q e '' x-match=any n=1", {"routing_key": ""}, {"x-match": "any", "n": 1}),
        ("queue.delete q no yes", {"if_unused": False, "if_empty": True}, {}),
        ("queue.purge q", {"queue": "q"}, {}),
        ("basic.publish m '' q", {"msg": "m", "exchange": "", "routing_key": "q", "mandatory": True}, {}),
        (
            "basic.publish m e k no no priority=5 type=5 headers='{\"a\": [1]}'",
            {"mandatory": False, "immediate": False},
            {"priority": 5, "type": "5", "headers": {"a": [1]}},
        ),
        ("basic.get q", {"queue": "q", "no_ack": False}, {}),
        ("basic.get q on", {"no_ack": True}, {}),
        ("basic.ack 7", {"delivery_tag": 7}, {}),
        ("basic.reject 7 no", {"delivery_tag": 7, "requeue": False}, {}),
    ],
)
def test_words_are_read_as_arguments(line: str, args: Dict[str, Any], more: Dict[str, Any]) -> None:
    call = parse(split(line))
    assert isinstance(call, Call) and call.name == line.split()[0]
    assert {**call.args, **args} == call.args
    assert call.more == more
    command = COMMANDS[call.name]
    assert set(call.args) == {*command.required, *command.optional}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("queue.delcare q", "unknown command 'queue.delcare': did you mean queue.declare?"),
        ("what", "unknown command 'what' (try help)"),
        ("queue.bind q", "EXCHANGE and ROUTING_KEY must be given: queue.bind QUEUE EXCHANGE ROUTING_KEY"),
        ("queue.purge q r", "'r' is one argument too many: queue.purge QUEUE"),
        ("queue.declare q maybe", "passive must be yes or no, not 'maybe'"),
        ("queue.declare q durabel=no", "unknown 'durabel': did you mean durable?"),
        ("queue.delete q x-a=1", "unknown 'x-a'"),
        ("basic.publish m '' q prioriti=1", "unknown 'prioriti': did you mean priority?"),
        ("basic.publish m '' q priority=high", "priority must be a number, not 'high'"),
        ("basic.publish m '' q headers=[1]", "headers must be a JSON object, not '[1]'"),
        ("basic.ack one", "delivery_tag must be a number, not 'one'"),
        ("basic.get 'q", "No closing quotation"),
    ],
)
def test_words_that_make_no_sense_are_explained(line: str, said: str) -> None:
    with pytest.raises(Misuse) as caught:
        parse(split(line))
    assert said in str(caught.value)


def test_help_and_misuse_need_no_server(capsys: Any) -> None:
    assert main(["amqp", "help"]) == 0
    shown, _ = capsys.readouterr()
    assert all(usage(name) in shown and command.what in shown for name, command in COMMANDS.items())
    assert main(["amqp", "help", "queue.purge", "basic.get"]) == 0
    assert "queue.purge QUEUE\n" in capsys.readouterr()[0]
    assert main(["amqp", "--help"]) == 0
    shown, _ = capsys.readouterr()
    assert "usage: python -m miniq amqp" in shown and "examples:" in shown and "{" not in shown.split("{")[0]
    assert max(map(len, shown.splitlines())) <= 120
    for words in (["queue.prge", "q"], ["help", "queue.prge"], ["queue.purge"], ["queue.purge", "q", "r"]):
        assert main(["amqp", *words]) == 2
        shown, told = capsys.readouterr()
        assert shown == "" and "queue.purge" in told and "python -m miniq amqp --help" in told


# -- a broker that cannot be used -----------------------------------------------------------------


def test_broker_that_is_not_rabbitmq_is_named_with_its_scheme_and_without_its_password(capsys: Any) -> None:
    assert main(["-b", "redis://user:hunter2@host/0", "amqp", "queue.purge", "q"]) == 1
    shown, told = capsys.readouterr()
    assert shown == "" and "hunter2" not in told
    assert "'redis://user:**@host/0' has the scheme redis://" in told and "amqp://" in told


def test_server_that_cannot_be_used_is_explained_at_once_with_code_1(
    pipe: Pipe, rabbit_url: str, capsys: Any
) -> None:
    nobody = f"amqp://guest:hunter2@127.0.0.1:{free_port()}/"
    wrong = rabbit_url.replace("guest:guest@", "guest:hunter2@")
    for url, said in ((nobody, "refused"), (wrong, "check user and password")):
        assert main(["-b", url, "amqp", "queue.purge", "q"]) == 1
        shown, told = capsys.readouterr()
        assert shown == "" and said in told.lower() and "hunter2" not in told, told
    # The lines behind it would fail in the same way, each after its time.
    ended = pipe(b"help\nqueue.purge a\nqueue.purge b\n", url=nobody)
    told = ended.stderr.decode()
    assert ended.returncode == 1 and "line 2" in told and "line 3" not in told
    assert "hunter2" not in told and "Traceback" not in told


# -- one command ----------------------------------------------------------------------------------


def test_exchange_queue_binding_and_message_from_beginning_to_end(
    inside: Inside, rabbit_server: RabbitServer, rabbit_url: str
) -> None:
    vhost = rabbit_url.rpartition("/")[2]
    assert inside("exchange.declare", "img", "topic") == (0, "ok.\n", "")
    assert inside("queue.declare", "q", "x-max-priority=3")[1] == "ok. queue:q messages:0 consumers:0.\n"
    queue = rabbit_server.queues(vhost)["q"]
    assert queue["durable"] and not queue["auto_delete"] and "x-max-priority" in queue["arguments"]
    assert inside("queue.bind", "q", "img", "img.#") == (0, "ok.\n", "")
    assert inside("basic.publish", "héllo", "img", "img.a", "headers={\"n\": 1}")[:2] == (0, "ok.\n")
    assert inside("queue.declare", "q", "yes")[1] == "ok. queue:q messages:1 consumers:0.\n"
    code, shown, told = inside("basic.get", "q")
    assert code == 0 and "not acknowledged, and are back in their queues: 1" in told
    rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in shown.splitlines())
    assert rows["body"] == "'héllo' (6 bytes)" and rows["header 'n'"] == "1" and rows["delivery_mode"] == "2"
    assert rows["routing_key"] == "'img.a'" and rows["redelivered"] == "False" and rows["delivery_tag"] == "1"
    code, shown, told = inside("--json", "basic.get", "q", "yes")
    assert (code, told) == (0, "")
    assert json.loads(shown) == {
        "body": "héllo",
        "body_encoding": "utf-8",
        "properties": {"content_type": "text/plain", "content_encoding": "utf-8", "delivery_mode": 2},
        "headers": {"n": 1},
        "delivery_info": {
            "delivery_tag": 1, "redelivered": True, "exchange": "img", "routing_key": "img.a",
            "message_count": 0,
        },
    }  # fmt: skip
    assert inside("basic.get", "q") == (0, "No messages in queue 'q'.\n", "")
    assert inside("basic.get", "q", "--json")[1] == "null\n"
    assert inside("queue.unbind", "q", "img", "img.#")[0] == 0
    code, shown, told = inside("basic.publish", "lost", "img", "img.a")
    assert (code, shown) == (1, "") and "no queue takes it: exchange 'img', routing key 'img.a' (312" in told
    assert inside("basic.publish", "lost", "img", "img.a", "no")[0] == 0
    inside("basic.publish", "", "", "q")
    assert inside("queue.purge", "q")[1] == "ok. 1 messages deleted.\n"
    assert json.loads(inside("--json", "queue.delete", "q")[1]) == {"message_count": 0}
    assert inside("exchange.delete", "img", "yes")[0] == 0
    assert rabbit_server.queues(vhost) == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["queue.purge", "nope"], "queue.purge: 404 NOT_FOUND - no queue 'nope'"),
        (["queue.declare", "nope", "yes"], "queue.declare: 404 NOT_FOUND"),
        (["basic.publish", "m", "nope", "k"], "404 NOT_FOUND - no exchange 'nope'"),
        (["exchange.declare", "amq.mine"], "403 ACCESS_REFUSED"),
        (["exchange.declare", "e", "nosuchtype"], "unknown exchange type 'nosuchtype'"),
        (["queue.purge", "q" * 256], "256 bytes, at most 255"),
        (["basic.publish", "m", "", "k", "priority=900"], "priority=900: a number from 0 to 255"),
        (["basic.publish", "m", "", "k", "immediate=yes"], "RabbitMQ knows no immediate messages"),
        (["basic.ack", "1"], "no message with the delivery tag 1 is held here (held: none)"),
    ],
)
def test_what_the_server_refuses_is_told_with_code_1(inside: Inside, words: List[str], said: str) -> None:
    code, shown, told = inside(*words)
    assert (code, shown) == (1, "")
    assert said in told and told.count("\n") == 1 and "guest:guest" not in told, told


# -- many commands, from a pipe -------------------------------------------------------------------


def test_lines_are_done_in_turn_and_an_error_spares_the_others(pipe: Pipe) -> None:
    lines = b"""
    # What is held stays held from line to line, and an error costs one command.
    queue.declare q
    basic.publish "two words" '' q
    queue.prge q
    basic.get q
    basic.ack 1
    basic.ack 1
    queue.purge nope
    queue.declare q durable=no
    queue.declare q
    exit
    queue.delete q
    """
    ended = pipe(lines, "--json")
    told = ended.stderr.decode()
    assert ended.returncode == 1, told
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [answer.get("message_count") for answer in answers] == [0, None, None, None, 0]
    assert answers[2]["body"] == "two words"
    assert re.findall(r"line (\d+)", told) == ["5", "8", "9", "10"]
    assert "404 NOT_FOUND" in told and "406 PRECONDITION_FAILED" in told and "Traceback" not in told
    assert pipe(b"queue.purge q\n").returncode == 0


def test_message_of_any_bytes_comes_back_as_it_was(pipe: Pipe) -> None:
    ended = pipe(b"queue.declare q\nbasic.publish '\xff\xfe\x1b[2J' '' q\nbasic.get q yes\n", "--json")
    assert ended.returncode == 0, ended.stderr
    message = json.loads(ended.stdout.splitlines()[-1])
    assert (message["body"], message["body_encoding"]) == ("//4bWzJK", "base64")
    ended = pipe(b"basic.publish '\x1b[2Jhi' '' q 'type=\x1b[31m'\nbasic.get q\n")
    # Nobody's message writes on the terminal of who looks at it.
    assert ended.returncode == 0 and b"\x1b" not in ended.stdout and rb"'\x1b[2Jhi'" in ended.stdout


# -- what is held, and what gets lost -------------------------------------------------------------


def test_message_is_held_until_it_is_acknowledged_or_rejected(
    new_session: Any, rabbit_url: str, notes: Notes
) -> None:
    session = new_session(rabbit_url)
    do(session, "queue.declare", "q")
    for body in ("one", "two", "three"):
        do(session, "basic.publish", body, "", "q")
    taken = [do(session, "basic.get", "q") for _ in range(3)]
    assert [one.delivery_tag for one in taken] == [1, 2, 3]
    assert [one.content.body for one in taken] == [b"one", b"two", b"three"]
    do(session, "basic.ack", "2")
    do(session, "basic.reject", "3", "no")
    do(session, "basic.reject", "1")
    assert session.held == {}
    back = do(session, "basic.get", "q")
    assert (back.delivery_tag, back.redelivered, back.content.body) == (4, True, b"one")
    assert do(session, "basic.get", "q") is None
    assert not notes
    session.close()
    assert notes.take() == "Messages that were not acknowledged, and are back in their queues: 1"
    assert do(session, "queue.declare", "q")["message_count"] == 1


def test_channel_that_is_closed_is_replaced_and_its_tags_are_never_anothers(
    new_session: Any, rabbit_url: str, notes: Notes
) -> None:
    session = new_session(rabbit_url)
    do(session, "queue.declare", "q")
    do(session, "basic.publish", "m", "", "q")
    assert do(session, "basic.get", "q").delivery_tag == 1
    with pytest.raises(MiniqError, match="404 NOT_FOUND.*not acknowledged, and are back in their queues: 1"):
        do(session, "queue.purge", "nope")
    assert do(session, "basic.get", "q").delivery_tag == 2
    with pytest.raises(MiniqError, match=r"delivery tag 1 is held here \(held: 2\)"):
        do(session, "basic.ack", "1")
    assert not notes
    # Closed while nobody looked, as by the server's consumer_timeout.
    channel = session._channel
    assert channel is not None
    channel.ack(1_000_000)
    channel.connection.flush()
    wait_until(channel.connection.has_input)
    assert do(session, "basic.get", "q").delivery_tag == 3
    told = notes.take()
    assert re.fullmatch(r"The server closed the channel: 406 PRECONDITION_FAILED.*; messages .*: 1", told)
    do(session, "basic.ack", "3")


def test_connection_has_no_heartbeat_and_one_closed_meanwhile_is_told_and_replaced(
    new_session: Any, rabbit_server: RabbitServer, rabbit_url: str, notes: Notes
) -> None:
    session = new_session(rabbit_url)
    do(session, "queue.declare", "q")
    do(session, "basic.publish", "m", "", "q")
    do(session, "basic.get", "q")
    [ours] = [row for row in rabbit_server.connections() if "miniq amqp" in str(row["client_properties"])]
    assert ours["timeout"] == 0
    connection = session.connect()
    rabbit_server.close_connections("maintenance")
    wait_until(connection.has_input)
    assert do(session, "queue.declare", "q")["message_count"] == 1
    told = notes.take()
    assert "The connection was lost: " in told and "maintenance" in told
    assert "Connecting again to amqp://guest:**@" in told and "back in their queues: 1" in told
    do(session, "queue.delete", "q")
    assert not notes


def test_server_that_is_down_is_an_error_and_found_again_when_it_is_back(
    new_session: Any, rabbit_server: RabbitServer, rabbit_url: str, notes: Notes
) -> None:
    with Proxy(rabbit_server.port) as proxy:
        session = new_session(proxy.url(rabbit_url))
        do(session, "queue.declare", "q")
        do(session, "basic.publish", "m", "", "q")
        connection = session.connect()
        proxy.refuse()
        proxy.close()
        wait_until(connection.has_input)
        for told in (True, False):
            with pytest.raises(Unreachable):
                do(session, "queue.declare", "q")
            assert ("The connection was lost: " in notes.take()) == told
        proxy.forward()
        assert do(session, "queue.declare", "q")["message_count"] == 1
        assert not notes
        session.close()


def test_line_that_went_dead_while_idle_is_noticed_before_a_command_is_sent(
    new_session: Any, rabbit_server: RabbitServer, rabbit_url: str, notes: Notes
) -> None:
    with Proxy(rabbit_server.port) as proxy:
        session = new_session(proxy.url(rabbit_url), socket_timeout=0.5, health_check_interval=1e-6)
        do(session, "queue.declare", "q")
        proxy.black_hole()
        do(session, "basic.publish", "m", "", "q")
        assert "The connection was lost: " in notes.take()
        assert do(session, "queue.declare", "q")["message_count"] == 1
        session.close()


def test_command_whose_answer_never_comes_fails_at_its_deadline_and_is_not_sent_again(
    new_session: Any, rabbit_server: RabbitServer, rabbit_url: str, notes: Notes
) -> None:
    with Proxy(rabbit_server.port) as proxy:
        session = new_session(proxy.url(rabbit_url), socket_timeout=0.3)
        do(session, "queue.declare", "q")
        do(session, "basic.publish", "m", "", "q")
        proxy.black_hole()
        with pytest.raises(MiniqError, match="the time for it was over.*basic.publish"):
            do(session, "basic.publish", "m", "", "q")
        assert do(session, "queue.declare", "q")["message_count"] == 1
        assert "Connecting again" in notes.take()
        session.close()


# -- completion -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("queue.de", ["queue.declare", "queue.delete"]),
        ("purg", ["queue.purge"]),
        ("help basic.g", ["basic.get"]),
        ("nothing x", []),
        ("queue.purge ma", ["mail", "mailex"]),
        ("queue.bind mail c", ["celery"]),
        ("queue.bind mail celery ", []),
        ("basic.publish ", []),
        ("exchange.declare e f", ["fanout"]),
        ("queue.declare mail y", ["yes"]),
        ("queue.declare mail passive=no au", ["auto_delete=no", "auto_delete=yes"]),
        ("basic.ack ", ["41"]),
    ],
)
def test_words_are_completed_by_what_is_known(line: str, found: List[str]) -> None:
    shell = Shell(Server("amqp://nobody", Options()), False, ["celery", "mail", "mailex"])
    shell.session.held = {41: 1}
    begin = len(line) - len(line.rpartition(" ")[2])
    text = line[begin:]
    names = shell.completedefault(text, line, begin, len(line)) if begin else shell.completenames(text)
    assert names == found


# -- the prompt -----------------------------------------------------------------------------------


#: Makes the terminal its own, so that Ctrl-C is a signal to it, and becomes the program.
OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A program on a terminal of its own, typed at by `send`."""

    def __init__(self, command: List[str], folder: Path) -> None:
        ours, theirs = os.openpty()
        self._file = ours
        self.shown = ""
        self._seen = 0  #: how much of it was awaited already
        variables = environment(TERM="xterm", PYTHONWARNINGS="default")
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, *command],
            stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=variables, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)

    def send(self, text: str, awaited: str) -> None:
        """Type `text`, and wait until `awaited` was shown, behind what was awaited before."""
        os.write(self._file, text.encode())
        wait_until(lambda: awaited in self._read()[self._seen :], 20, lambda: f"{awaited!r}: {self.shown!r}")
        self._seen = self.shown.index(awaited, self._seen) + len(awaited)

    def _read(self) -> str:
        if select.select([self._file], [], [], 0.02)[0]:
            try:
                self.shown += os.read(self._file, 65536).decode(errors="replace")
            except OSError:  # it ended
                pass
        return self.shown

    def end(self) -> Optional[int]:
        """Wait until it has ended, and return its exit code."""
        wait_until(lambda: self._read() is not None and self.process.poll() is not None, 20)
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._file)


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_prompt_completes_survives_errors_and_ctrl_c_and_ends_with_ctrl_d(
    rabbit_server: RabbitServer, rabbit_url: str, tmp_path: Path
) -> None:
    pytest.importorskip("readline")
    command = [sys.executable, "-m", "miniq", "-b", rabbit_url, "amqp"]
    with closing(Terminal(command, tmp_path)) as terminal:
        terminal.send("", "1> ")
        assert re.match(r"amqp://guest:\*\*@.*: RabbitMQ 3\..* help ", terminal.shown)
        terminal.send("queue.dec\t", "queue.declare")
        terminal.send(" mail\n", "ok. queue:mail messages:0 consumers:0.")
        terminal.send("", "2> ")
        terminal.send("queue.purge m\t", "mail")
        terminal.send("\n", "ok. 0 messages deleted.")
        terminal.send("", "3> ")
        terminal.send("queue.purge nope\n", "404 NOT_FOUND")
        terminal.send("", "4> ")
        terminal.send("dropped\x03", "4> ")
        terminal.send("queue.declare mail\n", "ok. queue:mail")
        terminal.send("", "5> ")
        rabbit_server.close_connections("maintenance")
        terminal.send("queue.declare mail\n", "ok. queue:mail")
        assert "The connection was lost: " in terminal.shown and "Connecting again to" in terminal.shown
        terminal.send("", "6> ")
        terminal.send("help queue.purge\n", "queue.purge QUEUE")
        terminal.send("", "7> ")
        terminal.send("\x04", "\n")
        assert terminal.end() == 0
        assert "Traceback" not in terminal.shown


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_prompt_without_a_server_ends_at_once_with_code_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "miniq", "-b", f"amqp://127.0.0.1:{free_port()}", "amqp", "repl"]
    with closing(Terminal(command, tmp_path)) as terminal:
        terminal.send("", "Error: ")
        assert terminal.end() == 1
        assert "1> " not in terminal.shown

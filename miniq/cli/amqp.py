# SPDX-License-Identifier: MIT
"""``miniq amqp``: a shell for RabbitMQ, with the commands of ``celery amqp`` and their order of arguments.

One command on the command line, many from a pipe, or typed at a prompt.  A command is an entry of
`amqp_commands`, and most are one method of AMQP; with ``--json`` the server's answer is printed.

All commands of a run share one connection and one channel, which holds what ``basic.get`` took until
``basic.ack``.  Before each command the line is looked at, so that what was lost while nobody typed is
told, and replaced, before anything is sent: a command is never sent twice.
"""

from __future__ import annotations

import argparse
import base64
import cmd
import io
import json
import sys
from time import monotonic
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

from ..codecs.amqp import GetOk
from ..connections.amqp import Channel, ChannelError, Connection, Options, Server
from ..exceptions import ImproperlyConfigured, MiniqError
from ..text import mask_url, mask_urls, safe_repr
from ..transports.base import TRANSPORTS
from .amqp_commands import COMMANDS, Call, Misuse, command_list, help_text, parse, split

#: Characters of a message's body that are shown; --json shows all.
MOST_SHOWN = 4000

EPILOG = """\
commands (arguments in this order; what is in brackets also by its name, as auto_delete=yes):
{commands}

An exchange or queue takes arguments by their names (x-queue-type=quorum x-max-priority=10), a binding
those of its exchange's type, and a message properties and headers (priority=5 headers='{{"a": 1}}').
The exchange "" is the default one: it takes a message to the queue that its routing key names.
What basic.get took and nobody acknowledged goes back to its queue at the end.

examples:
  python -m miniq -b amqp://user@host/vhost amqp
  python -m miniq -A proj amqp queue.declare mail x-queue-type=quorum
  python -m miniq -A proj amqp basic.publish 'hello' '' mail
  python -m miniq -A proj amqp --json basic.get mail yes
  python -m miniq -A proj amqp < commands.txt       the exit code is 1 if any of them failed
"""


# -- the line ------------------------------------------------------------------------------------


class Unreachable(MiniqError):
    """No connection could be made; the text says why."""


class Session:
    """A connection with one channel, made when needed and replaced when lost; holds what basic.get took.

    The connection has no heartbeats, so that it may lie idle for as long as the server lives.  `note` is
    told what was lost.  Delivery tags count on when the channel is replaced: an old one is unknown then,
    and never another message's.
    """

    def __init__(self, server: Server, note: Callable[[str], None]) -> None:
        self._server = server
        self._note = note
        self._connection: Optional[Connection] = None
        self._channel: Optional[Channel] = None
        self._looked_mono = 0.0
        #: Delivery tag as it was shown -> that of the channel.
        self.held: Dict[int, int] = {}
        self._last_tag = 0

    def connect(self) -> Connection:
        """Return the connection, a new one if there is none.  Raises `Unreachable`."""
        if self._connection is None:
            timeout_s = self._server.options.connect_timeout * len(self._server.endpoints)
            try:
                self._connection = self._server.connect(timeout_s, "miniq amqp")
            except MiniqError as error:
                raise Unreachable(str(error)) from error
            self._looked_mono = monotonic()
        return self._connection

    def run(self, call: Call) -> Any:
        """Do it and return the server's answer; what basic.get took is None where the queue was empty.

        Raises `MiniqError`; a channel that the server closed because of it is replaced by the next call.
        """
        self._look()
        if "delivery_tag" in call.args and call.args["delivery_tag"] not in self.held:
            held = ", ".join(map(str, self.held)) or "none"
            raise MiniqError(
                f"{call.name}: no message with the delivery tag {call.args['delivery_tag']} is held here"
                f" (held: {held}): basic.get takes one, for as long as this run"
            )
        connection = self.connect()
        try:
            if self._channel is None:
                self._channel = connection.open_channel()
            found = self._run_on(self._channel, call)
        except ChannelError as error:
            raise MiniqError(f"{error}{self._lose_channel()}") from error
        except (ValueError, TypeError) as error:  # what no frame can hold
            raise MiniqError(f"{call.name}: {error}") from error
        self._looked_mono = monotonic()
        return found

    def _run_on(self, channel: Channel, call: Call) -> Any:
        name, args = call.name, call.args
        if name == "basic.publish":
            return self._publish(channel, args, call.more)
        if name == "basic.get":
            return self._get(channel, args["queue"], args["no_ack"])
        if "delivery_tag" in args:
            tag = self.held[args["delivery_tag"]]
            if name == "basic.ack":
                channel.ack(tag)
            else:
                channel.reject(tag, args["requeue"])
            # These have no answer: that of something harmless behind them tells that they were taken.
            channel.call("basic.qos")
            del self.held[args["delivery_tag"]]
            return {}
        if COMMANDS[name].takes:
            args = {**args, "arguments": call.more}
        return channel.call(name, **args)

    def _publish(self, channel: Channel, args: Mapping[str, Any], more: Mapping[str, Any]) -> Dict[str, Any]:
        if args["immediate"]:
            raise MiniqError("basic.publish: RabbitMQ knows no immediate messages since its version 3.0")
        properties = {"content_type": "text/plain", "content_encoding": "utf-8", "delivery_mode": 2, **more}
        headers = properties.pop("headers", None)
        body = args["msg"].encode("utf-8", "surrogateescape")  # bytes come back as they came
        channel.select_confirms()
        where = args["exchange"], args["routing_key"]
        item = (*where, properties, headers, body, args["mandatory"])
        [refusal] = channel.publish([item], self._server.options.socket_timeout)
        if refusal is not None:
            why = "no queue takes it" if refusal.kind == "returned" else "the server refused it"
            told = f" ({refusal.code} {refusal.text})" if refusal.code else ""
            raise MiniqError(f"basic.publish: {why}: exchange {where[0]!r}, routing key {where[1]!r}{told}")
        return {}

    def _get(self, channel: Channel, queue: str, no_ack: bool) -> Optional[GetOk]:
        found = channel.get(queue, no_ack)
        if found is None:
            return None
        self._last_tag += 1
        if not no_ack:
            self.held[self._last_tag] = found.delivery_tag
        return found._replace(delivery_tag=self._last_tag)

    def _look(self) -> None:
        """Notice, and tell, what was lost since the last command: the connection, or the channel."""
        connection, channel = self._connection, self._channel
        if connection is None:
            return
        options = self._server.options
        was_broken = connection.broken  # by the last command, which told it
        try:
            if not was_broken:
                connection.read_ready()
                if monotonic() - self._looked_mono > options.health_check_interval:
                    connection.probe(options.socket_timeout)
                    self._looked_mono = monotonic()
        except MiniqError as error:
            self._note(f"The connection was lost: {error}")
        if connection.broken:
            self._note(f"Connecting again to {connection.url}{self._lose_channel()}")
            connection.close()
            self._connection = None
        elif channel is not None and channel.closed is not None:
            told = f"{channel.closed.code} {channel.closed.text}"
            self._note(f"The server closed the channel: {told}{self._lose_channel()}")

    def _lose_channel(self) -> str:
        """Forget the channel and what it held; return what to say of that."""
        told = self._put_back()
        self._channel = None
        self.held.clear()
        return f"; {told}" if told else ""

    def _put_back(self) -> str:
        count = len(self.held)
        return f"messages that were not acknowledged, and are back in their queues: {count}" if count else ""

    def close(self) -> None:
        """End the conversation."""
        if self._connection is not None:
            told = self._put_back()
            if told:
                self._note(told.capitalize())
            self._connection.close()
            self._connection = self._channel = None


# -- the shell -----------------------------------------------------------------------------------


class Shell(cmd.Cmd):
    """Lines in, answers out.  `known` are names of queues and exchanges, for completion.

    Answers go to standard output, as JSON if `as_json`, all else to standard error.
    """

    doc_header = ""

    def __init__(self, server: Server, as_json: bool, known: Iterable[str]) -> None:
        super().__init__()
        self.session = Session(server, self._tell)
        self.as_json = as_json
        self.known = set(known)
        self.prompt = "1> "
        self._count = 1

    def run(self, words: Sequence[str]) -> None:
        """Do one command and print its answer.  Raises `MiniqError`."""
        if words[0] == "help":
            print(help_text(words[1:]), flush=True)
            return
        call = parse(words)
        answer = self.session.run(call)
        self.known.update(call.args[key] for key in ("queue", "exchange") if call.args.get(key))
        print(_as_json(answer) if self.as_json else _as_text(call, answer), flush=True)

    def run_lines(self, lines: Iterable[str]) -> bool:
        """Do one command for each line; say whether none failed.

        One that fails does not keep the others from being done, but a server that cannot be reached does.
        """
        all_done = True
        for number, line in enumerate(lines, 1):
            where = f"line {number}: "
            try:
                words = split(line)
                if words and words[0] in ("exit", "quit"):
                    break
                if words:
                    self.run(words)
            except MiniqError as error:
                all_done = False
                self._tell(f"Error: {where}{error}")
                if isinstance(error, Unreachable):
                    break
        return all_done

    def run_prompt(self, quiet: bool) -> None:
        """Ask for commands until Ctrl-D."""
        connection = self.session.connect()
        if not quiet:
            product = connection.server_properties.get("product", "AMQP")
            version = ".".join(map(str, connection.server_version))
            print(f"{connection.url}: {product} {version}.  help lists the commands, Ctrl-D ends.")
        restore = _set_up_readline()
        try:
            while True:
                try:
                    self.cmdloop()
                    break
                except KeyboardInterrupt:
                    print()  # what was typed is dropped, as in any shell
        finally:
            restore()

    def close(self) -> None:
        """End the conversation with the server."""
        self.session.close()

    def _tell(self, text: str) -> None:
        print(mask_urls(text), file=sys.stderr, flush=True)

    # -- what cmd.Cmd asks

    def onecmd(self, line: str) -> bool:
        """Do a line that was typed; say whether it was the last one."""
        try:
            words = split(line)
            if words and words[0] in ("exit", "quit", "EOF"):
                if words[0] == "EOF":
                    print()
                return True
            if words:
                self.run(words)
        except MiniqError as error:
            self._tell(f"Error: {error}")
        self._count += 1
        self.prompt = f"{self._count}> "
        return False

    def completenames(self, text: str, *ignored: Any) -> List[str]:
        """Return the commands that begin with `text`, or whose second part does."""
        names = sorted([*COMMANDS, "help", "exit"])
        found = [name for name in names if name.startswith(text)]
        return found or [name for name in names if name.partition(".")[2].startswith(text)]

    def completedefault(self, *ignored: Any) -> List[str]:
        """Return what an argument may be, as far as that is known."""
        text, line, begin = ignored[:3]
        words = line[:begin].split()
        if words[:1] == ["help"]:
            return self.completenames(text)
        command = COMMANDS.get(words[0]) if words else None
        if command is None:
            return []
        place = [*command.required, *command.optional][len(words) - 1 :][:1]
        options: Iterable[str] = [f"{key}={value}" for key in command.optional for value in _values(key)]
        if place in (["queue"], ["exchange"]):
            options = self.known
        elif place == ["delivery_tag"]:
            options = map(str, self.session.held)
        elif place and place[0] in command.optional:
            options = [*_values(place[0]), *options]
        elif place:
            options = []
        return sorted(option for option in options if option.startswith(text))

    complete_help = completedefault


def _values(key: str) -> Tuple[str, ...]:
    return ("direct", "topic", "fanout", "headers") if key == "type" else ("yes", "no")


def _set_up_readline() -> Callable[[], None]:
    """Have the tab key complete whole words; return what undoes that."""
    try:
        import readline  # absent on Windows, and of use only where somebody types
    except ImportError:
        return lambda: None
    before = readline.get_completer_delims()
    readline.set_completer_delims(" \t\n")  # names have dots and dashes in them
    if "libedit" in (readline.__doc__ or ""):
        readline.parse_and_bind("bind ^I rl_complete")  # macOS; cmd knows that from Python 3.13 on
    return lambda: readline.set_completer_delims(before)


# -- what is printed -----------------------------------------------------------------------------


def _as_json(answer: Any) -> str:
    if isinstance(answer, GetOk):
        content = answer.content
        try:
            body, encoding = content.body.decode(), "utf-8"
        except UnicodeDecodeError:
            body, encoding = base64.b64encode(content.body).decode(), "base64"
        answer = {
            "body": body,
            "body_encoding": encoding,
            "properties": content.properties,
            "headers": content.headers,
            "delivery_info": _delivery_info(answer),
        }
    return json.dumps(answer, default=str)


def _as_text(call: Call, answer: Any) -> str:
    if call.name == "basic.get":
        if answer is None:
            return f"No messages in queue {call.args['queue']!r}."
        return _message_as_text(answer)
    if "consumer_count" in answer:
        queue = answer["queue"]
        name = queue if queue.isprintable() else repr(queue)
        return f"ok. queue:{name} messages:{answer['message_count']} consumers:{answer['consumer_count']}."
    if "message_count" in answer:
        return f"ok. {answer['message_count']} messages deleted."
    return "ok."


def _message_as_text(message: GetOk) -> str:
    """Return a message for people to read; as reprs, for what it holds may be anybody's."""
    body: Any = message.content.body
    size = len(body)
    try:
        body = body.decode()
    except UnicodeDecodeError:
        pass
    rows = {"body": f"{safe_repr(body, MOST_SHOWN)} ({size} bytes)"}
    for key, value in {**_delivery_info(message), **message.content.properties}.items():
        rows[key] = safe_repr(value)
    for key, value in message.content.headers.items():
        rows[f"header {safe_repr(key)}"] = safe_repr(value)
    return "\n".join(f"{key:>16}  {value}" for key, value in rows.items())


def _delivery_info(message: GetOk) -> Dict[str, Any]:
    names = ("delivery_tag", "redelivered", "exchange", "routing_key", "message_count")
    return {name: getattr(message, name) for name in names}


# -- the command line ----------------------------------------------------------------------------


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "amqp",
        help="a shell for RabbitMQ: exchanges, queues, bindings, messages",
        description="Declare, bind, delete and purge on a RabbitMQ server; publish and get messages.\n"
        "Without a command: a prompt, or one command for each line that is piped in.",
        epilog=EPILOG.format(commands=command_list()),
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print answers as JSON, one a line")
    add = parser.add_argument
    add("words", nargs="*", action=_Words, metavar="COMMAND ARGUMENT", help="one command, and no prompt")


class _Words(argparse.Action):
    """Takes the words of a command that makes sense, so that another is a wrong command line."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        words = [] if values == ["repl"] else values  # as Celery calls the prompt
        try:
            if words:
                help_text(words[1:]) if words[0] == "help" else parse(words)
        except Misuse as error:
            raise argparse.ArgumentError(None, str(error)) from error
        setattr(namespace, self.dest, words)


def run(app: Any, options: argparse.Namespace) -> int:
    """Do one command, those of a pipe, or those typed at the prompt."""
    words: List[str] = options.words
    if words[:1] == ["help"]:  # needs no server
        print(help_text(words[1:]))
        return 0
    shell = Shell(_server(app), options.json, _known_names(app))
    try:
        if words:
            shell.run(words)
        elif sys.stdin.isatty() and sys.stdout.isatty():
            shell.run_prompt(options.quiet)
        else:
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="surrogateescape")  # messages may be any bytes
            return 0 if shell.run_lines(sys.stdin) else 1
    finally:
        shell.close()
    return 0


def _server(app: Any) -> Server:
    """Return the broker's server.  `ImproperlyConfigured` where it is not RabbitMQ."""
    url = app.broker_url(write=True)
    scheme = url.partition("://")[0].lower()
    if TRANSPORTS.get(scheme) != TRANSPORTS["amqp"]:
        raise ImproperlyConfigured(
            f"amqp is for RabbitMQ alone, and the broker {mask_url(url)!r} has the scheme {scheme}://;"
            " give the URL with -b, before the command: -b amqp://user@host/vhost"
        )
    return Server.of(url, Options.read(app.broker_options(url), url))


def _known_names(app: Any) -> List[str]:
    queues = app.router.queues.values()
    return [queue.name for queue in queues] + [queue.exchange.name for queue in queues if queue.exchange.name]

# SPDX-License-Identifier: MIT
"""Servers as real processes: started on a free loopback port, stopped, killed, frozen, started again.

A server never outlives the tests, however they end: beside each one waits a shell on a pipe that
only this process holds open.  When the pipe closes, it kills the server.

Redis is asked over a Unix socket of its own, with a RESP reader that shares nothing with the code
under test; so that works too when TCP is TLS, proxied or full, and never meets another's server.
So is RabbitMQ: a few lines of Erlang in its virtual machine evaluate what they are sent.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import (
    Any,
    BinaryIO,
    Dict,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Type,
    TypeVar,
    Union,
)
from urllib.parse import quote, urlencode

import pytest
from waiting import wait_until

HOST = "127.0.0.1"
#: Seconds for a server to start, or to end when asked to; it takes some 10 ms.
TIMEOUT_S = 20.0
#: The same for RabbitMQ; it takes 3 s.
RABBIT_TIMEOUT_S = 90.0
S = TypeVar("S", bound="Server")
Part = Union[str, bytes, int, float]


def find_program(*names: str) -> str:
    """Return the path of the first program that is installed; without one skip the test, in CI fail it."""
    for name in names:
        # Debian has servers in folders that are only on root's PATH.
        path = shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")
        if path:
            return path
    if os.environ.get("CI"):
        pytest.fail(f"{' or '.join(names)} is not installed: required in CI", pytrace=False)
    pytest.skip(f"{' or '.join(names)} is not installed")


def free_port() -> int:
    """Return a loopback port that was free just now.

    Below those that the kernel gives to clients: while a server is down, a client that tries to
    connect to such a port again and again may be given that very port, and then talks to itself.
    """
    for _ in range(1000):
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port between 15000 and 32000")


class Server:
    """One server process; `folder` keeps its data and its log."""

    #: Names of the program, the preferred one first.
    programs: Tuple[str, ...] = ()
    #: Seconds to start or to end, and between two looks whether it answers.
    timeout_s = TIMEOUT_S
    pause_s = 0.005

    def __init__(self, folder: Path) -> None:
        self.program = find_program(*self.programs)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._choose_ports()
        self._log_file = folder / "server.log"
        self._process: Optional["subprocess.Popen[bytes]"] = None
        self._guard: Optional["subprocess.Popen[bytes]"] = None

    def _arguments(self) -> List[str]:
        raise NotImplementedError

    def _environment(self) -> Optional[Dict[str, str]]:
        """Return its environment variables; None passes ours on."""
        return None

    def _choose_ports(self) -> None:
        self.port = free_port()

    def _answers(self) -> bool:
        """Say whether this very process serves; `OSError` is a no."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self} was not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """All that it wrote, of all its starts."""
        return self._log_file.read_text(encoding="utf-8", errors="replace") if self._log_file.exists() else ""

    def start(self: S, wait: bool = True) -> S:
        """Start it, on the same port and data as before; return when it answers, unless not `wait`."""
        assert not self.running, f"{self} runs already"
        # Another port only at first: somebody may be quicker between the probe and the start.
        other_ports = 5 if self._process is None else 0
        self._reap()
        while True:
            self._launch()
            try:
                if wait:
                    self.wait_ready()
                return self
            except BaseException:
                self.kill()
                log = self.log.lower()
                if not other_ports or not ("already in use" in log or "eaddrinuse" in log):
                    raise
            other_ports -= 1
            self._choose_ports()

    def wait_ready(self) -> None:
        """Wait until it answers; `AssertionError` with its log if it ended, or does not in time."""
        wait_until(
            self._ready_or_ended,
            self.timeout_s,
            lambda: f"{self} answers; its log:\n{self.log}",
            self.pause_s,
        )
        assert self.running, f"{self} ended at the start; its log:\n{self.log}"

    def _launch(self) -> None:
        with open(self._log_file, "ab") as log:
            self._process = subprocess.Popen(
                [self.program, *self._arguments()],
                cwd=str(self.folder),
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the tests; they end the server when they are done.
                start_new_session=True,
            )
        self._guard = subprocess.Popen(
            ["sh", "-c", 'read nothing; kill -9 "$0"', str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _ready_or_ended(self) -> bool:
        try:
            return self._answers() or not self.running
        except OSError:
            return not self.running

    def _reap(self) -> None:
        """Wait for the end of the process, which has come or is about to, and end its guard."""
        if self._process is not None and self._guard is not None:
            self._process.wait()
            self._guard.kill()
            self._guard.communicate()

    def stop(self, timeout_s: Optional[float] = None) -> None:
        """Ask it to end (SIGTERM) and wait until it has; nothing happens if it does not run."""
        if self._process is not None and self.running:
            self.resume()
            self._process.terminate()
            try:
                self._process.wait(self.timeout_s if timeout_s is None else timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"{self} had to be killed; its log:\n{self.log}") from None
        self._reap()

    def kill(self) -> None:
        """End it at once (SIGKILL)."""
        self._send(signal.SIGKILL)
        self._reap()

    def restart(self: S) -> S:
        """Stop it and start it again, on the same port and data."""
        self.stop()
        return self.start()

    def pause(self) -> None:
        """Freeze it (SIGSTOP): the kernel still accepts connections and bytes for it, nothing answers."""
        self._send(signal.SIGSTOP)
        wait_until(self._is_frozen, what=f"{self} stands still")

    def _is_frozen(self) -> bool:
        """Say whether every thread stands still: the signal takes its time."""
        assert self._process is not None
        tasks = Path(f"/proc/{self._process.pid}/task")
        if not tasks.is_dir():  # not Linux
            return True
        states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks.iterdir()]
        return all(state == "T" for state in states)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        self._send(signal.SIGCONT)

    def _send(self, number: int) -> None:
        assert self._process is not None, f"{self} was not started"
        self._process.send_signal(number)

    def __enter__(self: S) -> S:
        return self if self.running else self.start()

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<{Path(self.program).name} on port {self.port}>"


class Certificates(NamedTuple):
    """Files in PEM: an authority, and what it signed for a server (localhost, 127.0.0.1) and a client."""

    ca: Path
    server_certificate: Path
    server_key: Path
    client_certificate: Path
    client_key: Path


def certificates(folder: Path) -> Certificates:
    """Make an authority and two certificates, valid for a month, with the command openssl."""
    openssl = find_program("openssl")
    folder.mkdir(parents=True, exist_ok=True)
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

    def run(*arguments: str) -> None:
        done = subprocess.run([openssl, *arguments], cwd=str(folder), capture_output=True, text=True)
        assert done.returncode == 0, f"openssl {' '.join(arguments)}:\n{done.stderr}"

    # Strict verification, the default from Python 3.13 on, asks for the key usage.
    usage = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    run("req", "-x509", *new_key, *usage, "-subj", "/CN=tests", "-keyout", "ca.key", "-out", "ca.pem")
    for name in ("server", "client"):
        (folder / f"{name}.ext").write_text(
            "subjectAltName=DNS:localhost,IP:127.0.0.1\n"
            "subjectKeyIdentifier=hash\n"
            "authorityKeyIdentifier=keyid\n"
        )
        run("req", *new_key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        run(
            *("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem"),
            *("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", f"{name}.ext"),
        )
    files = ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")
    return Certificates(*(folder / name for name in files))


class ErrorReply(Exception):
    """Redis answered with an error."""


class RedisServer(Server):
    """A redis-server.

    With `appendonly` all that was answered survives `kill`, though not the machine's power failure.
    With `tls` the port speaks TLS only, and asks for a client certificate if `tls_clients`.
    `arguments` are added to the command line: ``["--databases", "64"]``.
    """

    programs = ("redis-server", "valkey-server")

    def __init__(
        self,
        folder: Path,
        appendonly: bool = False,
        password: Optional[str] = None,
        tls: Optional[Certificates] = None,
        tls_clients: bool = False,
        maxmemory: Optional[str] = None,
        arguments: Sequence[str] = (),
    ) -> None:
        super().__init__(folder)
        self.appendonly = appendonly
        #: What `command` and `url` use; to be set by who changes it at the server.
        self.password = password
        self.tls = tls
        self.tls_clients = tls_clients
        self.maxmemory = maxmemory
        self.arguments = list(arguments)
        self.socket_path = folder / "redis.sock"

    def _arguments(self) -> List[str]:
        found = ["--bind", HOST, "--unixsocket", str(self.socket_path), "--dir", str(self.folder)]
        found += ["--save", ""]
        found += ["--port", "0", "--tls-port", str(self.port)] if self.tls else ["--port", str(self.port)]
        # Unlike "everysec", "no" never answers before the kernel has the bytes, and is as quick.
        found += ["--appendonly", "yes", "--appendfsync", "no"] if self.appendonly else ["--appendonly", "no"]
        if self.tls:
            found += ["--tls-cert-file", str(self.tls.server_certificate)]
            found += ["--tls-key-file", str(self.tls.server_key), "--tls-ca-cert-file", str(self.tls.ca)]
            found += ["--tls-auth-clients", "yes" if self.tls_clients else "no"]
        if self.password:
            found += ["--requirepass", self.password]
        if self.maxmemory:
            found += ["--maxmemory", self.maxmemory]
        return found + self.arguments

    def _answers(self) -> bool:
        try:
            return bool(self.command("PING") == b"PONG")
        except ErrorReply as error:
            if str(error).startswith("LOADING"):
                return False
            raise

    def url(self, db: int = 0, **query: Any) -> str:
        """Return the URL of a database, with the password; `query` are parameters at its end."""
        login = f":{quote(self.password, safe='')}@" if self.password else ""
        scheme = "rediss" if self.tls else "redis"
        return f"{scheme}://{login}{HOST}:{self.port}/{db}{'?' if query else ''}{urlencode(query)}"

    def socket_url(self, db: int = 0) -> str:
        """Return the URL of a database by way of the Unix socket."""
        login = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis+socket://{login}{self.socket_path}?virtual_host={db}"

    def command(self, *parts: Part, db: int = 0, timeout_s: float = TIMEOUT_S) -> Any:
        """Run one command as redis-cli would and return the reply; an error is raised as `ErrorReply`."""
        return self.commands([parts], db, timeout_s)[0]

    def commands(
        self, commands: Sequence[Sequence[Part]], db: int = 0, timeout_s: float = TIMEOUT_S
    ) -> List[Any]:
        """Run commands over one new connection and return the replies (bytes, int, list, None)."""
        before: List[Sequence[Part]] = []
        if self.password:
            before.append(("AUTH", self.password))
        if db:
            before.append(("SELECT", db))
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(timeout_s)
            peer.connect(str(self.socket_path))
            peer.sendall(b"".join(map(_encode, [*before, *commands])))
            with peer.makefile("rb") as replies:
                found = [_read(replies) for _ in range(len(before) + len(commands))]
        for reply in found:
            if isinstance(reply, ErrorReply):
                raise reply
        return found[len(before) :]

    def info(self, section: str = "all") -> Dict[str, str]:
        """Return what INFO says, as text."""
        lines = self.command("INFO", section).decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def clients(self) -> List[Dict[str, str]]:
        """Return the connections but ours as CLIENT LIST tells them: ``id``, ``name``, ``cmd``, ``sub``..."""
        own, text = self.commands([("CLIENT", "ID"), ("CLIENT", "LIST")])
        lines = text.decode().splitlines()
        rows = [dict(part.split("=", 1) for part in line.split()) for line in lines]
        return [row for row in rows if row["id"] != str(own)]

    def kill_clients(self) -> int:
        """Close all connections from the server's side, ours excepted; return how many."""
        return sum(int(self.command("CLIENT", "KILL", "TYPE", kind)) for kind in ("normal", "pubsub"))


def _encode(parts: Sequence[Part]) -> bytes:
    blobs = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return b"*%d\r\n" % len(blobs) + b"".join(b"$%d\r\n%s\r\n" % (len(blob), blob) for blob in blobs)


def _read(replies: BinaryIO) -> Any:
    """Read one RESP2 reply; an error is returned, not raised."""
    line = replies.readline()
    if not line.endswith(b"\r\n"):
        raise ConnectionError(f"redis-server closed the connection within a reply: {line!r}")
    kind, rest = line[:1], line[1:-2]
    if kind == b"+":
        return rest
    if kind == b"-":
        return ErrorReply(rest.decode())
    if kind == b":":
        return int(rest)
    if kind == b"$":
        return None if rest == b"-1" else replies.read(int(rest) + 2)[:-2]
    if kind == b"*":
        return None if rest == b"-1" else [_read(replies) for _ in range(int(rest))]
    raise AssertionError(f"no RESP2 reply: {line!r}")


class MemcachedServer(Server):
    """A memcached; `arguments` are added to the command line: ``["-m", "8"]``."""

    programs = ("memcached",)

    def __init__(self, folder: Path, arguments: Sequence[str] = ()) -> None:
        super().__init__(folder)
        self.arguments = list(arguments)

    def _arguments(self) -> List[str]:
        found = ["-l", HOST, "-p", str(self.port), "-U", "0", "-t", "1"]
        if os.geteuid() == 0:
            # It refuses to run as root unless that is said.
            found += ["-u", "root"]
        return found + self.arguments

    def _answers(self) -> bool:
        # Another's memcached might have taken the port first.
        return f"STAT pid {self.pid}\r\n".encode() in self.command("stats")

    def stop(self, timeout_s: Optional[float] = None) -> None:
        """End it at once: it has nothing to save, and takes a second when asked."""
        if self.running:
            self.kill()

    def url(self) -> str:
        return f"memcache://{HOST}:{self.port}/"

    def command(self, line: str, timeout_s: float = TIMEOUT_S) -> bytes:
        """Send one line of the text protocol; return all bytes up to the end of the reply."""
        with socket.create_connection((HOST, self.port), timeout_s) as peer:
            peer.sendall(f"{line}\r\nquit\r\n".encode())
            with peer.makefile("rb") as replies:
                return replies.read()


#: Run in RabbitMQ's virtual machine, before RabbitMQ itself.  It loads, on all cores and while the
#: start goes on, the modules that the start would load one by one, which halves its time.  And it
#: serves a Unix socket: a connection sends an expression, which is evaluated, and gets "+" and the
#: value in JSON, or "-" and an error; both behind a length of 4 bytes.
RABBIT_CONTROL = r"""
spawn(fun() ->
    Roots = [rabbit, rabbitmq_prelaunch, rabbit_common, ra, osiris, mnesia, ssl, public_key, asn1,
             inets, xmerl, os_mon, tools, runtime_tools, syntax_tools],
    [application:load(Root) || Root <- Roots],
    [code:ensure_modules_loaded(Modules) || {App, _, _} <- application:loaded_applications(),
        {ok, Modules} <- [application:get_key(App, modules)]]
end).

Json = fun
    Json(X) when is_integer(X) -> integer_to_list(X);
    Json(X) when is_float(X) -> float_to_list(X);
    Json(X) when X =:= true; X =:= false -> atom_to_list(X);
    Json(undefined) -> "null";
    Json(X) when is_atom(X) -> Json(atom_to_binary(X, utf8));
    Json(X) when is_binary(X) ->
        Units = unicode:characters_to_binary(X, utf8, {utf16, big}),
        [$", [io_lib:format("\\u~4.16.0b", [Unit]) || <<Unit:16>> <= Units], $"];
    Json(X) when is_tuple(X) -> Json(tuple_to_list(X));
    Json(X) when is_list(X) -> [$[, lists:join($,, lists:map(Json, X)), $]];
    Json(X) when is_map(X) ->
        [${, lists:join($,, [[Json(Key), $:, Json(Value)] || {Key, Value} <- maps:to_list(X)]), $}];
    Json(X) -> Json(iolist_to_binary(io_lib:format("~p", [X])))
end.

Answer = fun(Text) ->
    try
        {ok, Tokens, _} = erl_scan:string(unicode:characters_to_list(Text)),
        {ok, Expressions} = erl_parse:parse_exprs(Tokens),
        {value, Value, _} = erl_eval:exprs(Expressions, []),
        [$+, Json(Value)]
    catch Kind:Reason ->
        [$-, unicode:characters_to_binary(io_lib:format("~p: ~tp", [Kind, Reason]))]
    end
end.

Serve = fun Serve(Listener) ->
    {ok, Peer} = gen_tcp:accept(Listener),
    spawn(fun() ->
        case gen_tcp:recv(Peer, 0) of
            {ok, Text} -> gen_tcp:send(Peer, Answer(Text));
            {error, _} -> ok
        end,
        gen_tcp:close(Peer)
    end),
    Serve(Listener)
end.

spawn(fun() ->
    file:delete("control.sock"),
    Options = [binary, {packet, 4}, {active, false}, {backlog, 100}, {ifaddr, {local, "control.sock"}}],
    {ok, Listener} = gen_tcp:listen(0, Options),
    Serve(Listener)
end).
"""


class RabbitError(Exception):
    """What RabbitMQ was asked to evaluate failed."""


class RabbitServer(Server):
    """A rabbitmq-server; its user is ``guest`` with the password ``guest``.

    `settings` are lines of rabbitmq.conf: ``{"consumer_timeout": 60000}``.  With `tls` the port speaks
    TLS only, and asks for a client certificate if `tls_clients`.  `plugins` are those that are enabled.

    A node uses no epmd, Erlang's name server, which is shared by all and never ends: the node's port
    is fixed, and rabbitmqctl is told it.  So all nodes can have one name, and do not meet.
    """

    # Debian's command of that name changes to another user; the program behind it does not.
    programs = ("/usr/lib/rabbitmq/bin/rabbitmq-server", "rabbitmq-server")
    timeout_s = RABBIT_TIMEOUT_S
    pause_s = 0.03
    node = "rabbit@localhost"

    def __init__(
        self,
        folder: Path,
        settings: Optional[Mapping[str, Any]] = None,
        tls: Optional[Certificates] = None,
        tls_clients: bool = False,
        plugins: Sequence[str] = (),
    ) -> None:
        super().__init__(folder)
        #: Take effect at the next start.
        self.settings = dict(settings or {})
        self.tls = tls
        self.tls_clients = tls_clients
        self.plugins = list(plugins)
        self._vhosts = itertools.count(1)

    def _choose_ports(self) -> None:
        super()._choose_ports()
        self.node_port = free_port()

    def _arguments(self) -> List[str]:
        (self.folder / "control.script").write_text(RABBIT_CONTROL)
        (self.folder / "enabled_plugins").write_text(f"[{','.join(self.plugins)}].\n")
        lines = [f"{name} = {value}\n" for name, value in self._settings().items()]
        (self.folder / "rabbitmq.conf").write_text("".join(lines))
        # Two cores are enough.  It looks for consumers that do not ack every second, not every minute,
        # and tells how full quorum queues are five times a second, not every five.
        ticks = ["-rabbit", "channel_tick_interval", "1000", "-rabbit", "quorum_tick_interval", "200"]
        return ["+S", "2:2", *ticks]

    def _settings(self) -> Dict[str, Any]:
        found: Dict[str, Any] = {"log.console": "true", "log.console.use_colors": "off"}
        found["log.file"] = "false"
        if self.tls:
            found["listeners.tcp"] = "none"
            found["listeners.ssl.1"] = f"{HOST}:{self.port}"
            found["ssl_options.cacertfile"] = self.tls.ca
            found["ssl_options.certfile"] = self.tls.server_certificate
            found["ssl_options.keyfile"] = self.tls.server_key
            found["ssl_options.verify"] = "verify_peer" if self.tls_clients else "verify_none"
            found["ssl_options.fail_if_no_peer_cert"] = str(self.tls_clients).lower()
        else:
            found["listeners.tcp.1"] = f"{HOST}:{self.port}"
        return {**found, **self.settings}

    def _environment(self) -> Dict[str, str]:
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            # Erlang keeps the cookie there, by which nodes know each other.
            "HOME": str(self.folder),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            # The script shall become the virtual machine, not watch it: signals go to this process.
            "RUNNING_UNDER_SYSTEMD": "true",
            "ERL_CRASH_DUMP_SECONDS": "0",
            "ERL_AFLAGS": f"-sname {self.node} -start_epmd false -erl_epmd_port {self.node_port}"
            " -kernel inet_dist_use_interface {127,0,0,1}"
            ' -eval file:eval(\\"control.script\\")',
        }

    def keep_declarations(self) -> None:
        """Have what was declared reach the disk: the server tells that it is there, and writes it later.

        A server that is killed at once after a declaration may come back without that durable queue or
        virtual host, and so without the messages in it.  This is a loss of its own, not one to look for.
        """
        self.eval("ok = mnesia:sync_log()")

    def kill(self) -> None:
        """End it at once (SIGKILL); what was declared until now is there after the next start."""
        if self.running and not self._is_frozen():
            with contextlib.suppress(OSError, RabbitError):  # it is about to start, or to end
                self.keep_declarations()
        super().kill()

    def _answers(self) -> bool:
        try:
            return bool(self.eval("rabbit:is_running() andalso rabbit_networking:active_listeners() =/= []"))
        except RabbitError:
            # The start has not come that far.
            return False

    def url(self, vhost: str = "/", user: str = "guest", password: str = "guest", **query: Any) -> str:
        """Return the URL of a virtual host, with the password; `query` are parameters at its end."""
        login = f"{quote(user, safe='')}:{quote(password, safe='')}@"
        place = f"{HOST}:{self.port}/{quote(vhost, safe='')}"
        return f"{'amqps' if self.tls else 'amqp'}://{login}{place}{'?' if query else ''}{urlencode(query)}"

    def eval(self, expression: str, timeout_s: float = TIMEOUT_S) -> Any:
        """Evaluate Erlang in the server and return the value; takes less than a ms.

        Atoms and binaries come as `str`, tuples and lists as `list`, maps as `dict`, ``undefined`` as
        None.  An error is raised as `RabbitError`, no answer as `OSError`.
        """
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(timeout_s)
            peer.connect(str(self.folder / "control.sock"))
            request = f"{expression}.".encode()
            peer.sendall(len(request).to_bytes(4, "big") + request)
            with peer.makefile("rb") as replies:
                size = int.from_bytes(replies.read(4), "big")
                reply = replies.read(size)
        if not size or len(reply) < size:
            raise ConnectionError(f"{self} ended while it evaluated {expression}")
        text = reply[1:].decode()
        if reply[:1] == b"-":
            raise RabbitError(f"{expression}: {text}")
        return json.loads(text)

    def ctl(self, *arguments: str, timeout_s: float = RABBIT_TIMEOUT_S) -> str:
        """Run rabbitmqctl and return what it prints: ``ctl("close_all_connections", "--global", "why")``.

        Takes nearly a second; the other methods take milliseconds.
        """
        program = Path(self.program).with_name("rabbitmqctl")
        environment = self._environment()
        del environment["ERL_AFLAGS"]
        environment["RABBITMQ_CTL_ERL_ARGS"] = (
            f"-start_epmd false -erl_epmd_port {self.node_port} -dist_listen false"
        )
        done = subprocess.run(
            [str(program), "--node", self.node, "--quiet", *arguments],
            env=environment,
            cwd=str(self.folder),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"rabbitmqctl {' '.join(arguments)}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def new_vhost(self) -> str:
        """Make a virtual host for the user guest; return its name."""
        name = f"test{next(self._vhosts)}"
        self.eval(f"ok = rabbit_vhost:add({_erlang(name)}, <<>>)")
        self.set_permissions("guest", name)
        return name

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with all that is in it; its connections are closed."""
        self.eval(f"ok = rabbit_vhost:delete({_erlang(name)}, <<>>)", RABBIT_TIMEOUT_S)

    def add_user(self, name: str, password: str) -> None:
        """Add a user without permissions."""
        self.eval(f"ok = rabbit_auth_backend_internal:add_user({_erlang(name, password)}, <<>>)")

    def set_permissions(
        self, user: str, vhost: str, configure: str = ".*", write: str = ".*", read: str = ".*"
    ) -> None:
        """Let a user do in a virtual host what these patterns allow; "^$" allows nothing."""
        parts = _erlang(user, vhost, configure, write, read)
        self.eval(f"ok = rabbit_auth_backend_internal:set_permissions({parts}, <<>>)")

    def queues(self, vhost: str = "/") -> Dict[str, Dict[str, Any]]:
        """Return the queues by name: ``messages``, ``messages_ready``, ``consumers``, ``arguments``...

        The numbers of a quorum queue may be those of some 200 ms ago.
        """
        items = "name, type, durable, auto_delete, exclusive, arguments, consumers"
        items += ", messages, messages_ready, messages_unacknowledged"
        found = self._rows(f"rabbit_amqqueue:info_all({_erlang(vhost)}, [{items}])")
        return {row["name"]: row for row in found}

    def delete_queue(self, name: str, vhost: str = "/") -> None:
        """Delete a queue, whoever consumes from it."""
        self.eval(
            f"Name = rabbit_misc:r({_erlang(vhost)}, queue, {_erlang(name)}),"
            " {ok, Queue} = rabbit_amqqueue:lookup(Name),"
            " {ok, _} = rabbit_amqqueue:delete(Queue, false, false, <<>>), ok"
        )

    def connections(self) -> List[Dict[str, Any]]:
        """Return the connections: ``vhost``, ``user``, ``channels``, ``state``, ``client_properties``..."""
        items = "name, user, vhost, state, channels, channel_max, frame_max, timeout, auth_mechanism, ssl"
        return self._rows(f"rabbit_networking:connection_info_all([{items}, client_properties])")

    def _rows(self, expression: str) -> List[Dict[str, Any]]:
        """Return lists of items as `dict`, names without their virtual host, tables without types."""
        found: List[Dict[str, Any]] = self.eval(
            "Plain = fun Plain({resource, _, _, Name}) -> Name;"
            " Plain([{_, _, _} | _] = Table) -> maps:from_list([{N, Plain(V)} || {N, _, V} <- Table]);"
            " Plain([]) -> #{}; Plain('') -> undefined; Plain(Value) -> Value end,"
            f" [maps:from_list([{{Key, Plain(Value)}} || {{Key, Value}} <- Row]) || Row <- {expression}]"
        )
        return found

    def close_connections(self, reason: str = "closed by the test") -> int:
        """Close all connections from the server's side, as an operator would; return how many."""
        found = self.eval(
            "Pids = rabbit_networking:connections(),"
            f" [rabbit_networking:close_connection(Pid, {json.dumps(reason)}) || Pid <- Pids], length(Pids)"
        )
        return int(found)

    def raise_memory_alarm(self) -> None:
        """Have it block all connections that publish, as when memory runs out."""
        self.eval("vm_memory_monitor:set_vm_memory_high_watermark(0.0000001)")
        wait_until(self.alarms, what=f"{self} has an alarm")

    def clear_memory_alarm(self) -> None:
        """Undo `raise_memory_alarm`."""
        self.eval(
            "{ok, Limit} = application:get_env(rabbit, vm_memory_high_watermark),"
            " vm_memory_monitor:set_vm_memory_high_watermark(Limit)"
        )
        wait_until(lambda: not self.alarms(), what=f"{self} has no alarm")

    def alarms(self) -> List[Any]:
        """Return the alarms that hold, empty if all is well."""
        return list(self.eval("rabbit_alarm:get_alarms()"))


def _erlang(*texts: str) -> str:
    """Return texts as Erlang binaries, with commas between them."""
    return ", ".join(f"<<{','.join(map(str, text.encode()))}>>" for text in texts)

# SPDX-License-Identifier: MIT
"""Records of beat on a Redis server: the broker's database, or the result backend's.

    _miniq.beat.entry.NAME   string  the record
    _miniq.beat.names        set     the names there are
    _miniq.beat.version      string  another one after each announced change

A swap is one script (`connections.redis_session`): its claim compares the record, and nothing at all
is done where it is another one.  On the broker's database the message is part of the same script.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence

from .beat_store import Publish, ScheduleStore, new_version
from .connections.claims import ClaimLost
from .connections.redis import Options
from .connections.redis_session import pipeline
from .text import mask_url
from .transports.redis_link import Link


class RedisStore(ScheduleStore):
    """Keys on a Redis server."""

    def __init__(self, app: Any, url: str) -> None:
        self._app = app
        self.atomic = url == app.broker_url(write=True)
        self.where = mask_url(url)
        self._own: Optional[Link] = None
        if not self.atomic:
            self._own = Link(url, Options.read(app.conf.options_for_redis(True), url), app.wall)

    @property
    def _link(self) -> Link:
        """The link over which this thread publishes, or one to the other server."""
        found: Link = self._own or self._app.producer.transport.link
        return found

    def _key(self, name: str) -> str:
        return f"{self._link.layout.prefix}_miniq.beat.{name}"

    def _call(self, *command: Any) -> Any:
        with self._link.using() as connection:
            return connection.call(*command)

    def load(self) -> Dict[str, str]:
        names = sorted(name.decode() for name in self._call("SMEMBERS", self._key("names")))
        texts: List[Any] = (
            self._call("MGET", *(self._key("entry." + name) for name in names)) if names else []
        )
        return {name: text.decode() for name, text in zip(names, texts) if text is not None}

    def read(self, name: str) -> Optional[str]:
        found = self._call("GET", self._key("entry." + name))
        return None if found is None else found.decode()

    def version(self) -> Optional[str]:
        found = self._call("GET", self._key("version"))
        return None if found is None else found.decode()

    def swap(
        self,
        name: str,
        old: Optional[str],
        new: Optional[str],
        publish: Publish = None,
        announce: bool = False,
    ) -> bool:
        key, names = self._key("entry." + name), self._key("names")
        commands: List[Sequence[Any]] = []
        if new is None:
            commands += [("DEL", key), ("SREM", names, name)]
        else:
            commands += [("SET", key, new), ("SADD", names, name)]
        if announce:
            commands.append(("SET", self._key("version"), new_version()))
        link = self._link
        if old is None:
            return self._create(link, key, commands)
        if self.read(name) != old:
            return False  # asked first, so that who comes too late need not make a message
        try:
            with link.transaction():
                link.add(("claim", key, old, name))
                for command in commands:
                    link.add(("do", *command))
                if publish is not None:
                    publish()
        except ClaimLost:
            return False
        return True

    @staticmethod
    def _create(link: Link, key: str, commands: List[Sequence[Any]]) -> bool:
        with link.using() as connection:
            create = ("SETNX", key, commands[0][2])
            # What follows is harmless where another one was first.
            replies = pipeline(connection, [("MULTI",), create, *commands[1:], ("EXEC",)])
        return bool(replies[-1][0])

    def close(self) -> None:
        if self._own is not None:
            self._own.close()

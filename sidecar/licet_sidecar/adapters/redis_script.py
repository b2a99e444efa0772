"""A Lua script as it is called: by its digest, and whole when the server does not know it (any more)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redis.exceptions import NoScriptError, RedisError

from licet.wire.registers import SERVER_RUN_LUA


class Script:
    """One script of this folder, with ``server_run`` before it."""

    def __init__(self, name: str) -> None:
        self._source = SERVER_RUN_LUA + Path(__file__).with_name(name).read_text()
        self._sha = hashlib.sha1(self._source.encode(), usedforsecurity=False).hexdigest()

    def calls(self, arguments: Sequence[Sequence[Any]], *, whole: bool = False) -> list[tuple[Any, ...]]:
        """A command for each call. ``arguments`` of each: number of keys, keys, arguments."""
        start = ("EVAL", self._source) if whole else ("EVALSHA", self._sha)
        return [(*start, *each) for each in arguments]

    @staticmethod
    def is_missing(replies: Sequence[Any]) -> bool:
        """Whether a call was not run, as the server was restarted or its scripts flushed, also between two calls.

        Then all are sent again, whole: every script of ours may be called again with the same arguments.
        """
        return any(
            isinstance(reply, NoScriptError) or (isinstance(reply, RedisError) and "NOSCRIPT" in str(reply))
            for reply in replies
        )

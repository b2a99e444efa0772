"""Which public keys the sidecar trusts: those in a file, read again each second, so that a key can be rotated.

Refuses what is no set of keys: the keys that it has go on, and the log says so once. A verifier is changed between two
checks of documents, never in one: one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from licet.wire.signing import Verifier
from licet_sidecar.logs import Logger

REREAD_S: Final = 1.0


class TrustedKeys:
    """``run`` is the task. ``read`` gives the keys as they are written down now, and raises when it cannot."""

    def __init__(self, verifier: Verifier, read: Callable[[], tuple[str, ...]]) -> None:
        self._verifier = verifier
        self._read = read
        self._logger = Logger("trust")
        self._trouble = ""
        self._known: tuple[str, ...] = ()

    async def run(self) -> None:
        """Follow the file for ever."""
        while True:
            await asyncio.sleep(REREAD_S)
            await self.follow()

    async def follow(self) -> None:
        """Take up what is written down now."""
        try:
            keys = await asyncio.to_thread(self._read)
            if keys != self._known:
                before = self._verifier.key_ids
                self._verifier.trust(list(keys))
                self._known = keys
                if self._verifier.key_ids != before:
                    self._logger.info("trusted keys changed", before=before, now=self._verifier.key_ids)
            self._trouble = ""
        except (OSError, ValueError) as error:
            if self._trouble != str(error):
                self._trouble = str(error)
                self._logger.error("the public keys cannot be read; those that are known go on", error=str(error))

"""Signs the heads of the ledger's chains at an interval: one task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from licet.wire.signing import Signer, Verifier
from licet_control_plane.redis_link import backoff_s
from licet_control_plane.store import checkpoints
from licet_control_plane.store.checkpoints import Checkpoint
from licet_control_plane.store.database import Database, DatabaseUnavailable

log: Final = structlog.get_logger(__name__)


class Checkpointer:
    """``run`` is the task; ``make`` does it now. ``number`` is that of the newest checkpoint, 0 before the first."""

    def __init__(self, database: Database, key: Signer, *, every_s: float, now_s: Callable[[], float]) -> None:
        self._database = database
        self._key = key
        self._every_s = every_s
        self._now_s = now_s
        self.number = 0

    async def run(self) -> None:
        """Make checkpoints until cancelled."""
        failures = 0
        while True:
            try:
                await self.make()
                failures = 0
            except DatabaseUnavailable as error:
                failures += 1
                if failures == 1:
                    log.warning("no checkpoint of the ledger can be made", reason=str(error))
                await asyncio.sleep(backoff_s(failures))
                continue
            await asyncio.sleep(self._every_s)

    async def make(self) -> Checkpoint | None:
        """The newest checkpoint, made now if anything was recorded since the last; ``None`` of an empty ledger.

        Raises:
            DatabaseUnavailable: the database failed.
        """
        signed_by = self._key.public_key
        document = await self._database.write(checkpoints.make, self._key, now_us=int(self._now_s() * 1_000_000))
        if document is None:
            return None
        made = Checkpoint.of(document, Verifier([signed_by]))
        self.number = made.number
        return made

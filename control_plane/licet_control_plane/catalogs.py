"""The catalog of the newest bundle, for whoever reads: also where another control plane publishes."""

from __future__ import annotations

from sqlalchemy import Connection

from licet.domain.catalog import Catalog
from licet_control_plane.store import bundles
from licet_control_plane.store.database import Database


class Catalogs:
    """Remembers the last one, which is decoded once a push. Owned by one event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._last: tuple[str, Catalog] = ("", Catalog())

    async def current(self) -> Catalog:
        """What was pushed last; empty before the first push.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        found = await self._database.read(_read, self._last[0])
        if found is not None:
            self._last = found
        return self._last[1]


def _read(connection: Connection, known: str) -> tuple[str, Catalog] | None:
    """The digest of the newest bundle and what it holds; ``None`` when there is none, or it is ``known``."""
    bundle = bundles.current(connection)
    if bundle is None or bundle.digest == known:
        return None
    return bundle.digest, bundles.catalog(connection, bundle)

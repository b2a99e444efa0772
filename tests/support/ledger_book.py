"""A ledger on its own, and what tests do with it: record, erase, export, drop, alter by SQL, verify."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection, text

from licet.wire.signing import SigningKey, Verifier
from licet.wire.usage import UsageBatch
from licet_control_plane.core.accounting import DecodedBatch
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store import checkpoints, exports, ledger, meta, retention
from licet_control_plane.store.checkpoints import Checkpoint
from licet_control_plane.store.database import Database
from licet_control_plane.store.exports import Export, Ranges
from licet_control_plane.store.partitions import Month
from licet_control_plane.store.subjects import SubjectKeys
from licet_control_plane.store.verification import Verification
from tests.support.ledger import verification_of

KEY: Final = SigningKey.generate()
VERIFIER: Final = Verifier([KEY.public_key])
LEDGER_KEY: Final = LedgerKey(bytes(range(32)))
LATER_US: Final = Month(2027, 6).start_us
"""When every month that tests record in is closed."""


class Book:
    """A ledger, and what tests do with it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.key = KEY
        self.database = Database(url)
        self.database.migrate()
        self.database.write_now(meta.ensure, deployment="d" * 32, now_us=1)
        self.keys = SubjectKeys(LEDGER_KEY)

    def record(self, *batches: UsageBatch, shard: int = 0) -> ledger.Recorded:
        decoded = [DecodedBatch.of(one.pack()) for one in batches]
        return self.database.write_now(ledger.record, shard, decoded, keys=self.keys, now_us=7)

    def export(self, month: Month) -> Export:
        """A month is exported, and the file has arrived."""

        def make(connection: Connection) -> Export:
            names = retention.log_ids(connection)
            rows = retention.page(connection, month, after=(0, 0), limit=100_000)
            ranges = Ranges()
            for row in rows:
                ranges.add(names[row.log], row.seq)
            about = meta.read(connection)
            made = Export.signed(
                self.key,
                deployment=about.deployment,
                generation=about.ledger_generation,
                month=month,
                events=len(rows),
                sha256="0" * 64,
                ranges=ranges,
                straddling=exports.straddling(connection, month),
            )
            retention.record_export(connection, made, by="test", now_us=LATER_US)
            return made

        return self.database.write_now(make)

    def drop(self, month: Month) -> int:
        """What was exported of a month leaves the ledger."""
        verifier = Verifier([self.key.public_key])
        parts = self.database.write_now(retention.begin, month, verifier, now_us=LATER_US)
        self.database.write_now(retention.drop_partition, month, now_us=LATER_US)
        self.database.write_now(retention.drop_part, month, parts, now_us=LATER_US)
        return self.database.write_now(retention.finish, month, by="test", now_us=LATER_US + 1)

    def checkpoint(self) -> Checkpoint:
        document = self.database.write_now(checkpoints.make, KEY, now_us=9)
        assert document is not None
        return Checkpoint.of(document, VERIFIER)

    def erase(self, id: str, *, type: str = "user", tenant: str = "acme") -> ledger.Erased:
        return self.database.write_now(ledger.erase, LEDGER_KEY, tenant, type, id, now_us=11)

    def sql(self, statement: str, **values: Any) -> int:
        def run(connection: Connection) -> int:
            return connection.execute(text(statement), values).rowcount

        return self.database.write_now(run)

    def rows(self, statement: str, **values: Any) -> list[Any]:
        return self.database.read_now(lambda connection: list(connection.execute(text(statement), values)))

    def verified(self, **changes: Any) -> Verification:
        arguments: dict[str, Any] = {"verifier": VERIFIER} | changes
        return verification_of(self.database, arguments.pop("key", LEDGER_KEY), **arguments)

    def about(self, id: str, *, type: str = "user", tenant: str = "acme") -> list[ledger.SubjectEvent]:
        found: list[ledger.SubjectEvent] = []
        after: ledger.Cursor | None = None
        while True:
            page, after = self.database.read_now(
                ledger.events_about, LEDGER_KEY, tenant, type, id, after=after, limit=3
            )
            found += page
            if after is None:
                return found

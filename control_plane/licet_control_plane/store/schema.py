"""The tables. ``migrations/`` creates them; a test holds the two together.

Times are microseconds since the Unix epoch unless a name says otherwise. Money is integer nanos of a currency unit.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

metadata: Final = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
_AutoId: Final = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers rows by itself only for INTEGER."""

META_ID: Final = 1

meta: Final = Table(
    "meta",
    metadata,
    Column("id", Integer, primary_key=True),  # always META_ID
    Column("deployment", String(64), nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("ledger_generation", BigInteger, nullable=False),
    Column("revision", BigInteger, nullable=False),  # the last one allocated
    Column("epoch", BigInteger, nullable=False),  # the last one allocated
    Column("redis_run", String(64), nullable=False),  # run id of the server whose marks were last checked
    Column("created_at", BigInteger, nullable=False),
)

publisher_lease: Final = Table(
    # Which control plane publishes; the others serve the API, drain, and wait for the lease to end.
    "publisher_lease",
    metadata,
    Column("id", Integer, primary_key=True),  # always META_ID
    Column("holder", String(64), nullable=False),
    Column("ends_at", BigInteger, nullable=False),  # the database's clock
)

api_keys: Final = Table(
    "api_keys",
    metadata,
    Column("id", _AutoId, primary_key=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("role", String(16), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),  # SHA-256, hex
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
)

revisions: Final = Table(
    # The outbox, and the record of everything that was ever published. Rows are never changed but for published_at.
    "revisions",
    metadata,
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("generation", BigInteger, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("key", String(128), nullable=False),
    Column("digest", String(64), nullable=False),  # of document
    Column("document", LargeBinary, nullable=False),  # signed; for a bundle, its manifest
    Column("at", BigInteger, nullable=False),
    Column("by", String(128), nullable=False),
    Column("message", Text, nullable=False),
    Column("published_at", BigInteger),
    Index(None, "kind", "key", "revision"),
    # The outbox is nearly always empty: a full index costs little and works on both databases.
    Index(None, "published_at"),
)

bundles: Final = Table(
    "bundles",
    metadata,
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", String(64), nullable=False),  # of the content: chunk digests and observe
    Column("observe", Boolean, nullable=False),
    Column("message", Text, nullable=False),
    Column("files", LargeBinary, nullable=False),  # msgpack, [[path, content], …], zlib: as pushed
    Column("documents", LargeBinary, nullable=False),  # msgpack, [[kind, name, digest], …]
    Column("chunks", LargeBinary, nullable=False),  # msgpack, [digest, …]
)

chunks: Final = Table(
    "chunks",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)

licenses: Final = Table(
    "licenses",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("plan", String(128), nullable=False, index=True),
    Column("status", String(16), nullable=False),
    Column("starts_s", BigInteger, nullable=False),
    Column("ends_s", BigInteger, nullable=False),
    Column("addons", Text, nullable=False),  # JSON
    Column("overrides", Text, nullable=False),  # JSON
    Column("grants", Text, nullable=False, server_default="[]"),  # JSON, as on the wire
    Column("revision", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
)

marks: Final = Table(
    # A row is written before the mark is made in Redis: with a row, a missing mark is a loss and never new.
    "marks",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("learning", Boolean, nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
)

sidecars: Final = Table(
    "sidecars",
    metadata,
    Column("sidecar", String(64), primary_key=True),
    Column("last_heard_at", BigInteger, nullable=False),  # this server's clock
    Column("gone", Boolean, nullable=False),  # deregistered itself
    Column("heartbeat", LargeBinary, nullable=False),
)

audit: Final = Table(
    "audit",
    metadata,
    Column("id", _AutoId, primary_key=True),
    Column("at", BigInteger, nullable=False, index=True),
    Column("by", String(128), nullable=False),
    Column("action", String(64), nullable=False),
    Column("target", String(256), nullable=False),
    Column("before", Text, nullable=False),  # JSON
    Column("after", Text, nullable=False),  # JSON
)

# --- the ledger -------------------------------------------------------------------------------------------------------

shards: Final = Table(
    # One row a usage shard: the row whose lock makes a ledger transaction the only one of its shard.
    "ledger_shards",
    metadata,
    Column("shard", Integer, primary_key=True, autoincrement=False),
    Column("batches", BigInteger, nullable=False),
    Column("events", BigInteger, nullable=False),
)

logs: Final = Table(
    # A sidecar's log, kept for ever: everything up to the watermark is in the ledger.
    "ledger_logs",
    metadata,
    Column("log", _AutoId, primary_key=True),
    Column("log_id", String(96), nullable=False, unique=True),
    Column("shard", Integer, nullable=False),
    Column("sidecar", String(64), nullable=False),
    Column("incarnation", BigInteger, nullable=False),
    Column("previous_incarnation", BigInteger, nullable=False),
    Column("previous_last_seq", BigInteger, nullable=False),
    Column("decision_prefix", LargeBinary, nullable=False),  # with the sequence number, a decision's id
    Column("watermark", BigInteger, nullable=False),
    Column("first_at", BigInteger, nullable=False),
    Column("last_at", BigInteger, nullable=False),
    Index(None, "sidecar", "incarnation"),
)

ranges: Final = Table(
    # What is recorded above a watermark, out of order: disjoint, not touching, bounded by what was sent.
    "ledger_ranges",
    metadata,
    Column("log", BigInteger, primary_key=True, autoincrement=False),
    Column("first_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("last_seq", BigInteger, nullable=False),
)

events: Final = Table(
    # On PostgreSQL, partitioned by month: ``partitions.py``. Watermarks and ranges see to it that (log, seq) is there
    # once: ``at`` is in the key only because a partitioned table must have it there.
    "ledger_events",
    metadata,
    Column("log", BigInteger, primary_key=True, autoincrement=False),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("at", BigInteger, primary_key=True, autoincrement=False),  # the sidecar's clock
    Column("tenant", String(128), nullable=False),
    Column("subject_type", Text, nullable=False),
    Column("subject_id", Text, nullable=False),
    Column("action", String(128), nullable=False),
    Column("effect", Integer, nullable=False),
    Column("reason", Integer, nullable=False),
    Column("rule", Text, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("units_total", BigInteger, nullable=False),
    Column("idempotency_key", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),  # the event as the sidecar packed it
    Index(None, "tenant", "at"),
    sqlite_with_rowid=False,  # kept in the order of the key
    postgresql_partition_by="RANGE (at)",
)

exports: Final = Table(
    # Months that were written to a file, and what was dropped since. A month is exported again when events came late.
    "ledger_exports",
    metadata,
    Column("id", _AutoId, primary_key=True),
    Column("month", String(7), nullable=False, index=True),  # such as 2026-05, UTC
    Column("events", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),  # of what the file holds, hex
    Column("ranges", LargeBinary, nullable=False),  # msgpack, [[log, first seq, last seq], …]: these events exactly
    Column("at", BigInteger, nullable=False),
    Column("by", String(128), nullable=False),
    Column("dropped", BigInteger, nullable=False),  # events of it that are gone
    Column("dropped_at", BigInteger),  # all of them are
)

dropped: Final = Table(
    # How many events of each log are no longer here. Watermarks go on covering them: they are never taken again.
    "ledger_dropped",
    metadata,
    Column("month", String(7), primary_key=True),
    Column("log", BigInteger, primary_key=True, autoincrement=False),
    Column("events", BigInteger, nullable=False),
)

conflicts: Final = Table(
    # Same log and sequence number, other content: kept aside, alerted, never ignored.
    "ledger_conflicts",
    metadata,
    Column("log", BigInteger, primary_key=True, autoincrement=False),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", String(64), primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),
)

rollups: Final = Table(
    # One row for each feature of an event; ``feature`` is "" for events without units. ``decisions`` counts an event
    # once, on its one feature or else on ""; ``events`` and ``units`` count it on each of its features, ``cost_nanos``
    # is divided among those that have a price.
    "ledger_rollups",
    metadata,
    Column("hour", BigInteger, primary_key=True, autoincrement=False),  # seconds since the Unix epoch
    Column("tenant", String(128), primary_key=True),
    Column("feature", String(128), primary_key=True),
    Column("action", String(128), primary_key=True),
    Column("effect", Integer, primary_key=True, autoincrement=False),
    Column("reason", Integer, primary_key=True, autoincrement=False),
    Column("currency", String(8), primary_key=True),
    Column("decisions", BigInteger, nullable=False),
    Column("events", BigInteger, nullable=False),
    Column("units", BigInteger, nullable=False),
    Column("cost_nanos", BigInteger, nullable=False),
    Index(None, "tenant", "hour"),
)

register_spend: Final = Table(
    # What the ledger knows each sidecar spent from each quota: fills registers that Redis lost.
    "register_spend",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("quota", String(384), primary_key=True),
    Column("sidecar", String(64), primary_key=True),
    Column("window_start", BigInteger, nullable=False),  # seconds since the Unix epoch
    Column("units", BigInteger, nullable=False),
)

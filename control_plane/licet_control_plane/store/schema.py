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
    false,
    text,
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
    Column("redaction_salt", LargeBinary, nullable=False),  # keys the hashes of attributes; published with bundles
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
    Column("key_id", String(16), nullable=False, unique=True),  # stands in the key's text, and in lists
    Column("name", String(128), nullable=False, unique=True),
    Column("role", String(16), nullable=False),
    Column("tenant", String(128), nullable=False),  # the only one it reaches; empty for all
    Column("hash", String(64), nullable=False, unique=True),  # SHA-256, hex
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", String(128), nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    Column("last_used_at", BigInteger),  # a minute old at most
)

signing_keys: Final = Table(
    # Keys that sign what is published. Of the valid ones the private half is here, under the ledger's key, so that
    # every control plane of the database signs with the same.
    "signing_keys",
    metadata,
    Column("key_id", String(16), primary_key=True),
    Column("public_key", String(64), nullable=False),
    Column("private", LargeBinary),  # wrapped; null once retired
    Column("state", String(16), nullable=False),  # next, active, previous, retired
    Column("created_at", BigInteger, nullable=False),
    Column("activated_at", BigInteger),
    Column("resigned_at", BigInteger),  # since when all that is published is signed with it
    Column("retired_at", BigInteger),
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
    Column("requests", Text, nullable=False, server_default="[]"),  # JSON, as on the wire
    Column("revision", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("grace_s", BigInteger, nullable=False, server_default="0"),
    Column("cancels", Boolean, nullable=False, server_default=false()),
    Column("renewal", Text, nullable=False, server_default=""),  # JSON, as on the wire; empty for none
    Column("planned_plan", String(128), nullable=False, server_default=""),
    Column("planned_s", BigInteger, nullable=False, server_default="0"),
    Column("expiring_for_s", BigInteger, nullable=False, server_default="0"),  # the end that was announced
    Column("expired_for_s", BigInteger, nullable=False, server_default="0"),  # the end that was said to have passed
    Column("due_s", BigInteger, index=True),  # when something is to be done with it by itself; null for nothing
)

idempotency_keys: Final = Table(
    # Requests that were sent with an Idempotency-Key, and their answers: see ``store/idempotency.py``.
    "idempotency_keys",
    metadata,
    Column("caller", String(64), primary_key=True),  # SHA-256 of the credential, hex
    Column("key", String(255), primary_key=True),
    Column("request", String(64), nullable=False),  # SHA-256 of method, address and body, hex
    Column("at", BigInteger, nullable=False, index=True),
    Column("committed", Boolean, nullable=False),  # its change is in the database
    Column("status", Integer),  # null until it was answered
    Column("headers", Text),  # JSON
    Column("body", LargeBinary),
)

webhooks: Final = Table(
    # Where events are sent. A secret is not stored: it follows from the ledger's key, ``id`` and ``nonce``.
    "webhooks",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("url", Text, nullable=False),
    Column("events", Text, nullable=False),  # JSON list of types
    Column("thresholds", Text, nullable=False),  # JSON list of percentages
    Column("tenant", String(128), nullable=False),  # empty for all
    Column("created_at", BigInteger, nullable=False),
    Column("created_by", String(128), nullable=False),
    Column("disabled_at", BigInteger),
    Column("disabled_why", Text, nullable=False),
    Column("failing_since", BigInteger),  # since when nothing was taken
    Column("busy_until", BigInteger, nullable=False),  # a control plane sends to it, or it is left in peace
    Column("shortest_window", String(8), nullable=False, server_default="hour"),  # whose thresholds it is told
    Column("dropped", BigInteger, nullable=False, server_default="0"),  # thresholds that found no room
    Column("nonce", String(32), nullable=False, server_default=""),  # of its secret; empty for one of an older version
    Column("old_nonce", String(32)),  # of the secret before; null when it is not used any more
    Column("old_until", BigInteger),  # when it ends to be
)

webhook_messages: Final = Table(
    # What happened, once for all webhooks: written in the transaction of the change.
    "webhook_messages",
    metadata,
    Column("number", _AutoId, primary_key=True),
    Column("id", String(32), nullable=False, unique=True),
    Column("at", BigInteger, nullable=False, index=True),
    Column("type", String(64), nullable=False),
    Column("tenant", String(128), nullable=False),
    Column("data", Text, nullable=False),  # JSON
)

webhook_deliveries: Final = Table(
    "webhook_deliveries",
    metadata,
    Column("webhook", String(32), primary_key=True),
    Column("message", BigInteger, primary_key=True, autoincrement=False),  # its number
    Column("next_at", BigInteger),  # null: delivered, or given up
    Column("attempts", Integer, nullable=False),
    Column("delivered_at", BigInteger),
    Column("status", Integer),  # of the last answer
    Column("error", Text, nullable=False),
    Index(None, "webhook", "next_at"),
    Index(None, "message"),
)

quota_notices: Final = Table(
    # Which thresholds of which window were announced.
    "quota_notices",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("quota", String(384), primary_key=True),
    Column("percent", Integer, primary_key=True, autoincrement=False),
    Column("ends_s", BigInteger, nullable=False, index=True),  # of the window
)

access_requests: Final = Table(
    # As asked (no state yet: ""), and from then on as core.access_requests has them.
    "access_requests",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("key", String(32), nullable=False),
    Column("tenant", String(128), nullable=False),
    Column("subject_type", Text, nullable=False),  # these four are blank once the subject was erased
    Column("subject_id", Text, nullable=False),
    Column("on_behalf_of", Text, nullable=False),
    Column("resource", Text, nullable=False),  # JSON, [type, id]
    Column("justification", Text, nullable=False),
    Column("action", String(128), nullable=False),
    Column("rule", Text, nullable=False),
    Column("units", Text, nullable=False),  # JSON, by feature
    Column("asked_at", BigInteger, nullable=False),
    Column("chain", String(128), nullable=False),
    Column("stages", Text, nullable=False),  # JSON, pinned when it was opened
    Column("stage", Integer, nullable=False),
    Column("votes", Text, nullable=False),  # JSON, who said yes in this stage
    Column("state", String(16), nullable=False),
    Column("changed_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("ends_at", BigInteger, nullable=False),
    Column("units_approved", BigInteger, nullable=False),
    Column("money_approved", Text, nullable=False),
    Column("decided_by", String(128), nullable=False),
    Column("reason", Text, nullable=False),
    Column("revision", BigInteger, nullable=False),  # the license's that told sidecars of it last; 0 for none
    Index(None, "state", "expires_at"),
    Index(None, "tenant", "asked_at"),
    Index(None, "asked_at"),
)

overrides: Final = Table(
    # Break glass. Those in force are published with the bundle.
    "overrides",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("action", String(128), nullable=False),
    Column("effect", String(8), nullable=False),
    Column("tenant", String(128), nullable=False),  # empty: all
    Column("subject", Text, nullable=False),  # empty: all
    Column("reason", Text, nullable=False),
    Column("by", String(128), nullable=False),
    Column("set_at", BigInteger, nullable=False),
    Column("ends_at", BigInteger, nullable=False, index=True),
    Column("cleared_at", BigInteger, nullable=False),  # 0: not before its end
    Column("cleared_by", String(128), nullable=False),
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
    Column("settled_seq", BigInteger, nullable=False),  # what its log had by settled_at is in the ledger
    Column("settled_at", BigInteger, nullable=False),
)

audit: Final = Table(
    # The audit trail: rows are never changed. See ``core/audit_chain.py``.
    "audit",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),  # from 1, without gaps
    Column("at", BigInteger, nullable=False, index=True),
    Column("by", String(128), nullable=False, index=True),
    Column("via", String(16), nullable=False),
    Column("credential", String(256), nullable=False),
    Column("address", String(64), nullable=False),
    Column("request", String(64), nullable=False),
    Column("action", String(64), nullable=False, index=True),
    Column("target", String(256), nullable=False),
    Column("tenant", String(128), nullable=False, index=True),
    Column("before", Text, nullable=False),  # JSON
    Column("after", Text, nullable=False),  # JSON
    Column("previous", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
)

audit_head: Final = Table(
    # The end of the trail: the row whose lock orders entries. Always there, and always the last lock that is taken.
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True),  # always META_ID
    Column("number", BigInteger, nullable=False),
    Column("hash", LargeBinary, nullable=False),
)

audit_checkpoints: Final = Table(
    # Heads of the trail, signed: what it is held to.
    "audit_checkpoints",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),  # of the entry
    Column("at", BigInteger, nullable=False),
    Column("document", LargeBinary, nullable=False),
)

# --- the ledger -------------------------------------------------------------------------------------------------------

shards: Final = Table(
    # One row a usage shard: the row whose lock makes a ledger transaction the only one of its shard.
    "ledger_shards",
    metadata,
    Column("shard", Integer, primary_key=True, autoincrement=False),
    Column("batches", BigInteger, nullable=False),
    Column("events", BigInteger, nullable=False),
    Column("blocks", BigInteger, nullable=False),  # number of the last block
    Column("head", LargeBinary, nullable=False),  # its hash
    Column("erasures", BigInteger, nullable=False),  # grows with each, in all rows: keys read before are void
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

gaps: Final = Table(
    # What a sidecar numbered and declared lost, and nobody has sent since. Its numbers count as recorded, so that the
    # watermark passes them; an event that comes after all is inserted and its number leaves the gap.
    "ledger_gaps",
    metadata,
    Column("log", BigInteger, primary_key=True, autoincrement=False),
    Column("first_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("last_seq", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
)

subjects: Final = Table(
    # Whose key events are sealed with. Nothing here says who it is: ``tag`` and ``key`` need the ledger's key, which is
    # not in the database; see ``core/subject_keys.py``. An erased subject keeps its number and nothing else.
    "ledger_subjects",
    metadata,
    Column("number", _AutoId, primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("type", Text, nullable=False),
    Column("tag", LargeBinary, unique=True),
    Column("principal", LargeBinary, index=True),  # second half of ``tag``; null when nobody's behalf
    Column("key", LargeBinary),
    Column("created_at", BigInteger, nullable=False),
    Column("erased_at", BigInteger),
)

events: Final = Table(
    # One row for each event. Columns up to ``units_total`` repeat what ``public`` says, to be asked about; see
    # ``core/sealed_events.py`` for the last three. Watermarks and ranges see to it that (log, seq) is there once:
    # ``at`` is in the key only because a partitioned table must have it there (on PostgreSQL, by month:
    # ``partitions.py``).
    "ledger_events",
    metadata,
    Column("log", BigInteger, primary_key=True, autoincrement=False),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("at", BigInteger, primary_key=True, autoincrement=False),  # the sidecar's clock
    Column("tenant", String(128), nullable=False),
    # No index: with many subjects each event would touch a page of its own. Erasing reads a tenant's events instead.
    Column("subject", BigInteger, nullable=False),
    Column("subject_type", Text, nullable=False),
    Column("action", String(128), nullable=False),
    Column("effect", Integer, nullable=False),
    Column("reason", Integer, nullable=False),
    Column("rule", Text, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("units_total", BigInteger, nullable=False),
    Column("public", LargeBinary, nullable=False),
    Column("commitment", LargeBinary, nullable=False),
    Column("personal", LargeBinary),  # null once the subject is erased
    Index(None, "tenant", "at"),
    sqlite_with_rowid=False,  # kept in the order of the key, in which verifying reads
    postgresql_partition_by="RANGE (at)",
)

blocks: Final = Table(
    # The chain of each shard: rows are never changed. See ``core/chain.py``.
    "ledger_blocks",
    metadata,
    Column("shard", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, primary_key=True, autoincrement=False),  # from 1, without gaps
    Column("generation", BigInteger, nullable=False),  # of the ledger
    Column("at", BigInteger, nullable=False),
    Column("events", BigInteger, nullable=False),
    Column("first_at", BigInteger, nullable=False),  # earliest and latest time of its events
    Column("last_at", BigInteger, nullable=False),
    Column("ranges", LargeBinary, nullable=False),  # msgpack, [[log id, first, last], …], in the order of the leaves
    Column("erased", LargeBinary, nullable=False),  # msgpack, numbers of subjects
    Column("logs", LargeBinary, nullable=False),  # msgpack, the logs that it is the first to name
    Column("lost", LargeBinary, nullable=False),  # msgpack, numbers that became declared lost
    Column("dropped", LargeBinary, nullable=False),  # msgpack, months that began to be dropped, or were gone
    Column("root", LargeBinary, nullable=False),
    Column("previous", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
)

checkpoints: Final = Table(
    # Heads of all chains, signed.
    "ledger_checkpoints",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("at", BigInteger, nullable=False),
    Column("document", LargeBinary, nullable=False),
)

exports: Final = Table(
    # Months that were written to a file, and what was dropped since. A month is exported again when events came late.
    "ledger_exports",
    metadata,
    Column("id", _AutoId, primary_key=True),
    Column("month", String(7), nullable=False, index=True),  # such as 2026-05, UTC
    Column("events", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),  # of what the file holds, hex
    Column("document", LargeBinary, nullable=False),  # signed: says the above, and which events exactly
    Column("at", BigInteger, nullable=False),
    Column("by", String(128), nullable=False),
    Column("begun_at", BigInteger),  # its events may be missing since: time of the block that says so
    Column("dropped", BigInteger, nullable=False),  # events of it that are gone
    Column("dropped_at", BigInteger),  # all of them are: time of the block that says so
)

remnants: Final = Table(
    # Of blocks that lost some of their events, and not all, to an export: see ``core/merkle.py``. With the leaves that
    # are here they give the root of the block, so that nobody needs to believe them.
    "ledger_remnants",
    metadata,
    Column("shard", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("nodes", LargeBinary, nullable=False),  # hashes of the subtrees that are gone, one after the other
)

conflicts: Final = Table(
    # Same log and sequence number, other content: kept aside, alerted, never ignored. Sealed as events are.
    "ledger_conflicts",
    metadata,
    Column("log", BigInteger, primary_key=True, autoincrement=False),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("digest", String(64), primary_key=True),  # keyed with the subject's key: it says nothing without it
    Column("at", BigInteger, nullable=False),
    Column("subject", BigInteger, nullable=False),
    Column("public", LargeBinary, nullable=False),
    Column("commitment", LargeBinary, nullable=False),
    Column("personal", LargeBinary),
)

dead_letters: Final = Table(
    # Batches that could not be recorded, as they came, until somebody decides: see ``store/dead_letters.py``.
    "ledger_dead_letters",
    metadata,
    Column("number", _AutoId, primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),  # SHA-256 of the body
    Column("shard", Integer, nullable=False),
    Column("entry", String(48), nullable=False),  # of the usage stream, when it came first
    Column("first_at", BigInteger, nullable=False),
    Column("last_at", BigInteger, nullable=False),
    Column("times", BigInteger, nullable=False),  # how often it came
    Column("reason", Text, nullable=False),
    Column("log_id", String(96), nullable=False),  # empty when it cannot be read
    Column("first_seq", BigInteger, nullable=False),
    Column("last_seq", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("body", LargeBinary),  # null once settled
    Column("outcome", String(16), nullable=False),  # "", then "recorded" or "dropped"
    Column("settled_at", BigInteger),
    Column("settled_by", String(128)),
)

sinks: Final = Table(
    # How far a sink of events is: everything before ``block`` was taken, and ``events`` of that block.
    "event_sinks",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("shard", Integer, primary_key=True, autoincrement=False),
    Column("block", BigInteger, nullable=False),
    Column("events", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
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
    Column("observed", BigInteger, nullable=False),  # of them; only observe mode let these through: not billed
)

# --- bill and insight -------------------------------------------------------------------------------------------------

# What these say follows from the events, as the hourly rollups do: they are added to in the ledger transaction. They
# are kept by tenant, so that one tenant's year lies together: without row ids SQLite keeps a table in that order.

rollup_days: Final = Table(
    # ``ledger_rollups`` by day (UTC): a year of one tenant is read from some thousand rows.
    "ledger_rollup_days",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("hour", BigInteger, primary_key=True, autoincrement=False),  # the first of the day, seconds since the epoch
    Column("feature", String(128), primary_key=True),
    Column("action", String(128), primary_key=True),
    Column("effect", Integer, primary_key=True, autoincrement=False),
    Column("reason", Integer, primary_key=True, autoincrement=False),
    Column("currency", String(8), primary_key=True),
    Column("decisions", BigInteger, nullable=False),
    Column("events", BigInteger, nullable=False),
    Column("units", BigInteger, nullable=False),
    Column("cost_nanos", BigInteger, nullable=False),
    Index(None, "hour"),
    sqlite_with_rowid=False,
)

exposures: Final = Table(
    # As ``ledger_rollups``, for events that were subject to feature flags: once for each of its flags.
    "ledger_exposures",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("hour", BigInteger, primary_key=True, autoincrement=False),  # seconds since the Unix epoch
    Column("flag", String(128), primary_key=True),
    Column("variant", String(128), primary_key=True),
    Column("feature", String(128), primary_key=True),
    Column("action", String(128), primary_key=True),
    Column("effect", Integer, primary_key=True, autoincrement=False),
    Column("reason", Integer, primary_key=True, autoincrement=False),
    Column("currency", String(8), primary_key=True),
    Column("decisions", BigInteger, nullable=False),
    Column("events", BigInteger, nullable=False),
    Column("units", BigInteger, nullable=False),
    Column("cost_nanos", BigInteger, nullable=False),
    Index(None, "hour"),
    sqlite_with_rowid=False,
)

billed: Final = Table(
    # Approved units by month and by all that their price follows from: the value that picked it, and the revision they
    # were decided under, which names the license and the plan. Invoices are computed from these.
    "ledger_billed",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("month", BigInteger, primary_key=True, autoincrement=False),  # its first second since the Unix epoch, UTC
    Column("feature", String(128), primary_key=True),
    Column("priced_as", Text, primary_key=True),  # empty: the price of every other value
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("events", BigInteger, nullable=False),
    Column("units", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

# Who was denied is counted from the events: by time, and only of those that were. Costs nothing for all others.
Index(
    "ix_ledger_events_denied", events.c.at, sqlite_where=text("effect = 2"), postgresql_where=text("effect = 2")
)  # 2: DENIED

# Overage is read by the windows of a month.
Index(None, register_spend.c.tenant, register_spend.c.window_start)

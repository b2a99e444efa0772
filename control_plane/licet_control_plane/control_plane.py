"""The parts of a running control plane, put together: what the API is given, and what the server starts and ends."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Self

import structlog

from licet.wire.names import USAGE_SHARDS, RedisNames
from licet.wire.signing import SigningKey
from licet_control_plane.access_desk import AccessDesk
from licet_control_plane.archive.follower import Archive
from licet_control_plane.audit_keeper import AUDIT_HEAD_FILE, AuditKeeper
from licet_control_plane.catalogs import Catalogs
from licet_control_plane.changes import Changes
from licet_control_plane.checkpointer import Checkpointer
from licet_control_plane.config import ServerConfig
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.drain.months import MonthKeeper
from licet_control_plane.drain.worker import DrainCounts, ShardWorker
from licet_control_plane.license_keeper import LicenseKeeper
from licet_control_plane.oidc import Issuer
from licet_control_plane.override_desk import OverrideDesk
from licet_control_plane.publisher.asks import AsksReader
from licet_control_plane.publisher.documents import RedisDocuments
from licet_control_plane.publisher.fleet import Fleet
from licet_control_plane.publisher.marks import RedisMarks
from licet_control_plane.publisher.publisher import Publisher
from licet_control_plane.publisher.quotas import Quotas
from licet_control_plane.publisher.reclaim import Reclaimer
from licet_control_plane.publisher.registers import RedisRegisters
from licet_control_plane.publisher.sweep import Sweeper
from licet_control_plane.quota_watcher import QuotaWatcher
from licet_control_plane.redis_link import Redis, connect, location
from licet_control_plane.signing_keys import Keep, Resigner, SigningKeys
from licet_control_plane.sink.sender import EventSender
from licet_control_plane.sink.webhook_sender import WebhookSender
from licet_control_plane.store.database import Database
from licet_control_plane.store.subjects import SubjectKeys
from licet_control_plane.telemetry import Metrics

log = structlog.get_logger(__name__)

CANCEL_S: Final = 1.0
"""Between attempts to end a task; one that is in a transaction ends after it."""


@dataclass(slots=True)
class ControlPlane:
    """One deployment's control plane. ``start`` begins its tasks, ``stop`` ends them."""

    config: ServerConfig
    deployment: str
    database: Database
    ledger_key: LedgerKey
    key: SigningKeys
    redis: Redis
    resigner: Resigner
    changes: Changes
    license_keeper: LicenseKeeper
    catalogs: Catalogs
    webhook_sender: WebhookSender
    webhook_wake: asyncio.Event
    quota_watcher: QuotaWatcher
    publisher: Publisher
    quotas: Quotas
    fleet: Fleet
    marks: RedisMarks
    registers: RedisRegisters
    reclaimer: Reclaimer
    sweeper: Sweeper
    asks: AsksReader
    access_desk: AccessDesk
    override_desk: OverrideDesk
    checkpointer: Checkpointer
    audit: AuditKeeper
    archive: Archive | None
    sender: EventSender | None
    drain: DrainCounts
    workers: list[ShardWorker]
    months: MonthKeeper
    metrics: Metrics
    issuer: Issuer | None
    now_s: Callable[[], float]
    denials_unrecorded: int = 0
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @classmethod
    def assemble(
        cls,
        config: ServerConfig,
        *,
        database: Database,
        key: SigningKey,
        ledger_key: LedgerKey,
        deployment: str,
        now_s: Callable[[], float],
        archive: Archive | None = None,
        keep_keys: Keep | None = None,
    ) -> Self:
        """Make the parts. Nothing is connected yet. What it is given it closes at the end.

        ``key`` is the first signing key of a new database; ``keep_keys`` is told when it is another one.

        Raises:
            StartError: the database has other keys.
        """
        keys = SigningKeys.open(database, ledger_key, key, may_replace=config.new_generation, keep=keep_keys)
        keys.keep()
        names = RedisNames(config.redis_prefix)
        redis = connect(config.redis_url)
        wake = asyncio.Event()
        fleet = Fleet(database)
        marks, registers = RedisMarks(redis, names), RedisRegisters(redis, names)
        quotas = Quotas(database, marks, registers, fleet, now_s=now_s)
        reclaimer = Reclaimer(database, marks, registers, fleet, after_s=config.reclaim_after_s)
        sweeper = Sweeper(database, registers)
        asks = AsksReader(redis, names, wake)
        # The same name after a restart, so that what this server had read is its own again at once.
        where = f"{socket.gethostname()}:{config.state_dir.resolve()}"
        name = hashlib.sha256(where.encode()).hexdigest()[:16]
        publisher = Publisher(
            database,
            RedisDocuments(redis, names),
            quotas,
            fleet,
            asks,
            reclaimer,
            sweeper,
            keys,
            location=location(config.redis_url),
            holder=name,
            new_generation=config.new_generation,
            wake=wake,
            now_s=now_s,
        )
        changes = Changes(database, keys, wake=wake, now_s=now_s, notice_s=config.expiring_notice_s)
        access_desk = AccessDesk(database, changes, wake=wake, now_s=now_s)
        counts = DrainCounts()
        # Shared: all of them write in the database's one writing thread.
        subject_keys = SubjectKeys(ledger_key)
        workers = [
            ShardWorker(
                shard,
                redis,
                names,
                database,
                keys,
                subject_keys,
                counts,
                archive=archive,
                consumer=name,
                now_s=now_s,
                on_asked=access_desk.asked.set,
            )
            for shard in range(USAGE_SHARDS)
        ]
        webhook_wake = asyncio.Event()
        catalogs = Catalogs(database)
        plane = cls(
            config=config,
            deployment=deployment,
            database=database,
            ledger_key=ledger_key,
            key=keys,
            resigner=Resigner(database, keys, redis, names, wake=wake, now_s=now_s),
            redis=redis,
            changes=changes,
            license_keeper=LicenseKeeper(database, changes, now_s=now_s),
            catalogs=catalogs,
            webhook_sender=WebhookSender(
                database,
                deployment=deployment,
                ledger_key=ledger_key,
                private=config.webhooks_private,
                now_s=now_s,
                wake=webhook_wake,
            ),
            webhook_wake=webhook_wake,
            quota_watcher=QuotaWatcher(database, catalogs, now_s=now_s),
            publisher=publisher,
            quotas=quotas,
            fleet=fleet,
            marks=marks,
            registers=registers,
            reclaimer=reclaimer,
            sweeper=sweeper,
            asks=asks,
            access_desk=access_desk,
            override_desk=OverrideDesk(database, changes, wake=wake, now_s=now_s),
            checkpointer=Checkpointer(database, keys, every_s=config.checkpoint_every_s, now_s=now_s),
            audit=AuditKeeper(
                database, keys, file=config.state_dir / AUDIT_HEAD_FILE, deployment=deployment, now_s=now_s
            ),
            archive=archive,
            sender=EventSender(
                database,
                url=config.events_url,
                secret=config.events_secret,
                deployment=deployment,
                ledger_key=ledger_key if config.events_personal else None,
                now_s=now_s,
            )
            if config.events_url
            else None,
            drain=counts,
            workers=workers,
            months=MonthKeeper(database, now_s=now_s),
            metrics=Metrics(),
            issuer=Issuer(config.oidc, clock_s=time.monotonic) if config.oidc else None,
            now_s=now_s,
        )
        plane._measure()
        return plane

    @property
    def public_key(self) -> str:
        """Of the key that signs now."""
        return self.key.public_key

    def now_us(self) -> int:
        """``now_s`` in whole microseconds, as the database keeps instants."""
        return int(self.now_s() * 1_000_000)

    def start(self) -> None:
        """Begin publishing, listening and draining."""
        self._tasks = [
            asyncio.create_task(_supervised("publisher", self.publisher.run)),
            asyncio.create_task(_supervised("asks", self.asks.run)),
            asyncio.create_task(_supervised("access requests", self.access_desk.run)),
            asyncio.create_task(_supervised("months", self.months.run)),
            asyncio.create_task(_supervised("licenses", self.license_keeper.run)),
            asyncio.create_task(_supervised("webhooks", self.webhook_sender.run)),
            asyncio.create_task(_supervised("quota thresholds", self.quota_watcher.run)),
            *(asyncio.create_task(_supervised("drain", worker.run)) for worker in self.workers),
            asyncio.create_task(_supervised("checkpoints", self.checkpointer.run)),
            asyncio.create_task(_supervised("audit", self.audit.run)),
            asyncio.create_task(_supervised("signing keys", self.resigner.run)),
            *self._sending(),
        ]

    def _sending(self) -> list[asyncio.Task[None]]:
        if self.sender is None:
            return []
        return [
            asyncio.create_task(_supervised("events", partial(self.sender.run, shard))) for shard in self.sender.shards
        ]

    async def stop(self) -> None:
        """End the tasks, then the connections. What was under way is done again by the next start."""
        pending = set(self._tasks)
        was_started = bool(pending)
        while pending:
            # Again and again: a library that swallows a cancellation must not keep the server from ending.
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=CANCEL_S)
        self._tasks = []
        if was_started:
            await self.publisher.give_back()
        await self.redis.aclose()
        if self.sender is not None:
            await self.sender.close()
        if self.issuer is not None:
            await self.issuer.close()
        if self.archive is not None:
            await asyncio.to_thread(self.archive.close)
        await asyncio.to_thread(self.database.close)
        self.metrics.close()

    def _measure(self) -> None:
        metrics, status, drain = self.metrics, self.publisher.status, self.drain
        metrics.gauge("licet_revision", "Last published revision.", lambda: status.revision)
        metrics.gauge("licet_outbox_revisions", "Revisions waiting to be published.", lambda: self.publisher.lag)
        metrics.gauge("licet_publisher_up", "1 while heads are published.", lambda: float(status.state == "publishing"))
        metrics.gauge("licet_redis_evicts", "1 when Redis evicts.", lambda: float(status.keeping.evicts))
        metrics.gauge(
            "licet_redis_append_only", "1 with an append-only file.", lambda: float(status.keeping.append_only)
        )
        metrics.counter("licet_heads", "Signed heads published.", lambda: status.heads)
        metrics.gauge("licet_epoch", "Newest epoch of quota registers.", lambda: self.quotas.epoch)
        metrics.gauge("licet_sidecars_live", "Sidecars heard of lately.", lambda: self.fleet.live_count(self.now_s()))
        metrics.gauge("licet_sidecars_dead", "Silent, not reclaimed.", lambda: self.fleet.dead_count(self.now_s()))
        metrics.counter("licet_registers_sealed", "Registers sealed.", lambda: self.reclaimer.registers_sealed)
        metrics.counter("licet_markers_swept", "Markers removed.", lambda: self.sweeper.markers_removed)
        metrics.gauge("licet_tenants_learning", "Tenants whose quotas learn.", lambda: len(self.quotas.learning))
        metrics.counter("licet_asks_dropped", "Asks of sidecars that found no room.", lambda: self.asks.dropped)
        desk = self.access_desk.counts
        metrics.counter("licet_access_requests_opened", "Access requests opened.", lambda: desk.opened)
        metrics.counter("licet_access_requests_expired", "Those that nobody decided.", lambda: desk.expired)
        metrics.counter("licet_access_requests_refused", "Those without room.", lambda: desk.refused)
        metrics.gauges(
            "licet_drain_backlog_batches",
            "shard",
            "Batches in the usage streams.",
            lambda: {str(shard): length for shard, length in sorted(drain.backlog.items())},
        )
        metrics.counter("licet_ledger_events", "Events committed.", lambda: drain.events)
        metrics.counter("licet_ledger_batches", "Batches committed.", lambda: drain.batches)
        metrics.counter("licet_ledger_duplicates", "Events that came again.", lambda: drain.duplicates)
        metrics.counter("licet_ledger_conflicts", "Events that came again otherwise.", lambda: drain.conflicts)
        metrics.gauge("licet_ledger_checkpoint", "Number of the newest checkpoint.", lambda: self.checkpointer.number)
        metrics.gauge("licet_audit_entries", "Signed entries of the audit trail.", lambda: self.audit.number)
        metrics.counter("licet_access_denied_unrecorded", "Not in the audit trail.", lambda: self.denials_unrecorded)
        metrics.counter("licet_ledger_lost", "Events declared lost.", lambda: drain.declared_lost)
        metrics.gauge(
            "licet_ledger_partitions_ready", "1 with partitions made ahead.", lambda: float(not self.months.trouble)
        )
        metrics.counter("licet_ledger_poison", "Batches set aside.", lambda: drain.poison)
        metrics.gauge("licet_dead_letters", "Batches set aside and not settled.", lambda: drain.dead_letters.letters)
        metrics.gauge("licet_dead_letters_held", "Batches that found no room.", lambda: sum(drain.held.values()))
        metrics.gauge("licet_ledger_conflicts_kept", "Conflicts in the ledger.", lambda: drain.conflicts_kept)
        metrics.counter("licet_license_renewals", "Terms renewed by themselves.", lambda: self.license_keeper.renewals)
        hooks = self.webhook_sender.counts
        metrics.counter("licet_webhook_deliveries", "Messages that webhooks took.", lambda: hooks.delivered)
        metrics.counter("licet_webhook_failures", "Times they did not.", lambda: hooks.failures)
        metrics.counter("licet_webhooks_disabled", "Webhooks given up.", lambda: hooks.disabled)
        metrics.counter("licet_webhook_dropped", "Thresholds without room.", lambda: self.quota_watcher.dropped)
        if self.sender is not None:
            sent = self.sender.counts
            metrics.counter("licet_events_sent", "Usage events that the receiver took.", lambda: sent.events)
            metrics.counter("licet_events_failures", "Times it did not.", lambda: sent.failures)
            metrics.gauge("licet_events_lag_blocks", "Blocks it has not.", lambda: sum(sent.lag_blocks.values()))
            metrics.gauge("licet_events_lag_seconds", "Age of the oldest of them.", self._events_lag_s)
        if self.archive is not None:
            archived = self.archive.counts
            metrics.counter("licet_archive_blocks", "Blocks archived.", lambda: archived.blocks)
            metrics.counter("licet_archive_events", "Events archived.", lambda: archived.events)
            metrics.counter("licet_archive_failures", "Times it could not be written.", lambda: archived.failures)
            metrics.gauge("licet_archive_bytes", "Size of its files.", lambda: archived.bytes)
            metrics.gauge("licet_archive_lag_blocks", "Blocks not archived yet.", lambda: sum(archived.lag.values()))

    def _events_lag_s(self) -> float:
        oldest = self.sender.counts.oldest_at.values() if self.sender else ()
        return max((self.now_s() - at / 1_000_000 for at in oldest), default=0.0)


async def _supervised(name: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a task that is meant to run for ever; when it breaks, say so and begin it again."""
    while True:
        try:
            await run()
            return
        except Exception:  # supervised: a defect in one task must not silence the others
            log.exception("a task broke and is started again", task=name)
            await asyncio.sleep(1.0)

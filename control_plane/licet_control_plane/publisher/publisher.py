"""The publisher: one loop that keeps Redis what the database says it is.

Each second it looks at the server; what it finds decides (``core.contents``):

===========  ===========================================================================================
INTACT       publish the outbox, answer asks, open what has been learned, vouch with a signed head
NEW_RUN      every mark is touched (learning), then as INTACT
INCOMPLETE   every document again, and an entry that makes the stream end at the last revision
LOST         a new epoch, every mark in learning under it, then as INCOMPLETE
NEWER        stop: the database is older than Redis, or than what a sidecar acted on; only an operator knows why
FOREIGN      stop: another deployment's data
===========  ===========================================================================================

The sentinel is written last, so that a publisher that dies in between starts over. Only published revisions are ever
written again, so that the stream never ends before a document it should have announced.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from licet.domain.catalog import Catalog
from licet.wire.documents import HEAD, HEAD_KEY, Head, Heartbeat
from licet.wire.registers import Pair
from licet.wire.signing import Signer, Statement
from licet_control_plane.core.contents import Contents, Expected, Found, Keeping, assess
from licet_control_plane.core.lost import head_version, newest_acted
from licet_control_plane.core.publishing import Restore, restoring
from licet_control_plane.publisher import generation
from licet_control_plane.publisher.asks import AsksReader
from licet_control_plane.publisher.documents import ChangeRefused, Look, RedisDocuments
from licet_control_plane.publisher.fleet import Fleet
from licet_control_plane.publisher.outbox import OutboxCopier, Overtaken
from licet_control_plane.publisher.quotas import SLICE, InForce, Quotas
from licet_control_plane.publisher.reclaim import Reclaimer
from licet_control_plane.publisher.sweep import Sweeper
from licet_control_plane.redis_link import RedisRefused, RedisUnavailable, backoff_s
from licet_control_plane.store import meta, publisher_lease, revisions
from licet_control_plane.store.database import Database, DatabaseUnavailable

log = structlog.get_logger(__name__)

HEAD_S: Final = 1.0
"""Between heads; a sidecar is stale after ``staleness_max`` without one."""
STANDBY_S: Final = 2.0
"""Between looks of a control plane that waits for another one to end."""
OPENING_S_MAX: Final = 0.25
"""Of each second, spent on opening marks, so that a push is not kept waiting: some 2,000 tenants."""
TIDYING_S_MAX: Final = 0.1
"""Of each second, spent on reclaiming and sweeping, neither of which anybody waits for."""


class PublishingStopped(Exception):
    """Going on would break a promise. ``fix`` says what an operator does about it."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


@dataclass(slots=True)
class PublisherStatus:
    """What ``/readyz``, ``/metrics`` and ``/v1/status`` show.

    ``state``: starting, publishing, standby (another control plane publishes), waiting or stopped.
    """

    state: str = "starting"
    reason: str = "Redis was not reached yet."
    fix: str = ""
    connected: bool = False
    run_id: str = ""
    revision: int = 0
    heads: int = 0
    heads_at_s: float = 0.0
    heartbeats_unreadable: int = 0
    keeping: Keeping = field(default_factory=Keeping)
    restored: dict[str, int] = field(default_factory=dict)
    """How often contents were put right, by verdict."""
    waited_for: list[str] = field(default_factory=list)


class Publisher:
    """``run`` is the task. ``wake`` makes it look at the outbox now."""

    def __init__(
        self,
        database: Database,
        documents: RedisDocuments,
        quotas: Quotas,
        fleet: Fleet,
        asks: AsksReader,
        reclaimer: Reclaimer,
        sweeper: Sweeper,
        key: Signer,
        *,
        location: str,
        holder: str,
        new_generation: bool,
        wake: asyncio.Event,
        now_s: Callable[[], float],
    ) -> None:
        self._database = database
        self._documents = documents
        self._quotas = quotas
        self._fleet = fleet
        self._asks = asks
        self._reclaimer = reclaimer
        self._sweeper = sweeper
        self._key = key
        self._location = location
        self._holder = holder
        self._renewed_s = -math.inf
        self._loaded = False
        self._new_generation = new_generation
        self._wake = wake
        self._now_s = now_s
        self.status = PublisherStatus()
        self._copier = OutboxCopier(database, documents, quotas)
        self._meta = meta.Meta("", 0, 0, 0, 0, "", b"")
        self._ahead: Heartbeat | None = None  # of who acted on most, as of the last look
        self._published = 0  # by whomever, as of the last look
        self._looked_s = -math.inf  # the loop's clock, which nobody sets
        self._read_us = 0  # when the outbox was last found empty

    @property
    def catalog(self) -> Catalog:
        """Of the last published bundle."""
        return self._copier.catalog

    @property
    def lag(self) -> int:
        """Revisions that are made and not published, as of the last step."""
        return max(0, self._meta.revision - self._copier.revision)

    async def run(self) -> None:
        """Publish until cancelled, through everything that passes by itself; end when it must stop."""
        failures = 0
        while True:
            try:
                if not await self._leads():
                    await self._stand_by()
                    continue
                if not self._loaded:
                    await self._load()
                    self._loaded = True
                await self._step()
                failures = 0
                await self._wait(HEAD_S - (_clock_s() - self._looked_s))
                continue
            except (RedisUnavailable, RedisRefused, DatabaseUnavailable) as error:
                failures += 1
                self._waits(error)
            except Overtaken:
                log.warning("another control plane took over while this one was paused")
                self._loaded, self._renewed_s = False, -math.inf
            except (PublishingStopped, ChangeRefused) as error:
                self._stops(error)
                return
            self._looked_s = -math.inf  # look before anything else: the server may be another
            await asyncio.sleep(backoff_s(failures))

    async def give_back(self) -> None:
        """Let another control plane publish at once; call it when ``run`` has ended."""
        with contextlib.suppress(DatabaseUnavailable):
            await self._database.write(publisher_lease.give_back, self._holder)

    async def _leads(self) -> bool:
        """Whether this is the one that publishes; renews the lease long before it ends."""
        asked_s = _clock_s()
        if asked_s - self._renewed_s < publisher_lease.LEASE_S / 3:
            return True
        if asked_s - self._renewed_s >= publisher_lease.LEASE_S:
            self._loaded = False  # somebody else may have led meanwhile
        now_us = int(self._now_s() * 1_000_000)
        if await self._database.write(publisher_lease.take, self._holder, now_us=now_us) != self._holder:
            return False
        self._renewed_s = asked_s
        self._asks.wanted.set()
        return True

    async def _stand_by(self) -> None:
        """Know what the other one knows, for whoever asks this one."""
        self._asks.wanted.clear()
        self._loaded = False
        self._renewed_s = self._looked_s = -math.inf
        await self._load()
        if self.status.state != "standby":
            log.info("another control plane publishes; this one stands by")
        self.status.state, self.status.reason, self.status.fix = "standby", "Another control plane publishes.", ""
        self.status.revision, self.status.connected = self._copier.revision, True
        await asyncio.sleep(STANDBY_S)

    async def _load(self) -> None:
        await self._fleet.load()
        await self._quotas.load()
        await self._copier.load()
        self._meta = await self._database.read(meta.read)

    async def _step(self) -> None:
        self._meta = await self._database.read(meta.read)
        look: Look | None = None
        if _clock_s() - self._looked_s >= HEAD_S:
            look = await self._look()
        self._wake.clear()
        await self._copy_outbox()
        if asks := self._asks.take(SLICE):
            await self._quotas.answer(asks, self._in_force())
        if self._asks.waiting:
            self._wake.set()
        if look is not None:
            await self._open_learned()
            await self._vouch(look.found)
            await self._tidy()

    async def _find(self) -> Look:
        look = await self._documents.look(self._copier.chunks)
        # After Redis: a change that was committed meanwhile may be acted on already, by who asked the control plane.
        self._meta = await self._database.read(meta.read)
        deployment, current = self._meta.deployment, self._meta.generation
        self._ahead = newest_acted(look.heartbeats.values(), deployment=deployment, generation=current)
        head = head_version(look.head, deployment=deployment, generation=current)
        self._published = self._copier.revision
        if head > (current, self._published):  # which another control plane published, or a database that is lost
            self._published = await self._database.read(revisions.last_published)
        found = replace(
            look.found,
            head=head,
            acted=self._ahead.acted if self._ahead is not None else (0, 0),
            has_manifest=await self._copier.is_own(look.manifest),
            last_is_own=await self._copier.is_own_change(
                self._meta.generation, look.found.last_revision, look.last_digest
            ),
        )
        return replace(look, found=found)

    async def _look(self) -> Look:
        """Look at the server and put right what is wrong; returns what was found when nothing was."""
        look = await self._find()
        self.status.connected = True
        if self._new_generation:
            await self._start_generation(look.found)
        verdict = assess(look.found, self._expected())
        if verdict in (Contents.LOST, Contents.INCOMPLETE, Contents.NEW_RUN):
            await self._restore(look, verdict)
            look = await self._find()
            verdict = assess(look.found, self._expected())
        if verdict is Contents.FOREIGN:
            raise PublishingStopped(
                f"Redis at {self._location} holds data of deployment {look.found.deployment}, and this database is"
                f" deployment {self._meta.deployment}.",
                "Give this server the state directory that belongs to that Redis, or another LICET_REDIS_PREFIX, or an"
                " empty Redis.",
            )
        if verdict is Contents.NEWER:
            raise self._behind(look.found)
        if verdict is not Contents.INTACT:
            raise RedisUnavailable(f"the contents of Redis changed while they were checked: {verdict.value}")
        self._looked_s = _clock_s()
        self.status.run_id = look.found.run_id
        self.status.heartbeats_unreadable = look.unreadable
        if look.keeping != self.status.keeping and look.keeping.warning:
            log.warning("Redis may lose what it is told", redis=self._location, what=look.keeping.warning)
        self.status.keeping = look.keeping
        if look.found.epoch != self._quotas.epoch:
            await self._documents.set_sentinel(self._meta.deployment, self._quotas.epoch, only_present=True)
        pair = Pair(self._quotas.epoch, look.found.run_id)
        await self._documents.forget_sidecars(await self._fleet.update(look.heartbeats, pair, self._now_s()))
        return look

    def _behind(self, found: Found) -> PublishingStopped:
        fix = (
            "Use the newest database; or, if this one is the newest there is, start the server once with"
            " --new-generation: what was published after the backup is withdrawn."
        )
        known = self._meta
        if self._ahead is not None and found.acted > (known.generation, known.revision):
            return PublishingStopped(
                f"Sidecar {self._ahead.sidecar!r:.60} ({self._ahead.address!r:.60}) acted on revision {found.acted[1]}"
                f" of generation {found.acted[0]}; the database knows revision {known.revision} of generation"
                f" {known.generation}. It was probably restored from a backup.",
                f"{fix} If none was restored, somebody writes to Redis who should not: heartbeats are not signed.",
            )
        there = max(found.last_revision, found.head[1])
        return PublishingStopped(
            f"Redis at {self._location} is at revision {there}, epoch {found.epoch}; the database knows revision"
            f" {known.revision}, epoch {self._quotas.epoch}. It was probably restored from a backup.",
            fix,
        )

    async def _start_generation(self, found: Found) -> None:
        if found.has_sentinel and found.deployment != self._meta.deployment:
            return  # another deployment's: not to be overruled by a flag
        tenants = await self._documents.licensed_tenants()
        self._meta = await self._database.write(
            generation.start, found, tenants, sign=self._key.sign, now_us=int(self._now_s() * 1_000_000)
        )
        self._new_generation = False
        await self._quotas.load()
        await self._copier.load()
        log.warning("new generation", generation=self._meta.generation, revision=self._meta.revision)

    async def _restore(self, look: Look, verdict: Contents) -> None:
        found = look.found
        if self._quotas.epoch:
            log.warning("restoring the contents of Redis", verdict=verdict.value, run_id=found.run_id)
        self.status.restored[verdict.name.lower()] = self.status.restored.get(verdict.name.lower(), 0) + 1
        for step in restoring(verdict, new_run=found.run_id != self._meta.redis_run):
            match step:
                case Restore.MARKS_BEGUN:
                    self._fleet.contents_were_lost(self._now_s(), fresh=self._quotas.epoch == 0)
                    await self._quotas.begin_all(found_epoch=found.epoch)
                case Restore.MARKS_TOUCHED:
                    await self._quotas.touch_all()
                case Restore.DOCUMENTS:
                    if look.manifest is not None and not found.has_manifest:
                        await self._documents.remove_manifest()
                    if verdict is Contents.LOST:
                        await self._documents.remove_newer_licenses((self._meta.generation, self._copier.revision))
                    await self._copier.republish(self._meta.deployment)
                case Restore.STREAM_END:
                    if self._copier.revision > found.last_revision:
                        digest = await self._database.read(revisions.digest, self._copier.revision)
                        await self._documents.announce_resync(self._copier.revision, revisions.RESYNC, digest or "")
                case Restore.SENTINEL:
                    await self._documents.set_sentinel(self._meta.deployment, self._quotas.epoch)
                case Restore.RUN_NOTED:
                    await self._database.write(publisher_lease.note_run, self._holder, found.run_id)
        self._meta = await self._database.read(meta.read)

    async def _copy_outbox(self) -> None:
        copied = -1
        while copied != self._copier.revision:
            # Until nothing more is found: what a head says holds for the moment before that last look.
            copied = self._copier.revision
            self._read_us = now_us = int(self._now_s() * 1_000_000)
            while lost := await self._copier.copy(
                self._meta.deployment, holder=self._holder, epoch=self._quotas.epoch, now_us=now_us
            ):
                # A mark is missing. Was it the only thing? If all is lost, that is for the look to find and restore.
                self._looked_s = -math.inf
                await self._look()
                await self._quotas.begin_lost([tenant for tenant in lost if tenant not in self._quotas.learning])
        self.status.revision = self._copier.revision

    async def _open_learned(self) -> None:
        until_s = _clock_s() + OPENING_S_MAX
        while self._quotas.learning:
            opened, self.status.waited_for = await self._quotas.open_learned(self._in_force())
            if not opened or _clock_s() >= until_s:
                return
        self.status.waited_for = []

    async def _tidy(self) -> None:
        """Some of what can wait. A push that comes meanwhile is made to wait for one step at most."""
        until_s = _clock_s() + TIDYING_S_MAX
        catalog = self._copier.catalog
        for step in (self._reclaimer.step, self._sweeper.step):
            while await step(catalog, self._now_s()):
                if _clock_s() >= until_s or self._wake.is_set():
                    return

    async def _vouch(self, found: Found) -> None:
        head = Head(
            at_us=self._read_us,
            run_id=found.run_id,
            epoch=self._quotas.epoch,
            live=max(1, self._fleet.live_count(self._now_s())),
            ledger_generation=self._meta.ledger_generation,
            bundle=self._copier.bundle_revision,
        )
        statement = Statement(
            self._meta.deployment, HEAD, HEAD_KEY, self._meta.generation, self._copier.revision, head.to_payload()
        )
        await self._documents.set_sentinel(self._meta.deployment, self._quotas.epoch, only_present=True)
        checked = (self._meta.deployment, self._quotas.epoch, found.run_id, self._copier.revision)
        if not await self._documents.set_head(*checked, self._key.sign(statement)):
            self._looked_s = -math.inf
            return
        if self.status.state != "publishing":
            log.info("publishing", redis=self._location, revision=self._copier.revision, epoch=self._quotas.epoch)
        self.status.state, self.status.reason, self.status.fix = "publishing", "", ""
        self.status.heads += 1
        self.status.heads_at_s = self._now_s()

    def _expected(self) -> Expected:
        return Expected(
            deployment=self._meta.deployment,
            generation=self._meta.generation,
            epoch=self._quotas.epoch,
            revision=self._copier.revision,
            revision_published=max(self._published, self._copier.revision),
            revision_allocated=max(self._meta.revision, self._copier.revision),
            has_manifest=self._copier.has_manifest,
            run_id=self._meta.redis_run,
        )

    def _in_force(self) -> InForce:
        return InForce(self._copier.catalog, self._copier.revision)

    async def _wait(self, timeout_s: float) -> None:
        try:
            # Not wait_for: before Python 3.12 it can swallow a cancellation that comes as the event is set.
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _waits(self, error: RedisUnavailable | RedisRefused | DatabaseUnavailable) -> None:
        about_redis = not isinstance(error, DatabaseUnavailable)
        if about_redis:
            self.status.connected = False
        reason = f"Redis at {self._location}: {error}" if about_redis else f"{error}"
        fix = "" if isinstance(error, DatabaseUnavailable) else error.fix
        if (self.status.state, self.status.reason) != ("waiting", reason):
            report = log.warning if isinstance(error, RedisUnavailable) else log.error
            report("publishing waits", reason=reason, fix=fix)
        self.status.state, self.status.reason, self.status.fix = "waiting", reason, fix

    def _stops(self, error: PublishingStopped | ChangeRefused) -> None:
        fix = (
            error.fix
            if isinstance(error, PublishingStopped)
            else "Two servers may publish to the same Redis prefix: stop one. Then restart this server; if it stops"
            " again, start it once with --new-generation."
        )
        log.critical("publishing stopped", reason=str(error), fix=fix)
        self.status.state, self.status.reason, self.status.fix = "stopped", str(error), fix


def _clock_s() -> float:
    return asyncio.get_running_loop().time()

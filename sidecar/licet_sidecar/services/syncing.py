"""Keeps the engine's state in step with what is published: the change stream, resyncs, loads on demand, the disk.

Concurrency: one event loop. ``run`` is the only writer of the bundle and of the revision; loads run beside it and
install only licenses that are not newer than the revision in force. Between the reads and the installation of a
change nothing awaits, so that no check sees half of it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from licet.domain.catalog import Catalog, license_from_wire
from licet.wire import documents, envelope
from licet.wire.documents import Head, Manifest, Snapshot
from licet.wire.registers import Pair
from licet.wire.signing import Statement, VerificationError, Verifier
from licet_sidecar.adapters.state_directory import StateDirectory, StateDirectoryError
from licet_sidecar.adapters.usage_log import UsageLog, UsageLogError, floor_record
from licet_sidecar.clock import Clock
from licet_sidecar.core.engine import Engine, Tenant
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.core.rulebook import Rulebook
from licet_sidecar.core.sync import Changes, HeadVerdict, SyncState
from licet_sidecar.logs import Logger
from licet_sidecar.ports import Change, LinkDown, LinkRefused, PulseReport, SecondRoute, StateSource
from licet_sidecar.services.link import LinkState
from licet_sidecar.services.slices import in_slices
from licet_sidecar.services.tally import Tally
from licet_sidecar.services.unpacking import Unpacking

BLOCK_MS: Final = 5_000
RETRY_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0)
RESYNC_JITTER_S: Final = 0.2
"""Resyncs of many sidecars at once are spread over this long."""
CATCH_UP_READS_MAX: Final = 50
SNAPSHOT_FILE: Final = "snapshot"
HEAD_FILE: Final = "head"
HEAD_EVERY_MS: Final = 30_000
"""How often the newest head is written to disk while nothing changes: a restart without Redis is then no staler than
this, at the price of one small file."""
_SNAPSHOT_KIND: Final = "snapshot"


class Inconsistent(Exception):
    """What was read does not fit together (lost, altered, or being changed): read everything again."""


@dataclass(slots=True)
class _Bundle:
    statement: Statement
    document: bytes
    chunks: dict[str, bytes]
    rulebook: Rulebook


class SyncService:
    """Applies published state. Ready once a first state is in force that is not older than one acted on before."""

    def __init__(
        self,
        engine: Engine,
        source: StateSource,
        verifier: Verifier,
        directory: StateDirectory,
        log: UsageLog,
        clock: Clock,
        link: LinkState,
        tally: Tally,
        *,
        on_head: Callable[[Head], None],
        second: SecondRoute | None = None,
    ) -> None:
        self._second = second
        self._engine = engine
        self._source = source
        self._verifier = verifier
        self._directory = directory
        self._log = log
        self._clock = clock
        self._link = link
        self._tally = tally
        self._on_head = on_head
        self._logger = Logger("sync")
        self.state = SyncState()
        self.ready = asyncio.Event()
        self.problem = "nothing has been synced yet"
        self._bundle: _Bundle | None = None
        self._head_document: bytes | None = None
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._dirty: set[str] = set()
        self._unpacking = Unpacking()
        self._advanced = asyncio.Condition()
        self._resync_wanted = asyncio.Event()
        self._resync_wanted.set()
        self._snapshot_due = False
        self._head_written: bytes | None = None
        self._head_written_ms = 0

    # For checks

    async def load(self, tenant: str, timeout_s: float) -> None:
        """Loads a tenant's license, once however many wait for it.

        Raises:
            LinkDown: it could not be read, or what was read cannot be trusted now.
            TimeoutError: not in time; the load goes on.
        """
        if not self._link.up and self._second is None:
            raise LinkDown(self._link.trouble)
        task = self._loads.get(tenant)
        if task is None:
            loading = self._load(tenant) if self._link.up else self._take_second_route([tenant])
            task = asyncio.get_running_loop().create_task(loading, name=f"load {tenant}")
            self._loads[tenant] = task
            task.add_done_callback(lambda done: self._loaded(tenant, done))
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(task)
        except (LinkRefused, Inconsistent, ValueError, KeyError, TypeError) as error:
            raise LinkDown(str(error)) from error

    # For upkeep

    async def follow_second_route(self) -> None:
        """Takes what the control plane itself says is published. For as long as Redis cannot be reached.

        Raises:
            LinkDown, LinkRefused: it does not answer, or what it says cannot be taken.
        """
        try:
            await self._take_second_route([])
        except (Inconsistent, ValueError, KeyError, TypeError) as error:
            self._reject(error)
            raise LinkDown(str(error)) from error

    def take_head(self, report: PulseReport) -> None:
        """Judges the head a pulse brought."""
        if report.head is None:
            return
        try:
            statement = self._verifier.verify(report.head, kind=documents.HEAD, key=documents.HEAD_KEY)
            head = Head.from_payload(statement.payload)
        except (VerificationError, KeyError, TypeError) as error:
            self._reject(error)
            return
        verdict = self.state.head_read(statement, head, report.run_id)
        if verdict is HeadVerdict.IGNORED:
            self._tally.heads_ignored += 1
            return
        if verdict is HeadVerdict.LATE:
            return
        self._on_head(head)
        if verdict is HeadVerdict.CURRENT:
            self._engine.as_of_us = max(self._engine.as_of_us, head.at_us)
            self._head_document = report.head
        elif verdict is HeadVerdict.RESYNC:
            self._resync_wanted.set()

    async def save_snapshot(self, *, last: bool = False) -> None:
        """Writes the last good state to disk when it changed; else, now and then or at the ``last``, its age."""
        bundle = self._bundle
        if bundle is None:
            return
        if not self._snapshot_due:
            due = last or self._clock.boot_ms() - self._head_written_ms >= HEAD_EVERY_MS
            if due and self._head_document is not None and self._head_document is not self._head_written:
                await self._write(HEAD_FILE, self._head_document)
            return
        self._snapshot_due = False
        head = self._head_document or b""
        data = envelope.pack(
            _SNAPSHOT_KIND,
            {
                "head": head,
                "manifest": bundle.document,
                "chunks": bundle.chunks,
                "generation": self.state.generation,
                "revision": self.state.revision,
                "licenses": [tenant.document for tenant in self._engine.tenants.values()],
            },
        )
        if not await self._write(SNAPSHOT_FILE, data):
            self._snapshot_due = True

    async def _write(self, name: str, data: bytes) -> bool:
        self._head_written, self._head_written_ms = self._head_document, self._clock.boot_ms()
        try:
            await asyncio.to_thread(self._directory.write_atomically, name, data)
        except StateDirectoryError as error:
            self._logger.error(
                "the snapshot cannot be written; a restart without Redis would know less", error=str(error)
            )
            return False
        return True

    def restore(self, floor: tuple[int, int]) -> None:
        """Starts from the snapshot on disk, when it is not older than what was acted on before (``floor``)."""
        self.state.floor = floor
        data = self._directory.read(SNAPSHOT_FILE)
        if data is None:
            return
        try:
            body = envelope.unpack(_SNAPSHOT_KIND, data)
            version = (int(body["generation"]), int(body["revision"]))
            if version < floor:
                self._logger.warning(
                    "the snapshot on disk is older than what was acted on; waiting for Redis",
                    snapshot=version[1],
                    acted_on=floor[1],
                )
                return
            bundle = self._verified_bundle(body["manifest"], body["chunks"])
            licenses = []
            for document in body["licenses"]:
                tenant = self._verified_license(document, key=None)
                if (tenant.generation, tenant.revision) <= version:
                    licenses.append(tenant)
            self._install(bundle, licenses, *version)
        except (Inconsistent, ValueError, KeyError, TypeError) as error:
            self._reject(error)
            return
        for head_document in (body.get("head"), self._directory.read(HEAD_FILE)):
            self._restore_age(head_document, version)

    def _restore_age(self, head_document: bytes | None, version: tuple[int, int]) -> None:
        """Takes up a head from disk, when it speaks of ``version`` or of one that is in it."""
        if not head_document:
            return
        try:
            statement = self._verifier.verify(head_document, kind=documents.HEAD, key=documents.HEAD_KEY)
            head = Head.from_payload(statement.payload)
        except (ValueError, KeyError, TypeError) as error:
            self._reject(error)
            return
        # A later one says only that there was something newer, which is not on disk.
        if statement.version <= version and head.at_us > self._engine.as_of_us:
            self._engine.as_of_us = head.at_us
            self._engine.leases.live = head.live
            self._head_document = head_document

    async def run(self) -> None:
        """Follows the published state for ever."""
        failures = 0
        while True:
            try:
                if self._resync_wanted.is_set():
                    if self.ready.is_set():
                        await asyncio.sleep(random.uniform(0, RESYNC_JITTER_S))
                    await self._resync()
                    self._resync_wanted.clear()
                changes = await self._next_changes()
                if changes and not await self._apply(changes):
                    self._resync_wanted.set()
                failures = 0
            except (LinkDown, LinkRefused) as error:
                if self._link.failed(error, refused=isinstance(error, LinkRefused)):
                    level = self._logger.error if isinstance(error, LinkRefused) else self._logger.warning
                    level("Redis does not answer", error=str(error))
                if not self.ready.is_set():
                    self.problem = str(error)
                failures = await self._back_off(failures)
            except (Inconsistent, ValueError, KeyError, TypeError) as error:
                self._reject(error)
                self._resync_wanted.set()
                failures = await self._back_off(failures)

    # Inside

    async def _back_off(self, failures: int) -> int:
        delay_s = RETRY_S[min(failures, len(RETRY_S) - 1)]
        await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
        return failures + 1

    async def _next_changes(self) -> list[Change]:
        """What follows in the stream; nothing when everything is to be read again first."""
        reading = asyncio.ensure_future(self._source.read_changes(self.state.revision, BLOCK_MS))
        waking = asyncio.ensure_future(self._resync_wanted.wait())
        try:
            await asyncio.wait((reading, waking), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return []
            changes = reading.result()
            self._link.succeeded()
            return changes
        finally:
            waking.cancel()
            reading.cancel()
            await asyncio.gather(waking, reading, return_exceptions=True)

    async def _resync(self) -> None:
        """Reads everything again: the head says which revision is complete, the stream what came since."""
        self._tally.resyncs += 1
        head_document, run_id = await self._source.read_head()
        self._link.succeeded()
        if head_document is None:
            raise Inconsistent("the control plane has published nothing here yet (no head)")
        statement = self._verifier.verify(head_document, kind=documents.HEAD, key=documents.HEAD_KEY)
        head = Head.from_payload(statement.payload)
        if head.run_id != run_id:
            raise Inconsistent("the control plane has not checked this Redis server yet")
        if statement.version < max(self.state.floor, (self.state.generation, self.state.revision)):
            raise Inconsistent(
                f"Redis is at revision {statement.revision}, this sidecar acted on {self.state.floor[1]} before"
            )
        generation_changed = statement.generation != self.state.generation
        self._engine.forget_absences()
        if statement.revision == 0:
            # Nothing was ever pushed, and the control plane says so itself: an empty state is a state.
            empty = Rulebook(Catalog(), generation=statement.generation, revision=0, observe=False)
            self._engine.install_bundle(empty)
        touched = Changes(statement.revision, bundle=statement.revision > 0, tenants=set(self._engine.tenants))
        self._dirty.update(self._loads)
        await self._take(touched, statement.generation)
        if self.state.head_read(statement, head, run_id) is HeadVerdict.CURRENT:
            self._engine.as_of_us = max(self._engine.as_of_us, head.at_us)
            self._head_document = head_document
        self._on_head(head)
        if generation_changed:
            self._logger.info("synced", generation=self.state.generation, revision=self.state.revision)

    async def _apply(self, changes: Iterable[Any]) -> bool:
        """Takes entries of the stream. False when they do not follow on what is known."""
        touched = Changes(self.state.revision)
        if not self._note(touched, changes):
            return False
        await self._take(touched, self.state.generation)
        return True

    def _note(self, touched: Changes, changes: Iterable[Any]) -> bool:
        changes = list(changes)
        if not self.state.follow(touched.cursor, [change.revision for change in changes]):
            return False
        for change in changes:
            touched.cursor = change.revision
            if change.kind == documents.BUNDLE:
                touched.bundle = True
            elif change.kind == documents.LICENSE:
                self._engine.forget_absence(change.key)
                if change.key in self._loads:
                    self._dirty.add(change.key)
                if change.key in self._engine.tenants:
                    touched.tenants.add(change.key)
            else:
                return False
        return True

    async def _take(self, touched: Changes, generation: int) -> None:
        """Reads what was touched until nothing read is newer than the changes read, then installs it in one step."""
        bundle: _Bundle | None = None
        licenses: dict[str, Tenant] = {}
        read_bundle, read_tenants = touched.bundle, set(touched.tenants)
        for _ in range(CATCH_UP_READS_MAX):
            if read_bundle:
                bundle = await self._read_bundle(generation)
            if read_tenants:
                licenses.update(await self._read_licenses(sorted(read_tenants)))
            newest = max(
                [touched.cursor, *(tenant.revision for tenant in licenses.values())]
                + ([bundle.statement.revision] if bundle else [])
            )
            if newest <= touched.cursor:
                break
            more = Changes(touched.cursor)
            if not self._note(more, await self._source.read_changes(touched.cursor, BLOCK_MS)):
                raise Inconsistent("the change stream has a gap")
            touched.cursor = more.cursor
            read_bundle, read_tenants = more.bundle, more.tenants
        else:
            raise Inconsistent("changes come faster than they can be read")
        self._install(bundle, licenses.values(), generation, touched.cursor)
        async with self._advanced:
            self._advanced.notify_all()

    def _install(self, bundle: _Bundle | None, licenses: Iterable[Tenant], generation: int, revision: int) -> None:
        """Puts what was read in force, in one step, and notes durably that it was."""
        try:
            if (generation, revision) > self.state.floor:  # else it is noted already
                self._log.append(floor_record(generation, revision), 0)
        except UsageLogError as error:
            # Without the note a restart might answer from an older state. Better to stay where we are, and say so.
            raise Inconsistent(f"revision {revision} cannot be noted: {error}") from error
        if bundle is not None:
            self.state.deployment = bundle.statement.deployment
            self._bundle = bundle
            self._engine.install_bundle(bundle.rulebook)
        for tenant in licenses:
            self._engine.install_license(tenant)
        self.state.reached(generation, revision)
        self._engine.revision, self._engine.generation = revision, generation
        self._snapshot_due = True
        if self._engine.rulebook is not None and self.state.may_serve() and not self.ready.is_set():
            self.problem = ""
            self.ready.set()

    async def _read_bundle(self, generation: int) -> _Bundle:
        document = await self._source.read_manifest()
        if document is None:
            raise Inconsistent("no bundle is in Redis: run `licet policy push`, or wait for the control plane")
        statement = self._verifier.verify(document, kind=documents.BUNDLE, key=documents.BUNDLE_KEY)
        if statement.generation > generation:
            raise Inconsistent("a new generation has begun")
        known = self._bundle.chunks if self._bundle else {}
        missing = [digest for digest in Manifest.from_payload(statement.payload).chunks if digest not in known]
        fetched = await self._source.read_chunks(missing) if missing else []
        chunks = dict(known)
        for digest, chunk in zip(missing, fetched, strict=True):
            if chunk is None:
                raise Inconsistent(f"chunk {digest[:12]}… of the bundle is missing in Redis")
            chunks[digest] = chunk
        await self._unpacking.unpack(Manifest.from_payload(statement.payload).chunks, chunks)
        bundle = self._verified_bundle(document, chunks)
        # What checks ask for is compiled before the bundle is in force, so that none of them waits for all of it.
        await in_slices(bundle.rulebook.warmed(self._engine.rulebook))
        return bundle

    def _verified_bundle(self, document: bytes, chunks: dict[str, bytes]) -> _Bundle:
        statement = self._verifier.verify(document, kind=documents.BUNDLE, key=documents.BUNDLE_KEY)
        held = self._bundle
        if not self.state.accepts(statement, held.statement.version if held else (0, 0)):
            raise Inconsistent(f"the bundle of revision {statement.revision} is older than the one in force")
        if held is not None and held.document == document:
            return held
        manifest = Manifest.from_payload(statement.payload)
        catalog = self._unpacking.catalog(manifest.chunks, chunks)
        rulebook = Rulebook(
            catalog,
            generation=statement.generation,
            revision=statement.revision,
            observe=manifest.observe,
            salt=manifest.salt,
        )
        return _Bundle(statement, document, {digest: chunks[digest] for digest in manifest.chunks}, rulebook)

    async def _read_licenses(self, tenants: list[str]) -> dict[str, Tenant]:
        found: dict[str, Tenant] = {}
        for name, document in zip(tenants, await self._source.read_licenses(tenants), strict=True):
            if document is None:
                raise Inconsistent(f"the license of {name} is missing in Redis")
            found[name] = self._verified_license(document, key=name)
        return found

    def _verified_license(self, document: bytes, *, key: str | None) -> Tenant:
        """The license in ``document``. ``key`` ``None``: of whatever tenant it is, as on disk."""
        if key is None:
            key = _key_of(document)
        held = self._engine.tenants.get(key)
        if held is not None and held.document == document:
            return held
        statement = self._verifier.verify(document, kind=documents.LICENSE, key=key)
        if not self.state.accepts(statement, (held.generation, held.revision) if held else (0, 0)):
            raise Inconsistent(f"the license of {key} of revision {statement.revision} is older than the one in force")
        return Tenant(
            license_from_wire(statement.payload),
            generation=statement.generation,
            revision=statement.revision,
            document=document,
        )

    async def _load(self, tenant: str) -> None:
        self._tally.license_loads += 1
        while True:
            self._dirty.discard(tenant)
            document, pair, head_document, run_id = await self._source.read_license(tenant)
            self._link.succeeded()
            if head_document is None:
                raise LinkDown("the control plane has not checked this Redis server")
            statement = self._verifier.verify(head_document, kind=documents.HEAD, key=documents.HEAD_KEY)
            head = Head.from_payload(statement.payload)
            # The head may be a second behind the stream. What matters is that the contents of this very server were
            # checked: after a failover or a wipe they may be older, or gone, and absence would mean nothing.
            if head.run_id != run_id or statement.generation < self.state.generation:
                raise LinkDown("the control plane has not checked this Redis server")
            if document is None:
                await self._until(statement.version)
                if tenant not in self._dirty:
                    self._engine.install_absence(tenant, self._clock.boot_ms())
                    return
                continue
            loaded = self._verified_license(document, key=tenant)
            await self._until((loaded.generation, loaded.revision))
            if tenant in self._dirty or loaded.generation < self.state.generation:
                continue
            for evicted in self._engine.install_license(loaded):
                self._evicted(evicted)
            held = self._engine.leases.of(tenant)
            if held.pair == Pair(0, "") and pair.epoch:
                held.pair = pair
            self._snapshot_due = True
            return

    async def _take_second_route(self, wanted: list[str]) -> None:
        """Reads a snapshot with the licenses of ``wanted``, and installs it in one step."""
        assert self._second is not None
        have = (self.state.generation, self.state.revision) if self._engine.rulebook is not None else (0, 0)
        data = await self._second.snapshot(have, list(self._engine.tenants), wanted)
        snapshot = Snapshot.unpack(data)
        statement = self._verifier.verify(snapshot.head, kind=documents.HEAD, key=documents.HEAD_KEY)
        head = Head.from_payload(statement.payload)
        if head.run_id:
            raise Inconsistent("the head vouches for a server of Redis, and not for what the control plane answers")
        now = (self.state.generation, self.state.revision)
        if statement.version < max(self.state.floor, now):
            raise Inconsistent(
                f"the control plane is at revision {statement.revision}, this sidecar acted on {self.state.floor[1]}"
            )
        bundle: _Bundle | None = None
        if snapshot.manifest is not None:
            bundle = self._verified_bundle(snapshot.manifest, dict(snapshot.chunks))
        licenses = [self._verified_license(document, key=tenant) for tenant, document in snapshot.licenses.items()]
        newest = [(one.generation, one.revision) for one in licenses] + ([bundle.statement.version] if bundle else [])
        if any(version > statement.version for version in newest):
            raise Inconsistent("a document is newer than the head that came with it")
        if statement.version > now:
            if have != now or self._engine.tenants.keys() - {*snapshot.licenses, *snapshot.absent}:
                raise Inconsistent("the state in force changed while another was read")
            if bundle is None and self._engine.rulebook is None and statement.revision:
                raise Inconsistent("no bundle was pushed yet: run `licet policy push`")
            if bundle is None and statement.revision == 0:
                empty = Rulebook(Catalog(), generation=statement.generation, revision=0, observe=False)
                self._engine.install_bundle(empty)
            self._engine.forget_absences()
            self._dirty.update(self._loads)
        self._install(bundle, (), *statement.version)
        for tenant in licenses:
            for evicted in self._engine.install_license(tenant):
                self._evicted(evicted)
        for name in snapshot.absent:
            if name in wanted:
                self._engine.install_absence(name, self._clock.boot_ms())
        if head.at_us > self._engine.as_of_us:
            self._engine.as_of_us, self._head_document = head.at_us, snapshot.head
        async with self._advanced:
            self._advanced.notify_all()

    async def _until(self, version: tuple[int, int]) -> None:
        """Waits until that (generation, revision) is in force."""
        if (self.state.generation, self.state.revision) >= version:
            return
        async with self._advanced:
            await self._advanced.wait_for(lambda: (self.state.generation, self.state.revision) >= version)

    def _evicted(self, tenant: str) -> None:
        """A tenant made room: what it holds goes back with the next upkeep."""
        book: LeaseBook = self._engine.leases
        held = book.tenants.get(tenant)
        if held is not None:
            for lease in held.all():
                lease.wanted = True
        self._snapshot_due = True

    def _loaded(self, tenant: str, task: asyncio.Task[None]) -> None:
        self._loads.pop(tenant, None)
        self._dirty.discard(tenant)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, LinkDown | LinkRefused):
            self._reject(error)

    def _reject(self, error: BaseException) -> None:
        self._tally.documents_rejected += 1
        if not self.ready.is_set():
            self.problem = str(error)
        self._logger.error("published state was not taken; what is in force stays", error=str(error))


def _key_of(document: bytes) -> str:
    """The key a signed document claims, to be verified."""
    import msgpack

    _, _, body = envelope.unpack("signed", document)
    return str(msgpack.unpackb(body, raw=False, strict_map_key=False)[2])

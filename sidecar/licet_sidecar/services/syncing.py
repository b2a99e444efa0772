"""Keeps the engine's state in step with what is published: carries out what ``core.following`` decides.

It reads from Redis, from the control plane itself and from disk, verifies what it reads, and holds no policy.

Concurrency: one event loop. ``run`` is the only one that follows the stream; loads run beside it. Between two reads
``core.following`` puts in force what was read in one step, so that no check sees half of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Mapping
from typing import Any, Final

from licet.domain.catalog_wire import license_from_wire
from licet.wire import documents, envelope
from licet.wire.documents import Head, Manifest
from licet.wire.documents import Snapshot as RouteSnapshot
from licet.wire.signing import Statement, Verifier
from licet_sidecar.adapters.state_directory import StateDirectory, StateDirectoryError
from licet_sidecar.adapters.usage_log import UsageLog, UsageLogError, floor_record
from licet_sidecar.clock import Clock
from licet_sidecar.core import following
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.following import MALFORMED, Bundle, Following, Inconsistent, SignedHead, Snapshot, Unchecked
from licet_sidecar.core.rulebook import Rulebook
from licet_sidecar.core.sync import Change, HeadVerdict, SyncState
from licet_sidecar.core.tenant import Tenant
from licet_sidecar.logs import Logger
from licet_sidecar.ports import LinkDown, LinkRefused, PulseReport, SecondRoute, StateSource
from licet_sidecar.services.link import LinkState
from licet_sidecar.services.slices import in_slices
from licet_sidecar.services.tally import Tally
from licet_sidecar.services.unpacking import Unpacking

BLOCK_MS: Final = 5_000
RETRY_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0)
MOMENT_S: Final = 0.05
RESYNC_JITTER_S: Final = 0.2
"""Resyncs of many sidecars at once are spread over this long."""
SNAPSHOT_FILE: Final = "snapshot"
HEAD_FILE: Final = "head"
HEAD_EVERY_MS: Final = 30_000
"""How often the newest head is written to disk while nothing changes: a restart without Redis is then no staler than
this, at the price of one small file."""
_SNAPSHOT_KIND: Final = "snapshot"
_NOT_TAKEN: Final = (Inconsistent, Unchecked, *MALFORMED)


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
        self.ready = asyncio.Event()
        self.problem = "nothing has been synced yet"
        self._following = Following(engine, self._note)
        self._installs = 0
        self._generation = 0
        self._head_told: Head | None = None
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._unpacking = Unpacking()
        self._advanced = asyncio.Condition()
        self._resync_wanted = asyncio.Event()
        self._head_written: bytes | None = None
        self._head_written_ms = 0

    @property
    def state(self) -> SyncState:
        """Versions reached."""
        return self._following.state

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
        except (LinkRefused, *_NOT_TAKEN) as error:
            raise LinkDown(str(error)) from error

    async def changed_within(self, timeout_s: float) -> None:
        """Waits until another state is in force, or for so long."""
        try:
            async with asyncio.timeout(timeout_s), self._advanced:
                await self._advanced.wait()
        except TimeoutError:
            pass

    # For upkeep

    async def follow_second_route(self) -> None:
        """Takes what the control plane itself says is published. For as long as Redis cannot be reached.

        Raises:
            LinkDown, LinkRefused: it does not answer, or what it says cannot be taken.
        """
        try:
            await self._take_second_route([])
        except _NOT_TAKEN as error:
            self._reject(error)
            raise LinkDown(str(error)) from error

    def take_head(self, report: PulseReport) -> None:
        """Judges the head a pulse brought."""
        if report.head is None:
            if self._head_told is not None:  # there was one: it was lost, with whatever else
                self._tally.heads_ignored += 1
            return
        try:
            signed = self._verified_head(report.head)
        except MALFORMED as error:
            self._reject(error)
            return
        verdict = self._following.take_head(signed, report.run_id)
        if verdict is HeadVerdict.IGNORED:
            self._tally.heads_ignored += 1
        elif verdict is not HeadVerdict.LATE:
            self._tell(signed.head)
        if self._following.wants_resync:
            self._resync_wanted.set()

    async def save_snapshot(self, *, last: bool = False) -> None:
        """Writes the last good state to disk when it changed; else, now and then or at the ``last``, its age."""
        state, bundle = self._following, self._following.bundle
        if bundle is None:
            return
        if not state.snapshot_due:
            due = last or self._clock.boot_ms() - self._head_written_ms >= HEAD_EVERY_MS
            if due and state.head_document is not None and state.head_document is not self._head_written:
                await self._write(HEAD_FILE, state.head_document)
            return
        state.snapshot_due = False
        data = pack_snapshot(
            {
                "head": state.head_document or b"",
                "manifest": bundle.document,
                "chunks": dict(bundle.chunks),
                "generation": self.state.generation,
                "revision": self.state.revision,
                "licenses": [tenant.document for tenant in self._engine.tenants.values()],
            }
        )
        if not await self._write(SNAPSHOT_FILE, data):
            state.snapshot_due = True

    async def _write(self, name: str, data: bytes) -> bool:
        self._head_written, self._head_written_ms = self._following.head_document, self._clock.boot_ms()
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
            body = unpack_snapshot(data)
            snapshot = Snapshot(
                (int(body["generation"]), int(body["revision"])),
                self._verified_bundle(body["manifest"], body["chunks"]),
                [self._verified_license(document, key=_key_of(document)) for document in body["licenses"]],
            )
            self._following.restore(snapshot)
        except (Inconsistent, *MALFORMED) as error:
            self._reject(error)
            return
        for head_document in (body.get("head"), self._directory.read(HEAD_FILE)):
            try:
                if head_document:
                    self._following.restore_age(self._verified_head(head_document))
            except MALFORMED as error:
                self._reject(error)
        self._put_in_force()

    async def run(self) -> None:
        """Follows the published state for ever."""
        failures = 0
        while True:
            self._resync_wanted.clear()
            try:
                if self._following.wants_resync and self.ready.is_set():
                    await asyncio.sleep(random.uniform(0, RESYNC_JITTER_S))
                await self._carry_out(self._following.follow())
                failures = 0
            except (LinkDown, LinkRefused) as error:
                if self._link.failed(error, refused=isinstance(error, LinkRefused)):
                    level = self._logger.error if isinstance(error, LinkRefused) else self._logger.warning
                    level("Redis does not answer", error=str(error))
                if not self.ready.is_set():
                    self.problem = str(error)
                failures = await self._back_off(failures)
            except Unchecked as error:
                self._wait_for_head(error)
                failures = await self._back_off(failures)
            except (Inconsistent, *MALFORMED) as error:
                self._reject(error)
                failures = await self._back_off(failures)

    # Inside

    def _wait_for_head(self, error: Unchecked) -> None:
        """Nothing is wrong with a server that was not vouched for, unless it lasts."""
        self._tally.heads_ignored += 1
        if not self.ready.is_set():
            self.problem = str(error)
        self._logger.warning("what is in force stays until the control plane vouches for Redis", error=str(error))

    async def _back_off(self, failures: int) -> int:
        delay_s = RETRY_S[min(failures, len(RETRY_S) - 1)]
        await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
        return failures + 1

    async def _carry_out(self, steps: following.Steps) -> None:
        """Does what a procedure asks for until it ends."""
        try:
            step = next(steps)
            while True:
                try:
                    answer = await self._do(step)
                except (LinkDown, LinkRefused, *_NOT_TAKEN) as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
                await self._announce_state()
        except StopIteration:
            pass
        finally:
            steps.close()
            await self._announce_state()

    async def _do(self, step: following.Step) -> Any:
        match step:
            case following.ReadHead():
                document, run_id = await self._source.read_head()
                self._link.succeeded()
                return self._verified_head(document) if document is not None else None, run_id
            case following.ReadBundle():
                return await self._read_bundle()
            case following.ReadLicenses(tenants):
                return await self._read_licenses(tenants)
            case following.ReadChanges(after):
                return await self._read_changes(after)
            case following.ReadLicense(tenant):
                return await self._read_license(tenant)
            case following.AwaitInstall(after):
                async with self._advanced:
                    await self._advanced.wait_for(lambda: self._following.installs > after)
            case following.AwaitMoment():
                await asyncio.sleep(MOMENT_S)
        return None

    async def _announce_state(self) -> None:
        self._tally.resyncs = self._following.resyncs
        if self._following.wants_resync:
            self._resync_wanted.set()
        if self._following.installs != self._installs:
            self._put_in_force()
            async with self._advanced:
                self._advanced.notify_all()

    def _put_in_force(self) -> None:
        """A state was: say so to whoever waits."""
        self._installs = self._following.installs
        head = self.state.head
        if head is not None:
            self._tell(head)
        if self._engine.rulebook is not None and self.state.may_serve() and not self.ready.is_set():
            self.problem = ""
            self.ready.set()
        if self.state.generation != self._generation:
            self._generation = self.state.generation
            self._logger.info("synced", generation=self.state.generation, revision=self.state.revision)

    def _tell(self, head: Head) -> None:
        if head is not self._head_told:
            self._head_told = head
            self._on_head(head)

    def _note(self, version: tuple[int, int]) -> None:
        try:
            self._log.append(floor_record(*version), 0)
        except UsageLogError as error:
            # Without the note a restart might answer from an older state. Better to stay where we are, and say so.
            raise Inconsistent(f"revision {version[1]} cannot be noted: {error}") from error

    # Reading

    async def _read_changes(self, after: int) -> tuple[list[Change], str]:
        """What follows in the stream; nothing when everything is to be read again first."""
        reading = asyncio.ensure_future(self._source.read_changes(after, BLOCK_MS))
        waking = asyncio.ensure_future(self._resync_wanted.wait())
        try:
            await asyncio.wait((reading, waking), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return [], ""
            changes = reading.result()
            self._link.succeeded()
            return changes
        finally:
            waking.cancel()
            reading.cancel()
            await asyncio.gather(waking, reading, return_exceptions=True)

    async def _read_bundle(self) -> tuple[Bundle, str]:
        document, run_id = await self._source.read_manifest()
        if document is None:
            raise Inconsistent("no bundle is in Redis: run `licet policy push`, or wait for the control plane")
        statement = self._verified(document, documents.BUNDLE, documents.BUNDLE_KEY)
        held = self._following.bundle
        chunks = dict(held.chunks) if held else {}
        missing = [digest for digest in Manifest.from_payload(statement.payload).chunks if digest not in chunks]
        fetched = await self._source.read_chunks(missing) if missing else []
        for digest, chunk in zip(missing, fetched, strict=True):
            if chunk is None:
                raise Inconsistent(f"chunk {digest[:12]}… of the bundle is missing in Redis")
            chunks[digest] = chunk
        await self._unpacking.unpack(Manifest.from_payload(statement.payload).chunks, chunks)
        bundle = self._verified_bundle(document, chunks)
        # What checks ask for is compiled before the bundle is in force, so that none of them waits for all of it.
        await in_slices(bundle.rulebook.warmed(self._engine.rulebook))
        return bundle, run_id

    async def _read_licenses(self, tenants: tuple[str, ...]) -> tuple[dict[str, Tenant | None], str]:
        read, run_id = await self._source.read_licenses(tenants)
        found = {
            name: self._verified_license(document, key=name) if document is not None else None
            for name, document in zip(tenants, read, strict=True)
        }
        return found, run_id

    async def _read_license(self, tenant: str) -> following.LicenseRead:
        boot_ms = self._clock.boot_ms()
        document, pair, head, run_id = await self._source.read_license(tenant)
        self._link.succeeded()
        return following.LicenseRead(
            self._verified_license(document, key=tenant) if document is not None else None,
            pair,
            self._verified_head(head) if head is not None else None,
            run_id,
            boot_ms,
        )

    async def _load(self, tenant: str) -> None:
        self._tally.license_loads += 1
        await self._carry_out(self._following.load(tenant))

    async def _take_second_route(self, wanted: list[str]) -> None:
        """Reads a snapshot with the licenses of ``wanted``, and installs it in one step."""
        assert self._second is not None
        have = self.state.version if self._engine.rulebook is not None else (0, 0)
        found = RouteSnapshot.unpack(await self._second.snapshot(have, list(self._engine.tenants), wanted))
        signed = self._verified_head(found.head)
        bundle = self._verified_bundle(found.manifest, found.chunks) if found.manifest is not None else None
        licenses = [self._verified_license(document, key=tenant) for tenant, document in found.licenses.items()]
        self._following.take_snapshot(
            Snapshot(signed.statement.version, bundle, licenses),
            signed,
            have=have,
            wanted=wanted,
            absent=found.absent,
            boot_ms=self._clock.boot_ms(),
        )
        await self._announce_state()

    def _verified(self, document: bytes, kind: str, key: str) -> Statement:
        statement = self._verifier.verify(document, kind=kind, key=key)
        if self.state.deployment and statement.deployment != self.state.deployment:
            raise Inconsistent(f"the {kind} of {key} is of another deployment, {statement.deployment}")
        return statement

    def _verified_head(self, document: bytes) -> SignedHead:
        # Of whatever deployment: a head of another one is judged, and counted, as such.
        statement = self._verifier.verify(document, kind=documents.HEAD, key=documents.HEAD_KEY)
        return SignedHead(document, statement, Head.from_payload(statement.payload))

    def _verified_bundle(self, document: bytes, chunks: Mapping[str, bytes]) -> Bundle:
        held = self._following.bundle
        if held is not None and held.document == document:
            return held
        statement = self._verified(document, documents.BUNDLE, documents.BUNDLE_KEY)
        manifest = Manifest.from_payload(statement.payload)
        version = {"generation": statement.generation, "revision": statement.revision}
        if held is not None and manifest.has_content_of(Manifest.from_payload(held.statement.payload)):
            rulebook = held.rulebook.with_overrides(manifest.overrides, **version)
            return Bundle(statement, document, held.chunks, rulebook)
        catalog = self._unpacking.catalog(manifest.chunks, chunks)
        rulebook = Rulebook(
            catalog, **version, observe=manifest.observe, salt=manifest.salt, overrides=manifest.overrides
        )
        return Bundle(statement, document, {digest: chunks[digest] for digest in manifest.chunks}, rulebook)

    def _verified_license(self, document: bytes, *, key: str) -> Tenant:
        held = self._engine.tenants.get(key)
        if held is not None and held.document == document:
            return held
        statement = self._verified(document, documents.LICENSE, key)
        return Tenant(
            license_from_wire(statement.payload),
            generation=statement.generation,
            revision=statement.revision,
            document=document,
        )

    def _loaded(self, tenant: str, task: asyncio.Task[None]) -> None:
        self._loads.pop(tenant, None)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, LinkDown | LinkRefused | Unchecked):
            self._reject(error)

    def _reject(self, error: BaseException) -> None:
        self._tally.documents_rejected += 1
        if not self.ready.is_set():
            self.problem = str(error)
        self._logger.error("published state was not taken; what is in force stays", error=str(error))


def pack_snapshot(body: Mapping[str, Any]) -> bytes:
    """A snapshot as it is on disk: with a digest, as the signatures in it do not cover how they go together."""
    packed = envelope.pack(_SNAPSHOT_KIND, dict(body))
    return envelope.pack(_SNAPSHOT_KIND, [hashlib.sha256(packed).digest(), packed])


def unpack_snapshot(data: bytes) -> dict[str, Any]:
    """The inverse of ``pack_snapshot``.

    Raises:
        ValueError: damaged.
    """
    digest, packed = envelope.unpack(_SNAPSHOT_KIND, data)
    if hashlib.sha256(packed).digest() != digest:
        raise ValueError("the snapshot on disk is damaged")
    body: dict[str, Any] = envelope.unpack(_SNAPSHOT_KIND, packed)
    return body


def _key_of(document: bytes) -> str:
    """The key a signed document claims, to be verified."""
    import msgpack

    _, _, body = envelope.unpack("signed", document)
    return str(msgpack.unpackb(body, raw=False, strict_map_key=False)[2])

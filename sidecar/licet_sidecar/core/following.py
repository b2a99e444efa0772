"""How a sidecar follows what is published: what is read, in which order, and when it is put in force.

Each procedure is a generator. It yields what to do (``ReadHead``, ``ReadChanges``, …), is sent what came of it, and
has a failure thrown into it; ``services.syncing`` carries it out, one generator for the stream and one for each load.
Whatever is sent in was verified: signature, kind and key.

Rules, beside those of ``core.sync``:

1. A document is read again until no change is missing between it and the others, and never taken when it is older than
   the change that named it: a server that took over may be behind the one the change was read from.
2. All of it is read from the one server that the control plane vouched for, and the bundle is not older than the head
   says.
3. A load is registered before it reads. A change that names the tenant meanwhile marks it dirty, and it is read again.
4. A load counts only on the server that the state in force was read from, and waits until its revision is in force.
5. Absence is believed only where no limits of the tenant are, and no longer than the server it was read from: what a
   load found, or did not find, while everything was read again is forgotten when that is put in force.
6. What is put in force is noted durably before.

Concurrency: one event loop. What is put in force changes in one step, between two reads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from licet.domain.catalog import Catalog
from licet.wire import documents
from licet.wire.documents import Head
from licet.wire.registers import Pair
from licet.wire.signing import Statement
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.lease import NO_PAIR
from licet_sidecar.core.rulebook import Rulebook
from licet_sidecar.core.sync import Change, Changes, HeadVerdict, SyncState
from licet_sidecar.core.tenant import Tenant

CATCH_UP_READS_MAX: Final = 50
RESYNC: Final = "resync"
"""Kind of an entry that names no document: entries were lost, and whoever was behind them reads everything again."""
ABSENCE_READS_MAX: Final = 3
"""How often a license is read that is missing while its limits are there: those are written first."""
MALFORMED: Final = (ValueError, KeyError, TypeError)
"""What reading a document raises that is not one, or not signed."""


class Inconsistent(Exception):
    """What was read does not fit together (lost, altered, or being changed): read everything again."""


class Unchecked(Exception):
    """The control plane has not vouched for this server: what it holds may be old, and its absences mean nothing."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified manifest with its chunks, by digest, and what it means."""

    statement: Statement
    document: bytes
    chunks: Mapping[str, bytes]
    rulebook: Rulebook


@dataclass(frozen=True, slots=True)
class SignedHead:
    """A verified head."""

    document: bytes
    statement: Statement
    head: Head


# What to do. Beside each, what is sent in return.


@dataclass(frozen=True, slots=True)
class ReadHead:
    """``(SignedHead | None, run id)`` of one server."""


@dataclass(frozen=True, slots=True)
class ReadBundle:
    """``(Bundle, run id)``."""


@dataclass(frozen=True, slots=True)
class ReadLicenses:
    """``(dict[str, Tenant | None], run id)``: ``None`` where there is none."""

    tenants: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReadChanges:
    """``(list[Change], run id)``: waits for the first. Nothing, and no run id, when the reading was given up."""

    after: int


@dataclass(frozen=True, slots=True)
class LicenseRead:
    """What ``ReadLicense`` found, of one read of one server. ``pair`` is that of the tenant's mark, ``boot_ms`` the
    boot-time clock when the read began, milliseconds.
    """

    tenant: Tenant | None
    pair: Pair
    head: SignedHead | None
    run_id: str
    boot_ms: int


@dataclass(frozen=True, slots=True)
class ReadLicense:
    """``LicenseRead``."""

    tenant: str


@dataclass(frozen=True, slots=True)
class AwaitInstall:
    """``None``, when more than ``after`` states were put in force."""

    after: int


@dataclass(frozen=True, slots=True)
class AwaitMoment:
    """``None``, a moment later."""


Step: TypeAlias = ReadHead | ReadBundle | ReadLicenses | ReadChanges | ReadLicense | AwaitInstall | AwaitMoment
Steps: TypeAlias = Generator[Step, Any, None]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of one version, from disk or from the control plane itself. ``licenses`` may be newer than ``version``
    on disk: those are left out. ``bundle`` is ``None`` where it is known already, or none was ever pushed.
    """

    version: tuple[int, int]
    bundle: Bundle | None
    licenses: Sequence[Tenant]


class Following:
    """The published state as one sidecar has it. ``installs`` counts the states put in force.

    ``note`` notes a version durably and raises ``Inconsistent`` when it cannot.
    """

    def __init__(self, engine: Engine, note: Callable[[tuple[int, int]], None]) -> None:
        self.state = SyncState()
        self.engine = engine
        self.bundle: Bundle | None = None
        self.head_document: bytes | None = None
        self.wants_resync = True
        self.snapshot_due = False
        self.installs = 0
        self.loading: set[str] = set()
        self.resyncs = 0
        self._dirty: set[str] = set()
        self._note = note

    # Procedures

    def follow(self) -> Steps:
        """One round: everything again when that is wanted, then the next changes.

        Raises:
            Unchecked, Inconsistent: what is in force stays. Follow again, a moment later.
        """
        if self.wants_resync:
            self.wants_resync = False
            try:
                yield from self._resync()
            except BaseException:
                self.wants_resync = True
                raise
            if self.wants_resync:
                return
        changes, run = yield ReadChanges(self.state.revision)
        if run and run != self.state.run:
            self.wants_resync = True
        elif changes:
            try:
                yield from self._apply(changes)
            except (Unchecked, Inconsistent, *MALFORMED):
                self.wants_resync = True
                raise

    def load(self, tenant: str) -> Steps:
        """Puts one tenant's license, or its absence, in force.

        Raises:
            Unchecked: the server cannot be trusted now.
            Inconsistent: the license cannot.
        """
        self.loading.add(tenant)
        try:
            yield from self._load(tenant)
        finally:
            self.loading.discard(tenant)
            self._dirty.discard(tenant)

    def take_head(self, signed: SignedHead, run_id: str) -> HeadVerdict:
        """Judges a head that was read from the server ``run_id``."""
        verdict = self.state.head_read(signed.statement, signed.head, run_id)
        if verdict is HeadVerdict.CURRENT:
            self._confirm(signed)
        elif verdict is HeadVerdict.RESYNC:
            self.wants_resync = True
        return verdict

    def restore(self, snapshot: Snapshot) -> None:
        """Puts a state from disk in force.

        Raises:
            Inconsistent: it is older than what was acted on (``state.floor``), or does not fit together.
        """
        if snapshot.bundle is not None:
            # Also of one that is too old: the control plane learns from it whose state it was that was acted on.
            self.state.deployment = snapshot.bundle.statement.deployment
        if snapshot.version < self.state.floor:
            raise Inconsistent(
                f"the snapshot on disk is of revision {snapshot.version[1]}, and this sidecar acted on"
                f" {self.state.floor[1]} before: waiting for Redis"
            )
        if snapshot.bundle is None or snapshot.bundle.statement.version > snapshot.version:
            raise Inconsistent("the snapshot on disk does not fit together")
        known = [one for one in snapshot.licenses if (one.generation, one.revision) <= snapshot.version]
        self._install(snapshot.bundle, known, snapshot.version, run="")

    def restore_age(self, signed: SignedHead) -> None:
        """Takes up a head from disk, when it speaks of the version in force or of one that is in it."""
        # A later one says only that there was something newer, which is not on disk.
        if signed.statement.version <= self.state.version and signed.head.at_us > self.engine.as_of_us:
            self._confirm(signed)
            self.engine.leases.live = signed.head.live

    def take_snapshot(
        self,
        snapshot: Snapshot,
        signed: SignedHead,
        *,
        have: tuple[int, int],
        wanted: Collection[str],
        absent: Collection[str],
        boot_ms: int,
    ) -> None:
        """Puts in force what the control plane itself said, when it was asked by who had the version ``have``.

        Raises:
            Inconsistent: it is older than what was acted on, or does not fit together.
        """
        if signed.head.run_id:
            raise Inconsistent("the head vouches for a server of Redis, and not for what the control plane answers")
        version, now = snapshot.version, self.state.version
        if version < max(self.state.floor, now):
            raise Inconsistent(
                f"the control plane is at revision {version[1]}, this sidecar acted on {self.state.floor[1]}"
            )
        found = [(one.generation, one.revision) for one in snapshot.licenses]
        found += [snapshot.bundle.statement.version] if snapshot.bundle else []
        if any(one > version for one in found):
            raise Inconsistent("a document is newer than the head that came with it")
        if snapshot.bundle is not None:
            self._judge_bundle(snapshot.bundle, version[0], 0)
        for one in snapshot.licenses:
            self._judge_license(one.license.tenant, one, version[0], 0)
        withdrawn = self._withdrawn(absent, version[0])
        bundle, empty = snapshot.bundle, None
        if version > now:
            names = {one.license.tenant for one in snapshot.licenses}
            if have != now or self.engine.tenants.keys() - {*names, *absent}:
                raise Inconsistent("the state in force changed while another was read")
            if bundle is None and self.engine.rulebook is None and version[1]:
                raise Inconsistent("no bundle was pushed yet: run `licet policy push`")
            empty = self._empty(version) if bundle is None and version[1] == 0 else None
            self.engine.forget_absences()
            self._dirty |= self.loading
            # What Redis holds may be behind this: what is read there next is read whole.
            self.wants_resync = True
        self._install(bundle, (), version, run="" if version > now else self.state.run, empty=empty)
        self._install_licenses(snapshot.licenses)
        for name in withdrawn:
            self.engine.forget_license(name)
        for name in absent:
            if name in wanted:
                self.engine.install_absence(name, boot_ms)
        self._confirm(signed)

    # Inside

    def _resync(self) -> Steps:
        """Reads everything again: the head says which revision is complete, the stream what came since."""
        self.resyncs += 1
        signed, run = yield ReadHead()
        self._must_be_checked(signed, run)
        statement = signed.statement
        if statement.version < max(self.state.floor, self.state.version):
            raise Inconsistent(
                f"Redis is at revision {statement.revision}, this sidecar acted on {self.state.floor[1]} before"
            )
        self.engine.forget_absences()
        self._dirty |= self.loading
        empty = self._empty(statement.version) if statement.revision == 0 else None
        touched = Changes(
            statement.revision,
            bundle=None if empty else signed.head.bundle,
            tenants=dict.fromkeys(self.engine.tenants, 0),
        )
        yield from self._take(touched, statement.generation, run, empty=empty, whole=True)
        if self.take_head(signed, run) is HeadVerdict.LATE:
            # Changes came while everything was read. What was read holds all that the head speaks of, and who has just
            # started must not call it stale until the next one comes.
            self._confirm(signed)

    def _must_be_checked(self, signed: SignedHead | None, run: str) -> None:
        if signed is None:
            raise Unchecked("the control plane has published nothing here yet (no head)")
        if signed.head.run_id != run:
            raise Unchecked("the control plane has not checked this Redis server yet")
        if self.state.deployment and signed.statement.deployment != self.state.deployment:
            raise Inconsistent(f"Redis holds the state of another deployment, {signed.statement.deployment}")

    def _apply(self, changes: Iterable[Change]) -> Steps:
        """Takes entries of the stream; when they do not follow on what is known, everything is to be read again."""
        touched = Changes(self.state.revision)
        if not self._take_note(touched, changes):
            self.wants_resync = True
            return
        yield from self._take(touched, self.state.generation, self.state.run)

    def _take_note(self, touched: Changes, changes: Iterable[Change], read: Collection[str] = ()) -> bool:
        """Adds entries to what was touched. ``False`` when they do not follow on it.

        ``read``: tenants whose license was read and is not in force yet; a load may have evicted the one that was.
        """
        changes = list(changes)
        if not self.state.follow(touched.cursor, [change.revision for change in changes]):
            return False
        for change in changes:
            touched.cursor = change.revision
            if change.kind == documents.BUNDLE:
                touched.bundle = change.revision
            elif change.kind == documents.LICENSE:
                self._tenant_changed(change.key)
                if change.key in self.engine.tenants or change.key in read:
                    touched.tenants[change.key] = change.revision
            elif change.kind == RESYNC:
                return False
            else:
                raise Inconsistent(f"entry {change.revision} of the change stream is not one of ours")
        return True

    def _tenant_changed(self, tenant: str) -> None:
        self.engine.forget_absence(tenant)
        if tenant in self.loading:
            self._dirty.add(tenant)

    def _take(
        self, touched: Changes, generation: int, run: str, *, empty: Rulebook | None = None, whole: bool = False
    ) -> Steps:
        """Reads what was touched until nothing read is newer than the changes read, then installs it in one step."""
        bundle: Bundle | None = None
        licenses: dict[str, Tenant] = {}
        named_bundle, named = touched.bundle, dict(touched.tenants)
        for _ in range(CATCH_UP_READS_MAX):
            if named_bundle is not None:
                bundle, found_run = yield ReadBundle()
                self._must_be_from(found_run, run)
                self._judge_bundle(bundle, generation, named_bundle)
            if named:
                found, found_run = yield ReadLicenses(tuple(sorted(named)))
                self._must_be_from(found_run, run)
                for name, tenant in found.items():
                    if tenant is not None:
                        self._judge_license(name, tenant, generation, named[name])
                        licenses[name] = tenant
                    elif generation <= self.state.generation:
                        # Else it was withdrawn: a generation begins when something was lost for good.
                        raise Inconsistent(f"the license of {name} is missing in Redis")
            newest = max(
                [touched.cursor, *(tenant.revision for tenant in licenses.values())]
                + ([bundle.statement.revision] if bundle else [])
            )
            if newest <= touched.cursor:
                break
            changes, found_run = yield ReadChanges(touched.cursor)
            if not found_run:
                raise Unchecked("everything is to be read again")
            self._must_be_from(found_run, run)
            more = Changes(touched.cursor)
            if not self._take_note(more, changes, licenses):
                raise Inconsistent("the change stream has a gap")
            touched.cursor, named_bundle, named = more.cursor, more.bundle, more.tenants
        else:
            raise Inconsistent("changes come faster than they can be read")
        if whole:
            self._forget_all_but(licenses)
        self._install(bundle, licenses.values(), (generation, touched.cursor), run=run, empty=empty)

    def _forget_all_but(self, licenses: Collection[str]) -> None:
        """Forgets what was not read again: also what was loaded meanwhile, from the server before.

        What that one did not have may be there now, and no change will name it: absences are forgotten here too, not
        only when reading began.
        """
        for name in self.engine.tenants.keys() - set(licenses):
            self.engine.forget_license(name)
        self.engine.forget_absences()

    def _must_be_from(self, found: str, run: str) -> None:
        """What belongs together is read from one server: the one that was checked, or the state in force is from."""
        if found != run:
            raise Unchecked("another Redis server answered while the state was read")

    def _withdrawn(self, absent: Collection[str], generation: int) -> set[str]:
        """Tenants whose license is in force, and was withdrawn with the ``generation`` that the control plane is at.

        Raises:
            Inconsistent: it is the same generation.
        """
        withdrawn = self.engine.tenants.keys() & set(absent)
        if withdrawn and generation <= self.state.generation:
            # Licenses are canceled, and only a new generation withdraws them: what is in force is of a lost database.
            raise Inconsistent(f"the control plane does not have the license of {min(withdrawn)}, which is in force")
        return withdrawn

    def _judge_bundle(self, bundle: Bundle, generation: int, named: int) -> None:
        held = self.bundle.statement.version if self.bundle else (0, 0)
        if not self.state.accepts(bundle.statement, held) or bundle.statement.revision < named:
            raise Inconsistent(f"the bundle of revision {bundle.statement.revision} is older than the one in force")
        if bundle.statement.generation != generation:
            raise Inconsistent("a new generation has begun")

    def _judge_license(self, name: str, tenant: Tenant, generation: int, named: int) -> None:
        self._refuse_older(name, tenant)
        if tenant.revision < named:
            raise Inconsistent(f"the license of {name} of revision {tenant.revision} is older than its change, {named}")
        if tenant.generation != generation:
            raise Inconsistent("a new generation has begun")

    def _refuse_older(self, name: str, tenant: Tenant) -> None:
        held = self.engine.tenants.get(name)
        version = (tenant.generation, tenant.revision)
        if (held is not None and version < (held.generation, held.revision)) or version[0] < self.state.generation:
            raise Inconsistent(f"the license of {name} of revision {tenant.revision} is older than the one in force")

    def _load(self, tenant: str) -> Steps:
        missed = 0
        while True:
            self._dirty.discard(tenant)
            read: LicenseRead = yield ReadLicense(tenant)
            # The head may be a second behind the stream. What matters is that the contents of this very server were
            # checked: after a failover or a wipe they may be older, or gone, and absence would mean nothing.
            self._must_be_checked(read.head, read.run_id)
            assert read.head is not None
            if read.head.statement.generation < self.state.generation:
                raise Unchecked("the control plane has not checked this Redis server in this generation")
            if self.state.is_set_back(read.head.statement, read.head.head):
                raise Unchecked("the control plane knows less than what is in force: what is there may be older")
            if not self._follows(read.run_id):
                self.wants_resync = True
                yield AwaitInstall(self.installs)
                continue
            if read.tenant is None:
                if read.pair.epoch:
                    missed += 1
                    if missed >= ABSENCE_READS_MAX:
                        raise Inconsistent(f"the license of {tenant} is missing in Redis, where its limits are")
                    yield AwaitMoment()
                    continue
                yield from self._reach(read.head.statement.version)
            else:
                self._refuse_older(tenant, read.tenant)
                yield from self._reach((read.tenant.generation, read.tenant.revision))
            if tenant in self._dirty or not self._follows(read.run_id):
                continue
            if read.tenant is None:
                self.engine.install_absence(tenant, read.boot_ms)
                return
            if read.tenant.generation < self.state.generation:
                continue
            self._refuse_older(tenant, read.tenant)
            self._install_licenses([read.tenant])
            held = self.engine.leases.of(tenant)
            if held.pair == NO_PAIR and read.pair.epoch:
                held.pair = read.pair
            return

    def _follows(self, run: str) -> bool:
        """Whether the state in force was read from that server."""
        return run == self.state.run

    def _reach(self, version: tuple[int, int]) -> Steps:
        """Waits until that version is in force."""
        while self.state.version < version:
            yield AwaitInstall(self.installs)

    def _install(
        self,
        bundle: Bundle | None,
        licenses: Iterable[Tenant],
        version: tuple[int, int],
        *,
        run: str,
        empty: Rulebook | None = None,
    ) -> None:
        """Puts what was read in force, in one step, and notes durably before that it was."""
        if version > self.state.floor:  # else it is noted already
            self._note(version)
        if bundle is not None:
            self.state.deployment = bundle.statement.deployment
            self.bundle = bundle
            self.engine.install_bundle(bundle.rulebook)
        elif empty is not None:
            self.engine.install_bundle(empty)
        self._install_licenses(licenses)
        self.state.reached(*version, run)
        self.engine.generation, self.engine.revision = version
        self.snapshot_due = True
        self.installs += 1

    def _install_licenses(self, licenses: Iterable[Tenant]) -> None:
        """Puts licenses of the version in force, or of earlier ones, beside it."""
        for tenant in licenses:
            for evicted in self.engine.install_license(tenant):
                # What it holds goes back with the next upkeep; and an evicted license is not to come back from disk.
                held = self.engine.leases.tenants.get(evicted)
                for lease in held.all() if held is not None else ():
                    lease.wanted = True
            self.snapshot_due = True

    def _confirm(self, signed: SignedHead) -> None:
        if signed.head.at_us > self.engine.as_of_us:
            self.engine.as_of_us, self.head_document = signed.head.at_us, signed.document

    @staticmethod
    def _empty(version: tuple[int, int]) -> Rulebook:
        """Of a deployment to which nothing was ever pushed, as the control plane says itself: that is a state."""
        return Rulebook(Catalog(), generation=version[0], revision=version[1], observe=False)

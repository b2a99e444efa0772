"""Publishers, Redis, databases and sidecars under a seeded scheduler: real cores over models of what lies between.

After every step, for every sidecar that serves: bundle, licenses and absences are those of the one revision in force;
no revision is older than an earlier one of the same sidecar, also over restarts; ``as_of`` claims nothing that was not
checked; whoever ``push --wait`` does not wait for has confirmed or answers ``stale``. At the end, when everything works
again, every sidecar reaches the newest revision within ``HEAL_S``.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any, Final

from licet.domain.catalog import Catalog, License
from licet.wire.documents import BUNDLE, HEAD, LICENSE, Head, Heartbeat
from licet.wire.registers import HOLD_MARGIN_S, Pair
from licet.wire.signing import Statement
from licet_control_plane.core import fleet
from licet_control_plane.core.contents import Contents, Expected, Found, assess
from licet_control_plane.core.lost import head_version, new_generation, newest_acted
from licet_control_plane.core.publishing import (
    COPYING,
    Restore,
    Write,
    contiguous,
    is_repeat,
    is_written_again,
    restoring,
)
from licet_sidecar.core import following
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.following import Bundle, Following, Inconsistent, SignedHead, Unchecked
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.core.rulebook import Rulebook
from licet_sidecar.core.sync import Change
from licet_sidecar.core.tenant import Tenant

DEPLOYMENT: Final = "d" * 32
TENANTS: Final = ("a", "b", "c", "d")
STALENESS_S: Final = 300.0
LEASE_S: Final = 15.0
STEPS: Final = 400
HEAL_S: Final = 30.0
TRACE_KEPT: Final = 60


class Violation(AssertionError):
    """A promise was broken. The message says which, and by which seed."""


class Rule(Enum):
    """What an ablation leaves out, of what is not in a core: Lua, SQL, and the order of writes."""

    SET_IF_NEWER = auto()
    HEAD_ON_THE_SAME_RUN = auto()
    HEAD_AT_THE_END_OF_THE_STREAM = auto()
    LOCKED_UNTIL_COMMITTED = auto()
    CONTIGUOUS = auto()
    DOCUMENT_BEFORE_ENTRY = auto()
    REFUSED_UNLESS_REPEATED = auto()
    REFUSE_WHEN_NEWER = auto()
    REPUBLISH_ON_A_NEW_RUN = auto()
    REPUBLISH_BEFORE_THE_SENTINEL = auto()
    NOTED_BY_WHO_LEADS = auto()
    TIME_OF_THE_CHECK = auto()
    FLOOR_ON_DISK = auto()
    EVICTED_FROM_DISK = auto()
    NOTHING_NEWER_AFTER_A_LOSS = auto()
    GENERATION_ABOVE_WHAT_IS_THERE = auto()
    NOTHING_OF_A_GENERATION_BEFORE = auto()
    BEHIND_WHO_ACTED_ON_MORE = auto()
    BEHIND_THE_HEAD = auto()


class Down(Exception):
    """The server cannot be reached."""


class Overtaken(Exception):
    """Another publisher took over."""


class Stopped(Exception):
    """The publisher must not go on."""


@dataclass(frozen=True)
class Document:
    """A signed document. ``id`` is its digest; ``at`` when it was committed."""

    kind: str
    key: str
    generation: int
    revision: int
    id: int
    at: float

    @property
    def version(self) -> tuple[int, int]:
        """As newer and older."""
        return (self.generation, self.revision)

    def statement(self) -> Statement:
        """What the signature covers."""
        return Statement(DEPLOYMENT, self.kind, self.key, self.generation, self.revision, None)


@dataclass
class Server:
    """One Redis server's worth of data."""

    run: str
    sentinel: int | None = None
    documents: dict[str, Document] = field(default_factory=dict)
    marks: set[str] = field(default_factory=set)
    stream: list[tuple[int, str, str, int]] = field(default_factory=list)
    last_id: int = 0
    head: SignedHead | None = None
    heartbeats: dict[str, Heartbeat] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The revision of the last entry."""
        return self.stream[-1][0] if self.stream else 0

    def fork(self, run: str) -> Server:
        """A server with the same data."""
        other = copy.copy(self)
        other.run, other.documents, other.marks = run, dict(self.documents), set(self.marks)
        other.stream, other.heartbeats = list(self.stream), dict(self.heartbeats)
        return other

    def wipe(self) -> None:
        """FLUSHALL."""
        self.__init__(self.run)  # type: ignore[misc]

    def set_if_newer(self, document: Document, *, always: bool) -> None:
        """``set_if_newer.lua``."""
        old = self.documents.get(document.key)
        if always or old is None or old.version < document.version:
            self.documents[document.key] = document

    def add(self, revision: int, kind: str, key: str, digest: int) -> bool:
        """XADD with an id."""
        if revision <= self.last_id:
            return False
        self.stream.append((revision, kind, key, digest))
        self.last_id = revision
        return True


@dataclass
class Database:
    """The system of record. ``rows`` are committed revisions, ascending; ``published`` up to which they were."""

    generation: int = 1
    revision: int = 0
    epoch: int = 0
    run: str = ""
    published: int = 0
    rows: list[Document] = field(default_factory=list)
    holder: str = ""
    holds_until: float = 0.0
    lineage: int = 0

    def fork(self) -> Database:
        """A backup."""
        return replace(self, rows=list(self.rows))

    def newest(self, key: str, *, up_to: int) -> Document | None:
        """The newest document of a key."""
        return next((row for row in reversed(self.rows) if row.key == key and row.revision <= up_to), None)

    def all_keys(self) -> Iterable[str]:
        """Of all documents."""
        return dict.fromkeys(row.key for row in self.rows)

    @property
    def version(self) -> tuple[int, int]:
        """The newest."""
        return (self.generation, self.revision)


class SimulatedPublisher:
    """One control plane. ``steps`` is its loop, at each of whose stops it can be paused, overtaken or killed."""

    def __init__(self, simulation: SyncSimulation, name: str) -> None:
        self.simulation = simulation
        self.name = name
        self.new_generation = False
        self.start()

    def start(self) -> None:
        """A new process."""
        self.stopped = ""
        self.server: Server | None = None
        self.loaded = False
        self.renewed = -math.inf
        self.revision = 0
        self.epoch = 0
        self.steps = self._run()

    def _at(self) -> Server:
        """The server it is connected to: a connection can break, and then leads to the one that took over."""
        simulation = self.simulation
        if self.server is not simulation.server and (
            self.server is not simulation.old or simulation.chance.random() < 0.3
        ):
            self.server = simulation.server
        assert self.server is not None
        return self.server

    def _run(self) -> Generator[None]:
        while True:
            self.server = self.simulation.reached()
            try:
                yield from self._round()
            except Overtaken:
                self.loaded, self.renewed = False, -math.inf
            except Stopped as stop:
                self.stopped = str(stop)
                return

    def _round(self) -> Generator[None]:
        simulation, database = self.simulation, self.simulation.database
        yield
        if database.holder != self.name and database.holds_until > simulation.now:
            self.loaded = False
            return
        if simulation.now - self.renewed >= LEASE_S:
            self.loaded = False
        self.renewed = simulation.now
        database.holder, database.holds_until = self.name, simulation.now + LEASE_S
        if not self.loaded:
            self.revision, self.epoch, self.loaded = database.published, database.epoch, True
        found = yield from self._look(database)
        if found is None:
            return
        read_at = yield from self._copy(database)
        head = Head(
            int(read_at * 1e6) if simulation.keeps(Rule.TIME_OF_THE_CHECK) else int(simulation.now * 1e6) + 1_000_000,
            found.run_id,
            self.epoch,
            1,
            1,
            bundle.revision if (bundle := database.newest(BUNDLE, up_to=self.revision)) else 0,
        )
        signed = SignedHead(b"", Statement(DEPLOYMENT, HEAD, HEAD, database.generation, self.revision, None), head)
        yield
        simulation.set_head(self._at(), self.epoch, signed)

    def _found(self) -> Found:
        server = self._at()
        manifest = server.documents.get(BUNDLE)
        bundle = self.simulation.database.newest(BUNDLE, up_to=self.revision)
        return Found(
            server.run,
            DEPLOYMENT if server.sentinel is not None else "",
            server.sentinel or 0,
            server.end,
            manifest is not None and (bundle is None or manifest.version >= bundle.version),
            last_is_own=self._is_own(server) or not self.simulation.keeps(Rule.REFUSE_WHEN_NEWER),
            generation=manifest.generation if manifest is not None else 0,
            head=self._named(server),
            acted=self._acted(server),
        )

    def _named(self, server: Server) -> tuple[int, int]:
        if not self.simulation.keeps(Rule.BEHIND_THE_HEAD):
            return (0, 0)
        generation = self.simulation.database.generation
        statement = server.head.statement if server.head is not None else None
        return head_version(statement, deployment=DEPLOYMENT, generation=generation)

    def _acted(self, server: Server) -> tuple[int, int]:
        generation = self.simulation.database.generation
        newest = newest_acted(server.heartbeats.values(), deployment=DEPLOYMENT, generation=generation)
        return newest.acted if newest is not None and self.simulation.keeps(Rule.BEHIND_WHO_ACTED_ON_MORE) else (0, 0)

    def _is_own(self, server: Server) -> bool:
        if not server.stream:
            return True
        revision, *_, digest = server.stream[-1]
        database = self.simulation.database
        own = {row.revision: row.id for row in database.rows if row.generation == database.generation}
        return own.get(revision, digest) == digest

    def _is_current(self, row: Document) -> bool:
        current = self.simulation.database.generation
        return is_written_again(row.generation, current=current) or not self.simulation.keeps(
            Rule.NOTHING_OF_A_GENERATION_BEFORE
        )

    def _verdict(self, found: Found, database: Database) -> Contents:
        bundle = database.newest(BUNDLE, up_to=self.revision)
        has_manifest = bundle is not None and self._is_current(bundle)
        expected = Expected(
            DEPLOYMENT,
            database.generation,
            self.epoch,
            self.revision,
            max(database.published, self.revision),
            max(database.revision, self.revision),
            has_manifest,
            database.run,
        )
        verdict = assess(found, expected)
        if verdict is Contents.NEWER and not self.simulation.keeps(Rule.REFUSE_WHEN_NEWER):
            return Contents.INTACT
        return verdict

    def _look(self, database: Database) -> Generator[None, None, Found | None]:
        yield
        found = self._found()
        if self.new_generation:
            self.simulation.start_generation(database, found)
            self.new_generation = False
            self.revision, self.epoch = database.published, database.epoch
        verdict = self._verdict(found, database)
        if verdict in (Contents.LOST, Contents.INCOMPLETE, Contents.NEW_RUN):
            yield from self._restore(found, verdict, database)
            yield
            found = self._found()
            verdict = self._verdict(found, database)
        if verdict in (Contents.NEWER, Contents.FOREIGN):
            raise Stopped("newer")
        if verdict is not Contents.INTACT:
            return None
        if found.epoch != self.epoch and (server := self._at()).sentinel is not None:
            server.sentinel = self.epoch
        self.simulation.take_heartbeats(self._at())
        return found

    def _restore(self, found: Found, verdict: Contents, database: Database) -> Generator[None]:
        steps = restoring(verdict, new_run=found.run_id != database.run)
        if verdict is Contents.NEW_RUN and not self.simulation.keeps(Rule.REPUBLISH_ON_A_NEW_RUN):
            steps = (Restore.RUN_NOTED,)
        if not self.simulation.keeps(Rule.REPUBLISH_BEFORE_THE_SENTINEL):
            steps = tuple(step for step in reversed(steps) if step is not Restore.MARKS_BEGUN)
            steps = (Restore.MARKS_BEGUN, *steps) if verdict is Contents.LOST else steps
        for step in steps:
            yield
            self.simulation.note(f"{self.name} restores {step.name}")
            match step:
                case Restore.MARKS_BEGUN:
                    self.simulation.heartbeats_were_lost()
                    database.epoch = self.epoch = max(database.epoch, found.epoch) + 1
                case Restore.DOCUMENTS:
                    if verdict is Contents.LOST and self.simulation.keeps(Rule.NOTHING_NEWER_AFTER_A_LOSS):
                        server, published = self._at(), (database.generation, self.revision)
                        for one in [*server.documents.values()]:
                            if one.kind == LICENSE and one.version > published:
                                del server.documents[one.key]
                    for key in database.all_keys():
                        row = database.newest(key, up_to=self.revision)
                        if row is not None and self._is_current(row):
                            self._write(row)
                            yield
                case Restore.STREAM_END if self.revision > found.last_revision:
                    server = self._at()
                    own = {row.revision: row.id for row in database.rows}
                    entry = (self.revision, "resync", "", own.get(self.revision, -1))
                    if not server.add(*entry) and server.end < self.revision:
                        server.stream, server.last_id = [entry], self.revision
                case Restore.SENTINEL:
                    self._at().sentinel = self.epoch
                case Restore.RUN_NOTED:
                    if database.holder == self.name or not self.simulation.keeps(Rule.NOTED_BY_WHO_LEADS):
                        database.run = found.run_id

    def _copy(self, database: Database) -> Generator[None, None, float]:
        while True:
            read_at = self.simulation.now
            yield
            rows = [row for row in database.rows if row.revision > self.revision]
            if self.simulation.keeps(Rule.CONTIGUOUS):
                rows = rows[: contiguous([row.revision for row in rows], after=self.revision)]
            if not rows:
                return read_at
            for row in rows:
                order = COPYING if self.simulation.keeps(Rule.DOCUMENT_BEFORE_ENTRY) else tuple(reversed(COPYING))
                for write in order:
                    yield
                    if write is Write.LIMITS and row.kind == LICENSE:
                        self._at().marks.add(row.key)
                    if write is Write.DOCUMENT:
                        self._write(row)
                    if write is Write.ENTRY:
                        self._announce(row)
                self.revision = row.revision
            yield
            leads = database.holder == self.name and database.epoch == self.epoch
            if not leads and self.simulation.keeps(Rule.NOTED_BY_WHO_LEADS):
                self.loaded = False
                raise Overtaken
            database.published = max(database.published, self.revision)

    def _write(self, row: Document) -> None:
        if row.kind == LICENSE:
            self._at().marks.add(row.key)
        self.simulation.note(f"{self.name} writes {row.version} {row.key} on {self._at().run}")
        self._at().set_if_newer(row, always=not self.simulation.keeps(Rule.SET_IF_NEWER))

    def _announce(self, row: Document) -> None:
        server = self._at()
        if not server.add(row.revision, row.kind, row.key, row.id):
            there = next((digest for revision, *_, digest in server.stream if revision == row.revision), None)
            refuses = self.simulation.keeps(Rule.REFUSED_UNLESS_REPEATED)
            if refuses and not is_repeat(str(row.id), None if there is None else str(there)):
                raise Stopped(f"refused {row.revision}")
        self.simulation.note(f"{self.name} announces {row.version} {row.key} on {server.run}")


@dataclass
class Disk:
    """What outlives a sidecar's process."""

    floor: tuple[int, int] = (0, 0)
    version: tuple[int, int] = (0, 0)
    bundle: Document | None = None
    licenses: tuple[Document, ...] = ()
    head: SignedHead | None = None


@dataclass
class Proceeding:
    """A procedure of a core: what it asked for, and the answer that is on its way."""

    steps: following.Steps
    wants: following.Step
    answer: Any = None
    answered: bool = False


class SimulatedSidecar:
    """One sidecar: its core, its disk, and what it was seen to answer from."""

    def __init__(self, simulation: SyncSimulation, name: str) -> None:
        self.simulation = simulation
        self.name = name
        self.disk = Disk()
        self.alive = False
        self.cut_off = False
        self.answered: tuple[int, int] = (0, 0)
        self.pulses: list[tuple[SignedHead | None, str]] = []
        self.incarnation = 0
        self.pulsed = 0.0

    def start(self) -> None:
        """A new process."""
        self.alive = True
        self.incarnation += 1
        self.engine = Engine(LeaseBook(1), tenants_max=self.simulation.tenants_max, staleness_us_max=1)
        self.following = self.simulation.make(self.engine, self._note_floor)
        self.proceedings: dict[str, Proceeding] = {}
        self.pulses.clear()
        disk = self.disk
        if self.simulation.keeps(Rule.FLOOR_ON_DISK):
            self.following.state.floor = disk.floor
        if disk.bundle is not None:
            known = [tenant_of(one) for one in disk.licenses]
            try:
                self.following.restore(following.Snapshot(disk.version, bundle_of(disk.bundle), known))
                if disk.head is not None:
                    self.following.restore_age(disk.head)
            except Inconsistent:
                pass

    def _note_floor(self, version: tuple[int, int]) -> None:
        self.disk.floor = max(self.disk.floor, version)

    def save(self) -> None:
        """Writes the snapshot when it is due, else the head."""
        state = self.following
        if state.bundle is None:
            return
        if state.snapshot_due:
            state.snapshot_due = False
            documents = self.simulation.documents
            licenses = tuple(documents[int(tenant.document)] for tenant in self.engine.tenants.values())
            if not self.simulation.keeps(Rule.EVICTED_FROM_DISK):
                known = {one.key: one for one in self.disk.licenses}
                licenses = tuple({**known, **{one.key: one for one in licenses}}.values())
            self.disk.version = state.state.version
            self.disk.bundle = documents[int(state.bundle.document)]
            self.disk.licenses = licenses
        if state.head_document:
            self.disk.head = self.simulation.heads[int(state.head_document)]

    @property
    def serves(self) -> bool:
        """Whether it answers."""
        return self.alive and self.engine.rulebook is not None and self.following.state.may_serve()

    def ask(self, tenant: str) -> None:
        """A check: loads what is not known."""
        if not self.serves:
            return
        if tenant in self.engine.tenants:
            self.engine.tenants.move_to_end(tenant)
        elif tenant not in self.proceedings and not self.engine.is_absent(tenant, self.simulation.boot_ms):
            self._begin(tenant, self.following.load(tenant))

    def _begin(self, name: str, steps: following.Steps) -> None:
        try:
            self.proceedings[name] = Proceeding(steps, next(steps))
        except (StopIteration, Inconsistent, Unchecked):
            self.proceedings.pop(name, None)

    def step(self) -> None:
        """Something goes on: a request is carried out, or its answer arrives."""
        if "" not in self.proceedings:
            self._begin("", self.following.follow())
        name = self.simulation.chance.choice(list(self.proceedings))
        proceeding = self.proceedings[name]
        if not proceeding.answered:
            self._carry_out(proceeding)
            if self.simulation.chance.random() < 0.4:
                return  # the answer is on its way
        if proceeding.answered:
            before = self.following.installs
            self._deliver(name, proceeding)
            if before != self.following.installs:
                self.simulation.note(f"{self.name} is at {self.following.state.version} of {self.following.state.run}")

    def _carry_out(self, proceeding: Proceeding) -> None:
        wants = proceeding.wants
        if isinstance(wants, following.AwaitMoment):
            proceeding.answered = True
            return
        if isinstance(wants, following.AwaitInstall):
            proceeding.answered = self.following.installs > wants.after
            return
        if isinstance(wants, following.ReadChanges) and self.following.wants_resync:
            proceeding.answer, proceeding.answered = ([], ""), True
            return
        try:
            if self.cut_off or self.simulation.chance.random() < self.simulation.lost_share:
                raise Down
            proceeding.answer = self._read(wants, self.simulation.reached())
        except (Down, Inconsistent) as error:
            proceeding.answer = error
        proceeding.answered = proceeding.answer is not None

    def _read(self, wants: following.Step, server: Server) -> Any:
        """What the server says; ``None`` while a blocking read waits."""
        match wants:
            case following.ReadHead():
                return server.head, server.run
            case following.ReadBundle():
                return bundle_of(self._document(server, BUNDLE)), server.run
            case following.ReadLicenses(tenants):
                there = {name: server.documents.get(name) for name in tenants}
                return {name: self._tenant(one) if one else None for name, one in there.items()}, server.run
            case following.ReadLicense(tenant):
                document = server.documents.get(tenant)
                return following.LicenseRead(
                    self._tenant(document) if document else None,
                    Pair(1, "r") if tenant in server.marks else Pair(0, ""),
                    server.head,
                    server.run,
                    self.simulation.boot_ms,
                )
            case following.ReadChanges(after):
                found = [Change(revision, kind, key) for revision, kind, key, _ in server.stream if revision > after]
                if not found and self.simulation.chance.random() < 0.5:
                    return None
                return found, server.run
        raise AssertionError(wants)

    @staticmethod
    def _document(server: Server, key: str) -> Document:
        found = server.documents.get(key)
        if found is None:
            raise Inconsistent(f"{key} is missing")
        return found

    def _tenant(self, document: Document) -> Tenant:
        held = self.engine.tenants.get(document.key)
        return held if held is not None and int(held.document) == document.id else tenant_of(document)

    def _deliver(self, name: str, proceeding: Proceeding) -> None:
        answer, proceeding.answer, proceeding.answered = proceeding.answer, None, False
        try:
            if isinstance(answer, Exception):
                proceeding.wants = proceeding.steps.throw(answer)
            else:
                proceeding.wants = proceeding.steps.send(answer)
        except (StopIteration, Inconsistent, Unchecked, Down) as end:
            if not isinstance(end, StopIteration):
                self.simulation.note(f"{self.name} {name or 'follows'}: {end}")
            del self.proceedings[name]

    def pulse(self) -> None:
        """A heartbeat goes out and a head comes back, at once or later."""
        if self.cut_off or self.simulation.chance.random() < self.simulation.lost_share:
            return
        server = self.simulation.reached()
        server.heartbeats[self.name] = self._heartbeat()
        self.pulsed = self.simulation.now if server is self.simulation.server else math.inf
        self.pulses.append((server.head, server.run))
        if self.simulation.chance.random() < 0.8:
            self.hear()

    def hear(self) -> None:
        """A head that was on its way arrives, perhaps not the first one."""
        if self.pulses:
            signed, run = self.pulses.pop(self.simulation.chance.randrange(len(self.pulses)))
            if signed is not None:
                self.following.take_head(signed, run)

    def _heartbeat(self) -> Heartbeat:
        generation, revision = self.following.state.version
        at_us = int(self.simulation.now * 1e6)
        as_of_us = self.engine.as_of_us
        return Heartbeat(
            self.name,
            self.incarnation,
            at_us,
            0,
            "",
            "",
            True,
            False,
            generation,
            revision,
            as_of_us,
            0,
            "",
            0,
            0,
            0,
            0,
            deployment=self.following.state.deployment,
            acted_generation=self.following.state.floor[0],
            acted_revision=self.following.state.floor[1],
        )

    def ask_second_route(self) -> None:
        """While it is cut off, the control plane is asked itself."""
        simulation, state = self.simulation, self.following
        have = state.state.version if self.engine.rulebook is not None else (0, 0)
        known, database, now = list(self.engine.tenants), simulation.database, simulation.now
        changed = have != database.version
        bundle = database.newest(BUNDLE, up_to=database.revision) if changed else None
        found = {key: database.newest(key, up_to=database.revision) for key in (known if changed else ())}
        statement = Statement(DEPLOYMENT, HEAD, HEAD, database.generation, database.revision, None)
        signed = simulation.sign_head(SignedHead(b"", statement, Head(int(now * 1e6), "", 1, 1)))
        try:
            state.take_snapshot(
                following.Snapshot(
                    database.version,
                    bundle_of(bundle) if bundle else None,
                    [self._tenant(one) for one in found.values() if one is not None],
                ),
                signed,
                have=have,
                wanted=(),
                absent=[key for key, one in found.items() if one is None],
                boot_ms=simulation.boot_ms,
            )
        except Inconsistent:
            pass


def bundle_of(document: Document) -> Bundle:
    """A document as a sidecar reads it."""
    rulebook = Rulebook(Catalog(), generation=document.generation, revision=document.revision, observe=False)
    return Bundle(document.statement(), str(document.id).encode(), {}, rulebook)


def tenant_of(document: Document) -> Tenant:
    """The same of a license."""
    license_ = License(document.key, "pro")
    body = str(document.id).encode()
    return Tenant(license_, generation=document.generation, revision=document.revision, document=body)


class SyncSimulation:
    """One history. ``without`` leaves a rule out; ``make`` makes the sidecars' cores."""

    def __init__(
        self,
        seed: int,
        *,
        without: Rule | None = None,
        make: Callable[[Engine, Callable[[tuple[int, int]], None]], Following] = Following,
    ) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.without = without
        self.make = make
        self.now = 1_000.0
        self.runs = 1
        self.server = Server("run1")
        self.old: Server | None = None
        self.replica: Server | None = None
        self.database = Database()
        self.backup: Database | None = None
        self.restored = False
        self.lineages = [self.database]
        self.uncommitted: list[Document] = []
        self.documents: dict[int, Document] = {}
        self.heads: list[SignedHead] = []
        self.registry: dict[str, fleet.Sidecar] = {}
        self.looked = -math.inf
        self.complete_since = -math.inf
        self.refused: set[str] = set()
        self.trace: list[str] = []
        self.tenants_max = self.chance.choice((2, 4))
        self.lost_share = self.chance.choice((0.0, 0.05, 0.2))
        self.losses = self.chance.choice((0.0, 0.3, 1.5))
        self.restores = self.chance.choice((0.0, 0.0, 0.5))
        self.crashes = self.chance.choice((0.0, 0.5, 2.0))
        self.publishers = [SimulatedPublisher(self, f"p{number}") for number in range(self.chance.choice((1, 2)))]
        self.sidecars = [SimulatedSidecar(self, f"s{number}") for number in range(self.chance.choice((1, 2, 3)))]
        self.applied = 0

    @property
    def boot_ms(self) -> int:
        """The boot-time clock."""
        return int(self.now * 1_000)

    def keeps(self, rule: Rule) -> bool:
        """Whether a rule holds in this history."""
        return rule is not self.without

    def note(self, text: str) -> None:
        """Adds to the trace."""
        self.trace.append(f"{self.now:.2f} {text}")
        del self.trace[:-TRACE_KEPT]

    def reached(self) -> Server:
        """The server that a connection leads to: while one that was replaced lives on, some lead there."""
        return self.old if self.old is not None and self.chance.random() < 0.4 else self.server

    def run(self) -> None:
        """The whole history.

        Raises:
            Violation: a promise was broken.
        """
        self.commit(BUNDLE)
        for sidecar in self.sidecars:
            sidecar.start()
        steps: list[tuple[Callable[[], None], float]] = [
            (self.pass_time, 12),
            (self.publish, 60),
            (self.follow, 60),
            (self.pulse, 10),
            (self.ask, 14),
            (self.save, 4),
            (self.change, self.chance.choice((2, 8))),
            (self.commit_late, 3),
            (self.crash_publisher, self.crashes),
            (self.crash_sidecar, self.crashes),
            (self.cut_off, self.crashes / 2),
            (self.replicate, self.losses),
            (self.fail_over, self.losses),
            (self.end_old, self.losses),
            (self.restart_redis, self.losses / 3),
            (self.wipe, self.losses / 3),
            (self.trim, self.losses / 2),
            (self.evict_manifest, self.losses / 6),
            (self.back_up, self.restores),
            (self.restore_database, self.restores),
            (self.operate, 2),
        ]
        actions, weights = zip(*steps, strict=True)
        for _ in range(STEPS):
            (action,) = self.chance.choices(actions, weights)
            action()
            self.check()
        self.heal()

    # What is promised

    def check(self) -> None:
        """Of every sidecar that serves."""
        for sidecar in self.sidecars:
            if sidecar.serves:
                self._check_sidecar(sidecar)
        if self.registry and self.database.rows:
            self._check_rollout(self.chance.choice(self.database.rows[-3:]))

    def _check_sidecar(self, sidecar: SimulatedSidecar) -> None:
        version = sidecar.following.state.version
        if version < sidecar.answered:
            self._fail(f"{sidecar.name} went back from {sidecar.answered} to {version}")
        self.applied += version > sidecar.answered
        sidecar.answered = version
        if not any(self._is_state_of(lineage, sidecar) for lineage in self.lineages):
            held = {key: self.documents[int(one.document)] for key, one in sidecar.engine.tenants.items()}
            rulebook = sidecar.engine.rulebook
            self._fail(f"{sidecar.name} mixes revisions at {version}: {rulebook and rulebook.revision}, {held}")
        as_of = sidecar.engine.as_of_us / 1e6
        if self._is_state_of(self.database, sidecar):
            missed = [row for row in self.database.rows if row.at < as_of - 1e-5 and row.version > version]
            if missed:
                self._fail(f"{sidecar.name} at {version} claims to know all of {as_of}, and misses {missed[0]}")

    def _is_state_of(self, lineage: Database, sidecar: SimulatedSidecar) -> bool:
        generation, revision = sidecar.following.state.version
        if not any(row.version == (generation, revision) for row in lineage.rows):
            return False
        engine = sidecar.engine
        bundle = lineage.newest(BUNDLE, up_to=revision)
        held = sidecar.following.bundle
        if (bundle.id if bundle else -1) != (int(held.document) if held else -1):
            return False
        for name in TENANTS:
            newest, tenant = lineage.newest(name, up_to=revision), engine.tenants.get(name)
            if tenant is not None and (newest is None or newest.id != int(tenant.document)):
                return False
            if tenant is None and newest is not None and engine.is_absent(name, self.boot_ms):
                return False
        return True

    def _check_rollout(self, row: Document) -> None:
        done = fleet.rollout(
            self.registry.values(),
            generation=row.generation,
            revision=row.revision,
            published=row.revision <= self.database.published,
            staleness_s_max=STALENESS_S,
            looked_s=self.looked,
            complete_since_s=self.complete_since,
        ).done
        for sidecar in self.sidecars if done else ():
            known = self.registry.get(sidecar.name)
            if known is None or known.heartbeat.incarnation != sidecar.incarnation:
                continue  # it was not heard of since it was started
            if sidecar.pulsed >= self.looked or sidecar.engine.as_of_us / 1e6 > sidecar.pulsed:
                continue  # it came back a moment ago, and was not heard of since: see docs/guarantees.md, P4
            if not sidecar.serves or sidecar.following.state.version >= row.version:
                continue
            if self.now - sidecar.engine.as_of_us / 1e6 <= STALENESS_S - 2:
                self._fail(f"push --wait returned, and {sidecar.name} answers from before {row.version}, not stale")

    def _fail(self, what: str) -> None:
        raise Violation(f"seed {self.seed}: {what}\n" + "\n".join(self.trace))

    def heal(self) -> None:
        """Everything works again: in the end everybody is at the newest revision, and known to be."""
        self.note("heal")
        self.end_old()
        self.lost_share = 0.0
        for one in self.uncommitted:
            self.database.rows.append(one)
        self.uncommitted.clear()
        self.database.rows.sort(key=lambda row: row.revision)
        for sidecar in self.sidecars:
            sidecar.cut_off = False
            if not sidecar.alive:
                sidecar.start()
        began = self.now
        ends = began + HEAL_S + LEASE_S
        while not self._settled(began):
            if self.now > ends and self.restored:
                # One of them acted on what the backup, and Redis, do not know: an operator sees who does not confirm.
                self._begin_generation()
                ends = self.now + HEAL_S
            elif self.now > ends:
                states = {one.name: one.following.state.version for one in self.sidecars}
                self._fail(f"not everybody reached {self.database.version}: {states}")
            self.now += 0.05
            self.operate()
            for publisher in self.publishers:
                for _ in range(10):
                    next(publisher.steps, None)
            for sidecar in self.sidecars:
                for _ in range(5):
                    sidecar.step()
                sidecar.ask(self.chance.choice(TENANTS))
                if self.chance.random() < 0.2:
                    sidecar.pulse()
            self.check()

    def _settled(self, began: float) -> bool:
        if self.database.published < self.database.revision:
            return False
        for sidecar in self.sidecars:
            known = self.registry.get(sidecar.name)
            if not sidecar.serves or sidecar.following.state.version != self.database.version:
                return False
            if sidecar.engine.as_of_us / 1e6 <= began or known is None:
                return False
            if not known.has_confirmed(*self.database.version):
                return False
        return True

    # What happens

    def pass_time(self) -> None:
        """Some of it."""
        self.now += self.chance.choice((0.01, 0.1, 0.5, 1.0, 5.0, self.chance.choice((20.0, 40.0, 350.0))))

    def publish(self) -> None:
        """A publisher goes on."""
        publisher = self.chance.choice(self.publishers)
        for _ in range(self.chance.choice((1, 1, 4, 12))):
            next(publisher.steps, None)

    def follow(self) -> None:
        """A sidecar goes on."""
        if (sidecar := self._some_alive()) is not None:
            for _ in range(self.chance.choice((1, 1, 3, 8))):
                sidecar.step()
                self.check()

    def pulse(self) -> None:
        """A sidecar's second is over."""
        if (sidecar := self._some_alive()) is not None:
            self.chance.choice((sidecar.pulse, sidecar.pulse, sidecar.hear))()
            if sidecar.cut_off and self.chance.random() < 0.5:
                sidecar.ask_second_route()

    def ask(self) -> None:
        """A service asks."""
        if (sidecar := self._some_alive()) is not None:
            sidecar.ask(self.chance.choice(TENANTS))

    def save(self) -> None:
        """A snapshot is written."""
        if (sidecar := self._some_alive()) is not None:
            sidecar.save()

    def change(self) -> None:
        """Somebody pushes, or changes a license."""
        self.commit(self.chance.choice((BUNDLE, *TENANTS)))

    def commit(self, key: str) -> None:
        """A revision is allocated, under a lock that is held until it is committed."""
        database = self.database
        database.revision += 1
        row = self._document(key, database)
        if not self.keeps(Rule.LOCKED_UNTIL_COMMITTED) and self.chance.random() < 0.3:
            self.uncommitted.append(row)
            return
        database.rows.append(row)
        database.rows.sort(key=lambda one: one.revision)
        self.note(f"commits {row.version} {key}")

    def commit_late(self) -> None:
        """Only where the lock was left out."""
        if self.uncommitted:
            self.database.rows.append(replace(self.uncommitted.pop(0), at=self.now))
            self.database.rows.sort(key=lambda one: one.revision)

    def _document(self, key: str, database: Database) -> Document:
        kind = BUNDLE if key == BUNDLE else LICENSE
        made = Document(kind, key, database.generation, database.revision, len(self.documents), self.now)
        self.documents[made.id] = made
        return made

    def crash_publisher(self) -> None:
        """It is started again at once."""
        self.chance.choice(self.publishers).start()

    def crash_sidecar(self) -> None:
        """Or one that crashed is started."""
        sidecar = self.chance.choice(self.sidecars)
        self.note(f"{sidecar.name} {'crashes' if sidecar.alive else 'starts'}")
        if sidecar.alive:
            sidecar.alive = False
        else:
            sidecar.start()

    def cut_off(self) -> None:
        """Or one that was is not any more."""
        sidecar = self.chance.choice(self.sidecars)
        sidecar.cut_off = not sidecar.cut_off

    def replicate(self) -> None:
        """A replica has everything up to now."""
        self.replica = self.server.fork("")

    def fail_over(self) -> None:
        """To a replica that lags; the server before lives on for a while."""
        if self.replica is not None:
            self.old, self.server, self.replica = self.server, self.replica, None
            self.server.run = self._new_run()
            self._lose_heartbeats(self.old.heartbeats)
            self.note(f"fails over to {self.server.run} at {self.server.end}")

    def _lose_heartbeats(self, sent: dict[str, Heartbeat]) -> None:
        """Of those that were in a server which was replaced or emptied, nobody hears of some."""
        for sidecar in self.sidecars:
            if sidecar.name in sent and not self._keeps_heartbeat(sidecar, sent[sidecar.name].at_us):
                sidecar.pulsed = math.inf  # nobody hears of it before its next heartbeat

    def _keeps_heartbeat(self, sidecar: SimulatedSidecar, sent: int) -> bool:
        """Whether the newest one is in Redis, or was taken into the registry."""
        known = self.registry.get(sidecar.name)
        kept = self.server.heartbeats.get(sidecar.name)
        return max(known.heartbeat.at_us if known else -1, kept.at_us if kept else -1) >= sent

    def end_old(self) -> None:
        """The server that was replaced ends."""
        self.old = None

    def restart_redis(self) -> None:
        """With what it had."""
        self.server.run = self._new_run()

    def wipe(self) -> None:
        """All is lost; whoever lost the newest database too began on another server."""
        sent = self.server.heartbeats
        self.server.wipe()
        self._lose_heartbeats(sent)
        if self.restored or self.chance.random() < 0.5:
            self.server.run = self._new_run()
        self.note("wipes")

    def trim(self) -> None:
        """Entries are lost, the oldest, the newest or one of them; or all of them, with the stream."""
        stream = self.server.stream
        kind = self.chance.randrange(4)
        if kind == 0:
            self.server.stream, self.server.last_id = [], 0
        elif stream:
            del stream[self.chance.choice((0, -1, self.chance.randrange(len(stream))))]
        self.note("trims")

    def evict_manifest(self) -> None:
        """A key is lost."""
        self.server.documents.pop(BUNDLE, None)

    def back_up(self) -> None:
        """The database is."""
        self.backup = self.database.fork()

    def restore_database(self) -> None:
        """From a backup; sometimes Redis is lost with it."""
        if self.backup is None or self.restored:
            return
        self.database, self.backup, self.restored = self.backup, None, True
        self.database.holds_until = 0.0
        self.lineages.append(self.database)
        self.uncommitted.clear()
        if self.chance.random() < 0.4:
            self.server, self.old, self.replica = Server(self._new_run()), None, None
        self.note(f"restores the database at {self.database.version}")
        for publisher in self.publishers:
            publisher.start()

    def operate(self) -> None:
        """An operator looks after what stopped, as the publisher says: restarts what a change was refused to, and
        orders a new generation when it is refused again.

        It is refused again where a publisher that was paused in a batch wrote the rest of it after Redis was wiped, or
        an entry was lost before it was noted that it is there: the stream has gone past a change that it does not hold.
        Stopping is what the protocol says of that, so starting it again and again would never end.
        """
        stopped = [one for one in self.publishers if one.stopped]
        if not stopped or any(one.new_generation for one in self.publishers):
            return
        refused = {one.stopped for one in stopped}
        if "newer" in refused or refused & self.refused:
            self._begin_generation()
            refused = set()
        self.refused |= refused
        for one in stopped:
            one.start()

    def _begin_generation(self) -> None:
        self.note("a new generation is ordered")
        for publisher in self.publishers:
            publisher.start()
        self.database.holds_until = 0.0
        self.publishers[0].new_generation = True

    def start_generation(self, database: Database, found: Found) -> None:
        """``publisher/generation.py``: everything again, above all that Redis has seen, and the rest withdrawn."""
        seen = (
            [found.generation, found.head[0], found.acted[0]] if self.keeps(Rule.GENERATION_ABOVE_WHAT_IS_THERE) else []
        )
        database.generation = new_generation(database.generation, seen)
        database.epoch = max(database.epoch, found.epoch) + 1
        database.revision = max(database.revision, found.last_revision, found.head[1])
        database.published = database.revision
        keys = [*database.all_keys()]
        keys += [key for key in self.server.documents if key not in keys]
        for key in keys:
            database.revision += 1
            database.rows.append(self._document(key, database))
        self.restored = False

    def set_head(self, server: Server, epoch: int, signed: SignedHead) -> None:
        """``head.lua``."""
        if server.sentinel != epoch:
            return
        if signed.head.run_id != server.run and self.keeps(Rule.HEAD_ON_THE_SAME_RUN):
            return
        if server.end != signed.statement.revision and self.keeps(Rule.HEAD_AT_THE_END_OF_THE_STREAM):
            return
        if not self.keeps(Rule.HEAD_ON_THE_SAME_RUN):
            signed = replace(signed, head=replace(signed.head, run_id=server.run))
        server.head = self.sign_head(signed)
        self.note(f"{server.run} is vouched for at {signed.statement.version}")

    def sign_head(self, signed: SignedHead) -> SignedHead:
        """A head whose bytes say which it is."""
        made = replace(signed, document=str(len(self.heads)).encode())
        self.heads.append(made)
        return made

    def heartbeats_were_lost(self) -> None:
        """``publisher/fleet.py``: perhaps some that nobody had looked at."""
        if self.now - self.looked > HOLD_MARGIN_S:
            self.complete_since = self.now

    def take_heartbeats(self, server: Server) -> None:
        """What a look brings: at the server that everybody is to use."""
        if server is not self.server:
            return
        self.looked = self.now
        for name, heartbeat in server.heartbeats.items():
            old = self.registry.get(name)
            if old is None or old.heartbeat.at_us < heartbeat.at_us:
                self.registry[name] = fleet.Sidecar(heartbeat, self.now)

    def _some_alive(self) -> SimulatedSidecar | None:
        alive = [one for one in self.sidecars if one.alive]
        return self.chance.choice(alive) if alive else None

    def _new_run(self) -> str:
        self.runs += 1
        return f"run{self.runs}"

"""A sidecar's services put together as ``bootstrap`` does, over fakes: no sockets, no Redis, time stands still."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp

from licet.domain.approvals import Override, counted_limits
from licet.domain.catalog import Catalog, License
from licet.domain.entitlements import entitlements_of, limits_of
from licet.v1 import approval_pb2 as pb
from licet.wire.signing import SigningKey, Verifier
from licet.wire.usage import UsageEvent, unpack_event
from licet_sidecar.adapters.state_directory import StateDirectory
from licet_sidecar.adapters.usage_log import LogHeader, UsageLog, floor_record, seat_record
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.core.reservations import ReservationBook
from licet_sidecar.core.seats import SeatBook
from licet_sidecar.ports import LinkDown, PulseReport
from licet_sidecar.services import reservation_records, syncing
from licet_sidecar.services.access import AccessService
from licet_sidecar.services.approval import ApprovalService
from licet_sidecar.services.durability import DurabilityGate
from licet_sidecar.services.explaining import ExplainingService
from licet_sidecar.services.idempotency import RecentAnswers
from licet_sidecar.services.leasing import LeasingService
from licet_sidecar.services.link import LinkState
from licet_sidecar.services.seat_keeping import SeatKeeper
from licet_sidecar.services.seats import SeatService
from licet_sidecar.services.shipping import ShippingService
from licet_sidecar.services.syncing import SyncService
from licet_sidecar.services.tally import Tally
from tests.support.fake_clock import FakeClock
from tests.support.fake_lease_store import FakeLeaseStore, FakeRegisters
from tests.support.fake_seat_store import FakeSeats, FakeSeatStore
from tests.support.fake_second_route import FakeSecondRoute
from tests.support.fake_state_source import FakePublisher, FakeStateSource
from tests.support.fake_usage_sink import FakeUsageSink
from tests.support.published import KEY

SIDECAR: Final = "5" * 32
EPOCH: Final = 1
WAIT_S_MAX: Final = 90.0


async def until(condition: Callable[[], object], *, within_s: float = WAIT_S_MAX) -> None:
    """Lets others run until ``condition`` is true."""
    async with asyncio.timeout(within_s):
        for turn in itertools.count():
            if condition():
                return
            await asyncio.sleep(0 if turn < 100 else 0.001)


class World:
    """What outlives a sidecar: Redis, its publisher, the disk and the clock."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = FakeClock()
        self.source = FakeStateSource()
        self.publisher = FakePublisher(self.source)
        self.registers = FakeRegisters(now_ms=self.clock.us // 1_000, run_id=self.source.run_id)
        self.seats = FakeSeats(self.registers)
        self._catalog = Catalog()
        self._licenses: dict[str, License] = {}

    def push(self, content: Catalog, *, observe: bool = False, overrides: tuple[Override, ...] = ()) -> int:
        """Publishes a bundle, the limits that follow from it, and a head."""
        self._catalog = content
        return self._marked(self.publisher.push(content, observe=observe, overrides=overrides))

    def license(self, tenant: str, plan: str = "pro", **fields: Any) -> int:
        """Publishes a license, its limits, and a head."""
        self._licenses[tenant] = License(tenant, plan, **fields)
        return self._marked(self.publisher.license(self._licenses[tenant]))

    def quota(self, key: str) -> tuple[int, int]:
        """(sum, used) of the only quota of a limit."""
        (found,) = [one for (_, name), one in self.registers.contents.quotas.items() if name.startswith(f"{key}:")]
        return found.sum, found.used

    def advance(self, seconds: float) -> None:
        """Here and in Redis."""
        self.clock.advance(seconds)
        self.registers.now_ms += round(seconds * 1_000)

    def _marked(self, revision: int) -> int:
        for tenant, license_ in self._licenses.items():
            amounts = limits_of(entitlements_of(license_, self._catalog)) | counted_limits(license_.requests)
            if self.registers.begin(tenant, EPOCH):
                pair = self.registers.contents.marks[tenant].pair
                self.registers.open(tenant, pair, revision, amounts)
                self.source.pairs[tenant] = pair
            else:
                self.registers.publish_limits(tenant, revision, amounts)
        self.publisher.beat(self.clock.us, epoch=EPOCH)
        return revision


class FakeSidecar:
    """One process of a sidecar."""

    def __init__(
        self,
        world: World,
        *,
        sidecar: str = SIDECAR,
        incarnation: int = 1,
        log_bytes_max: int = 1 << 30,
        tenants_max: int = 1_000,
        staleness_us_max: int = 300_000_000,
        public_keys: tuple[SigningKey, ...] = (KEY,),
        second: FakeSecondRoute | None = None,
        directory: Path | None = None,
        moved: bool = False,
    ) -> None:
        self.second = second
        self.world = world
        clock = world.clock
        place = directory or (world.directory if sidecar == SIDECAR else world.directory / sidecar)
        place.mkdir(exist_ok=True)
        self.directory = StateDirectory(place)
        self.tally = Tally()
        self.link = LinkState()
        self.link.succeeded()
        self.log = UsageLog(place, bytes_max=log_bytes_max)
        self.recovered = self.log.recover(sidecar, incarnation - 1, moved=moved)
        self.leases = LeaseBook(incarnation)
        for (tenant, _), lease in self.recovered.leases.items():
            self.leases.restore(tenant, lease, clock.ms)
        self.reservations = ReservationBook()
        reservation_records.recover(self.reservations, self.recovered, self.leases, clock.us, clock.ms)
        self.engine = Engine(self.leases, tenants_max=tenants_max, staleness_us_max=staleness_us_max)
        self.store = FakeLeaseStore(world.registers, sidecar=sidecar, incarnation=incarnation)
        self.replaced: list[str] = []
        self.leasing = LeasingService(
            self.engine, self.store, self.log, clock, self.link, self.tally, on_replaced=self.replaced.append
        )
        prefix = incarnation.to_bytes(8, "big")
        self.log.start(
            LogHeader(sidecar, incarnation, incarnation - 1, 0, prefix, 1),
            [
                floor_record(*self.recovered.floor),
                *self.leasing.lease_records(),
                *reservation_records.records_of(self.reservations),
                *(seat_record(*key, packed) for key, packed in self.recovered.seats.items()),
            ],
        )
        self.heads: list[Any] = []
        self.sync = SyncService(
            self.engine,
            world.source,
            Verifier([key.public_key for key in public_keys]),
            self.directory,
            self.log,
            clock,
            self.link,
            self.tally,
            on_head=self.heads.append,
            second=second,
        )
        self.sync.restore(self.recovered.floor)
        self.recent = RecentAnswers(self.log, self.tally)
        self.recent.recover()
        self.sink = FakeUsageSink()
        self.shipping = ShippingService(self.log, Verifier([key.public_key for key in public_keys]), clock, self.tally)
        gate = DurabilityGate(self.engine, self.log, self.shipping, self.link, self.tally)
        self.service = ApprovalService(
            self.engine,
            self.log,
            clock,
            self.link,
            self.leasing,
            self.sync,
            self.recent,
            self.tally,
            self.reservations,
            gate,
        )
        self.seat_store = FakeSeatStore(world.seats, sidecar=sidecar, incarnation=incarnation)
        self.seats = SeatKeeper(
            self.engine,
            SeatBook(incarnation),
            self.seat_store,
            self.store,
            self.log,
            clock,
            self.link,
            self.tally,
        )
        for (tenant, _), packed in self.recovered.seats.items():
            self.seats.restore(tenant, packed)
        seats = SeatService(
            self.engine, self.seats, self.log, clock, self.link, self.sync, self.recent, self.tally, gate
        )
        self.service.register(seats.methods())
        explaining = ExplainingService(self.service, self.engine, clock, self.link, self.leasing, self.sync)
        self.service.register(explaining.methods())
        self.access = AccessService(self.service, self.engine, self.log, clock, self.link, self.sync)
        self.service.register(self.access.methods())
        self.service.register_streams(self.access.streams())
        self._syncing: asyncio.Task[None] | None = None
        self._ended = False

    def start(self) -> None:
        """Begins to follow what is published."""
        self._syncing = asyncio.get_running_loop().create_task(self.sync.run(), name="sync")

    async def synced(self, revision: int = 0) -> None:
        """Waits until everything published so far (or ``revision``) is in force."""
        wanted = revision or self.world.publisher.revision
        await until(lambda: self.sync.ready.is_set() and self.sync.state.revision >= wanted)

    def hear_head(self, head: bytes | None = None, *, run_id: str = "") -> None:
        """One pulse's worth of news: the newest head, or the one given."""
        source = self.world.source
        self.sync.take_head(PulseReport(head or source.head, {}, run_id or source.run_id))

    async def stop(self) -> None:
        """Ends the process in an orderly way, unless it ended already; what it holds stays held."""
        if self._ended:
            return
        self._ended = True
        await self.service.reserving.stop()
        await self.leasing.stop()
        await self.seats.stop()
        await cancel(self._syncing)
        self.log.close()
        self.directory.close()

    async def kill(self) -> None:
        """Ends it as SIGKILL does: nothing is written any more."""
        self._ended = True
        await self.service.reserving.stop()
        await self.leasing.stop()
        await self.seats.stop()
        await cancel(self._syncing)
        self.directory.close()

    # Asking

    async def call(self, method: str, request: Any, *, timeout_s: float = 2.0) -> bytes:
        """The answer's bytes, awaited when need be."""
        answer = self.service.handle(method, request.SerializeToString(), timeout_s)
        return answer if isinstance(answer, bytes) else await answer

    async def check(self, request: pb.CheckRequest | None = None, **fields: Any) -> pb.CheckResponse:
        """One check: a request, or what ``ask`` makes of the fields."""
        return pb.CheckResponse.FromString(await self.call("Check", request or ask(**fields)))

    async def batch(self, checks: list[pb.CheckRequest], semantics: Any = 0) -> list[pb.CheckResponse]:
        """One batch."""
        request = pb.CheckBatchRequest(checks=checks, semantics=semantics)
        return list(pb.CheckBatchResponse.FromString(await self.call("CheckBatch", request)).decisions)

    async def reserve(self, request: pb.CheckRequest | None = None, *, after_s: float = 0, **fields: Any) -> Any:
        """A ``ReserveResponse``; without ``after_s`` it is held as long as the action says."""
        asked = pb.ReserveRequest(check=request or ask(**fields))
        if after_s:
            asked.expires_after.FromMicroseconds(round(after_s * 1_000_000))
        return pb.ReserveResponse.FromString(await self.call("Reserve", asked))

    async def commit(self, id_: str, *, tenant: str = "acme", timeout_s: float = 2.0, **used: Any) -> Any:
        """A ``CommitReservationResponse``; ``used`` is ``quantity`` or ``quantities``."""
        request = pb.CommitReservationRequest(tenant=tenant, reservation_id=id_, **used)
        answer = await self.call("CommitReservation", request, timeout_s=timeout_s)
        return pb.CommitReservationResponse.FromString(answer)

    async def cancel(self, id_: str, *, tenant: str = "acme") -> int:
        """The state that canceling ends with."""
        request = pb.CancelReservationRequest(tenant=tenant, reservation_id=id_)
        return pb.CancelReservationResponse.FromString(await self.call("CancelReservation", request)).state

    async def extend(self, id_: str, *, tenant: str = "acme", after_s: float = 0) -> Any:
        """An ``ExtendReservationResponse``."""
        request = pb.ExtendReservationRequest(tenant=tenant, reservation_id=id_)
        if after_s:
            request.expires_after.FromMicroseconds(round(after_s * 1_000_000))
        return pb.ExtendReservationResponse.FromString(await self.call("ExtendReservation", request))

    async def upkeep(self) -> None:
        """One round of what runs twice a second, once calls under way have ended."""
        for _ in range(3):
            await asyncio.sleep(0)
        await self.service.reserving.upkeep()
        await self.leasing.upkeep()

    def events(self) -> list[UsageEvent]:
        """What this incarnation logged."""
        return [unpack_event(event) for event in self.packed_events()]

    def packed_events(self) -> list[bytes]:
        """The same, as it was logged."""
        header = self.log.header
        return self.log.read_events(
            header.sidecar, header.incarnation, 1, self.log.last_seq, events_max=10_000, bytes_max=1 << 30
        )

    def reserved(self, tenant: str = "acme") -> int:
        """Units held for reservations in leases of this process."""
        held = self.leases.tenants.get(tenant)
        return sum(lease.reserved for lease in held.all()) if held else 0

    def used(self, tenant: str = "acme") -> int:
        """Units spent from leases of this process."""
        held = self.leases.tenants.get(tenant)
        return sum(lease.used for lease in held.all()) if held else 0


async def cancel(task: asyncio.Task[Any] | None) -> None:
    """Ends a task."""
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def running(world: World, **settings: Any) -> AsyncIterator[FakeSidecar]:
    """A sidecar that follows what is published, and has caught up when something was."""
    sidecar = FakeSidecar(world, **settings)
    sidecar.start()
    try:
        if world.source.head is not None:
            await sidecar.synced()
        yield sidecar
    finally:
        await sidecar.stop()


def ask(
    tenant: str = "acme",
    action: str = "report.export",
    *,
    context: Mapping[str, Any] | None = None,
    subject: Mapping[str, Any] | None = None,
    **fields: Any,
) -> pb.CheckRequest:
    """A request. ``context`` maps names to plain values; a tuple is a list, ``Timestamp`` a timestamp."""
    request = pb.CheckRequest(tenant=tenant, action=action, **fields)
    for name, value in (context or {}).items():
        request.context[name].CopyFrom(value_of(value))
    if subject is not None:
        request.subject.CopyFrom(pb.Subject(**subject))
    return request


def value_of(value: Any) -> pb.Value:
    """The ``Value`` of a plain value."""
    match value:
        case bool():
            return pb.Value(bool_value=value)
        case int():
            return pb.Value(int_value=value)
        case float():
            return pb.Value(double_value=value)
        case str():
            return pb.Value(string_value=value)
        case tuple():
            return pb.Value(list_value=pb.StringList(values=value))
        case Timestamp():
            return pb.Value(timestamp_value=value)
        case _:
            raise TypeError(value)


def hurried(monkeypatch: Any) -> None:
    """Takes the waits out of syncing: retries and resyncs come at once."""
    monkeypatch.setattr(syncing, "RETRY_S", (0.001,))
    monkeypatch.setattr(syncing, "RESYNC_JITTER_S", 0.0)


__all__ = ["FakeSidecar", "LinkDown", "World", "ask", "cancel", "hurried", "running", "until", "value_of"]

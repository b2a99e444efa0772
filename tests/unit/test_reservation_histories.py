"""Random lives of reservations on one sidecar, against an obvious model: what is held and spent, before and after."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from licet.domain.catalog import Action, Catalog, Entitlement, Feature, OnExpiry, Plan, ReservationTerms
from licet.domain.windows import Period
from licet.v1 import approval_pb2 as pb
from licet.wire.usage import EventKind, UsageEvent
from licet_sidecar.services import syncing
from tests.support.published import catalog, limit
from tests.support.sidecar import FakeSidecar, World, until

MONTHLY: Final = 100
MINUTELY: Final = 40
HELD, COMMITTED = pb.RESERVATION_STATE_HELD, pb.RESERVATION_STATE_COMMITTED
CANCELED, EXPIRED = pb.RESERVATION_STATE_CANCELED, pb.RESERVATION_STATE_EXPIRED


def content() -> Catalog:
    return catalog(
        Feature("units"),
        Action("canceled-late", {"": "units"}),
        Action("paid-late", {"": "units"}, reservation=ReservationTerms(60, OnExpiry.COMMIT)),
        Plan("pro", {"units": Entitlement(limits=tuple(limit(n, per, feature="units") for n, per in AMOUNTS))}),
    )


AMOUNTS: Final = ((MONTHLY, Period.MONTH), (MINUTELY, Period.MINUTE))


@dataclass
class Expected:
    """What the model knows of one reservation. ``used`` is what a commit was funded with."""

    units: int
    expires_us: int
    pays_late: bool
    state: int = HELD
    used: int = 0


class Histories(RuleBasedStateMachine):
    made = Bundle("made")

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(syncing, "RETRY_S", (0.001,))
        self.patch.setattr(syncing, "RESYNC_JITTER_S", 0.0)
        self.directory = tempfile.TemporaryDirectory()
        self.loop = asyncio.new_event_loop()
        self.world = World(Path(self.directory.name) / "state")
        self.world.push(content())
        self.world.license("acme")
        self.incarnation = 0
        self.sidecar = self.run(self.begin())
        self.expected: dict[str, Expected] = {}
        self.checked = 0
        self.past_events: list[UsageEvent] = []

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    async def begin(self) -> FakeSidecar:
        self.incarnation += 1
        sidecar = FakeSidecar(self.world, incarnation=self.incarnation)
        sidecar.start()
        await sidecar.synced()
        return sidecar

    def teardown(self) -> None:
        self.run(self.sidecar.stop())
        self.loop.close()
        self.patch.undo()
        self.directory.cleanup()

    # What the world does

    @rule(
        target=made,
        units=st.integers(0, MINUTELY + 5),
        after_s=st.sampled_from((1, 5, 30, 90, 900)),
        action=st.sampled_from(("canceled-late", "paid-late")),
    )
    def reserve(self, units: int, after_s: int, action: str) -> Any:
        response = self.run(self.sidecar.reserve(action=action, quantity=units, after_s=after_s))
        if response.decision.effect != pb.EFFECT_APPROVED:
            assert units > 0
            assert not response.reservation_id
            return multiple()
        expires_us = self.world.clock.us + after_s * 1_000_000
        self.expected[response.reservation_id] = Expected(units, expires_us, action == "paid-late")
        return response.reservation_id

    @rule(units=st.integers(0, 20))
    def check(self, units: int) -> None:
        if self.run(self.sidecar.check(action="paid-late", quantity=units)).effect == pb.EFFECT_APPROVED:
            self.checked += units

    @rule(id_=made, units=st.none() | st.integers(0, MINUTELY + 20))
    def commit(self, id_: str, units: int | None) -> None:
        self.expire()
        one = self.expected[id_]
        done = self.run(self.sidecar.commit(id_, **({} if units is None else {"quantity": units})))
        used = one.units if units is None else units
        if one.state == HELD:
            one.state = COMMITTED
            one.used = done.committed["units"]
            assert one.used in (used, min(used, one.units))
            assert done.committed["units"] + done.unfunded.get("units", 0) == used
        assert done.state == one.state
        if one.state == COMMITTED:
            assert done.committed["units"] == one.used

    @rule(id_=made)
    def cancel(self, id_: str) -> None:
        self.expire()
        one = self.expected[id_]
        if one.state == HELD:
            one.state = CANCELED
        assert self.run(self.sidecar.cancel(id_)) == one.state

    @rule(id_=made, after_s=st.sampled_from((1, 30, 900)))
    def extend(self, id_: str, after_s: int) -> None:
        self.expire()
        one = self.expected[id_]
        extended = self.run(self.sidecar.extend(id_, after_s=after_s))
        assert extended.state == one.state
        if one.state == HELD:
            one.expires_us = self.world.clock.us + after_s * 1_000_000
            assert extended.expires_at.ToMicroseconds() == one.expires_us

    @rule(seconds=st.sampled_from((0.1, 1, 10, 45)))
    def time_passes(self, seconds: float) -> None:
        """Redis is told first: what it never learned is another rule, which tests by example pin down."""
        self.tell()
        self.world.advance(seconds)
        self.expire()

    @rule(tells=st.booleans(), rotates=st.booleans())
    def die(self, tells: bool, rotates: bool) -> None:
        if tells:
            self.tell()
        if rotates:
            self.sidecar.log.rotate([*self.sidecar.leasing.lease_records(), *self.sidecar.service.reserving.records()])
        self.past_events += self.sidecar.events()
        self.run(self.sidecar.kill())
        self.sidecar = self.run(self.begin())
        self.tell()

    def tell(self) -> None:
        for _ in range(2):
            self.world.advance(0.01)
            self.run(self.sidecar.upkeep())

    def expire(self) -> None:
        """The model, and then the sidecar, settle what is due."""
        for one in self.expected.values():
            if one.state == HELD and one.expires_us <= self.world.clock.us:
                one.state = COMMITTED if one.pays_late else EXPIRED
                one.used = one.units if one.pays_late else 0
        held = sum(one.state == HELD for one in self.expected.values())
        self.run(self.sidecar.upkeep())
        self.run(until(lambda: self.sidecar.reservations.open_count <= held, within_s=1))

    # What always holds

    @invariant()
    def leases_hold_what_open_reservations_say(self) -> None:
        self.expire()
        held = sum(one.units for one in self.expected.values() if one.state == HELD)
        leases = list(self.sidecar.leases.of("acme").all())
        monthly = [lease for lease in leases if lease.limit_key == "units:month"]
        assert sum(lease.reserved for lease in monthly) == held
        for lease in leases:
            holds = [one for each in self.sidecar.reservations.all() for one in each.holds if one.lease is lease]
            assert lease.reserved == sum(one.units for one in holds)
            assert 0 <= lease.used <= lease.used + lease.reserved <= lease.cap

    @invariant()
    def nothing_is_overspent_and_everything_is_recorded(self) -> None:
        spent = self.checked + sum(one.used for one in self.expected.values())
        assert spent <= MONTHLY
        monthly = [lease for lease in self.sidecar.leases.of("acme").all() if lease.limit_key == "units:month"]
        assert sum(lease.used for lease in monthly) == spent
        events = self.past_events + self.sidecar.events()
        paid = [one for one in events if one.kind in (EventKind.CHECK, EventKind.COMMIT) and one.effect == 1]
        assert sum(one.units.get("units", 0) for one in paid) == spent
        spends: dict[str, int] = {}
        for one in paid:
            for quota, units in one.spends:
                spends[quota] = spends.get(quota, 0) + units
        assert all(units <= MINUTELY for quota, units in spends.items() if ":minute:" in quota)
        assert all(not one.units for one in events if one.kind not in (EventKind.CHECK, EventKind.COMMIT))
        settled = [one.about for one in events if one.kind in (EventKind.COMMIT, EventKind.CANCEL, EventKind.EXPIRE)]
        assert len(settled) == len(set(settled))


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)

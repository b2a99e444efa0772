"""Never mixed, never back, under every fault at once, and the proof that each rule is needed.

``LICET_SIM_SEEDS`` says how many histories to run (``make sim SEEDS=1000``). A failure names its seed, with the end of
its trace.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Final

import pytest

from licet_sidecar.core.engine import Tenant
from licet_sidecar.core.following import Bundle, Following, SignedHead
from licet_sidecar.core.sync import Change, Changes, HeadVerdict
from tests.fault.sync_simulation import Rule, SyncSimulation, Violation
from tests.support.seeds import batches

pytestmark = pytest.mark.timeout(300)

SEEDS_EACH: Final = 50
ABLATION_SEEDS: Final = 400


@pytest.mark.parametrize("seeds", batches(SEEDS_EACH), ids=lambda seeds: seeds.start)
def test_nobody_mixes_revisions_or_goes_back_with_any_of_the_seeds(seeds: range) -> None:
    applied = 0
    for seed in seeds:
        simulation = SyncSimulation(seed)
        simulation.run()
        applied += simulation.applied
    assert applied or len(seeds) == 1  # else nothing was tried


def first_violation(**ablation: Any) -> str:
    for seed in range(ABLATION_SEEDS):
        try:
            SyncSimulation(seed, **ablation).run()
        except Violation as violation:
            return str(violation)
    return ""


class ForgetsLoads(Following):
    """A change that names a tenant while it is loaded is not noticed."""

    def _tenant_changed(self, tenant: str) -> None:
        self.engine.forget_absence(tenant)


class BelievesAbsences(Following):
    """A new license does not end a remembered absence."""

    def _tenant_changed(self, tenant: str) -> None:
        if tenant in self.loading:
            self._dirty.add(tenant)


class LoadsFromAnyServer(Following):
    """A load counts wherever it was read."""

    def _follows(self, run: str) -> bool:
        return True


class ReadsFromAnyServer(Following):
    """What belongs together is read from several servers."""

    def _must_be_from(self, found: str, run: str) -> None:
        pass

    def _judge_bundle(self, bundle: Bundle, generation: int, named: int) -> None:
        super()._judge_bundle(bundle, generation, 0)

    def _judge_license(self, name: str, tenant: Tenant, generation: int, named: int) -> None:
        super()._judge_license(name, tenant, generation, 0)


class BelievesUncheckedServers(Following):
    """Heads of another server are as good."""

    def _must_be_checked(self, signed: SignedHead | None, run: str) -> None:
        if signed is not None:
            return
        super()._must_be_checked(signed, run)


class ForgetsWhatIsBeingRead(Following):
    """A license that was read, and whose predecessor a load evicts meanwhile, is put in force however old it became."""

    def _take_note(self, touched: Changes, changes: Iterable[Change], read: Collection[str] = ()) -> bool:
        return super()._take_note(touched, changes)


class SkipsGaps(Following):
    """The next change may have any number."""

    def _take_note(self, touched: Changes, changes: Iterable[Change], read: Collection[str] = ()) -> bool:
        changes = list(changes)
        for change in changes:
            if change.revision <= touched.cursor:
                return False
            touched.cursor = change.revision - 1
            if not super()._take_note(touched, [change], read):
                return False
        return True


class DoesNotWait(Following):
    """A document newer than the revision in force is put beside it."""

    def _reach(self, version: tuple[int, int]) -> Any:
        yield from ()


class NeverReadsAgain(Following):
    """Heads that speak of what was never read lead to nothing."""

    def take_head(self, signed: SignedHead, run_id: str) -> HeadVerdict:
        wanted = self.wants_resync
        verdict = super().take_head(signed, run_id)
        self.wants_resync = wanted
        return verdict


@pytest.mark.parametrize("rule", list(Rule))
def test_each_rule_of_the_publisher_and_of_the_disk_is_needed(rule: Rule) -> None:
    assert first_violation(without=rule)


@pytest.mark.parametrize(
    "core",
    [
        ForgetsLoads,
        BelievesAbsences,
        LoadsFromAnyServer,
        ReadsFromAnyServer,
        BelievesUncheckedServers,
        ForgetsWhatIsBeingRead,
        SkipsGaps,
        DoesNotWait,
        NeverReadsAgain,
    ],
)
def test_each_rule_of_the_sidecar_is_needed(core: type[Following]) -> None:
    assert first_violation(make=core)

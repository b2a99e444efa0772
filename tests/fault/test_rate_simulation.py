"""Shares of a rate never let more through than the rate, whatever is lost, repeated, late or dead."""

from __future__ import annotations

from typing import Final

import pytest

from licet_sidecar.core.lease import TOKENS_EACH, Lease, RateShare, Terms
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.core.settling import Ask, Granted
from tests.fault.rate_simulation import RateWorld, Violation
from tests.support.fake_lease_store import Rule
from tests.support.seeds import batches

SEEDS_EACH: Final = 50
ABLATION_SEEDS: Final = 1_000


@pytest.mark.parametrize("seeds", batches(SEEDS_EACH), ids=lambda seeds: seeds.start)
def test_no_more_than_the_rate_and_a_burst_is_approved(seeds: range) -> None:
    for seed in seeds:
        try:
            RateWorld(seed).run()
        except Violation as violation:
            pytest.fail(f"seed {seed}: {violation}", pytrace=False)


def test_histories_approve_something() -> None:
    worlds = [RateWorld(seed) for seed in range(10)]
    for world in worlds:
        world.run()
    assert sum(world.approved for world in worlds) > 1_000


class StartsFull(RateShare):
    """A new share's bucket is full."""

    def granted(self, share: int, hold_until_ms: int, boot_ms: int) -> None:
        fresh = not self.cap
        super().granted(share, hold_until_ms, boot_ms)
        if fresh:
            self.tokens = self._capacity()


class HoldsTheWholeBurst(RateShare):
    """A bucket holds all of the burst, whatever its share."""

    def _capacity(self) -> int:
        return self.burst * TOKENS_EACH if self.cap else 0


class OutlivesItsHold(RateShare):
    """A share is used after its hold ended."""

    def level(self, boot_ms: int) -> int:
        if boot_ms > self.filled_ms:
            self.tokens = min(self._capacity(), self.tokens + self.cap * (boot_ms - self.filled_ms))
        self.filled_ms = boot_ms
        return self.tokens


class FillsUnderNewTerms(RateShare):
    """What filled a bucket before the terms changed is settled as if they had always been so."""

    def adopt(self, terms: Terms, boot_ms: int) -> None:
        self._adopt(terms)


class KeepsItsShare(RateShare):
    """A share stays what it was when the rate is lowered."""

    def adopt(self, terms: Terms, boot_ms: int) -> None:
        self.level(boot_ms)
        self._adopt(terms)
        self.tokens = min(self.tokens, self._capacity())


class BelievesAnyShare(LeaseBook):
    """A share becomes what the register says, also while all shares together are more than the rate."""

    @staticmethod
    def _take_grant(lease: Lease, ask: Ask, granted: Granted, hold_until_ms: int, boot_ms: int) -> None:
        assert isinstance(lease, RateShare)
        lease.granted(granted.g, hold_until_ms, boot_ms)


@pytest.mark.parametrize("share", [StartsFull, HoldsTheWholeBurst, OutlivesItsHold, FillsUnderNewTerms, KeepsItsShare])
def test_each_rule_of_a_share_is_needed(share: type[RateShare]) -> None:
    assert any(_breaks(RateWorld(seed, share=share)) for seed in range(ABLATION_SEEDS))


def test_a_share_grows_only_once_all_of_them_fit_into_the_rate() -> None:
    assert any(_breaks(RateWorld(seed, book_of=BelievesAnyShare)) for seed in range(ABLATION_SEEDS))


@pytest.mark.parametrize("rule", [Rule.SHARES_END, Rule.SWEEP_LATE, Rule.WITHIN_AMOUNT])
def test_each_rule_of_the_script_is_needed_for_shares(rule: Rule) -> None:
    """Of sidecars that believe the script: they do not use more than the rate that they know, whatever it grants."""
    without = frozenset({rule})
    assert any(
        _breaks(RateWorld(seed, without=without, book_of=BelievesAnyShare, changing=False))
        for seed in range(ABLATION_SEEDS)
    )


def test_rates_are_changed_in_flight() -> None:
    worlds = [RateWorld(seed) for seed in range(10)]
    for world in worlds:
        world.run()
    assert sum(world.changes for world in worlds) > 10


def _breaks(world: RateWorld) -> bool:
    try:
        world.run()
    except Violation:
        return True
    return False

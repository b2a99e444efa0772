"""In steady state checks wait for no network (P3): counted on real leasing, over the model of the registers."""

from __future__ import annotations

from bench.waits import steady


async def test_up_to_four_fifths_of_the_limit_999_of_1000_checks_wait_for_nothing() -> None:
    found = await steady(470_000, per_s=100, seconds=120)
    assert 0.78 <= found.used_share <= 0.82
    assert found.waited_share <= 0.001

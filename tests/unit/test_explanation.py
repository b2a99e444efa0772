"""Explanations: the step that is said to decide is the one that does, and nothing is taken by asking."""

from __future__ import annotations

import random

import pytest

from licet.domain.outcomes import Effect
from licet_sidecar.core.decision import Decision
from licet_sidecar.core.explanation import StepName, deciding_step, explain
from tests.support.engine import BOOT_MS, NOW_US, STALENESS_US_MAX, engine_with
from tests.unit.test_engine_differential import draw_catalog, draw_inquiry, draw_license, put_leases

ORDER = [name for name in StepName if name is not StepName.OVERRIDE]


@pytest.mark.parametrize("seed", range(10))
def test_the_first_step_that_objects_is_the_one_that_decided(seed: int) -> None:
    rng = random.Random(seed)
    decided_by: set[StepName | None] = set()
    for _ in range(40):
        content = draw_catalog(rng)
        engine = engine_with(content, draw_license(rng, content))
        for _ in range(6):
            request = draw_inquiry(rng, content)
            now_us = NOW_US + rng.choice([0, 0, 0, 1_000_000, STALENESS_US_MAX + 1])
            put_leases(rng, engine, content, now_us)
            outcome = engine.decide(request, now_us=now_us, boot_ms=BOOT_MS, patient=False)
            assert isinstance(outcome, Decision)
            before = {lease.quota: (lease.cap, lease.used) for lease in engine.leases.of("acme").all()}
            steps = explain(engine, request, outcome, now_us=now_us)
            assert {lease.quota: (lease.cap, lease.used) for lease in engine.leases.of("acme").all()} == before

            assert [step.name for step in steps] == ORDER[: len(steps)]
            decided = deciding_step(outcome, steps)
            objecting = next((step.name for step in steps if step.objects), None)
            if outcome.effect is Effect.APPROVED and decided is StepName.QUOTAS:  # degraded, and allowed
                assert objecting is None
            else:
                assert objecting == decided, (outcome.reason, outcome.message, steps)
            assert all(step.found for step in steps if step.name is not StepName.QUOTAS)
            decided_by.add(decided)
    assert len(decided_by) >= 8, decided_by

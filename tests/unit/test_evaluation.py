"""The engine without a Redis answers what a sidecar answers that has all quotas to itself; and as a filter of lines."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any, Final

import pytest

from licet.domain.catalog import Action, Catalog, Entitlement, Feature, Grant, License, Limit, OnExceeded, Plan
from licet.domain.catalog_wire import document_to_wire, license_to_wire
from licet.domain.ids import LimitKey
from licet.domain.outcomes import Effect, Reason
from licet.domain.windows import Period
from licet.v1 import approval_pb2 as pb
from licet_sidecar import evaluate
from licet_sidecar.core.evaluation import Evaluator, UnknownLimit
from licet_sidecar.core.inquiry import Inquiry
from tests.support.engine import NOW_US, inquiry
from tests.support.published import MONTHLY, catalog, limit
from tests.support.sidecar import World, ask, hurried, running
from tests.unit.test_engine_differential import draw_catalog, draw_inquiry, draw_license

SECOND_US: Final = 1_000_000
BY_LIMITS: Final = {Reason.QUOTA_EXHAUSTED, Reason.RATE_LIMITED, Reason.APPROVAL_REQUIRED}


@pytest.mark.parametrize("seed", range(4))
async def test_answers_what_a_lone_sidecar_answers(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurried(monkeypatch)
    rng = random.Random(seed)
    reasons: set[int] = set()
    for case in range(9):
        content = draw_catalog(rng)
        license_ = draw_license(rng, content)
        (tmp_path / str(case)).mkdir()
        world = World(tmp_path / str(case))
        observe = case % 3 == 2
        world.push(content, observe=observe)
        fields = {name: getattr(license_, name) for name in ("status", "starts_s", "ends_s", "overrides")}
        world.license("acme", **fields)
        evaluator = Evaluator(content, observe=observe)
        evaluator.begin(license_)
        async with running(world) as sidecar:
            for _ in range(25):
                request = draw_inquiry(rng, content)
                answer = await sidecar.check(_request(request))
                found = evaluator.ask(request, world.clock.us)
                reasons.add(answer.reason)
                decision = found.decision
                said = (answer.effect, answer.reason, answer.rule)
                answered = pb.EFFECT_APPROVED if decision.observed else decision.effect
                if decision.observed and {decision.reason, answer.reason} <= BY_LIMITS:
                    continue  # of several that are exceeded, a sidecar names the one that it knows of
                assert (answered, decision.reason, decision.rule) == said, (decision.message, answer.message)
                # Shown to tests of policies, in no answer.
                in_shadow = {lease.limit_key for lease, _ in decision.counted} - {
                    one.limit_key for one in answer.quotas
                }
                assert [(one.amount, one.remaining) for one in found.quotas if one.limit not in in_shadow] == [
                    (one.limit, one.remaining) for one in answer.quotas
                ]
                if rng.random() < 0.1:
                    world.advance(rng.choice([1, 61]))
                    world.push(content, observe=observe)  # so that it stays fresh
                    await sidecar.synced()
    assert len(reasons) >= 4, reasons


def _request(request: Inquiry) -> pb.CheckRequest:
    asked = ask(
        request.tenant,
        request.action,
        context=dict(request.context),
        subject={"id": request.subject_id, "roles": request.roles},
    )
    if request.quantity is not None:
        asked.quantity = request.quantity
    for meter, units in request.quantities.items():
        asked.quantities[meter] = units
    return asked


def test_what_was_used_before_counts_in_its_window_and_scope() -> None:
    content = catalog(limits=[limit(10), limit(5, Period.MINUTE, scope=("subject",))])
    evaluator = Evaluator(content)
    evaluator.begin(License("acme", "pro"))
    ada, bob = inquiry(subject_id="ada", quantity=2), inquiry(subject_id="bob", quantity=2)
    evaluator.use("acme", MONTHLY, 4, ada, NOW_US)
    evaluator.use("acme", "reports:minute@subject", 4, ada, NOW_US)
    assert evaluator.ask(ada, NOW_US).decision.rule == "reports:minute@subject"
    assert [one.remaining for one in evaluator.ask(bob, NOW_US).quotas] == [4, 3]
    ada.peek = True
    assert [one.remaining for one in evaluator.ask(ada, NOW_US + 60 * SECOND_US).quotas] == [4, 5]
    with pytest.raises(UnknownLimit) as refused:
        evaluator.use("acme", "reports:year", 1, ada, NOW_US)
    assert refused.value.args == ("reports:year", ["reports:minute@subject", "reports:month"])
    evaluator.begin(License("acme", "pro"))
    assert [one.used for one in evaluator.ask(ada, NOW_US).quotas] == [0, 0]


def test_soft_limits_rates_and_grants() -> None:
    def plan(*limits: Limit) -> Evaluator:
        return Evaluator(
            Catalog.of(
                [
                    Feature("f"),
                    Action("a", {"": "f"}),
                    Action("b", {"": "f"}),
                    Plan("pro", {"f": Entitlement(limits=limits)}),
                ]
            )
        )

    month = LimitKey("f:month")
    soft = plan(Limit(month, 3, Period.MONTH, on_exceeded=OnExceeded.OVERAGE))
    soft.begin(License("acme", "pro"))
    answers = [soft.ask(inquiry(action="a", quantity=2), NOW_US) for _ in range(3)]
    assert [(one.decision.reason, one.quotas[0].overage) for one in answers] == [
        (Reason.OK, 0), (Reason.OVERAGE, 1), (Reason.OVERAGE, 2),
    ]  # fmt: skip

    rate = plan(Limit(LimitKey("f:second"), 2, Period.SECOND, burst=4))
    rate.begin(License("acme", "pro"))
    asked = [rate.ask(inquiry(action="a", quantity=2), NOW_US + at).decision.reason for at in (0, 0, 0, SECOND_US)]
    assert asked == [Reason.OK, Reason.OK, Reason.RATE_LIMITED, Reason.OK]

    granted = plan(Limit(month, 3, Period.MONTH))
    granted.begin(License("acme", "pro", grants=(Grant("more", month, 4, 0, 2**33),)))
    # Of two actions by turns: they share the quota.
    effects = [granted.ask(inquiry(action="ab"[n % 2], quantity=2), NOW_US).decision.effect for n in range(4)]
    assert effects == [Effect.APPROVED] * 3 + [Effect.DENIED]
    granted.begin(License("acme", "pro", grants=(Grant("more", month, 4, 0, 2**33),)))
    granted.use("acme", "f:month+more", 4, inquiry(), NOW_US)
    assert granted.ask(inquiry(action="a", quantity=4), NOW_US).decision.reason is Reason.QUOTA_EXHAUSTED


def lines(*requests: Any) -> list[Any]:
    out = io.StringIO()
    text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in requests)
    evaluate.run(io.StringIO(f"{text}\n\n"), out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_the_filter_answers_line_by_line_and_says_what_it_does_not_understand() -> None:
    content = catalog(limits=[limit(10)])
    bundle = {"op": "bundle", "name": "x", "documents": [document_to_wire(d) for d in content.documents()]}
    begin = {"op": "begin", "name": "x", "license": license_to_wire(License("acme", "pro"))}
    check = {"tenant": "acme", "action": "report.export", "quantity": 3, "now_us": NOW_US}
    found = lines(
        bundle,
        begin,
        {"op": "use", "name": "x", "tenant": "acme", "limit": MONTHLY, "units": 2, "who": {}, "now_us": NOW_US},
        {"op": "use", "name": "x", "tenant": "acme", "limit": "no", "units": 2, "who": {}, "now_us": NOW_US},
        {"op": "check", "name": "x", "checks": [check, {**check, "quantity": -1}, {**check, "units": {"reports": 4}}]},
        {"op": "check", "name": "x", "checks": [{**check, "units": {"other": 4}}]},
        "not json",
        {"op": "nothing"},
        {"op": "check", "name": "y", "checks": []},
    )
    assert found[:3] == [{"ok": True}] * 3
    assert found[3] == {"unknown_limit": "no", "known": [MONTHLY]}
    first, malformed, recorded = found[4]["answers"]
    assert (first["effect"], first["quotas"][0]["remaining"]) == ("APPROVED", 5)
    assert malformed["invalid"].startswith("quantity")
    assert (recorded["units"], recorded["quotas"][0]["remaining"]) == ({"reports": 4}, 1)
    assert "does not draw on other" in found[5]["answers"][0]["invalid"]
    assert [list(answer) for answer in found[6:]] == [["failed"]] * 3

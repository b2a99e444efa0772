"""``licet policy simulate`` over a server that stands for the control plane: paging, and use from before the replay."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import CommandLine, licet_command
from tests.support.stub_control_plane import Request, StubControlPlane

__all__ = ["licet_command"]

CATALOG = """\
kind: Feature
name: reports
---
kind: Action
name: report.export
feature: reports
---
kind: Plan
name: pro
features:
  reports:
    price: {amount: "1.00", currency: USD}
    limits:
      - {amount: 10, per: year}
      - {spend: "12.00 USD", per: year}
      - {amount: 9, per: year, scope: [subject]}
"""
TENANTS = ("a", "b", "c")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, licet_command: CommandLine) -> Iterator[StubControlPlane]:
    stub = StubControlPlane().start()
    monkeypatch.setenv("LICET_SERVER", stub.url)
    monkeypatch.setenv("LICET_API_KEY", "secret")
    stub.answers["GET /v1/bundles/current"] = {"revision": 7}
    stub.answers["GET /v1/bundles/7/files"] = {"files": [{"path": "all.yaml", "content": CATALOG}]}
    for tenant in TENANTS:
        stub.answers[f"GET /v1/licenses/{tenant}"] = {
            "tenant": tenant, "plan": "pro", "status": "active", "starts_at": None, "ends_at": None, "addons": {},
            "overrides": {}, "grants": [], "grace_s": 0, "cancels": False, "revision": 1,
            "updated_at": "2026-01-01T00:00:00Z",
        }  # fmt: skip
    yield stub
    stub.stop()


def decision(tenant: str, number: int, at_us: int, **changes: Any) -> dict[str, Any]:
    return {
        "decision_id": f"{tenant}{number}", "kind": "CHECK", "at_us": at_us + number, "tenant": tenant,
        "subject": {"type": "", "id": f"s{number}", "on_behalf_of": ""}, "action": "report.export",
        "resource": {"type": "", "id": ""}, "context": {}, "units": {"reports": 1}, "effect": "APPROVED",
        "reason": "OK", "rule": "", "revision": 7, "exposures": {},
        "cost": {"amount_nanos": 1_000_000_000, "currency": "USD"},
        "stale": False, "degraded": False, **changes,
    }  # fmt: skip


def serve(server: StubControlPlane, decisions: list[dict[str, Any]], page: int) -> None:
    def answer(request: Request) -> tuple[int, Any]:
        start = int(request.query.get("after") or 0)
        more = start + page < len(decisions)
        found: dict[str, Any] = {"items": decisions[start : start + page], "next": str(start + page) if more else None}
        return 200, found if start else {**found, "total": len(decisions)}

    server.answers["GET /v1/decisions"] = answer


@pytest.mark.parametrize("page", [1, 3, 4, 1_000])
def test_pages_are_cut_by_tenant_and_each_tenant_begins_with_what_it_had_used(
    licet_command: CommandLine, server: StubControlPlane, page: int
) -> None:
    at_us = int(time.time() - 60) * 1_000_000
    serve(server, [decision(tenant, number, at_us) for tenant in TENANTS for number in range(4)], page)

    def used(request: Request) -> tuple[int, Any]:
        units = {"a": 8, "b": 0, "c": 0}[request.query["tenant"]]
        items = [
            {"feature": "reports", "effect": "APPROVED", "units": units, "cost": []},
            {"feature": "reports", "effect": "DENIED", "units": 500, "cost": []},
            {"feature": "other", "effect": "APPROVED", "units": 500, "cost": []},
        ]
        if request.query["tenant"] == "c":
            items[0]["cost"] = [{"currency": "USD", "amount": "9.50"}, {"currency": "EUR", "amount": "70.00"}]
        return 200, {"items": items}

    server.answers["GET /v1/usage/summary"] = used
    ended = licet_command("policy", "simulate", "--since", "1h", "--json")
    assert ended.code == 0, ended.err
    # Of ten a year "a" had used eight, and "c" 9.50 of 12.00 USD: each has room for two of its four.
    assert {(one["tenant"], one["after"], one["decisions"]) for one in ended.json["changes"]} == {
        ("a", "DENIED QUOTA_EXHAUSTED reports:year", 2),
        ("c", "DENIED QUOTA_EXHAUSTED reports:year.usd", 2),
    }
    assert ended.json["begin_empty"] == ["reports:year@subject"]
    assert ended.json["replayed"] == 12
    assert {one["tenant"]: one["difference"] for one in ended.json["costs"]} == {"a": "-2.00 USD", "c": "-2.00 USD"}


def test_a_candidate_is_compared_with_what_is_live_not_with_the_record(
    licet_command: CommandLine, server: StubControlPlane, tmp_path: Path
) -> None:
    server.answers["GET /v1/usage/summary"] = {"items": []}
    del server.answers["GET /v1/licenses/b"]
    at_us = int(time.time() - 60) * 1_000_000
    decisions = [
        decision("a", 1, at_us, effect="DENIED", reason="ROLE_REQUIRED"),  # under a bundle of then
        decision("a", 2, at_us, degraded=True),
        decision("a", 3, at_us, units={"gone": 1}),
        decision("a", 4, at_us, kind="RESERVE", units={}),
        decision("b", 1, at_us),
    ]
    serve(server, decisions, 2)
    (tmp_path / "all.yaml").write_text(CATALOG.replace('"1.00"', '"3.00"').replace("12.00", "99.00"))
    ended = licet_command("policy", "simulate", tmp_path, "--json")
    found = ended.json
    assert (ended.code, found["changes"]) == (0, [])
    assert (found["replayed"], found["inexact"]) == (3, 3)
    assert found["inexact_because"] == {"otherwise": 2, "degraded": 1}
    assert found["not_replayed"] == {"kind": 1, "features": 1}
    assert [(one["before"], one["after"]) for one in found["costs"]] == [("2.00 USD", "6.00 USD")]
    text = licet_command("policy", "simulate", tmp_path)
    assert "3 decisions replayed; 0 would be answered otherwise." in text.out
    assert "what is live now answers otherwise than was recorded" in text.out
    assert "1 not replayed: the action does not draw on the recorded features any more" in text.out


@pytest.mark.parametrize("since", ["yesterday", "99999d"])
def test_a_time_that_is_none_is_refused(licet_command: CommandLine, server: StubControlPlane, since: str) -> None:
    assert licet_command("policy", "simulate", "--since", since).code == 2

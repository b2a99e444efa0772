"""``licet quota`` against a server that stands for the control plane."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.command_line import CommandLine, licet_command
from tests.support.stub_control_plane import Request, StubControlPlane

__all__ = ["licet_command"]

SIDECAR = "3f9c2a7be41d" + "0" * 20


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, licet_command: CommandLine) -> Iterator[StubControlPlane]:
    stub = StubControlPlane().start()
    monkeypatch.setenv("LICET_SERVER", stub.url)
    monkeypatch.setenv("LICET_API_KEY", "secret")
    yield stub
    stub.stop()


def quota(limit: str, **changes: Any) -> dict[str, Any]:
    holder = {
        "sidecar": SIDECAR, "state": "dead", "silent_s": 400.2, "granted": 50, "used": 20, "reserved": 0, "unspent": 30,
        "last_call_at": None,
    }  # fmt: skip
    item = {
        "quota": f"{limit}:1000", "limit": limit, "kind": "units", "currency": "", "scope": "", "scope_values": {},
        "window": {"per": "month", "starts_at": "2026-11-01T00:00:00Z", "ends_at": "2026-12-01T00:00:00Z"},
        "lost": False, "amount": 12_345, "used": 20, "reserved": 0, "leased": 30, "remaining": 50, "overage": 0,
        "leased_by_dead": 30, "folded": 0, "holders": [holder],
    }  # fmt: skip
    return {**item, **changes}


def shown(*items: dict[str, Any], next_: str | None = None) -> dict[str, Any]:
    return {
        "tenant": "acme", "phase": "open", "since": "2026-11-24T08:00:00Z", "epoch": 1, "revision": 7,
        "items": list(items), "untouched": [{"limit": "calls:day", "amount": 5}], "next": next_,
    }  # fmt: skip


def reclaimed(*statuses: str, next_: str | None = None, **changes: Any) -> dict[str, Any]:
    items = [
        {
            "tenant": "acme", "quota": "calls:month:1000", "limit": "calls:month", "status": status, "granted": 50,
            "used": 20, "reserved": 0, "in_ledger": 21, "counted": 21, "freed": 29,
        }
        for status in statuses
    ]  # fmt: skip
    why_not = "it was heard of 33 s ago" if changes.get("wait_s") else ""
    return {
        "sidecar": SIDECAR,
        "dry_run": False,
        "wait_s": 0,
        "why_not": why_not,
        "items": items,
        "skipped": [],
        "next": next_,
        **changes,
    }


def test_shows_quotas_in_their_own_units_with_who_holds_them(
    licet_command: CommandLine, server: StubControlPlane
) -> None:
    server.answers["GET /v1/tenants/acme/quotas"] = shown(
        quota("calls:month"),
        quota("calls:second.rate", kind="rate", amount=5_500),
        quota(
            "calls:spend",
            kind="budget",
            currency="USD",
            amount=1_250_000_000,
            scope="ab",
            scope_values={"subject": "user/ada"},
        ),
        quota("calls:team", scope="0123456789abcdef", scope_values=None, holders=[]),
    )
    ended = licet_command("quota", "show", "acme", "--limit", "calls:month")
    assert ended.code == 0
    assert server.requests[0].query == {"key": "calls:month", "limit": "500"}
    for text in ("12,345", "5.5/s", "1.25 USD", "subject=user/ada", "0123456789abcdef", "each second"):
        assert text in ended.out
    assert f"{SIDECAR[:12]}  dead since 400 s" in ended.out
    assert "nothing was taken yet of: calls:day" in ended.out


def test_shows_all_pages(licet_command: CommandLine, server: StubControlPlane) -> None:
    def answer(request: Request) -> tuple[int, Any]:
        if "after" in request.query:
            return 200, shown(quota("calls:month"))
        return 200, shown(quota("calls:day"), next_="calls:day:1000")

    server.answers["GET /v1/tenants/acme/quotas"] = answer
    ended = licet_command("quota", "show", "acme", "--json")
    assert [item["limit"] for item in ended.json["items"]] == ["calls:day", "calls:month"]
    assert ended.json["next"] is None


def test_reclaims_page_by_page_and_says_what_was_freed(licet_command: CommandLine, server: StubControlPlane) -> None:
    def answer(request: Request) -> tuple[int, Any]:
        return 200, reclaimed("sealed") if request.body.get("after") else reclaimed("sealed", next_="globex")

    server.answers[f"POST /v1/sidecars/{SIDECAR[:12]}/reclaim"] = answer
    ended = licet_command("quota", "reclaim", SIDECAR[:12])
    assert ended.code == 0
    assert [request.body for request in server.requests] == [{"dry_run": False}, {"dry_run": False, "after": "globex"}]
    assert ended.out.count("sealed") == 2
    assert "29" in ended.out
    assert server.url in ended.err


def test_a_dry_run_says_when_it_may_be_done(licet_command: CommandLine, server: StubControlPlane) -> None:
    server.answers[f"POST /v1/sidecars/{SIDECAR}/reclaim"] = reclaimed("would_seal", dry_run=True, wait_s=42)
    ended = licet_command("quota", "reclaim", SIDECAR, "--dry-run", "--tenant", "acme")
    assert ended.code == 0
    assert server.requests[0].body == {"dry_run": True, "tenant": "acme"}
    assert "would_seal" in ended.out
    assert "42 s" in ended.err


@pytest.mark.parametrize("answer", [reclaimed("sealed", "live"), reclaimed("sealed", skipped=["globex"])])
def test_what_could_not_be_reclaimed_fails(
    licet_command: CommandLine, server: StubControlPlane, answer: dict[str, Any]
) -> None:
    server.answers[f"POST /v1/sidecars/{SIDECAR}/reclaim"] = answer
    ended = licet_command("quota", "reclaim", SIDECAR, "--json")
    assert ended.code == 1
    assert ended.json["complete"] is False
    assert "Run the command again" in ended.err


def test_open_reservations_are_pointed_out(licet_command: CommandLine, server: StubControlPlane) -> None:
    answer = reclaimed("sealed")
    answer["items"][0]["reserved"] = 5
    server.answers[f"POST /v1/sidecars/{SIDECAR}/reclaim"] = answer
    assert "open reservations" in licet_command("quota", "reclaim", SIDECAR).err


def test_a_refusal_says_what_to_do(licet_command: CommandLine, server: StubControlPlane) -> None:
    problem = {"title": "Conflict", "detail": "Sidecar x was heard of 3 s ago.", "fix": "ask again in 72 s"}
    server.answers[f"POST /v1/sidecars/{SIDECAR}/reclaim"] = lambda _: (409, problem)
    ended = licet_command("quota", "reclaim", SIDECAR)
    assert ended.code == 1
    assert "72 s" in ended.err

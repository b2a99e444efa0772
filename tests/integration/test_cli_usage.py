"""``licet usage`` against a server that stands for the control plane."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from licet_control_plane.cli import usage
from tests.support.command_line import CommandLine, licet_command
from tests.support.stub_control_plane import StubControlPlane

__all__ = ["licet_command"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, licet_command: CommandLine) -> Iterator[StubControlPlane]:
    stub = StubControlPlane().start()
    monkeypatch.setenv("LICET_SERVER", stub.url)
    monkeypatch.setenv("LICET_API_KEY", "secret")
    yield stub
    stub.stop()


def event(seq: int, **changes: Any) -> dict[str, Any]:
    return {
        "decision_id": f"{seq:032x}", "log_id": "s:1", "seq": seq, "at": f"2026-10-01T00:00:0{seq}Z", "kind": "CHECK",
        "tenant": "acme", "subject": {"type": "user", "id": "ada", "on_behalf_of": ""}, "action": "report.export",
        "effect": "APPROVED", "reason": "OK", "rule": "", "revision": 2, "units": {"reports": 1234}, "units_held": {},
        "unfunded": {}, "cost": {"currency": "USD", "amount": "0.01"}, "priced_as": {}, "flags": ["stale"],
        "exposures": {"editor": "on"}, "idempotency_key": "", "resource": {"type": "", "id": ""},
        "context": {"team": "a,b"}, "spends": [], "shadow": [], "about": "", "expires_at": None, **changes,
    }  # fmt: skip


PAGES = {
    "": {"items": [event(1), event(2)], "next": "9.1.2"},
    "9.1.2": {"items": [event(3, cost=None)], "next": None},
}
INVOICE = {
    "tenant": "acme", "month": "2026-10", "from": "2026-10-01T00:00:00Z", "to": "2026-11-01T00:00:00Z",
    "provisional": [], "unpriced": [], "totals": [{"currency": "USD", "amount": "37.50"}],
    "lines": [
        {"kind": "fee", "name": "pro", "priced_as": "", "units": 1, "included": 0, "per_units": 1, "tiers": "",
         "charges": [{"units": 1, "amount": "31.00", "flat": "0.00"}], "share_of_month": 0.5, "since_revision": 0,
         "currency": "USD", "unrounded": "15.50", "amount": "15.50"},
        {"kind": "usage", "name": "tokens", "priced_as": "large", "units": 1_500, "included": 500, "per_units": 1_000,
         "tiers": "graduated", "charges": [{"units": 600, "amount": "10.00", "flat": "0.00"},
                                           {"units": 400, "amount": "5.00", "flat": "14.00"}],
         "share_of_month": 1.0, "since_revision": 3, "currency": "USD", "unrounded": "22.00", "amount": "22.00"},
    ],
}  # fmt: skip


def paged(server: StubControlPlane, *, fails_on: str | None = None) -> None:
    def answer(request: Any) -> tuple[int, Any]:
        after = request.query.get("after", "")
        if after == fails_on:
            return 503, {"title": "Service Unavailable", "detail": "the database failed", "fix": "Try again."}
        return 200, PAGES[after]

    server.answers["GET /v1/usage/events"] = answer


def test_exports_every_page_as_json_lines(licet_command: CommandLine, server: StubControlPlane) -> None:
    paged(server)
    ended = licet_command("usage", "export", "--tenant", "acme", "--from", "2026-10-01", "--to", "2026-11-01")
    assert ended.code == 0
    assert [json.loads(line)["seq"] for line in ended.out.splitlines()] == [1, 2, 3]
    assert "2 events so far" in ended.err
    assert "3 events" in ended.err
    assert server.requests[1].query == {
        "tenant": "acme", "from": "2026-10-01T00:00:00Z", "to": "2026-11-01T00:00:00Z", "after": "9.1.2",
        "limit": "2000",
    }  # fmt: skip


def test_exports_csv_that_says_the_same(licet_command: CommandLine, server: StubControlPlane, tmp_path: Path) -> None:
    paged(server)
    path = tmp_path / "events.csv"
    assert licet_command("usage", "export", "--format", "csv", "-o", path).code == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seq"] for row in rows] == ["1", "2", "3"]
    assert (json.loads(rows[0]["context"]), json.loads(rows[0]["flags"])) == ({"team": "a,b"}, ["stale"])
    assert (rows[0]["cost"], rows[0]["currency"], rows[2]["cost"]) == ("0.01", "USD", "")
    assert rows[0]["subject_id"] == "ada"
    assert set(rows[0]) == {
        *(name for name in event(1) if name not in ("subject", "resource")),
        *("subject_type", "subject_id", "on_behalf_of", "resource_type", "resource_id", "currency"),
    }


def test_an_interrupted_export_goes_on_where_it_was(
    licet_command: CommandLine, server: StubControlPlane, tmp_path: Path
) -> None:
    path = tmp_path / "events.csv"
    arguments = ("usage", "export", "--format", "csv", "-o", path)
    paged(server, fails_on="9.1.2")
    ended = licet_command(*arguments)
    assert ended.code == 1
    assert "--after 9.1.2" in ended.err
    paged(server)
    assert licet_command(*arguments).code == 2  # not over what is there
    assert licet_command(*arguments, "--after", "9.1.2").code == 0
    assert [row["seq"] for row in csv.DictReader(path.read_text().splitlines())] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--format", "xml"), "jsonl, csv"), (("-o", "/nowhere/at/all"), "can be written")],
)
def test_an_export_that_cannot_be_written_says_why(
    licet_command: CommandLine, server: StubControlPlane, arguments: tuple[str, ...], says: str
) -> None:
    ended = licet_command("usage", "export", *arguments)
    assert ended.code == 2
    assert says in ended.err


def test_follows_the_newest_events(
    licet_command: CommandLine, server: StubControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {"": [event(1)], "5": [event(2, effect="DENIED", reason="QUOTA_EXHAUSTED", rule="reports:month")], "6": []}

    def answer(request: Any) -> tuple[int, Any]:
        after = request.query.get("after", "")
        return 200, {"items": pages[after], "next": 6 if after else 5}

    server.answers["GET /v1/usage/tail"] = answer
    polls: list[float] = []

    def sleep(seconds: float) -> None:
        polls.append(seconds)
        if len(polls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(usage.time, "sleep", sleep)
    ended = licet_command("usage", "tail", "-f", "-n", "1", "--tenant", "acme")
    assert ended.out.splitlines() == [
        "2026-10-01T00:00:01Z acme user/ada report.export APPROVED OK reports=1234",
        "2026-10-01T00:00:02Z acme user/ada report.export DENIED QUOTA_EXHAUSTED reports:month reports=1234",
    ]
    assert server.requests[0].query == {"tenant": "acme", "limit": "1"}
    assert polls == [usage.TAIL_POLL_S] * 2


def test_a_tail_that_is_not_followed_ends(licet_command: CommandLine, server: StubControlPlane) -> None:
    server.answers["GET /v1/usage/tail"] = {"items": [event(1)], "next": 5}
    ended = licet_command("usage", "tail", "--json")
    assert (ended.code, ended.json) == (0, event(1))


def test_an_invoice_shows_how_it_comes_to_its_amounts(licet_command: CommandLine, server: StubControlPlane) -> None:
    server.answers["GET /v1/tenants/acme/invoices/2026-10"] = INVOICE
    ended = licet_command("usage", "invoice", "acme", "--month", "2026-10")
    assert ended.code == 0
    assert "31.00, 50 % of the month" in ended.out
    assert "600 at 10.00 per 1,000; 400 at 5.00 per 1,000 + 14.00" in ended.out
    assert "total 37.50 USD" in ended.out
    assert "PROVISIONAL" not in ended.out
    assert licet_command("usage", "invoice", "acme", "--month", "2026-10", "--json").json == INVOICE
    rows = list(
        csv.DictReader(licet_command("usage", "invoice", "acme", "--month", "2026-10", "--csv").out.splitlines())
    )
    assert [(row["tenant"], row["name"], row["priced_as"], row["amount"], row["provisional"]) for row in rows] == [
        ("acme", "pro", "", "15.50", "no"),
        ("acme", "tokens", "large", "22.00", "no"),
    ]


def test_an_invoice_that_may_change_says_so(licet_command: CommandLine, server: StubControlPlane) -> None:
    why = {"why": "month_open", "detail": "The month ends at 2026-11-01T00:00:00Z."}
    unpriced = {"feature": "reports", "units": 5_000}
    server.answers["GET /v1/tenants/acme/invoices/2026-10"] = {**INVOICE, "provisional": [why], "unpriced": [unpriced]}
    ended = licet_command("usage", "invoice", "acme", "--month", "2026-10")
    assert "PROVISIONAL" in ended.out
    assert "The month ends at" in ended.err
    assert "5,000 units of reports" in ended.err
    assert licet_command("usage", "invoice", "acme", "--month", "2026-10", "--csv", "--json").code == 2


def test_ranks_and_lists_denials(licet_command: CommandLine, server: StubControlPlane) -> None:
    row = {"tenant": "acme", "events": 5, "units": 1_200, "denials": 3, "cost": {"currency": "USD", "amount": "1.50"}}
    server.answers["GET /v1/usage/top"] = {"by": "tenant", "order": "denials", "items": [row, {**row, "cost": None}]}
    ended = licet_command("usage", "top", "--order", "denials", "-n", "5")
    assert "1.50 USD" in ended.out
    assert server.requests[-1].query == {"by": "tenant", "order": "denials", "limit": "5"}
    denied = {"feature": "reports", "action": "report.export", "reason": "NOT_ENTITLED"}
    item = {**denied, "events": 7, "units": 9_000, "tenants": 2, "subjects": 3}
    server.answers["GET /v1/usage/denied"] = {"items": [item], "next": 1}
    ended = licet_command("usage", "denied", "--reason", "NOT_ENTITLED", "--limit", "1")
    assert "9,000" in ended.out
    assert "raise --limit" in ended.err
    assert server.requests[-1].query == {"reason": "NOT_ENTITLED", "limit": "1"}


def test_a_summary_of_many_pages_is_one(licet_command: CommandLine, server: StubControlPlane) -> None:
    def item(day: str) -> dict[str, Any]:
        return {"day": day, "events": 1, "units": 1, "cost": []}

    pages = {"": {"items": [item("a")], "next": '["a"]'}, '["a"]': {"items": [item("b")], "next": None}}
    server.answers["GET /v1/usage/summary"] = lambda request: (200, pages[request.query.get("after", "")])
    result = licet_command("usage", "summary", "--by", "day", "--json").json
    assert [one["day"] for one in result["items"]] == ["a", "b"]

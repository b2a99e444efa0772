"""Usage and invoices over the REST API, from events in a real ledger."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text, update

from licet.domain.outcomes import Effect, Reason
from licet.domain.windows import Period, window_at
from licet.wire.usage import FLAG_OBSERVED, EventKind, UsageBatch
from licet_control_plane.api.app import make_app
from licet_control_plane.core.accounting import DecodedBatch
from licet_control_plane.core.fleet import heard
from licet_control_plane.store import event_reports, ledger, usage_reports
from licet_control_plane.store.schema import revisions
from tests.support.control_plane import Deployment, deployment, heartbeat
from tests.support.ledger import verification_of
from tests.support.usage import event, packed
from tests.support.valkey import ValkeyProcess

DENIED = {"effect": Effect.DENIED.value, "spends": [], "cost_nanos": 0, "currency": ""}
SEPTEMBER = window_at(Period.MONTH, 1_790_000_000)
HOUR_US = 3_600 * 10**6
DAY_US = 24 * HOUR_US
START_US = SEPTEMBER.start * 10**6
BUNDLE = """\
kind: Feature
name: reports
---
kind: Action
name: report.export
feature: reports
attributes: {model: {type: string, default: ""}}
---
kind: Plan
name: pro
fee: "30.00 USD"
features:
  reports:
    included: 10
    price:
      currency: USD
      by: context.model
      tiers:
        mode: graduated
        steps:
          - {up_to: 100, amount: "0.10", amounts: {large: "0.20"}}
          - {amount: "0.05", flat: "1.00"}
    limits:
      - {amount: 100, per: month, on_exceeded: overage, overage_price: {amount: "0.01", currency: USD}}
---
kind: Plan
name: pack
fee: "5.00 USD"
features:
  reports:
    included: 5
    limits:
      - {amount: 20, per: month}
"""


class Served:
    """A running control plane, its API, and events put in its ledger."""

    def __init__(self, running: Deployment, client: httpx.AsyncClient) -> None:
        self.running = running
        self.client = client
        self._seq = 0

    async def get(self, path: str, **params: Any) -> Any:
        if "from_" in params:
            params["from"] = params.pop("from_")
        response = await self.client.get(path, params=params)
        assert response.status_code == 200, response.text
        return response.json()

    async def problem(self, path: str, **params: Any) -> tuple[int, str]:
        response = await self.client.get(path, params=params)
        return response.status_code, f"{response.json()['detail']} {response.json()['fix']}"

    async def record(self, count: int = 1, *, sidecar: str = "a" * 32, **changes: Any) -> None:
        """Put ``count`` events with ``changes`` in the ledger."""
        first = self._seq + 1
        self._seq += count
        events = tuple(packed(event(seq, **changes)) for seq in range(first, self._seq + 1))
        one = UsageBatch(sidecar, 1, 0, 0, b"prefix00", first, self._seq, events)
        await self.running.plane.database.write(
            ledger.record, 0, [DecodedBatch.of(one.pack())], keys=self.running.keys, now_us=1
        )

    async def publish(self, *, at_us: int | None = None) -> int:
        """Publish the bundle and a license of it with two add-ons, as if at a time; the revision both hold under."""
        await self.client.post("/v1/bundles", json={"documents": [{"path": "a.yaml", "content": BUNDLE}]})
        made = await self.client.post("/v1/licenses", json={"tenant": "acme", "plan": "pro", "addons": {"pack": 2}})
        assert made.status_code == 201, made.text
        if at_us is not None:
            await self.running.plane.database.write(
                lambda connection: connection.execute(update(revisions).values(at=at_us))
            )
        return int(made.json()["revision"])


@asynccontextmanager
async def serving(directory: Path, valkey: ValkeyProcess) -> AsyncIterator[Served]:
    async with deployment(directory, valkey.url) as running:
        transport = httpx.ASGITransport(make_app(running.plane))
        headers = {"Authorization": f"Bearer {running.admin_key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://licet", headers=headers) as client:
            yield Served(running, client)


@pytest.fixture
async def served(tmp_path: Path, valkey_process: ValkeyProcess) -> AsyncIterator[Served]:
    async with serving(tmp_path / "state", valkey_process) as made:
        yield made


# Sums


async def test_sums_by_hour_day_and_month(served: Served) -> None:
    for at_us in (START_US, START_US + HOUR_US, START_US + DAY_US, SEPTEMBER.end * 10**6):
        await served.record(2, at_us=at_us)
    hours = (await served.get("/v1/usage/summary", by="hour"))["items"]
    assert [(one["hour"], one["events"]) for one in hours] == [
        ("2026-09-01T00:00:00Z", 2),
        ("2026-09-01T01:00:00Z", 2),
        ("2026-09-02T00:00:00Z", 2),
        ("2026-10-01T00:00:00Z", 2),
    ]
    days = (await served.get("/v1/usage/summary", by="day,tenant"))["items"]
    assert [(one["day"], one["events"]) for one in days] == [
        ("2026-09-01T00:00:00Z", 4),
        ("2026-09-02T00:00:00Z", 2),
        ("2026-10-01T00:00:00Z", 2),
    ]
    months = (await served.get("/v1/usage/summary", by="tenant,month"))["items"]
    assert [(one["tenant"], one["month"], one["units"]) for one in months] == [
        ("acme", "2026-09-01T00:00:00Z", 6),
        ("acme", "2026-10-01T00:00:00Z", 2),
    ]
    part = await served.get("/v1/usage/summary", by="month", from_="2026-09-01T01:00:00Z", to="2026-09-02")
    assert [one["events"] for one in part["items"]] == [2]


async def test_sums_by_day_and_by_hour_agree(served: Served) -> None:
    for number in range(40):
        await served.record(
            at_us=START_US + number * 7 * HOUR_US, action=f"report.{number % 3}", units={"in": 1, "out": 2}
        )
    database = served.running.plane.database
    for by in (["feature"], ["tenant", "month"], ["action", "day"], []):
        daily = await database.read(usage_reports.summary, by=by)
        # An interval that does not begin with a day is read from the hourly sums.
        hourly = await database.read(
            usage_reports.summary, by=by, interval=usage_reports.Interval(from_us=START_US - DAY_US + HOUR_US)
        )
        assert daily == hourly
        assert sum(one.events for one in daily[0]) == (80 if by == ["feature"] else 40)


async def test_pages_of_sums_follow_on_each_other(served: Served) -> None:
    for tenant in "edcba":
        for currency in ("USD", "EUR"):
            await served.record(tenant=tenant, currency=currency)
    found: list[Any] = []
    after = ""
    for _ in range(3):
        page = await served.get("/v1/usage/summary", by="tenant,effect", limit=2, after=after)
        found += page["items"]
        after = page["next"]
    assert after is None
    assert [one["tenant"] for one in found] == list("abcde")
    assert (await served.get("/v1/usage/summary", by="month", tenant="nobody"))["items"] == []
    assert all([cost["currency"] for cost in one["cost"]] == ["EUR", "USD"] for one in found)
    assert (await served.problem("/v1/usage/summary", by="tenant", after="?"))[0] == 422
    assert (await served.problem("/v1/usage/summary", by="tenant", after="[[1]]"))[0] == 422


async def test_sums_by_flag_and_variant_count_an_event_for_each_of_its_flags(served: Served) -> None:
    await served.record(3, exposures={"editor": "on", "export": "on"})
    await served.record(2, exposures={"editor": "off"}, reason=Reason.FEATURE_OFF.value, **DENIED)
    await served.record(4)
    rows = (await served.get("/v1/usage/summary", by="flag,variant,effect"))["items"]
    assert [(one["flag"], one["variant"], one["effect"], one["events"], one["units"]) for one in rows] == [
        ("editor", "off", "DENIED", 2, 2),
        ("editor", "on", "APPROVED", 3, 3),
        ("export", "on", "APPROVED", 3, 3),
    ]
    by_action = (await served.get("/v1/usage/summary", by="flag,tenant,action"))["items"]
    assert [(one["flag"], one["events"]) for one in by_action] == [("editor", 5), ("export", 3)]
    assert (await served.problem("/v1/usage/summary", by="variant"))[0] == 422


# The largest


async def test_the_largest_by_units_cost_events_and_denials(served: Served) -> None:
    await served.record(3, tenant="many")
    await served.record(1, tenant="heavy", units={"reports": 50}, cost_nanos=1)
    await served.record(1, tenant="dear", cost_nanos=10**9)
    await served.record(5, tenant="denied", units={"reports": 1_000}, reason=Reason.QUOTA_EXHAUSTED.value, **DENIED)

    async def ranked(order: str) -> list[tuple[str, int, int]]:
        items = (await served.get("/v1/usage/top", order=order))["items"]
        return [(one["tenant"], one["units"], one["denials"]) for one in items]

    assert (await ranked("units"))[:2] == [("heavy", 50, 0), ("many", 3, 0)]
    assert (await ranked("events"))[:2] == [("denied", 0, 5), ("many", 3, 0)]
    assert await ranked("denials") == [("denied", 0, 5)]
    assert (await ranked("cost"))[0] == ("dear", 1, 0)
    by_feature = (await served.get("/v1/usage/top", by="feature", limit=1))["items"]
    assert by_feature == [
        {
            "feature": "reports",
            "events": 10,
            "units": 54,
            "denials": 5,
            "cost": {"currency": "USD", "amount": "1.000000016"},
        }
    ]


async def test_costs_in_several_currencies_are_not_ranked_together(served: Served) -> None:
    await served.record(tenant="a", cost_nanos=7)
    await served.record(tenant="b", cost_nanos=9, currency="EUR")
    status, said = await served.problem("/v1/usage/top", order="cost")
    assert (status, "EUR, USD" in said) == (422, True)
    items = (await served.get("/v1/usage/top", order="cost", currency="EUR"))["items"]
    assert [(one["tenant"], one["cost"]["amount"]) for one in items] == [("b", "0.000000009")]


# What was denied


async def test_denials_say_what_was_asked_and_by_how_many(served: Served) -> None:
    exhausted = {**DENIED, "reason": Reason.QUOTA_EXHAUSTED.value}
    await served.record(2, subject_id="ada", units={"reports": 5}, **exhausted)
    await served.record(1, subject_id="bob", units={"reports": 1}, **exhausted)
    await served.record(1, subject_id="ada", tenant="globex", units={"reports": 1}, **exhausted)
    await served.record(
        3, action="llm.ask", units={"in": 7, "out": 1}, **{**DENIED, "reason": Reason.NOT_ENTITLED.value}
    )
    reserve = {"kind": EventKind.RESERVE, "units": {}, "units_held": {"reports": 9}}
    await served.record(1, subject_id="eve", **reserve, **exhausted)
    await served.record(9, reason=Reason.POLICY_DENIED.value, **DENIED)
    await served.record(9)
    found = await served.get("/v1/usage/denied")
    rows = [tuple(one.values()) for one in found["items"]]
    assert rows == [
        ("reports", "report.export", "QUOTA_EXHAUSTED", 5, 21, 2, 4),
        ("in", "llm.ask", "NOT_ENTITLED", 3, 21, 1, 1),
        ("out", "llm.ask", "NOT_ENTITLED", 3, 3, 1, 1),
    ]
    assert (await served.get("/v1/usage/denied", limit=2, after=2))["items"] == found["items"][2:]
    assert (await served.get("/v1/usage/denied", limit=2))["next"] == 2
    of_tenant = (await served.get("/v1/usage/denied", tenant="globex"))["items"]
    assert [(one["events"], one["subjects"]) for one in of_tenant] == [(1, 1)]
    others = (await served.get("/v1/usage/denied", reason="policy_denied,OK"))["items"]
    assert [(one["reason"], one["events"]) for one in others] == [("POLICY_DENIED", 9)]
    assert (await served.problem("/v1/usage/denied", reason="NO_MONEY"))[0] == 422


async def test_counting_denied_subjects_reads_only_denials(served: Served) -> None:
    def plan(connection: Any) -> str:
        query = "EXPLAIN QUERY PLAN SELECT at FROM ledger_events WHERE effect = 2 AND at >= 1"
        return str(connection.execute(text(query)).all())

    assert "ix_ledger_events_denied" in await served.running.plane.database.read(plan)


# Events


async def pages(served: Served, **query: Any) -> list[Any]:
    found: list[Any] = []
    after = ""
    while after is not None:
        page = await served.get("/v1/usage/events", limit=3, after=after, **query)
        found += page["items"]
        after = page["next"]
    return found


@pytest.mark.parametrize("tenant", ["", "acme"])
async def test_a_reading_has_every_event_once_though_more_come_meanwhile(served: Served, tenant: str) -> None:
    for number in range(8):
        await served.record(at_us=START_US + (number * 5 % 8) * HOUR_US)
    await served.record(4, sidecar="b" * 32, at_us=START_US + 3 * HOUR_US)
    first = await served.get("/v1/usage/events", tenant=tenant, limit=3)
    await served.record(5, at_us=START_US)
    await served.record(5, sidecar="c" * 32, at_us=START_US + 9 * HOUR_US)
    assert len(await pages(served, tenant=tenant)) == 22
    found, after = first["items"], first["next"]
    while after:
        page = await served.get("/v1/usage/events", tenant=tenant, limit=3, after=after)
        found += page["items"]
        after = page["next"]
    names = [one["decision_id"] for one in found]
    assert len(set(names)) == len(names)
    assert {one["seq"] for one in found} >= set(range(1, 13))
    assert {one["log_id"] for one in found} == {f"{'a' * 32}:1", f"{'b' * 32}:1"}
    if tenant:
        assert [one["at"] for one in found] == sorted(one["at"] for one in found)


async def test_an_event_is_shown_with_everything_it_says(served: Served) -> None:
    await served.record(
        exposures={"editor": "on"}, priced_as={"reports": "large"}, flags=4, kind=EventKind.COMMIT, about="r"
    )
    (one,) = await pages(served)
    assert one == {
        "decision_id": b"prefix00".hex() + f"{1:016x}",
        "log_id": f"{'a' * 32}:1",
        "seq": 1,
        "at": "2026-09-21T14:13:20.000001Z",
        "kind": "COMMIT",
        "tenant": "acme",
        "subject": {"type": "user", "id": "ada", "on_behalf_of": ""},
        "action": "report.export",
        "effect": "APPROVED",
        "reason": "OK",
        "rule": "",
        "revision": 1,
        "units": {"reports": 1},
        "units_held": {},
        "unfunded": {},
        "cost": {"currency": "USD", "amount": "0.000000005"},
        "priced_as": {"reports": "large"},
        "flags": ["overage"],
        "exposures": {"editor": "on"},
        "idempotency_key": "job-1",
        "resource": {"type": "", "id": ""},
        "context": {"region": "eu"},
        "spends": [{"quota": "reports:monthly:1788220800", "units": 1}],
        "shadow": [],
        "about": "r",
        "expires_at": None,
        "access_request_id": "",
        "justification": "",
    }


async def test_events_are_filtered(served: Served) -> None:
    await served.record(2, at_us=START_US)
    await served.record(3, at_us=START_US + HOUR_US, **{**DENIED, "reason": Reason.RATE_LIMITED.value})
    await served.record(1, tenant="globex", action="other", at_us=START_US + HOUR_US)
    assert len(await pages(served, effect="denied")) == 3
    assert len(await pages(served, reason="RATE_LIMITED", tenant="acme")) == 3
    assert len(await pages(served, action="other")) == 1
    assert len(await pages(served, to="2026-09-01T00:00:00.000001Z")) == 2
    assert len(await pages(served, tenant="acme", from_="2026-09-01T01:00:00Z")) == 3
    assert (await served.problem("/v1/usage/events", effect="MAYBE"))[0] == 422
    assert (await served.problem("/v1/usage/events", after="x"))[0] == 422


async def test_the_tail_goes_on_where_it_was(served: Served) -> None:
    await served.record(5)
    newest = await served.get("/v1/usage/tail", limit=2)
    assert [one["seq"] for one in newest["items"]] == [4, 5]
    assert (await served.get("/v1/usage/tail", after=newest["next"]))["items"] == []
    await served.record(5)
    await served.record(1, tenant="globex")
    some = await served.get("/v1/usage/tail", after=newest["next"], limit=3, tenant="acme")
    more = await served.get("/v1/usage/tail", after=some["next"], limit=3, tenant="acme")
    assert [one["seq"] for one in (*some["items"], *more["items"])] == [6, 7, 8, 9, 10]
    assert (await served.get("/v1/usage/tail", after=more["next"], tenant="acme"))["items"] == []
    assert (await served.problem("/v1/usage/tail", after="x"))[0] == 422


async def test_the_tail_has_every_log(served: Served) -> None:
    await served.record(3, at_us=START_US)
    await served.record(3, sidecar="b" * 32, at_us=START_US + 1)
    first = await served.get("/v1/usage/tail", limit=4)
    assert [one["seq"] for one in first["items"]] == [3, 4, 5, 6]
    await served.record(2, at_us=START_US + 2)
    await served.record(2, sidecar="c" * 32, at_us=START_US + 3)
    await served.record(2, sidecar="b" * 32, at_us=START_US + 4)
    seen: list[int] = []
    after = first["next"]
    for _ in range(5):
        page = await served.get("/v1/usage/tail", after=after, limit=2)
        seen += [one["seq"] for one in page["items"]]
        after = page["next"]
    assert sorted(seen) == [7, 8, 9, 10, 11, 12]


async def test_a_reading_looks_through_a_bounded_part_at_a_time(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_reports, "SCAN_MAX", 5)
    await served.record(12)
    await served.record(1, action="rare")
    await served.record(4, sidecar="b" * 32)
    page = await served.get("/v1/usage/events", action="rare")
    assert (page["items"], page["next"] is None) == ([], False)
    assert [one["seq"] for one in await pages(served, action="rare")] == [13]
    assert len(await pages(served)) == 17


# Invoices


def amounts(made: Any) -> list[tuple[str, str, str, int, int, str]]:
    return [
        (one["kind"], one["name"], one["priced_as"], one["units"], one["included"], one["amount"])
        for one in made["lines"]
    ]


async def test_an_invoice_prices_units_by_the_plan_they_were_decided_under(served: Served) -> None:
    revision = await served.publish(at_us=START_US + 15 * DAY_US)
    september = f"reports:month:{SEPTEMBER.start}"
    await served.record(4, at_us=START_US, units={"reports": 40}, revision=revision, spends=[(september, 40)])
    large = {"priced_as": {"reports": "large"}, "spends": []}
    await served.record(1, at_us=START_US, units={"reports": 30}, revision=revision, **large)
    await served.record(1, at_us=START_US, units={"reports": 7}, revision=revision - 1, spends=[])
    await served.record(5, at_us=START_US, units={"reports": 7}, revision=revision, **DENIED)
    await served.record(1, at_us=SEPTEMBER.end * 10**6, units={"reports": 500}, revision=revision, spends=[])
    made = await served.get("/v1/tenants/acme/invoices/2026-09")
    assert amounts(made) == [
        ("fee", "pro", "", 1, 0, "15.00"),  # for half the month
        ("fee", "pack", "", 2, 0, "5.00"),
        # 20 are included (10, and 5 of each pack), off the dearest first. Of 160 others 100 cost 0.10 and 60 0.05.
        ("usage", "reports", "large", 30, 20, "2.00"),
        ("usage", "reports", "", 160, 0, "14.00"),
        # 160 of a limit of 100 and twice 20.
        ("overage", "reports:month", "", 20, 0, "0.20"),
    ]
    assert made["totals"] == [{"currency": "USD", "amount": "36.20"}]
    assert made["unpriced"] == [{"feature": "reports", "units": 7}]
    assert made["provisional"] == []
    assert made["lines"][3]["charges"] == [
        {"units": 100, "amount": "0.10", "flat": "0.00"},
        {"units": 60, "amount": "0.05", "flat": "1.00"},
    ]


async def test_fees_and_the_open_month_are_provisional(served: Served) -> None:
    await served.publish()
    now = served.running.plane.now_s()
    month = window_at(Period.MONTH, int(now))
    made = await served.get(f"/v1/tenants/acme/invoices/{_month(now)}")
    (pro, pack) = made["lines"]
    assert (pro["kind"], pro["name"], pack["name"], pack["units"]) == ("fee", "pro", "pack", 2)
    share = (month.end - now) / (month.end - month.start)
    assert abs(pro["share_of_month"] - share) < 0.001
    assert [one["why"] for one in made["provisional"]] == ["month_open"]
    served.running.plane.fleet.sidecars["a" * 32] = heard(None, heartbeat("a" * 32), now)
    served.running.plane.fleet.sidecars["b" * 32] = heard(None, heartbeat("b" * 32), now - 60)
    made = await served.get(f"/v1/tenants/acme/invoices/{_month(now)}")
    assert [one.get("sidecars") for one in made["provisional"]] == [None, ["b" * 32]]


async def test_an_invoice_says_what_is_still_on_its_way(served: Served) -> None:
    await served.publish()
    await served.record(2, at_us=START_US)
    fleet = served.running.plane.fleet
    now_s = served.running.plane.now_s()

    async def provisional() -> list[tuple[str, Any]]:
        made = await served.get("/v1/tenants/acme/invoices/2026-09")
        return [(one["why"], one.get("sidecars") or one.get("gaps")) for one in made["provisional"]]

    fleet.sidecars["a" * 32] = first = heard(None, heartbeat("a" * 32, log_last_seq=3), now_s)
    assert await provisional() == [("sidecars_undrained", ["a" * 32])]
    # Its clock was ahead: that an event of after the month arrived says nothing about what comes next.
    await served.record(1, at_us=SEPTEMBER.end * 10**6)
    assert await provisional() == [("sidecars_undrained", ["a" * 32])]
    # The ledger is where the log ended after the month, by both clocks.
    fleet.sidecars["a" * 32] = heard(first, heartbeat("a" * 32, log_last_seq=9, log_acked_seq=3), now_s)
    assert await provisional() == []
    served._seq += 3
    await served.record(1, at_us=SEPTEMBER.end * 10**6)
    assert await provisional() == [("gaps", [{"log_id": f"{'a' * 32}:1", "from_seq": 4, "to_seq": 6}])]
    # One that left, and had more than the ledger has.
    fleet.sidecars["a" * 32] = replace(fleet.sidecars["a" * 32], gone=True)
    assert ("sidecars_undrained", ["a" * 32]) in await provisional()


async def test_what_only_observe_mode_let_through_is_no_overage(served: Served) -> None:
    revision = await served.publish(at_us=START_US)
    september = f"reports:month:{SEPTEMBER.start}"
    taken = {"at_us": START_US, "units": {"reports": 70}, "revision": revision, "spends": [(september, 70)]}
    await served.record(2, **taken)
    await served.record(1, **{**DENIED, **taken}, flags=FLAG_OBSERVED)
    made = await served.get("/v1/tenants/acme/invoices/2026-09")
    assert amounts(made) == [
        ("fee", "pro", "", 1, 0, "30.00"),
        ("fee", "pack", "", 2, 0, "10.00"),
        ("usage", "reports", "", 140, 20, "12.00"),
    ]


async def test_what_has_no_invoice_is_a_problem(served: Served) -> None:
    assert (await served.problem("/v1/tenants/nobody/invoices/2026-09"))[0] == 404
    for month in ("2026-13", "2026", "september", "2026-9"):
        status, said = await served.problem(f"/v1/tenants/acme/invoices/{month}")
        assert (status, "2026-10" in said) == (422, True)


async def test_the_sums_are_verified(served: Served) -> None:
    await served.record(3, exposures={"editor": "on"})
    plane = served.running.plane

    async def is_whole() -> bool:
        return (await asyncio.to_thread(verification_of, plane.database, plane.ledger_key)).ok

    assert await is_whole()
    for table, altered, as_it_was in (
        ("ledger_billed", "units = units + 1", "units = units - 1"),
        ("ledger_exposures", "variant = 'off'", "variant = 'on'"),
        ("ledger_rollup_days", "decisions = decisions + 1", "decisions = decisions - 1"),
        ("ledger_rollups", "cost_nanos = cost_nanos + 1", "cost_nanos = cost_nanos - 1"),
    ):
        for change, whole in ((altered, False), (as_it_was, True)):
            await plane.database.write(lambda c, sql: c.execute(text(sql)), f"UPDATE {table} SET {change}")
            assert await is_whole() is whole, (table, change)


def _month(now_s: float) -> str:
    return time.strftime("%Y-%m", time.gmtime(now_s))

"""Who may ask what of the REST API, and that the audit trail has it and is what was recorded."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, delete, select, text, update

from licet_control_plane.api.access import OPEN, RULES, Reach, Route, Rule
from licet_control_plane.api.auth import FAILURES_BURST
from licet_control_plane.core.access import MAY, Need, Role
from licet_control_plane.store.schema import audit, audit_checkpoints, audit_head
from tests.support.control_plane import deployment, until
from tests.support.site import BUNDLE, Site
from tests.support.valkey import ValkeyProcess

FILLED = {
    "request_id": "nobody",
    "override_id": "nobody",
    "tenant": "acme",
    "revision": "1",
    "month": "2020-01",
    "grant_id": "g",
    "number": "1",
    "sidecar": "0" * 32,
}
FILLED |= {"log_id": "x", "seq": "1", "key": "nobody", "webhook": "wh_0", "plan": "pro"}


@pytest.fixture
async def site(tmp_path: Path, valkey_process: ValkeyProcess) -> AsyncIterator[Site]:
    async with deployment(tmp_path / "state", valkey_process.url, api_rate=0.0, webhooks_private=True) as running:
        yield Site(running)


def routes(app: Any) -> dict[Route, Any]:
    """Every route that OpenAPI knows, with its operation."""
    return {
        (method.upper(), path): operation
        for path, operations in app.openapi()["paths"].items()
        for method, operation in operations.items()
    }


async def test_every_route_has_an_entry_in_the_table_and_every_entry_a_route(site: Site) -> None:
    known = {route for route in routes(site.app) if route[1] not in OPEN}
    assert known - RULES.keys() == set(), "give these routes an entry in api/access.py"
    assert RULES.keys() - known == set(), "these routes are gone: take their entry out of api/access.py"


async def test_entries_say_what_the_route_is(site: Site) -> None:
    for route, operation in routes(site.app).items():
        if route[1] in OPEN:
            continue
        rule = RULES[route]
        query = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "query"}
        assert (rule.reach is Reach.TENANT) == ("{tenant}" in route[1]), route
        assert (rule.reach is Reach.FILTER) <= ("tenant" in query), route
        if rule.changes and route[0] != "GET":
            assert rule.records or rule.why, f"{route} changes something: what does the audit trail call it?"


def test_the_documentation_says_what_each_action_of_the_audit_trail_is() -> None:
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    actions = {name for rule in RULES.values() for name in (rule.records, rule.creates) if name}
    assert [name for name in sorted(actions) if f"`{name}`" not in text] == []


def _filled(path: str, tenant: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: {**FILLED, "tenant": tenant}[match[1]], path)


async def test_each_role_gets_through_where_the_table_says_and_nowhere_else(site: Site) -> None:
    for role in Role:
        key = await site.key(role.value)
        for (method, path), rule in RULES.items():
            if rule.need in MAY[role] and method != "GET":
                continue  # what it may do is done below, and not with nonsense here
            if path in ("/v1/ledger/verify", "/v1/usage/batches"):
                continue
            response = await site.ask(method, _filled(path, "acme"), key=key)
            may = rule.need in MAY[role]
            assert (response.status_code != 403) == may, (role, method, path, response.text)
            if not may:
                assert f"role {role.value}" in response.json()["detail"]


@pytest.mark.parametrize("role", ["admin", "operator", "approver", "auditor"])
async def test_a_key_of_one_tenant_reaches_nothing_of_another_nor_what_they_share(site: Site, role: str) -> None:
    await site.ask("POST", "/v1/bundles", documents=[{"path": "a.yaml", "content": BUNDLE}])
    for tenant in ("acme", "globex"):
        assert (await site.ask("POST", "/v1/licenses", tenant=tenant, plan="pro")).status_code == 201
    key = await site.key(role, "acme")
    for (method, path), rule in RULES.items():
        if rule.need not in MAY[Role(role)]:
            continue
        params = {"tenant": "globex"} if rule.reach is Reach.FILTER else None
        other = {"tenant": "globex", "plan": "pro"}
        bodies: dict[Route, dict[str, Any]] = {
            ("POST", "/v1/licenses"): other,
            ("POST", "/v1/licenses/import"): {"licenses": [{"tenant": "acme", "plan": "pro"}, other]},
        }
        for tenant in ("globex", "nobody") if rule.reach is Reach.TENANT else ("globex",):
            response = await site.ask(
                method, _filled(path, tenant), key=key, params=params, **bodies.get((method, path), {})
            )
            if rule.reach is Reach.FOUND:
                assert response.status_code == 404, (method, path, response.text)
                continue
            assert response.status_code == 403, (method, path, response.text)
            assert response.json()["detail"] == "This key reaches the tenant acme only."
    items = (await site.ask("GET", "/v1/licenses", key=key)).json()["items"]
    assert [item["tenant"] for item in items] == ["acme"]
    if Need.READ_RECORDS in MAY[Role(role)]:
        entries = (await site.ask("GET", "/v1/audit", key=key)).json()["items"]
        assert {entry["tenant"] for entry in entries} == {"acme"}
        summary = await site.ask("GET", "/v1/usage/summary", key=key)
        assert summary.json()["items"] == []


async def test_a_row_without_a_tenant_is_not_taken_for_the_callers_own(site: Site) -> None:
    await site.ask("POST", "/v1/bundles", documents=[{"path": "a.yaml", "content": BUNDLE}])
    await site.ask("POST", "/v1/licenses", tenant="acme", plan="pro", grace_s=60)
    key = await site.key("operator", "acme")
    refused = await site.ask("POST", "/v1/licenses/import", key=key, licenses=[{"tenant": "", "plan": "pro"}])
    assert (refused.status_code, refused.json()["errors"][0]["path"]) == (422, "licenses.0.tenant")
    assert (await site.ask("GET", "/v1/licenses/acme")).json()["grace_s"] == 60


async def test_a_revoked_key_and_one_that_expired_open_nothing_from_the_next_request_on(
    site: Site, tmp_path: Path
) -> None:
    key = await site.key("operator")
    assert (await site.ask("GET", "/v1/status", key=key)).status_code == 200
    listed = (await site.ask("GET", "/v1/api-keys")).json()["items"]
    one = next(item for item in listed if item["name"] == "operator-all")
    assert one["last_used_at"] is not None
    assert key not in json.dumps(listed)
    assert key[6:18] == one["id"]
    assert (await site.ask("DELETE", f"/v1/api-keys/{one['id']}")).json()["state"] == "revoked"
    assert (await site.ask("GET", "/v1/status", key=key)).status_code == 401
    assert (await site.ask("DELETE", "/v1/api-keys/nobody")).status_code == 404
    again = await site.ask("POST", "/v1/api-keys", name="operator-all", role="operator")
    assert again.status_code == 409

    soon = await site.ask("POST", "/v1/api-keys", name="soon", role="auditor", expires_at="2100-01-01")
    assert (await site.ask("GET", "/v1/status", key=soon.json()["key"])).status_code == 200
    await site.sql(lambda c: c.execute(text("UPDATE api_keys SET expires_at = 1 WHERE name = 'soon'")))
    assert (await site.ask("GET", "/v1/status", key=soon.json()["key"])).status_code == 401
    past = await site.ask("POST", "/v1/api-keys", name="past", role="auditor", expires_at="2020-01-01")
    assert past.status_code == 422
    written = b"".join(path.read_bytes() for path in (tmp_path / "state").iterdir() if path.is_file())
    assert key.encode() not in written
    assert key[19:].encode() not in written


async def test_who_fails_too_often_waits_and_a_neighbor_with_a_good_key_does_not(site: Site) -> None:
    good = await site.key("auditor")
    async with site.as_(good, "10.1.1.1") as neighbor:
        assert (await neighbor.get("/v1/status")).status_code == 200
        for number in range(FAILURES_BURST):
            async with site.as_(f"licet_guess{number}", "10.1.1.1") as attacker:
                assert (await attacker.get("/v1/status")).status_code == 401
        async with site.as_("licet_guess", "10.1.1.1") as attacker:
            refused = await attacker.get("/v1/status")
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) > 0
        assert (await neighbor.get("/v1/status")).status_code == 200
    async with site.as_("licet_guess", "10.1.1.2") as elsewhere:
        assert (await elsewhere.get("/v1/status")).status_code == 401


async def test_refused_changes_are_in_the_trail_and_cannot_fill_it(site: Site) -> None:
    auditor = await site.key("auditor")
    before = len(await site.actions())
    for _ in range(60):
        assert (await site.ask("POST", "/v1/licenses", key=auditor, tenant="x", plan="y")).status_code == 403
    assert (await site.ask("GET", "/v1/api-keys", key=auditor)).status_code == 403
    for number in range(30):
        async with site.as_(f"licet_{number}", f"10.0.0.{number}") as stranger:
            await stranger.delete("/v1/api-keys/admin")
    entries = (await site.ask("GET", "/v1/audit", params={"action": "access.denied", "limit": 1000})).json()["items"]
    assert len(entries) == 20 + 30
    assert len(await site.actions()) - before == 50
    assert site.running.plane.denials_unrecorded == 41
    first = entries[-1]
    assert (first["by"], first["via"], first["address"]) == ("auditor-all", "api-key", "127.0.0.1")
    assert first["target"] == "POST /v1/licenses"
    assert entries[0]["by"] == "unknown"


TWO_PLANS = f"{BUNDLE}---\nkind: Plan\nname: max\nfeatures: {{reports: {{limits: [{{amount: 900, per: month}}]}}}}\n"

LETTER_AND_LEDGER: dict[Route, str] = {
    ("POST", "/v1/usage/dead-letters/{number}/retry"): "test_cli_kept_aside.py",
    ("DELETE", "/v1/usage/dead-letters/{number}"): "test_cli_kept_aside.py",
    ("POST", "/v1/ledger/months/{month}/exports"): "test_retention.py",
    ("POST", "/v1/ledger/months/{month}/drop"): "test_retention.py",
    ("POST", "/v1/sidecars/{sidecar}/reclaim"): "test_quotas.py",
    ("POST", "/v1/access-requests/{request_id}/approve"): "test_access_requests.py",
    ("POST", "/v1/access-requests/{request_id}/deny"): "test_access_requests.py",
    ("POST", "/v1/access-requests/{request_id}/revoke"): "test_access_requests.py",
}
"""What needs a ledger, a dead sidecar or a sidecar's question to be done: these tests look into the audit trail
themselves."""


async def test_every_route_that_changes_something_leaves_an_entry_with_who_and_from_where(site: Site) -> None:
    operator = await site.key("admin")
    await site.ask("POST", "/v1/api-keys", name="short", role="auditor")
    grant = {"limit": "reports:month", "amount": 5, "id": "g", "expires_after_s": 60}
    done: dict[Route, dict[str, Any]] = {
        ("POST", "/v1/bundles"): {"documents": [{"path": "a.yaml", "content": TWO_PLANS}]},
        ("POST", "/v1/licenses"): {"tenant": "acme", "plan": "pro"},
        ("PATCH", "/v1/licenses/{tenant}"): {"ends_at": "2099-01-01T00:00:00Z"},
        ("PUT", "/v1/licenses/{tenant}"): {"plan": "pro", "renewal_period": "month"},
        ("POST", "/v1/licenses/import"): {
            "licenses": [{"tenant": "acme", "plan": "pro", "renewal_period": "month", "grace_s": 60}]
        },
        ("POST", "/v1/licenses/{tenant}/suspend"): {},
        ("POST", "/v1/licenses/{tenant}/resume"): {},
        ("POST", "/v1/licenses/{tenant}/renew"): {},
        ("POST", "/v1/licenses/{tenant}/grants"): grant,
        ("DELETE", "/v1/licenses/{tenant}/grants/{grant_id}"): {},
        ("POST", "/v1/licenses/{tenant}/change-plan"): {"plan": "max"},
        ("POST", "/v1/licenses/{tenant}/cancel"): {},
        ("POST", "/v1/webhooks"): {"url": "http://127.0.0.1:9/"},
        ("POST", "/v1/webhooks/{webhook}/secret"): {},
        ("POST", "/v1/webhooks/{webhook}/test"): {},
        ("POST", "/v1/webhooks/{webhook}/redeliver"): {},
        ("POST", "/v1/webhooks/{webhook}/enable"): {},
        ("DELETE", "/v1/webhooks/{webhook}"): {},
        ("POST", "/v1/tenants/{tenant}/subjects/erase"): {"type": "user", "id": "ada"},
        ("POST", "/v1/ledger/restored"): {},
        ("POST", "/v1/api-keys"): {"name": "made", "role": "auditor"},
        ("DELETE", "/v1/api-keys/{key}"): {},
        ("POST", "/v1/overrides"): {
            "action": "report.*",
            "effect": "deny",
            "expires_after_s": 60,
            "reason": "a leak",
            "id": "short",
        },
        ("DELETE", "/v1/overrides/{override_id}"): {},
    }
    done[("POST", "/v1/bundles/{revision}/rollback")] = {}
    done[("POST", "/v1/signing-keys")] = done[("POST", "/v1/signing-keys/rotate")] = {}
    done[("POST", "/v1/signing-keys/{key}/retire")] = {}
    webhook = "wh_0"
    first_key = (await site.ask("GET", "/v1/signing-keys")).json()["items"][0]["id"]
    for route, one in RULES.items():
        if not one.records:
            continue
        assert route in done or route in LETTER_AND_LEDGER, f"say here how {route} is asked, and see its entry"
    for route, body in done.items():
        rule: Rule = RULES[route]
        if route[1].endswith("/rollback"):
            other = TWO_PLANS.replace("100", "200")
            await site.ask("POST", "/v1/bundles", documents=[{"path": "a.yaml", "content": other}])
        if route[1].endswith("/retire"):
            await until(partial(_resigned, site))
        before = await site.actions()
        path = (
            _filled(route[1], "acme")
            .replace("nobody", first_key if "signing" in route[1] else "short")
            .replace("wh_0", webhook)
        )
        async with site.as_(operator, "192.0.2.7") as client:
            response = await client.request(route[0], path, json=body, headers={"X-Request-Id": "order-17"})
        assert response.is_success, (route, response.text)
        assert response.headers["X-Request-Id"] == "order-17"
        if route == ("POST", "/v1/webhooks"):
            webhook = response.json()["id"]
        assert (await site.actions())[len(before) :] == [rule.records]
        newest = (await site.ask("GET", "/v1/audit", params={"limit": 1})).json()["items"][0]
        assert (newest["by"], newest["via"], newest["address"], newest["request"]) == (
            "admin",
            "api-key",
            "192.0.2.7",
            "order-17",
        )
        assert newest["tenant"] == ("acme" if rule.reach in (Reach.TENANT, Reach.BODY) else None)
    assert (await site.verified())["ok"]
    for module in set(LETTER_AND_LEDGER.values()):
        assert "audit" in (Path(__file__).parent / module).read_text()


async def _resigned(site: Site) -> bool:
    items = (await site.ask("GET", "/v1/signing-keys")).json()["items"]
    return any(item["state"] == "active" and item["resigned_at"] for item in items)


async def test_the_trail_is_filtered_and_followed_by_cursor(site: Site) -> None:
    for number in range(7):
        await site.ask("POST", "/v1/api-keys", name=f"k{number}", role="auditor")
    seen: list[str] = []
    query: dict[str, Any] = {"action": "api_key.*", "limit": 3}
    while True:
        page = (await site.ask("GET", "/v1/audit", params=query)).json()
        seen += [item["target"] for item in page["items"]]
        if page["next"] is None:
            break
        query["before"] = page["next"]
    assert seen == [f"k{number}" for number in reversed(range(7))]
    oldest = (await site.ask("GET", "/v1/audit", params={"after": 2, "limit": 2})).json()
    assert [item["number"] for item in oldest["items"]] == [3, 4]
    assert oldest["next"] == 4
    for none in ({"by": "nobody"}, {"target": "k1", "action": "bundle.*"}, {"from": "2090-01-01"}, {"tenant": "acme"}):
        assert (await site.ask("GET", "/v1/audit", params=none)).json() == {"items": [], "next": None}
    for wrong in ({"before": 1, "after": 1}, {"by": "\0"}, {"tenant": "\0"}):
        assert (await site.ask("GET", "/v1/audit", params=wrong)).status_code == 422


async def _recorded(site: Site, entries: int = 8) -> None:
    """A trail of so many entries, whose head is signed."""
    for number in range(entries):
        await site.ask("POST", "/v1/api-keys", name=f"k{number}", role="auditor")
    await until(lambda: _signed(site, entries))
    assert await site.verified() == {
        "ok": True,
        "entries": entries,
        "head": (await site.ask("GET", "/v1/audit/head")).json()["hash"],
        "heads": 2,
        "fault": None,
    }


async def _signed(site: Site, entries: int) -> bool:
    return site.running.plane.audit.number == entries


async def test_a_head_that_several_ask_for_at_once_is_signed_for_each(site: Site) -> None:
    await site.ask("POST", "/v1/api-keys", name="k", role="auditor")
    answers = await asyncio.gather(*(site.ask("GET", "/v1/audit/head") for _ in range(24)))
    assert [answer.status_code for answer in answers] == [200] * 24


async def test_each_altered_column_is_found(site: Site) -> None:
    await _recorded(site)
    fifth = audit.c.number == 5
    for column in audit.columns:
        if column.name == "number":
            continue
        query = select(column).where(fifth)
        old = await site.running.plane.database.read(Connection.scalar, query)
        new: Any = {int: 7, str: "{}x", bytes: b"\7" * 32}[type(old)]
        await site.sql(partial(Connection.execute, statement=update(audit).where(fifth).values({column: new})))
        found = await site.verified()
        assert (found["ok"], found["fault"]["entry"]) == (False, 5), column.name
        await site.sql(partial(Connection.execute, statement=update(audit).where(fifth).values({column: old})))
    assert (await site.verified())["ok"]


@pytest.mark.parametrize(
    ("gone", "says"),
    [((1, 1), "entry 1 was removed"), ((4, 5), "entries 4 to 5 were removed"), ((7, 8), "7 to 8 were removed")],
)
async def test_removed_rows_are_found_at_the_beginning_in_the_middle_and_at_the_end(
    site: Site, gone: tuple[int, int], says: str
) -> None:
    await _recorded(site)
    await site.sql(lambda c: c.execute(delete(audit).where(audit.c.number.between(*gone))))
    found = await site.verified()
    assert (found["ok"], found["fault"]["entry"]) == (False, gone[0])
    assert says in found["fault"]["what"]


async def test_a_tail_that_was_cut_off_with_all_that_knew_it_is_found_by_the_head_in_the_state_directory(
    site: Site,
) -> None:
    await _recorded(site)

    def cut(connection: Connection) -> None:
        last = connection.scalar(select(audit.c.hash).where(audit.c.number == 6))
        connection.execute(delete(audit).where(audit.c.number > 6))
        connection.execute(delete(audit_checkpoints))
        connection.execute(update(audit_head).values(number=6, hash=last))

    await site.sql(cut)
    found = await site.verified()
    assert found["fault"] == {"entry": 7, "what": "entries 7 to 8 were removed: a signed head knows them"}
    # What is recorded from now on does not cover it up.
    for number in range(3):
        await site.ask("POST", "/v1/api-keys", name=f"later{number}", role="auditor")
    found = await site.verified()
    assert (found["ok"], found["entries"]) == (False, 9)
    assert "was written anew: a signed head of entry 8" in found["fault"]["what"]

"""``licet policy …`` against a real control plane and a real sidecar: what was pushed, what differs, going back."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from licet import AsyncClient, Client, InvalidRequest, Reason, Subject
from tests.support import plain_http
from tests.support.command_line import CommandLine, Ended, licet_command
from tests.support.fleet import Fleet, wait_until

__all__ = ["licet_command"]

CATALOG = """\
# What we sell.
kind: Feature
name: reports
---
kind: Action
name: report.export
feature: reports
attributes: {region: {type: string, default: ""}}
"""
PLAN = """\
kind: Plan
name: pro
features:
  reports:
    limits:
      - {amount: 100, per: month}   # a month
"""
POLICY = """\
kind: Policy
name: guard-exports
actions: [report.*]
rules:
  - {name: embargo, effect: deny, when: 'context.region == "xx"'}
"""

Licet = Callable[..., Ended]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), count=1)
    try:
        yield fleet.start()
    finally:
        fleet.stop()


@pytest.fixture
def licet(fleet: Fleet, licet_command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> Licet:
    """The command line in this process, with the fleet as its target."""
    monkeypatch.setenv("LICET_SERVER", fleet.server_url)
    monkeypatch.setenv("LICET_API_KEY", (fleet.directory / "server" / "admin-key").read_text().strip())
    monkeypatch.setenv("LICET_SIDECAR", fleet.addresses[0])
    return licet_command


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    directory = tmp_path / "catalog"
    (directory / "sold").mkdir(parents=True)
    (directory / "base.yaml").write_text(CATALOG)
    (directory / "sold" / "plans.yaml").write_text(PLAN)
    (directory / "policies.yaml").write_text(POLICY)
    return directory


def pushed(licet: Licet, catalog: Path, *arguments: str) -> int:
    ended = licet("policy", "push", catalog, "--json", *arguments)
    assert ended.code == 0, ended.err
    return int(ended.json["revision"])


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))


def test_what_is_exported_and_pushed_again_changes_nothing(licet: Licet, catalog: Path, tmp_path: Path) -> None:
    revision = pushed(licet, catalog)
    for place, flags in (("as-pushed", []), ("canonical", ["--canonical"])):
        out = tmp_path / place
        ended = licet("policy", "export", "--output", out, *flags, "--json")
        assert ended.code == 0, ended.err
        assert ended.json["revision"] == revision
        texts = {path: (out / path).read_text() for path in ended.json["files"]}
        for text in texts.values():
            assert text.count("apiVersion: licet/v1") == text.count("kind: ")
        assert ("sold/plans.yaml" in texts) == (place == "as-pushed")
        assert licet("policy", "validate", out).code == 0
        again = licet("policy", "push", out)
        assert f"nothing changed; revision {revision} stands" in again.out
        assert licet("policy", "diff", out).code == 0
    assert "# a month" in (tmp_path / "as-pushed" / "sold" / "plans.yaml").read_text()


def test_an_export_does_not_mix_with_what_is_there(licet: Licet, catalog: Path, tmp_path: Path) -> None:
    pushed(licet, catalog)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.yaml").write_text("kept")
    ended = licet("policy", "export", "--output", out)
    assert (ended.code, "--force" in ended.err) == (2, True)
    assert [path.name for path in out.iterdir()] == ["mine.yaml"]
    assert licet("policy", "export", "--output", out, "--force").code == 0
    assert (out / "mine.yaml").read_text() == "kept"
    assert licet("policy", "export").code == 2


def test_history_tells_who_changed_what_and_show_tells_what_it_was(licet: Licet, catalog: Path) -> None:
    first = pushed(licet, catalog, "--message", "as it was")
    edit(catalog / "sold" / "plans.yaml", "amount: 100", "amount: 200")
    second = pushed(licet, catalog, "--message", "more for everybody", "--observe")

    found = licet("policy", "history", "--limit", "2", "--json").json
    newest, before = found["items"]
    assert (newest["revision"], newest["message"], newest["observe"]) == (second, "more for everybody", True)
    assert newest["changed"] == {"added": [], "modified": ["Plan/pro"], "removed": []}
    assert (newest["current"], before["current"]) == (True, False)
    assert (newest["by"], newest["at"][-1]) == ("admin", "Z")
    text = licet("policy", "history").out
    assert f"{second} *" in text
    assert "more for everybody" in text

    page = licet("policy", "history", "--limit", "1", "--before", second, "--json").json
    assert [item["revision"] for item in page["items"]] == [before["revision"]]
    everything = licet("policy", "history", "--limit", "1000", "--json").json
    assert everything["next"] is None
    revisions = [item["revision"] for item in everything["items"]]
    assert revisions == sorted(revisions, reverse=True)
    oldest = everything["items"][-1]
    assert "Plan/pro" in oldest["changed"]["added"]

    shown = licet("policy", "show", second)
    assert "more for everybody" in shown.out
    assert "~ Plan/pro" in shown.out
    assert licet("policy", "show", first, "--file", "sold/plans.yaml").out == f"apiVersion: licet/v1\n{PLAN}"
    assert "amount: 200" in licet("policy", "show", second, "--document", "Plan/pro").out
    missing = licet("policy", "show", second, "--document", "Plan/por")
    assert missing.code == 1
    assert "Did you mean 'Plan/pro'?" in missing.err
    for revision in (second + 1_000, 2**70):
        assert f"no revision {revision}" in licet("policy", "show", revision).err
    pushed(licet, catalog)


def test_a_revision_that_is_no_bundle_names_the_one_in_force_then(licet: Licet, catalog: Path) -> None:
    revision = pushed(licet, catalog)
    made = licet("license", "create", "history-tenant", "--plan", "pro", "--json").json
    ended = licet("policy", "show", made["revision"])
    assert ended.code == 1
    assert f"revision {revision}" in ended.err


def test_diff_says_what_changes_in_meaning_and_its_exit_code_is_that_of_diff(licet: Licet, catalog: Path) -> None:
    first = pushed(licet, catalog)
    edit(catalog / "base.yaml", "# What we sell.", "# What we really sell.")
    same = licet("policy", "diff", catalog)
    assert (same.code, f"no difference from revision {first}" in same.out) == (0, True)

    edit(catalog / "sold" / "plans.yaml", "amount: 100", "amount: 200")
    edit(catalog / "policies.yaml", '"xx"', '"yy"')
    ended = licet("policy", "diff", catalog)
    assert ended.code == 1
    assert "plan pro: reports: limit month 100 -> 200" in ended.out
    assert "rule guard-exports/embargo: condition changed" in ended.out
    assert '- context.region == "xx"' in ended.out
    assert '+ context.region == "yy"' in ended.out
    found = licet("policy", "diff", catalog, "--json").json
    assert [one["path"] for one in found["differences"]] == [
        ["reports", "limit month"], ["rule embargo", "condition"],
    ]  # fmt: skip
    assert found["differences"][0]["licenses"] >= 0

    second = pushed(licet, catalog)
    assert "limit month 200 -> 100" in licet("policy", "diff", first).out
    assert "limit month 100 -> 200" in licet("policy", "diff", first, second).out
    assert "limit month 100 -> 200" in licet("policy", "diff", catalog, first).out
    assert licet("policy", "diff", second).code == 0
    assert "mode enforce -> observe" in licet("policy", "diff", catalog, "--observe").out


def test_a_diff_that_cannot_be_made_exits_with_2(licet: Licet, catalog: Path) -> None:
    pushed(licet, catalog)
    (catalog / "sold" / "plans.yaml").write_text(PLAN.replace("reports", "rapports"))
    ended = licet("policy", "diff", catalog)
    assert ended.code == 2
    assert f"{catalog}/sold/plans.yaml:4:3" in ended.err
    assert licet("policy", "diff", 999_999).code == 2
    assert licet("policy", "diff", catalog / "nothing").code == 2


def test_rollback_publishes_old_content_as_a_new_revision(licet: Licet, catalog: Path, fleet: Fleet) -> None:
    first = pushed(licet, catalog)
    edit(catalog / "sold" / "plans.yaml", "amount: 100", "amount: 7")
    second = pushed(licet, catalog, "--observe")

    dry = licet("policy", "rollback", first, "--dry-run", "--json")
    assert (dry.code, dry.json["published"]) == (0, False)
    assert licet("policy", "history", "--limit", "1", "--json").json["items"][0]["revision"] == second

    ended = licet("policy", "rollback", first, "--wait", "-m", "too low")
    assert ended.code == 0, ended.err
    assert fleet.server_url in ended.err
    assert "plan pro: reports: limit month 7 -> 100" in ended.out
    assert "bundle: mode observe -> enforce" in ended.out
    assert "live on all 1 sidecar" in ended.out
    (item,) = licet("policy", "history", "--limit", "1", "--json").json["items"]
    assert item["revision"] == second + 1
    assert (item["message"], item["observe"]) == ("too low", False)
    assert licet("policy", "diff", first).code == 0

    again = licet("policy", "rollback", first)
    assert f"nothing changed; revision {second + 1} says what revision {first} said" in again.out
    with sqlite3.connect(f"file:{fleet.directory}/server/licet.db?mode=ro", uri=True) as database:
        ((target, after),) = database.execute(
            "SELECT target, after FROM audit WHERE action = 'bundle.rollback' ORDER BY number DESC LIMIT 1"
        )
    assert target == f"revision {second + 1}"
    assert json.loads(after)["restores"] == first


def test_a_rollback_that_licenses_forbid_is_refused(licet: Licet, catalog: Path) -> None:
    first = pushed(licet, catalog)
    (catalog / "sold" / "trial.yaml").write_text(PLAN.replace("name: pro", "name: trial"))
    second = pushed(licet, catalog)
    assert licet("license", "create", "on-trial", "--plan", "trial").code == 0
    ended = licet("policy", "rollback", first)
    assert ended.code == 1
    assert "plan 'trial' is not in this bundle and is held by 1 license" in ended.err
    assert licet("policy", "history", "--limit", "1", "--json").json["items"][0]["revision"] == second
    assert licet("license", "update", "on-trial", "--plan", "pro").code == 0


def test_explain_and_entitlements_say_why_and_what_remains(licet: Licet, catalog: Path, fleet: Fleet) -> None:
    pushed(licet, catalog, "--wait")
    assert licet("license", "create", "explained", "--plan", "pro", "--wait").code == 0
    assert licet("check", "explained", "report.export", "--quantity", "30").code == 0

    ended = licet("explain", "explained", "report.export", "--context", "region=xx", "--subject", "user:ada")
    assert ended.code == 1
    assert "DENIED  POLICY_DENIED" in ended.out
    assert ">>  policies" in ended.out
    assert 'guard-exports/embargo: deny when context.region == "xx": matches' in ended.out
    assert "reports:month: 70 of 100 left, asks 1" in ended.out
    assert "ok  license     Plan pro, active, open-ended" in ended.out

    found = licet("policy", "explain", "explained", "report.export", "--quantity", "5", "--json")
    assert (found.code, found.json["decision"]["effect"]) == (0, "APPROVED")
    assert [step["outcome"] for step in found.json["steps"]] == ["PASSED"] * 8
    assert found.json["steps"][7]["limits"][0]["remaining"] == 70
    assert licet("explain", "nobody", "report.export").code == 1

    shown = licet("entitlements", "explained", "--subject", "ada")
    assert shown.code == 0
    assert "plan pro: active" in shown.out
    assert "reports:month: 70 of 100 left" in shown.out
    assert "APPROVED  report.export" in shown.out
    found = licet("entitlements", "explained", "--context", "region=xx", "--json").json
    assert found["actions"][0]["reason"] == "POLICY_DENIED"
    nobody = licet("entitlements", "nobody", "--json")
    assert (nobody.code, nobody.json["license"]) == (1, None)


async def test_the_asynchronous_client_explains_too(licet: Licet, catalog: Path, fleet: Fleet) -> None:
    pushed(licet, catalog, "--wait")
    async with AsyncClient(fleet.addresses[0]) as client:
        explanation = await client.explain("nobody-else", "report.export", quantity=2)
        assert (explanation.decision.reason, explanation.steps[0].outcome) == (Reason.NO_LICENSE, "DECIDED")
        assert (await client.list_entitlements("nobody-else", subject="ada", context={"region": "eu"})).plan == ""
        with pytest.raises(InvalidRequest, match="context"):
            await client.list_entitlements("nobody-else", context={"region": object()})  # type: ignore[dict-item]


def recorded(fleet: Fleet, tenant: str) -> int:
    """How many decisions on a tenant the ledger has."""
    headers = {"Authorization": f"Bearer {(fleet.directory / 'server' / 'admin-key').read_text().strip()}"}
    page = plain_http.get(f"{fleet.server_url}/v1/decisions", params={"tenant": tenant}, headers=headers).json()
    return int(page["total"])


PRICED = PLAN.replace("    limits:", '    price: {amount: "2.00", currency: USD}\n    limits:')
ROLE = """\
kind: Role
name: analyst
actions: [report.*]
"""


def test_simulate_lists_answers_and_costs_that_would_be_others(licet: Licet, catalog: Path, fleet: Fleet) -> None:
    (catalog / "sold" / "plans.yaml").write_text(PRICED)
    (catalog / "roles.yaml").write_text(ROLE)
    pushed(licet, catalog, "--wait")
    for tenant in ("sim-a", "sim-b"):
        assert licet("license", "create", tenant, "--plan", "pro", "--wait").code == 0
    analyst = ("--role", "analyst")
    with Client(fleet.addresses[0]) as client:
        for number in range(12):
            for tenant in ("sim-a", "sim-b"):
                subject = Subject(f"user-{number}", roles=["analyst"] if number else [])
                decision = client.check(
                    tenant, "report.export", subject=subject, quantity=4, context={"region": "yy" if number > 9 else ""}
                )
                assert decision.approved == (number > 0)
    assert licet("reservation", "make", "sim-a", "report.export", *analyst, "--quantity", "3").code == 0
    wait_until("the ledger has them", lambda: [recorded(fleet, name) for name in ("sim-a", "sim-b")] == [13, 12])

    edit(catalog / "sold" / "plans.yaml", "amount: 100", "amount: 30")
    edit(catalog / "sold" / "plans.yaml", '"2.00"', '"3.00"')
    edit(catalog / "policies.yaml", '"xx"', '"yy"')
    ended = licet("policy", "simulate", catalog, "--since", "1h", "--json")
    assert ended.code == 0, ended.err
    found = ended.json
    mine = [one for one in found["changes"] if one["tenant"] in ("sim-a", "sim-b")]
    # Eleven exports of four units were approved: the first seven still fit, two are embargoed, the rest exceed 30.
    assert {(one["tenant"], one["before"], one["after"], one["decisions"], one["units"]) for one in mine} == {
        (tenant, "APPROVED OK", after, decisions, 4 * decisions)
        for tenant in ("sim-a", "sim-b")
        for after, decisions in (
            ("DENIED POLICY_DENIED guard-exports/embargo", 2),
            ("DENIED QUOTA_EXHAUSTED reports:month", 2),
        )
    }
    assert all(len(one["examples"][0]) == 32 for one in mine)
    costs = {one["tenant"]: (one["before"], one["after"], one["difference"]) for one in found["costs"]}
    assert costs["sim-a"] == ("88.00 USD", "84.00 USD", "-4.00 USD")
    assert found["inexact_because"]["roles"] >= 24
    assert found["not_replayed"]["kind"] >= 1

    text = licet("policy", "simulate", catalog, "--since", "1h", "--tenant", "sim-a", "--fail-on-change")
    assert text.code == 1
    assert "12 decisions replayed; 4 would be answered otherwise." in text.out
    assert "roles are not recorded" in text.out
    assert "1 not replayed: reservations and seats" in text.out
    assert fleet.server_url in text.err

    same = licet("policy", "simulate", "--since", "1h", "--tenant", "sim-b", "--fail-on-change", "--json")
    assert (same.code, same.json["replayed"], same.json["changes"]) == (0, 12, [])
    current = licet("policy", "history", "--limit", "1", "--json").json["items"][0]["revision"]
    itself = licet("policy", "simulate", current, "--since", "1h", "--fail-on-change")
    assert itself.code == 0, itself.out
    (catalog / "policies.yaml").write_text("kind: Policy\n")
    assert licet("policy", "simulate", catalog).code == 2


def test_decisions_are_read_page_by_page(licet: Licet, catalog: Path, fleet: Fleet) -> None:
    pushed(licet, catalog, "--wait")
    headers = {"Authorization": f"Bearer {(fleet.directory / 'server' / 'admin-key').read_text().strip()}"}
    for tenant in ("page-a", "page-b"):
        assert licet("license", "create", tenant, "--plan", "pro", "--wait").code == 0
    with Client(fleet.addresses[0]) as client:
        ids = {
            client.check(tenant, "report.export", subject="ada", context={"region": "eu"}).decision_id
            for tenant in ("page-b", "page-a")
            for _ in range(5)
        }

    def pages(limit: int, **query: str) -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        after = ""
        while True:
            page = plain_http.get(
                f"{fleet.server_url}/v1/decisions", params={"limit": limit, "after": after, **query}, headers=headers
            ).json()
            assert len(page["items"]) <= limit
            assert ("total" in page) == (not after)
            found += page["items"]
            if page["next"] is None:
                return found
            after = page["next"]

    wait_until("the ledger has them", lambda: ids <= {str(one["decision_id"]) for one in pages(1_000)})
    everything = pages(1_000)
    for limit in (1, 3, 7):
        assert pages(limit) == everything
    order = [(one["tenant"], one["at_us"]) for one in everything]
    assert order == sorted(order)
    assert len({one["decision_id"] for one in everything}) == len(everything)
    only = pages(2, tenant="page-b")
    assert [one["decision_id"] for one in only] == [
        one["decision_id"] for one in everything if one["tenant"] == "page-b"
    ]
    assert only[0]["context"] == {"region": "eu"}
    later = pages(3, **{"from": str(only[2]["at"])}, tenant="page-b")
    assert [one["decision_id"] for one in later] == [one["decision_id"] for one in only[2:]]
    assert pages(3, to="2020-01-01T00:00:00Z") == []
    for after in ("x", "1:2", "1:x:a", "9" * 30 + ":" + "9" * 30 + ":a"):
        refused = plain_http.get(f"{fleet.server_url}/v1/decisions", params={"after": after}, headers=headers)
        assert refused.status_code == 422


def test_a_table_of_more_licenses_than_one_request_takes_is_imported_all_or_none(
    licet: Licet, catalog: Path, fleet: Fleet, tmp_path: Path
) -> None:
    pushed(licet, catalog, "--wait")
    table = tmp_path / "customers.csv"
    lines = ["tenant,plan", *(f"many-{number:03},pro" for number in range(600))]
    table.write_text("\n".join([*lines, "many-600,prp"]))
    refused = licet("license", "import", table)
    assert refused.code == 1
    assert f"{table}:602:1: there is no plan 'prp'" in refused.err
    assert licet("license", "get", "many-000").code == 1  # the first 500 were only tried

    table.write_text("\n".join(lines))
    done = licet("license", "import", table, "--wait", "--json")
    assert (done.code, done.json["created"], done.json["rollout"]["done"]) == (0, 600, True)
    with Client(fleet.addresses[0]) as client:
        assert client.check("many-599", "report.export", context={"region": "eu"}).approved
    assert licet("license", "import", table, "--json").json["unchanged"] == 600
    note = tmp_path / "note.yaml"
    note.write_text("kind: License\ntenant: many-001\nplan: pro\nstatus: suspended\n")
    assert "  ~ many-001\n1 changed" in licet("license", "import", note).out.replace("0 created, ", "")
    assert licet("license", "get", "many-001", "--json").json["status"] == "suspended"

"""The operator's commands against a server that stands for the control plane."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import CommandLine, licet_command
from tests.support.stub_control_plane import StubControlPlane

__all__ = ["licet_command"]

LICENSE = {
    "tenant": "acme", "plan": "pro", "status": "active", "starts_at": None, "ends_at": None,
    "addons": {}, "overrides": {}, "revision": 7, "updated_at": "2027-01-01T00:00:00Z", "stage": "active",
    "grace_ends_at": None, "renewal_period": None, "auto_renew": False, "cancels": False, "planned": None,
}  # fmt: skip
WEBHOOK = {
    "id": "wh_1", "url": "https://example.com/", "events": ["quota.threshold"], "thresholds": [80],
    "shortest_window": "day", "tenant": "", "created_at": "2027-01-01T00:00:00Z", "created_by": "me",
    "disabled_at": None, "disabled_why": "", "failing_since": None, "waiting": 10_000, "dropped": 7,
    "old_secret_until": None,
}  # fmt: skip
PUSHED = {
    "revision": 7, "generation": 1, "digest": "d", "unchanged": False, "warnings": [],
    "changed": {"added": ["Plan pro"], "modified": [], "removed": []},
}  # fmt: skip


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, licet_command: CommandLine) -> Iterator[StubControlPlane]:
    stub = StubControlPlane().start()
    monkeypatch.setenv("LICET_SERVER", stub.url)
    monkeypatch.setenv("LICET_API_KEY", "secret")
    yield stub
    stub.stop()


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    directory = tmp_path / "catalog"
    (directory / "plans").mkdir(parents=True)
    (directory / "plans" / "pro.yaml").write_text("kind: Plan\n")
    (directory / "features.yml").write_text("kind: Feature\n")
    (directory / ".hidden.yaml").write_text("nonsense")
    (directory / "README.md").write_text("not a document")
    return directory


def rollout(*, done: bool, confirmed: int = 0, waiting: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "revision": 7,
        "published": True,
        "confirmed": [f"s{n}" for n in range(confirmed)],
        "waiting": [{"sidecar": name, "revision": 6, "last_heard_s": 0.25} for name in waiting],
        "silent": [],
        "done": done,
    }


def test_pushes_every_document_of_a_directory(
    licet_command: CommandLine, server: StubControlPlane, catalog: Path
) -> None:
    server.answers["POST /v1/bundles"] = PUSHED
    ended = licet_command("policy", "push", catalog, "--message", "why", "--observe")
    assert ended.code == 0
    (request,) = server.requests
    assert request.authorization == "Bearer secret"
    assert request.body == {
        "documents": [
            {"path": "features.yml", "content": "kind: Feature\n"},
            {"path": "plans/pro.yaml", "content": "kind: Plan\n"},
        ],
        "observe": True,
        "message": "why",
        "dry_run": False,
    }
    assert "published as revision 7, in observe mode" in ended.out
    assert server.url in ended.err


def test_says_that_a_dry_run_published_nothing(
    licet_command: CommandLine, server: StubControlPlane, catalog: Path
) -> None:
    server.answers["POST /v1/bundles"] = PUSHED
    ended = licet_command("policy", "push", catalog, "--dry-run", "--wait", "--json")
    assert ended.code == 0
    assert ended.json["published"] is False
    assert [request.path for request in server.requests] == ["/v1/bundles"]


def test_waits_until_all_sidecars_confirm(licet_command: CommandLine, server: StubControlPlane, catalog: Path) -> None:
    states = [rollout(done=False, waiting=("s1",)), rollout(done=True, confirmed=3)]
    server.answers["POST /v1/bundles"] = PUSHED
    server.answers["GET /v1/revisions/7/rollout"] = lambda request: (200, states.pop(0))
    ended = licet_command("policy", "push", catalog, "--wait")
    assert ended.code == 0
    assert "live on all 3 sidecars" in ended.out


def test_names_the_sidecars_that_did_not_confirm_in_time(
    licet_command: CommandLine, server: StubControlPlane, catalog: Path
) -> None:
    server.answers["POST /v1/bundles"] = PUSHED
    server.answers["GET /v1/revisions/7/rollout"] = rollout(done=False, waiting=("s1", "s2"))
    server.answers["GET /v1/sidecars"] = {"items": [{"sidecar": "s1", "address": "127.0.0.1:7420"}]}
    ended = licet_command("policy", "push", catalog, "--wait", "--timeout", "300ms", "--json")
    assert ended.code == 1
    assert "s1 127.0.0.1:7420 at revision 6, last heard 0.2 s ago" in ended.err
    assert "s2 at revision 6" in ended.err
    assert "fix:" in ended.err
    assert ended.json["rollout"]["done"] is False


def test_shows_where_documents_are_wrong(licet_command: CommandLine, server: StubControlPlane, catalog: Path) -> None:
    error = {
        "file": "plans/pro.yaml", "line": 3, "column": 5, "path": "Plan/pro.features",
        "message": "unknown field 'feetures'", "fix": "did you mean 'features'?",
    }  # fmt: skip
    server.answers["POST /v1/bundles"] = lambda request: (422, {"title": "Invalid documents", "errors": [error]})
    ended = licet_command("policy", "push", catalog)
    assert ended.code == 1
    assert f"{catalog}/plans/pro.yaml:3:5: unknown field 'feetures' (Plan/pro.features)" in ended.err
    assert "fix: did you mean 'features'?" in ended.err
    assert "1 error;" in ended.err


@pytest.mark.parametrize("command", ["push", "validate"])
def test_refuses_a_directory_without_documents(
    licet_command: CommandLine, server: StubControlPlane, tmp_path: Path, command: str
) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        ended = licet_command("policy", command, directory)
        assert ended.code == 2
        assert str(directory) in ended.err
        assert "fix:" in ended.err
    assert server.requests == []


def test_creates_a_license_with_all_its_terms(licet_command: CommandLine, server: StubControlPlane) -> None:
    server.answers["POST /v1/licenses"] = lambda request: (201, LICENSE)
    ended = licet_command(
        "license", "create", "acme", "--plan", "pro", "--starts", "2027-01-01", "--ends", "2028-01-01",
        "--addon", "extra=2", "--override", "llm.tokens:month=5_000_000", "--json",
    )  # fmt: skip
    assert ended.code == 0
    assert ended.json == LICENSE
    assert server.requests[0].body == {
        "tenant": "acme",
        "plan": "pro",
        "starts_at": "2027-01-01T00:00:00Z",
        "ends_at": "2028-01-01T00:00:00Z",
        "addons": {"extra": 2},
        "overrides": {"llm.tokens:month": 5_000_000},
    }


GRANT = {
    "id": "order-17", "limit": "llm.tokens:month", "amount": 1_000, "starts_at": "2027-01-01T00:00:00Z",
    "expires_at": "2027-02-01T00:00:00Z", "priority": 100, "state": "live",
}  # fmt: skip
ADDED = {"tenant": "acme", **GRANT, "revision": 7}


def test_an_override_of_a_budget_is_money(licet_command: CommandLine, server: StubControlPlane) -> None:
    server.answers["PATCH /v1/licenses/acme"] = LICENSE
    override = "llm.tokens:month@context.team.usd=500.00 USD"
    assert licet_command("license", "update", "acme", "--override", override).code == 0
    assert server.requests[0].body == {"overrides": {"llm.tokens:month@context.team.usd": "500.00 USD"}}


def test_shows_the_grants_of_a_license(licet_command: CommandLine, server: StubControlPlane) -> None:
    overrides = {"llm.tokens:month.usd": "500.00 USD", "reports:day": 5}
    server.answers["GET /v1/licenses/acme"] = {**LICENSE, "overrides": overrides, "grants": [GRANT]}
    ended = licet_command("license", "get", "acme")
    assert "llm.tokens:month.usd=500.00 USD, reports:day=5" in ended.out
    assert "order-17  llm.tokens:month +1000  live  2027-01-01T00:00:00Z to 2027-02-01T00:00:00Z" in ended.out


def test_adds_a_grant_until_an_instant(licet_command: CommandLine, server: StubControlPlane) -> None:
    server.answers["POST /v1/licenses/acme/grants"] = lambda request: (201, ADDED)
    ended = licet_command(
        "grant", "add", "acme", "--limit", "llm.tokens:month", "--amount", "1_000", "--starts", "2027-01-01",
        "--expires", "2027-02-01", "--priority", "-5", "--id", "order-17", "--json",
    )  # fmt: skip
    assert (ended.code, ended.json) == (0, ADDED)
    assert server.requests[0].body == {
        "limit": "llm.tokens:month",
        "amount": 1_000,
        "id": "order-17",
        "starts_at": "2027-01-01T00:00:00Z",
        "expires_at": "2027-02-01T00:00:00Z",
        "priority": -5,
    }


def test_adds_a_grant_of_money_for_a_time_and_waits(licet_command: CommandLine, server: StubControlPlane) -> None:
    server.answers["POST /v1/licenses/acme/grants"] = lambda request: (201, {**ADDED, "amount": "50.00 USD"})
    server.answers["GET /v1/revisions/7/rollout"] = rollout(done=True, confirmed=2)
    limit = "llm.tokens:month.usd"
    ended = licet_command("grant", "add", "acme", "--limit", limit, "--amount", "50 USD", "--for", "30d", "--wait")
    assert ended.code == 0
    assert "grant order-17  llm.tokens:month +50.00 USD  revision 7" in ended.out
    body = {"limit": limit, "amount": "50.00 USD", "expires_after_s": 30 * 86_400, "priority": 100}
    assert server.requests[0].body == body


def test_lists_grants(licet_command: CommandLine, server: StubControlPlane) -> None:
    server.answers["GET /v1/licenses/acme/grants"] = {"items": [GRANT], "revision": 7}
    assert licet_command("grant", "list", "acme", "--json").json["items"] == [GRANT]
    shown = licet_command("grant", "list", "acme").out
    assert all(text in shown for text in ("order-17", "llm.tokens:month", "1,000", "live"))
    server.answers["GET /v1/licenses/acme/grants"] = {"items": [], "revision": 7}
    assert licet_command("grant", "list", "acme").out.strip() == "none"


def test_revokes_a_grant(licet_command: CommandLine, server: StubControlPlane) -> None:
    answer = {"tenant": "acme", "id": "order-17", "revision": 8}
    server.answers["DELETE /v1/licenses/acme/grants/order-17"] = answer
    assert licet_command("grant", "revoke", "acme", "order-17", "--json").json == answer
    assert "order-17 revoked  revision 8" in licet_command("grant", "revoke", "acme", "order-17").out
    assert licet_command("grant", "revoke", "acme", "other").code == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--limit", "a:b", "--amount", "5"),
        ("--limit", "a:b", "--amount", "5", "--for", "30d", "--expires", "2027-01-01"),
        ("--limit", "a:b", "--amount", "5", "--for", "soon"),
        ("--limit", "a:b", "--amount", "5", "--for", "500ms"),
        ("--limit", "a:b", "--amount", "5", "--expires", "someday"),
        ("--limit", "a:b", "--amount", "five", "--for", "30d"),
        ("--limit", "a:b", "--amount", "5", "--for", "30d", "--priority", "2000"),
        ("--amount", "5", "--for", "30d"),
    ],
)
def test_finds_mistakes_in_a_grant_before_it_asks(
    licet_command: CommandLine, server: StubControlPlane, arguments: tuple[str, ...]
) -> None:
    assert licet_command("grant", "add", "acme", *arguments).code == 2
    assert server.requests == []


def test_creates_a_webhook_and_shows_its_secret(licet_command: CommandLine, server: StubControlPlane) -> None:
    server.answers["POST /v1/webhooks"] = {**WEBHOOK, "secret": "whsec_new"}
    ended = licet_command("webhook", "create", "https://example.com/", "--shortest-window", "day")
    assert ended.code == 0
    assert server.requests[-1].body == {"url": "https://example.com/", "shortest_window": "day", "tenant": ""}
    assert "whsec_new" in ended.out


def test_rotates_the_secret_of_a_webhook(licet_command: CommandLine, server: StubControlPlane) -> None:
    until = "2027-01-08T00:00:00Z"
    server.answers["POST /v1/webhooks/wh_1/secret"] = {**WEBHOOK, "old_secret_until": until, "secret": "whsec_new"}
    ended = licet_command("webhook", "rotate-secret", "wh_1", "--overlap", "7d")
    assert ended.code == 0
    assert server.requests[-1].body == {"overlap_s": 7 * 86_400}
    assert "whsec_new" in ended.out
    assert until in ended.out


def test_shows_how_many_thresholds_of_a_webhook_were_dropped(
    licet_command: CommandLine, server: StubControlPlane
) -> None:
    server.answers["GET /v1/webhooks"] = {"items": [WEBHOOK], "next": None}
    server.answers["GET /v1/webhooks/wh_1"] = WEBHOOK
    listed = licet_command("webhook", "list").out
    assert "dropped" in listed.splitlines()[0].lower()
    assert "7" in listed.split()
    assert "7 thresholds" in licet_command("webhook", "show", "wh_1").out


def test_updates_only_what_is_given(licet_command: CommandLine, server: StubControlPlane) -> None:
    server.answers["PATCH /v1/licenses/acme"] = LICENSE
    assert licet_command("license", "update", "acme", "--status", "suspended", "--ends", "never").code == 0
    assert server.requests[0].body == {"status": "suspended", "ends_at": None}


@pytest.mark.parametrize(
    "arguments",
    [
        ("update", "acme"),
        ("update", "acme", "--status", "asleep"),
        ("create", "acme", "--plan", "pro", "--ends", "someday"),
        ("create", "acme"),
        ("create",),
    ],
)
def test_finds_mistakes_before_it_asks(
    licet_command: CommandLine, server: StubControlPlane, arguments: tuple[str, ...]
) -> None:
    assert licet_command("license", *arguments).code == 2
    assert server.requests == []


def test_prints_what_is_wrong_and_what_to_do(licet_command: CommandLine, server: StubControlPlane) -> None:
    problem = {"title": "Unknown tenant", "detail": "no license for 'acme'", "fix": "create one"}
    server.answers["GET /v1/licenses/acme"] = lambda request: (404, problem)
    ended = licet_command("license", "get", "acme", "--json")
    assert ended.code == 1
    assert ended.out == ""
    assert "no license for 'acme' (" in ended.err
    assert "fix: create one" in ended.err


def test_lists_licenses_over_pages(licet_command: CommandLine, server: StubControlPlane) -> None:
    pages = {
        "": {"items": [LICENSE], "next": "acme"},
        "acme": {"items": [{**LICENSE, "tenant": "globex"}], "next": None},
    }
    server.answers["GET /v1/licenses"] = lambda request: (200, pages[request.query.get("after", "")])
    ended = licet_command("license", "list", "--plan", "pro")
    assert ended.code == 0
    assert "acme" in ended.out
    assert "globex" in ended.out
    assert [request.query["plan"] for request in server.requests] == ["pro", "pro"]


def test_sums_up_usage(licet_command: CommandLine, server: StubControlPlane) -> None:
    item = {"feature": "llm.tokens", "events": 3, "units": 1234, "cost": [{"currency": "USD", "amount": "0.01"}]}
    server.answers["GET /v1/usage/summary"] = {"items": [item]}
    ended = licet_command("usage", "summary", "--tenant", "acme", "--from", "2027-01-01", "--by", "feature")
    assert ended.code == 0
    assert "1,234" in ended.out
    assert "0.01 USD" in ended.out
    assert server.requests[0].query == {"tenant": "acme", "from": "2027-01-01T00:00:00Z", "by": "feature"}


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_exit_code_tells_whether_the_ledger_is_consistent(
    licet_command: CommandLine, server: StubControlPlane, ok: bool, code: int
) -> None:
    gap = {"log_id": "ab", "from_seq": 3, "to_seq": 4, "why": "never arrived"}
    finding = {"shard": 1, "block": 2, "log_id": "ab", "seq": 7, "kind": "removed", "what": "the event is missing"}
    result = {
        "ok": ok, "events": 5, "blocks": 2, "logs": ["a"], "gaps": [] if ok else [gap],
        "lost": [{"log_id": "ab", "from_seq": 7, "to_seq": 9, "why": "damaged"}], "dropped": {"2026-05": 7},
        "conflicts": 0, "rollups_match": ok, "findings": [] if ok else [finding], "findings_total": int(not ok),
        "erased_events": 0, "erased_subjects": 0, "opened": True, "checkpoints": 1, "heads": [],
    }  # fmt: skip
    server.answers["POST /v1/ledger/verify"] = {"result": result}
    ended = licet_command("ledger", "verify")
    assert ended.code == code
    assert ("log ab, 3 to 4: never arrived" in ended.out) is not ok
    assert ("first: shard 1, block 2, log ab event 7: removed: the event is missing" in ended.out) is not ok
    assert "declared lost: log ab, 7 to 9: damaged" in ended.out
    assert licet_command("ledger", "verify", "--json").json["ok"] is ok


def test_lists_sidecars_and_status(licet_command: CommandLine, server: StubControlPlane) -> None:
    sidecar = {
        "sidecar": "ab" * 16, "address": "127.0.0.1:7420", "hostname": "h", "version": "1", "revision": 42,
        "state": "live", "ready": True, "last_heard_s": 0.5, "log_last_seq": 10, "log_acked_seq": 4,
        "log_bytes": 100, "tenants_held": 1,
    }  # fmt: skip
    server.answers["GET /v1/sidecars"] = {"items": [sidecar]}
    server.answers["GET /v1/status"] = {"revision": 42, "redis": {"reachable": True}}
    listed = licet_command("sidecar", "list")
    assert listed.code == 0
    assert "42" in listed.out
    assert "127.0.0.1:7420" in listed.out
    shown = licet_command("status")
    assert "reachable" in shown.out


def test_says_how_to_reach_a_server_that_is_not_there(licet_command: CommandLine) -> None:
    ended = licet_command("status", "--server", "http://127.0.0.1:1", "--api-key", "k")
    assert ended.code == 3
    assert "127.0.0.1:1" in ended.err
    assert "licet dev" in ended.err


@pytest.mark.parametrize("server", ["ftp://x", "http://[", "http://a:b"])
def test_says_that_an_address_is_none(licet_command: CommandLine, server: str) -> None:
    ended = licet_command("status", "--server", server, "--api-key", "k")
    assert ended.code in (2, 3)
    assert "Traceback" not in ended.err


def test_says_how_to_get_a_key(licet_command: CommandLine) -> None:
    ended = licet_command("status")
    assert ended.code == 2
    assert "LICET_API_KEY" in ended.err


def test_help_is_quick_and_shows_an_example() -> None:
    started = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-m", "licet_control_plane.cli.entry", "--help"], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - started < 2  # 0.2 s on an idle machine
    assert "licet dev" in shown.stdout
    heavy = ["httpx", "rich", "grpc", "pydantic", "sqlalchemy", "fastapi"]
    probe = f"import sys; import licet_control_plane.cli.app; print(*[m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip() == ""


@pytest.mark.parametrize(
    "command",
    [
        "dev", "server", "check", "replay", "status", "policy push", "policy validate", "license create", "license get",
        "license list", "license update", "grant add", "grant list", "grant revoke",
        "usage summary", "usage subject export", "usage subject erase", "ledger verify", "ledger checkpoint",
        "sidecar list",
    ],
)  # fmt: skip
def test_every_command_explains_itself(licet_command: CommandLine, command: str) -> None:
    ended = licet_command(*command.split(), "--help")
    assert ended.code == 0
    assert f"licet {command}" in ended.out.partition("Example")[2]
    assert "--json" in ended.out or command in ("server", "usage subject export")
    assert "Exit codes:" in ended.out


def test_says_what_to_install_when_a_library_is_missing(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')\n")
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from licet_control_plane.cli.entry import main; sys.exit(main())",
            "status",
        ],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert ended.stderr == "licet: typer is not installed. Fix: pip install 'licet[server]'\n"

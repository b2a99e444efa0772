"""People and their approvals over real processes: asked of one sidecar, decided by command, in force in all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import licet
from licet import AccessRequestState
from tests.support.fleet import Fleet, wait_until

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
  reports: {}
---
kind: Policy
name: guard
actions: [report.*]
rules:
  - {name: large, effect: require_approval, when: 'quantity > 10', approval: finance}
---
kind: ApprovalChain
name: finance
stages:
  - {approvers: ['group:finance'], deny_after: 24h}
"""
WAIT_S_MAX = 90.0


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path, count=3)
    try:
        made.start()
        made.push(CATALOG)
        made.licet("license", "create", "acme", "--plan", "pro")
        yield made
    finally:
        made.stop()


def test_a_request_lives_through_a_killed_control_plane_and_a_wiped_redis_and_an_approval_is_in_force_everywhere(
    fleet: Fleet,
) -> None:
    clients = [licet.Client(address) for address in fleet.addresses]

    def check(number: int, quantity: int = 50, subject: str = "ana") -> licet.Decision:
        return clients[number].check("acme", "report.export", subject=subject, quantity=quantity, timeout=5)

    def shows(state: str) -> bool:
        items = fleet.licet("request", "list", "--state", "all")["items"]
        return any(item["id"] == asked.access_request_id and item["state"] == state for item in items)

    fleet.server.kill()
    asked = check(0)
    assert (asked.effect, asked.reason) == (licet.Effect.PENDING, licet.Reason.APPROVAL_REQUIRED)
    assert {check(number).access_request_id for number in range(3)} == {asked.access_request_id}
    explicit = clients[1].request_access(
        "acme", "report.export", subject="ana", quantity=50, justification="end of quarter", timeout=5
    )
    assert explicit.request is not None
    assert (explicit.request.id, explicit.request.state) == (asked.access_request_id, AccessRequestState.PENDING)
    fleet.server.start()
    wait_until("the request is listed", lambda: _serves(fleet) and shows("pending"))

    fleet.valkey.wipe()
    assert fleet.licet("request", "show", asked.access_request_id)["state"] == "pending"
    approved = fleet.licet("request", "approve", asked.access_request_id, "--for", "1h", "--units", "120")
    assert (approved["state"], approved["decided_by"]) == ("approved", "admin")
    for client in clients:
        heard = client.wait_for_approval("acme", asked.access_request_id, timeout=WAIT_S_MAX)
        assert (heard.state, heard.units, heard.decided_by) == (AccessRequestState.APPROVED, 120, "admin")
    wait_until("its units can be leased", lambda: fleet.licet("quota", "show", "acme")["phase"] == "open")
    decisions = [check(number) for number in (0, 1, 2)]
    assert sum(decision.approved for decision in decisions) == 2, "120 units are two times 50"
    assert check(0, subject="ben").effect is licet.Effect.PENDING

    fleet.licet("request", "revoke", asked.access_request_id, "--reason", "by mistake", "--wait")
    assert not any(check(number, quantity=11) for number in range(3))
    fleet.licet(
        *("override", "set", "--action", "report.*", "--effect", "allow", "--for", "1h"),
        *("--reason", "INC-1", "--id", "inc-1", "--wait"),
    )
    for number in range(3):
        lifted = check(number, quantity=11)
        assert (lifted.effect, lifted.rule) == (licet.Effect.APPROVED, "override/inc-1")
    fleet.licet("override", "clear", "inc-1", "--wait")
    assert not any(check(number, quantity=11) for number in range(3))
    for client in clients:
        client.close()


def _serves(fleet: Fleet) -> bool:
    return bool(fleet.page(fleet.server_url.removeprefix("http://"), "/healthz"))

"""What each route needs: the one table that decides who may ask what.

A route without an entry is for administrators of the whole deployment alone; a test names it. ``reach`` says what a
caller that is confined to one tenant reaches of it:

- ``TENANT``: the address names the tenant, and it must be the caller's;
- ``FILTER``: the handler takes ``auth.TenantAsked`` and shows nothing of others;
- ``BODY``: the handler asks ``Caller.confine`` about the tenant in the body;
- ``DEPLOYMENT``: nothing. It is about all tenants, or about what they share.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from licet_control_plane.core.access import Need

Route = tuple[str, str]
"""Method and path, as OpenAPI has them."""


class Reach(Enum):
    """What a caller that is confined to one tenant reaches."""

    TENANT = "tenant"
    """The tenant in the path."""
    FILTER = "filter"
    """What is listed or summed, of its tenant."""
    BODY = "body"
    """The tenant in the body."""
    FOUND = "found"
    """What the path names, once it is found to be of its tenant; else there is no such thing."""
    DEPLOYMENT = "deployment"
    """Nothing."""


@dataclass(frozen=True, slots=True)
class Rule:
    """``records``: the action under which the audit trail has it, empty for what changes nothing; ``creates``: the one
    when it makes what was not there. ``why`` not, of a route that changes something all the same."""

    need: Need
    reach: Reach
    records: str = ""
    creates: str = ""
    why: str = ""

    @property
    def changes(self) -> bool:
        """Whether an attempt that was refused is worth an entry in the audit trail."""
        return self.need in (Need.CHANGE, Need.APPROVE, Need.MANAGE)


_READ: Final = Rule(Need.READ, Reach.DEPLOYMENT)
_RECORDS: Final = Rule(Need.READ_RECORDS, Reach.DEPLOYMENT)
_RECORDS_OF_TENANT: Final = Rule(Need.READ_RECORDS, Reach.FILTER)
_USAGE: Final = "usage has a chain of its own, the ledger"

RULES: Final[dict[Route, Rule]] = {
    ("POST", "/v1/bundles"): Rule(Need.CHANGE, Reach.DEPLOYMENT, "bundle.push"),
    ("GET", "/v1/bundles"): _READ,
    ("GET", "/v1/bundles/current"): _READ,
    ("POST", "/v1/bundles/diff"): _READ,
    ("GET", "/v1/bundles/{revision}"): _READ,
    ("GET", "/v1/bundles/{revision}/files"): _READ,
    ("POST", "/v1/bundles/{revision}/rollback"): Rule(Need.CHANGE, Reach.DEPLOYMENT, "bundle.rollback"),
    ("GET", "/v1/revisions/{revision}/rollout"): _READ,
    ("POST", "/v1/licenses"): Rule(Need.CHANGE, Reach.BODY, "license.create"),
    ("GET", "/v1/licenses"): Rule(Need.READ, Reach.FILTER),
    ("POST", "/v1/licenses/import"): Rule(Need.CHANGE, Reach.BODY, "license.update", "license.create"),
    ("GET", "/v1/licenses/{tenant}"): Rule(Need.READ, Reach.TENANT),
    ("PATCH", "/v1/licenses/{tenant}"): Rule(Need.CHANGE, Reach.TENANT, "license.update"),
    ("PUT", "/v1/licenses/{tenant}"): Rule(Need.CHANGE, Reach.TENANT, "license.update", "license.create"),
    ("POST", "/v1/licenses/{tenant}/suspend"): Rule(Need.CHANGE, Reach.TENANT, "license.suspend"),
    ("POST", "/v1/licenses/{tenant}/resume"): Rule(Need.CHANGE, Reach.TENANT, "license.resume"),
    ("POST", "/v1/licenses/{tenant}/cancel"): Rule(Need.CHANGE, Reach.TENANT, "license.cancel"),
    ("POST", "/v1/licenses/{tenant}/renew"): Rule(Need.CHANGE, Reach.TENANT, "license.renew"),
    ("POST", "/v1/licenses/{tenant}/change-plan"): Rule(Need.CHANGE, Reach.TENANT, "license.change_plan"),
    ("POST", "/v1/licenses/{tenant}/grants"): Rule(Need.CHANGE, Reach.TENANT, "grant.add"),
    ("GET", "/v1/licenses/{tenant}/grants"): Rule(Need.READ, Reach.TENANT),
    ("DELETE", "/v1/licenses/{tenant}/grants/{grant_id}"): Rule(Need.CHANGE, Reach.TENANT, "grant.revoke"),
    ("GET", "/v1/plans"): _READ,
    ("GET", "/v1/plans/{plan}"): _READ,
    ("GET", "/v1/tenants/{tenant}/entitlements"): Rule(Need.READ, Reach.TENANT),
    ("GET", "/v1/tenants/{tenant}/quotas"): Rule(Need.READ, Reach.TENANT),
    ("POST", "/v1/sidecars/{sidecar}/reclaim"): Rule(Need.CHANGE, Reach.DEPLOYMENT, "sidecar.reclaim"),
    ("GET", "/v1/status"): _READ,
    ("GET", "/v1/sidecars"): _READ,
    # Records of what was done. What pages through the whole ledger is not for one tenant: its cursors count all events.
    ("GET", "/v1/usage/tally"): _RECORDS_OF_TENANT,
    ("GET", "/v1/usage/summary"): _RECORDS_OF_TENANT,
    ("GET", "/v1/usage/top"): _RECORDS_OF_TENANT,
    ("GET", "/v1/usage/denied"): _RECORDS_OF_TENANT,
    ("GET", "/v1/usage/events"): _RECORDS,
    ("GET", "/v1/usage/tail"): _RECORDS,
    ("GET", "/v1/decisions"): _RECORDS_OF_TENANT,
    ("GET", "/v1/tenants/{tenant}/invoices/{month}"): Rule(Need.READ_RECORDS, Reach.TENANT),
    ("POST", "/v1/tenants/{tenant}/subjects/export"): Rule(Need.READ_RECORDS, Reach.TENANT),
    ("POST", "/v1/tenants/{tenant}/subjects/erase"): Rule(Need.MANAGE, Reach.TENANT, "subject.erase"),
    ("GET", "/v1/usage/dead-letters"): _RECORDS,
    ("GET", "/v1/usage/dead-letters/{number}"): _RECORDS,
    ("POST", "/v1/usage/dead-letters/{number}/retry"): Rule(Need.CHANGE, Reach.DEPLOYMENT, "dead_letter.recorded"),
    ("DELETE", "/v1/usage/dead-letters/{number}"): Rule(Need.MANAGE, Reach.DEPLOYMENT, "dead_letter.dropped"),
    ("GET", "/v1/usage/conflicts"): _RECORDS,
    ("GET", "/v1/usage/conflicts/{log_id}/{seq}"): _RECORDS,
    ("GET", "/v1/ledger/months"): _RECORDS,
    ("GET", "/v1/ledger/months/{month}/export"): _RECORDS,
    ("POST", "/v1/ledger/months/{month}/exports"): Rule(Need.MANAGE, Reach.DEPLOYMENT, "ledger.export"),
    ("POST", "/v1/ledger/months/{month}/drop"): Rule(Need.MANAGE, Reach.DEPLOYMENT, "ledger.drop"),
    ("POST", "/v1/ledger/restored"): Rule(Need.MANAGE, Reach.DEPLOYMENT, "ledger.restored"),
    ("GET", "/v1/ledger/verify"): _RECORDS,
    ("POST", "/v1/ledger/verify"): _RECORDS,
    ("POST", "/v1/ledger/reconcile"): _RECORDS,
    ("GET", "/v1/ledger/checkpoint"): _RECORDS,
    ("GET", "/v1/access-requests"): Rule(Need.READ, Reach.FILTER),
    ("GET", "/v1/access-requests/{request_id}"): Rule(Need.READ, Reach.FOUND),
    ("POST", "/v1/access-requests/{request_id}/approve"): Rule(Need.APPROVE, Reach.FOUND, "access_request.approve"),
    ("POST", "/v1/access-requests/{request_id}/deny"): Rule(Need.APPROVE, Reach.FOUND, "access_request.deny"),
    ("POST", "/v1/access-requests/{request_id}/revoke"): Rule(Need.APPROVE, Reach.FOUND, "access_request.revoke"),
    ("GET", "/v1/overrides"): _READ,
    ("POST", "/v1/overrides"): Rule(Need.CHANGE, Reach.DEPLOYMENT, "override.set"),
    ("DELETE", "/v1/overrides/{override_id}"): Rule(Need.CHANGE, Reach.DEPLOYMENT, "override.clear"),
    # Webhooks: an address that is told of all tenants, or of one, is the deployment's.
    ("GET", "/v1/webhooks"): _RECORDS,
    ("POST", "/v1/webhooks"): Rule(Need.CHANGE, Reach.DEPLOYMENT, "webhook.create"),
    ("GET", "/v1/webhooks/{webhook}"): _RECORDS,
    ("DELETE", "/v1/webhooks/{webhook}"): Rule(Need.CHANGE, Reach.DEPLOYMENT, "webhook.delete"),
    ("POST", "/v1/webhooks/{webhook}/enable"): Rule(Need.CHANGE, Reach.DEPLOYMENT, "webhook.enable"),
    ("POST", "/v1/webhooks/{webhook}/secret"): Rule(Need.CHANGE, Reach.DEPLOYMENT, "webhook.rotate_secret"),
    ("POST", "/v1/webhooks/{webhook}/test"): Rule(Need.CHANGE, Reach.DEPLOYMENT, "webhook.test"),
    ("GET", "/v1/webhooks/{webhook}/deliveries"): _RECORDS,
    ("POST", "/v1/webhooks/{webhook}/redeliver"): Rule(Need.CHANGE, Reach.DEPLOYMENT, "webhook.redeliver"),
    # Access.
    ("GET", "/v1/audit"): _RECORDS_OF_TENANT,
    ("GET", "/v1/audit/head"): _RECORDS,
    ("POST", "/v1/audit/verify"): _RECORDS,
    ("GET", "/v1/audit/evidence"): _RECORDS,
    ("GET", "/v1/api-keys"): Rule(Need.MANAGE, Reach.DEPLOYMENT),
    ("POST", "/v1/api-keys"): Rule(Need.MANAGE, Reach.DEPLOYMENT, "api_key.create"),
    ("DELETE", "/v1/api-keys/{key}"): Rule(Need.MANAGE, Reach.DEPLOYMENT, "api_key.revoke"),
    ("GET", "/v1/signing-keys"): _READ,
    ("POST", "/v1/signing-keys"): Rule(Need.MANAGE, Reach.DEPLOYMENT, "signing_key.generate"),
    ("POST", "/v1/signing-keys/rotate"): Rule(Need.MANAGE, Reach.DEPLOYMENT, "signing_key.rotate"),
    ("POST", "/v1/signing-keys/{key}/retire"): Rule(Need.MANAGE, Reach.DEPLOYMENT, "signing_key.retire"),
    # Sidecars.
    ("POST", "/v1/sidecar/snapshot"): Rule(Need.HAND_IN, Reach.DEPLOYMENT),
    ("POST", "/v1/usage/batches"): Rule(Need.HAND_IN, Reach.DEPLOYMENT, why=_USAGE),
}

UNLISTED: Final = Rule(Need.MANAGE, Reach.DEPLOYMENT)
OPEN: Final = frozenset({"/healthz", "/readyz", "/metrics", "/v1/schemas", "/v1/schemas/{kind}"})
"""Routes for whoever reaches the port: probes and Prometheus."""


def rule_of(method: str, path: str) -> Rule:
    """The rule of a route."""
    return RULES.get((method, path), UNLISTED)

"""``licet grant add|list|revoke``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from licet_control_plane.cli.arguments import (
    ApiKeyOption,
    JsonOption,
    ServerOption,
    TimeoutOption,
    WaitOption,
    amount,
    bad,
    instant,
    seconds,
)
from licet_control_plane.cli.bundles import report_rollout
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.output import emit_json, note, say, table

TenantArgument = Annotated[str, typer.Argument(help="The customer account.", metavar="TENANT")]


def add(
    tenant: TenantArgument,
    limit: Annotated[str, typer.Option("--limit", help="The limit to top up, FEATURE:LIMIT.")],
    amount_: Annotated[str, typer.Option("--amount", help="How much: units, or for a budget '50.00 USD'.")],
    starts: Annotated[str | None, typer.Option("--starts", help="First instant; now unless given.")] = None,
    expires: Annotated[str | None, typer.Option("--expires", help="First instant after it: 2027-01-31.")] = None,
    for_: Annotated[str | None, typer.Option("--for", help="How long from its start, instead: 12h, 30d.")] = None,
    priority: Annotated[
        int, typer.Option("--priority", help="Lowest first; the plan's allowance has 0.", min=-1_000, max=1_000)
    ] = 100,
    id_: Annotated[
        str | None, typer.Option("--id", help="Its name, such as an order number; adding it again changes nothing.")
    ] = None,
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Top up one limit of a license, once: used after the plan's allowance, and the one that ends first before others.

    \b
    Examples:
      licet grant add acme --limit reports:month --amount 1000 --for 30d
      licet grant add acme --limit agent.tokens:month.usd --amount '50.00 USD' --expires 2027-07-01 --id order-17
    """
    from licet_control_plane.cli.rest import ControlPlane

    body: dict[str, Any] = {"limit": limit, "amount": amount(amount_, "--amount"), "priority": priority}
    if id_ is not None:
        body["id"] = id_
    if starts is not None:
        body["starts_at"] = instant(starts, "--starts")
    body |= _end(expires, for_)
    timeout_s = seconds(timeout, "--timeout")
    with ControlPlane(server_target(server, api_key)) as control_plane:
        note(f"adding a grant to the license of {tenant} on {control_plane.target.server}")
        grant = control_plane.post(_path(tenant), body)
        rollout = control_plane.wait_for_rollout(grant["revision"], timeout_s=timeout_s) if wait else None
    if as_json:
        emit_json({**grant, "rollout": rollout} if wait else grant)
    else:
        say(f"{tenant}  grant {grant['id']}  {grant['limit']} +{grant['amount']}  revision {grant['revision']}")
        say(f"  {grant['state']:<10} {grant['starts_at']} to {grant['expires_at']}")
        say(f"  priority   {grant['priority']}")
    if rollout is not None:
        report_rollout(rollout, timeout_s=timeout_s, quiet=as_json)


def list_(
    tenant: TenantArgument, as_json: JsonOption = False, server: ServerOption = None, api_key: ApiKeyOption = None
) -> None:
    """List the grants of a tenant, with those that ended in the last 30 days.

    \b
    Example:
      licet grant list acme
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        result = control_plane.get(_path(tenant))
    if as_json:
        emit_json(result)
        return
    columns = ("id", "limit", "amount", "priority", "starts_at", "expires_at", "state")
    table(columns, ([item.get(column) for column in columns] for item in result["items"]), numeric=("amount",))


def revoke(
    tenant: TenantArgument,
    grant_id: Annotated[str, typer.Argument(help="The grant's id.", metavar="ID")],
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Take a grant away. What was used of it stays used.

    \b
    Example:
      licet grant revoke acme order-17
    """
    from urllib.parse import quote

    from licet_control_plane.cli.rest import ControlPlane

    timeout_s = seconds(timeout, "--timeout")
    with ControlPlane(server_target(server, api_key)) as control_plane:
        note(f"revoking grant {grant_id} of {tenant} on {control_plane.target.server}")
        revoked = control_plane.delete(f"{_path(tenant)}/{quote(grant_id, safe='')}")
        rollout = control_plane.wait_for_rollout(revoked["revision"], timeout_s=timeout_s) if wait else None
    if as_json:
        emit_json({**revoked, "rollout": rollout} if wait else revoked)
    else:
        say(f"{tenant}  grant {grant_id} revoked  revision {revoked['revision']}")
    if rollout is not None:
        report_rollout(rollout, timeout_s=timeout_s, quiet=as_json)


def _end(expires: str | None, for_: str | None) -> dict[str, Any]:
    if (expires is None) == (for_ is None):
        raise bad("a grant ends either at an instant or after a time.", "give one of --expires and --for")
    if expires is not None:
        return {"expires_at": instant(expires, "--expires")}
    lasts_s = seconds(for_ or "", "--for")
    if lasts_s < 1:
        raise bad(f"--for {for_!r} is less than a second.", "write it as 12h or 30d")
    return {"expires_after_s": int(lasts_s)}


def _path(tenant: str) -> str:
    from urllib.parse import quote

    return f"/v1/licenses/{quote(tenant, safe='')}/grants"

"""``licet request list|show|approve|deny|revoke``."""

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
    seconds,
)
from licet_control_plane.cli.bundles import report_rollout
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.output import emit_json, note, say, table

IdArgument = Annotated[str, typer.Argument(help="The request's id.", metavar="ID")]
_STATES = ("pending", "approved", "denied", "expired", "revoked")


def list_(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only of this tenant.")] = None,
    state: Annotated[str, typer.Option("--state", help=f"{', '.join(_STATES)}, or all.")] = "pending",
    limit: Annotated[int, typer.Option("--limit", help="At most so many.", min=1, max=500)] = 100,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """List access requests, the last asked first; those that wait for somebody, unless told otherwise.

    \b
    Examples:
      licet request list
      licet request list --tenant acme --state all
    """
    from licet_control_plane.cli.rest import ControlPlane

    if state not in (*_STATES, "all"):
        raise bad(f"--state {state!r} is no state of a request.", f"give one of {', '.join(_STATES)}, or all")
    with ControlPlane(server_target(server, api_key)) as control_plane:
        wanted = None if state == "all" else state
        result = control_plane.get("/v1/access-requests", tenant=tenant, state=wanted, limit=limit)
    if as_json:
        emit_json(result)
        return
    columns = ("id", "tenant", "subject", "action", "rule", "asked", "state", "until", "justification")
    table(columns, (_row(item) for item in result["items"]))
    if result["next_cursor"]:
        note(f"there are more than {limit}: give --tenant, --state or a larger --limit")


def show(
    request_id: IdArgument, as_json: JsonOption = False, server: ServerOption = None, api_key: ApiKeyOption = None
) -> None:
    """Show one access request: who asks for what, who decides, and what became of it.

    \b
    Example:
      licet request show 5f0c…
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        request = control_plane.get(_path(request_id))
    if as_json:
        emit_json(request)
    else:
        _say(request)


def approve(
    request_id: IdArgument,
    for_: Annotated[str, typer.Option("--for", help="How long, from the last approval that is needed: 4h.")],
    units: Annotated[
        str | None,
        typer.Option("--units", help="For so many units in all; for a budget money, '50.00 USD'. Else any number."),
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Whoever asked is told.")] = "",
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Approve an access request. Its clock starts with the last approval that its chain needs.

    Nobody approves their own request. Where a limit is exceeded, --units says by how much more.

    \b
    Examples:
      licet request approve 5f0c… --for 4h
      licet request approve 5f0c… --for 1d --units 50000 --reason 'end of quarter' --wait
    """
    lasts_s = seconds(for_, "--for")
    if lasts_s < 1:
        raise bad(f"--for {for_!r} is less than a second.", "write it as 30m, 4h or 1d")
    body: dict[str, Any] = {"expires_after_s": int(lasts_s), "reason": reason}
    if units is not None:
        body["units"] = amount(units, "--units")
    _decide("approve", request_id, body, wait, timeout, as_json, server, api_key)


def deny(
    request_id: IdArgument,
    reason: Annotated[str, typer.Option("--reason", help="Why: whoever asked is told.")],
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Deny an access request. Asking the same again is then answered with that for an hour.

    \b
    Example:
      licet request deny 5f0c… --reason 'not before the audit'
    """
    _decide("deny", request_id, {"reason": reason}, wait, timeout, as_json, server, api_key)


def revoke(
    request_id: IdArgument,
    reason: Annotated[str, typer.Option("--reason", help="Why: whoever asked is told.")],
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Take an approval back. What was used under it stays used.

    \b
    Example:
      licet request revoke 5f0c… --reason 'granted by mistake'
    """
    _decide("revoke", request_id, {"reason": reason}, wait, timeout, as_json, server, api_key)


def _decide(
    what: str,
    request_id: str,
    body: dict[str, Any],
    wait: bool,
    timeout: str,
    as_json: bool,
    server: str | None,
    api_key: str | None,
) -> None:
    from licet_control_plane.cli.rest import ControlPlane

    timeout_s = seconds(timeout, "--timeout")
    with ControlPlane(server_target(server, api_key)) as control_plane:
        note(f"{what} request {request_id} on {control_plane.target.server}")
        request = control_plane.post(f"{_path(request_id)}/{what}", body)
        rollout = control_plane.wait_for_rollout(request["revision"], timeout_s=timeout_s) if wait else None
    if as_json:
        emit_json({**request, "rollout": rollout} if wait else request)
    else:
        _say(request)
    if rollout is not None:
        report_rollout(rollout, timeout_s=timeout_s, quiet=as_json)


def _row(item: dict[str, Any]) -> list[Any]:
    until = item["ends_at"] if item["state"] == "approved" else item["expires_at"]
    asked = " ".join(f"{units:,} {feature}" for feature, units in item["units_asked"].items())
    return [
        item["id"],
        item["tenant"],
        _who(item),
        item["action"],
        item["rule"],
        asked,
        item["state"],
        until,
        item["justification"],
    ]


def _who(item: dict[str, Any]) -> str:
    subject = item["subject"]
    name = "/".join(filter(None, (subject["type"], subject["id"]))) or "(nobody)"
    return f"{name} for {subject['on_behalf_of']}" if subject["on_behalf_of"] else name


def _say(item: dict[str, Any]) -> None:
    say(f"{item['id']}  {item['state']}  revision {item['revision']}")
    say(f"  {'asks':<10} {_who(item)} of {item['tenant']}, for {item['action']}, which {item['rule']} wants approved")
    if item["units_asked"]:
        units = ", ".join(f"{units:,} of {feature}" for feature, units in item["units_asked"].items())
        say(f"  {'units':<10} {units}")
    if item["justification"]:
        say(f"  {'because':<10} {item['justification']}")
    if item["stage"]:
        stage = item["stage"]
        who = ", ".join(stage["approvers"]) or "anybody with the role approver or admin"
        so_far = f"; so far {', '.join(stage['approved_by'])}" if stage["approved_by"] else ""
        say(f"  {'waits for':<10} {stage['need']} of {who}, stage {stage['number']} of {stage['of']}{so_far}")
        say(f"  {'expires':<10} {item['expires_at']}")
    if item["decided_by"]:
        why = f": {item['reason']}" if item["reason"] else ""
        say(f"  {'decided':<10} by {item['decided_by']} at {item['decided_at']}{why}")
    if item["ends_at"]:
        units = f", for {item['units']} in all" if item["units"] else ""
        say(f"  {'until':<10} {item['ends_at']}{units}")


def _path(request_id: str) -> str:
    from urllib.parse import quote

    return f"/v1/access-requests/{quote(request_id, safe='')}"

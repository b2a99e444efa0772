"""``licet override set|list|clear``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from licet_control_plane.cli.arguments import (
    ApiKeyOption,
    JsonOption,
    ServerOption,
    TimeoutOption,
    WaitOption,
    bad,
    seconds,
)
from licet_control_plane.cli.bundles import report_rollout
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.output import emit_json, note, say, table


def set_(
    action: Annotated[str, typer.Option("--action", help="What it is about: a name, 'prefix.*' or '*'.")],
    effect: Annotated[str, typer.Option("--effect", help="allow or deny.")],
    for_: Annotated[str, typer.Option("--for", help="How long, at most 24h: 1h.")],
    reason: Annotated[str, typer.Option("--reason", help="Why: it is audited, and told in answers.")],
    tenant: Annotated[str, typer.Option("--tenant", help="Only for this tenant.")] = "",
    subject: Annotated[str, typer.Option("--subject", help="Only for the subject with this id.")] = "",
    id_: Annotated[str, typer.Option("--id", help="Its name; setting it again changes nothing.")] = "",
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Break glass: allow or deny actions for a while, whatever documents say. It ends by itself.

    'deny' beats everything. 'allow' lifts what flags, roles and policies object to, never a missing license, a feature
    that is not licensed, or a limit.

    \b
    Examples:
      licet override set --action 'llm.*' --effect allow --for 1h --reason 'INC-42: policy push broke agents'
      licet override set --action report.export --effect deny --for 2h --tenant acme --reason 'leaked key'
    """
    from licet_control_plane.cli.rest import ControlPlane

    if effect not in ("allow", "deny"):
        raise bad(f"--effect {effect!r} is no effect.", "give allow or deny")
    lasts_s = seconds(for_, "--for")
    if lasts_s < 1:
        raise bad(f"--for {for_!r} is less than a second.", "write it as 30m or 1h")
    body = {
        "action": action,
        "effect": effect,
        "expires_after_s": int(lasts_s),
        "reason": reason,
        "tenant": tenant,
        "subject": subject,
        "id": id_,
    }
    timeout_s = seconds(timeout, "--timeout")
    with ControlPlane(server_target(server, api_key)) as control_plane:
        note(f"setting an override on {control_plane.target.server}")
        made = control_plane.post("/v1/overrides", body)
        rollout = control_plane.wait_for_rollout(made["revision"], timeout_s=timeout_s) if wait else None
    _report(made, rollout, wait, timeout_s, as_json)


def list_(
    all_: Annotated[bool, typer.Option("--all", help="Those that are over, too.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """List the overrides that are in force, the last set first.

    \b
    Example:
      licet override list --all
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        items = control_plane.get("/v1/overrides", limit=500)["items"]
    items = [item for item in items if all_ or item["state"] == "live"]
    if as_json:
        emit_json({"items": items})
        return
    columns = ("id", "action", "effect", "tenant", "subject", "state", "expires_at", "set_by", "reason")
    table(columns, ([item[column] for column in columns] for item in items))


def clear(
    override_id: Annotated[str, typer.Argument(help="The override's id.", metavar="ID")],
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """End an override before its time.

    \b
    Example:
      licet override clear 3fa9c1d2e4b5a697
    """
    from urllib.parse import quote

    from licet_control_plane.cli.rest import ControlPlane

    timeout_s = seconds(timeout, "--timeout")
    with ControlPlane(server_target(server, api_key)) as control_plane:
        note(f"clearing override {override_id} on {control_plane.target.server}")
        made = control_plane.delete(f"/v1/overrides/{quote(override_id, safe='')}")
        rollout = control_plane.wait_for_rollout(made["revision"], timeout_s=timeout_s) if wait else None
    _report(made, rollout, wait, timeout_s, as_json)


def _report(made: dict[str, Any], rollout: dict[str, Any] | None, wait: bool, timeout_s: float, as_json: bool) -> None:
    if as_json:
        emit_json({**made, "rollout": rollout} if wait else made)
    else:
        say(f"override {made['id']}  {made['state']}  revision {made['revision']}")
        whom = " ".join(filter(None, (made["tenant"] or "all tenants", made["subject"])))
        say(f"  {made['effect']:<10} {made['action']} for {whom}, until {made['expires_at']}")
        say(f"  {'because':<10} {made['reason']}")
    if rollout is not None:
        report_rollout(rollout, timeout_s=timeout_s, quiet=as_json)

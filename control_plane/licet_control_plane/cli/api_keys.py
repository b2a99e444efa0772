"""``licet api-key create|list|revoke``: who may use the API."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import typer

from licet_control_plane.cli.arguments import ApiKeyOption, JsonOption, ServerOption, bad, instant, seconds
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.output import emit_json, note, say, table

ROLES: Final = ("admin", "operator", "approver", "auditor", "sidecar")


def create(
    name: Annotated[str, typer.Argument(help="What the audit trail calls whoever uses it, such as ci-push.")],
    role: Annotated[str, typer.Option("--role", help=f"One of {', '.join(ROLES)}: see docs/security.md.")],
    tenant: Annotated[str, typer.Option("--tenant", help="The only tenant that it reaches. [default: all]")] = "",
    expires: Annotated[
        str | None, typer.Option("--expires", help="From when on it opens nothing: a date, or after so long, as 90d.")
    ] = None,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Make an API key. It is printed once, on standard output, and kept nowhere: the server has its hash only.

    \b
    Examples:
      licet api-key create ci-push --role operator --expires 90d > ci-push.key
      licet api-key create acme-portal --role auditor --tenant acme --json
    """
    from licet_control_plane.cli.rest import ControlPlane

    if role not in ROLES:
        raise bad(f"--role {role!r} is not a role.", f"use one of {', '.join(ROLES)}")
    body = {"name": name, "role": role, "tenant": tenant, "expires_at": _end(expires)}
    with ControlPlane(server_target(server, api_key)) as control_plane:
        made = control_plane.post("/v1/api-keys", body)
        note(f"key {made['id']} ({name}, {role}{f' of {tenant}' if tenant else ''}) of {control_plane.target.server};")
        note("it is shown this once; revoke it with: licet api-key revoke " + name)
    if as_json:
        emit_json(made)
    else:
        say(made["key"])


def list_(
    all_: Annotated[bool, typer.Option("--all", help="Also those that were revoked or have expired.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """List API keys. Their id stands in their text, licet_<id>_…: so a key that was found somewhere is told.

    \b
    Example:
      licet api-key list --all
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        items: list[dict[str, Any]] = control_plane.get("/v1/api-keys")["items"]
    shown = [item for item in items if all_ or item["state"] == "active"]
    if as_json:
        emit_json({"items": shown})
        return
    columns = ("id", "name", "role", "tenant", "state", "created_at", "expires_at", "last_used_at")
    table(columns, ([item[name] for name in columns] for item in shown))


def revoke(
    key: Annotated[str, typer.Argument(help="Its id or its name.", metavar="KEY")],
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Revoke an API key: the next request with it is refused, by every control plane.

    \b
    Example:
      licet api-key revoke ci-push
    """
    from urllib.parse import quote

    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        note(f"revoking {key} on {control_plane.target.server}")
        revoked = control_plane.delete(f"/v1/api-keys/{quote(key, safe='')}")
    if as_json:
        emit_json(revoked)
    else:
        say(f"{revoked['name']} ({revoked['id']}) is revoked since {revoked['revoked_at']}")


def _end(text: str | None) -> str | None:
    """The instant of a date, or of a time from now."""
    if text is None:
        return None
    if text[-1:] in "smhd" and text[:1].isdigit() and "-" not in text:
        return (datetime.now(UTC) + timedelta(seconds=seconds(text, "--expires"))).isoformat().replace("+00:00", "Z")
    return instant(text, "--expires")

"""``licet license suspend|resume|cancel|renew|change-plan``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from licet_control_plane.cli.arguments import (
    ApiKeyOption,
    JsonOption,
    ServerOption,
    TimeoutOption,
    WaitOption,
    instant,
    seconds,
)
from licet_control_plane.cli.bundles import report_rollout
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.licenses import TenantArgument, print_license
from licet_control_plane.cli.output import emit_json, note

_WHEN = {"now": "now", "term-end": "term_end", "month-end": "month_end"}


def suspend(
    tenant: TenantArgument,
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Deny everything the tenant asks, with TENANT_SUSPENDED, until it is resumed. Fees go on.

    \b
    Example:
      licet license suspend acme --wait
    """
    _move(tenant, "suspend", {}, "suspending", wait, timeout, as_json, server, api_key)


def resume(
    tenant: TenantArgument,
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """End a suspension. Of a license that is active: take back that it is canceled at the end of its term.

    \b
    Example:
      licet license resume acme
    """
    _move(tenant, "resume", {}, "resuming", wait, timeout, as_json, server, api_key)


def cancel(
    tenant: TenantArgument,
    at_end: Annotated[bool, typer.Option("--at-end", help="With its term: not renewed, and no grace.")] = False,
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """End a license, now or at the end of its term.

    \b
    Example:
      licet license cancel acme --at-end
    """
    body = {"at": "term_end" if at_end else "now"}
    _move(tenant, "cancel", body, "canceling", wait, timeout, as_json, server, api_key)


def renew(
    tenant: TenantArgument,
    periods: Annotated[int, typer.Option("--periods", help="How many of its periods.", min=1, max=120)] = 1,
    once: Annotated[
        str, typer.Option("--once", help="A name for this renewal: run again with it, nothing more is renewed.")
    ] = "",
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Make the term longer by the license's period. What is counted goes on; nothing begins anew.

    \b
    Example:
      licet license renew acme --once order-4711
    """
    _move(tenant, "renew", {"periods": periods}, "renewing", wait, timeout, as_json, server, api_key, once=once)


def change_plan(
    tenant: TenantArgument,
    plan: Annotated[str, typer.Argument(help="The plan it moves to.", metavar="PLAN")],
    at: Annotated[str, typer.Option("--at", help="now, term-end, month-end, or a date such as 2027-03-01.")] = "now",
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Move a license to another plan, now or later.

    \b
    Example:
      licet license change-plan acme enterprise --at term-end
    """
    body = {"plan": plan, "at": _WHEN.get(at) or instant(at, "--at")}
    _move(tenant, "change-plan", body, "changing the plan of", wait, timeout, as_json, server, api_key)


def _move(
    tenant: str,
    move: str,
    body: dict[str, Any],
    doing: str,
    wait: bool,
    timeout: str,
    as_json: bool,
    server: str | None,
    api_key: str | None,
    *,
    once: str = "",
) -> None:
    from urllib.parse import quote

    from licet_control_plane.cli.rest import ControlPlane

    timeout_s = seconds(timeout, "--timeout")
    with ControlPlane(server_target(server, api_key)) as control_plane:
        note(f"{doing} the license of {tenant} on {control_plane.target.server}")
        license_ = control_plane.post(f"/v1/licenses/{quote(tenant, safe='')}/{move}", body, once=once)
        rollout = control_plane.wait_for_rollout(license_["revision"], timeout_s=timeout_s) if wait else None
    if as_json:
        emit_json({**license_, "rollout": rollout} if wait else license_)
    else:
        print_license(license_)
    if rollout is not None:
        report_rollout(rollout, timeout_s=timeout_s, quiet=as_json)

"""``licet license create|put|get|list|update``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from licet_control_plane.cli.arguments import (
    ApiKeyOption,
    JsonOption,
    ServerOption,
    TimeoutOption,
    WaitOption,
    amounts,
    bad,
    counts,
    instant,
    seconds,
)
from licet_control_plane.cli.bundles import report_rollout
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.output import emit_json, note, say, table

TenantArgument = Annotated[str, typer.Argument(help="The customer account.", metavar="TENANT")]
StartsOption = Annotated[str | None, typer.Option("--starts", help="First instant of the term: 2027-01-31.")]
EndsOption = Annotated[str | None, typer.Option("--ends", help="First instant after the term; 'never' for none.")]
AddonOption = Annotated[
    list[str] | None, typer.Option("--addon", help="Add-on plan and how many, NAME=COUNT; may be repeated.")
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option(
        "--override", help="Other amount for a limit, FEATURE:LIMIT=UNITS, or ='500.00 USD'; may be repeated."
    ),
]
GraceOption = Annotated[str | None, typer.Option("--grace", help="For how long it answers after its term: 7d.")]
PeriodOption = Annotated[
    str | None, typer.Option("--period", help="What it is renewed by: day, week, month or year; 'none' for nothing.")
]
AutoRenewOption = Annotated[
    bool | None, typer.Option("--auto-renew/--no-auto-renew", help="Renew it by itself, an hour before its term ends.")
]
StatusOption = Annotated[str | None, typer.Option("--status", help="active, suspended or canceled.")]

_STATUSES = ("active", "suspended", "canceled")
_PERIODS = ("day", "week", "month", "year")
_PAGE = 500


def create(
    tenant: TenantArgument,
    plan: Annotated[str, typer.Option("--plan", help="The plan it holds.")],
    starts: StartsOption = None,
    ends: EndsOption = None,
    addon: AddonOption = None,
    override: OverrideOption = None,
    grace: GraceOption = None,
    period: PeriodOption = None,
    auto_renew: AutoRenewOption = None,
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Give a tenant a license.

    \b
    Example:
      licet license create acme --plan pro --ends 2028-01-01 --addon extra-tokens=2
    """
    body = _terms(starts, ends, addon, override, grace, period, auto_renew)
    _change("POST", tenant, {"tenant": tenant, "plan": plan, **body}, wait, timeout, as_json, server, api_key)


def put(
    tenant: TenantArgument,
    plan: Annotated[str, typer.Option("--plan", help="The plan it holds.")],
    status: StatusOption = None,
    starts: StartsOption = None,
    ends: EndsOption = None,
    addon: AddonOption = None,
    override: OverrideOption = None,
    grace: GraceOption = None,
    period: PeriodOption = None,
    auto_renew: AutoRenewOption = None,
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Make a tenant's license exactly this, whether it has one or not; repeated it changes nothing.

    What is not given is as in a new license. But --status and --ends stay as they are, because they move by themselves;
    grants stay, too.

    \b
    Example:
      licet license put acme --plan pro --starts 2027-01-31 --period month --auto-renew
    """
    body = {"plan": plan, **_terms(starts, ends, addon, override, grace, period, auto_renew)}
    if status is not None:
        body["status"] = _checked_status(status)
    _change("PUT", tenant, body, wait, timeout, as_json, server, api_key)


def update(
    tenant: TenantArgument,
    plan: Annotated[str | None, typer.Option("--plan", help="Move it to this plan.")] = None,
    status: StatusOption = None,
    starts: StartsOption = None,
    ends: EndsOption = None,
    addon: AddonOption = None,
    override: OverrideOption = None,
    grace: GraceOption = None,
    period: PeriodOption = None,
    auto_renew: AutoRenewOption = None,
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Change a license. What is not given stays; --addon and --override each replace their whole set.

    \b
    Example:
      licet license update acme --status suspended --wait
    """
    body = _terms(starts, ends, addon, override, grace, period, auto_renew)
    if plan is not None:
        body["plan"] = plan
    if status is not None:
        body["status"] = _checked_status(status)
    if not body:
        raise bad("nothing to change.", "give at least one of the options that change something")
    _change("PATCH", tenant, body, wait, timeout, as_json, server, api_key)


def get(
    tenant: TenantArgument, as_json: JsonOption = False, server: ServerOption = None, api_key: ApiKeyOption = None
) -> None:
    """Show the license of a tenant.

    \b
    Example:
      licet license get acme
    """
    from urllib.parse import quote

    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        license_ = control_plane.get(f"/v1/licenses/{quote(tenant, safe='')}")
    if as_json:
        emit_json(license_)
    else:
        print_license(license_)


def list_(
    plan: Annotated[str | None, typer.Option("--plan", help="Only this plan.")] = None,
    status: StatusOption = None,
    limit: Annotated[int, typer.Option("--limit", help="At most so many.", min=1)] = 100,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """List licenses, by tenant.

    \b
    Example:
      licet license list --plan pro
    """
    from licet_control_plane.cli.rest import ControlPlane

    status = _checked_status(status) if status is not None else None
    items: list[dict[str, Any]] = []
    after = None
    with ControlPlane(server_target(server, api_key)) as control_plane:
        while len(items) < limit:
            page = control_plane.get(
                "/v1/licenses", plan=plan, status=status, after=after, limit=min(_PAGE, limit - len(items))
            )
            items.extend(page["items"])
            after = page.get("next")
            if not after or not page["items"]:
                break
    if as_json:
        emit_json({"items": items, "next": after})
        return
    columns = ("tenant", "plan", "stage", "starts_at", "ends_at", "addons", "overrides", "revision")
    table(columns, ([item.get(column) for column in columns] for item in items), numeric=("revision",))
    if after:
        note(f"there are more than {limit}; raise --limit")


def _terms(
    starts: str | None,
    ends: str | None,
    addon: list[str] | None,
    override: list[str] | None,
    grace: str | None,
    period: str | None,
    auto_renew: bool | None,
) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if starts is not None:
        body["starts_at"] = instant(starts, "--starts")
    if ends is not None:
        body["ends_at"] = None if ends == "never" else instant(ends, "--ends")
    if addon:
        body["addons"] = counts(addon, "--addon")
    if override:
        body["overrides"] = amounts(override, "--override")
    if grace is not None:
        body["grace_s"] = int(seconds(grace, "--grace"))
    if period is not None:
        if period not in (*_PERIODS, "none"):
            raise bad(f"--period {period!r} is not a period.", f"use one of {', '.join(_PERIODS)}, or none")
        body["renewal_period"] = None if period == "none" else period
    if auto_renew is not None:
        body["auto_renew"] = auto_renew
    return body


def _checked_status(status: str) -> str:
    if status not in _STATUSES:
        raise bad(f"--status {status!r} is not a status.", f"use one of {', '.join(_STATUSES)}")
    return status


def _change(
    method: str,
    tenant: str,
    body: dict[str, Any],
    wait: bool,
    timeout: str,
    as_json: bool,
    server: str | None,
    api_key: str | None,
) -> None:
    from urllib.parse import quote

    from licet_control_plane.cli.rest import ControlPlane

    timeout_s = seconds(timeout, "--timeout")
    with ControlPlane(server_target(server, api_key)) as control_plane:
        verb = {"POST": "creating", "PUT": "putting", "PATCH": "updating"}[method]
        note(f"{verb} the license of {tenant} on {control_plane.target.server}")
        if method == "POST":
            license_ = control_plane.post("/v1/licenses", body)
        else:
            send = control_plane.put if method == "PUT" else control_plane.patch
            license_ = send(f"/v1/licenses/{quote(tenant, safe='')}", body)
        rollout = control_plane.wait_for_rollout(license_["revision"], timeout_s=timeout_s) if wait else None
    if as_json:
        emit_json({**license_, "rollout": rollout} if wait else license_)
    else:
        print_license(license_)
    if rollout is not None:
        report_rollout(rollout, timeout_s=timeout_s, quiet=as_json)


def print_license(license_: dict[str, Any]) -> None:
    """A license, for people."""
    term = f"{license_.get('starts_at') or 'always'} to {license_.get('ends_at') or 'open end'}"
    say(f"{license_['tenant']}  plan {license_['plan']}  {license_['stage']}  revision {license_.get('revision')}")
    say(f"  term       {term}")
    if license_.get("grace_ends_at"):
        say(f"  grace      until {license_['grace_ends_at']}")
    if license_.get("renewal_period"):
        say(
            f"  renewed    by a {license_['renewal_period']}, {'by itself' if license_['auto_renew'] else 'when asked'}"
        )
    if license_.get("cancels"):
        say("  canceled   at the end of its term")
    if license_.get("planned"):
        say(f"  changes    to plan {license_['planned']['plan']} at {license_['planned']['at']}")
    for word in ("addons", "overrides"):
        if license_.get(word):
            say(f"  {word:<10} {', '.join(f'{name}={amount}' for name, amount in license_[word].items())}")
    for grant in license_.get("grants", ()):
        say(
            f"  grant      {grant['id']}  {grant['limit']} +{grant['amount']}  {grant['state']}"
            f"  {grant['starts_at']} to {grant['expires_at']}  priority {grant['priority']}"
        )

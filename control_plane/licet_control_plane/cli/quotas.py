"""``licet quota show|reclaim``."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Final

import typer

from licet_control_plane.cli.arguments import ApiKeyOption, JsonOption, ServerOption
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.failure import EXIT_NO
from licet_control_plane.cli.output import emit_json, note, say, table

_PAGE: Final = 500
_HOLDERS_SHOWN: Final = 8
_AMOUNTS: Final = ("amount", "used", "leased", "reserved", "remaining", "over", "dead")
_NANOS: Final = 10**9
_RATE_SCALE: Final = 1_000


def show(
    tenant: Annotated[str, typer.Argument(help="The customer account.", metavar="TENANT")],
    limit: Annotated[
        str | None, typer.Option("--limit", help="Only this limit, FEATURE:NAME, and its grants.", metavar="KEY")
    ] = None,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """What is counted against a tenant's limits now, and which sidecars hold it.

    \b
    Example:
      licet quota show acme --limit llm.tokens:month
    """
    from urllib.parse import quote

    from licet_control_plane.cli.rest import ControlPlane

    path = f"/v1/tenants/{quote(tenant, safe='')}/quotas"
    with ControlPlane(server_target(server, api_key)) as control_plane:
        result = control_plane.get(path, key=limit, limit=_PAGE)
        while result["next"]:
            page = control_plane.get(path, key=limit, limit=_PAGE, after=result["next"])
            result["items"] += page["items"]
            result["next"] = page["next"]
    if as_json:
        emit_json(result)
        return
    say(f"{tenant}  {result['phase']} since {result['since'] or '-'}")
    table(("limit", "scope", "window", *_AMOUNTS), map(_row, result["items"]), numeric=_AMOUNTS)
    for item in result["items"]:
        _print_holders(item)
    if result["untouched"]:
        say("nothing was taken yet of: " + ", ".join(entry["limit"] for entry in result["untouched"]))


def reclaim(
    sidecar: Annotated[str, typer.Argument(help="Its id, or the beginning that lists show.", metavar="SIDECAR")],
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only from this tenant's quotas.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be freed; change nothing.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Take back what a sidecar that will not come back holds and has not spent.

    Fails while it may still be alive. If it is, and only cut off, it goes on under a new id.

    \b
    Example:
      licet quota reclaim 3f9c2a7be41d --dry-run
    """
    from urllib.parse import quote

    from licet_control_plane.cli.rest import ControlPlane

    items: list[dict[str, Any]] = []
    skipped: list[str] = []
    body: dict[str, Any] = {"dry_run": dry_run}
    if tenant is not None:
        body["tenant"] = tenant
    with ControlPlane(server_target(server, api_key)) as control_plane:
        of = f"tenant {tenant}" if tenant else "all tenants"
        verb = "looking at" if dry_run else "reclaiming"
        note(f"{verb} what sidecar {sidecar} holds of {of} on {control_plane.target.server}")
        while True:
            page = control_plane.post(f"/v1/sidecars/{quote(sidecar, safe='')}/reclaim", body)
            items += page["items"]
            skipped += page["skipped"]
            if not page["next"]:
                break
            body["after"] = page["next"]
            note(f"{len(items)} registers so far, up to tenant {page['next']}")
    left = [item for item in items if item["status"] in ("live", "learning", "stale")]
    if as_json:
        emit_json({**page, "items": items, "skipped": skipped, "complete": not (left or skipped)})
    else:
        columns = ("tenant", "quota", "status", "granted", "used", "reserved", "in_ledger", "counted", "freed")
        table(columns, ([item[name] for name in columns] for item in items), numeric=columns[3:])
        if dry_run and page["wait_s"]:
            note(f"it cannot be reclaimed yet: {page['why_not']}. Ask again in {page['wait_s']} s")
    reserved = sum(item["reserved"] > 0 for item in items)
    if reserved:
        note(f"{reserved} registers have open reservations, which stay counted until their windows end")
    if (left or skipped) and not dry_run:
        note(
            f"not done: {len(left)} registers and {len(skipped)} tenants are learning or were in use."
            " Run the command again in a minute"
        )
        raise typer.Exit(EXIT_NO)


def _row(item: dict[str, Any]) -> list[Any]:
    window = item["window"]
    shown = f"{window['starts_at']} to {window['ends_at'] or 'no end'}" if item["kind"] != "rate" else "each second"
    amounts = (
        item["amount"], item["used"], item["leased"], item["reserved"], item["remaining"], item["overage"],
        item["leased_by_dead"],
    )  # fmt: skip
    return [item["limit"], _scope(item), shown, *(_amount(item, amount) for amount in amounts)]


def _scope(item: dict[str, Any]) -> str:
    values = item["scope_values"]
    return ", ".join(f"{path}={value}" for path, value in values.items()) if values else item["scope"]


def _amount(item: dict[str, Any], amount: int | None) -> Any:
    if amount is None:
        return None
    if item["kind"] == "rate":
        return f"{Decimal(amount) / _RATE_SCALE:f}/s"
    if item["kind"] == "budget":
        return f"{Decimal(amount) / _NANOS:f} {item['currency']}"
    return amount


def _print_holders(item: dict[str, Any]) -> None:
    holders = [holder for holder in item["holders"] if holder["state"] != "sealed"]
    if not holders:
        return
    say(f"\n{item['limit']} {_scope(item)}".rstrip())
    for holder in holders[:_HOLDERS_SHOWN]:
        silent = "" if holder["state"] == "live" or holder["silent_s"] is None else f" since {holder['silent_s']:.0f} s"
        units = "  ".join(
            f"{word} {_amount(item, holder[word])}" for word in ("granted", "used", "reserved", "unspent")
        )
        say(f"  {holder['sidecar'][:12]}  {holder['state']}{silent}  {units}")
    if len(holders) > _HOLDERS_SHOWN:
        say(f"  and {len(holders) - _HOLDERS_SHOWN} more; --json has all")

"""``licet usage summary`` and ``licet ledger verify``."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from licet_control_plane.cli.arguments import ApiKeyOption, JsonOption, ServerOption, instant
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.failure import EXIT_NO
from licet_control_plane.cli.output import emit_json, say, table

_MEASURES: Final = ("events", "units", "cost")


def summary(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant.")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="From this date or time on (UTC).")] = None,
    to: Annotated[str | None, typer.Option("--to", help="Up to this date or time, exclusive (UTC).")] = None,
    by: Annotated[
        list[str] | None, typer.Option("--by", help="Group by: tenant, action, feature, …; may be repeated.")
    ] = None,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Events, units and cost from the ledger.

    \b
    Example:
      licet usage summary --tenant acme --from 2027-01-01 --by feature --by effect
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        result = control_plane.get(
            "/v1/usage/summary",
            tenant=tenant,
            **{"from": instant(from_, "--from") if from_ else None},
            to=instant(to, "--to") if to else None,
            by=",".join(by) if by else None,
        )
    if as_json:
        emit_json(result)
        return
    items: list[dict[str, Any]] = result["items"]
    keys = [key for key in (items[0] if items else {}) if key not in _MEASURES]
    table(
        (*keys, *_MEASURES),
        ([*(item.get(key) for key in keys), item["events"], item["units"], costs_text(item["cost"])] for item in items),
        numeric=_MEASURES,
    )


def verify(as_json: JsonOption = False, server: ServerOption = None, api_key: ApiKeyOption = None) -> None:
    """Recount the ledger: gaps, duplicates, conflicts, and whether the rollups add up. Exits with 1 when they do not.

    \b
    Example:
      licet ledger verify
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        result = control_plane.get("/v1/ledger/verify")
    if as_json:
        emit_json(result)
    else:
        verdict = "consistent" if result["ok"] else "NOT consistent"
        say(f"{result['events']:,} events in {len(result['logs'])} logs: {verdict}")
        for gap in result["gaps"]:
            say(f"  gap: log {gap['log_id']}, {gap['from_seq']} to {gap['to_seq']}: {gap['why']}")
        for word in ("duplicates", "conflicts"):
            if result[word]:
                say(f"  {word}: {result[word]}")
        for month, count in result.get("dropped", {}).items():
            say(f"  dropped: {month}, {count:,} events, exported before; its sums are taken as they are")
        if not result["rollups_match"]:
            say("  the hourly rollups do not match the events")
    if not result["ok"]:
        raise typer.Exit(EXIT_NO)


def costs_text(costs: list[dict[str, Any]]) -> str:
    """Costs as the API lists them, one for each currency, for people."""
    return ", ".join(f"{cost['amount']} {cost['currency']}" for cost in costs) or "-"

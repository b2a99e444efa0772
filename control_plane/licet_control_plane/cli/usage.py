"""``licet usage summary``."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from licet_control_plane.cli.arguments import ApiKeyOption, JsonOption, ServerOption, instant
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.output import emit_json, table

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


def costs_text(costs: list[dict[str, Any]]) -> str:
    """Costs as the API lists them, one for each currency, for people."""
    return ", ".join(f"{cost['amount']} {cost['currency']}" for cost in costs) or "-"

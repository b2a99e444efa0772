"""``licet usage``: sums, the largest, denials, events one by one, invoices."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, Final

import typer

from licet_control_plane.cli.arguments import ApiKeyOption, JsonOption, ServerOption, bad, instant
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.failure import CliError
from licet_control_plane.cli.output import emit_json, note, say, table

TAIL_POLL_S: Final = 1.0
"""Sidecars ship every second or so: looking more often would show nothing sooner."""
_MEASURES: Final = ("events", "units", "cost")
_EVENTS_PAGE: Final = 2_000

TenantOption = Annotated[str | None, typer.Option("--tenant", help="Only this tenant.")]
FromOption = Annotated[str | None, typer.Option("--from", help="From this date or time on (UTC).")]
ToOption = Annotated[str | None, typer.Option("--to", help="Up to this date or time, exclusive (UTC).")]
ActionOption = Annotated[str | None, typer.Option("--action", help="Only this action.")]
EffectOption = Annotated[str | None, typer.Option("--effect", help="Only APPROVED, DENIED or PENDING.")]
ReasonOption = Annotated[str | None, typer.Option("--reason", help="Only this reason, such as QUOTA_EXHAUSTED.")]


def summary(
    tenant: TenantOption = None,
    from_: FromOption = None,
    to: ToOption = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by",
            help="Group by: tenant, feature, action, effect, reason, flag, variant, hour, day, month; may be repeated.",
        ),
    ] = None,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Events, units and cost from the ledger.

    \b
    Example:
      licet usage summary --tenant acme --from 2027-01-01 --by month --by feature --by effect
    """
    from licet_control_plane.cli.rest import ControlPlane

    query = {"tenant": tenant, **_interval(from_, to), "by": ",".join(by) if by else None}
    with ControlPlane(server_target(server, api_key)) as control_plane:
        result = control_plane.get("/v1/usage/summary", **query)
        while result.get("next"):
            page = control_plane.get("/v1/usage/summary", **query, after=result["next"])
            result["items"] += page["items"]
            result["next"] = page["next"]
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


def top(
    by: Annotated[str, typer.Option("--by", help="What to rank: tenant, feature or action.")] = "tenant",
    order: Annotated[str, typer.Option("--order", help="By units, cost, events or denials.")] = "units",
    tenant: TenantOption = None,
    from_: FromOption = None,
    to: ToOption = None,
    currency: Annotated[str | None, typer.Option("--currency", help="The one to rank costs in.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1_000, help="How many.")] = 10,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """The largest tenants, features or actions. Units and cost are of what was approved.

    \b
    Example:
      licet usage top --by tenant --order denials --from 2027-01-01 -n 20
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        result = control_plane.get(
            "/v1/usage/top",
            by=by,
            order=order,
            tenant=tenant,
            **_interval(from_, to),
            currency=currency,
            limit=limit,
        )
    if as_json:
        emit_json(result)
        return
    table(
        (by, "events", "units", "denials", "cost"),
        (
            [
                item[by],
                item["events"],
                item["units"],
                item["denials"],
                costs_text([item["cost"]] if item["cost"] else []),
            ]
            for item in result["items"]
        ),
        numeric=("events", "units", "denials", "cost"),
    )


def denied(
    tenant: TenantOption = None,
    from_: FromOption = None,
    to: ToOption = None,
    reason: Annotated[
        list[str] | None, typer.Option("--reason", help="Denials for this reason instead; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1_000, help="How many.")] = 100,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Demand: what was asked for and denied, because the license does not have it or ran out of it.

    \b
    Example:
      licet usage denied --from 2027-01-01
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        result = control_plane.get(
            "/v1/usage/denied",
            tenant=tenant,
            **_interval(from_, to),
            reason=",".join(reason) if reason else None,
            limit=limit,
        )
    if as_json:
        emit_json(result)
        return
    columns = ("feature", "action", "reason", "events", "units", "tenants", "subjects")
    table(columns, ([item[name] for name in columns] for item in result["items"]), numeric=columns[3:])
    if result["next"]:
        note(f"there are more than {limit}: raise --limit to see them")
    if not reason:
        note("denials for any other reason: licet usage summary --by reason")


def tail(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as events come, until interrupted.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=_EVENTS_PAGE, help="How many to begin with.")] = 20,
    tenant: TenantOption = None,
    action: ActionOption = None,
    effect: EffectOption = None,
    reason: ReasonOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a JSON object on a line.")] = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """The newest events, oldest first.

    \b
    Example:
      licet usage tail -f --tenant acme --effect DENIED
    """
    from licet_control_plane.cli.rest import ControlPlane

    query = {"tenant": tenant, "action": action, "effect": effect, "reason": reason}
    with ControlPlane(server_target(server, api_key)) as control_plane:
        page = control_plane.get("/v1/usage/tail", **query, limit=lines)
        while True:
            for event in page["items"]:
                emit_json(event) if as_json else say(_event_line(event))
            if not follow:
                return
            if len(page["items"]) < _EVENTS_PAGE:
                time.sleep(TAIL_POLL_S)
            page = control_plane.get("/v1/usage/tail", **query, after=page["next"], limit=_EVENTS_PAGE)


def export(
    tenant: TenantOption = None,
    from_: FromOption = None,
    to: ToOption = None,
    action: ActionOption = None,
    effect: EffectOption = None,
    reason: ReasonOption = None,
    format_: Annotated[str, typer.Option("--format", help="jsonl: a JSON object a line; or csv.")] = "jsonl",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file instead of standard output.")] = None,
    after: Annotated[
        str | None, typer.Option("--after", help="Go on with an export that was interrupted: adds to --output.")
    ] = None,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Every event, one by one: those that were recorded when it began, each once.

    Progress goes to standard error, and so does where to go on when it ends early.

    \b
    Example:
      licet usage export --from 2026-10-01 --to 2026-11-01 --format csv -o october.csv
    """
    from licet_control_plane.cli.rest import ControlPlane

    if format_ not in _WRITERS:
        raise bad(f"--format {format_!r} is not known.", f"use one of {', '.join(_WRITERS)}")
    query = {"tenant": tenant, "action": action, "effect": effect, "reason": reason, **_interval(from_, to)}
    count, place = 0, after
    with ControlPlane(server_target(server, api_key)) as control_plane, _opened(output, after is not None) as file:
        write = _WRITERS[format_](file, header=after is None)
        try:
            while True:
                page = control_plane.get("/v1/usage/events", **query, after=place, limit=_EVENTS_PAGE)
                write(page["items"])
                file.flush()
                count += len(page["items"])
                place = page["next"]
                if place is None:
                    break
                note(f"{count:,} events so far")
        except (CliError, KeyboardInterrupt):
            if place:
                note(f"{count:,} events were written; go on with: --after {place}")
            raise
    note(f"{count:,} events")


def invoice(
    tenant: Annotated[str, typer.Argument(help="The customer account.", metavar="TENANT")],
    month: Annotated[str, typer.Option("--month", help="The calendar month (UTC), such as 2026-10.", metavar="MONTH")],
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a row for each line.")] = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """What a tenant owes for a month, computed from the units in the ledger.

    Says when it may still change: while the month is open, or while events are on their way.

    \b
    Example:
      licet usage invoice acme --month 2026-10
    """
    from urllib.parse import quote

    from licet_control_plane.cli.rest import ControlPlane

    if as_json and as_csv:
        raise bad("--json and --csv do not go together.", "give one of them")
    with ControlPlane(server_target(server, api_key)) as control_plane:
        path = f"/v1/tenants/{quote(tenant, safe='')}/invoices/{quote(month, safe='')}"
        result = control_plane.get(path)
    if as_json:
        emit_json(result)
        return
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        columns = ("kind", "name", "priced_as", "units", "included", "currency", "unrounded", "amount")
        writer.writerow(("tenant", "month", *columns, "provisional"))
        for line in result["lines"]:
            writer.writerow(
                (tenant, month, *(line[name] for name in columns), "yes" if result["provisional"] else "no")
            )
    else:
        say(f"{tenant}  {month}{'  PROVISIONAL' if result['provisional'] else ''}")
        shown = ("kind", "name", "for", "units", "included", "price", "amount")
        table(shown, map(_invoice_row, result["lines"]), numeric=("units", "included", "amount"))
        for total in result["totals"]:
            say(f"total {total['amount']} {total['currency']}")
    for one in result["provisional"]:
        note(f"may still change: {one['detail']}")
    for one in result["unpriced"]:
        note(f"without a price, and not billed: {one['units']:,} units of {one['feature']}")


def costs_text(costs: list[dict[str, Any]]) -> str:
    """Costs as the API lists them, one for each currency, for people."""
    return ", ".join(f"{cost['amount']} {cost['currency']}" for cost in costs) or "-"


def _interval(from_: str | None, to: str | None) -> dict[str, str | None]:
    return {"from": instant(from_, "--from") if from_ else None, "to": instant(to, "--to") if to else None}


def _event_line(event: dict[str, Any]) -> str:
    units = " ".join(f"{feature}={count}" for feature, count in event["units"].items()) or "-"
    who = f"{event['subject']['type']}/{event['subject']['id']}".strip("/") or "-"
    kind = "" if event["kind"] == "CHECK" else f" {event['kind']}"
    what = f"{event['tenant']} {who} {event['action']}{kind}"
    rule = f" {event['rule']}" if event["rule"] else ""
    return f"{event['at']} {what} {event['effect']} {event['reason']}{rule} {units}"


def _invoice_row(line: dict[str, Any]) -> list[Any]:
    amount = f"{line['amount']} {line['currency']}"
    if line["kind"] == "fee":
        share = f"{100 * line['share_of_month']:.4g} % of the month"
        return [line["kind"], line["name"], "", line["units"], None, f"{line['charges'][0]['amount']}, {share}", amount]
    per = f" per {line['per_units']:,}" if line["per_units"] > 1 else ""
    parts = []
    for charge in line["charges"]:
        flat = f" + {charge['flat']}" if float(charge["flat"]) else ""
        parts.append(f"{charge['units']:,} at {charge['amount']}{per}{flat}")
    return [
        line["kind"],
        line["name"],
        line["priced_as"],
        line["units"],
        line["included"],
        "; ".join(parts),
        amount,
    ]


# Writing events


@contextmanager
def _opened(path: Path | None, add: bool) -> Iterator[IO[str]]:
    if path is None:
        yield sys.stdout
        return
    try:
        file = path.open("a" if add else "x", encoding="utf-8", newline="")
    except FileExistsError as error:
        raise bad(f"--output {path}: there is such a file.", "name another, or add to it with --after") from error
    except OSError as error:
        raise bad(f"--output {path}: {error.strerror}.", "name a file that can be written") from error
    with file:
        yield file


class _JsonLines:
    def __init__(self, file: IO[str], *, header: bool) -> None:
        self._file = file

    def __call__(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            self._file.write(json.dumps(event, separators=(",", ":"), ensure_ascii=False) + "\n")


class _Csv:
    """A row for each event; what has several values is JSON in its cell."""

    _COLUMNS: Final = (
        *("decision_id", "log_id", "seq", "at", "kind", "tenant", "subject_type", "subject_id", "on_behalf_of"),
        *("action", "effect", "reason", "rule", "revision", "units", "units_held", "unfunded", "cost", "currency"),
        *("priced_as", "flags", "exposures", "idempotency_key", "resource_type", "resource_id", "context", "spends"),
        *("shadow", "about", "expires_at"),
    )

    def __init__(self, file: IO[str], *, header: bool) -> None:
        self._writer = csv.DictWriter(file, self._COLUMNS, lineterminator="\n")
        if header:
            self._writer.writeheader()

    def __call__(self, events: list[dict[str, Any]]) -> None:
        self._writer.writerows(map(self._row, events))

    @staticmethod
    def _row(event: dict[str, Any]) -> dict[str, Any]:
        row = dict(event)
        subject, resource, cost = row.pop("subject"), row.pop("resource"), row.pop("cost") or {}
        row |= {"subject_type": subject["type"], "subject_id": subject["id"], "on_behalf_of": subject["on_behalf_of"]}
        row |= {"resource_type": resource["type"], "resource_id": resource["id"]}
        row |= {"cost": cost.get("amount"), "currency": cost.get("currency")}
        return {
            name: json.dumps(value, separators=(",", ":"), ensure_ascii=False)
            if isinstance(value, dict | list)
            else value
            for name, value in row.items()
        }


_WRITERS: Final[dict[str, type[_JsonLines] | type[_Csv]]] = {"jsonl": _JsonLines, "csv": _Csv}

"""``licet ledger months|export|drop|restored``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from licet_control_plane.cli.arguments import ApiKeyOption, JsonOption, ServerOption
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.failure import EXIT_USAGE, CliError
from licet_control_plane.cli.output import emit_json, note, say, table

_NUMBERS: Final = ("events", "exported", "dropped")

MonthOption = Annotated[str, typer.Option("--month", help="The month, such as 2026-05 (UTC).", metavar="MONTH")]


def months(as_json: JsonOption = False, server: ServerOption = None, api_key: ApiKeyOption = None) -> None:
    """Which months the ledger holds, and which were exported and dropped.

    \b
    Example:
      licet ledger months
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        result = control_plane.get("/v1/ledger/months")
    if as_json:
        emit_json(result)
        return
    columns = ("month", "events", "closed", "exported", "exported_at", "dropped", "dropped_at")
    table(columns, ([item[name] for name in columns] for item in result["items"]), numeric=_NUMBERS)


def export(
    month: MonthOption,
    out: Annotated[Path, typer.Option("--output", "-o", help="The file to write, gzipped JSON Lines.", metavar="FILE")],
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Write a closed month's events to a file. Only a month that was exported can be dropped.

    The file is whole or not there. It can be opened with any tool that reads JSON Lines; its last line is signed.

    \b
    Example:
      licet ledger export --month 2026-05 --output ledger-2026-05.jsonl.gz
    """
    from licet_control_plane.cli.export_file import receive
    from licet_control_plane.cli.rest import ControlPlane

    if out.exists():
        raise CliError(f"{out} is there already.", fix="name another file", exit_code=EXIT_USAGE)
    with ControlPlane(server_target(server, api_key)) as control_plane:
        with control_plane.stream(f"/v1/ledger/months/{_quoted(month)}/export") as chunks:
            end = receive(chunks, out)
        result = control_plane.post(f"/v1/ledger/months/{_quoted(month)}/exports", {"signed": end["signed"]})
    result["file"] = str(out)
    if as_json:
        emit_json(result)
        return
    say(f"{month}: {result['events']:,} events in {out}")
    note(
        f"keep it where you keep your books; then `licet ledger drop --month {month}` may remove them from the database"
    )


def drop(
    month: MonthOption,
    yes: Annotated[bool, typer.Option("--yes", help="Do it without asking.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Remove a closed month's events from the ledger, after they were exported. Sums, bills and watermarks stay.

    \b
    Example:
      licet ledger drop --month 2026-05 --yes
    """
    from licet_control_plane.cli.rest import ControlPlane

    if not yes and not typer.confirm(f"Remove the events of {month} from the ledger?", err=True):
        raise CliError("nothing was dropped.", fix="confirm, or give --yes", exit_code=EXIT_USAGE)
    with ControlPlane(server_target(server, api_key)) as control_plane:
        result: dict[str, Any] = {"done": False}
        gone = 0
        while not result["done"]:
            result = control_plane.post(f"/v1/ledger/months/{_quoted(month)}/drop", {})
            if not result["done"]:
                gone += result["events"]
                note(f"{gone:,} events so far")
    if as_json:
        emit_json(result)
    else:
        say(f"{month}: {result['events']:,} events dropped")


def restored(
    yes: Annotated[bool, typer.Option("--yes", help="Do it without asking.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Say that the ledger's database was restored from a backup, and may have lost what it had acknowledged.

    Sidecars send again what they still hold, and declare the rest lost: `licet ledger verify` lists it. Not needed
    after a start with --new-generation, which says it too.

    \b
    Example:
      licet ledger restored --yes
    """
    from licet_control_plane.cli.rest import ControlPlane

    if not yes and not typer.confirm("Was the database restored from a backup?", err=True):
        raise CliError("nothing was changed.", fix="confirm, or give --yes", exit_code=EXIT_USAGE)
    with ControlPlane(server_target(server, api_key)) as control_plane:
        result = control_plane.post("/v1/ledger/restored", {})
    if as_json:
        emit_json(result)
    else:
        say(f"ledger generation {result['ledger_generation']}: sidecars send again what they hold")


def _quoted(month: str) -> str:
    from urllib.parse import quote

    return quote(month, safe="")

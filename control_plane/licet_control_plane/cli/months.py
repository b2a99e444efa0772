"""``licet ledger months|export|check-export|drop|restored``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from licet_control_plane.cli.arguments import ApiKeyOption, JsonOption, ServerOption, bad
from licet_control_plane.cli.context import Target, server_target
from licet_control_plane.cli.failure import EXIT_NO, EXIT_USAGE, CliError
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


def check_export(
    files: Annotated[list[Path], typer.Argument(help="What `licet ledger export` wrote.", metavar="FILE…")],
    public_key: Annotated[
        list[str] | None,
        typer.Option("--public-key", help="Whose signature counts, ed25519:…; may be repeated. Else the server's."),
    ] = None,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Check exports that were kept: every event of a file is as it was signed, and none is missing.

    With --public-key no server is asked: the file and the key are enough. Exits with 1 when a file is not whole.

    \b
    Examples:
      licet ledger check-export ledger-2026-05.jsonl.gz
      licet ledger check-export books/*.gz --public-key ed25519:…
    """
    from dataclasses import asdict

    from licet.wire.signing import Verifier
    from licet_control_plane.cli.export_file import NotWhole, check_kept

    try:
        verifier = Verifier(public_key or _trusted(server_target(server, api_key)))
    except ValueError as error:
        raise bad(f"--public-key: {error}.", "give the text of public-key.txt") from error
    results: list[dict[str, Any]] = []
    for path in files:
        try:
            kept = check_kept(path, verifier)
            results.append({"file": str(path), "ok": True, **asdict(kept)})
        except NotWhole as problem:
            results.append({"file": str(path), "ok": False, "problem": str(problem)})
        except OSError as error:
            raise bad(f"{path} cannot be read: {error.strerror}.", "name a file that can be") from error
    if as_json:
        emit_json({"ok": all(one["ok"] for one in results), "items": results})
    else:
        for one in results:
            whole = f"{one['month']}: {one['events']:,} events of {one['logs']:,} logs, as signed" if one["ok"] else ""
            say(f"{one['file']}: {whole or 'NOT WHOLE: ' + one['problem']}")
    if not all(one["ok"] for one in results):
        raise typer.Exit(EXIT_NO)


def _trusted(target: Target) -> list[str]:
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(target) as control_plane:
        return [str(item["public_key"]) for item in control_plane.get("/v1/signing-keys")["items"]]


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

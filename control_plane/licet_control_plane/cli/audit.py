"""``licet audit log|verify|head|evidence``: what was changed, by whom, and that nobody changed the record of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from licet_control_plane.cli.arguments import ApiKeyOption, JsonOption, ServerOption, bad, instant, seconds
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.failure import EXIT_NO, EXIT_USAGE, CliError
from licet_control_plane.cli.output import emit_json, note, say, table
from licet_control_plane.cli.signed_file import document_in, write

PAGE: Final = 500
SHOWN: Final = 50


def log(
    by: Annotated[str, typer.Option("--by", help="Who: the name of a key, or oidc:SUBJECT.")] = "",
    action: Annotated[str, typer.Option("--action", help="What, such as license.update; license.* for all.")] = "",
    target: Annotated[str, typer.Option("--target", help="On what, as the trail names it.")] = "",
    tenant: Annotated[str, typer.Option("--tenant", help="About this tenant.")] = "",
    since: Annotated[str | None, typer.Option("--since", help="From a date on, or of so long, such as 24h.")] = None,
    to: Annotated[str | None, typer.Option("--to", help="Before this date.")] = None,
    limit: Annotated[int, typer.Option("--limit", help="So many at most; 0 for all.", min=0)] = SHOWN,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Show what was changed, the newest first: when, who, from where, and with --json before and after.

    \b
    Examples:
      licet audit log --since 24h --action 'license.*'
      licet audit log --tenant acme --limit 0 --json
    """
    from licet_control_plane.cli.rest import ControlPlane

    query: dict[str, Any] = {"by": by, "action": action, "target": target, "tenant": tenant}
    query = {name: value for name, value in query.items() if value}
    query |= {"from": _since(since), "to": instant(to, "--to") if to else None}
    items: list[dict[str, Any]] = []
    before: int | None = None
    with ControlPlane(server_target(server, api_key)) as control_plane:
        while True:
            wanted = min(PAGE, limit - len(items)) if limit else PAGE
            page = control_plane.get("/v1/audit", limit=wanted, before=before, **query)
            items += page["items"]
            before = page["next"]
            if before is None or (limit and len(items) >= limit):
                break
    if as_json:
        emit_json({"items": items, "next": before})
        return
    columns = ("number", "at", "by", "via", "address", "action", "target", "tenant")
    table(columns, ([str(item["number"]), *(item[name] for name in columns[1:])] for item in items))
    if before is not None:
        note(f"there are more before number {items[-1]['number']}: --limit 0 shows all")


def verify(
    head: Annotated[
        list[Path] | None,
        typer.Option("--head", help="Hold the trail to the signed head in this file too; may be repeated."),
    ] = None,
    public_key: Annotated[
        list[str] | None,
        typer.Option("--public-key", help="Whose signatures count besides the server's, ed25519:…; may be repeated."),
    ] = None,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Recompute every hash of the audit trail and hold it to its signed heads. Exits with 1, and names the first entry
    that was altered, removed, inserted or moved.

    The server has the heads that it signed, within a second of each entry, in its database and in its state directory.
    One that was kept elsewhere shows even what whoever has all of that rewrote: licet audit head.

    \b
    Example:
      licet audit verify --head monday.json
    """
    from licet_control_plane.cli.progress import bar, move
    from licet_control_plane.cli.rest import ControlPlane

    body = {"heads": [_document(path) for path in head or ()], "public_keys": public_key or []}
    result: dict[str, Any] = {}
    with ControlPlane(server_target(server, api_key)) as control_plane, bar(unit="entries") as shown:
        for line in control_plane.post_lines("/v1/audit/verify", body):
            step = json.loads(line)
            if "error" in step:
                raise CliError(f"the audit trail could not be read: {step['error']}", fix="look at the server's log")
            if "progress" in step:
                move(shown, step["progress"]["done"], step["progress"]["of"])
            result = step.get("result", result)
    if not result:
        raise CliError("the server ended the answer before its end.", fix="look at its log, and ask again")
    if as_json:
        emit_json(result)
    elif result["ok"]:
        say(f"{result['entries']:,} entries, as they were recorded; held to {result['heads']} signed heads")
        say(f"head {result['head']}")
    else:
        say(f"NOT as it was recorded: {result['fault']['what']}")
        say(f"the {result['entries']:,} entries before it fit")
    if not result["ok"]:
        raise typer.Exit(EXIT_NO)


def head(
    output: Annotated[
        Path | None, typer.Option("--output", help="Write it to this file, to be kept where the server cannot reach.")
    ] = None,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Sign the end of the audit trail as it is now. Whoever keeps the file can show later that nothing up to it was
    changed: licet audit verify --head FILE.

    \b
    Example:
      licet audit head --output monday.json
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        result = control_plane.get("/v1/audit/head")
    if output is not None:
        write(output, result)
    if as_json:
        emit_json(result)
        return
    say(f"entry {result['number']}, hash {result['hash']}")
    if output is not None:
        note(f"written to {output}; keep it where the server cannot reach")


def evidence(
    from_: Annotated[str | None, typer.Option("--from", help="Beginning: a date, UTC.")] = None,
    to: Annotated[str | None, typer.Option("--to", help="End, not included: a date, UTC.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="The file to write.")] = None,
    check: Annotated[
        Path | None, typer.Option("--check", help="Instead: check this file. Asks no server.", metavar="FILE")
    ] = None,
    public_key: Annotated[
        list[str] | None,
        typer.Option("--public-key", help="With --check: whose signature counts, ed25519:…; may be repeated."),
    ] = None,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Put what an auditor asks for into one signed archive: the rules in force, each change with who and from where,
    the approvals, and the signed heads of the audit trail and the ledger with what recounting both found.

    With --check, verify one: signature, every file, the chain of the changes. The public key must come from elsewhere
    than the archive.

    \b
    Examples:
      licet audit evidence --from 2026-10-01 --to 2027-01-01 --output q4.zip
      licet audit evidence --check q4.zip --public-key "$(cat public-key.txt)"
    """
    if check is not None:
        if from_ or to or output:
            raise bad("--check goes without --from, --to and --output.", "leave them out")
        _check(check, public_key or [], as_json)
        return
    if not (from_ and to and output):
        raise bad("--from, --to and --output belong together.", "give all three, or --check FILE")
    from urllib.parse import urlencode

    from licet_control_plane.cli.rest import ControlPlane

    query = urlencode({"from": instant(from_, "--from"), "to": instant(to, "--to")})
    draft = output.with_name(f".{output.name}.part")
    size = 0
    with ControlPlane(server_target(server, api_key)) as control_plane:
        note(f"recounting the audit trail and the ledger of {control_plane.target.server}")
        try:
            with control_plane.stream(f"/v1/audit/evidence?{query}") as pieces, draft.open("wb") as file:
                for piece in pieces:
                    size += file.write(piece)
            draft.replace(output)
        except OSError as error:
            raise CliError(
                f"{output} cannot be written: {error}.", fix="name another file", exit_code=EXIT_USAGE
            ) from error
        finally:
            draft.unlink(missing_ok=True)
    if as_json:
        emit_json({"output": str(output), "bytes": size})
    else:
        say(f"{output}: {size:,} bytes; check it with: licet audit evidence --check {output} --public-key …")


def _check(path: Path, public_keys: list[str], as_json: bool) -> None:
    from dataclasses import asdict

    from licet.wire.signing import Verifier
    from licet_control_plane.evidence import EvidenceRefused
    from licet_control_plane.evidence import check as check_evidence

    if not public_keys:
        raise bad("--check needs --public-key.", "give the text of public-key.txt, from whom you trust")
    try:
        verifier = Verifier(public_keys)
        with path.open("rb") as file:
            found = asdict(check_evidence(file, verifier))
    except ValueError as error:
        raise bad(f"--public-key: {error}.", "give the text of public-key.txt") from error
    except OSError as error:
        raise bad(f"--check {path}: {error.strerror}.", "name the archive") from error
    except EvidenceRefused as error:
        raise CliError(
            f"{path} is NOT evidence: {error}.", fix="ask for a new one, or look for who altered it"
        ) from error
    ok = found["audit_ok"] and found["ledger_ok"]
    if as_json:
        emit_json({"ok": ok, **found})
    else:
        said = f"{found['rules']} bundles, {found['changes']:,} changes, {found['approvals']:,} of them approvals"
        say(f"signed, whole and unaltered: deployment {found['deployment']}, {said}")
        for name, what in (("audit_ok", "the audit trail"), ("ledger_ok", "the ledger")):
            say(f"  {what} {'was' if found[name] else 'was NOT'} as it was recorded when this was made")
    if not ok:
        raise typer.Exit(EXIT_NO)


def _document(path: Path) -> str:
    from licet_control_plane.store.audit_trail import FILE_KIND

    return document_in(path, kind=FILE_KIND, option="--head", made_by="licet audit head")


def _since(text: str | None) -> str | None:
    if text is None:
        return None
    if text[-1:] in "smhd" and "-" not in text:
        from datetime import UTC, datetime, timedelta

        at = datetime.now(UTC) - timedelta(seconds=seconds(text, "--since"))
        return at.isoformat().replace("+00:00", "Z")
    return instant(text, "--since")

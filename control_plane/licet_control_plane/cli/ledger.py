"""``licet ledger verify|checkpoint|rebuild|reconcile``."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from licet_control_plane.cli.arguments import ApiKeyOption, JsonOption, ServerOption, bad
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.failure import EXIT_NO, CliError
from licet_control_plane.cli.output import emit_json, note, say
from licet_control_plane.cli.progress import bar as _bar
from licet_control_plane.cli.progress import move as _move
from licet_control_plane.cli.signed_file import document_in, write

FINDINGS_SHOWN: Final = 20


def verify(
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option("--checkpoint", help="Hold the chains to the checkpoint in this file; may be repeated."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Do not open what is personal: chains, columns and sums only.")
    ] = False,
    database: Annotated[
        str | None,
        typer.Option("--database", help="Read this database instead of asking a server: a URL.", metavar="URL"),
    ] = None,
    ledger_key: Annotated[
        Path | None,
        typer.Option("--ledger-key", help="With --database: the file ledger-key, to open what is personal."),
    ] = None,
    public_key: Annotated[
        list[str] | None,
        typer.Option(
            "--public-key",
            help="Of whom signatures of checkpoints and exports count, ed25519:…; may be repeated.",
        ),
    ] = None,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Recompute every hash of the ledger, compare every row and sum, and list what is missing. Exits with 1 when
    something is not as it was recorded, and names the first event that is not.

    A checkpoint that was kept elsewhere shows even a ledger that was rewritten as a whole: `licet ledger checkpoint`.
    With --database an auditor needs nobody's word: a copy of the database, a checkpoint and the public key are enough.

    \b
    Examples:
      licet ledger verify --checkpoint monday.json
      licet ledger verify --database sqlite:///copy.db --public-key ed25519:… --checkpoint monday.json
    """
    documents = [_document(path) for path in checkpoint or ()]
    if database is None:
        if ledger_key is not None:
            raise bad("--ledger-key goes with --database: a server has its own.", "leave one of them out")
        result = _by_server(documents, public_key or [], quick, server, api_key)
    else:
        result = _by_hand(database, documents, public_key or [], None if quick else ledger_key)
    if as_json:
        emit_json(result)
    else:
        _show(result)
    if not result["ok"]:
        raise typer.Exit(EXIT_NO)


def checkpoint(
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write it to this file, to be kept where the server cannot reach."),
    ] = None,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Sign the heads of the ledger's chains as they are now.

    Whoever keeps the file can show later that nothing recorded up to now was changed: licet ledger verify
    --checkpoint FILE.

    \b
    Example:
      licet ledger checkpoint --output monday.json
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        result = control_plane.get("/v1/ledger/checkpoint")
    if out is not None:
        write(out, result)
    if as_json:
        emit_json(result)
        return
    heads = ", ".join(f"shard {head['shard']} block {head['block']} {head['hash'][:16]}" for head in result["heads"])
    say(f"checkpoint {result['number']} of {result['at']}, ledger generation {result['generation']}: {heads}")
    if out is not None:
        note(f"written to {out}; keep it where the server cannot reach")


def rebuild(
    from_archive: Annotated[
        Path,
        typer.Option("--from-archive", help="The directory that --archive-dir of the server named.", exists=True),
    ],
    state_dir: Annotated[
        Path | None,
        typer.Option("--state-dir", help="Of the stopped server: holds ledger-key. [default: licet-state]"),
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option("--database-url", help="Where to. [default: licet.db in the state directory]"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put the ledger back together from its archive, into an empty database or one restored from a backup.

    The server must be stopped. Interrupted, it goes on where it was. A ledger that holds anything that the archive does
    not is refused. Documents and licenses are not in the archive: push and create them again. Sidecars then send again
    what they still hold: the generation of the ledger is a new one.

    \b
    Example:
      licet ledger rebuild --from-archive /var/lib/licet-archive --state-dir /var/lib/licet
    """
    import time

    from sqlalchemy.exc import ArgumentError

    from licet_control_plane.archive.files import ArchiveDamaged, ArchiveUnavailable, deployment_of
    from licet_control_plane.archive.rebuilding import NotARebuild, Progress
    from licet_control_plane.archive.rebuilding import rebuild as steps_of
    from licet_control_plane.config import ConfigError, ServerConfig
    from licet_control_plane.state_dir import StartError, StateDir
    from licet_control_plane.store import meta
    from licet_control_plane.store.database import Database, DatabaseUnavailable

    now_us = time.time_ns() // 1_000
    last: Progress | None = None
    claimed: StateDir | None = None
    database: Database | None = None
    try:
        config = ServerConfig.of(state_dir=state_dir, database_url=database_url)
        claimed = StateDir.claim(config.state_dir)
        ledger_key = claimed.ledger_key(may_create=False)
        deployment = deployment_of(from_archive)
        if not deployment:
            raise CliError(f"{from_archive} holds no archive.", fix="name the directory of --archive-dir")
        database = Database(config.database)
        database.migrate()
        database.write_now(meta.ensure, deployment=deployment, now_us=now_us)
        if (other := database.read_now(meta.read).deployment) != deployment:
            raise CliError(
                f"the database is of deployment {other}, the archive of {deployment}.", fix="give an empty database"
            )
        note(f"rebuilding {config.database} from {from_archive}")
        with _bar("rebuilding", "bytes") as bar:
            for last in steps_of(database, from_archive, deployment, ledger_key, now_us=now_us):
                _move(bar, last.bytes_done, last.bytes_total)
        generation = database.read_now(meta.read).ledger_generation
    except (ConfigError, ArgumentError, ModuleNotFoundError) as error:
        raise bad(f"{error}.", "correct the flag or the environment variable") from error
    except StartError as error:
        raise CliError(str(error), fix=error.fix) from error
    except NotARebuild as error:
        raise CliError(f"{error}.", fix="give an empty database, or a backup of the one that was archived") from error
    except ArchiveDamaged as error:
        done = f" {last.events:,} events before it are in the ledger." if last else ""
        fix = "put a good copy of that file there, and run the command again"
        raise CliError(f"the archive is damaged: {error}.{done}", fix=fix) from error
    except (ArchiveUnavailable, DatabaseUnavailable) as error:
        raise CliError(f"{error}.", fix="look at the disk; then run the command again: it goes on") from error
    finally:
        if database is not None:
            database.close()
        if claimed is not None:
            claimed.close()
    result = {
        "deployment": deployment,
        "ledger_generation": generation,
        "blocks": last.blocks if last else 0,
        "events": last.events if last else 0,
    }
    if as_json:
        emit_json(result)
    elif last is None:
        say("the ledger holds everything that the archive does: nothing was changed")
    else:
        say(f"{last.events:,} events in {last.blocks:,} blocks; the ledger's generation is {generation}")
        note("now start the server, and run: licet ledger verify")


def reconcile(
    tenant: Annotated[
        str, typer.Option("--tenant", help="Only this tenant's quotas, and not the archive.", metavar="TENANT")
    ] = "",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Compare the ledger with quota registers in Redis, sidecars' logs and the archive. Exits with 1 when they differ.

    What is on its way is no difference: numbers that differ are looked at again, every few seconds, until they are
    equal, or stay as they are while nothing of theirs is unacknowledged. Changes nothing.

    \b
    Example:
      licet ledger reconcile --tenant acme
    """
    from licet_control_plane.cli.rest import ControlPlane

    result: dict[str, Any] | None = None
    with ControlPlane(server_target(server, api_key)) as control_plane:
        for line in control_plane.post_lines("/v1/ledger/reconcile", {"tenant": tenant}):
            step: dict[str, Any] = json.loads(line)
            if "error" in step:
                raise CliError(f"it could not be read: {step['error']}", fix="look at `licet status`; run it again")
            if "progress" in step and sys.stderr.isatty():
                note(f"{step['progress']['doing']}: {step['progress']['done']:,}")
            result = step.get("result", result)
    if result is None:
        raise CliError("the server ended before it was done.", fix="look at its log, and run the command again")
    if as_json:
        emit_json(result)
    else:
        _show_reconciled(result)
    if not result["ok"]:
        raise typer.Exit(EXIT_NO)


def _show_reconciled(result: dict[str, Any]) -> None:
    verdict = "in agreement" if result["ok"] else "NOT in agreement"
    say(f"{result['quotas']:,} quotas of {result['tenants']:,} tenants: {verdict}")
    for item in result["differences"][:FINDINGS_SHOWN]:
        say(
            f"  {item['tenant']} {item['quota']}, {(item['sidecar'] or 'no register')[:12]}: register"
            f" {item['register']:,}, ledger {item['ledger']:,}: {item['what']}"
        )
    if len(result["differences"]) > FINDINGS_SHOWN:
        say(f"  and {len(result['differences']) - FINDINGS_SHOWN:,} more; --json lists all")
    for item in result["logs"]:
        say(
            f"  log {item['log_id']}: last {item['last_seq']:,}, acknowledged {item['acked_seq']:,}, in the ledger"
            f" {item['watermark']:,}: {item['what']}"
        )
    for item in result["archive"] or ():
        say(f"  archive, shard {item['shard']} {item['log_id']}: {item['what']}")
    if result["archive"] is None:
        say("  no archive was compared")
    if result["in_flight"]:
        say(f"  on their way: {len(result['in_flight'])} numbers still change; run it again when it is quieter")
    if result["learning"]:
        say(f"  not looked at, because they learn or have no open quotas: {len(result['learning'])} tenants")


def _document(path: Path) -> str:
    from licet_control_plane.store.checkpoints import FILE_KIND

    return document_in(path, kind=FILE_KIND, option="--checkpoint", made_by="licet ledger checkpoint")


def _by_server(
    documents: list[str], public_keys: list[str], quick: bool, server: str | None, api_key: str | None
) -> dict[str, Any]:
    from licet_control_plane.cli.rest import ControlPlane

    body = {"checkpoints": documents, "public_keys": public_keys, "quick": quick}
    with ControlPlane(server_target(server, api_key)) as control_plane, _bar() as bar:
        for line in control_plane.post_lines("/v1/ledger/verify", body):
            step: dict[str, Any] = json.loads(line)
            if "progress" in step:
                _move(bar, step["progress"]["done"], step["progress"]["of"])
            elif "error" in step:
                raise CliError(f"the ledger could not be read: {step['error']}", fix="look at the server's log")
            else:
                result: dict[str, Any] = step["result"]
                return result
    raise CliError("the server ended before it was done.", fix="look at its log, and run the command again")


def _by_hand(url: str, documents: list[str], public_keys: list[str], ledger_key: Path | None) -> dict[str, Any]:
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    from licet.wire.signing import VerificationError, Verifier
    from licet_control_plane.state_dir import read_ledger_key
    from licet_control_plane.store.checkpoints import Checkpoint
    from licet_control_plane.store.verification import Verification
    from licet_control_plane.store.verification import verify as verify_database

    try:
        verifier = Verifier(public_keys) if public_keys else None
    except ValueError as error:
        raise bad(f"--public-key: {error}.", "give the text of public-key.txt") from error
    if documents and verifier is None:
        raise bad("--checkpoint with --database needs --public-key.", "give the text of public-key.txt")
    try:
        key = read_ledger_key(ledger_key) if ledger_key else None
    except (OSError, ValueError) as error:
        raise bad(f"--ledger-key {ledger_key}: {error}.", "name the file ledger-key of the state directory") from error
    try:
        given = [Checkpoint.of(base64.b64decode(text), verifier) for text in documents if verifier is not None]
    except VerificationError as error:
        raise CliError(f"--checkpoint: {error}.", fix="give the public key that it was signed with") from error
    try:
        with _bar() as bar:
            for step in verify_database(url, key, verifier, given=given):
                if isinstance(step, Verification):
                    return step.as_json()
                _move(bar, step.done, step.of)
    except (ArgumentError, ModuleNotFoundError) as error:
        raise bad(f"--database {url!r}: {error}.", "give sqlite:///path, or postgresql+psycopg://…") from error
    except SQLAlchemyError as error:
        fix = "give a ledger's database; a copy of SQLite's file must lie where it can be written"
        raise CliError(f"the database cannot be read: {getattr(error, 'orig', error)}", fix=fix) from error
    raise CliError("the verification ended early.", fix="run the command again")


def _show(result: dict[str, Any]) -> None:
    verdict = "consistent" if result["ok"] else "NOT consistent"
    say(f"{result['events']:,} events in {result['blocks']:,} blocks and {len(result['logs']):,} logs: {verdict}")
    for number, finding in enumerate(result["findings"][:FINDINGS_SHOWN]):
        say(f"  {'first: ' if number == 0 else ''}{_where(finding)}{finding['kind']}: {finding['what']}")
    if result["findings_total"] > FINDINGS_SHOWN:
        say(f"  and {result['findings_total'] - FINDINGS_SHOWN:,} more; --json lists up to 1,000")
    for gap in result["gaps"]:
        say(f"  gap: log {gap['log_id']}, {gap['from_seq']} to {gap['to_seq']}: {gap['why']}")
    for month, count in result["dropped"].items():
        say(f"  dropped: {month}, {count:,} events, as signed exports say")
    for gap in result["lost"]:
        say(f"  declared lost: log {gap['log_id']}, {gap['from_seq']} to {gap['to_seq']}: {gap['why']}")
    if result["conflicts"]:
        say(f"  conflicts: {result['conflicts']} events came again with other content")
    if not result["rollups_match"]:
        say("  sums do not match the events")
    if result["erased_events"]:
        say(f"  erased: what was personal in {result['erased_events']:,} events; they count as before")
    if not result["opened"]:
        say("  what is personal was not opened: without the ledger key a change there is not seen")
    if not result["checkpoints"]:
        say("  no checkpoint was compared: a ledger that was rewritten as a whole is not seen")


def _where(finding: dict[str, Any]) -> str:
    parts = []
    if finding["shard"] is not None:
        parts.append(f"shard {finding['shard']}")
    if finding["block"]:
        parts.append(f"block {finding['block']}")
    if finding["log_id"]:
        parts.append(f"log {finding['log_id']}" + (f" event {finding['seq']}" if finding["seq"] else ""))
    return ", ".join(parts) + (": " if parts else "")

"""``licet license import``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from licet_control_plane.cli.arguments import (
    ApiKeyOption,
    JsonOption,
    ServerOption,
    TimeoutOption,
    WaitOption,
    bad,
    seconds,
)
from licet_control_plane.cli.bundles import print_errors, read_sources, report_rollout
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.failure import EXIT_NO
from licet_control_plane.cli.output import emit_json, note, say
from licet_control_plane.cli.progress import bar, move

if TYPE_CHECKING:
    from licet_control_plane.cli.rest import ControlPlane
    from licet_control_plane.core.documents.licenses import WrittenLicense

BATCH: Final = 500
"""Licenses of one request: each is put in force, or refused, as a whole."""
_PATH: Final = "/v1/licenses/import"
_SIGNS: Final = {"created": "+", "changed": "~"}


def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A .csv or .yaml file, or a directory of YAML files.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and change nothing.")] = False,
    wait: WaitOption = False,
    timeout: TimeoutOption = "60s",
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Make licenses what a file says: a table as CSV, or YAML documents of kind License. Repeated it changes nothing.

    What is left out is as in a new license; but status and ends_at, which move by themselves, stay as they are. Grants
    stay, and so do licenses that are not named. Everything is checked before anything is changed.

    \b
    A table has these columns, in any order, of which tenant and plan are needed:
      tenant,plan,status,starts_at,ends_at,grace,renewal_period,auto_renew,addons,overrides
      acme,pro,,2027-01-01,2028-01-01,7d,year,true,extra-tokens=2,reports:month=500;llm:budget=50.00 USD
    \b
    Examples:
      licet license import customers.csv --dry-run
      licet license import licenses/ --wait
    """
    from licet_control_plane.cli.rest import ControlPlane, Problem
    from licet_control_plane.core.documents.licenses import read_licenses
    from licet_control_plane.core.documents.reading import SourceFile

    timeout_s = seconds(timeout, "--timeout")
    written, faults = read_licenses([SourceFile(name, text) for name, text in _sources(path)])
    if faults:
        _refuse([fault.as_json() for fault in faults], path, as_json)
    if not written:
        raise bad(f"{path}: no license in it.", "write a row for each, or documents of kind License")
    done: list[dict[str, Any]] = []
    rollout = None
    with ControlPlane(server_target(server, api_key)) as control_plane:
        doing = "checking against" if dry_run else "importing to"
        note(f"{doing} {control_plane.target.server}: {len(written)} license{'' if len(written) == 1 else 's'}")
        # A refusal in the last request must not leave the first ones changed.
        passes = [True] if dry_run else [False] if len(written) <= BATCH else [True, False]
        for dry in passes:
            try:
                done = list(_sent(control_plane, written, dry))
            except Problem as problem:
                if not any("tenant" in error for error in problem.errors):
                    raise  # not about licenses
                _refuse([_placed(error, written) for error in problem.errors], path, as_json)
        if wait and not dry_run:
            rollout = control_plane.wait_for_rollout(max(one["revision"] for one in done), timeout_s=timeout_s)
    counts = Counter(one["outcome"] for one in done)
    if as_json:
        totals = {outcome: counts[outcome] for outcome in ("created", "changed", "unchanged")}
        emit_json({"dry_run": dry_run, **totals, "items": done, **({"rollout": rollout} if wait else {})})
    else:
        for one in done:
            if one["outcome"] in _SIGNS:
                say(f"  {_SIGNS[one['outcome']]} {one['tenant']}")
        say(
            f"{counts['created']} created, {counts['changed']} changed, {counts['unchanged']} unchanged"
            f"{'; nothing was changed, as --dry-run asks' if dry_run else ''}."
        )
    if rollout is not None:
        report_rollout(rollout, timeout_s=timeout_s, quiet=as_json)


def _sources(path: Path) -> list[tuple[str, str]]:
    if path.suffix != ".csv":
        return read_sources(path)
    try:
        # As it is: a line break inside quotes is a part of its cell.
        return [(path.name, path.read_bytes().decode("utf-8-sig"))]
    except UnicodeDecodeError as error:
        raise bad(f"{path}: not UTF-8 at byte {error.start}.", "save the file as UTF-8") from error
    except OSError as error:
        raise bad(f"{path}: cannot be read: {error.strerror}.", "name the file that holds your licenses") from error


def _sent(control_plane: ControlPlane, written: list[WrittenLicense], dry_run: bool) -> Iterator[dict[str, Any]]:
    from licet_control_plane.cli.rest import Problem

    with bar("checking" if dry_run else "importing", "licenses") as shown:
        for first in range(0, len(written), BATCH):
            part = written[first : first + BATCH]
            body = {"licenses": [one.source.as_json() for one in part], "dry_run": dry_run}
            try:
                answer = control_plane.post(_PATH, body)
            except Problem as problem:
                for error in problem.errors:
                    error["first"] = first
                raise
            move(shown, first + len(part), len(written))
            for item in answer["items"]:
                # What a dry run would publish gets no revision.
                yield {name: value for name, value in item.items() if name != "revision" or not dry_run}


def _placed(error: dict[str, Any], written: list[WrittenLicense]) -> dict[str, Any]:
    """An error of the server, with where in the files it is."""
    _, place, *field = str(error["path"]).split(".")
    document = written[error["first"] + int(place)].document
    path = (field[0], ".".join(field[1:])) if field[1:] else tuple(field)
    line, column = document.root.position_of(path)
    described = f"{document.label}: {'.'.join(field)}"
    named = {name: value for name, value in error.items() if name != "first"}
    return {**named, "file": document.file, "line": line, "column": column, "path": described, "code": "invalid"}


def _refuse(errors: list[dict[str, Any]], path: Path, as_json: bool) -> None:
    if as_json:
        emit_json({"dry_run": False, "created": 0, "changed": 0, "unchanged": 0, "items": [], "errors": errors})
    else:
        print_errors(errors, path, so="no license is changed while one stands")
    raise typer.Exit(EXIT_NO)

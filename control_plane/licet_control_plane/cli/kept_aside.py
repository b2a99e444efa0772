"""``licet usage dead-letters …`` and ``licet usage conflicts …``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Final

import typer

from licet_control_plane.cli.arguments import ApiKeyOption, JsonOption, ServerOption
from licet_control_plane.cli.context import server_target
from licet_control_plane.cli.failure import EXIT_NO, EXIT_USAGE, CliError
from licet_control_plane.cli.output import emit_json, note, say, table

_PAGE: Final = 500
_LETTERS: Final = "/v1/usage/dead-letters"
_CONFLICTS: Final = "/v1/usage/conflicts"

NumberArgument = Annotated[int, typer.Argument(help="Its number, from the list.", metavar="NUMBER", min=1)]


def list_letters(
    settled: Annotated[bool, typer.Option("--settled", help="Also those that were recorded or dropped.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """List the batches of usage that could not be recorded, each with the reason.

    They are not in the ledger and not on any bill. Their sidecar keeps them in its log, and everything after them.

    \b
    Example:
      licet usage dead-letters list
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        items = list(_pages(control_plane, _LETTERS, settled="true" if settled else None))
    if as_json:
        emit_json({"items": items})
        return
    columns = ("number", "log", "events", "bytes", "times", "last_at", "outcome", "reason")
    table(
        columns,
        (
            [
                str(item["number"]), item["log_id"], _span(item), item["bytes"], item["times"], item["last_at"],
                item["outcome"], item["reason"],
            ]
            for item in items
        ),
        numeric=("bytes", "times"),
    )  # fmt: skip


def show_letter(
    number: NumberArgument,
    raw: Annotated[bool, typer.Option("--raw", help="With --json: also the bytes, base64.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Show a batch that could not be recorded, as far as it can be read.

    \b
    Example:
      licet usage dead-letters show 7 --json --raw
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        letter = control_plane.get(f"{_LETTERS}/{number}", raw="true" if raw else None)
    if as_json:
        emit_json(letter)
        return
    for name in ("reason", "log_id", "shard", "entry", "bytes", "digest", "times", "first_at", "last_at", "outcome"):
        say(f"{name:<9} {'-' if letter[name] is None else letter[name]}")
    say(f"{'events':<9} {_span(letter)}, {letter['events_total']} of them readable as a batch")
    for event in letter["events"]:
        say("  " + json.dumps(event, ensure_ascii=False, default=str))
    if letter["events_total"] > len(letter["events"]):
        say(f"  and {letter['events_total'] - len(letter['events'])} more")


def retry_letters(
    number: Annotated[int | None, typer.Argument(help="Its number, from the list.", metavar="NUMBER", min=1)] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every one that waits.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Record a batch now that was set aside, such as after an upgrade. Exits with 1 when one still cannot be.

    It takes the same way into the ledger as any other: what is recorded already does not count twice.

    \b
    Example:
      licet usage dead-letters retry --all
    """
    from licet_control_plane.cli.rest import ControlPlane, Problem

    if (number is None) == (not all_):
        raise CliError("nothing says which ones to retry.", fix="give one number, or --all", exit_code=EXIT_USAGE)
    done: list[dict[str, Any]] = []
    with ControlPlane(server_target(server, api_key)) as control_plane:
        numbers = [number] if number is not None else [item["number"] for item in _pages(control_plane, _LETTERS)]
        note(f"retrying {len(numbers)} dead letters on {control_plane.target.server}")
        for one in numbers:
            try:
                done.append(control_plane.post(f"{_LETTERS}/{one}/retry", {}))
            except Problem as error:
                if not all_:
                    raise
                done.append({"number": one, "outcome": "failed", "reason": str(error), "fix": error.fix})
    if as_json:
        emit_json({"items": done})
    else:
        columns = ("number", "outcome", "inserted", "duplicates", "conflicts", "reason")
        rows = ([str(item["number"]), *(item.get(name) for name in columns[1:])] for item in done)
        table(columns, rows, numeric=columns[2:5])
    if any(item["outcome"] == "failed" for item in done):
        raise typer.Exit(EXIT_NO)


def drop_letter(
    number: NumberArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Give up a batch that was set aside: its usage is never billed. The audit trail keeps its digest.

    \b
    Example:
      licet usage dead-letters show 7 --json --raw > letter-7.json && licet usage dead-letters drop 7 --yes
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        if not yes:
            letter = control_plane.get(f"{_LETTERS}/{number}")
            note(f"letter {number}: log {letter['log_id'] or '-'}, events {_span(letter)}, {letter['bytes']:,} bytes")
            note(f"  {letter['reason']}")
            if not typer.confirm("Drop it for good?", err=True):
                raise typer.Exit(EXIT_NO)
        dropped = control_plane.delete(f"{_LETTERS}/{number}")
    if as_json:
        emit_json(dropped)
    else:
        say(f"dead letter {number} dropped")


def list_conflicts(as_json: JsonOption = False, server: ServerOption = None, api_key: ApiKeyOption = None) -> None:
    """List events that came again under the same number with other content. The first one stands.

    \b
    Example:
      licet usage conflicts list
    """
    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        items = list(_pages(control_plane, _CONFLICTS))
    if as_json:
        emit_json({"items": items})
        return
    columns = ("log", "seq", "came_at", "tenant", "action", "effect", "units")
    rows = ([item["log_id"], str(item["seq"]), *(item[name] for name in columns[2:])] for item in items)
    table(columns, rows, numeric=("seq",))


def show_conflict(
    log_id: Annotated[str, typer.Argument(help="The log, SIDECAR:INCARNATION.", metavar="LOG")],
    seq: Annotated[int, typer.Argument(help="The event's number in it.", metavar="SEQ", min=1)],
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Show the event that is recorded under a number beside what came instead, and where they differ.

    \b
    Example:
      licet usage conflicts show 3f9c2a7be41d4f0c9a6be0f2d7c81e55:1 42
    """
    from urllib.parse import quote

    from licet_control_plane.cli.rest import ControlPlane

    with ControlPlane(server_target(server, api_key)) as control_plane:
        shown = control_plane.get(f"{_CONFLICTS}/{quote(log_id, safe='')}/{seq}")
    if as_json:
        emit_json(shown)
        return
    recorded = shown["recorded"]
    for item in shown["items"]:
        say(f"event {seq} of log {log_id}, came again {item['came_at']}")
        if recorded is None:
            say("  what was recorded is not in the ledger any more")
            continue
        rows = [[name, str(recorded.get(name)), str(item["event"].get(name))] for name in map(_shown, item["differs"])]
        table(("field", "recorded", "came"), rows)


def _pages(control_plane: Any, path: str, **query: Any) -> Iterator[dict[str, Any]]:
    after: Any = None
    while True:
        page = control_plane.get(path, limit=_PAGE, after=after, **query)
        yield from page["items"]
        after = page["next"]
        if after is None:
            return


def _span(item: dict[str, Any]) -> str:
    return f"{item['first_seq']} to {item['last_seq']}" if item["log_id"] else "-"


def _shown(field: str) -> str:
    return "at" if field == "at_us" else field

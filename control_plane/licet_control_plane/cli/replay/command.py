"""``licet replay``."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from licet_control_plane.cli.arguments import (
    ApiKeyOption,
    JsonOption,
    ServerOption,
    SidecarOption,
    bad,
    context_values,
    seconds,
)
from licet_control_plane.cli.context import server_target, sidecar_targets
from licet_control_plane.cli.failure import EXIT_NO, EXIT_USAGE, CliError
from licet_control_plane.cli.loops import run_on_fast_loop
from licet_control_plane.cli.output import emit_json, note, say, table

if TYPE_CHECKING:
    from licet_control_plane.cli.replay.load import Load
    from licet_control_plane.cli.replay.workload import Columns, Survey

_PROGRESS_S = 0.1
_CLOCKS_S = 600
"""The ledger is not asked about events before the replay began; how far the sidecars' clocks may be behind this one."""


def replay(
    file: Annotated[Path, typer.Argument(help="CSV with a header line.", metavar="FILE.csv")],
    tenant: Annotated[str, typer.Option("--tenant", help="The tenant that asks.")],
    action: Annotated[str, typer.Option("--action", help="What it asks.")],
    timestamp: Annotated[
        str | None, typer.Option("--timestamp", help="Column with the time; needed for a recorded --speed.")
    ] = None,
    quantity: Annotated[
        str | None, typer.Option("--quantity", help="Column with the units; COL+COL adds columns up.")
    ] = None,
    meter: Annotated[
        list[str] | None,
        typer.Option("--meter", help="For actions with several meters: METER=COL[+COL]; may be repeated."),
    ] = None,
    subject: Annotated[str | None, typer.Option("--subject", help="Column with the subject's id.")] = None,
    role: Annotated[list[str] | None, typer.Option("--role", help="A role of every subject; may be repeated.")] = None,
    context: Annotated[
        list[str] | None, typer.Option("--context", help="Attribute of every check, NAME=VALUE; may be repeated.")
    ] = None,
    speed: Annotated[str, typer.Option("--speed", help="max, or how many times the recorded speed.")] = "max",
    concurrency: Annotated[int, typer.Option("--concurrency", help="Calls in flight, over all.", min=1, max=4096)] = 16,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out rows that are no actions.")] = False,
    timeout: Annotated[str, typer.Option("--timeout", help="How long one check may take.")] = "5s",
    ledger_timeout: Annotated[
        str, typer.Option("--ledger-timeout", help="How long the ledger may stand still before it is given up.")
    ] = "30s",
    sidecar: SidecarOption = None,
    as_json: JsonOption = False,
    server: ServerOption = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Ask every row of a recorded workload, over all sidecars in turn, and compare the ledger with the answers.

    The whole file is checked before anything is sent. Exits with 0 only when every call was answered and the ledger
    holds exactly the answers, to the unit.

    \b
    Example:
      licet replay requests.csv --tenant acme --action llm.complete \\
        --timestamp TIMESTAMP --quantity ContextTokens+GeneratedTokens
    """
    from licet_control_plane.cli.replay.load import Load, Plan, key_prefix
    from licet_control_plane.cli.replay.reconcile import differences, wait_for_ledger
    from licet_control_plane.cli.replay.workload import good_rows
    from licet_control_plane.cli.rest import ControlPlane

    columns = _columns(timestamp, quantity, meter, subject)
    factor = _speed(speed, timestamp)
    stall_s_max = seconds(ledger_timeout, "--ledger-timeout")
    sidecars = sidecar_targets(sidecar)
    target = server_target(server, api_key)
    found = _surveyed(file, columns, skip_bad_rows=skip_bad_rows)
    plan = Plan(
        run=secrets.token_hex(6),
        tenant=tenant,
        action=action,
        meters=list(columns.meters),
        sidecars=sidecars,
        concurrency=concurrency,
        timeout_s=seconds(timeout, "--timeout"),
        speed=factor,
        first_at_ns=found.first_at_ns,
        context=context_values(context) or None,
        roles=role or (),
    )
    with ControlPlane(target) as control_plane:
        control_plane.get("/v1/status")  # a server that is not there is better known before the first check
        note(f"{found.rows:,} checks, {found.units:,} units, over {len(sidecars)} sidecars: {', '.join(sidecars)}")
        load = Load(plan, good_rows(file, columns))
        since_s = int(time.time()) - _CLOCKS_S
        _send(load, found.rows)
        answers = load.answers

        def tally() -> dict[str, Any]:
            result: dict[str, Any] = control_plane.get(
                "/v1/usage/tally",
                tenant=tenant,
                idempotency_prefix=key_prefix(plan.run),
                **{"from": since_s},
            )
            return result

        with ProgressBar("ledger", answers.answered) as bar:
            ledger = wait_for_ledger(tally, expected=answers.answered, stall_s_max=stall_s_max, progress=bar.show)
    disagreements = differences(answers, ledger)
    report = {
        "run": plan.run,
        "tenant": tenant,
        "action": action,
        "requests": load.started,
        "skipped_rows": found.bad_rows,
        "units_asked": found.units,
        **answers.as_json(),
        "late": load.late,
        "duration_s": round(load.duration_s, 3),
        "checks_per_s": round(load.started / load.duration_s, 1) if load.duration_s else 0.0,
        "ledger": ledger,
        "differences": disagreements,
        "agrees": not disagreements,
    }
    for message, count in list(answers.errors_by_message().items())[:5]:
        note(f"error, {count:,} times: {message}")
    if as_json:
        emit_json(report)
    else:
        _print_report(report)
    if disagreements:
        raise typer.Exit(EXIT_NO)


def _columns(timestamp: str | None, quantity: str | None, meter: list[str] | None, subject: str | None) -> Columns:
    from licet_control_plane.cli.replay.workload import Columns

    if bool(quantity) == bool(meter):
        raise bad("say where the units are, once.", "--quantity COLUMN, or --meter input=COLUMN --meter output=COLUMN")
    meters: dict[str, Sequence[str]] = {}
    for pair in meter or [f"={quantity}"]:
        name, equals, summed = pair.partition("=")
        names = [column.strip() for column in summed.split("+")]
        if not equals or not all(names) or (meter and not name):
            raise bad(f"{pair.lstrip('=')!r} does not name columns.", "--quantity COL+COL, or --meter input=COL+COL")
        meters[name] = names
    return Columns(meters=meters, timestamp=timestamp, subject=subject)


def _speed(text: str, timestamp: str | None) -> float:
    if text == "max":
        return 0.0
    try:
        factor = float(text.removesuffix("x"))
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise bad(f"--speed {text!r} is neither max nor a number above 0.", "--speed max, or --speed 10")
    if timestamp is None:
        raise bad("a recorded speed needs the time of each row.", "add --timestamp COLUMN, or use --speed max")
    return factor


def _surveyed(file: Path, columns: Columns, *, skip_bad_rows: bool) -> Survey:
    from licet_control_plane.cli.replay.workload import WorkloadError, survey

    try:
        found = survey(file, columns)
    except WorkloadError as error:
        raise CliError(str(error), fix="correct the file or the column names", exit_code=EXIT_USAGE) from error
    if found.bad_rows:
        more = found.bad_rows - len(found.problems)
        listed = "".join(f"\n  {problem}" for problem in found.problems) + (f"\n  and {more:,} more" if more else "")
        if not skip_bad_rows:
            raise bad(
                f"{file}: {found.bad_rows:,} of {found.rows + found.bad_rows:,} rows are no actions; nothing was sent:"
                f"{listed}",
                "correct them, or leave them out with --skip-bad-rows",
            )
        note(f"leaving out {found.bad_rows:,} rows:{listed}")
    if not found.rows:
        raise bad(f"{file}: no rows to replay.", "name a file with at least one row below its header")
    return found


def _send(load: Load, rows: int) -> None:
    import licet

    async def sending() -> None:
        with ProgressBar("checks", rows) as bar:

            async def watch() -> None:
                while True:
                    bar.show(load.answers.answered + load.answers.errors)
                    await asyncio.sleep(_PROGRESS_S)

            watcher = asyncio.create_task(watch())
            try:
                await load.run()
            finally:
                watcher.cancel()
                bar.show(load.answers.answered + load.answers.errors)

    try:
        run_on_fast_loop(sending())
    except licet.InvalidRequest as error:
        raise CliError(
            f"the sidecar finds the requests malformed: {error}",
            fix="look at --tenant, --action and --context, and whether the action has one meter or several",
            exit_code=EXIT_USAGE,
        ) from error
    except ValueError as error:  # an address
        raise bad(str(error), "--sidecar 127.0.0.1:7420") from error


class ProgressBar:
    """A bar on standard error, when that is a terminal."""

    def __init__(self, title: str, total: int) -> None:
        self.show: Callable[[int], None] = lambda done: None
        self._progress: Any = None
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn(f"{title:<6}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
        task = self._progress.add_task(title, total=total)

        def show(done: int) -> None:
            self._progress.update(task, completed=done)
            self._progress.refresh()

        self.show = show

    def __enter__(self) -> ProgressBar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()


def _print_report(report: dict[str, Any]) -> None:
    from licet.domain.money import format_nanos

    say(f"asked     {report['requests']:,} checks, {report['units_asked']:,} units, in {report['duration_s']:.2f} s")
    say(f"approved  {report['approved']:,} checks, {report['units_approved']:,} units")
    for reason, count in report["denied"].items():
        say(f"denied    {count:,} {reason}")
    for word in ("pending", "errors", "skipped_rows", "late", "stale", "degraded"):
        if report[word]:
            say(f"{word.replace('_', ' '):<9} {report[word]:,}")
    for currency, nanos in report["cost_nanos"].items():
        say(f"cost      {format_nanos(nanos)} {currency} (the sum of what answers said; invoices count units)")
    say()
    numeric = ("checks", "p50", "p90", "p99", "p99.9", "max")
    table(
        ("latency, µs", *numeric),
        (
            (one["address"], one["requests"], *(one["latency_us"][p] for p in ("p50", "p90", "p99", "p999", "max")))
            for one in report["sidecars"]
        ),
        numeric=numeric,
    )
    say()
    ledger = report["ledger"]
    say(f"ledger    {ledger['events']:,} events, {ledger['units_approved']:,} units approved")
    for difference in report["differences"]:
        say(f"  {difference}")
    say("the ledger agrees with the answers." if report["agrees"] else "the ledger does NOT agree with the answers.")

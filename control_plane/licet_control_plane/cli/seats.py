"""``licet seat``: acquire, renew and release a seat, as a service would."""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from licet.domain.ids import NAME_PATTERN
from licet_control_plane.cli.arguments import JsonOption, SidecarOption, bad, context_values
from licet_control_plane.cli.ask import client_of, decision_as_json, print_decision
from licet_control_plane.cli.context import sidecar_targets
from licet_control_plane.cli.failure import EXIT_NO
from licet_control_plane.cli.output import emit_json, note, say

if TYPE_CHECKING:
    import licet

_SEAT_ID: Final = re.compile(rf"{NAME_PATTERN.pattern}:[0-9a-f]{{32}}")

TenantArgument = Annotated[str, typer.Argument(help="The customer account.", metavar="TENANT")]
SeatArgument = Annotated[str, typer.Argument(help="What `licet seat acquire` answered.", metavar="SEAT")]
TimeoutOption = Annotated[str, typer.Option("--timeout", help="How long to wait for the answer.")]


def acquire(
    tenant: TenantArgument,
    action: Annotated[str, typer.Argument(help="An action whose feature has seats.", metavar="ACTION")],
    subject: Annotated[str, typer.Option("--subject", help="The holder: ID or TYPE:ID.")],
    role: Annotated[list[str] | None, typer.Option("--role", help="A role of the subject; may be repeated.")] = None,
    context: Annotated[
        list[str] | None,
        typer.Option("--context", help="Attribute, NAME=VALUE or NAME:TYPE=VALUE; may be repeated."),
    ] = None,
    idempotency_key: Annotated[str | None, typer.Option("--idempotency-key", help="Same key, same answer.")] = None,
    peek: Annotated[bool, typer.Option("--peek", help="Decide only: take and record nothing.")] = False,
    timeout: TimeoutOption = "3s",
    sidecar: SidecarOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a seat for a subject; it is kept while `licet seat renew` is run within the heartbeat.

    Exits with 0 when approved, with 1 when denied or pending.

    \b
    Example:
      licet seat acquire acme editor.open --subject user:ada
    """
    import licet

    target = sidecar_targets(sidecar)[0]
    type_, _, id_ = subject.rpartition(":")
    if not id_:
        raise bad(f"--subject {subject!r} has no id.", "--subject user:ada")
    attributes = context_values(context)
    with client_of(target, timeout) as client:
        seat = client.acquire_seat(
            tenant,
            action,
            subject=licet.Subject(id_, type=type_, roles=role or ()),
            context=attributes,
            idempotency_key=idempotency_key,
            peek=peek,
        )
    if as_json:
        emit_json(
            {
                "seat_id": seat.seat_id,
                "heartbeat_s": seat.heartbeat.total_seconds() if seat.heartbeat else None,
                "expires_at": _iso(seat.expires_at),
                "seats": seat.seats,
                "seats_taken": seat.taken,
                "decision": decision_as_json(seat.decision),
                "sidecar": target,
            }
        )
    else:
        print_decision(seat.decision)
        if seat.seats:
            say(f"  seats     {seat.taken:,} of {seat.seats:,} taken")
        if seat.seat_id:
            heartbeat = f", renew every {seat.heartbeat.total_seconds():g} s" if seat.heartbeat else ""
            say(f"  seat      {seat.seat_id}{heartbeat}")
    if not seat:
        raise typer.Exit(EXIT_NO)


def renew(
    tenant: TenantArgument,
    seat: SeatArgument,
    timeout: TimeoutOption = "3s",
    sidecar: SidecarOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep a seat, at any sidecar. Exits with 0 when it is held, with 1 when not."""
    _verify(seat)
    target = sidecar_targets(sidecar)[0]
    with client_of(target, timeout) as client:
        renewal = client.renew_seat(tenant, seat)
    answer: dict[str, Any] = {
        "state": renewal.state.name,
        "expires_at": _iso(renewal.expires_at),
        "degraded": renewal.degraded,
        "sidecar": target,
    }
    if as_json:
        emit_json(answer)
    else:
        until = f"  until {renewal.expires_at:%Y-%m-%d %H:%M:%S} UTC" if renewal.expires_at else ""
        say(f"{renewal.state.name}{'  degraded' if renewal.degraded else ''}{until}")
    if not renewal:
        _explain(renewal.state)
        raise typer.Exit(EXIT_NO)


def release(
    tenant: TenantArgument,
    seat: SeatArgument,
    timeout: TimeoutOption = "3s",
    sidecar: SidecarOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a seat back, at any sidecar. Exits with 0 when it is free, with 1 when it was lost before or never was."""
    import licet

    _verify(seat)
    target = sidecar_targets(sidecar)[0]
    with client_of(target, timeout) as client:
        state = client.release_seat(tenant, seat)
    if as_json:
        emit_json({"state": state.name, "sidecar": target})
    else:
        say(state.name)
    if state is not licet.SeatState.RELEASED:
        _explain(state)
        raise typer.Exit(EXIT_NO)


def _verify(seat: str) -> None:
    if not _SEAT_ID.fullmatch(seat):
        raise bad(f"{seat!r} is not the id of a seat.", "give what `licet seat acquire` printed behind `seat`")


def _explain(state: licet.SeatState) -> None:
    """Why a seat was not kept or given back, and what to do."""
    why = {
        "HELD": "it is still held: its sidecar has not heard yet that it is given back. Try again",
        "RELEASED": "it was given back before. Acquire one: `licet seat acquire`",
        "RECLAIMED": "its holder was silent for two heartbeats, or nobody could vouch for it any more; another may have"
        " it. Acquire one: `licet seat acquire`",
        "UNKNOWN": "nobody has it: it was never acquired, or its hold has ended. Look at the tenant, and acquire one:"
        " `licet seat acquire`",
    }
    note(f"{state.name}: {why[state.name]}")


def _iso(at: datetime | None) -> str | None:
    return at.isoformat() if at else None

"""``licet reservation``: hold units with a sidecar and settle them, as a service would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from licet_control_plane.cli.arguments import JsonOption, SidecarOption, bad, context_values, counts, seconds
from licet_control_plane.cli.ask import decision_as_json, print_decision
from licet_control_plane.cli.context import sidecar_targets
from licet_control_plane.cli.failure import EXIT_NO, EXIT_UNREACHABLE, EXIT_USAGE, CliError
from licet_control_plane.cli.output import emit_json, note, say

if TYPE_CHECKING:
    import licet

TenantArgument = Annotated[str, typer.Argument(help="The customer account.", metavar="TENANT")]
IdArgument = Annotated[str, typer.Argument(help="What `reservation make` printed.", metavar="ID")]
ExpiresOption = Annotated[
    str | None, typer.Option("--expires-after", help="1s to 7 days (168h); by default as long as the action says.")
]
QuantityOption = Annotated[int | None, typer.Option("--quantity", help="Units of the action's one meter.")]
MeterOption = Annotated[
    list[str] | None, typer.Option("--meter", help="Units of one meter, METER=UNITS; may be repeated.")
]


def make(
    tenant: TenantArgument,
    action: Annotated[str, typer.Argument(help="What is asked, such as llm.generate.", metavar="ACTION")],
    subject: Annotated[str, typer.Option("--subject", help="Who acts: ID or TYPE:ID.")] = "",
    role: Annotated[list[str] | None, typer.Option("--role", help="A role of the subject; may be repeated.")] = None,
    quantity: QuantityOption = None,
    meter: MeterOption = None,
    context: Annotated[
        list[str] | None,
        typer.Option("--context", help="Attribute, NAME=VALUE or NAME:TYPE=VALUE; may be repeated."),
    ] = None,
    expires_after: ExpiresOption = None,
    idempotency_key: Annotated[str | None, typer.Option("--idempotency-key", help="Same key, same answer.")] = None,
    sidecar: SidecarOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hold units for an action. Exits with 0 when approved, with 1 when denied or pending.

    \b
    Example:
      licet reservation make acme llm.generate --meter input=812 --meter output=4000 --expires-after 60s
    """
    import licet

    type_, _, id_ = subject.rpartition(":")
    with _client(sidecar) as client:
        held = client.reserve(
            tenant,
            action,
            subject=licet.Subject(id_, type=type_, roles=role or ()) if subject or role else None,
            quantity=quantity,
            quantities=counts(meter, "--meter") or None,
            context=context_values(context),
            expires_after=_seconds(expires_after),
            idempotency_key=idempotency_key,
        )
    expires_at = held.expires_at.isoformat() if held.expires_at else None
    if as_json:
        decision = decision_as_json(held.decision)
        emit_json({"reservation_id": held.id, "expires_at": expires_at, "decision": decision})
    else:
        print_decision(held.decision)
        if held.id:
            say(f"  held      {held.id} until {expires_at}")
    if not held:
        raise typer.Exit(EXIT_NO)


def commit(
    tenant: TenantArgument,
    reservation_id: IdArgument,
    quantity: QuantityOption = None,
    meter: MeterOption = None,
    sidecar: SidecarOption = None,
    as_json: JsonOption = False,
) -> None:
    """Use what was reserved, or so many units instead. Exits with 1 unless all of it was approved.

    \b
    Example:
      licet reservation commit acme 6c1e… --meter input=812 --meter output=1377
    """
    import licet

    with _client(sidecar) as client:
        settlement = client.commit_reservation(
            tenant, reservation_id, quantity=quantity, quantities=counts(meter, "--meter") or None
        )
    if as_json:
        emit_json(
            {
                "state": settlement.state.name,
                "committed": dict(settlement.committed),
                "unfunded": dict(settlement.unfunded),
                "decision": decision_as_json(settlement.decision) if settlement.decision else None,
            }
        )
    else:
        say(settlement.state.name)
        for word, units in (("committed", settlement.committed), ("unfunded", settlement.unfunded)):
            for feature, count in units.items():
                say(f"  {word:9} {count:,} of {feature}")
        if settlement.decision:
            print_decision(settlement.decision)
    _explain(settlement.state, licet.ReservationState.COMMITTED)
    if not settlement:
        raise typer.Exit(EXIT_NO)


def cancel(
    tenant: TenantArgument, reservation_id: IdArgument, sidecar: SidecarOption = None, as_json: JsonOption = False
) -> None:
    """Free what was reserved. Exits with 1 when it was not canceled.

    \b
    Example:
      licet reservation cancel acme 6c1e…
    """
    import licet

    with _client(sidecar) as client:
        state = client.cancel_reservation(tenant, reservation_id)
    _print_state(state, None, as_json, wanted=licet.ReservationState.CANCELED)


def extend(
    tenant: TenantArgument,
    reservation_id: IdArgument,
    expires_after: ExpiresOption = None,
    sidecar: SidecarOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hold a reservation for longer, counted from now. Exits with 1 when it is not held any more.

    \b
    Example:
      licet reservation extend acme 6c1e… --expires-after 10m
    """
    import licet

    with _client(sidecar) as client:
        extension = client.extend_reservation(tenant, reservation_id, _seconds(expires_after))
    expires_at = extension.expires_at.isoformat() if extension.expires_at else None
    _print_state(extension.state, expires_at, as_json, wanted=licet.ReservationState.HELD)


def _print_state(
    state: licet.ReservationState, expires_at: str | None, as_json: bool, *, wanted: licet.ReservationState
) -> None:
    if as_json:
        emit_json({"state": state.name, "expires_at": expires_at})
    else:
        say(f"{state.name} until {expires_at}" if expires_at else state.name)
    _explain(state, wanted)
    if state is not wanted:
        raise typer.Exit(EXIT_NO)


def _explain(state: licet.ReservationState, wanted: licet.ReservationState) -> None:
    """Why a reservation could not be settled as was wanted, and what to do."""
    if state is wanted:
        return
    why = {
        "HELD": "nothing was settled, it is still held: its sidecar could not record it. Try again",
        "COMMITTED": "it was committed before, and its units are spent. A new one has to be made for more",
        "CANCELED": "it was canceled before, and nothing of it was used. Make a new one for what was used meanwhile",
        "EXPIRED": "nobody settled it in time. Make a new one, with a longer --expires-after, or extend it in time",
        "UNKNOWN": "this sidecar does not know it: another one made it, or it was settled more than ten minutes ago."
        " Settle it with the sidecar that made it: --sidecar, or LICET_SIDECAR",
    }
    note(f"{state.name}: {why[state.name]}")


def _seconds(expires_after: str | None) -> float | None:
    return None if expires_after is None else seconds(expires_after, "--expires-after")


@contextmanager
def _client(sidecar: list[str] | None) -> Iterator[licet.Client]:
    """A client of the first sidecar, whose errors are those of the command line."""
    import licet

    try:
        with licet.Client(sidecar_targets(sidecar)[0], timeout=5.0) as client:
            yield client
    except licet.InvalidRequest as error:
        raise CliError(str(error), fix="correct the argument", exit_code=EXIT_USAGE) from error
    except (licet.SidecarUnavailable, licet.Timeout) as error:
        raise CliError(
            str(error),
            fix="name the sidecar that made the reservation with --sidecar or LICET_SIDECAR",
            exit_code=EXIT_UNREACHABLE,
        ) from error
    except licet.LicetError as error:
        raise CliError(str(error)) from error
    except ValueError as error:  # the address
        raise bad(str(error), "--sidecar 127.0.0.1:7420") from error

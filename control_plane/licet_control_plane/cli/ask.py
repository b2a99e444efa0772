"""``licet check``: ask a sidecar, as a service would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from licet_control_plane.cli.arguments import JsonOption, SidecarOption, bad, context_values, counts, seconds
from licet_control_plane.cli.context import sidecar_targets
from licet_control_plane.cli.failure import EXIT_NO, EXIT_UNREACHABLE, EXIT_USAGE, CliError
from licet_control_plane.cli.output import emit_json, say

if TYPE_CHECKING:
    import licet
    from licet.client.model import Decision


def check(
    tenant: Annotated[str, typer.Argument(help="The customer account.", metavar="TENANT")],
    action: Annotated[str, typer.Argument(help="What is asked, such as report.export.", metavar="ACTION")],
    subject: Annotated[str, typer.Option("--subject", help="Who acts: ID or TYPE:ID.")] = "",
    role: Annotated[list[str] | None, typer.Option("--role", help="A role of the subject; may be repeated.")] = None,
    quantity: Annotated[int | None, typer.Option("--quantity", help="Units of the action's one meter.")] = None,
    meter: Annotated[
        list[str] | None, typer.Option("--meter", help="Units of one meter, METER=UNITS; may be repeated.")
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option("--context", help="Attribute, NAME=VALUE or NAME:TYPE=VALUE; may be repeated."),
    ] = None,
    resource: Annotated[str, typer.Option("--resource", help="What it is done to: ID or TYPE:ID.")] = "",
    idempotency_key: Annotated[str | None, typer.Option("--idempotency-key", help="Same key, same answer.")] = None,
    peek: Annotated[bool, typer.Option("--peek", help="Decide only: take and record nothing.")] = False,
    timeout: Annotated[str, typer.Option("--timeout", help="How long to wait for the answer.")] = "1s",
    sidecar: SidecarOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a sidecar whether a tenant may do something. Approved units are taken, unless --peek.

    Exits with 0 when approved, with 1 when denied or pending.

    \b
    Examples:
      licet check acme report.view --subject ada --role analyst
      licet check acme llm.generate --meter input=812 --meter output=64 --context model=small
    """
    import licet

    target = sidecar_targets(sidecar)[0]
    quantities = counts(meter, "--meter") or None
    attributes = context_values(context)
    resource_type, _, resource_id = resource.rpartition(":")
    asks = subject_of(subject, role)
    with client_of(target, timeout) as client:
        decision = client.check(
            tenant,
            action,
            subject=asks,
            quantity=quantity,
            quantities=quantities,
            context=attributes,
            resource=licet.Resource(resource_id, type=resource_type) if resource else None,
            idempotency_key=idempotency_key,
            peek=peek,
        )
    if as_json:
        emit_json({**decision_as_json(decision), "sidecar": target})
    else:
        print_decision(decision)
    if not decision.approved:
        raise typer.Exit(EXIT_NO)


def subject_of(text: str, roles: Sequence[str] | None) -> licet.Subject | None:
    """The subject of ``--subject`` and ``--role``; ``None`` when neither was given.

    Raises:
        CliError: it has a type and no id.
    """
    import licet

    type_, colon, id_ = text.rpartition(":")
    if colon and not id_:
        raise bad(f"--subject {text!r} has no id.", "--subject user:ada")
    return licet.Subject(id_, type=type_, roles=roles or ()) if text or roles else None


@contextmanager
def client_of(target: str, timeout: str) -> Iterator[licet.Client]:
    """A client of one sidecar; what it raises becomes an error of the command line."""
    import licet

    try:
        with licet.Client(target, timeout=seconds(timeout, "--timeout")) as client:
            yield client
    except licet.InvalidRequest as error:
        name = error.field.removeprefix("check.").removeprefix("context.")
        fix = (
            f"name the type with the value: --context {name}:string=…, or int, double, bool"
            if "context." in error.field
            else "correct the argument"
        )
        raise CliError(str(error), fix=fix, exit_code=EXIT_USAGE) from error
    except (licet.SidecarUnavailable, licet.Timeout) as error:
        raise CliError(
            str(error),
            fix="start a stack with `licet dev`, or name a sidecar with --sidecar or LICET_SIDECAR",
            exit_code=EXIT_UNREACHABLE,
        ) from error
    except licet.LicetError as error:
        raise CliError(str(error)) from error
    except ValueError as error:  # the address
        raise bad(str(error), "--sidecar 127.0.0.1:7420") from error


def decision_as_json(decision: Decision) -> dict[str, Any]:
    """The decision with the names of the proto and the short forms of its enums."""
    return {
        "decision_id": decision.decision_id,
        "effect": decision.effect.name,
        "reason": decision.reason.name,
        "message": decision.message,
        "rule": decision.rule,
        "revision": decision.revision,
        "as_of": decision.as_of.isoformat() if decision.as_of else None,
        "stale": decision.stale,
        "degraded": decision.degraded,
        "quotas": [
            {
                "feature": quota.feature,
                "window": quota.window,
                "limit": quota.limit,
                "remaining": quota.remaining,
                "resets_at": quota.resets_at.isoformat() if quota.resets_at else None,
                "overage": quota.overage,
                "currency": quota.currency,
                "limit_key": quota.limit_key,
                "scope": list(quota.scope),
                "grant": quota.grant_id,
                "burst": quota.burst,
            }
            for quota in decision.quotas
        ],
        "cost": {"amount_nanos": decision.cost.amount_nanos, "currency": decision.cost.currency}
        if decision.cost
        else None,
        "retry_after_s": decision.retry_after.total_seconds() if decision.retry_after else None,
        "access_request_id": decision.access_request_id,
        "metadata": dict(decision.metadata),
    }


def print_decision(decision: Decision) -> None:
    """The decision for people."""
    from licet.domain.flags import VALUE_KEY, VARIANT_KEY

    marks = "".join(
        f"  {word}" for word, is_set in (("stale", decision.stale), ("degraded", decision.degraded)) if is_set
    )
    say(f"{decision.effect.name}  {decision.reason.name}{marks}")
    if decision.message:
        say(f"  {decision.message}")
    if decision.rule:
        say(f"  rule      {decision.rule}")
    for key, name in sorted(decision.metadata.items()):
        if key.startswith(VARIANT_KEY):
            flag = key.removeprefix(VARIANT_KEY)
            value = decision.metadata.get(f"{VALUE_KEY}{flag}")
            say(f"  variant   {flag}: {name}{'' if value is None else f' = {value}'}")
    for quota in decision.quotas:
        ends = "ends" if quota.grant_id else "resets"
        resets = f", {ends} {quota.resets_at:%Y-%m-%d %H:%M} UTC" if quota.resets_at else ""
        say(f"  quota     {quota}{resets}")
    if decision.cost:
        say(f"  cost      {decision.cost}")
    if decision.retry_after:
        say(f"  retry     in {decision.retry_after.total_seconds():g} s")
    if decision.access_request_id:
        say(f"  request   {decision.access_request_id}")
    as_of = f", as of {decision.as_of:%Y-%m-%d %H:%M:%S} UTC" if decision.as_of else ""
    say(f"  revision  {decision.revision}{as_of}")
    if decision.decision_id:
        say(f"  decision  {decision.decision_id}")

"""``licet explain`` and ``licet entitlements``: ask a sidecar why, and what a tenant may do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from licet_control_plane.cli.arguments import JsonOption, SidecarOption, context_values, counts
from licet_control_plane.cli.ask import client_of, decision_as_json, print_decision, subject_of
from licet_control_plane.cli.context import sidecar_targets
from licet_control_plane.cli.failure import EXIT_NO, CliError
from licet_control_plane.cli.output import emit_json, say

if TYPE_CHECKING:
    from licet.client.explanations import ExplainStep, LimitTrace

_MARKS = {"PASSED": "ok", "DECIDED": ">>", "NOT_REACHED": ".."}


def explain(
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
    timeout: Annotated[str, typer.Option("--timeout", help="How long to wait for the answer.")] = "2s",
    sidecar: SidecarOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show every step of the decision that a check would get, what was found, and why. Takes and records nothing.

    Steps are marked ok (nothing stands in the way), >> (this decided) or .. (not reached; shown all the same).
    Exits with 0 when the check would be approved, with 1 when not.

    \b
    Example:
      licet explain acme report.export --subject user:ada --role analyst --quantity 20000
    """
    import licet

    target = sidecar_targets(sidecar)[0]
    quantities, attributes = counts(meter, "--meter") or None, context_values(context)
    resource_type, _, resource_id = resource.rpartition(":")
    with client_of(target, timeout) as client:
        found = client.explain(
            tenant,
            action,
            subject=subject_of(subject, role),
            quantity=quantity,
            quantities=quantities,
            context=attributes,
            resource=licet.Resource(resource_id, type=resource_type) if resource else None,
        )
    if as_json:
        decision = {**decision_as_json(found.decision), "sidecar": target}
        emit_json({"decision": decision, "steps": [_step_as_json(step) for step in found.steps]})
    else:
        print_decision(found.decision)
        say()
        for step in found.steps:
            _print_step(step)
    if not found.decision.approved:
        raise typer.Exit(EXIT_NO)


def entitlements(
    tenant: Annotated[str, typer.Argument(help="The customer account.", metavar="TENANT")],
    subject: Annotated[str, typer.Option("--subject", help="Whose rollouts, roles and limits: ID or TYPE:ID.")] = "",
    role: Annotated[list[str] | None, typer.Option("--role", help="A role of the subject; may be repeated.")] = None,
    context: Annotated[
        list[str] | None,
        typer.Option("--context", help="Attribute, NAME=VALUE or NAME:TYPE=VALUE; may be repeated."),
    ] = None,
    timeout: Annotated[str, typer.Option("--timeout", help="How long to wait for the answer.")] = "2s",
    sidecar: SidecarOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a tenant's subject may do now, and what remains: what a page for customers shows.

    Takes and records nothing. Exits with 1 when the tenant has no license.

    \b
    Example:
      licet entitlements acme --subject user:ada --role analyst
    """
    target = sidecar_targets(sidecar)[0]
    attributes = context_values(context)
    with client_of(target, timeout) as client:
        found = client.list_entitlements(tenant, subject=subject_of(subject, role), context=attributes)
    if as_json:
        emit_json(
            {
                "tenant": tenant,
                "license": {
                    "plan": found.plan,
                    "status": found.status,
                    "in_force": found.in_force,
                    "starts_at": found.starts_at.isoformat() if found.starts_at else None,
                    "ends_at": found.ends_at.isoformat() if found.ends_at else None,
                    "addons": dict(found.addons),
                }
                if found.plan
                else None,
                "entitlements": [
                    {
                        "feature": one.feature,
                        "title": one.title,
                        "unit": one.unit,
                        "rolled_out": one.rolled_out,
                        "seats": one.seats,
                        "limits": [_limit_as_json(limit) for limit in one.limits],
                        "flags": [
                            {"flag": flag.flag, "variant": flag.variant, "value": flag.value} for flag in one.flags
                        ],
                    }
                    for one in found.entitlements
                ],
                "actions": [
                    {
                        "action": one.action,
                        "effect": one.effect.name,
                        "reason": one.reason.name,
                        "message": one.message,
                        "rule": one.rule,
                    }
                    for one in found.actions
                ],
                "actions_truncated": found.actions_truncated,
                "revision": found.revision,
                "as_of": found.as_of.isoformat() if found.as_of else None,
                "stale": found.stale,
                "degraded": found.degraded,
                "sidecar": target,
            }
        )
    if not found.plan:
        raise CliError(
            f"tenant {tenant} has no license, or it could not be read.",
            fix=f"look with `licet license get {tenant}`; give it one with `licet license create`",
        )
    if as_json:
        return
    addons = "".join(f" and {count} × {name}" for name, count in found.addons.items())
    ends = f", until {found.ends_at:%Y-%m-%d %H:%M} UTC" if found.ends_at else ""
    say(f"plan {found.plan}{addons}: {found.status}{'' if found.in_force else ', not in force'}{ends}")
    for one in found.entitlements:
        off = "" if one.rolled_out else "  (not rolled out)"
        seats = f"  {one.seats:,} seats" if one.seats else ""
        say(f"  {one.feature}{f' ({one.title})' if one.title else ''}{off}{seats}")
        for flag in one.flags:
            value = "" if flag.value is None else f" = {json.dumps(flag.value, ensure_ascii=False)}"
            say(f"    flag {flag.flag}: {flag.variant}{value}")
        for limit in one.limits:
            say(f"    {_limit_text(limit)}")
    say("actions")
    for action in found.actions:
        say(f"  {action.effect.name:<9} {action.action}" + (f"  {action.message}" if action.message else ""))
    if found.actions_truncated:
        say("  … and more")


def _print_step(step: ExplainStep) -> None:
    say(f"{_MARKS.get(step.outcome, step.outcome)}  {step.step:<12}{' '.join(step.found[:1])}".rstrip())
    for sentence in step.found[1:]:
        say(f"    {'':<12}{sentence}")
    for rule in step.rules:
        when = f" when {' '.join(rule.condition.split())}" if rule.condition else ""
        matched = {"MATCHED": "matches", "NOT_MATCHED": "does not match", "FAILED": f"failed: {rule.problem}"}
        shadow = " (shadow: only recorded)" if rule.shadow else ""
        say(f"    {'':<12}{rule.rule}: {rule.effect}{when}: {matched.get(rule.match, rule.match)}{shadow}")
    for limit in step.limits:
        say(f"    {'':<12}{_limit_text(limit)}")


def _limit_text(limit: LimitTrace) -> str:
    quota = limit.quota
    left = _amount(quota.remaining, limit.currency) if limit.known else "how much is not known yet"
    resets = f", resets {quota.resets_at:%Y-%m-%d %H:%M} UTC" if quota.resets_at else ""
    asks = f", asks {_amount(limit.asked, limit.currency)}" if limit.asked else ""
    return f"{limit.limit}: {left} of {_amount(quota.limit, limit.currency)} left{asks}{resets}"


def _amount(amount: int, currency: str) -> str:
    from licet.domain.money import format_budget

    return format_budget(amount, currency) if currency else f"{amount:,}"


def _step_as_json(step: ExplainStep) -> dict[str, Any]:
    return {
        "step": step.step,
        "outcome": step.outcome,
        "found": list(step.found),
        "rules": [
            {
                "rule": rule.rule,
                "effect": rule.effect,
                "condition": rule.condition,
                "match": rule.match,
                "problem": rule.problem,
                "shadow": rule.shadow,
            }
            for rule in step.rules
        ],
        "limits": [_limit_as_json(limit) for limit in step.limits],
    }


def _limit_as_json(limit: LimitTrace) -> dict[str, Any]:
    quota = limit.quota
    return {
        "limit": limit.limit,
        "window": quota.window,
        "amount": quota.limit,
        "currency": limit.currency,
        "asked": limit.asked,
        "remaining": quota.remaining if limit.known else None,
        "resets_at": quota.resets_at.isoformat() if quota.resets_at else None,
        "on_exceeded": limit.on_exceeded,
    }

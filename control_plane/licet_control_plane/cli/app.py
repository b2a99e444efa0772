"""The command tree. Each module below defines commands whose bodies import what they need when they run."""

from __future__ import annotations

from typing import Annotated, Final

import typer
import typer.main

from licet_control_plane.cli import (
    api_keys,
    ask,
    audit,
    bundles,
    explaining,
    fleet,
    grants,
    kept_aside,
    ledger,
    license_import,
    license_moves,
    licenses,
    months,
    overrides,
    policies,
    policy_tests,
    quotas,
    requests,
    reservations,
    run,
    schemas,
    seats,
    signing_keys,
    simulate,
    subjects,
    usage,
    webhooks,
)
from licet_control_plane.cli.dev import command as dev
from licet_control_plane.cli.failure import EXIT_CODES_HELP
from licet_control_plane.cli.replay import command as replay

app = typer.Typer(
    name="licet",
    help="Just-in-time license approval: may this tenant do this, now, at this cost?\n\nFirst hour:  licet dev",
    epilog=EXIT_CODES_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # examples keep their lines, and --help need not load Rich
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"licet {version('licet')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Options that come before a command."""


def _group(name: str, help_: str, *, within: typer.Typer = app) -> typer.Typer:
    group = typer.Typer(help=help_, no_args_is_help=True, epilog=EXIT_CODES_HELP, rich_markup_mode=None)
    within.add_typer(group, name=name)
    return group


app.command("dev", epilog=EXIT_CODES_HELP)(dev.dev)
app.command("server", epilog=EXIT_CODES_HELP)(run.server)
app.command("check", epilog=EXIT_CODES_HELP)(ask.check)
app.command("explain", epilog=EXIT_CODES_HELP)(explaining.explain)
app.command("entitlements", epilog=EXIT_CODES_HELP)(explaining.entitlements)
app.command("replay", epilog=EXIT_CODES_HELP)(replay.replay)
app.command("status", epilog=EXIT_CODES_HELP)(fleet.status)

_reservation = _group("reservation", "Units held with a sidecar for actions under way.")
_reservation.command("make", epilog=EXIT_CODES_HELP)(reservations.make)
_reservation.command("commit", epilog=EXIT_CODES_HELP)(reservations.commit)
_reservation.command("cancel", epilog=EXIT_CODES_HELP)(reservations.cancel)
_reservation.command("extend", epilog=EXIT_CODES_HELP)(reservations.extend)
_seat = _group("seat", "Seats of features that are sold by the number of their holders.")
_seat.command("acquire", epilog=EXIT_CODES_HELP)(seats.acquire)
_seat.command("renew", epilog=EXIT_CODES_HELP)(seats.renew)
_seat.command("release", epilog=EXIT_CODES_HELP)(seats.release)

_policy = _group("policy", "Plans, policies and the rest of the catalog, kept as files in a directory.")
_policy.command("validate", epilog=EXIT_CODES_HELP)(bundles.validate)
_policy.command("schema", epilog=EXIT_CODES_HELP)(schemas.schema)
_policy.command("test", epilog=EXIT_CODES_HELP)(policy_tests.run_tests)
_policy.command("push", epilog=EXIT_CODES_HELP)(bundles.push)
_policy.command("explain", epilog=EXIT_CODES_HELP)(explaining.explain)
_policy.command("diff", epilog=EXIT_CODES_HELP)(policies.diff)
_policy.command("simulate", epilog=EXIT_CODES_HELP)(simulate.simulate)
_policy.command("history", epilog=EXIT_CODES_HELP)(policies.history)
_policy.command("show", epilog=EXIT_CODES_HELP)(policies.show)
_policy.command("rollback", epilog=EXIT_CODES_HELP)(policies.rollback)
_policy.command("export", epilog=EXIT_CODES_HELP)(policies.export)

_license = _group("license", "What each tenant holds.")
_license.command("create", epilog=EXIT_CODES_HELP)(licenses.create)
_license.command("get", epilog=EXIT_CODES_HELP)(licenses.get)
_license.command("list", epilog=EXIT_CODES_HELP)(licenses.list_)
_license.command("put", epilog=EXIT_CODES_HELP)(licenses.put)
_license.command("update", epilog=EXIT_CODES_HELP)(licenses.update)
_license.command("import", epilog=EXIT_CODES_HELP)(license_import.import_)
_license.command("suspend", epilog=EXIT_CODES_HELP)(license_moves.suspend)
_license.command("resume", epilog=EXIT_CODES_HELP)(license_moves.resume)
_license.command("cancel", epilog=EXIT_CODES_HELP)(license_moves.cancel)
_license.command("renew", epilog=EXIT_CODES_HELP)(license_moves.renew)
_license.command("change-plan", epilog=EXIT_CODES_HELP)(license_moves.change_plan)

_webhook = _group("webhook", "Where events of licenses and quotas are sent.")
_webhook.command("create", epilog=EXIT_CODES_HELP)(webhooks.create)
_webhook.command("list", epilog=EXIT_CODES_HELP)(webhooks.list_)
_webhook.command("show", epilog=EXIT_CODES_HELP)(webhooks.show)
_webhook.command("delete", epilog=EXIT_CODES_HELP)(webhooks.delete)
_webhook.command("enable", epilog=EXIT_CODES_HELP)(webhooks.enable)
_webhook.command("rotate-secret", epilog=EXIT_CODES_HELP)(webhooks.rotate_secret)
_webhook.command("test", epilog=EXIT_CODES_HELP)(webhooks.send_test)
_webhook.command("deliveries", epilog=EXIT_CODES_HELP)(webhooks.deliveries)
_webhook.command("redeliver", epilog=EXIT_CODES_HELP)(webhooks.redeliver)

_grant = _group("grant", "Top-ups of one limit of a license, for a time.")
_grant.command("add", epilog=EXIT_CODES_HELP)(grants.add)
_grant.command("list", epilog=EXIT_CODES_HELP)(grants.list_)
_grant.command("revoke", epilog=EXIT_CODES_HELP)(grants.revoke)

_request = _group("request", "What people are asked to approve.")
_request.command("list", epilog=EXIT_CODES_HELP)(requests.list_)
_request.command("show", epilog=EXIT_CODES_HELP)(requests.show)
_request.command("approve", epilog=EXIT_CODES_HELP)(requests.approve)
_request.command("deny", epilog=EXIT_CODES_HELP)(requests.deny)
_request.command("revoke", epilog=EXIT_CODES_HELP)(requests.revoke)

_override = _group("override", "Break glass: actions allowed or denied for a while, whatever documents say.")
_override.command("set", epilog=EXIT_CODES_HELP)(overrides.set_)
_override.command("list", epilog=EXIT_CODES_HELP)(overrides.list_)
_override.command("clear", epilog=EXIT_CODES_HELP)(overrides.clear)

_quota = _group("quota", "What is counted against limits, and who holds it.")
_quota.command("show", epilog=EXIT_CODES_HELP)(quotas.show)
_quota.command("reclaim", epilog=EXIT_CODES_HELP)(quotas.reclaim)

_usage = _group("usage", "What was used, and what it costs.")
_usage.command("summary", epilog=EXIT_CODES_HELP)(usage.summary)
_usage.command("top", epilog=EXIT_CODES_HELP)(usage.top)
_usage.command("denied", epilog=EXIT_CODES_HELP)(usage.denied)
_usage.command("tail", epilog=EXIT_CODES_HELP)(usage.tail)
_usage.command("export", epilog=EXIT_CODES_HELP)(usage.export)
_usage.command("invoice", epilog=EXIT_CODES_HELP)(usage.invoice)
_dead_letters = _group("dead-letters", "Batches of usage that could not be recorded.", within=_usage)
_dead_letters.command("list", epilog=EXIT_CODES_HELP)(kept_aside.list_letters)
_dead_letters.command("show", epilog=EXIT_CODES_HELP)(kept_aside.show_letter)
_dead_letters.command("retry", epilog=EXIT_CODES_HELP)(kept_aside.retry_letters)
_dead_letters.command("drop", epilog=EXIT_CODES_HELP)(kept_aside.drop_letter)
_conflicts = _group("conflicts", "Events that came again with other content.", within=_usage)
_conflicts.command("list", epilog=EXIT_CODES_HELP)(kept_aside.list_conflicts)
_conflicts.command("show", epilog=EXIT_CODES_HELP)(kept_aside.show_conflict)

_subject = typer.Typer(
    help="What the ledger holds about somebody.", no_args_is_help=True, epilog=EXIT_CODES_HELP, rich_markup_mode=None
)
_usage.add_typer(_subject, name="subject")
_subject.command("export", epilog=EXIT_CODES_HELP)(subjects.export)
_subject.command("erase", epilog=EXIT_CODES_HELP)(subjects.erase)

_ledger = _group("ledger", "The system of record of every decision.")
_ledger.command("verify", epilog=EXIT_CODES_HELP)(ledger.verify)
_ledger.command("checkpoint", epilog=EXIT_CODES_HELP)(ledger.checkpoint)
_ledger.command("rebuild", epilog=EXIT_CODES_HELP)(ledger.rebuild)
_ledger.command("reconcile", epilog=EXIT_CODES_HELP)(ledger.reconcile)
_ledger.command("months", epilog=EXIT_CODES_HELP)(months.months)
_ledger.command("export", epilog=EXIT_CODES_HELP)(months.export)
_ledger.command("check-export", epilog=EXIT_CODES_HELP)(months.check_export)
_ledger.command("drop", epilog=EXIT_CODES_HELP)(months.drop)
_ledger.command("restored", epilog=EXIT_CODES_HELP)(months.restored)

_sidecar = _group("sidecar", "The sidecars that are connected.")
_sidecar.command("list", epilog=EXIT_CODES_HELP)(fleet.list_)

_api_key = _group("api-key", "Who may use the API.")
_api_key.command("create", epilog=EXIT_CODES_HELP)(api_keys.create)
_api_key.command("list", epilog=EXIT_CODES_HELP)(api_keys.list_)
_api_key.command("revoke", epilog=EXIT_CODES_HELP)(api_keys.revoke)

_audit = _group("audit", "Who changed what, and that nobody changed the record of it.")
_audit.command("log", epilog=EXIT_CODES_HELP)(audit.log)
_audit.command("verify", epilog=EXIT_CODES_HELP)(audit.verify)
_audit.command("head", epilog=EXIT_CODES_HELP)(audit.head)
_audit.command("evidence", epilog=EXIT_CODES_HELP)(audit.evidence)

_signing_key = _group("signing-key", "The key that everything published is signed with.")
_signing_key.command("generate", epilog=EXIT_CODES_HELP)(signing_keys.generate)
_signing_key.command("rotate", epilog=EXIT_CODES_HELP)(signing_keys.rotate)
_signing_key.command("retire", epilog=EXIT_CODES_HELP)(signing_keys.retire)
_signing_key.command("list", epilog=EXIT_CODES_HELP)(signing_keys.list_)

command: Final = typer.main.get_command(app)
"""The finished tree. Calling ``app`` would build it anew each time."""

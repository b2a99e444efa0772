"""``licet server``: the control plane in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from licet_control_plane.cli.failure import EXIT_USAGE, CliError
from licet_control_plane.cli.loops import run_on_fast_loop


def server(
    listen: Annotated[
        str | None, typer.Option("--listen", help="REST API, host:port. [default: 127.0.0.1:7430]")
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option("--state-dir", help="Database, signing key and admin key. [default: licet-state]")
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(
            "--database-url",
            help="Another SQLite file, or PostgreSQL: postgresql+psycopg://user@host/licet."
            " [default: licet.db in the state directory]",
        ),
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option("--redis-url", help="Redis or Valkey. [default: redis://127.0.0.1:6379/0]")
    ] = None,
    redis_prefix: Annotated[
        str | None, typer.Option("--redis-prefix", help="First part of every Redis name. [default: licet]")
    ] = None,
    staleness_max: Annotated[
        str | None,
        typer.Option(
            "--staleness-max",
            help="A sidecar silent for longer is not waited for. [default: 300s, as the sidecars have]",
        ),
    ] = None,
    reclaim_after: Annotated[
        str | None,
        typer.Option(
            "--reclaim-after", help="Take back the units of sidecars silent for so long, at least 5m. [default: off]"
        ),
    ] = None,
    checkpoint_every: Annotated[
        str | None,
        typer.Option(
            "--checkpoint-every", help="How often the ledger's heads are signed, if they moved. [default: 60s]"
        ),
    ] = None,
    api_rate: Annotated[
        str | None,
        typer.Option("--api-rate", help="Requests a second that one API key may make, or 'off'. [default: 200]"),
    ] = None,
    expiring_notice: Annotated[
        str | None,
        typer.Option("--expiring-notice", help="How long before its end a term is announced. [default: 336h]"),
    ] = None,
    webhooks_private: Annotated[
        bool | None, typer.Option("--webhooks-private", help="Webhooks may be within this network.")
    ] = None,
    archive_dir: Annotated[
        Path | None,
        typer.Option(
            "--archive-dir", help="Also write usage to files here, before it is acknowledged. [default: none]"
        ),
    ] = None,
    events_url: Annotated[
        str | None,
        typer.Option("--events-url", help="POST every usage event here, as CloudEvents. [default: nowhere]"),
    ] = None,
    events_secret_file: Annotated[
        Path | None,
        typer.Option("--events-secret-file", help="File with the secret that signs them: whsec_… or any text."),
    ] = None,
    events_personal: Annotated[
        bool | None,
        typer.Option("--events-personal", help="With subjects, resources and context. [default: without]"),
    ] = None,
    approver_groups: Annotated[
        str | None,
        typer.Option("--approver-groups", help="Who is in groups of approval chains: 'finance=ana,ben;legal=cora'."),
    ] = None,
    trusted_proxies: Annotated[
        str | None,
        typer.Option(
            "--trusted-proxies",
            help="Addresses and networks, with commas, whose X-Forwarded-For is believed. [default: none]",
        ),
    ] = None,
    oidc_issuer: Annotated[
        str | None, typer.Option("--oidc-issuer", help="Whose tokens are admitted, https://…. [default: nobody's]")
    ] = None,
    oidc_audience: Annotated[str | None, typer.Option("--oidc-audience", help="For whom they must be.")] = None,
    oidc_roles: Annotated[
        str | None, typer.Option("--oidc-roles", help="GROUP=ROLE, with commas; the first that fits wins.")
    ] = None,
    oidc_role_claim: Annotated[
        str | None, typer.Option("--oidc-role-claim", help="Where the groups are, a.b for b in a. [default: groups]")
    ] = None,
    oidc_tenant_claim: Annotated[
        str | None,
        typer.Option("--oidc-tenant-claim", help="Where the only tenant is that a token reaches. [default: none]"),
    ] = None,
    oidc_name_claim: Annotated[
        str | None, typer.Option("--oidc-name-claim", help="What the audit trail calls them. [default: sub]")
    ] = None,
    oidc_jwks_url: Annotated[
        str | None, typer.Option("--oidc-jwks-url", help="The issuer's keys, if it has no discovery document.")
    ] = None,
    log_level: Annotated[
        str | None, typer.Option("--log-level", help="debug, info, warning or error. [default: info]")
    ] = None,
    new_generation: Annotated[
        bool,
        typer.Option("--new-generation", help="For the first start after the database was restored from a backup."),
    ] = False,
) -> None:
    """Run the control plane: the REST API, the publisher and the drain. SIGTERM stops it.

    The first start makes the administrator's key (admin-key) and the key that sidecars verify documents with
    (public-key.txt) in the state directory. Each flag can also be an environment variable: --redis-url is
    LICET_REDIS_URL, and so on, but --listen is LICET_SERVER_LISTEN.

    \b
    Example:
      licet server --state-dir /var/lib/licet --redis-url redis://127.0.0.1:6379/0
    """
    from licet_control_plane.bootstrap import run_server
    from licet_control_plane.config import ConfigError, ServerConfig
    from licet_control_plane.state_dir import StartError

    try:
        config = ServerConfig.of(
            listen=listen,
            state_dir=state_dir,
            database_url=database_url,
            redis_url=redis_url,
            redis_prefix=redis_prefix,
            staleness_max=staleness_max,
            reclaim_after=reclaim_after,
            checkpoint_every=checkpoint_every,
            api_rate=api_rate,
            expiring_notice=expiring_notice,
            webhooks_private=webhooks_private,
            archive_dir=archive_dir,
            events_url=events_url,
            events_secret_file=events_secret_file,
            events_personal=events_personal,
            approver_groups=approver_groups,
            trusted_proxies=trusted_proxies,
            oidc_issuer=oidc_issuer,
            oidc_audience=oidc_audience,
            oidc_roles=oidc_roles,
            oidc_role_claim=oidc_role_claim,
            oidc_tenant_claim=oidc_tenant_claim,
            oidc_name_claim=oidc_name_claim,
            oidc_jwks_url=oidc_jwks_url,
            log_level=log_level,
            new_generation=new_generation,
        )
    except ConfigError as error:
        raise CliError(str(error), fix="correct the flag or the environment variable", exit_code=EXIT_USAGE) from error
    try:
        run_on_fast_loop(run_server(config))
    except StartError as error:
        raise CliError(str(error), fix=error.fix) from error

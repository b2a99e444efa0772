"""The control plane's configuration: flags first, then ``LICET_…`` variables, then defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final, Self

from licet_control_plane.core.access import ROLES_OF_PEOPLE, Role
from licet_control_plane.core.claims import ClaimRules
from licet_control_plane.core.cloud_events import secret_of
from licet_control_plane.oidc import IssuerConfig, is_safe

DEFAULT_LISTEN: Final = "127.0.0.1:7430"
DEFAULT_REDIS_URL: Final = "redis://127.0.0.1:6379/0"
OFF: Final = "off"
RECLAIM_AFTER_S_MIN: Final = 300.0
"""Longer than a restart, a drained node, or a partition that heals by itself usually takes."""
LOG_LEVELS: Final = ("debug", "info", "warning", "error")


class ConfigError(ValueError):
    """A setting cannot be used. The message names it and says what it should be."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything that can be set. ``database_url`` empty means SQLite in the state directory.

    ``checkpoint_every_s``: how often the heads of the ledger's chains are signed, if anything was recorded since.
    ``reclaim_after_s``: the units of a sidecar silent for so long are reclaimed; 0 for never.
    ``api_rate``: requests a second that the REST API takes from one key; 0 for any number.
    ``expiring_notice_s``: how long before the end of a license's term it is announced.
    ``webhooks_private``: webhooks may be within this network, which whoever may make one can then probe.
    ``events_url``: where usage events are posted to, signed with ``events_secret``; empty for nowhere.
    ``events_personal``: with what is personal in them.
    ``archive_dir``: where usage is archived before it is acknowledged; ``None`` for nowhere.
    ``approver_groups``: names of API keys by the group that approval chains know them by.
    ``trusted_proxies``: whose ``X-Forwarded-For`` is believed, addresses and networks.
    ``oidc``: whose tokens are admitted beside API keys; ``None`` for nobody's.
    ``new_generation`` is for one start after the database was restored from a backup that Redis is ahead of.
    """

    host: str = "127.0.0.1"
    port: int = 7430
    state_dir: Path = Path("licet-state")
    database_url: str = ""
    redis_url: str = DEFAULT_REDIS_URL
    redis_prefix: str = "licet"
    staleness_max_s: float = 300.0
    reclaim_after_s: float = 0.0
    checkpoint_every_s: float = 60.0
    api_rate: float = 200.0
    expiring_notice_s: int = 14 * 86_400
    webhooks_private: bool = False
    log_level: str = "info"
    new_generation: bool = False
    archive_dir: Path | None = None
    events_url: str = ""
    events_secret: bytes = field(default=b"", repr=False)
    events_personal: bool = False
    approver_groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    trusted_proxies: tuple[str, ...] = ()
    oidc: IssuerConfig | None = None

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ, **flags: Any) -> Self:
        """From flags (``listen`` as ``host:port``; ``None`` is not given) and variables.

        Raises:
            ConfigError: a value is not of its form.
        """

        def value(flag: str, variable: str, default: Any) -> Any:
            given = flags.get(flag)
            return given if given is not None else environ.get(variable) or default

        host, port = parse_listen(str(value("listen", "LICET_SERVER_LISTEN", DEFAULT_LISTEN)))
        log_level = str(value("log_level", "LICET_LOG_LEVEL", "info")).lower()
        if log_level not in LOG_LEVELS:
            raise ConfigError(f"log level {log_level!r}: give one of {', '.join(LOG_LEVELS)}")
        redis_url = str(value("redis_url", "LICET_REDIS_URL", DEFAULT_REDIS_URL))
        if not redis_url.startswith(("redis://", "rediss://", "unix://")):
            raise ConfigError("LICET_REDIS_URL does not start with redis://, rediss:// or unix://")
        prefix = str(value("redis_prefix", "LICET_REDIS_PREFIX", "licet"))
        if not prefix or not all(character.isalnum() or character in "._-" for character in prefix):
            raise ConfigError(f"redis prefix {prefix!r}: use letters, digits, dots, dashes and underscores")
        events_url = str(value("events_url", "LICET_EVENTS_URL", ""))
        events_secret = _events_secret(events_url, str(value("events_secret_file", "LICET_EVENTS_SECRET_FILE", "")))
        return cls(
            host=host,
            port=port,
            state_dir=Path(value("state_dir", "LICET_STATE_DIR", "licet-state")),
            database_url=str(value("database_url", "LICET_DATABASE_URL", "")),
            redis_url=redis_url,
            redis_prefix=prefix,
            staleness_max_s=parse_seconds(str(value("staleness_max", "LICET_STALENESS_MAX", "300s"))),
            reclaim_after_s=parse_reclaim_after(str(value("reclaim_after", "LICET_RECLAIM_AFTER", OFF))),
            checkpoint_every_s=parse_seconds(str(value("checkpoint_every", "LICET_CHECKPOINT_EVERY", "60s"))),
            api_rate=parse_rate(str(value("api_rate", "LICET_API_RATE", "200"))),
            expiring_notice_s=int(parse_seconds(str(value("expiring_notice", "LICET_EXPIRING_NOTICE", "336h")))),
            webhooks_private=str(value("webhooks_private", "LICET_WEBHOOKS_PRIVATE", "")).lower()
            in ("1", "true", "yes"),
            log_level=log_level,
            new_generation=bool(flags.get("new_generation")),
            events_url=events_url,
            events_secret=events_secret,
            events_personal=str(value("events_personal", "LICET_EVENTS_PERSONAL", "")).lower() in ("1", "true", "yes"),
            approver_groups=parse_groups(str(value("approver_groups", "LICET_APPROVER_GROUPS", ""))),
            trusted_proxies=_networks(str(value("trusted_proxies", "LICET_TRUSTED_PROXIES", ""))),
            oidc=_issuer(
                issuer=str(value("oidc_issuer", "LICET_OIDC_ISSUER", "")),
                audience=str(value("oidc_audience", "LICET_OIDC_AUDIENCE", "")),
                roles=str(value("oidc_roles", "LICET_OIDC_ROLES", "")),
                role_claim=str(value("oidc_role_claim", "LICET_OIDC_ROLE_CLAIM", "groups")),
                tenant_claim=str(value("oidc_tenant_claim", "LICET_OIDC_TENANT_CLAIM", "")),
                name_claim=str(value("oidc_name_claim", "LICET_OIDC_NAME_CLAIM", "sub")),
                jwks_url=str(value("oidc_jwks_url", "LICET_OIDC_JWKS_URL", "")),
            ),
            archive_dir=Path(archive) if (archive := str(value("archive_dir", "LICET_ARCHIVE_DIR", ""))) else None,
        )

    @property
    def database(self) -> str:
        """The database's URL, the default worked out."""
        return self.database_url or f"sqlite:///{self.state_dir / 'licet.db'}"


def _issuer(
    *, issuer: str, audience: str, roles: str, role_claim: str, tenant_claim: str, name_claim: str, jwks_url: str
) -> IssuerConfig | None:
    if not issuer:
        if audience or roles or jwks_url:
            raise ConfigError("OIDC settings without an issuer: set LICET_OIDC_ISSUER")
        return None
    for url in (issuer, jwks_url or issuer):
        if not is_safe(url):
            raise ConfigError(f"OIDC URL {url!r}: give one that begins with https://, or with http:// on this machine")
    if not audience:
        raise ConfigError("OIDC issuer without an audience: set LICET_OIDC_AUDIENCE, else tokens for others would do")
    mapped: list[tuple[str, Role]] = []
    for pair in filter(None, (one.strip() for one in roles.split(","))):
        group, equals, name = pair.rpartition("=")
        known = {role.value: role for role in ROLES_OF_PEOPLE}
        if not equals or not group or name not in known:
            raise ConfigError(f"OIDC roles {pair!r}: give GROUP=ROLE, with one of {', '.join(known)}")
        mapped.append((group, known[name]))
    if not mapped:
        raise ConfigError("OIDC issuer without roles: set LICET_OIDC_ROLES, such as licet-admins=admin")
    return IssuerConfig(issuer, audience, ClaimRules(tuple(mapped), role_claim, tenant_claim, name_claim), jwks_url)


def _networks(text: str) -> tuple[str, ...]:
    found = [one.strip() for one in text.split(",") if one.strip()]
    for one in found:
        try:
            ip_network(one)
        except ValueError as error:
            raise ConfigError(f"trusted proxies {one!r}: give addresses or networks, such as 10.0.0.0/8") from error
    return tuple(found)


def _events_secret(url: str, path: str) -> bytes:
    if not url and not path:
        return b""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"events URL {url!r}: give one that begins with https:// or http://")
    if not path:
        raise ConfigError("events URL without a secret: name a file with one in LICET_EVENTS_SECRET_FILE")
    try:
        return secret_of(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"events secret file {path!r}: {error}") from error


def parse_listen(text: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[v6]:port``.

    Raises:
        ConfigError: not of that form.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65_535 or not host:
        raise ConfigError(f"listen address {text!r}: give host:port, such as {DEFAULT_LISTEN}")
    return host.strip("[]"), int(port)


def parse_seconds(text: str) -> float:
    """Seconds of ``60``, ``60s``, ``500ms``, ``2m`` or ``1h``.

    Raises:
        ConfigError: not of that form, or not positive.
    """
    for unit, seconds in (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3_600.0), ("", 1.0)):
        if text.endswith(unit):
            try:
                parsed = float(text[: len(text) - len(unit)]) * seconds
            except ValueError:
                break
            if 0 < parsed < float("inf"):
                return parsed
            break
    raise ConfigError(f"duration {text!r}: give a positive number with a unit, such as 60s, 500ms or 2m")


def parse_groups(text: str) -> dict[str, tuple[str, ...]]:
    """Members by group of ``finance=ana,ben;legal=cora``.

    Raises:
        ConfigError: not of that form.
    """
    groups: dict[str, tuple[str, ...]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        group, equals, members = part.partition("=")
        names = tuple(name.strip() for name in members.split(",") if name.strip())
        if not equals or not group.strip() or not names:
            raise ConfigError(f"approver groups {part!r}: give group=name,name and ';' between groups")
        groups[group.strip()] = names
    return groups


def parse_rate(text: str) -> float:
    """Requests a second; 0 for ``off``.

    Raises:
        ConfigError: neither ``off`` nor a number of 1 or more.
    """
    if text.strip().lower() == OFF:
        return 0.0
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 1 <= rate < float("inf"):
        raise ConfigError(f"API rate {text!r}: give 'off', or requests a second, 1 or more")
    return rate


def parse_reclaim_after(text: str) -> float:
    """Seconds of silence after which a sidecar is reclaimed; 0 for ``off``.

    Raises:
        ConfigError: neither ``off`` nor a duration of five minutes or more.
    """
    if text.strip().lower() == OFF:
        return 0.0
    after_s = parse_seconds(text)
    if after_s < RECLAIM_AFTER_S_MIN:
        raise ConfigError(
            f"reclaim after {text!r}: give 'off', or at least 5m: a sidecar that restarts must not be reclaimed"
        )
    return after_s

"""Configuration of a sidecar: flags over environment over defaults. Read once, passed in as values."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from licet.wire.signing import Verifier
from licet_sidecar.adapters.https_route import refusal_of

KEY_FILES_MAX: Final = 16
KEY_FILE_BYTES_MAX: Final = 64 * 1024
"""Of what holds public keys, of which two are needed at most."""
_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0}


class ConfigError(ValueError):
    """A setting is missing or wrong. The message names it and says what to do."""


@dataclass(frozen=True, slots=True)
class Config:
    """Settings. Durations in seconds; ``listen`` holds ``host:port`` and ``unix:/path`` addresses.

    ``public_keys`` are those at the start; with ``public_key_file``, a file or a directory, what is there counts later.
    """

    listen: tuple[str, ...] = ("127.0.0.1:7420",)
    http_listen: str = "127.0.0.1:7421"
    redis_url: str = "redis://127.0.0.1:6379/0"
    redis_prefix: str = "licet"
    state_dir: Path = Path("licet-sidecar-state")
    public_keys: tuple[str, ...] = ()
    public_key_file: str = ""
    staleness_max_s: float = 300.0
    tenants_max: int = 10_000
    log_bytes_max: int = 1024**3
    message_bytes_max: int = 8 * 1024**2
    drain_grace_s: float = 10.0
    durable_replicas: int = 0
    usage_backlog_max: int = 1_000
    redis_memory_max: float = 0.85
    control_plane_url: str = ""
    control_plane_ca_file: str = ""
    sidecar_key: str = field(default="", repr=False)
    log_level: str = "info"


def parse(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Config:
    """The configuration of a command line.

    Raises:
        ConfigError: a setting is missing or wrong.
        SystemExit: for ``--help``, and for flags that do not exist.
    """
    environment = os.environ if environment is None else environment
    parser = _parser()
    flags = parser.parse_args(arguments)

    def setting(name: str, default: str) -> str:
        value = getattr(flags, name)
        if value is not None:
            return str(value)
        return environment.get(f"LICET_{name.upper()}", default)

    public_keys = setting("public_key", "")
    key_file = setting("public_key_file", "")
    if not public_keys and key_file:
        try:
            public_keys = read_public_keys(Path(key_file))
        except OSError as error:
            raise ConfigError(
                f"--public-key-file {key_file}: {error.strerror}; the control plane writes one as"
                " public-key.txt in its state directory"
            ) from error
        except ValueError as error:
            raise ConfigError(f"--public-key-file {key_file}: {error}") from error
    else:
        key_file = ""
    keys = split_public_keys(public_keys)
    if not keys:
        raise ConfigError(
            "no public key: set LICET_PUBLIC_KEY or --public-key to the text of the control plane's"
            " public-key.txt (ed25519:…), or name that file with --public-key-file"
        )
    try:
        Verifier(list(keys))
    except ValueError as error:
        raise ConfigError(f"--public-key: {error}") from error
    control_plane_url = setting("control_plane_url", "")
    insecure = setting("control_plane_insecure", "no").lower() in ("yes", "true", "1")
    if control_plane_url and (refusal := refusal_of(control_plane_url, insecure=insecure)):
        raise ConfigError(f"--control-plane-url: {refusal}")
    sidecar_key = setting("sidecar_key", "")
    sidecar_key_file = setting("sidecar_key_file", "")
    if control_plane_url and not sidecar_key and sidecar_key_file:
        try:
            sidecar_key = Path(sidecar_key_file).read_text().strip()
        except OSError as error:
            raise ConfigError(
                f"--sidecar-key-file {sidecar_key_file}: {error.strerror}; the control plane writes one as sidecar-key"
                " in its state directory"
            ) from error
    if control_plane_url and not sidecar_key:
        raise ConfigError(
            "--control-plane-url needs an API key: set LICET_SIDECAR_KEY to the text of the control plane's"
            " sidecar-key, or name that file with --sidecar-key-file"
        )
    return Config(
        listen=tuple(a for a in re.split(r"[\s,]+", setting("listen", "127.0.0.1:7420")) if a),
        http_listen=setting("http_listen", "127.0.0.1:7421"),
        redis_url=setting("redis_url", "redis://127.0.0.1:6379/0"),
        redis_prefix=setting("redis_prefix", "licet"),
        state_dir=Path(setting("state_dir", "licet-sidecar-state")),
        public_keys=keys,
        public_key_file=key_file,
        staleness_max_s=_duration("staleness_max", setting("staleness_max", "300s")),
        tenants_max=_count("tenants_max", setting("tenants_max", "10000"), 1),
        log_bytes_max=_count("log_bytes_max", setting("log_bytes_max", str(1024**3)), 1024**2),
        message_bytes_max=_count("message_bytes_max", setting("message_bytes_max", str(8 * 1024**2)), 1024),
        drain_grace_s=_duration("drain_grace", setting("drain_grace", "10s")),
        durable_replicas=_count("durable_replicas", setting("durable_replicas", "0"), 0),
        usage_backlog_max=_count("usage_backlog_max", setting("usage_backlog_max", "1000"), 1),
        redis_memory_max=_share("redis_memory_max", setting("redis_memory_max", "0.85")),
        control_plane_url=control_plane_url,
        control_plane_ca_file=setting("control_plane_ca_file", ""),
        sidecar_key=sidecar_key,
        log_level=setting("log_level", "info").lower(),
    )


def read_public_keys(path: Path) -> str:
    """The text of a file with public keys, or of all files of a directory but hidden ones.

    Raises:
        OSError: it cannot be read.
        ValueError: there is more than keys take.
    """
    files = sorted(one for one in path.iterdir() if not one.name.startswith(".")) if path.is_dir() else [path]
    if len(files) > KEY_FILES_MAX or any(one.stat().st_size > KEY_FILE_BYTES_MAX for one in files):
        raise ValueError(f"more than {KEY_FILES_MAX} files, or one of more than {KEY_FILE_BYTES_MAX} bytes")
    return "\n".join(one.read_text() for one in files)


def split_public_keys(text: str) -> tuple[str, ...]:
    """Keys that are separated by spaces, line ends or commas."""
    return tuple(key for key in re.split(r"[\s,]+", text) if key)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="licet-sidecar",
        description="Answers license checks on localhost from a local cache and local leases; records every answer.",
        epilog="Each setting can be given as an environment variable: --redis-url is LICET_REDIS_URL, and so on."
        " Example: licet-sidecar --redis-url redis://127.0.0.1:6379/0 --public-key-file licet-state/public-key.txt",
    )
    add = parser.add_argument
    add(
        "--listen",
        metavar="ADDR",
        help="where gRPC is served: host:port or unix:/path, several separated by commas (default 127.0.0.1:7420)",
    )
    add(
        "--http-listen", metavar="ADDR", help="where /healthz, /readyz and /metrics are served (default 127.0.0.1:7421)"
    )
    add(
        "--redis-url",
        metavar="URL",
        help="redis://[user:password@]host:port/db, rediss:// for TLS (default redis://127.0.0.1:6379/0)",
    )
    add("--redis-prefix", metavar="TEXT", help="first part of every Redis name (default licet)")
    add(
        "--state-dir",
        metavar="DIR",
        help="id, usage log and last good state; one for each sidecar (default ./licet-sidecar-state)",
    )
    add(
        "--public-key",
        metavar="KEY",
        help="the control plane's public key, ed25519:…; two, separated by a comma, while it is being rotated",
    )
    add(
        "--public-key-file",
        metavar="PATH",
        help="a file with it, or a directory of such files; read again each second, so that keys can be rotated",
    )
    add("--staleness-max", metavar="TIME", help="after how long without news answers are stale (default 300s)")
    add("--tenants-max", metavar="N", help="licenses kept in memory (default 10000)")
    add("--log-bytes-max", metavar="N", help="size of the usage log on disk (default 1 GiB)")
    add("--message-bytes-max", metavar="N", help="size of one request (default 8 MiB)")
    add("--drain-grace", metavar="TIME", help="how long to go on shipping usage after SIGTERM (default 10s)")
    add(
        "--durable-replicas",
        metavar="N",
        help="replicas of Redis that must have what a durable limit leased, beside its own disk (default 0)",
    )
    add(
        "--usage-backlog-max",
        metavar="N",
        help="batches in this sidecar's usage stream beyond which usage stays in the log (default 1000)",
    )
    add(
        "--redis-memory-max",
        metavar="SHARE",
        help="share of the memory of Redis beyond which usage stays in the log (default 0.85)",
    )
    add(
        "--control-plane-url",
        metavar="URL",
        help="https://host[:port] of the control plane, asked when Redis cannot be reached (default: it is not)",
    )
    add("--control-plane-ca-file", metavar="FILE", help="authorities that its certificate is checked against, in PEM")
    add(
        "--control-plane-insecure",
        action="store_const",
        const="yes",
        help="allow http:// to another machine (default: only to this one)",
    )
    add("--sidecar-key", metavar="KEY", help="API key for it, of the role sidecar; better given as LICET_SIDECAR_KEY")
    add("--sidecar-key-file", metavar="FILE", help="a file with that key")
    add("--log-level", metavar="LEVEL", help="debug, info, warning or error (default info)")
    return parser


def _duration(name: str, text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)?", text.strip())
    if match is None:
        raise ConfigError(f"--{name.replace('_', '-')} {text!r} is not a duration; write 300s, 5m or 500ms")
    return float(match.group(1)) * _UNITS_S[match.group(2) or "s"]


def _share(name: str, text: str) -> float:
    match = re.fullmatch(r"[01](?:\.\d+)?", text.strip())
    if match is None or not 0 < float(text) <= 1:
        raise ConfigError(f"--{name.replace('_', '-')} {text!r} is not a share; write 0.85, at most 1")
    return float(text)


def _count(name: str, text: str, least: int) -> int:
    if not text.strip().isdecimal() or int(text) < least:
        raise ConfigError(f"--{name.replace('_', '-')} {text!r} is not a whole number of at least {least}")
    return int(text)

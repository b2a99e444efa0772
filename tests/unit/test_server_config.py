"""The control plane's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from licet_control_plane.config import ConfigError, ServerConfig


def test_defaults() -> None:
    config = ServerConfig.of({})
    assert (config.host, config.port, config.redis_prefix) == ("127.0.0.1", 7430, "licet")
    assert config.staleness_max_s == 300.0
    assert config.database == "sqlite:///licet-state/licet.db"


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_default() -> None:
    environ = {"LICET_STATE_DIR": "/a", "LICET_SERVER_LISTEN": "0.0.0.0:1", "LICET_STALENESS_MAX": "500ms"}
    config = ServerConfig.of(environ, state_dir=Path("/b"), listen=None)
    assert (config.state_dir, config.host, config.port, config.staleness_max_s) == (Path("/b"), "0.0.0.0", 1, 0.5)


def test_an_ipv6_address_is_written_in_brackets() -> None:
    config = ServerConfig.of({}, listen="[::1]:7430")
    assert (config.host, config.port) == ("::1", 7430)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"listen": "7430"}, "host:port"),
        ({"listen": "localhost:http"}, "host:port"),
        ({"staleness_max": "soon"}, "60s"),
        ({"staleness_max": "-1s"}, "positive"),
        ({"log_level": "loud"}, "debug"),
        ({"redis_url": "localhost:6379"}, "redis://"),
        ({"redis_prefix": "a{b}"}, "letters"),
        ({"trusted_proxies": "10.0.0.0/8,proxy"}, "10.0.0.0/8"),
        ({"oidc_audience": "licet"}, "LICET_OIDC_ISSUER"),
        ({"oidc_issuer": "http://id.example", "oidc_audience": "a", "oidc_roles": "g=admin"}, "https://"),
        ({"oidc_issuer": "https://id.example", "oidc_roles": "g=admin"}, "LICET_OIDC_AUDIENCE"),
        ({"oidc_issuer": "https://id.example", "oidc_audience": "a"}, "LICET_OIDC_ROLES"),
        ({"oidc_issuer": "https://id.example", "oidc_audience": "a", "oidc_roles": "g=root"}, "approver"),
        ({"oidc_issuer": "https://id.example", "oidc_audience": "a", "oidc_roles": "g=sidecar"}, "approver"),
        ({"reclaim_after": "4m"}, "at least 5m"),
        ({"reclaim_after": "never"}, "duration"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_should_be(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ServerConfig.of({}, **flags)


@pytest.mark.parametrize(("text", "after_s"), [("off", 0.0), ("24h", 86_400.0), ("5m", 300.0)])
def test_reclaiming_is_off_or_after_a_while(text: str, after_s: float) -> None:
    assert ServerConfig.of({}).reclaim_after_s == 0.0
    assert ServerConfig.of({"LICET_RECLAIM_AFTER": text}).reclaim_after_s == after_s

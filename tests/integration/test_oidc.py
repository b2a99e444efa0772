"""Tokens of a real issuer on loopback: what is admitted, what is refused, and what the issuer is asked for."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from licet_control_plane.api.app import make_app
from licet_control_plane.core.access import Role
from licet_control_plane.core.claims import Bearer, ClaimRules, ClaimsRefused
from licet_control_plane.oidc import (
    DOCUMENT_BYTES_MAX,
    KEYS_S_FRESH,
    KEYS_S_MAX,
    REFRESH_S_MIN,
    Issuer,
    IssuerConfig,
    IssuerUnavailable,
    TokenRefused,
    keys_of,
)
from tests.support.control_plane import deployment
from tests.support.issuer import AUDIENCE, KEYS, LocalIssuer, jwk
from tests.support.valkey import ValkeyProcess

RULES = ClaimRules((("licet-admins", Role.ADMIN), ("licet-ops", Role.OPERATOR)))


@pytest.fixture
def site() -> Iterator[LocalIssuer]:
    made = LocalIssuer()
    yield made
    made.close()


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def issuer(site: LocalIssuer, clock: Clock) -> AsyncIterator[Issuer]:
    made = Issuer(IssuerConfig(site.url, AUDIENCE, RULES), clock_s=clock)
    yield made
    await made.close()


@pytest.mark.parametrize("kid", KEYS)
async def test_a_good_token_of_each_pinned_algorithm_is_admitted(site: LocalIssuer, issuer: Issuer, kid: str) -> None:
    assert await issuer.bearer(site.token(kid)) == Bearer("oidc:ada", Role.OPERATOR, "")


NOW = int(time.time())
ATTACKS: dict[str, tuple[Callable[[LocalIssuer], str], str]] = {
    "no signature": (lambda site: site.unsigned(), "algorithm"),
    "HMAC with the public key": (lambda site: site.hmac_with_public_key(), "algorithm"),
    "HMAC with the public EC key": (lambda site: site.hmac_with_public_key("ec"), "algorithm"),
    "another key under a known id": (lambda site: site.token("ec", headers={"kid": "rsa"}), "algorithm"),
    "another audience": (lambda site: site.token(aud="others"), "audience"),
    "no audience": (lambda site: site.token(aud=None), "aud"),
    "another issuer": (lambda site: site.token(iss="https://evil.example"), "another issuer"),
    "an issuer that begins alike": (lambda site: site.token(iss=site.url + "/"), "another issuer"),
    "expired": (lambda site: site.token(exp=NOW - 100), "expired"),
    "without an end": (lambda site: site.token(exp=None), "exp"),
    "not valid yet": (lambda site: site.token(nbf=NOW + 3_600), "not valid yet"),
    "without a key id": (lambda site: site.token(headers={"kid": None}), "kid"),
    "an unknown key id": (lambda site: site.token(headers={"kid": "other"}), "no such key"),
    "a key id that is no text": (lambda site: site.token(headers={"kid": "../rsa"}), "no such key"),
    "altered claims": (lambda site: _altered(site.token()), "signature"),
    "not a token": (lambda _site: "a.b.c", "not a token"),
    "huge": (lambda site: site.token(padding="x" * 20_000), "longer"),
}


def _altered(token: str) -> str:
    head, body, signature = token.split(".")
    other = jwt.utils.base64url_encode(jwt.utils.base64url_decode(body).replace(b"ada", b"eve")).decode()
    return f"{head}.{other}.{signature}"


@pytest.mark.parametrize("attack", ATTACKS)
async def test_a_token_that_is_not_good_is_refused(site: LocalIssuer, issuer: Issuer, attack: str) -> None:
    forge, says = ATTACKS[attack]
    with pytest.raises(TokenRefused, match=says):
        await issuer.bearer(forge(site))


async def test_clocks_may_differ_by_half_a_minute(site: LocalIssuer, issuer: Issuer) -> None:
    assert (await issuer.bearer(site.token(exp=int(time.time()) - 10, nbf=int(time.time()) + 10))).name == "oidc:ada"


async def test_a_good_token_without_a_group_gives_no_role(site: LocalIssuer, issuer: Issuer) -> None:
    with pytest.raises(ClaimsRefused, match="gives no role"):
        await issuer.bearer(site.token(groups=["staff"]))


async def test_a_flood_of_unknown_key_ids_asks_the_issuer_once(site: LocalIssuer, issuer: Issuer, clock: Clock) -> None:
    await issuer.bearer(site.token())
    for number in range(50):
        with pytest.raises(TokenRefused):
            await issuer.bearer(site.token(headers={"kid": f"made-up-{number}"}))
    assert site.asked == 1
    clock.now_s += REFRESH_S_MIN
    for number in range(50):
        with pytest.raises(TokenRefused):
            await issuer.bearer(site.token(headers={"kid": f"made-up-{number}"}))
    assert site.asked == 2


async def test_a_new_key_is_known_after_the_interval_and_a_withdrawn_one_goes(
    site: LocalIssuer, issuer: Issuer, clock: Clock
) -> None:
    await issuer.bearer(site.token("ec"))
    site.keys = [one for one in site.keys if one["kid"] != "ec"]
    await issuer.bearer(site.token("ec"))
    clock.now_s += KEYS_S_FRESH + 1
    with pytest.raises(TokenRefused, match="no such key"):
        await issuer.bearer(site.token("ec"))
    site.keys.append(jwk("ec", KEYS["ec"][1]))
    clock.now_s += REFRESH_S_MIN
    assert (await issuer.bearer(site.token("ec"))).name == "oidc:ada"


async def test_known_keys_go_on_for_an_hour_while_the_issuer_is_down(
    site: LocalIssuer, issuer: Issuer, clock: Clock
) -> None:
    await issuer.bearer(site.token())
    site.down = True
    clock.now_s += KEYS_S_MAX - 1
    assert (await issuer.bearer(site.token())).name == "oidc:ada"
    clock.now_s += 2
    with pytest.raises(IssuerUnavailable):
        await issuer.bearer(site.token())
    site.down = False
    clock.now_s += REFRESH_S_MIN
    assert (await issuer.bearer(site.token())).name == "oidc:ada"


@pytest.mark.parametrize("body", [b"", b"[]", b'{"keys": 7}', b'{"keys": []}', b"x" * (DOCUMENT_BYTES_MAX + 1)])
async def test_nonsense_instead_of_keys_admits_nobody(site: LocalIssuer, issuer: Issuer, body: bytes) -> None:
    site.body = body
    with pytest.raises(IssuerUnavailable):
        await issuer.bearer(site.token())


def test_keys_that_are_weak_or_for_something_else_are_left_out() -> None:
    good = jwk("rsa", KEYS["rsa"][1])
    left_out: list[dict[str, Any]] = [
        jwk("short", rsa.generate_private_key(65_537, 1_024)),
        {**good, "kid": "enc", "use": "enc"},
        {**good, "kid": "other", "alg": "PS256"},
        {"kty": "oct", "kid": "secret", "k": "c2VjcmV0"},
        {"kty": "EC", "crv": ["P-256"], "kid": "odd"},
        {"kty": {"is": "EC"}, "crv": "P-256", "kid": "odd"},
        {**good, "kid": 7},
    ]
    assert list(keys_of({"keys": [*left_out, good]})) == ["rsa"]


async def test_the_api_takes_tokens_beside_keys_and_the_trail_says_whose(
    tmp_path: Path, valkey_process: ValkeyProcess, site: LocalIssuer
) -> None:
    async with deployment(tmp_path / "state", valkey_process.url, start=False) as running:
        running.settings["oidc"] = IssuerConfig(site.url, AUDIENCE, RULES)
        await running.start()
        transport = httpx.ASGITransport(make_app(running.plane))
        async with httpx.AsyncClient(transport=transport, base_url="http://licet") as client:

            async def ask(token: str, method: str, path: str, **more: Any) -> httpx.Response:
                return await client.request(method, path, headers={"Authorization": f"Bearer {token}"}, **more)

            assert (await ask(site.token(), "GET", "/v1/status")).status_code == 200
            assert (await ask(site.token(), "GET", "/v1/api-keys")).status_code == 403
            admin = site.token("ed", groups=["licet-admins"])
            made = await ask(admin, "POST", "/v1/api-keys", json={"name": "k", "role": "auditor"})
            assert made.status_code == 201
            entry = (await ask(admin, "GET", "/v1/audit")).json()["items"][0]
            assert (entry["by"], entry["via"], entry["credential"]) == ("oidc:ada", "oidc", site.url)
            refused = await ask(site.unsigned(), "GET", "/v1/status")
            assert refused.status_code == 401
            assert (await ask(site.token(groups=[]), "GET", "/v1/status")).status_code == 403
            assert (await ask(running.admin_key, "GET", "/v1/status")).status_code == 200

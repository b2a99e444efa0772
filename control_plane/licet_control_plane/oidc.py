"""Tokens of an OpenID Connect issuer: its keys, fetched and kept within bounds, and the verification of a token.

A key decides which algorithm it is used with, never the token: an RSA key is for RS256, a P-256 key for ES256, an
Ed25519 key for EdDSA, and no key is for ``none`` or for HMAC. Keys are fetched again when they are old, and when a
token names one that is not known, but not more often than ``REFRESH_S_MIN``, however many such tokens come. While the
issuer cannot be reached, the keys that are known go on for ``KEYS_S_MAX``.

Concurrency: one event loop; one fetch at a time.
Source: OpenID Connect Core 1.0 and Discovery 1.0, RFC 7517, RFC 8725; ``docs/adr/0034-tokens-of-one-issuer.md``.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from licet_control_plane.core.claims import Bearer, ClaimRules, bearer_of

log: Final = structlog.get_logger(__name__)

REFRESH_S_MIN: Final = 10.0
"""Between two fetches, whatever comes: a flood of tokens with made-up key ids costs the issuer nothing."""
KEYS_S_FRESH: Final = 600.0
"""After which keys are fetched again though nothing asks for it, so that one that was withdrawn goes."""
KEYS_S_MAX: Final = 3_600.0
"""For how long keys go on while the issuer cannot be reached."""
FETCH_S_MAX: Final = 5.0
DOCUMENT_BYTES_MAX: Final = 256 * 1024
KEYS_MAX: Final = 100
TOKEN_CHARS_MAX: Final = 16 * 1024
LEEWAY_S: Final = 30
"""By which clocks may differ."""
RSA_BITS_MIN: Final = 2_048
_ALGORITHMS: Final = {("RSA", ""): "RS256", ("EC", "P-256"): "ES256", ("OKP", "Ed25519"): "EdDSA"}


class TokenRefused(Exception):
    """Nobody that is known: not a token, or not a good one. The message says why, and nothing of what is in it."""


class IssuerUnavailable(Exception):
    """The keys of the issuer cannot be had, so that nothing can be said of a token."""


@dataclass(frozen=True, slots=True)
class IssuerConfig:
    """``issuer`` as tokens have it. ``jwks_url`` empty: what the issuer's discovery document says."""

    issuer: str
    audience: str
    rules: ClaimRules
    jwks_url: str = ""


class Issuer:
    """The issuer, as far as it is known."""

    def __init__(
        self, config: IssuerConfig, *, clock_s: Callable[[], float], transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        """``clock_s`` is one that nobody sets."""
        self._config = config
        self._clock_s = clock_s
        self._http = httpx.AsyncClient(
            timeout=FETCH_S_MAX, trust_env=not is_loopback(config.issuer), follow_redirects=False, transport=transport
        )
        self._keys: dict[str, tuple[str, Any]] = {}  # key id -> (algorithm, key)
        self._fetched_s = -math.inf
        self._tried_s = -math.inf
        self._fetching = asyncio.Lock()
        self.fetches = 0

    @property
    def name(self) -> str:
        """As tokens have it."""
        return self._config.issuer

    async def bearer(self, token: str) -> Bearer:
        """Whom a token belongs to.

        Raises:
            TokenRefused: it is not a good one.
            IssuerUnavailable: its keys cannot be had.
            ClaimsRefused: it is a good one, and gives no role.
        """
        if len(token) > TOKEN_CHARS_MAX:
            raise TokenRefused(f"it is longer than {TOKEN_CHARS_MAX} characters")
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError as error:
            raise TokenRefused("it is not a token") from error
        algorithm, key = await self._key(header.get("kid"))
        if header.get("alg") != algorithm:
            raise TokenRefused("its algorithm is not that of the key")
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._config.audience,
                issuer=self._config.issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iat", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise TokenRefused(_why(error)) from error
        return bearer_of(claims, self._config.rules)

    async def close(self) -> None:
        """End its connections."""
        await self._http.aclose()

    async def _key(self, id_: object) -> tuple[str, Any]:
        if not isinstance(id_, str):
            raise TokenRefused("it does not say which key it was signed with (kid)")
        age_s = self._clock_s() - self._fetched_s
        if id_ not in self._keys or age_s > KEYS_S_FRESH:
            await self._refresh()
            age_s = self._clock_s() - self._fetched_s
        if not self._keys or age_s > KEYS_S_MAX:
            raise IssuerUnavailable(f"the keys of {self._config.issuer} cannot be had")
        if id_ not in self._keys:
            raise TokenRefused("the issuer has no such key")
        return self._keys[id_]

    async def _refresh(self) -> None:
        """Fetch the keys, unless that was just tried."""
        async with self._fetching:
            if self._clock_s() - self._tried_s < REFRESH_S_MIN:
                return
            self._tried_s = self._clock_s()
            self.fetches += 1
            try:
                async with asyncio.timeout(FETCH_S_MAX):
                    self._keys = keys_of(await self._document(await self._jwks_url()))
            except (httpx.HTTPError, httpx.InvalidURL, ValueError, TimeoutError) as error:
                log.warning("the issuer's keys cannot be fetched", issuer=self._config.issuer, reason=repr(error))
                return
            self._fetched_s = self._clock_s()

    async def _jwks_url(self) -> str:
        if self._config.jwks_url:
            return self._config.jwks_url
        found = await self._document(self._config.issuer.rstrip("/") + "/.well-known/openid-configuration")
        if found.get("issuer") != self._config.issuer:
            raise ValueError("the discovery document is of another issuer")
        url = found.get("jwks_uri")
        if not isinstance(url, str) or not is_safe(url):
            raise ValueError("the discovery document names no jwks_uri that begins with https://")
        return url

    async def _document(self, url: str) -> dict[str, Any]:
        async with self._http.stream("GET", url, headers={"Accept": "application/json"}) as response:
            if response.status_code != httpx.codes.OK:
                raise ValueError(f"{url} answered {response.status_code}")
            body = b""
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > DOCUMENT_BYTES_MAX:
                    raise ValueError(f"{url} answered more than {DOCUMENT_BYTES_MAX} bytes")
        found = json.loads(body)
        if not isinstance(found, dict):
            raise ValueError(f"{url} answered no JSON object")
        return found


def keys_of(document: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Keys that may sign tokens, by their ids, each with the one algorithm that it is for; others are left out.

    Raises:
        ValueError: it is no set of keys, or has none that can be used.
    """
    listed = document.get("keys")
    if not isinstance(listed, list) or len(listed) > KEYS_MAX:
        raise ValueError(f"not a set of at most {KEYS_MAX} keys")
    found: dict[str, tuple[str, Any]] = {}
    for one in listed:
        if not isinstance(one, dict) or one.get("use", "sig") != "sig" or not isinstance(one.get("kid"), str):
            continue
        family, curve = one.get("kty"), "" if one.get("kty") == "RSA" else one.get("crv")
        if not isinstance(family, str) or not isinstance(curve, str):
            continue
        algorithm = _ALGORITHMS.get((family, curve))
        if algorithm is None or one.get("alg", algorithm) != algorithm:
            continue
        try:
            key = jwt.PyJWK(one, algorithm=algorithm).key
        except (jwt.PyJWTError, ValueError, TypeError):
            continue
        if isinstance(key, RSAPublicKey) and key.key_size < RSA_BITS_MIN:
            continue
        found[one["kid"]] = (algorithm, key)
    if not found:
        raise ValueError("no key that can be used: RSA of 2048 bits or more, P-256 or Ed25519, each with a kid")
    return found


def is_safe(url: str) -> bool:
    """Whether what a URL answers can be believed: HTTPS, or this very machine."""
    return url.startswith("https://") or (url.startswith("http://") and is_loopback(url))


def is_loopback(url: str) -> bool:
    """Whether a URL is of this machine."""
    return urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")


def _why(error: jwt.PyJWTError) -> str:
    match error:
        case jwt.ExpiredSignatureError():
            return "it has expired"
        case jwt.ImmatureSignatureError():
            return "it is not valid yet"
        case jwt.InvalidAudienceError():
            return "it is for another audience"
        case jwt.InvalidIssuerError():
            return "it is of another issuer"
        case jwt.MissingRequiredClaimError():
            return f"it has no claim {error.claim!r}"
        case jwt.InvalidSignatureError():
            return "its signature does not fit"
    return "it cannot be verified"

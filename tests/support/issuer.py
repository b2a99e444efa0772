"""An OpenID Connect issuer on loopback, which signs what a test asks for."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

AUDIENCE = "licet"
KEYS: dict[str, tuple[str, Any]] = {
    "rsa": ("RS256", rsa.generate_private_key(65_537, 2_048)),
    "ec": ("ES256", ec.generate_private_key(ec.SECP256R1())),
    "ed": ("EdDSA", ed25519.Ed25519PrivateKey.generate()),
}


def jwk(kid: str, private: Any) -> dict[str, Any]:
    """The public half of a key as a JWK."""
    public = private.public_key()
    makers = {rsa.RSAPublicKey: RSAAlgorithm, ec.EllipticCurvePublicKey: ECAlgorithm}
    maker = next((made for kind, made in makers.items() if isinstance(public, kind)), OKPAlgorithm)
    return {**maker.to_jwk(public, as_dict=True), "kid": kid, "use": "sig"}


class LocalIssuer:
    """``keys`` is what its JWKS says; ``down``: it answers 503; ``asked`` counts requests for keys."""

    def __init__(self) -> None:
        self.keys = [jwk(kid, key) for kid, (_, key) in KEYS.items()]
        self.down = False
        self.body: bytes | None = None
        self.asked = 0
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/keys":
                    site.asked += 1
                found = {"issuer": site.url, "jwks_uri": f"{site.url}/keys"}
                body = json.dumps({"keys": site.keys} if self.path == "/keys" else found).encode()
                if self.path == "/keys" and site.body is not None:
                    body = site.body
                self.send_response(503 if site.down else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def claims(self, **changes: Any) -> dict[str, Any]:
        """A good token's, with changes; ``None`` takes one away."""
        now = int(time.time())
        made = {"iss": self.url, "aud": AUDIENCE, "sub": "ada", "iat": now, "exp": now + 300, "groups": ["licet-ops"]}
        return {name: value for name, value in {**made, **changes}.items() if value is not None}

    def token(self, kid: str = "rsa", *, headers: dict[str, Any] | None = None, **changes: Any) -> str:
        """A token signed with one of its keys."""
        algorithm, key = KEYS[kid]
        named = {"kid": kid, **(headers or {})}
        named = {name: value for name, value in named.items() if value is not None}
        return jwt.encode(self.claims(**changes), key, algorithm=algorithm, headers=named)

    def unsigned(self) -> str:
        """A token with ``alg: none``."""
        return jwt.encode(self.claims(), None, algorithm="none", headers={"kid": "rsa"})

    def hmac_with_public_key(self, kid: str = "rsa") -> str:
        """A token with HS256, whose secret is the public key that everybody knows."""
        pem = KEYS[kid][1].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

        def part(value: Any) -> bytes:
            return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")

        body = part({"alg": "HS256", "typ": "JWT", "kid": kid}) + b"." + part(self.claims())
        signature = hmac.new(pem, body, hashlib.sha256).digest()
        return (body + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()

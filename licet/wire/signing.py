"""Ed25519 signatures over documents, so that whoever can write Redis cannot write policy.

A signature covers the deployment, the kind, the key, the generation and the revision as well as the content: one
tenant's license does not verify as another's, nor yesterday's head as today's manifest.
Source: RFC 8032; ``docs/adr/0001-redis-is-not-the-record.md``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

import msgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from licet.wire import envelope

PUBLIC_KEY_PREFIX: Final = "ed25519:"
_DOMAIN: Final = b"licet signed document v1\0"  # keeps these signatures from meaning anything elsewhere
_ENVELOPE_KIND: Final = "signed"


class VerificationError(ValueError):
    """The bytes were not signed by a trusted key for what they are used as. Nothing may be taken from them."""


@dataclass(frozen=True, slots=True)
class Statement:
    """What is signed. ``kind`` is ``bundle``, ``license``, ``head`` or ``ack``; ``key`` says of what (a tenant, a log).

    ``payload`` is whatever msgpack carries. ``(generation, revision)`` only grows; a generation starts anew when the
    control plane's database was restored from a backup.
    """

    deployment: str
    kind: str
    key: str
    generation: int
    revision: int
    payload: Any

    @property
    def version(self) -> tuple[int, int]:
        """``(generation, revision)``: compares as newer and older."""
        return (self.generation, self.revision)


class SigningKey:
    """A private key. Its text form never appears in logs or messages."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self._public_key = encode_public_key(private.public_key())
        self.key_id = key_id_of(self._public_key)

    @property
    def public_key(self) -> str:
        """``ed25519:<base64>``."""
        return self._public_key

    @classmethod
    def generate(cls) -> Self:
        """A new random key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_private_bytes(cls, data: bytes) -> Self:
        """The key of 32 raw bytes.

        Raises:
            ValueError: not 32 bytes.
        """
        return cls(Ed25519PrivateKey.from_private_bytes(data))

    def private_bytes(self) -> bytes:
        """32 raw bytes. Keep them where only the control plane reads."""
        return self._private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())

    def sign(self, statement: Statement) -> bytes:
        """The signed document, ready to be stored."""
        body = msgpack.packb(
            [
                statement.deployment,
                statement.kind,
                statement.key,
                statement.generation,
                statement.revision,
                statement.payload,
            ],
            use_bin_type=True,
        )
        return envelope.pack(_ENVELOPE_KIND, [self.key_id, self._private.sign(_DOMAIN + body), body])


class Signer(Protocol):
    """What signs documents: one key, or that of several which is active."""

    @property
    def public_key(self) -> str:
        """Whom the next signature is of, as ``ed25519:<base64>``."""

    def sign(self, statement: Statement) -> bytes:
        """The signed document."""


class Verifier:
    """Checks signed documents against a set of public keys (two while a key is being rotated)."""

    def __init__(self, public_keys: list[str]) -> None:
        """``public_keys`` as ``ed25519:<base64>``, at least one.

        Raises:
            ValueError: none, or one that is not a key.
        """
        self._keys: dict[str, Ed25519PublicKey] = {}
        self.trust(public_keys)

    def trust(self, public_keys: list[str]) -> None:
        """Trust these keys from now on, and no others. What was verified before stays taken. Raises as the above."""
        if not public_keys:
            raise ValueError("no public key: give at least one as ed25519:<base64>")
        self._keys = {key_id_of(text): decode_public_key(text) for text in public_keys}

    @property
    def key_ids(self) -> list[str]:
        """Ids of the trusted keys, for messages."""
        return sorted(self._keys)

    def verify(self, data: bytes, *, kind: str, key: str) -> Statement:
        """What ``data`` says, when a trusted key signed it as the ``kind`` document of ``key``.

        Raises:
            VerificationError: damaged, unknown key, bad signature, or signed as something else.
        """
        try:
            key_id, signature, body = envelope.unpack(_ENVELOPE_KIND, data)
            public = self._keys.get(key_id)
        except (envelope.EnvelopeError, ValueError, TypeError) as error:
            raise VerificationError(f"{kind} {key!r}: not a signed document: {error}") from error
        if public is None:
            raise VerificationError(
                f"{kind} {key!r} is signed with key {key_id!r}, which is not among the trusted keys"
                f" {', '.join(self.key_ids)}: configure the control plane's public key"
            )
        try:
            public.verify(signature, _DOMAIN + body)
        except (InvalidSignature, TypeError) as error:
            raise VerificationError(f"{kind} {key!r}: the signature does not fit the content") from error
        return _statement(body, kind, key)


def unverified(data: bytes, *, kind: str, key: str) -> Statement:
    """What ``data`` says, whoever signed it. Only for where nothing rests on it.

    Raises:
        VerificationError: damaged, or something else than the ``kind`` document of ``key``.
    """
    try:
        _, _, body = envelope.unpack(_ENVELOPE_KIND, data)
    except (envelope.EnvelopeError, ValueError, TypeError) as error:
        raise VerificationError(f"{kind} {key!r}: not a signed document: {error}") from error
    return _statement(body, kind, key)


def _statement(body: bytes, kind: str, key: str) -> Statement:
    try:
        deployment, found_kind, found_key, generation, revision, payload = msgpack.unpackb(
            body, raw=False, strict_map_key=False
        )
    except (ValueError, TypeError) as error:
        raise VerificationError(f"{kind} {key!r}: the signature does not fit the content") from error
    if (found_kind, found_key) != (kind, key):
        raise VerificationError(f"expected the {kind} of {key!r}, found the {found_kind} of {found_key!r}")
    return Statement(deployment, kind, key, generation, revision, payload)


def signed_with(data: bytes) -> str:
    """The id of the key that a document says it is signed with; ``""`` of what is no signed document."""
    try:
        key_id, _, _ = envelope.unpack(_ENVELOPE_KIND, data)
    except (envelope.EnvelopeError, ValueError, TypeError):
        return ""
    return str(key_id)


def read_own(data: bytes) -> Statement:
    """What a document says, without looking at its signature: only for documents from one's own database.

    Raises:
        VerificationError: not a signed document.
    """
    try:
        _, _, body = envelope.unpack(_ENVELOPE_KIND, data)
        return Statement(*msgpack.unpackb(body, raw=False, strict_map_key=False))
    except (envelope.EnvelopeError, ValueError, TypeError) as error:
        raise VerificationError(f"not a signed document: {error}") from error


def encode_public_key(public: Ed25519PublicKey) -> str:
    """``ed25519:<base64 of 32 bytes>``."""
    return PUBLIC_KEY_PREFIX + base64.b64encode(public.public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def decode_public_key(text: str) -> Ed25519PublicKey:
    """The inverse of ``encode_public_key``.

    Raises:
        ValueError: not of that form; the message says what is expected.
    """
    text = text.strip()
    if not text.startswith(PUBLIC_KEY_PREFIX):
        raise ValueError(f"public key {text[:16]!r}… does not start with {PUBLIC_KEY_PREFIX!r}")
    try:
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(text[len(PUBLIC_KEY_PREFIX) :], validate=True))
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"public key {text[:16]!r}… is not 32 bytes in base64") from error


def key_id_of(public_key: str) -> str:
    """16 hex digits that name a public key."""
    return hashlib.sha256(public_key.strip().encode()).hexdigest()[:16]

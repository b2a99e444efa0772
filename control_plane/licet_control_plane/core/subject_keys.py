"""The ledger's key: names subjects without saying who they are, and wraps their keys. Pure.

A database alone holds neither: a subject is found by a keyed digest (HMAC-SHA-256) of its tenant, type and id, and its
key is stored under AES-256-GCM. Both keys are derived from the ledger's key, which is kept beside the signing key.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from licet_control_plane.core.sealed_events import KEY_BYTES, NONCE_BYTES, Damaged

PERSON_BYTES: Final = 16
TAG_BYTES: Final = 2 * PERSON_BYTES


class Subject(NamedTuple):
    """Whose key an event is sealed with: who acted, and on whose behalf (empty for nobody's), in a tenant."""

    tenant: str
    type: str
    id: str
    on_behalf_of: str


class LedgerKey:
    """``secret`` is 32 random bytes. Its text form never appears in logs or messages."""

    def __init__(self, secret: bytes) -> None:
        """
        Raises:
            ValueError: not 32 bytes.
        """
        if len(secret) != KEY_BYTES:
            raise ValueError(f"a ledger key has {KEY_BYTES} bytes, not {len(secret)}")
        self.secret = secret
        self._wrapping = AESGCM(hmac.digest(secret, b"licet ledger key v1: wrap", "sha256"))
        self._naming = hmac.digest(secret, b"licet ledger key v1: name", "sha256")

    def person(self, tenant: str, type: str, id: str) -> bytes:
        """16 bytes that stand for somebody who acts. Begins the tag of each of their keys."""
        return self._digest("acts", tenant, type, id)

    def principal(self, tenant: str, on_behalf_of: str) -> bytes:
        """16 bytes that stand for somebody on whose behalf others act; zeros for nobody."""
        return self._digest("on behalf of", tenant, on_behalf_of) if on_behalf_of else bytes(PERSON_BYTES)

    def tag(self, subject: Subject) -> bytes:
        """32 bytes that name a subject in the database: ``person`` and ``principal``."""
        return self.person(subject.tenant, subject.type, subject.id) + self.principal(
            subject.tenant, subject.on_behalf_of
        )

    def wrap(self, key: bytes, tag: bytes, nonce: bytes) -> bytes:
        """A subject's key as the database keeps it; ``nonce`` is ``NONCE_BYTES`` fresh random bytes."""
        return nonce + self._wrapping.encrypt(nonce, key, tag)

    def unwrap(self, wrapped: bytes, tag: bytes) -> bytes:
        """The inverse of ``wrap``.

        Raises:
            Damaged: it was altered, belongs to another subject, or was wrapped with another ledger key.
        """
        try:
            return self._wrapping.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], tag)
        except (InvalidTag, ValueError) as error:
            raise Damaged("the subject's key does not open: it was altered, or this is another ledger key") from error

    def _digest(self, *parts: str) -> bytes:
        # Length-prefixed, so that ("a", "bc") and ("ab", "c") differ.
        joined = b"".join(len(part := text.encode()).to_bytes(4, "big") + part for text in parts)
        return hmac.digest(self._naming, joined, hashlib.sha256)[:PERSON_BYTES]

"""Published state, signed by hand: what a control plane leaves in Redis, for tests that need none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from licet.domain.approvals import Override
from licet.domain.catalog import Action, Catalog, Document, Entitlement, Feature, License, Limit, Plan, rate_key
from licet.domain.catalog_wire import license_to_wire
from licet.domain.ids import LimitKey
from licet.domain.windows import Period
from licet.wire import documents
from licet.wire.documents import Head, Manifest, chunk_catalog, digest_of
from licet.wire.signing import SigningKey, Statement

KEY: Final = SigningKey.from_private_bytes(bytes(range(32)))
OTHER_KEY: Final = SigningKey.from_private_bytes(bytes(range(1, 33)))
DEPLOYMENT: Final = "d" * 32
MONTHLY: Final = LimitKey("reports:month")


def limit(amount: int, per: Period = Period.MONTH, *, feature: str = "reports", scope: tuple[str, ...] = ()) -> Limit:
    """A limit whose key is made as the control plane makes it."""
    name = f"{per.value}@{'+'.join(scope)}" if scope else per.value
    key = LimitKey(f"{feature}:{name}")
    return Limit(rate_key(key) if per is Period.SECOND else key, amount, per, scope)


def catalog(*more: Document, limits: Iterable[Limit] = ()) -> Catalog:
    """``report.export`` over ``reports``, which plan ``pro`` includes; ``more`` adds to it or replaces."""
    return Catalog.of(
        [
            Feature("reports"),
            Action("report.export", {"": "reports"}),
            Plan("pro", {"reports": Entitlement(limits=tuple(limits))}),
            Plan("free", {}),
            *more,
        ]
    )


class Signer:
    """Signs as one control plane does. ``generation`` may be changed to play a restored one."""

    def __init__(self, key: SigningKey = KEY, deployment: str = DEPLOYMENT, generation: int = 1) -> None:
        self.key = key
        self.deployment = deployment
        self.generation = generation

    def document(self, kind: str, key: str, revision: int, payload: Any) -> bytes:
        """Any signed document."""
        return self.key.sign(Statement(self.deployment, kind, key, self.generation, revision, payload))

    salt = b"salt" * 8
    """Of hashed attributes."""

    def bundle(
        self, content: Catalog, revision: int, *, observe: bool = False, overrides: tuple[Override, ...] = ()
    ) -> tuple[bytes, dict[str, bytes]]:
        """Manifest, and chunks by digest."""
        chunks = {digest_of(chunk): chunk for chunk in chunk_catalog(content)}
        manifest = Manifest(tuple(chunks), observe=observe, salt=self.salt, overrides=overrides)
        return self.document(documents.BUNDLE, documents.BUNDLE_KEY, revision, manifest.to_payload()), chunks

    def license(self, license_: License, revision: int) -> bytes:
        """One license."""
        return self.document(documents.LICENSE, license_.tenant, revision, license_to_wire(license_))

    def head(self, revision: int, run_id: str, at_us: int, *, epoch: int = 1, live: int = 1, bundle: int = 0) -> bytes:
        """One head."""
        payload = Head(at_us, run_id, epoch, live, bundle=bundle).to_payload()
        return self.document(documents.HEAD, documents.HEAD_KEY, revision, payload)

    def ack(self, log: str, watermark: int) -> bytes:
        """The ledger's word that it has a log up to ``watermark``."""
        return self.document(documents.ACK, log, watermark, None)

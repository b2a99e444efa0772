"""Which state of a license somebody saw, so that a change is made only to that. Pure.

A license is published anew for reasons that are none of whoever edits it: an access request is opened or approved, a
grant is added or ends, the signing key rotates. Such a revision must not refuse an edit of the terms.
Source: docs/adr/0044-an-edit-is-held-to-the-terms.md
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Final

import msgpack

from licet.domain.catalog import License
from licet.domain.catalog_wire import license_to_wire

TERMS_DIGITS: Final = 16
"""64 bits: nobody gains by two states of their own license with one digest."""


def terms_digest(license_: License) -> str:
    """A digest of what an operator edits: plan, status, term, renewal, add-ons, overrides and what is planned; not of
    grants and access requests. Hex."""
    wire = license_to_wire(replace(license_, grants=(), requests=()))
    wire["addons"], wire["overrides"] = sorted(wire["addons"].items()), sorted(wire["overrides"].items())
    return hashlib.sha256(msgpack.packb(wire)).hexdigest()[:TERMS_DIGITS]


@dataclass(frozen=True, slots=True)
class SeenLicense:
    """A state that was seen: its revision, and the digest of its terms; empty when only the revision is known."""

    revision: int
    terms: str = ""

    def is_still(self, license_: License, revision: int) -> bool:
        """Whether a license that is at ``revision`` is what was seen, as far as its terms go."""
        return revision == self.revision or self.terms == terms_digest(license_)

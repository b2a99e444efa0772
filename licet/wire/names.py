"""Every Redis name, built in one place.

All keys of a tenant share the hash tag ``{tenant}``, so that one script can touch several of them on Redis Cluster.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

USAGE_SHARDS: Final = 4
"""Usage streams of a deployment. A sidecar writes to one of them, so that its batches stay in order."""


@dataclass(frozen=True, slots=True)
class RedisNames:
    """Names under one prefix (``licet`` unless configured)."""

    prefix: str = "licet"

    def epoch(self) -> str:
        """String ``<deployment>:<epoch>``: the sentinel whose absence means that Redis lost its data."""
        return f"{self.prefix}:epoch"

    def head(self) -> str:
        """Signed head, rewritten each second by the control plane."""
        return f"{self.prefix}:head"

    def changes(self) -> str:
        """Stream of changes; the id of an entry is ``<revision>-0``."""
        return f"{self.prefix}:changes"

    def bundle(self) -> str:
        """Signed manifest of the newest bundle."""
        return f"{self.prefix}:doc:bundle"

    def chunk(self, digest: str) -> str:
        """Chunk of a bundle, named by the SHA-256 (hex) of its bytes."""
        return f"{self.prefix}:doc:chunk:{digest}"

    def license(self, tenant: str) -> str:
        """Signed license of a tenant."""
        return f"{self.prefix}:{{{tenant}}}:license"

    def limits(self, tenant: str) -> str:
        """Hash, the tenant's mark: epoch, run, phase, since, revision, amounts of limits, markers of quotas."""
        return f"{self.prefix}:{{{tenant}}}:limits"

    def quota(self, tenant: str, quota: str) -> str:
        """Hash of one quota, ``quota`` being ``<feature>:<limit>[@<scope digest>]:<window start>``."""
        return f"{self.prefix}:{{{tenant}}}:q:{quota}"

    def seats(self, tenant: str, feature: str) -> str:
        """Sorted set of a feature's seats: holder to the end of its hold (ms, Redis clock)."""
        return f"{self.prefix}:{{{tenant}}}:seats:{feature}"

    def seat_holders(self, tenant: str, feature: str) -> str:
        """Hash beside ``seats``: holder to the sidecar that answers for it."""
        return f"{self.prefix}:{{{tenant}}}:seats:{feature}#holders"

    def usage(self, shard: int) -> str:
        """Stream of usage batches."""
        return f"{self.prefix}:usage:{shard}"

    def acked(self) -> str:
        """Hash, log id to signed acknowledgement."""
        return f"{self.prefix}:acked"

    def sidecars(self) -> str:
        """Hash, sidecar id to its newest heartbeat."""
        return f"{self.prefix}:sidecars"

    def asks(self) -> str:
        """Stream in which sidecars ask the control plane to look at a tenant: its mark is missing, old or learning."""
        return f"{self.prefix}:asks"

    def wanted(self) -> str:
        """Pub/sub channel: a sidecar lacks units that others hold idle. A lost message costs only time."""
        return f"{self.prefix}:wanted"


def usage_shard(sidecar: str) -> int:
    """The usage shard of a sidecar, stable for its life: ``0 <= shard < USAGE_SHARDS``."""
    return int.from_bytes(hashlib.sha256(sidecar.encode()).digest()[:4], "big") % USAGE_SHARDS


def subject_value(type_: str, id_: str) -> str:
    """What a subject is in a scope: ``<type>/<id>``. A slash of the type is escaped, so that no two are the same."""
    if "/" in type_ or "%" in type_:
        type_ = type_.replace("%", "%25").replace("/", "%2F")
    return f"{type_}/{id_}"


def scope_digest(values: tuple[str, ...]) -> str:
    """16 hex digits that stand for the values of a limit's scope; empty for a limit over the whole tenant."""
    if not values:
        return ""
    # Length-prefixed, so that ("a", "bc") and ("ab", "c") differ.
    joined = "".join(f"{len(value)}:{value}" for value in values)
    return hashlib.blake2b(joined.encode(), digest_size=8).hexdigest()

"""What the sidecar needs from outside, named for its role. Adapters and fakes pass one contract suite each.

Every method raises ``LinkDown`` when the other side cannot be reached or answers that it cannot serve just now (then
nothing is known of whether the call took effect: repeat it verbatim), and ``LinkRefused`` when trying again will not
help until somebody changes something.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from licet.wire.registers import Pair
from licet_sidecar.core.seats import SeatAnswer, SeatCall
from licet_sidecar.core.settling import SettleAnswer, SettleCall
from licet_sidecar.core.sync import Change


class LinkDown(Exception):
    """Transient: Redis cannot be reached, is loading, is read-only, or is out of memory."""


class LinkFull(LinkDown):
    """Redis has no memory left for what was sent: it needs time, and less."""


class Unconfirmed(LinkDown):
    """The call took effect, and what it granted is not yet on disk or on enough replicas: repeat it verbatim."""


class LinkRefused(Exception):
    """Permanent until configuration changes: wrong password, missing permission. The message says what to do."""


class CallRefused(LinkRefused):
    """Permanent for this one call, which had no effect; the link is fine, and so are other calls."""


@dataclass(frozen=True, slots=True)
class PulseReport:
    """What one pulse brought back. Bytes are signed documents, not verified yet; ``None`` where there is none.

    ``redis_ms``: what the Redis clock showed, milliseconds since the Unix epoch. ``backlog_batches``: entries in the
    usage stream of this sidecar's shard. ``memory_share``: of the memory Redis may use, 0 when there is no bound.
    """

    head: bytes | None
    acks: Mapping[str, bytes]
    run_id: str
    redis_ms: int = 0
    backlog_batches: int = 0
    memory_share: float = 0.0


class LeaseStore(Protocol):
    """Quota registers."""

    async def settle(self, calls: Sequence[SettleCall], live: int) -> list[SettleAnswer | Exception]:
        """Carries out calls, each atomically; one answer (or what prevented it) for each, in order."""

    async def ask(self, tenant: str, why: str) -> None:
        """Asks the control plane to look at a tenant's mark."""

    async def recall(self, tenant: str, quotas: Sequence[str]) -> None:
        """Tells the other sidecars that units of these quotas are wanted. May be lost."""

    def recalls(self) -> AsyncIterator[tuple[str, list[str]]]:
        """What the other sidecars want: (tenant, quotas), as it comes, until the link breaks."""


class SeatStore(Protocol):
    """Seats."""

    async def call(self, calls: Sequence[SeatCall]) -> list[SeatAnswer | Exception]:
        """Carries out calls, each atomically; one answer (or what prevented it) for each, in order."""


class StateSource(Protocol):
    """Published state, as signed documents."""

    async def read_head(self) -> tuple[bytes | None, str]:
        """The newest head and the run id of the server it was read from."""

    async def read_manifest(self) -> tuple[bytes | None, str]:
        """The signed manifest of the newest bundle, and the run id of the server it was read from."""

    async def read_chunks(self, digests: Sequence[str]) -> list[bytes | None]:
        """Chunks by digest, in order."""

    async def read_license(self, tenant: str) -> tuple[bytes | None, Pair, bytes | None, str]:
        """Of one read of one server: license, pair of the tenant's mark, head, and run id."""

    async def read_licenses(self, tenants: Sequence[str]) -> tuple[list[bytes | None], str]:
        """Licenses, in order, and the run id of the one server they were all read from, empty when it was several."""

    async def read_changes(self, after: int, block_ms: int) -> tuple[list[Change], str]:
        """Entries after revision ``after``, in order, and the run id of the server they were read from; waits up to
        ``block_ms`` for the first.
        """


class SecondRoute(Protocol):
    """The control plane itself, while Redis cannot be reached."""

    async def snapshot(self, have: tuple[int, int], known: Collection[str], wanted: Collection[str]) -> bytes:
        """The published state, a packed ``Snapshot``, for who has (generation, revision) ``have`` with the licenses of
        ``known`` and wants those of ``wanted`` too. May be repeated.
        """

    async def ship(self, batches: Sequence[bytes]) -> Mapping[str, bytes]:
        """Hands packed batches over; signed acknowledgements, by log. May be repeated."""


class UsageSink(Protocol):
    """Where batches of usage events go, and where word comes from that the ledger has them."""

    async def pulse(self, heartbeat: tuple[str, bytes], logs: Sequence[str], batches: Sequence[bytes]) -> PulseReport:
        """Once a second, one round trip: hands batches over, leaves a heartbeat, fetches the head and the
        acknowledgements of ``logs``. May be repeated.
        """

    async def ship(self, batches: Sequence[bytes]) -> None:
        """Hands batches over between two pulses. May be repeated."""

    async def deregister(self, sidecar: str) -> None:
        """Takes the heartbeat out: this sidecar has returned what it held and stops."""

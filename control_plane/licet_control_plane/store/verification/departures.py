"""Which events may be missing: those of signed exports whose drop began. Everything else that is missing was removed.

What an export's row says is held to its signed document here, and to the chain once that was read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, select

from licet.wire.signing import VerificationError, Verifier
from licet_control_plane.core.chain import Drop
from licet_control_plane.core.recorded import RecordedSeqs
from licet_control_plane.store.exports import Export, digest_of, numbers_of
from licet_control_plane.store.partitions import Month
from licet_control_plane.store.schema import exports
from licet_control_plane.store.verification.report import Finding, about_the_whole

Numbers = Mapping[str, RecordedSeqs]
"""Sequence numbers by log id."""


@dataclass(frozen=True, slots=True)
class Departures:
    """``going`` are the numbers of every export whose drop began, ``gone`` of those whose drop is done. ``begun`` names
    the former, to see whether there are more by the end."""

    going: Numbers = field(default_factory=dict)
    gone: Numbers = field(default_factory=dict)
    dropped: dict[Month, int] = field(default_factory=dict)
    rows: Sequence[Any] = ()
    begun: frozenset[int] = frozenset()
    months: frozenset[Month] = frozenset()

    @property
    def count(self) -> int:
        """Events that exports say are missing."""
        return sum(self.dropped.values())

    @property
    def end_s(self) -> int:
        """The first second after the last month of which anything is missing; 0 when nothing is."""
        return max((month.end_us // 1_000_000 for month in self.months), default=0)


def read(connection: Connection, deployment: str, verifier: Verifier | None) -> tuple[Departures, list[Finding]]:
    """What left the ledger, and what is wrong with the exports that say so."""
    found: list[Finding] = []
    begun: list[Export] = []
    done: list[Export] = []
    dropped: dict[Month, int] = {}
    months: set[Month] = set()
    rows = connection.execute(select(exports).order_by(exports.c.id)).all()
    for row in rows:
        name = _name(row)
        if verifier is None:
            what = (
                f"{name} cannot be checked without a public key: what is missing counts as removed. Give --public-key"
            )
            found.append(about_the_whole("export", what))
            continue
        try:
            export = Export.of(bytes(row.document), row.month, verifier)
            month = Month.parse(row.month)
        except (VerificationError, ValueError) as error:
            found.append(about_the_whole("export", f"{name} does not count: {error}"))
            continue
        if problem := _problem(row, export, deployment):
            found.append(about_the_whole("export", f"{name}: {problem}"))
        if row.begun_at is None or export.deployment != deployment:
            continue
        begun.append(export)
        months.add(month)
        dropped[month] = dropped.get(month, 0) + row.dropped
        if row.dropped_at is not None:
            done.append(export)
    return (
        Departures(
            numbers_of(begun),
            numbers_of(done),
            {month: count for month, count in sorted(dropped.items()) if count},
            rows,
            frozenset(row.id for row in rows if row.begun_at is not None),
            frozenset(months),
        ),
        found,
    )


def begun_now(connection: Connection) -> frozenset[int]:
    """The numbers of the exports whose drop has begun by now."""
    return frozenset(connection.scalars(select(exports.c.id).where(exports.c.begun_at.is_not(None))))


def held_to_chain(
    departures: Departures, steps: Iterable[tuple[int, Drop]]
) -> tuple[list[Finding], dict[Month, bytes]]:
    """What rows say against what the chain does (``steps``: the time of a block, and what it says); and by month the
    digest of its sums when it began to be dropped last.

    A step without a row is none of anybody's business: an event that is missing is found without it, and after a
    rebuild from the archive nothing is.
    """
    found: list[Finding] = []
    sums: dict[Month, bytes] = {}
    chained: dict[tuple[bytes, bool], int] = {}
    digests: dict[bytes, bytes] = {}
    for block_at, step in steps:
        chained[step.export, step.done] = block_at
        if not step.done:
            digests[step.export] = step.sums
    for row in departures.rows:
        digest = digest_of(bytes(row.document))
        for said, is_done, verb in ((row.begun_at, False, "began to be dropped"), (row.dropped_at, True, "is gone")):
            at: int | None = chained.get((digest, is_done))
            if said != at:
                what = "its row does not say so, or another time" if at else "no block says so"
                found.append(about_the_whole("export", f"{_name(row)} {verb}: {what}"))
        if row.begun_at is not None and digest in digests:
            sums[Month.parse(row.month)] = digests[digest]
    return found, sums


def _problem(row: Any, export: Export, deployment: str) -> str:
    if export.deployment != deployment:
        return f"it is of deployment {export.deployment}"
    if (row.events, row.sha256) != (export.events, export.sha256):
        return "its row says something else than what was signed"
    if row.dropped_at is None and not 0 <= row.dropped <= row.events:
        return f"{row.dropped:,} of its {row.events:,} events cannot be gone"
    if row.dropped_at is not None and (row.begun_at is None or row.dropped != row.events):
        return f"all its {row.events:,} events are gone, and its row says {row.dropped:,}"
    if row.begun_at is None and row.dropped:
        return "events of it are gone, and its drop did not begin"
    return ""


def _name(row: Any) -> str:
    return f"the export of {row.month} (number {row.id})"

"""The state that is verified, one committed one, and how the work on it is divided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, func, select

from licet.wire.signing import Verifier
from licet_control_plane.core.sealed_events import Damaged
from licet_control_plane.core.subject_keys import PERSON_BYTES, LedgerKey
from licet_control_plane.store import checkpoints, ledger_sums, meta
from licet_control_plane.store.schema import blocks, conflicts, events, gaps, logs, ranges, shards, subjects
from licet_control_plane.store.verification import departures
from licet_control_plane.store.verification.departures import Departures
from licet_control_plane.store.verification.report import Finding, about_the_whole

PIECE_EVENTS: Final = 50_000
"""Events of one piece: half a second of one process, so that progress shows and memory stays small."""
PIECE_BLOCKS: Final = 2_000
ROWS_MAX: Final = 5_000
_STREAMED: Final = {"yield_per": ROWS_MAX}


class Piece(NamedTuple):
    """Blocks of one shard, bounds included."""

    shard: int
    first: int
    last: int


@dataclass(slots=True)
class Plan:
    """``logs``, ``shards`` and ``gaps`` are rows; ``above`` ranges by number of a log; ``counts`` rows of events by it;
    ``erased`` when by number of a subject, ``None`` when it is so only in part; ``stray`` what was found already."""

    deployment: str
    generation: int
    shards: list[Any]
    pieces: list[Piece]
    events: int
    stray: list[Finding]
    logs: list[Any]
    above: dict[int, list[tuple[int, int]]]
    gaps: dict[int, list[Any]]
    counts: dict[int, int]
    departures: Departures
    sums: ledger_sums.Contents
    spend: ledger_sums.Spend
    conflicts: int
    erased: dict[int, int | None]
    checkpoint: checkpoints.Stored | None

    @classmethod
    def read(cls, connection: Connection, ledger_key: LedgerKey | None, verifier: Verifier | None) -> Plan:
        """The state now."""
        about = meta.read(connection)
        heads = list(connection.execute(select(shards).order_by(shards.c.shard)))
        pieces, total, stray = _pieces(connection, {row.shard: row.blocks for row in heads})
        above: dict[int, list[tuple[int, int]]] = {}
        for log, first, last in connection.execute(select(ranges)):
            above.setdefault(log, []).append((first, last))
        lost: dict[int, list[Any]] = {}
        for row in connection.execute(select(gaps).order_by(gaps.c.log, gaps.c.first_seq)):
            lost.setdefault(row.log, []).append(row)
        known = list(connection.execute(select(logs).order_by(logs.c.sidecar, logs.c.incarnation)))
        counts: dict[int, int] = {
            row[0]: row[1] for row in connection.execute(select(events.c.log, func.count()).group_by(events.c.log))
        }
        left, wrong = departures.read(connection, about.deployment, verifier)
        erased, altered = _subjects(connection, ledger_key)
        return cls(
            deployment=about.deployment,
            generation=about.ledger_generation,
            shards=heads,
            pieces=pieces,
            events=total - left.count,
            stray=stray + wrong + altered,
            logs=known,
            above=above,
            gaps=lost,
            counts=counts,
            departures=left,
            sums=ledger_sums.contents(connection),
            spend=ledger_sums.spend(connection),
            conflicts=connection.scalar(select(func.count()).select_from(conflicts)) or 0,
            erased=erased,
            checkpoint=checkpoints.newest(connection),
        )


def _pieces(connection: Connection, ends: dict[int, int]) -> tuple[list[Piece], int, list[Finding]]:
    """Pieces of all chains up to their heads; how many events they say they have; and blocks beyond a head."""
    pieces: list[Piece] = []
    stray: list[Finding] = []
    total = begun = 0
    open_: Piece | None = None
    rows = connection.execute(
        select(blocks.c.shard, blocks.c.number, blocks.c.events).order_by(blocks.c.shard, blocks.c.number),
        execution_options=_STREAMED,
    )
    for shard, number, count in rows:
        if number > ends.get(shard, 0) or number < 1:
            stray.append(Finding(shard, number, "", 0, "head", "a block beyond the head of its chain"))
            continue
        total += count
        if open_ is None or open_.shard != shard or begun >= PIECE_EVENTS or number - open_.first >= PIECE_BLOCKS:
            if open_ is not None:
                pieces.append(open_)
            open_, begun = Piece(shard, open_.last + 1 if open_ and open_.shard == shard else 1, number), 0
        open_ = open_._replace(last=number)
        begun += count
    if open_ is not None:
        pieces.append(open_)
    # What was cut off at the end belongs to the last piece, or to one of its own.
    for shard, end in sorted(ends.items()):
        reached = max((piece.last for piece in pieces if piece.shard == shard), default=0)
        if reached < end:
            pieces.append(Piece(shard, reached + 1, end))
    return pieces, total, stray


def _subjects(connection: Connection, ledger_key: LedgerKey | None) -> tuple[dict[int, int | None], list[Finding]]:
    """Subjects that seem erased, since when, ``None`` if not wholly; and keys that were altered."""
    erased: dict[int, int | None] = {}
    altered: list[Finding] = []
    columns = (subjects.c.number, subjects.c.tag, subjects.c.principal, subjects.c.key, subjects.c.erased_at)
    for number, tag, principal, key, erased_at in connection.execute(select(*columns), execution_options=_STREAMED):
        if key is None or erased_at is not None:
            erased[number] = erased_at if key is None and tag is None and principal is None else None
            continue
        wanted = bytes(tag or b"")[PERSON_BYTES:]
        if bytes(principal or bytes(PERSON_BYTES)) != wanted:
            altered.append(about_the_whole("subject", f"on whose behalf subject {number} acts was altered"))
        if ledger_key is not None:
            try:
                ledger_key.unwrap(bytes(key), bytes(tag or b""))
            except Damaged:
                altered.append(about_the_whole("subject", f"the key or the tag of subject {number} was altered"))
    return erased, altered

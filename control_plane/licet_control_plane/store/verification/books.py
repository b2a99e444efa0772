"""Everything that the pieces found, put together and held to what the other tables say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, select

from licet.wire.signing import VerificationError, Verifier
from licet_control_plane.core import chain
from licet_control_plane.core.chain import Block, MetLog
from licet_control_plane.core.recorded import RecordedSeqs, overlaps
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store import ledger_sums
from licet_control_plane.store.checkpoints import Checkpoint
from licet_control_plane.store.partitions import Month
from licet_control_plane.store.schema import blocks, events, gaps, logs, ranges
from licet_control_plane.store.verification import asides, departures, sums
from licet_control_plane.store.verification.pieces import Found, cover
from licet_control_plane.store.verification.plan import ROWS_MAX, Plan
from licet_control_plane.store.verification.report import (
    Finding,
    Gap,
    LogFacts,
    Verification,
    about_the_whole,
    order_of,
)


class Books:
    """``add`` what each piece found, then ``closed``."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._found = Found()
        self._report(plan.stray)

    @property
    def events(self) -> int:
        """Events that were checked so far."""
        return self._found.events

    def add(self, piece: Found) -> None:
        """What one more piece came to."""
        found = self._found
        found.events += piece.events
        found.blocks += piece.blocks
        found.erased_events += piece.erased_events
        found.missing += piece.missing
        found.erasures += piece.erasures
        found.findings.merge(piece.findings)
        found.unread |= piece.unread
        found.block_events.update(piece.block_events)
        found.seen.update(piece.seen)
        for log_id, at in piece.last_at.items():
            found.last_at[log_id] = max(found.last_at.get(log_id, 0), at)
        found.ranges += piece.ranges
        found.erased += piece.erased
        found.logs += piece.logs
        found.lost += piece.lost
        found.drops += piece.drops
        found.account.merge(piece.account)

    def closed(
        self,
        connection: Connection,
        ledger_key: LedgerKey | None,
        verifier: Verifier | None,
        given: Sequence[Checkpoint],
    ) -> Verification:
        """The verification, once everything was added."""
        plan, found = self._plan, self._found
        facts, open_, lost = self._logs()
        self._strays(connection)
        self._subjects()
        self._shards(connection)
        held_to = self._checkpoints(connection, verifier, given)
        self._report(asides.check_conflicts(connection, ledger_key))
        before = found.findings.total
        departed = self._departures(connection)
        self._report(sums.differences(plan.sums, ledger_sums.contents_of(found.account), departed))
        spend = sums.spend_differences(
            plan.spend,
            ledger_sums.spend_of(found.account),
            unread=found.unread,
            opened=ledger_key is not None,
            departed_end_s=plan.departures.end_s,
        )
        self._report(spend)
        return Verification(
            events=found.events,
            blocks=found.blocks,
            logs=facts,
            gaps=open_,
            lost=lost,
            dropped={str(month): count for month, count in plan.departures.dropped.items()},
            conflicts=plan.conflicts,
            rollups_match=found.findings.total == before,
            findings=sorted(found.findings.listed, key=order_of),
            findings_total=found.findings.total,
            heads=[(row.shard, row.blocks, bytes(row.head).hex()) for row in plan.shards if row.blocks],
            erased_events=found.erased_events,
            erased_subjects=len(plan.erased),
            opened=ledger_key is not None,
            checkpoints=held_to,
        )

    def _report(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self._found.findings.add(finding)

    def _add(self, kind: str, what: str) -> None:
        self._found.findings.add(about_the_whole(kind, what))

    def _logs(self) -> tuple[list[LogFacts], list[Gap], list[Gap]]:
        """What logs say that they have against what blocks have; and what never came."""
        found, plan = self._found, self._plan
        covered: dict[str, RecordedSeqs] = {}
        for shard, number, one in sorted(found.ranges):
            cover(covered, shard, number, one, found.findings)
        met: dict[str, list[tuple[int, int, MetLog]]] = {}
        for shard, at, about in found.logs:
            met.setdefault(about.log_id, []).append((shard, at, about))
        watermarks = {(row.sidecar, row.incarnation): row.watermark for row in plan.logs}
        facts: list[LogFacts] = []
        open_: list[Gap] = []
        lost: list[Gap] = []
        declared = self._declared(covered)
        for row in plan.logs:
            facts.append(LogFacts(row.log_id, row.sidecar, row.incarnation, row.watermark, plan.counts.get(row.log, 0)))
            seqs = covered.pop(row.log_id, RecordedSeqs())
            wanted = declared.pop(row.log_id, {})
            there = {(gap.first_seq, gap.last_seq): (gap.reason, gap.at) for gap in plan.gaps.get(row.log, ())}
            lost += [Gap(row.log_id, first, last, reason) for (first, last), (reason, _) in sorted(there.items())]
            for first, last in sorted(there.keys() | wanted.keys()):
                if there.get((first, last)) != wanted.get((first, last)):
                    what = f"{first} to {last}: {_gap_problem(there.get((first, last)), wanted.get((first, last)))}"
                    found.findings.add(Finding(row.shard, 0, row.log_id, first, "gap", what))
                seqs.add(first, last)
            recorded = RecordedSeqs(row.watermark, plan.above.get(row.log, ()))
            if (recorded.watermark, recorded.ranges) != (seqs.watermark, seqs.ranges):
                what = f"the log says that it has {_text(recorded)}; its blocks have {_text(seqs)}"
                found.findings.add(Finding(row.shard, 0, row.log_id, 0, "log", what))
            if problem := self._log_problem(row, met.get(row.log_id, ())):
                found.findings.add(Finding(row.shard, 0, row.log_id, 0, "log", problem))
            open_ += [Gap(row.log_id, first, last, "not received yet, or lost") for first, last in recorded.holes()]
            if row.previous_last_seq:
                reached = watermarks.get((row.sidecar, row.previous_incarnation), 0)
                if reached < row.previous_last_seq:
                    log_id = f"{row.sidecar}:{row.previous_incarnation}"
                    why = "its successor says that it went on to here"
                    open_.append(Gap(log_id, reached + 1, row.previous_last_seq, why))
        for log_id in sorted({*covered, *declared, *met} - {row.log_id for row in plan.logs}):
            self._add("log", f"the log {log_id} was removed or renamed: blocks name it")
        for log in sorted({*plan.above, *plan.gaps} - {row.log for row in plan.logs}):
            self._add("log", f"log number {log} has ranges or gaps, and is not there")
        return facts, open_, lost

    def _declared(self, covered: dict[str, RecordedSeqs]) -> dict[str, dict[tuple[int, int], tuple[str, int]]]:
        """The gaps that there must be: what was declared lost, less what came after all."""
        found: dict[str, dict[tuple[int, int], tuple[str, int]]] = {}
        for at, lost in self._found.lost:
            came = covered.get(lost.log_id, RecordedSeqs())
            mine = found.setdefault(lost.log_id, {})
            mine |= dict.fromkeys(came.missing(lost.first, lost.last), (lost.reason, at))
        return found

    def _log_problem(self, row: Row[Any], met: Sequence[tuple[int, int, MetLog]]) -> str:
        """What is wrong with what a log's row says of the log, by the blocks that name it first."""
        said = MetLog(*(getattr(row, name) for name in MetLog._fields))
        said = said._replace(decision_prefix=bytes(said.decision_prefix))
        if not met:
            return "no block names it first"
        for name in MetLog._fields:
            if any(getattr(said, name) != getattr(log, name) for _, _, log in met):
                return f"its {name} is not what the block says that names it first"
        if (row.shard, row.first_at) not in {(shard, at) for shard, at, _ in met}:
            return "its shard, or when it was first heard of, is not that of the block that names it first"
        last_at = self._found.last_at.get(said.log_id, 0)
        is_here = self._plan.counts.get(row.log, 0) and said.log_id not in self._plan.departures.going
        if row.last_at < last_at or (is_here and row.last_at != last_at):
            return "the time of its latest event is not that of its events"
        return ""

    def _strays(self, connection: Connection) -> None:
        """Events of no log, or with numbers that no block has."""
        plan, seen = self._plan, self._found.seen
        for log in sorted(plan.counts.keys() - {row.log for row in plan.logs}):
            self._add("inserted", f"{plan.counts[log]} events of a log that is not known")
        for row in plan.logs:
            if plan.counts.get(row.log, 0) <= seen.get(row.log_id, 0):
                continue
            # As of now: what was recorded since the plan was made is no stray.
            now = connection.scalar(select(logs.c.watermark).where(logs.c.log == row.log)) or 0
            above = connection.execute(select(ranges.c.first_seq, ranges.c.last_seq).where(ranges.c.log == row.log))
            recorded = RecordedSeqs(now, [(first, last) for first, last in above])
            absent = [
                (first, last)
                for first, last in connection.execute(
                    select(gaps.c.first_seq, gaps.c.last_seq).where(gaps.c.log == row.log)
                )
            ]
            seqs = connection.scalars(
                select(events.c.seq).where(events.c.log == row.log).order_by(events.c.seq),
                execution_options={"yield_per": ROWS_MAX},
            )
            for seq in seqs:
                if seq < 1 or recorded.missing(seq, seq) or overlaps(absent, seq, seq):
                    what = "no block has the event"
                    self._found.findings.add(Finding(row.shard, 0, row.log_id, seq, "inserted", what))

    def _subjects(self) -> None:
        """Who was erased, by the blocks and by the rows."""
        declared = {subject: at for at, subject in self._found.erased}
        for number, since in sorted(self._plan.erased.items()):
            if number not in declared:
                self._add("subject", f"subject {number} has no key, and no block says that it was erased")
            elif since != declared[number]:
                what = "has a key or a tag" if since is None else "says another time"
                self._add("subject", f"subject {number} was erased, and {what}")
        for number in sorted(declared.keys() - self._plan.erased.keys()):
            self._add("subject", f"subject {number} was erased by a block, and not in fact")

    def _shards(self, connection: Connection) -> None:
        found = self._found
        for row in self._plan.shards:
            end = _hash(connection, row.shard, row.blocks)
            if row.blocks and end is not None and end != bytes(row.head):
                found.findings.add(
                    Finding(row.shard, row.blocks, "", 0, "head", "the head of the chain is not its last block")
                )
            if not row.blocks and bytes(row.head) != chain.genesis(self._plan.deployment, row.shard):
                found.findings.add(Finding(row.shard, 0, "", 0, "head", "the head of an empty chain was altered"))
            if row.events != (counted := found.block_events.get(row.shard, 0)):
                what = f"the shard counts {row.events:,} events, its blocks {counted:,}"
                found.findings.add(Finding(row.shard, 0, "", 0, "head", what))
            if row.erasures != found.erasures:
                what = f"the shard counts {row.erasures:,} erasures, the blocks {found.erasures:,}"
                found.findings.add(Finding(row.shard, 0, "", 0, "head", what))

    def _departures(self, connection: Connection) -> dict[Month, bytes]:
        """Exports against the chain. Returns the digests of the sums of dropped months."""
        left = self._plan.departures
        wrong, departed = departures.held_to_chain(left, self._found.drops)
        self._report(wrong)
        if self._found.missing != left.count:
            what = f"exports say that {left.count:,} events are gone, and {self._found.missing:,} are"
            self._add("export", what)
        if departures.begun_now(connection) != left.begun:
            self._add("export", "a month began to be dropped while the ledger was verified: verify it again")
        return departed

    def _checkpoints(self, connection: Connection, verifier: Verifier | None, given: Sequence[Checkpoint]) -> int:
        plan = self._plan
        held = list(given)
        if plan.checkpoint is not None and verifier is not None:
            try:
                newest = Checkpoint.of(plan.checkpoint.document, verifier)
            except VerificationError as error:
                self._add("checkpoint", f"the newest checkpoint in the database: {error}")
            else:
                held.append(newest)
                if (plan.checkpoint.number, plan.checkpoint.at) != (newest.number, newest.at_us):
                    self._add("checkpoint", "the newest checkpoint in the database has another number or time")
        ends = {row.shard: row.blocks for row in plan.shards}
        for one in held:
            name = f"checkpoint {one.number} of ledger generation {one.generation}"
            if one.deployment != plan.deployment:
                self._add("checkpoint", f"{name} is of another deployment")
                continue
            restored = (
                f"; the ledger is of generation {plan.generation} now: it was restored from a backup since"
                if one.generation != plan.generation
                else ""
            )
            for shard, number, head in one.heads:
                end = ends.get(shard, 0)
                if number > end:
                    what = f"{name} has block {number}, and the chain ends at {end}: blocks were removed{restored}"
                    self._found.findings.add(Finding(shard, end + 1, "", 0, "checkpoint", what))
                elif _hash(connection, shard, number) != head:
                    what = f"{name} has another block {number}: it, or one before it, was rewritten{restored}"
                    self._found.findings.add(Finding(shard, number, "", 0, "checkpoint", what))
        return len(held)


def _hash(connection: Connection, shard: int, number: int) -> bytes | None:
    row = connection.execute(select(blocks).where(blocks.c.shard == shard, blocks.c.number == number)).first()
    return chain.hash_of(Block(*row)) if row is not None else None


def _gap_problem(there: tuple[str, int] | None, wanted: tuple[str, int] | None) -> str:
    if there is None:
        return "declared lost by a block, and not in the gaps"
    if wanted is None:
        return "in the gaps, and no block declares it lost, or it came after all"
    return "the gap has another reason or time than the block"


def _text(seqs: RecordedSeqs) -> str:
    parts = [f"1 to {seqs.watermark}"] if seqs.watermark else []
    parts += [f"{first} to {last}" for first, last in seqs.ranges[:10]]
    return ", ".join(parts) or "nothing"

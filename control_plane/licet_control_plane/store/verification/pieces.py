"""One piece: blocks that follow each other, their links and hashes, their events, and the root over them.

Blocks are checked in short transactions: events up to a head never change but for an erasure, which each piece sees
wholly or not at all, and for a drop, which is noticed at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection, Engine, select

from licet_control_plane.core import chain
from licet_control_plane.core.accounting import Account
from licet_control_plane.core.chain import Block, Drop, Lost, MetLog
from licet_control_plane.core.merkle import Span, hash_over, root_of, subtrees
from licet_control_plane.core.recorded import RecordedSeqs
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store import remnants
from licet_control_plane.store.schema import blocks, logs
from licet_control_plane.store.subjects import EventReader
from licet_control_plane.store.verification import rows as event_rows
from licet_control_plane.store.verification.departures import Numbers
from licet_control_plane.store.verification.plan import ROWS_MAX, Piece
from licet_control_plane.store.verification.report import FINDINGS_MAX, Finding, Findings
from licet_control_plane.store.verification.rows import Row, RowChecker


@dataclass(frozen=True, slots=True)
class Task:
    """What every piece needs to know. ``going`` may be missing, ``gone`` must be."""

    deployment: str
    going: Numbers
    gone: Numbers


@dataclass(slots=True)
class Found:
    """What the check of a piece came to. ``seen`` are rows of events by log id, ``last_at`` the latest time of them.
    ``missing`` counts events that may be. The rest is what blocks say, with shard, number, or time of the block.
    """

    events: int = 0
    blocks: int = 0
    block_events: Counter[int] = field(default_factory=Counter)
    erased_events: int = 0
    missing: int = 0
    findings: Findings = field(default_factory=Findings)
    seen: Counter[str] = field(default_factory=Counter)
    last_at: dict[str, int] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    ranges: list[tuple[int, int, chain.Range]] = field(default_factory=list)
    erased: list[tuple[int, int]] = field(default_factory=list)
    erasures: int = 0
    logs: list[tuple[int, int, MetLog]] = field(default_factory=list)
    lost: list[tuple[int, Lost]] = field(default_factory=list)
    drops: list[tuple[int, Drop]] = field(default_factory=list)
    account: Account = field(default_factory=Account)


def check(engine: Engine, piece: Piece, task: Task, ledger_key: LedgerKey | None) -> Found:
    """Check one piece."""
    with engine.connect() as connection, connection.begin():
        checker = _Checker(connection, piece, task, ledger_key)
        group: list[tuple[Block, list[chain.Range]]] = []
        size = 0
        for block, covered in checker.blocks():
            group.append((block, covered))
            size += block.events
            if size >= ROWS_MAX:
                checker.check_events(group)
                group, size = [], 0
        checker.check_events(group)
        return checker.done()


class _Checker:
    def __init__(self, connection: Connection, piece: Piece, task: Task, ledger_key: LedgerKey | None) -> None:
        self._connection = connection
        self._piece = piece
        self._task = task
        self._found = Found()
        self._reader = EventReader(connection, ledger_key)
        self._numbers: dict[str, int] = {
            row.log_id: row.log for row in connection.execute(select(logs.c.log_id, logs.c.log))
        }
        self._remnants = remnants.of_blocks(connection, piece.shard, piece.first, piece.last)
        self._rows: dict[str, RowChecker] = {}

    def blocks(self) -> Iterator[tuple[Block, list[chain.Range]]]:
        """The blocks of the piece with their ranges, once their links and hashes were looked at."""
        piece, found = self._piece, self._found
        query = select(blocks).where(
            blocks.c.shard == piece.shard, blocks.c.number.between(piece.first - 1, piece.last)
        )
        stored = {row.number: Block(*row) for row in self._connection.execute(query)}
        covered: dict[str, RecordedSeqs] = {}
        for number in range(piece.first, piece.last + 1):
            block = stored.get(number)
            if block is None:
                found.findings.add(Finding(piece.shard, number, "", 0, "removed", "the block is missing"))
                continue
            found.blocks += 1
            found.block_events[piece.shard] += block.events
            before = stored.get(number - 1)
            link = (
                chain.genesis(self._task.deployment, piece.shard)
                if number == 1
                else before.hash
                if before
                else block.previous
            )
            if block.previous != link:
                self._block_finding(number, "the block does not follow the one before it")
            if chain.hash_of(block) != block.hash:
                self._block_finding(number, "the block was altered: its hash is not that of its contents")
            try:
                ranges = self._read(block)
            except ValueError as error:
                self._block_finding(number, f"the block cannot be read: {error}")
                continue
            for one in ranges:
                cover(covered, piece.shard, number, one, found.findings)
            yield block, ranges
        for log_id, seqs in covered.items():
            below = [(1, seqs.watermark)] if seqs.watermark else []
            found.ranges += [(piece.shard, piece.last, (log_id, first, last)) for first, last in [*below, *seqs.ranges]]

    def _read(self, block: Block) -> list[chain.Range]:
        """The ranges of a block; notes what else it says.

        Raises:
            ValueError: it cannot be read.
        """
        found = self._found
        ranges = chain.ranges_of(block)
        erased = chain.erased_of(block)
        found.erasures += bool(erased)
        found.erased += [(block.at, subject) for subject in erased]
        found.logs += [(block.shard, block.at, log) for log in chain.logs_of(block)]
        found.lost += [(block.at, lost) for lost in chain.lost_of(block)]
        found.drops += [(block.at, step) for step in chain.drops_of(block)]
        return ranges

    def check_events(self, group: Sequence[tuple[Block, list[chain.Range]]]) -> None:
        """Check the events of blocks that follow each other; their rows are read together: most blocks are small."""
        rows = self._read_rows(group)
        for block, covered in group:
            before = self._found.findings.total
            gone = chain.positions(covered, self._task.going) if self._task.going else []
            leaves: list[bytes] = []
            places: list[int] = []
            offset = 0
            for log_id, first, last in covered:
                if log_id not in self._numbers:
                    self._found.findings.add(
                        Finding(block.shard, block.number, log_id, first, "log", "the log was removed or renamed")
                    )
                    continue
                mine, at = self._mine(block, log_id, first, last, rows[log_id], before)
                leaves += self._checker_of(log_id).check(block.shard, block.number, mine)
                if gone:
                    places += [offset + one for one in at]
                offset += last - first + 1
            nodes = remnants.split(self._remnants.pop(block.number, b""))
            if self._found.findings.total == before:
                self._check_root(block, covered, leaves, places, gone, nodes)

    def _read_rows(self, group: Sequence[tuple[Block, list[chain.Range]]]) -> dict[str, list[_Span]]:
        wanted: dict[str, list[tuple[int, int]]] = {}
        for _, covered in group:
            for log_id, first, last in covered:
                spans = wanted.setdefault(log_id, [])
                if spans and spans[-1][1] == first - 1:
                    spans[-1] = (spans[-1][0], last)
                else:
                    spans.append((first, last))
        return {
            log_id: [
                _Span(first, last, event_rows.read(self._connection, self._numbers[log_id], first, last))
                for first, last in spans
            ]
            for log_id, spans in wanted.items()
            if log_id in self._numbers
        }

    def _mine(
        self, block: Block, log_id: str, first: int, last: int, spans: Sequence[_Span], before: int
    ) -> tuple[list[Row], Sequence[int]]:
        """The rows of a range, and where each stands in it; names those that are missing, or there twice."""
        span = next(one for one in spans if one.first <= first and last <= one.last)
        if span.is_whole:
            return span.rows[first - span.first : last - span.first + 1], range(last - first + 1)
        found = self._found
        there = {seq: rows for seq, rows in span.by_number().items() if first <= seq <= last}
        may_go = self._task.going.get(log_id)
        lacking = last - first + 1 - len(there)
        if may_go is None or may_go.missing(first, last):
            for seq in range(first, last + 1):
                if seq in there or (may_go is not None and not may_go.missing(seq, seq)):
                    continue
                lacking -= 1
                found.findings.add(Finding(block.shard, block.number, log_id, seq, "removed", "the event is missing"))
                if found.findings.total - before > FINDINGS_MAX:
                    break  # a range without end, of a block that was altered
        found.missing += lacking
        mine: list[Row] = []
        for seq, rows in sorted(there.items()):
            if len(rows) > 1:
                found.findings.add(Finding(block.shard, block.number, log_id, seq, "inserted", "it is there twice"))
            mine.append(rows[0])
        return mine, [seq - first for seq in sorted(there)]

    def _checker_of(self, log_id: str) -> RowChecker:
        checker = self._rows.get(log_id)
        if checker is None:
            checker = self._rows[log_id] = RowChecker(
                log_id,
                self._reader,
                findings=self._found.findings,
                account=self._found.account,
                uncounted=self._task.going.get(log_id),
                gone=self._task.gone.get(log_id),
            )
        return checker

    def _check_root(
        self,
        block: Block,
        covered: Sequence[chain.Range],
        leaves: Sequence[bytes],
        places: Sequence[int],
        gone: Sequence[Span],
        nodes: Sequence[bytes],
    ) -> None:
        """Check the tree of a block in which every event fits itself: columns, public part, and personal part if open.
        Of events that left the ledger, what is kept of the tree stands for them: ``nodes``; then ``places`` says which
        leaves are here."""
        count = sum(last - first + 1 for _, first, last in covered)
        if count != block.events:
            self._block_finding(block.number, f"the block counts {block.events} events, and its ranges {count}")
            return
        spans = subtrees(count, gone)
        if spans == [(0, count)] and not nodes:
            return  # nothing of it is here, and its root is in its hash
        if not gone:
            root = root_of(leaves) if not nodes else b""
        elif len(spans) == len(nodes):
            known = {(at, at + 1): leaf for at, leaf in zip(places, leaves, strict=True)}
            known |= zip(spans, nodes, strict=True)
            root = hash_over(0, count, known)
        else:
            root = b""
        if root == block.root:
            return
        # So another one was put in the place of one of these, whole; or one was altered whose personal part is erased,
        # or closed to this reader.
        log_id, first, last = covered[0] if covered else ("", 0, 0)
        what = (
            f"an event of this block was altered, or the root of the block: the root over events {first} to {last}"
            + (f" and {len(covered) - 1} more ranges" if len(covered) > 1 else "")
            + " is another"
            + (", or what is kept of those that were dropped was altered" if gone or nodes else "")
        )
        self._found.findings.add(Finding(block.shard, block.number, log_id, first, "altered", what))

    def _block_finding(self, number: int, what: str) -> None:
        self._found.findings.add(Finding(self._piece.shard, number, "", 0, "block", what))

    def done(self) -> Found:
        """What was found."""
        found = self._found
        for number in self._remnants:
            self._block_finding(number, "something is kept of its tree, and none of its events was dropped")
        for log_id, checker in self._rows.items():
            found.events += checker.events
            found.erased_events += checker.erased_events
            found.seen[log_id] = checker.events
            found.last_at[log_id] = checker.last_at
            found.unread |= checker.unread
        return found


class _Span:
    """Rows of one log's numbers ``first`` to ``last``."""

    def __init__(self, first: int, last: int, rows: list[Row]) -> None:
        self.first = first
        self.last = last
        self.rows = rows
        self.is_whole = event_rows.is_whole(rows, first, last)
        self._by_number: dict[int, list[Row]] | None = None

    def by_number(self) -> dict[int, list[Row]]:
        """The rows by their number."""
        if self._by_number is None:
            self._by_number = event_rows.by_number(self.rows)
        return self._by_number


def cover(covered: dict[str, RecordedSeqs], shard: int, number: int, one: chain.Range, findings: Findings) -> None:
    """Note that a block (or one up to it) has a range, which no other may have."""
    log_id, first, last = one
    seqs = covered.setdefault(log_id, RecordedSeqs())
    if seqs.missing(first, last) != [(first, last)]:
        what = "a block has events that a block before it has too"
        findings.add(Finding(shard, number, log_id, first, "block", what))
    seqs.add(first, last)

"""A seeded simulation of sidecars that share a rate, and of a network, crashes and clocks between them.

Real: ``LeaseBook``, ``RateShare`` and the bucket's arithmetic. Modeled: the script (``FakeRegisters``). *What is
checked*, at every approval: over any stretch of time the units approved by all together are at most rate * time +
burst. That is what a bucket of ``burst`` units, which is full at first and fills at the rate, would let through, so
the simulation keeps one and takes from it.

Rate and burst are changed in flight. While a change spreads, each sidecar keeps to the terms it knows: the bucket then
fills at the highest of the rates that anybody knows, and holds as much as their bursts together. Once the last has
heard, it holds what the new terms say.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Final

from licet.domain.entitlements import RATE_SCALE
from licet.domain.ids import LimitKey
from licet.domain.windows import FOREVER_S
from licet.wire.registers import Pair
from licet_sidecar.core.lease import TOKENS_EACH, Kind, RateShare, Terms
from licet_sidecar.core.leases import LeaseBook, TenantLeases
from licet_sidecar.core.settling import Outcome, SettleAnswer, SettleCall
from tests.support.fake_lease_store import FakeRegisters, Rule

TENANT: Final = "acme"
LIMIT: Final = LimitKey("calls:second.rate")
START_MS: Final = 1_800_000_000_000
STEPS: Final = 1_500
PAIR: Final = Pair(1, "run1")


class Violation(AssertionError):
    """More was approved than the rate allows, or a sidecar that asks alone cannot have what there is."""


@dataclass(slots=True)
class Node:
    """One sidecar: its process, and how its boot clock relates to the world's."""

    name: str
    book: LeaseBook
    offset_ms: int
    incarnation: int = 1
    cut_until_ms: int = 0
    ticked_ms: int = 0
    terms: Terms = field(init=False)
    revision: int = 0

    @property
    def held(self) -> TenantLeases:
        return self.book.of(TENANT)


@dataclass(slots=True)
class RateWorld:
    """Everything, and the seeded choice of what happens next."""

    seed: int
    without: frozenset[Rule] = frozenset()
    share: type[RateShare] = RateShare
    book_of: type[LeaseBook] = LeaseBook
    changing: bool = True
    """Whether the terms change in flight."""
    random: random.Random = field(init=False)
    registers: FakeRegisters = field(init=False)
    nodes: list[Node] = field(init=False)
    network: list[tuple[Node, int, SettleCall, SettleAnswer | None]] = field(default_factory=list)
    now_ms: int = START_MS
    approved: int = 0
    bucket: int = 0
    filled_ms: int = START_MS
    terms: Terms = field(init=False)
    """As last published."""
    revision: int = 1
    changes: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.terms = self.some_terms()
        self.bucket = self.terms.burst * TOKENS_EACH
        self.registers = FakeRegisters(now_ms=START_MS, without=self.without)
        assert self.registers.begin(TENANT, 1)
        assert self.registers.open(TENANT, PAIR, 1, {LIMIT: self.terms.amount})
        self.nodes = []
        for number in range(self.random.randint(1, 4)):
            node = Node(f"s{number}", self.book_of(1), self.random.randrange(10**9))
            self.nodes.append(node)
            self.begin(node)

    def some_terms(self) -> Terms:
        amount = self.random.choice([1, 5, 40])
        return Terms(amount * RATE_SCALE, Kind.RATE, burst=self.random.choice([amount, 2 * amount, 10]))

    def begin(self, node: Node) -> None:
        node.terms, node.revision = self.terms, self.revision
        node.held.pair = PAIR
        node.book.live = len(self.nodes) or 1

    def run(self) -> None:
        for _ in range(STEPS):
            self.step()
        self.share_alone()

    def step(self) -> None:
        node = self.random.choice(self.nodes)
        action = self.random.choices(
            [
                *(self.do_check, self.do_upkeep, self.do_deliver, self.do_time, self.do_cut, self.do_crash),
                *(self.do_head, self.do_change, self.do_hear),
            ],
            [30, 12, 30, 14, 0.5, 0.5, 2, 0.3, 3],
        )[0]
        action(node)

    def boot_ms(self, node: Node) -> int:
        return self.now_ms + node.offset_ms

    def share_of(self, node: Node) -> RateShare:
        """As the engine gets it, under the terms that the sidecar knows; made anew when it was dropped meanwhile."""
        if (LIMIT, "") not in node.held.leases:
            node.held.leases[(LIMIT, "")] = self.share(LIMIT, "", 0, FOREVER_S, node.terms)
        share = node.book.lease(node.held, LIMIT, "", 0, FOREVER_S, node.terms, self.boot_ms(node))
        assert isinstance(share, RateShare)
        return share

    def do_time(self, node: Node) -> None:
        self.now_ms += self.random.choice([1, 10, 100, 100, 500, 1_000, 1_000, 20_000, 80_000])
        self.registers.now_ms = self.now_ms

    def do_cut(self, node: Node) -> None:
        node.cut_until_ms = self.now_ms + self.random.choice([1_000, 30_000, 70_000, 100_000])

    def do_crash(self, node: Node) -> None:
        node.incarnation += 1
        node.book = self.book_of(node.incarnation)
        self.fill()
        self.begin(node)
        self.bucket = min(self.bucket, self.full())

    def do_head(self, node: Node) -> None:
        """News of how many there are, right or not."""
        node.book.live = self.random.randint(1, len(self.nodes))

    def do_change(self, node: Node) -> None:
        """Another rate, another burst; not before everybody has heard of the last."""
        if self.changing and all(one.revision == self.revision for one in self.nodes):
            self.fill()
            self.terms = self.some_terms()
            self.revision += 1
            self.changes += 1
            assert self.registers.publish_limits(TENANT, self.revision, {LIMIT: self.terms.amount}) == "OK"

    def do_hear(self, node: Node) -> None:
        if node.revision != self.revision:
            self.fill()
            node.terms, node.revision = self.terms, self.revision
            self.share_of(node)
            self.bucket = min(self.bucket, self.full())

    def do_check(self, node: Node) -> bool:
        """As the engine decides: takes from the bucket, or says what it would need."""
        units = self.random.choice([1, 1, 1, 2, node.terms.burst])
        share, boot_ms = self.share_of(node), self.boot_ms(node)
        if share.level(boot_ms) >= units * TOKENS_EACH:
            share.take(units, boot_ms)
            self.take(units)
            return True
        if units > share.burst or LeaseBook.known_short(share, units, boot_ms):
            share.refused(units)
        elif boot_ms >= share.hold_until_ms or share.wait_ms(units, boot_ms) is None:
            node.book.need(node.held, share, units)
            self.call(node)
        else:
            share.refused(units)
        return False

    def take(self, units: int) -> None:
        self.fill()
        self.bucket -= units * TOKENS_EACH
        self.approved += units
        if self.bucket < 0:
            raise Violation(f"{-self.bucket / TOKENS_EACH} more than the rate were approved")

    def known(self) -> set[Terms]:
        """All terms that somebody goes by."""
        return {self.terms, *(node.terms for node in self.nodes)}

    def full(self) -> int:
        return sum(terms.burst for terms in self.known()) * TOKENS_EACH

    def fill(self) -> None:
        rate = max(terms.amount for terms in self.known())
        self.bucket = min(self.full(), self.bucket + rate * (self.now_ms - self.filled_ms))
        self.filled_ms = self.now_ms

    def do_upkeep(self, node: Node) -> None:
        boot_ms = self.boot_ms(node)
        if boot_ms - node.ticked_ms >= 1_000:
            elapsed_s = (boot_ms - node.ticked_ms) / 1_000 if node.ticked_ms else 1.0
            node.ticked_ms = boot_ms
            if node.book.tick(node.held, self.now_ms // 1_000, boot_ms, elapsed_s) or node.held.outstanding:
                self.call(node)

    def call(self, node: Node) -> None:
        call = node.held.outstanding or node.book.begin_call(
            node.held, revision=node.revision, boot_ms=self.boot_ms(node)
        )
        if call is not None and self.now_ms >= node.cut_until_ms and self.random.random() < 0.9:
            self.network.append((node, node.incarnation, call, None))

    def do_deliver(self, node: Node) -> None:
        if self.network:
            self.deliver(self.random.randrange(len(self.network)))

    def deliver(self, position: int) -> None:
        node, incarnation, call, answer = self.network.pop(position)
        if answer is None:
            answer = self.registers.settle(node.name, incarnation, call, node.book.live)
            self.network.append((node, incarnation, call, answer))
            if self.random.random() < 0.1:
                self.network.append((node, incarnation, call, None))
            return
        if self.now_ms < node.cut_until_ms or node.incarnation != incarnation:
            return
        outcome = node.book.end_call(node.held, call, answer, self.boot_ms(node))
        if outcome is Outcome.RECALL:
            for other in self.nodes:
                if other is not node and self.now_ms >= other.cut_until_ms and self.share_of(other).cap:
                    self.share_of(other).wanted = True
                    self.call(other)
        elif outcome in (Outcome.REPLACED, Outcome.ASK_CONTROL_PLANE):
            raise Violation(f"{node.name} was answered {answer.status.name}")

    def share_alone(self) -> None:
        """The others are silent for good: in the end one that asks for all of the rate has all of it."""
        node = self.nodes[0]
        self.do_hear(node)
        self.network.clear()
        node.cut_until_ms = 0
        for _ in range(120):
            self.now_ms += 1_000
            self.registers.now_ms = self.now_ms
            share = self.share_of(node)
            share.refused(2 * self.terms.amount // RATE_SCALE)
            self.do_check(node)
            self.do_upkeep(node)
            while self.network:
                self.deliver(0)
        if self.share_of(node).cap < self.terms.amount:
            raise Violation(f"{node.name} has {self.share_of(node)} of {self.terms.amount} though it is alone")

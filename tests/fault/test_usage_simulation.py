"""Every answered event is billed once under every fault at once, and the proof that each rule is needed.

``LICET_SIM_SEEDS`` says how many histories to run (``make sim SEEDS=1000``). A failure names its seed, with the end of
its trace.
"""

from __future__ import annotations

from typing import Any, Final

import pytest

from licet_sidecar.core.delivery import Acknowledgement, Delivery
from tests.fault.usage_simulation import Rule, UsageSimulation, Violation
from tests.support.seeds import batches

SEEDS_EACH: Final = 50
ABLATION_SEEDS: Final = 600


@pytest.mark.parametrize("seeds", batches(SEEDS_EACH), ids=lambda seeds: seeds.start)
def test_every_answered_event_is_billed_once_or_its_loss_declared(seeds: range) -> None:
    answered = billed = 0
    for seed in seeds:
        simulation = UsageSimulation(seed)
        simulation.run()
        answered += len(simulation.answered)
        billed += sum(simulation.ledger.billed.values())
    assert len(seeds) == 1 or (answered > 20 * len(seeds) and billed > 0.8 * answered)  # else little was tried


class NeverResends(Delivery):
    """Rule 1."""

    def resend_if_stuck(self, boot_ms: int) -> int:
        """See ``Delivery``."""
        return 0


class BelievesAnyGeneration(Delivery):
    """Rule 2: takes the word of the ledger before its restore."""

    def acknowledged(self, ack: Acknowledgement, written: int, held: int | None, boot_ms: int) -> bool:
        """See ``Delivery``."""
        self.generation = self.newest = min(self.generation, ack.generation)
        return super().acknowledged(ack, written, held, boot_ms)


class KeepsWhatWasAcknowledged(Delivery):
    """Rules 3 and 6: a restored ledger is not given again what it lost."""

    def acknowledged(self, ack: Acknowledgement, written: int, held: int | None, boot_ms: int) -> bool:
        """See ``Delivery``."""
        acked, shipped = self.acked, self.shipped
        taken = super().acknowledged(ack, written, held, boot_ms)
        self.acked, self.shipped = max(acked, self.acked), max(shipped, self.shipped)
        return taken

    def ledger_began(self, generation: int, boot_ms: int) -> None:
        """See ``Delivery``."""


class AssumesWhatWasDeletedIsThere(Delivery):
    """Rule 4."""

    def acknowledged(self, ack: Acknowledgement, written: int, held: int | None, boot_ms: int) -> bool:
        """See ``Delivery``."""
        if not self.generation:
            self.generation = ack.generation
        return super().acknowledged(ack, written, held, boot_ms)


class TakesWhatIsSaidToBeLost(Delivery):
    """Rule 5."""

    def acknowledged(self, ack: Acknowledgement, written: int, held: int | None, boot_ms: int) -> bool:
        """See ``Delivery``."""
        return super().acknowledged(ack, written, None, boot_ms)


def _breaks(says: str, *, seeds: int = ABLATION_SEEDS, **ablation: Any) -> bool:
    """Whether one of so many histories ends with a violation that says so."""
    for seed in range(seeds):
        try:
            UsageSimulation(seed, **ablation).run()
        except Violation as violation:
            if says in str(violation).partition("\n")[0]:
                return True
    return False


@pytest.mark.parametrize(
    ("delivery", "says"),
    [
        (NeverResends, "not in the ledger"),
        (BelievesAnyGeneration, "not in the ledger"),
        (KeepsWhatWasAcknowledged, "not in the ledger"),
        (AssumesWhatWasDeletedIsThere, "never comes to an end"),
        (TakesWhatIsSaidToBeLost, "the log has them"),
    ],
)
def test_each_rule_of_delivery_is_needed(delivery: type[Delivery], says: str) -> None:
    assert _breaks(says, delivery=delivery)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (Rule.DELETED_WHEN_ACKNOWLEDGED, "not in the ledger"),
        (Rule.ACKS_ARE_SIGNED, "not in the ledger"),
        (Rule.LOSSES_ARE_DECLARED, "never comes to an end"),
        (Rule.NUMBERS_TELL_WHAT_IS_RECORDED, "times"),
        (Rule.BILLED_IS_WHAT_IS_INSERTED, "times"),
        (Rule.WHAT_COMES_AFTER_ALL_IS_TAKEN, "the log has them"),
        (Rule.RECORDED_IS_NOT_LOST, "are recorded and not billed"),
        (Rule.HEADS_TELL_THE_GENERATION, "in the ledger"),
        (Rule.BATCHES_LEAVE_THE_STREAM_AFTER_THE_COMMIT, "not in the ledger"),
    ],
)
def test_each_rule_around_it_is_needed(rule: Rule, says: str) -> None:
    assert _breaks(says, without=frozenset({rule}))


def test_a_number_is_not_used_twice_when_either_of_two_rules_holds() -> None:
    # After a power loss a process that went on in the same log would use numbers again that it had shipped.
    new_logs, only_synced = Rule.A_START_BEGINS_A_NEW_LOG, Rule.ONLY_SYNCED_IS_SHIPPED
    assert _breaks("two contents", without=frozenset({new_logs, only_synced}))
    for rule in (new_logs, only_synced):
        assert not _breaks("two contents", seeds=100, without=frozenset({rule}))

"""What comes out of deciding: a decision, or what is missing for one. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from licet.domain.catalog import AttributeValue
from licet.domain.flags import Variant
from licet.domain.money import AMOUNT_NANOS_MAX, Price
from licet.domain.outcomes import Effect, Reason
from licet_sidecar.core.lease import Lease, RateShare

_NOTHING: Final[dict[str, Any]] = {}


Prices = tuple[tuple[str, Price, str], ...]
"""Feature, price, and the attribute that picks the amount (empty for none)."""


Variants = tuple[tuple[str, Variant], ...]
"""A flag's name, and the variant that it serves."""


class Decision:
    """What was decided. ``units`` are the units asked, by feature; ``spends`` what is to be taken from which lease.

    ``effect`` and ``reason`` are the real decision; ``observed`` says that the caller is answered APPROVED anyway.
    """

    __slots__ = (
        "access_request_id",
        "context",
        "cost_nanos",
        "counted",
        "currency",
        "degraded",
        "effect",
        "exposures",
        "feature_costs",
        "grace_until_s",
        "message",
        "observed",
        "overage",
        "overridden",
        "priced_as",
        "prices",
        "rates",
        "reason",
        "retry_after_s",
        "rule",
        "shadow",
        "spends",
        "stale",
        "units",
        "variants",
    )

    def __init__(self, effect: Effect, reason: Reason, message: str = "", rule: str = "") -> None:
        self.effect = effect
        self.reason = reason
        self.message = message
        self.rule = rule
        self.units: Mapping[str, int] = _NOTHING
        self.cost_nanos = 0
        self.currency = ""
        self.feature_costs: Mapping[str, int] = _NOTHING
        """What each feature costs, when several do."""
        self.context: Mapping[str, AttributeValue] = _NOTHING
        """The declared attributes as they are recorded."""
        self.prices: Prices = ()
        """What the license says the action's features cost."""
        self.priced_as: Mapping[str, str] = _NOTHING
        """By feature, the value of its price's attribute, where that has a price of its own."""
        self.exposures: Mapping[str, str] = _NOTHING
        """The variant of each flag that was looked at; ``on`` or ``off`` where there is none."""
        self.variants: Variants = ()
        """Those of them that services are told."""
        self.spends: list[tuple[Lease, int]] = []
        self.counted: Sequence[tuple[Lease, int]] = ()
        """What is taken though no lease may cover it: of limits in shadow; in observe mode, of limits that denied."""
        self.rates: list[tuple[RateShare, int]] = []
        """What is to be taken from buckets; never given back, never recorded."""
        self.overage: Mapping[str, int] = _NOTHING
        """By quota, how much of a spend lies beyond a soft limit, as far as is known here."""
        self.shadow: Sequence[str] = ()
        self.retry_after_s: float = 0
        self.access_request_id = ""
        """The request that waits for people, that they denied, or whose approval allowed this."""
        self.overridden = False
        """Denied by an override, which also holds where everything else is only observed."""
        self.grace_until_s = 0
        """When the license, whose term has ended, stops answering; 0 in its term."""
        self.observed = False
        self.stale = False
        self.degraded = False


@dataclass(frozen=True, slots=True)
class LoadWait:
    """The tenant's license is not here: load it, then decide again."""

    tenant: str


@dataclass(frozen=True, slots=True)
class LeaseWait:
    """Leases ran dry: acquire, then decide again. ``needs`` are the units that must be free in each."""

    tenant: str
    needs: tuple[tuple[Lease, int], ...]


@dataclass(frozen=True, slots=True)
class BucketWait:
    """The share of a rate is new and its bucket still filling: decide again then."""

    wait_ms: int


Wait = LoadWait | LeaseWait | BucketWait


def add_cost(decision: Decision) -> None:
    """Adds what the units cost. One currency: the first; ``cost`` is for information, an invoice counts units.

    And which value picked the price of what is priced by an attribute, for the invoice.
    """
    costs: dict[str, int] = {}
    for feature, price, attribute in decision.prices:
        asked = decision.units.get(feature)
        if not asked:
            continue
        value = ""
        if attribute:
            by = decision.context.get(attribute, "")
            value = by if type(by) is str else str(by)
            if value in price.amounts_nanos:
                decision.priced_as = {**decision.priced_as, feature: value}
        if not costs or decision.currency == price.currency:
            nanos = price.cost_nanos(asked, value)
            costs[feature] = nanos if nanos <= AMOUNT_NANOS_MAX else AMOUNT_NANOS_MAX
            decision.currency = price.currency
    if costs:
        total = sum(costs.values())
        decision.cost_nanos = total if total <= AMOUNT_NANOS_MAX else AMOUNT_NANOS_MAX
        if len(costs) > 1:
            decision.feature_costs = costs

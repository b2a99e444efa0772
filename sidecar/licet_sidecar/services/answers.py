"""From decisions to encoded ``CheckResponse`` messages.

An answer is put together from encoded pieces: protobuf defines the concatenation of encoded messages as their merge,
so what answers have in common (revision, age, effect and reason, the unchanging part of a quota) is encoded once.
Building the message object for every answer would cost more than deciding.
Source: https://protobuf.dev/programming-guides/encoding/#last-one-wins (fields may be split over several encodings).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from licet.domain.entitlements import RATE_SCALE
from licet.domain.flags import VALUE_KEY, VARIANT_KEY, Variant
from licet.domain.outcomes import Effect, Reason
from licet.domain.windows import FOREVER_S
from licet.v1 import approval_pb2 as pb
from licet_sidecar.core.decision import Decision
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.lease import TOKENS_EACH, Kind, Lease, RateShare, Terms
from licet_sidecar.services.link import LinkState

_DECISION_ID_TAG: Final = b"\x0a\x20"  # field 1, 32 bytes
_QUOTAS_TAG: Final = b"\x52"  # field 10, length-delimited
_REMAINING_TAG: Final = b"\x20"  # field 4 of QuotaState, varint
_OVERAGE: Final = b"\x30\x01"  # field 6 of QuotaState, true
_COST_TAG: Final = b"\x5a"  # field 11, length-delimited
_AMOUNT_TAG: Final = b"\x08"  # field 1 of Cost, varint
_APPROVED: Final = Effect.APPROVED
_REASONS: Final = max(Reason) + 1
_QUOTA_FRAGMENTS_MAX: Final = 50_000
_VARIANT_FRAGMENTS_MAX: Final = 10_000
"""More than the flags of a bundle have; those of earlier bundles are let go."""


class Answers:
    """Encodes answers. Owned by one event loop."""

    def __init__(self, engine: Engine, link: LinkState) -> None:
        self._engine = engine
        self._link = link
        self._state_key: tuple[int, int, bool, bool] = (-1, -1, False, False)
        self._state = b""
        self._outcomes: dict[int, bytes] = {}
        self._quotas: dict[str, tuple[Terms, bytes]] = {}
        self._variants: dict[tuple[str, Variant], bytes] = {}
        self._currencies: dict[str, bytes] = {}  # as many as the catalog has

    def encode(self, decision: Decision, decision_id: str) -> bytes:
        """The answer to a decision. ``decision_id``: 32 hex digits, or empty when it was not recorded."""
        engine = self._engine
        degraded = decision.degraded or not self._link.up
        key = (engine.revision, engine.as_of_us, decision.stale, degraded)
        if key != self._state_key:
            self._state_key = key
            self._state = _encode_state(*key)
        effect = _APPROVED if decision.observed else decision.effect
        number = effect * _REASONS + decision.reason
        outcome = self._outcomes.get(number)
        if outcome is None:
            outcome = pb.CheckResponse(
                effect=pb.Effect.ValueType(effect), reason=pb.Reason.ValueType(decision.reason)
            ).SerializeToString()
            self._outcomes[number] = outcome
        parts = [outcome, self._state]
        if decision_id:
            parts.append(_DECISION_ID_TAG)
            parts.append(decision_id.encode())
        for lease, _ in decision.spends:
            self._quota(lease, parts, lease.quota in decision.overage)
        for share, _ in decision.rates:
            self._quota(share, parts, False)
        if decision.cost_nanos:
            parts.append(self._cost(decision.cost_nanos, decision.currency))
        for flag, variant in decision.variants:
            parts.append(self._variant(flag, variant))
        # Whatever is in grace has a message, too.
        if (
            decision.message
            or decision.rule
            or decision.retry_after_s
            or decision.observed
            or decision.access_request_id
        ):
            parts.append(_encode_explanation(decision))
        return b"".join(parts)

    def _quota(self, lease: Lease, parts: list[bytes], over: bool) -> None:
        known = self._quotas.get(lease.quota)
        if known is None or known[0] is not lease.terms:
            if len(self._quotas) >= _QUOTA_FRAGMENTS_MAX:
                self._quotas.clear()
            known = self._quotas[lease.quota] = (lease.terms, self._encode_quota(lease))
        fragment = known[1]
        if lease.kind is Kind.RATE:
            remaining = varint(lease.tokens // TOKENS_EACH) if isinstance(lease, RateShare) else b"\0"
        else:
            remaining = varint(lease.left)
        if over:
            remaining += _OVERAGE
        parts.append(_QUOTAS_TAG)
        parts.append(varint(len(fragment) + 1 + len(remaining)))
        parts.append(fragment)
        parts.append(_REMAINING_TAG)
        parts.append(remaining)

    @staticmethod
    def _encode_quota(lease: Lease) -> bytes:
        return quota_state(lease.terms, lease.limit_key, lease.end).SerializeToString()

    def _variant(self, flag: str, variant: Variant) -> bytes:
        key = (flag, variant)
        fragment = self._variants.get(key)
        if fragment is None:
            if len(self._variants) >= _VARIANT_FRAGMENTS_MAX:
                self._variants.clear()
            response = pb.CheckResponse(metadata={f"{VARIANT_KEY}{flag}": variant.name})
            if variant.value:
                response.metadata[f"{VALUE_KEY}{flag}"] = variant.value
            fragment = self._variants[key] = response.SerializeToString()
        return fragment

    def _cost(self, amount_nanos: int, currency: str) -> bytes:
        text = self._currencies.get(currency)
        if text is None:
            text = self._currencies[currency] = pb.Cost(currency=currency).SerializeToString()
        amount = varint(amount_nanos)
        return b"".join((_COST_TAG, varint(1 + len(amount) + len(text)), _AMOUNT_TAG, amount, text))


def remaining_of(lease: Lease) -> int:
    """Units left in the window as last known here; of a rate, those in the bucket."""
    if isinstance(lease, RateShare):
        return lease.tokens // TOKENS_EACH
    return lease.left


def quota_state(terms: Terms, limit_key: str, end: int) -> pb.QuotaState:
    """What does not change from answer to answer. ``end`` of the window: seconds since the Unix epoch."""
    state = pb.QuotaState(
        feature=limit_key.partition(":")[0],
        window=terms.window,
        limit=terms.amount // RATE_SCALE if terms.kind is Kind.RATE else terms.amount,
        currency=terms.currency,
        grant=terms.grant,
        limit_key=limit_key.removesuffix(f"+{terms.grant}") if terms.grant else limit_key,
        scope=terms.scope,
        burst=terms.burst,
    )
    if end < FOREVER_S:
        state.resets_at.seconds = end
    return state


def varint(number: int) -> bytes:
    """Base-128 varint of a non-negative integer below 2^64."""
    if number < 0x80:
        return _SMALL[number]
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


_SMALL: Final = tuple(bytes((number,)) for number in range(0x80))


def _encode_state(revision: int, as_of_us: int, stale: bool, degraded: bool) -> bytes:
    response = pb.CheckResponse(revision=revision, stale=stale, degraded=degraded)
    response.as_of.seconds, micros = divmod(as_of_us, 1_000_000)
    response.as_of.nanos = micros * 1_000
    return response.SerializeToString()


def _encode_explanation(decision: Decision) -> bytes:
    response = pb.CheckResponse(
        message=decision.message, rule=decision.rule, access_request_id=decision.access_request_id
    )
    if decision.retry_after_s:
        seconds, rest_s = divmod(decision.retry_after_s, 1)
        response.retry_after.seconds = int(seconds)
        response.retry_after.nanos = round(1e3 * rest_s) * 1_000_000
    if decision.observed:
        response.metadata["observed_effect"] = decision.effect.name
    if decision.grace_until_s:
        ends = datetime.fromtimestamp(decision.grace_until_s, UTC)
        response.metadata["license_grace_ends_at"] = ends.isoformat().replace("+00:00", "Z")
    return response.SerializeToString()

"""Documents as people write them: one model for each kind, and its translation to ``licet.domain.catalog``.

A model sees one document alone. What needs a second document is in ``inheritance``, ``references`` and ``conditions``.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field, Strict, ValidationInfo, field_validator

from licet.domain.catalog import (
    Action,
    ApprovalChain,
    ApprovalStage,
    Attribute,
    AttributeType,
    AttributeValue,
    Durability,
    Enforcement,
    Entitlement,
    Feature,
    OnExpiry,
    OnUnavailable,
    Plan,
    Policy,
    ReservationTerms,
    Role,
    Rule,
    RuleEffect,
    UnavailableMode,
)
from licet.domain.money import Fee, Price, Step, TierMode, Tiers
from licet.domain.redaction import RecordMode
from licet_control_plane.core.documents.flags import FlagSource
from licet_control_plane.core.documents.limits import LimitSource
from licet_control_plane.core.documents.model import Source, one_of
from licet_control_plane.core.documents.scalars import (
    TEXT_CHARS_MAX,
    ActionPattern,
    Approver,
    AttributeName,
    AttributePath,
    ConditionText,
    Currency,
    FeeAmount,
    LimitName,
    Name,
    Nanos,
    PositiveUnits,
    Removal,
    Seconds,
    Text,
    refused,
)

METERS_MAX: Final = 16
"""Most meters of an action: all their limits are taken in one atomic step."""

LIMITS_MAX: Final = 16
"""Most limits of a feature in a plan, for the same reason."""

STEPS_MAX: Final = 64
"""Most steps of a tiered price: more than anybody reads on a price list."""

REMOVALS_MAX: Final = 1_000
INCLUDES_MAX: Final = 64
"""Most names that a plan leaves out and that a role includes: more is a plan, or a role, of its own."""

STAGES_MAX: Final = 16
APPROVERS_MAX: Final = 64

HEARTBEAT_S_DEFAULT: Final = 60
HEARTBEAT_S_MAX: Final = 3_600
"""A seat whose holder died is taken back after missed heartbeats; an hour is the longest that is bearable."""

SEATS_MAX: Final = 1_000_000

RESERVATION_S_MAX: Final = 7 * 86_400
"""What is reserved is withheld from everybody else: a week is the longest that is bearable."""

_INT64_MAX: Final = 2**63 - 1
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def _empty_when_null(value: Any) -> Any:
    return {} if value is None else value


class FeatureSource(Source):
    """``kind: Feature``."""

    name: Name
    unit: Annotated[Text, Field(min_length=1)] = "unit"
    title: Text = ""

    def to_domain(self) -> Feature:
        """The record both programs act on."""
        return Feature(self.name, self.unit, self.title)


class AttributeSource(Source):
    """``string``, or ``{type: string, default: "", record: hash}``."""

    type: AttributeType
    default: Any = None
    record: RecordMode = RecordMode.KEEP

    @field_validator("default")
    @classmethod
    def _default_has_the_type(cls, default: Any, info: ValidationInfo) -> AttributeValue | None:
        if default is None or "type" not in info.data:
            return None
        return _attribute_value(info.data["type"], default)

    def to_domain(self) -> Attribute:
        """The record both programs act on."""
        return Attribute(self.type, self.default, self.record)


def _attribute_value(kind: AttributeType, value: Any) -> AttributeValue:
    """A default as it travels; a timestamp becomes microseconds since the Unix epoch."""
    match kind, value:
        case (AttributeType.STRING, str()) if len(value) <= TEXT_CHARS_MAX:
            return value
        case (AttributeType.BOOL, bool()):
            return value
        case (AttributeType.INT, int()) if not isinstance(value, bool) and abs(value) <= _INT64_MAX:
            return value
        case (AttributeType.DOUBLE, int() | float()) if not isinstance(value, bool):
            if math.isfinite(number := float(value)):
                return number
        case (AttributeType.LIST, list()) if len(value) <= APPROVERS_MAX and all(isinstance(i, str) for i in value):
            return list(value)
        case (AttributeType.TIMESTAMP, str()):
            try:
                instant = datetime.fromisoformat(value)
            except ValueError:
                instant = None
            if instant is not None and instant.tzinfo is not None:
                return (instant - _EPOCH) // timedelta(microseconds=1)
    examples = {
        AttributeType.STRING: 'a text, such as ""',
        AttributeType.BOOL: "true or false",
        AttributeType.INT: "a whole number of at most 64 bits",
        AttributeType.DOUBLE: "a number",
        AttributeType.LIST: "a list of texts, such as []",
        AttributeType.TIMESTAMP: 'an instant with its offset, such as "2026-01-31T00:00:00Z"',
    }
    raise refused(f"the default {value!r} is not of type {kind.value}", f"Write {examples[kind]}.")


AttributeWritten = Annotated[
    AttributeSource,
    BeforeValidator(
        lambda written: {"type": written} if isinstance(written, str) else written,
        json_schema_input_type=AttributeSource | AttributeType,
    ),
]


class OnUnavailableSource(Source):
    """``{mode: deny}``, ``{mode: capped, units_max: 1000}`` or ``{mode: last_known, for_max: 10m}``."""

    mode: UnavailableMode = UnavailableMode.DENY
    units_max: PositiveUnits | None = None
    for_max: Seconds | None = None

    @field_validator("units_max")
    @classmethod
    def _units_belong_to_capped(cls, units_max: int | None, info: ValidationInfo) -> int | None:
        _verify_belongs(info, units_max, UnavailableMode.CAPPED, "units of each quota that one sidecar may approve")
        return units_max

    @field_validator("for_max", mode="wrap")
    @classmethod
    def _time_belongs_to_last_known(cls, value: Any, handler: Any, info: ValidationInfo) -> int | None:
        for_s_max: int | None = None if value is None else handler(value)
        _verify_belongs(info, for_s_max, UnavailableMode.LAST_KNOWN, "how long, such as 10m")
        return for_s_max

    def to_domain(self) -> OnUnavailable:
        """The record both programs act on."""
        return OnUnavailable(self.mode, self.units_max or 0, self.for_max or 0)


def _verify_belongs(info: ValidationInfo, value: int | None, owner: UnavailableMode, meaning: str) -> None:
    """A mode has exactly the bound that is its own."""
    mode = info.data.get("mode")
    if mode is owner and value is None:
        raise refused(f"'mode: {owner.value}' needs {info.field_name!r}", f"Add '{info.field_name}: …': {meaning}.")
    if mode not in (None, owner) and value is not None:
        raise refused(
            f"{info.field_name!r} is only for 'mode: {owner.value}'",
            f"Write 'mode: {owner.value}', or remove {info.field_name!r}.",
        )


class ReservationSource(Source):
    """``{expires_after: 15m, on_expiry: cancel}``."""

    expires_after: Seconds | None = None
    on_expiry: OnExpiry = OnExpiry.CANCEL

    @field_validator("expires_after", mode="wrap")
    @classmethod
    def _expires_within_a_week(cls, value: Any, handler: Any) -> int | None:
        expires_after_s: int | None = None if value is None else handler(value)
        if expires_after_s is not None and expires_after_s > RESERVATION_S_MAX:
            raise refused(f"a reservation cannot be held for {value}", "Write 7d or less.")
        return expires_after_s

    def to_domain(self) -> ReservationTerms:
        """The record both programs act on."""
        return ReservationTerms(self.expires_after or ReservationTerms().expires_after_s, self.on_expiry)


class ActionSource(Source):
    """``kind: Action``."""

    model_config = one_of("feature", "meters")

    name: Name
    meters: Annotated[dict[LimitName, Name], Field(min_length=1, max_length=METERS_MAX)] | None = None
    feature: Name | None = None
    attributes: dict[AttributeName, AttributeWritten] = Field(default_factory=dict)
    durability: Durability = Durability.LOGGED
    on_unavailable: OnUnavailableSource = OnUnavailableSource()
    reservation: ReservationSource = ReservationSource()

    @field_validator("feature")
    @classmethod
    def _one_way_to_say_it(cls, feature: str | None, info: ValidationInfo) -> str | None:
        if "meters" in info.data and (feature is None) == (info.data["meters"] is None):
            raise refused(
                "an action needs either 'feature' or 'meters'",
                "Write 'feature: reports', or, when it draws on several, 'meters: {input: llm.input_tokens, …}'.",
            )
        return feature

    def to_domain(self) -> Action:
        """The record both programs act on."""
        return Action(
            name=self.name,
            meters=self.meters or {"": self.feature or ""},
            attributes={name: attribute.to_domain() for name, attribute in self.attributes.items()},
            durability=self.durability,
            on_unavailable=self.on_unavailable.to_domain(),
            reservation=self.reservation.to_domain(),
        )


class StepSource(Source):
    """``{up_to: 1_000_000, amount: "8.00", flat: "5.00"}``; ``amounts`` are prices for values of the price's ``by``."""

    amount: Nanos
    up_to: PositiveUnits | None = None
    flat: Nanos = 0
    amounts: dict[Text, Nanos] = Field(default_factory=dict)


class TiersSource(Source):
    """``{mode: graduated, steps: […]}``."""

    mode: TierMode
    steps: Annotated[tuple[StepSource, ...], Field(min_length=1, max_length=STEPS_MAX)]

    @field_validator("steps")
    @classmethod
    def _steps_cover_every_unit_once(cls, steps: tuple[StepSource, ...]) -> tuple[StepSource, ...]:
        if steps[-1].up_to is not None:
            raise refused(
                f"nothing says what units after {steps[-1].up_to} cost", "Leave 'up_to' out of the last step."
            )
        reached = 0
        for number, step in enumerate(steps[:-1], 1):
            if step.up_to is None:
                raise refused(
                    f"step {number} has no end, so that no unit reaches the steps after it",
                    "Give every step but the last an 'up_to'.",
                )
            if step.up_to <= reached:
                raise refused(
                    f"step {number} ends at {step.up_to}, and the one before it at {reached}",
                    "Write the steps in ascending order of 'up_to'.",
                )
            reached = step.up_to
        return steps

    def to_domain(self) -> Tiers:
        """The record both programs act on."""
        return Tiers(self.mode, tuple(Step(s.up_to or 0, s.amount, s.flat, s.amounts) for s in self.steps))


class PriceSource(Source):
    """``{amount: "8.00", per_units: 1_000_000, currency: USD}``, or ``tiers`` in place of ``amount``.

    ``by`` and ``amounts`` price by an attribute; with tiers, each step has its own ``amounts``.
    """

    model_config = one_of("amount", "tiers")

    amount: Nanos | None = None
    tiers: TiersSource | None = None
    per_units: PositiveUnits = 1
    currency: Currency
    by: AttributePath | None = None
    amounts: dict[Text, Nanos] | None = None

    @field_validator("tiers", mode="wrap")
    @classmethod
    def _one_way_to_say_it(cls, value: Any, handler: Any, info: ValidationInfo) -> TiersSource | None:
        tiers: TiersSource | None = handler(value)
        if "amount" in info.data and (tiers is None) == (info.data["amount"] is None):
            raise refused(
                "a price needs either 'amount' or 'tiers'",
                "Write 'amount: \"8.00\"', or"
                ' \'tiers: {mode: graduated, steps: [{up_to: 1_000, amount: "8.00"}, {amount: "6.00"}]}\'.',
            )
        return tiers

    @field_validator("amounts")
    @classmethod
    def _by_and_amounts_together(cls, amounts: dict[str, int] | None, info: ValidationInfo) -> dict[str, int] | None:
        if not {"tiers", "by"} <= info.data.keys():
            return amounts
        tiers: TiersSource | None = info.data["tiers"]
        if tiers is not None and amounts is not None:
            raise refused("with 'tiers', each step has its own 'amounts'", "Move 'amounts' into the steps.")
        listed = amounts is not None if tiers is None else any(step.amounts for step in tiers.steps)
        if (info.data["by"] is not None) != listed:
            raise refused(
                "'by' and 'amounts' need each other",
                "'by' names the attribute, 'amounts' a price for its values; 'amount' is for every other value.",
            )
        return amounts

    def to_domain(self) -> Price:
        """The record both programs act on."""
        if self.tiers is None:
            return Price(self.amount or 0, self.per_units, self.currency, self.by or "", self.amounts or {})
        tiers = self.tiers.to_domain()
        first = tiers.steps[0]
        values = dict.fromkeys(value for step in tiers.steps for value in step.amounts_nanos)
        amounts = {value: first.amounts_nanos.get(value, first.amount_nanos) for value in values}
        return Price(first.amount_nanos, self.per_units, self.currency, self.by or "", amounts, tiers)


class EntitlementSource(Source):
    """A feature in a plan; ``{}`` grants it, unmetered."""

    price: PriceSource | None = None
    limits: Annotated[tuple[LimitSource, ...], Field(max_length=LIMITS_MAX)] = ()
    included: PositiveUnits | None = None
    seats: Annotated[int, Strict(), Field(ge=1, le=SEATS_MAX)] | None = None
    heartbeat: Seconds | None = None

    @field_validator("heartbeat", mode="wrap")
    @classmethod
    def _heartbeat_belongs_to_seats(cls, value: Any, handler: Any, info: ValidationInfo) -> int | None:
        seconds: int | None = handler(value)
        if seconds is not None and "seats" in info.data and info.data["seats"] is None:
            raise refused("'heartbeat' is for seats, and there are none", "Add 'seats', or remove 'heartbeat'.")
        if seconds is not None and seconds > HEARTBEAT_S_MAX:
            raise refused(f"the heartbeat {value!r} is longer than an hour", "Write 1h or less.")
        return seconds

    def to_domain(self, feature: str) -> Entitlement:
        """The record both programs act on."""
        return Entitlement(
            price=self.price.to_domain() if self.price else None,
            limits=tuple(limit.to_domain(feature) for limit in self.limits),
            seats=self.seats or 0,
            heartbeat_s=(self.heartbeat or HEARTBEAT_S_DEFAULT) if self.seats else 0,
            included=self.included or 0,
        )


EntitlementWritten = Annotated[
    EntitlementSource, BeforeValidator(_empty_when_null, json_schema_input_type=EntitlementSource | None)
]


class PlanSource(Source):
    """``kind: Plan``. With ``extends`` it says what is other than in that plan: ``inheritance`` puts both together."""

    name: Name
    title: Text = ""
    extends: Name | None = None
    without: Annotated[tuple[Removal, ...], Field(max_length=REMOVALS_MAX)] = ()
    fee: FeeAmount | None = None
    features: dict[Name, EntitlementWritten] | None = None

    @field_validator("without")
    @classmethod
    def _something_to_leave_out_of(cls, without: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if without and "extends" in info.data and info.data["extends"] is None:
            raise refused("'without' is only for plans that extend another", "Add 'extends: …', or remove 'without'.")
        return without

    @field_validator("features", mode="wrap")
    @classmethod
    def _features_unless_inherited(cls, value: Any, handler: Any, info: ValidationInfo) -> dict[str, Any] | None:
        if value is None and "extends" in info.data and info.data["extends"] is None:
            raise refused("'features' is missing", "Add 'features: …'.")
        features: dict[str, Any] | None = handler(value)
        return features

    def to_domain(self) -> Plan:
        """The record both programs act on, of what is written here alone."""
        features = {name: one.to_domain(name) for name, one in (self.features or {}).items()}
        return Plan(self.name, features, self.title, Fee(*self.fee) if self.fee and self.fee[0] else None)


class RuleSource(Source):
    """One rule of a policy."""

    name: Name
    effect: RuleEffect
    when: ConditionText = Field(default="", validate_default=False)
    approval: Name | None = None

    @field_validator("approval")
    @classmethod
    def _approval_belongs_to_its_effect(cls, approval: str | None, info: ValidationInfo) -> str | None:
        if approval is not None and info.data.get("effect", RuleEffect.REQUIRE_APPROVAL) != RuleEffect.REQUIRE_APPROVAL:
            raise refused(
                "'approval' is only for rules that require approval",
                "Write 'effect: require_approval', or remove 'approval'.",
            )
        return approval

    def to_domain(self) -> Rule:
        """The record both programs act on."""
        return Rule(self.name, self.effect, self.when.strip(), self.approval or "")


class PolicySource(Source):
    """``kind: Policy``."""

    name: Name
    enforcement: Enforcement = Enforcement.ENFORCE
    actions: Annotated[tuple[ActionPattern, ...], Field(min_length=1)]
    rules: Annotated[tuple[RuleSource, ...], Field(min_length=1)]

    def to_domain(self) -> Policy:
        """The record both programs act on."""
        return Policy(self.name, self.actions, tuple(rule.to_domain() for rule in self.rules), self.enforcement)


class RoleSource(Source):
    """``kind: Role``. What the roles in ``includes`` allow is added by ``inheritance``."""

    name: Name
    includes: Annotated[tuple[Name, ...], Field(max_length=INCLUDES_MAX)] = ()
    actions: tuple[ActionPattern, ...] = ()

    @field_validator("actions")
    @classmethod
    def _it_allows_something(cls, actions: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not actions and not info.data.get("includes", True):
            raise refused(
                "a role needs 'actions' or 'includes'",
                "Write 'actions: [report.*]', or name roles whose actions it has with 'includes: [analyst]'.",
            )
        return actions

    def to_domain(self) -> Role:
        """The record both programs act on, of what is written here alone."""
        return Role(self.name, self.actions)


class StageSource(Source):
    """One stage of an approval chain."""

    approvers: Annotated[tuple[Approver, ...], Field(min_length=1, max_length=APPROVERS_MAX)]
    need: Annotated[int, Strict(), Field(ge=1, le=APPROVERS_MAX)] = 1
    escalate_after: Seconds | None = None
    escalate_to: Annotated[tuple[Approver, ...], Field(max_length=APPROVERS_MAX)] = ()
    deny_after: Seconds | None = None

    @field_validator("need")
    @classmethod
    def _enough_approvers(cls, need: int, info: ValidationInfo) -> int:
        approvers = set(info.data.get("approvers", ()))
        # How many people a group or a role has is not known here.
        if approvers and all(approver.startswith("user:") for approver in approvers) and need > len(approvers):
            raise refused(
                f"{need} approvals are needed, and only {len(approvers)} can approve",
                "Name more approvers, or need fewer.",
            )
        return need

    @field_validator("escalate_to")
    @classmethod
    def _escalation_is_whole(cls, escalate_to: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if "escalate_after" in info.data and (info.data["escalate_after"] is None) == bool(escalate_to):
            raise refused("'escalate_after' and 'escalate_to' need each other", "Write both, or neither.")
        return escalate_to

    @field_validator("deny_after", mode="wrap")
    @classmethod
    def _denied_after_the_escalation(cls, value: Any, handler: Any, info: ValidationInfo) -> int | None:
        deny_after_s: int | None = handler(value)
        escalate_after_s = info.data.get("escalate_after")
        if deny_after_s is not None and escalate_after_s is not None and deny_after_s <= escalate_after_s:
            raise refused(
                "'deny_after' is not later than 'escalate_after'", "Give those it escalates to time to answer."
            )
        return deny_after_s

    def to_domain(self) -> ApprovalStage:
        """The record both programs act on."""
        return ApprovalStage(
            self.approvers, self.need, self.escalate_after or 0, self.escalate_to, self.deny_after or 0
        )


class ApprovalChainSource(Source):
    """``kind: ApprovalChain``."""

    name: Name
    stages: Annotated[tuple[StageSource, ...], Field(min_length=1, max_length=STAGES_MAX)]

    def to_domain(self) -> ApprovalChain:
        """The record both programs act on."""
        return ApprovalChain(self.name, tuple(stage.to_domain() for stage in self.stages))


DocumentSource = (
    FeatureSource | ActionSource | PlanSource | PolicySource | RoleSource | FlagSource | ApprovalChainSource
)

SOURCE_OF_KIND: Final[dict[str, type[DocumentSource]]] = {
    "Feature": FeatureSource,
    "Action": ActionSource,
    "Plan": PlanSource,
    "Policy": PolicySource,
    "Role": RoleSource,
    "Flag": FlagSource,
    "ApprovalChain": ApprovalChainSource,
}

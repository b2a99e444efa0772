"""A flag as people write it: a switch, a time, targeting, a rollout that may grow by schedule, and variants."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from itertools import pairwise
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, Strict, StrictBool, ValidationInfo, field_validator

from licet.domain.flags import OFF, ON, Flag, RolloutStep, Target, Variant
from licet_control_plane.core.documents.model import Source
from licet_control_plane.core.documents.scalars import ConditionText, Name, refused

VARIANTS_MAX: Final = 16
"""Most variants of a flag: each costs a hash wherever somebody's is found out."""

WEIGHT_MAX: Final = 1_000_000
VALUE_BYTES_MAX: Final = 1_024
"""Of a variant's value as JSON: it is in every answer."""

STEPS_MAX: Final = 64
TARGETS_MAX: Final = 64
"""Most targeting rules of a flag: a check may have to ask all of them."""

_YEARS: Final = range(1971, 10_000)


def _instant_s(value: Any) -> int:
    try:
        at = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        at = None
    if at is None or at.tzinfo is None or at.year not in _YEARS or at.microsecond:
        raise refused(
            f"{value!r} is not an instant",
            'Write a date, a time to the second and its offset, such as "2027-01-15T09:00:00Z".',
        )
    return int(at.astimezone(UTC).timestamp())


def _variant_value(value: Any) -> str:
    """As JSON, in the one form that equal values have."""
    if value is None or isinstance(value, list):
        raise refused(f"{value!r} cannot be a variant's value", "Write a text, a number, true or false, or a mapping.")
    if isinstance(value, float) and not math.isfinite(value):
        raise refused(f"the value {value!r} is no number that JSON knows", "Write a finite number.")
    try:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError):
        raise refused("the value cannot be written as JSON", "Use texts, numbers, true, false, and mappings.") from None
    if (size := len(text.encode(errors="surrogatepass"))) > VALUE_BYTES_MAX:
        raise refused(
            f"the value has {size:,} bytes as JSON, and {VALUE_BYTES_MAX:,} are the most: it is in every answer",
            "Shorten it, or let the service look it up by the variant's name.",
        )
    return text


Percent = Annotated[float, Strict(), Field(ge=0, le=100, allow_inf_nan=False)]
InstantForm = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Instant = Annotated[int, BeforeValidator(_instant_s, json_schema_input_type=InstantForm)]
"""Seconds since the Unix epoch."""


class RolloutSource(Source):
    """``{percent: 20, by: tenant}``."""

    percent: Percent | None = None
    by: Literal["tenant", "subject"] = "tenant"


class StepSource(Source):
    """``{at: "2027-01-15T09:00:00Z", percent: 50}``."""

    at: Instant
    percent: Percent


Weight = Annotated[int, Strict(), Field(ge=0, le=WEIGHT_MAX)]


class VariantSource(Source):
    """``50``, or ``{weight: 50, value: {toolbar: wide}}``."""

    weight: Weight = 1
    value: Annotated[
        str | None, BeforeValidator(_variant_value, json_schema_input_type=str | bool | int | float | dict[str, Any])
    ] = Field(default=None, validate_default=False)


VariantWritten = Annotated[
    VariantSource,
    BeforeValidator(
        lambda written: written if isinstance(written, dict) else {"weight": written},
        json_schema_input_type=VariantSource | Weight,
    ),
]


class TargetSource(Source):
    """``{name: staff, when: '"staff" in subject.roles', serve: canvas}``."""

    name: Name
    when: ConditionText = Field(default="", validate_default=False)
    serve: Annotated[str, Strict()]

    def to_domain(self) -> Target:
        """The record both programs act on."""
        return Target(self.name, self.serve, self.when.strip())


class FlagSource(Source):
    """``kind: Flag``."""

    name: Name
    feature: Name
    enabled: StrictBool = True
    starts: Instant | None = None
    ends: Instant | None = None
    rollout: RolloutSource = RolloutSource()
    schedule: Annotated[tuple[StepSource, ...], Field(max_length=STEPS_MAX)] = ()
    variants: Annotated[dict[Name, VariantWritten], Field(max_length=VARIANTS_MAX)] = Field(default_factory=dict)
    targeting: Annotated[tuple[TargetSource, ...], Field(max_length=TARGETS_MAX)] = ()

    @field_validator("ends")
    @classmethod
    def _ends_after_it_starts(cls, ends_s: int | None, info: ValidationInfo) -> int | None:
        starts_s = info.data.get("starts")
        if ends_s is not None and starts_s is not None and ends_s <= starts_s:
            raise refused("it ends before it starts", "Write a later 'ends', or remove one of the two.")
        return ends_s

    @field_validator("schedule")
    @classmethod
    def _steps_follow_each_other(cls, steps: tuple[StepSource, ...], info: ValidationInfo) -> tuple[StepSource, ...]:
        for number, (step, following) in enumerate(pairwise(steps), 2):
            if following.at <= step.at:
                raise refused(
                    f"step {number} is not later than the one before it", "Write the steps in ascending order of 'at'."
                )
        ends_s = info.data.get("ends")
        if ends_s is not None and steps and steps[-1].at >= ends_s:
            raise refused(
                f"step {len(steps)} comes when the flag has ended", "Write a later 'ends', or remove the step."
            )
        return steps

    @field_validator("variants")
    @classmethod
    def _variants_can_be_given_out(cls, variants: dict[str, VariantSource]) -> dict[str, VariantSource]:
        if taken := {ON, OFF} & variants.keys():
            raise refused(
                f"a variant cannot be called {min(taken)!r}: targeting means something else by it", "Rename it."
            )
        if variants and not any(variant.weight for variant in variants.values()):
            raise refused("every variant has the weight 0, so that nobody gets one", "Give one a weight.")
        return variants

    def to_domain(self) -> Flag:
        """The record both programs act on."""
        percent = self.rollout.percent
        if percent is None:  # a schedule lets people in; without one, the flag does
            percent = 0.0 if self.schedule else 100.0
        return Flag(
            self.name,
            self.feature,
            percent,
            self.rollout.by,
            enabled=self.enabled,
            starts_s=self.starts or 0,
            ends_s=self.ends or 0,
            steps=tuple(RolloutStep(step.at, step.percent) for step in self.schedule),
            variants=tuple(Variant(name, one.weight, one.value or "") for name, one in self.variants.items()),
            targeting=tuple(target.to_domain() for target in self.targeting),
        )

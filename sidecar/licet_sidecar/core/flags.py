"""What a feature flag decides about one check: switch, time, targeting, rollout, variant; the first that says, decides.

A condition that fails never lets anybody in: of a rule that serves ``off`` it counts as true, of any other as false.
It is counted (``Verdict.failed``). What is a function of names alone is in ``licet.domain.flags``. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Any, NamedTuple

from licet.domain.conditions import Condition, ConditionError, ConditionFailed
from licet.domain.flags import OFF, ON, ROLLOUT_STEPS, Flag, Target, Variant, bucket_of, includes, variant_of

Bindings = Callable[[Iterable[str]], Mapping[str, Any]]
"""Variables to the values that they have in the check; what was not sent is left out."""


class BoundTarget(NamedTuple):
    """``condition`` is ``None`` when the rule always matches; ``broken`` is why it does not compile here."""

    target: Target
    condition: Condition | None
    broken: str


class BoundFlag(NamedTuple):
    """A flag on a feature of one action. ``variables`` are those that its conditions read."""

    flag: Flag
    targets: tuple[BoundTarget, ...]
    variables: tuple[str, ...]


class Standing(NamedTuple):
    """What a holder's name alone says: the bucket, and the variant they get when they are included."""

    bucket: int
    variant: Variant | None


class Cause(Enum):
    """What decided."""

    DISABLED = auto()
    NOT_STARTED = auto()
    ENDED = auto()
    TARGETED = auto()
    ROLLOUT = auto()


class Verdict(NamedTuple):
    """What a flag serves. ``rule`` is the targeting rule that decided; ``failed`` are those whose condition failed."""

    is_on: bool
    variant: Variant | None
    cause: Cause
    rule: str = ""
    failed: tuple[str, ...] = ()

    @property
    def served(self) -> str:
        """The variant's name, ``on`` or ``off``: as events have it."""
        if not self.is_on:
            return OFF
        return self.variant.name if self.variant else ON


def bind_flag(flag: Flag, compiled: Callable[[str], Condition | ConditionError]) -> BoundFlag:
    """The flag with its conditions compiled for an action."""
    targets: list[BoundTarget] = []
    for target in flag.targeting:
        condition = compiled(target.when) if target.when else None
        broken = ""
        if isinstance(condition, ConditionError):
            condition, broken = None, str(condition)
        targets.append(BoundTarget(target, condition, broken))
    variables = {variable for one in targets if one.condition for variable in one.condition.variables}
    return BoundFlag(flag, tuple(targets), tuple(sorted(variables)))


def standing_of(flag: Flag, holder: str) -> Standing:
    """Where a holder stands in the rollout: the same every time."""
    return Standing(bucket_of(flag.name, holder), variant_of(flag, holder) if flag.variants else None)


def judge(bound: BoundFlag, standing: Standing, bindings: Bindings, now_us: int) -> Verdict:
    """What the flag serves. ``now_us``: microseconds since the Unix epoch."""
    flag, now_s = bound.flag, now_us // 1_000_000
    if not flag.enabled:
        return Verdict(False, None, Cause.DISABLED)
    if now_s < flag.starts_s:
        return Verdict(False, None, Cause.NOT_STARTED)
    if flag.ends_s and now_s >= flag.ends_s:
        return Verdict(False, None, Cause.ENDED)
    failed: tuple[str, ...] = ()
    if bound.targets:
        values = bindings(bound.variables)
        for target, condition, broken in bound.targets:
            matched, failure = _asked(condition, broken, values)
            if failure:
                failed = (*failed, target.name)
                matched = target.serve == OFF
            if matched:
                return Verdict(
                    target.serve != OFF,
                    standing.variant if target.serve == ON else flag.variant(target.serve),
                    Cause.TARGETED,
                    target.name,
                    failed,
                )
    if includes(flag.percent_at(now_s), standing.bucket):
        return Verdict(True, standing.variant, Cause.ROLLOUT, "", failed)
    return Verdict(False, None, Cause.ROLLOUT, "", failed)


def denial_message(flag: Flag, verdict: Verdict) -> str:
    """Why a flag that is off keeps the feature from somebody."""
    match verdict.cause:
        case Cause.DISABLED:
            return f"{flag.feature} is switched off."
        case Cause.NOT_STARTED:
            return f"{flag.feature} is off until {_instant(flag.starts_s)}."
        case Cause.ENDED:
            return f"{flag.feature} is off since {_instant(flag.ends_s)}."
        case Cause.TARGETED:
            failed = ", whose condition failed" if verdict.rule in verdict.failed else ""
            return f"{flag.feature} is off by the targeting rule {verdict.rule}{failed}."
        case Cause.ROLLOUT:
            return f"{flag.feature} is not rolled out to this {flag.by}."


def retry_after_s(flag: Flag, standing: Standing, verdict: Verdict, now_us: int) -> float:
    """Seconds until time alone turns the flag on; 0 when it will not, as far as is published."""
    at_s = 0
    if verdict.cause is Cause.NOT_STARTED:
        at_s = flag.starts_s
        if not includes(flag.percent_at(at_s), standing.bucket):
            at_s = flag.included_from_s(standing.bucket, at_s)
    elif verdict.cause is Cause.ROLLOUT:
        at_s = flag.included_from_s(standing.bucket, now_us // 1_000_000)
    return at_s - now_us / 1_000_000 if at_s else 0


def described(bound: BoundFlag, standing: Standing, verdict: Verdict, now_us: int) -> Iterator[str]:
    """The verdict in sentences for people, with what led to it."""
    flag = bound.flag
    serves = f"serves {verdict.served}" if flag.variants or not verdict.is_on else "is on"
    for rule in verdict.failed:
        yield f"Flag {flag.name}: the condition of the targeting rule {rule} failed."
    match verdict.cause:
        case Cause.DISABLED:
            yield f"Flag {flag.name} serves off: it is switched off (enabled: false)."
        case Cause.NOT_STARTED:
            yield f"Flag {flag.name} serves off: it starts at {_instant(flag.starts_s)}."
        case Cause.ENDED:
            yield f"Flag {flag.name} serves off: it ended at {_instant(flag.ends_s)}."
        case Cause.TARGETED:
            how = "counts as true" if verdict.rule in verdict.failed else "matches"
            yield f"Flag {flag.name} {serves}: the targeting rule {verdict.rule} {how}."
        case Cause.ROLLOUT:
            now_s = now_us // 1_000_000
            verb = "includes" if verdict.is_on else "does not include"
            served = f" and serves {verdict.served}" if verdict.is_on and flag.variants else ""
            yield (
                f"Flag {flag.name} ({flag.percent_at(now_s):g} % by {flag.by}) {verb} this {flag.by}"
                f" (bucket {standing.bucket:,} of {ROLLOUT_STEPS:,}){served}."
            )


def _asked(condition: Condition | None, broken: str, values: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a rule matches, and whether that cannot be said."""
    if condition is None:
        return True, bool(broken)
    try:
        return condition.evaluate(values), False
    except ConditionFailed:
        return False, True


def _instant(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat()

"""A bundle in the form decisions are made from: for each action, its features, roles, flags and rules, found once.

Actions are compiled when first asked for, so that the cost of a decision does not depend on how many rules there are
(only on how many apply), and a large bundle is taken in without stopping the loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from licet.domain.approvals import Override, OverrideEffect
from licet.domain.catalog import (
    Action,
    AttributeType,
    AttributeValue,
    Catalog,
    Durability,
    Enforcement,
    Flag,
    RuleEffect,
    matches,
)
from licet.domain.conditions import Condition, ConditionEnvironment, ConditionError
from licet.domain.redaction import RecordMode, hidden

ROLLOUT_STEPS: Final = 10_000
"""Resolution of a rollout's percentage: a hundredth of a percent."""


_FEW_VALUED: Final = frozenset({"tenant", "license.plan", "license.status", "subject.type", "action", "resource.type"})
_FEW_VALUED_TYPES: Final = frozenset({AttributeType.STRING, AttributeType.BOOL})


@dataclass(frozen=True, slots=True)
class BoundRule:
    """A rule that applies to an action. ``condition`` is ``None`` when it always matches.

    ``broken`` holds why the condition does not compile here: such a rule denies, as one that fails at run time does.
    """

    name: str
    effect: RuleEffect
    condition: Condition | None
    approval: str
    policy: str
    shadow: bool
    broken: str = ""


@dataclass(frozen=True, slots=True)
class BoundAction:
    """An action with everything of the bundle that applies to it.

    ``roles`` is ``None`` when no role names the action: then no role is needed. ``variables`` are those that any of
    the conditions reads.
    """

    action: Action
    roles: frozenset[str] | None
    rules: tuple[BoundRule, ...]
    flags: tuple[Flag, ...]
    variables: tuple[str, ...]
    only_meter: str | None
    """The meter that a plain ``quantity`` counts; ``None`` when there are several."""
    rulings_kept: bool
    """Whether all of ``variables`` have few values, so that ``core.rules`` remembers its rulings by them."""
    rulings: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    hides: Mapping[str, RecordMode] = field(default_factory=dict)
    """Declared attributes whose value is not recorded; empty for most actions."""
    salt: bytes = b""

    def hidden(self, declared: Mapping[str, AttributeValue]) -> dict[str, AttributeValue]:
        """What is recorded instead of the values of ``hides``."""
        return hidden(declared, self.hides, self.salt)

    def recorded(self, declared: Mapping[str, AttributeValue]) -> Mapping[str, AttributeValue]:
        """The attributes as events have them."""
        return {**declared, **self.hidden(declared)} if self.hides else declared


class Rulebook:
    """A catalog at a revision. Owned by one event loop; replaced as a whole when a new bundle arrives."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        generation: int,
        revision: int,
        observe: bool,
        salt: bytes = b"",
        overrides: tuple[Override, ...] = (),
    ) -> None:
        self.catalog = catalog
        self.overrides = overrides
        """Break glass; of those that apply, a denial wins."""
        self._salt = salt
        self.generation = generation
        self.revision = revision
        self.observe = observe
        self.levels = {
            name: action.durability
            for name, action in catalog.actions.items()
            if action.durability is not Durability.LOGGED
        }
        """Of actions whose answers wait for more than the kernel."""
        self._actions: dict[str, BoundAction] = {}
        self._environments: dict[tuple[tuple[str, str], ...], ConditionEnvironment] = {}

    def with_overrides(self, overrides: tuple[Override, ...], *, generation: int, revision: int) -> Rulebook:
        """The same catalog under other overrides. What was bound stays bound: nothing is compiled again."""
        other = Rulebook(
            self.catalog,
            generation=generation,
            revision=revision,
            observe=self.observe,
            salt=self._salt,
            overrides=overrides,
        )
        other._actions, other._environments = self._actions, self._environments
        return other

    def has_actions_of(self, other: Rulebook) -> bool:
        """Whether both differ in overrides only, so that what was bound to one is bound to the other."""
        return self._actions is other._actions

    def override(self, tenant: str, subject: str, action: str, now_us: int) -> Override | None:
        """The override that decides on what is asked, if one does."""
        found: Override | None = None
        for one in self.overrides:
            if one.applies(tenant, subject, action, now_us):
                if one.effect is OverrideEffect.DENY:
                    return one
                found = found or one
        return found

    def action(self, name: str) -> BoundAction | None:
        """The action of that name, or ``None``."""
        bound = self._actions.get(name)
        if bound is None:
            action = self.catalog.actions.get(name)
            if action is None:
                return None
            bound = self._actions[name] = self._bind(action)
        return bound

    def _bind(self, action: Action) -> BoundAction:
        roles = frozenset(role.name for role in self.catalog.roles.values() if matches(role.actions, action.name))
        features = set(action.meters.values())
        rules = tuple(self._rules_of(action))
        meters = tuple(action.meters)
        variables = tuple(sorted({v for rule in rules if rule.condition for v in rule.condition.variables}))
        return BoundAction(
            action=action,
            roles=roles or None,
            rules=rules,
            flags=tuple(flag for _, flag in sorted(self.catalog.flags.items()) if flag.feature in features),
            variables=variables,
            only_meter=meters[0] if len(meters) == 1 else None,
            rulings_kept=all(_has_few_values(action, variable) for variable in variables),
            hides={name: spec.record for name, spec in action.attributes.items() if spec.record is not RecordMode.KEEP},
            salt=self._salt,
        )

    def _rules_of(self, action: Action) -> list[BoundRule]:
        environment = self._environment(action)
        bound: list[BoundRule] = []
        for _, policy in sorted(self.catalog.policies.items()):
            if policy.enforcement is Enforcement.OFF or not matches(policy.actions, action.name):
                continue
            for rule in policy.rules:
                condition: Condition | None = None
                broken = ""
                if rule.when:
                    try:
                        condition = environment.compile(rule.when)
                    except ConditionError as error:
                        broken = str(error)
                bound.append(
                    BoundRule(
                        name=f"{policy.name}/{rule.name}",
                        effect=rule.effect,
                        condition=condition,
                        approval=rule.approval,
                        policy=policy.name,
                        shadow=policy.enforcement is Enforcement.SHADOW,
                        broken=broken,
                    )
                )
        return bound

    def _environment(self, action: Action) -> ConditionEnvironment:
        key = tuple(sorted((name, spec.type.value) for name, spec in action.attributes.items()))
        environment = self._environments.get(key)
        if environment is None:
            environment = self._environments[key] = ConditionEnvironment(action.attributes)
        return environment


def _has_few_values(action: Action, variable: str) -> bool:
    if variable.startswith("context."):
        return action.attributes[variable.removeprefix("context.")].type in _FEW_VALUED_TYPES
    return variable in _FEW_VALUED


def rollout_includes(flag: Flag, holder: str) -> bool:
    """Whether the flag's rollout includes ``holder`` (a tenant or subject id): the same answer every time."""
    digest = hashlib.blake2b(f"{flag.name}\0{holder}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % ROLLOUT_STEPS < round(flag.percent * ROLLOUT_STEPS / 100)

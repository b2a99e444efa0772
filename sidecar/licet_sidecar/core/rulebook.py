"""A bundle in the form decisions are made from: for each action, its features, roles, flags and rules, found once.

Actions are compiled when first asked for, so that the cost of a decision does not depend on how many rules there are
(only on how many apply), and a large bundle is taken in without stopping the loop. Those that are in use when a bundle
replaces another are compiled before it is in force, in small steps, and only where they changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from licet.domain.catalog import (
    Action,
    AttributeType,
    AttributeValue,
    Catalog,
    Durability,
    Enforcement,
    Policy,
    RuleEffect,
    matches,
)
from licet.domain.conditions import Condition, ConditionEnvironment, ConditionError
from licet.domain.redaction import RecordMode, hidden
from licet_sidecar.core.flags import BoundFlag, bind_flag
from licet_sidecar.core.patterns import ByPattern

_FEW_VALUED: Final = frozenset({"tenant", "license.plan", "license.status", "subject.type", "action", "resource.type"})
_FEW_VALUED_TYPES: Final = frozenset({AttributeType.STRING, AttributeType.BOOL})

_Signature = tuple[tuple[str, str], ...]
"""Names and types of the attributes that an action declares: all that a condition over it is compiled from."""


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
    flags: tuple[BoundFlag, ...]
    """The tenant's before the subject's, each by name: the order in which they are looked at."""
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

    def __init__(self, catalog: Catalog, *, generation: int, revision: int, observe: bool, salt: bytes = b"") -> None:
        self.catalog = catalog
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
        self._first_actions: dict[str, str] | None = None
        self._environments: dict[_Signature, ConditionEnvironment] = {}
        self._compiled: dict[tuple[_Signature, str], Condition | ConditionError] = {}
        self._earlier: Rulebook | None = None
        self._policies: ByPattern[Policy] | None = None

    def warmed(self, earlier: Rulebook | None) -> Iterator[None]:
        """Steps, each well under a millisecond, that bind the actions that were bound in ``earlier``.

        What is the same in both is not compiled again. Nothing depends on the steps being taken; without them an action
        is bound when it is first asked for.
        """
        if earlier is None or earlier is self:
            return
        self._earlier = earlier
        try:
            policies: ByPattern[Policy] = ByPattern()
            for _, policy in sorted(self.catalog.policies.items()):
                policies.add(policy.actions, policy)
                yield
            self._policies = policies
            for name in list(earlier._actions):
                action = self.catalog.actions.get(name)
                if action is None:
                    continue
                for policy in self._policies_of(action):
                    for rule in policy.rules:
                        if rule.when:
                            self._condition(action, rule.when)
                            yield
                self.action(name)
                yield
        finally:
            self._earlier = None

    def action(self, name: str) -> BoundAction | None:
        """The action of that name, or ``None``."""
        bound = self._actions.get(name)
        if bound is None:
            action = self.catalog.actions.get(name)
            if action is None:
                return None
            bound = self._actions[name] = self._bind(action)
        return bound

    def action_on(self, feature: str) -> BoundAction | None:
        """The first action, by name, that draws on a feature; ``None`` when there is none."""
        if self._first_actions is None:
            self._first_actions = {}
            for name, action in sorted(self.catalog.actions.items()):
                for drawn_on in action.meters.values():
                    self._first_actions.setdefault(drawn_on, name)
        return self.action(self._first_actions.get(feature, ""))

    def _bind(self, action: Action) -> BoundAction:
        roles = frozenset(role.name for role in self.catalog.roles.values() if matches(role.actions, action.name))
        rules = tuple(self._rules_of(action))
        meters = tuple(action.meters)
        variables = tuple(sorted({v for rule in rules if rule.condition for v in rule.condition.variables}))
        return BoundAction(
            action=action,
            roles=roles or None,
            rules=rules,
            flags=self._flags_of(action),
            variables=variables,
            only_meter=meters[0] if len(meters) == 1 else None,
            rulings_kept=all(_has_few_values(action, variable) for variable in variables),
            hides={name: spec.record for name, spec in action.attributes.items() if spec.record is not RecordMode.KEEP},
            salt=self._salt,
        )

    def _flags_of(self, action: Action) -> tuple[BoundFlag, ...]:
        features = set(action.meters.values())
        flags = [flag for flag in self.catalog.flags.values() if flag.feature in features]
        flags.sort(key=lambda flag: (flag.by != "tenant", flag.name))
        return tuple(bind_flag(flag, lambda source: self._condition(action, source)) for flag in flags)

    def _rules_of(self, action: Action) -> list[BoundRule]:
        bound: list[BoundRule] = []
        for policy in self._policies_of(action):
            for rule in policy.rules:
                condition = self._condition(action, rule.when) if rule.when else None
                broken = ""
                if isinstance(condition, ConditionError):
                    condition, broken = None, str(condition)
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

    def _policies_of(self, action: Action) -> list[Policy]:
        """The policies that govern an action and are not off, by name."""
        if self._policies is None:
            self._policies = ByPattern()
            for _, policy in sorted(self.catalog.policies.items()):
                self._policies.add(policy.actions, policy)
        return [policy for policy in self._policies.matching(action.name) if policy.enforcement is not Enforcement.OFF]

    def _condition(self, action: Action, source: str) -> Condition | ConditionError:
        """A condition over an action, compiled once for all actions that declare the same; or why it is none."""
        key = (_signature(action), source)
        found = self._compiled.get(key)
        if found is None:
            found = self._earlier._compiled.get(key) if self._earlier else None
            if found is None:
                try:
                    found = self._environment(action).compile(source)
                except ConditionError as error:
                    found = error.with_traceback(None)  # kept, and its frames are not
            self._compiled[key] = found
        return found

    def _environment(self, action: Action) -> ConditionEnvironment:
        key = _signature(action)
        environment = self._environments.get(key)
        if environment is None:
            environment = self._earlier._environments.get(key) if self._earlier else None
            environment = self._environments[key] = environment or ConditionEnvironment(action.attributes)
        return environment


def _signature(action: Action) -> _Signature:
    return tuple(sorted((name, spec.type.value) for name, spec in action.attributes.items()))


def _has_few_values(action: Action, variable: str) -> bool:
    if variable.startswith("context."):
        return action.attributes[variable.removeprefix("context.")].type in _FEW_VALUED_TYPES
    return variable in _FEW_VALUED

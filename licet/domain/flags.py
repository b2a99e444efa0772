"""Feature flags: who gets a feature that their plan grants, and which variant of it.

Owns the records, their wire form, and the two sticky choices: whether a rollout includes somebody (``bucket_of``) and
which variant they get (``variant_of``). Both are functions of names alone, pinned by golden tests, because whoever is
in today must be in tomorrow, in every sidecar and every version of it
(``docs/adr/0032-flags-choose-by-hash.md``). Pure.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

ON: Final = "on"
OFF: Final = "off"
"""What a flag without variants serves, and what a targeting rule can serve besides a variant."""

VARIANT_KEY: Final = "variant:"
VALUE_KEY: Final = "value:"
"""Before a flag's name in the ``metadata`` of an answer: the variant that it serves, and its value as JSON."""

ROLLOUT_STEPS: Final = 10_000
"""Resolution of a rollout's percentage: a hundredth of a percent."""

MANY_FACED_KIND: Final = "Flag/2"
"""How a flag that is more than a percentage travels. A sidecar that does not know it must not take it for a plain one:
it would turn on what is switched off, so it refuses the bundle and keeps the one it has."""

FLAG_KINDS: Final = ("Flag", MANY_FACED_KIND)


@dataclass(frozen=True, slots=True)
class Variant:
    """A version of the feature. ``weight`` is relative to those of the flag's other variants; 0: only by targeting.

    ``value`` is what services configure themselves with, as JSON; empty for none.
    """

    name: str
    weight: int = 1
    value: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """Where ``when`` (CEL; empty means always) holds, ``serve`` is served: a variant's name, ``on`` or ``off``."""

    name: str
    serve: str
    when: str = ""


@dataclass(frozen=True, slots=True)
class RolloutStep:
    """From ``at_s`` (seconds since the Unix epoch) on, ``percent`` of the holders are included."""

    at_s: int
    percent: float


@dataclass(frozen=True, slots=True)
class Flag:
    """Turns a feature on for ``percent`` of ``by`` ("tenant" or "subject"), the same ones each time.

    Decided in this order: ``enabled``; the time from ``starts_s`` to ``ends_s`` (exclusive; 0 for none); the first
    of ``targeting`` that matches; the percentage, of the last of ``steps`` (ascending) that has come, if any. Who is
    included gets one of ``variants``, if there are any.
    """

    name: str
    feature: str
    percent: float = 100.0
    by: str = "tenant"
    enabled: bool = True
    starts_s: int = 0
    ends_s: int = 0
    steps: tuple[RolloutStep, ...] = ()
    variants: tuple[Variant, ...] = ()
    targeting: tuple[Target, ...] = ()

    @property
    def is_settled(self) -> bool:
        """Whether what it serves depends on nothing but who holds it: neither on the time nor on what is asked."""
        return not self.enabled or not (self.starts_s or self.ends_s or self.steps or self.targeting)

    def percent_at(self, now_s: int) -> float:
        """The percentage in force."""
        percent = self.percent
        for step in self.steps:
            if now_s < step.at_s:
                break
            percent = step.percent
        return percent

    def included_from_s(self, bucket: int, now_s: int) -> int:
        """The first step after ``now_s`` (seconds since the Unix epoch) that includes ``bucket``; 0: there is none."""
        return next((one.at_s for one in self.steps if one.at_s > now_s and includes(one.percent, bucket)), 0)

    def variant(self, name: str) -> Variant | None:
        """The variant of that name."""
        return next((variant for variant in self.variants if variant.name == name), None)


def bucket_of(flag: str, holder: str) -> int:
    """Where a holder (a tenant's or a subject's id) stands in a flag's rollout, 0 to ``ROLLOUT_STEPS`` - 1.

    BLAKE2b of ``<flag> NUL <holder>``, 8 bytes, big-endian, modulo ``ROLLOUT_STEPS``. A percentage includes the buckets
    below it, so that one that grows keeps all that it had.
    """
    digest = hashlib.blake2b(f"{flag}\0{holder}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % ROLLOUT_STEPS


def includes(percent: float, bucket: int) -> bool:
    """Whether a percentage includes a bucket."""
    return bucket < round(percent * ROLLOUT_STEPS / 100)


def variant_of(flag: Flag, holder: str) -> Variant | None:
    """The variant that a holder gets; ``None`` when the flag has none, or none with a weight.

    Weighted rendezvous hashing: of each variant a number u between 0 and 1 is made of BLAKE2b of
    ``<flag> NUL <variant> NUL <holder>``, and the largest ln(u) / weight wins. What wins for somebody follows from the
    weights of two variants at a time, so that a changed weight moves holders only to or from that variant, and as few
    as the new shares ask for; the order of the variants, and the rollout's percentage, move nobody.
    Source: Schindelhauer and Schomaker, Weighted Distributed Hash Tables (SPAA 2005).
    """
    best: Variant | None = None
    best_score = -math.inf
    for variant in flag.variants:
        if not variant.weight:
            continue
        digest = hashlib.blake2b(f"{flag.name}\0{variant.name}\0{holder}".encode(), digest_size=8).digest()
        # 53 bits, which a double holds exactly, and half a step, so that it is never 0.
        score = math.log(((int.from_bytes(digest, "big") >> 11) + 0.5) / 2**53) / variant.weight
        if score > best_score:
            best, best_score = variant, score
    return best


def flag_to_wire(flag: Flag) -> dict[str, Any]:
    """The flag as primitives that msgpack can carry, with its kind; ``flag_from_wire`` is its inverse."""
    plain = {"kind": "Flag", "name": flag.name, "feature": flag.feature, "percent": flag.percent, "by": flag.by}
    if flag == Flag(flag.name, flag.feature, flag.percent, flag.by):
        return plain
    return plain | {
        "kind": MANY_FACED_KIND,
        "enabled": flag.enabled,
        "starts_s": flag.starts_s,
        "ends_s": flag.ends_s,
        "steps": [[step.at_s, step.percent] for step in flag.steps],
        "variants": [[variant.name, variant.weight, variant.value] for variant in flag.variants],
        "targeting": [[target.name, target.serve, target.when] for target in flag.targeting],
    }


def flag_from_wire(wire: Mapping[str, Any]) -> Flag:
    """The inverse of ``flag_to_wire``.

    Raises:
        KeyError: a field is missing.
        ValueError, TypeError: a list is longer than is known here: a newer control plane means more by it.
    """
    flag = Flag(wire["name"], wire["feature"], wire["percent"], wire["by"])
    if wire["kind"] != MANY_FACED_KIND:
        return flag
    return Flag(
        flag.name,
        flag.feature,
        flag.percent,
        flag.by,
        enabled=wire["enabled"],
        starts_s=wire["starts_s"],
        ends_s=wire["ends_s"],
        steps=tuple(RolloutStep(at_s, percent) for at_s, percent in wire["steps"]),
        variants=tuple(Variant(name, weight, value) for name, weight, value in wire["variants"]),
        targeting=tuple(Target(name, serve, when) for name, serve, when in wire["targeting"]),
    )

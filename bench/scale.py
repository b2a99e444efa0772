"""Whether size matters: decisions under many rules and tenants, a large bundle validated, pushed and taken in."""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass, replace
from typing import Final

from bench.measure import Cost, cpu_cost
from licet.domain.catalog import (
    Action,
    Attribute,
    AttributeType,
    Catalog,
    Document,
    Entitlement,
    Feature,
    License,
    Plan,
    Policy,
    Rule,
    RuleEffect,
)
from licet.wire.documents import chunk_catalog, digest_of
from licet_control_plane.core.documents import validate
from licet_control_plane.core.documents.writing import write_files
from licet_sidecar.core.decision import Decision
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.inquiry import Inquiry
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.core.rulebook import Rulebook
from licet_sidecar.core.tenant import Tenant
from licet_sidecar.entry import GC_THRESHOLDS
from licet_sidecar.services.slices import in_slices
from licet_sidecar.services.unpacking import Unpacking

RULES: Final = (10, 10_000)
TENANTS: Final = (100, 100_000)
RULES_A_POLICY: Final = 10
ACTIONS_USED: Final = 100
"""Of the large bundle, those that checks ask for while the next one is taken in."""
_DIGEST_BYTES: Final = 66
_SIGNATURE_BYTES: Final = 200
_NOW_US: Final = 1_800_000_000_000_000


@dataclass(frozen=True, slots=True)
class Scale:
    """Costs of a decision; CPU seconds; the longest that the loop was busy in one go; bytes that a sidecar reads."""

    by_rules: dict[int, Cost]
    by_tenants: dict[int, Cost]
    validate_s: float
    take_s: float
    blocked_ms: float
    changed_take_s: float
    changed_blocked_ms: float
    changed_bytes: int


def catalog(rules: int) -> Catalog:
    """A bundle of so many rules, ten to a policy and an action."""
    region = {"region": Attribute(AttributeType.STRING, ""), "level": Attribute(AttributeType.INT, 0)}
    documents: list[Document] = []
    for number in range(rules // RULES_A_POLICY):
        own = tuple(
            Rule(f"r{place}", RuleEffect.DENY, f'context.region == "x{number}-{place}" && quantity > {place}')
            for place in range(RULES_A_POLICY)
        )
        name = f"area{number % 50}.do{number}"
        documents += [
            Feature(f"f{number}"),
            Action(name, {"": f"f{number}"}, region),
            Policy(f"p{number}", (name,), own),
        ]
    features = [one.name for one in documents if isinstance(one, Feature)]
    return Catalog.of([*documents, Plan("pro", {feature: Entitlement() for feature in features})])


def run() -> Scale:
    """All of it; about a minute."""
    large = catalog(RULES[1])
    by_rules = {count: _decision_cost(_engine(catalog(count), 1), 1) for count in RULES}
    by_tenants = {count: _decision_cost(_engine(catalog(RULES[0]), count), count) for count in TENANTS}
    files = write_files(large)
    started = time.process_time()
    assert not validate(files).errors
    validate_s = time.process_time() - started
    return asyncio.run(_taken(large, by_rules, by_tenants, validate_s))


async def _taken(large: Catalog, by_rules: dict[int, Cost], by_tenants: dict[int, Cost], validate_s: float) -> Scale:
    gc.collect()  # as a sidecar begins
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    engine, unpacking = _engine(catalog(RULES[0]), 1), Unpacking()
    chunks = {digest_of(chunk): chunk for chunk in chunk_catalog(large)}
    take_s, blocked_ms = await _watched(engine, unpacking, list(chunks), chunks)
    assert engine.rulebook is not None
    for name in list(large.actions)[:ACTIONS_USED]:
        engine.rulebook.action(name)
    changed = {digest_of(chunk): chunk for chunk in chunk_catalog(_changed(large))}
    moved = sum(len(chunk) for digest, chunk in changed.items() if digest not in chunks)
    changed_take_s, changed_blocked_ms = await _watched(engine, unpacking, list(changed), changed)
    return Scale(
        by_rules,
        by_tenants,
        validate_s,
        take_s,
        blocked_ms,
        changed_take_s,
        changed_blocked_ms,
        moved + _DIGEST_BYTES * len(changed) + _SIGNATURE_BYTES,
    )


async def _watched(
    engine: Engine, unpacking: Unpacking, digests: list[str], chunks: dict[str, bytes]
) -> tuple[float, float]:
    """Takes a bundle as ``SyncService`` does. CPU seconds it took, and the most CPU milliseconds between two turns."""
    longest_s = 0.0
    done = asyncio.Event()

    async def watch() -> None:
        nonlocal longest_s
        before = time.process_time()
        while not done.is_set():
            await asyncio.sleep(0)
            now = time.process_time()
            longest_s, before = max(longest_s, now - before), now

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    started = time.process_time()
    await unpacking.unpack(digests, chunks)
    rulebook = Rulebook(unpacking.catalog(digests, chunks), generation=1, revision=2, observe=False)
    await in_slices(rulebook.warmed(engine.rulebook))
    engine.install_bundle(rulebook)
    took_s = time.process_time() - started
    await asyncio.sleep(0)
    done.set()
    await watching
    return took_s, 1_000 * longest_s


def _changed(content: Catalog) -> Catalog:
    policy = content.policies["p7"]
    first = replace(policy.rules[0], when="quantity > 12345")
    return Catalog.of([*content.documents(), replace(policy, rules=(first, *policy.rules[1:]))])


def _engine(content: Catalog, tenants: int) -> Engine:
    engine = Engine(LeaseBook(1), tenants_max=tenants, staleness_us_max=2**62)
    engine.install_bundle(Rulebook(content, generation=1, revision=1, observe=False))
    for number in range(tenants):
        engine.install_license(Tenant(License(f"t{number}", "pro"), generation=1, revision=1, document=b""))
    return engine


def _decision_cost(engine: Engine, tenants: int) -> Cost:
    """Of checks of one action by all tenants in turn; the conditions read too much to be remembered."""
    for number in range(tenants):
        assert isinstance(_ask(engine, number), Decision)  # bound from here on
    return cpu_cost(lambda number: _ask(engine, number * 7 % tenants), per_round=4_000)


def _ask(engine: Engine, number: int) -> object:
    inquiry = Inquiry(f"t{number}", "area0.do0")
    inquiry.context = {"region": "eu"}
    return engine.decide(inquiry, now_us=_NOW_US, boot_ms=1, patient=True)

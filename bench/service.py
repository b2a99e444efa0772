"""The service layer in process: from request bytes to response bytes, the log included, with no transport at all."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.measure import Cost, cpu_cost
from licet.domain.catalog import (
    Action,
    Attribute,
    AttributeType,
    Catalog,
    Entitlement,
    Feature,
    License,
    Limit,
    Plan,
    Policy,
    Rule,
    RuleEffect,
)
from licet.domain.ids import LimitKey
from licet.domain.money import Price
from licet.domain.windows import Period
from licet.v1 import approval_pb2 as pb
from licet.wire import usage
from licet.wire.signing import SigningKey, Verifier
from licet_sidecar.adapters.log_records import EVENT, frame
from licet_sidecar.adapters.usage_log import LogHeader, UsageLog
from licet_sidecar.clock import SystemClock
from licet_sidecar.core.engine import Engine
from licet_sidecar.core.leases import LeaseBook
from licet_sidecar.core.reservations import ReservationBook
from licet_sidecar.core.rulebook import Rulebook
from licet_sidecar.core.tenant import Tenant
from licet_sidecar.services.approval import ApprovalService
from licet_sidecar.services.durability import DurabilityGate
from licet_sidecar.services.idempotency import RecentAnswers
from licet_sidecar.services.link import LinkState
from licet_sidecar.services.requests import parse_check
from licet_sidecar.services.shipping import ShippingService
from licet_sidecar.services.tally import Tally

BATCH = 32
CAP = 10**15


class _NoLeasing:
    """Every lease is full; refills are not part of what is measured."""

    def refill_soon(self, tenant: str) -> None:
        """Nothing to do."""

    async def acquire(self, wait: Any, timeout_s: float) -> None:
        """Nobody waits here."""
        raise AssertionError("a check waited for a lease")


class _Synced:
    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.ready.set()
        self.problem = ""


def _catalog() -> Catalog:
    def entitlement(feature: str) -> Entitlement:
        limit = Limit(LimitKey(f"{feature}:month"), CAP, Period.MONTH)
        return Entitlement(Price(8 * 10**9, 10**6, "USD", "context.model", {"small": 10**9}), (limit,))

    four = tuple(
        Limit(LimitKey(f"llm.words:{period.value}"), CAP, period)
        for period in (Period.MONTH, Period.WEEK, Period.DAY, Period.YEAR)
    )
    features = ("llm.input_tokens", "llm.output_tokens", "llm.tokens", "reports", "llm.words")
    attributes = {"model": Attribute(AttributeType.STRING), "region": Attribute(AttributeType.STRING, "")}
    return Catalog.of(
        [
            *(Feature(name) for name in features),
            Action("report.view", {"": "reports"}),
            Action("llm.complete", {"": "llm.tokens"}),
            Action("llm.rewrite", {"": "llm.words"}),
            Action("llm.generate", {"input": "llm.input_tokens", "output": "llm.output_tokens"}, attributes),
            Plan(
                "pro",
                {
                    **{name: entitlement(name) for name in features[:3]},
                    "reports": Entitlement(),
                    "llm.words": Entitlement(entitlement("llm.tokens").price, four),
                },
            ),
            Policy(
                "embargo",
                ("llm.generate",),
                (Rule("regions", RuleEffect.DENY, 'context.region in ["xx", "yy"]'),),
            ),
        ]
    )


@contextmanager
def service() -> Iterator[tuple[ApprovalService, Engine]]:
    """A service with everything real but leasing and sync, on a log in a temporary directory."""
    with tempfile.TemporaryDirectory() as directory:
        clock = SystemClock()
        engine = Engine(LeaseBook(1), tenants_max=1_000, staleness_us_max=10**15)
        engine.install_bundle(Rulebook(_catalog(), generation=1, revision=1, observe=False))
        engine.as_of_us, engine.revision = clock.now_us(), 1
        engine.install_license(Tenant(License("acme", "pro"), generation=1, revision=1, document=b""))
        log = UsageLog(Path(directory), bytes_max=2**34)
        log.start(LogHeader("0" * 32, 1, 0, 0, bytes(8), 1), [])
        link, tally = LinkState(), Tally()
        link.succeeded()
        stand_ins: Any = (_NoLeasing(), _Synced())
        recent, shipping = (
            RecentAnswers(log, tally),
            ShippingService(log, Verifier([SigningKey.generate().public_key]), clock, tally),
        )
        gate = DurabilityGate(engine, log, shipping, link, tally)
        yield (
            ApprovalService(engine, log, clock, link, *stand_ins, recent, tally, ReservationBook(), gate),
            engine,
        )
        log.close()


def plain(number: int, action: str = "llm.complete") -> pb.CheckRequest:
    """A common check: one meter, one limit, a price, who asks, and a key that makes it repeatable."""
    subject = pb.Subject(type="user", id=f"user-{number % 100}", roles=["member"])
    return pb.CheckRequest(
        tenant="acme", subject=subject, action=action, quantity=100, idempotency_key=f"plain-{number:020d}"
    )


def four_limits(number: int) -> pb.CheckRequest:
    """The same as ``plain`` against four limits."""
    return plain(number, "llm.rewrite")


def rich(number: int) -> pb.CheckRequest:
    """The same with two meters, two limits, two attributes, a price by model and a condition."""
    request = plain(number, "llm.generate")
    request.ClearField("quantity")
    request.quantities["input"] = 900
    request.quantities["output"] = 40
    request.context["model"].string_value = "small"
    request.context["region"].string_value = "eu"
    return request


def run() -> dict[str, Cost]:
    """CPU time a check, for several kinds of checks, and a decision in batches of 32."""
    costs: dict[str, Cost] = {}
    with service() as (approval, engine):
        _fill_leases(engine)
        kinds = {
            "unmetered": lambda number: plain(number, "report.view"),
            "one limit": plain,
            "four limits": four_limits,
            "two meters, condition": rich,
        }
        for name, make in kinds.items():
            requests = [make(number).SerializeToString() for number in range(25 * 1_000)]
            costs[f"check, {name}"] = cpu_cost(
                lambda n, r=requests: approval.handle("Check", r[n], 1.0), per_round=1_000
            )
        for offset, (name, make) in enumerate(kinds.items(), 1):
            batches = [
                pb.CheckBatchRequest(
                    checks=[make(10**6 * offset + number * BATCH + place) for place in range(BATCH)]
                ).SerializeToString()
                for number in range(25 * 40)
            ]
            costs[f"decision in a batch of {BATCH}, {name}"] = cpu_cost(
                lambda n, b=batches: approval.handle("CheckBatch", b[n], 1.0), per_round=40, units=BATCH
            )
        costs["appending an event to the log, of that"] = _append_cost()
        tally = Tally()
        costs["counting, of that"] = cpu_cost(lambda _: tally.answered(1, 1, 17), per_round=5_000)
    return costs


def _append_cost() -> Cost:
    """Framing a packed event and appending it at ``logged``."""
    with tempfile.TemporaryDirectory() as directory:
        log = UsageLog(Path(directory), bytes_max=2**34)
        log.start(LogHeader("0" * 32, 1, 0, 0, bytes(8), 1), [])
        event = usage.pack_event(
            usage.UsageEvent(
                1,
                1_790_000_000_000_000,
                "acme",
                "user",
                "user-42",
                "",
                "llm.complete",
                1,
                1,
                "",
                7,
                {"llm.tokens": 100},
                800_000,
                "USD",
                0,
                "plain-00000000000000000042",
                "",
                "",
                {"model": "small"},
                [("llm.tokens:month:1788220800", 100)],
                [],
            )
        )
        cost = cpu_cost(lambda _: log.append(frame(EVENT, event), 1), per_round=2_000)
        log.close()
        return cost


def _fill_leases(engine: Engine) -> None:
    """Makes the leases that the checks will spend from, as large as they need to be."""
    clock = SystemClock()
    for make in (plain, four_limits, rich):
        engine.decide(parse_check(make(0)), now_us=clock.now_us(), boot_ms=clock.boot_ms(), patient=True)
    for held in engine.leases.tenants.values():
        for lease in held.all():
            lease.cap, lease.hold_until_ms = CAP, 10**15

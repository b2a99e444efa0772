"""The model and the real scripts, told the same random histories, give the same answers and hold the same registers.

The callers keep no rule: caps, numbers and pairs are arbitrary, so that the scripts are compared also where no sidecar
of ours would take them. A history is one seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from licet.domain.ids import LimitKey
from licet.domain.windows import FOREVER_S
from licet.wire.registers import Mark, Pair
from licet_sidecar.core.lease import Kind, Lease, RateShare, Terms
from licet_sidecar.core.settling import Ask, SettleAnswer, SettleCall
from tests.support.lease_backends import TENANT, Backend, FakeBackend, Quota, RealBackend, real_backend
from tests.support.valkey import ValkeyProcess

HISTORIES = 12
STEPS = 120
SIDECARS = ("one", "two", "three")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    process = ValkeyProcess(tmp_path_factory.mktemp("valkey"))
    process.start()
    yield process
    process.kill()


class History:
    """One random history, told to both."""

    def __init__(self, seed: int, real: RealBackend, now_s: int) -> None:
        self.random = random.Random(seed)
        self.model = FakeBackend()
        self.real = real
        self.both: tuple[Backend, Backend] = (real, self.model)
        # Around the end of a window of one limit, and two limits in the middle of theirs.
        self.leases = [
            Lease(LimitKey("a:x"), "", now_s - 3_600, now_s + 7, Terms(40)),
            Lease(LimitKey("a:x"), "", now_s + 7, now_s + 3_600, Terms(40)),
            Lease(LimitKey("b:y"), "", now_s - 3_600, now_s + 3_600, Terms(1_000)),
            Lease(LimitKey("c:z"), "ab12", now_s - 3_600, now_s + 3_600, Terms(2**53 - 1)),
            RateShare(LimitKey("e:rate"), "", 0, FOREVER_S, Terms(50_000, Kind.RATE, burst=50)),
            Lease(LimitKey("d:over"), "", now_s - 7_200, now_s - 3_600, Terms(40)),
        ]
        self.last: dict[str, SettleCall] = {}
        self.ops = dict.fromkeys(SIDECARS, 0)
        self.incarnations = dict.fromkeys(SIDECARS, 1)
        self.epoch = 1
        self.revision = 1
        self.trace: list[str] = []

    async def tell(self, step: str, method: str, *arguments: object) -> None:
        self.trace.append(f"{step} {arguments}")
        answers = [await getattr(backend, method)(*arguments) for backend in self.both]
        assert answers[0] == answers[1], self.said()

    async def step(self) -> None:
        choice = self.random.random()
        if choice < 0.7:
            await self.settle()
        elif choice < 0.85:
            await self.administer()
        elif choice < 0.87:
            await self.restart()
        elif choice < 0.93:
            await self.lose()
        else:
            await self.open()
        await self.compare()

    async def settle(self) -> None:
        sidecar = self.random.choice(SIDECARS)
        call = self.last.get(sidecar)
        if call is None or self.random.random() < 0.75:
            call = await self.new_call(sidecar)
        self.last[sidecar] = call
        live = self.random.randrange(0, 4)
        incarnation = self.incarnations[sidecar]
        self.trace.append(f"{sidecar}/{incarnation} settles {call}")
        (real,) = await self.real.store(sidecar, incarnation).settle([call], live)
        if isinstance(real, SettleAnswer):
            self.model.registers.now_ms = real.redis_ms
        (model,) = await self.model.store(sidecar, incarnation).settle([call], live)
        if isinstance(real, Exception) or isinstance(model, Exception):
            assert type(real) is type(model), self.said()
            return
        assert model == real, self.said()

    async def new_call(self, sidecar: str) -> SettleCall:
        if self.random.random() < 0.03:
            self.incarnations[sidecar] += 1
            self.ops[sidecar] = 0
        # Now and then a number is used again for other contents, or is older.
        self.ops[sidecar] = max(0, self.ops[sidecar] + self.random.choice([1, 1, 1, 1, 1, 0, -1]))
        state = await self.real.touch()
        await self.model.touch()
        pair = state[0] if state else Pair(0, "")
        if self.random.random() < 0.1:
            pair = Pair(pair.epoch + self.random.choice([-1, 1]), pair.run) if pair.epoch else Pair(1, "other")
        leases = self.random.sample(self.leases[:-1], self.random.randint(1, 3))
        if self.random.random() < 0.03:
            leases.append(self.leases[-1])
        asks = tuple([await self.new_ask(sidecar, lease) for lease in leases])
        return SettleCall(
            TENANT,
            self.ops[sidecar],
            pair,
            self.revision + self.random.choice([0, 0, 0, -1, 1]),
            asks,
            0,
            durable=self.random.random() < 0.1,
            retiring=self.random.random() < 0.05,
        )

    async def new_ask(self, sidecar: str, lease: Lease) -> Ask:
        quota = await self.real.quota(lease)
        held = quota.registers.get(sidecar) if quota else None
        g, u = (held.granted, held.used) if held else (0, 0)
        pick = self.random
        scale = pick.choice([3, 20, lease.amount])
        # Mostly what a sidecar of ours would say; sums stay below 2^53, where doubles count exactly.
        cap = pick.choice([g, g, g, g, u, max(0, g - pick.randint(0, 5)), pick.randint(0, 30)])
        used = pick.choice([u, min(cap, u + pick.randint(0, 5)), u, 0])
        reserved = pick.choice([0, 0, min(3, max(0, cap - used))])
        least = pick.choice([0, 0, 1, pick.randint(0, scale)])
        want = max(least, pick.choice([0, least, pick.randint(0, scale)]))
        amount = pick.choice([lease.amount, lease.amount, 41])
        kind = Kind.HARD
        if lease.limit_key == "c:z":
            kind = pick.choice([Kind.HARD, Kind.SOFT])
        elif lease.limit_key == "e:rate":
            kind, used, reserved = Kind.RATE, 0, 0
        return Ask(lease, cap, used, reserved, want, least, amount, kind, known=pick.random() < 0.3)

    async def administer(self) -> None:
        state = await self.real.touch()
        await self.model.touch()
        pair = state[0] if state else Pair(1, "none")
        choice = self.random.randrange(5)
        if choice == 0:
            self.epoch += 1
            await self.tell("begin", "begin", self.epoch)
        elif choice == 1:
            self.epoch += 1
            await self.tell("relearn", "relearn", pair.epoch, self.epoch)
        elif choice == 2:
            self.revision += self.random.choice([0, 1, -1])
            await self.tell("publish", "publish_limits", self.revision, self.amounts())
        elif choice == 3:
            await self.tell("release", "release", pair, self.random.choice(self.leases), self.random.choice(SIDECARS))
        else:
            lease = self.random.choice(self.leases)
            units = self.random.randint(0, 20)
            await self.tell("fill", "fill", pair, lease, self.random.choice([*SIDECARS, "dead"]), units)

    def amounts(self) -> dict[LimitKey, int]:
        amounts = {lease.limit_key: lease.amount for lease in self.leases}
        if self.random.random() < 0.3:
            amounts[LimitKey("a:x")] = self.random.randint(0, 60)
        if self.random.random() < 0.1:
            del amounts[LimitKey("b:y")]
        return amounts

    async def open(self) -> None:
        state = await self.real.touch()
        await self.model.touch()
        if state is None:
            await self.tell("begin", "begin", self.epoch)
            return
        keep = [lease for lease in self.leases[:-1] if self.random.random() < 0.7]
        pair = state[0] if self.random.random() < 0.9 else Pair(state[0].epoch, "other")
        await self.tell("open", "open", pair, self.revision, self.amounts(), keep)

    async def restart(self) -> None:
        self.trace.append("restart")
        await self.real.restart()
        await self.same_run()

    async def same_run(self) -> None:
        self.model.registers.run_id = await self.real.run_id()

    async def lose(self) -> None:
        choice = self.random.random()
        lease = self.random.choice(self.leases[:-1])
        if choice < 0.6:
            await self.tell("lose", "lose_quota", lease)
        elif choice < 0.75:
            await self.tell("lose mark", "lose_mark")
        else:
            quota = await self.real.quota(lease)
            if quota and quota.registers:
                await self.tell("seal", "seal", lease, self.random.choice(sorted(quota.registers)))

    async def compare(self) -> None:
        marks: list[Mark | None] = [await backend.mark() for backend in self.both]
        real, model = (_timeless(mark) if mark else None for mark in marks)
        assert real == model, self.said()
        for lease in self.leases:
            quotas: list[Quota | None] = [await backend.quota(lease) for backend in self.both]
            assert quotas[0] == quotas[1], f"{lease.quota}\n{self.said()}"

    def said(self) -> str:
        return "after\n" + "\n".join(self.trace[-12:])


def _timeless(mark: Mark) -> Mark:
    """Without times, which differ: whether a marker was said into in this phase."""
    markers = {
        name: marker._replace(
            said_ms=marker.said_ms == mark.since_ms, previous_said_ms=marker.previous_said_ms == mark.since_ms
        )
        for name, marker in mark.markers.items()
    }
    return replace(mark, since_ms=0, markers=markers)


@pytest.mark.parametrize("seed", range(HISTORIES))
async def test_the_same_history_gives_the_same_answers(server: ValkeyProcess, seed: int) -> None:
    async with real_backend(server) as real:
        history = History(seed, real, await real.now_s())
        await history.same_run()
        await history.tell("begin", "begin", 1)
        await history.open()
        for _ in range(STEPS):
            await history.step()

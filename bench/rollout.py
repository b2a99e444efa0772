"""Fifty real sidecars, and a hundred pushes in a row: how long until each answers by what was pushed, and whether any
answer mixes two revisions or goes back to an older one.

A push changes two policies at once. Every answer names the rule that decided and the revision it comes from, so a pair
of checks in one call shows both policies as the sidecar has them: they have to be of the same push, of the revision
that this push got, and never of an earlier one than this sidecar answered before.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import httpx

from bench.measure import percentile
from licet.v1 import approval_pb2 as pb
from tests.support.fleet import Fleet
from tests.support.plain_http import NOBODY_TRUSTED

SIDECARS: Final = 50
PUSHES: Final = 100
LOOK_S: Final = 0.06
"""Between two questions to one sidecar: what is found is late by up to so much. With twice as many questions, two cores
are busy with them, and what is found is later still."""
LIVE_S_MAX: Final = 30.0
_BATCH: Final = "/licet.v1.ApprovalService/CheckBatch"
_BASE: Final = """\
kind: Feature
name: reports
---
kind: Action
name: report.view
feature: reports
---
kind: Action
name: report.export
feature: reports
---
kind: Plan
name: pro
features:
  reports: {}
"""
_POLICIES: Final = """\
---
kind: Policy
name: viewing
actions: [report.view]
rules:
  - {name: push-%(number)d, effect: deny, when: 'quantity > 0'}
---
kind: Policy
name: exporting
actions: [report.export]
rules:
  - {name: push-%(number)d, effect: deny, when: 'quantity > 0'}
"""


@dataclass(frozen=True, slots=True)
class Rollout:
    """Milliseconds from sending a push until a sidecar answers by it, and until the last of all does."""

    sidecars: int
    pushes: int
    each_p50_ms: float
    each_p99_ms: float
    all_p50_ms: float
    all_p99_ms: float
    accepted_p50_ms: float
    """Until the push was answered: checked, compiled, stored."""
    answers: int
    mixed: int
    """Answers whose two policies, or whose revision, are of different pushes."""
    reverted: int
    """Answers of an older push than the same sidecar had answered by."""


def run(sidecars: int = SIDECARS, pushes: int = PUSHES) -> Rollout:
    """Starts the fleet, pushes, and asks every sidecar all the time."""
    with tempfile.TemporaryDirectory() as directory:
        fleet = Fleet(Path(directory), count=sidecars)
        try:
            fleet.start()
            fleet.push(_BASE)
            fleet.licet("license", "create", "acme", "--plan", "pro", "--wait")
            return asyncio.run(_Asker(fleet, pushes).run())
        finally:
            fleet.stop()


class _Asker:
    def __init__(self, fleet: Fleet, pushes: int) -> None:
        self._fleet = fleet
        self._pushes = pushes
        self._seen = [0] * fleet.count
        self._revisions: dict[int, int] = {}
        self._each_ms: list[float] = []
        self._answers = self._mixed = self._reverted = 0
        self._pairs: list[tuple[int, int]] = []
        """(push, revision) of every answer; revisions are known only once a push was answered."""

    async def run(self) -> Rollout:
        key = (self._fleet.directory / "server" / "admin-key").read_text().strip()
        headers = {"Authorization": f"Bearer {key}"}
        request = pb.CheckBatchRequest(
            checks=[
                pb.CheckRequest(tenant="acme", action=action, quantity=1, mode=pb.MODE_PEEK)
                for action in ("report.view", "report.export")
            ]
        ).SerializeToString()
        channels = [grpc.aio.insecure_channel(address) for address in self._fleet.addresses]
        calls = [channel.unary_unary(_BATCH) for channel in channels]
        all_ms, accepted_ms = [], []
        async with httpx.AsyncClient(
            base_url=self._fleet.server_url, headers=headers, timeout=LIVE_S_MAX, verify=NOBODY_TRUSTED, trust_env=False
        ) as http:
            for number in range(1, self._pushes + 1):
                body = {"documents": [{"path": "catalog.yaml", "content": _BASE + _POLICIES % {"number": number}}]}
                sent = time.perf_counter()
                pushing = asyncio.create_task(http.post("/v1/bundles", json=body))
                looking = [
                    asyncio.create_task(self._until_live(place, call, request, number, sent))
                    for place, call in enumerate(calls)
                ]
                answer = await pushing
                answer.raise_for_status()
                accepted_ms.append(1_000 * (time.perf_counter() - sent))
                self._revisions[number] = answer.json()["revision"]
                await asyncio.gather(*looking)
                all_ms.append(1_000 * (time.perf_counter() - sent))
        for channel in channels:
            await channel.close()
        mixed = sum(1 for push, revision in self._pairs if push and self._revisions[push] != revision)
        return Rollout(
            self._fleet.count,
            self._pushes,
            *(percentile(sorted(self._each_ms), share) for share in (0.5, 0.99)),
            *(percentile(sorted(all_ms), share) for share in (0.5, 0.99)),
            percentile(sorted(accepted_ms), 0.5),
            self._answers,
            self._mixed + mixed,
            self._reverted,
        )

    async def _until_live(self, place: int, call: Any, request: bytes, number: int, sent: float) -> None:
        await asyncio.sleep(LOOK_S * place / self._fleet.count)  # not all at once
        while True:
            response = pb.CheckBatchResponse.FromString(await call(request, timeout=LIVE_S_MAX))
            seen = self._look(place, response)
            took_s = time.perf_counter() - sent
            if seen == number:
                self._each_ms.append(1_000 * took_s)
                return
            if took_s > LIVE_S_MAX:
                raise TimeoutError(f"sidecar {place} still answers by push {seen}, {took_s:.0f} s after push {number}")
            await asyncio.sleep(LOOK_S)

    def _look(self, place: int, response: pb.CheckBatchResponse) -> int:
        viewing, exporting = response.decisions
        pushes = [int(one.rule.rpartition("push-")[2] or 0) for one in (viewing, exporting)]
        self._answers += 1
        self._mixed += pushes[0] != pushes[1] or viewing.revision != exporting.revision
        self._reverted += pushes[0] < self._seen[place]
        self._seen[place] = max(self._seen[place], pushes[0])
        self._pairs.append((pushes[0], viewing.revision))
        return pushes[0]

"""Quota registers as the control plane reads, seals and sweeps them, through the scripts in ``lua/``.

Every method takes many quotas and costs one round trip (``read``: one for each 500). Raises ``RedisUnavailable`` and
``RedisRefused``; everything may be repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import structlog

from licet.wire.names import RedisNames
from licet.wire.registers import (
    MARKER_FIELD,
    QUOTA_KEPT_S,
    REGISTER_FIELD,
    SERVER_RUN_LUA,
    WINDOW_GRACE_S,
    Marker,
    Pair,
    Register,
    parse_register,
)
from licet_control_plane.core.reclaim import SILENT_S_MIN, TOMBSTONE_KEPT_S, Holding
from licet_control_plane.publisher.documents import LUA
from licet_control_plane.redis_link import Redis, redis_errors

_SCRIPTS: Final = ("seal", "sweep_markers", "sweep_quota")
_PIPELINE_MAX: Final = 500
_MARKER_PARTS_MIN: Final = 3
SCAN_COUNT: Final = 500
"""Fields of a mark looked at in one step."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class QuotaState:
    """A quota hash, parsed. Units of its limit."""

    base: int
    sum: int
    used: int
    registers: Mapping[str, Register]


class SealStatus(StrEnum):
    """What became of an attempt to seal a register."""

    SEALED = "SEALED"
    ALREADY = "ALREADY"
    NONE = "NONE"
    LEARNING = "LEARNING"
    STALE = "STALE"
    LIVE = "LIVE"


@dataclass(frozen=True, slots=True)
class Seal:
    """An attempt to seal ``holding`` under the pair that its tenant's mark had."""

    holding: Holding
    pair: Pair


@dataclass(frozen=True, slots=True)
class Sealed:
    """The answer. ``counted``: units that stay counted; ``wait_s``: until it may be sealed, when it is ``LIVE``."""

    status: SealStatus
    granted: int
    used: int
    reserved: int
    counted: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class Markers:
    """A part of a mark's markers. ``cursor``: where to go on, 0 at the end."""

    cursor: int
    markers: Mapping[str, Marker]


class RedisRegisters:
    """The adapter."""

    def __init__(self, redis: Redis, names: RedisNames) -> None:
        self._redis = redis
        self._names = names
        self._scripts = {
            name: redis.register_script(SERVER_RUN_LUA + (LUA / f"{name}.lua").read_text()) for name in _SCRIPTS
        }

    async def now_s(self) -> int:
        """The clock of Redis."""
        with redis_errors():
            return int((await self._redis.time())[0])

    async def read(self, quotas: Sequence[tuple[str, str]]) -> list[QuotaState | None]:
        """Whole quotas (tenant, quota); ``None`` for one that has no hash."""
        states: list[QuotaState | None] = []
        for start in range(0, len(quotas), _PIPELINE_MAX):
            part = quotas[start : start + _PIPELINE_MAX]
            with redis_errors():
                async with self._redis.pipeline(transaction=False) as pipe:
                    for quota in part:
                        pipe.hgetall(self._names.quota(*quota))
                    answers = await pipe.execute()
            states += [_state(quota, answer) for quota, answer in zip(part, answers, strict=True)]
        return states

    async def held_by(
        self, quotas: Sequence[tuple[str, str]], sidecars: Sequence[str]
    ) -> list[tuple[str, str, str, Register]]:
        """Registers that ``sidecars`` have in ``quotas`` (tenant, quota): tenant, quota, sidecar, register.

        Those that were sealed are left out.
        """
        if not quotas or not sidecars:
            return []
        fields = [f"{REGISTER_FIELD}{sidecar}" for sidecar in sidecars]
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for tenant, quota in quotas:
                    pipe.hmget(self._names.quota(tenant, quota), fields)
                answers = await pipe.execute()
        return [
            (tenant, quota, sidecar, register)
            for (tenant, quota), values in zip(quotas, answers, strict=True)
            for sidecar, value in zip(sidecars, values, strict=True)
            if (register := _register((tenant, quota), sidecar, value)) and not is_tombstone(register)
        ]

    async def seal(self, seals: Sequence[Seal]) -> list[Sealed]:
        """Seal and fold registers, each unless it is not silent for long enough, or its tenant is learning."""
        calls: list[tuple[list[Any], list[Any]]] = []
        cleared: set[str] = set()
        for pair, held in ((one.pair, one.holding) for one in seals):
            quota = self._names.quota(held.tenant, held.quota)
            kept_ms = 0 if quota in cleared else TOMBSTONE_KEPT_S * 1_000  # once is enough for each quota
            cleared.add(quota)
            args = [pair.epoch, pair.run, held.sidecar, held.ledger_units, SILENT_S_MIN * 1_000, kept_ms]
            calls.append(([self._names.limits(held.tenant), quota], args))
        answers = await self._run("seal", calls)
        return [_sealed(answer) for answer in answers]

    async def markers(self, marks: Sequence[tuple[str, int]]) -> list[Markers]:
        """The next part of the markers of each tenant, from a cursor (0 to begin)."""
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for tenant, cursor in marks:
                    pipe.hscan(self._names.limits(tenant), cursor, match=f"{MARKER_FIELD}*", count=SCAN_COUNT)
                answers = await pipe.execute()
        return [
            Markers(
                int(cursor),
                {
                    name.decode()[len(MARKER_FIELD) :]: marker
                    for name, value in fields.items()
                    if (marker := _marker(value)) is not None
                },
            )
            for cursor, fields in answers
        ]

    async def sweep_markers(self, over: Mapping[str, Mapping[str, Marker]]) -> int:
        """Forget markers, by tenant and name, whose window is long over. Returns how many were removed."""
        calls: list[tuple[list[Any], list[Any]]] = []
        for tenant, markers in over.items():
            keys: list[Any] = [self._names.limits(tenant)]
            args: list[Any] = [WINDOW_GRACE_S + QUOTA_KEPT_S]
            for name, marker in markers.items():
                newest = self._names.quota(tenant, f"{name}:{marker.start}")
                before = self._names.quota(tenant, f"{name}:{marker.previous_start}")
                keys += [newest, before if marker.previous_start else newest]
                args += [name, marker.start, marker.previous_start]
            calls.append((keys, args))
        return sum(await self._run("sweep_markers", calls))

    async def sweep_quotas(self, quotas: Sequence[tuple[str, str, str]]) -> tuple[int, int]:
        """Remove old tombstones of quotas: tenant, quota, and the marker's name when it is a rate's, else empty.

        Returns how many registers were removed, and how many rates that nobody has a share of.
        """
        calls = [
            (
                [self._names.limits(tenant), self._names.quota(tenant, quota)],
                [TOMBSTONE_KEPT_S * 1_000, SILENT_S_MIN * 1_000, rate],
            )
            for tenant, quota, rate in quotas
        ]
        answers = await self._run("sweep_quota", calls)
        return sum(removed for removed, _ in answers), sum(whole for _, whole in answers)

    async def _run(self, script: str, calls: Sequence[tuple[list[Any], list[Any]]]) -> list[Any]:
        if not calls:
            return []
        with redis_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for keys, args in calls:
                    await self._scripts[script](keys=keys, args=args, client=pipe)
                answers: list[Any] = await pipe.execute()
                return answers


def is_tombstone(register: Register) -> bool:
    """Whether it only remembers that there was one."""
    return register.sealed and register.granted == 0


def _sealed(answer: Sequence[bytes]) -> Sealed:
    status, granted, used, reserved, counted, wait_ms = answer
    return Sealed(
        SealStatus(status.decode()), int(granted), int(used), int(reserved), int(counted), int(wait_ms) / 1_000
    )


def _register(quota: tuple[str, str], sidecar: str, value: bytes | None) -> Register | None:
    """The register of a field; ``None`` when there is none, or when it is damaged: settling, too, refuses that one."""
    if value is None:
        return None
    try:
        return parse_register(value)
    except ValueError:
        log.error("a quota register is damaged", tenant=quota[0], quota=quota[1], sidecar=sidecar, value=value[:200])
        return None


def _marker(value: bytes) -> Marker | None:
    parts = value.split(b"|")[: len(Marker._fields)]
    return Marker(*map(int, parts)) if len(parts) >= _MARKER_PARTS_MIN and all(map(bytes.isdigit, parts)) else None


def _state(quota: tuple[str, str], fields: Mapping[bytes, bytes]) -> QuotaState | None:
    if not fields:
        return None
    registers: dict[str, Register] = {}
    for field, value in fields.items():
        name = field.decode()
        if name.startswith(REGISTER_FIELD):
            sidecar = name[len(REGISTER_FIELD) :]
            if (register := _register(quota, sidecar, value)) is not None:
                registers[sidecar] = register
    return QuotaState(int(fields.get(b"base", 0)), int(fields.get(b"sum", 0)), int(fields.get(b"used", 0)), registers)

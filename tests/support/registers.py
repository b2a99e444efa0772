"""Quota registers made by hand on a real server, and what must hold of them after every script."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from licet.wire.names import RedisNames
from licet.wire.registers import RUN_SECTIONS, Pair, Register, parse_register, run_of

NAMES = RedisNames()
LONG_AGO_MS = 1_000
RUN = "0123456789abcdef0123456789abcdef01234567"


async def make_mark(redis: Any, tenant: str, *, phase: str = "open", epoch: int = 1) -> Pair:
    """A mark of the server that runs."""
    run = run_of(await redis.execute_command("INFO", *RUN_SECTIONS))
    fields = {"epoch": epoch, "run": run, "phase": phase, "since": LONG_AGO_MS, "revision": 1}
    await redis.hset(NAMES.limits(tenant), mapping=fields)
    return Pair(epoch, run)


async def add_markers(redis: Any, tenant: str, markers: dict[str, str]) -> None:
    """Markers by name, ``<start>|<end>|<previous start>`` and perhaps more."""
    await redis.hset(NAMES.limits(tenant), mapping={f"m|{name}": value for name, value in markers.items()})


def register(
    g: int = 0,
    u: int = 0,
    h: int = 0,
    *,
    at_ms: int = LONG_AGO_MS,
    sealed: bool = False,
    epoch: int = 1,
    run: str = RUN,
) -> str:
    """One register's field."""
    return f"{g}|{u}|{h}|1|5|{epoch}|{run}|{at_ms}|{int(sealed)}|0"


async def make_quota(
    redis: Any, tenant: str, quota: str, registers: Mapping[str, str] = MappingProxyType({}), *, base: int = 0
) -> None:
    """A quota hash whose ``sum`` and ``used`` fit its registers, by sidecar."""
    parsed = [parse_register(value.encode()) for value in registers.values()]
    fields: dict[str, Any] = {
        "base": base,
        "sum": base + sum(one.granted for one in parsed),
        "used": base + sum(one.used + one.reserved for one in parsed),
        "wanted": 0,
    }
    fields |= {f"r|{name}": value for name, value in registers.items()}
    await redis.hset(NAMES.quota(tenant, quota), mapping=fields)


async def look(redis: Any, tenant: str, quota: str) -> dict[str, Any]:
    """The quota as it is: ``base``, ``sum``, ``used``, ``registers``. Fails when the invariants do not hold."""
    fields = await redis.hgetall(NAMES.quota(tenant, quota))
    registers: dict[str, Register] = {
        name[2:].decode(): parse_register(value) for name, value in fields.items() if name.startswith(b"r|")
    }
    base, total, used = (int(fields.get(name, 0)) for name in (b"base", b"sum", b"used"))
    assert total == base + sum(one.granted for one in registers.values())
    assert used == base + sum(one.used + one.reserved for one in registers.values())
    assert all(one.used + one.reserved <= one.granted for one in registers.values())
    return {"base": base, "sum": total, "used": used, "registers": registers}

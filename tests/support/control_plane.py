"""A control plane in the test's own event loop, on a real Valkey and database, and what a sidecar would see of it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import redis.asyncio as aioredis

from licet.domain.catalog import Action, Catalog, Entitlement, Feature, License, Limit, Plan
from licet.domain.ids import LimitKey
from licet.domain.windows import Period
from licet.wire.documents import HEAD, HEAD_KEY, Head, Heartbeat
from licet.wire.names import RedisNames
from licet.wire.registers import RUN_SECTIONS, Mark, parse_mark, run_of
from licet.wire.signing import SigningKey, Statement, Verifier
from licet_control_plane.archive.files import ArchiveDirectory
from licet_control_plane.archive.follower import Archive
from licet_control_plane.config import ServerConfig
from licet_control_plane.control_plane import ControlPlane
from licet_control_plane.core.subject_keys import LedgerKey
from licet_control_plane.store import access, meta
from licet_control_plane.store.database import Database
from licet_control_plane.store.subjects import SubjectKeys
from tests.support.sqlite import new_database

NAMES: Final = RedisNames()
MONTHLY: Final = LimitKey("reports:monthly")
WAIT_S_MAX: Final = 90.0


def catalog(amount: int = 100, *, per: Period = Period.MONTH, plans: tuple[str, ...] = ("pro",)) -> Catalog:
    """One feature, one action, and plans that limit it to ``amount``."""
    limit = Limit(MONTHLY, amount, per)
    return Catalog.of(
        [
            Feature("reports"),
            Action("report.export", {"": "reports"}),
            *(Plan(name, {"reports": Entitlement(limits=(limit,))}) for name in plans),
        ]
    )


def heartbeat(sidecar: str, **changes: Any) -> Heartbeat:
    """A healthy sidecar's, with the given fields changed."""
    now_us = time.time_ns() // 1_000
    fields: dict[str, Any] = {
        "sidecar": sidecar,
        "incarnation": 1,
        "at_us": now_us,
        "started_us": now_us,
        "address": "127.0.0.1:7420",
        "version": "0",
        "ready": True,
        "draining": False,
        "generation": 1,
        "revision": 0,
        "as_of_us": now_us,
        "asserted_epoch": 0,
        "asserted_run": "",
        "tenants_held": 0,
        "log_last_seq": 0,
        "log_acked_seq": 0,
        "log_bytes": 0,
    }
    return Heartbeat(**{**fields, **changes})


async def until(condition: Callable[[], Awaitable[Any]], *, within_s: float = WAIT_S_MAX) -> Any:
    """The first true answer of ``condition``. Connection errors count as not yet: servers are restarted meanwhile."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            answer = await condition()
        except (aioredis.ConnectionError, aioredis.TimeoutError, OSError):
            answer = None
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_s} s: {condition}")
        await asyncio.sleep(0.02)


class Deployment:
    """A state directory's worth of control plane, which can be started and stopped, and a view of its Redis."""

    def __init__(self, state_dir: Path, redis_url: str, database_url: str = "") -> None:
        self.state_dir = state_dir
        self.redis_url = redis_url
        self.database_url = database_url
        self.key = SigningKey.generate()
        self.ledger_key = LedgerKey(secrets.token_bytes(32))
        self.keys = SubjectKeys(self.ledger_key)
        self.verifier = Verifier([self.key.public_key])
        self.redis: Any = aioredis.Redis.from_url(redis_url, protocol=2)
        self.plane: ControlPlane
        self.admin_key = f"licet_{secrets.token_hex(8)}"
        self.archive_dir: Path | None = None
        self.settings: dict[str, Any] = {}
        """More of the server's configuration."""

    async def start(self, *, new_generation: bool = False) -> ControlPlane:
        """Start the control plane on whatever the state directory holds."""
        config = ServerConfig(
            state_dir=self.state_dir,
            redis_url=self.redis_url,
            database_url=self.database_url,
            new_generation=new_generation,
            **self.settings,
        )
        if not self.database_url:
            new_database(self.state_dir / "licet.db")
        database = Database(config.database)
        database.migrate()
        if database.write_now(meta.ensure, deployment="d" * 32, now_us=1):
            database.write_now(access.add_key, name="admin", role="admin", key=self.admin_key, now_us=1)
        deployment = database.read_now(meta.read).deployment
        self.plane = ControlPlane.assemble(
            config,
            database=database,
            key=self.key,
            ledger_key=self.ledger_key,
            deployment=deployment,
            now_s=time.time,
            archive=Archive.open(ArchiveDirectory.claim(self.archive_dir), database, deployment, now_s=time.time)
            if self.archive_dir
            else None,
        )
        self.plane.start()
        return self.plane

    async def stop(self) -> None:
        """End it, as SIGTERM does."""
        await self.plane.stop()

    async def push(self, amount: int = 100, **changes: Any) -> int:
        """Push ``catalog(amount, …)`` and return its revision."""
        return (await self.plane.changes.push(catalog(amount, **changes), [], by="test")).revision

    async def license(self, tenant: str, plan: str = "pro") -> int:
        """Create a license and return its revision."""
        return (await self.plane.changes.create_license(License(tenant, plan), by="test")).revision

    async def head(self) -> tuple[Statement, Head] | None:
        """The head that is there, verified."""
        data = await self.redis.get(NAMES.head())
        if data is None:
            return None
        statement = self.verifier.verify(data, kind=HEAD, key=HEAD_KEY)
        return statement, Head.from_payload(statement.payload)

    async def headed(self, revision: int, *, run_id: str = "", epoch: int = 0) -> tuple[Statement, Head]:
        """A head at ``revision`` or later, of the given run and at least the given epoch."""

        async def there() -> tuple[Statement, Head] | None:
            found = await self.head()
            fits = found and found[0].revision >= revision and found[1].epoch >= epoch
            return found if fits and found and run_id in ("", found[1].run_id) else None

        found: tuple[Statement, Head] = await until(there)
        return found

    async def document(self, kind: str, key: str) -> Statement | None:
        """A bundle's manifest or a license, verified."""
        data = await self.redis.get(NAMES.bundle() if kind == "bundle" else NAMES.license(key))
        return self.verifier.verify(data, kind=kind, key=key) if data else None

    async def mark(self, tenant: str) -> Mark | None:
        """A tenant's mark."""
        return parse_mark(await self.redis.hgetall(NAMES.limits(tenant)))

    async def opened(self, tenant: str, *, epoch: int = 0) -> Mark:
        """The mark once it is open under ``epoch`` or a later one."""

        async def there() -> Mark | None:
            mark = await self.mark(tenant)
            return mark if mark and mark.is_open and mark.pair.epoch >= epoch else None

        found: Mark = await until(there)
        return found

    async def changes(self) -> list[tuple[int, str, str]]:
        """The stream of changes: revision, kind, key."""
        entries = await self.redis.xrange(NAMES.changes())
        return [(int(id_.split(b"-")[0]), fields[b"kind"].decode(), fields[b"key"].decode()) for id_, fields in entries]

    async def run_id(self) -> str:
        """Of the server as it runs now."""
        return run_of(await self.redis.execute_command("INFO", *RUN_SECTIONS))


@asynccontextmanager
async def deployment(
    state_dir: Path, redis_url: str, *, start: bool = True, database_url: str = "", **settings: Any
) -> AsyncIterator[Deployment]:
    """A deployment, started unless told otherwise, and ended at the end; on SQLite unless told otherwise. ``settings``:
    more of the server's configuration."""
    state_dir.mkdir(exist_ok=True)
    made = Deployment(state_dir, redis_url, database_url)
    made.settings |= settings
    try:
        if start:
            await made.start()
        yield made
    finally:
        if hasattr(made, "plane"):
            await made.stop()
        await made.redis.aclose()

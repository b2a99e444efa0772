"""A control plane by hand on a real server: signed documents, changes, heads, and marks by the publisher's scripts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import redis

from licet.domain.catalog import Catalog, License
from licet.domain.entitlements import entitlements_of, limits_of
from licet.wire.documents import Heartbeat
from licet.wire.names import USAGE_SHARDS, RedisNames
from licet.wire.registers import RUN_SECTIONS, SERVER_RUN_LUA, run_of
from licet.wire.usage import UsageBatch, UsageEvent, unpack_event
from tests.support.published import Signer

LUA: Final = Path(__file__).parents[2] / "control_plane" / "licet_control_plane" / "publisher" / "lua"
EPOCH: Final = 1


class RedisPublisher:
    """Publishes to one server. Synchronous, so that a test with real processes needs no loop."""

    def __init__(self, url: str, signer: Signer | None = None) -> None:
        self.redis: Any = redis.Redis.from_url(url, protocol=2)
        self.names = RedisNames()
        self.signer = signer or Signer()
        self.revision = 0
        self._catalog = Catalog()
        self._bundle = 0
        self._licenses: dict[str, License] = {}
        self._scripts = {
            path.stem: self.redis.register_script(SERVER_RUN_LUA + path.read_text()) for path in LUA.glob("*.lua")
        }

    def push(self, content: Catalog) -> int:
        """A bundle, the limits that follow from it, its change, and a head."""
        self.revision += 1
        self._catalog = content
        self._bundle = self.revision
        manifest, chunks = self.signer.bundle(content, self.revision)
        for digest, chunk in chunks.items():
            self.redis.set(self.names.chunk(digest), chunk)
        self.redis.set(self.names.bundle(), manifest)
        return self._changed("bundle", "bundle")

    def license(self, tenant: str, plan: str = "pro", **fields: Any) -> int:
        """A license, its limits, its change, and a head."""
        self.revision += 1
        self._licenses[tenant] = License(tenant, plan, **fields)
        self.redis.set(self.names.license(tenant), self.signer.license(self._licenses[tenant], self.revision))
        return self._changed("license", tenant)

    def beat(self) -> None:
        """A head of now."""
        run_id = run_of(self.redis.execute_command("INFO", *RUN_SECTIONS))
        head = self.signer.head(self.revision, run_id, time.time_ns() // 1_000, epoch=EPOCH, bundle=self._bundle)
        self.redis.set(self.names.head(), head)

    def events(self) -> list[UsageEvent]:
        """Everything handed over, each event of a log once, as the ledger would take it."""
        found: dict[tuple[str, int], UsageEvent] = {}
        for shard in range(USAGE_SHARDS):
            for _, fields in self.redis.xrange(self.names.usage(shard)):
                batch = UsageBatch.unpack(fields[b"b"])
                for event in map(unpack_event, batch.events):
                    found[batch.log_id, event.seq] = event
        return list(found.values())

    def acknowledge(self, sidecar: str, incarnation: int, watermark: int) -> None:
        """As the drain does once the ledger has committed."""
        log = f"{sidecar}:{incarnation}"
        self.redis.hset(self.names.acked(), log, self.signer.ack(log, watermark))

    def registers(self, tenant: str) -> dict[str, tuple[int, int, int]]:
        """(granted, used, reserved) by ``<quota>/<sidecar>``, without tombstones."""
        found = {}
        for key in self.redis.scan_iter(self.names.quota(tenant, "*")):
            for name, value in self.redis.hgetall(key).items():
                if name.startswith(b"r|"):
                    granted, used, reserved, *_, sealed, _ = value.split(b"|")
                    if sealed == b"1":
                        continue
                    quota = key.decode().partition(":q:")[2]
                    found[f"{quota}/{name[2:].decode()}"] = (int(granted), int(used), int(reserved))
        return found

    def sidecars(self) -> list[str]:
        """Ids in the registry."""
        return [name.decode() for name in self.redis.hkeys(self.names.sidecars())]

    def bases(self, tenant: str) -> list[int]:
        """Units of each quota whose registers were given up."""
        keys = list(self.redis.scan_iter(self.names.quota(tenant, "*")))
        return [int(self.redis.hget(key, "base")) for key in keys]

    def heartbeats(self) -> list[Heartbeat]:
        """What the registry holds."""
        return [Heartbeat.unpack(value) for value in self.redis.hvals(self.names.sidecars())]

    def close(self) -> None:
        """Ends the connection."""
        self.redis.close()

    def _changed(self, kind: str, key: str) -> int:
        for tenant, license_ in self._licenses.items():
            amounts = limits_of(entitlements_of(license_, self._catalog))
            mark = self.names.limits(tenant)
            run = self._scripts["begin"](keys=[mark], args=[EPOCH])
            if run:
                self._scripts["open"](keys=[mark], args=[EPOCH, run, self.revision, 0, *_counted(amounts)])
            else:
                self._scripts["publish_limits"](keys=[mark], args=[self.revision, *_counted(amounts)])
        self.redis.xadd(self.names.changes(), {"kind": kind, "key": key}, id=f"{self.revision}-0")
        self.beat()
        return self.revision


def _counted(amounts: Mapping[Any, int]) -> list[Any]:
    return [len(amounts), *(value for pair in amounts.items() for value in pair)]

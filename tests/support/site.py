"""The REST API of a control plane in the test's own event loop, as several callers see it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
from sqlalchemy import select

from licet_control_plane.api.app import make_app
from licet_control_plane.store.schema import audit
from tests.support.control_plane import Deployment

BUNDLE = """\
kind: Feature
name: reports
---
kind: Action
name: report.export
feature: reports
---
kind: Plan
name: pro
features:
  reports:
    limits:
      - {amount: 100, per: month}
"""


class Site:
    """A control plane's API, as several callers see it."""

    def __init__(self, running: Deployment) -> None:
        self.running = running
        self.app = make_app(running.plane)
        self.keys: dict[tuple[str, str], str] = {("admin", ""): running.admin_key}

    def as_(self, key: str, address: str = "127.0.0.1") -> httpx.AsyncClient:
        """A client with a key, at an address."""
        transport = httpx.ASGITransport(self.app, client=(address, 1))
        return httpx.AsyncClient(
            transport=transport, base_url="http://licet", headers={"Authorization": f"Bearer {key}"}
        )

    async def key(self, role: str, tenant: str = "") -> str:
        """A key of a role, made once."""
        if (role, tenant) not in self.keys:
            made = await self.ask("POST", "/v1/api-keys", name=f"{role}-{tenant or 'all'}", role=role, tenant=tenant)
            assert made.status_code == 201, made.text
            self.keys[role, tenant] = made.json()["key"]
        return self.keys[role, tenant]

    async def ask(self, method: str, path: str, *, key: str = "", params: Any = None, **body: Any) -> httpx.Response:
        async with self.as_(key or self.running.admin_key) as client:
            return await client.request(method, path, json=body if method != "GET" else None, params=params)

    async def actions(self) -> list[str]:
        """Actions in the audit trail, oldest first."""
        query = select(audit.c.action).order_by(audit.c.number)
        return await self.running.plane.database.read(lambda connection: list(connection.scalars(query)))

    async def verified(self) -> dict[str, Any]:
        """What recounting the trail finds."""
        async with self.as_(self.running.admin_key) as client:
            lines = (await client.post("/v1/audit/verify", json={})).text.splitlines()
        last: dict[str, Any] = json.loads(lines[-1])
        assert "result" in last, last
        result: dict[str, Any] = last["result"]
        return result

    async def sql(self, work: Callable[..., Any]) -> None:
        """What somebody does who can write to the database."""
        await self.running.plane.database.write(work)

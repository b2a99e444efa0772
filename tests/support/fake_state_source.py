"""Published state in memory, and a publisher beside it. ``tests/contract/test_state_source.py`` holds it to the port.

A test can take the link away (``trouble``), and can act in the middle of a read: ``between[method]`` is awaited after
that method has read and before it answers, which is where races live.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from licet.domain.approvals import Override
from licet.domain.catalog import Catalog, License
from licet.wire import documents
from licet.wire.registers import Pair
from licet_sidecar.core.sync import Change
from tests.support.published import Signer


class FakeStateSource:
    """A ``StateSource``, one Redis server's worth."""

    def __init__(self, run_id: str = "run1") -> None:
        self.run_id = run_id
        self.head: bytes | None = None
        self.manifest: bytes | None = None
        self.chunks: dict[str, bytes] = {}
        self.licenses: dict[str, bytes] = {}
        self.pairs: dict[str, Pair] = {}
        self.changes: list[Change] = []
        self.trouble: Exception | None = None
        self.between: dict[str, Callable[[], Awaitable[None]]] = {}
        self.reads: list[str] = []
        self._news = asyncio.Event()

    def announce(self, change: Change) -> None:
        """Adds an entry to the stream."""
        self.changes.append(change)
        self._news.set()

    def fail(self, error: Exception | None) -> None:
        """From now on every read fails so, also one that waits; ``None`` ends it."""
        self.trouble = error
        self._news.set()

    def wipe(self, run_id: str) -> None:
        """Another server that holds nothing."""
        self.__init__(run_id)  # type: ignore[misc]  # nothing else refers to its parts

    async def read_head(self) -> tuple[bytes | None, str]:
        """See ``StateSource``."""
        answer = self.head, self.run_id
        await self._reading("read_head")
        return answer

    async def read_manifest(self) -> tuple[bytes | None, str]:
        """See ``StateSource``."""
        answer = self.manifest, self.run_id
        await self._reading("read_manifest")
        return answer

    async def read_chunks(self, digests: Sequence[str]) -> list[bytes | None]:
        """See ``StateSource``."""
        answer = [self.chunks.get(digest) for digest in digests]
        await self._reading("read_chunks")
        return answer

    async def read_license(self, tenant: str) -> tuple[bytes | None, Pair, bytes | None, str]:
        """See ``StateSource``."""
        answer = self.licenses.get(tenant), self.pairs.get(tenant, Pair(0, "")), self.head, self.run_id
        await self._reading("read_license")
        return answer

    async def read_licenses(self, tenants: Sequence[str]) -> tuple[list[bytes | None], str]:
        """See ``StateSource``."""
        answer = [self.licenses.get(tenant) for tenant in tenants], self.run_id
        await self._reading("read_licenses")
        return answer

    async def read_changes(self, after: int, block_ms: int) -> tuple[list[Change], str]:
        """See ``StateSource``."""
        deadline = asyncio.get_running_loop().time() + block_ms / 1_000
        while True:
            self._news.clear()
            found, run_id = [change for change in self.changes if change.revision > after], self.run_id
            await self._reading("read_changes")
            if found:
                return found, run_id
            try:
                async with asyncio.timeout_at(deadline):
                    await self._news.wait()
            except TimeoutError:
                return [], self.run_id

    async def _reading(self, method: str) -> None:
        self.reads.append(method)
        await asyncio.sleep(0)  # as a network does, it lets others run
        act = self.between.get(method)
        if act is not None:
            await act()
        if self.trouble is not None:
            raise self.trouble


class FakePublisher:
    """Publishes to a ``FakeStateSource``: documents first, then the change, and a head when told."""

    def __init__(self, source: FakeStateSource, signer: Signer | None = None, *, revision: int = 0) -> None:
        self.source = source
        self.signer = signer or Signer()
        self.revision = revision

    def push(
        self,
        content: Catalog,
        *,
        observe: bool = False,
        announce: bool = True,
        overrides: tuple[Override, ...] = (),
    ) -> int:
        """A bundle. Its revision."""
        self.revision += 1
        self.source.manifest, chunks = self.signer.bundle(content, self.revision, observe=observe, overrides=overrides)
        self.source.chunks.update(chunks)
        return self._announce(documents.BUNDLE, documents.BUNDLE_KEY, announce)

    def license(self, license_: License, *, announce: bool = True) -> int:
        """A license. Its revision."""
        self.revision += 1
        self.source.licenses[license_.tenant] = self.signer.license(license_, self.revision)
        return self._announce(documents.LICENSE, license_.tenant, announce)

    def announce(self) -> None:
        """The change of the last document that was published without one."""
        assert self._held is not None
        self.source.announce(self._held)

    def beat(self, at_us: int, *, epoch: int = 1, live: int = 1) -> bytes:
        """A head of everything published so far."""
        self.source.head = self.signer.head(self.revision, self.source.run_id, at_us, epoch=epoch, live=live)
        return self.source.head

    _held: Change | None = None

    def _announce(self, kind: str, key: str, announce: bool) -> int:
        self._held = Change(self.revision, kind, key)
        if announce:
            self.source.announce(self._held)
        return self.revision

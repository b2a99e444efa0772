"""Chunks of bundles as documents: each is decoded once, however many bundles have it. Owned by one event loop."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence

from licet.domain.catalog import Catalog, Document
from licet.wire.documents import documents_of_chunk
from licet_sidecar.services.slices import in_slices


class Unpacking:
    """The documents of the chunks of the newest bundle that was put together, by the digests of the chunks.

    Beside the documents are the bytes that were found to be those of the digest: other bytes are looked at anew,
    however often right ones were seen, as whoever asks keeps the bytes it brought.
    """

    def __init__(self) -> None:
        self._documents: dict[str, tuple[bytes, tuple[Document, ...]]] = {}

    async def unpack(self, digests: Sequence[str], chunks: Mapping[str, bytes]) -> None:
        """Decodes the chunks that are not known yet, a slice at a time, so that ``catalog`` finds them.

        Raises:
            ValueError: as ``documents_of_chunk``.
        """
        if all(self._knows(digest, chunks[digest]) for digest in digests):
            return
        await in_slices(self._steps(digests, chunks))
        # Documents have no cycles and stay until they are replaced: a collection that looked at those of 10,000 rules
        # would keep checks waiting for 50 ms.
        gc.freeze()

    def catalog(self, digests: Sequence[str], chunks: Mapping[str, bytes]) -> Catalog:
        """The catalog of exactly these chunks. What was not unpacked is, at once; that of other chunks is forgotten.

        Raises:
            ValueError: as ``documents_of_chunk``.
        """
        for _ in self._steps(digests, chunks):
            pass
        self._documents = {digest: self._documents[digest] for digest in digests}
        return Catalog.of(document for digest in digests for document in self._documents[digest][1])

    def _steps(self, digests: Sequence[str], chunks: Mapping[str, bytes]) -> Iterator[None]:
        for digest in digests:
            if not self._knows(digest, chunks[digest]):
                self._documents[digest] = (chunks[digest], documents_of_chunk(chunks[digest], digest))
                yield

    def _knows(self, digest: str, chunk: bytes) -> bool:
        known = self._documents.get(digest)
        return known is not None and known[0] == chunk

"""What sidecars ask for and hand in over HTTPS while they cannot reach Redis: ``/v1/sidecar/snapshot`` and
``/v1/usage/batches``. Both are signed, as everything that sidecars believe is.
"""

from __future__ import annotations

import base64
from typing import Annotated, Final

from fastapi import Body, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from licet.wire.documents import Snapshot
from licet.wire.envelope import EnvelopeError
from licet.wire.names import USAGE_SHARDS, usage_shard
from licet.wire.usage import UsageBatch, unpack_batches
from licet_control_plane.api.auth import plane_of, v1_router
from licet_control_plane.api.fields import Base64, said, unchecked
from licet_control_plane.api.problems import Problem
from licet_control_plane.store import snapshots

TENANTS_MAX: Final = 10_000
"""Of one request: as many licenses as a sidecar keeps."""
OCTETS: Final = "application/octet-stream"

router = v1_router(tag="second-route")


class SnapshotRequest(BaseModel):
    """What a sidecar has, (0, 0) for nothing, and the tenants whose licenses it wants; ``known`` are those it has."""

    model_config = ConfigDict(extra="forbid")

    generation: StrictInt = 0
    revision: StrictInt = 0
    known: list[Annotated[str, Field(max_length=128)]] = Field(default=[], max_length=TENANTS_MAX)
    wanted: list[Annotated[str, Field(max_length=128)]] = Field(default=[], max_length=TENANTS_MAX)


class Acknowledgements(BaseModel):
    """What of each log is in the ledger."""

    acks: dict[str, Base64] = said("By log: a signed acknowledgement, for the sidecar")


@router.post("/sidecar/snapshot", response_class=Response, responses={200: {"content": {OCTETS: {}}}})
async def snapshot(request: Request, asked: SnapshotRequest) -> Response:
    """The published state as of now: head, bundle and licenses, each signed; only the head when nothing changed."""
    plane = plane_of(request)
    made: Snapshot = await plane.database.read(
        snapshots.read,
        sign=plane.changes.sign,
        have=(asked.generation, asked.revision),
        known=asked.known,
        wanted=asked.wanted,
        now_us=plane.now_us(),
        epoch=plane.quotas.epoch,
        live=plane.fleet.live_count(plane.now_s()),
    )
    return Response(made.pack(), media_type=OCTETS)


@router.post("/usage/batches", response_model=Acknowledgements)
async def usage_batches(request: Request, body: Annotated[bytes, Body(media_type=OCTETS)]) -> Response:
    """Puts batches of usage events in the ledger, each event once, however often it comes and by whatever way."""
    plane = plane_of(request)
    try:
        by_shard: dict[int, list[bytes]] = {}
        for raw in unpack_batches(body):
            by_shard.setdefault(usage_shard(UsageBatch.unpack(raw).sidecar), []).append(raw)
        acks: dict[str, bytes] = {}
        for shard, raws in sorted(by_shard.items()):
            assert shard < USAGE_SHARDS
            acks |= await plane.workers[shard].take(raws)
    except EnvelopeError as error:
        raise Problem(
            422, f"The body is not batches of usage: {error}.", "Send what a sidecar of this version packs."
        ) from error
    return unchecked({"acks": {log: base64.b64encode(ack).decode() for log, ack in acks.items()}})

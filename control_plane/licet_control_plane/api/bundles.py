"""``/v1/bundles`` and ``/v1/revisions``."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field

from licet.domain.catalog import Catalog
from licet_control_plane.api.auth import CallerAsked, plane_of, v1_router
from licet_control_plane.api.fields import Generation, Instant, Revision, Sha256, SidecarId, said
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.times import format_us
from licet_control_plane.changes import Pushed
from licet_control_plane.core.documents import SourceFile, validate
from licet_control_plane.core.fleet import Sidecar, rollout
from licet_control_plane.store import bundles, revisions

router = v1_router(tag="bundles")


class DocumentFile(BaseModel):
    """One file of a bundle."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(max_length=1_000)
    content: str


class BundlePush(BaseModel):
    """A whole bundle. ``observe`` answers everything APPROVED and records what would have been."""

    model_config = ConfigDict(extra="forbid")

    documents: list[DocumentFile] = Field(max_length=10_000)
    observe: bool = False
    message: str = Field("", max_length=1_000)
    dry_run: bool = False


class Finding(BaseModel):
    """One thing about a document that is wrong, or as a warning, probably not meant."""

    file: str = said("The path of the file as it was pushed; empty when it is about none")
    line: Annotated[int, said("From 1; 0 when it is about no line", minimum=0)]
    column: Annotated[int, said("From 1; 0 when it is about no column", minimum=0)]
    path: str = said("The document and the field, such as Plan/pro: features.reports")
    message: str = said("What is wrong: a clause")
    fix: str = said("What to do: whole sentences, or nothing")
    code: str = said("Stable: programs go by it")
    severity: Literal["error", "warning"] = said("An error stands in the way of publishing")


class DocumentsChanged(BaseModel):
    """Documents that differ from the bundle before, as ``Kind/name``."""

    added: list[str] = said("Those that are new, in order")
    modified: list[str] = said("Those that say something else, in order")
    removed: list[str] = said("Those that are gone, in order")


class PushedView(BaseModel):
    """What a push did, or with ``dry_run`` would do."""

    revision: Annotated[Revision, said("What publishes it; that in force when it is unchanged or a dry run")]
    generation: Generation
    digest: Annotated[Sha256, said("Of what the documents mean")]
    changed: DocumentsChanged
    unchanged: bool = said("It is in force already, and nothing was published")
    warnings: list[Finding] = said("What is probably not meant")


class DocumentName(BaseModel):
    """A document of a bundle."""

    kind: str = said("Such as Plan")
    name: str = said("Its name, unique among its kind")


class CurrentBundle(BaseModel):
    """The bundle in force, or about to be."""

    revision: Revision
    generation: Generation
    observe: bool = said("Everything is answered APPROVED, and what would have been is recorded")
    message: str = said("Of the push")
    published_at: Instant | None = said("Since when sidecars can have it; null while they cannot")
    documents: list[DocumentName] = said("By kind and name")


class SidecarSeen(BaseModel):
    """A sidecar that has not confirmed a revision."""

    sidecar: SidecarId
    revision: Annotated[Revision, said("The newest that it confirmed")]
    last_heard_s: float = said("Seconds since its last heartbeat", minimum=0)


class RolloutView(BaseModel):
    """How far a revision has come."""

    revision: Revision
    published: bool = said("It left the database")
    confirmed: list[SidecarId] = said("Sidecars that act by it, or by a later one")
    waiting: list[SidecarSeen] = said("Live ones that do not yet")
    silent: list[SidecarSeen] = said("Those that were not heard of lately")
    done: bool = said("It is published, and no sidecar is waited for")


@router.post("/bundles", response_model=PushedView, responses={201: {"model": PushedView}})
async def push_bundle(request: Request, response: Response, push: BundlePush, caller: CallerAsked) -> dict[str, Any]:
    """Validate a bundle as a whole and publish it; 201 for a new revision, 200 when it is the current one already."""
    files = [(file.path, file.content) for file in push.documents]
    catalog, warnings = await validated(files)
    pushed = await plane_of(request).changes.push(
        catalog,
        files,
        by=caller.name,
        observe=push.observe,
        message=push.message,
        dry_run=push.dry_run,
    )
    response.status_code = 200 if pushed.unchanged or push.dry_run else 201
    return described(pushed, warnings)


@router.get("/bundles/current", response_model=CurrentBundle)
async def current_bundle(request: Request) -> dict[str, Any]:
    """What is in force, or about to be."""
    database = plane_of(request).database
    bundle = await database.read(bundles.current)
    if bundle is None:
        raise Problem(404, "No bundle was pushed yet.", "Push one with licet policy push.")
    generation, published_at_us = await database.read(bundles.facts, bundle.revision)
    return {
        "revision": bundle.revision,
        "generation": generation,
        "observe": bundle.observe,
        "message": bundle.message,
        "published_at": format_us(published_at_us),
        "documents": [{"kind": kind, "name": name} for kind, name, _ in bundle.documents],
    }


@router.get("/revisions/{revision}/rollout", response_model=RolloutView)
async def revision_rollout(request: Request, revision: int) -> dict[str, Any]:
    """How far a revision has come: what ``push --wait`` waits for."""
    plane = plane_of(request)
    found = await plane.database.read(revisions.get, revision)
    if found is None:
        raise Problem(404, f"There is no revision {revision}.", "GET /v1/status tells the newest.")
    now_s = plane.now_s()
    stand = rollout(
        plane.fleet.sidecars.values(),
        generation=found.generation,
        revision=revision,
        published=found.published_at_us is not None,
        staleness_s_max=plane.config.staleness_max_s,
        looked_s=plane.fleet.looked_s,
        complete_since_s=plane.fleet.complete_since_s,
    )

    def seen(sidecar: Sidecar) -> dict[str, Any]:
        return {
            "sidecar": sidecar.heartbeat.sidecar,
            "revision": sidecar.heartbeat.revision,
            "last_heard_s": round(now_s - sidecar.last_heard_s, 3),
        }

    return {
        "revision": revision,
        "published": found.published_at_us is not None,
        "confirmed": [sidecar.heartbeat.sidecar for sidecar in stand.confirmed],
        "waiting": [seen(sidecar) for sidecar in stand.waiting],
        "silent": [seen(sidecar) for sidecar in stand.silent],
        "done": stand.done,
    }


async def validated(files: list[tuple[str, str]], *, what: str = "The bundle") -> tuple[Catalog, list[dict[str, Any]]]:
    """The catalog that files say, and warnings about it.

    Raises:
        Problem: 422, with every error of every file.
    """
    found = await asyncio.to_thread(validate, [SourceFile(path, content) for path, content in files])
    if found.errors or found.catalog is None:
        errors = [error.as_json() for error in found.errors]
        count = f"{len(errors)} error{'s' if len(errors) != 1 else ''}"
        raise Problem(422, f"{what} has {count}; nothing was published.", "Mend each of errors.", errors=errors)
    return found.catalog, [warning.as_json() for warning in found.warnings]


def described(pushed: Pushed, warnings: list[dict[str, Any]]) -> dict[str, Any]:
    """What a push did, as the API says it."""
    return {
        "revision": pushed.revision,
        "generation": pushed.generation,
        "digest": pushed.digest,
        "changed": {"added": pushed.added, "modified": pushed.modified, "removed": pushed.removed},
        "unchanged": pushed.unchanged,
        "warnings": warnings,
    }

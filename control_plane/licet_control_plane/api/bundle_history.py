"""``/v1/bundles/…``: what was pushed before, what differs, and going back to it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final, Literal

from fastapi import Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection

from licet.domain.catalog import Catalog
from licet_control_plane.api.auth import CallerAsked, plane_of, v1_router
from licet_control_plane.api.bundles import (
    DocumentFile,
    DocumentName,
    DocumentsChanged,
    Finding,
    PushedView,
    described,
    validated,
)
from licet_control_plane.api.fields import By, Generation, Instant, Revision, Sha256, said, sometimes
from licet_control_plane.api.problems import Problem
from licet_control_plane.api.times import format_us
from licet_control_plane.control_plane import ControlPlane
from licet_control_plane.core.bundle_changes import document_changes
from licet_control_plane.core.diff import Difference, diff
from licet_control_plane.core.documents import SourceFile
from licet_control_plane.core.documents.writing import as_pairs, stamped, write_files
from licet_control_plane.store import bundles, licenses, meta
from licet_control_plane.store.bundles import Bundle, Origin

router = v1_router(tag="bundle-history")

PAGE_MAX: Final = 100
"""Bundles in one answer: each is compared with the one before it, by the digests of its documents."""


class BundleView(BaseModel):
    """A bundle that was pushed, and what it changed."""

    revision: Revision
    generation: Generation
    at: Annotated[Instant, said("When it was pushed")]
    by: By
    message: str = said("Of the push")
    observe: bool = said("Everything was answered APPROVED, and what would have been was recorded")
    digest: Annotated[Sha256, said("Of what its documents mean")]
    published_at: Instant | None = said("Since when sidecars can have it; null while they cannot")
    current: bool = said("It is in force")
    changed: DocumentsChanged


class BundlePage(BaseModel):
    """Bundles, the newest first."""

    items: list[BundleView] = said("The newest first")
    next: int | None = said("The `before` of the next page; null on the last", minimum=1)


class WholeBundle(BundleView):
    """With its documents."""

    documents: list[DocumentName] = said("By kind and name")


class BundleFile(BaseModel):
    """A file of a bundle."""

    path: str = said("As it was pushed; one for each kind when it is written anew")
    content: str = said("YAML")


class BundleFiles(BaseModel):
    """The documents of a bundle as files."""

    revision: Revision
    as_pushed: bool = said("False: written anew, one file for each kind")
    observe: bool = said("The mode it had")
    files: list[BundleFile] = said("One a path")


class DifferenceView(BaseModel):
    """One change of meaning."""

    kind: str = said("Of the document, or Bundle for the mode")
    name: str = said("Of the document")
    path: list[str] = said("Leads to it inside the document, in words; empty for the document itself")
    change: Literal["added", "removed", "changed"] = said("What became of it")
    before: str = said("As people write it; empty where there was nothing")
    after: str = said("As people write it; empty where there is nothing")
    text: str = said("The whole of it in one line")
    licenses: int = sometimes("Of a plan: how many licenses hold it", minimum=0)


class RolledBack(PushedView):
    """A push of what an older bundle said."""

    restores: Annotated[Revision, said("Whose content it is")]
    observe: bool = said("The mode it has again")
    differences: list[DifferenceView] = said("From what was live")


class Compared(BaseModel):
    """What differs between two bundles in meaning."""

    before: int | None = said("The revision that was compared; null when none was live", minimum=1)
    after: int | None = said("The revision that it was compared with; null for documents", minimum=1)
    equal: bool = said("They mean the same, and are in the same mode")
    differences: list[DifferenceView] = said("The mode first, then by document")
    warnings: list[Finding] = said("About the documents that were sent")


@router.get("/bundles", response_model=BundlePage)
async def list_bundles(
    request: Request,
    before: Annotated[int | None, Query(ge=1, le=2**63 - 1, description="Only revisions below this one.")] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = 20,
) -> dict[str, Any]:
    """Every bundle that was ever pushed, the newest first, each with what it changed."""
    page, origins, current = await plane_of(request).database.read(_page, before, limit)
    items = [
        _described(bundle, page[place + 1] if place + 1 < len(page) else None, origins, current)
        for place, bundle in enumerate(page[:limit])
    ]
    return {"items": items, "next": items[-1]["revision"] if len(page) > limit else None}


@router.get("/bundles/{revision}", response_model=WholeBundle)
async def show_bundle(request: Request, revision: int) -> dict[str, Any]:
    """One bundle: when, who, why, what it changed, and its documents by kind and name."""
    found = await _bundle(plane_of(request), revision)
    page, origins, current = await plane_of(request).database.read(_page, revision + 1, 1)
    body = _described(found, page[1] if len(page) > 1 else None, origins, current)
    return {**body, "documents": [{"kind": kind, "name": name} for kind, name, _ in found.documents]}


@router.get("/bundles/{revision}/files", response_model=BundleFiles)
async def bundle_files(request: Request, revision: int, canonical: bool = False) -> dict[str, Any]:
    """The documents of a bundle as files: as pushed, or with ``canonical`` written anew, one file for each kind.

    Either way each document says its ``apiVersion``. A bundle that was pushed without files has only the latter.
    """
    plane = plane_of(request)
    found = await _bundle(plane, revision)
    files = [] if canonical else await plane.database.read(bundles.files, revision)
    if files:
        made = await asyncio.to_thread(lambda: [stamped(SourceFile(path, content)) for path, content in files])
    else:
        catalog = await plane.database.read(bundles.catalog, found)
        made = await asyncio.to_thread(write_files, catalog)
    return {
        "revision": revision,
        "as_pushed": bool(files),
        "observe": found.observe,
        "files": [{"path": path, "content": content} for path, content in as_pairs(made)],
    }


class Rollback(BaseModel):
    """``dry_run`` says what would change, and publishes nothing."""

    model_config = ConfigDict(extra="forbid")

    message: str = Field("", max_length=1_000)
    dry_run: bool = False


@router.post(
    "/bundles/{revision}/rollback",
    response_model=RolledBack,
    response_model_exclude_unset=True,
    responses={201: {"model": RolledBack}},
)
async def rollback(
    request: Request,
    response: Response,
    revision: int,
    body: Rollback,
    caller: CallerAsked,
) -> dict[str, Any]:
    """Publish the content of an older bundle as a new revision, in the mode it had; revisions only grow.

    It is validated as a push is: what this version refuses is not published again.
    """
    plane = plane_of(request)
    found = await _bundle(plane, revision)
    live = await plane.database.read(_live)
    stored = await plane.database.read(bundles.catalog, found)
    files = await plane.database.read(bundles.files, revision)
    if not files:
        files = as_pairs(await asyncio.to_thread(write_files, stored))
    catalog, warnings = await validated(files, what=f"Revision {revision}, as this version reads it,")
    pushed = await plane.changes.push(
        catalog,
        files,
        by=caller.name,
        observe=found.observe,
        message=body.message or f"rollback to revision {revision}",
        dry_run=body.dry_run,
        restores=revision,
    )
    response.status_code = 200 if pushed.unchanged or body.dry_run else 201
    before, observed = live
    differences = await asyncio.to_thread(diff, before, catalog)
    return {
        **described(pushed, warnings),
        "restores": revision,
        "observe": found.observe,
        "differences": await _shown(plane, differences, observed, found.observe),
    }


class Comparison(BaseModel):
    """``before``: a revision; left out, what is live. After it: the revision ``after``, or ``documents``."""

    model_config = ConfigDict(extra="forbid")

    before: int | None = None
    after: int | None = None
    documents: list[DocumentFile] | None = Field(None, max_length=10_000)
    observe: bool = False


@router.post("/bundles/diff", response_model=Compared, response_model_exclude_unset=True)
async def compare(request: Request, body: Comparison) -> dict[str, Any]:
    """What differs in meaning: for each plan, limit, price, action, rule, role and flag. Changes nothing."""
    plane = plane_of(request)
    if (body.after is None) == (body.documents is None):
        raise Problem(422, "after: give either a revision or documents.", "Send one of 'after' and 'documents'.")
    if body.before is None:
        live = await plane.database.read(bundles.current)
        before, observed = await plane.database.read(_live)
        before_revision = live.revision if live else None
    else:
        bundle = await _bundle(plane, body.before)
        before_revision, observed = bundle.revision, bundle.observe
        before = await plane.database.read(bundles.catalog, bundle)
    if body.after is None:
        files = [(file.path, file.content) for file in body.documents or ()]
        after, warnings = await validated(files)
        observe = body.observe
    else:
        bundle = await _bundle(plane, body.after)
        after, warnings, observe = await plane.database.read(bundles.catalog, bundle), [], bundle.observe
    differences = await asyncio.to_thread(diff, before, after)
    return {
        "before": before_revision,
        "after": body.after,
        "equal": not differences and observed == observe,
        "differences": await _shown(plane, differences, observed, observe),
        "warnings": warnings,
    }


async def _shown(
    plane: ControlPlane, differences: list[Difference], observed: bool, observe: bool
) -> list[dict[str, Any]]:
    held = await plane.database.read(licenses.plans_in_use)
    shown = [
        {
            "kind": one.kind,
            "name": one.name,
            "path": list(one.path),
            "change": one.change.value,
            "before": one.before,
            "after": one.after,
            "text": str(one),
            **({"licenses": held.get(one.name, (0, ""))[0]} if one.kind == "Plan" else {}),
        }
        for one in differences
    ]
    if observed != observe:
        before, after = (("observe" if mode else "enforce") for mode in (observed, observe))
        shown.insert(
            0,
            {
                "kind": "Bundle",
                "name": "",
                "path": ["mode"],
                "change": "changed",
                "before": before,
                "after": after,
                "text": f"bundle: mode {before} -> {after}",
            },
        )
    return shown


async def _bundle(plane: ControlPlane, revision: int) -> Bundle:
    """The bundle of a revision.

    Raises:
        Problem: 404, naming the bundle that was in force then, if there was one.
    """
    found = await plane.database.read(bundles.at, revision) if revision < 2**63 else None
    if found is not None:
        return found
    newest = (await plane.database.read(meta.read)).revision
    if not 1 <= revision <= newest:
        raise Problem(404, f"There is no revision {revision}.", "GET /v1/bundles (licet policy history) lists them.")
    in_force = await plane.database.read(bundles.newest, up_to=revision)
    raise Problem(
        404,
        f"Revision {revision} is not that of a bundle.",
        f"The bundle in force then was revision {in_force[0].revision}."
        if in_force
        else "No bundle was pushed before it; GET /v1/bundles (licet policy history) lists them.",
    )


def _live(connection: Connection) -> tuple[Catalog, bool]:
    """The newest catalog, and whether it is in observe mode."""
    bundle = bundles.current(connection)
    return bundles.catalog(connection, bundle), bundle.observe if bundle else False


def _page(connection: Connection, before: int | None, limit: int) -> tuple[list[Bundle], dict[int, Origin], int]:
    """So many bundles and one more, where they come from, and the revision that is current."""
    page = bundles.newest(connection, up_to=None if before is None else before - 1, limit=limit + 1)
    current = bundles.current(connection)
    return page, bundles.origins(connection, [one.revision for one in page]), current.revision if current else 0


def _described(bundle: Bundle, previous: Bundle | None, origins: dict[int, Origin], current: int) -> dict[str, Any]:
    origin = origins[bundle.revision]
    changed = document_changes(previous.documents if previous else (), bundle.documents)
    return {
        "revision": bundle.revision,
        "generation": origin.generation,
        "at": format_us(origin.at_us),
        "by": origin.by,
        "message": bundle.message,
        "observe": bundle.observe,
        "digest": bundle.digest,
        "published_at": format_us(origin.published_at_us),
        "current": bundle.revision == current,
        "changed": changed._asdict(),
    }

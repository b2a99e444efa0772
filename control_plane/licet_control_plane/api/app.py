"""The FastAPI application."""

from __future__ import annotations

from fastapi import APIRouter, Depends, FastAPI

from licet_control_plane.api import (
    api_keys,
    audit,
    bundle_history,
    bundles,
    decisions,
    evidence,
    grants,
    invoices,
    kept_aside,
    ledger,
    licenses,
    months,
    problems,
    proof,
    quotas,
    schemas,
    second_route,
    signing_keys,
    status,
    subjects,
    usage,
)
from licet_control_plane.api.auth import Gate, authenticate
from licet_control_plane.api.limits import BodyLimit
from licet_control_plane.api.requests import RequestIds
from licet_control_plane.control_plane import ControlPlane


def make_app(plane: ControlPlane) -> FastAPI:
    """The API over a control plane. Starts and ends nothing."""
    app = FastAPI(title="Licet control plane", openapi_url="/v1/openapi.json", docs_url=None, redoc_url=None)
    app.state.plane = plane
    app.state.gate = Gate()
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestIds)
    problems.install(app)
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(authenticate)])
    for part in (
        bundles,
        bundle_history,
        licenses,
        grants,
        ledger,
        decisions,
        kept_aside,
        months,
        proof,
        subjects,
        usage,
        invoices,
        quotas,
        status,
        api_keys,
        audit,
        evidence,
        signing_keys,
    ):
        v1.include_router(part.router)
    app.include_router(v1)
    app.include_router(second_route.router)
    app.include_router(status.open_router)
    app.include_router(schemas.open_router)
    return app

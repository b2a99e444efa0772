"""The FastAPI application."""

from __future__ import annotations

import time
from importlib.metadata import version

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
    license_moves,
    licenses,
    months,
    openapi,
    plans,
    problems,
    proof,
    quotas,
    schemas,
    second_route,
    signing_keys,
    status,
    subjects,
    usage,
    webhooks,
)
from licet_control_plane.api.auth import Gate, authenticate
from licet_control_plane.api.conditional import ConditionalGet
from licet_control_plane.api.idempotency import Idempotency
from licet_control_plane.api.limits import BodyLimit
from licet_control_plane.api.rate import RateLimit
from licet_control_plane.api.requests import RequestIds
from licet_control_plane.control_plane import ControlPlane


def make_app(plane: ControlPlane) -> FastAPI:
    """The API over a control plane. Starts and ends nothing."""
    app = FastAPI(
        title="Licet control plane",
        version=version("licet"),
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=openapi.operation_id,
    )
    app.state.plane = plane
    app.state.gate = Gate()
    # The last one that is added is the first that a request meets.
    app.add_middleware(ConditionalGet)
    app.add_middleware(Idempotency, plane=plane)
    app.add_middleware(BodyLimit)
    if plane.config.api_rate:
        app.add_middleware(RateLimit, per_s=plane.config.api_rate, now_s=time.monotonic)
    app.add_middleware(RequestIds)
    problems.install(app)
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(authenticate)])
    for part in (
        bundles,
        bundle_history,
        licenses,
        license_moves,
        plans,
        grants,
        ledger,
        decisions,
        kept_aside,
        months,
        proof,
        subjects,
        usage,
        invoices,
        webhooks,
        quotas,
        status,
        api_keys,
        audit,
        evidence,
        signing_keys,
    ):
        v1.include_router(part.router, tags=[part.__name__.rpartition(".")[2].replace("_", "-")])
    app.include_router(v1)
    app.include_router(second_route.router, tags=["second-route"])
    app.include_router(status.open_router, tags=["probes"])
    app.include_router(schemas.open_router, tags=["schemas"])
    openapi.describe(app)
    return app

"""The FastAPI application."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Final

from fastapi import FastAPI
from starlette.routing import BaseRoute

from licet_control_plane.api import (
    access_requests,
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
    overrides,
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
from licet_control_plane.api.auth import Gate
from licet_control_plane.api.conditional import ConditionalGet
from licet_control_plane.api.idempotency import Idempotency
from licet_control_plane.api.limits import BodyLimit
from licet_control_plane.api.rate import RateLimit
from licet_control_plane.api.requests import RequestIds
from licet_control_plane.control_plane import ControlPlane

_ROUTERS: Final = (
    bundles.router,
    bundle_history.router,
    licenses.router,
    license_moves.router,
    plans.router,
    grants.router,
    access_requests.router,
    overrides.router,
    ledger.router,
    decisions.router,
    kept_aside.router,
    months.router,
    proof.router,
    subjects.router,
    usage.router,
    invoices.router,
    webhooks.router,
    quotas.router,
    status.router,
    api_keys.router,
    audit.router,
    evidence.router,
    signing_keys.router,
    second_route.router,
    status.open_router,
    schemas.open_router,
)


def make_app(plane: ControlPlane) -> FastAPI:
    """The API over a control plane. Starts and ends nothing."""
    # Not ``include_router``: it makes each route once more, and their signatures are most of what a start costs.
    routes: list[BaseRoute] = [route for router in _ROUTERS for route in router.routes]
    app = FastAPI(
        title="Licet control plane",
        version=version("licet"),
        routes=routes,
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
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
    openapi.describe(app)
    return app

"""The FastAPI application."""

from __future__ import annotations

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
    licenses,
    months,
    overrides,
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
from licet_control_plane.api.auth import Gate
from licet_control_plane.api.limits import BodyLimit
from licet_control_plane.api.requests import RequestIds
from licet_control_plane.control_plane import ControlPlane

_ROUTERS: Final = (
    bundles.router,
    bundle_history.router,
    licenses.router,
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
        title="Licet control plane", routes=routes, openapi_url="/v1/openapi.json", docs_url=None, redoc_url=None
    )
    app.state.plane = plane
    app.state.gate = Gate()
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestIds)
    problems.install(app)
    return app

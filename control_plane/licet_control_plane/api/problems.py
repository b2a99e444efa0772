"""Errors as RFC 9457 problems, each with what to do about it in ``fix``."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from licet_control_plane.changes import GrantExists, GrantUnknown, LicenseExists, LicenseUnknown, RevisionMoved
from licet_control_plane.core.refusal import ChangeInvalid
from licet_control_plane.core.sealed_events import Damaged
from licet_control_plane.redis_link import RedisRefused, RedisUnavailable
from licet_control_plane.store.database import DatabaseUnavailable

MEDIA_TYPE: Final = "application/problem+json"
RETRY_AFTER_S: Final = "2"

log = structlog.get_logger(__name__)


class Problem(Exception):
    """A request that is not done. ``detail`` says what was wrong, ``fix`` what to do."""

    def __init__(
        self,
        status: int,
        detail: str,
        fix: str,
        *,
        errors: list[dict[str, Any]] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.fix = fix
        self.errors = errors
        self.retry_after_s = retry_after_s


def response(
    status: int,
    detail: str,
    fix: str,
    *,
    errors: list[dict[str, Any]] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The problem as it goes out."""
    body: dict[str, Any] = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    body |= {"detail": detail, "fix": fix}
    if errors is not None:
        body["errors"] = errors
    return JSONResponse(body, status, headers=headers, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Turn every error of a route into a problem."""

    @app.exception_handler(Problem)
    async def _problem(_request: Request, error: Problem) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"} if error.status == HTTPStatus.UNAUTHORIZED else {}
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(error.retry_after_s)
        return response(error.status, error.detail, error.fix, errors=error.errors, headers=headers)

    @app.exception_handler(ChangeInvalid)
    async def _invalid(_request: Request, error: ChangeInvalid) -> JSONResponse:
        one = {"file": "", "line": 0, "column": 0, "path": error.field, "message": str(error), "fix": error.fix}
        return response(422, f"{error.field}: {error}.", error.fix, errors=[one])

    @app.exception_handler(LicenseExists)
    async def _exists(_request: Request, error: LicenseExists) -> JSONResponse:
        return response(409, f"{error} has a license already.", "Change it with PATCH /v1/licenses/{tenant}.")

    @app.exception_handler(LicenseUnknown)
    async def _unknown(_request: Request, error: LicenseUnknown) -> JSONResponse:
        return response(404, f"{error} has no license.", "Create one with POST /v1/licenses, or look at the spelling.")

    @app.exception_handler(GrantExists)
    async def _grant_exists(_request: Request, error: GrantExists) -> JSONResponse:
        detail = f"The license has another grant with the id {str(error)!r}."
        return response(409, detail, "Give the new one another id, or revoke the old one first.")

    @app.exception_handler(GrantUnknown)
    async def _grant_unknown(_request: Request, error: GrantUnknown) -> JSONResponse:
        detail = f"The license has no grant {str(error)!r}."
        return response(404, detail, "GET /v1/licenses/{tenant}/grants lists those it has.")

    @app.exception_handler(RevisionMoved)
    async def _moved(_request: Request, error: RevisionMoved) -> JSONResponse:
        detail = f"It was changed meanwhile: {error}."
        return response(412, detail, "Read it again, and repeat the change with the new ETag in If-Match.")

    @app.exception_handler(DatabaseUnavailable)
    async def _database(_request: Request, error: DatabaseUnavailable) -> JSONResponse:
        log.error("a request failed", reason=str(error))
        return response(503, f"{error}.", "Try again; nothing was changed.", headers={"Retry-After": RETRY_AFTER_S})

    @app.exception_handler(Damaged)
    async def _damaged(_request: Request, error: Damaged) -> JSONResponse:
        log.error("the ledger was altered", reason=str(error))
        fix = "Run licet ledger verify: it says which event. Then restore the database from a backup."
        return response(500, f"An event of the ledger was altered: {error}.", fix)

    @app.exception_handler(RedisUnavailable)
    async def _redis(_request: Request, error: RedisUnavailable) -> JSONResponse:
        return response(503, f"Redis does not serve: {error}.", error.fix, headers={"Retry-After": RETRY_AFTER_S})

    @app.exception_handler(RedisRefused)
    async def _refused(_request: Request, error: RedisRefused) -> JSONResponse:
        log.error("a request failed", reason=str(error), fix=error.fix)
        return response(503, f"{error}.", error.fix, headers={"Retry-After": RETRY_AFTER_S})

    @app.exception_handler(RequestValidationError)
    async def _validation(_request: Request, error: RequestValidationError) -> JSONResponse:
        errors = [
            {
                "file": "",
                "line": 0,
                "column": 0,
                "path": ".".join(str(part) for part in one["loc"][1:]) or str(one["loc"][0]),
                "message": one["msg"],
                "fix": "Send it as the API's description has it, /v1/openapi.json.",
            }
            for one in error.errors()
        ]
        first = errors[0]
        return response(422, f"{first['path']}: {first['message']}.", first["fix"], errors=errors)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        fix = "Look at the address and the method: /v1/openapi.json lists what there is."
        return response(error.status_code, f"{request.method} {request.url.path}: {error.detail}.", fix)

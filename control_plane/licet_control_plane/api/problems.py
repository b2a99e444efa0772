"""Errors as RFC 9457 problems, each with what to do about it in ``fix``."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException

from licet_control_plane.access_desk import RequestUnknown
from licet_control_plane.changes import GrantExists, GrantUnknown, LicenseExists, LicenseUnknown, RevisionMoved
from licet_control_plane.core.access_requests import Expired, NotAllowed, NotPossible, OwnRequest, Settled
from licet_control_plane.core.lifecycle import MoveRefused
from licet_control_plane.core.refusal import ChangeInvalid
from licet_control_plane.core.sealed_events import Damaged
from licet_control_plane.override_desk import OverrideExists, OverrideUnknown
from licet_control_plane.redis_link import RedisRefused, RedisUnavailable
from licet_control_plane.store.database import DatabaseUnavailable

MEDIA_TYPE: Final = "application/problem+json"
RETRY_AFTER_S: Final = "2"

log = structlog.get_logger(__name__)


TYPE_PREFIX: Final = "urn:licet:problem:"
KINDS: Final = {
    400: "request",
    401: "key",
    403: "role",
    404: "not-found",
    405: "method",
    409: "conflict",
    412: "changed",
    413: "too-large",
    415: "media-type",
    422: "invalid",
    429: "rate",
    500: "internal",
    503: "unavailable",
}
"""What a problem's ``type`` ends with, when nothing says it closer. Stable: programs go by it."""


class Problem(Exception):
    """A request that is not done. ``detail`` says what was wrong, ``fix`` what to do; ``kind`` ends the ``type``."""

    def __init__(
        self,
        status: int,
        detail: str,
        fix: str,
        *,
        errors: list[dict[str, Any]] | None = None,
        retry_after_s: int | None = None,
        kind: str = "",
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.fix = fix
        self.errors = errors
        self.kind = kind
        self.retry_after_s = retry_after_s


def response(
    status: int,
    detail: str,
    fix: str,
    *,
    errors: list[dict[str, Any]] | None = None,
    headers: Mapping[str, str] | None = None,
    kind: str = "",
) -> JSONResponse:
    """The problem as it goes out."""
    type_ = TYPE_PREFIX + (kind or KINDS.get(status, "request"))
    body: dict[str, Any] = {"type": type_, "title": HTTPStatus(status).phrase, "status": status}
    body |= {"detail": detail, "fix": fix}
    if errors is not None:
        body["errors"] = errors
    return JSONResponse(body, status, headers=headers, media_type=MEDIA_TYPE)


def _of_field(path: str, message: str, fix: str) -> dict[str, Any]:
    """An error of a request's field, which is in no file."""
    return {"file": "", "line": 0, "column": 0, "path": path, "message": message, "fix": fix}


def install(app: FastAPI) -> None:
    """Turn every error of a route into a problem."""

    @app.exception_handler(Problem)
    async def _problem(_request: Request, error: Problem) -> JSONResponse:
        headers = {"WWW-Authenticate": "Bearer"} if error.status == HTTPStatus.UNAUTHORIZED else {}
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(error.retry_after_s)
        return response(error.status, error.detail, error.fix, errors=error.errors, headers=headers, kind=error.kind)

    @app.exception_handler(ChangeInvalid)
    async def _invalid(_request: Request, error: ChangeInvalid) -> JSONResponse:
        one = _of_field(error.field, str(error), error.fix)
        return response(422, f"{error.field}: {error}.", error.fix, errors=[one])

    @app.exception_handler(LicenseExists)
    async def _exists(_request: Request, error: LicenseExists) -> JSONResponse:
        return response(
            409, f"{error} has a license already.", "Change it with PATCH /v1/licenses/{tenant}.", kind="license-exists"
        )

    @app.exception_handler(LicenseUnknown)
    async def _unknown(_request: Request, error: LicenseUnknown) -> JSONResponse:
        fix = "Create one with POST /v1/licenses, or look at the spelling."
        return response(404, f"{error} has no license.", fix, kind="license-unknown")

    @app.exception_handler(GrantExists)
    async def _grant_exists(_request: Request, error: GrantExists) -> JSONResponse:
        detail = f"The license has another grant with the id {str(error)!r}."
        return response(409, detail, "Give the new one another id, or revoke the old one first.", kind="grant-exists")

    @app.exception_handler(GrantUnknown)
    async def _grant_unknown(_request: Request, error: GrantUnknown) -> JSONResponse:
        detail = f"The license has no grant {str(error)!r}."
        return response(404, detail, "GET /v1/licenses/{tenant}/grants lists those it has.", kind="grant-unknown")

    @app.exception_handler(MoveRefused)
    async def _refused_move(_request: Request, error: MoveRefused) -> JSONResponse:
        detail = f"The license is {error.stage.value}, and cannot {error.move.value}: {error}."
        return response(409, detail, error.fix, kind="license-state")

    @app.exception_handler(RequestUnknown)
    async def _request_unknown(_request: Request, error: RequestUnknown) -> JSONResponse:
        detail = f"There is no access request {str(error)!r}."
        return response(404, detail, "GET /v1/access-requests lists them.", kind="access-request-unknown")

    @app.exception_handler(NotAllowed)
    async def _not_approver(_request: Request, error: NotAllowed) -> JSONResponse:
        kind = "access-request-own" if isinstance(error, OwnRequest) else "access-request-approver"
        return response(403, f"{error}.", error.fix, kind=kind)

    @app.exception_handler(NotPossible)
    async def _not_possible(_request: Request, error: NotPossible) -> JSONResponse:
        kinds = {Settled: "access-request-settled", Expired: "access-request-expired"}
        return response(409, f"{error}.", error.fix, kind=kinds.get(type(error), "access-request-state"))

    @app.exception_handler(OverrideUnknown)
    async def _override_unknown(_request: Request, error: OverrideUnknown) -> JSONResponse:
        detail = f"There is no override {str(error)!r}."
        return response(404, detail, "GET /v1/overrides lists them.", kind="override-unknown")

    @app.exception_handler(OverrideExists)
    async def _override_exists(_request: Request, error: OverrideExists) -> JSONResponse:
        message, fix = f"there is another override {str(error)!r}", "Give this one another id, or none."
        return response(422, f"id: {message}.", fix, errors=[_of_field("id", message, fix)], kind="override-exists")

    @app.exception_handler(RevisionMoved)
    async def _moved(_request: Request, error: RevisionMoved) -> JSONResponse:
        if error.revision is None:
            return response(412, "There is none that If-Match could match.", "Leave If-Match out to make a new one.")
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
            _of_field(
                ".".join(str(part) for part in one["loc"][1:]) or str(one["loc"][0]),
                one["msg"],
                "Send it as the API's description has it, /v1/openapi.json.",
            )
            for one in error.errors()
        ]
        first = errors[0]
        return response(422, f"{first['path']}: {first['message']}.", first["fix"], errors=errors)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        fix = "Look at the address and the method: /v1/openapi.json lists what there is."
        detail = f"{request.method} {request.url.path}: {error.detail}."
        return response(error.status_code, detail, fix, headers=error.headers)

    @app.exception_handler(DataError)
    @app.exception_handler(OverflowError)
    async def _unstorable(_request: Request, error: Exception) -> JSONResponse:
        # PostgreSQL takes no NUL in a text and no number beyond 64 bits, SQLite no such number: nobody has one.
        log.info("a value fits no column", reason=type(error).__name__)
        fix = "Send texts without NUL characters, and numbers below 2^63."
        return response(422, "A value of the request is one that nothing can have.", fix)

    @app.exception_handler(Exception)
    async def _internal(_request: Request, error: Exception) -> JSONResponse:
        # The server logs it with its trace.
        fix = "Look at the server's log, and report it. Whether anything was changed, reading it again tells."
        return response(500, f"The server failed: {type(error).__name__}.", fix)

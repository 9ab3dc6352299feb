"""Errors as RFC 9457 problem details, the same for every endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

import msgspec
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from sqlalchemy.exc import DataError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException as StarletteHTTPException

from gradwatch.wire.api import Problem
from gradwatch.wire.codec import BatchError, BatchTooLargeError
from gradwatch.wire.frame import Rejection
from gradwatch_server.answers import NoArrowError
from gradwatch_server.audits import AuditError
from gradwatch_server.channels import FixedChannelError
from gradwatch_server.ingest import UnknownRunError, UnstorableRunError
from gradwatch_server.notifier import ChannelError
from gradwatch_server.queries import NotFoundError
from gradwatch_server.recorded import CursorError
from gradwatch_server.tokens import (
    DeniedError,
    TokenError,
    TooManyRequestsError,
    UnknownTokenError,
)
from gradwatch_server.writer import BusyError

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1


def problem(
    status: int,
    detail: str,
    rejected: Sequence[Rejection] = (),
    headers: dict[str, str] | None = None,
) -> Response:
    """A response that says what is wrong."""
    body = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        rejected=[
            {"place": item.place, "reason": item.reason, "conflict": item.conflict}
            for item in rejected
        ],
    )
    return Response(msgspec.json.encode(body), status, headers, MEDIA_TYPE)


def add_handlers(app: FastAPI) -> None:
    """Turn every error that is foreseen into a problem; telemetry.Observed answers for others."""

    @app.exception_handler(StarletteHTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:  # pyright: ignore[reportUnusedFunction]
        return problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:  # pyright: ignore[reportUnusedFunction]
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return problem(422, f"{where}: {first['msg']}")

    @app.exception_handler(DeniedError)
    async def _denied(_: Request, error: DeniedError) -> Response:  # pyright: ignore[reportUnusedFunction]
        asked = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
        return problem(error.status, str(error), headers=asked)

    statuses: dict[type[Exception], int] = {
        NotFoundError: 404,
        UnknownRunError: 404,
        UnknownTokenError: 404,
        NoArrowError: 406,
        CursorError: 422,
        AuditError: 422,
        TokenError: 422,
        ChannelError: 422,
        FixedChannelError: 409,
        BatchTooLargeError: 413,
        BatchError: 400,
        UnstorableRunError: 422,
        msgspec.ValidationError: 422,
        msgspec.DecodeError: 400,
        # msgspec's way to say that values are nested too deeply.
        RecursionError: 400,
        BusyError: 429,
        TooManyRequestsError: 429,
        # A value that this database cannot hold: trying again would not help.
        DataError: 422,
        DBAPIError: 503,
        PoolTimeoutError: 503,
    }
    for kind in statuses:

        @app.exception_handler(kind)
        async def _known(_: Request, error: Exception) -> Response:  # pyright: ignore[reportUnusedFunction]
            status = next(code for kind, code in statuses.items() if isinstance(error, kind))
            wait = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None
            return problem(status, _detail(error), headers=wait)


def _detail(error: Exception) -> str:
    if isinstance(error, UnknownRunError):
        return f"run {error} was not introduced: PUT it first"
    if isinstance(error, DataError):
        return f"the database cannot hold a value of this: {error.orig}"
    if isinstance(error, (DBAPIError, PoolTimeoutError)):
        return "the database does not answer; try again"
    if isinstance(error, RecursionError):
        return "the body is nested too deeply"
    return str(error)

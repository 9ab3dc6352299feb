"""Tokens: made, listed and revoked by those who hold one of scope admin."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from gradwatch.wire.api import NewToken, TokenRequest, TokenView
from gradwatch_server.access import Administering, settled_project
from gradwatch_server.answers import answer
from gradwatch_server.context import Shared
from gradwatch_server.database import reading, writing
from gradwatch_server.documents import answered, taken
from gradwatch_server.routes.records import body_of
from gradwatch_server.tokens import issue, revoke, tokens
from gradwatch_server.views import token_view

router = APIRouter(prefix="/api/v1/tokens", tags=["tokens"])

TokenKey = Annotated[str, Path(pattern="^[0-9a-f]{12}$", description="the token's middle part")]


@router.post(
    "",
    status_code=201,
    summary="Make a token",
    description=(
        "The token is shown in this answer and never again. Scopes: ingest sends, read reads, "
        "admin does both and changes, deletes and makes tokens. One for a project sees nothing "
        "of others. Needs the scope admin."
    ),
    responses=answered(NewToken, "The token", status=201),
    openapi_extra=taken(TokenRequest),
)
async def create_token(request: Request, shared: Shared, grant: Administering) -> Response:
    asked = msgspec.json.decode(await body_of(request), type=TokenRequest)
    project = settled_project(grant, asked.project)

    def make() -> NewToken:
        with writing(shared.engine) as session:
            text, row = issue(session, asked.name, asked.scopes, project)
            session.flush()
            return NewToken(token=text, view=token_view(row))

    made = await asyncio.to_thread(make)
    shared.keyring.forget()
    return answer(request, made, status=201)


@router.get(
    "",
    summary="Tokens without their secrets, the newest first",
    responses=answered(list[TokenView], "All of them, or those of the caller's project"),
)
def list_tokens(request: Request, shared: Shared, grant: Administering) -> Response:
    with reading(shared.engine) as session:
        return answer(request, [token_view(row) for row in tokens(session, grant.project)])


@router.delete(
    "/{key}",
    summary="Revoke a token",
    description="It is good for two more seconds at most, in other collectors' memory.",
    status_code=204,
    response_class=Response,
)
def revoke_token(key: TokenKey, shared: Shared, grant: Administering) -> Response:
    with writing(shared.engine) as session:
        revoke(session, key, grant.project)
    shared.keyring.forget()
    return Response(status_code=204)

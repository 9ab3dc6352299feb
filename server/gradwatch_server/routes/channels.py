"""Where alerts are sent: shown, made, changed, tried and deleted."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from gradwatch.wire.api import ChannelPatch, ChannelRequest, ChannelView
from gradwatch_server import channels
from gradwatch_server.access import Administering, settled_project
from gradwatch_server.answers import answer
from gradwatch_server.context import Shared
from gradwatch_server.database import reading, writing
from gradwatch_server.documents import answered, taken
from gradwatch_server.notifier import send_test
from gradwatch_server.problems import problem
from gradwatch_server.routes.records import body_of

router = APIRouter(prefix="/api/v1/channels", tags=["channels"])

ChannelKey = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="as the list names it")]


@router.get(
    "",
    summary="Channels for alerts, and what became of their messages",
    description=(
        "Those of the collector's setting GRADWATCH_NOTIFY, and those made here. Addresses hold "
        "secrets: only their scheme is shown. Needs the scope admin."
    ),
    responses=answered(list[ChannelView], "All of them, or those of the caller's project"),
)
def list_channels(request: Request, shared: Shared, grant: Administering) -> Response:
    with reading(shared.engine) as session:
        found = channels.views(session, grant.project, shared.settings.channels)
        return answer(request, found)


@router.post(
    "",
    status_code=201,
    summary="Make a channel",
    description=(
        "It gets the alerts of one project's runs, or of all. `url` is Apprise's; schemes that "
        "are not reached over the network are refused. Needs the scope admin."
    ),
    responses=answered(ChannelView, "The channel", status=201),
    openapi_extra=taken(ChannelRequest),
)
async def create_channel(request: Request, shared: Shared, grant: Administering) -> Response:
    asked = msgspec.json.decode(await body_of(request), type=ChannelRequest)
    project = settled_project(grant, asked.project)

    def create() -> ChannelView:
        with writing(shared.engine) as session:
            return channels.create(session, asked, project)

    return answer(request, await asyncio.to_thread(create), status=201)


@router.patch(
    "/{channel}",
    summary="Change a channel's name or address, or pause it",
    description=(
        "Fields that are left out stay as they are. 409 for a channel of the settings. Needs the "
        "scope admin."
    ),
    responses=answered(ChannelView, "The channel as it is now"),
    openapi_extra=taken(ChannelPatch),
)
async def change_channel(
    channel: ChannelKey, request: Request, shared: Shared, grant: Administering
) -> Response:
    patch = msgspec.json.decode(await body_of(request), type=ChannelPatch)

    def change() -> ChannelView:
        with writing(shared.engine) as session:
            row = channels.find(session, channel, grant.project, shared.settings.channels)
            return channels.change(session, row, patch)

    return answer(request, await asyncio.to_thread(change))


@router.delete(
    "/{channel}",
    summary="Delete a channel",
    description="Messages that wait for it are not sent. 409 for a channel of the settings.",
    status_code=204,
    response_class=Response,
)
def delete_channel(channel: ChannelKey, shared: Shared, grant: Administering) -> Response:
    with writing(shared.engine) as session:
        session.delete(channels.find(session, channel, grant.project, shared.settings.channels))
    return Response(status_code=204)


@router.post(
    "/{channel}/test",
    summary="Send a test message to a channel",
    description="Answered when the service took it; 502 with the reason when it did not.",
    status_code=204,
    response_class=Response,
)
def try_channel(channel: ChannelKey, shared: Shared, grant: Administering) -> Response:
    with reading(shared.engine) as session:
        url = channels.reachable(session, channel, grant.project, shared.settings.channels)
    trouble = send_test(url, shared.settings.notify_local == "allow")
    return problem(502, trouble) if trouble else Response(status_code=204)

"""Where alerts are sent."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from gradwatch.wire.api import ChannelView
from gradwatch_server.access import Administering, over_all_projects
from gradwatch_server.alerts import channel_digest, channel_views, send_test
from gradwatch_server.answers import answer
from gradwatch_server.context import Shared
from gradwatch_server.database import reading
from gradwatch_server.documents import answered
from gradwatch_server.problems import problem
from gradwatch_server.queries import NotFoundError

router = APIRouter(prefix="/api/v1/channels", tags=["channels"])

ChannelKey = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="as the list names it")]


@router.get(
    "",
    summary="Channels for alerts, and what became of their messages",
    description=(
        "Channels are the collector's setting GRADWATCH_NOTIFY. Their addresses hold secrets: "
        "they are shown by scheme and digest. Needs the scope admin."
    ),
    responses=answered(list[ChannelView], "In the order of the setting"),
)
def list_channels(request: Request, shared: Shared, grant: Administering) -> Response:
    over_all_projects(grant)
    with reading(shared.engine) as session:
        return answer(request, channel_views(session, shared.settings.channels))


@router.post(
    "/{channel}/test",
    summary="Send a test message to a channel",
    description="Answered when the service took it; 502 with the reason when it did not.",
    status_code=204,
    response_class=Response,
)
def try_channel(channel: ChannelKey, shared: Shared, grant: Administering) -> Response:
    over_all_projects(grant)
    urls = {channel_digest(url): url for url in shared.settings.channels}
    if channel not in urls:
        raise NotFoundError(f"there is no channel {channel!r}")
    trouble = send_test(urls[channel], shared.settings.notify_local == "allow")
    return problem(502, trouble) if trouble else Response(status_code=204)

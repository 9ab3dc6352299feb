"""Where alerts are sent."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from gradwatch.wire.api import ChannelView
from gradwatch_server.access import Administering
from gradwatch_server.alerts import channel_views
from gradwatch_server.answers import answer
from gradwatch_server.context import Shared
from gradwatch_server.database import reading
from gradwatch_server.documents import answered

router = APIRouter(prefix="/api/v1/channels", tags=["channels"])


@router.get(
    "",
    summary="Channels for alerts, and what became of their messages",
    description=(
        "Channels are the collector's setting GRADWATCH_NOTIFY. Their addresses hold secrets: "
        "they are shown by scheme and digest. Needs the scope admin."
    ),
    responses=answered(list[ChannelView], "In the order of the setting"),
)
def list_channels(request: Request, shared: Shared, _: Administering) -> Response:
    with reading(shared.engine) as session:
        return answer(request, channel_views(session, shared.settings.channels))

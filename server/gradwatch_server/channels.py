"""Where alerts go: the settings' channels, for every run, and those made over the API.

The former are named by a digest of their URL, the latter by a random key: a URL may hold secrets,
and leaves the database for the service alone that it leads to.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence

from sqlalchemy import Select, func, or_, select
from sqlalchemy.orm import Session

from gradwatch.wire.api import ChannelPatch, ChannelRequest, ChannelView
from gradwatch_server.models import FAILED, PENDING, SENT, Alert, ChannelRow, Run
from gradwatch_server.notifier import ChannelError, check_channel
from gradwatch_server.queries import NotFoundError

# Every finding of a run is sent to each of them.
MAX_CHANNELS = 100
SETTING = "GRADWATCH_NOTIFY"


class ClosedChannelError(LookupError):
    """A channel that gets no message any more. The message says why."""


class FixedChannelError(ValueError):
    """A channel of the settings, which the API cannot change."""


def channel_digest(url: str) -> str:
    """Names a channel of the settings without telling its secrets."""
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def recipients(session: Session, run_id: int) -> Sequence[str]:
    """Keys of the channels made over the API that get the alerts of a run."""
    wants = or_(ChannelRow.project.is_(None), ChannelRow.project == Run.project)
    chosen = select(ChannelRow.key).join(Run, wants)
    open_ones = chosen.where(Run.id == run_id, ChannelRow.paused.is_(False))
    return session.scalars(open_ones.order_by(ChannelRow.id)).all()


def address_of(session: Session, channel: str, configured: Sequence[str]) -> str:
    """The URL of a channel, with its secrets. configured: the settings' URLs.

    Raises ClosedChannelError for one that is gone or paused.
    """
    try:
        row = _reached(session, channel, None, configured)
    except NotFoundError:
        raise ClosedChannelError("this channel is no longer configured") from None
    if row.paused:
        raise ClosedChannelError("this channel is paused")
    return row.url


def create(session: Session, asked: ChannelRequest, project: str | None) -> ChannelView:
    """Make a channel for a project, or for all with None. Raises ChannelError."""
    check_channel(asked.url)
    count = session.scalar(
        select(func.count()).select_from(ChannelRow).where(ChannelRow.project == project)
    )
    if (count or 0) >= MAX_CHANNELS:
        raise ChannelError(f"there are {MAX_CHANNELS} channels already; delete one first")
    row = ChannelRow(
        key=secrets.token_hex(16),
        name=asked.name,
        url=asked.url,
        project=project,
        paused=False,
        created_at=time.time(),
    )
    session.add(row)
    return _view(session, row)


def change(session: Session, row: ChannelRow, patch: ChannelPatch) -> ChannelView:
    """Change what is not None of a channel. Raises ChannelError."""
    if patch.url is not None:
        check_channel(patch.url)
        row.url = patch.url
    row.name = row.name if patch.name is None else patch.name
    row.paused = row.paused if patch.paused is None else patch.paused
    return _view(session, row)


def find(
    session: Session, channel: str, project: str | None, configured: Sequence[str]
) -> ChannelRow:
    """A channel that the API may change. project: the only one that the caller reaches.

    Raises NotFoundError, and FixedChannelError for a channel of the settings.
    """
    row = _reached(session, channel, project, configured)
    if row not in session:
        raise FixedChannelError(f"{SETTING} sets this channel: change it there")
    return row


def reachable(
    session: Session, channel: str, project: str | None, configured: Sequence[str]
) -> str:
    """The URL of any channel that the caller reaches, with its secrets. Raises NotFoundError."""
    return _reached(session, channel, project, configured).url


def views(session: Session, project: str | None, configured: Sequence[str]) -> list[ChannelView]:
    """Channels that may be shown to a caller, as they may be shown: the settings' ones first."""
    reached = _all_reached(project)
    made = session.scalars(reached.order_by(ChannelRow.id))
    fixed = [] if project is not None else _of_settings(configured).values()
    return [_view(session, row) for row in (*fixed, *made)]


def _reached(
    session: Session, channel: str, project: str | None, configured: Sequence[str]
) -> ChannelRow:
    row = session.scalar(_all_reached(project).where(ChannelRow.key == channel))
    if row is None and project is None:
        row = _of_settings(configured).get(channel)
    if row is None:
        raise NotFoundError(f"there is no channel {channel!r}")
    return row


def _all_reached(project: str | None) -> Select[ChannelRow]:
    chosen = select(ChannelRow)
    return chosen if project is None else chosen.where(ChannelRow.project == project)


def _of_settings(configured: Sequence[str]) -> dict[str, ChannelRow]:
    """Channels of the settings by key, as rows that no table holds."""
    return {
        (key := channel_digest(url)): ChannelRow(
            key=key, name=SETTING, url=url, project=None, paused=False, created_at=None
        )
        for url in configured
    }


def _view(session: Session, row: ChannelRow) -> ChannelView:
    """A channel without its secrets, with what became of its messages."""
    own = Alert.channel == row.key
    counted = session.execute(select(Alert.state, func.count()).where(own).group_by(Alert.state))
    counts = dict(counted.all())
    failures = select(Alert.last_error).where(own, Alert.last_error != "")
    scheme = row.url.partition("://")[0].lower()
    return ChannelView(
        channel=row.key,
        name=row.name,
        scheme=scheme,
        url=f"{scheme}://****",
        project=row.project,
        paused=row.paused,
        created_at=row.created_at,
        pending=counts.get(PENDING, 0),
        sent=counts.get(SENT, 0),
        failed=counts.get(FAILED, 0),
        last_error=session.scalar(failures.order_by(Alert.id.desc()).limit(1)) or "",
    )

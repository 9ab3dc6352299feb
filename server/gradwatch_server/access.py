"""Who may call an endpoint: each names the scope it needs, and is told the caller's project."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Path, Query, Request
from sqlalchemy import select
from sqlalchemy.orm import Session

from gradwatch_server.context import Shared
from gradwatch_server.models import Run
from gradwatch_server.queries import NotFoundError, find_run
from gradwatch_server.tokens import DeniedError, Grant, Scope

MAX_NUMBER = 2**53  # as in JSON; a database refuses larger ones in ways of its own
Step = Annotated[int | None, Query(ge=0, le=MAX_NUMBER)]
RunKey = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="32 hexadecimal digits")]


class _Needs:
    """A dependency that lets in who has the scope."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def __call__(self, request: Request, shared: Shared) -> Grant:
        _refuse_other_sites(request)
        grant = shared.keyring.admit(request.headers.get("Authorization", ""))
        if not grant.allows(self.scope):
            held = ", ".join(sorted(grant.scopes))
            raise DeniedError(f"this needs the scope {self.scope}; the token has {held}", 403)
        return grant


def _refuse_other_sites(request: Request) -> None:
    """A page of another site may not change anything by its visitor's browser, on loopback least
    of all, where no token is asked for."""
    origin = request.headers.get("Origin")
    if origin is None or request.method in ("GET", "HEAD"):
        return
    if urlsplit(origin).netloc != request.headers.get("Host"):
        raise DeniedError("requests of other sites' pages are refused", 403)


Ingesting = Annotated[Grant, Depends(_Needs(Scope.INGEST))]
Reading = Annotated[Grant, Depends(_Needs(Scope.READ))]
Administering = Annotated[Grant, Depends(_Needs(Scope.ADMIN))]


def settled_project(grant: Grant, asked: str | None) -> str | None:
    """The project that what a caller makes is for: the one asked for, or else the caller's own.

    Returns None for all of them. Raises DeniedError for one that the caller does not reach.
    """
    project = grant.project if asked is None else asked
    if not grant.reaches(project):
        raise DeniedError(f"project: the token is for {grant.project!r} alone", 403)
    return project


def over_all_projects(grant: Grant) -> None:
    """Raises DeniedError for a token of one project: what follows tells of all of them."""
    if grant.project is not None:
        raise DeniedError(f"this is of all projects; the token is for {grant.project!r} alone", 403)


def locked_run(session: Session, grant: Grant, run: str) -> Run:
    """A run of the caller's project that nobody else writes until the transaction ends.

    Raises NotFoundError.
    """
    # Asked for and locked at once: between the two it might be deleted.
    found = session.scalar(select(Run).where(Run.key == run).with_for_update())
    if found is None or not grant.reaches(found.project):
        raise NotFoundError(f"there is no run {run!r}")
    return found


def reachable_run(session: Session, grant: Grant, run: str) -> Run:
    """A run of the caller's project. Raises NotFoundError: others' runs are not even there."""
    found = find_run(session, run)
    if not grant.reaches(found.project):
        raise NotFoundError(f"there is no run {run!r}")
    return found

"""Tokens: who may do what, in which project.

A token is shown once, when it is made. What is kept is a public key, to find it by, and a hash of
its secret: 256 random bits need no slow hash, nobody can try them all.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from gradwatch_server.database import writing
from gradwatch_server.models import TokenRow

PREFIX = "gw"
KEY_BYTES = 6
SECRET_BYTES = 32
# How long another process may still take a revoked token for good.
REMEMBER_S = 2.0
# Written down at most this often: a token is used at every request.
NOTE_USE_EVERY_S = 60.0
MAX_REMEMBERED = 10_000
# A token may send twice its rate at once, after some quiet.
BURST_S = 2.0


class Scope(StrEnum):
    """What a token is good for."""

    INGEST = "ingest"  # introduce runs and send their records
    READ = "read"  # read everything that was recorded
    ADMIN = "admin"  # both, and change, delete, and hand out tokens


ALL_SCOPES = frozenset(Scope)


class Grant(NamedTuple):
    """What the bearer of a request may do."""

    scopes: frozenset[Scope]
    project: str | None = None  # None for all projects

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def reaches(self, project: str | None) -> bool:
        return self.project is None or self.project == project


class TokenError(ValueError):
    """A token cannot be made so. The message says why."""


class UnknownTokenError(LookupError):
    """There is no such token."""


class DeniedError(PermissionError):
    """A request without a token, or with one that is not good here. `status` is 401 or 403."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class TooManyRequestsError(RuntimeError):
    """A token sends more requests than it may."""


def issue(
    session: Session, name: str, scopes: Iterable[str], project: str | None
) -> tuple[str, TokenRow]:
    """Make a token; returns its text, which nobody can read again, and its row.

    Raises TokenError.
    """
    asked = sorted(set(scopes))
    unknown = [scope for scope in asked if scope not in ALL_SCOPES]
    if unknown or not asked:
        wrong = f"{unknown[0]!r} is no scope" if unknown else "a token needs a scope"
        raise TokenError(f"{wrong}; known are {', '.join(Scope)}")
    key = secrets.token_hex(KEY_BYTES)
    secret = secrets.token_urlsafe(SECRET_BYTES)
    row = TokenRow(
        key=key,
        name=name,
        scopes=" ".join(asked),
        project=project,
        digest=_digest(secret),
        created_at=time.time(),
    )
    session.add(row)
    return f"{PREFIX}_{key}_{secret}", row


def tokens(session: Session, project: str | None = None) -> Sequence[TokenRow]:
    """All tokens, or those of one project, the newest first."""
    chosen = select(TokenRow).order_by(TokenRow.id.desc())
    if project is not None:
        chosen = chosen.where(TokenRow.project == project)
    return session.scalars(chosen).all()


def revoke(session: Session, key: str, project: str | None = None) -> None:
    """Make a token worthless, for good. Raises UnknownTokenError when there is none.

    project: the only one whose tokens the caller may revoke; None for any.
    """
    row = session.scalar(select(TokenRow).where(TokenRow.key == key))
    if row is None or project not in (None, row.project):
        raise UnknownTokenError(f"there is no token {key!r}")
    row.revoked_at = row.revoked_at or time.time()


def any_token(engine: Engine) -> bool:
    """Whether a token was made that is still good."""
    with Session(engine) as session:
        live = select(func.count()).select_from(TokenRow).where(TokenRow.revoked_at.is_(None))
        return bool(session.scalar(live))


class _Known(NamedTuple):
    """A row of the table as it was a moment ago; None for a key that is not there."""

    id: int
    digest: bytes
    grant: Grant
    live: bool


class Keyring:
    """Knows which tokens are good, for the requests of one collector. Safe in threads."""

    def __init__(self, engine: Engine, master: str, guarded: bool, requests_a_s: float) -> None:
        """master: a token from the settings, good for everything; empty for none.

        guarded: whether requests need a token even while none was made.
        requests_a_s: how many a token may send, over more than a moment.
        """
        self._engine = engine
        self._master = _digest(master) if master else None
        self._guarded = guarded or bool(master)
        self._rate = requests_a_s
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, _Known | None]] = {}
        self._any: tuple[float, bool] = (-REMEMBER_S, False)
        self._allowance: dict[str, tuple[float, float]] = {}  # requests left, and when
        self._noted: dict[int, float] = {}

    def admit(self, authorization: str) -> Grant:
        """What the bearer of this header may do.

        Raises DeniedError when it is not good, TooManyRequestsError when it is used too often.
        """
        scheme, _, given = authorization.partition(" ")
        text = given.strip()
        if not text or scheme.lower() != "bearer":  # schemes are written in any case
            if self._open():
                return Grant(ALL_SCOPES)
            raise DeniedError("this collector wants a token: set GRADWATCH_TOKEN", 401)
        if self._master and hmac.compare_digest(_digest(text), self._master):
            self._count("")
            return Grant(ALL_SCOPES)
        prefix, _, rest = text.partition("_")
        key, _, secret = rest.partition("_")
        known = self._find(key) if prefix == PREFIX else None
        # A hash is compared in any case, so that keys cannot be guessed by the clock.
        good = hmac.compare_digest(_digest(secret), known.digest if known else bytes(32))
        if known is None or not good or not known.live:
            if self._open():
                return Grant(ALL_SCOPES)
            raise DeniedError(
                "this token is not good here: it was mistyped or revoked; set GRADWATCH_TOKEN", 401
            )
        self._count(key)
        self._note_use(known.id)
        return known.grant

    def forget(self) -> None:
        """Look everything up again: tokens were made or revoked in this process."""
        with self._lock:
            self._known.clear()
            self._any = (-REMEMBER_S, False)

    def _open(self) -> bool:
        """Whether nobody needs a token: on loopback, and only until one was made."""
        if self._guarded:
            return False
        now = time.monotonic()
        if now - self._any[0] > REMEMBER_S:
            self._any = (now, any_token(self._engine))
        return not self._any[1]

    def _find(self, key: str) -> _Known | None:
        now = time.monotonic()
        with self._lock:
            at, known = self._known.get(key, (-REMEMBER_S, None))
        if now - at <= REMEMBER_S:
            return known
        with Session(self._engine) as session:
            row = session.scalar(select(TokenRow).where(TokenRow.key == key))
            known = row and _Known(
                row.id,
                row.digest,
                Grant(frozenset(map(Scope, row.scopes.split())), row.project),
                row.revoked_at is None,
            )
        with self._lock:
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
            self._known[key] = (now, known)
        return known

    def _count(self, key: str) -> None:
        now = time.monotonic()
        most = self._rate * BURST_S
        with self._lock:
            left, at = self._allowance.get(key, (most, now))
            left = min(most, left + (now - at) * self._rate)
            granted = left >= 1
            self._allowance[key] = (left - granted, now)
        if not granted:
            raise TooManyRequestsError(
                f"this token sends more than {self._rate:g} requests a second; "
                "use one a team, or raise GRADWATCH_REQUESTS_A_S"
            )

    def _note_use(self, token_id: int) -> None:
        now = time.time()
        if now - self._noted.get(token_id, 0.0) < NOTE_USE_EVERY_S:
            return
        self._noted[token_id] = now
        with writing(self._engine) as session:
            session.execute(
                update(TokenRow).where(TokenRow.id == token_id).values(last_used_at=now)
            )


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()

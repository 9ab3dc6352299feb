"""What every endpoint of one collector shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy import Engine

from gradwatch_server.answers import Told
from gradwatch_server.intake import Intake
from gradwatch_server.readiness import Readiness
from gradwatch_server.rules import Rules
from gradwatch_server.settings import Settings
from gradwatch_server.telemetry import Telemetry
from gradwatch_server.tokens import Keyring
from gradwatch_server.writer import Writer


@dataclass
class Context:
    """The parts of a running collector."""

    engine: Engine
    settings: Settings
    keyring: Keyring
    telemetry: Telemetry
    readiness: Readiness
    writer: Writer
    rules: Rules
    intake: Intake = field(default_factory=Intake)
    told: Told = field(default_factory=Told)


async def _context(request: Request) -> Context:
    return request.app.state.context


Shared = Annotated[Context, Depends(_context)]

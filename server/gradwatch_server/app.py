"""The collector as an ASGI application: its parts put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from gradwatch import __version__
from gradwatch_server.context import Context
from gradwatch_server.database import migrate, open_database
from gradwatch_server.documents import PROBLEMS, complete
from gradwatch_server.listening import Listener
from gradwatch_server.problems import add_handlers
from gradwatch_server.readiness import Readiness
from gradwatch_server.routes import ROUTERS
from gradwatch_server.rules import load_rules
from gradwatch_server.settings import Settings
from gradwatch_server.telemetry import Observed, Telemetry
from gradwatch_server.tokens import Keyring
from gradwatch_server.writer import Writer


def create_app(
    settings: Settings | None = None,
    wake: Callable[[], None] | None = None,
    guarded: bool = False,
) -> FastAPI:
    """The collector as an ASGI application.

    wake: called when alerts wait in the outbox; by default it sends the worker a message.
    guarded: ask for a token even while none was made, as a collector must that others can reach.
    """
    settings = settings or Settings.load()
    engine = open_database(settings.database)
    telemetry = Telemetry()
    rules = load_rules(settings.thresholds)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        migrate(engine)
        writer = Writer(
            engine, settings.channels, wake or _wake_worker(settings), telemetry.committed
        )
        app.state.context = Context(
            engine=engine,
            settings=settings,
            keyring=Keyring(engine, settings.server_token, guarded, settings.requests_a_s),
            telemetry=telemetry,
            readiness=Readiness(engine),
            writer=writer,
            rules=rules,
        )
        listener = Listener(engine)
        yield
        listener.close()
        await asyncio.to_thread(writer.close)
        engine.dispose()

    app = FastAPI(
        title="gradwatch collector",
        version=__version__,
        description="Takes frames from training jobs, keeps and judges them, answers queries.",
        lifespan=lifespan,
        responses=PROBLEMS,
    )
    app.state.telemetry = telemetry
    app.add_middleware(Observed, telemetry=telemetry)
    add_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    complete(app)
    return app


def _wake_worker(settings: Settings) -> Callable[[], None]:
    # Celery is imported by the collector that talks to a worker, not by every test of the API.
    from gradwatch_server.tasks import wake_delivery

    return lambda: wake_delivery(settings)

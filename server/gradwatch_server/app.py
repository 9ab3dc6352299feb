"""The collector's HTTP API."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import msgspec
from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request
from fastapi.responses import RedirectResponse, Response
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from gradwatch import __version__
from gradwatch.client import MSGPACK
from gradwatch.wire.api import (
    Answer,
    FindingView,
    Flow,
    Heatmap,
    Problem,
    RunPage,
    RunView,
    Scalars,
)
from gradwatch.wire.codec import (
    CONTENT_TYPE,
    MAX_BODY_BYTES,
    BatchTooLargeError,
)
from gradwatch.wire.frame import Receipt, RunInfo
from gradwatch_server import queries
from gradwatch_server.arrivals import arrive
from gradwatch_server.database import migrate, open_database, reading, writing
from gradwatch_server.ingest import introduce
from gradwatch_server.metrics import DatabaseCollector, expose
from gradwatch_server.models import FindingRow, Optimizer, Run
from gradwatch_server.problems import MEDIA_TYPE, add_handlers, problem
from gradwatch_server.readiness import Readiness
from gradwatch_server.settings import Settings
from gradwatch_server.telemetry import Observed, Telemetry
from gradwatch_server.views import finding_views, run_view
from gradwatch_server.writer import Writer

PAGE_RUNS = 100
MAX_NUMBER = 2**53  # as in JSON; a database refuses larger ones in ways of its own
RunKey = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="32 hexadecimal digits")]
Step = Annotated[int | None, Query(ge=0, le=MAX_NUMBER)]


def create_app(settings: Settings | None = None, wake: Callable[[], None] | None = None) -> FastAPI:
    """The collector as an ASGI application.

    wake: called when alerts wait in the outbox; by default it sends the worker a message.
    """
    settings = settings or Settings.load()
    engine = open_database(settings.database)
    telemetry = Telemetry()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        migrate(engine)
        app.state.writer = Writer(
            engine, settings.channels, wake or _wake_worker(settings), telemetry.committed
        )
        yield
        await asyncio.to_thread(app.state.writer.close)
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
    _add_service(app, engine, settings)
    guard = [Depends(_guard(settings))] if settings.server_token else []
    _add_ingest(app, engine, guard)
    _add_reading(app, engine, settings, guard)
    _add_metrics(app, engine, guard)
    return app


def _wake_worker(settings: Settings) -> Callable[[], None]:
    # Celery is imported by the collector that talks to a worker, not by every test of the API.
    from gradwatch_server.tasks import wake_delivery

    return lambda: wake_delivery(settings)


def _guard(settings: Settings) -> Callable[[Request], None]:
    """Refuse requests that do not carry the token."""
    expected = f"Bearer {settings.server_token}".encode()

    def check(request: Request) -> None:
        given = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, expected):
            raise HTTPException(
                401,
                "this collector wants a token: set GRADWATCH_TOKEN",
                {"WWW-Authenticate": "Bearer"},
            )

    return check


def _described(kind: Any, description: str, media_type: str) -> dict[str, Any]:
    """A body's place in OpenAPI, from the type that is sent."""
    (schema,), components = msgspec.json.schema_components(
        [kind], ref_template="#/components/schemas/{name}"
    )
    name = str(schema.get("$ref", "")).rsplit("/", 1)[-1]
    inline = components.get(name, schema)
    content = {media_type: {"schema": {**inline, "title": name or description}}}
    return {"description": description, "content": content}


def _documented(kind: Any, description: str) -> dict[int | str, dict[str, Any]]:
    return {200: _described(kind, description, "application/json")}


PROBLEMS: dict[int | str, dict[str, Any]] = {
    "default": _described(Problem, "What is wrong, as RFC 9457 has it", MEDIA_TYPE)
}


def _answer(request: Request, value: Answer | list[Any]) -> Response:
    """msgpack for those who ask for it, JSON for everyone else."""
    if MSGPACK in request.headers.get("Accept", ""):
        return Response(msgspec.msgpack.encode(value), media_type=MSGPACK)
    return Response(msgspec.json.encode(value), media_type="application/json")


def _add_service(app: FastAPI, engine: Engine, settings: Settings) -> None:
    @app.get("/", include_in_schema=False)
    def front() -> Response:  # pyright: ignore[reportUnusedFunction]
        return RedirectResponse(settings.dashboard_url or "/docs")

    @app.get("/healthz", tags=["service"], summary="The process is alive")
    def healthz() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        return {"status": "ok"}

    readiness = Readiness(engine)

    @app.get("/readyz", tags=["service"], summary="The database answers; 503 when it does not")
    async def readyz() -> Response:  # pyright: ignore[reportUnusedFunction]
        if trouble := await readiness.check():
            return problem(503, trouble, headers={"Retry-After": "1"})
        return Response(msgspec.json.encode({"status": "ready"}), media_type="application/json")


def _add_metrics(app: FastAPI, engine: Engine, guard: list[Any]) -> None:
    @app.get("/metrics", tags=["service"], summary="For Prometheus", dependencies=guard)
    def metrics() -> Response:  # pyright: ignore[reportUnusedFunction]
        collector = DatabaseCollector(engine, lambda: app.state.writer.waiting)
        text = expose(collector, app.state.telemetry.registry)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_ingest(app: FastAPI, engine: Engine, guard: list[Any]) -> None:
    @app.put(
        "/api/v1/runs/{run}",
        tags=["ingest"],
        summary="Introduce a run",
        description="Idempotent. The body is a RunInfo whose id is the one in the path.",
        status_code=200,
        dependencies=guard,
        openapi_extra=_body("application/json", RunInfo),
    )
    async def put_run(run: RunKey, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        info = msgspec.json.decode(await _body_of(request), type=RunInfo)
        if info.id != run:
            return problem(422, f"id: {info.id!r} is not the run of the path, {run!r}")

        def write() -> None:
            with writing(engine) as session:
                introduce(session, info)

        await asyncio.to_thread(write)
        return Response(msgspec.json.encode(Receipt(stored=1, repeated=0)), 200)

    @app.post(
        "/api/v1/runs/{run}/records",
        tags=["ingest"],
        summary="Store a batch of frames, manifests and other records",
        description=(
            "The body is a msgpack array of records, compressed with zstd. Answered after the "
            "commit. Records that cannot be stored are named with the reason in a 422; the good "
            "ones beside them are kept. Sending a batch again is safe."
        ),
        responses=_documented(Receipt, "Stored"),
        dependencies=guard,
        openapi_extra={"requestBody": {"content": {CONTENT_TYPE: {}}, "required": True}},
    )
    async def post_records(run: RunKey, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        arrivals = await asyncio.to_thread(arrive, await _body_of(request))
        waiting = app.state.writer.submit(run, arrivals.records)
        receipt: Receipt = await asyncio.wrap_future(waiting)
        rejected = sorted([*arrivals.rejected, *receipt.rejected], key=lambda item: item.place)
        app.state.telemetry.rejected(rejected)
        if rejected:
            stored = receipt.stored + receipt.repeated
            detail = f"{len(rejected)} records refused, {stored} frames kept: {rejected[0].reason}"
            status = 409 if all(item.conflict for item in rejected) else 422
            return problem(status, detail, rejected)
        return Response(msgspec.json.encode(receipt), media_type="application/json")


def _body(media_type: str, kind: Any) -> dict[str, Any]:
    """A request body's place in OpenAPI."""
    content = _described(kind, "", media_type)["content"]
    return {"requestBody": {"content": content, "required": True}}


async def _body_of(request: Request) -> bytes:
    """The request's body, refused as soon as it is over the limit."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise BatchTooLargeError(f"the body is over {MAX_BODY_BYTES} bytes; send less at once")
        chunks.append(chunk)
    return b"".join(chunks)


def _add_reading(app: FastAPI, engine: Engine, settings: Settings, guard: list[Any]) -> None:
    def shown(session: Session, runs: Iterable[Run]) -> list[RunView]:
        listed = list(runs)
        ids = [run.id for run in listed]
        optimizers = session.scalars(select(Optimizer).where(Optimizer.run_id.in_(ids))).all()
        findings = session.scalars(select(FindingRow).where(FindingRow.run_id.in_(ids))).all()
        return [
            run_view(
                run,
                [row for row in optimizers if row.run_id == run.id],
                [row for row in findings if row.run_id == run.id],
                settings.silent_after_s,
            )
            for run in listed
        ]

    def get(path: str, kind: Any, summary: str) -> Callable[[Callable[..., Response]], Any]:
        return app.get(
            path,
            tags=["reading"],
            summary=summary,
            responses=_documented(kind, summary),
            dependencies=guard,
        )

    @get("/api/v1/runs", RunPage, "Runs with their verdicts, newest first")
    def list_runs(  # pyright: ignore[reportUnusedFunction]
        request: Request,
        project: str | None = None,
        after: Annotated[
            int | None, Query(ge=0, le=MAX_NUMBER, description="`next` of the page before")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=PAGE_RUNS)] = PAGE_RUNS,
    ) -> Response:
        chosen = select(Run).order_by(Run.id.desc()).limit(limit + 1)
        if project is not None:
            chosen = chosen.where(Run.project == project)
        if after is not None:
            chosen = chosen.where(Run.id < after)
        with reading(engine) as session:
            runs = list(session.scalars(chosen))
            more = str(runs[limit - 1].id) if len(runs) > limit else None
            return _answer(request, RunPage(runs=shown(session, runs[:limit]), next=more))

    @get("/api/v1/runs/{run}", RunView, "One run with its findings")
    def get_run(run: RunKey, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        with reading(engine) as session:
            return _answer(request, shown(session, [queries.find_run(session, run)])[0])

    @get("/api/v1/runs/{run}/findings", list[FindingView], "A run's findings, open ones first")
    def get_findings(run: RunKey, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        with reading(engine) as session:
            found = queries.find_run(session, run)
            rows = session.scalars(select(FindingRow).where(FindingRow.run_id == found.id))
            return _answer(request, finding_views(rows, found.key))

    @get("/api/v1/runs/{run}/heatmap", Heatmap, "One statistic over layers and steps")
    def get_heatmap(  # pyright: ignore[reportUnusedFunction]
        run: RunKey,
        request: Request,
        optimizer: str,
        statistic: str = "norm",
        first: Step = None,
        last: Step = None,
        columns: Annotated[int, Query(ge=1, le=queries.MAX_COLUMNS)] = 400,
    ) -> Response:
        with reading(engine) as session:
            row = queries.find_optimizer(session, run, optimizer)
            found = queries.heatmap(session, row, statistic, first, last, columns)
            return _answer(request, found)

    @get("/api/v1/runs/{run}/flow", Flow, "Gradient flow at a step")
    def get_flow(  # pyright: ignore[reportUnusedFunction]
        run: RunKey, request: Request, optimizer: str, step: Step = None
    ) -> Response:
        with reading(engine) as session:
            row = queries.find_optimizer(session, run, optimizer)
            return _answer(request, queries.flow(session, row, step))

    @get("/api/v1/runs/{run}/scalars", Scalars, "Loss and other scalars over steps")
    def get_scalars(  # pyright: ignore[reportUnusedFunction]
        run: RunKey,
        request: Request,
        optimizer: str,
        columns: Annotated[int, Query(ge=1, le=queries.MAX_COLUMNS)] = 1000,
    ) -> Response:
        with reading(engine) as session:
            row = queries.find_optimizer(session, run, optimizer)
            return _answer(request, queries.scalars(session, row, columns))

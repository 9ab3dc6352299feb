"""What probes and Prometheus ask for."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from fastapi.responses import RedirectResponse, Response

from gradwatch_server.access import Reading, over_all_projects
from gradwatch_server.context import Shared
from gradwatch_server.metrics import DatabaseCollector, expose
from gradwatch_server.problems import problem

router = APIRouter(tags=["service"])
METRICS = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/", include_in_schema=False)
def front(shared: Shared) -> Response:
    return RedirectResponse(shared.settings.dashboard_url or "/docs")


@router.get("/healthz", summary="The process is alive")
def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="The database answers; 503 when it does not")
async def readyz(shared: Shared) -> Response:
    if trouble := await shared.readiness.check():
        return problem(503, trouble, headers={"Retry-After": "1"})
    return Response(msgspec.json.encode({"status": "ready"}), media_type="application/json")


@router.get(
    "/metrics",
    summary="For Prometheus",
    responses={200: {"description": "Metrics", "content": {"text/plain": {}}}},
)
def metrics(shared: Shared, grant: Reading) -> Response:
    over_all_projects(grant)
    collector = DatabaseCollector(shared.engine, lambda: shared.writer.waiting)
    return Response(expose(collector, shared.telemetry.registry), media_type=METRICS)

"""One example of every type that the API takes or sends, shown in its description."""

from __future__ import annotations

from typing import Any

import msgspec

from gradwatch.health.score import LAYER_DEFINITION
from gradwatch.wire import api
from gradwatch.wire.audit import Audit, AuditedLayer, AuditedLayerView, AuditPage, AuditView
from gradwatch.wire.frame import LayerInfo, Receipt, Rejection, RunInfo

RUN = "0123456789abcdef0123456789abcdef"
INFO = RunInfo(
    id=RUN,
    project="vision",
    name="resnet, lr 0.1",
    started_at=1764160000.0,
    config={"lr": 0.1},
    tags=["baseline"],
    host="gpu-3",
    agent_version="0.1.0",
)
FINDING = api.FindingView(
    id=7,
    run=RUN,
    optimizer="SGD",
    kind="vanishing",
    title="Vanishing gradients",
    severity="warning",
    state="open",
    layers=["0.weight"],
    first_step=120,
    last_step=400,
    summary="Gradients of 0.weight are 1e-7 of those of the last layer.",
    evidence={"ratio": 1e-7},
    meaning="The first layers get almost no gradient.",
    explanation="Each layer on the way back makes it smaller.",
    action="Use a normalisation, residual connections or another activation.",
    opened_at=1764160060.0,
)
SCALARS = api.ScalarsJson(
    steps=[10, 20, 30],
    series={"loss": [2.3, None, 2.1]},
    broken={"loss": [False, True, False]},
    low={"loss": [2.2, 2.1, 1.9]},
    mean={"loss": [2.4, 2.3, 2.1]},
    high={"loss": [2.6, 2.4, 2.2]},
)
LAYER = LayerInfo(
    name="0.weight", shape=(64, 64), dtype="float32", module="Linear", role="weight", depth=0
)
RUN_VIEW = api.RunView(
    info=INFO,
    status="running",
    reason="",
    verdict="warning",
    judged=True,
    last_step=400,
    last_frame_at=1764160100.0,
    optimizers=[api.OptimizerView(name="SGD", layers=20, frames=401, first_step=0, last_step=400)],
    findings=[FINDING],
    loss=2.1,
    score=65.0,
)
FRAME = api.FrameView(
    optimizer="SGD",
    rank=0,
    step=3,
    time=1764160003.0,
    manifest=1,
    statistics={"norm": [0.5, 0.25], "nonfinite": [0.0, 0.0]},
    scalars={"loss": 2.1},
    events=[],
)
TOKEN = api.TokenView(
    key="0a1b2c3d4e5f",
    name="training cluster",
    scopes=["ingest"],
    project="vision",
    created_at=1764160000.0,
    last_used_at=None,
    revoked_at=None,
)
CHANNEL = api.ChannelView(
    channel="9f86d081884c7d659a2feaa0c55ad015",
    name="on call",
    scheme="slack",
    url="slack://****",
    project="vision",
    created_at=1764160000.0,
    pending=0,
    sent=3,
    failed=0,
    last_error="",
)
AUDIT = AuditView(
    id=3,
    optimizer="SGD",
    rank=0,
    step=120,
    method="reference",
    dtype="float32",
    passed=False,
    received_at=1764160060.0,
    layers=[
        AuditedLayerView(
            layer="0.weight", module="Linear", relative_error=0.98, tolerance=0.01, passed=False
        )
    ],
)
CHANGE = api.FindingChangeView(at=1764160060.0, change="opened", step=400, severity="warning")

# A batch as a person may write it, of INFO's run.
RECORDS: list[dict[str, Any]] = [
    {
        "type": "manifest",
        "optimizer": "SGD",
        "version": 1,
        "layers": [msgspec.to_builtins(LAYER)],
    },
    {
        "type": "frame",
        "optimizer": "SGD",
        "rank": 0,
        "step": 1,
        "time": 1764160001.0,
        "manifest": 1,
        "statistics": {"norm": [0.5], "nonfinite": [0]},
        "scalars": {"loss": 2.3},
    },
    {"type": "end", "rank": 0, "time": 1764160002.0, "status": "finished"},
]
EXAMPLES: dict[Any, Any] = {
    RunInfo: INFO,
    Receipt: Receipt(stored=50, repeated=0),
    api.Problem: api.Problem(
        title="Unprocessable Entity",
        status=422,
        detail="1 records refused, 49 frames kept: step: ...",
        rejected=[
            msgspec.to_builtins(Rejection(place=3, reason="step: another frame ...", conflict=True))
        ],
    ),
    api.RunView: RUN_VIEW,
    api.RunPage: api.RunPage(runs=[RUN_VIEW], next="42"),
    api.RunPatch: api.RunPatch(tags=["baseline", "kept"], notes="the one in the paper"),
    api.RunFinish: api.RunFinish(status="failed", reason="the machine was taken away"),
    api.HeatmapJson: api.HeatmapJson(
        statistic="norm",
        layers=["0.weight"],
        steps=[0, 100],
        low=[[0.1, 0.2]],
        mean=[[0.15, 0.3]],
        high=[[0.2, 0.4]],
        nonfinite=[[False, False]],
    ),
    api.HistogramsJson: api.HistogramsJson(
        layer="0.weight", steps=[0], edges=[None, -65536.0, 0.0], counts=[[0, 512, 512, 0]]
    ),
    api.LayersView: api.LayersView(
        definition=LAYER_DEFINITION,
        step=400,
        layers=[
            api.LayerView(
                name="0.weight", role="weight", score=65.0, findings=["vanishing"], norm=1e-7
            )
        ],
    ),
    api.Flow: api.Flow(step=400, layers=["0.weight"], roles=["weight"], statistics={"norm": [0.5]}),
    api.ScalarsJson: SCALARS,
    api.FrameView: FRAME,
    api.FramePage: api.FramePage(frames=[FRAME], next="3"),
    list[api.ManifestView]: [api.ManifestView(optimizer="SGD", rank=0, version=1, layers=[LAYER])],
    api.EventPage: api.EventPage(
        events=[api.EventView(optimizer="SGD", rank=0, step=120, name="amp_skipped")]
    ),
    list[api.FindingView]: [FINDING],
    api.FindingPage: api.FindingPage(findings=[FINDING]),
    api.FindingHistory: api.FindingHistory(finding=FINDING, changes=[CHANGE]),
    api.FindingPatch: api.FindingPatch(muted=True, note="known, see the other ticket"),
    Audit: Audit(
        optimizer="SGD",
        step=120,
        method="reference",
        dtype="float32",
        layers=[AuditedLayer(layer="0.weight", module="Linear", relative_error=0.98)],
    ),
    AuditView: AUDIT,
    AuditPage: AuditPage(audits=[AUDIT], next="3"),
    api.Comparison: api.Comparison(
        runs=[
            api.RunSummary(
                run=RUN,
                name="resnet, lr 0.1",
                status="finished",
                verdict="healthy",
                steps=400,
                findings=[],
                config={"lr": 0.1},
            )
        ],
        scalar="loss",
        steps=[0, 200, 400],
        series={RUN: [2.3, 1.1, 0.7]},
    ),
    api.TokenRequest: api.TokenRequest(
        name="training cluster", scopes=["ingest"], project="vision"
    ),
    list[api.TokenView]: [TOKEN],
    api.NewToken: api.NewToken(token="gw_0a1b2c3d4e5f_...", view=TOKEN),
    list[api.ChannelView]: [CHANNEL],
    api.ChannelView: CHANNEL,
    api.ChannelRequest: api.ChannelRequest(
        name="on call",
        url="slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#alerts",
        project="vision",
    ),
    api.ChannelPatch: api.ChannelPatch(paused=True),
}

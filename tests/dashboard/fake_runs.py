"""Runs as a collector would tell of them, made from formulas: the pages' input in tests."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from hashlib import md5

import numpy as np
from numpy.typing import NDArray

from gradwatch.health.finding import Severity
from gradwatch.health.kinds import KINDS
from gradwatch.health.score import LAYER_DEFINITION, layer_scores
from gradwatch.wire.api import (
    FindingView,
    Flow,
    Heatmap,
    LayersView,
    LayerView,
    OptimizerView,
    RunView,
    Scalars,
)
from gradwatch.wire.frame import RunInfo

NAN_STEP = 310


def run_id(name: str) -> str:
    return md5(name.encode(), usedforsecurity=False).hexdigest()


def finding(kind: str, run: str, **given: object) -> FindingView:
    """A finding of `kind` with the words of its kind; `given` replaces any field."""
    known = KINDS[kind]
    fields: dict[str, object] = {
        "id": 1,
        "run": run,
        "optimizer": "SGD",
        "kind": kind,
        "title": known.title,
        "severity": "critical",
        "state": "open",
        "layers": ["layers.0.weight"],
        "first_step": 12,
        "last_step": 400,
        "summary": "Something is wrong.",
        "evidence": {"ratio": 1.5e-6},
        "meaning": known.meaning,
        "explanation": known.explanation,
        "action": known.action,
        "opened_at": time.time() - 60,
    }
    return FindingView(**(fields | given))  # pyright: ignore[reportArgumentType]


def heatmap_of(
    layers: list[str],
    steps: NDArray[np.int64],
    high: NDArray[np.float32],
    nonfinite: NDArray[np.bool_] | None = None,
    statistic: str = "norm",
) -> Heatmap:
    """A heatmap whose smallest and largest values are the same."""
    if nonfinite is None:
        nonfinite = np.zeros(high.shape, dtype=np.bool_)
    data = np.ascontiguousarray(high, dtype="<f4").tobytes()
    return Heatmap(
        statistic=statistic,
        layers=layers,
        steps_bytes=steps.astype("<i8").tobytes(),
        low_bytes=data,
        high_bytes=data,
        nonfinite_bytes=nonfinite.tobytes(),
    )


def scalars_of(steps: NDArray[np.int64], **series: NDArray[np.float64]) -> Scalars:
    return Scalars(
        steps_bytes=steps.astype("<i8").tobytes(),
        broken_bytes={name: np.isinf(values).tobytes() for name, values in series.items()},
        series_bytes={name: values.astype("<f8").tobytes() for name, values in series.items()},
    )


@dataclass
class FakeRun:
    """One run: gradient norms from a rate of change a layer, and what was found in them."""

    name: str
    depth: int = 10
    decay: float = 1.0  # factor from one layer to the one before it
    growth: float = 1.0  # factor a step
    nan_from: int | None = None  # the step from which gradients are NaN, output first
    dead: tuple[int, ...] = ()  # layers whose gradient is exactly 0 from step 100 on
    prefix: str = "layers"
    steps_n: int = 400
    status: str = "finished"
    verdict: str = "healthy"
    project: str = "demo"
    started_ago_s: float = 3600.0
    findings: list[FindingView] = field(default_factory=list[FindingView])
    optimizers: tuple[str, ...] = ("SGD",)
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    reason: str = ""

    @property
    def id(self) -> str:
        return run_id(self.name)

    @property
    def layers(self) -> list[str]:
        return [
            f"{self.prefix}.{index}.{part}"
            for index in range((self.depth + 1) // 2)
            for part in ("weight", "bias")
        ][: self.depth]

    @property
    def steps(self) -> NDArray[np.int64]:
        return np.arange(1, self.steps_n + 1, dtype=np.int64)

    def norms(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Gradient norms and where they are not finite. float32, bool [layers, steps]."""
        rng = np.random.default_rng(int(self.id[:8], 16))
        layer = np.arange(self.depth)[:, None]
        step = self.steps[None, :]
        part = np.where(layer % 2 == 0, 1.0, 0.15)
        value = 0.4 * part * self.decay ** (self.depth - 1 - layer) * self.growth**step
        value = value * np.exp(0.25 * rng.standard_normal((self.depth, self.steps_n)))
        value = value * (0.3 + 0.7 * np.exp(-step / 150))
        nonfinite = np.zeros(value.shape, dtype=np.bool_)
        if self.nan_from is not None:
            nonfinite = step >= self.nan_from + (self.depth - 1 - layer) // 2
            value[nonfinite] = np.nan
        for row in self.dead:
            value[row, 99:] = 0
        return value.astype(np.float32), nonfinite

    def view(self) -> RunView:
        now = time.time()
        last = int(self.steps[-1]) if self.steps_n else 0
        return RunView(
            info=RunInfo(
                id=self.id,
                project=self.project,
                name=self.name,
                started_at=now - self.started_ago_s,
                config={"lr": 0.1, "batch_size": 64, "model": {"depth": self.depth}},
                tags=["test"],
                host="node-1",
                agent_version="0.1.0",
            ),
            status=self.status,
            reason=self.reason,
            verdict=self.verdict,
            judged=self.verdict != "waiting",
            last_step=last,
            last_frame_at=now - 2 if self.steps_n else None,
            optimizers=[
                OptimizerView(
                    name=name,
                    layers=self.depth,
                    frames=self.steps_n,
                    first_step=1,
                    last_step=last,
                )
                for name in self.optimizers
                if self.steps_n
            ],
            findings=self.findings,
            dropped=self.dropped,
            loss=0.231 if self.steps_n else None,
            score={"critical": 25.0, "warning": 65.0, "healthy": 100.0}.get(self.verdict),
        )

    def heatmap(self, statistic: str, columns: int = 400) -> Heatmap:
        value, nonfinite = self.norms()
        fold = -(-self.steps_n // columns)
        value, nonfinite = value[:, ::fold], nonfinite[:, ::fold]
        if statistic in ("zero_fraction", "dead_fraction"):
            value = (value == 0).astype(np.float32)
        elif statistic == "nonfinite":
            value = nonfinite * np.float32(64)
        return heatmap_of(self.layers, self.steps[::fold], value, nonfinite, statistic)

    def flow(self) -> Flow:
        value, nonfinite = self.norms()
        last = value[:, -1].astype(float)
        good: list[float | None] = [None if not np.isfinite(v) else float(v) for v in last]

        def times(factor: float) -> list[float | None]:
            return [None if v is None else v * factor for v in good]

        return Flow(
            step=int(self.steps[-1]),
            layers=self.layers,
            roles=["weight" if name.endswith("weight") else "bias" for name in self.layers],
            statistics={
                "norm": good,
                "mean_abs": times(0.01),
                "std": times(0.015),
                "absmax": times(0.09),
                "nonfinite": [64.0 if bad else 0.0 for bad in nonfinite[:, -1]],
            },
        )

    def layers_view(self) -> LayersView:
        value, _ = self.norms()
        standing = [item for item in self.findings if item.state == "open"]
        told = [(Severity(item.severity), item.layers) for item in standing]
        scores = layer_scores(told, self.layers)
        waiting = self.verdict == "waiting"
        return LayersView(
            definition=LAYER_DEFINITION,
            step=int(self.steps[-1]) if self.steps_n else None,
            layers=[
                LayerView(
                    name=name,
                    role="weight" if name.endswith("weight") else "bias",
                    score=None if waiting else scores[name],
                    findings=[item.kind for item in standing if name in item.layers],
                    norm=float(value[place, -1]) if np.isfinite(value[place, -1]) else None,
                )
                for place, name in enumerate(self.layers)
            ],
        )

    def scalars(self) -> Scalars:
        step = self.steps
        value, nonfinite = self.norms()
        rng = np.random.default_rng(1)
        loss = 2.3 * np.exp(-step / 90) + 0.2 + 0.03 * rng.standard_normal(step.size)
        loss[nonfinite.any(axis=0)] = np.inf
        total = np.sqrt((np.nan_to_num(value).astype(np.float64) ** 2).sum(axis=0))
        return scalars_of(step, loss=loss, lr=np.full(step.size, 0.1), total_norm=total)


def typical_runs() -> list[FakeRun]:
    """A run of each sort, newest first."""
    running = FakeRun("cnn-baseline", status="running", started_ago_s=240.0)
    running.optimizers = ("Adam", "SGD.1")
    sigmoid = FakeRun("sigmoid-10-layers", decay=0.12, verdict="critical", started_ago_s=900.0)
    sigmoid.findings = [
        finding(
            "vanishing",
            sigmoid.id,
            layers=["layers.0.weight", "layers.0.bias", "layers.1.weight"],
            summary="The first layer's gradient is 8.6e-09 of the last layer's since step 12.",
            evidence={
                "first layer's norm": 3.1e-10,
                "last layer's norm": 0.036,
                "ratio": 8.6e-9,
                "factor a layer": 0.12,
            },
        ),
    ]
    nan = FakeRun(
        "rnn-log-of-zero",
        growth=1.03,
        nan_from=NAN_STEP,
        verdict="critical",
        status="failed",
        reason="ValueError: loss is nan",
        started_ago_s=7200.0,
        dropped={"queue full": 12},
    )
    nan.findings = [
        finding(
            "non_finite",
            nan.id,
            id=2,
            layers=["layers.4.bias"],
            first_step=NAN_STEP,
            summary=f"64 NaN gradients in layers.4.bias at step {NAN_STEP}, the first seen.",
            evidence={"NaN or Inf elements": 64, "layers affected": 10, "loss": None},
        ),
        finding(
            "exploding",
            nan.id,
            id=3,
            severity="warning",
            state="resolved",
            first_step=180,
            last_step=305,
            summary="The total norm grew 1,400 times in 120 steps.",
            evidence={"norm at step 180": 12.4, "norm at step 300": 17360.0},
            resolved_at=time.time(),
        ),
    ]
    dead = FakeRun("relu-large-bias", dead=(2, 3), verdict="warning", started_ago_s=90000.0)
    dead.findings = [
        finding(
            "dead_units",
            dead.id,
            id=4,
            severity="warning",
            layers=["layers.1.weight", "layers.1.bias"],
            first_step=100,
            summary="All 64 units of layers.1.weight have had no gradient since step 100.",
            evidence={"dead units": "64 of 64", "share": 1.0},
        )
    ]
    deep = FakeRun(
        "transformer-300-layers",
        depth=300,
        decay=0.97,
        steps_n=2000,
        prefix="transformer.module.encoder.layers.feed_forward.projection",
        project="language",
        started_ago_s=400000.0,
    )
    waiting = FakeRun(
        "just-started", steps_n=0, verdict="waiting", status="running", started_ago_s=3.0
    )
    return [waiting, running, sigmoid, nan, dead, deep]

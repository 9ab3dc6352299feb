"""A picture of each kind of finding, drawn from real jobs of the zoo.

`python -m tests.zoo --pictures docs/findings` trains the jobs and writes KIND.png and, in the
kind's page, what gradwatch said of the job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import wrap
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from backports import zstd
from matplotlib.figure import Figure

from gradwatch.health import stalled_run as stalled
from gradwatch.health.chain import chain_of, links, relative_size, total_norm
from gradwatch.health.judge import judge
from gradwatch.health.kinds import KINDS
from gradwatch.health.reference_mismatch import tolerance_of
from gradwatch.health.window import Silence
from gradwatch.health.words import spoken
from gradwatch.wire.histogram import BUCKETS, MIN_EXPONENT, OCTAVES, ZERO

from ..health.pages import with_parts
from .audited import audits_of
from .drawing import (
    BROKEN,
    FAULT,
    GONE,
    HEALTH,
    NONE,
    QUIET,
    STYLE,
    THIRD,
    Floats,
    Job,
    curve,
    layer_curves,
    layer_map,
    link_names,
    map_legend,
    new_figure,
    of_links,
    onset,
    parts,
    say,
    short,
    two,
    write_png,
)
from .fixtures import Key, in_parallel, load, train

SILENCE_S = stalled.Thresholds().after_s
Draw = Callable[[Figure, Job, Sequence[Job]], None]


class Picture(NamedTuple):
    """What a kind's picture shows.

    job: the one that is told this kind. beside: others to compare it with. until: the last step
    that is judged and drawn; the job's last when None.
    """

    draw: Draw
    job: Key
    beside: tuple[Key, ...] = ()
    until: int | None = None
    silent: bool = False  # whether it is judged as one that was not heard of since
    audited: tuple[int, ...] = ()  # steps at which its gradients are compared with a reference


def vanishing(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    (healthy,) = beside
    left, right = two(figure, sharey=True)
    for axes, each in ((left, job), (right, healthy)):
        chain = chain_of(each.window)
        shown = np.where(each.steps[:, None] <= job.steps[-1], chain.rms, np.nan)
        layer_curves(axes, each, shown, chain.names)
        axes.set_yscale("log")
        axes.set_xlim(-4, job.steps[-1] * 1.14)
        axes.set_ylim(2e-11, 3)
    sizes = np.median(chain_of(job.window).rms, axis=0)
    end = float(job.steps[-1]) + 2
    for link in (0, len(sizes) // 2, len(sizes) - 1):
        say(left, end, float(sizes[link]), f"layer {link + 1}", "black", fontsize=8)
    say(right, end, 1e-3, f"layers 1 to {len(chain_of(healthy.window).names)}", "black", ha="right")
    left.set_title(
        f"Sigmoids: layer 1 gets {spoken(float(sizes[0] / sizes[-1]), 1)} of what layer "
        f"{len(sizes)} gets"
    )
    right.set_title("Ten plain layers, well initialised: alike")
    left.set_ylabel("gradient RMS of each layer")
    onset(left, job.told("vanishing"))


def exploding(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    """The linear RNN of 32 steps whose recurrence grows by 0.2 % a step."""
    left, right = two(figure)
    finding, broken = job.told("exploding"), job.told("non_finite").first_step
    # Of an orthogonal matrix times its radius every singular value is the radius.
    place = next(p for p in links(job.window) if job.window.layers[p].name == "recur.weight")
    width = job.window.layers[place].shape[0]
    value = job.window.statistic("weight_norm")[:, place].astype(np.float64) / width**0.5
    curve(left, job, np.where(job.steps < broken, value, np.nan) ** 31, THIRD, "factor", marker=".")
    left.axhline(1, color=QUIET, linewidth=0.8)
    left.set_ylabel("typical singular value, to the 31st power")
    left.set_title("Cause: one factor a step back in time, 31 of them")
    total = total_norm(job.window)
    curve(right, job, np.where(job.steps < broken, total, np.nan), FAULT, "gradient", linewidth=1.0)
    right.axvspan(broken, float(job.steps[-1]), color=FAULT, alpha=0.2, linewidth=0)
    say(right, broken + 6, 1e4, "NaN", FAULT)
    right.set_ylabel("norm of all gradients")
    right.set_title("Effect: the gradient grows along, and ends in NaN")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_xlim(-15, job.steps[-1] + 1)
        short(axes)
        onset(axes, finding)


def dead_units(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    axes = figure.subplots()
    weights = links(job.window)
    layer_map(figure, axes, job, weights)
    finding = job.told("dead_units")
    map_legend(axes, (GONE, "exactly 0"))
    axes.set_title(
        f"Dead: {finding.evidence['dead units']} units of {finding.layers[0]}; "
        "nothing passes to the layers before it"
    )
    onset(axes, finding, high=0.1)


def non_finite(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    finding = job.told("non_finite")
    first = finding.first_step - 40
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1, 1.6]})
    loss = np.where(job.steps >= first, job.loss, np.nan)
    curve(top, job, loss, HEALTH, "loss", marker=".", markersize=3)
    top.set_ylabel("loss")
    top.set_title(f"One blank picture at step {finding.first_step}: log 0, and all is NaN for ever")
    say(
        top, finding.first_step + 0.8, float(np.nanmedian(loss)), "the loss is Inf, then NaN", FAULT
    )
    layer_map(figure, bottom, job, parts(job), first=first - 1)
    map_legend(bottom, (BROKEN, "NaN or Inf"))
    onset(top, finding, left=True)
    bottom.axvline(finding.first_step - 0.5, color="black", linestyle=(0, (4, 2)), linewidth=1.1)


def saturation(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    (healthy,) = beside
    left, right = two(figure, sharey=True)
    for axes, each in ((left, job), (right, healthy)):
        share = of_links(each, "saturated_fraction")[:, :-1]  # the last layer has no activation
        layer_curves(axes, each, 100 * share, link_names(each))
        axes.axhline(75, color=QUIET, linewidth=0.9, linestyle=":")
        axes.set_ylim(-4, 118)
    say(left, float(job.steps[-1]), 70, "threshold", QUIET, ha="right")
    say(left, float(job.steps[-1]) / 2, 84, "first layer", "black", ha="center")
    say(left, float(job.steps[-1]) / 2, 10, "the others", "black", ha="center")
    say(right, float(healthy.steps[-1]) / 2, 17, "all ten layers", "black", ha="center")
    left.set_ylabel("% of outputs at the flat ends")
    left.set_title("Inputs times 100: the first tanh is flat")
    right.set_title("Inputs in range: hardly any output is")
    onset(left, job.told("saturation"))


def never_updated(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    left, right = two(figure)
    weights = [place for place in links(job.window) if place in parts(job)]
    sizes = relative_size(job.window, weights).astype(np.float64)
    moved = job.window.statistic("update_ratio")[:, weights].astype(np.float64)
    floor = 1e-5
    for number, place in enumerate(weights):
        layer = job.window.layers[place]
        color = HEALTH if layer.optimized else FAULT
        dash = (0, (5, 1)) if number == 0 else "-"
        curve(left, job, sizes[:, number], color, layer.name, linestyle=dash)
        shown = np.where(moved[:, number] == 0, floor, moved[:, number])
        curve(right, job, shown, color, layer.name, marker="o", markersize=3.5, linestyle=dash)
    left.set_yscale("log")
    left.legend(fontsize=8.5)
    left.set_ylabel("gradient / weight norm")
    left.set_title("Every layer gets a gradient")
    right.set_yscale("log")
    right.set_yticks([floor, 1e-4, 1e-3, 1e-2], ["0", "$10^{-4}$", "$10^{-3}$", "$10^{-2}$"])
    right.set_ylim(floor / 1.6, 2e-2)
    right.set_ylabel("update / weight norm, a step")
    right.set_title("The new head never moves")
    say(right, 20, floor * 1.7, "4.weight: exactly 0", FAULT)
    onset(right, job.told("never_updated"))


def disconnected(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    axes = figure.subplots()
    layer_map(figure, axes, job, parts(job))
    map_legend(axes, (NONE, "no gradient (None)"))
    axes.set_title("Behind detach() no gradient arrives, while the other branch learns")
    onset(axes, job.told("disconnected"), high=0.58)


def missing_zero_grad(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    (healthy,) = beside
    left, right = two(figure)
    for each, color, label in ((job, FAULT, "no zero_grad"), (healthy, HEALTH, "healthy")):
        first = each.steps <= 40
        total = np.where(first, total_norm(each.window), np.nan)
        curve(left, each, total / total[0], color, label)
        curve(right, each, np.where(each.steps <= 250, each.loss, np.nan), color, label)
    time = np.array([1.0, 30.0])
    for power, text in ((1.0, "equal gradients: $t$"), (0.5, "independent: $\\sqrt{t}$")):
        left.plot(time, time**power, color=QUIET, linewidth=0.9, linestyle=":")
        say(left, 31, 30**power, text, QUIET, fontsize=8)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlim(0.95, 160)
    left.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    short(left)
    left.minorticks_off()
    left.set_ylabel("gradient norm / that of step 1")
    left.set_title("Between the two dotted lines: a sum of gradients")
    left.legend(loc="upper left", fontsize=8.5)
    right.set_ylabel("loss")
    right.set_yscale("log")
    short(right)
    right.set_title("The loss swings, ever wider")
    onset(right, job.told("missing_zero_grad"))


def learning_rate_too_high(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    (healthy,) = beside
    left, right = two(figure)
    for each, color, label in ((job, FAULT, "rate 10"), (healthy, HEALTH, "rate 0.1")):
        curve(left, each, np.where(each.steps <= 200, each.loss, np.nan), color, label)
        moved = _movement(each)
        moved = np.where((each.steps <= 200) & (moved > 0), moved, np.nan)
        curve(right, each, moved, color, label, marker="o", markersize=3)
    left.set_ylabel("loss")
    left.set_yscale("log")
    left.set_ylim(0.3, None)
    short(left)
    left.set_title("Rate x 100: the loss leaps, and stays at a guess")
    left.legend(loc="upper right", fontsize=8.5)
    onset(left, job.told("learning_rate_too_high"), high=0.72)
    right.set_yscale("log")
    right.set_ylabel("update / weight norm, a step")
    right.set_title("Single steps replace the weights")
    right.axhline(0.1, color=QUIET, linewidth=0.9, linestyle=":")
    say(right, 200, 0.16, "threshold", QUIET, ha="right")
    say(right, 38, 6e-5, "then 0: every unit is dead", FAULT)


def _movement(job: Job) -> Floats:
    """Update / norm of all weight layers together, NaN between detail frames. float64[steps]."""
    size, moved = of_links(job, "weight_norm"), of_links(job, "update_ratio")
    return np.sqrt(((size * moved) ** 2).sum(axis=1) / (size**2).sum(axis=1))


def divergence(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    left, right = two(figure)
    finding = job.told("divergence")
    curve(left, job, job.loss, FAULT, "loss")
    left.set_ylabel("loss")
    left.set_title("The loss climbs, ever faster")
    curve(right, job, total_norm(job.window), FAULT, "gradient norm")
    weights = np.sqrt(np.nansum(of_links(job, "weight_norm") ** 2, axis=1))
    curve(right, job, np.where(weights > 0, weights, np.nan), HEALTH, "weight norm", marker=".")
    right.set_ylabel("norm")
    right.set_title("and the gradient outgrows the weights")
    right.legend(loc="lower right", fontsize=8.5)
    for axes in (left, right):
        axes.set_yscale("log")
        short(axes)
        onset(axes, finding, left=finding.first_step > job.steps[-1] / 2)


def oscillation(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    (healthy,) = beside
    left, right = two(figure, sharey=True)
    for axes, each, color in ((left, job, FAULT), (right, healthy, HEALTH)):
        curve(axes, each, each.loss, color, "loss", linewidth=0.9)
        start = float(np.median(each.loss[:5]))
        axes.axhline(start, color=QUIET, linewidth=0.9, linestyle=":")
        say(
            axes,
            float(each.steps[-1]),
            0.2 if each is job else start + 0.09,
            "dotted: its start",
            QUIET,
            ha="right",
        )
    left.set_ylabel("loss")
    left.set_ylim(0, 2.6)
    left.set_title("Rate x 20: up and down about where it began")
    right.set_title("A rate that suits: it falls")
    onset(left, job.told("oscillation"))


def learning_rate_too_low(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    (healthy,) = beside
    left, right = two(figure)
    for each, color, label in ((job, FAULT, "stepped a batch"), (healthy, HEALTH, "cosine")):
        rate = each.window.scalar("lr")
        curve(left, each, rate / np.nanmax(rate), color, label)
        curve(right, each, each.loss, color, label, linewidth=1.0)
    left.set_yscale("log")
    left.set_ylim(1e-9, 4)
    left.axhline(1e-3, color=QUIET, linewidth=0.9, linestyle=":")
    say(left, float(healthy.steps[-1]), 2.5e-3, "threshold", QUIET, ha="right")
    left.set_ylabel("learning rate / its peak")
    left.set_title("A schedule for epochs, stepped at each batch")
    left.legend(loc="lower right", fontsize=8.5)
    right.set_ylabel("loss")
    right.set_title("stops the learning before it has begun")
    finding = job.told("learning_rate_too_low")
    onset(left, finding, high=0.8)
    onset(right, finding, high=0.85)


def loss_spike(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    left, right = two(figure)
    finding = job.told("loss_spike")
    total = total_norm(job.window)
    for axes, values, word in ((left, job.loss, "loss"), (right, total, "norm of all gradients")):
        near = np.abs(job.steps - finding.first_step - 10) <= 50
        curve(axes, job, np.where(near, values, np.nan), FAULT, word, marker=".", markersize=4)
        axes.set_yscale("log")
        axes.set_ylabel(word)
        short(axes)
        onset(axes, finding, left=True)
    left.set_title("One batch at a wrong scale, then Adam's echo")
    right.set_title(
        f"leaves a gradient {spoken(float(finding.evidence['gradient norm / its median before']))} "
        "times the usual"
    )


def plateau(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    (healthy,) = beside
    axes = figure.subplots()
    curve(axes, job, job.loss, FAULT, "labels shuffled", linewidth=1.0)
    shown = np.where(healthy.steps <= job.steps[-1], healthy.loss, np.nan)
    curve(axes, healthy, shown, HEALTH, "labels as they are", linewidth=1.0)
    guess = float(np.log(10))
    axes.axhline(guess, color="black", linewidth=0.9, linestyle=":")
    say(
        axes,
        float(job.steps[-1]),
        guess + 0.1,
        "a guess among ten: ln 10 = 2.303",
        "black",
        ha="right",
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_ylim(0, 2.75)
    axes.legend(loc="center right", fontsize=8.5)
    axes.set_title(
        "With labels that do not belong to their pictures the loss stays at that of a guess"
    )
    onset(axes, job.told("plateau"), high=0.2)


def poor_initialisation(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    """Profiles at the first step: nothing happens over steps that the first does not show."""
    large, healthy = beside
    axes = figure.subplots()
    for each, color, word in (
        (large, THIRD, "too large"),
        (healthy, HEALTH, "as it should be"),
        (job, FAULT, "too small"),
    ):
        chain = chain_of(each.window)
        profile = chain.bias_rms[0].astype(np.float64)
        profile /= profile[-1]
        before_last = np.arange(len(profile)) - len(profile) + 1
        gain = float(np.median(_gains(each)))
        axes.plot(
            before_last,
            profile,
            color=color,
            marker="o",
            markersize=3,
            label=f"{word}: gain {gain:.2g}",
        )
    axes.set_yscale("log")
    axes.set_xlabel("layers before the last one; the input's layer is at the left end")
    axes.set_ylabel("bias gradient RMS / last layer's")
    axes.legend(loc="lower right", fontsize=8.5)
    axes.set_title("At step 1: the gradient on its way from the last layer back to the first")


def _gains(job: Job) -> Floats:
    """RMS of the weights * sqrt(fan in) of each weight layer at the first frame. float64[n]."""
    places = links(job.window)
    sizes = job.window.statistic("weight_norm")[0, places].astype(np.float64)
    return sizes / np.sqrt([float(job.window.layers[place].shape[0]) for place in places])


def symmetric_units(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    (healthy,) = beside
    left, right = two(figure)
    for each, color, label in ((job, FAULT, "equal weights"), (healthy, HEALTH, "random weights")):
        spread = of_links(each, "weight_spread")
        rows = np.isfinite(spread).any(axis=1) & (each.steps <= 10)
        for place, name in enumerate(link_names(each)):
            left.plot(
                each.steps[rows],
                spread[rows, place],
                color=color,
                marker="o",
                markersize=3,
                linestyle=("-", (0, (5, 1)), (0, (1, 1)))[min(place, 2)],
                label=name,
            )
        curve(right, each, np.where(each.steps <= 150, each.loss, np.nan), color, label)
    left.set_ylim(-0.08, 1.22)
    left.set_ylabel("spread of the weights / their RMS")
    left.set_title("Born equal, the hidden layers stay equal")
    say(left, 5.5, 0.93, "a healthy network's layers", HEALTH, ha="center")
    say(left, 5.5, 0.22, "the last layer", FAULT, ha="center")
    say(left, 5.5, 0.05, "both hidden layers", FAULT, ha="center")
    right.set_ylabel("loss")
    right.set_ylim(0, None)
    right.set_title("and nothing is learnt")
    onset(left, job.told("symmetric_units"))


def weights_shrinking(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    left, right = two(figure)
    size = of_links(job, "weight_norm")
    for place, name in enumerate(link_names(job)):
        curve(
            left, job, size[:, place] / size[0, place],
            mpl.colormaps["viridis"](0.45 * place), name, marker=".",
        )  # fmt: skip
    decay = 0.05
    time = np.arange(1, 81)
    left.plot(time, (1 - decay) ** (time - 1.0), color="black", linestyle=":", linewidth=1.0)
    say(left, 84, (1 - decay) ** 79, f"decay alone, $(1 - {decay})^n$", "black")
    left.set_yscale("log")
    left.set_ylabel("weight norm / its first")
    short(left)
    left.set_title("Every layer melts")
    left.legend(loc="upper right", fontsize=8.5)
    curve(right, job, job.loss, FAULT, "loss", linewidth=1.0)
    right.set_ylabel("loss")
    right.set_ylim(0, None)
    right.set_title("and the loss is no better for it")
    finding = job.told("weights_shrinking")
    onset(left, finding)
    onset(right, finding, high=0.2)


def clipping(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    (healthy,) = beside
    left, right = two(figure)
    for each, color, label in ((job, FAULT, "clipped to $10^{-4}$"), (healthy, HEALTH, "healthy")):
        first = each.steps <= 300
        curve(left, each, np.where(first, total_norm(each.window), np.nan), color, label)
        curve(right, each, np.where(first, each.loss, np.nan), color, label, linewidth=1.0)
    left.set_yscale("log")
    left.set_ylabel("norm of all gradients")
    left.set_title("Every step has the same, tiny length")
    left.legend(loc="center right", fontsize=8.5)
    right.set_ylabel("loss")
    right.set_ylim(0, None)
    right.set_title("so that nothing is learnt")
    onset(left, job.told("clipping"), high=0.4)


def underflow(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    (healthy,) = beside
    left, right = two(figure, (0.8, 1.2))
    zeros = of_links(job, "zero_fraction")
    layer_curves(left, job, 100 * zeros, link_names(job))
    left.set_ylim(-3, 108)
    left.set_ylabel("% of elements that are exactly 0")
    left.set_title("Most of the gradient is gone")
    left.legend(loc="lower right", fontsize=8.5)
    onset(left, job.told("underflow"), high=0.35)
    for each, color, word in ((healthy, HEALTH, "float32, healthy"), (job, FAULT, "float16")):
        counts = _octaves(each)
        word = f"{word}: {1 - counts.sum():.0%} are 0"
        right.step(
            np.arange(MIN_EXPONENT, MIN_EXPONENT + OCTAVES), 100 * counts, color=color, label=word,
            where="post",
        )  # fmt: skip
        right.fill_between(
            np.arange(MIN_EXPONENT, MIN_EXPONENT + OCTAVES), 100 * counts, color=color, alpha=0.15,
            step="post", linewidth=0,
        )  # fmt: skip
    for power, text in ((-24, "smallest\nnumber"), (-14, "full precision\nfrom here")):
        right.axvline(power, color="black", linewidth=0.9, linestyle=":")
        right.annotate(
            text, (power, 0.97), xycoords=right.get_xaxis_transform(), xytext=(3, 0),
            textcoords="offset points", fontsize=8, va="top",
        )  # fmt: skip
    right.set_xlim(-34, 0)
    right.set_xticks(range(-32, 1, 8), [f"$2^{{{power}}}$" for power in range(-32, 1, 8)])
    right.set_xlabel("size of an element of the gradient, step 1")
    right.set_ylabel("% of elements")
    right.set_title("float16 begins at $2^{-24}$: what is smaller becomes 0")
    right.legend(loc="center left", fontsize=8.5)


def _octaves(job: Job) -> Floats:
    """Share of the weights' gradients in each power of two at the first frame. float64[OCTAVES]."""
    (frames,) = job.recording.frames.values()
    packed = frames[0].histograms
    if packed is None:
        raise ValueError(f"{job.key}: the first frame has no histograms")
    counts = np.frombuffer(zstd.decompress(packed), dtype="<u2").reshape(-1, BUCKETS)
    chosen = counts[links(job.window)].sum(axis=0).astype(np.float64)
    up, down = chosen[ZERO + 2 :][:OCTAVES], chosen[: ZERO - 1][::-1][:OCTAVES]
    return (up + down) / chosen.sum()


def amp_skips(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    (healthy,) = beside
    left, right = two(figure)
    for axes, each, color in ((left, job, FAULT), (right, healthy, HEALTH)):
        scale = each.window.scalar("grad_scale")
        curve(axes, each, np.log2(scale), color, "loss scale")
        skipped = each.steps[each.window.scalar("amp_skipped") > 0]
        axes.plot(
            skipped, np.full(len(skipped), 0.03), "|", color="black", markersize=6,
            transform=axes.get_xaxis_transform(), label=f"{len(skipped)} skipped steps",
        )  # fmt: skip
        axes.legend(loc="center left", fontsize=8.5)
    left.set_ylabel("log2 of the loss scale")
    left.set_ylim(None, 24)
    left.set_title("Halved for ever, and the steps are lost")
    right.set_ylabel("log2 of the loss scale")
    right.set_ylim(0, 24)
    right.set_title("Healthy: halved at first, then it stays")
    onset(left, job.told("amp_skips"))


def rank_drift(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    left, right = two(figure)
    drift = of_links(job, "weight_drift")
    layer_curves(
        left, job, np.fmax(drift, np.where(np.isnan(drift), np.nan, 1e-8)), link_names(job)
    )
    left.axhline(1e-5, color=QUIET, linewidth=0.9, linestyle=":")
    say(left, 1, 2e-5, "threshold", QUIET, fontsize=8)
    left.set_yscale("log")
    left.set_ylabel("largest difference / weight norm")
    left.set_title("Every layer's weights part from rank to rank")
    curve(right, job, job.loss, HEALTH, "loss", linewidth=1.0)
    right.set_ylabel("loss, mean of the ranks")
    right.set_ylim(0, None)
    right.set_title("while the loss looks fine")
    finding = job.told("rank_drift")
    onset(left, finding, left=True)
    onset(right, finding, left=True)


def straggler(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    axes = figure.subplots()
    slow, others, wait = (
        1e3 * job.window.scalar(name)
        for name in ("rank_slowest_s", "rank_others_s", "rank_others_wait_s")
    )
    rows = np.flatnonzero(np.isfinite(slow))
    finding = job.told("straggler")
    own = f"rank {finding.evidence['slow rank']}: its own time"
    axes.bar(job.steps[rows] - 2.2, slow[rows], 4, color=FAULT, label=own)
    axes.bar(
        job.steps[rows] + 2.2, others[rows], 4, color=HEALTH, label="the others: their own time"
    )
    axes.bar(
        job.steps[rows] + 2.2, wait[rows], 4, bottom=others[rows], color="white", edgecolor=HEALTH,
        hatch="////", label="and their wait for it",
    )  # fmt: skip
    axes.set_xticks(job.steps[rows])
    axes.set_xlim(0, job.steps[-1] + 30)
    axes.set_xlabel("step at which the ranks were compared")
    axes.set_ylabel("ms a step")
    axes.legend(loc="center right", fontsize=8.5)
    axes.set_title("All ranks take equally long a step, for all but one wait")
    onset(axes, finding, left=True)


def stalled_run(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    """Over time and not over steps, for the step stands still."""
    axes = figure.subplots()
    (frames,) = job.recording.frames.values()
    seconds = np.array([frame.time for frame in frames]) - frames[0].time
    told_s = float(seconds[-1]) + SILENCE_S
    axes.plot(seconds[1:], job.steps[1:], color=HEALTH)
    axes.plot([seconds[-1], told_s], [job.steps[-1]] * 2, color=FAULT, linestyle=":")
    axes.axvline(told_s, color="black", linestyle=(0, (4, 2)), linewidth=1.1)
    axes.set_xscale("log")
    axes.set_xlim(None, 3 * told_s)
    axes.set_ylim(0, job.steps[-1] * 1.25)
    say(axes, float(seconds[-1]) * 1.3, job.steps[-1] * 1.08, "no frame any more", FAULT)
    say(
        axes, told_s * 0.95, job.steps[-1] * 0.3,
        f"stalled_run,\nafter {SILENCE_S:g} s of silence", "black", ha="right",
    )  # fmt: skip
    axes.set_xlabel("seconds since the first step")
    axes.set_ylabel("last step heard of")
    axes.set_title(
        "A step every few milliseconds, then none, and nobody has said that the run ended"
    )


def reference_mismatch(figure: Figure, job: Job, beside: Sequence[Job]) -> None:
    left, right = two(figure)
    finding = job.told("reference_mismatch")
    for name in dict.fromkeys(each.layer for each in job.window.audits):
        own = [each for each in job.window.audits if each.layer == name]
        wrong = name in finding.layers
        left.plot(
            [each.step for each in own], [max(each.error, 1e-9) for each in own],
            color=FAULT if wrong else HEALTH, marker="o", markersize=3.5, linewidth=1,
        )  # fmt: skip
    end = float(job.steps[-1])
    allowed = (("finite_difference", "differences"), ("reference", "float32"))
    for method, word in allowed:
        limit = tolerance_of(method, "float32")
        left.axhline(limit, color=QUIET, linewidth=0.9, linestyle=":")
        say(left, end, 1.9 * limit, f"threshold, {word}", QUIET, ha="right", fontsize=8)
    say(left, end / 2, 0.4, finding.layers[0], FAULT, ha="center")
    say(left, end / 2, 4e-7, "the layers beneath it", HEALTH, ha="center")
    left.set_yscale("log")
    left.set_ylim(2e-9, 9)
    left.set_ylabel("relative error of the gradient")
    left.set_title("Compared with a reference: one function is wrong")
    curve(right, job, job.loss, FAULT, "loss", linewidth=1.0)
    right.set_yscale("log")
    short(right)
    right.set_ylabel("loss")
    right.set_title("Told at the first audit, long before the loss shows it")
    onset(right, finding, high=0.6)
    onset(right, job.told("divergence"), high=0.25)


# A row a kind: its drawing, the job, and what it is compared with.
PICTURES: dict[str, Picture] = {
    "vanishing": Picture(
        vanishing, Key("F01 sigmoids", 0), (Key("H ten plain layers", 1),), until=150
    ),
    "exploding": Picture(exploding, Key("F38 creeping", 0), until=650),
    "dead_units": Picture(dead_units, Key("F07 dead at birth", 0), until=120),
    "non_finite": Picture(non_finite, Key("F10 log of 0", 0)),
    "saturation": Picture(
        saturation, Key("F34 saturated tanh", 0), (Key("H ten plain layers", 2),)
    ),
    "never_updated": Picture(never_updated, Key("F20 head replaced", 0)),
    "disconnected": Picture(disconnected, Key("F21 cut branch", 0)),
    "missing_zero_grad": Picture(
        missing_zero_grad, Key("F16 no zero_grad", 0), (Key("H01 ReLU MLP", 3),)
    ),
    "learning_rate_too_high": Picture(
        learning_rate_too_high, Key("F17 rate x 100", 4), (Key("H01 ReLU MLP", 3),)
    ),
    "divergence": Picture(divergence, Key("F39 wrong sign", 0), until=140),
    "oscillation": Picture(oscillation, Key("F18 rate x 20", 2), (Key("H12 warm-up, cosine", 1),)),
    "learning_rate_too_low": Picture(
        learning_rate_too_low, Key("F45 schedule a batch", 1), (Key("H12 warm-up, cosine", 0),)
    ),
    "loss_spike": Picture(loss_spike, Key("F37 one bad batch", 0)),
    "plateau": Picture(plateau, Key("F24 shuffled labels", 1), (Key("H01 ReLU MLP", 3),)),
    "poor_initialisation": Picture(
        poor_initialisation,
        Key("F02 small tanh", 0),
        (Key("F05 large ReLU", 0), Key("H ten plain layers", 1)),
    ),
    "symmetric_units": Picture(
        symmetric_units, Key("F25 equal units", 1), (Key("H01 ReLU MLP", 3),)
    ),
    "weights_shrinking": Picture(weights_shrinking, Key("F36 heavy decay", 0)),
    "clipping": Picture(clipping, Key("F28 clipped to nothing", 0), (Key("H01 ReLU MLP", 3),)),
    "underflow": Picture(underflow, Key("F26 fp16 underflow", 0), (Key("H01 ReLU MLP", 3),)),
    "amp_skips": Picture(amp_skips, Key("F27 halving scale", 0), (Key("H10 GradScaler", 0),)),
    "rank_drift": Picture(rank_drift, Key("F30 no_sync from step 64", 0)),
    "straggler": Picture(straggler, Key("F31 one of three sleeps", 0)),
    # Any job will do, as though its process had been killed after the last step.
    "stalled_run": Picture(stalled_run, Key("H01 ReLU MLP", 3), silent=True),
    "reference_mismatch": Picture(
        reference_mismatch, Key("F39 wrong sign", 0), until=140, audited=(1, *range(20, 141, 20))
    ),
}


def job_of(
    key: Key,
    folder: Path,
    until: int | None = None,
    silent: bool = False,
    audited: Sequence[int] = (),
) -> Job:
    """A job that was trained before, up to and with step `until`, and what is said of it then.

    audited: steps of which it is trained again, with the same weights, to compare its gradients.
    """
    recording = load(key, folder)
    (optimizer,) = recording.optimizers
    window = recording.window(optimizer, until)
    if silent:
        times = [frame.time for frame in recording.frames[optimizer]]
        pauses = [after - before for before, after in pairwise(times)]
        window = replace(window, silence=Silence(SILENCE_S, max(pauses)))
    if audited:
        window = replace(window, audits=audits_of(key, audited))
    return Job(key, recording, window, judge(window))


def drawn(kind: str, kept: Path) -> tuple[Figure, Job]:
    """The picture of a kind, and its job. kept: folder of the jobs that were trained before."""
    picture = PICTURES[kind]
    job = job_of(picture.job, kept, picture.until, picture.silent, picture.audited)
    with mpl.rc_context(STYLE):
        figure = new_figure()
        picture.draw(figure, job, [job_of(key, kept) for key in picture.beside])
    return figure, job


def told(job: Job, kind: str) -> str:
    """What gradwatch says of a job, as Markdown."""
    (optimizer,) = job.recording.optimizers
    finding = job.told(kind)
    evidence = [f"  {label}: {value}" for label, value in finding.evidence.items()]
    return "\n".join(
        [
            f"What gradwatch says of {job.key.name}, seed {job.key.seed} ({optimizer}, "
            f"{len(job.window.layers)} tensors), at step {int(job.steps[-1])}:",
            "",
            "```text",
            f"{finding.severity}: {KINDS[kind].title}, since step {finding.first_step}",
            *wrap(finding.summary, 96),
            *evidence,
            "```",
        ]
    )


def publish(kind: str, kept: Path, folder: Path) -> None:
    """Write KIND.png, and what is told of its job into KIND.md. kept: as for `drawn`."""
    figure, job = drawn(kind, kept)
    write_png(figure, folder / f"{kind}.png")
    page = folder / f"{kind}.md"
    text = with_parts(page.read_text(encoding="utf-8"), {"told": told(job, kind)}, "zoo")
    page.write_text(text, encoding="utf-8")


def draw_all(folder: Path, kinds: Sequence[str], processes: int) -> None:
    """Train the jobs of these kinds' pictures, draw them, and write what is told."""
    keys = sorted({key for kind in kinds for key in (PICTURES[kind].job, *PICTURES[kind].beside)})
    with TemporaryDirectory(prefix="zoo-") as kept:
        for _ in in_parallel(partial(train, folder=Path(kept)), keys, "Training", processes):
            pass
        for kind in kinds:
            publish(kind, Path(kept), folder)

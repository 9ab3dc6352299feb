"""The reference engine and its peers: `Value` against micrograd, `Tensor` against HIPS autograd.

    python benchmarks/reference.py          # a table of ratios
    python benchmarks/reference.py --json   # the same figures as one JSON object

Each row is one training step (loss and gradients) on the same numbers by both sides, taken in turns
in one run; times are medians, memory is the peak of what Python and numpy allocate in one step.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

# Both sides call the same BLAS: its threads, on a shared machine, would only add noise.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import autograd
import autograd.numpy
import numpy as np
from autograd.scipy.signal import convolve
from micrograd import engine as micrograd
from micrograd import nn as micrograd_nn

import gradwatch_reference as gw

hips: Any = autograd  # it has no types that hold
anp: Any = autograd.numpy

Step = Callable[[], float]  # one training step; returns the loss


@dataclass(frozen=True)
class Comparison:
    """One task, done by both sides."""

    name: str
    peer: str
    ours: Step
    theirs: Step


@dataclass(frozen=True)
class Result:
    name: str
    peer: str
    ours_ms: float
    theirs_ms: float
    time_ratio: float  # ours / theirs: below 1 is faster
    ours_peak_mib: float
    theirs_peak_mib: float
    memory_ratio: float  # ours / theirs: below 1 is less


# ---- Value against micrograd


def with_weights_of(peer: Any, seed: int) -> gw.nn.Sequential:
    """Our network with the shape and the weights of a micrograd MLP."""
    modules: list[gw.nn.Module] = []
    for i, layer in enumerate(peer.layers):
        ours = gw.nn.Neurons(len(layer.neurons[0].w), len(layer.neurons))
        for row, bias, neuron in zip(ours.weight, ours.bias, layer.neurons, strict=True):
            for value, w in zip(row, neuron.w, strict=True):
                assert isinstance(value, gw.Value)
                value.data = w.data
            assert isinstance(bias, gw.Value)
            bias.data = float(neuron.b.data)
        modules.append(ours)
        if i < len(peer.layers) - 1:
            modules.append(gw.nn.ReLU())
    return gw.nn.Sequential(*modules)


def summed(model: gw.nn.Sequential, x: list[Any]) -> list[Any]:
    """The same network written as micrograd writes it: a node for every product and every sum."""
    for module in model.modules:
        if isinstance(module, gw.nn.Neurons):
            rows = zip(module.weight, module.bias, strict=True)
            x = [sum((w * v for w, v in zip(row, x, strict=True)), b) for row, b in rows]
        else:
            x = [v.relu() for v in x]
    return x


def scalar_tasks() -> list[Comparison]:
    rng = np.random.default_rng(0)
    corners = [([0.0, 0.0], -1.0), ([0.0, 1.0], 1.0), ([1.0, 0.0], 1.0), ([1.0, 1.0], -1.0)]
    angle = rng.uniform(0, np.pi, 24)
    moons = [
        ([float(np.cos(a)), float(np.sin(a))], 1.0)
        if i % 2
        else ([float(1 - np.cos(a)), float(0.5 - np.sin(a))], -1.0)
        for i, a in enumerate(angle)
    ]
    tasks: list[Comparison] = []
    for name, sizes, samples in (
        ("XOR 2-4-1", [4, 1], corners),
        ("moons 2-16-16-1", [16, 16, 1], moons),
    ):
        peer = micrograd_nn.MLP(2, sizes)
        ours = with_weights_of(peer, 0)

        def their_step(peer: Any = peer, samples: Any = samples) -> float:
            peer.zero_grad()
            losses = [(1 - peer(list(map(micrograd.Value, x))) * y).relu() for x, y in samples]
            loss: Any = sum(losses)
            loss.backward()
            return float(loss.data)

        def our_step(ours: Any = ours, samples: Any = samples) -> float:
            ours.zero_grad()
            losses = [(1 - ours(x)[0] * y).relu() for x, y in samples]
            loss: Any = sum(losses)
            loss.backward()
            return float(loss.data)

        def our_summed_step(ours: Any = ours, samples: Any = samples) -> float:
            ours.zero_grad()
            losses = [(1 - summed(ours, x)[0] * y).relu() for x, y in samples]
            loss: Any = sum(losses)
            loss.backward()
            return float(loss.data)

        tasks.append(Comparison(f"Value, {name}", "micrograd", our_step, their_step))
        same = f"Value, {name}, node for node"
        tasks.append(Comparison(same, "micrograd", our_summed_step, their_step))
    return tasks


# ---- Tensor against HIPS autograd


def mlp() -> Comparison:
    rng = np.random.default_rng(0)
    sizes = [(784, 256), (256,), (256, 128), (128,), (128, 10), (10,)]
    params = [rng.normal(size=size) * 0.05 for size in sizes]
    x, target = rng.normal(size=(128, 784)), rng.integers(0, 10, 128)
    one_hot = np.eye(10)[target]

    def ours(params: Any) -> Any:
        w1, b1, w2, b2, w3, b3 = params
        h = gw.relu(gw.matmul(x, w1) + b1)
        h = gw.relu(h @ w2 + b2)
        return gw.cross_entropy(h @ w3 + b3, target)

    def theirs(params: Any) -> Any:
        w1, b1, w2, b2, w3, b3 = params
        h = anp.maximum(anp.dot(x, w1) + b1, 0.0)
        h = anp.maximum(anp.dot(h, w2) + b2, 0.0)
        y = anp.dot(h, w3) + b3
        largest = anp.max(y, axis=1, keepdims=True)
        log_sum = largest + anp.log(anp.sum(anp.exp(y - largest), axis=1, keepdims=True))
        return -anp.mean(anp.sum(one_hot * (y - log_sum), axis=1))

    return tensor_task("MLP 784-256-128-10, batch 128", ours, theirs, params)


def conv() -> Comparison:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(16, 3, 28, 28)), rng.normal(size=(8, 3, 5, 5))

    def ours(params: Any) -> Any:
        return (gw.relu(gw.conv2d(params[0], params[1])) ** 2).mean()

    def theirs(params: Any) -> Any:
        kernel = anp.transpose(params[1], (1, 0, 2, 3))[:, :, ::-1, ::-1]
        y = convolve(params[0], kernel, axes=([2, 3], [2, 3]), dot_axes=([1], [0]), mode="valid")
        return anp.mean(anp.maximum(y, 0.0) ** 2)

    return tensor_task("conv 3 to 8 channels 5x5, 16 images 28x28", ours, theirs, [x, weight])


def attention() -> Comparison:
    rng = np.random.default_rng(0)
    n, t, d, heads = 4, 64, 64, 4
    x = rng.normal(size=(n, t, d))
    params = [rng.normal(size=(d, 3 * d)) * 0.1, rng.normal(size=(d, d)) * 0.1]
    seen = np.tri(t, dtype=bool)

    def ours(params: Any) -> Any:
        w_in, w_out = params
        split = gw.matmul(x, w_in).reshape(n, t, 3, heads, d // heads).transpose(2, 0, 3, 1, 4)
        y = gw.scaled_dot_product_attention(split[0], split[1], split[2], causal=True)
        return ((y.transpose(0, 2, 1, 3).reshape(n, t, d) @ w_out) ** 2).mean()

    def theirs(params: Any) -> Any:
        w_in, w_out = params
        split = anp.reshape(anp.matmul(x, w_in), (n, t, 3, heads, d // heads))
        query, key, value = anp.transpose(split, (2, 0, 3, 1, 4))
        scores = anp.matmul(query, anp.swapaxes(key, -1, -2)) / np.sqrt(d // heads)
        scores = anp.where(seen, scores, -1e30)
        weights = anp.exp(scores - anp.max(scores, axis=-1, keepdims=True))
        weights = weights / anp.sum(weights, axis=-1, keepdims=True)
        y = anp.transpose(anp.matmul(weights, value), (0, 2, 1, 3))
        return anp.mean(anp.matmul(anp.reshape(y, (n, t, d)), w_out) ** 2)

    return tensor_task("causal attention, 4 x 64 tokens, 4 heads of 16", ours, theirs, params)


def tensor_task(name: str, ours: Any, theirs: Any, params: list[Any]) -> Comparison:
    our_step, their_step = gw.value_and_grad(ours), hips.value_and_grad(theirs)
    return Comparison(
        f"Tensor, {name}",
        "HIPS autograd",
        lambda: float(our_step(params)[0]),
        lambda: float(their_step(params)[0]),
    )


# ---- measuring


def measure(task: Comparison, seconds: float) -> Result:
    """Both sides in turns until `seconds` are spent; each side's median, and its peak memory."""
    ours, theirs = task.ours(), task.theirs()
    if not np.isclose(ours, theirs, rtol=1e-9):
        raise RuntimeError(f"{task.name}: our loss is {ours}, theirs {theirs}: not the same task")
    times: tuple[list[float], list[float]] = ([], [])
    steps = steps_in(0.02, task.theirs)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for step, taken in zip((task.ours, task.theirs), times, strict=True):
            gc.collect()  # each side pays for its own garbage, not for the other's
            start = time.perf_counter()
            for _ in range(steps):
                step()
            taken.append(1e3 * (time.perf_counter() - start) / steps)
    ours_ms, theirs_ms = map(statistics.median, times)
    ours_peak, theirs_peak = peak_mib(task.ours), peak_mib(task.theirs)
    return Result(
        task.name,
        task.peer,
        ours_ms,
        theirs_ms,
        ours_ms / theirs_ms,
        ours_peak,
        theirs_peak,
        ours_peak / theirs_peak,
    )


def steps_in(seconds: float, step: Step) -> int:
    """How many steps fit into `seconds`; at least one."""
    start = time.perf_counter()
    step()
    return max(1, int(seconds / (time.perf_counter() - start)))


def peak_mib(step: Step) -> float:
    tracemalloc.start()
    step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare the reference engine with micrograd and HIPS autograd."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on each row")
    options = parser.parse_args()

    tasks = [*scalar_tasks(), mlp(), conv(), attention()]
    results: list[Result] = []
    for number, task in enumerate(tasks, 1):
        if sys.stderr.isatty():
            print(f"\r[{number}/{len(tasks)}] {task.name:<60}", end="", file=sys.stderr, flush=True)
        results.append(measure(task, options.seconds))
    if sys.stderr.isatty():
        print(f"\r{'':<70}\r", end="", file=sys.stderr)
    if options.json:
        print(json.dumps({"reference": [asdict(result) for result in results]}))
        return
    print(f"{'one training step':<56} {'peer':<14} {'ours':>9} {'peer':>9}   time    memory")
    for r in results:
        print(
            f"{r.name:<56} {r.peer:<14} {r.ours_ms:>6.2f} ms {r.theirs_ms:>6.2f} ms "
            f"{r.time_ratio:>5.2f}x {r.memory_ratio:>8.2f}x"
        )
    print("ratios are ours / peer's: below 1 is faster, or less memory")


if __name__ == "__main__":
    main()

"""What watching a training job costs it: the agent, and what people use instead, in one run.

On three models: an MLP of 20 layers x 256, a ResNet-50 and a decoder of GPT-2's size. Each way of
watching is switched on for a few steps of the same training, in turn with steps without any, so
that a busy machine slows all of them alike; figures are medians. `added` is what a step took
longer than a step without; `in hooks` is what the agent's own hooks took of it. The bars are
multiples of one multi-tensor norm pass over the gradients. The flight recorder, which has a
twentieth of the agent's budget for its samples, is timed beside them.

With one thread of torch, as by default, hooks and passes are timed by the processor time of the
training thread, which a busy machine leaves as it is; steps always by the clock on the wall.

Runs on the CPU, and on a CUDA device where there is one. wandb and TensorBoard take part where
they are installed: pip install 'gradwatch[bench]'.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradwatch.identity import identify
from gradwatch.job import Job, make_run_info
from gradwatch.monitor import Monitor
from gradwatch.settings import Settings
from gradwatch.wire.frame import Receipt

NORM_BAR_PASSES, NORM_BAR_MS = 1.3, 0.2
DETAIL_BAR_PASSES = 4.0
DEFAULTS_BAR_SHARE = 0.01
CLIP_BAR_RATIO = 1.05
MEMORY_BAR_MB = 50
NETWORK_BAR_KBPS = 20
NEVER = 1_000_000_000
WARM_UP_FRAMES = 12  # the agent records its first 10 steps in full, whatever it is set to


def clock() -> float:
    """Seconds: of this thread's processor where that is all the work, else of the wall."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.thread_time() if alone else time.perf_counter()


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        layers = [nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(20)]
        super().__init__(*layers)


class Bottleneck(nn.Module):
    """A residual block of He et al. 2015, with strides in its 3x3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.main = nn.Sequential(
            *convolved(inputs, width, 1, 1),
            nn.ReLU(inplace=True),
            *convolved(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *convolved(width, outputs, 1, 1),
        )
        plain = inputs == outputs and stride == 1
        self.side = (
            nn.Identity() if plain else nn.Sequential(*convolved(inputs, outputs, 1, stride))
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.relu(self.main(inputs) + self.side(inputs))


def convolved(inputs: int, outputs: int, size: int, stride: int) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs)


class ResNet50(nn.Sequential):
    def __init__(self) -> None:
        blocks: list[nn.Module] = []
        inputs = 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for number in range(count):
                blocks.append(Bottleneck(inputs, width, stride if number == 0 else 1))
                inputs = 4 * width
        stem = (*convolved(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))
        super().__init__(*stem, *blocks, *head)


class Block(nn.Module):
    """One layer of GPT-2, normalised before each part."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        parts = self.attention(self.norm_1(inputs)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        inputs = inputs + self.projection(mixed.transpose(1, 2).flatten(2))
        return inputs + self.mlp(self.norm_2(inputs))


class Decoder(nn.Module):
    """12 layers of width 768 over 1,024 tokens: 85.8 M parameters in 148 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(512, 768), nn.Embedding(64, 768)
        self.blocks = nn.Sequential(*(Block(768, 12) for _ in range(12)))
        self.norm = nn.LayerNorm(768)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.norm(self.blocks(self.tokens(tokens) + self.places(places)))
        return hidden @ self.tokens.weight.T


def token_loss(output: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), labels.flatten())


class Subject(NamedTuple):
    """A model to train, on what, and for how long."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    block: int  # steps that a way of watching is switched on for
    rounds: int


SUBJECTS = (
    Subject(
        "MLP 20 x 256",
        Mlp,
        lambda: (torch.randn(128, 256), torch.randn(128, 256)),
        functional.mse_loss,
        block=20,
        rounds=12,
    ),
    Subject(
        "ResNet-50",
        ResNet50,
        lambda: (torch.randn(8, 3, 64, 64), torch.randint(1000, (8,))),
        functional.cross_entropy,
        block=3,
        rounds=8,
    ),
    Subject(
        "GPT-2 small",
        Decoder,
        lambda: (torch.randint(512, (4, 64)), torch.randint(512, (4, 64))),
        token_loss,
        block=2,
        rounds=6,
    ),
)


class Training:
    """A job that can be stepped, and its steps' times in seconds, by what was switched on."""

    def __init__(self, subject: Subject, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = subject.make().to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.device = device
        self._batch = [part.to(device) for part in subject.batch()]
        self._loss = subject.loss

    def step(self, before: Callable[[], object] | None = None) -> float:
        """One step, in seconds. before: what is done between the backward pass and the update."""
        self.finish()
        started = time.perf_counter()
        self.optimizer.zero_grad()
        self._loss(self.model(self._batch[0]), self._batch[1]).backward()
        if before is not None:
            before()
        self.optimizer.step()
        self.finish()
        return time.perf_counter() - started

    def unfinished_step(self) -> None:
        """One step, without waiting for it."""
        self.optimizer.zero_grad()
        self._loss(self.model(self._batch[0]), self._batch[1]).backward()
        self.optimizer.step()

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def gradients(self) -> list[Tensor]:
        return [each.grad for each in self.model.parameters() if each.grad is not None]


@dataclass
class Way:
    """One way of watching. on: switches it on, for a block of steps."""

    name: str
    on: Callable[[], contextlib.AbstractContextManager[Callable[[], object] | None]]
    steps_s: list[float] = field(default_factory=list[float])
    hooks_s: list[float] = field(default_factory=list[float])


class Watched:
    """The agent on a training, in a run of its own, with its hooks timed; switched off at first."""

    def __init__(self, training: Training, folder: Path, **settings: Any) -> None:
        given = Settings.load({"spool": str(folder), **settings})
        identity = identify()
        self._job = Job(make_run_info(identity, given, "benchmark", {}, []), identity, given)
        self._optimizer = training.optimizer
        self._hooks = (
            training.optimizer._optimizer_step_pre_hooks,  # pyright: ignore[reportPrivateUsage]
            training.optimizer._optimizer_step_post_hooks,  # pyright: ignore[reportPrivateUsage]
        )
        self._job.watch(training.optimizer, [training.model])
        (self._watch,) = self._job._watches.values()  # pyright: ignore[reportPrivateUsage]
        self.recorder_s: list[float] = []
        if not given.overhead_budget:
            self._time_the_recorder()
        self._mine = [dict(hooks) for hooks in self._hooks]
        self.hook_s = 0.0
        self.monitor = Monitor(self._job)
        self._clear()
        training.step()
        for _ in range(WARM_UP_FRAMES):
            self._call(0, training.optimizer, (training.optimizer,), {})
        self._call(1, training.optimizer, (training.optimizer,), {})

    def _time_the_recorder(self) -> None:
        """The flight recorder has a budget of its own: with no limit it is timed by itself."""
        watch: Any = self._watch
        record = watch._record

        def timed(*given: Any) -> None:
            started = clock()
            record(*given)
            self.recorder_s.append(clock() - started)
            self.hook_s -= self.recorder_s[-1]

        watch._record = timed

    @contextmanager
    def on(self) -> Generator[None]:
        # The time that others were switched on is none that the agent may spend.
        self._watch._started_at = 0.0  # pyright: ignore[reportPrivateUsage]
        for place, hooks in enumerate(self._hooks):
            hooks[place] = functools.partial(self._call, place)
        yield
        self._clear()

    def _call(self, place: int, *given: Any) -> None:
        started = clock()
        for hook in self._mine[place].values():
            hook(*given)
        self.hook_s += clock() - started

    def _clear(self) -> None:
        for hooks in self._hooks:
            hooks.clear()

    @property
    def thread_s(self) -> float:
        """Processor time of the agent's own thread."""
        return self._job.outlet.cpu_s

    def close(self) -> None:
        self._job.finish("finished")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--quick", action="store_true", help="a quarter of the rounds")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU (1)")
    parser.add_argument("--only", choices=[subject.name for subject in SUBJECTS], action="append")
    parser.add_argument("--child", choices=["with", "without"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(watched=given.child == "with")
        return
    torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, Any] = {"device": device.type, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        for subject in SUBJECTS:
            if not given.only or subject.name in given.only:
                rounds = max(2, subject.rounds // 4) if given.quick else subject.rounds
                measured = measure(subject, device, Path(folder), rounds, quiet=given.json)
                figures[subject.name] = measured
                if not given.json:
                    show(subject.name, measured)
    figures["footprint"] = footprint()
    figures["cuda synchronisations added"] = (
        synchronisations() if device.type == "cuda" else "not measured: no CUDA device"
    )
    if given.json:
        print(json.dumps(figures))
        return
    print(f"\n{'for 300 layers at 10 steps/s, defaults':42}{'':12}{'bar':>10}")
    for name, bar in (("memory_mb", MEMORY_BAR_MB), ("network_kb_per_s", NETWORK_BAR_KBPS)):
        print(f"{name:42}{figures['footprint'][name]:>12.1f}{bar:>10}")
    print(f"CUDA synchronisations added: {figures['cuda synchronisations added']}")


def measure(
    subject: Subject, device: torch.device, folder: Path, rounds: int, quiet: bool
) -> dict[str, Any]:
    """Median seconds of a step in each way, and what the bars speak of."""
    training = Training(subject, device)
    every = {"overhead_budget": 0, "norm_every": 1}
    agents = {
        "gradwatch, defaults": Watched(training, folder),
        "gradwatch, norms every step": Watched(training, folder, **every, detail_every=NEVER),
        "gradwatch, full detail every step": Watched(training, folder, **every, detail_every=1),
    }
    passes: list[float] = []

    @contextmanager
    def one_pass() -> Generator[Callable[[], object]]:
        def read() -> None:
            gradients = training.gradients()
            started = clock()
            torch._foreach_norm(gradients)  # pyright: ignore
            training.finish()
            passes.append(clock() - started)

        yield read

    @contextmanager
    def item_loop() -> Generator[Callable[[], object]]:
        def read() -> None:
            for gradient in training.gradients():
                gradient.norm().item()

        yield read

    base = Way("no watching", lambda: contextlib.nullcontext())
    ways = [
        *(Way(name, agent.on) for name, agent in agents.items()),
        Way("one torch._foreach_norm pass", one_pass),
        Way("loop of p.grad.norm().item()", item_loop),
    ]
    missing: list[str] = []
    for name, module, peer in PEERS:
        if importlib.util.find_spec(module) is None:
            missing.append(f"{name}: not installed (pip install 'gradwatch[bench]')")
        else:
            ways.append(Way(name, lambda peer=peer: peer(training, folder)))
    for number in range(rounds):
        for way in ways:
            if not quiet:
                print(
                    f"\r{subject.name}: {number + 1}/{rounds} {way.name:40}",
                    end="",
                    file=sys.stderr,
                )
            agent = agents.get(way.name)
            with way.on() as before:
                for place in range(subject.block + 1):
                    if agent is not None:
                        agent.hook_s = 0.0
                    step_s = training.step(before)
                    if place:  # the first after a change finds other caches
                        way.steps_s.append(step_s)
                        if agent is not None:
                            way.hooks_s.append(agent.hook_s)
            base.steps_s.extend([training.step() for _ in range(subject.block + 1)][1:])
    if not quiet:
        print("\r" + " " * 90 + "\r", end="", file=sys.stderr)
    share = defaults_share(training, agents["gradwatch, defaults"], 20 * subject.block)
    clip = clipping(training, agents["gradwatch, norms every step"], rounds)
    for agent in agents.values():
        agent.close()
    base_s = statistics.median(base.steps_s)
    pass_s = statistics.median(passes)
    hooks = {way.name: statistics.median(way.hooks_s) for way in ways if way.hooks_s}
    norm_s = hooks["gradwatch, norms every step"]
    sample_s = statistics.median(agents["gradwatch, norms every step"].recorder_s)
    return {
        "parameters": sum(each.numel() for each in training.model.parameters()),
        "tensors": len(list(training.model.parameters())),
        "base_step_s": base_s,
        "norm_pass_s": pass_s,
        "ways": {
            way.name: {
                "added_s": statistics.median(way.steps_s) - base_s,
                "step_ratio": statistics.median(way.steps_s) / base_s,
                **({"in_hooks_s": hooks[way.name]} if way.name in hooks else {}),
            }
            for way in ways
        },
        "norm_frame_passes": norm_s / pass_s,
        "flight_sample_s": sample_s,
        "norm_frame_passes_beyond_allowance": (norm_s - NORM_BAR_MS / 1e3) / pass_s,
        "detail_frame_passes": hooks["gradwatch, full detail every step"] / pass_s,
        "defaults_share": share,
        "clip_ratio": clip,
        "not_measured": missing,
    }


def defaults_share(training: Training, agent: Watched, steps: int) -> float:
    """Of the time of steps in a row: what the agent's hooks and its thread took."""
    with agent.on():
        training.step()
        agent.hook_s, thread_s = 0.0, agent.thread_s
        started = clock()
        for _ in range(steps):
            training.step()
        elapsed_s = clock() - started
        return (agent.hook_s + agent.thread_s - thread_s) / elapsed_s


def clipping(training: Training, agent: Watched, rounds: int) -> float:
    """Time of monitor.clip_grad_norm_ beside torch's own on the same gradients: of medians."""
    parameters = list(training.model.parameters())
    monitor = agent.monitor
    ways: dict[Callable[..., Tensor], list[float]] = {
        nn.utils.clip_grad_norm_: [],
        monitor.clip_grad_norm_: [],
    }
    training.step()
    for _ in range(max(rounds, 30)):
        for clip, took in ways.items():
            for gradient in training.gradients():
                gradient.add_(1e-3)
            training.finish()
            started = clock()
            clip(parameters, 1.0)
            training.finish()
            took.append(clock() - started)
    torchs, ours = (statistics.median(took) for took in ways.values())
    return ours / torchs


def footprint() -> dict[str, float]:
    """Memory and network that watching takes in a process of its own, beside one that is not."""
    found: dict[str, dict[str, float]] = {}
    with counting_collector() as (url, received):
        for way in ("without", "with"):
            command = [sys.executable, __file__, "--child", way]
            environ = {**os.environ, "GRADWATCH_URL": url, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
            )
            found[way] = json.loads(done.stdout)
    sent = [size for when, size in received if found["with"]["from"] <= when <= found["with"]["to"]]
    seconds = found["with"]["to"] - found["with"]["from"]
    return {
        "memory_mb": found["with"]["peak_mb"] - found["without"]["peak_mb"],
        "network_kb_per_s": sum(sent) / 1e3 / seconds,
    }


def child(watched: bool) -> None:
    """150 small linear layers, 300 tensors, 10 steps a second for 20 s; prints its peak memory."""
    import gradwatch

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(150)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if watched:
        gradwatch.watch(model, optimizer)
    began = 0.0
    for step in range(220):
        started = time.monotonic()
        if step == 20:  # the agent records the first steps in full
            began = time.time()
        optimizer.zero_grad()
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
        time.sleep(max(0.0, 0.1 - (time.monotonic() - started)))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mb": peak_mb, "from": began, "to": time.time()}))


@contextmanager
def counting_collector() -> Generator[tuple[str, list[tuple[float, int]]]]:
    """A collector that takes everything; when each request came, and its bytes with headers."""
    received: list[tuple[float, int]] = []
    receipt = msgspec.json.encode(Receipt(stored=1, repeated=0))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            self.rfile.read(size)
            received.append((time.time(), size + len(str(self.headers)) + len(self.requestline)))
            self.send_response(200)
            self.send_header("Content-Length", str(len(receipt)))
            self.end_headers()
            self.wfile.write(receipt)

        do_PUT = do_POST  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()


def synchronisations() -> int:
    """Waits for the device, in 20 steps with the agent beyond those of 20 steps without it."""
    counts: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        for watched in (False, True):
            training = Training(SUBJECTS[0], torch.device("cuda"))
            agent = Watched(training, Path(folder), overhead_budget=0, detail_every=2)
            with (
                agent.on() if watched else contextlib.nullcontext(),
                torch.profiler.profile() as profile,
            ):
                for _ in range(20):
                    training.unfinished_step()
            events = profile.key_averages()
            counts.append(sum(each.count for each in events if "Synchronize" in each.key))
            agent.close()
    return counts[1] - counts[0]


@contextmanager
def wandb_watch(training: Training, folder: Path) -> Generator[Callable[[], object]]:
    """wandb.watch(log="gradients", log_freq=1), offline."""
    import wandb  # pyright: ignore

    os.environ.update(WANDB_SILENT="true", WANDB_CONSOLE="off")
    run: Any = wandb.run or wandb.init(mode="offline", dir=str(folder))
    run.watch(training.model, log="gradients", log_freq=1)

    def log() -> None:
        run.log({"step": 1})

    yield log
    run.unwatch(training.model)


@contextmanager
def tensorboard(training: Training, folder: Path) -> Generator[Callable[[], object]]:
    """SummaryWriter.add_histogram of every gradient."""
    from torch.utils.tensorboard import SummaryWriter  # pyright: ignore

    writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def write() -> None:
        for name, parameter in training.model.named_parameters():
            writer.add_histogram(name, parameter.grad, 1)

    yield write
    writer.close()


PEERS = (
    ("wandb.watch, offline, every step", "wandb", wandb_watch),
    ("TensorBoard histograms, every step", "tensorboard", tensorboard),
)


def show(name: str, measured: dict[str, Any]) -> None:
    base_s = measured["base_step_s"]
    print(
        f"\n{name}: {measured['parameters'] / 1e6:.1f} M parameters in {measured['tensors']} "
        f"tensors, step {base_s * 1e3:.1f} ms, one norm pass {measured['norm_pass_s'] * 1e3:.2f} ms"
    )
    print(f"{'':40}{'added ms':>10}{'of a step':>11}{'in hooks ms':>13}")
    for way, found in measured["ways"].items():
        hooks = f"{found['in_hooks_s'] * 1e3:>13.2f}" if "in_hooks_s" in found else ""
        added = found["added_s"]
        print(f"{way:40}{added * 1e3:>10.2f}{added / base_s:>11.1%}{hooks}")
    allowed = NORM_BAR_PASSES * measured["norm_pass_s"] * 1e3 + NORM_BAR_MS
    took = measured["ways"]["gradwatch, norms every step"]["in_hooks_s"] * 1e3
    detail, share = measured["detail_frame_passes"], measured["defaults_share"]
    for bar, found, limit in (
        ("norm frame", f"{took:.2f} ms", f"{allowed:.2f} ms"),
        ("full detail frame", f"{detail:.2f} passes", f"{DETAIL_BAR_PASSES:.0f} passes"),
        ("defaults, share of the time", f"{share:.2%}", f"{DEFAULTS_BAR_SHARE:.0%}"),
        ("clip_grad_norm_ / torch's own", f"{measured['clip_ratio']:.3f}", f"{CLIP_BAR_RATIO}"),
    ):
        print(f"{bar:40}{found:>16}{'bar':>6} {limit}")
    print(f"{'flight recorder, a sample':40}{measured['flight_sample_s'] * 1e3:>13.2f} ms")
    for line in measured["not_measured"]:
        print(line)


if __name__ == "__main__":
    main()

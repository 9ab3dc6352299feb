"""What watching a training job costs it: the agent, and what people use instead, in one run.

On three models: an MLP of 20 layers x 256, a ResNet-50 and a decoder of GPT-2's size. Each way of
watching is switched on for a few steps of one training, and off for as many right after, so that a
busy machine slows both alike: what it adds is the median of their differences. `in hooks` is what
the agent's own hooks took of it. What the agent's own thread takes is part of the defaults' share.
The bars are multiples of one multi-tensor norm pass over the gradients. The flight recorder, which
has a twentieth of the agent's budget for its samples, is timed beside them.

With one thread of torch, as by default, all this is processor time, which a busy machine leaves
nearly as it is: of the training thread for hooks and passes, of the process for steps, so that the
threads of whoever watches count too. With more, or on a CUDA device, it is time on the wall.

wandb and TensorBoard take part where they are installed: pip install 'gradwatch[bench]'.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
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


@functools.cache
def alone() -> bool:
    """Whether the training thread does all of the training's work."""
    return torch.get_num_threads() == 1 and not torch.cuda.is_available()


def clock() -> float:
    """Seconds: of this thread's processor where that is all the work, else of the wall."""
    return time.thread_time() if alone() else time.perf_counter()


def step_clock() -> float:
    """Seconds: of all of this process's threads where it may be, else of the wall."""
    return time.process_time() if alone() else time.perf_counter()


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

    key: str
    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    block: int  # steps that a way of watching is switched on for
    rounds: int
    paced_steps: int  # in a row, for what the defaults take of the time
    quick: tuple[int, int]  # rounds and paced steps of --quick


SUBJECTS = (
    Subject(
        "mlp",
        "MLP 20 x 256",
        Mlp,
        lambda: (torch.randn(128, 256), torch.randn(128, 256)),
        functional.mse_loss,
        block=6,
        rounds=25,
        paced_steps=600,
        quick=(6, 200),
    ),
    Subject(
        "resnet",
        "ResNet-50",
        ResNet50,
        lambda: (torch.randn(2, 3, 64, 64), torch.randint(1000, (2,))),
        functional.cross_entropy,
        block=1,
        rounds=9,
        paced_steps=80,
        quick=(2, 20),
    ),
    Subject(
        "gpt2",
        "GPT-2 small",
        Decoder,
        lambda: (torch.randint(512, (1, 64)), torch.randint(512, (1, 64))),
        token_loss,
        block=1,
        rounds=5,
        paced_steps=50,
        quick=(2, 8),
    ),
)


class Progress:
    """One line that says how far the benchmark is, where somebody looks at it."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._shown = sys.stderr.isatty()

    def advance(self, what: str) -> None:
        self._done += 1
        if not self._shown:
            return
        filled = 30 * self._done // self._total
        spent_s = time.monotonic() - self._started
        line = f"[{'#' * filled:.<30}] {spent_s:4.0f} s  {what}"
        print(f"\r{line:80.80}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print("\r" + " " * 80 + "\r", end="", file=sys.stderr, flush=True)


class Training:
    """A job that can be stepped."""

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
        started = step_clock()
        self.optimizer.zero_grad()
        self._loss(self.model(self._batch[0]), self._batch[1]).backward()
        if before is not None:
            before()
        self.optimizer.step()
        self.finish()
        return step_clock() - started

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
    agent: Watched | None = None
    added_s: list[float] = field(default_factory=list[float])
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
        before, after = (list(mine.values()) for mine in self._mine)
        for _ in range(WARM_UP_FRAMES):
            self._call(before, training.optimizer, (training.optimizer,), {})
        self._call(after, training.optimizer, (training.optimizer,), {})
        deadline = time.monotonic() + 10
        while self._job.outlet._queue and time.monotonic() < deadline:  # pyright: ignore[reportPrivateUsage]
            time.sleep(0.05)  # its thread imports what it needs, once

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
    def on(self, but_for_its_hooks: bool = False) -> Generator[None]:
        # The time that others were switched on is none that the agent may spend.
        self._watch._started_at = time.perf_counter()  # pyright: ignore[reportPrivateUsage]
        for place, hooks in enumerate(self._hooks):
            mine = [] if but_for_its_hooks else list(self._mine[place].values())
            hooks[place] = functools.partial(self._call, mine)
        yield
        self._clear()

    def _call(self, hooks: Sequence[Callable[..., object]], *given: Any) -> None:
        started = clock()
        for hook in hooks:
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
    keys = [subject.key for subject in SUBJECTS]
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--quick", action="store_true", help="a few rounds, in 90 s or so")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU (1)")
    parser.add_argument("--only", choices=[*keys, "footprint"], action="append")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    wanted = given.only or [*keys, "footprint"]
    subjects = [
        subject._replace(rounds=subject.quick[0], paced_steps=subject.quick[1])
        if given.quick
        else subject
        for subject in SUBJECTS
        if subject.key in wanted
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, Any] = {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    steps_of = len(FOOTPRINTS) if "footprint" in wanted else 0
    progress = Progress(sum(subject.rounds + 2 for subject in subjects) + steps_of)
    with tempfile.TemporaryDirectory() as folder:
        for subject in subjects:
            figures[subject.name] = measure(subject, device, Path(folder), progress)
            progress.clear()
            if not given.json:
                show(subject.name, figures[subject.name])
    if "footprint" in wanted:
        figures["footprint"] = footprint(60 if given.quick else 200, progress)
        progress.clear()
        if not given.json:
            show_footprint(figures["footprint"])
    figures["cuda synchronisations added"] = (
        synchronisations() if device.type == "cuda" else "not measured: no CUDA device"
    )
    if given.json:
        print(json.dumps(figures))
        return
    print(f"\nCUDA synchronisations added: {figures['cuda synchronisations added']}")
    print(f"load average {figures['load_average']:.1f} at the start, {os.getloadavg()[0]:.1f} now")


def measure(
    subject: Subject, device: torch.device, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Seconds that each way adds to a step, and what the bars speak of."""
    training = Training(subject, device)
    every = {"overhead_budget": 0, "norm_every": 1}
    defaults = Watched(training, folder)
    norms = Watched(training, folder, **every, detail_every=NEVER)
    details = Watched(training, folder, **every, detail_every=1)
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

    agents = {
        name: Way(name, agent.on, agent)
        for name, agent in (
            ("gradwatch, defaults", defaults),
            ("gradwatch, norms every step", norms),
            ("gradwatch, full detail every step", details),
        )
    }
    ways = [
        *agents.values(),
        Way("one torch._foreach_norm pass", one_pass),
        Way("loop of p.grad.norm().item()", item_loop),
    ]
    missing: list[str] = []
    for name, module, peer in PEERS:
        if importlib.util.find_spec(module) is None:
            missing.append(f"{name}: not installed (pip install 'gradwatch[bench]')")
        else:
            ways.append(Way(name, lambda peer=peer: peer(training, folder)))
    base_s: list[float] = []
    for number in range(subject.rounds):
        progress.advance(f"{subject.name}, round {number + 1} of {subject.rounds}")
        for way in ways:
            base_s.extend(compare(training, way, subject.block))
    progress.advance(f"{subject.name}, {subject.paced_steps} steps with the defaults")
    in_hooks, in_thread = defaults_share(training, defaults, subject.paced_steps)
    timing_s = timing(training, norms, max(5, subject.rounds))
    progress.advance(f"{subject.name}, clipping")
    clip = clipping(training, norms, subject.rounds)
    for way in agents.values():
        assert way.agent is not None
        way.agent.close()
    pass_s = statistics.median(passes)
    hooks = {name: statistics.median(way.hooks_s) - timing_s for name, way in agents.items()}
    norm_s = hooks["gradwatch, norms every step"]
    step_s = statistics.median(base_s)
    return {
        "parameters": sum(each.numel() for each in training.model.parameters()),
        "tensors": len(list(training.model.parameters())),
        "base_step_s": step_s,
        "norm_pass_s": pass_s,
        "ways": {
            way.name: {
                "added_s": (added_s := statistics.median(way.added_s)),
                "step_ratio": 1 + added_s / step_s,
                **({"in_hooks_s": hooks[way.name]} if way.name in hooks else {}),
            }
            for way in ways
        },
        "norm_frame_passes": norm_s / pass_s,
        "flight_sample_s": statistics.median(norms.recorder_s),
        "norm_frame_passes_beyond_allowance": (norm_s - NORM_BAR_MS / 1e3) / pass_s,
        "detail_frame_passes": hooks["gradwatch, full detail every step"] / pass_s,
        "defaults_share": in_hooks + in_thread,
        "defaults_share_of_thread": in_thread,
        "clip_ratio": clip,
        "not_measured": missing,
    }


def compare(training: Training, way: Way, block: int) -> list[float]:
    """A few steps with a way of watching, then as many without, whose seconds are returned."""

    def steps(before: Callable[[], object] | None) -> Generator[float]:
        for place in range(block + (block > 1)):
            if way.agent is not None:
                way.agent.hook_s = 0.0
            step_s = training.step(before)
            if place or block == 1:  # the first of small steps finds other caches
                yield step_s

    watched_s: list[float] = []
    with way.on() as before:
        for step_s in steps(before):
            watched_s.append(step_s)
            if way.agent is not None:
                way.hooks_s.append(way.agent.hook_s)
    base_s = list(steps(None))
    way.added_s.append(statistics.median(watched_s) - statistics.median(base_s))
    return base_s


def defaults_share(training: Training, agent: Watched, steps: int) -> tuple[float, float]:
    """Of the time of steps in a row: what the agent's hooks took, and what its thread did."""
    timing_s = timing(training, agent, max(5, steps // 20))
    with agent.on():
        training.step()
        agent.hook_s, thread_s = 0.0, agent.thread_s
        started = clock()
        for _ in range(steps):
            training.step()
        elapsed_s = clock() - started
        hooks_s = agent.hook_s - steps * timing_s
        return hooks_s / elapsed_s, (agent.thread_s - thread_s) / elapsed_s


def timing(training: Training, agent: Watched, steps: int) -> float:
    """Seconds of a step that timing the hooks takes by itself."""
    found_s: list[float] = []
    with agent.on(but_for_its_hooks=True):
        for _ in range(steps):
            agent.hook_s = 0.0
            training.step()
            found_s.append(agent.hook_s)
    return statistics.median(found_s)


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


# With the defaults, and as often as they ask for where the budget would never stretch it.
FOOTPRINTS: dict[str, dict[str, Any]] = {"defaults": {}, "no limit": {"overhead_budget": 0}}


def footprint(steps: int, progress: Progress) -> dict[str, dict[str, float]]:
    """Memory and network that watching takes, each in a fresh process."""
    found: dict[str, dict[str, float]] = {}
    job = Path(__file__).parent / "jobs" / "footprint.py"
    for name, settings in FOOTPRINTS.items():
        progress.advance(f"memory and network, {name}")
        with counting_collector() as (url, received):
            done = subprocess.run(
                [sys.executable, str(job), str(steps), json.dumps(settings)],
                env={**os.environ, "GRADWATCH_URL": url, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=True,
            )
        told = json.loads(done.stdout)
        sent = sum(size for when, size in received if told["from"] < when <= told["to"])
        found[name] = {
            "memory_mb": told["memory_mb"],
            "imports_mb": told["imports_mb"],
            # A step takes longer than its tenth of a second where the machine is busy.
            "network_kb_per_s": 10 * sent / 1e3 / steps,
        }
    return found


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
    bar("norm frame", took, allowed, "ms")
    bar("full detail frame", measured["detail_frame_passes"], DETAIL_BAR_PASSES, "passes")
    bar("defaults", 100 * measured["defaults_share"], 100 * DEFAULTS_BAR_SHARE, "% of the time")
    thread = measured["defaults_share_of_thread"]
    print(f"{'  of it, in its own thread':40}{100 * thread:>10.2f} % of the time")
    bar("clip_grad_norm_", measured["clip_ratio"], CLIP_BAR_RATIO, "x torch's own")
    print(f"{'flight recorder, a sample':40}{measured['flight_sample_s'] * 1e3:>10.2f} ms")
    for line in measured["not_measured"]:
        print(line)


def show_footprint(found: dict[str, dict[str, float]]) -> None:
    print("\n300 layers at 10 steps/s")
    for name, of in found.items():
        bar(f"memory, {name}", of["memory_mb"], MEMORY_BAR_MB, "MB")
        print(f"{'  of it, to import gradwatch':40}{of['imports_mb']:>10.2f} MB")
        bar(f"network, {name}", of["network_kb_per_s"], NETWORK_BAR_KBPS, "kB/s")


def bar(what: str, found: float, limit: float, unit: str) -> None:
    """A figure beside its bar."""
    met = "met" if found <= limit else "missed"
    print(f"{what:40}{found:>10.2f} {unit:14} bar {limit:.2f} {met}")


if __name__ == "__main__":
    main()

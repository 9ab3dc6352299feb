"""Taps on activations: how much of what they put out lies at their flat ends.

A tap is open from one optimizer step to the next, on the steps that will have a detail frame. While
it is open the `forward` of torch's saturating activations, and of the weight layers that they may
feed, is replaced in the classes. Hooks on modules would be copied, pickled and saved with them, and
those on all modules at once make torch.compile warn and compile again; what is replaced here,
torch.compile and torch.jit.script read as the original.

Of an output that gradient flows through, a bounded sample is copied where it lies: no activation is
kept alive, and no accelerator waited for. Functions such as `torch.tanh` and the gates inside of
recurrent cells are no modules, and are not seen.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradwatch.compiled import was_compiled
from gradwatch.interrupts import is_scripts_own
from gradwatch.layers import UNIT_DIMENSION, Layer
from gradwatch.notice import say, told
from gradwatch.reduce import in_memory_order
from gradwatch.sampling import RUN, joined, runs_of
from gradwatch.tracer import modes_on_stack
from gradwatch.transfer import copied_event, to_host

# Of RUN elements, of each output that is sampled.
RUNS = 64
# Of one module in a step; a recurrence may call its activation a thousand times.
MAX_CALLS = 64
# Of autograd, looked at on the way from an activation to the weight before it.
MAX_NODES = 32


class Ends(NamedTuple):
    """The flat ends of an activation: outputs up to `low`, and those from `high` on."""

    low: float
    high: float


# Where the slope is at most 4 % of the steepest. Of a sigmoid that is outside of 0.01 to 0.99, and
# tanh(a) is 2 sigmoid(2a) - 1; the slope of y = softsign(a) is (1 - |y|)^2. The other two are flat
# where they are cut off.
ENDS: dict[type[nn.Module], Callable[[Any], Ends]] = {
    nn.Tanh: lambda _: Ends(-0.98, 0.98),
    nn.Sigmoid: lambda _: Ends(0.01, 0.99),
    nn.Softsign: lambda _: Ends(-0.8, 0.8),
    nn.Hardsigmoid: lambda _: Ends(0.0, 1.0),
    nn.Hardtanh: lambda module: Ends(module.min_val, module.max_val),
}
# Those that are flat at one side or at none.
ENDLESS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU),
    *(nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Hardswish),
)
FED = tuple(kind for kind, _ in UNIT_DIMENSION)

# Autograd's names of what multiplies by a weight, and of what lies between it and the parameter.
PRODUCTS = frozenset(
    ("Addmm", "Mm", "Bmm", "Baddbmm", "Addbmm", "Addmv", "Mv", "Linear", "Convolution")
)
PASSED = frozenset(
    ("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "ToCopy", "Expand")
)


def ends_of(module: nn.Module) -> Ends | None:
    """The flat ends of an activation; None for a module that has none at both sides."""
    if isinstance(module, nn.Hardtanh) and module.min_val >= 0:
        return None  # as ReLU6, whose lower end is where its units are off
    return next((ends(module) for kind, ends in ENDS.items() if isinstance(module, kind)), None)


class Outputs(NamedTuple):
    """What was sampled of the activations of one step, perhaps still on its way from a device.

    layers: those that `places` count, or their numbers. places, sizes, ends: of each sampled call
    the layer that feeds its activation, its elements in `sample`, and where its activation is flat.
    endless: the layers whose activation has no flat ends.
    """

    layers: Sequence[object]
    places: Sequence[int]
    sizes: Sequence[int]
    ends: Sequence[Ends]
    sample: Tensor  # float[sum of sizes], on the CPU once copied
    copied: torch.Event | None
    endless: Sequence[int] = ()

    def without_layers(self) -> Outputs:
        """The same, which keeps no parameter alive."""
        return self._replace(layers=range(len(self.layers)))

    def saturated(self) -> NDArray[np.float32]:
        """Share of the elements at the flat ends, of each layer. NaN where it is not known.

        Returns float32[layers].
        """
        if self.copied is not None:
            self.copied.synchronize()
        values = self.sample.numpy().astype(np.float64)
        ends = np.array(self.ends, dtype=np.float64).reshape(-1, 2)
        low, high = np.repeat(ends, self.sizes, axis=0).T
        layer = np.repeat(np.array(self.places, dtype=np.int64), self.sizes)
        finite = np.isfinite(values)
        flat = finite & ((values <= low) | (values >= high))
        count = np.bincount(layer, finite, minlength=len(self.layers))
        with np.errstate(invalid="ignore"):
            share = np.bincount(layer, flat, minlength=len(self.layers)) / count
        share[[place for place in self.endless if not count[place]]] = 0.0
        return share.astype(np.float32)


class Modules:
    """The modules of some models, by path, and what is asked about them.

    Found out once: the optimizers of a job share it, and there may be one for each parameter.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Module]]) -> None:
        self.named = list(named)

    @functools.cached_property
    def saturating(self) -> bool:
        """Whether an activation among them has flat ends at both sides."""
        return any(ends_of(module) is not None for _, module in self.named)

    @functools.cached_property
    def before_endless(self) -> set[int]:
        """Identities of the weight layers whose activation has none."""
        return modules_before(ENDLESS, (module for _, module in self.named))

    @functools.cached_property
    def compiled(self) -> bool:
        """Whether torch.compile has a part in the job."""
        return was_compiled(module for _, module in self.named)


@dataclass(eq=False)
class _Call:
    """One sampled output. node: of autograd, by thread and number. feeds: whether a weight layer
    was seen to take it."""

    place: int
    ends: Ends
    sample: Tensor
    node: tuple[int, int]
    feeds: bool = False


class ActivationTaps:
    """The taps of one optimizer's layers.

    An activation whose output reaches no weight layer stands at the end of a network, as that of a
    classifier which is sure of itself: it is meant to reach its ends, and is left out.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._spent_s = 0.0
        self.forget()

    def forget(self) -> None:
        """End it, and keep no layer alive."""
        _listener.leave(self)
        self.calls: list[_Call] = []
        self._begun = False
        self._layers: Sequence[Layer] = ()
        self.weights: dict[int, int] = {}  # identity of a parameter -> place of its weight
        self._wanted = False
        self._endless: list[int] = []

    @property
    def opened(self) -> bool:
        """Whether they are sampled at this step."""
        return self._begun

    def spent_s(self) -> float:
        """Time that the training thread spent on taps since this was asked last."""
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s

    def open(self, layers: Sequence[Layer], modules: Callable[[], Modules]) -> None:
        """Sample until `close`. Nothing happens where a part of the job was compiled.

        modules: those of the models.
        """
        started = time.perf_counter()
        if layers is not self._layers:
            _listener.leave(self)
            self._layers, self.weights = layers, weights_of(layers)
            self._wanted = modules().saturating
            plain = modules().before_endless
            self._endless = [
                place for place in set(self.weights.values()) if id(layers[place].module) in plain
            ]
        self._begun = True
        if self._wanted and self.weights and not modules().compiled:
            _listener.join(self)
        self._spent_s += time.perf_counter() - started

    def close(self) -> Outputs | None:
        """End it. What is known of the activations; None for nothing."""
        begun, self._begun = self._begun, False
        if not begun:
            return None
        started = time.perf_counter()
        shared_s = _listener.leave(self)
        calls, self.calls = [call for call in self.calls if call.feeds], []
        sample = joined([call.sample for call in calls])
        outputs = Outputs(
            self._layers,
            [call.place for call in calls],
            [call.sample.numel() for call in calls],
            [call.ends for call in calls],
            to_host(sample),
            copied_event(sample.device),
            self._endless,
        )
        self._spent_s += time.perf_counter() - started + shared_s
        return outputs if calls or self._endless else None

    def give_up(self) -> None:
        """A fault of ours: sample no more of these layers."""
        self._wanted = False
        _listener.leave(self)
        self.calls = []


class _Listener:
    """The taps that are open in this process, and what the modules show all of them at once.

    A call is looked at once, however many taps are open, and belongs to those whose weight is the
    nearest before it.
    """

    def __init__(self) -> None:
        self._open: dict[ActivationTaps, None] = {}
        # By the identity of a parameter: the taps that have it, and the place of its weight.
        self._fed: dict[int, dict[ActivationTaps, int]] = {}
        self._untaken: dict[tuple[int, int], list[_Call]] = {}  # by node
        self._count: Counter[int] = Counter()  # calls of each module since a taps was opened
        self._spent_s = 0.0  # that no taps has been charged with
        # What stands in the place of which `forward`.
        self._replaced: list[tuple[Any, Any, Any]] = []
        self._lock = threading.RLock()  # the garbage collector may have us forget in the middle

    def forked(self) -> None:
        """In a process that was forked from one that watches."""
        self._lock = threading.RLock()

    def join(self, taps: ActivationTaps) -> None:
        with self._lock:
            if not self._open:
                for kind in (*ENDS, *FED):
                    original = vars(kind)["forward"]
                    self._replaced.append((kind, original, _tapped(original)))
                    kind.forward = self._replaced[-1][2]
            self._open[taps] = None
            for parameter, place in taps.weights.items():
                self._fed.setdefault(parameter, {})[taps] = place
            self._count.clear()

    def leave(self, taps: ActivationTaps) -> float:
        """Returns this taps' share of the time that was spent for all that are open."""
        with self._lock:
            if taps not in self._open:
                return 0.0
            share_s = self._spent_s / len(self._open)
            self._spent_s -= share_s
            del self._open[taps]
            for parameter in taps.weights:
                self._fed[parameter].pop(taps)
                if not self._fed[parameter]:
                    del self._fed[parameter]
            for call in taps.calls:
                waiting = self._untaken.get(call.node, [])
                if call in waiting:
                    waiting.remove(call)
                if not waiting:
                    self._untaken.pop(call.node, None)
            if not self._open:
                for kind, original, ours in self._replaced:
                    if vars(kind)["forward"] is ours:  # else it was replaced by somebody after us
                        kind.forward = original
                self._replaced.clear()
            return share_s

    def note(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """A module was called. No fault of ours reaches it."""
        started = time.perf_counter()
        try:
            ends = ends_of(module)
            if ends is not None:
                self._sample(module, ends, output)
            elif isinstance(module, FED) and args:
                self._taken(args[0])
        except Exception as error:
            if is_scripts_own(error):
                raise
            for taps in tuple(self._open):
                taps.give_up()
            say(f"could not sample {type(module).__name__}: {told(error)}")
        self._spent_s += time.perf_counter() - started

    def _sample(self, module: nn.Module, ends: Ends, output: Tensor) -> None:
        self._count[id(module)] += 1
        if self._count[id(module)] > MAX_CALLS:
            return
        node: Any = output.grad_fn
        places = self._fed_by(node)
        sample = sampled(output) if places else None
        if sample is None:
            return
        key = threading.get_ident(), node._sequence_nr()
        for taps, place in places.items():
            call = _Call(place, ends, sample, key)
            taps.calls.append(call)
            self._untaken.setdefault(key, []).append(call)

    def _fed_by(self, node: Any) -> dict[ActivationTaps, int]:
        """For each taps the nearest of its weights before a node of autograd, by its place."""
        pid = os.getpid()  # a forked process inherits what was open
        places: dict[ActivationTaps, int] = {}
        for before in _nearest_first(node):
            for parameter in _parameters_of(before):
                for taps, place in tuple(self._fed.get(id(parameter), {}).items()):
                    if taps.pid == pid:
                        places.setdefault(taps, place)
            if len(places) == len(self._open):
                break
        return places

    def _taken(self, given: Any) -> None:
        """A weight layer takes this input: whose output is it?"""
        if not self._untaken or type(given) is not Tensor or given.grad_fn is None:
            return
        thread = threading.get_ident()

        def taken(node: Any) -> bool:
            calls = self._untaken.pop((thread, node._sequence_nr()), ())
            for call in calls:
                call.feeds = True
            return bool(calls)

        for _ in _nearest_first(given.grad_fn, taken):
            pass


def weights_of(layers: Sequence[Layer]) -> dict[int, int]:
    """For the parameters of modules that multiply by a weight, the weight's place in the layers."""
    first: dict[int, int] = {}
    for place, layer in enumerate(layers):
        if layer.role == "weight" and layer.parameter.dim() >= 2:
            first.setdefault(id(layer.module), place)
    return {
        id(layer.parameter): first[id(layer.module)]
        for layer in layers
        if layer.module is not None and id(layer.module) in first
    }


def modules_before(kinds: tuple[type[nn.Module], ...], modules: Iterable[nn.Module]) -> set[int]:
    """Identities of the weight layers that feed a module of these kinds, as far as it is plain.

    That is in a Sequential, with nothing between that could be an activation.
    """
    found: set[int] = set()
    for module in modules:
        feeder: nn.Module | None = None
        for child in module.children() if type(module) is nn.Sequential else ():
            if feeder is not None and isinstance(child, kinds):
                found.add(id(feeder))
            feeder = child if isinstance(child, FED) else feeder if _keeps(child) else None
    return found


def _keeps(module: nn.Module) -> bool:
    """Whether a module between a weight layer and its activation is no activation."""
    name = type(module).__name__
    return any(part in name for part in ("Norm", "Dropout", "Pool", "Flatten", "Identity"))


def sampled(output: Tensor) -> Tensor | None:
    """A copy of RUNS * RUN elements, in runs from end to end, or of all of a smaller output.

    None for one that would have to be copied whole, or that is being captured into a graph.
    """
    plain = output.detach()
    ordered = plain if plain.is_contiguous() else in_memory_order(plain)
    if not (ordered.is_floating_point() and ordered.is_contiguous() and ordered.numel()):
        return None
    if ordered.is_meta or (ordered.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    part = runs_of(ordered, RUNS) if ordered.numel() > RUNS * RUN else ordered
    return part.clone(memory_format=torch.contiguous_format).view(-1)


def _nearest_first(node: Any, ends: Callable[[Any], bool] = lambda node: False) -> Iterator[Any]:
    """Nodes of autograd from one on back to the products with weights, and not behind those.

    Nor behind a custom function, for what is inside of it is not known, nor where it `ends`.
    """
    queue = deque([node])
    for _ in range(MAX_NODES):
        if not queue:
            return
        node = queue.popleft()
        yield node
        if not ends(node) and _kind_of(node) not in PRODUCTS and node.name()[-1].isdigit():
            queue.extend(before for before, _ in node.next_functions if before is not None)


def _kind_of(node: Any) -> str:
    """As "Addmm" of "AddmmBackward0"."""
    return node.name().partition("Backward")[0]


def _parameters_of(node: Any) -> Iterator[Tensor]:
    """The parameters that an operation was given, cast or transposed or as they are."""
    inside = [node]
    product = _kind_of(node) in PRODUCTS
    while inside:
        for before, _ in inside.pop().next_functions:
            parameter = getattr(before, "variable", None)
            if parameter is not None:
                yield parameter
            elif product and before is not None and _kind_of(before) in PASSED:
                inside.append(before)


# Keeps modes such as `torch.device` away; torch has no public name for it.
_unseen: Callable[[], Any] = torch._C.DisableTorchFunction  # pyright: ignore
_listener = _Listener()
# A thread of the parent may have held the lock, and is not there to let go of it.
os.register_at_fork(after_in_child=_listener.forked)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What stands in the place of a `forward`. Its names are those that `_tapped` gives it."""
    output = _original(self, *args, **kwargs)  # noqa: F821  # pyright: ignore
    if not _is_compiling():  # noqa: F821  # pyright: ignore
        _show(self, args, output)  # noqa: F821  # pyright: ignore
    return output


@functools.cache
def _tapped(original: Any) -> Any:
    """A `forward` that shows the taps what it was given and put out.

    Where torch compiles, this is the original and nothing else. torch.compile would look after the
    cells of a closure, and compile again once they are gone; so all names are global, in a scope
    that is no module's. torch.jit.script reads the original's code in it.
    """
    names = {name: value for name, value in original.__globals__.items() if name != "__name__"}
    names |= {
        "_original": original,
        "_show": torch.compiler.disable(_noted),
        "_is_compiling": torch.compiler.is_compiling,
    }
    return functools.update_wrapper(FunctionType(_forward.__code__, names), original)


def _noted(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not module.training or type(output) is not Tensor or _watched_by_others():
        return
    with _unseen():  # a mode sees even the attributes of a tensor
        # Only what a backward pass will come through, and not what is computed beside it.
        if output.grad_fn is not None:
            _listener.note(module, args, output)


def _watched_by_others() -> bool:
    """Whether operations of ours would be seen by a mode, a tracer or a transform of functions."""
    functorch: Any = torch._C._functorch  # pyright: ignore
    return (
        modes_on_stack() > 0
        or torch._C._get_tracing_state() is not None  # pyright: ignore
        or functorch.peek_interpreter_stack() is not None
    )

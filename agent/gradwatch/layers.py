"""Layers: the parameter tensors of a model, under the names that its author gave them."""

from __future__ import annotations

import gc
import itertools
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from gradwatch.wire.frame import MAX_LAYER_NAME, LayerInfo

# What wrappers put into the names of the modules that they wrap.
WRAPPER_PARTS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
PARALLEL_WRAPPERS = frozenset({"DistributedDataParallel", "DataParallel"})
# As torch writes the placement of a tensor that every rank holds whole.
REPLICATED = "(Replicate(),)"

# Dimension of a weight that runs over output units, by the class that owns it.
UNIT_DIMENSION: tuple[tuple[type[nn.Module], int], ...] = (
    (nn.ConvTranspose1d, 1),
    (nn.ConvTranspose2d, 1),
    (nn.ConvTranspose3d, 1),
    (nn.Linear, 0),
    (nn.Conv1d, 0),
    (nn.Conv2d, 0),
    (nn.Conv3d, 0),
)


class Layer(NamedTuple):
    """One parameter tensor with its name and its owner."""

    name: str
    parameter: Tensor
    module: nn.Module | None
    aliases: tuple[str, ...] = ()

    @property
    def unit_dim(self) -> int | None:
        """The dimension over output units; None where rows are no units (embeddings, gates)."""
        if self.parameter.dim() < 2:
            return None
        for kind, dim in UNIT_DIMENSION:
            if isinstance(self.module, kind):
                return dim
        return None

    @property
    def role(self) -> str:
        """Which kind of parameter this is, for detectors that judge them apart."""
        owner = type(self.module).__name__
        if isinstance(self.module, nn.Embedding | nn.EmbeddingBag):
            return "embedding"
        if "Norm" in owner:
            return "norm"
        if "bias" in self.name.rsplit(".", 1)[-1]:
            return "bias"
        return "weight" if self.parameter.dim() >= 2 else "norm"

    def describe(self, depth: int, optimized: bool, replicated: bool = False) -> LayerInfo:
        """This layer's line in the manifest. replicated: every rank is to hold the same."""
        return LayerInfo(
            name=_sendable(self.name),
            shape=tuple(self.parameter.shape),
            dtype=str(self.parameter.dtype).removeprefix("torch."),
            module=type(self.module).__name__ if self.module is not None else "",
            role=self.role,
            depth=depth,
            trainable=self.parameter.requires_grad,
            optimized=optimized,
            tied_to=tuple(map(_sendable, self.aliases)),
            sharding=_sharding(self.parameter, replicated),
            held=_held(self.parameter),
        )


def _sendable(name: str) -> str:
    """A name as UTF-8 and every database take it; what is too long ends in a mark of its own."""
    clean = name.encode("utf-8", "replace").decode().replace("\0", "?")
    if len(clean) > MAX_LAYER_NAME:
        clean = f"{clean[: MAX_LAYER_NAME - 9]}~{zlib.crc32(clean.encode()):08x}"
    return clean


def in_shards(parameter: Tensor) -> bool:
    """Whether this rank holds but a part of a parameter."""
    placements = getattr(parameter, "placements", ())
    return not all(placement.is_replicate() for placement in placements)


def _sharding(parameter: Tensor, replicated: bool) -> str:
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return REPLICATED if replicated else ""
    return str(placements)


def _held(parameter: Tensor) -> int | None:
    """Elements of a sharded parameter that this rank holds; None when it holds all of them."""
    local: Any = getattr(parameter.detach(), "to_local", None)
    return None if local is None else int(local().numel())


def named_layers(models: Iterable[nn.Module]) -> Iterator[Layer]:
    """Every parameter of the models once, in order of registration, wrappers' names removed.

    Models after the first get their class as a prefix when a name would come twice.
    """
    found: dict[int, list[str]] = {}
    owners: dict[int, tuple[Tensor, nn.Module]] = {}
    taken: set[str] = set()
    numbers: Counter[str] = Counter()  # how often each name was wanted, among those of clashes
    for model in models:
        names = [
            (f"{path}{key}", parameter, module)
            for path, module in clean_paths(model)
            for key, parameter in module.named_parameters(recurse=False)
        ]
        clash = any(name in taken for name, _, _ in names)
        for name, parameter, module in names:
            full = _unique(f"{type(model).__name__}.{name}", taken, numbers) if clash else name
            taken.add(full)
            found.setdefault(id(parameter), []).append(full)
            owners.setdefault(id(parameter), (parameter, module))
    for key, (first, *others) in found.items():
        parameter, module = owners[key]
        yield Layer(first, parameter, module, tuple(others))


def clean_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path, as "encoder.0.", without what wrappers put into it."""
    paths = {"": ""}
    wrappers: set[str] = set()
    for prefix, module in model.named_modules():
        if prefix:
            above, _, part = prefix.rpartition(".")
            added = part in WRAPPER_PARTS or (above in wrappers and part == "module")
            paths[prefix] = paths[above] if added else f"{paths[above]}{part}."
        if type(module).__name__ in PARALLEL_WRAPPERS:
            wrappers.add(prefix)
        yield paths[prefix], module


def _unique(name: str, taken: set[str], numbers: Counter[str]) -> str:
    candidate = name
    while candidate in taken:
        numbers[name] += 1
        candidate = f"{name}~{numbers[name] + 1}"
    return candidate


class Roots:
    """The outermost modules that are alive in this process, and the parameters that they hold.

    Used when no model was given. Keeps none of them alive.
    """

    def __init__(self) -> None:
        self.made_at = time.monotonic()
        # A module whose __init__ has not run, or failed, has no children to ask for.
        modules = [module for module in living(nn.Module) if "_modules" in vars(module)]
        # As torch keeps them: what a class makes of children() and parameters() may fail.
        inner = {id(child) for module in modules for child in vars(module)["_modules"].values()}
        self._held: list[frozenset[int]] = []
        self._modules: list[weakref.ref[nn.Module]] = []
        self._holders: dict[int, list[int]] = {}
        for module in modules:
            held = _parameters_of(module) if id(module) not in inner else ()
            if held:
                for parameter in held:
                    self._holders.setdefault(parameter, []).append(len(self._modules))
                self._modules.append(weakref.ref(module))
                self._held.append(frozenset(held))

    def know(self, parameters: Iterable[Tensor]) -> bool:
        """Whether each of the parameters was found in a module."""
        return all(id(parameter) in self._holders for parameter in parameters)

    def of(self, parameters: Iterable[Tensor]) -> list[nn.Module]:
        """The modules that hold any of the parameters, as few as do."""
        wanted = {id(parameter) for parameter in parameters}
        places = {place for each in wanted for place in self._holders.get(each, ())}
        chosen: list[nn.Module] = []
        covered: set[int] = set()
        # The largest first: a loss or an EMA wrapper that shares a few parameters adds none after.
        for place in sorted(places, key=lambda place: (-len(self._held[place]), place)):
            module = self._modules[place]()
            held = wanted & self._held[place]
            if module is not None and held - covered:
                chosen.append(module)
                covered |= held
        return chosen


def _parameters_of(module: nn.Module) -> frozenset[int]:
    """Identities of a module's parameters; none where it cannot say."""
    try:
        return frozenset(map(id, module.parameters()))
    except Exception:  # somebody else's module must not keep the others from being found
        return frozenset()


def owning_models(parameters: Iterable[Tensor]) -> list[nn.Module]:
    """The outermost modules alive in this process that hold any of the parameters."""
    return Roots().of(parameters)


M = TypeVar("M")


def living(kind: type[M]) -> list[M]:
    """Every object of a Python class, or of a class made of it, that is tracked by the collector.

    While somebody holds a list of all objects, a tuple that another thread is about to complete
    cannot be, and that thread gets a SystemError. So all objects are only gone through in calls
    that run no Python code, and return before another thread has its turn.
    """
    every = itertools.chain.from_iterable(map(gc.get_objects, (None,)))
    # The type rather than __class__, which has lazy proxies import things.
    seen = set(map(id, map(type, every)))
    kinds = {id(each): each for each in _subclasses(kind) if id(each) in seen}
    # An object of a class made in Python refers to it.
    return [each for each in gc.get_referrers(*kinds.values()) if id(type(each)) in kinds]


def _subclasses(kind: type) -> list[type]:
    found: dict[int, type] = {}
    waiting = [kind]
    while waiting:
        each = waiting.pop()
        if id(each) not in found:
            found[id(each)] = each
            waiting += type.__subclasses__(each)
    return list(found.values())


def held_by_optimizers() -> set[int]:
    """Identities of the parameters of all optimizers alive: some may have their turn only later."""
    alive: list[Any] = living(torch.optim.Optimizer)
    groups = [group for each in alive for group in getattr(each, "param_groups", ())]
    return {id(parameter) for group in groups for parameter in group["params"]}


def wrapped_by_ddp(
    models: Iterable[nn.Module], parameters: Sequence[Tensor], world_size: int
) -> set[int]:
    """Identities of the parameters that torch keeps equal on all ranks of the job.

    The wrapper may not be among the models that are watched: then it is looked for among all that
    are alive.
    """
    wanted = {id(parameter) for parameter in parameters}
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return set()
    found = [module for model in models for module in model.modules() if _spans(module, world_size)]
    if not found:
        found = [
            wrapper for wrapper in living(DistributedDataParallel) if _spans(wrapper, world_size)
        ]
    return {id(parameter) for wrapper in found for parameter in wrapper.parameters()} & wanted


def _spans(candidate: Any, world_size: int) -> bool:
    """Whether this is a wrapper of torch's whose replicas are on every rank."""
    if type(candidate) is not DistributedDataParallel or "process_group" not in vars(candidate):
        return False
    group = candidate.process_group
    return group is not None and group.size() == world_size


def shares_a_mesh(parameters: Iterable[Tensor], world_size: int) -> bool:
    """Whether a parameter is spread over all ranks of the job.

    Then every rank runs the same program over the same model, and what is not spread is the same
    on each.
    """
    meshes = (getattr(parameter, "device_mesh", None) for parameter in parameters)
    return any(mesh is not None and mesh.size() == world_size for mesh in meshes)


class ExecutionOrder:
    """Depth of each layer, seen from the order in which one backward pass reaches them.

    Gradients accumulate from the output's layers to the input's, so the reverse of that order is
    the order of the forward pass, whatever the order of registration. The hooks are on the
    tensors, so compiled models keep their graphs, and they are removed by the first `read`.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._seen: dict[int, int] = {}
        self._handles: list[Any] = [
            parameter.register_post_accumulate_grad_hook(self._note)
            for parameter in parameters
            if parameter.requires_grad and parameter.is_leaf and not is_lazy(parameter)
        ]

    def _note(self, parameter: Tensor) -> None:
        self._seen.setdefault(id(parameter), len(self._seen))

    def read(self, layers: Sequence[Layer]) -> list[int]:
        """Depth of each layer, 0 for the input's; layers not reached stand by their neighbours."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        last = len(self._seen)
        places: list[tuple[float, int]] = []
        neighbour = -1.0
        for index, layer in enumerate(layers):
            order = self._seen.get(id(layer.parameter))
            if order is not None:
                neighbour = float(last - order)
            places.append((neighbour, index))
        depths = [0] * len(layers)
        for depth, (_, index) in enumerate(sorted(places)):
            depths[index] = depth
        return depths

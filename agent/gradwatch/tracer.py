"""Tracing one training step: the range of whatever each operation reads and writes.

A `TorchDispatchMode` sees every operation of the forward and the backward pass below autograd, and
calls it exactly as torch would have: training stays the same to the bit. Ranges stay on their
device until the trace is read, so an accelerator is not waited for.

When the weights are lost to NaN already, whatever follows is NaN and tells nothing. So the tracer
can be given the storages as they were before: it then computes each operation that depends on
them a second time, with those, and records that. Random operations draw the same numbers.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.interrupts import is_scripts_own
from gradwatch.shadows import Shadows, has_storage, mutated, storage_key, tensors_in

# A step of a large transformer has some ten thousand; after this many it begins anew.
MAX_OPERATIONS = 50_000
# torch has no public names for these.
current_node = torch._C._current_autograd_node  # pyright: ignore
sequence_number = torch.autograd._get_sequence_nr  # pyright: ignore
modes_on_stack = torch._C._len_torch_dispatch_stack  # pyright: ignore
pop_mode: Callable[[], Any] = _python_dispatch._pop_mode  # pyright: ignore
push_mode: Callable[[Any], None] = _python_dispatch._push_mode  # pyright: ignore

TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep
AGENT_FOLDER = os.path.dirname(__file__) + os.sep
MODULE_CALL = os.path.join(TORCH_FOLDER, "nn", "modules", "module.py")


class Seen(NamedTuple):
    """A tensor that an operation read or wrote. `range` is a place in the trace's ranges."""

    storage: int
    shape: tuple[int, ...]
    dtype: str
    range: int


class Operation(NamedTuple):
    """One operation of the step, with where in the code it stands."""

    name: str  # as torch has it: "aten.log.default"
    pointwise: bool
    constants: tuple[float, ...]  # its numbers that are not finite
    read: tuple[Seen, ...]
    written: tuple[Seen, ...]
    node: str  # of autograd, as "LogBackward0", in the backward pass
    forward: int  # what the node belongs to: a key of the trace's `forward`; -1 when unknown
    place: Place


class Place(NamedTuple):
    """Where an operation was called."""

    module: str = ""
    module_class: str = ""
    source: str = ""


class Trace(NamedTuple):
    """What was seen of one step.

    ranges: float64[tensors, 2] on the CPU once `arrived`: lowest and highest element, NaN where
    one is NaN. forward: sequence number of an autograd node -> the operation that made it.
    """

    operations: list[Operation]
    ranges: Tensor
    arrived: Callable[[], object]
    forward: dict[int, Operation]
    state: frozenset[int]  # storages of parameters and buffers
    replayed: bool
    given_up: str


class Tracer(TorchDispatchMode):
    """Records the operations of this thread between `start` and `stop`.

    modules: those of the model, by path. before: storages of the weights as they were before the
    first NaN, by `storage_key`.
    """

    # Without it torch refuses operations such as flex_attention under any mode.
    supports_higher_order_operators = True

    def __init__(
        self,
        modules: Sequence[tuple[str, nn.Module]],
        before: Mapping[int, torch.UntypedStorage],
    ) -> None:
        super().__init__()
        self._paths = {id(module): path for path, module in modules}
        self._state = frozenset(
            storage_key(tensor)
            for _, module in modules
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
            if has_storage(tensor)
        )
        self._operations: list[Operation] = []
        self._forward: dict[int, Operation] = {}
        self._ranges: dict[torch.device, list[Tensor]] = {}
        self._order: list[tuple[torch.device, int]] = []
        self._shadows = Shadows(before)
        self._replays = bool(before)
        self._given_up = ""

    def start(self) -> None:
        self.__enter__()

    def stop(self) -> Trace:
        """Take the mode away, whatever others were put on top of it meanwhile."""
        above: list[Any] = []
        while (mode := pop_mode()) is not self:
            above.append(mode)
        push_mode(self)
        self.__exit__(None, None, None)
        for mode in reversed(above):
            push_mode(mode)
        ranges, arrived = self._collect()
        given_up = self._given_up or self._shadows.given_up
        return Trace(
            self._operations,
            ranges,
            arrived,
            self._forward,
            self._state,
            self._replays,
            given_up,
        )

    def abandon(self) -> None:
        """Record no more, where the mode cannot be taken away."""
        self._given_up = "abandoned"

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._given_up or not isinstance(func, torch._ops.OpOverload):  # pyright: ignore
            return func(*args, **kwargs)
        read: list[Tensor] = []
        shadow: Any = None
        try:
            read = list(tensors_in((args, kwargs)))
            seen = self._see_inputs(read)
            shadow = self._shadows.compute(func, args, kwargs, read)
        except Exception as error:
            if is_scripts_own(error):
                raise
            self._give_up(error)
            return func(*args, **kwargs)
        written = func(*args, **kwargs)
        try:
            self._note(func, args, kwargs, read, seen, written, shadow)
        except Exception as error:
            if is_scripts_own(error):
                raise
            self._give_up(error)
        return written

    def _give_up(self, error: Exception) -> None:
        self._given_up = f"{type(error).__name__}: {error}"[:200]
        self._shadows.clear()

    def _see_inputs(self, read: list[Tensor]) -> tuple[Seen, ...]:
        if len(self._operations) >= MAX_OPERATIONS:
            self._operations.clear()
            self._forward.clear()
            self._ranges.clear()
            self._order.clear()
        return tuple(self._see(tensor, self._shadows.of(tensor)) for tensor in read)

    def _note(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        read: list[Tensor],
        seen: tuple[Seen, ...],
        written: Any,
        shadow: Any,
    ) -> None:
        outputs = [*tensors_in(written), *mutated(func, args, kwargs)]
        self._shadows.settle(read, outputs, shadow, list(tensors_in(written)))
        node: Any = current_node()
        operation = Operation(
            name=str(func),
            pointwise=torch.Tag.pointwise in func.tags,
            constants=tuple(_broken_numbers((args, kwargs))),
            read=seen,
            written=tuple(self._see(tensor, self._shadows.of(tensor)) for tensor in outputs),
            node=node.name() if node is not None else "",
            forward=node._sequence_nr() if node is not None else -1,
            place=Place() if node is not None else self._place(inspect.currentframe()),
        )
        self._operations.append(operation)
        if node is None:
            # The counter is that of the next node: this operation's own was made just before.
            self._forward.setdefault(sequence_number() - 1, operation)

    def _see(self, tensor: Tensor, value: Tensor | None) -> Seen:
        """value: what to measure; None when it is not known."""
        place = -1
        if value is not None and (value.is_floating_point() or value.is_complex()):
            measured = _extremes(value)
            if measured is not None:
                stored = self._ranges.setdefault(value.device, [])
                place = len(self._order)
                self._order.append((value.device, len(stored)))
                stored.append(measured)
        key = storage_key(tensor) if has_storage(tensor) else 0
        return Seen(key, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), place)

    def _collect(self) -> tuple[Tensor, Callable[[], object]]:
        """All ranges as one tensor on the CPU, on its way there. float64[tensors, 2]."""
        ranges = torch.zeros((len(self._order), 2), dtype=torch.float64, device="cpu")
        rows: dict[torch.device, list[int]] = {}
        for row, (device, _) in enumerate(self._order):
            rows.setdefault(device, []).append(row)
        parts: list[tuple[list[int], Tensor]] = []
        for device, stored in self._ranges.items():
            stacked = torch.stack(stored)
            if device.type != "cpu":
                host = torch.empty(
                    stacked.shape, dtype=stacked.dtype, device="cpu", pin_memory=True
                )
                stacked = host.copy_(stacked, non_blocking=True)
            parts.append((rows[device], stacked))
        events = [
            torch.Event(device=device.type) for device in self._ranges if device.type != "cpu"
        ]
        for event in events:
            event.record()

        def arrived() -> None:
            for event in events:
                event.synchronize()
            for place, part in parts:
                ranges[place] = part

        return ranges, arrived

    def _place(self, frame: FrameType | None) -> Place:
        """The innermost module that is being called, and the innermost line outside torch."""
        source, module = "", None
        while frame is not None and module is None:
            code = frame.f_code
            file = code.co_filename
            if code.co_name == "_call_impl" and file == MODULE_CALL:
                module = frame.f_locals.get("self")
                if id(module) not in self._paths:
                    module = None  # as a loss, or a metric
            elif not source and not file.startswith((TORCH_FOLDER, AGENT_FOLDER, "<")):
                source = f"{os.path.basename(file)}:{frame.f_lineno} in {code.co_name}"
            frame = frame.f_back
        while frame is not None and not source:
            file = frame.f_code.co_filename
            if not file.startswith((TORCH_FOLDER, AGENT_FOLDER, "<")):
                source = f"{os.path.basename(file)}:{frame.f_lineno} in {frame.f_code.co_name}"
            frame = frame.f_back
        if module is None:
            return Place(source=source)
        return Place(self._paths[id(module)].rstrip("."), type(module).__name__, source)


def _extremes(tensor: Tensor) -> Tensor | None:
    """Lowest and highest element, NaN when one is NaN. float64[2], on the tensor's device."""
    if not tensor.numel():
        return None
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    low, high = torch.aminmax(real.detach())
    return torch.stack([low, high]).double()


def _broken_numbers(nested: Any) -> Iterator[float]:
    if isinstance(nested, float):
        if nested != nested or nested in (float("inf"), float("-inf")):
            yield nested
    elif isinstance(nested, tuple | list):
        for item in nested:
            yield from _broken_numbers(item)
    elif isinstance(nested, dict):
        for item in nested.values():
            yield from _broken_numbers(item)


def backward_pass() -> int | None:
    """The number of the backward pass that runs in this thread; None outside of one."""
    running: int = torch._C._current_graph_task_id()  # pyright: ignore  # has no public name
    return running if running >= 0 else None

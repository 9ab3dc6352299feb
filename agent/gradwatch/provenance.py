"""From a trace to the origin of its non-finite values. Pure, and in the agent's own thread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradwatch.tracer import Operation, Seen, Trace
from gradwatch.wire.frame import MAX_OPERANDS, Operand, Origin

# torch's names of operations, where people call them otherwise.
WORDS = {
    "div": "division",
    "reciprocal": "division",
    "mul": "multiplication",
    "sub": "subtraction",
    "rsub": "subtraction",
    "add": "addition",
    "addmm": "linear",
    "mm": "matmul",
    "bmm": "matmul",
    "convolution": "convolution",
    "log_softmax": "log_softmax",
    "safe_softmax": "softmax",
    "softmax": "softmax",
    "scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
    "scaled_dot_product_flash_attention": "scaled_dot_product_attention",
    "scaled_dot_product_efficient_attention": "scaled_dot_product_attention",
    "scaled_dot_product_cudnn_attention": "scaled_dot_product_attention",
    "native_layer_norm": "layer_norm",
    "native_batch_norm": "batch_norm",
    "nll_loss_forward": "nll_loss",
    "linalg_vector_norm": "norm",
}


# Operations that only hand data on: what uses it is of more interest.
HANDLING = """
    alias as_strided cat clone contiguous copy detach expand flatten index lift_fresh permute
    reshape select slice split stack squeeze t to_copy transpose unbind unsafe_view unsqueeze view
"""
PASSIVE = frozenset(HANDLING.split())

ARRIVED = ("input", "weights")  # kinds that no traced operation made
FOREIGN = "foreign"  # written by a collective: it arose on another rank


class Birth(NamedTuple):
    """Where a non-finite value came up.

    meant: an Inf that somebody put there, as a mask does; it is no origin by itself.
    """

    place: int  # of the operation in the trace
    kind: str  # of wire.frame.ORIGINS, or FOREIGN
    meant: bool


def origin_of(
    trace: Trace, gradients: Iterable[int], optimizer: str, rank: int, step: int
) -> Origin | None:
    """The origin of what is non-finite in a traced step, None when everything there was finite.

    gradients: storages of the parameters' gradients at the end of the step.
    """
    trace.arrived()
    ranges = trace.ranges.numpy()
    if np.isfinite(ranges).all():
        return None
    story = _Story()
    for place, operation in enumerate(trace.operations):
        _tell(story, trace, ranges, place, operation)
    broken = [story.held[key] for key in gradients if key in story.held] + story.losses
    # Gradients that a collective has overwritten tell nothing of this rank: whatever arose counts.
    known = bool(story.finite & set(gradients)) or bool(broken)
    foreign = any(birth.kind == FOREIGN for birth in broken)
    candidates = broken if known and not foreign else [] if trace.given_up else story.births
    candidates = [
        birth
        for birth in candidates
        if not birth.meant and (birth.kind not in ARRIVED or birth in story.users)
    ]
    if not candidates:
        return None
    return _described(trace, story, ranges, min(candidates), optimizer, rank, step)


class _Story:
    """What is known after some operations of a trace."""

    def __init__(self) -> None:
        self.held: dict[int, Birth] = {}  # storages that are not finite
        self.finite: set[int] = set()  # storages that were written and are
        self.foreign: set[int] = set()  # storages that other ranks write
        self.births: list[Birth] = []
        self.losses: list[Birth] = []  # of losses that were not finite
        self.users: dict[Birth, int] = {}  # the first operation to do something with an input


def _tell(
    story: _Story, trace: Trace, ranges: NDArray[np.float64], place: int, operation: Operation
) -> None:
    """Go on by one operation."""
    read = {seen.storage for seen in operation.read}
    before = trace.operations[place - 1] if place else operation
    if operation.node and not before.node and before.name.startswith("aten.ones_like"):
        # A backward pass begins: that was dL/dL, made like the loss.
        story.losses += [
            story.held[seen.storage] for seen in before.read if seen.storage in story.held
        ]
    if "c10d" in operation.name.split(".", 1)[0]:
        story.foreign |= read | {seen.storage for seen in operation.written}
        return
    broken = [seen for seen in operation.read if _is(ranges, seen, np.isfinite) is False]
    for seen in broken:
        if seen.storage not in story.held:
            story.held[seen.storage] = _arrival(trace, story, ranges, operation, seen, place)
        if _plain_name(operation.name) not in PASSIVE:
            story.users.setdefault(story.held[seen.storage], place)
    for seen in operation.written:
        finite = _is(ranges, seen, np.isfinite)
        if finite:
            story.finite.add(seen.storage)
            if seen.storage not in read:
                # New memory, perhaps where old was.
                story.held.pop(seen.storage, None)
                story.foreign.discard(seen.storage)
        elif finite is False:
            birth = _cause(ranges, operation, seen, broken, story.held, place)
            story.held[seen.storage] = birth
            story.finite.discard(seen.storage)
            if birth.place == place and birth not in story.births:
                story.births.append(birth)


def _arrival(
    trace: Trace,
    story: _Story,
    ranges: NDArray[np.float64],
    operation: Operation,
    seen: Seen,
    place: int,
) -> Birth:
    """Of a non-finite tensor that no traced operation wrote."""
    if seen.storage in story.foreign:
        return Birth(place, FOREIGN, True)
    kind = "weights" if seen.storage in trace.state else "input"
    # Masks are added or multiplied; an Inf that meets a matrix product is no mask.
    masked = not _is(ranges, seen, np.isnan) and operation.pointwise
    return Birth(place, kind, masked)


def _cause(
    ranges: NDArray[np.float64],
    operation: Operation,
    seen: Seen,
    broken: list[Seen],
    held: dict[int, Birth],
    place: int,
) -> Birth:
    """Why an output is not finite."""
    is_nan = bool(_is(ranges, seen, np.isnan))
    nans = [held[item.storage] for item in broken if _is(ranges, item, np.isnan)]
    infs = [held[item.storage] for item in broken if not _is(ranges, item, np.isnan)]
    if nans:
        return min(nans)
    unmeant = [birth for birth in infs if not birth.meant]
    if unmeant:
        return min(unmeant)
    if infs and not is_nan:
        return min(infs)
    kind = "gradient" if operation.node else "operation"
    if not infs and operation.constants:
        # -inf written into a mask is meant; NaN is not.
        constant_nan = any(number != number for number in operation.constants)
        return Birth(place, "constant", not constant_nan and not is_nan)
    return Birth(place, kind, False)


def _is(ranges: NDArray[np.float64], seen: Seen, holds: np.ufunc) -> bool | None:
    """Whether both ends of a tensor's range are so; None when it was not measured."""
    if seen.range < 0:
        return None
    return bool(holds(ranges[seen.range]).all())


def _described(
    trace: Trace,
    story: _Story,
    ranges: NDArray[np.float64],
    birth: Birth,
    optimizer: str,
    rank: int,
    step: int,
) -> Origin:
    user = story.users.get(birth, birth.place) if birth.kind in ARRIVED else birth.place
    operation = trace.operations[user]
    forward = trace.forward.get(operation.forward) if operation.node else None
    if forward is not None:
        for earlier in story.births:
            if trace.operations[earlier.place] is forward and not earlier.meant:
                # Its value was not finite either, and came before its derivative.
                birth, operation, forward = earlier, forward, None
                break
    place = forward.place if forward is not None else operation.place
    name = forward.name if forward is not None else operation.name
    word = _word(name) if forward is not None or not operation.node else _node_word(operation.node)
    read = operation.read if forward is None else forward.read
    note = ""
    if operation.node and birth.kind == "gradient":
        note = f"its value was finite; {_word(operation.name)} in {operation.node} was not"
    elif birth.kind == "input":
        read = tuple(seen for seen in operation.read if _is(ranges, seen, np.isfinite) is False)
    elif trace.given_up:
        note = trace.given_up
    return Origin(
        optimizer=optimizer,
        rank=rank,
        step=step,
        kind=birth.kind,
        operation=word[:200],
        module=place.module[:500],
        module_class=place.module_class[:200],
        source=place.source.encode("utf-8", "replace").decode()[:500],
        operands=tuple(
            Operand(
                shape=seen.shape,
                dtype=seen.dtype,
                low=float(ranges[seen.range, 0]),
                high=float(ranges[seen.range, 1]),
            )
            for seen in read
            if seen.range >= 0
        )[:MAX_OPERANDS],
        replayed=trace.replayed,
        note=note[:500],
    )


def _word(name: str) -> str:
    """ "aten.div.Tensor" as "division"."""
    plain = _plain_name(name)
    return WORDS.get(plain, plain)


def _plain_name(name: str) -> str:
    """ "aten.copy_.default" as "copy"."""
    return (name.split(".")[1] if "." in name else name).strip("_")


def _node_word(node: str) -> str:
    """ "SqrtBackward0" as "sqrt"; a custom function's "MyFnBackward" as "MyFn"."""
    head = node.rsplit("::", 1)[-1].split("Backward")[0]
    return WORDS.get(head.lower(), head.lower() if node[-1].isdigit() else head)

"""Tables of torch functions that the observer looks at, and how their arguments are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOSSES = frozenset(
    {
        "cross_entropy",
        "nll_loss",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
    }
)
# What multiplies its input with a weight.
WEIGHING = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
# What makes a tensor out of nothing.
INVENTING = frozenset({"zeros", "ones", "full", "arange", "zeros_like", "ones_like", "full_like"})
# Nodes of autograd's graph that pass values on, some left out or scaled.
PASSING = frozenset(
    {
        "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Transpose", "Permute", "T",
        "Clone", "ToCopy", "Slice", "Select", "Alias", "Expand", "NativeDropout",
    }
)  # fmt: skip


PRODUCTS = frozenset({"Mm", "Bmm", "Addmm", "Mv", "Linear"})
MAX_NODES = 32


class Domain(NamedTuple):
    """Where a function has no finite slope: where its argument compares so with the bound."""

    argument: int
    outside: Callable[[Tensor, float], Tensor]
    bound: float
    what: str


_DIVISOR = Domain(1, torch.eq, 0.0, "a divisor of 0")
_POSITIVE = Domain(0, torch.le, 0.0, "a value that is not positive")
DOMAINS: dict[str, Domain] = {
    "log": _POSITIVE,
    "log2": _POSITIVE,
    "log10": _POSITIVE,
    "log1p": Domain(0, torch.le, -1.0, "a value of -1 or less"),
    "sqrt": Domain(0, torch.le, 0.0, "0, where its slope is infinite, or a negative value"),
    "rsqrt": _POSITIVE,
    "div": _DIVISOR,
    "true_divide": _DIVISOR,
    "divide": _DIVISOR,
    "reciprocal": Domain(0, torch.eq, 0.0, "a divisor of 0"),
}
_OPERATORS = {
    "__truediv__": "div",
    "__itruediv__": "div",
    "__rtruediv__": "reciprocal",
    "__rdiv__": "reciprocal",
}


def name_of(function: Any) -> str:
    """The name of a torch function or tensor method, the same in place or not."""
    name = str(getattr(function, "__name__", function))
    return _OPERATORS.get(name) or (name if name.endswith("__") else name.rstrip("_"))


def stops_gradient(function: Any) -> bool:
    return function in (Tensor.detach, torch.detach, Tensor.detach_, Tensor.data.__get__)  # pyright: ignore[reportAttributeAccessIssue]


def activation_of(tensor: Tensor) -> str:
    """The operation that made the values of a tensor, as "Softmax"; empty for a leaf."""
    node: Any = tensor.grad_fn
    while node is not None:
        kind = str(node.name()).partition("Backward")[0]
        if kind not in PASSING:
            return kind
        node = node.next_functions[0][0] if node.next_functions else None
    return ""


def makes_cosines(tensor: Tensor) -> bool:
    """Whether the values come from products of vectors that were divided by their lengths."""
    waiting: list[Any] = [tensor.grad_fn]
    for _ in range(MAX_NODES):
        node = waiting.pop(0) if waiting else None
        if node is None:
            return False
        before = [each for each, _ in node.next_functions if each is not None]
        if _kind_of(node) in PRODUCTS:
            factors = [_kind_of(_maker(each)) for each in before]
            return len(factors) > 1 and set(factors) == {"Div"}
        waiting += before
    return False


def _maker(node: Any) -> Any:
    """What made the values that nodes such as a transposition pass on, scaled or as they are."""
    while True:
        before = [each for each, _ in node.next_functions if each is not None]
        scaled = _kind_of(node) == "Mul" and len(before) == 1
        if not (before and (scaled or _kind_of(node) in PASSING)):
            return node
        node = before[0]


def _kind_of(node: Any) -> str:
    return str(node.name()).partition("Backward")[0]


def argument(args: Any, kwargs: Any, place: int, *names: str) -> Any:
    """An argument by its place or by one of its names; None when it was not given."""
    if len(args) > place:
        return args[place]
    return next((kwargs[name] for name in names if name in kwargs), None)


def unusable(tensor: Tensor) -> bool:
    """NaN or +inf anywhere, or -inf where it masks nothing: among values other than 0."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return False
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return False
    if tensor.is_complex() or bool((tensor.isnan() | tensor.isposinf()).any()):
        return True
    return bool(tensor[finite].any())

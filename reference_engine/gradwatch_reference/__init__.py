"""An automatic differentiation engine written from scratch, to be read and to be trusted.

`Value` is reverse mode over Python floats: the idea, on one page. `Tensor` is the same over numpy
arrays, with forward mode and every higher order. Read in this order: value, tensor, primitive,
reverse, forward, modes; then the rule tables elementwise, shapes, reductions and products.
"""

# First: the modules beneath need it and one another.
from gradwatch_reference.tensor import Tensor  # isort: skip

from gradwatch_reference.elementwise import (
    absolute,
    arctan,
    clip,
    cos,
    cosh,
    erf,
    exp,
    expm1,
    log,
    log1p,
    maximum,
    minimum,
    power,
    relu,
    sigmoid,
    sin,
    sinh,
    softplus,
    sqrt,
    tan,
    tanh,
    where,
)
from gradwatch_reference.modes import (
    checkpoint,
    grad,
    hessian,
    hvp,
    jacobian,
    jvp,
    value_and_grad,
    vjp,
)
from gradwatch_reference.primitive import TABLE, Primitive, case, linear, pointwise, primitive
from gradwatch_reference.products import matmul
from gradwatch_reference.reductions import (
    cumsum,
    log_softmax,
    logsumexp,
    max,  # noqa: A004
    mean,
    min,  # noqa: A004
    softmax,
    std,
    sum,  # noqa: A004
    var,
)
from gradwatch_reference.shapes import (
    broadcast_to,
    concatenate,
    pad,
    reshape,
    stack,
    swapaxes,
    transpose,
)
from gradwatch_reference.value import Value, Vector, dot

__all__ = [
    "TABLE",
    "Primitive",
    "Tensor",
    "Value",
    "Vector",
    "absolute",
    "arctan",
    "broadcast_to",
    "case",
    "checkpoint",
    "clip",
    "concatenate",
    "cos",
    "cosh",
    "cumsum",
    "dot",
    "erf",
    "exp",
    "expm1",
    "grad",
    "hessian",
    "hvp",
    "jacobian",
    "jvp",
    "linear",
    "log",
    "log1p",
    "log_softmax",
    "logsumexp",
    "matmul",
    "max",
    "maximum",
    "mean",
    "min",
    "minimum",
    "pad",
    "pointwise",
    "power",
    "primitive",
    "relu",
    "reshape",
    "sigmoid",
    "sin",
    "sinh",
    "softmax",
    "softplus",
    "sqrt",
    "stack",
    "std",
    "sum",
    "swapaxes",
    "tan",
    "tanh",
    "transpose",
    "value_and_grad",
    "var",
    "vjp",
    "where",
]

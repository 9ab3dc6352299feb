"""One step of a recurrent network, with torch's weights: the gates stand one under the other.

x: [n, i]; h, c: [n, s]; w_x: [gates * s, i]; w_h: [gates * s, s]; b_x, b_h: [gates * s] or None.
"""

from __future__ import annotations

from gradwatch_reference.elementwise import relu, sigmoid, tanh
from gradwatch_reference.layers import linear
from gradwatch_reference.tensor import Operand, Tensor


def rnn_cell(
    x: Operand,
    h: Operand,
    w_x: Tensor,
    w_h: Tensor,
    b_x: Tensor | None = None,
    b_h: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """The next h: Elman (1990). nonlinearity: "tanh" or "relu"."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f'rnn_cell: nonlinearity is "tanh" or "relu", not {nonlinearity!r}')
    activation = tanh if nonlinearity == "tanh" else relu
    return activation(linear(x, w_x, b_x) + linear(h, w_h, b_h))


def lstm_cell(
    x: Operand,
    h: Operand,
    c: Operand,
    w_x: Tensor,
    w_h: Tensor,
    b_x: Tensor | None = None,
    b_h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The next h and c: Hochreiter and Schmidhuber (1997), with the forget gate of Gers (2000).

    The gates are, in order: input, forget, candidate, output.
    """
    gates = linear(x, w_x, b_x) + linear(h, w_h, b_h)
    i, f, g, o = _split(gates, 4)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


def gru_cell(
    x: Operand,
    h: Operand,
    w_x: Tensor,
    w_h: Tensor,
    b_x: Tensor | None = None,
    b_h: Tensor | None = None,
) -> Tensor:
    """The next h: Cho et al. (2014), the reset gate after the product, as torch has it.

    The gates are, in order: reset, update, candidate.
    """
    r_x, z_x, n_x = _split(linear(x, w_x, b_x), 3)
    r_h, z_h, n_h = _split(linear(h, w_h, b_h), 3)
    z = sigmoid(z_x + z_h)
    n = tanh(n_x + sigmoid(r_x + r_h) * n_h)
    return n + z * (h - n)


def _split(gates: Tensor, count: int) -> list[Tensor]:
    size = gates.shape[-1] // count
    return [gates[..., i * size : (i + 1) * size] for i in range(count)]

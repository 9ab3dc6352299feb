"""Losses, with torch's names and conventions.

reduction: "mean", "sum", or "none" for one loss an element (a sample for class losses).
"""

from __future__ import annotations

import numpy as np

from gradwatch_reference.elementwise import absolute, multiply, softplus, subtract, where
from gradwatch_reference.reductions import log_softmax, mean
from gradwatch_reference.reductions import sum as sum_
from gradwatch_reference.shapes import reshape, transpose
from gradwatch_reference.tensor import Array, Operand, Tensor, shape_of


def mse_loss(prediction: Tensor, target: Operand, reduction: str = "mean") -> Tensor:
    """(prediction - target)^2; both of one shape."""
    _same_shape("mse_loss", prediction, target)
    error = subtract(prediction, target)
    return _reduced(error * error, reduction)


def huber_loss(
    prediction: Tensor, target: Operand, delta: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """e^2 / 2 where |e| <= delta, delta (|e| - delta / 2) beyond: Huber (1964)."""
    _same_shape("huber_loss", prediction, target)
    error = subtract(prediction, target)
    size = absolute(error)
    loss = where(size <= delta, 0.5 * error * error, delta * (size - 0.5 * delta))
    return _reduced(loss, reduction)


def binary_cross_entropy_with_logits(
    logits: Tensor, target: Operand, pos_weight: Operand = 1.0, reduction: str = "mean"
) -> Tensor:
    """-(w y log p + (1 - y) log(1 - p)) with p = sigmoid(logits), without overflow.

    target: y between 0 and 1, of the same shape; pos_weight: w, broadcast to it.
    """
    _same_shape("binary_cross_entropy_with_logits", logits, target)
    right = multiply(target, softplus(-logits)) * pos_weight
    wrong = subtract(1.0, target) * softplus(logits)
    return _reduced(right + wrong, reduction)


def nll_loss(
    log_probabilities: Tensor,
    target: Array,
    weight: Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """-log_probabilities of the target's class; the mean is weighted by the classes' weights.

    log_probabilities: [n, classes, ...] or [classes]; target: ints [n, ...] or [];
    weight: [classes]. A sample whose target is `ignore_index` counts for nothing.
    """
    rows, classes, kept, shape = _by_row("nll_loss", log_probabilities, target, ignore_index)
    weights = _weights(rows, classes, kept, weight)
    losses = -rows[np.arange(len(classes)), classes] * weights
    return _averaged(losses, weights, reduction, shape)


def cross_entropy(
    logits: Tensor,
    target: Array,
    weight: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """nll_loss of log_softmax(logits).

    logits: [n, classes, ...] or [classes]; the rest as for `nll_loss`. label_smoothing: the share
    of the target that is spread evenly over the classes: Szegedy et al. (2016), section 7.
    """
    rows, classes, kept, shape = _by_row("cross_entropy", logits, target, ignore_index)
    weights = _weights(rows, classes, kept, weight)
    log_p = log_softmax(rows, -1)
    losses = -log_p[np.arange(len(classes)), classes] * weights
    if label_smoothing:
        each = np.ones(rows.shape[1]) if weight is None else np.asarray(weight)
        uniform = -mean(log_p * each, -1) * kept
        losses = (1.0 - label_smoothing) * losses + label_smoothing * uniform
    return _averaged(losses, weights, reduction, shape)


def _by_row(
    asker: str, scores: Tensor, target: Array, ignore_index: int
) -> tuple[Tensor, Array, Array, tuple[int, ...]]:
    """Scores as [rows, classes]; target classes and whether they count, as [rows]; their shape."""
    target = np.asarray(target)
    expected = scores.shape[:1] + scores.shape[2:] if scores.ndim > 1 else ()
    if target.shape != expected or target.dtype.kind not in "iu":
        raise ValueError(
            f"{asker} of scores {scores.shape}: the target must be integers of shape {expected}, "
            f"not {target.dtype} of {target.shape}"
        )
    axis = 1 if scores.ndim > 1 else 0
    last = (*(i for i in range(scores.ndim) if i != axis), axis)
    rows = reshape(transpose(scores, last), (target.size, scores.shape[axis]))
    kept = target.reshape(-1) != ignore_index
    classes = np.where(kept, target.reshape(-1), 0)
    if np.any((classes < 0) | (classes >= rows.shape[1])):
        raise IndexError(f"{asker}: a target is outside the {rows.shape[1]} classes")
    return rows, classes, kept, target.shape


def _weights(rows: Tensor, classes: Array, kept: Array, weight: Array | None) -> Array:
    each = np.ones(rows.shape[1], rows.dtype) if weight is None else np.asarray(weight)
    return each[classes] * kept


def _averaged(losses: Tensor, weights: Array, reduction: str, shape: tuple[int, ...]) -> Tensor:
    if reduction == "mean":
        return sum_(losses) / weights.sum()
    return _reduced(reshape(losses, shape), reduction)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return mean(losses)
    if reduction == "sum":
        return sum_(losses)
    if reduction == "none":
        return losses
    raise ValueError(f'reduction is "mean", "sum" or "none", not {reduction!r}')


def _same_shape(asker: str, prediction: Tensor, target: Operand) -> None:
    if shape_of(prediction) != shape_of(target):
        raise ValueError(
            f"{asker} of a prediction {shape_of(prediction)} and a target {shape_of(target)}: "
            "the shapes must be equal"
        )

"""Layers, activations, cells and losses against torch's own, over random shapes and settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812 (the name it goes by)

import gradwatch_reference as gw

few = settings(max_examples=20, derandomize=True, deadline=None)
sizes = st.integers(1, 4)


def normal(seed: int, *shape: int) -> np.ndarray:
    """Numbers away from the kink at 0."""
    x = np.random.default_rng(seed).normal(size=shape)
    return x + 0.05 * np.sign(x)


ACTIVATIONS: dict[str, tuple[Any, Any]] = {
    "relu": (gw.relu, F.relu),
    "leaky_relu": (lambda x: gw.leaky_relu(x, 0.2), lambda x: F.leaky_relu(x, 0.2)),
    "elu": (lambda x: gw.elu(x, 1.3), lambda x: F.elu(x, 1.3)),
    "gelu": (gw.gelu, F.gelu),
    "gelu, tanh": (lambda x: gw.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (gw.silu, F.silu),
    "softplus": (gw.softplus, F.softplus),
    "tanh": (gw.tanh, torch.tanh),
    "sigmoid": (gw.sigmoid, torch.sigmoid),
    "softmax": (gw.softmax, lambda x: x.softmax(-1)),
    "log_softmax": (gw.log_softmax, lambda x: x.log_softmax(-1)),
    "softmax, axis 0": (lambda x: gw.softmax(x, 0), lambda x: x.softmax(0)),
    "logsumexp": (lambda x: gw.logsumexp(x, -1), lambda x: x.logsumexp(-1)),
    "mean": (lambda x: gw.mean(x, 0), lambda x: x.mean(0)),
    "min": (lambda x: gw.min(x, 1), lambda x: x.amin(1)),
    "var": (lambda x: gw.var(x, -1), lambda x: x.var(-1, correction=0)),
    "std of all": (lambda x: gw.std(x, ddof=1), lambda x: x.std()),
    "stack": (lambda x: gw.stack([x, x * x], 1), lambda x: torch.stack([x, x * x], 1)),
    "pad": (
        lambda x: gw.pad(x, [(1, 2), (0, 3)], 0.5),
        lambda x: F.pad(x, (0, 3, 1, 2), value=0.5),
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(shape=st.tuples(st.integers(1, 4), st.integers(2, 5)), seed=st.integers(0, 99))
@few
def test_functions_of_one_array(agrees_with_torch: Any, name: str, shape: Any, seed: int):
    agrees_with_torch(*ACTIVATIONS[name], (1.5 * normal(seed, *shape),))


@given(n=sizes, c=sizes, length=sizes, shared=st.booleans())
@few
def test_prelu(agrees_with_torch: Any, n: int, c: int, length: int, shared: bool):
    slope = np.array([0.3]) if shared else normal(1, c)
    agrees_with_torch(gw.prelu, F.prelu, (normal(0, n, c, length), slope))


@given(lead=st.lists(sizes, max_size=3), i=sizes, o=sizes, bias=st.booleans())
@few
def test_linear(agrees_with_torch: Any, lead: list[int], i: int, o: int, bias: bool):
    xs = (normal(0, *lead, i), normal(1, o, i), normal(2, o))[: 2 + bias]
    agrees_with_torch(gw.linear, F.linear, xs)


@given(a=st.lists(sizes, max_size=2), b=st.lists(sizes, max_size=2), n=sizes, k=sizes, m=sizes)
@few
def test_matmul_of_vectors_matrices_and_stacks(
    agrees_with_torch: Any, a: list[int], b: list[int], n: int, k: int, m: int
):
    b = b[len(b) - min(len(a), len(b)) :] and [1] * len(b)
    for left in ((k,), (*a, n, k)):
        for right in ((k,), (*b, k, m)):
            agrees_with_torch(gw.matmul, torch.matmul, (normal(0, *left), normal(1, *right)))


@given(data=st.data(), rank=st.sampled_from([1, 2]))
@few
def test_convolution(agrees_with_torch: Any, data: Any, rank: int):
    groups, n = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    each = st.tuples(*[st.integers(1, 2)] * rank)
    stride, dilation, size = data.draw(each), data.draw(each), data.draw(each)
    padding = data.draw(st.tuples(*[st.integers(0, 2)] * rank))
    spatial = data.draw(st.tuples(*[st.integers(3, 6)] * rank))
    o, c = groups * data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    xs = (normal(0, n, groups * c, *spatial), normal(1, o, c, *size), normal(2, o))
    options = (stride, padding, dilation, groups)
    ours, theirs = [(gw.conv1d, F.conv1d), (gw.conv2d, F.conv2d)][rank - 1]
    agrees_with_torch(
        lambda x, w, b: ours(x, w, b, *options), lambda x, w, b: theirs(x, w, b, *options), xs
    )


@given(
    size=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    rank=st.integers(1, 2),
)
@few
def test_pooling(agrees_with_torch: Any, size: int, stride: int, padding: int, rank: int):
    x = normal(0, 2, 2, *(5, 6)[:rank])
    padding = min(padding, size // 2)
    theirs = [(F.max_pool1d, F.avg_pool1d), (F.max_pool2d, F.avg_pool2d)][rank - 1]
    ours = [(gw.max_pool1d, gw.avg_pool1d), (gw.max_pool2d, gw.avg_pool2d)][rank - 1]
    for our, their in zip(ours, theirs, strict=True):
        agrees_with_torch(
            lambda x, our=our: our(x, size, stride, padding),
            lambda x, their=their: their(x, size, stride, padding),
            (x,),
        )


@given(
    n=st.integers(2, 4), c=st.sampled_from([2, 4]), spatial=st.lists(st.integers(2, 3), max_size=2)
)
@few
def test_normalisation(agrees_with_torch: Any, n: int, c: int, spatial: list[int]):
    x, weight, bias = normal(0, n, c, *spatial), normal(1, c), normal(2, c)
    agrees_with_torch(
        gw.batch_norm,
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        (x, weight, bias),
        second_order=1e-6,
    )
    agrees_with_torch(
        lambda x, w, b: gw.group_norm(x, 2, w, b),
        lambda x, w, b: F.group_norm(x, 2, w, b),
        (np.concatenate([x, 2 * x + 1], 1), normal(1, 2 * c), normal(2, 2 * c)),
        second_order=1e-6,
    )
    last = x.shape[-1]
    agrees_with_torch(
        gw.layer_norm,
        lambda x, w, b: F.layer_norm(x, (last,), w, b),
        (x, normal(1, last), normal(2, last)),
        second_order=1e-6,
    )
    agrees_with_torch(
        gw.rms_norm, lambda x, w: F.rms_norm(x, (last,), w), (x, normal(1, last)), second_order=1e-6
    )


def test_batch_norm_in_evaluation_uses_the_running_statistics(agrees_with_torch: Any):
    means, variances = normal(3, 3), np.abs(normal(4, 3))
    agrees_with_torch(
        lambda x, w, b: gw.batch_norm(x, w, b, (means, variances)),
        lambda x, w, b: F.batch_norm(x, torch.tensor(means), torch.tensor(variances), w, b),
        (normal(0, 2, 3, 4), normal(1, 3), normal(2, 3)),
    )


@given(lead=st.lists(sizes, max_size=2), t=sizes, s=sizes, d=sizes, e=sizes, causal=st.booleans())
@few
def test_attention(
    agrees_with_torch: Any, lead: list[int], t: int, s: int, d: int, e: int, causal: bool
):
    xs = (normal(0, *lead, t, d), normal(1, *lead, s, d), normal(2, *lead, s, e))

    def theirs(q: Any, k: Any, v: Any) -> Any:
        scores = q @ k.mT / np.sqrt(d)
        if causal:
            scores = scores.masked_fill(~torch.ones(t, s, dtype=torch.bool).tril(), -torch.inf)
        return scores.softmax(-1) @ v

    agrees_with_torch(
        lambda q, k, v: gw.scaled_dot_product_attention(q, k, v, causal=causal), theirs, xs
    )
    if lead and not causal:
        ours = gw.scaled_dot_product_attention(*xs)
        expected = F.scaled_dot_product_attention(*map(torch.tensor, xs))
        np.testing.assert_allclose(ours.array, expected.numpy(), rtol=1e-12)


def test_attention_with_a_mask_looks_only_where_it_may():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 3, 4)) for _ in range(3))
    mask = np.array([[True, False, True]] * 3)
    expected = F.scaled_dot_product_attention(
        *map(torch.tensor, (q, k, v)), attn_mask=torch.tensor(mask)
    )
    np.testing.assert_allclose(
        gw.scaled_dot_product_attention(q, k, v, mask).array, expected.numpy(), rtol=1e-12
    )


@given(n=sizes, i=sizes, s=sizes, bias=st.booleans())
@few
def test_recurrent_cells(agrees_with_torch: Any, n: int, i: int, s: int, bias: bool):
    x, h, c = normal(0, n, i), normal(1, n, s), normal(2, n, s)

    def weights(gates: int) -> tuple[Any, ...]:
        wide = gates * s
        parts = (normal(3, wide, i), normal(4, wide, s), normal(5, wide), normal(6, wide))
        return parts if bias else parts[:2]

    agrees_with_torch(gw.rnn_cell, torch.rnn_tanh_cell, (x, h, *weights(1)))
    agrees_with_torch(gw.gru_cell, torch.gru_cell, (x, h, *weights(3)))
    agrees_with_torch(
        lambda *xs: gw.concatenate(gw.lstm_cell(*xs), -1),
        lambda x, h, c, *ws: torch.cat(torch.lstm_cell(x, (h, c), *ws), -1),
        (x, h, c, *weights(4)),
    )


def test_rnn_cell_with_relu(agrees_with_torch: Any):
    xs = (normal(0, 2, 3), normal(1, 2, 4), normal(2, 4, 3), normal(3, 4, 4))
    agrees_with_torch(lambda *xs: gw.rnn_cell(*xs, nonlinearity="relu"), torch.rnn_relu_cell, xs)


@given(indices=st.lists(st.integers(0, 3), min_size=1, max_size=5))
@few
def test_embedding_adds_up_the_gradients_of_a_repeated_row(
    agrees_with_torch: Any, indices: list[int]
):
    index = np.array(indices, int)
    agrees_with_torch(
        lambda w: gw.embedding(index, w) ** 2,
        lambda w: F.embedding(torch.tensor(index), w) ** 2,
        (normal(0, 4, 3),),
    )


def test_dropout_scales_what_its_mask_keeps(agrees_with_torch: Any):
    mask = np.array([[True, False, True], [False, True, True]])
    agrees_with_torch(
        lambda x: gw.dropout(x, mask, 0.25),
        lambda x: x * torch.tensor(mask) / 0.75,
        (normal(0, 2, 3),),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@given(shape=st.lists(sizes, max_size=3))
@few
def test_regression_losses(agrees_with_torch: Any, reduction: str, shape: list[int]):
    y, target = 2.0 * normal(0, *shape), np.abs(np.tanh(normal(1, *shape)))
    t = torch.tensor(target)
    pairs: list[tuple[Any, Any]] = [
        (
            lambda y: gw.mse_loss(y, target, reduction),
            lambda y: F.mse_loss(y, t, reduction=reduction),
        ),
        (
            lambda y: gw.huber_loss(y, target, 0.7, reduction),
            lambda y: F.huber_loss(y, t, reduction=reduction, delta=0.7),
        ),
        (
            lambda y: gw.binary_cross_entropy_with_logits(y, target, 2.5, reduction),
            lambda y: F.binary_cross_entropy_with_logits(
                y, t, reduction=reduction, pos_weight=torch.tensor(2.5)
            ),
        ),
    ]
    for ours, theirs in pairs:
        agrees_with_torch(ours, theirs, (y,))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@given(
    n=st.integers(2, 5),
    classes=st.integers(2, 4),
    spatial=st.lists(st.integers(1, 3), max_size=2),
    weighted=st.booleans(),
    ignoring=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.2]),
)
@few
def test_class_losses(
    agrees_with_torch: Any,
    reduction: str,
    n: int,
    classes: int,
    spatial: list[int],
    weighted: bool,
    ignoring: bool,
    smoothing: float,
):
    target = np.random.default_rng(0).integers(0, classes, (n, *spatial))
    if ignoring:
        target[0] = -100
    weight = np.random.default_rng(1).uniform(0.5, 2.0, classes) if weighted else None
    theirs = {"weight": None if weight is None else torch.tensor(weight), "reduction": reduction}
    logits = 3.0 * normal(2, n, classes, *spatial)
    agrees_with_torch(
        lambda x: gw.cross_entropy(x, target, weight, -100, smoothing, reduction),
        lambda x: F.cross_entropy(x, torch.tensor(target), label_smoothing=smoothing, **theirs),
        (logits,),
    )
    agrees_with_torch(
        lambda x: gw.nll_loss(x, target, weight, -100, reduction),
        lambda x: F.nll_loss(x, torch.tensor(target), **theirs),
        (logits,),
    )


@pytest.mark.parametrize("scale", [1e3, 1e300])
def test_losses_of_huge_logits_do_not_overflow(scale: float):
    x = np.array([[scale, 0.0, -scale], [0.0, scale, 1.0]])
    with np.errstate(over="raise", invalid="raise"):
        gradient = gw.grad(lambda x: gw.cross_entropy(x, np.array([0, 0])))(x)
        assert gw.log_softmax(x).array[0, 0] == 0.0
        loss = gw.binary_cross_entropy_with_logits(x, np.ones_like(x))
    assert loss.item() == pytest.approx(scale / 6, rel=0.01)
    np.testing.assert_allclose(gradient, [[0, 0, 0], [-0.5, 0.5, 0]], atol=1e-15)


def test_a_row_of_minus_infinity_has_probability_zero_and_no_nan():
    x = np.array([-np.inf, 0.0, 1.0])
    p = gw.softmax(x).array
    assert p[0] == 0.0
    gradient = gw.grad(lambda x: gw.softmax(x)[2])(x)
    assert np.isfinite(gradient).all()
    assert gradient[0] == 0.0
    assert gw.logsumexp(np.full(3, -np.inf)).item() == -np.inf


def test_empty_batches_pass_through_every_layer():
    w, b = gw.Tensor(normal(0, 4, 3)), gw.Tensor(normal(1, 4))
    x = gw.Tensor(np.zeros((0, 3)))
    y = gw.softmax(gw.gelu(gw.linear(x, w, b)))
    image = gw.Tensor(np.zeros((0, 2, 5, 5)))
    kernel = gw.Tensor(normal(2, 3, 2, 2, 2))
    z = gw.avg_pool2d(gw.max_pool2d(gw.conv2d(image, kernel), 2), 2)
    q = gw.Tensor(np.zeros((0, 2, 3)))
    (
        y.sum() + z.sum() + gw.scaled_dot_product_attention(q, q, q).sum() + gw.layer_norm(x).sum()
    ).backward()
    for tensor in (w, b, x, image, kernel, q):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()

"""The package's public names."""

from __future__ import annotations

import pytest

import gradwatch_reference as gw

GROUPS = {
    "the two engines": "Value Vector dot Tensor",
    "modes": "grad value_and_grad vjp jvp hvp hessian jacobian checkpoint",
    "checking": "numerical_gradient gradient_check GradientReport",
    "clipping": "clip_grad_value clip_grad_norm total_norm",
    "training": "nn optim SGD Adam",
    "drawing": "to_dot to_svg visualize_gradient_flow gradient_histograms",
    "elements": "abs absolute arctan clip cos cosh erf exp expm1 log log1p maximum minimum pow "
    "power sin sinh sqrt tan where",
    "reductions": "cumsum logsumexp max mean min std sum var",
    "shapes": "broadcast_to concat concatenate pad reshape stack swapaxes transpose",
    "activations": "elu gelu leaky_relu log_softmax prelu relu sigmoid silu softmax softplus tanh",
    "layers": "avg_pool1d avg_pool2d batch_norm conv1d conv2d dropout embedding group_norm "
    "layer_norm linear matmul max_pool1d max_pool2d rms_norm scaled_dot_product_attention",
    "cells": "gru_cell lstm_cell rnn_cell",
    "losses": "binary_cross_entropy_with_logits cross_entropy huber_loss mse_loss nll_loss",
    "new primitives": "TABLE Primitive case linear_map pointwise primitive",
}


def test_the_public_names_are_these_and_no_others():
    assert sorted(gw.__all__) == sorted(" ".join(GROUPS.values()).split())


@pytest.mark.parametrize("name", gw.__all__)
def test_every_public_name_is_there_and_documented(name: str):
    public = getattr(gw, name)
    assert name == "TABLE" or isinstance(public, gw.Primitive) or public.__doc__

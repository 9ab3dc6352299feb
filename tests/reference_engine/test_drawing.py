"""Drawings of computation graphs."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np

from gradwatch_reference import Tensor, Value, exp, sin, to_dot, to_svg


def test_a_graph_of_values_shows_every_value_and_gradient():
    x, w, b = Value(2.0), Value(3.0), Value(1.0)
    loss = (x * w + b) ** 2
    loss.backward()
    for drawing in (to_dot(loss, {"x": x, "w": w, "b": b}), to_svg(loss, {"x": x, "w": w, "b": b})):
        for text in ("value 49", "grad  42", "grad  28", "grad  14"):
            assert text in drawing
    svg = ElementTree.fromstring(to_svg(loss, {"x": x}))
    texts = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("x") == 1
    assert texts.count("leaf") == 2


def test_a_graph_of_tensors_has_gradients_at_inner_nodes_too():
    x = Tensor([1.0, 2.0])
    y = (x * x).sum() * 3.0
    dot = to_dot(y, {"x": x})
    assert "sum | value 5 | grad  3" in dot
    assert "multiply | value [2] \\|4.12\\| | grad  [2] \\|4.24\\|" in dot
    assert x.grad is None


def test_edges_lead_from_arguments_to_results():
    a, b = Value(1.0), Value(2.0)
    dot = to_dot(a * b, {"a": a, "b": b})
    assert dot.count(" -> ") == 2
    svg = to_svg(a * b)
    assert svg.count("<path") == 2
    assert svg.count("<rect") == 3


def test_names_are_escaped():
    x = Tensor([1.0])
    y = exp(x)
    assert "a&lt;b" in to_svg(y, {"a<b": x})
    assert "a\\<b" in to_dot(y, {"a<b": x})


def test_no_two_boxes_of_a_drawing_overlap():
    x = Tensor(np.ones(3))
    y = x
    for _ in range(4):
        y = sin(y) * x + y
    svg = ElementTree.fromstring(to_svg(y.sum()))
    corners = [(r.get("x"), r.get("y")) for r in svg.iter("{http://www.w3.org/2000/svg}rect")]
    assert len(set(corners)) == len(corners)

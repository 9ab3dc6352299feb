"""A computation graph as a drawing: what was computed from what, with the gradient at each node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import numpy as np

from gradwatch_reference.graph import topological_order
from gradwatch_reference.reverse import Sweep
from gradwatch_reference.tensor import Tensor
from gradwatch_reference.value import Value

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 132, 58, 56, 18, 16  # pixels


@dataclass(frozen=True)
class _Box:
    title: str
    value: str
    gradient: str
    is_leaf: bool
    parents: tuple[int, ...]  # their numbers


def to_dot(root: Value | Tensor, names: Mapping[str, Value | Tensor] | None = None) -> str:
    """The graph beneath `root` in the DOT language of Graphviz.

    names: what to call some of its nodes, as {"x": x, "w": w}; the others go by their operation.
    The gradients of Values are those of the last `backward`; those of Tensors are computed here,
    with ones as the seed.
    """
    lines = [
        "digraph computation {",
        "  rankdir=LR;",
        '  node [shape=record, fontname="monospace"];',
    ]
    for number, box in enumerate(_boxes(root, names or {})):
        label = " | ".join(_quoted(text) for text in (box.title, box.value, box.gradient))
        style = ', style=filled, fillcolor="#eef4ff"' if box.is_leaf else ""
        lines.append(f'  n{number} [label="{{{label}}}"{style}];')
        lines += [f"  n{parent} -> n{number};" for parent in box.parents]
    return "\n".join([*lines, "}"])


def to_svg(root: Value | Tensor, names: Mapping[str, Value | Tensor] | None = None) -> str:
    """The graph beneath `root` as an SVG image, inputs at the left; arguments as for `to_dot`."""
    boxes = _boxes(root, names or {})
    places = _layout(boxes)
    width = max(x for x, _ in places) + _WIDTH + _MARGIN
    height = max(y for _, y in places) + _HEIGHT + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="monospace" font-size="12">'
    ]
    for (x, y), box in zip(places, boxes, strict=True):
        for parent in box.parents:
            a, b, c = places[parent][0] + _WIDTH, places[parent][1] + _HEIGHT / 2, y + _HEIGHT / 2
            bend = (x - a) / 2
            parts.append(
                f'<path d="M{a:.1f},{b:.1f} C{a + bend:.1f},{b:.1f} {x - bend:.1f},{c:.1f} '
                f'{x:.1f},{c:.1f}" fill="none" stroke="#8a94a6"/>'
            )
    for (x, y), box in zip(places, boxes, strict=True):
        fill = "#eef4ff" if box.is_leaf else "#ffffff"
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" '
            f'fill="{fill}" stroke="#44546a"/>'
        )
        rows = ((box.title, "#111111"), (box.value, "#111111"), (box.gradient, "#a61c3c"))
        for row, (text, colour) in enumerate(rows):
            parts.append(
                f'<text x="{x + 8:.1f}" y="{y + 17 + 16 * row:.1f}" fill="{colour}">'
                f"{escape(text)}</text>"
            )
    return "\n".join([*parts, "</svg>"])


def _boxes(root: Value | Tensor, names: Mapping[str, Value | Tensor]) -> list[_Box]:
    """One box a node, inputs first."""
    titles = {id(node): name for name, node in names.items()}
    if isinstance(root, Value):
        nodes = topological_order(root)[::-1]
        texts = [(f"value {node.data:.4g}", f"grad  {node.grad:.4g}") for node in nodes]
    else:
        nodes = topological_order(root)[::-1]
        leaves = [node for node in nodes if node.primitive is None]
        seed = Tensor.constant(np.ones(root.shape, root.dtype))
        cotangents = Sweep(root, leaves).cotangents(seed, keep_all=True)
        texts = [
            (_summary("value", node), _summary("grad ", cotangents.get(node))) for node in nodes
        ]
    numbers = {id(node): number for number, node in enumerate(nodes)}
    return [
        _Box(
            titles.get(id(node), node.op or "leaf"),
            value,
            gradient,
            not node.parents,
            tuple(numbers[id(parent)] for parent in node.parents),
        )
        for node, (value, gradient) in zip(nodes, texts, strict=True)
    ]


def _summary(label: str, x: Tensor | None) -> str:
    """A number as it is; of an array the shape and the norm."""
    if x is None:
        return f"{label} 0"
    if x.size == 1:
        return f"{label} {x.item():.4g}"
    return f"{label} {list(x.shape)} |{float(np.linalg.norm(x.array)):.3g}|"


def _layout(boxes: list[_Box]) -> list[tuple[float, float]]:
    """The upper left corner of each box: a column right of all parents, at their mean height."""
    columns: list[int] = []
    wanted: list[float] = []
    for box in boxes:  # parents come first
        columns.append(1 + max((columns[parent] for parent in box.parents), default=-1))
        heights = [wanted[parent] for parent in box.parents]
        wanted.append(sum(heights) / len(heights) if heights else float(len(wanted)))
    places: list[tuple[float, float]] = [(0.0, 0.0)] * len(boxes)
    for column in range(max(columns) + 1):
        inside = sorted(
            (i for i, c in enumerate(columns) if c == column), key=lambda i: (wanted[i], i)
        )
        for row, i in enumerate(inside):
            x = _MARGIN + column * (_WIDTH + _GAP_X)
            places[i] = (x, _MARGIN + row * (_HEIGHT + _GAP_Y))
    return places


def _quoted(text: str) -> str:
    for special in '\\"{}|<>':
        text = text.replace(special, f"\\{special}")
    return text

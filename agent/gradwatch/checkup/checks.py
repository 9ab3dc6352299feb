"""The table of checks: name, title, and the function that looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from gradwatch.checkup import data, derivatives, learning, loop, passes, weights
from gradwatch.checkup.observation import Observation
from gradwatch.checkup.randomness import preserved
from gradwatch.checkup.verdict import Line, Verdict, skipped
from gradwatch.notice import told


class Check(NamedTuple):
    """One thing to look at. The documentation says for each why it matters."""

    name: str
    title: str
    look: Callable[[Observation], Verdict]


CHECKS = (
    Check("input_values", "Input values", data.input_values),
    Check("input_scale", "Input scale", data.input_scale),
    Check("labels", "Labels", data.labels),
    Check("classes", "Classes", data.classes),
    Check("weight_values", "Weight values", weights.weight_values),
    Check("weight_scale", "Initial weights", weights.weight_scale),
    Check("identical_units", "Units differ", weights.identical_units),
    Check("forward", "Forward pass", passes.forward),
    Check("domains", "log, sqrt, division", loop.domains),
    Check("softmax", "Loss gets logits", loop.softmax),
    Check("chance", "First loss", passes.chance),
    Check("backward", "Backward pass", passes.backward),
    Check("gradient_range", "Gradients over depth", passes.gradient_range),
    Check("reached", "Layers get gradients", passes.reached),
    Check("sigmoids", "Sigmoids in a stack", loop.sigmoids),
    Check("functions", "Custom functions", derivatives.functions),
    Check("model", "Gradient check", derivatives.model),
    Check("overfit", "Learns one batch", learning.overfit),
    Check("learning_rate", "Learning rate", learning.learning_rate),
    Check("zero_grad", "zero_grad", loop.zero_grad),
    Check("eval_mode", "Training mode", loop.eval_mode),
    Check("held", "Optimizer holds all", loop.held),
    Check("frozen", "Frozen layers", loop.frozen),
    Check("seed", "Seed", loop.seed),
)


def examine(seen: Observation) -> Iterator[Line]:
    """Make every check, one after the other; random generators are left as they were."""
    for check in CHECKS:
        with preserved():
            try:
                verdict = check.look(seen)
            except Exception as error:
                verdict = skipped(f"it failed itself: {told(error)}")
        yield Line(check.name, check.title, verdict)

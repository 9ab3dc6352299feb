"""The table of finding kinds: what each means, why it happens, what to try, and its source.

The API, the dashboard, the alerts and the documentation all read this table.
"""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """A pattern that gradwatch tells apart."""

    name: str
    title: str
    meaning: str
    explanation: str
    action: str
    source: str


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="vanishing",
            title="Vanishing gradients",
            meaning="The early layers receive almost no gradient, so they do not learn.",
            explanation=(
                "Backpropagation multiplies one factor a layer. When each is below 1 the product "
                "shrinks geometrically: a sigmoid's derivative is at most 0.25, so ten of them "
                "leave at most 0.25^10, about 1e-6, of the signal."
            ),
            action=(
                "Use ReLU or GELU instead of sigmoid or tanh, He or Xavier initialisation, "
                "normalisation layers, or residual connections."
            ),
            source="Hochreiter 1991; Glorot and Bengio 2010, section 4.2",
        ),
        Kind(
            name="exploding",
            title="Exploding gradients",
            meaning="Gradients are far too large somewhere, or grow without bound.",
            explanation=(
                "Backpropagation multiplies one factor a layer (or time step). When each is above "
                "1 the product grows geometrically, and one update can throw the weights far away."
            ),
            action=(
                "Clip the gradient norm (monitor.clip_grad_norm_), lower the learning rate, and "
                "check the initialisation; in a recurrent network use gates or orthogonal weights."
            ),
            source="Pascanu, Mikolov and Bengio 2013, section 2",
        ),
        Kind(
            name="dead_units",
            title="Dead units",
            meaning="Units whose gradient is exactly zero on every sample: they cannot recover.",
            explanation=(
                "A ReLU that is negative for every input has derivative 0, so neither its weights "
                "nor its bias change again. A large step or a large negative bias does this."
            ),
            action=(
                "Lower the learning rate or warm it up, start biases at 0, or use LeakyReLU or "
                "GELU; reinitialise the units that died."
            ),
            source="Lu et al. 2019, Dying ReLU and Initialization",
        ),
        Kind(
            name="non_finite",
            title="Non-finite values",
            meaning="NaN or Inf in a gradient or in the loss: from here on training is lost.",
            explanation=(
                "An operation left its domain or its range: log or sqrt of a non-positive number, "
                "0/0, exp of a large number, fp16 overflow. NaN spreads to all it touches."
            ),
            action=(
                "Look at the first layer and step named here; clamp the argument of log, sqrt and "
                "division, use log_softmax and logits losses, and check the data of that step."
            ),
            source="IEEE 754-2019, sections 6.1 and 6.2",
        ),
    )
}

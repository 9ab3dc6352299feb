"""Checks for mistakes of the training loop and of how the model is put together."""

from __future__ import annotations

from torch import Tensor

from gradwatch.checkup.observation import Observation
from gradwatch.checkup.verdict import Verdict, advice, passed, skipped, wrong
from gradwatch.checkup.words import listed

# A sigmoid's slope is at most 0.25: four of them leave at most 0.4 % of a gradient.
DEEP_SIGMOIDS = 4
NORMALISED = {"cross_entropy": "Softmax", "binary_cross_entropy_with_logits": "Sigmoid"}
ROWS_SUM_WITHIN = 1e-3
THAW = "requires_grad_(True) for the layers that are to learn."


def zero_grad(seen: Observation) -> Verdict:
    """Whether gradients are cleared between two steps."""
    pairs = [(training, training.cleared[1:]) for training in seen.trainings]
    if not any(cleared for _, cleared in pairs) or seen.own_optimizer:
        return skipped("needs two steps of a training loop")
    for training, cleared in pairs:
        if cleared and not any(cleared):
            return wrong(
                f"the gradients of {training.name} are never cleared: each step applies the sum "
                "of all before",
                "Call optimizer.zero_grad() before each backward().",
            )
    return passed("cleared between steps")


def eval_mode(seen: Observation) -> Verdict:
    """Whether dropout and batch-norm are in training mode when the model trains."""
    if not seen.trainings:
        return skipped("no optimizer stepped")
    if any(training.evaluating for training in seen.trainings):
        return wrong(
            "the model trains in eval mode: no dropout, and batch-norm does not learn the data's "
            "statistics",
            "Call model.train() before the training loop, and again after each validation.",
        )
    return passed("dropout and batch-norm, where there are any, are in training mode")


def softmax(seen: Observation) -> Verdict:
    """Probabilities given to a loss that wants logits, or the reverse."""
    if not seen.losses:
        return skipped("no loss function of torch's was called")
    for call in seen.losses:
        given = call.given
        if call.activation == NORMALISED.get(call.name) or (
            call.name == "cross_entropy" and given.shape[-1] > 1 and _probabilities(given)
        ):
            kind = NORMALISED[call.name].lower()
            return wrong(
                f"{call.name} is given what a {kind} made, and applies one itself",
                f"Give it the logits: remove the {kind}; twice applied, it flattens the gradient.",
            )
        if call.name == "nll_loss" and not _probabilities(given.exp()):
            return wrong(
                "nll_loss is given values that are no logarithms of probabilities: over the "
                "classes (dim=1) they do not sum to 1",
                "Use cross_entropy on logits, or log_softmax(dim=1) before nll_loss.",
            )
    return passed("losses get what they expect")


def held(seen: Observation) -> Verdict:
    """Whether optimizers hold the weights that get gradients, and those that the model uses."""
    if seen.idle:
        return wrong(
            f"{seen.idle} holds the weights and never steps: gradients are computed and cleared",
            "Call optimizer.step() after each backward().",
        )
    stray = _stray(seen)
    if not seen.trainings or (seen.own_optimizer and not stray):
        return skipped("needs the job's optimizer")
    for training in seen.trainings:
        mine = [item for item in training.held if item.requires_grad]
        if mine and seen.reached and not any(id(item) in seen.reached for item in mine):
            return wrong(
                f"{training.name} holds no weight that the loss depends on",
                "Build the optimizer after the model is complete, moved and wrapped, from "
                "model.parameters().",
            )
    names = {id(layer.parameter): layer.name for item in seen.trainings for layer in item.layers}
    left = [
        names[key]
        for key, tensor in seen.reached.items()
        if key in names and key not in seen.held and tensor.requires_grad
    ]
    if left:
        return wrong(
            f"no optimizer holds {listed(left)}",
            "Build the optimizer after these layers are in place, or add them with "
            "add_param_group; freeze them if they are meant to rest.",
            layers=len(left),
        )
    if stray:
        return wrong(
            f"the loss depends on {stray[0]}, and no optimizer holds its weights: the model that "
            "calls it does not register it",
            "Keep layers as attributes, in nn.ModuleList or in nn.ModuleDict: parameters() does "
            "not see those in a plain list or dict.",
            modules=len(stray),
        )
    return passed("optimizers hold every weight that gets a gradient")


def _stray(seen: Observation) -> list[str]:
    """Classes of the layers that are called inside of models which do not register them, though
    their weights get gradients that no optimizer applies."""
    registered = {id(module) for call in seen.models for module in call.module.modules()}
    return [
        type(module).__name__
        for key, module in seen.called.items()
        if key not in registered
        and any(
            id(weight) in seen.reached and id(weight) not in seen.held
            for weight in module.parameters(recurse=False)
        )
    ]


def frozen(seen: Observation) -> Verdict:
    """Weights that an optimizer was given though they are frozen."""
    if not seen.trainings:
        weights = [item for call in seen.models for item in call.module.parameters()]
        if weights and not any(item.requires_grad for item in weights):
            return wrong("every weight is frozen: nothing can train", THAW)
        return skipped("no optimizer stepped")
    told: list[str] = []
    for training in seen.trainings:
        mine = training.held
        rest = {id(item) for item in mine if not item.requires_grad}
        if len(rest) == len(mine):
            return wrong(f"every weight of {training.name} is frozen: nothing can train", THAW)
        layers = [layer for layer in training.layers if layer.role == "weight"]
        resting = [layer.name for layer in layers if id(layer.parameter) in rest]
        if resting and id(layers[-1].parameter) in rest:
            return wrong(
                f"the last layer ({layers[-1].name}) is frozen, and layers before it train",
                "A new task needs a new head: requires_grad_(True) for it, unless it is meant.",
            )
        told += resting
    if told:
        return advice(
            f"frozen, though an optimizer holds them: {listed(told)}",
            "Fine in fine-tuning; else requires_grad_(True).",
            layers=len(told),
        )
    return passed("nothing that an optimizer holds is frozen")


def domains(seen: Observation) -> Verdict:
    """log, sqrt and division of what depends on weights, where they have no finite slope."""
    if not seen.models and not seen.values:
        return skipped("nothing was computed")
    if seen.hazards:
        worst = max(seen.hazards, key=lambda hazard: hazard.share)
        where = f" in {worst.module}" if worst.module else ""
        return wrong(
            f"{worst.function}{where} is given {worst.what} ({worst.share:.2%} of its argument)",
            "Clamp its argument (x.clamp_min(1e-8)), or use log_softmax, logsigmoid, log1p or a "
            "loss on logits.",
            share=worst.share,
        )
    return passed("log, sqrt and division stay where they have a slope")


def sigmoids(seen: Observation) -> Verdict:
    """Sigmoids as activations of a deep stack."""
    count = len(seen.sigmoid_fed)
    if count >= DEEP_SIGMOIDS:
        return wrong(
            f"{count} layers are fed by a sigmoid, which passes at most a quarter of a gradient: "
            f"{0.25**count:.1g} in all",
            "Use ReLU or GELU between layers; keep the sigmoid for gates and outputs.",
            sigmoids=count,
        )
    return passed(f"{count} layers are fed by a sigmoid" if count else "none")


def seed(seen: Observation) -> Verdict:
    """Whether a seed was chosen, without which no result can be had again."""
    if seen.seeded:
        return passed("torch was given a seed")
    return advice(
        "no seed was set: the next run starts with other weights and another order of the data",
        "torch.manual_seed(0) at the top, and a generator for the DataLoader's workers.",
    )


def _probabilities(given: Tensor) -> bool:
    """Whether rows are probabilities: not negative, and with a sum of 1 each."""
    if not given.numel() or bool((given < 0).any()):
        return False
    sums = given.double().sum(1 if given.dim() > 1 else 0)
    return bool(((sums - 1).abs() < ROWS_SUM_WITHIN).all())

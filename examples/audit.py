"""A custom autograd.Function with a wrong sign, found by an audit of the first step.

    gradwatch up                                                 # in another terminal
    GRADWATCH_URL=http://127.0.0.1:8470 python examples/audit.py
    GRADWATCH_URL=http://127.0.0.1:8470 python examples/audit.py --right   # the same without it

At some steps what each layer saw is kept, and its gradients are computed again: those of linear
layers by the reference engine in float64, the custom function's by finite differences. Without
GRADWATCH_URL the audits are printed alone.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import gradwatch
from gradwatch.checkup.derivatives import slopes_of_function
from gradwatch.checkup.observation import FunctionCall
from gradwatch.client import Client, CollectorError
from gradwatch.health.reference_mismatch import difference, tolerance_of
from gradwatch.wire.audit import Audit, AuditedLayer, Method
from gradwatch_reference import Tensor as ReferenceTensor
from gradwatch_reference import linear

STEPS = 200
AUDITED_STEPS = (1, 100, 200)
OPTIMIZER = "SGD"
PATIENCE_S = 30.0


class Softsign(torch.autograd.Function):
    """x / (1 + |x|)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x / (1 + x.abs())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] / (1 + x.abs()) ** 2


class WrongSoftsign(Softsign):
    """The same, but that somebody lost a sign on the way back."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -Softsign.backward(ctx, *gradients)


class Activation(nn.Module):
    """A custom function as a module."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function.apply(x)


class Tap:
    """What one module saw in the last step: its input, and the gradient of its output.

    By a hook of the forward pass and one of the output: hooks of a module's backward pass are lost
    under torch.compile.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.input = self.output_gradient = torch.empty(0)
        module.register_forward_hook(self._keep_input)

    def _keep_input(self, _: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        # Copies: what comes after may change both in place.
        self.input = given[0].detach().clone()
        if made.requires_grad:
            made.register_hook(self._keep_output_gradient)

    def _keep_output_gradient(self, gradient: Tensor) -> None:
        self.output_gradient = gradient.detach().clone()


def compared_by_reference(name: str, tap: Tap) -> list[AuditedLayer]:
    """The gradients of a Linear's parameters beside those that the reference engine computes.

    To be called before the optimizer changes the parameters.
    """
    parameters = dict(tap.module.named_parameters(recurse=False))
    again = {key: ReferenceTensor(_double(value)) for key, value in parameters.items()}
    x = ReferenceTensor(_double(tap.input), requires_grad=False)
    output = linear(x, again["weight"], again.get("bias"))
    (output * _double(tap.output_gradient)).sum().backward()
    return [
        _audited(f"{name}.{key}", "Linear", value.grad, again[key].grad)
        for key, value in parameters.items()
    ]


def compared_by_differences(
    name: str, function: type[torch.autograd.Function], given: Tensor
) -> AuditedLayer:
    """The slope of a custom function as its backward has it, beside that of finite differences.

    given: what the job gave it. Raises ValueError where the slope is not known, as at a kink.
    """
    slopes = slopes_of_function(FunctionCall(function, (given.clone().requires_grad_(),)))
    if slopes is None or not slopes.known:
        raise ValueError(f"{function.__name__} is not smooth where it was called")
    return AuditedLayer(layer=name, module=function.__name__, relative_error=slopes.error)


def _audited(layer: str, module: str, mine: Tensor | None, reference: Any) -> AuditedLayer:
    found = difference(_double(mine), reference)
    return AuditedLayer(
        layer=layer,
        module=module,
        relative_error=found.relative_error,
        nonfinite=found.nonfinite,
        reference_nonfinite=found.reference_nonfinite,
    )


def _double(tensor: Tensor | None) -> Any:
    assert tensor is not None
    return tensor.detach().double().numpy()


def audits_of(taps: dict[str, Tap], step: int) -> list[Audit]:
    """Compare what was kept of a step, by the reference engine and by finite differences."""
    by_reference: list[AuditedLayer] = []
    by_differences: list[AuditedLayer] = []
    for name, tap in taps.items():
        if isinstance(tap.module, nn.Linear):
            by_reference += compared_by_reference(name, tap)
        elif isinstance(tap.module, Activation):
            by_differences.append(compared_by_differences(name, tap.module.function, tap.input))
    compared: dict[Method, list[AuditedLayer]] = {
        "reference": by_reference,
        "finite_difference": by_differences,
    }
    return [
        Audit(optimizer=OPTIMIZER, step=step, method=method, dtype="float32", layers=layers)
        for method, layers in compared.items()
        if layers
    ]


def train(
    function: type[torch.autograd.Function], audited: Callable[[str, list[Audit]], None]
) -> None:
    """Train a network on scikit-learn's digits. audited: given the run's id and its audits."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images / 16, dtype=torch.float32)
    targets = torch.tensor(labels)
    layers = {"read": nn.Linear(64, 32), "squash": Activation(function), "guess": nn.Linear(32, 10)}
    model = nn.Sequential(OrderedDict(layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = gradwatch.watch(model, optimizer, name="audited digits")
    taps = {name: Tap(module) for name, module in model.named_children()}
    for step in range(1, STEPS + 1):
        batch = torch.randint(len(inputs), (64,))
        loss = functional.cross_entropy(model(inputs[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        # Before the step changes the weights; told after it, for a run begins with its first step.
        audits = audits_of(taps, step) if step in AUDITED_STEPS else []
        optimizer.step()
        monitor.log(loss=loss)
        if audits:
            print(f"step {step}, loss {loss.item():.3f}")
            audited(monitor.run_id, audits)
    monitor.finish()


def send(client: Client, run: str, audits: Sequence[Audit]) -> None:
    """Send audits as soon as the collector knows the run. Raises CollectorError."""
    deadline = time.monotonic() + PATIENCE_S
    for audit in audits:
        while True:
            try:
                client.send_audit(run, audit)
                break
            except CollectorError as error:
                # The agent introduces its run beside the training, within about a second.
                if error.status != 404 or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def show(audits: Sequence[Audit]) -> None:
    """Print audits as a table, a line a layer."""
    for audit in audits:
        allowed = tolerance_of(audit.method, audit.dtype)
        for layer in audit.layers:
            error = layer.relative_error
            right = error is not None and error <= allowed
            print(
                f"  {layer.layer:13} {layer.module:14} {audit.method:18}"
                f"error {error:8.1e}  allowed {allowed:.0e}  {'right' if right else 'WRONG'}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Audit the gradients of a small network.")
    parser.add_argument("--right", action="store_true", help="without the wrong sign")
    given = parser.parse_args()
    url = os.environ.get("GRADWATCH_URL", "")
    client = Client(url, os.environ.get("GRADWATCH_TOKEN")) if url else None

    def audited(run: str, audits: list[Audit]) -> None:
        show(audits)
        if client is not None:
            send(client, run, audits)

    train(Softsign if given.right else WrongSoftsign, audited)


if __name__ == "__main__":
    main()

"""Layers have the names that the model's author gave them, once each, in order of execution."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradwatch.layers import ExecutionOrder, Layer, named_layers, owning_models


class Net(nn.Module):
    """Registered in another order than it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))
        self.embedding = nn.Embedding(10, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)))


NAMES = [
    "head.weight",
    "head.bias",
    "body.0.weight",
    "body.0.bias",
    "body.2.weight",
    "body.2.bias",
    "embedding.weight",
]
TOKENS = torch.tensor([1, 2, 3])


def names(*models: nn.Module) -> list[str]:
    return [layer.name for layer in named_layers(models)]


def in_order(order: ExecutionOrder, layers: list[Layer]) -> list[str]:
    depths = order.read(layers)
    assert sorted(depths) == list(range(len(layers)))
    return [layer.name for _, layer in sorted(zip(depths, layers, strict=True))]


def test_layers_are_named_as_in_the_models_source() -> None:
    assert names(Net()) == NAMES


def test_data_parallel_leaves_no_trace_in_names() -> None:
    assert names(nn.DataParallel(Net())) == NAMES


def test_torch_compile_leaves_no_trace_in_names() -> None:
    assert names(torch.compile(Net(), backend="eager")) == NAMES


def test_lightning_fabric_leaves_no_trace_in_names() -> None:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu")
    model = Net()
    wrapped, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert names(wrapped) == NAMES


def test_wrappers_around_wrappers_leave_no_trace_in_names() -> None:
    assert names(torch.compile(nn.DataParallel(torch.compile(Net(), backend="eager")))) == NAMES


def test_a_wrapper_inside_the_model_leaves_no_trace_in_names() -> None:
    model = Net()
    model.body = nn.DataParallel(model.body)  # pyright: ignore[reportAttributeAccessIssue]
    assert names(model) == NAMES


def test_distributed_data_parallel_leaves_no_trace_in_names(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        assert names(DistributedDataParallel(Net())) == NAMES
    finally:
        torch.distributed.destroy_process_group()


def test_a_part_that_its_author_called_module_keeps_its_name() -> None:
    model = nn.Module()
    model.module = nn.Linear(1, 1)
    assert names(model) == ["module.weight", "module.bias"]


def test_a_tied_weight_is_one_layer_with_its_other_name_beside_it() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "head": nn.Linear(4, 4, bias=False)})
    model["head"].weight = model["embedding"].weight
    (layer,) = named_layers([model])
    assert layer.name == "embedding.weight"
    assert layer.aliases == ("head.weight",)
    assert layer.describe(0, True).tied_to == ("head.weight",)


def test_several_models_have_distinct_names_told_apart_by_class() -> None:
    found = names(nn.Sequential(nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1)), Net())
    assert found[:4] == ["0.weight", "0.bias", "Sequential.0.weight", "Sequential.0.bias"]
    assert found[4:] == NAMES
    assert len(set(names(*[nn.Linear(1, 1) for _ in range(4)]))) == 8


@pytest.mark.parametrize(
    ("module", "name", "role", "unit_dim"),
    [
        (nn.Linear(2, 3), "weight", "weight", 0),
        (nn.Linear(2, 3), "bias", "bias", None),
        (nn.Conv2d(2, 3, 1), "weight", "weight", 0),
        (nn.ConvTranspose2d(2, 3, 1), "weight", "weight", 1),
        (nn.BatchNorm2d(3), "weight", "norm", None),
        (nn.LayerNorm(3), "bias", "norm", None),
        (nn.Embedding(2, 3), "weight", "embedding", None),
        (nn.LSTM(2, 3), "weight_ih_l0", "weight", None),
        (nn.LSTM(2, 3), "bias_hh_l0", "bias", None),
    ],
)
def test_role_and_units_follow_from_the_owner(
    module: nn.Module, name: str, role: str, unit_dim: int | None
) -> None:
    layer = next(layer for layer in named_layers([module]) if layer.name == name)
    assert layer.role == role
    assert layer.unit_dim == unit_dim
    described = layer.describe(3, False)
    assert described.module == type(module).__name__
    assert described.shape == tuple(layer.parameter.shape)
    assert described.dtype == "float32"
    assert (described.depth, described.optimized, described.trainable) == (3, False, True)


def test_one_backward_pass_shows_the_order_of_execution() -> None:
    model = Net()
    layers = list(named_layers([model]))
    order = ExecutionOrder(layer.parameter for layer in layers)
    model(TOKENS).sum().backward()
    modules = [name.rsplit(".", 1)[0] for name in in_order(order, layers)]
    assert list(dict.fromkeys(modules)) == ["embedding", "body.0", "body.2", "head"]


def test_without_a_backward_pass_the_order_is_that_of_registration() -> None:
    layers = list(named_layers([Net()]))
    assert in_order(ExecutionOrder(layer.parameter for layer in layers), layers) == NAMES


def test_a_layer_that_was_not_reached_stands_by_its_neighbour() -> None:
    model = Net()
    model.body[0].bias.requires_grad_(False)
    layers = list(named_layers([model]))
    order = ExecutionOrder(layer.parameter for layer in layers)
    model(TOKENS).sum().backward()
    found = in_order(order, layers)
    assert found.index("body.0.bias") == found.index("body.0.weight") + 1


def test_the_hooks_for_the_order_are_gone_once_it_is_read() -> None:
    model = nn.Linear(1, 1)
    order = ExecutionOrder(model.parameters())
    order.read(list(named_layers([model])))
    model(torch.ones(1, 1)).sum().backward()
    assert not order._seen


def test_the_owner_of_parameters_is_the_outermost_module_that_holds_them() -> None:
    inner = Net()
    outer = nn.Sequential(inner)
    other = nn.Linear(1, 1)
    assert owning_models(list(inner.head.parameters())) == [outer]
    assert owning_models([*inner.parameters(), *other.parameters()]) == [outer, other]


def test_a_small_holder_of_shared_parameters_does_not_hide_the_model() -> None:
    model = Net()
    loss = nn.Module()
    loss.weight = model.head.weight
    assert owning_models(list(model.parameters())) == [model]


def test_a_module_that_was_never_initialised_does_not_hinder_the_search() -> None:
    class Unborn(nn.Module):
        def __init__(self) -> None:
            pass

    unborn = Unborn()
    model = nn.Linear(1, 1)
    assert owning_models(list(model.parameters())) == [model]
    del unborn


def test_a_module_that_cannot_say_what_it_holds_does_not_hinder_the_search() -> None:
    class Closed(nn.Module):
        def children(self) -> Iterator[nn.Module]:
            raise RuntimeError("no children")

        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
            raise RuntimeError("no parameters")

    closed = Closed()
    model = nn.Linear(1, 1)
    assert owning_models(list(model.parameters())) == [model]
    del closed

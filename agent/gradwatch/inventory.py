"""What the layers of one optimizer are: found, named, put in order, and told when they change."""

from __future__ import annotations

import time
import weakref
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradwatch.layers import ExecutionOrder, Layer, in_shards, named_layers, shares_a_mesh
from gradwatch.measure import REQUIRES_GRAD, Meter
from gradwatch.notice import say
from gradwatch.survey import Survey
from gradwatch.wire.frame import MAX_LAYERS, LayerInfo, Manifest

if TYPE_CHECKING:
    from gradwatch.job import Job


class Inventory:
    """The layers that the watch of one optimizer speaks of, as of the last `refresh`.

    models: those that the script named; None when they are to be found.
    """

    def __init__(
        self,
        job: Job,
        optimizer: weakref.ref[torch.optim.Optimizer],
        name: str,
        models: Sequence[nn.Module] | None,
    ) -> None:
        self.layers: list[Layer] = []
        self.parameters: list[Tensor] = []  # theirs
        self.meter = Meter(())  # of them
        self.extras: list[Layer] = []  # those of them that no optimizer holds
        self.version = 0  # of the last manifest
        self.sentinel: Tensor | None = None  # a small one of the input's: a NaN reaches it
        # Between ranks there is nothing to compare where every layer is in shards.
        self.comparable = job.run.world_size > 1
        self.averaged: Tensor | None = None  # the sentinel, if torch averages it over all ranks
        self._job = job
        self._surveys = job.surveys
        self._world_size = job.run.world_size
        self._optimizer = optimizer
        self._name = name
        self._models = None if models is None else [weakref.ref(model) for model in models]
        self._found: list[weakref.ref[nn.Module]] = []  # the models, when none were given
        self._infos: list[LayerInfo] = []  # the layers, as the last manifest has them
        self._since = time.monotonic()  # when the optimizer's parameters last changed
        self._signature: tuple[list[int], list[bool]] | None = None
        self._dirty = True
        # One parameter, as of an optimizer in the backward pass, has no order.
        ordered = named_layers(models or ()) if len(self.held()) > 1 else ()
        self._order: ExecutionOrder | None = ExecutionOrder(layer.parameter for layer in ordered)

    def held(self) -> list[Tensor]:
        """The parameters that the optimizer holds now, in its order."""
        optimizer = self._optimizer()
        groups: list[dict[str, Any]] = optimizer.param_groups if optimizer else []
        return [parameter for group in groups for parameter in group["params"]]

    def changed(self) -> None:
        """Look at the layers again at the next `refresh`."""
        self._dirty = True

    def refresh(self) -> None:
        """Describe the layers anew when they may be others than those of the last time."""
        held = self.held()
        signature = _signature(held, self.parameters)
        changed = signature != self._signature
        if self._dirty or self._order is not None or changed:
            if changed and self.version:
                self._since = time.monotonic()
            self._describe(held)
            self.parameters = [layer.parameter for layer in self.layers]
            self._signature = _signature(held, self.parameters)

    def survey(self, held: Sequence[Tensor] = ()) -> Survey:
        """Of the models that were given, else of those that were found."""
        models = (known() for known in self._models or self._found)
        alive = [model for model in models if model is not None]
        return self._surveys.of(alive, held, self._since)

    def close(self) -> None:
        """Take every hook away, and let go of the model."""
        if self._order is not None:
            self._order.read(())
        self.forget()

    def forget(self) -> None:
        """Keep none of the optimizer's tensors alive."""
        self.layers, self.parameters, self._signature = [], [], None
        self.extras, self.sentinel, self.averaged = [], None, None
        self.meter = Meter(())

    def _describe(self, held: list[Tensor]) -> None:
        """Name the layers, order them, and send the manifest if it is another than the last."""
        final = self._models is not None or self._find(held)
        survey = self.survey(held)
        # Where optimizers are found as they step, others may come that hold the rest.
        early = not self.layers and self._models is None
        layers = self._layers_in(survey, held, self._surveys.promised() if early else ())
        if len(layers) > MAX_LAYERS:
            say(f"{self._name} has {len(layers)} layers; the first {MAX_LAYERS} are recorded")
            layers = layers[:MAX_LAYERS]
        order, self._order = self._order, None
        depths = (order or ExecutionOrder(())).read(layers)
        if early and len(layers) > 1:
            # Found at its first step: the next backward pass shows the order of execution.
            self._order = ExecutionOrder(layer.parameter for layer in layers)
        if [_key(layer) for layer in layers] != [_key(layer) for layer in self.layers]:
            self.meter = Meter(layers)  # else the old one goes on counting dead units
        self.layers = layers
        by_depth = sorted(zip(depths, layers, strict=True), key=lambda item: item[0])
        trained = [layer.parameter for _, layer in by_depth if layer.parameter.requires_grad]
        self.sentinel = min(trained[:2], key=lambda tensor: tensor.numel(), default=None)
        replicas = self._replicas(survey)
        self._dirty = early or not final
        mine = set(map(id, held))
        infos = [
            layer.describe(depth, id(layer.parameter) in mine, id(layer.parameter) in replicas)
            for layer, depth in zip(layers, depths, strict=True)
        ]
        if self.version and infos == self._infos:
            return
        self.version += 1
        self._infos = infos
        self._job.say(
            Manifest(
                optimizer=self._name,
                version=self.version,
                rank=self._job.rank,
                layers=infos,
            )
        )

    def _layers_in(
        self, survey: Survey, held: list[Tensor], others: Collection[int]
    ) -> list[Layer]:
        """Those that the optimizer holds, and those of the models that are for it to describe.

        others: identities of parameters that are none of these.
        """
        self._surveys.claim(self, held)
        self.extras = self._surveys.extras(self, survey, others)
        places = survey.places
        wanted = {places[id(tensor)] for tensor in held if id(tensor) in places}
        wanted.update(places[id(layer.parameter)] for layer in self.extras)
        return [survey.layers[place] for place in sorted(wanted)] + [
            Layer(f"{self._name}.parameter_{place}", tensor, None)
            for place, tensor in enumerate(held)
            if id(tensor) not in places
        ]

    def _replicas(self, survey: Survey) -> set[int]:
        """Identities of the parameters that all ranks are to hold alike, where torch says so."""
        parameters = [layer.parameter for layer in self.layers]
        whole = [each for each in parameters if not in_shards(each)]
        self.comparable = self._world_size > 1 and bool(whole)
        self.averaged = None
        if not self.comparable:
            return set()
        wrapped = survey.wrapped(self._world_size) & {id(parameter) for parameter in whole}
        if self.sentinel is not None and id(self.sentinel) in wrapped:
            self.averaged = self.sentinel
        if shares_a_mesh(parameters, self._world_size):
            return {id(parameter) for parameter in whole}
        return wrapped

    def _find(self, held: Sequence[Tensor]) -> bool:
        """Look for the models that hold the optimizer's parameters. False to look again later."""
        found, final = self._surveys.owners(held, self._since)
        self._found = [weakref.ref(model) for model in found]
        return final


def _signature(held: list[Tensor], known: list[Tensor]) -> tuple[list[int], list[bool]]:
    """What changes when parameters come, go, freeze or thaw."""
    return list(map(id, held)), list(map(REQUIRES_GRAD, known))


def _key(layer: Layer) -> tuple[str, int]:
    return layer.name, id(layer.parameter)

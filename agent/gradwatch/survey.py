"""Surveys of the models: what one look at them shows, for all optimizers of a job.

An optimizer for each parameter, stepped in the backward pass, makes hundreds of them, and each that
walked through the model, or through the garbage collector's objects, would make the first steps
last minutes. So a look serves all of them. It is let go of when one of them comes to its second
step since, which is when an iteration is over: what changes in the models between iterations is
seen, and nothing is kept alive.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

from torch import Tensor, nn

from gradwatch.activations import Modules
from gradwatch.layers import (
    Layer,
    Roots,
    clean_paths,
    held_by_optimizers,
    named_layers,
    wrapped_by_ddp,
)
from gradwatch.suspects import Suspect, broken_data
from gradwatch.tracer import backward_pass


class Described(Protocol):
    """The layers of one optimizer, as far as others must know of them."""

    @property
    def extras(self) -> Sequence[Layer]:
        """Those that are described with it though no optimizer holds them."""
        ...

    def held(self) -> list[Tensor]: ...
    def changed(self) -> None: ...


class Watch(Protocol):
    """A watch, as far as surveys must know of it."""

    @property
    def inventory(self) -> Described: ...


class Survey:
    """The layers and modules of one set of models."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._models = models
        self.made_at = time.monotonic()
        self._wrapped: set[int] | None = None
        self.modules = Modules(pair for model in models for pair in clean_paths(model))

    @functools.cached_property
    def layers(self) -> list[Layer]:
        """All of them, in order of registration."""
        return list(named_layers(self._models))

    @functools.cached_property
    def places(self) -> dict[int, int]:
        """Of each parameter, by its identity, among the layers."""
        return {id(layer.parameter): place for place, layer in enumerate(self.layers)}

    @functools.cached_property
    def unseen(self) -> set[int]:
        """Places of the layers that no watch has looked at yet, but to name its own."""
        return set(range(len(self.layers)))

    def knows(self, parameters: Iterable[Tensor]) -> bool:
        return all(id(parameter) in self.places for parameter in parameters)

    def wrapped(self, world_size: int) -> set[int]:
        """Identities of the parameters that torch keeps equal on all ranks of the job."""
        if self._wrapped is None:
            parameters = [layer.parameter for layer in self.layers]
            self._wrapped = wrapped_by_ddp(self._models, parameters, world_size)
        return self._wrapped


class Surveys:
    """The surveys of this iteration. watches: those of the job that still watch."""

    def __init__(self, watches: Callable[[], Iterable[Watch]]) -> None:
        self._watches = watches
        self.forget()

    def forget(self) -> None:
        """Look anew from here on."""
        self._stepped: set[str] = set()
        self._kept: dict[tuple[int, ...], Survey] = {}
        self._roots: Roots | None = None
        self._in_vain = False
        self._suspect: tuple[int, Suspect | None] | None = None
        self._claimed: set[int] | None = None
        self._listed: dict[int, Described] | None = None
        self._promised: set[int] | None = None

    @property
    def fresh(self) -> bool:
        """Whether nothing was looked at since."""
        return not self._kept and not (self._roots or self._suspect) and self._claimed is None

    def stepped(self, optimizer: str) -> None:
        """An optimizer comes to a step: all is looked at anew if it had come to one since.

        There is no need to tell it while they are `fresh`.
        """
        if optimizer in self._stepped:
            self.forget()
        self._stepped.add(optimizer)

    def of(
        self, models: Sequence[nn.Module], held: Sequence[Tensor] = (), since: float = 0.0
    ) -> Survey:
        """What the models are made of. held: parameters that were last changed at `since`; when
        some of them are not found a survey that was made before is no good."""
        key = tuple(map(id, models))
        survey = self._kept.get(key)
        if survey is None or (survey.made_at < since and not survey.knows(held)):
            survey = self._kept[key] = Survey(models)
        return survey

    def owners(self, held: Sequence[Tensor], since: float) -> tuple[list[nn.Module], bool]:
        """The outermost modules that hold the parameters, and whether that is for good.

        It is not when some were not found by a look that was taken before `since`. A new look is
        taken for them, but after one that was in vain only in the next iteration.
        """
        # The garbage collector may call `forget` at any time.
        roots = self._roots or Roots()
        if not roots.know(held) and roots.made_at < since and not self._in_vain:
            roots = Roots()
            self._in_vain = not roots.know(held)
        self._roots = roots
        return roots.of(held), roots.know(held) or roots.made_at >= since

    def suspect(self, own: frozenset[int]) -> Suspect | None:
        """The data that is not finite; see `broken_data`. Optimizers that step within one backward
        pass have the same."""
        running = backward_pass()
        if running is None:
            return broken_data(inspect.currentframe(), own)
        if self._suspect is None or self._suspect[0] != running:
            self._suspect = running, broken_data(inspect.currentframe(), own)
        return self._suspect[1]

    def claim(self, by: Described, held: Iterable[Tensor]) -> None:
        """These are held by an optimizer: none but `by` describes them as held by none."""
        claimed, listed = self._claims()
        for parameter in held:
            claimed.add(id(parameter))
            other = listed.pop(id(parameter), None)
            if other is not None and other is not by:
                other.changed()

    def extras(
        self, inventory: Described, survey: Survey, but: Collection[int] = ()
    ) -> list[Layer]:
        """The layers that `inventory` is to have though no optimizer holds them.

        That is those it described before, and those that no other does. but: identities of
        parameters that are left out.
        """
        claimed, listed = self._claims()
        mine = {id(layer.parameter) for layer in inventory.extras}
        places = survey.unseen | {survey.places[each] for each in mine if each in survey.places}
        survey.unseen.clear()
        found: list[Layer] = []
        for place in sorted(places):
            layer = survey.layers[place]
            key = id(layer.parameter)
            if key in claimed or key in but:
                continue
            if listed.setdefault(key, inventory) is inventory:
                found.append(layer)
        return found

    def promised(self) -> set[int]:
        """What `held_by_optimizers` finds."""
        if self._promised is None:
            self._promised = held_by_optimizers()
        return self._promised

    def _claims(self) -> tuple[set[int], dict[int, Described]]:
        """Parameters that optimizers hold, and who describes others, by identity."""
        if self._claimed is None or self._listed is None:
            kept = [watch.inventory for watch in self._watches()]
            self._claimed = {id(parameter) for each in kept for parameter in each.held()}
            self._listed = {id(layer.parameter): each for each in kept for layer in each.extras}
        return self._claimed, self._listed

"""Locating the first non-finite value: when to trace a step, and what to make of the trace.

Tracing costs a step several times its length, so it is armed for a few steps only, after a first
NaN; or for every step with `locate_nan=True`. By the step after a NaN the optimizer has usually
carried it into the weights, and everything is NaN. So when the gradients are found non-finite,
which is before the optimizer's step, the weights are copied, once, and the traced step is computed
a second time with them, beside the real one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from gradwatch.compiled import was_compiled
from gradwatch.provenance import origin_of
from gradwatch.shadows import has_storage, storage_key
from gradwatch.suspects import Suspect
from gradwatch.tracer import Trace, Tracer, backward_pass, modes_on_stack
from gradwatch.wire.frame import Origin

# A NaN that depends on the batch may not come again at once.
ARMED_STEPS = 5
# Weights over this size are not copied: the job's memory is its own.
MAX_COPY_BYTES = 1 << 29


class Locator:
    """Traces steps of one optimizer, in the training thread, until an origin is known.

    always: trace every step, so that the first NaN is named at its own step.
    models: the modules by path, asked for when a trace begins.
    """

    def __init__(
        self,
        optimizer: str,
        rank: int,
        always: bool,
        models: Callable[[], Sequence[tuple[str, nn.Module]]],
    ) -> None:
        self._optimizer = optimizer
        self._rank = rank
        self._models = models
        self._always = always
        self._left = 0  # steps that are still to be traced
        self._armed_before = False
        self._kept = False
        self._done = False
        self._before: dict[int, torch.UntypedStorage] = {}
        self._suspect: Origin | None = None
        self._obstacle = ""  # why the last step could not be traced
        self._tracer: Tracer | None = None
        self._thread = 0

    def arm(self) -> None:
        """Trace the steps to come: a NaN was seen. Only the first call counts."""
        if not self._armed_before and not self._done:
            self._armed_before = True
            self._left = ARMED_STEPS

    def keep(
        self,
        weights: Sequence[Tensor],
        step: int,
        look: Callable[[frozenset[int]], Suspect | None],
    ) -> None:
        """Copy the weights, which `step` is about to lose, and look at the data that it used.

        look: finds data that is not finite, given the storages of what is none.
        """
        if self._kept or self._done or self._always:
            return
        self._kept = True
        own = frozenset(storage_key(weight) for weight in weights if has_storage(weight))
        own |= frozenset(gradient_storages(weights))
        suspect = look(own)
        if suspect is not None:
            self._suspect = Origin(
                optimizer=self._optimizer,
                rank=self._rank,
                step=step,
                kind="batch",
                operation=suspect.name,
                source=suspect.source,
                operands=(suspect.tensor,),
                note=suspect.note,
            )
        storages = {
            storage_key(weight): weight.untyped_storage()
            for weight in weights
            if has_storage(weight)
        }
        if sum(storage.nbytes() for storage in storages.values()) <= MAX_COPY_BYTES:
            self._before = {key: storage.clone() for key, storage in storages.items()}

    @property
    def armed(self) -> bool:
        """Whether `begin` would trace a step."""
        return (self._always or self._left > 0) and not self._done and self._tracer is None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to trace, and nothing to tell of what was."""
        return not (self.armed or self._tracer is not None or self.obstructed)

    def begin(self) -> None:
        """After an optimizer's step: trace the next one, if that is wanted and can be done."""
        if not self.armed:
            return
        models = self._models()
        self._obstacle = _obstacle(module for _, module in models)
        if self._obstacle:
            self._left = max(0, self._left - 1)
            return
        tracer = Tracer(models, self._before)
        tracer.start()
        self._tracer = tracer
        self._thread = threading.get_ident()

    def end(self) -> Trace | None:
        """Before an optimizer's step: what was traced since `begin`, if anything was."""
        tracer = self._tracer
        if tracer is None or threading.get_ident() != self._thread:
            return None
        self._tracer = None
        self._left = max(0, self._left - 1)
        trace = tracer.stop()
        if not self._left:
            self._before = {}
        return trace

    def close(self) -> None:
        """Trace no more. The mode stays, idle, when another thread than the traced one calls."""
        self._left, self._always = 0, False
        if self._tracer is not None:
            self._tracer.abandon()
            self.end()

    def explain(
        self, trace: Trace, step: int, gradients: Sequence[int]
    ) -> Callable[[], Sequence[Origin]]:
        """What to do in the agent's own thread: the origin, the first time that one is found."""
        last = self._armed_before and not self._left

        def explained() -> Sequence[Origin]:
            if self._done:
                return ()
            origin = origin_of(trace, gradients, self._optimizer, self._rank, step)
            if origin is None and last and not self._always:
                origin = self._suspect or self._nothing(step, trace.given_up, trace.replayed)
            return self._found(origin)

        return explained

    @property
    def obstructed(self) -> bool:
        """Steps were to be traced and could not be: `finish` tells it."""
        return bool(self._obstacle) and self._armed_before and not self._left and not self._done

    def finish(self) -> Sequence[Origin]:
        """In the agent's own thread, when no step will be traced any more: what is still untold."""
        if self._done or not self._armed_before:
            return ()
        untold = self._nothing(0, self._obstacle) if self._obstacle else None
        return self._found(self._suspect or untold)

    def _found(self, origin: Origin | None) -> Sequence[Origin]:
        if origin is None:
            return ()
        self._done = True
        self._before = {}
        return (origin,)

    def _nothing(self, step: int, obstacle: str, replayed: bool = False) -> Origin:
        note = obstacle or (
            f"{ARMED_STEPS} steps were traced and stayed finite: what only the batch of the first "
            "step held is the likely cause. locate_nan=True names it on the next run"
        )
        return Origin(
            optimizer=self._optimizer,
            rank=self._rank,
            step=step,
            kind="nothing",
            replayed=replayed,
            note=note,
        )


def gradient_storages(parameters: Sequence[Tensor]) -> list[int]:
    """The storages of the gradients that parameters have now."""
    gradients = [parameter.grad for parameter in parameters]
    return [storage_key(item) for item in gradients if item is not None and has_storage(item)]


def _obstacle(modules: Iterable[nn.Module]) -> str:
    """Why a step cannot be traced; "" when it can."""
    if was_compiled(modules):
        return (
            "what torch.compile made is not traced: run it with TORCH_COMPILE_DISABLE=1 to have "
            "the operation named"
        )
    if backward_pass() is not None:
        # There autograd brings the modes of its caller back, and takes ours away.
        return "steps that are taken within the backward pass are not traced"
    return "another dispatch mode was on" if modes_on_stack() > 0 else ""

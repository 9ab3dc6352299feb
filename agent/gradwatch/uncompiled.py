"""Keeping torch.compile out of the agent: where a training step is compiled, what it calls of ours
would be compiled with it. Its graph is left around each of them instead, as it is for parts of
torch's own optimizers, and come back to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """A function of ours for the training script to call."""
    return cast("F", torch.compiler.disable(function))


def uncompiled_hook(function: F) -> F:
    """A function of ours for a hook to call, which may be any step's.

    The wrapper of torch.compile's costs a tenth of a small model's norm frame. It is left out while
    nothing compiled runs: then nobody looks at what is called.
    """
    wrapped = uncompiled(function)
    looking = _looking()
    if looking is None:
        return wrapped

    def called(*args: Any, **kwargs: Any) -> Any:
        return (function if looking() is None else wrapped)(*args, **kwargs)

    leave_uncompiled(called)
    return cast("F", called)


def leave_uncompiled(*functions: Callable[..., Any]) -> None:
    """Have functions run as they are, with nothing around them: what they call has to be among
    them, or wrapped."""
    from torch._dynamo.decorators import skip  # slow to import, and torch's optimizers have

    for each in functions:
        skip(each)


@functools.cache
def _looking() -> Callable[[], object] | None:
    """Says what looks at each function that is called, in this thread: None where nothing does.

    It has no public name; None where this torch has none at all.
    """
    try:
        from torch._C._dynamo.eval_frame import (  # pyright: ignore
            get_eval_frame_callback,  # pyright: ignore[reportUnknownVariableType]
        )
    except ImportError:
        return None
    return cast("Callable[[], object]", get_eval_frame_callback)

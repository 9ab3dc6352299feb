"""Whether torch.compile has a part in a job: then nothing that it could see is touched."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn


def was_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether anything was compiled in this process, or one of these modules is to be."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    counters = getattr(dynamo, "counters", {})
    return any(counters.get(name) for name in ("frames", "stats")) or any(
        type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in modules
    )

"""gradwatch: watches neural networks train and says what is wrong with their gradients.

    import gradwatch
    monitor = gradwatch.watch(model, optimizer)

Importing this needs no torch; `watch` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradwatch.acting import TrainingStoppedError
    from gradwatch.checkup.doctor import doctor
    from gradwatch.client import Client, CollectorError
    from gradwatch.health.finding import Finding
    from gradwatch.monitor import Monitor, watch

__version__ = "0.1.0"
__all__ = [
    "Client",
    "CollectorError",
    "Finding",
    "Monitor",
    "TrainingStoppedError",
    "__version__",
    "doctor",
    "watch",
]

_HOME = {
    "Client": "gradwatch.client",
    "CollectorError": "gradwatch.client",
    "Finding": "gradwatch.health.finding",
    "Monitor": "gradwatch.monitor",
    "TrainingStoppedError": "gradwatch.acting",
    "doctor": "gradwatch.checkup.doctor",
    "watch": "gradwatch.monitor",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gradwatch' has no attribute {name!r}")
    try:
        module = import_module(_HOME[name])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f"gradwatch.{name} needs PyTorch, which is not installed here: "
            "pip install 'gradwatch[torch]', or see https://pytorch.org",
            name="torch",
        ) from None
    return getattr(module, name)

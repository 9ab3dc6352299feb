"""One thread after the other: where several begin to train at the same moment."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

_turn = threading.RLock()


def in_turn(function: F) -> F:
    """What no two threads may run at once, be it this or another function that is marked so."""

    @functools.wraps(function)
    def called(*args: Any, **keywords: Any) -> Any:
        with _turn:
            return function(*args, **keywords)

    return cast("F", called)


def _forked() -> None:
    """A thread that had its turn is not in the new process to end it."""
    global _turn
    _turn = threading.RLock()


os.register_at_fork(after_in_child=_forked)
